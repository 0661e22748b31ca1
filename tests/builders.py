"""Small training data and models for tests.

Neighbor number u begins with the two tokens (u // BASE + 2, u % BASE + 2), so that a test can tell which one it was given.
"""

import functools
import importlib.util
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retro import artifact
from retro.chunks import SPLITS, Document, Passage, TrainingArrays, TrainingData, save_array
from retro.config import ModelConfig, RunConfig, TrainConfig
from retro.generate import Role
from retro.tokenizer import Tokenizer

CHUNK_LEN = 8
BASE = 200


@dataclass(frozen=True)
class ToyDocument:
    """One document of training data."""

    ids: list[int]
    """Without BOS."""
    neighbors: list[list[int]]
    """Which neighbors each chunk has, -1 where there is none."""
    lead: int = 0
    split: str = "train"

    @property
    def tokens(self) -> list[int]:
        """With BOS."""
        return [toy_tokenizer().bos_id, *self.ids]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or CHROMIUM is None,
    reason="needs playwright (pip install playwright) and Chromium (chromium on the PATH)",
)


def one_thread() -> Iterator[None]:
    """To be made a fixture: on shared cores the threads of a tiny model wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def toy_tokenizer() -> Tokenizer:
    """The 256 bytes, BOS and EOS."""
    return Tokenizer.train(["toy"], 258)


def neighbor_tokens(number: int, length: int) -> list[int]:
    """The tokens of one neighbor; at least the two that name it."""
    body = np.random.default_rng(number).integers(2, 258, max(length - 2, 0)).tolist()
    return [number // BASE + 2, number % BASE + 2, *body]


def neighbor_number(tokens: list[int]) -> int:
    """Which neighbor this is."""
    return (tokens[0] - 2) * BASE + tokens[1] - 2


def num_chunks(num_tokens: int, lead: int, chunk_len: int = CHUNK_LEN) -> int:
    """Chunks of a document's grid; `num_tokens` counts BOS."""
    return -(-(lead + num_tokens) // chunk_len)


def random_documents(
    seed: int,
    *,
    counts: dict[str, int],
    max_tokens: int = 40,
    num_neighbors: int = 3,
    missing: float = 0.3,
    vocab: int = 258,
) -> tuple[list[ToyDocument], list[list[int]]]:
    """Documents of random lengths and leads in mixed splits, each chunk with neighbors of its own, some of them missing.

    Returns:
        The documents and the tokens of the neighbors.
    """
    rng = np.random.default_rng(seed)
    splits = [split for split, count in counts.items() for _ in range(count)]
    rng.shuffle(splits)
    documents: list[ToyDocument] = []
    neighbors: list[list[int]] = []
    for split in splits:
        ids = rng.integers(2, vocab, rng.integers(0, max_tokens + 1)).tolist()
        lead = int(rng.integers(CHUNK_LEN)) if rng.random() < 0.4 else 0
        rows = []
        for chunk in range(num_chunks(len(ids) + 1, lead)):
            partial = (chunk + 1) * CHUNK_LEN > lead + 1 + len(ids)
            present = 0 if partial else num_neighbors - int(rng.binomial(num_neighbors, missing))
            rows.append([len(neighbors) + i if i < present else -1 for i in range(num_neighbors)])
            neighbors += [
                neighbor_tokens(len(neighbors) + i, int(rng.integers(2, 2 * CHUNK_LEN + 1))) for i in range(present)
            ]
        documents.append(ToyDocument(ids, rows, lead, split))
    return documents, neighbors


def make_training_data(
    folder: Path,
    documents: list[ToyDocument],
    neighbors: list[list[int]],
    *,
    chunk_len: int = CHUNK_LEN,
    neighbor_len: int = 2 * CHUNK_LEN,
) -> TrainingData:
    """Writes training data as `retro data` does, and opens it."""
    tokenizer = toy_tokenizer()
    tokens = [document.tokens for document in documents]
    neighbor_ids = np.zeros((len(neighbors), neighbor_len), np.uint16)
    for row, ids in zip(neighbor_ids, neighbors, strict=True):
        row[: len(ids)] = ids
    rows = [row for document in documents for row in document.neighbors]
    width = len(rows[0])
    chosen = np.array(rows, np.int64).reshape(-1, width)
    arrays = TrainingArrays(
        ids=np.array([i for ids in tokens for i in ids], np.uint16),
        starts=np.cumsum([0, *map(len, tokens)]),
        leads=np.array([d.lead for d in documents], np.int32),
        splits=np.array([SPLITS.index(d.split) for d in documents], np.uint8),
        num_bytes=np.array([len(d.ids) for d in documents], np.int64),
        neighbors=chosen,
        scores=np.where(chosen >= 0, 1.0, np.nan).astype(np.float32),
        index_rows=np.arange(len(neighbors)),
        neighbor_ids=neighbor_ids,
        neighbor_lengths=np.array([len(ids) for ids in neighbors], np.int32),
        neighbor_chunk_lengths=np.array([min(len(ids), chunk_len) for ids in neighbors], np.int32),
    )
    recipe = {"made by": "tests"}
    artifact.begin(folder, TrainingData.KIND, recipe, overwrite=False)
    tokenizer.save(folder)
    where = arrays.folders()
    for field in fields(arrays):
        save_array(folder / where[field.name] / f"{field.name}.npy", getattr(arrays, field.name))
    manifest = {"chunk_len": chunk_len, "tokenizer_fingerprint": tokenizer.fingerprint}
    artifact.finish(folder, TrainingData.KIND, recipe, manifest)
    return TrainingData(folder)


def random_training_data(folder: Path, seed: int = 0, **options: Any) -> TrainingData:
    """Training data of random documents."""
    counts = options.pop("counts", {"train": 12, "valid": 4, "test": 3})
    return make_training_data(folder, *random_documents(seed, counts=counts, **options))


def toy_model_config(**changes: Any) -> ModelConfig:
    """A network of two layers with one CCA."""
    values: dict[str, Any] = {
        "vocab_size": 258,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "ffw_dim": 32,
        "cca_layers": (2,),
        "encoder_dim": 16,
        "encoder_layers": 1,
        "encoder_heads": 2,
        "encoder_head_dim": 8,
        "encoder_ffw_dim": 32,
        "chunk_len": CHUNK_LEN,
    }
    return ModelConfig(**(values | changes))


def speak_up(model: Any, *, std: float = 1.0, seed: int = 0) -> None:
    """Gives a network large random matrices, so that passages and distant tokens move what it says."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std / parameter.shape[1] ** 0.5, generator=generator)


def toy_run(data: Path, out: Path, *, model: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """A short training on the CPU."""
    values: dict[str, Any] = {
        "data": str(data),
        "out": str(out),
        "seq_len": 4 * CHUNK_LEN,
        "num_neighbors": 2,
        "neighbor_len": 12,
        "batch_size": 4,
        "micro_batch_size": 2,
        "steps": 6,
        "warmup_steps": 2,
        "log_every": 1,
        "eval_every": 3,
        "eval_sequences": 4,
        "save_every": 2,
        "neighbor_dropout": 0.25,
        "sample_tokens": 0,
        "device": "cpu",
        "precision": "float32",
    }
    return RunConfig(model=toy_model_config(**(model or {})), train=TrainConfig(**(values | changes)))


class Library:
    """A retriever whose passages follow from the query and the number wanted."""

    def __init__(self, passages: Callable[[str, int], list[Passage]]) -> None:
        self.queries: list[str] = []
        self._passages = passages

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        assert (role, exclude, where) == ("document", None, None)
        self.queries += queries
        return [self._passages(query, k) for query in queries]


def plain_document(number: int, text: str) -> Document:
    """A document with nothing but a key, a group and a text."""
    made: dict[str, Any] = dict.fromkeys(("title", "url", "split", "source"), "")
    return Document(key=f"k{number}", text=text, group=f"g{number}", metadata="{}", content_hash=text, **made)
