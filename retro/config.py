"""Settings of the network, of training and of generation, and the presets. No torch here.

Letters as in model.py; the paper is arXiv:2112.04426.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from retro.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]
NeighborPart = Literal["both", "chunk", "continuation"]
Positions = Literal["rotary", "relative"]
Quantization = Literal["none", "8bit", "4bit"]
Task = Literal["lm", "qa", "chat"]
EncoderKind = Literal["own", "bert"]
ConfigT = TypeVar("ConfigT")
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
"""An installed package holds it: it needs no hub."""
BERT_POSITIONS = 512
"""Tokens that model.encoder = "bert" reads at once, chunk and neighbor together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The network's sizes."""

    vocab_size: int
    """V: entries of the embedding table."""
    dim: int
    """D: width of the decoder (d)."""
    num_layers: int
    """Decoder layers."""
    num_heads: int
    """H: heads of the decoder's attentions, CCA included."""
    head_dim: int
    """C: width of one decoder head; even, because positions are rotary."""
    ffw_dim: int
    """Inner width of the decoder's feed-forward."""
    cca_layers: tuple[int, ...]
    """P: the decoder layers with chunked cross-attention, counted from 1 as in the paper. Empty: a decoder without retrieval."""
    encoder_dim: int
    """E: width of the neighbor encoder (d')."""
    encoder_layers: int
    """Layers of the neighbor encoder; its first one sees the decoder."""
    encoder_heads: int
    """Heads of the encoder's attentions."""
    encoder_head_dim: int
    """Width of one encoder head; even."""
    encoder_ffw_dim: int
    """Inner width of the encoder's feed-forward."""
    encoder: EncoderKind = "own"
    """own: the paper's neighbor encoder. bert: the network of a pretrained encoder, with the decoder's chunk in front of each
    neighbor (retro/bert.py); needs tie_embeddings."""
    chunk_len: int = 64
    """M: slots of a chunk (m)."""
    tie_embeddings: bool = True
    """One table for the decoder's input, the encoder's input and the output. Needs dim = encoder_dim."""
    positions: Positions = "rotary"
    """How attention knows distances. relative: the paper's, with a learned projection of each distance's sinusoids."""
    cca_positions: bool = True
    """Whether CCA knows the distance between a token and a neighbor's (a row of the paper's ablation)."""
    encoder_conditioned: bool = True
    """Whether the neighbor encoder sees the decoder's chunk (another row)."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies, or of the sinusoids."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "vocab_size",
            "dim",
            "num_layers",
            "num_heads",
            "head_dim",
            "ffw_dim",
            "encoder_dim",
            "encoder_layers",
            "encoder_heads",
            "encoder_head_dim",
            "encoder_ffw_dim",
            "rope_base",
            "norm_eps",
        )
        if self.chunk_len < 2:
            raise ConfigError(f"chunk_len = {self.chunk_len}: a chunk has at least 2 slots")
        for name in ("head_dim", "encoder_head_dim"):
            if getattr(self, name) % 2:
                raise ConfigError(f"{name} = {getattr(self, name)}: rotary positions need an even width")
        layers = list(self.cca_layers)
        if layers != sorted(set(layers)) or any(not 1 <= layer <= self.num_layers for layer in layers):
            raise ConfigError(
                f"cca_layers = {layers}: give ascending layer numbers between 1 and num_layers = {self.num_layers}"
            )
        if self.tie_embeddings and layers and self.dim != self.encoder_dim:
            raise ConfigError(
                f"tie_embeddings needs dim = encoder_dim, got {self.dim} and {self.encoder_dim}: "
                "make them equal or set tie_embeddings = false"
            )
        if self.encoder == "bert" and not self.tie_embeddings:
            raise ConfigError(
                "encoder = 'bert' has its table of tokens for the decoder, too: set tie_embeddings = true"
            )
        if self.encoder == "bert" and self.encoder_heads * self.encoder_head_dim != self.encoder_dim:
            raise ConfigError(
                f"encoder = 'bert': {self.encoder_heads} heads of {self.encoder_head_dim} do not make encoder_dim = "
                f"{self.encoder_dim}"
            )


RETRIEVAL_SIZES = frozenset(
    {
        "cca_layers",
        "encoder_dim",
        "encoder_layers",
        "encoder_heads",
        "encoder_head_dim",
        "encoder_ffw_dim",
        "encoder",
        "cca_positions",
        "encoder_conditioned",
    }
)
"""Keys of ModelConfig that a decoder without retrieval does not depend on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a model is trained."""

    task: Task = "lm"
    """lm: to go on with text. qa: to answer questions from passages. chat: likewise, with the messages of a conversation before."""
    init: str = ""
    """Folder of a model whose weights are those to begin with; its decoder has the same sizes. A decoder without retrieval can
    begin with that of a model with it, and the other way round: then chunked cross-attention and neighbor encoder are new, and
    CCA's output begins as zero, so that the first loss is the decoder's. Empty: random weights."""
    freeze_decoder: bool = False
    """Only chunked cross-attention and neighbor encoder are trained (RETROfit, section 4.3): with retrieval off the model stays
    what `init` is, bit for bit, so that neighbor_dropout may be 0; table_rate says nothing then."""
    encoder: str = ""
    """A pretrained encoder (folder or name on the hub) whose weights and table of tokens are those to begin with, where
    model.encoder = "bert" and `init` has no encoder (the table is then that of `init`). Training data have its tokenizer. Empty:
    random weights."""
    data: str | tuple[str, ...] = ""
    """Folder made by `retro data` (qa, chat: by `retro cloze` or `retro questions`), or several, which are mixed by sequences."""
    data_weights: tuple[float, ...] = ()
    """Shares of the folders in the sequences, of any sum. Empty: by their sizes, so that every folder is read equally often."""
    out: str = ""
    """Folder of the model, `NAME.model` by habit."""
    seq_len: int = 512
    """T: slots of a sequence (n); whole chunks."""
    num_neighbors: int = 2
    """K: neighbors of a chunk (k); at most as many as the training data holds."""
    neighbor_len: int = 128
    """R: tokens of a neighbor, chunk and continuation together (r); longer ones are cut."""
    neighbor_part: NeighborPart = "both"
    """both: chunk N and continuation F; chunk or continuation: that part alone (rows of the paper's ablation)."""
    batch_size: int = 16
    """Sequences of one optimizer step."""
    micro_batch_size: int = 16
    """Sequences of one forward pass; gradients are summed over batch_size / micro_batch_size of them."""
    steps: int = 1000
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Highest rate, reached after the warm-up."""
    final_learning_rate: float = 1e-4
    """Rate at the last step of the cosine."""
    encoder_rate: float = 1.0
    """The neighbor encoder's rate as a share of the others': pretrained weights want a lower one."""
    table_rate: float = 1.0
    """The token table's rate as such a share; 0 leaves it as it is. As output weights all of its rows have a gradient at every
    step, which soon takes a pretrained table apart: Adam moves a row by the whole rate, however small its gradient."""
    warmup_steps: int = 50
    """Steps of linear warm-up from zero."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    dropout: float = 0.0
    """Share of the decoder's activations that are zeroed while it trains: of embedded tokens, and of what each residual branch adds
    (Srivastava et al. 2014); neighbors and their encoder have none. Which ones hangs on the number of ranks and on
    micro_batch_size."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of a step; 0 means no limit."""
    neighbor_dropout: float = 0.1
    """Share of the sequences that train without any neighbor, so that the model works without retrieval too."""
    copy_share: float = 0.0
    """Share of the training sequences at the first step in which one neighbor of every chunk is the chunk itself with its true
    continuation, so that the model learns to copy out of neighbors. The training loss then counts them and is no measure of the
    model; validation and test never have any."""
    final_copy_share: float = 0.0
    """The same share at the last step; linear in between."""
    passages: tuple[int, ...] = (1, 2, 4)
    """qa: numbers of passages a question is read with, rising. The next one follows when the share of the validation questions that
    are answered exactly passes `passages_grow_at`, and at the latest when an equal share of the steps has passed."""
    passages_grow_at: float = 0.9
    """qa: that share."""
    evidence_share: float = 0.8
    """qa: share of the questions of which a passage holds the answer; the others have none that does. `neighbor_dropout` is the
    share that is asked without any passage."""
    own_share: float = 0.0
    """qa: share of the steps, from the first on, in which the evidence of a cloze question is the sentence it was made of."""
    pointing: float = 0.0
    """qa: weight of a second loss, that the attention of CCA lies on the answer where a passage that is read holds it. The training
    loss counts it, validation does not. Reading is learned in far fewer steps, and attention says where an answer comes from."""
    context_passages: int = 0
    """qa: so many of the passages, the best first, stand in front of the question in the decoder's context (RETRO++)."""
    replay: str | tuple[str, ...] = ""
    """qa: folders made by `retro data`: some steps are made on their text, so that the model does not forget it."""
    replay_share: float = 0.1
    """qa: share of such steps, where there is `replay`."""
    replay_sequences: int = 16
    """qa: sequences, of seq_len slots each, of such a step."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 200
    """Steps between validation losses (retrieval on, off and shuffled); the last step is always one."""
    eval_sequences: int = 64
    """Validation sequences of each folder of data that are used each time; 0 means all."""
    patience: int = 0
    """Evaluations in a row without a lower validation loss (retrieval on) after which training stops; 0 never stops early."""
    keep_best: bool = False
    """The finished model has the weights of the lowest validation loss, not the last ones. `patience` implies it."""
    sample_tokens: int = 64
    """Tokens by which a validation document is continued at every evaluation, for samples.jsonl; 0 writes none."""
    save_every: int = 200
    """Steps between checkpoints; the last step is always one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept while training."""
    prefetch: int = 2
    """Batches that a thread prepares ahead; 0 prepares each when it is needed. The results are the same."""
    tensorboard: bool = False
    """Writes the metrics as event files for TensorBoard, too (pip install "retro-lm[tensorboard]")."""
    wandb_project: str = ""
    """Sends the metrics to this project of Weights & Biases, too (pip install "retro-lm[wandb]"). Empty: nothing is sent."""
    precision: Precision = "auto"
    """auto: bfloat16 on a GPU that has it, float32 elsewhere. Weights and optimizer stay float32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; under torchrun each rank takes its own GPU of cuda."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: much less memory, about a third more work."""
    compile: bool = False
    """Compile the network with torch.compile: minutes at the start, then quicker steps on a GPU. On several ranks in pieces."""
    timeout_s: float = 600.0
    """Under torchrun: seconds that ranks wait for each other before they give up one as lost."""
    seed: int = 0
    """Of the weights, the order of the documents and the dropped neighbors."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "seq_len",
            "num_neighbors",
            "neighbor_len",
            "batch_size",
            "micro_batch_size",
            "steps",
            "learning_rate",
            "encoder_rate",
            "log_every",
            "eval_every",
            "save_every",
            "keep_checkpoints",
            "replay_sequences",
            "timeout_s",
        )
        _require_not_negative(
            self,
            "final_learning_rate",
            "warmup_steps",
            "weight_decay",
            "grad_clip",
            "eval_sequences",
            "patience",
            "sample_tokens",
            "prefetch",
            "context_passages",
            "pointing",
            "table_rate",
            "seed",
        )
        weights = self.data_weights
        if weights and (len(weights) != len(self.folders) or not all(0 < w < math.inf for w in weights)):
            raise ConfigError(
                f"data_weights = {list(weights)} for the {len(self.folders)} folders {', '.join(self.folders)} of train.data: "
                "give every folder one number above 0, or none at all"
            )
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"batch_size = {self.batch_size} is no multiple of micro_batch_size = {self.micro_batch_size}"
            )
        for name in ("neighbor_dropout", "dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: give a number of at least 0 and below 1")
        for name in ("copy_share", "final_copy_share"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ConfigError(f"{name} = {share}: give a share between 0 and 1")
            if share + self.neighbor_dropout > 1:
                raise ConfigError(
                    f"{name} = {share} and neighbor_dropout = {self.neighbor_dropout}: no sequence is both, so give shares that "
                    "add up to at most 1"
                )
        self._check_questions()
        if self.copies and self.neighbor_part == "chunk":
            raise ConfigError(
                "neighbor_part = 'chunk' leaves the continuation out, and copying needs it: set copy_share and "
                "final_copy_share to 0, or another neighbor_part"
            )

    def _check_questions(self) -> None:
        for name in ("passages_grow_at", "evidence_share", "own_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: give a share between 0 and 1")
        if not self.passages or self.passages[0] < 1 or list(self.passages) != sorted(set(self.passages)):
            raise ConfigError(f"passages = {list(self.passages)}: give numbers above 0, each above the one before")
        if not 0 < self.replay_share < 1:
            raise ConfigError(
                f"replay_share = {self.replay_share}: give a share above 0 and below 1, or no train.replay"
            )
        if self.replay and self.batch_size % self.replay_sequences and self.replay_sequences % self.batch_size:
            raise ConfigError(
                f"replay_sequences = {self.replay_sequences} and batch_size = {self.batch_size}: one must be a multiple of the "
                "other"
            )

    @property
    def copies(self) -> bool:
        """Whether there are training sequences whose neighbors hold the true continuation."""
        return self.copy_share > 0 or self.final_copy_share > 0

    def copy_share_at(self, step: int) -> float:
        """Share of the sequences of a step, counted from 1, whose neighbors hold the true continuation."""
        done = (step - 1) / max(self.steps - 1, 1)
        return (1 - done) * self.copy_share + done * self.final_copy_share

    @property
    def keeps_best(self) -> bool:
        """Whether the finished model has the weights of the lowest validation loss."""
        return self.keep_best or self.patience > 0

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of `data`."""
        return (self.data,) if isinstance(self.data, str) else self.data

    @property
    def replay_folders(self) -> tuple[str, ...]:
        """The folders of `replay`."""
        return ((self.replay,) if self.replay else ()) if isinstance(self.replay, str) else self.replay

    @property
    def accumulation(self) -> int:
        """Forward passes of one optimizer step."""
        return self.batch_size // self.micro_batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """How text is generated."""

    max_new_tokens: int = 64
    """Tokens after the prompt, at most; generation ends earlier at EOS."""
    num_neighbors: int = 2
    """K: neighbors retrieved at every chunk border; 0 turns retrieval off."""
    neighbor_len: int = 128
    """R: tokens of a neighbor that the model reads."""
    temperature: float = 0.0
    """0 takes the most probable token; otherwise logits are divided by it before drawing."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0 means all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together have this probability."""
    seed: int = 0
    """Of the draws; a prompt's continuation does not depend on the others in its batch."""

    def __post_init__(self) -> None:
        _require_positive(self, "max_new_tokens", "neighbor_len")
        _require_not_negative(self, "num_neighbors", "temperature", "top_k", "seed")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: give a number above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """A pretrained language model of Hugging Face that retrieval is put into, and what is trained of it."""

    name: str
    """Its folder, or its name on the Hugging Face hub."""
    revision: str = ""
    """Branch, tag or commit on the hub. Empty: the newest."""
    layers: str = ""
    """Where its list of decoder layers is, for architectures that are not known, as in model.layers."""
    quantization: Quantization = "none"
    """Load the frozen weights with 8 or 4 bits each (needs bitsandbytes)."""
    unfreeze: int = 0
    """Layers of the base, counted from its last one, that are trained too; -1 trains all of the base."""
    lora_rank: int = 0
    """Rank of adapters beside the matrices of the base's layers, which are trained too (needs peft); 0 means none."""
    lora_alpha: float = 16.0
    """Adapters are multiplied by lora_alpha / lora_rank."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("base.name is empty: give the folder of a pretrained model, or its name on the hub")
        _require_positive(self, "lora_alpha")
        _require_not_negative(self, "lora_rank")
        if self.unfreeze < -1:
            raise ConfigError(f"base.unfreeze = {self.unfreeze}: give a number of layers, or -1 for all of the base")
        if self.unfreeze and self.quantization != "none":
            raise ConfigError(
                f"base.unfreeze = {self.unfreeze} with quantization = {self.quantization!r}: quantized weights cannot be trained; "
                "use lora_rank instead, or leave quantization away"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A network and how it is trained: a preset, or a TOML file with the tables [model], [train] and perhaps [base]."""

    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    base: BaseConfig | None = None
    """Put retrieval into this pretrained model, instead of training a network of our own."""

    def __post_init__(self) -> None:
        train, M = self.train, self.model.chunk_len
        if self.base is not None and self.model.encoder != "own":
            raise ConfigError("model.encoder = 'bert' is for networks of our own: with [base] leave it out")
        if train.pointing and (self.base is not None or train.task == "lm"):
            raise ConfigError(
                f"pointing = {train.pointing:g} is for networks of our own that learn to answer: set it to 0"
            )
        if train.dropout and self.base is not None:
            raise ConfigError(
                f"dropout = {train.dropout:g} is for networks of our own; a base has settings of its own: set it to 0"
            )
        if train.freeze_decoder and (self.base is not None or not train.init or not self.model.cca_layers):
            raise ConfigError(
                "freeze_decoder is for a decoder of our own that is there already, and for a model that retrieves: set train.init "
                "and model.cca_layers (a [base] is frozen anyway)"
            )
        if train.encoder and self.model.encoder != "bert":
            raise ConfigError(f"train.encoder = {train.encoder!r} needs model.encoder = 'bert'")
        if self.model.encoder == "bert" and M + train.neighbor_len > BERT_POSITIONS:
            raise ConfigError(
                f"neighbor_len = {train.neighbor_len} behind a chunk of {M}: a BERT reads at most {BERT_POSITIONS} tokens at once"
            )
        if train.copies and train.neighbor_part == "both" and train.neighbor_len <= M:
            raise ConfigError(
                f"neighbor_len = {train.neighbor_len} ends with the {M} tokens of a chunk, and copying needs the continuation: set "
                f"neighbor_len to {2 * M}, or copy_share and final_copy_share to 0"
            )


def config_from_dict(cls: type[ConfigT], values: dict[str, Any], *, where: str) -> ConfigT:
    """Builds a configuration strictly: unknown or missing keys and wrong types are errors.

    Args:
        cls: One of this module's dataclasses (or another one that is made the same way).
        values: Plain data, as JSON or TOML give it.
        where: Name of the source, for messages.

    Raises:
        ConfigError: With the offending key and, for an unknown one, the nearest known.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
    arguments: dict[str, Any] = {}
    for name, entry in fields.items():
        if name in values:
            arguments[name] = _converted(values[name], hints[name], f"{where}: {name}")
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: the key {name!r} is missing")
    return cls(**arguments)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain data of a configuration, fit for JSON; `config_from_dict` reads it back."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def load_run_config(
    path: Path | None,
    overrides: list[str],
    *,
    preset: str | None = None,
    sizes: Callable[[BaseConfig], dict[str, Any]] | None = None,
) -> RunConfig:
    """Resolves a run: a preset, then the TOML file's keys, then `--set` overrides such as `train.steps=100`.

    The file may name a preset itself with a top-level `preset = "tiny"`. Without one, what [model] does not say is as in the model
    `train.init`.

    Args:
        path: TOML file.
        overrides: As `--set` takes them.
        preset: Its name.
        sizes: Of the model around a base, so that [model] need not give any where there is [base]: `retro.pretrained.base_sizes`.
            They take the place of a preset's, of which only [train] counts then.

    Raises:
        ConfigError: For an unreadable file, an unknown preset or key, or a value of the wrong type.
    """
    tables: dict[str, Any] = {}
    if path is not None:
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
    where = str(path) if path is not None else "configuration"
    for table in _TABLES:
        if not isinstance(tables.get(table, {}), dict):
            raise ConfigError(f"{where}: {table} = {tables[table]!r}: must be a table, [{table}]")
    for override in overrides:
        key, equals, text = override.partition("=")
        table, dot, name = key.strip().partition(".")
        if not equals or not dot or table not in _TABLES:
            raise ConfigError(f"--set {override}: write model.KEY=VALUE or train.KEY=VALUE (or base.KEY=VALUE)")
        tables.setdefault(table, {})[name] = _parsed(text.strip())
    name = preset or tables.pop("preset", None)
    tables.pop("preset", None)
    unknown = set(tables) - set(_TABLES)
    if unknown:
        known = ", ".join(f"[{table}]" for table in _TABLES)
        raise ConfigError(f"{where}: unknown table or key {sorted(unknown)[0]!r}; known: preset, {known}")
    pretrained = config_from_dict(BaseConfig, tables["base"], where=f"{where} [base]") if "base" in tables else None
    base: dict[str, Any] = {"model": {}, "train": {}}
    if name is not None:
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
        base = config_to_dict(PRESETS[name])
    model = base["model"] | tables.get("model", {})
    init = tables.get("train", {}).get("init")
    if init and isinstance(init, str) and name is None:
        model = _sizes_of(Path(init)) | model
    if pretrained is not None and sizes is not None:
        of_base = sizes(pretrained)
        fixed = ("vocab_size", "dim", "num_layers", "tie_embeddings")
        model = of_base | tables.get("model", {}) | {key: of_base[key] for key in fixed}
    return RunConfig(
        model=config_from_dict(ModelConfig, model, where=f"{where} [model]"),
        train=config_from_dict(TrainConfig, base["train"] | tables.get("train", {}), where=f"{where} [train]"),
        base=pretrained,
    )


def _sizes_of(folder: Path) -> dict[str, Any]:
    try:
        sizes: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"train.init = {str(folder)!r}: no model lies there that says its sizes ({error})") from error
    return sizes


_TABLES = ("model", "train", "base")


def _parsed(text: str) -> Any:
    """A `--set` value: TOML where it is valid TOML, else the bare string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _converted(value: Any, hint: Any, where: str) -> Any:  # noqa: PLR0911
    """Checks a plain value against a field's type; widens int to float and list to tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        listed = [a for a in kinds if typing.get_origin(a) is tuple]
        return _converted(value, listed[0] if listed and isinstance(value, (list, tuple)) else kinds[0], where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r}: must be one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} = {value!r}: must be a list")
        return tuple(_converted(item, arguments[0], where) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return config_from_dict(typing.cast("type[Any]", hint), value, where=where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} = {value!r}: must be of type {hint.__name__}")
    return value


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} = {getattr(config, name)}: must be above 0")


def _require_not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} = {getattr(config, name)}: must not be negative")


def _paper(
    dim: int, num_heads: int, head_dim: int, num_layers: int, *, retrieval: bool, rate: float = 2e-4
) -> RunConfig:
    """A model of the paper (arXiv:2112.04426, table 1 and appendix C), with or without retrieval."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=128_000,
            dim=dim,
            num_layers=num_layers,
            num_heads=num_heads,
            head_dim=head_dim,
            ffw_dim=4 * dim,
            cca_layers=tuple(range(6, num_layers + 1, 3)) if retrieval else (),
            encoder_dim=896,
            encoder_layers=2,
            encoder_heads=16,
            encoder_head_dim=64,
            encoder_ffw_dim=3584,
            tie_embeddings=False,
            positions="relative",
        ),
        train=TrainConfig(
            seq_len=2048,
            batch_size=256,
            micro_batch_size=1,
            steps=800_000,
            learning_rate=rate,
            final_learning_rate=rate / 10,
            warmup_steps=750,
            neighbor_dropout=0.0,
        ),
    )


_PAPER: dict[str, dict[str, Any]] = {
    "172m": {"dim": 896, "num_heads": 16, "head_dim": 64, "num_layers": 12},
    "425m": {"dim": 1536, "num_heads": 12, "head_dim": 128, "num_layers": 12},
    "1.5b": {"dim": 2048, "num_heads": 16, "head_dim": 128, "num_layers": 24},
    "7.5b": {"dim": 4096, "num_heads": 32, "head_dim": 128, "num_layers": 32, "rate": 1e-4},
}
_BASELINES = {"172m": "132m", "425m": "368m", "1.5b": "1.3b", "7.5b": "7b"}

PRESETS: dict[str, RunConfig] = {
    "tiny": RunConfig(
        model=ModelConfig(
            vocab_size=8192,
            dim=128,
            num_layers=4,
            num_heads=4,
            head_dim=32,
            ffw_dim=512,
            cca_layers=(2, 4),
            encoder_dim=128,
            encoder_layers=2,
            encoder_heads=4,
            encoder_head_dim=32,
            encoder_ffw_dim=512,
        ),
        train=TrainConfig(seq_len=256, batch_size=8, micro_batch_size=8, steps=600, learning_rate=2e-3),
    ),
    "small": RunConfig(
        model=ModelConfig(
            vocab_size=16384,
            dim=512,
            num_layers=7,
            num_heads=8,
            head_dim=64,
            ffw_dim=2048,
            cca_layers=(3, 5, 7),
            encoder_dim=512,
            encoder_layers=3,
            encoder_heads=8,
            encoder_head_dim=64,
            encoder_ffw_dim=2048,
        ),
        train=TrainConfig(seq_len=1024, batch_size=256, micro_batch_size=32, steps=450, learning_rate=1.5e-3),
    ),
    "base": RunConfig(
        model=ModelConfig(
            vocab_size=32768,
            dim=768,
            num_layers=12,
            num_heads=12,
            head_dim=64,
            ffw_dim=3072,
            cca_layers=(4, 7, 10),
            encoder_dim=768,
            encoder_layers=3,
            encoder_heads=12,
            encoder_head_dim=64,
            encoder_ffw_dim=3072,
        ),
        train=TrainConfig(
            seq_len=2048, batch_size=256, micro_batch_size=8, steps=10_000, learning_rate=6e-4, warmup_steps=500
        ),
    ),
    "reader": RunConfig(
        model=ModelConfig(
            vocab_size=30_522,
            dim=384,
            num_layers=4,
            num_heads=6,
            head_dim=64,
            ffw_dim=1536,
            cca_layers=(1, 3, 4),
            encoder="bert",
            encoder_dim=384,
            encoder_layers=6,
            encoder_heads=12,
            encoder_head_dim=32,
            encoder_ffw_dim=1536,
        ),
        train=TrainConfig(
            task="qa",
            encoder=DEFAULT_ENCODER,
            neighbor_len=160,
            batch_size=32,
            micro_batch_size=32,
            learning_rate=1e-3,
            encoder_rate=0.2,
            table_rate=0.0,
            pointing=1.0,
        ),
    ),
    **{f"retro-{name}": _paper(**sizes, retrieval=True) for name, sizes in _PAPER.items()},
    **{f"baseline-{_BASELINES[name]}": _paper(**sizes, retrieval=False) for name, sizes in _PAPER.items()},
}
"""Named starting points. `vocab_size` gives way to the tokenizer's when training begins.

tiny, small and base are our own. retro-172m to retro-7.5b are the paper's models, named by their parameters without embeddings, and
baseline-132m to baseline-7b its models without retrieval; their micro batches are for one GPU of 80 GB.
"""
