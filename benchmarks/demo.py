"""
Demo: one asyncio program collects the 22 PDS-H queries at once, in two ways.

``python -m benchmarks.demo`` collects them with one ``collect_all_async`` and then with 22
``collect_async``, first with Polars' own and then with those of polars-async, and measures the
longest time that the event loop was held up. Every answer is compared with that of DuckDB; a wrong
one is named, and the exit status is 1.

The queries are derived from TPC-H and not comparable to published TPC-H results.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import duckdb
import polars as pl
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import polars_async as pa
from benchmarks.measure.stall import StallMeter
from benchmarks.pdsh import data, oracle
from benchmarks.pdsh.queries import QUERIES

_TOGETHER: Final = "1 collect_all_async"
_EACH: Final = f"{len(QUERIES)} collect_async"


class Library(Protocol):
    """What has the two functions: Polars, or polars-async."""

    def collect_all_async(
        self, lazy_frames: Iterable[pl.LazyFrame]
    ) -> Awaitable[list[pl.DataFrame]]:
        """Collect several frames as one query."""
        ...

    def collect_async(self, lf: pl.LazyFrame) -> Awaitable[pl.DataFrame]:
        """Collect a frame."""
        ...


class _Polars:
    """Polars' own."""

    @staticmethod
    def collect_all_async(
        lazy_frames: Iterable[pl.LazyFrame],
    ) -> Awaitable[list[pl.DataFrame]]:
        return pl.collect_all_async(lazy_frames)

    @staticmethod
    def collect_async(lf: pl.LazyFrame) -> Awaitable[pl.DataFrame]:
        return lf.collect_async()


_LIBRARIES: Final[Mapping[str, Library]] = {"Polars' own": _Polars(), "polars-async": pa}


@dataclass(frozen=True)
class Run:
    """The results of collecting all queries in one way; times in seconds, keyed by query."""

    library: str
    function: str
    answers: Mapping[int, pl.DataFrame]
    resolutions: Mapping[int, pa.Resolution]
    """None of Polars' own, which does not tell."""
    seconds: Mapping[int, float]
    total: float
    stall: float

    @property
    def way(self) -> str:
        """The name of the way."""
        return f"{self.function} of {self.library}"

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
        progress.update(step, description="answering with DuckDB, to compare with")
        expected = oracle.answers(folder)
        tables = data.tables(folder)
        queries = {number: query(tables) for number, query in QUERIES.items()}
        progress.update(step, description="collecting", total=4 * len(queries))
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
) -> list[Run]:
    for library in _LIBRARIES.values():  # imports and starts what the first run else would
        await library.collect_async(queries[6])
    return [
        await collect(queries, name, advance)
        for name in _LIBRARIES
        for collect in (_together, _each)
    ]


async def _together(
    queries: Mapping[int, pl.LazyFrame], library: str, advance: Callable[[int], object]
) -> Run:
    async with StallMeter() as meter:
        begun = time.perf_counter()
        handle = _LIBRARIES[library].collect_all_async(list(queries.values()))
        answers = await handle
        total = time.perf_counter() - begun
    advance(len(queries))
    return Run(
        library,
        _TOGETHER,
        answers=dict(zip(queries, answers, strict=True)),
        resolutions=_resolutions(dict.fromkeys(queries, handle)),
        seconds=dict.fromkeys(queries, total),
        total=total,
        stall=meter.longest,
    )


async def _each(
    queries: Mapping[int, pl.LazyFrame], library: str, advance: Callable[[int], object]
) -> Run:
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
            number: (time.perf_counter(), _LIBRARIES[library].collect_async(query))
            for number, query in queries.items()
        }
        await asyncio.gather(*(answer(number, *one) for number, one in submitted.items()))
        total = time.perf_counter() - begun
    resolutions = _resolutions({number: handle for number, (_, handle) in submitted.items()})
    return Run(library, _EACH, answers, resolutions, seconds, total, meter.longest)


def _resolutions(handles: Mapping[int, object]) -> dict[int, pa.Resolution]:
    return {
        number: handle.resolution
        for number, handle in handles.items()
        if isinstance(handle, pa.QueryHandle)
    }


def _report(
    console: Console,
    runs: Sequence[Run],
    wrong: Mapping[str, Mapping[int, str]],
    scale: float,
) -> None:
    console.print(f"PDS-H at scale {scale:g}: derived from TPC-H, not comparable to its results")
    each = runs[-1]
    console.print(_queries(each, set().union(*wrong.values())))
    console.print(f"Chosen: {_choice(each.resolutions)}", markup=False)
    console.print(_totals(runs))
    console.print(f"Polars {pl.__version__}, Python {sys.version.split()[0]}")
    for way, differences in wrong.items():
        for number, what in differences.items():
            console.print(f"WRONG: q{number} through {way}: {what}", style="red", markup=False)
    if not any(wrong.values()):
        console.print(
            f"All {len(QUERIES)} answers agree with those of DuckDB {duckdb.__version__}, "
            "in all four ways.",
            style="green",
        )


def _choice(resolutions: Mapping[int, pa.Resolution]) -> str:
    """Return which engine was chosen for how many queries, and why, in one line."""
    engines = Counter(resolution.name for resolution in resolutions.values())
    chosen = ", ".join(f"the {engine} engine for {count}" for engine, count in engines.items())
    (number, resolution), *others = resolutions.items()
    same = all(each.message == resolution.message for _, each in others)
    return f"{chosen}. {'Each' if same else f'For one, q{number}'}: {resolution}"


def _queries(each: Run, wrong: set[int]) -> Table:
    table = Table("query", box=SIMPLE)
    table.add_column("rows", justify="right")
    table.add_column("engine")
    table.add_column("chosen by")
    table.add_column("ms", justify="right")
    table.add_column("against DuckDB")
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


def _totals(runs: Sequence[Run]) -> Table:
    table = Table("collected with", box=SIMPLE)
    table.add_column("total ms", justify="right")
    table.add_column("longest loop stall ms", justify="right")
    for run in runs:
        table.add_row(run.way, f"{run.total * 1000:.1f}", f"{run.stall * 1000:.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
