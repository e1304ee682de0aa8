"""How much work a query is expected to be: by what its plan reads, and how long it took before."""

from __future__ import annotations

import os
import re
from math import frexp
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import ref

from polars_async._native import allocate_lock
from polars_async._upstream import plan_sources

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

UNKNOWN: Final = 0.1
"""Seconds expected of a query of which nothing is known."""
_FRAME_RATE: Final = 200e6
"""Bytes per second that a query makes of a frame in memory: just the order of magnitude."""
_SENT_RATE: Final = 50e6
"""Bytes per second of frames in memory that Polars packs, and unpacks elsewhere."""
_FILE_RATE: Final = 50e6
"""Bytes per second that a query makes of a file."""
_SLOWDOWN: Final = 1000
"""How many times longer a query may take beside others: a tiny one waits for all the tasks of the
heavy ones in Polars' own thread pool."""
_HELD_UP: Final = 0.02
"""Seconds that a query may have waited for the GIL alone, four times its switch interval, while a
loop was busy: a tiny one must not count as large for that."""
_NO_TIME: Final = 0.001
"""Seconds below which it makes no difference."""
_MOST_KNOWN: Final = 4096
_NUMBER: Final = re.compile(r"\d+")


class Expectation(NamedTuple):
    """What is expected of one query."""

    seconds: float
    fingerprint: int | None
    """What stands for all queries of this shape and size; None if that is not to be had."""


class _Plan(NamedTuple):
    seconds: float
    shape: int
    frame_bytes: int


class Expectations:
    """
    What a collector knows of the queries that it ran.

    `of` may open the files that a query scans, and so is nothing for the thread of a loop.
    """

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._taken: dict[int, float] = {}
        self._plans: dict[int, tuple[ref[pl.LazyFrame], _Plan]] = {}

    def of(self, frames: Sequence[pl.LazyFrame], engine: str) -> Expectation:
        """Say what to expect of a query for `frames`; never raises."""
        try:
            plans = [self._plan(frame) for frame in frames]
            fingerprint = hash((engine, *(plan.shape for plan in plans)))
            seconds = self._taken.get(fingerprint)
            if seconds is None:
                seconds = sum(plan.seconds for plan in plans)
        except BaseException:  # noqa: BLE001  # what is wrong with a plan, the query will tell
            return Expectation(UNKNOWN, None)
        return Expectation(seconds, fingerprint)

    def seconds_to_send(self, frames: Sequence[pl.LazyFrame]) -> float:
        """Say how long it takes to send a query, which `of` was asked for, to another process."""
        try:
            return sum(self._plan(frame).frame_bytes for frame in frames) / _SENT_RATE
        except BaseException:  # noqa: BLE001  # as above
            return 0.0

    def learn(self, expected: Expectation, seconds: float, *, alone: bool) -> Expectation | None:
        """
        Correct what was expected of a query by the `seconds` that it took.

        `alone` tells that no other query ran meanwhile, so that this is what it takes, but for its
        waits for the GIL. Beside others it says no more than that the query takes no longer, nor
        less by orders of magnitude.
        Gives the new expectation, or None where the old one was not off by half.
        """
        if expected.fingerprint is None or (seconds <= _NO_TIME and expected.seconds <= _NO_TIME):
            return None
        least = seconds - _HELD_UP if alone else seconds / _SLOWDOWN
        with self._lock:
            before = self._taken.pop(expected.fingerprint, expected.seconds)
            fits = least / 2 <= max(before, _NO_TIME) and before <= max(2 * seconds, _NO_TIME)
            now = before if fits else min(max(before, least), seconds)
            self._taken[expected.fingerprint] = now
            if len(self._taken) > _MOST_KNOWN:
                del self._taken[next(iter(self._taken))]
        return None if fits else Expectation(now, expected.fingerprint)

    def _plan(self, frame: pl.LazyFrame) -> _Plan:
        # A frame that is collected again and again is looked at once.
        key = id(frame)
        known = self._plans.get(key)
        if known is not None and known[0]() is frame:
            return known[1]
        plan = _look_at(frame)
        plans = self._plans
        plans[key] = ref(frame, lambda _: plans.pop(key, None)), plan
        return plan


def _look_at(frame: pl.LazyFrame) -> _Plan:
    text = frame.explain(optimized=False)  # first, see plan_sources
    sources = plan_sources(frame)
    seconds = sources.frame_bytes / _FRAME_RATE + sum(map(_file_seconds, sources.paths))
    if not sources.complete:
        seconds = max(seconds, UNKNOWN)
    _, magnitude = frexp(seconds)
    shape = hash((_NUMBER.sub("0", text), magnitude))
    return _Plan(seconds, shape, sources.frame_bytes)


def _file_seconds(path: str) -> float:
    try:
        return os.stat(path).st_size / _FILE_RATE  # noqa: PTH116  # as given, maybe an address
    except (OSError, ValueError):
        return UNKNOWN
