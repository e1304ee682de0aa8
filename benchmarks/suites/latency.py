"""What a query costs beside its work: round trip, fan-out, loop stall, resolution, import."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import timeit
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import gevent
import polars as pl
import trio

import polars_async as pa
from benchmarks.contenders import POLARS, POLARS_ASYNC, THREADS
from benchmarks.measure.stall import StallMeter
from benchmarks.measure.workloads import one_by_one, trivial
from benchmarks.runner import Case, Metric
from benchmarks.targets import targets

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from benchmarks.runner import Options

    Submit = Callable[[pl.LazyFrame], Any]

_LOOPS: Final = {
    "asyncio": (POLARS, POLARS_ASYNC, THREADS),
    "trio": (POLARS_ASYNC, THREADS),
    "gevent": (POLARS, POLARS_ASYNC, THREADS),
}
_ENGINES: Final = ("in-memory", "streaming")
_HAVE_TARGETS: Final = {("asyncio", "in-memory"), ("gevent", "in-memory"), ("asyncio", "streaming")}
_STALLS: Final = ("6 collect_async", "collect_all_async")
_HEAVY: Final = 6
_RESOLUTION: Final = "resolve_engine"
_IMPORT: Final = "polars_async"


def cases(options: Options) -> list[Case]:
    """Return the cases of this suite."""
    quick = options.quick
    trips = {"trips": 300 if quick else 1000, "fan": 1000 if quick else 3000}
    found = []
    for loop, contenders in _LOOPS.items():
        for engine in _ENGINES:
            names = ("tiny query, round trip", "tiny queries gathered")
            trip, fan = (
                targets(f"{name}, {loop}, {engine}") if (loop, engine) in _HAVE_TARGETS else {}
                for name in names
            )
            metrics = (
                Metric("round trip", "us", "lower", trip),
                Metric("gathered", "queries/s", "higher", fan),
            )
            found.append(Case("latency", f"tiny, {loop}, {engine}", contenders, metrics, trips))
    rows = {"rows": 600_000 if quick else 6_000_000}
    for loop in ("asyncio", "gevent"):
        for what in _STALLS:
            name = f"{what}, {loop}, in-memory"
            metric = Metric("longest stall", "ms", "lower", targets(f"longest stall, {name}"))
            found.append(Case("latency", name, (POLARS, POLARS_ASYNC), (metric,), rows))
    resolution = Metric("call", "us", "lower", targets("resolve_engine"))
    imports = Metric("import", "ms", "lower", targets("import of polars_async"))
    found.append(Case("latency", _RESOLUTION, (POLARS_ASYNC,), (resolution,)))
    found.append(Case("latency", _IMPORT, (POLARS_ASYNC,), (imports,)))
    return found


def run(case: str, contender: str, **size: int) -> dict[str, float]:
    """Measure one contender in one case, once."""
    if case == _RESOLUTION:
        return {"call": min(timeit.repeat(pa.resolve_engine, number=2000, repeat=5)) / 2000 * 1e6}
    if case == _IMPORT:
        return {"import": _import()}
    what, loop, *engine = case.split(", ")
    if what == "tiny":
        return _TINY[loop](_SUBMITS[loop, contender](engine[0]), **size)
    submit = _stalling(what, contender, gevent_=loop == "gevent", **size)
    return {"longest stall": (_green_stall if loop == "gevent" else _stall)(submit)}


# A trivial query


def _polars_async(engine: Any) -> Submit:
    return lambda lf: pa.collect_async(lf, engine=engine)


def _polars(engine: Any) -> Submit:
    return lambda lf: lf.collect_async(engine=engine)


def _to_thread(engine: Any) -> Submit:
    return lambda lf: asyncio.to_thread(lf.collect, engine=engine)


def _to_trio_thread(engine: Any) -> Submit:
    return lambda lf: trio.to_thread.run_sync(lambda: lf.collect(engine=engine))


def _polars_async_green(engine: Any) -> Submit:
    return lambda lf: pa.collect_async(lf, engine=engine, gevent=True)


def _polars_green(engine: Any) -> Submit:
    return lambda lf: lf.collect_async(engine=engine, gevent=True)


def _to_hub_thread(engine: Any) -> Submit:
    pool = gevent.get_hub().threadpool
    return lambda lf: pool.spawn(lf.collect, engine=engine)


_SUBMITS: Final[dict[tuple[str, str], Callable[[str], Submit]]] = {
    ("asyncio", POLARS_ASYNC): _polars_async,
    ("asyncio", POLARS): _polars,
    ("asyncio", THREADS): _to_thread,
    ("trio", POLARS_ASYNC): _polars_async,
    ("trio", THREADS): _to_trio_thread,
    ("gevent", POLARS_ASYNC): _polars_async_green,
    ("gevent", POLARS): _polars_green,
    ("gevent", THREADS): _to_hub_thread,
}


async def _tiny(
    submit: Submit, lf: pl.LazyFrame, trips: int, gathered: Callable[[], Coroutine[Any, Any, float]]
) -> dict[str, float]:
    await one_by_one(submit, lf, trips // 10)
    trip = await one_by_one(submit, lf, trips)
    await gathered()
    return {"round trip": trip * 1e6, "gathered": await gathered()}


def _asyncio(submit: Submit, trips: int, fan: int) -> dict[str, float]:
    lf = trivial()

    async def gathered() -> float:
        begun = time.perf_counter()
        await asyncio.gather(*(submit(lf) for _ in range(fan)))
        return fan / (time.perf_counter() - begun)

    return asyncio.run(_tiny(submit, lf, trips, gathered))


def _trio(submit: Submit, trips: int, fan: int) -> dict[str, float]:
    lf = trivial()

    async def collect() -> None:
        await submit(lf)

    async def gathered() -> float:
        begun = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(fan):
                nursery.start_soon(collect)
        return fan / (time.perf_counter() - begun)

    return trio.run(_tiny, submit, lf, trips, gathered)


def _gevent(submit: Submit, trips: int, fan: int) -> dict[str, float]:
    lf = trivial()

    def in_turn(number: int) -> float:
        begun = time.perf_counter()
        for _ in range(number):
            submit(lf).get()
        return (time.perf_counter() - begun) / number

    def gathered() -> float:
        begun = time.perf_counter()
        for handle in [submit(lf) for _ in range(fan)]:
            handle.get()
        return fan / (time.perf_counter() - begun)

    in_turn(trips // 10)
    trip = in_turn(trips)
    gathered()
    return {"round trip": trip * 1e6, "gathered": gathered()}


_TINY: Final = {"asyncio": _asyncio, "trio": _trio, "gevent": _gevent}


# The loop beside heavy queries


def _stalling(
    what: str, contender: str, *, gevent_: bool, rows: int
) -> Callable[[], Sequence[Any]]:
    keys = pl.int_range(rows, eager=True)
    frame = pl.LazyFrame({"key": keys % 1000, "value": keys})
    # Not equal, so that they share the source and nothing else.
    heavy = [frame.group_by("key").agg(pl.col("value").sum() + number) for number in range(_HEAVY)]
    green: dict[str, Any] = {"gevent": True} if gevent_ else {}
    one = pa.collect_async if contender == POLARS_ASYNC else pl.LazyFrame.collect_async
    several = pa.collect_all_async if contender == POLARS_ASYNC else pl.collect_all_async
    if what == "collect_all_async":
        return lambda: [several(heavy, engine="in-memory", **green)]
    return lambda: [one(lf, engine="in-memory", **green) for lf in heavy]


def _stall(submit: Callable[[], Sequence[Any]]) -> float:
    async def main() -> float:
        await asyncio.gather(*submit())  # starts the threads
        async with StallMeter() as meter:
            await asyncio.gather(*submit())
        return meter.longest * 1000

    return asyncio.run(main())


def _green_stall(submit: Callable[[], Sequence[Any]]) -> float:
    interval, longest, stopping = 0.001, 0.0, False

    def tick() -> None:
        nonlocal longest
        while not stopping:
            begun = time.monotonic()
            gevent.sleep(interval)
            longest = max(longest, time.monotonic() - begun - interval)

    for handle in submit():
        handle.get()
    ticker = gevent.spawn(tick)
    gevent.sleep(0)
    for handle in submit():
        handle.get()
    stopping = True
    ticker.join()
    return longest * 1000


def _import() -> float:
    code = (
        "import os, time, polars; before = len(os.listdir('/proc/self/task'))\n"
        "begun = time.perf_counter(); from polars_async import *; end = time.perf_counter()\n"
        "assert len(os.listdir('/proc/self/task')) == before, 'the import started a thread'\n"
        "print((end - begun) * 1000)"
    )
    with TemporaryDirectory() as folder:
        # With bytecode, as installed, wherever the sources lie.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", code],
                check=True,
                capture_output=True,
                text=True,
                env=environment,
            )
    return float(done.stdout)
