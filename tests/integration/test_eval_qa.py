"""`retro eval qa` on a real index with a network of random weights: every figure worked out again from the predictions."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import speak_up, toy_model_config, toy_tokenizer
from commands import command, done, refused

from eval.metrics import contains_answer
from eval.predictions import QaConfig
from eval.question_answering import measure_answers, open_model
from eval.questions import read_questions
from eval.records import Record, read_records, read_units
from index_builder.search import IndexRetriever
from retro.checkpoint import save_model
from retro.model import Retro
from retro.threshold import load_threshold
from retro.tokenizer import Tokenizer

K = 3
SEED = 24
Line = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with random weights, large enough that passages move tokens; it says a few letters only, so that answers recur."""
    tokenizer = toy_tokenizer()
    network = Retro(toy_model_config(cca_layers=(1, 2), chunk_len=16, tie_embeddings=False))
    speak_up(network, std=1.2, seed=SEED)
    with torch.no_grad():
        assert network.head is not None
        silent = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
        silent[[*tokenizer.encode(" bcde").ids.tolist(), tokenizer.eos_id]] = False
        network.head.weight[silent] = 0.0
    folder = tmp_path_factory.mktemp("model") / "toy.model"
    save_model(folder, network, tokenizer)
    return folder


@pytest.fixture(scope="module")
def prompt_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of random weights in a folder."""
    import transformers

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = tmp_path_factory.mktemp("hf") / "gpt"
    tokenizer = toy_tokenizer()
    names = {"bos_token": tokenizer.backend.id_to_token(tokenizer.bos_id)}
    names["eos_token"] = tokenizer.backend.id_to_token(tokenizer.eos_id)
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer.backend, **names).save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=4096,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def texts(paragraphs: list[dict[str, Any]]) -> list[Line]:
    """Two questions about each of 20 paragraphs: one whose answer stands beside its words, one whose answer ends the paragraph."""
    made = []
    for number, paragraph in enumerate(paragraphs[:20]):
        words = paragraph["text"].split()
        for start in (3, 30):
            answer = " ".join(words[start + 5 : start + 7] if start == 3 else words[-2:]).strip(".,")
            question = "What is said of " + " ".join(words[start : start + 5]) + "?"
            made.append({"id": f"{number}-{start}", "question": question, "answers": [answer]})
            made[-1]["para_id"] = paragraph["id"]
            made[-1]["relation"] = f"R{number % 3}"
    return made


def write(path: Path, lines: list[Line]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(
    model: Path, paragraphs: list[dict[str, Any]], tiny_index: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Two data sets; of some questions what the model says is accepted, so that not all figures are 0."""
    folder = tmp_path_factory.mktemp("questions")
    lines = texts(paragraphs)
    asked, _ = read_questions([write(folder / "plain.jsonl", lines)])
    config = QaConfig(modes=("retrieval", "closed", "shuffled"), num_neighbors=K, max_new_tokens=3)
    predictions = measure_answers(open_model(model), asked, config, retriever=retriever(tiny_index))[2]
    for number, (line, said) in enumerate(zip(lines, predictions, strict=True)):
        mode = ("retrieval", "closed", "shuffled", "retrieval", "closed")[number % 5]
        if answer := said["modes"][mode]["answer"]:
            line["answers"] = [*line["answers"], answer + (" .", "", " long ago")[number % 3]]
    for line in lines[3::7]:
        line["answers"].append("of")  # which stands in passages of other documents, too
    found = retriever(tiny_index).retrieve([line["question"] for line in lines], 20, role="query")
    for line, passages in zip(lines, found, strict=True):
        own = [p.key == f"squad:{line['para_id']}" and contains_answer(p.full_text, line["answers"]) for p in passages]
        if any(own[1:]) and not own[0]:  # a passage before the right one has an answer, too
            line["answers"].append(" ".join(passages[0].text.split()[:3]))
    for line in lines[::4]:
        del line["para_id"]  # not every question names a document
    training = [{"question": f"Training {n}?", "answers": ["the Moon"], "relation": f"R{n % 2}"} for n in range(4)]
    training += [{"question": lines[n]["question"], "answers": ["leaked"], "relation": "R0"} for n in range(0, 40, 6)]
    training += [{"question": "Other?", "answers": lines[4]["answers"][-1:], "relation": "R2"}]
    return {
        "first": write(folder / "first.jsonl", lines[:25]),
        "second": write(folder / "second.jsonl", lines[25:]),
        "training": write(folder / "training.jsonl", training),
    }


def retriever(index: Path) -> IndexRetriever:
    return IndexRetriever.open(index, method="hybrid")


@pytest.fixture(scope="module")
def measured(
    model: Path, files: dict[str, Path], tiny_index: Path, prompt_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The report of an evaluation with all columns."""
    out = tmp_path_factory.mktemp("report") / "report"
    done("eval", "qa", *arguments(model, files, tiny_index), *more(files, prompt_model), "--out", out)
    return out


def arguments(model: Path, files: dict[str, Path], index: Path) -> list[Any]:
    asked = ["--questions", files["first"], "--questions", files["second"]]
    return [model, *asked, "--index", index, "-k", K, "--max-new-tokens", 3, "--batch-size", 7, "--device", "cpu"]


def more(files: dict[str, Path], prompt_model: Path) -> list[Any]:
    return ["--prompt-model", prompt_model, "--train-questions", files["training"]]


def lines_of(out: Path) -> list[Line]:
    [path] = (out / "predictions").glob("*/predictions.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record_of(out: Path) -> tuple[Path, Record]:
    [(path, record)] = read_records(out).items()
    return path, record


# Figures


def test_every_column_is_there(measured: Path) -> None:
    _, record = record_of(measured)
    titles = ("retrieval", "shuffled", "closed book", "gold passages", "prompt", "most frequent answer")
    for score in ("exact match", "F1"):
        assert [name for name in record.figures if name.startswith(f"{score}, ")] == [f"{score}, {t}" for t in titles]
    assert record.figures["exact match, retrieval"].count == 40
    assert record.figures["exact match, gold passages"].count == 30
    assert record.kind == "qa"
    assert set(record.fingerprints) >= {"model", "tokenizer", "questions", "index", "prompt model", "frequent answers"}
    page = (measured / "report.html").read_text(encoding="utf-8")
    assert "Accuracy over coverage" in page
    assert "Answer recall" in page


def test_of_a_long_curve_some_points_are_printed(model: Path, files: dict[str, Path], tiny_index: Path) -> None:
    out = done("eval", "qa", *arguments(model, files, tiny_index), "--modes", "retrieval").out
    line = out[out.index("Accuracy over coverage") :].splitlines()[1]
    assert re.findall(r"(\d+): ", line) == [str(share) for share in range(10, 101, 10)]
    line = out[out.index("Answer recall") :].splitlines()[1]
    assert re.findall(r"(\d+): ", line)[-1] == "20"


def test_figures_are_those_of_the_predictions(measured: Path) -> None:
    path, record = record_of(measured)
    lines = lines_of(measured)
    titles = dict(
        zip(
            ("retrieval", "shuffled", "closed", "gold", "prompt", "frequent"),
            ("retrieval", "shuffled", "closed book", "gold passages", "prompt", "most frequent answer"),
            strict=True,
        )
    )
    subsets: dict[str, Callable[[Line], bool]] = {
        "": lambda line: True,
        f" with the answer in the {K} read": lambda line: bool(line["rank"] and line["rank"] <= K),
        f" without the answer in the {K} read": lambda line: not (line["rank"] and line["rank"] <= K),
        " with the answer in the first 20": lambda line: line["rank"] is not None,
        " with the answer in a passage of a gold document in the first 20": lambda line: line["gold_rank"] is not None,
        " on first": lambda line: line["data_set"] == "first",
        " on second": lambda line: line["data_set"] == "second",
    }
    checked = 0
    for where, belongs in subsets.items():
        for mode, title in titles.items():
            said = [line["modes"][mode] for line in lines if belongs(line) and mode in line["modes"]]
            if not said:
                assert f"exact match{where}, {title}" not in record.figures
                continue
            figure = record.figures[f"exact match{where}, {title}"]
            assert figure.count == len(said)
            assert figure.value == pytest.approx(100 * np.mean([s["exact_match"] for s in said]))
            assert figure.value is not None
            assert figure.low is not None
            assert figure.high is not None
            assert figure.low <= figure.value <= figure.high
            checked += 0 < figure.value < 100
    assert checked > 12
    for mode, title in titles.items():
        if mode == "retrieval":
            continue
        both = [line["modes"] for line in lines if mode in line["modes"]]
        for score, field in (("exact match", "exact_match"), ("F1", "f1")):
            figure = record.figures[f"retrieval less the others, {score}: {title}"]
            assert figure.value == pytest.approx(100 * np.mean([m["retrieval"][field] - m[mode][field] for m in both]))
            assert (figure.unit, figure.count) == ("points", len(both))
    for k in (1, K, 5, 20):
        hits = [bool(line["rank"] and line["rank"] <= k) for line in lines]
        assert record.figures[f"answer recall, k = {k}"].value == pytest.approx(100 * np.mean(hits))
    for name, field in (("prompt tokens", "prompt_tokens"), ("generated tokens", "generated_tokens")):
        for mode in ("retrieval", "prompt"):
            mean = np.mean([line["modes"][mode][field] for line in lines])
            assert record.figures[f"{name} of a question, {mode}"].value == pytest.approx(mean)
    units = read_units(path, record)
    assert units["id"] == [line["id"] for line in lines]
    assert units["em_retrieval"] == [line["modes"]["retrieval"]["exact_match"] for line in lines]
    assert units["f1_gold"] == [line["modes"].get("gold", {}).get("f1") for line in lines]
    [relation] = [row for row in record.rows["By relation"] if row["relation"] == "R1"]
    few = [line["modes"]["closed"]["exact_match"] for line in lines if line["group"] == "R1"]
    assert relation["questions"] == len(few)
    assert relation["exact match, closed book"] == pytest.approx(100 * np.mean(few))
    table = {(r["data set"], r["questions"], r["mode"]): r for r in record.rows["By data set, and by what was found"]}
    part = [x for x in lines if x["data_set"] == "second" and not (x["rank"] and x["rank"] <= K)]
    row = table["second", f"without the answer in the {K} read", "shuffled"]
    assert row["number"] == len(part)
    assert row["F1"] == pytest.approx(100 * np.mean([x["modes"]["shuffled"]["f1"] for x in part]))


def test_scores_are_those_of_an_independent_implementation(measured: Path) -> None:
    """lm-evaluation-harness has the official script's rules once more; it scores reference by reference."""
    peer = pytest.importorskip("lm_eval.tasks.super_glue.record.t5_utils")
    different = 0
    for line in lines_of(measured):
        answers = [answer.replace("_", " ") for answer in line["answers"]]
        for said in line["modes"].values():
            pairs = [(said["answer"], f"q_{answer}") for answer in answers]
            assert said["exact_match"] == peer.squad_em_agg(pairs)
            assert said["f1"] == pytest.approx(peer.squad_f1_agg(pairs))
            different += 0 < said["f1"] < 1
    assert different > 5


def test_areas_and_the_curve_are_those_of_thresholds_tried_one_by_one(measured: Path) -> None:
    _, record = record_of(measured)
    said = [line["modes"]["retrieval"] for line in lines_of(measured)]
    accuracy = [np.mean([s["exact_match"] for s in said if s["confidence"] >= t["confidence"]]) for t in said]
    figure = record.figures["area under accuracy over coverage, retrieval"]
    assert figure.value == pytest.approx(100 * np.mean(accuracy))
    [curve] = [c for title, c in record.curves.items() if title.startswith("Accuracy over coverage")]
    ordered = sorted((s["confidence"], s["exact_match"]) for s in said)[::-1]
    for share, value in zip(curve.x, curve.series["retrieval"], strict=True):
        least = ordered[int(np.ceil(share / 100 * len(ordered) - 1e-9)) - 1][0]
        assert value == pytest.approx(100 * np.mean([right for c, right in ordered if c >= least]))


# What is read


def test_passages_and_their_ranks_are_those_of_the_retriever(
    measured: Path, tiny_index: Path, files: dict[str, Path]
) -> None:
    lines, named = lines_of(measured), documents(files)
    found = retriever(tiny_index).retrieve([line["question"] for line in lines], 20, role="query")
    ranks = set()
    for line, passages in zip(lines, found, strict=True):
        assert [p["key"] for p in line["passages"]] == [p.key for p in passages]
        assert [p["score"] for p in line["passages"]] == pytest.approx([p.score for p in passages])
        hits = [place for place, p in enumerate(passages, 1) if contains_answer(p.full_text, line["answers"])]
        assert line["rank"] == (hits[0] if hits else None)
        own = [place for place in hits if passages[place - 1].key == f"squad:{named[line['id']]}"]
        assert line["gold_rank"] == (own[0] if own else None)
        ranks.add((line["rank"], line["gold_rank"]))
    assert len(ranks) > 5
    assert any(rank != own and own for rank, own in ranks)


def documents(files: dict[str, Path]) -> dict[str, str | None]:
    """The paragraph that each question names."""
    named = {}
    for name in ("first", "second"):
        for text in files[name].read_text(encoding="utf-8").splitlines():
            fields = json.loads(text)
            named[f"{name}:{fields['id']}"] = fields.get("para_id")
    return named


def test_shuffled_passages_are_another_questions_and_share_no_text_with_ones_own(
    measured: Path, tiny_index: Path
) -> None:
    lines = lines_of(measured)
    by_id = {line["id"]: line for line in lines}
    given = 0
    for line in lines:
        said = line["modes"]["shuffled"]
        assert said["of"] != line["id"]
        own = {row + step for row in rows(line) for step in (0, 1)}
        assert own.isdisjoint({row + step for row in said["rows"] for step in (0, 1)})
        assert said["rows"] == [r for r in rows(by_id[said["of"]]) if own.isdisjoint({r, r + 1})]
        given += len(said["rows"])
    assert given > len(lines)
    assert len({line["modes"]["shuffled"]["of"] for line in lines}) > 10


def rows(line: Line) -> list[int]:
    return [passage["row"] for passage in line["passages"][:K]]


def test_gold_passages_are_of_the_document_that_the_question_names(
    measured: Path, tiny_index: Path, files: dict[str, Path]
) -> None:
    store = retriever(tiny_index).store
    named = documents(files)
    held = 0
    for line in lines_of(measured):
        assert ("gold" in line["modes"]) == (named[line["id"]] is not None)
        if "gold" in line["modes"]:
            passages = [store.passage(row) for row in line["modes"]["gold"]["rows"]]
            assert {p.key for p in passages} == {f"squad:{named[line['id']]}"}
            assert 0 < len(passages) <= K
            assert len({p.row % 2 for p in passages}) == 1  # no two have text in common
            held += any(contains_answer(p.full_text, line["answers"]) for p in passages)
    assert held > 10


def test_a_closed_book_reads_nothing_and_needs_no_index(measured: Path, model: Path, files: dict[str, Path]) -> None:
    asked, _ = read_questions([files["first"], files["second"]])
    config = QaConfig(num_neighbors=0, max_new_tokens=3, batch_size=7)
    record, units, lines = measure_answers(open_model(model), asked, config)
    assert list(lines[0]["modes"]) == ["closed"]
    assert "rank" not in units
    assert not [name for name in record.figures if "recall" in name]
    for alone, line in zip(lines, lines_of(measured), strict=True):
        said = line["modes"]["closed"]
        assert (said["num_passages"], said["passage_tokens"]) == (0, 0)
        assert alone["modes"]["closed"]["answer"] == said["answer"]
    assert any(x["modes"]["closed"]["answer"] != x["modes"]["retrieval"]["answer"] for x in lines_of(measured))


def test_what_is_read_costs_tokens(measured: Path) -> None:
    for line in lines_of(measured):
        assert line["modes"]["retrieval"]["num_passages"] == K
        assert line["modes"]["prompt"]["num_passages"] == K
        assert line["modes"]["retrieval"]["prompt_tokens"] == line["modes"]["closed"]["prompt_tokens"]
        assert line["modes"]["prompt"]["prompt_tokens"] > line["modes"]["retrieval"]["passage_tokens"] > 0


def test_the_most_frequent_answer_is_of_questions_that_are_not_asked(measured: Path) -> None:
    said = {line["group"]: line["modes"]["frequent"]["answer"] for line in lines_of(measured)}
    assert said["R0"] == said["R1"] == "the Moon"
    assert len(said) == 3
    assert any(line["modes"]["frequent"]["exact_match"] for line in lines_of(measured) if line["group"] == "R2")


# Going on, and comparing


def test_a_killed_evaluation_goes_on_and_gives_the_same_record(
    measured: Path, model: Path, files: dict[str, Path], tiny_index: Path, tmp_path: Path
) -> None:
    asked, _ = read_questions([files["first"], files["second"]])
    config = QaConfig(num_neighbors=K, max_new_tokens=3, batch_size=7)

    def evaluate(out: Path, stop_at: int = 0) -> tuple[Record, dict[str, list[Any]], list[Line]]:
        def progress(stage: str, at: int, total: int | None) -> None:
            if stage == "questions":
                done_at.append(at)
                if at == stop_at:
                    raise KeyboardInterrupt

        done_at.clear()
        return measure_answers(
            open_model(model), asked, config, retriever=retriever(tiny_index), out=out, progress=progress
        )

    done_at: list[int] = []
    whole = evaluate(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "killed", stop_at=21)
    [path] = (tmp_path / "killed" / "predictions").glob("*/predictions.jsonl")
    kept = path.read_bytes()
    assert kept.count(b"\n") == 21
    # Killed inside the next write: a batch is there in part, its last line torn.
    lines = [json.dumps({**line, "question": "torn"}).encode() for line in whole[2][21:24]]
    path.write_bytes(kept + lines[0] + b"\n" + lines[1] + b"\n" + lines[2][:50])
    went_on = evaluate(tmp_path / "killed")
    assert done_at == [28, 35, 40]
    assert path.read_bytes().startswith(kept)
    assert plain(went_on[2]) == plain(whole[2])
    assert went_on[1] == whole[1]
    for name, figure in whole[0].figures.items():
        if not name.startswith("seconds"):
            assert went_on[0].figures[name] == figure
    # Finished, it is only read.
    again = evaluate(tmp_path / "killed")
    assert done_at == []
    assert again[0].figures == went_on[0].figures
    # Another configuration is another evaluation.
    config = QaConfig(num_neighbors=K - 1, max_new_tokens=3, batch_size=7)
    evaluate(tmp_path / "killed")
    assert done_at[-1] == 40
    assert len(list((tmp_path / "killed" / "predictions").iterdir())) == 2


def plain(lines: list[Line]) -> list[Line]:
    """Without measured times."""
    return [
        {**line, "search_seconds": 0, "modes": {m: {**s, "seconds": 0} for m, s in line["modes"].items()}}
        for line in lines
    ]


def test_two_evaluations_of_the_same_questions_are_compared(
    measured: Path, model: Path, files: dict[str, Path], tiny_index: Path, tmp_path: Path
) -> None:
    done("eval", "qa", *arguments(model, files, tiny_index), "--retriever", "bm25", "--out", tmp_path / "words")
    outcome = done("eval", "compare", measured, tmp_path / "words", "--json")
    figures = json.loads(outcome.out)["figures"]
    assert figures["exact match, closed: words minus report"]["value"] == 0
    lines = [lines_of(measured), lines_of(tmp_path / "words")]
    first, second = (np.mean([line["modes"]["retrieval"]["f1"] for line in few]) for few in lines)
    assert figures["F1, retrieval: words minus report"]["value"] == pytest.approx(100 * (second - first))


def test_overwrite_asks_again(model: Path, files: dict[str, Path], tiny_index: Path, tmp_path: Path) -> None:
    options = [*arguments(model, files, tiny_index), "--modes", "closed", "--out", tmp_path]
    done("eval", "qa", *options)
    [path] = (tmp_path / "predictions").glob("*/predictions.jsonl")
    changed = path.read_text(encoding="utf-8").replace('"exact_match": 0.0', '"exact_match": 1.0')
    path.write_text(changed, encoding="utf-8")
    kept = json.loads(done("eval", "qa", *options, "--json").out)
    assert kept["figures"]["exact match, closed book"]["value"] == 100
    again = json.loads(done("eval", "qa", *options, "--json", "--overwrite").out)
    assert again["figures"]["exact match, closed book"]["value"] < 100


# The confidence below which it does not know


def test_a_chosen_threshold_lies_in_the_models_folder(
    model: Path, files: dict[str, Path], tiny_index: Path, tmp_path: Path
) -> None:
    import shutil

    own = tmp_path / "own.model"
    shutil.copytree(model, own)
    out = tmp_path / "report"
    options = [*arguments(own, files, tiny_index), "--modes", "retrieval,closed", "--out", out]
    done("eval", "qa", *options)
    said = [line["modes"]["retrieval"] for line in lines_of(out)]
    most = float(np.mean([s["exact_match"] for s in said]))
    unreachable = command("eval", "qa", *options, "--choose-threshold", "1")
    assert unreachable.code == 1
    assert "no confidence gives 100% right answers: the most is" in unreachable.err
    assert load_threshold(own) is None
    outcome = done("eval", "qa", *options, "--choose-threshold", str(most))
    found = load_threshold(own)
    assert found is not None
    given = [s["exact_match"] for s in said if s["confidence"] >= found.min_confidence]
    assert found.accuracy == pytest.approx(np.mean(given))
    assert found.accuracy >= most
    assert found.coverage == pytest.approx(len(given) / len(said))
    assert found.chosen_on == "first.jsonl, second.jsonl (retrieval)"
    assert "--choose-threshold" in found.command
    assert f"{found.min_confidence:.4f}" in outcome.err
    # It is still the same model: its answers need not be made again.
    done("eval", "qa", *options)
    assert len(list((out / "predictions").iterdir())) == 1


# Bad input


def test_bad_questions_are_named_or_left_out(model: Path, tiny_index: Path, tmp_path: Path) -> None:
    good = {"question": "Who?", "answers": ["me"]}
    for wrong, message in (
        ({"question": "Who?"}, "`answers` must be a list of strings"),
        ({"question": "Who?", "answers": "me"}, "`answers` must be a list of strings"),
        ({"question": "Who?", "answers": []}, "`answers` is empty"),
        ({"question": " ", "answers": ["me"]}, "`question` must be a string that is not empty"),
        ({"question": "Who?", "answers": ["me"], "gold": [7]}, "7 names no document"),
        ({"question": "Who?", "answers": ["me"], "gold": 7}, "`gold`"),
    ):
        path = write(tmp_path / "q.jsonl", [good, wrong, {**good, "question": "What?"}])
        options = [model, "--questions", path, "-k", 0, "--device", "cpu"]
        refused(command("eval", "qa", *options), f"{path}:2: {message}", "--on-error skip")
        record = json.loads(done("eval", "qa", *options, "--on-error", "skip", "--json").out)
        assert record["figures"]["exact match, closed book"]["count"] == 2
        assert "q: 1 lines without a question and answers are left out." in record["notes"]
    path = write(tmp_path / "twice.jsonl", [{**good, "id": "a"}, {**good, "id": "a"}])
    refused(command("eval", "qa", model, "--questions", path, "-k", 0), f"{path}:2: the id 'a' is that of line 1")
    path = write(tmp_path / "empty.jsonl", [])
    refused(command("eval", "qa", model, "--questions", path, "-k", 0), "holds no question that can be scored")


def test_a_question_that_is_too_long_is_named_or_left_out(model: Path, tmp_path: Path) -> None:
    lines = [{"question": "why " * 10_000, "answers": ["so"], "id": "long"}, {"question": "Who?", "answers": ["me"]}]
    options = [model, "--questions", write(tmp_path / "q.jsonl", lines), "-k", 0, "--device", "cpu"]
    refused(command("eval", "qa", *options), "q:long: the question is too long", "--on-error skip")
    record = json.loads(done("eval", "qa", *options, "--on-error", "skip", "--json").out)
    assert record["figures"]["exact match, closed book"]["count"] == 1
    assert "1 questions are too long and left out." in record["notes"]


def test_what_cannot_be_measured_is_refused(
    model: Path, files: dict[str, Path], tiny_index: Path, prompt_model: Path, tmp_path: Path
) -> None:
    asked = ["--questions", files["first"], "--device", "cpu"]
    refused(command("eval", "qa", model, *asked), "--index", "-k 0")
    refused(command("eval", "qa", model, *asked, "--modes", "gold"), "the mode gold needs an index")
    refused(command("eval", "qa", model, *asked, "--index", tiny_index, "--modes", "prompt"), "--prompt-model")
    refused(command("eval", "qa", model, *asked, "--index", tiny_index, "--modes", "frequent"), "--train-questions")
    refused(command("eval", "qa", model, *asked, "-k", 0, "--modes", "retrieval"), "-k 0")
    refused(command("eval", "qa", model, *asked, "--index", tiny_index, "-k", 100_000), "is more than the", "lower k")
    refused(command("eval", "qa", prompt_model, *asked, "-k", 0), "is a model of Hugging Face", "--prompt-model")
    refused(command("eval", "qa", tmp_path / "none.model", *asked, "-k", 0), "none.model")
    one = write(tmp_path / "one.jsonl", [{"question": "Who?", "answers": ["me"]}])
    alone = ["--questions", one, "--index", tiny_index, "--device", "cpu"]
    refused(command("eval", "qa", model, *alone, "--modes", "shuffled"), "needs two questions")
    refused(command("eval", "qa", model, *alone, "--modes", "gold"), "no question names a document")
    assert command("eval", "qa", model, *asked, "-k", 0, "--modes", "open").code == 2
    assert command("eval", "qa", model, *asked, "-k", 0, "--choose-threshold", "40").code == 2
    assert command("eval", "qa", model, *asked, "-k", 0, "--gold-corpus", "simple").code == 2
    plain_model = tmp_path / "plain.model"
    tokenizer = Tokenizer.load(str(model))
    save_model(plain_model, Retro(toy_model_config(vocab_size=tokenizer.vocab_size, cca_layers=())), tokenizer)
    indexed = [*asked, "--index", tiny_index, "--max-new-tokens", 2]
    refused(command("eval", "qa", plain_model, *indexed, "--modes", "retrieval"), "made without retrieval")
    record = json.loads(done("eval", "qa", plain_model, *indexed, "--json").out)
    assert record["configuration"]["modes"] == ["closed"]


def test_documents_that_are_not_in_the_index_are_no_error_unless_asked_for(
    model: Path, tiny_index: Path, tmp_path: Path
) -> None:
    lines = [
        {"question": f"Who is {n}?", "answers": ["me"], "gold": [["simple", n, "title"], ["core", n, "title"]]}
        for n in range(3)
    ]
    path = write(tmp_path / "eq.jsonl", lines)
    options = [model, "--questions", path, "--index", tiny_index, "-k", 2, "--device", "cpu", "--max-new-tokens", 2]
    record = json.loads(done("eval", "qa", *options, "--json").out)
    assert record["configuration"]["modes"] == ["retrieval", "shuffled", "closed"]
    assert any(note.startswith("Without gold passages: ") and "core:0" in note for note in record["notes"])
    refused(command("eval", "qa", *options, "--modes", "gold"), "name no document of")


def test_corpora_may_have_other_names_in_the_index(
    model: Path, paragraphs: list[dict[str, Any]], tiny_index: Path, tmp_path: Path
) -> None:
    gold = [["simple", paragraphs[0]["id"], "title"]]
    lines = [{"question": f"Who is {n}?", "answers": ["me"], "gold": gold} for n in range(2)]
    options = [model, "--questions", write(tmp_path / "eq.jsonl", lines), "--index", tiny_index, "-k", 2]
    options += ["--device", "cpu", "--max-new-tokens", 2, "--gold-corpus", "simple=squad", "--out", tmp_path / "out"]
    done("eval", "qa", *options, "--modes", "gold")
    assert [len(line["modes"]["gold"]["rows"]) for line in lines_of(tmp_path / "out")] == [2, 2]
