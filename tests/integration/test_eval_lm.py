"""`retro eval lm` on a trained model, its baseline and a model of Hugging Face."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from commands import command, done, refused

from eval.records import read_records, read_units

SMALL = ["steps=4", "seq_len=128", "batch_size=2", "micro_batch_size=2", "log_every=2", "eval_every=4", "save_every=4"]
SIZES = ["dim=16", "encoder_dim=16", "num_heads=2", "head_dim=8", "ffw_dim=32", "encoder_heads=2", "encoder_head_dim=8"]


@pytest.fixture(scope="module")
def made(paragraphs: list[dict[str, Any]], tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 25 paragraphs, two models trained on them, and 8 other paragraphs to measure on."""
    folder = tmp_path_factory.mktemp("lm")
    for name, few in (("wiki", paragraphs[:25]), ("test", paragraphs[25:33])):
        text = "".join(json.dumps(record) + "\n" for record in few)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    done("index", "build", folder / "wiki.jsonl", "--out", folder / "wiki.index", "--encoder", tiny_encoder)
    done("tokenizer", "train", folder / "wiki.jsonl", "--vocab-size", 400, "--out", folder / "wiki.tok")
    options = ["--tokenizer", folder / "wiki.tok", "--index", folder / "wiki.index", "--out", folder / "wiki.data"]
    done("data", folder / "wiki.jsonl", *options, "--valid-share", 0.2)
    settings = [f"train.{s}" for s in SMALL] + [f"model.{s}" for s in SIZES] + ["train.sample_tokens=0"]
    sets = [word for setting in settings for word in ("--set", setting)]
    for name, more in (("retro", []), ("plain", ["--set", "model.cca_layers=[]"])):
        train = ["train", "--preset", "tiny", "--data", folder / "wiki.data", "--out", folder / f"{name}.model"]
        done(*train, *sets, *more)
    return folder


def test_a_model_is_measured_with_retrieval_on_off_shuffled_and_beside_its_baseline(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    options = ["--index", made / "wiki.index", "--baseline", made / "plain.model", "--modes", "on,off,shuffled,oracle"]
    outcome = done(
        "eval",
        "lm",
        made / "retro.model",
        made / "test.jsonl",
        *options,
        "--sweep",
        "1,4",
        "--overlap",
        "--out",
        out,
        "--json",
    )
    record = json.loads(outcome.out)
    bits = {name: figure["value"] for name, figure in record["figures"].items() if name.startswith("bits per byte")}
    for mode in ("on", "off", "shuffled", "oracle"):
        assert 0 < bits[f"bits per byte, retrieval {mode}"] < 20
    path, read = next(iter(read_records(out).items()))
    units = read_units(path, read)
    assert len(units["id"]) == 8
    for mode in ("on", "off", "shuffled", "oracle"):
        total = math.fsum(units[f"loss_{mode}_nats"]) / math.log(2) / sum(units["bytes"])
        assert bits[f"bits per byte, retrieval {mode}"] == pytest.approx(total, rel=1e-12)
    curve = record["curves"]["Allowed overlap of a chunk and its neighbors"]
    assert set(curve["series"]) == {
        "retrieval on",
        "retrieval off",
        "retrieval shuffled",
        "retrieval oracle",
        "baseline",
    }
    assert curve["series"]["retrieval on"][-1] == pytest.approx(bits["bits per byte, retrieval on"], rel=1e-9)
    assert curve["series"]["baseline"][-1] == pytest.approx(bits["bits per byte, baseline"], rel=1e-9)
    table = record["rows"]["Allowed overlap of a chunk and its neighbors"]
    assert [row["retrieval on"] for row in table] == curve["series"]["retrieval on"]
    assert [row["chunks"] for row in table] == sorted(row["chunks"] for row in table)
    whole = table[-1]
    interval = record["figures"]["bits per byte, retrieval on"]
    ends = [whole["retrieval on, from"], whole["retrieval on, to"]]
    assert ends == pytest.approx([interval["low"], interval["high"]], rel=1e-9)
    for other, name in (("retrieval off", "retrieval off"), ("baseline", "baseline")):
        difference = whole["retrieval on"] - bits[f"bits per byte, {name}"]
        assert whole[f"on less {other}"] == pytest.approx(difference, abs=1e-9)
        assert whole[f"on less {other}, from"] <= difference <= whole[f"on less {other}, to"]
    sweep = record["curves"]["Number of neighbors"]
    assert sweep["x"] == [1, 2, 4]
    assert sweep["series"]["retrieval on"][1] == bits["bits per byte, retrieval on"]
    assert (out / "report.html").is_file()
    assert read.fingerprints["model"] != read.fingerprints["baseline"]


def test_a_baseline_is_measured_over_the_tokens_that_can_see_neighbors_too(made: Path) -> None:
    """A model beside itself with retrieval off has the same figures twice."""
    options = ["--index", made / "wiki.index", "--modes", "on,off", "--baseline", made / "retro.model", "--json"]
    figures = json.loads(done("eval", "lm", made / "retro.model", made / "test.jsonl", *options).out)["figures"]
    seeing = ", tokens that can see neighbors"
    names = (
        ("bits per byte, baseline", "bits per byte, retrieval off"),
        ("retrieval on against baseline", "retrieval on against off"),
    )
    for first, second in names:
        for which in ("", seeing):
            assert figures[first + which] == figures[second + which]
        assert figures[first]["value"] != figures[first + seeing]["value"]


def test_k_0_is_retrieval_off_and_needs_no_index(made: Path) -> None:
    record = json.loads(done("eval", "lm", made / "retro.model", made / "test.jsonl", "-k", 0, "--json").out)
    off = json.loads(done("eval", "lm", made / "retro.model", made / "test.jsonl", "--modes", "off", "--json").out)
    assert record["figures"] == off["figures"]
    assert not any("retrieval on" in name for name in record["figures"])


def test_what_is_printed_for_people_holds_every_figure(made: Path) -> None:
    outcome = done("eval", "lm", made / "plain.model", made / "test.jsonl", "--modes", "off", "--limit", 3)
    assert outcome.out.startswith("bits per byte, retrieval off")
    assert "bits per byte  [" in outcome.out
    assert "perplexity per word, retrieval off" in outcome.out


def test_last_words_are_counted(made: Path, tmp_path: Path) -> None:
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"text": "the cat sat on the mat"}\n{"text": "a dog and another dog"}\n', encoding="utf-8")
    options = ["--modes", "off", "--last-words", passages, "--json"]
    record = json.loads(done("eval", "lm", made / "retro.model", made / "test.jsonl", *options).out)
    assert record["figures"]["last words found"]["count"] == 2


def test_what_cannot_be_measured_is_refused(made: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    test = made / "test.jsonl"
    refused(command("eval", "lm", made / "retro.model", empty, "--modes", "off"), "no document")
    refused(command("eval", "lm", made / "retro.model", test), "--index")
    refused(command("eval", "lm", made / "plain.model", test, "--index", made / "wiki.index"), "made without retrieval")
    refused(command("eval", "lm", made / "retro.model", test, "--modes", "off", "--window", 100), "multiples")
    refused(command("eval", "lm", tmp_path / "nothing.model", test, "--modes", "off"), "nothing.model")
    assert command("eval", "lm", made / "retro.model", test, "--modes", "sideways").code == 2
