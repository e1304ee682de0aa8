"""
Queries in worker processes: cancelled, tiny, many at once, and with processes killed under them.

After a cancellation, the time counts until the worker is idle or gone, and this process is idle: it
may have been about to send the query. The start of the next worker does not count. Polars' own runs
in this process alone, and is idle once its threads are.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import uuid4

import polars as pl

import polars_async as pa
from benchmarks.contenders import DASK, POLARS, POLARS_ASYNC, POLARS_ASYNC_THREADS
from benchmarks.measure.idle import children, seconds_until_idle
from benchmarks.measure.workloads import frame, one_by_one, quantile, read, trivial
from benchmarks.pdsh import data
from benchmarks.pdsh.queries import QUERIES
from benchmarks.runner import Case, Metric
from benchmarks.targets import targets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    from benchmarks.runner import Options

    Figures = dict[str, float]
    Engine = Literal["in-memory", "streaming"]
    Submit = Callable[[pl.LazyFrame, Engine], Awaitable[pl.DataFrame]]

_STOP: Final = "cancelled at random moments, in-memory and streaming"
_TRIP: Final = "tiny query, warm worker"
_PDSH: Final = "22 PDS-H queries at once"
_WORKERS: Final = "workers killed"
_PARENTS: Final = "parents killed"
_ENGINES: Final[tuple[Engine, ...]] = ("in-memory", "streaming")
_GROUPS: Final = 0
"""Stands for the group_by among the numbers of the PDS-H queries."""
_RUNS: Final = 3
_POOL: Final = 3
_PATIENCE: Final = 20.0
"""Seconds to wait; all that is waited for takes less than two."""
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # it is only read
_MARK: Final = "POLARS_ASYNC_BENCHMARK"
_PROGRAM: Final = (
    "import sys; from benchmarks.suites import processes; processes.serve(*sys.argv[1:])"
)
_ROOT: Final = Path(__file__).parents[2]


def cases(options: Options) -> list[Case]:
    """Return the cases of this suite."""
    quick = options.quick
    folder = str(data.make(options.scale, options.data).absolute())
    queries = [_GROUPS, *QUERIES][:: 6 if quick else 1]
    number = 1 if quick else 3
    stop = {
        "folder": folder,
        "queries": queries,
        "rows": 600_000 if quick else 6_000_000,
        "number": number,
    }
    stops = len(_ENGINES) * len(queries) * number
    cancelled = "cancelled query in a process"
    idle = (
        Metric("until idle, p50", "ms", "lower", targets(f"{cancelled}, until idle, p50")),
        Metric("until idle, p99", "ms", "lower", targets(f"{cancelled}, until idle, p99")),
        Metric("until idle, max", "ms"),
        Metric("workers killed", f"of {stops}"),
    )
    tiny = "tiny query in a process, round trip"
    trip = Metric("round trip", "ms", "lower", targets(tiny, f"{tiny} beside dask"))
    finished = Metric("finished", "s", "lower", targets("PDS-H in processes beside threads"))
    workers = {"number": 10 if quick else 100, "rows": 300_000}
    parents = {"number": 2 if quick else 20, "rows": workers["rows"]}

    def none(killed: str, name: str, unit: str) -> Metric:
        return Metric(name, unit, "lower", targets(f"{killed}: {name}"))

    number = workers["number"]
    of_workers = (
        none(_WORKERS, "unresolved", f"of {_POOL * number}"),
        none(_WORKERS, "others harmed", f"of {_POOL * number - number}"),
        none(_WORKERS, "pool not back to size", f"of {number}"),
        none(_WORKERS, "processes left", f"in {number} kills"),
        none(_WORKERS, "shared memory left", f"in {number} kills"),
    )
    of_parents = (
        none(_PARENTS, "processes left", f"in {parents['number']} kills"),
        none(_PARENTS, "shared memory left", f"in {parents['number']} kills"),
    )
    in_threads = (POLARS_ASYNC_THREADS, POLARS_ASYNC)
    return [
        Case("processes", _STOP, (POLARS, POLARS_ASYNC), idle, stop, 900, 1 if quick else _RUNS),
        Case("processes", _TRIP, (DASK, POLARS_ASYNC), (trip,), {"trips": 300 if quick else 1000}),
        Case("processes", _PDSH, in_threads, (finished,), {"folder": folder}, 300),
        Case("processes", _WORKERS, (POLARS_ASYNC,), of_workers, workers, 900, 1),
        Case("processes", _PARENTS, (POLARS_ASYNC,), of_parents, parents, 900, 1),
    ]


def run(case: str, contender: str, **size: Any) -> Figures:
    """Measure one contender in one case, once."""
    if case == _PARENTS:
        return _kill_parents(**size)
    return asyncio.run(_CASES[case](contender, **size))


# Cancelled


async def _stops(
    contender: str, folder: str, queries: Sequence[int], rows: int, number: int
) -> Figures:
    read(Path(folder))
    tables = data.tables(Path(folder))
    generator = random.Random(0)  # noqa: S311  # no secret, and the same for all
    seconds: list[float] = []
    killed = 0
    async with _collector(contender) as submit:
        for each in queries:
            lf = QUERIES[each](tables) if each != _GROUPS else _grouped(rows, contender)
            for engine in _ENGINES:
                begun = time.perf_counter()
                await submit(lf, engine)
                whole = time.perf_counter() - begun
                # Polars' own takes long, and its figures are there to be seen beside: no target.
                for _ in range(1 if contender == POLARS else number):
                    stopped = None
                    while stopped is None:
                        delay = generator.uniform(0, whole)
                        stopped = await _stopped(submit, lf, engine, delay)
                    seconds.append(stopped[0])
                    killed += stopped[1]
    seconds.sort()
    return {
        "until idle, p50": quantile(seconds, 0.5) * 1000,
        "until idle, p99": quantile(seconds, 0.99) * 1000,
        "until idle, max": seconds[-1] * 1000,
        "workers killed": killed,
    }


def _grouped(rows: int, contender: str) -> pl.LazyFrame:
    keys = (pl.col("left") % 100_000).alias("key")
    source = frame(rows)
    if contender == POLARS_ASYNC:  # as users do with frames for worker processes
        source = pa.share(source.collect())
    return source.group_by(keys).agg(pl.col("right").sum(), pl.col("number").max())


async def _stopped(
    submit: Submit, lf: pl.LazyFrame, engine: Engine, delay: float
) -> tuple[float, int] | None:
    """
    Cancel a query after a delay.

    Returns the seconds until all was idle and how many workers were killed, or None if the query
    was done before.
    """
    await submit(trivial(), "in-memory")  # if a worker was killed, waits for the next
    workers = children()
    task = asyncio.ensure_future(_awaited(submit(lf, engine)))
    await asyncio.sleep(delay)
    if task.done():
        return None
    begun = time.perf_counter()
    task.cancel()
    await asyncio.wait([task])
    idle = seconds_until_idle([os.getpid(), *workers], begun)
    return idle, len(set(workers) - set(children()))


# Tiny, and many


async def _trips(contender: str, trips: int) -> Figures:
    async with _collector(contender) as submit:

        def ask(lf: pl.LazyFrame) -> Awaitable[pl.DataFrame]:
            return submit(lf, "in-memory")

        await one_by_one(ask, trivial(), trips // 10)
        return {"round trip": await one_by_one(ask, trivial(), trips) * 1000}


async def _pdsh(contender: str, folder: str) -> Figures:
    read(Path(folder))
    tables = data.tables(Path(folder))
    queries = [query(tables) for query in QUERIES.values()]
    async with _collector(contender) as submit:
        for _ in range(2):  # the first time starts the workers
            begun = time.perf_counter()
            await asyncio.gather(*(_awaited(submit(query, "in-memory")) for query in queries))
        return {"finished": time.perf_counter() - begun}


async def _awaited(query: Awaitable[pl.DataFrame]) -> None:
    await query


@asynccontextmanager
async def _collector(contender: str) -> AsyncIterator[Submit]:
    if contender == POLARS:
        yield lambda lf, engine: lf.collect_async(engine=engine)
        return
    with ExitStack() as stack:
        executor: Any = "threads" if contender == POLARS_ASYNC_THREADS else "processes"
        if contender == DASK:
            # Imported here, since no other contender needs it.
            distributed: Any = import_module("distributed")

            folder = stack.enter_context(TemporaryDirectory())
            cluster = distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=folder
            )
            client = stack.enter_context(distributed.Client(stack.enter_context(cluster)))
            executor = client.get_executor(pure=False)
        async with pa.Collector(executor=executor) as collector:
            yield lambda lf, engine: collector.collect_async(lf, engine=engine)


# Killed


async def _kill_workers(_: str, number: int, rows: int) -> Figures:
    found = dict.fromkeys(("unresolved", "others harmed", "pool not back to size"), 0)
    generator = random.Random(0)  # noqa: S311  # as above
    queries = _sorts(rows)
    answers = [query.collect(engine="in-memory") for query in queries]
    shared = _shared_memory()
    async with pa.Collector(executor="processes", max_running=_POOL) as collector:

        async def ask(each: int) -> str:
            try:
                # With a priority, so that one runs in each slot, large as they are.
                answer = await collector.collect_async(queries[each], priority=1)
            except pa.WorkerDiedError:
                return "died"
            return "right" if answer.equals(answers[each]) else "wrong"

        async def ask_all(victim: float | None = None) -> list[str]:
            """Return the outcome of each query; a worker is killed after `victim` seconds."""
            tasks = [asyncio.create_task(ask(each)) for each in range(_POOL)]
            if victim is not None:
                await asyncio.sleep(victim)
                os.kill(generator.choice(children()), signal.SIGKILL)
            done, _ = await asyncio.wait(tasks, timeout=_PATIENCE)
            return [task.result() if task in done else "unresolved" for task in tasks]

        await ask_all()
        whole, kills = 0.0, 0
        while kills < number:
            outcomes = await ask_all(generator.uniform(0, whole))
            # A kill counts if the worker had a query; if not, no query may be harmed at all.
            kills += (hit := "died" in outcomes)
            found["unresolved"] += outcomes.count("unresolved")
            found["others harmed"] += outcomes.count("died") - hit + outcomes.count("wrong")
            begun = time.perf_counter()
            again = await ask_all()
            whole = time.perf_counter() - begun
            if hit and (again != ["right"] * _POOL or len(children()) != _POOL):
                found["pool not back to size"] += 1
        files = _memory_files()
    _wait_while(lambda: [*children(), *_left_behind(shared)])
    return {
        **found,
        "processes left": len(children()),
        "shared memory left": len(_left_behind(shared)) + files,
    }


def _kill_parents(number: int, rows: int) -> Figures:
    generator = random.Random(0)  # noqa: S311  # as above
    shared = _shared_memory()
    left = 0
    for _each in range(number):
        mark = f"{_MARK}={uuid4()}"
        name, value = mark.split("=")
        parent = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(rows)],
            env={**os.environ, name: value},
            cwd=_ROOT,
            stdout=subprocess.PIPE,
        )
        with parent:
            assert parent.stdout is not None
            whole = float(parent.stdout.readline())
            time.sleep(generator.uniform(0, whole))
            parent.kill()
        _wait_while(partial(_marked, mark))
        for process in _marked(mark):
            left += 1
            os.kill(process, signal.SIGKILL)
    _wait_while(lambda: _left_behind(shared))
    return {
        "processes left": left,
        "shared memory left": len(_left_behind(shared)),
    }


def serve(rows: str) -> None:
    """Run queries for ever, as a parent to be killed does, and print how long a round takes."""

    async def main() -> None:
        async with pa.Collector(executor="processes", max_running=_POOL) as collector:
            for number in count():
                begun = time.perf_counter()
                await asyncio.gather(
                    *(_awaited(collector.collect_async(lf, priority=1)) for lf in _sorts(int(rows)))
                )
                if number == 1:  # by then all workers have started
                    print(time.perf_counter() - begun, flush=True)

    asyncio.run(main())


def _sorts(rows: int) -> list[pl.LazyFrame]:
    source = frame(rows)
    return [source.sort(pl.col("left") * (number + 1)) for number in range(_POOL)]


def _wait_while(some: Callable[[], Sequence[object]]) -> None:
    end = time.perf_counter() + _PATIENCE
    while some() and time.perf_counter() < end:
        time.sleep(0.01)


def _marked(mark: str) -> list[int]:
    """Return the processes that have `mark` in their environment: all descendants of a parent."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it has ended, or belongs to another user
                if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def _shared_memory() -> set[Path]:
    return set(_SHARED_MEMORY.iterdir())


def _left_behind(before: set[Path]) -> list[Path]:
    """Return the new files in shared memory, without those that a running program has mapped."""
    new = _shared_memory() - before
    for folder in Path("/proc").iterdir() if new else ():
        if folder.name.isdecimal():
            with suppress(OSError):  # as above
                maps = (folder / "maps").read_text(encoding="utf-8", errors="replace")
                new = {each for each in new if str(each) not in maps}
    return list(new)


def _memory_files() -> int:
    """Return how many of the memory files for workers this process has open."""
    found = 0
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += str(file.readlink()).startswith("/memfd:polars-async")
    return found


_CASES: Final[dict[str, Callable[..., Coroutine[Any, Any, Figures]]]] = {
    _STOP: _stops,
    _TRIP: _trips,
    _PDSH: _pdsh,
    _WORKERS: _kill_workers,
}
