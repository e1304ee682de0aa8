"""Iterators, async and not, over results that arrive one after the other."""

from __future__ import annotations

import sys
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import polars as pl

from polars_async import bridges
from polars_async.bridges.buffer import Arrivals, Buffer
from polars_async.bridges.threads import BLOCKING, drive
from polars_async.handle import essence

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from types import TracebackType
    from typing import Any, Self

    from polars_async.bridges import Bridge
    from polars_async.resolution import Resolution
    from polars_async.scheduling.query import Query

T = TypeVar("T")


class ResultStream(Generic[T]):
    """
    An iterator over results as they come: ``async for`` in asyncio and trio, ``for`` elsewhere.

    ``for`` blocks the calling thread until the next result has come; where gevent runs on it, the
    calling greenlet alone. So it would block a loop of asyncio or trio: use ``async for`` there.

    If a loop over it ends early, by ``break`` or an exception, the queries that are not done are
    cancelled once the stream is garbage-collected. ``with``, ``async with`` and `close` cancel them
    at once, and so does the cancellation of the task, or the end of the greenlet, that waits for
    the next result.
    """

    __slots__ = ("__weakref__",)

    def __aiter__(self) -> Self:
        """Return the stream itself."""
        return self

    def __iter__(self) -> Self:
        """Return the stream itself."""
        return self

    def __anext__(self) -> Coroutine[Any, Any, T]:
        """Wait for the next result; an error of its query is raised, and ends the stream."""
        return self._next()

    def __next__(self) -> T:
        """Block until the next result has come; an error of its query is raised, and ends it."""
        try:
            return drive(self._next(BLOCKING))
        except StopAsyncIteration:
            raise StopIteration from None
        finally:
            del self  # an error's traceback holds this frame, and so would hold query and error

    @abstractmethod
    async def _next(self, bridge: Bridge | None = None) -> T:
        """Wait for the next result, by the `bridge` of the caller, or else of the running loop."""

    @abstractmethod
    def close(self) -> None:
        """Cancel the queries that are not done; any thread may call it, and more than once."""

    async def aclose(self) -> None:
        """Cancel the queries that are not done, for ``contextlib.aclosing``."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # `is_finalizing` is a default: see `Collector`.
    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():
            self.close()


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
        for query in queries.values():
            query.cancel()


class Batches(ResultStream[pl.DataFrame]):
    """The result of one query in batches, just a few of them ahead of the consumer."""

    __slots__ = ("_buffer", "_query")

    def __init__(self, query: Query[int], buffer: Buffer) -> None:
        self._query = query
        self._buffer = buffer
        ending = _BufferEnding(query, buffer)
        if not query.add_waiter(ending):
            ending.wake()

    def __repr__(self) -> str:
        return f"<ResultStream: batches of {essence(self._query)}>"

    @property
    def id(self) -> int:
        """The number of the query, unique in this process: `Collector.cancel` takes it."""
        return self._query.id

    @property
    def summary(self) -> str:
        """What took the query how long so far, in one sentence: see `QueryHandle.summary`."""
        return self._query.summary

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
        # The buffer first: a consumer that waits in another task then finds the stream closed, and
        # does not raise that its query was cancelled.
        self._buffer.close()
        self._query.cancel()


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
