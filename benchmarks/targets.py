"""
Round trip, fan-out, loop stall, resolution and import, beside Polars' own.

``python -m benchmarks.targets``, in an environment with the group ``bench`` of pyproject.toml.
The contenders take turns within one run, after a turn that does not count; what is printed is the
median with the smallest and the largest, and the ratio turn by turn. ``P1`` and so on are the rows
of the project's targets.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
import timeit
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import gevent
import polars as pl

import polars_async as pa
from benchmarks import report
from benchmarks.stall import StallMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TRIVIAL: Final = pl.LazyFrame({"a": [1, 2, 3]}).select(pl.col("a").sum())
_HEAVY_QUERIES: Final = 6


@dataclass(frozen=True)
class Contest:
    """One row of the targets: two contenders, a unit, and what their ratio should be."""

    row: str
    what: str
    unit: str
    native: Callable[[], float]
    own: Callable[[], float]
    target: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every contest and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--turns", type=int, default=9, help="turns that count (default: 9)")
    parser.add_argument("--rows", type=int, default=6_000_000, help="of each heavy query")
    options = parser.parse_args(arguments)
    report.head(f"{options.turns} turns")
    for contest in [*_latency(), *_stalls(options.rows)]:
        _report(contest, options.turns)
    _report_alone("P9", "resolve_engine(), nothing asked", "us", _resolution, "<= 5 us")
    _report_alone("P10", "import after polars", "ms", _import, "<= 20 ms")
    return 0


def _latency() -> list[Contest]:
    return [
        Contest("P1", "round trip, asyncio", "us", _trips(_native), _trips(_own), "<= 0.5"),
        Contest("P2", "3,000 gathered, asyncio", "/s", _fan(_native), _fan(_own), ">= 2"),
    ]


def _native() -> Any:
    return _TRIVIAL.collect_async(engine="in-memory")


def _own() -> Any:
    return pa.collect_async(_TRIVIAL)


def _trips(collect: Callable[[], Any], number: int = 1000) -> Callable[[], float]:
    async def run() -> float:
        begun = time.perf_counter()
        for _ in range(number):
            await collect()
        return (time.perf_counter() - begun) / number * 1e6

    return lambda: asyncio.run(run())


def _fan(collect: Callable[[], Any], number: int = 3000) -> Callable[[], float]:
    async def run() -> float:
        begun = time.perf_counter()
        await asyncio.gather(*(collect() for _ in range(number)))
        return number / (time.perf_counter() - begun)

    return lambda: asyncio.run(run())


def _stalls(rows: int) -> list[Contest]:
    keys = pl.int_range(rows, eager=True)
    frame = pl.LazyFrame({"key": keys % 1000, "value": keys})
    # Not equal, so that they share the source and nothing else.
    heavy = [
        frame.group_by("key").agg(pl.col("value").sum() + number)
        for number in range(_HEAVY_QUERIES)
    ]
    target = "<= 1 (1.44: <= 0.1 with collect_all)"

    def contest(what: str, native: Callable[[], float], own: Callable[[], float]) -> Contest:
        return Contest("P5", what, "ms", native, own, target)

    return [
        contest(
            "loop stall, 6 collect_async, asyncio",
            _stall(lambda: [lf.collect_async(engine="in-memory") for lf in heavy]),
            _stall(lambda: [pa.collect_async(lf) for lf in heavy]),
        ),
        contest(
            "loop stall, collect_all_async, asyncio",
            _stall(lambda: [pl.collect_all_async(heavy, engine="in-memory")]),
            _stall(lambda: [pa.collect_all_async(heavy)]),
        ),
        contest(
            "loop stall, 6 collect_async, gevent",
            _green_stall(
                lambda: [lf.collect_async(gevent=True, engine="in-memory") for lf in heavy]
            ),
            _green_stall(lambda: [pa.collect_async(lf, gevent=True) for lf in heavy]),
        ),
        contest(
            "loop stall, collect_all_async, gevent",
            _green_stall(lambda: [pl.collect_all_async(heavy, gevent=True, engine="in-memory")]),
            _green_stall(lambda: [pa.collect_all_async(heavy, gevent=True)]),
        ),
    ]


def _stall(submit: Callable[[], list[Any]]) -> Callable[[], float]:
    async def run() -> float:
        async with StallMeter() as meter:
            await asyncio.gather(*submit())
        return meter.longest * 1000

    return lambda: asyncio.run(run())


def _green_stall(submit: Callable[[], list[Any]]) -> Callable[[], float]:
    def run() -> float:
        interval, longest, stopping = 0.001, 0.0, False

        def tick() -> None:
            nonlocal longest
            while not stopping:
                begun = time.monotonic()
                gevent.sleep(interval)
                longest = max(longest, time.monotonic() - begun - interval)

        ticker = gevent.spawn(tick)
        gevent.sleep(0)
        for handle in submit():
            handle.get()
        stopping = True
        ticker.join()
        return longest * 1000

    return run


def _resolution() -> float:
    return min(timeit.repeat(pa.resolve_engine, number=2000, repeat=5)) / 2000 * 1e6


def _import() -> float:
    code = (
        "import os, time, polars; before = len(os.listdir('/proc/self/task'))\n"
        "begun = time.perf_counter(); from polars_async import *; end = time.perf_counter()\n"
        "assert len(os.listdir('/proc/self/task')) == before, 'the import started a thread'\n"
        "print((end - begun) * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _report(contest: Contest, turns: int) -> None:
    contest.native(), contest.own()  # the turn that does not count
    pairs = [(contest.native(), contest.own()) for _ in range(turns)]
    native, own = ([pair[side] for pair in pairs] for side in (0, 1))
    ratios = [one / other for other, one in pairs]
    report.line(
        contest.row,
        contest.what,
        report.spread(native, contest.unit),
        report.spread(own, contest.unit),
        report.spread(ratios, digits=2),
        contest.target,
    )


def _report_alone(
    row: str, what: str, unit: str, measure: Callable[[], float], target: str
) -> None:
    measure()
    figures = report.spread([measure() for _ in range(7)], unit, 1)
    report.line(row, what, "", figures, "", target)


if __name__ == "__main__":
    sys.exit(main())
