"""A query on its way: its state, its outcome, and who waits for it."""

from __future__ import annotations

import enum
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from polars_async._runtime.green import delivery
from polars_async._runtime.timers import start_timer
from polars_async._runtime.unpatched import get_ident, holding
from polars_async.bridges.waiting import persist, wake
from polars_async.errors import QueryTimeoutError
from polars_async.events import EventKind, QueryEvent, notify_observers, rows_of
from polars_async.executors.operations import Batches
from polars_async.scheduling.fair_queue import SMALL
from polars_async.scheduling.outcome import Outcome
from polars_async.scheduling.times import Times

if TYPE_CHECKING:
    from _thread import RLock
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    import polars as pl

    from polars_async._runtime.callers import CallSite
    from polars_async._runtime.timers import Timer
    from polars_async.bridges.waiting import Waiter
    from polars_async.events import Reporter
    from polars_async.executors.operations import Operation
    from polars_async.resolution import Resolution
    from polars_async.scheduling.counts import Counts
    from polars_async.scheduling.estimates import CostModel, Estimate

T = TypeVar("T")

_ids: Final = count(1)
_WORTH_ESTIMATING: Final = 0.01


class State(enum.Enum):
    """Where a query is; all but the first two are final."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()
    CANCELLED = enum.auto()
    TIMED_OUT = enum.auto()
    REFUSED = enum.auto()


class Owner(NamedTuple):
    """What a query knows of the admission that it is in."""

    lock: RLock
    """Guards the state and the waiters of its queries."""
    counts: Counts
    """Change together with the state of a query."""
    leave_queue: Callable[[Query[Any]], None]
    """Called with the lock held when a query is cancelled or timed out before it has a slot."""


class Query(Generic[T]):
    """
    One query of a collector.

    State and waiters change under the lock of the query's admission, so that of an end, a
    cancellation, a time-out and a new waiter one is always first. A final state never changes
    again, and is read without the lock.

    A signal handler may raise at any step of a thread that asks, waits or cancels. So the state
    changes in one line, together with its count, and what follows from it is done again if it was
    interrupted.
    """

    __slots__ = (
        "__weakref__",
        "_announcing",
        "_counts",
        "_deadline",
        "_late",
        "_leave_queue",
        "_let_go_by",
        "_operation",
        "_outcome",
        "_reporter",
        "_stop",
        "_stop_is_sure",
        "_timeout",
        "_untold",
        "_waiters",
        "call_site",
        "context",
        "delivery",
        "estimate",
        "frames",
        "id",
        "is_nested",
        "is_stream",
        "label",
        "lock",
        "priority",
        "reports",
        "resolution",
        "runs_engine",
        "state",
        "times",
    )

    def __init__(
        self,
        operation: Operation[T],
        resolution: Resolution,
        reporter: Reporter,
        owner: Owner,
        *,
        estimate: Estimate | None = None,
        priority: int = 0,
        label: str | None = None,
    ) -> None:
        self.id = next(_ids)
        self.resolution = resolution
        self.state = State.WAITING
        self.estimate = estimate
        self.priority = priority
        self.label = label
        self.is_stream = isinstance(operation, Batches)
        self.runs_engine = operation.runs_engine
        self.is_nested = False
        self.call_site: CallSite | None = None
        """Where it was asked for, if it may go to another process."""
        self.times = Times()
        self.reports = reporter.listens
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
        self._let_go_by = 0
        """The thread that lets go of it, and has not done yet all that follows from that."""
        self._untold = False
        self._late: QueryTimeoutError | None = None
        self._timeout = 0.0
        self._deadline: Timer | None = None

    @property
    def done(self) -> bool:
        """Whether the state is final."""
        return self.state is not State.RUNNING and self.state is not State.WAITING

    @property
    def completed(self) -> bool:
        """Whether it came to its result: else it would have taken longer."""
        return self.state is State.ENDED and self._outcome.error is None

    @property
    def named(self) -> str:
        """What to call it in the middle of a sentence."""
        return "the query" if self.label is None else f"the query {self.label!r}"

    @property
    def is_small(self) -> bool:
        """Whether it is expected to be small, once it was appraised."""
        return self.estimate is not None and self.estimate.seconds <= SMALL

    @property
    def goes_as_small(self) -> bool:
        """Whether it may have a slot that is kept for small ones: its caller knows better."""
        return self.priority > 0 or (self.priority == 0 and self.is_small)

    def expire_in(self, seconds: float) -> None:
        """Have the query time out, unless it is done before."""
        self._timeout = seconds
        self._deadline = start_timer(seconds, self)
        if self.done:  # it was, before there was a deadline that it could lift
            self._deadline.cancel()

    def start(self) -> float | None:
        """
        Note, with the lock held, that it has a slot now; gives how long it waited for it.

        Or None: somebody who interrupted this thread has cancelled it on the way.
        """
        if self.state is not State.WAITING:
            return None
        self.state = State.RUNNING
        return self.times.start()

    def paused(self) -> AbstractContextManager[None]:
        """Count the time in here as no work."""
        return self.times.paused()

    def refuse(self) -> None:
        """Note that it was not let in, and so never waited."""
        self.state = State.REFUSED
        self.times.refuse()

    def set_estimate(self, costs: CostModel) -> None:
        """Find out what is to be expected of it; never raises."""
        if self.estimate is None:
            self.estimate = costs.of(self.frames, self.resolution.name)

    @property
    def operation(self) -> Operation[T] | None:
        """What it is to do; None once it does that."""
        return self._operation

    def run(self, run: Callable[[Operation[T], Query[T]], T]) -> None:
        """Do its operation by `run` and keep its outcome, which `end` then makes final."""
        if self.reports:
            self._announce(EventKind.STARTED)
        operation, self._operation = self._operation, None
        if operation is None or self.state is not State.RUNNING:  # it was let go on the way
            return
        try:
            self._outcome.value = run(operation, self)
        except BaseException as error:  # noqa: BLE001  # a panic and SystemExit are outcomes too
            # Without this frame, which holds the query that holds the error, and that of `run`.
            here = error.__traceback__ and error.__traceback__.tb_next
            self._outcome.fail(error, here and here.tb_next)
            del here
            if self.label is not None:
                _name_in(error, self.label)
        finally:
            del self, operation  # the frames of the traceback lead back here all the same

    def on_cancel(self, stop: Callable[[], object] | None, *, for_sure: bool = True) -> bool:
        """
        Have `stop` called if somebody lets go of it while it runs; False if it is done.

        `for_sure` tells whether that will stop it.
        """
        with self.lock:
            self._stop = stop
            self._stop_is_sure = for_sure
            return not self.done

    @property
    def error(self) -> BaseException | None:
        """What it raised when it ran."""
        return self._outcome.error

    def requeue(
        self,
        operation: Operation[T],
        resolution: Resolution,
        owner: Owner,
    ) -> bool:
        """
        Wait again, for another operation in its place; False if it is not wanted any more.

        What it has raised is dropped. The lock stays, so that it is in one admission at any time.
        """
        with self.lock:
            self._outcome.drop()
            if self.done:
                return False
            self._operation, self.resolution = operation, resolution
            self.frames = operation.frames
            _, self._counts, self._leave_queue = owner
            self.state = State.WAITING
            self.estimate = None
            self.times.requeue()
        return True

    def report(
        self, kind: EventKind, *, result: object = None, error: BaseException | None = None
    ) -> None:
        """Report what happened, with no lock held."""
        if not self._reporter.wants(kind):
            return
        event = QueryEvent(
            kind=kind,
            query_id=self.id,
            label=self.label,
            engine=self.resolution.name,
            queue_seconds=self.times.queue_seconds,
            run_seconds=self.times.run_seconds,
            rows=rows_of(result),
            error=error,
            resolution=self.resolution,
        )
        if self.delivery is None:
            self._reporter(event)
        else:
            self.delivery.post(partial(self._reporter, event))

    def report_fall_back(self) -> None:
        """Tell that the GPU engine has failed, and why."""
        self._announce(EventKind.FELL_BACK, self.resolution.cause)

    def report_engine(self) -> None:
        """Tell which engine has run it, before it is done: whoever sees that finds it told."""
        if self.state is State.RUNNING and self.runs_engine:
            notify_observers(self.resolution)

    def fail(self, error: BaseException) -> Iterable[Waiter]:
        """End with an error of our own, with the lock held; gives whom to wake."""
        self._operation = None
        self._outcome.fail(error)
        return self.end()

    def end(self) -> Iterable[Waiter]:
        """
        Make the outcome final, unless it was let go before; gives whom to wake.

        With the lock held.
        """
        self.times.end()
        if self.state is not State.RUNNING and self.state is not State.WAITING:
            return ()
        self.state = State.ENDED
        counts = self._counts
        if self._outcome.error is None:
            counts.completed += 1
        else:
            counts.failed += 1
        if self._deadline is not None:
            self._deadline.cancel()
        waiters, self._waiters = self._waiters, {}
        return waiters

    @property
    def is_worth_estimating(self) -> bool:
        """Whether to find out what it was takes little of the time that it took."""
        return (
            self.estimate is None
            and bool(self.frames)
            and (self.times.run_seconds or 0.0) >= _WORTH_ESTIMATING
        )

    def settle(self) -> bool:
        """Drop what nobody needs now; False where its end still has to be looked into."""
        if self.state is not State.ENDED or self.estimate is not None:
            return False
        times = self.times
        if times.started is None or times.ended is None:
            return False
        if times.ended - times.started >= _WORTH_ESTIMATING:
            return False
        self.frames = ()
        return True

    def report_end(self) -> None:
        """Tell what came of it, unless it was let go, which was told then."""
        if not self.reports or self.state is not State.ENDED:
            return
        if self._outcome.error is None:
            self.report(EventKind.FINISHED, result=self._outcome.value)
        else:
            self.report(EventKind.FAILED, error=self._outcome.error)

    def after_end(self, costs: CostModel, *, alone: bool) -> Estimate | None:
        """
        Do what nobody has to wait for: drop what is not wanted, and learn from what it took.

        Gives what is now to be expected of its kind, if that was not known before.
        """
        completed = self.completed  # while it still has its error
        if self.state is not State.ENDED:
            self._outcome.drop()
        if self.is_worth_estimating:
            self.set_estimate(costs)
        self.frames = ()
        seconds = self.times.run_seconds
        if self.estimate is None or seconds is None:
            return None
        return costs.observe(self.estimate, seconds, alone=alone, completed=completed)

    def lose(self, error: BaseException) -> None:
        """End a query whose thread stayed behind in a fork, with an error of our own."""
        with self.lock:
            waiters = self.fail(error)
        wake([waiter for waiter in waiters if waiter.survives_fork])

    def cancel(self) -> bool:
        """Take the query out of the line, or let go of a running one; False if it had ended."""
        return self._let_go(State.CANCELLED)

    def expire(self) -> None:
        """Let go of a query that is late."""
        self._let_go(State.TIMED_OUT)

    def add_waiter(self, waiter: Waiter) -> bool:
        """Have `waiter` woken at the end; False if that has come already."""
        return holding(self.lock, self._add_waiter, waiter)

    def remove_waiter(self, waiter: Waiter, *, last_cancels: bool) -> bool:
        """Stop waiting, and maybe let the query go with its last waiter; False if it had ended."""
        return self._change(self._remove_waiter, waiter, last_cancels)

    def outcome(self, cancelled: type[BaseException]) -> T:
        """Give the result of a query that is done, or raise its error."""
        if self.delivery is not None:
            self.delivery.catch_up()
        if self.state is State.CANCELLED:
            raise cancelled(f"{self.named} was cancelled")
        try:
            if self._late is not None:
                raise self._late.with_traceback(None)
            return self._outcome.take()
        finally:
            del self  # the frame that the traceback now holds, which else held the error

    def wakes(self, waiters: Iterable[Waiter]) -> None:
        """Wake `waiters`, too, together with its own; with the lock held."""
        self._waiters.update(dict.fromkeys(waiters))

    def _let_go(self, state: State) -> bool:
        return self._change(self._end_as, state)

    def _change(self, change: Callable[..., bool], *arguments: object) -> bool:
        """Make a `change` that may let go of it; gives what that gives."""
        try:
            changed = holding(self.lock, change, *arguments)
            if self._let_go_by == get_ident():
                self._finish_letting_go()
        except BaseException:  # out of a signal handler, or a hook
            if self.done and self._let_go_by == get_ident():
                holding(self.lock, self._leave)
                self._finish_letting_go()
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
        if last_cancels and not self._waiters:
            # Still with the lock, so that nobody comes to wait for what is about to be let go.
            self._end_as(State.CANCELLED)
        return True

    def _end_as(self, state: State) -> bool:
        """With the lock held, let it go; False if it had ended."""
        if self.done:
            return False
        ended = self.times.now() if self.state is State.WAITING else None
        late = None if state is State.CANCELLED else self._timeout_error()
        tells = self.reports and not self._announcing
        counts, times = self._counts, self.times
        self._let_go_by = get_ident()
        # The stores are on one line, which no exception can part.
        if late is None:
            self.state, counts.cancelled, times.ended, self._untold = (
                *(state, counts.cancelled + 1),
                *(ended, tells),
            )
        else:
            self._late, self.state, counts.timed_out, times.ended, self._untold = (
                *(late, state, counts.timed_out + 1),
                *(ended, tells),
            )
        self._leave()
        return True

    def _leave(self) -> None:
        if self.times.started is None:
            self._leave_queue(self)

    def _finish_letting_go(self) -> None:
        """Do what follows, without the lock: it may be done again."""
        if self.times.started is None:
            self._operation, self.frames = None, ()
        if self._deadline is not None:
            self._deadline.cancel()
        if self._stop is not None:
            persist(self._stop, "a query that was let go could not be stopped")
        if self._untold:
            self._untold = False
            self._tell_let_go()
        wake(self._waiters)
        self._waiters = {}
        self._let_go_by = 0

    def _announce(self, kind: EventKind, error: BaseException | None = None) -> None:
        """Tell what begins; whoever lets go of it meanwhile leaves it to this to tell that."""
        with self.lock:
            if self.done:
                return
            self._announcing = True
        self.report(kind, error=error)
        with self.lock:
            self._announcing = False
            let_go = self.done
        if let_go:
            self._tell_let_go()

    def _tell_let_go(self) -> None:
        if self.frames and self.runs_engine:  # without frames it was still in the queue
            notify_observers(self.resolution)
        kind = EventKind.CANCELLED if self.state is State.CANCELLED else EventKind.TIMED_OUT
        self.report(kind, error=self._late)

    def _timeout_error(self) -> QueryTimeoutError:
        if self._stop is None:
            ends = (
                " and ran for {ran}. Polars cannot stop it, so its slot is free when it really ends"
            )
        elif self._stop_is_sure:
            ends = " and ran for {ran}. It is stopped now"
        else:
            ends = (
                " and was with its executor for {ran}, which is asked to drop it and may go on "
                "with it all the same"
            )
        times = self.times
        message = f"{self.named} was not done after {self._timeout:g} s: {times.told(ends)}"
        return QueryTimeoutError(message, self._timeout, times.queue_seconds, times.run_seconds)


def _name_in(error: BaseException, label: str) -> None:
    note = f"in the query {label!r}"
    with suppress(Exception):  # an error may be frozen, or keep something else there
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
