"""The command line: the way from a corpus to training data, and every mistake as one line that says what to do."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import Outcome

from retro.chunks import TrainingData

Run = Callable[..., Outcome]


def refused(outcome: Outcome, *parts: str) -> str:
    """Checks that a command failed with one line that holds all parts, and gives the line."""
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    lines = [line for line in outcome.err.splitlines() if not re.match(r"(read|encode|index)[a-z ]*: ", line)]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


def write(path: Path, *lines: bytes | dict[str, Any]) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


# End to end


def test_the_way_from_a_corpus_to_passages_and_training_data(
    retro: Run, corpus: Path, paragraphs: list[dict[str, Any]], tmp_path: Path
) -> None:
    # The only build here with the encoder that is the default.
    index, tok, data = tmp_path / "x.index", tmp_path / "x.tok", tmp_path / "x.data"
    built = retro("index", "build", corpus, "--limit", 15, "--out", index, "--json")
    assert built.code == 0, built.err
    report = json.loads(built.out)
    assert (report["documents"], report["rejects"], report["truncated_chunks"]) == (15, 0, 0)
    assert (report["encoder"], report["dim"], report["metric"]) == (
        "sentence-transformers/all-MiniLM-L6-v2",
        384,
        "inner product",
    )
    assert (report["index_type"], report["chunk_len"]) == ("Flat", 64)
    assert report["bytes"] == sum(
        p.stat().st_size for p in index.rglob("*") if p.is_file() and p.name not in ("manifest.json", ".lock")
    )
    assert json.loads(retro("index", "info", index, "--json").out) == report
    assert json.loads(retro("index", "verify", index, "--json").out) == {
        "index": str(index),
        "intact": True,
        "problems": [],
    }

    question = "When did the 1973 oil crisis begin?"
    found = json.loads(retro("index", "search", index, question, "-k", "3", "--json").out)
    assert found["query"] == question
    assert len(found["results"]) == 3
    best = found["results"][0]
    record = paragraphs[0]
    assert (best["key"], best["title"]) == (f"squad:{record['id']}", "1973 oil crisis")
    assert "began in October 1973" in best["text"]
    assert best["text"] + best["continuation"] in record["text"]
    scores = [result["score"] for result in found["results"]]
    assert scores == sorted(scores, reverse=True)
    printed = retro("index", "search", index, question, "-k", "3")
    assert f" 1. {best['score']:.3f}  1973 oil crisis  [squad:{record['id']}]" in printed.out

    trained = retro("tokenizer", "train", corpus, "--vocab-size", 500, "--out", tok)
    assert trained.code == 0, trained.err
    assert re.fullmatch(rf"{re.escape(str(tok))}: 500 tokens, fingerprint [0-9a-f]{{16}}\n", trained.out)

    arguments = ("--limit", 15, "--tokenizer", tok, "--index", index, "-k", 2, "--out", data, "--json")
    made = retro("data", corpus, *arguments)
    assert made.code == 0, made.err
    opened = TrainingData(data)
    assert json.loads(made.out) == {
        "data": str(data),
        "documents": 15,
        "chunks": len(opened.arrays.neighbors),
        "tokens": len(opened.arrays.ids),
        "chunks_with_neighbors": int((opened.arrays.neighbors >= 0).any(axis=1).sum()),
        "rejects": 0,
    }
    assert opened.num_neighbors == 2
    assert opened.neighbor_len == 128


@pytest.fixture
def build(retro: Run, tiny_encoder: Path, tmp_path: Path) -> Run:
    """`retro index build` of corpora with the tiny encoder into x.index."""
    return lambda *args: retro("index", "build", *args, "--encoder", tiny_encoder, "--out", tmp_path / "x.index")


def test_a_second_build_answers_the_same(build: Run, corpus: Path) -> None:
    first, second = build(corpus, "--json", "--limit", 3), build(corpus, "--json", "--limit", 3)
    assert (first.code, second.code) == (0, 0)
    assert first.out == second.out
    assert second.err == ""


def test_results_go_to_stdout_and_all_else_to_stderr(build: Run, corpus: Path) -> None:
    outcome = build(corpus, "--json", "--limit", 3)
    assert json.loads(outcome.out)["documents"] == 3
    assert re.search(r"^encode: (\d+) of \1$", outcome.err, re.MULTILINE)


# The commands in their own process


def run_process(*args: object, cwd: Path) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "retro", *map(str, args)], capture_output=True, text=True, check=False, cwd=cwd
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_a_mistake_is_one_line_and_exit_code_1_in_a_process_of_its_own(tmp_path: Path) -> None:
    outcome = run_process("index", "build", "nowhere.jsonl", "--out", "x.index", cwd=tmp_path)
    assert outcome == (1, "", "Error: nowhere.jsonl does not exist; check the path\n")
    assert list(tmp_path.iterdir()) == []


# Corpora


def test_a_corpus_that_is_missing(build: Run, tmp_path: Path) -> None:
    refused(build(tmp_path / "nowhere.jsonl"), f"{tmp_path / 'nowhere.jsonl'} does not exist; check the path")
    assert not (tmp_path / "x.index").exists()


def test_a_folder_without_documents(build: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.exe").write_bytes(b"")
    refused(build(tmp_path / "folder"), "folder holds no file that can be read; add files of .jsonl")


def test_a_file_that_cannot_be_read(build: Run, tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    refused(build(tmp_path / "loop.jsonl"), "loop.jsonl cannot be read", "check the path")


def test_a_named_pipe_is_refused_and_not_waited_for(build: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    refused(build(tmp_path / "pipe.jsonl"), "pipe.jsonl is not a regular file")


GOOD = {"id": 1, "text": "The price of oil rose."}
LIMIT = "--max-document-chars"
BAD_LINES: dict[str, tuple[bytes | dict[str, Any], tuple[str, ...]]] = {
    "invalid UTF-8": (b'{"text": "caf\xe9"}', ("not valid UTF-8 (byte 0xe9 at position 13); save the file as UTF-8",)),
    "malformed JSON": (b'{"text": "a"', ("not valid JSON", "each line must be one JSON object")),
    "an array": (b"[1, 2]", ("it is an array; each line must be one JSON object",)),
    "no text field": ({"id": 2, "body": "b"}, ("no field 'text' (its fields: 'id', 'body')", "--text-field")),
    "a text that is a number": ({"text": 5}, ("the field 'text' is a number; it must be a string",)),
    "an empty text": ({"text": " \n"}, ("the text is empty; a document needs words",)),
    "a key used before": (GOOD, ("the key 'c:1' was used by a document before; ids must differ within a corpus",)),
    "an unknown split": ({"text": "a", "split": "half"}, ("the split 'half' is not known; use train, valid",)),
}


@pytest.mark.parametrize(("line", "parts"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_record_is_named_by_file_and_line_or_left_out(
    build: Run, tmp_path: Path, line: bytes | dict[str, Any], parts: tuple[str, ...]
) -> None:
    corpus = write(tmp_path / "c.jsonl", GOOD, line)
    refused(build(corpus), f"Error: {corpus}:2: ", *parts, "use --on-error skip to leave such records out")
    skipped = build(corpus, "--on-error", "skip", "--overwrite", "--json")
    assert skipped.code == 0, skipped.err
    report = json.loads(skipped.out)
    assert (report["documents"], report["rejects"]) == (1, 1)
    [reject] = map(json.loads, (tmp_path / "x.index" / "rejects.jsonl").read_text(encoding="utf-8").splitlines())
    assert (reject["file"], reject["line"]) == (str(corpus), 2)
    assert parts[0] in reject["reason"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_an_empty_corpus(build: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    refused(build(tmp_path / "c.jsonl", "--on-error", "skip"), "c.jsonl holds no documents", "--text-field")


def test_a_document_of_50_mb_is_refused_or_left_out(build: Run, tmp_path: Path) -> None:
    large = tmp_path / "c.jsonl"
    with large.open("wb") as file:
        file.write(b'{"id": "large", "text": "')
        for _ in range(50):
            file.write(b"0123456789abcde " * (1 << 16))
        file.write(b'"}\n')
        file.write(json.dumps(GOOD).encode() + b"\n")
    refused(build(large), f"{large}:1: ", "52428800 characters", "the limit of 10000000", LIMIT)
    assert not (tmp_path / "x.index" / "documents").exists()
    skipped = build(large, "--on-error", "skip", "--overwrite", "--json")
    assert json.loads(skipped.out)["rejects"] == 1
    [reject] = map(json.loads, (tmp_path / "x.index" / "rejects.jsonl").read_text(encoding="utf-8").splitlines())
    assert LIMIT in reject["reason"]


def test_a_text_file_over_the_limit_names_the_option(build: Run, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"word " * 300_000)
    refused(build(tmp_path / "c.txt", LIMIT, "100"), "c.txt: it has more than", LIMIT)


def test_a_truncated_archive(build: Run, tmp_path: Path, corpus: Path) -> None:
    import lzma

    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(corpus.read_bytes())[:2000])
    refused(build(tmp_path / "c.jsonl.xz"), "c.jsonl.xz is truncated or damaged", "copy or download it again")


# Settings


def test_an_encoder_that_is_not_there(retro: Run, corpus: Path, tmp_path: Path) -> None:
    outcome = retro("index", "build", corpus, "--encoder", tmp_path / "nowhere", "--out", tmp_path / "x.index")
    refused(outcome, f"cannot load the encoder '{tmp_path / 'nowhere'}'", "Give a folder with a sentence-transformers")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--chunk-len", "1"), "chunk_len = 1: a chunk has at least 2 tokens"),
        (("--shard-chars", "0"), "shard_chars = 0: must be above 0"),
        (
            ("--index-type", "Nonsense"),
            "FAISS does not know the index type 'Nonsense' for 32 dimensions; examples: Flat",
        ),
        (("--index-type", "IVF1024,Flat"), "too few for the index type 'IVF1024,Flat': take a smaller one or auto"),
        (("--limit", "0"), "limit is 0; give at least 1"),
        (("--text-field", "id"), "they need three different names"),
        (("--tokenizer", "./no/tokenizer"), "there is no tokenizer.json in ./no/tokenizer: train one with `retro"),
        (("--device", "cuda:99"), "cuda"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_a_setting_that_cannot_work(build: Run, corpus: Path, options: tuple[str, ...], part: str) -> None:
    refused(build(corpus, *options), part)


def test_settings_that_differ_from_those_of_the_index(build: Run, corpus: Path) -> None:
    assert build(corpus, "--limit", 2).code == 0
    refused(
        build(corpus, "--limit", 2, "--chunk-len", 32),
        "x.index was made differently (config.chunk_len: 64 -> 32). Use the same settings to go on, --overwrite to start",
    )
    assert build(corpus, "--limit", 2, "--chunk-len", 32, "--overwrite").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("index", "build", "c.jsonl"),
        ("index", "build", "--out", "x.index"),
        ("index", "build", "c.jsonl", "--out", "x.index", "--no-such-option"),
        ("index", "build", "c.jsonl", "--out", "x.index", "--chunk-len", "many"),
        ("index", "build", "c.jsonl", "--out", "x.index", "--on-error", "ignore"),
        ("index", "search", "x.index", "oil", "--role", "king"),
        ("index", "search", "x.index"),
        ("index", "search", "x.index", "oil", "-k", "1.5"),
        ("data", "c.jsonl", "--tokenizer", "t", "--index", "x.index", "--out", "x.data", "--exclude", "some"),
        ("tokenizer", "train", "c.jsonl", "--vocab-size", "big", "--out", "tok"),
        ("index", "destroy"),
        ("no-such-command",),
    ],
)
def test_wrong_usage_is_exit_code_2(
    retro: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = retro(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Usage: " in outcome.err
    assert "Error: " in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_that_is_too_small(retro: Run, corpus: Path, tmp_path: Path) -> None:
    outcome = retro("tokenizer", "train", corpus, "--vocab-size", 100, "--out", tmp_path / "tok")
    refused(outcome, "vocab_size = 100: 256 bytes and 2 special tokens need at least 258")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("-k", "0"), "num_neighbors = 0: must be above 0"),
        (("--chunk-len", "1"), "chunk_len = 1: a chunk has at least 2 slots"),
        (("--neighbor-len", "0"), "neighbor_len = 0: must be above 0"),
        (("--valid-share", "1.5"), "valid_share = 1.5: give a share between 0 and 1"),
        (("--valid-share", "0.5", "--test-share", "0.5"), "valid_share and test_share leave nothing to train on"),
    ],
)
def test_a_setting_of_training_data_that_cannot_work(
    retro: Run, corpus: Path, tiny_index: Path, tokenizer_folder: Path, tmp_path: Path, options: Any, part: str
) -> None:
    out = tmp_path / "x.data"
    outcome = retro("data", corpus, "--tokenizer", tokenizer_folder, "--index", tiny_index, "--out", out, *options)
    refused(outcome, part)
    assert not out.exists()


# Artifacts


def test_an_index_that_is_not_there_or_not_one(
    retro: Run, tokenizer_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    for command in (
        ("search", tmp_path / "no.index", "oil"),
        ("info", tmp_path / "no.index"),
        ("verify", tmp_path / "no.index"),
    ):
        refused(retro("index", *command), "no.index is not there: an index of this name has not been made")
    refused(retro("index", "search", tokenizer_folder, "oil"), "has no manifest.json: it is not an index, or making it")
    refused(retro("index", "search", corpus, "oil"), f"{corpus} is not there")
    assert retro("tokenizer", "train", corpus, "--vocab-size", 300, "--out", tmp_path / "tok").code == 0
    refused(retro("index", "search", tmp_path / "tok", "oil"), "tok is a tokenizer, not an index")
    refused(retro("index", "verify", tmp_path / "tok"), "tok is a tokenizer, not an index")


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
@pytest.mark.parametrize(
    "name",
    [
        "vectors/00000.npy",
        "documents/00000.arrow",
        "chunks/00001.npy",
        "lexical/part-00000.bm25",
        "tokenizer.json",
    ],
)
def test_a_damaged_index(retro: Run, tiny_index: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = shutil.copytree(tiny_index, tmp_path / "x.index")
    content = (folder / name).read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        (folder / name).unlink()
    elif damage == "truncated":
        (folder / name).write_bytes(content[:middle])
    else:
        (folder / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    said = {
        "missing": f"{name} is missing",
        "truncated": f"{name} has {middle:,} bytes instead of {len(content):,} (truncated or altered)",
        "altered": f"{name} was altered (its SHA-256 differs from the manifest)",
    }[damage]
    for command in (("search", folder, "oil"), ("info", folder)):
        refused(retro("index", *command), f"{folder} is damaged: {said}. Make it again (--overwrite)")
    verified = retro("index", "verify", folder, "--json")
    assert verified.code == 1
    assert json.loads(verified.out) == {"index": str(folder), "intact": False, "problems": [said]}
    assert retro("index", "verify", folder).out == f"{said}\n"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"kind": "index"}'])
def test_a_damaged_manifest(retro: Run, tiny_index: Path, tmp_path: Path, content: bytes) -> None:
    folder = shutil.copytree(tiny_index, tmp_path / "x.index")
    (folder / "manifest.json").write_bytes(content)
    for command in (("search", folder, "oil"), ("info", folder), ("verify", folder)):
        refused(retro("index", *command), "manifest.json")


def test_an_index_whose_encoder_was_replaced(
    retro: Run, corpus: Path, make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    encoder = make_encoder(tmp_path / "encoder")
    index = tmp_path / "x.index"
    built = retro("index", "build", corpus, "--limit", 2, "--encoder", encoder, "--out", index)
    assert built.code == 0, built.err
    shutil.rmtree(encoder)
    refused(retro("index", "search", index, "oil"), f"cannot load the encoder '{encoder}'")
    make_encoder(encoder, seed=1)
    refused(
        retro("index", "search", index, "oil"),
        f"{index} was built with the encoder {encoder} (",
        "their vectors cannot be compared. Use that encoder, or build again",
    )


def test_a_tokenizer_that_is_none(retro: Run, corpus: Path, tiny_index: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    for name, part in ((tmp_path, "is no tokenizer file"), (tmp_path / "x" / "y", "there is no tokenizer.json in")):
        refused(retro("data", corpus, "--tokenizer", name, "--index", tiny_index, "--out", tmp_path / "d"), part)


def test_a_model_cannot_be_trained_on_data_of_another_tokenizer(
    retro: Run, corpus: Path, tiny_index: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    # The tokenizer in the folder of the data is exchanged, with a manifest that admits its bytes.
    data = tmp_path / "x.data"
    made = retro("data", corpus, "--limit", 5, "--tokenizer", tokenizer_folder, "--index", tiny_index, "--out", data)
    assert made.code == 0, made.err
    from retro.artifact import sha256
    from retro.tokenizer import Tokenizer

    Tokenizer.train(["another tokenizer"], 300).save(data)
    manifest = json.loads((data / "manifest.json").read_bytes())
    path = data / "tokenizer.json"
    manifest["files"]["tokenizer.json"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (data / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    outcome = retro("train", "--preset", "tiny", "--data", data, "--out", tmp_path / "x.model")
    refused(outcome, "x.data holds another tokenizer than it was made with: make it again")


# Questions


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question(retro: Run, tiny_index: Path, question: str) -> None:
    refused(retro("index", "search", tiny_index, question), "the question is empty")


@pytest.mark.parametrize(
    ("k", "part"), [("0", "k = 0: ask for at least one passage"), ("9999", "chunks of"), ("-1", "k = -1: ask for")]
)
def test_a_number_of_passages_that_cannot_be(retro: Run, tiny_index: Path, k: str, part: str) -> None:
    line = refused(retro("index", "search", tiny_index, "oil", "-k", k), part)
    assert k != "9999" or line.startswith("Error: k = 9999 is more than the ")


def test_a_question_longer_than_the_encoder_reads_is_answered(retro: Run, tiny_index: Path) -> None:
    assert retro("index", "search", tiny_index, "oil price " * 5000, "-k", 1, "--json").code == 0


# The disk


def test_a_full_disk_is_one_line_and_the_command_can_be_run_again(
    build: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        outcome = build(corpus, "--limit", 10, "--shard-chars", 1000)
    refused(outcome, "the disk is full (", "What is finished is kept: make room and run the same command again")
    kept = sorted(path.name for path in (tmp_path / "x.index" / "documents").iterdir())
    again = build(corpus, "--limit", 10, "--shard-chars", 1000, "--json")
    assert json.loads(again.out)["documents"] == 10
    assert kept
    assert set(kept) <= {path.name for path in (tmp_path / "x.index" / "documents").iterdir()}


def test_an_output_that_is_in_the_way_is_not_touched(build: Run, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "x.index").write_bytes(b"mine")
    refused(build(corpus), f"cannot write {tmp_path / 'x.index'}: File exists")
    assert (tmp_path / "x.index").read_bytes() == b"mine"
    (tmp_path / "x.index").unlink()
    (tmp_path / "x.index").mkdir()
    (tmp_path / "x.index" / "thesis.tex").write_bytes(b"mine")
    for more in ((), ("--overwrite",)):
        refused(build(corpus, *more), "x.index exists and was not made by this program: choose another --out")
    assert (tmp_path / "x.index" / "thesis.tex").read_bytes() == b"mine"


# Help


def commands() -> list[tuple[str, ...]]:
    from retro.cli import app

    def below(group: Any, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = []
        for name, command in group.commands.items():
            found += below(command, (*path, name)) if hasattr(command, "commands") else [(*path, name)]
        return found

    return below(typer.main.get_command(app), ())


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_help_of_a_command_has_an_example_of_it(retro: Run, command: tuple[str, ...]) -> None:
    outcome = retro(*command, "--help")
    assert outcome.code == 0
    assert re.search(rf"^ *Example.*:\n +retro {' '.join(command)}\b", outcome.out, re.MULTILINE), outcome.out


def test_the_help_names_all_commands(retro: Run) -> None:
    outcome = retro("--help")
    for command in commands():
        assert re.search(rf"^ +{command[0]}\b", outcome.out, re.MULTILINE), command
    assert {("index", "build"), ("index", "search"), ("index", "info"), ("index", "verify"), ("data",)} <= set(
        commands()
    )
