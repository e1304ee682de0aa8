"""Which query runs now and which waits: slots, the line, and the count of what became of all."""

from __future__ import annotations

from dataclasses import asdict
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any

from polars_async._runtime.fork import new_lock
from polars_async._runtime.nesting import in_query, on_thread_of_polars
from polars_async._runtime.unpatched import allocate_lock, holding
from polars_async.bridges.waiting import wake
from polars_async.errors import CollectorClosedError, QueueFullError
from polars_async.gpu.breaker import stats as health_of_gpus
from polars_async.scheduling.counts import Counts
from polars_async.scheduling.fair_queue import (
    FAIR_EVERY,
    RESERVED_FOR_ESTIMATED,
    RESERVED_FOR_SMALL,
    SMALL,
    UNKNOWN,
    FairQueue,
    is_reserved,
)
from polars_async.scheduling.open_streams import OpenStreams
from polars_async.scheduling.query import Owner

if TYPE_CHECKING:
    from _thread import LockType, RLock
    from collections.abc import Sequence

    from polars_async.bridges.waiting import Waiter
    from polars_async.scheduling.estimates import Estimate
    from polars_async.scheduling.fair_queue import Entry
    from polars_async.scheduling.query import Query


class Slot:
    """
    A thread's right to run queries, one after the other; without one while it looks for one.

    Or, `inline`, to run just one on the thread that asks for it, which takes no slot from others.
    """

    __slots__ = ("alone", "gate", "inline", "overtook", "query", "small")

    def __init__(self, *, inline: bool = False) -> None:
        self.gate: LockType | None = None  # where a paused query waits
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

    A query that waits for its consumer is paused, and has no slot. When its consumer is back it
    waits for one before those in the line, since it holds a thread and more; one turn in
    `FAIR_EVERY` is for the line all the same. While a query that is back waits, no slot is free that
    it may have: whatever frees one gives it on.

    `lock` guards all of it, and the state of every query admitted here. It is held for a few
    instructions at a time, never while a query runs or is appraised, or a waiter is woken. It is
    reentrant because a signal handler or a finaliser may come in at any instruction and cancel a
    query.
    """

    __slots__ = (
        "_contended",
        "_inline",
        "_paused",
        "_queue",
        "_returning",
        "_slots",
        "_started_unestimated",
        "closed",
        "counts",
        "exclusive",
        "lock",
        "max_running",
        "max_waiting",
        "owner",
        "reserved",
        "streams",
        "waiters",
    )

    def __init__(
        self,
        max_running: int,
        max_waiting: int | None = None,
        *,
        exclusive: bool = False,
        lock: RLock | None = None,
        streams: OpenStreams | None = None,
    ) -> None:
        self.lock = lock or new_lock()
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.exclusive = exclusive
        self.closed = False
        self.counts = Counts()
        self.owner = Owner(self.lock, self.counts, self._leave)
        """What its queries are to know of it."""
        self._slots: set[Slot] = set()
        self.streams = OpenStreams() if streams is None else streams
        self._paused: dict[Query[Any], Slot] = {}
        self._returning: dict[Query[Any], Slot] = {}  # those of them whose consumers are back
        self._contended = 0  # in which both they and the line waited for a slot
        self._inline: set[Slot] = set()
        self._queue: FairQueue[Query[Any]] = FairQueue()
        self._started_unestimated = -inf  # when that was last, in seconds of perf_counter
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
        return len(self._queue)

    @property
    def threads(self) -> int:
        """How many threads of ours it takes now."""
        return len(self._slots) + len(self._paused)

    @property
    def threads_to_keep(self) -> int:
        """How many threads it may take soon."""
        return max(self.max_running, len(self._slots)) + len(self._paused)

    @property
    def paused(self) -> int:
        """How many queries wait for their consumers, or for a slot after that."""
        return len(self._paused)

    def in_slots(self) -> list[Query[Any]]:
        """List the queries that run, or pause in the midst of it."""
        return holding(self.lock, self._in_slots)

    def in_queue(self) -> list[Query[Any]]:
        """List the queries that wait."""
        return holding(self.lock, list, self._queue)

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
            As many queries are here, or streams are open, as may be.
        """
        if self.closed:
            raise CollectorClosedError(
                "this collector was closed and takes no more queries: make a new one"
            )
        if query.is_stream:
            self.streams.add(query)
        elif not self.exclusive and on_thread_of_polars():
            slot = self.reserved = Slot(inline=True)
            self._inline.add(slot)
            self._start(query, slot, small=False, overtook=False)
            return slot
        free = self.max_running - len(self._slots)
        # What may be kept for small queries is not given away unseen.
        reserved = RESERVED_FOR_ESTIMATED if self._queue.is_quick else RESERVED_FOR_SMALL
        if self.exclusive:
            reserved = 0
        at_once = not self._queue and (free > reserved or free == self.max_running)
        if at_once or (not self.exclusive and in_query()):
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
        self._queue.discard(query)
        self.streams.discard(query)
        if slot is not None:
            slot.query = None
            self._inline.discard(slot)
            self._free(slot)

    def has(self, slot: Slot) -> bool:
        """Tell whether `slot` was not taken back."""
        with self.lock:
            return slot in self._slots

    def next_unestimated(self, *, from_behind: bool) -> Entry[Query[Any]] | None:
        """Give one of the line, to be appraised without the lock; None if all have been."""
        with self.lock:
            return self._queue.next_unestimated(from_behind=from_behind)

    def fill(
        self, slot: Slot, estimated: list[Entry[Query[Any]]], *, only_if_certain: bool
    ) -> bool:
        """
        Sort in those `estimated`, and start the next in `slot`, or else take the slot back.

        `only_if_certain` is to take nobody but a small one while others have not been appraised. Gives
        whether the thread of the slot has anything more to do: to run the slot's query, or, where
        it has none, to appraise more.
        """
        with self.lock:
            queue = self._queue
            for entry in estimated:
                expected = None if entry.item is None else entry.item.estimate
                seconds, kind = (UNKNOWN, None) if expected is None else expected[:2]
                queue.rank(entry, seconds, kind)
            if slot not in self._slots or len(self._slots) > self.max_running:
                self._free(slot)
                return False
            if only_if_certain and queue.is_undecided:
                return True
            only_small = is_reserved(RESERVED_FOR_SMALL, self.max_running, self._large_running())
            while (picked := queue.take(only_small=only_small)) is not None:
                if self._start(picked.item, slot, small=picked.small, overtook=picked.overtook):
                    return True
            if queue.has_unestimated:
                return True
            self._free(slot)
            return False

    def reserve_delay(self) -> float:
        """
        Tell how long the next free slot had better do nothing.

        That is where it is kept for small queries, and the others are quick: to look at a plan
        takes longer than they need to run it. It is there once they have taken nobody for a while,
        whatever keeps them.
        """
        with self.lock:
            stands_by = (
                self._queue.is_quick
                and bool(self._queue)
                and is_reserved(RESERVED_FOR_ESTIMATED, self.max_running, self._large_running())
            )
            return self._started_unestimated + SMALL - perf_counter() if stands_by else 0.0

    def release(self, slot: Slot) -> bool:
        """
        Take back the slot of a query that really ended, unless there may be a next one for it.

        With the lock held.
        """
        query, slot.query = slot.query, None
        queue, slots = self._queue, self._slots
        if slot.inline:
            self._inline.discard(slot)
        if query is not None and query.is_stream:
            self.streams.discard(query)
            self._returning.pop(query, None)
            self._paused.pop(query, None)
        seconds = None if query is None else query.times.run_seconds
        if seconds is not None:
            self.counts.run_seconds += seconds
            completed = query is not None and query.completed
            queue.note_ended(seconds, overtook=slot.overtook, completed=completed)
        is_free = slot in slots and len(slots) <= self.max_running
        if queue and is_free and not (self._returning and self._returning_is_next()):
            large_running = self._large_running()
            picked = queue.take_quickly(
                only_small=is_reserved(RESERVED_FOR_SMALL, self.max_running, large_running),
                unestimated=not is_reserved(
                    RESERVED_FOR_ESTIMATED, self.max_running, large_running
                ),
            )
            if picked is not None:
                self._start(picked.item, slot, small=picked.small, overtook=picked.overtook)
                if not picked.small:
                    self._started_unestimated = perf_counter()
            return True
        self._free(slot)
        return False

    def idle_slots(self) -> list[Slot]:
        """Take the slots that are free while somebody waits, for threads that look who may go."""
        with self.lock:
            idle = min(self.max_running - len(self._slots), len(self._queue))
            slots = [Slot() for _ in range(idle)]
            self._slots.update(slots)
            return slots

    def give_back(self, slot: Slot) -> None:
        """Take back a slot that was not used."""
        with self.lock:
            self._free(slot)

    def pause(self, query: Query[Any]) -> LockType:
        """Free the slot of a query that waits for its consumer; gives the gate to wait at."""
        with self.lock:
            slot = next(each for each in self._slots if each.query is query)
            slot.gate = gate = allocate_lock()
            gate.acquire()
            slot.small = query.goes_as_small  # which nobody asked if it was let in at once
            self._paused[query] = slot
            self._slots.remove(slot)
            if self._returning and self._returning_is_next():
                self._resume_next()
            return gate

    def resume(self, query: Query[Any]) -> None:
        """
        Have a paused query, whose consumer is back, go on as soon as a slot is free for it.

        One that a running query asked for, or reads, goes on at once: see `enter`.
        """
        holding(self.lock, self._resume, query)

    def let_end(self, query: Query[Any]) -> None:
        """Open the gate of a paused query that nobody wants: it needs no slot to end."""
        holding(self.lock, self._let_end, query)

    def re_estimate(self, estimate: Estimate) -> None:
        """Sort in anew the queries of one kind in the line."""
        with self.lock:
            self._queue.re_estimate(estimate.fingerprint, estimate.seconds)

    def add_waiter(self, waiter: Waiter) -> bool:
        """Have `waiter` woken when no query runs or waits; False if that is so already."""
        return holding(self.lock, self._add_waiter, waiter)

    def remove_waiter(self, waiter: Waiter, *, last_cancels: bool) -> bool:  # noqa: ARG002  # as Query
        """Stop waiting; False if it is over already."""
        return holding(self.lock, self._remove_waiter, waiter)

    def wake_if_empty(self) -> None:
        """Wake whoever waits for no query to be left, if none is."""
        waiters: list[Waiter] = []
        try:
            holding(self.lock, self._move_waiters, waiters)
            wake(waiters)
        except BaseException:  # out of a signal handler
            wake(waiters)
            raise

    def reset(self) -> list[Query[Any]]:
        """Forget, and return, every query; for a forked child, which has none of their threads."""
        lost = [*self.in_slots(), *self._queue]
        self._slots.clear()
        self._paused.clear()
        self._inline.clear()
        self._returning.clear()
        self.streams.clear()
        self._queue.clear()
        self.waiters.clear()
        return lost

    def _add(self, query: Query[Any]) -> None:
        known = query.estimate
        work = None if known is None else known.seconds
        self._queue.add(query, priority=query.priority, work=work)

    def _in_slots(self) -> list[Query[Any]]:
        slots = (*self._slots, *self._paused.values(), *self._inline)
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

    def _resume(self, query: Query[Any]) -> None:
        slot = self._paused.get(query)
        if slot is None:
            return
        if query.is_nested:
            self._go_on(query, slot)
        else:
            self._returning[query] = slot
            self._resume_next()

    def _leave(self, query: Query[Any]) -> None:
        """
        Take out a query that was cancelled or timed out while it waited, with the lock held.

        It wakes those that wait for no query to be left, if it was the last.
        """
        self._queue.discard(query)
        self.streams.discard(query)
        if self.waiters and self._is_empty():
            query.wakes(self.waiters)  # before they are here no more
            self.waiters.clear()

    def _let_end(self, query: Query[Any]) -> None:
        slot = self._paused.get(query)
        if slot is not None:
            _open(slot)
            self._returning.pop(query, None)

    def _free(self, slot: Slot) -> None:
        self._slots.discard(slot)
        if self._returning:
            self._resume_next()

    def _returning_is_next(self) -> bool:
        """Tell whether the slot that is free now is for a query that is back, not for the line."""
        if self._next_returning() is None:
            return False
        self._contended += 1
        return not self._queue or self._contended % FAIR_EVERY != 0

    def _resume_next(self) -> None:
        """Give free slots to queries that are back, in the order in which they came."""
        while len(self._slots) < self.max_running and (query := self._next_returning()) is not None:
            self._go_on(query, self._returning[query])

    def _next_returning(self) -> Query[Any] | None:
        only_small = is_reserved(RESERVED_FOR_SMALL, self.max_running, self._large_running())
        for query, slot in self._returning.items():
            if slot.small or not only_small:
                return query
        return None

    def _go_on(self, query: Query[Any], slot: Slot) -> None:
        # Ctrl-C may come at any of these, out of the consumer, which then lets go of the query.
        self._slots.add(slot)
        _open(slot)
        self._returning.pop(query, None)
        self._paused.pop(query, None)

    def _start(self, query: Query[Any], slot: Slot, *, small: bool, overtook: bool) -> bool:
        waited = query.start()
        if waited is None:
            return False
        slot.alone = True
        if len(self._slots) + len(self._inline) > 1:
            for other in (*self._slots, *self._inline):
                if other.query is not None:
                    slot.alone = other.alone = False
        slot.query = query
        slot.small = small
        slot.overtook = overtook
        self.counts.queue_seconds += waited
        return True

    def _large_running(self) -> int:
        """Count those that leave few slots for others, which nobody does that has a whole GPU."""
        number = 0
        if self.exclusive:
            return number
        for slot in self._slots:  # a sum over a generator takes twice as long
            if slot.query is not None and not slot.small:
                number += 1
        return number

    def _is_empty(self) -> bool:
        return not self._queue and not self._in_slots()

    def _check_room(self, max_waiting: int) -> None:
        # Not those that pause, whose slots are for others.
        running = sum(slot.query is not None for slot in self._slots)
        waiting = self.waiting
        room = self.max_running + max_waiting
        if min(running, self.max_running) + waiting >= room:
            for_gpu, slots = "", f"max_running={self.max_running}"
            if self.exclusive:
                for_gpu, slots = " for the GPU", f"{self.max_running} at once"
            raise QueueFullError(
                f"the collector is full{for_gpu}: {running} running and {waiting} waiting make "
                f"{running + waiting} queries, and it has room for {room} in all ({slots} and "
                f"max_waiting={max_waiting}). Try again later, or make a Collector with a larger "
                "max_waiting"
            )


def _open(slot: Slot) -> None:
    if slot.gate is not None and slot.gate.locked():
        slot.gate.release()


def stats_of(cpu: Admission, gpus: Sequence[Admission]) -> dict[str, float]:
    """Add up what `Collector.stats` explains."""
    found = holding(cpu.lock, _counted, cpu, gpus)  # the lock is that of all
    found |= health_of_gpus()
    found |= {"streams": len(cpu.streams), "max_streams": cpu.streams.most}
    limit = inf if cpu.max_waiting is None else cpu.max_waiting
    return {**found, "max_running": cpu.max_running, "max_waiting": limit}


def _counted(cpu: Admission, gpus: Sequence[Admission]) -> dict[str, float]:
    found: dict[str, float] = {"submitted": 0, "gpu_running": 0, "gpu_waiting": 0}
    for admission in (cpu, *gpus):
        running = admission.in_slots()
        abandoned = sum(query.done for query in running)
        now: dict[str, float] = {
            "running": len(running),
            "abandoned": abandoned,
            "paused": admission.paused,
            "waiting": admission.waiting,
            **asdict(admission.counts),
        }
        for key, value in now.items():
            found[key] = found.get(key, 0) + value
        # Not counted by itself: who is interrupted would have to count it, and take that back.
        found["submitted"] += admission.counts.ended + len(running) - abandoned + now["waiting"]
        if admission is not cpu:
            found["gpu_running"] += now["running"]
            found["gpu_waiting"] += now["waiting"]
    return found
