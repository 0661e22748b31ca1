"""Questions: their prompts, their place on the grid, and that training sees what asking sees."""

import functools
from collections.abc import Collection, Sequence

import builders
import pytest
import tokenizers
import torch
from builders import speak_up, toy_model_config, toy_tokenizer
from torch import Tensor

from retro.answer import (
    MAX_PROMPT_TOKENS,
    Answer,
    answer_prompt,
    ask,
    ask_many,
    passage_text,
    question_prompt,
    source_text,
    to_answer,
)
from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.data import Batch
from retro.errors import ConfigError
from retro.generate import Generation, Role, generate, prompt_ids
from retro.model import Retro
from retro.question_batches import QuestionItem, closed_book, question_batch
from retro.tokenizer import Tokenizer

M = 16
R = 24
QUESTION = "Who?"
one_thread = pytest.fixture(autouse=True)(builders.one_thread)


def passage(text: str, *, title: str = "A title", continuation: str = "") -> Passage:
    return Passage(row=0, key="k", title=title, url="", text=text, continuation=continuation, score=0.5, metadata="{}")


PASSAGES = [passage("one", continuation=" and more"), passage("two", title="Other"), passage("three")]


class Shelf:
    """Always the same passages; keeps what was asked."""

    def __init__(self, passages: Sequence[Passage] = PASSAGES) -> None:
        self.passages = list(passages)
        self.asked: list[tuple[list[str], int, str]] = []

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        self.asked.append((list(queries), k, role))
        return [self.passages[:k] for _ in queries]


def make_model(seed: int) -> Retro:
    """Random weights, large ones; it says letters, spaces and EOS only."""
    model = Retro(toy_model_config(chunk_len=M, tie_embeddings=False))
    said = [*toy_tokenizer().encode(" abc").ids.tolist(), toy_tokenizer().eos_id]
    speak_up(model, std=1.2, seed=seed)
    with torch.no_grad():
        assert model.head is not None
        silent = torch.ones(258, dtype=torch.bool)
        silent[said] = False
        model.head.weight[silent] = 0.0
    return model.eval()


def settings(k: int = 3, max_new_tokens: int = M - 1) -> GenerateConfig:
    return GenerateConfig(num_neighbors=k, neighbor_len=R, max_new_tokens=max_new_tokens)


def asked(model: Retro, k: int, question: str = QUESTION) -> Answer:
    return ask(model, toy_tokenizer(), question, retriever=Shelf(), config=settings(k))


@functools.cache
def speaking(k: int, question: str = QUESTION) -> tuple[Retro, Answer]:
    """A model whose answer is of the form that `question_batch` writes: a space, words, EOS."""
    for seed in range(400):
        model = make_model(seed)
        answer = asked(model, k, question)
        text = answer.generation.text
        if answer.generation.finished and len(text) > 1 and text == " " + text.strip():
            return model, answer
    raise AssertionError("no such model")


def predict(model: Retro, batch: Batch) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.tensors().items() if name not in ("targets_BT", "loss_BT")}
    with torch.no_grad():
        return torch.as_tensor(model(inputs.pop("inputs_BT"), **inputs))


# Texts


def test_the_prompt_of_a_question_has_the_form_of_the_paper() -> None:
    assert question_prompt("Who was it?") == "question: Who was it? \nanswer:"


def test_white_space_in_a_question_is_one_space() -> None:
    assert question_prompt("  Who\n was\t\tit? ") == question_prompt("Who was it?")


@pytest.mark.parametrize("question", ["", " ", "\n\t"])
def test_an_empty_question_is_refused(question: str) -> None:
    with pytest.raises(ConfigError, match="the question is empty"):
        question_prompt(question)
    with pytest.raises(ConfigError, match="the question is empty"):
        asked(make_model(0), 3, question)
    with pytest.raises(ConfigError, match="the question is empty"):
        question_batch([QuestionItem(question, "x", [])], toy_tokenizer(), M)


def test_a_passage_is_read_with_its_title_and_its_continuation() -> None:
    assert passage_text(PASSAGES[0]) == "title: A title, source: one and more"
    assert source_text("Oil", "It ran out.") == "title: Oil, source: It ran out."


# The batch


def test_no_question_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no question"):
        question_batch([], toy_tokenizer(), M)


ITEMS = [
    QuestionItem("Who?", "Bob", ["title: x, source: y", "second"]),
    QuestionItem("Who was the one that sat there on the mat for so very long a time?", " a cat ", ["third"]),
    QuestionItem("When did it begin, and in which month of which year was it?", "in October 1973, they said", []),
    # Prompts of every length modulo M.
    *[QuestionItem("W" * n + "?", "x" * n, ["s"] * (n % 4)) for n in range(1, M + 1)],
]


def test_every_prompt_ends_at_a_border_and_its_answer_follows() -> None:
    batch = question_batch(ITEMS, toy_tokenizer(), M, neighbor_len=R)
    B, T = batch.inputs_BT.shape
    assert len(ITEMS) == B
    assert T % M == 0
    leads = set()
    for row, item in enumerate(ITEMS):
        prompt = prompt_ids(question_prompt(item.question), toy_tokenizer())
        answer = toy_tokenizer().encode(" " + item.answer.strip()).ids.tolist()
        kept = batch.keep_BT[row].nonzero().flatten().tolist()
        lead = kept[0]
        leads.add(lead)
        assert lead == -len(prompt) % M
        border = lead + len(prompt)
        assert border % M == 0
        assert kept == list(range(lead, border + len(answer)))
        assert batch.inputs_BT[row, kept].tolist() == prompt + answer
        assert toy_tokenizer().decode(batch.inputs_BT[row, border - 7 : border].tolist()) == "answer:"
        # Loss: the colon predicts the answer's first token, the answer's last token predicts EOS, nothing else counts.
        counted = batch.loss_BT[row].nonzero().flatten().tolist()
        assert counted == list(range(border - 1, border + len(answer)))
        assert batch.targets_BT[row, counted].tolist() == [*answer, toy_tokenizer().eos_id]
        assert batch.targets_BT[row, kept[:-1]].tolist() == (prompt + answer)[1:]
        # Sources: at the prompt's last chunk and at whole chunks of the answer, as when the answer is generated.
        assert batch.keep_BLKR is not None
        assert batch.neighbors_BLKR is not None
        chunks = batch.keep_BLKR[row].any(-1).any(-1).nonzero().flatten().tolist()
        finished = list(range(border // M - 1, (border + len(answer)) // M))
        assert chunks == (finished if item.sources else [])
        near = zip(batch.neighbors_BLKR[row, border // M - 1], batch.keep_BLKR[row, border // M - 1], strict=True)
        read = [toy_tokenizer().decode(ids[keep].tolist()) for ids, keep in near if keep.any()]
        assert read == [source[:R] for source in item.sources]
    assert leads == set(range(M))
    assert {int(n) for n in batch.keep_BT.sum(1)} != {T}
    assert not batch.document_BL.any()
    assert not (batch.inputs_BT == toy_tokenizer().eos_id).any()


def test_a_question_longer_than_a_chunk_has_its_sources_at_its_end() -> None:
    question = "Why " * 20
    batch = question_batch([QuestionItem(question, "so", ["a", "b"])], toy_tokenizer(), M)
    last = -(-len(prompt_ids(question_prompt(question), toy_tokenizer())) // M) - 1
    assert last >= 5
    assert batch.keep_BLKR is not None
    assert batch.keep_BLKR[0].any(-1).sum(-1).tolist() == [2 if chunk == last else 0 for chunk in range(last + 2)]


def test_closed_book_has_no_sources_and_the_same_text() -> None:
    closed = closed_book(ITEMS)
    assert [(i.question, i.answer, list(i.sources)) for i in closed] == [(i.question, i.answer, []) for i in ITEMS]
    batch, other = (question_batch(items, toy_tokenizer(), M) for items in (closed, ITEMS))
    assert batch.keep_BLKR is not None
    assert not batch.keep_BLKR.any()
    assert torch.equal(batch.inputs_BT, other.inputs_BT)
    assert torch.equal(batch.loss_BT, other.loss_BT)


# Asking


def test_a_question_is_looked_up_once_as_a_query_and_in_its_own_words() -> None:
    shelf = Shelf()
    question = "Who \n was it?"
    answer = ask(make_model(0), toy_tokenizer(), question, retriever=shelf, config=settings(2, max_new_tokens=3 * M))
    assert shelf.asked == [([question], 2, "query")]
    assert answer.passages == PASSAGES[:2]
    assert answer.question == question
    assert answer.generation.retrieved == {}
    assert answer.text == answer.generation.text.strip()


def test_ten_passages_are_read_and_32_tokens_said_unless_told_otherwise() -> None:
    shelf = Shelf()
    answer = ask(make_model(0), toy_tokenizer(), QUESTION, retriever=shelf)
    assert shelf.asked == [([QUESTION], 10, "query")]
    assert len(answer.generation.ids) <= 32


def test_confidence_is_the_geometric_mean_of_the_tokens_probabilities() -> None:
    answer = asked(make_model(0), 3)
    probabilities = torch.tensor(answer.generation.log_probs, dtype=torch.float64).exp()
    assert len(probabilities) > 0
    assert answer.confidence == pytest.approx(float(probabilities.prod() ** (1 / len(probabilities))))


@pytest.mark.parametrize("question", [QUESTION, "Who was the one that sat there on the mat for so very long?"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_training_sees_the_probabilities_with_which_the_answer_was_said(k: int, question: str) -> None:
    model, answer = speaking(k, question)
    item = QuestionItem(question, answer.text, [passage_text(p) for p in PASSAGES[:k]])
    # In company, so that the row is padded.
    batch = question_batch([item, ITEMS[1], ITEMS[2]], toy_tokenizer(), M, neighbor_len=R)
    targets = batch.targets_BT[0][batch.loss_BT[0]]
    assert targets.tolist() == answer.generation.ids
    log_probs = predict(model, batch)[0][batch.loss_BT[0]].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert log_probs.tolist() == pytest.approx(answer.generation.log_probs, abs=1e-5)


def test_the_passages_matter_to_the_answer() -> None:
    model, answer = speaking(3)
    assert asked(model, 0).generation.log_probs != pytest.approx(answer.generation.log_probs, abs=1e-3)


def test_a_closed_book_needs_no_retriever_and_asks_none() -> None:
    model, shelf = make_model(0), Shelf()
    answer = ask(model, toy_tokenizer(), QUESTION, retriever=shelf, config=settings(0))
    assert shelf.asked == []
    assert answer.passages == []
    assert ask(model, toy_tokenizer(), QUESTION, retriever=None, config=settings(0)) == answer


def test_finding_nothing_is_a_closed_book() -> None:
    model = make_model(0)
    nothing = ask(model, toy_tokenizer(), QUESTION, retriever=Shelf([]), config=settings(3))
    closed = ask(model, toy_tokenizer(), QUESTION, retriever=None, config=settings(0))
    assert nothing.generation == closed.generation


def test_passages_without_a_retriever_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs an index.*-k 0"):
        ask(make_model(0), toy_tokenizer(), QUESTION, retriever=None)


def test_pieces_are_streamed() -> None:
    pieces: list[str] = []
    answer = ask(
        make_model(0),
        toy_tokenizer(),
        QUESTION,
        retriever=Shelf(),
        config=settings(),
        on_token=lambda _, piece: pieces.append(piece),
    )
    assert "".join(pieces) == answer.generation.text


# Tokenizers that change texts


def word_piece_answer(word_pieces: str, said: str, passages: Sequence[Passage]) -> Answer:
    """What is made of these words, said by a model with a tokenizer as of BERT."""
    tokenizer = Tokenizer.wrap(tokenizers.Tokenizer.from_str(word_pieces))
    ids = tokenizer.encode(said).ids.tolist()
    generation = Generation(
        text=" " + tokenizer.decode(ids),
        ids=[*ids, tokenizer.eos_id],
        log_probs=[-0.5] * (len(ids) + 1),
        finished=True,
    )
    return to_answer(QUESTION, passages, generation, tokenizer=tokenizer)


def test_an_answer_is_written_as_the_first_passage_that_has_it_writes_it(word_pieces: str) -> None:
    found = [
        passage("Of oil, no word."),
        passage("The price was $1,000 in the U.S.,", continuation=" said the OIL Crisis Board."),
    ]
    for said, written in [
        ("oil crisis", "OIL Crisis"),
        ("u.s.", "U.S."),
        ("$ 1 , 000", "$1,000"),
        ("oil", "oil"),
        ("OIL", "oil"),
    ]:
        assert word_piece_answer(word_pieces, said, found).text == written


def test_an_answer_that_no_passage_has_is_the_tokenizers_text(word_pieces: str) -> None:
    assert word_piece_answer(word_pieces, "Oil Price", [passage("oil"), passage("")]).text == "oil price"
    assert word_piece_answer(word_pieces, "Oil", []).text == "oil"
    assert word_piece_answer(word_pieces, "", [passage("oil")]).text == ""


def test_which_tokenizers_keep_texts_as_they_are(word_pieces: str) -> None:
    assert toy_tokenizer().keeps_text
    assert not Tokenizer.wrap(tokenizers.Tokenizer.from_str(word_pieces)).keeps_text


def test_pieces_of_words_are_streamed_as_the_text_that_they_make(word_pieces: str) -> None:
    tokenizer = Tokenizer.wrap(tokenizers.Tokenizer.from_str(word_pieces))
    model = Retro(toy_model_config(vocab_size=tokenizer.vocab_size, chunk_len=M))
    for seed in range(5):
        model.initialize(torch.Generator().manual_seed(seed)).eval()
        pieces: list[str] = []
        generation = generate(
            model,
            tokenizer,
            ["When did the oil crisis begin?"],
            GenerateConfig(num_neighbors=0, temperature=1.0, seed=seed, max_new_tokens=24),
            retriever=None,
            on_token=lambda _, piece: pieces.append(piece),  # noqa: B023
        )[0]
        prompt = prompt_ids("When did the oil crisis begin?", tokenizer)
        assert "".join(pieces) == generation.text
        assert generation.text == tokenizer.decode([*prompt, *generation.ids])[len(tokenizer.decode(prompt)) :]


# Many questions, and bad ones


def test_many_questions_are_answered_as_each_alone() -> None:
    model = make_model(1)
    questions = [
        QUESTION,
        "Who was the one that sat there on the mat for so very long?",
        "W?",
        "\xbfQui\xe9n? \u8c01? \U0001f408",
    ]
    found = [PASSAGES, PASSAGES[1:], [], PASSAGES[2:]]
    told: list[str] = [""] * 4

    def on_token(number: int, piece: str) -> None:
        told[number] += piece

    answers = ask_many(model, toy_tokenizer(), questions, found, settings(2), on_token=on_token)
    for question, few, answer, text in zip(questions, found, answers, told, strict=True):
        alone = ask(model, toy_tokenizer(), question, retriever=Shelf(few), config=settings(2))
        assert (answer.question, answer.text) == (question, alone.text)
        assert answer.passages == alone.passages == few[:2]
        assert answer.generation.ids == alone.generation.ids
        assert answer.confidence == pytest.approx(alone.confidence, abs=1e-5)
        assert answer.prompt_tokens == len(prompt_ids(question_prompt(question), toy_tokenizer()))
        assert text == answer.generation.text


def test_passages_for_other_questions_than_were_asked_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 questions and passages for 1"):
        ask_many(make_model(0), toy_tokenizer(), [QUESTION, QUESTION], [PASSAGES])
    with pytest.raises(ConfigError, match="no prompt"):
        ask_many(make_model(0), toy_tokenizer(), [], [])


def test_a_passage_without_a_title_has_none() -> None:
    untitled = passage("one", title="", continuation=" and more")
    assert passage_text(untitled) == source_text("", "one and more") == "source: one and more"
    assert passage_text(PASSAGES[0]) == "title: A title, source: one and more"


def test_a_question_as_long_as_a_book_is_refused_before_anything_is_looked_up() -> None:
    frame = len(prompt_ids(question_prompt("W"), toy_tokenizer())) - 1
    longest = "W" * (MAX_PROMPT_TOKENS - frame)
    assert len(answer_prompt(longest, PASSAGES, toy_tokenizer(), M).ids) == MAX_PROMPT_TOKENS
    with pytest.raises(ConfigError, match=f"has {MAX_PROMPT_TOKENS + 1} tokens, at most {MAX_PROMPT_TOKENS} are read"):
        answer_prompt(longest + "W", PASSAGES, toy_tokenizer(), M)
    shelf = Shelf()
    with pytest.raises(ConfigError, match="the question is too long"):
        ask(make_model(0), toy_tokenizer(), "word " * 10_000, retriever=shelf)
    assert shelf.asked == []


def test_a_prompt_has_its_passages_where_it_ends() -> None:
    for length in range(1, 2 * M):
        prompt = answer_prompt("W" * length, PASSAGES, toy_tokenizer(), M)
        assert prompt.passages is not None
        assert prompt.passages == {
            (len(prompt.ids) + -len(prompt.ids) % M) // M - 1: [passage_text(p) for p in PASSAGES]
        }
