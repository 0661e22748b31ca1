"""Questions made of a corpus: a sentence with a name or a number blanked, and other passages, some of which state what is missing.

The corpus is read once into an index of its sentences (`index_builder.sentence_index`), then its sentences are gone through in an
order drawn at random until there are enough questions. Both is done in pieces by several processes; interrupted and called again,
it goes on after the last finished piece, in a folder beside the result, `NAME.questions.work`.
"""

import logging
import multiprocessing
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from index_builder.cloze_questions import BLOCK, Block, Cloze, Texts, make_block
from index_builder.corpus import ReadOptions, describe_corpora
from index_builder.sentence_index import Article, SentenceIndex, build_sentence_index, write_shard
from index_builder.sentences import KINDS
from index_builder.shards import Progress, ShardReader
from retro.artifact import begin, read_json, write_json, writing
from retro.chunks import SPLITS, name_hash, save_array, shard_path
from retro.errors import ConfigError, CorpusError, RetroError
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

WORDS = (6, 40)
"""Fewest and most words of a sentence that becomes a question."""
REPORT = "cloze.json"
_WORK = "sentences"

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClozeConfig:
    """How a corpus becomes questions.

    Raises:
        ConfigError: A value is out of range.
    """

    questions: int = 1_000_000
    """Questions to make; fewer where the corpus does not give as many."""
    candidates: int = 16
    """Passages of a question, those that state the answer included."""
    question_tokens: int = 64
    """Longest prompt: one chunk of the model."""
    valid_share: float = 0.02
    """Share of the groups held out for validation, where documents name no split; as in `retro data`."""
    test_share: float = 0.02
    """Likewise for the test."""
    shard_chars: int = 4_000_000
    """As in BuildConfig."""
    seed: int = 0
    """Of the order of sentences, the choice of blanks and of passages, and the split."""
    read: ReadOptions = field(default_factory=ReadOptions)
    """How the documents are read."""

    def __post_init__(self) -> None:
        for name, least in (("questions", 1), ("candidates", 2), ("question_tokens", 16), ("shard_chars", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if min(self.valid_share, self.test_share) < 0 or self.valid_share + self.test_share >= 1:
            raise ConfigError(
                f"valid_share = {self.valid_share} and test_share = {self.test_share}: give shares from 0 on that leave "
                "something to train on"
            )


def make_cloze(
    corpora: Sequence[str],
    out: Path,
    *,
    tokenizer: Tokenizer,
    config: ClozeConfig,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes question data (`retro.questions`) of a corpus.

    Args:
        corpora: As for `build_index`.
        out: Folder of the question data.
        tokenizer: The model's.
        config: See ClozeConfig.
        workers: Processes; the result does not depend on them.
        overwrite: Start again where something else was begun or made.
        progress: Told how far it is.

    Returns:
        Counts, as they are printed.

    Raises:
        CorpusError: A corpus cannot be read, or gives no question.
        ConfigError, FormatError, StorageError: As their names say.
    """
    from retro.questions import LONGEST_PROMPT, QuestionWriter

    if config.question_tokens > LONGEST_PROMPT:
        raise ConfigError(
            f"question_tokens = {config.question_tokens}: question data takes prompts of at most {LONGEST_PROMPT}"
        )
    recipe = {"command": "cloze", "config": asdict(config), "corpora": describe_corpora(corpora)}
    work = out.with_name(out.name + ".work")
    with writing(out):
        writer = QuestionWriter(out, tokenizer, recipe=recipe, overwrite=overwrite)
        if writer.finished:
            logger.info("%s is there already, made by the same settings", out)
            report: dict[str, Any] = read_json(out / REPORT)
            return report
        begin(work, _WORK, {**recipe, "tokenizer": tokenizer.fingerprint}, overwrite=overwrite)
        with _Workers(workers) as pool:
            counts = _read(corpora, work, out / "rejects.jsonl", config, pool, progress)
            passages: dict[int, int] = {}
            texts = Texts(SentenceIndex(work / "index"))

            def row(passage: int) -> int:
                if passage not in passages:
                    passages[passage] = writer.passage(*texts.titled(passage))
                return passages[passage]

            for made in _questions(work, tokenizer, config, pool, counts, progress):
                candidates = [(row(passage), target) for passage, target in made.candidates]
                writer.add(
                    question=made.question,
                    answer=made.answer,
                    candidates=candidates,
                    split=made.split,
                    group=made.kind,
                    own=row(made.own),
                )
        report = {**_report(counts), "passages": len(passages)}
        write_json(out / REPORT, report)
        writer.complete()
        shutil.rmtree(work)
    return report


def sample_cloze(
    corpora: Sequence[str], folder: Path, *, tokenizer: Tokenizer, config: ClozeConfig, documents: int = 2000
) -> tuple[dict[str, Any], list[tuple[Cloze, str]]]:
    """Makes questions of the first documents only, and keeps nothing.

    Returns:
        Counts, and some questions, each with the first passage that states its answer.
    """
    limit = min(config.read.limit or documents, documents)
    config = replace(config, read=replace(config.read, limit=limit))
    with _Workers(1) as pool:
        counts = _read(corpora, folder, folder / "rejects.jsonl", config, pool, None)
        made = list(_questions(folder, tokenizer, config, pool, counts, None))
        texts = Texts(SentenceIndex(folder / "index"))
        few = made[:: max(1, len(made) // 8)][:8]
        return _report(counts), [
            (m, texts.shown(next(p for p, target in m.candidates if target is not None))) for m in few
        ]


def _report(counts: Counter[str]) -> dict[str, Any]:
    """What is printed: counts, and what follows from them."""
    questions = counts["questions"]
    left_out = ("answer_in_question", "not_literal", "no_title", "too_long", *_Accepted.REASONS)
    return {
        **{name: counts[name] for name in ("documents", "rejects", "sentences", "sentences_asked", "blanks_tried")},
        "share_with_evidence": counts["blanks_with_evidence"] / counts["blanks_tried"],
        "questions": questions,
        "by_split": {name: counts[name] for name in SPLITS},
        "by_kind": {f"{kind}s": counts[f"{kind}s"] for kind in KINDS},
        "left_out": {name: counts[name] for name in left_out},
        "passages_per_question": counts["candidates"] / questions,
        "with_the_answer": counts["candidates_with_answer"] / questions,
    }


# --- processes ----------------------------------------------------------------------------------------------------


class _Workers:
    """Does pieces of work in several processes, or in this one where one is enough."""

    def __init__(self, workers: int) -> None:
        self._workers = max(workers, 1)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Workers":
        if self._workers > 1:
            # Not forked: the libraries that are loaded here have threads.
            self._pool = ProcessPoolExecutor(self._workers, mp_context=multiprocessing.get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, do: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """What is made of each item, in order; a few are worked on ahead.

        Raises:
            RetroError: A process died.
        """
        if self._pool is None:
            yield from map(do, items)
            return
        ahead: deque[Future[Made]] = deque()
        try:
            for item in items:
                ahead.append(self._pool.submit(do, item))
                if len(ahead) > self._workers + 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool as error:
            raise RetroError(
                "a process that made questions was killed, probably for want of memory: run the same command again with fewer "
                "--workers; what is finished is kept"
            ) from error


# --- reading ------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    path: Path
    articles: list[Article]


def _read(
    corpora: Sequence[str], work: Path, rejects: Path, config: ClozeConfig, pool: _Workers, progress: Progress | None
) -> Counter[str]:
    """The index of the corpus' sentences, in `work/index`; returns counts of what was read."""
    finished = work / "read.json"
    if finished.is_file():
        return Counter(read_json(finished))
    shards = work / "shards"
    reader = ShardReader(
        corpora,
        config.read,
        make=lambda document: Article(
            document.title,
            document.text,
            document.drawn_split(config.seed, config.valid_share, config.test_share),
        ),
        shard_chars=config.shard_chars,
        rejects_file=rejects,
        wanted=lambda number: not shard_path(shards, number, ".npz").is_file(),
        progress=None if progress is None else lambda done: progress("documents", done, None),
    )
    pieces = (_Piece(shard_path(shards, shard.number, ".npz"), shard.made) for shard in reader)
    for _ in pool.each(_write_piece, pieces):
        pass
    paths = [shard_path(shards, number, ".npz") for number in range(reader.num_shards)]
    build_sentence_index(
        work / "index",
        paths,
        lambda done: progress("sentences", done, len(paths)) if progress is not None else None,
    )
    index = SentenceIndex(work / "index")
    asked_N = np.flatnonzero(np.diff(index.arrays.blank_starts))
    save_array(work / "order.npy", np.random.default_rng(config.seed).permutation(asked_N))
    counts = {
        "documents": reader.num_documents,
        "rejects": reader.num_rejects,
        "sentences": index.num_sentences,
        "sentences_with_blanks": len(asked_N),
    }
    write_json(finished, counts)
    shutil.rmtree(shards)
    return Counter(counts)


def _write_piece(piece: _Piece) -> None:
    write_shard(piece.path, piece.articles, WORDS)


# --- questions ----------------------------------------------------------------------------------------------------


def _questions(
    work: Path,
    tokenizer: Tokenizer,
    config: ClozeConfig,
    pool: _Workers,
    counts: Counter[str],
    progress: Progress | None,
) -> Iterator[Cloze]:
    """Questions, as many as are wanted if there are as many; counts what it does.

    Raises:
        CorpusError: There is none.
    """
    from retro.answer import question_prompt

    around = len(tokenizer.encode(question_prompt("x")).ids)  # the x stands for BOS
    tokenizer.save(work)
    index_made = (work / "read.json").stat().st_mtime_ns
    num_blocks = -(-counts["sentences_with_blanks"] // BLOCK)
    blocks = (
        Block(work, index_made, number, config.candidates, config.seed, config.question_tokens - around)
        for number in range(num_blocks)
    )
    accepted = _Accepted(config.questions)
    for path in pool.each(make_block, blocks):
        found = read_json(path)
        counts.update(found["counts"])
        for fields in found["questions"]:
            made = Cloze(**fields)
            if (reason := accepted.refuses(made)) is not None:
                counts[reason] += 1
                continue
            counts["questions"] += 1
            counts[made.split] += 1
            counts[f"{made.kind}s"] += 1
            counts["candidates"] += len(made.candidates)
            counts["candidates_with_answer"] += sum(target is not None for _, target in made.candidates)
            yield made
            if counts["questions"] == config.questions:
                break
        if progress is not None:
            progress("questions", counts["questions"], config.questions)
        if counts["questions"] == config.questions:
            break
    if not counts["questions"]:
        raise CorpusError(
            f"not a single question can be made: of {counts['sentences']:,} sentences {counts['sentences_with_blanks']:,} have "
            f"{WORDS[0]} to {WORDS[1]} words and a name or number to ask for, and none of these is supported by another sentence. "
            "Give more documents, in English, with titles"
        )


class _Accepted:
    """Keeps questions apart: none twice, no answer and no pattern of words too often."""

    REASONS = ("duplicates", "frequent_answer", "frequent_pattern")

    def __init__(self, questions: int) -> None:
        self._seen: set[int] = set()
        self._answers: Counter[int] = Counter()
        self._patterns: Counter[int] = Counter()
        self._per_answer, self._per_pattern = max(50, questions // 500), max(20, questions // 5000)

    def refuses(self, made: Cloze) -> str | None:
        """Why a question is left out; None keeps it."""
        question = name_hash(" ".join(made.question.casefold().split()))
        answer = name_hash(made.answer.casefold())
        pattern = name_hash(_PATTERN.sub("#", made.question))
        if question in self._seen:
            return "duplicates"
        if self._answers[answer] >= self._per_answer:
            return "frequent_answer"
        if self._patterns[pattern] >= self._per_pattern:
            return "frequent_pattern"
        self._seen.add(question)
        self._answers[answer] += 1
        self._patterns[pattern] += 1
        return None


_PATTERN = re.compile(r"(?:\b[A-Z\d]\w*[-' ,.]*)+")
"""Names and numbers: what is left says which template an article was made from."""
