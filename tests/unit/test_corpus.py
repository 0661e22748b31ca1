"""Reading documents: fields, folders, names, datasets and every way in which a record can be bad."""

import contextlib
import gzip
import hashlib
import json
import logging
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index_builder.corpus import ReadOptions, Reject, describe_corpora, read_documents
from retro.chunks import Document
from retro.errors import ConfigError, CorpusError

ADVICE = "Correct it, or use --on-error skip to leave such records out"


def write(path: Path, *records: object) -> Path:
    """JSON Lines; bytes go in as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(*corpora: object, **options: Any) -> list[Document | Reject]:
    return list(read_documents([str(corpus) for corpus in corpora], ReadOptions(**options)))


def documents(*corpora: object, **options: Any) -> list[Document]:
    found = read(*corpora, **options)
    assert all(isinstance(item, Document) for item in found), found
    return [item for item in found if isinstance(item, Document)]


def error_of(*corpora: object, **options: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        read(*corpora, **options)
    return str(caught.value)


# Fields


def test_a_record_becomes_a_document_with_all_its_fields(tmp_path: Path) -> None:
    record = {
        "id": 7,
        "text": "a\r\nb\rc",
        "title": "T",
        "url": "u",
        "group": 3,
        "split": "dev",
        "b": [1, None],
        "a": "é",
    }
    path = write(tmp_path / "wiki.jsonl", record)
    [document] = documents(path)
    assert document == Document(
        key="wiki:7",
        text="a\nb\nc",
        title="T",
        url="u",
        group="3",
        split="valid",
        metadata='{"a":"é","b":[1,null]}',
        content_hash="9de747fa04f4538454cd3304441b405f",
        source=f"{path}:1",
    )


def test_fields_that_are_missing_or_null_get_their_defaults(tmp_path: Path) -> None:
    records = (
        {"id": "x", "text": "a"},
        {"id": "y", "text": "b", "title": None, "url": None, "group": None, "split": None},
    )
    for document in documents(write(tmp_path / "c.jsonl", *records)):
        assert (document.title, document.url, document.split, document.metadata) == ("", "", "", "{}")
        assert document.group == document.key


def test_other_field_names_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", {"body": "words", "name": "n", "head": "h", "text": 5, "id": 6})
    [document] = documents(path, text_field="body", id_field="name", title_field="head")
    assert (document.key, document.text, document.title) == ("c:n", "words", "h")
    assert document.metadata == '{"id":6,"text":5}'


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", "train"), ("valid", "valid"), ("validation", "valid"), ("dev", "valid"), ("test", "test"), ("", "")],
)
def test_a_split_is_one_of_three_or_none(tmp_path: Path, split: str, expected: str) -> None:
    [document] = documents(write(tmp_path / "c.jsonl", {"text": "a", "split": split}))
    assert document.split == expected


def test_a_record_without_an_id_is_called_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", {"text": "a"}, b"", {"text": "b", "id": "own"}, {"text": "c", "id": None})
    assert [document.key for document in documents(path)] == ["c:1", "c:own", "c:4"]


def test_the_hash_depends_on_content_and_not_on_the_order_of_fields_or_the_place(tmp_path: Path) -> None:
    one = write(tmp_path / "c.jsonl", {"id": 1, "text": "a", "x": 1, "y": 2})
    two = write(tmp_path / "other" / "c.jsonl", b"", {"y": 2, "x": 1, "text": "a", "id": 1})
    changed = write(tmp_path / "changed" / "c.jsonl", {"id": 1, "text": "a", "x": 1, "y": 3})
    hashes = [documents(path)[0].content_hash for path in (one, two, changed)]
    assert hashes[0] == hashes[1] != hashes[2]


@given(
    text=st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text),
    extra=st.dictionaries(
        st.text(max_size=5).filter(lambda name: name not in {"text", "id", "title", "url", "group", "split"}),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    ),
    escape=st.booleans(),
)
def test_any_record_survives_json_lines(
    tmp_path_factory: pytest.TempPathFactory, text: str, extra: dict[str, Any], escape: bool
) -> None:
    path = tmp_path_factory.mktemp("any") / "c.jsonl"
    path.write_bytes(json.dumps({**extra, "text": text}, ensure_ascii=escape).encode())
    [document] = documents(path)
    assert document.text == text.replace("\r\n", "\n").replace("\r", "\n")
    assert json.loads(document.metadata) == extra


def test_parquet_is_read_with_values_that_json_does_not_have(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": [1, 2],
            "text": ["a", "b"],
            "day": pa.array([0, 1], pa.date32()),
            "score": [0.5, float("nan")],
            "tags": [[1.5], [float("inf")]],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert [(item.key, item.metadata, item.source) for item in documents(tmp_path / "t.parquet")] == [
        ("t:1", '{"day":"1970-01-01","score":0.5,"tags":[1.5]}', f"{tmp_path}/t.parquet:1"),
        ("t:2", '{"day":"1970-01-02","score":"nan","tags":["inf"]}', f"{tmp_path}/t.parquet:2"),
    ]


# Folders


def test_a_folder_is_read_in_the_order_of_its_posix_paths(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "manual"
    write(folder / "b" / "records.jsonl", {"text": "r1"}, {"text": "r2", "id": "own"})
    for name in ("z.txt", "a/two.md", "a-b.txt", "B.html", "a/x.png", "y.png", "c.rtf", "Makefile"):
        write(folder / name, b"words")
    write(folder / ".hidden.txt", b"words")
    write(folder / ".git" / "x.txt", b"words")
    (folder / "t.csv.gz").write_bytes(gzip.compress(b"text\nrow\n"))
    with caplog.at_level(logging.INFO, logger="index_builder.corpus"):
        keys = [document.key for document in documents(folder)]
    assert keys == [
        "manual:B.html",
        "manual:a-b.txt",
        "manual:a/two.md",
        "manual:b/records.jsonl:1",
        "manual:own",
        "manual:t.csv.gz:2",
        "manual:z.txt",
    ]
    assert caplog.messages == [f"{folder}: 4 files with other suffixes skipped: .png 2, (none) 1, .rtf 1"]


def test_a_folder_without_a_file_to_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "c" / "x.png", b"words")
    assert f"{tmp_path}/c holds no file that can be read; add files of .jsonl" in error_of(tmp_path / "c")
    with pytest.raises(CorpusError, match="holds no file that can be read"):
        describe_corpora([str(tmp_path / "c")])


def test_a_broken_link_in_a_folder_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"words")
    (tmp_path / "b.txt").symlink_to("nowhere")
    assert error_of(tmp_path) == f"{tmp_path}/b.txt does not exist; check the path"


def test_a_pipe_in_a_folder_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b.txt")
    assert "b.txt is not a regular file" in error_of(tmp_path)


def test_a_file_name_that_is_not_utf8_is_written_out(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("words")
    assert documents(f"c={tmp_path}")[0].key == "c:\\udcff.txt"


# Names of corpora


@pytest.mark.parametrize(
    ("file", "name"), [("wiki.jsonl.xz", "wiki"), ("a.b.ndjson", "a.b"), ("x.txt", "x"), ("T.CSV.GZ", "T")]
)
def test_a_corpus_is_called_by_its_stem_without_known_suffixes(tmp_path: Path, file: str, name: str) -> None:
    write(tmp_path / file)
    assert describe_corpora([str(tmp_path / file)])[0]["name"] == name


def test_a_corpus_can_be_named_and_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "c.jsonl", {"text": "plain"})
    write(tmp_path / "x=c.jsonl", {"text": "equals"})
    monkeypatch.chdir(tmp_path)
    assert [(item.key, item.text) for item in documents("y=c.jsonl", "x=c.jsonl")] == [
        ("y:1", "plain"),
        ("x=c:1", "equals"),
    ]
    write(tmp_path / "a.txt", b"words")
    assert describe_corpora(["."])[0]["name"] == tmp_path.name


def test_two_corpora_may_share_ids_and_not_names(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a" / "c.jsonl", {"text": "a"}), write(tmp_path / "b" / "c.jsonl", {"text": "b"})
    assert error_of(one, two) == f"{one} and {two} are both called 'c'; name one with NAME=PATH"
    assert [item.key for item in documents(one, f"d={two}")] == ["c:1", "d:1"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.jsonl", "missing.jsonl does not exist; check the path"),
        ("n=missing", "missing does not exist; check the path"),
        ("book.png", "book.png has a suffix that is not known; convert it to one of .jsonl"),
        ("t.parquet.gz", "t.parquet.gz has a suffix that is not known"),
        ("a:b.txt", "the name of a:b.txt would be 'a:b'; give one with NAME=PATH"),
        ("loop.txt", "loop.txt cannot be read (Too many levels of symbolic links); check the path"),
        ("a\0b", "cannot be read (embedded null byte); check the path"),
        ("hf:./missing:train", "missing does not exist; check the path"),
        ("hf:./book.png:train", "book.png is not a folder; write hf:FOLDER:SPLIT"),
        ("hf:name", "hf:name is not a dataset; write hf:NAME[@REVISION][/CONFIG]:SPLIT"),
        ("hf:name:", "hf:name: is not a dataset"),
        ("hf:a/b/c/d:train", "hf:a/b/c/d:train is not a dataset"),
        ("hf:name:train[:10%]", "use --limit instead of a slice"),
    ],
)
def test_a_corpus_that_cannot_be_found_is_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    for name in ("book.png", "t.parquet.gz", "a:b.txt"):
        write(tmp_path / name)
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    monkeypatch.chdir(tmp_path)
    for call in (lambda: read_documents([spec], ReadOptions()), lambda: describe_corpora([spec])):
        with pytest.raises(CorpusError) as caught:
            call()
        assert message in str(caught.value)


def test_no_corpus_at_all_is_an_error() -> None:
    assert error_of() == "no corpus given; name a file, a folder or hf:NAME:SPLIT"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "c.jsonl", {"text": "a"}).chmod(0)
    assert "c.jsonl cannot be read (permission denied)" in error_of(tmp_path / "c.jsonl")


# Bad records

BAD = [
    (b'{"text": }', "it is not valid JSON (Expecting value, character 9); each line must be one JSON object"),
    (b'[{"text": "a"}]', "it is an array; each line must be one JSON object"),
    (b'"a"', "it is a string; each line must be one JSON object"),
    (b'{"text": ' + b"9" * 5000 + b"}", "it is JSON that cannot be read (Exceeds the limit"),
    (b"[" * 200_000, "it is JSON that cannot be read (maximum recursion depth exceeded"),
    (b'{"text": "caf\xe9"}', "it is not valid UTF-8 (byte 0xe9 at position 13); save the file as UTF-8"),
    ({"body": "a", "id": 1}, "it has no field 'text' (its fields: 'body', 'id'); name the right one with --text-field"),
    ({}, "it has no field 'text' (its fields: none)"),
    ({"text": None}, "the field 'text' is null; it must be a string"),
    ({"text": ["a"]}, "the field 'text' is an array; it must be a string"),
    ({"text": " \n\t"}, "the text is empty; a document needs words"),
    (
        {"text": "x" * 101},
        "the text has 101 characters, more than the limit of 100; split it into documents or raise --max-document-chars",
    ),
    ({"text": "a", "id": "good"}, "the key 'c:good' was used by a document before; ids must differ within a corpus"),
    ({"text": "a", "id": 1.5}, "the field 'id' is a number; it must be a string, an integer or null"),
    ({"text": "a", "id": True}, "the field 'id' is a boolean; it must be a string, an integer or null"),
    ({"text": "a", "split": "trian"}, "the split 'trian' is not known; use train, valid (validation, dev) or test"),
    ({"text": "a", "url": ["u"]}, "the field 'url' is an array; it must be a string, a number or null"),
    ({"text": "a", "group": {}}, "the field 'group' is an object; it must be a string, a number or null"),
    ({"text": "a", "title": False}, "the field 'title' is a boolean; it must be a string, a number or null"),
    ({"text": "a\0b"}, "it holds a NUL character, so it is not plain text or was damaged; remove the character"),
    ({"text": "a", "title": "\0"}, "it holds a NUL character"),
    (b'{"text": "a \\ud83d"}', "it holds half a surrogate pair (an escape such as \\ud83d alone)"),
    (b'{"text": "a", "id": "\\ud83d"}', "it holds half a surrogate pair"),
    (b'{"text": "a", "x": {"\\ud83d": 1}}', "it holds half a surrogate pair"),
    (
        b'{"text": "' + b"x" * 1_100_000 + b'"}',
        "the line has more than 1049176 bytes; split it into documents or raise",
    ),
]


@pytest.mark.parametrize(("record", "reason"), BAD, ids=[reason[:40] for _, reason in BAD])
def test_a_bad_record_stops_the_reading_or_is_left_out(tmp_path: Path, record: object, reason: str) -> None:
    good, last = {"id": "good", "text": "a"}, {"id": "last", "text": "b"}
    path = write(tmp_path / "c.jsonl", good, b"", record, last)
    stream = read_documents([str(path)], ReadOptions(max_document_chars=100))
    assert isinstance(next(stream), Document)
    with pytest.raises(CorpusError) as caught:
        next(stream)
    assert str(caught.value).startswith(f"{path}:3: {reason}")
    assert str(caught.value).endswith(ADVICE)
    first, reject, second = read(path, max_document_chars=100, on_error="skip")
    assert isinstance(reject, Reject)
    assert (reject.file, reject.line) == (str(path), 3)
    assert reject.reason.startswith(reason)
    assert [item.key for item in (first, second) if isinstance(item, Document)] == ["c:good", "c:last"]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"caf\xe9", "it is not valid UTF-8 (byte 0xe9 at position 3)"),
        ("a.txt", b"", "the text is empty"),
        ("a.txt", b"x" * 1_100_000, "it has more than 1049176 bytes; split it or raise --max-document-chars"),
        ("a.html", b"<p>a\0b", "it holds a NUL character"),
        ("a.html", b"<p>caf\xe9", "it is not valid UTF-8 (byte 0xe9 at position 6)"),
        ("a.html", b"<nav>only</nav>", "the text is empty"),
        ("a.html", b"<![x]>", "its HTML cannot be read"),
        ("a.md", b"---\ntitle: only\n---\n", "the text is empty"),
    ],
)
def test_a_bad_file_of_a_folder_is_left_out_whole(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    write(tmp_path / "c" / "z.txt", b"words")
    (tmp_path / "c" / name).write_bytes(data)
    assert error_of(tmp_path / "c", max_document_chars=100).startswith(f"{tmp_path}/c/{name}: {reason}")
    reject, document = read(tmp_path / "c", max_document_chars=100, on_error="skip")
    assert isinstance(reject, Reject)
    assert isinstance(document, Document)
    assert (reject.file, reject.line, document.key) == (f"{tmp_path}/c/{name}", 0, "c:z.txt")


# Streaming and limits


def test_the_limit_counts_documents_over_all_corpora_and_nothing_more_is_read(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", b"bad", {"text": "a"})
    two = write(tmp_path / "b.jsonl", {"text": "b"}, b"bad", {"text": "c"})
    found = read(one, two, limit=2, on_error="skip")
    assert [item.key if isinstance(item, Document) else item.line for item in found] == [1, "a:2", "b:1"]
    assert len(documents(two, limit=1)) == 1


def test_a_corpus_without_documents_is_an_error_that_counts_the_rejects(tmp_path: Path) -> None:
    full, empty = write(tmp_path / "full.jsonl", {"text": "a"}), write(tmp_path / "c.jsonl", {"a": 1}, {"a": 2})
    message = error_of(full, empty, on_error="skip")
    assert message.startswith(f"{empty} holds no documents (2 records were rejected); check")
    assert "holds no documents (0 records were rejected)" in error_of(write(tmp_path / "e.jsonl", b""))


def test_documents_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", *[{"text": "x" * 1000, "n": n} for n in range(6_000)])
    tracemalloc.start()
    stream = read_documents([str(path)], ReadOptions())
    assert sum(1 for _ in stream) == 6_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"max_document_chars": 0}, "max_document_chars is 0"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; use 'stop' or 'skip'"),
        ({"text_field": "id"}, "need three different names"),
        ({"title_field": "url"}, "need three different names"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReadOptions(**options)


def test_the_module_loads_no_heavy_package() -> None:
    code = "import sys, index_builder.corpus; print({'datasets', 'bs4', 'zstandard', 'torch'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


# Descriptions


def test_a_description_changes_with_the_content_of_files_and_not_with_their_place_or_time(tmp_path: Path) -> None:
    path = write(tmp_path / "c" / "a" / "x.jsonl", {"text": "a"})
    (tmp_path / "c" / "skipped.png").write_bytes(b"")
    before = describe_corpora([f"n={tmp_path}/c", str(path)])
    info = {"bytes": 14, "sha256": hashlib.sha256(b'{"text": "a"}\n').hexdigest()}
    assert before == [
        {"name": "n", "kind": "folder", "files": [{"path": "a/x.jsonl", **info}]},
        {"name": "x", "kind": "jsonl", "files": [{"path": "x.jsonl", **info}]},
    ]
    assert json.loads(json.dumps(before)) == before
    os.utime(path, ns=(0, 0))
    (tmp_path / "c").rename(tmp_path / "moved")
    corpora = [f"n={tmp_path}/moved", str(tmp_path / "moved" / "a" / "x.jsonl")]
    assert describe_corpora(corpora) == before
    write(tmp_path / "moved" / "a" / "x.jsonl", {"text": "b"})
    assert describe_corpora(corpora) != before


def test_a_description_goes_by_the_time_of_a_file_too_large_to_read(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    for size, known_by in ((64 * 2**20, "sha256"), (64 * 2**20 + 1, "mtime_ns")):
        with path.open("wb") as file:
            file.truncate(size)
        os.utime(path, ns=(0, 7))
        [described] = describe_corpora([str(path)])
        assert set(described["files"][0]) == {"path", "bytes", known_by}
    assert described["files"] == [{"path": "c.txt", "bytes": 64 * 2**20 + 1, "mtime_ns": 7}]


@pytest.mark.parametrize(
    ("spec", "name", "parts"),
    [
        ("hf:name:train", "name", ("name", None, None)),
        ("hf:org/name:train", "name", ("org/name", None, None)),
        ("hf:org/name/config:train", "name", ("org/name", None, "config")),
        ("hf:name@rev:train", "name", ("name", "rev", None)),
        ("hf:name@rev/config:train", "name", ("name", "rev", "config")),
        ("hf:org/name@rev/20231101.en:train", "name", ("org/name", "rev", "20231101.en")),
        ("X=hf:org/name@rev:train", "X", ("org/name", "rev", None)),
    ],
)
def test_a_dataset_of_the_hub_is_written_with_name_revision_configuration_and_split(
    spec: str, name: str, parts: tuple[str | None, ...]
) -> None:
    [described] = describe_corpora([spec])
    assert (described["name"], described["kind"], described["files"]) == (name, "hf", [])
    assert tuple(described[part] for part in ("dataset", "revision", "config")) == parts
    assert described["split"] == "train"


# Datasets


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, texts in {"train": ["a", "b"], "test": ["c"]}.items():
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        table = pa.table({"text": texts, "year": [1999] * len(texts)})
        pq.write_table(table, tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    with contextlib.chdir(tmp_path):
        yield tmp_path / "set"


def test_a_dataset_on_disk_is_streamed(dataset: Path) -> None:
    found = documents("hf:./set:train", f"t=hf:{dataset}:test")
    assert [(item.key, item.text, item.metadata, item.source) for item in found] == [
        ("set:1", "a", '{"year":1999}', "hf:./set:train:1"),
        ("set:2", "b", '{"year":1999}', "hf:./set:train:2"),
        ("t:1", "c", '{"year":1999}', f"hf:{dataset}:test:1"),
    ]


def test_a_dataset_on_disk_is_described_by_its_files(dataset: Path) -> None:
    [described] = describe_corpora(["hf:./set:train"])
    with contextlib.chdir(dataset):
        assert describe_corpora(["hf:.:train"]) == [described]
    parts = {"dataset": None, "revision": None, "config": None, "split": "train"}
    assert described == {"name": "set", "kind": "hf", "files": described["files"], **parts}
    assert [file["path"] for file in described["files"]] == [
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00001.parquet",
    ]


def test_a_bad_row_of_a_dataset_is_named(dataset: Path) -> None:
    assert error_of("hf:./set:train", text_field="body").startswith("hf:./set:train:1: it has no field 'body'")


def test_a_split_that_a_dataset_does_not_have_is_an_error(dataset: Path) -> None:
    message = error_of("hf:./set:dev", on_error="skip")
    assert message.startswith("hf:./set:dev cannot be read (ValueError: ")
    assert message.endswith("check the name, the configuration, the split and the connection")
