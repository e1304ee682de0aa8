"""Time-outs: one thread for all of them, started with the first and ended after the last."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

from polars_async._runtime.fork import Step, in_child
from polars_async._runtime.green import leaving_no_hub
from polars_async._runtime.logs import complain
from polars_async._runtime.thread_names import set_system_name
from polars_async._runtime.unpatched import RLock, SimpleQueue, holding, start_new_thread, when_put

if TYPE_CHECKING:
    from collections.abc import Callable

_SWEPT_FROM: Final = 1000
"""The size of the heap from which on cancelled timers are removed."""


class Timed(Protocol):
    """What has a time limit, such as a query or a call of a worker."""

    def expire(self) -> None:
        """
        React to the time being up, on the timer thread; return quickly.

        A call may still come just after `Timer.cancel`, and must do no harm then.
        """


class Timer:
    """A call of `expire` to come; made by `start_timer`."""

    __slots__ = ("target",)

    def __init__(self, query: Timed) -> None:
        self.target: Timed | None = query

    def cancel(self) -> None:
        """Never call the target. It takes no lock, so that a finaliser may call it."""
        self.target = None


class _Timers:
    """
    All timers, in a heap: any thread adds under the lock, the timer thread alone takes out.

    The lock is reentrant, since a signal handler may run while this thread holds it, and start a
    timer of its own.
    """

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self.lock = RLock()
        self.wakeup: SimpleQueue[None] = SimpleQueue()
        """What is put here ends the sleep of the thread, or its next one: it then looks again."""
        self.heap: list[tuple[float, int, Timer]] = []
        self.number = 0
        self.wakes_at = 0.0
        """When the sleeping thread wakes up by itself; in the past while it is not asleep."""
        self.thread: list[int] = []
        self.swept_at = _SWEPT_FROM

    @property
    def runs(self) -> bool:
        """Whether it has a thread."""
        return bool(self.thread)

    def start(self, seconds: float, query: Timed) -> Timer:
        timer = Timer(query)
        try:
            holding(self.lock, self._add, self._now() + seconds, timer)
        except BaseException:  # no thread can start, or Ctrl-C: the timer may be in the heap
            timer.cancel()
            raise
        return timer

    def _add(self, time: float, timer: Timer) -> None:
        self.number += 1
        entry = (time, self.number, timer)
        if len(self.heap) > self.swept_at:
            # Most queries are done long before their time: cancelled timers would pile up.
            kept = [each for each in self.heap if each[2].target is not None]
            heapify(kept)
            self.heap = kept
            self.swept_at = max(_SWEPT_FROM, 2 * len(kept))
        # Into the heap before the thread is started or woken, which looks for it there. It needs
        # this lock for that, so that it looks after all that is done here.
        heappush(self.heap, entry)
        if not self.thread:
            # Started and recorded in one call of C: a signal handler that ran in between, and added
            # a timer, would find no thread recorded, and start a second one.
            self.thread.extend(map(start_new_thread, [self.run], [()]))
        elif time < self.wakes_at:
            # Not only where the entry is first in the heap: one before it may have been pushed by a
            # call that Ctrl-C ended here, before it woke the thread. A thread that is not asleep
            # needs no wakeup: it looks at the heap before it sleeps.
            self.wakeup.put(None)

    @leaving_no_hub
    def run(self) -> None:
        set_system_name("polars-timers")
        try:
            while (wait := self.expire_due()) is not None:
                # A timer may be added before the sleep begins: its wakeup is in the queue by then.
                when_put(self.wakeup, wait)
        except BaseException:  # noqa: BLE001  # no memory, for one
            with self.lock:
                self.thread.clear()  # so that the next timer starts another thread
            complain("the thread of all time-outs has ended")

    def expire_due(self) -> float | None:
        """Expire what is due; return the seconds until the next timer, or None without one."""
        while True:
            with self.lock:
                if not self.heap:
                    # With the lock held: a thread that adds a timer from now on starts another one.
                    self.thread.clear()
                    return None
                wait = self.heap[0][0] - self._now()
                if wait > 0:
                    self.wakes_at = self.heap[0][0]
                    return wait
                query = heappop(self.heap)[2].target
            # Without the lock: to expire a query takes locks under which others start timers.
            if query is not None:
                try:
                    query.expire()
                except BaseException:  # noqa: BLE001  # the other timers have to go off in time
                    complain("what was to be done at a time-out has failed")
                del query  # not held while the thread sleeps


_timers = _Timers()


def start_timer(seconds: float, query: Timed) -> Timer:
    """Have `query` expire in so many seconds, unless the timer is cancelled before."""
    return _timers.start(seconds, query)


def _reset_after_fork() -> None:
    global _timers  # noqa: PLW0603  # those of the process: their thread is the parent's
    _timers = _Timers()


in_child(Step.FORGET, _reset_after_fork)
