"""`retro ask`: one question, questions on a terminal, or questions from a pipe; what they need is loaded once.

Passages, titles and answers may hold anything: what would steer a terminal is taken out before it is shown.
"""

import contextlib
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import typer

from retro.answer import DONT_KNOW, Answer, question_prompt
from retro.attribution import Explanation
from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.errors import ConfigError, RetroError
from retro.generate import Retriever
from retro.terminal import passage_json, print_json

Mode = Literal["retro", "prompt", "closed"]
"""Passages are read by cross-attention; they are pasted into the prompt of another model; there are none."""
MODES: tuple[str, ...] = get_args(Mode)
_HELP = """\
A question is answered. Besides:
  :k 5              read so many passages
  :retriever bm25   find them by dense, bm25, hybrid or rerank
  :json             answer in JSON, or in words again
  :help             this
Ctrl-D leaves."""
_STEERING = (*range(32), *range(0x7F, 0xA0), 0x202A, 0x202B, 0x202D, 0x202E, *range(0x2066, 0x206A))
"""Control characters, and those that turn the direction of writing around."""
_BEGIN, _END = "\ue000", "\ue001"
"""Stand around what is highlighted while lines are broken; of no meaning in any text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer, and what is to be said of it."""

    answer: Answer
    why: Explanation | None
    """None where the passages were read in the prompt."""
    refused: bool
    """Whether the confidence is below the one that is asked for."""
    left_out: int
    """Passages that were found and did not fit into the context."""
    search_s: float
    answer_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain data; `answer` is what the model said even where it is refused."""
        answer, why = self.answer, self.why
        passages = [
            passage_json(passage)
            | {
                "share": None if why is None else round(float(why.share_P[number]), 4),
                "span": None if why is None or why.spans[number] is None else list(why.spans[number] or ()),
            }
            for number, passage in enumerate(answer.passages)
        ]
        tokens = () if why is None else zip(why.tokens, why.log_prob_n.tolist(), why.share_nP.tolist(), strict=True)
        return {
            "question": answer.question,
            "answer": answer.text,
            "confidence": round(answer.confidence, 4),
            "refused": self.refused,
            "passages": passages,
            "tokens": [
                {"text": text, "log_prob": round(log_prob, 4), "shares": [round(share, 4) for share in shares]}
                for text, log_prob, shares in tokens
            ],
            "passages_left_out": self.left_out,
            "prompt_tokens": answer.prompt_tokens,
            "seconds": {"search": round(self.search_s, 3), "answer": round(self.answer_s, 3)},
        }

    def to_text(self, *, styled: bool, width: int) -> str:
        """Lines for people."""
        answer, why = self.answer, self.why
        said = clean(answer.text) or "(nothing)"
        if self.refused:
            would = f"({said}, confidence {answer.confidence:.2f})"
            lines = [f"{_styled(DONT_KNOW, styled, bold=True)}   {_styled(would, styled, dim=True)}"]
        else:
            lines = [f"{_styled(said, styled, bold=True)}   (confidence {answer.confidence:.2f})"]
        if why is None or not answer.passages:
            lines.append(_styled(f"{answer.prompt_tokens:,} tokens of prompt, {self.answer_s:.1f} s", styled, dim=True))
        if self.left_out:
            lines.append(
                f"{self.left_out} of {self.left_out + len(answer.passages)} passages did not fit into the context."
            )
        for number, passage in enumerate(answer.passages):
            share = "" if why is None else f"  attention {100 * why.share_P[number]:.0f}%"
            name = f"{clean(passage.title or passage.key)}  [{clean(passage.key)}]"
            link = f"  {clean(passage.url)}" if passage.url else ""
            lines += ["", f"{number + 1:2}. score {passage.score:.3f}{share}  {name}{link}"]
            lines.append(_filled(passage.full_text, None if why is None else why.spans[number], styled, width))
        return "\n".join(lines)


@dataclass(slots=True, kw_only=True)
class Asker:
    """Answers questions with what is loaded."""

    answer: Callable[..., tuple[Answer, Explanation | None]]
    """`retro.attribution.ask_and_explain` of a model, or `retro.prompted.PromptedModel.ask`."""
    config: GenerateConfig
    min_confidence: float = 0.0
    """Answers below it are not given."""
    retriever: Retriever | None = None
    """None for a closed book."""
    set_method: Callable[[str], None] | None = None
    """Changes how passages are found."""
    as_json: bool = False

    def reply(self, question: str, on_token: Callable[[int, str], None] | None = None) -> Reply:
        """Finds passages and answers.

        Raises:
            RetroError: What cannot be asked or found.
        """
        question_prompt(question)
        began = time.monotonic()
        found: list[Passage] = []
        if self.retriever is not None and self.config.num_neighbors:
            found = self.retriever.retrieve([question], self.config.num_neighbors, role="query")[0]
        searched = time.monotonic()
        answer, why = self.answer(question, found, self.config, on_token=on_token)
        return Reply(
            answer=answer,
            why=why,
            refused=answer.confidence < self.min_confidence,
            left_out=len(found) - len(answer.passages),
            search_s=searched - began,
            answer_s=time.monotonic() - searched,
        )

    def ask_once(self, question: str) -> None:
        """Answers the question of a command line."""
        if self.as_json:
            print_json(self.reply(question).to_json())
            return
        self._show(question)

    def ask_each(self, lines: Iterable[str]) -> bool:
        """Answers questions, one a line, as they come; what cannot be asked is reported and does not stop the others.

        Args:
            lines: Bytes that are no text in them are surrogates, as of errors="surrogateescape".

        Returns:
            Whether all were answered.

        Raises:
            ConfigError: There is none.
        """
        count, failed = 0, 0
        for line in filter(None, map(str.strip, lines)):
            count += 1
            question = line.encode(errors="replace").decode()
            try:
                if question != line:
                    raise ConfigError(f"question {count} is not in UTF-8")
                if self.as_json:
                    typer.echo(json.dumps(self.reply(question).to_json(), ensure_ascii=False))
                else:
                    typer.echo(f"{'' if count == 1 else chr(10)}> {clean(question)}")
                    self._show(question)
            except RetroError as error:
                failed += 1
                if self.as_json:
                    typer.echo(json.dumps({"question": question, "error": str(error)}, ensure_ascii=False))
                else:
                    typer.echo(f"Error: {error}", err=True)
        if count == 0:
            raise ConfigError("there is no question: give one, or pipe questions in, one a line")
        return failed == 0

    def converse(self) -> None:
        """Answers questions that are typed on a terminal, until it is left."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited and called back

        typer.echo("Ask a question; :help for more, Ctrl-D leaves.")
        while True:
            try:
                line = input("\n> ").strip()
                if line.startswith(":"):
                    self._command(line[1:])
                elif line and self.as_json:
                    typer.echo(json.dumps(self.reply(line).to_json(), ensure_ascii=False))
                elif line:
                    self._show(line)
            except EOFError:
                typer.echo("")
                return
            except KeyboardInterrupt:
                typer.echo("")
            except RetroError as error:
                typer.echo(f"Error: {error}", err=True)

    def _command(self, line: str) -> None:
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "help":
            typer.echo(_HELP)
        elif name == "json" and not value:
            self.as_json = not self.as_json
            typer.echo(f"answers in {'JSON' if self.as_json else 'words'}")
        elif name == "k" and value.isdecimal():
            if self.retriever is None and int(value):
                raise ConfigError("there is no index to find passages in: start again with --index")
            self.config = replace(self.config, num_neighbors=int(value))
            typer.echo(f"{value} passages are read")
        elif name == "retriever" and value:
            if self.set_method is None:
                raise ConfigError("there is no index to find passages in: start again with --index")
            self.set_method(value)
            typer.echo(f"passages are found by {value}")
        else:
            raise ConfigError(f":{clean(line)} is no command; :help lists them")

    def _show(self, question: str) -> None:
        on_terminal = sys.stdout.isatty()
        styled = on_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        with _streamed(on_terminal) as on_token:
            reply = self.reply(question, on_token)
        width = min(shutil.get_terminal_size((100, 24)).columns, 110)
        typer.echo(reply.to_text(styled=styled, width=width))


@contextlib.contextmanager
def _streamed(on_terminal: bool) -> Iterator[Callable[[int, str], None] | None]:
    """Shows an answer while it is made; it is wiped away again, as only its end tells whether it is one."""
    if not on_terminal:
        yield None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    said = Text(style="dim")

    def add(_: int, piece: str) -> None:
        said.append(clean(piece))

    with Live(said, console=Console(highlight=False), transient=True, refresh_per_second=20):
        yield add


def clean(text: str) -> str:
    """A text without what would steer a terminal."""
    return text.translate(dict.fromkeys(_STEERING, " "))


def _styled(text: str, styled: bool, **style: bool) -> str:
    return typer.style(text, **style) if styled else text


def _filled(text: str, span: tuple[int, int] | None, styled: bool, width: int) -> str:
    """A passage in lines, a part of it highlighted."""
    text = text.replace(_BEGIN, " ").replace(_END, " ")
    if span is not None and styled and (part := text[slice(*span)].strip()):
        start = span[0] + text[slice(*span)].index(part)
        end = start + len(part)
        text = f"{text[:start]}{_BEGIN}{text[start:end]}{_END}{text[end:]}"
    indent = " " * 4
    filled = textwrap.fill(
        " ".join(clean(text).split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    lines, inside = [], False
    for line in filled.split("\n"):
        shown = f"{indent}{_BEGIN}{line[len(indent) :]}" if inside else line
        inside = shown.rfind(_BEGIN) > shown.rfind(_END)
        lines.append(f"{shown}{_END}" if inside else shown)
    on, off = "\x1b[1;7m", "\x1b[0m"
    return "\n".join(lines).replace(_BEGIN, on).replace(_END, off)
