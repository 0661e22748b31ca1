"""`retro cloze` on articles of the bundled corpus: what the questions hold, interruptions, errors."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Outcome, done, refused

from index_builder.cloze import ClozeConfig, make_cloze
from index_builder.sentences import passages_of
from retro.answer import question_prompt
from retro.chunks import SPLITS
from retro.questions import QuestionData
from retro.tokenizer import Tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIG = ClozeConfig(candidates=8, question_tokens=100, shard_chars=60_000, valid_share=0.2, test_share=0.1)


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve articles of the bundled corpus, paragraph by paragraph; two of them are held out by name."""
    with lzma.open(EXAMPLES / "squad11_dev_paragraphs.jsonl.xz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    titles = sorted({record["title"] for record in records})[:12]
    splits = {titles[0]: "valid", titles[1]: "test"}
    path = tmp_path_factory.mktemp("articles") / "articles.jsonl"
    lines = [
        json.dumps({**record, "group": record["title"], "split": splits.get(record["title"], "train")})
        for record in records
        if record["title"] in titles
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(articles: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "x.questions"
    make_cloze([str(articles)], out, tokenizer=Tokenizer.load(str(tokenizer_folder)), config=CONFIG)
    return out


def test_evidence_says_its_target_and_distractors_never_the_answer(made: Path) -> None:
    data = QuestionData(made)
    tokenizer = data.tokenizer
    assert len(data.arrays.splits) > 30
    for question in range(len(data.arrays.splits)):
        answer = tokenizer.decode(data.target(int(data.arrays.targets[question]))).strip()
        own = tokenizer.decode(data.passage(int(data.arrays.own[question])))
        assert answer in own
        passages, targets = data.candidates(question)
        assert (targets >= 0).any()
        assert len({*passages.tolist(), int(data.arrays.own[question])}) == 9  # 8 different ones and its own
        for passage, target in zip(passages.tolist(), targets.tolist(), strict=True):
            text = tokenizer.decode(data.passage(passage))
            if target < 0:
                assert f" {answer} ".casefold() not in f" {text} ".casefold()
            else:
                stated = tokenizer.decode(data.target(target)).strip()
                assert stated in text
                assert stated.casefold() == answer.casefold()


def test_a_question_is_a_sentence_of_its_own_passage_with_the_answer_blanked(made: Path) -> None:
    data = QuestionData(made)
    for question in range(len(data.arrays.splits)):
        prompt = data.tokenizer.decode(data.prompt(question))
        answer = data.tokenizer.decode(data.target(int(data.arrays.targets[question]))).strip()
        asked = prompt.removeprefix("question: ").removesuffix(" \nanswer:")
        assert question_prompt(asked) == prompt
        assert len(data.prompt(question)) <= 100
        title, _, text = data.tokenizer.decode(data.passage(int(data.arrays.own[question]))).partition(", source: ")
        name = title.removeprefix("title: ")
        filled = asked.replace("_", answer, 1)
        assert " ".join(filled.removeprefix(f"{name}: ").split()) in " ".join(text.split())


def test_splits_are_never_mixed(made: Path, articles: Path) -> None:
    splits: dict[str, set[str]] = {}
    for line in articles.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for passage, _ in passages_of(record["text"]):
            splits.setdefault(f"title: {record['title']}, source: {passage}", set()).add(record["split"])
    data = QuestionData(made)
    assert {SPLITS[s] for s in data.arrays.splits.tolist()} == {"train", "valid", "test"}
    for question, split in enumerate(data.arrays.splits.tolist()):
        for passage in [*data.candidates(question)[0].tolist(), int(data.arrays.own[question])]:
            assert SPLITS[split] in splits[data.tokenizer.decode(data.passage(passage))]


@pytest.mark.slow
def test_neither_processes_nor_shards_change_the_questions(
    made: Path, articles: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    config = ClozeConfig(**{**_fields(CONFIG), "shard_chars": 25_000})
    out = tmp_path / "x.questions"
    make_cloze([str(articles)], out, tokenizer=Tokenizer.load(str(tokenizer_folder)), config=config, workers=2)
    assert _arrays(out) == _arrays(made)
    assert json.loads((out / "cloze.json").read_text()) == json.loads((made / "cloze.json").read_text())


@pytest.mark.parametrize("stage", ["sentences", "questions"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    stage: str,
    made: Path,
    articles: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    folder_bytes: Callable[[Path], dict[str, bytes]],
) -> None:
    out = tmp_path / "x.questions"
    tokenizer = Tokenizer.load(str(tokenizer_folder))

    def interrupt(name: str, done: int, total: int | None) -> None:
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_cloze([str(articles)], out, tokenizer=tokenizer, config=CONFIG, progress=interrupt)
    assert not (out / "manifest.json").exists()
    work = tmp_path / "x.questions.work"
    kept = sorted(path.relative_to(work).as_posix() for path in work.rglob("*.npz"))
    assert bool(kept) == (stage == "sentences")
    stages: list[str] = []
    make_cloze([str(articles)], out, tokenizer=tokenizer, config=CONFIG, progress=lambda name, *_: stages.append(name))
    assert ("sentences" in stages) == (stage == "sentences")
    assert folder_bytes(out) == folder_bytes(made)
    assert not work.exists()


def test_the_command_prints_what_it_made_and_makes_nothing_twice(
    articles: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.questions"
    options = ("--questions", 20, "--workers", 1, "--question-tokens", 100)
    command = ("cloze", articles, "--tokenizer", tokenizer_folder, "--out", out, *options)
    report = json.loads(done(*command, "--json").out)
    data = QuestionData(out)
    assert report["questions"] == 20 == len(data.arrays.splits)
    assert report["by_split"] == {split: len(data.questions(split)) for split in SPLITS}
    kinds = [data.groups[group] for group in data.arrays.groups.tolist()]
    assert report["by_kind"] == {f"{k}s": kinds.count(k) for k in ("name", "word", "year", "date", "number")}
    targets = data.arrays.candidate_targets
    assert report["passages_per_question"] == len(targets) / 20
    assert report["with_the_answer"] == (targets >= 0).sum() / 20
    before = (out / "manifest.json").stat().st_mtime_ns
    assert json.loads(done(*command, "--json").out) == report
    assert (out / "manifest.json").stat().st_mtime_ns == before


def test_a_dry_run_shows_questions_and_keeps_nothing(articles: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.questions"
    shown = json.loads(
        done(
            "cloze",
            articles,
            "--tokenizer",
            tokenizer_folder,
            "--out",
            out,
            "--dry-run",
            "--json",
            "--question-tokens",
            100,
        ).out
    )
    assert shown["questions"] > 30
    for example in shown["examples"]:
        assert "_" in example["question"]
        assert example["answer"].casefold() in example["passage"].casefold()
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_without_a_question_is_refused(
    retro: Callable[..., Outcome], tokenizer_folder: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "songs.jsonl"
    corpus.write_text(json.dumps({"id": "1", "text": "la la la la la la la la. Then it rained in London, England."}))
    outcome = retro("cloze", corpus, "--tokenizer", tokenizer_folder, "--out", tmp_path / "x.questions", "--workers", 1)
    refused(Outcome(outcome.code, outcome.out, outcome.err.splitlines()[-1]), "not a single question", "2 sentences")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"--candidates": 4}, ("made differently", "candidates: 16 -> 4", "--overwrite")),
        ({"--questions": 0}, ("questions = 0",)),
        ({"--question-tokens": 513}, ("question_tokens = 513", "512")),
        ({"--valid-share": 1}, ("valid_share = 1",)),
        ({"--tokenizer": "nowhere.json"}, ("nowhere.json",)),
    ],
)
def test_settings_that_cannot_be_are_refused(
    changes: dict[str, Any],
    parts: tuple[str, ...],
    retro: Callable[..., Outcome],
    articles: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    options = {"--tokenizer": tokenizer_folder, "--out": tmp_path / "x.questions", "--questions": 5, "--workers": 1}

    def run(options: dict[str, Any]) -> Outcome:
        return retro("cloze", articles, *(part for item in options.items() for part in item))

    if "--candidates" in changes:
        assert run(options).code == 0
    refused(run(options | changes), *parts)


def _fields(config: ClozeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ClozeConfig.__slots__}


def _arrays(folder: Path) -> dict[str, list[Any]]:
    return {path.name: np.load(path).tolist() for path in sorted((folder / "arrays").iterdir())}
