"""
Calls of hooks and log handlers, where gevent has patched the threads.

The locks of log handlers, and those that hooks take, are gevent's then. If one of our own threads,
which has no hub, waited for such a lock, it could miss its release, or make a greenlet that waits
for the lock miss it. So these calls are made on the thread of a hub, in a greenlet, which may wait.
"""

from __future__ import annotations

import sys
from collections import deque
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, ParamSpec

from polars_async._runtime.fork import Step, in_child
from polars_async._runtime.unpatched import get_ident

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")


def leaving_no_hub(run: Callable[_P, None]) -> Callable[_P, None]:
    """Wrap the function of a thread: destroy the hub that green functions made for the thread."""

    @wraps(run)
    def run_and_leave(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            run(*args, **kwargs)
        finally:
            del args, kwargs  # gevent keeps this frame, with the destroyed hub
            if (local := sys.modules.get("gevent._hub_local")) is not None:
                hub = local.get_hub_if_exists()
                if hub is not None:
                    hub.destroy(destroy_loop=True)

    return run_and_leave


class Delivery:
    """Calls about one query, or about none, made in their order on the thread of a hub."""

    def __init__(self, hub: Any) -> None:
        from gevent.lock import RLock  # noqa: PLC0415  # optional

        self._hub = hub
        self._calls: deque[Callable[[], None]] = deque()
        self._calling = RLock()

    def post(self, call: Callable[[], None]) -> None:
        """Make `call` in a greenlet of the hub: now if this code runs in one, or else soon."""
        # Appended before this is listed as pending, and listed before the hub is notified: what
        # empties the queue, a greenlet or `catch_up` at an exit, then finds the call.
        self._calls.append(call)
        _pending[self] = None
        if self._is_in_hub_thread():
            self.catch_up()
        else:
            with suppress(Exception):  # the hub was destroyed, and its greenlets with it
                self._hub.loop.run_callback_threadsafe(self._spawn)

    def catch_up(self) -> None:
        """Make the calls that are left, if this code runs in a greenlet of the hub."""
        if not self._is_in_hub_thread():
            return
        # A greenlet's call may switch to another one, which waits here: calls keep their order.
        with self._calling:
            # Unlisted before the queue is emptied: a thread that posts meanwhile lists it again.
            # The other way round, a call posted between the two steps would stay unlisted.
            _pending.pop(self, None)
            while self._calls:
                self._calls.popleft()()

    def _is_in_hub_thread(self) -> bool:
        from gevent import getcurrent  # noqa: PLC0415  # optional

        return get_ident() == self._hub.thread_ident and getcurrent() is not self._hub

    def _spawn(self) -> None:
        from gevent import spawn  # noqa: PLC0415  # optional

        spawn(self.catch_up)


_pending: Final[dict[Delivery, None]] = {}


_main_hub: Any = None


def delivery() -> Delivery | None:
    """Return what delivers calls to the main thread's hub; None where gevent has not patched."""
    global _main_hub  # noqa: PLW0603  # a process has one main thread
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return None
    from gevent import hub as hubs  # noqa: PLC0415  # optional

    if get_ident() == hubs.MAIN_THREAD_IDENT:  # pyright: ignore[reportAttributeAccessIssue]
        _main_hub = hubs.get_hub()
    return None if _main_hub is None else Delivery(_main_hub)


def deliver(call: Callable[[], None]) -> None:
    """Make a call that may take green locks: here, or where gevent has patched, on its hub."""
    there = delivery()
    if there is None:
        call()
    else:
        there.post(call)


def catch_up() -> None:
    """Make all pending calls that belong on this thread."""
    for each in list(_pending):
        each.catch_up()


in_child(Step.FORGET, _pending.clear)
