"""A question and passages become a prompt; the model's continuation becomes an answer with its sources."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.errors import ConfigError
from retro.generate import Generation, Prompt, Retriever, generate, prompt_ids
from retro.model import Retro
from retro.tokenizer import Tokenizer

NEIGHBOR_LEN = 160
"""R for questions: a passage with its title in front."""
MAX_PROMPT_TOKENS = 512
"""Longest prompt that a question may make. Models learn from questions of far fewer tokens; a text is no question."""
DONT_KNOW = "I don't know"
"""What is said in place of an answer below the confidence that is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer with the passages that the model read."""

    question: str
    text: str
    confidence: float
    """Geometric mean of the probabilities of the answer's tokens, EOS included, in [0, 1]."""
    passages: list[Passage]
    """Those that were read, best first."""
    generation: Generation
    prompt_tokens: int = 0
    """Tokens of the prompt that the decoder read; passages that were read beside it are not in it."""
    context_passages: int = 0
    """How many of the passages, the best ones, stood in that prompt."""


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
    """The form of the paper: title, then source; without a title, the source alone."""
    return f"title: {title}, source: {text}" if title else f"source: {text}"


def answer_prompt(
    question: str, passages: Sequence[Passage], tokenizer: Tokenizer, chunk_len: int, *, context_passages: int = 0
) -> Prompt:
    """A question on the grid, with passages for the chunk that it ends and all later ones.

    Args:
        question: Any text.
        passages: To be read, best first; none for a closed book.
        tokenizer: The model's.
        chunk_len: M.
        context_passages: So many passages, the best first, stand in front of the question instead (RETRO++, arXiv:2304.06762), as
            a model wants it that was trained with as many.

    Raises:
        ConfigError: The question is empty, or longer than MAX_PROMPT_TOKENS.
    """
    ids = prompt_ids(question_prompt(question), tokenizer)
    if len(ids) > MAX_PROMPT_TOKENS:
        raise ConfigError(
            f"the question is too long: with its frame it has {len(ids):,} tokens, at most {MAX_PROMPT_TOKENS} are read; "
            "ask one thing in a sentence or two, texts belong into the index"
        )
    texts = [passage_text(p) for p in passages]
    before = [token for few in tokenizer.encode_batch(texts[:context_passages]) for token in few[:NEIGHBOR_LEN]]
    ids = [ids[0], *before, *ids[1:]]
    return Prompt(ids, {-(-len(ids) // chunk_len) - 1: texts[context_passages:]})


def to_answer(
    question: str,
    passages: Sequence[Passage],
    generation: Generation,
    *,
    tokenizer: Tokenizer | None = None,
    prompt_tokens: int = 0,
    context_passages: int = 0,
) -> Answer:
    """A continuation of `answer_prompt` as an answer.

    Where the tokenizer does not keep texts as they are written (case, accents, spaces), the answer is written as the first passage
    writes it that has its tokens.
    """
    mean = sum(generation.log_probs) / max(len(generation.log_probs), 1)
    text = generation.text.strip()
    if tokenizer is not None and not tokenizer.keeps_text:
        text = _as_written(generation.ids[: len(generation.ids) - generation.finished], passages, tokenizer) or text
    return Answer(
        question=question,
        text=text,
        confidence=math.exp(mean),
        passages=list(passages),
        generation=generation,
        prompt_tokens=prompt_tokens,
        context_passages=context_passages,
    )


def find_ids(ids: Sequence[int] | NDArray[Any], within: Sequence[int] | NDArray[Any]) -> list[int]:
    """Where a run of tokens begins within others; nowhere for an empty run."""
    if not 0 < len(ids) <= len(within):
        return []
    windows = sliding_window_view(np.asarray(within), len(ids))
    places: list[int] = np.flatnonzero((windows == np.asarray(ids)).all(axis=1)).tolist()
    return places


def _as_written(ids: Sequence[int], passages: Sequence[Passage], tokenizer: Tokenizer) -> str | None:
    """Tokens as a passage writes them; None where none has them."""
    for passage in passages:
        text = passage.full_text
        found = tokenizer.encode(text)
        if places := find_ids(ids, found.ids):
            return text[found.spans[places[0], 0] : found.spans[places[0] + len(ids) - 1, 1]]
    return None


def answer_config(num_neighbors: int = 10, max_new_tokens: int = 32) -> GenerateConfig:
    """How questions are answered unless told otherwise: passages of 160 tokens, greedy."""
    return GenerateConfig(num_neighbors=num_neighbors, neighbor_len=NEIGHBOR_LEN, max_new_tokens=max_new_tokens)


def ask_many(
    model: Retro,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    passages: Sequence[Sequence[Passage]],
    config: GenerateConfig | None = None,
    *,
    on_token: Callable[[int, str], None] | None = None,
) -> list[Answer]:
    """Answers questions in one batch, each from passages of its own.

    Args:
        model: See `generate`.
        tokenizer: The model's.
        questions: Any texts.
        passages: Of each question, best first; the first `config.num_neighbors` are read.
        config: Default: `answer_config()`.
        on_token: See `generate`.

    Raises:
        ConfigError: No question, an empty or a too long one, or not as many lists of passages.
    """
    config = config or answer_config()
    if len(passages) != len(questions):
        raise ConfigError(
            f"there are {len(questions)} questions and passages for {len(passages)}: give a list for each"
        )
    read = [few[: config.num_neighbors] for few in passages]
    context = model.context_passages
    prompts = [
        answer_prompt(question, few, tokenizer, model.config.chunk_len, context_passages=context)
        for question, few in zip(questions, read, strict=True)
    ]
    made = generate(model, tokenizer, prompts, config, retriever=None, on_token=on_token)
    return [
        to_answer(
            question,
            few,
            generation,
            tokenizer=tokenizer,
            prompt_tokens=len(prompt.ids),
            context_passages=context,
        )
        for question, few, generation, prompt in zip(questions, read, made, prompts, strict=True)
    ]


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
        config: Default: `answer_config()`.
        on_token: See `generate`.

    Raises:
        ConfigError: An empty or too long question, or no retriever where passages are wanted.
    """
    config = config or answer_config()
    answer_prompt(question, (), tokenizer, model.config.chunk_len)  # what cannot be asked is not looked up
    passages: list[Passage] = []
    if config.num_neighbors > 0:
        if retriever is None:
            raise ConfigError("finding passages needs an index: name one, or ask without (-k 0)")
        passages = retriever.retrieve([question], config.num_neighbors, role="query")[0]
    return ask_many(model, tokenizer, [question], [passages], config, on_token=on_token)[0]
