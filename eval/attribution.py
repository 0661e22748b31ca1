"""Attribution: which tokens of which passages moved which output tokens.

Two views of it. The attention share of a passage's token is the CCA weight that an output token gave it: where the model looked
(`retro.attribution`). Leave-one-out is the change of an output token's log-probability when a passage is taken away and all else,
the text included, stays: what the passage did.

Letters as in retro/model.py; besides, n output tokens, J layers with CCA, P passages. A passage read for several chunks is one
passage, and is left out of all of them.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.language_modeling import Floats, losses_of
from eval.lm_record import Opened
from eval.records import Figure, Record
from retro.attribution import Attended, Placed, Reading, Source, answer_span, attend, read_generation
from retro.chunks import TokenizedDocument
from retro.config import GenerateConfig
from retro.errors import ConfigError
from retro.generate import Prompt, Retriever, generate, prompt_ids
from retro.tokenizer import Tokenizer


def read_document(
    text: str, tokenizer: Tokenizer, chunk_len: int, retriever: Retriever, num_neighbors: int, *, max_slots: int = 512
) -> Reading:
    """A text as it is scored: no lead, passages for each finished chunk. What is longer than `max_slots` is left out."""
    entry = TokenizedDocument.make(text, tokenizer, chunk_len, lead=0, split=0)
    ids = entry.ids[: max_slots + 1].tolist()
    wanted = {c: query for c, query in enumerate(entry.queries[: (len(ids) - 1) // chunk_len]) if query.strip()}
    found = retriever.retrieve(list(wanted.values()), num_neighbors) if wanted else []
    sources = {c: [Source.neighbor(p) for p in few] for c, few in zip(wanted, found, strict=True)}
    return Reading.of(ids, 0, sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """What moved the output tokens of a reading."""

    attended: Attended
    """Where the model looked."""
    log_prob_n: Floats
    """Natural logarithm of the probability of each output token, all passages read."""
    off_n: Floats
    """The same without any."""
    without_Pn: Floats
    """The same with one passage left out."""

    @property
    def delta_n(self) -> Floats:
        """What all passages together added to the log-probability of each output token."""
        return self.log_prob_n - self.off_n

    def passage_deltas(self) -> Floats:
        """What each passage added beside the others [P, n]."""
        return self.log_prob_n - self.without_Pn

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each passage: its share of the answer's attention, and what it added to the answer's log-probability."""
        attended = self.attended
        seeing_P = attended.passage_shares()[attended.answer][attended.sees_n[attended.answer]]
        rows = []
        for number, source in enumerate(attended.reading.sources):
            span = answer_span(attended, number)
            own = source.text[source.start :]
            rows.append(
                {
                    "passage": number + 1,
                    "title": source.title or source.key,
                    "key": source.key,
                    "chunks": ", ".join(
                        str(chunk + 1) for chunk, few in attended.reading.chunks.items() if number in few
                    ),
                    "share of attention, %": 100 * float(seeing_P[:, number].mean()) if len(seeing_P) else 0.0,
                    "added log-probability, nats": float(self.passage_deltas()[number, attended.answer].sum()),
                    "most attended": "" if span is None else own[slice(*span)],
                    "text": own,
                }
            )
        return rows

    def token_rows(self) -> list[dict[str, Any]]:
        """A row for each output token of the answer."""
        attended, delta_Pn = self.attended, self.passage_deltas()
        share_nP = attended.passage_shares()
        rows = []
        for place in range(len(self.log_prob_n))[attended.answer]:
            sees = bool(attended.sees_n[place])
            rows.append(
                {
                    "token": place + 1,
                    "text": attended.text[slice(*attended.spans_n2[place])],
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
    placed, P = Placed.of(reading, tokenizer, model.chunk_len, neighbor_len), len(reading.sources)
    targets_n = torch.tensor(reading.ids[1:], device=model.embedding.weight.device)

    def log_probs(hidden_BTD: Tensor) -> Floats:
        """Of the output tokens [B, n]."""
        return np.stack([-losses_of(model, row_TD[placed.slots], targets_n)[0] for row_TD in hidden_BTD])

    def without(few: Sequence[int]) -> Floats:
        """Log-probabilities [B, n] without one passage each, or without any (-1)."""
        keep_BLKR = placed.keep_1LKR.repeat(len(few), 1, 1, 1)
        for b, left_out in enumerate(few):
            keep_BLKR[b] &= ((placed.source_LK != left_out) & (left_out >= 0))[..., None]
        return log_probs(placed.hidden(model, keep_BLKR))

    attended, hidden_1TD = attend(model, tokenizer, placed)
    others = [*range(P), -1]
    other_Vn = np.concatenate([without(others[v : v + batch_size]) for v in range(0, P + 1, batch_size)])
    return Attribution(
        attended=attended, log_prob_n=log_probs(hidden_1TD)[0], off_n=other_Vn[P], without_Pn=other_Vn[:P]
    )


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
    rows, answer = found.token_rows(), found.attended.answer
    units = {
        "id": [row["token"] for row in rows],
        "loss_on_nats": (-found.log_prob_n[answer]).tolist(),
        "loss_off_nats": (-found.off_n[answer]).tolist(),
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
    answer = found.attended.answer
    sees_n = found.attended.sees_n[answer]
    on_n, off_n = found.log_prob_n[answer][sees_n], found.off_n[answer][sees_n]
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
