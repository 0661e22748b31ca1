"""examples/wikitext103.toml at a small scale: a decoder, kNN-LM and RETRO on articles of another Wikipedia in WikiText's form.

    python benchmarks/wikitext_standin.py run simplewiki.jsonl.xz --out standin [--steps 300]
    python benchmarks/wikitext_standin.py convert wiki.test.raw test.jsonl --split test

`run` takes the longer articles of JSON lines of `title` and `text`, writes them as WikiText does ("= Title =" above each), and does
all that the recipe says: tokenizer, index, training data, both models, the three evaluations. Run again, it goes on. What comes out
says whether the recipe works, and nothing about the paper's figures: the models are tiny and hardly trained.
"""

import argparse
import hashlib
import json
import lzma
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.records import read_records, read_units
from retro.errors import FormatError

RECIPE = Path(__file__).parent.parent / "examples" / "wikitext103.toml"
TITLE = re.compile(r" = [^=].* = \n?")
"""Sections have more of these signs, with a space between."""
SMALL = {
    "model.dim": 128,
    "model.num_layers": 4,
    "model.num_heads": 4,
    "model.head_dim": 32,
    "model.ffw_dim": 512,
    "model.cca_layers": [2, 4],
    "model.encoder_dim": 128,
    "model.encoder_heads": 4,
    "model.encoder_head_dim": 32,
    "model.encoder_ffw_dim": 512,
    "train.seq_len": 256,
    "train.batch_size": 8,
    "train.micro_batch_size": 8,
    "train.learning_rate": 2e-3,
    "train.final_learning_rate": 2e-4,
    "train.warmup_steps": 30,
    "train.eval_every": 50,
    "train.eval_sequences": 32,
    "train.save_every": 100,
    "train.sample_tokens": 0,
}
WINDOW = "--window 256 --stride 64"


def articles(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Title and text of each article of a WikiText file, the title's line included; spaces at the ends of lines are gone.

    An article begins at a line "= Title =" between two empty lines (the first one at the file's beginning).

    Raises:
        FormatError: Text stands before the first title.
    """
    title, empty = "", True
    text: list[str] = []
    held: str | None = None  # a line that looks like a title, until the next one is seen
    for line in [*lines, ""]:
        if held is not None:
            if not line.strip():
                if title:
                    yield title, "\n".join(text)
                title, text = held.strip()[2:-2].strip(), []
            text.append(held.strip())
            held = None
        if empty and TITLE.fullmatch(line):
            held = line
        elif title:
            text.append(line.strip())
        elif line.strip():
            raise FormatError(f"{line.strip()[:60]!r} stands before the first title: this is no file of WikiText")
        empty = not line.strip()
    if title:
        yield title, "\n".join(text)


def convert(source: Path, out: Path, split: str) -> tuple[int, int, int]:
    """Makes JSON lines of a WikiText file: the number of articles, of words, and of line ends."""
    count = words = ends = 0
    with source.open(encoding="utf-8") as file, out.open("w", encoding="utf-8") as written:
        for title, text in articles(file):
            row = {"id": f"{split}-{count}", "title": title, "group": title, "split": split, "text": text}
            written.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    with source.open(encoding="utf-8") as file:
        for line in file:
            words, ends = words + len(line.split()), ends + 1
    return count, words, ends


def cut(corpus: Path, out: Path, counts: dict[str, int], min_words: int) -> None:
    """Writes WikiText files of articles of at least so many words, in an order that their titles give, and a database.

    The database has the articles for training, and twice as many others; none of valid and test.
    """
    chosen: list[tuple[str, str, str]] = []
    with lzma.open(corpus, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if len(row["text"].split()) >= min_words:
                chosen.append((hashlib.md5(row["title"].encode()).hexdigest(), row["title"], row["text"]))
    chosen.sort()
    first = 0
    for split, count in counts.items():
        part = chosen[first : first + count]
        first += count
        with (out / f"wiki.{split}.raw").open("w", encoding="utf-8") as written:
            for _, title, text in part:
                lines = "".join(f" {line.strip()} \n" for line in text.split("\n") if line.strip())
                written.write(f" \n = {title} = \n \n{lines}")
    database = chosen[: counts["train"]] + chosen[first : first + 2 * counts["train"]]
    with (out / "wikipedia.jsonl").open("w", encoding="utf-8") as written:
        for key, title, text in database:
            row = {"id": key, "title": title, "group": title, "text": text}
            written.write(json.dumps(row, ensure_ascii=False) + "\n")


def retro(folder: Path, *arguments: str | Path) -> None:
    """Runs a command in a folder, with its time; what it says of itself is left out."""
    command = [sys.executable, "-m", "retro", *map(str, arguments)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    print(f"{time.monotonic() - began:6.0f} s  retro {' '.join(map(str, arguments[:3]))}", file=sys.stderr)
    if done.returncode:
        sys.exit(f"retro {' '.join(map(str, arguments))}\n{done.stderr}")


def run(corpus: Path, out: Path, counts: dict[str, int], *, steps: int, vocab: int, min_words: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "test.jsonl").is_file():
        cut(corpus, out, counts, min_words)
    sizes = {}
    for split in ("train", "valid", "test"):
        sizes[split] = convert(out / f"wiki.{split}.raw", out / f"{split}.jsonl", split)
        print("{}: {:,} articles, {:,} words, {:,} lines".format(split, *sizes[split]))
    if not (out / "wikitext.tok").is_dir():
        retro(out, *f"tokenizer train train.jsonl --vocab-size {vocab} --out wikitext.tok".split())
    retro(out, "index", "build", "wikipedia.jsonl", "--out", "wikipedia.index", "--device", "cpu")
    clean = "--exclude-ngrams-of valid.jsonl --exclude-ngrams-of test.jsonl --device cpu"
    sources = "--tokenizer wikitext.tok --index wikipedia.index -k 2 --out wikitext.data"
    retro(out, *f"data train.jsonl valid.jsonl {sources} {clean}".split())
    settings = SMALL | {"model.vocab_size": vocab, "train.steps": steps, "train.device": "cpu"}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    retro(out, "train", RECIPE.resolve(), "--out", "retro.model", *sets)
    retro(out, "train", RECIPE.resolve(), "--out", "base.model", *sets, "--set", "model.cca_layers=[]")
    report, records = f"--out report {WINDOW} --device cpu", out / "report" / "records"
    if not [*records.glob("lm-*")]:
        options = f"--index wikipedia.index -k 10 --baseline base.model --overlap {report}"
        retro(out, *f"eval lm retro.model test.jsonl {options}".split())
    if not [*records.glob("knn-lm-*")]:
        options = f"--store wikipedia.jsonl --datastore wikipedia.datastore --tune valid.jsonl -k 10 {report}"
        retro(out, *f"eval knn-lm base.model test.jsonl {options}".split())
    table(out / "report", sum(sizes["test"][1:]))


def table(report: Path, words: int) -> None:
    """Prints the perplexities per word, line ends included, and the bits per byte of all rows."""
    found: dict[str, tuple[float, float]] = {}
    columns = {
        "lm": {"baseline": "decoder", "off": "RETRO, off", "shuffled": "RETRO, shuffled", "on": "RETRO, on"},
        "knn-lm": {"on": "kNN-LM"},
    }
    settings: dict[str, Any] = {}
    for path, record in read_records(report).items():
        units = read_units(path, record)
        for column, name in columns[record.kind].items():
            nats = math.fsum(units[f"loss_{column}_nats"])
            found[name] = math.exp(nats / words), nats / math.log(2) / sum(units["bytes"])
        settings |= {k: v for k, v in record.configuration.items() if k in ("share", "temperature", "keys")}
    print(f"\n{'':16} {'perplexity':>10}  {'bits per byte':>13}")
    for name in ("decoder", "kNN-LM", "RETRO, off", "RETRO, shuffled", "RETRO, on"):
        print(f"{name:16} {found[name][0]:10.1f}  {found[name][1]:13.4f}")
    print(f"\nkNN-LM: {settings}; figures with intervals: {report / 'report.html'}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    converting = commands.add_parser("convert", help="a file of WikiText to JSON lines")
    converting.add_argument("source", type=Path)
    converting.add_argument("out", type=Path)
    converting.add_argument("--split", required=True, choices=("train", "valid", "test"))
    running = commands.add_parser("run", help="the whole recipe on a stand-in")
    running.add_argument("corpus", type=Path, help="JSON lines of title and text, .xz")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--articles", type=int, default=300, help="for training; a tenth each for valid and test")
    running.add_argument("--min-words", type=int, default=300, help="of an article")
    running.add_argument("--steps", type=int, default=300)
    running.add_argument("--vocab-size", type=int, default=4096)
    options = parser.parse_args(arguments)
    if options.command == "convert":
        count, words, ends = convert(options.source, options.out, options.split)
        print(f"{count:,} articles; {words:,} words and {ends:,} lines, together {words + ends:,}")
        return
    few = max(options.articles // 10, 2)
    counts = {"train": options.articles, "valid": few, "test": few}
    run(options.corpus, options.out, counts, steps=options.steps, vocab=options.vocab_size, min_words=options.min_words)


if __name__ == "__main__":
    main()
