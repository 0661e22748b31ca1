"""What people expect of a trainer: mixtures, early stopping, the best weights, samples, event files, a check on one batch."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from builders import one_thread, random_training_data, toy_run
from commands import Outcome
from torch.testing import assert_close

from index_builder.config import DataConfig
from index_builder.neighbors import build_training_data
from index_builder.search import IndexRetriever
from retro import train as training
from retro.artifact import MANIFEST, read_json, read_manifest, write_json
from retro.checkpoint import KIND, TRAINING, WEIGHTS, load_model
from retro.chunks import TrainingData
from retro.config import GenerateConfig, RunConfig, TrainConfig
from retro.costs import forward_flops
from retro.errors import ConfigError, MismatchError, TrainingError
from retro.generate import Prompt, generate
from retro.metrics import METRICS, TENSORBOARD
from retro.overfit import overfit_batch
from retro.samples import SAMPLES
from retro.tokenizer import Tokenizer
from retro.train import train
from retro.train_setup import CHANGEABLE, open_batches
from retro.train_step import evaluate_loss, utilization

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)
TIMING = ("tokens_per_s", "seconds")
CONSTANT: dict[str, Any] = {"learning_rate": 2e-2, "final_learning_rate": 2e-2, "warmup_steps": 0}
"""A rate that does not depend on the number of steps."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("data")
    return [random_training_data(folder / f"{name}.data", seed).folder for seed, name in enumerate(("wiki", "core"))]


@pytest.fixture(scope="module")
def data(corpora: list[Path]) -> Path:
    return corpora[0]


def mixed_run(corpora: list[Path], out: Path, **changes: Any) -> RunConfig:
    run = toy_run(corpora[0], out, **changes)
    return replace(run, train=replace(run.train, data=tuple(map(str, corpora)), data_weights=(0.75, 0.25)))


def lines(path: Path) -> list[dict[str, Any]]:
    """Records but for what depends on time."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def stop_after(step: int) -> Callable[[training.Progress], None]:
    """A progress callback that asks the run to end."""

    def callback(progress: training.Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return callback


def interrupted(run: RunConfig, step: int) -> Path:
    """A run that was stopped after a step and started again."""
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=stop_after(step))
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    return train(run)


def assert_same(folder: Path, expected: Path, *files: str) -> None:
    assert (folder / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    for name in (METRICS, *files):
        assert lines(folder / name) == lines(expected / name)
    read_manifest(folder, KIND)


# --- mixtures -----------------------------------------------------------------------------------------------------


def test_a_mixture_is_measured_as_a_whole_and_by_corpus(corpora: list[Path], tmp_path: Path) -> None:
    run = mixed_run(corpora, tmp_path / "m")
    out = train(run)
    model, _, info = load_model(out)
    [evaluation] = [line for line in lines(out / METRICS) if line["step"] == 6 and "valid_tokens" in line]
    modes = ("on", "off", "shuffled")
    names = {f"valid_{name}loss_{mode}_nats" for name in ("", "wiki_", "core_") for mode in modes}
    assert set(evaluation) == {"step", "valid_tokens", *names}
    tokens = 0
    losses: dict[str, list[float]] = {mode: [] for mode in modes}
    for number, folder in enumerate(corpora):
        batches = open_batches(TrainingData(folder), "valid", run, number)
        own = evaluate_loss(model, batches, sequences=4, batch_size=2, dtype=torch.float32)
        tokens += own.tokens
        for retrieval, loss in own.loss_nats.items():
            losses[retrieval].append(loss)
            key = f"valid_{('wiki', 'core')[number]}_loss_{retrieval}_nats"
            assert evaluation[key] == pytest.approx(loss, rel=1e-6)
    for mode in modes:
        wiki, core = losses[mode]
        assert abs(wiki - core) > 1e-3, "a mean with other weights would pass"
        assert evaluation[f"valid_loss_{mode}_nats"] == pytest.approx(0.75 * wiki + 0.25 * core, rel=1e-6)
    assert evaluation["valid_tokens"] == tokens
    assert info["training"]["data"] == "wiki.data, core.data"
    assert info["training"]["test_core_loss_on_nats"] > 0


def test_a_mixture_that_was_interrupted_ends_with_the_same_weights(corpora: list[Path], tmp_path: Path) -> None:
    whole = train(mixed_run(corpora, tmp_path / "whole"))
    run = mixed_run(corpora, tmp_path / "m")
    assert_same(interrupted(run, 3), whole)
    with pytest.raises(ConfigError, match=r"train\.data_weights\[?.*: .*0\.75.* -> .*0\.5"):
        train(replace(run, train=replace(run.train, data_weights=(0.5, 0.5))))
    with pytest.raises(ConfigError, match=r"made differently \(data: "):
        train(replace(run, train=replace(run.train, data=tuple(map(str, reversed(corpora))))))


def test_one_corpus_in_a_list_is_that_corpus(data: Path, tmp_path: Path) -> None:
    single = train(toy_run(data, tmp_path / "single"))
    run = toy_run(data, tmp_path / "m")
    assert_same(train(replace(run, train=replace(run.train, data=(str(data),)))), single)


def test_a_corpus_without_held_out_documents_leaves_the_others_to_be_measured(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = random_training_data(tmp_path / "bare.data", 7, counts={"train": 9}).folder
    out = train(mixed_run([bare, data], tmp_path / "m"))
    [evaluation] = [line for line in lines(out / METRICS) if line["step"] == 3 and "valid_tokens" in line]
    assert evaluation["valid_loss_on_nats"] == evaluation["valid_wiki_loss_on_nats"]
    assert not any("bare" in key for key in evaluation)
    assert f"{bare} has no document in the split valid" in caplog.text


def test_corpora_of_different_tokenizers_are_a_mismatch(data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data, tmp_path / "other.data")
    Tokenizer.train(["other words, other words"], 260).save(other)
    manifest = read_json(other / MANIFEST)
    manifest["tokenizer_fingerprint"] = Tokenizer.load(str(other)).fingerprint
    del manifest["files"]["tokenizer.json"]
    write_json(other / MANIFEST, manifest)
    with pytest.raises(MismatchError, match=r"wiki\.data has the tokenizer \w+ and .*other\.data \w+: they cannot"):
        train(mixed_run([data, other], tmp_path / "m"))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, 2.0, 3.0)])
def test_every_folder_has_one_weight_above_zero(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"data_weights = .* for the 2 folders a, b"):
        TrainConfig(data=("a", "b"), data_weights=weights)


# --- batches ahead, parts of neighbors ----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 5])
def test_batches_prepared_ahead_change_nothing(data: Path, tmp_path: Path, depth: int) -> None:
    usual = train(toy_run(data, tmp_path / "usual"))
    assert_same(train(toy_run(data, tmp_path / "m", prefetch=depth)), usual)
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_parts_of_neighbors_train_different_models(data: Path, tmp_path: Path) -> None:
    weights = set()
    for part in ("both", "chunk", "continuation"):
        out = train(toy_run(data, tmp_path / part, neighbor_part=part))
        weights.add((out / WEIGHTS).read_bytes())
    assert len(weights) == 3
    with pytest.raises(ConfigError, match=r'train\.neighbor_part: "chunk" -> "both"'):
        train(toy_run(data, tmp_path / "chunk"))


def test_the_chunk_of_a_neighbor_ends_with_the_first_token_that_reaches_its_end(
    corpus: Path, tokenizer_folder: Path, tiny_index: Path, tmp_path: Path
) -> None:
    tokenizer, retriever = Tokenizer.load(str(tokenizer_folder)), IndexRetriever.open(tiny_index)
    config = DataConfig(chunk_len=16, neighbor_len=48)
    build_training_data([str(corpus)], tmp_path / "x", tokenizer=tokenizer, retriever=retriever, config=config)
    arrays = TrainingData(tmp_path / "x").arrays
    assert arrays.neighbor_chunk_lengths is not None
    whole = split = 0
    for row, ids, length, own in zip(
        arrays.index_rows, arrays.neighbor_ids, arrays.neighbor_lengths, arrays.neighbor_chunk_lengths, strict=True
    ):
        passage = retriever.store.passage(int(row))
        # By bytes: a token of a byte-level tokenizer is as many characters of its alphabet as bytes.
        sizes = [len(str(tokenizer.backend.id_to_token(int(i)))) for i in ids[:length]]
        ends = np.cumsum(sizes)
        border = len(passage.text.encode())
        expected = int(np.searchsorted(ends, border)) + 1
        assert own == min(expected, length)
        whole += bool(own < length and ends[own - 1] == border)
        split += bool(own < length and ends[own - 1] > border)
    assert whole > 20
    assert (arrays.neighbor_chunk_lengths == arrays.neighbor_lengths).any()
    assert whole + split > 20


# --- early stopping, the best weights, rotation -------------------------------------------------------------------


def early(data: Path, out: Path, **changes: Any) -> RunConfig:
    """A run that learns its few documents by heart, so that the validation loss soon rises."""
    values: dict[str, Any] = {"steps": 60, "eval_every": 2, "save_every": 3, "patience": 3, **CONSTANT}
    return toy_run(data, out, **(values | changes))


def losses_of(out: Path) -> list[tuple[int, float]]:
    records = [line for line in lines(out / METRICS) if "valid_tokens" in line]
    return [(record["step"], record["valid_loss_on_nats"]) for record in records]


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped early. Not to be altered."""
    return train(early(data, tmp_path_factory.mktemp("models") / "stopped.model"))


def test_training_stops_when_patience_ends_and_the_model_is_the_best_one(
    stopped: Path, data: Path, tmp_path: Path
) -> None:
    losses = losses_of(stopped)
    values = [loss for _, loss in losses]
    best = int(np.argmin(values))
    assert len(losses) == best + 1 + 3, "three evaluations after the best one"
    best_step, last_step = losses[best][0], losses[-1][0]
    assert 2 < best_step < last_step < 60
    figures = load_model(stopped)[2]["training"]
    assert (figures["steps"], figures["best_step"]) == (last_step, best_step)
    assert figures["valid_loss_on_nats"] == min(values)
    # As a run that was asked for that many steps, to the bit.
    expected = train(early(data, tmp_path / "m", steps=best_step, patience=0))
    assert (stopped / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    for mode in ("on", "off", "shuffled"):
        key = f"test_loss_{mode}_nats"
        assert figures[key] == load_model(expected)[2]["training"][key]


def test_an_interrupted_run_stops_early_at_the_same_step(stopped: Path, data: Path, tmp_path: Path) -> None:
    last = losses_of(stopped)[-1][0]
    for step in (1, last - 3, last):
        out = interrupted(early(data, tmp_path / str(step)), step)
        assert_same(out, stopped)
        assert load_model(out)[2]["training"]["best_step"] == load_model(stopped)[2]["training"]["best_step"]


def test_a_run_that_stopped_early_is_finished_until_it_is_given_more_patience(
    stopped: Path, data: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(stopped, tmp_path / "m")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    train(early(data, out))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before
    last = losses_of(stopped)[-1][0]
    train(early(data, out, patience=0, keep_best=True, steps=last + 4))
    assert losses_of(out)[-1][0] == last + 4
    assert_same(out, train(early(data, tmp_path / "whole", patience=0, keep_best=True, steps=last + 4)))


def test_without_keep_best_the_model_is_the_last_one(stopped: Path, data: Path, tmp_path: Path) -> None:
    steps = losses_of(stopped)[-1][0]
    last = train(early(data, tmp_path / "last", patience=0, steps=steps))
    best = train(early(data, tmp_path / "best", patience=0, steps=steps, keep_best=True))
    assert lines(last / METRICS) == lines(best / METRICS) == lines(stopped / METRICS)
    assert (best / WEIGHTS).read_bytes() == (stopped / WEIGHTS).read_bytes() != (last / WEIGHTS).read_bytes()
    assert not list((last / TRAINING).glob("best-*"))
    [kept] = (best / TRAINING).glob("best-*")
    assert_close(safetensors.torch.load_file(kept), safetensors.torch.load_file(best / WEIGHTS), rtol=0, atol=0)


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked_for(data: Path, tmp_path: Path, keep: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(toy_run(data, tmp_path / "m", save_every=1, keep_checkpoints=keep), progress=stop_after(5))
    kept = sorted(path.name for path in (tmp_path / "m" / TRAINING).iterdir())
    assert kept == [f"step-{step:08d}" for step in range(6 - keep, 6)]


# --- samples ------------------------------------------------------------------------------------------------------


def test_a_sample_is_what_the_model_writes_after_a_validation_document(data: Path, tmp_path: Path) -> None:
    run = toy_run(data, tmp_path / "m", sample_tokens=20)
    out = train(run)
    samples = lines(out / SAMPLES)
    assert [sample["step"] for sample in samples] == [3, 6]
    assert samples[0]["prompt"] == samples[1]["prompt"]
    model, tokenizer, _ = load_model(out)
    opened = TrainingData(data)
    arrays, M = opened.arrays, opened.chunk_len
    document = next(
        d
        for d in opened.documents("valid").tolist()
        if not arrays.leads[d]
        and arrays.starts[d + 1] - arrays.starts[d] >= M
        and (arrays.neighbors[opened.chunk_starts[d] : opened.chunk_starts[d + 1]][:2, :2] >= 0).any()
    )
    ids = arrays.ids[arrays.starts[document] : arrays.starts[document + 1]].tolist()
    ids = ids[: min(len(ids) // M, 2) * M]
    texts = {}
    for chunk in range(len(ids) // M):
        rows = [row for row in arrays.neighbors[opened.chunk_starts[document] + chunk, :2].tolist() if row >= 0]
        tokens = [arrays.neighbor_ids[row, : min(int(arrays.neighbor_lengths[row]), 12)].tolist() for row in rows]
        texts[chunk] = [tokenizer.decode(few) for few in tokens]
    settings = GenerateConfig(max_new_tokens=20, num_neighbors=2, neighbor_len=12)
    [expected] = generate(model, tokenizer, [Prompt(ids, texts)], settings)
    assert samples[-1] == {
        "step": 6,
        "prompt": tokenizer.decode(ids),
        "neighbors": list(texts.values()),
        "continuation": expected.text,
    }


def test_samples_change_no_losses_and_come_once_after_going_on(data: Path, tmp_path: Path) -> None:
    without = train(toy_run(data, tmp_path / "without"))
    assert not (without / SAMPLES).exists()
    whole = train(toy_run(data, tmp_path / "whole", sample_tokens=8))
    assert_same(whole, without)
    run = toy_run(data, tmp_path / "m", sample_tokens=8, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=stop_after(4))
    # As after a kill: the newest checkpoint is lost, the sample after the one before is there.
    shutil.rmtree(tmp_path / "m" / TRAINING / "step-00000004")
    assert [sample["step"] for sample in lines(tmp_path / "m" / SAMPLES)] == [3]
    assert_same(train(run), whole, SAMPLES)


def test_a_decoder_without_cca_writes_samples_too(data: Path, tmp_path: Path) -> None:
    out = train(toy_run(data, tmp_path / "m", model={"cca_layers": ()}, sample_tokens=8))
    for sample in lines(out / SAMPLES):
        assert not any(sample["neighbors"])
        assert sample["prompt"]


# --- event files --------------------------------------------------------------------------------------------------


def test_event_files_hold_each_line_of_the_metrics_once(data: Path, tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    run = toy_run(data, tmp_path / "m", tensorboard=True, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=stop_after(3))
    # As after a kill: the newest checkpoint is lost, the lines after the one before are there.
    shutil.rmtree(tmp_path / "m" / TRAINING / "step-00000003")
    out = train(run)
    [path] = (out / TENSORBOARD).iterdir()
    events = [event for event in loader.LegacyEventFileLoader(str(path)).Load() if event.summary.value]
    found = [(event.step, event.summary.value[0].tag, event.summary.value[0].simple_value) for event in events]
    records = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    expected = [(r["step"], name, value) for r in records for name, value in r.items() if name != "step"]
    assert found == [(step, name, pytest.approx(value, rel=1e-6)) for step, name, value in expected]
    read_manifest(out, KIND)


# --- settings that may change -------------------------------------------------------------------------------------


def test_settings_that_may_change_do_and_the_losses_stay(data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "micro_batch_size": 1,
        "log_every": 2,
        "eval_every": 2,
        "eval_sequences": 2,
        "save_every": 3,
        "keep_checkpoints": 1,
        "patience": 5,
        "keep_best": True,
        "sample_tokens": 4,
        "prefetch": 0,
        "tensorboard": True,
        "device": "auto",
        "timeout_s": 10.0,
        "activation_checkpointing": True,
    }
    tested_elsewhere = {"data", "out", "steps", "init", "replay"}
    cannot_be_tested = {"wandb_project", "compile"}  # a service and a compiler
    assert set(CHANGEABLE) == {*changes, *tested_elsewhere, *cannot_be_tested}
    pytest.importorskip("tensorboard")
    whole = train(toy_run(data, tmp_path / "whole", save_every=2))
    with pytest.raises(KeyboardInterrupt):
        train(toy_run(data, tmp_path / "m"), progress=stop_after(3))
    train(toy_run(data, tmp_path / "m", **changes))
    found, expected = (
        safetensors.torch.load_file(next((out / TRAINING / "step-00000006").glob("*.safetensors")))
        for out in (tmp_path / "m", whole)
    )
    # Gradients of other micro batches are summed in another order.
    assert_close(found, expected, rtol=1e-4, atol=1e-6)


# --- one batch by heart -------------------------------------------------------------------------------------------

WIDE: dict[str, Any] = {"dim": 32, "encoder_dim": 32, "head_dim": 16, "ffw_dim": 128}


def test_a_sound_model_learns_one_batch_by_heart_and_nothing_is_written(data: Path, tmp_path: Path) -> None:
    run = toy_run(data, tmp_path / "m", model=WIDE, steps=200, learning_rate=1e-2)
    first, last, steps = overfit_batch(run)
    assert last < first / 4
    assert 1 < steps < 200
    assert list(tmp_path.iterdir()) == []
    again = replace(run, train=replace(run.train, out=""))
    assert overfit_batch(again) == (first, last, steps)


def test_a_model_that_does_not_learn_fails_the_check(data: Path, tmp_path: Path) -> None:
    run = toy_run(data, tmp_path / "m", steps=3, learning_rate=1e-9)
    told: list[int] = []
    with pytest.raises(
        TrainingError, match=r"fell from 5\.\d+ to 5\.\d+ nats in 3 steps, not below 1\.\d+: .*learning_rate"
    ):
        overfit_batch(run, progress=lambda p: told.append(p.step))
    assert told == [1, 2, 3]


# --- utilization --------------------------------------------------------------------------------------------------


def test_utilization_counts_encoder_and_cca_for_the_chunks_that_have_neighbors(data: Path, tmp_path: Path) -> None:
    run = toy_run(data, tmp_path / "m")
    batch = open_batches(TrainingData(data), "train", run).batch(0, 4)
    assert batch.keep_BLKR is not None

    def share_of_peak(keep_BLKR: torch.Tensor | None) -> float:
        return utilization(run, replace(batch, keep_BLKR=keep_BLKR), 0.5, 1e9)

    sizes: dict[str, Any] = {"seq_len": 32, "neighbor_len": 12}
    bare = forward_flops(run.model, num_neighbors=0, **sizes).total
    full = forward_flops(run.model, num_neighbors=2, **sizes).total
    every = torch.ones_like(batch.keep_BLKR)
    half = every.clone()
    half[:2] = False
    half[2:, :, 1] = False  # one neighbor of two makes encoder and CCA as dear as both
    for keep_BLKR, flops in ((None, bare), (every, full), (half, (bare + full) / 2), (~every, bare)):
        assert share_of_peak(keep_BLKR) == pytest.approx(4 * 3 * flops / 0.5 / 1e9, rel=1e-12)


# --- the command --------------------------------------------------------------------------------------------------

SMALL = [
    "model.dim=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.head_dim=8",
    "model.ffw_dim=32",
    "model.cca_layers=[2]",
    "model.encoder_dim=16",
    "model.encoder_layers=1",
    "model.encoder_heads=2",
    "model.encoder_head_dim=8",
    "model.encoder_ffw_dim=32",
    "model.chunk_len=16",
    "train.steps=2",
    "train.batch_size=2",
    "train.micro_batch_size=2",
    "train.seq_len=32",
    "train.neighbor_len=24",
    "train.eval_sequences=1",
    "train.sample_tokens=4",
    "train.device=cpu",
]
Command = Callable[..., Outcome]


def options(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def test_training_makes_its_data_first_and_uses_it_again(
    retro: Command, corpus: Path, tokenizer_folder: Path, tiny_index: Path, tmp_path: Path
) -> None:
    where = ["--data", tmp_path / "x.data", "--out", tmp_path / "x.model"]
    source = ["--corpus", corpus, "--index", tiny_index, "--tokenizer", tokenizer_folder]
    command = ["train", "--preset", "tiny", *where, *source, *options(*SMALL)]
    first = retro(*command)
    assert first.code == 0, first
    assert first.out.startswith(f"{tmp_path / 'x.model'}: trained for 2 steps; ")
    made = TrainingData(tmp_path / "x.data")
    assert (made.chunk_len, made.num_neighbors, made.neighbor_len) == (16, 2, 128)
    assert load_model(tmp_path / "x.model")[2]["training"]["data"] == "x.data"
    before = (tmp_path / "x.data" / MANIFEST).stat().st_mtime_ns
    again = retro(*command, "--overwrite", "--seed", 3)
    assert again.code == 0, again
    assert (tmp_path / "x.data" / MANIFEST).stat().st_mtime_ns == before
    assert load_model(tmp_path / "x.model")[2]["training"]["settings"]["seed"] == 3
    other = retro(*command, *options("train.num_neighbors=1"))
    assert other.code == 1
    assert "x.data was made differently (config.num_neighbors: 2 -> 1)" in other.err
    incomplete = retro("train", "--preset", "tiny", *where, "--corpus", corpus)
    assert incomplete.code == 1
    assert "--corpus needs --index, --tokenizer and one folder" in incomplete.err


def test_the_commands_options_are_settings(retro: Command, tmp_path: Path) -> None:
    several = retro(
        "train", "--preset", "tiny", "--data", "a b.data", "--data", "c.data", "--seed", 7, "--print-config"
    )
    train_settings = json.loads(several.out)["train"]
    assert (train_settings["data"], train_settings["seed"]) == (["a b.data", "c.data"], 7)
    (tmp_path / "x.toml").write_text(
        'preset = "tiny"\n[train]\ndata = ["a.data", "b.data"]\ndata_weights = [0.7, 0.3]\nneighbor_part = "chunk"\n'
    )
    file = retro("train", tmp_path / "x.toml", "--tensorboard", "--print-config")
    train_settings = json.loads(file.out)["train"]
    assert train_settings["data"] == ["a.data", "b.data"]
    assert train_settings["data_weights"] == [0.7, 0.3]
    assert train_settings["neighbor_part"] == "chunk"
    assert train_settings["tensorboard"] is True


def test_the_check_on_one_batch_fails_with_an_exit_code(retro: Command, data: Path, tmp_path: Path) -> None:
    settings = [*SMALL, "model.chunk_len=8", "train.neighbor_len=12"]
    command = ["train", "--preset", "tiny", "--data", data, "--out", tmp_path / "m", "--overfit-batch"]
    failed = retro(*command, *options(*settings))
    assert failed.code == 1
    assert "the loss of one batch fell from" in failed.err
    learned = retro(*command, *options(*settings, "train.steps=200", "train.learning_rate=0.02"))
    assert learned.code == 0, learned
    assert learned.out.startswith("The loss of one batch fell from 5.")
    assert list(tmp_path.iterdir()) == []
