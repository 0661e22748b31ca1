"""Time of the overlap of chunks with their neighbors (equation 5 of the paper), against the naive search.

    OMP_NUM_THREADS=1 python benchmarks/overlap_speed.py [--chunks 100000] [--neighbors 10] [--json]

Chunks of 64 and neighbors of 128 random tokens; every fourth neighbor holds a part of its chunk. One thread.
"""

import argparse
import json
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.leakage import chunk_overlaps

Tokens = NDArray[np.int32]


def naive(chunk: Sequence[int], neighbors: Sequence[Sequence[int]]) -> float:
    """By the dynamic program in plain Python."""
    longest = 0
    for neighbor in neighbors:
        before = [0] * (len(neighbor) + 1)
        for token in chunk:
            now = [0] * (len(neighbor) + 1)
            for place, other in enumerate(neighbor):
                if token == other:
                    now[place + 1] = before[place] + 1
            longest = max(longest, *now)
            before = now
    return longest / len(chunk)


def make(num_chunks: int, num_neighbors: int) -> tuple[list[Tokens], list[list[Tokens]]]:
    rng = np.random.default_rng(0)
    chunks = rng.integers(0, 50_000, (num_chunks, 64), np.int32)
    neighbors = rng.integers(0, 50_000, (num_chunks, num_neighbors, 128), np.int32)
    for number in range(num_chunks):
        for place in range(0, num_neighbors, 4):
            length = int(rng.integers(1, 65))
            at = int(rng.integers(0, 128 - length + 1))
            neighbors[number, place, at : at + length] = chunks[number, 64 - length :]
    return list(chunks), [list(few) for few in neighbors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--neighbors", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chunks, neighbors = make(arguments.chunks, arguments.neighbors)
    started, used = time.perf_counter(), time.process_time()
    overlaps_N = chunk_overlaps(chunks, neighbors)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    sample = range(0, arguments.chunks, max(1, arguments.chunks // 20))
    started = time.perf_counter()
    expected = [naive(chunks[n].tolist(), [few.tolist() for few in neighbors[n]]) for n in sample]
    plain = (time.perf_counter() - started) / len(sample) * arguments.chunks
    np.testing.assert_array_equal(overlaps_N[list(sample)], np.array(expected, np.float32))
    report = {
        "chunks": arguments.chunks,
        "neighbors": arguments.neighbors,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "naive_seconds_extrapolated": round(plain),
        "mean_overlap": float(overlaps_N.mean()),
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for key, value in report.items():
        print(f"{key:28}{value:,}")


if __name__ == "__main__":
    main()
