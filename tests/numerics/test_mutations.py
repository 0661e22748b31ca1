"""Deliberate mistakes in the network's source are caught by the comparison with the oracle.

Each mutation is a replacement in the text of retro/attention.py, cca.py and model.py, one after the other. When the text is no
longer there, the test says so: the mutation is then to be written anew for the changed source, not dropped.
"""

import dataclasses
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import oracles
import pytest
import torch
from oracles import Oracle, assert_same, decode_ragged, decode_slots, prompt_batch, rich_batch, tiny_config

import retro

FILES = [Path(retro.__path__[0]) / name for name in ("attention.py", "cca.py", "model.py")]
IMPORTS = re.compile(r"^from retro\.(attention|cca) import .*\n", re.MULTILINE)
SOURCE = "\n".join(IMPORTS.sub("", path.read_text(encoding="utf-8")) for path in FILES)
MUTANT = "retro_model_mutant"

MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "the grid of CCA is shifted by M": [
        ("F.pad(normed_BTD, (0, 0, 1 - M, M - 1))", "F.pad(normed_BTD, (0, 0, -M, M))"),
        ("F.pad(self.keep_BT, (1 - M, M - 1))", "F.pad(self.keep_BT, (-M, M))"),
        ("F.pad(grid_BTD.view(B, T, D), (0, 0, M - 1, 1 - M))", "F.pad(grid_BTD.view(B, T, D), (0, 0, M, -M))"),
    ],
    "the grid of CCA is not shifted: a chunk sees its own neighbors": [
        ("F.pad(normed_BTD, (0, 0, 1 - M, M - 1))", "normed_BTD"),
        ("F.pad(self.keep_BT, (1 - M, M - 1))", "self.keep_BT"),
        ("F.pad(grid_BTD.view(B, T, D), (0, 0, M - 1, 1 - M))", "grid_BTD.view(B, T, D)"),
    ],
    "self-attention crosses documents": [("if not changes.any():", "if True:")],
    "self-attention crosses documents, masked whole": [
        ("segment_BT[:, None, :, None] == segment_BT[:, None, None, :]", "True")
    ],
    "self-attention crosses from a document into the next": [
        ("if T > DENSE_SLOTS:", "if True:"),
        ("row.nonzero()[:, 0] + 1", "row.nonzero()[1:, 0] + 1"),
    ],
    "self-attention sees the next token": [
        ("if T > DENSE_SLOTS:", "if True:"),
        ("(q, k, v, is_causal=True) for q, k, v in parts", "(q, k, v) for q, k, v in parts"),
    ],
    "self-attention sees the next token, masked whole": [(".tril()", ".tril(1)")],
    "the next document's tokens see the neighbors": [("same_BL[..., None] | own_M", "same_BL[..., None] | True")],
    "a document's last token does not see its chunk's neighbors": [
        ("same_BL[..., None] | own_M", "same_BL[..., None]"),
    ],
    "the encoder's self-attention reads masked neighbor tokens": [
        ("keep_PR[:, None, None, :]", "torch.ones_like(keep_PR)[:, None, None, :]"),
    ],
    "CCA reads masked neighbor tokens": [
        ("keep_NS[:, None, None, :]", "torch.ones_like(keep_NS)[:, None, None, :]"),
    ],
    "masked neighbor tokens are not zeroed before the encoder": [
        ("x_NKRE.reshape(N * K, R, E).masked_fill(~keep_PR[..., None], 0.0)", "x_NKRE.reshape(N * K, R, E)"),
    ],
    "H_u is masked but not zeroed where the chunk is empty": [
        ("hidden_NMD = hidden_NMD.masked_fill(~keep_NM[..., None], 0.0)", "pass"),
    ],
    "the encoder reads H_u where the chunk is empty": [
        ("keep_NM[:, None, None, :]", "torch.ones_like(keep_NM)[:, None, None, :]"),
    ],
    "a query that sees nothing gets the mean of all values": [
        ("y_BHTC.masked_fill(empty_B1T1, 0.0)", "y_BHTC"),
    ],
    "the positions of CCA queries are shifted twice": [
        ("Places.range(M - 1, 2 * M - 1, cca, like)", "Places.range(2 * M - 2, 3 * M - 2, cca, like)"),
    ],
    "positions in CCA run over the concatenated neighbors": [
        ("Places.range(0, R, cca, like, repeat=K)", "Places.range(0, K * R, cca, like)"),
    ],
    "positions of the encoder's cross-attention run over the concatenated neighbors": [
        ("Places.range(0, R, self.cross, x_PRE, repeat=K)", "Places.range(0, K * R, self.cross, x_PRE)"),
    ],
    "the encoder does not look at the decoder": [("if self.cross is not None and", "if False and")],
    "the encoder looks at the next chunk": [
        (
            "hidden_NMD = x_BTD.view(B * L, M, D)[near.chunk_N]",
            "hidden_NMD = x_BTD.roll(-M, dims=1).view(B * L, M, D)[near.chunk_N]",
        ),
    ],
    "the encoder looks at the decoder before self-attention": [
        ("view.read(x_BTD)", "view.read(input_BTD)"),
        (
            "x_BTD = x_BTD + self.dropout(view.self_attend",
            "input_BTD = x_BTD\n        x_BTD = x_BTD + (view.self_attend",
        ),
    ],
    "the encoder's final norm is left out": [
        ("self.norm(x_PRE).masked_fill(", "x_PRE.masked_fill("),
    ],
    "norms ignore the configured epsilon": [("eps=config.norm_eps", "eps=1e-6")],
    "the loss is a mean": [('reduction="sum"', 'reduction="mean"')],
    "cached: CCA keys of an earlier chunk are kept past a border": [
        ("chunk.keep_BS = keep_BS & ~ended_B[:, None]", "pass"),
    ],
    "cached: a row without new neighbors keeps those of the chunk before where other rows get new ones": [
        ("base.masked_fill(ended_B.view(", "base.masked_fill(torch.zeros_like(ended_B).view("),
    ],
    "cached: a query's position ignores the shift": [
        ("Places.of((self.slot_BT + 1) % M + M - 1,", "Places.of(self.slot_BT % M + M - 1,"),
    ],
    "cached: self-attention positions start again at every call": [
        (
            "self.places = Places.of(self.slot_BT, 0, high",
            "self.places = Places.of(self.slot_BT - self.slot_BT, 0, high",
        ),
    ],
    "cached: what a slot sees is not causal within a call": [(".tril(S - T)", ".tril(S)")],
    "cached: the first finished chunk instead of the newest gives the neighbors": [
        ("near.chunk_N % L == done_B[row_N] - 1", "near.chunk_N % L == 0"),
    ],
    "cached: the activations of the unfinished chunk are written one place too far": [
        ("scatter(1, place_BT[..., None]", "scatter(1, ((place_BT + 1) % (L * M))[..., None]"),
    ],
    "cached: slots are columns": [("keep_BT.cumsum(1) - 1", "torch.arange(T)")],
    "cached: empty slots of the unfinished chunk are read": [
        ("keep.reshape(B * L, M)[near.chunk_N]", "torch.ones_like(keep).reshape(B * L, M)[near.chunk_N]"),
    ],
    "cached: empty slots of the prompt are attended to": [
        (
            "self.cache.keep_BT[:, None, None, :] & self.keep_BT",
            "torch.ones_like(self.cache.keep_BT)[:, None, None, :] & self.keep_BT",
        ),
    ],
    "cached: the neighbors before a call are seen by the queries of its finished chunks": [
        ("self.keep_BT & (owner_BT < 0)", "self.keep_BT"),
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
    batch.keep_BLKR[1, 0] = False  # an empty chunk has no neighbors
    for prompt_chunks in (1, 3):
        cached_BTD = decode_slots(model, module.Cache(), batch, prompt_chunks)
        assert_same(cached_BTD[batch.keep_BT], oracle.hidden(batch)[batch.keep_BT])
    ragged_BTD = decode_ragged(model, module.Cache(), batch, torch.Generator().manual_seed(1), 2 * M + 1)
    assert_same(ragged_BTD[batch.keep_BT], oracle.hidden(batch)[batch.keep_BT])
    # The same once more with a border at which no row has any neighbor.
    keep_BLKR = batch.keep_BLKR.clone()
    keep_BLKR[:, 3] = False
    batch = dataclasses.replace(batch, keep_BLKR=keep_BLKR)
    cached_BTD = decode_slots(model, module.Cache(), batch, 2)
    assert_same(cached_BTD[batch.keep_BT], oracle.hidden(batch)[batch.keep_BT])


@pytest.mark.parametrize(
    "limit", ["T > DENSE_SLOTS", "True"]
)  # short sequences are masked whole, longer ones in segments
def test_an_unmutated_copy_of_the_network_passes(limit: str, loaded: types.ModuleType) -> None:
    exec(compile(SOURCE.replace("if T > DENSE_SLOTS:", f"if {limit}:"), MUTANT, "exec"), loaded.__dict__)
    check(loaded)


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_the_comparison_catches(mistake: str, loaded: types.ModuleType) -> None:
    source = SOURCE
    for old, new in MUTATIONS[mistake]:
        assert old in source, f"the network no longer contains {old!r}: write this mutation anew"
        source = source.replace(old, new)
    exec(compile(source, MUTANT, "exec"), loaded.__dict__)
    with pytest.raises(AssertionError):
        check(loaded)
