"""Networks as models of Hugging Face transformers, against our own generation and against the full pass over every single row."""

import functools
import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import builders
import huggingface_hub
import pytest
import safetensors.torch
import tokenizers
import torch
from builders import Library, speak_up, toy_model_config, toy_tokenizer
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DynamicCache,
    StaticCache,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    pipeline,
)

from retro.checkpoint import load_model, save_model
from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.errors import ConfigError, FormatError, MismatchError
from retro.generate import Prompt, generate, neighbor_tensors, prompt_ids
from retro.hub import RetroCache, RetroConfig, RetroForCausalLM
from retro.model import Retro
from retro.tokenizer import Tokenizer

M, R, K = 5, 7, 2
TEXTS = ["the cat sat on the mat", "a", "when the rain comes, the cat and the dog go", "red lines"]
one_thread = pytest.fixture(autouse=True)(builders.one_thread)


def passages(query: str, k: int) -> list[Passage]:
    digest = hashlib.blake2b(query.encode()).digest()
    return [
        Passage(
            row=i,
            key=f"key {i}",
            title="",
            url="",
            text=f"{digest[i + 1]} cats",
            continuation=" and dogs"[: digest[i + 9] % 9],
            score=1.0,
            metadata="{}",
        )
        for i in range(min(digest[0] % 4, k))
    ]


def random_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Retro:
    """Large random weights, so that neighbors and distant tokens matter; says printable ASCII only, where nothing is tied."""
    values = {"chunk_len": M, "num_layers": 3, "cca_layers": (2, 3), "tie_embeddings": False}
    model = Retro(toy_model_config(**(values | changes)))
    plain = [len(text) == 1 and " " <= text <= "~" for text in (toy_tokenizer().decode([i]) for i in range(258))]
    speak_up(model, std=1.5, seed=seed)
    with torch.no_grad():
        if model.head is not None:
            model.head.weight[~torch.tensor(plain)] = 0.0
    return model.to(dtype).eval()


def hub_model(seed: int = 0, dtype: torch.dtype = torch.float32, *, k: int = K, **changes: Any) -> RetroForCausalLM:
    """The same network as a model of transformers, with a retriever."""
    own = random_model(seed, dtype, **changes)
    tokenizer = toy_tokenizer()
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }
    config = RetroConfig(model=own.config, num_neighbors=k, neighbor_len=R, **special)
    model: Any = RetroForCausalLM(config)
    model.eval()
    model.model.to(dtype)
    model.model.load_state_dict(own.state_dict())
    model.tokenizer = tokenizer
    if own.config.cca_layers:
        model.set_retriever(Library(passages))
    assert isinstance(model, RetroForCausalLM)
    return model


def padded(rows: Sequence[Sequence[int]], *, left: bool = True) -> dict[str, Tensor]:
    """A batch of rows of any lengths; what stands in the padding must not matter."""
    T = max(map(len, rows))
    ids_BT, mask_BT = torch.full((len(rows), T), 77), torch.zeros(len(rows), T, dtype=torch.long)
    for b, row in enumerate(rows):
        place = slice(T - len(row), T) if left else slice(0, len(row))
        ids_BT[b, place], mask_BT[b, place] = torch.tensor(row), 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def prompts() -> list[list[int]]:
    return [prompt_ids(text, toy_tokenizer()) for text in TEXTS]


def naive_logits(model: Retro, ids: Sequence[int], lead: int, k: int = K) -> Tensor:
    """Of every token [T, V], by the pass over whole chunks of this row alone; its tokens are plain, so their texts are joined."""
    L = -(-(lead + len(ids)) // M)
    inputs_1T, keep_1T = torch.zeros(1, L * M, dtype=torch.long), torch.zeros(1, L * M, dtype=torch.bool)
    inputs_1T[0, lead : lead + len(ids)], keep_1T[0, lead : lead + len(ids)] = torch.tensor(ids), True
    texts: list[list[str]] = [[] for _ in range(L)]
    for chunk in range((lead + len(ids)) // M):
        query = "".join(
            toy_tokenizer().decode([i])
            for i in inputs_1T[0, chunk * M : (chunk + 1) * M][keep_1T[0, chunk * M : (chunk + 1) * M]].tolist()
        )
        texts[chunk] = [p.full_text for p in passages(query, k)] if query.strip() else []
    neighbors, keep = neighbor_tensors([texts], toy_tokenizer(), max(k, 1), R)
    with torch.no_grad():
        logits: Tensor = model(inputs_1T, keep_BT=keep_1T, neighbors_BLKR=neighbors, keep_BLKR=keep)
    return logits[0, lead : lead + len(ids)]


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"positions": "relative"}, {"cca_layers": ()}], ids=str
)
def test_both_ways_of_writing_a_model_are_read_by_both_ways_of_reading(tmp_path: Path, changes: dict[str, Any]) -> None:
    own = random_model(**changes)
    figures = {"steps": 3, "valid_loss_on_nats": 1.5, "settings": {"num_neighbors": 3, "neighbor_len": 11}}
    save_model(tmp_path / "a", own, toy_tokenizer(), training=figures)
    model = RetroForCausalLM.from_pretrained(tmp_path / "a")
    assert not model.training
    assert_same_weights(model.model, own)
    assert (model.config.num_neighbors, model.config.neighbor_len, model.config.training) == (3, 11, figures)
    model.save_pretrained(tmp_path / "b")
    again, tokenizer, info = load_model(tmp_path / "b")
    assert_same_weights(again, own)
    assert again.config == own.config
    assert tokenizer.fingerprint == toy_tokenizer().fingerprint
    assert info == json.loads((tmp_path / "a/config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert_same_weights(RetroForCausalLM.from_pretrained(str(tmp_path / "b")).model, own)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def assert_same_weights(a: Retro, b: Retro) -> None:
    a_state, b_state = a.state_dict(), b.state_dict()
    assert list(a_state) == list(b_state)
    for name, tensor in a_state.items():
        assert torch.equal(tensor, b_state[name]), name


def test_a_trainer_finds_the_weights_of_a_checkpoint_again(tmp_path: Path) -> None:
    """It gives the file's content to load_state_dict, with strict = False: unknown names would be passed over in silence."""
    hub_model(1).save_pretrained(tmp_path)
    other = hub_model(2)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert_same_weights(other.model, random_model(1))
    other.load_state_dict(hub_model(3).state_dict())
    assert_same_weights(other.model, random_model(3))


def test_other_tokenizers_keep_what_they_do_after_encoding(tmp_path: Path) -> None:
    """What puts BOS in front is added for transformers, and taken away for us."""
    backend = tokenizers.Tokenizer.from_str(toy_tokenizer().backend.to_str())
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    own = Tokenizer.wrap(backend)
    assert own.fingerprint != toy_tokenizer().fingerprint
    save_model(tmp_path, random_model(), own)
    opened = load_model(tmp_path)[1]
    assert opened.fingerprint == own.fingerprint
    assert opened.backend.post_processor is not None
    assert AutoTokenizer.from_pretrained(tmp_path)("a b").input_ids == prompt_ids("a b", own)


def test_changed_settings_are_kept_where_a_model_is_saved(tmp_path: Path) -> None:
    model = hub_model()
    model.set_retriever(Library(passages), k=1)
    model.generation_config.max_new_tokens = 33
    model.save_pretrained(tmp_path)
    again = RetroForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_neighbors == 1
    assert again.generation_config.max_new_tokens == 33
    assert again.generation_config.pad_token_id == toy_tokenizer().eos_id


def test_weights_may_be_had_in_another_type_and_on_a_device(tmp_path: Path) -> None:
    save_model(tmp_path, random_model(), toy_tokenizer())
    narrow = RetroForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu", local_files_only=True)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert torch.equal(narrow.model.embedding.weight, random_model().embedding.weight.to(torch.bfloat16))


def test_what_transformers_write_beside_a_model_does_not_damage_it(tmp_path: Path) -> None:
    """As trainers do: the model, then its tokenizer over it, then files of their own."""
    hub_model().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer(TEXTS, padding=True)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"1")
    assert load_model(tmp_path)[1].fingerprint == toy_tokenizer().fingerprint
    assert RetroForCausalLM.from_pretrained(tmp_path).tokenizer.fingerprint == toy_tokenizer().fingerprint


def test_a_model_without_tokenizer_can_be_saved_and_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = hub_model()
    model.tokenizer = None
    model.save_pretrained(tmp_path)
    assert "gets no tokenizer" in caplog.text
    again = RetroForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again.model, model.model)
    with pytest.raises(ConfigError, match="does not know its tokenizer"):
        again.set_retriever(Library(passages))


def test_damaged_and_mixed_folders_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "m", random_model(), toy_tokenizer())
    for name, match in (
        ("model.safetensors", "damaged"),
        ("tokenizer.json", "fingerprint"),
        ("config.json", "missing"),
    ):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "m", folder)
        if name == "model.safetensors":
            content = bytearray((folder / name).read_bytes())
            content[-1] ^= 1
            (folder / name).write_bytes(content)
        elif name == "tokenizer.json":
            Tokenizer.train(["other"], 259).save(folder)
        else:
            config = json.loads((folder / name).read_text())
            config["model"]["cca_layers"] = [1, 2, 3]
            (folder / name).write_text(json.dumps(config))
        with pytest.raises((FormatError, MismatchError), match=match):
            RetroForCausalLM.from_pretrained(folder)


def test_unknown_settings_of_the_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean num_layers"):
        RetroConfig(model={"num_layer": 2})


def test_a_new_model_is_drawn_as_our_own_are() -> None:
    torch.manual_seed(3)
    model = RetroForCausalLM(RetroConfig(model=toy_model_config(dim=64, encoder_dim=64)))
    weight_DV = model.model.embedding.weight.detach()
    assert float(weight_DV.std()) == pytest.approx(64**-0.5, rel=0.05)
    assert float(model.model.layers[0].attention.q.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.model.norm.weight, torch.ones(64))


def test_the_card_says_what_a_hub_needs_and_the_figures(tmp_path: Path) -> None:
    save_model(tmp_path, random_model(), toy_tokenizer(), training={"steps": 12, "valid_loss_on_nats": 1.25})
    _, front, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    head: Any = huggingface_hub.ModelCard(f"---\n{front}---\n").data
    assert (head.library_name, head.pipeline_tag) == ("retro-lm", "text-generation")
    assert "retro" in head.tags
    assert head.license == "other"
    assert "- steps: 12" in text
    assert "1.2500" in text


def test_a_pushed_model_is_what_save_pretrained_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the hub's own client is replaced: what would be uploaded is kept."""
    uploaded: dict[str, bytes] = {}

    def commit(_self: Any, *, operations: list[Any], **_: Any) -> str:
        uploaded.update({o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations})
        return "done"

    def no_card(*_: Any, **__: Any) -> Any:
        raise EntryNotFoundError("there is none")

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda *_, **__: huggingface_hub.RepoUrl("https://huggingface.co/me/it")
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", no_card)
    model: Any = hub_model()
    model.config.training = {"steps": 12}
    model.push_to_hub("me/it")
    for name, content in uploaded.items():
        (tmp_path / name).write_bytes(content)
    assert_same_weights(load_model(tmp_path)[0], model.model)
    assert "- steps: 12" in (tmp_path / "README.md").read_text()


# --- Auto classes -------------------------------------------------------------------------------------------------

_BOTH = """
import sys
{first}
{second}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(type(model).__module__, type(model).__name__, AutoConfig.from_pretrained(sys.argv[1]).model_type, tokenizer("a").input_ids)
"""
_RETRO = """
import retro
assert not {"torch", "transformers"} & set(sys.modules) or "transformers.models.auto.configuration_auto" in sys.modules
"""
_AUTO = "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer"


@pytest.mark.slow
@pytest.mark.parametrize("order", [(_RETRO, _AUTO), (_AUTO, _RETRO)], ids=["retro first", "transformers first"])
def test_auto_classes_know_our_models_whichever_is_imported_first(tmp_path: Path, order: tuple[str, str]) -> None:
    save_model(tmp_path, random_model(), toy_tokenizer())
    program = _BOTH.format(first=order[0], second=order[1])
    run = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    ids = prompt_ids("a", toy_tokenizer())
    assert run.stdout.strip() == f"retro.hub RetroForCausalLM retro {ids}", run.stderr


def test_the_tokenizer_of_a_model_encodes_as_we_do(tmp_path: Path) -> None:
    save_model(tmp_path, random_model(), toy_tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "not special: <|eos|>", "\u00e9\u4e2d", ""]
    assert tokenizer(texts).input_ids == [prompt_ids(text, toy_tokenizer()) for text in texts]
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokenizer(texts).input_ids] == texts
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (toy_tokenizer().bos_id, toy_tokenizer().eos_id)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert batch.attention_mask[1].tolist() == [0] * (batch.input_ids.shape[1] - 2) + [1, 1]
    assert sorted(batch) == ["attention_mask", "input_ids"]


# --- generation ---------------------------------------------------------------------------------------------------


@functools.cache
def greedy(seed: int, k: int, steps: int = 3 * M + 3) -> list[list[int]]:
    """Of our own generation."""
    config = GenerateConfig(max_new_tokens=steps, num_neighbors=k, neighbor_len=R)
    results = generate(random_model(seed), toy_tokenizer(), TEXTS, config, retriever=Library(passages))
    return [result.ids for result in results]


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_equals_our_own(use_cache: bool, k: int) -> None:
    model = hub_model(1, k=k)
    batch = padded(prompts())
    out = model.generate(**batch, max_new_tokens=3 * M + 3, do_sample=False, use_cache=use_cache)
    assert out[:, batch["input_ids"].shape[1] :].tolist() == greedy(1, k)
    assert isinstance(model.retriever, Library)
    if k == 0:
        assert model.retriever.queries == []
        assert greedy(1, 0) != greedy(1, 2)  # or the other case would say nothing about neighbors


def test_rows_alone_generate_what_they_do_in_a_batch() -> None:
    model = hub_model(1)
    for ids, expected in zip(prompts(), greedy(1, K), strict=True):
        out = model.generate(torch.tensor([ids]), max_new_tokens=3 * M + 3, do_sample=False)
        assert out[0, len(ids) :].tolist() == expected


def test_padding_that_is_a_token_of_its_own_is_seen_without_a_mask() -> None:
    model, rows = hub_model(1), prompts()
    pad = 250
    batch = padded(rows)
    ids_BT = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
    out = model.generate(ids_BT, max_new_tokens=3 * M + 3, do_sample=False, pad_token_id=pad)
    assert out[:, ids_BT.shape[1] :].tolist() == greedy(1, K)


def test_without_a_prompt_generation_begins_with_bos() -> None:
    model = hub_model(1)
    out = model.generate(max_new_tokens=2 * M, do_sample=False)
    config = GenerateConfig(max_new_tokens=2 * M, num_neighbors=K, neighbor_len=R)
    own = generate(
        random_model(1), toy_tokenizer(), [Prompt([toy_tokenizer().bos_id])], config, retriever=Library(passages)
    )
    assert out[0].tolist() == [toy_tokenizer().bos_id, *own[0].ids]


def test_a_row_that_has_ended_asks_nothing_more() -> None:
    model, rows = hub_model(1), prompts()
    expected = greedy(1, K)
    eos = next(i for i in expected[0] if all(i not in other for other in expected[1:]))
    end = expected[0].index(eos)
    model.tokenizer = Tokenizer(toy_tokenizer().backend, 0, 1, "")
    out = model.generate(
        **padded(rows), max_new_tokens=3 * M + 3, do_sample=False, eos_token_id=eos, pad_token_id=toy_tokenizer().eos_id
    )
    new = out[:, -(3 * M + 3) :].tolist()
    assert new[0] == expected[0][: end + 1] + [toy_tokenizer().eos_id] * (3 * M + 2 - end)
    assert new[1:] == expected[1:]


def test_sampling_is_the_same_with_and_without_cache() -> None:
    model, batch = hub_model(1), padded(prompts())
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        drawn.append(
            model.generate(
                **batch, max_new_tokens=2 * M + 1, do_sample=True, top_k=20, temperature=1.3, use_cache=use_cache
            )
        )
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[0][:, -2 * M - 1 :].tolist() != [row[: 2 * M + 1] for row in greedy(1, K)]


def naive_beams(model: Retro, ids: list[int], num_beams: int, steps: int) -> list[tuple[float, list[int]]]:
    """Every beam by the full pass over it alone, every neighbor looked up anew."""
    beams = [(0.0, list(ids))]
    lead = -len(ids) % M
    for _ in range(steps):
        candidates = []
        for score, row in beams:
            log_probs_V = torch.log_softmax(naive_logits(model, row, lead)[-1], dim=-1)
            log_probs_V[toy_tokenizer().eos_id] = -math.inf
            best = log_probs_V.topk(num_beams)
            candidates += [(score + float(v), [*row, int(i)]) for v, i in zip(best.values, best.indices, strict=True)]
        beams = sorted(candidates, reverse=True)[:num_beams]
    return beams


@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_equals_a_naive_one_across_chunk_borders(use_cache: bool) -> None:
    """Neighbors and activations must follow their beam."""
    model, own, steps, num_beams = hub_model(2), random_model(2), 2 * M + 2, 3
    rows = prompts()[:2]
    out = model.generate(
        **padded(rows),
        max_new_tokens=steps,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        suppress_tokens=[toy_tokenizer().eos_id],
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        use_cache=use_cache,
    )
    expected = [beam for row in rows for beam in naive_beams(own, row, num_beams, steps)]
    assert out.sequences[:, -steps:].tolist() == [ids[-steps:] for _, ids in expected]
    assert out.sequences_scores.tolist() == pytest.approx([score for score, _ in expected], abs=1e-4)
    follows_best = [
        torch.equal(out.beam_indices[b, :steps], out.beam_indices[b, :1].expand(steps)) for b in range(len(expected))
    ]
    assert not all(follows_best)  # rows of the cache have changed places


def test_several_sequences_of_a_prompt_and_one_search_for_equal_texts() -> None:
    model = hub_model(1)
    torch.manual_seed(1)
    out = model.generate(torch.tensor(prompts()[:1]), max_new_tokens=2, do_sample=True, num_return_sequences=4)
    assert out.shape[0] == 4
    assert len({tuple(row) for row in out.tolist()}) > 1
    assert isinstance(model.retriever, Library)
    assert len(model.retriever.queries) == len(set(model.retriever.queries)) == -(-len(prompts()[0]) // M)


def test_stop_strings_and_streamers_work(tmp_path: Path) -> None:
    model = hub_model(1)
    save_model(tmp_path, model.model, toy_tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = toy_tokenizer().decode(greedy(1, K)[0])
    stop = text[M : M + 3]
    batch = tokenizer(TEXTS[0], return_tensors="pt")
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    out = model.generate(**batch, max_new_tokens=3 * M, do_sample=False, stopping_criteria=criteria)
    assert tokenizer.decode(out[0], skip_special_tokens=True) == TEXTS[0] + text[: text.index(stop) + 3]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(
        target=model.generate, kwargs={**batch, "max_new_tokens": 3 * M + 3, "do_sample": False, "streamer": streamer}
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == text
    assert len(pieces) > 1


def repeating_model() -> RetroForCausalLM:
    """Its continuations repeat themselves, so that guesses from the prompt are often right and often wrong."""
    model = hub_model(4)
    with torch.no_grad():
        model.model.head.weight[:, :] *= torch.rand(258, 1, generator=torch.Generator().manual_seed(0)) > 0.9
    return model


@pytest.mark.parametrize("guesses", [3, M + 2, 2 * M + 1])
def test_guessed_tokens_are_taken_back_across_chunk_borders(guesses: int) -> None:
    model = repeating_model()
    ids = torch.tensor([prompts()[2]])
    plain = model.generate(ids, max_new_tokens=4 * M, do_sample=False)
    calls, forward = [], model.forward
    model.forward = lambda input_ids, **kwargs: (calls.append(input_ids.shape[1]), forward(input_ids, **kwargs))[1]  # type: ignore[method-assign, func-returns-value]
    functools.update_wrapper(model.forward, forward)
    guessed = model.generate(
        ids, max_new_tokens=4 * M, do_sample=False, prompt_lookup_num_tokens=guesses, max_matching_ngram_size=1
    )
    assert guessed.tolist() == plain.tolist()
    assert max(calls[1:]) > 1
    assert len(calls) < 4 * M  # some guesses were right


def test_a_small_model_guesses_for_a_large_one() -> None:
    model, small = hub_model(1), hub_model(5)
    with torch.no_grad():  # half as good as the large one: sometimes right
        for a, b in zip(small.parameters(), model.parameters(), strict=True):
            a.copy_(b + 0.1 * a)
    ids = torch.tensor([prompts()[0]])
    plain = model.generate(ids, max_new_tokens=4 * M, do_sample=False)
    small.generation_config.num_assistant_tokens = M + 2
    small.generation_config.num_assistant_tokens_schedule = "constant"
    small.generation_config.assistant_confidence_threshold = 0.0
    guessed = model.generate(ids, max_new_tokens=4 * M, do_sample=False, assistant_model=small)
    assert guessed.tolist() == plain.tolist()


def test_a_cache_goes_on_in_a_second_call() -> None:
    """The lead of the first prompt is kept, so that chunks stay where they are."""
    model = hub_model(1)
    ids = torch.tensor([prompts()[0]])
    whole = model.generate(ids, max_new_tokens=3 * M + 3, do_sample=False)
    first = model.generate(ids, max_new_tokens=M + 2, do_sample=False, return_dict_in_generate=True)
    second = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=2 * M + 1, do_sample=False
    )
    assert torch.equal(second, whole)


def test_a_pipeline_retrieves(tmp_path: Path) -> None:
    model = hub_model(1)
    save_model(tmp_path, model.model, toy_tokenizer())
    pipe: Any = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    options = {"max_new_tokens": 3 * M + 3, "do_sample": False, "return_full_text": False}
    expected = [toy_tokenizer().decode(ids) for ids in greedy(1, K)]
    assert [out[0]["generated_text"] for out in pipe(TEXTS, **options)] == expected
    pipe.tokenizer.pad_token_id = pipe.tokenizer.eos_token_id
    assert [out[0]["generated_text"] for out in pipe(TEXTS, batch_size=4, **options)] == expected
    assert isinstance(model.retriever, Library)
    assert TEXTS[0][:4] in "".join(model.retriever.queries)


# --- the forward pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"positions": "relative"}, {"cca_layers": (1,)}], ids=str)
@pytest.mark.parametrize("leads", [[0, 0, 0, 0], [3, 0, 4, 1]])
def test_cached_columns_equal_the_full_pass(changes: dict[str, Any], leads: list[int]) -> None:
    """Rows of several phases, left padded, some columns empty, one to eight columns a call."""
    model, own = hub_model(3, torch.float64, **changes), random_model(3, torch.float64, **changes)
    rows = [row[:18] for row in prompts()]
    rows[1] = rows[0][:9]
    batch = padded(rows)
    whole = model(**batch, lead=leads, use_cache=False).logits
    past, parts, start, generator = None, [], 0, torch.Generator().manual_seed(1)
    while start < batch["input_ids"].shape[1]:
        end = start + int(torch.randint(1, 9, (), generator=generator))
        out = model(
            batch["input_ids"][:, start:end],
            attention_mask=batch["attention_mask"][:, :end],
            past_key_values=past,
            lead=torch.tensor(leads),
            use_cache=True,
        )
        past, start = out.past_key_values, end
        parts.append(out.logits)
        assert past.get_seq_length() == min(end, batch["input_ids"].shape[1])
    cached = torch.cat(parts, dim=1)
    for b, (row, lead) in enumerate(zip(rows, leads, strict=True)):
        expected = naive_logits(own, row, lead)
        torch.testing.assert_close(whole[b, -len(row) :], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(cached[b, -len(row) :], expected, rtol=0, atol=1e-10)


def test_padding_on_either_side_gives_the_same_loss_and_the_right_one() -> None:
    model, rows = hub_model(1), prompts()
    losses = []
    for left in (True, False):
        batch = padded(rows, left=left)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        losses.append(model(**batch, labels=labels).loss)
    nats = [
        -torch.log_softmax(naive_logits(model.model, row, 0)[:-1], dim=-1)[range(len(row) - 1), row[1:]].sum()
        for row in rows
    ]
    expected = sum(nats) / sum(len(row) - 1 for row in rows)
    torch.testing.assert_close(losses[0], expected)
    torch.testing.assert_close(losses[1], expected)
    total = model(**batch, labels=labels, num_items_in_batch=10).loss
    torch.testing.assert_close(total, sum(nats) / 10)


def test_training_reaches_every_weight_and_checkpointing_changes_nothing() -> None:
    model = hub_model(1).train()
    batch = padded(prompts())
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model._set_gradient_checkpointing()
        model.zero_grad()
        out = model(**batch, labels=labels)
        assert out.past_key_values is None
        out.loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        assert float(a.abs().sum()) > 0
        torch.testing.assert_close(a, b)


def test_only_the_wanted_logits_are_made() -> None:
    model, batch = hub_model(1), padded(prompts())
    whole = model(**batch).logits
    assert torch.equal(model(**batch, logits_to_keep=3).logits, whole[:, -3:])
    assert torch.equal(model(**batch, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])
    logits, cache = model(**batch, return_dict=False)
    assert torch.equal(logits, whole)
    assert isinstance(cache, RetroCache)


def test_given_neighbors_are_read_and_those_of_later_chunks_are_found() -> None:
    model, own, ids = hub_model(3, torch.float64), random_model(3, torch.float64), prompts()[2]
    L = len(ids) // M
    texts = [[p.full_text for p in passages(toy_tokenizer().decode(ids[c * M : (c + 1) * M]), K)] for c in range(L)]
    texts[0] = ["one", "two", "three"]
    neighbors, keep = neighbor_tensors([texts], toy_tokenizer(), 3, 9)
    padding = -len(ids) % M
    inputs_1T = torch.tensor([ids + [0] * padding])
    keep_1T = torch.arange(len(ids) + padding)[None] < len(ids)
    wide = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (neighbors, keep)]
    wide[1][:, :, :, R:] &= wide[1].new_tensor([True] + [False] * L)[None, :, None, None]
    with torch.no_grad():
        expected = own(inputs_1T, keep_BT=keep_1T, neighbors_BLKR=wide[0], keep_BLKR=wide[1])[:, : len(ids)]
    for use_cache in (True, False):
        logits = model(
            torch.tensor([ids]), neighbors=neighbors[:, :1], neighbors_mask=keep[:, :1], use_cache=use_cache
        ).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(model(torch.tensor([ids])).logits, expected)


def test_given_neighbors_are_the_prompts_in_generation() -> None:
    model = hub_model(1)
    ids = prompts()[0]
    L = -(-len(ids) // M)
    neighbors, keep = neighbor_tensors([[["one", "two"]] * L], toy_tokenizer(), K, R)
    options: dict[str, Any] = {
        "max_new_tokens": 2 * M + 2,
        "do_sample": False,
        "neighbors": neighbors,
        "neighbors_mask": keep,
    }
    with_cache = model.generate(torch.tensor([ids]), **options)
    without = model.generate(torch.tensor([ids]), **options, use_cache=False)
    assert torch.equal(with_cache, without)
    assert with_cache[0, len(ids) :].tolist() != greedy(1, K)[0][: 2 * M + 2]
    assert isinstance(model.retriever, Library)
    assert not any(text in TEXTS[0] for text in model.retriever.queries)


# --- the cache ----------------------------------------------------------------------------------------------------


def filled(model: RetroForCausalLM, ids_BT: Tensor, lead: int = 0) -> RetroCache:
    cache = model(ids_BT, use_cache=True, lead=[lead] * len(ids_BT)).past_key_values
    assert isinstance(cache, RetroCache)
    return cache


@pytest.mark.parametrize("how", [lambda n, c: -c, lambda n, c: n - c], ids=["negative", "positive"])
def test_a_cropped_cache_is_as_if_the_rest_had_never_come(how: Any) -> None:
    model, ids = hub_model(3, torch.float64), torch.tensor([prompts()[2][:18]])
    for length in range(10, 15):  # the chunk that begins at slot 10 is not finished
        count = 15 - 1 - length
        cache = filled(model, ids[:, :14])
        cache.crop(how(14, count) if count else 0)
        assert cache.get_seq_length() == length
        assert cache.ids == [ids[0, :length].tolist()]
        rest = model(ids[:, length:], past_key_values=cache).logits
        torch.testing.assert_close(rest, model(ids).logits[:, length:], rtol=0, atol=1e-10)


def test_a_crop_across_a_chunk_border_is_refused_and_changes_nothing() -> None:
    model, ids = hub_model(3, torch.float64), torch.tensor([prompts()[2][:14]])
    cache = filled(model, ids[:, :12])
    with pytest.raises(ConfigError, match="chunk border"):
        cache.crop(-3)
    with pytest.raises(ConfigError, match="12 tokens"):
        cache.crop(-13)
    rest = model(ids[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 12:], rtol=0, atol=1e-10)


def test_without_cca_there_is_no_border_to_cross() -> None:
    model, ids = hub_model(3, torch.float64, cca_layers=()), torch.tensor([prompts()[2][:14]])
    cache = filled(model, ids[:, :12])
    cache.crop(-9)
    rest = model(ids[:, 3:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 3:], rtol=0, atol=1e-10)


def test_rows_of_a_cache_are_chosen_reordered_and_repeated() -> None:
    model = hub_model(3, torch.float64)
    ids = torch.tensor([prompts()[2][s : s + 13] for s in (0, 3, 7)])
    more = torch.tensor([prompts()[2][s : s + 6] for s in (20, 21, 22)])
    changes: list[tuple[Any, list[int]]] = [
        (lambda c: c.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ]
    for change, order in changes:
        cache = filled(model, ids)
        change(cache)
        new = more[torch.arange(len(order)) % 3]
        whole = model(torch.cat([ids[order], new], dim=1)).logits[:, 13:]
        torch.testing.assert_close(model(new, past_key_values=cache).logits, whole, rtol=0, atol=1e-10)


def test_a_reset_cache_is_a_new_one() -> None:
    model, ids = hub_model(1), torch.tensor([prompts()[0]])
    cache = filled(model, ids)
    cache.reset()
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


# --- errors -------------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_said() -> None:
    model, ids = hub_model(), torch.tensor([prompts()[0]])
    full = DynamicCache()
    full.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    for past in (full, StaticCache(config=model.config, max_cache_len=40)):
        with pytest.raises(ConfigError, match="RetroCache"):
            model(ids, past_key_values=past)
    with pytest.raises(ConfigError, match="RetroCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ConfigError, match="attention_mask has the shape"):
        model(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ConfigError, match="2 rows come after 1"):
        model(ids.repeat(2, 1), past_key_values=filled(model, ids))
    with pytest.raises(ConfigError, match="neighbors have the shape"):
        model(ids, neighbors=torch.zeros(1, 2, 3, dtype=torch.long))
    with pytest.raises(ConfigError, match="without retrieval"):
        hub_model(cca_layers=()).set_retriever(Library(passages))
    with pytest.raises(ConfigError, match="without retrieval"):
        hub_model(cca_layers=())(ids, neighbors=torch.zeros(1, 1, 1, 1, dtype=torch.long))
    with pytest.raises(ConfigError, match="k = -1"):
        model.set_retriever(Library(passages), k=-1)
    with pytest.raises(ConfigError, match="table of its own"):
        model.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(ids, max_new_tokens=2, neighbours=ids)


def test_a_vocabulary_can_grow(tmp_path: Path) -> None:
    model = hub_model(1, tie_embeddings=True)
    ids = torch.tensor([prompts()[0]])
    before = model(ids).logits
    model.resize_token_embeddings(270, mean_resizing=False)
    torch.testing.assert_close(model(ids).logits[..., :258], before)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path)[0].config.vocab_size == 270
