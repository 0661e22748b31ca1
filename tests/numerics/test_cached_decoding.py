"""Cached decoding, slot by slot, equals the full forward pass at every position."""

import copy
import dataclasses
from typing import Any

import oracles
import pytest
import torch
from oracles import Batch, Oracle, assert_same, decode_ragged, decode_slots, make_batch, prompt_batch, tiny_config
from torch import Tensor

from retro.cca import Cache
from retro.config import ModelConfig
from retro.errors import ConfigError
from retro.model import Retro

L = 8
CONFIGS = [
    {"num_layers": 2, "cca_layers": (2,)},
    {"num_layers": 3, "cca_layers": (1, 3), "encoder_layers": 3},
    {"num_layers": 4, "cca_layers": (2, 3, 4), "encoder_layers": 1},
    {"tie_embeddings": True, "encoder_dim": 8, "chunk_len": 6},
    {"chunk_len": 2},
    {"encoder": "bert", "tie_embeddings": True, "encoder_dim": 8, "encoder_heads": 2, "encoder_head_dim": 4},
]
IDS = ["2-of-2", "1-3-of-3", "2-3-4-of-4", "tied-chunks-of-6", "chunks-of-2", "bert"]


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Retro:
    model = Retro(config).to(dtype)
    oracles.randomize(model)
    return model


def full_forward(model: Retro, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.hidden(**batch.arguments())


@pytest.mark.parametrize("prompt_chunks", [1, 2, 5])
@pytest.mark.parametrize("changes", CONFIGS, ids=IDS)
def test_cached_decoding_equals_the_full_forward_pass_and_the_oracle(
    changes: dict[str, Any], prompt_chunks: int
) -> None:
    config = tiny_config(**changes)
    model = make_model(config)
    batch = prompt_batch(config)
    cache = Cache()
    cached_BTD = decode_slots(model, cache, batch, prompt_chunks)
    keep_BT = batch.keep_BT
    assert_same(cached_BTD[keep_BT], full_forward(model, batch)[keep_BT])
    if prompt_chunks == 1:
        assert_same(cached_BTD[keep_BT], Oracle(config, model.state_dict()).hidden(batch)[keep_BT])
    assert cache.length == L * config.chunk_len


def test_cached_logits_equal_those_of_the_full_forward_pass() -> None:
    """Through `forward`, the way a sampler calls it."""
    config = tiny_config()
    M = config.chunk_len
    model = make_model(config)
    batch = prompt_batch(config)
    cache = Cache()
    with torch.no_grad():
        full_BTV = model(**batch.arguments())
        prompt_BTV = model(
            batch.inputs_BT[:, :M],
            keep_BT=batch.keep_BT[:, :M],
            neighbors_BLKR=batch.neighbors_BLKR[:, :1],
            keep_BLKR=batch.keep_BLKR[:, :1],
            cache=cache,
        )
        next_BTV = model(batch.inputs_BT[:, M : M + 1], keep_BT=batch.keep_BT[:, M : M + 1], cache=cache)
    logits_BTV = torch.cat([prompt_BTV, next_BTV], dim=1)
    keep_BT = batch.keep_BT[:, : M + 1]
    assert_same(logits_BTV[keep_BT], full_BTV[:, : M + 1][keep_BT])


@pytest.mark.parametrize("prompt_chunks", [1, 2])
def test_neighbors_of_another_number_and_length_at_every_border(prompt_chunks: int) -> None:
    """And none at all at some borders: what the chunk before had must be gone, not stale."""
    config = tiny_config()
    model = make_model(config)
    K, R = 4, 9
    sizes = {2: (1, 3), 3: (4, 9), 5: (2, 5), 7: (3, 1)}
    batch = prompt_batch(config, K=K, R=R)
    keep_BLKR = torch.ones_like(batch.keep_BLKR)
    keep_BLKR[:, prompt_chunks:] = False
    border_neighbors = {}
    generator = torch.Generator().manual_seed(0)
    B = len(keep_BLKR)
    for u, (k, r) in sizes.items():
        keep_BLKR[:, u, :k, :r] = torch.rand(B, k, r, generator=generator) < 0.8
        keep_BLKR[u % B, u] = False
        border_neighbors[u] = (batch.neighbors_BLKR[:, u : u + 1, :k, :r], keep_BLKR[:, u : u + 1, :k, :r])
    batch = dataclasses.replace(batch, keep_BLKR=keep_BLKR)
    cached_BTD = decode_slots(model, Cache(), batch, prompt_chunks, border_neighbors=border_neighbors)
    assert_same(cached_BTD[batch.keep_BT], full_forward(model, batch)[batch.keep_BT])


def test_a_border_without_neighbors_forgets_those_of_the_chunk_before() -> None:
    """None and a table without any token mean the same."""
    config = tiny_config()
    M = config.chunk_len
    model = make_model(config)
    batch = make_batch(config, [[(0, 4 * M)]], [[[5, 5], [5, 5], [0, 0], [5, 5]]], R=5)
    cache = Cache()
    expected_BTD = full_forward(model, batch)
    assert_same(decode_slots(model, cache, batch, 1), expected_BTD)
    border = {u: (batch.neighbors_BLKR[:, u : u + 1], batch.keep_BLKR[:, u : u + 1]) for u in (1, 3)}
    assert_same(decode_slots(model, Cache(), batch, 1, border_neighbors=border), expected_BTD)


def test_a_prompt_without_neighbors_may_be_followed_by_chunks_with_some() -> None:
    config = tiny_config()
    model = make_model(config)
    batch = prompt_batch(config)
    keep_BLKR = batch.keep_BLKR.clone()
    keep_BLKR[:, :2] = False
    batch = dataclasses.replace(batch, keep_BLKR=keep_BLKR)
    assert_same(decode_slots(model, Cache(), batch, 2)[batch.keep_BT], full_forward(model, batch)[batch.keep_BT])


@pytest.mark.parametrize("prompt_chunks", [1, 2])
def test_cached_decoding_without_retrieval_equals_the_full_forward_pass_without_it(prompt_chunks: int) -> None:
    config = tiny_config()
    model = make_model(config)
    batch = prompt_batch(config)
    cache = Cache()
    cached_BTD = decode_slots(model, cache, batch, prompt_chunks, retrieval=False)
    with torch.no_grad():
        full_BTD = model.hidden(batch.inputs_BT, keep_BT=batch.keep_BT)
    assert_same(cached_BTD[batch.keep_BT], full_BTD[batch.keep_BT])
    assert cache.chunk is not None
    assert all(k_BHSC.shape[2] == 0 for k_BHSC, _ in cache.chunk.kv)


def test_a_decoder_without_cca_decodes_with_a_cache() -> None:
    config = tiny_config(cca_layers=())
    model = make_model(config)
    batch = prompt_batch(config)
    cached_BTD = decode_slots(model, Cache(), batch, 1)
    assert_same(cached_BTD[batch.keep_BT], full_forward(model, batch)[batch.keep_BT])


def test_each_row_alone_equals_the_row_in_the_batch() -> None:
    config = tiny_config()
    model = make_model(config)
    batch = prompt_batch(config)
    together_BTD = decode_slots(model, Cache(), batch, 2)
    for b in range(len(together_BTD)):
        alone_BTD = decode_slots(model, Cache(), batch.row(b), 2)
        keep_T = batch.keep_BT[b]
        assert_same(alone_BTD[0][keep_T], together_BTD[b][keep_T])


def test_whole_empty_chunks_in_front_of_a_prompt_change_nothing() -> None:
    """A short prompt beside a long one: only relative positions matter."""
    config = tiny_config()
    M = config.chunk_len
    model = make_model(config)
    batch = prompt_batch(config).row(1)
    assert not batch.keep_BT[:, :M].any()
    # An empty chunk has no neighbors.
    batch.keep_BLKR[:, 0] = False
    shorter = Batch(
        inputs_BT=batch.inputs_BT[:, M:],
        keep_BT=batch.keep_BT[:, M:],
        document_BL=batch.document_BL[:, 1:],
        neighbors_BLKR=batch.neighbors_BLKR[:, 1:],
        keep_BLKR=batch.keep_BLKR[:, 1:],
        targets_BT=batch.targets_BT[:, M:],
        loss_BT=batch.loss_BT[:, M:],
    )
    long_TD = decode_slots(model, Cache(), batch, 2)[0, M:]
    short_TD = decode_slots(model, Cache(), shorter, 1)[0]
    keep_T = shorter.keep_BT[0]
    assert_same(short_TD[keep_T], long_TD[keep_T], atol=1e-10)


def test_what_stands_in_masked_places_changes_nothing_bit_for_bit() -> None:
    config = tiny_config()
    model = make_model(config)
    batch = prompt_batch(config)
    other = dataclasses.replace(
        batch,
        inputs_BT=batch.inputs_BT.masked_fill(~batch.keep_BT, -1),
        neighbors_BLKR=batch.neighbors_BLKR.masked_fill(~batch.keep_BLKR, -1),
    )
    assert torch.equal(decode_slots(model, Cache(), other, 1), decode_slots(model, Cache(), batch, 1))


def test_float32_cached_decoding_is_close_to_the_full_forward_pass() -> None:
    config = tiny_config()
    model = make_model(config, torch.float32)
    batch = prompt_batch(config)
    cached_BTD = decode_slots(model, Cache(), batch, 1)
    assert cached_BTD.dtype == torch.float32
    assert_same(cached_BTD[batch.keep_BT], full_forward(model, batch)[batch.keep_BT], atol=5e-5)


def test_the_caches_cca_part_does_not_grow_and_self_attention_grows_by_whole_blocks() -> None:
    config = tiny_config()
    M, K, R = config.chunk_len, 2, 6
    B, H, C = 1, config.num_heads, config.head_dim
    model = make_model(config)
    batch = make_batch(config, [[(0, L * M)]], [[[R] * K] * L], R=R)
    cache = Cache()
    capacities = set()
    for t in range(M, L * M + 1):
        prompt = t == M
        slots = slice(0, M) if prompt else slice(t - 1, t)
        arguments = {}
        if t % M == 0:
            u = t // M - 1
            arguments = {
                "neighbors_BLKR": batch.neighbors_BLKR[:, u : u + 1],
                "keep_BLKR": batch.keep_BLKR[:, u : u + 1],
            }
        with torch.no_grad():
            model.hidden(batch.inputs_BT[:, slots], cache=cache, **arguments)
        assert cache.length == t
        assert cache.chunk is not None
        shapes = {tuple(tensor.shape) for pair in cache.chunk.kv for tensor in pair}
        assert len(cache.chunk.kv) == len(config.cca_layers)
        assert shapes == {(B, H, K * R, C)}
        assert cache.chunk.hidden_BMD is not None
        assert cache.chunk.hidden_BMD.shape == (B, M + 1, config.dim)
        capacities.add(cache.keys_values[0][0].shape[2])
    assert len(capacities) == 2
    assert max(capacities) >= L * M


def test_neighbors_are_encoded_once_per_chunk_that_has_some() -> None:
    """Linear cost: at a border, and never in between."""
    config = tiny_config()
    M = config.chunk_len
    model = make_model(config)
    batch = make_batch(config, [[(0, 5 * M)]], [[[5], [5], [0], [5], [5]]], R=5)
    read: list[int] = []
    assert model.encoder is not None
    model.encoder.register_forward_pre_hook(lambda _, arguments: read.append(len(arguments[0])))
    decode_slots(model, Cache(), batch, 2)
    assert read == [2, 1, 1]


@pytest.mark.parametrize("positions", ["rotary", "relative"])
@pytest.mark.parametrize("longest", [1, 3, 9, 40])
def test_rows_that_go_on_by_steps_of_their_own_equal_the_full_forward_pass(longest: int, positions: str) -> None:
    """Prompts of any length, several columns at once, rows at different places of their chunks, rows that wait."""
    config = tiny_config(num_layers=3, cca_layers=(1, 3), positions=positions)
    model = make_model(config)
    batch = prompt_batch(config)
    batch.keep_BLKR[1, 0] = False  # an empty chunk has no neighbors
    for seed in range(3):
        ragged_BTD = decode_ragged(model, Cache(), batch, torch.Generator().manual_seed(seed), longest)
        assert_same(ragged_BTD[batch.keep_BT], full_forward(model, batch)[batch.keep_BT])


def test_rows_can_be_selected_repeated_and_joined_by_rows_of_another_cache() -> None:
    config = tiny_config()
    M = config.chunk_len
    model = make_model(config)
    batch = prompt_batch(config)
    full_BTD = full_forward(model, batch)

    def begun(rows: list[int], end: int) -> Cache:
        cache = Cache()
        with torch.no_grad():
            model.hidden(
                batch.inputs_BT[rows, :end],
                keep_BT=batch.keep_BT[rows, :end],
                neighbors_BLKR=batch.neighbors_BLKR[rows, : end // M],
                keep_BLKR=batch.keep_BLKR[rows, : end // M],
                cache=cache,
            )
        return cache

    ends = {2: 2 * M, 0: 5 * M, 3: M}
    cache = begun([0, 2], 2 * M)
    cache.select(torch.tensor([1, 1]))
    cache.join(begun([0], 5 * M))
    cache.join(begun([3], M))
    cache.select(torch.tensor([0, 2, 3]))
    for step in range(2 * M):
        slots = [end + step for end in ends.values()]
        rows = list(ends)
        with torch.no_grad():
            hidden_BTD = model.hidden(
                batch.inputs_BT[rows, slots][:, None],
                keep_BT=batch.keep_BT[rows, slots][:, None],
                neighbors_BLKR=batch.neighbors_BLKR[rows, [s // M for s in slots]][:, None],
                keep_BLKR=batch.keep_BLKR[rows, [s // M for s in slots]][:, None],
                cache=cache,
            )
        assert batch.keep_BT[rows, slots].all()
        assert_same(hidden_BTD[:, 0], full_BTD[rows, slots])


def test_a_join_with_an_empty_cache_and_with_rows_without_neighbors() -> None:
    config = tiny_config()
    M = config.chunk_len
    model = make_model(config)
    batch = make_batch(config, [[(0, 3 * M)]] * 2, [[[5, 5], [5, 5], [5, 5]], [[0, 0]] * 3], R=5)
    full_BTD = full_forward(model, batch)
    caches = []
    for row in range(2):
        cache = Cache()
        with torch.no_grad():
            model.hidden(
                batch.inputs_BT[row : row + 1, : 2 * M],
                neighbors_BLKR=batch.neighbors_BLKR[row : row + 1, :2] if row == 0 else None,
                keep_BLKR=batch.keep_BLKR[row : row + 1, :2] if row == 0 else None,
                cache=cache,
            )
        caches.append(cache)
    for order in ([0, 1], [1, 0]):
        joined = Cache()
        for row in order:
            joined.join(copy.deepcopy(caches[row]))
        with torch.no_grad():
            hidden_BTD = model.hidden(batch.inputs_BT[order, 2 * M : 2 * M + 1], cache=joined)
        assert_same(hidden_BTD[:, 0], full_BTD[order, 2 * M])


def test_slots_taken_back_can_be_filled_again_and_not_across_a_border() -> None:
    config = tiny_config()
    M = config.chunk_len
    model = make_model(config)
    batch = make_batch(config, [[(0, 4 * M)]], [[[5, 5]] * 4], R=5)
    full_BTD = full_forward(model, batch)
    near = {"neighbors_BLKR": batch.neighbors_BLKR[:, :2], "keep_BLKR": batch.keep_BLKR[:, :2]}
    cache = Cache()
    with torch.no_grad():
        wrong = batch.inputs_BT.clone()
        wrong[:, 2 * M :] = (wrong[:, 2 * M :] + 1) % config.vocab_size
        model.hidden(wrong[:, : 3 * M - 1], cache=cache, **near)
        cache.crop(M - 1, M)
        rest_BTD = model.hidden(
            batch.inputs_BT[:, 2 * M :],
            cache=cache,
            neighbors_BLKR=batch.neighbors_BLKR[:, 2:],
            keep_BLKR=batch.keep_BLKR[:, 2:],
        )
    assert_same(rest_BTD, full_BTD[:, 2 * M :])
    with pytest.raises(ConfigError, match="across a chunk border: row 0 holds 0 since its last one"):
        cache.crop(1, M)
