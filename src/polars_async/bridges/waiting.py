"""What a waiter is, what it waits for, and how it is woken."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from polars_async._runtime.logs import complain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Waiter(Protocol):
    """A task, a greenlet or a thread that waits for something."""

    survives_fork: ClassVar[bool]
    """Whether it still waits in a forked child."""
    wake_at_exit: ClassVar[bool]
    """Whether it is woken while the program ends. Tasks and threads are not: by then their loop has
    ended, and the interpreter stops them before they could go on."""

    def wake(self) -> None:
        """
        Have the waiter go on; any thread may call this.

        It raises only what a signal handler raises, and is called a second time then: so a second
        call must be harmless.
        """


class Onlooker:
    """The base of waiters that only look on: they do not keep a query from being cancelled."""

    survives_fork: ClassVar[bool] = True
    wake_at_exit: ClassVar[bool] = True


class Awaited(Protocol):
    """What a waiter waits for, such as the end of a query."""

    def add_waiter(self, waiter: Waiter) -> bool:
        """Have `waiter` woken at the end; return False if that has come already."""
        ...

    def remove_waiter(self, waiter: Waiter, *, last_cancels: bool) -> bool:
        """
        Remove `waiter`; return False if the end has come.

        With `last_cancels`, removing the last waiter cancels what it waited for.
        """
        ...


_held_at_exit: list[object] | None = None


def hold_at_exit(waiters: list[object] | None) -> None:
    """Add to `waiters`, from now on, those that are not to be woken at exit; None to wake all."""
    global _held_at_exit  # noqa: PLW0603  # a process ends once
    _held_at_exit = waiters


def wake(waiters: Iterable[Waiter]) -> None:
    """
    Wake `waiters`, one after the other.

    Before this, and with its lock held, the caller has noted what they wait for: so a waiter that
    is added from then on finds that it need not wait, and none is missed. The lock is released by
    now, since a loop takes locks of its own to be woken. After an error of a signal handler the
    caller may call this again for the same waiters.
    """
    for waiter in waiters:
        if _held_at_exit is not None and not waiter.wake_at_exit:
            _held_at_exit.append(waiter)
            continue
        persist(waiter.wake, "a waiter could not be woken")


def persist(act: Callable[[], object], complaint: str) -> None:
    """
    Call `act`, and call it again if it raises.

    If the second call succeeds, a signal handler has raised during the first one, and its error is
    raised. If both raise, the error is that of `act`, and is logged.
    """
    try:
        act()
    except BaseException:  # noqa: BLE001  # raised below
        try:
            act()
        except BaseException:  # noqa: BLE001  # whatever it is, the caller has more to do
            complain(complaint)
        else:
            raise
