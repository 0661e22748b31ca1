"""The usual way to answer from passages: they are pasted into the prompt of a causal language model of Hugging Face, untrained.

It is what retrieval by cross-attention is to be compared with. The prompt:

    Answer the question from the passages, in a few words.

    Passage 1: Warsaw: Warsaw is the capital and largest city of Poland ...

    Passage 2: ...

    Question: What is the capital of Poland?
    Answer:

Where a tokenizer has a chat template, this is what the user says. The answer is what is most probable, up to the first line's end.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro.answer import Answer, answer_config, question_prompt, to_answer
from retro.chunks import Passage
from retro.config import BaseConfig, GenerateConfig
from retro.errors import ConfigError
from retro.generate import Generation


def paste(question: str, passages: Sequence[Passage]) -> str:
    """The prompt; without passages it asks for what the model knows.

    Raises:
        ConfigError: The question is empty.
    """
    question_prompt(question)
    told = (
        "Answer the question from the passages, in a few words." if passages else "Answer the question in a few words."
    )
    texts = [f"{p.title}: {_line(p.full_text)}" if p.title else _line(p.full_text) for p in passages]
    numbered = [f"Passage {number}: {text}" for number, text in enumerate(texts, 1)]
    return "\n\n".join([told, *numbered, f"Question: {_line(question)}\nAnswer:"])


class PromptedModel:
    """A causal language model that reads passages in its prompt."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Takes a model of transformers and its tokenizer; the model's own settings of generation are set aside.

        Args:
            model: With a language modeling head, wherever it is to compute.
            tokenizer: As AutoTokenizer opens it.
        """
        from transformers import GenerationConfig

        self.model, self.tokenizer = model.eval(), tokenizer
        stops = [model.generation_config.eos_token_id if model.generation_config else None, tokenizer.eos_token_id]
        eos = [stop for few in stops for stop in (few if isinstance(few, list) else [few]) if stop is not None]
        self.eos_ids = tuple(dict.fromkeys(eos))
        """Any of these ends an answer."""
        self.max_tokens = _context(model.config, tokenizer)
        """Of prompt and answer together; None where the model has no limit."""
        pad = self.eos_ids[0] if self.eos_ids else 0
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, eos_token_id=list(self.eos_ids) or None, pad_token_id=pad
        )

    @classmethod
    def open(cls, name: str | Path, *, device: torch.device | str = "cpu") -> "PromptedModel":
        """Opens a folder, or a name on the Hugging Face hub; on a GPU in bfloat16.

        Raises:
            ConfigError: There is no such model, it is no causal language model, or it has no tokenizer.
        """
        import transformers

        from retro.pretrained import open_base

        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        model = open_base(BaseConfig(name=str(name)), dtype, device)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(name))
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"{name} has no tokenizer that can be opened ({first}): put one into its folder"
            ) from error
        return cls(model, tokenizer)

    def ask_many(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        config: GenerateConfig | None = None,
        *,
        on_token: Callable[[int, str], None] | None = None,
    ) -> list[Answer]:
        """Answers questions in one batch.

        Args:
            questions: Any texts.
            passages: Of each question, best first; of the first `config.num_neighbors` those are read that fit into the context,
                and an answer lists these only.
            config: `num_neighbors` and `max_new_tokens` count; it is greedy. Default: `answer_config()`.
            on_token: Called with the question's number and each new piece of the answer.

        Raises:
            ConfigError: No question, an empty one, one that does not fit into the context, or not as many lists of passages.
        """
        config = config or answer_config()
        if not questions or len(passages) != len(questions):
            raise ConfigError(
                f"there are {len(questions)} questions and passages for {len(passages)}: give a list for each"
            )
        if config.temperature > 0:
            raise ConfigError(f"temperature = {config.temperature}: a prompted model answers greedily, use 0")
        fitted = [
            self._fit(question, few[: config.num_neighbors], config.max_new_tokens)
            for question, few in zip(questions, passages, strict=True)
        ]
        made = self._continue([ids for ids, _ in fitted], config.max_new_tokens, on_token)
        return [
            to_answer(question, few, generation, prompt_tokens=len(ids))
            for question, (ids, few), generation in zip(questions, fitted, made, strict=True)
        ]

    def ask(
        self,
        question: str,
        passages: Sequence[Passage],
        config: GenerateConfig | None = None,
        *,
        on_token: Callable[[int, str], None] | None = None,
    ) -> tuple[Answer, None]:
        """Answers one question, see `ask_many`; where it looked is not known."""
        return self.ask_many([question], [passages], config, on_token=on_token)[0], None

    def prompt_ids(self, question: str, passages: Sequence[Passage]) -> list[int]:
        """Tokens of the prompt, in the chat template where there is one."""
        text = paste(question, passages)
        if getattr(self.tokenizer, "chat_template", None):
            # A model that thinks first would have no answer in its first line.
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(text)["input_ids"])

    def _fit(
        self, question: str, passages: Sequence[Passage], max_new_tokens: int
    ) -> tuple[list[int], Sequence[Passage]]:
        """The prompt's tokens with as many passages as fit, and these."""
        limit = math.inf if self.max_tokens is None else self.max_tokens - max_new_tokens
        for count in range(len(passages), -1, -1):
            ids = self.prompt_ids(question, passages[:count])
            if len(ids) <= limit:
                return ids, passages[:count]
        raise ConfigError(
            f"the question has {len(ids):,} tokens with its frame: with {max_new_tokens} for the answer that is more than the "
            f"{self.max_tokens:,} of the model's context; ask in fewer words"
        )

    @torch.inference_mode()
    def _continue(
        self, prompts: list[list[int]], max_new_tokens: int, on_token: Callable[[int, str], None] | None
    ) -> list[Generation]:
        """The most probable continuations, up to the first line's end or a token that ends the text."""
        from transformers import LogitsProcessorList, StoppingCriteriaList

        T, device = max(map(len, prompts)), self.model.device
        pad = self.model.generation_config.pad_token_id
        ids_BT = torch.tensor([[pad] * (T - len(ids)) + ids for ids in prompts], device=device)
        keep_BT = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        lines = _Lines(self.tokenizer, self.eos_ids, T, on_token, [""] * len(prompts))
        made_BT = self.model.generate(
            input_ids=ids_BT,
            attention_mask=keep_BT,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([lines.note]),
            stopping_criteria=StoppingCriteriaList([lines.ended]),
        )
        return [lines.generation(b, ids) for b, ids in enumerate(made_BT[:, T:].tolist())]


@dataclass(slots=True)
class _Lines:
    """Follows the first lines of continuations while they are made."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    prompt_len: int
    on_token: Callable[[int, str], None] | None
    told: list[str]
    """What was told of each."""
    log_probs: list[list[float]] = field(default_factory=list)
    """Of each step, those of the most probable tokens [B]."""

    def note(self, _ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        """Keeps the probabilities of the tokens that will be taken."""
        self.log_probs.append(torch.log_softmax(logits_BV.float(), dim=-1).amax(dim=-1).tolist())
        return logits_BV

    def ended(self, ids_BT: Tensor, _scores: Any) -> Tensor:
        """Which continuations need no further token [B]."""
        texts = [self._line(ids[self.prompt_len :]) for ids in ids_BT.tolist()]
        if self.on_token is not None:
            for b, (text, _) in enumerate(texts):
                if text.startswith(self.told[b]) and len(text) > len(self.told[b]) and not text.endswith("\ufffd"):
                    self.on_token(b, text[len(self.told[b]) :])
                    self.told[b] = text
        return torch.tensor([over for _, over in texts], device=ids_BT.device)

    def generation(self, b: int, ids: list[int]) -> Generation:
        """A continuation up to the token that ended it."""
        count = next((n for n in range(1, len(ids) + 1) if self._line(ids[:n])[1]), len(ids))
        text, finished = self._line(ids[:count])
        return Generation(text, ids[:count], [step[b] for step in self.log_probs[:count]], finished)

    def _line(self, ids: list[int]) -> tuple[str, bool]:
        """The first line that is not empty, and whether it is complete."""
        end = next((place for place, token in enumerate(ids) if token in self.eos_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True).lstrip()
        line, newline, _ = text.partition("\n")
        return line.rstrip() if newline else line, bool(newline) or end is not None


def _context(config: Any, tokenizer: Any) -> int | None:
    """The most tokens that a model takes, as far as it says so."""
    own = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    told = getattr(tokenizer, "model_max_length", None)
    limits = [limit for limit in (own, told) if isinstance(limit, int) and 0 < limit < 10**9]
    return min(limits, default=None)


def _line(text: str) -> str:
    return " ".join(text.split())
