"""Settings of an index and of training data."""

from dataclasses import dataclass, field
from typing import Literal

from index_builder.corpus import ReadOptions
from retro.config import DEFAULT_ENCODER
from retro.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """How a corpus becomes an index."""

    encoder: str = DEFAULT_ENCODER
    """A sentence-transformers model: a folder or a name on the Hugging Face hub. The default needs no hub."""
    revision: str | None = None
    """Revision of the encoder on the hub; None takes the newest."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """In which the encoder computes; auto is bfloat16 where the device does that natively."""
    backend: Literal["torch", "openvino"] = "torch"
    """What computes the vectors of chunks; openvino is faster on CPUs. Questions are always computed by torch."""
    max_length: int | None = None
    """Tokens of a text that the encoder reads; None takes the model's own limit."""
    query_prompt: str | None = None
    """Put in front of questions; None takes the model's own."""
    document_prompt: str | None = None
    """Put in front of chunks; None takes the model's own."""
    normalize: bool | None = None
    """Whether vectors are scaled to length 1; None as the model does."""
    trust_remote_code: bool = False
    """Whether code that comes with a model of the hub may run."""
    tokenizer: str | None = None
    """Whose tokens are counted when documents are cut into chunks; None takes the encoder's own tokenizer."""
    chunk_len: int = 64
    """Tokens of a chunk."""
    title_in_key: bool = False
    """Encode `title. text` instead of the text of stored chunks; queries never get a title."""
    index_type: str = "auto"
    """auto, or a factory string of FAISS such as Flat or IVF1024,SQ8."""
    max_memory: int | None = None
    """Bytes that the vector index may take when it is searched; None leaves it to the rule."""
    recall: float = 0.95
    """Recall@10 against exact search that an approximate index is tuned to."""
    lexical: str = "english"
    """Language of the BM25 index: one that Snowball stems, none for words as they stand, off for no BM25 index."""
    shard_chars: int = 2_000_000
    """A shard ends after the document with which its texts reach this many characters; work that was interrupted is lost by the
    shard."""
    seed: int = 0
    """Of the sample that trains the index."""
    read: ReadOptions = field(default_factory=ReadOptions)
    """How the documents are read."""

    def __post_init__(self) -> None:
        if self.chunk_len < 2:
            raise ConfigError(f"chunk_len = {self.chunk_len}: a chunk has at least 2 tokens")
        if not 0 < self.recall <= 1:
            raise ConfigError(f"recall = {self.recall}: give a share above 0 and at most 1")
        if self.max_memory is not None and self.max_memory < 1:
            raise ConfigError(f"max_memory = {self.max_memory}: give a number of bytes above 0")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype = {self.dtype!r}: use auto, float32, bfloat16 or float16")
        if self.backend not in ("torch", "openvino"):
            raise ConfigError(f"backend = {self.backend!r}: use torch or openvino")
        if self.shard_chars < 1:
            raise ConfigError(f"shard_chars = {self.shard_chars}: must be above 0")


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
    exclude_near_duplicates: bool = False
    """Leave out the groups of documents that share 80% of their 13-grams of words with the chunk's own document, too."""
    exclude_ngrams_of: tuple[str, ...] = ()
    """Evaluation corpora: chunks of the index that share 13 words in a row with one of their documents are nobody's neighbors."""
    where: str | None = None
    """A condition on the documents that neighbors may come from, as in `lang = "en"`."""
    neighbors: str | None = None
    """A table of neighbors made elsewhere, instead of a search: see `index_builder.neighbors`."""
    lead_share: float = 0.25
    """Share of the training documents that begin with a random number of empty slots, so that the model knows such sequences
    from prompts."""
    valid_share: float = 0.02
    """Share of the groups held out for validation, where documents name no split."""
    test_share: float = 0.02
    """Likewise for the test."""
    shard_chars: int = 2_000_000
    """As in BuildConfig."""
    seed: int = 0
    """Of the leads and the split."""
    read: ReadOptions = field(default_factory=ReadOptions)
    """How the documents are read."""

    def __post_init__(self) -> None:
        for name in ("num_neighbors", "neighbor_len", "shard_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be above 0")
        if self.chunk_len < 2:
            raise ConfigError(f"chunk_len = {self.chunk_len}: a chunk has at least 2 slots")
        for name in ("lead_share", "valid_share", "test_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: give a share between 0 and 1")
        if self.valid_share + self.test_share >= 1:
            raise ConfigError("valid_share and test_share leave nothing to train on")
