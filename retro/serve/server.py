"""Runs the server: the port, signals, and an end that lets running requests finish."""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import uvicorn

from retro.errors import ConfigError
from retro.serve.app import make_app
from retro.serve.config import Keys, ServeConfig, check_exposure
from retro.serve.connections import Connection, check_all
from retro.serve.library import Library
from retro.serve.metrics import Metrics
from retro.serve.service import Model, Service

logger = logging.getLogger(__name__)
DRAIN_S = 0.5
"""How long a server that is being stopped still refuses new requests by 503, once nothing runs: whoever sends it requests learns
of it."""
OPEN_FILES = 1 << 16
"""That the process may have at once, where the system lets it."""


class Server(uvicorn.Server):
    """Ends in two steps: new requests are refused while running ones finish, then it closes. A second signal closes at once."""

    def __init__(self, service: Service) -> None:
        app = make_app(service)
        super().__init__(
            uvicorn.Config(
                app,
                root_path=service.config.root_path,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=5,
                timeout_keep_alive=15,
                proxy_headers=False,
                ws="none",
                http=Connection,
                limit_concurrency=service.config.max_connections + 1,  # uvicorn refuses the one that reaches it
            )
        )
        self._service = service
        self._stop_at: float | None = None
        self._idle_since: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal."""
        del frame
        if self._service.is_stopping:
            self.should_exit = self.force_exit = True
            return
        logger.info("%s: running requests are finished, new ones refused", signal.Signals(sig).name)
        self.stop()

    def stop(self) -> None:
        """Begins to end."""
        self._service.is_stopping = True
        self._stop_at = time.monotonic() + self._service.config.grace_s

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._stop_at is not None:
            now = time.monotonic()
            self._idle_since = (self._idle_since or now) if self._service.is_idle else None
            if now >= self._stop_at or (self._idle_since is not None and now - self._idle_since >= DRAIN_S):
                self.should_exit = True
        if counter % 10 == 0:
            check_all(self.server_state.connections, asyncio.get_running_loop().time())
        return await super().on_tick(counter)


def serve(
    model: Path,
    indexes: Mapping[str, Path],
    config: ServeConfig,
    keys: Keys,
    *,
    device: str = "cpu",
    on_start: Callable[[Server, int], None] | None = None,
) -> None:
    """Serves until it is told to stop.

    Args:
        model: Folder of the model.
        indexes: Names and folders of indexes; the first is searched, the others can be loaded in its place.
        config: See ServeConfig.
        keys: See Keys.
        device: Where model and encoder run.
        on_start: Told of the server and the port that it listens on.

    Raises:
        ConfigError: Others could ask without a key, or the port is taken.
        FormatError, MismatchError: The model or the index cannot be opened.
    """
    check_exposure(config, keys)
    _allow_files(config.max_connections)
    listener = _listen(config.host, config.port)
    with listener:
        metrics = Metrics()
        library = None
        if indexes:
            library = Library(indexes, metrics, device=device, where=config.where)
        service = Service(Model.open(model, device), library, config, keys, metrics)
        server = Server(service)
        port = listener.getsockname()[1]
        host = f"[{config.host}]" if ":" in config.host else config.host
        logger.info("Serving %s at http://%s:%d%s", config.model_name, host, port, config.root_path)
        if on_start is not None:
            on_start(server, port)
        asyncio.run(server.serve(sockets=[listener]))


def _allow_files(num_connections: int) -> None:
    """Raises this process's own limit of open files, as far as it may: every connection is one, and so is every memory map."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < num_connections:
        logger.warning(
            "Of %d connections only %d can be open at once: raise the limit of files", num_connections, allowed
        )


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port that is taken is known before anything is loaded."""
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"--host {host}: there is no such address ({error})") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{host}:{port} cannot be listened on ({error.strerror}): choose another --port") from error
    return listener
