"""How often an answer string is among the first passages of a Wikipedia: by meaning, by words, by both.

    python benchmarks/wiki_recall.py simplewiki.jsonl.xz --questions DIR --index simple.index [--limit 20000] [--per-set 1500]
    python benchmarks/wiki_recall.py simplewiki.jsonl.xz --questions DIR --index words.index --words-only

Builds the index where it is missing (an interrupted build goes on) and asks the questions of nq_open_dev, triviaqa_dev, webq_train
and entityquestions_dev, JSON lines of `question` and `answers` in DIR. A passage is a chunk of 64 tokens with its continuation.
The last column is what a method has in the top 20 more than BM25 on the same questions, with the 95% interval of a paired
bootstrap. Times are of the search in batches of 512, the encoding of the questions not included; single ones are timed by
`retro eval retrieval`.
"""

import argparse
import json
import lzma
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.metrics import first_with_answer, paired_bootstrap
from index_builder.build import READ_COUNTS, build_index, lexical_stage, open_encoder, read_stage
from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions
from index_builder.lexical import LexicalIndex
from index_builder.search import METHODS, IndexRetriever, Method
from retro.artifact import write_json
from retro.chunks import ChunkStore

SETS = ("nq_open_dev", "triviaqa_dev", "webq_train", "entityquestions_dev")
KS = (1, 5, 20)
BATCH = 512
Search = Callable[[slice, Method], NDArray[np.int64]]
"""Rows for some of the questions."""


def tell(stage: str, done: int, total: int | None) -> None:
    print(f"\r{stage}: {done:,}{f' of {total:,}' if total else ''}      ", end="", file=sys.stderr, flush=True)


class Words:
    """Passages by BM25 alone, of documents and chunks that were not encoded."""

    def __init__(self, corpus: str, folder: Path, config: BuildConfig) -> None:
        if not (folder / READ_COUNTS).is_file():
            counts = read_stage([corpus], folder, open_encoder(config, "cpu").tokenizer(), config)
            write_json(folder / READ_COUNTS, counts)
        self.store = ChunkStore(folder)
        described = lexical_stage(folder, "lexical", self.store, config, tell)
        assert described is not None
        self.lexical = LexicalIndex.open(folder / "lexical", described["parts"])


def first_places(
    search: Search, method: Method, store: ChunkStore, answers: Sequence[Sequence[str]]
) -> tuple[NDArray[np.float64], float]:
    """Place of the first passage with an answer, from 0, infinite for none; and the seconds that the searches took."""
    places = np.full(len(answers), np.inf)
    seconds = 0.0
    for start in range(0, len(answers), BATCH):
        some = slice(start, start + BATCH)
        started = time.perf_counter()
        rows_QK = search(some, method)
        seconds += time.perf_counter() - started
        for question, rows in enumerate(rows_QK.tolist(), start):
            place = first_with_answer([store.passage(row).full_text for row in rows if row >= 0], answers[question])
            if place is not None:
                places[question] = place
    return places, seconds


def measure(
    name: str, search: Search, store: ChunkStore, answers: Sequence[Sequence[str]], methods: Sequence[Method]
) -> list[dict[str, Any]]:
    """A row for each method on one set of questions."""
    report: list[dict[str, Any]] = []
    words = first_places(search, "bm25", store, answers)
    for method in methods:
        places, seconds = words if method == "bm25" else first_places(search, method, store, answers)
        row = {"set": name, "questions": len(answers), "method": method}
        row |= {"searches_per_s": round(len(answers) / seconds, 1)}
        row |= {f"top_{k}": round(100 * float((places < k).mean()), 2) for k in KS}
        more = paired_bootstrap(100.0 * (places < KS[-1]), 100.0 * (words[0] < KS[-1]))
        row |= {"more_than_bm25": [round(value, 2) for value in (more.value, more.low, more.high)]}
        report.append(row)
        print(f"\r{row}", file=sys.stderr, flush=True)
    return report


def prepared(
    questions: Sequence[str], words: Words | None, retriever: IndexRetriever | None
) -> tuple[Search, ChunkStore]:
    """A search for the questions, which are encoded once; and where its rows are."""
    if retriever is None:
        assert words is not None
        lexical = words.lexical
        return lambda some, method: lexical.search(questions[some], KS[-1])[1], words.store
    now = retriever.snapshot()
    vectors_QX = retriever.encoder.encode(questions, "query")
    return lambda some, method: now.find(questions[some], vectors_QX[some], KS[-1], method=method)[1], now.store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="articles to read")
    parser.add_argument("--per-set", type=int, help="questions of each set, evenly spaced; all without it")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--title-in-key", action="store_true", help="when building")
    parser.add_argument("--words-only", action="store_true", help="read and chunk, but do not encode")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    seconds = None
    config = BuildConfig(title_in_key=arguments.title_in_key, read=ReadOptions(limit=arguments.limit))
    started = time.perf_counter()
    words = Words(arguments.corpus, arguments.index, config) if arguments.words_only else None
    if words is not None:
        arguments.methods = ["bm25"]
        seconds = round(time.perf_counter() - started)
    elif not (arguments.index / "manifest.json").is_file():
        build_index([arguments.corpus], arguments.index, config, device=arguments.device, progress=tell)
        seconds = round(time.perf_counter() - started)
    retriever = None if words is not None else IndexRetriever.open(arguments.index, device=arguments.device)
    report: list[dict[str, Any]] = []
    for name in SETS:
        with lzma.open(arguments.questions / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if arguments.per_set is not None:
            rows = rows[:: max(1, len(rows) // arguments.per_set)][: arguments.per_set]
        search, store = prepared([row["question"] for row in rows], words, retriever)
        report += measure(name, search, store, [row["answers"] for row in rows], arguments.methods)
    if retriever is not None:
        manifest = retriever.manifest
    else:
        assert words is not None
        counts = {"documents": words.store.num_documents, "chunks": words.store.num_chunks}
        manifest = counts | {"index": {"factory": "BM25 only"}}
    if arguments.json:
        counts = {name: manifest[name] for name in ("documents", "chunks")}
        print(json.dumps({**counts, "index": manifest["index"], "build_seconds": seconds, "recall": report}, indent=2))
        return
    print(f"\n{manifest['documents']:,} articles, {manifest['chunks']:,} chunks, {manifest['index']['factory']}")
    print(f"{'answer string among the first':32}" + "".join(f"{k:>8}" for k in KS) + "   more than BM25")
    for row in report:
        value, low, high = row["more_than_bm25"]
        shares = "".join(f"{row[f'top_{k}']:7.1f}%" for k in KS)
        print(f"{row['set']:20}{row['method']:12}{shares}{value:+8.1f} ({low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()
