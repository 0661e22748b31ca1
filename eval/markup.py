"""How a report writes elements and numbers. Text is escaped because there is no way to put it into a page unescaped."""

import html
import math
import re
from collections.abc import Sequence


class Html(str):
    """Text that is HTML already; only `tag` and `join` make it."""

    __slots__ = ()


Child = str | None
"""None stands for nothing; a plain str is text."""

_EMPTY = frozenset({"meta", "br"})


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """An element.

    Args:
        name: As in "p".
        children: What is in it.
        attributes: `_` at the end of a name is left out (`class_`), others become `-`; None: not there.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>" + ("" if name in _EMPTY else f"{join(*children)}</{name}>"))


def join(*children: Child) -> Html:
    """Texts and elements after each other."""
    return Html("".join(c if isinstance(c, Html) else html.escape(c, quote=False) for c in children if c is not None))


def number(value: float | None, spread: float | None = None) -> str:
    """A number in as many digits as mean something, with commas between thousands.

    Args:
        value: Whole numbers of type int are written in full.
        spread: Half the width of its interval: two digits of that are shown. Without: up to four significant digits.
    """
    if value is None:
        return "not given"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if spread and math.isfinite(spread):
        # Of an interval of no width there is no end to the digits.
        return f"{value:,.{min(_decimals(spread, 2), _decimals(value, 5) if value else 8)}f}"
    if 0 < abs(value) < 1e-4:
        return f"{value:.3g}"
    whole, point, rest = f"{value:,.{_decimals(value, 4)}f}".partition(".")
    return whole + (point + rest).rstrip("0").rstrip(".")


def column(values: Sequence[float | None]) -> list[str]:
    """Numbers below each other: alike in their decimals; nothing where there is none."""
    texts = ["" if value is None else number(value) for value in values]
    decimals = max((len(text.partition(".")[2]) for text in texts if "e" not in text), default=0)
    return [
        f"{value:,.{decimals}f}" if isinstance(value, float) and re.fullmatch(r"[-\d,.]+", text) else text
        for value, text in zip(values, texts, strict=True)
    ]


def interval(low: float | None, high: float | None) -> str:
    """As in "1.02 to 1.05"; empty where there is none."""
    if low is None or high is None:
        return ""
    spread = (high - low) / 2
    return f"{number(low, spread)} to {number(high, spread)}"


def with_unit(name: str, unit: str) -> str:
    """A figure's name with its unit, where the name does not say it."""
    return name if unit in name else f"{name} ({unit})"


def _decimals(value: float, digits: int) -> int:
    return min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 8) if value else digits - 1
