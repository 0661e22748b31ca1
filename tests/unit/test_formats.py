"""The records of one file: every format, every way in which a file can be bad, and bounded memory."""

import gzip
import io
import lzma
import os
import socket
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from index_builder.formats import File, Record, parse_filename, records
from retro.errors import CorpusError, DependencyError

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


# PDF, DOCX, PPTX


def pdf(*pages: str, encrypted: bool = False) -> bytes:
    """A PDF with a line of text on each page, in Helvetica."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(count))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {count} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for i, page in enumerate(pages):
        content = b"BT /F1 12 Tf 72 700 Td (" + page.encode("cp1252") + b") Tj ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents {5 + 2 * i} 0 R"
            " /Resources << /Font << /F1 3 0 R >> >> >>".encode(),
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        ]
    data, starts = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        starts.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % start for start in starts)
    # Keys that do not belong to the empty password.
    lock = b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >> /ID [<00> <00>]" % (
        b"41" * 32,
        b"42" * 32,
    )
    trailer = b"<< /Size %d /Root 1 0 R %s >>" % (len(objects) + 1, lock if encrypted else b"")
    end = b"xref\n0 %d\n0000000000 65535 f \n%strailer\n%s\nstartxref\n%d\n%%%%EOF\n"
    return data + end % (len(objects) + 1, table, trailer, len(data))


WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def docx(*paragraphs: str, body: str = "", links: str = "") -> bytes:
    """A DOCX; a paragraph that begins with # is a heading. `body` and `links` are put in as XML."""
    xml = ""
    for paragraph in paragraphs:
        style = '<w:pPr><w:pStyle w:val="Heading1"/></w:pPr>' if paragraph.startswith("# ") else ""
        xml += f"<w:p>{style}<w:r><w:t>{paragraph.removeprefix('# ')}</w:t></w:r></w:p>"
    main = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    files = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{main}"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" '
        f'Type="{OFFICE}/officeDocument" Target="word/document.xml"/></Relationships>',
        "word/_rels/document.xml.rels": f'<Relationships xmlns="{PACKAGE}/relationships">'
        f'<Relationship Id="s1" Type="{OFFICE}/styles" Target="styles.xml"/>{links}</Relationships>',
        "word/styles.xml": f'<w:styles xmlns:w="{WORD}"><w:style w:type="paragraph" w:styleId="Heading1">'
        '<w:name w:val="heading 1"/></w:style></w:styles>',
        "word/document.xml": f'<w:document xmlns:w="{WORD}" xmlns:r="{OFFICE}"><w:body>{xml}{body}</w:body></w:document>',
    }
    return archive({name: f'<?xml version="1.0" encoding="UTF-8"?>{content}' for name, content in files.items()})


def archive(files: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return stream.getvalue()


def pptx(*slides: tuple[str, str], picture: bytes = b"", description: str = "") -> bytes:
    """A PPTX of slides with a title and a text; the last one with a picture and with notes."""
    import pptx as library
    from pptx.util import Inches

    presentation = library.Presentation()
    for title, text in slides:
        slide = presentation.slides.add_slide(presentation.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = text
    if picture:
        shape = slide.shapes.add_picture(io.BytesIO(picture), Inches(1), Inches(6))
        shape._element._nvXxPr.cNvPr.set("descr", description)
        slide.notes_slide.notes_text_frame.text = "what to say"
    stream = io.BytesIO()
    presentation.save(stream)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def png() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (2, 2)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_pages_of_a_pdf_are_one_text_with_the_name_as_title(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"My report.PDF{compression}"
    path.write_bytes(COMPRESS[compression](pdf("Caf\xe9 prices \u2013 10 \u20ac", "# second page: snake_case *")))
    assert one_record(path) == {
        "text": "Caf\xe9 prices \u2013 10 \u20ac\n\n# second page: snake_case *",
        "title": "My report",
    }


def test_any_script_is_read_from_a_pdf(tmp_path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"pdf.fonttype": 42, "font.family": "DejaVu Sans"}):
        from matplotlib.figure import Figure

        figure = Figure()
        figure.text(0.1, 0.5, "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1 \u041c\u043e\u0441\u043a\u0432\u0430 \u017e")
        figure.savefig(tmp_path / "a.pdf")
    text = one_record(tmp_path / "a.pdf")["text"]
    assert text == "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1 \u041c\u043e\u0441\u043a\u0432\u0430 \u017e"


def test_a_docx_is_markdown_with_its_first_heading_as_title(tmp_path: Path) -> None:
    table = "".join(
        f"<w:tr>{''.join(f'<w:tc><w:p><w:r><w:t>{cell}</w:t></w:r></w:p></w:tc>' for cell in row)}</w:tr>"
        for row in (("year", "price"), ("1973", "3 \u20ac"))
    )
    path = tmp_path / "a.docx"
    path.write_bytes(docx("before", "# \u6cb9\u4ef7", "snake_case * star", body=f"<w:tbl>{table}</w:tbl>"))
    fields = one_record(path)
    assert fields["title"] == "\u6cb9\u4ef7"
    head, _, rows = fields["text"].partition("\n\n| ")
    assert head == "before\n\n# \u6cb9\u4ef7\n\nsnake_case * star"
    cells = [cell.strip(" \n-") for cell in rows.split("|")]
    assert [cell for cell in cells if cell] == ["year", "price", "1973", "3 \u20ac"]
    path.write_bytes(docx("no heading"))
    assert one_record(path) == {"text": "no heading", "title": "a"}


def test_pictures_that_lie_elsewhere_are_not_fetched(tmp_path: Path) -> None:
    drawing = "http://schemas.openxmlformats.org/drawingml/2006"
    body = (
        f'<w:p><w:r><w:drawing><wp:inline xmlns:wp="{drawing}/wordprocessingDrawing"><wp:docPr id="1" descr="a well"/>'
        f'<a:graphic xmlns:a="{drawing}/main"><a:graphicData><pic:pic xmlns:pic="{drawing}/picture"><pic:blipFill>'
        '<a:blip r:link="p1"/></pic:blipFill></pic:pic></a:graphicData></a:graphic></wp:inline></w:drawing></w:r></w:p>'
    )
    (tmp_path / "secret.png").write_bytes(png())
    for target in ("http://example.com/a.png", f"file://{tmp_path}/secret.png", f"{tmp_path}/secret.png"):
        link = f'<Relationship Id="p1" Type="{OFFICE}/image" Target="{target}" TargetMode="External"/>'
        (tmp_path / "a.docx").write_bytes(docx("words", body=body, links=link))
        assert one_record(tmp_path / "a.docx")["text"] == "words"


def test_a_pptx_is_the_text_of_its_slides(tmp_path: Path) -> None:
    path = tmp_path / "a.pptx"
    slides = [("Oil_prices", "rose in 1973"), ("\u6cb9", "\u0141\xf3d\u017a *")]
    path.write_bytes(pptx(*slides, picture=png(), description="a well"))
    assert one_record(path) == {
        "text": "# Oil_prices\nrose in 1973\n\n# \u6cb9\n\u0141\xf3d\u017a *\n\na well\n\n### Notes:\nwhat to say",
        "title": "Oil_prices",
    }
    path.write_bytes(pptx(("", "words"), picture=png()))
    assert one_record(path) == {"text": "words\n\n### Notes:\nwhat to say", "title": "a"}


OLD = "it is protected by a password or of an old format; save it as .{} without a password"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.pdf", pdf("words", encrypted=True), "it is protected by a password; save it without one"),
        ("a.pdf", pdf("words" * 400)[:-1100], "it is truncated or no PDF; copy or download it again"),
        ("a.pdf", b"mail" + pdf("words")[4:], "it is truncated or no PDF; copy or download it again"),
        ("a.pdf", b"plain words", "it is truncated or no PDF; copy or download it again"),
        ("a.pdf", b"", "it is truncated or no PDF; copy or download it again"),
        ("a.pdf", b"%PDF-1.4\nrubbish\n%%EOF", "it is damaged or no .pdf ("),
        ("a.pdf", pdf(""), "it holds no text; if its pages are pictures, have their text recognized first"),
        ("a.docx", docx(), "it holds no text; if its pages are pictures, have their text recognized first"),
        ("a.docx", docx("words")[:-30], "it is truncated, damaged or no .docx ("),
        ("a.docx", archive({"words.txt": "words"}), "it is damaged or no .docx ("),
        ("a.docx", b"plain words", "it is truncated, damaged or no .docx ("),
        ("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), OLD.format("docx")),
        ("a.pptx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), OLD.format("pptx")),
        ("a.pptx", docx("words"), "it is damaged or no .pptx ("),
        ("a.pptx", b"", "it is truncated, damaged or no .pptx ("),
    ],
)
def test_a_document_that_cannot_be_read_says_why(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    [(line, said)] = read(tmp_path / name)
    assert line == 0
    assert isinstance(said, str)
    assert said == reason if reason[-1] != "(" else said.startswith(reason)
    assert "\n" not in said


def test_a_byte_that_was_changed_is_no_text(tmp_path: Path) -> None:
    data = docx("words " * 50)
    at = data.index(b"word/document.xml") + 60
    (tmp_path / "a.docx").write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    [(_, said)] = read(tmp_path / "a.docx")
    assert str(said).startswith("it is damaged or no .docx (")


@pytest.mark.parametrize("package", ["markitdown", "markitdown.converters"])
def test_a_document_names_the_extra_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    (tmp_path / "a.docx").write_bytes(docx("words"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError) as caught:
        read(tmp_path / "a.docx")
    assert str(caught.value) == (f"{tmp_path}/a.docx takes markitdown, which is missing: install retro-lm[docs]")


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


@pytest.mark.parametrize("name", ["a.pdf", "a.docx"])
def test_a_document_over_the_limit_is_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pdf("words" * 500) if name == "a.pdf" else docx("words"))
    size = len(path.read_bytes())
    assert read(path, max_bytes=size - 1) == [
        (0, f"it has more than {size - 1} bytes; split it or raise --max-document-chars")
    ]


def test_a_small_document_that_expands_to_much_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.docx"
    path.write_bytes(docx("x" * 2**25))
    assert len(path.read_bytes()) < 2**17
    tracemalloc.start()
    assert read(path) == [(0, "it has more than 1048576 bytes unpacked; split it or raise --max-document-chars")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
