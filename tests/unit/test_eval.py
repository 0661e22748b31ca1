"""Measures of evaluation against numbers worked out by hand."""

from collections.abc import Collection, Sequence

import pytest

from eval import retrieval
from eval.metrics import answer_recall, contains_answer, first_with_answer
from eval.retrieval import measure_answer_recall
from retro.chunks import Passage
from retro.generate import Role


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It began in October 1973.", "october 1973"),
        ("IT BEGAN IN OCTOBER", "October"),
        ("in October\n  1973", "October 1973"),
        ("in October 1973", " October\t 1973 "),
        ("no-break\u00a0space", "break space"),
        ("(OPEC)", "OPEC"),
        ("the oil-rich Gulf", "oil"),
        ("OPEC", "OPEC"),
        ("It cost $3.00 a barrel", "$3.00"),
        ("written in C++, mostly", "C++"),
        ("what is (a+b)*[c]?", "(a+b)*[c]?"),
        ("a back\\slash", "back\\slash"),
        ("Die STRASSE", "Stra\u00dfe"),
        ("\u0395\u039b\u039b\u0391\u03a3", "\u03b5\u03bb\u03bb\u03b1\u03c2"),
        ("in \u5317\u4eac \u5e02", "\u5317\u4eac"),
        ("12 and 1200", "12"),
        ("category, then cat", "cat"),
    ],
)
def test_an_answer_is_found_whatever_its_case_and_white_space(text: str, answer: str) -> None:
    assert contains_answer(text, [answer])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("category", "cat"),
        ("bobcat", "cat"),
        ("1973", "73"),
        ("snake_case", "snake"),
        ("na\u00efvet\u00e9", "na\u00efve"),
        ("\u00e9cat", "cat"),
        ("3x00", "3.00"),
        ("aab", "a*b"),
        ("anything", "."),
        ("one or two", "one|two"),
        ("October 1973", "1973 October"),
        ("OctoberNovember", "October November"),
        ("", "a"),
    ],
)
def test_a_part_of_a_word_and_a_pattern_are_no_answer(text: str, answer: str) -> None:
    assert not contains_answer(text, [answer])


@pytest.mark.parametrize("answers", [[], [""], [" ", "\n"]])
def test_an_empty_answer_stands_nowhere(answers: list[str]) -> None:
    assert not contains_answer("some text", answers)
    assert not contains_answer("", answers)


def test_one_of_several_answers_is_enough() -> None:
    assert contains_answer("in London", ["", "Paris", "London"])


def test_the_first_text_with_any_answer_counts() -> None:
    texts = ["nothing", "Londoner", "from Paris", "in London"]
    assert first_with_answer(texts, ["London"]) == 3
    assert first_with_answer(texts, ["London", "Paris"]) == 2
    assert first_with_answer(texts, ["Rome"]) is None
    assert first_with_answer([], ["London"]) is None


def test_recall_is_the_share_of_ranks_below_k() -> None:
    ranks = [0, 4, None, 5, 19]
    assert [answer_recall(ranks, k) for k in (1, 4, 5, 6, 20, 100)] == [0.2, 0.2, 0.4, 0.6, 0.8, 0.8]
    assert answer_recall([None, None], 20) == 0.0
    assert answer_recall([0], 1) == 1.0


class Shelf:
    """Every question finds the same passages; keeps what was asked."""

    def __init__(self, passages: list[tuple[str, str]]) -> None:
        self.passages = [
            Passage(row=i, key=f"k{i}", title="", url="", text=text, continuation=more, score=1.0, metadata="{}")
            for i, (text, more) in enumerate(passages)
        ]
        self.asked: list[tuple[list[str], int, str]] = []

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        self.asked.append((list(queries), k, role))
        return [self.passages[:k] for _ in queries]


def test_recall_is_measured_for_chunks_alone_and_with_continuations() -> None:
    shelf = Shelf([("in Rome", " or Par"), ("is", " Paris"), ("a city, ", "London"), ("London", ""), ("Oslo", "")])
    answers = [["Rome"], ["Paris", "Lutetia"], ["London"], ["Oslo"], ["Bonn"]]
    questions = [f"question {i}" for i in range(5)]
    seen: list[tuple[int, int]] = []
    report = measure_answer_recall(
        shelf, questions, answers, ks=(1, 2, 4), progress=lambda done, total: seen.append((done, total))
    )
    # Ranks in chunks: 0, none, 3, 4 (beyond the four asked for), none; with continuations: 0, 1, 2, none, none.
    assert report.num_questions == 5
    assert report.chunk == {1: 0.2, 2: 0.2, 4: 0.4}
    assert report.chunk_and_continuation == {1: 0.2, 2: 0.4, 4: 0.6}
    assert shelf.asked == [(questions, 4, "query")]
    assert seen == [(5, 5)]


def test_an_answer_may_reach_from_a_chunk_into_its_continuation() -> None:
    report = measure_answer_recall(Shelf([("October", " 1973")]), ["when"], [["October 1973"]], ks=(1,))
    assert (report.chunk, report.chunk_and_continuation) == ({1: 0.0}, {1: 1.0})


def test_questions_are_looked_up_in_batches_with_the_same_result() -> None:
    count = retrieval.BATCH_QUESTIONS + 3
    shelf = Shelf([("yes", "")])
    answers = [["yes"] if i % 2 else ["no"] for i in range(count)]
    seen: list[tuple[int, int]] = []
    report = measure_answer_recall(
        shelf, [str(i) for i in range(count)], answers, ks=(1,), progress=lambda *pair: seen.append(pair)
    )
    assert report.chunk[1] == (count // 2) / count
    assert [len(queries) for queries, *_ in shelf.asked] == [retrieval.BATCH_QUESTIONS, 3]
    assert [query for queries, *_ in shelf.asked for query in queries] == [str(i) for i in range(count)]
    assert seen == [(retrieval.BATCH_QUESTIONS, count), (count, count)]


def test_as_many_answers_as_questions_are_needed() -> None:
    with pytest.raises(ValueError, match="zip"):
        measure_answer_recall(Shelf([("yes", "")]), ["a", "b"], [["yes"]], ks=(1,))
