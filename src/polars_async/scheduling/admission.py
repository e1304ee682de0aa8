"""Which query runs now and which waits: slots, the queue before them, and the counts."""

from __future__ import annotations

from math import inf
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any, Final

from polars_async._runtime.fork import new_lock
from polars_async._runtime.nesting import in_query, on_thread_of_polars
from polars_async._runtime.unpatched import holding
from polars_async.bridges.waiting import wake
from polars_async.errors import CollectorClosedError, QueueFullError
from polars_async.scheduling.counts import Counts, State
from polars_async.scheduling.fair_queue import FairQueue
from polars_async.scheduling.memory_use import MemoryUse
from polars_async.scheduling.open_streams import OpenStreams
from polars_async.scheduling.pauses import Pauses
from polars_async.scheduling.query import Owner
from polars_async.scheduling.sizes import (
    SMALL,
    SMALL_SIZE,
    UNKNOWN,
    UNKNOWN_SIZE,
    Limits,
    Load,
    large_at_once,
)
from polars_async.scheduling.slots import Slot
from polars_async.wording import Ahead

if TYPE_CHECKING:
    from _thread import LockType, RLock
    from collections.abc import Callable

    from polars_async.bridges.waiting import Waiter
    from polars_async.scheduling.estimates import Estimate
    from polars_async.scheduling.fair_queue import Entry, Picked
    from polars_async.scheduling.memory import Memory
    from polars_async.scheduling.query import Query
    from polars_async.scheduling.sizes import Room


_KEPT: Final = 8
"""Worker threads that are kept for the next queries, where their number is not fixed."""
_SLOW: Final = 0.01
"""Seconds after which a look at a plan counts as slow: it may be over a large frame. A short one
may wait for the GIL for half of that."""
_MANY: Final = 4
"""How many times the usual slots queries of the streaming engine may take where looks are dear."""
_LEAST_MEASURED: Final = 0.02
"""Seconds of a query below which its processor time tells nothing: the kernel counts in ticks."""
_WORK_LASTS: Final = 0.05
"""Seconds that a sum of the work lasts: a full queue may reject thousands of queries a second."""


class Admission:
    """
    The slots, as many as `limits` allows, and the queue of the queries that wait for one.

    A query takes a slot that it finds free. The slot's thread keeps it from query to query, also
    while it estimates those in the queue, and gives it back when none is left to start.

    A stream that waits for its consumer is paused, and has no slot: see `Pauses`. Whatever frees a
    slot offers it first to those whose consumers are back, so that none of them waits beside a slot
    that it could use.

    `lock` guards all of it, and the state of every query admitted here. It is held for a few
    instructions at a time, never while a query runs or is estimated, or a waiter is woken. It is
    reentrant because a signal handler or a finaliser may come in at any instruction and cancel a
    query.
    """

    __slots__ = (
        "__weakref__",
        "_inline",
        "_is_look_dear",
        "_pauses",
        "_queue",
        "_slots",
        "_started_unestimated",
        "_work",
        "_work_summed_at",
        "closed",
        "counts",
        "cpu_seconds",
        "limits",
        "lock",
        "max_waiting",
        "memory_is_short",
        "memory_use",
        "owner",
        "reserved",
        "spare",
        "streams",
        "waiters",
    )

    def __init__(
        self,
        limits: Limits,
        max_waiting: int | None = None,
        *,
        cpu_seconds: Callable[[], float] = process_time,
        is_look_dear: Callable[[], bool] = bool,
        lock: RLock | None = None,
        streams: OpenStreams | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.lock = lock or new_lock()
        self.limits = limits
        self.max_waiting = max_waiting
        self.cpu_seconds = cpu_seconds
        """Returns the processor time of all that runs the queries so far."""
        self._is_look_dear = is_look_dear
        self.spare = 0
        """How many more queries may start, whatever is known of them: see `Limits.spare`."""
        self.memory_use = None if memory is None else MemoryUse(memory)
        """What its queries take of the memory, if that has a limit."""
        self.memory_is_short = False
        """Whether no more than ``limits.slots`` queries may run, however idle the processors."""
        self.closed = False
        self.counts = Counts()
        self.owner = Owner(self.lock, self.counts, self._leave)
        """What its queries know of it."""
        self._slots: set[Slot] = set()
        self.streams = OpenStreams() if streams is None else streams
        self._pauses = Pauses(self._slots)
        self._inline: set[Slot] = set()
        self._queue: FairQueue[Query[Any]] = FairQueue(inf if memory is None else memory.small)
        self._started_unestimated = -inf  # when a slot last started such a query, by perf_counter
        self._work = 0.0  # of all queries here, in seconds, as it was at this time:
        self._work_summed_at = -inf
        self.waiters: dict[Waiter, None] = {}
        self.reserved: Slot | None = None
        """The last slot that `enter` made: its caller may be interrupted before it gets it."""

    @property
    def max_running(self) -> int:
        """How many queries run at once at most."""
        return self.limits.most

    @property
    def exclusive(self) -> bool:
        """Whether the slots are those of GPUs."""
        return self.limits.exclusive

    @property
    def memory(self) -> Memory | None:
        """The limit of memory, if there is one."""
        return None if self.memory_use is None else self.memory_use.memory

    @property
    def lacks_memory(self) -> bool:
        """Whether the last look found a query that nothing but memory held up."""
        return self.memory_use is not None and self.memory_use.is_lacking

    @property
    def wants_look(self) -> bool:
        """Whether one more thread should look for a query: one in the queue may start."""
        with self.lock:
            if not self._queue or not self._may_look():
                return False
            return self._queue.has_fitting(self._room().fits)

    def may_start(self) -> bool:
        """
        Return whether a query in the queue may have room, with the lock held.

        Those that are next, and that nothing but memory holds up, are noted as such: no thread
        looks at them as long as there is no room.
        """
        room = self._room()
        if self.memory_use is not None:
            self._queue.first_without_memory(self.memory_use.lacking_in(room))
            self.memory_use.is_lacking = True  # as it was, until a thread has looked
        return self._queue.has_fitting(room.fits)

    @property
    def running(self) -> int:
        """How many queries run, including cancelled ones that have not stopped yet."""
        return len(self.in_slots())

    @property
    def waiting(self) -> int:
        """How many queries are in the queue."""
        return len(self._queue)

    @property
    def threads(self) -> int:
        """How many worker threads have a query, or look for one, now."""
        return len(self._slots) + len(self._pauses)

    @property
    def threads_to_keep(self) -> int:
        """How many worker threads may be needed soon."""
        usual = self.limits.slots if self.limits.fixed else max(self.limits.slots, _KEPT)
        return max(usual, len(self._slots)) + len(self._pauses)

    @property
    def paused(self) -> int:
        """How many queries are paused, or wait for a slot after a pause."""
        return len(self._pauses)

    def in_slots(self) -> list[Query[Any]]:
        """Return the queries that run or are paused."""
        return holding(self.lock, self._in_slots)

    def in_queue(self) -> list[Query[Any]]:
        """Return the queries in the queue."""
        return holding(self.lock, list, self._queue)

    def states(self) -> dict[Query[Any], str]:
        """Return the queries that run, are paused or wait, and which of these."""
        return holding(self.lock, self._states)

    def needs_estimate(self, query: Query[Any]) -> bool:
        """
        Return whether it depends on the estimate of `query`, which has none, if it is admitted.

        That is so where the queue is full, and slots reserved for small queries are open. Called
        with the lock held.
        """
        if query.estimate is not None or query.priority != 0 or self._has_room(query):
            return False
        return self._open_slots > 0

    def enter(self, query: Query[Any]) -> Slot | None:
        """
        Admit `query`: start it in a free slot, or queue it. Called with the lock held.

        Return a slot that needs a thread, or None. The slot has the query, or is to be filled from
        the queue.

        A query submitted by a running one goes beyond the slots: the running one may wait for it,
        and both would wait for ever for a slot. If the submitting thread is one of Polars' own, it
        runs the query itself, in an `inline` slot, since other queries may need that very thread.
        Streams need another thread, since the submitting one consumes them. Exclusive slots, those
        of a GPU, make none of these exceptions.

        Raises
        ------
        CollectorClosedError
            The collector was closed.
        QueueFullError
            The queue is full, or too many streams are open.
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
            self._start(query, slot)
            return slot
        at_once = not self._queue and self._starts_unestimated(query.is_pooled)
        if at_once or (not self.exclusive and in_query()):
            slot = self.reserved = Slot()
            self._slots.add(slot)
            self._start(query, slot)
            if at_once and self.memory_use is not None:
                self.memory_use.count_as_all(slot)
            return slot
        if not self._has_room(query):
            raise self._full_error()
        self._add(query)
        if not self._may_look():
            return None
        slot = self.reserved = Slot()
        self._slots.add(slot)
        return slot

    def start_inline(self, query: Query[Any], slot: Slot) -> bool:
        """Start `query` in `slot`, with the lock held, or return False if this was closed."""
        if self.closed:
            return False
        query.set_running()
        self.take_inline(query, slot)
        return True

    def take_inline(self, query: Query[Any], slot: Slot) -> None:
        """Have `close` wait for `query` until `end_inline`; called with the lock held."""
        slot.query = query
        self._inline.add(slot)

    def end_inline(self, query: Query[Any], slot: Slot) -> None:
        """Free `slot` of `query`, which has ended, with the lock held; may be called again."""
        if slot in self._inline:
            self.counts.run_seconds += query.times.run_seconds or 0.0
            self._inline.discard(slot)

    @property
    def has_only_small(self) -> bool:
        """Whether no query waits, and none but small ones run; read without the lock."""
        if self._queue:
            return False
        if self._slots or self._inline:
            for slot in (*self._slots, *self._inline):
                query = slot.query
                if query is not None and not query.is_small:
                    return False
        return True

    def take_over(self, query: Query[Any]) -> Slot | None:
        """
        Admit `query`, whatever the limits, after another admission had admitted it.

        If a running query submitted it, it starts at once, as in `enter`. Return a slot that needs
        a thread, or None.
        """
        with self.lock:
            if query.is_nested:
                slot = Slot()
                self._slots.add(slot)
                self._start(query, slot)
                return slot
            self._add(query)
            if not self._may_look():
                return None
            slot = Slot()
            self._slots.add(slot)
            return slot

    def forget(self, query: Query[Any], slot: Slot | None) -> None:
        """Undo, with the lock held, what `enter` may have done for `query`."""
        self._queue.discard(query)
        self.streams.discard(query)
        if slot is not None:
            slot.query = None
            self._inline.discard(slot)
            self._free(slot)

    def share_of(self, slot: Slot) -> float | None:
        """Return the share of the processors that were busy since the slot's query started."""
        query, before = slot.query, slot.cpu_seconds
        if query is None or before is None or query.times.started is None:
            return None
        seconds = perf_counter() - query.times.started
        if seconds < _LEAST_MEASURED:
            return None
        used = max(0.0, self.cpu_seconds() - before)
        return min(1.0, used / seconds / self.limits.processors)

    def has(self, slot: Slot) -> bool:
        """Return whether `slot` is still valid: `forget` may have taken it back."""
        with self.lock:
            return slot in self._slots

    def next_unestimated(self, slot: Slot, *, from_behind: bool) -> Entry[Query[Any]] | None:
        """
        Return the entry of a query to be estimated without the lock; None if all have been.

        The thread of `slot` estimates it. With `from_behind`, it is the last one that came: it may
        be small, and need not wait until all before it have been looked at. While another thread is
        at a slow look, it is the last one too, and one that came after that look began: those that
        came with a large query may be as large, and would take the processors with their looks.
        """
        with self.lock:
            since = self._slow_look(slot)
            entry = self._queue.next_unestimated(from_behind=from_behind or since > 0, since=since)
            slot.looks_since = None if entry is None else perf_counter()
            slot.looks_after = self._queue.came
            return entry

    def _slow_look(self, slot: Slot) -> int:
        """Return how many queries had come when the last slow look of others began; else 0."""
        late = perf_counter() - _SLOW
        slow = [
            other.looks_after
            for other in self._slots
            if other is not slot and other.looks_since is not None and other.looks_since < late
        ]
        return max(slow, default=0)

    def fill(
        self, slot: Slot, estimated: list[Entry[Query[Any]]], *, only_if_certain: bool
    ) -> bool:
        """
        Rank the `estimated` ones, and start the best query in `slot`, or release the slot.

        With `only_if_certain`, do not start a large query while unestimated ones wait. Return False
        if the slot was released; else its thread has a query to run, or more of them to estimate.
        """
        with self.lock:
            queue = self._queue
            slot.looks_since = None
            for entry in estimated:
                query = entry.item  # read once: a finaliser may cancel it at any moment
                expected = None if query is None else query.estimate
                if query is not None:  # its engine may have been chosen with the estimate
                    entry.pooled = query.is_pooled
                if expected is None:
                    queue.rank(entry, UNKNOWN)
                else:
                    seconds, fingerprint, _, share, memory, _ = expected
                    queue.rank(entry, seconds, fingerprint, share, memory)
            if slot not in self._slots or len(self._slots) > self.max_running:
                self._free(slot)
                return False
            can_look = queue.has_unestimated_since(self._slow_look(slot))
            if only_if_certain and queue.is_undecided:
                if not can_look:  # the thread at a slow look goes on
                    self._free(slot)
                return can_look
            room = self._room()
            use = self.memory_use
            while (
                picked := queue.take(room.fits, None if use is None else use.lacking_in(room))
            ) is not None:
                if self._start_picked(picked, slot, room):
                    return True
            if can_look:
                return True
            self._free(slot)
            return False

    def reserve_delay(self) -> float:
        """
        Return how many seconds a reserved slot should stay idle.

        While recent queries each took under 1 ms, estimating one costs more than running it, so the
        other slots run them without; the reserved slot helps only after they have started nothing
        for 10 ms, whatever keeps them.
        """
        with self.lock:
            is_idle = (
                self._queue.is_quick and bool(self._queue) and not self._may_start_unestimated()
            )
            return self._started_unestimated + SMALL - perf_counter() if is_idle else 0.0

    def release(self, slot: Slot) -> bool:
        """
        Take `slot` from a query that really ended; return False if its thread has to give it up.

        Called with the lock held. The slot may have its next query then, or have to be filled.
        """
        query, slot.query = slot.query, None
        queue, slots = self._queue, self._slots
        if slot.inline:
            self._inline.discard(slot)
        if query is not None and query.is_stream:
            self.streams.discard(query)
            self._pauses.forget(query)
        seconds = None if query is None else query.times.run_seconds
        if seconds is not None:
            self.counts.run_seconds += seconds
            completed = query is not None and query.state is State.COMPLETED
            queue.note_ended(seconds, overtook=slot.overtook, completed=completed)
        # The next query starts in the same hold of the lock in which the last one ended. If the
        # slot were free in between, a query submitted just then would take it, past the queue.
        is_free = slot in slots and len(slots) <= self.max_running
        if queue and is_free and not (self._pauses.any_returns and self._returning_is_next()):
            room = self._room() if queue.has_ranked or not queue.is_quick else None
            fits = None if room is None else room.fits
            picked = queue.take_quickly(fits, unestimated=self._may_start_unestimated())
            if picked is None and fits is not None and self.memory_use is None:
                picked = queue.take_single(fits)
            if picked is None and not queue.has_ranked and not self.limits.fixed:
                picked = queue.take_unpooled(self._starts_unestimated)
            if picked is not None:
                self._start_picked(picked, slot, room)
                if not picked.load.is_small:
                    self._started_unestimated = perf_counter()
            return True
        self._free(slot)
        return False

    def idle_slots(self) -> list[Slot]:
        """Take the free slots that queued queries could use, for threads that fill them."""
        with self.lock:
            idle = min(self.max_running - len(self._slots), len(self._queue))
            if not self.limits.fixed:
                idle = min(idle, max(1, self.spare) - self._looking())
            slots = [Slot() for _ in range(idle)]
            self._slots.update(slots)
            return slots

    def give_back(self, slot: Slot) -> None:
        """Free a slot that was not used."""
        with self.lock:
            self._free(slot)

    def pause(self, query: Query[Any]) -> LockType:
        """Free the slot of a query that waits for its consumer; return the gate to wait at."""
        with self.lock:
            gate = self._pauses.begin(query)
            if self._pauses.any_returns and self._returning_is_next():
                self._resume_next()
            return gate

    def resume(self, query: Query[Any]) -> None:
        """
        Have a paused query, whose consumer is back, go on as soon as a slot is free for it.

        A query that a running one submitted, or reads, goes on at once: see `enter`.
        """
        holding(self.lock, self._resume, query)

    def let_end(self, query: Query[Any]) -> None:
        """Open the gate of a paused query that was cancelled: it needs no slot to end."""
        holding(self.lock, self._pauses.let_end, query)

    def re_estimate(self, estimate: Estimate) -> None:
        """Rank anew the queued queries of one shape, by a corrected estimate."""
        with self.lock:
            self._queue.re_estimate(
                estimate.fingerprint, estimate.seconds, estimate.share, estimate.memory
            )

    def raise_priority(self, query: Query[Any], priority: int) -> None:
        """Have `query` wait with a higher `priority`, with the lock held, if it waits here."""
        if self._queue.discard(query) and query.state is State.WAITING:
            query.priority = priority
            self._add(query)

    def add_waiter(self, waiter: Waiter) -> bool:
        """Have `waiter` woken when no query runs or waits; return False if that is so already."""
        return holding(self.lock, self._add_waiter, waiter)

    def remove_waiter(self, waiter: Waiter, *, last_cancels: bool) -> bool:  # noqa: ARG002  # as Query
        """Remove `waiter`; return False if it was woken already."""
        return holding(self.lock, self._remove_waiter, waiter)

    def wake_if_empty(self) -> None:
        """Wake the waiters for the last query to end, if no query is left."""
        waiters: list[Waiter] = []
        try:
            holding(self.lock, self._move_waiters, waiters)
            wake(waiters)
        except BaseException:  # out of a signal handler
            wake(waiters)
            raise

    def reset(self) -> list[Query[Any]]:
        """Forget and return all queries, in a forked child: it does not have their threads."""
        lost = [*self.in_slots(), *self._queue]
        self._slots.clear()
        self._pauses.clear()
        self._inline.clear()
        self.streams.clear()
        self._queue.clear()
        self.waiters.clear()
        return lost

    def _add(self, query: Query[Any]) -> None:
        # As a list: in half the time.
        running = sum([slot.query is not None for slot in self._slots])
        query.ahead = Ahead(running, len(self._queue))
        work, share, memory = None, None, 0 if self.memory_use is None else None
        if query.estimate is not None:
            work, _, _, share, memory, _ = query.estimate
        self._queue.add(
            query,
            priority=query.priority,
            work=work,
            share=share,
            pooled=query.is_pooled,
            memory=memory,
        )

    def _starts_unestimated(self, pooled: bool) -> bool:  # noqa: FBT001  # as in `Load`
        """Return whether one more query starts without an estimate, in the pool or not."""
        limits, taken = self.limits, len(self._slots)
        if limits.exclusive:
            return taken < limits.slots
        if self.memory_use is not None and not (self._queue.is_quick and self._has_all_memory()):
            return False
        # A slot that is reserved for small queries is not given to one without an estimate.
        if self._queue.is_quick:
            return taken < max(1, limits.slots - 1)
        if limits.fixed:
            return taken < large_at_once(limits.slots)
        if pooled:
            return taken < limits.slots and self._large_running() < large_at_once(limits.slots)
        # Those that share the processors hold up none that is started later. So a few more do no
        # harm, if they prove large, and looks at plans would take more than is gained by the order:
        # the more so the larger the frames are that a look copies.
        most = _MANY * limits.slots if self._is_look_dear() else limits.slots
        sizes = [slot.load_so_far.size for slot in self._slots if slot.query is not None]
        large = sum(size > SMALL_SIZE for size in sizes)
        return large < most and len(sizes) - large < most

    def _may_start_unestimated(self) -> bool:
        """Return whether one more may start without an estimate while all others are quick."""
        if not self.limits.may_start_unestimated(self._large_running()):
            return False
        return self._has_all_memory()

    def _has_all_memory(self) -> bool:
        """Return whether a query may take as much memory as it likes."""
        return self.memory_use is None or self.memory_use.is_free(self._running())

    def _running(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.query is not None]

    def _may_look(self) -> bool:
        """Return whether one more thread may look for a query in the queue."""
        if len(self._slots) >= (self.limits.slots if self._queue.is_quick else self.max_running):
            return False  # more threads than processors only hold up quick queries
        # Where slots are many, one thread that looks is enough: when it starts a query, it has
        # another one look further. One at a slow look does not hold up the others.
        return self.limits.fixed or self._looking() < 1

    def _looking(self) -> int:
        """Return how many threads look for a query, without those at a slow look."""
        late = perf_counter() - _SLOW
        return sum(
            slot.query is None and (slot.looks_since is None or slot.looks_since > late)
            for slot in self._slots
        )

    def _room(self) -> Room:
        """Return what may start now beside the queries that run."""
        limits = self.limits
        running = self._running()
        if limits.fixed:
            room = limits.room([slot.load for slot in running])
        else:
            pool_is_taken = any(slot.takes_pool for slot in running)
            loads = [slot.load_so_far for slot in running]
            room = limits.room(loads, self.spare, pool_is_taken=pool_is_taken)
            if self.memory_is_short:
                room.total = min(room.total, limits.slots - len(running))
        if self.memory_use is not None:
            self.memory_use.limit_room(room, running)
        return room

    def too_large(self) -> Query[Any] | None:
        """Return the query that has outgrown the memory, if one has, with the lock held."""
        return None if self.memory_use is None else self.memory_use.too_large(self._running())

    def sample_memory(self, *, tell: bool = False) -> bool:
        """Note what queries take: see `MemoryUse.sample`; return False if none may be large."""
        with self.lock:
            use = self.memory_use
            return use is not None and use.sample(self._running(), tell=tell)

    def _in_slots(self) -> list[Query[Any]]:
        slots = (*self._slots, *self._inline)
        return [*[slot.query for slot in slots if slot.query is not None], *self._pauses]

    def _states(self) -> dict[Query[Any], str]:
        states = dict.fromkeys(self._queue, "waiting")
        states |= dict.fromkeys(self._in_slots(), "running")
        return states | dict.fromkeys(self._pauses, "paused")

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
        self._pauses.note_return(query)
        if self._pauses.any_returns:
            self._resume_next()

    def _leave(self, query: Query[Any]) -> None:
        """
        Remove a query that was cancelled or timed out while it waited, with the lock held.

        If it was the last one, its waiters and those of the admission are woken together.
        """
        self._queue.discard(query)
        self.streams.discard(query)
        if self.waiters and self._is_empty():
            query.wakes(self.waiters)  # before they are here no more
            self.waiters.clear()

    def _free(self, slot: Slot) -> None:
        self._slots.discard(slot)
        if self._pauses.any_returns:
            self._resume_next()

    def _returning_is_next(self) -> bool:
        """Return whether a free slot goes to a query after its pause rather than to the queue."""
        return self._pauses.goes_first(self._room_after_pause(), beside_queue=bool(self._queue))

    def _resume_next(self) -> None:
        """Give free slots to queries whose consumers are back, in the order of their return."""
        while len(self._slots) < self.max_running:
            if not self._pauses.resume_next(self._room_after_pause()):
                break

    def _room_after_pause(self) -> Room:
        room = self._room()
        room.memory = inf  # they have taken it
        return room

    def _start_picked(self, picked: Picked[Query[Any]], slot: Slot, room: Room | None) -> bool:
        if not self._start(picked.item, slot, picked.load, overtook=picked.overtook):
            return False
        if picked.item.estimate is None and self.memory_use is not None:
            self.memory_use.count_as_all(slot)
        if self.spare and room is not None and not room.fits_by_kind(picked.load):
            self.spare -= 1
        return True

    def _start(
        self,
        query: Query[Any],
        slot: Slot,
        load: Load | None = None,
        *,
        overtook: bool = False,
    ) -> bool:
        waited = query.set_running()
        if waited is None:
            return False
        slot.alone = True
        if len(self._slots) + len(self._inline) > 1:
            for other in (*self._slots, *self._inline):
                if other.query is not None:
                    slot.alone = other.alone = False
        if self.memory_use is not None:
            self.memory_use.start(slot, beside=self._running())
            if (held_up := query.times.memory_seconds) > 0:
                self.counts.memory_waits += 1
                self.counts.memory_seconds += held_up
        slot.query = query
        slot.load = load or Load(UNKNOWN_SIZE, None, query.is_pooled)
        slot.overtook = overtook
        # While queries are quick, there is nothing to learn that would be worth a reading.
        measured = not self.limits.fixed and not self._queue.is_quick
        slot.cpu_seconds = self.cpu_seconds() if measured else None
        self.counts.queue_seconds += waited
        return True

    def _large_running(self) -> int:
        """
        Return how many running queries are not small.

        That is always 0 where slots are exclusive: a query there takes nothing from others.
        """
        number = 0
        if self.exclusive:
            return number
        for slot in self._slots:  # a sum over a generator takes twice as long
            if slot.query is not None and not slot.load.is_small:
                number += 1
        return number

    def _is_empty(self) -> bool:
        return not self._queue and not self._in_slots()

    def _has_room(self, query: Query[Any]) -> bool:
        """Return whether no more than `max_waiting` queries wait once the open slots are filled."""
        if self.max_waiting is None or len(self._queue) < self.max_waiting:
            return True
        return len(self._queue) + 1 - self._starting(query.load) <= self.max_waiting

    def _starting(self, newcomer: Load | None = None) -> int:
        """Return how many queries of the queue, and of a newcomer, find room to start now."""
        kinds, room = self._queue.kinds, self._room()
        unknown = len(self._queue) - sum(kinds)
        if newcomer is not None:
            kinds[newcomer.kind] += 1
        if self.lacks_memory:  # none but small ones, though there are slots
            kinds[SMALL_SIZE + 1 :] = [0] * (len(kinds) - SMALL_SIZE - 1)
            unknown = 0
        return room.of_kinds(kinds, unknown)

    @property
    def _open_slots(self) -> int:
        """How many slots have no query: the free ones, and those that are about to be filled."""
        taken = sum(slot.query is not None for slot in self._slots)
        return max(0, self.max_running - taken)

    def _full_error(self) -> QueueFullError:
        # Paused queries have no slots, and those that are about to start wait no more.
        starting = self._starting()
        waiting = len(self._queue) - starting
        running = self.max_running - self._open_slots + starting
        for_gpu, slots = "", f", of at most max_running={self.max_running}"
        if self.exclusive:
            for_gpu, slots = " for the GPU", f", of at most {self.max_running} at once"
        if running < self.max_running:
            if self.limits.fixed:
                slots += " (the free slots are reserved for small queries)"
            else:
                slots = ", as many as the processors have room for"
            if self.memory is not None and self.lacks_memory:
                slots = f", as many as max_memory={self.memory.limit:,} bytes let run"
        seconds = self._seconds_of_work()
        return QueueFullError(
            f"the collector is full{for_gpu}: {waiting} waiting, of at most "
            f"max_waiting={self.max_waiting}, and {running} running{slots}. Try again "
            f"in about {max(seconds, 0.1):.1f} s, or make a Collector with a larger max_waiting",
            seconds,
        )

    def _seconds_of_work(self) -> float:
        """Return in how many seconds all queries here are expected to be done."""
        now = perf_counter()
        if now - self._work_summed_at > _WORK_LASTS:
            self._work_summed_at = now
            self._work = self._queue.work + sum([slot.work_left for slot in self._slots])
        limits = self.limits
        return self._work / (limits.slots if limits.exclusive else large_at_once(limits.slots))
