"""A model learns to read: facts that are only in the index are answered from the passages, and from nothing else.

The curriculum (passages are added when the model has mastered fewer) is what makes this learnable in minutes: started
with four passages it stays at chance for a long time.
"""

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from eval.attribution import attribute
from index_builder.build import build_index
from index_builder.live import add_documents, remove_documents
from index_builder.search import IndexRetriever
from retro.answer import ask, ask_many, question_prompt, source_text
from retro.attribution import answer_span, read_answer
from retro.config import GenerateConfig, ModelConfig, TrainConfig
from retro.model import Retro
from retro.question_batches import QuestionItem, closed_book, question_batch
from retro.tokenizer import Tokenizer
from retro.train_setup import make_optimizer
from retro.train_step import train_step

logger = logging.getLogger(__name__)
PASSAGES = 4
NAMES = 60
DECAY_STEPS = 150
CHUNK_LEN, NEIGHBOR_LEN = 16, 18
RELATIONS = (
    ("What is the capital of {e}?", "The capital of {e} is {v}."),
    ("Who founded {e}?", "{e} was founded by {v} long ago."),
    ("Which river flows through {e}?", "The river {v} flows through {e}."),
    ("What do people eat in {e}?", "In {e} people mostly eat {v}."),
    ("Which language is spoken in {e}?", "People in {e} speak {v}."),
    ("What is the currency of {e}?", "One pays with the {v} in {e}."),
)


class Fact(NamedTuple):
    entity: str
    relation: int
    value: str

    @property
    def question(self) -> str:
        return RELATIONS[self.relation][0].format(e=self.entity)

    @property
    def sentence(self) -> str:
        return RELATIONS[self.relation][1].format(e=self.entity, v=self.value)

    @property
    def source(self) -> str:
        return source_text(self.entity, self.sentence + "\n")


def names(random_: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = (random_.choice("bdfghjklmnprstvwz") + random_.choice("aeiou") for _ in range(3))
        found["".join(syllables).capitalize()] = None
    return list(found)


class World:
    """Invented facts: any number to train on, and 120 that stand in the index only."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.names = names(self.random, NAMES)
        self.held_out = self.distinct(120, frozenset())
        self.keys = frozenset((f.entity, f.relation) for f in self.held_out)

    def fact(self) -> Fact:
        entity, value = self.random.sample(self.names, 2)
        return Fact(entity, self.random.randrange(len(RELATIONS)), value)

    def distinct(self, count: int, forbidden: frozenset[tuple[str, int]]) -> list[Fact]:
        facts: dict[tuple[str, int], Fact] = {}
        while len(facts) < count:
            fact = self.fact()
            if (fact.entity, fact.relation) not in forbidden:
                facts.setdefault((fact.entity, fact.relation), fact)
        return list(facts.values())

    def training_item(self, passages: int) -> QuestionItem:
        """A fact among hard distractors: each says the same of another, or something else of the same."""
        facts = {(fact := self.distinct(1, self.keys)[0])[:2]: fact}
        while len(facts) < passages:
            other = self.fact()
            if self.random.random() < 0.75:
                other = other._replace(relation=fact.relation)
            elif other.value != fact.entity:
                other = other._replace(entity=fact.entity)
            if other[:2] not in self.keys:
                facts.setdefault(other[:2], other)
        shuffled = list(facts.values())
        self.random.shuffle(shuffled)
        return QuestionItem(fact.question, fact.value, [f.source for f in shuffled])


def accuracy(model: Retro, tokenizer: Tokenizer, items: Sequence[QuestionItem]) -> float:
    """Share of the answers' tokens, EOS left out, that are the most probable ones."""
    batch = question_batch(items, tokenizer, CHUNK_LEN, neighbor_len=NEIGHBOR_LEN)
    with torch.inference_mode():
        hidden_BTD = model.hidden(
            batch.inputs_BT,
            keep_BT=batch.keep_BT,
            document_BL=batch.document_BL,
            neighbors_BLKR=batch.neighbors_BLKR,
            keep_BLKR=batch.keep_BLKR,
        )
    targets = batch.targets_BT[batch.loss_BT]
    right = model.logits(hidden_BTD[batch.loss_BT]).argmax(dim=-1) == targets
    return float(right[targets != tokenizer.eos_id].double().mean())


def make_tokenizer(world: World) -> Tokenizer:
    facts = [world.fact() for _ in range(20_000)]
    texts = [f"{f.source} {question_prompt(f.question)} {f.value}" for f in facts]
    return Tokenizer.train(texts, vocab_size=1600)


def trained(world: World, tokenizer: Tokenizer) -> Retro:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=96,
        num_layers=4,
        num_heads=4,
        head_dim=24,
        ffw_dim=384,
        cca_layers=(2, 4),
        encoder_dim=96,
        encoder_layers=2,
        encoder_heads=4,
        encoder_head_dim=24,
        encoder_ffw_dim=384,
        chunk_len=CHUNK_LEN,
    )
    model = Retro(config).initialize(torch.Generator().manual_seed(0))
    model.pointing = 1.0
    optimizer = make_optimizer(model, TrainConfig())
    passages, mastered = 1, None
    for step in range(1, 1801):
        items = [world.training_item(passages) for _ in range(64)]
        decay = 1.0 if mastered is None else 1 - (step - mastered) / DECAY_STEPS
        train_step(
            model,
            optimizer,
            question_batch(items, tokenizer, CHUNK_LEN, neighbor_len=NEIGHBOR_LEN, evidence=True),
            micro_batch_size=64,
            rate=2.5e-3 * min(1, step / 30) * max(decay, 0.1),
            grad_clip=1.0,
            dtype=torch.float32,
        )
        if mastered is not None and step == mastered + DECAY_STEPS:
            break
        if step % 25 == 0:
            fresh = [world.training_item(passages) for _ in range(128)]
            score = accuracy(model, tokenizer, fresh)
            logger.info("step %d: %d passages, accuracy %.3f", step, passages, score)
            if score >= 0.9 and passages < PASSAGES:
                passages *= 2
            elif score >= 0.93 and mastered is None:
                mastered = step
    return model


class Reader(NamedTuple):
    world: World
    tokenizer: Tokenizer
    model: Retro


@pytest.fixture(scope="module")
def reader() -> Reader:
    """A model that has learned to read, and the world of its facts; of the held out ones it knows nothing."""
    torch.manual_seed(0)
    world = World(seed=0)
    tokenizer = make_tokenizer(world)
    return Reader(world, tokenizer, trained(world, tokenizer))


def write_facts(path: Path, facts: Sequence[Fact], first: int = 0) -> str:
    rows = [{"id": i, "title": f.entity, "text": f.sentence, "answer": f.value} for i, f in enumerate(facts, first)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_facts_that_are_only_in_the_index_are_read_from_four_passages(reader: Reader, tmp_path: Path) -> None:
    world, tokenizer, model = reader
    build_index([write_facts(tmp_path / "facts.jsonl", world.held_out)], tmp_path / "facts.index")
    retriever = IndexRetriever.open(tmp_path / "facts.index")

    found = retriever.retrieve([f.question for f in world.held_out], PASSAGES, role="query")
    items = [
        QuestionItem(f.question, f.value, [source_text(p.title, p.full_text + "\n") for p in near])
        for f, near in zip(world.held_out, found, strict=True)
    ]
    retrieved = sum(any(p.text == f.sentence for p in near) for f, near in zip(world.held_out, found, strict=True))
    on = accuracy(model, tokenizer, items)
    off = accuracy(model, tokenizer, closed_book(items))
    moved = items[1:] + items[:1]
    shuffled_items = [
        QuestionItem(own.question, own.answer, other.sources)
        for own, other in zip(items, moved, strict=True)
        if not any(own.answer in source for source in other.sources)
    ]
    shuffled = accuracy(model, tokenizer, shuffled_items)
    logger.info("found %d of %d; on %.3f, off %.3f, shuffled %.3f", retrieved, len(items), on, off, shuffled)
    assert on >= 0.95
    # Chance is one name in 60: two of 120 are expected, eight or more happen by chance once in a thousand times.
    assert off < 8 / 120
    assert shuffled < 8 / 120

    config = GenerateConfig(num_neighbors=PASSAGES, neighbor_len=NEIGHBOR_LEN, max_new_tokens=4)
    answers = [ask(model, tokenizer, f.question, retriever=retriever, config=config) for f in world.held_out]
    assert answers[0].text == world.held_out[0].value
    assert answers[0].generation.finished

    # Attribution knows which passage an answer was read from, and where it stands there.
    by_effect, by_attention, spans, right = 0, 0, 0, 0
    for fact, answer in zip(world.held_out, answers, strict=True):
        sources = [number for number, p in enumerate(answer.passages) if p.text == fact.sentence]
        if answer.text != fact.value or not sources:
            continue
        right += 1
        why = attribute(model, tokenizer, read_answer(answer, tokenizer, CHUNK_LEN), neighbor_len=NEIGHBOR_LEN)
        by_effect += int(why.passage_deltas()[:, why.attended.answer].sum(axis=1).argmax()) == sources[0]
        by_attention += int(why.attended.passage_shares()[why.attended.answer].mean(axis=0).argmax()) == sources[0]
        span = answer_span(why.attended, sources[0])
        spans += span is not None and fact.sentence[slice(*span)].strip() == fact.value
    logger.info("of %d: left out, it moves most %d; attended most %d; span %d", right, by_effect, by_attention, spans)
    assert right >= 0.9 * len(answers)
    assert by_effect >= 0.95 * right
    assert by_attention >= 0.9 * right
    assert spans >= 0.9 * right


@pytest.mark.slow
def test_what_is_known_of_fifty_facts_changes_with_the_index(reader: Reader, tmp_path: Path) -> None:
    world, tokenizer, model = reader
    facts, others = world.held_out[:50], world.held_out[50:]
    changed = [
        f._replace(value=world.random.choice([name for name in world.names if name not in (f.entity, f.value)]))
        for f in facts
    ]
    folder = tmp_path / "facts.index"
    build_index([write_facts(tmp_path / "facts.jsonl", others, first=len(facts))], folder)
    retriever = IndexRetriever.open(folder)  # it stays open, the model stays as it is
    config = GenerateConfig(num_neighbors=PASSAGES, neighbor_len=NEIGHBOR_LEN, max_new_tokens=4)

    def answers() -> list[str]:
        found = retriever.retrieve([f.question for f in facts], PASSAGES, role="query")
        return [a.text for a in ask_many(model, tokenizer, [f.question for f in facts], found, config)]

    def right(said: list[str], wanted: Sequence[Fact]) -> int:
        return sum(text == f.value for text, f in zip(said, wanted, strict=True))

    before = answers()
    corpus = write_facts(tmp_path / "facts.jsonl", facts)
    assert add_documents(folder, [corpus], encoder=retriever.encoder).added == 50
    told = answers()
    write_facts(tmp_path / "facts.jsonl", changed)
    assert add_documents(folder, [corpus], update=True, encoder=retriever.encoder).updated == 50
    told_otherwise = answers()
    assert remove_documents(folder, [f"facts:{number}" for number in range(50)]).removed == 50
    after = answers()
    counts = [right(before, facts), right(told, facts), right(told_otherwise, changed), right(told_otherwise, facts)]
    logger.info("right before %d; told %d; told otherwise %d, of which %d as before", *counts)
    # Chance is one name in 60: six or more of fifty happen by chance once in a few thousand times.
    assert right(before, facts) < 6
    assert right(told, facts) >= 45
    assert right(told_otherwise, changed) >= 45
    assert right(told_otherwise, facts) < 6
    assert after == before
