"""Text to token ids and back, through Hugging Face tokenizers; training of a byte-level BPE.

Encoding never adds or recognizes special tokens: text that happens to contain `<|eos|>` is text. BOS and EOS are placed by
whoever builds a sequence.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from retro.artifact import MANIFEST, fingerprint, read_json, read_manifest, write_atomically
from retro.errors import ConfigError, FormatError
from retro.pretrained_encoder import encoder_place

TOKENIZER_FILE = "tokenizer.json"
BOS, EOS = "<|bos|>", "<|eos|>"
PIECE_CHARS = 1 << 18
"""Longer texts are tokenized in pieces of about this many characters, cut before a space that follows a letter, so that memory
stays bounded; tokenizers that split words at spaces give the same ids as in one piece."""

_BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[CLS]")
_EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[SEP]")
"""A tokenizer may have such a name among its plain tokens, as Gemma has HTML's <s>: those that it says are special come first."""
_CUT = re.compile(r"(?<=\w) (?=\w)")


class Encoded(NamedTuple):
    """Tokens of a text: ids [n] int32, and the span of characters [n, 2] int64 that each came from (whole characters, so that
    two tokens may share one)."""

    ids: NDArray[np.int32]
    spans: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A Hugging Face tokenizer and its two special ids.

    Attributes:
        bos_id: Begins a document.
        eos_id: Ends a document; a target only.
        fingerprint: Equal for equal tokenizers, whatever file they came from.
    """

    backend: tokenizers.Tokenizer
    bos_id: int
    eos_id: int
    fingerprint: str

    @classmethod
    def load(cls, name: str) -> "Tokenizer":
        """Opens a tokenizer.

        Args:
            name: A `tokenizer.json`, a folder that holds one (made by `retro tokenizer train`, a model of ours, a model of Hugging
                Face), or the name of a model on the Hugging Face hub; that of the default encoder needs no hub.

        Raises:
            ConfigError: Nothing of that name is there.
            FormatError: The file is no tokenizer.
        """
        path = Path(encoder_place(name))
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if path.is_dir() and (path / MANIFEST).is_file() and read_json(path / MANIFEST).get("kind") == "tokenizer":
            read_manifest(path, "tokenizer")
        if file.is_file():
            try:
                return cls.wrap(tokenizers.Tokenizer.from_file(str(file)))
            except ConfigError:
                raise
            except Exception as error:  # the library raises bare Exception
                raise FormatError(f"{file} is no tokenizer file: {error}") from error
        if path.exists() or name.count("/") > 1 or name.endswith(".json"):
            raise ConfigError(f"there is no {TOKENIZER_FILE} in {name}: train one with `retro tokenizer train`")
        try:
            return cls.wrap(tokenizers.Tokenizer.from_pretrained(name))
        except Exception as error:
            raise ConfigError(
                f"no tokenizer {name!r}: it is neither a file or folder here nor could it be had from the hub ({error})"
            ) from error

    @classmethod
    def wrap(cls, backend: tokenizers.Tokenizer) -> "Tokenizer":
        """Takes a tokenizers.Tokenizer; truncation, padding and what puts special tokens around a text are gone in a copy."""
        content = json.loads(backend.to_str())
        content["post_processor"] = _without_template(content.get("post_processor"))
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        bos_id = _special_id(backend, _BOS_NAMES, _EOS_NAMES)  # OPT has one token for both, by the name of EOS
        eos_id = _special_id(backend, _EOS_NAMES)
        content = json.loads(backend.to_str())
        return cls(backend, bos_id, eos_id, fingerprint([content, bos_id, eos_id]))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Trains a byte-level BPE (no text is unknown to it).

        Args:
            texts: The corpus; read once.
            vocab_size: Entries, the 256 bytes and the two special tokens included.

        Raises:
            ConfigError: `vocab_size` is below 258, or there is no text.
        """
        if vocab_size < 258:
            raise ConfigError(f"vocab_size = {vocab_size}: 256 bytes and 2 special tokens need at least 258")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        count = 0

        def counted() -> Iterator[str]:
            nonlocal count
            for text in texts:
                count += 1
                yield from pieces(text)

        backend.train_from_iterator(counted(), trainer)
        if count == 0:
            raise ConfigError("there is no text to train a tokenizer on")
        return cls.wrap(backend)

    def save(self, folder: Path, *, with_bos: bool = False) -> None:
        """Writes `tokenizer.json` into a folder.

        Args:
            folder: It may not be there yet.
            with_bos: Whoever lets the library add special tokens, as Hugging Face transformers do, gets BOS in front of a text.
        """
        backend = self.backend
        if with_bos:
            backend = tokenizers.Tokenizer.from_str(backend.to_str())
            bos = str(backend.id_to_token(self.bos_id))
            template = tokenizers.processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A:0", "$B:1"], special_tokens=[(bos, self.bos_id)]
            )
            steps = [step for step in (backend.post_processor, template) if step is not None]
            backend.post_processor = steps[0] if len(steps) == 1 else tokenizers.processors.Sequence(steps)
        write_atomically(folder / TOKENIZER_FILE, lambda file: file.write(backend.to_str(pretty=True).encode()))

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size)."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def keeps_text(self) -> bool:
        """Whether texts come back as they were written; BERT's, for one, has only small letters and no spaces."""
        sample = "As it is (1,000)."
        return self.decode(self.backend.encode(sample, add_special_tokens=False).ids) == sample

    def encode(self, text: str) -> Encoded:
        """Tokens of one text, of any length, in bounded memory beyond the result."""
        ids: list[NDArray[np.int32]] = []
        spans: list[NDArray[np.int64]] = []
        start = 0
        for piece in pieces(text):
            encoding = self.backend.encode(piece, add_special_tokens=False)
            ids.append(np.asarray(encoding.ids, dtype=np.int32))
            spans.append(np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start)
            start += len(piece)
        if not ids:
            return Encoded(np.empty(0, np.int32), np.empty((0, 2), np.int64))
        return Encoded(np.concatenate(ids), np.concatenate(spans))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many short texts, in parallel."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are left out. An unfinished character decodes to U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text

    def decode_chunk(self, ids: list[int], start: int, end: int) -> str:
        """Text of ids[start:end] as a chunk of the text of `ids`.

        As in the chunk store, a character that is split by the left border belongs to both chunks. One that is split by the
        right border is left out: its end is not known while generating.
        """
        before = self.decode(ids[:start]).rstrip("\ufffd")
        return self.decode(ids[:end]).rstrip("\ufffd")[len(before) :]


def pieces(text: str) -> Iterator[str]:
    """Cuts a long text between words."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        match = _CUT.search(text, start + PIECE_CHARS - 1)
        if match is None:
            break
        yield text[start : match.start()]
        start = match.start()
    if start < len(text):
        yield text[start:]


def _without_template(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor but for templates of special tokens, which have no part in what is encoded here."""
    if step is None or step["type"] == "TemplateProcessing":
        return None
    if step["type"] != "Sequence":
        return step
    kept = [inner for inner in map(_without_template, step["processors"]) if inner is not None]
    return kept[0] if len(kept) == 1 else {**step, "processors": kept} if kept else None


def _special_id(backend: Any, names: tuple[str, ...], others: tuple[str, ...] = ()) -> int:
    """The first of these names that the tokenizer has, of those that it says are special if it can be."""
    special = {token.content: number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    for name in (*names, *others):
        if name in special:
            return int(special[name])
    for name in names:
        found = backend.token_to_id(name)
        if found is not None:
            return int(found)
    raise ConfigError(f"the tokenizer has none of the special tokens {', '.join(names)}")
