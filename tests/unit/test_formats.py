"""The records of one file: every format, every way in which a file can be bad, and bounded memory."""

import gzip
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from index_builder.formats import File, Record, parse_filename, records
from retro.errors import CorpusError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}

# What may follow the last frame. A skippable frame of Zstandard has a header and four bytes here.
PADDING = {".gz": bytes(2000), ".xz": bytes(2000), ".zst": b"\x50\x2a\x4d\x18\x04\0\0\0abcd"}


def read(path: Path, max_bytes: int = 2**20) -> list[Record]:
    file = File(path, str(path), path.name, parse_filename(path.name)[1])
    return list(records(file, text_field="text", title_field="title", max_bytes=max_bytes))


def one_record(path: Path) -> dict[str, Any]:
    [(line, fields)] = read(path)
    assert line == 0
    assert isinstance(fields, dict), fields
    return fields


def error_of(path: Path) -> str:
    with pytest.raises(CorpusError) as caught:
        read(path)
    return str(caught.value)


# Rows


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL"])
def test_json_lines_are_read_in_every_compression(tmp_path: Path, suffix: str, compression: str) -> None:
    data = b'\xef\xbb\xbf{"text": "one\\u2028two"}\r\n\n{"text": "\xe2\x80\xa8three"}'
    path = tmp_path / f"wiki{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](data))
    assert read(path) == [(1, {"text": "one\u2028two"}), (3, {"text": "\u2028three"})]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".tsv", "\t")])
def test_tables_as_text_are_read_in_every_compression(tmp_path: Path, suffix: str, mark: str, compression: str) -> None:
    rows = [["id", "text", "year"], ["7", '"two\r\nlines, a\ttab and ""quotes"""', "1999"], [], ["8", "short row"]]
    data = b"\xef\xbb\xbf" + "\r\n".join(mark.join(row) for row in rows).encode()
    path = tmp_path / f"table{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](data))
    assert read(path) == [
        (2, {"id": "7", "text": 'two\r\nlines, a\ttab and "quotes"', "year": "1999"}),
        (5, {"id": "8", "text": "short row"}),
    ]


def test_a_long_field_of_a_table_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"text\n{'x' * 300_000}\n")
    assert read(tmp_path / "t.csv") == [(2, {"text": "x" * 300_000})]


def test_a_bad_row_of_a_table_is_named_by_its_first_line_and_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(
        b'id,text\n1,"two\nlines"\n2,"caf\xe9\n!"\n3,a,b\n4,"a"b\n5,' + b"x" * 1001 + b'\n6,good\n7,"open\nto the end\n'
    )
    assert read(path, max_bytes=1000) == [
        (2, {"id": "1", "text": "two\nlines"}),
        (4, "it is not valid UTF-8; save the file as UTF-8"),
        (6, "it has 3 fields, the first row has 2; put its text into quotes"),
        (7, "',' expected after '\"'; put fields with quotes into quotes, doubled inside"),
        (8, "the line has more than 1000 bytes; split it into documents or raise --max-document-chars"),
        (9, {"id": "6", "text": "good"}),
        (10, "unexpected end of data; put fields with quotes into quotes, doubled inside"),
    ]


def test_columns_without_usable_names_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,a,a\nx,1,2\n")
    assert error_of(tmp_path / "t.csv") == f"{tmp_path}/t.csv:1: columns of the same name, ['a']; rename them"
    (tmp_path / "t.csv").write_bytes(b"text,caf\xe9\nx,1\n")
    assert "t.csv:1: the names of the columns: it is not valid UTF-8" in error_of(tmp_path / "t.csv")


def test_a_text_of_parquet_that_is_not_utf8_costs_its_own_row_only(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    first, (line, reason), third = read(tmp_path / "t.parquet")
    assert (first, line, third) == ((1, {"text": "a"}), 2, (3, {"text": "c"}))
    assert "can't decode byte 0xff" in str(reason)


# Files that are one record


def test_plain_text_is_one_record_with_its_stem_as_title(tmp_path: Path) -> None:
    (tmp_path / "My notes.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfone\ntwo\n"))
    assert one_record(tmp_path / "My notes.txt.gz") == {"text": "one\ntwo\n", "title": "My notes"}


def test_a_file_that_is_one_record_calls_its_fields_as_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    file = File(tmp_path / "a.txt", "shown", "a.txt", "text")
    assert list(records(file, text_field="body", title_field="head", max_bytes=5)) == [
        (0, {"body": "words", "head": "a"})
    ]
    [(_, reason)] = records(file, text_field="body", title_field="head", max_bytes=4)
    assert reason == "it has more than 4 bytes; split it or raise --max-document-chars"


@pytest.mark.parametrize(
    ("markdown", "title", "text"),
    [
        ("# Of C# #\nwords", "Of C#", "# Of C# #\nwords"),
        ('---\ntags: [a]\ntitle: "Front"\n---\n# Head\n', "Front", "# Head\n"),
        ("---\r\ntags: [a]\r\n---\r\n# Head\r\n", "Head", "# Head\n"),
        ("```\n# a comment\n```\n# Head", "Head", "```\n# a comment\n```\n# Head"),
        ("---\na rule, not front matter\n\n---\n", "", "---\na rule, not front matter\n\n---\n"),
        ("## Two\n#hash", "", "## Two\n#hash"),
    ],
)
def test_markdown_has_a_title_and_loses_its_front_matter(tmp_path: Path, markdown: str, title: str, text: str) -> None:
    (tmp_path / "page.md").write_bytes(markdown.encode())
    fields = one_record(tmp_path / "page.md")
    assert (fields["title"], fields["text"]) == (title, text)


HTML = """<?xml version="1.0"?><!DOCTYPE html><html><head><title> The
title </title><style>x {}</style></head><body><header>Logo</header><nav>Menu <nav>more</nav></nav>
<h1>Head<b>ing</b></h1><p>One <i>wo</i>rd&nbsp;and
more<br>next &amp; last<!-- no --><script>bad()</script></p>
<ul><li>first<li>second</ul><table><tr><td>a</td><td>b</td></tr></table>
<pre>
def f():
    <span>return</span> 1
</pre><svg><title>no</title></svg><form>no</form><noscript>no</noscript>
<template>no</template><aside>no</aside>
tail<footer>no</footer></body></html>"""


def test_html_gives_paragraphs_without_the_furniture_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(HTML)
    fields = one_record(tmp_path / "page.html")
    assert fields["title"] == "The title"
    assert fields["text"].split("\n") == [
        "Heading",
        "One word and more",
        "next & last",
        "first",
        "second",
        "a b",
        "def f():",
        "    return 1",
        "tail",
    ]


def test_html_without_a_title_takes_its_first_heading(tmp_path: Path) -> None:
    (tmp_path / "page.htm").write_text("<header><h1>The <i>head</i></h1></header><svg><title>no</title></svg>words")
    fields = one_record(tmp_path / "page.htm")
    assert (fields["title"], fields["text"]) == ("The head", "words")


def test_html_may_declare_another_encoding_than_utf8(tmp_path: Path) -> None:
    (tmp_path / "old.html").write_bytes('<meta charset="iso-8859-1"><p>caf\xe9'.encode("latin-1"))
    assert one_record(tmp_path / "old.html")["text"] == "caf\xe9"
    (tmp_path / "bad.html").write_bytes('<meta charset="ascii"><p>caf\xe9'.encode("latin-1"))
    assert read(tmp_path / "bad.html") == [(0, "it is neither UTF-8 nor ascii, which it declares; save it as UTF-8")]


# Damaged files


@pytest.mark.parametrize("damage", ["empty", "truncated", "overwritten", "followed by something else"])
@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_damaged_compressed_file_is_an_error(tmp_path: Path, compression: str, damage: str) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % (number * 7919 % 100_003) for number in range(20_000))
    data = COMPRESS[compression](lines)
    middle = len(data) // 2
    path = tmp_path / f"c.jsonl{compression}"
    path.write_bytes(
        {
            "empty": b"",
            "truncated": data[:-3],
            "overwritten": data[:middle] + bytes(40) + data[middle + 40 :],
            "followed by something else": data + b"something else",
        }[damage]
    )
    message = error_of(path)
    assert message.startswith(f"{path} is truncated or damaged (")
    assert message.endswith("); copy or download it again")


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_several_compressed_streams_in_one_file_are_read_to_the_end(tmp_path: Path, compression: str) -> None:
    compress = COMPRESS[compression]
    path = tmp_path / f"c.jsonl{compression}"
    path.write_bytes(
        compress(b'{"text": "a"}\n{"te') + compress(b'xt": "b"}\n') + compress(b'{"text": "c"}') + PADDING[compression]
    )
    assert [fields for _, fields in read(path)] == [{"text": "a"}, {"text": "b"}, {"text": "c"}]


def test_a_damaged_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    path.write_bytes(path.read_bytes()[:-9])
    assert error_of(path).startswith(f"{path} is truncated or damaged (")


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    assert error_of(tmp_path / "c.jsonl.gz") == f"{tmp_path}/c.jsonl.gz does not exist; check the path"


# Memory


def test_a_line_over_the_limit_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with path.open("wb") as file:
        file.truncate(64 * 2**20)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"text": "a"}\n')
    tracemalloc.start()
    bad, good = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bad == (1, "the line has more than 1048576 bytes; split it into documents or raise --max-document-chars")
    assert good == (2, {"text": "a"})
    assert peak < 4 * 2**20


def test_a_small_compressed_file_that_expands_to_much_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes(COMPRESS[".zst"](bytes(128 * 2**20) + b'\n{"text": "a"}'))
    tracemalloc.start()
    assert len(read(path)) == 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20
