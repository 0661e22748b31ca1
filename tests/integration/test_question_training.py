"""From questions to a model that answers: question data against a naive account of its making, and training on it to the end."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import toy_model_config
from commands import Outcome, done, refused
from safetensors.torch import load_file

from index_builder.questions import QuestionConfig, build_questions, find_answer
from index_builder.search import IndexRetriever
from retro.answer import answer_config, ask_many, passage_text, question_prompt, source_text
from retro.artifact import read_manifest
from retro.attribution import explain
from retro.chat import ChatFormat, Message, chat_prompt
from retro.checkpoint import load_model
from retro.chunks import SPLITS
from retro.config import BaseConfig, ModelConfig, RunConfig, TrainConfig
from retro.costs import forward_flops
from retro.dry_run import measure_training
from retro.errors import ConfigError, MismatchError
from retro.generate import Prompt, generate
from retro.metrics import METRICS, read_lines
from retro.question_batches import QuestionBatches, Reading, WithReplay
from retro.questions import KIND, QuestionData, QuestionWriter
from retro.tokenizer import Tokenizer
from retro.train import train
from retro.train_setup import setup
from retro.train_step import evaluate_answers, question_flops

K = 4


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(str(tokenizer_folder))


@pytest.fixture(scope="module")
def retriever(tiny_index: Path) -> IndexRetriever:
    return IndexRetriever.open(tiny_index, method="hybrid")


@pytest.fixture(scope="module")
def asked(
    paragraphs: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A question for each paragraph: its first words, answered by a word that follows."""
    rows: list[dict[str, Any]] = []
    for number, paragraph in enumerate(paragraphs):
        words = re.findall(r"[A-Za-z]{4,}", paragraph["text"])
        row = {
            "id": f"q{number}",
            "question": f"What follows {' '.join(words[:4])}?",
            "answers": ["zzz", words[5].upper()],
        }
        rows.append(row | ({"para_id": paragraph["id"]} if number % 3 == 0 else {}))
    rows.append({"question": "Who is nowhere to be found?", "answers": ["qqqq"]})
    path = tmp_path_factory.mktemp("asked") / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


@pytest.fixture(scope="module")
def data(
    asked: tuple[Path, list[dict[str, Any]]],
    tokenizer: Tokenizer,
    retriever: IndexRetriever,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("made") / "asked.questions"
    config = QuestionConfig(num_passages=K, valid_share=0.3, others=1e9)
    build_questions([str(asked[0])], folder, tokenizer=tokenizer, retriever=retriever, config=config)
    return folder


@pytest.mark.parametrize(
    ("text", "answers", "found"),
    [
        ("It began in October 1973.", ["october"], "October"),
        ("It began in October 1973.", ["Octobe"], None),
        ("the  New\nYork Times", ["x", "new york"], "New York"),
        ("(U.S.) and U.S.", ["U.S."], "U.S."),
        ("AT&T grew", ["at&t"], "AT&T"),
        ("nothing", [], None),
        ("straße", ["STRASSE"], None),
    ],
)
def test_an_answer_is_found_as_whole_words_as_the_text_writes_it(
    text: str, answers: list[str], found: str | None
) -> None:
    assert find_answer(text, answers) == found


def test_question_data_holds_what_the_index_finds_for_each_question(
    asked: tuple[Path, list[dict[str, Any]]], data: Path, retriever: IndexRetriever, tokenizer: Tokenizer
) -> None:
    made, rows = QuestionData(data), asked[1]
    assert len(made.arrays.splits) == len(rows)
    counts = [int((made.arrays.splits == number).sum()) for number in range(len(SPLITS))]
    assert counts == [made.manifest["questions"][name] for name in SPLITS]
    assert counts[0] > 0 < counts[1]
    golden = 0
    for number, row in enumerate(rows):
        assert made.prompt(number).tolist()[1:] == tokenizer.encode(question_prompt(row["question"])).ids.tolist()
        near = retriever.retrieve([row["question"]], K, role="query")[0]
        texts = [source_text(p.title, p.full_text) for p in near]
        passages, targets = made.candidates(number)
        read = [tokenizer.decode(made.passage(p).tolist()) for p in passages.tolist()]
        assert read[:K] == texts
        for source, target in zip(read, targets.tolist(), strict=True):
            body = source.partition("source: ")[2]
            said = None if target < 0 else tokenizer.decode(made.target(target).tolist()).strip()
            assert said == find_answer(body, row["answers"])
        for source in read[K:]:  # further passages are the gold document's, and hold the answer
            assert "para_id" in row
            assert find_answer(source.partition("source: ")[2], row["answers"]) is not None
        golden += len(read) > K
        assert tokenizer.decode(made.target(int(made.arrays.targets[number])).tolist()).strip() == row["answers"][0]
    assert golden > 0


def test_an_interrupted_run_goes_on_and_makes_the_same(
    asked: tuple[Path, list[dict[str, Any]]],
    data: Path,
    tokenizer: Tokenizer,
    retriever: IndexRetriever,
    folder_bytes: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("index_builder.questions.BLOCK", 7)
    out = tmp_path / "asked.questions"
    config = QuestionConfig(num_passages=K, valid_share=0.3, others=1e9)
    searched: list[int] = []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(retriever, name)

        def retrieve(self, queries: Sequence[str], k: int, **options: Any) -> Any:
            if len(searched) == 2:
                raise KeyboardInterrupt
            searched.append(len(queries))
            return retriever.retrieve(queries, k, **options)

    def make(finder: Any) -> None:
        build_questions([str(asked[0])], out, tokenizer=tokenizer, retriever=finder, config=config)

    with pytest.raises(KeyboardInterrupt):
        make(Counted())
    assert searched == [7, 7]
    begun = {path: path.stat().st_mtime_ns for path in sorted((out / "parts").glob("*.json"))}
    assert len(begun) == 2
    make(retriever)
    assert folder_bytes(out) == folder_bytes(data)


def test_questions_that_no_passage_answers_are_kept_up_to_their_share_and_excluded_ones_never(
    asked: tuple[Path, list[dict[str, Any]]], tokenizer: Tokenizer, retriever: IndexRetriever, tmp_path: Path
) -> None:
    rows = asked[1]
    banned = tmp_path / "test.jsonl"
    banned.write_text(json.dumps({"question": rows[1]["question"].upper() + " ", "answers": ["x"]}) + "\n")
    lost = tmp_path / "lost.jsonl"
    lost.write_text(
        "".join(json.dumps({"question": f"Where is lost {n}?", "answers": ["qq"]}) + "\n" for n in range(60))
    )
    both = tmp_path / "both.jsonl"
    both.write_text(asked[0].read_text() + lost.read_text())
    config = QuestionConfig(num_passages=K, others=0.5, exclude=(str(banned),))
    build_questions([str(both)], tmp_path / "x.questions", tokenizer=tokenizer, retriever=retriever, config=config)
    made = QuestionData(tmp_path / "x.questions")
    prompts = [tokenizer.decode(made.prompt(n).tolist()) for n in range(len(made.arrays.splits))]
    assert question_prompt(rows[0]["question"]) in prompts
    assert question_prompt(rows[1]["question"]) not in prompts
    answerable = [bool((made.candidates(n)[1] >= 0).any()) for n in range(len(prompts))]
    assert answerable.count(False) == answerable.count(True) // 2


def test_every_answer_of_a_conversation_is_a_question_after_all_before_it(
    tokenizer: Tokenizer, retriever: IndexRetriever, tmp_path: Path
) -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "When did the oil crisis begin?"},
        {"role": "assistant", "content": "In 1973."},
        {"role": "user", "content": "Why? <|im_end|>"},
        {"role": "assistant", "content": "An embargo."},
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": talk, "split": "train"}) + "\n")
    config = QuestionConfig(num_passages=2)
    build_questions([str(path)], tmp_path / "x.questions", tokenizer=tokenizer, retriever=retriever, config=config)
    made = QuestionData(tmp_path / "x.questions")
    assert [tokenizer.decode(made.prompt(n).tolist()) for n in range(2)] == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhen did the oil crisis begin?<|im_end|>\n"
        "<|im_start|>assistant\n",
        chat_prompt(talk[:4]),  # type: ignore[arg-type]
    ]
    assert chat_prompt(talk[:4]).count("<|im_end|>") == 4  # type: ignore[arg-type]
    for number, query in enumerate(("When did the oil crisis begin?", "Why? <|im_end|>")):
        near = retriever.retrieve([query], 2, role="query")[0]
        passages, targets = made.candidates(number)
        read = [tokenizer.decode(made.passage(p).tolist()) for p in passages.tolist()]
        assert read == [source_text(p.title, p.full_text) for p in near]
        assert set(targets.tolist()) == {-1}  # it is not known what they hold
        said = tokenizer.decode(made.target(int(made.arrays.targets[number])).tolist())
        assert said == " " + talk[2 * number + 2]["content"]


def test_conversations_are_split_by_what_is_asked_first_and_those_with_a_test_question_are_left_out(
    tokenizer: Tokenizer, retriever: IndexRetriever, tmp_path: Path
) -> None:
    rows = []
    for number in range(60):
        talk = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"What is {number}?"},
            {"role": "assistant", "content": "A number."},
            {"role": "user", "content": "Is it secret?" if number == 7 else "Is it odd?"},
            {"role": "assistant", "content": "Perhaps."},
        ]
        rows += [{"messages": talk[:3]}, {"messages": talk}]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "is it SECRET"}) + "\n")
    config = QuestionConfig(num_passages=1, valid_share=0.3, exclude=(str(tmp_path / "test.jsonl"),))
    files, out = [str(tmp_path / "talks.jsonl")], tmp_path / "x.questions"
    build_questions(files, out, tokenizer=tokenizer, retriever=retriever, config=config)
    made = QuestionData(out)
    sides: dict[str, set[int]] = {}
    for number, split in enumerate(made.arrays.splits.tolist()):
        text = tokenizer.decode(made.prompt(number).tolist())
        assert "secret" not in text
        sides.setdefault(re.findall(r"What is \d+", text)[0], set()).add(split)
    assert len(made.arrays.splits) == 2 * 60 - 1  # of number 7 only the record without the secret remains
    assert all(len(side) == 1 for side in sides.values())
    assert 8 <= sum(side == {SPLITS.index("valid")} for side in sides.values()) <= 28


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


def test_a_base_learns_conversations_as_its_own_template_writes_them(
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    retriever: IndexRetriever,
    tiny_index: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    config = transformers.GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=256, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(base)
    shutil.copy(tokenizer_folder / "tokenizer.json", base)
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    talk = [{"role": "user", "content": "When did the oil crisis begin?"}, {"role": "assistant", "content": "In 1973."}]
    rows = [{"messages": talk, "split": split} for split in ("train", "valid")]
    rows[1] = {**rows[1], "messages": [{**talk[0], "content": "Why did it begin?"}, talk[1]]}
    path, data, out = tmp_path / "talks.jsonl", tmp_path / "talks.questions", tmp_path / "talks.model"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done("questions", path, "--tokenizer", base, "--index", tiny_index, "--out", data, "-k", 2)
    made = QuestionData(data)
    asked: list[Message] = [{"role": "user", "content": talk[0]["content"]}]
    text = "[user] When did the oil crisis begin?\n[assistant] "
    assert made.prompt(0).tolist() == [tokenizer.bos_id, *tokenizer.encode(text).ids.tolist()]
    assert made.target(int(made.arrays.targets[0])).tolist() == tokenizer.encode("In 1973.").ids.tolist()

    options = {"task": "chat", "steps": 80, "batch_size": 1, "micro_batch_size": 1, "learning_rate": 1e-2}
    options |= {"warmup_steps": 1, "eval_every": 80, "save_every": 80, "passages": [2], "neighbor_len": 48}
    sets = [part for key, value in options.items() for part in ("--set", f"train.{key}={json.dumps(value)}")]
    sets += ["--set", "base.unfreeze=-1", "--set", "model.cca_layers=[2]", "--set", "model.chunk_len=16"]
    done("train", "--base", base, "--data", data, "--out", out, *sets)
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    model, its_tokenizer, _ = load_model(out)
    chat = ChatFormat.of(out, its_tokenizer)
    ids = chat.ids(asked)
    assert ids == made.prompt(0).tolist()
    near = [passage_text(p) for p in retriever.retrieve([talk[0]["content"]], 2, role="query")[0]]
    prompt = Prompt(ids, {-(-len(ids) // 16) - 1: near})
    assert generate(model, its_tokenizer, [prompt], answer_config(2, 12))[0].text == "In 1973."

    plain = _without_chats(tmp_path / "plain.questions", its_tokenizer)
    settings = TrainConfig(task="qa", data=str(plain), out=str(tmp_path / "plain.model"))
    parts = setup(RunConfig(model=model.config, base=BaseConfig(name=str(base)), train=settings))
    assert parts.template == TEMPLATE  # no conversation says anything else


def _without_chats(folder: Path, tokenizer: Tokenizer) -> Path:
    with QuestionWriter(folder, tokenizer, recipe={}) as writer:
        writer.add(question="Who?", answer="a", candidates=[(writer.passage("T", "a b"), "a")], split="train")
    return folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": " ", "answers": ["x"]}, "`question` must be"),
        ({"question": "Who?"}, "`answers` must be"),
        ({"question": "Who?", "answers": []}, "`answers` must be"),
        ({"question": "Who?", "answers": ["x", 1]}, "`answers` must be"),
        ({"question": "Who?", "answers": ["x"], "split": "dev"}, "split = 'dev'"),
        ({"question": "Who?", "answers": ["x"], "gold": 5}, "`gold` must be a list"),
        ({"question": "Who?", "answers": ["x"], "gold": [["simple"]]}, "['simple'] names no document"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "split": "dev"},
            "split",
        ),
        ({"messages": []}, "`messages` must be"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 0 must have a role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no message is a user's"),
    ],
)
def test_malformed_records_are_refused_with_their_line(
    line: dict[str, Any],
    message: str,
    tiny_index: Path,
    tokenizer_folder: Path,
    retro: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"question": "Who?", "answers": ["x"]}) + "\n" + json.dumps(line) + "\n")
    outcome = retro("questions", path, "--index", tiny_index, "--tokenizer", tokenizer_folder, "--out", tmp_path / "x")
    refused(outcome, f"{path}:2", message)


def test_where_nobody_says_how_passages_are_found_it_is_written_down_and_needs_no_bm25(
    tiny_index: Path, tiny_encoder: Path, tokenizer_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    by_meaning = tmp_path / "vectors.index"
    done("index", "build", corpus, "--encoder", tiny_encoder, "--lexical", "off", "--out", by_meaning)
    path = tmp_path / "asked.jsonl"
    path.write_text('{"question": "When did the oil crisis begin?", "answers": ["1973"]}\n')
    for index, method in ((tiny_index, "hybrid"), (by_meaning, "dense")):
        out = tmp_path / method
        done("questions", path, "--index", index, "--tokenizer", tokenizer_folder, "--out", out, "-k", 100)
        assert read_manifest(out, KIND)["recipe"]["retriever"] == method


# --- training -----------------------------------------------------------------------------------------------------


def run(data: Path, out: Path, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "task": "qa",
        "data": str(data),
        "out": str(out),
        "batch_size": 8,
        "micro_batch_size": 4,
        "steps": 6,
        "warmup_steps": 2,
        "passages": (1, 2),
        "neighbor_len": 48,
        "log_every": 1,
        "eval_every": 2,
        "eval_sequences": 6,
        "save_every": 3,
        "sample_tokens": 0,
    }
    return RunConfig(model=toy_model_config(chunk_len=16), train=TrainConfig(**(settings | changes)))


def losses(out: Path) -> list[dict[str, Any]]:
    drop = {"seconds", "tokens_per_s"}
    return [{k: v for k, v in line.items() if k not in drop} for line in read_lines(out / METRICS)]


def test_a_model_trains_on_questions_and_an_interrupted_training_goes_on_exactly(data: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.model", tmp_path / "broken.model"
    train(run(data, whole))
    lines = losses(whole)
    assert [line["passages"] for line in lines if "passages" in line] == [1, 2, 2]
    assert {f"valid_exact_match_{mode}" for mode in ("on", "off", "shuffled")} <= lines[-1].keys()

    def stop(progress: Any) -> None:
        if progress.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run(data, broken), progress=stop)
    train(run(data, broken))
    assert losses(broken) == lines
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0)
    info = json.loads((whole / "config.json").read_text())
    assert info["training"]["data"] == "asked.questions"


def test_a_pretrained_encoder_learns_to_read_with_its_own_table_as_it_is(
    asked: tuple[Path, list[dict[str, Any]]],
    retriever: IndexRetriever,
    make_encoder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    bert = make_encoder(tmp_path / "bert", positions=512)
    tokenizer, data = Tokenizer.load(str(bert)), tmp_path / "bert.questions"
    build_questions(
        [str(asked[0])], data, tokenizer=tokenizer, retriever=retriever, config=QuestionConfig(num_passages=4)
    )
    changes: dict[str, Any] = {
        "encoder": str(bert),
        "encoder_rate": 0.5,
        "table_rate": 0.0,
        "pointing": 1.0,
        "learning_rate": 5e-3,
        "passages": (2,),
        "steps": 60,
        "eval_every": 60,
        "save_every": 30,
    }
    sizes = {"dim": 32, "encoder_dim": 32, "encoder_layers": 2, "encoder_heads": 4, "encoder_head_dim": 8}
    model = replace(toy_model_config(chunk_len=16, cca_layers=(1, 2), **sizes), encoder="bert", encoder_ffw_dim=64)

    def made(out: Path, **more: Any) -> RunConfig:
        return RunConfig(model=model, train=replace(run(data, out).train, **(changes | more)))

    trainable = dict(setup(made(tmp_path / "whole.model")).model.named_parameters())
    assert [name for name, p in trainable.items() if not p.requires_grad] == ["embedding.weight"]
    train(made(tmp_path / "whole.model"))
    first, second = (line["loss_nats"] for line in (losses(tmp_path / "whole.model")[n] for n in (0, -2)))
    assert second < 0.6 * first
    weights = load_file(tmp_path / "whole.model" / "model.safetensors")
    before = load_file(bert / "model.safetensors")
    table_VE = weights["embedding.weight"]
    assert torch.equal(table_VE, before["embeddings.word_embeddings.weight"][: len(table_VE)])
    name = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(weights[f"encoder.bert.{name}"], before[name])

    def stop(progress: Any) -> None:
        if progress.step == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(made(tmp_path / "broken.model"), progress=stop)
    own = tmp_path / "bert" / "model.safetensors"
    own.rename(tmp_path / "own")
    shutil.copy(make_encoder(tmp_path / "other", positions=512, seed=1) / "model.safetensors", own)
    with pytest.raises(ConfigError, match="encoder"):
        train(made(tmp_path / "broken.model"))
    (tmp_path / "own").replace(own)
    train(made(tmp_path / "broken.model"))
    for key, tensor in load_file(tmp_path / "broken.model" / "model.safetensors").items():
        assert torch.equal(tensor, weights[key]), key


def test_a_dry_run_counts_questions_by_their_own_lengths(data: Path, tmp_path: Path) -> None:
    asked = run(data, tmp_path / "a.model", passages=(1, 3), neighbor_dropout=0.25, micro_batch_size=16, batch_size=16)
    plan = measure_training(replace(asked, train=replace(asked.train, seq_len=4096)))
    assert "most passages" in plan.report()["notes"]
    parts = setup(replace(asked, train=replace(asked.train, passages=(3,))))
    batch = parts.batches.batch(0, 16, neighbor_dropout=0.25)
    assert batch.keep_BLKR is not None
    config, M = parts.run.model, parts.run.model.chunk_len
    T = batch.inputs_BT.shape[1]
    # A naive count: every chunk that reads costs encoder and CCA for its own passages.
    lengths = [[int(n) for n in neighbors.sum(dim=1) if n] for row in batch.keep_BLKR for neighbors in row]
    reading = [chunk for chunk in lengths if chunk]
    assert 4 <= len(reading) < 16
    retrieval = sum(
        forward_flops(config, seq_len=M, num_neighbors=1, neighbor_len=n).retrieval for chunk in reading for n in chunk
    )
    bare = forward_flops(config, seq_len=T, num_neighbors=0, neighbor_len=1)
    logits = int(batch.loss_BT.sum()) * 2 * config.dim * config.vocab_size
    total = 16 * (bare.attention + bare.feed_forward) + logits + retrieval
    # Queries are projected once for all passages of a chunk, and the lengths' squares are not the square of their mean.
    assert plan.flops_per_step == pytest.approx(3 * total, rel=0.1)
    assert plan.forward.decoder == pytest.approx((total - retrieval) / 16, rel=1e-9)
    closed = question_flops(config, replace(batch, neighbors_BLKR=None, keep_BLKR=None))
    assert closed.retrieval == 0
    assert closed.decoder == pytest.approx(plan.forward.decoder)
    shorter = measure_training(replace(asked, train=replace(asked.train, passages=(1,))))
    assert shorter.memory.activations < plan.memory.activations < 4 * shorter.memory.activations


def test_exact_match_counts_the_answers_that_greedy_decoding_would_give(data: Path, tmp_path: Path) -> None:
    train(run(data, tmp_path / "a.model", steps=150, learning_rate=5e-3, passages=(1,), eval_every=150, save_every=150))
    model, tokenizer, _ = load_model(tmp_path / "a.model")
    source = QuestionBatches(
        [QuestionData(data)],
        "train",
        chunk_len=16,
        neighbor_len=48,
        seed=0,
        permute=False,
        reading=Reading(num_passages=1),
    )
    count = source.sequences_per_epoch
    options: dict[str, Any] = {"mode": "on", "count": 0, "dtype": torch.float32}
    loss, share, counted = evaluate_answers(model, source, batch_size=5, **options)
    right, total, tokens = 0, 0.0, 0
    with torch.no_grad():
        for number in range(count):
            batch = source.batch(number, 1)
            tensors = batch.tensors()
            targets, keep = tensors.pop("targets_BT"), tensors.pop("loss_BT")
            log_probs = torch.log_softmax(model(**tensors)[keep], dim=1)
            expected = targets[keep]
            right += bool((log_probs.argmax(dim=1) == expected).all())
            total -= float(log_probs.gather(1, expected[:, None]).sum())
            tokens += len(expected)
    assert (share, counted) == (right / count, count)
    assert 0 < right < count
    assert loss == pytest.approx(total / tokens, rel=1e-5)


def test_a_training_can_begin_with_another_model_and_replay_text(
    data: Path, corpus: Path, tiny_index: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.data"
    done("data", corpus, "--tokenizer", tokenizer_folder, "--index", tiny_index, "--out", text, "--chunk-len", 16)
    train(run(data, tmp_path / "first.model", steps=2))
    later = run(
        data,
        tmp_path / "later.model",
        init=str(tmp_path / "first.model"),
        replay=str(text),
        replay_share=0.5,
        replay_sequences=2,
        seq_len=64,
        passages=(1,),
        steps=4,
        learning_rate=0.0 + 1e-12,
        final_learning_rate=0.0,
        weight_decay=0.0,
        warmup_steps=0,
    )
    first, _, _ = load_model(tmp_path / "first.model")
    later = replace(later, model=first.config)
    train(later)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first.model", "later.model"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-7)
    steps = [line for line in losses(tmp_path / "later.model") if "loss_nats" in line]
    assert len(steps) == 4
    alone = replace(later, train=replace(later.train, replay="", out=str(tmp_path / "alone.model")))
    train(alone)
    asked = [line for line in losses(tmp_path / "alone.model") if "loss_nats" in line]
    mixed = setup(later).batches
    assert isinstance(mixed, WithReplay)
    kinds = [mixed.batch(8 * step, 8).inputs_BT.shape == (2, 64) for step in range(4)]
    assert kinds.count(True) == 2
    # The weights hardly move: a step's loss is that of what it is on, and those on questions come in the same order.
    found = [line["loss_nats"] for line, is_text in zip(steps, kinds, strict=True) if not is_text]
    assert found == pytest.approx([line["loss_nats"] for line in asked[:2]], rel=1e-5)
    texts = [line["loss_nats"] for line, is_text in zip(steps, kinds, strict=True) if is_text]
    assert texts != pytest.approx([line["loss_nats"] for line in asked[2:]], rel=1e-3)
    other = replace(later, model=ModelConfig(**(vars_of(first.config) | {"num_layers": first.config.num_layers + 1})))
    with pytest.raises(MismatchError, match="has other sizes than the run"):
        train(replace(other, train=replace(later.train, out=str(tmp_path / "x.model"))))
    with pytest.raises(ConfigError, match="replay_sequences = 3"):
        replace(later.train, replay_sequences=3)


def test_a_model_is_asked_with_as_many_passages_in_its_prompt_as_it_was_trained_with(
    data: Path, retriever: IndexRetriever, tmp_path: Path
) -> None:
    train(run(data, tmp_path / "a.model", steps=2, context_passages=1, neighbor_len=160))
    model, tokenizer, _ = load_model(tmp_path / "a.model")
    passages = retriever.retrieve(["When did the oil crisis begin?"], 3, role="query")
    config = answer_config(3, 4)
    (answer,) = ask_many(model, tokenizer, ["When?"], passages, config)
    in_front = tokenizer.encode(passage_text(passages[0][0])).ids.tolist()
    plain = tokenizer.encode(question_prompt("When?")).ids.tolist()
    assert answer.prompt_tokens == 1 + len(in_front) + len(plain)
    by_hand = Prompt([tokenizer.bos_id, *in_front, *plain])
    chunk = -(-len(by_hand.ids) // 16) - 1
    by_hand = Prompt(by_hand.ids, {chunk: [passage_text(p) for p in passages[0][1:]]})
    assert generate(model, tokenizer, [by_hand], config)[0].ids == answer.generation.ids
    why = explain(model, tokenizer, answer)
    assert why.share_P[0] == 0
    assert why.share_P.sum() == pytest.approx(1)
    assert why.spans[0] is None
    source = QuestionBatches(
        [QuestionData(data)],
        "train",
        chunk_len=16,
        neighbor_len=160,
        seed=0,
        permute=False,
        reading=Reading(num_passages=2),
        context_passages=1,
    )
    batch = source.batch(0, 1)
    made = QuestionData(data)
    question = made.prompt(int(made.questions("train")[0])).tolist()
    given = batch.inputs_BT[0][batch.keep_BT[0]].tolist()
    read = {tuple(made.passage(p)[:160].tolist()) for p in made.candidates(int(made.questions("train")[0]))[0].tolist()}
    assert any(given[: 1 + len(front) + len(question) - 1] == [question[0], *front, *question[1:]] for front in read)


def vars_of(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_the_sizes_of_a_run_are_those_of_the_model_it_begins_with(
    data: Path, tmp_path: Path, retro: Callable[..., Outcome]
) -> None:
    train(run(data, tmp_path / "first.model", steps=2))
    toml = tmp_path / "qa.toml"
    toml.write_text(
        f'[train]\ntask = "qa"\ndata = "{data}"\ninit = "{tmp_path / "first.model"}"\nout = "{tmp_path / "later.model"}"\n'
        "steps = 1\nbatch_size = 4\nmicro_batch_size = 4\neval_sequences = 2\n"
    )
    outcome = retro("train", toml, "--print-config")
    assert json.loads(outcome.out)["model"]["dim"] == toy_model_config().dim
    assert retro("train", toml).code == 0
    assert (tmp_path / "later.model" / "manifest.json").is_file()


def test_text_is_no_question_data(
    corpus: Path, tiny_index: Path, tokenizer_folder: Path, data: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.data"
    done("data", corpus, "--tokenizer", tokenizer_folder, "--index", tiny_index, "--out", text, "--chunk-len", 16)
    with pytest.raises(Exception, match=r"text.data is training data, not question data"):
        train(run(text, tmp_path / "a.model"))
    with pytest.raises(Exception, match=r"asked.questions is question data, not training data"):
        train(run(data, tmp_path / "a.model", task="lm"))
