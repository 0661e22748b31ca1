"""Trainings that begin with another model: a decoder that learns to retrieve (RETROfit), and one that does without."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import one_thread, random_training_data, toy_run, toy_tokenizer
from safetensors.torch import load_file
from torch.testing import assert_close

from retro.checkpoint import TRAINING, WEIGHTS, load_model
from retro.config import BaseConfig, ModelConfig, RunConfig, load_run_config
from retro.dry_run import measure_training
from retro.errors import ConfigError, MismatchError
from retro.pretrained import base_sizes
from retro.train import train
from retro.train_setup import open_batches, setup
from retro.train_step import evaluate_loss, train_step

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

ADDED = ("cca", "cca_norm", "encoder", "encoder_embedding")
UNTIED: dict[str, Any] = {"tie_embeddings": False, "encoder_dim": 32, "encoder_head_dim": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_training_data(tmp_path_factory.mktemp("data") / "toy.data").folder


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained decoder without retrieval."""
    out = tmp_path_factory.mktemp("models") / "plain.model"
    return train(toy_run(data, out, model={"cca_layers": ()}, learning_rate=1e-2, final_learning_rate=1e-2))


@pytest.fixture(scope="module")
def retrieving(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model with retrieval."""
    return train(toy_run(data, tmp_path_factory.mktemp("models") / "retrieving.model", learning_rate=1e-2))


def is_added(name: str) -> bool:
    return any(part in ADDED for part in name.split("."))


def losses(run: RunConfig, folder: Path) -> dict[str, float]:
    """Of all validation sequences, without rounding of batches: retrieval on, off and shuffled."""
    model, _, _ = load_model(folder)
    batches = open_batches(
        setup(run).corpora[Path(str(run.train.data)).stem], "valid", replace(run, model=model.config)
    )
    found = evaluate_loss(model, batches, sequences=0, batch_size=4, dtype=torch.float32)
    return {str(mode): loss for mode, loss in found.loss_nats.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_decoder_is_the_same_bit_for_bit_and_what_is_added_learns(
    data: Path, plain: Path, tmp_path: Path, checkpointing: bool
) -> None:
    options: dict[str, Any] = {
        "init": str(plain),
        "freeze_decoder": True,
        "learning_rate": 1e-2,
        "activation_checkpointing": checkpointing,
    }
    run = toy_run(data, tmp_path / "fit.model", **options)
    began = {name: weight.clone() for name, weight in setup(run).model.state_dict().items()}
    train(run)
    before, after = load_file(plain / WEIGHTS), load_file(tmp_path / "fit.model" / WEIGHTS)
    added = {name for name in after if is_added(name)}
    assert set(after) - added == set(before)
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
    for name in added:
        assert not torch.equal(after[name], began[name]), name
    base, fitted = load_model(plain)[0], load_model(tmp_path / "fit.model")[0]
    ids_BT = torch.randint(2, 258, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(fitted(ids_BT), base(ids_BT))


def test_a_decoder_that_begins_to_retrieve_says_at_first_what_it_said(data: Path, plain: Path, tmp_path: Path) -> None:
    """CCA's output begins as zero, so that neighbors, encoder and all, change nothing yet; then training is of all weights."""
    run = toy_run(data, tmp_path / "m", init=str(plain))
    parts = setup(run)
    base = load_model(plain)[0]
    batch = parts.batches.batch(0, 4)
    assert batch.keep_BLKR is not None
    assert batch.keep_BLKR.any()
    tensors = batch.tensors()
    read = {name: tensors.pop(name) for name in ("neighbors_BLKR", "keep_BLKR")}
    with torch.no_grad():
        expected = base(**tensors)
        assert_close(parts.model(**tensors, **read), expected, rtol=1e-6, atol=1e-6)
    assert all(parameter.requires_grad for parameter in parts.model.parameters())
    encoder = parts.model.encoder
    assert encoder is not None
    assert all(bool(weight.any()) for weight in encoder.parameters() if weight.ndim > 1)
    first = losses(run, plain)
    train(run)
    last = losses(run, tmp_path / "m")
    assert set(last) == {"on", "off", "shuffled"}
    assert last["on"] < first["off"]


def test_a_plain_decoder_begins_with_that_of_a_model_that_retrieves(
    data: Path, retrieving: Path, tmp_path: Path
) -> None:
    run = toy_run(data, tmp_path / "m", model={"cca_layers": ()}, init=str(retrieving))
    parts = setup(run)
    given = load_file(retrieving / WEIGHTS)
    weights = parts.model.state_dict()
    assert set(weights) == {name for name in given if not is_added(name)}
    for name, weight in weights.items():
        assert torch.equal(weight, given[name]), name
    train(run)
    assert load_model(tmp_path / "m")[0].config.cca_layers == ()


@pytest.mark.parametrize("model", [UNTIED, {"positions": "relative"}], ids=["untied", "relative"])
def test_other_forms_of_the_network_are_frozen_too(data: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    train(toy_run(data, tmp_path / "plain.model", model=model | {"cca_layers": ()}, steps=2))
    train(toy_run(data, tmp_path / "m", model=model, init=str(tmp_path / "plain.model"), freeze_decoder=True, steps=3))
    before, after = load_file(tmp_path / "plain.model" / WEIGHTS), load_file(tmp_path / "m" / WEIGHTS)
    assert {name for name in after if not is_added(name)} == set(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_run_around_a_frozen_decoder_goes_on_exactly(data: Path, plain: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"init": str(plain), "freeze_decoder": True}
    whole = train(toy_run(data, tmp_path / "whole", **options))

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(toy_run(data, tmp_path / "m", **options), progress=stop)
    train(toy_run(data, tmp_path / "m", **options))
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    with pytest.raises(ConfigError, match="freeze_decoder"):
        train(toy_run(data, tmp_path / "m", init=str(plain), steps=8))
    moments = load_file(next((whole / TRAINING / "step-00000006").glob("*.safetensors")))
    assert not any("embedding.weight" in name and name.startswith("optimizer") for name in moments)


@pytest.mark.parametrize("model", [{}, UNTIED], ids=["tied", "untied"])
def test_what_is_frozen_takes_no_memory_for_gradients_and_fewer_products(
    data: Path, tmp_path: Path, model: dict[str, Any]
) -> None:
    plain = train(toy_run(data, tmp_path / "plain.model", model=model | {"cca_layers": ()}, steps=1))
    run = toy_run(data, tmp_path / "m", model=model, init=str(plain), freeze_decoder=True)
    frozen = measure_training(run, seconds=1)
    free = measure_training(replace(run, train=replace(run.train, freeze_decoder=False)), seconds=1)
    parameters = setup(run).model.parameters()
    sizes = [(p.numel(), p.requires_grad) for p in parameters]
    trained, kept = (sum(size for size, trains in sizes if trains is which) for which in (True, False))
    assert free.memory.gradients == 4 * (trained + kept)
    # Norms of the decoder are counted as trained: they are nothing beside the rest.
    assert 4 * trained <= frozen.memory.gradients <= 4 * trained + 4 * 2 * 5 * 16
    assert frozen.flops_per_step < free.flops_per_step


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"cca_layers": (2,), "num_layers": 3}, "num_layers: 2 -> 3"),
        ({"cca_layers": (2,), "ffw_dim": 64}, "ffw_dim: 32 -> 64"),
        ({"cca_layers": (), "rope_base": 500.0}, "rope_base"),
    ],
)
def test_a_decoder_of_other_sizes_is_refused(
    data: Path, plain: Path, tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(MismatchError, match=message):
        setup(toy_run(data, tmp_path / "m", model=model, init=str(plain)))


def test_two_models_that_retrieve_have_the_same_encoder(data: Path, retrieving: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"cca_layers: \[2\] -> \[1, 2\]"):
        setup(toy_run(data, tmp_path / "m", model={"cca_layers": (1, 2)}, init=str(retrieving)))


def test_a_step_without_any_neighbor_leaves_a_frozen_model_as_it_is(data: Path, plain: Path, tmp_path: Path) -> None:
    parts = setup(toy_run(data, tmp_path / "m", init=str(plain), freeze_decoder=True))
    before = {name: weight.clone() for name, weight in parts.model.state_dict().items()}
    batch = parts.batches.batch(0, 4, neighbors="off")
    options: dict[str, Any] = {"micro_batch_size": 2, "rate": 1e-2, "grad_clip": 1.0, "dtype": torch.float32}
    result = train_step(parts.model, parts.optimizer, batch, **options)
    assert 0 < result.loss_nats < 10
    assert result.grad_norm == 0
    assert all(torch.equal(weight, before[name]) for name, weight in parts.model.state_dict().items())


def test_a_frozen_table_is_cast_once_and_gives_the_loss_of_one_that_is_trained(
    data: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retro.model.LOGITS_PER_PART", {"cpu": 4 * 258})  # four rows at a time
    found: list[tuple[float, list[torch.Tensor]]] = []
    for frozen in (False, True):
        run = toy_run(data, tmp_path / "m", init=str(plain), freeze_decoder=frozen, precision="bfloat16")
        parts = setup(run)
        tensors = parts.batches.batch(0, 4).tensors()
        kept: list[torch.Tensor] = []

        def note(tensor: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = parts.model(**tensors)
        loss.backward()
        tables = {
            t.untyped_storage().data_ptr()
            for t in kept
            if t.dtype == torch.bfloat16 and 258 in t.shape and 16 in t.shape
        }
        assert len(tables) == 1
        gradients = [p.grad for name, p in parts.model.named_parameters() if ".cca." in name]
        found.append((loss.item(), [gradient for gradient in gradients if gradient is not None]))
    assert found[0][1]
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)


def test_an_encoder_that_does_not_know_the_tables_of_tokens_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A plain decoder with the encoder's table gets the encoder; with another table it gets it, too, and a warning."""
    encoder = tmp_path / "bert"
    sizes_of_bert: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    transformers.BertModel(transformers.BertConfig(vocab_size=258, **sizes_of_bert)).save_pretrained(encoder)
    toy_tokenizer().save(encoder)
    data = random_training_data(tmp_path / "toy.data").folder
    sizes: dict[str, Any] = {"encoder": "bert"}
    for begun_with in (str(encoder), ""):
        out = tmp_path / f"plain{bool(begun_with)}.model"
        train(toy_run(data, out, model=sizes | {"cca_layers": ()}, encoder=begun_with, steps=1))
        caplog.clear()
        model = setup(toy_run(data, tmp_path / "m", model=sizes, init=str(out), encoder=str(encoder))).model
        assert ("does not know" in caplog.text) is not bool(begun_with)
        table = load_file(out / WEIGHTS)["embedding.weight"]
        assert torch.equal(model.embedding.weight, table)
        given = load_file(encoder / "model.safetensors")
        reader: Any = model.encoder
        for name, weight in reader.bert.state_dict().items():
            assert torch.equal(weight, given[name]), name


def test_a_training_cannot_begin_with_a_retrofitted_model(data: Path, tmp_path: Path) -> None:
    base = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=258, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    )
    base.save_pretrained(tmp_path / "gpt2")
    toy_tokenizer().save(tmp_path / "gpt2")
    run, chosen = toy_run(data, tmp_path / "fit.model", steps=1), BaseConfig(name=str(tmp_path / "gpt2"))
    train(replace(run, model=replace(run.model, **base_sizes(chosen)), base=chosen))
    with pytest.raises(ConfigError, match="which no training can begin with: give its base as --base"):
        setup(toy_run(data, tmp_path / "m", init=str(tmp_path / "fit.model")))


@pytest.mark.parametrize(
    ("model", "changes"), [({}, {}), ({"cca_layers": ()}, {"init": "plain.model"})], ids=["no init", "no CCA"]
)
def test_nothing_is_frozen_where_there_is_nothing_to_train_or_to_keep(
    data: Path, tmp_path: Path, model: dict[str, Any], changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="freeze_decoder is for a decoder of our own that is there already"):
        toy_run(data, tmp_path / "m", model=model, freeze_decoder=True, **changes)


def test_a_file_gives_only_the_sizes_that_the_decoder_does_not_have(plain: Path, tmp_path: Path) -> None:
    toml = tmp_path / "fit.toml"
    toml.write_text(f'[model]\ncca_layers = [1, 2]\n\n[train]\ninit = "{plain}"\nfreeze_decoder = true\n')
    run = load_run_config(toml, ["model.encoder_layers=2"])
    expected = replace(load_model(plain)[0].config, cca_layers=(1, 2), encoder_layers=2)
    assert isinstance(expected, ModelConfig)
    assert run.model == expected
    with pytest.raises(ConfigError, match="no model lies there"):
        load_run_config(toml, [f"train.init={tmp_path / 'none'}"])
