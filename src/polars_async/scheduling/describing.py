"""One query in words, and how far it is, when that is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polars_async.errors import describe
from polars_async.progress import NOTHING_READ, Progress
from polars_async.resolution import engine_text
from polars_async.scheduling.counts import State
from polars_async.wording import how_shared, summarize

if TYPE_CHECKING:
    from polars_async.scheduling.query import Query


def essence_of(query: Query[Any]) -> str:
    """Return the number, label, state and engine of `query`, in a few words."""
    label = "" if query.label is None else f" {query.label!r}"
    state = query.state.name.lower().replace("_", " ")
    told = f"query {query.id}{label}, {state}, {engine_text(query.resolution.name)}"
    shared = _sharing_of(query)
    return told if shared is None else f"{told}, {shared}"


def summary_of(query: Query[Any]) -> str:
    """Return what took `query` how long so far, in one sentence."""
    end = _end_of(query)  # first: of a query that ends meanwhile, the times are the final ones
    times, run = query.times, query.run_of_it
    return summarize(
        waited=times.queue_seconds,
        ran=times.run_seconds,
        resolution=query.resolution,
        ahead=run.ahead,
        place=run.place,
        inline=query.is_inline,
        peak_memory=run.peak_memory,
        gpu_seconds=times.gpu_seconds,
        memory_seconds=times.memory_seconds,
        shared=_sharing_of(query),
        end=end,
    )


def progress_of(query: Query[Any]) -> Progress:
    """Return how far `query` is."""
    # The state first: of a query that ends meanwhile, all is counted then.
    state, meter = query.state, query.run_of_it.meter
    reading = NOTHING_READ if meter is None else meter.read()
    return Progress(
        state=state.name.lower(),
        seconds=query.times.run_seconds or 0.0,
        rows=reading.rows,
        bytes=reading.bytes,
        fraction=1.0 if state is State.COMPLETED else reading.fraction,
        operator=None if query.done else reading.operator,
    )


def _sharing_of(query: Query[Any]) -> str | None:
    """Return whose result it gets instead of running itself; None if it runs itself."""
    return how_shared(query.shared_with, from_cache=query.from_cache)


def _end_of(query: Query[Any]) -> str | None:
    """Return how it ended; None if it has not, or has succeeded."""
    error = query.error
    if query.state is State.FAILED and error is not None:
        return f"failed by {describe(error)}"
    if query.state is State.TIMED_OUT:
        return "timed out"
    if query.done and query.state is not State.COMPLETED:
        return f"was {query.state.name.lower()}"
    return None
