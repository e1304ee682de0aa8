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

    def paused(self) -> AbstractContextManager[None]:
        """Count the time in here as no work."""
        return self._query.paused()

    def pause(self) -> LockType:
        """Let others use the slot of the query; return the gate where its thread has to wait."""
        return self._lane.pause(self._query)

    def resume(self) -> None:
        """Have the query, if it is paused, go on as soon as there is a slot for it."""
        self._lane.of(self._query).admission.resume(self._query)

    def let_end(self) -> None:
        """Have the query, if it is paused, go on without a slot: nothing is left but its end."""
        self._lane.of(self._query).admission.let_end(self._query)

    def nest(self) -> None:
        """Note that a running query reads, which needs this one to go on without a slot."""
        self._query.is_nested = True
