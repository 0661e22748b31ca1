"""The server among clients that mean harm, or are broken: nothing they send ends it, holds it up, or costs the others anything."""

import concurrent.futures
import contextlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builders
import httpx
import numpy as np
import pytest
from hostile import hostile, request
from servers import ADMIN, USER, Running, Start, starting, talkative_model, wait_until

from index_builder.filters import Filter
from index_builder.live import add_documents, compact_index, remove_documents
from index_builder.search import Snapshot
from retro.errors import ConfigError
from retro.serve import connections, guard, masks
from retro.serve.masks import Masks

one_thread = pytest.fixture(autouse=True)(builders.one_thread)
GOOD = {"model": "toy", "prompt": "The oil crisis", "max_tokens": 12, "temperature": 0}
ALLOWED = {200, 307, 400, 401, 403, 404, 405, 408, 413, 421, 429}


@pytest.fixture(scope="module")
def model_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkative_model(tmp_path_factory.mktemp("hostile") / "toy.model", tokenizer_folder)


@pytest.fixture(scope="module")
def start(model_folder: Path, tiny_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return starting(model_folder, tiny_index, lambda: tmp_path_factory.mktemp("served"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that waits less."""
    for module, name in (
        (connections, "HEAD_TIMEOUT_S"),
        (connections, "STALL_S"),
        (connections, "LINGER_S"),
        (connections, "BODY_TIMEOUT_S"),
        (guard, "BODY_TIMEOUT_S"),
    ):
        monkeypatch.setattr(module, name, 1.0)


def port_of(server: Running) -> int:
    return int(server.url.rpartition(":")[2])


@contextlib.contextmanager
def connected(server: Running, buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as client:
        if buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.settimeout(60)
        client.connect(("127.0.0.1", port_of(server)))
        yield client


def exchanged(server: Running, sent: bytes, *, ends: bool = False) -> bytes:
    """What comes back; nothing where the connection was just closed. With `ends`, the client says that no more will come."""
    with connected(server) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
            if ends:
                client.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := client.recv(1 << 16):
                received += piece
    return received


def read_through(client: socket.socket, end: bytes) -> None:
    received = b""
    while not received.endswith(end):
        piece = client.recv(1 << 16)
        assert piece
        received += piece


def status(reply: bytes) -> int | None:
    found = re.match(rb"(?:HTTP/1\.1 100 [^\r]*\r\n\r\n)?HTTP/1\.1 (\d{3}) ", reply)
    return int(found[1]) if found else None


def good_reply(server: Running) -> Any:
    with server.http() as client:
        reply = client.post("/v1/completions", json=GOOD)
    assert reply.status_code == 200
    return reply.json()["choices"]


def num_connections(server: Running) -> int:
    return len(server.server.server_state.connections)


# Hostile requests


def survives(server: Running, count: int, caplog: pytest.LogCaptureFixture) -> Counter[int | None]:
    """Sends hostile requests, eight at a time; checks that all is as before."""
    before = good_reply(server)
    requests = hostile(count, (USER, ADMIN))
    with caplog.at_level(logging.WARNING), concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda sent: exchanged(server, sent), requests))
    statuses = Counter(map(status, replies))
    wrong = [
        (sent[:300], reply[:300])
        for sent, reply in zip(requests, replies, strict=True)
        if status(reply) not in {*ALLOWED, None}
    ]
    assert wrong == []
    assert [
        record.getMessage() for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR
    ] == []
    for reply in replies:
        assert b"Traceback" not in reply
        assert str(server.index).encode() not in reply
        assert b"root:" not in reply
    assert good_reply(server) == before
    wait_until(lambda: server.service.is_idle and num_connections(server) == 0)
    assert server.service.engine.is_alive
    return statuses


def test_hostile_requests_are_refused_and_change_nothing(
    start: Start, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    del impatient
    with start() as server:
        statuses = survives(server, 120, caplog)
    assert statuses[400] > 40
    assert {200, 401, 404, 405, 413} & set(statuses)


@pytest.mark.slow
def test_a_thousand_hostile_requests_are_refused_and_change_nothing(
    start: Start, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    del impatient
    with start() as server:
        statuses = survives(server, 1000, caplog)
    assert statuses[400] > 400
    assert {200, 401, 404, 405, 413} <= set(statuses)


def test_markup_and_control_characters_come_back_as_json_only(start: Start) -> None:
    text = "<script>alert(1)</script>\x1b[2J\r\nSet-Cookie: a=b\u2028"
    with start() as server, server.http(ADMIN) as admin:
        reply = admin.post("/v1/documents", json={"documents": [{"id": "x", "text": text, "title": text}]})
        assert reply.status_code == 200, reply.text
        for path, body in (
            ("/v1/search", {"query": "alert script", "k": 3, "retriever": "bm25"}),
            ("/v1/ask", {"question": text, "k": 3, "retriever": "bm25", "max_tokens": 3}),
        ):
            reply = admin.post(path, json=body)
            assert reply.headers["content-type"] == "application/json"
            assert "set-cookie" not in reply.headers
            assert "<script>" in reply.json()["passages"][0]["text"]
        stream = admin.post(
            "/v1/ask", json={"question": text, "k": 3, "retriever": "bm25", "max_tokens": 3, "stream": True}
        )
        lines = stream.text.split("\n")
        # A line of a document is never a line of the stream.
        assert {line.partition(":")[0] for line in lines} == {"event", "data", ""}
        assert not [line for line in lines if line.startswith("Set-Cookie")]


# Slow clients


def test_clients_that_are_slow_or_silent_are_cut_off_and_hold_nobody_up(start: Start, impatient: None) -> None:
    del impatient
    head = request("POST", "/v1/ask", key=USER)
    whole = request("GET", "/healthz").replace(b"Connection: close\r\n", b"")
    body = request("POST", "/v1/ask", b" " * 1000, key=USER)
    unread = request("GET", "/healthz", headers=[b"Content-Length: 100000"]).replace(b"Connection: close\r\n", b"")
    with start() as server, contextlib.ExitStack() as stack:
        clients = {
            name: stack.enter_context(connected(server)) for name in ("silent", "head", "again", "body", "unread")
        }
        clients["again"].sendall(whole)
        read_through(clients["again"], b'{"status":"ok"}')
        clients["body"].sendall(body[:-900])
        clients["unread"].sendall(unread)  # a body that nobody wants to read
        read_through(clients["unread"], b'{"status":"ok"}')
        said: dict[str, bytes] = dict.fromkeys(clients, b"")
        ended: dict[str, float] = {}
        began = time.monotonic()
        for place in range(10_000):
            for name, client in clients.items():
                if name in ended:
                    continue
                client.setblocking(False)
                try:
                    if name != "silent":
                        client.send(b" " if name in ("body", "unread") else head[place : place + 1])
                    piece = client.recv(1 << 16)
                except BlockingIOError:
                    continue
                except ConnectionError:
                    piece = b""
                said[name] += piece
                if not piece:
                    ended[name] = time.monotonic() - began
            if len(ended) == len(clients):
                break
            time.sleep(0.05)
            assert place > 3 or good_reply(server)
            assert time.monotonic() - began < 60, (said, ended)
        assert status(said["body"]) == 408
        assert {name for name, text in said.items() if not text} == set(clients) - {"body"}
        wait_until(lambda: num_connections(server) == 0)
        assert server.service.is_idle


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_never_reads_its_reply_is_cut_off(start: Start, impatient: None, stream: bool) -> None:
    del impatient
    body = {
        "model": "toy",
        "prompt": "The oil",
        "max_tokens": 20_000 if stream else 400,
        "k": 0,
        "stream": stream,
        "logprobs": 20,
    }
    with start(max_tokens=20_000, max_context=40_000) as server, connected(server, buffer=4096) as client:
        sent = request("POST", "/v1/completions", json.dumps(body).encode(), key=USER)
        client.sendall(sent.replace(b"Connection: close\r\n", b""))
        wait_until(lambda: server.service.engine._running)
        wait_until(lambda: num_connections(server) == 0, 90)
        wait_until(lambda: server.service.is_idle and not server.service.engine._running)


def test_no_more_connections_are_taken_than_are_allowed(start: Start) -> None:
    with start(max_connections=3) as server:
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(connected(server))
            wait_until(lambda: num_connections(server) == 3)
            reply = exchanged(server, request("GET", "/healthz"))
            assert status(reply) == 503
            assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        wait_until(lambda: num_connections(server) == 0)
        assert good_reply(server)


# Filters


def test_masks_are_what_an_index_says_and_only_new_documents_are_looked_at(
    tiny_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x.index"
    shutil.copytree(tiny_index, folder)
    kept, looked_at = Masks(), 0
    texts = ['title like "%oil%"', "n >= 2", 'corpus = "squad" and not (title = "Chloroplast")', "n exists"]
    keep = Filter.keep

    def counted(self: Filter, table: Any) -> Any:
        nonlocal looked_at
        looked_at += len(table)
        return keep(self, table)

    def check() -> int:
        nonlocal looked_at
        now = Snapshot.open(folder)
        monkeypatch.undo()
        wanted = [now.rows_where(Filter.parse(text)) for text in texts]
        monkeypatch.setattr(Filter, "keep", counted)
        looked_at = 0
        for text, rows_N in zip(texts, wanted, strict=True):
            found_N = kept.rows(now, Filter.parse(text))
            np.testing.assert_array_equal(found_N, rows_N)
            assert kept.knows(Filter.parse(text))
        return looked_at

    monkeypatch.setattr(masks, "_STEP", 3)
    assert check() == 4 * 40
    assert check() == 0
    for number in range(3):
        path = tmp_path / "new.jsonl"
        path.write_text(json.dumps({"id": f"d{number}", "text": f"Document {number}", "n": number}))
        add_documents(folder, [str(path)])
        assert 4 <= check() <= 4 * (number + 1)  # small shards may have been joined
    remove_documents(folder, ["new:d0"])
    assert check() == 0
    compact_index(folder)
    assert check() > 0
    assert not kept.knows(Filter.parse("n = 5"))


def test_filters_in_use_are_bounded_by_what_they_take(tiny_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, kept = Snapshot.open(tiny_index), Masks()
    monkeypatch.setattr(masks, "MAX_BYTES", 5 * (now.store.num_documents + now.store.num_chunks))
    filters = [Filter.parse(f"n = {number}") for number in range(8)]
    for where in filters[:5]:
        kept.rows(now, where)
    kept.rows(now, filters[0])  # used once more
    for where in filters[5:]:
        kept.rows(now, where)
    assert [kept.knows(where) for where in filters] == [True, False, False, False, True, True, True, True]


def test_a_filter_that_takes_too_long_is_refused_while_others_search(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "_STEP", 1)
    monkeypatch.setattr(masks, "MIN_BUDGET_S", 0.01)
    monkeypatch.setattr(masks, "BUDGET_PER_DOCUMENT_S", 0.0)
    slow = "id in (" + ", ".join(f'"{n}"' for n in range(1200)) + ") or title exists"
    with start() as server, server.http() as client:
        assert client.post("/v1/search", json={"query": "oil", "where": "title exists"}).json()["passages"]
        for path, body in (
            ("/v1/search", {"query": "oil"}),
            ("/v1/ask", {"question": "oil"}),
            ("/v1/completions", {**GOOD, "k": 2}),
        ):
            reply = client.post(path, json={**body, "where": slow})
            assert reply.status_code == 400
            assert "takes longer than 0.01 s to be evaluated for 40 documents" in reply.json()["error"]["message"]


def test_a_filter_that_nobody_waits_for_any_more_is_given_up(tiny_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_STEP", 1)
    asked = 0

    def is_wanted() -> bool:
        nonlocal asked
        asked += 1
        return asked < 5

    kept = Masks()
    with pytest.raises(ConfigError):
        kept.rows(Snapshot.open(tiny_index), Filter.parse("n = 1"), is_wanted=is_wanted)
    assert asked == 5
    assert not kept.knows(Filter.parse("n = 1"))


# Memory


@pytest.mark.slow
def test_memory_stays_the_same_over_thousands_of_requests(model_folder: Path, tiny_index: Path, tmp_path: Path) -> None:
    environment = os.environ | {"RETRO_API_KEY": USER, "RETRO_ADMIN_KEY": ADMIN, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    index = Path(shutil.copytree(tiny_index, tmp_path / "tiny.index"))
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "retro",
                "serve",
                model_folder,
                "--index",
                index,
                "--port",
                "0",
                "--device",
                "cpu",
            ],
            env=environment,
            stderr=file,
        )
    try:
        wait_until(lambda: "Serving" in log.read_text(), 120)
        found = re.search(r"at (http://127\.0\.0\.1:\d+)", log.read_text())
        assert found is not None
        server = Running(found[1], None, index)  # type: ignore[arg-type]

        def memory() -> int:
            text = Path(f"/proc/{process.pid}/status").read_text()
            resident = re.search(r"VmRSS:\s+(\d+) kB", text)
            assert resident is not None
            return int(resident[1])

        def load(count: int, seed: int) -> None:
            bodies: list[tuple[str, dict[str, Any]]] = [
                ("/v1/search", {"query": "oil", "k": 3}),
                ("/v1/ask", {"question": "When did the crisis begin?", "k": 2, "max_tokens": 5}),
                ("/v1/completions", {**GOOD, "model": "toy.model", "stream": True}),
            ]

            def some(number: int) -> None:
                with httpx.Client(
                    base_url=server.url, headers={"Authorization": f"Bearer {USER}"}, timeout=60
                ) as client:
                    for place in range(count // 8):
                        path, body = bodies[(number + place) % 3]
                        assert client.post(path, json=body).status_code == 200

            with concurrent.futures.ThreadPoolExecutor(9) as pool:
                working = [pool.submit(some, number) for number in range(8)]
                for sent in hostile(count // 8, (USER, ADMIN), seed):
                    assert (status(exchanged(server, sent, ends=True)) or 0) < 500
                for one in working:
                    one.result()

        load(600, 1)
        before = memory()
        for seed in range(2, 6):
            load(600, seed)
        assert memory() < 1.05 * before
    finally:
        process.terminate()
        process.wait(timeout=30)
