"""Messages of a chat as a prompt: as models of ours are trained on them, or by the template that a model came with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from retro.artifact import read_json
from retro.chat import END, Message, chat_prompt
from retro.errors import ConfigError, FormatError
from retro.generate import prompt_ids
from retro.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model wants chats to be written."""

    tokenizer: Tokenizer
    template: str | None
    """None: as models of ours are trained."""
    backend: tokenizers.Tokenizer
    """The tokenizer once more; this one takes the names of special tokens for these tokens."""
    controls: tuple[str, ...]
    """Names of its special tokens."""

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
        return cls(tokenizer, template, backend, tuple(special))

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
        if self.template is None:
            return prompt_ids(chat_prompt(messages), self.tokenizer)
        for number, message in enumerate(messages):
            for control in self.controls:
                if control in message["content"]:
                    raise ConfigError(f"messages[{number}] holds {control}, which separates messages: leave it out")
        ids = list(self.backend.encode(self._rendered(self.template, messages), add_special_tokens=False).ids)
        bos_id = self.tokenizer.bos_id
        return ids if ids[:1] == [bos_id] else [bos_id, *ids]

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
