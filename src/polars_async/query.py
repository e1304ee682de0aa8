"""A query on its way: its state, its outcome, and who waits for it."""

from __future__ import annotations

import enum
import logging
from contextvars import copy_context
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from polars_async.admission import Admission
    from polars_async.resolution import Resolution

T = TypeVar("T")

_log = logging.getLogger("polars_async")


class State(enum.Enum):
    """Where a query is; the last two are final."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()
    CANCELLED = enum.auto()


class Waiter(Protocol):
    """Somebody who waits for a query, in a loop or a thread."""

    survives_fork: ClassVar[bool]
    """Whether it still waits in a forked child."""

    def wake(self) -> None:
        """Have the waiter look again. Any thread may call it, and it never raises."""


class Query(Generic[T]):
    """
    One query of a collector.

    State and waiters change under the lock of the query's admission, so that of an end, a
    cancellation and a new waiter one is always first. A final state never changes again, and is
    read without the lock.
    """

    __slots__ = (
        "__weakref__",
        "_admission",
        "_context",
        "_error",
        "_traceback",
        "_value",
        "_waiters",
        "_work",
        "resolution",
        "state",
    )

    def __init__(self, work: Callable[[], T], resolution: Resolution, admission: Admission) -> None:
        self.resolution = resolution
        self.state = State.WAITING
        self._admission = admission
        self._work: Callable[[], T] | None = work
        self._context = copy_context()
        self._value: T | None = None
        self._error: BaseException | None = None
        self._traceback: TracebackType | None = None
        self._waiters: list[Waiter] = []

    @property
    def done(self) -> bool:
        """Whether the state is final."""
        return self.state is State.ENDED or self.state is State.CANCELLED

    def run(self) -> None:
        """Run the work on this thread and keep its outcome, which `end` then makes final."""
        work, self._work = cast("Callable[[], T]", self._work), None
        try:
            self._value = self._context.run(work)
        except BaseException as error:  # noqa: BLE001  # a panic and SystemExit are outcomes too
            self._error = error
            # Without this frame, which holds the query that holds the error.
            self._traceback = error.__traceback__ and error.__traceback__.tb_next
        finally:
            del self, work  # the frames of the traceback lead back here all the same

    def end(self) -> list[Waiter]:
        """Make the outcome final, unless everybody had let go before; gives whom to wake."""
        with self._admission.lock:
            if self.done:
                return []
            self.state = State.ENDED
            waiters, self._waiters = self._waiters, []
            return waiters

    def drop_unwanted(self) -> None:
        """Free what a query gave that was let go; without the lock, since that takes its time."""
        if self.state is State.CANCELLED:
            self._value = self._error = self._traceback = None

    def lose(self, error: BaseException) -> None:
        """End a query whose thread stayed behind in a fork, with an error of our own."""
        self._work = None
        self._error = error
        wake([waiter for waiter in self.end() if waiter.survives_fork])

    def cancel(self) -> bool:
        """Take the query out of the line, or let go of a running one; False if it had ended."""
        with self._admission.lock:
            if self.done:
                return False
            dropped = self._let_go()
            waiters, self._waiters = self._waiters, []
        del dropped
        wake(waiters)
        return True

    def add_waiter(self, waiter: Waiter) -> bool:
        """Have `waiter` woken at the end; False if that has come already."""
        with self._admission.lock:
            if self.done:
                return False
            self._waiters.append(waiter)
            return True

    def remove_waiter(self, waiter: Waiter, *, last_cancels: bool) -> bool:
        """Stop waiting, and maybe let the query go with its last waiter; False if it had ended."""
        with self._admission.lock:
            if self.done:
                return False
            self._waiters.remove(waiter)
            dropped = self._let_go() if last_cancels and not self._waiters else None
        del dropped
        return True

    def _let_go(self) -> object:
        """With the lock held, make it cancelled; gives what is to be dropped without the lock."""
        dropped = None
        if self.state is State.WAITING:
            self._admission.leave(self)
            dropped, self._work = self._work, None
        self.state = State.CANCELLED
        return dropped

    def outcome(self, cancelled: type[BaseException]) -> T:
        """Give the result of a query that is done, or raise its error."""
        if self.state is State.CANCELLED:
            raise cancelled("the query was cancelled")
        if self._error is None:
            return cast("T", self._value)
        try:
            # From its own traceback each time: else every await would add its frames to the last.
            raise self._error.with_traceback(self._traceback)
        finally:
            del self  # the frame that the traceback now holds, which else held the error


def wake(waiters: Iterable[Waiter]) -> None:
    """Tell `waiters` that their query is done."""
    for waiter in waiters:
        try:
            waiter.wake()
        except Exception:  # noqa: BLE001  # one that broke its promise must not cost the others theirs
            _log.exception("a waiter could not be told that its query is done")
