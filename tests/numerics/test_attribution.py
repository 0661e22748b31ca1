"""Attribution against the naive oracle's attention, separate forward passes, and by hand."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import builders
import numpy as np
import pytest
import torch
from oracles import Batch, FloatArray, Oracle, Placed, randomize, tiny_config
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from eval.attribution import Attribution, attribute, read_document
from retro.answer import Answer, ask, ask_many, passage_text
from retro.attribution import (
    Attended,
    Reading,
    Source,
    answer_span,
    ask_and_explain,
    best_window,
    explain,
    read_answer,
    read_generation,
)
from retro.chunks import Passage
from retro.config import GenerateConfig, ModelConfig
from retro.generate import Generation, Prompt, Role, generate, neighbor_tensors, prompt_ids
from retro.model import Retro
from retro.retrofit import RetroFit, model_config, retrofit
from retro.tokenizer import Tokenizer

M, R = 4, 7
TEXTS = [
    "the cat sat on the mat and the dog sat on the log, and that was that for the day",
    "when the rain comes the cat and the dog go home; na\u00efve caf\u00e9 \u20ac5 \U0001f408 said the book",
    "a thin red line on the thin white paper of the other book that nobody reads any more in town",
]
A, B, C = Source("the cat sat", 0, "a"), Source("dog", 0, "b"), Source("a thin red line on paper", 0, "c")
one_thread = pytest.fixture(autouse=True)(builders.one_thread)
TOKENIZER = Tokenizer.train(TEXTS * 3, 300)


def network(**changes: Any) -> Retro:
    model = Retro(tiny_config(vocab_size=300, chunk_len=M, **changes)).to(torch.float64).eval()
    randomize(model)
    return model


def fitted(num_heads: int = 2) -> RetroFit:
    torch.manual_seed(0)
    base: Any = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=12, n_layer=3, n_head=2))
    sizes = {"cca_layers": (2, 3), "num_heads": num_heads, "head_dim": 16, "chunk_len": M}
    sizes |= {"encoder_dim": 10, "encoder_layers": 2, "encoder_heads": 2, "encoder_head_dim": 4, "encoder_ffw_dim": 11}
    model = retrofit(base.to(torch.float64), model_config(base, **sizes)).to(torch.float64)
    for part in (model.cca, model.encoder, model.encoder_embedding):
        randomize(part)
    return model.eval()


def reading(lead: int = 1, order: tuple[int, ...] = (0, 1, 2)) -> Reading:
    """Five chunks and a rest: three passages, two passages, none, one of the first again, and two; the last one ends nothing."""
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(TEXTS[0]).ids.tolist()][: 5 * M + 3 - lead]
    few = [(A, B, C)[i] for i in order]
    return Reading.of(ids, lead, {0: few, 1: few[:2], 3: few[1:2], 4: [few[2], few[0]]})


def inputs(read: Reading, left_out: Collection[int] = ()) -> Batch:
    """A batch of one row, in which passages are really not there."""
    n = len(read.ids) - 1
    L = -(-(read.lead + n) // M)
    inputs_1T, keep_1T = torch.zeros(1, L * M, dtype=torch.long), torch.zeros(1, L * M, dtype=torch.bool)
    inputs_1T[0, read.lead : read.lead + n] = torch.tensor(read.ids[:-1])
    keep_1T[0, read.lead : read.lead + n] = True
    texts = [[read.sources[p].text for p in read.chunks.get(u, ()) if p not in left_out] for u in range(L)]
    K = max(1, *map(len, texts))
    near, keep_near = neighbor_tensors([texts], TOKENIZER, K, R)
    unused = torch.zeros_like(inputs_1T)
    return Batch(
        inputs_BT=inputs_1T,
        keep_BT=keep_1T,
        document_BL=torch.zeros(1, L, dtype=torch.long),
        neighbors_BLKR=near,
        keep_BLKR=keep_near,
        targets_BT=unused,
        loss_BT=unused.bool(),
    )


def log_probs(model: Any, read: Reading, left_out: Collection[int] = ()) -> FloatArray:
    """One forward pass."""
    with torch.no_grad():
        logits_1TV: Tensor = model(**inputs(read, left_out).arguments())
    own_nV = logits_1TV[0, read.lead : read.lead + len(read.ids) - 1].log_softmax(-1)
    picked: FloatArray = own_nV.gather(1, torch.tensor(read.ids[1:])[:, None])[:, 0].numpy()
    return picked


class WatchedOracle(Oracle):
    """Writes the attention of every CCA down: one weight at a time, averaged over heads."""

    def __init__(self, config: ModelConfig, state: dict[str, Tensor]) -> None:
        super().__init__(config, state)
        self.weights_of: dict[str, list[list[float]]] = {}

    def cca(self, prefix: str, place: int, normed_D: FloatArray, encoded: Sequence[Sequence[Placed]]) -> FloatArray:
        width, heads = self.config.head_dim, self.config.num_heads
        at = place + self.config.chunk_len - 1
        context = [token for neighbor in encoded for token in neighbor]
        means = [0.0] * len(context)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = []
            for where, c_E in context:
                q_C = (self.weights[f"{prefix}.q.weight"] @ normed_D)[part]
                k_C = (self.weights[f"{prefix}.k.weight"] @ c_E)[part]
                if self.config.positions == "rotary" and self.config.cca_positions:
                    q_C, k_C = self._rotate(q_C, at), self._rotate(k_C, where)
                elif self.config.cca_positions:
                    s_D = self._sinusoid(at - where, len(normed_D))
                    k_C = k_C + self.weights[f"{prefix}.distance.weight"][part] @ s_D
                scores.append(math.exp(float(q_C @ k_C) / math.sqrt(width)))
            for i, score in enumerate(scores):
                means[i] += score / math.fsum(scores) / heads
        self.weights_of.setdefault(prefix, []).append(means)
        return super().cca(prefix, place, normed_D, encoded)


@pytest.mark.parametrize("changes", [{}, {"positions": "relative"}, {"cca_positions": False}], ids=str)
@pytest.mark.parametrize("lead", [0, 3])
@pytest.mark.parametrize("in_parts", [False, True])
def test_shares_are_the_attention_of_the_naive_oracle(
    changes: dict[str, Any], lead: int, in_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_parts:
        monkeypatch.setattr("retro.model.ENCODED_PER_PART", 1)
    model, read = network(**changes), reading(lead)
    found = attribute(model, TOKENIZER, read, neighbor_len=R)
    oracle = WatchedOracle(model.config, model.state_dict())
    oracle.hidden(inputs(read))
    first = M - 1 - lead  # the first output token that a finished chunk's neighbors may move
    lengths = [min(len(TOKENIZER.encode(s.text).ids), R) for s in read.sources]
    assert len(oracle.weights_of) == len(found.attended.share_JnKR) == 2
    for j, weights in enumerate(oracle.weights_of.values()):
        assert len(weights) == len(read.ids) - 1 - first
        for place, means in enumerate(weights, first):
            few = read.chunks.get((lead + place + 1) // M - 1, ())
            assert [p for p in found.attended.source_nK[place] if p >= 0] == list(few)
            actual = [found.attended.share_JnKR[j, place, k, : lengths[p]] for k, p in enumerate(few)]
            np.testing.assert_allclose(np.concatenate([[], *actual]), means, rtol=0, atol=1e-12)
            shares = found.attended.layer_shares()[j, place]
            for k, p in enumerate(few):
                assert shares[p] == pytest.approx(
                    sum(means[sum(lengths[q] for q in few[:k]) :][: lengths[p]]), abs=1e-12
                )


def test_shares_in_a_pretrained_model_are_those_its_values_are_summed_with() -> None:
    model, read = fitted(num_heads=1), reading(2)
    merged: list[Tensor] = []
    values: list[Tensor] = []
    for cross in model.cca:
        cross.attention.v.register_forward_hook(lambda _m, _a, v_NSC: values.append(v_NSC))  # type: ignore[union-attr]
        cross.attention.out.register_forward_pre_hook(lambda _m, a: merged.append(a[0]))  # type: ignore[union-attr]
    found = attribute(model, TOKENIZER, read, neighbor_len=R)
    chunks = sorted(u for u in read.chunks if (u + 1) * M <= read.lead + len(read.ids) - 1)
    for j in range(2):  # the first forward pass has all passages
        for row, u in enumerate(chunks):
            for i in range(M):
                place = (u + 1) * M - 1 + i - read.lead
                if place < len(read.ids) - 1:
                    weights_S = torch.from_numpy(found.attended.share_JnKR[j, place].reshape(-1))
                    torch.testing.assert_close(weights_S @ values[j][row], merged[j][row, i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [network, fitted], ids=["retro", "retrofit"])
def test_a_passage_left_out_leaves_a_forward_pass_without_it(make: Any) -> None:
    model, read = make(), reading()
    found = attribute(model, TOKENIZER, read, neighbor_len=R, batch_size=3)
    atol = 1e-12 if isinstance(model, Retro) else 1e-6  # transformers narrow some products
    np.testing.assert_allclose(found.log_prob_n, log_probs(model, read), rtol=0, atol=atol)
    np.testing.assert_allclose(found.off_n, log_probs(model, read, {0, 1, 2}), rtol=0, atol=atol)
    for p in range(3):
        without_n = log_probs(model, read, {p})
        np.testing.assert_allclose(found.without_Pn[p], without_n, rtol=0, atol=atol)
        assert np.abs(found.passage_deltas()[p]).max() > 1e-2
    np.testing.assert_array_equal(found.delta_n, found.log_prob_n - found.off_n)


def test_shares_sum_to_one_where_passages_are_seen_and_nothing_moves_what_comes_before() -> None:
    read = reading()
    found = attribute(network(), TOKENIZER, read, neighbor_len=R)
    chunk_n = (read.lead + np.arange(len(read.ids) - 1) + 1) // M - 1
    sees_n = np.isin(chunk_n, list(read.chunks))
    np.testing.assert_array_equal(found.attended.sees_n, sees_n)
    np.testing.assert_allclose(
        found.attended.share_JnKR.sum(axis=(2, 3)), np.where(sees_n, 1.0, 0.0) + np.zeros((2, 1)), atol=1e-12
    )
    assert (found.attended.share_JnKR[:, ~sees_n] == 0).all()
    np.testing.assert_allclose(found.attended.passage_shares().sum(axis=1), sees_n.astype(float), atol=1e-12)
    np.testing.assert_allclose(
        np.stack([found.attended.token_shares(p) for p in range(3)]).sum(axis=(0, 2)), sees_n.astype(float), atol=1e-12
    )
    before = M - 1 - read.lead
    assert sees_n[before]
    assert not sees_n[:before].any()
    np.testing.assert_allclose(found.delta_n[:before], 0, atol=1e-12)
    np.testing.assert_allclose(found.passage_deltas()[:, :before], 0, atol=1e-12)
    assert (np.abs(found.delta_n[before:]) > 1e-9).all()


def test_permuted_passages_have_permuted_shares_and_effects() -> None:
    model = network()
    read = Reading.of(reading().ids, 1, {0: [A, B, C], 2: [A, B, C]})
    mixed = Reading.of(read.ids, 1, {0: [C, A, B], 2: [B, C, A]})
    first, second = (attribute(model, TOKENIZER, r, neighbor_len=R) for r in (read, mixed))
    assert mixed.sources == (C, A, B)
    order = [1, 2, 0]  # of A, B, C in the second
    np.testing.assert_allclose(
        second.attended.layer_shares()[..., order], first.attended.layer_shares(), rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(second.passage_deltas()[order], first.passage_deltas(), rtol=0, atol=1e-12)
    for p in range(3):
        np.testing.assert_allclose(
            second.attended.token_shares(order[p]), first.attended.token_shares(p), rtol=0, atol=1e-12
        )
    assert np.abs(first.attended.layer_shares()[..., 0] - first.attended.layer_shares()[..., 1]).max() > 0.1


def test_output_tokens_and_passage_tokens_know_their_text() -> None:
    ids = prompt_ids(TEXTS[1], TOKENIZER)
    source = Source(TEXTS[1], 5, "k", "t")
    found = attribute(network(), TOKENIZER, Reading.of([*ids, TOKENIZER.eos_id], 0, {0: [source]}), neighbor_len=60)
    assert found.attended.text == TEXTS[1]
    assert "".join(found.attended.text[slice(*span)] for span in found.attended.spans_n2) == TEXTS[1]
    assert found.attended.spans_n2[-1].tolist() == [len(TEXTS[1])] * 2  # EOS
    for place, span in enumerate(found.attended.spans_n2[:20]):
        assert found.attended.text[slice(*span)] == TOKENIZER.decode(ids[place + 1 : place + 2])
    cat = int(TEXTS[1].index("\U0001f408"))
    held = [span.tolist() for span in found.attended.spans_n2 if span[0] <= cat < span[1]]
    assert held == [[cat, cat + 1]]  # its bytes are several tokens, of which the last one has it
    np.testing.assert_array_equal(found.attended.source_spans[0], TOKENIZER.encode(TEXTS[1]).spans[:60])


def test_the_best_window_is_the_one_with_most_beyond_an_even_share() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 5, 8, 13):
        for _ in range(20):
            share_r = rng.random(size) ** 4
            excess = {
                (i, j): float((share_r[i:j] - share_r.mean()).sum())
                for i in range(size)
                for j in range(i + 1, size + 1)
            }
            begin, end = best_window(share_r)
            assert excess[begin, end] == pytest.approx(max(excess.values()), abs=1e-12)
    assert best_window(np.array([0.0, 0.1, 0.5, 0.4, 0.0, 0.0, 0.2])) == (2, 4)
    assert best_window(np.array([0.9, 0.0, 0.1])) == (0, 1)


def test_an_answers_span_lies_in_the_passages_own_text() -> None:
    text = "title: the cat, source: the dog sat on the log"
    start = text.index("the dog")
    source = Source(text, start, "k", "the cat")
    spans_r2 = TOKENIZER.encode(text).spans
    n, r = 5, len(spans_r2)
    share_JnKR = np.full((2, n, 1, r), 1e-3)
    share_JnKR[:, 3:, 0, 1] = 0.8  # in front of the passage's own text
    inside = [i for i, (a, b) in enumerate(spans_r2) if text.index("dog") - 1 <= a and b <= text.index(" on")]
    share_JnKR[:, 3:, 0, inside] = 0.1
    share_JnKR[:, 4, 0, -2] = 0.22  # more than any of these, but by one token only
    share_JnKR[:, 2, 0, -1] = 1.0  # while a token before the answer was predicted
    source_nK = np.array([[-1], [-1], [0], [0], [0]])
    found = Attended(
        reading=Reading(ids=(0, 3, 3, 3, 3, 3), lead=0, sources=(source,), chunks={0: (0,)}, given=4),
        text="x" * 5,
        spans_n2=np.stack([np.arange(5), np.arange(5) + 1], axis=1),
        source_spans=(spans_r2,),
        source_nK=source_nK,
        share_JnKR=share_JnKR,
    )
    span = answer_span(found, 0)
    assert span is not None
    assert text[start:][slice(*span)].strip() == "dog sat"
    at_end = answer_span(found, 0, slice(2, 3))
    assert at_end is not None
    assert text.endswith(text[start:][slice(*at_end)])
    assert at_end[1] == len(text) - start
    unseen = dataclasses.replace(found, share_JnKR=np.zeros_like(share_JnKR))
    assert answer_span(unseen, 0) is None
    none_n = np.zeros(n)
    row = Attribution(attended=found, log_prob_n=none_n, off_n=none_n, without_Pn=none_n[None]).to_rows()[0]
    assert row["most attended"].strip() == "dog sat"


class Library:
    """Passages that depend on the query."""

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        return [[self.passage(sum(query.encode()) + i) for i in range(k)] for query in queries]

    def passage(self, number: int) -> Passage:
        text = TEXTS[number % 3][number % 7 :]
        return Passage(
            row=number,
            key=f"k{number}",
            title="The <b>",
            url="",
            text=text[:9],
            continuation=text[9:30],
            score=1.0,
            metadata="{}",
        )


@pytest.mark.parametrize("make", [network, fitted], ids=["retro", "retrofit"])
def test_a_generation_is_attributed_as_it_was_generated(make: Any) -> None:
    model = make()
    prompt = prompt_ids("the cat sat on", TOKENIZER)
    config = GenerateConfig(max_new_tokens=3 * M + 1, num_neighbors=2, neighbor_len=R)
    made = generate(model, TOKENIZER, [Prompt(prompt)], config, retriever=Library())[0]
    read = read_generation(prompt, made, M)
    found = attribute(model, TOKENIZER, read, neighbor_len=R)
    atol = 1e-6  # log_probs of a generation are float64 of float64 logits; transformers narrow some products
    np.testing.assert_allclose(
        found.log_prob_n[found.attended.answer],
        made.log_probs[: len(found.log_prob_n[found.attended.answer])],
        rtol=0,
        atol=atol,
    )
    chunk_n = (read.lead + np.arange(len(read.ids) - 1) + 1) // M - 1
    np.testing.assert_array_equal(found.attended.sees_n, np.isin(chunk_n, list(made.retrieved)))
    assert found.attended.sees_n[found.attended.answer][0]
    assert found.attended.text.endswith(made.text)
    assert len(found.token_rows()) == len(made.ids) - made.finished


def test_an_answer_is_attributed_as_it_was_given() -> None:
    model = network()
    config = GenerateConfig(max_new_tokens=2 * M + 1, num_neighbors=3, neighbor_len=60)
    answer = ask(model, TOKENIZER, "where is the cat", retriever=Library(), config=config)
    found = attribute(model, TOKENIZER, read_answer(answer, TOKENIZER, M), neighbor_len=60)
    words = len(answer.generation.ids) - answer.generation.finished
    np.testing.assert_allclose(
        found.log_prob_n[found.attended.answer], answer.generation.log_probs[:words], rtol=0, atol=1e-10
    )
    assert [s.text for s in found.attended.reading.sources] == [passage_text(p) for p in answer.passages]
    assert [s.text[s.start :] for s in found.attended.reading.sources] == [p.full_text for p in answer.passages]
    rows = found.to_rows()
    assert sum(row["share of attention, %"] for row in rows) == pytest.approx(100)
    total_P = (found.log_prob_n - found.without_Pn)[:, len(found.log_prob_n) - words :].sum(axis=1)
    assert [row["added log-probability, nats"] for row in rows] == pytest.approx(total_P.tolist())


def test_the_end_of_an_answer_is_no_word_of_it() -> None:
    prompt = prompt_ids("the cat", TOKENIZER)
    cat = TOKENIZER.encode(" dog").ids.tolist()
    for finished in (True, False):
        made = Generation(" dog", [*cat, *[TOKENIZER.eos_id] * finished], [-1.0] * (len(cat) + finished), finished)
        assert list(read_generation(prompt, made, M).ids) == [*prompt, *cat]


def test_a_document_is_read_with_the_passages_of_its_finished_chunks() -> None:
    library = Library()
    read = read_document(TEXTS[0], TOKENIZER, M, library, 2, max_slots=3 * M + 2)
    assert (read.lead, read.given, len(read.ids)) == (0, 1, 3 * M + 3)
    assert list(read.chunks) == [0, 1, 2]
    text = TOKENIZER.decode(read.ids[: 2 * M])[len(TOKENIZER.decode(read.ids[:M])) :]
    assert [read.sources[p].key for p in read.chunks[1]] == [p.key for p in library.retrieve([text], 2)[0]]
    short = read_document("the", TOKENIZER, M, library, 2)
    assert not short.chunks
    found = attribute(network(), TOKENIZER, short)
    np.testing.assert_allclose(found.delta_n, 0, atol=1e-12)
    assert not found.attended.sees_n.any()


# Explanations


def told(text: str, passages: Sequence[Passage], question: str = "where is the cat") -> Answer:
    """An answer, whether or not a model would give it."""
    ids = [*TOKENIZER.encode(" " + text).ids.tolist(), TOKENIZER.eos_id]
    made = Generation(" " + text, ids, [-0.5 - i for i in range(len(ids))], finished=True)
    return Answer(question=question, text=text, confidence=0.5, passages=list(passages), generation=made)


def passage(text: str, title: str = "The cat") -> Passage:
    return Passage(row=0, key="k", title=title, url="", text=text, continuation="", score=1.0, metadata="{}")


@pytest.mark.parametrize("make", [network, fitted], ids=["retro", "retrofit"])
def test_an_explanation_has_the_attention_of_the_attribution_in_one_forward_pass(make: Any) -> None:
    model = make()
    passages = [passage(TEXTS[0]), passage(TEXTS[1], ""), passage("the dog")]
    answer = told("the dog sat on the log, na\u00efve \U0001f408", passages)
    found = attribute(model, TOKENIZER, read_answer(answer, TOKENIZER, M), neighbor_len=40).attended
    passes: list[int] = []
    hook = model.encoder.register_forward_hook(lambda *_: passes.append(1))
    why = explain(model, TOKENIZER, answer, neighbor_len=40)
    hook.remove()
    assert len(passes) == 1
    np.testing.assert_allclose(why.share_nP, found.passage_shares()[found.answer], rtol=0, atol=1e-12)
    np.testing.assert_allclose(why.share_P, why.share_nP.mean(axis=0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(why.share_nP.sum(axis=1), 1, atol=1e-12)
    assert "".join(why.tokens) == " " + answer.text
    assert why.log_prob_n.tolist() == answer.generation.log_probs[:-1]
    assert len(why.tokens) == len(why.log_prob_n) == len(why.share_nP)


def test_a_passage_that_is_there_twice_has_half_of_it_each_time() -> None:
    answer = told("the dog", [passage("the dog sat"), passage(TEXTS[2]), passage("the dog sat")])
    why = explain(network(), TOKENIZER, answer)
    assert why.share_P[0] == pytest.approx(why.share_P[2], abs=1e-12)
    assert why.share_P.sum() == pytest.approx(1, abs=1e-12)
    assert why.spans[0] == why.spans[2] == (0, 7)


def test_an_answer_that_stands_in_a_passage_was_taken_from_where_it_was_attended_to_most() -> None:
    text = "a Dog, dogs and a dog and the dog"
    places = [(2, 5), (18, 21), (30, 33)]
    found = set()
    for seed in range(6):
        torch.manual_seed(seed)
        model = network()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) if parameter.ndim > 1 else parameter)
        answer = told("dog", [passage(text), passage("nothing of it")])
        attended = attribute(model, TOKENIZER, read_answer(answer, TOKENIZER, M), neighbor_len=60).attended
        start = attended.reading.sources[0].start
        share_r = attended.token_shares(0)[attended.answer].sum(axis=0)
        sums = [
            sum(
                float(share)
                for share, (a, b) in zip(share_r, attended.source_spans[0] - start, strict=False)
                if a < place[1] and b > place[0]
            )
            for place in places
        ]
        why = explain(model, TOKENIZER, answer, neighbor_len=60)
        assert why.spans[0] == places[int(np.argmax(sums))]
        found.add(why.spans[0])
        # Elsewhere it is what was attended to most, where the passage got an even share or more.
        assert why.spans[1] == (answer_span(attended, 1) if why.share_P[1] >= 0.5 else None)
    assert len(found) > 1
    cut = explain(network(), TOKENIZER, answer, neighbor_len=TOKENIZER.encode("title: The cat, source: a Dog").ids.size)
    assert cut.spans[0] == places[0]  # the others were not read


def test_what_was_not_read_or_not_said_has_no_explanation_and_costs_nothing() -> None:
    model = network()
    encoder: Any = model.encoder
    hook = encoder.register_forward_hook(lambda *_: pytest.fail("a forward pass"))
    closed = explain(model, TOKENIZER, told("the dog", []))
    assert (closed.share_P.shape, closed.share_nP.shape, closed.spans) == ((0,), (len(closed.tokens), 0), ())
    assert "".join(closed.tokens) == " the dog"
    made = Generation("", [TOKENIZER.eos_id], [-1.0], finished=True)
    silent = dataclasses.replace(told("x", [passage("a"), passage("b")]), text="", generation=made)
    why = explain(model, TOKENIZER, silent)
    hook.remove()
    assert (why.share_P.tolist(), why.spans, why.tokens, why.share_nP.shape) == ([0, 0], (None, None), (), (0, 2))


@pytest.mark.parametrize("make", [network, fitted], ids=["retro", "retrofit"])
def test_an_asked_answer_is_explained(make: Any) -> None:
    model = make()
    config = GenerateConfig(max_new_tokens=2 * M + 1, num_neighbors=3, neighbor_len=60)
    answer = ask(model, TOKENIZER, "where is the cat", retriever=Library(), config=config)
    why = explain(model, TOKENIZER, answer, neighbor_len=60)
    assert why.share_P.sum() == pytest.approx(1)
    for span, own in zip(why.spans, answer.passages, strict=True):
        assert span is None or 0 <= span[0] < span[1] <= len(own.full_text)
    assert any(why.spans)


@pytest.mark.parametrize("length", [1, 3, M, 2 * M, 2 * M + 1])
@pytest.mark.parametrize("make", [network, fitted], ids=["retro", "retrofit"])
def test_what_was_watched_while_it_answered_explains_an_answer_without_another_pass(make: Any, length: int) -> None:
    model = make()
    passages = [passage(TEXTS[0]), passage(TEXTS[1], ""), passage("the dog")]
    config = GenerateConfig(max_new_tokens=length, num_neighbors=3, neighbor_len=40)
    for question in ("where is the cat", "the dog?", "x" * 17):
        asked = ask_many(model, TOKENIZER, [question], [passages], config)[0]
        expected = explain(model, TOKENIZER, asked, neighbor_len=40)
        passes: list[int] = []
        hook = model.encoder.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        answer, why = ask_and_explain(model, TOKENIZER, question, passages, config)
        hook.remove()
        assert len(passes) == 1 + (len(answer.generation.ids) - 1) // M  # once for each chunk that was finished
        assert answer.generation.ids == asked.generation.ids
        np.testing.assert_allclose(why.share_nP, expected.share_nP, rtol=0, atol=1e-6 if make is fitted else 1e-10)
        assert (why.spans, why.tokens) == (expected.spans, expected.tokens)


def test_an_answer_that_ends_with_a_chunk_is_explained_from_what_was_watched() -> None:
    model = network()
    passages = [passage(TEXTS[0]), passage("the dog")]
    for words in (M - 1, M, M + 1):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(model, "logits", _ending(model.logits, words))
            config = GenerateConfig(max_new_tokens=3 * M, num_neighbors=2, neighbor_len=40)
            answer, why = ask_and_explain(model, TOKENIZER, "where is the cat", passages, config)
        assert (answer.generation.finished, len(answer.generation.ids)) == (True, words + 1)
        expected = explain(model, TOKENIZER, answer, neighbor_len=40)
        np.testing.assert_allclose(why.share_nP, expected.share_nP, rtol=0, atol=1e-10)
        assert why.spans == expected.spans


def _ending(logits: Any, words: int) -> Any:
    """Logits after which the end comes when so many tokens were chosen."""
    left = iter(range(words, -1, -1))

    def changed(hidden_BD: Tensor) -> Tensor:
        logits_BV: Tensor = logits(hidden_BD)
        return logits_BV.index_fill(1, torch.tensor([TOKENIZER.eos_id]), -1e4 if next(left) else 1e4)

    return changed


def test_a_closed_book_needs_no_encoder_to_be_explained() -> None:
    model = network()
    answer, why = ask_and_explain(model, TOKENIZER, "the dog?", [], GenerateConfig(max_new_tokens=3, num_neighbors=0))
    assert (why.share_P.shape, why.spans) == ((0,), ())
    plain = Retro(dataclasses.replace(model.config, cca_layers=())).initialize(torch.Generator().manual_seed(0))
    answer, why = ask_and_explain(plain, TOKENIZER, "the dog?", [], GenerateConfig(max_new_tokens=3, num_neighbors=0))
    assert (why.share_P.shape, len(why.tokens)) == ((0,), len(answer.generation.ids) - answer.generation.finished)
