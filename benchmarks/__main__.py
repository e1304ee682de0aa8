"""The benchmarks' command line; ``ci/bench`` sets up what it needs and calls it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.report import charts, table
from benchmarks.report.results import Report
from benchmarks.runner import ENGINES, Options, measure
from benchmarks.suites import SUITES, suite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.runner import Case

_DATA: Final = Path(".cache/data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, with its arguments for None; give the exit status."""
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
        sys.exit(f"give the JSON that ci/bench wrote: {error}")


def _cases(options: argparse.Namespace) -> list[Case]:
    asked = Options(options.data, options.quick, options.scale, options.engines)
    return [case for name in options.suites or SUITES for case in suite(name).cases(asked)]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure the installed Polars, and print a table")
    run.add_argument("suites", nargs="*", metavar="suite", help=f"{', '.join(SUITES)}; all of them")
    run.add_argument("--quick", action="store_true", help="small sizes, 2 runs, scale 0.1")
    run.add_argument("--runs", type=int, help="that count, of each contender (default: 5)")
    run.add_argument("--scale", type=float, help="of PDS-H; 1 is 345 MB (default: 1)")
    run.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    run.add_argument("--data", type=Path, default=_DATA, help="where PDS-H data is kept")
    run.add_argument("--json", type=Path, required=True, help="where to write what was found")
    show = commands.add_parser("show", help="put reports together, and draw charts of them")
    show.add_argument("reports", type=Path, nargs="+")
    show.add_argument("--output", type=Path, required=True, help="the folder for all of it")
    compare = commands.add_parser("compare", help="tell what got better, worse, or neither")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "run":
        unknown = set(options.suites) - set(SUITES)
        if unknown:
            run.error(f"no such suite: {', '.join(sorted(unknown))}; choose of {', '.join(SUITES)}")
        options.runs = options.runs or (2 if options.quick else 5)
        options.scale = options.scale or (0.1 if options.quick else 1)
    return options


if __name__ == "__main__":
    sys.exit(main())
