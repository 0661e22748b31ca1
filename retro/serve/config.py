"""How a server is run: where it listens, who may ask, and how much."""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from index_builder.filters import Filter
from index_builder.search import Method
from retro.errors import ConfigError

MIN_KEY_CHARS = 16
"""Of a key: what is shorter can be guessed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of a server; limits hold for each request."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    root_path: str = ""
    """Prefix under which a proxy shows the server, as in /retro."""
    allowed_origins: tuple[str, ...] = ()
    """Other web sites whose pages may ask, as in https://example.org."""
    model_name: str = "retro"
    retriever: Method = "auto"
    """Where a request does not say."""
    where: str | None = None
    """What every search is confined to."""
    num_passages: int = 10
    """K of questions and chats where a request does not say."""
    max_concurrency: int = 64
    """Sequences that are decoded together."""
    max_queue: int = 256
    """Sequences, and likewise searches, that may wait; beyond it requests are refused with 429."""
    max_connections: int = 1000
    """Of clients at once; those that are slow or silent are ended, see `retro.serve.connections`."""
    timeout_s: float = 120.0
    """From a request's arrival to its last byte."""
    grace_s: float = 30.0
    """How long requests that run may take to end when the server is stopped."""
    max_body_bytes: int = 4 << 20
    max_context: int = 4096
    """Tokens of a prompt and its continuation."""
    max_tokens: int = 1024
    """Tokens of a continuation."""
    max_passages: int = 50
    """Largest k."""
    max_choices: int = 16
    """Largest n."""
    max_documents: int = 100
    """Documents in one call."""
    log_prompts: bool = False

    def __post_init__(self) -> None:
        positive = ("max_concurrency", "max_connections", "max_body_bytes", "max_context", "max_tokens", "max_choices")
        for name in (*positive, "max_documents"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: give at least 1")
        for name in ("max_queue", "max_passages", "num_passages", "port"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: give at least 0")
        if self.port > 65535:
            raise ConfigError(f"port = {self.port}: give a number up to 65535")
        if self.timeout_s <= 0 or self.grace_s < 0:
            raise ConfigError(
                f"timeout_s = {self.timeout_s}, grace_s = {self.grace_s}: give seconds, above 0 and at least 0"
            )
        if self.num_passages > self.max_passages:
            raise ConfigError(f"k = {self.num_passages} is more than the {self.max_passages} passages that are allowed")
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path = {self.root_path!r}: it begins with a slash, as in /retro")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by one of its own names."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Key:
    """Who asks."""

    digest: bytes = b""
    """SHA-256 of the key, so that comparing takes the same time whatever its length."""
    where: Filter | None = None
    """What all searches with this key are confined to."""
    is_admin: bool = False


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that a server knows."""

    users: tuple[Key, ...] = ()
    """None: everybody may ask."""
    admins: tuple[Key, ...] = ()
    """None: nobody may change the index."""
    anybody: Key = field(default_factory=Key)

    @classmethod
    def read(
        cls,
        *,
        key_file: Path | None = None,
        key: str | None = None,
        admin_file: Path | None = None,
        admin_key: str | None = None,
    ) -> "Keys":
        """Reads keys from files, or takes those that are given.

        A file has a key on each line, and behind it, after a space, what its searches are confined to, as in
        `5dca4b8d1f0e4c7a lang = "en"`. Empty lines and those that begin with # are left out.

        Raises:
            ConfigError: A file cannot be read or holds no key, a key is too short, occurs twice or has other characters than
                printable ASCII, or a filter is malformed.
        """
        users = _keys(key_file, key, is_admin=False)
        admins = _keys(admin_file, admin_key, is_admin=True)
        digests = [entry.digest for entry in (*users, *admins)]
        if len(set(digests)) < len(digests):
            raise ConfigError("a key occurs twice: give everybody a key of their own, and the admin another one")
        if any(entry.where is not None for entry in admins):
            raise ConfigError(
                "an admin key has a filter: whoever changes the index sees all of it; give it a user's key instead"
            )
        return cls(users, admins)

    def find(self, given: str | None) -> Key | None:
        """Whose key this is; None where a key is needed and this is none."""
        found = None
        digest = hashlib.sha256((given or "").encode("utf-8", "surrogateescape")).digest()
        for entry in (*self.users, *self.admins):  # always all of them
            if hmac.compare_digest(entry.digest, digest):
                found = entry
        if found is None and not self.users and given is None:
            return self.anybody
        return found


def check_exposure(config: ServeConfig, keys: Keys) -> None:
    """Raises ConfigError where others than this machine could ask without a key."""
    if not config.is_loopback and not keys.users:
        raise ConfigError(
            f"--host {config.host} can be reached from other machines, and there is no key: give one with --api-key-file or "
            "RETRO_API_KEY, or listen on 127.0.0.1 only"
        )


def named_indexes(given: Sequence[str]) -> dict[str, Path]:
    """Names and folders of indexes that are written as PATH or NAME=PATH; the name of a path is its last part.

    Raises:
        ConfigError: Two have the same name.
    """
    indexes: dict[str, Path] = {}
    for text in given:
        name, sign, location = text.partition("=")
        path = Path(location if sign and not Path(text).exists() else text)
        if path == Path(text):
            name = path.resolve().name
        if name in indexes:
            raise ConfigError(f"two indexes are called {name!r}: name one with NAME=PATH")
        indexes[name] = path
    return indexes


def _keys(path: Path | None, given: str | None, *, is_admin: bool) -> tuple[Key, ...]:
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: the keys cannot be read ({error})") from error
        keys = tuple(_parsed(lines, str(path), is_admin))
        if not keys:
            raise ConfigError(f"{path} holds no key: write one on a line, as `openssl rand -hex 24` makes them")
        return keys
    return tuple(_parsed([given], "the key in the environment", is_admin)) if given else ()


def _parsed(lines: Sequence[str], where: str, is_admin: bool) -> Iterable[Key]:
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        key, _, condition = text.partition(" ")
        place = f"{where}:{number}" if len(lines) > 1 else where
        if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable():
            raise ConfigError(
                f"{place}: a key has at least {MIN_KEY_CHARS} characters, all of them printable ASCII, as "
                "`openssl rand -hex 24` makes them"
            )
        try:
            confined = Filter.parse(condition) if condition.strip() else None
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        yield Key(hashlib.sha256(key.encode()).digest(), confined, is_admin)
