"""The report's page, its plots and its numbers."""

import base64
import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from sample_records import hostile_record, lm_record, training_record, write_sample_report

from eval.markup import Html, column, interval, join, number, tag
from eval.plots import bars, lines
from eval.records import Curve, Figure, Record, read_records, write_record
from eval.report import figure_groups, finish, page, render
from eval.training import training_record as training_course
from retro.errors import FormatError

EMPTY = {"meta", "br"}
SVG = {"svg", "path", "text", "circle", "rect", "title", "desc"}
HTML = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "main",
    "section",
    "h1",
    "h2",
    "p",
    "span",
    "a",
    "ul",
    "li",
    "div",
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "figure",
    "figcaption",
    "strong",
    "details",
    "summary",
    "pre",
    "code",
}


class Page(HTMLParser):
    """A page as a list of elements with their ancestors, and its text; refuses what is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def all(self, *names: str) -> Iterator[dict[str, str | None]]:
        """Attributes of the elements of these names."""
        return (attributes for name, attributes, _ in self.elements if name in names)

    def texts(self, name: str) -> list[str]:
        """What stands right inside elements of this name."""
        return [text for where, text in self.text if where == name]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_report(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def text(report: Path) -> str:
    return (report / "report.html").read_text(encoding="utf-8")


# --- the page -----------------------------------------------------------------------------------------------------


def test_a_page_has_a_section_and_a_link_to_it_for_each_record(text: str, report: Path) -> None:
    parsed = Page(text)
    sections = [a["id"] for a in parsed.all("section")]
    links = [a["href"] for a in parsed.all("a") if (a["href"] or "").startswith("#")]
    assert len(sections) == len(read_records(report)) == 5
    assert links == [f"#{section}" for section in sections]
    assert sorted(parsed.texts("h2")) == sorted(record.name for record in read_records(report).values())
    ids = [a["id"] for _, a, _ in parsed.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    referred = [
        name for _, a, _ in parsed.elements for key in ("aria-labelledby", "aria-describedby") if (name := a.get(key))
    ]
    assert set(referred) <= set(ids)


def test_all_that_a_record_holds_is_on_the_page(tmp_path: Path) -> None:
    record, units = lm_record()
    path = finish(tmp_path, record, units)
    written = read_records(tmp_path)[path]
    shown = " ".join(data for _, data in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text)
    expected = [
        record.name,
        *record.figures,
        *record.curves,
        *record.notes,
        *record.fingerprints.values(),
        "window.length",
    ]
    expected += [
        "1.311",
        "1.285 to 1.334",
        "120",
        "34.22",
        "retrieval shuffled",
        written.environment["python"],
        path.name,
    ]
    expected += [written.command[0], "on, off, shuffled", "512", written.created[:10], "seed 0", "812 s"]
    assert [part for part in expected if part not in shown] == []


def test_headings_are_in_order_and_tables_have_captions_and_scopes(text: str) -> None:
    parsed = Page(text)
    levels = [int(name[1]) for name, _, _ in parsed.elements if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(list(parsed.all("table"))) == len(list(parsed.all("caption"))) > 15
    assert {a.get("scope") for a in parsed.all("th")} == {"row", "col"}
    frames = [a for a in parsed.all("div") if a.get("class") == "scroll"]
    assert len(frames) == len(list(parsed.all("table")))
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in frames)


def test_a_page_asks_no_other_host_and_runs_nothing(text: str) -> None:
    parsed = Page(text)
    assert {name for name, _, _ in parsed.elements} <= HTML | SVG
    assert not re.search(r"https?:|//|url\(|@import|src=", text)
    assert not [key for _, a, _ in parsed.elements for key in a if key.startswith("on") or key in ("style", "src")]
    assert all(re.fullmatch(r"#[\w-]+|records/[\w.-]+\.json", str(a["href"])) for a in parsed.all("a"))
    (policy,) = (a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    (style,) = parsed.texts("style")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_what_looks_like_markup_in_a_record_stands_as_text(tmp_path: Path) -> None:
    record, _ = hostile_record()
    parsed = Page(page({tmp_path / "records" / "x.json": record}))
    assert {name for name, _, _ in parsed.elements} <= HTML | SVG
    assert not [key for _, a, _ in parsed.elements for key in a if key.startswith("on") or key == "src"]
    for where in ("a", "h2", "caption", "strong", "th", "td", "li", "title"):
        assert any(record.name in data for data in parsed.texts(where)), where
    assert any(data.startswith(record.name[:20]) for data in parsed.texts("text"))  # cut to the width of the plot
    assert sum(data.count("<script>") for _, data in parsed.text) > 20
    attributes = [value for _, a, _ in parsed.elements for value in a.values()]
    assert any(record.name in (value or "") for value in attributes)


def test_half_a_surrogate_pair_does_not_keep_the_page_from_being_written(tmp_path: Path) -> None:
    path = write_record(tmp_path, Record(kind="lm", name="x", figures={}))
    path.write_text(path.read_text(encoding="utf-8").replace('"name": "x"', r'"name": "a\ud800b"'), encoding="utf-8")
    assert "a?b" in render(tmp_path).read_text(encoding="utf-8")


def test_the_same_records_give_the_same_page(report: Path, text: str) -> None:
    assert render(report).read_text(encoding="utf-8") == text


def test_long_tables_are_cut_and_say_so(tmp_path: Path) -> None:
    rows = {"Pairs": [{"a": f"row {i}", "b": i} for i in range(1234)], "No": []}
    record = Record(kind="leakage", name="x", figures={}, rows=rows)
    parsed = Page(page({tmp_path / "x.json": record}))
    assert "Pairs (the first 200 of 1,234 rows; all are in the record)" in parsed.texts("caption")
    assert sum(data.startswith("row ") for data in parsed.texts("th")) == 200
    assert "No: none." in parsed.texts("p")


def test_a_folder_without_records_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no records"):
        render(tmp_path)


def test_colors_have_the_contrast_of_wcag_aa() -> None:
    """4.5 for text, 3 for graphics, in both palettes (WCAG 2.2, 1.4.3 and 1.4.11)."""
    style = (Path(__file__).parents[2] / "eval" / "report.css").read_text(encoding="utf-8")
    palettes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]+);", block))
        for block in re.findall(r":root \{(.*?--s6.*?)\}", style, re.S)
    ]
    assert len(palettes) == 2

    def luminance(color: str) -> float:
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for palette in palettes:
        for ground in ("page", "tint"):
            for name, least in [("ink", 4.5), ("soft", 4.5), ("link", 4.5)] + [(f"s{i}", 3.0) for i in range(1, 7)]:
                dark, light = sorted((luminance(palette[name]), luminance(palette[ground])))
                assert (light + 0.05) / (dark + 0.05) >= least, (name, ground)


def test_the_course_of_a_training_becomes_a_record(tmp_path: Path) -> None:
    text = """{"step": 1, "loss_nats": 3.5, "tokens_per_s": 10.0}
{"step": 2, "loss_nats": 2.5, "tokens_per_s": 30.0}
{"step": 2, "valid_loss_on_nats": 2.75, "valid_wiki_loss_off_nats": 3.0, "valid_tokens": 7}
{"step": 3, "loss_nats": 1.5, "tokens_per_s": 20.0}
{"step": 4, "lo"""
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "config.json").write_text('{"training": {"steps": 3}}', encoding="utf-8")
    record = training_course(tmp_path)
    assert record.curves["Loss"].x == (1, 2, 3)
    assert record.curves["Loss"].series == {
        "training": (3.5, 2.5, 1.5),
        "validation, retrieval on": (None, 2.75, None),
        "validation on wiki, retrieval off": (None, 3.0, None),
    }
    figures = {name: figure.value for name, figure in record.figures.items()}
    assert figures == {
        "last loss, training": 1.5,
        "last loss, validation, retrieval on": 2.75,
        "last loss, validation on wiki, retrieval off": 3.0,
        "speed, median": 20.0,
    }
    assert (record.kind, record.configuration) == ("training", {"steps": 3})
    assert "last loss, training" in page({tmp_path / "x.json": record})


def test_a_folder_without_losses_has_no_course(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no losses"):
        training_course(tmp_path)


def test_figures_of_one_unit_and_one_beginning_are_drawn_together() -> None:
    names = {"bits, on": "bpb", "bits, off": "bpb", "loss, on": "bpb", "perplexity": "", "EM": "%", "F1": "%"}
    names |= {"dense: recall@1": "%", "dense: recall@5, all": "%"}
    figures = {name: Figure(value=1.0, unit=unit) for name, unit in names.items()}
    figures |= {"none: a": Figure(value=0.0, unit="%"), "none: b": Figure(value=0.0, unit="%")}
    figures |= {"bits, missing": Figure(value=None, unit="bpb"), "bits, broken": Figure(value=math.nan, unit="bpb")}
    assert {title: list(group) for title, group in figure_groups(figures)} == {
        "bits": ["on", "off"],
        "Figures in %": ["EM", "F1"],
        "dense": ["recall@1", "recall@5, all"],
    }


# --- elements and numbers -----------------------------------------------------------------------------------------


def test_text_and_attributes_are_escaped_and_elements_are_not_twice() -> None:
    assert tag("p", "a<b & c", tag("b", '"'), None, class_='x"<', aria_label=None) == (
        '<p class="x&quot;&lt;">a&lt;b &amp; c<b>"</b></p>'
    )
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert join("<", Html("<i></i>")) == "&lt;<i></i>"


@pytest.mark.parametrize(
    ("value", "spread", "expected"),
    [
        (1.0532, 0.0123, "1.053"),
        (45.2, 4.3, "45.2"),
        (45.2, 43.0, "45"),
        (1234567, None, "1,234,567"),
        (1234.567, None, "1,235"),
        (34.21753, None, "34.22"),
        (4.1, None, "4.1"),
        (100.0, None, "100"),
        (0.0, None, "0"),
        (0.000012345, None, "1.23e-05"),
        (-0.00051, None, "-0.00051"),
        (math.nan, 1.0, "nan"),
        (None, None, "not given"),
        (1.5, 0.0, "1.5"),
        (-0.01, 1e-15, "-0.010000"),
        (1e-9, 0.003, "0.0000"),
    ],
)
def test_numbers_have_the_digits_that_mean_something(value: float | None, spread: float | None, expected: str) -> None:
    assert number(value, spread) == expected


def test_numbers_below_each_other_have_the_same_decimals() -> None:
    assert column([1.5, 1520.0, None, 0.25]) == ["1.50", "1,520.00", "", "0.25"]
    assert column([1, 2]) == ["1", "2"]
    assert column([0.5, math.nan]) == ["0.5", "nan"]
    assert interval(1.0, 2.0) == "1.00 to 2.00"
    assert interval(None, 2.0) == ""


# --- plots --------------------------------------------------------------------------------------------------------


def shapes(drawn: str, name: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(drawn).iter(name))


def test_bars_from_zero_are_as_long_as_their_values() -> None:
    figures = {"a": Figure(value=10.0, unit="ms", low=5.0, high=12.0), "b": Figure(value=40.0, unit="ms")}
    drawn = bars(figures, "speed", "k")
    short, long = (float(rect.attrib["width"]) for rect in shapes(drawn, "rect"))
    assert long == pytest.approx(4 * short, abs=0.2)
    assert "does not begin at 0" not in drawn
    whisker = next(p.attrib["d"] for p in shapes(drawn, "path") if p.attrib["class"] == "whisker")
    start, end = (float(x) for x in re.findall(r"[ML]([\d.]+) ", whisker))
    assert end - start == pytest.approx(short * 7 / 10, abs=0.2)


def test_values_that_hardly_differ_are_points_on_an_axis_that_says_that_it_is_cut() -> None:
    figures = {
        "on": Figure(value=1.29, unit="bpb", low=1.28, high=1.3),
        "off": Figure(value=1.31, unit="bpb", low=1.3, high=1.32),
    }
    drawn = bars(figures, "bits", "k")
    assert shapes(drawn, "rect") == []
    on, off = (float(c.attrib["cx"]) for c in shapes(drawn, "circle"))
    ticks = [(float(t.attrib["x"]), float(t.text or "")) for t in shapes(drawn, "text") if "class" not in t.attrib]
    (x0, v0), (x1, v1) = ticks[0], ticks[-1]
    assert (v0 + (on - x0) / (x1 - x0) * (v1 - v0), v0 + (off - x0) / (x1 - x0) * (v1 - v0)) == pytest.approx(
        (1.29, 1.31), abs=1e-3
    )
    assert "the axis does not begin at 0" in drawn


def points(drawn: str) -> list[list[tuple[float, float]]]:
    """Of the first line drawn, its pieces."""
    path = next(p.attrib["d"] for p in shapes(drawn, "path") if p.attrib["class"].startswith("line"))
    return [[(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", run)] for run in path.split("M")[1:]]


def test_a_line_goes_through_its_points_over_missing_ones_and_is_interrupted_by_one_that_is_not_finite() -> None:
    curve = Curve(x_label="x", y_label="y", x=(0, 1, 2, 3, 4, 5), series={"s": (0.0, 1.0, None, 4.0, math.nan, 2.0)})
    drawn = lines(curve, "t", "k")
    (first,) = points(drawn)  # the last point stands alone
    assert [x for x, _ in first] == pytest.approx([44 + (360 - 12 - 44) * x / 5 for x in (0, 1, 3)], abs=0.1)
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in shapes(drawn, "circle")]
    heights = [182 - y for _, y in circles]
    assert len(circles) == 4
    assert (heights[2] - heights[0]) / (heights[1] - heights[0]) == pytest.approx(4.0, abs=0.01)
    assert "s: 0 at 0, 2 at 5; lowest 0 at 0, highest 4 at 3." in drawn


def test_a_logarithmic_axis_spaces_doublings_alike_and_leaves_out_what_has_no_logarithm() -> None:
    curve = Curve(x_label="k", y_label="y", x=(0, 1, 2, 4, 8), series={"s": (9.0, 1.0, 2.0, 3.0, 4.0)}, log_x=True)
    ((*run,),) = points(lines(curve, "t", "k"))
    assert np.diff([x for x, _ in run]).tolist() == pytest.approx([(360 - 12 - 44) / 3] * 3, abs=0.2)


def test_the_values_of_a_curve_can_be_read_and_of_a_long_one_every_few() -> None:
    record, _ = training_record(steps=2000)
    parsed = Page(lines(record.curves["Loss"], "Loss", "k"))
    assert parsed.texts("summary") == ["Values"]
    steps = [data for data in parsed.texts("th") if re.fullmatch(r"[\d,]+", data)]
    assert steps[:2] == ["10", "30"]
    assert steps[-1] == "2,000"
    assert "Loss: nats per token; one point of 2" in parsed.texts("caption")


@pytest.mark.parametrize("series", [{}, {"s": (None, None)}, {"s": (math.nan, math.inf)}])
def test_a_curve_without_any_value_is_said_to_have_none(series: dict[str, Any]) -> None:
    assert "There is no value to draw." in lines(Curve(x_label="x", y_label="y", x=(1, 2), series=series), "t", "k")


@pytest.mark.parametrize("value", [0.0, -3.0, 5.0, 1e-9, 1e12])
def test_one_value_alone_is_drawn(value: float) -> None:
    drawn = lines(Curve(x_label="x", y_label="y", x=(1,), series={"s": (value,)}, log_x=True), "t", "k")
    assert len(shapes(drawn, "circle")) == 1
    assert bars({"a": Figure(value=value, unit="u"), "b": Figure(value=value, unit="u")}, "t", "k")
