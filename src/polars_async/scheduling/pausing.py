"""The pauses of a query that waits for the consumer of its batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _thread import LockType
    from contextlib import AbstractContextManager

    from polars_async.scheduling.lane import Lane
    from polars_async.scheduling.query import Query


class PausableQuery:
    """A query of batches with the lane that it came to, for its buffer."""

    __slots__ = ("_lane", "_query")

    def __init__(self, lane: Lane, query: Query[Any]) -> None:
        self._lane = lane
        self._query = query

    def clock_stopped(self) -> AbstractContextManager[None]:
        """Return a context whose time does not count as run time."""
        return self._query.clock_stopped()

    def pause(self) -> LockType:
        """Let others use the slot of the query; return the gate where its thread has to wait."""
        return self._lane.pause(self._query)

    def resume(self) -> None:
        """Have the query, if it is paused, go on as soon as there is a slot for it."""
        self._lane.of(self._query).admission.resume(self._query)

    def let_end(self) -> None:
        """Have the query, if it is paused, go on without a slot: only its end is left to run."""
        self._lane.of(self._query).admission.let_end(self._query)

    def nest(self) -> None:
        """Mark the query as one that a running query reads: it then needs no slot to go on."""
        self._query.is_nested = True
