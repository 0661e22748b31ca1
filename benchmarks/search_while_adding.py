"""How long a search takes while documents are added by another process, against an idle machine; and whether any fails.

    python benchmarks/search_while_adding.py --index part.index --add more.jsonl [--limit 2000] [--seconds 20] [--json]

Works on a copy of the index. Questions are those of the bundled SQuAD file, one at a time; each search encodes its question.
"""

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from index_builder.search import IndexRetriever
from retro.demo import QUESTIONS, examples_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--add", required=True, help="corpus whose documents are added")
    parser.add_argument("--seconds", type=float, default=20, help="of searching on an idle machine")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with lzma.open(examples_folder() / QUESTIONS, "rt", encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file]
    with tempfile.TemporaryDirectory(dir=arguments.index.parent) as name:
        copied = Path(shutil.copytree(arguments.index, Path(name) / "x.index"))
        retriever = IndexRetriever.open(copied)
        asked = failures = 0

        def search() -> float:
            nonlocal asked, failures
            started = time.perf_counter()
            try:
                found = retriever.retrieve([questions[asked % len(questions)]], 10, role="query")[0]
                failures += len(found) != 10
            except Exception as error:
                print(repr(error), file=sys.stderr)
                failures += 1
            asked += 1
            return time.perf_counter() - started

        for _ in range(20):
            search()
        end = time.perf_counter() + arguments.seconds
        idle = []
        while time.perf_counter() < end:
            idle.append(search())
        before = retriever.manifest["documents"]
        process = subprocess.Popen([sys.executable, "-m", "retro", "index", "add", str(copied), arguments.add])
        busy = []
        while process.poll() is None:
            busy.append(search())
        after = [search() for _ in range(200)]
        assert process.returncode == 0
        report = {
            "chunks": retriever.manifest["chunks"],
            "added_documents": retriever.manifest["documents"] - before,
            "searches": asked,
            "failures": failures,
            "median_ms_idle": 1000 * float(np.median(idle)),
            "median_ms_while_adding": 1000 * float(np.median(busy)),
            "p95_ms_while_adding": 1000 * float(np.quantile(busy, 0.95)),
            "median_ms_after": 1000 * float(np.median(after)),
            "ratio": float(np.median(busy) / np.median(idle)),
        }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for key, value in report.items():
        print(f"{key:26}{f'{value:,.2f}' if isinstance(value, float) else f'{value:,}'}")


if __name__ == "__main__":
    main()
