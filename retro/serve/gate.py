"""How much may be under way at once, and what is said to those who are too many."""

import contextlib
from collections.abc import Iterator

from retro.errors import ConfigError, RetroError


class BusyError(RetroError):
    """Too much is waiting already."""


class StoppingError(RetroError):
    """The server is being stopped."""


class Gate:
    """Counts what is under way; used by the event loop's thread only."""

    def __init__(self, limit: int, what: str) -> None:
        self._limit, self._what = limit, what
        self.inside = 0

    @contextlib.contextmanager
    def admit(self, count: int = 1) -> Iterator[None]:
        """Inside it, `count` more are under way.

        Raises:
            BusyError: They are too many at present.
            ConfigError: They are too many at any time.
        """
        if count > self._limit:
            raise ConfigError(f"{count} {self._what} are asked for at once: at most {self._limit} can be under way")
        if self.inside + count > self._limit:
            raise BusyError(f"{self.inside} {self._what} are under way or wait, {self._limit} may be: try again later")
        self.inside += count
        try:
            yield
        finally:
            self.inside -= count
