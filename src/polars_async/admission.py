"""Which query runs now and which waits: slots, the line, and the count of what became of all."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any

from polars_async._native import RLock, holding
from polars_async._nesting import in_query, on_thread_of_polars
from polars_async.errors import CollectorClosedError, QueueFullError
from polars_async.gpu.breaker import breaker
from polars_async.query import wake
from polars_async.scheduling import (
    KEPT_FROM_LARGE,
    KEPT_FROM_UNSEEN,
    SMALL,
    UNKNOWN,
    Line,
    is_kept,
)

if TYPE_CHECKING:
    from polars_async.expectations import Expectation
    from polars_async.query import Query, Waiter
    from polars_async.scheduling import Place


@dataclass(slots=True)
class Counts:
    """What became of the queries of one admission so far."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    rejected: int = 0
    downgraded: int = 0
    fell_back: int = 0
    queue_seconds: float = 0.0
    run_seconds: float = 0.0

    @property
    def ended(self) -> int:
        """How many have come to one of the five outcomes."""
        return self.completed + self.failed + self.cancelled + self.timed_out + self.rejected


class Slot:
    """
    A thread's right to run queries, one after the other; without one while it looks for one.

    Or, `inline`, to run just one on the thread that asks for it, which takes no slot from others.
    """

    __slots__ = ("alone", "inline", "overtook", "query", "small")

    def __init__(self, *, inline: bool = False) -> None:
        self.query: Query[Any] | None = None
        self.inline = inline
        self.small = False
        self.overtook = False
        self.alone = True


class Admission:
    """
    `max_running` slots, and a line of the queries that wait for one.

    A slot is taken by a query that finds one free, and is kept by its thread until there is nobody
    left to take: so it is also while the thread appraises those in the line.

    `lock` guards all of it, and the state of every query admitted here. It is held for a few
    instructions at a time, never while a query runs or is appraised, or a waiter is woken. It is
    reentrant because a signal handler or a finaliser may come in at any instruction and cancel a
    query.
    """

    __slots__ = (
        "_exclusive",
        "_inline",
        "_line",
        "_paused",
        "_slots",
        "_taken_unseen",
        "closed",
        "counts",
        "lock",
        "max_running",
        "max_waiting",
        "reserved",
        "waiters",
    )

    def __init__(
        self,
        max_running: int,
        max_waiting: int | None = None,
        *,
        exclusive: bool = False,
        lock: RLock | None = None,
    ) -> None:
        self.lock = lock or RLock()
        self.max_running = max_running
        self.max_waiting = max_waiting
        self._exclusive = exclusive
        self.closed = False
        self.counts = Counts()
        self._slots: set[Slot] = set()
        self._paused: set[Slot] = set()
        self._inline: set[Slot] = set()
        self._line: Line[Query[Any]] = Line()
        self._taken_unseen = -inf  # when that was last, in seconds of perf_counter
        self.waiters: dict[Waiter, None] = {}
        self.reserved: Slot | None = None
        """The slot that `enter` has made last: its caller may be interrupted before it has it."""

    @property
    def running(self) -> int:
        """How many queries run, those included that were let go."""
        return len(self.in_slots())

    @property
    def waiting(self) -> int:
        """How many queries stand in the line."""
        return len(self._line)

    @property
    def threads(self) -> int:
        """How many threads of ours it takes now."""
        return len(self._slots) + len(self._paused)

    def in_slots(self) -> list[Query[Any]]:
        """List the queries that run, or pause in the midst of it."""
        return holding(self.lock, self._in_slots)

    def in_line(self) -> list[Query[Any]]:
        """List the queries that wait."""
        return holding(self.lock, list, self._line)

    def enter(self, query: Query[Any]) -> Slot | None:
        """
        Give `query` a slot, or a place in the line, and maybe a slot to whoever is next.

        With the lock held.

        What a running query asks for itself runs beyond the slots: it may wait for it, and the line
        would then wait for both. Where one of Polars' own threads asks, it is that one that runs it
        (the slot is `inline`): others may need that very thread. Only a stream needs another, since
        what asks is its consumer. Not so where the slots are exclusive, as the GPU is.

        Raises
        ------
        CollectorClosedError
            Nobody is let in any more.
        QueueFullError
            As many queries are here as may be.
        """
        if self.closed:
            raise CollectorClosedError(
                "this collector was closed and takes no more queries: make a new one"
            )
        if not self._exclusive and not query.is_stream and on_thread_of_polars():
            slot = self.reserved = Slot(inline=True)
            self._inline.add(slot)
            self._start(query, slot, small=False, overtook=False)
            return slot
        free = self.max_running - len(self._slots)
        # What may be kept for small queries is not given away unseen.
        kept = KEPT_FROM_UNSEEN if self._line.is_quick else KEPT_FROM_LARGE
        if self._exclusive:
            kept = 0
        at_once = not self._line and (free > kept or free == self.max_running)
        if at_once or (not self._exclusive and in_query()):
            slot = self.reserved = Slot()
            self._slots.add(slot)
            self._start(query, slot, small=False, overtook=False)
            return slot
        if self.max_waiting is not None:
            self._check_room(self.max_waiting)
        self._add(query)
        if free < 1:
            return None
        slot = self.reserved = Slot()
        self._slots.add(slot)
        return slot

    def take_over(self, query: Query[Any]) -> Slot | None:
        """
        Give a place in the line, whatever the limits, to a query that was let in elsewhere.

        One that a running query asked for is given a slot, as by `enter`; or else there may be one
        for whoever is next.
        """
        with self.lock:
            if query.is_nested:
                slot = Slot()
                self._slots.add(slot)
                self._start(query, slot, small=False, overtook=False)
                return slot
            self._add(query)
            if len(self._slots) >= self.max_running:
                return None
            slot = Slot()
            self._slots.add(slot)
            return slot

    def forget(self, query: Query[Any], slot: Slot | None) -> None:
        """Take back, with the lock held, what `enter` may have given to a query."""
        self._line.discard(query)
        if slot is not None:
            slot.query = None
            self._slots.discard(slot)
            self._inline.discard(slot)

    def has(self, slot: Slot) -> bool:
        """Tell whether `slot` was not taken back."""
        with self.lock:
            return slot in self._slots

    def newcomer(self, *, from_behind: bool) -> Place[Query[Any]] | None:
        """Give one of the line, to be appraised without the lock; None if all have been."""
        with self.lock:
            return self._line.newcomer(from_behind=from_behind)

    def fill(self, slot: Slot, appraised: list[Place[Query[Any]]], *, thorough: bool) -> bool:
        """
        Sort in those `appraised`, and start the next in `slot`, or else take the slot back.

        `thorough` is to take nobody but a small one while others have not been appraised. Gives
        whether the thread of the slot has anything more to do: to run the slot's query, or, where
        it has none, to appraise more.
        """
        with self.lock:
            line = self._line
            for place in appraised:
                expected = None if place.item is None else place.item.expectation
                seconds, kind = (UNKNOWN, None) if expected is None else expected[:2]
                line.sort_in(place, seconds, kind)
            if slot not in self._slots or len(self._slots) > self.max_running:
                self._slots.discard(slot)
                return False
            if thorough and line.is_undecided:
                return True
            only_small = is_kept(KEPT_FROM_LARGE, self.max_running, self._long_running())
            while (turn := line.take(only_small=only_small)) is not None:
                if self._start(turn.item, slot, small=turn.small, overtook=turn.overtook):
                    return True
            if line.has_newcomers:
                return True
            self._slots.discard(slot)
            return False

    def seconds_on_guard(self) -> float:
        """
        Tell how long the next free slot had better do nothing.

        That is where it is kept for small queries, and the others are quick: to look at a plan
        takes longer than they need to run it. It is there once they have taken nobody for a while,
        whatever keeps them.
        """
        with self.lock:
            stands_by = (
                self._line.is_quick
                and bool(self._line)
                and is_kept(KEPT_FROM_UNSEEN, self.max_running, self._long_running())
            )
            return self._taken_unseen + SMALL - perf_counter() if stands_by else 0.0

    def release(self, slot: Slot) -> bool:
        """
        Take back the slot of a query that really ended, unless there may be a next one for it.

        With the lock held.
        """
        query, slot.query = slot.query, None
        line, slots = self._line, self._slots
        if self._paused:
            self._paused.discard(slot)
        if slot.inline:
            self._inline.discard(slot)
        seconds = None if query is None else query.run_seconds
        if seconds is not None:
            self.counts.run_seconds += seconds
            line.serve(seconds, overtook=slot.overtook)
        if line and slot in slots and len(slots) <= self.max_running:
            long_running = self._long_running()
            turn = line.take_quickly(
                only_small=is_kept(KEPT_FROM_LARGE, self.max_running, long_running),
                unseen=not is_kept(KEPT_FROM_UNSEEN, self.max_running, long_running),
            )
            if turn is not None:
                self._start(turn.item, slot, small=turn.small, overtook=turn.overtook)
                if not turn.small:
                    self._taken_unseen = perf_counter()
            return True
        slots.discard(slot)
        return False

    def idle_slots(self) -> list[Slot]:
        """Take the slots that are free while somebody waits, for threads that look who may go."""
        with self.lock:
            idle = min(self.max_running - len(self._slots), len(self._line))
            slots = [Slot() for _ in range(idle)]
            self._slots.update(slots)
            return slots

    def give_back(self, slot: Slot) -> None:
        """Take back a slot that was not used."""
        with self.lock:
            self._slots.discard(slot)

    def pause(self, query: Query[Any]) -> None:
        """Free the slot of a query that waits for its consumer."""
        with self.lock:
            for slot in self._slots:
                if slot.query is query:
                    self._slots.remove(slot)
                    self._paused.add(slot)
                    break

    def resume(self, query: Query[Any]) -> None:
        """Give a paused query a slot again, beyond all others if need be."""
        with self.lock:
            for slot in self._paused:
                if slot.query is query:
                    self._paused.remove(slot)
                    self._slots.add(slot)
                    break

    def leave(self, query: Query[Any]) -> None:
        """Take a waiting query out of the line, with the lock held."""
        self._line.discard(query)

    def reappraise(self, expectation: Expectation) -> None:
        """Sort in anew the queries of one kind in the line."""
        with self.lock:
            self._line.reappraise(expectation.fingerprint, expectation.seconds)

    def add_waiter(self, waiter: Waiter) -> bool:
        """Have `waiter` woken when no query runs or waits; False if that is so already."""
        return holding(self.lock, self._add_waiter, waiter)

    def remove_waiter(self, waiter: Waiter, *, last_cancels: bool) -> bool:  # noqa: ARG002  # as Query
        """Stop waiting; False if it is over already."""
        return holding(self.lock, self._remove_waiter, waiter)

    def tell_if_empty(self) -> None:
        """Wake whoever waits for no query to be left, if none is."""
        waiters: list[Waiter] = []
        try:
            holding(self.lock, self._move_waiters, waiters)
            wake(waiters)
        except BaseException:  # out of a signal handler
            wake(waiters)
            raise

    def reset(self, lock: RLock | None) -> list[Query[Any]]:
        """Forget, and give, every query; for a forked child, where nobody else is left."""
        # A thread that did not survive the fork may have held the old lock.
        self.lock = lock or RLock()
        lost = [*self.in_slots(), *self._line]
        self._slots.clear()
        self._paused.clear()
        self._inline.clear()
        self._line.clear()
        self.waiters.clear()
        return lost

    def _add(self, query: Query[Any]) -> None:
        known = query.expectation
        work = None if known is None else known.seconds
        self._line.add(query, priority=query.priority, work=work)

    def _in_slots(self) -> list[Query[Any]]:
        slots = (*self._slots, *self._paused, *self._inline)
        return [slot.query for slot in slots if slot.query is not None]

    def _add_waiter(self, waiter: Waiter) -> bool:
        if self._is_empty():
            return False
        self.waiters[waiter] = None
        return True

    def _remove_waiter(self, waiter: Waiter) -> bool:
        known = waiter in self.waiters
        self.waiters.pop(waiter, None)
        return known

    def _move_waiters(self, to: list[Waiter]) -> None:
        if self._is_empty():
            to.extend(self.waiters)  # before they are here no more
            self.waiters.clear()

    def _start(self, query: Query[Any], slot: Slot, *, small: bool, overtook: bool) -> bool:
        waited = query.start()
        if waited is None:
            return False
        slot.alone = True
        if len(self._slots) > 1:
            for other in self._slots:
                if other.query is not None:
                    slot.alone = other.alone = False
        slot.query = query
        slot.small = small
        slot.overtook = overtook
        self.counts.queue_seconds += waited
        return True

    def _long_running(self) -> int:
        """Count those that leave few slots for others, which nobody does that has a whole GPU."""
        number = 0
        if self._exclusive:
            return number
        for slot in self._slots:  # a sum over a generator takes twice as long
            if slot.query is not None and not slot.small:
                number += 1
        return number

    def _is_empty(self) -> bool:
        return not self._line and not self._in_slots()

    def _check_room(self, max_waiting: int) -> None:
        # Not those that pause, whose slots are for others.
        running = sum(slot.query is not None for slot in self._slots)
        waiting = self.waiting
        if min(running, self.max_running) + waiting >= self.max_running + max_waiting:
            raise QueueFullError(
                f"the collector is full: {running} running and {waiting} waiting, of at most "
                f"max_running={self.max_running} and max_waiting={max_waiting}. Try again later, "
                "or make a Collector with a larger max_waiting"
            )


def stats_of(cpu: Admission, gpu: Admission) -> dict[str, float]:
    """Add up what `Collector.stats` explains."""
    found = holding(cpu.lock, _counted, cpu, gpu)  # the lock is that of both
    found |= {"gpu_failures": breaker.health.failures, "gpu_rest_seconds": breaker.seconds_left()}
    limit = inf if cpu.max_waiting is None else cpu.max_waiting
    return {**found, "max_running": cpu.max_running, "max_waiting": limit}


def _counted(cpu: Admission, gpu: Admission) -> dict[str, float]:
    found: dict[str, float] = {"submitted": 0}
    for admission in (cpu, gpu):
        running = admission.in_slots()
        abandoned = sum(query.done for query in running)
        now: dict[str, float] = {
            "running": len(running),
            "abandoned": abandoned,
            "waiting": admission.waiting,
            **asdict(admission.counts),
        }
        for key, value in now.items():
            found[key] = found.get(key, 0) + value
        # Not counted by itself: who is interrupted would have to count it, and take that back.
        found["submitted"] += admission.counts.ended + len(running) - abandoned + now["waiting"]
        if admission is gpu:
            found |= {"gpu_running": now["running"], "gpu_waiting": now["waiting"]}
    return found
