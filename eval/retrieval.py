"""How often the answer is among the passages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.metrics import answer_recall, first_with_answer
from retro.generate import Retriever

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
