"""Queries on OS threads of our own: real ones, also under gevent's monkey patch."""

from __future__ import annotations

from contextlib import contextmanager
from threading import current_thread
from typing import TYPE_CHECKING, Final, TypeVar

from polars_async._runtime.green import leaving_no_hub
from polars_async._runtime.nesting import enter_context, enter_worker
from polars_async._runtime.thread_names import set_system_name
from polars_async._runtime.unpatched import SimpleQueue, get_ident, start_new_thread
from polars_async.executors import QueryExecutor
from polars_async.executors.meters import LocalMeter, count, counting

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from polars_async.executors import Job
    from polars_async.executors.operations import Operation

T = TypeVar("T")

_IDLE_NAME: Final = "polars-async"


class ThreadsExecutor(QueryExecutor):
    """Runs a query on the slot's own thread, in this process: the default executor."""

    def run(self, operation: Operation[T], query: Job) -> T:
        """Run `operation` on this thread; nothing stops it."""
        enclosing = query.context.run(enter_context)
        try:
            if query.is_counted:
                query.meter = meter = LocalMeter(operation.frames)
                return query.context.run(count, counting(operation), meter)
            return query.context.run(operation)
        finally:
            enclosing.end()
            del operation, query  # see QueryExecutor.run


IN_PROCESS: Final = ThreadsExecutor()


class ThreadPool:
    """
    Threads that live from the first job that needs them until `close`, or until `shed` ends them.

    They are plain threads of the interpreter, unknown to `threading`: gevent's patch would make
    those of `threading` greenlets, and the exit of the program does not wait for these.

    No method locks: the caller holds the lock of the lane's admission.
    """

    __slots__ = ("_closed", "_for_gpu", "_jobs", "_started")

    def __init__(self, *, for_gpu: bool) -> None:
        self._for_gpu = for_gpu
        self._closed = False
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._started: list[int] = []

    @property
    def threads(self) -> int:
        """The number of threads that take jobs: all but those that have stepped out."""
        return len(self._started)

    def start(self, job: Callable[[], None], *, at_once: int) -> None:
        """
        Run `job` at once.

        `at_once` is the number of jobs that run now, this one included: each needs a thread.
        """
        if self._closed:  # queries that were queued before may still need a thread
            start_new_thread(_work_once, (job, self._for_gpu))
            return
        if len(self._started) < at_once:
            # In one call of C: a signal handler may raise between any two steps of Python, and a
            # thread that does not start, or is not counted, would cost a slot.
            self._started.extend(map(start_new_thread, [_work], [(self._jobs, self._for_gpu)]))
        self._jobs.put(job)

    def step_out(self) -> None:
        """Stop counting the calling thread, which will take no job for some time."""
        if not self._closed:
            self._started.pop()

    def step_in(self) -> None:
        """Count the calling thread again."""
        if not self._closed:
            self._started.append(get_ident())

    def shed(self, most: int) -> None:
        """End threads until `most` are left; each ends when it would else wait for a job."""
        while len(self._started) > most:
            self._started.pop()
            self._jobs.put(_end_thread)

    def close(self) -> None:
        """End each thread after its present job; threads started later end after their first."""
        self._closed = True
        self._started.clear()
        self._jobs.put(None)


def _end_thread() -> None:
    """Stand in the queue of jobs, and end the thread that takes it."""


@leaving_no_hub
def _work(jobs: SimpleQueue[Callable[[], None] | None], for_gpu: bool) -> None:  # noqa: FBT001
    set_system_name(_IDLE_NAME)
    enter_worker(for_gpu=for_gpu)
    while (job := jobs.get()) is not None:
        if job is _end_thread:
            return
        job()
        del job  # else the last query's frames would live until the next
    jobs.put(None)  # for the next thread


@leaving_no_hub
def _work_once(job: Callable[[], None], for_gpu: bool) -> None:  # noqa: FBT001
    enter_worker(for_gpu=for_gpu)
    job()


@contextmanager
def named_thread(name: str) -> Generator[None]:
    """Call this thread `name` meanwhile: for Python, and for tools that list threads."""
    thread = current_thread()
    before = thread.name
    thread.name = name
    set_system_name(name)
    try:
        yield
    finally:
        thread.name = before
        set_system_name(_IDLE_NAME)
