"""Texts per second of the encoder, reading chunks and writing vectors included, against a bare SentenceTransformer.encode.

    python benchmarks/encoder_speed.py [--chunks 1500] [--rounds 3] [--json]

Chunks of 64 tokens of the bundled SQuAD paragraphs; all variants in turn, `--rounds` times; medians. Also the smallest and mean
cosine to the vectors of the bare model, and the recall@10 of neighbors by our vectors against neighbors by the bare model's.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.build import encode_shard, read_stage
from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions
from index_builder.encoder import Encoder, resolve_dtype
from retro.chunks import ChunkStore
from retro.demo import CORPUS, examples_folder

Floats = NDArray[np.float32]


def neighbors(vectors_NX: Floats) -> NDArray[np.int64]:
    scores_NN = vectors_NX @ vectors_NX.T
    np.fill_diagonal(scores_NN, -np.inf)
    return np.argsort(-scores_NN, axis=1, kind="stable")[:, :10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1500, help="about so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    fast = resolve_dtype("auto", "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = BuildConfig(read=ReadOptions(limit=arguments.chunks // 3))
        encoders = {dtype: Encoder.open(dtype=dtype) for dtype in {"float32", fast}}
        tokenizer = encoders["float32"].tokenizer()
        read_stage([f"squad={examples_folder() / CORPUS}"], folder, tokenizer, config)
        texts = [
            text for shard in range(len(ChunkStore(folder).shards)) for _, text in ChunkStore(folder).shard_texts(shard)
        ]
        bare = encoders["float32"]._model
        made: dict[str, Floats] = {}

        def ours(dtype: str) -> None:
            for path in (folder / "vectors").glob("*.npy"):
                path.unlink()
            store = ChunkStore(folder)
            for shard in range(len(store.shards)):
                encode_shard(store, shard, encoders[dtype], config)
            parts = [np.load(path) for path in sorted((folder / "vectors").glob("*.npy"))]
            made[dtype] = np.concatenate(parts).astype(np.float32)

        def theirs(batch: int) -> None:
            made["bare"] = np.asarray(bare.encode(texts, batch_size=batch, show_progress_bar=False), np.float32)

        variants: dict[str, Callable[[], None]] = {
            "bare, batches of 32": lambda: theirs(32),
            "bare, batches of 64": lambda: theirs(64),
            "ours, float32": lambda: ours("float32"),
            f"ours, auto ({fast})": lambda: ours(fast),
        }
        seconds: dict[str, list[float]] = {label: [] for label in variants}
        for _ in range(arguments.rounds):
            for label, run in variants.items():
                started = time.perf_counter()
                run()
                seconds[label].append(time.perf_counter() - started)
    rates = {label: len(texts) / statistics.median(times) for label, times in seconds.items()}
    best = max(rate for label, rate in rates.items() if label.startswith("bare"))
    truth = neighbors(made["bare"])
    report: dict[str, Any] = {"chunks": len(texts), "rounds": arguments.rounds, "variants": {}}
    for label, rate in rates.items():
        report["variants"][label] = {"texts_per_s": round(rate, 1), "ratio_to_best_bare": round(rate / best, 3)}
    for dtype in dict.fromkeys(("float32", fast)):
        cosines = (made[dtype] * made["bare"]).sum(axis=1) / np.linalg.norm(made[dtype], axis=1)
        found = neighbors(made[dtype])
        recall = np.mean([len(np.intersect1d(f, t)) / 10 for f, t in zip(found, truth, strict=True)])
        report[f"{dtype} against bare"] = {
            "cosine_min": float(cosines.min()),
            "cosine_mean": float(cosines.mean()),
            "neighbors_recall_at_10": float(recall),
        }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for label, row in report["variants"].items():
        print(f"{label:28}{row['texts_per_s']:8.1f} texts/s   {row['ratio_to_best_bare']:.2f}x")
    for key in list(report)[3:]:
        print(key, report[key])


if __name__ == "__main__":
    main()
