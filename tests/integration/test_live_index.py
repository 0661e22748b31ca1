"""A live index: after changes it finds what a fresh build finds; killed at any moment it is the old state or the new one."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_builder import live
from index_builder.build import build_index, verify_index
from index_builder.config import BuildConfig
from index_builder.live import Changes, add_documents, compact_index, remove_documents, sync_folder
from index_builder.search import IndexRetriever, Method, Snapshot
from retro.artifact import read_manifest, writing
from retro.errors import ConfigError, CorpusError, FormatError

FolderBytes = Callable[[Path], dict[str, bytes]]
Records = list[dict[str, Any]]
QUERIES = ["When did the oil crisis begin?", "rain forest", "embargo of 1973 and prices", "x"]


def write_corpus(path: Path, records: Records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def build(tiny_encoder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Builds an index of records, called `wiki`."""

    def make(name: str, records: Records, **settings: Any) -> Path:
        (tmp_path / name).mkdir()
        corpus = write_corpus(tmp_path / name / "wiki.jsonl", records)
        defaults: dict[str, Any] = {"encoder": str(tiny_encoder), "chunk_len": 16, "shard_chars": 2_000}
        build_index([str(corpus)], tmp_path / f"{name}.index", BuildConfig(**defaults | settings))
        return tmp_path / f"{name}.index"

    return make


@pytest.fixture
def records(paragraphs: list[dict[str, Any]]) -> Records:
    """Thirty short documents with metadata."""
    return [
        {"id": f"d{n}", "text": record["text"][:300], "title": record["title"], "year": 1990 + n}
        for n, record in enumerate(paragraphs[:30])
    ]


def found(folder: Path, k: int, method: Method = "dense") -> list[list[tuple[float, str, str, str]]]:
    """Score, key, text and continuation of what each query finds, in an order that ties do not decide."""
    retriever = IndexRetriever.open(folder, method=method)
    results = retriever.retrieve(QUERIES, k)
    return [sorted((p.score, p.key, p.text, p.continuation) for p in passages) for passages in results]


# What is found


def test_an_added_document_is_found_by_the_next_search_of_an_open_retriever(
    build: Callable[..., Path], records: Records, tmp_path: Path
) -> None:
    folder = build("a", records[:10])
    retriever = IndexRetriever.open(folder)
    text = records[20]["text"][:60]
    assert retriever.retrieve([text], 1)[0][0].text != text
    added = add_documents(folder, [str(write_corpus(tmp_path / "wiki.jsonl", [{"id": "new", "text": text}]))])
    assert added == Changes(added=1, updated=0, removed=0, unchanged=0, chunks=1)
    assert retriever.retrieve([text], 1)[0][0].key == "wiki:new"
    assert retriever.manifest["documents"] == 11
    assert verify_index(folder) == []


@pytest.mark.parametrize("seed", range(3))
def test_after_any_changes_an_exact_index_finds_what_a_fresh_build_finds(
    build: Callable[..., Path], records: Records, tmp_path: Path, seed: int
) -> None:
    random = np.random.default_rng(seed)
    present = {record["id"]: record for record in records[:12]}
    folder = build("live", list(present.values()))
    unused = list(records[12:])
    for step in range(8):
        operation = random.choice(["add", "update", "remove"])
        if operation == "add" and unused:
            few = [unused.pop() for _ in range(min(len(unused), int(random.integers(1, 4))))]
            add_documents(folder, [str(write_corpus(tmp_path / "wiki.jsonl", few))])
            present |= {record["id"]: record for record in few}
        elif operation == "update":
            ids = random.choice(sorted(present), 2, replace=False).tolist()
            few = [{**present[i], "text": f"revision {step} of {present[i]['text'][::-1][:150]}"} for i in ids]
            changes = add_documents(folder, [str(write_corpus(tmp_path / "wiki.jsonl", few))], update=True)
            assert (changes.added, changes.updated) == (0, 2)
            present |= {record["id"]: record for record in few}
        elif operation == "remove":
            ids = random.choice(sorted(present), 2, replace=False).tolist()
            assert remove_documents(folder, [f"wiki:{i}" for i in ids]).removed == 2
            for i in ids:
                del present[i]
    fresh = build("fresh", list(present.values()))
    chunks = read_manifest(fresh, "index")["chunks"]
    assert read_manifest(folder, "index")["chunks"] == chunks
    assert read_manifest(folder, "index")["documents"] == len(present)
    for k in (1, 5, chunks):
        assert found(folder, k) == found(fresh, k)
    before = found(folder, chunks)
    compact_index(folder)
    assert found(folder, chunks) == before
    for method in ("bm25", "hybrid", "rerank"):  # their statistics are new after compacting
        assert found(folder, 5, method) == found(fresh, 5, method)
    assert verify_index(folder) == []


def test_what_was_added_and_removed_again_leaves_no_trace_in_what_questions_find(
    build: Callable[..., Path], records: Records, tmp_path: Path
) -> None:
    folder = build("a", records[:10])
    questions = ["Where does the Quoxholm ferry bring oil to?", *QUERIES]

    def answers() -> list[list[tuple[float, str, str]]]:
        found = IndexRetriever.open(folder, method="hybrid").retrieve(questions, 50, role="query")
        return [[(p.score, p.key, p.text) for p in passages] for passages in found]

    before = answers()
    added = [{"id": f"new{n}", "text": f"The Quoxholm ferry {n} brings oil."} for n in range(3)]
    add_documents(folder, [str(write_corpus(tmp_path / "wiki.jsonl", added))])
    assert answers()[0][0][1].startswith("wiki:new")
    remove_documents(folder, ["wiki:new0", "wiki:new2"])
    assert answers()[0][0][1] == "wiki:new1"
    remove_documents(folder, ["wiki:new1"])
    assert answers() == before


def test_a_key_that_is_there_is_refused_and_nothing_is_added(
    build: Callable[..., Path], records: Records, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    folder = build("a", records[:5])
    before = folder_bytes(folder)
    corpus = write_corpus(tmp_path / "wiki.jsonl", [*records[6:9], records[2]])
    with pytest.raises(
        CorpusError, match=r"wiki\.jsonl:4: the index has a document wiki:d2 already; nothing was added"
    ):
        add_documents(folder, [str(corpus)])
    assert len(found(folder, 5)[0]) == 5
    remove_documents(folder, ["wiki:none"], missing_ok=True)
    assert folder_bytes(folder) == before  # what the refused change had written is gone


def test_an_unknown_key_is_refused_and_nothing_is_removed(
    build: Callable[..., Path], records: Records, folder_bytes: FolderBytes
) -> None:
    folder = build("a", records[:5])
    before = folder_bytes(folder)
    with pytest.raises(ConfigError, match="has no document wiki:nobody: nothing was removed"):
        remove_documents(folder, ["wiki:d1", "wiki:nobody"])
    assert folder_bytes(folder) == before


def test_everything_can_be_removed_and_something_added_again(
    build: Callable[..., Path], records: Records, tmp_path: Path
) -> None:
    folder = build("a", records[:3])
    remove_documents(folder, [f"wiki:d{n}" for n in range(3)])
    with pytest.raises(ConfigError, match="more than the 0 chunks"):
        found(folder, 1)
    add_documents(folder, [str(write_corpus(tmp_path / "wiki.jsonl", records[:1]))])
    assert {key for _, key, _, _ in found(folder, 1)[0]} == {"wiki:d0"}
    compact_index(folder)
    assert {key for _, key, _, _ in found(folder, 1)[0]} == {"wiki:d0"}


def test_an_index_of_nothing_is_compacted(build: Callable[..., Path], records: Records, tmp_path: Path) -> None:
    folder = build("a", records[:3])
    remove_documents(folder, [f"wiki:d{n}" for n in range(3)])
    assert compact_index(folder)["chunks"] == 0
    add_documents(folder, [str(write_corpus(tmp_path / "wiki.jsonl", records[:2]))])
    assert read_manifest(folder, "index")["documents"] == 2


def test_unchanged_documents_are_not_written_again(
    build: Callable[..., Path], records: Records, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    folder = build("a", records[:6])
    before = folder_bytes(folder)
    corpus = write_corpus(tmp_path / "wiki.jsonl", records[:6])
    changes = add_documents(folder, [str(corpus)], update=True)
    assert changes == Changes(added=0, updated=0, removed=0, unchanged=6, chunks=0)
    assert folder_bytes(folder) == before
    # A changed field of the metadata is a change, too.
    corpus = write_corpus(tmp_path / "wiki.jsonl", [{**records[0], "year": 2000}, *records[1:6]])
    changes = add_documents(folder, [str(corpus)], update=True)
    assert (changes.updated, changes.unchanged) == (1, 5)
    [[passage], *_] = IndexRetriever.open(folder).retrieve(QUERIES, 1, where="year = 2000")
    assert passage.key == "wiki:d0"


def test_many_small_additions_leave_few_shards(build: Callable[..., Path], records: Records, tmp_path: Path) -> None:
    folder = build("a", records[:2], shard_chars=100_000)
    for record in records[2:]:
        add_documents(folder, [str(write_corpus(tmp_path / "wiki.jsonl", [record]))])
    manifest = read_manifest(folder, "index")
    assert manifest["documents"] == 30
    assert len(manifest["shards"]) <= 1 + 6  # the built one, and one for each power of two
    fresh = build("fresh", records)
    assert found(folder, 40) == found(fresh, 40)


def test_an_approximate_index_finds_added_documents_at_once_and_gets_a_segment_of_them(
    build: Callable[..., Path], records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "SEGMENT_ROWS", 40)
    folder = build("a", records[:15], index_type="IVF1,Flat")
    add_documents(folder, [str(write_corpus(tmp_path / "wiki.jsonl", records[15:17]))])
    assert len(read_manifest(folder, "index")["index"]["segments"]) == 1
    exact = build("exact", records[:17])
    assert found(folder, 60) == found(exact, 60)
    add_documents(folder, [str(write_corpus(tmp_path / "wiki.jsonl", records[17:30]))])
    segments = read_manifest(folder, "index")["index"]["segments"]
    assert len(segments) == 2
    assert sum(segment["rows"] for segment in segments) == read_manifest(folder, "index")["chunks"]
    assert found(folder, 120) == found(build("exact2", records), 120)
    assert verify_index(folder) == []


# Following a folder


@pytest.fixture
def source(tmp_path: Path, records: Records) -> Path:
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    for n, record in enumerate(records[:6]):
        (folder / ("sub" if n % 2 else "") / f"{n}.txt").write_text(record["text"])
    return folder


def test_an_index_follows_a_folder(source: Path, tiny_encoder: Path, records: Records, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other.jsonl", records[10:12])
    config = BuildConfig(encoder=str(tiny_encoder), chunk_len=16)
    build_index([str(source), str(other)], tmp_path / "x.index", config)
    folder = tmp_path / "x.index"
    assert sync_folder(folder, str(source)) == Changes(added=0, updated=0, removed=0, unchanged=6, chunks=0)
    (source / "0.txt").write_text("changed: " + records[0]["text"])
    (source / "new.md").write_text(f"# A title\n\n{records[7]['text']}")
    (source / "2.txt").unlink()
    state = read_manifest(folder, "index")
    expected = {"added": 1, "updated": 1, "unchanged": 4}
    for delete, removed in ((False, 0), (True, 1)):
        planned = sync_folder(folder, str(source), delete=delete, dry_run=True)
        assert planned.removed == removed
        assert {name: getattr(planned, name) for name in expected} == expected
        assert planned.chunks > 0
    assert read_manifest(folder, "index") == state
    done = sync_folder(folder, str(source), delete=True)
    assert done == planned
    build_index([str(source), str(other)], tmp_path / "fresh.index", config)
    chunks = read_manifest(tmp_path / "fresh.index", "index")["chunks"]
    assert found(folder, chunks) == found(tmp_path / "fresh.index", chunks)


def test_a_folder_that_is_gone_deletes_nothing(source: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    build_index([str(source)], tmp_path / "x.index", BuildConfig(encoder=str(tiny_encoder), chunk_len=16))
    shutil.rmtree(source)
    with pytest.raises(CorpusError, match="does not exist"):
        sync_folder(tmp_path / "x.index", str(source), delete=True)
    source.mkdir()
    with pytest.raises(CorpusError, match="holds no file"):
        sync_folder(tmp_path / "x.index", str(source), delete=True)
    assert read_manifest(tmp_path / "x.index", "index")["documents"] == 6


# Others


def test_whoever_has_the_old_state_open_goes_on_with_it(
    build: Callable[..., Path], records: Records, tmp_path: Path
) -> None:
    folder = build("a", records[:10])
    old = Snapshot.open(folder)
    vector_QX = IndexRetriever.open(folder).encoder.encode(QUERIES, "document")
    before = old.find(QUERIES, vector_QX, 9, method="hybrid")
    texts = [old.store.passage(row).full_text for row in before[1][0].tolist()]
    remove_documents(folder, ["wiki:d0", "wiki:d1"])
    add_documents(folder, [str(write_corpus(tmp_path / "wiki.jsonl", records[10:20]))])
    compact_index(folder)
    after = old.find(QUERIES, vector_QX, 9, method="hybrid")
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1], before[1])
    assert [old.store.passage(row).full_text for row in after[1][0].tolist()] == texts


def test_searches_never_fail_while_the_index_changes(
    build: Callable[..., Path], records: Records, tmp_path: Path
) -> None:
    folder = build("a", records[:10])
    failures: list[BaseException] = []
    searches, stop = [0, 0], threading.Event()

    def search(number: int) -> None:
        retriever = IndexRetriever.open(folder)
        while not stop.is_set():
            try:
                passages = retriever.retrieve(QUERIES, 3) if number else IndexRetriever(folder, retriever.encoder)
                assert not isinstance(passages, list) or all(len(few) == 3 for few in passages)
                searches[number] += 1
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=search, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for round_ in range(3):
        few = [{**record, "id": f"r{round_}-{record['id']}"} for record in records[10:14]]
        add_documents(folder, [str(write_corpus(tmp_path / "wiki.jsonl", few))])
        remove_documents(folder, [f"wiki:r{round_}-d10"])
        compact_index(folder)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert min(searches) > 3


def test_a_second_writer_is_refused(build: Callable[..., Path], records: Records, folder_bytes: FolderBytes) -> None:
    folder = build("a", records[:5])
    before = folder_bytes(folder)
    with writing(folder), pytest.raises(ConfigError, match="another process is writing"):
        remove_documents(folder, ["wiki:d1"])
    assert folder_bytes(folder) == before


def test_what_is_no_finished_index_is_refused(tmp_path: Path, records: Records) -> None:
    corpus = write_corpus(tmp_path / "wiki.jsonl", records[:2])
    for change in (
        lambda: add_documents(tmp_path / "no.index", [str(corpus)]),
        lambda: remove_documents(tmp_path / "no.index", ["wiki:d1"]),
        lambda: sync_folder(tmp_path / "no.index", str(corpus)),
        lambda: compact_index(tmp_path / "no.index"),
    ):
        with pytest.raises(FormatError, match=r"no\.index is not there"):
            change()
    assert not (tmp_path / "no.index").exists()


# Killed

CHANGES: dict[str, dict[str, Any]] = {
    "add": {"change": "add"},
    "update": {"change": "update"},
    "remove": {"change": "remove", "keys": ["wiki:d0", "wiki:d3"]},
    "sync": {"change": "sync", "delete": True},
    "compact": {"change": "compact"},
}


@pytest.fixture
def killed_jobs(build: Callable[..., Path], records: Records, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """A change of each kind, of an index that was changed before."""
    folder = build("a", records[:8], index_type="IVF2,Flat", recall=1.0, shard_chars=600)
    add_documents(folder, [str(write_corpus(tmp_path / "wiki.jsonl", records[8:10]))])
    remove_documents(folder, ["wiki:d5"])
    new = [{**record, "text": "revised " + record["text"]} for record in records[1:3]]
    for name, few in {"add": records[10:15], "update": [*new, *records[10:14]], "sync": [*new, *records[4:14]]}.items():
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name / "wiki.jsonl", few)
    return {
        name: {
            "make": "change",
            "index": str(folder),
            "corpus": str(tmp_path / name / "wiki.jsonl"),
            "config": change,
            "out": str(tmp_path / f"{name}-killed"),
            "stride": 1,
        }
        for name, change in CHANGES.items()
    }


def test_a_change_killed_before_any_of_its_steps_leaves_the_old_state_or_the_new_one(
    killed_jobs: dict[str, dict[str, Any]],
    in_processes: Callable[..., list[dict[str, Any]]],
    folder_bytes: FolderBytes,
) -> None:
    results = in_processes(list(killed_jobs.values()))
    for (name, job), result in zip(killed_jobs.items(), results, strict=True):
        out, base = Path(job["out"]), Path(job["index"])
        old, new = (read_manifest(folder, "index") for folder in (base, out / "whole"))
        whole = folder_bytes(out / "whole")
        steps = [step for _, step in result["whole"]["steps"]]
        assert result["whole"]["end"] == ["done", ""]
        swap = steps.index("manifest.json") + 1
        assert len(result["killed"]) == len(steps) > 2, name
        for attempt in result["killed"]:
            number = attempt["number"]
            assert attempt["first"]["killed"], (name, number)
            remains = out / f"remains{number}"
            left = read_manifest(remains, "index")
            assert left["state"] == (old if number <= swap else new)["state"], (name, number)
            assert Snapshot.open(remains).store.num_live_chunks == left["chunks"]
            again = folder_bytes(out / f"killed{number}")
            if number <= swap or name in ("update", "sync"):
                assert attempt["second"]["end"] == ["done", ""], (name, number)
                assert again == whole, (name, number)
            elif name == "add":  # it was done: its keys are there now
                assert attempt["second"]["end"][0] == "RetroError CorpusError", (name, number)
            elif name == "remove":
                assert attempt["second"]["end"][0] == "RetroError ConfigError", (name, number)
