"""
Under gevent's patch: nothing green is touched on a thread of our own.

The locks of log handlers, and those that hooks take, are gevent's then. A native thread that waits
for one may miss that it is free, or have the greenlets that wait for it miss that. So what is to be
told goes to the thread of a hub, on a greenlet, which may wait.
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
    """Have a thread that runs `run` end without the hub that green functions have made for it."""

    @wraps(run)
    def run_and_leave(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            run(*args, **kwargs)
        finally:
            del args, kwargs  # gevent keeps this frame, with what is left of the hub
            if (local := sys.modules.get("gevent._hub_local")) is not None:
                hub = local.get_hub_if_exists()
                if hub is not None:
                    hub.destroy(destroy_loop=True)

    return run_and_leave


class Delivery:
    """What is to be told of one query, or of none, in its order and on the thread of a hub."""

    def __init__(self, hub: Any) -> None:
        from gevent.lock import RLock  # noqa: PLC0415  # optional

        self._hub = hub
        self._calls: deque[Callable[[], None]] = deque()
        self._turn = RLock()

    def post(self, call: Callable[[], None]) -> None:
        """Make `call` there: at once if this is the place, or else soon."""
        self._calls.append(call)
        _pending[self] = None
        if self._is_here():
            self.catch_up()
        else:
            with suppress(Exception):  # the hub was destroyed, and its greenlets with it
                self._hub.loop.run_callback_threadsafe(self._spawn)

    def catch_up(self) -> None:
        """Make the calls that are left, if this is the place."""
        if not self._is_here():
            return
        with self._turn:
            _pending.pop(self, None)  # first, since another thread may post at any time
            while self._calls:
                self._calls.popleft()()

    def _is_here(self) -> bool:
        from gevent import getcurrent  # noqa: PLC0415  # optional

        return get_ident() == self._hub.thread_ident and getcurrent() is not self._hub

    def _spawn(self) -> None:
        from gevent import spawn  # noqa: PLC0415  # optional

        spawn(self.catch_up)


_pending: Final[dict[Delivery, None]] = {}


class _Main:
    hub: Any = None


def delivery() -> Delivery | None:
    """Give where to tell of what happens, unless that is wherever it happens."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return None
    from gevent import hub as hubs  # noqa: PLC0415  # optional

    if get_ident() == hubs.MAIN_THREAD_IDENT:  # pyright: ignore[reportAttributeAccessIssue]
        _Main.hub = hubs.get_hub()
    return None if _Main.hub is None else Delivery(_Main.hub)


def deliver(call: Callable[[], None]) -> None:
    """Make a call that may touch what is green."""
    there = delivery()
    if there is None:
        call()
    else:
        there.post(call)


def catch_up() -> None:
    """Tell all that is still to be told on this thread."""
    for there in list(_pending):
        there.catch_up()


in_child(Step.FORGET, _pending.clear)
