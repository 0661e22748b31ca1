"""Training on several ranks: any number gives the same losses, goes on from what any number saved, and ends together.

The ranks are processes on this machine's CPU that talk over gloo. Where torchrun itself plays a part they are its own; else they
are forked from one process that has imported everything once.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from builders import one_thread, random_training_data, toy_run
from torch.testing import assert_close

from retro.artifact import read_manifest
from retro.checkpoint import KIND, TRAINING, WEIGHTS, load_model
from retro.config import config_to_dict
from retro.metrics import METRICS
from retro.train import train
from retro.train_setup import setup

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)
pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parent.parent
STEPS = 12
CHANGES: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 8,
    "eval_every": 5,
    "eval_sequences": 5,  # divisible neither by the ranks nor by their batches
    "save_every": 4,
    "neighbor_dropout": 0.8,  # many parts of a batch have no neighbors at all
    "timeout_s": 60.0,
}

# One process for each rank. `act` is Python that is run after each step, where `p` is the Progress.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from builders import toy_run
from retro.errors import RetroError
from retro.train import train
import retro.train

torch.set_num_threads(1)
job = json.loads(sys.argv[1])
rank = int(os.environ.get("RANK", "0"))
real = retro.train.train_step

def acting(model, optimizer, batch, **options):
    acting.step += 1
    step = acting.step
    exec(job["before"])
    result = real(model, optimizer, batch, **options)
    exec(job["after"])
    return result

acting.step = 0
retro.train.train_step = acting
try:
    train(toy_run(Path(job["data"]), Path(job["out"]), **job["changes"]))
except RetroError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(1)
except KeyboardInterrupt:
    print(f"rank {rank} stopped after step {acting.step}", file=sys.stderr)
    sys.exit(130)
"""


# Reads launches, a line each: ranks, environment, worker, job, file for stderr; answers with the ranks' exit codes.
LAUNCHER = """
import json, os, sys, traceback
import builders, retro.train, torch, torch.distributed.checkpoint, torch.distributed.fsdp

torch.set_num_threads(1)

def rank(launch, number):
    os.dup2(os.open(launch["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ.update(launch["environment"] | {"RANK": str(number), "LOCAL_RANK": str(number)})
    sys.argv = ["worker", launch["job"]]
    try:
        exec(launch["worker"], {"__name__": "__main__"})
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    launch = json.loads(line)
    pids = []
    for number in range(launch["ranks"]):
        if not (pid := os.fork()):
            code = rank(launch, number)
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    sys.stdout.write(json.dumps(codes) + "\\n")
    sys.stdout.flush()
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent)))}
LONGEST_S = 240
"""Ranks are done long before they would give each other up by default."""


def described(data: Path, out: Path, *, before: str = "", after: str = "", **changes: Any) -> str:
    return json.dumps(
        {"data": str(data), "out": str(out), "changes": CHANGES | changes, "before": before, "after": after}
    )


def torchrun(ranks: int, data: Path, out: Path, **options: Any) -> tuple[int, str]:
    """Exit code and stderr of torchrun and all ranks."""
    worker = out.with_suffix(".py")
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    process = subprocess.Popen(
        [*command, str(worker), described(data, out, **options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        _, err = process.communicate(timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        process.communicate(timeout=60)
        raise
    return process.returncode, err


class Launcher:
    """A process that forks ranks."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
        )

    def run(self, ranks: int, data: Path, out: Path, **options: Any) -> tuple[list[int], str]:
        """Exit codes and stderr of all ranks."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        err = out.with_suffix(".err")
        err.write_text("")
        launch = {
            "ranks": ranks,
            "environment": {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            "worker": WORKER,
            "job": described(data, out, **options),
            "err": str(err),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(launch) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], LONGEST_S)[0]:
            self.close()
            pytest.fail(f"{ranks} ranks are not done after {LONGEST_S} s: {err.read_text()}")
        codes: list[int] = json.loads(self.process.stdout.readline())
        return codes, err.read_text()

    def finished(self, ranks: int, data: Path, out: Path, **options: Any) -> Path:
        codes, err = self.run(ranks, data, out, **options)
        assert codes == [0] * ranks, err
        read_manifest(out, KIND)
        return out

    def close(self) -> None:
        """Ends it and whatever it has forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    made = Launcher()
    yield made
    made.close()


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k in ("step", "grad_norm") or k.endswith(("_nats", "_tokens"))}
        for line in lines
    ]


def assert_same_losses(folder: Path, expected: Path) -> None:
    ours, theirs = losses(folder), losses(expected)
    assert [sorted(line) for line in ours] == [sorted(line) for line in theirs]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for found, line in zip(ours, theirs, strict=True):
        assert found == pytest.approx(line, rel=1e-5), line["step"]
    figures, wanted = load_model(folder)[2]["training"], load_model(expected)[2]["training"]
    assert figures["tokens"] == wanted["tokens"]
    for key in wanted:
        if key.endswith("_nats"):
            assert figures[key] == pytest.approx(wanted[key], rel=1e-5), key
    # AdamW makes of a gradient near zero, of which only the rounding differs, a step of up to the learning rate, 1e-3.
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    assert_close(weights, safetensors.torch.load_file(expected / WEIGHTS), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_training_data(
        tmp_path_factory.mktemp("data") / "toy.data", counts={"train": 24, "valid": 5, "test": 3}
    ).folder


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in one process without torchrun. Not to be altered."""
    return train(toy_run(data, tmp_path_factory.mktemp("models") / "alone.model", **CHANGES))


def test_the_training_has_parts_without_neighbors_beside_parts_with_them(data: Path, tmp_path: Path) -> None:
    batches = setup(toy_run(data, tmp_path, **CHANGES)).batches
    kinds = set()
    for step in range(STEPS):
        batch = batches.batch(8 * step, 8, neighbor_dropout=CHANGES["neighbor_dropout"])
        kinds.add(tuple(bool(part.keep_BLKR.any()) for part in batch.split(4) if part.keep_BLKR is not None))
    assert {(True, False), (False, True)} <= kinds


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_gives_the_same_losses(
    ranks: int, data: Path, alone: Path, launcher: Launcher, tmp_path: Path
) -> None:
    out = launcher.finished(ranks, data, tmp_path / "m")
    assert_same_losses(out, alone)
    shards = sorted(path.name for path in (out / TRAINING / f"step-{STEPS:08d}").glob("*.safetensors"))
    assert shards == [f"shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in range(1, ranks + 1)]


def test_training_goes_on_with_another_number_of_ranks(
    data: Path, alone: Path, launcher: Launcher, tmp_path: Path
) -> None:
    stop = "import os, signal\nif step == {} and rank == {}: os.kill(os.getpid(), signal.SIGTERM)"
    out = tmp_path / "m"
    for ranks, steps, at, done in ((1, 3, 0, 3), (2, 3, 1, 6), (4, 3, 2, 9)):
        codes, err = launcher.run(ranks, data, out, after=stop.format(steps, at))
        assert codes == [130] * ranks
        assert err.count("stopped after step 3") == ranks, err
        assert max(path.name for path in (out / TRAINING).iterdir()) == f"step-{done:08d}"
    assert_same_losses(launcher.finished(1, data, out), alone)


@pytest.mark.parametrize(
    "model",
    [
        {
            "positions": "relative",
            "tie_embeddings": False,
            "encoder_dim": 24,
            "encoder_layers": 2,
            "num_layers": 3,
            "cca_layers": (2, 3),
        },
        {"encoder": "bert", "encoder_layers": 2, "num_layers": 3, "cca_layers": (1, 3)},
    ],
    ids=["relative-untied", "bert"],
)
def test_other_networks_with_checkpointed_activations(
    model: dict[str, Any], data: Path, launcher: Launcher, tmp_path: Path
) -> None:
    expected = train(toy_run(data, tmp_path / "alone", **CHANGES, model=model))
    out = launcher.finished(2, data, tmp_path / "m", model=model, activation_checkpointing=True)
    assert_same_losses(out, expected)


def test_a_frozen_decoder_stays_as_it_is_on_two_ranks(data: Path, launcher: Launcher, tmp_path: Path) -> None:
    plain = train(toy_run(data, tmp_path / "plain", model={"cca_layers": ()}, steps=2))
    options: dict[str, Any] = {"init": str(plain), "freeze_decoder": True}
    expected = train(toy_run(data, tmp_path / "alone", **CHANGES, **options))
    out = launcher.finished(2, data, tmp_path / "m", **options)
    assert_same_losses(out, expected)
    fitted = safetensors.torch.load_file(out / WEIGHTS)
    for name, weight in safetensors.torch.load_file(plain / WEIGHTS).items():
        assert_close(fitted[name], weight, rtol=0, atol=0)


def test_bfloat16_is_that_of_one_rank(data: Path, launcher: Launcher, tmp_path: Path) -> None:
    expected = losses(train(toy_run(data, tmp_path / "alone", **CHANGES | {"precision": "bfloat16"})))
    found = losses(launcher.finished(2, data, tmp_path / "m", precision="bfloat16"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_loss_that_is_not_finite_is_reported_once_and_keeps_the_batch_of_its_rank(
    data: Path, launcher: Launcher, tmp_path: Path
) -> None:
    out = tmp_path / "m"
    poison = "if step == 3 and rank == 1: model.register_forward_hook(lambda *_: _[2] * float('nan'))"
    codes, err = launcher.run(2, data, out, before=poison)
    assert all(codes)
    assert err.count("TrainingError") == 1, err
    assert "TrainingError: step 3: the loss is nan" in err
    assert [path.name for path in out.glob("failed-batch*")] == ["failed-batch-00000003-rank-1.safetensors"]
    batch = safetensors.torch.load_file(out / "failed-batch-00000003-rank-1.safetensors")
    expected = setup(toy_run(data, out, **CHANGES)).batches.batch(2 * 8 + 4, 4, neighbor_dropout=0.8)
    assert_close(batch, expected.tensors(), rtol=0, atol=0)


def test_a_rank_that_is_killed_ends_the_others(data: Path, alone: Path, tmp_path: Path) -> None:
    code, err = torchrun(
        2, data, tmp_path / "m", before="if step == 6 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert code != 0
    assert "rank 0 has lost the others" in err
    code, err = torchrun(2, data, tmp_path / "m")
    assert code == 0, err
    assert_same_losses(tmp_path / "m", alone)


def test_a_rank_that_does_not_answer_is_given_up_in_time(data: Path, tmp_path: Path) -> None:
    code, err = torchrun(2, data, tmp_path / "m", before="if step == 3 and rank == 1: time.sleep(600)", timeout_s=5.0)
    assert code != 0
    assert "rank 0 has lost the others" in err
    assert "5 s (train.timeout_s)" in err


def test_a_batch_that_cannot_be_divided_is_an_error_with_the_numbers_told_once(
    data: Path, launcher: Launcher, tmp_path: Path
) -> None:
    for ranks, changes, message in (
        (2, {"batch_size": 8, "micro_batch_size": 8}, "2 ranks x micro_batch_size = 8: set train.micro_batch_size=4"),
        (3, {"batch_size": 8}, "take a number of ranks that divides batch_size"),
    ):
        codes, err = launcher.run(ranks, data, tmp_path / "m", **changes)
        assert all(codes)
        assert err.count("ConfigError") == 1, err
        assert message in err


def test_the_command_trains_on_two_ranks_and_only_the_first_one_speaks(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "toy.toml"
    lines = []
    for table, values in config_to_dict(toy_run(data, tmp_path / "m", **CHANGES | {"steps": 2})).items():
        if values is not None:
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    config.write_text("\n".join(lines))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--standalone",
            "-m",
            "retro",
            "train",
            str(config),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained for 2 steps") == 1
    assert done.stderr.count("is finished: 2 steps") == 1
