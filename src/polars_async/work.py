"""What a query does on its thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import polars as pl

from polars_async._upstream import without_warning
from polars_async.gpu.failure import GpuFailure
from polars_async.gpu.offload import collect_on_gpu, is_wanted

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async.bridges.buffer import Buffer

T = TypeVar("T")

_sink_batches: Final[Callable[..., pl.LazyFrame]] = without_warning(pl.LazyFrame.sink_batches)
_GPU_BATCH = 100_000
"""Rows of a batch of what the GPU collected, where nobody says how many."""


def collect(lf: pl.LazyFrame, engine: pl.Engine, optimizations: pl.QueryOptFlags) -> pl.DataFrame:
    """Collect one frame."""
    if isinstance(engine, pl.GPUEngine):
        return collect_on_gpu(lf, engine, optimizations)
    return engine.collect(lf, optimizations=optimizations)


def collect_each(
    frames: list[pl.LazyFrame], engine: pl.Engine, optimizations: pl.QueryOptFlags
) -> list[pl.DataFrame]:
    """Collect `frames` as one query, or one by one on an engine that has no other way."""
    if isinstance(engine, pl.GPUEngine):
        return _collect_each_on_gpu(frames, engine, optimizations)
    if type(engine).collect_all is pl.Engine.collect_all:
        return [engine.collect(frame, optimizations=optimizations) for frame in frames]
    return pl.collect_all(frames, engine=engine, optimizations=optimizations)


def _collect_each_on_gpu(
    frames: list[pl.LazyFrame], engine: pl.GPUEngine, optimizations: pl.QueryOptFlags
) -> list[pl.DataFrame]:
    """Collect `frames` one by one; those that fail there are left for the CPU, as one query."""
    found: dict[int, pl.DataFrame] = {}
    failure: GpuFailure | None = None
    for number, frame in enumerate(frames):
        if not is_wanted():
            break
        try:
            found[number] = collect_on_gpu(frame, engine, optimizations, counts=failure is None)
        except GpuFailure as caught:
            failure = failure or caught
    if failure is None:
        return list(found.values())
    failure.found = found
    failure.share = f"{len(frames) - len(found)} of {len(frames)} frames"
    raise failure


def schema(lf: pl.LazyFrame) -> pl.Schema:
    """Find out the schema."""
    return lf.collect_schema()


def sink(lf: pl.LazyFrame, engine: pl.Engine, optimizations: pl.QueryOptFlags) -> None:
    """Run a sink, whose result is an empty frame."""
    collect(lf, engine, optimizations)


def feed(
    lf: pl.LazyFrame,
    engine: pl.Engine,
    optimizations: pl.QueryOptFlags,
    buffer: Buffer,
    options: dict[str, Any],
) -> int:
    """
    Put the result into `buffer`, batch by batch; gives its rows.

    Not by Polars' own ``collect_batches``, which loses panics, but by a sink, which calls from the
    midst of a synchronous query.
    """
    if isinstance(engine, pl.GPUEngine):
        return _feed_from_gpu(lf, engine, optimizations, buffer, options)
    rows = 0
    target: Buffer | None = buffer
    del buffer

    def put(batch: pl.DataFrame) -> bool:
        nonlocal rows
        rows += batch.height
        return target is None or target.put(batch)

    try:
        # The engine is named just so that it does not ask for an affinity, which is done.
        plan = _sink_batches(lf, put, lazy=True, engine="in-memory", **options)
        engine.collect(plan, optimizations=optimizations)
    finally:
        # An error's traceback holds the plan, and the plan `put`, out of the garbage collector's
        # sight: the query, which holds the error, would never be freed.
        target = None
    return rows


def _feed_from_gpu(
    lf: pl.LazyFrame,
    engine: pl.GPUEngine,
    optimizations: pl.QueryOptFlags,
    buffer: Buffer,
    options: dict[str, Any],
) -> int:
    """Put the whole result into `buffer`, since the GPU engine has no sink of batches."""
    frame = collect_on_gpu(lf, engine, optimizations)
    for batch in frame.iter_slices(options["chunk_size"] or _GPU_BATCH):
        buffer.add(batch)
    return frame.height
