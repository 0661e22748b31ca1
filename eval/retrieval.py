"""What the retrievers of an index find: answers, relevant documents, and what exact search would have found; and how fast.

Letters: Q questions, K rows found, N rows of the index, X vector width.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.judgments import Questions, judged_documents, rank_measures
from eval.language_modeling import evenly
from eval.metrics import answer_recall, bootstrap_mean, first_with_answer, paired_bootstrap
from eval.records import Curve, Figure, Record
from index_builder.build import open_vectors
from index_builder.search import METHODS, IndexRetriever, Method
from index_builder.shards import Progress
from retro.errors import ConfigError
from retro.generate import Retriever

Floats = NDArray[np.floating[Any]]
Rows = NDArray[np.int64]

BATCH_QUESTIONS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRecall:
    """Share of questions whose answer string is in the first k, for chunks alone and for chunks with their continuations."""

    num_questions: int
    chunk: dict[int, float]
    chunk_and_continuation: dict[int, float]


def measure_answer_recall(
    retriever: Retriever,
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    ks: Sequence[int] = (1, 5, 20),
    progress: Callable[[int, int], None] | None = None,
) -> AnswerRecall:
    """Looks every question up and searches the passages for its answers (see `contains_answer`)."""
    chunk_ranks: list[int | None] = []
    full_ranks: list[int | None] = []
    for start in range(0, len(questions), BATCH_QUESTIONS):
        found = retriever.retrieve(questions[start : start + BATCH_QUESTIONS], max(ks), role="query")
        for passages, accepted in zip(found, answers[start : start + BATCH_QUESTIONS], strict=True):
            chunk_ranks.append(first_with_answer([p.text for p in passages], accepted))
            full_ranks.append(first_with_answer([p.full_text for p in passages], accepted))
        if progress is not None:
            progress(len(chunk_ranks), len(questions))
    return AnswerRecall(
        num_questions=len(questions),
        chunk={k: answer_recall(chunk_ranks, k) for k in ks},
        chunk_and_continuation={k: answer_recall(full_ranks, k) for k in ks},
    )


# --- several retrievers side by side ------------------------------------------------------------------------------

DEPTH = 100
"""Documents that are ranked for relevance judgments."""
CHUNKS = 4
"""Chunks that are looked up at first for each document wanted."""
TIMED = 200
"""Questions that are asked one at a time, evenly spaced."""
SAMPLED = 1000
"""Stored chunks that are looked up where there are no questions."""
INDEX = "vector index"
"""What stands for the index of vectors among the retrievers."""
_CURVE = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scores:
    """Of one retriever (or the index itself) on all questions."""

    measures: dict[str, Floats]
    """From 0 to 1, of each question [Q], by name."""
    ranks: dict[str, list[int | None]]
    """Of the first passage or document that counts, from 1."""
    curve: dict[int, float]
    """Mean recall by k."""


def measure_retrieval(
    retriever: IndexRetriever,
    questions: Questions | None,
    *,
    methods: Sequence[Method] = ("dense",),
    ks: Sequence[int] = (1, 5, 20, 100),
    exact: bool = False,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Record, dict[str, list[Any]]]:
    """Measures what the retrievers of an index find: the answers, or the relevant documents (a document ranks where its best chunk
    does, and one that bears the query's own id is left out, as BEIR does); and how much of exact search its vectors' index finds.

    Args:
        retriever: Its `where` holds for all searches.
        questions: None: stored chunks are looked up, none of which may find itself, in comparison with exact search.
        methods: The first one is what the others are compared with.
        ks: Numbers of passages (or documents) that are looked at.
        exact: Compare the index with exact search of the same vectors, with questions too.
        limit: Of the questions, evenly spaced; of the stored chunks, drawn.
        seed: Of the draws and of the intervals.
        progress: Told how far it is.

    Returns:
        A record, and its units: a row for each question, with the rank of the first hit of each retriever, None for none.

    Raises:
        ConfigError: A retriever is unknown or the index has not what it takes, k is below 1, or nothing is to be measured.
        MismatchError: The judgments name no document of the index.
        DependencyError: Judgments without pytrec_eval.
    """
    began = time.monotonic()
    ks = sorted(set(ks))
    if not ks or ks[0] < 1:
        raise ConfigError(f"k = {', '.join(map(str, ks)) or 'none'}: look at one passage at least")
    if unknown := [method for method in methods if method not in METHODS]:
        raise ConfigError(f"retriever {unknown[0]!r} is unknown: use {', '.join(METHODS)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit}: measure one question at least")
    now = _Bench(retriever, seed, progress)
    by_name: dict[str, _Scores] = {}
    speeds: list[dict[str, Any]] = []
    names: dict[int, str] | None = None
    if questions is None:
        ids, by_name[INDEX] = now.stored_rows(ks, SAMPLED if limit is None else limit)
    else:
        questions = questions.only(evenly(range(len(questions.ids)), limit))
        ids = list(questions.ids)
        if questions.relevance is not None:
            names = judged_documents(now.store, questions.relevance)
        for method in dict.fromkeys(methods):
            speeds.append(now.speed(method, questions, ks[-1]))
            by_name[method] = (
                now.answers(method, questions, ks) if names is None else now.documents(method, questions, names, ks)
            )
        if exact:
            by_name[INDEX] = now.exact(retriever.encoder.encode(questions.texts, "query"), ks)
    units: dict[str, list[Any]] = {"id": ids}
    units |= {f"{n} {what}": ranks for n, scores in by_name.items() for what, ranks in scores.ranks.items()}
    units |= {f"{n} {m}": values.tolist() for n, scores in by_name.items() for m, values in scores.measures.items()}
    figures, rows = _figures(by_name, speeds, seed)
    record = Record(
        kind="retrieval",
        name=retriever.folder.name,
        figures=figures,
        curves=_curves(by_name),
        rows=rows,
        configuration={
            "index": str(retriever.folder),
            "index_type": retriever.manifest["index"]["factory"],
            "chunks": now.store.num_live_chunks,
            "methods": list(dict.fromkeys(methods)),
            "k": list(ks),
            "exact": exact or questions is None,
            "limit": limit,
        },
        fingerprints={"index": retriever.fingerprint, "encoder": retriever.encoder_fingerprint},
        notes=_notes(questions, names, ks[-1]),
        seed=seed,
        seconds=round(time.monotonic() - began, 3),
    )
    return record, units


class _Bench:
    """One state of an index, and what is looked up in it."""

    def __init__(self, retriever: IndexRetriever, seed: int, progress: Progress | None) -> None:
        self._retriever, self._seed, self._progress = retriever, seed, progress
        self._snapshot = retriever.snapshot()
        self._keep_N = self._snapshot.rows_where(retriever.where)
        self.store = self._snapshot.store

    def find(self, method: Method, texts: Sequence[str], k: int) -> Rows:
        """Rows [Q, K], best first, -1 where there is no further one."""
        vectors_QX = None if method == "bm25" else self._retriever.encoder.encode(texts, "query")
        return self._snapshot.find(texts, vectors_QX, k, method=method, keep_N=self._keep_N)[1]

    def _batches(self, method: Method, texts: Sequence[str], k: int) -> Iterator[tuple[int, Rows]]:
        for start in range(0, len(texts), BATCH_QUESTIONS):
            few = texts[start : start + BATCH_QUESTIONS]
            yield start, self.find(method, few, k)
            if self._progress is not None:
                self._progress(method, start + len(few), len(texts))

    def speed(self, method: Method, questions: Questions, k: int) -> dict[str, Any]:
        """Milliseconds of a question asked alone, as it comes until its rows are known, and questions a second in batches."""
        texts = evenly(questions.texts, TIMED)
        for text in texts[:5]:
            self.find(method, [text], k)
        seconds = []
        for text in texts:
            began = time.perf_counter()
            self.find(method, [text], k)
            seconds.append(time.perf_counter() - began)
        batch = questions.texts[:BATCH_QUESTIONS]
        began = time.perf_counter()
        self.find(method, batch, k)
        rate = len(batch) / (time.perf_counter() - began)
        p50, p95, p99 = (float(value) for value in 1000 * np.percentile(seconds, (50, 95, 99)))
        return {"retriever": method, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "questions_per_s": rate}

    def answers(self, method: Method, questions: Questions, ks: Sequence[int]) -> _Scores:
        """Whether an answer stands in the first k chunks, alone and with their continuations."""
        assert questions.answers is not None
        chunk: list[int | None] = []
        full: list[int | None] = []
        for start, rows_QK in self._batches(method, questions.texts, ks[-1]):
            for rows, accepted in zip(rows_QK.tolist(), questions.answers[start:], strict=False):
                passages = [self.store.passage(row) for row in rows if row >= 0]
                chunk.append(_from_1(first_with_answer([p.text for p in passages], accepted)))
                full.append(_from_1(first_with_answer([p.full_text for p in passages], accepted)))
        measures = {f"recall@{k} with continuation": _within(full, k) for k in ks}
        measures |= {f"recall@{k}": _within(chunk, k) for k in ks}
        curve = {k: float(_within(full, k).mean()) for k in _curve_ks(ks)}
        return _Scores(measures=measures, ranks={"rank": full, "rank in chunks alone": chunk}, curve=curve)

    def documents(self, method: Method, questions: Questions, names: Mapping[int, str], ks: Sequence[int]) -> _Scores:
        """Measures of the ranking of documents, each at the place of its best chunk."""
        assert questions.relevance is not None
        depth = max(DEPTH, ks[-1])
        rankings: dict[str, list[str]] = {}
        pending, k = list(range(len(questions.ids))), min(CHUNKS * depth, self.store.num_chunks)
        while pending:
            short = []
            for start, rows_QK in self._batches(method, [questions.texts[i] for i in pending], k):
                for i, rows in zip(pending[start:], rows_QK, strict=False):
                    numbers = dict.fromkeys(self.store.documents_of(rows[rows >= 0]).tolist())
                    ranked = [names.get(number, f"unjudged document {number}") for number in numbers]
                    own = questions.ids[i]
                    judged = questions.relevance[own]
                    rankings[own] = [name for name in ranked if name != own or name in judged][:depth]
                    if len(rankings[own]) < depth and rows[-1] >= 0:
                        short.append(i)
            if k == self.store.num_chunks:
                break
            pending, k = short, min(4 * k, self.store.num_chunks)
        rankings = {question: rankings[question] for question in questions.ids}
        found = rank_measures(rankings, questions.relevance, sorted({*ks, DEPTH, *_curve_ks(ks)}))
        wanted = ["nDCG@10", "MRR@10", *(f"recall@{k}" for k in sorted({*ks, DEPTH}))]
        relevant = [{d for d, grade in questions.relevance[q].items() if grade > 0} for q in rankings]
        firsts = [
            next((rank for rank, name in enumerate(few, 1) if name in good), None)
            for few, good in zip(rankings.values(), relevant, strict=True)
        ]
        return _Scores(
            measures={name: np.array(found[name]) for name in wanted},
            ranks={"rank": firsts},
            curve={k: float(np.mean(found[f"recall@{k}"])) for k in _curve_ks(ks)},
        )

    def exact(self, vectors_QX: NDArray[np.float32], ks: Sequence[int], own_Q: Rows | None = None) -> _Scores:
        """The share of the k nearest rows by exact search that are among the k found by the index of vectors."""
        k = ks[-1] + (own_Q is not None)
        found_QK, truth_QK = (
            self._snapshot.index.search(vectors_QX, k, keep_N=self._keep_N, all_lists=all_lists)[1]
            for all_lists in (False, True)
        )
        shares: dict[int, list[float]] = {k: [] for k in {*ks, *_curve_ks(ks)}}
        for number, both in enumerate(zip(found_QK, truth_QK, strict=True)):
            own = -1 if own_Q is None else own_Q[number]
            found, truth = (rows[(rows != own) & (rows >= 0)] for rows in both)
            for k, values in shares.items():
                values.append(np.isin(truth[:k], found[:k]).mean() if len(truth) else 1.0)
        return _Scores(
            measures={f"recall@{k} of exact search": np.array(shares[k]) for k in ks},
            ranks={},
            curve={k: float(np.mean(shares[k])) for k in _curve_ks(ks)},
        )

    def stored_rows(self, ks: Sequence[int], limit: int) -> tuple[list[str], _Scores]:
        """The same for a sample of the rows that may be found; none may find itself."""
        alive_N = np.ones(self.store.num_chunks, np.bool_) if self._keep_N is None else self._keep_N.copy()
        if self.store.dead_N is not None:
            alive_N &= ~self.store.dead_N
        rows = np.flatnonzero(alive_N)
        if not len(rows):
            raise ConfigError(f"no chunk of {self.store.folder} fulfils --where: there is nothing to measure")
        own_Q = np.sort(np.random.default_rng(self._seed).choice(rows, min(limit, len(rows)), replace=False))
        vectors = open_vectors(self.store.folder, self.store.shards)
        return [str(row) for row in own_Q.tolist()], self.exact(vectors.gather(own_Q), ks, own_Q)


def _from_1(place: int | None) -> int | None:
    return None if place is None else place + 1


def _within(ranks: Sequence[int | None], k: int) -> Floats:
    return np.array([rank is not None and rank <= k for rank in ranks], np.float64)


def _curve_ks(ks: Sequence[int]) -> list[int]:
    return sorted({*ks, *(k for k in _CURVE if k < ks[-1])})


# --- the record ---------------------------------------------------------------------------------------------------


def _figures(
    by_name: dict[str, _Scores], speeds: list[dict[str, Any]], seed: int
) -> tuple[dict[str, Figure], dict[str, list[dict[str, Any]]]]:
    figures: dict[str, Figure] = {}
    differences: list[dict[str, Any]] = []
    retrievers = [name for name in by_name if name != INDEX]
    for name, scores in by_name.items():
        for measure, values in scores.measures.items():
            figures[f"{name}: {measure}"] = _figure(measure, values, seed)
    for name in retrievers[1:]:
        for measure, values in by_name[name].measures.items():
            scale, unit = _scale(measure)
            found = paired_bootstrap(scale * values, scale * by_name[retrievers[0]].measures[measure], seed=seed)
            differences.append(
                {
                    "retriever": name,
                    "less": retrievers[0],
                    "measure": measure,
                    "unit": unit and "points",
                    **asdict(found),
                }
            )
    for row in speeds:
        for quantile in ("p50", "p95", "p99"):
            figures[f"{row['retriever']}: {quantile} of a question"] = Figure(value=row[f"{quantile}_ms"], unit="ms")
        figures[f"{row['retriever']}: in batches"] = Figure(value=row["questions_per_s"], unit="questions/s")
    rows = {"Differences": differences, "Speed": speeds}
    return figures, {title: table for title, table in rows.items() if table}


def _figure(measure: str, values: Floats, seed: int) -> Figure:
    scale, unit = _scale(measure)
    low, high = bootstrap_mean(values, seed=seed)
    return Figure(value=scale * float(values.mean()), unit=unit, low=scale * low, high=scale * high, count=len(values))


def _scale(measure: str) -> tuple[float, str]:
    return (100.0, "%") if measure.startswith("recall") else (1.0, "")


def _curves(by_name: dict[str, _Scores]) -> dict[str, Curve]:
    curves = {}
    for title, names in (
        ("Recall", [name for name in by_name if name != INDEX]),
        ("Recall of exact search", [name for name in by_name if name == INDEX]),
    ):
        if names:
            series: dict[str, tuple[float | None, ...]] = {
                name: tuple(100 * value for value in by_name[name].curve.values()) for name in names
            }
            x = tuple(by_name[names[0]].curve)
            curves[title] = Curve(x_label="k", y_label="recall@k, %", x=x, series=series, log_x=True)
    return curves


def _notes(questions: Questions | None, names: Mapping[int, str] | None, timed_k: int) -> tuple[str, ...]:
    if questions is None:
        return ("Looked up were stored chunks; none may find itself.",)
    notes = [*questions.notes, f"Times are of looking up {timed_k} chunks, from the question on."]
    if questions.relevance is None or names is None:
        return (
            *notes,
            "A passage counts where an answer stands in it as whole words; the curve is with continuations.",
        )
    judged = {name for grades in questions.relevance.values() for name, grade in grades.items() if grade > 0}
    if missing := len(judged - set(names.values())):
        notes.append(
            f"{missing:,} of {len(judged):,} relevant documents are not in the index: they count as not found."
        )
    return (*notes, f"A document ranks where its best chunk does; {DEPTH} documents or more are ranked.")
