"""The bridge to a plain thread, which blocks, and to a greenlet that is not told apart."""

from __future__ import annotations

import sys
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar

from polars_async._runtime.green import catch_up
from polars_async._runtime.unpatched import allocate_lock, wait_for

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator
    from typing import Any

    from polars_async.bridges import Bridge
    from polars_async.bridges.waiting import Awaited

T = TypeVar("T")


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


def block_caller(awaited: Awaited) -> None:
    """Block this thread until `awaited` is done; where it has a hub of gevent, this greenlet."""
    if _other_greenlets_run():
        from polars_async.bridges.gevent import block_greenlet  # noqa: PLC0415  # optional

        block_greenlet(awaited)
        catch_up()
    else:
        block(awaited)


class _Blocking:
    """The bridge of a caller without a task: what the other ones suspend, this one blocks."""

    CANCELLED: type[BaseException] = CancelledError

    def running(self) -> object | None:
        return None

    def wait(self, awaited: Awaited) -> Generator[Any, Any, None]:
        block_caller(awaited)
        yield from ()

    def may_go_on(self) -> bool:
        return True

    def checkpoint(self) -> Generator[Any, Any, None]:
        if _other_greenlets_run():
            from polars_async.bridges.gevent import let_hub_turn  # noqa: PLC0415  # optional

            let_hub_turn()
        yield from ()


BLOCKING: Final[Bridge] = _Blocking()
"""Blocks the calling thread; where it has a hub of gevent, the calling greenlet alone."""


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits by way of `BLOCKING` alone, and so never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        result: T = ended.value
        return result
    raise AssertionError("a coroutine that blocks has suspended")


def _other_greenlets_run() -> bool:
    """Return whether a hub of gevent would run other greenlets while this one waits."""
    hubs = sys.modules.get("gevent._hub_local")
    hub = None if hubs is None else hubs.get_hub_if_exists()
    if hub is None:
        return False
    from gevent import getcurrent  # noqa: PLC0415  # optional

    return getcurrent() is not hub  # whose own callbacks cannot wait
