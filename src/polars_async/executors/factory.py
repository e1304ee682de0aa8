"""Which place an ``executor=`` means."""

from __future__ import annotations

import os
import sys
from concurrent.futures import Executor
from math import ceil
from typing import TYPE_CHECKING, Final, Literal

from polars_async.executors.gpu_thread import GPU_IN_PROCESS
from polars_async.executors.threads import IN_PROCESS

if TYPE_CHECKING:
    from polars_async.executors import QueryExecutor

ExecutorRequest = Literal["threads", "processes", "auto"] | Executor

WITH_WORKERS: Final = ("processes", "auto")
_ELSEWHERE: Final = 32
"""Queries at once in an executor of the caller's, which has bounds of its own."""


def default_running(executor: ExecutorRequest) -> int:
    """Give how many queries run at once where nobody says how many."""
    if isinstance(executor, Executor):
        return _ELSEWHERE
    return min(4, max(2, os.cpu_count() or 2)) + 1


def make_executor(
    executor: ExecutorRequest, max_running: int, large_at_once: int, max_memory: int | None
) -> QueryExecutor:
    """
    Make the place for the queries of a collector.

    Of the `max_running` that run at once, `large_at_once` may be queries that are not small: among
    these the processors are shared out.

    Raises
    ------
    ValueError
        `executor` is none, or not to be had on this system; or `max_memory` is not for it.
    """
    if max_memory is not None and executor not in WITH_WORKERS:
        raise ValueError(
            f"max_memory={max_memory!r} is for worker processes: it needs executor='processes' or "
            f"executor='auto', and executor is {executor!r}"
        )
    if executor == "threads":
        return IN_PROCESS
    if isinstance(executor, Executor):
        from polars_async.executors.futures import FuturesExecutor  # noqa: PLC0415  # as below

        return FuturesExecutor(executor)
    if executor not in WITH_WORKERS:
        raise ValueError(
            "executor must be 'threads', 'processes', 'auto' or a concurrent.futures.Executor, got "
            f"{executor!r}"
        )
    if sys.platform != "linux":
        raise ValueError(
            f"executor={executor!r} needs Linux, and this is {sys.platform}: give it an executor, "
            "such as concurrent.futures.ProcessPoolExecutor()"
        )
    from polars_async.executors.processes.pool import ProcessExecutor  # noqa: PLC0415  # what few need

    return ProcessExecutor(
        threads=_threads_each(large_at_once),
        most_idle=max_running,
        max_memory=max_memory,
        keeps_unsendable=executor == "auto",
    )


def make_gpu_executor(
    executor: ExecutorRequest, elsewhere: QueryExecutor, large_at_once: int
) -> QueryExecutor:
    """Make the place for the queries on a GPU of a collector that has `elsewhere` for the others."""
    if elsewhere is IN_PROCESS:
        return GPU_IN_PROCESS
    if executor not in WITH_WORKERS:
        return elsewhere
    from polars_async.executors.processes.gpu_pool import GpuProcessExecutor  # noqa: PLC0415  # what few need

    return GpuProcessExecutor(
        threads=_threads_each(large_at_once), keeps_unsendable=executor == "auto"
    )


def _threads_each(at_once: int) -> int:
    """Return the threads of each of so many queries that run at once."""
    wanted = os.environ.get("POLARS_MAX_THREADS", "")
    threads = int(wanted) if wanted.isdecimal() else len(os.sched_getaffinity(0))
    return max(1, ceil(threads / at_once))
