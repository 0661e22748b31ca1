"""What a budget of training buys, before anything is started: compute-optimal sizes, the nearest preset, steps, memory, hours.

All of it is arithmetic on data sheets; `dry_run` times real steps. What cannot work is refused with the number that is missing.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from retro.config import PRESETS, RunConfig
from retro.costs import GPUS, Flops, Memory, forward_flops, parameter_counts, training_flops, training_memory
from retro.errors import ConfigError

# --- compute-optimal sizes ------------------------------------------------------------------------------------------


class Optimum(NamedTuple):
    """Where a budget is best spent."""

    parameters: float
    """N."""
    tokens: float
    """D."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingLaw:
    """Loss of a decoder with N parameters after D tokens: E + A / N**alpha + B / D**beta, in nats a token.

    Training takes 6 N D FLOPs. Source: arXiv:2203.15556, section 3.3 and appendix D.3.
    """

    floor: float
    """E: of a perfect model."""
    a: float
    b: float
    alpha: float
    beta: float
    source: str

    def loss_nats(self, parameters: float, tokens: float) -> float:
        return self.floor + self.a * math.pow(parameters, -self.alpha) + self.b * math.pow(tokens, -self.beta)

    def optimum(self, flops: float) -> Optimum:
        """The sizes of least loss for a budget: equation 4 of the paper."""
        scale = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        product = flops / 6
        parameters = scale * product ** (self.beta / (self.alpha + self.beta))
        return Optimum(parameters, product / parameters)


LAWS = {
    "besiroglu": ScalingLaw(
        floor=1.8172, a=482.01, b=2085.43, alpha=0.3478, beta=0.3658, source="fitted again (arXiv:2404.10102)"
    ),
    "hoffmann": ScalingLaw(
        floor=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28, source="approach 3 as printed (arXiv:2203.15556)"
    ),
}
"""The first is the default: fitted to the same runs, it agrees with the paper's other two approaches and with Chinchilla itself;
the printed numbers (rounded, of a fit that stopped early) ask for half the parameters."""
FITTED = (7e7, 1.6e10)
"""Parameters of the models that the laws are fitted to."""
TOKENS_PER_PARAMETER = 20
"""What approaches 1 and 2 of Hoffmann et al. come to."""


def twenty_tokens_per_parameter(flops: float) -> Optimum:
    """The sizes of a budget by the rule of thumb."""
    parameters = math.sqrt(flops / (6 * TOKENS_PER_PARAMETER))
    return Optimum(parameters, TOKENS_PER_PARAMETER * parameters)


# --- the plan of a budget -------------------------------------------------------------------------------------------

GPU_RESERVE = 3 << 30
"""Bytes of a GPU for CUDA itself, for libraries and for gaps between arrays; assumed."""


class Fit(NamedTuple):
    """A way to fit training into a GPU."""

    micro_batch_size: int
    checkpointing: bool
    memory: Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """What a budget buys."""

    flops: float
    """Of all training, as model FLOPs."""
    basis: str
    """Where they come from."""
    optima: dict[str, Optimum]
    """By each law, the default first."""
    preset: str
    run: RunConfig
    decoder_parameters: int
    """N of the laws: what a token is multiplied with in the decoder, head included, retrieval not."""
    parameters: int
    """In all."""
    forward: Flops
    """Of a sequence."""
    tokens: int
    steps: int
    hours: float | None
    """None where no GPU was named."""
    gpus: int
    fit: Fit
    notes: tuple[str, ...]

    def report(self) -> dict[str, Any]:
        """Plain data, for people and programs."""
        train, memory = self.run.train, self.fit.memory
        chunks = self.tokens // self.run.model.chunk_len if self.forward.retrieval else 0
        (default, best), *others = self.optima.items()
        return {
            "flops": float(self.flops),
            "budget": self.basis,
            "optimal_parameters": round(best.parameters),
            "optimal_tokens": round(best.tokens),
            "law": default,
            "other_laws": {
                f"by_{name}": f"{_short(found.parameters)} parameters, {_short(found.tokens)} tokens"
                for name, found in others
            },
            "preset": self.preset,
            "parameters": self.parameters,
            "decoder_parameters": self.decoder_parameters,
            "flops_per_token": round(self.forward.total * 3 / train.seq_len),
            "retrieval_adds": share_added(self.forward),
            "tokens": self.tokens,
            "steps": self.steps,
            "batch_size": train.batch_size,
            "seq_len": train.seq_len,
            "chunks_to_look_up": chunks,
            "neighbors_to_find": chunks * train.num_neighbors,
            "micro_batch_size": self.fit.micro_batch_size,
            "checkpointing": "on" if self.fit.checkpointing else "off",
            "memory": memory_report(memory, "memory_bytes_per_gpu"),
            **({} if self.hours is None else {"hours": digits(self.hours)}),
            "notes": " ".join(self.notes),
        }


def plan_training(
    *,
    flops: float | None = None,
    hours: float | None = None,
    gpu: str | None = None,
    gpus: int = 1,
    utilization: float = 0.4,
    preset: str | None = None,
) -> TrainPlan:
    """Plans training for a budget of FLOPs, or of hours on some GPUs.

    Args:
        flops: The budget; or
        hours: of all GPUs together at work.
        gpu: A key of `costs.GPUS`; None asks neither for time nor for memory.
        gpus: How many; they share weights and optimizer (FSDP).
        utilization: Share of the peak that the model FLOPs are, assumed (MFU).
        preset: A key of PRESETS; None takes the one with retrieval whose decoder is nearest to the optimum.

    Raises:
        ConfigError: A name or number that cannot be; a budget below one step; a batch with fewer sequences than there are GPUs;
            a model that does not fit into the GPUs, with what is missing.
    """
    numbers = {"flops": flops, "hours": hours, "gpus": gpus, "mfu": utilization}
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} = {value}: give a number above 0")
    if utilization > 1:
        raise ConfigError(f"mfu = {utilization}: give a share of the peak, at most 1")
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"no data is known of the GPU {gpu!r}: use one of {', '.join(GPUS)}")
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; there are: {', '.join(PRESETS)}")
    budget, basis, per_hour = _budget(flops, hours, gpu, gpus, utilization)
    default = next(iter(LAWS.values()))
    best = default.optimum(budget)
    name = preset or min(
        (name for name, run in PRESETS.items() if run.model.cca_layers),
        key=lambda name: abs(math.log(_decoder_parameters(PRESETS[name]) / best.parameters)),
    )
    run = PRESETS[name]
    forward = mean_forward(run, 1 - run.train.neighbor_dropout)
    per_step = training_flops(forward) * run.train.batch_size
    if budget < per_step:
        raise ConfigError(
            f"one step of {name} takes {per_step:.3g} FLOPs, {budget:.3g} are there: {per_step - budget:.3g} are missing. "
            "Raise the budget, or take a smaller --preset"
        )
    steps = int(budget / per_step)
    tokens = steps * run.train.batch_size * run.train.seq_len
    parameters = _decoder_parameters(run)
    notes = [
        f"The law gives the optimum {default.loss_nats(*best):.3f} nats a token, the decoder of {name} after its tokens "
        f"{default.loss_nats(parameters, tokens):.3f} (of its authors' text, without retrieval)."
    ]
    if not FITTED[0] < best.parameters < FITTED[1] or not FITTED[0] < parameters < FITTED[1]:
        notes = [
            "The laws are fitted to models of 70 million to 16 billion parameters: beyond, they only point the way."
        ]
    if not 1 / 3 < parameters / best.parameters < 3:
        notes.append(f"The decoder of {name} has {parameters / best.parameters:.2g} times the optimal parameters.")
    if forward.retrieval:
        notes.append(
            "Retrieval costs more time than FLOPs: InstructRetro measured 27 to 37% more than without (arXiv:2310.07713)."
        )
    if gpu is not None:
        notes.append(f"An MFU of {utilization:.0%} is assumed: `retro train --dry-run` measures yours.")
    return TrainPlan(
        flops=budget,
        basis=basis,
        optima={
            **{law: found.optimum(budget) for law, found in LAWS.items()},
            "20_per_parameter": twenty_tokens_per_parameter(budget),
        },
        preset=name,
        run=run,
        decoder_parameters=parameters,
        parameters=parameter_counts(run.model).total,
        forward=forward,
        tokens=tokens,
        steps=steps,
        hours=None if per_hour is None else steps * per_step / per_hour,
        gpus=gpus,
        fit=_fitted(name, gpu, gpus),
        notes=tuple(notes),
    )


def _budget(
    flops: float | None, hours: float | None, gpu: str | None, gpus: int, utilization: float
) -> tuple[float, str, float | None]:
    """FLOPs, what they come from, and FLOPs in an hour."""
    if (flops is None) == (hours is None):
        raise ConfigError("give the budget either as --flops, or as --hours with --gpu and --gpus")
    per_hour = None if gpu is None else 3600 * gpus * GPUS[gpu].bf16_flops * utilization
    if hours is None:
        assert flops is not None
        return flops, "given", per_hour
    if gpu is None or per_hour is None:
        raise ConfigError(f"hours = {hours:g}: say of what with --gpu ({', '.join(GPUS)}) and --gpus")
    peak = GPUS[gpu].bf16_flops / 1e12
    return (
        hours * per_hour,
        f"{hours:g} hours of {gpus} x {gpu} at {utilization:.0%} of {peak:g} TFLOP/s each",
        per_hour,
    )


def _decoder_parameters(run: RunConfig) -> int:
    return parameter_counts(run.model).decoder + run.model.dim * run.model.vocab_size


def mean_forward(run: RunConfig, retrieving: float) -> Flops:
    """Of a sequence of the run, with the share of the chunks that have neighbors."""
    return forward_flops(
        run.model,
        seq_len=run.train.seq_len,
        num_neighbors=run.train.num_neighbors,
        neighbor_len=run.train.neighbor_len,
        retrieving=retrieving,
    )


def _fitted(name: str, gpu: str | None, gpus: int) -> Fit:
    """The largest micro batch that fits, with checkpointing only where not even one sequence fits without.

    Raises:
        ConfigError: Nothing fits, or some GPUs get no sequence of the batch.
    """
    run = PRESETS[name]
    batch = run.train.batch_size
    if batch % gpus:
        missing = -batch % gpus
        raise ConfigError(
            f"{gpus} GPUs cannot share the {batch} sequences of a batch of {name} equally: {missing} sequences are missing. "
            "Give a number of --gpus that divides them"
        )
    micro = math.gcd(run.train.micro_batch_size, batch // gpus)
    sizes = [size for size in range(micro, 0, -1) if micro % size == 0]
    if gpu is None:
        return Fit(micro, False, run_memory(run, micro, ranks=gpus))
    there = GPUS[gpu].memory - GPU_RESERVE
    for checkpointing in (False, True):
        for size in sizes:
            memory = run_memory(run, size, ranks=gpus, checkpointing=checkpointing)
            if memory.total <= there:
                return Fit(size, checkpointing, memory)
    raise ConfigError(
        f"{name} takes {format_bytes(memory.total)} on each of {gpus} {gpu}, one sequence at a time and with checkpointing, "
        f"{format_bytes(there)} are free there: {format_bytes(memory.total - there)} are missing. "
        "Give more --gpus, a larger --gpu, or a smaller --preset"
    )


def run_memory(
    run: RunConfig, micro_batch_size: int, *, ranks: int = 1, bfloat16: bool = True, checkpointing: bool = False
) -> Memory:
    """`training_memory` of a run."""
    return training_memory(
        run.model,
        micro_batch_size=micro_batch_size,
        seq_len=run.train.seq_len,
        num_neighbors=run.train.num_neighbors,
        neighbor_len=run.train.neighbor_len,
        bfloat16=bfloat16,
        ranks=ranks,
        checkpointing=checkpointing,
    )


def memory_report(memory: Memory, total: str) -> dict[str, int]:
    """Plain data, with the sum under a name."""
    return {f"{part}_bytes": size for part, size in asdict(memory).items()} | {total: memory.total}


def share_added(forward: Flops) -> str:
    """What neighbors add, in words."""
    return f"{forward.retrieval / forward.decoder:.1%} of the decoder's FLOPs"


def digits(value: float) -> float:
    """Three of them are all that such a figure has."""
    return round(value) if value >= 100 else float(f"{value:.3g}")


def _short(number: float) -> str:
    """As in 1.4T."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g}T"


def format_bytes(size: float) -> str:
    """As in 1.25 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} bytes" if unit == "bytes" else f"{size:,.2f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"
