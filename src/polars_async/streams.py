"""Iterators, async and not, over results that arrive one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeVar

import polars as pl

from polars_async import bridges
from polars_async.bridges.buffer import Arrivals, Buffer
from polars_async.iteration import ResultStream
from polars_async.scheduling.describing import essence_of
from polars_async.watches import Watchable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polars_async.bridges import Bridge
    from polars_async.resolution import Resolution
    from polars_async.scheduling.query import Query

T = TypeVar("T")


class Completions(ResultStream[tuple[int, T]]):
    """Results of several queries with the number of each, in the order in which they come."""

    __slots__ = ("_arrivals", "_queries")

    def __init__(self, queries: Sequence[Query[T]]) -> None:
        self._queries = dict(enumerate(queries))
        self._arrivals: Arrivals[int] = Arrivals()
        for number, query in enumerate(queries):
            ending = _Ending(number, self._arrivals)
            if not query.add_waiter(ending):
                ending.wake()
        if not queries:
            self._arrivals.finish()

    def __repr__(self) -> str:
        return f"<ResultStream: {len(self._queries)} results to come>"

    def left(self) -> list[Query[T]]:
        """Return the queries whose results were not taken yet."""
        return list(self._queries.values())

    async def _next(self, bridge: Bridge | None = None) -> tuple[int, T]:
        if bridge is None:
            bridge = bridges.current()
        try:
            while True:
                number = await self._arrivals.next(bridge)
                # None if the stream was closed meanwhile, or if the number arrives a second time: a
                # thread that a signal handler interrupts while it wakes its waiters does it again.
                if (query := self._take(number)) is not None:
                    return number, _outcome(query, bridge)
        except BaseException:
            self.close()
            raise
        finally:
            query = None
            del self  # an error's traceback holds this frame, and so would hold query and error

    def _take(self, number: int) -> Query[T] | None:
        query = self._queries.pop(number, None)
        if query is not None and not self._queries:
            self._arrivals.finish()
        return query

    def close(self) -> None:
        """Cancel the queries that are not done; any thread may call it, and more than once."""
        queries, self._queries = self._queries, {}
        self._arrivals.finish(drop=True)
        for query in reversed(queries.values()):  # or the last would start in slots of the first
            query.cancel()


class Batches(Watchable, ResultStream[pl.DataFrame]):
    """The result of one query in batches, just a few of them ahead of the consumer."""

    __slots__ = ("_buffer", "_query")

    def __init__(self, query: Query[int], buffer: Buffer) -> None:
        self._query = query
        self._buffer = buffer
        ending = _BufferEnding(query, buffer)
        if not query.add_waiter(ending):
            ending.wake()

    def __repr__(self) -> str:
        return f"<ResultStream: batches of {essence_of(self._query)}>"

    @property
    def resolution(self) -> Resolution:
        """Which engine runs the query, where it was asked for, and why."""
        return self._query.resolution

    async def _next(self, bridge: Bridge | None = None) -> pl.DataFrame:
        if bridge is None:
            bridge = bridges.current()
        try:
            batch = await self._buffer.take(bridge)
            if batch is None and not self._buffer.closed:
                _outcome(self._query, bridge)
        except BaseException:
            self.close()
            raise
        finally:
            del self  # an error's traceback holds this frame, and so would hold query and error
        if batch is None:
            raise StopAsyncIteration
        return batch

    def close(self) -> None:
        """Cancel the query if it is not done; any thread may call it, and more than once."""
        # Noted first: a consumer that waits in another task then finds the stream closed, and does
        # not raise that its query was cancelled. The buffer last: a query that may put no more
        # comes to its end, and would be completed.
        self._buffer.closed = True
        self._query.cancel()
        self._buffer.close()


def _outcome(query: Query[T], bridge: Bridge) -> T:
    try:
        return query.outcome(bridge.CANCELLED)
    except (StopIteration, StopAsyncIteration) as error:  # they would end the stream without error
        raise RuntimeError(f"the query raised {type(error).__name__}") from error
    finally:
        del query  # an error's traceback holds this frame, and so would hold query and error


class _Ending:
    """A waiter for one of several queries: it puts the number of the query."""

    survives_fork: ClassVar[bool] = True  # so that a stream in the child learns of its lost queries
    wake_at_exit: ClassVar[bool] = True

    def __init__(self, number: int, arrivals: Arrivals[int]) -> None:
        self._number = number
        self._arrivals = arrivals

    def wake(self) -> None:
        self._arrivals.put(self._number)


class _BufferEnding:
    """A waiter for the query of a buffer: it ends the buffer."""

    survives_fork: ClassVar[bool] = True  # so that a stream in the child learns of its lost query
    wake_at_exit: ClassVar[bool] = True

    def __init__(self, query: Query[int], buffer: Buffer) -> None:
        self._query = query
        self._buffer = buffer

    def wake(self) -> None:
        # Batches of a query that was cancelled or timed out are not wanted any more.
        self._buffer.finish(drop=self._query.is_cancelled)
