"""Continuations in the form of OpenAI's API: whole, and as streams of chunks."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from retro.serve.engine import Token, Update
from retro.serve.schemas import ChatRequest, CompletionRequest
from retro.serve.service import Plan, Service, passages_out, usage
from retro.serve.stream import event
from retro.tokenizer import Tokenizer


class Form:
    """How the choices of one request look."""

    def __init__(self, body: CompletionRequest | ChatRequest, plan: Plan, service: Service) -> None:
        self.is_chat = isinstance(body, ChatRequest)
        self._body, self._plan, self._service = body, plan, service
        self._tokenizer = service.model.tokenizer
        wants = body.logprobs if isinstance(body, ChatRequest) else body.logprobs is not None
        self._wants_log_probs = bool(wants)
        self._head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.config.model_name,
        }

    async def reply(self) -> dict[str, Any]:
        """The whole reply."""
        updates = await self._service.engine.complete(self._plan.tasks)
        choices = []
        for number, update in enumerate(updates):
            choice: dict[str, Any] = {"index": number, "finish_reason": update.finish}
            choice["logprobs"] = self._log_probs(update.tokens, 0)
            if self.is_chat:
                text = update.text.removeprefix(self._service.model.chat.leading)
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = update.text
            choices.append(choice)
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {
            **self._head,
            "object": kind,
            "choices": choices,
            "usage": usage(self._plan.prompt_tokens, sum(len(update.tokens) for update in updates)),
            "retro": self._retro(updates),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The reply in chunks."""
        body, plan = self._body, self._plan
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        more = {"usage": None} if wants_usage else {}
        chars = [0] * len(plan.tasks)
        tokens = 0
        if self.is_chat:
            for number in range(len(plan.tasks)):
                first = {
                    "index": number,
                    "delta": {"role": "assistant", "content": ""},
                    "finish_reason": None,
                    "logprobs": None,
                }
                yield event(self._chunk([first], more | ({"retro": self._retro([])} if number == 0 else {})))
        ended: list[Update] = [Update() for _ in plan.tasks]
        is_silent = [self.is_chat] * len(plan.tasks)
        left = len(plan.tasks)
        async for number, update in self._service.engine.stream(plan.tasks):
            tokens += len(update.tokens)
            left -= update.finish is not None
            if is_silent[number] and update.text:
                is_silent[number] = False
                update.text = update.text.removeprefix(self._service.model.chat.leading)
            if update.text or (self._wants_log_probs and update.tokens) or update.finish:
                choice: dict[str, Any] = {"index": number, "finish_reason": None}
                choice["logprobs"] = self._log_probs(update.tokens, chars[number])
                text = (
                    {"delta": {"content": update.text} if update.text else {}}
                    if self.is_chat
                    else {"text": update.text}
                )
                choice |= text
                if update.finish is not None:
                    choice["finish_reason"] = update.finish
                    ended[number] = update
                last = {} if left or self.is_chat else {"retro": self._retro(ended)}
                yield event(self._chunk([choice], more | last))
            chars[number] += sum(len(token.text) for token in update.tokens)
        if wants_usage:
            yield event(self._chunk([], {"usage": usage(plan.prompt_tokens, tokens)}))
        yield event("[DONE]")

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **more}

    def _retro(self, updates: Sequence[Update]) -> dict[str, Any]:
        """What was looked up: for a chat once, for a completion at the chunks of each choice."""
        if self.is_chat:
            passages = passages_out(self._plan.passages)
        else:
            passages = []
            for choice, update in enumerate(updates):
                found = {} if update.generation is None else update.generation.retrieved
                for chunk, few in found.items():
                    passages += [{**passage, "choice": choice, "chunk": chunk} for passage in passages_out(few)]
        return {"k": self._plan.search.k, "retriever": self._plan.search.method, "passages": passages}

    def _log_probs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        if not self._wants_log_probs:
            return None
        if self.is_chat:
            content = []
            for token in tokens:
                entry = _entry(self._tokenizer, token.id, token.log_prob)
                entry["top_logprobs"] = [_entry(self._tokenizer, *pair) for pair in token.alternatives]
                content.append(entry)
            return {"content": content, "refusal": None}
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [_name(self._tokenizer, token.id) for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": [
                {_name(self._tokenizer, number): log_prob for number, log_prob in token.alternatives}
                for token in tokens
            ],
            "text_offset": offsets,
        }


def _name(tokenizer: Tokenizer, number: int) -> str:
    """A token's text alone; of a special one its name, of one without whole characters the tokenizer's own."""
    text = tokenizer.decode([number])
    return text if text and "\ufffd" not in text else str(tokenizer.backend.id_to_token(number))


def _entry(tokenizer: Tokenizer, number: int, log_prob: float) -> dict[str, Any]:
    text = tokenizer.decode([number])
    is_whole = bool(text) and "\ufffd" not in text
    return {
        "token": _name(tokenizer, number),
        "logprob": log_prob,
        "bytes": list(text.encode()) if is_whole else None,
    }
