"""The way into asyncio."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

from polars_async.bridges.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any, Final

    from polars_async.query import Awaited

CANCELLED: type[BaseException] = asyncio.CancelledError

_mailboxes: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox[asyncio.Future[None]]]] = (
    WeakKeyDictionary()
)


class _Waiter:
    __slots__ = ("future", "loop", "mailbox")

    survives_fork: ClassVar[bool] = False
    told_at_exit: ClassVar[bool] = False

    def __init__(self) -> None:
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "neither asyncio nor trio runs in this thread: call result() here, or await the "
                "handle in a coroutine that one of them runs"
            ) from None
        self.future: asyncio.Future[None] = self.loop.create_future()
        mailbox = _mailboxes.get(self.loop)
        if mailbox is None:
            mailbox = _mailboxes.setdefault(self.loop, Mailbox(_resolve))
        self.mailbox = mailbox

    def wake(self) -> None:
        try:
            self.mailbox.post(self.future, self.loop.call_soon_threadsafe)
        except RuntimeError:
            pass  # the loop was closed meanwhile, and took its tasks with it


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():  # it is when its task was cancelled on the way
        future.set_result(None)


def wait(awaited: Awaited) -> Generator[Any, Any, None]:
    """Suspend the running task until `awaited` has come; its cancellation lets go of a query."""
    waiter = _Waiter()
    try:
        if not awaited.add_waiter(waiter):
            return
        yield from waiter.future
    except BaseException:
        awaited.remove_waiter(waiter, last_cancels=True)
        raise


def turn() -> Generator[Any, Any, None]:
    """Let other tasks run once."""
    yield
