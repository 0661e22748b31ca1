"""Sentences, what can be blanked in them, their index against naive counts, and what is taken for evidence."""

import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from index_builder import sentence_index
from index_builder.cloze_questions import Cloze, Texts
from index_builder.evidence import _Queries, _search, _shared, find_evidence
from index_builder.sentence_index import RARE, UNKNOWN, Article, SentenceArrays, SentenceIndex, write_shard
from index_builder.sentence_index import build_sentence_index as build
from index_builder.sentences import (
    KINDS,
    PASSAGE_WORDS,
    passages_of,
    read_sentence,
    sentences_of,
    title_name,
    word_hash,
)

WORDS = (6, 40)


def blanks_of(sentence: str) -> set[tuple[str, str]]:
    read = read_sentence(sentence, 0, len(sentence), words=WORDS)
    return {(KINDS[b.kind], sentence[b.start : b.end]) for b in read.blanks}


def make_index(folder: Path, articles: list[Article], sizes: list[int]) -> SentenceIndex:
    """An index of articles in shards of these sizes."""
    shards, first = [], 0
    for number, size in enumerate(sizes):
        shards.append(folder / f"{number}.npz")
        write_shard(shards[-1], articles[first : first + size], WORDS)
        first += size
    build(folder / "index", shards, lambda done: None)
    return SentenceIndex(folder / "index")


# --- sentences ----------------------------------------------------------------------------------------------------


def test_sentences_end_neither_at_initials_nor_at_abbreviations_but_at_every_line() -> None:
    text = (
        'He met J. R. R. Tolkien in St. Louis. "Really?" It cost 3.5 U.S. dollars.\nHistory\nDr. No came out in 1962.'
    )
    assert list(sentences_of(text)) == [
        "He met J. R. R. Tolkien in St. Louis.",
        '"Really?"',
        "It cost 3.5 U.S. dollars.",
        "History",
        "Dr. No came out in 1962.",
    ]


def test_passages_are_whole_sentences_in_order_and_leave_out_only_overlong_ones() -> None:
    short = [f"Sentence number {n} has exactly eight words here." for n in range(20)]
    long = " ".join(["Word"] * (PASSAGE_WORDS + 1)) + "."
    passages = list(passages_of(" ".join([*short[:10], long, *short[10:]])))
    told = [passage[start:end] for passage, spans in passages for start, end in spans]
    assert told == short
    assert all(passage == " ".join(passage[a:b] for a, b in spans) for passage, spans in passages)
    assert max(len(passage.split()) for passage, _ in passages) <= PASSAGE_WORDS
    assert len(passages) == 4  # of at most seven sentences, one begun anew at the long one


def test_names_years_dates_and_numbers_can_be_blanked() -> None:
    assert blanks_of("In May 1889 the Eiffel Tower in Paris, 330 m tall, was opened by Gustave Eiffel's firm.") == {
        ("date", "May 1889"),
        ("year", "1889"),
        ("name", "Eiffel Tower"),
        ("word", "Paris"),
        ("number", "330"),
        ("name", "Gustave Eiffel"),
    }
    assert blanks_of(
        "He left the University of California and Portsmouth F.C. with 1.5 million dollars on 4 July 1976."
    ) == {
        ("name", "University of California"),
        ("name", "Portsmouth F.C."),
        ("number", "1.5 million"),
        ("date", "4 July 1976"),
        ("year", "1976"),
    }


@pytest.mark.parametrize(
    "sentence",
    [
        "Paris is in France.",  # short
        "the town of Paris lies in the north of France.",  # begins in the middle
        "Towns in the north of France such as Paris (, ) are large.",  # an extractor's residue
        "Towns in the north such as _ and Paris are large.",  # a blank of its own
        "Then came " + "Paris and " * 40 + "Rome.",  # long
        "Towns in the north of France such as Paris",  # no end
    ],
)
def test_nothing_is_asked_of_a_fragment(sentence: str) -> None:
    assert blanks_of(sentence) == set()


def test_words_are_compared_without_case_and_plural_and_stop_words_say_nothing() -> None:
    assert word_hash("Tower") == word_hash("towers") != word_hash("tow")
    assert word_hash("glass") != word_hash("glas")
    assert word_hash("The") == word_hash("x") == 0
    assert word_hash("5") != 0
    assert title_name("Jaws (film)") == "Jaws"


def test_a_blank_names_its_own_words() -> None:
    sentence = "The firm of Gustave Eiffel opened the Eiffel Tower in Paris in 1889."
    read = read_sentence(sentence, 0, len(sentence), words=WORDS)
    for blank in read.blanks:
        expected = [word_hash(word) for word in sentence[blank.start : blank.end].split()]
        assert list(read.words[blank.first : blank.last]) == expected


# --- index --------------------------------------------------------------------------------------------------------

NOUNS = ["Adam", "Berlin", "cathedral", "Danube", "emperor", "Florence", "guild", "Hamburg", "inquisition", "jester"]


def random_articles(count: int, seed: int = 0) -> list[Article]:
    rng = np.random.default_rng(seed)
    articles = []
    for number in range(count):
        sentences = []
        for _ in range(rng.integers(1, 9)):
            words = [str(w) for w in rng.choice(NOUNS, 6)] + [f"Rare{rng.integers(40)}", str(rng.integers(1800, 1830))]
            sentences.append("There " + " ".join(words) + ".")
        articles.append(Article(f"{NOUNS[number % 10]} {number}", " ".join(sentences), int(rng.integers(3))))
    return articles


def words_by_sentence(articles: list[Article]) -> list[set[int]]:
    """Naive: words of every sentence and of its title."""
    found = []
    for article in articles:
        for passage, spans in passages_of(article.text):
            found += [
                set(read_sentence(passage, a, b, words=WORDS).words) | {*map(word_hash, article.title.split())} - {0}
                for a, b in spans
            ]
    return found


@pytest.mark.parametrize("at_once", [None, 40])
def test_the_index_lists_the_sentences_of_each_word_as_a_naive_count_does(
    at_once: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if at_once is not None:  # several rounds over the words, each over several blocks of sentences
        monkeypatch.setattr(sentence_index, "POSTINGS_AT_ONCE", at_once)
        monkeypatch.setattr(sentence_index, "SENTENCES_AT_ONCE", at_once)
    articles = random_articles(60)
    index = make_index(tmp_path, articles, [25, 1, 34])
    naive = defaultdict(list)
    for number, words in enumerate(words_by_sentence(articles)):
        for word in words:
            naive[word].append(number)
    expected = {word: where for word, where in naive.items() if len(where) >= 2}
    listed = [index.postings_L[a:b].tolist() for a, b in itertools.pairwise(index.posting_starts.tolist())]
    assert listed == [expected[word] for word in sorted(expected)]
    assert max(map(len, listed)) < RARE
    counts = np.array([*map(len, listed), 1])
    np.testing.assert_allclose(index.weights_W, np.log(index.num_sentences / counts), rtol=1e-6)
    unknown = sum(len(words) for words in words_by_sentence(articles)) - sum(map(len, expected.values()))
    assert (index.arrays.words == UNKNOWN).sum() == unknown


def test_the_index_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    articles = random_articles(30)
    one = make_index(tmp_path / "one", articles, [30])
    many = make_index(tmp_path / "many", articles, [3, 1, 20, 6])
    for name in SentenceArrays.__slots__:
        np.testing.assert_array_equal(getattr(one.arrays, name), getattr(many.arrays, name), err_msg=name)
    np.testing.assert_array_equal(one.postings_L, many.postings_L)
    assert [one.title(d) for d in range(30)] == [article.title for article in articles]
    texts = [passage for article in articles for passage, _ in passages_of(article.text)]
    assert [one.passage(p) for p in range(one.num_passages)] == texts


def test_sentences_are_found_and_compared_as_a_naive_loop_does(tmp_path: Path) -> None:
    articles = random_articles(80, seed=1)
    index = make_index(tmp_path, articles, [80])
    asked = np.arange(0, index.num_sentences, 7)
    queries = _Queries.of(index, asked)
    row_T, sentence_T = _search(index, queries)
    shared_TX = _shared(index, queries, row_T, sentence_T)
    split_N = index.arrays.splits[index.document_of(index.passage_of(np.arange(index.num_sentences)))]
    passage_N = index.passage_of(np.arange(index.num_sentences))

    word_sets = [
        set(index.arrays.words[a:b].tolist()) - {int(UNKNOWN)}
        for a, b in itertools.pairwise(index.arrays.word_starts.tolist())
    ]
    for row, sentence in enumerate(asked.tolist()):
        slots = {
            int(w): int(s) for r, w, s in zip(queries.row_Q, queries.word_Q, queries.slot_Q, strict=True) if r == row
        }
        weights = {word: float(queries.weight_SX[row, slot]) for word, slot in slots.items()}
        scores = {
            other: sum(weights[word] for word in word_sets[other] & set(slots))
            for other in range(index.num_sentences)
            if split_N[other] == split_N[sentence]
            and passage_N[other] != passage_N[sentence]
            and len(word_sets[other] & set(slots)) >= 2
        }
        found = sentence_T[row_T == row].tolist()
        ranked = sorted(scores.values(), reverse=True)[: len(found)]
        assert [scores[other] for other in found] == pytest.approx(ranked, rel=1e-5)
        assert len(found) == min(len(scores), 32)
        for other, shared_X in zip(found, shared_TX[row_T == row], strict=True):
            assert set(np.flatnonzero(shared_X).tolist()) == {slots[w] for w in word_sets[other] & set(slots)}


# --- evidence -----------------------------------------------------------------------------------------------------

FILLER = [
    Article(
        f"Village {n}",
        f"The village number {n} lies in the valley of Quiet{n % 7}. Its church was consecrated by Bishop Odo{n} long ago. "
        f"In {1700 + n} a great fire burned down the old mill there.",
        0,
    )
    for n in range(300)
]
TOWER = Article(
    "Eiffel Tower",
    "The Eiffel Tower was designed by the engineer Maurice Koechlin. " + "It has many visitors in every season. " * 8,
    0,
)
KOECHLIN = Article("Maurice Koechlin", "He was the engineer who designed the Eiffel Tower in the city of Paris.", 0)
STEPHEN = Article("Stephen Sauvestre", "The engineer Stephen Sauvestre decorated the Eiffel Tower with arches.", 0)


def questions(folder: Path, articles: list[Article]) -> dict[tuple[str, str], tuple[Cloze, Texts]]:
    """All that is asked, by question and answer."""
    texts = Texts(make_index(folder, articles, [len(articles)]))
    asked = np.flatnonzero(np.diff(texts.index.arrays.blank_starts))
    made = [texts.question(match, 8, 0) for match in find_evidence(texts.index, asked, 0)]
    return {(m.question, m.answer): (m, texts) for m in made if isinstance(m, Cloze)}


def test_a_fact_that_another_article_states_becomes_evidence_and_its_look_alike_a_distractor(tmp_path: Path) -> None:
    made = questions(tmp_path, [*FILLER, TOWER, KOECHLIN, STEPHEN])
    asked, texts = made["The Eiffel Tower was designed by the engineer _.", "Maurice Koechlin"]
    assert asked.kind == "name"
    titles = {texts.titled(passage)[0]: target for passage, target in asked.candidates}
    assert titles["Maurice Koechlin"] == "Maurice Koechlin"  # stated by the title alone
    assert titles["Stephen Sauvestre"] is None
    assert titles["Eiffel Tower"] is None  # the same article, elsewhere
    assert "Maurice Koechlin" in texts.titled(asked.own)[1]
    assert len({passage for passage, _ in asked.candidates}) == len(asked.candidates) == 8
    assert asked.own not in dict(asked.candidates)


def test_what_many_sentences_say_of_different_places_is_no_evidence(tmp_path: Path) -> None:
    """Hundreds of villages had such a fire, in one of five years: that another had it in the same year is chance."""
    villages = [Article("", f"In {1700 + n % 5} a great fire burned down the old mill there.", 0) for n in range(200)]
    tale = "It is told that in 1702 a great fire burned down the old mill and the bakery of a poor widow there."
    made = questions(tmp_path, [*FILLER, *villages, Article("", tale, 0)])
    assert not [answer for _, answer in made if answer == "1702"]


def test_two_lists_of_the_same_names_are_no_evidence_for_each_other(tmp_path: Path) -> None:
    """Enumerations share rare names and say different things of them."""
    made = {}
    for said in ("border", "elsewhere"):
        gods = Article("", "Long ago Vesta, Pomona, Faunus and Silvanus shared a border.", 0)
        told = f"Travellers mention Silvanus, Pomona, Vesta and Faunus {said} among many strange idols."
        made[said] = {answer for _, answer in questions(tmp_path / said, [*FILLER, gods, Article("", told, 0)])}
    assert made["border"] & {"Vesta", "Pomona", "Faunus", "Silvanus"}  # one word is said of them in both
    assert not made["elsewhere"]


def test_a_sentence_without_its_subject_gets_the_title_in_front(tmp_path: Path) -> None:
    person = Article(
        "Maurice Koechlin (engineer)", "He designed the slender iron Eiffel Tower for the fair of Paris.", 0
    )
    tower = Article(
        "Eiffel Tower", "For the fair of Paris the iron tower was designed by Maurice Koechlin and others.", 0
    )
    made = questions(tmp_path, [*FILLER, person, tower])
    assert ("Maurice Koechlin: He designed the slender iron _ for the fair of Paris.", "Eiffel Tower") in made


def test_evidence_says_the_answer_in_its_own_writing(tmp_path: Path) -> None:
    loud = Article(
        "Tower news", "Breaking: the Eiffel Tower was designed by the engineer MAURICE KOECHLIN of Alsace.", 0
    )
    asked, texts = questions(tmp_path, [*FILLER, TOWER, loud])[
        "The Eiffel Tower was designed by the engineer _.", "Maurice Koechlin"
    ]
    targets = {target for _, target in asked.candidates if target}
    assert targets == {"MAURICE KOECHLIN"}


def test_documents_of_another_split_are_never_read(tmp_path: Path) -> None:
    held_out = Article(KOECHLIN.title, KOECHLIN.text, 1)
    made = questions(tmp_path, [*FILLER, TOWER, held_out])
    assert not [answer for _, answer in made if answer == "Maurice Koechlin"]


def test_a_question_does_not_give_its_answer_away(tmp_path: Path) -> None:
    eponym = Article(
        "Koechlin family", "The Eiffel Tower was designed by the engineer Maurice Koechlin of the Koechlin family.", 0
    )
    for question, answer in questions(tmp_path, [*FILLER, eponym, KOECHLIN, TOWER]):
        rest = {word_hash(word) for word in question.replace("_", " ").strip(".").split()}
        assert rest.isdisjoint({word_hash(word) for word in answer.split()} - {0})
