"""A query from its submission to its outcome: its state, its waiters and how it is cancelled."""

from __future__ import annotations

from contextlib import suppress
from contextvars import copy_context
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Protocol, TypeVar

import polars as pl

from polars_async._runtime.green import delivery
from polars_async._runtime.timers import start_timer
from polars_async._runtime.unpatched import get_ident, holding
from polars_async.bridges.waiting import Onlooker, persist, wake
from polars_async.events import EventKind
from polars_async.executors.meters import SentMeter
from polars_async.executors.operations import Batches, on_engine
from polars_async.resolution import ADAPTIVE, tried_again
from polars_async.scheduling.counts import State
from polars_async.scheduling.outcome import Outcome
from polars_async.scheduling.sizes import SMALL, UNKNOWN, Load, size_with
from polars_async.scheduling.telling import (
    GOES_ON,
    IS_ASKED_TO_STOP,
    IS_STOPPED,
    Run,
    emit,
    is_wanted,
    report_cancelled,
    timeout_error,
)
from polars_async.scheduling.times import Times

if TYPE_CHECKING:
    from _thread import RLock
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from polars_async._runtime.callers import CallSite
    from polars_async._runtime.timers import Timer
    from polars_async.bridges.waiting import Waiter
    from polars_async.errors import QueryTimeoutError
    from polars_async.events import Reporter, Tags
    from polars_async.executors.operations import Operation
    from polars_async.progress import Meter
    from polars_async.resolution import Resolution
    from polars_async.scheduling.adaptive import Choice, Chooser
    from polars_async.scheduling.counts import Counts
    from polars_async.scheduling.estimates import CostModel, Estimate
    from polars_async.scheduling.memory import Memory
    from polars_async.wording import Ahead

T = TypeVar("T")

_ids: Final = count(1)
_WORTH_ESTIMATING: Final = 0.01
_OUTSIDE_THE_POOL: Final = frozenset(("streaming", ADAPTIVE))


class Owner(NamedTuple):
    """What a query knows of the admission that it is in."""

    lock: RLock
    """Guards the state and the waiters of its queries."""
    counts: Counts
    """Changed together with the state of a query."""
    leave_queue: Callable[[Query[Any]], None]
    """Called with the lock held when a query is cancelled or timed out before it has a slot."""


class RunOfSeveral(Run, Protocol):
    """What runs in the place of several queries: see `scheduling.flights`."""

    def leave(self, asker: Any) -> Callable[[], object] | None:
        """Note, with the lock held, that `asker` waits no more; return what is to follow."""
        ...


class Query(Generic[T]):
    """
    One query of a collector.

    State and waiters change under the lock of the query's admission, so that an end, a
    cancellation, a time-out and a new waiter have an order. A final state is set by `_settle`
    alone, never changes again, and may be read without the lock.

    A signal handler may raise at any step of a thread that submits, waits or cancels. So a final
    state is set together with its count in one statement. What follows from a cancellation can be
    done twice, so a thread that was interrupted does all of it again.
    """

    __slots__ = (
        "__weakref__",
        "_announcing",
        "_canceller",
        "_counts",
        "_leave_queue",
        "_operation",
        "_outcome",
        "_owes_event",
        "_stop",
        "_stop_is_sure",
        "_timeout",
        "_timeout_error",
        "_timer",
        "_waiters",
        "ahead",
        "call_site",
        "choice",
        "chooser",
        "context",
        "delivery",
        "estimate",
        "fingerprint",
        "flight",
        "frames",
        "from_cache",
        "id",
        "is_inline",
        "is_nested",
        "is_stream",
        "label",
        "listeners",
        "lock",
        "meter",
        "name",
        "peak_memory",
        "place",
        "priority",
        "reporter",
        "reports",
        "resolution",
        "runs_engine",
        "shared_with",
        "state",
        "tags",
        "times",
    )

    def __init__(  # noqa: PLR0915  # one for each attribute
        self,
        operation: Operation[T],
        resolution: Resolution,
        reporter: Reporter,
        owner: Owner,
        *,
        estimate: Estimate | None = None,
        priority: int = 0,
        label: str | None = None,
        tags: Tags | None = None,
        chooser: Chooser | None = None,
        fingerprint: int | None = None,
    ) -> None:
        self.id = next(_ids)
        self.resolution = resolution
        self.state = State.WAITING
        self.estimate = estimate
        self.fingerprint = fingerprint
        """That of a function which runs instead of a query, for its estimate; else None."""
        self.priority = priority
        self.label = label
        self.tags = tags
        self.name = operation.name
        self.is_stream = isinstance(operation, Batches)
        self.runs_engine = operation.runs_engine
        self.is_nested = False
        """Whether a running query has submitted it; known of streams, and where the GPU may run it.
        """
        self.is_inline = False
        """Whether it runs, or has run, on the thread that submitted it, for the sake of speed."""
        self.chooser = chooser
        """What chooses the engine, if that is left to this library."""
        self.choice: Choice | None = None
        """What it has chosen."""
        self.flight: RunOfSeveral | None = None
        """What runs in its place, for all that ask for the same."""
        self.shared_with: int | None = None
        """The number of the query whose run it shares, or whose result was kept for it."""
        self.from_cache = False
        self.call_site: CallSite | None = None
        """The user's line that submitted the query, if it may go to another process."""
        self.ahead: Ahead | None = None
        """How many queries were before it, when it was put into the queue."""
        self.place: str | None = None
        """Where it runs, or has run; None for a thread of this process."""
        self.meter: Meter | None = None
        """Counts what it reads, if that is wanted."""
        self.peak_memory: int | None = None
        """Bytes that it took at its peak, so far; None if that was not measured."""
        self.times = Times()
        self.reporter = reporter
        self.reports = reporter.listens
        """Whether anything takes any event of it."""
        self.listeners = reporter.listeners if self.reports else ()
        self.delivery = delivery() if self.reports else None
        """Makes the calls of hooks and listeners, where gevent has patched."""
        self.lock, self._counts, self._leave_queue = owner
        self._operation: Operation[T] | None = operation
        self.frames: Sequence[pl.LazyFrame] = operation.frames
        self.context = copy_context()
        self._stop: Callable[[], object] | None = None
        self._stop_is_sure = False
        self._outcome: Outcome[T] = Outcome()
        self._waiters: dict[Waiter, None] = {}
        self._announcing = False
        self._canceller = 0
        """The thread that has cancelled the query, until it has done all that follows from that."""
        self._owes_event = False
        """Whether `_canceller` still has to emit the event of the cancellation or time-out."""
        self._timeout_error: QueryTimeoutError | None = None
        self._timeout = 0.0
        self._timer: Timer | None = None

    @property
    def done(self) -> bool:
        """Whether the state is final."""
        return self.state is not State.RUNNING and self.state is not State.WAITING

    @property
    def is_cancelled(self) -> bool:
        """Whether the query was cancelled or timed out, though it may run still."""
        return self.state is State.CANCELLED or self.state is State.TIMED_OUT

    @property
    def named(self) -> str:
        """The name of the query for the middle of a sentence."""
        return "the query" if self.label is None else f"the query {self.label!r}"

    @property
    def is_counted(self) -> bool:
        """Whether what it reads is to be counted when it runs, and its engine can."""
        return (
            self.reporter.counts
            and self.runs_engine
            and type(self.resolution.engine) is pl.StreamingEngine
        )

    def note_reading(self, reading: tuple[Any, ...]) -> None:
        """Note what its operators have done so far, as its worker process has sent it."""
        if isinstance(self.meter, SentMeter):
            self.meter.note(reading)

    def want_progress(self) -> None:
        """Have what queries of this collector read be counted, those that start from now on."""
        self.reporter.want_counts()

    @property
    def run_of_it(self) -> Run:
        """What runs for it: itself, or the run that it shares with others."""
        return self if self.flight is None else self.flight

    def listed(self, state: str) -> dict[Query[Any], str]:
        """Return the queries of callers that this is, and their states, if it is in a `state`."""
        return {self: state}

    @property
    def is_small(self) -> bool:
        """Whether the query has an estimate, and counts as small by it."""
        return self.estimate is not None and self.estimate.seconds <= SMALL

    @property
    def load(self) -> Load:
        """What the query takes, as far as it is known. A priority overrides the estimate."""
        seconds, share, memory = UNKNOWN, None, 0
        if self.estimate is not None:
            seconds, _, _, share, memory, _ = self.estimate
        return Load(size_with(self.priority, seconds), share, self.is_pooled, memory)

    @property
    def is_pooled(self) -> bool:
        """Whether the query runs in Polars' pool of threads: see `Load.pooled`."""
        # One whose engine is not chosen yet: what is large will be on the streaming engine.
        return self.resolution.name not in _OUTSIDE_THE_POOL

    def expire_in(self, seconds: float) -> None:
        """Have the query time out, unless it is done before."""
        self._timeout = seconds
        self._timer = start_timer(seconds, self)
        if self.done:  # since before there was a timer to cancel
            self._timer.cancel()

    def set_running(self) -> float | None:
        """
        Set the state to RUNNING, with the lock held; return the seconds spent in the queue.

        Return None if a signal handler on this thread has cancelled the query in between.
        """
        if self.state is not State.WAITING:
            return None
        self.state = State.RUNNING
        return self.times.start()

    def clock_stopped(self) -> AbstractContextManager[None]:
        """Return a context whose time does not count as run time."""
        return self.times.clock_stopped()

    def set_rejected(self, error: BaseException) -> None:
        """
        Make the query REJECTED, unless it is done: it was not admitted, and never waited.

        `error` is its outcome, for callers who have its handle already: see `Lane._admit_late`.
        """
        self.times.reject()
        # In this order: they read the state without the lock, and then take the outcome.
        self._outcome.fail(error)
        if not self._settle(State.REJECTED):
            self.drop_error()

    def drop_error(self) -> None:
        """Drop the error of a query that nobody has, whose traceback leads back to the query."""
        self._outcome.drop()

    def wake_rejected(self) -> None:
        """Wake those who wait for a query that was REJECTED after its caller had its handle."""
        with self.lock:
            waiters, self._waiters = self._waiters, {}
        wake(waiters)

    def choose_engine(self, *, is_idle: bool = False) -> None:
        """
        Have the engine chosen, if that is left to this library, and was not done before.

        `is_idle` says that no other query runs or waits.
        """
        if self.chooser is not None and self.choice is None:
            choice, resolution = self.chooser.choose(
                self.resolution, self.frames, is_idle=is_idle, on_gpu=not self.is_nested
            )
            holding(self.lock, self.use, choice, resolution)

    def use(self, choice: Choice, resolution: Resolution) -> None:
        """Have the engine of `choice` run the query, with the lock held, unless it runs already."""
        self.choice = choice
        if self._operation is not None:  # else it is done
            self._operation = on_engine(self._operation, resolution.engine)
            self.resolve(resolution)

    def resolve(self, resolution: Resolution) -> None:
        """Have the engine of `resolution` run it, or note that it does."""
        self.resolution = resolution

    def choose_for_quick(self) -> None:
        """Have the engine chosen for a query that is known to be quick, and was not submitted."""
        if self.chooser is not None:
            self.choice, self.resolution = self.chooser.for_quick(self.resolution)

    def note_time_on_engine(self, *, alone: bool) -> None:
        """Have what chose the engine learn the run time of a query that has ended."""
        seconds = self.times.run_seconds
        if self.chooser is None or self.choice is None or seconds is None:
            return
        if self.state is State.COMPLETED:
            self.chooser.note(self.choice, seconds, alone=alone)

    def note_failure_of_gpu(self) -> None:
        """Have what chose the engine learn that the GPU cannot run the query."""
        if self.chooser is not None and self.choice is not None:
            self.choice = self.chooser.instead_of(self.choice)

    def set_estimate(self, costs: CostModel) -> None:
        """Estimate the cost of the query, unless it has an estimate; never raise."""
        if self.estimate is None:
            self.choose_engine()
            if self.fingerprint is not None:
                self.estimate = costs.of_function(self.fingerprint)
            else:
                self.estimate = costs.of(self.frames, self.resolution.name)

    def board(
        self,
        flight: RunOfSeveral | None,
        *,
        shared_with: int | None = None,
        from_cache: bool = False,
    ) -> None:
        """Have `flight` run in its place, or nothing, with the lock held."""
        self.flight, self.shared_with, self.from_cache = flight, shared_with, from_cache
        self._operation, self.frames = None, ()

    def land(self, outcome: Outcome[T]) -> Iterable[Waiter]:
        """End with the `outcome` of another run, with the lock held; return the waiters to wake."""
        run = self.run_of_it
        self.ahead, self.place = run.ahead, run.place
        self.meter, self.peak_memory = run.meter, run.peak_memory
        self._outcome, self.flight = outcome, None
        return self.set_finished()

    @property
    def operation(self) -> Operation[T] | None:
        """The operation that the query still has to run; None once it runs."""
        return self._operation

    def run(self, run: Callable[[Operation[T], Query[T]], T]) -> None:
        """Run the operation by `run` and keep its outcome, which `set_finished` makes final."""
        if self.reports and is_wanted(self, EventKind.STARTED):
            self.announce(EventKind.STARTED)
        operation, self._operation = self._operation, None
        if (
            operation is None or self.state is not State.RUNNING
        ):  # cancelled or timed out since it has its slot
            return
        try:
            self._outcome.value = run(operation, self)
        except BaseException as error:  # noqa: BLE001  # a panic and SystemExit are outcomes too
            # Without this frame, which holds the query that holds the error, and without that of
            # `run`.
            here = error.__traceback__ and error.__traceback__.tb_next
            self._outcome.fail(error, here and here.tb_next)
            del here
            if self.label is not None:
                _name_in(error, self.label)
        finally:
            del self, operation  # the frames of the traceback lead back here all the same

    def note_memory(self, peak: int) -> None:
        """Note that the query has taken so many bytes at once in its worker process."""
        self.peak_memory = max(self.peak_memory or 0, peak)

    def stop_with(self, stop: Callable[[], object] | None, *, for_sure: bool = True) -> bool:
        """
        Have `stop` called when the query is cancelled or times out while it runs.

        `for_sure` says whether `stop` really ends it, which the error of a time-out tells. Return
        False if the query is done already; `stop` is not called then.
        """
        with self.lock:
            self._stop = stop
            self._stop_is_sure = for_sure
            return not self.done

    def how_it_ends(self, without: Query[Any]) -> str:  # noqa: ARG002  # a run of several needs it
        """Return what is to be said of the run when `without` times out: see `telling`."""
        if self._stop is None:
            return GOES_ON
        return IS_STOPPED if self._stop_is_sure else IS_ASKED_TO_STOP

    @property
    def error(self) -> BaseException | None:
        """What the query raised when it ran."""
        return self._outcome.error

    def requeue(
        self,
        operation: Operation[T],
        resolution: Resolution,
        owner: Owner,
        *,
        has_run: bool = True,
    ) -> bool:
        """
        Have the query wait again, to run `operation` instead; return False if it is done.

        What it raised is dropped. `owner` has the same lock as the owner before, so that the query
        is in one admission at any time. `has_run` says whether it has run on the GPU, in vain.
        """
        with self.lock:
            self._outcome.drop()
            if self.done:
                return False
            self._operation = operation
            self.resolve(resolution)
            self.frames = operation.frames
            self.place = self.meter = None
            _, self._counts, self._leave_queue = owner
            self.state = State.WAITING
            self.estimate = None
            self.times.requeue(has_run=has_run)
        return True

    def report(
        self, kind: EventKind, *, result: object = None, error: BaseException | None = None
    ) -> None:
        """Emit the event `kind`, with no lock held, since hooks and log handlers run."""
        emit(self, kind, result, error)

    def note_retry(self, how: str, cause: Exception) -> None:
        """Note that the GPU tries the query once more, after `cause`, and emit RETRIED."""
        self.resolve(tried_again(self.resolution, how))
        self.announce(EventKind.RETRIED, cause)

    def set_error(self, error: BaseException) -> Iterable[Waiter]:
        """Make an error of the library the outcome; with the lock held. Return waiters to wake."""
        self._operation = None
        self._outcome.fail(error)
        return self.set_finished()

    def set_finished(self) -> Iterable[Waiter]:
        """
        Make the outcome of `run` final, with the lock held; return the waiters to wake.

        A query that was cancelled or timed out while it ran keeps that state: its waiters have been
        woken, and only its run time is complete now.
        """
        self.times.end()
        if not self._settle(State.COMPLETED if self._outcome.error is None else State.FAILED):
            return ()
        if self._timer is not None:
            self._timer.cancel()
        waiters, self._waiters = self._waiters, {}
        return waiters

    @property
    def is_worth_estimating(self) -> bool:
        """Whether estimating its cost is cheap compared with its run time."""
        return (
            self.estimate is None
            and (bool(self.frames) or self.fingerprint is not None)
            and (self.times.run_seconds or 0.0) >= _WORTH_ESTIMATING
        )

    def drop_inputs(self) -> bool:
        """Drop the frames of a query that is done; return False if `observe_cost` needs them."""
        if self.is_cancelled or self.estimate is not None:
            return False
        times = self.times
        if times.started is None or times.ended is None:
            return False
        if times.ended - times.started >= _WORTH_ESTIMATING:
            return False
        self.frames = ()
        return True

    def report_end(self) -> None:
        """Emit FINISHED or FAILED; the event of a cancellation or time-out was emitted by then."""
        if not self.reports:
            return
        if self.state is State.COMPLETED:
            self.report(EventKind.FINISHED, result=self._outcome.value)
        elif self.state is State.FAILED:
            self.report(EventKind.FAILED, error=self._outcome.error)

    def keep_result(self, memory: Memory, *, most: int | None = None) -> int:
        """Have `memory` mind the result, as long as somebody has it: see `Memory.keep`."""
        return memory.keep(self._outcome.value, most=most)

    def observe_cost(
        self,
        costs: CostModel,
        *,
        alone: bool,
        share: float | None = None,
        memory: int | None = None,
    ) -> Estimate | None:
        """
        Update `costs` by the run time, and drop the inputs; return a corrected estimate, if any.

        It is off the critical path: the waiters have been woken. `alone` says that no other query
        ran meanwhile, and `share` and `memory` are as for `CostModel.observe`.
        """
        if self.is_cancelled:
            self._outcome.drop()
        if self.is_worth_estimating:
            if self.fingerprint is not None:
                self.estimate = costs.of_function(self.fingerprint)
            else:
                self.estimate = costs.of_ended(self.frames, self.resolution.name)
        self.frames = ()
        seconds = self.times.run_seconds
        if self.estimate is None or seconds is None:
            return None
        completed = self.state is State.COMPLETED  # else it would have taken longer
        return costs.observe(
            self.estimate, seconds, alone=alone, completed=completed, share=share, memory=memory
        )

    def fail_in_fork(self, error: BaseException) -> None:
        """End the query with `error` in a forked child, which does not have its thread."""
        with self.lock:
            # One that has its outcome, and whose last event was still being emitted, keeps it.
            has_ended = self.state in (State.COMPLETED, State.FAILED)
            waiters = () if has_ended else self.set_error(error)
        wake([waiter for waiter in waiters if waiter.survives_fork])

    def cancel(self) -> bool:
        """Cancel the query, whether it waits or runs; return False if it is done already."""
        return self._change(self._cancel, State.CANCELLED)

    def expire(self) -> None:
        """Have the query time out; called on the timer's thread."""
        self._change(self._cancel, State.TIMED_OUT)

    def add_waiter(self, waiter: Waiter) -> bool:
        """Have `waiter` woken when the query is done; return False if it is done already."""
        return holding(self.lock, self._add_waiter, waiter)

    def remove_waiter(self, waiter: Waiter, *, last_cancels: bool) -> bool:
        """
        Remove `waiter`; return False if the query is done already.

        With `last_cancels`, removing the last waiter cancels the query.
        """
        return self._change(self._remove_waiter, waiter, last_cancels)

    def outcome(self, cancelled: type[BaseException]) -> T:
        """Return the result of a query that is done, or raise its error."""
        if self.delivery is not None:
            self.delivery.catch_up()
        if self.state is State.CANCELLED:
            raise cancelled(f"{self.named} was cancelled")
        try:
            if self._timeout_error is not None:
                raise self._timeout_error.with_traceback(None)
            return self._outcome.take()
        finally:
            del self  # the frame that the traceback now holds, which else held the error

    def wakes(self, waiters: Iterable[Waiter]) -> None:
        """Wake `waiters` together with those of the query; with the lock held."""
        self._waiters.update(dict.fromkeys(waiters))

    def _settle(
        self,
        state: State,
        *,
        thread: int = 0,
        owes_event: bool = False,
        error: QueryTimeoutError | None = None,
    ) -> bool:
        """
        Make `state` final and count it, with the lock held; return False if one is final already.

        Every query comes through here once, whichever of its worker thread, a canceller, the timer
        and the admission is first.
        """
        counts = self._counts.by_state
        # Nothing is called from this check to the stores: a signal handler comes in at a call, and
        # may cancel this very query, which would then be settled and counted twice. The stores are
        # on one line, since a tracing hook may raise at each: else it could be half settled.
        if self.state is not State.RUNNING and self.state is not State.WAITING:
            return False
        new = (error, thread, owes_event, counts[state] + 1, state)
        self._timeout_error, self._canceller, self._owes_event, counts[state], self.state = new
        return True

    def _change(self, change: Callable[..., bool], *arguments: object) -> bool:
        """Make a `change` that may cancel the query, and all that follows; return its result."""
        try:
            changed = holding(self.lock, change, *arguments)
            if self._canceller == get_ident():
                self._after_cancel()
        except BaseException:  # out of a signal handler, or a hook
            # The state may be set, and what follows not be done, or half. No other thread will: it
            # finds the query done. So this one does it, from the start, before it raises.
            if self.done and self._canceller == get_ident():
                holding(self.lock, self._leave)
                self._after_cancel()
            raise
        return changed

    def _add_waiter(self, waiter: Waiter) -> bool:
        if self.done:
            return False
        self._waiters[waiter] = None
        return True

    def _remove_waiter(self, waiter: Waiter, last_cancels: bool) -> bool:  # noqa: FBT001
        if self.done:
            return False
        self._waiters.pop(waiter, None)
        if last_cancels and all(isinstance(each, Onlooker) for each in self._waiters):
            # In the same hold of the lock: a waiter that came in between would be cancelled, too.
            self._cancel(State.CANCELLED)
        return True

    def _cancel(self, state: State) -> bool:
        """Settle a query that waits or runs as CANCELLED or TIMED_OUT, with the lock held."""
        if self.done:
            return False
        changed = self._settle(
            state,
            thread=get_ident(),
            # While another thread announces an event, this one is left to it: see `announce`.
            owes_event=self.reports and not self._announcing,
            error=timeout_error(self, self._timeout) if state is State.TIMED_OUT else None,
        )
        if changed:
            self._leave()
        return changed

    def _leave(self) -> None:
        if self.flight is not None:
            self._stop = self.flight.leave(self)
            self.times.end()
        elif self.times.started is None:  # else it really ends when it has stopped
            self.times.end()
            self._leave_queue(self)

    def _after_cancel(self) -> None:
        """Stop the query and wake its waiters, without the lock; may be done again."""
        if self.times.started is None:
            self._operation, self.frames = None, ()
        if self._timer is not None:
            self._timer.cancel()
        if self._stop is not None:
            persist(self._stop, "a query that was cancelled or timed out could not be stopped")
        if self._owes_event:
            self._owes_event = False
            report_cancelled(self, self._timeout_error)
        # Woken last: a waiter finds the query stopped, and its event emitted.
        wake(self._waiters)
        self._waiters = {}
        self._canceller = 0

    def announce(self, kind: EventKind, error: BaseException | None = None) -> None:
        """
        Emit `kind`, unless the query is done.

        If the query is cancelled or times out while the hook runs, that event is emitted afterwards
        from here, so that events keep their order.
        """
        if not holding(self.lock, self._begin_to_announce):
            return
        try:
            self.report(kind, error=error)
        finally:
            is_done = holding(self.lock, self._end_announcing)
        if is_done:
            report_cancelled(self, self._timeout_error)

    def _begin_to_announce(self) -> bool:
        self._announcing = not self.done
        return self._announcing

    def _end_announcing(self) -> bool:
        # In one hold of the lock: a canceller either finds `_announcing` and leaves the event to
        # the announcing thread, or comes later and emits it itself.
        self._announcing = False
        return self.done


def _name_in(error: BaseException, label: str) -> None:
    note = f"in the query {label!r}"
    with suppress(Exception):  # an error may be frozen, or keep something else there
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
