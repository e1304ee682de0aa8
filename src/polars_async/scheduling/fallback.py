"""The fallback of a query from the GPU engine to the in-memory engine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from polars_async.executors.operations import on_engine
from polars_async.gpu.failure import GpuFailure
from polars_async.resolution import IN_MEMORY, SOURCE_NAMES, runs

if TYPE_CHECKING:
    from polars_async.executors.operations import Operation
    from polars_async.resolution import Resolution
    from polars_async.scheduling.admission import Admission
    from polars_async.scheduling.query import Query

T = TypeVar("T")


def fall_back(query: Query[T], operation: Operation[T] | None, admission: Admission) -> bool:
    """
    Have `query`, which ran `operation` on the GPU, run again on the in-memory engine, if it may.

    Returns
    -------
    bool
        Whether it now belongs to `admission`, and waits. False if there is nothing to run again:
        the query succeeded, failed by an error of its own, was cancelled or timed out.
    """
    failure = query.error
    if operation is None or not isinstance(failure, GpuFailure):
        return False
    # Its traceback holds the frames of the query, and all of the query with it.
    failure.__traceback__ = failure.__context__ = None
    query.note_failure_of_gpu()
    return query.requeue(
        on_engine(operation, IN_MEMORY, failure.partial_results),
        fallen_back(query.resolution, failure),
        admission.owner,
    )


def fallen_back(resolution: Resolution, failure: GpuFailure) -> Resolution:
    """Return the resolution of a query after its fallback."""
    asks = f"{SOURCE_NAMES[resolution.source]} asks for the GPU engine"
    what_runs = " ".join(filter(None, (runs(IN_MEMORY.name), failure.remaining)))
    return replace(
        resolution,
        engine=IN_MEMORY,
        name=IN_MEMORY.name,
        fell_back=True,
        reason=failure.reason,
        message=f"{asks}, but {failure}, so {what_runs}: {failure.remedy}",
        cause=failure.cause,
        retried=resolution.retried or failure.both_tries is not None,
    )
