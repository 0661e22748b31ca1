"""Decodes for all requests together, in one thread: those that come join at the next step, those that end or are given up leave.

The thread hands over once a step what all requests have got by it; a request that nobody reads piece by piece gets it all at its
end. What fails fails alone, where it can be told apart.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from retro.config import GenerateConfig
from retro.errors import ConfigError
from retro.generate import Decoder, Generation, Prompt, Retriever, Row
from retro.serve.gate import StoppingError
from retro.serve.metrics import Metrics
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A prompt to continue."""

    prompt: Prompt
    config: GenerateConfig
    retriever: Retriever | None = None
    """Asked at chunk borders; needed unless the prompt brings its passages or `config.num_neighbors` is 0."""
    stop: tuple[str, ...] = ()
    """Texts before the first of which the continuation ends."""
    num_alternatives: int = 0
    """Most probable tokens that are noted at each place."""


class Token(NamedTuple):
    """One token of a continuation."""

    id: int
    text: str
    """What it added to the text: nothing where it leaves a character unfinished."""
    log_prob: float
    alternatives: list[tuple[int, float]]


@dataclass(slots=True)
class Update:
    """What is new of a continuation."""

    text: str = ""
    """Without what may be the beginning of a stop text."""
    tokens: list[Token] = field(default_factory=list)
    finish: FinishReason | None = None
    """Set in the last one."""
    generation: Generation | None = None
    """Set in the last one: everything, with what follows a stop text."""


@dataclass(slots=True, eq=False)
class _Job:
    """A task on its way."""

    task: Task
    listens: bool
    """Whether somebody reads it piece by piece."""
    loop: asyncio.AbstractEventLoop
    updates: "asyncio.Queue[tuple[int, Update | Exception]]"
    """Of all tasks of a request."""
    number: int
    """Which of them this is."""
    began: float
    row: Row | None = None
    is_cancelled: bool = False
    is_over: bool = False
    pieces: list[str] = field(default_factory=list)
    """Of the token that comes."""
    text: str = ""
    sent: int = 0
    """Characters of the text that were handed over."""
    seen: int = 0
    """Tokens that were looked at."""
    pending: Update = field(default_factory=Update)

    def advance(self) -> bool:
        """Takes in the tokens of the last step; says whether a stop text has come."""
        assert self.row is not None
        result = self.row.result
        for number in range(self.seen, len(result.ids)):
            text = "".join(self.pieces)
            self.pieces.clear()
            self.text += text
            top = result.alternatives[number] if self.task.num_alternatives else []
            self.pending.tokens.append(Token(result.ids[number], text, result.log_probs[number], top))
        self.seen = len(result.ids)
        if not self.task.stop:
            return False
        ends = [at for stop in self.task.stop if (at := self.text.find(stop, self.sent)) >= 0]
        if ends:
            self.text = self.text[: min(ends)]
        return bool(ends)

    def take(self, *, ended: bool, stopped: bool) -> Update:
        """What can be handed over."""
        assert self.row is not None
        end = len(self.text) if ended else len(self.text) - _held_back(self.text, self.sent, self.task.stop)
        update, self.pending = self.pending, Update()
        update.text, self.sent = self.text[self.sent : end], end
        if ended:
            update.finish = "stop" if stopped or self.row.result.finished else "length"
            update.generation = self.row.result
        return update


def _held_back(text: str, start: int, stops: tuple[str, ...]) -> int:
    """Characters at the end of a text that may be the beginning of a stop text."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text) - start), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


class Engine:
    """One thread that runs a `retro.generate.Decoder`."""

    def __init__(self, model: Any, tokenizer: Tokenizer, metrics: Metrics, *, max_rows: int) -> None:
        """Starts the thread.

        Args:
            model: In eval mode; nobody else may use it, see `between_steps`.
            tokenizer: The model's.
            metrics: Told of steps and tokens.
            max_rows: Prompts that are decoded together.
        """
        self.model, self.tokenizer = model, tokenizer
        self._metrics, self._max_rows = metrics, max_rows
        self._wake = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._running: dict[Row, _Job] = {}
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it decodes; it does until it is closed."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Ends the thread; what is under way fails."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join()

    async def stream(self, tasks: Sequence[Task]) -> AsyncIterator[tuple[int, Update]]:
        """Continues prompts piece by piece; whoever stops listening (`aclose`) gives them up.

        Yields:
            Which of the tasks, and what is new of it.

        Raises:
            ConfigError: Of a search.
            StoppingError: The server is being stopped.
        """
        jobs = self._submit(tasks, listens=True)
        left = len(jobs)
        try:
            while left:
                number, update = await jobs[0].updates.get()
                if isinstance(update, Exception):
                    raise update
                yield number, update
                left -= update.finish is not None
        finally:
            self._give_up(jobs)

    async def complete(self, tasks: Sequence[Task]) -> list[Update]:
        """Continues prompts to their ends; cancelled, they are given up.

        Raises:
            ConfigError: Of a search.
            StoppingError: The server is being stopped.
        """
        jobs = self._submit(tasks, listens=False)
        results: dict[int, Update] = {}
        try:
            while len(results) < len(jobs):
                number, update = await jobs[0].updates.get()
                if isinstance(update, Exception):
                    raise update
                results[number] = update
        finally:
            self._give_up(jobs)
        return [results[number] for number in range(len(jobs))]

    async def between_steps(self, work: Callable[[], Any]) -> Any:
        """Does something with the model while nothing is decoded."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

        def call() -> None:
            if done.cancelled():
                return
            try:
                result, error = work(), None
            except Exception as raised:
                result, error = None, raised
            call_soon(loop, settle, result, error)

        with self._wake:
            if self._is_closing:
                raise StoppingError("the server is being stopped")
            self._calls.append(call)
            self._wake.notify()
        return await done

    def _submit(self, tasks: Sequence[Task], *, listens: bool) -> list[_Job]:
        loop, updates, now = asyncio.get_running_loop(), asyncio.Queue[Any](), time.perf_counter()
        jobs = [_Job(task, listens, loop, updates, number, now) for number, task in enumerate(tasks)]
        with self._wake:
            if self._is_closing:
                raise StoppingError("the server is being stopped")
            self._waiting += jobs
            self._metrics.waiting.set(len(self._waiting))
            self._wake.notify()
        return jobs

    def _give_up(self, jobs: Sequence[_Job]) -> None:
        """Drops what of them is still under way."""
        left = [job for job in jobs if not job.is_over]
        if not left:
            return
        with self._wake:
            for job in left:
                job.is_cancelled = True
                if job.row is None and job in self._waiting:
                    self._waiting.remove(job)
            self._metrics.waiting.set(len(self._waiting))
            self._wake.notify()

    # --- the thread

    def _run(self) -> None:
        while True:
            decoder = Decoder(self.model, self.tokenizer)
            try:
                with decoder:
                    self._serve(decoder)
                break
            except Exception as error:  # of the network: nobody knows whose fault it was
                logger.exception("A step of decoding failed; what was under way is lost, decoding begins anew")
                self._fail(RuntimeError(f"decoding failed: {type(error).__name__}"))
        self._fail(StoppingError("the server was stopped before this was finished"))

    def _serve(self, decoder: Decoder) -> None:
        """Steps until the engine is closed."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._running or self._waiting or self._calls or self._is_closing)
                if self._is_closing:
                    return
                free = self._max_rows - len(self._running)
                new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
                calls = list(self._calls)
                self._calls.clear()
                self._metrics.waiting.set(len(self._waiting))
            for call in calls:
                call()
            for job in new:
                self._begin(decoder, job)
            gone = [row for row, job in self._running.items() if job.is_cancelled]
            self._leave(decoder, gone)
            if not self._running:
                continue
            began = time.perf_counter()
            ended = set(decoder.step())
            self._metrics.step.observe(time.perf_counter() - began)
            self._hand_over(decoder, ended)

    def _begin(self, decoder: Decoder, job: _Job) -> None:
        task = job.task
        try:
            job.row = decoder.add(
                task.prompt,
                task.config,
                job.pieces.append,
                retriever=task.retriever,
                num_alternatives=task.num_alternatives,
            )
        except Exception as error:
            logger.exception("A prompt was not taken in")
            call_soon(job.loop, job.updates.put_nowait, (job.number, error))
            return
        self._running[job.row] = job
        self._metrics.prompt_tokens.inc(len(task.prompt.ids))
        self._metrics.running.set(len(self._running))

    def _leave(self, decoder: Decoder, rows: list[Row]) -> None:
        if rows:
            decoder.remove(*rows)
            for row in rows:
                del self._running[row]
            self._metrics.running.set(len(self._running))

    def _hand_over(self, decoder: Decoder, ended: set[Row]) -> None:
        """Gives everybody what the last step brought, each event loop all at once."""
        now = time.perf_counter()
        news: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Update | Exception]]] = {}
        stopped_rows: list[Row] = []
        num_tokens = 0
        for row, job in self._running.items():
            if row.error is not None:
                error = row.error
                if not isinstance(error, ConfigError):
                    logger.error("A search failed: %s", error, exc_info=error)
                news.setdefault(job.loop, []).append((job, error))
                continue
            before = job.seen
            stopped = job.advance()
            num_tokens += job.seen - before
            if before == 0 and job.seen:
                self._metrics.first_token.observe(now - job.began)
            over = stopped or row in ended
            if over or (job.listens and job.seen > before):
                news.setdefault(job.loop, []).append((job, job.take(ended=over, stopped=stopped)))
            if over:
                job.is_over = True
                self._metrics.decoding.observe(now - job.began)
            if stopped and row not in ended:
                stopped_rows.append(row)
        self._metrics.tokens.inc(num_tokens)
        self._leave(decoder, stopped_rows)
        for row in ended:
            del self._running[row]
        self._metrics.running.set(len(self._running))
        for loop, some in news.items():
            call_soon(loop, _deliver, some)

    def _fail(self, error: Exception) -> None:
        """Tells everybody who is under way, and where the engine closes all who wait."""
        with self._wake:
            jobs = list(self._running.values())
            self._running.clear()
            if self._is_closing:
                jobs += self._waiting
                self._waiting.clear()
        for job in jobs:
            call_soon(job.loop, job.updates.put_nowait, (job.number, error))


def _deliver(news: list[tuple[_Job, Update | Exception]]) -> None:
    for job, update in news:
        job.updates.put_nowait((job.number, update))


def call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object) -> None:
    """Calls something in a loop's own thread; nothing where the loop has ended meanwhile."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)
