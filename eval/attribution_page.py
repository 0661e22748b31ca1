"""Pictures of an attribution: a heat map of output tokens and passages, and a page of the texts themselves, shaded.

The page is self-contained, without JavaScript and without any request; shades are classes, so that its policy allows no style
but its own.
"""

import base64
import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.attribution import Attribution
from eval.markup import Html, join, number, tag
from retro.artifact import write_atomically
from retro.attribution import answer_span

LEVELS = 6
"""Shades of one color."""
_LABELED = 80
"""Output tokens up to which each has its label in the heat map."""
_TINTS = {"up": "31 95 168", "down": "196 88 10", "share": "26 127 75"}
_STYLE = (
    "".join(
        f".{name}{level} {{ background: rgb({color} / {0.075 * level:.3f}); }}\n"
        for name, color in _TINTS.items()
        for level in range(1, LEVELS + 1)
    )
    + "".join(f".down{level} {{ border-bottom: 1px dashed currentColor; }}\n" for level in range(1, LEVELS + 1))
    + ".read { white-space: pre-wrap; max-width: 44rem; line-height: 1.8; }\n.given { color: var(--soft); }\n"
    "u { text-decoration-thickness: 2px; text-underline-offset: .2em; }\nimg { max-width: 100%; height: auto; }\n"
)


def write_page(path: Path, attribution: Attribution, title: str) -> None:
    """Writes the page of an attribution.

    Raises:
        StorageError: It cannot be written.
    """
    text = page(attribution, title)
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "replace")))


def page(attribution: Attribution, title: str) -> str:
    """The output, the passages in the order of what they added, and the heat map."""
    style = Html(resources.files("eval").joinpath("report.css").read_text(encoding="utf-8") + _STYLE)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"Attribution: {title}"),
        tag("style", style),
    )
    body = tag("body", tag("main", tag("h1", f"Attribution: {title}"), fragment(attribution)))
    return "<!DOCTYPE html>\n" + tag("html", head, "\n", body, lang="en") + "\n"


def fragment(attribution: Attribution) -> Html:
    """What stands in the page's body; its classes are those of the page's style."""
    rows = attribution.to_rows()
    order = sorted(range(len(rows)), key=lambda p: -rows[p]["added log-probability, nats"])
    picture = io.BytesIO()
    draw(attribution, picture, "png")
    drawn = tag(
        "img",
        src="data:image/png;base64," + base64.b64encode(picture.getvalue()).decode(),
        alt="Heat map of the output tokens and the passages; the table above has the passages' figures.",
    )
    return join(
        _output(attribution),
        _table(rows, order),
        *(_passage(attribution, p, rows[p]) for p in order),
        tag("section", tag("h2", "Output tokens and passages"), drawn),
    )


def _output(attribution: Attribution) -> Html:
    """The text, word by word, shaded by what retrieval did to its log-probability."""
    attended = attribution.attended
    words = [match.span() for match in re.finditer(r"\s*\S+|\s+$", attended.text)]
    starts = np.array([start for start, _ in words])
    place_n = np.searchsorted(starts, attended.spans_n2[:, 0], side="right") - 1
    moved_W = np.bincount(place_n.clip(0), weights=attribution.delta_n * attended.sees_n, minlength=len(words))
    sees_W = np.bincount(place_n.clip(0), weights=attended.sees_n, minlength=len(words)) > 0
    begin = attended.spans_n2[attended.answer][:1, 0].sum() if attended.reading.given > 1 else 0
    top = max(float(np.abs(moved_W).max()), 1e-9) if words else 1.0
    parts: list[Html] = []
    for (start, end), moved, sees in zip(words, moved_W.tolist(), sees_W.tolist(), strict=True):
        names = (
            [f"{'up' if moved > 0 else 'down'}{_level(abs(moved), top)}"] if sees and _level(abs(moved), top) else []
        )
        names += ["given"] if end <= begin else []
        parts.append(
            tag(
                "span",
                attended.text[start:end],
                class_=" ".join(names) or None,
                title=f"{moved:+.2f} nats" if sees else None,
            )
        )
    about = (
        f"Blue: passages made the word likelier; orange and dashed: less likely; the darkest is {top:.2f} nats. "
        "Words that saw no passage have no shade."
    )
    return tag("section", tag("h2", "Output"), tag("p", about, class_="meta"), tag("p", join(*parts), class_="read"))


def _table(rows: Sequence[dict[str, Any]], order: Sequence[int]) -> Html:
    columns = ("passage", "title", "chunks", "share of attention, %", "added log-probability, nats")
    cells = [
        tag(
            "tr",
            tag("th", tag("a", number(rows[p]["passage"]), href=f"#p{p + 1}"), scope="row"),
            *(
                tag(
                    "td", rows[p][c] if isinstance(rows[p][c], str) else number(rows[p][c]), class_=_numeric(rows[p][c])
                )
                for c in columns[1:]
            ),
        )
        for p in order
    ]
    head = tag("thead", tag("tr", *(tag("th", c, scope="col") for c in columns)))
    table = tag("table", tag("caption", "Passages"), head, tag("tbody", *cells))
    return tag("section", tag("div", table, class_="scroll", tabindex="0", role="group", aria_label="Passages"))


def _numeric(value: object) -> str | None:
    return None if isinstance(value, str) else "n"


def _passage(attribution: Attribution, p: int, row: dict[str, Any]) -> Html:
    """A passage's text, token by token, shaded by its share of the answer's attention; the best window is underlined."""
    attended = attribution.attended
    source = attended.reading.sources[p]
    share_r = attended.token_shares(p)[attended.answer].sum(axis=0)
    top = max(float(share_r.max(initial=0.0)), 1e-12)
    span = answer_span(attended, p)
    best = (-1, -1) if span is None else (span[0] + source.start, span[1] + source.start)
    parts: list[Html] = []
    done = 0
    for (start, end), share in zip(attended.source_spans[p].tolist(), share_r, strict=False):
        level = _level(float(share), top)
        piece = tag("span", source.text[max(start, done) : end], class_=f"share{level}" if level else None)
        parts += [tag("span", source.text[done:start])] if start > done else []
        parts.append(tag("u", piece) if best[0] <= start and end <= best[1] else piece)
        done = max(done, end)
    rest = source.text[done:]
    parts += [tag("span", rest, class_="given")] if rest else []
    name = f"p{p + 1}"
    about = (
        f"{number(row['share of attention, %'])}% of the attention, "
        f"{row['added log-probability, nats']:+.2f} nats beside the others. Darker: more attention."
    )
    return tag(
        "section",
        tag("h2", f"Passage {p + 1}: {row['title']}" if row["title"] else f"Passage {p + 1}", id=f"{name}-name"),
        tag("p", about, class_="meta"),
        tag("p", join(*parts), class_="read"),
        id=name,
        aria_labelledby=f"{name}-name",
    )


def _level(value: float, top: float) -> int:
    """The shade of a value, 0 for none: below a twelfth of the highest nothing is shown."""
    return min(LEVELS, round(LEVELS * value / top)) if math.isfinite(value) else 0


# --- the heat map -------------------------------------------------------------------------------------------------


def heat_map(attribution: Attribution, path: Path) -> None:
    """Draws the answer's output tokens (columns) and the passages (rows): attention above, leave-one-out below.

    Args:
        attribution: See Attribution.
        path: Ends in .svg or .png.

    Raises:
        StorageError: It cannot be written.
    """
    write_atomically(path, lambda file: draw(attribution, file, path.suffix.removeprefix(".")))


def draw(attribution: Attribution, file: Any, kind: str) -> None:
    """As `heat_map`, into an open file, as "svg" or "png"."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    attended = attribution.attended
    answer = attended.answer
    labels = [attended.text[slice(*span)] for span in attended.spans_n2[answer]]
    n, P = len(labels), len(attended.reading.sources)
    figure = Figure(figsize=(min(4 + 0.16 * n, 16), 2.2 + 0.44 * min(P, 40)), dpi=110, layout="constrained")
    upper, lower = FigureCanvasAgg(figure).figure.subplots(2, 1, sharex=True)
    delta_Pn = attribution.passage_deltas()[:, answer]
    top = max(float(np.abs(delta_Pn).max(initial=0.0)), 1e-9)
    share_Pn = attended.passage_shares()[answer].T
    _panel(figure, upper, 100 * share_Pn, "share of attention, %", cmap="Greens", vmin=0.0)
    _panel(figure, lower, delta_Pn, "added by the passage, nats", cmap="PuOr", vmin=-top, vmax=top)
    if n <= _LABELED:
        lower.set_xticks(range(n), [repr(label)[1:-1] for label in labels], rotation=90, fontsize=7)
        for drawn in lower.get_xticklabels():
            drawn.set_parse_math(False)  # a text may hold $
    else:
        lower.set_xlabel("output token")
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": "attribution"}):
        warnings.filterwarnings("ignore", message="Glyph")  # no font has every character
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})


def _panel(figure: Any, axes: Any, value_Pn: NDArray[np.float64], title: str, **options: Any) -> None:
    P = len(value_Pn)
    image = axes.imshow(value_Pn, aspect="auto", interpolation="nearest", **options)
    step = -(-P // 40)
    axes.set_yticks(range(0, P, step), [str(p + 1) for p in range(0, P, step)], fontsize=7)
    axes.set_ylabel("passage")
    axes.set_title(title, fontsize=9, loc="left")
    figure.colorbar(image, ax=axes)
