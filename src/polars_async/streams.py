"""Results that arrive one after the other: async iterators for asyncio and trio."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar
from weakref import WeakSet

import polars as pl

from polars_async import bridges
from polars_async._native import RLock
from polars_async._nesting import in_query
from polars_async.query import State, wake

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from types import TracebackType
    from typing import Self

    from polars_async.bridges import Bridge
    from polars_async.lane import Lane
    from polars_async.query import Awaited, Query, Waiter
    from polars_async.resolution import Resolution

T = TypeVar("T")

BATCHES_AHEAD: Final = 2
"""How many batches lie ready at most for a consumer that is slower than its query."""


class ResultStream(Generic[T]):
    """
    An async iterator, in asyncio and trio, over results as they come.

    Leaving the loop early, by ``break`` or an exception, lets go of all that is still on the way
    once nobody holds the stream any more; ``async with`` and `close` do so at once, and so does the
    cancellation of the task that waits for the next result.
    """

    __slots__ = ("__weakref__",)

    def __aiter__(self) -> Self:
        """Give the stream itself."""
        return self

    @abstractmethod
    async def __anext__(self) -> T:
        """Wait for the next result; raises what its query raised, which ends the stream."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is still on the way; any thread may call it, and more than once."""

    async def aclose(self) -> None:
        """Let go of what is still on the way, for ``contextlib.aclosing``."""
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

    # As a default: see `Collector`.
    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():
            self.close()


class Completions(ResultStream[tuple[int, T]]):
    """Results of several queries with the number of each, in the order in which they come."""

    __slots__ = ("_arrivals", "_queries")

    def __init__(self, queries: Sequence[Query[T]]) -> None:
        self._queries = dict(enumerate(queries))
        self._arrivals: _Arrivals[int] = _Arrivals()
        for number, query in enumerate(queries):
            ending = _Ending(number, self._arrivals)
            if not query.add_waiter(ending):
                ending.wake()
        if not queries:
            self._arrivals.finish()

    async def __anext__(self) -> tuple[int, T]:
        """Wait for the next result; raises what its query raised, which ends the stream."""
        bridge = bridges.current()
        try:
            while True:
                number = await self._arrivals.next(bridge)
                # None if it is told again by a thread that was interrupted, or closed meanwhile.
                if (query := self._take(number)) is not None:
                    return number, _outcome(query, bridge)
        except BaseException:
            self.close()
            raise
        finally:
            query = None
            del self  # the traceback holds this frame, which else held the query and its error

    def _take(self, number: int) -> Query[T] | None:
        query = self._queries.pop(number, None)
        if query is not None and not self._queries:
            self._arrivals.finish()
        return query

    def close(self) -> None:
        """Let go of what is still on the way; any thread may call it, and more than once."""
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

    @property
    def resolution(self) -> Resolution:
        """Which engine runs the query, asked for by whom, and why."""
        return self._query.resolution

    async def __anext__(self) -> pl.DataFrame:
        """Wait for the next batch; raises what the query raised, which ends the stream."""
        bridge = bridges.current()
        try:
            batch = await self._buffer.take(bridge)
            if batch is None and not self._buffer.closed:
                _outcome(self._query, bridge)
        except BaseException:
            self.close()
            raise
        finally:
            del self  # as above
        if batch is None:
            raise StopAsyncIteration
        return batch

    def close(self) -> None:
        """Let go of what is still on the way; any thread may call it, and more than once."""
        self._buffer.close()
        self._query.cancel()


class Buffer:
    """
    Between the thread of a query, which puts, and a consumer.

    The thread is held up while `BATCHES_AHEAD` batches lie ready, and others use its slot. It goes
    on when there is room, and a slot for it; or to its end, when no more is wanted.
    """

    def __init__(self, lane: Lane) -> None:
        self.closed = False
        self._lane = lane
        self._arrivals: _Arrivals[pl.DataFrame] = _Arrivals()
        self._query: Query[Any] | None = None

    def bind(self, query: Query[Any]) -> None:
        """Say whose thread puts."""
        self._query = query

    def add(self, batch: pl.DataFrame) -> None:
        """Add a batch that is there anyway, however many lie ready."""
        self._arrivals.put(batch)

    def put(self, batch: pl.DataFrame) -> bool:
        """Add a batch, and wait until there is room for one more; True if none is wanted."""
        query = self._query
        if not self._arrivals.put(batch):
            return True
        if query is not None and not self._has_room():
            with query.paused():
                gate = self._lane.pause(query)
                # Whoever made room, or an end of it all, before that knew of no gate.
                self._go_on(query)
                gate.acquire()
        return self._arrivals.over

    async def take(self, bridge: Bridge) -> pl.DataFrame | None:
        """Wait for the next batch; None after the last."""
        query = self._query
        if query is not None and in_query():
            # The query that reads may have the very slot that this one would wait for.
            query.is_nested = True
            self._go_on(query)
        try:
            return await self._arrivals.next(bridge)
        except StopAsyncIteration:
            return None
        finally:
            if query is not None:
                self._go_on(query)

    def finish(self, *, drop: bool) -> None:
        """Note that no more batches come; and maybe that those here are not wanted either."""
        query = self._query
        self._arrivals.finish(drop=drop)
        if query is not None:
            self._go_on(query)
        self._query = None  # whose error's frames hold this

    def close(self) -> None:
        """Note that the consumer wants no more."""
        self.closed = True
        self.finish(drop=True)

    def _has_room(self) -> bool:
        with self._arrivals.lock:
            return self._arrivals.over or len(self._arrivals.items) < BATCHES_AHEAD

    def _go_on(self, query: Query[Any]) -> None:
        """Have `query` go on, if it is paused and need not be."""
        admission = self._lane.of(query).admission
        if self._arrivals.over:
            admission.let_end(query)
        elif self._has_room():
            admission.resume(query)


_all_arrivals: Final[WeakSet[_Arrivals[Any]]] = WeakSet()


def after_fork() -> None:
    """Take new locks in a forked child, where nobody is left to release the old ones."""
    for arrivals in list(_all_arrivals):
        arrivals.lock = RLock()


class _Arrivals(Generic[T]):
    """What came and was not fetched yet; a waiter waits for something to come, or for the end."""

    def __init__(self) -> None:
        self.lock = RLock()
        _all_arrivals.add(self)
        self.items: deque[T] = deque()
        self.over = False
        self._waiters: dict[Waiter, None] = {}

    def put(self, item: T) -> bool:
        """Add `item`; False if it is over."""
        with self.lock:
            if self.over:
                return False
            self.items.append(item)
            waiters, self._waiters = self._waiters, {}
        wake(waiters)
        return True

    def finish(self, *, drop: bool = False) -> None:
        """Let nothing more come, and maybe drop what came."""
        with self.lock:
            self.over = True
            dropped = list(self.items) if drop else []
            if drop:
                self.items.clear()
            waiters, self._waiters = self._waiters, {}
        del dropped
        wake(waiters)

    async def next(self, bridge: Bridge) -> T:
        """Wait for the next item; StopAsyncIteration after the last."""
        while True:
            # Where a result lies ready each time, the loop would never get to anything else.
            ready = self.items or self.over
            await (Turn(bridge) if ready else Suspension(bridge, self))
            with self.lock:
                if self.items:
                    return self.items.popleft()
                if self.over:
                    raise StopAsyncIteration

    def add_waiter(self, waiter: Waiter) -> bool:
        with self.lock:
            if self.items or self.over:
                return False
            self._waiters[waiter] = None
            return True

    def remove_waiter(self, waiter: Waiter, *, last_cancels: bool) -> bool:  # noqa: ARG002  # the stream sees to it
        with self.lock:
            if waiter not in self._waiters:
                return False
            self._waiters.pop(waiter)
            return True


def _outcome(query: Query[T], bridge: Bridge) -> T:
    try:
        return query.outcome(bridge.CANCELLED)
    except (StopIteration, StopAsyncIteration) as error:  # they would end the stream in silence
        raise RuntimeError(f"the query raised {type(error).__name__}") from error
    finally:
        del query  # as in Query.outcome


class Suspension:
    """What a coroutine awaits to have `bridge` wait for `awaited`."""

    def __init__(self, bridge: Bridge, awaited: Awaited) -> None:
        self._bridge = bridge
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, None]:
        return self._bridge.wait(self._awaited)


class Turn:
    """What a coroutine awaits to let other tasks run."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def __await__(self) -> Generator[Any, Any, None]:
        return self._bridge.turn()


class _Ending:
    survives_fork: ClassVar[bool] = True  # so that the child is told that its query is lost
    told_at_exit: ClassVar[bool] = True

    def __init__(self, number: int, arrivals: _Arrivals[int]) -> None:
        self._number = number
        self._arrivals = arrivals

    def wake(self) -> None:
        self._arrivals.put(self._number)


class _BufferEnding:
    survives_fork: ClassVar[bool] = True  # so that the child is told that its query is lost
    told_at_exit: ClassVar[bool] = True

    def __init__(self, query: Query[int], buffer: Buffer) -> None:
        self._query = query
        self._buffer = buffer

    def wake(self) -> None:
        self._buffer.finish(drop=self._query.state is not State.ENDED)
