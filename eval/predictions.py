"""What is read with each question, what a model says then and what that costs: kept line by line.

OUT/predictions/qa-MODEL-FINGERPRINT/
  recipe.json          all that determines the answers
  predictions.jsonl    a line for each question; an evaluation that was interrupted goes on after the last one

Letters: Q questions, K passages, X vector width.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from eval.judgments import judged_documents
from eval.metrics import exact_match, first_with_answer, token_f1
from eval.questions import Question
from index_builder.build import open_vectors
from index_builder.search import IndexRetriever, distinct_passages
from index_builder.shards import Progress
from retro.answer import Answer
from retro.artifact import fingerprint, storage_error, write_json
from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.errors import ConfigError, FormatError, MismatchError

Mode = Literal["retrieval", "shuffled", "closed", "gold", "prompt", "frequent"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""What is read: the passages found; those found for another question; none; those of the document that the question names; the ones
found, pasted into the prompt of another model; nothing at all (the most frequent answer of the question's relation)."""
DEPTH = 20
"""Passages that are looked up at least, to tell how many of them it takes to have the answer."""
_BATCH_SEARCHED = 512
_TRIED = 64
"""Other questions that are tried before one with passages in common is taken."""
_PREDICTIONS, _RECIPE = "predictions.jsonl", "recipe.json"

Rows = NDArray[np.int64]
Passages = list[Passage]


# --- what is read -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class QaConfig:
    """How questions are asked."""

    modes: tuple[Mode, ...] = ()
    """Columns of the table; none: all that there is what they need for."""
    num_neighbors: int = 10
    """Passages that are read; 0: none, whatever the mode."""
    neighbor_len: int = 160
    """Tokens of a passage that are read."""
    max_new_tokens: int = 32
    """Longest answer."""
    batch_size: int = 16
    """Questions at once."""
    seed: int = 0
    """Of the shuffling and of the intervals."""

    def __post_init__(self) -> None:
        if unknown := [mode for mode in self.modes if mode not in MODES]:
            raise ConfigError(f"mode {unknown[0]!r} is unknown: use {', '.join(MODES)}")
        if self.num_neighbors < 0 or self.batch_size < 1:
            raise ConfigError("num_neighbors must not be negative, and batch_size must be above 0")

    @property
    def generation(self) -> GenerateConfig:
        """Of an answer."""
        return GenerateConfig(
            num_neighbors=self.num_neighbors, neighbor_len=self.neighbor_len, max_new_tokens=self.max_new_tokens
        )


class Found:
    """The passages of all questions, held as rows of one state of an index."""

    def __init__(
        self,
        retriever: IndexRetriever,
        questions: Sequence[Question],
        num_neighbors: int,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Looks all questions up.

        Args:
            retriever: Where and how.
            questions: At least one.
            num_neighbors: Passages that are read; `DEPTH` at least are looked up where there are as many, and twice as many hits,
                as some of them continue others.
            seed: Of whose passages a question gets when they are shuffled.
            progress: Told how far it is.

        Raises:
            ConfigError: There are fewer passages than are to be read.
        """
        self._snapshot = retriever.snapshot()
        self.store = self._snapshot.store
        self.num_read = num_neighbors
        there = self.store.num_live_chunks
        if num_neighbors > there:
            raise ConfigError(f"k = {num_neighbors} is more than the {there:,} chunks of {retriever.folder}: lower k")
        self.depth = min(max(num_neighbors, DEPTH), there)
        """Passages looked up."""
        hits = min(2 * self.depth, there)
        keep_N = self._snapshot.rows_where(retriever.where)
        scores, rows = [], []
        began = time.perf_counter()
        for start in range(0, len(questions), _BATCH_SEARCHED):
            few = [question.text for question in questions[start : start + _BATCH_SEARCHED]]
            found = retriever.find(few, hits, role="query", excluded_QG=None, keep_N=keep_N, snapshot=self._snapshot)
            scores.append(found[0])
            rows.append(found[1])
            if progress is not None:
                progress("passages", start + len(few), len(questions))
        self.seconds = (time.perf_counter() - began) / len(questions)
        """Of a question, in batches."""
        self._scores_QK, self._rows_QK = np.concatenate(scores), np.concatenate(rows)
        self._seed = seed

    @functools.cached_property
    def other_Q(self) -> Rows:  # noqa: N802
        """Whose passages each question gets when they are shuffled.

        Raises:
            ConfigError: There is one question only.
        """
        return others(self._rows_QK[:, : self.num_read], self._seed)

    def passages(self, question: int, k: int) -> Passages:
        """The k best ones of a question, best first."""
        return distinct_passages(self.store, self._rows_QK[question], self._scores_QK[question], k)

    def shuffled(self, question: int) -> Passages:
        """Those of another question: none of the question's own, and none that has text in common with one of them."""
        own = np.array([passage.row for passage in self.passages(question, self.num_read)], np.int64)
        given = self.passages(int(self.other_Q[question]), self.num_read)
        return [passage for passage in given if not _near(own, np.array([passage.row]))]


def others(rows_QK: Rows, seed: int) -> Rows:
    """For each question another one [Q], by its number: at random, with no text in common where there is such a one.

    Raises:
        ConfigError: There is one question only.
    """
    Q = len(rows_QK)
    if Q < 2:
        raise ConfigError("one question alone cannot be given the passages of another: leave the mode shuffled out")
    order = np.random.default_rng(seed).permutation(Q)
    place_Q = np.argsort(order)
    other_Q = np.empty(Q, np.int64)
    for question in range(Q):
        least = None
        for step in range(1, min(Q, _TRIED + 1)):
            other = int(order[(place_Q[question] + step) % Q])
            shared = _near(rows_QK[question], rows_QK[other])
            if least is None or shared < least:
                least, other_Q[question] = shared, other
            if shared == 0:
                break
    return other_Q


def _near(rows: Rows, others: Rows) -> int:
    """How many pairs of passages have text in common: a passage is a chunk and the next one."""
    near = (np.abs(rows[:, None] - others[None, :]) <= 1) & (rows[:, None] >= 0) & (others[None, :] >= 0)
    return int(near.sum())


class Gold:
    """The documents that questions name, in an index."""

    def __init__(self, retriever: IndexRetriever, questions: Sequence[Question]) -> None:
        """Finds them.

        Raises:
            MismatchError: No question names a document of this index, or a name stands for several.
        """
        self._snapshot = retriever.snapshot()
        self._encoder = retriever.encoder
        self._folder = retriever.folder
        wanted = {name: 1 for question in questions for name in question.gold}
        if not wanted:
            raise MismatchError("no question names a document that answers it (`para_id` or `gold`)")
        numbers = {name: n for n, name in judged_documents(self._snapshot.store, {"": wanted}).items()}
        self._documents = [tuple(numbers[name] for name in q.gold if name in numbers) for q in questions]

    def keys(self, question: int) -> set[str]:
        """Of the documents that a question names."""
        return {self._snapshot.store.field("key", document) for document in self._documents[question]}

    def passages(self, questions: Mapping[int, str], k: int) -> dict[int, Passages]:
        """At most k passages of the documents of some questions, those first whose meaning is nearest to the question.

        Args:
            questions: Their texts, by number.
            k: At most.
        """
        store = self._snapshot.store
        there = {number: text for number, text in questions.items() if self._documents[number]}
        if not there:
            return {}
        vectors = open_vectors(self._folder, store.shards)
        given = {}
        for number, vector_X in zip(there, self._encoder.encode(list(there.values()), "query"), strict=True):
            scored: list[tuple[float, int]] = []
            for document in self._documents[number]:
                rows = store.rows_of(np.array([document]))
                distances = ((vectors.gather(rows) - vector_X) ** 2).sum(axis=1)
                # A passage is a chunk with the next one: every other passage holds all of the text.
                scored += [(float(distances[i : i + 2].min()), int(rows[i])) for i in range(0, len(rows), 2)]
            given[number] = [store.passage(row, -distance) for distance, row in sorted(scored)[:k]]
        return given


# --- asking -------------------------------------------------------------------------------------------------------


Ask = Callable[[Sequence[str], Sequence[Sequence[Passage]], GenerateConfig], Sequence[Answer]]
"""Answers questions, each from passages of its own; `num_neighbors` is 0 where nothing is to be read."""


class Predictions:
    """What was said, a line for each question, kept in a folder as it comes."""

    def __init__(self, out: Path | None, name: str, recipe: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Opens what is there of the same evaluation.

        Args:
            out: Folder of the report; None: nothing is kept.
            name: Of the model.
            recipe: Plain data: all that determines the answers.
            overwrite: Start again.

        Raises:
            FormatError: The file is damaged other than at its end.
            StorageError: It cannot be written.
        """
        self.folder: Path | None = None
        self.lines: list[dict[str, Any]] = []
        """Of the questions so far, in their order."""
        self._ends = [0]
        if out is None:
            return
        self.folder = out / "predictions" / f"qa-{name}-{fingerprint(dict(recipe))}"
        if overwrite:
            (self.folder / _PREDICTIONS).unlink(missing_ok=True)
        if not (self.folder / _RECIPE).is_file():
            write_json(self.folder / _RECIPE, dict(recipe))
        try:
            # What stands after the last end of a line was being written when the evaluation was killed.
            for line in (self.folder / _PREDICTIONS).read_bytes().split(b"\n")[:-1]:
                self.lines.append(json.loads(line))
                self._ends.append(self._ends[-1] + len(line) + 1)
        except FileNotFoundError:
            return
        except ValueError as error:
            raise FormatError(
                f"{self.folder / _PREDICTIONS} is damaged ({error}): start again with --overwrite"
            ) from error

    def cut(self, count: int) -> None:
        """Drops all lines but the first ones, and what is left of an unfinished one."""
        self.lines, self._ends = self.lines[:count], self._ends[: count + 1]
        if self.folder is not None and (self.folder / _PREDICTIONS).is_file():
            os.truncate(self.folder / _PREDICTIONS, self._ends[-1])

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Appends lines; they are on the disk when it returns.

        Raises:
            StorageError: They cannot be written.
        """
        self.lines += lines
        if self.folder is None:
            return
        path = self.folder / _PREDICTIONS
        # A question may hold half a surrogate pair, which UTF-8 cannot.
        encoded = [json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for line in lines]
        try:
            with path.open("ab") as file:
                file.write(b"".join(encoded))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(path, error) from error
        for line in encoded:
            self._ends.append(self._ends[-1] + len(line))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What it takes to ask."""

    questions: Sequence[Question]
    config: QaConfig
    ask: Ask
    """The model that is measured."""
    passage_tokens: Callable[[Sequence[Passage]], int]
    """Of passages that this model reads, which are not in its prompt."""
    found: Found | None = None
    """Passages of the questions, for all modes that read them."""
    gold: Gold | None = None
    """Documents that the questions name, for the mode gold."""
    prompted: Ask | None = None
    """The model whose prompt passages are pasted into, for the mode prompt."""
    frequent: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """See frequent_answers, for the mode frequent."""

    def run(self, predictions: Predictions, progress: Progress | None = None) -> list[dict[str, Any]]:
        """Asks every question in every mode, but for those that were answered before.

        Args:
            predictions: Goes on there; whole batches stay, so that the others are made of the same questions as ever.
            progress: Told how far it is.

        Returns:
            Plain data of each question: id, data set, question, accepted answers, group, passages found (key, row, score), `rank`
            of the first one with an answer (from 1; None: none of them), `gold_rank` (that of the first one of a document that the
            question names), seconds of the search, and what each mode said, with its exact match, F1 and cost.
        """
        total, size = len(self.questions), self.config.batch_size
        if len(predictions.lines) < total:
            predictions.cut(len(predictions.lines) // size * size)
        for start in range(len(predictions.lines), total, size):
            numbers = range(start, min(start + size, total))
            predictions.add(self._batch(numbers))
            if progress is not None:
                progress("questions", numbers.stop, total)
        return predictions.lines

    def _batch(self, numbers: range) -> list[dict[str, Any]]:
        lines = [self._line(number) for number in numbers]
        for mode in self.config.modes:
            if mode == "frequent":
                said = self._frequent(numbers)
            else:
                said = self._asked(mode, numbers)
            for number, line in zip(numbers, lines, strict=True):
                if number in said:
                    text, accepted = said[number]["answer"], self.questions[number].answers
                    scores = {"exact_match": exact_match(text, accepted), "f1": token_f1(text, accepted)}
                    line["modes"][mode] = said[number] | scores
        return lines

    def _line(self, number: int) -> dict[str, Any]:
        question = self.questions[number]
        line: dict[str, Any] = {
            "id": question.id,
            "data_set": question.data_set,
            "question": question.text,
            "answers": list(question.answers),
            "group": question.group,
        }
        if self.found is not None:
            passages = self.found.passages(number, self.found.depth)
            line["passages"] = [{"key": p.key, "row": p.row, "score": p.score} for p in passages]
            place = first_with_answer([p.full_text for p in passages], question.answers)
            line["rank"] = None if place is None else place + 1
            line["search_seconds"] = self.found.seconds
            if self.gold is not None:
                keys = self.gold.keys(number)
                texts = [p.full_text if p.key in keys else "" for p in passages]
                place = first_with_answer(texts, question.answers)
                line["gold_rank"] = None if place is None else place + 1
        return line | {"modes": {}}

    def _asked(self, mode: Mode, numbers: range) -> dict[int, dict[str, Any]]:
        """What a model says, by question; nothing for questions that the mode has no passages for."""
        began = time.perf_counter()
        given = self._passages(mode, numbers)
        if not given:
            return {}
        config = self.config.generation
        ask = self.ask
        if mode == "closed":
            config = replace(config, num_neighbors=0)
        elif mode == "prompt":
            assert self.prompted is not None
            ask = self.prompted
        answers = ask([self.questions[number].text for number in given], list(given.values()), config)
        seconds = (time.perf_counter() - began) / len(given)
        said = {}
        for (number, passages), answer in zip(given.items(), answers, strict=True):
            said[number] = {
                "answer": answer.text,
                "confidence": answer.confidence,
                "num_passages": len(answer.passages),
                "seconds": seconds,
                "prompt_tokens": answer.prompt_tokens,
                "passage_tokens": 0 if mode == "prompt" else self.passage_tokens(answer.passages),
                "generated_tokens": len(answer.generation.ids),
            }
            if mode == "shuffled":
                assert self.found is not None
                said[number]["of"] = self.questions[int(self.found.other_Q[number])].id
            if mode in ("shuffled", "gold"):
                said[number]["rows"] = [passage.row for passage in passages]
        return said

    def _passages(self, mode: Mode, numbers: range) -> dict[int, Passages]:
        """What the questions are read with."""
        k = self.config.num_neighbors
        if mode == "closed":
            return {number: [] for number in numbers}
        if mode == "gold":
            assert self.gold is not None
            texts = {number: self.questions[number].text for number in numbers}
            return {number: few for number, few in self.gold.passages(texts, k).items() if few}
        assert self.found is not None
        if mode == "shuffled":
            return {number: self.found.shuffled(number) for number in numbers}
        return {number: self.found.passages(number, k) for number in numbers}

    def _frequent(self, numbers: range) -> dict[int, dict[str, Any]]:
        """The most frequent answer of the relation, where it is known."""
        said = {}
        for number in numbers:
            if (answer := self.frequent.get(self.questions[number].group)) is not None:
                said[number] = {"answer": answer[0], "confidence": answer[1]}
        return said
