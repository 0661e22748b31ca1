"""Tokenizers: nothing is lost, spans are whole characters, special tokens in a text are text, chunks decode to chunks."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from retro.chunks import chunk_spans
from retro.errors import ConfigError, FormatError
from retro.tokenizer import BOS, EOS, PIECE_CHARS, Tokenizer, pieces

TRAINING_TEXTS = [
    "The oil crisis began in October 1973. The embargo was an embargo of oil, and prices rose.",
    "Der Überfluss, naïve café; 日本語の文章です。日本の石油。 Привет, мир! 🙂👩‍👩‍👧 done",
] * 3
BPE = Tokenizer.train(TRAINING_TEXTS, 330)
"""Small, so that most characters beyond ASCII are several tokens."""

BYTES = Tokenizer.train(TRAINING_TEXTS, 258)
"""Without a merge: a token for each byte."""

any_text = st.text(max_size=60)
# U+FFFD is how an unfinished character decodes, so that it cannot be told from one that stands in the text.
wide_text = st.text(alphabet=st.sampled_from("aé ß日本語🙂👩‍👧\n🇩🇪ह\u0301"), max_size=60)
special_text = st.lists(st.sampled_from([BOS, EOS, "[CLS]", "</s>", " ", "a", "🙂", "<|"]), max_size=8).map("".join)


@given(any_text | wide_text | special_text)
@example("")
@example(" \r\n\t\0\ufeff")
@example("\ufffd")
def test_decoding_gives_back_any_text(text: str) -> None:
    assert BPE.decode(BPE.encode(text).ids) == text


@given(any_text | wide_text | special_text)
def test_spans_are_in_order_and_together_are_the_text(text: str) -> None:
    ids, spans = BPE.encode(text)
    assert ids.dtype == np.int32
    assert spans.dtype == np.int64
    assert spans.shape == (len(ids), 2)
    end, rebuilt = 0, ""
    for first, last in spans.tolist():
        # The tokens of one character all have its span.
        assert first == end or first == end - 1
        rebuilt += text[max(first, end) : last]
        end = last
    assert rebuilt == text


def test_the_tokens_of_one_character_share_its_span() -> None:
    # One, four, two and one bytes.
    assert BYTES.encode("a🙂éb").spans.tolist() == [[0, 1], *[[1, 2]] * 4, *[[2, 3]] * 2, [3, 4]]


@given(special_text)
def test_special_tokens_in_a_text_are_text(text: str) -> None:
    ids = BPE.encode(text).ids.tolist()
    assert BPE.bos_id not in ids
    assert BPE.eos_id not in ids
    assert BPE.encode_batch([text, text]) == [ids, ids]


def test_decoding_leaves_special_tokens_out() -> None:
    ids = BPE.encode("oil").ids.tolist()
    assert BPE.decode([BPE.bos_id, *ids, BPE.eos_id]) == "oil"


def test_a_batch_gives_the_same_ids_as_single_texts() -> None:
    texts = ["", "oil", "日本 🙂", f"{BOS} x", " two  spaces"]
    assert BPE.encode_batch(texts) == [BPE.encode(text).ids.tolist() for text in texts]


# Long texts


def test_a_long_text_encodes_in_pieces_as_in_one(paragraphs: list[dict[str, Any]], tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.load(str(tokenizer_folder))
    text = "\n\n".join(record["text"] + " naïve 日本語 🙂 1 2  3_a " for record in paragraphs)
    text *= 2 * PIECE_CHARS // len(text) + 1
    assert len(list(pieces(text))) == 3
    whole = tokenizer.backend.encode(text, add_special_tokens=False)
    encoded = tokenizer.encode(text)
    np.testing.assert_array_equal(encoded.ids, whole.ids)
    np.testing.assert_array_equal(encoded.spans, whole.offsets)


def test_pieces_are_the_text_and_end_soon_after_their_size() -> None:
    text = "ab, cd  ef " * (3 * PIECE_CHARS // 11)
    parts = list(pieces(text))
    assert "".join(parts) == text
    # Between words stand either ", " or two spaces or "f a": only there a piece may end.
    assert [part[-1] + following[:2] for part, following in itertools.pairwise(parts)] == ["f a"] * 2
    assert [len(part) - PIECE_CHARS < 11 for part in parts[:-1]] == [True, True]


@pytest.mark.parametrize("text", ["", "a", "日" * (PIECE_CHARS + 5), "a" * PIECE_CHARS + " b"])
def test_a_text_without_a_place_to_cut_is_one_piece(text: str) -> None:
    expected = {"a" * PIECE_CHARS + " b": ["a" * PIECE_CHARS, " b"]}.get(text, [text] if text else [])
    assert list(pieces(text)) == expected


# Training, saving, loading


def test_training_twice_gives_the_same_tokenizer() -> None:
    again = Tokenizer.train(iter(TRAINING_TEXTS), 330)
    assert again.backend.to_str() == BPE.backend.to_str()
    assert again.fingerprint == BPE.fingerprint
    assert Tokenizer.train(TRAINING_TEXTS, 320).fingerprint != BPE.fingerprint


def test_a_trained_tokenizer_has_the_size_asked_for_and_all_bytes() -> None:
    assert BPE.vocab_size == 330
    assert (BPE.bos_id, BPE.eos_id) == (0, 1)
    assert BYTES.vocab_size == 258
    text = "".join(map(chr, range(0x250)))
    assert len(BYTES.encode(text).ids) == len(text.encode())
    # Every byte of these characters has its own id.
    assert len(set(BYTES.encode(text).ids.tolist())) == len(set(text.encode()))


def test_merges_learned_are_those_of_a_naive_bpe() -> None:
    # The pair "ab" stands five times. Then a space (written U+0120; it belongs to the word that follows) and "ab" stand
    # together four times, "ab" and "c" twice.
    tokenizer = Tokenizer.train(["ab ab ab abc abcd"], 260)
    model = json.loads(tokenizer.backend.to_str())["model"]
    assert model["merges"] == [["a", "b"], ["\u0120", "ab"]]


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size = 257: 256 bytes and 2 special tokens need at least 258"):
        Tokenizer.train(TRAINING_TEXTS, 257)


def test_no_text_to_train_on_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no text to train a tokenizer on"):
        Tokenizer.train([], 300)


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tok")
    for name in (tmp_path / "tok", tmp_path / "tok" / "tokenizer.json"):
        loaded = Tokenizer.load(str(name))
        assert loaded.fingerprint == BPE.fingerprint
        assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (0, 1, 330)
        text = f"oil 日本 🙂 {EOS}"
        np.testing.assert_array_equal(loaded.encode(text).ids, BPE.encode(text).ids)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "tok" / "tokenizer.json").read_bytes()


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[1]"):
        path.write_bytes(content)
        for name in (path, tmp_path):
            with pytest.raises(FormatError, match=r"tokenizer\.json is no tokenizer file"):
                Tokenizer.load(str(name))


@pytest.mark.parametrize("name", ["nowhere/at/all", "missing/tokenizer.json", "."])
def test_a_path_that_is_not_there_says_how_to_make_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load(name)
    assert str(caught.value) == f"there is no tokenizer.json in {name}: train one with `retro tokenizer train`"


def test_a_name_that_is_neither_here_nor_on_the_hub_says_so() -> None:
    with pytest.raises(ConfigError, match="no tokenizer 'no-such-tokenizer': it is neither a file or folder here nor"):
        Tokenizer.load("no-such-tokenizer")


def test_a_tokenizer_without_special_tokens_is_refused_by_name(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(ConfigError, match=r"the tokenizer has none of the special tokens <\|bos\|>, <s>"):
        Tokenizer.load(str(tmp_path))


# Tokenizers of others


@pytest.fixture(scope="module")
def word_piece() -> Tokenizer:
    """As of BERT: lower case, accents stripped, a template that adds [CLS] and [SEP], truncation and padding switched on."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        TRAINING_TEXTS,
        tokenizers.trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False),
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    return Tokenizer.wrap(backend)


def test_a_word_piece_tokenizer_has_its_own_bos_and_eos(word_piece: Tokenizer) -> None:
    assert (word_piece.bos_id, word_piece.eos_id) == (2, 3)


def test_a_foreign_tokenizer_adds_nothing_and_cuts_nothing(word_piece: Tokenizer) -> None:
    text = "The Oil crisis [SEP] began, naïve"
    ids, spans = word_piece.encode(text)
    assert 2 not in ids
    assert 3 not in ids
    # No token is longer than its word; whole words of the training text are found through their spans.
    words = [text[first:last] for first, last in spans.tolist()]
    assert "".join(words) == text.replace(" ", "")
    assert word_piece.encode_batch([text]) == [ids.tolist()]
    assert word_piece.encode_batch(["oil", text])[1] == ids.tolist()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["<s>", "</s>"], ("<s>", "</s>")),
        (["<|endoftext|>"], ("<|endoftext|>", "<|endoftext|>")),
        (["<|begin_of_text|>", "<|end_of_text|>"], ("<|begin_of_text|>", "<|end_of_text|>")),
        (["<bos>", "<eos>"], ("<bos>", "<eos>")),
        (["[CLS]", "[SEP]"], ("[CLS]", "[SEP]")),
        (["<s>", "</s>", BOS, EOS], (BOS, EOS)),
    ],
)
def test_bos_and_eos_are_found_under_their_usual_names(names: list[str], expected: tuple[str, str]) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.add_special_tokens(names)
    tokenizer = Tokenizer.wrap(backend)
    found = (backend.id_to_token(tokenizer.bos_id), backend.id_to_token(tokenizer.eos_id))
    assert found == expected


def test_wrapping_leaves_the_original_as_it_was(word_piece: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(word_piece.backend.to_str())
    backend.enable_truncation(4)
    Tokenizer.wrap(backend)
    assert backend.truncation is not None


def test_the_fingerprint_tells_tokenizers_apart(word_piece: Tokenizer) -> None:
    other = tokenizers.Tokenizer.from_str(BPE.backend.to_str())
    other.normalizer = tokenizers.normalizers.NFC()
    assert len({BPE.fingerprint, word_piece.fingerprint, Tokenizer.wrap(other).fingerprint}) == 3


# Chunks of a generated sequence


def generated_and_stored(tokenizer: Tokenizer, text: str, chunk_len: int) -> list[tuple[str, str]]:
    encoded = tokenizer.encode(text)
    ids = encoded.ids.tolist()
    spans = chunk_spans(encoded, chunk_len).tolist()
    return [
        (tokenizer.decode_chunk(ids, u * chunk_len, min((u + 1) * chunk_len, len(ids))), text[first:last])
        for u, (first, last) in enumerate(spans)
    ]


def check_chunks(tokenizer: Tokenizer, text: str, chunk_len: int) -> None:
    encoded = tokenizer.encode(text)
    for u, (generated, stored) in enumerate(generated_and_stored(tokenizer, text, chunk_len)):
        end = min((u + 1) * chunk_len, len(encoded.ids))
        split = end < len(encoded.ids) and encoded.spans[end, 0] < encoded.spans[end - 1, 1]
        assert generated == (stored[:-1] if split else stored)


@given(wide_text, st.integers(1, 9))
@example("🙂🙂🙂", 3)
@example("日本語", 2)
@example("👩‍👧", 1)
def test_a_chunk_decodes_to_the_stored_chunk_but_for_a_character_split_by_its_end(text: str, chunk_len: int) -> None:
    check_chunks(BPE, text, chunk_len)
    check_chunks(BYTES, text, chunk_len)


def test_a_character_split_by_the_right_border_is_in_the_chunk_that_ends_it() -> None:
    # Four tokens each, chunks of three: borders at 3 and 6, inside the first and the second character.
    assert generated_and_stored(BYTES, "🤖🤖", 3) == [("", "🤖"), ("🤖", "🤖🤖"), ("🤖", "🤖")]


def test_special_tokens_are_not_in_the_text_of_a_chunk() -> None:
    ids = [BPE.bos_id, *BPE.encode("oil and oil").ids.tolist(), BPE.eos_id]
    assert BPE.decode_chunk(ids, 0, len(ids)) == "oil and oil"


def test_the_bundled_corpus_generates_the_chunks_that_are_stored(
    paragraphs: list[dict[str, Any]], tokenizer_folder: Path
) -> None:
    tokenizer = Tokenizer.load(str(tokenizer_folder))
    for record in paragraphs[:10]:
        check_chunks(tokenizer, record["text"], 16)


def test_a_word_piece_text_keeps_its_spans_over_accents_and_capitals(word_piece: Tokenizer) -> None:
    text = "Über naïve CAFÉ"
    spans = word_piece.encode(text).spans
    assert "".join(text[first:last] for first, last in spans.tolist()) == text.replace(" ", "")


# Tokenizers of pretrained models


def pretrained(tokens: list[str], special: list[str]) -> tokenizers.Tokenizer:
    """A byte-level tokenizer that also has some tokens, of which it says that some are special."""
    backend = tokenizers.Tokenizer.from_str(BYTES.backend.to_str())
    content = json.loads(backend.to_str())
    content["added_tokens"] = []
    for name in (BOS, EOS):
        del content["model"]["vocab"][name]
    content["model"]["vocab"] |= {name: 256 + number for number, name in enumerate(tokens)}
    content["model"]["vocab"] = {name: number for number, name in enumerate(content["model"]["vocab"])}
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.add_special_tokens(special)
    return backend


@pytest.mark.parametrize(
    ("tokens", "special", "bos", "eos"),
    [
        (["<|endoftext|>"], ["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"),
        (["<s>", "<pad>", "</s>"], ["</s>", "<pad>"], "</s>", "</s>"),
        (["<unk>", "<s>", "</s>"], ["<unk>", "<s>", "</s>"], "<s>", "</s>"),
        (
            ["<|begin_of_text|>", "<|end_of_text|>"],
            ["<|begin_of_text|>", "<|end_of_text|>"],
            *["<|begin_of_text|>", "<|end_of_text|>"],
        ),
        (["<|endoftext|>", "<|im_start|>"], ["<|endoftext|>", "<|im_start|>"], "<|endoftext|>", "<|endoftext|>"),
        (["<pad>", "<eos>", "<bos>", "<s>", "</s>"], ["<pad>", "<eos>", "<bos>"], "<bos>", "<eos>"),
        (["<s>", "</s>", "<|endoftext|>"], ["<s>", "<|endoftext|>"], "<s>", "<|endoftext|>"),
        (["<s>", "</s>"], [], "<s>", "</s>"),
    ],
    ids=["gpt2", "opt", "llama2", "llama3", "qwen", "gemma", "phi3", "nothing-said"],
)
def test_bos_and_eos_are_those_that_pretrained_models_know(
    tokens: list[str], special: list[str], bos: str, eos: str
) -> None:
    """OPT begins texts with EOS and has a token <s>; Gemma's <s> is HTML; Qwen has no BOS; Phi-3's </s> is not special."""
    tokenizer = Tokenizer.wrap(pretrained(tokens, special))
    assert tokenizer.backend.id_to_token(tokenizer.bos_id) == bos
    assert tokenizer.backend.id_to_token(tokenizer.eos_id) == eos
