"""Questions to train answering on and to test it with, out of public question sets; every rule of what is trained on is here.

    python examples/answers.py QUESTIONS_FOLDER OUT_FOLDER

The folder holds, as JSON lines (.xz as well): squad11_dev and squad11_dev_paragraphs (bundled with this project), nq_open_dev,
webq_train, opentriviaqa, entityquestions_train and entityquestions_test; what is missing is skipped, and said.

- SQuAD: articles whose title has an odd last hexadecimal digit of its MD5 are trained on (squad_train.jsonl); questions on the
  others are the test (squad_test.jsonl), none of whose paragraphs or questions anybody trains on (squad_train_paragraphs.jsonl).
- EntityQuestions: those whose subject has an article in the corpora `simple` and `core` (the field `gold`), and as many others;
  questions that stand in the test set too are left out.
- Natural Questions (dev), WebQuestions (train), OpenTriviaQA: as they are, questions with answers only.

Then, with an index of the corpora named simple and core, and one of the paragraphs that are trained on. What is read beside a
question is trained on, too: articles of the test of SQuAD are left out of both (other_titles.txt is a condition for --where).

    retro index build squad=OUT/squad_train_paragraphs.jsonl --out squad.index
    retro questions OUT/nq.jsonl OUT/webq.jsonl OUT/trivia.jsonl OUT/entity.jsonl --index wiki.index --tokenizer wiki.tok \\
        --where "$(cat OUT/other_titles.txt)" --exclude OUT/entity_test.jsonl --exclude OUT/squad_test.jsonl --out wiki.questions
    retro questions OUT/squad_train.jsonl --index squad.index --tokenizer wiki.tok --exclude OUT/squad_test.jsonl \\
        --out squad.questions

What is a test set elsewhere (nq_open_test, webq_test, triviaqa_dev) is named to --exclude as well.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from index_builder.formats import File, records


def read(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Records of NAME.jsonl or NAME.jsonl.xz; none where there is no such file."""
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.xz"):
        if path.is_file():
            file = File(path, str(path), path.name, "jsonl")
            for line, fields in records(file, text_field="text", title_field="title", max_bytes=1 << 26):
                if isinstance(fields, str):
                    raise SystemExit(f"{path}:{line}: {fields}")
                yield fields
            return
    sys.stderr.write(f"{name} is not there: skipped\n")


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    sys.stderr.write(f"{path}: {count:,}\n")


def is_odd(title: str) -> bool:
    """Whether an article of SQuAD is trained on."""
    return int(hashlib.md5(title.encode()).hexdigest()[-1], 16) % 2 == 1


def answered(rows: Iterable[dict[str, Any]], *keep: str) -> Iterator[dict[str, Any]]:
    """Questions with an answer, with the fields that `retro questions` reads."""
    for row in rows:
        answers = [a for a in row["answers"] if a.strip()]
        if answers:
            yield {"id": row["id"], "question": row["question"], "answers": answers} | {
                k: row[k] for k in keep if k in row
            }


def entity_questions(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Questions of EntityQuestions with an article in the corpora, and as many others."""
    tested = {row["question"] for row in read(folder, "entityquestions_test")}
    rows = [row for row in read(folder, "entityquestions_train") if row["question"] not in tested]
    for row in rows:
        row["gold"] = [entry for entry in row.get("gold") or () if entry[0] in ("simple", "core")]
    known = [row for row in rows if row["gold"]]
    others = random.Random(seed).sample(
        [row for row in rows if not row["gold"]], min(len(known), len(rows) - len(known))
    )
    return known + others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    source, out = arguments.questions, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    titles = {row["id"]: row["title"] for row in read(source, "squad11_dev_paragraphs")}
    squad = list(read(source, "squad11_dev"))
    for name, odd in (("squad_train", True), ("squad_test", False)):
        write(
            out / f"{name}.jsonl",
            answered((row for row in squad if is_odd(titles[row["para_id"]]) == odd), "para_id"),
        )
    write(
        out / "squad_train_paragraphs.jsonl",
        (row for row in read(source, "squad11_dev_paragraphs") if is_odd(row["title"])),
    )
    tested = sorted({title for title in titles.values() if not is_odd(title)})
    condition = f"title not in ({', '.join(json.dumps(title, ensure_ascii=False) for title in tested)})"
    (out / "other_titles.txt").write_text(condition + "\n", encoding="utf-8")
    for name, of in (("nq", "nq_open_dev"), ("webq", "webq_train"), ("trivia", "opentriviaqa")):
        write(out / f"{name}.jsonl", answered(read(source, of)))
    write(out / "entity_test.jsonl", answered(read(source, "entityquestions_test"), "relation", "gold"))
    write(out / "entity.jsonl", answered(entity_questions(source, seed=0), "relation", "gold"))


if __name__ == "__main__":
    main()
