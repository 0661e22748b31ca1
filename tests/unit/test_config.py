"""Settings: what is refused and in which words, strict loading, presets, files and overrides."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import retro.config
from retro.config import (
    PRESETS,
    BaseConfig,
    GenerateConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    load_run_config,
)
from retro.errors import ConfigError
from retro.model import Retro

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "dim": 8,
    "num_layers": 3,
    "num_heads": 2,
    "head_dim": 4,
    "ffw_dim": 16,
    "cca_layers": (2, 3),
    "encoder_dim": 8,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "encoder_head_dim": 4,
    "encoder_ffw_dim": 16,
}


def refuses(message: str) -> Any:
    """Expects a ConfigError with exactly this message."""
    return pytest.raises(ConfigError, match=f"^{re.escape(message)}$")


def training(**settings: Any) -> TrainConfig:
    return TrainConfig(**settings)


def generation(**settings: Any) -> GenerateConfig:
    return GenerateConfig(**settings)


# Validation


@pytest.mark.parametrize(
    "name",
    [
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
    ],
)
@pytest.mark.parametrize("value", [0, -2])
def test_a_models_sizes_must_be_above_zero(name: str, value: int) -> None:
    with refuses(f"{name} = {value}: must be above 0"):
        ModelConfig(**(SIZES | {name: value}))


@pytest.mark.parametrize("chunk_len", [1, 0, -64])
def test_a_chunk_has_at_least_two_slots(chunk_len: int) -> None:
    with refuses(f"chunk_len = {chunk_len}: a chunk has at least 2 slots"):
        ModelConfig(**SIZES, chunk_len=chunk_len)


@pytest.mark.parametrize("name", ["head_dim", "encoder_head_dim"])
def test_heads_have_an_even_width(name: str) -> None:
    with refuses(f"{name} = 5: rotary positions need an even width"):
        ModelConfig(**(SIZES | {name: 5}))


@pytest.mark.parametrize("layers", [(0, 2), (2, 4), (3, 2), (2, 2), (-1,)])
def test_cca_layers_are_ascending_numbers_of_layers(layers: tuple[int, ...]) -> None:
    with refuses(f"cca_layers = {list(layers)}: give ascending layer numbers between 1 and num_layers = 3"):
        ModelConfig(**(SIZES | {"cca_layers": layers}))


def test_tied_embeddings_need_equal_widths_where_there_is_an_encoder() -> None:
    message = "tie_embeddings needs dim = encoder_dim, got 8 and 10: make them equal or set tie_embeddings = false"
    with refuses(message):
        ModelConfig(**(SIZES | {"encoder_dim": 10}))
    assert ModelConfig(**(SIZES | {"encoder_dim": 10, "tie_embeddings": False})).encoder_dim == 10
    assert ModelConfig(**(SIZES | {"encoder_dim": 10, "cca_layers": ()})).cca_layers == ()


@pytest.mark.parametrize(
    "name",
    [
        "seq_len",
        "num_neighbors",
        "neighbor_len",
        "batch_size",
        "micro_batch_size",
        "steps",
        "learning_rate",
        "log_every",
        "eval_every",
        "save_every",
    ],
)
def test_training_sizes_must_be_above_zero(name: str) -> None:
    with refuses(f"{name} = 0: must be above 0"):
        training(**{name: 0})


@pytest.mark.parametrize(
    "name", ["final_learning_rate", "warmup_steps", "weight_decay", "grad_clip", "eval_sequences", "seed"]
)
def test_other_training_numbers_must_not_be_negative(name: str) -> None:
    assert getattr(training(**{name: 0}), name) == 0
    with refuses(f"{name} = -1: must not be negative"):
        training(**{name: -1})


def test_a_batch_is_a_whole_number_of_micro_batches() -> None:
    with refuses("batch_size = 16 is no multiple of micro_batch_size = 5"):
        TrainConfig(batch_size=16, micro_batch_size=5)
    assert TrainConfig(batch_size=16, micro_batch_size=4).accumulation == 4
    assert TrainConfig().accumulation == 1


@pytest.mark.parametrize("name", ["neighbor_dropout", "dropout", "beta1", "beta2"])
@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5])
def test_shares_and_decays_lie_in_zero_to_one(name: str, value: float) -> None:
    with refuses(f"{name} = {value}: give a number of at least 0 and below 1"):
        training(**{name: value})


@pytest.mark.parametrize("name", ["max_new_tokens", "neighbor_len"])
def test_generation_lengths_must_be_above_zero(name: str) -> None:
    with refuses(f"{name} = 0: must be above 0"):
        generation(**{name: 0})


@pytest.mark.parametrize("name", ["num_neighbors", "temperature", "top_k", "seed"])
def test_other_generation_numbers_must_not_be_negative(name: str) -> None:
    assert getattr(generation(**{name: 0}), name) == 0
    with refuses(f"{name} = -1: must not be negative"):
        generation(**{name: -1})


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.1])
def test_top_p_is_a_probability_above_zero(top_p: float) -> None:
    with refuses(f"top_p = {top_p}: give a number above 0 and at most 1"):
        GenerateConfig(top_p=top_p)


@pytest.mark.parametrize(
    ("cls", "name"),
    [(TrainConfig, "learning_rate"), (TrainConfig, "weight_decay"), (TrainConfig, "beta1"), (GenerateConfig, "top_p")],
)
def test_nan_is_no_setting(cls: type[Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = nan: "):
        cls(**{name: float("nan")})


def test_settings_are_frozen_and_given_by_name() -> None:
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3  # type: ignore[misc]
    positional: Any = TrainConfig
    with pytest.raises(TypeError):
        positional("wiki.data")


@pytest.mark.parametrize("cls", [ModelConfig, TrainConfig, GenerateConfig])
def test_every_setting_has_a_docstring_under_it(cls: type[Any]) -> None:
    source = Path(retro.config.__file__).read_text(encoding="utf-8")
    body = source.split(f"class {cls.__name__}:")[1].split("    def ")[0]
    for field in dataclasses.fields(cls):
        assert re.search(rf'^    {field.name}: .*\n    """', body, flags=re.MULTILINE), field.name


# Plain data to settings and back


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(**SIZES),
        ModelConfig(**(SIZES | {"cca_layers": (), "rope_base": 500.0, "tie_embeddings": False})),
        TrainConfig(data="a.data", precision="bfloat16", seed=7),
        GenerateConfig(temperature=0.7, top_p=0.9),
        RunConfig(model=ModelConfig(**SIZES)),
        *PRESETS.values(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_round_trip_through_json_changes_nothing(config: Any) -> None:
    text = json.dumps(config_to_dict(config))
    assert config_from_dict(type(config), json.loads(text), where="config.json") == config


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    with refuses("a.toml [train]: unknown key 'learning_rat'; did you mean learning_rate?"):
        config_from_dict(TrainConfig, {"learning_rat": 1.0}, where="a.toml [train]")


def test_an_unknown_key_like_no_other_is_refused_with_all_known_ones() -> None:
    known = ", ".join(field.name for field in dataclasses.fields(GenerateConfig))
    with refuses(f"here: unknown key 'qqq'; known keys: {known}"):
        config_from_dict(GenerateConfig, {"qqq": 1}, where="here")


@pytest.mark.parametrize("name", SIZES)
def test_a_missing_key_is_named(name: str) -> None:
    with refuses(f"config.json: the key '{name}' is missing"):
        config_from_dict(ModelConfig, {key: value for key, value in SIZES.items() if key != name}, where="config.json")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("steps", "100", "int"),
        ("steps", 1.0, "int"),
        ("steps", True, "int"),
        ("steps", None, "int"),
        ("learning_rate", "1e-3", "float"),
        ("learning_rate", True, "float"),
        ("data", 3, "str"),
        ("device", ["cpu"], "str"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any, kind: str) -> None:
    with refuses(f"here: {name} = {value!r}: must be of type {kind}"):
        config_from_dict(TrainConfig, {name: value}, where="here")


@pytest.mark.parametrize("value", [1, "true", 0])
def test_only_a_bool_is_a_bool(value: Any) -> None:
    with refuses(f"here: tie_embeddings = {value!r}: must be of type bool"):
        config_from_dict(ModelConfig, SIZES | {"tie_embeddings": value}, where="here")


def test_a_choice_is_one_of_those_listed() -> None:
    assert config_from_dict(TrainConfig, {"precision": "float32"}, where="here").precision == "float32"
    for value in ("float16", 32, True, None, ["auto"]):
        with refuses(f"here: precision = {value!r}: must be one of auto, float32, bfloat16"):
            config_from_dict(TrainConfig, {"precision": value}, where="here")


def test_a_whole_number_is_widened_where_a_float_is_wanted() -> None:
    config = config_from_dict(TrainConfig, {"learning_rate": 1, "grad_clip": 0}, where="here")
    assert isinstance(config.learning_rate, float)
    assert config.learning_rate == 1.0
    assert isinstance(config.grad_clip, float)


def test_a_list_becomes_a_tuple_and_its_items_are_checked() -> None:
    assert config_from_dict(ModelConfig, SIZES | {"cca_layers": [1, 3]}, where="here").cca_layers == (1, 3)
    with refuses("here: cca_layers = 3: must be a list"):
        config_from_dict(ModelConfig, SIZES | {"cca_layers": 3}, where="here")
    with refuses("here: cca_layers = '23': must be a list"):
        config_from_dict(ModelConfig, SIZES | {"cca_layers": "23"}, where="here")
    for item in (2.0, True, "2"):
        with refuses(f"here: cca_layers = {item!r}: must be of type int"):
            config_from_dict(ModelConfig, SIZES | {"cca_layers": [1, item]}, where="here")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithOptional:
    """A configuration as other modules make them."""

    limit: int | None = None
    names: tuple[str, ...] = ()


def test_a_value_that_may_be_none_is_none_or_of_its_type() -> None:
    assert config_from_dict(WithOptional, {"limit": None}, where="here") == WithOptional()
    assert config_from_dict(WithOptional, {"limit": 3, "names": ["a"]}, where="here") == WithOptional(
        limit=3, names=("a",)
    )
    with refuses("here: limit = '3': must be of type int"):
        config_from_dict(WithOptional, {"limit": "3"}, where="here")


# Files, presets, overrides


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


MODEL_TOML = "[model]\n" + "\n".join(
    f"{name} = {list(value) if isinstance(value, tuple) else value}" for name, value in SIZES.items()
)


def test_a_preset_alone_is_a_run() -> None:
    for name, run in PRESETS.items():
        assert load_run_config(None, [], preset=name) == run


def test_a_file_alone_is_a_run(tmp_path: Path) -> None:
    path = write(tmp_path, MODEL_TOML + '\n[train]\nsteps = 7\ndata = "wiki.data"\n')
    assert load_run_config(path, []) == RunConfig(
        model=ModelConfig(**SIZES), train=TrainConfig(steps=7, data="wiki.data")
    )


def test_overrides_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = write(tmp_path, 'preset = "tiny"\n[model]\nvocab_size = 1000\n[train]\nsteps = 7\nseed = 3\n')
    run = load_run_config(path, ["train.steps=9", "model.cca_layers=[4]", "train.data=wiki.data"])
    tiny = PRESETS["tiny"]
    assert run.model == dataclasses.replace(tiny.model, vocab_size=1000, cca_layers=(4,))
    assert run.train == dataclasses.replace(tiny.train, steps=9, seed=3, data="wiki.data")


def test_the_argument_names_another_preset_than_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'preset = "tiny"\n[train]\nsteps = 7\n')
    run = load_run_config(path, [], preset="small")
    assert run.model == PRESETS["small"].model
    assert run.train == dataclasses.replace(PRESETS["small"].train, steps=7)


def test_loading_leaves_the_presets_as_they_were() -> None:
    before = config_to_dict(PRESETS["tiny"])
    load_run_config(None, ["train.steps=1", "model.vocab_size=5"], preset="tiny")
    assert config_to_dict(PRESETS["tiny"]) == before


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("train.steps=12", "steps", 12),
        ("train.steps = 12 ", "steps", 12),
        ("train.learning_rate=3e-4", "learning_rate", 3e-4),
        ("train.learning_rate=1", "learning_rate", 1.0),
        ("train.data=a b/wiki.data", "data", "a b/wiki.data"),
        ('train.data="12"', "data", "12"),
        ("train.data=a=b", "data", "a=b"),
        ("train.data=", "data", ""),
        ("train.device=cuda:1", "device", "cuda:1"),
        ("train.precision=float32", "precision", "float32"),
    ],
)
def test_an_override_is_toml_where_it_can_be_and_a_string_elsewhere(override: str, name: str, value: Any) -> None:
    changed = getattr(load_run_config(None, [override], preset="tiny").train, name)
    assert changed == value
    assert type(changed) is type(value)


def test_the_last_of_two_overrides_wins() -> None:
    assert load_run_config(None, ["train.steps=1", "train.steps=2"], preset="tiny").train.steps == 2


@pytest.mark.parametrize("override", ["steps=3", "train.steps", "train", "=3", "generate.seed=1", "preset=small", ""])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    with refuses(f"--set {override}: write model.KEY=VALUE or train.KEY=VALUE (or base.KEY=VALUE)"):
        load_run_config(None, [override], preset="tiny")


def test_an_override_is_checked_like_a_file() -> None:
    with refuses("configuration [train]: unknown key 'step'; did you mean steps?"):
        load_run_config(None, ["train.step=3"], preset="tiny")
    with refuses("configuration [train]: steps = 'many': must be of type int"):
        load_run_config(None, ["train.steps=many"], preset="tiny")
    with refuses("steps = 0: must be above 0"):
        load_run_config(None, ["train.steps=0"], preset="tiny")


def test_an_unknown_preset_is_refused_with_those_there_are(tmp_path: Path) -> None:
    message = f"unknown preset 'huge'; there are: {', '.join(PRESETS)}"
    with refuses(message):
        load_run_config(None, [], preset="huge")
    with refuses(message):
        load_run_config(write(tmp_path, 'preset = "huge"\n'), [])


def test_without_file_and_preset_the_models_sizes_are_missing() -> None:
    with refuses("configuration [model]: the key 'vocab_size' is missing"):
        load_run_config(None, [])


def test_errors_of_a_file_name_the_file_and_the_table(tmp_path: Path) -> None:
    path = write(tmp_path, 'preset = "tiny"\n[model]\ndimm = 3\n')
    with refuses(f"{path} [model]: unknown key 'dimm'; did you mean dim?"):
        load_run_config(path, [])
    path = write(tmp_path, 'preset = "tiny"\n[training]\nsteps = 3\n')
    with refuses(f"{path}: unknown table or key 'training'; known: preset, [model], [train], [base]"):
        load_run_config(path, [])


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with refuses(f"cannot read the configuration {path}: No such file or directory"):
        load_run_config(path, [])
    with refuses(f"cannot read the configuration {tmp_path}: Is a directory"):
        load_run_config(tmp_path, [])


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "[model\n")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))} is not valid TOML: .*line 1"):
        load_run_config(path, [])
    path.write_bytes(b'[train]\ndata = "\xff"\n')
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))} is not valid TOML: "):
        load_run_config(path, [])


@pytest.mark.parametrize("text", ["model = 3\n", 'train = "fast"\n', "model = [1]\n"])
@pytest.mark.parametrize("overrides", [[], ["model.dim=128", "train.steps=1"]], ids=["plain", "with overrides"])
def test_model_and_train_must_be_tables(tmp_path: Path, text: str, overrides: list[str]) -> None:
    with pytest.raises(ConfigError):
        load_run_config(write(tmp_path, text), overrides, preset="tiny")


@pytest.mark.parametrize("value", ["3", '["tiny"]', "true"])
def test_a_preset_that_is_no_name_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="preset"):
        load_run_config(write(tmp_path, f"preset = {value}\n"), [])


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_sequences_are_whole_chunks_and_its_model_can_be_built(name: str) -> None:
    run = PRESETS[name]
    assert run.train.seq_len % run.model.chunk_len == 0
    assert run.train.warmup_steps < run.train.steps
    assert run.train.final_learning_rate < run.train.learning_rate
    papers = name.startswith(("retro-", "baseline-"))
    assert bool(run.model.cca_layers) != name.startswith("baseline-")
    assert run.model.tie_embeddings != papers
    assert (run.model.positions == "relative") == papers
    with torch.device("meta"):
        model = Retro(run.model)
    assert sum(layer.cca is not None for layer in model.layers) == len(run.model.cca_layers)


def count(config: ModelConfig) -> int:
    """Numbers in all weights, by hand: five kinds of matrix, and the norms."""
    D, E = config.dim, config.encoder_dim
    inner, encoder_inner = config.num_heads * config.head_dim, config.encoder_heads * config.encoder_head_dim
    decoder_layer = 4 * D * inner + 2 * D * config.ffw_dim + 2 * D
    cca = 2 * D * inner + 2 * E * inner + D
    encoder_layer = 4 * E * encoder_inner + 2 * E * config.encoder_ffw_dim + 2 * E
    cross = 2 * E * encoder_inner + 2 * D * encoder_inner + E + D
    total = config.vocab_size * D + config.num_layers * decoder_layer + D + len(config.cca_layers) * cca
    return total + config.encoder_layers * encoder_layer + cross + E


@pytest.mark.parametrize(("name", "millions"), [("small", 44.1), ("tiny", 2.4)])
def test_a_presets_parameters_are_as_many_as_counted_by_hand(name: str, millions: float) -> None:
    config = PRESETS[name].model
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Retro(config).parameters())
    assert parameters == count(config)
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)


def test_dropout_is_for_networks_of_our_own() -> None:
    with refuses("dropout = 0.1 is for networks of our own; a base has settings of its own: set it to 0"):
        RunConfig(model=PRESETS["tiny"].model, train=training(dropout=0.1), base=BaseConfig(name="some"))
