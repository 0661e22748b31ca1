"""Several corpora as one stream of sequences, each with its share.

Which corpus a sequence is of follows from its number alone, and so does its number among those of its corpus: position in training
stays one number, and every corpus is walked through its own epochs.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from retro.chunks import Int64s, TrainingData
from retro.data import Batch, Batches, Retrieval
from retro.errors import MismatchError

LONGEST_PERIOD = 1 << 16
"""Weights are exact where their common denominator is at most this, and rounded to multiples of 1 / 65,536 elsewhere."""


class Turns:
    """In which order sequences of several corpora come, so that each has its share."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Lays out a period.

        Args:
            weights: Shares of the corpora, of any sum.
        """
        self.period = _whole_shares(weights)
        """Sequences of each corpus in the smallest stretch after which the turns repeat."""
        self._turns_P = _turns(self.period)
        self._before_P = np.zeros_like(self._turns_P)
        for corpus, share in enumerate(self.period):
            self._before_P[self._turns_P == corpus] = np.arange(share)

    def turns(self, first_sequence: int, size: int) -> tuple[Int64s, Int64s]:
        """Corpus of each of some sequences, and its number among those of the corpus, both [B].

        Among the first n sequences each corpus has its share of n, rounded up or down.
        """
        rounds_B, place_B = np.divmod(np.arange(first_sequence, first_sequence + size), len(self._turns_P))
        corpus_B = self._turns_P[place_B]
        return corpus_B, rounds_B * np.array(self.period)[corpus_B] + self._before_P[place_B]


class Mixture:
    """The sequences of several corpora by number, like `Batches`."""

    def __init__(self, parts: Sequence[Batches], weights: Sequence[float] = ()) -> None:
        """Takes turns.

        Args:
            parts: The corpora, of one sequence length and number of neighbors.
            weights: Their shares, of any sum; empty: the numbers of their sequences.
        """
        self.parts = list(parts)
        self.order = Turns(weights or [part.sequences_per_epoch for part in parts])

    @property
    def shares(self) -> list[float]:
        """Of all sequences, by corpus."""
        return [share / sum(self.order.period) for share in self.order.period]

    @property
    def sequences_per_epoch(self) -> int:
        """Those of all corpora together. With weights, some are read more often than once in as many, others less."""
        return sum(part.sequences_per_epoch for part in self.parts)

    def batch(
        self,
        first_sequence: int,
        size: int,
        *,
        neighbor_dropout: float = 0.0,
        copy_share: float = 0.0,
        neighbors: Retrieval = "on",
    ) -> Batch:
        """As `Batches.batch`. Documents are numbered in their own corpus."""
        corpus_B, number_B = self.order.turns(first_sequence, size)
        made, places = [], []
        for corpus in np.unique(corpus_B).tolist():
            place = np.flatnonzero(corpus_B == corpus)
            first = int(number_B[place[0]])  # the numbers of a corpus are consecutive
            made.append(
                self.parts[corpus].batch(
                    first, len(place), neighbor_dropout=neighbor_dropout, copy_share=copy_share, neighbors=neighbors
                )
            )
            places.append(place)
        return Batch.joined(made).chosen(torch.from_numpy(np.argsort(np.concatenate(places))))


def open_corpora(folders: Sequence[str]) -> dict[str, TrainingData]:
    """Opens training data by the names of the folders, a number added where two are alike.

    Raises:
        FormatError: One is missing, unfinished or damaged.
        MismatchError: They have different tokenizers or lengths of chunks.
    """
    corpora: dict[str, TrainingData] = {}
    for folder in folders:
        data = TrainingData(Path(folder))
        first = next(iter(corpora.values()), data)
        for what, own, other in (
            ("the tokenizer", data.tokenizer.fingerprint, first.tokenizer.fingerprint),
            ("chunks of", data.chunk_len, first.chunk_len),
        ):
            if own != other:
                raise MismatchError(
                    f"{first.folder} has {what} {other} and {data.folder} {own}: they cannot train one model; make one of them "
                    "again with the other's settings"
                )
        stem = data.folder.stem
        name = next(n for n in (stem, *(f"{stem}{i}" for i in range(2, len(folders) + 2))) if n not in corpora)
        corpora[name] = data
    return corpora


def corpus_seed(seed: int, corpus: int) -> int:
    """The seed of a corpus of a mixture, so that what is dropped in one says nothing about the others. The first keeps `seed`."""
    return seed if corpus == 0 else int(np.random.SeedSequence([seed, corpus]).generate_state(1)[0])


def _whole_shares(weights: Sequence[float]) -> list[int]:
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is meant as 7/10
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period > LONGEST_PERIOD:
        return [max(1, round(share * LONGEST_PERIOD)) for share in shares]
    return [int(share * period) for share in shares]


def _turns(period: Sequence[int]) -> Int64s:
    """Which corpus each sequence of a period is of [P].

    A corpus with a of the P sequences may have its j-th one (from 0) from floor(j P / a) on and must have it before
    ceil((j + 1) P / a); of those that may, the one that must soonest is next. All are then in time, so that after n sequences each
    has floor(n a / P) or ceil(n a / P).

    Source: proportionate progress, Baruah et al. 1996 (Algorithmica 15), on one processor.
    """
    P = sum(period)
    given = [0] * len(period)
    turns_P = np.empty(P, np.int64)
    for n in range(P):
        due = [
            (-(-(j + 1) * P // a), i) for i, (j, a) in enumerate(zip(given, period, strict=True)) if j * P < (n + 1) * a
        ]
        turns_P[n] = corpus = min(due)[1]
        given[corpus] += 1
    return turns_P
