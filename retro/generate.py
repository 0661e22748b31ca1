"""Generation: cached decoding that retrieves at every chunk border, and the protocol a retriever fulfils."""

import functools
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retro.cca import Cache
from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.errors import ConfigError, MismatchError
from retro.model import Retro
from retro.tokenizer import Tokenizer

PREFILL_SLOTS = 1 << 14
"""Of new prompts, those are read in one call that have together at most so many slots, or one: it bounds memory, and how long the
others wait."""
SEARCHED_AT_ONCE = 16
"""Rows whose passages are looked up in one search."""
WINDOW = 8
"""Tokens of a prompt that are decoded together with the first new one: a character may be spread over four."""
Role = Literal["document", "query"]
"""How a text is encoded: chunks are documents, whether stored or used as queries; people's questions are queries."""


class Retriever(Protocol):
    """Looks passages up; `index_builder.search.IndexRetriever` is one."""

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        """The k best passages for each query, best first; fewer only where there are no more.

        Args:
            queries: Texts.
            k: Passages wanted.
            role: How the queries are encoded.
            exclude: For each query, groups whose passages are left out.
            where: A condition on the documents, as in `lang = "en" and year >= 2000`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sequence to continue.

    Its tokens are placed so that they end on a chunk border: empty slots stand before them.
    """

    ids: list[int]
    passages: dict[int, list[str]] | None = None
    """Texts to read as the neighbors of given chunks (counted from 0 with the lead), instead of retrieving; every later chunk
    keeps those of the last one given. None: the retriever is asked at every chunk border."""


@dataclass(slots=True)
class Generation:
    """What came out for one prompt."""

    text: str
    """The continuation alone."""
    ids: list[int]
    """Its tokens, EOS included where it ended so."""
    log_probs: list[float]
    """Natural logarithm of the model's probability (at temperature 1) of each of them."""
    finished: bool
    """Whether EOS came before max_new_tokens."""
    retrieved: dict[int, list[Passage]] = field(default_factory=dict)
    """Passages that were looked up, by the chunk they were looked up for."""
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    """For each token the most probable ones at its place, with their log-probabilities; where they were asked for."""


def prompt_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """BOS and the tokens of a text."""
    return [tokenizer.bos_id, *tokenizer.encode(text).ids.tolist()]


def neighbor_tensors(
    texts: Sequence[Sequence[Sequence[str]]], tokenizer: Tokenizer, K: int, R: int
) -> tuple[Tensor, Tensor]:
    """Tokenizes the passages of chunks: texts[b][l] are those of one chunk, at most K.

    Returns:
        Ids [B, L, K, R] and keep [B, L, K, R]; each text is cut after R tokens.
    """
    encoded = iter(tokenizer.encode_batch([text for row in texts for few in row for text in few]))
    ids = [[[next(encoded) for _ in few] for few in row] for row in texts]
    return token_tensors(ids, max((len(row) for row in texts), default=0), K, R)


def token_tensors(
    ids: Sequence[Sequence[Sequence[Sequence[int] | NDArray[Any]]]], L: int, K: int, R: int
) -> tuple[Tensor, Tensor]:
    """Tokens of the neighbors of chunks, ids[b][l][k], as tensors.

    Returns:
        Ids [B, L, K, R] and keep [B, L, K, R]; each neighbor is cut after R tokens, and what is missing is False.
    """
    neighbors_BLKR = np.zeros((len(ids), L, K, R), np.int64)
    keep_BLKR = np.zeros((len(ids), L, K, R), np.bool_)
    for b, row in enumerate(ids):
        for chunk, few in enumerate(row):
            for k, neighbor in enumerate(few):
                n = min(len(neighbor), R)
                neighbors_BLKR[b, chunk, k, :n] = neighbor[:n]
                keep_BLKR[b, chunk, k, :n] = True
    return torch.from_numpy(neighbors_BLKR), torch.from_numpy(keep_BLKR)


def find_passages(
    tokenizer: Tokenizer, retriever: Retriever, k: int, chunks: Sequence[tuple[list[int], int, int]]
) -> list[list[Passage] | None]:
    """Passages of some chunks by their text, in one search; None for a chunk without text, which is not looked up.

    Args:
        tokenizer: Of the chunks.
        retriever: Asked once for equal texts.
        k: Passages wanted.
        chunks: Of each, the tokens of its row and which part of them it is: `ids[first:end]`, as `Tokenizer.decode_chunk` takes
            them.
    """
    texts = [tokenizer.decode_chunk(*chunk) for chunk in chunks]
    queries = list(dict.fromkeys(text for text in texts if text.strip()))
    found = retriever.retrieve(queries, k) if queries else []
    passages = dict(zip(queries, found, strict=True))
    return [passages.get(text) for text in texts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """Finds the neighbors of chunks by their text."""

    tokenizer: Tokenizer
    retriever: Retriever
    num_neighbors: int
    """K."""
    neighbor_len: int
    """R."""

    def neighbors(
        self, ids: Sequence[list[int]], lead: Sequence[int], before: Sequence[int], chunk_len: int, *, skip: int = 0
    ) -> tuple[Tensor, Tensor] | None:
        """Neighbors of the chunks that rows finish by new tokens.

        Args:
            ids: All tokens of each row.
            lead: Empty slots before each row's first token.
            before: How many tokens each row had before.
            chunk_len: M.
            skip: Each row's first so many chunks are not looked up and get no neighbors.

        Returns:
            Ids and keep [B, L, K, R], on the CPU, where L counts from each row's unfinished chunk on, as `Retro.hidden` takes them;
            None where no chunk is looked up.
        """
        chunks: list[tuple[list[int], int, int]] = []
        counts: list[int] = []
        for row, start, old in zip(ids, lead, before, strict=True):
            numbers = range((start + old) // chunk_len, (start + len(row)) // chunk_len)
            chunks += [(row, max(c * chunk_len - start, 0), (c + 1) * chunk_len - start) for c in numbers[skip:]]
            counts.append(len(numbers[skip:]))
        if not chunks:
            return None
        found = iter(find_passages(self.tokenizer, self.retriever, self.num_neighbors, chunks))
        none: list[list[str]] = [[] for _ in range(skip)]
        texts = [none + [[passage.full_text for passage in next(found) or []] for _ in range(n)] for n in counts]
        return neighbor_tensors(texts, self.tokenizer, self.num_neighbors, self.neighbor_len)


def generate(
    model: Retro,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Prompt],
    config: GenerateConfig,
    *,
    retriever: Retriever | None = None,
    on_token: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continues prompts of any lengths in one batch.

    Args:
        model: In eval mode; runs where its weights are.
        tokenizer: The model's.
        prompts: Texts, or tokens with passages of their own.
        config: Length, sampling, number of neighbors; `num_neighbors` 0 turns retrieval off.
        retriever: Asked at every chunk border; needed unless retrieval is off or every prompt brings its passages.
        on_token: Called with the prompt's number and each new piece of text.

    Raises:
        ConfigError: No prompt, an empty one, or no retriever where one is needed.
        MismatchError: The tokenizer has more tokens than the model.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise MismatchError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model {model.config.vocab_size:,}: "
            "use the tokenizer that lies in the model's folder"
        )
    full = [p if isinstance(p, Prompt) else _prompt(p, tokenizer) for p in prompts]
    if not full:
        raise ConfigError("there is no prompt")
    if any(not p.ids for p in full):
        raise ConfigError("the prompt is empty: give some text to continue")
    if config.num_neighbors > 0 and not model.config.cca_layers:
        raise ConfigError("this model was made without retrieval: use num_neighbors = 0 (-k 0)")
    if config.num_neighbors > 0 and retriever is None and any(p.passages is None for p in full):
        raise ConfigError("retrieval needs an index: name one, or turn retrieval off with num_neighbors = 0 (-k 0)")
    was_training = model.training
    model.eval()
    try:
        with Decoder(model, tokenizer, retriever) as decoder:
            for number, prompt in enumerate(full):
                decoder.add(prompt, config, None if on_token is None else functools.partial(on_token, number))
            rows = list(decoder.rows)
            while decoder.rows:
                for row in decoder.step():
                    if row.error is not None:
                        raise row.error
    finally:
        model.train(was_training)
    return [row.result for row in rows]


@dataclass(slots=True)
class Told:
    """How far a row's text is known, so that a new token costs the decoding of the last few tokens and not of all."""

    start: int
    """The first of the tokens that are decoded together with new ones: what a token says may depend on the one before."""
    end: int
    """Tokens before this one end in a whole character, and their text is known."""
    chars: int = 0
    """Length of the text of the tokens from `start` to `end`."""
    text: str = ""
    """Of the row's own tokens before `end`."""


@dataclass(slots=True, eq=False)
class Row:
    """A prompt on its way."""

    prompt: Prompt
    config: GenerateConfig
    on_text: Callable[[str], None] | None
    generator: torch.Generator
    ids: list[int]
    """All tokens so far; the network has seen all but the last, and of a new row none."""
    lead: int
    """Empty slots before the first token, so that the prompt ends on a chunk border."""
    retriever: Retriever | None
    num_alternatives: int
    told: "Told"
    result: Generation = field(default_factory=lambda: Generation("", [], [], False))
    search: "Future[list[list[Passage] | None]] | None" = None
    """Of the neighbors that the next call needs."""
    first_result: int = 0
    """Where the row's passages begin in the result of the search, which may be for several rows."""
    error: Exception | None = None
    """Why the row ended without a result: its search failed."""

    @property
    def new(self) -> bool:
        """Whether nothing is in the cache yet."""
        return not self.result.ids

    def ending(self, chunk_len: int) -> range:
        """The chunks that the next call finishes."""
        end = (self.lead + len(self.ids)) // chunk_len
        return range(0 if self.new else (self.lead + len(self.ids) - 1) // chunk_len, end)


class Decoder:
    """Continues prompts that may come and go at any step.

    Rows stand on grids of their own. Passages are looked up beside the decoding: a row that needs some waits, the others go on.
    """

    def __init__(self, model: Retro, tokenizer: Tokenizer, retriever: Retriever | None = None) -> None:
        """Begins without any prompt.

        Args:
            model: In eval mode; runs where its weights are.
            tokenizer: The model's.
            retriever: Asked from a thread of its own.
        """
        self.model, self.tokenizer, self.retriever = model, tokenizer, retriever
        self.rows: list[Row] = []
        """Those that have not ended; the ones in the cache first, in its order."""
        self._cache = Cache()
        self._in_cache = 0
        self._searcher: ThreadPoolExecutor | None = None
        """There while a row waits for passages: the OpenMP threads that belong to an idle one would slow down every matrix product
        of the decoding, whose own threads wait for each other asleep where there are more of all than cores."""
        self._last_search: Future[list[list[Passage] | None]] | None = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the search that may go on, and its thread."""
        if self._searcher is not None:
            self._searcher.shutdown(cancel_futures=True)
        self._searcher = self._last_search = None

    def add(
        self,
        prompt: Prompt,
        config: GenerateConfig,
        on_text: Callable[[str], None] | None = None,
        *,
        retriever: Retriever | None = None,
        num_alternatives: int = 0,
    ) -> Row:
        """Takes in a prompt that is not empty; its first token comes with one of the next steps.

        Args:
            prompt: See Prompt.
            config: See GenerateConfig.
            on_text: Called with each new piece of text.
            retriever: Asked for this prompt instead of the decoder's; prompts with equal ones (`==`) are looked up together.
            num_alternatives: How many of the most probable tokens are noted at each place.
        """
        lead = -len(prompt.ids) % self.model.config.chunk_len
        generator = torch.Generator().manual_seed(config.seed)
        start = max(len(prompt.ids) - WINDOW, 0)
        told = Told(start, len(prompt.ids), len(self.tokenizer.decode(prompt.ids[start:])))
        asked = self.retriever if retriever is None else retriever
        row = Row(prompt, config, on_text, generator, list(prompt.ids), lead, asked, num_alternatives, told)
        self.rows.append(row)
        return row

    def remove(self, *rows: Row) -> None:
        """Drops rows that have not ended."""
        self._keep([all(other is not row for row in rows) for other in self.rows])

    def step(self) -> list[Row]:
        """Brings every row that need not wait for a search one token further, or new ones to their first.

        Returns:
            The rows that have ended by it: by EOS or by their greatest length, their results complete; or by the error of their
            search.
        """
        if not self.rows:
            return []
        self._begin_searches()
        ready = [row.search is None or row.search.done() for row in self.rows]
        if not any(ready):
            wait([row.search for row in self.rows if row.search is not None], return_when=FIRST_COMPLETED)
            ready = [row.search is None or row.search.done() for row in self.rows]
        # A search of a row that was removed may go on.
        if all(ready) and (self._last_search is None or self._last_search.done()):
            self.close()
        ended = self._failed()
        if ended:
            ready = [is_ready for row, is_ready in zip(self.rows, ready, strict=True) if row.error is None]
            self.remove(*ended)
        old, new = self.rows[: self._in_cache], self.rows[self._in_cache :]
        begun = _fitting([row for row, is_ready in zip(new, ready[len(old) :], strict=True) if is_ready])
        with torch.inference_mode():
            if any(ready[: len(old)]):
                logits_BV = self._forward(old, ready[: len(old)], self._cache)
                ended += self._choose(old, ready[: len(old)], logits_BV)
            if begun:
                cache = Cache()
                logits_BV = self._forward(begun, [True] * len(begun), cache)
                ended += self._choose(begun, [True] * len(begun), logits_BV)
                self._cache.join(cache)
                self._in_cache += len(begun)
                self.rows = [*old, *begun, *(row for row in new if row not in begun)]
            if ended:
                self._keep([row not in ended for row in self.rows])
        return ended

    def _failed(self) -> list[Row]:
        """Rows whose search has failed; they are told why."""
        failed = []
        for row in self.rows:
            if row.search is not None and row.search.done() and (error := row.search.exception()) is not None:
                row.error = error if isinstance(error, Exception) else RuntimeError(repr(error))
                failed.append(row)
        return failed

    def _begin_searches(self) -> None:
        """Asks for the passages of all rows that finish a chunk with the next call, those of equal numbers of neighbors and
        retrievers together, some at a time: whose passages are found is read while others are still looked up."""
        M = self.model.config.chunk_len
        asking: dict[tuple[int, Retriever | None], list[Row]] = {}
        for row in self.rows:
            K = row.config.num_neighbors
            if K and row.search is None and row.prompt.passages is None and row.ending(M):
                asking.setdefault((K, row.retriever), []).append(row)
        for (K, retriever), rows in asking.items():
            assert retriever is not None
            for first in range(0, len(rows), SEARCHED_AT_ONCE):
                some = rows[first : first + SEARCHED_AT_ONCE]
                spans: list[tuple[list[int], int, int]] = []
                for row in some:
                    row.first_result = len(spans)
                    spans += [(list(row.ids), max(c * M - row.lead, 0), (c + 1) * M - row.lead) for c in row.ending(M)]
                if self._searcher is None:
                    self._searcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="retrieval")
                search = self._searcher.submit(find_passages, self.tokenizer, retriever, K, spans)
                self._last_search = search
                for row in some:
                    row.search = search

    def _texts(self, row: Row) -> list[list[str]]:
        """What the neighbors of the chunks that the next call finishes say."""
        M = self.model.config.chunk_len
        ending = row.ending(M)
        if row.config.num_neighbors == 0:
            return []
        given = row.prompt.passages
        if given is not None:
            prompt_chunks = (row.lead + len(row.prompt.ids)) // M
            near = [[c for c in given if c == chunk or (c < chunk and chunk >= prompt_chunks)] for chunk in ending]
            return [given[max(few)] if few else [] for few in near]
        if row.search is None:
            return []
        found = row.search.result()[row.first_result : row.first_result + len(ending)]
        row.search = None
        for chunk, passages in zip(ending, found, strict=True):
            if passages is not None:
                row.result.retrieved[chunk] = passages
        return [[passage.full_text for passage in few or []] for few in found]

    def _forward(self, rows: list[Row], ready: list[bool], cache: Cache) -> Tensor:
        """Logits [B, V] after the last token of rows: whole prompts into a new cache, or one token each."""
        device = self.model.embedding.weight.device
        new = [row.ids if cache.chunk is None else row.ids[-1:] for row in rows]
        T = max(map(len, new))
        ids = torch.tensor([[0] * (T - len(ids)) + ids for ids in new])
        keep = torch.tensor(
            [[is_ready and t >= T - len(ids) for t in range(T)] for ids, is_ready in zip(new, ready, strict=True)]
        )
        slots = None
        if cache.chunk is None:
            lead = torch.tensor([row.lead for row in rows])
            slots = (lead[:, None] + keep.cumsum(1) - 1).to(device)
        texts = [self._texts(row) if is_ready else [] for row, is_ready in zip(rows, ready, strict=True)]
        near: dict[str, Tensor] = {}
        K = max((len(few) for row in texts for few in row), default=0)
        if K:
            R = max(row.config.neighbor_len for row in rows)
            neighbors_BLKR, keep_BLKR = neighbor_tensors(texts, self.tokenizer, K, R)
            for b, row in enumerate(rows):
                keep_BLKR[b, ..., row.config.neighbor_len :] = False
            near = {"neighbors_BLKR": neighbors_BLKR.to(device), "keep_BLKR": keep_BLKR.to(device)}
        hidden_BTD = self.model.hidden(ids.to(device), keep_BT=keep.to(device), slot_BT=slots, cache=cache, **near)
        return self.model.logits(hidden_BTD[:, -1])

    def _choose(self, rows: list[Row], ready: list[bool], logits_BV: Tensor) -> list[Row]:
        """Takes the next token of the rows that were ready; returns those that end by it."""
        wide = torch.promote_types(logits_BV.dtype, torch.float32)
        log_probs_BV = torch.log_softmax(logits_BV.to(wide), dim=-1).cpu()
        tokens = log_probs_BV.argmax(dim=-1).tolist()
        for number, (row, is_ready) in enumerate(zip(rows, ready, strict=True)):
            if is_ready and row.config.temperature > 0:
                tokens[number] = sample(log_probs_BV[number], row.config, row.generator)
        chosen = log_probs_BV.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        most = max(row.num_alternatives for row in rows)
        top = None if most == 0 else log_probs_BV.topk(min(most, log_probs_BV.shape[1]), dim=-1)
        ended = []
        for number, (row, is_ready) in enumerate(zip(rows, ready, strict=True)):
            if not is_ready:
                continue
            token = tokens[number]
            row.result.ids.append(token)
            row.result.log_probs.append(chosen[number])
            if top is not None and row.num_alternatives:
                n = row.num_alternatives
                found = zip(top.indices[number, :n].tolist(), top.values[number, :n].tolist(), strict=True)
                row.result.alternatives.append(list(found))
            row.ids.append(token)
            row.result.finished = token == self.tokenizer.eos_id
            over = row.result.finished or len(row.result.ids) == row.config.max_new_tokens
            if over:
                ended.append(row)
            if over or row.on_text is not None:
                self._tell(row, over)
        return ended

    def _tell(self, row: Row, over: bool) -> None:
        """Brings the text up to the tokens, and tells whoever listens; a character that is not finished waits."""
        told = row.told
        text = told.text + self.tokenizer.decode(row.ids[told.start :])[told.chars :]
        whole = text.rstrip("\ufffd")
        if whole == text:
            told.start, told.end, told.text = told.end, len(row.ids), text
            told.chars = len(self.tokenizer.decode(row.ids[told.start :]))
        if not over:
            text = whole
        if row.on_text is not None and len(text) > len(row.result.text):
            row.on_text(text[len(row.result.text) :])
        if over or len(text) > len(row.result.text):
            row.result.text = text

    def _keep(self, wanted: list[bool]) -> None:
        """Drops the rows that are not wanted, from the cache too."""
        in_cache = [number for number in range(self._in_cache) if wanted[number]]
        if len(in_cache) < self._in_cache:
            if in_cache:
                self._cache.select(torch.tensor(in_cache, device=self.model.embedding.weight.device))
            else:
                self._cache = Cache()
        self.rows = [row for row, is_wanted in zip(self.rows, wanted, strict=True) if is_wanted]
        self._in_cache = len(in_cache)


def _fitting(rows: list[Row]) -> list[Row]:
    """The first of new rows that are read in one call: a batch is as wide as its longest row."""
    longest = 0
    for count, row in enumerate(rows, 1):
        longest = max(longest, len(row.ids))
        if count > 1 and count * longest > PREFILL_SLOTS:
            return rows[: count - 1]
    return rows


def sample(log_probs_V: Tensor, config: GenerateConfig, generator: torch.Generator) -> int:
    """Draws a token from log-probabilities (natural logarithm, float32, on the CPU)."""
    if config.temperature == 0:
        return int(log_probs_V.argmax())
    # The best one becomes 0, so that no temperature is too low to divide by.
    scaled_V = torch.log_softmax((log_probs_V - log_probs_V.max()).double() / config.temperature, dim=-1)
    if 0 < config.top_k < scaled_V.numel():
        lowest = scaled_V.topk(config.top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < lowest, -torch.inf)
    if config.top_p < 1:
        ordered_V, order_V = torch.softmax(scaled_V, dim=-1).sort(descending=True, stable=True)
        beyond_V = ordered_V.cumsum(0) - ordered_V >= config.top_p
        scaled_V = scaled_V.index_fill(0, order_V[beyond_V], -torch.inf)
    return int(torch.multinomial(torch.softmax(scaled_V, dim=-1), 1, generator=generator))


def _prompt(text: str, tokenizer: Tokenizer) -> Prompt:
    if not text.strip():
        raise ConfigError("the prompt is empty: give some text to continue")
    return Prompt(prompt_ids(text, tokenizer))
