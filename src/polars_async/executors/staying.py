"""Queries that cannot leave this process, though their collector has another executor."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import polars as pl

from polars_async._runtime.green import deliver
from polars_async._runtime.logs import log
from polars_async._runtime.upstream import forbids_cpu
from polars_async.errors import PolarsAsyncError
from polars_async.executors.threads import IN_PROCESS
from polars_async.gpu.failure import GpuFailure
from polars_async.reasons import Reason

if TYPE_CHECKING:
    from polars_async.executors import Job
    from polars_async.executors.operations import Operation

T = TypeVar("T")

_MAX_LOGGED: Final = 1000
_logged: Final[set[str]] = set()


class StaysHereError(Exception):
    """A query cannot be sent, since the results of its sink would be lost in another process."""

    def __str__(self) -> str:
        return (
            "its sink hands over to an object or a function of this process, so that the query "
            "cannot leave this process"
        )


class UnsendableError(PolarsAsyncError):
    """A query cannot be sent, since a part of it cannot be pickled."""


def log_once(query: Job, why: str, level: int = logging.INFO) -> None:
    """Log that `query` runs in this process, if no query was logged for the same reason."""
    if why in _logged:
        return
    if len(_logged) >= _MAX_LOGGED:  # the repr of an object in it may differ each time
        _logged.clear()
    _logged.add(why)
    message = "%s runs in this process, as others will for the same reason: %s"
    deliver(partial(log.log, level, message, query.named, why))


def run_here(operation: Operation[T], query: Job, why: str) -> T:
    """
    Run `operation` on this thread, since it cannot be sent for the reason `why`.

    With such an executor, GPUs belong to other processes: a query on a GPU falls back to the CPU.
    """
    try:
        if query.done:
            return None  # type: ignore[return-value]  # its outcome is dropped
        query.place = None  # a worker may have had it
        engine = query.resolution.engine
        if not isinstance(engine, pl.GPUEngine):
            return IN_PROCESS.run(operation, query)
        if forbids_cpu(engine):
            raise PolarsAsyncError(f"{query.named} cannot run on a GPU elsewhere: {why}")
        raise GpuFailure(Reason.UNSUPPORTED_QUERY, NotImplementedError(why))
    finally:
        del operation, query  # see QueryExecutor.run
