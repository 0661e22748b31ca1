"""Comparisons of records, and tables of records in a text."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sample_records import lm_record, qa_record, retrieval_record, write_sample_report

from eval.compare import compare
from eval.metrics import paired_bootstrap
from eval.readme import fill
from eval.records import Figure, Record, write_record
from retro.errors import ConfigError, FormatError, MismatchError


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_report(tmp_path_factory.mktemp("report"))


# --- compare ------------------------------------------------------------------------------------------------------


def two_models(folder: Path, seeds: tuple[int, ...] = (0,)) -> tuple[Path, Path]:
    for seed in seeds:
        write_record(folder / "a", *lm_record(seed=seed))
        write_record(folder / "b", *lm_record("other.model", seed=seed, gain=0.01))
    return folder / "a", folder / "b"


def test_a_difference_is_that_of_the_paired_bootstrap_over_the_units(tmp_path: Path) -> None:
    found = compare(two_models(tmp_path), resamples=500)
    _, a = lm_record()
    _, b = lm_record(gain=0.01)
    bits = [np.array(units["loss_on_nats"]) / math.log(2) for units in (a, b)]
    expected = paired_bootstrap(bits[1], bits[0], np.array(a["bytes"]), resamples=500)
    figure = found.figures["bits per byte, retrieval on: b minus a"]
    assert (figure.value, figure.low, figure.high) == pytest.approx(
        (expected.value, expected.low, expected.high), rel=1e-9
    )
    assert figure.count == 120
    (row,) = [row for row in found.rows["Paired tests"] if row["measure"] == "bits per byte, retrieval on"]
    assert row["p"] == expected.p_value
    assert row["of the first"] == pytest.approx(lm_record()[0].figures["bits per byte, retrieval on"].value, rel=1e-12)
    (side,) = [row for row in found.rows["lm"] if row["figure"] == "bits per byte, retrieval on"]
    assert side["a"] == pytest.approx(row["of the first"], rel=1e-12)
    assert side["b"] == pytest.approx(row["of the second"], rel=1e-12)


def test_units_are_paired_by_id_whatever_their_order(tmp_path: Path) -> None:
    a, b = two_models(tmp_path)
    record, units = lm_record("other.model", gain=0.01)
    order = np.random.default_rng(0).permutation(120)
    write_record(tmp_path / "c", record, {name: [values[i] for i in order] for name, values in units.items()})
    straight = compare([a, b], resamples=200).figures["bits per byte, retrieval on: b minus a"]
    assert compare([a, tmp_path / "c"], resamples=200).figures["bits per byte, retrieval on: c minus a"] == straight


def test_records_that_differ_in_their_seeds_only_become_one_with_mean_and_deviation(tmp_path: Path) -> None:
    found = compare(two_models(tmp_path, seeds=(0, 1, 2)), resamples=100)
    values = [lm_record(seed=seed)[0].figures["bits per byte, retrieval off"].value or 0.0 for seed in (0, 1, 2)]
    (row,) = [row for row in found.rows["lm"] if row["figure"] == "bits per byte, retrieval off"]
    assert row["a (3 seeds)"] == pytest.approx(np.mean(values), rel=1e-12)
    assert row["a (3 seeds), standard deviation"] == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    losses = [np.mean([lm_record(seed=s, gain=g)[1]["loss_on_nats"] for s in (0, 1, 2)], axis=0) for g in (0.0, 0.01)]
    expected = (losses[1] - losses[0]).sum() / sum(lm_record()[1]["bytes"]) / math.log(2)
    figure = found.figures["bits per byte, retrieval on: b (3 seeds) minus a (3 seeds)"]
    assert figure.value == pytest.approx(expected, rel=1e-9)


def test_of_a_measurement_made_twice_the_newest_counts(tmp_path: Path) -> None:
    a, b = two_models(tmp_path)
    record, units = lm_record()
    changed = replace(record, figures={"bits per byte, retrieval on": Figure(value=7.0, unit="bits per byte")})
    write_record(a, changed, units)
    (row,) = [r for r in compare([a, b], resamples=10).rows["lm"] if r["figure"] == "bits per byte, retrieval on"]
    assert row["a"] == 7.0


def test_answers_and_passages_are_compared_by_their_means(tmp_path: Path) -> None:
    for name, gain in (("a", 0.0), ("b", 0.05)):
        write_record(tmp_path / name, *qa_record(gain=gain))
        write_record(tmp_path / name, *retrieval_record())
    found = compare([tmp_path / "a", tmp_path / "b"], resamples=100)
    first, second = (np.mean(qa_record(gain=gain)[1]["em"]) for gain in (0.0, 0.05))
    assert found.figures["exact match: b minus a"].value == pytest.approx(100 * (second - first), rel=1e-9)
    same = found.figures["hit@10: b minus a"]
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert {row["measure"] for row in found.rows["Paired tests"]} == {"exact match", "F1", "hit@1", "hit@10"}


def test_the_share_of_identical_answers_is_counted_over_questions_that_both_answered(tmp_path: Path) -> None:
    """As of a model and its copy in 8 bits."""
    record, units = qa_record(questions=200)
    said = [f"answer {i}" for i in range(200)]
    other = [None if i < 20 else f"other {i}" if i < 29 else said[i] for i in range(200)]
    order = np.random.default_rng(0).permutation(200)
    write_record(tmp_path / "a", record, {**units, "answer_retrieval": said, "answer_closed": [None] * 200})
    shuffled = {name: [values[i] for i in order] for name, values in {**units, "answer_retrieval": other}.items()}
    write_record(tmp_path / "b", replace(record, name="int8.model"), shuffled)
    found = compare([tmp_path / "a", tmp_path / "b"], resamples=500).figures
    figure = found["identical answers, retrieval: a and b"]
    assert figure.value is not None
    assert figure.value == pytest.approx(100 * 171 / 180)
    assert figure.count == 180
    assert figure.low is not None
    assert figure.high is not None
    # A share of 95% of 180 has a standard deviation of 1.6%.
    assert figure.value - figure.low == pytest.approx(1.96 * 1.62, rel=0.3)
    assert figure.high > figure.value
    assert [name for name in found if name.startswith("identical")] == ["identical answers, retrieval: a and b"]


def test_a_knn_lm_is_compared_with_a_language_model(tmp_path: Path) -> None:
    record, units = lm_record()
    write_record(tmp_path / "a", record, units)
    write_record(tmp_path / "b", replace(record, kind="knn-lm"), units)
    assert "bits per byte, retrieval on: b minus a" in compare([tmp_path / "a", tmp_path / "b"], resamples=10).figures


def test_several_records_of_one_folder_are_compared_and_files_too(tmp_path: Path) -> None:
    first = write_record(tmp_path, *lm_record())
    second = write_record(tmp_path, *lm_record("other.model", gain=0.01))
    inside = compare([tmp_path], resamples=10).figures
    name = f"{tmp_path.name}/lm-other.model-001"
    assert any(name in title for title in inside)
    assert (
        "bits per byte, retrieval on: lm-other.model-001 minus lm-small.model-001"
        in compare([first, second], resamples=10).figures
    )


def test_records_of_other_units_are_refused(tmp_path: Path) -> None:
    write_record(tmp_path / "a", *lm_record())
    write_record(tmp_path / "b", *lm_record(documents=119))
    with pytest.raises(
        MismatchError, match=r"units of a \(120\) and b \(119\) differ: 1 are in one .*, as wiki:119\. Measure both"
    ):
        compare([tmp_path / "a", tmp_path / "b"])


def test_where_some_pairs_have_the_same_units_the_others_are_named(tmp_path: Path) -> None:
    a, b = two_models(tmp_path)
    write_record(tmp_path / "c", *lm_record("third.model", documents=119))
    found = compare([a, b, tmp_path / "c"], resamples=10)
    assert {(row["first"], row["second"]) for row in found.rows["Paired tests"]} == {("a", "b")}
    assert [note for note in found.notes if note.startswith("Not tested: the units of a (120) and c (119)")]


def test_the_same_ids_with_other_texts_are_refused(tmp_path: Path) -> None:
    record, units = lm_record()
    write_record(tmp_path / "a", record, units)
    write_record(tmp_path / "b", record, {**units, "bytes": [n + 1 for n in units["bytes"]]})
    with pytest.raises(MismatchError, match="bytes of a and b differ"):
        compare([tmp_path / "a", tmp_path / "b"])


def test_an_id_twice_is_refused(tmp_path: Path) -> None:
    record, units = lm_record()
    for name in ("a", "b"):
        write_record(tmp_path / name, record, {**units, "id": [*units["id"][:-1], units["id"][0]]})
    with pytest.raises(MismatchError, match="have the same id twice"):
        compare([tmp_path / "a", tmp_path / "b"])


def test_one_record_of_each_kind_is_nothing_to_compare(tmp_path: Path) -> None:
    write_record(tmp_path / "a", *lm_record())
    write_record(tmp_path / "b", *qa_record())
    with pytest.raises(ConfigError, match=r"no two records of one kind to compare \(lm: a; qa: b\)"):
        compare([tmp_path / "a", tmp_path / "b"])


# --- tables in a text ---------------------------------------------------------------------------------------------

README = """# Title

<!-- results:lm-small.model -->
old
<!-- /results -->

Between.
<!-- results:retrieval-wiki.index-001.json#Methods -->
<!-- /results -->
"""


def test_tables_of_records_are_put_between_the_markers(report: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README, encoding="utf-8")
    with pytest.raises(
        MismatchError, match=r"differs from the records at lm-small\.model, retrieval-wiki\.index-001\.json"
    ):
        fill(readme, [report], check=True)
    assert readme.read_text(encoding="utf-8") == README
    assert fill(readme, [report]) == 2
    written = readme.read_text(encoding="utf-8").splitlines()
    assert "| bits per byte, retrieval on | 1.311 | 1.285 to 1.334 | 120 |" in written
    assert "| last words found (%) | 22.5 | 14.0 to 31.0 | 200 |" in written
    assert "| dense | 12.1 | 71.6 | 0.412 | 0.301 | 241.3 |" in written
    assert "old" not in written
    assert [line for line in written if line.startswith("Measured 20")]
    kept = re.sub(r"(results:\S+ -->\n).*?(<!-- /)", r"\1\2", readme.read_text(encoding="utf-8"), flags=re.S)
    assert kept == README.replace("old\n", "")
    assert fill(readme, [report], check=True) == 2
    before = readme.stat().st_mtime_ns
    fill(readme, [report])
    assert readme.stat().st_mtime_ns == before


def test_a_number_changed_by_hand_is_found(report: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README, encoding="utf-8")
    fill(readme, [report])
    readme.write_text(readme.read_text(encoding="utf-8").replace("1.311", "1.211"), encoding="utf-8")
    with pytest.raises(MismatchError, match=r"differs from the records at lm-small\.model:"):
        fill(readme, [report], check=True)


def test_cells_cannot_break_a_table(tmp_path: Path) -> None:
    record = Record(kind="qa", name="x", figures={}, rows={"T": [{"a|b": "c | d\n<!-- /results -->`"}]})
    write_record(tmp_path / "r", record)
    readme = tmp_path / "README.md"
    readme.write_bytes(b"<!-- results:qa-x#T -->\r\n<!-- /results -->\r\n")
    fill(readme, [tmp_path / "r"])
    text = readme.read_bytes().decode()
    assert "| c \\| d \\<!-- /results -->\\` |\r\n" in text
    assert text.count("\r\n") == text.count("\n")
    assert fill(readme, [tmp_path / "r"], check=True) == 1


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("nothing", ConfigError, "has no marker"),
        ("<!-- results:lm-small.model -->\ntext\n", FormatError, "has no end"),
        ("<!-- results:lm-small.model -->\n<!-- results:x -->\n<!-- /results -->\n", FormatError, "has no end"),
        (
            "<!-- results:lm-none -->\n<!-- /results -->\n",
            ConfigError,
            r"no record is called lm-none: there are lm-large\.model, ",
        ),
        (
            "<!-- results:lm-small.model#Tabel -->\n<!-- /results -->\n",
            ConfigError,
            "has no table 'Tabel': there are none",
        ),
    ],
)
def test_markers_that_cannot_be_filled_are_errors(
    text: str, error: type[Exception], message: str, report: Path, tmp_path: Path
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(error, match=message):
        fill(readme, [report])
    assert readme.read_text(encoding="utf-8") == text


def test_a_name_in_two_reports_is_ambiguous(report: Path, tmp_path: Path) -> None:
    write_record(tmp_path / "other", *lm_record())
    readme = tmp_path / "README.md"
    readme.write_text(README, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"lm-small\.model is in 2 reports"):
        fill(readme, [report, tmp_path / "other"])
