"""Records as the commands of `retro eval` write them, with made-up numbers, and a folder of them to look at.

`python tests/sample_records.py FOLDER` writes the report of all of them.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.metrics import bootstrap_mean, bootstrap_ratio
from eval.records import Curve, Figure, Record
from eval.report import finish

Units = dict[str, list[Any]]
LM_MODES = {"on": 0.0, "off": 0.021, "shuffled": 0.024}


def lm_record(
    name: str = "small.model", *, seed: int = 0, gain: float = 0.0, documents: int = 120
) -> tuple[Record, Units]:
    """Bits per byte with retrieval on, off and shuffled; `gain` is taken off all of them."""
    corpus, own = np.random.default_rng(0), np.random.default_rng(seed + 1 + round(1e5 * gain))
    bytes_N = corpus.integers(300, 9000, documents).astype(float)
    hard_N = corpus.normal(1.31, 0.12, documents)
    units: Units = {"id": [f"wiki:{i}" for i in range(documents)], "bytes": bytes_N.tolist()}
    figures = {}
    for mode, more in LM_MODES.items():
        losses_N = (hard_N + more - gain + own.normal(0, 0.01, documents)) * bytes_N * np.log(2)
        units[f"loss_{mode}_nats"] = losses_N.tolist()
        low, high = bootstrap_ratio(losses_N, bytes_N, seed=seed, resamples=1000)
        figures[f"bits per byte, retrieval {mode}"] = Figure(
            value=float(losses_N.sum() / bytes_N.sum() / np.log(2)),
            unit="bits per byte",
            low=low / np.log(2),
            high=high / np.log(2),
            count=documents,
        )
    figures["perplexity per token, retrieval on"] = Figure(value=34.21753, unit="", count=documents)
    figures["last words found"] = Figure(value=22.5, unit="%", low=14.0, high=31.0, count=200)
    overlaps = (0.0, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    on = (None, 1.41, 1.389, 1.37, 1.36, 1.35, 1.341, 1.336, 1.331, 1.31)
    off = (None, 1.413, 1.394, 1.381, 1.373, 1.366, 1.361, 1.356, 1.351, 1.336)
    ks = (1, 2, 4, 8, 16, 32, 40)
    record = Record(
        kind="lm",
        name=name,
        figures=figures,
        curves={
            "Allowed overlap of a chunk and its neighbors": Curve(
                x_label="longest run in common, share of the chunk",
                y_label="bits per byte",
                x=overlaps,
                series={"retrieval on": on, "retrieval off": off, "baseline": tuple(v and v + 0.004 for v in off)},
            ),
            "Number of neighbors": Curve(
                x_label="neighbors of a chunk",
                y_label="bits per byte",
                x=ks,
                series={"retrieval on": (1.318, 1.312, 1.309, 1.307, 1.3068, 1.308, 1.309)},
                log_x=True,
            ),
        },
        configuration={
            "modes": ["on", "off", "shuffled"],
            "num_neighbors": 2,
            "window": {"length": 512, "stride": 256},
            "documents": documents,
            "seed": seed,
        },
        fingerprints={"model": "4f2c" * 16, "data": "90ab" * 16},
        notes=("Shuffled: with the neighbors of chunks of other documents; what is as good shuffled was not read.",),
        seed=seed,
        seconds=812.4,
    )
    return record, units


def retrieval_record(name: str = "wiki.index", *, questions: int = 300) -> tuple[Record, Units]:
    """Recall over k of three methods, and how long searches took."""
    rng = np.random.default_rng(5)
    ks = (1, 2, 5, 10, 20, 50, 100)
    rank_N = rng.geometric(0.12, questions)
    units: Units = {"id": [f"q{i}" for i in range(questions)]}
    figures = {}
    for k in (1, 10):
        hits_N = (rank_N <= k).astype(float)
        units[f"hit@{k}"] = hits_N.tolist()
        low, high = bootstrap_mean(hits_N, resamples=1000)
        figures[f"recall@{k}"] = Figure(
            value=100 * float(hits_N.mean()), unit="%", low=100 * low, high=100 * high, count=questions
        )
    figures |= {f"latency, {p}th percentile": Figure(value=v, unit="ms") for p, v in ((50, 4.1), (95, 9.7), (99, 23.0))}
    curve = tuple(100 * float((rank_N <= k).mean()) for k in ks)
    record = Record(
        kind="retrieval",
        name=name,
        figures=figures,
        curves={
            "Recall": Curve(
                x_label="passages considered",
                y_label="% of questions with an answer",
                x=ks,
                series={
                    "dense": curve,
                    "bm25": tuple(0.9 * v for v in curve),
                    "hybrid": tuple(min(1.05 * v, 100) for v in curve),
                },
                log_x=True,
            )
        },
        rows={
            "Methods": [
                {"method": m, "recall@1": v, "recall@10": w, "nDCG@10": n, "MRR": r, "queries/s": q}
                for m, v, w, n, r, q in (
                    ("dense", 12.1, 71.6, 0.412, 0.301, 241.3),
                    ("bm25", 10.9, 64.4, 0.371, 0.271, 1520.0),
                    ("hybrid", 12.7, 75.2, 0.433, 0.316, 207.9),
                )
            ]
        },
        configuration={"retriever": ["dense", "bm25", "hybrid"], "ks": list(ks), "index_type": "IVF4096,Flat"},
        fingerprints={"index": "c0de" * 16},
        seconds=41.0,
    )
    return record, units


def qa_record(
    name: str = "small.model", *, seed: int = 0, gain: float = 0.0, questions: int = 250
) -> tuple[Record, Units]:
    """Exact match and F1 with a risk-coverage curve and examples; `gain` more answers are right."""
    easy_N = np.random.default_rng(9).random(questions)
    f1_N = np.clip(0.9 - easy_N + gain + np.random.default_rng(seed).normal(0, 0.05, questions), 0, 1)
    em_N = (f1_N > 0.5).astype(float)
    units: Units = {"id": [f"q{i}" for i in range(questions)], "em": em_N.tolist(), "f1": f1_N.tolist()}
    figures = {}
    for title, values_N in (("exact match", em_N), ("F1", f1_N)):
        low, high = bootstrap_mean(values_N, seed=seed, resamples=1000)
        figures[title] = Figure(
            value=100 * float(values_N.mean()), unit="%", low=100 * low, high=100 * high, count=questions
        )
    coverage = np.linspace(0.01, 1, 100)
    record = Record(
        kind="qa",
        name=name,
        figures=figures,
        curves={
            "Risk and coverage": Curve(
                x_label="share of questions answered",
                y_label="share of answers that are wrong",
                x=tuple(coverage.tolist()),
                series={"by confidence": tuple((0.05 + 0.45 * coverage**2).tolist())},
            )
        },
        rows={
            "Some answers": [
                {
                    "question": "What is the capital of Poland?",
                    "answer": "Warsaw",
                    "expected": "Warsaw",
                    "right": True,
                    "passage": "Warsaw is the capital and largest city of Poland. It stands on the Vistula River.",
                },
                {
                    "question": "When did the 1973 oil crisis begin?",
                    "answer": "March 1974",
                    "expected": "October 1973",
                    "right": False,
                    "passage": "By the end of the embargo in March 1974, the price of oil had risen from $3 to $12 a barrel.",
                },
            ]
        },
        configuration={"k": 10, "mode": "retro", "seed": seed},
        fingerprints={"model": "4f2c" * 16, "questions": "beef" * 16},
        seed=seed,
        seconds=97.1,
    )
    return record, units


def training_record(name: str = "small.model", *, steps: int = 2000) -> tuple[Record, Units | None]:
    """Losses over steps, as metrics.jsonl holds them."""
    at = np.arange(10, steps + 1, 10)
    loss = 3.1 + 6.0 * np.exp(-at / 300) + np.random.default_rng(3).normal(0, 0.05, len(at))
    valid = [float(v) if step % 200 == 0 else None for step, v in zip(at, 3.2 + 6.0 * np.exp(-at / 300), strict=True)]
    record = Record(
        kind="training",
        name=name,
        figures={"last validation loss": Figure(value=valid[-1], unit="nats per token")},
        curves={
            "Loss": Curve(
                x_label="step",
                y_label="nats per token",
                x=tuple(map(float, at)),
                series={"training": tuple(loss.tolist()), "validation, retrieval on": tuple(valid)},
            )
        },
        configuration={"steps": steps, "preset": "small"},
    )
    return record, None


def hostile_record() -> tuple[Record, Units | None]:
    """Text that would be markup, everywhere that a record has text."""
    bad = '<script>alert("1")</script>&amp;"\'><img src=https://example.org/x.png onerror=alert(2)>'
    record = Record(
        kind=bad,
        name=bad,
        figures={
            bad: Figure(value=float("nan"), unit=bad),
            f"{bad}, 2": Figure(value=1.0, unit=bad),
            "2": Figure(value=2.0, unit=bad),
        },
        curves={
            bad: Curve(
                x_label=bad, y_label=bad, x=(1.0, 2.0), series={bad: (1.0, None), f"{bad}2": (float("inf"), 1.0)}
            )
        },
        rows={bad: [{bad: bad}, {bad: 1}]},
        configuration={bad: {bad: bad}},
        fingerprints={bad: bad},
        notes=(bad,),
    )
    return record, None


def write_sample_report(out: Path) -> Path:
    """All of them but the hostile one."""
    for record, units in (
        lm_record(),
        lm_record("large.model", gain=0.02),
        retrieval_record(),
        qa_record(),
        training_record(),
    ):
        finish(out, replace(record), units)
    return out


if __name__ == "__main__":
    write_sample_report(Path(sys.argv[1]))
