"""
How many queries of each size run at once: a policy without clock or threads.

Queries are sorted by the decade of their expected work. Of each decade a bounded number runs at
once, so that smaller work runs beside larger at every magnitude, and equal heavy queries do not
pile up: each keeps all processors busy, and two of them take twice the memory and no less time.
"""

from __future__ import annotations

from bisect import bisect_left
from math import ceil, inf
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SMALL: Final = 0.01
"""Seconds of estimated work up to which a query counts as small."""
UNKNOWN: Final = 0.1
"""Seconds of work that a query without an estimate counts for."""
_BOUNDS: Final = (0.001, SMALL, 0.999 * UNKNOWN, 1.0, 10.0)
SIZES: Final = len(_BOUNDS) + 1
"""The number of sizes: from 0, up to 1 ms, to 5, over 10 s."""
LIGHT: Final = SIZES
"""The kind of all light queries, whatever their size."""
_POOLED: Final = (0, 1, SIZES + 1, SIZES + 1, SIZES + 1, SIZES + 2)
"""The kind of a pooled query, by its size: large ones run beside others only if they take long."""
KINDS: Final = LIGHT + 3
_RESERVED: Final = 2
"""Slots that large queries of one size may not take, where the number of slots is fixed."""
_LIGHT: Final = 0.25
"""The share of the processors up to which a large query counts as light."""
_IDLE: Final = 0.25
"""Processors that have to be idle for queries beyond the usual ones."""
_LEAST_USED: Final = 1e-3
"""Processors that a query takes at least, for the quotient."""


def size_of(seconds: float) -> int:
    """Return the size of a query with so much expected work: the decade of that."""
    return bisect_left(_BOUNDS, seconds)


SMALL_SIZE: Final = size_of(SMALL)
"""The largest of the small sizes: such a query uses no more than one processor, mostly."""
UNKNOWN_SIZE: Final = size_of(UNKNOWN)


def size_with(priority: int, seconds: float) -> int:
    """Return the size of a query with a priority: above 0 it counts as small, below 0 never."""
    size = size_of(seconds)
    if priority == 0:
        return size
    return min(size, SMALL_SIZE) if priority > 0 else max(size, SMALL_SIZE + 1)


def large_at_once(slots: int) -> int:
    """Return how many queries of one size that is not small may run at once in so many slots."""
    return max(1, slots - (_RESERVED if slots > _RESERVED else 1))


class Load(NamedTuple):
    """What one query takes while it runs."""

    size: int
    share: float | None = None
    """The share of the processors that it keeps busy; None if that is not known: maybe all."""
    pooled: bool = False
    """Whether it runs in Polars' pool of threads, as on the in-memory engine: there the tasks of
    one large query hold up those of another until they are done, while threads of the streaming
    engine share the processors."""
    memory: int = 0
    """Bytes that it is expected to take at its peak; 0 where memory has no limit."""

    @property
    def is_small(self) -> bool:
        """Whether the query counts as small."""
        return self.size <= SMALL_SIZE

    @property
    def is_light(self) -> bool:
        """Whether it takes long, and is known to leave most processors to others meanwhile."""
        return self.size > SMALL_SIZE and self.share is not None and self.share <= _LIGHT

    @property
    def kind(self) -> int:
        """Its size, or `LIGHT`: only queries of the same kind have to wait for each other."""
        if self.is_light:
            return LIGHT
        return _POOLED[self.size] if self.pooled else self.size


UNKNOWN_LOAD: Final = Load(UNKNOWN_SIZE)


class Limits:
    """
    The limits of one collector.

    With a fixed number of slots (`most` is None), no more queries run than there are slots. Else
    there are `slots` for queries of which little is known, and up to `most` run while they leave
    processors idle: by what was learned of the queries, or by what is measured (`spare`).
    """

    __slots__ = ("at_once", "exclusive", "fixed", "most", "processors", "slots")

    def __init__(
        self,
        slots: int,
        most: int | None = None,
        processors: float = 1,
        *,
        exclusive: bool = False,
    ) -> None:
        self.slots = slots
        self.fixed = most is None
        self.most = slots if most is None else max(slots, most)
        self.processors = processors
        self.exclusive = exclusive
        """Whether slots are GPUs: a query there takes nothing from the others."""
        self.at_once = [self._at_once(size) for size in range(SIZES)]
        """How many queries of each kind may run at once, whatever else runs."""
        self.at_once.append(slots)  # of the light ones
        self.at_once += [slots if exclusive else large_at_once(slots)] * (KINDS - LIGHT - 1)

    def _at_once(self, size: int) -> int:
        if self.exclusive:
            return self.slots
        if size > SMALL_SIZE:
            return large_at_once(self.slots) + (size < UNKNOWN_SIZE and not self.fixed)
        return self.slots if self.fixed else max(self.slots, ceil(self.processors))

    def beside_large(self, size: int) -> int:
        """Return how many more small queries of this size run while a large one takes the pool."""
        # They wait there until a task of the large one ends, and are all done a moment later. Those
        # that are not there by then wait for the end of its next task. Without a large one, more
        # threads than processors would only wait for the GIL and hold each other up.
        return 0 if self.fixed else max(0, self.most // (2 + 2 * size) - self.at_once[size])

    def may_start_unestimated(self, large_running: int) -> bool:
        """Return whether one more may start without an estimate while all others are quick."""
        return self.slots == 1 or self.exclusive or large_running < max(1, self.slots - 1)

    def room(self, running: Iterable[Load], spare: int = 0, *, pool_is_taken: bool = False) -> Room:
        """
        Return what may start beside the `running` queries; `spare` ones whatever their size.

        `pool_is_taken` says that one of them is known to be a large one in Polars' pool.
        """
        return Room(self, running, spare, pool_is_taken=pool_is_taken)

    def spare(self, used: float, idle: float, running: float) -> int:
        """
        Return how many more queries may start, whatever is known of them.

        `used` processors were kept busy in the last moment by so many `running` queries, and `idle`
        ones were idle. If each of the queries takes little, those that are added may keep the idle
        processors busy if they are like these; yet no more than run, since they may be different.
        Where each takes more, one more would mostly take from the others, and from memory.
        """
        if self.fixed or running <= 0 or idle < _IDLE:
            return 0
        each = max(used / running, _LEAST_USED)
        if each > _LIGHT * self.processors:
            return 0
        return int(min(idle / each, max(1.0, running)))


class Room:
    """What may start beside the queries that run."""

    __slots__ = ("_left", "_left_for_large", "_share", "memory", "small_memory", "spare", "total")

    def __init__(
        self, limits: Limits, running: Iterable[Load], spare: int, *, pool_is_taken: bool = False
    ) -> None:
        self._left = left = limits.at_once.copy()  # by kind
        self._share = share = [0.0] * len(left)  # of the processors, by kind
        self.total = limits.most
        # One of several slots is left for small queries, however the large ones differ in size.
        self._left_for_large = limits.most - (limits.most > 1 and not limits.exclusive)
        self.spare = spare
        self.memory = inf
        """Bytes that one more query may take."""
        self.small_memory = 0
        """Bytes that a small one may take in any case."""
        for load in running:
            self.total -= 1
            self._left_for_large -= not load.is_small
            kind = load.kind
            left[kind] -= 1
            share[kind] += 1 if load.share is None else load.share
        if pool_is_taken:
            for size in range(SMALL_SIZE + 1):
                left[size] += limits.beside_large(size)

    def fits(self, load: Load) -> bool:
        """Return whether a query with this load may start."""
        return self._has_slot(load) and not self._needs_more_memory(load)

    def lacks_memory(self, load: Load) -> bool:
        """Return whether a query with this load may not start for want of memory alone."""
        return self._needs_more_memory(load) and self._has_slot(load)

    def fits_by_kind(self, load: Load) -> bool:
        """Return whether it may start by what is known of it, without the `spare` ones."""
        if not self._is_open(load):
            return False
        if self._left[load.kind] > 0:
            return True
        # Two pooled ones would hold each other up, even if each leaves processors idle.
        if load.share is None or load.is_small or (load.pooled and not load.is_light):
            return False
        return self._share[load.kind] + load.share <= 1

    def of_kinds(self, kinds: Sequence[int], unknown: int) -> int:
        """Return how many may start of so many queries of each kind, and of unknown ones."""
        found = [min(count, max(0, left)) for count, left in zip(kinds, self._left, strict=True)]
        small = sum(found[: SMALL_SIZE + 1])
        # An unknown one may be pooled or not.
        left = min(self._left[kind] - found[kind] for kind in (UNKNOWN_SIZE, _POOLED[UNKNOWN_SIZE]))
        large = sum(found) - small + min(unknown, max(0, left))
        large = max(large, min(unknown + sum(kinds[SMALL_SIZE + 1 :]), self.spare))
        return max(0, min(self.total, small + min(large, max(0, self._left_for_large))))

    def _has_slot(self, load: Load) -> bool:
        return self.fits_by_kind(load) or (self.spare > 0 and self._is_open(load))

    def _needs_more_memory(self, load: Load) -> bool:
        if load.memory <= self.memory:
            return False
        return not load.is_small or load.memory > self.small_memory

    def _is_open(self, load: Load) -> bool:
        return self.total > 0 and (load.is_small or self._left_for_large > 0)
