"""Our models in the lm-evaluation-harness: without retrieval equal to `--model hf`, with it to a pass over each request alone."""

import functools
import hashlib
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
import transformers
from builders import Library, speak_up, toy_model_config, toy_tokenizer
from torch import Tensor

from index_builder.search import IndexRetriever
from retro.cca import Cache
from retro.checkpoint import load_model, save_model
from retro.chunks import Passage
from retro.config import BaseConfig
from retro.errors import ConfigError, DependencyError, FormatError, MismatchError
from retro.generate import neighbor_tensors
from retro.model import Retro
from retro.retrofit import model_config, retrofit
from retro.tokenizer import Tokenizer

M, R, K, LONGEST, STOP = 5, 7, 2, 48, "q"
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
    # The second window begins in a chunk whose first byte is the second one of a character.
    "Coffee " * 6 + "." + "\u2615" * 3 + " and more of it" * 3,
]
PROMPTS = [
    "Question: what is red?\nAnswer:",
    "Go",
    "A long prompt, which does not fit with the answer and is cut. " * 2,
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield from builders.one_thread()


def passages(query: str, k: int) -> list[Passage]:
    digest = hashlib.blake2b(query.encode()).digest()
    made: dict[str, Any] = {"title": "", "url": "", "continuation": " and dogs", "score": 1.0, "metadata": "{}"}
    return [Passage(row=i, key=str(i), text=f"{digest[i]} cats", **made) for i in range(min(digest[-1] % 4, k))]


# --- models -------------------------------------------------------------------------------------------------------


def randomized(model: Any, head: Any = None, seed: int = 0) -> Any:
    """Large weights, so that neighbors and distant tokens matter; says printable ASCII only, where a head is given."""
    speak_up(model, seed=seed)
    with torch.no_grad():
        if head is not None:
            plain = [
                len(text) == 1 and " " <= text <= "~" for text in (toy_tokenizer().decode([i]) for i in range(258))
            ]
            head.weight[~torch.tensor(plain)] = 0.0
    return model.eval()


def save_base(folder: Path, *, bos: bool) -> Path:
    """A GPT-2, or a Llama whose tokenizer puts BOS in front."""
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": 258, "tie_word_embeddings": False}
    if bos:
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        }
        config: Any = transformers.LlamaConfig(**sizes, max_position_embeddings=LONGEST, **special)
    else:
        config = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=LONGEST, **special)
    opener: Any = transformers.AutoModelForCausalLM
    model = opener.from_config(config)
    randomized(model, model.lm_head).save_pretrained(folder)
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
    model = Retro(toy_model_config(chunk_len=M, num_layers=3, cca_layers=(2, 3), tie_embeddings=False))
    randomized(model, model.head)
    training = {"settings": {"seq_len": LONGEST}}
    save_model(folder, model, toy_tokenizer(), num_neighbors=K, neighbor_len=R, training=training)
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
            "generation_kwargs": {"until": [STOP], "max_gen_toks": 12, "do_sample": False},
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
    from lm_eval.tasks import TaskManager

    importlib.import_module("eval.harness")
    results: Any = lm_eval.simple_evaluate(
        model=model,
        model_args={"device": "cpu", **arguments},
        tasks=[dict(task) for task in tasks.values()],
        batch_size=batch_size,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # those are 14,000 files
    )
    return {name: [resp for sample in rows for (resp,) in sample["resps"]] for name, rows in results["samples"].items()}


def same(actual: dict[str, list[Any]], expected: dict[str, list[Any]], rel: float = 1e-6) -> None:
    for (log_prob, greedy), (log_prob2, greedy2) in zip(actual["toy_choice"], expected["toy_choice"], strict=True):
        assert (log_prob, greedy) == (pytest.approx(log_prob2, rel=rel, abs=rel), greedy2)
    assert actual["toy_text"] == pytest.approx(expected["toy_text"], rel=rel, abs=rel)
    assert actual["toy_answer"] == expected["toy_answer"]


@needs_lm_eval
@pytest.mark.parametrize(("name", "batch_size"), [("gpt2", 4), ("llama", 1), ("llama", 4)])
def test_without_retrieval_a_retrofitted_model_gives_what_hf_gives_for_its_base(
    folders: Path, tasks: dict[str, dict[str, Any]], name: str, batch_size: int
) -> None:
    ours = measured("retro", {"pretrained": str(folders / f"{name}.model"), "k": 0}, tasks, batch_size)
    theirs = measured("hf", {"pretrained": str(folders / name), "dtype": "float32"}, tasks, batch_size)
    assert [len(rows) for rows in ours.values()] == [12, len(TEXTS), len(PROMPTS)]
    same(ours, theirs)


# --- against a pass over each request alone -----------------------------------------------------------------------


class Alone:
    """One sequence, read token by token with a cache. Every token but BOS is one byte, so a chunk's text is a slice of bytes."""

    def __init__(self, model: Any, *, lead: int = 0, start: int = 0, k: int = K) -> None:
        self.model, self.lead, self.at, self.k = model, lead, start, k
        self.cache = Cache()
        self.queries: list[str] = []

    def read(self, ids: Sequence[int], end: int) -> Tensor:
        """Log-probabilities [T, V] after each of the tokens up to `end`, from where it stands."""
        rows = []
        for t in range(self.at, end):
            slot, near = self.lead + t, {}
            if self.k and (slot + 1) % M == 0:
                first = max(slot + 1 - M - self.lead, 0)
                texts = [p.full_text for p in self.found(ids, first, t + 1)]
                neighbors, keep = neighbor_tensors([[texts]], toy_tokenizer(), self.k, R)
                near = {"neighbors_BLKR": neighbors, "keep_BLKR": keep}
            with torch.no_grad():
                here = torch.tensor([[slot]])
                hidden = self.model.hidden(torch.tensor([[ids[t]]]), slot_BT=here, cache=self.cache, **near)
                rows.append(self.model.logits(hidden)[0, 0].log_softmax(-1))
        self.at = end
        return torch.stack(rows)

    def found(self, ids: Sequence[int], first: int, end: int) -> list[Passage]:
        data = [b"" if i < 2 else as_bytes(i) for i in ids]
        while (
            first > 0 and data[first] and data[first][0] & 0xC0 == 0x80
        ):  # inside a character: it belongs to this chunk too
            first -= 1
        whole = b"".join(data[first:end])
        query = whole.decode(errors="ignore")  # but for a character that is not finished
        if not query.strip():
            return []
        self.queries.append(query)
        return passages(query, self.k)


def as_bytes(token: int) -> bytes:
    return bytes([byte_tokens().index(token)])


@functools.cache
def byte_tokens() -> list[int]:
    alphabet = toy_tokenizer().backend.get_vocab()
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [alphabet[chr(b) if b in plain else chr(256 + others.index(b))] for b in range(256)]


def encoded(text: str, *, bos: bool) -> list[int]:
    return [0] * bos + [byte_tokens()[b] for b in text.encode()]


@functools.cache
def alone(folder: Path, k: int = K) -> tuple[dict[str, list[Any]], set[str], set[str]]:
    """What the harness must get for all requests, and the texts looked up for scores and for answers."""
    model: Any
    model, _, _ = load_model(folder)
    name = folder.stem
    bos = name != "gpt2"
    answers: dict[str, list[Any]] = {"toy_choice": [], "toy_text": [], "toy_answer": []}
    queries: list[str] = []
    for context, choices, _ in QUESTIONS:
        for choice in choices:
            plain = context.rstrip()
            asked = encoded(plain, bos=bos) if context else [0]
            said = encoded(context[len(plain) :] + choice, bos=False)
            ids = [*asked, *said][-LONGEST - 1 :]
            one = Alone(model, lead=-(len(ids) - len(said)) % M, k=k)
            log_probs = one.read(ids, len(ids) - 1)[-len(said) :]
            total = sum(float(log_probs[i, token]) for i, token in enumerate(said))
            answers["toy_choice"].append((total, log_probs.argmax(-1).tolist() == said))
            queries += one.queries
    for text in TEXTS:
        # `--model hf` has BOS twice where the base's tokenizer gives one; our own models have one.
        ids = [0, *encoded(text, bos=name == "llama")]
        total, scored = 0.0, 0
        for end in [*range(LONGEST, len(ids) - 1, LONGEST), len(ids) - 1]:
            one = Alone(model, start=max(end - LONGEST, 0), k=k)
            log_probs = one.read(ids, end)
            total += sum(float(log_probs[t - end, ids[t + 1]]) for t in range(scored, end))
            scored = end
            queries += one.queries
        answers["toy_text"].append(total)
    scoring, queries = set(queries), []
    for prompt in PROMPTS:
        ids = encoded(prompt, bos=bos)[-(LONGEST - 12) :]
        one, text = Alone(model, lead=-len(ids) % M, k=k), ""
        for _ in range(12):
            ids.append(int(one.read(ids, len(ids))[-1].argmax()))
            text += toy_tokenizer().decode(ids[-1:])
        answers["toy_answer"].append(text.split(STOP)[0])
        queries += one.queries
    return answers, scoring, set(queries)


@needs_lm_eval
@pytest.mark.parametrize(("name", "batch_size"), [("own", 1), ("own", 4), ("gpt2", 4), ("llama", 4)])
def test_every_request_gets_what_it_gets_alone(
    folders: Path, tasks: dict[str, dict[str, Any]], name: str, batch_size: int
) -> None:
    """Also in batches with requests of other lengths; and nothing is looked up but finished chunks that were read."""
    folder, library = folders / f"{name}.model", Library(passages)
    results = measured("retro", {"pretrained": str(folder), "retriever": library}, tasks, batch_size)
    expected, scoring, answering = alone(folder)
    same(results, expected, rel=1e-5)
    assert len(set(library.queries)) == len(library.queries)
    assert scoring <= set(library.queries) <= scoring | answering
    off, *_ = alone(folder, k=0)
    assert off["toy_answer"] != expected["toy_answer"]
    assert off["toy_text"][0] != pytest.approx(expected["toy_text"][0], rel=1e-3)


@needs_lm_eval
def test_without_retrieval_our_own_model_is_not_given_a_second_bos(
    folders: Path, tasks: dict[str, dict[str, Any]]
) -> None:
    folder = folders / "own.model"
    results = measured("retro", {"pretrained": str(folder), "k": 0}, tasks, 3)
    same(results, alone(folder, k=0)[0], rel=1e-5)


# --- arguments ----------------------------------------------------------------------------------------------------


def opened(folder: Path, **arguments: Any) -> Any:
    return importlib.import_module("eval.harness").RetroLM(str(folder), **({"device": "cpu"} | arguments))


@needs_lm_eval
def test_lm_eval_knows_our_models_and_still_its_own() -> None:
    from lm_eval.api.registry import get_model

    harness = importlib.import_module("eval.harness")
    assert get_model("retro") is harness.RetroLM
    assert get_model("hf") is harness.HFLM


@needs_lm_eval
def test_defaults_are_those_of_the_model(folders: Path) -> None:
    library = Library(passages)
    model = opened(folders / "own.model", retriever=library)
    info = model.get_model_info()
    assert (info["retrieval"]["k"], info["retrieval"]["neighbor_len"]) == (K, R)
    assert info["model_num_parameters"] == sum(p.numel() for p in load_model(folders / "own.model")[0].parameters())
    assert model.max_length == LONGEST
    assert opened(folders / "own.model", k=0, max_length=20).max_length == 20
    assert opened(folders / "gpt2.model", k=0).max_length == LONGEST


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "kind", "part"),
    [
        ({}, ConfigError, "k = 2 needs an index: add index=FOLDER to model_args, or k=0"),
        ({"k": -1}, ConfigError, "k = -1: give a whole number from 0 on"),
        ({"k": "two"}, ConfigError, "k = two: give a whole number from 0 on"),
        ({"k": 0, "neighbor_len": 0.5}, ConfigError, "neighbor_len = 0.5: give a whole number from 1 on"),
        ({"k": 0, "neighbour_len": 3}, ConfigError, "neighbour_len is unknown"),
        ({"index": "missing.index"}, FormatError, "missing.index"),
        ({"index": "x", "batch_size": "auto"}, ConfigError, "batch_size = auto: with retrieval give a number"),
        ({"k": 0, "tokenizer": "nowhere"}, ConfigError, "the tokenizer of nowhere cannot be opened"),
        ({"k": 0, "device": "abacus"}, ConfigError, "abacus"),
    ],
    ids=str,
)
def test_arguments_that_cannot_work_are_refused(
    folders: Path, arguments: dict[str, Any], kind: type[Exception], part: str
) -> None:
    with pytest.raises(kind, match=re.escape(part)):
        opened(folders / "own.model", **arguments)


@needs_lm_eval
def test_a_folder_without_a_model_of_ours_is_refused(folders: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, folders / "gpt2"):
        with pytest.raises(FormatError, match="is no folder of a model of ours"):
            opened(folder, k=0)


@needs_lm_eval
@pytest.mark.parametrize("name", ["own", "gpt2"])
def test_another_tokenizer_is_a_mismatch(folders: Path, tmp_path: Path, name: str) -> None:
    other = Tokenizer.train(["another text, with other merges"], 262)
    other.save(tmp_path)
    swapped = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(swapped))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(MismatchError, match="2 of 258 tokens have other numbers or are missing \\('a', 'b'\\)"):
        opened(folders / f"{name}.model", k=0, tokenizer=str(tmp_path))


@needs_lm_eval
@pytest.mark.parametrize("continuation", ["", "x" * (LONGEST + 1)])
def test_a_continuation_that_no_window_holds_is_refused(folders: Path, continuation: str) -> None:
    model = opened(folders / "own.model", retriever=Library(passages))
    with pytest.raises(ConfigError, match=f"{len(continuation)} tokens cannot be scored: it must have 1 to 48"):
        model.loglikelihood([request("loglikelihood", "A context", continuation)], disable_tqdm=True)


@needs_lm_eval
def test_nothing_is_scored_where_there_is_nothing(folders: Path) -> None:
    model = opened(folders / "own.model", retriever=Library(passages))
    assert model.loglikelihood([], disable_tqdm=True) == []
    assert model.loglikelihood_rolling([request("loglikelihood_rolling", "")], disable_tqdm=True) == [0.0]


def request(kind: str, *arguments: str) -> Any:
    from lm_eval.api.instance import Instance

    made: Any = Instance
    return made(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_without_lm_eval_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.delitem(sys.modules, "eval.harness", raising=False)
    with pytest.raises(DependencyError, match=re.escape("pip install 'retro-lm[eval]'")):
        importlib.import_module("eval.harness")


# --- the command --------------------------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "eval.harness", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)


@needs_lm_eval
@pytest.mark.slow
def test_the_command_measures_with_an_index_what_python_does(
    folders: Path, tasks: dict[str, dict[str, Any]], tiny_index: Path, tmp_path: Path
) -> None:
    folder, index = folders / "gpt2.model", tiny_index
    chosen = {name: tasks[name] for name in ("toy_choice", "toy_answer")}
    for name, task in chosen.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    done = command(
        *("--model", "retro", "--model_args", f"pretrained={folder},index={index},k=3,neighbor_len=9,retriever=hybrid"),
        *("--tasks", ",".join(str(tmp_path / f"{name}.yaml") for name in chosen), "--batch_size", 2, "--device", "cpu"),
        *("--output_path", tmp_path / "out", "--log_samples"),
    )
    assert done.returncode == 0, done.stderr
    assert "|toy_choice|" in done.stdout.replace(" ", "")
    written = next((tmp_path / "out").rglob("results_*.json"))
    config = json.loads(written.read_text())["config"]
    retriever = IndexRetriever.open(index, method="hybrid")
    assert config["retrieval"] == {
        "k": 3,
        "neighbor_len": 9,
        "retriever": "hybrid",
        "where": None,
        "index_fingerprint": retriever.fingerprint,
    }
    arguments = {"pretrained": str(folder), "retriever": retriever, "k": 3, "neighbor_len": 9}
    expected = measured("retro", arguments, chosen, 2)
    for name, answers in expected.items():
        lines = next((tmp_path / "out").rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        got = [resp for line in sorted(map(json.loads, lines), key=lambda s: s["doc_id"]) for (resp,) in line["resps"]]
        if name == "toy_choice":
            got = [(float(log_prob), str(greedy) == "True") for log_prob, greedy in got]
            assert [g[0] for g in got] == pytest.approx([a[0] for a in answers], rel=1e-5)
        else:
            assert got == answers
    off = measured("retro", {"pretrained": str(folder), "k": 0}, chosen, 2)
    assert off["toy_choice"] != expected["toy_choice"]


@needs_lm_eval
@pytest.mark.slow
def test_an_unknown_task_is_an_error_in_one_line(folders: Path) -> None:
    done = command(
        "--model", "retro", "--model_args", f"pretrained={folders / 'own.model'},k=0", "--tasks", "no_such_task"
    )
    assert (done.returncode, done.stdout) == (1, "")
    errors = [line for line in done.stderr.splitlines() if "INFO" not in line]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("Error: Tasks not found: no_such_task. `lm_eval ls tasks` lists those")
