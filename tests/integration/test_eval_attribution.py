"""`retro eval attribution` on a trained model: its record, its page, its picture."""

import html.parser
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import speak_up, toy_model_config

from eval.attribution import Attribution
from eval.attribution_page import heat_map, page
from eval.records import read_records, read_units
from retro.attribution import Attended, Reading, Source
from retro.checkpoint import save_model
from retro.model import Retro
from retro.tokenizer import Tokenizer

Command = Callable[..., Any]
PROMPT = "In October 1973 the members of the Organization of Arab Petroleum"


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with random weights, large enough that passages move tokens."""
    tokenizer = Tokenizer.load(str(tokenizer_folder))
    network = Retro(toy_model_config(vocab_size=tokenizer.vocab_size, cca_layers=(1, 2), chunk_len=16))
    speak_up(network)
    folder = tmp_path_factory.mktemp("model") / "toy.model"
    save_model(folder, network, tokenizer)
    return folder


class Page(html.parser.HTMLParser):
    """Elements by name, and the text of the section that stands below a heading."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, str] = {}
        self._heading, self._inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        self._inside = tag if tag in ("h2", "style") else "p" if ("class", "read") in attrs else self._inside
        if tag == "h2":
            self._heading = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h2", "p", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "h2":
            self._heading += data
        elif self._inside == "p":
            self.texts[self._heading] = self.texts.get(self._heading, "") + data


def test_a_continuation_is_attributed_and_added_to_the_report(
    retro: Command, model: Path, tiny_index: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    options = ["--index", tiny_index, "-k", 3, "--generate", 20, "--out", out, "--device", "cpu"]
    outcome = retro("eval", "attribution", model, PROMPT, *options, "--json")
    assert outcome.code == 0, outcome
    shown = json.loads(outcome.out)
    path, record = next(iter(read_records(out).items()))
    assert (record.kind, record.name) == ("attribution", "toy.model")
    assert shown["figures"] == {n: {**f} for n, f in json.loads(path.read_text())["figures"].items()}
    passages, tokens = record.rows["Passages"], record.rows["Output tokens"]
    assert sum(row["share of attention, %"] for row in passages) == pytest.approx(100)
    assert len(tokens) == 20
    units = read_units(path, record)
    for mode, loss in (("on", "log-probability, nats"), ("off", "without retrieval")):
        assert units[f"loss_{mode}_nats"] == pytest.approx([-row[loss] for row in tokens])
        mean = float(np.mean([row[loss] for row in tokens if row["most attended passage"]]))
        assert record.figures[f"log-probability per token, retrieval {mode}"].value == pytest.approx(mean)
    likelier = [row["added"] > 0 for row in tokens if row["most attended passage"]]
    value = record.figures["output tokens made likelier by retrieval"].value
    assert value == pytest.approx(100 * sum(likelier) / len(likelier))
    made = out / "attribution" / f"{path.stem}.html"
    read = Page(made.read_text(encoding="utf-8"))
    assert read.texts["Output"].startswith(PROMPT)
    for row in passages:
        assert row["most attended"] in row["text"]
        assert read.texts[f"Passage {row['passage']}: {row['title']}"] == row["text"]
    assert ET.parse(made.with_suffix(".svg")).getroot().tag.endswith("svg")
    assert str(made) in outcome.err
    assert "Attribution" in (out / "report.html").read_text(encoding="utf-8")


def test_a_text_is_attributed_as_it_stands(retro: Command, model: Path, tiny_index: Path) -> None:
    text = PROMPT + " Exporting Countries proclaimed an oil embargo against several nations of the world."
    outcome = retro("eval", "attribution", model, text, "--index", tiny_index, "--device", "cpu")
    assert outcome.code == 0, outcome
    assert outcome.out.startswith("log-probability per token, retrieval on")
    assert "% attention" in outcome.out
    hybrid = retro("eval", "attribution", model, text, "--index", tiny_index, "--retriever", "bm25", "--device", "cpu")
    assert hybrid.code == 0, hybrid
    assert hybrid.out != outcome.out


def test_what_cannot_be_attributed_is_refused(retro: Command, model: Path, tiny_index: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.model"
    tokenizer = Tokenizer.load(str(model))
    save_model(plain, Retro(toy_model_config(vocab_size=tokenizer.vocab_size, cca_layers=())), tokenizer)
    for arguments, message in (
        ((model, "short"), "--generate"),
        ((model, "  "), "the text is empty"),
        ((model, PROMPT, "-k", 0), "num_neighbors"),
        ((plain, PROMPT), "made without retrieval"),
        ((tmp_path / "none.model", PROMPT), "none.model"),
    ):
        outcome = retro("eval", "attribution", *arguments, "--index", tiny_index, "--device", "cpu")
        assert outcome.code == 1, outcome
        assert message in outcome.err
        assert len(outcome.err.splitlines()) == 1, outcome.err


def hostile() -> Attribution:
    """Texts that would be markup, or formulas, or that no font has."""
    tokenizer = Tokenizer.train(["toy"], 258)
    text = "</p><script>alert(1)</script> $\\frac$ \u4e2d\U0001f408 &amp;"
    passage = '<img src=x onerror="alert(2)"> $\\frac$ &lt;'
    ids = (tokenizer.bos_id, *tokenizer.encode(text).ids.tolist())
    n, spans = len(ids) - 1, tokenizer.encode(passage).spans
    spans_n2 = tokenizer.encode(text).spans
    first, end = text.index("$"), text.rindex("$") + 1  # one token of its own
    spans_n2[first + 1 : end] = end
    spans_n2[first, 1] = end
    random = np.random.default_rng(0)
    share = random.random((2, n, 1, len(spans)))
    attended = Attended(
        reading=Reading(ids=ids, lead=0, sources=(Source(passage, 0, "k", "<b>&</b>"),), chunks={0: (0,)}),
        text=text,
        spans_n2=spans_n2,
        source_spans=(spans,),
        source_nK=np.zeros((n, 1), np.int64),
        share_JnKR=share / share.sum(axis=(2, 3), keepdims=True),
    )
    return Attribution(
        attended=attended,
        log_prob_n=-random.random(n),
        off_n=-random.random(n),
        without_Pn=-random.random((1, n)),
    )


def test_texts_stay_texts_on_the_page_and_in_the_picture(tmp_path: Path) -> None:
    found = hostile()
    text = page(found, "<i>name</i>")
    read = Page(text)
    assert {"script", "i", "b"}.isdisjoint(read.names)
    assert read.names.count("img") == 1  # the heat map
    assert not [name for name, _ in read.attributes if name.startswith("on") or name == "style"]
    assert not [
        value
        for name, value in read.attributes
        if name in ("src", "href") and not str(value).startswith(("data:", "#"))
    ]
    assert read.texts["Output"] == found.attended.text
    assert read.texts["Passage 1: <b>&</b>"] == found.attended.reading.sources[0].text
    for kind in ("png", "svg"):
        heat_map(found, tmp_path / f"map.{kind}")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    root = ET.parse(tmp_path / "map.svg").getroot()
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    first = (tmp_path / "map.svg").read_bytes()
    heat_map(found, tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_bytes() == first


def test_words_are_shaded_by_what_retrieval_did_to_them() -> None:
    found = hostile()
    read = [
        value for name, value in Page(page(found, "n")).attributes if name == "title" and str(value).endswith("nats")
    ]
    words = found.attended.text.split()
    ends = [found.attended.text.index(word) + len(word) for word in words]
    starts = [0, *ends[:-1]]
    expected = [
        float(found.delta_n[(found.attended.spans_n2[:, 0] >= a) & (found.attended.spans_n2[:, 0] < b)].sum())
        for a, b in zip(starts, ends, strict=True)
    ]
    assert read == [f"{value:+.2f} nats" for value in expected]
