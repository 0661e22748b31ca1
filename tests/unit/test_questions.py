"""Question data: what is written is what is read; what a question is trained with, against a naive account of the rules."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from builders import toy_model_config, toy_tokenizer

from retro.answer import question_prompt, source_text
from retro.attention import Places
from retro.chat import ChatFormat, Message, chat_prompt, save_template
from retro.config import TrainConfig
from retro.data import Batch, Retrieval
from retro.errors import ConfigError, FormatError, MismatchError
from retro.generate import prompt_ids
from retro.model import Retro
from retro.question_batches import (
    Curriculum,
    QuestionBatches,
    QuestionItem,
    Reading,
    WithReplay,
    _packed,
    _Row,
    compacted,
    question_batch,
)
from retro.questions import LONGEST_PROMPT, QuestionData, QuestionWriter, answer_ids, common_template, open_questions
from retro.tokenizer import Tokenizer

M, R = 16, 36
TOKENIZER = toy_tokenizer()
PASSAGES = [f"number {n:02} says {n * 7}" for n in range(12)]
ITEMS: list[tuple[str, str, list[tuple[int, str | None]], int | None]] = [
    ("Who is one?", "Uno", [(0, None), (1, "UNO"), (2, None), (3, "uno")], None),
    ("Who is two?", "Due", [(4, None), (5, None)], 6),
    ("Who is three?", "Tre", [(7, "Tre")], 8),
    ("Who is nobody?", "Nemo", [], None),
    ("Who is five, and why would anybody ask so much at once?", "Cinque", [(9, "Cinque e sei"), (10, None)], None),
]
"""Question, answer, candidates, own."""


def made(folder: Path, *, split: str = "train", copies: int = 1) -> QuestionData:
    with QuestionWriter(folder, TOKENIZER, recipe={"copies": copies}) as writer:
        for text in PASSAGES:
            writer.passage("T", text)
        for _ in range(copies):
            for number, (question, answer, candidates, own) in enumerate(ITEMS):
                writer.add(
                    question=question,
                    answer=answer,
                    candidates=candidates,
                    split=split,
                    own=own,
                    group=f"g{number % 2}",
                )
    return QuestionData(folder)


def batches(data: QuestionData, **options: object) -> QuestionBatches:
    defaults = {"chunk_len": M, "neighbor_len": R, "seed": 3}
    return QuestionBatches([data], "train", **(defaults | options))  # type: ignore[arg-type]


def text_of(ids: torch.Tensor) -> str:
    return TOKENIZER.decode(ids.tolist())


def read(batch: Batch, row: int) -> tuple[str, str, set[str]]:
    """Prompt, answer and passages of a row, from its tensors alone."""
    inputs, keep, loss = batch.inputs_BT[row], batch.keep_BT[row], batch.loss_BT[row]
    answer = batch.targets_BT[row][loss]
    assert answer[-1] == TOKENIZER.eos_id
    sources: set[str] = set()
    if batch.neighbors_BLKR is not None and batch.keep_BLKR is not None:
        for chunk in range(batch.keep_BLKR.shape[1]):
            for ids, there in zip(batch.neighbors_BLKR[row, chunk], batch.keep_BLKR[row, chunk], strict=True):
                if there.any():
                    sources.add(text_of(ids[there]))
    given = int(keep.sum()) - len(answer) + 1
    return text_of(inputs[keep][:given]), text_of(answer[:-1]), sources


def cut(number: int) -> str:
    """What the network reads of a passage."""
    return TOKENIZER.decode(TOKENIZER.encode(source_text("T", PASSAGES[number])).ids[:R].tolist())


def test_question_data_holds_what_was_written(tmp_path: Path) -> None:
    data = made(tmp_path / "a.questions")
    assert data.questions("train").tolist() == [0, 1, 2, 3, 4]
    assert data.groups == ["g0", "g1"]
    assert [data.groups[g] for g in data.arrays.groups] == ["g0", "g1", "g0", "g1", "g0"]
    for number, text in enumerate(PASSAGES):
        assert data.passage(number).tolist() == TOKENIZER.encode(source_text("T", text)).ids.tolist()
    for number, (question, answer, candidates, own) in enumerate(ITEMS):
        assert data.prompt(number).tolist() == prompt_ids(question_prompt(question), TOKENIZER)
        assert data.target(int(data.arrays.targets[number])).tolist() == answer_ids(answer, TOKENIZER)
        assert data.arrays.own[number] == (-1 if own is None else own)
        passages, targets = data.candidates(number)
        assert passages.tolist() == [p for p, _ in candidates]
        said = [None if t < 0 else TOKENIZER.decode(data.target(t).tolist()).strip() for t in targets.tolist()]
        assert said == [t for _, t in candidates]


def test_the_same_recipe_is_finished_and_another_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a.questions"
    made(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with QuestionWriter(folder, TOKENIZER, recipe={"copies": 1}) as writer:
        assert writer.finished
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ConfigError, match=r"copies: 1 -> 2"):
        QuestionWriter(folder, TOKENIZER, recipe={"copies": 2})


def test_no_question_and_a_damaged_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no question"):
        QuestionWriter(tmp_path / "none.questions", TOKENIZER, recipe={}).complete()
    folder = tmp_path / "a.questions"
    made(folder)
    path = folder / "arrays" / "prompt_ids.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"prompt_ids.npy has .* bytes instead"):
        QuestionData(folder)


def test_a_prompt_that_is_too_long_is_left_out_and_counted(tmp_path: Path) -> None:
    with QuestionWriter(tmp_path / "a.questions", TOKENIZER, recipe={}) as writer:
        assert not writer.add(question="x" * (2 * LONGEST_PROMPT), answer="a", candidates=[], split="train")
        assert writer.add(question="Who?", answer="a", candidates=[], split="train")
    data = QuestionData(tmp_path / "a.questions")
    assert (data.manifest["too_long"], len(data.questions("train"))) == (1, 1)


def test_data_of_two_tokenizers_do_not_mix(tmp_path: Path) -> None:
    made(tmp_path / "a.questions")
    other = Tokenizer.train(["some other text"], 300)
    with QuestionWriter(tmp_path / "b.questions", other, recipe={}) as writer:
        writer.add(question="Who?", answer="a", candidates=[], split="train")
    with pytest.raises(MismatchError, match="different tokenizers"):
        open_questions([str(tmp_path / "a.questions"), str(tmp_path / "b.questions")])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_what_questions_are_read_with_keeps_the_rules(tmp_path: Path, K: int, own: bool) -> None:
    source = batches(made(tmp_path / "a.questions"), reading=Reading(num_passages=K, own=own))
    seen: dict[str, set[frozenset[str]]] = {}
    for row in range(size := 5 * 40):
        prompt, answer, sources = read(source.batch(row, 1), 0)
        number = next(n for n, item in enumerate(ITEMS) if question_prompt(item[0]) == prompt)
        _, default, candidates, made_of = ITEMS[number]
        said = {cut(p): t for p, t in candidates}
        holding = [t for s in sources if (t := said.get(s)) is not None]
        by_own = made_of is not None and (own or not any(t for _, t in candidates))
        if by_own:
            assert cut(made_of) in sources  # type: ignore[arg-type]
            assert (answer.strip(), holding) == (default, [])
        elif any(t for _, t in candidates):
            assert answer.strip() in holding
        else:
            assert answer.strip() == default
        assert sources <= {*said, *([] if made_of is None else [cut(made_of)])}
        available = sum(t is None for t in said.values()) + 1 if by_own else len(said)
        assert len(sources) == min(K, available)
        if not by_own and len(said) > K:  # distractors come before more evidence
            assert len(holding) == max(1 if any(said.values()) else 0, K - sum(t is None for t in said.values()))
        seen.setdefault(prompt, set()).add(frozenset(sources))
    assert seen.keys() == {question_prompt(item[0]) for item in ITEMS}
    if K == 2 and not own:
        assert len(seen[question_prompt(ITEMS[0][0])]) == 4  # one of two holding, one of two others
    assert size == 200


def test_evidence_is_left_out_and_the_book_closed_as_often_as_asked(tmp_path: Path) -> None:
    data = made(tmp_path / "a.questions")
    source = batches(data, reading=Reading(num_passages=2, evidence_share=0.75))
    counts: Counter[str] = Counter()
    for row in range(2000):
        prompt, answer, sources = read(source.batch(row, 1, neighbor_dropout=0.1), 0)
        if prompt == question_prompt(ITEMS[0][0]):
            evident = bool(sources & {cut(1), cut(3)})
            assert answer.strip() in (("UNO", "uno") if evident else ("Uno",))
            counts["closed" if not sources else "evident" if evident else "other"] += 1
    total = sum(counts.values())
    assert total == 400
    # Three deviations of a binomial with 400 draws.
    assert abs(counts["closed"] / total - 0.1) < 0.045
    assert abs(counts["evident"] / total - 0.9 * 0.75) < 0.07


def test_where_nothing_is_known_to_hold_the_answer_the_best_passages_are_read(tmp_path: Path) -> None:
    with QuestionWriter(tmp_path / "a.questions", TOKENIZER, recipe={}) as writer:
        numbers = [writer.passage("T", text) for text in PASSAGES]
        writer.add(question="Who?", answer="a", candidates=[(n, None) for n in (5, 2, 7, 1)], split="train")
        chat = ChatFormat.of(None, TOKENIZER)
        said: list[Message] = [{"role": "user", "content": "Hi"}]
        writer.add_chat(chat, chat.ids(said), "Hello", [numbers[n] for n in (6, 3, 8)], "train")
    data = QuestionData(tmp_path / "a.questions")
    assert data.has_chats
    for share in (0.0, 0.5, 1.0):
        source = batches(data, permute=False, reading=Reading(num_passages=2, evidence_share=share))
        for epoch in range(8):
            assert read(source.batch(2 * epoch, 1), 0) == (question_prompt("Who?"), " a", {cut(5), cut(2)})
            assert read(source.batch(2 * epoch + 1, 1), 0) == (chat_prompt(said), " Hello", {cut(6), cut(3)})


def test_a_question_whose_passages_all_hold_the_answer_is_never_read_without_any(tmp_path: Path) -> None:
    with QuestionWriter(tmp_path / "a.questions", TOKENIZER, recipe={}) as writer:
        numbers = [writer.passage("T", text) for text in PASSAGES]
        writer.add(question="Who?", answer="a", candidates=[(numbers[4], "A"), (numbers[9], "aa")], split="train")
    source = batches(QuestionData(tmp_path / "a.questions"), reading=Reading(num_passages=1, evidence_share=0.0))
    found = {(answer.strip(), *sources) for _, answer, sources in (read(source.batch(n, 1), 0) for n in range(30))}
    assert found == {("A", cut(4)), ("aa", cut(9))}


def test_an_answer_behind_what_is_read_of_a_passage_is_no_evidence(tmp_path: Path) -> None:
    with QuestionWriter(tmp_path / "a.questions", TOKENIZER, recipe={}) as writer:
        early, late = (writer.passage("", text) for text in ("it is UNO " + "x" * 300, "x" * 300 + " it is UNO"))
        writer.add(question="Who?", answer="uno", candidates=[(late, "UNO"), (early, "UNO")], split="train")
        writer.add(question="Who else?", answer="uno", candidates=[(late, "UNO")], split="train")
    data = QuestionData(tmp_path / "a.questions")
    source = batches(data, permute=False, reading=Reading(num_passages=1))
    for epoch in range(10):
        _, answer, sources = read(source.batch(2 * epoch, 1), 0)
        assert (answer, [s.startswith("source: it is UNO") for s in sources]) == (" UNO", [True])
        assert read(source.batch(2 * epoch + 1, 1), 0)[1] == " uno"  # as is said where nothing is to be read
    whole = QuestionBatches([data], "train", chunk_len=M, neighbor_len=400, seed=3, permute=False)
    assert read(whole.batch(1, 1), 0)[1] == " UNO"


def test_conversations_of_different_templates_do_not_train_one_model(tmp_path: Path) -> None:
    folders = []
    for name, template in (("a", None), ("b", "{{ messages[0].content }}"), ("c", "{{ messages[0].content }}")):
        (tmp_path / f"{name}.source").mkdir()
        save_template(tmp_path / f"{name}.source", template)
        chat = ChatFormat.of(tmp_path / f"{name}.source", TOKENIZER)
        with QuestionWriter(tmp_path / f"{name}.questions", TOKENIZER, recipe={}) as writer:
            writer.add_chat(chat, chat.ids([{"role": "user", "content": "Hi"}]), "Hello", [], "train")
        folders.append(str(tmp_path / f"{name}.questions"))
    plain, one, other = open_questions(folders)
    assert (TOKENIZER.decode(one.prompt(0)), TOKENIZER.decode(one.target(0))) == ("Hi", "Hello")
    assert common_template([one, other]) == "{{ messages[0].content }}"
    assert common_template([plain]) is None
    with pytest.raises(
        MismatchError, match=r"conversations in .*a\.questions and .*b\.questions are written by different"
    ):
        common_template([plain, one])


def test_a_batch_is_the_same_in_whatever_company(tmp_path: Path) -> None:
    source = batches(made(tmp_path / "a.questions", copies=3), reading=Reading(num_passages=2), compact=False)
    whole = source.batch(4, 12)
    parts = Batch.joined([_wide(source.batch(4 + n, 1), whole.inputs_BT.shape[1]) for n in range(12)])
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(tensor, parts.tensors()[name], rtol=0, atol=0)


def _wide(batch: Batch, T: int) -> Batch:
    """The same with empty slots behind, as beside longer rows."""
    L = T // M

    def grown(x: torch.Tensor) -> torch.Tensor:
        size = T if x.shape[1] == batch.inputs_BT.shape[1] else L
        more = x.new_zeros(x.shape[0], size - x.shape[1], *x.shape[2:])
        return torch.cat([x, more], dim=1)

    return Batch(**{name: grown(tensor) for name, tensor in batch.tensors().items()})


def test_an_epoch_holds_every_question_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    source = batches(made(tmp_path / "a.questions", copies=4))
    orders = []
    for epoch in range(2):
        prompts = [read(source.batch(20 * epoch + n, 1), 0)[0] for n in range(20)]
        assert Counter(prompts) == Counter({question_prompt(item[0]): 4 for item in ITEMS})
        orders.append(prompts)
    assert orders[0] != orders[1]
    fixed = batches(made(tmp_path / "a.questions", copies=4), permute=False)
    assert [read(fixed.batch(n, 1), 0)[0] for n in range(5)] == [question_prompt(item[0]) for item in ITEMS]


def test_shuffled_questions_keep_their_answers_and_read_what_others_do(tmp_path: Path) -> None:
    source = batches(made(tmp_path / "a.questions"), permute=False, reading=Reading(num_passages=4))
    on, off, shuffled = (source.batch(0, 5, neighbors=mode) for mode in get_args(Retrieval))
    assert off.neighbors_BLKR is None
    for row in range(5):
        assert read(shuffled, row)[:2] == read(on, row)[:2]
        assert read(shuffled, row)[2] == read(source.batch(row + 2, 1), 0)[2]


def test_context_passages_stand_before_the_question_and_are_not_read_twice(tmp_path: Path) -> None:
    data = made(tmp_path / "a.questions")
    plain = batches(data, permute=False, reading=Reading(num_passages=3))
    context = batches(data, permute=False, reading=Reading(num_passages=3), context_passages=1)
    for row in (0, 1, 4):
        prompt, answer, sources = read(plain.batch(row, 1), 0)
        longer, same, rest = read(context.batch(row, 1), 0)
        assert same == answer
        (first,) = [number for number in range(12) if longer == source_text("T", PASSAGES[number]) + prompt]
        assert rest == sources - {cut(first)}
        order = [p for p, _ in ITEMS[row][2]]
        best = min((order.index(n) for n in range(12) if cut(n) in sources and n in order), default=0)
        own = ITEMS[row][3]
        assert first == (own if own is not None and cut(own) in sources else order[best])


def test_leaving_out_empty_columns_changes_no_loss_and_no_gradient() -> None:
    torch.manual_seed(0)
    config = toy_model_config(vocab_size=TOKENIZER.vocab_size, chunk_len=M)
    model = Retro(config).initialize(torch.Generator().manual_seed(0)).double()
    items = [QuestionItem(q, a * 5, [PASSAGES[n], PASSAGES[n + 1]][: n % 3]) for n, (q, a, *_) in enumerate(ITEMS)]
    found = []
    for make in (lambda batch: batch, compacted):
        model.zero_grad()
        batch = make(question_batch(items, TOKENIZER, M, neighbor_len=R))
        loss = model(**batch.tensors())
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-12)
    whole = question_batch(items, TOKENIZER, M, neighbor_len=R)
    assert compacted(whole).inputs_BT.shape[1] == int(whole.keep_BT.sum(dim=1).max()) < whole.inputs_BT.shape[1]


class _Numbered:
    """Sequences of which a batch says only which they are."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def batch(self, first: int, size: int, **_: object) -> tuple[str, int, int]:
        return self.kind, first, size


def test_replay_takes_its_share_of_the_steps_and_ranks_share_its_sequences() -> None:
    mixed: Any = WithReplay(_Numbered("questions"), _Numbered("text"), share=0.25, sequences=4, batch_size=8)  # type: ignore[arg-type]
    steps = [mixed.batch(8 * step, 8) for step in range(40)]
    assert sum(kind == "text" for kind, *_ in steps) == 10
    for kind, sequences in (("text", 4), ("questions", 8)):
        own = [step for step in steps if step[0] == kind]
        assert own == [(kind, n * sequences, sequences) for n in range(len(own))]
    for step in range(8):
        halves = [mixed.batch(8 * step + 4 * rank, 4) for rank in range(2)]
        kind, first, size = steps[step]
        assert halves == [(kind, first, size // 2), (kind, first + size // 2, size // 2)]


def test_the_curriculum_grows_when_the_present_number_is_mastered_or_its_share_of_the_steps_has_passed() -> None:
    config = TrainConfig(passages=(1, 2, 4), passages_grow_at=0.9, steps=300, evidence_share=0.7, own_share=0.1)
    course = Curriculum(config, [])
    assert [course.reading(step).num_passages for step in (1, 100, 101, 200, 201, 300)] == [1, 1, 2, 2, 4, 4]
    assert [course.reading(step).own for step in (1, 30, 31)] == [True, True, False]
    assert course.reading(5).evidence_share == 0.7
    course.add({"step": 10, "passages": 1, "valid_exact_match": 0.89})
    assert course.reading(11).num_passages == 1
    course.add({"step": 20, "passages": 1, "valid_exact_match": 0.9})
    assert course.reading(21).num_passages == 2
    course.add({"step": 30, "passages": 1, "valid_exact_match": 0.99})  # of another number: it says nothing
    course.add({"step": 35, "loss_nats": 1.0})
    assert course.reading(31).num_passages == 2
    lines = [
        {"step": 20, "passages": 1, "valid_exact_match": 0.9},
        {"step": 40, "passages": 2, "valid_exact_match": 1.0},
    ]
    again = Curriculum(config, lines)
    assert again.reading(41).num_passages == 4
    again.add({"step": 50, "passages": 4, "valid_exact_match": 1.0})
    assert again.reading(51).num_passages == 4
    late = Curriculum(config, [])
    assert late.reading(120).num_passages == 2  # its time had come
    late.add({"step": 120, "passages": 2, "valid_exact_match": 0.95})
    assert late.reading(121).num_passages == 4


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("passages", (), "passages = "),
        ("passages", (2, 1), "passages = "),
        ("passages", (0, 1), "passages = "),
        ("evidence_share", 1.5, "evidence_share = 1.5"),
        ("replay_share", 0.0, "replay_share = 0.0"),
        ("context_passages", -1, "context_passages = -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        TrainConfig(**{setting: value})  # type: ignore[arg-type]


def test_a_split_without_questions_is_an_error(tmp_path: Path) -> None:
    data = made(tmp_path / "a.questions")
    with pytest.raises(ConfigError, match="no question in the split 'valid'"):
        QuestionBatches([data], "valid", chunk_len=M, neighbor_len=R, seed=0)
    assert np.all(data.arrays.splits == 0)


def test_evidence_marks_the_answer_wherever_it_stands_and_nothing_else() -> None:
    sources = ["it is ab, not ba, but ab", "ba", "", "nothing here"]
    row = _Row(
        prompt=TOKENIZER.encode("?" * M).ids, answer=TOKENIZER.encode("ab").ids, sources=TOKENIZER.encode_batch(sources)
    )
    batch = _packed([row], TOKENIZER.eos_id, M, K=4, R=R, evidence=True)
    assert batch.evidence_BLKR is not None
    marked = [
        "".join(c for c, m in zip(s.ljust(R), line, strict=True) if m)
        for s, line in zip(sources, batch.evidence_BLKR[0, 0], strict=True)
    ]
    assert marked == ["abab", "", "", ""]
    assert not batch.evidence_BLKR[0, 1:].any()
    assert _packed([row], TOKENIZER.eos_id, M, K=4, R=R).evidence_BLKR is None


@pytest.mark.parametrize("make", [lambda batch: batch, compacted], ids=["whole", "compacted"])
@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_pointing_is_the_attention_that_lies_on_the_next_token(make: Any, positions: str) -> None:
    """Against a plain softmax over what each layer's CCA is called with."""
    config = toy_model_config(
        vocab_size=TOKENIZER.vocab_size, chunk_len=M, num_layers=3, cca_layers=(1, 3), positions=positions
    )
    model: Any = Retro(config).initialize(torch.Generator().manual_seed(0)).double()
    answers = ["ab", "a" * (M + 5), "zz"]
    sources = [["x ab y ab", "ab"], ["_" + "a" * (M + 5)], ["a z", "nothing"]]
    rows = [
        _Row(prompt=TOKENIZER.encode("?" * n).ids, answer=TOKENIZER.encode(a).ids, sources=TOKENIZER.encode_batch(s))
        for n, a, s in zip((M - 3, 2 * M, 5), answers, sources, strict=True)
    ]
    batch: Any = make(_packed(rows, TOKENIZER.eos_id, M, K=2, R=R, evidence=True))
    plain = model(**replace(batch, evidence_BLKR=None).tensors())
    torch.testing.assert_close(model(**batch.tensors()), plain, rtol=0, atol=0)  # without a weight it counts nothing
    model.pointing = 0.5
    asked: list[torch.Tensor] = []
    for layer in model.layers:
        if layer.cca is not None:
            layer.cca_norm.register_forward_hook(lambda _module, _inputs, output: asked.append(output))
    read: list[torch.Tensor] = []
    model.encoder.register_forward_hook(lambda _module, _inputs, output: read.append(output))
    added = float((model(**batch.tensors()) - plain).detach()) / 0.5
    slot_BT = torch.arange(batch.inputs_BT.shape[1]).expand(3, -1) if batch.slot_BT is None else batch.slot_BT
    reading = batch.keep_BLKR.flatten(2).any(dim=2)
    expected, n = [0.0, 0.0], -1
    for b, chunk in reading.nonzero().tolist():
        n += 1
        for t in range(slot_BT.shape[1]):
            place = int(slot_BT[b, t]) - ((chunk + 1) * M - 1)
            ids = batch.neighbors_BLKR[b, chunk].flatten()
            right = batch.evidence_BLKR[b, chunk].flatten() & (ids == batch.targets_BT[b, t])
            if not (batch.loss_BT[b, t] and 0 <= place < M and right.any()):
                continue
            for j, cca in enumerate(layer.cca for layer in model.layers if layer.cca is not None):
                own = Places.range(M - 1 + place, M + place, cca, read[0])
                keys = Places.range(0, R, cca, read[0], repeat=2)
                q = cca.queries(asked[j][b, t][None, None], own)
                k, _ = cca.keys_values(read[0][n].flatten(0, 1)[None], keys)
                logits = (q @ k.mT)[0, :, 0] / config.head_dim**0.5
                bias = cca.bias(q, own, keys)
                logits = logits if bias is None else logits + bias[0, :, 0]
                logits[:, ~batch.keep_BLKR[b, chunk].flatten()] = -torch.inf
                expected[j] -= float(logits.softmax(dim=-1)[:, right].sum(dim=-1).mean().log().detach())
    assert all(value > 1 for value in expected)
    assert added == pytest.approx(sum(expected) / 2, rel=1e-6)
