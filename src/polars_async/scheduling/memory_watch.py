"""Measures what the queries of a collector take of its memory, now and then, while they run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from polars_async._runtime.green import deliver
from polars_async._runtime.machine import own_memory
from polars_async._runtime.timers import start_timer
from polars_async.errors import MemoryLimitWarning

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async.scheduling.admission import Admission
    from polars_async.scheduling.query import Query

_INTERVAL: Final = 0.005
"""Seconds between two measurements of what Polars holds: each takes no time."""
_EVERY: Final = 10
"""One measurement in so many is of the whole process, and of its workers: some 20 us for each."""


class MemoryWatch:
    """
    Measures for one admission, and has it look for more queries when there may be room again.

    It measures on the thread of the timers while a query runs that may be large, or waits for
    memory. The lock of the admission guards `_runs`.
    """

    __slots__ = ("_admission", "_count", "_elsewhere", "_look", "_runs", "_stoppable", "_warned")

    def __init__(
        self, admission: Admission, elsewhere: Callable[[], int], *, stoppable: bool
    ) -> None:
        self._admission = admission
        self._elsewhere = elsewhere
        self._stoppable = stoppable
        """Whether a query that takes too much is stopped; else there is a warning."""
        self._look: Callable[[], object] | None = None  # only meanwhile: it belongs to the lane
        self._runs = False
        self._count = 0
        self._warned = False

    def start(self, look: Callable[[], object]) -> None:
        """Measure from now on, and call `look` where queries wait for memory."""
        if self._runs:
            return
        with self._admission.lock:
            if self._runs:
                return
            self._runs = True
            self._look = look
        self.measure()
        self._go_on()

    def measure(self) -> None:
        """Measure what is taken beside what Polars holds in this process."""
        memory = self._admission.memory
        if memory is not None:
            memory.measure(own_memory(), self._elsewhere())

    def expire(self) -> None:
        """Measure, and let more queries start if there is room."""
        goes_on = True
        try:
            goes_on = self._measure_and_look()
        finally:
            # Whatever went wrong: else the queries that wait now might wait for ever.
            if goes_on:
                self._go_on()

    def _measure_and_look(self) -> bool:
        """Return whether there is reason to do so again."""
        admission = self._admission
        self._count += 1
        if self._count % _EVERY == 0:
            self.measure()
        with admission.lock:
            runs = admission.sample_memory(tell=not self._stoppable)
            waits = admission.lacks_memory and admission.waiting > 0
            # In one hold of the lock with the end: a thread that starts a query from now on finds
            # that nothing measures, and starts it again.
            if not runs and not waits:
                self._runs, self._look = False, None
                return False
            # Threads that look, 200 times a second and for nothing, would take time from queries.
            may_start = waits and admission.may_start()
            alone = None if self._warned or self._stoppable else admission.too_large()
            look = self._look
        if alone is not None:
            self._warned = True
            self._warn(alone)
        if may_start and look is not None:
            look()
        return True

    def reset_after_fork(self) -> None:
        """Measure no more in a forked child, which does not have the thread of the timers."""
        self._runs, self._look = False, None

    def _go_on(self) -> None:
        try:
            start_timer(_INTERVAL, self)
        except RuntimeError:  # no thread can start: the next query that starts tries it again
            self._runs, self._look = False, None
        except BaseException:  # Ctrl-C
            self._runs, self._look = False, None
            raise

    def _warn(self, query: Query[object]) -> None:
        memory, site = self._admission.memory, query.call_site
        if memory is None or site is None:
            return
        text = (
            f"{query.named} runs alone, and this process takes {memory.used:,} bytes, more than "
            f"max_memory={memory.limit:,}. Nothing can stop a query on a thread: with "
            "executor='processes' it would be stopped, and raise QueryMemoryError. Ask for less at "
            "once, try the streaming engine, or allow for more"
        )
        deliver(partial(site.warn, text, MemoryLimitWarning))
