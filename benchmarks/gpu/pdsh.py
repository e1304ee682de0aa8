"""The PDS-H queries on the GPU: their answers, the stall of the loop, and their speed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

import polars_async as pa
from benchmarks.gpu.findings import counted, tell, tell_row, told
from benchmarks.gpu.offload import grouped
from benchmarks.measure.stall import StallMeter
from benchmarks.measure.workloads import frame, read
from benchmarks.pdsh import data, oracle
from benchmarks.pdsh.queries import QUERIES
from polars_async.gpu.breaker import Health, breaker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import polars as pl

    from benchmarks.gpu.findings import Settings
    from polars_async.testing import SimulatedGpu

FIRST: Final = "gpu, first s"
"""The column with the first time on the GPU."""
_ENGINES: Final[tuple[pa.EngineName, ...]] = ("gpu", "in-memory", "streaming", "adaptive")
_ROUNDS: Final = 3
_AGREED: Final = ("yes", "unknown")


async def answers(settings: Settings, _gpu: SimulatedGpu | None) -> None:
    """Check each answer, and whether `gpu_support` predicted the engine that ran."""
    ran_on: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    async with pa.Collector(gpu="offload") as collector:
        for number, query in queries_of(settings).items():
            expected = query.collect(engine="in-memory")
            close_breaker()
            begun = time.perf_counter()
            handle = collector.collect_async(query, engine="gpu")
            try:
                answer = _compared(number, await handle, expected)
            except Exception as error:  # noqa: BLE001  # any error is an answer here
                answer = f"raised {told(error)}"
            seconds = time.perf_counter() - begun
            resolution = handle.resolution
            ran_on[resolution.name] += 1
            if resolution.reason is not None:
                reasons[resolution.reason] += 1
            support = pa.gpu_support(query)
            row = {
                "query": f"q{number}",
                "s": round(seconds, 3),
                "answer": answer,
                "ran on": resolution.name,
                "gpu_support": ": ".join((support.answer, *support.operations)),
                "agree": _agreement(support, resolution),
                "why not on the GPU": _why_not(resolution),
            }
            tell_row(row, ok=answer == "right" and row["agree"] in _AGREED)
    tell("ran on the GPU", f"{ran_on['gpu']} of {ran_on.total()}", ok=ran_on["gpu"] > 0)
    tell("fell back", counted(reasons))


def _why_not(resolution: pa.Resolution) -> str:
    if resolution.cause is not None:
        return f"{resolution.reason}: {told(resolution.cause)}"
    return "" if resolution.reason is None else resolution.message


def _agreement(support: pa.GpuSupport, resolution: pa.Resolution) -> str:
    """Compare the prediction with what happened; no prediction covers failures at run time."""
    if support.answer is pa.Support.UNKNOWN:
        return "unknown"
    predicted = support.answer is pa.Support.YES
    if resolution.reason not in (None, pa.Reason.UNSUPPORTED_QUERY):
        return "failed later" if predicted else "NO"
    return "yes" if predicted is (resolution.name == "gpu") else "NO"


async def stall(settings: Settings, _gpu: SimulatedGpu | None) -> None:
    """Measure how long the loop is held up while queries run on the GPU, and on the CPU."""
    queries = queries_of(settings)
    async with pa.Collector(gpu="offload") as collector:

        async def longest(what: str, busy: Callable[[], Awaitable[int | None]]) -> None:
            begun = time.perf_counter()
            async with StallMeter() as meter:
                on_gpu = await busy()
            row = {
                "meanwhile": what,
                "ran on the GPU": "" if on_gpu is None else f"{on_gpu} of {len(queries)}",
                "s": round(time.perf_counter() - begun, 2),
                "longest stall, ms": round(1000 * meter.longest, 1),
            }
            tell_row(row, ok=None if on_gpu is None else on_gpu > 0)

        async def on_gpu() -> int:
            close_breaker()
            handles = [await ended(collector, query, "gpu") for query in queries.values()]
            return sum(handle.resolution.name == "gpu" for handle in handles)

        async def in_memory() -> None:
            for query in queries.values():
                await ended(collector, query, "in-memory")

        await longest("nothing runs", lambda: asyncio.sleep(1))
        await longest("import of cudf_polars, first queries", on_gpu)
        for _ in range(_ROUNDS):
            await longest("queries on the GPU", on_gpu)
            await longest("queries on the in-memory engine", in_memory)
        await longest("nothing runs", lambda: asyncio.sleep(1))


async def speed(settings: Settings, _gpu: SimulatedGpu | None) -> None:
    """Measure each query on each engine."""
    queries = queries_of(settings)
    read(data.make(settings.scale, Path(settings.data)))
    end = time.monotonic() + 0.9 * settings.seconds
    longest = 0.0
    on_gpu: list[bool] = []
    async with pa.Collector(gpu="offload") as collector:
        # The GPU last: it may bind its threads, and those that these start, to some processors.
        for engine in reversed(_ENGINES):
            await collector.collect_async(grouped(frame(1000)), engine=engine)
        for number, query in queries.items():
            close_breaker()
            begun = time.monotonic()
            if begun + longest > end:
                left = ", ".join(f"q{each}" for each in queries if each >= number)
                tell("not measured", f"{left}: the time was over", skipped=True)
                break
            try:
                on_gpu.append(await _race(collector, number, query))
            except Exception as error:  # noqa: BLE001  # the other queries are measured all the same
                tell_row({"query": f"q{number}", "answer": f"raised {told(error)}"}, ok=False)
            longest = max(longest, time.monotonic() - begun)
    tell("ran on the GPU", f"{sum(on_gpu)} of {len(on_gpu)}", ok=any(on_gpu))


async def _race(collector: pa.Collector, number: int, query: pl.LazyFrame) -> bool:
    """Measure a query on each engine in turn; return whether the GPU ran all that it was to run."""
    seconds: dict[str, list[float]] = {engine: [] for engine in _ENGINES}
    answers: dict[str, pl.DataFrame] = {}
    ran_on: dict[str, set[str]] = {engine: set() for engine in _ENGINES}
    for turn in range(1 + _ROUNDS):
        for engine in _ENGINES[:: -1 if turn % 2 else 1]:
            begun = time.perf_counter()
            handle = await ended(collector, query, engine)
            answers[engine] = handle.result()
            seconds[engine].append(time.perf_counter() - begun)
            ran_on[engine].add(handle.resolution.name)
    warm = {engine: median(each[1:]) for engine, each in seconds.items()}
    answer = _compared(number, answers["gpu"], answers["in-memory"])
    row = {
        "query": f"q{number}",
        "ran on": "/".join(sorted(ran_on["gpu"])),
        "adaptive took": "/".join(sorted(ran_on["adaptive"])),
        FIRST: round(seconds["gpu"][0], 4),
        **{f"{engine} s": round(each, 4) for engine, each in warm.items()},
        **{f"{each} / gpu": round(warm[each] / warm["gpu"], 2) for each in _ENGINES[1:]},
        "answer": answer,
    }
    tell_row(row, ok=answer == "right")
    return ran_on["gpu"] == {"gpu"}


async def ended(
    collector: pa.Collector, query: pl.LazyFrame, engine: pa.EngineName
) -> pa.QueryHandle[pl.DataFrame]:
    """Return the handle of a query that has ended."""
    handle = collector.collect_async(query, engine=engine)
    await handle
    return handle


def close_breaker() -> None:
    """Let the next query try the GPU, whatever the queries before have done to it."""
    breaker.health = Health()


def queries_of(settings: Settings) -> dict[int, pl.LazyFrame]:
    """Return the queries of a check, by their numbers; their data is made if it is not there."""
    tables = data.tables(data.make(settings.scale, Path(settings.data)))
    return {number: QUERIES[number](tables) for number in settings.queries}


def _compared(number: int, answer: pl.DataFrame, expected: pl.DataFrame) -> str:
    if answer.schema != expected.schema:
        return f"{dict(answer.schema)} instead of {dict(expected.schema)}"
    return oracle.check(number, answer, expected) or "right"
