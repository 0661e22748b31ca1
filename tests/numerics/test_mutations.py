"""Deliberate mistakes in the network's source are caught by the comparison with the oracle.

Each mutation is a replacement in the text of retro/model.py. When the text is no longer there, the test says so: the mutation
is then to be written anew for the changed source, not dropped.
"""

import dataclasses
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import oracles
import pytest
import torch
from oracles import Oracle, assert_same, decode_slots, prompt_batch, rich_batch, tiny_config

import retro.model

SOURCE = Path(retro.model.__file__).read_text(encoding="utf-8")
MUTANT = "retro_model_mutant"

MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "the grid of CCA is shifted by M": [
        ("F.pad(normed_BTD, (0, 0, 1 - M, M - 1))", "F.pad(normed_BTD, (0, 0, -M, M))"),
        ("F.pad(keep_BT, (1 - M, M - 1))", "F.pad(keep_BT, (-M, M))"),
        ("F.pad(grid_BTD, (0, 0, M - 1, 1 - M))", "F.pad(grid_BTD, (0, 0, M, -M))"),
    ],
    "the grid of CCA is not shifted: a chunk sees its own neighbors": [
        ("F.pad(normed_BTD, (0, 0, 1 - M, M - 1))", "normed_BTD"),
        ("F.pad(keep_BT, (1 - M, M - 1))", "keep_BT"),
        ("F.pad(grid_BTD, (0, 0, M - 1, 1 - M))", "grid_BTD"),
    ],
    "self-attention crosses documents": [
        ("document_BT[:, None, :, None] == document_BT[:, None, None, :]", "document_BT[:, None, None, :] >= 0"),
    ],
    "self-attention sees the next token": [(".tril()", ".tril(1)")],
    "the next document's tokens see the neighbors": [("same_BL[..., None] | own_M", "same_BL[..., None] | True")],
    "a document's last token does not see its chunk's neighbors": [
        ("same_BL[..., None] | own_M", "same_BL[..., None]"),
    ],
    "the encoder's self-attention reads masked neighbor tokens": [
        ("keep_P11R = keep_NKR.reshape(N * K, 1, 1, R)", "keep_P11R = keep_NKR.new_ones(N * K, 1, 1, R)"),
    ],
    "CCA reads masked neighbor tokens": [
        ("self.near.keep_NKR.reshape(N, 1, 1, K * R)", "self.near.keep_NKR.new_ones(N, 1, 1, K * R)"),
    ],
    "masked neighbor tokens are not zeroed before the encoder": [
        ("x_NKRE.reshape(N * K, R, E).masked_fill(~keep_PR1, 0.0)", "x_NKRE.reshape(N * K, R, E)"),
    ],
    "H_u is masked but not zeroed where the chunk is empty": [
        ("hidden_NMD = hidden_NMD.masked_fill(~keep_NM[..., None], 0.0)", "pass"),
    ],
    "the encoder reads H_u where the chunk is empty": [
        ("keep_N11M = keep_NM[:, None, None, :]", "keep_N11M = torch.ones_like(keep_NM)[:, None, None, :]"),
    ],
    "a query that sees nothing gets the mean of all values": [
        ("y_BHTC.masked_fill(empty_B1T1, 0.0)", "y_BHTC"),
    ],
    "the positions of CCA queries are shifted twice": [
        ("torch.arange(M - 1, 2 * M - 1,", "torch.arange(2 * M - 2, 3 * M - 2,"),
    ],
    "positions in CCA run over the concatenated neighbors": [
        (
            "positions_S = torch.arange(R, device=like.device).repeat(K)",
            "positions_S = torch.arange(K * R, device=like.device)",
        ),
    ],
    "positions of the encoder's cross-attention run over the concatenated neighbors": [
        (
            "queries = Rotation.at(torch.arange(R, device=device).repeat(K)",
            "queries = Rotation.at(torch.arange(K * R, device=device)",
        ),
    ],
    "the encoder does not look at the decoder": [("if layer.cross is not None:", "if False:")],
    "the encoder looks at the next chunk": [
        (
            "hidden_NMD = x_BTD.view(B * L, M, D)[near.chunk_N]",
            "hidden_NMD = x_BTD.roll(-M, dims=1).view(B * L, M, D)[near.chunk_N]",
        ),
    ],
    "the encoder looks at the decoder before self-attention": [
        ("cca = self._begin_cca(x_BTD,", "cca = self._begin_cca(normed_BTD,"),
    ],
    "the encoder's final norm is left out": [
        ("self.norm(x_PRE).masked_fill(~keep_PR1, 0.0)", "x_PRE.masked_fill(~keep_PR1, 0.0)"),
    ],
    "norms ignore the configured epsilon": [("eps=config.norm_eps", "eps=1e-6")],
    "the loss is a mean": [('reduction="sum"', 'reduction="mean"')],
    "cached: CCA keys of an earlier chunk are kept past a border": [
        ("cache.cca, cache.cca_keep_BS = [], None", "pass"),
    ],
    "cached: the query's position ignores the shift": [
        ("position = (cache.length + 1) % M + M - 1", "position = cache.length % M + M - 1"),
    ],
    "cached: self-attention positions start again at every slot": [
        ("torch.arange(start, start + T, device=device)", "torch.arange(T, device=device)"),
    ],
    "cached: masked neighbor tokens are read": [
        ("self.cache.cca_keep_BS & self.keep_B1", "torch.ones_like(self.cache.cca_keep_BS) & self.keep_B1"),
    ],
    "cached: the prompt's first chunk instead of its last gives the neighbors": [
        ("last_N = self.near.chunk_N % L == L - 1", "last_N = self.near.chunk_N % L == 0"),
    ],
    "cached: the activations of the unfinished chunk are written one place too far": [
        ("cache.hidden_BMD[:, place : place + 1] = x_B1D", "cache.hidden_BMD[:, (place + 1) % M] = x_B1D[:, 0]"),
    ],
    "cached: the unfinished chunk's empty slots are those of one slot before": [
        (
            "cache.keep_BT[:, cache.length - M + 1 : cache.length + 1]",
            "cache.keep_BT[:, cache.length - M : cache.length]",
        ),
    ],
    "cached: empty slots of the prompt are attended to": [
        ("cache.append_keep(keep_BT)", "cache.append_keep(torch.ones_like(keep_BT))"),
    ],
}


@pytest.fixture
def loaded() -> Iterator[types.ModuleType]:
    """An empty module, known to the interpreter while the test runs: dataclasses look theirs up by name."""
    module = types.ModuleType(MUTANT)
    sys.modules[MUTANT] = module
    yield module
    del sys.modules[MUTANT]


def check(module: types.ModuleType) -> None:
    """Compares the whole network, its encoder and its cached decoding with the oracle."""
    config = tiny_config()
    model = module.Retro(config).to(torch.float64)
    oracles.randomize(model)
    oracle = Oracle(config, model.state_dict())
    batch = rich_batch(config)
    expected_BTD = oracle.hidden(batch)
    with torch.no_grad():
        hidden_BTD = model.hidden(**batch.arguments())
        loss, _ = model.loss(hidden_BTD, batch.targets_BT, batch.loss_BT)
    assert_same(hidden_BTD[batch.keep_BT], expected_BTD[batch.keep_BT])
    expected_loss = oracle.loss(oracle.logits(expected_BTD), batch.targets_BT, batch.loss_BT)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-12)

    generator = torch.Generator().manual_seed(0)
    M, N, K, R = config.chunk_len, 3, 2, 6
    nan = float("nan")
    keep_NKR = torch.rand(N, K, R, generator=generator) < 0.6
    keep_NM = torch.rand(N, M, generator=generator) < 0.6
    x_NKRE = torch.randn(N, K, R, config.encoder_dim, generator=generator, dtype=torch.float64)
    hidden_NMD = torch.randn(N, M, config.dim, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        encoded_NKRE = model.encoder(
            x_NKRE.masked_fill(~keep_NKR[..., None], nan),
            keep_NKR,
            hidden_NMD.masked_fill(~keep_NM[..., None], nan),
            keep_NM,
        )
    expected_NKRE = torch.zeros_like(x_NKRE)
    for n in range(N):
        neighbors = [[(r, x_NKRE[n, k, r].numpy()) for r in range(R) if keep_NKR[n, k, r]] for k in range(K)]
        chunk = [(i, hidden_NMD[n, i].numpy()) for i in range(M) if keep_NM[n, i]]
        for k, encoded in enumerate(oracle.encode(neighbors, chunk)):
            for r, encoded_E in encoded:
                expected_NKRE[n, k, r] = torch.from_numpy(encoded_E)
    assert_same(encoded_NKRE, expected_NKRE)

    batch = prompt_batch(config, L=6)
    for prompt_chunks in (1, 3):
        cached_BTD = decode_slots(model, module.Cache(), batch, prompt_chunks)
        assert_same(cached_BTD[batch.keep_BT], oracle.hidden(batch)[batch.keep_BT])
    # The same once more with a border at which no row has any neighbor.
    keep_BLKR = batch.keep_BLKR.clone()
    keep_BLKR[:, 3] = False
    batch = dataclasses.replace(batch, keep_BLKR=keep_BLKR)
    cached_BTD = decode_slots(model, module.Cache(), batch, 2)
    assert_same(cached_BTD[batch.keep_BT], oracle.hidden(batch)[batch.keep_BT])


def test_an_unmutated_copy_of_the_network_passes(loaded: types.ModuleType) -> None:
    exec(compile(SOURCE, MUTANT, "exec"), loaded.__dict__)
    check(loaded)


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_the_comparison_catches(mistake: str, loaded: types.ModuleType) -> None:
    source = SOURCE
    for old, new in MUTATIONS[mistake]:
        assert old in source, f"retro/model.py no longer contains {old!r}: write this mutation anew"
        source = source.replace(old, new)
    exec(compile(source, MUTANT, "exec"), loaded.__dict__)
    with pytest.raises(AssertionError):
        check(loaded)
