"""Queries that cannot leave this process, wherever the others of their collector run."""

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
    from collections.abc import Callable

    from polars_async.executors import Job

T = TypeVar("T")

_MOST_LOGGED: Final = 1000
_said: Final[set[str]] = set()


class StaysHereError(Exception):
    """A query cannot be sent, since what it hands over would be lost in another process."""

    def __str__(self) -> str:
        return (
            "its sink hands over to an object or a function of this process, so that the query "
            "cannot leave this process"
        )


class UnsendableError(PolarsAsyncError):
    """A query cannot be sent, since what it holds cannot be pickled."""


def log_once(query: Job, why: str, level: int = logging.INFO) -> None:
    """Say that `query` runs in this process, unless it was said of another for the same reason."""
    if why in _said:
        return
    if len(_said) >= _MOST_LOGGED:  # there may be addresses in what an object says of itself
        _said.clear()
    _said.add(why)
    message = "%s runs in this process, as others will for the same reason: %s"
    deliver(partial(log.log, level, message, query.named, why))


def run_here(work: Callable[[], T], query: Job, why: str) -> T | None:
    """
    Run on this thread what stays here, for the reason `why`, if it is still wanted.

    The GPUs are those of other processes: what is for them is left to the CPU.
    """
    try:
        if query.done:
            return None
        engine = query.resolution.engine
        if not isinstance(engine, pl.GPUEngine):
            return IN_PROCESS.run(work, query)
        if forbids_cpu(engine):
            raise PolarsAsyncError(f"{query.named} cannot run on a GPU elsewhere: {why}")
        raise GpuFailure(Reason.UNSUPPORTED_QUERY, NotImplementedError(why))
    finally:
        del work, query  # an error's traceback holds this frame
