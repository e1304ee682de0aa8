"""The bridge to asyncio."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Final

from polars_async.bridges.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from polars_async.bridges.waiting import Awaited

CANCELLED: type[BaseException] = asyncio.CancelledError

_MAILBOX: Final = "_polars_async_mailbox"
"""The attribute of a loop that holds its mailbox. The items of a mailbox refer to its loop, so that
any other place, a dictionary with weak keys too, would keep alive a loop that was closed before a
delivery."""


class _Waiter:
    __slots__ = ("future", "loop", "mailbox")

    survives_fork: ClassVar[bool] = False
    wake_at_exit: ClassVar[bool] = False

    def __init__(self) -> None:
        self.loop = _running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.mailbox = _mailbox_of(self.loop)

    def wake(self) -> None:
        try:
            self.mailbox.post(self.future, self.loop.call_soon_threadsafe)
        except RuntimeError:
            pass  # the loop was closed meanwhile, and its tasks with it


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "neither asyncio nor trio runs in this thread: call result() here, or await the "
            "handle in a coroutine that one of them runs"
        ) from None


def _mailbox_of(loop: asyncio.AbstractEventLoop) -> Mailbox[asyncio.Future[None]]:
    mailbox: Mailbox[asyncio.Future[None]] | None = getattr(loop, _MAILBOX, None)
    if mailbox is None:
        mailbox = Mailbox(_resolve)
        with suppress(AttributeError):  # such a loop has a mailbox, and a wake-up, for each query
            setattr(loop, _MAILBOX, mailbox)
    return mailbox


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():  # it is done if its task was cancelled before this delivery
        future.set_result(None)


def running() -> object | None:
    """Return the coroutine of the task that runs on this thread; None outside of one."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs here
        return None
    return None if task is None else task.get_coro()


def wait(awaited: Awaited) -> Generator[Any, Any, None]:
    """Suspend the running task until `awaited` is done; cancelling the task cancels a query."""
    waiter = _Waiter()
    try:
        if not awaited.add_waiter(waiter):
            return
        yield from waiter.future
    except BaseException:
        awaited.remove_waiter(waiter, last_cancels=True)
        raise


def may_go_on() -> bool:
    """Return whether the running task may go on at once where it waits for what is done."""
    _running_loop()  # or this is an error, as it is where it is not done
    return True


def checkpoint() -> Generator[Any, Any, None]:
    """Let other tasks run once."""
    yield
