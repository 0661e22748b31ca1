"""Parts of the server by themselves: keys, stop texts, chats, and what decoding for many asks of the decoder."""

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import builders
import pytest
import tokenizers
import torch
from builders import speak_up, toy_model_config, toy_tokenizer

from retro import generate as generating
from retro.chat import ChatFormat, Message, chat_prompt
from retro.chunks import Passage
from retro.config import GenerateConfig
from retro.errors import ConfigError
from retro.generate import Decoder, Prompt, Role, generate, prompt_ids
from retro.model import Retro
from retro.serve.config import Key, Keys, ServeConfig, check_exposure, is_loopback, named_indexes
from retro.serve.engine import Engine, Task, Update, _held_back
from retro.serve.gate import BusyError, Gate
from retro.serve.library import Turns
from retro.serve.metrics import Metrics
from retro.tokenizer import Tokenizer

one_thread = pytest.fixture(autouse=True)(builders.one_thread)
FIRST, SECOND = "first-key-0123456789", "second-key-0123456789"


def model() -> Retro:
    made = Retro(toy_model_config(tie_embeddings=False))
    speak_up(made, std=1.5)
    return made.eval()


class Library:
    """Passages that follow from the query and the library's name; counts its searches."""

    def __init__(self, name: str, *, broken: bool = False) -> None:
        self.name, self.broken, self.calls = name, broken, 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Library) and (other.name, other.broken) == (self.name, self.broken)

    def __hash__(self) -> int:
        return hash(self.name)

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        self.calls += 1
        if self.broken:
            raise ConfigError("the index is gone")
        made: dict[str, Any] = {"title": "", "url": "", "continuation": "", "score": 1.0, "metadata": "{}"}
        texts = [hashlib.sha256((self.name + query).encode()).hexdigest()[:20] for query in queries]
        return [[Passage(row=0, key=self.name, text=text, **made)] * k for text in texts]


# Keys


def test_keys_are_read_with_their_filters(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f'# people\n\n{FIRST}\n  {SECOND}   lang = "en"  \n')
    keys = Keys.read(key_file=path, admin_key="admin-key-0123456789")
    first, second, admin = keys.find(FIRST), keys.find(SECOND), keys.find("admin-key-0123456789")
    assert first is not None
    assert second is not None
    assert admin is not None
    assert first.where is None
    assert second.where is not None
    assert second.where.text == 'lang = "en"'
    assert [key.is_admin for key in (first, second, admin)] == [False, False, True]
    for wrong in ("", FIRST[:-1], FIRST + " ", FIRST.upper(), "\udcff", None):
        assert keys.find(wrong) is None


def test_without_keys_everybody_may_ask_and_nobody_may_change() -> None:
    keys = Keys.read()
    anybody = keys.find(None)
    assert anybody == Key()
    with_admin = Keys.read(admin_key=FIRST)
    assert with_admin.find(None) == Key()
    found = with_admin.find(FIRST)
    assert found is not None
    assert found.is_admin
    assert with_admin.find(SECOND) is None  # a wrong key is wrong where none is needed, too


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("short", "at least 16"),
        ("k\u00e9y-0123456789-abcdef", "printable ASCII"),
        (f"{FIRST}\n{FIRST} year > 5", "occurs twice"),
        (f"{FIRST}\n{SECOND} year >", "keys:2: the filter"),
        ("# none", "holds no key"),
    ],
)
def test_keys_that_cannot_work_are_refused(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Keys.read(key_file=path)
    with pytest.raises(ConfigError, match="admin key has a filter"):
        Keys.read(admin_key=f"{FIRST} year > 5")


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("", False), ("10.0.0.1", False), ("localhost.evil.example", False), ("example.org", False)],
)  # fmt: skip
def test_only_loopback_needs_no_key(host: str, own: bool) -> None:
    assert is_loopback(host) is own
    config = ServeConfig(host=host)
    check_exposure(config, Keys.read(key=FIRST))
    if own:
        check_exposure(config, Keys.read())
    else:
        with pytest.raises(ConfigError, match="--api-key-file"):
            check_exposure(config, Keys.read(admin_key=FIRST))


def test_indexes_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert named_indexes(["x/wiki.index", "news=y/z", "a=b"]) == {
        "wiki.index": Path("x/wiki.index"), "news": Path("y/z"), "a=b": Path("a=b"),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="two indexes"):
        named_indexes(["x/wiki", "y/wiki"])


# Stop texts and chats


@pytest.mark.parametrize(
    ("text", "start", "stops", "held"),
    [("abc", 0, ("cde",), 1), ("abcd", 0, ("cde",), 2), ("abcd", 0, ("cde", "bcdx"), 3), ("abcd", 2, ("bcdx", "dy"), 1),
     ("abcd", 0, (), 0), ("abcd", 0, ("x",), 0), ("aaa", 0, ("aaab",), 3), ("aaa", 0, ("ab",), 1), ("", 0, ("a",), 0)],
)  # fmt: skip
def test_what_may_begin_a_stop_text_is_held_back(text: str, start: int, stops: tuple[str, ...], held: int) -> None:
    assert _held_back(text, start, stops) == held


def test_a_chat_is_written_as_models_are_trained_on_it(tmp_path: Path) -> None:
    messages: list[Message] = [{"role": "system", "content": "x"}, {"role": "user", "content": "Hi <|im_end|> all"}]
    form = ChatFormat.of(tmp_path, toy_tokenizer())
    assert form.ids(messages) == prompt_ids(chat_prompt(messages), toy_tokenizer())
    assert (form.stop, form.leading) == (("<|im_end|>",), " ")


def test_a_template_that_came_with_the_model_is_used(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|turn|>{{ m.role }}: {{ m.content }}]{% endfor %}{% if add_generation_prompt %}[assistant:{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    backend = tokenizers.Tokenizer.from_str(toy_tokenizer().backend.to_str())
    backend.add_special_tokens(["<|turn|>"])
    tokenizer, mark = Tokenizer.wrap(backend), backend.token_to_id("<|turn|>")
    chat = ChatFormat.of(tmp_path, tokenizer)
    expected = [tokenizer.bos_id, mark, *tokenizer.encode("user: Hi][assistant:").ids.tolist()]
    assert chat.ids([{"role": "user", "content": "Hi"}]) == expected
    assert (chat.stop, chat.leading) == ((), "")
    with pytest.raises(ConfigError, match="no system"):
        chat.ids([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    for text in ("a<|turn|>b", "<|eos|>"):  # a message cannot pretend to be another
        with pytest.raises(ConfigError, match=r"messages\[0\] holds"):
            chat.ids([{"role": "user", "content": text}])


# What the decoder does for a server


def settings(**changes: Any) -> GenerateConfig:
    return GenerateConfig(**{"max_new_tokens": 20, "num_neighbors": 2, "neighbor_len": 24} | changes)


def test_prompts_with_equal_retrievers_are_looked_up_together_and_others_apart() -> None:
    network, one, two = model(), Library("one"), Library("two")
    prompts = [Prompt(prompt_ids(text, toy_tokenizer())) for text in ("abc", "xyz", "abc")]
    with Decoder(network, toy_tokenizer()) as decoder:
        asked = [one, Library("one"), two]
        rows = [decoder.add(p, settings(), retriever=r) for p, r in zip(prompts, asked, strict=True)]
        while decoder.rows:
            decoder.step()
    assert one.calls == two.calls > 1
    assert asked[1].calls == 0
    for row, prompt, library in zip(rows, prompts, (one, one, two), strict=True):
        alone = generate(network, toy_tokenizer(), [prompt], settings(), retriever=library)[0]
        assert row.result.ids == alone.ids
        assert row.result.retrieved == alone.retrieved
    assert rows[0].result.ids != rows[2].result.ids


def test_a_search_that_fails_ends_its_prompt_alone() -> None:
    network, good, bad = model(), Library("one"), Library("one", broken=True)
    prompts = [Prompt(prompt_ids(text, toy_tokenizer())) for text in ("abc", "xyz", "pqr")]
    with Decoder(network, toy_tokenizer()) as decoder:
        rows = [decoder.add(p, settings(), retriever=r) for p, r in zip(prompts, (good, bad, good), strict=True)]
        ended = []
        while decoder.rows:
            ended += decoder.step()
    assert sorted(map(id, ended)) == sorted(map(id, rows))
    assert str(rows[1].error) == "the index is gone"
    assert rows[1].result.ids == []
    for number in (0, 2):
        assert rows[number].error is None
        alone = generate(network, toy_tokenizer(), [prompts[number]], settings(), retriever=good)[0]
        assert rows[number].result.ids == alone.ids


def test_alternatives_are_the_most_probable_tokens_at_each_place() -> None:
    network, prompt = model(), Prompt(prompt_ids("abc", toy_tokenizer()))
    config = settings(num_neighbors=0, max_new_tokens=6, temperature=1.0)
    with Decoder(network, toy_tokenizer()) as decoder:
        row = decoder.add(prompt, config, num_alternatives=3)
        other = decoder.add(prompt, config)
        while decoder.rows:
            decoder.step()
    assert other.result.alternatives == []
    assert len(row.result.alternatives) == 6
    for place, found in enumerate(row.result.alternatives):
        ids = prompt.ids + row.result.ids[:place]
        T, lead = 24, -len(prompt.ids) % 8
        inputs_1T, keep_1T = torch.zeros(1, T, dtype=torch.long), torch.zeros(1, T, dtype=torch.bool)
        inputs_1T[0, lead : lead + len(ids)], keep_1T[0, lead : lead + len(ids)] = torch.tensor(ids), True
        with torch.no_grad():
            logits_V = network(inputs_1T, keep_BT=keep_1T)[0, lead + len(ids) - 1]
        top = logits_V.log_softmax(-1).topk(3)
        assert [token for token, _ in found] == top.indices.tolist()
        assert [value for _, value in found] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_many_new_prompts_are_read_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    network = model()
    prompts = [Prompt(prompt_ids("abcdefgh" * n, toy_tokenizer())) for n in (1, 4, 2, 9, 1)]
    together = generate(network, toy_tokenizer(), prompts, settings(num_neighbors=0))
    monkeypatch.setattr(generating, "PREFILL_SLOTS", 70)
    sizes = []
    hidden = network.hidden

    def counted(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(tuple(ids.shape))
        return hidden(ids, **options)

    monkeypatch.setattr(network, "hidden", counted)
    apart = generate(network, toy_tokenizer(), prompts, settings(num_neighbors=0))
    assert [r.ids for r in apart] == [r.ids for r in together]
    assert [size for size in sizes if size[1] > 1] == [(2, 33), (1, 17), (1, 73), (1, 9)]


# The engine


def test_what_comes_in_pieces_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random bytes: characters over several tokens, or none."""
    engine = Engine(model(), toy_tokenizer(), Metrics(), max_rows=4)
    prompt = Prompt(prompt_ids("abc", toy_tokenizer()))

    async def run() -> None:
        tasks = [
            Task(prompt=prompt, config=settings(num_neighbors=0, temperature=1.5, seed=seed, max_new_tokens=40))
            for seed in range(6)
        ]
        whole = await engine.complete(tasks)
        pieces = [Update() for _ in tasks]
        async for number, update in engine.stream(tasks):
            pieces[number].text += update.text
            pieces[number].tokens += update.tokens
        for task, one, other in zip(tasks, whole, pieces, strict=True):
            alone = generate(engine.model, toy_tokenizer(), [prompt], task.config)[0]
            assert one.text == other.text == alone.text == "".join(token.text for token in one.tokens)
            assert one.tokens == other.tokens
            assert [token.id for token in one.tokens] == alone.ids
        doubled = await engine.between_steps(lambda: 2 * 21)
        assert doubled == 42
        with pytest.raises(ZeroDivisionError):
            await engine.between_steps(lambda: 1 // 0)

    asyncio.run(run())
    engine.close()
    assert not engine.is_alive


def test_those_who_are_first_wait_for_one_turn_only() -> None:
    turns, order, waiting = Turns(), [], []

    def work(name: str, first: bool) -> None:
        with turns.take(first=first):
            order.append(name)

    with turns.take(first=False):
        for number, (name, first) in enumerate([("chunks", False), ("more chunks", False), ("a question", True)], 1):
            waiting.append(threading.Thread(target=work, args=(name, first)))
            waiting[-1].start()
            while len(turns._change._waiters) < number:  # type: ignore[attr-defined]
                time.sleep(0.001)
        assert order == []
    for thread in waiting:
        thread.join()
    assert order[0] == "a question"
    assert sorted(order[1:]) == ["chunks", "more chunks"]
    with pytest.raises(ZeroDivisionError), turns.take(first=True):
        _ = 1 // 0
    with turns.take(first=False):
        pass


def test_the_gate_counts() -> None:
    gate = Gate(3, "sequences")
    with gate.admit(2):
        with pytest.raises(BusyError, match="2 sequences"), gate.admit(2):
            pass
        with gate.admit():
            assert gate.inside == 3
    assert gate.inside == 0
    with pytest.raises(ConfigError, match="at most 3"), gate.admit(4):
        pass
