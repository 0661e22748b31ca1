"""The server as its users meet it: a real one on a free port, asked by OpenAI's own client, by httpx and by bare sockets."""

import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import builders
import httpx
import openai
import pytest
import torch
from commands import command, refused
from servers import ADMIN, OTHER, USER, Running, Start, starting, talkative_model, wait_until

from index_builder.build import build_index
from index_builder.config import BuildConfig
from index_builder.encoder import Encoder
from index_builder.live import add_documents
from index_builder.search import IndexRetriever
from retro.answer import ask, ask_many, passage_text
from retro.attribution import explain
from retro.chat import chat_prompt
from retro.checkpoint import load_model, save_model
from retro.config import GenerateConfig
from retro.generate import Prompt, generate, prompt_ids
from retro.serve.library import Library, Question
from retro.serve.metrics import Metrics
from retro.tokenizer import Tokenizer

one_thread = pytest.fixture(autouse=True)(builders.one_thread)
QUESTION = "When did the 1973 oil crisis begin?"


@pytest.fixture(scope="module")
def model_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkative_model(tmp_path_factory.mktemp("serve") / "toy.model", tokenizer_folder)


@pytest.fixture(scope="module")
def start(model_folder: Path, tiny_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return starting(model_folder, tiny_index, lambda: tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def running(start: Start) -> Iterator[Running]:
    """A server whose index no test changes."""
    with start() as one:
        yield one


@pytest.mark.parametrize("is_shareable", [True, False])
def test_a_question_is_encoded_beside_the_chunks_of_a_sequence(
    is_shareable: bool, tiny_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "is_shareable", is_shareable)
    library = Library({"tiny": tiny_index}, Metrics(), device="cpu", where=None)
    wanted, encode = Question(3, "dense", None), Encoder.encode
    begun, go_on = threading.Event(), threading.Event()

    def slow(encoder: Encoder, texts: Any, role: Any) -> Any:
        if role == "document":
            begun.set()
            assert go_on.wait(60)
        return encode(encoder, texts, role)

    monkeypatch.setattr(Encoder, "encode", slow)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        chunk = threads.submit(library.find, [QUESTION], wanted, "document")
        assert begun.wait(60)
        asked = threads.submit(library.find, [QUESTION], wanted, "query")
        if is_shareable:
            assert len(asked.result(60)[0]) == 3
        else:
            concurrent.futures.wait([asked], 0.3)
            assert not asked.done()
        assert not chunk.done()
        go_on.set()
        assert [len(few) for few in (*chunk.result(60), *asked.result(60))] == [3, 3]
    library.close()


def retro_of(reply: Any) -> dict[str, Any]:
    """What a reply to OpenAI's client says beyond OpenAI's API."""
    extra: dict[str, Any] = reply.to_dict()["retro"]
    return extra


def loaded(folder: Path) -> tuple[Any, Tokenizer]:
    model, tokenizer, _ = load_model(folder)
    return model, tokenizer


def events_of(reply: httpx.Response) -> list[tuple[str, Any]]:
    """Names and values of server-sent events."""
    found = []
    for block in reply.read().decode().strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        found.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


# OpenAI's client


def test_a_completion_is_what_the_model_continues_by_itself(running: Running, model_folder: Path) -> None:
    client = running.openai()
    reply = client.completions.create(model="toy", prompt="The oil crisis", max_tokens=20, temperature=0, logprobs=3)
    model, tokenizer = loaded(model_folder)
    config = GenerateConfig(max_new_tokens=20, num_neighbors=2)
    retriever = IndexRetriever.open(running.index)
    (alone,) = generate(model, tokenizer, ["The oil crisis"], config, retriever=retriever)
    choice = reply.choices[0]
    assert (choice.text, choice.finish_reason) == (alone.text, "length")
    assert reply.usage is not None
    prompt = len(prompt_ids("The oil crisis", tokenizer))
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (
        prompt,
        20,
        prompt + 20,
    )
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(alone.log_probs, abs=1e-4)
    for value, top in zip(choice.logprobs.token_logprobs or [], choice.logprobs.top_logprobs or [], strict=True):
        assert len(top) == 3
        assert max(top.values()) == value  # it is greedy
    passages = retro_of(reply)["passages"]
    assert [p["key"] for p in passages] == [p.key for few in alone.retrieved.values() for p in few]
    assert {p["chunk"] for p in passages} == set(alone.retrieved)


def test_retrieval_can_be_turned_off_for_a_request(running: Running, model_folder: Path) -> None:
    create = running.openai().completions.create
    reply = create(model="toy", prompt="The oil crisis", max_tokens=20, temperature=0, extra_body={"k": 0})
    model, tokenizer = loaded(model_folder)
    (alone,) = generate(model, tokenizer, ["The oil crisis"], GenerateConfig(max_new_tokens=20, num_neighbors=0))
    assert reply.choices[0].text == alone.text
    assert retro_of(reply)["passages"] == []


def test_a_chat_reads_the_passages_of_the_last_question(running: Running, model_folder: Path) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital?"},
        {"role": "assistant", "content": "Warsaw."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    reply = running.openai().chat.completions.create(
        model="toy",
        messages=messages,
        max_completion_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"k": 4},
    )
    choice = reply.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    found = IndexRetriever.open(running.index, method="auto").retrieve([QUESTION], 4, role="query")[0]
    retro = retro_of(reply)
    assert [p["key"] for p in retro["passages"]] == [p.key for p in found]
    assert [p["text"] for p in retro["passages"]] == [p.full_text for p in found]
    _, tokenizer = loaded(model_folder)
    plain: list[Any] = [
        {**message, "content": QUESTION if number == 3 else message["content"]}
        for number, message in enumerate(messages)
    ]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt_ids(chat_prompt(plain), tokenizer))
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == reply.usage.completion_tokens == 12
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
    closed = running.openai().chat.completions.create(
        model="toy", messages=messages, max_tokens=12, temperature=0, extra_body={"k": 0}
    )
    assert closed.choices[0].message.content != choice.message.content


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_says_what_the_whole_reply_says(running: Running, chat: bool) -> None:
    client = running.openai()
    common: dict[str, Any] = {"model": "toy", "max_tokens": 24, "temperature": 0, "stop": ["zzz"]}
    if chat:
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        whole = client.chat.completions.create(messages=messages, **common)
        chunks = list(
            client.chat.completions.create(
                messages=messages, stream=True, stream_options={"include_usage": True}, **common
            )
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert retro_of(chunks[0]) == retro_of(whole)
    else:
        whole = client.completions.create(prompt="The oil", **common)
        chunks = list(
            client.completions.create(prompt="The oil", stream=True, stream_options={"include_usage": True}, **common)
        )
        assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
        assert retro_of(chunks[-2]) == retro_of(whole)
    assert len(chunks) > 10
    assert len({c.id for c in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


def test_a_stop_text_ends_the_reply_and_is_not_in_it(running: Running) -> None:
    create = running.openai().completions.create
    choice = create(model="toy", prompt="The oil", max_tokens=30, temperature=0, logprobs=0).choices[0]
    free, offsets = choice.text, (choice.logprobs and choice.logprobs.text_offset) or []
    stop = next(
        free[o - 1 : o + 1] for o in offsets[5:] if free.find(free[o - 1 : o + 1]) == o - 1
    )  # ends one token, begins another
    wanted = free[: free.find(stop)]
    reply = create(model="toy", prompt="The oil", max_tokens=30, temperature=0, stop=["never said", stop])
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (wanted, "stop")
    assert reply.usage is not None
    assert reply.usage.completion_tokens < 30
    chunks = list(create(model="toy", prompt="The oil", max_tokens=30, temperature=0, stop=stop, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_seeds_and_several_choices(running: Running) -> None:
    create = running.openai().completions.create
    options: dict[str, Any] = {"model": "toy", "prompt": "The oil", "max_tokens": 12, "temperature": 1.0}
    first, again = create(n=3, seed=7, **options), create(n=3, seed=7, **options)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert create(seed=8, **options).choices[0].text == texts[1]
    assert create(**options).choices[0].text != create(**options).choices[0].text
    streamed = ["", "", ""]
    for chunk in create(n=3, seed=7, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_several_prompts_are_several_choices(running: Running, model_folder: Path) -> None:
    create = running.openai().completions.create
    _, tokenizer = loaded(model_folder)
    texts = ["The oil", "A forest of trees"]
    alone = [create(model="toy", prompt=t, max_tokens=9, temperature=0).choices[0].text for t in texts]
    ids = [tokenizer.encode(t).ids.tolist() for t in texts]
    for prompt in (texts, ids):
        reply = create(model="toy", prompt=prompt, max_tokens=9, temperature=0)
        assert [choice.text for choice in reply.choices] == alone
    assert create(model="toy", prompt=ids[0], max_tokens=9, temperature=0).choices[0].text == alone[0]


def test_the_models_are_listed_with_what_the_server_can_do(running: Running) -> None:
    (model,) = running.openai().models.list().data
    assert model.id == "toy"
    assert retro_of(model) == {
        "retrieval": True,
        "default_k": 10,
        "retrievers": ["hybrid", "dense", "bm25", "rerank"],
        "documents": 40,
        "admin": True,
        "max_k": 50,
        "max_tokens": 1024,
    }
    assert running.openai().models.retrieve("toy") == model


# Errors


def test_errors_are_those_of_openai(running: Running) -> None:
    create = running.openai().completions.create
    with pytest.raises(openai.AuthenticationError) as wrong_key:
        running.openai("wrong").models.list()
    assert wrong_key.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as wrong_model:
        create(model="gpt-9", prompt="x")
    assert (wrong_model.value.code, wrong_model.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as too_long:
        create(model="toy", prompt="oil " * 5000)
    assert too_long.value.code == "context_length_exceeded"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"n": 100}, "n"),
        ({"extra_body": {"k": 1000}}, "k"),
        ({"extra_body": {"where": "lang = "}}, "where"),
        ({"extra_body": {"retriever": "magic"}}, "retriever"),
        ({"extra_body": {"retreiver": "bm25"}}, "retreiver"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [5, 10**9]}, "prompt"),
        ({"prompt": ["x", 5]}, "prompt"),
        ({"extra_body": {"stop": 5}}, "stop"),
    ]
    for options, param in wrong:
        with pytest.raises(openai.BadRequestError) as bad:
            create(**{"model": "toy", "prompt": "x", **options})
        assert bad.value.param == param, options
        assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        running.openai().chat.completions.create(
            model="toy",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"question": "\\ud800"}', 400),
        (b'{"question": "x", "k": NaN}', 400),
        (b'{"question": "x", "k": 1e999}', 400),
        (b'{"question": "x", "k": ' + b"9" * 5000 + b"}", 400),
        (b'{"question": "  "}', 400),
        (b'{"question": "' + b"a" * 20_000 + b'"}', 400),
        (b'{"question": "' + b"word " * 1900 + b'"}', 400),
        (b"x" * 5_000_000, 413),
    ],
)
def test_malformed_requests_are_refused_in_openais_form(running: Running, body: bytes, status: int) -> None:
    with running.http() as client:
        reply = client.post("/v1/ask", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == status
    assert set(reply.json()) == {"error"}
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_does_not_say_how_long_it_is_may_not_be_longer(start: Start) -> None:
    with start(max_body_bytes=10_000) as server, server.http() as client:
        for count, status in ((5, 200), (500, 413)):
            content = (b" " * 100 for _ in range(count))
            body = itertools.chain(content, [b'{"query": "oil"}'])
            reply = client.post("/v1/search", content=body, headers={"Content-Type": "application/json"})
            assert reply.status_code == status
        assert reply.json()["error"]["message"] == "the request is longer than 10,000 bytes"
        assert client.post("/v1/search", json={"query": "x" * 10_000}).status_code == 413
        assert client.post("/v1/search", content=b" " * 20_000_000).status_code == 413


def test_who_still_sends_what_was_refused_is_not_cut_off_before_the_reply_is_read(start: Start) -> None:
    """A connection that is closed with something unread is reset, and what was sent on it may be lost."""
    head = f"POST /v1/search HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {USER}\r\nContent-Length: 300000\r\n\r\n"
    with start(max_body_bytes=10_000) as server:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as client:
            client.sendall(head.encode())
            received = client.recv(1 << 16)
            for _ in range(3):
                time.sleep(0.1)
                client.sendall(b" " * 100_000)
            while piece := client.recv(1 << 16):
                received += piece
        assert received.startswith(b"HTTP/1.1 413 ")
        assert received.endswith(b"}")
        wait_until(lambda: not server.server.server_state.connections)


def test_unknown_paths_and_path_tricks_find_nothing(running: Running) -> None:
    with running.http() as client:
        for path in ("/nothing", "/../app.py", "/%2e%2e/app.py", "/app.js/../../cli.py", "/page/index.html", "/.%00"):
            reply = client.get(path)
            assert reply.status_code == 404
            assert reply.json()["error"]["type"] == "not_found_error"


def test_what_is_all_but_zero_is_zero_and_harms_nobody(running: Running) -> None:
    """Logarithms divided by such a temperature are infinite: the step failed, and with it what all others had under way."""
    create = running.openai().completions.create
    options: dict[str, Any] = {"model": "toy", "prompt": "The oil", "max_tokens": 8}
    greedy = create(temperature=0, **options).choices[0].text
    for least in (5e-324, 1e-45, 1e-6):
        assert create(temperature=least, **options).choices[0].text == greedy
        assert create(temperature=1, top_p=least, **options).choices[0].text == greedy


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "toy", "prompt": "a\ud800"}),
        ("/v1/completions", {"model": "toy", "prompt": ["a", "\udfff"]}),
        ("/v1/chat/completions", {"model": "toy", "messages": [{"role": "user", "content": "\ud800"}]}),
        (
            "/v1/chat/completions",
            {"model": "toy", "messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
        ),
        ("/v1/documents", {"documents": [{"id": "a", "text": "b", "more": "\ud800"}]}),
        ("/v1/documents", {"documents": [{"id": "a", "text": "b", "more": {"x": [float("nan")]}}]}),
        ("/v1/documents", {"documents": [{"id": "a", "text": "b", "more": float("-inf")}]}),
    ],
)
def test_half_characters_and_what_is_no_number_are_refused(running: Running, path: str, body: dict[str, Any]) -> None:
    with running.http(ADMIN) as client:
        reply = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert reply.status_code == 400, reply.text
        assert client.get("/v1/models").json()["data"][0]["retro"]["documents"] == 40


def test_a_million_mistakes_are_refused_as_fast_as_one(running: Running) -> None:
    """Each of them used to become an error of its own, and a minute of everybody's time."""
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/documents", {"documents": [0] * 1_000_000}),
        ("/v1/documents", {"keys": [0] * 1_000_000}),
        ("/v1/completions", {"model": "toy", "prompt": ["x", *[0] * 1_000_000]}),
        ("/v1/completions", {"model": "toy", "prompt": "x"} | {f"f{number}": 0 for number in range(100_000)}),
        ("/v1/chat/completions", {"model": "toy", "messages": [{}] * 500_000}),
    ]
    with running.http(ADMIN) as client:
        for path, body in bodies:
            method = "DELETE" if "keys" in body else "POST"
            content, headers = json.dumps(body), {"Content-Type": "application/json"}
            reply = client.request(method, path, content=content, headers=headers, timeout=30)
            assert reply.status_code == 400
            assert len(reply.text) < 1000


def test_too_much_at_once_is_refused_and_said_so(start: Start) -> None:
    with start(max_concurrency=2, max_queue=1) as server:
        client = server.openai()

        def create(_: int) -> str | openai.RateLimitError:
            try:
                reply = client.completions.create(model="toy", prompt="The oil", max_tokens=600, temperature=0)
            except openai.RateLimitError as error:
                return error
            return reply.choices[0].text

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            results = list(pool.map(create, range(8)))
        refusals = [r for r in results if isinstance(r, openai.RateLimitError)]
        texts = [r for r in results if isinstance(r, str)]
        assert len(refusals) >= 3
        assert len(texts) >= 3
        assert len(set(texts)) == 1
        assert all(int(r.response.headers["retry-after"]) >= 1 for r in refusals)
        assert refusals[0].code == "rate_limit_exceeded"
        with pytest.raises(openai.BadRequestError, match="at most 3"):
            client.completions.create(model="toy", prompt="The oil", n=4)
        assert server.service.is_idle


def test_a_request_that_takes_too_long_is_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(timeout_s=0.4, max_tokens=100_000, max_context=200_000) as server:
        network, eos_id = server.service.model.network, server.service.model.tokenizer.eos_id
        logits = network.logits
        monkeypatch.setattr(network, "logits", lambda x: logits(x).index_fill(-1, torch.tensor([eos_id]), -torch.inf))
        with pytest.raises(openai.InternalServerError) as late:
            server.openai().completions.create(model="toy", prompt="The oil", max_tokens=50_000)
        assert late.value.status_code == 504
        wait_until(lambda: server.service.is_idle and not server.service.engine._running)
        with server.http() as client:
            body = {"question": QUESTION, "max_tokens": 50_000, "stream": True}
            name, value = events_of(client.post("/v1/ask", json=body))[-1]
        assert name == "error"
        assert value["error"]["status"] == 504
        wait_until(lambda: server.service.is_idle and not server.service.engine._running)


# Many at once


def test_clients_at_the_same_time_get_what_each_gets_alone(running: Running) -> None:
    client = running.openai()
    prompts = [
        "The oil crisis of 1973 began",
        "A forest",
        "x",
        "Who wrote the song?",
        "In 1990",
        "war " * 30,
        "tea",
        "The law",
    ]

    def create(number: int) -> str:
        return (
            client.completions.create(
                model="toy",
                prompt=prompts[number],
                max_tokens=20 + 5 * number,
                temperature=0,
                extra_body={"k": number % 3},
            )
            .choices[0]
            .text
        )

    alone = [create(number) for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(create, range(8))) == alone


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(start: Start, stream: bool) -> None:
    with start(max_concurrency=1, max_queue=0, max_tokens=1_000_000, max_context=2_000_000) as server:
        body = {"model": "toy", "prompt": "The oil", "max_tokens": 900_000, "stream": stream, "k": 0}
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {USER}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        port = int(server.url.rpartition(":")[2])
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(head.encode() + content)
                wait_until(lambda: server.service.engine._running)
            wait_until(lambda: not server.service.engine._running)
            wait_until(lambda: server.service.is_idle)
        assert server.openai().completions.create(model="toy", prompt="The oil", max_tokens=2).choices[0].text


def test_a_failure_of_the_network_fails_what_runs_and_nothing_after_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start() as server:
        model = server.service.model.network
        hidden = model.hidden
        calls = 0

        def broken(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise RuntimeError("out of memory")
            return hidden(*arguments, **options)

        monkeypatch.setattr(model, "hidden", broken)
        with pytest.raises(openai.InternalServerError) as failed:
            server.openai().completions.create(model="toy", prompt="The oil", max_tokens=20)
        assert failed.value.code == "internal_error"
        assert "content-security-policy" in failed.value.response.headers
        assert "memory" not in str(failed.value)
        # The connection, which the client uses once more, was closed behind such a reply.
        assert server.openai().completions.create(model="toy", prompt="The oil", max_tokens=20).choices[0].text
        assert server.service.is_idle


# Questions and searches


def test_an_answer_is_that_of_retro_ask_with_its_sources(running: Running, model_folder: Path) -> None:
    with running.http() as client:
        reply = client.post("/v1/ask", json={"question": QUESTION, "k": 3, "max_tokens": 9}).json()
    model, tokenizer = loaded(model_folder)
    config = GenerateConfig(num_neighbors=3, neighbor_len=160, max_new_tokens=9)
    answer = ask(model, tokenizer, QUESTION, retriever=IndexRetriever.open(running.index, method="auto"), config=config)
    assert (reply["question"], reply["answer"]) == (QUESTION, answer.text)
    assert reply["confidence"] == pytest.approx(answer.confidence, abs=1e-4)
    assert "".join(token["text"] for token in reply["tokens"]).strip() == answer.text
    assert [token["log_prob"] for token in reply["tokens"]] == pytest.approx(answer.generation.log_probs, abs=1e-4)
    assert [p["key"] for p in reply["passages"]] == [p.key for p in answer.passages]
    for passage, read in zip(reply["passages"], answer.passages, strict=True):
        assert passage["text"] == read.full_text
        assert passage["text"].endswith(passage["continuation"])
        assert passage["span"] is None or 0 <= passage["span"][0] < passage["span"][1] <= len(passage["text"])
    assert any(p["span"] for p in reply["passages"])
    assert sum(p["share"] for p in reply["passages"]) == pytest.approx(1, abs=1e-3)
    for token in reply["tokens"]:
        assert sum(token["shares"]) == pytest.approx(1, abs=1e-3)
    assert reply["refused"] is False
    assert reply["usage"]["completion_tokens"] == 9
    assert set(reply["seconds"]) == {"retrieval", "decoding"}


def test_a_model_that_was_trained_with_passages_in_its_prompt_is_asked_so(
    start: Start, model_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = loaded(model_folder)
    save_model(tmp_path, model, tokenizer, training={"settings": {"context_passages": 2}})
    model.context_passages = 2
    with start(model=tmp_path, max_context=700) as server, server.http() as client:
        found = IndexRetriever.open(server.index, method="auto").retrieve([QUESTION], 4, role="query")[0]
        for k in (4, 1, 0):
            config = GenerateConfig(num_neighbors=k, neighbor_len=160, max_new_tokens=9)
            (answer,) = ask_many(model, tokenizer, [QUESTION], [found], config)
            reply = client.post("/v1/ask", json={"question": QUESTION, "k": k, "max_tokens": 9}).json()
            assert (reply["answer"], reply["usage"]["prompt_tokens"]) == (answer.text, answer.prompt_tokens)
            shares = explain(model, tokenizer, answer).share_P
            assert [p["share"] for p in reply["passages"]] == pytest.approx(shares.tolist(), abs=1e-4)
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        chat = server.openai().chat.completions.create(
            model="toy", messages=messages, max_tokens=9, temperature=0, extra_body={"k": 4}
        )
        texts = [passage_text(passage) for passage in found]
        plain = prompt_ids(chat_prompt(messages), tokenizer)
        in_front = [token for text in texts[:2] for token in tokenizer.encode(text).ids.tolist()[:160]]
        ids = [plain[0], *in_front, *plain[1:]]
        prompt = Prompt(ids, {-(-len(ids) // model.config.chunk_len) - 1: texts[2:]})
        (alone,) = generate(
            model, tokenizer, [prompt], GenerateConfig(max_new_tokens=9, num_neighbors=4, neighbor_len=160)
        )
        assert chat.choices[0].message.content == alone.text.removeprefix(" ")
        assert chat.usage is not None
        assert chat.usage.prompt_tokens == len(ids)
        too_long = client.post("/v1/ask", json={"question": QUESTION, "k": 4, "max_tokens": 400})
        assert too_long.json()["error"]["code"] == "context_length_exceeded"


def test_an_answer_is_streamed_with_its_passages_first(running: Running) -> None:
    body = {"question": QUESTION, "k": 3, "max_tokens": 9}
    with running.http() as client:
        whole = client.post("/v1/ask", json=body).json()
        reply = client.post("/v1/ask", json={**body, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply)
    names = [name for name, _ in events]
    assert names[0] == "passages"
    assert names[-1] == "done"
    assert set(names[1:-1]) == {"token"}
    assert [p["key"] for p in events[0][1]["passages"]] == [p["key"] for p in whole["passages"]]
    assert "".join(value["text"] for name, value in events if name == "token").strip() == whole["answer"]
    done = events[-1][1]
    assert done | {"seconds": 0} == whole | {"seconds": 0}


def test_a_closed_book_has_no_passages(running: Running) -> None:
    with running.http() as client:
        reply = client.post("/v1/ask", json={"question": QUESTION, "k": 0}).json()
    assert reply["passages"] == []
    assert {token["shares"] is None for token in reply["tokens"]} == {True}


@pytest.mark.parametrize("method", ["dense", "bm25", "hybrid", "rerank"])
def test_a_search_finds_what_the_index_finds(running: Running, method: Any) -> None:
    found = IndexRetriever.open(running.index, method=method).retrieve(
        [QUESTION], 5, role="query", where="title != null"
    )[0]
    body = {"query": QUESTION, "k": 5, "retriever": method, "where": "title exists"}
    with running.http() as client:
        passages = client.post("/v1/search", json=body).json()["passages"]
    assert [(p["key"], p["text"], p["number"]) for p in passages] == [
        (p.key, p.full_text, number) for number, p in enumerate(found, 1)
    ]
    assert [p["score"] for p in passages] == pytest.approx([p.score for p in found], abs=1e-4)


def test_a_key_confines_all_searches_and_a_request_only_narrows_it(running: Running) -> None:
    wide = 'title = "Chloroplast" or title exists'
    with running.http(OTHER) as client, running.http() as free:
        for path, extra in (("/v1/search", {"query": "plants"}), ("/v1/ask", {"question": "plants"})):
            for where in (None, wide, 'not (title = "1973 oil crisis")'):
                reply = client.post(path, json={**extra, "k": 20, "where": where})
                assert reply.status_code == 200
                titles = {p["title"] for p in reply.json()["passages"]}
                assert titles == ({"1973 oil crisis"} if where != 'not (title = "1973 oil crisis")' else set())
            assert len({p["title"] for p in free.post(path, json={**extra, "k": 20}).json()["passages"]}) > 1
    for key, confined in ((OTHER, True), (USER, False)):
        client_of_key = running.openai(key)
        completion = client_of_key.completions.create(
            model="toy", prompt="Plants and animals live in", max_tokens=20, temperature=0, extra_body={"k": 5}
        )
        chat = client_of_key.chat.completions.create(
            model="toy", messages=[{"role": "user", "content": "Plants?"}], max_tokens=4
        )
        for reading in (completion, chat):
            titles = {p["title"] for p in retro_of(reading)["passages"]}
            assert (titles == {"1973 oil crisis"}) is confined


# The live index


def test_documents_that_are_added_are_found_at_once_and_change_answers(start: Start) -> None:
    fact = "The lighthouse of Vexholm was painted green in 1931 by Ottilie Brandt."
    question = "Who painted the lighthouse of Vexholm?"
    with start() as server, server.http() as client, server.http(ADMIN) as admin:

        def found() -> list[str]:
            passages = client.post("/v1/search", json={"query": fact, "k": 3}).json()["passages"]
            return [p["key"] for p in passages]

        def answer() -> str:
            return str(
                client.post("/v1/ask", json={"question": question, "k": 1, "retriever": "bm25"}).json()["answer"]
            )

        before, first = found(), answer()
        document = {"id": "vexholm", "text": fact, "title": "Vexholm", "url": "https://example.org/v", "year": 1931}
        reply = admin.post("/v1/documents", json={"documents": [document]})
        assert reply.json() == {
            "added": 1, "updated": 0, "removed": 0, "unchanged": 0, "keys": ["api:vexholm"], "documents": 41,
        }  # fmt: skip
        assert found()[0] == "api:vexholm"
        with_it = answer()
        assert with_it != first
        where = {"query": "x", "where": 'year = 1931 and corpus = "api"'}
        (passage,) = client.post("/v1/search", json=where).json()["passages"]
        assert (passage["title"], passage["url"], passage["metadata"]) == (
            "Vexholm",
            "https://example.org/v",
            {"year": 1931},
        )

        again = admin.post("/v1/documents", json={"documents": [document]})
        assert again.status_code == 400
        assert "api:vexholm already" in again.json()["error"]["message"]
        assert "/tmp" not in again.text
        changed = {**document, "text": fact.replace("green", "red")}
        reply = admin.post("/v1/documents", json={"documents": [changed], "update": True}).json()
        assert (reply["added"], reply["updated"]) == (0, 1)
        assert "red" in client.post("/v1/search", json={"query": changed["text"], "k": 1}).json()["passages"][0]["text"]

        reply = admin.request("DELETE", "/v1/documents", json={"keys": ["api:vexholm"]}).json()
        assert (reply["removed"], reply["documents"]) == (1, 40)
        assert found() == before
        assert answer() == first
        missing = admin.request("DELETE", "/v1/documents", json={"keys": ["api:vexholm"]})
        assert missing.status_code == 400
        assert str(server.index) not in missing.text


def test_an_index_that_cannot_be_written_is_searched_and_stays_as_it_is(
    start: Start, file_limit: Callable[[int], contextlib.AbstractContextManager[None]]
) -> None:
    """A full disk, or a replica's index that is mounted for reading only."""
    body = {"documents": [{"id": "z", "text": "Zanthorium melts at 12 degrees. " * 50}]}
    with start() as server, server.http(ADMIN) as admin:
        with file_limit(3000):
            reply = admin.post("/v1/documents", json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "index_unwritable")
            assert str(server.index) not in reply.text
            assert admin.post("/v1/search", json={"query": "oil"}).status_code == 200
        assert admin.get("/v1/models").json()["data"][0]["retro"]["documents"] == 40
        assert admin.post("/v1/documents", json=body).json()["documents"] == 41


def test_only_the_admin_key_changes_the_index(start: Start, running: Running) -> None:
    body = {"documents": [{"id": "a", "text": "b"}]}
    with running.http() as user, running.http(None) as nobody, running.http(ADMIN) as admin:
        assert user.post("/v1/documents", json=body).status_code == 403
        assert user.post("/v1/admin/reload", json={}).status_code == 403
        assert nobody.post("/v1/documents", json=body).status_code == 401
        assert nobody.request("DELETE", "/v1/documents", json={"keys": ["a"]}).status_code == 401
        assert admin.post("/v1/search", json={"query": "x"}).status_code == 200
        refusals: list[dict[str, Any]] = [
            {"documents": [{"id": "a", "text": "b"}] * 101},
            {"documents": [{"id": "a"}]},
            {"documents": [{"id": "a", "text": ""}]},
            {"documents": []},
            {"documents": [{"id": "a", "text": "b"}], "corpus": "../x"},
        ]
        for bad in refusals:
            assert admin.post("/v1/documents", json=bad).status_code == 400
    with start(keys=False) as server, server.http(None) as client:
        assert client.post("/v1/documents", json=body).status_code == 403
        assert client.get("/v1/models").json()["data"][0]["retro"]["admin"] is False


def test_what_others_change_on_disk_is_followed(start: Start, tmp_path: Path) -> None:
    with start() as server, server.http() as client:
        query = {"query": "Zanthorium melts at 12 degrees.", "k": 1}
        assert client.post("/v1/search", json=query).json()["passages"][0]["key"].startswith("squad:")
        path = tmp_path / "news.jsonl"
        path.write_text(json.dumps({"id": "z", "text": query["query"]}))
        add_documents(server.index, [str(path)])
        assert client.post("/v1/search", json=query).json()["passages"][0]["key"] == "news:z"


def test_another_index_is_loaded_under_load_and_no_request_fails(
    start: Start, tiny_index: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.index"
    shutil.copytree(tiny_index, other)
    path = tmp_path / "news.jsonl"
    path.write_text(json.dumps({"id": "z", "text": "Zanthorium melts at 12 degrees."}))
    add_documents(other, [str(path)])
    with start(others={"other": other}) as server, server.http(ADMIN) as admin, server.http() as client:
        stop = threading.Event()
        failures: list[str] = []
        replies = [0]

        def load(number: int) -> None:
            with server.http() as own:
                while not stop.is_set():
                    if number % 2:
                        reply = own.post("/v1/search", json={"query": "oil", "k": 3})
                    else:
                        reply = own.post(
                            "/v1/completions", json={"model": "toy", "prompt": "The oil", "max_tokens": 12}
                        )
                    replies[0] += 1
                    if reply.status_code != 200:
                        failures.append(reply.text)

        threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        query = {"query": "Zanthorium melts at 12 degrees.", "k": 1}
        try:
            for number in range(4):
                name = ("other", "wiki")[number % 2]
                assert admin.post("/v1/admin/reload", json={"index": name}).json()["index"] == name
                key = client.post("/v1/search", json=query).json()["passages"][0]["key"]
                assert (key == "news:z") is (name == "other")
                document = {"id": f"n{number}", "text": f"Quorlite number {number}"}
                assert admin.post("/v1/documents", json={"documents": [document]}).status_code == 200
                found = client.post("/v1/search", json={"query": document["text"], "k": 1}).json()["passages"]
                assert found[0]["key"] == f"api:n{number}"
            assert admin.post("/v1/admin/reload", json={}).json()["index"] == "wiki"
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failures == []
        assert replies[0] > 20
        unknown = admin.post("/v1/admin/reload", json={"index": str(other)})
        assert unknown.status_code == 400
        assert "use one of wiki, other" in unknown.json()["error"]["message"]


def test_an_index_without_bm25_takes_the_place_of_one_with_it(start: Start, tiny_encoder: Path, tmp_path: Path) -> None:
    """What a server can do, and what it does where nobody says how, is that of the index it has now."""
    path = tmp_path / "news.jsonl"
    path.write_text(json.dumps({"id": "z", "text": "Zanthorium melts at 12 degrees."}))
    build_index([str(path)], tmp_path / "x.index", BuildConfig(encoder=str(tiny_encoder), lexical="off"))
    with start(others={"vectors": tmp_path / "x.index"}) as server, server.http(ADMIN) as admin:
        query = {"query": "zanthorium", "k": 1}
        for name, methods in (("wiki", ["hybrid", "bm25", "dense", "rerank"]), ("vectors", ["dense"])):
            assert admin.post("/v1/admin/reload", json={"index": name}).status_code == 200
            described = admin.get("/v1/models").json()["data"][0]["retro"]["retrievers"]
            assert (described[0], sorted(described)) == (methods[0], sorted(methods))
            assert len(admin.post("/v1/search", json=query).json()["passages"]) == 1
            by_words = admin.post("/v1/search", json=query | {"retriever": "hybrid"})
            assert by_words.status_code == (200 if name == "wiki" else 400)
        assert by_words.json()["error"]["message"] == "the index cannot be searched by hybrid: use dense"
        assert admin.post("/v1/ask", json={"question": "What melts?", "k": 1}).status_code == 200


# State, page and headers


def test_state_is_open_and_metrics_count(running: Running) -> None:
    with running.http(None) as anybody, running.http() as client:
        assert anybody.get("/healthz").json() == {"status": "ok"}
        assert anybody.get("/readyz").json() == {"status": "ready"}
        assert anybody.get("/metrics").status_code == 401

        def value(name: str) -> float:
            match = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
            return float(match[1]) if match else 0.0

        names = ("retro_generated_tokens_total", "retro_retrieval_seconds_count", "retro_encoding_seconds_count")
        before = [value(name) for name in names]
        client.post("/v1/ask", json={"question": QUESTION, "k": 2, "max_tokens": 7})
        assert [value(name) - old for name, old in zip(names, before, strict=True)] == [7, 1, 1]
        assert value('retro_requests_total{route="/v1/ask",status="200"}') >= 1
        assert value("retro_queue_length") == 0
        assert value("retro_index_documents") == 40


def test_every_reply_has_strict_headers_and_the_page_asks_nobody_else(running: Running) -> None:
    with running.http(None) as client:
        page = client.get("/")
        replies = [page, client.get("/healthz"), client.get("/nothing"), client.get("/v1/models")]
        names = re.findall(r'(?:src|href)="([^"#:]+)"', page.text)
        assert {"app.js", "style.css"} <= set(names)
        for name in names:
            replies.append(client.get(f"/{name}"))
            assert replies[-1].status_code == 200
    for reply in replies:
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert "server" not in reply.headers


def test_other_sites_may_ask_only_where_they_are_allowed(start: Start) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with start(allowed_origins=("https://ours.example",)) as server, server.http(None) as client:
        ours = client.options("/v1/ask", headers={"Origin": "https://ours.example", **asked})
        assert ours.headers["access-control-allow-origin"] == "https://ours.example"
        theirs = client.options("/v1/ask", headers={"Origin": "https://theirs.example", **asked})
        assert "access-control-allow-origin" not in theirs.headers


def test_without_a_key_the_server_answers_to_its_own_names_only(start: Start) -> None:
    """A page elsewhere could give its own name this machine's address."""
    with start(keys=False) as server, server.http(None) as client:
        assert client.post("/v1/search", json={"query": "oil"}).status_code == 200
        port = server.url.rpartition(":")[2]
        assert client.get("/healthz", headers={"Host": f"localhost:{port}"}).status_code == 200
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421


def test_the_description_names_every_route(running: Running) -> None:
    with running.http(None) as client:
        described = client.get("/openapi.json").json()
    assert {
        "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/ask", "/v1/search", "/v1/documents",
        "/v1/admin/reload", "/healthz", "/readyz", "/metrics",
    } <= set(described["paths"])  # fmt: skip
    assert described["components"]["schemas"]["AskReply"]["properties"]["passages"]


def test_a_server_without_an_index_answers_from_the_model_alone(start: Start) -> None:
    with start(index=False) as server, server.http() as client:
        retro = client.get("/v1/models").json()["data"][0]["retro"]
        assert (retro["retrieval"], retro["default_k"], retro["retrievers"]) == (False, 0, [])
        assert client.post("/v1/ask", json={"question": QUESTION}).json()["passages"] == []
        assert server.openai().completions.create(model="toy", prompt="The oil", max_tokens=3).choices[0].text
        assert client.post("/v1/ask", json={"question": QUESTION, "k": 2}).status_code == 400
        assert client.post("/v1/search", json={"query": "oil", "k": 0}).status_code == 404


# The command


def test_it_is_refused_to_be_reached_by_others_without_a_key(
    model_folder: Path, tiny_index: Path, tmp_path: Path
) -> None:
    arguments = ["serve", model_folder, "--index", tiny_index, "--port", 0, "--device", "cpu"]
    refused(command(*arguments, "--host", "0.0.0.0"), "no key", "--api-key-file")
    keys = tmp_path / "keys"
    keys.write_text("short\n")
    refused(command(*arguments, "--api-key-file", keys), "at least 16 characters")
    keys.write_text(f"{USER} lang =\n")
    refused(command(*arguments, "--api-key-file", keys), "keys: the filter", "malformed")
    keys.write_text("# nobody\n")
    refused(command(*arguments, "--api-key-file", keys), "holds no key")
    refused(command(*arguments, "--api-key-file", tmp_path / "none"), "cannot be read")
    refused(command(*arguments, "--index", tiny_index), "two indexes are called 'tiny.index'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused(command(*arguments, "--port", taken.getsockname()[1]), "cannot be listened on", "--port")


@pytest.mark.slow
def test_a_signal_lets_running_requests_finish_and_refuses_new_ones(
    model_folder: Path, tiny_index: Path, tmp_path: Path
) -> None:
    secret = "Secretive question about oil"
    environment = os.environ | {"RETRO_API_KEY": USER, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log = tmp_path / "log"
    limits = ["--device", "cpu", "--max-tokens", "100000", "--max-context", "200000"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "retro", "serve", model_folder, "--index", tiny_index, "--port", "0", *limits],
            env=environment,
            stderr=file,
        )
    try:
        wait_until(lambda: "Serving" in log.read_text(), 60)
        found = re.search(r"Serving toy\.model at (http://127\.0\.0\.1:\d+)", log.read_text())
        assert found is not None
        headers = {"Authorization": f"Bearer {USER}"}
        with httpx.Client(base_url=found[1], headers=headers, timeout=60) as client:
            body: dict[str, Any] = {
                "model": "toy.model",
                "prompt": secret,
                "max_tokens": 800,
                "temperature": 0,
                "k": 0,
            }
            whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            pieces = []
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
                lines = stream.iter_lines()
                pieces.append(next(lines))
                process.send_signal(signal.SIGTERM)
                wait_until(lambda: "new ones refused" in log.read_text())
                with httpx.Client(base_url=found[1], headers=headers, timeout=60) as late:
                    assert late.get("/readyz").status_code == 503
                    refusal = late.post("/v1/ask", json={"question": "x"})
                    assert refusal.status_code == 503
                    assert refusal.json()["error"]["code"] == "stopping"
                pieces += list(lines)
            data = [line.removeprefix("data: ") for line in pieces if line]
            assert data[-1] == "[DONE]"
            assert "".join(json.loads(line)["choices"][0]["text"] for line in data[:-1]) == whole
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
    printed = log.read_text()
    assert "POST /v1/completions 200" in printed
    assert secret not in printed
    assert USER not in printed


def test_confidence_is_a_mean_of_probabilities(running: Running) -> None:
    with running.http() as client:
        reply = client.post("/v1/ask", json={"question": QUESTION, "k": 2, "max_tokens": 5}).json()
    mean = sum(token["log_prob"] for token in reply["tokens"]) / 5
    assert reply["confidence"] == pytest.approx(math.exp(mean), abs=1e-4)


def test_behind_a_proxy_that_takes_a_prefix_away_the_description_names_it(start: Start) -> None:
    with start(root_path="/retro", index=False) as running, running.http() as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/v1/models").status_code == 200
        assert client.get("/").status_code == 200
        assert [server["url"] for server in client.get("/openapi.json").json()["servers"]] == ["/retro"]
