"""
What is done in a forked child of a process that runs queries.

Of all threads only the one that forks is in the child. Polars' own are gone, so that a query would
never end there; and a lock that another thread held would never be released.

In the child the locks are made free first, since all that follows takes them; then it is noted
whether Polars' threads are lost, since failed queries may be submitted again at once; then the
actions run, step by step.
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
    """The steps in a forked child after the locks are free, in this order."""

    FORGET = enum.auto()
    """Forget threads, worker processes and their jobs: they are the parent's."""
    FAIL = enum.auto()
    """Fail the queries. This wakes their waiters, which may submit others at once: those must find
    nothing of the parent's any more."""


_locks: Final[WeakSet[RLock]] = WeakSet()
_actions: Final[list[tuple[Step, Callable[[], object]]]] = []


def new_lock() -> RLock:
    """
    Make a lock that is free in a forked child, although another thread held it in the parent.

    Where the thread that forks holds it, for example in a signal handler, it stays held: that
    thread is in the child, too, and will release it.
    """
    lock = RLock()
    _locks.add(lock)
    return lock


def in_child(step: Step, action: Callable[[], object]) -> None:
    """Call `action` in each forked child, at its `step`."""
    _actions.append((step, action))


class _PolarsThreads:
    """Whether Polars' threads, without which no query ends, were left behind by a fork."""

    def __init__(self) -> None:
        self._names: frozenset[str] = frozenset()
        self._lost = False
        self._in_doubt = False
        self._trial: Trial | None = None

    def note_before_fork(self) -> None:
        """Note the names of all threads; in the child they are gone."""
        if "polars" in sys.modules:
            self._names = _names_of_threads()

    def note_in_child(self) -> None:
        """Note whether the threads of the parent were Polars'."""
        if not self._names:
            return
        # Not at import of this module, which is that of the package, and must not import Polars.
        from polars_async._runtime.upstream import POOL_THREAD, SHARED_NAME  # noqa: PLC0415

        if any(POOL_THREAD.match(name) for name in self._names):
            self._lost = True
        # A name of Polars' own threads, and of those of other libraries, which are not needed here.
        elif SHARED_NAME in self._names:
            self._in_doubt = True
        self._trial = None

    def check(self) -> None:
        """Raise if they were; where the names do not tell, a small query is tried."""
        if self._lost:
            raise forked_process_error()
        if self._in_doubt:
            from polars_async._runtime.trial import Trial  # noqa: PLC0415  # as above

            # Kept, since one that never ends is not to be started again for each query.
            self._trial = trial = self._trial or Trial()
            if not trial.has_ended():
                raise forked_process_error()
            self._in_doubt = False


_polars_threads: Final = _PolarsThreads()
check: Final = _polars_threads.check
"""Raise ForkedProcessError where a query would wait for ever for threads left behind by a fork."""


def forked_process_error() -> ForkedProcessError:
    """Make the error of a query that cannot run, or go on running, in a forked process."""
    return ForkedProcessError(
        "this process was forked from one in which Polars had already run, and Polars' threads do "
        "not survive a fork, so the query would never end here: start worker processes before the "
        "first query (gunicorn without --preload), or with the spawn or forkserver method of "
        "multiprocessing"
    )


def _names_of_threads() -> frozenset[str]:
    """Return the names of this process's threads; only Linux lists them: else a query may hang."""
    names: set[str] = set()
    with suppress(OSError):
        for thread in _THREADS.iterdir():
            with suppress(OSError):  # the thread may end meanwhile
                names.add((thread / "comm").read_text(errors="replace").strip())
    return frozenset(names)


def _after_in_child() -> None:
    for lock in list(_locks):
        # One that this thread holds guards a change that it is in the midst of: it goes on with it
        # after the fork, and releases the lock.
        if not lock._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001  # as threading uses both
            lock._at_fork_reinit()  # type: ignore[attr-defined]  # noqa: SLF001
    _polars_threads.note_in_child()
    for _, action in sorted(_actions, key=lambda each: each[0]):
        try:
            action()
        except BaseException:  # noqa: BLE001  # the other actions are still needed
            traceback.print_exc()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_polars_threads.note_before_fork, after_in_child=_after_in_child)
