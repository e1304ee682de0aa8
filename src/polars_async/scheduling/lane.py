"""A lane: the slots, the queue before them, and the worker threads behind them."""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from polars_async._runtime import fork
from polars_async._runtime.nesting import in_query
from polars_async._runtime.unpatched import holding, is_held, sleep, start_new_thread
from polars_async._runtime.upstream import BUILT_IN_ENGINES
from polars_async.bridges.waiting import wake
from polars_async.events import EventKind
from polars_async.executors.gpu_thread import GPU_IN_PROCESS
from polars_async.executors.staying import log_once
from polars_async.executors.threads import IN_PROCESS, ThreadPool, named_thread
from polars_async.gpu.offload import check_outside
from polars_async.resolution import is_on_gpu
from polars_async.scheduling import shutdown
from polars_async.scheduling.admission import Admission
from polars_async.scheduling.counts import State
from polars_async.scheduling.fallback import fall_back
from polars_async.scheduling.inline import register
from polars_async.scheduling.load import LoadMeter
from polars_async.scheduling.memory_watch import MemoryWatch
from polars_async.scheduling.open_streams import MAX_STREAMS, OpenStreams
from polars_async.scheduling.sizes import Limits
from polars_async.scheduling.telling import report_engine, report_queued, report_rejected

if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable, Iterable

    from polars_async.bridges.waiting import Waiter
    from polars_async.executors import QueryExecutor
    from polars_async.gpu.status import GpuStatus
    from polars_async.scheduling import fair_queue
    from polars_async.scheduling.estimates import CostModel
    from polars_async.scheduling.inline import Inline, Watch
    from polars_async.scheduling.memory import Memory
    from polars_async.scheduling.query import Query
    from polars_async.scheduling.slots import Slot


_MOST_TOGETHER: Final = 256
"""The most queries that a thread estimates in one pass; then it starts the best of those, even a
large one."""
_MOMENT: Final = 0.002
"""Seconds that a pass takes at most: it estimates fewer queries if their plans are slow to read."""

_UNDECIDED: Final = Exception()
"""Stands for the error of a query that is admitted or rejected by its estimate, which it lacks."""

_lanes: Final[WeakSet[Lane]] = WeakSet()


class Lane:
    """
    The way of the queries of one kind: those for the CPU, or those for the GPU.

    `executor` runs them, but for queries whose engine is an object of the caller's own: it may hold
    what cannot be sent, so they run in this process. With `tiny_here`, so do queries without Python
    functions that are estimated to be small, or to take longer to send than to run.

    The lane of the GPU has `exclusive` slots: a query there has a whole GPU, and one that it
    submits cannot run beside it. All of them run on one thread, unless an executor takes them
    elsewhere. `fallback` is the lane of the CPU, where queries go on that the GPU engine could not
    run.

    A thread that ends a query takes the next one from the queue itself, so queries in a row need no
    hand-over between threads; threads in excess end. Nothing but its
    threads keeps a lane alive, so those of a collector that was dropped end with its last query.
    """

    __slots__ = (
        "__weakref__",
        "_costs",
        "_here",
        "_memory_watch",
        "_meter",
        "_threads",
        "_tiny_here",
        "admission",
        "executor",
        "fallback",
        "gpu",
        "inline",
    )

    def __init__(
        self,
        limits: Limits,
        max_waiting: int | None,
        costs: CostModel,
        *,
        executor: QueryExecutor = IN_PROCESS,
        tiny_here: bool = False,
        fallback: Lane | None = None,
        max_streams: int = MAX_STREAMS,
        inline: Inline | None = None,
        memory: Memory | None = None,
    ) -> None:
        # One lock for both, so that a query is in exactly one of them while it falls back.
        lock = fallback.admission.lock if fallback is not None else None
        both = fallback.admission.streams if fallback is not None else OpenStreams(max_streams)
        self.admission: Admission = Admission(
            limits,
            max_waiting,
            cpu_seconds=executor.cpu_seconds,
            is_look_dear=costs.is_look_dear,
            lock=lock,
            streams=both,
            memory=memory,
        )
        self.fallback = fallback
        self._threads = ThreadPool(for_gpu=limits.exclusive)
        self.executor = executor
        self._here: QueryExecutor = GPU_IN_PROCESS if limits.exclusive else IN_PROCESS
        self._tiny_here = tiny_here
        self._costs = costs
        self.inline = inline
        self.gpu: Lane | None = None
        """The lane of queries for which the GPU is chosen on a thread of this lane."""
        register(self.admission)
        self._meter = LoadMeter(self.admission)
        self._memory_watch: MemoryWatch | None = None
        if memory is not None:
            self._memory_watch = MemoryWatch(
                self.admission, executor.memory, stoppable=executor is not IN_PROCESS
            )
            self._memory_watch.measure()
        _lanes.add(self)
        shutdown.watch(self)

    def use(self, gpu: GpuStatus) -> None:
        """Set the number of slots to how many queries the executor can run on the GPUs at once."""
        if (slots := self.executor.prepare(gpu)) is not None:
            self.admission.limits = Limits(slots, exclusive=True)

    def submit(
        self,
        query: Query[Any],
        admit: Callable[[Query[Any]], Slot | BaseException | None] | None = None,
    ) -> Slot | None:
        """
        Admit `query`: it runs at once if a slot is free, or else waits in the queue.

        Return None, or a slot in which the calling thread has to run it, by `run_inline`. If it is
        known to be quick, it may have run there already: see `inline`. `admit` is called in
        place of the method of that name.

        Raises
        ------
        CollectorClosedError, QueueFullError
            As `Admission.enter`; the query is REJECTED then.
        """
        exclusive = self.admission.exclusive
        if exclusive:
            check_outside()
        # It may wait for a slot later on.
        if exclusive or query.is_stream or query.chooser is not None:
            query.is_nested = in_query()
        admission = self.admission
        admitted: Slot | BaseException | None = None
        try:
            report_queued(query)
            if self.inline is not None and self.inline.run(admission, query):
                return None
            if is_held(admission.lock):
                start_new_thread(self._admit_late, (query, admit or self.admit))
                return None
            admitted = (admit or self.admit)(query)
            if isinstance(admitted, BaseException):
                raise admitted  # noqa: TRY301  # as one that comes from elsewhere
        except BaseException as error:
            # A signal handler raised after the query was admitted: its caller never gets a handle.
            query.cancel()
            if admission.waiters:  # for the last query to end, which this one may have been
                admission.wake_if_empty()
            if query.state is State.REJECTED:
                query.drop_error()
                report_rejected(query, error)
            raise
        else:
            return admitted
        finally:
            admitted = None  # an error's traceback holds this frame

    def _admit_late(
        self, query: Query[Any], admit: Callable[[Query[Any]], Slot | BaseException | None]
    ) -> None:
        """
        Admit `query` on a thread of its own.

        A signal handler, or a finaliser, has submitted it while its thread was changing what the
        lock guards: the queue, which was half changed, could not take it.
        """
        admitted = None if query.done else admit(query)
        if isinstance(admitted, BaseException):
            query.wake_rejected()
            report_rejected(query, admitted)

    def run_inline(self, query: Query[Any], slot: Slot) -> None:
        """Run `query` on the thread that submitted it, one of Polars' own, in `slot`."""
        query.choose_engine()
        self._run(query, slot)
        if self.admission.closed:
            self._close_executor()

    def of(self, query: Query[Any]) -> Lane:
        """Return the lane of `query`, which was submitted to this one and may have fallen back."""
        return self.fallback if self.fallback is not None and query.resolution.fell_back else self

    def pause(self, query: Query[Any]) -> LockType:
        """Free the slot of `query` for others; return the gate at which its thread has to wait."""
        lane: Lane = self.of(query)
        with lane.admission.lock:
            gate = lane.admission.pause(query)
            lane.use_idle_slots()
        return gate

    def close(self, *, cancel_waiting: bool, cancel_running: bool = False) -> None:
        """Reject further queries, and have the threads end with the last query."""
        admission = self.admission
        try:
            holding(admission.lock, self._refuse_new)
        except BaseException:  # out of a signal handler
            if admission.closed:
                self._threads.close()
            raise
        # Listed, and cancelled, before those in slots: one that starts meanwhile is in both lists,
        # and none starts in the slot of another that is cancelled here.
        waiting = admission.in_queue()
        running = admission.in_slots()
        # Running streams count as waiting: their consumers may never come back.
        waiting += [query for query in running if query.is_stream]
        for query in (*(waiting if cancel_waiting else ()), *(running if cancel_running else ())):
            query.cancel()
        self._close_executor()

    def _refuse_new(self) -> None:
        self.admission.closed = True
        self._threads.close()

    def reset_after_fork(self, error: BaseException) -> None:
        """Start afresh in a forked child, where the threads do not exist; fail all queries."""
        self._threads = ThreadPool(for_gpu=self.admission.exclusive)
        self.executor.reset_after_fork()
        self._meter.reset_after_fork()
        if self._memory_watch is not None:
            self._memory_watch.reset_after_fork()
        for query in self.admission.reset():
            query.fail_in_fork(error)

    def admit(
        self, query: Query[Any], *, then: Callable[[Any], object] | None = None
    ) -> Slot | BaseException | None:
        """Admit `query` as `_admit` does, and call `then` with it in the same hold of the lock."""
        admitted = holding(self.admission.lock, self._admit, query, then)
        if admitted is _UNDECIDED:
            # By this thread, though the plan may take it some 100 us: the error of a full queue is
            # raised at once, and no query gets it that could start in a reserved slot.
            query.set_estimate(self._costs)
            admitted = holding(self.admission.lock, self._admit, query, then)
        return admitted

    def _admit(
        self, query: Query[Any], then: Callable[[Any], object] | None
    ) -> Slot | BaseException | None:
        """
        Admit `query`, with the lock held, or leave everything but the counts as it was.

        Return an inline slot for the calling thread, or None; `_UNDECIDED` if the query has to be
        estimated first. Return the error of a query that is rejected, rather than raise it: a
        signal handler might raise while it is handled.
        """
        admission = self.admission
        if admission.needs_estimate(query):
            return _UNDECIDED
        # A signal handler may come in and submit a query of its own, which reserves another slot.
        before, admission.reserved = admission.reserved, None
        try:
            admission.counts.downgraded += query.resolution.downgraded
            slot = admission.enter(query)
            if slot is not None and not slot.inline:
                self._start_thread(slot)
            if then is not None:
                then(query)
        except BaseException as error:  # noqa: BLE001  # full, closed, no thread can start, or Ctrl-C
            admission.forget(query, admission.reserved)
            query.set_rejected(error)
            return error
        finally:
            admission.reserved = before
        return slot if slot is not None and slot.inline else None

    def _start_thread(self, slot: Slot) -> None:
        self._threads.start(partial(self._serve, slot), at_once=self.admission.threads)

    def use_idle_slots(self) -> None:
        """Have threads fill the free slots that queries in the queue could use."""
        with self.admission.lock:
            for slot in self.admission.idle_slots():
                try:
                    self._start_thread(slot)
                except RuntimeError:  # no thread can start: the running ones go on with the queue
                    self.admission.give_back(slot)

    def _serve(self, slot: Slot) -> None:
        # `has` takes the lock, which `_admit` of the submitting thread holds until the slot is for
        # sure. If that was interrupted, it has taken the slot back by now.
        goes_on = self.admission.has(slot)
        while goes_on:
            query = slot.query
            if query is None:
                goes_on = self._fill(slot)
            elif query.chooser is not None and self._is_for_gpu(query, slot):
                assert self.gpu is not None
                goes_on = self._hand_over(query, slot, self.gpu)
            else:
                goes_on = self._run(query, slot)
            del query  # or this frame would keep it alive until the next one has ended
        if self._threads.threads > self.admission.threads_to_keep:
            with self.admission.lock:
                self._threads.shed(self.admission.threads_to_keep)
        if self.admission.closed:
            self._close_executor()

    def _close_executor(self) -> None:
        """Close the executor, unless queries still need it."""
        if not self.admission.threads:
            self.executor.close()

    def _fill(self, slot: Slot) -> bool:
        """Find a query for `slot`; return False if there is none and the slot was released."""
        admission = self.admission
        together = 1  # since the first one may be small already
        was_slow = False
        self._meter.look_at_memory()
        while slot.query is None:
            if (seconds := admission.reserve_delay()) > 0:
                sleep(seconds)
                continue
            estimated, was_slow = self._estimate(slot, together, was_slow=was_slow)
            if not admission.fill(slot, estimated, only_if_certain=together < _MOST_TOGETHER):
                self._meter.start(self.use_idle_slots)
                if self._memory_watch is not None and admission.lacks_memory:
                    self._memory_watch.start(self.use_idle_slots)
                return False
            together = min(2 * together, _MOST_TOGETHER)
            # Threads that looked for a query meanwhile did not see those that this one had taken
            # out to estimate them, and released their slots.
            if len(estimated) > 1 or (slot.query is not None and admission.wants_look):
                self.use_idle_slots()
        return True

    def _estimate(
        self, slot: Slot, at_most: int, *, was_slow: bool
    ) -> tuple[list[fair_queue.Entry[Query[Any]]], bool]:
        """
        Estimate queries of the queue, for no longer than a moment; return whether that was slow.

        If the last one `was_slow`, begin with the last query of the queue.
        """
        estimated: list[fair_queue.Entry[Query[Any]]] = []
        begun = perf_counter()
        while len(estimated) < at_most:
            entry = self.admission.next_unestimated(slot, from_behind=was_slow)
            if entry is None:
                break
            estimated.append(entry)
            query = entry.item
            if query is not None:  # else it was cancelled just now
                query.set_estimate(self._costs)
            if perf_counter() - begun > _MOMENT:
                return estimated, not was_slow
            was_slow = False
        return estimated, False

    def _run(self, query: Query[Any], slot: Slot) -> bool:
        """Run `query` in `slot`; return False if no query is next and the slot was released."""
        executor = self._executor_of(query)
        operation = None if self.fallback is None else query.operation
        watch = self._watch(query, slot, executor)
        if query.label is None or slot.inline:  # Polars' own threads keep their names
            query.run(executor.run)
        else:
            with named_thread(query.label):
                query.run(executor.run)
        if watch is not None:
            watch.stop()
        if self.fallback is not None and fall_back(query, operation, self.fallback.admission):
            query.announce(EventKind.FELL_BACK, query.resolution.cause)
            return self._hand_over(query, slot, self.fallback, fell_back=True)
        if query.reports:
            report_engine(query)
        # First the query is done, then its slot is free, in one hold of the lock. `close` waits for
        # the queries in slots: with the slot free first, it could return before the result is
        # there, and a fork in between would lose the query. The waiters are woken last: one that
        # submits its next query at once finds the slot free, or given to the next in the queue.
        admission = self.admission
        share = admission.share_of(slot)
        use, memory = admission.memory_use, None
        if use is not None:
            if not use.memory.are_small((slot,)):
                admission.sample_memory()  # the last one may be long ago: now the result is there
            memory = use.of_ended(slot, admission.limits.processors)
        with admission.lock:
            alone = slot.alone
            waiters = query.set_finished()
            # Estimating a large plan takes some ms. Another thread takes queries meanwhile, unless
            # this is a thread of Polars, or the one of the GPU.
            away = query.is_worth_estimating and not self.admission.exclusive and not slot.inline
            kept = None if query.reports else self._release(slot, away=away)
        if kept is None:
            # With the slot still taken: a hook may submit another query and wait for it, and that
            # would be handed to this very thread.
            query.report_end()
            with admission.lock:
                kept = self._release(slot, away=away)
        wake(waiters)
        self._learn(query, watch, alone=alone)
        if not query.drop_inputs():
            self._observe_cost(query, alone=alone, share=share, memory=memory, away=away)
        if admission.waiters:
            admission.wake_if_empty()
        del (
            query,
            operation,
            waiters,
            watch,
        )  # the frames of an error's traceback may lead back here
        return kept

    def _watch(self, query: Query[Any], slot: Slot, executor: QueryExecutor) -> Watch | None:
        """Begin to measure what `query` takes, which starts now."""
        memory = self.admission.memory
        # Not only if it may take long: one with a priority counts as small, and may take much.
        if self._memory_watch is not None and memory is not None and not memory.is_small(slot.load):
            self._memory_watch.start(self.use_idle_slots)
        if self.inline is not None and executor is IN_PROCESS and not slot.inline:
            return self.inline.watch(query)
        return None

    def _learn(self, query: Query[Any], watch: Watch | None, *, alone: bool) -> None:
        """Note what there is to be learned of the run of `query`, which has ended."""
        if watch is not None and self.inline is not None:
            self.inline.learn(watch, query)
        query.note_time_on_engine(alone=alone)

    def _is_for_gpu(self, query: Query[Any], slot: Slot) -> bool:
        """
        Have the engine of `query` chosen, unless it is; return whether that is the GPU.

        The query then belongs to the lane of the GPU, and has to be handed over.
        """
        admission = self.admission
        query.choose_engine(is_idle=admission.running == 1 and not admission.waiting)
        query.times.restart()
        slot.load = slot.load._replace(pooled=query.is_pooled)
        operation = query.operation
        if self.gpu is None or operation is None or not is_on_gpu(query.resolution):
            return False
        owner = self.gpu.admission.owner
        return query.requeue(operation, query.resolution, owner, has_run=False)

    def _release(self, slot: Slot, *, away: bool) -> bool:
        """Release `slot`, with the lock held; return as `_run` does."""
        kept = self.admission.release(slot)
        if away:
            # In the same hold of the lock: a thread without a slot counts as one in excess, and
            # another thread that sheds these would end it.
            self._threads.step_out()
        return kept

    def _executor_of(self, query: Query[Any]) -> QueryExecutor:
        if type(query.resolution.engine) not in BUILT_IN_ENGINES:
            return self._here
        return self._here if self._tiny_here and self._stays_here(query) else self.executor

    def _stays_here(self, query: Query[Any]) -> bool:
        """
        Return whether `query` is better off in this process, or cannot run elsewhere.

        A query with Python functions goes elsewhere however small it is: they may end the process.
        So does a function that runs instead of a query.
        If the plan does not show whether it has any, it stays here if its frames in memory would
        take long to send.
        """
        if query.fingerprint is not None:
            return False
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

    def _hand_over(
        self, query: Query[Any], slot: Slot, lane: Lane, *, fell_back: bool = False
    ) -> bool:
        """Have `lane` run `query` instead, which waits again by now; return as `_run` does."""
        admission = self.admission
        lost: Iterable[Waiter] | None = None
        # The query enters the other lane before it leaves its slot here, in one hold of the lock
        # that both share. `close` waits for one lane after the other, and a fork may come at any
        # time: out of both for a moment, the query would be missed by either.
        with admission.lock:
            admission.counts.fell_back += fell_back
            if not query.done:
                lost = lane._take_over(query)
            slot.query = None
            kept = admission.release(slot)
        if lost is not None:
            query.report_end()
            wake(lost)
        if admission.waiters:
            admission.wake_if_empty()
        return kept

    def _take_over(self, query: Query[Any]) -> Iterable[Waiter] | None:
        """Admit `query`, with the lock held; return the waiters to wake if it failed at that."""
        admission = self.admission
        slot = admission.take_over(query)
        if slot is None:
            return None
        try:
            self._start_thread(slot)
        except RuntimeError as error:  # no thread can start
            if slot.query is None and admission.threads > 1:  # a running thread takes it later
                admission.give_back(slot)
                return None
            admission.forget(query, slot)
            return query.set_error(error)
        return None

    def _observe_cost(
        self,
        query: Query[Any],
        *,
        alone: bool,
        share: float | None,
        memory: int | None,
        away: bool,
    ) -> None:
        """Update the cost model from a finished query, off the critical path."""
        admission = self.admission
        corrected = query.observe_cost(self._costs, alone=alone, share=share, memory=memory)
        if away:
            with admission.lock:
                self._threads.step_in()
        if corrected is not None:
            admission.re_estimate(corrected)
            self.use_idle_slots()


def _reset_after_fork() -> None:
    for lane in list(_lanes):
        lane.reset_after_fork(fork.forked_process_error())


fork.in_child(fork.Step.FAIL, _reset_after_fork)
