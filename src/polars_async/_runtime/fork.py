"""
What a fork leaves of a process that runs queries, and what has to be done in the child.

Of all threads only the one that forks is in the child. Polars' own are gone, so that a query would
never end there; and a lock that another thread held would never be released.
"""

from __future__ import annotations

import enum
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from polars_async._runtime.unpatched import RLock
from polars_async.errors import ForkedProcessError

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async._runtime.trial import Trial

_THREADS: Final = Path("/proc/self/task")


class Step(enum.IntEnum):
    """What is done in a forked child after the locks are free, in this order."""

    FORGET = enum.auto()
    """Forget threads, worker processes and what they were to do: they are the parent's."""
    FAIL = enum.auto()
    """Fail the queries: their waiters may ask for others at once, so all else is done by then."""


_locks: Final[WeakSet[RLock]] = WeakSet()
_actions: Final[list[tuple[Step, Callable[[], object]]]] = []


def new_lock() -> RLock:
    """
    Make a lock that is free in a forked child, whichever thread held it in the parent.

    Unless it is the thread that forks, in a signal handler for one: that is in the child, too, and
    goes on to release it.
    """
    lock = RLock()
    _locks.add(lock)
    return lock


def in_child(step: Step, action: Callable[[], object]) -> None:
    """Have `action` called in each forked child, at its `step`."""
    _actions.append((step, action))


class _Process:
    names_before_fork: frozenset[str] = frozenset()
    threads_lost = False
    in_doubt = False
    trial: Trial | None = None


def check() -> None:
    """Raise where a query would hang for ever, waiting for threads that a fork left behind."""
    if _Process.threads_lost:
        raise lost()
    if _Process.in_doubt:
        # Not at import, which is that of the package, and is to leave Polars alone.
        from polars_async._runtime.trial import Trial  # noqa: PLC0415

        _Process.trial = trial = _Process.trial or Trial()
        if not trial.has_ended():
            raise lost()
        _Process.in_doubt = False


def lost() -> ForkedProcessError:
    """Make the error of a query that cannot run, or go on running, in a forked process."""
    return ForkedProcessError(
        "this process was forked from one in which Polars had already run, and Polars' threads do "
        "not survive a fork, so the query would never end here: start worker processes before the "
        "first query (gunicorn without --preload), or with the spawn or forkserver method of "
        "multiprocessing"
    )


def _names_of_threads() -> frozenset[str]:
    """List how the threads are called, which Linux alone tells; elsewhere a query may hang."""
    names: set[str] = set()
    with suppress(OSError):
        for thread in _THREADS.iterdir():
            with suppress(OSError):  # the thread may end while it is looked at
                names.add((thread / "comm").read_text(errors="replace").strip())
    return frozenset(names)


def _before() -> None:
    if "polars" in sys.modules:
        _Process.names_before_fork = _names_of_threads()


def _after_in_child() -> None:
    for lock in list(_locks):
        if not lock._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001  # as threading uses both
            lock._at_fork_reinit()  # type: ignore[attr-defined]  # noqa: SLF001
    _note_lost_threads()
    for _, action in sorted(_actions, key=lambda each: each[0]):
        try:
            action()
        except BaseException:  # noqa: BLE001  # the others are not to suffer for it
            traceback.print_exc()


def _note_lost_threads() -> None:
    if not _Process.names_before_fork:
        return
    from polars_async._runtime.upstream import POOL_THREAD, SHARED_NAME  # noqa: PLC0415  # as above

    names = _Process.names_before_fork
    if any(POOL_THREAD.match(name) for name in names):
        _Process.threads_lost = True
    # Polars' own threads are called so, and those of other libraries, which do without them here.
    elif SHARED_NAME in names:
        _Process.in_doubt = True
    _Process.trial = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_after_in_child)
