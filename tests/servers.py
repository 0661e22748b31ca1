"""Servers for tests: real ones on free ports, in threads of this process."""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from builders import speak_up, toy_model_config

from retro.checkpoint import save_model
from retro.model import Retro
from retro.serve.config import Keys, ServeConfig
from retro.serve.server import Server, serve
from retro.tokenizer import Tokenizer

USER, OTHER, ADMIN = "user-key-0123456789", "other-key-0123456789", "admin-key-0123456789"


@dataclass(frozen=True)
class Running:
    """A server that runs in a thread of this process."""

    url: str
    server: Server
    index: Path
    clients: dict[str, openai.OpenAI] = field(default_factory=dict)

    @property
    def service(self) -> Any:
        return self.server._service

    def openai(self, key: str = USER) -> openai.OpenAI:
        if key not in self.clients:
            self.clients[key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
        return self.clients[key]

    def http(self, key: str | None = USER) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


def talkative_model(folder: Path, tokenizer_folder: Path) -> Path:
    """Random weights, large enough that passages change what is said; it never says EOS."""
    tokenizer = Tokenizer.load(str(tokenizer_folder))
    model = Retro(
        toy_model_config(vocab_size=tokenizer.vocab_size, dim=32, num_layers=3, cca_layers=(2, 3), tie_embeddings=False)
    )
    speak_up(model, std=1.5)
    with torch.no_grad():
        assert model.head is not None
        model.head.weight[tokenizer.eos_id] = 0.0
    save_model(folder, model, tokenizer)
    return folder


Start = Callable[..., contextlib.AbstractContextManager[Running]]


def starting(model_folder: Path, tiny_index: Path, make_folder: Callable[[], Path]) -> Start:
    """Makes what starts a server of its own for a test, with a copy of the index that may be changed."""

    @contextlib.contextmanager
    def started(
        *,
        keys: bool = True,
        others: dict[str, Path] | None = None,
        index: bool = True,
        model: Path = model_folder,
        **settings: Any,
    ) -> Iterator[Running]:
        folder = make_folder()
        copied = folder / "wiki.index"
        shutil.copytree(tiny_index, copied)
        (folder / "keys").write_text(f'# users\n{USER}\n{OTHER} title = "1973_oil_crisis"\n'.replace("_", " "))
        (folder / "admin").write_text(ADMIN + "\n")
        read = Keys.read(key_file=folder / "keys", admin_file=folder / "admin") if keys else Keys.read()
        began: list[tuple[Server, int]] = []
        ready = threading.Event()

        def on_start(server: Server, port: int) -> None:
            began.append((server, port))
            ready.set()

        failed: list[BaseException] = []

        def run() -> None:
            try:
                indexes = ({"wiki": copied} | (others or {})) if index else {}
                values: dict[str, Any] = {"port": 0, "model_name": "toy", **settings}
                config = ServeConfig(**values)
                serve(model, indexes, config, read, on_start=on_start)
            except BaseException as error:
                failed.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        ready.wait()
        if failed:
            raise failed[0]
        server, port = began[0]
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: server.started or not thread.is_alive())
        one = Running(url, server, copied)
        try:
            yield one
        finally:
            for client in one.clients.values():
                client.close()
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()
            assert failed == []

    return started


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
