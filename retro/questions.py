"""Question data: questions with their answers and the passages that may be read, in tokens.

Letters as in model.py; besides, Q questions, C candidates of them all, P passages, A targets.

For each question there are a prompt, candidate passages, and for each candidate that states the answer what the model is to say
then, in the passage's own words. Which candidates a question is read with is drawn while training (retro/question_batches.py).
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retro import artifact
from retro.answer import question_prompt, source_text
from retro.chat import ChatFormat, chat_template, save_template
from retro.chunks import SPLITS, Int64s, TrainingData, load_array, save_array
from retro.errors import ConfigError, FormatError, MismatchError
from retro.generate import prompt_ids
from retro.tokenizer import Tokenizer

KIND = "question data"
LONGEST_PROMPT = 512
"""Tokens; questions with longer prompts are left out of question data, and counted."""
_TOKENIZED_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionArrays:
    """The arrays of question data, as files of their names."""

    passage_ids: NDArray[Any]
    """Tokens of all passages, one after the other, titles in front; uint16 where the vocabulary allows, else int32."""
    passage_starts: Int64s
    """Where each begins, and the end [P + 1]."""
    prompt_ids: NDArray[Any]
    """BOS and the tokens of each question's prompt."""
    prompt_starts: Int64s
    """[Q + 1]."""
    target_ids: NDArray[Any]
    """Tokens of answers, without EOS."""
    target_starts: Int64s
    """[A + 1]."""
    targets: NDArray[np.int32]
    """What is to be said where no passage that is read has the answer [Q]."""
    candidates: NDArray[np.int32]
    """Passages that may be read [C]."""
    candidate_targets: NDArray[np.int32]
    """What is to be said where this one is read [C]; -1: it does not hold the answer."""
    candidate_starts: Int64s
    """[Q + 1]."""
    own: NDArray[np.int32]
    """The passage that the question was made of [Q], -1 where there is none. It is no candidate."""
    splits: NDArray[np.uint8]
    """Index into SPLITS [Q]."""
    groups: NDArray[np.int32]
    """Index into the manifest's `groups`: relation, or data set [Q]."""


_ARRAYS = tuple(field.name for field in fields(QuestionArrays))


class QuestionWriter:
    """Makes question data; nothing is there before it is complete."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, recipe: dict[str, Any], overwrite: bool = False) -> None:
        """Begins.

        Args:
            folder: To make, `NAME.questions` by habit.
            tokenizer: The model's.
            recipe: Plain data: all that determines the content.
            overwrite: Start again whatever is there.

        Raises:
            ConfigError: Something else is there, made differently.
        """
        self.folder, self.tokenizer = folder, tokenizer
        self._recipe = {**recipe, "tokenizer": tokenizer.fingerprint}
        self.finished = artifact.begin(folder, KIND, self._recipe, overwrite=overwrite)
        """It is there already, by the same recipe: nothing is to be added."""
        code = "H" if tokenizer.vocab_size <= 1 << 16 else "i"
        self._ids = {name: array(code) for name in ("passage_ids", "prompt_ids", "target_ids")}
        self._starts = {
            name: array("q", [0]) for name in ("passage_starts", "prompt_starts", "target_starts", "candidate_starts")
        }
        self._numbers = {name: array("i") for name in ("targets", "candidates", "candidate_targets", "own", "groups")}
        self._splits = array("B")
        self._groups: dict[str, int] = {}
        self._waiting: list[str] = []
        self._passages = 0
        self._template: str | None = None
        self._chats = 0
        self.too_long = 0
        """Questions left out because their prompts have more than `LONGEST_PROMPT` tokens."""

    def __enter__(self) -> "QuestionWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self.finished:
            self.complete()

    def __len__(self) -> int:
        """Questions so far."""
        return len(self._splits)

    def passage(self, title: str | None, text: str) -> int:
        """Adds a passage; returns its number."""
        self._waiting.append(source_text(title or "", text))
        if len(self._waiting) == _TOKENIZED_AT_ONCE:
            self._flush()
        self._passages += 1
        return self._passages - 1

    def add(
        self,
        *,
        question: str,
        answer: str,
        candidates: Iterable[tuple[int, str | None]],
        split: str,
        group: str = "",
        own: int | None = None,
    ) -> bool:
        """Adds a question; returns False for one that is left out, its prompt being too long.

        Args:
            question: Not empty.
            answer: What is to be said where no passage that is read has an answer.
            candidates: Passages that may be read, best first, each with what is to be said when it is (in its own words), None
                where it does not hold the answer.
            split: train, valid or test.
            group: Relation or data set.
            own: The passage that the question was made of.
        """
        ids = prompt_ids(question_prompt(question), self.tokenizer)
        if not self._begin(ids, split, group, own):
            return False
        numbers: dict[str, int] = {}

        def number(text: str) -> int:
            if text not in numbers:
                numbers[text] = self._target(answer_ids(text, self.tokenizer))
            return numbers[text]

        self._numbers["targets"].append(number(answer))
        for passage, target in candidates:
            self._numbers["candidates"].append(passage)
            self._numbers["candidate_targets"].append(-1 if target is None else number(target))
        self._starts["candidate_starts"].append(len(self._numbers["candidates"]))
        return True

    def add_chat(
        self, chat: ChatFormat, prompt: Sequence[int], answer: str, passages: Iterable[int], split: str, group: str = ""
    ) -> bool:
        """Adds an answer of a conversation; returns False for one that is left out, its prompt being too long.

        Args:
            chat: How it is written, the same for all.
            prompt: What stands before the answer, as `chat` writes it.
            answer: To be said, whatever is read.
            passages: That may be read, best first; of none is it known whether it holds the answer.
            split: train, valid or test.
            group: Data set.
        """
        if not self._begin(prompt, split, group, None):
            return False
        self._template = chat.template
        self._chats += 1
        self._numbers["targets"].append(self._target(chat.answer_ids(answer)))
        for passage in passages:
            self._numbers["candidates"].append(passage)
            self._numbers["candidate_targets"].append(-1)
        self._starts["candidate_starts"].append(len(self._numbers["candidates"]))
        return True

    def _begin(self, prompt: Sequence[int], split: str, group: str, own: int | None) -> bool:
        if len(prompt) > LONGEST_PROMPT:
            self.too_long += 1
            return False
        self._append("prompt", prompt)
        self._numbers["own"].append(-1 if own is None else own)
        self._numbers["groups"].append(self._groups.setdefault(group, len(self._groups)))
        self._splits.append(SPLITS.index(split))
        return True

    def _target(self, ids: Sequence[int]) -> int:
        self._append("target", ids)
        return len(self._starts["target_starts"]) - 2

    def complete(self) -> None:
        """Writes everything.

        Raises:
            ConfigError: There is no question.
        """
        if not len(self):
            raise ConfigError(f"there is no question for {self.folder}")
        self._flush()
        made: dict[str, NDArray[Any]] = {
            name: np.frombuffer(values, dtype=values.typecode) if values else np.empty(0, values.typecode)
            for name, values in {**self._ids, **self._starts, **self._numbers, "splits": self._splits}.items()
        }
        for name in _ARRAYS:
            save_array(self.folder / "arrays" / f"{name}.npy", made[name])
        self.tokenizer.save(self.folder)
        save_template(self.folder, self._template)
        artifact.finish(
            self.folder,
            KIND,
            self._recipe,
            {
                "tokenizer_fingerprint": self.tokenizer.fingerprint,
                "groups": list(self._groups),
                "questions": {name: self._splits.count(number) for number, name in enumerate(SPLITS)},
                "passages": self._passages,
                "chats": self._chats,
                "too_long": self.too_long,
            },
        )

    def _flush(self) -> None:
        for ids in self.tokenizer.encode_batch(self._waiting):
            self._append("passage", ids)
        self._waiting = []

    def _append(self, name: str, ids: Sequence[int]) -> None:
        self._ids[f"{name}_ids"].extend(ids)
        self._starts[f"{name}_starts"].append(len(self._ids[f"{name}_ids"]))


class QuestionData:
    """Question data, open through memory maps."""

    def __init__(self, folder: Path) -> None:
        """Opens the folder.

        Raises:
            FormatError: It is missing, unfinished or damaged, or its arrays contradict each other.
            MismatchError: Its tokenizer is another one than it was made with.
        """
        self.folder = folder
        self.manifest = artifact.read_manifest(folder, KIND)
        self.tokenizer = Tokenizer.load(str(folder))
        if self.tokenizer.fingerprint != self.manifest["tokenizer_fingerprint"]:
            raise MismatchError(f"{folder} holds another tokenizer than it was made with: make it again")
        self.arrays = QuestionArrays(**{name: load_array(folder / "arrays" / f"{name}.npy") for name in _ARRAYS})
        Q = len(self.arrays.splits)
        if not len(self.arrays.candidate_starts) == len(self.arrays.prompt_starts) == Q + 1:
            raise FormatError(f"{folder} has {Q:,} questions, but not as many prompts or candidates: make it again")

    @property
    def has_chats(self) -> bool:
        """Whether some of it was made of conversations."""
        return bool(self.manifest.get("chats"))

    @property
    def groups(self) -> list[str]:
        """Names of the relations or data sets."""
        return list(self.manifest["groups"])

    def questions(self, split: str) -> Int64s:
        """Numbers of the questions of one split."""
        return np.flatnonzero(self.arrays.splits == SPLITS.index(split))

    def prompt(self, question: int) -> NDArray[Any]:
        """Tokens of a question's prompt, BOS first."""
        return _part(self.arrays.prompt_ids, self.arrays.prompt_starts, question)

    def target(self, target: int) -> NDArray[Any]:
        """Tokens of an answer."""
        return _part(self.arrays.target_ids, self.arrays.target_starts, target)

    def passage(self, passage: int) -> NDArray[Any]:
        """Tokens of a passage."""
        return _part(self.arrays.passage_ids, self.arrays.passage_starts, passage)

    def candidates(self, question: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The passages that a question may be read with, best first, and what is to be said with each (-1: it has no answer)."""
        few = slice(*self.arrays.candidate_starts[question : question + 2])
        return self.arrays.candidates[few], self.arrays.candidate_targets[few]


def _part(ids: NDArray[Any], starts: Int64s, number: int) -> NDArray[Any]:
    return ids[starts[number] : starts[number + 1]]


def open_questions(folders: Sequence[str]) -> list[QuestionData]:
    """Opens question data for one training.

    Raises:
        FormatError: One is missing, unfinished or damaged.
        MismatchError: They have different tokenizers.
    """
    opened = [QuestionData(Path(folder)) for folder in folders]
    common_tokenizer(opened)
    return opened


def common_template(opened: Sequence[QuestionData]) -> str | None:
    """How the conversations are written that one model is trained on; None: in ChatML.

    Raises:
        MismatchError: In different ways.
    """
    talks = [data for data in opened if data.has_chats]
    templates = [chat_template(data.folder) for data in talks]
    for data, template in zip(talks, templates, strict=True):
        if template != templates[0]:
            raise MismatchError(
                f"the conversations in {talks[0].folder} and {data.folder} are written by different templates: make one of them "
                "again with the other's tokenizer"
            )
    return templates[0] if templates else None


def common_tokenizer(opened: Sequence[TrainingData | QuestionData]) -> Tokenizer:
    """The tokenizer of all data that one model is trained on.

    Raises:
        MismatchError: They have different ones.
    """
    for data in opened[1:]:
        if data.tokenizer.fingerprint != opened[0].tokenizer.fingerprint:
            raise MismatchError(
                f"{opened[0].folder} and {data.folder} have different tokenizers: they cannot train one model; make one of them "
                "again with the other's tokenizer"
            )
    return opened[0].tokenizer


def answer_ids(answer: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of an answer as it follows the prompt, without EOS."""
    ids: list[int] = tokenizer.encode(" " + answer.strip()).ids.tolist()
    return ids
