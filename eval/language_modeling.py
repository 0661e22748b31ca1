"""Bits per byte and perplexity, with retrieval on, off, shuffled, and with the true continuation as neighbor ("oracle").

Letters as in retro/model.py; besides, n tokens of a document (BOS included) and c chunks of it.

Every document is scored for itself, on its own grid of chunks without a lead, in windows that begin on chunk borders. The loss is
summed over the tokens of the text, the first one included (it is predicted from BOS); BOS and EOS are not. Bits per byte are the
sum over the UTF-8 bytes of the text, so that models of different tokenizers can be compared.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from index_builder.shards import Progress
from retro.chunks import Document, TokenizedDocument
from retro.errors import ConfigError
from retro.generate import Lookup, Retriever, prompt_ids, token_tensors
from retro.tokenizer import Tokenizer

Mode = Literal["on", "off", "shuffled", "oracle"]
MODES: tuple[Mode, ...] = ("on", "off", "shuffled", "oracle")
Part = Literal["both", "chunk", "continuation"]
Floats = NDArray[np.float64]

_LOOKUP = 512
"""Chunks looked up in one go."""
_BYTE_CHARS = {chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]} | {
    chr(256 + i) for i in range(68)
}
"""Characters that stand for one byte each in byte-level vocabularies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbor:
    """One passage as the model may read it."""

    chunk: NDArray[np.int32]
    """Tokens of the chunk N."""
    continuation: NDArray[np.int32]
    """Tokens of the continuation F, as it reads after N."""

    def tokens(self, part: Part) -> NDArray[np.int32]:
        """Of both, or of one of the two."""
        if part == "chunk":
            return self.chunk
        return self.continuation if part == "continuation" else np.concatenate([self.chunk, self.continuation])


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalDocument:
    """One text to score, with what was found for its chunks."""

    key: str
    ids: NDArray[np.int32]
    """BOS and the tokens of the text [n]."""
    num_bytes: int
    num_words: int
    chunk_bytes: Floats
    """Bytes of the tokens in each chunk [c]; together `num_bytes`."""
    neighbors: tuple[tuple[Neighbor, ...], ...]
    """Of each finished chunk, best first."""


def read_eval_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    chunk_len: int,
    *,
    retriever: Retriever | None,
    num_neighbors: int,
    exclude_own: bool = True,
    progress: Progress | None = None,
) -> list[EvalDocument]:
    """Tokenizes documents and looks the neighbors of all their finished chunks up.

    Args:
        documents: Those with text.
        tokenizer: The model's.
        chunk_len: M.
        retriever: None: there are no neighbors.
        num_neighbors: Of each chunk; 0: none.
        exclude_own: Leave passages of the document's own group out.
        progress: Told how many chunks were looked up.

    Raises:
        ConfigError: There is no document with a text.
    """
    sizes = _token_bytes(tokenizer)
    made: list[tuple[Document, TokenizedDocument]] = []
    for document in documents:
        if document.text.strip():
            made.append((document, TokenizedDocument.make(document.text, tokenizer, chunk_len, lead=0, split=0)))
    if not made:
        raise ConfigError("there is no document with a text to measure")
    wanted = [(number, chunk) for number, (_, entry) in enumerate(made) for chunk in range(len(entry.queries))]
    found: dict[tuple[int, int], tuple[Neighbor, ...]] = {}
    if retriever is not None and num_neighbors:
        for start in range(0, len(wanted), _LOOKUP):
            few = [place for place in wanted[start : start + _LOOKUP] if made[place[0]][1].queries[place[1]].strip()]
            groups = [[made[number][0].group] for number, _ in few] if exclude_own else None
            queries = [made[number][1].queries[chunk] for number, chunk in few]
            for place, passages in zip(few, retriever.retrieve(queries, num_neighbors, exclude=groups), strict=True):
                found[place] = tuple(_neighbor(p.text, p.full_text, tokenizer) for p in passages)
            if progress is not None:
                progress("neighbors of chunks", min(start + _LOOKUP, len(wanted)), len(wanted))
    return [
        EvalDocument(
            key=document.key,
            ids=entry.ids,
            num_bytes=entry.num_bytes,
            num_words=len(document.text.split()),
            chunk_bytes=_chunk_bytes(entry, sizes, chunk_len),
            neighbors=tuple(found.get((number, chunk), ()) for chunk in range(len(entry.queries))),
        )
        for number, (document, entry) in enumerate(made)
    ]


def _neighbor(chunk: str, full: str, tokenizer: Tokenizer) -> Neighbor:
    encoded = tokenizer.encode(full)
    first = int((encoded.spans[:, 0] < len(chunk)).sum())
    return Neighbor(chunk=encoded.ids[:first], continuation=encoded.ids[first:])


def _token_bytes(tokenizer: Tokenizer) -> Floats:
    """Bytes that each token stands for [V]: exact for byte-level vocabularies, near it for others."""
    sizes = np.ones(tokenizer.vocab_size)
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=False)
    byte_level = all(set(token) <= _BYTE_CHARS for token in list(vocabulary)[:2000] if not token.startswith("<"))
    for token, number in vocabulary.items():
        if token.startswith("<0x") and token.endswith(">"):
            continue
        sizes[number] = len(token) if byte_level else len(token.replace("\u2581", " ").encode())
    return sizes


def _chunk_bytes(entry: TokenizedDocument, sizes: Floats, chunk_len: int) -> Floats:
    """Bytes of each chunk's tokens, made to add up to the document's."""
    own_n = sizes[entry.ids]
    own_n[0] = 0.0  # BOS
    chunks = -(-len(entry.ids) // chunk_len)
    sums_c = np.bincount(np.arange(len(own_n)) // chunk_len, weights=own_n, minlength=chunks)
    return np.asarray(sums_c * (entry.num_bytes / max(sums_c.sum(), 1e-9)))


# --- scoring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How long documents are cut."""

    length: int
    """Slots that the model sees at once: whole chunks."""
    stride: int
    """Slots from one window to the next, whole chunks: each window scores its last so many, the first one all."""

    def check(self, chunk_len: int) -> None:
        """Raises ConfigError unless these are whole chunks, and every scored token has its chunk's predecessor in view."""
        if self.length % chunk_len or self.stride % chunk_len or self.stride < chunk_len:
            raise ConfigError(
                f"window = {self.length}, stride = {self.stride}: both must be multiples of the chunk's {chunk_len} slots"
            )
        if self.stride > max(self.length - chunk_len, chunk_len) or self.stride > self.length:
            raise ConfigError(
                f"stride = {self.stride} is too long for a window of {self.length}: at most {self.length - chunk_len}, so that "
                "the neighbors of the chunk before the first scored one are seen"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Losses of one document."""

    loss_n: Floats
    """Of each token in nats; 0 for BOS, which nothing predicts."""
    hit_n: NDArray[np.bool_]
    """Whether the token was the most probable one."""
    sees_n: NDArray[np.bool_]
    """Whether it was predicted with neighbors in view."""


class Foreign:
    """A causal language model of transformers as it is, without retrieval, called as ours are."""

    def __init__(self, base: Any, chunk_len: int = 64) -> None:
        self.base = base
        self.chunk_len = chunk_len

    def hidden(self, inputs_BT: Tensor, *, keep_BT: Tensor, **_: Any) -> Tensor:
        """Logits already: what such a model does at its end is its own."""
        logits: Tensor = self.base(input_ids=inputs_BT, attention_mask=keep_BT.long(), use_cache=False).logits
        return logits

    def logits(self, hidden_BTV: Tensor) -> Tensor:
        return hidden_BTV

    @property
    def embedding(self) -> Any:
        return self.base.get_input_embeddings()


@torch.inference_mode()
def score(
    model: Any,
    documents: Sequence[EvalDocument],
    *,
    mode: Mode,
    window: Window,
    num_neighbors: int = 2,
    neighbor_len: int = 128,
    part: Part = "both",
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Scored]:
    """Scores documents one way.

    Args:
        model: `retro.model.Retro`, `retro.retrofit.RetroFit` or `Foreign`, in eval mode.
        documents: With neighbors, unless the mode is off.
        mode: shuffled: each document gets the neighbors of chunks of other documents. oracle: the neighbor of a chunk is that chunk
            with its own true continuation.
        window: See Window.
        num_neighbors: K, the best ones that are read.
        neighbor_len: R.
        part: What the model reads of a neighbor.
        batch_size: Windows at once.
        seed: Of the shuffling.
        progress: Told how many windows are done.

    Raises:
        ConfigError: The window does not fit the chunks, or there are no neighbors of other documents.
    """
    M = model.chunk_len
    window.check(M)
    neighbors = _neighbors_of(documents, mode, num_neighbors, M, seed)
    scored = [
        Scored(
            loss_n=np.zeros(len(d.ids)),
            hit_n=np.zeros(len(d.ids), np.bool_),
            sees_n=sees(d, near, M),
        )
        for d, near in zip(documents, neighbors, strict=True)
    ]
    places = _places(documents, window)
    for first in range(0, len(places), batch_size):
        few = places[first : first + batch_size]
        for number, token, hidden_tD, targets_t in _states(
            model, documents, neighbors, few, window, neighbor_len, part
        ):
            losses, hits = losses_of(model, hidden_tD, targets_t)
            scored[number].loss_n[token : token + len(losses)] = losses
            scored[number].hit_n[token : token + len(losses)] = hits
        if progress is not None:
            progress(f"retrieval {mode}", first + len(few), len(places))
    return scored


@torch.inference_mode()
def states(
    model: Any,
    documents: Sequence[EvalDocument],
    window: Window,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Final activations without retrieval, each token's once.

    Yields:
        The document's number, the place of the first token, the activations [t, D] that predict it and those after it, and these
        tokens [t].
    """
    window.check(model.chunk_len)
    neighbors: list[Sequence[Sequence[Neighbor]]] = [()] * len(documents)
    places = _places(documents, window)
    for first in range(0, len(places), batch_size):
        few = places[first : first + batch_size]
        yield from _states(model, documents, neighbors, few, window, 1, "both")
        if progress is not None:
            progress("states of tokens", first + len(few), len(places))


def _places(documents: Sequence[EvalDocument], window: Window) -> list[tuple[int, int]]:
    """Document and first slot of all windows, those of like lengths together: little is padded."""
    places = [
        (number, start) for number, document in enumerate(documents) for start in _starts(len(document.ids) - 1, window)
    ]
    places.sort(key=lambda place: -min(len(documents[place[0]].ids) - 1 - place[1], window.length))
    return places


def _starts(length: int, window: Window) -> Iterator[int]:
    """Where the windows of a document of so many inputs begin."""
    yield 0
    start = 0
    while start + window.length < length:
        start += window.stride
        yield start


def _states(
    model: Any,
    documents: Sequence[EvalDocument],
    neighbors: Sequence[Sequence[Sequence[Neighbor]]],
    places: list[tuple[int, int]],
    window: Window,
    R: int,
    part: Part,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """As `states`, of some windows and with neighbors."""
    M = model.chunk_len
    device = model.embedding.weight.device
    lengths = [min(len(documents[number].ids) - 1 - start, window.length) for number, start in places]
    T = -(-max(lengths, default=1) // M) * M
    inputs_BT = torch.zeros(len(places), T, dtype=torch.long)
    targets_BT = torch.zeros_like(inputs_BT)
    keep_BT = torch.zeros_like(inputs_BT, dtype=torch.bool)
    for b, ((number, start), length) in enumerate(zip(places, lengths, strict=True)):
        ids = torch.from_numpy(documents[number].ids[start : start + length + 1].astype(np.int64))
        inputs_BT[b, :length], targets_BT[b, :length], keep_BT[b, :length] = ids[:-1], ids[1:], True
    near = _neighbor_tensors(neighbors, places, T // M, M, R, part)
    arguments = {name: tensor.to(device) for name, tensor in near.items()}
    hidden_BTD = model.hidden(inputs_BT.to(device), keep_BT=keep_BT.to(device), **arguments)
    for b, ((number, start), length) in enumerate(zip(places, lengths, strict=True)):
        begin = 0 if start == 0 else window.length - window.stride
        if length > begin:  # the slot t predicts the token t + 1
            yield number, start + begin + 1, hidden_BTD[b, begin:length], targets_BT[b, begin:length].to(device)


def losses_of(model: Any, hidden_tD: Tensor, targets_t: Tensor) -> tuple[Floats, NDArray[np.bool_]]:
    """Loss of each token in nats, and whether it was the most probable one."""
    losses, hits = [], []
    for part_tD, part_t in zip(torch.split(hidden_tD, 256), torch.split(targets_t, 256), strict=True):
        logits_tV = model.logits(part_tD[None])[0]
        logits_tV = logits_tV.to(torch.promote_types(logits_tV.dtype, torch.float32))
        losses.append(F.cross_entropy(logits_tV, part_t, reduction="none").double().cpu())
        hits.append((logits_tV.argmax(-1) == part_t).cpu())
    return torch.cat(losses).numpy(), torch.cat(hits).numpy()


def _neighbor_tensors(
    neighbors: Sequence[Sequence[Sequence[Neighbor]]], places: list[tuple[int, int]], L: int, M: int, R: int, part: Part
) -> dict[str, Tensor]:
    rows = [
        [[neighbor.tokens(part) for neighbor in few] for few in neighbors[number][start // M : start // M + L]]
        for number, start in places
    ]
    K = max((len(few) for row in rows for few in row), default=0)
    if K == 0:
        return {}
    neighbors_BLKR, keep_BLKR = token_tensors(rows, L, K, R)
    return {"neighbors_BLKR": neighbors_BLKR, "keep_BLKR": keep_BLKR}


def _neighbors_of(
    documents: Sequence[EvalDocument], mode: Mode, K: int, M: int, seed: int
) -> list[Sequence[Sequence[Neighbor]]]:
    """What the chunks of each document are given to read."""
    if mode == "off":
        return [[()] * len(document.neighbors) for document in documents]
    if mode == "on":
        return [[few[:K] for few in document.neighbors] for document in documents]
    if mode == "oracle":
        return [_oracle(document, M) for document in documents]
    pool = [(number, few[:K]) for number, document in enumerate(documents) for few in document.neighbors if few]
    if len({number for number, _ in pool}) < 2:
        raise ConfigError(
            "shuffled neighbors are those of other documents: at least two documents with neighbors are needed"
        )
    shuffled: list[Sequence[Sequence[Neighbor]]] = []
    for number, document in enumerate(documents):
        random = np.random.default_rng([seed, number])
        row: list[tuple[Neighbor, ...]] = []
        for few in document.neighbors:
            other: tuple[int, tuple[Neighbor, ...]] = (number, ())
            while few and other[0] == number:
                other = pool[int(random.integers(len(pool)))]
            row.append(other[1][: len(few)] if few else ())
        shuffled.append(row)
    return shuffled


def _oracle(document: EvalDocument, M: int) -> list[tuple[Neighbor, ...]]:
    """One neighbor for each finished chunk: itself and what truly follows."""
    ids = document.ids
    return [
        (Neighbor(chunk=ids[chunk * M : (chunk + 1) * M], continuation=ids[(chunk + 1) * M : (chunk + 2) * M]),)
        for chunk in range(len(document.neighbors))
    ]


def sees(document: EvalDocument, neighbors: Sequence[Sequence[Neighbor]], M: int) -> NDArray[np.bool_]:
    """Which tokens are predicted with neighbors in view [n]: slot i - 1 predicts i and sees those of chunk i // M - 1."""
    has_c = np.array([False, *(bool(few) for few in neighbors)])
    chunk_n = np.arange(len(document.ids)) // M
    return np.asarray(has_c[np.minimum(chunk_n, len(has_c) - 1)] & (chunk_n < len(has_c)))


# --- what follows from the losses ---------------------------------------------------------------------------------


def bits_per_byte(scored: Sequence[Scored], documents: Sequence[EvalDocument]) -> float:
    """Sum of the losses in bits over the bytes of the text."""
    total = math.fsum(float(s.loss_n.sum()) for s in scored)
    return total / math.log(2) / sum(document.num_bytes for document in documents)


def perplexities(scored: Sequence[Scored], documents: Sequence[EvalDocument]) -> dict[str, float]:
    """exp of the mean loss per token, and per word as white space separates them."""
    total = math.fsum(float(s.loss_n.sum()) for s in scored)
    tokens = sum(len(document.ids) - 1 for document in documents)
    words = sum(document.num_words for document in documents)
    return {
        "per token": math.exp(min(total / max(tokens, 1), 700)),
        "per word": math.exp(min(total / max(words, 1), 700)),
    }


def chunk_sums(values_n: NDArray[Any], chunk_len: int) -> Floats:
    """Sums over each chunk's tokens [c]."""
    sums_c: Floats = np.bincount(np.arange(len(values_n)) // chunk_len, weights=values_n).astype(np.float64)
    return sums_c


# --- last words ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWord:
    """A passage whose last word is to be found."""

    context: str
    word: str
    """With the space before it."""


def last_words(texts: Iterable[str]) -> list[LastWord]:
    """Cuts passages before their last word, as LAMBADA does (Paperno et al. 2016, arXiv:1606.06031).

    Raises:
        ConfigError: A passage has fewer than two words.
    """
    made = []
    for number, text in enumerate(texts):
        context, space, word = text.rstrip().rpartition(" ")
        if not space or not context.strip():
            raise ConfigError(f"passage {number + 1} has fewer than two words: {text[:60]!r}")
        made.append(LastWord(context=context, word=" " + word))
    return made


@torch.inference_mode()
def last_word_hits(
    model: Any,
    tokenizer: Tokenizer,
    passages: Sequence[LastWord],
    *,
    retriever: Retriever | None,
    num_neighbors: int = 2,
    neighbor_len: int = 128,
) -> list[bool]:
    """Whether every token of the last word is the most probable one.

    The context is a prompt: it ends on a chunk border, with empty slots before it, and retrieves at once.
    """
    M, device = model.chunk_len, model.embedding.weight.device
    hits = []
    lookup = None
    if retriever is not None and num_neighbors:
        lookup = Lookup(
            tokenizer=tokenizer, retriever=retriever, num_neighbors=num_neighbors, neighbor_len=neighbor_len
        )
    for passage in passages:
        prompt = prompt_ids(passage.context, tokenizer)
        word = tokenizer.encode(passage.word).ids.tolist()
        ids = prompt + word
        lead = -len(prompt) % M
        T = -(-(lead + len(ids)) // M) * M
        inputs_1T = torch.zeros(1, T, dtype=torch.long)
        keep_1T = torch.zeros(1, T, dtype=torch.bool)
        inputs_1T[0, lead : lead + len(ids)] = torch.tensor(ids)
        keep_1T[0, lead : lead + len(ids)] = True
        near: dict[str, Tensor] = {}
        # Only what stands before a token may be looked up: chunks that the prompt ends, not the word.
        found = None if lookup is None else lookup.neighbors([prompt], [lead], [0], M)
        if found is not None:
            L = T // M
            pad = (0, 0, 0, 0, 0, L - found[0].shape[1])
            near = {"neighbors_BLKR": F.pad(found[0], pad).to(device), "keep_BLKR": F.pad(found[1], pad).to(device)}
        hidden_1TD = model.hidden(inputs_1T.to(device), keep_BT=keep_1T.to(device), **near)
        end = lead + len(ids)
        chosen = model.logits(hidden_1TD[:, end - len(word) - 1 : end - 1])[0].argmax(-1).tolist()
        hits.append(chosen == word)
    return hits


def evenly(items: Sequence[Any], limit: int | None) -> list[Any]:
    """At most so many, evenly spaced."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int).tolist()]
