"""What `generate()` of Hugging Face transformers needs of networks that retrieve: ours, and pretrained ones with CCA.

Letters as in model.py.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerationMixin

from retro.cca import Cache, ChunkCache
from retro.errors import ConfigError

# --- cache --------------------------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """What the columns of one call hold; `keep_BT` and `slot_BT` as for `Retro.hidden`."""

    keep_BT: Tensor
    slot_BT: Tensor
    before: list[int]
    """Tokens that each row had before them."""


class RetroCache(DynamicCache):
    """What generation needs of the past, as transformers pass it around.

    A network of our own keeps everything in `state`. A pretrained base keeps its keys and values as in any DynamicCache, and of
    `state` only `chunk` is used. Rows are on grids of their own: slots follow from the tokens that a row has, not from columns.

    Attributes:
        state: Past of a network of our own.
        ids: All tokens of each row so far, without padding.
        lead: Empty slots before each row's first token; 0 to M - 1.
        columns: Of a network of our own, so far; columns that no row uses may be gone from `state`.
        chunk_len: M; 0 while the cache is new.
        recording: Whether `crop` may go back across a chunk border, where `remember` was called.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As DynamicCache."""
        super().__init__(*args, **kwargs)
        self.state = Cache()
        self.ids: list[list[int]] = []
        self.lead: list[int] = []
        self.columns = 0
        self.chunk_len = 0
        self.recording = False
        self._places: list[tuple[int, ChunkCache]] = []

    @classmethod
    def of(cls, past: Any) -> "RetroCache":
        """Takes a cache of transformers that is still empty, or one of ours.

        Raises:
            ConfigError: It holds something, or is of a kind that cannot grow.
        """
        if past is None:
            return cls()
        if isinstance(past, RetroCache):
            return past
        if type(past) is not DynamicCache or past.offloading or past.get_seq_length():
            raise ConfigError(
                f"past_key_values is a {type(past).__name__} of {past.get_seq_length()} tokens: "
                "this model needs a retro.hub.RetroCache (leave cache_implementation away)"
            )
        cache = cls()
        cache.__dict__.update(past.__dict__)
        return cache

    @property
    def chunk(self) -> ChunkCache | None:
        """What CCA needs of the past."""
        return self.state.chunk

    @chunk.setter
    def chunk(self, chunk: ChunkCache | None) -> None:
        self.state.chunk = chunk

    def extend(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, *, chunk_len: int, lead: Sequence[int] | None = None
    ) -> Columns:
        """Notes the tokens of new columns; comes before the network sees them.

        Args:
            ids_BT: The new columns.
            mask_BT: 1 where a column holds a token; its last T columns count, as transformers give those of the past as well.
                Default: everywhere.
            chunk_len: M.
            lead: Of each row; counts for a new cache only. Default: 0.

        Returns:
            Where they stand.

        Raises:
            ConfigError: The mask is not [B, at least T], or the number of rows has changed.
        """
        B, T = ids_BT.shape
        if mask_BT is not None and (mask_BT.ndim != 2 or mask_BT.shape[0] != B or mask_BT.shape[1] < T):
            raise ConfigError(
                f"attention_mask has the shape {list(mask_BT.shape)} for input_ids {[B, T]}: "
                "give one number, 0 or 1, for each column of the past and of input_ids"
            )
        self.chunk_len = chunk_len
        if not self.ids:
            self.ids = [[] for _ in range(B)]
            self.lead = [0] * B if lead is None else list(lead)
        if not len(self.ids) == len(self.lead) == B:
            raise ConfigError(f"{B} rows come after {len(self.ids)} in the cache, with {len(self.lead)} leads")
        before = [len(row) for row in self.ids]
        keep_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT[:, -T:].bool()
        for row, new, keep in zip(self.ids, ids_BT.tolist(), keep_BT.tolist(), strict=True):
            row += [token for token, kept in zip(new, keep, strict=True) if kept]
        first_B = torch.tensor([a + b for a, b in zip(self.lead, before, strict=True)], device=ids_BT.device)
        return Columns(keep_BT, first_B[:, None] + keep_BT.cumsum(1) - 1, before)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far."""
        return self.columns or super().get_seq_length(layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes rows in another order, as beams go on from others."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows only."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Has every row so many times, one after the other."""
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self.ids)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()  # type: ignore[no-untyped-call]
        self.state, self.ids, self.lead, self.columns = Cache(), [], [], 0
        self.forget()

    def activate_past_recording(self) -> None:
        """From now on columns may be taken back across a chunk border, if they came in one call."""
        super().activate_past_recording()  # type: ignore[no-untyped-call]
        self.recording = True

    def remember(self) -> None:
        """Keeps what CCA needs at this place, so that `crop` can come back to it."""
        if self.chunk is not None:
            kept = copy.copy(self.chunk)
            kept.kv = list(kept.kv)
            self._places.append((self.get_seq_length(), kept))

    def forget(self) -> None:
        """Drops what `remember` has kept."""
        self._places = []

    def crop(self, max_length: int) -> None:
        """Takes back the last columns, in each of which every row holds a token.

        Args:
            max_length: How many columns remain; below 0: how many are taken back; 0 does nothing, as in transformers.

        Raises:
            ConfigError: They reach back across a chunk border (and `remember` was not called there), or there are not so many.
        """
        length = self.get_seq_length()
        count = length - max_length if max_length > 0 else -max_length
        if count > 0:
            if any(len(row) < count for row in self.ids):
                raise ConfigError(f"{count} columns cannot be taken back: a row has {min(map(len, self.ids))} tokens")
            self._crop_state(length, count)
            super().crop(-count)
            self.ids = [row[:-count] for row in self.ids]
            self.columns -= count if self.columns else 0
        self.forget()

    def _crop_state(self, length: int, count: int) -> None:
        """Takes back what is not in `layers`: the last `count` of `length` columns."""
        chunk, own = self.chunk, bool(self.columns)
        if chunk is None:
            return
        if chunk.hidden_BMD is None:  # a network without CCA has no chunk that could be gone
            self.chunk = ChunkCache(chunk.slot_B - count)
            self.state.length -= count
            count = 0
        elif bool((chunk.slot_B % self.chunk_len < count).any()):
            for place, kept in self._places:
                if 0 <= place - (length - count) <= int((kept.slot_B % self.chunk_len).min()):
                    self.chunk = kept
                    self.state.length -= length - place if own else 0
                    count -= length - place
                    break
        if own:
            self.state.crop(count, self.chunk_len)
        elif self.chunk is not None:
            self.chunk.crop(count, self.chunk_len)

    def _select(self, indices: Tensor) -> None:
        if not self.ids:
            return
        self.state.select(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.ids = [list(self.ids[i]) for i in indices.tolist()]
        self.lead = [self.lead[i] for i in indices.tolist()]
        self.forget()


# --- generation ---------------------------------------------------------------------------------------------------


class RetroGenerationMixin(GenerationMixin):
    """`generate()` of transformers for networks that retrieve: prompts end on a chunk border, caches are ours.

    `forward` of such a network takes `lead` (empty slots before each row's first token [B]; default 0), `neighbors` and
    `neighbors_mask` (as Retro.hidden takes them). A prompt's lead is fixed here, for `forward` cannot know where the prompt ended.
    """

    chunk_len: int
    """M."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; every prompt ends on a chunk border, so that it retrieves at once.

        `neighbors` and `neighbors_mask` [B, L, K, R] may give the neighbors of the prompt's first L chunks, counted with the lead.
        """
        ids_BT = kwargs.get("input_ids") if inputs is None else inputs
        if kwargs.get("lead") is None:
            if ids_BT is None or ids_BT.shape[1] == 0:
                count_B = torch.ones(1, dtype=torch.long)  # transformers begin with BOS
            else:
                if kwargs.get("attention_mask") is None:
                    kwargs["attention_mask"] = self._mask(ids_BT, args, kwargs)
                count_B = (kwargs["attention_mask"] > 0).sum(dim=1)
            kwargs["lead"] = -count_B % self.chunk_len
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _mask(self, ids_BT: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Where transformers would see tokens: not at padding, if that is a token of its own."""
        config = args[0] if args else kwargs.get("generation_config")
        named = [kwargs, vars(config or self.generation_config), vars(self.generation_config)]
        pad, eos = (
            next((n[key] for n in named if n.get(key) is not None), None) for key in ("pad_token_id", "eos_token_id")
        )
        if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
            return torch.ones_like(ids_BT)
        return ids_BT.ne(pad).long()

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers; given neighbors are the prompt's."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc, arg-type]
        if kwargs.get("use_cache", True) and not kwargs.get("is_first_iteration", False):
            inputs |= {"neighbors": None, "neighbors_mask": None}
        return inputs

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        if model_kwargs.get("past_key_values") is not None:
            cache = RetroCache.of(model_kwargs["past_key_values"])
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
