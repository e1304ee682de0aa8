"""
Queries in worker processes: stopped (P11), small (P12), many (P13), and killed (R6).

What is stopped is idle once its worker computes no more, and this process neither, which may have
been about to send the query. Where a worker was killed, that is when it is gone: the start of the
next is nothing that the query takes. Polars' own is idle when the threads of the process are.
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
from benchmarks.measure.idle import children, seconds_until_idle
from benchmarks.measure.workloads import frame, one_by_one, rank, read, trivial
from benchmarks.pdsh import data
from benchmarks.pdsh.queries import QUERIES
from benchmarks.runner import NATIVE, OWN, Case, Metric, Target

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    from benchmarks.runner import Options

    Figures = dict[str, float]
    Engine = Literal["in-memory", "streaming"]
    Submit = Callable[[pl.LazyFrame, Engine], Awaitable[pl.DataFrame]]

DASK: Final = "dask"
IN_THREADS: Final = "polars-async, threads"

_STOP: Final = "cancelled at random moments"
_TRIP: Final = "trivial query, warm worker"
_PDSH: Final = "22 PDS-H queries at once"
_WORKERS: Final = "workers killed in mid-query"
_PARENTS: Final = "parents killed"
_ENGINES: Final[tuple[Engine, ...]] = ("in-memory", "streaming")
_GROUPS: Final = 0
"""The number of the group_by, among those of PDS-H."""
_RUNS: Final = 3
_POOL: Final = 3
_PATIENCE: Final = 20.0
"""Seconds for what takes less than two."""
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # looks into it, no more
_MARK: Final = "POLARS_ASYNC_BENCHMARK"
_PROGRAM: Final = (
    "import sys; from benchmarks.suites import processes; processes.serve(*sys.argv[1:])"
)
_ROOT: Final = Path(__file__).parents[2]


def cases(options: Options) -> list[Case]:
    """List the comparisons of this suite."""
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
    idle = (
        Metric("until idle, p50", "ms", "lower", (Target("P11", at_most=20, of=None),)),
        Metric("until idle, p99", "ms", "lower", (Target("P11", at_most=250, of=None),)),
        Metric("until idle, max", "ms"),
        Metric("workers killed", f"of {stops}"),
    )
    trip = Metric(
        "round trip",
        "ms",
        "lower",
        (Target("P12", at_most=1, of=None), Target("P12", at_most=0.25, of=DASK)),
    )
    finished = Metric("finished", "s", "lower", (Target("P13", at_most=1.1, of=IN_THREADS),))
    workers = {"number": 10 if quick else 100, "rows": 300_000}
    parents = {"number": 2 if quick else 20, "rows": workers["rows"]}

    def none(name: str, unit: str) -> Metric:
        return Metric(name, unit, "lower", (Target("R6", at_most=0, of=None),))

    number = workers["number"]
    of_workers = (
        none("unresolved", f"of {_POOL * number}"),
        none("others harmed", f"of {_POOL * number - number}"),
        none("pool not back to size", f"of {number}"),
        none("processes left", f"in {number} kills"),
        none("shared memory left", f"in {number} kills"),
    )
    of_parents = (
        none("processes left by parents", f"in {parents['number']} kills"),
        none("shared memory left by parents", f"in {parents['number']} kills"),
    )
    return [
        Case("processes", _STOP, (NATIVE, OWN), idle, stop, 900, 1 if quick else _RUNS),
        Case("processes", _TRIP, (DASK, OWN), (trip,), {"trips": 300 if quick else 1000}),
        Case("processes", _PDSH, (IN_THREADS, OWN), (finished,), {"folder": folder}, 300),
        Case("processes", _WORKERS, (OWN,), of_workers, workers, 900, 1),
        Case("processes", _PARENTS, (OWN,), of_parents, parents, 900, 1),
    ]


def run(case: str, contender: str, **size: Any) -> Figures:
    """Measure one contender in one case, once."""
    if case == _PARENTS:
        return _kill_parents(**size)
    return asyncio.run(_CASES[case](contender, **size))


# Stopped


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
                # Polars' own takes longer, and is not to be compared.
                for _ in range(1 if contender == NATIVE else number):
                    stopped = None
                    while stopped is None:
                        delay = generator.uniform(0, whole)
                        stopped = await _stopped(submit, lf, engine, delay)
                    seconds.append(stopped[0])
                    killed += stopped[1]
    seconds.sort()
    return {
        "until idle, p50": rank(seconds, 0.5) * 1000,
        "until idle, p99": rank(seconds, 0.99) * 1000,
        "until idle, max": seconds[-1] * 1000,
        "workers killed": killed,
    }


def _grouped(rows: int, contender: str) -> pl.LazyFrame:
    keys = (pl.col("left") % 100_000).alias("key")
    source = frame(rows)
    if contender == OWN:  # as one does with frames for worker processes
        source = pa.share(source.collect())
    return source.group_by(keys).agg(pl.col("right").sum(), pl.col("number").max())


async def _stopped(
    submit: Submit, lf: pl.LazyFrame, engine: Engine, delay: float
) -> tuple[float, int] | None:
    """Cancel a query; gives when all was idle, and whether that killed; None if it was done."""
    await submit(trivial(), "in-memory")  # where a worker was killed, the next is there then
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


# Small, and many


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
    if contender == NATIVE:
        yield lambda lf, engine: lf.collect_async(engine=engine)
        return
    with ExitStack() as stack:
        executor: Any = "threads" if contender == IN_THREADS else "processes"
        if contender == DASK:
            # Here, since none of the others needs it.
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
                # As if they were small, so that one runs in each slot.
                answer = await collector.collect_async(queries[each], priority=1)
            except pa.WorkerDiedError:
                return "died"
            return "right" if answer.equals(answers[each]) else "wrong"

        async def ask_all(victim: float | None = None) -> list[str]:
            """Give what became of each; `victim` is when a worker is killed meanwhile."""
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
            # The worker may have been without a query: then nobody is to be harmed, and no more.
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
        "processes left by parents": left,
        "shared memory left by parents": len(_left_behind(shared)),
    }


def serve(rows: str) -> None:
    """Be a parent that is to be killed: run queries for ever, and print how long they take."""

    async def main() -> None:
        async with pa.Collector(executor="processes", max_running=_POOL) as collector:
            for number in count():
                begun = time.perf_counter()
                await asyncio.gather(
                    *(_awaited(collector.collect_async(lf, priority=1)) for lf in _sorts(int(rows)))
                )
                if number == 1:  # by then there are all workers
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
    """Find the processes in whose environment `mark` is: children, however far away."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it ends, or is somebody else's
                if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def _shared_memory() -> set[Path]:
    return set(_SHARED_MEMORY.iterdir())


def _left_behind(before: set[Path]) -> list[Path]:
    """Find what is new in shared memory, and nobody's: other programs may be at work, too."""
    new = _shared_memory() - before
    for folder in Path("/proc").iterdir() if new else ():
        if folder.name.isdecimal():
            with suppress(OSError):  # as above
                maps = (folder / "maps").read_text(encoding="utf-8", errors="replace")
                new = {each for each in new if str(each) not in maps}
    return list(new)


def _memory_files() -> int:
    """Count the files in memory that this process has open: of those that go to workers."""
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
