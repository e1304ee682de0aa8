"""Where queries run: threads of this process, worker processes, or an executor of the caller's."""

from __future__ import annotations

from time import process_time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from contextvars import Context

    import polars as pl

    from polars_async._runtime.callers import CallSite
    from polars_async.executors.operations import Operation
    from polars_async.gpu.status import GpuStatus
    from polars_async.progress import Meter
    from polars_async.resolution import Resolution

T = TypeVar("T")


class Stoppable(Protocol):
    """The query of an operation, as far as a call of a worker needs to know it."""

    @property
    def named(self) -> str:
        """What to call the query in the middle of a sentence."""
        ...

    def clock_stopped(self) -> AbstractContextManager[None]:
        """Return a context manager; the time spent in it does not count as run time."""
        ...

    def note_reading(self, reading: tuple[Any, ...]) -> None:
        """Note what the operators of the query have done so far, as its worker has sent it."""
        ...

    def note_retry(self, how: str, cause: Exception) -> None:
        """Note `how` the GPU tries the query once more, and `cause`, the error of the first try."""
        ...

    def note_memory(self, peak: int) -> None:
        """Note that the query has taken so many bytes at once in its worker process."""
        ...

    def stop_with(self, stop: Callable[[], object] | None, *, for_sure: bool = True) -> bool:
        """
        Have `stop` called when the query is cancelled or times out; return False if it was already.

        `stop` is called on any thread, or by a signal handler. `for_sure` says whether it stops the
        query, or only tries to.
        """
        ...


class Job(Stoppable, Protocol):
    """The query of an operation, as far as an executor needs to know it."""

    context: Context
    """The context of the caller, in which Python functions run in this process."""
    resolution: Resolution
    call_site: CallSite | None
    """The line that asked for the query, if the query may go to another process."""
    place: str | None
    """Where it runs, such as ``"worker 4711"``, which the executor sets; None for a thread here."""
    meter: Meter | None
    """Counts what the query reads, if that is wanted; the executor sets it."""
    frames: Sequence[pl.LazyFrame]
    """The frames that are left to collect; empty once their plans are needed no more."""

    @property
    def is_counted(self) -> bool:
        """Whether what the query reads is to be counted, and its engine can."""
        ...

    @property
    def done(self) -> bool:
        """Whether the query was cancelled, or has timed out, while it runs."""
        ...


class QueryExecutor:
    """
    Runs the queries of a lane: the base of all executors, with defaults for one without workers.

    The thread of a slot calls `run`, and waits there until the query has ended.
    """

    @property
    def worker_count(self) -> int:
        """The number of worker processes that this executor has started and not ended."""
        return 0

    @property
    def worker_deaths(self) -> int:
        """The number of its worker processes that have died while they ran a query."""
        return 0

    def cpu_seconds(self) -> float:
        """Return the processor time of all that runs the queries so far, in seconds."""
        return process_time()

    def memory(self) -> int:
        """Return the bytes of memory that its worker processes have, each for itself."""
        return 0

    def prepare(self, gpu: GpuStatus) -> int | None:  # noqa: ARG002  # an executor with GPUs needs it
        """
        Prepare for queries on a GPU.

        Return how many of them run at once; None if the lane is to keep the slots that it has.
        """
        return None

    def run(self, operation: Operation[T], query: Job) -> T:
        """
        Run `operation`, which is that of `query`; return its result or raise its error.

        An executor that can stop the query does so when `query.stop_with` calls. What cannot leave
        this process runs on the calling thread.

        The traceback of an error keeps the frames of all functions that the error has passed, with
        their local variables. So `run`, and what it calls, deletes those that lead to the query: it
        holds the error, and the circle would keep frames and results alive.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Keep no idle workers from now on; queued queries still run. May be called repeatedly."""

    def reset_after_fork(self) -> None:
        """In a forked child, forget all workers: they belong to the parent."""
