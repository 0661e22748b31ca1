"""The stages of a build as Ray tasks over a folder that all nodes share. The only importer of ray.

Every task makes one file or a few, under names that follow from the corpus alone, and puts them in place in one atomic step. So it
does not matter which node makes them, whether a node dies in the middle and its tasks run again elsewhere, or whether the driver is
killed and started again: what is there is not made again, and the bytes are those of a build on one machine of the same kind.
"""

import functools
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from index_builder import index as vector_index
from index_builder.build import (
    READ_COUNTS,
    config_of,
    encode_shard,
    finish_index,
    make_recipe,
    open_encoder,
    open_vectors,
    read_stage,
)
from index_builder.config import BuildConfig
from index_builder.corpus import describe_corpora
from index_builder.encoder import Encoder
from index_builder.index import plan_index
from index_builder.shards import Progress
from retro.artifact import MANIFEST, begin, read_json, write_json, writing
from retro.chunks import ChunkStore, shard_path
from retro.errors import ConfigError, DependencyError, RetroError
from retro.tokenizer import Tokenizer

RETRIES = 8
"""Times that a task is started again after its node died."""


def build_on_cluster(
    corpora: Sequence[str],
    out: str | Path,
    config: BuildConfig | None = None,
    *,
    address: str = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Turns corpora into a searchable index on a Ray cluster.

    Args:
        corpora: As for `build_index`; the paths must be readable on every node.
        out: Folder of the index, on a file system that all nodes share.
        config: See BuildConfig.
        address: `auto` for the cluster this machine is part of, or `HOST:PORT`, or `ray://HOST:PORT`.
        device: Where each task computes: `cpu` (a core each) or `cuda` (a GPU each).
        overwrite: Start again where something else was begun or made.
        progress: Told how far it is.

    Returns:
        The manifest.

    Raises:
        ConfigError: No cluster answers at the address; or as for `build_index`.
        CorpusError, StorageError: As for `build_index`.
    """
    config = config or BuildConfig()
    folder = Path(out).absolute()
    corpora = [_absolute(corpus) for corpus in corpora]
    encoder = open_encoder(config, "cpu" if device == "cpu" else "cuda")
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else encoder.tokenizer()
    recipe = make_recipe(config, describe_corpora(corpora), encoder, tokenizer)
    with writing(folder):
        if not begin(folder, "index", recipe, overwrite=overwrite):
            tokenizer.save(folder)
            with _Cluster(address, device) as cluster:
                _run(cluster, corpora, folder, recipe, encoder, progress)
    made: dict[str, Any] = read_json(folder / MANIFEST)
    return made


def _run(
    cluster: "_Cluster",
    corpora: Sequence[str],
    folder: Path,
    recipe: dict[str, Any],
    encoder: Encoder,
    progress: Progress | None,
) -> None:
    config = config_of(recipe)
    if not (folder / READ_COUNTS).is_file():
        n = cluster.num_nodes()
        counts = cluster.run(
            _read, [(corpora, folder, config, (i, n)) for i in range(n)], lambda done: _tell(progress, "read", done, n)
        )
        write_json(folder / READ_COUNTS, counts[0])
    store = ChunkStore(folder)
    shards = len(store.shards)
    truncated = cluster.run(
        _encode,
        [(folder, store.shards, number, config) for number in range(shards)],
        lambda done: _tell(progress, "encode shards", done, shards),
        computes=True,
    )
    vectors = open_vectors(folder, store.shards)
    plan = plan_index(len(vectors), vectors.dim, config.index_type, max_memory=config.max_memory, recall=config.recall)
    below = folder / "index"
    if plan.factory != "Flat" and not (below / "00000.faiss").is_file():
        if not (below / vector_index.TRAINED).is_file():
            cluster.run(_train, [(folder, store.shards, config, encoder.normalized)], lambda done: None)
        firsts = range(0, len(vectors), plan.part_rows)
        parts = [
            (folder, store.shards, first, min(first + plan.part_rows, len(vectors)), number)
            for number, first in enumerate(firsts)
        ]
        cluster.run(_add, parts, lambda done: _tell(progress, "index parts", done, len(parts)))
    finish_index(
        folder, recipe, config, encoder.description(), truncated=sum(truncated), device="cpu", progress=progress
    )


def _tell(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)


# --- the tasks: what a worker process runs --------------------------------------------------------------------------


def _read(corpora: Sequence[str], folder: Path, config: BuildConfig, part: tuple[int, int]) -> dict[str, int]:
    return read_stage(corpora, folder, Tokenizer.load(str(folder)), config, part=part, list_rejects=part[0] == 0)


def _encode(folder: Path, shards: Sequence[str], number: int, config: BuildConfig, device: str = "cpu") -> int:
    return encode_shard(ChunkStore(folder, [shards[number]]), 0, _encoder_of_this_process(config, device), config)


@functools.lru_cache(maxsize=1)
def _encoder_of_this_process(config: BuildConfig, device: str) -> Encoder:
    return open_encoder(config, device)


def _train(folder: Path, shards: Sequence[str], config: BuildConfig, normalized: bool) -> None:
    vectors = open_vectors(folder, shards)
    plan = plan_index(len(vectors), vectors.dim, config.index_type, max_memory=config.max_memory, recall=config.recall)
    path = folder / "index" / vector_index.TRAINED
    vector_index.train(path, vectors, plan, normalized=normalized, seed=config.seed)


def _add(folder: Path, shards: Sequence[str], first: int, end: int, number: int) -> None:
    path = shard_path(folder / "index", f"part-{number:05d}", ".faiss")
    if not path.is_file():
        trained = folder / "index" / vector_index.TRAINED
        vector_index.add_part(trained, open_vectors(folder, shards), first, end, path)


# --- Ray ------------------------------------------------------------------------------------------------------------


class _Cluster:
    """A connection to a Ray cluster, closed at the end."""

    def __init__(self, address: str, device: str) -> None:
        self._address = address
        self._device = device

    def __enter__(self) -> "_Cluster":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise DependencyError("ray is missing: install retro-lm[cluster] on every node") from error
        self._ray: Any = ray
        self._own = not ray.is_initialized()
        if self._own:
            try:
                _knock(self._address)
                ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
            except Exception as error:  # ray raises nearly everything
                reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
                raise ConfigError(
                    f"no Ray cluster answers at {self._address!r} ({reason}): start one with `ray start --head`, or give the "
                    "address that it printed"
                ) from error
        return self

    def __exit__(self, *exception: object) -> None:
        if self._own:
            self._ray.shutdown()

    def num_nodes(self) -> int:
        """Nodes that are alive."""
        return max(1, sum(bool(node["Alive"]) for node in self._ray.nodes()))

    def run(
        self,
        function: Callable[..., Any],
        calls: Sequence[tuple[Any, ...]],
        told: Callable[[int], None],
        *,
        computes: bool = False,
    ) -> list[Any]:
        """Runs a function once for each tuple of arguments, anywhere, again where a node dies; returns the results in order.

        Raises:
            RetroError: What a task raised.
        """
        on_gpu = computes and self._device != "cpu"
        options: dict[str, Any] = {"max_retries": RETRIES, "num_cpus": 1} | ({"num_gpus": 1} if on_gpu else {})
        task = self._ray.remote(**options)(function)
        extra = {"device": self._device} if on_gpu else {}
        references = [task.remote(*call, **extra) for call in calls]
        pending = list(references)
        try:
            while pending:
                finished, pending = self._ray.wait(pending, num_returns=1)
                self._ray.get(finished)
                told(len(references) - len(pending))
            return list(self._ray.get(references))
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RetroError):
                raise error.cause from None
            raise
        finally:
            for reference in pending:
                self._ray.cancel(reference, force=True)


def _knock(address: str) -> None:
    """Raises OSError where nothing answers: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _absolute(corpus: str) -> str:
    """Workers have another working directory."""
    name, given, path = corpus.rpartition("=")
    if corpus.startswith("hf:") or path.startswith("hf:"):
        return corpus
    return corpus if Path(path).is_absolute() else f"{name}{given}{Path(path).absolute()}"
