"""Requests that mean harm, or come from broken programs: as bytes, for whatever listens."""

import json
import random
from collections.abc import Callable
from typing import Any

QUESTION = "When did the oil crisis begin?"
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/ask"): {"question": QUESTION, "k": 2, "max_tokens": 4, "where": 'title like "%oil%"'},
    ("POST", "/v1/search"): {"query": QUESTION, "k": 2, "retriever": "bm25", "where": "title exists"},
    ("POST", "/v1/completions"): {
        "model": "toy",
        "prompt": "The oil",
        "max_tokens": 4,
        "stop": ["x"],
        "n": 1,
        "seed": 1,
    },
    ("POST", "/v1/chat/completions"): {
        "model": "toy",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 4,
        "temperature": 0.5,
        "stream_options": {"include_usage": True},
    },
    ("POST", "/v1/documents"): {"documents": [{"id": "a", "text": "b"}], "corpus": "api", "update": True},
    ("DELETE", "/v1/documents"): {"keys": ["api:nothing"]},
    ("POST", "/v1/admin/reload"): {"index": "nothing"},
}
VALUES: list[Any] = [
    None, True, False, 0, -1, 1.5, 2**31, 2**63, -(2**63) - 1, 10**300, 1e308, float("nan"), float("inf"), -float("inf"), "",
    " ",
    "\x00", "\x1b[2J\r\nSet-Cookie: a=b", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\ud800", "\udfff\ud800",
    "\u202e\u2066\ufeff\ufffe", "../../etc/passwd", "%2e%2e%2f", "{{7*7}}${7*7}", "'; drop table documents; --", "__class__",
    "a" * 100_000, "\U0001f600" * 20_000, "\u0301" * 20_000, "oil " * 30_000, [], {}, [[]], [None], [{}], {"a": {}},
    {"__proto__": 1},
    ["stop"] * 5000, [0] * 50_000, ["x" * 1001], list(range(5000)), [[1] * 200] * 200, {str(n): n for n in range(5000)},
]  # fmt: skip
FILTERS = [
    "(" * 4000 + "a = 1" + ")" * 4000, "not " * 2400 + "a = 1", 'a = "' + "x" * 9000 + '"', "a = " + "9" * 9000, "a = 1e999999",
    " or ".join(["a = 1"] * 1200), "id in (" + ", ".join(f'"{n}"' for n in range(1200)) + ")",
    'title like "' + "%a" * 4000 + '"',
    'title like "' + "_" * 9000 + '"', "a." * 3000 + "b = 1", "`" + "a" * 9000 + "` exists", 'a = "\\', "\x00 = 1",
    "key = \ud800",
    'a = "' + "\\" * 8000 + '"',
]  # fmt: skip
PATHS = [
    "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd", "/%252e%252e/x", "/..\\..\\x",
    "/.git/config",
    "//etc/passwd", "///", "/%00", "/app.js%00.html", "/app.js/", "/style.css/../app.py", "/v1/models/../../x",
    "/v1/models/..%2f..",
    "/v1/models/%ff%fe", "/v1//ask", "/v1/ask/", "/V1/ASK", "/v1/ask;x=1", "/v1/ask?x=%ff", "/v1/models?" + "a=b&" * 2000,
    "/?" + "%" * 500,
    "/" + "a/" * 2000, "/" + "%e2%80%ae" * 500, "/openapi.json/x", "/page/index.html", "/metrics/../v1/models", "*",
    "http://evil.example/",
    "/v1/models/" + "x" * 5000, "/healthz#x", "/%", "/%zz", "/\u00e9".encode().decode("latin-1"),
]  # fmt: skip
METHODS = ["GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "CONNECT", "HEAD", "PROPFIND", "G" * 300, "get"]
HEADERS: list[list[bytes]] = [
    [b"X-Long: " + b"a" * 100_000], [b"X-%d: 1" % n for n in range(3000)], [b"X: a\x00b"], [b"X : 1"], [b"X: a", b" folded"],
    [b"Host: a", b"Host: b"], [b"Content-Length: 5", b"Content-Length: 6"], [b"Content-Length: -1"], [b"Content-Length: 1e9"],
    [b"Content-Length: 99999999999999999999"], [b"Transfer-Encoding: chunked", b"Content-Length: 4"],
    [b"Transfer-Encoding: gzip"],
    [b"Transfer-Encoding: chunked, chunked"], [b"Expect: 100-continue"], [b"Expect: nothing"], [b"Upgrade: websocket",
    b"Connection: upgrade"],
    [b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"],
    [b"Range: bytes=0-1,2-3,0-0"],
    [b"If-None-Match: " + b'"a",' * 3000], [b"Accept: " + b"*/*," * 3000], [b"Cookie: " + b"a=b; " * 2000], [b"Origin: null"],
    [b"X-Forwarded-Host: evil.example", b"X-Forwarded-Proto: gopher"], [b"X-HTTP-Method-Override: DELETE"],
    [b"Content-Type: \xff\xfe"],
    [b"Content-Type: application/json; charset=utf-16"], [b"Content-Type: multipart/form-data; boundary=x"],
    [b"Content-Encoding: gzip"], [b"Authorization: Bearer"], [b"Authorization: Bearer \xff\xfe\xfd"],
    [b"Authorization: Basic ====="],
    [b"Authorization: Bearer " + b"a" * 9000], [b"Authorization: " + b"Bearer " * 500], [b"Authorization:"],
]  # fmt: skip
RAW = [
    b"", b"\r\n" * 50, b"\x00" * 1000, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 500,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", b"GET  /  HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
    b"SSH-2.0-x\r\n", b"\xff" * 5000,
    b"GET " + b"/a" * 60_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", b"POST /v1/ask HTTP/1.1\nHost: a\n\n{}",
    b"GET / HTTP/1.1\rHost: a\r\r",
    b"POST /v1/ask HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/ask HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/ask HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2;" + b"x" * 90_000 + b"\r\n{}\r\n0\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" * 200,
    b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nGET / HTTP/1.1\r\n\r\n",
]  # fmt: skip


def request(
    method: str, path: str, body: bytes = b"", *, key: str | None = None, headers: list[bytes] | None = None
) -> bytes:
    """A request as it is sent; `headers` come first and may contradict the others."""
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1", "replace"), *(headers or [])]
    given = {line.partition(b":")[0].lower() for line in headers or []}
    if b"host" not in given:
        lines.append(b"Host: 127.0.0.1")
    if key is not None and b"authorization" not in given:
        lines.append(b"Authorization: Bearer " + key.encode())
    if b"content-type" not in given:
        lines.append(b"Content-Type: application/json")
    if not given & {b"content-length", b"transfer-encoding"}:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body


def hostile(count: int, keys: tuple[str, str], seed: int = 0) -> list[bytes]:
    """So many requests, the same for the same seed.

    Args:
        count: Of them.
        keys: A user's and an admin's, which most of them bring.
        seed: Of what is drawn.
    """
    draw = random.Random(seed)
    kinds: list[Callable[[random.Random, tuple[str, str]], bytes]] = [
        _value,
        _value,
        _value,
        _body,
        _path,
        _headers,
        _filter,
    ]
    return [draw.choice(RAW) if draw.random() < 0.1 else draw.choice(kinds)(draw, keys) for _ in range(count)]


def _target(draw: random.Random, keys: tuple[str, str]) -> tuple[str, str, Any, str]:
    method, path = draw.choice(list(BODIES))
    body = json.loads(json.dumps(BODIES[method, path]))
    return method, path, body, keys[path in ("/v1/documents", "/v1/admin/reload")]


def _value(draw: random.Random, keys: tuple[str, str]) -> bytes:
    """A good request but for one value, or with a field that nobody knows."""
    method, path, body, key = _target(draw, keys)
    place = body
    while True:
        name = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[name], dict | list) or not place[name] or draw.random() < 0.3:
            break
        place = place[name]
    if draw.random() < 0.1 and isinstance(place, dict):
        name = draw.choice(["", "\x00", "__init__", "a" * 5000, "logit_bias", "tools", "\ud800"])
    place[name] = draw.choice(VALUES)
    return request(method, path, json.dumps(body).encode(), key=key)


def _body(draw: random.Random, keys: tuple[str, str]) -> bytes:
    """A body that is no JSON, or not what it should be."""
    method, path, body, key = _target(draw, keys)
    good = json.dumps(body).encode()
    bad = draw.choice(
        [
            good[: draw.randrange(len(good))],
            draw.randbytes(draw.randrange(3000)),
            good.replace(b'"', b"'"),
            b"\xef\xbb\xbf" + good,
            good.decode().encode("utf-16"),
            good.replace(b"oil", b"\xff\xc0\xaf"),
            b"[" * 200_000,
            b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            b'{"k": ' + b"9" * 100_000 + b"}",
            b"[" + b"null," * 200_000 + b"null]",
            good + good,
            b"null",
            b'"text"',
            b"x" * 5_000_000,
            b'{"question": "' + b"\\u0000" * 100_000 + b'"}',
        ]
    )
    return request(method, path, bad, key=key)


def _path(draw: random.Random, keys: tuple[str, str]) -> bytes:
    return request(draw.choice(METHODS), draw.choice(PATHS), draw.choice([b"", b"{}"]), key=draw.choice([*keys, None]))


def _headers(draw: random.Random, keys: tuple[str, str]) -> bytes:
    method, path, body, key = _target(draw, keys)
    return request(method, path, json.dumps(body).encode(), key=key, headers=draw.choice(HEADERS))


def _filter(draw: random.Random, keys: tuple[str, str]) -> bytes:
    path = draw.choice(["/v1/ask", "/v1/search", "/v1/completions"])
    body = BODIES["POST", path] | {"where": draw.choice(FILTERS), "k": draw.choice([1, 50])}
    return request("POST", path, json.dumps(body).encode(), key=keys[0])
