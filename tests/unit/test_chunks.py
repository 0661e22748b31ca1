"""Chunks of texts, the chunk store, and documents on the grid of a model: compared with naive constructions from the texts."""

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro.chunks import (
    ChunkStore,
    Document,
    TokenizedDocument,
    chunk_spans,
    load_array,
    name_hash,
    save_array,
    write_documents,
)
from retro.errors import FormatError, StorageError
from retro.tokenizer import Tokenizer

BYTES = Tokenizer.train(["any text"], 258)
"""A token for each byte, so that borders can be counted by hand."""

wide_text = st.text(alphabet=st.sampled_from("ab cé日🙂\u0301\n"), max_size=40)


def naive_chunks(text: str, chunk_len: int) -> list[tuple[int, int]]:
    """First and end character of each chunk, byte by byte."""
    characters = [number for number, character in enumerate(text) for _ in character.encode()]
    chunks = [characters[start : start + chunk_len] for start in range(0, len(characters), chunk_len)]
    return [(chunk[0], chunk[-1] + 1) for chunk in chunks]


def document(key: str, text: str, group: str | None = None) -> Document:
    return Document(
        key=key,
        text=text,
        title=f"Title of {key}",
        url=f"https://example.org/{key}",
        group=group or key,
        split="",
        metadata='{"lang":"en"}',
        content_hash="00",
        source="",
    )


@given(wide_text, st.integers(1, 9))
def test_chunk_spans_are_those_of_a_naive_loop(text: str, chunk_len: int) -> None:
    spans = chunk_spans(BYTES.encode(text), chunk_len)
    assert spans.dtype == np.int64
    assert [tuple(span) for span in spans.tolist()] == naive_chunks(text, chunk_len)


def test_the_last_chunk_may_be_short_and_a_split_character_is_in_both() -> None:
    # Bytes: a | é é | b c, in chunks of two: "a" and half of "é", the other half and "b", "c".
    assert chunk_spans(BYTES.encode("aébc"), 2).tolist() == [[0, 2], [1, 3], [3, 4]]
    assert chunk_spans(BYTES.encode(""), 2).tolist() == []


# The store


class Made(NamedTuple):
    store: ChunkStore
    documents: list[Document]
    rows: list[tuple[int, int, int]]
    """Document, first and end character of each."""


def make_store(folder: Path, shards: list[list[Document]], chunk_len: int) -> Made:
    rows: list[tuple[int, int, int]] = []
    documents: list[Document] = []
    for number, shard in enumerate(shards):
        spans = [naive_chunks(entry.text, chunk_len) for entry in shard]
        rows += [(len(documents) + i, first, end) for i, here in enumerate(spans) for first, end in here]
        documents += shard
        write_documents(folder, number, shard, [np.array(here, np.int64).reshape(-1, 2) for here in spans])
    return Made(ChunkStore(folder), documents, rows)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Three shards, chunks of four bytes; a document of one chunk, of several, and one that fills its last chunk."""
    shards = [
        [document("a:1", "one two three"), document("a:2", "x")],
        [document("a:3", "日本語 text", group="shared")],
        [document("b:1", "12345678", group="shared"), document("b:2", "the end")],
    ]
    return make_store(tmp_path, shards, 4)


def test_every_row_is_the_chunk_with_its_continuation_in_the_same_document(made: Made) -> None:
    assert made.store.num_chunks == len(made.rows)
    for row, (number, first, end) in enumerate(made.rows):
        entry = made.documents[number]
        continuation = ""
        if row + 1 < len(made.rows) and made.rows[row + 1][0] == number:
            continuation = entry.text[end : made.rows[row + 1][2]]
        passage = made.store.passage(row, score=0.5)
        assert (passage.text, passage.continuation) == (entry.text[first:end], continuation)
        assert passage.full_text == passage.text + continuation
        assert (passage.row, passage.score) == (row, 0.5)
        assert (passage.key, passage.title, passage.url) == (entry.key, entry.title, entry.url)
        assert passage.metadata == entry.metadata


def test_the_last_chunk_of_a_document_has_no_continuation(made: Made) -> None:
    ends = [row for row, (a, b) in enumerate(itertools.pairwise([*made.rows, (-1, 0, 0)])) if a[0] != b[0]]
    assert [made.store.passage(row).continuation for row in ends] == [""] * 5
    assert [made.store.passage(row).text for row in ends] == ["e", "x", "xt", "5678", "end"]


def test_a_continuation_ends_with_the_document_also_where_its_tokens_end_earlier(tmp_path: Path) -> None:
    # As with a tokenizer that drops white space: the last chunk of the first document ends before the text does.
    documents = [document("a:1", "one two   \n"), document("a:2", "a longer text")]
    write_documents(tmp_path, 0, documents, [np.array([[0, 3], [4, 7]]), np.array([[0, 13]])])
    store = ChunkStore(tmp_path)
    assert [store.passage(row).continuation for row in range(3)] == [" two", "", ""]


def test_a_missing_neighbor_is_not_the_last_row(made: Made) -> None:
    for row in (-1, -2, len(made.rows), 10**12):
        with pytest.raises(IndexError, match=rf"row {row} is not in \[0, {len(made.rows)}\)"):
            made.store.passage(row)


def test_the_store_counts_over_all_shards(made: Made) -> None:
    assert (len(made.store.shards), made.store.num_documents, made.store.num_chunks) == (3, 5, len(made.rows))
    assert list(made.store.numbered_keys()) == [(0, "a:1"), (1, "a:2"), (2, "a:3"), (3, "b:1"), (4, "b:2")]


def test_documents_are_found_by_key_and_their_rows_by_document(made: Made) -> None:
    for number, entry in enumerate(made.documents):
        assert made.store.find(entry.key) == number
        assert made.store.field("content_hash", number) == entry.content_hash
        expected = [row for row, (owner, _, _) in enumerate(made.rows) if owner == number]
        assert made.store.rows_of(np.array([number])).tolist() == expected
    assert made.store.find("a:4") is None
    assert made.store.rows_of(np.array([4, 0])).tolist() == [r for r, (n, _, _) in enumerate(made.rows) if n in (0, 4)]
    assert made.store.rows_of(np.empty(0, np.int64)).tolist() == []


def test_a_removed_document_is_not_found_and_the_others_keep_their_rows(made: Made) -> None:
    dead = made.store.rows_of(np.array([1, 3]))
    store = ChunkStore(made.store.folder, made.store.shards, dead)
    assert [key for _, key in store.numbered_keys()] == ["a:1", "a:3", "b:2"]
    assert store.find("a:2") is store.find("b:1") is None
    assert store.find("b:2") == 4
    assert store.dead_documents.tolist() == [1, 3]
    assert store.dead_N is not None
    assert np.flatnonzero(store.dead_N).tolist() == dead.tolist()
    live_rows = np.flatnonzero(~store.dead_N)
    assert store.live_rows(np.arange(store.num_live_chunks)).tolist() == live_rows.tolist()
    assert store.num_live_chunks == len(made.rows) - len(dead)
    assert store.passage(len(made.rows) - 1).key == "b:2"
    live = [(entry.key, spans.tolist(), first) for entry, spans, first in store.live_documents()]
    assert [key for key, _, _ in live] == ["a:1", "a:3", "b:2"]
    for key, spans, first in live:
        number = store.find(key)
        assert spans == [[a, b] for n, a, b in made.rows if n == number]
        assert made.rows[first][0] == number


def test_a_document_that_was_removed_and_added_again_is_the_new_one(tmp_path: Path) -> None:
    first, second = document("a:1", "old"), document("a:1", "new text")
    made = make_store(tmp_path, [[first], [second]], 4)
    store = ChunkStore(tmp_path, made.store.shards, np.array([0]))
    assert store.find("a:1") == 1
    assert list(store.numbered_keys()) == [(1, "a:1")]


def test_only_the_shards_that_are_named_are_read_in_their_order(made: Made) -> None:
    store = ChunkStore(made.store.folder, ["00002", "00000"])
    assert [key for _, key in store.numbered_keys()] == ["b:1", "b:2", "a:1", "a:2"]
    assert store.passage(0).key == "b:1"
    with pytest.raises(FormatError, match=r"00007\.arrow is missing"):
        ChunkStore(made.store.folder, ["00000", "00007"])


def test_removed_rows_beyond_the_end_are_refused(made: Made) -> None:
    with pytest.raises(FormatError, match=f"lists row {len(made.rows)} as removed"):
        ChunkStore(made.store.folder, made.store.shards, np.array([0, len(made.rows)]))


def test_shards_give_their_documents_back(made: Made) -> None:
    entries = [entry for shard in range(3) for entry in made.store.shard_documents(shard)]
    for (entry, spans), expected in zip(entries, made.documents, strict=True):
        assert dataclasses.replace(entry, source=expected.source) == expected
        assert spans.tolist() == [list(span) for span in naive_chunks(expected.text, 4)]


def test_documents_and_groups_of_rows_keep_the_shape_of_the_rows(made: Made) -> None:
    N = len(made.rows)
    rows_N2 = np.stack([np.arange(N), np.arange(N)[::-1]], axis=1)
    expected = [[made.rows[a][0], made.rows[b][0]] for a, b in rows_N2.tolist()]
    assert made.store.documents_of(rows_N2).tolist() == expected
    groups = [[name_hash(made.documents[number].group) for number in pair] for pair in expected]
    assert made.store.groups(rows_N2).tolist() == groups
    assert made.store.groups(rows_N2).dtype == np.uint64


def test_the_texts_of_a_shard_are_those_of_its_rows(made: Made) -> None:
    texts = [text for shard in range(3) for text in made.store.shard_texts(shard)]
    assert texts == [
        (made.documents[number].title, made.documents[number].text[first:end]) for number, first, end in made.rows
    ]


def test_group_hashes_are_64_bits_and_the_same_on_every_machine() -> None:
    # BLAKE2b with a digest of 8 bytes, read as a little-endian number (by b2sum -l 64).
    assert name_hash("a:1") == int.from_bytes(bytes.fromhex("2c5727565db22c89"), "little")
    assert name_hash("é") == int.from_bytes(bytes.fromhex("cb1abf8beff3192f"), "little")


@settings(max_examples=25)  # every example writes files
@given(st.lists(st.lists(wide_text.filter(bool), min_size=1, max_size=3), min_size=1, max_size=4), st.integers(1, 6))
def test_any_store_gives_the_passages_of_its_texts(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]], chunk_len: int
) -> None:
    numbers = itertools.count()
    shards = [[document(f"c:{next(numbers)}", text) for text in shard] for shard in texts]
    store = make_store(tmp_path_factory.mktemp("store"), shards, chunk_len).store
    row = 0
    for entry in itertools.chain.from_iterable(shards):
        spans = naive_chunks(entry.text, chunk_len)
        for (first, end), following in itertools.zip_longest(spans, spans[1:]):
            passage = store.passage(row)
            assert passage.key == entry.key
            assert passage.text == entry.text[first:end]
            assert passage.continuation == (entry.text[end : following[1]] if following else "")
            row += 1
    assert row == store.num_chunks


def test_an_empty_folder_is_an_empty_store(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path)
    assert (store.shards, store.num_documents, store.num_chunks, store.find("a:1")) == ([], 0, 0, None)
    assert store.groups(np.empty((0, 2), np.int64)).shape == (0, 2)
    with pytest.raises(IndexError, match="row 0"):
        store.passage(0)


def test_rows_are_64_bits_wide(made: Made) -> None:
    assert made.store.documents_of(np.array([0], np.int64)).dtype == np.int64
    assert load_array(made.store.folder / "chunks" / "00000.npy").dtype == np.int64


@pytest.mark.parametrize("damage", ["truncated", "empty", "rubbish"])
def test_a_damaged_shard_of_documents_is_refused(made: Made, damage: str) -> None:
    path = made.store.folder / "documents" / "00001.arrow"
    content = path.read_bytes()
    path.unlink()  # the open store keeps its memory map
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "rubbish": b"x" * 500}[damage])
    with pytest.raises(FormatError, match=r"00001\.arrow is damaged"):
        ChunkStore(made.store.folder)


def test_a_missing_shard_of_chunks_is_refused(made: Made) -> None:
    (made.store.folder / "chunks" / "00001.npy").unlink()
    with pytest.raises(FormatError, match=r"00001\.npy is missing"):
        ChunkStore(made.store.folder)


@pytest.mark.parametrize("damage", [slice(0, 100), slice(0, 0), slice(0, -1), slice(5, None)])
def test_a_damaged_array_is_refused(tmp_path: Path, damage: slice) -> None:
    path = tmp_path / "x.npy"
    save_array(path, np.arange(100))
    path.write_bytes(path.read_bytes()[damage])
    with pytest.raises(FormatError, match=r"x\.npy is damaged"):
        load_array(path)


def test_an_array_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match=r"x\.npy is damaged"):
        load_array(tmp_path / "x.npy")


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (5, 3)])
def test_arrays_of_any_shape_are_loaded_as_they_were_saved(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    save_array(tmp_path / "x.npy", array)
    loaded = load_array(tmp_path / "x.npy")
    assert (loaded.dtype, loaded.shape) == (array.dtype, shape)
    np.testing.assert_array_equal(loaded, array)


def test_the_documents_are_plain_arrow(made: Made) -> None:
    with pa.ipc.open_file(str(made.store.folder / "documents" / "00001.arrow")) as reader:
        [row] = reader.read_all().to_pylist()
    expected = {name: getattr(made.documents[2], name) for name in ("key", "title", "url", "group", "split", "text")}
    assert {name: row[name] for name in expected} == expected
    assert row["group_hash"] == name_hash("shared")


Limit = Callable[[int], AbstractContextManager[None]]


def test_arrays_and_documents_that_do_not_fit_on_the_disk_leave_nothing_behind(
    tmp_path: Path, file_limit: Limit
) -> None:
    large = document("a:1", "x" * 100_000)
    with pytest.raises(StorageError, match="the disk is full"), file_limit(10_000):
        save_array(tmp_path / "x.npy", np.zeros(10_000))
    with pytest.raises(StorageError, match="the disk is full"), file_limit(10_000):
        write_documents(tmp_path, 0, [large], [np.array([[0, 100_000]])])
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"00000.npy"}


# On the grid of a model


@given(wide_text, st.integers(2, 7), st.data())
def test_queries_are_the_texts_of_the_finished_chunks_of_the_grid(text: str, M: int, data: st.DataObject) -> None:
    lead = data.draw(st.integers(0, M - 1))
    made = TokenizedDocument.make(text, BYTES, M, lead=lead, split=2)
    # Slots: None before the text and for BOS, then the character that each byte belongs to.
    slots = [None] * (lead + 1) + [number for number, character in enumerate(text) for _ in character.encode()]
    expected = []
    for u in range(len(slots) // M):
        there = [slot for slot in slots[u * M : (u + 1) * M] if slot is not None]
        expected.append(text[there[0] : there[-1] + 1] if there else "")
    assert made.queries == expected
    assert made.ids.tolist() == [BYTES.bos_id, *BYTES.encode(text).ids.tolist()]
    assert (made.lead, made.split, made.num_bytes) == (lead, 2, len(text.encode()))


@pytest.mark.parametrize(
    ("text", "lead", "queries"),
    [
        # Chunks of four slots; # is an empty slot, ^ is BOS.
        ("abc", 0, ["abc"]),  # ^abc
        ("ab", 0, []),  # ^ab : a partial chunk never retrieves
        ("abcdefg", 0, ["abc", "defg"]),  # ^abc defg
        ("abcdefgh", 0, ["abc", "defg"]),  # ^abc defg h
        ("abcde", 2, ["a", "bcde"]),  # ##^a bcde
        ("abcd", 3, ["", "abcd"]),  # ###^ abcd : nothing to ask for in the first
        ("", 3, [""]),  # ###^
        ("", 0, []),  # ^
        ("aébc", 0, ["aé"]),  # ^aéé bc
        ("ab日c.", 0, ["ab日", "日c."]),  # ^ab日 日日c. : the character is split, and belongs to both
        ("日日", 1, ["日", "日日"]),  # #^日日 日日日日
    ],
)
def test_queries_of_small_cases_by_hand(text: str, lead: int, queries: list[str]) -> None:
    assert TokenizedDocument.make(text, BYTES, 4, lead=lead, split=0).queries == queries


def test_removing_documents_needs_no_table_of_all_rows(made: Made) -> None:
    # 8 bytes for each chunk of an index, which only a search has to hold.
    store = ChunkStore(made.store.folder, made.store.shards, made.store.rows_of(np.array([1, 3])))
    assert store.dead_documents.tolist() == [1, 3]
    assert store.rows_of(np.array([0])).tolist() == [row for row, (owner, _, _) in enumerate(made.rows) if owner == 0]
    assert not any("_document_of_row" in vars(opened) for opened in (made.store, store))
    assert store.documents_of(np.array([0])).tolist() == [0]
    assert "_document_of_row" in vars(store)
