"""How much of each chunk its neighbors hold already, and bits per byte over the chunks of which they hold little.

Letters: N chunks, P pairs of a chunk and a neighbor, M tokens of the longest chunk, R of the longest neighbor.

Source: arXiv:2112.04426, section 2.6 and equation 5.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.metrics import Difference, bootstrap_ratio, paired_bootstrap

Tokens = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]

_BLOCK_CELLS = 1 << 17
"""Tokens of neighbors that are compared at once: the arrays of that size stay in the processor's cache."""


# --- overlap of a chunk with its neighbors ------------------------------------------------------------------------


def overlap(chunk_tokens: Tokens, neighbor_tokens: Sequence[Tokens]) -> float:
    """Overlap of one chunk with its neighbors, see `chunk_overlaps`."""
    return float(chunk_overlaps([chunk_tokens], [neighbor_tokens])[0])


def chunk_overlaps(chunks: Sequence[Tokens], neighbors: Sequence[Sequence[Tokens]]) -> NDArray[np.float32]:
    """The share s/m of each chunk that one of its neighbors holds in one piece.

    s is the length of the longest run of tokens that stands in the chunk and in a neighbor; m is the number of the chunk's own
    tokens, so that the short last chunk of a document that was copied whole overlaps by 1 like the others (with the paper's
    constant m = 64 it would pass for clean). Chunks without tokens or without neighbors overlap by 0.

    Args:
        chunks: Token ids of each chunk, without BOS, EOS and padding; not negative.
        neighbors: For each chunk the token ids of its neighbors, chunk and continuation as the model reads them, without padding.

    Returns:
        Shares [N] from 0 to 1.

    Source: arXiv:2112.04426, equation 5 (there with 10 neighbors).
    """
    lengths_N = np.fromiter(map(len, chunks), np.int64, len(chunks))
    owner_P = np.repeat(np.arange(len(chunks)), [len(few) for few in neighbors])
    flat = [neighbor for few in neighbors for neighbor in few]
    longest_N = np.zeros(len(chunks), np.int64)
    M, R = int(lengths_N.max(initial=0)), max(map(len, flat), default=0)
    # One place more than there are tokens: it keeps neighbors that lie one after the other apart.
    block = max(1, _BLOCK_CELLS // (R + 1))
    for first in range(0, len(flat) if M else 0, block):
        owners = owner_P[first : first + block]
        chunk_PM = _padded([chunks[n] for n in owners.tolist()], M, padding=-1)
        neighbor_PR = _padded(flat[first : first + block], R + 1, padding=-2)
        np.maximum.at(longest_N, owners, _longest_common_runs(chunk_PM, neighbor_PR))
    return (longest_N / np.maximum(lengths_N, 1)).astype(np.float32)


def _padded(rows: Sequence[Tokens], width: int, *, padding: int) -> NDArray[np.int32]:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    padded = np.full((len(rows), width), padding, np.int32)
    padded[np.arange(width) < lengths[:, None]] = np.concatenate(rows)
    return padded


def _longest_common_runs(chunk_PM: NDArray[np.int32], neighbor_PR: NDArray[np.int32]) -> NDArray[np.int64]:
    """Length of the longest common substring of each pair [P], by the usual dynamic program: token by token of the chunk, for all
    places of all neighbors at once. The last place of each neighbor is padding, so that the runs of the next one start at 0."""
    P, R = neighbor_PR.shape
    M = chunk_PM.shape[1]
    kind = np.min_scalar_type(M)
    run_C, before_C, best_C = (np.zeros(P * R, kind) for _ in range(3))
    same_PR = np.empty((P, R), np.bool_)
    for m in range(M):
        np.equal(neighbor_PR, chunk_PM[:, m : m + 1], out=same_PR)
        run_C, before_C = before_C, run_C
        np.add(before_C[:-1], 1, out=run_C[1:])
        run_C[0] = 1
        np.multiply(run_C, same_PR.reshape(-1).view(np.uint8), out=run_C)
        np.maximum(best_C, run_C, out=best_C)
    longest_P: NDArray[np.int64] = best_C.reshape(P, R).max(axis=1).astype(np.int64)
    return longest_P


# --- bits per byte by allowed overlap -----------------------------------------------------------------------------


def overlap_curve(
    loss_N: Floats, bytes_N: Floats, overlap_N: Floats, thresholds: Sequence[float]
) -> tuple[float | None, ...]:
    """Bits per byte over the chunks that overlap with their neighbors by at most so much.

    Args:
        loss_N: Summed over the tokens of each chunk, in nats.
        bytes_N: Of each chunk.
        overlap_N: See `chunk_overlaps`.
        thresholds: Allowed overlaps. At 1 all chunks count: the result is plain bits per byte.

    Returns:
        A value for each threshold; None where no chunk is left, or only chunks without bytes.

    Source: arXiv:2112.04426, section 2.6.
    """
    values: list[float | None] = []
    for allowed in thresholds:
        keep_N = _at_most(overlap_N, allowed)
        # Exactly rounded sums, which do not depend on how chunks are ordered or grouped.
        size = math.fsum(bytes_N[keep_N])
        values.append(math.fsum(loss_N[keep_N]) / math.log(2) / size if size > 0 else None)
    return tuple(values)


def overlap_intervals(
    loss_N: Floats,
    bytes_N: Floats,
    overlap_N: Floats,
    document_N: Sequence[str],
    thresholds: Sequence[float],
    *,
    seed: int = 0,
) -> tuple[tuple[float, float] | None, ...]:
    """95% intervals of `overlap_curve`, documents being drawn, not chunks: those of one document are alike.

    Args:
        loss_N, bytes_N, overlap_N, thresholds: As there.
        document_N: Key of the document of each chunk.
        seed: Of the resamples.
    """
    sums = _document_sums((loss_N, bytes_N), overlap_N, document_N, thresholds)
    return tuple(bootstrap_ratio(loss, size, seed=seed) if size.sum() > 0 else None for loss, size in sums)


def overlap_differences(
    loss_N: Floats,
    other_N: Floats,
    bytes_N: Floats,
    overlap_N: Floats,
    document_N: Sequence[str],
    thresholds: Sequence[float],
    *,
    seed: int = 0,
) -> tuple[Difference | None, ...]:
    """Differences between two systems' curves, loss less other in bits per byte, documents being drawn in pairs."""
    sums = _document_sums((loss_N, other_N, bytes_N), overlap_N, document_N, thresholds)
    return tuple(
        paired_bootstrap(loss, other, size, seed=seed) if size.sum() > 0 else None for loss, other, size in sums
    )


def _document_sums(
    columns: Sequence[Floats], overlap_N: Floats, document_N: Sequence[str], thresholds: Sequence[float]
) -> Iterator[list[Floats]]:
    """For each threshold the sums of each document, losses (all columns but the last, the bytes) in bits."""
    numbers: dict[str, int] = {}
    owner_N = np.array([numbers.setdefault(key, len(numbers)) for key in document_N], np.int64)
    for allowed in thresholds:
        keep_N = _at_most(overlap_N, allowed)
        sums: list[Floats] = [
            np.bincount(owner_N[keep_N], weights=c[keep_N], minlength=len(numbers)).astype(np.float64) for c in columns
        ]
        yield [*(losses / math.log(2) for losses in sums[:-1]), sums[-1]]


def _at_most(overlap_N: Floats, allowed: float) -> NDArray[np.bool_]:
    # In float32, as the overlaps are: 0.1 of a chunk of ten tokens is allowed by 0.1.
    return np.asarray(overlap_N, np.float32) <= np.float32(allowed)
