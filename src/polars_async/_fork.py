"""What a fork leaves of a process that runs queries: Polars' threads do not survive it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from polars_async.errors import ForkedProcessError

_THREADS: Final = Path("/proc/self/task")


class _Process:
    threads_before_fork = False
    threads_lost = False


def check() -> None:
    """Raise where a query would hang for ever, waiting for threads that a fork left behind."""
    if _Process.threads_lost:
        raise lost()


def lost() -> ForkedProcessError:
    """Make the error of a query that cannot run, or go on running, in a forked process."""
    return ForkedProcessError(
        "this process was forked from one in which Polars had already run, and Polars' threads do "
        "not survive a fork, so the query would never end here: start worker processes before the "
        "first query (gunicorn without --preload), or with the spawn or forkserver method of "
        "multiprocessing"
    )


def _polars_threads_run() -> bool:
    if "polars" not in sys.modules:
        return False
    # Not at import, which is that of the package, and is to leave Polars alone.
    from polars_async._upstream import POOL_THREAD  # noqa: PLC0415

    # Linux alone lists them. Elsewhere the start method "fork" is rare, and a query may hang.
    with suppress(OSError):
        for thread in _THREADS.iterdir():
            with suppress(OSError):  # the thread may end while it is looked at
                if POOL_THREAD.match((thread / "comm").read_text(errors="replace")):
                    return True
    return False


def _before() -> None:
    _Process.threads_before_fork = _polars_threads_run()


def _after_in_child() -> None:
    _Process.threads_lost = _Process.threads_lost or _Process.threads_before_fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_after_in_child)
