"""Generation: cached decoding that retrieves at every chunk border, and the protocol a retriever fulfils."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from retro.cca import Cache
from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.errors import ConfigError, MismatchError
from retro.model import Retro
from retro.tokenizer import Tokenizer

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
    B, L = len(texts), max((len(row) for row in texts), default=0)
    neighbors_BLKR = torch.zeros(B, L, K, R, dtype=torch.long)
    keep_BLKR = torch.zeros(B, L, K, R, dtype=torch.bool)
    flat = [(b, c, k, text) for b, row in enumerate(texts) for c, few in enumerate(row) for k, text in enumerate(few)]
    for (b, c, k, _), ids in zip(flat, tokenizer.encode_batch([text for *_, text in flat]), strict=True):
        n = min(len(ids), R)
        neighbors_BLKR[b, c, k, :n] = torch.tensor(ids[:n])
        keep_BLKR[b, c, k, :n] = True
    return neighbors_BLKR, keep_BLKR


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """Finds the neighbors of chunks by their text."""

    tokenizer: Tokenizer
    retriever: Retriever
    num_neighbors: int
    """K."""
    neighbor_len: int
    """R."""

    def passages(self, chunks: Sequence[tuple[list[int], int, int]]) -> list[list[Passage] | None]:
        """Passages of some chunks, in one search; None for a chunk without text, which is not looked up.

        Args:
            chunks: Of each, the tokens of its row and which part of them it is: `ids[first:end]`, as `Tokenizer.decode_chunk` takes
                them.
        """
        texts = [self.tokenizer.decode_chunk(*chunk) for chunk in chunks]
        queries = list(dict.fromkeys(text for text in texts if text.strip()))
        found = self.retriever.retrieve(queries, self.num_neighbors) if queries else []
        passages = dict(zip(queries, found, strict=True))
        return [passages.get(text) for text in texts]

    def neighbors(
        self, ids: Sequence[list[int]], lead: Sequence[int], before: Sequence[int], chunk_len: int
    ) -> tuple[Tensor, Tensor] | None:
        """Neighbors of the chunks that rows finish by new tokens.

        Args:
            ids: All tokens of each row.
            lead: Empty slots before each row's first token.
            before: How many tokens each row had before.
            chunk_len: M.

        Returns:
            Ids and keep [B, L, K, R], on the CPU, where L counts from each row's unfinished chunk on, as `Retro.hidden` takes them;
            None where no chunk is finished.
        """
        chunks: list[tuple[list[int], int, int]] = []
        counts: list[int] = []
        for row, start, old in zip(ids, lead, before, strict=True):
            numbers = range((start + old) // chunk_len, (start + len(row)) // chunk_len)
            chunks += [(row, max(c * chunk_len - start, 0), (c + 1) * chunk_len - start) for c in numbers]
            counts.append(len(numbers))
        if not chunks:
            return None
        found = iter(self.passages(chunks))
        texts = [[[passage.full_text for passage in next(found) or []] for _ in range(count)] for count in counts]
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
        with torch.inference_mode():
            return _Decoding(model, tokenizer, full, config, retriever, on_token).run()
    finally:
        model.train(was_training)


class _Decoding:
    """One batch on its way. All rows end their prompts at the same slot, so that their chunk borders coincide."""

    def __init__(
        self,
        model: Retro,
        tokenizer: Tokenizer,
        prompts: list[Prompt],
        config: GenerateConfig,
        retriever: Retriever | None,
        on_token: Callable[[int, str], None] | None,
    ) -> None:
        self.model, self.tokenizer, self.prompts, self.config = model, tokenizer, prompts, config
        self.on_token = on_token
        self.lookup = None
        if retriever is not None and config.num_neighbors > 0:
            self.lookup = Lookup(
                tokenizer=tokenizer,
                retriever=retriever,
                num_neighbors=config.num_neighbors,
                neighbor_len=config.neighbor_len,
            )
        self.device = model.embedding.weight.device
        self.ids = [list(p.ids) for p in prompts]
        self.done = [False] * len(prompts)
        self.results = [Generation("", [], [], False) for _ in prompts]
        self.generators = [torch.Generator().manual_seed(config.seed) for _ in prompts]
        M = model.config.chunk_len
        self.chunks = [-(-len(p.ids) // M) for p in prompts]
        """Chunks of each prompt, lead included."""
        self.start = max(self.chunks) * M
        """Slot at which generation begins; row b's own chunk 0 begins at slot start - chunks[b] * M."""

    def run(self) -> list[Generation]:
        cache = Cache()
        logits_BV = self._prefill(cache)
        M = self.model.config.chunk_len
        for step in range(self.config.max_new_tokens):
            next_B = self._choose(logits_BV)
            if all(self.done) or step + 1 == self.config.max_new_tokens:
                break
            slot = self.start + step
            neighbors, keep = None, None
            if slot % M == M - 1 and self.config.num_neighbors > 0:
                neighbors, keep = self._neighbors([[chunk + (step + 1) // M - 1] for chunk in self.chunks])
            logits_BTV = self.model(
                next_B[:, None].to(self.device), neighbors_BLKR=neighbors, keep_BLKR=keep, cache=cache
            )
            logits_BV = logits_BTV[:, -1]
        for row, result in enumerate(self.results):
            text = self._continuation(row)
            if self.on_token is not None and len(text) > len(result.text):
                self.on_token(row, text[len(result.text) :])  # a character that the last token left unfinished
            result.text = text
        return self.results

    def _prefill(self, cache: Cache) -> Tensor:
        B, M = len(self.ids), self.model.config.chunk_len
        inputs_BT = torch.zeros(B, self.start, dtype=torch.long)
        keep_BT = torch.zeros(B, self.start, dtype=torch.bool)
        for row, ids in enumerate(self.ids):
            inputs_BT[row, self.start - len(ids) :] = torch.tensor(ids)
            keep_BT[row, self.start - len(ids) :] = True
        neighbors, keep = None, None
        if self.config.num_neighbors > 0:
            L = self.start // M
            neighbors, keep = self._neighbors([list(range(chunks - L, chunks)) for chunks in self.chunks])
        hidden_BTD = self.model.hidden(
            inputs_BT.to(self.device),
            keep_BT=keep_BT.to(self.device),
            neighbors_BLKR=neighbors,
            keep_BLKR=keep,
            cache=cache,
        )
        return self.model.logits(hidden_BTD[:, -1])

    def _choose(self, logits_BV: Tensor) -> Tensor:
        """Takes the next token of every row that is not done."""
        wide = torch.promote_types(logits_BV.dtype, torch.float32)
        log_probs_BV = torch.log_softmax(logits_BV.to(wide), dim=-1).cpu()
        chosen = []
        for row, result in enumerate(self.results):
            if self.done[row]:
                chosen.append(self.tokenizer.eos_id)
                continue
            token = sample(log_probs_BV[row], self.config, self.generators[row])
            chosen.append(token)
            result.ids.append(token)
            result.log_probs.append(float(log_probs_BV[row, token]))
            self.ids[row].append(token)
            if token == self.tokenizer.eos_id:
                self.done[row] = result.finished = True
            if self.on_token is not None:
                text = self._continuation(row)
                stable = text if self.done[row] else text.rstrip("\ufffd")
                if len(stable) > len(result.text):
                    self.on_token(row, stable[len(result.text) :])
                    result.text = stable
        return torch.tensor(chosen)

    def _continuation(self, row: int) -> str:
        """Text of the new tokens, as it reads after the prompt."""
        prompt = len(self.prompts[row].ids)
        return self.tokenizer.decode(self.ids[row])[len(self.tokenizer.decode(self.ids[row][:prompt])) :]

    def _neighbors(self, chunks: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Neighbors of some chunks of every row (by the row's own numbers; negative ones lie before its prompt)."""
        wanted: list[tuple[int, int]] = []
        spans: list[tuple[list[int], int, int]] = []
        texts: list[list[list[str]]] = [[[] for _ in row] for row in chunks]
        M = self.model.config.chunk_len
        for row, numbers in enumerate(chunks):
            lead = self.chunks[row] * M - len(self.prompts[row].ids)
            passages = self.prompts[row].passages
            for place, chunk in enumerate(numbers):
                if chunk < 0 or self.done[row]:
                    continue
                if passages is not None:
                    given = [c for c in passages if c == chunk or (c < chunk and chunk >= self.chunks[row])]
                    texts[row][place] = passages[max(given)] if given else []
                    continue
                wanted.append((row, place))
                spans.append((self.ids[row], max(chunk * M - lead, 0), (chunk + 1) * M - lead))
        if wanted:
            assert self.lookup is not None
            for (row, place), near in zip(wanted, self.lookup.passages(spans), strict=True):
                if near is not None:
                    texts[row][place] = [passage.full_text for passage in near]
                    self.results[row].retrieved[chunks[row][place]] = near
        K = max([self.config.num_neighbors, *(len(few) for row in texts for few in row)])
        neighbors, keep = neighbor_tensors(texts, self.tokenizer, K, self.config.neighbor_len)
        return neighbors.to(self.device), keep.to(self.device)


def sample(log_probs_V: Tensor, config: GenerateConfig, generator: torch.Generator) -> int:
    """Draws a token from log-probabilities (natural logarithm, float32, on the CPU)."""
    if config.temperature == 0:
        return int(log_probs_V.argmax())
    scaled_V = torch.log_softmax(log_probs_V / config.temperature, dim=-1)
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
