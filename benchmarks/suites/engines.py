"""
The 22 PDS-H queries on each engine: one at a time, and all at once.

One at a time, each has a process of its own, as `polars-async compare` measures queries. Every
answer is compared with that of the in-memory engine, which `ci/demo` compares with DuckDB. The GPU
takes part if it is usable. Queries that ran on another engine than the one asked for are counted,
as their resolutions tell.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import polars_async as pa
from benchmarks.measure.workloads import peak, read
from benchmarks.pdsh import data, oracle
from benchmarks.pdsh.queries import QUERIES
from benchmarks.runner import Case, Metric, NotRun
from polars_async.compare.contest import measure
from polars_async.compare.entries import Contender, Query
from polars_async.resolution import engine_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    import polars as pl

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
    return (_at_once if case == _AT_ONCE else _one_at_a_time)(queries, contender)


def _one_at_a_time(queries: Mapping[int, pl.LazyFrame], contender: str) -> dict[str, float]:
    answers: dict[int, pl.DataFrame] = {}
    runs: dict[int, pa.EngineRun] = {}
    engine = engine_name(contender)
    for number, lf in queries.items():
        found, answer = measure(Query(f"q{number}", lf), Contender(contender, engine), runs=1)
        if answer is None:
            raise RuntimeError(f"query {number} has no answer: {found.message}")
        runs[number], answers[number] = found, answer
    seconds = {number: each.seconds[0] for number, each in runs.items()}
    others = sum(each.ran_on != contender for each in runs.values())
    most = max(each.peak_memory or 0 for each in runs.values()) / 1e6
    return {
        "total": sum(seconds.values()),
        "peak RSS": most,
        **_counts(queries, answers, others),
        **{f"query {number}": each * 1000 for number, each in seconds.items()},
    }


def _at_once(queries: Mapping[int, pl.LazyFrame], contender: str) -> dict[str, float]:
    collector = pa.Collector(gpu="offload")
    engine = engine_name(contender)
    handles: dict[int, pa.QueryHandle[pl.DataFrame]] = {}

    async def collect() -> None:
        for number, query in queries.items():
            handles[number] = collector.collect_async(query, engine=engine)
        await asyncio.gather(*handles.values())

    collector.collect_async(queries[6], engine=engine).result()  # starts the threads
    begun = time.perf_counter()
    asyncio.run(collect())
    found = {"total": time.perf_counter() - begun, "peak RSS": peak()}
    answers = {number: handle.result() for number, handle in handles.items()}
    others = sum(handle.resolution.name != contender for handle in handles.values())
    return found | _counts(queries, answers, others)


def _counts(
    queries: Mapping[int, pl.LazyFrame], answers: Mapping[int, pl.DataFrame], others: int
) -> dict[str, float]:
    wrong = sum(
        oracle.check(number, answer, queries[number].collect(engine="in-memory")) is not None
        for number, answer in answers.items()
    )
    return {"wrong answers": wrong, "on another engine": others}
