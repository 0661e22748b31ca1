"""The commands end to end: from paragraphs to a model that continues texts and answers, and the examples in the help."""

import importlib.metadata
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import pytest
from commands import Outcome, command, done, refused

from retro.chunks import TrainingData

one_thread = pytest.fixture(autouse=True)(builders.one_thread)

SMALL = [
    "model.dim=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.head_dim=16",
    "model.ffw_dim=64",
    "model.cca_layers=[2]",
    "model.encoder_dim=32",
    "model.encoder_layers=1",
    "model.encoder_heads=2",
    "model.encoder_head_dim=16",
    "model.encoder_ffw_dim=64",
    "train.steps=4",
    "train.batch_size=2",
    "train.micro_batch_size=2",
    "train.seq_len=128",
    "train.eval_sequences=2",
    "train.warmup_steps=1",
    "train.device=cpu",
]
QUESTION = "When did the 1973 oil crisis begin?"


Run = Callable[..., Outcome]


def options(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def write_jsonl(path: Path, paragraphs: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in paragraphs[:25]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(paragraphs: list[dict[str, Any]], tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every artifact was made by its command. Not to be altered: copy it."""
    folder = tmp_path_factory.mktemp("made")
    corpus, index, tok, data = (folder / f"wiki.{kind}" for kind in ("jsonl", "index", "tok", "data"))
    write_jsonl(corpus, paragraphs)
    done("index", "build", corpus, "--out", index, "--encoder", tiny_encoder)
    done("tokenizer", "train", corpus, "--vocab-size", 400, "--out", tok)
    done("data", corpus, "--tokenizer", tok, "--index", index, "--out", data, "--valid-share", 0.2)
    trained = done(*training(folder))
    assert trained.out.startswith(f"{folder / 'wiki.model'}: trained for 4 steps; ")
    return folder


def training(folder: Path, out: str = "wiki.model") -> list[object]:
    return ["train", "--preset", "tiny", "--data", folder / "wiki.data", "--out", folder / out, *options(SMALL)]


def model_and_index(folder: Path) -> list[object]:
    return ["--model", folder / "wiki.model", "--index", folder / "wiki.index"]


# End to end


def test_every_command_leaves_what_the_next_one_needs(made: Path) -> None:
    data = TrainingData(made / "wiki.data")
    assert data.tokenizer.vocab_size == 400
    assert data.num_neighbors == 2
    assert (data.arrays.neighbors >= 0).any()
    names = {path.name for path in (made / "wiki.model").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "metrics.jsonl",
        "manifest.json",
    } <= names
    model = json.loads((made / "wiki.model" / "config.json").read_text())["model"]
    assert (model["dim"], model["vocab_size"], model["cca_layers"]) == (32, 400, [2])
    lines = [json.loads(line) for line in (made / "wiki.model" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4


def test_training_again_returns_at_once(made: Path, folder_bytes: Callable[[Path], dict[str, bytes]]) -> None:
    before = folder_bytes(made / "wiki.model")
    outcome = command(*training(made))
    assert outcome.code == 0, outcome
    assert outcome.out.startswith(f"{made / 'wiki.model'}: trained for 4 steps")
    assert "train:" not in outcome.err
    assert folder_bytes(made / "wiki.model") == before


def test_a_text_is_continued_with_what_was_looked_up(retro: Run, made: Path) -> None:
    prompt = "The oil crisis of 1973"
    arguments = ["generate", *model_and_index(made), prompt, "--max-new-tokens", 70]
    report = json.loads(retro(*arguments, "--json").out)
    assert set(report) == {"prompt", "text", "finished", "tokens", "retrieved"}
    assert report["prompt"] == prompt
    assert 0 < report["tokens"] <= 70
    assert set(report["retrieved"]) <= {"0", "1"}
    assert len(report["retrieved"]["0"]) == 2
    first = report["retrieved"]["0"][0]
    assert set(first) == {"score", "key", "title", "url", "text", "continuation", "row", "metadata"}
    assert first["key"].startswith("wiki:")
    plain = retro(*arguments)
    assert plain.out == prompt + report["text"] + "\n"
    assert plain.err == ""


def test_streaming_prints_the_continuation(retro: Run, made: Path) -> None:
    arguments = ["generate", "--model", made / "wiki.model", "-k", 0, "The oil", "--max-new-tokens", 12]
    text = json.loads(retro(*arguments, "--json").out)["text"]
    assert retro(*arguments, "--stream").out == text + "\n"
    assert json.loads(retro(*arguments, "--stream", "--json").out)["text"] == text


def test_the_same_seed_draws_the_same_text(retro: Run, made: Path) -> None:
    arguments = ["generate", "--model", made / "wiki.model", "-k", 0, "The oil", "--temperature", 1, "--seed"]
    texts = [retro(*arguments, seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_answer_comes_with_its_passages(retro: Run, made: Path) -> None:
    arguments = ["ask", *model_and_index(made), QUESTION, "-k", 3]
    report = json.loads(retro(*arguments, "--json").out)
    assert report["question"] == QUESTION
    assert 0 <= report["confidence"] <= 1
    assert len(report["passages"]) == 3
    found = json.loads(retro("index", "search", made / "wiki.index", QUESTION, "-k", 3, "--json").out)
    assert [{key: p[key] for key in found["results"][0]} for p in report["passages"]] == found["results"]

    printed = retro(*arguments)
    assert printed.code == 0
    assert f"{report['answer'] or '(nothing)'}   (confidence {report['confidence']:.2f})\n\n" in printed.out
    for number, passage in enumerate(report["passages"], 1):
        assert passage["title"]
        shown = f"score {passage['score']:.3f}  attention {100 * passage['share']:.0f}%"
        assert f"{number:2}. {shown}  {passage['title']}  [{passage['key']}]" in printed.out
        words = passage["text"].split()[:4]
        assert " ".join(words) in printed.out


def test_without_retrieval_no_index_is_needed(retro: Run, made: Path) -> None:
    model = ["--model", made / "wiki.model", "-k", 0]
    asked = json.loads(retro("ask", *model, QUESTION, "--json").out)
    assert asked["passages"] == []
    generated = json.loads(retro("generate", *model, "The oil", "--max-new-tokens", 5, "--json").out)
    assert (generated["tokens"], generated["retrieved"]) == (5, {})
    # An index that is named is not even opened.
    ignored = retro("generate", *model, "--index", made / "nowhere", "The oil", "--max-new-tokens", 5, "--json")
    assert json.loads(ignored.out) == generated


def test_the_environment_is_reported(retro: Run) -> None:
    report = json.loads(retro("env", "--json").out)
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["packages"]["retro-lm"] == importlib.metadata.version("retro-lm")
    printed = retro("env").out
    for key in [*(set(report) - {"packages"}), *report["packages"]]:
        assert re.search(rf"^{re.escape(key)} +\S", printed, re.MULTILINE)


def test_the_version_is_printed(retro: Run) -> None:
    assert retro("--version") == (0, importlib.metadata.version("retro-lm") + "\n", "")


# Mistakes


def test_retrieval_without_an_index_is_refused(retro: Run, made: Path) -> None:
    model = ["--model", made / "wiki.model"]
    refused(retro("generate", *model, "The oil"), "needs an index", "-k 0")
    refused(retro("ask", *model, QUESTION), "needs an index", "-k 0")


def test_an_empty_prompt_or_question_is_refused(retro: Run, made: Path) -> None:
    refused(retro("generate", *model_and_index(made), " "), "the prompt is empty")
    refused(retro("ask", *model_and_index(made), " "), "the question is empty")


def test_a_model_that_is_missing_is_refused(retro: Run, made: Path) -> None:
    refused(retro("ask", "--model", made / "nowhere", "-k", 0, QUESTION), str(made / "nowhere"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_damaged_model_is_refused(retro: Run, made: Path, tmp_path: Path, name: str, how: str) -> None:
    model = tmp_path / "m.model"
    shutil.copytree(made / "wiki.model", model)
    if how == "missing":
        (model / name).unlink()
    else:
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[: len(content) // 2])
    refused(retro("generate", "--model", model, "-k", 0, "The oil"), str(model))


def test_a_model_with_the_tokenizer_of_another_is_refused(retro: Run, made: Path, tmp_path: Path) -> None:
    done("tokenizer", "train", made / "wiki.jsonl", "--vocab-size", 300, "--out", tmp_path / "other.tok")
    model = tmp_path / "m.model"
    shutil.copytree(made / "wiki.model", model)
    shutil.copy(tmp_path / "other.tok" / "tokenizer.json", model / "tokenizer.json")
    refused(retro("ask", "--model", model, "-k", 0, QUESTION), str(model))


def test_training_goes_on_only_with_data_of_the_same_tokenizer(retro: Run, made: Path, tmp_path: Path) -> None:
    tok, data, model = tmp_path / "other.tok", tmp_path / "other.data", tmp_path / "m.model"
    done("tokenizer", "train", made / "wiki.jsonl", "--vocab-size", 300, "--out", tok)
    common = ["--tokenizer", tok, "--index", made / "wiki.index", "--valid-share", 0.2]
    done("data", made / "wiki.jsonl", *common, "--out", data)
    shutil.copytree(made / "wiki.model", model)
    outcome = retro("train", "--preset", "tiny", "--data", data, "--out", model, *options(SMALL))
    refused(outcome, str(model), "--overwrite")


def test_data_with_the_tokenizer_of_another_is_refused(retro: Run, made: Path, tmp_path: Path) -> None:
    done("tokenizer", "train", made / "wiki.jsonl", "--vocab-size", 300, "--out", tmp_path / "other.tok")
    data = tmp_path / "d.data"
    shutil.copytree(made / "wiki.data", data)
    shutil.copy(tmp_path / "other.tok" / "tokenizer.json", data / "tokenizer.json")
    outcome = retro("train", "--preset", "tiny", "--data", data, "--out", tmp_path / "m.model", *options(SMALL))
    refused(outcome, str(data))


# The examples in the help

COMMANDS = [
    "index build",
    "index search",
    "index info",
    "index verify",
    "index merge",
    "index export",
    "index add",
    "index update",
    "index remove",
    "index sync",
    "plan index",
    "tokenizer train",
    "data",
    "questions",
    "train",
    "export",
    "generate",
    "ask",
    "index compact",
    "env",
]
"""In the order in which each finds what it needs; without demo, which takes minutes and has tests of its own."""


def examples(name: str) -> list[str]:
    lines = done(*name.split(), "--help").out.splitlines()
    start = next((n for n, line in enumerate(lines) if line.strip().startswith("Example")), len(lines))
    return [line.strip() for line in lines[start:] if line.strip().startswith("retro ")]


def test_every_command_has_an_example(retro: Run) -> None:
    groups = {"index", "tokenizer", "plan", "eval"}
    listed = [(group, retro(*group.split(), "--help").out) for group in ("", *groups)]
    known = set()
    for group, text in listed:
        names = re.findall(r"^  ([a-z-]+)(?:  |$)", text.partition("Commands:")[2], re.MULTILINE)
        known |= {f"{group} {name}".strip() for name in names}
    # What measures, plans of training and the server have tests of their own.
    others = {name for name in known if name.startswith("eval ")} | {"demo", "plan train", "cloze", "serve"}
    assert known - groups == {*COMMANDS, *others}
    for name in [*COMMANDS, *others]:
        assert examples(name), name
        assert all(shlex.split(line)[1:][: len(name.split())] == name.split() for line in examples(name))


@pytest.mark.slow
def test_the_examples_in_the_help_work_one_after_the_other(
    paragraphs: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "wiki.jsonl", paragraphs)
    for number, name in enumerate(("news", "corrected", "test")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": "1", "text": f"Text {number} about prices of oil in {name}."}])
    asked = {"question": "When did the 1973 oil crisis begin?", "answers": ["prices of oil"]}
    talk = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]}
    for name, record in (("nq_dev", asked), ("webq_train", asked | {"question": "Who?"}), ("talks", talk)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Prices\n\nOil is dear.")
    monkeypatch.chdir(tmp_path)
    given = {path.name for path in tmp_path.iterdir()}
    assert command("index", "build", "docs", "--out", "docs.index").code == 0
    assert command("index", "build", "wiki.jsonl", "--out", "part1.index", "--shard", "1/2").code == 0
    for name in COMMANDS:
        for line in examples(name):
            if "--base" in line or (name == "ask" and (" < " in line or '"' not in line)):
                continue  # a pretrained base: test_retrofit_training.py; a terminal, or questions from a pipe: test_ask.py
            outcome = command(*shlex.split(line)[1:])
            assert outcome.code == 0, (line, outcome)
            assert outcome.out, line
    made = {path.name for path in tmp_path.iterdir()}
    indexes = {f"{name}.index" for name in ("wiki", "docs", "part0", "part1", "merged")}
    assert made - given == indexes | {
        "wiki.tok",
        "wiki.data",
        "clean.data",
        "wiki.model",
        "wiki.int8.model",
        "wiki.parquet",
        "qa.questions",
        "chat.questions",
    }
