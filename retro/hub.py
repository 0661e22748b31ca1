"""RETRO models as models of Hugging Face transformers: loading, saving, generation, pipelines.

Letters as in model.py.
"""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.hub import cached_file

from retro.artifact import HASHED_ON_OPEN, MANIFEST, find_damage, read_json
from retro.auto import RetroConfig
from retro.checkpoint import WEIGHTS, load_tensors, save_model, save_tensors, write_card
from retro.errors import ConfigError, FormatError, MismatchError
from retro.generate import Lookup, Retriever
from retro.hub_cache import Columns, RetroCache, RetroGenerationMixin
from retro.model import Retro
from retro.quantized import is_weights, restored
from retro.tokenizer import TOKENIZER_FILE, Tokenizer

__all__ = ["RetroCache", "RetroConfig", "RetroForCausalLM", "RetroGenerationMixin"]

logger = logging.getLogger(__name__)

# --- the network --------------------------------------------------------------------------------------------------


class RetroForCausalLM(PreTrainedModel, RetroGenerationMixin):
    """A network of our own as a model of transformers.

    With a retriever, every chunk that a call finishes gets the neighbors found for its text. Without one, or with
    `config.num_neighbors` 0, retrieval is off unless neighbors are given.

    Attributes:
        model: The network.
        tokenizer: Its tokenizer, which gives a chunk's text; None where the model was made from a configuration alone.
        retriever: See `set_retriever`.
    """

    config: RetroConfig
    config_class = RetroConfig
    base_model_prefix = "model"
    """Names of weights in our files go without it; transformers add it when they open one, and `load_state_dict` does."""
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _no_split_modules = ["DecoderLayer", "NeighborEncoder"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: RetroConfig) -> None:
        """Draws the weights, as `Retro.initialize` does, by the global generator of torch."""
        super().__init__(config)
        self.model = Retro(config.network)
        self.chunk_len = self.model.chunk_len
        self.tokenizer: Tokenizer | None = None
        self.retriever: Retriever | None = None
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]
        self.post_init()  # type: ignore[no-untyped-call]

    def set_retriever(self, retriever: Retriever | None, k: int | None = None) -> None:
        """From now on asks this retriever at every chunk border.

        Args:
            retriever: None turns retrieval off.
            k: Neighbors of a chunk; becomes `config.num_neighbors`. 0 turns retrieval off.

        Raises:
            ConfigError: The network has no chunked cross-attention, or its tokenizer is not known.
        """
        k = self.config.num_neighbors if k is None else k
        if k < 0:
            raise ConfigError(f"k = {k}: must not be negative")
        if retriever is not None and k and not self.model.config.cca_layers:
            raise ConfigError("this model was made without retrieval: use k = 0")
        if retriever is not None and self.tokenizer is None:
            raise ConfigError(
                "the model does not know its tokenizer, which gives the text to search for: "
                "set model.tokenizer = retro.tokenizer.Tokenizer.load(...) first"
            )
        self.retriever, self.config.num_neighbors = retriever, k

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        neighbors: Tensor | None = None,
        neighbors_mask: Tensor | None = None,
        lead: Tensor | Sequence[int] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Logits of the next token, and their mean loss.

        Args:
            input_ids: New tokens [B, T].
            attention_mask: 1 where a column of the past and of `input_ids` holds a token.
            past_key_values: A RetroCache, or an empty DynamicCache in whose place the output has one.
            labels: [B, T], -100 where nothing is to be predicted; shifted here.
            use_cache: Return a cache. Default: config.use_cache, but not in training nor for a loss.
            logits_to_keep: How many logits from the end, or which ones; 0: all.
            return_dict: False gives a tuple.
            neighbors: Token ids [B, L, K, R] of the first L chunks, counted from each row's unfinished one on; these are not looked
                up.
            neighbors_mask: True (1) where a neighbor has a token. Default: everywhere.
            lead: Empty slots before the first token of each row, in a new cache or without one. Default: 0; `generate()` has every
                prompt end on a chunk border.
            num_items_in_batch: The loss is the sum divided by this; default: by the number of labels.

        Raises:
            ConfigError: Shapes that do not fit, or a cache of another kind.
        """
        wanted = self.config.use_cache and not self.training and labels is None
        use_cache = (wanted or past_key_values is not None) if use_cache is None else use_cache
        cache = RetroCache.of(past_key_values) if use_cache else None
        undo = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep else input_ids.shape[1]
        hidden_BTD = self._hidden(input_ids, attention_mask, cache, lead, (neighbors, neighbors_mask), undo)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.model.logits(hidden_BTD[:, kept])
        loss = None
        if labels is not None:
            if attention_mask is not None:  # an empty column predicts nothing
                T = input_ids.shape[1]
                labels = labels.masked_fill(F.pad(attention_mask[:, -T:-1], (1, 0), value=1) == 0, -100)
            extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits_BTV, labels, self.config.vocab_size, **extra)
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()

    def _hidden(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None,
        cache: RetroCache | None,
        lead: Tensor | Sequence[int] | None,
        given: tuple[Tensor | None, Tensor | None],
        undo: int,
    ) -> Tensor:
        """Final activations [B, T, D]; the last `undo` columns may be taken back where the cache records."""
        known = RetroCache() if cache is None else cache
        leads = lead.tolist() if isinstance(lead, Tensor) else lead
        columns = known.extend(ids_BT, mask_BT, chunk_len=self.chunk_len, lead=leads)
        neighbors_BLKR, keep_BLKR = self._neighbors(known, columns, *given)
        if cache is None:
            return self._whole(ids_BT, columns, neighbors_BLKR, keep_BLKR)
        # A call is divided before the ends of chunks that may be taken back, to keep the state there.
        B, T = ids_BT.shape
        ends_BT = columns.keep_BT & (columns.slot_BT % self.chunk_len == self.chunk_len - 1)
        ends = ends_BT.any(dim=0).tolist() if cache.recording else [False] * T
        cuts = [0, *(t for t in range(max(T - undo, 1), T) if ends[t] and B == 1), T]
        parts = []
        for start, end in itertools.pairwise(cuts):
            if ends[start]:
                cache.remember()
            passed = (
                int(columns.slot_BT[0, start] // self.chunk_len - columns.slot_BT[0, 0] // self.chunk_len)
                if start
                else 0
            )
            part_BTD = self.model.hidden(
                ids_BT[:, start:end],
                keep_BT=columns.keep_BT[:, start:end],
                slot_BT=columns.slot_BT[:, start:end],
                neighbors_BLKR=None if neighbors_BLKR is None else neighbors_BLKR[:, passed:],
                keep_BLKR=None if keep_BLKR is None else keep_BLKR[:, passed:],
                cache=cache.state,
            )
            parts.append(part_BTD)
            cache.columns += end - start
        return torch.cat(parts, dim=1)

    def _whole(
        self, ids_BT: Tensor, columns: Columns, neighbors_BLKR: Tensor | None, keep_BLKR: Tensor | None
    ) -> Tensor:
        """The same of sequences that are there from the beginning: as a grid of whole chunks, which is how a network trains."""
        M, keep_BT = self.chunk_len, columns.keep_BT
        B, T = ids_BT.shape
        L = -(-int(columns.slot_BT.max() + 1) // M)
        # Onto the grid; columns without a token go to a slot behind it that nobody reads.
        slot_BT = columns.slot_BT.masked_fill(~keep_BT, L * M)
        grid_BT = ids_BT.new_zeros(B, L * M + 1).scatter(1, slot_BT, ids_BT)[:, :-1]
        grid_keep_BT = torch.zeros_like(grid_BT, dtype=torch.bool)
        grid_keep_BT = F.pad(grid_keep_BT, (0, 1)).scatter(1, slot_BT, keep_BT)[:, :-1]
        if neighbors_BLKR is not None and keep_BLKR is not None:
            neighbors_BLKR, keep_BLKR = (
                F.pad(x[:, :L], (0, 0, 0, 0, 0, max(L - x.shape[1], 0))) for x in (neighbors_BLKR, keep_BLKR)
            )
        hidden_BTD = self.model.hidden(
            grid_BT, keep_BT=grid_keep_BT, neighbors_BLKR=neighbors_BLKR, keep_BLKR=keep_BLKR
        )
        D = hidden_BTD.shape[2]
        return F.pad(hidden_BTD, (0, 0, 0, 1)).gather(1, slot_BT[..., None].expand(B, T, D))

    def _neighbors(
        self, cache: RetroCache, columns: Columns, given: Tensor | None, given_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Neighbors of the chunks that these columns finish: the given ones, and for the chunks after them those that are found."""
        device, skip = columns.slot_BT.device, 0
        if given is not None:
            mask = torch.ones_like(given, dtype=torch.bool) if given_mask is None else given_mask.bool()
            if given.ndim != 4 or len(given) != len(columns.slot_BT) or mask.shape != given.shape:
                raise ConfigError(
                    f"neighbors have the shape {list(given.shape)} and their mask {list(mask.shape)}: both must be "
                    f"[{len(columns.slot_BT)} rows, chunks, neighbors, tokens]"
                )
            if not self.model.config.cca_layers:
                raise ConfigError("this model was made without retrieval: it cannot read neighbors")
            given, given_mask, skip = given.to(device), mask.to(device), given.shape[1]
        found = None
        if self.retriever is not None and self.config.num_neighbors and self.tokenizer is not None:
            lookup = Lookup(
                tokenizer=self.tokenizer,
                retriever=self.retriever,
                num_neighbors=self.config.num_neighbors,
                neighbor_len=self.config.neighbor_len,
            )
            found = lookup.neighbors(cache.ids, cache.lead, columns.before, self.chunk_len, skip=skip)
        if found is None:
            return given, given_mask
        neighbors_BLKR, keep_BLKR = (x.to(device) for x in found)
        if given is None or given_mask is None:
            return neighbors_BLKR, keep_BLKR
        sizes = [max(a, b) for a, b in zip(given.shape[2:], neighbors_BLKR.shape[2:], strict=True)]
        return _beside(given, neighbors_BLKR, sizes, skip), _beside(given_mask, keep_BLKR, sizes, skip)

    # --- files

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, retriever: Retriever | None = None, **kwargs: Any
    ) -> Any:
        """Opens a model: a folder of ours or of `save_pretrained`, or a name on the hub.

        Args:
            pretrained_model_name_or_path: Folder or name.
            args: As in transformers, like the other keywords (dtype, device_map, revision, token, local_files_only, ...).
            retriever: See `set_retriever`.
            kwargs: See args.

        Raises:
            FormatError: The weights were truncated or altered.
            MismatchError: Weights, configuration and tokenizer do not belong together.
        """
        name, folder = str(pretrained_model_name_or_path), Path(str(pretrained_model_name_or_path))
        if (folder / MANIFEST).is_file() and not kwargs.get("subfolder"):
            listed = read_json(folder / MANIFEST)["files"]
            files = {file: record for file, record in listed.items() if is_weights(file)}
            for damage in find_damage(folder, {"files": files}, hash_bytes=HASHED_ON_OPEN):
                raise FormatError(f"{folder} is damaged: {damage}. Copy or make it again")
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        where = {key: kwargs[key] for key in _DOWNLOAD if key in kwargs}
        opened: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        model, info = opened
        if hasattr(model.config, "stored_weights"):  # of the files; the network is of a floating type
            del model.config.stored_weights
        problems = [f"{key} is missing" for key in sorted(info["missing_keys"])]
        problems += [f"{key} is unknown" for key in sorted(info["unexpected_keys"])]
        if problems:
            raise MismatchError(
                f"the weights of {name} do not fit the network in its config.json: {'; '.join(problems[:3])} "
                f"({len(problems)} in all). Take both files from the same model"
            )
        file = cached_file(name, TOKENIZER_FILE, _raise_exceptions_for_missing_entries=False, **where)
        model.tokenizer = None if file is None else _tokenizer(file, model.config.tokenizer_fingerprint)
        if retriever is not None:
            model.set_retriever(retriever)
        return (model, info) if wants_info else model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: dict[str, Tensor] | None, checkpoint_files: list[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        # Weights in 8 bits are none of the formats that transformers know: they are widened here, wherever the files come from.
        if checkpoint_files and getattr(model.config, "stored_weights", "") == "int8":
            parts = [load_tensors(Path(file)) for file in checkpoint_files]
            state_dict = restored({key: tensor for part in parts for key, tensor in part.items()}, checkpoint_files[0])
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes a folder that `from_pretrained` and `retro.checkpoint.load_model` open; other files in it stay as they are.

        Args:
            save_directory: The folder.
            is_main_process: False writes nothing.
            state_dict: The weights, where the network does not hold them itself.
            push_to_hub: Uploads them, too, as `push_to_hub` does.
            kwargs: Of `push_to_hub`; the others of transformers have no meaning here: the weights are one file.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        if not is_main_process:
            return
        folder = Path(save_directory)
        weights = self.state_dict() if state_dict is None else state_dict
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        if self.tokenizer is None:
            logger.warning(
                "%s gets no tokenizer, for the model does not know it (model.tokenizer): "
                "it will open with from_pretrained only, and without retrieval",
                folder,
            )
            folder.mkdir(parents=True, exist_ok=True)
            self.config.architectures = [type(self).__name__]
            self.config.save_pretrained(folder)
            self.generation_config.save_pretrained(folder)
            save_tensors(folder / WEIGHTS, weights)
        else:
            save_model(
                folder,
                self.model,
                self.tokenizer,
                weights=weights,
                training=self.config.training,
                num_neighbors=self.config.num_neighbors,
                neighbor_len=self.config.neighbor_len,
                generation=self.generation_config.to_diff_dict(),
                alone=False,
            )
        if push_to_hub:
            names = ("commit_message", "private", "token", "create_pr", "revision", "tags")
            self.push_to_hub(
                kwargs.get("repo_id", folder.name), **{name: kwargs[name] for name in names if name in kwargs}
            )

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # transformers puts a model card of their own into a folder before it is uploaded: ours has the figures of the training.
        if self.tokenizer is not None:
            write_card(Path(working_dir), self.model, self.config.training)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    # --- what transformers ask of a network

    def get_output_embeddings(self) -> nn.Module | None:
        """None where the table of the input is used."""
        head: nn.Module | None = self.model.head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces them."""
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers.

        Raises:
            ConfigError: The neighbor encoder has a table of its own.
        """
        if self.model.encoder_embedding is not None:
            raise ConfigError(
                "the number of tokens of a model with tie_embeddings = false cannot change: its encoder has a table of its own"
            )
        table: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.network
        return table

    def _initialize_weights(self, module: nn.Module, *_: Any, **__: Any) -> None:
        # Called for every module; what was loaded is marked, and stays.
        if isinstance(module, Retro):
            loaded = [p for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
            if len(loaded) == len(list(module.parameters())):
                return
            values = [p.detach().clone() for p in loaded]
            seed = int(torch.randint(2**62, ()))
            module.initialize(torch.Generator(module.embedding.weight.device).manual_seed(seed))
            with torch.no_grad():
                for parameter, value in zip(loaded, values, strict=True):
                    parameter.copy_(value)

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        self.gradient_checkpointing = enable
        self.model.checkpoint_activations(enable)


_DOWNLOAD = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


def _beside(given: Tensor, found: Tensor, sizes: list[int], skip: int) -> Tensor:
    """[B, L, K, R]: the first `skip` chunks of one, then the chunks of the other."""
    K, R = sizes
    wide = [F.pad(x, (0, R - x.shape[3], 0, K - x.shape[2])) for x in (given, found[:, skip:])]
    return torch.cat([x.to(given.dtype) for x in wide], dim=1)


def _add_prefix(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Names as in our files become those of the module: trainers give a file's content to `load_state_dict`."""
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(f"{prefix}model.")]:
        state[f"{prefix}model.{name.removeprefix(prefix)}"] = state.pop(name)


def _tokenizer(file: str, fingerprint: str) -> Tokenizer:
    tokenizer = Tokenizer.load(file)
    if fingerprint not in ("", tokenizer.fingerprint):
        raise MismatchError(
            f"{file} has the fingerprint {tokenizer.fingerprint}, but the model was trained with {fingerprint}: "
            "take the tokenizer.json of the same model (a changed one: set model.tokenizer before save_pretrained)"
        )
    return tokenizer


AutoModelForCausalLM.register(RetroConfig, RetroForCausalLM, exist_ok=True)
