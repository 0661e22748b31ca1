"""Plots as SVG inside a page: drawn for the width of a phone, in the page's own colors and fonts, with title and description.

Colors are classes (`s1` to `s6`), which the page's style sheet defines for light, dark and print; series differ in dashes and
markers too.
"""

import math
from collections.abc import Mapping, Sequence

from eval.markup import Html, column, interval, join, number, tag
from eval.records import Curve, Figure

WIDTH, HEIGHT = 360.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 12.0, 8.0, 38.0
_ROW = 38.0
_COLORS = 6
_MARKED = 30
"""Points of a series up to which each has a marker."""


def bars(figures: Mapping[str, Figure], title: str, key: str) -> Html:
    """Figures of one unit with their intervals: bars from 0, or points on a cut axis where the bars would look all the same.

    Args:
        figures: By label; each has a value.
        title: Of the plot.
        key: Of its elements' ids, unlike any other on the page.
    """
    ends = [end for f in figures.values() for end in (f.value, f.low, f.high) if end is not None and math.isfinite(end)]
    values = [f.value for f in figures.values() if f.value is not None]
    from_zero = min(ends) >= 0 and max(values) > 0 and min(values) < 0.8 * max(values)
    margin = (max(ends) - min(ends)) * 0.15 or abs(max(ends)) * 0.1 or 1.0
    low, high = (0.0, max(ends)) if from_zero else (min(ends) - margin, max(ends) + margin)
    ticks = _ticks(low, high, 4)
    left, right = 6.0, WIDTH - 6.0

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    bottom = _ROW * len(figures) + 4
    parts = [_line(x(t), 2, x(t), bottom, "grid") for t in ticks]
    parts += [_tick(x(t), bottom + 15, text) for t, text in zip(ticks, _tick_texts(ticks), strict=True)]
    for row, (label, figure) in enumerate(figures.items()):
        y, color = row * _ROW + 26.0, f"s{row % _COLORS + 1}"
        value = figure.value or 0.0
        spread = None if figure.low is None or figure.high is None else (figure.high - figure.low) / 2
        written = number(figure.value, spread)
        shown = _fit(label, right - left - 8 * len(written))
        parts += [_text(left, y - 10, shown, "start", "label"), _text(right, y - 10, written, "end", "value")]
        if from_zero:
            parts.append(
                tag("rect", x=_r(left), y=_r(y - 4), width=_r(x(value) - left), height=12, class_=f"fill {color}")
            )
        if figure.low is not None and figure.high is not None:
            parts.append(
                _line(x(figure.low), y + 2, x(figure.high), y + 2, "whisker" if from_zero else f"line solid {color}")
            )
            parts += [
                _line(x(e), y - 3, x(e), y + 7, "whisker" if from_zero else f"line solid {color}")
                for e in (figure.low, figure.high)
            ]
        if not from_zero:
            parts.append(tag("circle", cx=_r(x(value)), cy=_r(y + 2), r=4, class_=f"fill {color}"))
    said = "; ".join(_said(label, figure) for label, figure in figures.items())
    unit = next(iter(figures.values())).unit
    drawn = _svg(key, title, f"{unit}. {said}.", bottom + 22, parts)
    remarks = [
        "" if unit in title else unit,
        "lines: 95% intervals" if any(f.low is not None for f in figures.values()) else "",
        "" if from_zero else "the axis does not begin at 0",
    ]
    return _figure(title, ", ".join(filter(None, remarks)), drawn)


def lines(curve: Curve, title: str, key: str) -> Html:
    """A curve with a legend and, to be unfolded, its values as a table.

    Args:
        curve: Where a series has no value its line goes on to the next one, for series may be measured at other places; a value
            that is not finite interrupts it. Points at or below 0 are left out on a logarithmic axis.
        title: Of the plot.
        key: Of its elements' ids, unlike any other on the page.
    """
    shown = [x for x in curve.x if math.isfinite(x) and (x > 0 or not curve.log_x)]
    values = [v for series in curve.series.values() for v in series if v is not None and math.isfinite(v)]
    if not shown or not values:
        return _figure(title, curve.y_label, tag("p", "There is no value to draw."))
    x_scale = _Scale(min(shown), max(shown), _LEFT, WIDTH - _RIGHT, log=curve.log_x)
    margin = (max(values) - min(values)) * 0.06 or abs(max(values)) * 0.1 or 1.0
    y_scale = _Scale(min(values) - margin, max(values) + margin, HEIGHT - _BOTTOM, _TOP)
    parts = []
    y_ticks = _ticks(y_scale.low, y_scale.high, 5)
    for t, text in zip(y_ticks, _tick_texts(y_ticks), strict=True):
        parts.append(_line(_LEFT, y_scale(t), WIDTH - _RIGHT, y_scale(t), "grid"))
        parts.append(_text(_LEFT - 5, y_scale(t) + 4, text, "end"))
    x_ticks = _log_ticks(shown) if curve.log_x else _ticks(x_scale.low, x_scale.high, 6)
    for t, text in zip(x_ticks, _tick_texts(x_ticks), strict=True):
        parts.append(_line(x_scale(t), HEIGHT - _BOTTOM, x_scale(t), HEIGHT - _BOTTOM + 4, "axis"))
        parts.append(_tick(x_scale(t), HEIGHT - _BOTTOM + 16, text))
    parts.append(_line(_LEFT, HEIGHT - _BOTTOM, WIDTH - _RIGHT, HEIGHT - _BOTTOM, "axis"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 4, _fit(curve.x_label, WIDTH - _LEFT), "middle"))
    for place, series in enumerate(curve.series.values()):
        points = [
            (x_scale(x), y_scale(v)) if math.isfinite(v) else None
            for x, v in zip(curve.x, series, strict=True)
            if v is not None and math.isfinite(x) and (x > 0 or not curve.log_x)
        ]
        parts.append(_series(points, place))
    entries = [
        tag("li", _svg_part(_series([(2.0, 6.0), (13.0, 6.0), (24.0, 6.0)], place, only_middle=True), 26, 12), name)
        for place, name in enumerate(curve.series)
    ]
    legend = tag("ul", *entries, class_="legend") if len(entries) > 1 else None
    said = " ".join(_course(name, curve.x, series) for name, series in curve.series.items())
    drawn = _svg(key, title, f"{curve.y_label} over {curve.x_label}. {said}", HEIGHT, parts)
    return _figure(title, curve.y_label, drawn, legend, _values(curve, title))


def _figure(title: str, remark: str, *parts: Html | None) -> Html:
    return tag("figure", tag("figcaption", tag("strong", title), tag("span", remark)), *parts)


class _Scale:
    """Values to places."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
        self.low, self.high = low, high
        self._start, self._end, self._log = start, end, log

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self._log else v for v in (self.low, self.high, value))
        return self._start + (value - low) / (high - low) * (self._end - self._start)


def _series(points: Sequence[tuple[float, float] | None], place: int, *, only_middle: bool = False) -> Html:
    """Line and markers; the line is interrupted where a point is missing."""
    color = f"s{place % _COLORS + 1}"
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    path = " ".join("M" + " L".join(f"{_r(x)} {_r(y)}" for x, y in run) for run in runs if len(run) > 1)
    drawn = [tag("path", d=path, class_=f"line {color}")] if path else []
    marked = [run[len(run) // 2] for run in runs if run] if only_middle else [p for run in runs for p in run]
    # A point alone would not be seen without its marker, however many there are.
    alone = [run[0] for run in runs if len(run) == 1]
    for x, y in marked if len(marked) <= _MARKED else alone:
        drawn.append(_marker(x, y, place, color))
    return join(*drawn)


def _marker(x: float, y: float, place: int, color: str) -> Html:
    class_ = f"fill {color}"
    match (place + place // _COLORS) % 3:
        case 0:
            return tag("circle", cx=_r(x), cy=_r(y), r=3, class_=class_)
        case 1:
            return tag("rect", x=_r(x - 2.8), y=_r(y - 2.8), width=5.6, height=5.6, class_=class_)
        case _:
            return tag("path", d=f"M{_r(x)} {_r(y - 3.8)} l3.8 6.6 h-7.6 z", class_=class_)


def _values(curve: Curve, title: str) -> Html:
    """What is drawn, in numbers; of long curves evenly spaced points."""
    step = -(-len(curve.x) // 100)
    chosen = sorted({*range(0, len(curve.x), step), len(curve.x) - 1})
    columns = [column([series[i] for i in chosen]) for series in (curve.x, *curve.series.values())]
    rows = [
        tag("tr", tag("th", x, scope="row"), *(tag("td", value, class_="n") for value in values))
        for x, *values in zip(*columns, strict=True)
    ]
    named = (tag("th", name, scope="col", class_="n") for name in curve.series)
    head = tag("tr", tag("th", curve.x_label, scope="col"), *named)
    caption = f"{title}: {curve.y_label}" + ("" if step == 1 else f"; one point of {step}")
    table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *rows))
    scroll = tag("div", table, class_="scroll", tabindex="0", role="group", aria_label=f"Values of {title}")
    return tag("details", tag("summary", "Values"), scroll, class_="values")


def _said(label: str, figure: Figure) -> str:
    between = interval(figure.low, figure.high)
    return f"{label}: {number(figure.value)}" + (f" ({between})" if between else "")


def _course(name: str, xs: Sequence[float], series: Sequence[float | None]) -> str:
    there = [(v, x) for v, x in zip(series, xs, strict=True) if v is not None and math.isfinite(v)]
    if not there:
        return f"{name}: no value."
    (first, x0), (last, x1), (low, x_low), (high, x_high) = there[0], there[-1], min(there), max(there)
    ends = f"{name}: {number(first)} at {number(x0)}, {number(last)} at {number(x1)}"
    return f"{ends}; lowest {number(low)} at {number(x_low)}, highest {number(high)} at {number(x_high)}."


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two ends."""
    raw = (high - low) / about
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw * 0.7)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(xs: Sequence[float]) -> list[float]:
    """The points themselves where they are few, else powers of ten with their halves and fifths."""
    low, high = min(xs), max(xs)
    if len(set(xs)) <= 8:
        kept: list[float] = []
        for x in sorted(set(xs)):
            if not kept or math.log(x / kept[-1]) > 0.09 * math.log(high / low):
                kept.append(x)
        return kept
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    return within if len(within) <= 8 else [t for t in within if math.log10(t) % 1 < 1e-9]


def _fit(text: str, width: float) -> str:
    """Text that is cut where it would be too long; all of it stands in the table and the description."""
    longest = int(width / 6.4)
    return text if len(text) <= longest else text[: longest - 3].rstrip() + "..."


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if max(map(abs, ticks), default=0.0) >= size:
            ticks = [t / (1e3 if suffix == "k" else size) for t in ticks]
            return [text + suffix for text in column(ticks)]
    return column(ticks)


def _tick(x: float, y: float, text: str) -> Html:
    """Below an axis; moved inwards where it would be cut off."""
    half = 3.6 * len(text)
    return _text(min(max(x, half), WIDTH - half), y, text, "middle")


def _svg(key: str, title: str, description: str, height: float, parts: Sequence[Html]) -> Html:
    return tag(
        "svg",
        tag("title", title, id=f"{key}-title"),
        tag("desc", description, id=f"{key}-desc"),
        *parts,
        viewBox=f"0 0 {WIDTH:g} {_r(height)}",
        role="img",
        aria_labelledby=f"{key}-title",
        aria_describedby=f"{key}-desc",
    )


def _svg_part(part: Html, width: int, height: int) -> Html:
    return tag("svg", part, viewBox=f"0 0 {width} {height}", width=width, height=height, aria_hidden="true")


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return tag("path", d=f"M{_r(x1)} {_r(y1)} L{_r(x2)} {_r(y2)}", class_=class_)


def _text(x: float, y: float, text: str, anchor: str, class_: str | None = None) -> Html:
    return tag("text", text, x=_r(x), y=_r(y), text_anchor=anchor, class_=class_)


def _r(value: float) -> str:
    return f"{value:.1f}"
