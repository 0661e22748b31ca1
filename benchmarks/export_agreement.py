"""How often two folders of one model say the same: what was trained, and its copy with fewer bits.

    python benchmarks/export_agreement.py trained.model examples/answers.model --questions asked/squad_test.jsonl --index demo.index

Questions are spaced evenly. Prints the share of questions with the same answer, letter for letter, and both models' exact match,
each with its 95% interval (bootstrap over questions).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from eval.metrics import exact_match, paired_bootstrap
from eval.questions import read_questions
from index_builder.search import METHODS, IndexRetriever
from retro.answer import answer_config, ask_many
from retro.checkpoint import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("copy", type=Path)
    parser.add_argument("--questions", type=Path, action="append", required=True)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--retriever", choices=METHODS, default="hybrid")
    parser.add_argument("--limit", type=int, default=400, help="questions of each file")
    parser.add_argument("-k", type=int, default=10, help="passages that are read")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    asked, _ = read_questions(arguments.questions, limit=arguments.limit)
    retriever = IndexRetriever.open(arguments.index, method=arguments.retriever)
    texts = [question.text for question in asked]
    passages = retriever.retrieve(texts, arguments.k, role="query")
    said: list[list[str]] = []
    for folder in (arguments.model, arguments.copy):
        model, tokenizer, _ = load_model(folder)
        answers: list[str] = []
        for first in range(0, len(asked), arguments.batch_size):
            few = slice(first, first + arguments.batch_size)
            made = ask_many(model, tokenizer, texts[few], passages[few], answer_config(arguments.k))
            answers += [answer.text for answer in made]
            print(f"\r{folder}: {len(answers)} of {len(asked)}   ", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        said.append(answers)
    same = np.array([a == b for a, b in zip(*said, strict=True)], np.float64)
    right = [
        np.array([exact_match(a, question.answers) for a, question in zip(answers, asked, strict=True)], np.float64)
        for answers in said
    ]
    nothing = np.zeros(len(asked))
    report: dict[str, Any] = {"questions": len(asked)}
    for name, own, other in (
        ("same answer, %", same, nothing),
        ("exact match, %", right[0], nothing),
        ("exact match of the copy, %", right[1], nothing),
        ("difference, points", right[1], right[0]),
    ):
        found = paired_bootstrap(100 * own, 100 * other)
        report[name] = [round(value, 2) for value in (found.value, found.low, found.high)]
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        print(
            f"{name:30}{value}"
            if name == "questions"
            else f"{name:30}{value[0]:7.2f} ({value[1]:.2f} to {value[2]:.2f})"
        )


if __name__ == "__main__":
    main()
