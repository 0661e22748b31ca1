"""FAISS on one GPU against the CPU: ids of exact search, training, adding and searching of approximate indexes, memory.

    python benchmarks/gpu_index.py [--rows 1000000] [--dim 384] [--json]
    python benchmarks/gpu_index.py --rows 10000000 --types IVF16384,SQ8 OPQ64_256,IVF16384,PQ64

Vectors are drawn around 10,000 random centers (seeded), so that nothing has to be carried there. Exits with 1 where exact ids
differ, or where recall differs from the CPU's by more than 0.5 points.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from index_builder.build import index_stage
from index_builder.config import BuildConfig
from index_builder.index import VectorIndex, Vectors


def main() -> None:  # noqa: PLR0915 - one measurement from beginning to end
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--types", nargs="+", default=["IVF4096,SQfp16", "IVF4096,SQ8", "OPQ64_256,IVF4096,PQ64"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    import faiss

    if not torch.cuda.is_available() or not hasattr(faiss, "StandardGpuResources"):
        sys.exit("this needs an NVIDIA GPU and a FAISS with GPU support (retro-lm[gpu])")
    random = np.random.default_rng(0)
    centers = random.normal(size=(10_000, arguments.dim)).astype(np.float32)

    def draw(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        made = centers[random.integers(0, len(centers), count)]
        made = made + random.normal(0, 0.7, (count, arguments.dim)).astype(np.float32)
        return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), np.float32)

    blocks = [min(65_536, arguments.rows - first) for first in range(0, arguments.rows, 65_536)]
    vectors, queries = Vectors([draw(count).astype(np.float16) for count in blocks]), draw(1000)
    exact_cpu = VectorIndex.open(Path(), vectors, {"metric": "inner product", "segments": []})
    exact_gpu = VectorIndex.open(Path(), vectors, {"metric": "inner product", "segments": []}, device="cuda")
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(0), "faiss": faiss.__version__, "rows": arguments.rows}
    few = queries[:100]
    seconds = {}
    for label, index in (("cpu", exact_cpu), ("gpu", exact_gpu)):
        index.search(few[:1], 10)
        started = time.perf_counter()
        found = index.search(few, 100)
        seconds[label] = time.perf_counter() - started
        report[f"exact_{label}_queries_per_s"] = len(few) / seconds[label]
        report[f"exact_{label}"] = found
    same = all(np.array_equal(a, b) for a, b in zip(report.pop("exact_cpu"), report.pop("exact_gpu"), strict=True))
    report["exact_ids_and_scores_equal"] = same
    sound = same
    report["indexes"] = []
    truth = exact_gpu.search(queries, 10)[1]
    for factory in arguments.types:
        with tempfile.TemporaryDirectory() as name:
            row: dict[str, Any] = {"index_type": factory}
            free = torch.cuda.mem_get_info(0)[0]
            started = time.perf_counter()
            description = index_stage(
                Path(name), "index", vectors, BuildConfig(index_type=factory), normalized=True, device="cuda"
            )
            row["build_seconds_gpu"] = time.perf_counter() - started
            row["measured"] = description["measured"]
            for device in ("cpu", "cuda"):
                index = VectorIndex.open(Path(name) / "index", vectors, description, device=device)
                index.search(queries, 10)
                started = time.perf_counter()
                found_rows = index.search(queries, 10)[1]
                row[f"queries_per_s_{device}"] = len(queries) / (time.perf_counter() - started)
                hits = [len(np.intersect1d(f, t)) / 10 for f, t in zip(found_rows, truth, strict=True)]
                row[f"recall_at_10_{device}"] = float(np.mean(hits))
            row["gpu_bytes_used"] = free - torch.cuda.mem_get_info(0)[0]
            row["gpu_bytes_estimated"] = int(description["measured"]["bytes_per_vector"] * arguments.rows) + (3 << 29)
            sound &= abs(row["recall_at_10_cpu"] - row["recall_at_10_cuda"]) <= 0.005
            report["indexes"].append(row)
            print(row, file=sys.stderr, flush=True)
    print(json.dumps(report, indent=2) if arguments.json else report)
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
