"""What arrives one after the other, from the threads of queries, for a consumer in a loop."""

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
    """The query whose thread puts batches, as far as a buffer holds it up."""

    def paused(self) -> AbstractContextManager[None]:
        """Count the time in here as no work."""
        ...

    def pause(self) -> LockType:
        """Let others use the slot of the query; return the gate where its thread has to wait."""
        ...

    def resume(self) -> None:
        """Have the query, if it is paused, go on as soon as there is a slot for it."""

    def let_end(self) -> None:
        """Have the query, if it is paused, go on without a slot: nothing is left but its end."""

    def nest(self) -> None:
        """Note that a running query reads, which needs this one to go on without a slot."""


class Buffer:
    """
    The batches between the thread of a query, which puts, and a consumer.

    The thread is held up while `BATCHES_AHEAD` batches lie ready, and others use its slot. It goes
    on when there is room, and a slot for it; or to its end, when no more is wanted.
    """

    def __init__(self) -> None:
        self.closed = False
        self._arrivals: Arrivals[pl.DataFrame] = Arrivals()
        self._producer: Producer | None = None

    def bind(self, producer: Producer) -> None:
        """Set whose thread puts."""
        self._producer = producer

    def add(self, batch: pl.DataFrame) -> None:
        """Add a batch that is there anyway, however many lie ready."""
        self._arrivals.put(batch)

    def put(self, batch: pl.DataFrame) -> bool:
        """Add a batch, and wait until there is room for one more; True if none is wanted."""
        producer = self._producer
        if not self._arrivals.put(batch):
            return True
        if producer is not None and not self._has_room():
            with producer.paused():
                # Look again once there is a gate: a consumer that made room before found none to
                # open, and nor did the end of the stream.
                gate = producer.pause()
                self._go_on(producer)
                gate.acquire()
        return self._arrivals.over

    async def take(self, bridge: Bridge) -> pl.DataFrame | None:
        """Wait for the next batch; None after the last."""
        producer = self._producer
        if producer is not None and in_query():
            # The query that reads may have the very slot that this one would wait for.
            producer.nest()
            self._go_on(producer)
        try:
            return await self._arrivals.next(bridge)
        except StopAsyncIteration:
            return None
        finally:
            if producer is not None:
                self._go_on(producer)

    def finish(self, *, drop: bool) -> None:
        """Note that no more batches come; and maybe that those here are not wanted either."""
        producer = self._producer
        self._arrivals.finish(drop=drop)
        if producer is not None:
            self._go_on(producer)
        self._producer = None  # whose query's error has frames that hold this

    def close(self) -> None:
        """Note that the consumer wants no more."""
        self.closed = True
        self.finish(drop=True)

    def _has_room(self) -> bool:
        with self._arrivals.lock:
            return self._arrivals.over or len(self._arrivals.items) < BATCHES_AHEAD

    def _go_on(self, producer: Producer) -> None:
        """Have `producer` go on, if it is paused and need not be."""
        if self._arrivals.over:
            producer.let_end()
        elif self._has_room():
            producer.resume()


class Arrivals(Generic[T]):
    """What came and was not fetched yet; a waiter waits for something to come, or for the end."""

    def __init__(self) -> None:
        self.lock = new_lock()
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
            await (Checkpoint(bridge) if ready else Suspension(bridge, self))
            with self.lock:
                if self.items:
                    return self.items.popleft()
                if self.over:
                    raise StopAsyncIteration

    def add_waiter(self, waiter: Waiter) -> bool:
        """Have `waiter` woken by the next item, or the end; return False if there is one."""
        with self.lock:
            if self.items or self.over:
                return False
            self._waiters[waiter] = None
            return True

    def remove_waiter(self, waiter: Waiter, *, last_cancels: bool) -> bool:  # noqa: ARG002  # the stream sees to it
        """Remove `waiter`; return False if it was woken."""
        with self.lock:
            if waiter not in self._waiters:
                return False
            self._waiters.pop(waiter)
            return True
