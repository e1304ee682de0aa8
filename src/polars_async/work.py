"""What a query does on its thread, and what may be handed to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polars_async.streams import Buffer

_GPU_BATCH = 100_000
"""Rows of a batch of what the GPU collected, where nobody says how many."""


def collect(lf: pl.LazyFrame, engine: pl.Engine, optimizations: pl.QueryOptFlags) -> pl.DataFrame:
    """Collect one frame."""
    return engine.collect(lf, optimizations=optimizations)


def collect_each(
    frames: list[pl.LazyFrame], engine: pl.Engine, optimizations: pl.QueryOptFlags
) -> list[pl.DataFrame]:
    """Collect `frames` as one query, or one by one on an engine that has no other way."""
    if isinstance(engine, pl.GPUEngine) or type(engine).collect_all is pl.Engine.collect_all:
        return [engine.collect(frame, optimizations=optimizations) for frame in frames]
    return pl.collect_all(frames, engine=engine, optimizations=optimizations)


def sink(lf: pl.LazyFrame, engine: pl.Engine, optimizations: pl.QueryOptFlags) -> None:
    """Run a sink, whose result is an empty frame."""
    engine.collect(lf, optimizations=optimizations)


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
    rows = 0
    target: Buffer | None = buffer
    del buffer

    def put(batch: pl.DataFrame) -> bool:
        nonlocal rows
        rows += batch.height
        return target is None or target.put(batch)

    try:
        if isinstance(engine, pl.GPUEngine):  # it has no such sink
            frame = engine.collect(lf, optimizations=optimizations)
            for batch in frame.iter_slices(options["chunk_size"] or _GPU_BATCH):
                if put(batch):
                    break
        else:
            # The engine is named just so that it does not ask for an affinity, which is done.
            plan = lf.sink_batches(put, lazy=True, engine="in-memory", **options)
            engine.collect(plan, optimizations=optimizations)
    finally:
        # An error's traceback holds the plan, and the plan `put`, out of the garbage collector's
        # sight: the query, which holds the error, would never be freed.
        target = None
    return rows


def check_frame(lf: object) -> None:
    """Raise TypeError for what is no LazyFrame."""
    if not isinstance(lf, pl.LazyFrame):
        raise TypeError(f"lf must be a LazyFrame, got {_described(lf)}")


def checked_frames(lazy_frames: Iterable[pl.LazyFrame]) -> list[pl.LazyFrame]:
    """Read `lazy_frames`, every one of which has to be a LazyFrame."""
    if isinstance(lazy_frames, (pl.LazyFrame, pl.DataFrame)) or not hasattr(
        lazy_frames, "__iter__"
    ):
        raise TypeError(
            f"lazy_frames must be an iterable of LazyFrames, got {_described(lazy_frames)}: "
            "put a single frame in a list"
        )
    frames = list(lazy_frames)
    for position, frame in enumerate(frames):
        if not isinstance(frame, pl.LazyFrame):
            raise TypeError(f"lazy_frames[{position}] must be a LazyFrame, got {_described(frame)}")
    return frames


def _described(value: object) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"{name}: call its lazy() first" if isinstance(value, pl.DataFrame) else name
