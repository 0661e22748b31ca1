"""Whole runs: what they write, how they are interrupted, killed and continued."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import typer
from builders import (
    CHUNK_LEN,
    ToyDocument,
    make_training_data,
    one_thread,
    random_training_data,
    toy_run,
    toy_tokenizer,
)
from commands import done
from torch.testing import assert_close

from retro.artifact import MANIFEST, read_manifest
from retro.checkpoint import KIND, TRAINING, WEIGHTS, load_model
from retro.cli import app
from retro.config import PRESETS, config_to_dict
from retro.data import Batch, Batches
from retro.errors import ConfigError, FormatError, TrainingError
from retro.metrics import METRICS, PLOT
from retro.model import Retro
from retro.train import Progress, train
from retro.train_setup import setup
from retro.train_step import train_step

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)
TIMING = ("tokens_per_s", "seconds")
SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_training_data(tmp_path_factory.mktemp("data") / "toy.data").folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted. Not to be altered."""
    return train(toy_run(data, tmp_path_factory.mktemp("models") / "whole.model"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records but for what depends on time."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def assert_same_training(folder: Path, expected: Path) -> None:
    assert (folder / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    assert metrics(folder) == metrics(expected)
    read_manifest(folder, KIND)


def at_step(step: int, action: Callable[[], object]) -> Callable[[Progress], None]:
    """A progress callback that does something once."""

    def callback(progress: Progress) -> None:
        if progress.step == step:
            action()

    return callback


# --- what a run does ----------------------------------------------------------------------------------------------


def test_a_model_learns_one_batch_by_heart(data: Path, tmp_path: Path) -> None:
    parts = setup(toy_run(data, tmp_path, model={"dim": 32, "encoder_dim": 32, "head_dim": 16, "ffw_dim": 128}))
    batch = parts.batches.batch(0, 1)
    for _ in range(300):
        result = train_step(
            parts.model, parts.optimizer, batch, micro_batch_size=1, rate=1e-2, grad_clip=1.0, dtype=torch.float32
        )
        if result.loss_nats < 0.1:
            return
    pytest.fail(f"the loss is still {result.loss_nats}")


def test_a_run_leaves_a_model_with_its_losses(whole: Path, data: Path) -> None:
    manifest = read_manifest(whole, KIND)
    state = [f"training/step-00000006/{n}" for n in (SHARD, "state.json")]
    configs = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    files = ["README.md", *configs, PLOT, METRICS, WEIGHTS, *state]
    assert sorted(manifest["files"]) == sorted(files)
    model, _, info = load_model(whole)
    figures = info["training"]
    for split in ("valid", "test"):
        for mode in ("on", "off", "shuffled"):
            assert 0 < figures[f"{split}_loss_{mode}_nats"] < 7
    assert figures["steps"] == 6
    assert figures["settings"]["data"] == str(data)
    final = safetensors.torch.load_file(whole / state[0])
    for name, tensor in model.state_dict().items():
        assert_close(tensor, final[f"weights/{name}"], rtol=0, atol=0)


def test_metrics_have_a_line_for_each_step_and_each_evaluation(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / METRICS).read_text().splitlines()]
    steps = [line for line in lines if "loss_nats" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]) == {"step", "loss_nats", "learning_rate", "grad_norm", "tokens_per_s", "seconds"}
    evaluations = [line for line in lines if "loss_nats" not in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    modes = ("on", "off", "shuffled")
    assert set(evaluations[0]) == {"step", "valid_tokens", *(f"valid_loss_{mode}_nats" for mode in modes)}


def test_progress_is_told_after_every_step(data: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    train(toy_run(data, tmp_path / "m", log_every=100), progress=told.append)
    assert [(p.step, p.steps) for p in told] == [(n, 6) for n in range(1, 7)]
    assert all(p.tokens_per_s > 0 and 0 < p.loss_nats < 7 for p in told)


def test_data_without_held_out_documents_trains_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = random_training_data(tmp_path / "d", counts={"train": 5})
    out = train(toy_run(data.folder, tmp_path / "m"))
    for split in ("valid", "test"):
        assert f"no document in the split {split}" in caplog.text
    assert not any("loss_on" in key for key in load_model(out)[2]["training"])


def test_a_run_works_outside_the_main_thread(data: Path, whole: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(toy_run(data, tmp_path / "m"),))
    thread.start()
    thread.join()
    assert_same_training(tmp_path / "m", whole)


# --- going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves_it(
    data: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = toy_run(data, tmp_path / "m", save_every=100)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=at_step(3, lambda: os.kill(os.getpid(), number)))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [p.name for p in (tmp_path / "m" / TRAINING).iterdir()] == ["step-00000003"]
    with pytest.raises(FormatError, match="interrupted"):
        load_model(tmp_path / "m")
    told: list[Progress] = []
    assert_same_training(train(run, progress=told.append), whole)
    assert [p.step for p in told] == [4, 5, 6]


def test_a_second_signal_stops_at_once(data: Path, whole: Path, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run = toy_run(data, tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=at_step(3, twice))
    assert [p.name for p in (tmp_path / "m" / TRAINING).iterdir()] == ["step-00000002"]
    assert_same_training(train(run), whole)


def test_a_damaged_newest_checkpoint_costs_steps_but_changes_nothing(
    data: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = toy_run(data, tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    newest = tmp_path / "m" / TRAINING / "step-00000005" / SHARD
    newest.write_bytes(newest.read_bytes()[:-8])
    told: list[Progress] = []
    assert_same_training(train(run, progress=told.append), whole)
    assert told[0].step == 5
    assert str(newest) in caplog.text


def test_a_finished_run_is_left_alone(data: Path, whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "m")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    train(toy_run(data, out, log_every=5, save_every=1, eval_every=2, eval_sequences=1, device="auto"))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before


def test_more_steps_go_on_from_a_finished_run_as_if_it_had_been_longer(data: Path, tmp_path: Path) -> None:
    constant: dict[str, Any] = {"learning_rate": 1e-3, "final_learning_rate": 1e-3, "eval_every": 4}
    long = train(toy_run(data, tmp_path / "long", steps=8, **constant))
    train(toy_run(data, tmp_path / "m", steps=4, **constant))
    moved = shutil.copytree(data, tmp_path / "moved.data")
    assert_same_training(train(toy_run(moved, tmp_path / "m", steps=8, **constant)), long)
    assert [p.name for p in (tmp_path / "m" / TRAINING).iterdir()] == ["step-00000008"]
    with pytest.raises(ConfigError, match=r"has had 8 steps already: set train\.steps to that or more"):
        train(toy_run(data, tmp_path / "m", steps=7, **constant))


def test_a_finished_model_that_trains_on_is_unfinished_until_it_is_done(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "m")
    run = toy_run(data, out, steps=9)
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(FormatError, match="interrupted"):
        load_model(out)
    train(run)
    assert load_model(out)[2]["training"]["steps"] == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, r"train\.learning_rate: 0\.001 -> 0\.5"),
        ({"batch_size": 8}, r"train\.batch_size: 4 -> 8"),
        ({"seed": 1}, r"train\.seed: 0 -> 1"),
        ({"final_copy_share": 0.5}, r"train\.final_copy_share: 0\.0 -> 0\.5"),
        ({"model": {"dim": 32, "encoder_dim": 32}}, r"model\.dim: 16 -> 32"),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    data: Path, whole: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    finished = shutil.copytree(whole, tmp_path / "finished")
    begun = tmp_path / "begun"
    with pytest.raises(KeyboardInterrupt):
        train(toy_run(data, begun), progress=at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    for out in (finished, begun):
        with pytest.raises(ConfigError, match=message):
            train(toy_run(data, out, **changes))
    assert (finished / MANIFEST).is_file()


def test_other_data_is_refused_and_overwrite_begins_again(data: Path, whole: Path, tmp_path: Path) -> None:
    other = random_training_data(tmp_path / "other.data", seed=1)
    out = shutil.copytree(whole, tmp_path / "m")
    with pytest.raises(ConfigError, match=r"made differently \(data: "):
        train(toy_run(other.folder, out))
    train(toy_run(other.folder, out), overwrite=True)
    assert metrics(out)[0] != metrics(whole)[0]
    assert_same_training(train(toy_run(data, out), overwrite=True), whole)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_batch(data: Path, tmp_path: Path) -> None:
    run = toy_run(data, tmp_path / "m", learning_rate=1e30, warmup_steps=3, save_every=1)
    with pytest.raises(TrainingError, match=r"step 2: the loss is .*failed-batch-00000002\.safetensors") as caught:
        train(run)
    assert "learning_rate" in str(caught.value)
    batch = safetensors.torch.load_file(tmp_path / "m" / "failed-batch-00000002.safetensors")
    assert_close(batch, setup(run).batches.batch(4, 4, neighbor_dropout=0.25).tensors(), rtol=0, atol=0)
    assert [p.name for p in (tmp_path / "m" / TRAINING).iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    "changes", [{"micro_batch_size": 2}, {"micro_batch_size": 1, "activation_checkpointing": True}]
)
def test_a_gpu_without_memory_says_which_setting_to_lower(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore that nobody reads")

    monkeypatch.setattr(Retro, "forward", full)
    with pytest.raises(TrainingError, match=r"too little memory") as caught:
        train(toy_run(data, tmp_path / "m", **changes))
    message = str(caught.value)
    assert ("micro_batch_size (now 2; 1 gives the same steps)" in message) == (changes["micro_batch_size"] == 2)
    assert ("activation_checkpointing" in message) == ("activation_checkpointing" not in changes)
    assert "train.seq_len" in message
    assert message.endswith("Tried to allocate 2.00 GiB.)")


# --- dropout ------------------------------------------------------------------------------------------------------


def test_a_run_with_dropout_goes_on_exactly_and_leaves_none_in_the_model(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    dropped = train(toy_run(data, tmp_path / "dropped", dropout=0.3))
    assert [line.get("loss_nats") for line in metrics(dropped)] != [line.get("loss_nats") for line in metrics(whole)]
    run = toy_run(data, tmp_path / "m", save_every=100, dropout=0.3)
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    torch.rand(5)  # another state of the global generator
    assert_same_training(train(run), dropped)
    model, _, _ = load_model(dropped)
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))


# --- copied neighbors ---------------------------------------------------------------------------------------------

COPYING: dict[str, Any] = {"copy_share": 0.7, "final_copy_share": 0.1}


def test_a_run_that_copies_goes_on_exactly_and_says_how_much_it_copies(data: Path, whole: Path, tmp_path: Path) -> None:
    copied = train(toy_run(data, tmp_path / "copied", **COPYING))
    run = toy_run(data, tmp_path / "m", save_every=100, **COPYING)
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert_same_training(train(run), copied)
    shares = [line["copy_share"] for line in metrics(copied) if "loss_nats" in line]
    assert shares == pytest.approx([0.7, 0.58, 0.46, 0.34, 0.22, 0.1], rel=1e-12)
    assert not any("copy_share" in line for line in metrics(whole))
    assert (copied / WEIGHTS).read_bytes() != (whole / WEIGHTS).read_bytes()


def test_every_step_is_made_with_its_own_share(data: Path, tmp_path: Path) -> None:
    still: dict[str, Any] = {"learning_rate": 1e-12, "final_learning_rate": 1e-12}  # the weights remain what they are
    run = toy_run(data, tmp_path / "m", copy_share=0.0, final_copy_share=0.7, steps=12, eval_every=5, **still)
    parts = setup(run)
    losses: list[float] = []
    for share in [run.train.copy_share_at(step) for step in range(1, 13)] + [0.7] * 12:
        batch = parts.batches.batch(4 * (len(losses) % 12), 4, neighbor_dropout=0.25, copy_share=share)
        with torch.no_grad():
            losses.append(parts.model(**batch.tensors()).item() / int(batch.loss_BT.sum()))
    recorded = [line["loss_nats"] for line in metrics(train(run)) if "loss_nats" in line]
    assert recorded == pytest.approx(losses[:12], rel=1e-6)
    assert losses[:12] != pytest.approx(losses[12:], rel=1e-6), "with the wrong share nothing would differ"


def test_the_training_loss_of_a_run_that_copies_is_no_figure_of_the_model(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    copied = train(toy_run(data, tmp_path / "m", **COPYING))
    for folder, claimed in ((whole, True), (copied, False)):
        assert ("train_loss_nats" in load_model(folder)[2]["training"]) == claimed
        assert ("train loss" in (folder / "README.md").read_text()) == claimed
        assert "| valid loss on |" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_a_model_learns_to_copy_what_nothing_but_its_neighbors_can_tell(tmp_path: Path) -> None:
    """Documents of random tokens: without the copies nobody can be better than the entropy of one, whatever is learned.

    Copies begin at a random place: one that always begins with its chunk is copied by counting, and a shifted one is then read
    worse than none (9.7 nats where the training of this test gives 0.14).
    """
    vocab, steps, size = 66, 400, 16
    bound_nats = math.log(vocab - 2)
    generator = np.random.default_rng(0)
    neighbors = generator.integers(2, vocab, (500, 2 * CHUNK_LEN)).tolist()
    documents = [  # BOS and 31 tokens: a sequence each
        ToyDocument(generator.integers(2, vocab, 31).tolist(), generator.integers(500, size=(4, 1)).tolist())
        for _ in range((steps + 8) * size)
    ]
    sizes = {
        "dim": 64,
        "encoder_dim": 64,
        "head_dim": 32,
        "encoder_head_dim": 32,
        "ffw_dim": 128,
        "encoder_ffw_dim": 128,
    }
    room = 3 * CHUNK_LEN  # for all of the continuation, however the copy is shifted
    run = toy_run(
        make_training_data(tmp_path / "d", documents, neighbors, neighbor_len=room).folder,
        tmp_path / "m",
        model={**sizes, "num_layers": 3, "cca_layers": (2, 3), "encoder_layers": 2},
        num_neighbors=1,
        neighbor_len=room,
        neighbor_dropout=0.0,
        copy_share=1.0,
    )
    parts = setup(run)
    assert isinstance(parts.batches, Batches)
    assert parts.batches.sequences_per_epoch == (steps + 8) * size, "what is measured must not have been trained on"
    for step in range(steps):
        shown = parts.batches.batch(step * size, size, copy_share=1.0)
        rate = 5e-3 * min((step + 1) / 30, 1, max((steps - step) / (0.3 * steps), 0.1))
        train_step(
            parts.model, parts.optimizer, shown, micro_batch_size=size, rate=rate, grad_clip=1.0, dtype=torch.float32
        )
    usual, copied = (
        seeing_loss(parts.model, parts.batches.batch(steps * size, 8 * size, copy_share=share)) for share in (0.0, 1.0)
    )
    assert usual > bound_nats - 0.1, "something else than the copies tells the tokens"
    assert copied < 0.2 * bound_nats


def seeing_loss(model: Retro, batch: Batch) -> float:
    """Nats per token, over those that see a neighbor, the ends of documents left out."""
    assert batch.keep_BLKR is not None
    with torch.no_grad():
        hidden_BTD = model.eval().hidden(
            batch.inputs_BT,
            keep_BT=batch.keep_BT,
            document_BL=batch.document_BL,
            neighbors_BLKR=batch.neighbors_BLKR,
            keep_BLKR=batch.keep_BLKR,
        )
        logits_BTV = model.logits(hidden_BTD)
    has_BL = batch.keep_BLKR.flatten(2).any(dim=2)
    sees_BT = has_BL.repeat_interleave(CHUNK_LEN, dim=1).roll(CHUNK_LEN - 1, dims=1)
    sees_BT[:, : CHUNK_LEN - 1] = False
    document_BT = batch.document_BL.repeat_interleave(CHUNK_LEN, dim=1)
    sees_BT &= (document_BT == document_BT.roll(CHUNK_LEN - 1, dims=1)) & batch.loss_BT
    sees_BT &= batch.targets_BT != toy_tokenizer().eos_id
    return float(F.cross_entropy(logits_BTV[sees_BT].double(), batch.targets_BT[sees_BT]))


# --- recipes ------------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_recipe_of_small_differs_from_its_baseline_by_retrieval_only() -> None:
    small, baseline = (
        json.loads(done("train", EXAMPLES / name, "--print-config").out)
        for name in ("small.toml", "small_baseline.toml")
    )
    assert small["train"]["batch_size"] * small["train"]["seq_len"] == 262_144
    assert (small["train"]["copy_share"], small["train"]["final_copy_share"]) == (0.25, 0.05)
    assert small["model"] == config_to_dict(PRESETS["small"].model)
    assert baseline["model"] == {**small["model"], "cca_layers": []}
    apart = {key for key in small["train"] if small["train"][key] != baseline["train"][key]}
    assert apart == {"out", "copy_share", "final_copy_share"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_the_commands_in_a_recipe_are_commands(path: Path) -> None:
    comments = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    lines = [line for line in "\n".join(comments).replace("\\\n", " ").splitlines() if line.startswith("retro ")]
    assert lines
    for line in lines:
        command: Any = typer.main.get_command(app)
        name, *words = shlex.split(line)
        while isinstance(command, click.Group):
            name, *words = words
            command = command.get_command(click.Context(command), name)
            assert command is not None, line
        command.make_context(name, words)  # raises a UsageError for what is wrong
    others = "\n".join(other.read_text(encoding="utf-8") for other in EXAMPLES.glob("*.toml"))
    made = set(re.findall(r"--out (\S+)", others))
    read = tomllib.loads(path.read_text(encoding="utf-8"))["train"]["data"]
    missing = {read} - made if isinstance(read, str) else set(read) - made
    assert not missing, "the data is made by no command"


# --- killed -------------------------------------------------------------------------------------------------------

# One process imports everything and forks a child for each run, which may die. A single thread, so that forking is safe.
HARNESS = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from builders import toy_run
from retro.model import Retro
from retro.train import train

torch.set_num_threads(1)

def child(job, out, kill_after_s=None, kill_at=None):
    # Runs until it is done, or killed after a time, or before it touches the disk for the kill_at-th time.
    pid = os.fork()
    if pid == 0:
        touched = 0
        def hook(event, arguments):
            nonlocal touched
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(out) in str(arguments[0]):
                touched += 1
                if touched == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        code = 1
        try:
            train(toy_run(Path(job["data"]), Path(out), **job["changes"]), progress=lambda _: time.sleep(job["pause_s"]))
            code = 0
        finally:
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

jobs = json.load(sys.stdin)
# What is imported and cached on first use need not be so again in every child.
train(toy_run(Path(jobs[0]["data"]), Path(jobs[0]["out"] + ".first"), steps=1))
for job in jobs:
    for kill in job["kills"]:
        print(json.dumps(child(job, job["out"], **kill)), flush=True)
"""


def run_killed(jobs: list[dict[str, Any]]) -> list[int]:
    """How each child of each job ended, as waitpid tells it."""
    tests = Path(__file__).resolve().parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
def test_a_run_killed_at_random_times_ends_with_the_same_weights(data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 40, "save_every": 3, "eval_every": 20}
    expected = train(toy_run(data, tmp_path / "whole", **changes))
    job = {"data": str(data), "out": str(tmp_path / "m"), "changes": changes, "pause_s": 0.05}
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    times = (0.1 + 0.5 * torch.rand(3, generator=generator)).tolist()
    kills: list[dict[str, Any]] = [{"kill_after_s": time} for time in times]
    ends = run_killed([{**job, "kills": [*kills, {}]}])
    # 40 pauses are longer than the three times together, but on a busy machine a sleep may take longer than it should.
    assert ends[0] == signal.SIGKILL, times
    assert set(ends[1:-1]) <= {signal.SIGKILL, 0}, times
    assert ends[-1] == 0, times
    assert_same_training(tmp_path / "m", expected)


@pytest.mark.slow
def test_a_run_killed_wherever_it_touches_the_disk_ends_with_the_same_weights(data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 5, "save_every": 2, "eval_every": 100, "log_every": 2}
    expected = train(toy_run(data, tmp_path / "whole", **changes))
    jobs = [
        {
            "data": str(data),
            "out": str(tmp_path / f"m{at}"),
            "changes": changes,
            "pause_s": 0.0,
            "kills": [{"kill_at": at}, {}],
        }
        for at in range(1, 120, 3)
    ]
    ends = run_killed(jobs)
    killed, resumed = ends[::2], ends[1::2]
    assert set(resumed) == {0}
    assert set(killed) == {signal.SIGKILL, 0}, "a run must have fewer places to be killed at than are tried"
    for job in jobs:
        assert_same_training(Path(str(job["out"])), expected)
