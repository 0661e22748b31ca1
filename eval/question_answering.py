"""`retro eval qa`: questions with known answers are asked of a model, with the passages found and in other ways beside."""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eval.language_modeling import Foreign
from eval.lm_record import Opened, open_for_eval
from eval.predictions import MODES, Asking, Found, Gold, Mode, Predictions, QaConfig
from eval.qa_record import qa_record
from eval.questions import Question, frequent_answers
from eval.records import Record
from index_builder.search import IndexRetriever
from index_builder.shards import Progress
from retro.answer import answer_prompt, ask_many, passage_text
from retro.artifact import fingerprint, read_manifest, writing
from retro.checkpoint import KIND
from retro.chunks import Passage
from retro.errors import ConfigError, MismatchError
from retro.pretrained import digests
from retro.prompted import PromptedModel
from retro.threshold import ANSWERS
from retro.tokenizer import Tokenizer

VERSION = 2
"""Of what is asked of the same index and questions: an interrupted evaluation of another version does not go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted:
    """A model that passages are pasted for."""

    name: str
    model: PromptedModel


def open_model(folder: Path, device: str = "cpu") -> Opened:
    """Opens a model of ours; its fingerprint is the same whatever confidence is kept with it.

    Raises:
        FormatError, MismatchError: It is damaged.
        ConfigError: There is no such model, or it is one of Hugging Face.
    """
    opened = open_for_eval(str(folder), device)
    if isinstance(opened.model, Foreign):
        raise ConfigError(f"{folder} is a model of Hugging Face: name it as --prompt-model, beside one of ours")
    files = {name: record for name, record in read_manifest(folder, KIND)["files"].items() if name != ANSWERS}
    return replace(opened, fingerprint=fingerprint(files))


def measure_answers(
    opened: Opened,
    questions: Sequence[Question],
    config: QaConfig,
    *,
    retriever: IndexRetriever | None = None,
    gold: IndexRetriever | None = None,
    prompted: Prompted | None = None,
    training: Sequence[Question] = (),
    skip_bad: bool = False,
    out: Path | None = None,
    overwrite: bool = False,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Record, dict[str, list[Any]], list[dict[str, Any]]]:
    """Asks a model questions in several modes, and measures what it says.

    Args:
        opened: The model.
        questions: See `eval.questions.read_questions`.
        config: Without modes: all for which there is what they need.
        retriever: Finds passages; not needed where none are read.
        gold: Index of the documents that questions name, if it is another one.
        prompted: The model that passages are pasted for.
        training: Questions of which the most frequent answers are taken.
        skip_bad: Leave questions out that are too long, instead of stopping at them.
        out: Folder of the report, in which the predictions are kept.
        overwrite: Ask again what was asked before.
        notes: For the record.
        progress: Told how far it is.

    Returns:
        A record, its units, and the predictions (see `Asking.run`).

    Raises:
        ConfigError: There is nothing to ask, a question is too long, or a mode needs what is not there.
        MismatchError: The mode gold is asked for, and no question names a document of the index.
    """
    began = time.monotonic()
    asked, noted = _askable(opened, questions, skip_bad)
    modes, gold_of, why = _modes(opened, asked, config, retriever, gold, prompted, training)
    config = replace(config, modes=modes)
    frequent = frequent_answers(training, asked) if "frequent" in modes else {}
    recipe, fingerprints = _identity(opened, asked, config, retriever, gold, prompted, frequent)
    predictions = Predictions(out, opened.name, recipe, overwrite=overwrite)
    with contextlib.nullcontext() if predictions.folder is None else writing(predictions.folder):
        found = None
        incomplete = len(predictions.lines) < len(asked)
        if incomplete and retriever is not None and set(modes) & {"retrieval", "shuffled", "prompt"}:
            found = Found(retriever, asked, config.num_neighbors, seed=config.seed, progress=progress)
        asking = Asking(
            questions=asked,
            config=config,
            ask=functools.partial(ask_many, opened.model, opened.tokenizer),
            passage_tokens=functools.partial(_passage_tokens, opened.tokenizer, config.neighbor_len),
            found=found,
            gold=gold_of,
            prompted=None if prompted is None else prompted.model.ask_many,
            frequent=frequent,
        )
        lines = asking.run(predictions, progress)
    record, units = qa_record(
        opened.name,
        lines,
        num_read=config.num_neighbors,
        configuration=recipe["configuration"]
        | {"batch_size": config.batch_size, "predictions": predictions.folder and str(predictions.folder)},
        fingerprints=fingerprints,
        notes=(*notes, *noted, *why),
        seed=config.seed,
        seconds=round(time.monotonic() - began, 3),
    )
    return record, units, lines


def _askable(opened: Opened, questions: Sequence[Question], skip_bad: bool) -> tuple[list[Question], list[str]]:
    """The questions that a model takes, and what is to be said about the others."""
    asked: list[Question] = []
    for question in questions:
        try:
            answer_prompt(question.text, (), opened.tokenizer, opened.model.config.chunk_len)
        except ConfigError as error:
            if not skip_bad:
                raise ConfigError(f"{question.id}: {error}; or leave it out with --on-error skip") from error
            continue
        asked.append(question)
    if not asked:
        raise ConfigError("there is no question to ask")
    left = len(questions) - len(asked)
    return asked, [f"{left:,} questions are too long and left out."] if left else []


def _modes(
    opened: Opened,
    asked: Sequence[Question],
    config: QaConfig,
    retriever: IndexRetriever | None,
    gold: IndexRetriever | None,
    prompted: Prompted | None,
    training: Sequence[Question],
) -> tuple[tuple[Mode, ...], Gold | None, list[str]]:
    """The modes to ask in, the documents that questions name, and why there are none of these."""
    reads = config.num_neighbors > 0
    there: dict[Mode, bool] = {
        "retrieval": reads and opened.retrieves and retriever is not None,
        "shuffled": reads and opened.retrieves and retriever is not None and len(asked) > 1,
        "closed": True,
        "gold": reads and opened.retrieves and (gold or retriever) is not None,
        "prompt": reads and prompted is not None and retriever is not None,
        "frequent": bool(training),
    }
    needed = {
        "shuffled": "two questions and an index (--index)",
        "gold": "an index (--index or --gold-index)",
        "prompt": "another model (--prompt-model) and an index (--index)",
        "frequent": "training questions (--train-questions)",
    }
    if not config.modes and reads and opened.retrieves and retriever is None:
        raise ConfigError("finding passages needs an index: name one with --index, or ask without (-k 0)")
    for mode in config.modes:
        if not there[mode]:
            if not opened.retrieves and mode in ("retrieval", "shuffled", "gold"):
                raise ConfigError(f"{opened.name} was made without retrieval: measure it with --modes closed")
            if not reads and mode != "frequent":
                raise ConfigError(f"without passages (-k 0) there is no mode {mode}: use --modes closed")
            raise ConfigError(f"the mode {mode} needs {needed.get(mode, 'an index (--index)')}")
    wanted = config.modes or tuple(mode for mode in MODES if there[mode])
    named = None
    why = []
    if "gold" in wanted:
        place = gold or retriever
        assert place is not None
        try:
            named = Gold(place, asked)
        except MismatchError as error:
            if config.modes:
                raise
            wanted = tuple(mode for mode in wanted if mode != "gold")
            why = [f"Without gold passages: {error}."] if any(question.gold for question in asked) else []
    return wanted, named, why


def _identity(
    opened: Opened,
    asked: Sequence[Question],
    config: QaConfig,
    retriever: IndexRetriever | None,
    gold: IndexRetriever | None,
    prompted: Prompted | None,
    frequent: Mapping[str, tuple[str, float]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """All that determines the answers, as plain data, and the fingerprints of it."""
    configuration: dict[str, Any] = asdict(config)
    del configuration["batch_size"]
    configuration |= {
        "version": VERSION,
        "modes": list(config.modes),
        "questions": dict(Counter(question.data_set for question in asked)),
        "index": retriever and str(retriever.folder),
        "retriever": retriever and retriever.method,
        "where": retriever and retriever.where and retriever.where.text,
        "gold_index": gold and str(gold.folder),
        "prompt_model": prompted and prompted.name,
    }
    fingerprints = {
        "model": opened.fingerprint,
        "tokenizer": opened.tokenizer.fingerprint,
        "questions": fingerprint([asdict(question) for question in asked]),
    }
    for name, index in (("index", retriever), ("gold index", gold)):
        if index is not None:
            fingerprints |= {name: index.fingerprint, f"encoder of {name}": index.encoder_fingerprint}
    if prompted is not None:
        fingerprints["prompt model"] = fingerprint(digests(prompted.model.model))
    if frequent:
        fingerprints["frequent answers"] = fingerprint(dict(frequent))
    return {"configuration": configuration, "fingerprints": fingerprints}, fingerprints


def _passage_tokens(tokenizer: Tokenizer, neighbor_len: int, passages: Sequence[Passage]) -> int:
    encoded = tokenizer.encode_batch([passage_text(passage) for passage in passages])
    return sum(min(len(ids), neighbor_len) for ids in encoded)
