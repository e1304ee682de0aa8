"""The bridge to a plain thread, which blocks."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

from polars_async._runtime.green import catch_up
from polars_async._runtime.unpatched import allocate_lock, wait_for

if TYPE_CHECKING:
    from polars_async.bridges.waiting import Awaited


class _Waiter:
    __slots__ = ("_lock",)

    survives_fork: ClassVar[bool] = False
    wake_at_exit: ClassVar[bool] = False

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._lock.acquire()

    def wake(self) -> None:
        with suppress(RuntimeError):  # it was woken before
            self._lock.release()

    def wait(self, timeout: float | None) -> None:
        wait_for(self._lock, timeout)


def block(awaited: Awaited, timeout: float | None = None) -> bool:
    """Block this thread until `awaited` is done; return False after `timeout` seconds."""
    waiter = _Waiter()
    try:
        if not awaited.add_waiter(waiter):
            return True
        waiter.wait(timeout)
        # Not the wait decides, but whether the waiter was still there: the end may have come just
        # after the timeout.
        return not awaited.remove_waiter(waiter, last_cancels=False)
    except BaseException:
        awaited.remove_waiter(waiter, last_cancels=False)
        raise


def block_or_let_run(awaited: Awaited) -> None:
    """Block this thread until `awaited` is done, or its greenlet where gevent has patched."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        from polars_async.bridges.gevent import block_greenlet  # noqa: PLC0415  # optional

        block_greenlet(awaited)
        catch_up()
    else:
        block(awaited)
