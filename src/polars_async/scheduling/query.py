"""A query from its submission to its outcome: its state, its waiters and its events."""

from __future__ import annotations

from contextlib import suppress
from contextvars import copy_context
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Protocol, TypeVar

import polars as pl

from polars_async._runtime.frames import count_rows
from polars_async._runtime.green import delivery
from polars_async._runtime.timers import start_timer
from polars_async._runtime.unpatched import get_ident, holding
from polars_async.bridges.waiting import Onlooker, persist, wake
from polars_async.errors import QueryTimeoutError, describe
from polars_async.events import EventKind, new_event, notify_observers
from polars_async.executors.meters import SentMeter
from polars_async.executors.operations import Batches, on_engine
from polars_async.progress import NOTHING_READ, Progress
from polars_async.resolution import ADAPTIVE, engine_text, is_on_gpu, tried_again
from polars_async.scheduling.counts import State
from polars_async.scheduling.outcome import Outcome
from polars_async.scheduling.sizes import SMALL, UNKNOWN, Load, size_with
from polars_async.scheduling.times import Times
from polars_async.wording import behind, how_shared, in_bytes, summarize, where

if TYPE_CHECKING:
    from _thread import RLock
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from polars_async._runtime.callers import CallSite
    from polars_async._runtime.instruments import Listener
    from polars_async._runtime.timers import Timer
    from polars_async.bridges.waiting import Waiter
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


class Run(Protocol):
    """What is known of the run of a query."""

    ahead: Ahead | None
    place: str | None
    meter: Meter | None
    peak_memory: int | None


class RunOfSeveral(Run, Protocol):
    """What runs in the place of several queries: see `scheduling.flights`."""

    def leave(self, asker: Any) -> Callable[[], object] | None:
        """Note, with the lock held, that `asker` waits no more; return what is to follow."""
        ...

    def how_it_ends(self, without: Any) -> str:
        """Return what is to be said of the run when `without` times out."""
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
        "_listeners",
        "_operation",
        "_outcome",
        "_owes_event",
        "_reporter",
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
        "lock",
        "meter",
        "name",
        "peak_memory",
        "place",
        "priority",
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
        self.reports = reporter.listens
        self._listeners = reporter.listeners if self.reports else ()
        self.delivery = delivery() if self.reports else None
        self.lock, self._counts, self._leave_queue = owner
        self._reporter = reporter
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
            self._reporter.counts
            and self.runs_engine
            and type(self.resolution.engine) is pl.StreamingEngine
        )

    def note_reading(self, reading: tuple[Any, ...]) -> None:
        """Note what its operators have done so far, as its worker process has sent it."""
        if isinstance(self.meter, SentMeter):
            self.meter.note(reading)

    def want_progress(self) -> None:
        """Have what queries of this collector read be counted, those that start from now on."""
        self._reporter.want_counts()

    @property
    def progress(self) -> Progress:
        """How far it is."""
        # The state first: of a query that ends meanwhile, all is counted then.
        state, meter = self.state, self.run_of_it.meter
        reading = NOTHING_READ if meter is None else meter.read()
        return Progress(
            state=state.name.lower(),
            seconds=self.times.run_seconds or 0.0,
            rows=reading.rows,
            bytes=reading.bytes,
            fraction=1.0 if state is State.COMPLETED else reading.fraction,
            operator=None if self.done else reading.operator,
        )

    @property
    def summary(self) -> str:
        """What took the query how long so far, in one sentence."""
        end: str | None = None
        error = self._outcome.error
        if self.state is State.FAILED and error is not None:
            end = f"failed by {describe(error)}"
        elif self.state is State.TIMED_OUT:
            end = "timed out"
        elif self.done and self.state is not State.COMPLETED:
            end = f"was {self.state.name.lower()}"
        run = self.run_of_it
        return summarize(
            waited=self.times.queue_seconds,
            ran=self.times.run_seconds,
            resolution=self.resolution,
            ahead=run.ahead,
            place=run.place,
            inline=self.is_inline,
            peak_memory=run.peak_memory,
            gpu_seconds=self.times.gpu_seconds,
            memory_seconds=self.times.memory_seconds,
            shared=self.sharing,
            end=end,
        )

    @property
    def run_of_it(self) -> Run:
        """What runs for it: itself, or the run that it shares with others."""
        return self if self.flight is None else self.flight

    @property
    def sharing(self) -> str | None:
        """Whose result it gets instead of running itself, in words; None if it runs itself."""
        return how_shared(self.shared_with, from_cache=self.from_cache)

    def listed(self, state: str) -> dict[Query[Any], str]:
        """Return the queries of callers that this is, and their states, if it is in a `state`."""
        return {self: state}

    @property
    def essence(self) -> str:
        """Its number, label, state and engine, in a few words."""
        label = "" if self.label is None else f" {self.label!r}"
        state = self.state.name.lower().replace("_", " ")
        shared = "" if self.sharing is None else f", {self.sharing}"
        return f"query {self.id}{label}, {state}, {engine_text(self.resolution.name)}{shared}"

    @property
    def is_small(self) -> bool:
        """Whether the query has an estimate, and counts as small by it."""
        return self.estimate is not None and self.estimate.seconds <= SMALL

    @property
    def load(self) -> Load:
        """What the query takes, as far as it is known. A priority overrides the estimate."""
        seconds, share, memory = UNKNOWN, None, 0
        if self.estimate is not None:
            seconds, _, _, share, memory = self.estimate
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

    def set_rejected(self) -> None:
        """Make the query REJECTED, unless it is done: it was not admitted, and never waited."""
        self.times.reject()
        self._settle(State.REJECTED)

    def fail_late(self, error: BaseException) -> None:
        """Have waiters get the `error` of a query that was REJECTED after its caller had it."""
        with self.lock:
            self._outcome.fail(error)
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
        if self.reports and self._tells(EventKind.STARTED):
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
        listeners = self._listeners_of(kind)
        if not listeners and not self._reporter.wants(kind):
            return
        times, resolution, run = self.times, self.resolution, self.run_of_it
        event = new_event(
            kind,
            self.id,
            self.label,
            resolution.name,
            times.queue_seconds,
            times.run_seconds,
            # The operation of a stream returns their number.
            result if self.is_stream and isinstance(result, int) else count_rows(result),
            error,
            resolution,
            self.is_inline,
            self.tags or {},
            run.place,
            run.ahead,
            run.peak_memory,
            self.shared_with,
            self.from_cache,
            self.name,
            self._reporter.executor,
            times.gpu_seconds,
            times.memory_seconds,
        )
        if self.delivery is None:
            self._reporter(event, listeners, self.context)
        else:
            self.delivery.post(partial(self._reporter, event, listeners, self.context))

    def _tells(self, kind: EventKind) -> bool:
        return self._reporter.wants(kind) or bool(self._listeners_of(kind))

    def _listeners_of(self, kind: EventKind) -> tuple[Listener, ...]:
        # On a GPU a query takes some ms, and may start more than once.
        if not self._listeners or is_on_gpu(self.resolution):
            return self._listeners
        return tuple([each for each in self._listeners if kind in each.kinds])

    def report_queued(self) -> None:
        """Emit the events of a query that is submitted."""
        if self.reports:
            self.report(EventKind.QUEUED)
            if self.resolution.downgraded:
                self.report(EventKind.DOWNGRADED)

    def note_retry(self, how: str, cause: Exception) -> None:
        """Note that the GPU tries the query once more, after `cause`, and emit RETRIED."""
        self.resolve(tried_again(self.resolution, how))
        self.announce(EventKind.RETRIED, cause)

    def report_fall_back(self) -> None:
        """Emit FELL_BACK: the GPU engine failed, and another engine runs the query."""
        self.announce(EventKind.FELL_BACK, self.resolution.cause)

    def report_engine(self) -> None:
        """Tell observers which engine ran the query, before a waiter can see that it is done."""
        if self.state is State.RUNNING and self.runs_engine:
            notify_observers(self.resolution)

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
            waiters = self.set_error(error)
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
            error=self._new_timeout_error() if state is State.TIMED_OUT else None,
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
            self._report_cancelled()
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
            self._report_cancelled()

    def _begin_to_announce(self) -> bool:
        self._announcing = not self.done
        return self._announcing

    def _end_announcing(self) -> bool:
        # In one hold of the lock: a canceller either finds `_announcing` and leaves the event to
        # the announcing thread, or comes later and emits it itself.
        self._announcing = False
        return self.done

    def _report_cancelled(self) -> None:
        if self.frames and self.runs_engine:  # without frames it was still in the queue
            notify_observers(self.resolution)
        kind = EventKind.CANCELLED if self.state is State.CANCELLED else EventKind.TIMED_OUT
        self.report(kind, error=self._timeout_error)

    def _new_timeout_error(self) -> QueryTimeoutError:
        # Read once: the query may still run, and its text and attributes have to agree.
        waited, ran = self.times.queue_seconds, self.times.run_seconds
        if self.flight is not None and self.shared_with is not None:
            spent = f"it waited {waited:.3f} s for query {self.shared_with}, whose run it shared"
        else:
            flight = self.flight
            ends = self._how_it_ends() if flight is None else flight.how_it_ends(without=self)
            run = self.run_of_it
            there = "" if run.place is None else where(self.resolution, run.place)
            if run.peak_memory is not None:
                there += f", with {in_bytes(run.peak_memory)} at its peak"
            ends = ends.replace("{where}", there)
            spent = self.times.described(waited, ran, behind(run.ahead), ends)
        message = f"{self.named} was not done after {self._timeout:g} s: {spent}"
        return QueryTimeoutError(message, self._timeout, waited, ran)

    def _how_it_ends(self) -> str:
        """Return what is to be said of the run of a query that times out."""
        if self._stop is None:
            return (
                " and ran for {ran}{where}. Polars cannot stop it, so it keeps its slot until it "
                "really ends"
            )
        if self._stop_is_sure:
            return " and ran for {ran}{where}. It is stopped now"
        return (
            " and was with its executor for {ran}, which is asked to drop it and may go on with it "
            "all the same"
        )


def _name_in(error: BaseException, label: str) -> None:
    note = f"in the query {label!r}"
    with suppress(Exception):  # an error may be frozen, or keep something else there
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
