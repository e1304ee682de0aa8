"""Items that arrive one after the other, from the threads of queries, for a consumer in a loop."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from polars_async._runtime.fork import new_lock
from polars_async._runtime.nesting import in_query
from polars_async.bridges import Checkpoint, Suspension
from polars_async.bridges.waiting import wake

if TYPE_CHECKING:
    from _thread import LockType
    from contextlib import AbstractContextManager

    import polars as pl

    from polars_async.bridges import Bridge
    from polars_async.bridges.waiting import Waiter

T = TypeVar("T")

BATCHES_AHEAD: Final = 2
"""How many batches lie ready at most for a consumer that is slower than its query."""


class Producer(Protocol):
    """The query whose thread puts batches into a buffer, which pauses and resumes it."""

    def clock_stopped(self) -> AbstractContextManager[None]:
        """Return a context whose time does not count as run time of the query."""
        ...

    def pause(self) -> LockType:
        """Free the slot of the query for others; return the lock on which its thread waits."""
        ...

    def resume(self) -> None:
        """Let a paused query go on as soon as there is a slot for it."""

    def let_end(self) -> None:
        """Let a paused query go on without a slot: all that is left for it is to end."""

    def nest(self) -> None:
        """Note that the consumer is a running query: so this one goes on without a slot."""


class Buffer:
    """
    The batches between the thread of a query, which puts them, and a consumer, which takes them.

    The thread waits while `BATCHES_AHEAD` batches lie ready, and other queries use its slot. It
    goes on when there is room, and a slot for it. When no more batches are wanted, it goes on to
    its end.
    """

    def __init__(self) -> None:
        self.closed = False
        self._arrivals: Arrivals[pl.DataFrame] = Arrivals()
        self._producer: Producer | None = None

    def bind(self, producer: Producer) -> None:
        """Set the query whose thread puts."""
        self._producer = producer

    def add(self, batch: pl.DataFrame) -> None:
        """Add a batch without waiting for room: the caller has it in memory already."""
        self._arrivals.put(batch)

    def put(self, batch: pl.DataFrame) -> bool:
        """Add a batch, and wait until there is room for one more; return True if none is wanted."""
        producer = self._producer  # `finish` may clear it at any time
        if not self._arrivals.put(batch):
            return True
        # More than once if a consumer that had found room has resumed the query late, after this
        # thread had gone on by itself and filled that room.
        while producer is not None and not self._has_room():
            with producer.clock_stopped():
                # The consumer may take a batch, or close the stream, after this thread has found no
                # room and before it is paused. Its own call to resume the query does nothing then.
                # So this thread looks once more after `pause`: any change from then on finds a
                # paused query, and releases the lock. Both may do so: the second has no effect.
                lock = producer.pause()
                self._let_go_on(producer)
                lock.acquire()
        return self._arrivals.over

    async def take(self, bridge: Bridge) -> pl.DataFrame | None:
        """Wait for the next batch; return None after the last."""
        producer = self._producer
        if producer is not None and in_query():
            # The consumer may hold the very slot that this query would wait for. Noted before the
            # query is resumed, which looks at it; and again below, should it pause meanwhile.
            producer.nest()
            self._let_go_on(producer)
        try:
            return await self._arrivals.next(bridge)
        except StopAsyncIteration:
            return None
        finally:
            # After the batch was taken, which makes room.
            if producer is not None:
                self._let_go_on(producer)

    def finish(self, *, drop: bool) -> None:
        """Note that no more batches come; with `drop`, those that lie ready are not wanted."""
        producer = self._producer
        # Over before the query goes on: its thread looks at that when it wakes up.
        self._arrivals.finish(drop=drop)
        if producer is not None:
            self._let_go_on(producer)
        self._producer = None  # the error of its query has frames that hold this buffer

    def close(self) -> None:
        """Note that the consumer wants no more."""
        # Set before a consumer in another task is woken by `finish`: it looks at that to tell this
        # end from that of the query.
        self.closed = True
        self.finish(drop=True)

    def _has_room(self) -> bool:
        with self._arrivals.lock:
            return self._arrivals.over or len(self._arrivals.items) < BATCHES_AHEAD

    def _let_go_on(self, producer: Producer) -> None:
        """Let `producer` go on, if it is paused and need not be."""
        if self._arrivals.over:
            producer.let_end()
        elif self._has_room():
            producer.resume()


class Arrivals(Generic[T]):
    """Items that were put and not taken yet; a waiter waits for the next one, or for the end."""

    def __init__(self) -> None:
        self.lock = new_lock()
        self.items: deque[T] = deque()
        self.over = False
        """Whether no more items come; items that lie ready can still be taken."""
        self._waiters: dict[Waiter, None] = {}

    def put(self, item: T) -> bool:
        """Add `item`; return False if no more are wanted."""
        with self.lock:
            if self.over:
                return False
            self.items.append(item)
            waiters, self._waiters = self._waiters, {}
        wake(waiters)
        return True

    def finish(self, *, drop: bool = False) -> None:
        """Let no more items come; with `drop`, drop those that lie ready."""
        with self.lock:
            self.over = True
            dropped = list(self.items) if drop else []
            if drop:
                self.items.clear()
            waiters, self._waiters = self._waiters, {}
        del dropped  # without the lock: to free frames takes a while, and may run finalisers
        wake(waiters)

    async def next(self, bridge: Bridge) -> T:
        """Wait for the next item; raise StopAsyncIteration after the last."""
        while True:
            # With a checkpoint where an item lies ready: else a loop whose consumer never waits
            # would not get to its other tasks. Looked at without the lock, so it may be outdated at
            # once: `add_waiter` looks again before the task is suspended, and this does after.
            ready = self.items or self.over
            await (Checkpoint(bridge) if ready else Suspension(bridge, self))
            with self.lock:
                if self.items:
                    return self.items.popleft()
                if self.over:
                    raise StopAsyncIteration

    def add_waiter(self, waiter: Waiter) -> bool:
        """Wake `waiter` at the next item or the end; return False if it need not wait."""
        with self.lock:
            if self.items or self.over:
                return False
            self._waiters[waiter] = None
            return True

    def remove_waiter(self, waiter: Waiter, *, last_cancels: bool) -> bool:  # noqa: ARG002  # the stream cancels
        """Remove `waiter`; return False if it was woken."""
        with self.lock:
            if waiter not in self._waiters:
                return False
            self._waiters.pop(waiter)
            return True
