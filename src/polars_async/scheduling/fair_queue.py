"""The order of waiting queries: a policy without clock or threads, so that it can be simulated."""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heappush
from math import inf
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

from polars_async.scheduling.sizes import (
    KINDS,
    SMALL_SIZE,
    UNKNOWN,
    UNKNOWN_LOAD,
    UNKNOWN_SIZE,
    Load,
    size_with,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

T = TypeVar("T")
_V = TypeVar("_V")

OVERTAKING_LIMIT: Final = 4.0
"""A query may be overtaken by at most this many times its own estimated work."""
FAIR_EVERY: Final = 8
"""One pick in so many may disregard priorities."""
PRIORITIES: Final = range(-10, 11)
QUICK: Final = 0.001
"""Seconds of work that are only a few times what estimating the query costs."""
QUICK_STREAK: Final = 8
"""After so many quick queries in a row the next may start without an estimate."""
_LONGEST_STREAK: Final = 8 * QUICK_STREAK
_GIL_WAIT: Final = 0.02
"""Seconds that a quick query may take since it has to wait for the GIL: a thread that computes
keeps it for 5 ms, and the loop and a few worker threads may be before it."""
_LEAST_WORK: Final = 1e-5
_MOST_WORK: Final = 60.0
"""Cap in seconds on the work used for the order, so that one wrong estimate cannot delay a query
for ever."""


class Picked(NamedTuple, Generic[T]):
    """The item that was picked to be next."""

    item: T
    load: Load
    overtook: bool
    """Whether an item that came before it still waits."""


class Entry(Generic[T]):
    """The entry of one item in the queue."""

    __slots__ = (
        "fingerprint",
        "item",
        "left",
        "load",
        "number",
        "overtaken",
        "pooled",
        "priority",
        "version",
        "work",
    )

    def __init__(
        self, item: T, priority: int, overtaken: float, number: int, *, pooled: bool
    ) -> None:
        self.item: T | None = item
        self.pooled = pooled
        self.priority = priority
        self.overtaken = overtaken
        self.number = number
        self.fingerprint: Hashable = None
        self.load = UNKNOWN_LOAD
        self.work = 0.0
        self.left = False
        self.version = 0  # how often it was ranked: heap items of earlier versions are stale

    def leave(self) -> None:
        """Drop the item, since a heap may hold the entry for long after it has left."""
        self.left = True
        self.item = None


# Key, number and version of an entry, and the entry, which may have left or been ranked anew.
_HeapItem = tuple[float, int, int, Entry[T]]


def _is_stale(heap_item: _HeapItem[T]) -> bool:
    return heap_item[3].left or heap_item[3].version != heap_item[2]


def _first(items: OrderedDict[T, _V], *, from_behind: bool = False) -> tuple[T, _V] | None:
    while True:
        try:
            return next(reversed(items.items()) if from_behind else iter(items.items()), None)
        except RuntimeError:  # a discard came in between
            pass


class FairQueue(Generic[T]):
    """
    The waiting items, and the policy which of them is next.

    An item comes without an estimate, and takes part in the order once it is ranked by one; an item
    with a priority, or of known work, is ranked when it comes. Its key is the overtaking work done
    before it arrived plus `OVERTAKING_LIMIT` times its own work, as a virtual finish time in fair
    queueing. The lowest key is next. So small items overtake large ones, and yet no item waits for
    ever: once `OVERTAKING_LIMIT` times its work has overtaken it, all that comes later has a higher
    key, however small it is.

    Of the items that fit beside what runs, a higher priority goes first. But the one with the
    lowest key is passed over fewer than `FAIR_EVERY` times, so that no priority locks another out.
    An item is small if it has little work, or, where the caller knows better, if its priority is
    above 0; never if it is below. One that takes more than `small_memory` bytes is none of those
    that go on while another waits for memory, nor do they wait behind it.

    While all that ran was quick there is little to order, and items may be taken without an
    estimate.

    One thread at a time may call the methods, but `discard` may interrupt any of them, from a
    signal handler.
    """

    __slots__ = (
        "_entries",
        "_heap_items",
        "_heaps",
        "_number",
        "_oldest",
        "_overtaken",
        "_passed_over",
        "_quick_streak",
        "_ranked",
        "_small_memory",
        "_unestimated",
    )

    def __init__(self, small_memory: float = inf) -> None:
        self._small_memory = small_memory
        # The overtaking work before each, its number, whether it is pooled, and its priority; it
        # gets an entry to be ranked.
        self._unestimated: OrderedDict[T, tuple[float, int, bool, int]] = OrderedDict()
        self._entries: OrderedDict[T, Entry[T]] = OrderedDict()
        self._oldest: list[tuple[int, Entry[T]]] = []  # a heap by number
        # By priority, kind, and whether they take much memory.
        self._heaps: dict[tuple[int, int, bool], list[_HeapItem[T]]] = {}
        self._heap_items = 0
        self._ranked: list[dict[Entry[T], None]] = [{} for _ in range(KINDS)]  # by kind
        self._overtaken = 0.0
        self._number = 0
        self._passed_over = [0] * KINDS
        self._quick_streak = 0

    def __len__(self) -> int:
        return len(self._unestimated) + len(self._entries)

    def __iter__(self) -> Iterator[T]:
        # A signal handler that runs during `next_unestimated` may see an item in both maps.
        return iter(dict.fromkeys([*list(self._entries), *list(self._unestimated)]))

    @property
    def is_quick(self) -> bool:
        """Whether nearly all of the last items that ran were quick."""
        return self._quick_streak >= QUICK_STREAK

    @property
    def kinds(self) -> list[int]:
        """How many items with an estimate there are of each kind."""
        return [len(ranked) for ranked in self._ranked]

    @property
    def has_ranked(self) -> bool:
        """Whether an item with an estimate may be here."""
        return self._heap_items > 0

    @property
    def work(self) -> float:
        """The work of all items, in seconds, by their estimates; takes time for each."""
        known = sum(entry.work for entry in list(self._entries.values()))
        return known + UNKNOWN * len(self._unestimated)

    @property
    def came(self) -> int:
        """How many items have come so far."""
        return self._number

    @property
    def is_undecided(self) -> bool:
        """Whether an item without an estimate may be first, since none is known to be small."""
        if not self._unestimated:
            return False
        return not any(heap and kind <= SMALL_SIZE for (_, kind, _), heap in self._heaps.items())

    def add(
        self,
        item: T,
        *,
        priority: int = 0,
        work: float | None = None,
        share: float | None = None,
        pooled: bool = False,
        memory: int | None = 0,
    ) -> None:
        """
        Add `item`, without an estimate unless it has a priority or known `work`.

        With None for its `memory`, a priority alone is not enough.
        """
        self._number += 1
        came = self._overtaken, self._number, pooled, priority
        if memory is not None and (priority or work is not None):
            # A priority says enough without an estimate: among equal ones the first is next.
            entry = self._enter(item, *came)
            self._set_key(entry, UNKNOWN if work is None else work, share, memory)
        else:
            self._unestimated[item] = came

    def has_unestimated_since(self, number: int) -> bool:
        """Return whether an item without an estimate came after so many others."""
        last = _first(self._unestimated, from_behind=True)
        return last is not None and last[1][1] > number

    def next_unestimated(self, *, from_behind: bool = False, since: int = 0) -> Entry[T] | None:
        """
        Return an entry for the first item without an estimate, or the last; None if all have one.

        Only an item that came `since` so many others is looked for. The caller estimates its work,
        for which it needs no lock and takes its time, and calls `rank`.
        """
        while (found := _first(self._unestimated, from_behind=from_behind)) is not None:
            item, came = found
            if came[1] <= since:
                return None
            entry = self._enter(item, *came)
            if self._unestimated.pop(item, None) is not None:
                return entry
            self.discard(item)  # again: a signal handler did so before the item had its entry
        return None

    def _enter(
        self,
        item: T,
        overtaken: float,
        number: int,
        pooled: bool,  # noqa: FBT001
        priority: int,
    ) -> Entry[T]:
        entry = self._entries[item] = Entry(item, priority, overtaken, number, pooled=pooled)
        if len(self._oldest) > 2 * len(self._entries) + 64:  # most of them have left
            self._oldest = [heap_item for heap_item in self._oldest if not heap_item[1].left]
            heapify(self._oldest)
        heappush(self._oldest, (number, entry))
        return entry

    def rank(
        self,
        entry: Entry[T],
        work: float,
        fingerprint: Hashable = None,
        share: float | None = None,
        memory: int = 0,
    ) -> None:
        """
        Let the item of `entry` take part in the order.

        `work` is the estimate in seconds, `share` that of the processors which the item keeps busy,
        if it is known, and `memory` the bytes that it takes. `fingerprint` is what all items of the
        same estimate have in common; None if that is not known.
        """
        if entry.left:
            return
        entry.fingerprint = fingerprint
        self._set_key(entry, work, share, memory)

    def re_estimate(
        self, fingerprint: Hashable, work: float, share: float | None = None, memory: int = 0
    ) -> None:
        """Rank all items of `fingerprint` anew by a corrected estimate, as those to come will."""
        for entry in list(self._entries.values()):
            if entry.fingerprint == fingerprint and entry.version:
                self._set_key(entry, work, share, memory)

    def take(
        self,
        fits: Callable[[Load], bool],
        lacks_memory: Callable[[T, Load], bool] | None = None,
    ) -> Picked[T] | None:
        """
        Remove and return the next item of those whose load `fits`; None if there is none.

        `lacks_memory` says whether all that an item wants for is memory. Of those that would be
        next but for that, none is overtaken but by small items: it might never have room else.
        """
        while True:
            held_up = inf if lacks_memory is None else self.first_without_memory(lacks_memory)
            first: tuple[int, float, int] | None = None  # of the highest priority
            lowest: tuple[float, int, int] | None = None
            best = fair = None
            for (priority, kind, much), heap in self._heaps.items():
                self._drop_stale(heap)
                # Of each kind only the first: if a later one that takes less went before it again
                # and again, there might never be room for the first.
                if not heap or not fits(heap[0][3].load):
                    continue
                key, number = heap[0][:2]
                if key > held_up and (much or kind > SMALL_SIZE):
                    continue
                if first is None or (-priority, key, number) < first:
                    first, best = (-priority, key, number), heap
                if lowest is None or (key, number, kind) < lowest:
                    lowest, fair = (key, number, kind), heap
            if best is None or fair is None or lowest is None:
                return None
            kind = lowest[2]
            passes = best is not fair and self._passed_over[kind] + 1 < FAIR_EVERY
            entry = heappop(best if passes else fair)[3]
            self._heap_items -= 1
            item = entry.item
            # Else a signal handler has discarded it.
            if item is not None and self._entries.pop(item, None) is not None:
                self._drop(entry)
                # By kind: where the lowest keys of two kinds took turns at being passed over, one
                # count of both could leave all the fair picks to one of them.
                self._passed_over[kind] = self._passed_over[kind] + 1 if passes else 0
                return Picked(item, entry.load, self._is_overtaking(entry))

    def first_without_memory(self, lacks_memory: Callable[[T, Load], bool]) -> float:
        """Return the lowest key of the items that want for memory alone, if there are any."""
        lowest = inf
        for heap in self._heaps.values():
            self._drop_stale(heap)
            if heap:
                entry = heap[0][3]
                item = entry.item
                if item is not None and lacks_memory(item, entry.load):
                    lowest = min(lowest, heap[0][0])
        return lowest

    def has_fitting(self, fits: Callable[[Load], bool]) -> bool:
        """Return whether an item may be taken, or has no estimate yet."""
        if self._unestimated:
            return True
        for heap in self._heaps.values():
            self._drop_stale(heap)
            if heap and fits(heap[0][3].load):
                return True
        return False

    def _drop_stale(self, heap: list[_HeapItem[T]]) -> None:
        while heap and _is_stale(heap[0]):
            heappop(heap)
            self._heap_items -= 1

    def take_quickly(
        self, fits: Callable[[Load], bool] | None, *, unestimated: bool
    ) -> Picked[T] | None:
        """
        Remove and return the next item without estimating any; None if none may go like that.

        That is for a row of quick items. With `unestimated` the item may be one without an
        estimate. `fits` may be None unless the queue `has_ranked` items.
        """
        if not self.is_quick:
            return None
        if fits is not None and self._heap_items:
            large = any(
                heap for (_, kind, much), heap in self._heaps.items() if much or kind > SMALL_SIZE
            )
            return None if large or self.is_undecided else self.take(fits)
        return self._take_unestimated() if unestimated else None

    def take_single(self, fits: Callable[[Load], bool]) -> Picked[T] | None:
        """
        Remove and return the only item without an estimate; None if there are others.

        Nothing depends on its estimate then, if there is room for it whatever it takes.
        """
        first = _first(self._unestimated)
        if first is None or len(self) > 1 or not fits(Load(UNKNOWN_SIZE, None, first[1][2])):
            return None
        return self._take_unestimated()

    def take_unpooled(self, starts: Callable[[bool], bool]) -> Picked[T] | None:
        """Remove and return the first item without an estimate, if it starts and is not pooled."""
        first = _first(self._unestimated)
        if first is None or first[1][2] or not starts(False):  # noqa: FBT003  # as in `Load`
            return None
        return self._take_unestimated()

    def _take_unestimated(self) -> Picked[T] | None:
        try:
            item, (_, _, pooled, _) = self._unestimated.popitem(last=False)
        except KeyError:  # there is none
            return None
        return Picked(item, Load(UNKNOWN_SIZE, None, pooled), overtook=False)

    def discard(self, item: T) -> bool:
        """Remove `item`; return False if it is not here."""
        if self._unestimated.pop(item, None) is not None:
            return True
        entry = self._entries.pop(item, None)
        if entry is None:
            return False
        self._drop(entry)
        return True

    def note_ended(self, seconds: float, *, overtook: bool, completed: bool = True) -> None:
        """
        Note that an item ran for `seconds`, and whether it `overtook` others.

        One that was quick only because it was not `completed` says nothing of the next. One that
        may have waited for the GIL ends no long streak: while a loop submits thousands of queries,
        that is one in thirty.
        """
        if seconds > QUICK:
            lost = QUICK_STREAK if seconds <= _GIL_WAIT else self._quick_streak
            self._quick_streak = max(0, self._quick_streak - lost)
        elif completed:
            self._quick_streak = min(self._quick_streak + 1, _LONGEST_STREAK)
        if overtook:
            self._overtaken += max(_LEAST_WORK, seconds)

    def clear(self) -> None:
        """Remove all items."""
        for entry in list(self._entries.values()):
            self._drop(entry)
        self._entries.clear()
        self._unestimated.clear()
        self._oldest.clear()
        self._heaps.clear()
        self._heap_items = 0

    def _set_key(self, entry: Entry[T], work: float, share: float | None, memory: int) -> None:
        self._ranked[entry.load.kind].pop(entry, None)
        size = size_with(entry.priority, work)
        entry.load = Load(size, share, entry.pooled, memory)
        entry.work = work
        entry.version += 1
        key = entry.overtaken + OVERTAKING_LIMIT * min(max(_LEAST_WORK, work), _MOST_WORK)
        if self._heap_items > 2 * len(self._entries) + 64:  # most of them have left
            self._sweep()
        much = memory > self._small_memory
        heap = self._heaps.setdefault((entry.priority, entry.load.kind, much), [])
        heappush(heap, (key, entry.number, entry.version, entry))
        self._heap_items += 1
        ranked = self._ranked[entry.load.kind]
        ranked[entry] = None
        if entry.left:  # last: a signal handler may have discarded it meanwhile
            ranked.pop(entry, None)

    def _drop(self, entry: Entry[T]) -> None:
        entry.leave()
        self._ranked[entry.load.kind].pop(entry, None)

    def _is_overtaking(self, entry: Entry[T]) -> bool:
        next_unestimated = _first(self._unestimated)
        if next_unestimated is not None and next_unestimated[1][1] < entry.number:
            return True
        while self._oldest and self._oldest[0][1].left:
            heappop(self._oldest)
        return bool(self._oldest) and self._oldest[0][0] < entry.number

    def _sweep(self) -> None:
        for heap in self._heaps.values():
            heap[:] = [heap_item for heap_item in heap if not _is_stale(heap_item)]
            heapify(heap)
        self._heap_items = sum(map(len, self._heaps.values()))
