"""
Demo: one asyncio program collects the 22 PDS-H queries at once, in two ways.

``python -m benchmarks.demo`` collects them with one ``collect_all_async`` and then with 22
``collect_async``, and measures the longest time that the event loop was held up. Every answer is
compared with that of DuckDB; a wrong one is named, and the exit status is 1.

The queries are derived from TPC-H and not comparable to published TPC-H results.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import polars as pl
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import polars_async as pa
from benchmarks.measure.stall import StallMeter
from benchmarks.pdsh import data, oracle
from benchmarks.pdsh.queries import QUERIES

_TOGETHER: Final = "collect_all_async"
_EACH: Final = "collect_async"


@dataclass(frozen=True)
class Run:
    """The results of collecting all queries in one way; times in seconds, keyed by query."""

    way: str
    answers: Mapping[int, pl.DataFrame]
    resolutions: Mapping[int, pa.Resolution]
    seconds: Mapping[int, float]
    total: float
    stall: float

    def wrong(self, expected: Mapping[int, pl.DataFrame]) -> dict[int, str]:
        """Return what is wrong with each wrong answer."""
        checked = {
            number: oracle.check(number, answer, expected[number])
            for number, answer in self.answers.items()
        }
        return {number: what for number, what in checked.items() if what is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status, which is 1 if any answer is wrong."""
    options = _options(arguments)
    # Without a terminal, no control codes, whatever the environment asks of rich.
    console = Console(force_terminal=None if sys.stdout.isatty() else False, highlight=False)
    with Progress(
        console=console, transient=True, refresh_per_second=4, disable=not console.is_terminal
    ) as progress:
        step = progress.add_task("making the data", total=None)
        folder = data.make(options.scale, options.data)
        progress.update(step, description="answering with DuckDB")
        expected = oracle.answers(folder)
        tables = data.tables(folder)
        queries = {number: query(tables) for number, query in QUERIES.items()}
        progress.update(step, description="collecting", total=2 * len(queries))
        runs = asyncio.run(_collect(queries, lambda steps: progress.advance(step, steps)))
    wrong = {run.way: run.wrong(expected) for run in runs}
    _report(console, runs, wrong, options.scale)
    return 1 if any(wrong.values()) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Collect the 22 PDS-H queries from one asyncio program and check the answers.",
    )
    parser.add_argument(
        "--scale", type=float, default=0.1, help="of the data; 1 is 345 MB (default: 0.1)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(".cache/data"),
        metavar="FOLDER",
        help="where the data is kept (default: .cache/data)",
    )
    return parser.parse_args(arguments)


async def _collect(
    queries: Mapping[int, pl.LazyFrame], advance: Callable[[int], object]
) -> tuple[Run, Run]:
    return await _together(queries, advance), await _each(queries, advance)


async def _together(queries: Mapping[int, pl.LazyFrame], advance: Callable[[int], object]) -> Run:
    async with StallMeter() as meter:
        begun = time.perf_counter()
        handle = pa.collect_all_async(list(queries.values()))
        answers = await handle
        total = time.perf_counter() - begun
    advance(len(queries))
    return Run(
        _TOGETHER,
        answers=dict(zip(queries, answers, strict=True)),
        resolutions=dict.fromkeys(queries, handle.resolution),
        seconds=dict.fromkeys(queries, total),
        total=total,
        stall=meter.longest,
    )


async def _each(queries: Mapping[int, pl.LazyFrame], advance: Callable[[int], object]) -> Run:
    answers: dict[int, pl.DataFrame] = {}
    seconds: dict[int, float] = {}

    async def answer(number: int, begun: float, handle: Awaitable[pl.DataFrame]) -> None:
        try:
            answers[number] = await handle
        except BaseException as error:
            error.add_note(f"in q{number}")
            raise
        seconds[number] = time.perf_counter() - begun
        advance(1)

    async with StallMeter() as meter:
        begun = time.perf_counter()
        submitted = {
            number: (time.perf_counter(), pa.collect_async(query))
            for number, query in queries.items()
        }
        await asyncio.gather(*(answer(number, *one) for number, one in submitted.items()))
        total = time.perf_counter() - begun
    resolutions = {number: handle.resolution for number, (_, handle) in submitted.items()}
    return Run(_EACH, answers, resolutions, seconds, total, meter.longest)


def _report(
    console: Console,
    runs: tuple[Run, Run],
    wrong: Mapping[str, Mapping[int, str]],
    scale: float,
) -> None:
    console.print(f"PDS-H at scale {scale:g}: derived from TPC-H, not comparable to its results")
    console.print(_queries(runs[1], set().union(*wrong.values())))
    for message in dict.fromkeys(
        resolution.message for run in runs for resolution in run.resolutions.values()
    ):
        console.print(f"Engine: {message}", markup=False)
    console.print(_totals(runs))
    console.print(f"Polars {pl.__version__}, Python {sys.version.split()[0]}")
    for way, differences in wrong.items():
        for number, what in differences.items():
            console.print(f"WRONG: q{number} through {way}: {what}", style="red", markup=False)
    if not any(wrong.values()):
        console.print(f"All {len(QUERIES)} answers are right, both ways.", style="green")


def _queries(each: Run, wrong: set[int]) -> Table:
    table = Table("query", box=SIMPLE)
    table.add_column("rows", justify="right")
    table.add_column("engine")
    table.add_column("chosen by")
    table.add_column("ms", justify="right")
    table.add_column("answer")
    for number, answer in sorted(each.answers.items()):
        resolution = each.resolutions[number]
        table.add_row(
            f"q{number}",
            f"{answer.height:,}",
            resolution.name,
            resolution.source,
            f"{each.seconds[number] * 1000:.1f}",
            "[red]WRONG[/]" if number in wrong else "[green]ok[/]",
        )
    return table


def _totals(runs: tuple[Run, Run]) -> Table:
    table = Table("collected with", box=SIMPLE)
    table.add_column("total ms", justify="right")
    table.add_column("longest loop stall ms", justify="right")
    for run, calls in zip(runs, ("one", f"{len(QUERIES)}"), strict=True):
        table.add_row(f"{calls} {run.way}", f"{run.total * 1000:.1f}", f"{run.stall * 1000:.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
