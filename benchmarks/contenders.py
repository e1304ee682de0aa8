"""
What one contender does in a process of its own: ``python -m benchmarks.contenders ROW WHO SIZE``.

It prints its figures as JSON; `benchmarks.load` starts it.
"""

from __future__ import annotations

import ast
import asyncio
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import polars as pl

import polars_async as pa
from benchmarks.pdsh import data
from benchmarks.pdsh.queries import QUERIES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping

    Submit = Callable[[pl.LazyFrame], Awaitable[pl.DataFrame]]
    Figures = dict[str, float]

NATIVE: Final = "native"
OWN: Final = "polars-async"
_INTERVAL: Final = 0.005
_HEAVY_QUERIES: Final = 8
_SORTS: Final = 64


def process(
    module: str, *arguments: str, timeout: float
) -> subprocess.CompletedProcess[str] | None:
    """Run a module of the benchmarks in a fresh interpreter; None if it did not end in time."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    root = Path(__file__).parents[1]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, cwd=root
        )
    except subprocess.TimeoutExpired:
        return None


def submitter(contender: str) -> Submit:
    """Give what collects a query as `contender`, which may name settings: ``NAME KEY=VALUE``."""
    name, *settings = contender.split()
    if name == NATIVE:
        return _native
    if not settings:
        return pa.collect_async
    pairs = (setting.split("=") for setting in settings)
    return pa.Collector(**{key: ast.literal_eval(value) for key, value in pairs}).collect_async


def frame(rows: int) -> pl.LazyFrame:
    """Make a frame in memory, the same in every process."""
    number = pl.int_range(rows, eager=True)
    columns = {"number": number, "left": number.shuffle(seed=1), "right": number.shuffle(seed=2)}
    return pl.LazyFrame(columns)


def _native(query: pl.LazyFrame) -> Any:
    return query.collect_async(engine="in-memory")


async def _tiny_beside_heavy(submit: Submit, size: str) -> Figures:
    source, small = frame(int(size)), frame(1000).collect()
    heavy_queries = [_heavy(source, number) for number in range(_HEAVY_QUERIES)]
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
    latencies.sort()
    return {
        "p50": _rank(latencies, 0.5) * 1000,
        "p99": _rank(latencies, 0.99) * 1000,
        "max": latencies[-1] * 1000,
        "number": len(latencies),
        "seconds": max(heavy.result()) - begun,
    }


def _heavy(source: pl.LazyFrame, number: int) -> pl.LazyFrame:
    # No two are equal, so that they share the source and nothing else.
    if number % 2:
        return source.sort(pl.col("left") + number)
    keys = pl.col("left") % (100_000 + number)
    return source.group_by(keys.alias("key")).agg(pl.col("right").sum(), pl.col("number").max())


def _tiny(small: pl.DataFrame, number: int) -> pl.LazyFrame:
    return small.lazy().filter(pl.col("left") > number % 1000).select(pl.col("right").sum())


def _rank(ordered: list[float], share: float) -> float:
    return ordered[math.ceil(share * len(ordered)) - 1]


async def _sorts(submit: Submit, size: str) -> Figures:
    source = frame(int(size))
    return await _memory(
        submit,
        [
            source.sort(pl.col(("left", "right")[number % 2]) + number, descending=number % 4 < 2)
            for number in range(_SORTS)
        ],
    )


async def _pdsh(submit: Submit, size: str) -> Figures:
    folder = Path(size)
    read(folder)
    tables = data.tables(folder)
    return await _memory(submit, [query(tables) for query in QUERIES.values()])


async def _memory(submit: Submit, queries: Iterable[pl.LazyFrame]) -> Figures:
    await submit(_tiny(frame(1000).collect(), 0))  # starts the threads
    before = resident()
    begun = time.perf_counter()
    seconds = max(await _at_once(submit, queries)) - begun
    return {
        "seconds": seconds,
        "before": before,
        # Linux starts it at the peak of the parent, which therefore must not work itself.
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def read(folder: Path) -> None:
    """Read all files, so that nobody reads from a colder disk than the next."""
    for file in folder.iterdir():
        with file.open("rb") as source, Path(os.devnull).open("wb") as sink:
            shutil.copyfileobj(source, sink)


def resident() -> float:
    """Give the memory that this process has now, in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def _at_once(submit: Submit, queries: Iterable[pl.LazyFrame]) -> asyncio.Future[list[float]]:
    """Submit every query now; gives the times at which the results came, and were dropped."""
    return asyncio.gather(*[_arrival(submit(query)) for query in queries])


async def _arrival(handle: Awaitable[pl.DataFrame]) -> float:
    await handle
    return time.perf_counter()


_ROWS: Final[Mapping[str, Callable[[Submit, str], Coroutine[Any, Any, Figures]]]] = {
    "p6": _tiny_beside_heavy,
    "p7": _sorts,
    "p8": _pdsh,
}


if __name__ == "__main__":
    row, contender, size = sys.argv[1:]
    # At once: an interpreter may still abort when it exits.
    print(json.dumps(asyncio.run(_ROWS[row](submitter(contender), size))), flush=True)
