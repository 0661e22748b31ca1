"""A running server under load: many clients against one, searches beside decoding, changes of the index, filters, memory.

    python benchmarks/serve_load.py --index part.index                       # everything; the index is copied, not changed
    python benchmarks/serve_load.py --index part.index --only answers,search --clients 64 --json
    python benchmarks/serve_load.py --index simple.index --only filters      # 197,146 documents
    python benchmarks/serve_load.py --index part.index --only memory --requests 10000

The model has the sizes of `tiny` with random weights, or is the one given. The server is another process on this machine, and so
its clients take a share of it: they are bare sockets in one thread. `cpu_ratio` compares what the server took of the cores, for
machines that others use, too. Memory is the resident set of its process, with the maps of files and without. On Linux only.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

KEY, ADMIN = "user-key-0123456789", "admin-key-0123456789"
TIE = 1e-4
"""Where the two best logits are nearer than that, a batch may choose the other one."""
PARTS = ("answers", "search", "changes", "filters", "memory")


class Server:
    """A server process and what its clients do."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self._process, self._port = process, port

    async def post(self, path: str, body: Any, *, method: str = "POST", key: str = KEY) -> tuple[int, Any]:
        """Status and content of a reply; the whole of a stream as bytes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            content = json.dumps(body).encode()
            head = (
                f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            )
            writer.write(head.encode() + content)
            await writer.drain()
            head_bytes, _, received = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        is_json = b"application/json" in head_bytes
        return int(head_bytes[9:12] or 0), json.loads(received) if is_json else received

    def resident_mib(self) -> tuple[float, float]:
        """Resident set of the process, and the part of it that is no file's, in MiB."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        total, own = (int(re.findall(rf"{name}:\s+(\d+) kB", text)[0]) / 1024 for name in ("VmRSS", "RssAnon"))
        return total, own

    def cpu_s(self) -> float:
        """Time of cores that the process has taken."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def make_model(folder: Path) -> Path:
    """A model of the sizes of `tiny`, with random weights and a vocabulary of the bundled corpus."""
    import torch

    from retro.checkpoint import save_model
    from retro.config import PRESETS
    from retro.demo import CORPUS, examples_folder
    from retro.model import Retro
    from retro.tokenizer import Tokenizer

    with lzma.open(examples_folder() / CORPUS, "rt", encoding="utf-8") as file:
        tokenizer = Tokenizer.train((json.loads(line)["text"] for line in file), 8192)
    config = dataclasses.replace(PRESETS["tiny"].model, vocab_size=tokenizer.vocab_size)
    save_model(folder, Retro(config).initialize(torch.Generator().manual_seed(0)), tokenizer)
    return folder


@contextlib.contextmanager
def serving(model: Path, index: Path, log: Path) -> Iterator[Server]:
    """Inside it, a server runs."""
    environment = os.environ | {"RETRO_API_KEY": KEY, "RETRO_ADMIN_KEY": ADMIN}
    command = [sys.executable, "-m", "retro", "serve", str(model), "--index", f"served={index}", "--port", "0"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--served-model-name", "m", "--device", "cpu"], env=environment, stderr=file
        )
    try:
        while (found := re.search(r"at http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        yield Server(process, int(found[1]))
    finally:
        process.terminate()
        process.wait(timeout=60)


def questions() -> list[str]:
    from retro.demo import QUESTIONS, examples_folder

    with lzma.open(examples_folder() / QUESTIONS, "rt", encoding="utf-8") as file:
        return [str(json.loads(line)["question"]) for line in file]


async def timed(work: Awaitable[Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = await work
    return time.perf_counter() - began, result


def completion(prompt: str, tokens: int, k: int) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "k": k, "logprobs": 2}


# --- what is measured -----------------------------------------------------------------------------------------------


async def answers(server: Server, clients: int, tokens: int) -> dict[str, Any]:
    """All at once against one after the other: the same tokens, and how many a second."""
    asked = questions()
    report: dict[str, Any] = {}
    for k in (0, 2):
        bodies = [completion(asked[number], tokens, k) for number in range(clients)]
        await server.post("/v1/completions", bodies[0])
        start_cpu = server.cpu_s()
        alone_s, alone = await timed(_one_by_one(server, bodies))
        alone_cpu = server.cpu_s()
        together_s, together = await timed(asyncio.gather(*(server.post("/v1/completions", body) for body in bodies)))
        together_cpu = server.cpu_s()
        failed = sum(status != 200 for status, _ in [*alone, *together])
        kinds = [_compared(one[1], other[1]) for one, other in zip(alone, together, strict=True)] if not failed else []
        made = sum(reply["usage"]["completion_tokens"] for _, reply in alone) if not failed else 0
        report[f"k{k}"] = {
            "failed": failed,
            "equal": kinds.count("equal"),
            "equal_but_for_ties": kinds.count("tie"),
            "different": kinds.count("different"),
            "tokens_per_s_alone": made / alone_s,
            "tokens_per_s_together": made / together_s,
            "ratio": alone_s / together_s,
            "cpu_ratio": (alone_cpu - start_cpu) / (together_cpu - alone_cpu),
        }
    return report


async def _one_by_one(server: Server, bodies: list[dict[str, Any]]) -> list[tuple[int, Any]]:
    return [await server.post("/v1/completions", body) for body in bodies]


def _compared(one: Any, other: Any) -> str:
    """equal; tie: up to a place where the two best are as good as one another, alone or together; different."""
    first, second = (reply["choices"][0]["logprobs"] for reply in (one, other))
    for place, (a, b) in enumerate(zip(first["tokens"], second["tokens"], strict=False)):
        if a != b:
            gaps = [np.ptp(sorted(side["top_logprobs"][place].values())[-2:]) for side in (first, second)]
            return "tie" if min(gaps) < TIE else "different"
    return "equal" if one["choices"][0]["text"] == other["choices"][0]["text"] else "different"


@contextlib.asynccontextmanager
async def decoding(server: Server, clients: int, failures: list[str]) -> Any:
    """Inside it, so many clients have answers decoded, one after the other."""
    asked = questions()

    async def client(number: int) -> None:
        while True:
            body = completion(asked[number % len(asked)], 64, 2)
            status, reply = await server.post("/v1/completions", body)
            if status != 200:
                failures.append(str(reply))
            number += clients

    working = [asyncio.create_task(client(number)) for number in range(clients)]
    await asyncio.sleep(3)
    try:
        yield
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)


async def _searches(server: Server, count: int, failures: list[str]) -> np.ndarray[Any, Any]:
    seconds, asked = [], questions()
    for number in range(count):
        took, (status, reply) = await timed(server.post("/v1/search", {"query": asked[-number - 1], "k": 10}))
        seconds.append(took)
        if status != 200 or len(reply["passages"]) != 10:
            failures.append(str(reply))
    return 1000 * np.array(seconds)


async def search(server: Server, clients: int, count: int) -> dict[str, Any]:
    """Searches, one at a time, while nothing else runs and while all others decode."""
    failures: list[str] = []
    await _searches(server, 20, failures)
    alone = await _searches(server, count, failures)
    async with decoding(server, clients - 1, failures):
        busy = await _searches(server, count, failures)
    return {
        "failed": len(failures),
        "median_ms_alone": float(np.median(alone)),
        "median_ms_under_load": float(np.median(busy)),
        "p95_ms_under_load": float(np.quantile(busy, 0.95)),
        "ratio": float(np.quantile(busy, 0.95) / np.median(alone)),
    }


async def changes(server: Server, clients: int, rounds: int) -> dict[str, Any]:
    """Documents added, altered and removed, and the index reloaded, while others decode and search."""
    failures: list[str] = []
    stale = 0
    seconds: dict[str, list[float]] = {"add": [], "update": [], "remove": [], "reload": []}

    async def change(kind: str, path: str, body: Any, method: str = "POST") -> None:
        took, (status, reply) = await timed(server.post(path, body, method=method, key=ADMIN))
        seconds[kind].append(took)
        if status != 200:
            failures.append(f"{kind}: {reply}")

    async def found(query: str) -> Any:
        status, reply = await server.post("/v1/search", {"query": query, "k": 1})
        if status != 200:
            failures.append(str(reply))
            return {"key": "", "text": ""}
        return reply["passages"][0]

    async def searcher() -> None:
        while True:
            await _searches(server, 1, failures)

    async with decoding(server, clients - 1, failures):
        searching = asyncio.create_task(searcher())
        for number in range(rounds):
            text = f"The zanthorium lamp number {number} of Vexholm was lit in {1900 + number} by Ottilie Brandt."
            document = {"id": f"lamp{number}", "text": text}
            await change("add", "/v1/documents", {"documents": [document]})
            stale += (await found(text))["key"] != f"api:lamp{number}"
            other = text.replace("lit", "put out")
            await change("update", "/v1/documents", {"documents": [document | {"text": other}], "update": True})
            stale += (await found(other))["text"] != other
            await change("reload", "/v1/admin/reload", {})
            stale += (await found(other))["text"] != other
            await change("remove", "/v1/documents", {"keys": [f"api:lamp{number}"]}, "DELETE")
            stale += (await found(other))["key"] == f"api:lamp{number}"
        searching.cancel()
        await asyncio.gather(searching, return_exceptions=True)
    medians = {f"{kind}_s": float(np.median(took)) for kind, took in seconds.items()}
    return {"failed": len(failures), "first_failure": failures[:1], "stale": stale} | medians


async def filters(server: Server, count: int) -> dict[str, Any]:
    """Filters that are new to the server, one after the other, and searches without one beside them."""
    failures: list[str] = []
    await _searches(server, 20, failures)
    alone = await _searches(server, count, failures)
    new: list[float] = []
    known: list[float] = []

    async def filtered(where: str) -> tuple[float, tuple[int, Any]]:
        return await timed(server.post("/v1/search", {"query": "oil", "k": 10, "where": where}))

    async def client() -> None:
        for number in range(8):
            where = f'title like "{chr(ord("A") + number)}%" or year >= {1990 + number}'
            for times in (new, known):
                took, (status, reply) = await filtered(where)
                times.append(took)
                if status != 200:
                    failures.append(str(reply))

    asking = asyncio.create_task(client())
    beside = []
    while not asking.done():
        beside.append(await _searches(server, 1, failures))
    await asking
    values = ", ".join(f'"{number}"' for number in range(1200))
    took, (status, _) = await filtered(f"id in ({values})")
    beside_ms = np.concatenate(beside)
    return {
        "failed": len(failures),
        "median_ms_alone": float(np.median(alone)),
        "median_ms_beside": float(np.median(beside_ms)),
        "p95_ms_beside": float(np.quantile(beside_ms, 0.95)),
        "new_filter_s": float(np.median(new)),
        "known_filter_s": float(np.median(known)),
        "expensive_filter_s": took,
        "expensive_filter_status": status,
    }


async def memory(server: Server, requests: int) -> dict[str, Any]:
    """Resident set after a tenth of the requests, and after all of them."""
    asked, statuses = questions(), dict[int, int]()
    kinds: list[Callable[[int], tuple[str, Any]]] = [
        lambda n: ("/v1/search", {"query": asked[n % len(asked)], "k": 10}),
        lambda n: ("/v1/ask", {"question": asked[n % len(asked)], "k": 3, "max_tokens": 4}),
        lambda n: ("/v1/completions", completion(asked[n % len(asked)], 8, 2)),
        lambda n: ("/v1/completions", completion(asked[n % len(asked)], 8, 0) | {"stream": True}),
        lambda n: ("/v1/search", {"query": "oil", "k": 5, "where": f"n = {n % 50}"}),
        lambda n: ("/v1/search", {"query": "x" * 11_000}),
        lambda n: ("/v1/completions", {"model": "m", "prompt": [n] * 100_000}),
        lambda n: ("/nothing", [n]),
    ]

    async def send(first: int, count: int) -> None:
        numbers = iter(range(first, first + count))

        async def client() -> None:
            for number in numbers:
                path, body = kinds[number % len(kinds)](number)
                status, _ = await server.post(path, body)
                statuses[status] = statuses.get(status, 0) + 1

        await asyncio.gather(*(client() for _ in range(16)))

    warm = max(requests // 10, 100)
    await send(0, warm)
    before = server.resident_mib()
    seconds, course = 0.0, []
    for part in range(10):
        took, _ = await timed(send(warm + part * requests // 10, (part + 1) * requests // 10 - part * requests // 10))
        seconds += took
        course.append(round(server.resident_mib()[1]))
    after = server.resident_mib()
    return {
        "failed": sum(count for status, count in statuses.items() if status >= 500 or status == 0),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "resident_mib_before": before[0],
        "resident_mib_after": after[0],
        "ratio": after[0] / before[0],
        "own_mib_before": before[1],
        "own_mib_after": after[1],
        "own_ratio": after[1] / before[1],
        "own_mib_after_each_tenth": course,
        "requests_per_s": requests / seconds,
    }


# --- the report -----------------------------------------------------------------------------------------------------

WANTED: dict[tuple[str, ...], tuple[str, Callable[[Any], bool]]] = {
    ("answers", "k0", "ratio"): ("at least 4", lambda value: value >= 4),
    ("answers", "k2", "ratio"): ("at least 4", lambda value: value >= 4),
    ("answers", "k0", "different"): ("0", lambda value: value == 0),
    ("answers", "k2", "different"): ("0", lambda value: value == 0),
    ("search", "ratio"): ("at most 5", lambda value: value <= 5),
    ("changes", "stale"): ("0", lambda value: value == 0),
    ("memory", "ratio"): ("at most 1.05", lambda value: value <= 1.05),
    ("memory", "own_ratio"): ("at most 1.05", lambda value: value <= 1.05),
}


def table(report: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    for name, value in report.items():
        place = (*path, name)
        if isinstance(value, dict) and name != "statuses":
            yield from table(value, place)
            continue
        wanted = WANTED.get(place, ("0", lambda value: value == 0) if name == "failed" else None)
        shown = f"{value:,.3f}" if isinstance(value, float) else str(value)
        verdict = "" if wanted is None else f"wanted {wanted[0]}: {'yes' if wanted[1](value) else 'NO'}"
        yield f"{' '.join(place):42}{shown:>16}  {verdict}".rstrip()


async def measured(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    works: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {
        "answers": lambda: answers(server, arguments.clients, arguments.tokens),
        "search": lambda: search(server, arguments.clients, arguments.searches),
        "changes": lambda: changes(server, arguments.clients, arguments.rounds),
        "filters": lambda: filters(server, arguments.searches),
        "memory": lambda: memory(server, arguments.requests),
    }
    for name in arguments.only.split(","):
        report[name] = await works[name]()
        print(f"{name} done", file=sys.stderr)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="default: the sizes of `tiny`, random weights")
    parser.add_argument("--only", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--searches", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5, help="of changes")
    parser.add_argument("--requests", type=int, default=10_000, help="between the two looks at the memory")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not set(arguments.only.split(",")) <= set(PARTS):
        parser.error(f"--only {arguments.only}: give some of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = Path(shutil.copytree(arguments.index, folder / "served.index"))
        model = arguments.model or make_model(folder / "tiny.model")
        with serving(model, index, folder / "log") as server:
            report = asyncio.run(measured(server, arguments))
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(table(report)))


if __name__ == "__main__":
    main()
