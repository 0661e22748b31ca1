"""Questions with what counts as found: answers, or relevance judgments of BEIR and TREC. The only importer of pytrec_eval."""

import gzip
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index_builder.formats import File, parse_filename, records
from retro.chunks import ChunkStore
from retro.errors import ConfigError, DependencyError, FormatError, MismatchError

_MAX_LINE = 1 << 26
_TOPIC = re.compile(r"<top>(.*?)</top>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"<num>\s*(?:Number:)?\s*([^\s<]+)", re.IGNORECASE)
_TITLE = re.compile(r"<title>\s*(?:Topic:)?\s*([^<]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What is asked."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...] | None = None
    """Strings of which one must stand in a passage."""
    relevance: Mapping[str, Mapping[str, int]] | None = None
    """By question and document; above 0 is relevant, the more so the higher. Each question has a relevant document."""
    notes: tuple[str, ...] = ()

    def only(self, places: Sequence[int]) -> "Questions":
        """Some of them."""
        return Questions(
            ids=tuple(self.ids[i] for i in places),
            texts=tuple(self.texts[i] for i in places),
            answers=None if self.answers is None else tuple(self.answers[i] for i in places),
            relevance=None if self.relevance is None else {self.ids[i]: self.relevance[self.ids[i]] for i in places},
            notes=self.notes,
        )


def read_questions(path: Path) -> Questions:
    """JSON lines (.gz, .xz, .zst as well) of `question` and `answers`, a list of strings; `id` where there is one.

    Raises:
        FormatError: A line is something else, or there is none.
        CorpusError: The file cannot be read.
    """
    ids, texts, answers = [], [], []
    for line, fields in _json_lines(path):
        text, accepted = fields.get("question"), fields.get("answers")
        if not isinstance(text, str) or not text.strip():
            raise FormatError(f"{path}:{line}: `question` must be a string that is not empty")
        if not isinstance(accepted, list) or not all(isinstance(answer, str) for answer in accepted):
            raise FormatError(f"{path}:{line}: `answers` must be a list of strings")
        ids.append(str(fields.get("id", line)))
        texts.append(text)
        answers.append(tuple(accepted))
    if not ids:
        raise FormatError(f"{path} holds no questions: give JSON lines of `question` and `answers`")
    return Questions(ids=tuple(ids), texts=tuple(texts), answers=tuple(answers))


def read_beir(folder: Path, split: str = "test") -> Questions:
    """Queries and judgments of a BEIR data set; its corpus.jsonl is what the index is made of, with --id-field _id.

    Raises:
        FormatError, CorpusError, MismatchError: As `read_judged`.
    """
    return read_judged(folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv")


def read_judged(queries: Path, qrels: Path) -> Questions:
    """Queries and relevance judgments.

    Args:
        queries: JSON lines of `_id` and `text` (BEIR), TREC topics (`<top>`, of which the title is asked), or lines of id, tab and
            text.
        qrels: Lines of query, iteration, document and relevance (TREC), or of query, document and relevance, separated by tabs,
            under a line of names (BEIR).

    Returns:
        The queries that have a relevant document, in their order.

    Raises:
        FormatError, CorpusError: A file is missing, empty or malformed.
        MismatchError: No query has a relevant document.
    """
    texts = dict(_queries(queries))
    if not texts:
        raise FormatError(f"{queries} holds no queries")
    relevance: dict[str, dict[str, int]] = {}
    for query, document, grade in _judgments(qrels):
        relevance.setdefault(query, {})[document] = grade
    if not relevance:
        raise FormatError(f"{qrels} holds no judgments")
    useful = {query for query, judged in relevance.items() if max(judged.values()) > 0}
    ids = tuple(query for query in texts if query in useful)
    if not ids:
        raise MismatchError(
            f"no query of {queries} has a relevant document in {qrels} (of {', '.join(list(relevance)[:3])} ...): they "
            "do not belong together"
        )
    left = len(texts) - len(ids)
    notes = (f"{left:,} queries without a relevant document are left out.",) if left else ()
    return Questions(ids=ids, texts=tuple(texts[i] for i in ids), relevance={i: relevance[i] for i in ids}, notes=notes)


def _queries(path: Path) -> Iterator[tuple[str, str]]:
    if parse_filename(path.name)[1] == "jsonl":
        for place, fields in _json_lines(path):
            if "_id" not in fields or not isinstance(fields.get("text"), str):
                raise FormatError(f"{path}:{place}: a query needs `_id` and `text`")
            yield str(fields["_id"]), fields["text"]
        return
    lines = _lines(path)
    if topics := _TOPIC.findall("\n".join(lines)):
        for place, topic in enumerate(topics, 1):
            number, title = _NUMBER.search(topic), _TITLE.search(topic)
            if number is None or title is None or not title[1].strip():
                raise FormatError(f"{path}: topic {place} has no <num> or no <title>")
            yield number[1], " ".join(title[1].split())
        return
    for place, line in enumerate(lines, 1):
        name, tab, text = line.partition("\t")
        if line.strip():
            if not tab or not text.strip():
                raise FormatError(f"{path}:{place}: neither topics (<top>) nor an id, a tab and a text")
            yield name.strip(), text.strip()


def _judgments(path: Path) -> Iterator[tuple[str, str, int]]:
    for number, line in enumerate(_lines(path), 1):
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or (number == 1 and fields[-1].strip() == "score"):
            continue
        try:
            query, *_, document, grade = fields
            if len(fields) not in (3, 4):
                raise ValueError(f"{len(fields)} fields")
            yield query.strip(), document.strip(), int(grade)
        except ValueError as error:
            raise FormatError(
                f"{path}:{number}: not query, iteration, document, relevance, or query, document, relevance ({error})"
            ) from error


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    file = File(path, str(path), path.name, "jsonl")
    for line, fields in records(file, text_field="text", title_field="title", max_bytes=_MAX_LINE):
        if isinstance(fields, str):
            raise FormatError(f"{path}:{line}: {fields}")
        yield line, fields


def _lines(path: Path) -> list[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            return file.read().splitlines()
    except FileNotFoundError as error:
        raise FormatError(f"{path} is missing") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error


# --- documents of an index, and measures --------------------------------------------------------------------------


def judged_documents(store: ChunkStore, relevance: Mapping[str, Mapping[str, int]]) -> dict[int, str]:
    """Names in the judgments of the documents of an index, by number: their keys, or these without the corpus in front. A document
    that bears the id of a query is among them.

    Raises:
        MismatchError: No document is named, or a name stands for several.
    """
    judged = {name for grades in relevance.values() for name in grades}
    wanted = judged | set(relevance)
    named: dict[int, str] = {}
    numbers: dict[str, tuple[int, str]] = {}
    for number, key in store.numbered_keys():
        name = key if key in wanted else key.partition(":")[2]
        if name in wanted:
            if name in numbers and name in judged:
                raise MismatchError(
                    f"the judgments' document {name!r} may be {numbers[name][1]} or {key}: write the whole keys into them"
                )
            numbers[name] = (number, key)
            named[number] = name
    if judged.isdisjoint(numbers):
        raise MismatchError(
            f"the judgments name no document of {store.folder}: they are about {', '.join(sorted(judged)[:3])} ..., its keys are "
            f"{', '.join(key for _, (_, key) in zip(range(3), store.numbered_keys(), strict=False))} ...: build it of the "
            "corpus they belong to (BEIR: --id-field _id)"
        )
    return named


def rank_measures(
    rankings: Mapping[str, Sequence[str]], relevance: Mapping[str, Mapping[str, int]], ks: Sequence[int]
) -> dict[str, list[float]]:
    """nDCG@10, MRR@10 and recall@k of each question's ranking of documents, as trec_eval has them.

    Args:
        rankings: Documents, best first, by question.
        relevance: By the same questions; see Questions.
        ks: Of recall.

    Returns:
        By measure, values in the order of the rankings.

    Raises:
        ConfigError: There is no question.
        DependencyError: pytrec_eval is missing.

    Source: Jarvelin and Kekalainen 2002 for nDCG, with the gains of trec_eval: the grade itself over log2(1 + rank).
    """
    if not rankings:
        raise ConfigError("there is no question to measure")
    try:
        trec = importlib.import_module("pytrec_eval")
    except ImportError as error:
        raise DependencyError("relevance judgments need pytrec_eval: pip install 'retro-lm[eval]'") from error
    qrels = {question: dict(relevance[question]) for question in rankings}

    def evaluated(depth: int | None, measures: set[str]) -> dict[str, dict[str, float]]:
        # Of equal scores trec_eval would take the last name first.
        run = {q: {name: -float(rank) for rank, name in enumerate(few[:depth])} for q, few in rankings.items()}
        result: dict[str, dict[str, float]] = trec.RelevanceEvaluator(qrels, measures).evaluate(run)
        return result

    recalls = f"recall.{','.join(map(str, sorted(ks)))}"
    whole, first = evaluated(None, {"ndcg_cut.10", recalls}), evaluated(10, {"recip_rank"})
    measures = {"nDCG@10": [whole.get(q, {}).get("ndcg_cut_10", 0.0) for q in rankings]}
    # Nothing found is no line of a run at all: trec_eval leaves such a question out, which would flatter.
    measures["MRR@10"] = [first.get(q, {}).get("recip_rank", 0.0) for q in rankings]
    for k in ks:
        measures[f"recall@{k}"] = [whole.get(q, {}).get(f"recall_{k}", 0.0) for q in rankings]
    return measures
