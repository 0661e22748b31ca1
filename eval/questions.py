"""Questions with known answers, as data sets have them, and the answers that are most frequent among them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.language_modeling import evenly
from eval.metrics import normalized_answer
from index_builder.formats import File, parse_filename, records
from index_builder.questions import gold_keys
from retro.errors import ConfigError, FormatError

_MAX_LINE = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, and what is accepted."""

    id: str
    """Unlike any other: the data set's name, a colon, and the question's own id or line."""
    data_set: str
    text: str
    answers: tuple[str, ...]
    """At least one."""
    gold: tuple[str, ...] = ()
    """Documents that answer it: their keys, or these without the corpus in front."""
    group: str = ""
    """Its relation; empty where there is none."""


def read_questions(
    paths: Sequence[Path],
    *,
    limit: int | None = None,
    skip_bad: bool = False,
    group_field: str = "relation",
    corpora: Mapping[str, str] | None = None,
) -> tuple[list[Question], tuple[str, ...]]:
    """JSON lines (.gz, .xz, .zst as well) of `question` and `answers`, and where they are known `id`, a relation, and the document
    that holds the answer: `para_id`, or `gold`, a list of keys or of [corpus, id].

    Args:
        paths: A data set each; its name is the file's.
        limit: At most so many of each file, evenly spaced.
        skip_bad: Leave lines out that are something else, instead of stopping at them.
        group_field: Field of the relation.
        corpora: What the corpora that `gold` names are called in the index, where they have other names there.

    Returns:
        The questions, and what is to be said about them.

    Raises:
        ConfigError: limit is below 1.
        FormatError: A line is something else, or a file has no question.
        CorpusError: A file cannot be read.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit}: ask one question at least")
    stems = [parse_filename(path.name)[0] for path in paths]
    asked: list[Question] = []
    notes = []
    for path, stem in zip(paths, stems, strict=True):
        name = stem if stems.count(stem) == 1 else str(path)
        own: list[Question] = []
        taken: dict[str, int] = {}
        skipped = 0
        file = File(path, str(path), path.name, "jsonl")
        for line, fields in records(file, text_field="text", title_field="title", max_bytes=_MAX_LINE):
            found = fields if isinstance(fields, str) else _question(fields, line, name, group_field, corpora or {})
            if isinstance(found, Question) and taken.setdefault(found.id, line) != line:
                found = f"the id {found.id.removeprefix(name + ':')!r} is that of line {taken[found.id]}, too"
            if isinstance(found, Question):
                own.append(found)
            elif skip_bad:
                skipped += 1
            else:
                raise FormatError(f"{path}:{line}: {found}; correct it, or leave such lines out with --on-error skip")
        if not taken:
            raise FormatError(
                f"{path} holds no question that can be scored: give JSON lines of `question` and `answers`"
            )
        asked += evenly(own, limit)
        if skipped:
            notes.append(f"{name}: {skipped:,} lines without a question and answers are left out.")
    return asked, tuple(notes)


def _question(
    fields: Mapping[str, Any], line: int, name: str, group_field: str, corpora: Mapping[str, str]
) -> Question | str:
    """A question, or what is wrong with it."""
    text, answers = fields.get("question"), fields.get("answers")
    if not isinstance(text, str) or not text.strip():
        return "`question` must be a string that is not empty"
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return "`answers` must be a list of strings"
    if not any(answer.strip() for answer in answers):
        return "`answers` is empty: a question without an accepted answer cannot be scored"
    try:
        gold = gold_keys(fields, corpora)
    except FormatError as error:
        return str(error)
    group = fields.get(group_field)
    return Question(
        id=f"{name}:{fields.get('id', line)}",
        data_set=name,
        text=text,
        answers=tuple(answer for answer in answers if answer.strip()),
        gold=tuple(gold),
        group="" if group is None else str(group),
    )


def frequent_answers(training: Sequence[Question], asked: Sequence[Question]) -> dict[str, tuple[str, float]]:
    """The most frequent answer of each relation, and the share of its training questions that accept it.

    Args:
        training: Questions that stand among those asked are left out.
        asked: What is asked.

    Raises:
        ConfigError: No training question has a relation.
    """
    known = {normalized_answer(question.text) for question in asked}
    counts: dict[str, Counter[str]] = {}
    spelled: dict[str, Counter[str]] = {}
    sizes: Counter[str] = Counter()
    for question in training:
        if question.group and normalized_answer(question.text) not in known:
            sizes[question.group] += 1
            counts.setdefault(question.group, Counter()).update({normalized_answer(a) for a in question.answers} - {""})
            for answer in question.answers:
                spelled.setdefault(normalized_answer(answer), Counter())[answer] += 1
    if not counts:
        raise ConfigError("no training question has a relation: name its field with --group-field")
    best = {group: max(few.items(), key=lambda item: (item[1], item[0])) for group, few in counts.items() if few}
    return {group: (spelled[a].most_common(1)[0][0], n / sizes[group]) for group, (a, n) in best.items()}
