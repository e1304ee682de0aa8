"""The streams of batches that wait for their consumers, and then for a slot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from polars_async._runtime.unpatched import allocate_lock
from polars_async.scheduling.fair_queue import FAIR_EVERY

if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Iterator

    from polars_async.scheduling.query import Query
    from polars_async.scheduling.sizes import Room
    from polars_async.scheduling.slots import Slot


class Pauses:
    """
    The paused queries of one admission: those that wait for their consumers have no slot.

    One whose consumer is back waits for a slot ahead of the queue, since it holds a thread and
    more; one free slot in `FAIR_EVERY` goes to the queue all the same. The lock of the admission
    guards all of it, and the `slots` that are in use.
    """

    __slots__ = ("_contended", "_paused", "_returning", "_slots")

    def __init__(self, slots: set[Slot]) -> None:
        self._slots: Final = slots
        self._paused: dict[Query[Any], Slot] = {}
        self._returning: dict[Query[Any], Slot] = {}  # of these, whose consumers are back
        self._contended = 0  # free slots that both they and the queue waited for, so far

    def __len__(self) -> int:
        return len(self._paused)

    def __iter__(self) -> Iterator[Query[Any]]:
        return iter(self._paused)

    @property
    def any_returns(self) -> bool:
        """Whether the consumer of one is back, and it has no slot yet."""
        return bool(self._returning)

    def begin(self, query: Query[Any]) -> LockType:
        """Free the slot of a query that waits for its consumer; return the gate to wait at."""
        slot = next(each for each in self._slots if each.query is query)
        slot.gate = gate = allocate_lock()
        gate.acquire()
        slot.load = query.load  # unknown so far if it started at once
        self._paused[query] = slot
        self._slots.remove(slot)
        return gate

    def note_return(self, query: Query[Any]) -> None:
        """Note that its consumer is back. A query that a running one submitted goes on at once."""
        slot = self._paused.get(query)
        if slot is None:
            return
        if query.is_nested:
            self._go_on(query, slot)
        else:
            self._returning[query] = slot

    def goes_first(self, room: Room, *, beside_queue: bool) -> bool:
        """Return whether a free slot is for one of these rather than, if it waits, the queue."""
        if self._next(room) is None:
            return False
        self._contended += 1
        return not beside_queue or self._contended % FAIR_EVERY != 0

    def resume_next(self, room: Room) -> bool:
        """Give a slot to the first, by the order of return, that has `room`, if there is one."""
        found = self._next(room)
        if found is None:
            return False
        self._go_on(*found)
        return True

    def let_end(self, query: Query[Any]) -> None:
        """Open the gate of a query that was cancelled: it needs no slot to end."""
        slot = self._paused.get(query)
        if slot is not None:
            slot.open_gate()
            self._returning.pop(query, None)

    def forget(self, query: Query[Any]) -> None:
        """Forget a query that has ended."""
        self._returning.pop(query, None)
        self._paused.pop(query, None)

    def clear(self) -> None:
        """Forget all of them, in a forked child."""
        self._paused.clear()
        self._returning.clear()

    def _next(self, room: Room) -> tuple[Query[Any], Slot] | None:
        # A list: a signal handler or a finaliser may close one of these streams meanwhile.
        returning = list(self._returning.items())
        return next((each for each in returning if room.fits(each[1].load)), None)

    def _go_on(self, query: Query[Any], slot: Slot) -> None:
        # The gate opens when the slot is taken, so that at most `max_running` queries run. Ctrl-C
        # may come between any two of these, in the consumer's thread, which then cancels the query.
        self._slots.add(slot)
        slot.open_gate()
        self._returning.pop(query, None)
        self._paused.pop(query, None)
