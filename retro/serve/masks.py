"""Which rows of an index fulfil a filter: evaluated once, within bounds, shard by shard, and kept.

A filter is a Python function of every document, and it comes from a request. So it is evaluated beside the searches, not in one; it
may take only so long; and what was found for a shard is kept for as long as the shard is a part of the index, so that a document
that is added costs one evaluation for each filter in use, not one for each document.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from index_builder.filters import Filter
from index_builder.search import Snapshot
from retro.errors import ConfigError

MIN_BUDGET_S = 10.0
"""A filter may take so much time of a core for its evaluation, or more where there are many documents:"""
BUDGET_PER_DOCUMENT_S = 50e-6
"""A comparison takes about 1e-6, so that some dozens can be made in any index."""
MAX_BYTES = 256 << 20
"""Of what is kept for all filters; the one that was used last is kept in any case."""
_STEP = 500
"""Documents between two looks at the time."""


@dataclass(slots=True)
class _Kept:
    """What is known of a filter."""

    shards: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    """Which documents fulfil it, by the shard's SHA-256."""
    of: tuple[str, ...] = ()
    """The shards that the rows are of."""
    rows_N: NDArray[np.bool_] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(keep_D.nbytes for keep_D in self.shards.values()) + (
            0 if self.rows_N is None else self.rows_N.nbytes
        )


class Masks:
    """What is known of filters; may be used by several threads."""

    def __init__(self) -> None:
        self._kept: dict[Filter, _Kept] = {}
        self._lock = threading.Lock()

    def knows(self, where: Filter) -> bool:
        """Whether it was evaluated before, if perhaps for an earlier state of the index."""
        with self._lock:
            return where in self._kept and self._kept[where].rows_N is not None

    def rows(
        self, now: Snapshot, where: Filter | None, *, is_wanted: Callable[[], bool] = lambda: True
    ) -> NDArray[np.bool_] | None:
        """Whether each row of an index is of a document that fulfils a filter [N]; None where there is no filter.

        Args:
            now: The index.
            where: A condition.
            is_wanted: Asked now and then; where it says no, the evaluation ends.

        Raises:
            ConfigError: It takes too long, or is not wanted any more.
        """
        if where is None:
            return None
        store, files = now.store, now.manifest["files"]
        present = tuple(files[f"documents/{name}.arrow"]["sha256"] for name in store.shards)
        with self._lock:
            kept = self._kept.pop(where, None) or _Kept()
            self._kept[where] = kept  # as the one that was used last
            if kept.rows_N is not None and kept.of == present:
                return kept.rows_N
            found = dict(kept.shards)
        missing = [(number, sha256) for number, sha256 in enumerate(present) if sha256 not in found]
        try:
            self._evaluate(now, where, missing, found, is_wanted)
        except ConfigError:
            with self._lock:
                self._kept.pop(where, None)
            raise
        shards = {sha256: found[sha256] for sha256 in present}
        keep_D = np.concatenate([np.empty(0, np.bool_), *(shards[sha256] for sha256 in present)])
        rows_N = keep_D[store.documents_of(np.arange(store.num_chunks))]
        with self._lock:
            kept.shards, kept.of, kept.rows_N = shards, present, rows_N
            self._forget()
        return rows_N

    def _evaluate(
        self,
        now: Snapshot,
        where: Filter,
        missing: list[tuple[int, str]],
        found: dict[str, NDArray[np.bool_]],
        is_wanted: Callable[[], bool],
    ) -> None:
        documents = now.store.num_documents
        budget = max(MIN_BUDGET_S, BUDGET_PER_DOCUMENT_S * documents)
        began = time.thread_time()
        for number, sha256 in missing:
            table = now.store.tables[number]
            parts = [np.empty(0, np.bool_)]
            for first in range(0, len(table), _STEP):
                if time.thread_time() - began > budget or not is_wanted():
                    raise ConfigError(
                        f"the filter takes longer than {budget:g} s to be evaluated for {documents:,} documents: make it "
                        "simpler, with fewer comparisons or fewer values"
                    )
                parts.append(where.keep(table.slice(first, _STEP)))
            found[sha256] = np.concatenate(parts)

    def _forget(self) -> None:
        """Drops those that were used longest ago where all together are too large."""
        total = sum(kept.num_bytes for kept in self._kept.values())
        for where in list(self._kept)[:-1]:
            if total <= MAX_BYTES:
                return
            total -= self._kept.pop(where).num_bytes
