"""
The 22 PDS-H queries on each engine: one at a time, and all at once.

Every answer is compared with that of the in-memory engine, which `ci/demo` compares with DuckDB.
The GPU takes part if it is usable. Queries that ran on another engine than the one asked for are
counted, as their resolutions tell.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import polars_async as pa
from benchmarks.measure.workloads import peak, read
from benchmarks.pdsh import data, oracle
from benchmarks.pdsh.queries import QUERIES
from benchmarks.runner import Case, Metric, NotRun

if TYPE_CHECKING:
    from benchmarks.runner import Options

_ONE_AT_A_TIME: Final = "22 PDS-H queries, one at a time"
_AT_ONCE: Final = "22 PDS-H queries, all at once"
_COUNTS: Final = (Metric("wrong answers", "of 22"), Metric("on another engine", "of 22"))


def cases(options: Options) -> list[Case]:
    """Return the cases of this suite."""
    engines = options.engines
    size = {"folder": str(data.make(options.scale, options.data).absolute())}
    status = pa.gpu_status()
    usable = [engine for engine in engines if engine != "gpu" or status.usable]
    not_run = [NotRun("gpu", status.message)] if "gpu" in engines and not status.usable else []
    total = (Metric("total", "s"), Metric("peak RSS", "MB"), *_COUNTS)
    each = tuple(Metric(f"query {number}", "ms") for number in QUERIES)
    return [
        Case("engines", _ONE_AT_A_TIME, usable, (*total, *each), size, 600, not_run=not_run),
        Case("engines", _AT_ONCE, usable, total, size, 600, not_run=not_run),
    ]


def run(case: str, contender: str, folder: str) -> dict[str, float]:
    """Measure one engine in one case, once."""
    read(Path(folder))
    tables = data.tables(Path(folder))
    queries = {number: query(tables) for number, query in QUERIES.items()}
    collector = pa.Collector(gpu="offload")
    seconds: dict[int, float] = {}
    handles: dict[int, pa.QueryHandle[Any]] = {}

    async def one_at_a_time() -> None:
        for number, query in queries.items():
            begun = time.perf_counter()
            handles[number] = collector.collect_async(query, engine=contender)
            await handles[number]
            seconds[number] = time.perf_counter() - begun

    async def at_once() -> None:
        for number, query in queries.items():
            handles[number] = collector.collect_async(query, engine=contender)
        await asyncio.gather(*handles.values())

    collector.collect_async(queries[6], engine=contender).result()  # starts the threads
    begun = time.perf_counter()
    asyncio.run(at_once() if case == _AT_ONCE else one_at_a_time())
    found = {"total": time.perf_counter() - begun, "peak RSS": peak()}
    answers = {number: handle.result() for number, handle in handles.items()}
    found["on another engine"] = sum(
        handle.resolution.name != contender for handle in handles.values()
    )
    found["wrong answers"] = sum(
        oracle.check(number, answer, queries[number].collect(engine="in-memory")) is not None
        for number, answer in answers.items()
    )
    return found | {f"query {number}": each * 1000 for number, each in seconds.items()}
