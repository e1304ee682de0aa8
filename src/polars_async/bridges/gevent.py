"""The way into gevent."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from gevent import get_hub
from gevent.event import AsyncResult

from polars_async._runtime import unpatched

if TYPE_CHECKING:
    from polars_async.bridges.waiting import Awaited


class _Mailbox:
    """
    What the hub of one thread still has to be told.

    Workers append and send, which libev folds into one wake-up; all else happens in the hub's
    thread. The watcher runs just while somebody waits: without one the hub would see nothing to
    wait for and give up, and with one nobody needs it could never end.
    """

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self._watcher = loop.async_()
        self._items: deque[AsyncResult[None]] = deque()
        self._waiters: set[_Waiter] = set()

    def open_for(self, waiter: _Waiter) -> None:
        """Look what comes, for as long as `waiter` waits at least."""
        self._waiters.add(waiter)
        if not self._watcher.active:
            self._watcher.start(self._empty)

    def close_for(self, waiter: _Waiter) -> None:
        """Look no more, unless others wait. It may be called again."""
        self._waiters.discard(waiter)
        if not self._waiters:
            self._watcher.stop()

    def post(self, item: AsyncResult[None]) -> None:
        self._items.append(item)
        with suppress(ValueError):  # the hub was destroyed, and its greenlets with it
            self._watcher.send()

    def _empty(self) -> None:
        try:
            while self._items:
                self._items[0].set()
                self._items.popleft()
        except BaseException:  # out of a signal handler
            self._watcher.send()
            raise


_of_this_thread = unpatched.local()


class _Waiter:
    survives_fork: ClassVar[bool] = True  # greenlets go on in the child, and their hub with them
    wake_at_exit: ClassVar[bool] = False

    def __init__(self) -> None:
        loop = get_hub().loop
        mailbox: _Mailbox | None = getattr(_of_this_thread, "mailbox", None)
        if mailbox is None or mailbox.loop is not loop:
            mailbox = _of_this_thread.mailbox = _Mailbox(loop)
        self.mailbox = mailbox
        self.result: AsyncResult[None] = AsyncResult()

    def wake(self) -> None:
        self.mailbox.post(self.result)


def block_greenlet(awaited: Awaited, timeout: float | None = None) -> bool:
    """Let other greenlets run until `awaited` has come; False if `timeout` seconds pass before."""
    waiter = _Waiter()
    mailbox = waiter.mailbox
    try:
        mailbox.open_for(waiter)  # first: what is sent to a watcher that does not run yet is lost
        came = not awaited.add_waiter(waiter)
        if not came:
            waiter.result.wait(timeout)
            came = not awaited.remove_waiter(waiter, last_cancels=False)
        mailbox.close_for(waiter)
    except BaseException:
        mailbox.close_for(waiter)
        awaited.remove_waiter(waiter, last_cancels=True)
        raise
    return came
