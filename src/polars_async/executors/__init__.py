"""Where queries run: one module for each such place, and the threads that wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from contextvars import Context

    import polars as pl

    from polars_async._runtime.callers import CallSite
    from polars_async.gpu.status import GpuStatus
    from polars_async.resolution import Resolution

T = TypeVar("T")


class Job(Protocol):
    """The query of an operation, as far as the place where it runs needs to know it."""

    context: Context
    """That of the caller, in which Python functions run here."""
    resolution: Resolution
    call_site: CallSite | None
    """Where it was asked for, if it may go to another process."""
    frames: Sequence[pl.LazyFrame]
    """Those that are left to collect; none once nothing more is to be learnt of them."""

    @property
    def named(self) -> str:
        """What to call it in the middle of a sentence."""
        ...

    @property
    def done(self) -> bool:
        """Whether it was cancelled, or has timed out, while it runs."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Count the time in here as no work."""
        ...

    def on_cancel(self, stop: Callable[[], object] | None, *, for_sure: bool = True) -> bool:
        """
        Have `stop` called if it is cancelled or times out while it runs; False if that is so.

        `for_sure` tells whether that will stop it. Any thread may call `stop`, and so may a signal
        handler.
        """
        ...


class QueryExecutor(Protocol):
    """Where the queries of a lane run. The thread of a slot hands each over, and waits for it."""

    @property
    def workers(self) -> int:
        """How many worker processes it has."""
        ...

    @property
    def died(self) -> int:
        """How many of its worker processes have died with a query."""
        ...

    def prepare(self, gpu: GpuStatus) -> int | None:
        """Prepare for queries on the GPU; gives how many run at once, None for as many as come."""

    def run(self, work: Callable[[], T], query: Job) -> T:
        """
        Run `work`, which is that of `query`, and give its result or raise its error.

        `query.on_cancel` tells when nobody wants it any more: a place that can stop it does so.
        What cannot leave this process runs on the calling thread.
        """
        ...

    def close(self) -> None:
        """Keep nothing for queries to come, but for those in line. It may be called again."""

    def reset_after_fork(self) -> None:
        """Forget everything, in a forked child, to which none of it belongs."""
