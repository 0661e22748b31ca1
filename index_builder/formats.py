"""The records of one file or dataset: this module alone knows file formats and compressions, and what damage looks like.

Formats go by suffix, in any case; all but Parquet may end in .gz, .xz or .zst as well:

    .jsonl .ndjson .json    one JSON object a line
    .csv .tsv .parquet      a record a row, in the first two with the names of the columns in the first row
    .txt .md .markdown .html .htm .pdf .docx .pptx    a record a file, with a text and a title

PDF, DOCX and PPTX become Markdown through `markitdown`, by its converters of these formats only: without network, plugins and
models. JSON Lines are read here and not through `datasets`, which can neither name the line of a record that is malformed
nor leave it out. Memory is bounded by the longest line or one-record file allowed. What the fields mean is up to
`index_builder.corpus`.
"""

import csv
import functools
import io
import json
import logging
import lzma
import operator
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from retro.errors import CorpusError, DependencyError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **{".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "text"},
    **dict.fromkeys((".md", ".markdown"), "markdown"),
    **dict.fromkeys((".html", ".htm"), "html"),
    **{".pdf": "pdf", ".docx": "docx", ".pptx": "pptx"},
}
COMPRESSIONS = (".gz", ".xz", ".zst")
NUL = "it holds a NUL character, so it is not plain text or was damaged; remove the character"

_BOM = b"\xef\xbb\xbf"
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n([\w-]+[ \t]*:.*?\n)(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title[ \t]*:[ \t]*([^\s>|].*)$", re.MULTILINE)
_HEADING = re.compile(r" {0,3}#[ \t]+(\S.*?)(?:[ \t]+#+)?[ \t]*")
_DROPPED = ["script", "style", "noscript", "template", "nav", "header", "footer", "aside", "form", "svg", "title"]
_BLOCK = re.compile(
    "^(address|article|blockquote|body|br|caption|center|d[dlt]|details|div|fieldset|fig(caption|ure)|h[1-6]|head|hr|html|"
    "legend|li|main|menu|[ou]l|p|section|summary|table|tbody|tfoot|thead|tr)$"
)

_CFB = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
"""Begins a document of Office that is encrypted, or of a format before 2007."""
_SLIDE = re.compile(r"<!-- Slide number: \d+ -->")
_PICTURE = re.compile(r"!\[([^\]\n]*)\]\(([^)\n]*)\)")

Record = tuple[int, dict[str, Any] | str]
"""Line, and the fields or the reason why there are none. Lines are 1-based; 0 where the file is one record."""


class RecordError(Exception):
    """Why a record cannot be used; reaches users as the reason of a reject or inside a CorpusError."""


class File(NamedTuple):
    """A file of a corpus."""

    path: Path
    shown: str
    """The path, for messages."""
    relative: str
    """The path within the corpus."""
    kind: str
    """A value of KINDS; empty for a file that only belongs to a dataset."""


def parse_filename(name: str) -> tuple[str, str]:
    """Stem without known suffixes, and format ("" when not known)."""
    path = PurePath(name)
    compressed = path.suffix.lower() in COMPRESSIONS
    path = PurePath(path.stem) if compressed else path
    kind = KINDS.get(path.suffix.lower(), "")
    return path.stem, "" if compressed and kind == "parquet" else kind


def records(file: File, *, text_field: str, title_field: str, max_bytes: int) -> Iterator[Record]:
    """Streams the records of a file; a bad one does not end the stream.

    Args:
        file: One of a known format.
        text_field: What to call the text of a file that is one record.
        title_field: What to call its title.
        max_bytes: Longest line or one-record file that is held in memory.

    Raises:
        CorpusError: The file cannot be read, is damaged or has a bad row of column names.
        DependencyError: It takes a package that is not installed.
    """
    if file.kind == "parquet":
        yield from enumerate(_parquet_rows(file), start=1)
        return
    try:
        with _open(file) as stream:
            if file.kind in ("jsonl", "csv", "tsv"):
                yield from _line_records(file, _Lines(stream, max_bytes))
                return
            try:
                text, title = _text_and_title(file, stream, max_bytes)
            except RecordError as error:
                yield 0, str(error)
            else:
                yield 0, {text_field: text, title_field: title}
    except OSError as error:
        raise_unreadable(error, file.path)


def dataset_rows(
    path: str, *, config: str | None, revision: str | None, split: str, shown: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams the rows, counted from 1, of a Hugging Face dataset: its name or folder; messages call it `shown`.

    Raises:
        CorpusError: It cannot be read.
    """
    import datasets
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(path, config, revision=revision, split=split, streaming=True)
        yield from enumerate(rows, start=1)
    except Exception as error:  # the library raises nearly everything
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise CorpusError(
            f"{shown} cannot be read ({reason}); check the name, the configuration, the split and the connection"
        ) from error


def json_type(value: object) -> str:
    """What JSON calls the type of a value, with its article."""
    names: dict[type, str] = {type(None): "null", bool: "a boolean", list: "an array", dict: "an object"}
    names |= {int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), f"of the type {type(value).__name__}")


def raise_unreadable(error: OSError | ValueError, path: Path | str = "") -> NoReturn:
    """Raises what the system says about a path as a CorpusError; without a path, about that of the error."""
    name = printable(path or getattr(error, "filename", ""))
    if isinstance(error, FileNotFoundError):
        raise CorpusError(f"{name} does not exist; check the path") from None
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    raise CorpusError(f"{name} cannot be read ({reason}); check the path, its permissions and the disk") from error


def printable(path: Path | str) -> str:
    """The path as text that can be printed: bytes of a name that are not UTF-8 are written out."""
    return str(path).encode(errors="backslashreplace").decode()


def _damaged(file: File, error: Exception | str) -> CorpusError:
    return CorpusError(f"{file.shown} is truncated or damaged ({_first_line(error)}); copy or download it again")


def _first_line(error: Exception | str) -> str:
    return str(error).partition("\n")[0]


# Rows


class _Lines:
    """Lines of a binary stream. One of more than `max_bytes` is passed over in pieces: an error, but not the end."""

    def __init__(self, stream: BinaryIO, max_bytes: int) -> None:
        self.number = 0
        self.max_bytes = max_bytes
        self._stream = stream

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> bytes:
        line = self._stream.readline(self.max_bytes + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > self.max_bytes:
            while line and not line.endswith(b"\n"):
                line = self._stream.readline(2**16)
            raise RecordError(
                f"the line has more than {self.max_bytes} bytes; split it into documents or raise --max-document-chars"
            )
        return line.removeprefix(_BOM) if self.number == 1 else line


def _line_records(file: File, lines: _Lines) -> Iterator[Record]:
    rows = map(_json_row, lines) if file.kind == "jsonl" else _csv_rows(file, lines)
    while True:
        line = lines.number + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except RecordError as error:
            yield line, str(error)
        except csv.Error as error:
            yield line, f"{error}; put fields with quotes into quotes, doubled inside"
        else:
            if row is not None:
                yield line, row


def _json_row(line: bytes) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        row = json.loads(_utf8(line))
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, character {error.pos}"
        raise RecordError(f"it is not valid JSON ({reason}); each line must be one JSON object") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in thousands of brackets
        raise RecordError(f"it is JSON that cannot be read ({error}); simplify the record") from None
    if not isinstance(row, dict):
        raise RecordError(f"it is {json_type(row)}; each line must be one JSON object")
    return row


def _csv_rows(file: File, lines: _Lines) -> Iterator[dict[str, Any] | None]:
    csv.field_size_limit(max(csv.field_size_limit(), min(lines.max_bytes, 2**31 - 1)))
    # Bytes that are not UTF-8 go through the parser as surrogates, so that one bad record does not cost the rest.
    text = map(operator.methodcaller("decode", errors="surrogateescape"), lines)
    # strict: without it, a quote that is never closed takes the rest of the file into one field.
    reader = csv.reader(text, delimiter="\t" if file.kind == "tsv" else ",", strict=True)
    try:
        header = next(filter(None, reader), [])
        _check_utf8(header)
    except (RecordError, csv.Error) as error:
        raise CorpusError(f"{file.shown}:{lines.number}: the names of the columns: {error}; correct them") from error
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise CorpusError(f"{file.shown}:{lines.number}: columns of the same name, {twice}; rename them")
    return map(functools.partial(_csv_row, header), reader)


def _csv_row(header: list[str], row: list[str]) -> dict[str, Any] | None:
    if not row:
        return None
    if len(row) > len(header):
        raise RecordError(f"it has {len(row)} fields, the first row has {len(header)}; put its text into quotes")
    _check_utf8(row)
    return dict(zip(header, row, strict=False))


def _check_utf8(fields: list[str]) -> None:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        raise RecordError("it is not valid UTF-8; save the file as UTF-8") from None


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RecordError(
            f"it is not valid UTF-8 (byte 0x{data[error.start]:02x} at position {error.start}); save the file as UTF-8"
        ) from None


def _parquet_rows(file: File) -> Iterator[dict[str, Any] | str]:
    try:
        with pq.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=128):
                try:
                    yield from batch.to_pylist()
                except ValueError:  # text that is not UTF-8, say; row by row, only those with such a value are lost
                    for index in range(batch.num_rows):
                        try:
                            yield from batch.slice(index, 1).to_pylist()
                        except ValueError as error:
                            yield f"a value cannot be read ({error}); correct it"
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


# Compression


def _open(file: File) -> BinaryIO:
    suffix = file.path.suffix.lower()
    new_frame: Callable[[], Any]
    errors: type[Exception]
    if suffix == ".gz":
        new_frame, errors = functools.partial(zlib.decompressobj, wbits=31), zlib.error
    elif suffix == ".xz":
        new_frame, errors = lzma.LZMADecompressor, lzma.LZMAError
    elif suffix == ".zst":
        import zstandard

        # Archives written with --long=31 need the largest window; others take no more memory for it.
        new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        errors = zstandard.ZstdError
    else:
        return file.path.open("rb")
    return io.BufferedReader(_Pieces(_decompressed(file, new_frame, errors)), 2**17)


def _decompressed(file: File, new_frame: Callable[[], Any], errors: type[Exception]) -> Generator[bytes]:
    """Pieces of a compressed file, which may hold several frames.

    The readers of the packages do not always say that a file is damaged: `zstandard`'s takes a truncated file for a
    short one, and `lzma`'s ignores a second frame that does not begin well.
    """
    with file.path.open("rb") as source:
        frame, data = new_frame(), b""
        # Small pieces, to bound the output: four bytes of Zstandard can stand for 128 KiB.
        while data := data or source.read(2**10):
            if frame.eof:
                data = data.lstrip(b"\0")  # gzip and xz may be padded
                if not data:
                    continue
                frame = new_frame()
            try:
                yield frame.decompress(data)
            except errors as error:
                raise _damaged(file, error) from error
            data = frame.unused_data
        if not frame.eof:
            raise _damaged(file, "it ends too early")


class _Pieces(io.RawIOBase):
    """A generator of bytes as a binary stream."""

    def __init__(self, pieces: Generator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        target = memoryview(buffer)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._pieces.close()
        super().close()


# Files that are one record


def _text_and_title(file: File, stream: BinaryIO, max_bytes: int) -> tuple[str, str]:
    data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise RecordError(f"it has more than {max_bytes} bytes; split it or raise --max-document-chars")
    if file.kind in ("pdf", "docx", "pptx"):
        return _office(file, data, max_bytes)
    data = data.removeprefix(_BOM)
    if b"\0" in data:
        raise RecordError(NUL)
    if file.kind == "html":
        return _html(data)
    if file.kind == "markdown":
        return _markdown(_utf8(data).replace("\r\n", "\n").replace("\r", "\n"))
    return _utf8(data), parse_filename(PurePath(file.relative).name)[0]


def _markdown(text: str) -> tuple[str, str]:
    """Text without YAML front matter, and the title: that of the front matter, else the first heading of level one."""
    if front := _FRONT_MATTER.match(text):
        text = text[front.end() :]
        if found := _FRONT_TITLE.search(front[1]):
            return text, found[1].strip().strip("\"'")
    fence = ""
    for line in text.split("\n"):
        mark = line.strip()[:3]
        if mark in ("```", "~~~") and fence in ("", mark):
            fence = "" if fence else mark
        elif not fence and (heading := _HEADING.fullmatch(line)):
            return text, heading[1]
    return text, ""


def _html(data: bytes) -> tuple[str, str]:
    """Text, a line for each paragraph, and the title: that of the head, else the first heading of level one."""
    import bs4

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about XHTML and about text that looks like a path
            soup = bs4.BeautifulSoup(_decode_html(data), "html.parser")
    except (bs4.ParserRejectedMarkup, RecursionError) as error:
        raise RecordError(f"its HTML cannot be read ({_first_line(error)}); correct or convert it") from None
    titles = [tag for tag in soup.find_all("title") if not tag.find_parent("svg")] or soup.find_all("h1")
    title = " ".join(titles[0].get_text().split()) if titles else ""
    for tag in soup.find_all(_DROPPED):
        tag.decompose()
    # NUL, which the file has none of, marks the ends of paragraphs until white space has been collapsed between them.
    for tag in soup.find_all("pre"):
        tag.replace_with(f"\0\1{tag.get_text()}\0")
    for tag in soup.find_all(_BLOCK):
        tag.insert_before("\0")
        tag.insert_after("\0")
    for tag in soup.find_all(["td", "th"]):
        tag.insert_after(" ")
    pieces = soup.get_text().split("\0")
    lines = [piece[1:].strip("\n") if piece.startswith("\1") else " ".join(piece.split()) for piece in pieces]
    return "\n".join(line for line in lines if line.strip()), title


def _decode_html(data: bytes) -> str:
    """UTF-8, or the encoding that the page declares."""
    from bs4.dammit import EncodingDetector

    try:
        return _utf8(data)
    except RecordError:
        encoding = EncodingDetector.find_declared_encoding(data, is_html=True)
        if encoding is None:
            raise
    try:
        return data.decode(encoding)
    except (LookupError, UnicodeError):
        raise RecordError(f"it is neither UTF-8 nor {encoding}, which it declares; save it as UTF-8") from None


def _office(file: File, data: bytes, max_bytes: int) -> tuple[str, str]:
    """Text as Markdown, and the title: the first heading of level one, else the name of the file."""
    if file.kind == "pdf":
        # Readers of PDF look for both in these places; of a truncated file they would show what is left.
        if b"%PDF-" not in data[:1024] or b"%%EOF" not in data[-1024:]:
            raise RecordError("it is truncated or no PDF; copy or download it again")
    else:
        _check_archive(file.kind, data, max_bytes)
    text = _converted(file, data).replace("\0", "").replace("\f", "\n\n")
    text = _PICTURE.sub(_caption, _SLIDE.sub("\n", text))
    text = re.sub(r"\n[ \t]*\n\s*\n", "\n\n", text).strip()
    if not text:
        raise RecordError("it holds no text; if its pages are pictures, have their text recognized first")
    # A PDF has no headings: a line that begins with # is a line of a program.
    title = _markdown(text)[1] if file.kind != "pdf" else ""
    return text, title or parse_filename(PurePath(file.relative).name)[0]


def _check_archive(kind: str, data: bytes, max_bytes: int) -> None:
    if data.startswith(_CFB):
        raise RecordError(f"it is protected by a password or of an old format; save it as .{kind} without a password")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OverflowError) as error:
        raise RecordError(
            f"it is truncated, damaged or no .{kind} ({_first_line(error)}); copy or download it again"
        ) from None
    if size > max_bytes:
        raise RecordError(f"it has more than {max_bytes} bytes unpacked; split it or raise --max-document-chars")


def _converted(file: File, data: bytes) -> str:
    # The libraries write to their logs about fonts that lack a box, and the like.
    logging.getLogger("pdfminer").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from markitdown import MissingDependencyException, StreamInfo
            from markitdown.converters import DocxConverter, PdfConverter, PptxConverter
        except ImportError as error:
            raise DependencyError(f"{file.shown} takes markitdown, which is missing: install retro-lm[docs]") from error
        converters: dict[str, Any] = {"pdf": PdfConverter, "docx": DocxConverter, "pptx": PptxConverter}
        try:
            # Plain text needs no backslashes before its underscores and asterisks.
            made = converters[file.kind]().convert(
                io.BytesIO(data),
                StreamInfo(extension=f".{file.kind}"),
                escape_underscores=False,
                escape_asterisks=False,
            )
        except MissingDependencyException as error:
            raise DependencyError(
                f"{file.shown} takes markitdown[{file.kind}], which is missing: install retro-lm[docs]"
            ) from error
        except Exception as error:  # the libraries raise nearly everything
            if "Password" in type(error).__name__:
                raise RecordError("it is protected by a password; save it without one") from None
            reason = f"{type(error).__name__}: {_first_line(error)}".removesuffix(": ")
            raise RecordError(f"it is damaged or no .{file.kind} ({reason}); open and save it again") from None
    return str(made.markdown)


def _caption(picture: re.Match[str]) -> str:
    """What a picture shows in words. Pictures without a description are named "Picture 3" and linked as Picture3.jpg."""
    return "" if re.sub(r"\W", "", picture[1]) + ".jpg" == picture[2] else picture[1]
