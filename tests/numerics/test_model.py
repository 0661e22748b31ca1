"""The network against a naive float64 oracle, and who may influence whom, slot by slot."""

import dataclasses
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Batch, Oracle, assert_same, make_batch, rich_batch, tiny_config, varied_lengths
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import cross_entropy

from retro.attention import CausalMask, Places, attend, causal_within
from retro.cca import Neighborhood
from retro.config import PRESETS, ModelConfig
from retro.model import LOGITS_PER_PART, Retro

BERT: dict[str, Any] = {
    "encoder": "bert",
    "tie_embeddings": True,
    "encoder_dim": 8,
    "encoder_heads": 2,
    "encoder_head_dim": 4,
}


def make_model(config: ModelConfig, seed: int = 0) -> Retro:
    model = Retro(config).to(torch.float64)
    oracles.randomize(model, seed)
    return model


def assert_equals_oracle(config: ModelConfig, batch: Batch, seed: int = 0) -> None:
    model = make_model(config, seed)
    oracle = Oracle(config, model.state_dict())
    expected_BTD = oracle.hidden(batch)
    with torch.no_grad():
        hidden_BTD = model.hidden(**batch.arguments())
        logits_BTV = model(**batch.arguments())
        loss, count = model.loss(hidden_BTD, batch.targets_BT, batch.loss_BT)
    keep_BT = batch.keep_BT
    assert_same(hidden_BTD[keep_BT], expected_BTD[keep_BT])
    expected_BTV = oracle.logits(expected_BTD)
    assert_same(logits_BTV[keep_BT], expected_BTV[keep_BT])
    assert int(count) == int(batch.loss_BT.sum())
    assert float(loss) == pytest.approx(oracle.loss(expected_BTV, batch.targets_BT, batch.loss_BT), rel=1e-12)


# Equality with the oracle


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 2, "cca_layers": (2,), "encoder_layers": 1},
        {"num_layers": 3, "cca_layers": (1, 3), "encoder_layers": 2},
        {"num_layers": 4, "cca_layers": (2, 3, 4), "encoder_layers": 3},
        {"tie_embeddings": True, "encoder_dim": 8, "cca_layers": (1, 3), "encoder_layers": 2},
        {"chunk_len": 6, "num_layers": 2, "cca_layers": (1,), "encoder_layers": 2},
        {"chunk_len": 2, "cca_layers": (1, 2)},
        {"positions": "relative"},
        {"positions": "relative", "tie_embeddings": True, "dim": 9, "encoder_dim": 9, "cca_layers": (1, 3)},
        {"positions": "relative", "cca_positions": False},
        {"cca_positions": False},
        {"encoder_conditioned": False},
        BERT,
        BERT | {"cca_layers": (1, 3), "encoder_layers": 3, "positions": "relative"},
        BERT | {"encoder_conditioned": False},
    ],
    ids=[
        "2-of-2",
        "1-3-of-3",
        "2-3-4-of-4",
        "tied",
        "chunks-of-6",
        "chunks-of-2",
        "relative",
        "relative-odd-width",
        "relative-none-in-cca",
        "rotary-none-in-cca",
        "encoder-alone",
        "bert",
        "bert-1-3-of-3",
        "bert-alone",
    ],
)
def test_hidden_logits_and_loss_equal_the_oracle(changes: dict[str, Any], K: int) -> None:
    config = tiny_config(**changes)
    assert_equals_oracle(config, rich_batch(config, K=K, R=5 + K, seed=K), seed=K)


def test_a_decoder_without_cca_equals_the_oracle_and_ignores_neighbors() -> None:
    config = tiny_config(cca_layers=())
    assert_equals_oracle(config, rich_batch(config))


def test_defaults_mean_every_slot_full_and_one_document_per_row() -> None:
    config = tiny_config()
    M = config.chunk_len
    batch = make_batch(config, [[(0, 4 * M)], [(0, 4 * M)]], varied_lengths(2, 4, 2, 5), R=5)
    model = make_model(config)
    with torch.no_grad():
        short_BTD = model.hidden(batch.inputs_BT, neighbors_BLKR=batch.neighbors_BLKR, keep_BLKR=batch.keep_BLKR)
    assert_same(short_BTD, Oracle(config, model.state_dict()).hidden(batch))


@pytest.mark.parametrize("changes", [{}, BERT], ids=["own", "bert"])
def test_neighbor_tokens_may_be_missing_anywhere_not_only_at_the_end(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    batch = rich_batch(config, K=3, R=6)
    holes_BLKR = torch.rand(batch.keep_BLKR.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    assert_equals_oracle(config, dataclasses.replace(batch, keep_BLKR=batch.keep_BLKR & holes_BLKR))


def test_arguments_may_be_views_of_larger_tensors() -> None:
    """The first chunks of a longer batch, as a prompt is cut out of one."""
    config = tiny_config()
    M = config.chunk_len
    batch = rich_batch(config)
    model = make_model(config)
    views = {
        name: argument[:, : 3 * M] if name.endswith("_BT") else argument[:, :3]
        for name, argument in batch.arguments().items()
    }
    assert not views["keep_BT"].is_contiguous()
    with torch.no_grad():
        hidden_BTD = model.hidden(**views)
        copies_BTD = model.hidden(**{name: view.contiguous() for name, view in views.items()})
    assert torch.equal(hidden_BTD, copies_BTD)


@pytest.mark.parametrize("chunks_per_part", [1, 2, 100])
def test_encoder_alone_equals_the_oracle(chunks_per_part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(encoder_layers=3)
    M, K, R = config.chunk_len, 3, 7
    monkeypatch.setattr("retro.model.ENCODED_PER_PART", chunks_per_part * K * R * config.encoder_dim + 1)
    model = make_model(config)
    oracle = Oracle(config, model.state_dict())
    generator = torch.Generator().manual_seed(5)
    near = Neighborhood.of(
        torch.randint(0, config.vocab_size, (1, 6, K, R), generator=generator),
        torch.arange(R) < torch.tensor(varied_lengths(1, 6, K, R))[..., None],
    )
    N = len(near.chunk_N)
    assert near.chunk_N.tolist() == [0, 1, 2, 4, 5]
    hidden_NMD = torch.randn(N, M, config.dim, generator=generator, dtype=torch.float64)
    keep_NM = torch.rand(N, M, generator=generator) < 0.7
    keep_NM[1] = False
    read: list[int] = []
    assert model.encoder is not None
    model.encoder.register_forward_pre_hook(lambda _, arguments: read.append(len(arguments[0])))
    with torch.no_grad():
        encoded_NKRE = model.encode(near, hidden_NMD, keep_NM)
    assert read == {1: [1] * 5, 2: [2, 2, 1], 100: [5]}[chunks_per_part]
    table_VE = oracle.weights["encoder_embedding.weight"] * config.encoder_dim**0.5
    expected_NKRE = torch.zeros(N, K, R, config.encoder_dim, dtype=torch.float64)
    for n in range(N):
        neighbors = [
            [(r, table_VE[int(near.tokens_NKR[n, k, r])]) for r in range(R) if near.keep_NKR[n, k, r]] for k in range(K)
        ]
        chunk = [(i, hidden_NMD[n, i].numpy()) for i in range(M) if keep_NM[n, i]]
        for k, encoded in enumerate(oracle.encode(neighbors, chunk)):
            for r, encoded_E in encoded:
                expected_NKRE[n, k, r] = torch.from_numpy(encoded_E)
    assert_same(encoded_NKRE, expected_NKRE)


def test_cca_alone_equals_the_oracle() -> None:
    """One layer whose other branches add nothing, and whose encoder gives what the test chooses."""
    config = tiny_config(num_layers=1, cca_layers=(1,))
    M, L, K, R = config.chunk_len, 4, 2, 6
    model = make_model(config)
    layer: Any = model.layers[0]
    with torch.no_grad():
        layer.attention.out.weight.zero_()
        layer.ffw.down.weight.zero_()
    oracle = Oracle(config, model.state_dict())
    batch = make_batch(config, [[(0, L * M)]], [[[R, R]] * L], R=R)
    encoded_LKRE = torch.randn(
        L, K, R, config.encoder_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    final: list[Tensor] = []
    assert model.encoder is not None
    model.encoder.register_forward_hook(lambda *_: encoded_LKRE)
    model.norm.register_forward_pre_hook(lambda _, inputs: final.append(inputs[0]))
    with torch.no_grad():
        model.hidden(**batch.arguments())
        embedded_TD = model.embedding(batch.inputs_BT[0])
        normed_TD = layer.cca_norm(embedded_TD)
    expected_TD = embedded_TD.clone()
    for t in range(M - 1, L * M):
        u = (t + 1) // M - 1
        encoded = [[(r, encoded_LKRE[u, k, r].numpy()) for r in range(R)] for k in range(K)]
        expected_TD[t] += torch.from_numpy(oracle.cca("layers.0.cca", (t + 1) % M, normed_TD[t].numpy(), encoded))
    assert_same(final[0][0], expected_TD)


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, Batch]:
    num_layers = draw(st.integers(1, 3))
    layers = draw(st.sets(st.integers(1, num_layers), min_size=1))
    tied = draw(st.booleans())
    config = tiny_config(
        num_layers=num_layers,
        cca_layers=tuple(sorted(layers)),
        encoder_layers=draw(st.integers(1, 2)),
        tie_embeddings=tied,
        encoder_dim=8 if tied else 10,
        chunk_len=draw(st.integers(2, 4)),
        num_heads=draw(st.integers(1, 2)),
    )
    M = config.chunk_len
    documents = st.lists(st.tuples(st.integers(0, M - 1), st.integers(1, 2 * M)), min_size=1, max_size=3)
    rows = draw(st.lists(documents, min_size=1, max_size=2))
    L = max(sum(-(-(lead + tokens) // M) for lead, tokens in row) for row in rows) + draw(st.integers(0, 1))
    K, R = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    lengths = [
        [[draw(st.integers(0, R)) for _ in range(K)] if draw(st.booleans()) else [0] * K for _ in range(L)]
        for _ in rows
    ]
    return config, make_batch(config, rows, lengths, R=R, seed=draw(st.integers(0, 99)))


@settings(max_examples=25, deadline=None)
@given(cases())
def test_any_small_case_equals_the_oracle(case: tuple[ModelConfig, Batch]) -> None:
    config, batch = case
    assert_equals_oracle(config, batch)


# Who may influence whom


def influences(model: Retro, batch: Batch, of: torch.nn.Module) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """The output of the embedding `of`, and its gradient under a random projection of each kept slot (b, t)."""
    captured: list[Tensor] = []

    def separate(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[0]

    handle = of.register_forward_hook(separate)
    hidden_BTD = model.hidden(**batch.arguments())
    handle.remove()
    direction_D = torch.randn(hidden_BTD.shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = {}
    for b, t in batch.keep_BT.nonzero().tolist():
        (gradients[b, t],) = torch.autograd.grad(hidden_BTD[b, t] @ direction_D, captured[0], retain_graph=True)
    return captured[0], gradients


@pytest.mark.parametrize(
    ("num_layers", "cca_layers"), [(2, (2,)), (1, (1,)), (3, (1, 3)), (3, (2,)), (4, (2, 3, 4))], ids=str
)
def test_a_neighbor_token_influences_exactly_the_slots_that_may_see_it(
    num_layers: int, cca_layers: tuple[int, ...]
) -> None:
    """First the last slot of its chunk, then the same document to its end; nothing in another document by any path."""
    config = tiny_config(num_layers=num_layers, cca_layers=cca_layers)
    M = config.chunk_len
    batch = rich_batch(config, K=3, R=6)
    model = make_model(config)
    assert model.encoder_embedding is not None
    _, gradients = influences(model, batch, model.encoder_embedding)
    near = Neighborhood.of(batch.neighbors_BLKR, batch.keep_BLKR)
    L = batch.document_BL.shape[1]
    # With CCA in the last layer only, no later self-attention carries a neighbor beyond the slots that see it.
    carried = min(cca_layers) < num_layers
    reached = 0
    for (b, t), gradient_NKRE in gradients.items():
        for n, (row, u) in enumerate((chunk // L, chunk % L) for chunk in near.chunk_N.tolist()):
            first = (u + 1) * M - 1
            same = bool(batch.document_BL[b, t // M] == batch.document_BL[row, u])
            allowed = row == b and (t == first or (t > first and same and (carried or t < first + M)))
            influenced_KR = (gradient_NKRE[n] != 0).any(dim=-1)
            expected_KR = near.keep_NKR[n] & allowed
            assert torch.equal(influenced_KR, expected_KR), f"slot {t} of row {b}, neighbors of chunk {u} of row {row}"
            reached += int(expected_KR.sum())
    assert reached > 100


def test_the_last_token_of_a_document_sees_its_chunks_neighbors_and_the_next_document_does_not() -> None:
    """A hand-made case: two documents of exactly one chunk, so that slot M - 1 is the only one to see the first's."""
    config = tiny_config(cca_layers=(1, 3))
    M = config.chunk_len
    batch = make_batch(config, [[(0, M), (0, M)]], [[[5], [0]]], R=5)
    model = make_model(config)
    with torch.no_grad():
        on_TD = model.hidden(**batch.arguments())[0]
        off_TD = model.hidden(batch.inputs_BT, document_BL=batch.document_BL)[0]
    changed = (on_TD != off_TD).any(dim=-1).nonzero().squeeze(1).tolist()
    assert changed == [M - 1]


@pytest.mark.parametrize("cca_layers", [(), (2,), (1, 3)], ids=str)
def test_an_input_token_influences_exactly_itself_and_later_slots_of_its_document(cca_layers: tuple[int, ...]) -> None:
    """The neighbor encoder's view of the decoder included: no path leads into the past or into another document."""
    config = tiny_config(cca_layers=cca_layers)
    M = config.chunk_len
    batch = rich_batch(config)
    model = make_model(config)
    _, gradients = influences(model, batch, model.embedding)
    B, T = batch.inputs_BT.shape
    for (b, t), gradient_BTD in gradients.items():
        influenced_BT = (gradient_BTD != 0).any(dim=-1)
        expected_BT = torch.zeros(B, T, dtype=torch.bool)
        for s in range(t + 1):
            expected_BT[b, s] = batch.keep_BT[b, s] and batch.document_BL[b, s // M] == batch.document_BL[b, t // M]
        assert torch.equal(influenced_BT, expected_BT), f"slot {t} of row {b}"


def test_the_encoder_sees_the_decoder_before_cca_and_only_its_own_chunk() -> None:
    """What the encoder is given as H_u depends on the tokens up to the chunk's end and on no neighbor."""
    config = tiny_config(cca_layers=(2, 3))
    M = config.chunk_len
    batch = rich_batch(config)
    model = make_model(config)
    assert model.encoder is not None
    assert model.encoder_embedding is not None
    given_hidden: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, arguments: given_hidden.append(arguments[2]))
    embedded, _ = influences(model, batch, model.encoder_embedding)
    assert given_hidden[0].requires_grad
    (through_neighbors,) = torch.autograd.grad(given_hidden[0].sum(), embedded, allow_unused=True, retain_graph=True)
    assert through_neighbors is None

    captured: list[Tensor] = []
    model.embedding.register_forward_hook(lambda _m, _i, output: captured.append(output) or output)
    model.hidden(**batch.arguments())
    near = Neighborhood.of(batch.neighbors_BLKR, batch.keep_BLKR)
    L = batch.document_BL.shape[1]
    for n, chunk in enumerate(near.chunk_N.tolist()):
        b, u = chunk // L, chunk % L
        for i in range(M):
            if not batch.keep_BT[b, u * M + i]:
                continue
            (gradient_BTD,) = torch.autograd.grad(given_hidden[1][n, i].square().sum(), captured[0], retain_graph=True)
            expected_BT = torch.zeros_like(batch.keep_BT)
            for s in range(u * M + i + 1):
                expected_BT[b, s] = batch.keep_BT[b, s] and batch.document_BL[b, s // M] == batch.document_BL[b, u]
            assert torch.equal((gradient_BTD != 0).any(dim=-1), expected_BT)


def test_another_input_token_leaves_earlier_slots_and_other_documents_bit_for_bit_alone() -> None:
    config = tiny_config()
    M = config.chunk_len
    batch = rich_batch(config)
    model = make_model(config)
    with torch.no_grad():
        before_BTD = model.hidden(**batch.arguments())
        for b, s in batch.keep_BT.nonzero().tolist():
            inputs_BT = batch.inputs_BT.clone()
            inputs_BT[b, s] = inputs_BT[b, s] % (config.vocab_size - 1) + 1
            after_BTD = model.hidden(**dataclasses.replace(batch, inputs_BT=inputs_BT).arguments())
            changed_BT = (after_BTD != before_BTD).any(dim=-1) & batch.keep_BT
            expected_BT = torch.zeros_like(changed_BT)
            for t in range(s, expected_BT.shape[1]):
                expected_BT[b, t] = batch.keep_BT[b, t] and batch.document_BL[b, t // M] == batch.document_BL[b, s // M]
            assert torch.equal(changed_BT, expected_BT), f"token {s} of row {b}"


# Neighbors are a set; what is masked does not exist


def test_the_order_of_a_chunks_neighbors_changes_nothing() -> None:
    config = tiny_config()
    K = 3
    batch = rich_batch(config, K=K, R=6)
    model = make_model(config)
    with torch.no_grad():
        before_BTD = model.hidden(**batch.arguments())
        for order in ([1, 0, 2], [2, 0, 1], [2, 1, 0]):
            swapped = dataclasses.replace(
                batch, neighbors_BLKR=batch.neighbors_BLKR[:, :, order], keep_BLKR=batch.keep_BLKR[:, :, order]
            )
            assert not torch.equal(swapped.neighbors_BLKR, batch.neighbors_BLKR)
            assert_same(model.hidden(**swapped.arguments()), before_BTD)


def test_token_ids_in_masked_places_change_nothing_bit_for_bit() -> None:
    config = tiny_config()
    batch = rich_batch(config, K=3, R=6)
    model = make_model(config)
    other = dataclasses.replace(
        batch,
        inputs_BT=torch.where(batch.keep_BT, batch.inputs_BT, (batch.inputs_BT + 7) % config.vocab_size),
        neighbors_BLKR=torch.where(
            batch.keep_BLKR, batch.neighbors_BLKR, (batch.neighbors_BLKR + 7) % config.vocab_size
        ),
    )
    assert not torch.equal(other.inputs_BT, batch.inputs_BT)
    assert not torch.equal(other.neighbors_BLKR, batch.neighbors_BLKR)
    with torch.no_grad():
        assert torch.equal(model.hidden(**other.arguments()), model.hidden(**batch.arguments()))


def test_ids_outside_the_vocabulary_are_allowed_in_masked_places() -> None:
    """A missing neighbor is -1 in a table of rows; nothing of the kind may be looked up."""
    config = tiny_config()
    batch = rich_batch(config)
    model = make_model(config)
    other = dataclasses.replace(
        batch,
        inputs_BT=batch.inputs_BT.masked_fill(~batch.keep_BT, -1),
        neighbors_BLKR=batch.neighbors_BLKR.masked_fill(~batch.keep_BLKR, -1),
    )
    with torch.no_grad():
        assert torch.equal(model.hidden(**other.arguments()), model.hidden(**batch.arguments()))


def test_longer_neighbors_with_a_masked_tail_change_nothing() -> None:
    config = tiny_config()
    batch = rich_batch(config, R=5)
    model = make_model(config)
    longer = dataclasses.replace(
        batch,
        neighbors_BLKR=torch.nn.functional.pad(batch.neighbors_BLKR, (0, 4), value=3),
        keep_BLKR=torch.nn.functional.pad(batch.keep_BLKR, (0, 4)),
    )
    with torch.no_grad():
        assert_same(model.hidden(**longer.arguments()), model.hidden(**batch.arguments()))


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_neighbor_equals_a_table_without_it(missing: int) -> None:
    config = tiny_config()
    K = 3
    batch = rich_batch(config, K=K, R=6)
    model = make_model(config)
    keep_BLKR = batch.keep_BLKR.clone()
    keep_BLKR[:, :, missing] = False
    rest = [k for k in range(K) if k != missing]
    fewer = dataclasses.replace(
        batch, neighbors_BLKR=batch.neighbors_BLKR[:, :, rest], keep_BLKR=batch.keep_BLKR[:, :, rest]
    )
    with torch.no_grad():
        masked_BTD = model.hidden(**dataclasses.replace(batch, keep_BLKR=keep_BLKR).arguments())
        assert_same(masked_BTD, model.hidden(**fewer.arguments()))


def test_retrieval_off_equals_a_table_without_neighbors_bit_for_bit() -> None:
    config = tiny_config()
    batch = rich_batch(config)
    model = make_model(config)
    nothing = dataclasses.replace(batch, keep_BLKR=torch.zeros_like(batch.keep_BLKR))
    with torch.no_grad():
        off_BTD = model.hidden(batch.inputs_BT, keep_BT=batch.keep_BT, document_BL=batch.document_BL)
        assert torch.equal(off_BTD, model.hidden(**nothing.arguments()))
    assert_same(off_BTD[batch.keep_BT], Oracle(config, model.state_dict()).hidden(nothing)[batch.keep_BT])


def test_a_table_of_no_neighbors_is_allowed() -> None:
    """K = 0, as `-k 0` may give it."""
    config = tiny_config()
    batch = rich_batch(config)
    model = make_model(config)
    empty = dataclasses.replace(
        batch, neighbors_BLKR=batch.neighbors_BLKR[:, :, :0], keep_BLKR=batch.keep_BLKR[:, :, :0]
    )
    with torch.no_grad():
        off_BTD = model.hidden(batch.inputs_BT, keep_BT=batch.keep_BT, document_BL=batch.document_BL)
        assert torch.equal(model.hidden(**empty.arguments()), off_BTD)


def test_nan_in_masked_places_of_the_encoders_inputs_changes_nothing() -> None:
    config = tiny_config()
    M, N, K, R = config.chunk_len, 4, 2, 6
    model = make_model(config)
    assert model.encoder is not None
    generator = torch.Generator().manual_seed(0)
    x_NKRE = torch.randn(N, K, R, config.encoder_dim, generator=generator, dtype=torch.float64)
    hidden_NMD = torch.randn(N, M, config.dim, generator=generator, dtype=torch.float64)
    keep_NKR = torch.rand(N, K, R, generator=generator) < 0.6
    keep_NM = torch.rand(N, M, generator=generator) < 0.6
    keep_NKR[1], keep_NM[2] = False, False
    x_nan = x_NKRE.masked_fill(~keep_NKR[..., None], float("nan")).requires_grad_()
    hidden_nan = hidden_NMD.masked_fill(~keep_NM[..., None], float("nan")).requires_grad_()
    encoded_NKRE = model.encoder(x_nan, keep_NKR, hidden_nan, keep_NM)
    assert torch.equal(encoded_NKRE, model.encoder(x_NKRE, keep_NKR, hidden_NMD, keep_NM))
    assert (encoded_NKRE[~keep_NKR] == 0).all()
    torch.autograd.backward(encoded_NKRE.square().sum())
    for gradient in [x_nan.grad, hidden_nan.grad, *(parameter.grad for parameter in model.encoder.parameters())]:
        assert gradient is not None
        assert gradient.isfinite().all()


@pytest.mark.parametrize("bad_id", [0, 5], ids=["the id that masked places are given", "another id"])
def test_a_nan_embedding_used_in_masked_places_only_changes_nothing(bad_id: int) -> None:
    config = tiny_config()
    batch = rich_batch(config, K=3, R=6)
    good_id = 6

    def cleaned(ids: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep, ids.masked_fill(ids == bad_id, good_id), bad_id)

    batch = dataclasses.replace(
        batch,
        inputs_BT=cleaned(batch.inputs_BT, batch.keep_BT),
        neighbors_BLKR=cleaned(batch.neighbors_BLKR, batch.keep_BLKR),
    )
    model = make_model(config)
    expected_BTD = model.hidden(**batch.arguments()).detach()
    assert model.encoder_embedding is not None
    with torch.no_grad():
        model.embedding.weight[bad_id] = float("nan")
        model.encoder_embedding.weight[bad_id] = float("nan")
    hidden_BTD = model.hidden(**batch.arguments())
    assert torch.equal(hidden_BTD, expected_BTD)
    torch.autograd.backward(hidden_BTD[batch.keep_BT].square().sum())
    for name, parameter in model.named_parameters():
        if name != "head.weight":
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_attention_to_nothing_is_zero_with_finite_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 2, length, 4, generator=generator, dtype=torch.float64).requires_grad_() for length in (3, 5, 5)
    )
    keep_B1TS = torch.rand(2, 1, 3, 5, generator=generator) < 0.5
    keep_B1TS[0, 0, 1] = False
    keep_B1TS[1, 0, 0] = False
    y_BHTC = attend(q, k, v, keep_B1TS)
    assert (y_BHTC[0, :, 1] == 0).all()
    assert (y_BHTC[1, :, 0] == 0).all()
    assert (y_BHTC[0, :, 0] != 0).all()
    gradients = torch.autograd.grad(y_BHTC.square().sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][0, :, 1] == 0).all()


def test_empty_rows_and_chunks_give_zeros_and_finite_gradients() -> None:
    """A row without any token, with neighbors and without; the loss of the others stays trainable."""
    config = tiny_config()
    M = config.chunk_len
    lengths = [[[5, 0]] * 3, [[5, 3]] * 3, [[0, 0]] * 3]
    batch = make_batch(config, [[(1, 2 * M)], [], []], lengths, R=5)
    model = make_model(config)
    hidden_BTD = model.hidden(**batch.arguments())
    assert (hidden_BTD[1:] == 0).all()
    loss, _ = model.loss(hidden_BTD, batch.targets_BT, batch.loss_BT)
    torch.autograd.backward(loss + hidden_BTD.square().sum())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_an_empty_slot_stays_exactly_zero_wherever_it_stands() -> None:
    """As the head of retro/model.py promises: before the first token, after the last, in whole empty chunks."""
    config = tiny_config()
    batch = rich_batch(config)
    with torch.no_grad():
        hidden_BTD = make_model(config).hidden(**batch.arguments())
    assert (hidden_BTD[~batch.keep_BT] == 0).all()


def test_a_batch_without_targets_has_a_loss_of_zero() -> None:
    config = tiny_config()
    batch = rich_batch(config)
    model = make_model(config)
    loss, count = model.loss(model.hidden(**batch.arguments()), batch.targets_BT, torch.zeros_like(batch.loss_BT))
    torch.autograd.backward(loss)
    assert float(loss.detach()) == 0.0
    assert int(count) == 0


# Packing


def test_packed_documents_equal_the_same_documents_alone() -> None:
    config = tiny_config()
    M = config.chunk_len
    documents = [(1, 2 * M - 1), (0, M), (M - 1, M + 2)]
    packed = make_batch(config, [documents], varied_lengths(1, 6, 2, 6), R=6)
    model = make_model(config)
    with torch.no_grad():
        packed_BTD = model.hidden(**packed.arguments())
        begin = 0
        for lead, tokens in documents:
            end = begin + -(-(lead + tokens) // M)
            slots, chunks = slice(begin * M, end * M), slice(begin, end)
            alone_BTD = model.hidden(
                packed.inputs_BT[:, slots],
                keep_BT=packed.keep_BT[:, slots],
                neighbors_BLKR=packed.neighbors_BLKR[:, chunks],
                keep_BLKR=packed.keep_BLKR[:, chunks],
            )
            keep_BT = packed.keep_BT[:, slots]
            assert_same(alone_BTD[keep_BT], packed_BTD[:, slots][keep_BT], atol=1e-10)
            begin = end


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    config = tiny_config()
    batch = rich_batch(config)
    model = make_model(config)
    with torch.no_grad():
        together_BTD = model.hidden(**batch.arguments())
        for b in range(len(together_BTD)):
            assert_same(model.hidden(**batch.row(b).arguments())[0], together_BTD[b])


def test_float32_is_close_to_the_oracle() -> None:
    config = tiny_config()
    batch = rich_batch(config)
    model = make_model(config).to(torch.float32)
    expected_BTD = Oracle(config, model.state_dict()).hidden(batch)
    with torch.no_grad():
        hidden_BTD = model.hidden(**batch.arguments())
    assert hidden_BTD.dtype == torch.float32
    assert_same(hidden_BTD[batch.keep_BT].double(), expected_BTD[batch.keep_BT], atol=5e-5)


def test_bfloat16_autocast_is_close_to_float32() -> None:
    """bfloat16 has 8 bits, 0.4% a rounding: a few dozen of them in a row stay within a tenth of activations of order 1."""
    config = tiny_config()
    batch = rich_batch(config)
    model = make_model(config).to(torch.float32)
    with torch.no_grad():
        exact_BTD = model.hidden(**batch.arguments())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden_BTD = model.hidden(**batch.arguments())
            loss, _ = model.loss(hidden_BTD, batch.targets_BT, batch.loss_BT)
    assert loss.dtype == torch.float32
    error_BTD = (hidden_BTD - exact_BTD)[batch.keep_BT]
    assert 0 < float(error_BTD.square().mean().sqrt()) < 0.1


def test_the_compiled_path_which_reads_chunks_without_neighbors_too_equals_the_oracle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A compiler wants fixed shapes, so that empty chunks are encoded instead of left out."""
    config = tiny_config()
    batch = rich_batch(config)
    model = make_model(config)
    expected_BTD = Oracle(config, model.state_dict()).hidden(batch)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    near = Neighborhood.of(batch.neighbors_BLKR, batch.keep_BLKR)
    assert len(near.chunk_N) == batch.document_BL.numel()
    hidden_BTD = model.hidden(**batch.arguments())
    assert_same(hidden_BTD[batch.keep_BT].detach(), expected_BTD[batch.keep_BT])
    torch.autograd.backward(hidden_BTD.square().sum())
    for name, parameter in model.named_parameters():
        if name != "head.weight":
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


# Weights


def test_initialization_draws_the_documented_deviations() -> None:
    config = tiny_config(vocab_size=500, dim=64, encoder_dim=48, ffw_dim=96, encoder_ffw_dim=80, num_heads=8)
    model = Retro(config).initialize(torch.Generator().manual_seed(0))
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert (weight == 1).all(), name
            continue
        deviation = weight.shape[1] ** -0.5
        if name.endswith((".q.weight", ".k.weight")):
            deviation = 0.02
        if name.endswith((".out.weight", ".down.weight")):
            layers = config.encoder_layers if name.startswith("encoder.") else config.num_layers
            deviation /= (2 * layers) ** 0.5
        # The deviation of a sample's deviation is 1 / sqrt(2n) of it.
        tolerance = 5 / (2 * weight.numel()) ** 0.5
        assert float(weight.detach().std()) == pytest.approx(deviation, rel=tolerance), name
        assert abs(float(weight.detach().mean())) < 5 * deviation / weight.numel() ** 0.5, name


def test_cca_begins_by_handing_on_what_it_attends_to() -> None:
    config = tiny_config(vocab_size=500, dim=64, encoder_dim=64, num_heads=4, head_dim=16, tie_embeddings=True)
    model = Retro(config).initialize(torch.Generator().manual_seed(0))
    for number, layer in enumerate(model.layers, 1):
        cca: Any = layer.cca
        assert (cca is not None) == (number in config.cca_layers)
        if cca is not None:
            torch.testing.assert_close(cca.out.weight @ cca.v.weight, torch.eye(64), rtol=0, atol=1e-5)
            # Attention to one key alone: its content comes out.
            context_BSD = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
            keys, values = cca.keys_values(context_BSD, Places.range(0, 1, cca, context_BSD))
            query = cca.queries(torch.randn(1, 3, 64), Places.range(0, 3, cca, context_BSD))
            y_BTD = cca.merge(attend(query, keys, values, torch.ones(1, 1, 1, 1, dtype=torch.bool)))
            torch.testing.assert_close(y_BTD, context_BSD.expand(1, 3, 64), rtol=0, atol=1e-5)


def test_initialization_repeats_with_the_same_generator_and_differs_with_another() -> None:
    config = tiny_config()
    first, again, other = (
        Retro(config).initialize(torch.Generator().manual_seed(seed)).embedding.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tied_models_have_one_table_and_untied_ones_three() -> None:
    tied = Retro(tiny_config(tie_embeddings=True, encoder_dim=8)).state_dict()
    untied = Retro(tiny_config()).state_dict()
    V = tiny_config().vocab_size
    assert [name for name, weight in tied.items() if V in weight.shape] == ["embedding.weight"]
    assert sorted(name for name, weight in untied.items() if V in weight.shape) == [
        "embedding.weight",
        "encoder_embedding.weight",
        "head.weight",
    ]


# Other ways to compute the same


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_checkpointed_activations_give_the_same_gradients(positions: str) -> None:
    config = tiny_config(positions=positions)
    batch = rich_batch(config)
    gradients = []
    for checkpointing in (False, True):
        model = make_model(config)
        if checkpointing:
            model.checkpoint_activations()
        model(**batch.arguments(), targets_BT=batch.targets_BT, loss_BT=batch.loss_BT).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected is not None
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=0)


def test_dropout_zeroes_tokens_and_what_every_branch_adds_in_training_alone() -> None:
    config = tiny_config(num_layers=3)
    batch = rich_batch(config)
    model, plain = make_model(config), make_model(config)
    model.drop_activations(0.4)
    kept: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda _, inputs, output: kept.append((inputs[0].detach(), output.detach())))
    assert torch.equal(model.eval()(**batch.arguments()), plain(**batch.arguments()))
    kept.clear()
    model.train()(**batch.arguments())
    assert len(kept) == 1 + 2 * 3 + len(config.cca_layers)
    for x_BTD, y_BTD in kept:
        there = x_BTD != 0  # empty slots are 0 anyway
        zeroed = (y_BTD == 0) & there
        assert 0.2 < float(zeroed.sum() / there.sum()) < 0.6
        torch.testing.assert_close(y_BTD[~zeroed], x_BTD[~zeroed] / 0.6, rtol=1e-12, atol=0)


def test_checkpointed_activations_are_dropped_again_alike() -> None:
    config = tiny_config()
    batch = rich_batch(config)
    gradients = []
    for checkpointing in (False, True):
        model = make_model(config).train()
        model.drop_activations(0.3)
        model.checkpoint_activations(checkpointing)
        torch.manual_seed(0)
        model(**batch.arguments(), targets_BT=batch.targets_BT, loss_BT=batch.loss_BT).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=0)


def test_checkpointing_keeps_fewer_activations() -> None:
    config = tiny_config(num_layers=6)
    batch = rich_batch(config)
    kept = []
    for checkpointing in (False, True):
        model = make_model(config)
        if checkpointing:
            model.checkpoint_activations()
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**batch.arguments(), targets_BT=batch.targets_BT, loss_BT=batch.loss_BT)
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_sees_what_the_dense_mask_says() -> None:
    """On CUDA flex attention takes the place of the mask; here it runs without being compiled."""
    generator = torch.Generator().manual_seed(0)
    B, H, T, C = 2, 3, 24, 8
    segment_BT = torch.tensor([[0] * 10 + [7] * 9 + [-1] * 5, [-1] * 3 + [1] * 21])
    q, k, v = (torch.randn(B, H, T, C, generator=generator, dtype=torch.float64) for _ in range(3))
    dense = CausalMask.of(segment_BT, dense=True)
    block = create_block_mask(causal_within(segment_BT), B, None, T, T, device="cpu")
    flex_BHTC = flex_attention(q, k, v, block_mask=block)
    assert isinstance(flex_BHTC, Tensor)
    assert_same(flex_BHTC, dense.attend(q, k, v, None))
    one_segment = CausalMask.of(torch.zeros(B, T, dtype=torch.long), dense=False)
    assert one_segment == CausalMask()
    assert_same(one_segment.attend(q, k, v, None), CausalMask.of(torch.zeros(B, T), dense=True).attend(q, k, v, None))


@pytest.mark.parametrize("times", [1, 5])
def test_segments_one_by_one_are_what_the_dense_mask_says_forward_and_backward(times: int) -> None:
    generator = torch.Generator().manual_seed(0)
    segments = [[3] * 10 + [7] * 9 + [-1] * 5, [-1] * 3 + [1] * 21, [5] * 24]
    segment_BT = torch.tensor(segments).repeat_interleave(times, dim=1)
    shape = (3, 2, 24 * times, 8)
    results = []
    for dense in (False, True):
        generator.manual_seed(0)
        q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
        mask = CausalMask.of(segment_BT, dense=dense)
        assert (mask.runs is None) == (dense or times == 1)  # short sequences are masked whole
        y = mask.attend(q, k, v, None)
        y.square().sum().backward()  # type: ignore[no-untyped-call]
        results.append([y.detach(), *(x.grad for x in (q, k, v))])
    for fast, slow in zip(*results, strict=True):
        assert isinstance(fast, Tensor)
        assert isinstance(slow, Tensor)
        assert_same(fast, slow)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_loss_in_parts_is_the_loss(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    batch = rich_batch(config)
    monkeypatch.setitem(LOGITS_PER_PART, "cpu", rows * config.vocab_size)
    model = make_model(config)
    loss = model(**batch.arguments(), targets_BT=batch.targets_BT, loss_BT=batch.loss_BT)
    logits_NV = model(**batch.arguments())[batch.loss_BT]
    torch.testing.assert_close(loss, cross_entropy(logits_NV, batch.targets_BT[batch.loss_BT], reduction="sum"))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_the_layout_for_decoding_changes_no_value_and_follows_changed_weights(tied: bool) -> None:
    config = tiny_config(tie_embeddings=tied, encoder_dim=8)
    model, other = make_model(config), make_model(config).lay_out_for_decoding()
    for (name, expected), (other_name, value) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(value, expected)
    hidden_1D = torch.randn(1, config.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        for rows in (1, 3):
            hidden_ND = hidden_1D.expand(rows, -1)
            assert_same(other.logits(hidden_ND), model.logits(hidden_ND))
        with torch.no_grad():
            for network in (model, other):
                (network.embedding if network.head is None else network.head).weight.mul_(2.0)


@pytest.mark.parametrize("retrieval", [True, False])
@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_a_compiled_step_is_one_graph_and_the_same(positions: str, retrieval: bool) -> None:
    config = tiny_config(positions=positions)
    batch = rich_batch(config)
    arguments = batch.arguments()
    if not retrieval:
        arguments |= {"neighbors_BLKR": None, "keep_BLKR": None}
    losses, gradients = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = make_model(config)
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        loss = step(**arguments, targets_BT=batch.targets_BT, loss_BT=batch.loss_BT)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(losses[1], losses[0])
    for name, expected in gradients[0].items():
        if expected is not None:
            torch.testing.assert_close(gradients[1][name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("baseline-132m", 132.1),
        ("baseline-368m", 368.1),
        ("baseline-1.3b", 1308.6),
        ("baseline-7b", 6979.3),
        ("retro-172m", 172.5),
        ("retro-425m", 425.5),
        ("retro-1.5b", 1451.4),
        ("retro-7.5b", 7531.5),
    ],
)
def test_the_papers_networks_have_the_papers_numbers_of_parameters(name: str, millions: float) -> None:
    """Matrices without embeddings; the norms' scales, which the paper does not count, are less than 0.02% of them."""
    with torch.device("meta"):
        model = Retro(PRESETS[name].model)
    tables = ("embedding.", "encoder_embedding.", "head.")
    own = {n: p for n, p in model.named_parameters() if not n.startswith(tables)}
    matrices = sum(p.numel() for p in own.values() if p.ndim == 2)
    assert all(p.is_meta for p in own.values())
    assert round(matrices / 1e6, 1) == millions
    assert sum(p.numel() for p in own.values()) < matrices * 1.0003
