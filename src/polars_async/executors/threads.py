"""Queries on OS threads of our own: real ones, also under gevent's monkey patch."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread
from typing import TYPE_CHECKING, Final, TypeVar

from polars_async._runtime.green import leaving_no_hub
from polars_async._runtime.nesting import enter_context, enter_worker
from polars_async._runtime.unpatched import SimpleQueue, get_ident, start_new_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from polars_async.executors import Job
    from polars_async.gpu.status import GpuStatus

T = TypeVar("T")

_SYSTEM_NAME: Final = Path("/proc/thread-self/comm")
_OWN_NAME: Final = "polars-async"


class ThreadsExecutor:
    """The thread of the slot itself, in this process: where queries run unless told otherwise."""

    workers = died = 0

    def prepare(self, gpu: GpuStatus) -> int | None:  # noqa: ARG002  # as GpuProcessExecutor
        """Do nothing: a GPU is no other place here."""
        return None

    def run(self, work: Callable[[], T], query: Job) -> T:
        """Run `work` here; nothing stops it."""
        enclosing = query.context.run(enter_context)
        try:
            return query.context.run(work)
        finally:
            enclosing.end()
            del work, query  # an error's traceback holds this frame

    def close(self) -> None:
        """Do nothing: the threads are those of the lane."""

    reset_after_fork = close


IN_PROCESS: Final = ThreadsExecutor()


class ThreadPool:
    """
    Threads that live from the first job that needs them until `close`, or until there are too many.

    They are plain threads of the interpreter, unknown to `threading`: nothing there is real once
    gevent has patched it, and the exit of the program does not wait for them.
    """

    __slots__ = ("_closed", "_for_gpu", "_jobs", "_started")

    def __init__(self, *, for_gpu: bool) -> None:
        self._for_gpu = for_gpu
        self._closed = False
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._started: list[int] = []

    @property
    def threads(self) -> int:
        """How many threads there are to count on: all but those that have stepped out."""
        return len(self._started)

    def start(self, job: Callable[[], None], *, at_once: int) -> None:
        """
        Run `job` at once; the caller's lock keeps others out meanwhile.

        `at_once` counts the jobs that run, this one included, which is how many threads it takes.
        """
        if self._closed:  # what is left of the line may still need a thread
            start_new_thread(_work_once, (job, self._for_gpu))
            return
        if len(self._started) < at_once:
            # In one call of C: a signal handler may raise between any two steps of Python, and a
            # thread that does not start, or is not counted, would cost a slot.
            self._started.extend(map(start_new_thread, [_work], [(self._jobs, self._for_gpu)]))
        self._jobs.put(job)

    def step_out(self) -> None:
        """Do not count on the calling thread; as in `start`, others are kept out meanwhile."""
        if not self._closed:
            self._started.pop()

    def step_in(self) -> None:
        """Count on the calling thread again; as in `start`, others are kept out meanwhile."""
        if not self._closed:
            self._started.append(get_ident())

    def shed(self, most: int) -> None:
        """Let those threads beyond `most` end that next have no job; as in `start`."""
        while len(self._started) > most:
            self._started.pop()
            self._jobs.put(_leave)

    def close(self) -> None:
        """Let each thread end after the job it is at, and those to come after their first."""
        self._closed = True
        self._started.clear()
        self._jobs.put(None)


def _leave() -> None:
    """In the place of a job, end the thread that takes it."""


@leaving_no_hub
def _work(jobs: SimpleQueue[Callable[[], None] | None], for_gpu: bool) -> None:  # noqa: FBT001
    _tell_system(_OWN_NAME)
    enter_worker(for_gpu=for_gpu)
    while (job := jobs.get()) is not None:
        if job is _leave:
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
    """Give this thread `name` for the time being: for Python, and for what lists threads."""
    thread = current_thread()
    before = thread.name
    thread.name = name
    _tell_system(name)
    try:
        yield
    finally:
        thread.name = before
        _tell_system(_OWN_NAME)


def _tell_system(name: str) -> None:
    # Linux alone lets a thread be named in this way, with 15 bytes; and it is no more than a help.
    with suppress(OSError):
        whole = name.encode(errors="replace")[:15].decode(errors="ignore")
        _SYSTEM_NAME.write_bytes(whole.encode())
