"""Batches against a grid built token by token."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    CHUNK_LEN,
    ToyDocument,
    make_training_data,
    neighbor_number,
    neighbor_tokens,
    one_thread,
    random_documents,
    toy_tokenizer,
)
from torch.testing import assert_close

from retro.chunks import TrainingData
from retro.data import Batch, Batches, Retrieval
from retro.errors import ConfigError

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)
SEQ_LEN = 3 * CHUNK_LEN
K, R = 2, 11
Slot = tuple[int, int, bool]


def open_batches(data: TrainingData, split: str = "train", **changes: Any) -> Batches:
    options: dict[str, Any] = {"seq_len": SEQ_LEN, "num_neighbors": K, "neighbor_len": R, "seed": 5}
    return Batches(data, split, **(options | changes))


def naive_grid(document: ToyDocument) -> list[list[Slot]]:
    """Input, target and keep of every slot, chunk by chunk."""
    tokens = document.tokens
    slots: list[Slot] = [(0, 0, False)] * document.lead
    for place, token in enumerate(tokens):
        following = tokens[place + 1] if place + 1 < len(tokens) else toy_tokenizer().eos_id
        slots.append((token, following, True))
    while len(slots) % CHUNK_LEN:
        slots.append((0, 0, False))
    return [slots[i : i + CHUNK_LEN] for i in range(0, len(slots), CHUNK_LEN)]


def chunks_of(batch: Batch) -> list[tuple[int, list[Slot]]]:
    """Document and slots of every chunk of a batch."""
    B, T = batch.inputs_BT.shape
    found = []
    for b in range(B):
        for start in range(0, T, CHUNK_LEN):
            part = slice(start, start + CHUNK_LEN)
            slots = list(
                zip(
                    batch.inputs_BT[b, part].tolist(),
                    batch.targets_BT[b, part].tolist(),
                    batch.keep_BT[b, part].tolist(),
                    strict=True,
                )
            )
            found.append((int(batch.document_BL[b, start // CHUNK_LEN]), slots))
    return found


def neighbors_of(batch: Batch) -> list[list[list[int] | None]]:
    """Tokens of every chunk's neighbors, None for a missing one."""
    assert batch.neighbors_BLKR is not None
    assert batch.keep_BLKR is not None
    ids, keep = batch.neighbors_BLKR.flatten(0, 1), batch.keep_BLKR.flatten(0, 1)
    return [
        [ids[c, k][keep[c, k]].tolist() if keep[c, k].any() else None for k in range(ids.shape[1])]
        for c in range(len(ids))
    ]


EMPTY: list[Slot] = [(0, 0, False)] * CHUNK_LEN


@pytest.mark.parametrize("seed", range(6))
def test_an_epoch_is_every_chunk_of_the_split_once_in_the_order_of_its_documents(seed: int, tmp_path: Path) -> None:
    documents, neighbors = random_documents(seed, counts={"train": 9, "valid": 3, "test": 2})
    batches = open_batches(make_training_data(tmp_path / "d", documents, neighbors), seed=seed)
    for epoch in range(2):
        n = batches.sequences_per_epoch
        found = chunks_of(batches.batch(epoch * n, n))
        order = list(dict.fromkeys(document for document, _ in found if document >= 0))
        assert sorted(order) == [i for i, d in enumerate(documents) if d.split == "train"]
        expected = [(number, chunk) for number in order for chunk in naive_grid(documents[number])]
        assert found[: len(expected)] == expected
        filling = found[len(expected) :]
        assert len(filling) < SEQ_LEN // CHUNK_LEN
        assert filling == [(-1, EMPTY)] * len(filling)


@pytest.mark.parametrize("seed", range(4))
def test_each_chunk_has_its_own_neighbors_cut_after_r_tokens(seed: int, tmp_path: Path) -> None:
    documents, neighbors = random_documents(seed, counts={"train": 9, "valid": 3})
    batches = open_batches(make_training_data(tmp_path / "d", documents, neighbors))
    batch = batches.batch(0, batches.sequences_per_epoch)
    seen: dict[int, int] = {}
    for (document, _), found in zip(chunks_of(batch), neighbors_of(batch), strict=True):
        local = seen.get(document, 0)
        seen[document] = local + 1
        chosen = documents[document].neighbors[local][:K] if document >= 0 else [-1] * K
        assert found == [neighbors[u][:R] if u >= 0 else None for u in chosen]


def test_a_missing_neighbor_is_never_the_last_one_of_the_data(tmp_path: Path) -> None:
    documents = [ToyDocument(list(range(2, 9)), [[0, -1]]), ToyDocument(list(range(2, 9)), [[-1, -1]])]
    data = make_training_data(tmp_path / "d", documents, [neighbor_tokens(0, 5)])
    batch = open_batches(data, seq_len=CHUNK_LEN, permute=False).batch(0, 2)
    assert batch.neighbors_BLKR is not None
    assert batch.keep_BLKR is not None
    assert batch.keep_BLKR[:, 0].any(dim=-1).tolist() == [[True, False], [False, False]]
    assert not batch.neighbors_BLKR[~batch.keep_BLKR].any()


def test_data_without_any_neighbor_gives_all_missing(tmp_path: Path) -> None:
    data = make_training_data(tmp_path / "d", [ToyDocument(list(range(2, 9)), [[-1, -1]])] * 2, [])
    for neighbors in ("on", "shuffled"):
        batch = open_batches(data).batch(0, 1, neighbors=neighbors)
        assert batch.keep_BLKR is not None
        assert not batch.keep_BLKR.any()


def test_loss_counts_in_every_kept_slot_and_eos_is_a_target_only(tmp_path: Path) -> None:
    documents, neighbors = random_documents(3, counts={"train": 20})
    batches = open_batches(make_training_data(tmp_path / "d", documents, neighbors))
    batch = batches.batch(0, batches.sequences_per_epoch)
    eos = toy_tokenizer().eos_id
    assert torch.equal(batch.loss_BT, batch.keep_BT)
    assert int(batch.loss_BT.sum()) == sum(len(d.tokens) for d in documents)
    assert not (batch.inputs_BT == eos).any()
    assert int((batch.targets_BT == eos).sum()) == len(documents)


def test_a_document_longer_than_a_sequence_goes_on_in_the_next(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(2, 258, 5 * CHUNK_LEN).tolist()
    data = make_training_data(tmp_path / "d", [ToyDocument(ids, [[-1, -1]] * 6)], [])
    batch = open_batches(data, seq_len=2 * CHUNK_LEN).batch(0, 3)
    assert batch.document_BL.tolist() == [[0, 0], [0, 0], [0, 0]]
    assert batch.inputs_BT[batch.keep_BT].tolist() == [toy_tokenizer().bos_id, *ids]
    assert batch.targets_BT[batch.loss_BT].tolist() == [*ids, toy_tokenizer().eos_id]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[ToyDocument], TrainingData]:
    documents, neighbors = random_documents(11, counts={"train": 60, "valid": 20, "test": 5}, max_tokens=60)
    return documents, make_training_data(tmp_path_factory.mktemp("data") / "d", documents, neighbors)


@pytest.mark.parametrize("neighbors", ["on", "off", "shuffled"])
def test_a_sequence_is_the_same_alone_and_in_any_batch(
    many: tuple[list[ToyDocument], TrainingData], neighbors: Retrieval
) -> None:
    batches, again = open_batches(many[1]), open_batches(many[1])
    first = batches.sequences_per_epoch - 2  # into the next epoch
    whole = batches.batch(first, 5, neighbor_dropout=0.5, neighbors=neighbors)
    for place, part in enumerate(whole.split(1)):
        again.batch(7 * place, 1)
        single = again.batch(first + place, 1, neighbor_dropout=0.5, neighbors=neighbors)
        assert single.tensors().keys() == part.tensors().keys()
        for name, tensor in single.tensors().items():
            assert_close(tensor, part.tensors()[name], rtol=0, atol=0)


def test_epochs_and_seeds_order_the_documents_differently(many: tuple[list[ToyDocument], TrainingData]) -> None:
    batches = open_batches(many[1])
    n = batches.sequences_per_epoch
    orders = [batches.batch(0, n), batches.batch(n, n), open_batches(many[1], seed=6).batch(0, n)]
    distinct = {tuple(batch.document_BL.flatten().tolist()) for batch in orders}
    assert len(distinct) == 3


def test_without_permutation_documents_keep_their_order_in_every_epoch(
    many: tuple[list[ToyDocument], TrainingData],
) -> None:
    batches = open_batches(many[1], "valid", permute=False)
    n = batches.sequences_per_epoch
    for first in (0, n):
        order = [d for d in batches.batch(first, n).document_BL.flatten().tolist() if d >= 0]
        assert order == sorted(order)


def test_dropout_takes_all_neighbors_of_its_share_of_the_sequences(
    many: tuple[list[ToyDocument], TrainingData],
) -> None:
    batches = open_batches(many[1])
    n = 10 * batches.sequences_per_epoch
    full = batches.batch(0, n).keep_BLKR
    dropped = batches.batch(0, n, neighbor_dropout=0.25).keep_BLKR
    assert full is not None
    assert dropped is not None
    had = full.flatten(1).any(dim=1)
    has = dropped.flatten(1).any(dim=1)
    assert torch.equal(dropped[has], full[has])
    share = 1 - has.sum().item() / had.sum().item()
    deviation = (0.25 * 0.75 / had.sum().item()) ** 0.5
    assert abs(share - 0.25) < 3 * deviation


@pytest.mark.parametrize("split", ["train", "valid"])
def test_shuffled_neighbors_are_those_of_a_chunk_of_another_document_of_the_split(
    many: tuple[list[ToyDocument], TrainingData], split: str
) -> None:
    documents, data = many
    owner = {u: (d, c) for d, doc in enumerate(documents) for c, row in enumerate(doc.neighbors) for u in row if u >= 0}
    batches = open_batches(data, split)
    n = batches.sequences_per_epoch
    own, shuffled = batches.batch(0, n), batches.batch(0, n, neighbors="shuffled")
    assert torch.equal(own.inputs_BT, shuffled.inputs_BT)
    given = 0
    for (document, _), ours, others in zip(chunks_of(own), neighbors_of(own), neighbors_of(shuffled), strict=True):
        assert [x is None for x in ours] == [x is None for x in others]
        owners = {owner[neighbor_number(x)] for x in others if x is not None}
        assert len(owners) <= 1
        for other, _ in owners:
            given += 1
            assert other != document
            assert documents[other].split == split
    assert given > 20


def test_shuffling_finds_the_only_chunk_of_the_split_that_has_as_many_neighbors(tmp_path: Path) -> None:
    poor = [ToyDocument(list(range(2, 9)), [[-1, -1]], split="valid") for _ in range(300)]
    rich = [ToyDocument(list(range(2, 9)), [[2 * i, 2 * i + 1]], split="train" if i < 7 else "valid") for i in range(9)]
    neighbors = [neighbor_tokens(u, 4) for u in range(18)]
    data = make_training_data(tmp_path / "d", [*poor, *rich], neighbors)
    batches = open_batches(data, "valid", seq_len=CHUNK_LEN, permute=False)
    batch = batches.batch(300, 2, neighbors="shuffled")
    assert neighbors_of(batch) == [neighbors[16:18], neighbors[14:16]]


def test_shuffling_takes_the_other_splits_only_where_its_own_has_nothing(tmp_path: Path) -> None:
    documents = [ToyDocument(list(range(2, 9)), [[i]], split="train" if i else "valid") for i in range(3)]
    neighbors = [neighbor_tokens(u, 4) for u in range(3)]
    data = make_training_data(tmp_path / "d", documents, neighbors)
    found = neighbors_of(open_batches(data, "valid", num_neighbors=1).batch(0, 1, neighbors="shuffled"))[0]
    assert found in ([neighbors[1]], [neighbors[2]])


def test_shuffling_one_document_alone_is_refused(tmp_path: Path) -> None:
    data = make_training_data(tmp_path / "d", [ToyDocument(list(range(2, 9)), [[0]])], [neighbor_tokens(0, 4)])
    with pytest.raises(ConfigError, match="cannot be shuffled"):
        open_batches(data, num_neighbors=1).batch(0, 1, neighbors="shuffled")


def test_off_means_no_neighbors_at_all(many: tuple[list[ToyDocument], TrainingData]) -> None:
    batch = open_batches(many[1]).batch(0, 2, neighbors="off")
    assert batch.neighbors_BLKR is None
    assert batch.keep_BLKR is None
    assert open_batches(many[1], num_neighbors=0).batch(0, 2).neighbors_BLKR is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 3 * CHUNK_LEN + 1}, r"seq_len = 25 is no multiple of the 8 .* set it to 24"),
        ({"seq_len": 4}, "set it to 8"),
        ({"num_neighbors": 4}, "num_neighbors = 4, but .* holds 3"),
        ({"neighbor_len": 17}, "neighbor_len = 17, but .* after 16"),
    ],
)
def test_settings_that_the_data_cannot_serve_are_refused(
    many: tuple[list[ToyDocument], TrainingData], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_batches(many[1], **changes)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    data = make_training_data(tmp_path / "d", [ToyDocument([2], [[-1, -1]])], [])
    with pytest.raises(ConfigError, match="no document in the split 'valid'"):
        open_batches(data, "valid")
