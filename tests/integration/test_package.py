"""The built wheel has what it needs, away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_wheel_runs_outside_the_checkout_with_the_bundled_corpus_inside(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("retro_lm-*.whl")
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    names = {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"}
    assert names == {"retro", "index_builder", "eval"}
    assert {path.name for path in (unpacked / "retro" / "examples").iterdir()} == {
        path.name for path in (REPOSITORY / "examples").iterdir()
    }
    program = "import retro.demo; print(retro.demo.__file__); print(retro.demo.examples_folder())"
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.stdout.splitlines() == [str(unpacked / "retro" / "demo.py"), str(unpacked / "retro" / "examples")]
