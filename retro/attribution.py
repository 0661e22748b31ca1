"""Where a model looked: what was read beside a sequence, the attention that its output tokens gave to it, and from where in the
passages an answer comes.

The attention share of a passage's token is the CCA weight that an output token gave it. It takes one forward pass more, unless the
network was watched while it answered.

Letters as in retro/model.py; besides, n output tokens, J layers with CCA, P passages. A passage read for several chunks is one
passage.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from retro.answer import NEIGHBOR_LEN, Answer, answer_prompt, ask_many, passage_text
from retro.attention import Attention, Places
from retro.cca import Neighborhood
from retro.chunks import Int64s, Passage
from retro.config import GenerateConfig
from retro.generate import Generation, neighbor_tensors
from retro.model import Retro
from retro.tokenizer import Tokenizer

Floats = NDArray[np.float64]

# --- what was read ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """A passage as the model reads it."""

    text: str
    start: int = 0
    """Where the passage's own text begins in `text`, behind what was put in front of it."""
    key: str = ""
    title: str = ""

    @classmethod
    def neighbor(cls, passage: Passage) -> "Source":
        """As a neighbor of a chunk is read."""
        return cls(passage.full_text, 0, passage.key, passage.title)

    @classmethod
    def evidence(cls, passage: Passage) -> "Source":
        """As it is read when a question is asked."""
        text = passage_text(passage)
        return cls(text, len(text) - len(passage.full_text), passage.key, passage.title)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A sequence on its grid, and the passages that are read beside it."""

    ids: tuple[int, ...]
    """BOS and the tokens after it; all but the first are output tokens."""
    lead: int
    """Empty slots before BOS."""
    sources: tuple[Source, ...]
    """All passages, each once [P]."""
    chunks: dict[int, tuple[int, ...]]
    """Of each chunk with neighbors, counted from 0 with the lead, the numbers of its passages, best first."""
    given: int = 1
    """How many of `ids` are given (BOS, a prompt): the tokens after them are the answer."""

    @classmethod
    def of(cls, ids: Sequence[int], lead: int, found: Mapping[int, Sequence[Source]], *, given: int = 1) -> "Reading":
        """Counts equal passages of several chunks once."""
        sources = list(dict.fromkeys(source for few in found.values() for source in few))
        number = {source: place for place, source in enumerate(sources)}
        chunks = {chunk: tuple(number[source] for source in few) for chunk, few in found.items() if few}
        return cls(ids=tuple(ids), lead=lead, sources=tuple(sources), chunks=chunks, given=given)


def read_generation(prompt: Sequence[int], generation: Generation, chunk_len: int) -> Reading:
    """A continuation, without the EOS that ended it, with what was retrieved for it."""
    found = {chunk: [Source.neighbor(p) for p in few] for chunk, few in generation.retrieved.items()}
    return Reading.of([*prompt, *_words(generation)], -len(prompt) % chunk_len, found, given=len(prompt))


def read_answer(answer: Answer, tokenizer: Tokenizer, chunk_len: int) -> Reading:
    """An answer of `retro.answer.ask`, without its EOS; its passages are numbered as there, unless two are the same, but for those
    that stood in its prompt."""
    context = answer.context_passages
    prompt = answer_prompt(answer.question, answer.passages, tokenizer, chunk_len, context_passages=context).ids
    ids = [*prompt, *_words(answer.generation)]
    lead = -len(prompt) % chunk_len
    sources = [Source.evidence(passage) for passage in answer.passages[context:]]
    first = (lead + len(prompt)) // chunk_len - 1
    return Reading.of(
        ids, lead, dict.fromkeys(range(first, (lead + len(ids)) // chunk_len), sources), given=len(prompt)
    )


def _words(generation: Generation) -> list[int]:
    return generation.ids[: len(generation.ids) - generation.finished]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A reading as the network takes it: one sequence that predicts all output tokens."""

    reading: Reading
    inputs_1T: Tensor
    keep_1T: Tensor
    neighbors_1LKR: Tensor
    keep_1LKR: Tensor
    source_LK: Tensor
    """Which passage each neighbor is, -1 for none."""

    @classmethod
    def of(cls, reading: Reading, tokenizer: Tokenizer, chunk_len: int, neighbor_len: int) -> "Placed":
        """Tokenizes the passages: the first `neighbor_len` tokens of each are read."""
        M, n = chunk_len, len(reading.ids) - 1
        T = max(-(-(reading.lead + n) // M) * M, M)
        slots = slice(reading.lead, reading.lead + n)
        inputs_1T, keep_1T = torch.zeros(1, T, dtype=torch.long), torch.zeros(1, T, dtype=torch.bool)
        inputs_1T[0, slots], keep_1T[0, slots] = torch.tensor(reading.ids[:-1], dtype=torch.long), True
        # Neighbors of a chunk that the inputs do not finish are read by none of them.
        finished = {chunk: few for chunk, few in reading.chunks.items() if (chunk + 1) * M <= slots.stop}
        K = max(map(len, finished.values()), default=1)
        source_LK = torch.full((T // M, K), -1)
        for chunk, few in finished.items():
            source_LK[chunk, : len(few)] = torch.tensor(few)
        texts = [[reading.sources[p].text for p in finished.get(chunk, ())] for chunk in range(T // M)]
        neighbors_1LKR, keep_1LKR = neighbor_tensors([texts], tokenizer, K, neighbor_len)
        return cls(
            reading=reading,
            inputs_1T=inputs_1T,
            keep_1T=keep_1T,
            neighbors_1LKR=neighbors_1LKR,
            keep_1LKR=keep_1LKR,
            source_LK=source_LK,
        )

    @property
    def slots(self) -> slice:
        """Those that predict the output tokens."""
        return slice(self.reading.lead, self.reading.lead + len(self.reading.ids) - 1)

    def hidden(self, model: Any, keep_BLKR: Tensor) -> Tensor:
        """Final activations [B, T, D] of the sequence with some of its neighbors each time."""
        B, device = len(keep_BLKR), model.embedding.weight.device
        hidden_BTD: Tensor = model.hidden(
            self.inputs_1T.expand(B, -1).to(device),
            keep_BT=self.keep_1T.repeat(B, 1).to(device),
            neighbors_BLKR=self.neighbors_1LKR.expand(B, -1, -1, -1).to(device),
            keep_BLKR=keep_BLKR.to(device),
        )
        return hidden_BTD


# --- attention ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """Where a model looked while it predicted the output tokens of a reading: its `ids` but for the first."""

    reading: Reading
    text: str
    """Of all tokens."""
    spans_n2: Int64s
    """First and end character of each output token in `text`; one that ends no character is empty."""
    source_spans: tuple[Int64s, ...]
    """Likewise of each passage's tokens that were read, in its text [r, 2], r at most R."""
    source_nK: Int64s
    """Numbers of the passages that each output token sees, -1 for none."""
    share_JnKR: Floats
    """Attention to each of their tokens, by layer, averaged over heads: sums to 1 over K and R where a token sees any, else 0."""

    @property
    def sees_n(self) -> NDArray[np.bool_]:
        """Which output tokens see passages."""
        return np.asarray((self.source_nK >= 0).any(axis=1))

    @property
    def answer(self) -> slice:
        """The output tokens that were not given."""
        return slice(self.reading.given - 1, None)

    def layer_shares(self) -> Floats:
        """Attention to each passage, by layer [J, n, P]: sums to 1 over P where a token sees any."""
        share_JnK = self.share_JnKR.sum(axis=3)
        of_source_PnK = np.arange(len(self.reading.sources))[:, None, None] == self.source_nK
        return np.asarray(np.einsum("jnk,pnk->jnp", share_JnK, of_source_PnK))

    def passage_shares(self) -> Floats:
        """The mean over layers [n, P]."""
        return np.asarray(self.layer_shares().mean(axis=0))

    def token_shares(self, source: int) -> Floats:
        """Attention of each output token to the tokens of one passage, averaged over layers [n, R]."""
        share_nKR = self.share_JnKR.mean(axis=0)
        return np.asarray(np.einsum("nkr,nk->nr", share_nKR, self.source_nK == source))


def answer_span(attended: Attended, source: int, tokens: slice | None = None) -> tuple[int, int] | None:
    """The part of a passage that was attended to most while some output tokens were predicted.

    Args:
        attended: See Attended.
        source: Number of the passage.
        tokens: The output tokens; default: the answer.

    Returns:
        First and end character in the passage's own text (behind what was put in front of it); None where no token saw it.
    """
    own_r2, share_r = _own_tokens(attended, source, tokens)
    if not share_r.any():
        return None
    begin, end = best_window(share_r)
    return int(own_r2[begin, 0]), int(own_r2[end - 1, 1])


def best_window(share_r: Floats) -> tuple[int, int]:
    """The neighboring tokens that got most beyond what each would get of an even attention: first and end.

    It has no length to be chosen: any longer window adds tokens that pull it down, any shorter one gives some up.
    """
    excess_r = np.concatenate([[0.0], np.cumsum(share_r - share_r.mean())])
    lowest_r = np.minimum.accumulate(excess_r)
    end = int((excess_r - lowest_r)[1:].argmax()) + 1
    return int(excess_r[:end].argmin()), end


def _own_tokens(attended: Attended, source: int, tokens: slice | None = None) -> tuple[Int64s, Floats]:
    """Of the tokens of a passage's own text that were read: where they stand in it [r, 2], and their attention [r]."""
    start, spans_r2 = attended.reading.sources[source].start, attended.source_spans[source]
    share_r = attended.token_shares(source)[tokens or attended.answer].sum(axis=0)[: len(spans_r2)]
    first = int((spans_r2[:, 0] < start).sum())
    return spans_r2[first:] - start, share_r[first:]


@torch.inference_mode()
def attend(model: Any, tokenizer: Tokenizer, placed: Placed) -> tuple[Attended, Tensor]:
    """Where a model looks while it reads.

    Args:
        model: `retro.model.Retro` or `retro.retrofit.RetroFit`, in eval mode.
        tokenizer: The model's.
        placed: See Placed.

    Returns:
        What was attended to, and the final activations [1, T, D] of the forward pass.
    """
    with watching(model) as watched:
        hidden_1TD = placed.hidden(model, placed.keep_1LKR)
    return _attended(model, tokenizer, placed, watched), hidden_1TD


def _attended(model: Any, tokenizer: Tokenizer, placed: Placed, watched: "Watched") -> Attended:
    source_nK, share_JnKR = _shares(model, watched, placed)
    reading, R = placed.reading, placed.keep_1LKR.shape[3]
    text, spans_n2 = _output_spans(reading.ids, tokenizer)
    return Attended(
        reading=reading,
        text=text,
        spans_n2=spans_n2,
        source_spans=tuple(tokenizer.encode(source.text).spans[:R] for source in reading.sources),
        source_nK=source_nK,
        share_JnKR=share_JnKR,
    )


@dataclass(slots=True)
class Watched:
    """What layers gave in one forward pass, or in all calls that decoded one sequence."""

    attentions: list[Attention]
    """Of CCA [J]."""
    normed: list[Tensor]
    """What each of them got as queries [1, columns, D], call after call [calls * J]."""
    encoded: list[Tensor]
    """Neighbors, perhaps of some chunks at a time: [N, K, R, E] together."""

    def queries(self, layer: int, placed: Placed) -> Tensor:
        """What one layer got as queries, on the sequence's grid [1, T, D]: decoding leaves out the empty slots before BOS."""
        seen_1TD = torch.cat(self.normed[layer :: len(self.attentions)], dim=1)
        T, slots = placed.inputs_1T.shape[1], placed.slots
        if len(self.normed) == len(self.attentions) and seen_1TD.shape[1] == T:
            return seen_1TD
        grid_1TD = seen_1TD.new_zeros(1, T, seen_1TD.shape[2])
        grid_1TD[:, slots] = seen_1TD[:, : slots.stop - slots.start]
        return grid_1TD


@contextlib.contextmanager
def watching(model: Any) -> Iterator[Watched]:
    """Inside it, the network leaves the inputs of all CCA behind; it knows nothing of it itself.

    Args:
        model: `retro.model.Retro` or `retro.retrofit.RetroFit`. Inside, it is to read one sequence: in one forward pass, or to
            decode it.
    """
    if isinstance(model, Retro):
        layers: Any = [(layer.cca_norm, layer.cca) for layer in model.layers if layer.cca is not None]
    else:
        layers = [(cross.norm, cross.attention) for cross in model.cca]
    watched = Watched([attention for _, attention in layers], [], [])

    hooks = [
        norm.register_forward_hook(lambda _module, _arguments, normed_BTD: watched.normed.append(normed_BTD))
        for norm, _ in layers
    ]
    if model.encoder is not None:
        hooks.append(
            model.encoder.register_forward_hook(lambda _module, _arguments, part: watched.encoded.append(part))
        )
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


def _shares(model: Any, watched: Watched, placed: Placed) -> tuple[Int64s, Floats]:
    """`source_nK` and `share_JnKR` of all output tokens.

    The weights are computed once more from queries and encoded neighbors: the fast kernels of the network do not give them away.
    """
    M, slots = model.chunk_len, placed.slots
    n = slots.stop - slots.start
    K, R = placed.keep_1LKR.shape[2:]
    source_nK = np.full((n, K), -1, np.int64)
    share_JnKR = np.zeros((len(watched.attentions), n, K, R))
    if not watched.encoded:
        return source_nK, share_JnKR
    chunk_N, _, keep_NKR = Neighborhood.of(placed.neighbors_1LKR, placed.keep_1LKR, every=model.every_chunk)
    encoded_NKRE = torch.cat(watched.encoded)[: len(chunk_N)]
    # Slot (u+1)M - 1 + i is query i of chunk u; only some of these slots predict an output token.
    query_NM = ((chunk_N + 1) * M - 1)[:, None] + torch.arange(M) - slots.start
    there_NM = (query_NM >= 0) & (query_NM < n) & keep_NKR.flatten(1).any(dim=1)[:, None]
    place_Q = query_NM[there_NM].numpy()
    row_Q = there_NM.nonzero()[:, 0]
    read_QK = torch.where(keep_NKR.any(dim=2), placed.source_LK[chunk_N], -1)[row_Q]
    source_nK[place_Q] = read_QK.numpy()
    for j, cca in enumerate(watched.attentions):
        weights_NMS = _weights(cca, watched.queries(j, placed), encoded_NKRE, chunk_N, keep_NKR, M)
        share_JnKR[j, place_Q] = weights_NMS[there_NM].view(-1, K, R).numpy()
    return source_nK, share_JnKR


def _weights(
    cca: Attention, normed_1TD: Tensor, encoded_NKRE: Tensor, chunk_N: Tensor, keep_NKR: Tensor, M: int
) -> Tensor:
    """Attention of each query to each neighbor token of its chunk, averaged over heads [N, M, S], float64 on the CPU."""
    _, K, R = keep_NKR.shape
    own, keys = Places.range(M - 1, 2 * M - 1, cca, normed_1TD), Places.range(0, R, cca, normed_1TD, repeat=K)
    shifted_LMD = F.pad(normed_1TD, (0, 0, 1 - M, M - 1)).view(-1, M, normed_1TD.shape[2])
    device = normed_1TD.device
    queries_NMD, keep_NS = shifted_LMD[chunk_N.to(device)], keep_NKR.flatten(1).to(device)
    weights_NHMS = cca.weights(queries_NMD, own, encoded_NKRE.flatten(1, 2), keys, keep_NS, torch.float64)
    return weights_NHMS.mean(dim=1).cpu()


def _output_spans(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, Int64s]:
    """Text of all tokens, and where each but the first stands in it; an unfinished character is its last token's."""
    text = tokenizer.decode(ids)
    ends = [len(tokenizer.decode(ids[:end]).rstrip("\ufffd")) for end in range(1, len(ids))]
    ends_n1 = np.maximum.accumulate(np.array([*ends, len(text)]).clip(max=len(text)))
    return text, np.stack([ends_n1[:-1], ends_n1[1:]], axis=1)


# --- an answer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """From where an answer comes: the model's attention to its passages, in their order there."""

    share_P: Floats
    """Of each passage, averaged over the answer's tokens and the layers; sums to 1 where anything was read and said, else 0. Those
    that stood in the prompt have none."""
    spans: tuple[tuple[int, int] | None, ...]
    """Of each passage the part that the answer was taken from: first and end character of `Passage.full_text`, see `explain`."""
    tokens: tuple[str, ...]
    """Texts of the answer's tokens, EOS left out; of a character that is split, only the last token has it."""
    log_prob_n: Floats
    """Natural logarithm of the probability of each of them."""
    share_nP: Floats
    """Attention of each of them to each passage, averaged over layers; sums to 1 over P."""


@torch.inference_mode()
def explain(
    model: Any,
    tokenizer: Tokenizer,
    answer: Answer,
    *,
    neighbor_len: int = NEIGHBOR_LEN,
    watched: Watched | None = None,
) -> Explanation:
    """Explains an answer by the attention to its passages; takes one forward pass, and none where nothing was read, or where it
    was watched.

    The part that the answer was taken from is the answer itself where it stands in a passage word for word (of several places the
    one attended to most); elsewhere it is what was attended to most, in those passages that got at least an even share.

    Args:
        model: The one that answered, `retro.model.Retro` or `retro.retrofit.RetroFit`, in eval mode.
        tokenizer: The model's.
        answer: Of `retro.answer.ask` or `ask_many`.
        neighbor_len: R with which it was asked.
        watched: What `watching` saw while this answer, and no other, was made.
    """
    reading = read_answer(answer, tokenizer, model.chunk_len)
    text, spans_n2 = _output_spans(reading.ids, tokenizer)
    P, n, first = len(answer.passages), len(reading.ids) - reading.given, answer.context_passages
    share_nP = np.zeros((n, P))
    spans: list[tuple[int, int] | None] = [None] * P
    if first < P and n:
        placed = Placed.of(reading, tokenizer, model.chunk_len, neighbor_len)
        if watched is None:
            attended, _ = attend(model, tokenizer, placed)
        else:
            attended = _attended(model, tokenizer, placed, watched)
        # Every chunk has the same passages, so that neighbor k is passage k; two that are the same share what they got.
        share_nP[:, first:] = attended.share_JnKR[:, attended.answer].mean(axis=0).sum(axis=2)
        numbers = reading.chunks[min(reading.chunks)]
        spans[first:] = [
            _taken_from(attended, number, answer.text, is_read=share >= 1 / (P - first))
            for number, share in zip(numbers, share_nP[:, first:].mean(axis=0), strict=True)
        ]
    return Explanation(
        share_P=share_nP.mean(axis=0) if n else np.zeros(P),
        spans=tuple(spans),
        tokens=tuple(text[slice(*span)] for span in spans_n2[reading.given - 1 :]),
        log_prob_n=np.array(answer.generation.log_probs[:n], dtype=np.float64),
        share_nP=share_nP,
    )


def ask_and_explain(
    model: Any,
    tokenizer: Tokenizer,
    question: str,
    passages: Sequence[Passage],
    config: GenerateConfig,
    *,
    on_token: Callable[[int, str], None] | None = None,
) -> tuple[Answer, Explanation]:
    """Answers one question and explains the answer, without a further forward pass; see `ask_many` and `explain`.

    Raises:
        ConfigError: See `ask_many`.
    """
    with watching(model) as watched:
        answer = ask_many(model, tokenizer, [question], [passages], config, on_token=on_token)[0]
    return answer, explain(model, tokenizer, answer, neighbor_len=config.neighbor_len, watched=watched)


def _taken_from(attended: Attended, source: int, answer: str, *, is_read: bool) -> tuple[int, int] | None:
    """The part of a passage that an answer was taken from, see `explain`."""
    own = attended.reading.sources[source]
    own_r2, share_r = _own_tokens(attended, source)
    end = own_r2[-1, 1] if len(own_r2) else 0
    said = re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", own.text[own.start :], re.IGNORECASE) if answer else ()
    if places := [m.span() for m in said if m.end() <= end]:
        return max(places, key=lambda p: float(share_r[(own_r2[:, 1] > p[0]) & (own_r2[:, 0] < p[1])].sum()))
    return answer_span(attended, source) if is_read else None
