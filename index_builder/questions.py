"""Question data out of files of questions or conversations: for each the passages of an index, and which of them hold the answer.

Work is done in blocks of questions, whose passages are kept in files of their own until all are there: an interrupted run goes on
at the first block that is missing.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.corpus import describe_corpora
from index_builder.filters import Filter
from index_builder.formats import File, parse_filename, records
from index_builder.search import IndexRetriever
from index_builder.shards import Progress
from retro.artifact import fingerprint, read_json, write_json, writing
from retro.chat import ChatFormat, Message, check_messages
from retro.chunks import SPLITS, Passage
from retro.errors import ConfigError, FormatError
from retro.questions import QuestionWriter
from retro.tokenizer import Tokenizer

MAX_LINE = 1 << 26
BLOCK = 1024
"""Questions whose passages are looked up together and kept in one file."""
PARTS = "parts"
VERSION = 2
"""Of what is made of the same records: an interrupted run of another version does not go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionConfig:
    """How question data is made."""

    num_passages: int = 20
    """Passages that are looked up for a question."""
    where: str | None = None
    """Only passages of documents that fulfil this."""
    others: float = 1.0
    """Questions of a file without any passage that holds the answer are kept up to so many for each one with such a passage."""
    valid_share: float = 0.02
    """Questions held out where the records name no split; which, follows from the question."""
    exclude: tuple[str, ...] = ()
    """Files of questions that are left out, wherever they stand: those of test sets."""
    limit: int | None = None
    """At most so many records of each file."""

    def __post_init__(self) -> None:
        if self.num_passages < 1:
            raise ConfigError(f"num_passages = {self.num_passages}: ask for at least one passage")
        if not 0 <= self.valid_share < 1 or self.others < 0:
            raise ConfigError(
                f"valid_share = {self.valid_share}, others = {self.others}: give a share of at least 0 and below 1, and a number "
                "that is not negative"
            )


@dataclass(slots=True)
class _Asked:
    """A question on its way."""

    question: str
    """What passages are looked up for."""
    answers: list[str]
    group: str
    split: str
    prompt: list[int] | None = None
    """Of a conversation: tokens of all that stands before the answer."""
    gold: list[str] = field(default_factory=list)
    """Documents that are known to hold the answer: their keys, or these without the corpus in front."""


def build_questions(
    files: Sequence[str],
    out: Path,
    *,
    tokenizer: Tokenizer,
    retriever: IndexRetriever,
    config: QuestionConfig,
    chat: ChatFormat | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes question data; run again, an interrupted run goes on.

    Records are JSON lines (or CSV, Parquet) of `question` and `answers`, and perhaps `split`, `relation` (or `group`), `para_id`
    (the id of the document that holds the answer) or `gold` (a list of [corpus, id, ...]); or of `messages`, a conversation of
    {"role", "content"} whose every assistant message is one question.

    Args:
        files: Of records.
        out: Folder, `NAME.questions` by habit.
        tokenizer: The model's.
        retriever: Finds the passages.
        config: See QuestionConfig.
        chat: How conversations are written. Default: in ChatML.
        overwrite: Start again whatever is there.
        progress: Called with stage, done, total.

    Returns:
        The manifest.

    Raises:
        FormatError: A record is malformed: with file and line.
        ConfigError: There is no question, or the folder was made differently.
    """
    chat = chat or ChatFormat.of(None, tokenizer)
    recipe = {
        "version": VERSION,
        "questions": describe_corpora(files),
        "index": retriever.fingerprint,
        "retriever": retriever.method,
        **{key: value for key, value in asdict(config).items() if key != "exclude"},
        "exclude": describe_corpora(config.exclude) if config.exclude else [],
        **({} if chat.template is None else {"chat_template": fingerprint(chat.template)}),
    }
    with writing(out):
        writer = QuestionWriter(out, tokenizer, recipe=json.loads(json.dumps(recipe)), overwrite=overwrite)
        if not writer.finished:
            asked = list(_read(files, config, chat))
            if not asked:
                raise ConfigError(f"{', '.join(files)}: there is no question in them that is not left out")
            _find(asked, out / PARTS, retriever, config, progress)
            _collect(asked, out / PARTS, writer, config, chat)
            shutil.rmtree(out / PARTS)
            writer.complete()
    manifest: dict[str, Any] = read_json(out / "manifest.json")
    return manifest


def _find(
    asked: Sequence[_Asked], parts: Path, retriever: IndexRetriever, config: QuestionConfig, progress: Progress | None
) -> None:
    corpora = (
        {key.partition(":")[0] for _, key in retriever.store.numbered_keys()} if any(a.gold for a in asked) else set()
    )
    condition = None if config.where is None else Filter.parse(config.where)
    if retriever.where is not None:
        condition = retriever.where if condition is None else retriever.where.narrowed(condition)
    allowed_N = retriever.snapshot().rows_where(condition)
    for first in range(0, len(asked), BLOCK):
        path = parts / f"{first // BLOCK:06d}.json"
        few = asked[first : first + BLOCK]
        if not path.is_file():
            found = retriever.retrieve([a.question for a in few], config.num_passages, role="query", where=config.where)
            write_json(
                path, [_candidates(a, near, retriever, corpora, allowed_N) for a, near in zip(few, found, strict=True)]
            )
        if progress is not None:
            progress("questions", first + len(few), len(asked))


def _candidates(
    asked: _Asked,
    found: Sequence[Passage],
    retriever: IndexRetriever,
    corpora: Collection[str],
    allowed_N: NDArray[np.bool_] | None,
) -> list[tuple[int, str, str, str | None]]:
    """Row, title, text and answer of a question's passages: those that were found, then what the gold documents hold besides, where
    they may be read."""
    passages = list(found)
    if asked.gold:
        rows, store = {passage.row for passage in found}, retriever.store
        documents = {store.find(key) for gold in asked.gold for key in (gold, *(f"{name}:{gold}" for name in corpora))}
        for document in sorted(d for d in documents if d is not None):
            for row in store.rows_of(np.array([document])).tolist():
                passage = store.passage(row)
                is_new = row not in rows and (allowed_N is None or allowed_N[row])
                if is_new and find_answer(passage.full_text, asked.answers) is not None:
                    passages.append(passage)
    return [(p.row, p.title, p.full_text, find_answer(p.full_text, asked.answers)) for p in passages]


def find_answer(text: str, answers: Sequence[str]) -> str | None:
    """The first of the answers that stands in a text as whole words, as the text writes it; None where none does."""
    for answer in answers:
        words = answer.split()
        if words:
            pattern = r"\s+".join(map(re.escape, words))
            match = re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)
            if match is not None:
                return " ".join(match[0].split())
    return None


def _collect(
    asked: Sequence[_Asked], parts: Path, writer: QuestionWriter, config: QuestionConfig, chat: ChatFormat
) -> None:
    passages: dict[int, int] = {}
    answerable: dict[str, int] = {}
    found = [candidates for path in sorted(parts.glob("*.json")) for candidates in read_json(path)]
    for a, candidates in zip(asked, found, strict=True):
        if any(answer is not None for *_, answer in candidates):
            answerable[a.group] = answerable.get(a.group, 0) + 1
    others: dict[str, int] = {}
    for a, candidates in zip(asked, found, strict=True):
        if a.prompt is None and all(answer is None for *_, answer in candidates):
            others[a.group] = others.get(a.group, 0) + 1
            if others[a.group] > config.others * answerable.get(a.group, 0):
                continue
        chosen = []
        for row, title, text, answer in candidates:
            if row not in passages:
                passages[row] = writer.passage(title, text)
            chosen.append((passages[row], answer))
        if a.prompt is None:
            writer.add(question=a.question, answer=a.answers[0], candidates=chosen, split=a.split, group=a.group)
        else:
            writer.add_chat(chat, a.prompt, a.answers[0], [passage for passage, _ in chosen], a.split, a.group)


# --- records ------------------------------------------------------------------------------------------------------


def _read(files: Sequence[str], config: QuestionConfig, chat: ChatFormat) -> Iterator[_Asked]:
    """The questions of all files, each once; without those of excluded files, and conversations in which one of these is asked."""
    excluded = {_normal(str(fields.get("question", ""))) for name in config.exclude for _, fields in _fields(name)} - {
        ""
    }
    seen: set[object] = set()
    for name in files:
        for number, (line, fields) in enumerate(_fields(name)):
            if config.limit is not None and number >= config.limit:
                break
            for asked, texts in _asked(fields, f"{name}:{line}", config, Path(name).name.split(".")[0], chat):
                key: object = texts[0] if asked.prompt is None else (*asked.prompt, asked.answers[0])
                if key not in seen and excluded.isdisjoint(texts):
                    seen.add(key)
                    yield asked


def _fields(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    path = Path(name)
    if not path.is_file():
        raise FormatError(f"{path} is missing: give a file of questions")
    _, kind = parse_filename(path.name)
    for line, fields in records(
        File(path, name, path.name, kind), text_field="text", title_field="title", max_bytes=MAX_LINE
    ):
        if isinstance(fields, str):
            raise FormatError(f"{path}:{line}: {fields}")
        yield line, fields


def _asked(
    fields: dict[str, Any], place: str, config: QuestionConfig, name: str, chat: ChatFormat
) -> Iterator[tuple[_Asked, list[str]]]:
    """What a record asks, and all that a person says in it, normalized."""
    group = str(fields.get("relation") or fields.get("group") or name)
    if "messages" in fields:
        messages = check_messages(fields["messages"], place)
        said = [_normal(message["content"]) for message in messages if message["role"] == "user"]
        split = _split(fields, said[0], config, place)
        for asked in _conversation(messages, group, split, place, chat):
            yield asked, said
        return
    question, answers = fields.get("question"), fields.get("answers")
    if not isinstance(question, str) or not question.strip():
        raise FormatError(f"{place}: `question` must be a string that is not empty (or give `messages`)")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise FormatError(f"{place}: `answers` must be a list of strings that are not empty, at least one")
    try:
        gold = gold_keys(fields)
    except FormatError as error:
        raise FormatError(f"{place}: {error}") from error
    split = _split(fields, _normal(question), config, place)
    yield _Asked(question, answers, group, split, gold=gold), [_normal(question)]


def gold_keys(fields: Mapping[str, Any], corpora: Mapping[str, str] | None = None) -> list[str]:
    """Documents that a record of a question says to hold the answer: `para_id`, or `gold`, a list of keys or of [corpus, id].

    Args:
        fields: Of the record.
        corpora: What the corpora that `gold` names are called in the index, where they have other names there.

    Raises:
        FormatError: It says something else.
    """
    named = fields.get("gold") or []
    if not isinstance(named, list):
        raise FormatError("`gold` must be a list of the documents that hold the answer")
    keys = [] if fields.get("para_id") is None else [str(fields["para_id"])]
    for entry in named:
        if isinstance(entry, str):
            keys.append(entry)
        elif isinstance(entry, list) and len(entry) >= 2:
            keys.append(f"{(corpora or {}).get(str(entry[0]), entry[0])}:{entry[1]}")
        else:
            raise FormatError(f"{entry!r} names no document: give its key, or [corpus, id]")
    return keys


def _conversation(
    messages: Sequence[Message], group: str, split: str, place: str, chat: ChatFormat
) -> Iterator[_Asked]:
    for number, message in enumerate(messages):
        asked = [m["content"] for m in messages[:number] if m["role"] == "user"]
        if message["role"] == "assistant" and asked and message["content"].strip():
            try:
                prompt = chat.ids(messages[:number])
            except ConfigError as error:
                raise FormatError(f"{place}: {error}") from error
            yield _Asked(asked[-1], [message["content"]], group, split, prompt=prompt)


def _split(fields: dict[str, Any], question: str, config: QuestionConfig, place: str) -> str:
    """What the record says, else by a hash of the normalized question, so that a question is always on one side. For a conversation
    it is what a person says first in it: other ends of it are on the same side, and what the system says is the same in many."""
    if fields.get("split") is not None:
        if fields["split"] not in SPLITS:
            raise FormatError(f"{place}: split = {fields['split']!r}: must be one of {', '.join(SPLITS)}")
        return str(fields["split"])
    drawn = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big") / 2**64
    return "valid" if drawn < config.valid_share else "train"


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
