"""Generation against a naive one: for every token the whole forward pass over the row alone, and every query asked anew."""

import dataclasses
import functools
import hashlib
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import builders
import pytest
import torch
from builders import speak_up, toy_model_config, toy_tokenizer

from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.errors import ConfigError, MismatchError
from retro.generate import Decoder, Generation, Prompt, Role, generate, neighbor_tensors, prompt_ids, sample
from retro.model import Retro
from retro.tokenizer import Tokenizer

M = 5
R = 7
ASCII = [*range(32, 127)]
TEXTS = [
    "the cat sat on the mat and the dog sat on the log",
    "when the rain comes, the cat and the dog go home together",
    "a thin red line on the thin white paper of the other book",
]
one_thread = pytest.fixture(autouse=True)(builders.one_thread)


@functools.cache
def tokenizer() -> Tokenizer:
    """300 tokens, so that some are words."""
    return Tokenizer.train(TEXTS * 3, 300)


class Library:
    """A retriever whose passages are chosen by a hash of the query: none, some, or k of them."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.ks: set[int] = set()
        self.roles: set[str] = set()

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        assert exclude is None
        self.calls.append(list(queries))
        self.ks.add(k)
        self.roles.add(role)
        return [library_passages(query, k) for query in queries]

    @property
    def queries(self) -> list[str]:
        return [query for call in self.calls for query in call]


def library_passages(query: str, k: int) -> list[Passage]:
    digest = hashlib.blake2b(query.encode()).digest()
    count = min(digest[0] % 4, k)
    return [
        Passage(
            row=i,
            key=f"key {i}",
            title="",
            url="",
            text=f"{digest[i + 1]} cats",
            continuation=TEXTS[digest[i + 9] % 3][: digest[i + 1] % 20],
            score=1.0,
            metadata="{}",
        )
        for i in range(count)
    ]


def random_model(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, only: Sequence[str] = (), **changes: object
) -> Retro:
    """Large random weights, so that neighbors and distant tokens matter.

    Args:
        seed: Of the weights.
        dtype: Of the weights.
        only: Texts of the tokens that may be chosen; empty: all of them.
        changes: Of the configuration.
    """
    values = {"vocab_size": 300, "chunk_len": M, "num_layers": 3, "cca_layers": (2, 3), "tie_embeddings": False}
    model = Retro(toy_model_config(**(values | changes)))
    speak_up(model, std=1.5, seed=seed)
    with torch.no_grad():
        if only and model.head is not None:
            forbidden = torch.ones(model.config.vocab_size, dtype=torch.bool)
            forbidden[[i for i in range(tokenizer().vocab_size) if tokenizer().decode([i]) in only]] = False
            model.head.weight[forbidden] = 0.0
    return model.to(dtype).eval()


def plain_tokens() -> list[str]:
    """Texts of the tokens that are whole printable ASCII, so that the text of a chunk is that of its tokens."""
    texts = [tokenizer().decode([i]) for i in range(tokenizer().vocab_size)]
    return [text for text in texts if text and all(ord(c) in ASCII for c in text)]


def chain_model(tokens: Sequence[int]) -> Retro:
    """Says `tokens` in turn, whatever the neighbors: each token alone decides the next one. The tokens are all different."""
    width = 32
    assert len(set(tokens)) == len(tokens) <= width
    model = Retro(toy_model_config(dim=width, encoder_dim=width, tie_embeddings=False, chunk_len=M))
    model.initialize(torch.Generator().manual_seed(0))
    assert model.head is not None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                parameter.zero_()
        model.embedding.weight[list(tokens)] = torch.eye(width)[: len(tokens)]
        model.head.weight.zero_()
        model.head.weight[list(tokens[1:])] = 100 * torch.eye(width)[: len(tokens) - 1]
    return model.eval()


def naive_chunk_neighbors(
    prompt: Prompt, ids: list[int], library: Library | None, config: GenerateConfig
) -> dict[int, tuple[str, list[str]]]:
    """Query and texts to read of each finished chunk, where it has any; tokens are plain, so their texts are joined."""
    lead = -len(prompt.ids) % M
    prompt_chunks = (lead + len(prompt.ids)) // M
    near: dict[int, tuple[str, list[str]]] = {}
    for chunk in range((lead + len(ids)) // M):
        if prompt.passages is not None:
            if chunk < prompt_chunks:
                near[chunk] = ("", prompt.passages.get(chunk, []))
            else:
                given = [c for c in prompt.passages if c <= chunk]
                near[chunk] = ("", prompt.passages[max(given)] if given else [])
            continue
        tokens = [i for slot, i in enumerate(ids, lead) if slot // M == chunk]
        query = "".join(tokenizer().decode([i]) for i in tokens)
        if query.strip():
            assert library is not None
            near[chunk] = (query, [p.full_text for p in library.retrieve([query], config.num_neighbors)[0]])
    return near


def naive_logits(model: Retro, prompt: Prompt, ids: list[int], near: dict[int, tuple[str, list[str]]]) -> torch.Tensor:
    """Of the last token, by the full forward pass over this row alone."""
    lead = -len(prompt.ids) % M
    used = lead + len(ids)
    T = -(-used // M) * M
    inputs_1T = torch.zeros(1, T, dtype=torch.long)
    keep_1T = torch.zeros(1, T, dtype=torch.bool)
    inputs_1T[0, lead:used] = torch.tensor(ids)
    keep_1T[0, lead:used] = True
    K = max([1, *(len(texts) for _, texts in near.values())])
    neighbors_1LKR = torch.zeros(1, T // M, K, R, dtype=torch.long)
    keep_1LKR = torch.zeros(1, T // M, K, R, dtype=torch.bool)
    for chunk, (_, texts) in near.items():
        for k, text in enumerate(texts):
            tokens = tokenizer().encode(text).ids.tolist()[:R]
            neighbors_1LKR[0, chunk, k, : len(tokens)] = torch.tensor(tokens)
            keep_1LKR[0, chunk, k, : len(tokens)] = True
    with torch.no_grad():
        logits_1TV = model(inputs_1T, keep_BT=keep_1T, neighbors_BLKR=neighbors_1LKR, keep_BLKR=keep_1LKR)
    return torch.as_tensor(logits_1TV)[0, used - 1]


def naive_generate(
    model: Retro, prompt: Prompt, config: GenerateConfig, eos_id: int
) -> tuple[list[int], list[float], dict[int, str]]:
    """Greedy: the new ids, their log-probabilities, and the queries by chunk."""
    library = Library()
    ids = list(prompt.ids)
    log_probs: list[float] = []
    near: dict[int, tuple[str, list[str]]] = {}
    while len(log_probs) < config.max_new_tokens and (not log_probs or ids[-1] != eos_id):
        if config.num_neighbors:
            near = naive_chunk_neighbors(prompt, ids, library, config)
        log_probs_V = torch.log_softmax(naive_logits(model, prompt, ids, near), dim=-1)
        ids.append(int(log_probs_V.argmax()))
        log_probs.append(float(log_probs_V[ids[-1]]))
    return ids[len(prompt.ids) :], log_probs, {chunk: query for chunk, (query, _) in near.items() if query}


def prompts() -> list[Prompt]:
    """Of 1, 2, 3 and 4 chunks, on and off the border; one brings passages for chunks of its prompt, one for a later chunk."""
    texts = ["t", "the cat sat on the mat", "a dog and a log", "when the rain comes, the cat and the dog go"]
    plain = [Prompt(prompt_ids(text, tokenizer())) for text in texts]
    given = Prompt(plain[1].ids, {0: ["the log"], 1: ["a book", "white paper", "the rain and the dog"]})
    later = Prompt(plain[2].ids, {0: ["cat"], 4: ["home together"]})
    exact = Prompt(plain[3].ids[: len(plain[3].ids) // M * M])
    return [*plain, given, later, exact, Prompt(plain[3].ids, {})]


def settings(**changes: object) -> GenerateConfig:
    values: dict[str, object] = {"max_new_tokens": 3 * M + 3, "num_neighbors": 2, "neighbor_len": R}
    return GenerateConfig(**(values | changes))  # type: ignore[arg-type]


def assert_equal_to_naive(
    results: list[Generation], model: Retro, batch: list[Prompt], config: GenerateConfig, eos_id: int
) -> None:
    for result, prompt in zip(results, batch, strict=True):
        ids, log_probs, queries = naive_generate(model, prompt, config, eos_id)
        assert result.ids == ids
        tolerance = 1e-10 if model.embedding.weight.dtype == torch.float64 else 1e-5
        assert result.log_probs == pytest.approx(log_probs, abs=tolerance)
        assert result.finished == (ids[-1] == eos_id)
        assert {chunk: library_passages(q, config.num_neighbors) for chunk, q in queries.items()} == result.retrieved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_neighbors", [0, 1, 2])
def test_generation_equals_a_full_forward_pass_for_every_token(dtype: torch.dtype, num_neighbors: int) -> None:
    model = random_model(1, dtype=dtype, only=plain_tokens())
    config = settings(num_neighbors=num_neighbors)
    library = Library()
    results = generate(model, tokenizer(), prompts(), config, retriever=library)
    assert_equal_to_naive(results, model, prompts(), config, tokenizer().eos_id)
    assert len({tuple(r.ids) for r in results}) >= 5
    if num_neighbors == 0:
        assert library.calls == []
        assert all(r.retrieved == {} for r in results)


def test_neighbors_change_what_is_generated() -> None:
    """Or the equality above would say nothing about them."""
    model = random_model(1, only=plain_tokens())
    on = generate(model, tokenizer(), prompts(), settings(), retriever=Library())
    off = generate(model, tokenizer(), prompts(), settings(num_neighbors=0))
    assert sum(a.ids != b.ids for a, b in zip(on, off, strict=True)) >= 4


@pytest.mark.parametrize("num_neighbors", [0, 2])
@pytest.mark.parametrize("place", [0, M - 2, M - 1, M, 2 * M - 1])
def test_a_row_that_ends_early_leaves_the_others_as_they_are(place: int, num_neighbors: int) -> None:
    """EOS is declared to be the token that some row chooses at this place for its first time."""
    model = random_model(1, only=plain_tokens())
    config = settings(num_neighbors=num_neighbors)
    free = generate(model, tokenizer(), prompts(), config, retriever=Library())
    eos_id = next(r.ids[place] for r in free if r.ids[place] not in r.ids[:place])
    ending = dataclasses.replace(tokenizer(), eos_id=eos_id)
    results = generate(model, ending, prompts(), config, retriever=Library())
    assert_equal_to_naive(results, model, prompts(), config, eos_id)
    assert any(r.finished and len(r.ids) == place + 1 for r in results)
    assert not all(r.finished for r in results)
    for before, after in zip(free, results, strict=True):
        assert before.ids[: len(after.ids)] == after.ids


def test_generation_stops_when_every_row_has_ended() -> None:
    tokens = toy_tokenizer().encode("ab").ids.tolist()
    model = chain_model([*tokens, toy_tokenizer().eos_id])
    results = generate(model, toy_tokenizer(), ["a", "b", "xxa"], settings(num_neighbors=0))
    assert [r.ids for r in results] == [
        [tokens[1], toy_tokenizer().eos_id],
        [toy_tokenizer().eos_id],
        [tokens[1], toy_tokenizer().eos_id],
    ]
    assert [(r.text, r.finished) for r in results] == [("b", True), ("", True), ("b", True)]


def test_a_row_that_has_ended_asks_nothing_more() -> None:
    tokens = toy_tokenizer().encode("abcdefghijklmnopqrstuvwxyz").ids.tolist()
    model = chain_model([*tokens, toy_tokenizer().eos_id])
    library = Library()
    results = generate(model, toy_tokenizer(), ["a", "v"], settings(max_new_tokens=12), retriever=library)
    # "v" goes on with "wxyz" and EOS, which fills a chunk that nobody reads any more.
    assert [r.text for r in results] == ["bcdefghijklm", "wxyz"]
    assert library.calls == [["a", "v"], ["bcdef"], ["ghijk"]]


def test_some_rows_are_read_while_the_passages_of_others_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro.generate.SEARCHED_AT_ONCE", 2)
    model, go_on = random_model(2), threading.Event()
    config = settings(max_new_tokens=3)
    plain = Library()
    alone = [generate(model, tokenizer(), [letter], config, retriever=plain)[0] for letter in "abcde"]

    class Slow(Library):
        def retrieve(self, queries: Sequence[str], k: int, **options: Any) -> list[list[Passage]]:
            assert not self.calls or go_on.wait(60)
            return super().retrieve(queries, k, **options)

    library = Slow()
    with Decoder(model, tokenizer(), library) as decoder:
        rows = [decoder.add(Prompt(prompt_ids(letter, tokenizer())), config) for letter in "abcde"]
        decoder.step()
        assert [len(row.result.ids) for row in rows] == [1, 1, 0, 0, 0]
        go_on.set()
        while decoder.rows:
            decoder.step()
    assert [len(call) for call in library.calls] == [2, 2, 1]
    assert [row.result.ids for row in rows] == [one.ids for one in alone]
    assert [row.result.retrieved for row in rows] == [one.retrieved for one in alone]


@pytest.mark.parametrize("num_neighbors", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_equals_each_prompt_alone(num_neighbors: int, temperature: float) -> None:
    model = random_model(2)
    config = settings(num_neighbors=num_neighbors, temperature=temperature, seed=5)
    together = generate(model, tokenizer(), prompts(), config, retriever=Library())
    for prompt, result in zip(prompts(), together, strict=True):
        alone = generate(model, tokenizer(), [prompt], config, retriever=Library())[0]
        assert alone.ids == result.ids
        assert alone.log_probs == pytest.approx(result.log_probs, abs=1e-5)
        assert (alone.text, alone.finished, alone.retrieved) == (result.text, result.finished, result.retrieved)


def test_a_text_and_its_tokens_are_the_same_prompt() -> None:
    model, text = random_model(2), "the cat sat"
    ids = prompt_ids(text, tokenizer())
    assert ids == [tokenizer().bos_id, *tokenizer().encode(text).ids.tolist()]
    assert generate(model, tokenizer(), [text], settings(), retriever=Library()) == generate(
        model, tokenizer(), [Prompt(ids)], settings(), retriever=Library()
    )


def test_every_finished_chunk_is_asked_for_exactly_once_with_its_own_text() -> None:
    model = random_model(1, only=plain_tokens())
    library = Library()
    batch = [p for p in prompts() if p.passages is None]
    results = generate(model, tokenizer(), batch, settings(), retriever=library)
    expected: list[str] = []
    for prompt, result in zip(batch, results, strict=True):
        slots = [""] * (-len(prompt.ids) % M) + [tokenizer().decode([i]) for i in prompt.ids + result.ids]
        # The last token has no forward pass, so a chunk that it ends is not read: 3M + 3 new tokens end three chunks.
        chunks = ["".join(slots[start : start + M]) for start in range(0, len(slots) - M + 1, M)]
        asked = {number: text for number, text in enumerate(chunks) if text.strip()}
        assert sorted(result.retrieved) == sorted(asked)
        expected += asked.values()
    assert Counter(library.queries) == Counter(expected)
    assert (library.roles, library.ks) == ({"document"}, {2})
    assert len(library.calls) == 4


def test_a_chunk_that_the_last_token_ends_is_not_looked_up() -> None:
    model = random_model(1, only=plain_tokens())
    for length, calls in ((M - 1, 1), (M, 1), (M + 1, 2)):
        library = Library()
        generate(model, tokenizer(), ["the cat"], settings(max_new_tokens=length), retriever=library)
        assert len(library.calls) == calls


def test_a_chunk_without_text_is_not_looked_up() -> None:
    letters = toy_tokenizer().encode("a     ").ids.tolist()
    space = letters[1]
    model = chain_model([letters[0], space])
    with torch.no_grad():
        assert model.head is not None
        model.head.weight[space] += model.embedding.weight[space] * 100
    library = Library()
    result = generate(model, toy_tokenizer(), ["a"], settings(max_new_tokens=12), retriever=library)[0]
    assert result.text == " " * 12
    assert library.calls == [["a"]]


def test_a_character_split_by_a_border_belongs_to_the_chunk_that_ends_it() -> None:
    ids = toy_tokenizer().encode("abcd\u20ac\u00e9xyz").ids.tolist()  # bytes: abcd E2 | 82 AC C3 A9 x | y z
    assert len(ids) == 12
    library = Library()
    result = generate(
        chain_model(ids),
        toy_tokenizer(),
        [Prompt([7, 8, 9, 10, ids[0]])],
        settings(max_new_tokens=11),
        retriever=library,
    )[0]
    assert result.text == "bcd\u20ac\u00e9xyz"
    # Generated: b c d E2 82 | AC C3 A9 x y | z
    assert library.queries[1:] == ["bcd", "\u20ac\u00e9xy"]


# Streaming


def stream(model: Retro, texts: list[str], **changes: object) -> tuple[list[list[str]], list[Generation]]:
    pieces: list[list[str]] = [[] for _ in texts]
    results = generate(
        model,
        toy_tokenizer(),
        texts,
        settings(**({"num_neighbors": 0} | changes)),
        on_token=lambda row, piece: pieces[row].append(piece),
    )
    return pieces, results


def test_pieces_hold_whole_characters() -> None:
    # Different first and continuation bytes: every token of the chain is followed by one other.
    text = "a\u00e9\u20ac\U0001f60bz"
    model = chain_model([*toy_tokenizer().encode(text).ids.tolist(), toy_tokenizer().eos_id])
    pieces, results = stream(model, ["a", "xa"])
    assert [r.text for r in results] == [text[1:]] * 2
    assert pieces == [list(text[1:])] * 2
    assert all(r.finished for r in results)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7, 30])
@pytest.mark.parametrize("seed", range(6))
def test_the_pieces_together_are_the_text(seed: int, max_new_tokens: int) -> None:
    """Random bytes, most of them no valid UTF-8, and often unfinished at the end."""
    model = random_model(seed, vocab_size=258)
    pieces, results = stream(model, ["a", "hello"], max_new_tokens=max_new_tokens, temperature=1.0, seed=seed)
    assert ["".join(few) for few in pieces] == [r.text for r in results]
    assert all(piece for few in pieces for piece in few)


def test_a_character_unfinished_at_the_last_token_is_streamed_as_it_stands_in_the_text() -> None:
    """The text ended in U+FFFD, which no piece held."""
    model = chain_model(toy_tokenizer().encode("ab\u20ac").ids.tolist())
    pieces, results = stream(model, ["a"], max_new_tokens=3)
    assert results[0].text == "b\ufffd"
    assert "".join(pieces[0]) == results[0].text


def test_listening_changes_nothing() -> None:
    model = random_model(3, vocab_size=258)
    _, heard = stream(model, ["a", "hello"], temperature=1.0)
    assert heard == generate(model, toy_tokenizer(), ["a", "hello"], settings(num_neighbors=0, temperature=1.0))


# Sampling

LOG_PROBS = torch.tensor([0.2, 0.4, 0.1, 0.3]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.2, 0.4, 0.1, 0.3]),
        ({"temperature": 0.5}, [0.04 / 0.3, 0.16 / 0.3, 0.01 / 0.3, 0.09 / 0.3]),  # squares
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_k": 4}, [0.2, 0.4, 0.1, 0.3]),
        ({"temperature": 1.0, "top_k": 99}, [0.2, 0.4, 0.1, 0.3]),
        ({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.71}, [2 / 9, 4 / 9, 0, 3 / 9]),
        ({"temperature": 1.0, "top_p": 0.01}, [0, 1, 0, 0]),
        # Squares of the best three: .16 .09 .04 of .29; the first two have .862 of it.
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.8}, [0, 0.64, 0, 0.36]),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.87}, [4 / 29, 16 / 29, 0, 9 / 29]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 0.0, "top_k": 3, "top_p": 0.9}, [0, 1, 0, 0]),
        ({"temperature": 1e-6}, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_worked_out_by_hand(
    options: dict[str, float], expected: list[float]
) -> None:
    config = settings(**options)
    generator = torch.Generator().manual_seed(0)
    draws = 3000
    counts = Counter(sample(LOG_PROBS, config, generator) for _ in range(draws))
    assert all(counts[token] == 0 for token, p in enumerate(expected) if p == 0)
    chi_square = sum((counts[token] - p * draws) ** 2 / (p * draws) for token, p in enumerate(expected) if p > 0)
    assert chi_square < 16.3  # 3 degrees of freedom, one in a thousand


def test_the_draw_is_the_generators() -> None:
    config = settings(temperature=1.0)
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    torch.manual_seed(0)
    drawn = [sample(LOG_PROBS, config, first) for _ in range(50)]
    torch.manual_seed(1)
    assert drawn == [sample(LOG_PROBS, config, second) for _ in range(50)]


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = random_model(2)
    texts = [
        generate(model, tokenizer(), ["the cat"], settings(temperature=1.0, seed=seed), retriever=Library())[0].ids
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize(
    "changes", [{"temperature": 1e-320}, {"temperature": 1e-40}, {"temperature": 5.0, "top_p": 1e-300}]
)
def test_settings_near_zero_choose_the_most_probable(changes: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    assert {sample(LOG_PROBS, settings(**changes), generator) for _ in range(20)} == {int(LOG_PROBS.argmax())}


def test_log_probabilities_are_those_at_temperature_1() -> None:
    model = random_model(1)
    config = settings(temperature=0.3, top_k=5, num_neighbors=0, max_new_tokens=7)
    prompt = Prompt(prompt_ids("the cat", tokenizer()))
    result = generate(model, tokenizer(), [prompt], config)[0]
    for place, (token, log_prob) in enumerate(zip(result.ids, result.log_probs, strict=True)):
        logits_V = naive_logits(model, prompt, prompt.ids + result.ids[:place], {})
        assert log_prob == pytest.approx(float(logits_V.log_softmax(-1)[token]), abs=1e-5)


# The rest


def test_neighbors_are_cut_and_padded() -> None:
    neighbors_BLKR, keep_BLKR = neighbor_tensors([[["ab"], []], [["abcde", "", "x"]]], toy_tokenizer(), 3, 4)
    assert neighbors_BLKR.shape == keep_BLKR.shape == (2, 2, 3, 4)
    lengths = keep_BLKR.sum(-1)
    assert lengths.tolist() == [[[2, 0, 0], [0, 0, 0]], [[4, 0, 1], [0, 0, 0]]]
    assert toy_tokenizer().decode(neighbors_BLKR[1, 0, 0].tolist()) == "abcd"
    assert torch.equal(keep_BLKR, torch.arange(4) < lengths[..., None])


@pytest.mark.parametrize("mode", [True, False])
def test_the_models_mode_is_given_back(mode: bool) -> None:
    model = random_model().train(mode)
    generate(model, tokenizer(), ["the"], settings(num_neighbors=0, max_new_tokens=2))
    assert model.training is mode


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        generate(random_model(), tokenizer(), ["the", text], settings(), retriever=Library())


@pytest.mark.parametrize("others", [[], [Prompt([5, 6])]])
def test_a_prompt_without_tokens_is_refused(others: list[Prompt]) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        generate(random_model(), tokenizer(), [*others, Prompt([])], settings(num_neighbors=0))


def test_no_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no prompt"):
        generate(random_model(), tokenizer(), [], settings(), retriever=Library())


def test_retrieval_without_a_retriever_is_refused() -> None:
    given = Prompt([5, 6], {0: ["a book"]})
    with pytest.raises(ConfigError, match=r"retrieval needs an index.*-k 0"):
        generate(random_model(), tokenizer(), [given, "the"], settings())
    assert len(generate(random_model(), tokenizer(), [given], settings())[0].ids) > 0


def test_a_model_without_retrieval_is_refused_neighbors() -> None:
    model = random_model(cca_layers=())
    with pytest.raises(ConfigError, match=r"made without retrieval.*-k 0"):
        generate(model, tokenizer(), ["the"], settings(), retriever=Library())
    config = settings(num_neighbors=0)
    prompt = Prompt(prompt_ids("the", tokenizer()))
    assert_equal_to_naive(generate(model, tokenizer(), [prompt], config), model, [prompt], config, tokenizer().eos_id)


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(MismatchError, match="the tokenizer has 300 tokens and the model 299"):
        generate(random_model(vocab_size=299), tokenizer(), ["the"], settings(), retriever=Library())


# Prompts that come and go


class SlowLibrary(Library):
    """Answers a search only when it is let; asked from another thread."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()

    def retrieve(self, queries: Sequence[str], k: int, **options: object) -> list[list[Passage]]:
        assert self.let.wait(timeout=60)
        return super().retrieve(queries, k)


@pytest.mark.parametrize("seed", range(4))
def test_prompts_that_join_at_any_step_get_what_they_get_alone(seed: int) -> None:
    """With settings of their own: other numbers of neighbors, lengths, temperatures."""
    model = random_model(2)
    random = torch.Generator().manual_seed(seed)
    configs = [
        settings(
            num_neighbors=k,
            max_new_tokens=3 + 5 * number,
            temperature=float(number % 2),
            seed=number,
            neighbor_len=R - k,
        )
        for number, k in enumerate([2, 1, 0, 2, 2, 1, 2, 0])
    ]
    waiting = list(zip(prompts(), configs, strict=True))
    rows = []
    with Decoder(model, tokenizer(), Library()) as decoder:
        while waiting or decoder.rows:
            for _ in range(int(torch.randint(0, 3, (1,), generator=random))):
                if waiting:
                    rows.append(decoder.add(*waiting.pop(0)))
            before = list(decoder.rows)
            ended = decoder.step()
            assert set(map(id, decoder.rows)) == set(map(id, before)) - set(map(id, ended))
    for row, prompt, config in zip(rows, prompts(), configs, strict=True):
        alone = generate(model, tokenizer(), [prompt], config, retriever=Library())[0]
        assert row.result.ids == alone.ids
        assert row.result.log_probs == pytest.approx(alone.log_probs, abs=1e-5)
        assert (row.result.text, row.result.retrieved) == (alone.text, alone.retrieved)


def test_a_row_that_waits_for_its_search_does_not_stop_the_others() -> None:
    model = random_model(2)
    library = SlowLibrary()
    quick_config, slow_config = settings(num_neighbors=0), settings(num_neighbors=2)
    with Decoder(model, tokenizer(), library) as decoder:
        slow = decoder.add(prompts()[1], slow_config)
        quick = decoder.add(prompts()[2], quick_config)
        while quick in decoder.rows:
            decoder.step()
        assert slow.result.ids == []
        library.let.set()
        while decoder.rows:
            decoder.step()
    for row, prompt, config in ((slow, prompts()[1], slow_config), (quick, prompts()[2], quick_config)):
        assert row.result.ids == generate(model, tokenizer(), [prompt], config, retriever=Library())[0].ids


def test_the_thread_that_searches_is_there_only_while_it_does() -> None:
    """An idle one would keep OpenMP threads, besides which those of the decoding wait for each other asleep."""

    def searching() -> bool:
        return any(thread.name.startswith("retrieval") for thread in threading.enumerate())

    model, library = random_model(2), SlowLibrary()
    with Decoder(model, tokenizer(), library) as decoder:
        removed, quick = decoder.add(prompts()[1], settings()), decoder.add(prompts()[2], settings(num_neighbors=0))
        decoder.step()
        decoder.remove(removed)
        length = len(quick.result.ids)
        decoder.step()  # does not wait for a search that nobody needs any more
        assert len(quick.result.ids) == length + 1
        assert searching()
        library.let.set()
        slow = decoder.add(prompts()[1], settings(max_new_tokens=4 * M))
        while slow in decoder.rows:
            decoder.step()
            assert not searching() or slow.search is not None
    assert (
        slow.result.ids
        == generate(model, tokenizer(), [prompts()[1]], settings(max_new_tokens=4 * M), retriever=Library())[0].ids
    )


def test_a_row_that_waits_at_a_border_loses_no_step_and_gains_none() -> None:
    """Its columns stay empty while it waits, in the middle of the text too."""
    model = random_model(2)
    library = SlowLibrary()
    library.let.set()
    config = settings(max_new_tokens=4 * M)
    with Decoder(model, tokenizer(), library) as decoder:
        slow = decoder.add(prompts()[1], config)
        while len(slow.result.ids) < M:
            decoder.step()
        library.let.clear()
        quick = decoder.add(prompts()[2], settings(num_neighbors=0, max_new_tokens=2 * M))
        while quick in decoder.rows:
            decoder.step()
        assert len(slow.result.ids) == M
        library.let.set()
        while decoder.rows:
            decoder.step()
    assert slow.result.ids == generate(model, tokenizer(), [prompts()[1]], config, retriever=Library())[0].ids


def test_a_row_can_be_removed_at_any_time() -> None:
    model = random_model(2)
    with Decoder(model, tokenizer(), Library()) as decoder:
        rows = [decoder.add(prompt, settings()) for prompt in prompts()[:4]]
        decoder.remove(rows[0])
        for _ in range(3):
            decoder.step()
        decoder.remove(rows[2])
        assert decoder.rows == [rows[1], rows[3]]
        while decoder.rows:
            decoder.step()
        assert decoder.step() == []
    for number in (1, 3):
        alone = generate(model, tokenizer(), [prompts()[number]], settings(), retriever=Library())[0]
        assert rows[number].result.ids == alone.ids


def test_an_error_of_the_retriever_comes_out_of_the_step() -> None:
    class Broken(Library):
        def retrieve(self, queries: Sequence[str], k: int, **options: object) -> list[list[Passage]]:
            raise ConfigError("the index is gone")

    with pytest.raises(ConfigError, match="the index is gone"):
        generate(random_model(2), tokenizer(), prompts()[:2], settings(), retriever=Broken())


def test_columns_that_nobody_uses_any_more_are_given_back() -> None:
    """Requests come and go for ever: the cache is as long as its longest row, not as old as the decoder."""
    model = random_model(2)
    longest = max(len(prompt.ids) for prompt in prompts()) + 7
    with Decoder(model, tokenizer(), Library()) as decoder:
        for number in range(40):
            decoder.add(prompts()[number % 8], settings(max_new_tokens=2 + number % 6))
            decoder.step()
            assert decoder._cache.length <= 2 * longest
