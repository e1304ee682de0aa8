"""Makes the executor that ``executor=`` asks for."""

from __future__ import annotations

import os
import sys
from concurrent.futures import Executor
from math import ceil
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from polars_async._runtime.machine import processors
from polars_async._runtime.upstream import spilling
from polars_async.executors.gpu_thread import GPU_IN_PROCESS
from polars_async.executors.threads import IN_PROCESS

if TYPE_CHECKING:
    from polars_async.executors import QueryExecutor

ExecutorRequest: TypeAlias = Literal["threads", "processes", "auto"] | Executor
"""What ``executor=`` takes."""

WITH_WORKERS: Final = ("processes", "auto")
_MAX_RUNNING_ELSEWHERE: Final = 32
"""Queries at once in an executor of the caller's, which has limits of its own."""
_MOST_THREADS: Final = 64
"""Queries at once on threads, by default: or as many as there are processors, if these are more."""
_MOST_WORKERS: Final = 8
"""The same in worker processes, each of which takes some 60 MB and 0.2 s to start: or twice as many
as there are processors."""

_SPILLED_IN_WORKERS: Final = 0.5
"""The share of `max_memory` from which on a worker spills: not all that Polars holds can be
spilled, and what is on its way counts as well."""


def default_slots(executor: ExecutorRequest) -> tuple[int, int | None]:
    """
    Return the default of ``max_running``: how many queries run at once in any case, and at most.

    The latter is None where the first number is exact.
    """
    if isinstance(executor, Executor):
        return _MAX_RUNNING_ELSEWHERE, None
    available = ceil(processors())
    most = max(_MOST_THREADS, available)
    if executor in WITH_WORKERS:
        most = max(_MOST_WORKERS, 2 * available)
    return min(4, max(2, available)) + 1, most


def make_executor(
    executor: ExecutorRequest, slots: int, large_at_once: int, max_memory: int | None = None
) -> QueryExecutor:
    """
    Return the executor of a collector.

    `slots` queries run at once mostly, and `large_at_once` of these may be large: they share the
    processors.

    Raises
    ------
    ValueError
        `executor` is no executor, or needs another system, or does not support `max_memory`.
    """
    if executor == "threads":
        return IN_PROCESS
    if isinstance(executor, Executor):
        if max_memory is not None:
            raise ValueError(
                f"max_memory={max_memory!r} is for queries in this process and its own worker "
                f"processes, and {executor!r} runs them elsewhere: limit its memory there"
            )
        from polars_async.executors.futures import FuturesExecutor  # noqa: PLC0415  # few programs need it

        return FuturesExecutor(executor)
    if executor not in WITH_WORKERS:
        raise ValueError(
            "executor must be 'threads', 'processes', 'auto' or a concurrent.futures.Executor, got "
            f"{executor!r}"
        )
    if sys.platform == "linux":
        from polars_async.executors.processes.pool import ProcessExecutor  # noqa: PLC0415  # few programs need it

        return ProcessExecutor(
            threads=_threads_each(large_at_once),
            max_idle=slots,
            max_memory=max_memory,
            env=_spilling(max_memory),
            runs_unsendable_here=executor == "auto",
        )
    raise ValueError(
        f"executor={executor!r} needs Linux, and this is {sys.platform}: use executor='threads', "
        "or give it an executor, such as concurrent.futures.ProcessPoolExecutor()"
    )


def make_gpu_executor(
    executor: ExecutorRequest, cpu_executor: QueryExecutor, large_at_once: int
) -> QueryExecutor:
    """Return the executor of a collector's queries on GPUs; the others have `cpu_executor`."""
    if cpu_executor is IN_PROCESS:
        return GPU_IN_PROCESS
    if sys.platform == "linux" and executor in WITH_WORKERS:
        from polars_async.executors.processes.gpu_pool import GpuProcessExecutor  # noqa: PLC0415  # few programs need it

        return GpuProcessExecutor(
            threads=_threads_each(large_at_once), runs_unsendable_here=executor == "auto"
        )
    return cpu_executor


def _spilling(max_memory: int | None) -> dict[str, str]:
    """Return the variables by which workers spill before they outgrow `max_memory`."""
    if max_memory is None or spilling.is_chosen():
        return {}
    return {spilling.BUDGET: spilling.megabytes(int(_SPILLED_IN_WORKERS * max_memory))}


def _threads_each(at_once: int) -> int:
    """Return the number of Polars threads of a worker, of which `at_once` compute at once."""
    wanted = os.environ.get("POLARS_MAX_THREADS", "")
    threads = int(wanted) if wanted.isdecimal() else processors()
    return max(1, ceil(threads / at_once))
