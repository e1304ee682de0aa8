"""A small query that shows whether Polars works in a forked process."""

from __future__ import annotations

from time import monotonic
from typing import Final

import polars as pl

from polars_async._runtime.unpatched import allocate_lock, start_new_thread

_PATIENCE: Final = 1.0
"""Seconds until a trial has failed; it takes some milliseconds where Polars works."""


class Trial:
    """A query that needs Polars' threads, on a thread: it never ends where a fork lost them."""

    def __init__(self) -> None:
        self._deadline = monotonic() + _PATIENCE
        self._running = allocate_lock()
        self._running.acquire()
        start_new_thread(self._run, ())

    def has_ended(self) -> bool:
        """Wait for its end, until the deadline; return whether it has ended."""
        if self._running.acquire(timeout=max(self._deadline - monotonic(), 0.0)):
            self._running.release()
            return True
        return False

    def _run(self) -> None:
        try:
            pl.scan_csv(b"a\n1\n").collect(engine="streaming")  # a file has all pools at work
        finally:
            self._running.release()
