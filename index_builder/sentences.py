"""What a text is made of: passages of whole sentences, the words that say what a sentence is about, and what can be blanked in it.

Rules for English prose, by capital letters and digits alone: they need no model and read a million words in three seconds.
"""

import re
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from retro.chunks import name_hash

KINDS = ("name", "word", "year", "date", "number")
"""What can be blanked: names of several words, single words with a capital letter, years, dates, other numbers."""
NAME, WORD, YEAR, DATE, NUMBER = range(len(KINDS))
PASSAGE_WORDS = 60
"""Words of a passage, with its title well below the 160 tokens that the neighbor encoder reads."""
PASSAGE_CHARS = 450
GROUP, INITIAL, TITLE = 0x3F, 0x40, 0x80
"""Parts of a word's mark: the name that it belongs to (0: none), whether it begins the sentence, whether it is of the title."""
FIGURE = 0x3F
"""Group of all that begins with a digit."""

_UPPER = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.isupper() and ord(c) < 0x2C00)
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_CALENDAR = frozenset(f"{_MONTH}|Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday".split("|"))
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof|Gen|Col|Lt|Sgt|Capt|Rev|Hon|Gov|Sen|Rep|Pres|Mt|Ft|No|Nos|Vol|vs|v|c|ca|cf|etc|e\.g|i\.e|"
    r"al|approx|Inc|Ltd|Co|Corp|Bros|dept|ed|eds|pp|p|fl|b|d|r|Jan|Feb|Mar|Apr|Aug|Sept|Sep|Oct|Nov|Dec)|\b[A-Z]|\.[a-zA-Z])$"
)
_END = re.compile(rf"[.!?][\"'\u201d\u2019)\]]*(?=\s+[\"'\u201c\u2018(\[]?[0-9{_UPPER}])")
# A digit run with its separators, or a word without a possessive s.
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*[^\W\d_]*|[^\W\d_](?:\w|['\u2019](?!s\b)(?=[^\W\d_]))*")
_DATE = re.compile(
    rf"(?:\b\d{{1,2}} (?:{_MONTH})|\b(?:{_MONTH}) \d{{1,2}})\b(?!,\d)(?:,? [12]\d{{3}}\b)?|\b(?:{_MONTH}),? [12]\d{{3}}\b"
)
_HAS_MONTH = re.compile(rf"\b(?:{_MONTH})\b")
_YEAR = re.compile(r"1\d{3}|20[0-2]\d")
_SCALE = re.compile(r" (?:hundred|thousand|million|billion|trillion)\b")
_RESIDUE = re.compile(r"\(\s*[,;:)]|[,;:]\s*\)|\s[,;.]|,,|''|[|_]")
"""What an extractor leaves where a formula, a transcription or a table was."""
_INSIDE_NAMES = "of the de la le las los del della di da do dos du des van von der den ter al el bin ibn"
"""Small words that may stand between two capitalized ones of a name."""
_STOP_WORDS = """\
a an the this that these those there here it its itself he him his himself she her hers herself they them their theirs
we us our you your i me my one ones who whom whose which what when where why how and or but nor so yet if then than as
at by for from in into of off on onto out over to up upon with within without about above across after again against
along also although among amongst am is are was were be been being have has had having do does did doing can could may
might must shall should will would not no yes all any both each either every few more most much many neither none
other others another same several some such only own too very just because before below between beyond despite down
during else even ever except however indeed instead later least less like meanwhile moreover near now often once
perhaps quite rather since still therefore though through throughout thus together toward towards under unless unlike
until usually via well whether while yet according due per around became become becomes called don didn doesn isn wasn
weren aren hadn hasn haven won't don't didn't doesn't isn't wasn't weren't can't couldn't today furthermore
additionally nevertheless nowadays originally currently first"""
_PRONOUN_WORDS = "he she it they his her its their him them this these that those such we i you here there"
_INSIDE, _STOP, _PRONOUNS = (frozenset(words.split()) for words in (_INSIDE_NAMES, _STOP_WORDS, _PRONOUN_WORDS))


class Blank(NamedTuple):
    """Something that a question can ask for."""

    start: int
    """Span of characters of the passage, as `end`."""
    end: int
    kind: int
    """Index into KINDS."""
    first: int
    """Its words among those of the sentence, half-open, as `last`."""
    last: int


class Sentence(NamedTuple):
    """A sentence in its passage."""

    start: int
    """Span of characters of the passage, as `end`."""
    end: int
    words: "array[int]"
    """64-bit hashes of the words that say something, in order."""
    marks: "array[int]"
    """A byte for each: see GROUP, INITIAL, TITLE."""
    blanks: list[Blank]
    """Empty where nothing should be asked: the sentence is short, long, or no whole sentence."""
    leans: bool
    """Whether it begins with a pronoun, so that it says nothing without the title."""


@lru_cache(maxsize=1 << 18)
def word_hash(word: str) -> int:
    """Stands for a word, in lower case and without the s of a plural; 0 for words that say nothing."""
    word = word.lower().replace("\u2019", "'")
    if word in _STOP or (len(word) == 1 and not word.isdigit()):
        return 0
    if len(word) > 3 and word[-1] == "s" and word[-2] != "s" and not word[0].isdigit():
        word = word[:-1]
    return name_hash(word)


def words_of(text: str) -> Iterator[int]:
    """The hashes of the words of a text that say something, in order."""
    return filter(None, map(word_hash, _TOKEN.findall(text)))


def title_name(title: str) -> str:
    """A title without what tells it from others of the same name: `Jaws (film)` is Jaws."""
    return re.sub(r"\s*\([^()]*\)\s*$", "", title).strip() or title.strip()


def sentences_of(text: str) -> Iterator[str]:
    """The sentences of a text; one never crosses a line."""
    for line in text.split("\n"):
        start = 0
        for match in _END.finditer(line):
            if line[match.start()] == "." and _ABBREVIATION.search(line, max(start, match.start() - 8), match.start()):
                continue
            yield line[start : match.end()].strip()
            start = match.end()
        if rest := line[start:].strip():
            yield rest


def passages_of(text: str) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Cuts a text into passages of whole sentences.

    Returns:
        Each passage, and the spans of its sentences. A sentence that is longer than a passage may be is left out.
    """
    parts: list[str] = []
    words = chars = 0
    for sentence in sentences_of(text):
        count = sentence.count(" ") + 1
        if parts and (words + count > PASSAGE_WORDS or chars + len(sentence) >= PASSAGE_CHARS):
            yield _joined(parts)
            parts, words, chars = [], 0, 0
        if count <= PASSAGE_WORDS and len(sentence) <= PASSAGE_CHARS:
            parts.append(sentence)
            words += count
            chars += len(sentence) + 1
    if parts:
        yield _joined(parts)


def _joined(parts: list[str]) -> tuple[str, list[tuple[int, int]]]:
    spans, start = [], 0
    for part in parts:
        spans.append((start, start + len(part)))
        start += len(part) + 1
    return " ".join(parts), spans


def read_sentence(passage: str, start: int, end: int, *, words: tuple[int, int]) -> Sentence:
    """The words of one sentence, the names among them, and what can be blanked.

    Args:
        passage: The text.
        start: Span of the sentence in it, as `end`.
        end: See above.
        words: Fewest and most words of a sentence that is asked about.
    """
    found, marks, places = array("Q"), array("B"), array("H")
    names = _Names(passage)
    blanks: list[tuple[int, int, int]] = []
    dates = [m.span() for m in _DATE.finditer(passage, start, end)] if _HAS_MONTH.search(passage, start, end) else []
    blanks += [(first, last, DATE) for first, last in dates]
    count = 0
    for match in _TOKEN.finditer(passage, start, end):
        token, (first, last) = match[0], match.span()
        count += 1
        value = word_hash(token)
        if token[0].isdigit():
            names.end()
            mark = FIGURE
            if _YEAR.fullmatch(token):
                blanks.append((first, last, YEAR))
            elif token[-1].isdigit() and not any(a <= first < b for a, b in dates):
                scale = _SCALE.match(passage, last, end)
                if scale or last - first > 1:  # a lone digit is found everywhere
                    blanks.append((first, scale.end() if scale else last, NUMBER))
        else:
            mark = names.group(token, first, last, says=value != 0)
            if count == 1:
                mark |= INITIAL
        if value:
            found.append(value)
            marks.append(mark)
            places.append(first)
    names.end()
    blanks += names.spans
    first_word = _TOKEN.search(passage, start, end)
    leans = first_word is not None and first_word[0].lower() in _PRONOUNS
    whole = words[0] <= count <= words[1] and passage[end - 1] in ".!?\"'\u201d)" and not passage[start].islower()
    if not whole or _RESIDUE.search(passage, start, end):
        blanks = []
    placed = [Blank(a, b, kind, bisect_left(places, a), bisect_left(places, b)) for a, b, kind in sorted(blanks)]
    return Sentence(start, end, found, marks, [b for b in placed if b.first < b.last], leans)


class _Names:
    """Finds runs of capitalized words while the tokens of a sentence go by."""

    def __init__(self, passage: str) -> None:
        self._passage = passage
        self._start = self._end = self._words = self._last = 0
        self._open = False
        self._number = 0
        self.spans: list[tuple[int, int, int]] = []

    def group(self, token: str, first: int, last: int, *, says: bool) -> int:
        """The number of the name that a token belongs to, 0 for none; `says`: it is no stop word."""
        gap = self._passage[self._last : first] if self._open else None
        linked = gap in (" ", "-", "\u2013") or (gap in (". ", ".") and _is_short(self._passage, self._last))
        self._last = last
        capital = token[0].isupper() and token not in _CALENDAR
        if self._open and linked and token in _INSIDE:
            return 0  # it belongs to the name if a capitalized word follows
        if not (self._open and linked and capital and self._words < 6):
            self.end()
            self._last = last
            if not capital or (not says and len(token) > 1):
                return 0
            self._open, self._start, self._words = True, first, 0
            self._number = min(self._number + 1, FIGURE - 1)
        self._words += 1
        if says or len(token) == 1:
            self._end = last
        return self._number

    def end(self) -> None:
        """No further token belongs to the name that is open."""
        initials = self._passage[self._end - 2 : self._end + 1]
        if len(initials) == 3 and initials[0] == initials[2] == ".":
            self._end += 1  # the period of F.C.
        if self._open and self._end - self._start > 2:
            several = _TOKEN.fullmatch(self._passage, self._start, self._end) is None
            self.spans.append((self._start, self._end, NAME if several else WORD))
        self._open = False


def _is_short(text: str, end: int) -> bool:
    """Whether an initial, or an abbreviation such as St, ends at this place, so that a period after it ends no name."""
    return bool(re.search(r"\b(?:[A-Z]|St|Dr|Mt|Ft|Jr|Sr)$", text[max(end - 3, 0) : end]))
