"""Training: `train`, which makes a model's folder of the steps, with checkpoints and validation.

A run that was interrupted, killed or asked for more steps goes on from its newest checkpoint when it is started again. On the CPU
it then ends with the same weights, bit for bit, as if it had never stopped: the batches and the learning rate are functions of
the step's number, and nothing else is random.

Under torchrun several processes (ranks) train one model together: each takes its part of every batch, in the order of the ranks, so
that the data of a step and its loss are the same however many there are. Only the first rank writes and reports.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch

from retro import artifact
from retro.chat import save_template
from retro.checkpoint import (
    KIND,
    TrainingState,
    find_best,
    load_best,
    load_training,
    prune_training,
    save_best,
    save_model,
    save_tensors,
    save_training,
)
from retro.config import RunConfig, TrainConfig, config_to_dict
from retro.costs import device_peak_flops
from retro.data import Batch, Batches, Retrieval, prefetched
from retro.distributed import joined, rank_device, whole_state
from retro.errors import ConfigError, TrainingError
from retro.metrics import METRICS, Course, Lines, Metrics, read_lines
from retro.mixture import Mixture
from retro.model import Retro
from retro.question_batches import Curriculum, QuestionBatches, Reading, WithReplay
from retro.samples import SAMPLES, SamplePrompt
from retro.train_setup import Setup, open_batches, open_question_batches, opened_data, resolve_device, setup
from retro.train_step import (
    ElsewhereError,
    StepResult,
    evaluate_answers,
    evaluate_loss,
    learning_rate,
    train_step,
    utilization,
)

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """What a progress bar shows after a step."""

    step: int
    """Steps done."""
    steps: int
    """Steps in all."""
    loss_nats: float
    """Of this step's batch, per token."""
    tokens_per_s: float
    """Since the last line of the metrics."""


def train(run: RunConfig, *, overwrite: bool = False, progress: Callable[[Progress], None] | None = None) -> Path:
    """Trains a model, or goes on with it, and returns its folder; under torchrun together with the other processes.

    Args:
        run: Network and training; `model.vocab_size` gives way to that of the data's tokenizer.
        overwrite: Start again, whatever the folder holds of an earlier run.
        progress: Called after every step, on the first rank.

    Raises:
        ConfigError: Settings that cannot work, or that differ from those the run was begun with (but for `CHANGEABLE`).
        FormatError, MismatchError: Of the training data, or of what the folder holds.
        TrainingError: Loss or gradient is not finite: the step was not made, and its batch is saved. Or another rank was lost.
        KeyboardInterrupt: After SIGINT or SIGTERM, when the step is finished and saved.
        SystemExit: On the ranks that need not report the error that another one reports.
    """
    config = run.train
    out = Path(config.out)
    with (
        joined(rank_device(config.device, resolve_device), timeout_s=config.timeout_s) as ranks,
        contextlib.ExitStack() as stack,
    ):
        parts = ranks.together(lambda: setup(run, ranks))

        def begin() -> bool:
            stack.enter_context(artifact.writing(out))
            return artifact.begin(out, KIND, parts.recipe, overwrite=overwrite)

        finished = ranks.on_first(begin)
        ranks.together(lambda: _check_shared(out))
        state = load_training(out, parts.model, parts.optimizer, ranks) or TrainingState()
        metrics = ranks.on_first(lambda: _opened(parts, out, state, finished=finished))
        if metrics is None:
            logger.info("%s is finished: %d steps", out, state.step)
            return out
        stack.callback(metrics.close)
        with _interrupts() as interrupted, _explained_memory(config):
            state = _steps(parts, out, state, metrics, progress if ranks.is_first else None, interrupted)
            _complete(parts, out, state, metrics)
    return out


@contextlib.contextmanager
def _explained_memory(config: TrainConfig) -> Iterator[None]:
    """Says what to lower where a GPU's memory is not enough."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = max(config.micro_batch_size // 2, 1)
        first = f"lower train.micro_batch_size (now {config.micro_batch_size}; {smaller} gives the same steps)"
        ways = [first] if config.micro_batch_size > 1 else []
        ways += [] if config.activation_checkpointing else ["set train.activation_checkpointing=true"]
        ways += [f"lower train.seq_len ({config.seq_len}) or train.num_neighbors ({config.num_neighbors})"]
        raise TrainingError(
            f"the GPU has too little memory: {', or '.join(ways)}, or train on more GPUs with torchrun; the newest checkpoint "
            f"is kept, so that the run goes on. ({str(error).splitlines()[0]})"
        ) from error


def _check_shared(out: Path) -> None:
    """The first rank has just put something there."""
    if not any((out / name).is_file() for name in (artifact.UNFINISHED, artifact.MANIFEST)):
        raise ConfigError(f"{out} is not the same folder on all machines: give a train.out that they share")


def _opened(parts: Setup, out: Path, state: TrainingState, *, finished: bool) -> Metrics | None:
    """Makes the folder ready for more steps; None where there are none to be made."""
    steps = parts.run.train.steps
    if state.step > steps:
        raise ConfigError(f"{out} has had {state.step} steps already: set train.steps to that or more")
    if finished and (state.step == steps or _is_exhausted(parts, out)):
        return None
    if finished:  # more steps are asked for
        artifact.reopen(out, KIND, parts.recipe)
    if state.step:
        logger.info("going on with %s after step %d of %d", out, state.step, steps)
    return Metrics(
        out,
        state.step,
        tensorboard=parts.run.train.tensorboard,
        wandb_project=parts.run.train.wandb_project,
        settings=config_to_dict(parts.run),
    )


def _is_exhausted(parts: Setup, out: Path) -> bool:
    return Course(read_lines(out / METRICS), _deciding_loss(parts)).exhausted(parts.run.train.patience)


def _steps(
    parts: Setup,
    out: Path,
    state: TrainingState,
    metrics: Metrics,
    progress: Callable[[Progress], None] | None,
    interrupted: Callable[[], bool],
) -> TrainingState:
    """Trains from `state` to the last step, or until patience ends. All ranks go through it alike; the first one writes."""
    config, ranks = parts.run.train, parts.ranks
    validation = _Validation(parts, out, state, metrics)
    begun, done = time.monotonic(), state
    meter = _Meter()
    on_gpu = parts.device.type == "cuda"
    while state.step < config.steps and not validation.course.exhausted(config.patience):
        # Batches are not prepared beyond an evaluation, which may decide how they are made.
        end = min((state.step // config.eval_every + 1) * config.eval_every, config.steps)
        coming = _batches_after(parts, state, end, validation.curriculum)
        with prefetched(coming, depth=config.prefetch, pin=on_gpu) as batches:
            for step, batch in enumerate(batches, state.step + 1):
                rate = learning_rate(config, step)
                result = _guarded_step(parts, out, batch, step, rate)
                state = TrainingState(
                    step=step,
                    sequence=state.sequence + config.batch_size,
                    tokens=state.tokens + result.tokens,
                    seconds=done.seconds + time.monotonic() - begun,
                )
                meter.add(result.tokens)
                if progress is not None:
                    progress(Progress(step, config.steps, result.loss_nats, meter.tokens_per_s))
                last, stop = step == config.steps, ranks.any(interrupted())
                if last or step % config.log_every == 0:
                    if ranks.is_first:
                        metrics.append(_record(parts, state, batch, result, rate, meter))
                    meter = _Meter()
                if last or step % config.eval_every == 0:
                    validation.look(step)
                    meter = _Meter()
                ended = last or validation.course.exhausted(config.patience)
                if ended or stop or step % config.save_every == 0:
                    save_training(out, parts.model, parts.optimizer, state, keep=config.keep_checkpoints, ranks=ranks)
                    meter = _Meter()
                if stop:
                    raise KeyboardInterrupt
    if state.step < config.steps:
        logger.info(
            "the validation loss has not fallen for %d evaluations: training ends", validation.course.since_best
        )
    return state


def _batches_after(parts: Setup, state: TrainingState, end: int, curriculum: Curriculum) -> Iterator[Batch]:
    """This rank's parts of the batches of the steps to come, up to the step `end`."""
    config, batches = parts.run.train, parts.batches
    for step in range(state.step + 1, end + 1):
        if isinstance(batches, (QuestionBatches, WithReplay)):
            batches.reading = curriculum.reading(step)
        sequence = state.sequence + (step - state.step - 1) * config.batch_size
        yield batches.batch(
            *parts.ranks.part(sequence, config.batch_size),
            neighbor_dropout=config.neighbor_dropout,
            copy_share=config.copy_share_at(step),
        )


def _guarded_step(parts: Setup, out: Path, batch: Batch, step: int, rate: float) -> StepResult:
    """`train_step`; where it refuses, the batch is saved for whoever looks for the reason: by the rank whose loss is not finite."""
    config, ranks = parts.run.train, parts.ranks

    def refuse(error: TrainingError) -> None:
        if isinstance(error, ElsewhereError):
            return
        path = out / f"failed-batch-{step:08d}{f'-rank-{ranks.rank}' if ranks.size > 1 else ''}.safetensors"
        save_tensors(path, batch.tensors())
        raise TrainingError(
            f"step {step}: {error}. The step was not made and its batch is in {path}. "
            "Mostly the learning rate is too high: lower train.learning_rate and start again with --overwrite"
        ) from error

    if config.dropout:  # what a step drops does not hang on where the run began
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, ranks.rank]).generate_state(1)[0]))
    try:
        return train_step(
            parts.model,
            parts.optimizer,
            batch,
            micro_batch_size=_micro_batch_size(parts, batch),
            rate=rate,
            grad_clip=config.grad_clip,
            dtype=parts.dtype,
            ranks=ranks,
        )
    except TrainingError as error:
        refused = error
    ranks.together(lambda: refuse(refused))
    raise refused


def _micro_batch_size(parts: Setup, batch: Batch) -> int:
    """Sequences of one forward pass; of text among questions fewer, as they are longer."""
    config, M = parts.run.train, parts.run.model.chunk_len
    is_text = batch.slot_BT is None and batch.inputs_BT.shape[1] == config.seq_len
    if not parts.questions or not is_text:
        return config.micro_batch_size
    return max(1, config.micro_batch_size * 2 * M // config.seq_len)


class _Validation:
    """What is done at every evaluation, and what it decides."""

    def __init__(self, parts: Setup, out: Path, state: TrainingState, metrics: Metrics) -> None:
        config, ranks = parts.run.train, parts.ranks
        self._parts, self._out, self._metrics = parts, out, metrics
        self._held_out = _open_held_out(parts, "valid")
        self.course = ranks.on_first(lambda: Course(metrics.lines(), _deciding_loss(parts)))
        self.curriculum = ranks.on_first(lambda: Curriculum(config, metrics.lines()))
        self._asked = _open_asked(parts, "valid")
        self._prompt: SamplePrompt | None = None
        if config.sample_tokens and self._held_out:
            self._prompt = SamplePrompt.choose(next(iter(self._held_out.values())))
        if self._prompt is not None:
            self._samples = ranks.on_first(lambda: Lines(out / SAMPLES, state.step))

    def look(self, step: int) -> None:
        """Measures the losses, keeps the best weights, writes a sample, draws the plot."""
        parts, config, ranks = self._parts, self._parts.run.train, self._parts.ranks
        if self._held_out or self._asked:
            record: dict[str, Any] = {"step": step}
            if self._asked is None:
                record |= _evaluated(parts, self._held_out, "valid", config.eval_sequences)
            else:
                passages = self.curriculum.reading(step).num_passages
                record |= _answered(parts, self._asked, "valid", config.eval_sequences, passages)
                self.curriculum.add(record)
            if ranks.is_first:
                self._metrics.append(record)
            if self.course.add(record) and config.keeps_best:
                weights = whole_state(parts.model, ranks)
                ranks.on_first(lambda: save_best(self._out, weights, step))
        if self._prompt is not None:
            sample = self._sampled(self._prompt)
            if sample is not None:
                self._samples.append({"step": step, **sample})
                logger.info("sample: %r goes on %r", sample["prompt"][-80:], sample["continuation"])
        if ranks.is_first:
            self._metrics.draw()

    def _sampled(self, prompt: SamplePrompt) -> dict[str, Any] | None:
        """A sample of the network as it is; None on all ranks but the first, which puts the network together for it."""
        parts, model = self._parts, self._parts.model
        if parts.ranks.size > 1 and parts.run.base is not None:
            return None  # no rank has the base
        if parts.ranks.size > 1:
            weights = whole_state(model, parts.ranks)
            if not parts.ranks.is_first:
                return None
            model = Retro(parts.run.model)
            model.load_state_dict(weights)
            model.to(parts.device)
        eager = torch.compiler.set_stance("force_eager") if parts.run.train.compile else contextlib.nullcontext()
        with eager:
            return prompt.sample(model, next(iter(self._held_out.values())), parts.run.train.sample_tokens)


def _deciding_loss(parts: Setup) -> str:
    """Key of the validation loss that early stopping and the best model go by."""
    return f"valid_loss_{'on' if parts.run.model.cca_layers else 'off'}_nats"


def _open_asked(parts: Setup, split: str) -> QuestionBatches | None:
    """The questions of a split; None where text is trained on, or there are none."""
    if not any(len(data.questions(split)) for data in parts.questions):
        if parts.questions:
            logger.warning("there is no question in the split %s: nothing is measured on it", split)
        return None
    return open_question_batches(parts.questions, split, parts.run)


def _answered(parts: Setup, asked: QuestionBatches, split: str, count: int, passages: int) -> dict[str, float]:
    """How questions of a split are answered with the most passages, evidence among them (on), without any (off), and with those of
    another question (shuffled); where fewer are trained with at present, also with that many."""
    config = parts.run.train
    options: dict[str, Any] = {"count": count, "batch_size": config.micro_batch_size, "dtype": parts.dtype}
    most = config.passages[-1] if parts.run.model.cca_layers else 0
    found: dict[str, float] = {}
    modes: tuple[Retrieval, ...] = get_args(Retrieval) if most else ("off",)
    for mode in modes:
        asked.reading = Reading(num_passages=max(most, 1))
        loss, right, questions = evaluate_answers(parts.model, asked, mode=mode, ranks=parts.ranks, **options)
        found |= {
            f"{split}_loss_{mode}_nats": loss,
            f"{split}_exact_match_{mode}": right,
            f"{split}_questions": questions,
        }
    found |= {"passages": passages, f"{split}_exact_match": found[f"{split}_exact_match_{modes[0]}"]}
    if 0 < passages < most:
        asked.reading = Reading(num_passages=passages)
        _, found[f"{split}_exact_match"], _ = evaluate_answers(
            parts.model, asked, mode="on", ranks=parts.ranks, **options
        )
    logger.info("%s", ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    return found


def _open_held_out(parts: Setup, split: str) -> dict[str, Batches]:
    """A split of the corpora that have documents in it, by their names."""
    held_out = {}
    for number, (name, data) in enumerate(parts.corpora.items()):
        if len(data.documents(split)) == 0:
            logger.warning("%s has no document in the split %s: its loss is not measured", data.folder, split)
        else:
            held_out[name] = open_batches(data, split, parts.run, number)
    return held_out


def _evaluated(parts: Setup, held_out: dict[str, Batches], split: str, sequences: int) -> dict[str, float]:
    """Losses of a split as metrics: the mean of the corpora by their shares, and of several also each one's own."""
    config = parts.run.train
    found = {
        name: evaluate_loss(
            parts.model,
            batches,
            sequences=sequences,
            batch_size=config.micro_batch_size,
            dtype=parts.dtype,
            ranks=parts.ranks,
        )
        for name, batches in held_out.items()
    }
    shares = parts.batches.shares if isinstance(parts.batches, Mixture) else [1.0]
    share = {name: share for name, share in zip(parts.corpora, shares, strict=True) if name in found}
    losses: dict[str, float] = {}
    for mode in next(iter(found.values())).loss_nats:
        mean = sum(share[name] * own.loss_nats[mode] for name, own in found.items()) / sum(share.values())
        losses[f"{split}_loss_{mode}_nats"] = mean
        if len(parts.corpora) > 1:
            losses |= {f"{split}_{name}_loss_{mode}_nats": own.loss_nats[mode] for name, own in found.items()}
    tokens = sum(own.tokens for own in found.values())
    logger.info("%s over %d tokens", ", ".join(f"{k} {v:.4f}" for k, v in losses.items()), tokens)
    return {**losses, f"{split}_tokens": tokens}


def _complete(parts: Setup, out: Path, state: TrainingState, metrics: Metrics) -> None:
    """Puts the best weights back where they are kept, measures the test loss and makes the folder a model."""
    best = parts.ranks.on_first(lambda: find_best(out)) if parts.run.train.keeps_best else None
    if best is not None:
        load_best(out, parts.model, best)
    figures: dict[str, Any] = {
        "data": ", ".join(data.folder.name for data in opened_data(parts.corpora, parts.questions)),
        "steps": state.step,
        "tokens": state.tokens,
        "epochs": state.sequence / parts.batches.sequences_per_epoch,
        "seconds": round(state.seconds, 3),
    }
    figures |= {} if best is None else {"best_step": best}
    for line in metrics.lines():  # the newest remain, of the validation those of the weights that are kept
        if best is None or line["step"] <= best:
            figures |= {key: value for key, value in line.items() if key.startswith("valid_")}
        if "loss_nats" in line and not parts.run.train.copies:  # of a model that was shown the answers, no figure
            figures["train_loss_nats"] = line["loss_nats"]
    test, asked = _open_held_out(parts, "test"), _open_asked(parts, "test")
    if test:
        figures |= _evaluated(parts, test, "test", 0)
    if asked is not None:
        figures |= _answered(parts, asked, "test", 0, parts.run.train.passages[-1])
    figures["settings"] = config_to_dict(parts.run.train)
    weights = whole_state(parts.model, parts.ranks)

    def write() -> None:
        metrics.close()
        prune_training(out, keep=1)
        save_template(out, parts.template)
        save_model(out, parts.model, parts.tokenizer, weights=weights, training=figures, recipe=parts.recipe)

    parts.ranks.on_first(write)
    logger.info(
        "%s is finished: %d steps, %s, %.0f tokens/s",
        out,
        state.step,
        ", ".join(f"{key} {value:.4f}" for key, value in figures.items() if key.endswith("_nats")),
        state.tokens / max(state.seconds, 1e-9),
    )


class _Meter:
    """How quick the steps are since it was made."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._tokens = self._steps = 0

    def add(self, tokens: int) -> None:
        """Counts a step that is done."""
        self._tokens += tokens
        self._steps += 1
        self._seconds = max(time.monotonic() - self._begun, 1e-9)

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._seconds

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self._seconds / self._steps


def _record(
    parts: Setup, state: TrainingState, batch: Batch, result: StepResult, rate: float, meter: _Meter
) -> dict[str, float]:
    """A step as metrics. Where `copy_share` is above 0, the loss counts sequences that were shown what they had to predict."""
    record = {
        "step": state.step,
        "loss_nats": result.loss_nats,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "tokens_per_s": round(meter.tokens_per_s, 1),
        "seconds": round(state.seconds, 3),
    }
    if parts.run.train.copies and batch.keep_BLKR is not None:
        record["copy_share"] = parts.run.train.copy_share_at(state.step)
    if parts.device.type == "cuda":
        record["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(parts.device)
        peak = device_peak_flops(torch.cuda.get_device_name(parts.device))
        # The seconds are those of several steps, which with replay are of two kinds.
        counted = parts.run.base is None and not parts.run.train.replay
        if peak is not None and parts.dtype == torch.bfloat16 and counted:
            record["mfu"] = utilization(parts.run, batch, meter.step_s, peak * parts.ranks.size)
    return record


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a question that can be asked between steps; a second signal interrupts at once.

    Python gives signals to the main thread only: in others nothing is changed.
    """
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        logger.warning("interrupted: finishing the step and saving; once more stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
