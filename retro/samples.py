"""What a model writes while it trains: a validation document's beginning, continued with the neighbors of its training data."""

from dataclasses import dataclass
from typing import Any

from retro.config import GenerateConfig
from retro.data import Batches
from retro.generate import Prompt, generate
from retro.model import Retro

SAMPLES = "samples.jsonl"
CHUNKS = 2
"""Chunks of the document that are given, where it has as many finished ones."""


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """The same at every evaluation, so that samples can be compared."""

    ids: list[int]
    """BOS and tokens: whole chunks."""
    neighbors: dict[int, list[str]]
    """Texts of the neighbors of each chunk."""

    @classmethod
    def choose(cls, batches: Batches) -> "SamplePrompt | None":
        """Takes the first document of the split with neighbors, else the first with a finished chunk; None where there is none."""
        data = batches.data
        starts, leads = data.arrays.starts, data.arrays.leads
        found = None
        for document in data.documents(batches.split).tolist():
            ids = data.arrays.ids[starts[document] : starts[document + 1]].tolist()
            finished = min(len(ids) // data.chunk_len, CHUNKS)
            if finished == 0 or leads[document]:
                continue
            texts = {
                chunk: [data.tokenizer.decode(near) for near in batches.neighbors_of(document, chunk)]
                for chunk in range(finished)
            }
            found = cls(ids[: finished * data.chunk_len], texts) if found is None or any(texts.values()) else found
            if any(texts.values()):
                break
        return found

    def sample(self, model: Retro, batches: Batches, tokens: int) -> dict[str, Any]:
        """Continues it greedily; later chunks keep the neighbors of the last one given.

        Returns:
            Plain data: `prompt`, `neighbors` (of each chunk) and `continuation`.
        """
        config = GenerateConfig(
            max_new_tokens=tokens, num_neighbors=batches.num_neighbors, neighbor_len=batches.neighbor_len
        )
        tokenizer = batches.data.tokenizer
        prompt = Prompt(self.ids, self.neighbors if batches.num_neighbors else None)
        [generation] = generate(model, tokenizer, [prompt], config)
        return {
            "prompt": tokenizer.decode(self.ids),
            "neighbors": list(self.neighbors.values()),
            "continuation": generation.text,
        }
