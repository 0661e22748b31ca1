"""Conversations as prompts: in the form ChatML, as models of our own learn them, or by the template that a tokenizer came with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import tokenizers

from retro.artifact import read_json, write_atomically
from retro.errors import ConfigError, FormatError
from retro.pretrained_encoder import encoder_place
from retro.tokenizer import Tokenizer

START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
"""Files of Hugging Face transformers that hold a template; the first counts."""


class Message(TypedDict):
    """One turn."""

    role: str
    content: str


def check_messages(messages: Any, place: str) -> list[Message]:
    """Messages as they come from a file or a request.

    Args:
        messages: Should be a list of {"role", "content"}.
        place: Where they stand, for the error.

    Raises:
        FormatError: They are something else, or none is a user's.
    """
    if not isinstance(messages, list) or not messages:
        raise FormatError(f'{place}: `messages` must be a list of {{"role", "content"}} that is not empty')
    checked: list[Message] = []
    for number, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise FormatError(
                f"{place}: message {number} must have a role ({', '.join(ROLES)}) and a content that is a string"
            )
        checked.append({"role": message["role"], "content": message["content"]})
    if not any(message["role"] == "user" for message in checked):
        raise FormatError(f"{place}: no message is a user's, so there is nothing to answer")
    return checked


def chat_prompt(messages: Sequence[Message]) -> str:
    """All that stands before the answer of the assistant; the markers are plain text to our tokenizers.

    A marker that a message contains itself loses its bars, so that nobody speaks in another's name.
    """
    turns = "".join(f"{START}{m['role']}\n{_plain(m['content'])}{END}\n" for m in messages)
    return f"{turns}{START}assistant\n"


def last_user_message(messages: Sequence[Message]) -> str:
    """What passages are looked up for; at least one message is a user's."""
    return [message["content"] for message in messages if message["role"] == "user"][-1]


def _plain(text: str) -> str:
    return text.replace(START, "<im_start>").replace(END, "<im_end>").strip()


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model learns conversations, and wants them to be written."""

    tokenizer: Tokenizer
    template: str | None
    """Jinja; None: ChatML, whose markers are plain text."""
    backend: tokenizers.Tokenizer
    """The tokenizer once more; this one takes the names of special tokens for these tokens."""
    controls: tuple[str, ...]
    """Names of its special tokens."""

    @classmethod
    def of(cls, name: str | Path | None, tokenizer: Tokenizer) -> "ChatFormat":
        """That of a tokenizer.

        Args:
            name: Where it came from, as `Tokenizer.load` takes it; None: ChatML, wherever that was.
            tokenizer: It.

        Raises:
            FormatError: See `chat_template`.
        """
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        backend.encode_special_tokens = False
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        return cls(tokenizer, None if name is None else chat_template(name), backend, tuple(special))

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends an answer besides EOS."""
        return () if self.template is not None else (END,)

    @property
    def leading(self) -> str:
        """What an answer begins with that is none of it: models of ours learn answers behind a space."""
        return " " if self.template is None else ""

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt, BOS in front.

        Raises:
            ConfigError: The template refuses the messages, or one of them holds a special token's name.
        """
        bos_id = self.tokenizer.bos_id
        if self.template is None:
            return [bos_id, *self.tokenizer.encode(chat_prompt(messages)).ids.tolist()]
        for number, message in enumerate(messages):
            for control in self.controls:
                if control in message["content"]:
                    raise ConfigError(f"messages[{number}] holds {control}, which separates messages: leave it out")
        ids = list(self.backend.encode(self._rendered(self.template, messages), add_special_tokens=False).ids)
        return ids if ids[:1] == [bos_id] else [bos_id, *ids]

    def answer_ids(self, answer: str) -> list[int]:
        """An answer as it follows the prompt, without EOS."""
        ids: list[int] = self.tokenizer.encode(self.leading + answer.strip()).ids.tolist()
        return ids

    def _rendered(self, template: str, messages: Sequence[Message]) -> str:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        backend = self.tokenizer.backend
        try:
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=template,
                add_generation_prompt=True,
                bos_token=backend.id_to_token(self.tokenizer.bos_id),
                eos_token=backend.id_to_token(self.tokenizer.eos_id),
            )[0]
        except TemplateError as error:
            raise ConfigError(f"the model's chat template refuses these messages: {error}") from error
        return str(rendered[0])


def chat_template(name: str | Path, revision: str | None = None) -> str | None:
    """The template beside a tokenizer, as transformers stores it; None where there is none, as beside a single `tokenizer.json`.

    Args:
        name: A folder, a file, or a name on the Hugging Face hub.
        revision: On the hub.

    Raises:
        FormatError: It has several templates, of which none is the default.
    """
    path = Path(encoder_place(str(name)))
    if path.is_file():
        return None
    if path.is_dir():
        files: dict[str, Path | None] = {file: path / file for file in (TEMPLATE, SETTINGS)}
    else:
        files = {file: _of_hub(str(name), file, revision) for file in (TEMPLATE, SETTINGS)}
    template, settings = files[TEMPLATE], files[SETTINGS]
    if template is not None and template.is_file():
        return template.read_text(encoding="utf-8")
    if settings is None or not settings.is_file():
        return None
    found = read_json(settings).get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if found is None:
            raise FormatError(f"{settings} has several chat templates, none by the name `default`: keep one, as a text")
    if found is not None and not isinstance(found, str):
        raise FormatError(f"{settings}: the chat template is no text")
    return found


def save_template(folder: Path, template: str | None) -> None:
    """Puts a template, where there is one, into a folder."""
    if template is not None:
        write_atomically(folder / TEMPLATE, lambda file: file.write(template.encode()))


def _of_hub(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a model on the hub, or in the hub's cache on this machine; None where it has no such file."""
    from transformers.utils.hub import cached_files

    found = cached_files(
        name,
        [file],
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found[0]) if found else None
