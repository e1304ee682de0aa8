"""The way from the GPU engine to the in-memory engine, for a query that the first could not run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import polars as pl

from polars_async.gpu.failure import GpuFailure
from polars_async.resolution import ASKERS, IN_MEMORY, runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async.admission import Admission
    from polars_async.query import Query
    from polars_async.resolution import Resolution

T = TypeVar("T")


def fall_back(query: Query[T], work: Callable[[], T] | None, admission: Admission) -> bool:
    """
    Have `query`, which ran `work` on the GPU, wait in `admission` for the in-memory engine.

    Returns
    -------
    bool
        False where nothing is to be run again: the GPU engine did not fail, what it raised is the
        query's own error, or the query is not wanted any more.
    """
    failure = query.error
    if work is None or not isinstance(failure, GpuFailure):
        return False
    # Its traceback holds the frames of the query, and all of the query with it.
    failure.__traceback__ = failure.__context__ = None
    frames = query.frames
    if (found := failure.found) is not None:
        frames = [frame for number, frame in enumerate(frames) if number not in found]
    return query.requeue(
        _on_cpu(work, failure),
        fallen_back(query.resolution, failure),
        frames,
        admission.owner,
    )


def fallen_back(resolution: Resolution, failure: GpuFailure) -> Resolution:
    """Say that the in-memory engine runs what the GPU engine could not."""
    asks = f"{ASKERS[resolution.source]} asks for the GPU engine"
    what_runs = " ".join(filter(None, (runs(IN_MEMORY.name), failure.share)))
    return replace(
        resolution,
        engine=IN_MEMORY,
        name=IN_MEMORY.name,
        fell_back=True,
        reason=failure.reason,
        message=f"{asks}, but {failure}, so {what_runs}: {failure.remedy}",
        cause=failure.cause,
    )


def _on_cpu(work: Callable[[], T], failure: GpuFailure) -> Callable[[], T]:
    """Return the work, or what is left of it, for the in-memory engine."""
    assert isinstance(work, partial)  # of a function of `work`
    frames, _, *rest = work.args
    if failure.found is not None:
        return partial(_complete, failure.found, frames, *rest)  # type: ignore[return-value]  # as of collect_each
    return partial(work.func, frames, IN_MEMORY, *rest)


def _complete(
    found: dict[int, pl.DataFrame], frames: list[pl.LazyFrame], optimizations: pl.QueryOptFlags
) -> list[pl.DataFrame]:
    numbers = [number for number in range(len(frames)) if number not in found]
    left = [frames[number] for number in numbers]
    collected = pl.collect_all(left, engine=IN_MEMORY, optimizations=optimizations)
    found |= zip(numbers, collected, strict=True)
    return [found[number] for number in range(len(frames))]
