"""A pretrained encoder as the beginning of a neighbor encoder; its own library says what it reads."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import BertModel, GPT2Config, GPT2Model

from retro.config import DEFAULT_ENCODER, PRESETS, ModelConfig, RunConfig, TrainConfig, load_run_config
from retro.errors import ConfigError, MismatchError
from retro.model import Retro
from retro.pretrained_encoder import load_encoder
from retro.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bert(make_encoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("bert") / "bert", positions=512)


def sizes(folder: Path, **changes: Any) -> ModelConfig:
    """A network that fits the encoder in a folder."""
    of = BertModel.from_pretrained(folder).config
    values: dict[str, Any] = {
        "vocab_size": of.vocab_size,
        "dim": of.hidden_size,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "ffw_dim": 32,
        "cca_layers": (1, 2),
        "encoder": "bert",
        "encoder_dim": of.hidden_size,
        "encoder_layers": of.num_hidden_layers,
        "encoder_heads": of.num_attention_heads,
        "encoder_head_dim": of.hidden_size // of.num_attention_heads,
        "encoder_ffw_dim": of.intermediate_size,
    }
    return ModelConfig(**(values | changes))


def begun(folder: Path, **changes: Any) -> Retro:
    model = Retro(sizes(folder, **changes)).initialize(torch.Generator().manual_seed(0))
    load_encoder(model, str(folder), Tokenizer.load(str(folder)).fingerprint)
    model.eval()
    return model


def test_a_neighbor_is_read_as_the_librarys_own_network_reads_it_behind_the_chunk(bert: Path) -> None:
    model = begun(bert)
    own: Any = BertModel.from_pretrained(bert)
    tokenizer = Tokenizer.load(str(bert))
    M = model.config.chunk_len
    chunk = [tokenizer.bos_id, *tokenizer.encode("When did the oil crisis begin?").ids.tolist()]
    texts = [
        "It began in October 1973.",
        "The embargo ended in March 1974, after which prices rose for a long time.",
        "",
    ]
    neighbors = [tokenizer.encode(text).ids.tolist() for text in texts]
    R, S = max(map(len, neighbors)) + 3, len(chunk)
    ids_1KR, keep_1KR = torch.zeros(1, 3, R, dtype=torch.long), torch.zeros(1, 3, R, dtype=torch.bool)
    for k, ids in enumerate(neighbors):
        ids_1KR[0, k, : len(ids)], keep_1KR[0, k, : len(ids)] = torch.tensor(ids, dtype=torch.long), True
    chunk_1M, keep_1M = torch.zeros(1, M, dtype=torch.long), torch.zeros(1, M, dtype=torch.bool)
    chunk_1M[0, M - S :], keep_1M[0, M - S :] = torch.tensor(chunk), True
    with torch.no_grad():
        assert model.encoder is not None
        encoded_1KRE = model.encoder(model.embedding(ids_1KR), keep_1KR, model.embedding(chunk_1M), keep_1M)
        for k, ids in enumerate(neighbors[:2]):
            read = own(
                input_ids=torch.tensor([chunk + ids]),
                token_type_ids=torch.tensor([[0] * S + [1] * len(ids)]),
                position_ids=torch.tensor([[*range(S), *range(M, M + len(ids))]]),
            ).last_hidden_state[0, S:]
            table_VE = own.get_input_embeddings().weight
            expected_RE = _rms(read) + _rms(table_VE[torch.tensor(ids)])
            assert_close(encoded_1KRE[0, k, : len(ids)], expected_RE, rtol=0, atol=2e-5)
    assert not encoded_1KRE[~keep_1KR].any()


def _rms(x_RE: torch.Tensor) -> torch.Tensor:
    return x_RE / x_RE.square().mean(dim=1, keepdim=True).sqrt()


def test_more_than_it_has_places_for_is_refused(bert: Path) -> None:
    model = begun(bert)
    near = torch.ones(1, 1, 1, 449, dtype=torch.long)
    with pytest.raises(ConfigError, match="reads at most 512 at once; lower neighbor_len"):
        model.hidden(torch.ones(1, model.config.chunk_len, dtype=torch.long), neighbors_BLKR=near, keep_BLKR=near > 0)


def test_the_decoder_has_the_encoders_table(bert: Path) -> None:
    own: Any = BertModel.from_pretrained(bert)
    table_VE = own.get_input_embeddings().weight
    assert torch.equal(begun(bert).embedding.weight, table_VE)


def test_of_a_table_that_is_larger_than_the_vocabulary_the_rest_is_left_out(bert: Path) -> None:
    table_VE = begun(bert).embedding.weight
    assert torch.equal(begun(bert, vocab_size=1475).embedding.weight, table_VE[:1475])


@pytest.mark.parametrize("cca_layers", [(1, 2), (2,)])
def test_what_the_encoder_reads_of_the_decoder_begins_as_embeddings(bert: Path, cca_layers: tuple[int, ...]) -> None:
    model = begun(bert, cca_layers=cca_layers)
    M = model.config.chunk_len
    ids_1T = torch.arange(3, 3 + 2 * M)[None]
    seen: list[torch.Tensor] = []
    assert model.encoder is not None
    model.encoder.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[2]))
    near = torch.full((1, 2, 1, 4), 7)
    with torch.no_grad():
        model.hidden(ids_1T, neighbors_BLKR=near, keep_BLKR=torch.ones_like(near, dtype=torch.bool))
        assert torch.equal(torch.cat(seen), model.embedding(ids_1T).view(2, M, -1))


def test_the_preset_fits_the_default_encoder_whose_tokenizer_has_its_name() -> None:
    run = PRESETS["reader"]
    model = Retro(run.model).initialize(torch.Generator().manual_seed(0))
    tokenizer = Tokenizer.load(DEFAULT_ENCODER)
    assert run.train.encoder == DEFAULT_ENCODER
    load_encoder(model, run.train.encoder, tokenizer.fingerprint)
    assert tokenizer.vocab_size == run.model.vocab_size


def test_another_tokenizer_is_refused(bert: Path) -> None:
    with pytest.raises(MismatchError, match="not in the tokens of the encoder"):
        load_encoder(Retro(sizes(bert)), str(bert), "another")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": 1}, r"encoder.layer.1\S+ is unknown"),
        ({"encoder_layers": 5}, r"encoder.layer.2\S+ is missing"),
        ({"encoder_ffw_dim": 7}, r"is \[\d+, \d+\] instead of \[7, \d+\]|is \[\d+\] instead of \[7\]"),
        ({"vocab_size": 1501}, r"the table is .* instead of \[1501,"),
    ],
)
def test_other_sizes_are_refused(bert: Path, changes: dict[str, Any], message: str) -> None:
    tokenizer = Tokenizer.load(str(bert))
    with pytest.raises(MismatchError, match=message):
        load_encoder(Retro(sizes(bert, **changes)), str(bert), tokenizer.fingerprint)


def test_what_is_no_bert_or_not_there_is_refused(bert: Path, tmp_path: Path) -> None:
    GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11)).save_pretrained(tmp_path)
    model = Retro(sizes(bert))
    with pytest.raises(ConfigError, match="of the kind gpt2: take a BERT"):
        load_encoder(model, str(tmp_path), "any")
    with pytest.raises(ConfigError, match="cannot be opened"):
        load_encoder(model, str(tmp_path / "nothing"), "any")


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({}, {"neighbor_len": 449}, "reads at most 512 tokens"),
        ({"encoder": "own"}, {}, "needs model.encoder = 'bert'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    model: dict[str, Any], train: dict[str, Any], message: str
) -> None:
    run = PRESETS["reader"]
    with pytest.raises(ConfigError, match=message):
        RunConfig(model=replace(run.model, **model), train=replace(run.train, **train))


@pytest.mark.parametrize("changes", [{"tie_embeddings": False}, {"encoder_head_dim": 30}])
def test_sizes_that_no_bert_has_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="encoder = 'bert'"):
        replace(PRESETS["reader"].model, **changes)


def test_with_a_base_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="with \\[base\\] leave it out"):
        load_run_config(None, ["base.name=gpt2"], preset="reader")


def test_encoder_and_table_have_shares_of_the_rate(bert: Path) -> None:
    from retro.data import Batch
    from retro.train_setup import make_optimizer
    from retro.train_step import train_step

    model = begun(bert)
    optimizer = make_optimizer(model, TrainConfig(encoder_rate=0.25, table_rate=0.125, weight_decay=0.0))
    shares = {id(p): group["share"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = {"encoder": 0.25, "embedding": 0.125}.get(name.partition(".")[0], 1.0)
        assert shares[id(parameter)] == expected, name
    M = model.config.chunk_len
    ids = torch.arange(2 * M)[None] % model.config.vocab_size
    full = torch.ones(1, 2 * M, dtype=torch.bool)
    batch = Batch(
        inputs_BT=ids,
        targets_BT=ids,
        keep_BT=full,
        loss_BT=full,
        document_BL=torch.zeros(1, 2, dtype=torch.long),
        neighbors_BLKR=ids[:, :9].view(1, 1, 1, 9).expand(1, 2, 1, 9),
        keep_BLKR=torch.ones(1, 2, 1, 9, dtype=torch.bool),
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_step(model, optimizer, batch, micro_batch_size=1, rate=1e-3, grad_clip=0, dtype=torch.float32)
    # The first step of Adam moves every weight that has a gradient by its rate.
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    assert moved["layers.1.attention.v.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["encoder.bert.encoder.layer.0.output.dense.weight"] == pytest.approx(2.5e-4, rel=1e-2)
    assert moved["embedding.weight"] == pytest.approx(1.25e-4, rel=1e-2)
