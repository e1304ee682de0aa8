"""Compare polars-async with Polars' own and others; ``ci/bench`` is the way to call this."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.contenders import ENGINES
from benchmarks.report import charts, table
from benchmarks.report.results import Report
from benchmarks.runner import Options, measure
from benchmarks.suites import SUITES, suite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.runner import Case

_DATA: Final = Path(".cache/data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _options(arguments)
    if options.command == "run":
        report = measure(_cases(options), options.runs, quick=options.quick)
        report.write(options.json)
        table.show(report)
    elif options.command == "show":
        report = Report()
        for path in options.reports:
            report.add(_read(path))
        options.output.mkdir(parents=True, exist_ok=True)
        report.write(options.output / "results.json")
        written = options.output / "targets.md"
        written.write_text(f"{table.targets(report)}\n", encoding="utf-8")
        for path in (*charts.draw(report, options.output), written):
            print(path)
        print(f"\n{table.targets(report)}")
    else:
        table.compare(_read(options.old), _read(options.new))
    return 0


def _read(path: Path) -> Report:
    try:
        return Report.read(path)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot read the report, which must be JSON that ci/bench wrote: {error}")


def _cases(options: argparse.Namespace) -> list[Case]:
    asked = Options(options.data, options.quick, options.scale, options.engines)
    return [case for name in options.suites or SUITES for case in suite(name).cases(asked)]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure with the installed Polars, and print tables")
    run.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} (default: all)"
    )
    run.add_argument("--quick", action="store_true", help="small sizes, 2 runs, scale 0.1")
    run.add_argument("--runs", type=int, metavar="N", help="of each contender (default: 5)")
    run.add_argument(
        "--scale", type=float, metavar="S", help="of the PDS-H data; 1 is 345 MB (default: 1)"
    )
    run.add_argument(
        "--engines",
        nargs="+",
        choices=ENGINES,
        default=ENGINES,
        help="those of the suite engines (default: all)",
    )
    run.add_argument(
        "--data",
        type=Path,
        default=_DATA,
        metavar="FOLDER",
        help=f"where the PDS-H data is kept (default: {_DATA})",
    )
    run.add_argument(
        "--json", type=Path, required=True, metavar="PATH", help="where the report goes"
    )
    show = commands.add_parser("show", help="join reports into one, and draw charts of it")
    show.add_argument("reports", type=Path, nargs="+", metavar="REPORT")
    show.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where all of it goes"
    )
    compare = commands.add_parser("compare", help="print what got better or worse since a report")
    compare.add_argument("old", type=Path, metavar="OLD")
    compare.add_argument("new", type=Path, metavar="NEW")
    options = parser.parse_args(arguments)
    if options.command == "run":
        if unknown := sorted({*options.suites} - {*SUITES}):
            run.error(f"no such suite: {', '.join(unknown)}; choose from {', '.join(SUITES)}")
        options.runs = options.runs or (2 if options.quick else 5)
        options.scale = options.scale or (0.1 if options.quick else 1)
    return options


if __name__ == "__main__":
    sys.exit(main())
