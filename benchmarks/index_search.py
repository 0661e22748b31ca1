"""The automatically chosen index against exact search on the same cores, and against autofaiss and hnswlib on the same vectors.

    python benchmarks/index_search.py --rows 1000000 --vectors vectors/            # float16 .npy shards of real vectors [n, X]
    python benchmarks/index_search.py --rows 1000000 --max-memory 384MB            # a quarter of the float32 vectors
    python benchmarks/index_search.py --rows 10000000 --max-memory 2GiB --budget 4GiB
    python benchmarks/index_search.py --rows 1000000 --peer-python peers/bin/python

Without enough real vectors, further ones are drawn around them: a real one, moved towards one of the nearest of a sample by a
random share, plus noise of a tenth of its length, normalized. Queries are as many real and drawn ones, none of
them in the index.
Without --vectors the bundled SQuAD chunks are encoded. --budget limits the data of the process (RLIMIT_DATA).
Peers need an environment of their own: python -m venv peers && peers/bin/pip install autofaiss hnswlib "numpy<2" "pyarrow<19"
"""

import argparse
import json
import lzma
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder import index as vector_index
from index_builder.build import index_stage
from index_builder.config import BuildConfig
from index_builder.index import VectorIndex, Vectors
from retro.terminal import parse_bytes

SHARD = 65_536
QUERIES = 1000

PEER = """
import json, sys, time
import numpy as np
kind, rows, folder, memory, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
shards = sorted(__import__("pathlib").Path(folder).glob("[0-9]*.npy"))
data = np.concatenate([np.load(p).astype(np.float32) for p in shards])[:rows]
queries = np.load(folder + "/queries.npy")
truth = np.load(folder + "/truth.npy")
def recall(found):
    return float(np.mean([len(set(f[:10]) & set(t[:10])) / 10 for f, t in zip(found.tolist(), truth.tolist())]))
started = time.time()
out = []
if kind == "hnswlib":
    import hnswlib
    index = hnswlib.Index(space="ip", dim=data.shape[1])
    index.init_index(max_elements=len(data), ef_construction=200, M=16)
    index.set_num_threads(threads)
    index.add_items(data)
    build = time.time() - started
    for ef in (32, 64, 128, 256, 512):
        index.set_ef(ef)
        t = time.time(); found, _ = index.knn_query(queries, k=10, num_threads=threads); s = time.time() - t
        out.append({"setting": f"M 16, ef {ef}", "recall_at_10": recall(found), "queries_per_s": len(queries) / s})
        if out[-1]["recall_at_10"] >= 0.95: break
    size = index.index_file_size()
else:
    import faiss
    from autofaiss import build_index
    index, infos = build_index(data, save_on_disk=False, metric_type="ip", max_index_memory_usage=memory,
                               current_memory_available="16G", max_index_query_time_ms=10, verbose=40)
    build = time.time() - started
    t = time.time(); _, found = index.search(queries, 10); s = time.time() - t
    out.append({"setting": str(infos.get("index_key")), "recall_at_10": recall(found), "queries_per_s": len(queries) / s})
    size = faiss.serialize_index(index).nbytes
print(json.dumps({"peer": kind, "build_seconds": build, "bytes": size, "results": out}))
"""


def real_vectors(folder: Path | None) -> NDArray[np.float16]:
    if folder is not None:
        return np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])
    from index_builder.encoder import Encoder
    from retro.chunks import chunk_spans
    from retro.demo import CORPUS, examples_folder

    encoder = Encoder.open()
    tokenizer = encoder.tokenizer()
    with lzma.open(examples_folder() / CORPUS, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    chunks = [t[a:b] for t in texts for a, b in chunk_spans(tokenizer.encode(t), 64).tolist()]
    return encoder.encode(chunks, "document").astype(np.float16)


def drawn(base_NX: NDArray[np.float32], count: int, random: np.random.Generator) -> NDArray[np.float16]:
    """Vectors around real ones; see the top of the file."""
    anchor = base_NX[random.integers(0, len(base_NX), count)]
    pool = base_NX[random.choice(len(base_NX), min(len(base_NX), 512), replace=False)]
    near = np.argmax(anchor @ pool.T - 2 * (anchor @ pool.T > 0.999), axis=1)
    made = anchor + random.uniform(0, 0.5, (count, 1)).astype(np.float32) * (pool[near] - anchor)
    made += random.normal(0, 0.1 / np.sqrt(made.shape[1]), made.shape).astype(np.float32)
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), np.float16)


def write_vectors(folder: Path, rows: int, source: Path | None) -> tuple[Vectors, NDArray[np.float32], int]:
    random = np.random.default_rng(0)
    real = real_vectors(source)
    base = real[random.permutation(len(real))]
    held_out, base = base[: len(base) // 20].astype(np.float32), base[len(base) // 20 :]
    num_real = min(rows, len(base))
    around = base[:100_000].astype(np.float32)
    shards = []
    for first in range(0, rows, SHARD):
        end = min(first + SHARD, rows)
        given = base[first : min(end, num_real)]
        path = folder / f"{first // SHARD:05d}.npy"
        np.save(path, np.concatenate([given, drawn(around, end - first - len(given), random)]))
        shards.append(np.load(path, mmap_mode="r"))
    real_queries = held_out[: round(QUERIES * num_real / rows)]
    others = drawn(around, QUERIES - len(real_queries), random).astype(np.float32)
    queries = np.concatenate([real_queries, others])
    np.save(folder / "queries.npy", queries)
    return Vectors(shards), queries, num_real


def rate(search: Callable[[], Any], queries: int) -> float:
    started = time.perf_counter()
    search()
    return queries / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--vectors", type=Path, help="folder of real vectors")
    parser.add_argument("--max-memory")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--index-type", default="auto")
    parser.add_argument("--budget", help="data that this process may hold at most")
    parser.add_argument("--peer-python", help="python of an environment with autofaiss and hnswlib")
    parser.add_argument("--work", type=Path, help="folder for the files; temporary without it")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.budget:
        limit = parse_bytes(arguments.budget)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        vectors, queries, num_real = write_vectors(folder, arguments.rows, arguments.vectors)
        memory = None if arguments.max_memory is None else parse_bytes(arguments.max_memory)
        config = BuildConfig(max_memory=memory, recall=arguments.recall, index_type=arguments.index_type)
        started = time.perf_counter()
        description = index_stage(
            folder,
            "index",
            vectors,
            config,
            normalized=True,
            progress=lambda stage, done, total: print(f"\r{stage} {done:,}", end="", file=sys.stderr, flush=True),
        )
        build = time.perf_counter() - started
        index = VectorIndex.open(folder / "index", vectors, description)
        exact = VectorIndex.open(folder, vectors, {"metric": "inner product", "segments": []}, max_memory=6 << 30)
        few = queries[: 200 if arguments.rows <= 2_000_000 else 50]
        if arguments.rows <= 2_000_000:
            exact.search(few[:1], 10)  # holds its vectors in memory from here on
        exact_rate = rate(lambda: exact.search(few, 100), len(few))
        truth = exact.search(queries if arguments.rows <= 2_000_000 else few, 100)[1]
        exact_rate = max(exact_rate, rate(lambda: exact.search(few, 10), len(few)))
        np.save(folder / "truth.npy", truth)
        asked = queries[: len(truth)]
        index.search(asked, 10)
        found = index.search(asked, 100)[1]
        batch = max(rate(lambda: index.search(queries, 10), len(queries)) for _ in range(3))
        single = rate(lambda: [index.search(query[None], 10) for query in queries[:200]], 200)
        exact_single = rate(lambda: [exact.search(query[None], 10) for query in queries[:10]], 10)
        report: dict[str, Any] = {
            "rows": arguments.rows,
            "real_vectors": num_real,
            "index_type": description["factory"],
            "settings": {name: description[name] for name in ("nprobe", "ef_search", "rescore")},
            "measured_at_build": description["measured"],
            "recall_at_10": float(vector_index._shares(index.search(asked, 10)[1], truth, 10).mean()),
            "recall_at_100": float(vector_index._shares(found, truth, 100).mean()),
            "queries_per_s": batch,
            "queries_per_s_exact": exact_rate,
            "ratio": batch / exact_rate,
            "queries_per_s_one_at_a_time": single,
            "ratio_one_at_a_time": single / exact_single,
            "index_bytes": sum(path.stat().st_size for path in (folder / "index").iterdir()),
            "float32_bytes": 4 * vectors.dim * arguments.rows,
            "build_seconds": build,
            "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if arguments.peer_python:
            report["peers"] = []
            for kind in ("hnswlib", "autofaiss"):
                done = subprocess.run(
                    [
                        arguments.peer_python,
                        "-c",
                        PEER,
                        kind,
                        str(arguments.rows),
                        str(folder),
                        "4G" if memory is None else f"{memory // 1_000_000}M",
                        "2",
                    ],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                line = done.stdout.splitlines()[-1] if done.returncode == 0 else ""
                report["peers"].append(json.loads(line) if line else {"peer": kind, "failed": done.stderr[-300:]})
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for key, value in report.items():
        print(f"{key:28}{f'{value:,.4g}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
