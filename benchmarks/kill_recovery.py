"""Kills builds and changes of an index with SIGKILL at random times, and compares what they end with to undisturbed runs.

    python benchmarks/kill_recovery.py [--kills 25] [--articles 60] [--seed 0] [--json]

Uses the bundled SQuAD paragraphs and the default encoder, through the command line. A change that was killed must leave the state
before or the one after; run again, it must end with the bytes of a run that was not killed (a change that was done already is
refused).
"""

import argparse
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from retro.demo import CORPUS, examples_folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the lock; measured times are left out."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "change.json") and not path.name.endswith(".tmp")
    }
    if "manifest.json" in files:
        files["manifest.json"] = re.sub(rb'("queries_per_s\w*"): [0-9.e+-]+', rb"\1: 0", files["manifest.json"])
    return files


def run(arguments: Sequence[str], out: Path, kill_after: float | None = None) -> tuple[int, float]:
    """Exit code of a command and the seconds it worked on a folder, after which it is killed; starting Python does not count."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "retro", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    while process.poll() is None and not any((out / name).is_file() for name in ("change.json", "build.json")):
        time.sleep(0.002)
    started = time.perf_counter()
    try:
        code = process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        code = process.wait()
    return code, time.perf_counter() - started


def main() -> None:  # noqa: PLR0915 - one measurement from beginning to end
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--articles", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with lzma.open(examples_folder() / CORPUS, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file][: 2 * arguments.articles]
    half = arguments.articles
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def corpus(below: str, rows: Sequence[dict[str, str]]) -> str:
            (folder / below).mkdir()
            path = folder / below / "wiki.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            return str(path)

        settings = ["--chunk-len", "16", "--shard-chars", "4000", "--index-type", "IVF4,SQ8"]
        built, base = corpus("build", records[:half]), str(folder / "base.index")
        revised = [{**row, "text": "Revised. " + row["text"]} for row in records[:10]]
        keys = [f"wiki:{row['id']}" for row in records[5:15]]
        commands = {
            "build": ["index", "build", built, *settings, "--out", "{}"],
            "add": ["index", "add", "{}", corpus("add", records[half:])],
            "update": ["index", "update", "{}", corpus("update", [*revised, *records[half : half + 20]])],
            "remove": ["index", "remove", "{}", *keys],
            "sync": ["index", "sync", "{}", corpus("sync", [*revised, *records[20 : half + 10]]), "--delete"],
            "compact": ["index", "compact", "{}"],
        }
        assert run([part.format(base) for part in commands["build"]], Path(base))[0] == 0
        assert run(["index", "remove", base, f"wiki:{records[30]['id']}"], Path(base))[0] == 0
        whole, seconds = {}, {}
        for kind, command in commands.items():
            out = folder / f"{kind}.whole"
            if kind != "build":
                shutil.copytree(base, out)
            code, seconds[kind] = run([part.format(out) for part in command], out)
            assert code == 0, kind
            whole[kind] = content(out)
        before = content(Path(base))
        outcomes: list[dict[str, object]] = []
        while sum(bool(o["killed"]) for o in outcomes) < arguments.kills:
            kind = list(commands)[len(outcomes) % len(commands)]
            out = folder / f"{len(outcomes)}.killed"
            if kind != "build":
                shutil.copytree(base, out)
            command = [part.format(out) for part in commands[kind]]
            code, at = run(command, out, kill_after=seconds[kind] * chance.uniform(0, 1))
            left = content(out) if out.is_dir() else {}
            manifest = left.get("manifest.json")
            state = "none" if manifest is None else "new" if manifest == whole[kind]["manifest.json"] else "old"
            sound = state != "old" or manifest == before["manifest.json"]
            # A change that was done already is not done again: compacting twice would make another state.
            again = 0 if state == "new" and kind == "compact" else run(command, out)[0]
            same = content(out) == whole[kind]
            refused = state == "new" and kind in ("add", "remove") and again == 1
            outcomes.append({"command": kind, "killed": code < 0, "seconds": round(at, 3), "left": state})
            outcomes[-1] |= {"sound": sound, "same_bytes": same, "ran_again": again == 0 or refused}
            print(outcomes[-1], file=sys.stderr, flush=True)
            shutil.rmtree(out)
    killed = [outcome for outcome in outcomes if outcome["killed"]]
    good = sum(bool(o["sound"]) and bool(o["same_bytes"]) and bool(o["ran_again"]) for o in killed)
    if arguments.json:
        print(json.dumps({"kills": len(killed), "recovered": good, "outcomes": outcomes}, indent=2))
    else:
        print(f"{len(killed)} kills, {good} recovered to the same bytes")
    sys.exit(0 if good == len(killed) else 1)


if __name__ == "__main__":
    main()
