"""The order of the waiting line: a policy without clock or threads, so it can be simulated."""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

T = TypeVar("T")
_V = TypeVar("_V")

UNKNOWN: Final = 0.1
"""Seconds of work expected of a query of which nothing is known."""
SMALL: Final = 0.01
"""Seconds of expected work up to which a query counts as small."""
OVERTAKING_LIMIT: Final = 4.0
"""How many times its own expected work a query lets others overtake."""
FAIR_EVERY: Final = 8
"""One turn in so many disregards priorities."""
PRIORITIES: Final = range(-10, 11)
RESERVED_FOR_SMALL: Final = 2
"""So many slots are kept for small queries: one query that is not has all threads of Polars busy,
and small ones use no more than one each."""
RESERVED_FOR_ESTIMATED: Final = 1
"""So many slots are for nobody of whom nothing is known."""
QUICK: Final = 0.001
"""Seconds of work that are no more than a few times those that it takes to appraise it."""
QUICK_STREAK: Final = 8
"""After so many quick ones in a row, the next is taken unseen."""
_LEAST_WORK: Final = 1e-5
_MOST_WORK: Final = 60.0
"""Seconds; more patience than for these nobody needs to have, whatever was expected."""


def large_at_once(slots: int) -> int:
    """Return how many queries that are not small run at once in so many slots."""
    return max(1, slots - (RESERVED_FOR_SMALL if slots > RESERVED_FOR_SMALL else 1))


def is_reserved(reserved: int, slots: int, large_running: int) -> bool:
    """
    Tell whether the next free one of `slots` is among those `reserved`, and so for small queries only.

    `large_running` are taken by others. However few slots there are, one is for anybody.
    """
    return slots > 1 and large_running >= max(1, slots - reserved)


class Picked(NamedTuple, Generic[T]):
    """Who is next."""

    item: T
    small: bool
    overtook: bool
    """Whether somebody who came before still waits."""


class Entry(Generic[T]):
    """Where one item stands; made by `FairQueue.add`."""

    __slots__ = ("item", "kind", "left", "number", "overtaken", "priority", "small", "version")

    def __init__(self, item: T, priority: int, overtaken: float, number: int) -> None:
        self.item: T | None = item
        self.priority = priority
        self.overtaken = overtaken
        self.number = number
        self.kind: Hashable = None
        self.small = False
        self.left = False
        self.version = 0  # how often it was appraised

    def leave(self) -> None:
        """Let go of the item, since a heap may hold the place for long."""
        self.left = True
        self.item = None


# An item's mark, number and version, and its place: which may have left, or moved on.
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
    Who waits, and who is next.

    An item comes to the line as a newcomer, of which nothing is known, and takes part once its
    work was appraised; one that has a priority, or whose work is known, does so at once. It then
    has a mark: the work that had overtaken anybody when it came, and
    `OVERTAKING_LIMIT` times its own. The lowest mark is next. So what is small overtakes what is not, and
    yet nothing is overtaken for ever: once `OVERTAKING_LIMIT` times an item's work overtook, all that comes
    has a higher mark, however small it is.

    A higher priority comes first, but every `FAIR_EVERY`-th turn goes by the marks alone, so that
    no priority keeps another out for ever. An item is small if it has little work, or, where the
    caller knows better, if its priority is above 0; never if it is below.

    While all that ran was quick there is little to order, and newcomers are taken unseen.

    Callers see to it that one thread at a time is in here, but `discard` may interrupt any other
    method.
    """

    __slots__ = (
        "_entries",
        "_heap_items",
        "_heaps",
        "_number",
        "_oldest",
        "_overtaken",
        "_picks",
        "_quick_streak",
        "_unestimated",
    )

    def __init__(self) -> None:
        # The overtaken work and number of each; a place it gets when it is appraised.
        self._unestimated: OrderedDict[T, tuple[float, int]] = OrderedDict()
        self._entries: OrderedDict[T, Entry[T]] = OrderedDict()
        self._oldest: list[tuple[int, Entry[T]]] = []  # a heap of the places by their numbers
        self._heaps: dict[tuple[int, bool], list[_HeapItem[T]]] = {}
        self._heap_items = 0
        self._overtaken = 0.0
        self._number = 0
        self._picks = [0, 0]  # those for anybody, and those for small ones only
        self._quick_streak = 0

    def __len__(self) -> int:
        return len(self._unestimated) + len(self._entries)

    def __iter__(self) -> Iterator[T]:
        # Whoever interrupts `unestimated` may find one in both.
        return iter(dict.fromkeys([*list(self._entries), *list(self._unestimated)]))

    @property
    def is_quick(self) -> bool:
        """Whether all that ran of late was quick."""
        return self._quick_streak >= QUICK_STREAK

    @property
    def has_unestimated(self) -> bool:
        """Whether somebody still has to be appraised."""
        return bool(self._unestimated)

    @property
    def is_undecided(self) -> bool:
        """Whether a newcomer may be first, since nobody is known to be small."""
        if not self._unestimated:
            return False
        return not any(heap and small for (_, small), heap in self._heaps.items())

    def add(self, item: T, *, priority: int = 0, work: float | None = None) -> None:
        """Let `item` into the line, as a newcomer unless it has a priority or known `work`."""
        self._number += 1
        came = self._overtaken, self._number
        if priority or work is not None:
            # With a priority it needs no appraisal; among equals the order is that of their coming.
            self._set_key(self._enter(item, priority, *came), UNKNOWN if work is None else work)
        else:
            self._unestimated[item] = came

    def next_unestimated(self, *, from_behind: bool = False) -> Entry[T] | None:
        """
        Give a place to the first newcomer, or the last, to be appraised; None if there is none.

        Not under a lock, since to appraise it takes its time.
        """
        while (found := _first(self._unestimated, from_behind=from_behind)) is not None:
            item, came = found
            entry = self._enter(item, 0, *came)
            if self._unestimated.pop(item, None) is not None:
                return entry
            self.discard(item)  # it was discarded just now
        return None

    def _enter(self, item: T, priority: int, overtaken: float, number: int) -> Entry[T]:
        entry = self._entries[item] = Entry(item, priority, overtaken, number)
        if len(self._oldest) > 2 * len(self._entries) + 64:  # most of them have left
            self._oldest = [heap_item for heap_item in self._oldest if not heap_item[1].left]
            heapify(self._oldest)
        heappush(self._oldest, (number, entry))
        return entry

    def rank(self, entry: Entry[T], work: float, kind: Hashable = None) -> None:
        """
        Give a newcomer its mark.

        `work` is what it is expected to take, in seconds, and `kind` what it has in common with
        those that are expected to take the same; None if that is not known.
        """
        if entry.left:
            return
        entry.kind = kind
        self._set_key(entry, work)

    def re_estimate(self, kind: Hashable, work: float) -> None:
        """Give all of `kind` a new mark, so that they do not lose their order to newcomers."""
        for entry in list(self._entries.values()):
            if entry.kind == kind and entry.version:
                self._set_key(entry, work)

    def take(self, *, only_small: bool) -> Picked[T] | None:
        """Take the next out of the line; None if nobody may go."""
        # Either kind of turn is counted by itself: their rhythm could keep a priority out for ever.
        fair = (self._picks[only_small] + 1) % FAIR_EVERY == 0
        while True:
            best: list[_HeapItem[T]] | None = None
            rank: tuple[int, float, int] | None = None
            for (priority, small), heap in self._heaps.items():
                while heap and _is_stale(heap[0]):
                    heappop(heap)
                    self._heap_items -= 1
                if heap and (small or not only_small):
                    ranked = (0 if fair else -priority, *heap[0][:2])
                    if rank is None or ranked < rank:
                        best, rank = heap, ranked
            if best is None:
                return None
            self._heap_items -= 1
            entry = heappop(best)[3]
            item = entry.item
            if (
                item is not None and self._entries.pop(item, None) is not None
            ):  # or it left just now
                entry.leave()
                self._picks[only_small] += 1
                return Picked(item, entry.small, self._is_overtaking(entry))

    def take_quickly(self, *, only_small: bool, unestimated: bool) -> Picked[T] | None:
        """
        Take the next without an appraisal, while all that ran was quick; None if none may go.

        `unestimated` tells whether it may be one of which nothing is known.
        """
        if not self.is_quick:
            return None
        if self._heap_items:
            large = any(heap for (_, small), heap in self._heaps.items() if not small)
            return None if large or self.is_undecided else self.take(only_small=only_small)
        if not unestimated:
            return None
        try:
            item, _ = self._unestimated.popitem(last=False)
        except KeyError:  # there is none
            return None
        return Picked(item, small=False, overtook=False)

    def discard(self, item: T) -> None:
        """Let `item` go, wherever it stands; what is not here stays not here."""
        if self._unestimated.pop(item, None) is None:
            entry = self._entries.pop(item, None)
            if entry is not None:
                entry.leave()

    def note_ended(self, seconds: float, *, overtook: bool, completed: bool = True) -> None:
        """Note that a turn is over, and what it took; not `completed`, it tells of no other."""
        if completed or seconds > QUICK:
            self._quick_streak = self._quick_streak + 1 if seconds <= QUICK else 0
        if overtook:
            self._overtaken += max(_LEAST_WORK, seconds)

    def clear(self) -> None:
        """Let everybody go."""
        for entry in list(self._entries.values()):
            entry.leave()
        self._entries.clear()
        self._unestimated.clear()
        self._oldest.clear()
        self._heaps.clear()
        self._heap_items = 0

    def _set_key(self, entry: Entry[T], work: float) -> None:
        entry.small = entry.priority > 0 or (entry.priority == 0 and work <= SMALL)
        entry.version += 1
        key = entry.overtaken + OVERTAKING_LIMIT * min(max(_LEAST_WORK, work), _MOST_WORK)
        if self._heap_items > 2 * len(self._entries) + 64:  # most of them have left
            self._sweep()
        heap = self._heaps.setdefault((entry.priority, entry.small), [])
        heappush(heap, (key, entry.number, entry.version, entry))
        self._heap_items += 1

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
