"""What a server does for its requests: passages, texts and answers, within its limits."""

import asyncio
import dataclasses
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index_builder.filters import Filter
from index_builder.search import AUTO, Method, settled
from retro.answer import NEIGHBOR_LEN, answer_config, answer_prompt, passage_text, to_answer
from retro.attribution import Explanation, explain
from retro.chat import ChatFormat, last_user_message
from retro.checkpoint import load_model
from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.errors import ConfigError
from retro.generate import Prompt, prompt_ids
from retro.serve.config import Key, Keys, ServeConfig
from retro.serve.engine import Engine, Task, Update
from retro.serve.errors import ApiError
from retro.serve.gate import Gate
from retro.serve.library import Bound, Library, Question
from retro.serve.metrics import Metrics
from retro.serve.schemas import AskRequest, ChatRequest, CompletionRequest, Generating
from retro.serve.stream import event
from retro.threshold import load_threshold
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
LONG_TEXT = 20_000
"""Characters from which on a prompt is tokenized beside the event loop."""
CHAT_TOKENS = 256
"""Of an answer where a request does not say."""
COMPLETION_TOKENS = 16
"""As OpenAI's."""
LEAST = 1e-4
"""Of temperature and top_p, besides a temperature of 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """An open model."""

    network: Any
    tokenizer: Tokenizer
    num_neighbors: int
    """K at chunk borders where a request does not say."""
    neighbor_len: int
    min_confidence: float
    """Below it the model does not know the answer to a question."""
    chat: ChatFormat
    created: int
    """When it was made, in seconds since 1970."""

    @classmethod
    def open(cls, folder: Path, device: str) -> "Model":
        """Opens a model folder, ours or RETROfitted.

        Raises:
            FormatError, MismatchError, ConfigError: As `load_model`.
        """
        network, tokenizer, info = load_model(folder, device)
        threshold = load_threshold(folder)
        return cls(
            network=network,
            tokenizer=tokenizer,
            num_neighbors=info["num_neighbors"],
            neighbor_len=info["neighbor_len"],
            min_confidence=0.0 if threshold is None else threshold.min_confidence,
            chat=ChatFormat.of(folder, tokenizer),
            created=int((folder / "config.json").stat().st_mtime),
        )

    @property
    def max_positions(self) -> int | None:
        """Tokens in a row that it can take; None where there is no end."""
        base = getattr(self.network, "base", None)
        most = getattr(getattr(base, "config", None), "max_position_embeddings", None)
        return most if isinstance(most, int) else None


@dataclass(frozen=True, slots=True)
class Search:
    """What a request asks of the index."""

    k: int
    method: Method
    where: Filter | None

    @property
    def question(self) -> Question:
        """As the library takes it."""
        return Question(self.k, self.method, self.where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sequences to be generated for a request."""

    tasks: list[Task]
    passages: list[Passage]
    """That all of them read."""
    prompt_tokens: int
    search: Search


class Service:
    """Everything behind the routes; belongs to one event loop."""

    def __init__(
        self, model: Model, library: Library | None, config: ServeConfig, keys: Keys, metrics: Metrics
    ) -> None:
        """Starts decoding."""
        self.model, self.library, self.config, self.keys, self.metrics = model, library, config, keys, metrics
        self.engine = Engine(model.network, model.tokenizer, metrics, max_rows=config.max_concurrency)
        self.decoding = Gate(config.max_concurrency + config.max_queue, "sequences")
        self.searching = Gate(config.max_queue + 1, "searches")
        self.is_stopping = False

    def close(self) -> None:
        """Ends all threads."""
        self.engine.close()
        if self.library is not None:
            self.library.close()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return self.decoding.inside == 0 and self.searching.inside == 0

    # --- searches

    @property
    def can_retrieve(self) -> bool:
        """Whether the model can read what an index says."""
        return self.library is not None and bool(self.model.network.config.cca_layers)

    @property
    def methods(self) -> list[str]:
        """How the index can be searched, the default for questions first."""
        if self.library is None:
            return []
        first = settled(self.config.retriever, "query", has_words="hybrid" in self.library.methods)
        return sorted(self.library.methods, key=lambda name: name != first)

    def search_of(self, body: Any, key: Key, default_k: int, *, needs_model: bool = True) -> Search:
        """Checks what a request asks of the index.

        Raises:
            ApiError: There is no index, or k, the retriever or the filter cannot be used.
        """
        able = self.can_retrieve if needs_model else self.library is not None
        k = body.k if body.k is not None else (default_k if able else 0)
        if k > self.config.max_passages:
            raise ApiError(400, f"k = {k}: this server allows at most {self.config.max_passages}", param="k")
        if k > 0 and not able:
            what = "an index" if self.library is None else "a model that reads passages"
            raise ApiError(400, f"k = {k}: this server has been started without {what}; send k = 0", param="k")
        method: Method = body.retriever or self.config.retriever
        if self.library is None:
            return Search(k, method, None)
        if method not in (*self.library.methods, AUTO):
            raise ApiError(
                400,
                f"the index cannot be searched by {method}: use {', '.join(self.library.methods)}",
                param="retriever",
            )
        try:
            condition = None if body.where is None else Filter.parse(body.where)
        except ConfigError as error:
            raise ApiError(400, str(error), param="where") from error
        return Search(k, method, self.library.narrowed(key.where, condition))

    async def passages(self, query: str, search: Search) -> list[Passage]:
        """Looks passages up for a person's query."""
        if search.k == 0 or self.library is None:
            return []
        if not query.strip():
            raise ApiError(400, "the query is empty: ask something")
        with self.searching.admit():
            return await self.library.search(query, search.question)

    # --- completions and chats

    async def plan_completion(self, body: CompletionRequest, key: Key) -> Plan:
        """What a completion takes."""
        search = self.search_of(body, key, self.model.num_neighbors)
        prompts = await self._prompts(body.prompt)
        max_tokens = self._max_tokens(body.max_tokens, COMPLETION_TOKENS, max(map(len, prompts)))
        retriever = None
        if search.k and self.library is not None:
            await self.library.prepare(search.where)
            retriever = Bound(self.library, search.method, search.where)
        settings = GenerateConfig(
            max_new_tokens=max_tokens,
            num_neighbors=search.k,
            neighbor_len=self.model.neighbor_len,
            **_sampling(body),
        )
        tasks = [
            Task(
                prompt=Prompt(ids),
                config=dataclasses.replace(settings, seed=(settings.seed + number) % 2**63),
                retriever=retriever,
                stop=_stops(body.stop),
                num_alternatives=body.logprobs or 0,
            )
            for ids in prompts
            for number in range(body.n or 1)
        ]
        self._check_choices(len(tasks))
        return Plan(tasks=tasks, passages=[], prompt_tokens=sum(map(len, prompts)), search=search)

    async def plan_chat(self, body: ChatRequest, key: Key) -> Plan:
        """What a chat takes; its passages are looked up here, for the last message of the user."""
        search = self.search_of(body, key, self.config.num_passages)
        self._check_choices(body.n or 1)
        messages = [message.plain for message in body.messages]
        if not any(message["role"] == "user" for message in messages):
            raise ApiError(400, "no message is a user's: there is nothing to answer", param="messages")
        question = last_user_message(messages)
        if not question.strip():
            raise ApiError(400, "the last message of the user is empty", param="messages")
        chars = sum(len(message["content"]) for message in messages)
        ids = await self._tokenized(lambda: self.model.chat.ids(messages), chars)
        asked, longest = body.max_completion_tokens or body.max_tokens, len(ids) + self._in_context(search.k)
        max_tokens = self._max_tokens(asked, CHAT_TOKENS, longest)
        passages = await self.passages(question, search)
        texts, context = [passage_text(passage) for passage in passages], self.model.network.context_passages
        before = [token for few in self.model.tokenizer.encode_batch(texts[:context]) for token in few[:NEIGHBOR_LEN]]
        ids = [ids[0], *before, *ids[1:]]
        last = -(-len(ids) // self.model.network.config.chunk_len) - 1
        prompt = Prompt(ids, {last: texts[context:]})
        settings = GenerateConfig(
            max_new_tokens=max_tokens, num_neighbors=search.k, neighbor_len=NEIGHBOR_LEN, **_sampling(body)
        )
        tasks = [
            Task(
                prompt=prompt,
                config=dataclasses.replace(settings, seed=(settings.seed + number) % 2**63),
                stop=(*_stops(body.stop), *self.model.chat.stop),
                num_alternatives=(body.top_logprobs or 0) if body.logprobs else 0,
            )
            for number in range(body.n or 1)
        ]
        return Plan(tasks=tasks, passages=passages, prompt_tokens=len(ids), search=search)

    def _in_context(self, k: int) -> int:
        """Tokens that passages may take in the prompt, where the model wants some of them there (RETRO++)."""
        most: int = self.model.network.context_passages
        return min(k, most) * NEIGHBOR_LEN

    def _check_choices(self, count: int) -> None:
        if count > self.config.max_choices:
            raise ApiError(
                400,
                f"{count} continuations are asked for: this server allows at most {self.config.max_choices}",
                param="n",
            )

    def _max_tokens(self, asked: int | None, default: int, prompt_tokens: int) -> int:
        limit = self.config.max_context
        if (most := self.model.max_positions) is not None:
            limit = min(limit, most)
        if asked is not None and asked > self.config.max_tokens:
            raise ApiError(
                400, f"max_tokens = {asked}: this server allows at most {self.config.max_tokens}", param="max_tokens"
            )
        wanted = min(default, self.config.max_tokens, max(limit - prompt_tokens, 1)) if asked is None else asked
        if prompt_tokens + wanted > limit:
            raise ApiError(
                400,
                f"the prompt has {prompt_tokens:,} tokens and {wanted:,} more are asked for: together at most {limit:,} are "
                "allowed",
                code="context_length_exceeded",
                param="prompt",
            )
        return wanted

    async def _prompts(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        """Tokens of one prompt or several, BOS in front."""
        if isinstance(prompt, str):
            prompts: list[Any] = [prompt]
        else:
            prompts = [prompt] if isinstance(prompt[0], int) else list(prompt)
        self._check_choices(len(prompts))
        size = sum(len(one) for one in prompts if isinstance(one, str))
        return await self._tokenized(lambda: [self._ids(one) for one in prompts], size)  # type: ignore[no-any-return]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        tokenizer = self.model.tokenizer
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ApiError(400, "the prompt is empty: give some text to continue", param="prompt")
            return prompt_ids(prompt, tokenizer)
        if min(prompt) < 0 or max(prompt) >= tokenizer.vocab_size:
            raise ApiError(400, f"the prompt has tokens outside 0 to {tokenizer.vocab_size - 1:,}", param="prompt")
        return prompt if prompt[0] == tokenizer.bos_id else [tokenizer.bos_id, *prompt]

    async def _tokenized(self, work: Any, chars: int) -> Any:
        return work() if chars < LONG_TEXT else await asyncio.to_thread(work)

    # --- questions

    async def ask(self, body: AskRequest, key: Key) -> "Asking":
        """Finds the passages of a question; the answer is still to come."""
        search = self.search_of(body, key, self.config.num_passages)
        chunk_len = self.model.network.config.chunk_len
        context = self.model.network.context_passages
        # What cannot be asked is not looked up.
        prompt = answer_prompt(body.question, (), self.model.tokenizer, chunk_len)
        max_tokens = self._max_tokens(body.max_tokens, body.max_tokens, len(prompt.ids) + self._in_context(search.k))
        began = time.perf_counter()
        passages = await self.passages(body.question, search)
        found = time.perf_counter() - began
        prompt = answer_prompt(body.question, passages, self.model.tokenizer, chunk_len, context_passages=context)
        return Asking(self, body, Task(prompt=prompt, config=answer_config(search.k, max_tokens)), passages, found)


class Asking:
    """A question whose passages are there."""

    def __init__(
        self, service: Service, body: AskRequest, task: Task, passages: list[Passage], retrieval_s: float
    ) -> None:
        self._service, self._body, self._task = service, body, task
        self._passages, self._retrieval_s = passages, retrieval_s

    async def reply(self) -> dict[str, Any]:
        """The whole answer."""
        began = time.perf_counter()
        (update,) = await self._service.engine.complete([self._task])
        return await self._finished(update, time.perf_counter() - began)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The passages, pieces of the answer, and at last the whole answer."""
        began = time.perf_counter()
        yield event({"passages": passages_out(self._passages)}, "passages")
        whole = Update()
        async for _, update in self._service.engine.stream([self._task]):
            whole.tokens += update.tokens
            whole.generation = update.generation
            if update.text:
                yield event({"text": update.text}, "token")
        yield event(await self._finished(whole, time.perf_counter() - began), "done")

    async def _finished(self, update: Update, decoding_s: float) -> dict[str, Any]:
        service, generation = self._service, update.generation
        assert generation is not None
        prompt = len(self._task.prompt.ids)
        context = service.model.network.context_passages
        answer = to_answer(
            self._body.question,
            self._passages,
            generation,
            tokenizer=service.model.tokenizer,
            prompt_tokens=prompt,
            context_passages=context,
        )
        explained: Explanation | None = None
        if self._body.attribution and self._passages:
            # The model is watched while it reads: nobody else may use it meanwhile.
            explained = await service.engine.between_steps(
                lambda: explain(service.model.network, service.model.tokenizer, answer)
            )
        words = update.tokens[: len(update.tokens) - generation.finished]
        shares = [None] * len(words) if explained is None else explained.share_nP.round(5).tolist()
        return {
            "question": answer.question,
            "answer": answer.text,
            "confidence": round(answer.confidence, 6),
            "refused": answer.confidence < service.model.min_confidence,
            "tokens": [
                {"text": token.text, "log_prob": round(token.log_prob, 6), "shares": share}
                for token, share in zip(words, shares, strict=True)
            ],
            "passages": passages_out(self._passages, explained),
            "usage": usage(prompt, len(update.tokens)),
            "seconds": {"retrieval": round(self._retrieval_s, 6), "decoding": round(decoding_s, 6)},
        }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def passages_out(passages: Sequence[Passage], explained: Explanation | None = None) -> list[dict[str, Any]]:
    """Passages as they are sent."""
    sent = []
    for number, passage in enumerate(passages):
        span = None if explained is None else explained.spans[number]
        sent.append(
            {
                "number": number + 1,
                "score": round(float(passage.score), 6),
                "key": passage.key,
                "title": passage.title,
                "url": passage.url,
                "text": passage.full_text,
                "continuation": passage.continuation,
                "metadata": json.loads(passage.metadata),
                "share": None if explained is None else round(float(explained.share_P[number]), 5),
                "span": None if span is None else list(span),
            }
        )
    return sent


def _sampling(body: Generating) -> dict[str, Any]:
    temperature = 1.0 if body.temperature is None else float(body.temperature)
    return {
        # Nearer to 0 they are no numbers of the network's any more; what they ask for is greedy.
        "temperature": temperature if temperature >= LEAST else 0.0,
        "top_p": 1.0 if body.top_p is None else max(float(body.top_p), LEAST),
        "top_k": body.top_k or 0,
        "seed": secrets.randbits(62) if body.seed is None else body.seed % 2**63,
    }


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop or []
    return tuple(text for text in texts if text)
