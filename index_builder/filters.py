"""Conditions on documents, as in `lang = "en" and year >= 2000`. The only importer of lark.

    condition    FIELD = != < <= > >= VALUE     FIELD in (VALUE, ...)     FIELD not in (VALUE, ...)     FIELD like "text%"
                 FIELD exists     not CONDITION     CONDITION and CONDITION     CONDITION or CONDITION     (CONDITION)
    FIELD        a name, with dots for fields of fields (author.name); any other name in backticks. key, title, url, group and split
                 are the document's own, corpus and id the two parts of its key; all others are its metadata
    VALUE        "text" or 'text' (a backslash before a quote or a backslash), a number, true, false, null

A comparison of values of different types is false, also where it is `<`; so `!=`, which is the contrary of `=`, is true of a
document that lacks the field. `= null` is true of a field that is missing or null. A list fulfils `=`, `in` and `like` where one of
its values does. In `like`, % stands for any characters and _ for one.
"""

import functools
import json
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from retro.errors import ConfigError

MAX_CHARS = 10_000
MAX_DEPTH = 100
MAX_DIGITS = 400
_COLUMNS = ("key", "title", "url", "group", "split")
_EXAMPLE = """write it as in 'lang = "en" and year >= 2000'"""
_GRAMMAR = r"""
?start: or_
?or_: and_
    | and_ ("or"i and_)+         -> either
?and_: not_
     | not_ ("and"i not_)+       -> both
?not_: "not"i not_                -> negated
     | "(" or_ ")"
     | field OPERATOR value       -> compared
     | field "in"i values           -> among
     | field "not"i "in"i values    -> not_among
     | field "like"i TEXT         -> like
     | field "exists"i            -> exists
values: "(" value ("," value)* ")"
field: NAME | QUOTED
?value: TEXT -> text | NUMBER -> number | "true"i -> true | "false"i -> false | "null"i -> null
OPERATOR: "=" | "!=" | "<=" | ">=" | "<" | ">"
TEXT: /"(\\.|[^"\\])*"|'(\\.|[^'\\])*'/s
NUMBER: /[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?/
NAME: /(?!(?:and|or|not|in|like|exists|true|false|null)(?![\w.]))[^\W\d]\w*(\.\w+)*/i
QUOTED: /`[^`]+`/
%ignore /\s+/
"""
_ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
Test = Callable[[Callable[[str], Any]], bool]
"""Whether a document fulfils a condition, given the values of its fields (None where one is missing)."""


class Filter:
    """A condition on documents, parsed once.

    Attributes:
        text: In one form for all spellings; filters of the same text are equal.
    """

    def __init__(self, text: str, test: Test, fields: frozenset[str]) -> None:
        self.text = text
        self._test = test
        self._fields = fields

    @classmethod
    def parse(cls, text: str) -> "Filter":
        """Raises ConfigError where the text is malformed, with the place and an example."""
        import lark

        if len(text) > MAX_CHARS:
            raise ConfigError(f"the filter has {len(text):,} characters: at most {MAX_CHARS:,} are allowed")
        try:
            tree = _parser().parse(text)
            _check_depth(tree)
            built: Filter = _Builder().transform(tree)
            return built
        except lark.exceptions.UnexpectedInput as error:
            at = getattr(error, "pos_in_stream", None)
            if at is None or at < 0 or getattr(getattr(error, "token", None), "type", "") == "$END":
                at = len(text)
            rest = text[at : at + 20]
            raise ConfigError(
                f"the filter {_shortened(text)} is malformed at character {at + 1} ({rest!r}{'' if rest else ', its end'}): "
                f"{_EXAMPLE}"
            ) from None
        except RecursionError:
            raise ConfigError(f"the filter is nested too deeply: at most {MAX_DEPTH} levels are allowed") from None

    def keep(self, table: pa.Table) -> NDArray[np.bool_]:
        """Which documents of a shard fulfil it [n]; see `ChunkStore.tables`."""
        columns = {name: table[name].to_pylist() for name in _COLUMNS if name in self._columns()}
        needs_metadata = any(name not in _COLUMNS and name not in ("corpus", "id") for name in self._fields)
        metadata = table["metadata"].to_pylist() if needs_metadata else []
        keep_D = np.zeros(len(table), np.bool_)
        for document in range(len(table)):
            fields = json.loads(metadata[document]) if needs_metadata else {}

            def value(name: str, document: int = document, fields: dict[str, Any] = fields) -> Any:
                if name in columns:
                    return columns[name][document] or None
                if name == "corpus":
                    return columns["key"][document].partition(":")[0]
                if name == "id":
                    return columns["key"][document].partition(":")[2]
                return _looked_up(fields, name)

            keep_D[document] = self._test(value)
        return keep_D

    def narrowed(self, other: "Filter") -> "Filter":
        """Both at once."""
        if self == other:
            return self
        first, second = self._test, other._test
        text = f"({self.text}) and ({other.text})"
        return Filter(text, lambda value: first(value) and second(value), self._fields | other._fields)

    def _columns(self) -> set[str]:
        return set(self._fields) | ({"key"} if self._fields & {"corpus", "id"} else set())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Filter) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Filter({self.text!r})"


@functools.cache
def _parser() -> Any:
    import lark

    return lark.Lark(_GRAMMAR, parser="lalr", maybe_placeholders=False)


def _check_depth(tree: Any) -> None:
    """Without recursion, which the tree of a hostile filter would exhaust."""
    pending = [(tree, 1)]
    while pending:
        node, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ConfigError(f"the filter is nested too deeply: at most {MAX_DEPTH} levels are allowed")
        pending += [(child, depth + 1) for child in getattr(node, "children", ())]


def _looked_up(fields: Any, name: str) -> Any:
    """A field of the metadata: by its whole name, else by the parts between dots."""
    if name in fields:
        return fields[name]
    for part in name.split("."):
        if not isinstance(fields, dict) or part not in fields:
            return None
        fields = fields[part]
    return fields


def _alike(value: Any, wanted: Any) -> bool:
    """Equal, and of comparable types: true is not 1."""
    if isinstance(value, bool) or isinstance(wanted, bool):
        return isinstance(value, bool) and isinstance(wanted, bool) and value == wanted
    numbers = isinstance(value, int | float) and isinstance(wanted, int | float)
    return (numbers or (isinstance(value, str) and isinstance(wanted, str))) and value == wanted


def _ordered(value: Any, wanted: Any) -> bool:
    """Whether two values can be put into an order."""
    if isinstance(value, bool) or isinstance(wanted, bool):
        return False
    numbers = isinstance(value, int | float) and isinstance(wanted, int | float)
    return numbers or (isinstance(value, str) and isinstance(wanted, str))


def _entries(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[^\W\d]\w*(\.\w+)*", name) and not _RESERVED.fullmatch(name) else f"`{name}`"


_RESERVED = re.compile("and|or|not|in|like|exists|true|false|null", re.IGNORECASE)


def _like(pattern: str) -> Callable[[str], bool]:
    """Matches % and _ in time proportional to text times pattern, whatever they are."""
    pieces = [
        re.compile("".join("." if c == "_" else re.escape(c) for c in piece), re.DOTALL) for piece in pattern.split("%")
    ]
    lengths = [len(piece) for piece in pattern.split("%")]

    def matches(text: str) -> bool:
        if len(pieces) == 1:
            return pieces[0].fullmatch(text) is not None
        if pieces[0].match(text) is None:
            return False
        at, end = lengths[0], len(text) - lengths[-1]
        for piece in pieces[1:-1]:  # the first place is always a good one
            found = piece.search(text, at)
            if found is None:
                return False
            at = found.end()
        return at <= end and pieces[-1].match(text, end) is not None

    return matches


def _literal(value: Any) -> str:
    if isinstance(value, str):  # not as JSON, which escapes more than a quote and a backslash
        return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return json.dumps(value)


def _compared(name: str, symbol: str, wanted: Any) -> Filter:
    text, fields = f"{_quoted(name)} {symbol} {_literal(wanted)}", frozenset({name})
    if symbol in ("=", "!="):

        def equal(value: Callable[[str], Any]) -> bool:
            found = value(name)
            if wanted is None:
                return found is None
            return any(_alike(entry, wanted) for entry in _entries(found))

        return Filter(text, equal if symbol == "=" else lambda value: not equal(value), fields)
    compare = _ORDERED[symbol]

    def ordered(value: Callable[[str], Any]) -> bool:
        found = value(name)
        return _ordered(found, wanted) and compare(found, wanted)

    return Filter(text, ordered, fields)


def _among(name: str, values: list[Any], *, negated: bool) -> Filter:
    text = f"{_quoted(name)} {'not ' if negated else ''}in ({', '.join(map(_literal, values))})"
    tests = [_compared(name, "=", wanted)._test for wanted in values]
    return Filter(text, lambda value: any(test(value) for test in tests) != negated, frozenset({name}))


def _matching(name: str, pattern: str) -> Filter:
    matches = _like(pattern)

    def test(value: Callable[[str], Any]) -> bool:
        return any(isinstance(entry, str) and matches(entry) for entry in _entries(value(name)))

    return Filter(f"{_quoted(name)} like {_literal(pattern)}", test, frozenset({name}))


def _joined(word: str, parts: list[Filter]) -> Filter:
    tests, combine = [part._test for part in parts], all if word == "and" else any
    text = f" {word} ".join(f"({part.text})" for part in parts)
    fields = frozenset().union(*(part._fields for part in parts))
    return Filter(text, lambda value: combine(test(value) for test in tests), fields)


def _negated(part: Filter) -> Filter:
    return Filter(f"not ({part.text})", lambda value: not part._test(value), part._fields)


def _unescaped(token: str) -> str:
    return re.sub(r"\\(.)", r"\1", token[1:-1], flags=re.DOTALL)


class _Builder:
    """From the parser's tree, bottom up."""

    def transform(self, tree: Any) -> Any:
        if not hasattr(tree, "data"):
            return str(tree)
        return getattr(self, tree.data)([self.transform(child) for child in tree.children])

    def either(self, parts: list[Filter]) -> Filter:
        return _joined("or", parts)

    def both(self, parts: list[Filter]) -> Filter:
        return _joined("and", parts)

    def negated(self, parts: list[Filter]) -> Filter:
        return _negated(parts[0])

    def compared(self, parts: list[Any]) -> Filter:
        return _compared(*parts)

    def among(self, parts: list[Any]) -> Filter:
        return _among(*parts, negated=False)

    def not_among(self, parts: list[Any]) -> Filter:
        return _among(*parts, negated=True)

    def like(self, parts: list[str]) -> Filter:
        return _matching(parts[0], _unescaped(parts[1]))

    def exists(self, parts: list[str]) -> Filter:
        name = parts[0]
        return Filter(f"{_quoted(name)} exists", lambda value: value(name) is not None, frozenset({name}))

    def values(self, parts: list[Any]) -> list[Any]:
        return parts

    def field(self, parts: list[str]) -> str:
        return parts[0].strip("`")

    def text(self, parts: list[str]) -> str:
        return _unescaped(parts[0])

    def number(self, parts: list[str]) -> int | float:
        text = parts[0]
        if len(text) > MAX_DIGITS or math.isinf(float(text)):
            raise ConfigError(
                f"the filter has the number {_shortened(text)}: up to {MAX_DIGITS} characters and 1.7e308 are allowed"
            )
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)

    def true(self, parts: list[Any]) -> bool:
        return True

    def false(self, parts: list[Any]) -> bool:
        return False

    def null(self, parts: list[Any]) -> None:
        return None
