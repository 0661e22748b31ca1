"""Bits per byte against independent computations: transformers' own loss, a full forward pass for each token, and by hand."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from builders import plain_document, speak_up, toy_model_config
from transformers import GPT2Config, GPT2LMHeadModel

from eval.language_modeling import (
    EvalDocument,
    Foreign,
    LastWord,
    Mode,
    Neighbor,
    Part,
    Window,
    bits_per_byte,
    chunk_sums,
    evenly,
    last_word_hits,
    last_words,
    perplexities,
    read_eval_documents,
    score,
)
from retro.chunks import Passage
from retro.errors import ConfigError
from retro.generate import Role
from retro.model import Retro
from retro.tokenizer import Tokenizer

M = 4
TEXTS = [
    "the cat sat on the mat and the dog sat on the log, and that was that for the day",
    "when the rain comes the cat and the dog go home; na\u00efve caf\u00e9 \u20ac5 \U0001f408 said the book",
    "short",
    "a thin red line on the thin white paper of the other book that nobody reads any more in town",
]
one_thread = pytest.fixture(autouse=True)(builders.one_thread)


def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, 300)


class Library:
    """Passages that depend on the query; of them one in three is left out for the excluded group."""

    def __init__(self) -> None:
        self.excluded: list[list[str]] = []

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        assert role == "document"
        self.excluded += [list(groups) for groups in exclude or []]
        found = []
        for query in queries:
            n = sum(query.encode()) % (k + 1)
            texts = [TEXTS[(len(query) + i) % 4] for i in range(n)]
            found.append(
                [
                    Passage(
                        row=i, key="p", title="", url="", text=t[:9], continuation=t[9:20], score=1.0, metadata="{}"
                    )
                    for i, t in enumerate(texts)
                ]
            )
        return found


def random_model(dtype: torch.dtype = torch.float64, **changes: object) -> Retro:
    model = Retro(toy_model_config(**({"vocab_size": 300, "chunk_len": M, "cca_layers": (1, 2)} | changes)))
    speak_up(model)
    return model.to(dtype).eval()


def read(num_neighbors: int = 3) -> list[EvalDocument]:
    documents = [plain_document(number, text) for number, text in enumerate(TEXTS)]
    return read_eval_documents(documents, tokenizer(), M, retriever=Library(), num_neighbors=num_neighbors)


def naive_losses(
    model: Retro, entry: EvalDocument, near: Sequence[Sequence[Neighbor]], window: Window, R: int, part: Part
) -> list[float]:
    """One forward pass for each token, over the window that its slot belongs to, without batching."""
    losses = [0.0]
    ids = entry.ids.tolist()
    for i in range(1, len(ids)):
        slot, start = i - 1, 0
        while slot >= start + window.length:
            start += window.stride
        used = ids[start : slot + 1]
        T = -(-len(used) // M) * M
        inputs = torch.tensor([used + [0] * (T - len(used))])
        keep = torch.tensor([[True] * len(used) + [False] * (T - len(used))])
        K = max([1, *(len(few) for few in near)])
        neighbors = torch.zeros(1, T // M, K, R, dtype=torch.long)
        keep_near = torch.zeros_like(neighbors, dtype=torch.bool)
        for chunk in range(T // M):
            whole = start // M + chunk
            # A chunk that is not finished has no neighbors yet.
            if whole < len(near) and (whole + 1) * M <= slot + 1:
                for k, neighbor in enumerate(near[whole]):
                    tokens = torch.from_numpy(neighbor.tokens(part)[:R].astype(np.int64))
                    neighbors[0, chunk, k, : len(tokens)], keep_near[0, chunk, k, : len(tokens)] = tokens, True
        with torch.no_grad():
            logits = model(inputs, keep_BT=keep, neighbors_BLKR=neighbors, keep_BLKR=keep_near)
        losses.append(float(torch.nn.functional.cross_entropy(logits[0, len(used) - 1][None], torch.tensor([ids[i]]))))
    return losses


@pytest.mark.parametrize(
    "window", [Window(length=64, stride=32), Window(length=12, stride=8), Window(length=8, stride=4)]
)
@pytest.mark.parametrize("mode", ["on", "off", "oracle"])
def test_losses_equal_one_forward_pass_for_each_token(mode: Mode, window: Window) -> None:
    model, documents = random_model(), read()
    scored = score(model, documents, mode=mode, window=window, num_neighbors=2, neighbor_len=6, batch_size=3)
    for entry, result in zip(documents, scored, strict=True):
        near: list[list[Neighbor]] = [list(few[:2]) if mode == "on" else [] for few in entry.neighbors]
        if mode == "oracle":
            near = [
                [Neighbor(chunk=entry.ids[u * M : (u + 1) * M], continuation=entry.ids[(u + 1) * M : (u + 2) * M])]
                for u in range(len(entry.ids) // M)
            ]
        expected = naive_losses(model, entry, near, window, 6, "both")
        np.testing.assert_allclose(result.loss_n, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("part", ["chunk", "continuation"])
def test_a_part_of_the_neighbors_can_be_read_alone(part: Part) -> None:
    model, documents, window = random_model(), read(), Window(length=64, stride=32)
    scored = score(model, documents, mode="on", window=window, num_neighbors=3, neighbor_len=6, part=part)
    for entry, result in zip(documents, scored, strict=True):
        expected = naive_losses(model, entry, entry.neighbors, window, 6, part)
        np.testing.assert_allclose(result.loss_n, expected, rtol=0, atol=1e-11)


def test_chunk_and_continuation_of_a_neighbor_are_cut_where_the_chunk_ends() -> None:
    near = [neighbor for entry in read() for few in entry.neighbors for neighbor in few]
    assert near
    for neighbor in near:
        both = neighbor.tokens("both")
        assert tokenizer().decode(both.tolist()) in {text[:20] for text in TEXTS}
        assert len(tokenizer().decode(neighbor.chunk.tolist())) >= 9 or len(neighbor.continuation) == 0
        assert len(tokenizer().decode(neighbor.chunk[:-1].tolist())) < 9


def test_tokens_that_see_neighbors_are_those_that_neighbors_change() -> None:
    model, documents, window = random_model(), read(), Window(length=64, stride=32)
    on = score(model, documents, mode="on", window=window, num_neighbors=3, neighbor_len=6)
    off = score(model, documents, mode="off", window=window)
    assert any(result.sees_n.any() for result in on)
    for a, b in zip(on, off, strict=True):
        # What neighbors said stays in self-attention's view, so tokens after these change too.
        np.testing.assert_array_equal(a.loss_n != b.loss_n, np.maximum.accumulate(a.sees_n))
        assert not b.sees_n.any()


def test_shuffled_neighbors_are_those_of_other_documents_and_as_many() -> None:
    model, documents, window = random_model(), read(), Window(length=64, stride=32)
    shuffled = score(model, documents, mode="shuffled", window=window, num_neighbors=3, neighbor_len=6, seed=1)
    again = score(model, documents, mode="shuffled", window=window, num_neighbors=3, neighbor_len=6, seed=1)
    on = score(model, documents, mode="on", window=window, num_neighbors=3, neighbor_len=6)
    for a, b, c in zip(shuffled, again, on, strict=True):
        np.testing.assert_array_equal(a.loss_n, b.loss_n)
        np.testing.assert_array_equal(a.sees_n, c.sees_n)
    assert any((a.loss_n != c.loss_n).any() for a, c in zip(shuffled, on, strict=True))
    with pytest.raises(ConfigError, match="at least two documents"):
        score(model, documents[:1], mode="shuffled", window=window)


def test_the_own_group_is_excluded_unless_asked_for() -> None:
    documents = [plain_document(number, text) for number, text in enumerate(TEXTS)]
    for exclude_own in (True, False):
        library = Library()
        read_eval_documents(documents, tokenizer(), M, retriever=library, num_neighbors=2, exclude_own=exclude_own)
        groups = {group for row in library.excluded for group in row}
        assert groups == ({"g0", "g1", "g2", "g3"} if exclude_own else set())


@pytest.mark.parametrize("window", [Window(length=1024, stride=512), Window(length=128, stride=64)])
def test_a_gpt2_of_transformers_has_the_bits_that_its_own_loss_says(window: Window, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base: Any = GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=1024, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    )
    base.eval()
    text = " ".join(TEXTS * 6)
    documents = read_eval_documents(
        [plain_document(0, text), plain_document(1, TEXTS[1])], tokenizer(), 64, retriever=None, num_neighbors=0
    )
    scored = score(Foreign(base), documents, mode="off", window=window)
    total = 0.0
    for entry in documents:
        ids = torch.from_numpy(entry.ids.astype(np.int64))[None]
        length, start, done = ids.shape[1] - 1, 0, 0
        while done < length:
            end = min(start + window.length, length)
            labels = ids[:, start : end + 1].clone()
            labels[:, : done - start + 1] = -100
            with torch.no_grad():
                mean = base(ids[:, start : end + 1], labels=labels).loss
            total += float(mean) * (end - done)
            done, start = end, start + window.stride
    num_bytes = len(text.encode()) + len(TEXTS[1].encode())
    assert bits_per_byte(scored, documents) == pytest.approx(total / math.log(2) / num_bytes, rel=1e-6)
    tokens = sum(len(entry.ids) - 1 for entry in documents)
    words = len(text.split()) + len(TEXTS[1].split())
    found = perplexities(scored, documents)
    assert found["per token"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["per word"] == pytest.approx(math.exp(total / words), rel=1e-5)


def test_bytes_of_chunks_are_those_of_their_tokens_and_add_up() -> None:
    words = tokenizer()
    for entry, text in zip(read(), TEXTS, strict=True):
        assert entry.num_bytes == len(text.encode())
        assert float(entry.chunk_bytes.sum()) == pytest.approx(entry.num_bytes)
        pieces = [str(words.backend.id_to_token(int(i))) for i in entry.ids]
        expected = [0.0] * len(entry.chunk_bytes)
        for place, piece in enumerate(pieces[1:], 1):
            expected[place // M] += len(piece)  # each character of a byte-level token is one byte
        assert entry.chunk_bytes.tolist() == pytest.approx(expected)


def test_sums_of_chunks_by_hand() -> None:
    assert chunk_sums(np.arange(10.0), 4).tolist() == [6.0, 22.0, 17.0]


def test_a_document_without_text_is_left_out_and_none_at_all_is_refused() -> None:
    words = tokenizer()
    documents = [plain_document(0, " \n"), plain_document(1, "x")]
    assert [d.key for d in read_eval_documents(documents, words, M, retriever=None, num_neighbors=0)] == ["k1"]
    with pytest.raises(ConfigError, match="no document with a text"):
        read_eval_documents(documents[:1], words, M, retriever=None, num_neighbors=0)


@pytest.mark.parametrize(("length", "stride"), [(10, 4), (8, 6), (8, 0), (8, 8), (8, 12)])
def test_windows_that_do_not_fit_the_chunks_are_refused(length: int, stride: int) -> None:
    with pytest.raises(ConfigError, match=r"window|stride"):
        score(random_model(), read(), mode="off", window=Window(length=length, stride=stride))


@pytest.mark.parametrize("num_neighbors", [0, 2])
def test_last_words_are_found_as_the_plain_greedy_choice_says(num_neighbors: int) -> None:
    """Half of the passages end in the very word that the model says, found token by token."""
    from retro.config import GenerateConfig
    from retro.generate import generate

    model, words = random_model(), tokenizer()
    contexts = ["the cat sat on", "when the rain comes", "a thin red", "the dog and the"]
    passages = []
    expected = []
    for number, context in enumerate(contexts):
        config = GenerateConfig(max_new_tokens=2, num_neighbors=num_neighbors, neighbor_len=128)
        said = generate(model, words, [context], config, retriever=Library())[0]
        word = " mat" if number % 2 else words.decode(said.ids)
        passages.append(LastWord(context=context, word=word))
        ids = words.encode(word).ids.tolist()
        expected.append(ids == said.ids[: len(ids)])
    hits = last_word_hits(model, words, passages, retriever=Library(), num_neighbors=num_neighbors)
    assert hits == expected
    assert True in hits


def test_passages_are_cut_before_their_last_word() -> None:
    made = last_words(["He came back to the old house \n", "two words"])
    assert [(m.context, m.word) for m in made] == [("He came back to the old", " house"), ("two", " words")]
    with pytest.raises(ConfigError, match="passage 2 has fewer than two words"):
        last_words(["a b", "word"])


def test_evenly_spaced_items_begin_and_end_with_the_ends() -> None:
    assert evenly(list(range(10)), 4) == [0, 3, 6, 9]
    assert evenly([1, 2], None) == evenly([1, 2], 5) == [1, 2]
