"""Messages of a chat as a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from retro.artifact import read_json
from retro.errors import ConfigError, FormatError
from retro.tokenizer import Tokenizer

START, END = "<|im_start|>", "<|im_end|>"


class Turn(NamedTuple):
    """A message of a chat."""

    role: str
    text: str


def chat_prompt(messages: Sequence[Turn]) -> str:
    """ChatML, up to where the assistant's answer begins."""
    return "".join(f"{START}{role}\n{text}{END}\n" for role, text in messages) + f"{START}assistant\n"


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model wants chats to be written: by a template that came with it, else in ChatML."""

    tokenizer: Tokenizer
    template: str | None
    backend: tokenizers.Tokenizer
    """The tokenizer once more; this one takes the names of special tokens for these tokens."""
    controls: tuple[str, ...]
    """Texts that separate messages."""

    @classmethod
    def of(cls, folder: Path, tokenizer: Tokenizer) -> "ChatFormat":
        """That of a model folder, as transformers stores it.

        Raises:
            FormatError: It has several templates.
        """
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        backend.encode_special_tokens = False
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        path, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        template = None
        if path.is_file():
            template = path.read_text(encoding="utf-8")
        elif settings.is_file():
            template = read_json(settings).get("chat_template")
        if template is not None and not isinstance(template, str):
            raise FormatError(f"{settings}: several chat templates are not supported; keep one, as a text")
        return cls(tokenizer, template, backend, tuple(dict.fromkeys((START, END, *special))))

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends an answer besides EOS."""
        return () if self.template is not None else (END,)

    def ids(self, messages: Sequence[Turn]) -> list[int]:
        """The prompt, BOS in front.

        Raises:
            ConfigError: A message holds what separates messages, or the template refuses them.
        """
        for number, message in enumerate(messages):
            for control in self.controls:
                if control in message.text:
                    raise ConfigError(f"messages[{number}] holds {control}, which separates messages: leave it out")
        text = chat_prompt(messages) if self.template is None else self._rendered(self.template, messages)
        ids = list(self.backend.encode(text, add_special_tokens=False).ids)
        bos_id = self.tokenizer.bos_id
        return ids if ids[:1] == [bos_id] else [bos_id, *ids]

    def _rendered(self, template: str, messages: Sequence[Turn]) -> str:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = [{"role": role, "content": text} for role, text in messages]
        backend = self.tokenizer.backend
        try:
            rendered: Any = render_jinja_template(
                conversations=[conversation],
                chat_template=template,
                add_generation_prompt=True,
                bos_token=backend.id_to_token(self.tokenizer.bos_id),
                eos_token=backend.id_to_token(self.tokenizer.eos_id),
            )[0]
        except TemplateError as error:
            raise ConfigError(f"the model's chat template refuses these messages: {error}") from error
        return str(rendered[0])
