"""Who waits for what, and how waiters are woken."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from polars_async._runtime.logs import complain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Waiter(Protocol):
    """A task, a greenlet or a thread that waits."""

    survives_fork: ClassVar[bool]
    """Whether it still waits in a forked child."""
    wake_at_exit: ClassVar[bool]
    """Whether it is woken while the program ends: a loop is over then, a thread about to be."""

    def wake(self) -> None:
        """
        Have the waiter look again. Any thread may call it, and it never raises.

        It may be called again, since a signal handler may raise in the midst of it.
        """


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


class Waking:
    """Waiters that must not be woken while the program ends; kept until the process does."""

    held_at_exit: ClassVar[list[object] | None] = None


def wake(waiters: Iterable[Waiter]) -> None:
    """Wake `waiters`, each whatever happens to the others."""
    for waiter in waiters:
        if Waking.held_at_exit is not None and not waiter.wake_at_exit:
            Waking.held_at_exit.append(waiter)
            continue
        persist(waiter.wake, "a waiter could not be woken")


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
