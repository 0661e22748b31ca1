"""Conversations as text in the form ChatML, for models of our own. Models of Hugging Face bring a template with their tokenizer."""

from collections.abc import Sequence
from typing import Any, TypedDict

from retro.errors import FormatError

START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")


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
