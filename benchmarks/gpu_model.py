"""The network on a GPU: correctness against the CPU, training speed, decoding speed.

    python benchmarks/gpu_model.py reference --data demo.data --out reference.json       (on a CPU, beforehand)
    python benchmarks/gpu_model.py check --data demo.data --reference reference.json --out RESULT.json
    python benchmarks/gpu_model.py speed --models small retro-425m retro-1.5b --out RESULT.json

reference: losses of the first 5 steps of `tiny` and `small` in float32, with retrieval and without.
check: 200 steps of both, whose losses must fall and whose first 5 must be the reference's (1e-4 in float32, 0.02 nats in
    bfloat16); a query that sees nothing, cached decoding against the full pass, one graph when compiled, attention kernels.
speed: training tokens/s, utilization of the peak (multiplications of decoder, encoder and CCA; PaLM's convention) and memory,
    retrieval on and off, compiled or not, and tokens/s of decoding with batches of 1 and 32. Batches are of random tokens: no data
    is needed. The paper's sizes are measured with rotary positions.

`--device cpu` rehearses all of it; take `--steps 3 --models tiny` then.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro.attention import attend
from retro.cca import Cache
from retro.chunks import TrainingData
from retro.config import PRESETS, ModelConfig, RunConfig
from retro.costs import device_peak_flops, forward_flops, mfu, training_flops
from retro.data import Batch
from retro.model import Retro
from retro.train_setup import make_optimizer, open_batches
from retro.train_step import train_step

K, R = 2, 128
CHECKED = {"tiny": 8, "small": 4}
"""Presets and the sequences of a step."""
Say = Callable[[str], None]


def run_of(name: str, *, seq_len: int, batch_size: int) -> RunConfig:
    run = PRESETS[name]
    train = dataclasses.replace(run.train, seq_len=seq_len, batch_size=batch_size, micro_batch_size=batch_size)
    return dataclasses.replace(run, train=train)


def losses(
    data: TrainingData, name: str, steps: int, device: str, dtype: torch.dtype, *, retrieval: bool
) -> list[float]:
    """Losses (nats per token) of the first steps, from the preset's initial weights."""
    run = run_of(name, seq_len=512, batch_size=CHECKED[name])
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=data.tokenizer.vocab_size))
    batches = open_batches(data, "train", run)
    model = Retro(run.model).initialize(torch.Generator().manual_seed(0)).to(device)
    optimizer = make_optimizer(model, run.train)
    found = []
    for step in range(steps):
        size = run.train.batch_size
        batch = batches.batch(step * size, size, neighbors="on" if retrieval else "off")
        result = train_step(model, optimizer, batch, micro_batch_size=size, rate=1e-3, grad_clip=1.0, dtype=dtype)
        found.append(result.loss_nats)
    return found


def reference(data: TrainingData, device: str) -> dict[str, list[float]]:
    return {
        f"{name} {mode}": losses(data, name, 5, device, torch.float32, retrieval=mode == "on")
        for name in CHECKED
        for mode in ("on", "off")
    }


def check_losses(
    data: TrainingData, expected: dict[str, list[float]], steps: int, device: str, say: Say
) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for key, first in expected.items():
        name, mode = key.split()
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
            found = losses(data, name, steps, device, dtype, retrieval=mode == "on")
            difference = max(abs(a - b) for a, b in zip(found, first, strict=False))
            entry = {"first": found[:5], "last": found[-1], "largest_difference": difference}
            entry |= {"as_the_cpu": difference <= bound, "falls": found[-1] < found[0] - 0.5}
            report[f"{key} {str(dtype).removeprefix('torch.')}"] = entry
            say(f"{key} {dtype}: {entry}")
    return report


def check_masks(device: str) -> dict[str, bool]:
    """A query that may see nothing gets exactly zero, and nothing that is not finite goes back through it."""
    report = {}
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(2, 4, 64, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        keep = torch.rand(2, 1, 64, 64, device=device) < 0.5
        keep[:, :, ::7] = False
        y = attend(q, k, v, keep)
        y.float().square().sum().backward()  # type: ignore[no-untyped-call]
        finite = all(bool(x.grad.isfinite().all()) for x in (q, k, v) if x.grad is not None)
        report[str(dtype).removeprefix("torch.")] = bool((y[:, :, ::7] == 0).all()) and finite
    return report


def check_decoding(config: ModelConfig, device: str) -> float:
    """Largest difference of final activations between cached decoding, 3 rows at once, and the full pass."""
    model = Retro(config).initialize(torch.Generator().manual_seed(0)).to(device).eval()
    M = config.chunk_len
    batch = random_batch(config, 3, 4 * M, device)
    assert batch.neighbors_BLKR is not None
    assert batch.keep_BLKR is not None
    with torch.inference_mode():
        full = model.hidden(batch.inputs_BT, neighbors_BLKR=batch.neighbors_BLKR, keep_BLKR=batch.keep_BLKR)
        cache = Cache()
        near = {"neighbors_BLKR": batch.neighbors_BLKR[:, :1], "keep_BLKR": batch.keep_BLKR[:, :1]}
        parts = [model.hidden(batch.inputs_BT[:, :M], cache=cache, **near)]
        for t in range(M, 4 * M):
            u = slice(t // M, t // M + 1)
            near = {"neighbors_BLKR": batch.neighbors_BLKR[:, u], "keep_BLKR": batch.keep_BLKR[:, u]}
            parts.append(model.hidden(batch.inputs_BT[:, t : t + 1], cache=cache, **near))
    return float((torch.cat(parts, dim=1) - full).abs().max())


def check_graph(config: ModelConfig, device: str) -> str:
    model = Retro(config).initialize(torch.Generator().manual_seed(0)).to(device)
    compiled = torch.compile(model, fullgraph=True)
    batch = random_batch(config, 2, 512, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = compiled(**batch.tensors())
    loss.backward()
    return "one graph, forward and backward"


def check_kernels(config: ModelConfig, device: str) -> list[str]:
    """Names of the attention kernels of one training step."""
    from torch.profiler import ProfilerActivity, profile

    model = Retro(config).initialize(torch.Generator().manual_seed(0)).to(device)
    batch = random_batch(config, 2, 512, device)
    kinds = [ProfilerActivity.CUDA] if device != "cpu" else [ProfilerActivity.CPU]
    with profile(activities=kinds) as profiler, torch.autocast(device, dtype=torch.bfloat16):
        model(**batch.tensors()).backward()
    names = {event.key for event in profiler.key_averages()}
    return sorted(
        name[:120] for name in names if any(w in name.lower() for w in ("flash", "fmha", "flex", "attention", "sdpa"))
    )


def random_batch(config: ModelConfig, size: int, seq_len: int, device: str, *, retrieval: bool = True) -> Batch:
    """Sequences of one to three documents, all of whose chunks have neighbors."""
    generator = torch.Generator().manual_seed(0)
    L = seq_len // config.chunk_len

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, config.vocab_size, shape, generator=generator).to(device)

    keep_BT = torch.ones(size, seq_len, dtype=torch.bool, device=device)
    with_neighbors = retrieval and bool(config.cca_layers)
    neighbors = draw(size, L, K, R) if with_neighbors else None
    return Batch(
        inputs_BT=draw(size, seq_len),
        targets_BT=draw(size, seq_len),
        keep_BT=keep_BT,
        loss_BT=keep_BT,
        document_BL=(torch.arange(L, device=device) * 3 // L).expand(size, L),
        neighbors_BLKR=neighbors,
        keep_BLKR=None if neighbors is None else torch.ones_like(neighbors, dtype=torch.bool),
    )


def training_speed(
    name: str, device: str, steps: int, micro: int, seq_len: int, *, retrieval: bool, compiled: bool
) -> dict[str, Any]:
    """Figures of training steps after two that warm up."""
    run = run_of(name, seq_len=seq_len, batch_size=micro)
    config = dataclasses.replace(run.model, positions="rotary")
    with torch.device(device):
        model = Retro(config)
    model.initialize(torch.Generator(device=device).manual_seed(0))
    optimizer = make_optimizer(model, run.train)
    if compiled:
        model.compile()
    batch = random_batch(config, micro, seq_len, device, retrieval=retrieval)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    began = 0.0
    for step in range(steps + 2):
        if step == 2:
            synchronize(device)
            began = time.perf_counter()
        train_step(model, optimizer, batch, micro_batch_size=micro, rate=1e-4, grad_clip=1.0, dtype=torch.bfloat16)
    synchronize(device)
    seconds = (time.perf_counter() - began) / steps
    forward = forward_flops(config, seq_len=seq_len, num_neighbors=K if retrieval else 0, neighbor_len=R)
    peak = device_peak_flops(torch.cuda.get_device_name()) if device != "cpu" else None
    flops = training_flops(forward) * micro
    return {
        "tokens_per_s": micro * seq_len / seconds,
        "seconds_per_step": seconds,
        "flops_per_step": flops,
        "mfu": None if peak is None else mfu(flops, seconds, peak),
        "memory_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
        "sequences": micro,
        "seq_len": seq_len,
    }


def decoding_speed(name: str, device: str, rows: int, tokens: int, *, retrieval: bool) -> float:
    """Tokens/s of greedy decoding after a prompt of one chunk, in bfloat16; neighbors are there already."""
    config = dataclasses.replace(PRESETS[name].model, positions="rotary")
    M = config.chunk_len
    kind = torch.bfloat16 if device != "cpu" else torch.float32
    with torch.device(device):
        model = Retro(config)
    model = model.initialize(torch.Generator(device=device).manual_seed(0)).to(kind).eval()
    batch = random_batch(config, rows, M, device, retrieval=retrieval)
    near = {"neighbors_BLKR": batch.neighbors_BLKR, "keep_BLKR": batch.keep_BLKR} if retrieval else {}
    with torch.inference_mode():
        cache = Cache()
        logits = model.logits(model.hidden(batch.inputs_BT, cache=cache, **near)[:, -1:])
        synchronize(device)
        began = time.perf_counter()
        for step in range(tokens):
            ends = near if step % M == M - 1 else {}
            logits = model(logits.argmax(-1), cache=cache, **ends)
        synchronize(device)
    return rows * tokens / (time.perf_counter() - began)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def speed(models: list[str], device: str, steps: int, say: Say, *, compilation: bool) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name in models:
        seq_len = PRESETS[name].train.seq_len
        for retrieval in (True, False):
            for compiled in (False, True) if compilation else (False,):
                key = f"{name} retrieval {'on' if retrieval else 'off'}{' compiled' if compiled else ''}"
                # The largest power of two that fits.
                for micro in (64, 32, 16, 8, 4, 2, 1) if device != "cpu" else (1,):
                    torch._dynamo.reset()
                    if device != "cpu":
                        torch.cuda.empty_cache()
                    try:
                        report[key] = training_speed(
                            name, device, steps, micro, seq_len, retrieval=retrieval, compiled=compiled
                        )
                        break
                    except torch.OutOfMemoryError:
                        continue
                    except Exception as error:  # one part that fails must not cost the others
                        report[key] = {"error": repr(error)[:500]}
                        break
                say(f"{key}: {report.get(key)}")
        for rows in (1, 32):
            for retrieval in (True, False):
                key = f"{name} decoding {rows} rows retrieval {'on' if retrieval else 'off'} tokens_per_s"
                report[key] = decoding_speed(name, device, rows, 192 if device != "cpu" else 8, retrieval=retrieval)
                say(f"{key}: {report[key]:.1f}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("reference", "check", "speed"))
    parser.add_argument("--data", type=Path, help="training data")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="of training; 200 for check, 20 for speed")
    parser.add_argument("--models", nargs="+", default=["small", "retro-425m"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = arguments.device

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    report: dict[str, Any] = {"torch": torch.__version__, "commit": commit, "device": device}
    if device != "cpu":
        report["gpu"] = torch.cuda.get_device_name()
    torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.part == "speed":
        report |= speed(arguments.models, device, arguments.steps or 20, say, compilation=not arguments.no_compile)
    else:
        data = TrainingData(arguments.data)
        if arguments.part == "reference":
            report = {"losses": reference(data, "cpu")}
        else:
            config = dataclasses.replace(PRESETS["tiny"].model, vocab_size=data.tokenizer.vocab_size)
            expected = json.loads(arguments.reference.read_text())["losses"]
            checks: dict[str, Callable[[], Any]] = {
                "masks": lambda: check_masks(device),
                "decoding_largest_difference": lambda: check_decoding(config, device),
                "attention_kernels": lambda: check_kernels(config, device),
                "graph": lambda: check_graph(config, device),
                "losses": lambda: check_losses(data, expected, arguments.steps or 200, device, say),
            }
            for name, measure in checks.items():
                try:
                    report[name] = measure()
                except Exception as error:  # the other checks are still worth their time
                    report[name] = {"error": repr(error)[:1000]}
                say(f"{name}: {report[name]}")
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
