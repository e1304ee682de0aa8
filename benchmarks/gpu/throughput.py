"""How many PDS-H queries an hour several streams of them get through on each engine."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import polars_async as pa
from benchmarks.gpu.findings import counted, tell_row, told
from benchmarks.gpu.pdsh import close_breaker, ended, queries_of

if TYPE_CHECKING:
    import polars as pl

    from benchmarks.gpu.findings import Settings
    from polars_async.testing import SimulatedGpu

_STREAMS: Final = 4
_CONTENDERS: Final[tuple[tuple[pa.EngineName, dict[str, Any]], ...]] = (
    ("gpu", {"gpu": "offload"}),
    ("in-memory", {}),
    ("streaming", {}),
    ("adaptive", {"gpu": "offload"}),
)
_SHARE: Final = 0.2
"""Of the time of the check, for each contender."""


async def throughput(settings: Settings, _gpu: SimulatedGpu | None) -> None:
    """
    Measure each contender: `_STREAMS` streams that run all queries, each in an order of its own.

    That is the throughput test of TPC-H. Queries are counted when they end, and the time is that of
    the last end; a stream ends before its last query if the time is over.
    """
    queries = [*queries_of(settings).values()]
    for engine, options in _CONTENDERS:
        close_breaker()
        seconds = _SHARE * settings.seconds
        try:
            async with pa.Collector(**options) as collector:
                await _warmed(collector, queries, engine, seconds)
                row = await _measured(collector, queries, engine, seconds)
        except Exception as error:  # noqa: BLE001  # the others are measured all the same
            tell_row({"engine": engine, "ran on": f"raised {told(error)}"}, ok=False)
        else:
            tell_row(row, ok="gpu" in row["ran on"] if engine == "gpu" else None)


async def _warmed(
    collector: pa.Collector, queries: list[pl.LazyFrame], engine: pa.EngineName, seconds: float
) -> None:
    """Run what is slow the first time, and let `adaptive` see queries, for a fifth of the time."""
    end = time.perf_counter() + seconds / 5
    for query in queries:
        await ended(collector, query, engine)
        if time.perf_counter() > end:
            return


async def _measured(
    collector: pa.Collector, queries: list[pl.LazyFrame], engine: pa.EngineName, seconds: float
) -> dict[str, Any]:
    ran_on: Counter[str] = Counter()
    begun = time.perf_counter()
    end = begun + 0.7 * seconds

    async def stream(number: int) -> float:
        generator = random.Random(number)  # noqa: S311  # no secret, and the same for all
        last = begun
        for query in generator.sample(queries, len(queries)):
            handle = await ended(collector, query, engine)
            ran_on[handle.resolution.name] += 1
            if (last := time.perf_counter()) > end:
                break
        return last

    passed = max(await asyncio.gather(*map(stream, range(_STREAMS)))) - begun
    return {
        "engine": engine,
        "streams": _STREAMS,
        "queries": ran_on.total(),
        "s": round(passed, 2),
        "queries an hour": round(3600 * ran_on.total() / passed),
        "ran on": counted(ran_on),
    }
