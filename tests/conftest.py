"""Shared by all tests: no network, small encoders, a part of the bundled corpus, and processes that die on purpose."""

import importlib
import json
import lzma
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from commands import Outcome

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Tests run beside each other, a thread each: spinning threads on shared cores cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On shared cores the time of one example says nothing.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="session")
def paragraphs() -> list[dict[str, Any]]:
    """Eight articles of the bundled corpus with five paragraphs each; the group is the article."""
    with lzma.open(EXAMPLES / "squad11_dev_paragraphs.jsonl.xz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    by_title: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_title.setdefault(record["title"], []).append(record)
    chosen = ["1973 oil crisis", *sorted(set(by_title) - {"1973 oil crisis"})[:7]]
    return [{**record, "group": title} for title in chosen for record in by_title[title][:5]]


@pytest.fixture(scope="session")
def corpus(paragraphs: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paragraphs as `squad.jsonl`."""
    path = tmp_path_factory.mktemp("corpus") / "squad.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in paragraphs), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def word_pieces(paragraphs: list[dict[str, Any]]) -> str:
    """A `tokenizer.json` as of BERT with few entries, which open fast; the same in each run, as one of WordPieceTrainer is not."""
    import tokenizers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pieces: Counter[str] = Counter()
    for record in paragraphs:
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(record["text"])):
            pieces.update([word, *(f"##{word[-length:]}" for length in (2, 3) if len(word) > length)])
    letters = sorted({letter for piece in pieces for letter in piece.removeprefix("##")})
    vocab = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters)])
    vocab |= dict.fromkeys(sorted(pieces, key=lambda piece: (-pieces[piece], piece))[: 1500 - len(vocab)])
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({piece: number for number, piece in enumerate(vocab)}, unk_token="[UNK]")
    )
    backend.add_special_tokens(special)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = tokenizers.decoders.WordPiece()
    ids = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return str(backend.to_str())


@pytest.fixture(scope="session")
def make_encoder(word_pieces: str) -> Callable[..., Path]:
    """Writes a sentence-transformers model with random weights into a folder; see the function inside."""

    def make(
        folder: Path,
        *,
        seed: int = 0,
        normalize: bool = True,
        prompts: dict[str, str] | None = None,
        max_length: int = 96,
        pooling: str = "mean",
        num_heads: int = 4,
        dropout: float = 0.1,
        positions: int = 128,
    ) -> Path:
        import torch
        import transformers

        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(word_pieces, encoding="utf-8")
        config = transformers.BertConfig(
            vocab_size=1500,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=num_heads,
            intermediate_size=64,
            max_position_embeddings=positions,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            # Larger than usual, so that texts of a random network do not all have nearly the same vector.
            initializer_range=0.3,
        )
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformers.BertModel(config).save_pretrained(folder)
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + ([("2_Normalize", "Normalize")] if normalize else [])
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ]
        pooling_config: dict[str, Any] = {"word_embedding_dimension": 32}
        for mode in ("cls_token", "mean_tokens", "max_tokens"):
            pooling_config[f"pooling_mode_{mode}"] = mode.startswith(pooling)
        written: dict[str, Any] = {
            "modules.json": modules,
            "1_Pooling/config.json": pooling_config,
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": 128,
                **{f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")},
            },
            "config_sentence_transformers.json": {"prompts": prompts or {}},
            "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        }
        for name, content in written.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_encoder(make_encoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder whose vectors have length 1."""
    return make_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="session")
def prompted_encoder(make_encoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder that does not normalize, with prompts for questions and for documents."""
    return make_encoder(
        tmp_path_factory.mktemp("encoders") / "prompted",
        normalize=False,
        prompts={"query": "query: ", "document": "passage: "},
    )


@pytest.fixture(scope="session")
def tokenizer_folder(paragraphs: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with 800 entries, trained on the paragraphs."""
    from retro.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    Tokenizer.train((record["text"] for record in paragraphs), 800).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_index(corpus: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the paragraphs with the tiny encoder, chunks of 32 tokens, in several shards. Not to be altered: copy it."""
    from index_builder.build import build_index
    from index_builder.config import BuildConfig

    folder = tmp_path_factory.mktemp("indexes") / "tiny.index"
    build_index([str(corpus)], folder, BuildConfig(encoder=str(tiny_encoder), chunk_len=32, shard_chars=6_000))
    return folder


@pytest.fixture
def retro(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a `retro` command in this process, through its entry point."""
    from retro.cli import main

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["retro", *map(str, arguments)])
        capsys.readouterr()
        code: int | str | None = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        assert isinstance(code, int | None)
        return Outcome(code or 0, printed.out, printed.err)

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, for tests that are marked `builders.in_a_browser`."""
    from builders import CHROMIUM

    sync_playwright = importlib.import_module("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        # Containers have no user namespaces for the sandbox; the pages are ours.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def folder_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Reads every file of an artifact, its manifest included; only the lock and measured times are left out."""

    def read(folder: Path) -> dict[str, bytes]:
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"
        }
        if b'"queries_per_s' in files.get("manifest.json", b""):
            files["manifest.json"] = re.sub(rb'("queries_per_s\w*"): [0-9.e+-]+', rb"\1: 0", files["manifest.json"])
        return files

    return read


@pytest.fixture
def file_limit() -> Callable[[int], AbstractContextManager[None]]:
    """Inside it, writing a file fails at so many bytes: the operating system's own error, as on a full disk."""

    @contextmanager
    def limited(num_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


# One process imports everything once and forks a child for each job, which may die. A single thread, so that forking is safe.
_HARNESS = """
import json, os, shutil, signal, sys
from pathlib import Path
import faiss, sentence_transformers, torch, transformers
from index_builder import live
from index_builder.build import build_index
from index_builder.config import BuildConfig, DataConfig
from index_builder.corpus import ReadOptions
from index_builder.encoder import Encoder
from index_builder.neighbors import build_training_data
from index_builder.search import IndexRetriever
from retro.errors import RetroError
from retro.tokenizer import Tokenizer

torch.set_num_threads(1)
request = json.load(sys.stdin)
opened = {}

def work(job, out):
    options = dict(job["config"])
    if "read" in options:
        options["read"] = ReadOptions(**options["read"])
    if job["make"] == "index":
        build_index([job["corpus"]], out, BuildConfig(**options))
    elif job["make"] == "change":
        if not out.is_dir():
            shutil.copytree(job["index"], out)
        if options["change"] in ("add", "update"):
            live.add_documents(out, [job["corpus"]], update=options["change"] == "update")
        elif options["change"] == "remove":
            live.remove_documents(out, options["keys"])
        elif options["change"] == "sync":
            live.sync_folder(out, job["corpus"], delete=options["delete"])
        else:
            live.compact_index(out)
    else:
        build_training_data([job["corpus"]], out, tokenizer=opened["tokenizer"], retriever=opened["retriever"],
                            config=DataConfig(**options))

def child(job, out, die_before=0):
    # Returns what the job did to the disk, as a list of file names, and how it ended.
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        report = os.fdopen(writer, "w")
        steps = 0
        def hook(event, arguments):
            nonlocal steps
            if event in ("os.rename", "os.remove") and str(arguments[0]).startswith(str(out)):
                steps += 1
                name = os.path.relpath(str(arguments[0]), out).removesuffix(".tmp")
                report.write(json.dumps(["step", event.removeprefix("os."), name]) + "\\n")
                report.flush()
                if steps == die_before:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        try:
            work(job, out)
            report.write(json.dumps(["end", "done", ""]) + "\\n")
        except BaseException as error:
            kind = "RetroError" if isinstance(error, RetroError) else "other"
            report.write(json.dumps(["end", f"{kind} {type(error).__name__}", str(error)]) + "\\n")
        report.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        lines = [json.loads(line) for line in file]
    status = os.waitpid(pid, 0)[1]
    steps = [line[1:] for line in lines if line[0] == "step"]
    ends = [line[1:] for line in lines if line[0] == "end"]
    return {"steps": steps, "killed": os.WIFSIGNALED(status), "end": ends[0] if ends else None}

results = []
for job in request:
    if job["make"] == "index":
        Encoder.open(job["config"]["encoder"]).encode(["warm"], "document")  # what it imports, the children need not
    if job["make"] == "data" and not opened:
        opened["retriever"] = IndexRetriever.open(job["index"])
        opened["tokenizer"] = Tokenizer.load(job["tokenizer"])
    out = Path(job["out"])
    whole = child(job, out / "whole")
    result = {"whole": whole, "killed": []}
    for number in range(1, len(whole["steps"]) + 1, job.get("stride", len(whole["steps"]) + 1)):
        folder = out / f"killed{number}"
        killed = child(job, folder, die_before=number)
        shutil.copytree(folder, out / f"remains{number}")
        result["killed"].append({"number": number, "first": killed, "second": child(job, folder)})
    results.append(result)
print(json.dumps(results))
"""


@pytest.fixture(scope="session")
def in_processes() -> Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]:
    """Makes artifacts in processes that are killed, and makes them again.

    A job has `make` ("index", "data" or "change"), `corpus`, `config`, `out`; for data and changes `index`, for data `tokenizer`.
    It is done once without interruption in `out/whole`. With `stride`, it is killed with SIGKILL before the first and every
    stride-th step that changes the disk (a file renamed to its place or deleted) and then done again, each time in a folder of
    its own; what the kill left is kept in `out/remains<n>`.
    """

    def run(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(REPOSITORY),
        }
        done = subprocess.run(
            [sys.executable, "-c", _HARNESS],
            input=json.dumps(list(jobs)),
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return results

    return run
