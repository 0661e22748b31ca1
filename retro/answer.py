"""A question and passages become a prompt; the model's continuation becomes an answer with its sources."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.errors import ConfigError
from retro.generate import Generation, Prompt, Retriever, generate, prompt_ids
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
