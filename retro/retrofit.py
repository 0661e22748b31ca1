"""RETROfit: chunked cross-attention and a neighbor encoder put into a pretrained causal language model of Hugging Face.

The base stays as it is. Before each layer p of P its input gets what CCA adds to it; the encoder sees that input at layer min(P)
(the paper's H_u). So a layer of the base always follows, and nothing needs to be known of its inside. With retrieval off the base
is not touched: its logits are the same, bit for bit. CCA begins as zero.

Letters as in model.py. Source: arXiv:2112.04426, section 4.3; there CCA stands inside the layer, behind its self-attention.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache

from retro.attention import Attention
from retro.cca import Cache, ChunkCache, Continuation, Neighborhood, View, WholeChunks
from retro.checkpoint import load_model
from retro.config import BaseConfig, ModelConfig, config_from_dict, config_to_dict
from retro.errors import ConfigError
from retro.generate import Lookup
from retro.hub_cache import RetroCache
from retro.model import NeighborEncoder, Retro, initialize_parameter
from retro.pretrained import (
    LAYERS,
    add_lora,
    cache_places,
    check_attention,
    check_digests,
    check_length,
    check_vocabulary,
    digests,
    is_quantized,
    keep_differentiable,
    layer_list,
    open_base,
    sequence_places,
    sizes,
)
from retro.tokenizer import Tokenizer


def model_config(base: Any, **changes: Any) -> ModelConfig:
    """Sizes of a network around a base, see `retro.pretrained.sizes`, but for some."""
    return ModelConfig(**(sizes(base.config) | changes))


def retrofit(base: Any, config: ModelConfig | None = None, options: BaseConfig | None = None) -> "RetroFit":
    """Puts retrieval into a base, which is changed in place: frozen, and hooked before the layers of P.

    Args:
        base: A causal language model of transformers, such as AutoModelForCausalLM.from_pretrained gives, on any device.
        config: Sizes of what is added; `vocab_size`, `dim` and `num_layers` are the base's, `ffw_dim` and `tie_embeddings` mean
            nothing. Default: `model_config(base)`.
        options: What is trained of the base, and where its layers are. Default: nothing, and where `LAYERS` says.

    Returns:
        The network with random weights of its own. As long as it is not trained, it gives what the base gives.

    Raises:
        ConfigError: The base has no language modeling head, is no decoder or of an unknown architecture, the sizes are not its own,
            or its attention takes no masks.
        DependencyError: Adapters need peft.
    """
    own = sizes(base.config)
    config = config or ModelConfig(**own)
    wrong = [name for name in ("vocab_size", "dim", "num_layers") if getattr(config, name) != own[name]]
    if wrong:
        raise ConfigError(
            "the sizes do not fit the base: "
            + ", ".join(f"{name} = {getattr(config, name)} instead of {own[name]}" for name in wrong)
            + "; take retro.retrofit.model_config(base, cca_layers=...)"
        )
    if not config.cca_layers:
        raise ConfigError("cca_layers is empty: name layers of the base before which neighbors are read")
    return RetroFit(base, config, options or BaseConfig(name=base.config._name_or_path or "unnamed"))


def trainable(
    options: BaseConfig,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> "RetroFit":
    """Opens a base and puts retrieval into it, for training on texts of its own tokenizer.

    Args:
        options: The base, and what is trained of it.
        config: See `retrofit`.
        tokenizer: Of the training data.
        device: Where a quantized base is put; others are opened on the CPU, from where ranks take their parts.
        dtype: Of the base's frozen weights; what is trained is float32.
        seed: Of the added weights.

    Raises:
        ConfigError: As in `retrofit`, or there is no such base.
        MismatchError: The tokenizer is not the base's.
        DependencyError: Adapters or quantization need a package that is not installed.
    """
    if Path(options.name).is_dir():
        options = replace(options, name=str(Path(options.name).resolve()))
    base = open_base(options, dtype, "cpu" if options.quantization == "none" else device)
    check_vocabulary(base, options, tokenizer)
    return retrofit(base, config, options).initialize(torch.Generator().manual_seed(seed))


def reopened(info: dict[str, Any], config: ModelConfig, base: Any, device: torch.device | str) -> "RetroFit":
    """The network of a model folder around its base; the trained weights are still to come.

    Args:
        info: What `RetroFit.describe` gave.
        config: Sizes.
        base: The one that it was trained on; None opens it by its name.
        device: Where it is put.

    Raises:
        ConfigError: The base is not there.
        MismatchError: It is another one.
    """
    known = {field.name for field in fields(BaseConfig)}
    options = config_from_dict(BaseConfig, {k: v for k, v in info.items() if k in known}, where="base in config.json")
    if base is None:
        base = open_base(options, getattr(torch, info["dtype"]), device)
    check_digests(
        info["digests"],
        digests(base),
        trained_on=f"{options.name} ({info['model_type']})",
        given=f"{base.config._name_or_path or 'the base at hand'} ({base.config.model_type})",
        quantized=info["quantized"] or is_quantized(base),
    )
    model = retrofit(base, config, options)
    return model if is_quantized(base) else model.to(device)


def load_retrofit(
    folder: Path | str, base: Any = None, device: torch.device | str = "cpu"
) -> tuple["RetroFit", Tokenizer, dict[str, Any]]:
    """Opens a RETROfitted model.

    Args:
        folder: As `retro train --base` makes it.
        base: The model of transformers that it was trained on. Default: it is opened by its name.
        device: Where the network is put.

    Returns:
        The network in eval mode, its tokenizer, and the content of config.json.

    Raises:
        ConfigError: The base is not there, or the model has none.
        FormatError: The folder is missing, unfinished, damaged or altered.
        MismatchError: It was trained on another base.
    """
    opened: Any = load_model(Path(folder), device, base=base)
    if not isinstance(opened[0], RetroFit):
        raise ConfigError(f"{folder} is no RETROfitted model: open it with retro.checkpoint.load_model")
    return opened  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """CCA before a layer of the base."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(
            config.dim,
            config.encoder_dim,
            config.num_heads,
            config.head_dim,
            positions=config.positions if config.cca_positions else None,
            base=config.rope_base,
        )

    def forward(self, x_BTD: Tensor, view: View) -> Tensor | None:
        """What is added to the layer's input; None where no slot has neighbors."""
        return view.cross_attend(self.attention, self.norm(x_BTD))


class NeighborEmbedding(nn.Module):
    """The base's own embeddings of a neighbor's tokens, scaled alike and mapped to the encoder's width.

    So a model folder holds no table: only the map is trained.
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.map = nn.Linear(width, config.encoder_dim, bias=False)

    def forward(self, embedded_NKRD: Tensor) -> Tensor:
        dtype = self.norm.weight.dtype
        x_NKRE: Tensor = self.map(self.norm(embedded_NKRD.to(dtype)))
        return x_NKRE.to(dtype)  # autocast narrows products, but not the sums that residuals are


class RetroFit(nn.Module):
    """A pretrained base with retrieval; to be made by `retrofit`. It is called as `retro.model.Retro` is.

    Its state (`state_dict`) is what is trained: CCA, encoder, and the base's adapters or unfrozen layers. The base never drops out.

    Attributes:
        base: The model of transformers; also alone it works as before, without retrieval.
        config: Sizes.
        options: What the base is, and what is trained of it.
        trained: Names of the parameters that are.
        digests: Of the base's tensors, as it was given.
        context_passages: See `retro.model.Retro`.
    """

    context_passages = 0

    def __init__(self, base: Any, config: ModelConfig, options: BaseConfig) -> None:
        """See `retrofit`."""
        super().__init__()
        self.config, self.options = config, options
        self.chunk_len = config.chunk_len
        self.every_chunk = False
        self.checkpointing = False
        check_attention(base)
        self.digests, self.quantized = digests(base), is_quantized(base)
        keep_differentiable(base)
        self.base = base.requires_grad_(requires_grad=False)
        if options.lora_rank:
            add_lora(base, options.lora_rank, options.lora_alpha)
        decoder, layers = layer_list(base, options.layers)
        self._inner: tuple[nn.Module, nn.ModuleList] = (
            decoder,
            layers,
        )  # in a tuple: they are modules of the base already
        if options.unfreeze > len(layers):
            raise ConfigError(
                f"base.unfreeze = {options.unfreeze}: the base has {len(layers)} layers; -1 trains all of it"
            )
        for module in [base] if options.unfreeze < 0 else list(layers)[len(layers) - options.unfreeze :]:
            module.requires_grad_(requires_grad=True)
        self.cca = nn.ModuleList(CrossAttention(config) for _ in config.cca_layers)
        self.encoder = NeighborEncoder(config)
        self.encoder_embedding = NeighborEmbedding(config, self.embedding.weight.shape[1])
        for module in (self.cca, self.encoder, self.encoder_embedding):
            module.to(self.embedding.weight.device)
        self.initialize(torch.Generator().manual_seed(0))
        self.trained = frozenset(name for name, parameter in self.named_parameters() if parameter.requires_grad)
        self._view: View | None = None
        self._lookup: Lookup | None = None
        self._lead_B = torch.zeros(0)
        for number, index in enumerate(config.cca_layers):
            layers[index - 1].register_forward_pre_hook(partial(self._read_before, number), with_kwargs=True)
        base.register_forward_pre_hook(self._begin_generating, with_kwargs=True)
        base.register_forward_hook(self._end_generating, always_call=True)
        self.register_state_dict_post_hook(_keep_trained)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_miss_trained_only)  # type: ignore[no-untyped-call]
        self.eval()
        if base.config.model_type not in LAYERS:
            self._check_head()

    def initialize(self, generator: torch.Generator) -> "RetroFit":
        """Draws the added weights as `Retro.initialize` does, but CCA's output, which is zero; adapters begin as zero, too."""
        layers = self.config.num_layers
        for prefix, module in (("cca", self.cca), ("encoder", self.encoder), ("embedding", self.encoder_embedding)):
            for name, parameter in module.named_parameters():
                depth = self.config.encoder_layers if prefix == "encoder" else layers
                _draw(f"{prefix}.{name}", parameter, depth, generator)
        for name, parameter in self.cca.named_parameters():
            if name.endswith(".out.weight"):
                nn.init.zeros_(parameter)
        for name, parameter in self.base.named_parameters():
            if "lora_A" in name:
                _draw("map.weight", parameter, layers, generator)
            elif "lora_B" in name:
                nn.init.zeros_(parameter)
        return self

    @property
    def layers(self) -> list[nn.Module]:
        """Those of the base, and what stands before them."""
        return [*self._inner[1], *self.cca]

    @property
    def embedding(self) -> Any:
        """The base's table of input embeddings."""
        return self.base.get_input_embeddings()

    @property
    def head(self) -> Any:
        """The base's output projection."""
        return self.base.get_output_embeddings()

    def train(self, mode: bool = True) -> "RetroFit":
        """The base stays in eval mode: nothing random happens while training."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(
        self,
        inputs_BT: Tensor,
        *,
        targets_BT: Tensor | None = None,
        loss_BT: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Logits of the next token at every slot [B, T, V]; with targets, the sum of their losses in nats.

        Args:
            inputs_BT: This and the others as for `hidden`.
            targets_BT: What each slot is to predict.
            loss_BT: True where the target counts.
            arguments: As for `hidden`.
        """
        hidden_BTD = self.hidden(inputs_BT, **arguments)
        if targets_BT is None or loss_BT is None:
            return self.logits(hidden_BTD)
        return self.loss(hidden_BTD, targets_BT, loss_BT)[0]

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [..., V] of final activations [..., D], as the base makes them."""
        logits_BTV: Tensor = self.head(hidden_BTD)
        cap = getattr(self.base.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        return logits_BTV if cap is None else torch.tanh(logits_BTV / cap) * cap

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor, loss_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses in nats (float32 or wider) over the slots where `loss_BT` is True, and their number."""
        return Retro.loss(self, hidden_BTD, targets_BT, loss_BT)  # type: ignore[arg-type]  # needs `logits` alone

    def hidden(
        self,
        inputs_BT: Tensor,
        *,
        keep_BT: Tensor | None = None,
        document_BL: Tensor | None = None,
        neighbors_BLKR: Tensor | None = None,
        keep_BLKR: Tensor | None = None,
        cache: Cache | None = None,
        slot_BT: Tensor | None = None,
    ) -> Tensor:
        """Final activations [B, T, D] of the base; any value in empty slots. The arguments are those of `Retro.hidden`.

        The base's positions count the tokens of a document in this sequence, from 0.
        """
        B, T = inputs_BT.shape
        view: View | None = None
        asked: dict[str, Any] = {"use_cache": False}
        if cache is not None or slot_BT is not None:
            cache = cache if cache is not None else Cache()
            keep_BT = torch.ones_like(inputs_BT, dtype=torch.bool) if keep_BT is None else keep_BT
            view = Continuation.into(self, cache, keep_BT, slot_BT, neighbors_BLKR, keep_BLKR)
            asked = {"use_cache": True, "past_key_values": _Columns(cache), **cache_places(self.base, cache, keep_BT)}
        else:
            held_BT = torch.ones_like(inputs_BT, dtype=torch.bool) if keep_BT is None else keep_BT
            if neighbors_BLKR is not None and keep_BLKR is not None:
                view = WholeChunks(self, held_BT, document_BL, neighbors_BLKR, keep_BLKR)
            if keep_BT is not None or document_BL is not None:
                asked |= sequence_places(self.base, held_BT, document_BL, self.chunk_len)
        check_length(self.base, T if cache is None else cache.length + T, asked.get("position_ids"))
        if keep_BT is not None:
            inputs_BT = inputs_BT.masked_fill(~keep_BT, 0)
        self._view = view
        try:
            result = self._inner[0](input_ids=inputs_BT, **asked)
        finally:
            self._view = None
        if cache is not None:
            cache.length += T
        hidden_BTD: Tensor = result.last_hidden_state
        return hidden_BTD

    def encode(self, near: Neighborhood, hidden_NMD: Tensor, keep_NM: Tensor) -> Tensor:
        """Encoded neighbors [N, K, R, E] of the chunks whose activations are given."""
        x_NKRE = self.encoder_embedding(self.embedding(near.tokens_NKR))
        encoded: Tensor = self.encoder(x_NKRE, near.keep_NKR, hidden_NMD, keep_NM)
        return encoded

    def checkpoint_activations(self) -> None:
        """From now on keeps little for the backward pass, at the price of a second forward pass of base and encoder."""
        self.checkpointing = self.encoder.checkpointing = True
        for layer in self._inner[1]:
            layer.forward = partial(_checkpointed, layer.forward)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        lookup: Lookup | None = None,
        **options: Any,
    ) -> Any:
        """The base's own `generate` (sampling, beams, streamers ...), with the neighbors of every finished chunk.

        Prompts end on a chunk border, so that their own last chunk has neighbors at once: empty slots are thought before them.

        Args:
            input_ids: Prompts [B, T], padded on the left.
            attention_mask: 1 where a column holds a token. Default: everywhere.
            lookup: Finds neighbors. None: without retrieval, which is the base as it is.
            options: As the base takes them.

        Returns:
            What the base gives.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if lookup is None:
            return self.base.generate(input_ids, attention_mask=mask, **options)
        cache = RetroCache(config=self.base.config)
        self._lookup, self._lead_B = lookup, -mask.sum(1) % self.chunk_len
        try:
            return self.base.generate(input_ids, attention_mask=mask, past_key_values=cache, **options)
        finally:
            self._lookup = None

    def describe(self) -> dict[str, Any]:
        """Plain data by which `load_retrofit` finds the base again, and knows it."""
        return {
            **config_to_dict(self.options),
            "model_type": self.base.config.model_type,
            "commit": getattr(self.base.config, "_commit_hash", None) or "",
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "quantized": self.quantized,
            "digests": self.digests,
        }

    # Hooks

    def _read_before(self, number: int, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adds the result of CCA `number` to the input of a layer."""
        view = self._view
        if view is None:
            return None
        hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
        cross: Any = self.cca[number]
        x_BTD = hidden_BTD.to(cross.norm.weight.dtype)  # the base may be narrower than what is trained
        if number == 0:
            view.read(x_BTD)
        y_BTD = cross(x_BTD, view)
        if y_BTD is None:
            return None
        hidden_BTD = hidden_BTD + y_BTD.to(hidden_BTD.dtype)
        return ((hidden_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BTD})

    def _begin_generating(self, _base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call that the base's `generate` makes: looks up the neighbors of the chunks that end in its columns."""
        cache = kwargs.get("past_key_values")
        if self._lookup is None or not isinstance(cache, RetroCache):
            return
        ids_BT: Tensor = args[0] if args else kwargs["input_ids"]
        mask_BT = kwargs.get("attention_mask")
        M = self.chunk_len
        lead_B = self._lead_B.repeat_interleave(len(ids_BT) // len(self._lead_B))  # a prompt may have several rows
        columns = cache.extend(ids_BT, mask_BT, chunk_len=M, lead=lead_B.tolist())
        near = self._lookup.neighbors(cache.ids, cache.lead, columns.before, M)
        neighbors, keep = (None, None) if near is None else (x.to(ids_BT.device) for x in near)
        if cache.chunk is None:
            cache.chunk = ChunkCache.empty(len(ids_BT), ids_BT.device)
        self._view = Continuation.of(self, cache.chunk, columns.keep_BT, columns.slot_BT, neighbors, keep)

    def _end_generating(self, *_: Any) -> None:
        if self._lookup is not None:
            self._view = None

    @torch.no_grad()
    def _check_head(self) -> None:
        """Whether `logits` is all that an unknown base does with final activations."""
        ids_BT = torch.arange(2, device=self.embedding.weight.device)[None] % self.config.vocab_size
        if not torch.equal(self.logits(self.hidden(ids_BT)), self.base(input_ids=ids_BT, use_cache=False).logits):
            raise ConfigError(
                f"the base {type(self.base).__name__} does more with its final activations than to project them: "
                "it is not supported"
            )


class _Columns(DynamicCache):
    """Shows a base our cache as one of transformers."""

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.cache = cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self.cache.append(layer_idx, key_states, value_states)

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        return self.cache.length


def _draw(name: str, parameter: Tensor, layers: int, generator: torch.Generator) -> None:
    """Initializes a parameter on any device with the same values."""
    drawn = torch.empty(parameter.shape)
    initialize_parameter(name, drawn, layers, generator)
    with torch.no_grad():
        parameter.copy_(drawn)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


def _keep_trained(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    assert isinstance(module, RetroFit)
    for name in [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in module.trained]:
        del state[name]


def _miss_trained_only(module: nn.Module, keys: Any) -> None:
    assert isinstance(module, RetroFit)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in module.trained]
