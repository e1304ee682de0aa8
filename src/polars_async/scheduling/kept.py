"""Results that are kept for a while, for equal queries to come."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakSet, ref

from polars_async._runtime.fork import Step, in_child, new_lock
from polars_async._runtime.frames import frames_of, size_of
from polars_async._runtime.timers import start_timer
from polars_async._runtime.unpatched import holding

if TYPE_CHECKING:
    from collections.abc import Hashable

    from polars_async.resolution import Resolution

_OVERHEAD: Final = 4096
"""Bytes that count for each result beside its own: of its plan, and of objects of Python."""


class Kept(NamedTuple):
    """A result that is kept."""

    value: Any
    resolution: Resolution
    """Of the query that has run."""
    query_id: int
    size: int
    until: float
    """When it is dropped, by `monotonic`."""


class Results:
    """
    The last results of a collector, each for so many `seconds`, `most_bytes` in all.

    Beyond that the one that was used least recently is dropped. A timer drops those whose time is
    up, so that they hold no memory while no query comes.
    """

    def __init__(self, seconds: float, most_bytes: int) -> None:
        self._seconds: Final = seconds
        self._most_bytes: Final = most_bytes
        self._lock = new_lock()
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._size = 0
        self._is_timed = False
        _all.add(self)

    @property
    def size(self) -> int:
        """The bytes of all results, as estimated."""
        return self._size

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Kept | None:
        """Return the result for `key`, if it is here and its time is not up."""
        return holding(self._lock, self._get, key)

    def put(self, key: Hashable, value: object, resolution: Resolution, query_id: int) -> None:
        """Keep `value` for `key`, unless it is too large."""
        size = sum(map(size_of, frames_of(value))) + _OVERHEAD
        if size <= self._most_bytes:
            until = monotonic() + self._seconds
            holding(self._lock, self._put, key, Kept(value, resolution, query_id, size, until))
            self._start_timer()

    def discard(self, key: Hashable) -> None:
        """Drop the result for `key`."""
        holding(self._lock, self._drop, key)

    def clear(self) -> None:
        """Drop all results."""
        holding(self._lock, self._clear)

    def drop_old(self) -> None:
        """Drop the results whose time is up; called by the timer."""
        holding(self._lock, self._drop_old)
        self._start_timer()

    def _get(self, key: Hashable) -> Kept | None:
        found = self._kept.get(key)
        if found is None or found.until <= monotonic():
            return None
        with suppress(KeyError):  # a signal handler has cleared it meanwhile
            self._kept.move_to_end(key)
        return found

    def _put(self, key: Hashable, kept: Kept) -> None:
        self._drop(key)
        self._kept[key] = kept
        self._size += kept.size
        with suppress(KeyError):  # a finaliser has cleared it meanwhile
            while self._size > self._most_bytes:
                self._size -= self._kept.popitem(last=False)[1].size
        if not self._kept:
            self._size = 0

    def _drop(self, key: Hashable) -> None:
        dropped = self._kept.pop(key, None)
        if dropped is not None:
            self._size -= dropped.size

    def _clear(self) -> None:
        self._kept.clear()
        self._size = 0

    def _drop_old(self) -> None:
        self._is_timed = False
        now = monotonic()
        for key in list(self._kept):
            kept = self._kept.get(key)
            if kept is not None and kept.until <= now:
                self._drop(key)

    def _start_timer(self) -> None:
        seconds = holding(self._lock, self._seconds_to_next)
        if seconds is not None:
            try:
                start_timer(seconds, _Sweep(self))
            except RuntimeError:  # no thread can start: the next result tries it again
                self._is_timed = False

    def _seconds_to_next(self) -> float | None:
        """Return in how many seconds the next result is to be dropped, if a timer is needed."""
        if self._is_timed or not self._kept:
            return None
        self._is_timed = True
        return max(0.0, min([kept.until for kept in list(self._kept.values())]) - monotonic())

    def reset_after_fork(self) -> None:
        """Drop all results: their timer is the parent's, and no query runs in most children."""
        self._clear()
        self._is_timed = False


class _Sweep:
    """What the timer calls. It does not keep the results of a collector that was dropped."""

    def __init__(self, results: Results) -> None:
        self._results = ref(results)

    def expire(self) -> None:
        if (results := self._results()) is not None:
            results.drop_old()


_all: Final[WeakSet[Results]] = WeakSet()


def _reset_after_fork() -> None:
    for results in list(_all):
        results.reset_after_fork()


in_child(Step.FORGET, _reset_after_fork)
