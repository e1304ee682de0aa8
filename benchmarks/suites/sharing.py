"""Work that is done once: equal queries at once, and what it costs those that have no equal."""

from __future__ import annotations

import asyncio
import time
from itertools import count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import polars as pl

import polars_async as pa
from benchmarks.contenders import CPU_ENGINES, POLARS_ASYNC, POLARS_ASYNC_ONE
from benchmarks.measure.workloads import frame
from benchmarks.runner import Case, Metric
from benchmarks.targets import targets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.runner import Options

_EQUAL: Final = 100
_AT_ONCE: Final = f"{_EQUAL} equal heavy queries at once"
_ADDED: Final = "added to a query without an equal"
_SOURCES: Final = ("frame", "file")
_TURNS: Final = 40
_TRIPS: Final = 50
_numbers: Final = count()


def cases(options: Options) -> list[Case]:
    """Return the cases of this suite."""
    rows = 300_000 if options.quick else 6_000_000
    size = {"path": str(_file(options.data, rows).absolute())}
    found = []
    for engine in CPU_ENGINES:
        name = f"{_AT_ONCE}, {engine}"
        metric = Metric("finished", "s", "lower", targets(name))
        found.append(Case("sharing", name, (POLARS_ASYNC, POLARS_ASYNC_ONE), (metric,), size))
    for source in _SOURCES:
        name = f"{_ADDED}, {source}, in-memory"
        metric = Metric("added", "us", "lower", targets(name))
        found.append(Case("sharing", name, (POLARS_ASYNC,), (metric,), size))
    return found


def run(case: str, contender: str, path: str) -> Mapping[str, float]:
    """Measure one contender in one case, once."""
    what, *source, engine = case.split(", ")
    if what == _ADDED:
        return {"added": asyncio.run(_added(source[0], path)) * 1e6}
    number = _EQUAL if contender == POLARS_ASYNC else 1
    return {"finished": asyncio.run(_finished(number, path, engine))}


def _file(folder: Path, rows: int) -> Path:
    """Return a file that all runs read; its time of change is long ago for the last of them."""
    path = folder / f"numbers-{rows}.parquet"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        frame(rows).sink_parquet(path)
        time.sleep(0.1)
    return path


def _heavy(path: str) -> pl.LazyFrame:
    group = pl.col("left") % 1000
    lf = pl.scan_parquet(path)
    return lf.group_by(group).agg(pl.col("right").mean(), pl.col("number").median()).sort("left")


async def _finished(number: int, path: str, engine: Any) -> float:
    """Return the seconds until so many equal queries are done, the median of some times."""
    async with pa.Collector(engine=engine, single_flight=True) as collector:
        await collector.collect_async(_heavy(path))
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            queries = [collector.collect_async(_heavy(path)) for _ in range(number)]
            await asyncio.gather(*queries)
            times.append(time.perf_counter() - begun)
    return median(times)


async def _added(source: str, path: str) -> float:
    """Return how many seconds a tiny query takes longer where it might share a run."""
    make = _tiny_of_frame if source == "frame" else _tiny_of_file(Path(path).with_suffix(".tiny"))
    with (
        pa.Collector(engine="in-memory", inline=0) as off,
        pa.Collector(engine="in-memory", inline=0, single_flight=True) as on,
    ):
        # In turns, and the quickest of each: what disturbs the machine lasts longer than a turn.
        turns = [(await _trip(off, make), await _trip(on, make)) for _ in range(_TURNS)]
    return min(with_it for _, with_it in turns) - min(without for without, _ in turns)


async def _trip(collector: pa.Collector, make: Callable[[], pl.LazyFrame]) -> float:
    frames = [make() for _ in range(_TRIPS)]
    begun = time.perf_counter()
    for each in frames:
        await collector.collect_async(each)
    return (time.perf_counter() - begun) / _TRIPS


def _tiny_of_frame() -> pl.LazyFrame:
    return pl.LazyFrame({"a": [1, 2, 3]}).select(pl.col("a").sum() + next(_numbers))


def _tiny_of_file(path: Path) -> Callable[[], pl.LazyFrame]:
    if not path.exists():
        pl.DataFrame({"a": [1, 2, 3]}).write_parquet(path)
        time.sleep(0.1)
    return lambda: pl.scan_parquet(path).select(pl.col("a").sum() + next(_numbers))
