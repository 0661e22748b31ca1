"""The index behind a server: searches of all requests in one thread, changes, and another index in its place.

Every search sees the newest state of the index on disk, as `IndexRetriever` does. A search that has begun ends on the state that it
began with.
"""

import asyncio
import contextlib
import json
import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from index_builder.build import config_of
from index_builder.filters import Filter
from index_builder.live import Changes, add_documents, remove_documents
from index_builder.search import METHODS, IndexRetriever, Method, Snapshot
from retro.chunks import Passage
from retro.errors import ConfigError, CorpusError
from retro.generate import Role
from retro.serve.engine import call_soon
from retro.serve.masks import Masks
from retro.serve.metrics import Metrics

logger = logging.getLogger(__name__)
TEMPORARY, DOCUMENTS = "retro-documents-", "documents.jsonl"
_DOCUMENTS = re.compile(rf"\S*{TEMPORARY}\w+/{re.escape(DOCUMENTS)}")


TURN_CHARS = 1500
"""Of queries that a CPU encodes and searches in one go, about 50 ms; many short ones together take much less time than one by one,
long ones do not."""


class Question(NamedTuple):
    """What searches that are done together have in common."""

    k: int
    method: Method
    where: Filter | None


@dataclass(frozen=True, slots=True)
class Bound:
    """The library as a retriever of one request; equal ones are asked together."""

    library: "Library"
    method: Method
    where: Filter | None

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        """See `retro.generate.Retriever`; fewer than k where the index has fewer."""
        if exclude is not None or where is not None:
            raise ConfigError("a request's retriever takes neither exclude nor where: its filter is a part of it")
        return self.library.find(queries, Question(k, self.method, self.where), role)


class Turns:
    """A lock for which those who are `first` never wait longer than for whoever has it.

    Chunks of many sequences are looked up together; without turns a person's question would wait for all of them.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._is_taken = False
        self._num_first = 0

    @contextlib.contextmanager
    def take(self, *, first: bool) -> Iterator[None]:
        """Has the lock inside it."""
        with self._change:
            self._num_first += first
            self._change.wait_for(lambda: not self._is_taken and (first or not self._num_first))
            self._num_first -= first
            self._is_taken = True
        try:
            yield
        finally:
            with self._change:
                self._is_taken = False
                self._change.notify_all()


class Library:
    """An open index."""

    def __init__(self, indexes: Mapping[str, Path], metrics: Metrics, *, device: str, where: str | None) -> None:
        """Opens the first index.

        Args:
            indexes: Names and folders; no other can ever be opened.
            metrics: Told of searches.
            device: Where the encoder runs.
            where: What all searches are confined to.

        Raises:
            FormatError, MismatchError, ConfigError: As `IndexRetriever.open`.
        """
        self.indexes = dict(indexes)
        self.name = next(iter(self.indexes))
        self._metrics, self._device = metrics, device
        self._where = None if where is None else Filter.parse(where)
        self.num_documents = 0
        """Of the state that was searched last."""
        self.methods: list[str] = []
        """How it can be searched."""
        self._retriever = self._open(self.name)
        self._note(self._retriever.manifest)
        self._state_lock = threading.Lock()
        self._turns = Turns()  # not every encoder may be used by several threads
        self._people = threading.Lock()
        self._pending: dict[Question, list[tuple[str, asyncio.Future[list[Passage]]]]] = {}
        self._pending_lock = threading.Lock()
        self._searcher = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._changer = ThreadPoolExecutor(1, thread_name_prefix="change")
        self._filterer = ThreadPoolExecutor(1, thread_name_prefix="filter")
        self._masks = Masks()
        self._is_closing = False

    def close(self) -> None:
        """Ends the threads; a change that has begun is finished."""
        self._is_closing = True
        self._filterer.shutdown(cancel_futures=True)
        self._searcher.shutdown(cancel_futures=True)
        self._changer.shutdown(cancel_futures=True)

    def _note(self, manifest: Mapping[str, Any]) -> None:
        self.num_documents = int(manifest["documents"])
        self.methods = list(METHODS) if manifest["lexical"] is not None else ["dense"]
        self._metrics.documents.set(self.num_documents)

    # --- searches

    def find(self, queries: Sequence[str], question: Question, role: Role) -> list[list[Passage]]:
        """The best passages of each query, best first; fewer than k where there are fewer.

        Raises:
            ConfigError: An empty query, or an index that cannot be searched by this method.
        """
        if any(not query.strip() for query in queries):
            raise ConfigError("the query is empty: ask something")
        k, method, where = question
        retriever, now = self._present()
        k = min(k, now.store.num_live_chunks)
        if k == 0 or not queries:
            return [[] for _ in queries]
        keep_N = self._masks.rows(now, where)
        found: list[list[Passage]] = []
        # On a CPU a person's question is encoded beside the chunks of a sequence, at half the speed, rather than after them.
        beside = role == "query" and self._device == "cpu" and retriever.encoder.is_shareable
        for few in _in_turns(queries) if self._device == "cpu" else [queries]:
            with self._people if beside else self._turns.take(first=role == "query"):
                began = time.perf_counter()
                vectors_QX = None if method == "bm25" else retriever.encoder.encode(few, role)
                encoded = time.perf_counter()
                found += now.passages(few, vectors_QX, k, method=method, role=role, keep_N=keep_N)
            if method != "bm25":
                self._metrics.encoding.observe(encoded - began)
            self._metrics.searching.observe(time.perf_counter() - encoded)
        return found

    def _present(self) -> tuple[IndexRetriever, Snapshot]:
        with self._state_lock:
            retriever = self._retriever
            now = retriever.snapshot()
            self._note(now.manifest)
        return retriever, now

    async def prepare(self, where: Filter | None) -> None:
        """Evaluates a filter that is not known yet, so that no search has to wait for it.

        Raises:
            ConfigError: It takes too long.
        """
        if where is None or self._masks.knows(where):
            return
        gone = threading.Event()

        def evaluate() -> None:
            self._masks.rows(self._present()[1], where, is_wanted=lambda: not (gone.is_set() or self._is_closing))

        try:
            await asyncio.get_running_loop().run_in_executor(self._filterer, evaluate)
        finally:
            gone.set()

    def narrowed(self, *conditions: Filter | None) -> Filter | None:
        """The library's own condition and these, all at once."""
        result = self._where
        for condition in conditions:
            if condition is not None:
                result = condition if result is None else result.narrowed(condition)
        return result

    async def search(self, query: str, question: Question) -> list[Passage]:
        """Passages for a person's query; what waits at the same time and asks alike is one search.

        Raises:
            ConfigError: As `find`.
        """
        began = time.perf_counter()
        await self.prepare(question.where)
        done: asyncio.Future[list[Passage]] = asyncio.get_running_loop().create_future()
        with self._pending_lock:
            self._pending.setdefault(question, []).append((query, done))
        self._searcher.submit(self._search_pending)
        found = await done
        self._metrics.retrieval.observe(time.perf_counter() - began)
        return found

    def _search_pending(self) -> None:
        with self._pending_lock:
            pending, self._pending = self._pending, {}
        for question, entries in pending.items():
            asked = [(query, done) for query, done in entries if not done.cancelled()]
            distinct = list(dict.fromkeys(query for query, _ in asked))
            try:
                found = dict(zip(distinct, self.find(distinct, question, "query"), strict=True)) if distinct else {}
            except Exception as error:
                for _, done in asked:
                    call_soon(done.get_loop(), _settle, done, error)
            else:
                for query, done in asked:
                    call_soon(done.get_loop(), _settle, done, found[query])

    # --- changes

    async def add(self, documents: Sequence[Mapping[str, Any]], *, corpus: str, update: bool) -> Changes:
        """Adds documents; they are found by every search that begins after it.

        Args:
            documents: Each with `id`, `text` and whatever else it has.
            corpus: The first part of their keys.
            update: Replace those that are there already.

        Raises:
            CorpusError: A document that cannot be used, or whose key is there already.
            ConfigError: Somebody else is changing the index.
        """
        done: Changes = await self._changed(lambda: self._add(documents, corpus, update))
        return done

    async def remove(self, keys: Sequence[str]) -> Changes:
        """Removes documents; they are found by no search that begins after it.

        Raises:
            ConfigError: A key is not there; nothing is removed then. Or somebody else is changing the index.
        """
        done: Changes = await self._changed(lambda: remove_documents(self._retriever.folder, keys))
        return done

    async def reload(self, name: str | None) -> None:
        """Opens an index anew, at the same place or another one of the list.

        Raises:
            ConfigError: The name is none of the list.
            FormatError, MismatchError: The index cannot be opened; the old one stays.
        """
        if name is not None and name not in self.indexes:
            raise ConfigError(f"there is no index of this name: use one of {', '.join(self.indexes)}")
        await self._changed(lambda: self._reload(name or self.name))

    async def _changed(self, change: Callable[[], Any]) -> Any:
        # Shielded: a client that goes away does not leave a change half known.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._changer, self._do, change))

    def _do(self, change: Callable[[], Any]) -> Any:
        try:
            result = change()
        except (ConfigError, CorpusError) as error:
            # The client learns nothing of where things lie.
            message = _DOCUMENTS.sub("documents", str(error)).replace(str(self._retriever.folder), self.name)
            raise type(error)(message) from error
        with self._state_lock:
            self._note(self._retriever.manifest)
        return result

    def _add(self, documents: Sequence[Mapping[str, Any]], corpus: str, update: bool) -> Changes:
        with self._state_lock:
            retriever, recipe = self._retriever, self._retriever.manifest["recipe"]
        read = config_of(recipe).read
        names = {"id": read.id_field, "text": read.text_field, "title": read.title_field}
        with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
            path = Path(folder) / DOCUMENTS
            with path.open("w", encoding="ascii") as file:
                for document in documents:
                    record = {names.get(field, field): value for field, value in document.items()}
                    file.write(json.dumps(record, allow_nan=False) + "\n")
            return add_documents(
                retriever.folder, [f"{corpus}={path}"], update=update, device=self._device, encoder=retriever.encoder
            )

    def _reload(self, name: str) -> None:
        opened = self._open(name)
        with self._state_lock:
            self.name, self._retriever = name, opened
        logger.info("Index %s is open: %s documents", name, f"{opened.manifest['documents']:,}")

    def _open(self, name: str) -> IndexRetriever:
        return IndexRetriever.open(self.indexes[name], device=self._device)


def _in_turns(queries: Sequence[str]) -> Iterator[Sequence[str]]:
    first = chars = 0
    for place, query in enumerate(queries):
        chars += len(query)
        if chars > TURN_CHARS and place > first:
            yield queries[first:place]
            first, chars = place, len(query)
    yield queries[first:]


def _settle(done: "asyncio.Future[list[Passage]]", found: list[Passage] | Exception) -> None:
    if done.done():  # nobody waits any more
        return
    if isinstance(found, Exception):
        done.set_exception(found)
    else:
        done.set_result(found)
