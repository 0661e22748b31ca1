"""Attribution: which tokens of which passages moved which output tokens.

Two views of it. The attention share of a passage's token is the CCA weight that an output token gave it: where the model looked.
Leave-one-out is the change of an output token's log-probability when a passage is taken away and all else, the text included,
stays: what the passage did.

Letters as in retro/model.py; besides, n output tokens, J layers with CCA, P passages. A passage read for several chunks is one
passage, and is left out of all of them.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eval.language_modeling import Floats, losses_of
from eval.lm_record import Opened
from eval.records import Figure, Record
from retro.answer import Answer, passage_text, question_prompt
from retro.attention import Attention, Places
from retro.cca import Neighborhood
from retro.chunks import Int64s, Passage, TokenizedDocument
from retro.config import GenerateConfig
from retro.errors import ConfigError
from retro.generate import Generation, Prompt, Retriever, generate, neighbor_tensors, prompt_ids
from retro.model import Retro
from retro.tokenizer import Tokenizer

# --- what was read ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """A passage as the model reads it."""

    text: str
    start: int = 0
    """Where the passage's own text begins in `text`, behind what was put in front of it."""
    key: str = ""
    title: str = ""


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


def read_document(
    text: str, tokenizer: Tokenizer, chunk_len: int, retriever: Retriever, num_neighbors: int, *, max_slots: int = 512
) -> Reading:
    """A text as it is scored: no lead, passages for each finished chunk. What is longer than `max_slots` is left out."""
    entry = TokenizedDocument.make(text, tokenizer, chunk_len, lead=0, split=0)
    ids = entry.ids[: max_slots + 1].tolist()
    wanted = {c: query for c, query in enumerate(entry.queries[: (len(ids) - 1) // chunk_len]) if query.strip()}
    found = retriever.retrieve(list(wanted.values()), num_neighbors) if wanted else []
    return Reading.of(ids, 0, {c: _sources(few) for c, few in zip(wanted, found, strict=True)})


def read_generation(prompt: Sequence[int], generation: Generation, chunk_len: int) -> Reading:
    """A continuation, without the EOS that ended it, with what was retrieved for it."""
    found = {chunk: _sources(few) for chunk, few in generation.retrieved.items()}
    return Reading.of([*prompt, *_words(generation)], -len(prompt) % chunk_len, found, given=len(prompt))


def read_answer(answer: Answer, tokenizer: Tokenizer, chunk_len: int) -> Reading:
    """An answer of `retro.answer.ask`, without its EOS; its passages are numbered as there, unless two are the same."""
    prompt = prompt_ids(question_prompt(answer.question), tokenizer)
    ids = [*prompt, *_words(answer.generation)]
    lead = -len(prompt) % chunk_len
    texts = [(p, passage_text(p)) for p in answer.passages]
    sources = [Source(text, len(text) - len(p.full_text), p.key, p.title) for p, text in texts]
    first = (lead + len(prompt)) // chunk_len - 1
    return Reading.of(
        ids, lead, dict.fromkeys(range(first, (lead + len(ids)) // chunk_len), sources), given=len(prompt)
    )


def _words(generation: Generation) -> list[int]:
    return generation.ids[: len(generation.ids) - generation.finished]


def _sources(passages: Sequence[Passage]) -> list[Source]:
    return [Source(p.full_text, 0, p.key, p.title) for p in passages]


# --- attribution --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """What moved the output tokens of a reading: its `ids` but for the first."""

    reading: Reading
    text: str
    """Of all tokens."""
    spans_n2: Int64s
    """First and end character of each output token in `text`; one that ends no character is empty."""
    source_spans: tuple[Int64s, ...]
    """Likewise of each passage's tokens that were read, in its text [r, 2], r at most R."""
    log_prob_n: Floats
    """Natural logarithm of the probability of each output token, all passages read."""
    off_n: Floats
    """The same without any."""
    without_Pn: Floats
    """The same with one passage left out."""
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

    @property
    def delta_n(self) -> Floats:
        """What all passages together added to the log-probability of each output token."""
        return self.log_prob_n - self.off_n

    def passage_deltas(self) -> Floats:
        """What each passage added beside the others [P, n]."""
        return self.log_prob_n - self.without_Pn

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

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each passage: its share of the answer's attention, and what it added to the answer's log-probability."""
        seeing_P = self.passage_shares()[self.answer][self.sees_n[self.answer]]
        rows = []
        for number, source in enumerate(self.reading.sources):
            span = answer_span(self, number)
            own = source.text[source.start :]
            rows.append(
                {
                    "passage": number + 1,
                    "title": source.title or source.key,
                    "key": source.key,
                    "chunks": ", ".join(str(chunk + 1) for chunk, few in self.reading.chunks.items() if number in few),
                    "share of attention, %": 100 * float(seeing_P[:, number].mean()) if len(seeing_P) else 0.0,
                    "added log-probability, nats": float(self.passage_deltas()[number, self.answer].sum()),
                    "most attended": "" if span is None else own[slice(*span)],
                    "text": own,
                }
            )
        return rows

    def token_rows(self) -> list[dict[str, Any]]:
        """A row for each output token of the answer."""
        share_nP, delta_Pn = self.passage_shares(), self.passage_deltas()
        rows = []
        for place in range(len(self.log_prob_n))[self.answer]:
            sees = bool(self.sees_n[place])
            rows.append(
                {
                    "token": place + 1,
                    "text": self.text[slice(*self.spans_n2[place])],
                    "log-probability, nats": float(self.log_prob_n[place]),
                    "without retrieval": float(self.off_n[place]),
                    "added": float(self.delta_n[place]),
                    "most attended passage": int(share_nP[place].argmax()) + 1 if sees else None,
                    "its share, %": 100 * float(share_nP[place].max()) if sees else None,
                    "passage that added most": int(delta_Pn[:, place].argmax()) + 1 if sees else None,
                    "it added": float(delta_Pn[:, place].max()) if sees else None,
                }
            )
        return rows


def answer_span(attribution: Attribution, source: int, tokens: slice | None = None) -> tuple[int, int] | None:
    """The part of a passage that was attended to most while some output tokens were predicted.

    Args:
        attribution: See Attribution.
        source: Number of the passage.
        tokens: The output tokens; default: the answer.

    Returns:
        First and end character in the passage's own text (behind what was put in front of it); None where no token saw it.
    """
    own = attribution.reading.sources[source]
    spans_r2 = attribution.source_spans[source]
    share_r = attribution.token_shares(source)[tokens or attribution.answer].sum(axis=0)[: len(spans_r2)]
    first = int((spans_r2[:, 0] < own.start).sum())
    if not share_r[first:].any():
        return None
    begin, end = best_window(share_r[first:])
    return (
        int(spans_r2[first + begin, 0]) - own.start,
        int(spans_r2[first + end - 1, 1]) - own.start,
    )


def best_window(share_r: Floats) -> tuple[int, int]:
    """The neighboring tokens that got most beyond what each would get of an even attention: first and end.

    It has no length to be chosen: any longer window adds tokens that pull it down, any shorter one gives some up.
    """
    excess_r = np.concatenate([[0.0], np.cumsum(share_r - share_r.mean())])
    lowest_r = np.minimum.accumulate(excess_r)
    end = int((excess_r - lowest_r)[1:].argmax()) + 1
    return int(excess_r[:end].argmin()), end


@torch.inference_mode()
def attribute(
    model: Any, tokenizer: Tokenizer, reading: Reading, *, neighbor_len: int = 128, batch_size: int = 8
) -> Attribution:
    """Attributes the output tokens of a reading.

    Args:
        model: `retro.model.Retro` or `retro.retrofit.RetroFit`, in eval mode.
        tokenizer: The model's.
        reading: See Reading.
        neighbor_len: R.
        batch_size: Sequences at once; there are P + 2 of them.
    """
    M, n, P = model.chunk_len, len(reading.ids) - 1, len(reading.sources)
    T = max(-(-(reading.lead + n) // M) * M, M)
    ids = torch.tensor(reading.ids)
    device = model.embedding.weight.device
    inputs_1T, keep_1T = torch.zeros(1, T, dtype=torch.long), torch.zeros(1, T, dtype=torch.bool)
    slots = slice(reading.lead, reading.lead + n)
    inputs_1T[0, slots], keep_1T[0, slots] = ids[:-1], True
    K = max(map(len, reading.chunks.values()), default=1)
    source_LK = torch.full((T // M, K), -1)
    for chunk, few in reading.chunks.items():
        if chunk < T // M:
            source_LK[chunk, : len(few)] = torch.tensor(few)
    texts = [[reading.sources[p].text for p in reading.chunks.get(chunk, ())] for chunk in range(T // M)]
    neighbors_1LKR, keep_1LKR = neighbor_tensors([texts], tokenizer, K, neighbor_len)

    def log_probs(without: Sequence[int | None]) -> Floats:
        """Log-probabilities [B, n] with all passages (None), without any (-1), or without one."""
        B = len(without)
        keep_BLKR = keep_1LKR.repeat(B, 1, 1, 1)
        for b, left_out in enumerate(without):
            if left_out is not None:
                keep_BLKR[b] &= ((source_LK != left_out) & (left_out >= 0))[..., None]
        hidden_BTD = model.hidden(
            inputs_1T.expand(B, T).to(device),
            keep_BT=keep_1T.repeat(B, 1).to(device),
            neighbors_BLKR=neighbors_1LKR.expand(B, -1, -1, -1).to(device),
            keep_BLKR=keep_BLKR.to(device),
        )
        return np.stack([-losses_of(model, row_TD[slots], ids[1:].to(device))[0] for row_TD in hidden_BTD])

    with _watching(model) as watched:
        log_prob_n = log_probs([None])[0]
    others = [*range(P), -1]
    other_Vn = np.concatenate([log_probs(others[v : v + batch_size]) for v in range(0, P + 1, batch_size)])
    source_nK, share_JnKR = _shares(model, watched, neighbors_1LKR, keep_1LKR, source_LK, slots)
    text, spans_n2 = _output_spans(reading.ids, tokenizer)
    return Attribution(
        reading=reading,
        text=text,
        spans_n2=spans_n2,
        source_spans=tuple(tokenizer.encode(source.text).spans[:neighbor_len] for source in reading.sources),
        log_prob_n=log_prob_n,
        off_n=other_Vn[P],
        without_Pn=other_Vn[:P],
        source_nK=source_nK,
        share_JnKR=share_JnKR,
    )


@dataclass(slots=True)
class _Watched:
    """What layers gave in one forward pass."""

    attentions: list[Attention]
    """Of CCA [J]."""
    normed: list[Tensor]
    """What each of them got as queries [B, T, D]."""
    encoded: Tensor | None = None
    """Neighbors [N, K, R, E]; None where there were none."""


@contextlib.contextmanager
def _watching(model: Any) -> Iterator[_Watched]:
    """Inside it, a forward pass leaves the inputs of all CCA behind; the network itself knows nothing of it."""
    if isinstance(model, Retro):
        layers: Any = [(layer.cca_norm, layer.cca) for layer in model.layers if layer.cca is not None]
    else:
        layers = [(cross.norm, cross.attention) for cross in model.cca]
    watched = _Watched([attention for _, attention in layers], [])

    def take_encoded(_module: Any, _arguments: Any, encoded_NKRE: Tensor) -> None:
        watched.encoded = encoded_NKRE

    hooks = [
        norm.register_forward_hook(lambda _module, _arguments, normed_BTD: watched.normed.append(normed_BTD))
        for norm, _ in layers
    ]
    hooks.append(model.encoder.register_forward_hook(take_encoded))
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


def _shares(
    model: Any, watched: _Watched, neighbors_1LKR: Tensor, keep_1LKR: Tensor, source_LK: Tensor, slots: slice
) -> tuple[Int64s, Floats]:
    """`source_nK` and `share_JnKR` of the output tokens predicted at these slots.

    The weights are computed once more from queries and encoded neighbors: the fast kernels of the network do not give them away.
    """
    M, n = model.chunk_len, slots.stop - slots.start
    K, R = keep_1LKR.shape[2:]
    source_nK = np.full((n, K), -1, np.int64)
    share_JnKR = np.zeros((len(watched.attentions), n, K, R))
    if watched.encoded is None:
        return source_nK, share_JnKR
    chunk_N, _, keep_NKR = Neighborhood.of(neighbors_1LKR, keep_1LKR, every=model.every_chunk)
    # Slot (u+1)M - 1 + i is query i of chunk u; only some of these slots predict an output token.
    query_NM = ((chunk_N + 1) * M - 1)[:, None] + torch.arange(M) - slots.start
    there_NM = (query_NM >= 0) & (query_NM < n) & keep_NKR.flatten(1).any(dim=1)[:, None]
    place_Q = query_NM[there_NM].numpy()
    row_Q = there_NM.nonzero()[:, 0]
    read_QK = torch.where(keep_NKR.any(dim=2), source_LK[chunk_N], -1)[row_Q]
    source_nK[place_Q] = read_QK.numpy()
    for j, (cca, normed_1TD) in enumerate(zip(watched.attentions, watched.normed, strict=True)):
        weights_NMS = _weights(cca, normed_1TD, watched.encoded, chunk_N, keep_NKR, M)
        share_JnKR[j, place_Q] = weights_NMS[there_NM].view(-1, K, R).numpy()
    return source_nK, share_JnKR


def _weights(
    cca: Attention, normed_1TD: Tensor, encoded_NKRE: Tensor, chunk_N: Tensor, keep_NKR: Tensor, M: int
) -> Tensor:
    """Attention of each query to each neighbor token of its chunk, averaged over heads [N, M, S], float64 on the CPU."""
    _, K, R = keep_NKR.shape
    own, keys = Places.range(M - 1, 2 * M - 1, cca, normed_1TD), Places.range(0, R, cca, normed_1TD, repeat=K)
    shifted_LMD = F.pad(normed_1TD, (0, 0, 1 - M, M - 1)).view(-1, M, normed_1TD.shape[2])
    q_NHMC = cca.queries(shifted_LMD[chunk_N.to(shifted_LMD.device)], own)
    k_NHSC, _ = cca.keys_values(encoded_NKRE.flatten(1, 2), keys)
    logits_NHMS = (q_NHMC @ k_NHSC.mT).double() / math.sqrt(cca.head_dim)
    bias_NHMS = cca.bias(q_NHMC, own, keys)
    if bias_NHMS is not None:
        logits_NHMS = logits_NHMS + bias_NHMS
    logits_NHMS = logits_NHMS.cpu().masked_fill(~keep_NKR.flatten(1)[:, None, None, :], -torch.inf)
    return logits_NHMS.softmax(dim=-1).mean(dim=1)


def _output_spans(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, Int64s]:
    """Text of all tokens, and where each but the first stands in it; an unfinished character is its last token's."""
    text = tokenizer.decode(ids)
    ends = [len(tokenizer.decode(ids[:end]).rstrip("\ufffd")) for end in range(1, len(ids))]
    ends_n1 = np.maximum.accumulate(np.array([*ends, len(text)]).clip(max=len(text)))
    return text, np.stack([ends_n1[:-1], ends_n1[1:]], axis=1)


# --- the record ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributionConfig:
    """What is measured."""

    num_neighbors: int = 2
    """K."""
    neighbor_len: int = 128
    """R."""
    generate: int = 0
    """Tokens that the text is continued by, greedily; they are the answer. 0: the text itself is."""
    max_slots: int = 512
    """A text that is not continued is cut after so many."""
    batch_size: int = 8
    """Sequences at once."""

    def __post_init__(self) -> None:
        if min(self.num_neighbors, self.neighbor_len, self.max_slots, self.batch_size) < 1 or self.generate < 0:
            raise ConfigError(
                "num_neighbors, neighbor_len, max_slots and batch_size must be above 0, generate not below"
            )


def measure_attribution(
    opened: Opened, text: str, config: AttributionConfig, *, retriever: Retriever
) -> tuple[Record, dict[str, list[Any]], Attribution]:
    """Attributes a text, or the continuation of a prompt.

    Args:
        opened: The model.
        text: A prompt where `config.generate` is above 0.
        config: See AttributionConfig.
        retriever: Of the passages.

    Returns:
        A record, its units (a row for each output token of the answer), and all of it.

    Raises:
        ConfigError: The model was made without retrieval, or no output token sees a passage.
    """
    began = time.monotonic()
    if not opened.retrieves:
        raise ConfigError(f"{opened.name} was made without retrieval: there is nothing to attribute to passages")
    if not text.strip():
        raise ConfigError("the text is empty: give a text, or a prompt with --generate")
    model, tokenizer, M = opened.model, opened.tokenizer, opened.model.chunk_len
    if config.generate:
        prompt = prompt_ids(text, tokenizer)
        wanted = GenerateConfig(
            max_new_tokens=config.generate, num_neighbors=config.num_neighbors, neighbor_len=config.neighbor_len
        )
        generation = generate(model, tokenizer, [Prompt(prompt)], wanted, retriever=retriever)[0]
        reading = read_generation(prompt, generation, M)
    else:
        reading = read_document(text, tokenizer, M, retriever, config.num_neighbors, max_slots=config.max_slots)
    if not reading.chunks:
        raise ConfigError(
            f"no passage is read: a text needs more than {M} tokens to see those of its first chunk "
            f"(this one has {len(reading.ids) - 1}); continue a shorter one with --generate"
        )
    if reading.given == len(reading.ids):
        raise ConfigError("the model ended at once, without a word: there is nothing to attribute")
    found = attribute(model, tokenizer, reading, neighbor_len=config.neighbor_len, batch_size=config.batch_size)
    rows = found.token_rows()
    units = {
        "id": [row["token"] for row in rows],
        "loss_on_nats": (-found.log_prob_n[found.answer]).tolist(),
        "loss_off_nats": (-found.off_n[found.answer]).tolist(),
    }
    record = Record(
        kind="attribution",
        name=opened.name,
        figures=_figures(found),
        rows={"Passages": found.to_rows(), "Output tokens": rows},
        configuration=asdict(config) | {"text": text},
        fingerprints={"model": opened.fingerprint, "tokenizer": tokenizer.fingerprint},
        notes=(
            "Share of attention: CCA weights, averaged over heads and layers, and over the output tokens that see passages.",
            "Added log-probability: with all passages, less without this one; the text stays the same.",
            "One text: these figures say nothing of others.",
        ),
        seconds=round(time.monotonic() - began, 3),
    )
    return record, units, found


def _figures(found: Attribution) -> dict[str, Figure]:
    """Over the answer's output tokens that see passages."""
    sees_n = found.sees_n[found.answer]
    on_n, off_n = found.log_prob_n[found.answer][sees_n], found.off_n[found.answer][sees_n]
    count = int(sees_n.sum())
    if count == 0:
        return {"output tokens that see passages": Figure(value=0, unit="")}
    return {
        "log-probability per token, retrieval on": Figure(value=float(on_n.mean()), unit="nats", count=count),
        "log-probability per token, retrieval off": Figure(value=float(off_n.mean()), unit="nats", count=count),
        "loss, retrieval on against off": Figure(
            value=100 * (float(on_n.sum() / off_n.sum()) - 1) if off_n.sum() else None, unit="%", count=count
        ),
        "output tokens made likelier by retrieval": Figure(
            value=100 * float((on_n > off_n).mean()), unit="%", count=count
        ),
    }
