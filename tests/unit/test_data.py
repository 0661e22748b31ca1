"""Batches against a grid built token by token."""

import threading
from collections.abc import Iterator
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
    toy_model_config,
    toy_tokenizer,
)
from torch.testing import assert_close

from retro.artifact import MANIFEST, read_json, write_json
from retro.chunks import TrainingData
from retro.config import NeighborPart, RunConfig, TrainConfig
from retro.data import Batch, Batches, Retrieval, prefetched
from retro.errors import ConfigError, MismatchError
from retro.mixture import LONGEST_PERIOD, Mixture, corpus_seed, open_corpora

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
    whole = batches.batch(first, 5, neighbor_dropout=0.4, copy_share=0.4, neighbors=neighbors)
    for place, part in enumerate(whole.split(1)):
        again.batch(7 * place, 1)
        single = again.batch(first + place, 1, neighbor_dropout=0.4, copy_share=0.4, neighbors=neighbors)
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


# --- parts of neighbors -------------------------------------------------------------------------------------------


def test_a_part_of_a_neighbor_is_its_tokens_before_or_after_the_end_of_its_chunk(tmp_path: Path) -> None:
    documents, neighbors = random_documents(2, counts={"train": 12})
    data = make_training_data(tmp_path / "d", documents, neighbors)
    lengths = [min(len(ids), CHUNK_LEN) for ids in neighbors]
    parts = {
        "chunk": [ids[:n][:R] for ids, n in zip(neighbors, lengths, strict=True)],
        "continuation": [ids[n:][:R] for ids, n in zip(neighbors, lengths, strict=True)],
    }
    assert any(not ids for ids in parts["continuation"])
    assert max(map(len, parts["continuation"])) > R - CHUNK_LEN, "cutting to R tokens first would pass"
    whole = open_batches(data)
    placed = [
        (int(document), chunk)
        for document in range(len(documents))
        for chunk in range(len(documents[document].neighbors))
    ]
    for part, expected in parts.items():
        batches = open_batches(data, neighbor_part=part)
        for document, chunk in placed:
            chosen = documents[document].neighbors[chunk][:K]
            assert batches.neighbors_of(document, chunk) == [expected[u] for u in chosen if u >= 0 and expected[u]]
            assert whole.neighbors_of(document, chunk) == [neighbors[u][:R] for u in chosen if u >= 0]
        batch = batches.batch(0, batches.sequences_per_epoch)
        seen: dict[int, int] = {}
        for (document, _), found in zip(chunks_of(batch), neighbors_of(batch), strict=True):
            local = seen.get(document, 0)
            seen[document] = local + 1
            chosen = documents[document].neighbors[local][:K] if document >= 0 else [-1] * K
            assert found == [(expected[u] or None) if u >= 0 else None for u in chosen]


@pytest.mark.parametrize("part", ["chunk", "continuation"])
def test_data_that_does_not_know_its_neighbors_parts_trains_with_both_only(part: NeighborPart, tmp_path: Path) -> None:
    documents, neighbors = random_documents(3, counts={"train": 4})
    folder = make_training_data(tmp_path / "d", documents, neighbors).folder
    name = "neighbors/neighbor_chunk_lengths.npy"
    (folder / name).unlink()
    manifest = read_json(folder / MANIFEST)
    del manifest["files"][name]
    write_json(folder / MANIFEST, manifest)
    data = TrainingData(folder)
    assert open_batches(data).batch(0, 1).neighbors_BLKR is not None
    open_batches(data, num_neighbors=0, neighbor_part=part)
    with pytest.raises(ConfigError, match=f"neighbor_part = '{part}', but .* made by an older version .*make it again"):
        open_batches(data, neighbor_part=part)


# --- mixtures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[TrainingData]:
    """Three corpora of different sizes."""
    folder = tmp_path_factory.mktemp("corpora")
    return [
        make_training_data(folder / f"{n}.data", *random_documents(20 + n, counts={"train": count, "valid": 2}))
        for n, count in enumerate((3, 10, 25))
    ]


def mixture(corpora: list[TrainingData], weights: tuple[float, ...] = ()) -> Mixture:
    return Mixture([open_batches(data, seed=corpus_seed(5, n)) for n, data in enumerate(corpora)], weights)


_GENERATOR = np.random.default_rng(0)
WEIGHTS: list[list[float]] = [
    *([0.7, 0.3], [1.0, 1.0, 1.0], [0.5, 0.25, 0.25], [1e-3, 0.999], [2.5, 0.1, 7.0, 0.3], [1.0]),
    *((_GENERATOR.integers(1, 50, _GENERATOR.integers(2, 8)) / 10).tolist() for _ in range(20)),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_after_any_number_of_sequences_each_corpus_has_its_share_to_less_than_one(
    weights: list[float], corpora: list[TrainingData]
) -> None:
    mixed = Mixture([open_batches(corpora[0])] * len(weights), weights)
    n = 3 * sum(mixed.order.period) + 7
    corpus_N, number_N = mixed.order.turns(0, n)
    for corpus, weight in enumerate(weights):
        due_N = weight / sum(weights) * np.arange(1, n + 1)
        assert np.abs(np.cumsum(corpus_N == corpus) - due_N).max() < 1 - 1e-9 or len(weights) == 1
        assert number_N[corpus_N == corpus].tolist() == list(range(int((corpus_N == corpus).sum())))
    far = 10**12 + 3
    corpus_B, number_B = mixed.order.turns(far, 50)
    for corpus, number in zip(corpus_B.tolist(), number_B.tolist(), strict=True):
        assert abs(number - weights[corpus] / sum(weights) * far) < 51


def test_weights_without_a_short_period_are_rounded(corpora: list[TrainingData]) -> None:
    mixed = mixture(corpora, (0.123456789, 1e-9, 0.7))
    assert sum(mixed.order.period) <= LONGEST_PERIOD + 2
    assert mixed.shares == pytest.approx([0.123456789 / 0.823456790, 1 / LONGEST_PERIOD, 0.7 / 0.823456790], abs=2e-5)


def test_without_weights_every_corpus_is_read_equally_often(corpora: list[TrainingData]) -> None:
    mixed = mixture(corpora)
    sizes = [open_batches(data).sequences_per_epoch for data in corpora]
    assert mixed.sequences_per_epoch == sum(sizes)
    for epoch in range(3):
        corpus_N, _ = mixed.order.turns(epoch * sum(sizes), sum(sizes))
        assert np.bincount(corpus_N).tolist() == sizes


@pytest.mark.parametrize("neighbors", ["on", "off", "shuffled"])
def test_a_mixtures_sequences_are_those_of_its_corpora_in_any_company(
    corpora: list[TrainingData], neighbors: Retrieval
) -> None:
    mixed, again = mixture(corpora, (0.2, 0.3, 0.5)), mixture(corpora, (0.2, 0.3, 0.5))
    first, size = 17, 40
    drawn: dict[str, Any] = {"neighbor_dropout": 0.4, "copy_share": 0.4, "neighbors": neighbors}
    whole = mixed.batch(first, size, **drawn)
    parts = list(whole.split(1))
    corpus_B, number_B = mixed.order.turns(first, size)
    assert len(set(corpus_B.tolist())) == 3
    assert any(int(number_B[corpus_B == n].max()) > open_batches(corpora[n]).sequences_per_epoch for n in range(3))
    for place, (corpus, number) in enumerate(zip(corpus_B.tolist(), number_B.tolist(), strict=True)):
        own = open_batches(corpora[corpus], seed=corpus_seed(5, corpus))
        expected = own.batch(number, 1, **drawn).tensors()
        assert_close(parts[place].tensors(), expected, rtol=0, atol=0)
        alone = again.batch(first + place, 1, **drawn)
        assert_close(alone.tensors(), expected, rtol=0, atol=0)


def test_two_corpora_alike_lose_the_neighbors_of_different_sequences(corpora: list[TrainingData]) -> None:
    mixed = mixture([corpora[2], corpora[2]], (1, 1))
    keep_BLKR = mixed.batch(0, 60, neighbor_dropout=0.5).keep_BLKR
    assert keep_BLKR is not None
    has_B = keep_BLKR.flatten(1).any(dim=1)
    assert not torch.equal(has_B[::2], has_B[1::2])


def test_corpora_are_named_by_their_folders(corpora: list[TrainingData], tmp_path: Path) -> None:
    twin = tmp_path / "1.data"
    twin.symlink_to(corpora[1].folder)
    folders = [str(folder) for folder in (corpora[0].folder, corpora[1].folder, twin)]
    assert list(open_corpora(folders)) == ["0", "1", "12"]


def test_corpora_that_cannot_train_one_model_are_a_mismatch(corpora: list[TrainingData], tmp_path: Path) -> None:
    documents, neighbors = random_documents(1, counts={"train": 3})
    one_chunk = [ToyDocument(document.ids, [[-1]] * 9) for document in documents]
    for document in one_chunk:
        del document.neighbors[-(-(len(document.ids) + 1) // 4) :]
    other = make_training_data(tmp_path / "other.data", [d for d in one_chunk if len(d.ids) < 32], [], chunk_len=4)
    with pytest.raises(MismatchError, match=r"0\.data has chunks of 8 and .*other\.data 4: .* make one of them again"):
        open_corpora([str(corpora[0].folder), str(other.folder)])


# --- copied neighbors ---------------------------------------------------------------------------------------------


def windows(document: ToyDocument, chunk: int, neighbor_len: int, part: NeighborPart = "both") -> dict[int, list[int]]:
    """What a copied neighbor of a chunk may hold, by how far it is shifted; nothing for a chunk that can have no neighbor."""
    grid: list[int | None] = (
        [None] * document.lead + [None] + list(document.ids)
    )  # of the second None, BOS, nobody reads
    own = grid[chunk * CHUNK_LEN : (chunk + 1) * CHUNK_LEN]
    if len(own) < CHUNK_LEN or all(token is None for token in own):
        return {}
    room = neighbor_len - (CHUNK_LEN if part == "both" else 0)
    found = {}
    for shift in range(-min(CHUNK_LEN // 2, room // 2), CHUNK_LEN // 2 + 1):
        begin = (chunk + (part == "continuation")) * CHUNK_LEN + shift
        tokens = [
            token for place, token in enumerate(grid) if begin <= place < (chunk + 2) * CHUNK_LEN and token is not None
        ]
        found[shift] = tokens[:neighbor_len]
    return found


@pytest.mark.parametrize("part", ["both", "continuation"])
@pytest.mark.parametrize("neighbor_len", [11, 16])
def test_a_copied_neighbor_is_a_window_over_its_chunk_and_the_next_in_the_place_of_one(
    part: NeighborPart, neighbor_len: int, tmp_path: Path
) -> None:
    documents, neighbors = random_documents(7, counts={"train": 120}, max_tokens=60)
    data = make_training_data(tmp_path / "d", documents, neighbors)
    batches = open_batches(data, neighbor_len=neighbor_len, neighbor_part=part)
    n = batches.sequences_per_epoch
    usual, copied = batches.batch(0, n), batches.batch(0, n, copy_share=1.0)
    for name in ("inputs_BT", "targets_BT", "keep_BT", "loss_BT", "document_BL"):
        assert torch.equal(getattr(usual, name), getattr(copied, name))
    assert copied.neighbors_BLKR is not None
    assert copied.keep_BLKR is not None
    assert not copied.neighbors_BLKR[~copied.keep_BLKR].any()
    seen: dict[int, int] = {}
    places, shifts, ends = set(), set(), 0
    for (document, _), before, after in zip(chunks_of(usual), neighbors_of(usual), neighbors_of(copied), strict=True):
        local = seen.get(document, 0)
        seen[document] = local + 1
        possible = windows(documents[document], local, neighbor_len, part) if document >= 0 else {}
        if not any(possible.values()):
            assert before == after
            continue
        changed = [k for k in range(K) if before[k] != after[k]]
        if part == "both" or changed:
            (place,) = changed
            fitting = {shift for shift, tokens in possible.items() if tokens == after[place]}
            assert fitting
            places.add(place)
            shifts |= fitting if len(fitting) == 1 else set()
            ends += (local + 1) * CHUNK_LEN == documents[document].lead + len(documents[document].tokens)
        else:  # the shifted window has nothing left of the last chunk
            assert [] in possible.values()
    assert places == set(range(K))
    assert shifts == set(windows(ToyDocument(list(range(2, 50)), []), 1, neighbor_len, part))
    assert ends or part == "continuation", "no document ends with a finished chunk: that case is untested"


def test_an_unshifted_copy_is_what_stands_in_the_chunk_and_what_those_who_see_it_predict(tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(2, 258, 6 * CHUNK_LEN - 1).tolist()
    data = make_training_data(tmp_path / "d", [ToyDocument(ids, [[-1, -1]] * 6)], [])
    batch = open_batches(data, seq_len=6 * CHUNK_LEN, neighbor_len=2 * CHUNK_LEN).batch(0, 40, copy_share=1.0)
    found = neighbors_of(batch)
    targets_BT = batch.targets_BT
    unshifted = 0
    for b in range(40):
        for chunk in range(1, 5):
            own = batch.inputs_BT[b, chunk * CHUNK_LEN : (chunk + 1) * CHUNK_LEN].tolist()
            seeing = slice((chunk + 1) * CHUNK_LEN - 1, (chunk + 2) * CHUNK_LEN - 1)
            unshifted += own + targets_BT[b, seeing].tolist() in found[6 * b + chunk]
    # One of 9 shifts is none: of 160 draws 17.8 are expected, give or take 4.
    assert 6 <= unshifted <= 34


def copying(batches: Batches, n: int, share: float, dropout: float = 0.0) -> list[bool]:
    """Which of the first n sequences copy."""
    usual = batches.batch(0, n, neighbor_dropout=dropout)
    copied = batches.batch(0, n, neighbor_dropout=dropout, copy_share=share)
    return [
        any(not torch.equal(a, b) for a, b in zip(one.tensors().values(), two.tensors().values(), strict=True))
        for one, two in zip(usual.split(1), copied.split(1), strict=True)
    ]


def test_the_share_of_the_sequences_copies_those_of_less_are_among_those_of_more_and_none_is_dropped(
    many: tuple[list[ToyDocument], TrainingData],
) -> None:
    batches = open_batches(many[1])
    n = 12 * batches.sequences_per_epoch
    able = np.array(copying(batches, n, 1.0))
    assert able.mean() > 0.9
    few, more = (np.array(copying(batches, n, share, dropout=0.3)) for share in (0.1, 0.7))
    assert not (few & ~more).any()
    for share, found in ((0.1, few), (0.7, more)):
        expected = int(able.sum())
        assert abs(found.sum() / expected - share) < 3 * (share * (1 - share) / expected) ** 0.5
    # The two shares leave nothing here: what does not copy has no neighbors.
    both_BLKR = batches.batch(0, n, neighbor_dropout=0.3, copy_share=0.7).keep_BLKR
    assert both_BLKR is not None
    assert not both_BLKR[torch.from_numpy(able & ~more)].any()


@pytest.mark.parametrize("neighbors", ["on", "shuffled"])
def test_without_copies_batches_are_those_they_were(
    many: tuple[list[ToyDocument], TrainingData], neighbors: Retrieval
) -> None:
    batches = open_batches(many[1])
    n = 2 * batches.sequences_per_epoch
    usual = batches.batch(0, n, neighbor_dropout=0.4, neighbors=neighbors)
    none = batches.batch(0, n, neighbor_dropout=0.4, copy_share=0.0, neighbors=neighbors)
    assert_close(none.tensors(), usual.tensors(), rtol=0, atol=0)
    # The draws of a sequence are its own: those that do not copy are untouched by those that do.
    some = batches.batch(0, n, neighbor_dropout=0.4, copy_share=0.3, neighbors=neighbors)
    untouched = 0
    for ours, theirs in zip(some.split(1), usual.split(1), strict=True):
        untouched += all(
            torch.equal(a, b) for a, b in zip(ours.tensors().values(), theirs.tensors().values(), strict=True)
        )
    assert 0.5 * n < untouched < n


def test_without_retrieval_there_is_nothing_to_copy_into(many: tuple[list[ToyDocument], TrainingData]) -> None:
    plain = open_batches(many[1], num_neighbors=0).batch(0, 4, copy_share=1.0)
    assert plain.neighbors_BLKR is None
    assert open_batches(many[1]).batch(0, 4, copy_share=1.0, neighbors="off").neighbors_BLKR is None


@pytest.mark.parametrize("split", ["valid", "test"])
def test_what_is_held_out_is_never_copied(many: tuple[list[ToyDocument], TrainingData], split: str) -> None:
    with pytest.raises(ConfigError, match=f"copy_share = 0.5 in the split '{split}'"):
        open_batches(many[1], split).batch(0, 1, copy_share=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"copy_share": 1.5}, "copy_share = 1.5: give a share between 0 and 1"),
        ({"final_copy_share": -0.1}, "final_copy_share = -0.1: give a share between 0 and 1"),
        ({"copy_share": float("nan")}, "copy_share = nan: give a share between 0 and 1"),
        ({"copy_share": 0.95}, "copy_share = 0.95 and neighbor_dropout = 0.1: no sequence is both"),
        ({"final_copy_share": 0.2, "neighbor_part": "chunk"}, "neighbor_part = 'chunk' leaves the continuation out"),
        ({"copy_share": 0.2, "neighbor_len": CHUNK_LEN}, "neighbor_len = 8 ends with the 8 tokens of a chunk.* to 16"),
    ],
)
def test_settings_with_which_nothing_can_be_copied_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(model=toy_model_config(), train=TrainConfig(**settings))


def test_settings_with_which_copying_makes_sense_are_taken() -> None:
    last: dict[str, Any] = {"neighbor_part": "continuation", "neighbor_len": 1, "final_copy_share": 0.9}
    for settings in (last, {"copy_share": 0.9}, {"neighbor_part": "chunk", "neighbor_len": 3}):
        RunConfig(model=toy_model_config(), train=TrainConfig(**settings))


def test_the_share_goes_from_the_first_step_to_the_last_on_a_line() -> None:
    config = TrainConfig(copy_share=0.25, final_copy_share=0.05, steps=5)
    assert [config.copy_share_at(step) for step in range(1, 6)] == pytest.approx(
        [0.25, 0.2, 0.15, 0.1, 0.05], rel=1e-12
    )
    assert config.copy_share_at(5) == 0.05
    assert TrainConfig(copy_share=0.25, steps=1).copy_share_at(1) == 0.25


def test_a_decoder_without_retrieval_reads_the_same_tokens_in_the_same_order(
    corpora: list[TrainingData], many: tuple[list[ToyDocument], TrainingData]
) -> None:
    everything = [*corpora, many[1]]
    small, baseline = (
        Mixture([open_batches(data, seed=corpus_seed(5, n), num_neighbors=k) for n, data in enumerate(everything)])
        for k in (K, 0)
    )
    n = 2 * small.sequences_per_epoch + 3  # into the third epoch
    ours = small.batch(0, n, neighbor_dropout=0.1, copy_share=0.25).tensors()
    theirs = baseline.batch(0, n).tensors()
    assert theirs.keys() == ours.keys() - {"neighbors_BLKR", "keep_BLKR"}
    assert_close({name: ours[name] for name in theirs}, theirs, rtol=0, atol=0)


# --- prefetching --------------------------------------------------------------------------------------------------


def numbered(batches: Batches, count: int) -> Iterator[Batch]:
    return (batches.batch(2 * n, 2, neighbor_dropout=0.3) for n in range(count))


def prefetching() -> bool:
    return any(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetched_batches_are_the_same(many: tuple[list[ToyDocument], TrainingData], depth: int) -> None:
    with prefetched(numbered(open_batches(many[1]), 9), depth=depth) as batches:
        found = list(batches)
    assert len(found) == 9
    for ours, theirs in zip(found, numbered(open_batches(many[1]), 9), strict=True):
        assert_close(ours.tensors(), theirs.tensors(), rtol=0, atol=0)


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_of_the_thread_comes_in_place_of_its_batch(
    many: tuple[list[ToyDocument], TrainingData], depth: int
) -> None:
    def failing() -> Iterator[Batch]:
        yield from numbered(open_batches(many[1]), 2)
        raise ConfigError("the third batch")

    with prefetched(failing(), depth=depth) as batches:
        next(batches)
        next(batches)
        with pytest.raises(ConfigError, match="the third batch"):
            next(batches)
    assert not prefetching()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_thread_ends_with_its_context_and_never_runs_further_ahead_than_it_may(
    many: tuple[list[ToyDocument], TrainingData], taken: int
) -> None:
    made = 0

    def endless() -> Iterator[Batch]:
        nonlocal made
        while True:
            made += 1
            yield from numbered(open_batches(many[1]), 1)

    def use() -> None:
        with prefetched(endless(), depth=2) as batches:
            assert prefetching()
            for _ in range(taken):
                next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert not prefetching()
    assert taken <= made <= taken + 2
