"""A lane: slots, the line before them, and the threads behind them."""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from polars_async._runtime import fork
from polars_async._runtime.nesting import in_query
from polars_async._runtime.unpatched import holding, sleep
from polars_async._runtime.upstream import BUILT_IN_ENGINES
from polars_async.bridges.waiting import wake
from polars_async.events import EventKind
from polars_async.executors.gpu_thread import GPU_IN_PROCESS
from polars_async.executors.staying import log_once
from polars_async.executors.threads import IN_PROCESS, ThreadPool, named_thread
from polars_async.gpu.offload import check_outside
from polars_async.scheduling import shutdown
from polars_async.scheduling.admission import Admission
from polars_async.scheduling.fallback import fall_back
from polars_async.scheduling.open_streams import MAX_STREAMS, OpenStreams
from polars_async.scheduling.query import State

if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Iterable

    from polars_async.bridges.waiting import Waiter
    from polars_async.executors import QueryExecutor
    from polars_async.gpu.status import GpuStatus
    from polars_async.scheduling import fair_queue
    from polars_async.scheduling.admission import Slot
    from polars_async.scheduling.estimates import CostModel
    from polars_async.scheduling.query import Query


_MOST_TOGETHER: Final = 256
"""So many newcomers a thread appraises at once; after that it takes whom it has, be it long."""
_MOMENT: Final = 0.002
"""Seconds that it does so at most: fewer at once, where their plans are slow to look at."""

_lanes: Final[WeakSet[Lane]] = WeakSet()


class Lane:
    """
    Where the queries of one kind go: those for the CPU, or those for the GPU.

    They run in its `executor`, but for those whose engine is the caller's own object: it may hold what
    cannot be sent. With `tiny_here` those stay here, too, that are expected to be small, or to take
    longer to be sent, and have no Python functions.

    The lane of the GPU is `exclusive`: a query there has a whole GPU, and what a running one asks
    for cannot run beside it. All its queries run on one thread, unless they run elsewhere. Its
    `fallback` is that of the CPU, where queries go on that the GPU engine could not run.

    A thread that ends a query takes the next from the line itself, so queries that follow each
    other need no hand-over; threads beyond those that are needed end. A
    running lane is held by its threads alone, so that a collector nobody holds any more ends when
    its queries have.
    """

    __slots__ = (
        "__weakref__",
        "_costs",
        "_here",
        "_threads",
        "_tiny_here",
        "admission",
        "executor",
        "fallback",
    )

    def __init__(
        self,
        max_running: int,
        max_waiting: int | None,
        costs: CostModel,
        *,
        executor: QueryExecutor = IN_PROCESS,
        tiny_here: bool = False,
        exclusive: bool = False,
        fallback: Lane | None = None,
        max_streams: int = MAX_STREAMS,
    ) -> None:
        # Of one lock, so that a query is always in one of them, while it goes over.
        lock = fallback.admission.lock if fallback is not None else None
        both = fallback.admission.streams if fallback is not None else OpenStreams(max_streams)
        self.admission: Admission = Admission(
            max_running, max_waiting, exclusive=exclusive, lock=lock, streams=both
        )
        self.fallback = fallback
        self._threads = ThreadPool(for_gpu=exclusive)
        self.executor = executor
        self._here: QueryExecutor = GPU_IN_PROCESS if exclusive else IN_PROCESS
        self._tiny_here = tiny_here
        self._costs = costs
        _lanes.add(self)
        shutdown.watch(self)

    def use(self, gpu: GpuStatus) -> None:
        """Have as many slots as there are GPUs for queries to run on at once."""
        if (slots := self.executor.prepare(gpu)) is not None:
            self.admission.max_running = slots

    def submit(self, query: Query[Any]) -> Slot | None:
        """
        Run `query` at once where a slot is free, or else when its turn comes.

        Or return a slot in which the calling thread is to run it, by `run_here`.
        """
        exclusive = self.admission.exclusive
        if exclusive:
            check_outside()
        if exclusive or query.is_stream:  # it may wait for a slot later on
            query.is_nested = in_query()
        admission = self.admission
        admitted: Slot | BaseException | None = None
        try:
            if query.reports:
                query.report(EventKind.QUEUED)
                if query.resolution.downgraded:
                    query.report(EventKind.DOWNGRADED)
            admitted = holding(admission.lock, self._admit, query)
            if isinstance(admitted, BaseException):
                raise admitted  # noqa: TRY301  # as one that comes from elsewhere
        except BaseException as error:
            query.cancel()  # it was let in, and nobody will ever have its handle
            if admission.waiters:  # it may have come in between
                admission.wake_if_empty()
            if query.reports and query.state is State.REFUSED:
                query.report(EventKind.REJECTED, error=error)
            raise
        else:
            return admitted
        finally:
            admitted = None  # an error's traceback holds this frame

    def run_here(self, query: Query[Any], slot: Slot) -> None:
        """Run `query`, on one of Polars' own threads that asks for it, in the slot of `submit`."""
        self._run(query, slot)
        if self.admission.closed:
            self._close_executor()

    def of(self, query: Query[Any]) -> Lane:
        """Return the lane where `query`, which came to this one, is now."""
        return self.fallback if self.fallback is not None and query.resolution.fell_back else self

    def pause(self, query: Query[Any]) -> LockType:
        """Let others use the slot of `query`, whose thread then waits at the gate given."""
        lane: Lane = self.of(query)
        with lane.admission.lock:
            gate = lane.admission.pause(query)
            lane._use_idle_slots()
        return gate

    def close(self, *, cancel_waiting: bool, cancel_running: bool = False) -> None:
        """Take no more queries, and let the threads end with the last of those here."""
        admission = self.admission
        try:
            holding(admission.lock, self._refuse_new)
        except BaseException:  # out of a signal handler
            if admission.closed:
                self._threads.close()
            raise
        # A stream may wait for its consumer, and that for ever.
        running = admission.in_slots()
        waiting = [query for query in running if query.is_stream]
        waiting += admission.in_queue()
        for query in (*(waiting if cancel_waiting else ()), *(running if cancel_running else ())):
            query.cancel()
        self._close_executor()

    def _refuse_new(self) -> None:
        self.admission.closed = True
        self._threads.close()

    def reset_after_fork(self, error: BaseException) -> None:
        """Start afresh in a forked child, which has neither the threads nor their queries."""
        self._threads = ThreadPool(for_gpu=self.admission.exclusive)
        self.executor.reset_after_fork()
        for query in self.admission.reset():
            query.lose(error)

    def _admit(self, query: Query[Any]) -> Slot | BaseException | None:
        """
        Let `query` in, with the lock held; or else leave all as it was, but for the count.

        Then it gives why, rather than raise that: a signal handler might raise while it is handled.
        A slot that it gives is for the calling thread.
        """
        admission = self.admission
        # A signal handler may come in, and ask for a query of its own.
        before, admission.reserved = admission.reserved, None
        try:
            admission.counts.downgraded += query.resolution.downgraded
            slot = admission.enter(query)
            if slot is not None and not slot.inline:
                self._start_thread(slot)
        except BaseException as error:  # noqa: BLE001  # full, closed, no thread to be had, or Ctrl-C
            admission.forget(query, admission.reserved)
            admission.counts.rejected += 1
            query.refuse()
            return error
        finally:
            admission.reserved = before
        return slot if slot is not None and slot.inline else None

    def _start_thread(self, slot: Slot) -> None:
        self._threads.start(partial(self._serve, slot), at_once=self.admission.threads)

    def _use_idle_slots(self) -> None:
        for slot in self.admission.idle_slots():
            try:
                self._start_thread(slot)
            except RuntimeError:  # no thread to be had: those that there are go on with the line
                self.admission.give_back(slot)

    def _serve(self, slot: Slot) -> None:
        # Under the lock: the thread that gave the slot is out of `_admit` then, if interrupted.
        goes_on = self.admission.has(slot)
        while goes_on:
            query = slot.query
            goes_on = self._fill(slot) if query is None else self._run(query, slot)
            del query  # or it would live until the next has ended
        if self._threads.threads > self.admission.max_running:
            with self.admission.lock:
                self._threads.shed(self.admission.threads_to_keep)
        if self.admission.closed:
            self._close_executor()

    def _close_executor(self) -> None:
        """Close the place, unless queries of the line still need it."""
        if not self.admission.threads:
            self.executor.close()

    def _fill(self, slot: Slot) -> bool:
        """Find a query for `slot`; False if there is none, and the slot was taken back."""
        admission = self.admission
        together = 1  # since the first may be small already
        was_slow = False
        while slot.query is None:
            if (seconds := admission.reserve_delay()) > 0:
                sleep(seconds)
                continue
            estimated, was_slow = self._estimate(together, was_slow=was_slow)
            if not admission.fill(slot, estimated, only_if_certain=together < _MOST_TOGETHER):
                return False
            together = min(2 * together, _MOST_TOGETHER)
            if len(estimated) > 1:
                # Whoever looked at the line meanwhile did not see these, and gave its slot back.
                with admission.lock:
                    self._use_idle_slots()
        return True

    def _estimate(
        self, at_most: int, *, was_slow: bool
    ) -> tuple[list[fair_queue.Entry[Query[Any]]], bool]:
        """
        Look at some of those in the line, for no longer than a moment.

        Where the last look `was_slow`, the next is at the last in the line, which may be small, and
        need not wait until all before it have been looked at. Gives whether this one was, too.
        """
        estimated: list[fair_queue.Entry[Query[Any]]] = []
        begun = perf_counter()
        while len(estimated) < at_most:
            executor = self.admission.next_unestimated(from_behind=was_slow)
            if executor is None:
                break
            estimated.append(executor)
            query = executor.item
            if query is not None:  # it may leave at any time
                query.set_estimate(self._costs)
            if perf_counter() - begun > _MOMENT:
                return estimated, not was_slow
            was_slow = False
        return estimated, False

    def _run(self, query: Query[Any], slot: Slot) -> bool:
        """Run `query` in `slot`; False if nobody is next, and the slot was taken back."""
        executor = self._executor_of(query)
        operation = None if self.fallback is None else query.operation
        if query.label is None or slot.inline:  # Polars' own threads keep their names
            query.run(executor.run)
        else:
            with named_thread(query.label):
                query.run(executor.run)
        if self.fallback is not None and fall_back(query, operation, self.fallback.admission):
            return self._hand_over(query, slot, self.fallback)
        if query.reports:
            query.report_engine()
        # Done before it is gone: `close` trusts in that, and a fork may come in between. And gone
        # before anybody wakes, who may ask at once for the slot.
        admission = self.admission
        with admission.lock:
            alone = slot.alone
            waiters = query.end()
            # To look at a large plan takes some ms. So that nobody waits for this thread meanwhile,
            # but where it is none of ours, or that of the GPU, which has one:
            away = query.is_worth_estimating and not self.admission.exclusive and not slot.inline
            kept = None if query.reports else self._release(slot, away=away)
        if kept is None:
            # With the slot still taken, since the hook may ask for another query and wait for it:
            # that would be handed to this very thread.
            query.report_end()
            with admission.lock:
                kept = self._release(slot, away=away)
        wake(waiters)
        if not query.settle():
            self._look_back(query, alone=alone, away=away)
        if admission.waiters:
            admission.wake_if_empty()
        del query, operation, waiters  # as in Query.run
        return kept

    def _release(self, slot: Slot, *, away: bool) -> bool:
        """Take back `slot`, with the lock held; gives what `_run` does."""
        kept = self.admission.release(slot)
        if away:
            # At once: a thread that has no slot, and is still counted on, may be let go by another.
            self._threads.step_out()
        return kept

    def _executor_of(self, query: Query[Any]) -> QueryExecutor:
        if type(query.resolution.engine) not in BUILT_IN_ENGINES:
            return self._here
        return self._here if self._tiny_here and self._belongs_here(query) else self.executor

    def _belongs_here(self, query: Query[Any]) -> bool:
        """
        Return whether `query` is better off in this process, or can be nowhere else.

        One with Python functions is not, however small it is: they may end the process. Where that
        is not to be seen, its frames in memory would take long to be sent.
        """
        known = self._costs
        plans = [known.plan(frame) for frame in query.frames]
        if not all(plan.is_sendable for plan in plans):
            log_once(query, "they read or write an open file, or an object of this process")
            return True
        if any(plan.runs_python for plan in plans):
            return False
        query.set_estimate(known)
        expected = query.estimate
        return (
            any(plan.runs_python is None for plan in plans)
            or query.is_small
            or (expected is not None and expected.seconds < known.seconds_to_send(query.frames))
        )

    def _hand_over(self, query: Query[Any], slot: Slot, fallback: Lane) -> bool:
        """Let `fallback` run what this lane could not; gives what `_run` does."""
        admission = self.admission
        lost: Iterable[Waiter] | None = None
        # In its slot until it is in the other lane, since `close` waits for one after the other,
        # and a fork may come at any time.
        query.report_fall_back()
        with admission.lock:
            admission.counts.fell_back += 1
            if not query.done:
                lost = fallback._take_over(query)
            slot.query = None
            kept = admission.release(slot)
        if lost is not None:
            query.report_end()
            wake(lost)
        if admission.waiters:
            admission.wake_if_empty()
        return kept

    def _take_over(self, query: Query[Any]) -> Iterable[Waiter] | None:
        """Let `query` wait here, with the lock held; gives whom to wake if it fails at that."""
        admission = self.admission
        slot = admission.take_over(query)
        if slot is None:
            return None
        try:
            self._start_thread(slot)
        except RuntimeError as error:  # no thread to be had
            if slot.query is None and admission.threads > 1:  # those that there are go on
                admission.give_back(slot)
                return None
            admission.forget(query, slot)
            return query.fail(error)
        return None

    def _look_back(self, query: Query[Any], *, alone: bool, away: bool) -> None:
        """Learn from a query that ended, when nobody waits for it any more."""
        admission = self.admission
        corrected = query.after_end(self._costs, alone=alone)
        if away:
            with admission.lock:
                self._threads.step_in()
        if corrected is not None:
            with admission.lock:
                admission.re_estimate(corrected)
                self._use_idle_slots()


def _reset_after_fork() -> None:
    for lane in list(_lanes):
        lane.reset_after_fork(fork.forked_process_error())


fork.in_child(fork.Step.FAIL, _reset_after_fork)
