"""What the queries in the slots of one admission take of its memory, and which lack some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from polars_async.scheduling.memory import Memory
    from polars_async.scheduling.query import Query
    from polars_async.scheduling.sizes import Load, Room
    from polars_async.scheduling.slots import Slot


_MOMENT: Final = 0.1
"""Seconds after which what a query has taken so far tells what it may take."""


class MemoryUse:
    """
    The slots of one admission, as far as the `memory` of its collector is concerned.

    All methods are called with the lock of the admission held, but for `of_ended`.
    """

    __slots__ = ("is_lacking", "memory")

    def __init__(self, memory: Memory) -> None:
        self.memory: Final = memory
        self.is_lacking = False
        """Whether the last look found a query that nothing but memory held up."""

    def limit_room(self, room: Room, running: Sequence[Slot]) -> None:
        """Have no query find room that would take more than what is left beside the `running`."""
        self._correct(running)
        room.memory = self.memory.left(running)
        room.small_memory = self.memory.small

    def lacking_in(self, room: Room) -> Callable[[Query[Any], Load], bool]:
        """Return what tells of a query in the queue whether it only lacks memory, and notes it."""
        self.is_lacking = False

        def lacks_memory(query: Query[Any], load: Load) -> bool:
            if not room.lacks_memory(load):
                return False
            self.is_lacking = True
            query.times.hold_up()
            return True

        return lacks_memory

    def is_free(self, running: Iterable[Slot]) -> bool:
        """Return whether a query may take as much as it likes: see `Memory.are_small`."""
        slots = list(running)
        self._correct(slots)
        return self.memory.are_small(slots)

    def _correct(self, running: Sequence[Slot]) -> None:
        """Have queries of which little was known count for what they were seen to take."""
        for slot in running:
            query = slot.query
            if query is None:
                continue
            in_worker = query.place is not None
            peak = query.peak_memory if in_worker else slot.peak
            expected = query.estimate
            if expected is not None and expected.is_mere_guess:
                # Others of which nothing is known would wait for it, however long it runs: maybe
                # for ever, if it waits for one of them.
                if (query.times.run_seconds or 0.0) > _MOMENT:
                    taken = self.memory.by_what_it_took(peak or 0)
                    slot.load = slot.load._replace(memory=taken)
            # Workers are measured also where nothing else is, since all were small.
            elif in_worker and peak is not None and peak > slot.load.memory:
                slot.load = slot.load._replace(memory=peak)

    def count_as_all(self, slot: Slot) -> None:
        """Have none but small queries start beside that of `slot`, of which nothing is known."""
        slot.load = slot.load._replace(memory=self.memory.limit)

    def start(self, slot: Slot, beside: Iterable[Slot]) -> None:
        """Note that a query starts in `slot`, `beside` those that run."""
        self.memory.note_start(slot, alone=self.is_free(beside))

    def sample(self, running: Sequence[Slot], *, tell: bool) -> bool:
        """
        Note what the `running` queries take; return False if all of them are small.

        With `tell` they know it, too: where no worker process measures that of each.
        """
        if self.is_free(running):
            return False
        self.memory.sample(running)
        for slot in running if tell else ():
            if slot.query is not None:
                slot.query.peak_memory = slot.peak
        return True

    def too_large(self, running: Iterable[Slot]) -> Query[Any] | None:
        """Return the query that has outgrown the memory: alone, or beside none but small ones."""
        memory = self.memory
        if memory.used <= memory.limit:
            return None
        slots = list(running)
        large = [slot for slot in slots if not memory.is_small(slot.load)] or slots
        return large[0].query if len(large) == 1 else None

    def of_ended(self, slot: Slot, processors: float) -> int | None:
        """
        Return the bytes that the slot's query, which has ended, took at its peak.

        Where it was too quick to be measured, return what it may have taken. Its result is minded
        from now on.
        """
        memory, query = self.memory, slot.query
        if query is None:
            return None
        if query.place is not None and query.peak_memory is not None:
            # By its worker, which has also packed the result.
            return query.peak_memory + query.keep_result(memory)
        most = memory.most_within(query.times.run_seconds or 0.0, processors)
        kept = query.keep_result(memory, most=most)
        if slot.peak is not None:
            query.peak_memory = slot.peak
            return slot.peak
        return max(kept, min(memory.of_its_like(slot.load), most))
