"""Questions as batches to train on: with how many passages they are read, and with which.

Letters as in model.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retro.answer import NEIGHBOR_LEN, find_ids, question_prompt
from retro.chunks import Int64s
from retro.config import TrainConfig
from retro.data import Batch, Batches, Retrieval
from retro.errors import ConfigError
from retro.generate import prompt_ids, token_tensors
from retro.mixture import Mixture, Turns
from retro.questions import QuestionData, answer_ids
from retro.tokenizer import Tokenizer

# The last number of a generator's seed: what it draws.
_DROPOUT, _CHOICE, _ORDER = 1, 2, 3


# --- items --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QuestionItem:
    """A question to train or to score on."""

    question: str
    answer: str
    sources: Sequence[str]
    """What the neighbor encoder reads, see `retro.answer.source_text`; empty means closed book."""


def question_batch(
    items: Sequence[QuestionItem],
    tokenizer: Tokenizer,
    chunk_len: int,
    *,
    neighbor_len: int = NEIGHBOR_LEN,
    evidence: bool = False,
) -> Batch:
    """Prompts with their answers on the grid: loss on the answer and EOS only.

    With `evidence`, the places where an answer stands in its sources are marked, for the loss of `pointing`.

    Raises:
        ConfigError: There is no item, or an empty question.
    """
    if not items:
        raise ConfigError("there is no question")
    rows = [
        _Row(
            prompt=prompt_ids(question_prompt(item.question), tokenizer),
            answer=answer_ids(item.answer, tokenizer),
            sources=tokenizer.encode_batch(list(item.sources)),
        )
        for item in items
    ]
    return _packed(rows, tokenizer.eos_id, chunk_len, K=_most_sources(rows), R=neighbor_len, evidence=evidence)


def closed_book(items: Sequence[QuestionItem]) -> list[QuestionItem]:
    """The same questions without sources."""
    return [replace(item, sources=()) for item in items]


@dataclass(frozen=True, slots=True)
class _Row:
    """A question in tokens."""

    prompt: Sequence[int] | NDArray[Any]
    answer: Sequence[int] | NDArray[Any]
    sources: Sequence[Sequence[int] | NDArray[Any]]


def _most_sources(rows: Sequence[_Row]) -> int:
    """K of a batch: at least 1, as tensors have a place for a neighbor."""
    return max(1, *(len(row.sources) for row in rows))


def _packed(rows: Sequence[_Row], eos_id: int, M: int, *, K: int, R: int, evidence: bool = False) -> Batch:
    """Rows on their grids: an answer begins at a chunk border; the chunk before it reads the sources, as do whole ones of it.

    With `evidence`, the places where the answer stands in a source are marked.
    """
    chunks_B = [-(-len(row.prompt) // M) for row in rows]
    B = len(rows)
    L = max(c + -(-len(row.answer) // M) for c, row in zip(chunks_B, rows, strict=True))
    T = L * M
    inputs_BT = np.zeros((B, T), np.int64)
    targets_BT = np.zeros((B, T), np.int64)
    keep_BT = np.zeros((B, T), np.bool_)
    loss_BT = np.zeros((B, T), np.bool_)
    read: list[list[Sequence[Sequence[int] | NDArray[Any]]]] = [[() for _ in range(L)] for _ in rows]
    for b, (row, chunks) in enumerate(zip(rows, chunks_B, strict=True)):
        border = chunks * M
        first, end = border - len(row.prompt), border + len(row.answer)
        inputs_BT[b, first:border] = row.prompt
        inputs_BT[b, border:end] = row.answer
        targets_BT[b, first : end - 1] = inputs_BT[b, first + 1 : end]
        targets_BT[b, end - 1] = eos_id
        keep_BT[b, first:end] = True
        loss_BT[b, border - 1 : end] = True
        for chunk in range(chunks - 1, end // M):
            read[b][chunk] = row.sources
    neighbors_BLKR, keep_BLKR = token_tensors(read, L, K, R)
    evidence_BLKR = torch.zeros_like(keep_BLKR)
    for b, (row, chunks) in enumerate(zip(rows, chunks_B, strict=True) if evidence else ()):
        for k, source in enumerate(row.sources):
            for place in find_ids(row.answer, source[:R]):
                evidence_BLKR[
                    b, chunks - 1 : (chunks * M + len(row.answer)) // M, k, place : place + len(row.answer)
                ] = True
    return Batch(
        inputs_BT=torch.from_numpy(inputs_BT),
        targets_BT=torch.from_numpy(targets_BT),
        keep_BT=torch.from_numpy(keep_BT),
        loss_BT=torch.from_numpy(loss_BT),
        document_BL=torch.zeros(B, L, dtype=torch.long),
        neighbors_BLKR=neighbors_BLKR,
        keep_BLKR=keep_BLKR,
        evidence_BLKR=evidence_BLKR if evidence else None,
    )


# --- batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How questions are read at some time of the training."""

    num_passages: int
    """K: passages of a question, fewer where it has not as many candidates."""
    evidence_share: float = 1.0
    """Share of the questions of which at least one passage holds the answer, where any candidate does."""
    own: bool = False
    """Whether the passage that a question was made of is the evidence, where there is one."""


class QuestionBatches:
    """The questions of one split of question data by number, like `retro.data.Batches`.

    Everything random is a function of the seed, the epoch and the question's place in it.
    """

    def __init__(
        self,
        corpora: Sequence[QuestionData],
        split: str,
        *,
        chunk_len: int,
        neighbor_len: int,
        seed: int,
        weights: Sequence[float] = (),
        context_passages: int = 0,
        compact: bool = True,
        permute: bool = True,
        reading: Reading | None = None,
        evidence: bool = False,
    ) -> None:
        """Lays out the split.

        Args:
            corpora: Question data of one tokenizer.
            split: train, valid or test.
            chunk_len: M of the model.
            neighbor_len: R: longer passages are cut; batches whose passages are all shorter have fewer places.
            seed: Of the order and of all draws.
            weights: Shares of the corpora, of any sum; empty: the numbers of their questions.
            context_passages: So many of the passages, the best first, stand in the decoder's context instead, in front of the
                question (RETRO++, arXiv:2304.06762).
            compact: Columns without a token are left out of batches, which then say at which slots their columns stand. False:
                whole chunks, and neighbors of R places in any case, so that shapes hardly change.
            permute: False keeps the order in every epoch, for evaluation.
            reading: How questions are read; default: with one passage, which has the answer.
            evidence: Mark where answers stand in their passages.

        Raises:
            ConfigError: The split has no question.
        """
        self.reading = reading or Reading(num_passages=1)
        """How questions are read from now on."""
        self._corpora = [data for data in corpora if len(data.questions(split))]
        if not self._corpora:
            raise ConfigError(
                f"{', '.join(str(data.folder) for data in corpora)}: there is no question in the split {split!r}"
            )
        if weights:
            weights = [w for data, w in zip(corpora, weights, strict=True) if len(data.questions(split))]
        self._questions = [data.questions(split) for data in self._corpora]
        self._turns = Turns(weights or [len(questions) for questions in self._questions])
        self._eos_id = corpora[0].tokenizer.eos_id
        self._chunk_len, self.neighbor_len, self._seed = chunk_len, neighbor_len, seed
        self._context, self._compact, self._permute = context_passages, compact, permute
        self._evidence = evidence
        self._orders: dict[tuple[int, int], Int64s] = {}

    @property
    def sequences_per_epoch(self) -> int:
        """Questions of all corpora together."""
        return sum(len(questions) for questions in self._questions)

    def batch(
        self,
        first_sequence: int,
        size: int,
        *,
        neighbor_dropout: float = 0.0,
        copy_share: float = 0.0,
        neighbors: Retrieval = "on",
    ) -> Batch:
        """Some questions; the same whenever they are asked for with the same `reading`, in whatever company.

        Args:
            first_sequence: Number of the first, counted through all epochs.
            size: B.
            neighbor_dropout: Share of the questions, drawn at random, that are asked without passages (closed book).
            copy_share: Nothing to questions: their evidence is there to be copied.
            neighbors: "off": no passages at all. "shuffled": those of the question that lies half an epoch away.
        """
        corpus_B, number_B = self._turns.turns(first_sequence, size)
        rows = [
            self._row(corpus, number, neighbor_dropout, neighbors)
            for corpus, number in zip(corpus_B.tolist(), number_B.tolist(), strict=True)
        ]
        longest = max((len(source) for row in rows for source in row.sources), default=1)
        R = min(-(-longest // 16) * 16, self.neighbor_len) if self._compact else self.neighbor_len
        K = _most_sources(rows) if self._compact else self.reading.num_passages
        batch = _packed(rows, self._eos_id, self._chunk_len, K=K, R=R, evidence=self._evidence)
        if neighbors == "off":
            batch = replace(batch, neighbors_BLKR=None, keep_BLKR=None, evidence_BLKR=None)
        return compacted(batch) if self._compact else batch

    def _row(self, corpus: int, number: int, neighbor_dropout: float, neighbors: Retrieval) -> _Row:
        data = self._corpora[corpus]
        question, generator = self._placed(corpus, number)
        passages, target = self._chosen(data, question, generator)
        if neighbors == "shuffled":
            elsewhere = number + max(len(self._questions[corpus]) // 2, 1)
            other, other_generator = self._placed(corpus, elsewhere)
            passages, _ = self._chosen(data, other, other_generator)
        dropped = bool(neighbor_dropout) and self._generator(corpus, number, _DROPOUT).random() < neighbor_dropout
        if dropped or neighbors == "off":
            passages = []
            target = int(data.arrays.targets[question])
        sources = [data.passage(passage) for passage in passages]
        in_front = [source[: self.neighbor_len] for source in sources[: self._context]]
        context = np.concatenate([np.empty(0, np.int64), *in_front])
        prompt = data.prompt(question)
        return _Row(
            prompt=np.concatenate([prompt[:1], context, prompt[1:]]) if len(context) else prompt,
            answer=data.target(target),
            sources=_in_any_order(sources[self._context :], self._generator(corpus, number, _ORDER)),
        )

    def _chosen(self, data: QuestionData, question: int, generator: np.random.Generator) -> tuple[list[int], int]:
        """Passages of a question, in the order of its candidates, and what is to be said with them.

        A passage whose answer lies behind the tokens that are read does not hold it. Where none does, the best ones are read, as
        when somebody asks; where all do, it is no question that could be read without.
        """
        passages_C, targets_C = data.candidates(question)
        holds_C = self._holds(data, passages_C, targets_C)
        holding, other = np.flatnonzero(holds_C), np.flatnonzero(~holds_C)
        own, reading = int(data.arrays.own[question]), self.reading
        K = reading.num_passages
        default = int(data.arrays.targets[question])
        wanted = generator.random() < reading.evidence_share or not len(other)
        if wanted and own >= 0 and (reading.own or not len(holding)):
            few = generator.permutation(other)[: K - 1]
            return [own, *passages_C[np.sort(few)].tolist()], default
        if not len(holding):
            return passages_C[:K].tolist(), default
        if not wanted:
            few = np.sort(generator.permutation(other)[:K])
            return passages_C[few].tolist(), default
        first = int(generator.choice(holding))
        # Distractors come first, so that evidence is one among others; further evidence only fills what they leave.
        rest = [*generator.permutation(other), *(c for c in generator.permutation(holding) if c != first)]
        few = np.sort(np.array([first, *rest[: K - 1]]))
        return passages_C[few].tolist(), int(targets_C[first])

    def _holds(
        self, data: QuestionData, passages_C: NDArray[np.int32], targets_C: NDArray[np.int32]
    ) -> NDArray[np.bool_]:
        """Which candidates hold their answers within what is read of them."""
        holds_C: NDArray[np.bool_] = targets_C >= 0
        for place in np.flatnonzero(holds_C).tolist():
            source = data.passage(int(passages_C[place]))
            if len(source) > self.neighbor_len:
                answer = data.target(int(targets_C[place]))
                found = find_ids(answer, source)
                # Tokens that stand nowhere are written otherwise there, as with an accent, or within another word.
                holds_C[place] = not found or found[0] + len(answer) <= self.neighbor_len
        return holds_C

    def _placed(self, corpus: int, number: int) -> tuple[int, np.random.Generator]:
        """A question, and the generator of its passages."""
        epoch, place = divmod(number, len(self._questions[corpus]))
        return int(self._order(corpus, epoch)[place]), self._generator(corpus, number, _CHOICE)

    def _order(self, corpus: int, epoch: int) -> Int64s:
        questions = self._questions[corpus]
        if not self._permute:
            return questions
        if (corpus, epoch) not in self._orders:
            self._orders = {
                key: order for key, order in self._orders.items() if key[0] != corpus or key[1] == epoch - 1
            }
            order = np.random.default_rng([self._seed, corpus, epoch]).permutation(len(questions))
            self._orders[corpus, epoch] = questions[order]
        return self._orders[corpus, epoch]

    def _generator(self, corpus: int, number: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, corpus, number, purpose])


def _in_any_order(sources: Sequence[NDArray[Any]], generator: np.random.Generator) -> list[NDArray[Any]]:
    return [sources[place] for place in generator.permutation(len(sources))]


class WithReplay:
    """Steps on questions, and in between steps on text, so that a model does not forget how to go on with it.

    Which of the two a step is on follows from its number; a step on questions has `batch_size` of them.
    """

    def __init__(
        self, questions: QuestionBatches, text: Batches | Mixture, *, share: float, sequences: int, batch_size: int
    ) -> None:
        """Takes turns.

        Args:
            questions: Most of the steps.
            text: The others.
            share: Of the steps that are on text, in (0, 1).
            sequences: Sequences of text of such a step.
            batch_size: Of a step on questions.
        """
        self.questions, self._text = questions, text
        self._sequences, self._batch_size = sequences, batch_size
        self._order = Turns([1 - share, share])

    @property
    def sequences_per_epoch(self) -> int:
        """Questions, in units of which training counts."""
        return self.questions.sequences_per_epoch

    @property
    def reading(self) -> Reading:
        """How questions are read from now on."""
        return self.questions.reading

    @reading.setter
    def reading(self, reading: Reading) -> None:
        self.questions.reading = reading

    def batch(
        self,
        first_sequence: int,
        size: int,
        *,
        neighbor_dropout: float = 0.0,
        copy_share: float = 0.0,
        neighbors: Retrieval = "on",
    ) -> Batch:
        """A step's sequences or a part of them, which may not reach into the next step.

        Args:
            first_sequence: step * batch_size, and how many of the step's sequences come before the part.
            size: Of the part, in units of the batch size: of text as large a share of `sequences`.
            neighbor_dropout: See `QuestionBatches.batch`; for text, see `Batches.batch`.
            copy_share: Likewise.
            neighbors: Likewise.
        """
        step, place = divmod(first_sequence, self._batch_size)
        kind, number = (int(x[0]) for x in self._order.turns(step, 1))
        options: dict[str, Any] = {
            "neighbor_dropout": neighbor_dropout,
            "copy_share": copy_share,
            "neighbors": neighbors,
        }
        if kind == 0:
            return self.questions.batch(number * self._batch_size + place, size, **options)
        begin, end = (n * self._sequences // self._batch_size for n in (place, place + size))
        return self._text.batch(number * self._sequences + begin, max(end - begin, 1), **options)


class Curriculum:
    """With how many passages questions are read: more as soon as few are mastered.

    It follows from the lines of the metrics, so that a training that goes on decides as one that was never interrupted.

    Source: docs/decisions.md, where a network that began with four passages stayed at chance.
    """

    def __init__(self, config: TrainConfig, lines: Iterable[dict[str, Any]]) -> None:
        """Goes through the lines so far, oldest first."""
        self._config = config
        self._stage = 0
        for line in lines:
            self.add(line)

    def add(self, record: dict[str, Any]) -> None:
        """Takes an evaluation note of: passing `passages_grow_at` with a number of passages, however it was come to, brings the
        next one."""
        passages = self._config.passages
        if record.get("passages") in passages and record["valid_exact_match"] >= self._config.passages_grow_at:
            stage = passages.index(record["passages"]) + 1
            self._stage = max(self._stage, min(stage, len(passages) - 1))

    def reading(self, step: int) -> Reading:
        """How the questions of a step, counted from 1, are read; each stage gets at most its share of the steps."""
        config = self._config
        stages = len(config.passages)
        stage = max(self._stage, (step - 1) * stages // max(config.steps, 1))
        return Reading(
            num_passages=config.passages[min(stage, stages - 1)],
            evidence_share=config.evidence_share,
            own=step <= config.own_share * config.steps,
        )


def compacted(batch: Batch) -> Batch:
    """The same sequences without the columns that hold no token in any row: each row's tokens stand at its first columns, and
    `slot_BT` says where on the grid. For rows of one document."""
    counts_B = batch.keep_BT.sum(dim=1)
    columns_BT = batch.keep_BT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(counts_B.max())]

    def taken(x_BT: torch.Tensor) -> torch.Tensor:
        return x_BT.gather(1, columns_BT)

    return replace(
        batch,
        inputs_BT=taken(batch.inputs_BT),
        targets_BT=taken(batch.targets_BT),
        keep_BT=taken(batch.keep_BT),
        loss_BT=taken(batch.loss_BT),
        slot_BT=columns_BT,
    )
