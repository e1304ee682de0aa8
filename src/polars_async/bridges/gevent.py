"""The bridge to gevent."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from gevent import get_hub, getcurrent
from gevent.event import AsyncResult

from polars_async._runtime import unpatched

if TYPE_CHECKING:
    from polars_async.bridges.waiting import Awaited


class _Mailbox:
    """
    Items that are to be delivered to the hub of one thread.

    Other threads append and send; libev merges what is sent into one wake-up. All else happens in
    the hub's thread. The watcher runs only while a greenlet waits: without it the hub would find
    nothing to wait for, and raise LoopExit; if it ran for ever, the hub could never end.
    """

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self._watcher = loop.async_()
        self._items: deque[AsyncResult[None]] = deque()
        self._waiters: set[_Waiter] = set()

    def open_for(self, waiter: _Waiter) -> None:
        """Run the watcher, for as long as `waiter` waits at least."""
        self._waiters.add(waiter)
        if not self._watcher.active:
            self._watcher.start(self._deliver_all)

    def close_for(self, waiter: _Waiter) -> None:
        """Stop the watcher, unless other greenlets wait. It may be called again."""
        self._waiters.discard(waiter)
        if not self._waiters:
            self._watcher.stop()

    def post(self, item: AsyncResult[None]) -> None:
        # Appended before the hub is woken: the wake-up that is sent here finds the item, or an
        # earlier one has delivered it already.
        self._items.append(item)
        with suppress(ValueError):  # the hub was destroyed, and its greenlets with it
            self._watcher.send()

    def _deliver_all(self) -> None:
        try:
            while self._items:
                self._items[0].set()  # removed only afterwards: see `Mailbox`
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
    """Suspend this greenlet until `awaited` is done; return False after `timeout` seconds."""
    waiter = _Waiter()
    mailbox = waiter.mailbox
    try:
        # Before another thread can wake the waiter: what is sent to a watcher that does not run is
        # lost.
        mailbox.open_for(waiter)
        done = not awaited.add_waiter(waiter)
        if not done:
            waiter.result.wait(timeout)
            done = not awaited.remove_waiter(waiter, last_cancels=False)
        mailbox.close_for(waiter)
    except BaseException:
        mailbox.close_for(waiter)
        awaited.remove_waiter(waiter, last_cancels=True)
        raise
    return done


def let_hub_turn() -> None:
    """Let other greenlets run, and what has arrived be seen, unless this code runs in the hub."""
    if getcurrent() is get_hub():
        return
    # By way of the watcher: the hub calls its callbacks, such as that of `sleep(0)`, for a while
    # without a look at what has arrived.
    waiter = _Waiter()
    mailbox = waiter.mailbox
    try:
        mailbox.open_for(waiter)
        waiter.wake()
        waiter.result.wait()
    finally:
        mailbox.close_for(waiter)
