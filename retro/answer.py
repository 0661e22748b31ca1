"""A question and passages become a prompt; the model's continuation becomes an answer with its sources."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.data import Batch
from retro.errors import ConfigError
from retro.generate import Generation, Prompt, Retriever, generate, neighbor_tensors, prompt_ids
from retro.model import Retro
from retro.tokenizer import Tokenizer

NEIGHBOR_LEN = 160
"""R for questions: a passage with its title in front."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer with the passages that the model read."""

    question: str
    text: str
    confidence: float
    """Geometric mean of the probabilities of the answer's tokens, in [0, 1]."""
    passages: list[Passage]
    generation: Generation


def question_prompt(question: str) -> str:
    """The prompt of the paper (section 4.4); its last token stands at the end of a chunk.

    Raises:
        ConfigError: The question is empty.
    """
    question = " ".join(question.split())
    if not question:
        raise ConfigError("the question is empty: ask something")
    return f"question: {question} \nanswer:"


def passage_text(passage: Passage) -> str:
    """A passage as the neighbor encoder reads it when a question is asked."""
    return source_text(passage.title, passage.full_text)


def source_text(title: str, text: str) -> str:
    """The form of the paper: title, then source."""
    return f"title: {title}, source: {text}"


def ask(
    model: Retro,
    tokenizer: Tokenizer,
    question: str,
    *,
    retriever: Retriever | None,
    config: GenerateConfig | None = None,
    on_token: Callable[[int, str], None] | None = None,
) -> Answer:
    """Answers a question from the passages that are found for it.

    Args:
        model: See `generate`.
        tokenizer: The model's.
        question: Any text.
        retriever: Finds passages; not needed where `config.num_neighbors` is 0 (closed book).
        config: Default: 10 passages of 160 tokens, at most 32 new tokens, greedy.
        on_token: See `generate`.

    Raises:
        ConfigError: An empty question, or no retriever where passages are wanted.
    """
    config = config or GenerateConfig(num_neighbors=10, neighbor_len=NEIGHBOR_LEN, max_new_tokens=32)
    prompt = question_prompt(question)
    passages: list[Passage] = []
    if config.num_neighbors > 0:
        if retriever is None:
            raise ConfigError("finding passages needs an index: name one, or ask without (-k 0)")
        passages = retriever.retrieve([question], config.num_neighbors, role="query")[0]
    ids = prompt_ids(prompt, tokenizer)
    last = -(-len(ids) // model.config.chunk_len) - 1
    texts = {last: [passage_text(p) for p in passages]}
    generation = generate(model, tokenizer, [Prompt(ids, texts)], config, retriever=None, on_token=on_token)[0]
    mean = sum(generation.log_probs) / max(len(generation.log_probs), 1)
    return Answer(
        question=question,
        text=generation.text.strip(),
        confidence=math.exp(mean),
        passages=passages,
        generation=generation,
    )


@dataclass(frozen=True, slots=True)
class QuestionItem:
    """A question to train or to score on."""

    question: str
    answer: str
    sources: Sequence[str]
    """What the neighbor encoder reads, see `source_text`; empty means closed book."""


def question_batch(
    items: Sequence[QuestionItem], tokenizer: Tokenizer, chunk_len: int, *, neighbor_len: int = NEIGHBOR_LEN
) -> Batch:
    """Prompts with their answers on the grid: loss on the answer and EOS only.

    Raises:
        ConfigError: There is no item.
    """
    if not items:
        raise ConfigError("there is no question")
    M = chunk_len
    rows = [
        (prompt_ids(question_prompt(i.question), tokenizer), tokenizer.encode(" " + i.answer.strip()).ids.tolist())
        for i in items
    ]
    chunks = [-(-len(prompt) // M) for prompt, _ in rows]
    T = M * max(c + -(-len(answer) // M) for c, (_, answer) in zip(chunks, rows, strict=True))
    B = len(items)
    inputs_BT = torch.zeros(B, T, dtype=torch.long)
    targets_BT = torch.zeros(B, T, dtype=torch.long)
    keep_BT = torch.zeros(B, T, dtype=torch.bool)
    loss_BT = torch.zeros(B, T, dtype=torch.bool)
    texts: list[list[list[str]]] = [[[] for _ in range(T // M)] for _ in items]
    for row, (item, (prompt, answer)) in enumerate(zip(items, rows, strict=True)):
        first, border = chunks[row] * M - len(prompt), chunks[row] * M
        end = border + len(answer)
        inputs_BT[row, first:end] = torch.tensor([*prompt, *answer])
        targets_BT[row, first:end] = torch.tensor([*prompt[1:], *answer, tokenizer.eos_id])
        keep_BT[row, first:end] = True
        loss_BT[row, border - 1 : end] = True
        for chunk in range(chunks[row] - 1, end // M):  # the prompt's last chunk, and whole chunks of the answer
            texts[row][chunk] = list(item.sources)
    K = max(1, *(len(item.sources) for item in items)) if items else 1
    neighbors_BLKR, keep_BLKR = neighbor_tensors(texts, tokenizer, K, neighbor_len)
    return Batch(
        inputs_BT=inputs_BT,
        targets_BT=targets_BT,
        keep_BT=keep_BT,
        loss_BT=loss_BT,
        document_BL=torch.zeros(B, T // M, dtype=torch.long),
        neighbors_BLKR=neighbors_BLKR,
        keep_BLKR=keep_BLKR,
    )


def closed_book(items: Sequence[QuestionItem]) -> list[QuestionItem]:
    """The same questions without sources."""
    return [replace(item, sources=()) for item in items]
