"""How often an answer string is among the first k chunks of the bundled corpus, over all 10,570 SQuAD dev questions.

    python benchmarks/squad_recall.py [--index demo.index] [--every 1] [--json]

Builds the index of `retro demo` where it is missing.
"""

import argparse
import json
import lzma
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from eval.retrieval import measure_answer_recall
from index_builder.build import build_index
from index_builder.search import IndexRetriever
from retro.chunks import Passage
from retro.demo import CORPUS, QUESTIONS, examples_folder
from retro.generate import Role


class Ranking:
    """Chunks as they are ranked, those that continue better ones as well."""

    def __init__(self, retriever: IndexRetriever) -> None:
        self.retriever = retriever

    def retrieve(
        self, queries: Sequence[str], k: int, *, role: Role = "document", **other: object
    ) -> list[list[Passage]]:
        now = self.retriever.snapshot()
        assert not any(other.values())
        _, rows_QK = self.retriever.find(queries, k, role=role, excluded_QG=None, keep_N=None, snapshot=now)
        return [[now.store.passage(row) for row in rows] for rows in rows_QK.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=Path("demo.index"))
    parser.add_argument("--every", type=int, default=1, help="take every n-th question")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    if not (arguments.index / "manifest.json").is_file():
        build_index([f"squad={examples_folder() / CORPUS}"], arguments.index)
    retriever = IndexRetriever.open(arguments.index)
    with lzma.open(examples_folder() / QUESTIONS, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:: arguments.every]
    started = time.perf_counter()
    recall = measure_answer_recall(
        Ranking(retriever),
        [row["question"] for row in rows],
        [row["answers"] for row in rows],
        progress=lambda done, total: print(f"\r{done:,} of {total:,}", end="", file=sys.stderr),
    )
    seconds = time.perf_counter() - started
    print(file=sys.stderr)
    if arguments.json:
        print(json.dumps({**asdict(recall), "seconds": round(seconds, 1)}))
        return
    print(f"{recall.num_questions:,} questions, {retriever.store.num_chunks:,} chunks, {seconds:.0f} s")
    print("answer string among the first   " + "".join(f"{k:>8}" for k in recall.chunk))
    print("chunks                          " + "".join(f"{100 * v:7.1f}%" for v in recall.chunk.values()))
    print(
        "chunks with continuation        " + "".join(f"{100 * v:7.1f}%" for v in recall.chunk_and_continuation.values())
    )


if __name__ == "__main__":
    main()
