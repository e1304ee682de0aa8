"""
What goes wrong, counted: queries that never resolve, lines on stderr, exits of the interpreter.

Each count is over a number of interpreters; in one that dies, the query has not resolved.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import polars as pl

import polars_async as pa
from benchmarks.contenders import POLARS, POLARS_ASYNC
from benchmarks.measure.workloads import frame
from benchmarks.runner import Case, Metric
from benchmarks.targets import targets

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable

    from benchmarks.runner import Options

    Submit = Callable[[pl.LazyFrame], Awaitable[pl.DataFrame]]

_PROGRAM: Final = "import sys; from benchmarks.suites import faults; faults.main(*sys.argv[1:])"
_STATUS: Final = 7
_RUNNING: Final = 6
_AWAITED: Final = 64
_LONGEST_DELAY: Final = 0.05
_RESOLVE: Final = 3.0
"""Seconds that a query has to resolve; without a fault, none takes a second."""
_PATIENCE: Final = 20.0
"""Seconds that an interpreter has to end."""
_UNRESOLVED: Final = "unresolved"
_LINES: Final = "lines on stderr"
_EXITS: Final = ("aborts", "wrong statuses", _LINES, "hangs")
_ENGINE: Final = ", in-memory"
"""How the names of the cases end: this is what all of Polars' own queries run on here."""
_EXIT_STATES: Final = {
    f"exits, Rust running{_ENGINE}": "rust",
    f"exits, Python UDFs running{_ENGINE}": "udf",
    f"exits, all awaited{_ENGINE}": "awaited",
}


def cases(options: Options) -> list[Case]:
    """Return the cases of this suite."""
    number = {"number": 1 if options.quick else 10}
    goal = targets("queries unresolved after a fault")
    metric = Metric(_UNRESOLVED, f"of {number['number']}", "lower", goal)
    found = [_case(f"resolves after {name}{_ENGINE}", (metric,), number) for name in _FAULTS]
    goal = targets("lines on stderr after cancellations, time-outs, closed loops")
    metric = Metric(_LINES, f"in {number['number']} runs", "lower", goal)
    found += [_case(f"noise of {name}{_ENGINE}", (metric,), number) for name in _NOISES]
    exits = {"number": 4 if options.quick else 200}
    metrics = [
        Metric(name, f"in {exits['number']} exits", "lower", targets(f"exits: {name}"))
        for name in _EXITS
    ]
    return [*found, *(_case(name, metrics, exits) for name in _EXIT_STATES)]


def _case(name: str, metrics: Any, size: dict[str, int]) -> Case:
    return Case("faults", name, (POLARS, POLARS_ASYNC), metrics, size, timeout=1800, runs=1)


def run(case: str, contender: str, number: int) -> dict[str, float]:
    """Count what goes wrong with one contender in `number` interpreters."""
    generator = random.Random(0)  # noqa: S311  # no secret, and the same for all
    delays = [generator.uniform(0, _LONGEST_DELAY) for _ in range(number)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = sum(pool.map(partial(_start, case, contender), delays), Counter[str]())
    if case in _EXIT_STATES:
        return {fault: faults[fault] for fault in _EXITS}
    if case.startswith("noise of "):
        return {_LINES: faults[_LINES]}
    return {_UNRESOLVED: faults[_UNRESOLVED]}


def _start(case: str, contender: str, delay: float) -> Counter[str]:
    command = [sys.executable, "-c", _PROGRAM, case, contender, str(delay)]
    root = Path(__file__).parents[2]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False, cwd=root
        )
    except subprocess.TimeoutExpired:
        return Counter({"hangs": 1, _UNRESOLVED: 1})
    return Counter(
        {
            "aborts": int(done.returncode < 0),
            "wrong statuses": int(done.returncode >= 0 and done.returncode != _STATUS),
            _LINES: len(done.stderr.splitlines()),
            _UNRESOLVED: int("resolved" not in done.stdout),
        }
    )


# What runs in such an interpreter


def main(case: str, contender: str, delay: str) -> None:
    """Provoke the fault of one case, and print whether the query resolved."""
    submit: Submit = pa.collect_async if contender == POLARS_ASYNC else _polars
    if case in _EXIT_STATES:
        asyncio.run(_leave(_EXIT_STATES[case], submit, float(delay)))
        sys.exit(_STATUS)
    what, _, name = case.removesuffix(_ENGINE).partition(" after " if " after " in case else " of ")
    if what == "noise":
        _NOISES[name](submit)
        sys.exit(0)
    if _FAULTS[name](submit):
        print("resolved", flush=True)
    os._exit(0)  # without the usual exit, which is a case of its own


def _polars(lf: pl.LazyFrame) -> Any:
    return lf.collect_async(engine="in-memory")


async def _resolves(query: Awaitable[pl.DataFrame]) -> bool:
    """Return whether a query returns or raises anything in time."""

    async def ask() -> None:
        with suppress(BaseException):
            await query

    done, _ = await asyncio.wait([asyncio.ensure_future(ask())], timeout=_RESOLVE)
    return bool(done)


def _in_loop(fault: Callable[[Submit], Coroutine[Any, Any, bool]]) -> Callable[[Submit], bool]:
    return lambda submit: asyncio.run(fault(submit))


def _raising(error: type[BaseException]) -> Callable[[Submit], bool]:
    def udf(_df: pl.DataFrame) -> pl.DataFrame:
        raise error

    async def fault(submit: Submit) -> bool:
        return await _resolves(submit(frame(10).map_batches(udf)))

    return _in_loop(fault)


async def _panics(submit: Submit) -> bool:
    return await _resolves(submit(pl.LazyFrame().select(pl.int_range(0, 2**62))))


def _loses_its_loop(submit: Submit) -> bool:
    async def ask() -> Awaitable[pl.DataFrame]:
        return submit(_sorted(1)[0])

    loop = asyncio.new_event_loop()
    query = loop.run_until_complete(ask())
    loop.close()
    return asyncio.run(_resolves(query))


async def _loses_its_waiter(submit: Submit) -> bool:
    query = submit(_sorted(1)[0])
    waiter = asyncio.ensure_future(_awaited(query))
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.wait([waiter])
    return await _resolves(query)


def _is_interrupted(submit: Submit) -> bool:
    queries: list[Awaitable[pl.DataFrame]] = []

    async def ask() -> None:
        queries.append(submit(_sorted(1)[0]))
        signal.raise_signal(signal.SIGINT)
        await queries[0]

    with suppress(KeyboardInterrupt):
        asyncio.run(ask())
    return asyncio.run(_resolves(queries[0]))


async def _forks(submit: Submit) -> bool:
    await submit(frame(10))
    child = os.fork()
    if not child:
        resolved = False
        with suppress(BaseException):  # an error at once resolves it, too
            loop = asyncio.new_event_loop()
            resolved = loop.run_until_complete(_resolves_or_raises(submit))
        os._exit(0 if resolved else 1)
    end = time.monotonic() + 2 * _RESOLVE
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)  # noqa: ASYNC222  # which does not wait
        if pid:
            return status == 0
        await asyncio.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)  # noqa: ASYNC222  # this task is alone on its loop
    return False


async def _resolves_or_raises(submit: Submit) -> bool:
    try:
        query = submit(frame(10))
    except pa.PolarsAsyncError:
        return True
    return await _resolves(query)


_FAULTS: Final[dict[str, Callable[[Submit], bool]]] = {
    "a Rust panic": _in_loop(_panics),
    "KeyboardInterrupt in a UDF": _raising(KeyboardInterrupt),
    "SystemExit in a UDF": _raising(SystemExit),
    "StopIteration in a UDF": _raising(StopIteration),
    "its loop is closed": _loses_its_loop,
    "its waiter is cancelled": _in_loop(_loses_its_waiter),
    "Ctrl-C": _is_interrupted,
    "a fork": _in_loop(_forks),
}


def _cancels(submit: Submit) -> None:
    async def main() -> None:
        tasks = [asyncio.ensure_future(_awaited(submit(query))) for query in _sorted(20)]
        await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(1)  # until the queries that still run have ended

    asyncio.run(main())


def _times_out(submit: Submit) -> None:
    async def main() -> None:
        waits = (asyncio.wait_for(_awaited(submit(query)), 0.005) for query in _sorted(20))
        await asyncio.gather(*waits, return_exceptions=True)
        await asyncio.sleep(1)

    asyncio.run(main())


def _closes(submit: Submit) -> None:
    async def main() -> list[Any]:
        return [submit(query) for query in _sorted(6)]

    loop = asyncio.new_event_loop()
    handles = loop.run_until_complete(main())
    loop.close()
    time.sleep(1)
    del handles


async def _awaited(query: Awaitable[pl.DataFrame]) -> None:
    await query


def _sorted(number: int) -> list[pl.LazyFrame]:
    source = frame(300_000)
    return [source.sort(pl.col("left") + each) for each in range(number)]


_NOISES: Final[dict[str, Callable[[Submit], None]]] = {
    "cancellations": _cancels,
    "time-outs": _times_out,
    "a closed loop": _closes,
}


async def _leave(state: str, submit: Submit, delay: float) -> None:
    handles = [submit(query) for query in _left(state)]
    if state == "awaited":
        await asyncio.gather(*handles)
    else:
        await asyncio.sleep(delay)


def _left(state: str) -> Iterable[pl.LazyFrame]:
    if state == "udf":
        tiny = frame(10)
        return [tiny.map_batches((_sleeping, _busy)[n % 2]) for n in range(_RUNNING)]
    number, rows = (_RUNNING, 1_000_000) if state == "rust" else (_AWAITED, 10_000)
    source = frame(rows)
    sorts = [source.sort(pl.col("left") + n) for n in range(number)]
    if state == "rust":
        return sorts
    return [lf.map_batches(_quick) if n % 2 else lf for n, lf in enumerate(sorts)]


def _sleeping(df: pl.DataFrame) -> pl.DataFrame:
    for _ in range(1000):
        time.sleep(0.001)
    return df


def _busy(df: pl.DataFrame) -> pl.DataFrame:
    end = time.perf_counter() + 1
    while time.perf_counter() < end:
        pass
    return df


def _quick(df: pl.DataFrame) -> pl.DataFrame:
    return df
