"""Speed of the network on the CPU: against retro-pytorch and Hugging Face GPT-2, of retrieval, and by position.

    python benchmarks/model_speed.py --peer-python peers/bin/python --index wiki.index
    python benchmarks/model_speed.py --only c,e --repetitions 3 --json

a. A training step (forward, backward, AdamW) against `retro-pytorch` of the same sizes. Wanted: at least 1.2x as fast.
b. 512 tokens generated with retrieval against its `TrainingWrapper.generate`, which runs the whole sequence for every token. Both
   get the same neighbors from a stub, because its own look-up does not run any more (retro_pytorch_peer.py). Wanted: 10x.
c. The decoder without retrieval against Hugging Face GPT-2 of the same width, depth and vocabulary, one table: training tokens/s,
   and generated tokens/s (greedy, cached). Wanted: 1.0x each.
d. Retrieval (k = 2): cost of a training step against that of the decoder alone, beside the ratio of their FLOPs (counted by PyTorch
   in forward and backward, attention in full); wanted: at most 1.15x of it. Time per generated token with searches in --index
   against none; wanted: at most 1.3x. Queries are real text, as a random network writes noise.
e. Time per token at position 2,000 against 200 (the chunk that each lies in), with retrieval and without, and which operations the
   difference is in. Wanted: at most 1.6x, all of it attention.

Weights are random; for decoding ours are laid out as `load_model` does it. Everybody has the same threads, and takes turns
(A B A B ...); times are medians, ratios are of these. On a machine that others use, the times say little, and with several threads
the ratios too: take --threads 1 --cpu-seconds there.
Parts a and b need an environment of their own:

    python -m venv peers && peers/bin/pip install retro-pytorch==0.3.9 "torch==2.13.0" "numpy<2" "pyarrow<19"
"""

import argparse
import dataclasses
import itertools
import json
import lzma
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from retro.chunks import Passage
from retro.config import PRESETS, GenerateConfig, ModelConfig
from retro.demo import CORPUS, examples_folder
from retro.generate import Prompt, Retriever, Role, generate
from retro.model import Retro
from retro.tokenizer import Tokenizer

K, R = 2, 128
PROMPT = 64
WANTED = {
    "training_against_retro_pytorch": "at least 1.2",
    "generation_against_retro_pytorch": "at least 10",
    "training_against_gpt2": "at least 1.0",
    "generation_against_gpt2": "at least 1.0",
    "training_cost_of_retrieval_against_flops": "at most 1.15",
    "generation_cost_of_retrieval": "at most 1.3",
    "position_2000_against_200": "at most 1.6",
    "position_2000_against_200_without_retrieval": "at most 1.6",
}

# --- what is measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """What all parts share."""

    model: ModelConfig
    batch: int
    seq_len: int
    repetitions: int
    threads: int
    peer_python: str | None
    index: Path | None
    cpu_seconds: bool

    @property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.cpu_seconds else time.perf_counter

    @property
    def alone(self) -> ModelConfig:
        """The decoder without retrieval."""
        return dataclasses.replace(self.model, cca_layers=())


def interleaved(runs: dict[str, Callable[[], float]], repetitions: int, *, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each; rounds before the repetitions are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(warm_up + repetitions):
        for name, run in runs.items():
            taken = run()
            if round_ >= warm_up:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(action: Callable[[], object], clock: Callable[[], float]) -> Callable[[], float]:
    def run() -> float:
        started = clock()
        action()
        return clock() - started

    return run


@cache
def texts() -> list[str]:
    with lzma.open(examples_folder() / CORPUS, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@cache
def tokenizer(vocab_size: int) -> Tokenizer:
    return Tokenizer.train(texts(), vocab_size)


def real_ids(vocab_size: int, count: int) -> list[int]:
    """Tokens of the bundled corpus."""
    ids = [i for text in texts()[:200] for i in tokenizer(vocab_size).encode(text).ids.tolist()]
    return (ids * (count // len(ids) + 1))[:count]


def network(config: ModelConfig) -> Retro:
    return Retro(config).initialize(torch.Generator().manual_seed(0))


def batch(setting: Setting, *, neighbors: bool, documents: int = 0) -> dict[str, Tensor]:
    """Input of a training step; with `documents`, of as many chunks each, as training data gives it."""
    B, T, M, V = setting.batch, setting.seq_len, setting.model.chunk_len, setting.model.vocab_size
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, V, (B, T + 1), generator=generator)
    every = torch.ones(B, T, dtype=torch.bool)
    tensors = {"inputs_BT": ids[:, :-1].contiguous(), "targets_BT": ids[:, 1:].contiguous(), "loss_BT": every}
    if neighbors:
        tensors["neighbors_BLKR"] = torch.randint(1, V, (B, T // M, K, R), generator=generator)
        tensors["keep_BLKR"] = torch.ones(B, T // M, K, R, dtype=torch.bool)
    if documents:
        tensors["document_BL"] = (torch.arange(T // M) // documents).expand(B, -1).contiguous()
        tensors["keep_BT"] = every
    return tensors


def stepper(setting: Setting, model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """One training step of a network."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.train()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return timed(step, setting.clock)


def our_step(setting: Setting, model: Retro, tensors: dict[str, Tensor]) -> Callable[[], float]:
    return stepper(setting, model, lambda: model(**tensors) / tensors["loss_BT"].numel())


class Stub:
    """The same passages for every query, at once."""

    def __init__(self, text: str) -> None:
        self.passage = Passage(row=0, key="", title="", url="", text=text, continuation="", score=0.0, metadata="")

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        return [[self.passage] * k for _ in queries]


class RealQueries:
    """Asks a retriever for passages to real text instead of what a random network wrote, and adds up how long that takes."""

    def __init__(self, inner: Retriever, clock: Callable[[], float]) -> None:
        self.inner, self.clock = inner, clock
        self.seconds = 0.0
        self.searches = 0
        self._texts = itertools.cycle(text[:300] for text in texts())

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        started = self.clock()
        asked = [next(self._texts) for _ in queries]
        found = self.inner.retrieve(asked, k, role=role, exclude=exclude, where=where)
        self.seconds += self.clock() - started
        self.searches += len(queries)
        return found


def continuation(model: Retro, prompt: int, new_tokens: int, retriever: Retriever | None) -> None:
    """Continues a prompt of so many tokens by exactly `new_tokens`."""
    V = model.config.vocab_size
    config = GenerateConfig(max_new_tokens=new_tokens, num_neighbors=K if retriever is not None else 0, neighbor_len=R)
    result = generate(model, tokenizer(V), [Prompt(real_ids(V, prompt))], config, retriever=retriever)[0]
    if len(result.ids) != new_tokens:
        raise RuntimeError(f"generation ended after {len(result.ids)} of {new_tokens} tokens")


# --- a, b: retro-pytorch ------------------------------------------------------------------------------------------


class Peer:
    """retro_pytorch_peer.py in its own environment; idle but while it is asked."""

    def __init__(self, setting: Setting, new_tokens: int) -> None:
        V = setting.model.vocab_size
        sizes = dataclasses.asdict(setting.model) | {
            "batch": setting.batch,
            "seq_len": setting.seq_len,
            "num_neighbors": K,
            "neighbor_len": R,
            "threads": setting.threads,
            "cpu_seconds": setting.cpu_seconds,
            "new_tokens": new_tokens,
            "prompt": [min(i + 200, V - 1) for i in real_ids(V, PROMPT)],  # clear of its special tokens
            "found": [real_ids(V, R)] * K,
        }
        script = Path(__file__).with_name("retro_pytorch_peer.py")
        self.process = subprocess.Popen(
            [str(setting.peer_python), str(script), json.dumps(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )
        self.about = self._answer()

    def seconds(self, command: str) -> float:
        _stream(self.process.stdin).write(command + "\n")
        _stream(self.process.stdin).flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        _stream(self.process.stdin).close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        line = _stream(self.process.stdout).readline()
        if not line:
            raise RuntimeError("the peer stopped; its message stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _stream(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("the process has no pipe")
    return stream


def train_peer(setting: Setting) -> dict[str, Any]:
    peer = Peer(setting, 0)
    model = network(setting.model)
    seconds = interleaved(
        {
            "ours": our_step(setting, model, batch(setting, neighbors=True)),
            "retro_pytorch": lambda: peer.seconds("step"),
            "ours_with_documents": our_step(setting, model, batch(setting, neighbors=True, documents=5)),
        },
        setting.repetitions,
    )
    peer.close()
    return {
        "training_against_retro_pytorch": seconds["retro_pytorch"] / seconds["ours"],
        "training_with_documents_against_retro_pytorch": seconds["retro_pytorch"] / seconds["ours_with_documents"],
        "seconds_per_step": seconds,
        "parameters": {"ours": sum(p.numel() for p in model.parameters()), "retro_pytorch": peer.about["parameters"]},
        "versions": peer.about["versions"],
    }


def generate_peer(setting: Setting, new_tokens: int = 512) -> dict[str, Any]:
    peer = Peer(setting, new_tokens)
    model = network(setting.model).lay_out_for_decoding()
    V = setting.model.vocab_size
    stub = Stub(tokenizer(V).decode(real_ids(V, R)))
    seconds = interleaved(
        {
            "ours": timed(lambda: continuation(model, PROMPT, new_tokens, stub), setting.clock),
            "retro_pytorch": lambda: peer.seconds("generate"),
        },
        min(setting.repetitions, 3),
        warm_up=0,  # minutes each
    )
    peer.close()
    return {
        "generation_against_retro_pytorch": seconds["retro_pytorch"] / seconds["ours"],
        "tokens": new_tokens,
        "seconds_of_generation": seconds,
    }


# --- c: GPT-2 -----------------------------------------------------------------------------------------------------


def gpt2(setting: Setting) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    new_tokens = 256
    config = setting.alone
    torch.manual_seed(0)
    theirs: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=max(setting.seq_len, PROMPT + new_tokens),
            n_embd=config.dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_inner=config.ffw_dim,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    theirs.set_attn_implementation("sdpa")
    ours = network(config)
    tensors = batch(setting, neighbors=False)
    training = interleaved(
        {
            "ours": our_step(setting, ours, tensors),
            "gpt2": stepper(
                setting,
                theirs,
                # `labels` are shifted by one inside; the number of predictions differs by one of a sequence's.
                lambda: theirs(input_ids=tensors["inputs_BT"], labels=tensors["inputs_BT"], use_cache=False).loss,
            ),
            "ours_with_documents": our_step(setting, ours, batch(setting, neighbors=False, documents=5)),
        },
        setting.repetitions,
    )
    prompt = torch.tensor([real_ids(config.vocab_size, PROMPT)])

    ours.lay_out_for_decoding()

    def their_continuation() -> None:
        theirs.eval()
        out = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
        if out.shape[1] != PROMPT + new_tokens:
            raise RuntimeError(f"GPT-2 ended after {out.shape[1] - PROMPT} of {new_tokens} tokens")

    generation = interleaved(
        {
            "ours": timed(lambda: continuation(ours, PROMPT, new_tokens, None), setting.clock),
            "gpt2": timed(their_continuation, setting.clock),
        },
        setting.repetitions,
    )
    tokens = setting.batch * setting.seq_len
    return {
        "training_against_gpt2": training["gpt2"] / training["ours"],
        "training_with_documents_against_gpt2": training["gpt2"] / training["ours_with_documents"],
        "generation_against_gpt2": generation["gpt2"] / generation["ours"],
        "training_tokens_per_s": {name: tokens / seconds for name, seconds in training.items()},
        "generated_tokens_per_s": {name: new_tokens / seconds for name, seconds in generation.items()},
        "parameters": {
            "ours": sum(p.numel() for p in ours.parameters()),
            "gpt2": sum(p.numel() for p in theirs.parameters()),
        },
    }


# --- d: what retrieval costs --------------------------------------------------------------------------------------


def step_flops(model: Retro, tensors: dict[str, Tensor]) -> int:
    """Of forward and backward. The kernels for CPUs are unknown to the counter, hence plain attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**tensors).backward()
    model.zero_grad(set_to_none=True)
    flops: int = counter.get_total_flops()
    return flops


def retrieval_cost(setting: Setting) -> dict[str, Any]:
    full, alone = network(setting.model), network(setting.alone)
    full_batch, alone_batch = batch(setting, neighbors=True), batch(setting, neighbors=False)
    flops = {"with": step_flops(full, full_batch), "without": step_flops(alone, alone_batch)}
    seconds = interleaved(
        {"with": our_step(setting, full, full_batch), "without": our_step(setting, alone, alone_batch)},
        setting.repetitions,
    )
    predicted, measured = flops["with"] / flops["without"], seconds["with"] / seconds["without"]
    report: dict[str, Any] = {
        "training_cost_of_retrieval_against_flops": measured / predicted,
        "training_cost_of_retrieval": measured,
        "predicted_by_flops": predicted,
        "flops_per_step": flops,
        "flops_per_s": {name: flops[name] / seconds[name] for name in flops},
        "seconds_per_step": seconds,
    }
    if setting.index is not None:
        report |= search_cost(setting, setting.index, full.lay_out_for_decoding(), alone.lay_out_for_decoding())
    return report


def search_cost(setting: Setting, folder: Path, full: Retro, alone: Retro) -> dict[str, Any]:
    from index_builder.search import IndexRetriever

    new_tokens = 256
    opened = IndexRetriever.open(folder)
    searching = RealQueries(opened, setting.clock)
    seconds = interleaved(
        {
            "with": timed(lambda: continuation(full, PROMPT, new_tokens, searching), setting.clock),
            "without": timed(lambda: continuation(alone, PROMPT, new_tokens, None), setting.clock),
        },
        setting.repetitions,
    )
    return {
        "generation_cost_of_retrieval": seconds["with"] / seconds["without"],
        "seconds_per_generated_token": {name: value / new_tokens for name, value in seconds.items()},
        "seconds_per_search": searching.seconds / searching.searches,
        "searches_per_token": searching.searches / (setting.repetitions + 1) / new_tokens,
        "chunks_of_the_index": opened.snapshot().store.num_live_chunks,
    }


# --- e: by position -----------------------------------------------------------------------------------------------


class Decoding:
    """A model's passes of single tokens, without what comes before them."""

    def __init__(self, setting: Setting, model: Retro, start: int, retriever: Retriever | None) -> None:
        self.model, self.start, self.retriever, self.clock = model, start, retriever, setting.clock
        self.count = model.config.chunk_len
        """Tokens that are fed: a whole chunk, so that one of them ends it and retrieves."""

    def seconds_per_token(self, profiler: profile | None = None) -> float:
        started: list[float] = []

        def note(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments[0].shape[1] == 1 and not started:  # x [B, T, D]
                if profiler is not None:
                    profiler.start()
                started.append(self.clock())

        hook = self.model.layers[0].register_forward_pre_hook(note)
        continuation(self.model, self.start, self.count + 1, self.retriever)
        seconds = self.clock() - started[0]
        if profiler is not None:
            profiler.stop()
        hook.remove()
        return seconds / self.count

    def profile(self) -> dict[str, float]:
        """Seconds per token inside operations, by their kind. Attention holds CCA too, which is the same at every position."""
        profiler = profile(activities=[ProfilerActivity.CPU])
        self.seconds_per_token(profiler)
        kinds = dict.fromkeys(("attention", "products", "other"), 0.0)
        for event in profiler.key_averages():
            name = event.key
            kind = "other"
            if "scaled_dot_product" in name:
                kind = "attention"
            elif name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::mv", "aten::addmv"):
                kind = "products"
            kinds[kind] += event.self_cpu_time_total * 1e-6 / self.count
        return kinds


def position(setting: Setting) -> dict[str, Any]:
    V, M = setting.model.vocab_size, setting.model.chunk_len
    stub = Stub(tokenizer(V).decode(real_ids(V, R)))
    report: dict[str, Any] = {}
    for suffix, config, retriever in (("", setting.model, stub), ("_without_retrieval", setting.alone, None)):
        model = network(config).lay_out_for_decoding()
        decodings = {str(place): Decoding(setting, model, place // M * M, retriever) for place in (200, 2000)}
        seconds = interleaved(
            {name: decoding.seconds_per_token for name, decoding in decodings.items()}, setting.repetitions
        )
        kinds = {name: decoding.profile() for name, decoding in decodings.items()}
        report |= {
            f"position_2000_against_200{suffix}": seconds["2000"] / seconds["200"],
            f"seconds_per_token{suffix}": seconds,
            **{f"profiled_seconds_per_token_at_{name}{suffix}": value for name, value in kinds.items()},
            f"profiled_difference_in_seconds{suffix}": {
                kind: kinds["2000"][kind] - kinds["200"][kind] for kind in kinds["200"]
            },
        }
    return report


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "a": train_peer,
    "b": generate_peer,
    "c": gpt2,
    "d": retrieval_cost,
    "e": position,
}


def show(report: dict[str, Any]) -> None:
    for key, value in report.items():
        text = str(value)
        if isinstance(value, dict):
            text = ", ".join(f"{k} {f'{v:,.4g}' if isinstance(v, float) else v}" for k, v in value.items())
        elif isinstance(value, float):
            text = f"{value:,.3f}" + (f"   wanted: {WANTED[key]}" if key in WANTED else "")
        print(f"{key:60} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts, as in a,c; all that can run without it")
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a training step")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="count the process's, for a busy machine and one thread"
    )
    parser.add_argument("--peer-python", help="python of an environment with retro-pytorch, for a and b")
    parser.add_argument("--index", type=Path, help="index that d searches; without it d measures training only")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    parts = (
        arguments.only.split(",") if arguments.only else [p for p in PARTS if arguments.peer_python or p not in "ab"]
    )
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only {unknown[0]}: there are {', '.join(PARTS)}")
    if arguments.peer_python is None and not set(parts).isdisjoint("ab"):
        parser.error("a and b need --peer-python")
    torch.set_num_threads(arguments.threads)
    setting = Setting(
        model=PRESETS[arguments.preset].model,
        batch=arguments.batch,
        seq_len=arguments.seq_len,
        repetitions=arguments.repetitions,
        threads=arguments.threads,
        peer_python=arguments.peer_python,
        index=arguments.index,
        cpu_seconds=arguments.cpu_seconds,
    )
    report: dict[str, Any] = {
        "preset": arguments.preset,
        "batch": arguments.batch,
        "seq_len": arguments.seq_len,
        "threads": arguments.threads,
        "clock": "CPU seconds" if arguments.cpu_seconds else "seconds",
        "torch": torch.__version__,
    }
    if not arguments.json:
        show(report)
    for part in parts:
        measured = PARTS[part](setting)
        report[part] = measured
        if not arguments.json:
            print(f"\n{part}")
            show(measured)
    if arguments.json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
