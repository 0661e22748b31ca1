"""Our models in the lm-evaluation-harness: equal to `--model hf` without retrieval, and to a pass over each request alone with it."""

import hashlib
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import builders
import oracles
import pytest
import torch
import transformers
from builders import toy_model_config, toy_tokenizer
from torch import Tensor

from retro.cca import Cache
from retro.checkpoint import load_model, save_model
from retro.chunks import Passage
from retro.config import BaseConfig, GenerateConfig
from retro.errors import ConfigError, DependencyError, FormatError, MismatchError
from retro.generate import Prompt, Role, generate, neighbor_tensors
from retro.model import Retro
from retro.retrofit import model_config, retrofit
from retro.tokenizer import Tokenizer

M, R, K, LONGEST = 5, 7, 2, 48
INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("lm_eval", "accelerate"))
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed: pip install 'retro-lm[eval]'")

QUESTIONS = [
    ("The cat sat on", [" the mat", " a dog", " the map of the whole town"], 0),
    ("When the rain comes, the dog ", ["sleeps", "sleepy"], 1),  # the space goes to the continuation
    ("a", ["b", "c", " and so on, for more than a chunk"], 2),
    ("", ["No context at all", "x"], 0),
    ("A context that is so long that it must be cut on the left to fit, " * 2, ["yes", "no"], 1),
]
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and then over another one, which was not lazy at all.",
    "z",
    "Not long, but longer than a chunk",
    "naïve café – ☕☕☕ and more of it, so that there is a second window",
]
PROMPTS = ["Question: what is red?\nAnswer:", "Go", "A long prompt, which does not fit with the answer and is cut. " * 2]

# lm-eval, evaluate and pytablewriter
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield from builders.one_thread()


class Library:
    """A retriever whose passages are chosen by a hash of the query: none, some, or k of them."""

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
        assert (role, exclude, where) == ("document", None, None)
        self.queries += queries
        return [passages(query, k) for query in queries]


def passages(query: str, k: int) -> list[Passage]:
    digest = hashlib.blake2b(query.encode()).digest()
    made: dict[str, Any] = {"title": "", "url": "", "continuation": " and dogs", "score": 1.0, "metadata": "{}"}
    return [Passage(row=i, key=str(i), text=f"{digest[i]} cats", **made) for i in range(min(digest[-1] % 4, k))]


# --- models -------------------------------------------------------------------------------------------------------


def randomized(model: Any, seed: int = 0) -> Any:
    """Large weights, so that neighbors and distant tokens matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 / parameter.shape[1] ** 0.5, generator=generator)
    return model.eval()


def save_base(folder: Path, *, bos: bool) -> Path:
    """A GPT-2, or a Llama whose tokenizer puts BOS in front."""
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": 258}
    if bos:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        config: Any = transformers.LlamaConfig(**sizes, max_position_embeddings=LONGEST, **special)
    else:
        config = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=LONGEST, **special)
    opener: Any = transformers.AutoModelForCausalLM
    randomized(opener.from_config(config)).save_pretrained(folder)
    tokenizer = toy_tokenizer()
    tokenizer.save(folder, with_bos=bos)
    names = {f"{kind}_token": tokenizer.backend.id_to_token(i) for kind, i in (("bos", 0), ("eos", 1))}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def save_fit(folder: Path, base: Path, **options: Any) -> Path:
    opener: Any = transformers.AutoModelForCausalLM
    plain = opener.from_pretrained(base)
    sizes = {"cca_layers": (2, 3), "encoder_dim": 10, "encoder_layers": 2, "encoder_heads": 3, "encoder_head_dim": 4}
    model = retrofit(plain, model_config(plain, **sizes, chunk_len=M), BaseConfig(name=str(base), **options))
    for module in (model.cca, model.encoder, model.encoder_embedding):
        randomized(module, seed=1)
    made: Any = model
    save_model(folder, made, toy_tokenizer(), num_neighbors=K, neighbor_len=R)
    return folder


def save_own(folder: Path) -> Path:
    model = randomized(Retro(toy_model_config(chunk_len=M, num_layers=3, cca_layers=(2, 3))))
    save_model(
        folder, model, toy_tokenizer(), num_neighbors=K, neighbor_len=R, training={"settings": {"seq_len": LONGEST}}
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases and models. Not to be altered."""
    made = tmp_path_factory.mktemp("models")
    for name, bos in (("gpt2", False), ("llama", True)):
        save_fit(made / f"{name}.model", save_base(made / name, bos=bos))
    save_own(made / "own.model")
    return made


# --- requests -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One task of each kind, from files."""
    folder = tmp_path_factory.mktemp("tasks")
    records: dict[str, list[dict[str, Any]]] = {
        "toy_choice": [{"q": q, "choices": choices, "gold": gold} for q, choices, gold in QUESTIONS],
        "toy_text": [{"text": text} for text in TEXTS],
        "toy_answer": [{"prompt": prompt, "answer": "red"} for prompt in PROMPTS],
    }
    settings: dict[str, dict[str, Any]] = {
        "toy_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "toy_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "toy_answer": {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["q"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, rows in records.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings[name] |= {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
        }
    return settings


def measured(
    model: str, arguments: dict[str, Any], tasks: dict[str, dict[str, Any]], batch_size: int = 1
) -> dict[str, list[Any]]:
    """What the harness gets for every request of every task."""
    import lm_eval

    importlib.import_module("eval.harness")
    results: Any = lm_eval.simple_evaluate(
        model=model,
        model_args={"device": "cpu", **arguments},
        tasks=[dict(task) for task in tasks.values()],
        batch_size=batch_size,
        bootstrap_iters=0,
    )
    return {name: [resp for sample in rows for (resp,) in sample["resps"]] for name, rows in results["samples"].items()}


def same(actual: dict[str, list[Any]], expected: dict[str, list[Any]], rel: float = 1e-6) -> None:
    for (log_prob, greedy), (log_prob2, greedy2) in zip(actual["toy_choice"], expected["toy_choice"], strict=True):
        assert (log_prob, greedy) == (pytest.approx(log_prob2, rel=rel, abs=rel), greedy2)
    assert actual["toy_text"] == pytest.approx(expected["toy_text"], rel=rel, abs=rel)
    assert actual["toy_answer"] == expected["toy_answer"]


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_without_retrieval_a_retrofitted_model_gives_what_hf_gives_for_its_base(
    folders: Path, tasks: dict[str, dict[str, Any]], name: str, batch_size: int
) -> None:
    ours = measured("retro", {"pretrained": str(folders / f"{name}.model"), "k": 0}, tasks, batch_size)
    theirs = measured("hf", {"pretrained": str(folders / name), "dtype": "float32"}, tasks, batch_size)
    assert [len(rows) for rows in ours.values()] == [12, len(TEXTS), len(PROMPTS)]
    same(ours, theirs)
