"""Building an index: what it holds, and that it survives being killed at any moment."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_builder.build import build_index, train_tokenizer, verify_index
from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions, describe_corpora, read_documents
from index_builder.encoder import Encoder
from index_builder.search import IndexRetriever, Snapshot
from retro.artifact import read_manifest
from retro.chunks import ChunkStore, chunk_spans, load_array
from retro.errors import ConfigError, CorpusError, FormatError, StorageError
from retro.tokenizer import Tokenizer

FolderBytes = Callable[[Path], dict[str, bytes]]
Killed = tuple[Path, dict[str, Any]]
BAD = "not JSON"


def write_corpus(path: Path, records: list[dict[str, Any] | str]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def vectors_of(folder: Path) -> np.ndarray[Any, np.dtype[np.float16]]:
    return np.concatenate([load_array(path) for path in sorted((folder / "vectors").glob("*.npy"))])


# What an index holds


def test_an_index_holds_the_chunks_of_the_corpus_in_order(corpus: Path, tiny_index: Path, tiny_encoder: Path) -> None:
    tokenizer = Encoder.open(str(tiny_encoder)).tokenizer()
    expected = []
    for record in map(json.loads, corpus.read_text(encoding="utf-8").splitlines()):
        text, spans = record["text"], tokenizer.encode(record["text"]).spans
        for start in range(0, len(spans), 32):
            part = spans[start : start + 32]
            expected.append((f"squad:{record['id']}", record["title"], text[part[0, 0] : part[-1, 1]]))
    store = ChunkStore(tiny_index)
    passages = [store.passage(row) for row in range(store.num_chunks)]
    assert [(passage.key, passage.title, passage.text) for passage in passages] == expected
    # A shard ends with the document that fills it.
    shards, size = 0, 0
    for record in map(json.loads, corpus.read_text(encoding="utf-8").splitlines()):
        size += len(record["text"])
        shards, size = (shards + 1, 0) if size >= 6_000 else (shards, size)
    assert len(store.shards) == shards + (size > 0) > 2


def test_vectors_are_those_of_the_chunks_as_documents(tiny_index: Path, tiny_encoder: Path) -> None:
    store = ChunkStore(tiny_index)
    texts = [store.passage(row).text for row in range(store.num_chunks)]
    expected = Encoder.open(str(tiny_encoder)).encode(texts, "document")
    stored = vectors_of(tiny_index)
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored, expected, rtol=1e-3, atol=1e-4)
    index = Snapshot.open(tiny_index).index
    first_of_text = [texts.index(text) for text in texts]  # of equal chunks the first is found
    assert index.search(stored.astype(np.float32), 1)[1][:, 0].tolist() == first_of_text


def test_the_manifest_says_what_is_there_and_how_it_was_made(
    corpus: Path, tiny_index: Path, tiny_encoder: Path
) -> None:
    manifest = read_manifest(tiny_index, "index")
    store = ChunkStore(tiny_index)
    encoder = Encoder.open(str(tiny_encoder))
    expected = {
        "documents": 40,
        "chunks": store.num_chunks,
        "rejects": 0,
        "truncated_chunks": 0,
        "chunk_len": 32,
        "title_in_key": False,
        "encoder": encoder.description(),
        "tokenizer_fingerprint": encoder.tokenizer().fingerprint,
    }
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["index"]["factory"] == "Flat"
    assert manifest["index"]["metric"] == "inner product"
    assert manifest["recipe"]["corpora"] == describe_corpora([str(corpus)])
    assert manifest["recipe"]["config"]["shard_chars"] == 6_000
    assert Tokenizer.load(str(tiny_index)).fingerprint == manifest["tokenizer_fingerprint"]
    listed = set(manifest["files"])
    there = {p.relative_to(tiny_index).as_posix() for p in tiny_index.rglob("*") if p.is_file()}
    assert there - listed == {"manifest.json", ".lock"}
    assert verify_index(tiny_index) == []


def test_an_encoder_that_does_not_normalize_is_searched_by_l2(
    corpus: Path, prompted_encoder: Path, tmp_path: Path
) -> None:
    config = BuildConfig(encoder=str(prompted_encoder), chunk_len=32, read=ReadOptions(limit=8))
    build_index([str(corpus)], tmp_path / "x.index", config)
    retriever = IndexRetriever.open(tmp_path / "x.index")
    assert retriever.snapshot().index.metric == "L2"
    question = "When did the oil crisis begin?"
    query_X = retriever.encoder.encode([question], "query")[0].astype(np.float64)
    distances_N = ((vectors_of(tmp_path / "x.index").astype(np.float64) - query_X) ** 2).sum(axis=1)
    [passages] = retriever.retrieve([question], 5, role="query")
    assert [passage.row for passage in passages] == np.argsort(distances_N)[:5].tolist()
    np.testing.assert_allclose([p.score for p in passages], -np.sort(distances_N)[:5], rtol=1e-4)


def test_a_title_goes_in_front_of_stored_keys_and_of_nothing_else(tiny_encoder: Path, tmp_path: Path) -> None:
    records: list[dict[str, Any] | str] = [
        {"id": 1, "title": "Oil", "text": "It rose in 1973."},
        {"id": 2, "text": "No title here."},
    ]
    corpus = write_corpus(tmp_path / "c.jsonl", records)
    build_index([str(corpus)], tmp_path / "x.index", BuildConfig(encoder=str(tiny_encoder), title_in_key=True))
    retriever = IndexRetriever.open(tmp_path / "x.index")
    assert [retriever.store.passage(row).full_text for row in (0, 1)] == ["It rose in 1973.", "No title here."]
    expected = retriever.encoder.encode(["Oil. It rose in 1973.", "No title here."], "document")
    np.testing.assert_allclose(vectors_of(tmp_path / "x.index"), expected, rtol=1e-3, atol=1e-4)
    query = retriever.encoder.encode(["It rose in 1973."], "document")
    [[passage, _]] = retriever.retrieve(["It rose in 1973."], 2)
    np.testing.assert_allclose(passage.score, max((query @ expected.T)[0]), rtol=1e-3)


def test_chunks_can_count_the_tokens_of_another_tokenizer(
    corpus: Path, tiny_encoder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    config = BuildConfig(
        encoder=str(tiny_encoder), tokenizer=str(tokenizer_folder), chunk_len=16, read=ReadOptions(limit=3)
    )
    manifest = build_index([str(corpus)], tmp_path / "x.index", config)
    tokenizer = Tokenizer.load(str(tokenizer_folder))
    assert manifest["tokenizer_fingerprint"] == tokenizer.fingerprint
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()[:3]]
    expected = [text[a:b] for text in texts for a, b in chunk_spans(tokenizer.encode(text), 16).tolist()]
    store = ChunkStore(tmp_path / "x.index")
    assert [store.passage(row).text for row in range(store.num_chunks)] == expected


def test_chunks_that_the_encoder_cuts_short_are_counted(
    corpus: Path, make_encoder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = make_encoder(tmp_path / "short", max_length=20)
    config = BuildConfig(encoder=str(encoder), chunk_len=32, read=ReadOptions(limit=5))
    with caplog.at_level("INFO"):
        manifest = build_index([str(corpus)], tmp_path / "x.index", config)
    store = ChunkStore(tmp_path / "x.index")
    tokenizer = Encoder.open(str(encoder)).tokenizer()
    lengths = [len(tokenizer.encode(store.passage(row).text).ids) for row in range(store.num_chunks)]
    assert manifest["truncated_chunks"] == sum(length > 18 for length in lengths)
    share = 100 * manifest["truncated_chunks"] / len(lengths)
    assert f"{share:.1f}% of the chunks are longer than the 20 tokens the encoder reads" in caplog.text


def test_several_corpora_can_share_ids(tiny_encoder: Path, tmp_path: Path) -> None:
    a = write_corpus(tmp_path / "a.jsonl", [{"id": 1, "text": "oil"}])
    b = write_corpus(tmp_path / "b.jsonl", [{"id": 1, "text": "gas"}])
    build_index([str(a), f"second={b}"], tmp_path / "x.index", BuildConfig(encoder=str(tiny_encoder)))
    assert [key for _, key in ChunkStore(tmp_path / "x.index").numbered_keys()] == ["a:1", "second:1"]


def test_an_index_with_inverted_lists_is_built_over_several_shards(
    corpus: Path, tiny_encoder: Path, tiny_index: Path, tmp_path: Path
) -> None:
    config = BuildConfig(encoder=str(tiny_encoder), chunk_len=32, shard_chars=6_000, index_type="IVF4,Flat", recall=1.0)
    manifest = build_index([str(corpus)], tmp_path / "ivf.index", config)
    exact, ivf = IndexRetriever.open(tiny_index), IndexRetriever.open(tmp_path / "ivf.index")
    # Tuned to a recall of 1, it searches all four lists, so that it is exact as well.
    assert manifest["index"]["nprobe"] == 4
    assert manifest["index"]["measured"]["recall_at_10"] == 1.0
    assert ivf.retrieve(["oil", "rain"], 9) == exact.retrieve(["oil", "rain"], 9)


# Rejected records


@pytest.mark.parametrize("shard_chars", [1, 14, 100])
def test_rejected_records_are_counted_and_listed_wherever_they_stand(
    tiny_encoder: Path, tmp_path: Path, shard_chars: int
) -> None:
    good: list[dict[str, Any]] = [{"id": number, "text": f"text {number}"} for number in range(4)]
    records: list[dict[str, Any] | str] = [BAD, good[0], good[1], BAD, {"text": ""}, good[2], good[3], BAD, BAD]
    corpus = write_corpus(tmp_path / "c.jsonl", records)
    config = BuildConfig(encoder=str(tiny_encoder), shard_chars=shard_chars, read=ReadOptions(on_error="skip"))
    manifest = build_index([str(corpus)], tmp_path / "x.index", config)
    listed = [json.loads(line) for line in (tmp_path / "x.index" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["file"], reject["line"]) for reject in listed] == [(str(corpus), n) for n in (1, 4, 5, 8, 9)]
    assert listed[2]["reason"] == "the text is empty; a document needs words"
    assert (manifest["documents"], manifest["rejects"]) == (4, 5)


def test_without_rejected_records_there_is_no_list(tiny_index: Path) -> None:
    assert not (tiny_index / "rejects.jsonl").exists()


# Again


def test_a_second_call_changes_nothing_and_reads_nothing(
    corpus: Path, tiny_encoder: Path, tiny_index: Path, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    copied = shutil.copytree(tiny_index, tmp_path / "x.index")
    times = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.name != ".lock"}
    before = folder_bytes(copied)
    config = BuildConfig(encoder=str(tiny_encoder), chunk_len=32, shard_chars=6_000)
    reports: list[Any] = []
    manifest = build_index([str(corpus)], copied, config, progress=lambda *report: reports.append(report))
    assert manifest == read_manifest(tiny_index, "index")
    assert folder_bytes(copied) == before
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.name != ".lock"} == times
    assert reports == []


def test_progress_reaches_the_end_of_every_stage(corpus: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int | None]] = []
    config = BuildConfig(encoder=str(tiny_encoder), chunk_len=32, shard_chars=1_500, read=ReadOptions(limit=6))
    manifest = build_index([str(corpus)], tmp_path / "x.index", config, progress=lambda *r: reports.append(r))
    n = manifest["chunks"]
    last = {stage: (done, total) for stage, done, total in reports}
    assert last == {"read": (6, None), "encode": (n, n), "index": (n, n), "BM25": (n, n)}
    for stage in last:
        done = [report[1] for report in reports if report[0] == stage]
        assert done == sorted(set(done))


def test_another_setting_is_refused_and_overwrite_starts_again(
    corpus: Path, tiny_encoder: Path, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    def build(chunk_len: int, out: str = "x.index", *, overwrite: bool = False) -> None:
        config = BuildConfig(encoder=str(tiny_encoder), chunk_len=chunk_len, read=ReadOptions(limit=4))
        build_index([str(corpus)], tmp_path / out, config, overwrite=overwrite)

    build(32)
    before = folder_bytes(tmp_path / "x.index")
    with pytest.raises(ConfigError, match=r"x\.index was made differently \(config\.chunk_len: 32 -> 16\)"):
        build(16)
    assert folder_bytes(tmp_path / "x.index") == before
    build(16, overwrite=True)
    build(16, "fresh.index")
    assert folder_bytes(tmp_path / "x.index") == folder_bytes(tmp_path / "fresh.index")


def test_a_corpus_that_changed_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"id": 1, "text": "oil"}])
    config = BuildConfig(encoder=str(tiny_encoder))
    build_index([str(corpus)], tmp_path / "x.index", config)
    write_corpus(corpus, [{"id": 1, "text": "oil and gas"}])
    with pytest.raises(ConfigError, match=r"made differently .*corpora"):
        build_index([str(corpus)], tmp_path / "x.index", config)
    build_index([str(corpus)], tmp_path / "x.index", config, overwrite=True)
    assert ChunkStore(tmp_path / "x.index").passage(0).text == "oil and gas"


def test_an_encoder_whose_weights_changed_is_refused(make_encoder: Callable[..., Path], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"id": 1, "text": "oil"}])
    config = BuildConfig(encoder=str(tmp_path / "encoder"))
    make_encoder(tmp_path / "encoder")
    build_index([str(corpus)], tmp_path / "x.index", config)
    shutil.rmtree(tmp_path / "encoder")
    make_encoder(tmp_path / "encoder", seed=1)
    with pytest.raises(ConfigError, match=r"made differently .*encoder_fingerprint: "):
        build_index([str(corpus)], tmp_path / "x.index", config)


def test_a_corpus_that_breaks_off_keeps_what_was_read(
    tiny_encoder: Path, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    records: list[dict[str, Any] | str] = [{"id": n, "text": f"text {n}"} for n in range(5)]
    corpus = write_corpus(tmp_path / "c.jsonl", [*records, BAD])
    config = BuildConfig(encoder=str(tiny_encoder), shard_chars=12)
    with pytest.raises(CorpusError, match=r"c\.jsonl:6"):
        build_index([str(corpus)], tmp_path / "x.index", config)
    assert ChunkStore(tmp_path / "x.index").num_documents == 4
    with pytest.raises(FormatError, match="interrupted"):
        IndexRetriever.open(tmp_path / "x.index")


# Killed

STEPS = [
    # What is renamed to its place, in order, for six documents in three shards, with two rejected records.
    *("build.json", "tokenizer.json"),
    *("chunks/00000.npy", "documents/00000.arrow", "chunks/00001.npy", "documents/00001.arrow"),
    *("chunks/00002.npy", "documents/00002.arrow", "documents/counts.json"),
    *("vectors/00000.npy", "vectors/00001.npy", "vectors/00002.npy"),
    *(
        "index/trained.faiss",
        "index/part-00000.faiss",
        "index/part-00000.faiss",
    ),  # written; then it becomes the segment
    *("lexical/part-00000.counts", "lexical/words.npy", "lexical/frequencies.npy", "lexical/part-00000.bm25"),
    *("lexical/part-00000.counts", "lexical/statistics.json", "manifest.json"),
]


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory,
    paragraphs: list[dict[str, Any]],
    tiny_encoder: Path,
    in_processes: Callable[..., list[dict[str, Any]]],
) -> Killed:
    """A build that is killed before each of its steps: its folder, and what happened."""
    folder = tmp_path_factory.mktemp("killed")
    short = [{**record, "text": record["text"][:200]} for record in paragraphs[:6]]
    records: list[dict[str, Any] | str] = [*short[:1], BAD, *short[1:5], BAD, *short[5:]]
    corpus = write_corpus(folder / "c.jsonl", records)
    config = {
        "encoder": str(tiny_encoder),
        "chunk_len": 16,
        "shard_chars": 400,
        "index_type": "IVF2,Flat",
        "read": {"on_error": "skip"},
    }
    job = {"make": "index", "corpus": str(corpus), "config": config, "out": str(folder / "steps"), "stride": 1}
    return folder, in_processes([job])[0]


def test_a_build_killed_before_any_of_its_steps_goes_on_to_the_same_bytes(
    killed: Killed, folder_bytes: FolderBytes
) -> None:
    folder, result = killed
    whole = folder_bytes(folder / "steps" / "whole")
    assert result["whole"]["end"] == ["done", ""]
    steps = [name for _, name in result["whole"]["steps"]]
    assert [name for name in steps if name != "rejects.jsonl"][: len(STEPS)] == STEPS
    assert len(whole["rejects.jsonl"].splitlines()) == 2
    assert len(result["killed"]) == len(steps)
    assert [attempt["first"]["killed"] for attempt in result["killed"]] == [True] * len(steps)
    assert [attempt["second"]["end"] for attempt in result["killed"]] == [["done", ""]] * len(steps)
    differing = {
        f"{attempt['number']}, before {steps[attempt['number'] - 1]}": sorted(
            name for name in {*whole, *again} if whole.get(name) != again.get(name)
        )
        for attempt in result["killed"]
        if (again := folder_bytes(folder / "steps" / f"killed{attempt['number']}")) != whole
    }
    assert differing == {}


def test_what_a_kill_leaves_is_never_taken_for_an_index(
    killed: Killed,
) -> None:
    folder, result = killed
    steps = [name for _, name in result["whole"]["steps"]]
    for number in range(1, steps.index("manifest.json") + 2):
        with pytest.raises(FormatError, match="making it was interrupted"):
            read_manifest(folder / "steps" / f"remains{number}", "index")


def test_a_build_that_was_resumed_does_not_repeat_finished_shards(
    killed: Killed,
) -> None:
    _, result = killed
    for attempt in result["killed"]:
        finished = {name for _, name in attempt["first"]["steps"][:-1] if "/0000" in name and "chunks/" not in name}
        repeated = {name for _, name in attempt["second"]["steps"]} & finished
        assert repeated == set(), attempt["number"]


def test_settings_that_changed_after_a_kill_are_refused_and_what_is_there_is_kept(
    killed: Killed, tiny_encoder: Path, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    folder, result = killed
    number = [name for _, name in result["whole"]["steps"]].index("vectors/00001.npy") + 1
    begun = shutil.copytree(folder / "steps" / f"remains{number}", tmp_path / "x.index")
    before = folder_bytes(begun)
    config = BuildConfig(
        encoder=str(tiny_encoder),
        chunk_len=32,
        shard_chars=400,
        index_type="IVF2,Flat",
        read=ReadOptions(on_error="skip"),
    )
    with pytest.raises(ConfigError, match=r"x\.index was begun differently \(config\.chunk_len: 16 -> 32\)"):
        build_index([str(folder / "c.jsonl")], begun, config)
    assert folder_bytes(begun) == before
    build_index([str(folder / "c.jsonl")], begun, config, overwrite=True)
    build_index([str(folder / "c.jsonl")], tmp_path / "fresh.index", config)
    assert folder_bytes(begun) == folder_bytes(tmp_path / "fresh.index")


@pytest.fixture(scope="module")
def with_room(corpus: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of short chunks, whose vectors take more room than anything before them."""
    folder = tmp_path_factory.mktemp("room") / "x.index"
    build_index([str(corpus)], folder, BuildConfig(encoder=str(tiny_encoder), chunk_len=4, index_type="IVF4,Flat"))
    return folder


@pytest.mark.parametrize(
    ("num_bytes", "refused"),
    [(5_000, "tokenizer.json"), (70_000, "vectors/00000.npy"), (None, "index/part-00000.faiss")],
)
def test_a_full_disk_says_so_and_the_build_goes_on_once_there_is_room(
    corpus: Path,
    tiny_encoder: Path,
    with_room: Path,
    tmp_path: Path,
    folder_bytes: FolderBytes,
    file_limit: Callable[[int], AbstractContextManager[None]],
    num_bytes: int | None,
    refused: str,
) -> None:
    config = BuildConfig(encoder=str(tiny_encoder), chunk_len=4, index_type="IVF4,Flat")
    if num_bytes is None:  # nearly the whole of the part, which is as large as what becomes of it
        num_bytes = (with_room / "index" / "00000.faiss").stat().st_size - 1000
    with pytest.raises(StorageError) as caught, file_limit(num_bytes):
        build_index([str(corpus)], tmp_path / "x.index", config)
    message = str(caught.value)
    assert message.startswith("the disk is full (")
    assert f"cannot write {tmp_path / 'x.index' / refused}. " in message
    assert message.endswith("What is finished is kept: make room and run the same command again")
    assert [path.name for path in (tmp_path / "x.index").rglob("*.tmp")] == []
    build_index([str(corpus)], tmp_path / "x.index", config)
    assert folder_bytes(tmp_path / "x.index") == folder_bytes(with_room)


# Tokenizers


def test_a_tokenizer_trained_on_a_corpus_is_that_of_its_texts(corpus: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([str(corpus)], tmp_path / "tok", vocab_size=400, options=ReadOptions())
    texts = [d.text for d in read_documents([str(corpus)], ReadOptions()) if hasattr(d, "text")]
    assert tokenizer.fingerprint == Tokenizer.train(texts, 400).fingerprint
    manifest = read_manifest(tmp_path / "tok", "tokenizer")
    assert (manifest["fingerprint"], manifest["vocab_size"]) == (tokenizer.fingerprint, 400)
    assert Tokenizer.load(str(tmp_path / "tok")).fingerprint == tokenizer.fingerprint


def test_an_altered_tokenizer_is_refused(corpus: Path, tmp_path: Path) -> None:
    train_tokenizer([str(corpus)], tmp_path / "tok", vocab_size=300, options=ReadOptions())
    path = tmp_path / "tok" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"<|eos|>", b"<|EOS|>"))
    with pytest.raises(FormatError, match=r"tokenizer\.json was altered"):
        Tokenizer.load(str(tmp_path / "tok"))


_ENCODE_ALL_SHAPES = """
import sys
from pathlib import Path
import torch
from index_builder.build import open_encoder
from index_builder.config import BuildConfig

torch.set_num_threads(1)

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

encoder = open_encoder(BuildConfig(encoder=sys.argv[1], dtype="bfloat16"), "cpu")
encoder.encode(["the price of oil"] * 64, "document")
before = held()
for shard in range(8):  # another number of texts of each length in each, so that their last batches differ, too
    encoder.encode(["oil " * length for length in range(1, 90) for _ in range(1 + (length * 7 + shard * 11) % 32)], "document")
print((held() - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_shapes_of_what_is_encoded(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch compiled a matrix product for each length of text and size of batch, and kept 1,024 of them: 0.6 GiB.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", _ENCODE_ALL_SHAPES, str(tiny_encoder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < 150  # MiB
