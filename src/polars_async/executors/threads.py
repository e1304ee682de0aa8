"""Queries on OS threads of our own: real ones, also under gevent's monkey patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polars_async._native import SimpleQueue, start_new_thread
from polars_async._nesting import enter_worker

if TYPE_CHECKING:
    from collections.abc import Callable


class ThreadExecutor:
    """
    Threads that live from the first job that needs them until `close`.

    They are plain threads of the interpreter, unknown to `threading`: nothing there is real once
    gevent has patched it, and the exit of the program does not wait for them.
    """

    __slots__ = ("_jobs", "_threads")

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = 0

    def start(self, job: Callable[[], None], *, at_once: int) -> None:
        """
        Run `job` at once; the caller's lock keeps others out meanwhile.

        `at_once` counts the jobs that run, this one included, which is how many threads it takes.
        """
        if self._threads < at_once:
            self._threads += 1
            try:
                start_new_thread(_work, (self._jobs,))
            except RuntimeError:
                self._threads -= 1
                raise
        self._jobs.put(job)

    def close(self) -> None:
        """Let each thread end after the job it is at."""
        for _ in range(self._threads):
            self._jobs.put(None)
        self._threads = 0


def _work(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    enter_worker()
    while (job := jobs.get()) is not None:
        job()
        del job  # else the last query's frames would live until the next
