"""What a query costs beside its work: round trip, fan-out, loop stall, resolution, import."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import timeit
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import gevent
import polars as pl
import trio
import uvloop

import polars_async as pa
from benchmarks.contenders import (
    ADAPTIVE,
    CPU_ENGINES,
    DEFAULT_ENGINE,
    HAS_INLINE,
    POLARS,
    POLARS_ASYNC,
    POLARS_ASYNC_NOT_INLINE,
    THREADS,
    on,
)
from benchmarks.measure.stall import StallMeter
from benchmarks.measure.workloads import one_by_one, trivial
from benchmarks.runner import Case, Metric
from benchmarks.targets import TARGETS, targets

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from benchmarks.runner import Options
    from benchmarks.targets import Target

    Submit = Callable[[pl.LazyFrame], Any]

_UVLOOP: Final = "asyncio (uvloop)"
_LOOPS: Final = {
    "asyncio": (POLARS, POLARS_ASYNC, THREADS),
    _UVLOOP: (POLARS, POLARS_ASYNC, THREADS),
    "trio": (POLARS_ASYNC, THREADS),
    "gevent": (POLARS, POLARS_ASYNC, THREADS),
}
_NOT_INLINE: Final = (POLARS_ASYNC_NOT_INLINE,) if HAS_INLINE else ()
_TOGETHER: Final = "collect_all_async"
_BESIDE_HEAVY: Final = "tiny beside 6 heavy"
_BESIDE_EAGER: Final = "tiny beside eager work"
"""Of another thread, as in a service that does some of its work without this library."""
_STALLS: Final = {
    "6 collect_async": (POLARS, POLARS_ASYNC),
    _TOGETHER: (POLARS, POLARS_ASYNC),
    _BESIDE_HEAVY: (POLARS, POLARS_ASYNC, *_NOT_INLINE),
    _BESIDE_EAGER: (POLARS, POLARS_ASYNC, *_NOT_INLINE),
}
_HEAVY: Final = 6
_KNOWN: Final = 50
"""How often the tiny query runs before: often enough to be known as one."""
_BY_DEFAULT: Final = "tiny, asyncio, each engine"
_DEFAULT: Final = on(POLARS, DEFAULT_ENGINE)
_ADAPTIVE: Final = on(POLARS_ASYNC, ADAPTIVE)
_RESOLUTION: Final = "resolve_engine"
_IMPORT: Final = "polars_async"


def cases(options: Options) -> list[Case]:
    """Return the cases of this suite."""
    quick = options.quick
    trips = {"trips": 300 if quick else 1000, "fan": 1000 if quick else 3000}
    found = []
    for loop, contenders in _LOOPS.items():
        for engine in CPU_ENGINES:
            metrics = (
                Metric(
                    "round trip", "us", "lower", _targets("tiny query, round trip", loop, engine)
                ),
                Metric(
                    "gathered",
                    "queries/s",
                    "higher",
                    _targets("tiny queries gathered", loop, engine),
                ),
            )
            name = f"tiny, {loop}, {engine}"
            found.append(Case("latency", name, (*contenders, *_NOT_INLINE), metrics, trips))
    found.append(_adaptive_case(trips))
    rows = {"rows": 600_000 if quick else 6_000_000}
    for loop in ("asyncio", "gevent"):
        for what, contenders in _STALLS.items():
            goals = _targets(f"longest stall, {what}", loop, "in-memory")
            metric = Metric("longest stall", "ms", "lower", goals)
            name = f"{what}, {loop}, in-memory"
            found.append(Case("latency", name, contenders, (metric,), rows))
    resolution = Metric("call", "us", "lower", targets("resolve_engine"))
    imports = Metric("import", "ms", "lower", targets("import of polars_async"))
    found.append(Case("latency", _RESOLUTION, (POLARS_ASYNC,), (resolution,)))
    found.append(Case("latency", _IMPORT, (POLARS_ASYNC,), (imports,)))
    return found


def _adaptive_case(trips: Mapping[str, object]) -> Case:
    """Return the case in which the engine that is chosen runs beside the default of Polars' own."""
    trip = targets("tiny query, round trip, asyncio, adaptive")
    metrics = (
        Metric("round trip", "us", "lower", trip),
        Metric("gathered", "queries/s", "higher"),
    )
    return Case("latency", _BY_DEFAULT, (_DEFAULT, _ADAPTIVE), metrics, trips)


def _targets(what: str, loop: str, engine: str) -> Mapping[str, Target]:
    names = f"{what}, {loop}, {engine}", f"{what}, {loop}, inline=0, {engine}"
    return targets(*(name for name in names if name in TARGETS))


def run(case: str, contender: str, **size: int) -> dict[str, float]:
    """Measure one contender in one case, once."""
    if contender == POLARS_ASYNC_NOT_INLINE:
        configure: Any = pa.configure
        configure(inline=0)
        contender = POLARS_ASYNC
    if case == _RESOLUTION:
        return {"call": min(timeit.repeat(pa.resolve_engine, number=2000, repeat=5)) / 2000 * 1e6}
    if case == _IMPORT:
        return {"import": _import()}
    what, loop, *engine = case.split(", ")
    if case == _BY_DEFAULT:
        contender, engine = {_DEFAULT: (POLARS, ["auto"]), _ADAPTIVE: (POLARS_ASYNC, [ADAPTIVE])}[
            contender
        ]
    if what == "tiny":
        return _TINY[loop](_SUBMITS[loop, contender](engine[0]), **size)
    stall = _green_stall if loop == "gevent" else _stall
    return {"longest stall": stall(what, contender, **size) * 1000}


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
    (_UVLOOP, POLARS_ASYNC): _polars_async,
    (_UVLOOP, POLARS): _polars,
    (_UVLOOP, THREADS): _to_thread,
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


def _asyncio(
    submit: Submit,
    trips: int,
    fan: int,
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> dict[str, float]:
    lf = trivial()

    async def gathered() -> float:
        begun = time.perf_counter()
        await asyncio.gather(*(submit(lf) for _ in range(fan)))
        return fan / (time.perf_counter() - begun)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(_tiny(submit, lf, trips, gathered))


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


_TINY: Final[dict[str, Callable[..., dict[str, float]]]] = {
    "asyncio": _asyncio,
    _UVLOOP: partial(_asyncio, new_loop=uvloop.new_event_loop),
    "trio": _trio,
    "gevent": _gevent,
}


# The loop beside heavy work


def _heavy(rows: int) -> list[pl.LazyFrame]:
    keys = pl.int_range(rows, eager=True)
    frame = pl.LazyFrame({"key": keys % 1000, "value": keys})
    # Not equal, so that they share the source and nothing else.
    return [frame.group_by("key").agg(pl.col("value").sum() + each) for each in range(_HEAVY)]


def _submits(
    contender: str, **green: bool
) -> tuple[Submit, Callable[[Sequence[pl.LazyFrame]], Any]]:
    """Return what submits one query, and what submits several as one."""
    options: dict[str, Any] = {"engine": "in-memory", **green}
    if contender == POLARS_ASYNC:
        return partial(pa.collect_async, **options), partial(pa.collect_all_async, **options)
    return partial(pl.LazyFrame.collect_async, **options), partial(pl.collect_all_async, **options)


def _collect_each(queries: Sequence[pl.LazyFrame]) -> None:
    for query in queries:
        query.collect(engine="in-memory")


def _stall(what: str, contender: str, rows: int) -> float:
    """Return the seconds of the longest stall of an asyncio loop."""
    heavy, tiny = _heavy(rows), trivial()
    submit, submit_all = _submits(contender)

    async def work() -> None:
        busy: asyncio.Future[Any]
        if what == _BESIDE_EAGER:
            busy = asyncio.ensure_future(asyncio.to_thread(_collect_each, heavy))
        else:
            handles = [submit_all(heavy)] if what == _TOGETHER else [submit(lf) for lf in heavy]
            busy = asyncio.gather(*handles)
        while what in (_BESIDE_HEAVY, _BESIDE_EAGER) and not busy.done():
            await submit(tiny)
        await busy

    async def main() -> float:
        await one_by_one(submit, tiny, _KNOWN)
        await work()  # starts the threads
        async with StallMeter() as meter:
            await work()
        return meter.longest

    return asyncio.run(main())


def _green_stall(what: str, contender: str, rows: int) -> float:
    """Return the seconds of the longest stall of a gevent hub."""
    heavy, tiny = _heavy(rows), trivial()
    submit, submit_all = _submits(contender, gevent=True)
    interval, longest, stopping = 0.001, 0.0, False

    def work() -> None:
        if what == _BESIDE_EAGER:
            busy = [gevent.get_hub().threadpool.spawn(_collect_each, heavy)]
        else:
            handles = [submit_all(heavy)] if what == _TOGETHER else [submit(lf) for lf in heavy]
            busy = [gevent.spawn(handle.get) for handle in handles]
        while what in (_BESIDE_HEAVY, _BESIDE_EAGER) and not all(each.ready() for each in busy):
            submit(tiny).get()
        for each in busy:
            each.get()

    def tick() -> None:
        nonlocal longest
        while not stopping:
            begun = time.monotonic()
            gevent.sleep(interval)
            longest = max(longest, time.monotonic() - begun - interval)

    for _ in range(_KNOWN):
        submit(tiny).get()
    work()
    ticker = gevent.spawn(tick)
    gevent.sleep(0)
    work()
    stopping = True
    ticker.join()
    return longest


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
