"""The bridge to trio."""

from __future__ import annotations

from concurrent.futures import CancelledError
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

import trio

from polars_async.bridges import turns
from polars_async.bridges.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator
    from typing import Any, Final

    from polars_async.bridges.waiting import Awaited

CANCELLED: type[BaseException] = CancelledError


class _Waiter:
    __slots__ = ("mailbox", "task", "token")

    survives_fork: ClassVar[bool] = False
    wake_at_exit: ClassVar[bool] = False

    def __init__(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self.task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        mailbox = _mailbox.get(None)
        if mailbox is None:
            _mailbox.set(mailbox := Mailbox(_reschedule))
        self.mailbox = mailbox

    def wake(self) -> None:
        # When a run has finished, so have its tasks: none waits there any more.
        with suppress(trio.RunFinishedError):
            self.mailbox.post(self, self.token.run_sync_soon)


# One for each run, which alone holds it: the items of a mailbox refer to their run.
_mailbox: Final[trio.lowlevel.RunVar[Mailbox[_Waiter] | None]] = trio.lowlevel.RunVar(
    "polars_async mailbox"
)


def _reschedule(waiter: _Waiter) -> None:
    # Both this and `abort` run in trio's thread, and the first of them clears the task: trio does
    # not allow it to be rescheduled twice.
    task, waiter.task = waiter.task, None
    if task is not None:
        trio.lowlevel.reschedule(task)


def running() -> object | None:
    """Return the coroutine of the task that runs on this thread; None outside of one."""
    return trio.lowlevel.current_task().coro if trio.lowlevel.in_trio_task() else None


def wait(awaited: Awaited) -> Generator[Any, Any, None]:
    """Suspend the running task until `awaited` is done; cancelling the task cancels a query."""
    waiter = _Waiter()

    def abort(_: object) -> trio.lowlevel.Abort:
        waiter.task = None
        awaited.remove_waiter(waiter, last_cancels=True)
        return trio.lowlevel.Abort.SUCCEEDED

    suspension: Coroutine[Any, Any, Any] | None = None
    try:
        if awaited.add_waiter(waiter):
            suspension = trio.lowlevel.wait_task_rescheduled(abort)  # noqa: ASYNC105  # no coroutine here
            yield from suspension.__await__()
            return
    except BaseException:
        if waiter.task is not None:  # Ctrl-C came before trio had suspended the task
            abort(None)
        raise
    finally:
        if suspension is not None:
            suspension.close()  # else Python would say of such a Ctrl-C that it was never awaited
    yield from checkpoint()


def may_go_on() -> bool:
    """Return whether the running task may go on at once; in trio each await lets others run."""
    turns.turned()  # as it does when the caller comes to its checkpoint
    return False


def checkpoint() -> Generator[Any, Any, None]:
    """Let other tasks run once."""
    yield from trio.lowlevel.checkpoint().__await__()  # noqa: ASYNC105  # as above
