"""How often an answer string is among the first passages of a Wikipedia: by meaning, by words, by both.

    python benchmarks/wiki_recall.py simplewiki.jsonl.xz --questions DIR --index simple.index [--limit 20000] [--per-set 1500]
    python benchmarks/wiki_recall.py simplewiki.jsonl.xz --questions DIR --index words.index --words-only

Builds the index where it is missing (an interrupted build goes on) and asks the questions of nq_open_dev, triviaqa_dev, webq_train
and entityquestions_dev, JSON lines of `question` and `answers` in DIR. A passage is a chunk of 64 tokens with its continuation.
"""

import argparse
import json
import lzma
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.retrieval import measure_answer_recall
from index_builder.build import READ_COUNTS, build_index, lexical_stage, open_encoder, read_stage
from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions
from index_builder.lexical import LexicalIndex
from index_builder.search import METHODS, IndexRetriever
from retro.artifact import write_json
from retro.chunks import ChunkStore, Passage

SETS = ("nq_open_dev", "triviaqa_dev", "webq_train", "entityquestions_dev")
KS = (1, 5, 20)


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

    def retrieve(self, queries: Sequence[str], k: int, **options: Any) -> list[list[Passage]]:
        _, rows_QK = self.lexical.search(queries, k)
        return [[self.store.passage(row) for row in rows if row >= 0] for rows in rows_QK.tolist()]


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
    report: list[dict[str, Any]] = []
    for name in SETS:
        with lzma.open(arguments.questions / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if arguments.per_set is not None:
            rows = rows[:: max(1, len(rows) // arguments.per_set)][: arguments.per_set]
        for method in arguments.methods:
            retriever: Any = words
            if words is None:
                retriever = IndexRetriever.open(arguments.index, device=arguments.device, method=method)
            started = time.perf_counter()
            recall = measure_answer_recall(
                retriever, [row["question"] for row in rows], [row["answers"] for row in rows], ks=KS
            )
            rate = len(rows) / (time.perf_counter() - started)
            report.append({"set": name, "questions": len(rows), "method": method, "questions_per_s": round(rate, 1)})
            report[-1] |= {f"top_{k}": round(100 * recall.chunk_and_continuation[k], 2) for k in KS}
            print(f"\r{report[-1]}", file=sys.stderr, flush=True)
    if words is None:
        manifest = retriever.manifest
    else:
        counts = {"documents": words.store.num_documents, "chunks": words.store.num_chunks}
        manifest = counts | {"index": {"factory": "BM25 only"}}
    if arguments.json:
        counts = {name: manifest[name] for name in ("documents", "chunks")}
        print(json.dumps({**counts, "index": manifest["index"], "build_seconds": seconds, "recall": report}, indent=2))
        return
    print(f"\n{manifest['documents']:,} articles, {manifest['chunks']:,} chunks, {manifest['index']['factory']}")
    print(f"{'answer string among the first':32}" + "".join(f"{k:>8}" for k in KS))
    for row in report:
        print(f"{row['set']:20}{row['method']:12}" + "".join(f"{row[f'top_{k}']:7.1f}%" for k in KS))


if __name__ == "__main__":
    main()
