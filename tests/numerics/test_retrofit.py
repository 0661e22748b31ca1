"""RETROfitted models: the base is not touched, retrieval equals a naive oracle, and who may influence whom.

Bases are tiny and random. The oracle runs the base, untouched, on one document at a time, and adds to the input of its layers what
the naive CCA and encoder of oracles.py give, token by token. transformers compute rotary angles and some norms in float32, whatever
the base's dtype: so equality is up to 1e-5.
"""

import copy
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import builders
import oracles
import pytest
import torch
import transformers
from oracles import Batch, Oracle, assert_same, decode_slots, make_batch, prompt_batch, rich_batch, varied_lengths
from torch import Tensor, nn
from transformers import AutoConfig, GPT2Config, GPT2Model

from retro.cca import Cache
from retro.chunks import Passage
from retro.config import BaseConfig, GenerateConfig, ModelConfig
from retro.errors import ConfigError, MismatchError
from retro.generate import Lookup, Prompt, Role, generate, neighbor_tensors, prompt_ids
from retro.pretrained import LAYERS, check_digests, digests
from retro.retrofit import RetroFit, model_config, retrofit
from retro.tokenizer import Tokenizer

V = 29
ATOL = 1e-5
MAIN = ("gpt2", "llama", "opt", "gemma")

SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
WINDOW = {"sliding_window": 5}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma": GROUPED,
    "gemma2": {**GROUPED, **WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {**GROUPED, **WINDOW, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "gpt2": {},
    "gpt_neox": {},
    "llama": GROUPED,
    "mistral": {**GROUPED, **WINDOW},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 12},
    "phi": {"num_key_value_heads": 1},
    "phi3": {"num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 1, "use_sliding_window": True, "max_window_layers": 1, **WINDOW},
    "qwen3": GROUPED,
}


from_config: Any = transformers.AutoModelForCausalLM.from_config


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield from builders.one_thread()


def make_base(kind: str, dtype: torch.dtype = torch.float64, vocab: int = V) -> Any:
    sizes = SIZES | {"vocab_size": vocab} | CHANGES[kind]
    if kind == "gpt2":  # the only one with names of its own
        sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 96, "bos_token_id": 1, "eos_token_id": 2}
        sizes |= {"vocab_size": vocab}
    base = from_config(AutoConfig.for_model(kind, **sizes)).eval()
    oracles.randomize(base)
    return base.to(dtype)


def fit_config(base: Any, **changes: Any) -> ModelConfig:
    sizes = {
        "cca_layers": (2, 3),
        "num_heads": 2,
        "head_dim": 6,
        "encoder_dim": 10,
        "encoder_layers": 2,
        "encoder_heads": 3,
        "encoder_head_dim": 4,
        "encoder_ffw_dim": 11,
        "chunk_len": 4,
        "rope_base": 50.0,
        "norm_eps": 1e-4,
    }
    return model_config(base, **(sizes | changes))


def make_fit(kind: str, dtype: torch.dtype = torch.float64, vocab: int = V, **changes: Any) -> RetroFit:
    base = make_base(kind, dtype, vocab)
    model = retrofit(base, fit_config(base, **changes))
    for module in (model.cca, model.encoder, model.encoder_embedding):
        oracles.randomize(module, seed=1)
    return model.to(dtype)


# The base is not touched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_without_retrieval_logits_are_those_of_the_base_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    """Called as the base, as our network, and through its own generation; with weights of CCA that are far from zero."""
    base = make_base(kind, dtype)
    plain = copy.deepcopy(base)
    model = retrofit(base, fit_config(base))
    for module in (model.cca, model.encoder, model.encoder_embedding):
        oracles.randomize(module)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, V, (2, 14), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    with torch.no_grad():
        expected_BTV = plain(ids_BT).logits
        assert torch.equal(model.base(ids_BT).logits, expected_BTV)
        assert torch.equal(model(ids_BT), expected_BTV)
        nothing = torch.zeros(2, 3, 2, 5, dtype=torch.bool)
        whole_BT = ids_BT[:, :12]
        with_none_BTV = model(whole_BT, neighbors_BLKR=torch.zeros_like(nothing, dtype=torch.long), keep_BLKR=nothing)
        assert torch.equal(with_none_BTV, plain(whole_BT).logits)
        masked = {"attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)}
        assert torch.equal(model.base(ids_BT, **masked).logits, plain(ids_BT, **masked).logits)
        options: dict[str, Any] = {"attention_mask": mask_BT, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(ids_BT, **options), plain.generate(ids_BT, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_before_training_retrieval_changes_nothing_and_weights_stay_wider_than_the_base(
    kind: str, dtype: torch.dtype
) -> None:
    base = make_base(kind, dtype)
    model = retrofit(base, fit_config(base))
    batch = rich_batch(model.config)
    with torch.no_grad():
        on_BTD = model.hidden(**batch.arguments())
        off_BTD = model.hidden(batch.inputs_BT, keep_BT=batch.keep_BT, document_BL=batch.document_BL)
    assert on_BTD.dtype == dtype
    assert torch.equal(on_BTD[batch.keep_BT], off_BTD[batch.keep_BT])
    assert {parameter.dtype for name, parameter in model.named_parameters() if name in model.trained} == {torch.float32}


def test_training_changes_what_was_added_and_nothing_of_the_base() -> None:
    model = make_fit("llama", torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = rich_batch(model.config)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    model.train()
    loss = model(**batch.arguments(), targets_BT=batch.targets_BT, loss_BT=batch.loss_BT)
    loss.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == model.trained == set(model.state_dict())
    assert not any(name.startswith("base.") for name in changed)
    assert all(parameter.grad is None for parameter in model.base.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox"])
def test_nothing_is_random_while_training_though_the_base_has_dropout(kind: str) -> None:
    model = make_fit(kind).train()
    batch = rich_batch(model.config)
    training_BTD = model.hidden(**batch.arguments())
    assert torch.equal(training_BTD, model.eval().hidden(**batch.arguments()))


def test_a_state_goes_into_another_network_around_the_same_base() -> None:
    model = make_fit("gpt2")
    other = retrofit(make_base("gpt2"), model.config).to(torch.float64)
    batch = rich_batch(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.hidden(**batch.arguments()), model.hidden(**batch.arguments()))
    state = model.state_dict()
    del state["encoder.norm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*encoder\.norm\.weight"):
        other.load_state_dict(state)


# Equality with the oracle


def oracle_hidden(model: RetroFit, plain: Any, batch: Batch) -> Tensor:
    """Final activations [B, T, D], zero in empty slots: each document alone through the untouched base."""
    config, M = model.config, model.config.chunk_len
    oracle = Oracle(config, model.state_dict())
    table_VD = model.embedding(torch.arange(config.vocab_size)).detach().numpy()
    embedded = {
        v: oracle.weights["encoder_embedding.map.weight"] @ oracle._norm("encoder_embedding.norm", table_VD[v])
        for v in range(config.vocab_size)
    }
    decoder = plain.get_submodule(LAYERS[plain.config.model_type].rpartition(".")[0])
    layers = plain.get_submodule(LAYERS[plain.config.model_type])
    B, T = batch.inputs_BT.shape
    final_BTD: Tensor | None = None
    for b in range(B):
        for document in sorted(set(batch.document_BL[b].tolist())):
            slots = [t for t in range(T) if batch.keep_BT[b, t] and batch.document_BL[b, t // M] == document]
            if not slots:
                continue
            first_chunk = slots[0] // M
            encoded: dict[int, Any] = {}

            def add(number: int, x_1TD: Tensor, b: int = b, slots: list[int] = slots, encoded: Any = encoded) -> Tensor:
                x_TD = x_1TD[0].double().numpy()
                if number == 0:
                    for u in range(first_chunk, slots[-1] // M + 1):  # noqa: B023
                        chunk = [(t % M, x_TD[i]) for i, t in enumerate(slots) if t // M == u]
                        ids_KR, keep_KR = batch.neighbors_BLKR[b, u].tolist(), batch.keep_BLKR[b, u].tolist()
                        tokens = [
                            [(r, embedded[i]) for r, (i, kept) in enumerate(zip(ids, keep, strict=True)) if kept]
                            for ids, keep in zip(ids_KR, keep_KR, strict=True)
                        ]
                        encoded[u] = oracle.encode(tokens, chunk)
                result_TD = x_TD.copy()
                for i, t in enumerate(slots):
                    u = (t + 1) // M - 1
                    if u >= first_chunk:  # noqa: B023
                        normed_D = oracle._norm(f"cca.{number}.norm", x_TD[i])
                        result_TD[i] += oracle.cca(f"cca.{number}.attention", (t + 1) % M, normed_D, encoded[u])
                return torch.from_numpy(result_TD)[None].to(x_1TD.dtype)

            def hook(number: int, _: nn.Module, args: Any, kwargs: Any, add: Any = add) -> Any:
                if args:
                    return (add(number, args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": add(number, kwargs["hidden_states"])}

            handles = [
                layers[layer - 1].register_forward_pre_hook(
                    lambda *a, number=number, hook=hook: hook(number, *a), with_kwargs=True
                )
                for number, layer in enumerate(config.cca_layers)
            ]
            with torch.no_grad():
                final_TD = decoder(input_ids=batch.inputs_BT[b, slots][None], use_cache=False).last_hidden_state[0]
            for handle in handles:
                handle.remove()
            if final_BTD is None:
                final_BTD = torch.zeros(B, T, final_TD.shape[-1], dtype=torch.float64)
            final_BTD[b, slots] = final_TD.double()
    assert final_BTD is not None
    return final_BTD


@pytest.mark.parametrize("kind", LAYERS)
def test_hidden_and_loss_equal_the_oracle(kind: str) -> None:
    """Packed documents, leads, partial and empty chunks, missing neighbors; windows, where there are some, within documents."""
    plain = make_base(kind)
    model = make_fit(kind)
    batch = rich_batch(model.config, K=2, R=6)
    expected_BTD = oracle_hidden(model, plain, batch)
    with torch.no_grad():
        hidden_BTD = model.hidden(**batch.arguments())
        loss = model(**batch.arguments(), targets_BT=batch.targets_BT, loss_BT=batch.loss_BT)
        expected_BTV = model.logits(expected_BTD)
    assert_same(hidden_BTD[batch.keep_BT], expected_BTD[batch.keep_BT], atol=ATOL)
    expected = Oracle(model.config, {}).loss(expected_BTV, batch.targets_BT, batch.loss_BT)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"cca_layers": (1,), "encoder_layers": 1},
        {"cca_layers": (1, 2, 3)},
        {"cca_layers": (3,), "chunk_len": 2},
        {"chunk_len": 6, "encoder_layers": 3},
    ],
    ids=["first", "all", "last-chunks-of-2", "chunks-of-6"],
)
@pytest.mark.parametrize("kind", MAIN)
def test_other_sizes_equal_the_oracle(kind: str, changes: dict[str, Any]) -> None:
    plain = make_base(kind)
    model = make_fit(kind, **changes)
    batch = rich_batch(model.config, K=3, R=5, seed=1)
    with torch.no_grad():
        hidden_BTD = model.hidden(**batch.arguments())
    assert_same(hidden_BTD[batch.keep_BT], oracle_hidden(model, plain, batch)[batch.keep_BT], atol=ATOL)


@pytest.mark.parametrize("kind", MAIN)
def test_one_document_in_full_sequences_needs_no_mask_and_equals_the_oracle(kind: str) -> None:
    model = make_fit(kind)
    M = model.config.chunk_len
    batch = make_batch(model.config, [[(0, 4 * M)], [(0, 4 * M)]], varied_lengths(2, 4, 2, 5), R=5)
    with torch.no_grad():
        short_BTD = model.hidden(batch.inputs_BT, neighbors_BLKR=batch.neighbors_BLKR, keep_BLKR=batch.keep_BLKR)
        long_BTD = model.hidden(**batch.arguments())
    assert_same(short_BTD, oracle_hidden(model, make_base(kind), batch), atol=ATOL)
    assert_same(short_BTD, long_BTD, atol=ATOL)


def test_a_bfloat16_base_is_close_to_the_same_in_float32() -> None:
    """What is added is computed in float32; the base keeps 8 bits of its activations."""
    narrow, wide = make_fit("llama", torch.float32), make_fit("llama", torch.float32)
    narrow.base.to(torch.bfloat16)
    batch = rich_batch(wide.config)
    with torch.no_grad():
        hidden_BTD = narrow.hidden(**batch.arguments())
        expected_BTD = wide.hidden(**batch.arguments())
    assert hidden_BTD.dtype == torch.bfloat16
    error = (hidden_BTD.float() - expected_BTD)[batch.keep_BT].norm() / expected_BTD[batch.keep_BT].norm()
    assert float(error) < 0.05


# Who may influence whom


def influences(model: RetroFit, batch: Batch, of: nn.Module) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """The first output of a module, and its gradient under a random projection of each kept slot (b, t)."""
    captured: list[Tensor] = []

    def separate(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        if captured:
            return None
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


@pytest.mark.parametrize("cca_layers", [(2, 3), (3,)], ids=str)
@pytest.mark.parametrize("kind", MAIN)
def test_a_neighbor_token_influences_exactly_the_slots_that_may_see_it(kind: str, cca_layers: tuple[int, ...]) -> None:
    """First the last slot of its chunk, then the same document to its end, for a layer of the base follows every CCA."""
    model = make_fit(kind, cca_layers=cca_layers)
    M = model.config.chunk_len
    batch = rich_batch(model.config, K=2, R=5)
    _, gradients = influences(model, batch, model.encoder_embedding)
    chunks = batch.keep_BLKR.flatten(0, 1).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    keep_NKR = batch.keep_BLKR.flatten(0, 1)[chunks]
    L = batch.document_BL.shape[1]
    reached = 0
    for (b, t), gradient_NKRE in gradients.items():
        for n, (row, u) in enumerate((chunk // L, chunk % L) for chunk in chunks):
            first = (u + 1) * M - 1
            same = bool(batch.document_BL[b, t // M] == batch.document_BL[row, u])
            allowed = row == b and (t == first or (t > first and same))
            expected_KR = keep_NKR[n] & allowed
            assert torch.equal((gradient_NKRE[n] != 0).any(dim=-1), expected_KR), (b, t, row, u)
            reached += int(expected_KR.sum())
    assert reached > 100


@pytest.mark.parametrize("kind", MAIN)
def test_an_input_token_influences_exactly_itself_and_later_slots_of_its_document(kind: str) -> None:
    model = make_fit(kind)
    M = model.config.chunk_len
    batch = rich_batch(model.config)
    _, gradients = influences(model, batch, model.embedding)
    B, T = batch.inputs_BT.shape
    for (b, t), gradient_BTD in gradients.items():
        expected_BT = torch.zeros(B, T, dtype=torch.bool)
        for s in range(t + 1):
            expected_BT[b, s] = batch.keep_BT[b, s] and batch.document_BL[b, s // M] == batch.document_BL[b, t // M]
        assert torch.equal((gradient_BTD != 0).any(dim=-1), expected_BT), f"slot {t} of row {b}"


# Neighbors are a set; what is masked does not exist


@pytest.mark.parametrize("kind", MAIN)
def test_the_order_of_neighbors_and_what_stands_in_masked_places_change_nothing(kind: str) -> None:
    model = make_fit(kind)
    batch = rich_batch(model.config, K=3, R=6)
    order = [2, 0, 1]
    swapped = dataclasses.replace(
        batch, neighbors_BLKR=batch.neighbors_BLKR[:, :, order], keep_BLKR=batch.keep_BLKR[:, :, order]
    )
    other = dataclasses.replace(
        batch,
        inputs_BT=batch.inputs_BT.masked_fill(~batch.keep_BT, -1),
        neighbors_BLKR=batch.neighbors_BLKR.masked_fill(~batch.keep_BLKR, -1),
    )
    keep_BT = batch.keep_BT
    with torch.no_grad():
        expected_BTD = model.hidden(**batch.arguments())
        assert_same(model.hidden(**swapped.arguments())[keep_BT], expected_BTD[keep_BT], atol=ATOL)
        assert torch.equal(model.hidden(**other.arguments())[keep_BT], expected_BTD[keep_BT])


@pytest.mark.parametrize("kind", MAIN)
def test_longer_neighbors_and_missing_ones_change_nothing(kind: str) -> None:
    model = make_fit(kind)
    batch = rich_batch(model.config, K=2, R=5)
    pad = (0, 4, 0, 1)
    longer = dataclasses.replace(
        batch,
        neighbors_BLKR=nn.functional.pad(batch.neighbors_BLKR, pad, value=3),
        keep_BLKR=nn.functional.pad(batch.keep_BLKR, pad),
    )
    with torch.no_grad():
        expected_BTD = model.hidden(**batch.arguments())[batch.keep_BT]
        assert_same(model.hidden(**longer.arguments())[batch.keep_BT], expected_BTD, atol=ATOL)


# Decoding


@pytest.mark.parametrize("prompt_chunks", [1, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_cached_decoding_equals_the_full_forward_pass(kind: str, prompt_chunks: int) -> None:
    model = make_fit(kind)
    batch = prompt_batch(model.config)
    with torch.no_grad():
        full_BTD = model.hidden(**batch.arguments())
    cached_BTD = decode_slots(model, Cache(), batch, prompt_chunks)
    assert_same(cached_BTD[batch.keep_BT], full_BTD[batch.keep_BT], atol=ATOL)


class Reversed:
    """Finds passages made of the query: every query has others."""

    def __init__(self) -> None:
        self.queries: list[str] = []

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        self.queries += queries
        return [
            [
                Passage(
                    row=i,
                    key="",
                    title="",
                    url="",
                    text=f"{query[::-1]}{i}",
                    continuation="",
                    score=1.0,
                    metadata="",
                )
                for i in range(k)
            ]
            for query in queries
        ]


PROMPTS = ("The oil", "An embargo began", "In October 1973 prices rose")


def text_model(kind: str, **changes: Any) -> tuple[RetroFit, Tokenizer, Lookup]:
    """A model that continues bytes, and finds neighbors for them; float32, because transformers mask float64 with infinities."""
    tokenizer = builders.toy_tokenizer()
    model = make_fit(kind, torch.float32, vocab=tokenizer.vocab_size, **changes)
    model.base.generation_config.eos_token_id = tokenizer.eos_id
    model.base.generation_config.pad_token_id = tokenizer.eos_id
    return model, tokenizer, Lookup(tokenizer=tokenizer, retriever=Reversed(), num_neighbors=2, neighbor_len=6)


def full_logits(model: RetroFit, lookup: Lookup, ids: list[int], prompt: int) -> Tensor:
    """Logits [n, V] after every token, without any cache; the first `prompt` tokens end on a chunk border."""
    M, n = model.config.chunk_len, len(ids)
    lead = -prompt % M
    L = -(-(lead + n) // M)
    inputs_1T = torch.zeros(1, L * M, dtype=torch.long)
    inputs_1T[0, lead : lead + n] = torch.tensor(ids)
    keep_1T = torch.zeros(1, L * M, dtype=torch.bool)
    keep_1T[0, lead : lead + n] = True
    texts: list[list[str]] = []
    for u in range(L):
        whole = (u + 1) * M <= lead + n
        query = lookup.tokenizer.decode_chunk(ids, max(u * M - lead, 0), (u + 1) * M - lead)
        passages = Reversed().retrieve([query], lookup.num_neighbors)[0] if whole and query.strip() else []
        texts.append([passage.full_text for passage in passages])
    near = neighbor_tensors([texts], lookup.tokenizer, lookup.num_neighbors, lookup.neighbor_len)
    with torch.no_grad():
        logits_1TV: Tensor = model(inputs_1T, keep_BT=keep_1T, neighbors_BLKR=near[0], keep_BLKR=near[1])
    return logits_1TV[0, lead : lead + n]


def greedy(model: RetroFit, lookup: Lookup, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] != lookup.tokenizer.eos_id):
        ids.append(int(full_logits(model, lookup, ids, len(prompt))[-1].argmax()))
    return ids[len(prompt) :]


def padded(prompts: Sequence[list[int]], side: int = 0) -> dict[str, Tensor]:
    """Left-padded, with the token `side` where there is none."""
    T = max(map(len, prompts))
    ids = torch.tensor([[side] * (T - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_bases_generate_retrieves_and_equals_full_forward_passes(kind: str) -> None:
    """Prompts of three lengths, padded on the left; each is looked up on its own grid."""
    model, tokenizer, lookup = text_model(kind)
    prompts = [prompt_ids(prompt, tokenizer) for prompt in PROMPTS]
    made_BT = model.generate(**padded(prompts), lookup=lookup, max_new_tokens=11, do_sample=False)
    longest = max(map(len, prompts))
    for ids, made in zip(prompts, made_BT.tolist(), strict=True):
        expected = greedy(model, lookup, ids, 11)
        assert made[longest : longest + len(expected)] == expected
        assert all(token == tokenizer.eos_id for token in made[longest + len(expected) :])
    plain = make_base(kind, torch.float32, tokenizer.vocab_size)
    with torch.no_grad():
        assert torch.equal(model.base(**padded(prompts)).logits, plain(**padded(prompts)).logits)


def test_guessed_tokens_are_taken_back_within_a_chunk_and_not_across_its_border() -> None:
    """Speculative decoding: the base guesses several tokens, and crops the cache by those that were wrong."""
    model, tokenizer, lookup = text_model("llama")
    ids = prompt_ids("abababab abab ab", tokenizer)
    options: dict[str, Any] = {"do_sample": False, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}
    with pytest.raises(ConfigError, match="cannot be taken back across a chunk border"):
        model.generate(**padded([ids]), lookup=lookup, max_new_tokens=40, **options)
    wide, _, _ = text_model("llama", chunk_len=64)
    made = wide.generate(**padded([ids]), lookup=lookup, max_new_tokens=20, **options)
    assert made[0, len(ids) :].tolist() == greedy(wide, lookup, ids, 20)


@pytest.mark.parametrize("kind", MAIN)
def test_our_own_generation_equals_the_bases(kind: str) -> None:
    model, tokenizer, lookup = text_model(kind)
    config = GenerateConfig(max_new_tokens=11, num_neighbors=2, neighbor_len=6)
    results = generate(model, tokenizer, list(PROMPTS), config, retriever=Reversed())  # type: ignore[arg-type]
    for text, result in zip(PROMPTS, results, strict=True):
        assert result.ids == greedy(model, lookup, prompt_ids(text, tokenizer), 11)
        logits_TV = full_logits(
            model, lookup, prompt_ids(text, tokenizer) + result.ids, len(prompt_ids(text, tokenizer))
        )
        scores_V = torch.log_softmax(logits_TV[-2].float(), dim=-1)
        assert result.log_probs[-1] == pytest.approx(float(scores_V[result.ids[-1]]), abs=1e-4)


def test_our_own_generation_without_retrieval_is_the_bases() -> None:
    model, tokenizer, _ = text_model("llama")
    plain = make_base("llama", torch.float32, vocab=tokenizer.vocab_size)
    [result] = generate(model, tokenizer, ["The oil"], GenerateConfig(max_new_tokens=11, num_neighbors=0))  # type: ignore[arg-type]
    ids = prompt_ids("The oil", tokenizer)
    options = {"max_new_tokens": 11, "do_sample": False, "eos_token_id": tokenizer.eos_id}
    made = plain.generate(**padded([ids]), **options)
    assert result.ids == made[0, len(ids) :].tolist()


def test_a_prompts_own_passages_are_read() -> None:
    """As `ask` gives them: neighbors of the prompt's last chunk, kept from then on."""
    model, tokenizer, _ = text_model("gpt2")
    ids = prompt_ids("The oil crisis", tokenizer)
    last = -(-len(ids) // model.config.chunk_len) - 1
    config = GenerateConfig(max_new_tokens=8, num_neighbors=2)
    made = [
        generate(model, tokenizer, [Prompt(ids, {last: texts})], config)[0].log_probs  # type: ignore[arg-type]
        for texts in (["embargo", "prices"], ["prices", "embargo"], ["something else"])
    ]
    assert made[0] == pytest.approx(made[1], abs=1e-4)
    assert made[0] != pytest.approx(made[2], abs=1e-4)


@pytest.mark.parametrize("kind", MAIN)
def test_beams_are_scored_with_their_own_neighbors(kind: str) -> None:
    """The score of each beam is the sum of the log-probabilities of full forward passes over it."""
    model, tokenizer, lookup = text_model(kind)
    prompts = [prompt_ids(prompt, tokenizer) for prompt in PROMPTS]
    made = model.generate(
        **padded(prompts),
        lookup=lookup,
        max_new_tokens=9,
        do_sample=False,
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    longest = max(map(len, prompts))
    for number, (row, score) in enumerate(zip(made.sequences.tolist(), made.sequences_scores.tolist(), strict=True)):
        prompt = prompts[number // 2]
        new = row[longest:]
        new = new[: new.index(tokenizer.eos_id) + 1] if tokenizer.eos_id in new else new
        logits_TV = full_logits(model, lookup, prompt + new, len(prompt))[len(prompt) - 1 : -1]
        own = torch.log_softmax(logits_TV.float(), dim=-1).gather(1, torch.tensor(new)[:, None]).sum()
        assert score == pytest.approx(float(own), abs=1e-3)


def test_sampling_draws_from_the_distribution_with_neighbors() -> None:
    model, tokenizer, lookup = text_model("llama")
    ids = prompt_ids("The oil", tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": True, "top_k": 0, "output_logits": True}
    torch.manual_seed(3)
    made = model.generate(**padded([ids]), lookup=lookup, return_dict_in_generate=True, **options)
    row = made.sequences[0].tolist()
    logits_TV = full_logits(model, lookup, row, len(ids))
    for step, logits_1V in enumerate(made.logits):
        assert_same(logits_1V[0], logits_TV[len(ids) - 1 + step], atol=1e-4)


# What is trained of the base besides


def test_adapters_begin_as_zero_and_are_trained_and_kept() -> None:
    plain = make_base("gpt2", torch.float32)
    base = copy.deepcopy(plain)
    model = retrofit(base, fit_config(base), BaseConfig(name="gpt2", lora_rank=2))
    batch = rich_batch(model.config)
    with torch.no_grad():
        assert torch.equal(model(batch.inputs_BT), plain(batch.inputs_BT).logits)
    adapters = {name for name in model.trained if name.startswith("base.")}
    assert len(adapters) == 3 * 4 * 2  # two matrices beside each of four of each layer
    assert all("lora_" in name for name in adapters)
    loss = model(**batch.arguments(), targets_BT=batch.targets_BT, loss_BT=batch.loss_BT)
    loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == model.trained
    assert model.digests == digests(plain)


@pytest.mark.parametrize(("unfreeze", "count"), [(1, 1), (2, 2), (-1, 3)])
def test_the_last_layers_or_all_of_the_base_are_unfrozen(unfreeze: int, count: int) -> None:
    base = make_base("llama", torch.float32)
    model = retrofit(base, fit_config(base), BaseConfig(name="llama", unfreeze=unfreeze))
    trained = {name for name in model.trained if name.startswith("base.")}
    layers = {name.split(".")[3] for name in trained if ".layers." in name}
    assert layers == {str(number) for number in range(3 - count, 3)}
    assert any("embed_tokens" in name for name in trained) == (unfreeze == -1)
    with pytest.raises(ConfigError, match="unfreeze = 4: the base has 3 layers"):
        retrofit(make_base("llama"), None, BaseConfig(name="llama", unfreeze=4))


def test_a_tied_base_that_is_trained_is_kept_once() -> None:
    base = make_base("gpt2", torch.float32)
    base.lm_head.weight = base.transformer.wte.weight  # as its configuration says; whatever the library did
    model = retrofit(base, fit_config(base), BaseConfig(name="gpt2", unfreeze=-1))
    assert "base.transformer.wte.weight" in model.state_dict()
    assert "base.lm_head.weight" not in model.state_dict()
    model.load_state_dict(model.state_dict())


def test_checkpointed_activations_give_the_same_loss_and_gradients() -> None:
    model, other = make_fit("opt"), make_fit("opt")
    other.checkpoint_activations()
    batch = rich_batch(model.config)
    losses = []
    for network in (model, other):
        loss = network.train()(**batch.arguments(), targets_BT=batch.targets_BT, loss_BT=batch.loss_BT)
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for name in model.trained:
        assert torch.equal(model.get_parameter(name).grad, other.get_parameter(name).grad), name  # type: ignore[arg-type]


# The same base


def test_a_base_is_known_again_in_another_dtype_and_another_one_is_not() -> None:
    base = make_base("llama", torch.float32)
    narrow = copy.deepcopy(base).to(torch.bfloat16)
    assert digests(base) == digests(narrow)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight[3, 5] *= 1.01
    names = {"trained_on": "first", "given": "second", "quantized": False}
    check_digests(digests(base), digests(narrow), **names)  # type: ignore[arg-type]
    with pytest.raises(
        MismatchError, match=r"base first, and second is another one: 1 tensors differ \(model\.layers\.1\.mlp"
    ):
        check_digests(digests(base), digests(tuned), **names)  # type: ignore[arg-type]
    fewer = {name: digest for name, digest in digests(base).items() if "mlp" not in name}
    check_digests(digests(base), fewer, trained_on="first", given="second", quantized=True)
    with pytest.raises(MismatchError, match="9 tensors differ"):
        check_digests(digests(base), fewer, **names)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="none has the same name"):
        check_digests(digests(base), {}, trained_on="first", given="second", quantized=True)


# What cannot work


def test_a_base_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="GPT2Model has no language modeling head"):
        retrofit(GPT2Model(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=V)))


def test_an_encoder_decoder_is_refused() -> None:
    base = from_config(AutoConfig.for_model("bart", d_model=16, encoder_layers=1, decoder_layers=1))
    base.config.is_encoder_decoder = True
    with pytest.raises(ConfigError, match="is an encoder-decoder"):
        retrofit(base)


def test_an_unknown_architecture_is_refused_unless_its_layers_are_named() -> None:
    sizes = {**SIZES, **GROUPED}
    base = from_config(AutoConfig.for_model("olmo", **sizes)).to(torch.float64).eval()
    with pytest.raises(
        ConfigError, match=r"unknown architecture 'olmo': known are gemma, .* say where .* 'model\.layers'"
    ):
        retrofit(base)
    for path, message in (("model.blocks", "has nothing at layers"), ("model.norm", "no list of layers")):
        with pytest.raises(ConfigError, match=message):
            retrofit(base, None, BaseConfig(name="olmo", layers=path))
    plain = copy.deepcopy(base)
    model = retrofit(base, fit_config(base), BaseConfig(name="olmo", layers="model.layers"))
    ids_BT = torch.arange(3, 11)[None]
    assert torch.equal(model(ids_BT), plain(ids_BT).logits)


def test_a_base_whose_logits_are_more_than_a_projection_is_refused() -> None:
    base = from_config(AutoConfig.for_model("granite", **SIZES, **GROUPED, logits_scaling=4.0)).eval()
    with pytest.raises(ConfigError, match="more with its final activations"):
        retrofit(base, None, BaseConfig(name="granite", layers="model.layers"))


def test_attention_without_masks_is_refused() -> None:
    base = make_base("llama")
    base.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match="attn_implementation='sdpa'"):
        retrofit(base)


def test_sizes_of_another_base_are_refused() -> None:
    base = make_base("llama")
    other = dataclasses.replace(fit_config(base), dim=24, vocab_size=V + 1)
    with pytest.raises(ConfigError, match=f"vocab_size = {V + 1} instead of {V}, dim = 24 instead of 16"):
        retrofit(base, other)
    with pytest.raises(ConfigError, match="cca_layers is empty"):
        retrofit(base, fit_config(base, cca_layers=()))


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_more_tokens_than_the_base_has_positions_are_refused(kind: str) -> None:
    model = make_fit(kind)
    with pytest.raises(ConfigError, match="100 tokens in a row, but the base knows 96 positions"):
        model(torch.ones(1, 100, dtype=torch.long))
    packed = torch.zeros(1, 25, dtype=torch.long)
    packed[0, 12:] = 1
    with torch.no_grad():
        assert model(torch.ones(1, 100, dtype=torch.long), document_BL=packed).isfinite().all()


def test_default_sizes_are_the_papers_where_the_base_is_wide_enough() -> None:
    sizes = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8192}
    config = AutoConfig.for_model("gpt_neox", **sizes)
    with torch.device("meta"):
        base = from_config(config)
    chosen = model_config(base)
    assert chosen.cca_layers == (6, 9, 12, 15, 18, 21, 24)
    assert (chosen.encoder_dim, chosen.encoder_layers, chosen.encoder_ffw_dim) == (896, 2, 3584)
    assert (chosen.dim, chosen.num_heads, chosen.head_dim) == (2048, 16, 128)
    assert model_config(make_base("llama")).cca_layers == (2,)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_a_training_step_compiles_without_graph_breaks(kind: str) -> None:
    model = make_fit(kind, torch.float32).train()
    batch = rich_batch(model.config)
    arguments = {**batch.arguments(), "targets_BT": batch.targets_BT, "loss_BT": batch.loss_BT}
    losses, gradients = [], []
    torch._dynamo.reset()
    for network in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss = network(**arguments)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: model.get_parameter(name).grad for name in model.trained})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-3)
