"""Passages pasted into the prompt of models of transformers, against a loop that reads all tokens anew for each token."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import builders
import pytest
import tokenizers
import torch
import transformers

from retro.answer import Answer
from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.errors import ConfigError
from retro.prompted import PromptedModel, paste
from retro.tokenizer import Tokenizer

one_thread = pytest.fixture(autouse=True)(builders.one_thread)
QUESTIONS = ["Who?", "When did it begin, and in which\n month?", "Where is the cat \U0001f408?", "What?", "Why not?"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<quick>{% endif %}{% endif %}"
)


def passage(text: str, title: str = "The cat") -> Passage:
    return Passage(row=0, key="k", title=title, url="", text=text, continuation=" and\nmore", score=1.0, metadata="{}")


PASSAGES = [passage("one"), passage("two of them", ""), passage("three")]
FOUND = [PASSAGES, PASSAGES[:1], [], PASSAGES[1:], PASSAGES[2:]]


def bytes_tokenizer(template: str | None = None) -> Any:
    """The 256 bytes, as transformers open it."""
    toy = builders.toy_tokenizer()
    opener: Any = transformers.PreTrainedTokenizerFast
    return opener(
        tokenizer_object=tokenizers.Tokenizer.from_str(toy.backend.to_str()),
        bos_token=toy.backend.id_to_token(toy.bos_id),
        eos_token=toy.backend.id_to_token(toy.eos_id),
        chat_template=template,
    )


@functools.cache
def network(kind: str, positions: int = 512) -> Any:
    """Large random weights; it says some letters, a space, line ends and EOS."""
    sizes: dict[str, Any] = {"vocab_size": 258, "tie_word_embeddings": False}
    torch.manual_seed(3)
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            **sizes, n_embd=16, n_layer=2, n_head=2, n_positions=positions, eos_token_id=builders.toy_tokenizer().eos_id
        )
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            **sizes,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=positions,
            eos_token_id=builders.toy_tokenizer().eos_id,
        )
        model = transformers.LlamaForCausalLM(config)
    said = [*builders.toy_tokenizer().encode(" ab\n").ids.tolist(), builders.toy_tokenizer().eos_id]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2.5 / parameter.shape[1] ** 0.5)
        silent = torch.ones(258, dtype=torch.bool)
        silent[said] = False
        model.lm_head.weight[silent] = 0.0
        model.lm_head.weight[:] *= 0.6
    model.generation_config.repetition_penalty = 3.0  # a model's own settings must not change what is greedy
    return model.eval()


def prompted(kind: str, template: str | None = None, positions: int = 512) -> PromptedModel:
    return PromptedModel(network(kind, positions), bytes_tokenizer(template))


def by_hand(model: Any, ids: list[int], steps: int) -> tuple[str, list[int], list[float], bool]:
    """Text, tokens, log-probabilities and whether it ended, one whole forward pass for each token."""
    eos = builders.toy_tokenizer().eos_id
    made: list[int] = []
    log_probs: list[float] = []
    while len(made) < steps:
        with torch.no_grad():
            own_V = model(torch.tensor([ids + made])).logits[0, -1].double().log_softmax(-1)
        made.append(int(own_V.argmax()))
        log_probs.append(float(own_V.max()))
        text = builders.toy_tokenizer().decode(made).lstrip()
        if made[-1] == eos or "\n" in text:
            return text.partition("\n")[0].strip(), made, log_probs, True
    return builders.toy_tokenizer().decode(made).strip(), made, log_probs, False


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_answers_of_a_batch_are_those_of_a_plain_loop(kind: str) -> None:
    model, config = prompted(kind), GenerateConfig(num_neighbors=2, max_new_tokens=12)
    told = [""] * len(QUESTIONS)

    def on_token(number: int, piece: str) -> None:
        told[number] += piece

    answers = model.ask_many(QUESTIONS, FOUND, config, on_token=on_token)
    ends = set()
    for number, (question, few, answer) in enumerate(zip(QUESTIONS, FOUND, answers, strict=True)):
        ids = model.prompt_ids(question, few[:2])
        text, made, log_probs, finished = by_hand(model.model, ids, 12)
        assert (answer.text, answer.generation.ids, answer.generation.finished) == (text, made, finished)
        assert answer.generation.log_probs == pytest.approx(log_probs, abs=1e-4)
        assert answer.confidence == pytest.approx(float(torch.tensor(log_probs).mean().exp()), abs=1e-4)
        assert answer.passages == few[:2]
        assert answer.prompt_tokens == len(ids)
        assert told[number].strip() == text
        ends.add(made[-1] if finished else -1)
    assert len(ends) > 1  # not all end in the same way
    alone = [model.ask_many([q], [few], config)[0] for q, few in zip(QUESTIONS, FOUND, strict=True)]
    assert [a.generation.ids for a in alone] == [a.generation.ids for a in answers]


def test_the_prompt_has_numbered_passages_the_question_and_a_place_for_the_answer() -> None:
    assert paste("Who \n was it?", PASSAGES[:2]) == (
        "Answer the question from the passages, in a few words.\n\n"
        "Passage 1: The cat: one and more\n\n"
        "Passage 2: two of them and more\n\n"
        "Question: Who was it?\nAnswer:"
    )
    assert paste("Who?", []) == "Answer the question in a few words.\n\nQuestion: Who?\nAnswer:"
    with pytest.raises(ConfigError, match="the question is empty"):
        paste(" ", PASSAGES)


def test_a_chat_template_is_used_where_there_is_one() -> None:
    plain, chat = prompted("llama"), prompted("llama", TEMPLATE)
    text = paste("Who?", PASSAGES)
    assert bytes_tokenizer().decode(plain.prompt_ids("Who?", PASSAGES), skip_special_tokens=True) == text
    said = bytes_tokenizer().decode(chat.prompt_ids("Who?", PASSAGES))
    assert said == f"<user>{text}<assistant><quick>"


def test_passages_that_do_not_fit_are_left_out_from_the_last() -> None:
    sizes = [len(prompted("llama").prompt_ids("Who?", PASSAGES[:count])) for count in range(4)]
    config = GenerateConfig(num_neighbors=10, max_new_tokens=5)
    for count in range(4):
        for room, expected in ((sizes[count] + 5, count), (sizes[count] + 4, count - 1)):
            if expected < 0:
                with pytest.raises(ConfigError, match=f"more than the {room} of the model's context"):
                    prompted("llama", positions=room).ask_many(["Who?"], [PASSAGES], config)
                continue
            answer = prompted("llama", positions=room).ask_many(["Who?"], [PASSAGES], config)[0]
            assert answer.passages == PASSAGES[:expected]
            assert answer.prompt_tokens == sizes[expected]


def test_what_cannot_be_asked_is_refused() -> None:
    model = prompted("gpt2")
    with pytest.raises(ConfigError, match="2 questions and passages for 1"):
        model.ask_many(["Who?", "When?"], [PASSAGES])
    with pytest.raises(ConfigError, match="the question is empty"):
        model.ask_many([""], [PASSAGES])
    with pytest.raises(ConfigError, match="answers greedily"):
        model.ask_many(["Who?"], [[]], GenerateConfig(temperature=0.5))


def opened(folder: Path) -> Sequence[Answer]:
    return PromptedModel.open(folder).ask_many(QUESTIONS, FOUND, GenerateConfig(max_new_tokens=8))


def test_a_folder_of_transformers_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened as a causal language model"):
        PromptedModel.open(tmp_path / "nowhere")
    network("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer that can be opened"):
        PromptedModel.open(tmp_path)
    bytes_tokenizer().save_pretrained(tmp_path)
    expected = prompted("llama").ask_many(QUESTIONS, FOUND, GenerateConfig(max_new_tokens=8))
    assert [a.text for a in opened(tmp_path)] == [a.text for a in expected]


def test_a_model_of_ours_can_be_asked_without_its_retrieval(tmp_path: Path) -> None:
    import retro  # noqa: F401  registers it
    from retro.checkpoint import save_model
    from retro.model import Retro

    network_ = Retro(builders.toy_model_config()).initialize(torch.Generator().manual_seed(0))
    save_model(tmp_path, network_, Tokenizer.train(["toy"], 258))
    answers = opened(tmp_path)
    assert [len(a.passages) for a in answers] == [2, 1, 0, 2, 1]
