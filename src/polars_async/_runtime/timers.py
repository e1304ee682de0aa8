"""Time-outs: one thread for all of them, started with the first and ended after the last."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

from polars_async._runtime.fork import Step, in_child
from polars_async._runtime.green import leaving_no_hub
from polars_async._runtime.logs import complain
from polars_async._runtime.unpatched import RLock, SimpleQueue, holding, start_new_thread, when_put

if TYPE_CHECKING:
    from collections.abc import Callable

_SWEPT_FROM: Final = 1000


class Timed(Protocol):
    """What has to be done in time, such as a query."""

    def expire(self) -> None:
        """Know that it is late; on the clock's thread, which has to be let go at once."""


class Deadline:
    """When a query has to be done; made by `set_deadline`."""

    __slots__ = ("query",)

    def __init__(self, query: Timed) -> None:
        self.query: Timed | None = query

    def cancel(self) -> None:
        """Forget the query, which is done. It takes no lock, so that a finaliser may do it."""
        self.query = None


class _Clock:
    """
    Any thread adds, under the lock; the clock's own thread takes out.

    The lock is reentrant because a signal handler may come in and add a deadline of its own.
    """

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self.lock = RLock()
        self.wakeup: SimpleQueue[None] = SimpleQueue()
        self.deadlines: list[tuple[float, int, Deadline]] = []
        self.number = 0
        self.wakes_at = 0.0
        """Until when the thread sleeps; what is past, while it is about to look again."""
        self.thread: list[int] = []
        self.swept_at = _SWEPT_FROM

    @property
    def runs(self) -> bool:
        """Whether it has a thread."""
        return bool(self.thread)

    def add(self, seconds: float, query: Timed) -> Deadline:
        deadline = Deadline(query)
        try:
            holding(self.lock, self._add, self._now() + seconds, deadline)
        except BaseException:  # no thread to be had, or Ctrl-C
            deadline.cancel()
            raise
        return deadline

    def _add(self, time: float, deadline: Deadline) -> None:
        self.number += 1
        entry = (time, self.number, deadline)
        if len(self.deadlines) > self.swept_at:
            # Most queries are done long before: their deadlines would pile up.
            kept = [each for each in self.deadlines if each[2].query is not None]
            heapify(kept)
            self.deadlines = kept
            self.swept_at = max(_SWEPT_FROM, 2 * len(kept))
        heappush(self.deadlines, entry)
        if not self.thread:
            # In one call of C, so that no signal handler comes in before it is noted.
            self.thread.extend(map(start_new_thread, [self.run], [()]))
        elif time < self.wakes_at:
            # Not just where it is the first: the one before may have been added, but Ctrl-C have
            # come before the bell.
            self.wakeup.put(None)

    @leaving_no_hub
    def run(self) -> None:
        try:
            while (wait := self.expire_due()) is not None:
                when_put(self.wakeup, wait)
        except BaseException:  # noqa: BLE001  # no memory, for one
            with self.lock:
                self.thread.clear()  # so that the next deadline finds another thread
            complain("the thread of all time-outs has ended")

    def expire_due(self) -> float | None:
        """Give the seconds until the next deadline; None if there is none."""
        while True:
            with self.lock:
                if not self.deadlines:
                    self.thread.clear()
                    return None
                wait = self.deadlines[0][0] - self._now()
                if wait > 0:
                    self.wakes_at = self.deadlines[0][0]
                    return wait
                query = heappop(self.deadlines)[2].query
            if query is not None:
                try:
                    query.expire()
                except BaseException:  # noqa: BLE001  # the others are to be told in time, too
                    complain("what was to be done at a time-out has failed")
                del query


class _TheClock:
    clock = _Clock()

    @classmethod
    def after_fork(cls) -> None:
        cls.clock = _Clock()  # its thread stayed behind


in_child(Step.FORGET, _TheClock.after_fork)


def set_deadline(seconds: float, query: Timed) -> Deadline:
    """Have `query` expire in so many seconds, unless the deadline is lifted before."""
    return _TheClock.clock.add(seconds, query)
