"""The order of the waiting line: a policy without clock or threads, so it can be simulated."""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

T = TypeVar("T")

SMALL: Final = 0.01
"""Seconds of expected work up to which a query counts as small."""
PATIENCE: Final = 4.0
"""How many times its own expected work a query lets later ones be served before itself."""
FAIR_TURN: Final = 8
"""One turn in so many disregards priorities."""
PRIORITIES: Final = range(-10, 11)
_LEAST_WORK: Final = 1e-5


def kept_for_small(long_running: int, slots: int) -> bool:
    """Tell whether the next free slot is one for small queries; `long_running` are not small."""
    return slots > 1 and long_running >= slots - 1


class Place(Generic[T]):
    """Where one item stands; made by `Line.add`."""

    __slots__ = ("item", "kind", "left", "mark", "number", "priority", "served_before", "small")

    def __init__(self, item: T, priority: int, served_before: float, number: int) -> None:
        self.item = item
        self.kind: Hashable = None
        self.priority = priority
        self.served_before = served_before
        self.number = number
        self.mark = 0.0
        self.small = False
        self.left = False

    def __lt__(self, other: Place[T]) -> bool:
        return (self.mark, self.number) < (other.mark, other.number)


class Line(Generic[T]):
    """
    Who waits, and who is next.

    An item comes to the line as a newcomer, of which nothing is known, and takes part once its
    work was appraised. It then has a mark: the work that had been served when it came, and
    `PATIENCE` times its own. The lowest mark is next. So what is small overtakes what is not, and
    yet nothing is overtaken for ever: what comes after `PATIENCE` times an item's work was served
    has a higher mark, however small it is.

    A higher priority comes first, but every `FAIR_TURN`-th turn goes by the marks alone, so that
    no priority keeps another out for ever. An item is small if it has little work, or, where the
    caller knows better, if its priority is above 0; never if it is below.

    Callers see to it that one thread at a time is in here, but `discard` may interrupt any other
    method.
    """

    __slots__ = (
        "_heaps",
        "_kinds",
        "_newcomers",
        "_number",
        "_places",
        "_served",
        "_sorted_in",
        "_turns",
    )

    def __init__(self) -> None:
        self._places: dict[T, Place[T]] = {}
        self._newcomers: deque[Place[T]] = deque()
        self._heaps: dict[tuple[int, bool], list[Place[T]]] = {}
        self._kinds: dict[Hashable, dict[T, None]] = {}
        self._sorted_in = 0
        self._served = 0.0
        self._number = 0
        self._turns = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._places))

    @property
    def has_newcomers(self) -> bool:
        """Whether somebody may still have to be appraised."""
        return bool(self._newcomers)

    def add(self, item: T, *, priority: int = 0) -> None:
        """Let `item` into the line, as a newcomer."""
        self._number += 1
        place = Place(item, priority, self._served, self._number)
        self._places[item] = place
        self._newcomers.append(place)

    def newcomers(self, at_most: int) -> list[Place[T]]:
        """Take out newcomers to be appraised: outside of any lock, since that takes its time."""
        found: list[Place[T]] = []
        while self._newcomers and len(found) < at_most:
            place = self._newcomers.popleft()
            if not place.left:
                found.append(place)
        return found

    def sort_in(self, place: Place[T], work: float, kind: Hashable = None) -> None:
        """
        Give a newcomer its mark.

        `work` is what it is expected to take, in seconds, and `kind` what it has in common with
        those that are expected to take the same; None if that is not known.
        """
        place.kind = kind
        if kind is not None:
            self._kinds.setdefault(kind, {})[place.item] = None
        if place.left:
            self._forget_kind(place)
            return
        place.small = place.priority > 0 or (place.priority == 0 and work <= SMALL)
        place.mark = place.served_before + PATIENCE * max(work, _LEAST_WORK)
        if self._sorted_in > 2 * len(self._places) + 64:  # most of them have left
            self._sweep()
        heappush(self._heaps.setdefault((place.priority, place.small), []), place)
        self._sorted_in += 1

    def reappraise(self, kind: Hashable, work: float) -> None:
        """Give all of `kind` a new mark, so that they do not lose their order to newcomers."""
        for item in list(self._kinds.get(kind, ())):
            old = self._places.get(item)
            if old is not None:
                old.left = True
                place = Place(item, old.priority, old.served_before, old.number)
                self._places[item] = place
                self.sort_in(place, work, kind)

    def take(self, *, only_small: bool) -> tuple[T, bool] | None:
        """Take the next out of the line, and say whether it is small; None if nobody may go."""
        fair = (self._turns + 1) % FAIR_TURN == 0
        best: list[Place[T]] | None = None
        rank: tuple[int, float, int] | None = None
        for (priority, small), heap in self._heaps.items():
            while heap and heap[0].left:
                heappop(heap)
                self._sorted_in -= 1
            if heap and (small or not only_small):
                ranked = (0 if fair else -priority, heap[0].mark, heap[0].number)
                if rank is None or ranked < rank:
                    best, rank = heap, ranked
        if best is None:
            return None
        self._turns += 1
        self._sorted_in -= 1
        place = heappop(best)
        self.discard(place.item)
        return place.item, place.small

    def discard(self, item: T) -> None:
        """Let `item` go, wherever it stands; what is not here stays not here."""
        place = self._places.pop(item, None)
        if place is None:
            return
        place.left = True
        self._forget_kind(place)

    def serve(self, seconds: float) -> None:
        """Note that so much work was served."""
        self._served += max(seconds, _LEAST_WORK)

    def clear(self) -> None:
        """Let everybody go."""
        for place in self._places.values():
            place.left = True
        self._places.clear()
        self._newcomers.clear()
        self._heaps.clear()
        self._kinds.clear()
        self._sorted_in = 0

    def _forget_kind(self, place: Place[T]) -> None:
        alike = self._kinds.get(place.kind)
        if alike is not None:
            alike.pop(place.item, None)
            if not alike:
                self._kinds.pop(place.kind, None)

    def _sweep(self) -> None:
        for heap in self._heaps.values():
            heap[:] = [place for place in heap if not place.left]
            heapify(heap)
        self._sorted_in = sum(map(len, self._heaps.values()))
