"""Filters against a naive evaluator over Python values, on conditions that are generated with the text they are spelled in."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from index_builder.filters import MAX_CHARS, Filter
from retro.chunks import ChunkStore, Document, write_documents
from retro.errors import ConfigError

Condition = tuple[Any, ...]
"""("or" | "and", [Condition, ...]), ("not", Condition), ("exists", field), or (operator, field, value or values)."""
COLUMNS = ("key", "title", "url", "group", "split")


def make_table(documents: Sequence[dict[str, Any]]) -> pa.Table:
    """Documents with a dict as metadata; columns that are not named are empty."""
    columns: dict[str, list[str]] = {name: [str(d.get(name, "")) for d in documents] for name in COLUMNS}
    columns["metadata"] = [json.dumps(d.get("metadata", {})) for d in documents]
    columns["text"] = ["x"] * len(documents)
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def kept(text: str, documents: Sequence[dict[str, Any]]) -> list[int]:
    return np.flatnonzero(Filter.parse(text).keep(make_table(documents))).tolist()


def kept_metadata(text: str, *metadata: dict[str, Any]) -> list[int]:
    return kept(text, [{"metadata": fields} for fields in metadata])


# --- the oracle ---------------------------------------------------------------------------------------------------


def naive_field(document: dict[str, Any], name: str) -> Any:
    """None where it is missing."""
    if name in COLUMNS:
        return document[name] if document[name] != "" else None
    if name in ("corpus", "id"):
        corpus, _, rest = document["key"].partition(":")
        return corpus if name == "corpus" else rest
    found = document["metadata"]
    if name in found:
        return found[name]
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def kind(value: Any) -> str:
    return {bool: "boolean", int: "number", float: "number", str: "text"}.get(type(value), "other")


def naive_equal(value: Any, wanted: Any) -> bool:
    if wanted is None:
        return value is None
    if isinstance(value, list):
        return any(kind(entry) == kind(wanted) and entry == wanted for entry in value)
    return kind(value) == kind(wanted) and bool(value == wanted)


def naive_like(pattern: str, text: str) -> bool:
    if not pattern:
        return not text
    if pattern[0] == "%":
        return any(naive_like(pattern[1:], text[at:]) for at in range(len(text) + 1))
    return bool(text) and pattern[0] in ("_", text[0]) and naive_like(pattern[1:], text[1:])


def naive(condition: Condition, document: dict[str, Any]) -> bool:  # noqa: PLR0911
    match condition:
        case "or", parts:
            return any(naive(part, document) for part in parts)
        case "and", parts:
            return all(naive(part, document) for part in parts)
        case "not", part:
            return not naive(part, document)
        case "exists", name:
            return naive_field(document, name) is not None
        case "=" | "in", name, wanted:
            values = wanted if isinstance(wanted, list) else [wanted]
            return any(naive_equal(naive_field(document, name), value) for value in values)
        case "!=", name, wanted:
            return not naive(("=", name, wanted), document)
        case "not in", name, wanted:
            return not naive(("in", name, wanted), document)
        case "like", name, pattern:
            value = naive_field(document, name)
            return any(
                naive_like(pattern, x) for x in (value if isinstance(value, list) else [value]) if type(x) is str
            )
        case symbol, name, wanted:
            value = naive_field(document, name)
            if kind(value) != kind(wanted) or kind(value) not in ("number", "text"):
                return False
            return bool(
                {"<": value < wanted, "<=": value <= wanted, ">": value > wanted, ">=": value >= wanted}[symbol]
            )
    raise AssertionError(condition)


# --- spelling -----------------------------------------------------------------------------------------------------


def spelled_value(value: Any, rng: random.Random) -> str:
    if isinstance(value, str):
        quote = rng.choice("\"'")
        return quote + "".join("\\" * (c in ("\\", quote)) + c for c in value) + quote
    text = json.dumps(value)
    if kind(value) == "number":
        return "+" * (value > 0 and rng.random() < 0.3) + text
    return any_case(text, rng)


def spelled_field(name: str, rng: random.Random) -> str:
    bare = all(c.isalnum() or c in "_." for c in name) and name not in ("and", "NOT", "like", "true")
    return name if bare and rng.random() < 0.7 else f"`{name}`"


def any_case(word: str, rng: random.Random) -> str:
    return rng.choice([word, word.upper(), word.title()])


def spelled(condition: Condition, rng: random.Random, outer: int = 0) -> str:
    """One of the texts that mean the condition, with no more parentheses than the precedence of `not`, `and`, `or` asks for, or
    with some; `outer` is the precedence of what it stands in."""
    space = rng.choice([" ", "  ", "\n\t "])
    level, name = 4, ""
    if condition[0] in ("or", "and"):
        level = 1 if condition[0] == "or" else 2
        word = f"{space}{any_case(condition[0], rng)} "
        text = word.join(spelled(part, rng, level) for part in condition[1])
    elif condition[0] == "not":
        level, text = 3, f"{any_case('not', rng)}{space}{spelled(condition[1], rng, 2)}"
    elif condition[0] == "exists":
        text = f"{spelled_field(condition[1], rng)} {any_case('exists', rng)}"
    else:
        symbol, name, wanted = condition
        if isinstance(wanted, list):
            value = "(" + f",{space}".join(spelled_value(one, rng) for one in wanted) + " )"
        else:
            value = spelled_value(wanted, rng)
        words = space.join(any_case(word, rng) for word in symbol.split())
        tight = "" if not symbol.isalpha() and "not" not in symbol and rng.random() < 0.5 else " "
        text = f"{spelled_field(name, rng)}{tight}{words}{tight}{value}"
    if level <= outer or rng.random() < 0.2:
        text = f"({text})" if rng.random() < 0.8 else f"( ( {text}) )"
    return text


TEXTS = st.text("aab%_.\\\"'`\n(é", max_size=4)
SCALARS = (
    st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.5, 1e20, 2**60]) | TEXTS
)
METADATA = st.dictionaries(
    st.sampled_from(["a", "b", "a.b", "and", "NOT", "Größe", "two words", "x\\'y"]),
    SCALARS
    | st.lists(SCALARS | st.lists(SCALARS, max_size=1), max_size=3)
    | st.dictionaries(st.sampled_from("ab"), SCALARS | st.dictionaries(st.just("c"), SCALARS)),
)
DOCUMENTS = st.fixed_dictionaries(
    {
        "key": st.builds(":".join, st.tuples(st.sampled_from(["a", "b"]), st.text("ab:", max_size=3))),
        "title": TEXTS,
        "url": TEXTS,
        "group": st.sampled_from(["", "a", "b"]),
        "split": st.sampled_from(["", "a"]),
        "metadata": METADATA,
    }
)
NAMES = [
    "a",
    "a",
    "b",
    "a.b",
    "a.b.c",
    "and",
    "NOT",
    "Größe",
    "two words",
    "x\\'y",
    "like",
    "true",
    *COLUMNS,
    "corpus",
    "id",
]
FIELDS = st.sampled_from(NAMES)
LEAVES = (
    st.tuples(st.sampled_from(["=", "!=", "<", "<=", ">", ">="]), FIELDS, SCALARS)
    | st.tuples(st.sampled_from(["in", "not in"]), FIELDS, st.lists(SCALARS, min_size=1, max_size=3))
    | st.tuples(st.just("like"), FIELDS, TEXTS)
    | st.tuples(st.just("exists"), FIELDS)
)
CONDITIONS: st.SearchStrategy[Condition] = st.recursive(
    LEAVES,
    lambda inner: (
        st.tuples(st.sampled_from(["or", "and"]), st.lists(inner, min_size=2, max_size=3))
        | st.tuples(st.just("not"), inner)
    ),
    max_leaves=6,
)


@given(CONDITIONS, st.lists(DOCUMENTS, max_size=6), st.integers(0, 2**32))
@example(("=", "a", "x\ny\t\x00"), [], 0)  # once written as JSON, whose \n was then read as n
def test_a_filter_keeps_what_the_naive_evaluator_keeps_and_so_does_its_text(
    condition: Condition, documents: list[dict[str, Any]], seed: int
) -> None:
    rng = random.Random(seed)
    first, second = Filter.parse(spelled(condition, rng)), Filter.parse(spelled(condition, rng))
    table = make_table(documents)
    expected = [naive(condition, document) for document in documents]
    keep_D = first.keep(table)
    assert keep_D.dtype == np.bool_
    assert keep_D.tolist() == expected
    assert (first.text, hash(first)) == (second.text, hash(second))
    assert first == second
    again = Filter.parse(first.text)
    assert again.text == first.text
    assert again.keep(table).tolist() == expected


@given(SCALARS, st.sampled_from(["=", "!=", "<", "<=", ">", ">="]), SCALARS)
def test_two_values_compare_as_the_naive_evaluator_says(value: Any, symbol: str, wanted: Any) -> None:
    document = {"metadata": {"a": value}}
    text = spelled((symbol, "a", wanted), random.Random(0))
    assert kept(text, [document]) == [0] * naive((symbol, "a", wanted), document)


@given(st.text("ab.*+%%%_\n", max_size=7), st.text("ab.*+\n", max_size=7))
@example("a%a", "a")  # the two ends may not overlap
@example("%ab%ba%", "aba")  # nor may two pieces
@example("%_b", "ab")
@example("a%_b%", "aabb")
@example("_%_", "\n\n")
def test_like_is_the_definition_of_its_two_signs(pattern: str, text: str) -> None:
    found = kept_metadata(f"a like {spelled_value(pattern, random.Random(0))}", {"a": text})
    assert found == [0] * naive_like(pattern, text)


# --- by hand ------------------------------------------------------------------------------------------------------

WORKS: list[dict[str, Any]] = [
    {"key": "books:1", "title": "Ulysses", "url": "http://u", "group": "joyce", "split": "train"},
    {"key": "books:1:2", "title": "50% off", "metadata": {"lang": "de", "year": 1999, "tags": ["a", "b"]}},
    {"key": "news:1", "metadata": {"lang": "en", "year": 2001.5, "author": {"name": "Ann", "x": {"y": 3}}}},
    {"key": "news:x", "metadata": {"lang": None, "year": True, "tags": [], "author.name": "Bob"}},
    {"key": "news:y", "metadata": {"lang": 'say "\\x"', "year": "2001", "Straße": 1, "in": 2, "a b": 3, "and.x": 4}},
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('corpus = "books"', [0, 1]),
        ('id = "1"', [0, 2]),
        ('id = "1:2"', [1]),
        ('corpus = "news" and id in ("x", "y")', [3, 4]),
        ('key = "news:1"', [2]),
        ('title like "U%s"', [0]),
        ('title like "%\\%%"', [0, 1]),  # a backslash says nothing to like: % stands for any characters, always
        ('title = "50% off"', [1]),
        ("title = null", [2, 3, 4]),
        ('title = ""', []),
        ("title exists and url exists", [0]),
        ('group = "joyce" or split = "train"', [0]),
        ('group != "joyce"', [1, 2, 3, 4]),
        ("lang = null", [0, 3]),
        ("lang != null", [1, 2, 4]),
        ("lang exists", [1, 2, 4]),
        ('lang != "en"', [0, 1, 3, 4]),
        ('not lang = "en"', [0, 1, 3, 4]),
        ('lang not in ("en", "de")', [0, 3, 4]),
        ('lang NOT\nIN ("en", null)', [1, 4]),
        ('lang > "d" and lang < "e"', [1]),
        ("lang = 'say \"\\\\x\"'", [4]),
        ('lang = "say \\"\\\\x\\""', [4]),
        ("year = 1999.0", [1]),
        ("year >= 1999", [1, 2]),
        ("year < 3", []),
        ("year = true", [3]),
        ("year = 1", []),
        ("year != 1", [0, 1, 2, 3, 4]),
        ('year = "2001"', [4]),
        ('year > "2000"', [4]),
        ("year in (1999, 2001.5, true)", [1, 2, 3]),
        ('tags = "b"', [1]),
        ('tags in ("c", "b")', [1]),
        ('tags like "_"', [1]),
        ('tags != "b"', [0, 2, 3, 4]),
        ("tags exists", [1, 3]),
        ('author.name = "Ann"', [2]),
        ('author.name = "Bob"', [3]),
        ("author.x.y <= 3", [2]),
        ("author.x.y.z exists", []),
        ("author exists", [2]),
        ('author in ("name") or author like "%"', []),
        ("Straße = 1", [4]),
        ("`in` = 2", [4]),
        ("`a b` in (3)", [4]),
        ("`a b` in (3) and `in` in (2)", [4]),
        ("and.x = 4", [4]),
        ('`corpus` = "books"', [0, 1]),
        ('id = "1" and corpus = "news" or id = "x"', [2, 3]),
        ('id = "x" or id = "1" and corpus = "news"', [2, 3]),
        ('(id = "x" or id = "1") and corpus = "books"', [0]),
        ('not id = "x" and corpus = "news"', [2, 4]),
        ('not (id = "x" and corpus = "news")', [0, 1, 2, 4]),
        ("not not year = true", [3]),
    ],
)
def test_documents_are_kept_that_fulfil(text: str, expected: list[int]) -> None:
    assert kept(text, WORKS) == expected


def test_a_filter_reads_the_tables_of_a_chunk_store(tmp_path: Path) -> None:
    rest: dict[str, Any] = {"text": "x", "content_hash": "", "source": "", "url": "", "split": ""}
    documents = [
        Document(key="c:1", title="One", group="g", metadata='{"n": 1}', **rest),
        Document(key="c:2", title="", group="g", metadata="{}", **rest),
        Document(key="d:3", title="Three", group="h", metadata='{"n": 3}', **rest),
    ]
    write_documents(tmp_path, 0, documents, [np.array([[0, 1]])] * 3)
    (table,) = ChunkStore(tmp_path).tables
    for text, expected in [
        ('n >= 1 and corpus = "c"', [True, False, False]),
        ("title = null", [False, True, False]),
        ('group = "h" or id = "2"', [False, True, True]),
    ]:
        assert Filter.parse(text).keep(table).tolist() == expected


def test_backticks_quotes_case_and_blanks_do_not_tell_filters_apart_but_values_do() -> None:
    assert Filter.parse("`a`='x'AND(b  EXISTS)") == Filter.parse('a = "x" and b exists')
    texts = [
        "a = 1",
        "a = '1'",
        "a = 1.0",
        "a = true",
        "a = 'true'",
        "a.b = 1",
        "A = 1",
        "`a ` = 1",
        "a != 1",
        "a in (1)",
        "not a = 1",
    ]
    assert len({Filter.parse(text) for text in texts}) == len(texts)
    assert Filter.parse("a = 1") != "a = 1"
    assert repr(Filter.parse("a=1")) == "Filter('a = 1')"


@given(CONDITIONS, CONDITIONS, st.lists(DOCUMENTS, max_size=4))
def test_narrowed_is_both_at_once(first: Condition, second: Condition, documents: list[dict[str, Any]]) -> None:
    rng = random.Random(0)
    one, other = Filter.parse(spelled(first, rng)), Filter.parse(spelled(second, rng))
    both = one.narrowed(other)
    assert both.keep(make_table(documents)).tolist() == [naive(first, d) and naive(second, d) for d in documents]
    assert one.narrowed(Filter.parse(one.text)) == one
    if one != other:
        assert both == Filter.parse(f"({one.text}) and ({other.text})")


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "rest"),
    [
        ("", 1, ""),
        ("  ", 3, ""),
        ("lang", 5, ""),
        ("lang =", 7, ""),
        ("lang = en", 8, "en"),
        ('lang == "en"', 7, '= "en"'),
        ('lang = "en', 8, '"en'),
        ("lang = 'en\"", 8, "'en\""),
        ('lang = "en" and', 16, ""),
        ('lang = "en" year = 3', 13, "year = 3"),
        ("(a = 1", 7, ""),
        ("a = 1)", 6, ")"),
        ("a = 1 or or b = 2", 10, "or b = 2"),
        ("and = 1", 1, "and = 1"),
        ("a in ()", 7, ")"),
        ("a in 1", 6, "1"),
        ("a in (1,)", 9, ")"),
        ("a in (1", 8, ""),
        ("a not 1", 7, "1"),
        ("a like 5", 8, "5"),
        ("not", 4, ""),
        ("1 = a", 1, "1 = a"),
        ("a.b. = 1", 4, ". = 1"),
        ("`` = 1", 1, "`` = 1"),
        ("`a = 1", 1, "`a = 1"),
        ("a = 1; drop", 6, "; drop"),
        ("a = 1.5.5", 8, ".5"),
        ("a = \x00", 5, "\x00"),
        ("a = 1 and " + "b" * 80 + " c", 92, "c"),
    ],
)
def test_a_malformed_filter_is_refused_with_the_place_and_an_example(text: str, place: int, rest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Filter.parse(text)
    shown = repr(text) if len(text) <= 60 else repr(text[:57] + "...")
    found = f"{rest!r}" if rest else "'', its end"
    assert str(caught.value) == (
        f"the filter {shown} is malformed at character {place} ({found}): write it as in 'lang = \"en\" and year >= 2000'"
    )


@pytest.mark.parametrize(
    "text",
    [
        "(" * 10_000,
        ")" * 10_000,
        "not " * 2_000,
        "not(" * 2_500,
        "`" * 10_000,
        "'" * 9_999,
        "\\" * 10_000,
        "a in (" + "1," * 4_990,
    ],
)
def test_a_hostile_malformed_filter_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is malformed at character"):
        Filter.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "not " * 2_000 + "a = 1",
        "not (" * 1_500 + "a = 1" + ")" * 1_500,
        "(a = 1 or " * 700 + "a = 1 and b = 2" + ")" * 700,
    ],
)
def test_a_filter_nested_too_deeply_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="nested too deeply: at most 100 levels"):
        Filter.parse(text)


def test_a_filter_of_more_than_10_000_characters_is_refused_and_one_of_10_000_is_not() -> None:
    text = "a = 1" + " " * (MAX_CHARS - 5)
    assert Filter.parse(text).text == "a = 1"
    with pytest.raises(ConfigError, match="has 10,001 characters: at most 10,000 are allowed"):
        Filter.parse(text + " ")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 401, "0" * 5_000 + "1"])
def test_a_number_that_python_cannot_hold_is_refused(number: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"the filter has the number '{number[:5]}")):
        Filter.parse(f"a = {number}")


def test_parentheses_alone_do_not_nest_and_long_chains_are_flat() -> None:
    assert Filter.parse("(" * 4_900 + "a = 1" + ")" * 4_900).text == "a = 1"
    chain = Filter.parse(" or ".join(f"a = {n}" for n in range(900)))
    assert chain.keep(make_table([{"metadata": {"a": n}} for n in (899, 900)])).tolist() == [True, False]


def test_a_filter_as_deep_as_allowed_is_applied_and_its_text_is_as_deep() -> None:
    """The parentheses of the text once counted as levels, so that the text of a deep filter was refused."""
    deep = Filter.parse("not " * 97 + "a = 1")
    assert deep.keep(make_table([{"metadata": {"a": 1}}, {}])).tolist() == [False, True]
    assert Filter.parse(deep.text) == deep
    with pytest.raises(ConfigError, match="nested too deeply"):
        Filter.parse("not " * 98 + "a = 1")


def test_like_takes_no_longer_than_text_times_pattern() -> None:
    """A regular expression with as many stars would try combinations of places without end."""
    pattern = "%a" * 2_000 + "%b" + "%" * 2_000
    assert kept_metadata(
        f'a like "{pattern}"', {"a": "a" * 5_000}, {"a": "a" * 5_000 + "b"}, {"a": "a" * 1_999 + "b"}
    ) == [1]
    assert kept_metadata(f'a like "{"%_" * 3_000}"', {"a": "x" * 3_000}, {"a": "x" * 2_999}) == [0]
