"""The bundled model on a GPU machine: pretraining, its baseline, cloze questions, questions; each one command within its minutes.

    python benchmarks/gpu_answers.py pretrain /tmp/retro --minutes 8
    python benchmarks/gpu_answers.py baseline /tmp/retro --minutes 8
    python benchmarks/gpu_answers.py check /tmp/retro --data core.held_out.data
    python benchmarks/gpu_answers.py cloze /tmp/retro --minutes 8 --replay replay.data
    python benchmarks/gpu_answers.py questions /tmp/retro --minutes 8 --data wiki.questions squad.questions cloze.questions

The recipes are examples/small.toml, small_baseline.toml, small_cloze.toml and small_qa.toml; data and models lie in the store, the
folder that is named, under the names in these files. A few steps are timed first: where the recipe's number of them does not fit
into the minutes, fewer are made, and the learning rate's schedule is that of this number. A run that is not finished when its
minutes are over is saved; the same command goes on with it.

cloze ends with its gates: exact match with all passages at least 0.60, with those of other questions at most 0.05. questions does
not begin where they failed (--anyway does).

check: bits per byte of held-out documents for the two models: all tokens, and those that can see neighbors (these at the bytes of
an average token), with 95% intervals (paired bootstrap over sequences).

Results go to --out (default $OUT) as STAGE.json, with the lines of metrics.jsonl; weights are sent by gpu_transfer.py. `--set
train.KEY=VALUE` changes a recipe. `--device cpu --preset tiny --steps 3` rehearses all of it.

THE LEASES, each line one command there, all with `export PYTHONPATH=. PYTHONUNBUFFERED=1` in front. Pieces are made here before, by
gpu_transfer.py pack, and `carry` names one of them in each of the first commands; "receive" is

    python3 benchmarks/gpu_transfer.py receive .gpu /tmp/retro

A  here: gpu_corpus.py prepare; pack .gpu simple.jsonl.xz=.. core.jsonl.xz=.. small.tok=.. minilm=.gpu-made/minilm
   near.npy=.gpu-made/near.npy: 180 MiB, 4 pieces
   1-3  receive                                                                                     1 minute each at most
   4    receive && gpu_corpus.py make /tmp/retro --corpora simple core --held-out core              4 to 6 minutes
   5    gpu_answers.py pretrain /tmp/retro --minutes 8;
        gpu_transfer.py send /tmp/retro/small.model --weights int8                                  9 minutes at most
   6    gpu_answers.py baseline /tmp/retro --minutes 5 --check core.held_out.data;
        gpu_transfer.py send /tmp/retro/core.neighbors.npy                                          6 minutes at most
   7    gpu_transfer.py send /tmp/retro/small.model --weights bfloat16, and --group 1 in one more   1 minute
   8    gpu_transfer.py send /tmp/retro/replay.data, and with what is left simple.neighbors.npy     1 minute
B  here: pack .gpu cloze.questions=.. wiki.questions=.. squad.questions=.. small.model=.. replay.data=..: by the number of cloze
   questions 4 to 6 pieces
   1-5  receive
   6    receive && gpu_answers.py cloze /tmp/retro --minutes 8 --replay replay.data                 9 minutes
   7    gpu_answers.py questions /tmp/retro --minutes 8;
        gpu_transfer.py send /tmp/retro/small_qa.model --weights int8                               9 minutes
   8    gpu_transfer.py send /tmp/retro/small_qa.model --weights bfloat16, and --group 1            1 minute

The minutes are estimates (a quarter of the peak for training). Where the tables, NAME.neighbors.npy, are carried in another lease,
nothing is encoded or searched, and of minilm only tokenizer.json is needed.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.metrics import paired_bootstrap
from retro.artifact import read_json, write_json
from retro.checkpoint import load_model
from retro.chunks import TrainingData
from retro.config import RunConfig, config_to_dict, load_run_config
from retro.data import Batch, Batches, Retrieval
from retro.errors import ConfigError, RetroError
from retro.metrics import METRICS, read_lines
from retro.train import Progress, train
from retro.train_setup import resolve_device, resolve_precision

RECIPES = {
    "pretrain": "small.toml",
    "baseline": "small_baseline.toml",
    "cloze": "small_cloze.toml",
    "questions": "small_qa.toml",
}
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TIMED, UNTIMED = 20, 5
"""Steps of the trial, and those of them that warm up."""
RESERVE = 0.15
"""Share of the time for evaluations, checkpoints and the final test."""
RESERVE_S = 30.0
"""Seconds besides, for opening and writing."""
AT_LEAST, AT_MOST = 0.60, 0.05
"""Gates of cloze: exact match with all passages, and with those of other questions."""


class _Enough(Exception):  # noqa: N818 - ends a trial, it is no error
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A training and its limits."""

    name: str
    store: Path
    run: RunConfig
    minutes: float
    steps: int | None
    """Instead of a trial."""

    @property
    def out(self) -> Path:
        return Path(self.run.train.out)


def open_stage(asked: argparse.Namespace) -> Stage:
    """The recipe with the folders of the store, and what was asked for besides."""
    recipe = EXAMPLES / RECIPES[asked.stage]
    plain = load_run_config(recipe, [], preset=asked.preset)
    config, store = plain.train, asked.store
    data = asked.data or list(config.folders)
    replay = asked.replay or list(config.replay_folders)
    overrides = {
        "data": [str(store / name) for name in data],
        "out": str(store / config.out),
        "init": str(store / config.init) if config.init else "",
        "replay": [str(store / name) for name in replay if (store / name).is_dir()],
        "device": asked.device,
    }
    if asked.data and len(asked.data) != len(config.data_weights):
        overrides["data_weights"] = []
    settings = [f"train.{key}={json.dumps(value)}" for key, value in overrides.items()]
    run = load_run_config(recipe, [*settings, *asked.set], preset=asked.preset)
    return Stage(name=asked.stage, store=store, run=run, minutes=asked.minutes, steps=asked.steps)


# --- a training in its minutes ------------------------------------------------------------------------------------


def run_stage(stage: Stage, began: float) -> dict[str, Any]:
    """Trains, or goes on, until it is finished or the minutes are over."""
    chosen = stage.store / f"{stage.name}.steps.json"
    if not chosen.is_file():
        write_json(chosen, _choose(stage, began))
    plan = read_json(chosen)
    config = replace(
        stage.run.train, steps=plan["steps"], warmup_steps=min(stage.run.train.warmup_steps, plan["steps"] // 4)
    )
    deadline = began + 60 * stage.minutes
    interrupted = False

    def watch(_: Progress) -> None:
        nonlocal interrupted
        if time.monotonic() > deadline and not interrupted:
            interrupted = True
            signal.raise_signal(signal.SIGINT)  # the step is finished and saved

    finished = True
    try:
        train(replace(stage.run, train=config), progress=watch)
    except KeyboardInterrupt:
        if not interrupted:
            raise
        finished = False
    lines = list(read_lines(stage.out / METRICS))
    report: dict[str, Any] = {"stage": stage.name, "finished": finished, **plan, "settings": config_to_dict(config)}
    if finished:
        figures = read_json(stage.out / "config.json")["training"]
        report["figures"] = {key: value for key, value in figures.items() if key != "settings"}
    if torch.cuda.is_available():
        report["gpu"] = torch.cuda.get_device_name()
        report["memory_bytes"] = torch.cuda.max_memory_allocated()
    speeds = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
    report["median_tokens_per_s"] = float(np.median(speeds)) if speeds else None
    utilizations = [line["mfu"] for line in lines if "mfu" in line]
    report["median_mfu"] = float(np.median(utilizations)) if utilizations else None
    report["minutes"] = round((time.monotonic() - began) / 60, 2)
    return report | {"metrics": lines}


def _choose(stage: Stage, began: float) -> dict[str, Any]:
    """Steps that fit: by a trial of the slowest kind of step."""
    wanted = stage.run.train.steps
    if stage.steps is not None:
        return {"steps": stage.steps, "recipe_steps": wanted}
    step_s = _timed(stage)
    left = 60 * stage.minutes - (time.monotonic() - began) - RESERVE_S
    fitting = int((1 - RESERVE) * left / step_s)
    if fitting < 1:
        raise ConfigError(f"a step takes {step_s:.2f} s, and {left:.0f} s are left: give more --minutes")
    return {"steps": min(wanted, fitting), "recipe_steps": wanted, "fitting_steps": fitting, "step_s": step_s}


def _timed(stage: Stage) -> float:
    """Seconds of a step with as many passages as it will ever have."""
    out = stage.store / "trial.model"
    config = stage.run.train
    trial = replace(
        config,
        out=str(out),
        steps=10**6,
        warmup_steps=10,
        passages=config.passages[-1:],
        own_share=0.0,
        keep_best=False,
    )
    times: list[float] = []

    def note(done: Progress) -> None:
        times.append(time.monotonic())
        if done.step == TIMED:
            raise _Enough

    shutil.rmtree(out, ignore_errors=True)
    with contextlib.suppress(_Enough):
        train(replace(stage.run, train=trial), overwrite=True, progress=note)
    shutil.rmtree(out, ignore_errors=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return (times[-1] - times[UNTIMED - 1]) / (TIMED - UNTIMED)


def gates(stage: Stage) -> dict[str, Any]:
    """Whether the model has learned to read, by the test questions (or those of validation where there are none)."""
    path = stage.out / "config.json"
    if not path.is_file():
        raise ConfigError(f"{stage.out} is not finished: run cloze first")
    figures = read_json(path)["training"]
    split = "test" if "test_exact_match_on" in figures else "valid"
    right, shuffled = (float(figures[f"{split}_exact_match_{mode}"]) for mode in ("on", "shuffled"))
    return {
        "split": split,
        "exact_match": right,
        "exact_match_shuffled": shuffled,
        "passed": right >= AT_LEAST and shuffled <= AT_MOST,
    }


# --- bits per byte ------------------------------------------------------------------------------------------------


def check(
    model: Path, baseline: Path, data: TrainingData, device_name: str, split: str, seq_len: int
) -> dict[str, Any]:
    """Held-out losses of a model with retrieval on, off and shuffled, and of its baseline: all tokens, and those with neighbors."""
    device = resolve_device(device_name)
    dtype = resolve_precision("auto", device)
    losses: dict[str, np.ndarray[Any, Any]] = {}
    counted: np.ndarray[Any, Any] = np.empty(0)
    modes: tuple[Retrieval, ...] = ("on", "off", "shuffled")
    for name, folder, kinds in (("model", model, modes), ("baseline", baseline, modes[1:2])):
        if not folder.is_dir():
            continue
        network, tokenizer, info = load_model(folder, device)
        if tokenizer.fingerprint != data.tokenizer.fingerprint:
            raise ConfigError(f"{folder} and {data.folder} have different tokenizers")
        batches = Batches(
            data,
            split,
            seq_len=seq_len,
            num_neighbors=2,
            neighbor_len=min(info["neighbor_len"], data.neighbor_len),
            seed=0,
            permute=False,
        )
        for mode in kinds:
            label = name if name == "baseline" else f"{name} {mode}"
            losses[label], counted = _losses(network, batches, mode, device, dtype)
    bytes_per_token = _bytes_per_token(data, split)
    report: dict[str, Any] = {
        "split": split,
        "tokens": int(counted[:, 0].sum()),
        "tokens_with_neighbors": int(counted[:, 1].sum()),
    }
    for column, kind in enumerate(("all", "with_neighbors")):
        total = counted[:, column].sum() * bytes_per_token * math.log(2)
        if not total:
            continue
        report[kind] = {f"{label} bits_per_byte": float(x[:, column].sum() / total) for label, x in losses.items()}
        for other in ("baseline", "model off", "model shuffled"):
            if other in losses and "model on" in losses:
                found = paired_bootstrap(
                    losses["model on"][:, column],
                    losses[other][:, column],
                    counted[:, column] * bytes_per_token * math.log(2),
                )
                report[kind][f"on minus {other}"] = [found.value, found.low, found.high]
    return report


@torch.no_grad()
def _losses(
    network: Any, batches: Batches, mode: Retrieval, device: torch.device, dtype: torch.dtype
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Loss in nats and tokens of each sequence [N, 2]: of all tokens, and of those that can see neighbors."""
    found, counted = [], []
    for sequence in range(batches.sequences_per_epoch):
        on = batches.batch(sequence, 1)
        sees_BT = visible(on)
        batch = on if mode == "on" else batches.batch(sequence, 1, neighbors=mode)
        row, tokens = [], []
        for loss_BT in (batch.loss_BT, batch.loss_BT & sees_BT):
            tensors = replace(batch, loss_BT=loss_BT).to(device).tensors()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                row.append(float(network(**tensors)) if loss_BT.any() else 0.0)
            tokens.append(int(loss_BT.sum()))
        found.append(row)
        counted.append(tokens)
    return np.array(found), np.array(counted)


def visible(batch: Batch) -> Tensor:
    """Which slots see neighbors [B, T]: the last of a chunk that has some, and the others of the next one of the same document."""
    B, L = batch.document_BL.shape
    sees_BLM = torch.zeros(B, L, batch.inputs_BT.shape[1] // L, dtype=torch.bool)
    if batch.keep_BLKR is not None:
        has_BL = batch.keep_BLKR.flatten(2).any(dim=2)
        sees_BLM[:, :, -1] = has_BL
        same_BL = batch.document_BL[:, 1:] == batch.document_BL[:, :-1]
        sees_BLM[:, 1:, :-1] = (has_BL[:, :-1] & same_BL)[..., None]
    return sees_BLM.flatten(1)


def _bytes_per_token(data: TrainingData, split: str) -> float:
    documents = data.documents(split)
    tokens = (np.asarray(data.arrays.starts)[documents + 1] - np.asarray(data.arrays.starts)[documents]).sum()
    return float(np.asarray(data.arrays.num_bytes)[documents].sum() / tokens)


# --- all of it ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*RECIPES, "check"))
    parser.add_argument("store", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, help="instead of as many as fit")
    parser.add_argument("--data", nargs="+", help="folders in the store instead of the recipe's")
    parser.add_argument("--replay", nargs="+", help="likewise")
    parser.add_argument("--set", action="append", default=[], metavar="train.KEY=VALUE")
    parser.add_argument("--preset", help="sizes instead of the recipe's")
    parser.add_argument("--anyway", action="store_true", help="questions: although the gates of cloze failed")
    parser.add_argument("--check", help="afterwards: check on this data")
    parser.add_argument("--split", default="valid", help="check: of the data")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    asked = parser.parse_args(arguments)
    report: dict[str, Any] = {}
    failed = False
    if asked.stage != "check":
        if asked.stage == "questions" and not asked.anyway:
            found = gates(open_stage(argparse.Namespace(**vars(asked) | {"stage": "cloze", "data": None, "set": []})))
            if not found["passed"]:
                raise ConfigError(f"cloze did not pass its gates ({found}): find the bug, or say --anyway")
        stage = open_stage(asked)
        report = run_stage(stage, began)
        if asked.stage == "cloze" and report["finished"]:
            report["gates"] = gates(stage)
            failed = not report["gates"]["passed"]
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json(asked.out / f"{asked.stage}.json", report)  # whatever becomes of the check
    if asked.stage == "check" or asked.check:
        folder = asked.store / (asked.check or (asked.data or ["core.held_out.data"])[0])
        models = [asked.store / load_run_config(EXAMPLES / RECIPES[s], []).train.out for s in ("pretrain", "baseline")]
        seq_len = load_run_config(
            EXAMPLES / RECIPES["pretrain"], asked.set if asked.stage == "check" else []
        ).train.seq_len
        report["check"] = check(models[0], models[1], TrainingData(folder), asked.device, asked.split, seq_len)
        write_json(asked.out / f"{asked.stage}.json", report)
    print(json.dumps({key: value for key, value in report.items() if key not in ("metrics", "settings")}, indent=2))
    if failed:
        sys.exit("the gates failed: do not go on with questions")


if __name__ == "__main__":
    try:
        main()
    except RetroError as error:
        sys.exit(f"error: {error}")
