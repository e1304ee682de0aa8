"""A query on its way: its state, its outcome, and who waits for it."""

from __future__ import annotations

import enum
from contextlib import contextmanager, suppress
from contextvars import copy_context
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, ClassVar, Final, Generic, Protocol, TypeVar, cast

from polars_async._green import telling
from polars_async._native import get_ident, holding
from polars_async.deadlines import set_deadline
from polars_async.errors import QueryTimeoutError
from polars_async.events import EventKind, complain, tell_observers
from polars_async.gpu.failure import GpuFailure
from polars_async.resolution import fallen_back
from polars_async.scheduling import SMALL
from polars_async.work import on_cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from types import TracebackType

    import polars as pl

    from polars_async.admission import Admission
    from polars_async.callers import CallSite
    from polars_async.deadlines import Deadline
    from polars_async.events import Reporter
    from polars_async.executors import Place
    from polars_async.expectations import Expectation, Expectations
    from polars_async.resolution import Resolution

T = TypeVar("T")

_ids: Final = count(1)
_WORTH_APPRAISING: Final = 0.01


class State(enum.Enum):
    """Where a query is; all but the first two are final."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()
    CANCELLED = enum.auto()
    TIMED_OUT = enum.auto()
    REFUSED = enum.auto()


class Waiter(Protocol):
    """Somebody who waits, in a loop or a thread."""

    survives_fork: ClassVar[bool]
    """Whether it still waits in a forked child."""
    told_at_exit: ClassVar[bool]
    """Whether it is told while the program ends: a loop is over then, a thread about to be."""

    def wake(self) -> None:
        """
        Have the waiter look again. Any thread may call it, and it never raises.

        It may be called again, since a signal handler may raise in the midst of it.
        """


class Awaited(Protocol):
    """What a waiter waits for: the end of a query, for one."""

    def add_waiter(self, waiter: Waiter) -> bool:
        """Have `waiter` woken when it comes; False if it has come already."""
        ...

    def remove_waiter(self, waiter: Waiter, *, last_cancels: bool) -> bool:
        """Stop waiting; False if it has come. `last_cancels`: the waiter was cancelled."""
        ...


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
        "_admission",
        "_announcing",
        "_deadline",
        "_ended",
        "_error",
        "_failure",
        "_fell_back",
        "_late",
        "_let_go_by",
        "_paused_since",
        "_report",
        "_started",
        "_stop",
        "_stop_is_sure",
        "_submitted",
        "_timeout",
        "_traceback",
        "_tried_seconds",
        "_untold",
        "_value",
        "_waiters",
        "_work",
        "call_site",
        "context",
        "expectation",
        "frames",
        "id",
        "is_nested",
        "is_stream",
        "label",
        "paused_seconds",
        "priority",
        "reports",
        "resolution",
        "runs_engine",
        "state",
        "telling",
    )

    def __init__(
        self,
        work: Callable[[], T],
        resolution: Resolution,
        admission: Admission,
        report: Reporter,
        *,
        frames: Sequence[pl.LazyFrame] = (),
        expectation: Expectation | None = None,
        priority: int = 0,
        label: str | None = None,
        is_stream: bool = False,
        runs_engine: bool = True,
    ) -> None:
        self.id = next(_ids)
        self.resolution = resolution
        self.state = State.WAITING
        self.expectation = expectation
        self.priority = priority
        self.label = label
        self.is_stream = is_stream
        self.runs_engine = runs_engine
        """Whether it is more than a search for a schema."""
        self.is_nested = False
        self.call_site: CallSite | None = None
        """Where it was asked for, if it may go to another process."""
        self.paused_seconds = 0.0
        self._paused_since: float | None = None
        self.reports = report.listens
        self.telling = telling() if self.reports else None
        self._admission = admission
        self._report = report
        self._work: Callable[[], T] | None = work
        self.frames: Sequence[pl.LazyFrame] = frames
        self.context = copy_context()
        self._stop: Callable[[], object] | None = None
        self._stop_is_sure = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._failure: GpuFailure | None = None
        self._traceback: TracebackType | None = None
        self._waiters: dict[Waiter, None] = {}
        self._announcing = False
        self._let_go_by = 0
        """The thread that lets go of it, and has not done yet all that follows from that."""
        self._untold = False
        self._late: QueryTimeoutError | None = None
        self._timeout = 0.0
        self._deadline: Deadline | None = None
        self._submitted = perf_counter()
        self._fell_back: float | None = None
        self._tried_seconds: float | None = None
        self._started: float | None = None
        self._ended: float | None = None

    @property
    def done(self) -> bool:
        """Whether the state is final."""
        return self.state is not State.RUNNING and self.state is not State.WAITING

    @property
    def completed(self) -> bool:
        """Whether it came to its result: else it would have taken longer."""
        return self.state is State.ENDED and self._error is None

    @property
    def named(self) -> str:
        """What to call it in the middle of a sentence."""
        return "the query" if self.label is None else f"the query {self.label!r}"

    @property
    def queue_seconds(self) -> float:
        """How long it has waited, or waited, to run; what the GPU has tried in vain included."""
        return (self._started or self._ended or perf_counter()) - self._submitted

    @property
    def run_seconds(self) -> float | None:
        """How long it has run, or ran, its pauses apart; None if it did not start."""
        if self._started is None:
            return None
        until = self._ended or self._paused_since or perf_counter()
        return until - self._started - self.paused_seconds

    @property
    def is_small(self) -> bool:
        """Whether it is expected to be small, once it was appraised."""
        return self.expectation is not None and self.expectation.seconds <= SMALL

    @property
    def goes_as_small(self) -> bool:
        """Whether it may have a slot that is kept for small ones: its caller knows better."""
        return self.priority > 0 or (self.priority == 0 and self.is_small)

    def expire_in(self, seconds: float) -> None:
        """Have the query time out, unless it is done before."""
        self._timeout = seconds
        self._deadline = set_deadline(seconds, self)
        if self.done:  # it was, before there was a deadline that it could lift
            self._deadline.lift()

    def start(self) -> float | None:
        """
        Note, with the lock held, that it has a slot now; gives how long it waited for it.

        Or None: somebody who interrupted this thread has cancelled it on the way.
        """
        if self.state is not State.WAITING:
            return None
        self.state = State.RUNNING
        self._started = perf_counter()
        return self._started - (self._fell_back or self._submitted)

    @contextmanager
    def paused(self) -> Generator[None]:
        """Count the time in here as no work."""
        begun = self._paused_since = perf_counter()
        try:
            yield
        finally:
            self._paused_since = None
            self.paused_seconds += perf_counter() - begun

    def refuse(self) -> None:
        """Note that it was not let in, and so never waited."""
        self.state = State.REFUSED
        self._started, self._ended = None, self._submitted

    def appraise(self, expectations: Expectations) -> None:
        """Find out what is to be expected of it; never raises."""
        if self.expectation is None:
            self.expectation = expectations.of(self.frames, self.resolution.name)

    def run(self, place: Place) -> None:
        """Run the work in `place` and keep its outcome, which `end` then makes final."""
        if self.reports:
            self._announce(EventKind.STARTED)
        work, self._work = self._work, None
        if work is None or self.state is not State.RUNNING:  # it was let go on the way
            return
        try:
            self._value = place.run(work, self)
        except GpuFailure as failure:
            # Its traceback holds this frame, and all of the query with it.
            failure.__traceback__ = failure.__context__ = None
            self._failure = failure
            self._work = on_cpu(work, failure)
        except BaseException as error:  # noqa: BLE001  # a panic and SystemExit are outcomes too
            self._error = error
            # Without this frame, which holds the query that holds the error, and the place's.
            here = error.__traceback__ and error.__traceback__.tb_next
            self._traceback = here and here.tb_next
            del here
            if self.label is not None:
                _name_in(error, self.label)
        finally:
            del self, work  # the frames of the traceback lead back here all the same

    def on_let_go(self, stop: Callable[[], object] | None, *, for_sure: bool = True) -> bool:
        """
        Have `stop` called if somebody lets go of it while it runs; False if it is done.

        `for_sure` tells whether that will stop it.
        """
        with self._admission.lock:
            self._stop = stop
            self._stop_is_sure = for_sure
            return not self.done

    def fall_back(self, admission: Admission) -> bool:
        """
        Where the GPU engine failed, wait in `admission` for the in-memory engine, if still wanted.

        Its lock is that of the admission before, so that the query is in one of them at any time.
        """
        failure, self._failure = self._failure, None
        if failure is None:
            return False
        with admission.lock:
            if self.done:
                self._work = None
                return False
            self._tried_seconds = self.run_seconds
            self.resolution = fallen_back(self.resolution, failure)
            self.state = State.WAITING
            self.expectation = None
            if (found := failure.found) is not None:
                self.frames = [
                    frame for number, frame in enumerate(self.frames) if number not in found
                ]
            self._admission = admission
            self._fell_back, self._started = perf_counter(), None
            self.paused_seconds = 0.0
        return True

    def report_fall_back(self) -> None:
        """Tell that the GPU engine has failed, and why."""
        self._announce(EventKind.FELL_BACK, self.resolution.cause)

    def report_engine(self) -> None:
        """Tell which engine has run it, before it is done: whoever sees that finds it told."""
        if self.state is State.RUNNING and self.runs_engine:
            tell_observers(self.resolution)

    def fail(self, error: BaseException) -> Iterable[Waiter]:
        """End with an error of our own, with the lock held; gives whom to wake."""
        self._work = None
        self._error = error
        self._traceback = None
        return self.end()

    def end(self) -> Iterable[Waiter]:
        """
        Make the outcome final, unless it was let go before; gives whom to wake.

        With the lock held.
        """
        self._ended = perf_counter()
        if self.state is not State.RUNNING and self.state is not State.WAITING:
            return ()
        self.state = State.ENDED
        counts = self._admission.counts
        if self._error is None:
            counts.completed += 1
        else:
            counts.failed += 1
        if self._deadline is not None:
            self._deadline.lift()
        waiters, self._waiters = self._waiters, {}
        return waiters

    @property
    def is_worth_appraising(self) -> bool:
        """Whether to find out what it was takes little of the time that it took."""
        return (
            self.expectation is None
            and bool(self.frames)
            and (self.run_seconds or 0.0) >= _WORTH_APPRAISING
        )

    def settle(self) -> bool:
        """Drop what nobody needs now; False where its end still has to be looked into."""
        if self.state is not State.ENDED or self.expectation is not None:
            return False
        if self._started is None or self._ended is None:
            return False
        if self._ended - self._started >= _WORTH_APPRAISING:
            return False
        self.frames = ()
        return True

    def report_end(self) -> None:
        """Tell what came of it, unless it was let go, which was told then."""
        if not self.reports or self.state is not State.ENDED:
            return
        if self._error is None:
            self._report(EventKind.FINISHED, self, result=self._value)
        else:
            self._report(EventKind.FAILED, self, error=self._error)

    def after_end(self, expectations: Expectations, *, alone: bool) -> Expectation | None:
        """
        Do what nobody has to wait for: drop what is not wanted, and learn from what it took.

        Gives what is now to be expected of its kind, if that was not known before.
        """
        completed = self.completed  # while it still has its error
        if self.state is not State.ENDED:
            self._value = self._error = self._traceback = None
        if self.is_worth_appraising:
            self.appraise(expectations)
        self.frames = ()
        if self.expectation is None or self.run_seconds is None:
            return None
        return expectations.learn(
            self.expectation, self.run_seconds, alone=alone, completed=completed
        )

    def lose(self, error: BaseException) -> None:
        """End a query whose thread stayed behind in a fork, with an error of our own."""
        with self._admission.lock:
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
        return holding(self._admission.lock, self._add_waiter, waiter)

    def remove_waiter(self, waiter: Waiter, *, last_cancels: bool) -> bool:
        """Stop waiting, and maybe let the query go with its last waiter; False if it had ended."""
        return self._change(self._remove_waiter, waiter, last_cancels)

    def outcome(self, cancelled: type[BaseException]) -> T:
        """Give the result of a query that is done, or raise its error."""
        if self.telling is not None:
            self.telling.catch_up()
        if self.state is State.CANCELLED:
            raise cancelled(f"{self.named} was cancelled")
        try:
            if self._late is not None:
                raise self._late.with_traceback(None)
            if self._error is None:
                return cast("T", self._value)
            # From its own traceback each time: else every await would add its frames to the last.
            raise self._error.with_traceback(self._traceback)
        finally:
            del self  # the frame that the traceback now holds, which else held the error

    def _let_go(self, state: State) -> bool:
        return self._change(self._end_as, state)

    def _change(self, change: Callable[..., bool], *arguments: object) -> bool:
        """Make a `change` that may let go of it; gives what that gives."""
        try:
            changed = holding(self._admission.lock, change, *arguments)
            if self._let_go_by == get_ident():
                self._finish_letting_go()
        except BaseException:  # out of a signal handler, or a hook
            if self.done and self._let_go_by == get_ident():
                holding(self._admission.lock, self._leave)
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
        ended = perf_counter() if self.state is State.WAITING else None
        late = None if state is State.CANCELLED else self._timeout_error()
        tells = self.reports and not self._announcing
        counts = self._admission.counts
        self._let_go_by = get_ident()
        # The stores are on one line, which no exception can part.
        if late is None:
            self.state, counts.cancelled, self._ended, self._untold = (
                *(state, counts.cancelled + 1),
                *(ended, tells),
            )
        else:
            self._late, self.state, counts.timed_out, self._ended, self._untold = (
                *(late, state, counts.timed_out + 1),
                *(ended, tells),
            )
        self._leave()
        return True

    def _leave(self) -> None:
        if self._started is None:
            self._admission.leave(self)

    def _finish_letting_go(self) -> None:
        """Do what follows, without the lock: it may be done again."""
        if self._started is None:
            self._work, self.frames = None, ()
        if self._deadline is not None:
            self._deadline.lift()
        if self._stop is not None:
            persist(self._stop, "a query that was let go could not be stopped")
        if self._untold:
            self._untold = False
            self._tell_let_go()
        wake(self._waiters)
        if self._admission.waiters:
            self._admission.tell_if_empty()
        self._waiters = {}
        self._let_go_by = 0

    def _announce(self, kind: EventKind, error: BaseException | None = None) -> None:
        """Tell what begins; whoever lets go of it meanwhile leaves it to this to tell that."""
        with self._admission.lock:
            if self.done:
                return
            self._announcing = True
        self._report(kind, self, error=error)
        with self._admission.lock:
            self._announcing = False
            let_go = self.done
        if let_go:
            self._tell_let_go()

    def _tell_let_go(self) -> None:
        if self.frames and self.runs_engine:  # without frames it was still in the queue
            tell_observers(self.resolution)
        kind = EventKind.CANCELLED if self.state is State.CANCELLED else EventKind.TIMED_OUT
        self._report(kind, self, error=self._late)

    def _timeout_error(self) -> QueryTimeoutError:
        waited, ran = self.queue_seconds, self.run_seconds
        tried = self._tried_seconds
        how = f"it waited {waited:.3f} s for a slot"
        if tried is not None:
            how += f", {tried:.3f} s of which the GPU tried it in vain,"
        if ran is None:
            how += ", and never ran" if tried is None else " and never ran on the CPU"
        elif self._stop is None:
            how += (
                f" and ran for {ran:.3f} s. Polars cannot stop it, so its slot is free when it "
                "really ends"
            )
        elif self._stop_is_sure:
            how += f" and ran for {ran:.3f} s. It is stopped now"
        else:
            how += (
                f" and was with its executor for {ran:.3f} s, which is asked to drop it and may go "
                "on with it all the same"
            )
        message = f"{self.named} was not done after {self._timeout:g} s: {how}"
        return QueryTimeoutError(message, self._timeout, waited, ran)


def _name_in(error: BaseException, label: str) -> None:
    note = f"in the query {label!r}"
    with suppress(Exception):  # an error may be frozen, or keep something else there
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


class Waking:
    """Where those who wait go instead of being told, while the program ends."""

    withheld: ClassVar[list[object] | None] = None


def wake(waiters: Iterable[Waiter]) -> None:
    """Tell `waiters` that what they wait for has come."""
    for waiter in waiters:
        if Waking.withheld is not None and not waiter.told_at_exit:
            Waking.withheld.append(waiter)
            continue
        persist(waiter.wake, "a waiter could not be told that its query is done")


def persist(act: Callable[[], object], complaint: str) -> None:
    """
    Do what must not be left out, and twice if it raises.

    What comes out of a signal handler does not come again, and is raised in the end. What `act`
    raises each time is its own, and logged.
    """
    try:
        act()
    except BaseException:  # noqa: BLE001  # raised below
        try:
            act()
        except BaseException:  # noqa: BLE001  # whatever it is, the others are not to suffer for it
            complain(complaint)
        else:
            raise
