"""Settings of an index and of training data."""

from dataclasses import dataclass, field
from typing import Literal

from index_builder.corpus import ReadOptions
from retro.errors import ConfigError

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """How a corpus becomes an index."""

    encoder: str = DEFAULT_ENCODER
    """A sentence-transformers model: a folder or a name on the Hugging Face hub. The default needs no hub."""
    revision: str | None = None
    """Revision of the encoder on the hub; None takes the newest."""
    tokenizer: str | None = None
    """Whose tokens are counted when documents are cut into chunks; None takes the encoder's own tokenizer."""
    chunk_len: int = 64
    """Tokens of a chunk."""
    title_in_key: bool = False
    """Encode `title. text` instead of the text of stored chunks; queries never get a title."""
    index_type: str = "auto"
    """auto, or a factory string of FAISS such as Flat or IVF1024,SQ8."""
    shard_chunks: int = 4096
    """A shard ends after the document with which it reaches this many chunks; work that was interrupted is lost by the shard."""
    seed: int = 0
    """Of the sample that trains the index."""
    read: ReadOptions = field(default_factory=ReadOptions)
    """How the documents are read."""

    def __post_init__(self) -> None:
        if self.chunk_len < 2:
            raise ConfigError(f"chunk_len = {self.chunk_len}: a chunk has at least 2 tokens")
        if self.shard_chunks < 1:
            raise ConfigError(f"shard_chunks = {self.shard_chunks}: must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """How a corpus becomes training data."""

    num_neighbors: int = 2
    """K: neighbors of each chunk."""
    neighbor_len: int = 128
    """R: tokens of a neighbor that are kept."""
    chunk_len: int = 64
    """M: slots of a chunk of the model."""
    exclude: Literal["group", "none"] = "group"
    """Which neighbors are left out: those of the chunk's own group, or none at all (leaks; for tests of leakage only)."""
    lead_share: float = 0.25
    """Share of the training documents that begin with a random number of empty slots, so that the model knows such sequences
    from prompts."""
    valid_share: float = 0.02
    """Share of the groups held out for validation, where documents name no split."""
    test_share: float = 0.02
    """Likewise for the test."""
    shard_chunks: int = 4096
    """As in BuildConfig."""
    seed: int = 0
    """Of the leads and the split."""
    read: ReadOptions = field(default_factory=ReadOptions)
    """How the documents are read."""

    def __post_init__(self) -> None:
        for name in ("num_neighbors", "neighbor_len", "shard_chunks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be above 0")
        if self.chunk_len < 2:
            raise ConfigError(f"chunk_len = {self.chunk_len}: a chunk has at least 2 slots")
        for name in ("lead_share", "valid_share", "test_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: give a share between 0 and 1")
        if self.valid_share + self.test_share >= 1:
            raise ConfigError("valid_share and test_share leave nothing to train on")
