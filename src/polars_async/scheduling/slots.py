"""The slots in which queries run."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from polars_async.scheduling.sizes import SMALL, UNKNOWN, UNKNOWN_LOAD, Load, size_of

if TYPE_CHECKING:
    from _thread import LockType

    from polars_async.scheduling.query import Query


class Slot:
    """
    A worker thread's permit to run queries, one at a time.

    `query` is None while the thread chooses the next one. An `inline` slot is the permit of the
    submitting thread to run just one query itself; it does not count against `max_running`.
    """

    __slots__ = (
        "alone",
        "cpu_seconds",
        "gate",
        "inline",
        "load",
        "looks_after",
        "looks_since",
        "overtook",
        "peak",
        "query",
        "used_before",
    )

    def __init__(self, *, inline: bool = False) -> None:
        self.gate: LockType | None = None  # at which the thread of a paused query waits
        self.query: Query[Any] | None = None
        self.inline = inline
        self.load = UNKNOWN_LOAD
        self.looks_since: float | None = None
        """When its thread began to look at the plan that it looks at."""
        self.looks_after = 0
        """How many queries had come to the queue by then."""
        self.cpu_seconds: float | None = None
        """Of the executor when the query started, if its share of the processors is measured."""
        self.overtook = False
        self.alone = True
        """Whether no other query has run since its query started."""
        self.peak: int | None = None
        """Bytes that the query took at its peak, so far; None if that was not measured."""
        self.used_before = 0
        """The bytes that were taken in all when it started."""

    @property
    def load_so_far(self) -> Load:
        """The load of its query, of which its time so far may tell more."""
        load, query = self.load, self.query
        # One with an estimate keeps its size: where it takes longer, so will its equals in the
        # queue, and these should not start beside it for that.
        if query is None or query.estimate is not None:
            return load
        size = size_of(query.times.run_seconds or 0.0)
        size = max(load.size, size) if load.pooled else size
        return Load(size, None, load.pooled, load.memory)

    @property
    def takes_pool(self) -> bool:
        """Whether its query is known to be a large one in Polars' pool."""
        query = self.query
        if query is None or not self.load.pooled or self.load.is_small:
            return False
        return query.estimate is not None or (query.times.run_seconds or 0.0) > SMALL

    @property
    def work_left(self) -> float:
        """How many seconds its query is expected to take from now on."""
        if self.query is None:
            return 0.0
        estimate, ran = self.query.estimate, self.query.times.run_seconds or 0.0
        return max(0.0, (UNKNOWN if estimate is None else estimate.seconds) - ran)

    def open_gate(self) -> None:
        """Have the thread of its query, if that is paused, go on; may be called again."""
        if self.gate is not None:
            with suppress(RuntimeError):  # it is open
                self.gate.release()
