"""The kNN-LM against brute force over its datastore, token by token."""

import math
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from builders import plain_document, toy_model_config

from eval.knn_lm import Datastore, KnnConfig, build_datastore, measure_knn_lm, mixed_losses
from eval.language_modeling import Window, read_eval_documents, score
from eval.lm_record import Opened
from retro.chunks import Document
from retro.errors import ConfigError, MismatchError
from retro.model import Retro
from retro.tokenizer import Tokenizer

M = 4
STORE = [
    "the cat sat on the mat and the dog sat on the log, and that was that for the day",
    "when the rain comes the cat and the dog go home, said the book",
    "a thin red line on the thin white paper of the other book that nobody reads any more in town",
]
TEST = ["the cat sat on the log and the dog go home", "the thin red book"]
WINDOW = Window(length=64, stride=32)
one_thread = pytest.fixture(autouse=True)(builders.one_thread)


def documents(texts: list[str]) -> list[Document]:
    return [plain_document(number, text) for number, text in enumerate(texts)]


@pytest.fixture
def opened() -> Opened:
    tokenizer = Tokenizer.train(STORE * 3, 300)
    model = Retro(toy_model_config(vocab_size=300, chunk_len=M, cca_layers=(1, 2)))
    model.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    return Opened(name="toy", model=model.eval(), tokenizer=tokenizer, fingerprint="f0", retrieves=True)


def test_losses_equal_brute_force_over_the_datastore(opened: Opened, tmp_path: Path) -> None:
    store = build_datastore(opened, documents(STORE), tmp_path / "x.datastore", window=WINDOW)
    config = KnnConfig(num_neighbors=5, share=0.3, temperature=2.0, window=64, stride=32)
    record, units = measure_knn_lm(opened, documents(TEST), store, config)

    def hidden(text: str) -> tuple[np.ndarray[Any, Any], list[int]]:
        ids = [opened.tokenizer.bos_id, *opened.tokenizer.encode(text).ids.tolist()]
        T = -(-len(ids) // M) * M
        inputs = torch.tensor([ids + [0] * (T - len(ids))])
        keep = torch.tensor([[True] * len(ids) + [False] * (T - len(ids))])
        with torch.no_grad():
            states = opened.model.hidden(inputs, keep_BT=keep)[0, : len(ids) - 1]
        return states, ids[1:]

    keys, values = [], []
    for text in STORE:
        states, targets = hidden(text)
        keys += list(np.asarray(states).astype(np.float16).astype(np.float64))
        values += targets
    assert len(store) == len(values)
    expected = []
    for text in TEST:
        states, targets = hidden(text)
        total = 0.0
        for state, target in zip(states, targets, strict=True):
            distances = sorted(
                (float(((key - np.asarray(state).astype(np.float64)) ** 2).sum()), value)
                for key, value in zip(keys, values, strict=True)
            )[:5]
            weights = [math.exp(-distance / 2.0) for distance, _ in distances]
            p_knn = sum(w for w, (_, v) in zip(weights, distances, strict=True) if v == target) / sum(weights)
            p_lm = float(torch.softmax(opened.model.logits(state[None]).detach(), dim=-1)[0, target])
            total -= math.log(0.7 * p_lm + 0.3 * p_knn)
        expected.append(total)
    assert units["loss_on_nats"] == pytest.approx(expected, rel=1e-5)
    read = read_eval_documents(documents(TEST), opened.tokenizer, M, retriever=None, num_neighbors=0)
    off = score(opened.model, read, mode="off", window=WINDOW)
    assert units["loss_off_nats"] == pytest.approx([float(s.loss_n.sum()) for s in off], rel=1e-6)
    bits = record.figures["bits per byte, kNN-LM"].value
    assert bits == pytest.approx(sum(expected) / math.log(2) / sum(len(text) for text in TEST), rel=1e-5)


def test_a_text_that_stands_in_the_datastore_is_predicted_better(opened: Opened, tmp_path: Path) -> None:
    store = build_datastore(opened, documents(STORE), tmp_path / "x.datastore", window=WINDOW)
    record, _ = measure_knn_lm(opened, documents(STORE[:2]), store, KnnConfig(share=0.5, window=64, stride=32))
    difference = record.figures["kNN-LM against the decoder alone"]
    assert difference.high is not None
    assert difference.high < -50


def test_share_and_temperature_are_chosen_on_other_documents(opened: Opened, tmp_path: Path) -> None:
    store = build_datastore(opened, documents(STORE), tmp_path / "x.datastore", window=WINDOW)
    config = KnnConfig(num_neighbors=5, window=64, stride=32)
    record, _ = measure_knn_lm(opened, documents(TEST), store, config, tuning=documents(STORE))
    assert record.configuration["share"] == 0.5
    (curve,) = record.curves.values()
    (values,) = curve.series.values()
    assert min(v for v in values if v is not None) == values[-1]
    measured = [
        measure_knn_lm(
            opened, documents(STORE), store, KnnConfig(num_neighbors=5, share=0.5, temperature=t, window=64, stride=32)
        )
        for t in (0.3, record.configuration["temperature"], 100.0)
    ]
    bits = [found.figures["bits per byte, kNN-LM"].value for found, _ in measured]
    assert min(b for b in bits if b is not None) == bits[1]


def test_mixed_losses_by_hand() -> None:
    inf = math.inf
    loss = np.array([math.log(4), math.log(4), 1000.0, math.log(4)])
    distances = np.array([[0.0, 0.0, inf], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [inf, inf, inf]])
    tokens = np.array([[7, 3, -1], [7, 7, 7], [1, 1, 1], [-1, -1, -1]])
    found = mixed_losses(loss, distances, tokens, np.array([7, 3, 5, 7]), 0.5, 1.0)
    expected = [-math.log(0.5 * 0.25 + 0.5 * 0.5), -math.log(0.125), 1000.0 + math.log(2), math.log(4)]
    assert found.tolist() == pytest.approx(expected)


def test_the_same_datastore_is_opened_again_and_another_is_refused(opened: Opened, tmp_path: Path) -> None:
    folder = tmp_path / "x.datastore"
    build_datastore(opened, documents(STORE), folder, window=WINDOW)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    assert len(build_datastore(opened, documents(STORE), folder, window=WINDOW)) == len(Datastore(folder))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    with pytest.raises(ConfigError, match="differently"):
        build_datastore(opened, documents(STORE[:1]), folder, window=WINDOW)
    other = Opened(name="other", model=opened.model, tokenizer=opened.tokenizer, fingerprint="f1", retrieves=True)
    with pytest.raises(MismatchError, match="made by another model"):
        measure_knn_lm(other, documents(TEST), Datastore(folder), KnnConfig())


@pytest.mark.parametrize("values", [{"share": 1.0}, {"share": -0.1}, {"temperature": 0.0}, {"num_neighbors": 0}])
def test_settings_that_cannot_work_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        KnnConfig(**values)
