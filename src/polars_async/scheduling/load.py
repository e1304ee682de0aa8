"""Whether processors are idle while queries wait: measured now and then."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Final

from polars_async._runtime.machine import available_memory, idle_seconds
from polars_async._runtime.timers import start_timer

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async.scheduling.admission import Admission

_INTERVAL: Final = 0.01
"""Seconds between two measurements. The kernel counts the time of threads that run elsewhere at its
ticks, every 1 to 10 ms: a shorter interval would tell nothing."""
_LONGEST: Final = 0.08
"""Seconds between two while the processors stay busy."""
_LEAST_MEMORY: Final = 0.1
"""The share of the memory that stays available: the limit for queries beyond the usual slots."""
_MEMORY_LASTS: Final = 0.1
"""Seconds that one look at the memory holds: it takes some 100 us."""


class LoadMeter:
    """
    Measures the processors and the memory for one admission, and opens slots by that.

    It measures only while a query is held up in the queue, on the thread of the timers, and calls
    what `start` was given then: more may start. The lock of the admission guards `_runs`.
    """

    __slots__ = (
        "_admission",
        "_cpu_seconds",
        "_idle_seconds",
        "_interval",
        "_look",
        "_measured_at",
        "_memory_at",
        "_running",
        "_runs",
    )

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._look: Callable[[], object] | None = None  # only meanwhile: it belongs to the lane
        self._runs = False
        self._interval = _INTERVAL
        self._measured_at = self._cpu_seconds = 0.0
        self._idle_seconds: float | None = None
        self._running = 0
        self._memory_at = 0.0

    def start(self, look: Callable[[], object]) -> None:
        """Measure from now on, until no query waits, and call `look` each time."""
        admission = self._admission
        with admission.lock:
            # Admissions of a fixed number of slots open no more of them, whatever is measured.
            if self._runs or admission.limits.fixed or not admission.waiting:
                return
            self._runs = True
            self._look = look
        self._interval = _INTERVAL
        self._measure()
        self._go_on()

    def expire(self) -> None:
        """Measure, and let more queries start if processors are idle."""
        used, idle, running = self._measure()
        self.look_at_memory()
        admission = self._admission
        with admission.lock:
            # In one hold of the lock with the end: a thread that leaves a query in the queue from
            # now on finds that nothing measures, and starts it again.
            if not admission.waiting or admission.closed:
                admission.spare = 0
                self._runs, self._look = False, None
                return
            admission.spare = spare = admission.limits.spare(used, idle, running)
            look = self._look
        self._interval = _INTERVAL if spare else min(2 * self._interval, _LONGEST)
        # Without spare ones, too: one that has run for long makes room for those of its old size.
        if look is not None:
            look()
        self._go_on()

    def look_at_memory(self) -> None:
        """
        Note whether memory is short, unless that was looked at just now; with no lock held.

        While fewer queries run than the usual ones, or their number is fixed, it does not matter.
        """
        now, admission = perf_counter(), self._admission
        if admission.limits.fixed:
            return
        matters = admission.threads >= admission.limits.slots or admission.memory_is_short
        if matters and now - self._memory_at > _MEMORY_LASTS:
            admission.memory_is_short = available_memory() < _LEAST_MEMORY
            # Last: other threads would take what was known before for what is found just now.
            self._memory_at = now

    def reset_after_fork(self) -> None:
        """Measure no more in a forked child, which does not have the thread of the timers."""
        self._runs, self._look = False, None

    def _go_on(self) -> None:
        try:
            start_timer(self._interval, self)
        except RuntimeError:  # no thread can start: the next look at the queue tries it again
            self._runs, self._look = False, None
        except BaseException:  # Ctrl-C
            self._runs, self._look = False, None
            raise

    def _measure(self) -> tuple[float, float, float]:
        """Return the processors used and idle, and the running queries, since the last time."""
        admission, idle_seconds_before = self._admission, self._idle_seconds
        now, cpu_seconds, running = perf_counter(), admission.cpu_seconds(), admission.running
        seconds = max(now - self._measured_at, 1e-6)
        used = max(0.0, cpu_seconds - self._cpu_seconds) / seconds
        idle = admission.limits.processors - used
        # What this process does not use, another one may: then there is nothing to be had.
        self._idle_seconds = idle_seconds()
        if self._idle_seconds is not None and idle_seconds_before is not None:
            idle = min(idle, (self._idle_seconds - idle_seconds_before) / seconds)
        mean = (running + self._running) / 2
        self._measured_at, self._cpu_seconds, self._running = now, cpu_seconds, running
        return used, idle, mean
