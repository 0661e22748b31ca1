"""The report's commands, and its page in a browser where there is one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import in_a_browser
from commands import Outcome
from sample_records import hostile_record, lm_record, write_sample_report

from eval.records import Curve, Figure, Record, write_record
from eval.report import finish

Retro = Callable[..., Outcome]


def test_two_reports_are_compared_printed_and_added_to_a_third(retro: Retro, tmp_path: Path) -> None:
    for name, gain in (("a", 0.0), ("b", 0.01)):
        finish(tmp_path / name, *lm_record(gain=gain))
    done = retro("eval", "compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    assert done.code == 0, done.err
    (line,) = [
        x.split() for x in done.out.splitlines() if x.startswith("bits per byte, retrieval on") and x.endswith(" 120")
    ]
    assert float(line[-4]) < 0 < float(line[-2]) < 0.05
    page = (tmp_path / "c" / "report.html").read_text(encoding="utf-8")
    assert "bits per byte, retrieval on: b minus a" in page
    printed = json.loads(retro("eval", "compare", tmp_path / "a", tmp_path / "b", "--json").out)
    assert printed["figures"]["bits per byte, retrieval on: b minus a"]["value"] == pytest.approx(
        float(line[-5]), abs=1e-3
    )


def test_what_cannot_be_compared_is_one_line(retro: Retro, tmp_path: Path) -> None:
    for name, documents in (("a", 20), ("b", 19)):
        finish(tmp_path / name, *lm_record(documents=documents))
    done = retro("eval", "compare", tmp_path / "a", tmp_path / "b")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert "the units of a (20) and b (19) differ" in done.err
    assert retro("eval", "compare", tmp_path / "none").code == 2


def test_a_readme_is_filled_and_checked(retro: Retro, tmp_path: Path) -> None:
    finish(tmp_path / "report", *lm_record())
    readme = tmp_path / "README.md"
    readme.write_text("Results:\n<!-- results:lm-small.model -->\n<!-- /results -->\n", encoding="utf-8")
    assert retro("eval", "readme", readme, tmp_path / "report", "--check").code == 1
    assert retro("eval", "readme", readme, tmp_path / "report").code == 0
    assert "| bits per byte, retrieval on | 1.311 |" in readme.read_text(encoding="utf-8")
    assert retro("eval", "readme", readme, tmp_path / "report", "--check").code == 0


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hard_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sample records, a hostile one, and one with long words, many columns and long rows."""
    out = write_sample_report(tmp_path_factory.mktemp("report"))
    write_record(out, hostile_record()[0])
    wide = {f"a rather long column {i}": "https://" + "x" * 90 if i % 2 else i / 7 for i in range(14)}
    series: dict[str, tuple[float | None, ...]] = {
        f"series number {i} with a long name": tuple(float(i + x) for x in range(400)) for i in range(8)
    }
    record = Record(
        kind="leakage",
        name="A" * 150,
        figures={
            "one long word after another, " * 4: Figure(value=1e9, unit="%", low=-1e9, high=2e9, count=10**9),
            "x": Figure(value=0.0, unit="%"),
        },
        curves={
            "C" * 100: Curve(
                x_label="words upon words of a label " * 3,
                y_label="E" * 60,
                x=tuple(map(float, range(400))),
                series=series,
            )
        },
        rows={"Wide": [wide] * 3},
        configuration={"setting": "F" * 300},
    )
    finish(out, record)
    return out / "report.html"


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_runs_nothing_and_asks_for_nothing(
    browser: Any, hard_report: Path, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    requests: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto(hard_report.as_uri())
    page.eval_on_selector_all("details", "all => all.forEach(d => { d.open = true })")
    assert requests == [hard_report.as_uri()]
    assert said == []  # refused styles or scripts would be told here
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # Text of plots stays inside them.
    outside = """() => [...document.querySelectorAll('figure > svg text')].filter(text => {
        const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
        return box.left < frame.left - 1 || box.right > frame.right + 1;
    }).map(text => text.textContent)"""
    assert page.evaluate(outside) == []
    background, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (sum(map(int, background[4:-1].split(", "))) < sum(map(int, ink[4:-1].split(", ")))) == (scheme == "dark")
    page.close()


@in_a_browser
def test_tables_scroll_by_keyboard_and_details_open_by_it(browser: Any, hard_report: Path) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.goto(hard_report.as_uri())
    frame = page.locator("[aria-label='Wide']")
    frame.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    for _ in range(100):  # wait_for_function would evaluate a string inside the page, which its policy forbids
        if frame.evaluate("element => element.scrollLeft") > 0:
            break
        page.wait_for_timeout(50)
    assert frame.evaluate("element => element.scrollLeft") > 0
    summary = page.locator("summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None
    page.close()


@in_a_browser
def test_nothing_is_cut_off_in_print(browser: Any, hard_report: Path) -> None:
    page = browser.new_page(viewport={"width": 680, "height": 900}, color_scheme="dark")  # A4 within its margins
    page.goto(hard_report.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    cut = """() => [...document.querySelectorAll('table, pre, figure')].filter(element =>
        element.getClientRects().length && element.getBoundingClientRect().right > innerWidth + 1
        ).map(element => element.textContent)"""
    assert page.evaluate(cut) == []
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 29, 31)"
    assert page.locator("details.repeat pre").first.is_visible()
    page.close()


@in_a_browser
def test_axe_finds_nothing_serious(browser: Any, hard_report: Path) -> None:
    """Where axe-core is installed beside node's modules or named in AXE_CORE."""
    script = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))
    if not script.is_file():
        pytest.skip("needs axe-core (npm pack axe-core; AXE_CORE=.../axe.min.js)")
    for width, scheme in ((360, "light"), (1280, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
        page = context.new_page()
        page.goto(hard_report.as_uri())
        page.eval_on_selector_all("details", "all => all.forEach(d => { d.open = true })")
        page.evaluate(script.read_text(encoding="utf-8"))
        found = page.evaluate("axe.run()")["violations"]
        assert [(f["impact"], f["id"], f["nodes"][0]["html"]) for f in found] == []
        context.close()
