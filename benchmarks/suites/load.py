"""
A service under load: tiny queries beside heavy ones, memory, PDS-H at once, steady requests.

Polars' own takes part twice: as it is, and with a semaphore around it, as a user would put there.
The mix of five sizes is served by every contender on both engines, at the same rate.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from functools import cache, partial
from itertools import count, cycle, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import polars as pl

import polars_async as pa
from benchmarks.contenders import (
    ADAPTIVE,
    CPU_ENGINES,
    DEFAULT_ENGINE,
    POLARS,
    POLARS_ASYNC,
    POLARS_SEMAPHORE,
    THREADS,
    THREADS_SEMAPHORE,
    on,
)
from benchmarks.measure import mix
from benchmarks.measure.open_loop import latencies, moments
from benchmarks.measure.workloads import frame, peak, quantile, read
from benchmarks.pdsh import data
from benchmarks.pdsh.queries import QUERIES
from benchmarks.runner import Case, Metric
from benchmarks.targets import targets

if TYPE_CHECKING:
    from collections.abc import (
        Awaitable,
        Callable,
        Coroutine,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from benchmarks.measure.open_loop import Submit
    from benchmarks.runner import Options
    from benchmarks.targets import Target

    Figures = dict[str, float]

_CONTENDERS: Final = (POLARS, POLARS_SEMAPHORE, THREADS, POLARS_ASYNC)
_INTERVAL: Final = 0.005
_HEAVY: Final = 8
_SORTS: Final = 64
_LATENCIES: Final = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
_BESIDE: Final = "tiny beside 8 heavy, in-memory"
_BESIDE_AUTO: Final = "tiny beside 8 heavy, executor auto, in-memory"
_BESIDE_ADAPTIVE: Final = "tiny beside 8 heavy, each engine"
_PDSH_ADAPTIVE: Final = "22 PDS-H queries at once, each engine"
_SORTED: Final = "64 sorts at once, in-memory"
_PDSH: Final = "22 PDS-H queries at once, in-memory"
_LOAD_FACTORS: Final = (0.5, 0.8, 1.2)
_REQUEST_RUNS: Final = 3
_MIX: Final = "mix of five sizes"
_ON: Final = {
    on(who, engine): (who, engine)
    for engine in CPU_ENGINES
    for who in (POLARS, THREADS_SEMAPHORE, POLARS_ASYNC)
} | {on(POLARS_ASYNC, ADAPTIVE): (POLARS_ASYNC, ADAPTIVE)}
"""The contenders for the mix."""
_ADAPTIVE_BESIDE: Final = (
    *(on(POLARS, engine) for engine in CPU_ENGINES),
    on(POLARS_ASYNC, ADAPTIVE),
)
_MIX_FACTORS: Final = (0.5, 0.7, 0.9)
_MIX_CAPACITY: Final = "capacity for the mix"
"""No case of the suite: measured in a process of its own, whose memory no contender inherits."""
_SLOTS: Final = min(5, max(3, 1 + (os.cpu_count() or 1)))
"""How many queries a semaphore lets in."""
_ROOT: Final = Path(__file__).parents[2]


def cases(options: Options) -> list[Case]:
    """Return the cases of this suite."""
    rows = 300_000 if options.quick else 6_000_000
    beside = _beside_metrics("tiny p99 beside heavy", "heavy finished beside tiny")
    beside_auto = _beside_metrics("tiny p99 beside heavy, executor auto")
    pdsh = {"folder": str(data.make(options.scale, options.data).absolute())}
    sizes: tuple[tuple[str, Sequence[Metric], Mapping[str, object]], ...] = (
        (_BESIDE, beside, {"rows": rows}),
        (_SORTED, _memory_metrics("64 sorts at once"), {"rows": rows // 3}),
        (_PDSH, _memory_metrics("PDS-H at once"), pdsh),
    )
    found = [
        Case("load", name, _CONTENDERS, metrics, size, timeout=300) for name, metrics, size in sizes
    ]
    auto = {"rows": rows, "executor": "auto"}
    pair = (POLARS, POLARS_ASYNC)
    found.insert(1, Case("load", _BESIDE_AUTO, pair, beside_auto, auto, timeout=300))
    found += _adaptive_cases(rows, pdsh)
    capacity = _capacity()
    seconds = 1 if options.quick else 5
    for factor in _LOAD_FACTORS:
        metrics = [Metric(name, "ms") for name, _ in _LATENCIES]
        size = {"rate": round(factor * capacity, 1), "seconds": seconds}
        name = f"requests at {factor:g} of capacity, in-memory"
        found.append(Case("load", name, _CONTENDERS, metrics, size, seconds + 90, _REQUEST_RUNS))
    return [*found, *_mix_cases(quick=options.quick)]


def _mix_cases(*, quick: bool) -> Iterator[Case]:
    scale, requests = (0.1, 300) if quick else (1, 600)
    capacity = _mix_capacity(scale)
    for factor in _MIX_FACTORS:
        rate = round(factor * capacity, 1)
        size = {"rate": rate, "requests": requests, "scale": scale}
        name = f"{_MIX} at {factor:g} of capacity"
        timeout = requests / rate + 90
        yield Case("load", name, tuple(_ON), _mix_metrics(), size, timeout, _REQUEST_RUNS)


def _mix_metrics() -> list[Metric]:
    slowdown, p50 = (
        targets(*(f"mix, {what}, {engine}" for what in names for engine in CPU_ENGINES))
        for names in (
            ("mean slowdown",),
            ("p50 of each size", f"p50 of each size beside {THREADS_SEMAPHORE}"),
        )
    )
    slowdown |= _targets_of_adaptive("mix, mean slowdown")
    return [
        Metric("mean slowdown", "times alone", "lower", slowdown),
        *(
            Metric(f"{name} of {size}", "ms", "lower", p50 if name == "p50" else {})
            for size in mix.SIZES
            for name, _ in mix.PARTS
        ),
    ]


@cache
def _mix_capacity(scale: float) -> float:
    size = json.dumps({"scale": scale})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure.run_one", "load", _MIX_CAPACITY, POLARS, size],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
    )
    return float(json.loads(done.stdout)["capacity"])


def run(
    case: str, contender: str, executor: Literal["threads", "auto"] = "threads", **size: Any
) -> Figures:
    """Measure one contender in one case, once."""
    if case == _MIX_CAPACITY:
        return {"capacity": mix.capacity(**size)}
    who, engine = _ON.get(contender, (contender, "in-memory"))
    if case.startswith(_MIX):
        submit = _submitter(who, None if contender == on(POLARS, DEFAULT_ENGINE) else engine)
        engines = CPU_ENGINES if engine == ADAPTIVE else (engine,)
        return asyncio.run(mix.serve(submit, engines, **size))
    if who == POLARS_ASYNC:
        pa.configure(executor=executor)
        if executor == "auto":
            size["share"] = True
    return asyncio.run(_CASES.get(case, _requests)(_submitter(who, engine), **size))


def _adaptive_cases(rows: int, pdsh: Mapping[str, object]) -> Iterator[Case]:
    """Yield the cases in which the engine that is chosen runs beside each of Polars' own."""
    beside = [
        *(Metric(f"tiny {name}", "ms", "lower") for name, _ in _LATENCIES if name != "p99"),
        Metric("tiny p99", "ms", "lower", _targets_of_adaptive("beside, tiny p99")),
        Metric("heavy finished", "s", "lower", _targets_of_adaptive("beside, heavy finished")),
    ]
    memory = [
        Metric("peak RSS", "MB", "lower", _targets_of_adaptive("PDS-H, peak RSS")),
        Metric("finished", "s", "lower", _targets_of_adaptive("PDS-H, finished")),
    ]
    cases = (_BESIDE_ADAPTIVE, beside, {"rows": rows}), (_PDSH_ADAPTIVE, memory, pdsh)
    for name, metrics, size in cases:
        yield Case("load", name, _ADAPTIVE_BESIDE, metrics, size, timeout=300)


def _targets_of_adaptive(what: str) -> dict[str, Target]:
    return targets(*(f"adaptive, {what} beside {engine}" for engine in CPU_ENGINES))


def _beside_metrics(p99: str, *finished: str) -> list[Metric]:
    tiny = [
        Metric(f"tiny {name}", "ms", "lower", _targets_in_memory(p99) if name == "p99" else {})
        for name, _ in _LATENCIES
    ]
    return [*tiny, Metric("heavy finished", "s", "lower", _targets_in_memory(*finished))]


def _memory_metrics(what: str) -> list[Metric]:
    return [
        Metric(name, unit, "lower", _targets_in_memory(f"{what}, {name}"))
        for name, unit in (("peak RSS", "MB"), ("finished", "s"))
    ]


def _targets_in_memory(*names: str) -> Mapping[str, Target]:
    return targets(*(f"{name}, in-memory" for name in names))


def _submitter(who: str, engine: Any) -> Submit:
    """Return how `who` runs queries on `engine`; None for the default engine of Polars' own."""
    asked = {} if engine is None else {"engine": engine}
    if who == POLARS_ASYNC:
        return partial(pa.collect_async, **asked)
    collect = _polars if who in (POLARS, POLARS_SEMAPHORE) else _in_thread
    submit: Submit = partial(collect, **asked)
    return _limited(submit) if who in (POLARS_SEMAPHORE, THREADS_SEMAPHORE) else submit


def _polars(lf: pl.LazyFrame, **asked: Any) -> Any:
    return lf.collect_async(**asked)


def _in_thread(lf: pl.LazyFrame, **asked: Any) -> Any:
    return asyncio.to_thread(partial(lf.collect, **asked))


def _limited(submit: Submit) -> Submit:
    slots = asyncio.Semaphore(_SLOTS)

    async def limited(lf: pl.LazyFrame) -> pl.DataFrame:
        async with slots:
            return await submit(lf)

    return limited


# Tiny beside heavy


async def _tiny_beside_heavy(submit: Submit, rows: int, *, share: bool = False) -> Figures:
    source, small = frame(rows), frame(1000).collect()
    if share:  # as users do with frames for worker processes
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
        # Latencies count from here, even if a loop that is held up sends the request late.
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
    return {name: quantile(seconds, part) * 1000 for name, part in _LATENCIES}


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
    """Submit every query now; return the times at which the results came, and were dropped."""
    return asyncio.gather(*[_arrival(submit(query)) for query in queries])


async def _arrival(handle: Awaitable[pl.DataFrame]) -> float:
    await handle
    return time.perf_counter()


# Requests that come at a steady rate, whether or not the earlier ones were answered


def _mix(number: int = 500) -> list[pl.LazyFrame]:
    """Return the queries of the requests: nine tiny ones for each that takes some milliseconds."""
    generator = random.Random(0)  # noqa: S311  # no secret, and the same for all
    small, source = frame(1000).collect(), frame(200_000)
    return [
        _tiny(small, each) if generator.random() < 0.9 else _heavy(source, 2 * each)
        for each in range(number)
    ]


def _capacity() -> float:
    """Return how many queries of the mix this machine answers in a second, one by one."""
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
    due = takewhile(lambda moment: moment <= seconds, moments(rate))
    return _latencies(await latencies(submit, zip(due, cycle(queries), strict=False)))


_CASES: Final[dict[str, Callable[..., Coroutine[Any, Any, Figures]]]] = {
    _BESIDE: _tiny_beside_heavy,
    _BESIDE_AUTO: _tiny_beside_heavy,
    _BESIDE_ADAPTIVE: _tiny_beside_heavy,
    _SORTED: _sorts,
    _PDSH: _pdsh,
    _PDSH_ADAPTIVE: _pdsh,
}
