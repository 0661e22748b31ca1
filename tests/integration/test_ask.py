"""`retro ask`: answers with their sources, what is not known, a conversation, questions from a pipe, other models, bad input."""

import contextlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
import transformers
from builders import speak_up, toy_model_config
from commands import Outcome, command, refused

from index_builder.build import build_index
from index_builder.config import BuildConfig
from index_builder.search import IndexRetriever
from retro.answer import answer_config, ask, passage_text
from retro.attribution import explain
from retro.checkpoint import load_model, save_model
from retro.model import Retro
from retro.threshold import Threshold, save_threshold
from retro.tokenizer import Tokenizer

Run = Callable[..., Outcome]
QUESTION = "When did the 1973 oil crisis begin?"
one_thread = pytest.fixture(autouse=True)(builders.one_thread)


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough that passages move tokens. Not to be altered: copy it."""
    tokenizer = Tokenizer.load(str(tokenizer_folder))
    network = Retro(toy_model_config(vocab_size=tokenizer.vocab_size, cca_layers=(1, 2), chunk_len=16))
    speak_up(network)
    folder = tmp_path_factory.mktemp("model") / "toy.model"
    save_model(folder, network, tokenizer)
    return folder


@pytest.fixture(scope="module")
def llama(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with the same tokenizer, which takes 400 tokens."""
    tokenizer = Tokenizer.load(str(model))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=400,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        initializer_range=0.5,
    )
    folder = tmp_path_factory.mktemp("llama") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder / name)
    return folder


@pytest.fixture
def arguments(model: Path, tiny_index: Path) -> list[object]:
    return ["ask", "--model", model, "--index", tiny_index, "--device", "cpu", "-k", 3, "--max-new-tokens", 8]


def test_an_answer_has_its_passages_with_shares_and_spans(
    retro: Run, arguments: list[object], model: Path, tiny_index: Path
) -> None:
    report = json.loads(retro(*arguments, QUESTION, "--json").out)
    loaded, tokenizer, _ = load_model(model)
    expected = ask(
        loaded,
        tokenizer,
        QUESTION,
        retriever=IndexRetriever.open(tiny_index, method="auto"),
        config=answer_config(3, 8),
    )
    why = explain(loaded, tokenizer, expected)
    assert (report["question"], report["answer"], report["refused"]) == (QUESTION, expected.text, False)
    assert report["confidence"] == round(expected.confidence, 4)
    assert report["prompt_tokens"] == expected.prompt_tokens
    assert [p["key"] for p in report["passages"]] == [p.key for p in expected.passages]
    assert [p["share"] for p in report["passages"]] == [round(s, 4) for s in why.share_P.tolist()]
    assert [p["span"] and tuple(p["span"]) for p in report["passages"]] == list(why.spans)
    assert "".join(token["text"] for token in report["tokens"]).strip() == expected.text
    assert [token["shares"] for token in report["tokens"]] == [[round(s, 4) for s in n] for n in why.share_nP.tolist()]

    printed = retro(*arguments, QUESTION)
    assert printed.out.startswith(f"{expected.text}   (confidence {expected.confidence:.2f})\n")
    for passage, share in zip(expected.passages, why.share_P, strict=True):
        assert f"attention {100 * share:.0f}%  {passage.title}  [{passage.key}]" in printed.out
        assert " ".join(passage.full_text.split()) in " ".join(printed.out.split())
    assert "\x1b" not in printed.out
    assert printed.err == ""


# What is not known


def test_below_the_confidence_that_is_asked_for_it_does_not_know(retro: Run, arguments: list[object]) -> None:
    sure = json.loads(retro(*arguments, QUESTION, "--json").out)
    above, below = sure["confidence"] + 0.01, sure["confidence"] - 0.01
    unsure = json.loads(retro(*arguments, QUESTION, "--json", "--min-confidence", above).out)
    assert (unsure["refused"], unsure["answer"]) == (True, sure["answer"])
    printed = retro(*arguments, QUESTION, "--min-confidence", above).out
    assert printed.startswith(f"I don't know   ({sure['answer']}, confidence {sure['confidence']:.2f})\n")
    assert not json.loads(retro(*arguments, QUESTION, "--json", "--min-confidence", below).out)["refused"]


def test_the_confidence_that_was_chosen_for_the_model_holds_unless_told_otherwise(
    retro: Run, model: Path, tiny_index: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "toy.model")
    chosen = Threshold(min_confidence=1.0, coverage=0.1, accuracy=0.9, chosen_on="dev", command="")
    save_threshold(tmp_path / "toy.model", chosen)
    arguments = ["ask", "--model", tmp_path / "toy.model", "--index", tiny_index, QUESTION, "-k", 2]
    assert retro(*arguments).out.startswith("I don't know   (")
    assert not retro(*arguments, "--min-confidence", 0).out.startswith("I don't know")
    answers = tmp_path / "toy.model" / "answers.json"
    answers.write_text(answers.read_text().replace("1.0", "0.0"))
    refused(retro(*arguments), "answers.json was altered")


# Many questions


def test_questions_from_a_pipe_are_answered_one_a_line(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [QUESTION, "Who was it?", "\xbfQui\xe9n? \U0001f408 \u8ab0"]
    alone = [json.loads(command(*arguments, question, "--json").out) for question in questions]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([questions[0], "", "word " * 10_000, *questions[1:]])))
    outcome = command(*arguments, "--json")
    assert outcome.code == 1  # one could not be asked
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert "the question is too long" in lines.pop(1)["error"]
    for line, single in zip(lines, alone, strict=True):
        assert line | {"seconds": None} == single | {"seconds": None}

    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions)))
    outcome = command(*arguments)
    assert outcome.code == 0
    heads = [
        f"> {question}\n{single['answer']}   (confidence" for question, single in zip(questions, alone, strict=True)
    ]
    places = [outcome.out.index(head) for head in heads]
    assert places == sorted(places)

    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    refused(command(*arguments), "there is no question")


def test_bytes_of_a_pipe_that_are_no_text_are_reported_and_the_others_answered(arguments: list[object]) -> None:
    asked = f"{QUESTION}\n".encode()
    done = subprocess.run(
        [sys.executable, "-m", "retro", *map(str, arguments), "--json"],
        input=asked + b"\xff\xfe?\n" + asked,
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert (done.returncode, done.stderr) == (1, b"")
    assert [line.get("error") for line in lines] == [None, "question 2 is not in UTF-8", None]
    assert lines[0]["answer"] == lines[2]["answer"]


class Terminal:
    """What a person sees of a command that runs on a terminal."""

    def __init__(self) -> None:
        self.shown = b""
        self._master, slave = pty.openpty()
        self._files = [os.fdopen(slave, "r"), os.fdopen(os.dup(slave), "w")]
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def type(self, *lines: str) -> None:
        os.write(self._master, "".join(f"{line}\n" for line in lines).encode() + b"\x04")

    @contextlib.contextmanager
    def connected(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", self._files[0])
            patch.setattr(sys, "stdout", self._files[1])
            yield
        for file in self._files:
            file.close()
        self._reader.join()
        os.close(self._master)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while data := os.read(self._master, 4096):
                self.shown += data


def converse(monkeypatch: pytest.MonkeyPatch, arguments: list[object], *lines: str) -> tuple[str, str]:
    """What a conversation shows, and what it reports on stderr."""
    from retro.cli import main

    terminal, errors = Terminal(), io.StringIO()
    terminal.type(*lines)
    with terminal.connected(monkeypatch), contextlib.redirect_stderr(errors):
        monkeypatch.setattr(sys, "argv", ["retro", *map(str, arguments)])
        with contextlib.suppress(SystemExit):
            main()
    return terminal.shown.decode().replace("\r\n", "\n"), errors.getvalue()


def test_a_conversation_on_a_terminal(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    sure = json.loads(command(*arguments, QUESTION, "--json").out)
    words = json.loads(
        command(*arguments[:-4], "-k", 1, "--max-new-tokens", 8, "--retriever", "bm25", QUESTION, "--json").out
    )
    shown, errors = converse(
        monkeypatch,
        arguments,
        QUESTION,
        ":k 1",
        ":retriever bm25",
        ":json",
        QUESTION,
        ":k many",
        ":k \u00b2",
        ":retriever x",
        " ",
        ":help",
    )
    assert f"\x1b[1m{sure['answer']}\x1b[0m   (confidence {sure['confidence']:.2f})" in shown
    for passage in sure["passages"]:
        assert f"attention {100 * passage['share']:.0f}%  {passage['title']}" in shown
    spans = [(p["text"] + p["continuation"])[slice(*p["span"])].split() for p in sure["passages"] if p["span"]]
    assert spans
    for span in spans:
        assert f"\x1b[1;7m{span[0]}" in shown
    assert shown.count("\x1b[1;7m") >= len(spans)
    line = next(line for line in shown.split("\n") if '{"question"' in line)
    assert json.loads(line[line.index("{") :]) | {"seconds": None} == words | {"seconds": None}
    assert "Error: :k many is no command" in errors
    assert "Error: :k \u00b2 is no command" in errors
    assert "Error: retriever 'x' is unknown" in errors
    assert "Ctrl-D leaves." in shown.split(":help\n")[-1]


def test_without_colors_nothing_is_highlighted(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown, errors = converse(monkeypatch, arguments, QUESTION)
    assert "(confidence" in shown
    assert "\x1b[1m" not in shown
    assert "\x1b[1;7m" not in shown
    assert errors == ""


# Other ways to answer


def test_a_closed_book_reads_nothing(retro: Run, arguments: list[object]) -> None:
    closed = json.loads(retro(*arguments, QUESTION, "--mode", "closed", "--json").out)
    none = json.loads(retro(*arguments, QUESTION, "-k", 0, "--json").out)
    assert closed["passages"] == []
    assert closed | {"seconds": None} == none | {"seconds": None}


def test_passages_in_the_prompt_of_another_model(retro: Run, llama: Path, tiny_index: Path) -> None:
    arguments = ["ask", "--mode", "prompt", "--model", llama, "--index", tiny_index, QUESTION, "--max-new-tokens", 8]
    found = json.loads(retro("index", "search", tiny_index, QUESTION, "-k", 20, "--json").out)["results"]
    few = json.loads(retro(*arguments, "-k", 1, "--json").out)
    assert (few["passages_left_out"], len(few["passages"])) == (0, 1)
    assert (few["passages"][0]["share"], few["passages"][0]["span"], few["tokens"]) == (None, None, [])
    many = json.loads(retro(*arguments, "-k", 20, "--json").out)
    left_out = many["passages_left_out"]
    assert 0 < left_out < 20
    assert [p["key"] for p in many["passages"]] == [p["key"] for p in found[: 20 - left_out]]
    assert few["prompt_tokens"] < many["prompt_tokens"] <= 400 - 8
    printed = retro(*arguments, "-k", 20).out
    assert f"{many['prompt_tokens']} tokens of prompt, " in printed
    assert f"{left_out} of 20 passages did not fit into the context." in printed
    closed = json.loads(retro("ask", "--mode", "prompt", "--model", llama, "-k", 0, QUESTION, "--json").out)
    assert closed["prompt_tokens"] < few["prompt_tokens"]


# Bad input


def test_an_index_without_titles_has_none_in_what_is_read(
    retro: Run, model: Path, paragraphs: list[dict[str, Any]], tiny_encoder: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "plain.jsonl"
    rows = [{"id": str(n), "text": f"{record['text']} \x1b[31mred\u202e"} for n, record in enumerate(paragraphs[:6])]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_index([str(corpus)], tmp_path / "plain.index", BuildConfig(encoder=str(tiny_encoder), chunk_len=32))
    arguments = ["ask", "--model", model, "--index", tmp_path / "plain.index", QUESTION, "-k", 4, "--max-new-tokens", 4]
    report = json.loads(retro(*arguments, "--json").out)
    assert [p["title"] for p in report["passages"]] == [""] * 4
    for passage in IndexRetriever.open(tmp_path / "plain.index", method="auto").retrieve([QUESTION], 4, role="query")[
        0
    ]:
        assert passage_text(passage) == f"source: {passage.full_text}"
    printed = retro(*arguments).out
    for passage in report["passages"]:
        assert f"  {passage['key']}  [{passage['key']}]" in printed
    assert "\x1b" not in printed
    assert "\u202e" not in printed


def test_what_cannot_be_asked_is_refused(retro: Run, arguments: list[object], tmp_path: Path) -> None:
    refused(retro(*arguments, " \n"), "the question is empty")
    refused(retro(*arguments, "word " * 10_000), "the question is too long", "at most 512")
    refused(retro(*arguments, QUESTION, "-k", 1_000_000), "k = 1000000 is more than the")
    refused(retro(*arguments, QUESTION, "--mode", "prompt", "--model", tmp_path / "none"), str(tmp_path / "none"))
    for wrong in (["--mode", "open"], ["--retriever", "guess"], ["-k", -1], ["--min-confidence", 2]):
        assert retro(*arguments, QUESTION, *wrong).code == 2


def test_questions_in_any_language_are_answered(retro: Run, arguments: list[object]) -> None:
    questions = [
        "Wann begann die \xd6lkrise?",
        "\u77f3\u6cb9\u5371\u673a\u4f55\u65f6\u5f00\u59cb\uff1f",
        "\u0645\u062a\u0649 \u0628\u062f\u0623\u062a \u0623\u0632\u0645\u0629 \u0627\u0644\u0646\u0641\u0637\u061f",
        "\U0001f6e2\ufe0f\U0001f4c5?",
    ]
    for question in questions:
        report = json.loads(retro(*arguments, question, "--json").out)
        assert report["question"] == question
        assert len(report["passages"]) == 3
