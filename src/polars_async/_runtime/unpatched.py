"""
The interpreter's own lock, thread and queue, also where gevent has patched them.

After ``gevent.monkey.patch_all()`` the names in `threading` and `queue` are green: a worker thread
that waited on one would wait for the hub, and a query would stall the hub. These are the originals,
whether gevent patches before or after this module is imported.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from math import inf
from operator import call
from queue import Empty
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from _thread import LockType, RLock, allocate_lock, get_ident, start_new_thread
    from collections.abc import Callable
    from queue import SimpleQueue
    from threading import local
    from time import sleep

    if sys.platform == "linux":
        from os import posix_spawn
else:

    def _original(module: str, name: str) -> Any:
        monkey = sys.modules.get("gevent.monkey")
        if monkey is None:
            return getattr(import_module(module), name)
        return monkey.get_original(module, name)

    RLock = _original("_thread", "RLock")
    local = _original("_thread", "_local")
    allocate_lock = _original("_thread", "allocate_lock")
    get_ident = _original("_thread", "get_ident")
    start_new_thread = _original("_thread", "start_new_thread")
    SimpleQueue = _original("queue", "SimpleQueue")
    sleep = _original("time", "sleep")
    if sys.platform == "linux":
        posix_spawn = _original("os", "posix_spawn")

T = TypeVar("T")

_SLICE: Final = 0.1
"""Seconds after which a wait is begun anew, so that Ctrl-C takes effect. Polars installs its SIGINT
handler with SA_RESTART, after which a wait without a timeout is resumed by the kernel, and Python
never runs its own handler."""

_LONGEST: Final = 86_400.0
"""Seconds that one wait takes at most; the interpreter refuses timeouts of centuries."""


def holding(lock: RLock, do: Callable[..., T], *arguments: object) -> T:
    """
    Call `do` with `lock` held and return its result; the lock is released whatever is raised.

    A signal handler may raise between any two bytecodes, and a tracing hook at each line: also at
    the end of a ``with`` block, before it releases its lock. So here one call of C acquires the
    lock, calls `do` and releases the lock, and `done` records how far it came. If `do` acquires the
    lock again, it has to do so in the same way.
    """
    release = partial(lock.__exit__, None, None, None)
    steps: list[Callable[[], Any]] = [lock.__enter__, partial(do, *arguments), release]
    done: list[Any] = []
    try:
        done.extend(map(call, steps))
        return done[1]  # type: ignore[no-any-return]
    finally:
        # One step is done where `do` has raised. With none the lock was not acquired, with more it
        # was released.
        if len(done) == 1:
            release()


def is_held(lock: RLock) -> bool:
    """Return whether the calling thread holds `lock`."""
    return lock._is_owned()  # type: ignore[attr-defined, no-any-return]  # noqa: SLF001  # as threading uses it


def wait_for(lock: LockType | RLock, timeout: float | None = None) -> bool:
    """Acquire `lock`, interruptible by Ctrl-C; return False if `timeout` seconds pass before."""
    end = inf if timeout is None else monotonic() + timeout
    while not lock.acquire(timeout=min(max(end - monotonic(), 0.0), _SLICE)):
        if monotonic() >= end:
            return False
    return True


def when_put(queue: SimpleQueue[None], timeout: float) -> None:
    """Wait until something is put into `queue`, `timeout` seconds at most."""
    try:
        queue.get(timeout=min(timeout, _LONGEST))
    except Empty:
        pass


__all__ = [
    "RLock",
    "SimpleQueue",
    "allocate_lock",
    "get_ident",
    "holding",
    "is_held",
    "local",
    "posix_spawn",
    "sleep",
    "start_new_thread",
    "wait_for",
    "when_put",
]
