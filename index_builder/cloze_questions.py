"""Words for the questions that a corpus gives: what is asked, the passages that state the answer, and those that only seem to.

A block of sentences is looked up at a time, in any process, and its questions are written to a file.
"""

import functools
import json
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index_builder.evidence import BLANKS, Match, find_evidence
from index_builder.sentence_index import LEANS, SentenceIndex
from index_builder.sentences import KINDS, title_name, words_of
from retro.artifact import write_atomically
from retro.chunks import SPLITS, load_array
from retro.tokenizer import Tokenizer

BLANK = "_"
"""What stands for the answer: at most two tokens of a byte-level BPE, its space included. No sentence with one is asked about."""
PER_SENTENCE = 3
"""Questions that a sentence may become."""
MAX_EVIDENCE = 4
"""Passages of a question that state its answer."""
BLOCK = 4096
"""Sentences that are looked up in one piece."""
AT_ONCE = 256


class Cloze(NamedTuple):
    """A question."""

    question: str
    answer: str
    kind: str
    split: str
    own: int
    """The passage it was made of."""
    candidates: list[tuple[int, str | None]]
    """Passages, best first, and the answer in the words of each that states it."""


@dataclass(frozen=True, slots=True)
class Block:
    """Sentences to look up, and all that a process needs for it."""

    work: Path
    made: int
    """When the index was made: what a process has open may be of an earlier one."""
    number: int
    candidates: int
    seed: int
    tokens: int
    """What a question may have, without what stands around it in the prompt."""

    @property
    def path(self) -> Path:
        return self.work / "blocks" / f"{self.number:06d}.json"


@functools.lru_cache(maxsize=1)
def _opened(work: Path, _made: int) -> "tuple[Texts, Tokenizer, NDArray[np.int64]]":
    return Texts(SentenceIndex(work / "index")), Tokenizer.load(str(work)), load_array(work / "order.npy")


def make_block(block: Block) -> Path:
    """Makes the questions of a block of sentences, and writes them to its file."""
    if block.path.is_file():
        return block.path
    texts, tokenizer, order = _opened(block.work, block.made)
    sentences = order[block.number * BLOCK : (block.number + 1) * BLOCK]
    counts: Counter[str] = Counter(sentences_asked=len(sentences))
    blanks_S = texts.index.arrays.blank_starts[sentences + 1] - texts.index.arrays.blank_starts[sentences]
    counts["blanks_tried"] = int(np.minimum(blanks_S, BLANKS).sum())
    questions: list[Cloze] = []
    of_sentence: Counter[int] = Counter()
    for first in range(0, len(sentences), AT_ONCE):
        for match in find_evidence(texts.index, sentences[first : first + AT_ONCE], block.seed):
            counts["blanks_with_evidence"] += 1
            if of_sentence[match.sentence] == PER_SENTENCE:
                continue
            made = texts.question(match, block.candidates, block.seed)
            if isinstance(made, str):
                counts[made] += 1
            else:
                questions.append(made)
                of_sentence[match.sentence] += 1
    lengths = [len(ids) for ids in tokenizer.encode_batch([made.question for made in questions])]
    fit = [made for made, length in zip(questions, lengths, strict=True) if length <= block.tokens]
    counts["too_long"] += len(questions) - len(fit)
    content = {"counts": counts, "questions": [made._asdict() for made in fit]}
    write_atomically(block.path, lambda file: file.write(json.dumps(content, ensure_ascii=False).encode()))
    return block.path


_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2013\u2014\u2018\u2019\u201c\u201d", " "))


def _normalized(text: str) -> str:
    """Lower case, without punctuation, a space at each end."""
    return f" {' '.join(text.casefold().translate(_PUNCTUATION).split())} "


class Texts:
    """The texts of an index' passages, and questions made of them."""

    def __init__(self, index: SentenceIndex) -> None:
        self.index = index
        self._split_P = np.repeat(index.arrays.splits, np.diff(index.arrays.passage_starts))
        self._passages = [np.flatnonzero(self._split_P == split) for split in range(len(SPLITS))]

    def titled(self, passage: int) -> tuple[str, str]:
        """Title and text."""
        document = int(self.index.document_of(np.array([passage]))[0])
        return self.index.title(document), self.index.passage(passage)

    def shown(self, passage: int) -> str:
        """Both, for people."""
        return ": ".join(filter(None, self.titled(passage)))

    def question(
        self, match: Match, num_candidates: int, seed: int
    ) -> Cloze | Literal["answer_in_question", "no_title", "not_literal"]:
        """Puts a question into words and chooses its passages.

        Args:
            match: What was found.
            num_candidates: Passages to choose.
            seed: Of the choice.

        Returns:
            The question, or why there is none.
        """
        arrays = self.index.arrays
        own = int(self.index.passage_of(np.array([match.sentence]))[0])
        title, text = self.titled(own)
        first, last = arrays.spans[match.sentence].tolist()
        start, end, kind = match.blank
        answer = text[start:end]
        name = title_name(title)
        if arrays.flags[match.sentence] & LEANS and not name:
            return "no_title"
        before = f"{name}: {text[first:start]}" if match.titled else text[first:start]
        if not set(words_of(answer)).isdisjoint([*words_of(before), *words_of(text[end:last])]):
            return "answer_in_question"
        evidence, distractors = self._candidates(match, own, answer)
        if not evidence:
            return "not_literal"
        evidence = evidence[:MAX_EVIDENCE]
        wanted = num_candidates - len(evidence)
        taken = {own, *(passage for _, passage, _ in evidence)}
        chosen: list[tuple[int, int, str | None]] = list(evidence)
        looked_for = _normalized(answer)
        part = max(looked_for.split(), key=len)
        random = np.random.default_rng([seed, match.sentence, 1])
        near = random.permutation(self._same_article(own))[:wanted].tolist()
        far = random.choice(self._passages[self._split_P[own]], 2 * num_candidates).tolist()
        # A quarter is kept for the same article, half where others are wanting; what shares nothing comes last.
        found = wanted - min(wanted // 4, len(near))
        plan = [
            *distractors[:found],
            *((len(match.found) + n, passage) for n, passage in enumerate(near[: wanted // 2])),
            *distractors[found:],
            *((2 * len(match.found) + n, passage) for n, passage in enumerate(far)),
        ]
        for rank, passage in plan:
            if len(chosen) - len(evidence) == wanted:
                break
            if passage in taken:
                continue
            shown = self.shown(passage)
            if part not in shown.casefold() or looked_for not in _normalized(shown):
                taken.add(passage)
                chosen.append((rank, passage, None))
        return Cloze(
            question=before + BLANK + text[end:last],
            answer=answer,
            kind=KINDS[kind],
            split=SPLITS[self._split_P[own]],
            own=own,
            candidates=[(passage, target) for _, passage, target in sorted(chosen, key=lambda c: c[0])],
        )

    def _candidates(
        self, match: Match, own: int, answer: str
    ) -> tuple[list[tuple[int, int, str | None]], list[tuple[int, int]]]:
        """Passages of the sentences found, with their ranks: those that state the answer literally, with it, and those without it,
        the ones with something of its kind first."""
        # Not inside a longer number or word, nor at the end of a range.
        pattern = re.compile(rf"(?<![\w-])(?<!\d[.,]){re.escape(answer)}(?!\w|[.,]\d|-\w)", re.IGNORECASE)
        evidence: dict[int, tuple[int, int, str | None]] = {}
        without: dict[int, tuple[bool, int]] = {}
        passages = self.index.passage_of(np.array(match.found)).tolist()
        spans = self.index.arrays.spans[match.found].tolist()
        for rank, (passage, span, states, holds, alike) in enumerate(
            zip(passages, spans, match.evidence, match.holds, match.alike, strict=True)
        ):
            if passage == own:
                continue
            if states and passage not in evidence:
                title, text = self.titled(passage)
                if (literal := pattern.search(text[slice(*span)]) or pattern.search(title)) is not None:
                    evidence[passage] = (rank, passage, literal[0])
            elif not holds and passage not in without:
                without[passage] = (not alike, rank)
        order = sorted((*value, passage) for passage, value in without.items() if passage not in evidence)
        return list(evidence.values()), [(rank, passage) for _, rank, passage in order]

    def _same_article(self, passage: int) -> NDArray[np.int64]:
        document = int(self.index.document_of(np.array([passage]))[0])
        return np.arange(*self.index.arrays.passage_starts[document : document + 2])
