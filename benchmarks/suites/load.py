"""
A service under load: tiny queries beside heavy ones, memory, PDS-H at once, requests that go on.

The native contenders are two: as it is, and at its best, with a semaphore around it as a user would
put there: it lets as many queries in as polars-async does by default.
"""

from __future__ import annotations

import asyncio
import random
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import polars as pl

import polars_async as pa
from benchmarks.measure.workloads import frame, peak, rank, read
from benchmarks.pdsh import data
from benchmarks.pdsh.queries import QUERIES
from benchmarks.runner import NATIVE, OWN, THREADS, Case, Metric, Target

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence

    from benchmarks.runner import Options

    Submit = Callable[[pl.LazyFrame], Awaitable[pl.DataFrame]]
    Figures = dict[str, float]

LIMITED: Final = "native, semaphore"

_CONTENDERS: Final = (NATIVE, LIMITED, THREADS, OWN)
_INTERVAL: Final = 0.005
_HEAVY: Final = 8
_SORTS: Final = 64
_LATENCIES: Final = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
_BESIDE: Final = "tiny beside 8 heavy"
_BESIDE_AUTO: Final = f"{_BESIDE}, executor auto"
_SORTED: Final = "64 sorts at once"
_PDSH: Final = "22 PDS-H queries at once"
_SHARES: Final = (0.5, 0.8, 1.2)
_REQUEST_RUNS: Final = 3
_PATIENCE: Final = 30.0
"""Seconds that a request is waited for when no more come; its latency is then that at least."""


def cases(options: Options) -> list[Case]:
    """List the comparisons of this suite."""
    rows = 300_000 if options.quick else 6_000_000
    p6 = _beside_metrics(Target("P6", at_most=0.2), Target("P6", at_most=0.9))
    p6b = _beside_metrics(Target("P6b", at_most=0.02))
    pdsh = {"folder": str(data.make(options.scale, options.data).absolute())}
    sizes: tuple[tuple[str, Sequence[Metric], Mapping[str, object]], ...] = (
        (_BESIDE, p6, {"rows": rows}),
        (_SORTED, _memory_metrics("P7", 0.3), {"rows": rows // 3}),
        (_PDSH, _memory_metrics("P8", 0.6), pdsh),
    )
    found = [
        Case("load", name, _CONTENDERS, metrics, size, timeout=300) for name, metrics, size in sizes
    ]
    auto = {"rows": rows, "executor": "auto"}
    found.insert(1, Case("load", _BESIDE_AUTO, (NATIVE, OWN), p6b, auto, timeout=300))
    capacity = _capacity()
    seconds = 1 if options.quick else 5
    for share in _SHARES:
        metrics = [Metric(name, "ms") for name, _ in _LATENCIES]
        size = {"rate": round(share * capacity, 1), "seconds": seconds}
        name = f"requests at {share:g} of capacity"
        found.append(Case("load", name, _CONTENDERS, metrics, size, seconds + 90, _REQUEST_RUNS))
    return found


def run(
    case: str, contender: str, executor: Literal["threads", "auto"] = "threads", **size: Any
) -> Figures:
    """Measure one contender in one case, once."""
    if contender == OWN:
        pa.configure(executor=executor)
        if executor == "auto":
            size["shares"] = True
    return asyncio.run(_ROWS.get(case, _requests)(_submitter(contender), **size))


def _beside_metrics(p99: Target, finished: Target | None = None) -> list[Metric]:
    tiny = [
        Metric(f"tiny {name}", "ms", "lower", (p99,) if name == "p99" else ())
        for name, _ in _LATENCIES
    ]
    targets = () if finished is None else (finished,)
    return [*tiny, Metric("heavy finished", "s", "lower", targets)]


def _memory_metrics(row: str, most: float) -> tuple[Metric, Metric]:
    return (
        Metric("peak RSS", "MB", "lower", (Target(row, at_most=most),)),
        Metric("finished", "s", "lower", (Target(row, at_most=1),)),
    )


def _submitter(contender: str) -> Submit:
    if contender == OWN:
        return pa.collect_async
    if contender == NATIVE:
        return _native
    if contender == THREADS:
        return lambda lf: asyncio.to_thread(lf.collect, engine="in-memory")
    slots = asyncio.Semaphore(int(pa.default_collector().stats()["max_running"]))

    async def limited(lf: pl.LazyFrame) -> pl.DataFrame:
        async with slots:
            found: pl.DataFrame = await _native(lf)
            return found

    return limited


def _native(lf: pl.LazyFrame) -> Any:
    return lf.collect_async(engine="in-memory")


# Tiny beside heavy


async def _tiny_beside_heavy(submit: Submit, rows: int, *, shares: bool = False) -> Figures:
    source, small = frame(rows), frame(1000).collect()
    if shares:  # as one does with frames for worker processes
        source = pa.share(source.collect())
    heavy_queries = [_heavy(source, number) for number in range(_HEAVY)]
    await submit(_tiny(small, 0))  # starts the threads
    latencies: list[float] = []
    requests: list[asyncio.Task[None]] = []

    async def request(number: int, due: float) -> None:
        await submit(_tiny(small, number))
        latencies.append(time.perf_counter() - due)

    begun = time.perf_counter()
    heavy = _at_once(submit, heavy_queries)
    for number in count():
        # From the time a request was due, however late a loop that was held up sends it.
        due = begun + number * _INTERVAL
        if heavy.done() and due > max(heavy.result()):
            break
        await asyncio.sleep(due - time.perf_counter())
        requests.append(asyncio.create_task(request(number, due)))
    await asyncio.gather(*requests)
    figures = {f"tiny {name}": figure for name, figure in _latencies(latencies).items()}
    return {**figures, "heavy finished": max(heavy.result()) - begun}


def _heavy(source: pl.LazyFrame, number: int) -> pl.LazyFrame:
    # No two are equal, so that they share the source and nothing else.
    if number % 2:
        return source.sort(pl.col("left") + number)
    keys = pl.col("left") % (100_000 + number)
    return source.group_by(keys.alias("key")).agg(pl.col("right").sum(), pl.col("number").max())


def _tiny(small: pl.DataFrame, number: int) -> pl.LazyFrame:
    return small.lazy().filter(pl.col("left") > number % 1000).select(pl.col("right").sum())


def _latencies(seconds: list[float]) -> Figures:
    seconds.sort()
    return {name: rank(seconds, share) * 1000 for name, share in _LATENCIES}


# Memory


async def _sorts(submit: Submit, rows: int) -> Figures:
    source = frame(rows)
    return await _memory(
        submit,
        [
            source.sort(pl.col(("left", "right")[number % 2]) + number, descending=number % 4 < 2)
            for number in range(_SORTS)
        ],
    )


async def _pdsh(submit: Submit, folder: str) -> Figures:
    read(Path(folder))
    tables = data.tables(Path(folder))
    return await _memory(submit, [query(tables) for query in QUERIES.values()])


async def _memory(submit: Submit, queries: Iterable[pl.LazyFrame]) -> Figures:
    await submit(_tiny(frame(1000).collect(), 0))  # starts the threads
    begun = time.perf_counter()
    seconds = max(await _at_once(submit, queries)) - begun
    return {"finished": seconds, "peak RSS": peak()}


def _at_once(submit: Submit, queries: Iterable[pl.LazyFrame]) -> asyncio.Future[list[float]]:
    """Submit every query now; gives the times at which the results came, and were dropped."""
    return asyncio.gather(*[_arrival(submit(query)) for query in queries])


async def _arrival(handle: Awaitable[pl.DataFrame]) -> float:
    await handle
    return time.perf_counter()


# Requests that come whether or not the earlier ones were answered


def _mix(number: int = 500) -> list[pl.LazyFrame]:
    """Make what requests ask: nine tiny queries for each one that takes some milliseconds."""
    generator = random.Random(0)  # noqa: S311  # no secret, and the same for all
    small, source = frame(1000).collect(), frame(200_000)
    return [
        _tiny(small, each) if generator.random() < 0.9 else _heavy(source, 2 * each)
        for each in range(number)
    ]


def _capacity() -> float:
    """Find how many requests of the mix this machine answers in a second, one by one."""
    queries = _mix()
    for query in queries[:50]:
        query.collect(engine="in-memory")
    begun = time.perf_counter()
    for query in queries:
        query.collect(engine="in-memory")
    return len(queries) / (time.perf_counter() - begun)


async def _requests(submit: Submit, rate: float, seconds: float) -> Figures:
    queries = _mix()
    await submit(queries[0])
    generator = random.Random(1)  # noqa: S311  # as above
    latencies: list[float] = []
    tasks: set[asyncio.Task[None]] = set()

    async def request(query: pl.LazyFrame, due: float) -> None:
        try:
            await submit(query)
        finally:
            latencies.append(time.perf_counter() - due)

    due = begun = time.perf_counter()
    for number in count():
        due += generator.expovariate(rate)
        if due > begun + seconds:
            break
        await asyncio.sleep(due - time.perf_counter())
        tasks.add(asyncio.create_task(request(queries[number % len(queries)], due)))
    await asyncio.wait(tasks, timeout=_PATIENCE)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return _latencies(latencies)


_ROWS: Final[dict[str, Callable[..., Coroutine[Any, Any, Figures]]]] = {
    _BESIDE: _tiny_beside_heavy,
    _BESIDE_AUTO: _tiny_beside_heavy,
    _SORTED: _sorts,
    _PDSH: _pdsh,
}
