"""The losses of 50 steps, kept in losses.json: whatever changes data, network, loss, optimizer or schedule shows here.

In the environment that wrote them they are reproduced bit for bit. Other processors and versions of PyTorch round differently,
and 50 steps make the differences grow, so that the test allows 1e-5 of the value. Where a change of the losses is meant, write
them anew and look at the difference:

    PYTHONPATH=tests:. python tests/golden/test_golden_losses.py tests/golden/losses.json
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
RELATIVE_TOLERANCE = 1e-5


def write_losses(path: Path) -> None:
    """Trains for 50 steps with one thread and writes training and validation losses."""
    import torch
    from builders import random_training_data, toy_run

    from retro.train import train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = random_training_data(place / "data", 0, counts={"train": 40, "valid": 8}, max_tokens=80, vocab=40)
        run = toy_run(
            data.folder,
            place / "model",
            model={"dim": 32, "encoder_dim": 32, "num_layers": 3, "cca_layers": (2, 3), "encoder_layers": 2},
            seq_len=64,
            batch_size=8,
            micro_batch_size=4,
            steps=50,
            warmup_steps=10,
            learning_rate=3e-3,
            eval_every=25,
            save_every=50,
        )
        train(run)
        lines = [json.loads(line) for line in (place / "model" / "metrics.jsonl").read_text().splitlines()]
    kept: list[dict[str, Any]] = [
        {key: value for key, value in line.items() if key == "step" or key.endswith("_nats")} for line in lines
    ]
    path.write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")


def test_fifty_steps_have_the_losses_they_always_had(tmp_path: Path) -> None:
    search = os.pathsep.join(map(str, (HERE.parent, HERE.parent.parent)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    subprocess.run([sys.executable, __file__, tmp_path / "losses.json"], check=True, env=environment, timeout=300)
    found = json.loads((tmp_path / "losses.json").read_text())
    expected = json.loads((HERE / "losses.json").read_text())
    assert [sorted(line) for line in found] == [sorted(line) for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=RELATIVE_TOLERANCE)
    assert expected[0]["loss_nats"] > expected[-2]["loss_nats"] + 1, "a run that learns nothing proves nothing"


if __name__ == "__main__":
    write_losses(Path(sys.argv[1]))
