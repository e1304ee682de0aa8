"""Queries that cannot leave this process, wherever the others of their collector run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl

from polars_async._upstream import forbids_cpu
from polars_async.errors import PolarsAsyncError
from polars_async.executors.threads import HERE
from polars_async.gpu.failure import GpuFailure
from polars_async.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async.query import Query

T = TypeVar("T")

_WHY = (
    "its sink hands over to an object or a function of this process, so that the query cannot "
    "leave this process"
)


class StaysHereError(Exception):
    """A query cannot be sent, since what it hands over would be lost in another process."""


class UnsendableError(PolarsAsyncError):
    """A query cannot be sent, since what it holds cannot be pickled."""


def run_here(work: Callable[[], T], query: Query[Any]) -> T | None:
    """
    Run on this thread what stays here, if it is still wanted.

    The GPUs are those of other processes: what is for them is left to the CPU.
    """
    try:
        if query.done:
            return None
        engine = query.resolution.engine
        if not isinstance(engine, pl.GPUEngine):
            return HERE.run(work, query)
        if forbids_cpu(engine):
            raise PolarsAsyncError(f"{query.named} cannot run on a GPU elsewhere: {_WHY}")
        raise GpuFailure(Reason.UNSUPPORTED_QUERY, NotImplementedError(_WHY))
    finally:
        del work, query  # an error's traceback holds this frame
