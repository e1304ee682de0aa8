"""A limit of memory: what many sorts at once take with it and without, and how long."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Final

import polars as pl

import polars_async as pa
from benchmarks.contenders import POLARS, POLARS_ASYNC, POLARS_ASYNC_LIMITED
from benchmarks.measure.workloads import frame
from benchmarks.runner import Case, Metric
from benchmarks.targets import targets

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping

    from benchmarks.runner import Options

_SMALL: Final = 64
_LARGE: Final = 8
_TIMES_LARGER: Final = 10
_SORTS: Final = f"{_SMALL} sorts and {_LARGE} of {_TIMES_LARGER} times the rows at once"
_INTERVAL: Final = 0.02
_MEGABYTE: Final = 1 << 20
_ROOT: Final = Path(__file__).parents[2]


def cases(options: Options) -> list[Case]:
    """Return the cases of this suite."""
    rows = 50_000 if options.quick else 2_000_000
    # Measured in a process of its own, whose memory no contender inherits.
    limit = int(_figures(POLARS, {"rows": rows})["peak"] * _MEGABYTE / 3)
    found = []
    for executor in ("threads", "processes"):
        name = f"{_SORTS}, {executor}, in-memory"
        who = (*((POLARS,) if executor == "threads" else ()), POLARS_ASYNC, POLARS_ASYNC_LIMITED)
        metrics = (
            Metric("finished", "s", "lower", targets(f"limited sorts, finished, {executor}")),
            Metric("peak", "MB", "lower", {}),
            Metric("peak by limit", "", "lower", targets(f"limited sorts, peak, {executor}")),
        )
        size = {"rows": rows, "limit": limit, "executor": executor}
        found.append(Case("memory", name, who, metrics, size, timeout=400))
    return found


def run(case: str, contender: str, **size: Any) -> Mapping[str, float]:  # noqa: ARG001  # one kind
    """Measure one contender in one case, once."""
    return asyncio.run(_sorts(contender, **size))


def _figures(contender: str, size: Mapping[str, object]) -> dict[str, float]:
    command = ["-m", "benchmarks.measure.run_one", "memory", _SORTS, contender, json.dumps(size)]
    done = subprocess.run(
        [sys.executable, *command],
        check=False,  # Polars' own may abort at its exit, after its figures
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


async def _sorts(
    contender: str, rows: int, limit: int = 0, executor: Any = "threads"
) -> Mapping[str, float]:
    frames = [frame(rows * times).collect() for times in (1, _TIMES_LARGER)]
    # Shared frames go to workers without a copy; on threads there is none in any case.
    lazy = [pa.share(each) if executor == "processes" else each.lazy() for each in frames]
    del frames
    queries = list(_in_turns(*lazy))
    most = limit if contender == POLARS_ASYNC_LIMITED else None
    with _peak() as peak:
        begun = time.perf_counter()
        if contender == POLARS:
            await _all(lambda query: query.collect_async(engine="in-memory"), queries)
        else:
            async with pa.Collector(
                engine="in-memory", executor=executor, max_memory=most
            ) as collector:
                await _all(collector.collect_async, queries)
        seconds = time.perf_counter() - begun
    megabytes = peak[0] / _MEGABYTE
    return {
        "finished": seconds,
        "peak": megabytes,
        "peak by limit": peak[0] / limit if limit else 0.0,
    }


def _in_turns(small: pl.LazyFrame, large: pl.LazyFrame) -> Iterator[pl.LazyFrame]:
    for number in range(_SMALL):
        if number % (_SMALL // _LARGE) == 0:
            yield large.sort(pl.col("left") + number)
        yield small.sort(pl.col("left") + number)


async def _all(
    submit: Callable[[pl.LazyFrame], Awaitable[pl.DataFrame]], queries: list[pl.LazyFrame]
) -> None:
    await asyncio.gather(*[_dropped(submit(query)) for query in queries])


async def _dropped(handle: Awaitable[pl.DataFrame]) -> None:
    await handle


@contextmanager
def _peak() -> Generator[list[int]]:
    """Yield a list with the most bytes that this process and its children took meanwhile."""
    peak, ends = [0], Event()

    def sample() -> None:
        while not ends.wait(_INTERVAL):
            peak[0] = max(peak[0], sum(map(_proportional, _processes())))

    thread = Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        ends.set()
        thread.join()


def _processes() -> list[str]:
    """Return the numbers of this process and of its children, which any thread may have started."""
    found = ["self"]
    for file in Path("/proc/self/task").glob("*/children"):
        try:
            found += file.read_text().split()
        except OSError:  # the thread has ended
            continue
    return found


def _proportional(process: str) -> int:
    """Return the bytes of a process; of what it shares with others only its part."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
