"""
Tiny queries beside heavy ones, memory under load, PDS-H at once, and exits, beside Polars' own.

``python -m benchmarks.load``, in an environment with the group ``bench`` of pyproject.toml. Every
run of a contender is a fresh process, and the contenders take turns; what is printed is the median
with the smallest and the largest, and the ratio run by run. ``P6`` and so on are the rows of the
project's targets.

P6: 8 heavy queries at once, and a tiny one every 5 ms until they are done. P7: 64 sorts of one
frame at once. P8: the 22 PDS-H queries at once. R3: interpreters that exit with queries running.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import exits, report
from benchmarks.contenders import NATIVE, OWN, process
from benchmarks.pdsh import data

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ROWS: Final = ("p6", "p7", "p8", "r3")


@dataclass(frozen=True)
class Figure:
    """A line of the table: which of a contender's figures, and what the ratio should be."""

    key: str
    what: str
    unit: str
    target: str = ""
    digits: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a process gave: its figures, if it came so far, and what went wrong, if anything."""

    figures: Mapping[str, float] | None
    fault: str | None = None


_FIGURES: Final = {
    "p6": [
        Figure("p50", "tiny beside 8 heavy, p50", "ms", digits=1),
        Figure("p99", "tiny beside 8 heavy, p99", "ms", "<= 0.2", digits=1),
        Figure("max", "tiny beside 8 heavy, max", "ms", digits=1),
        Figure("number", "tiny beside 8 heavy, number", ""),
        Figure("seconds", "8 heavy beside tiny, finished", "s", "<= 0.9", digits=2),
    ],
    "p7": [
        Figure("before", "64 sorts, RSS before", "MB"),
        Figure("peak", "64 sorts, peak RSS", "MB", "<= 0.3"),
        Figure("seconds", "64 sorts, finished", "s", "<= 1.0", digits=2),
    ],
    "p8": [
        Figure("before", "22 PDS-H queries, RSS before", "MB"),
        Figure("peak", "22 PDS-H queries, peak RSS", "MB", "<= 0.6"),
        Figure("seconds", "22 PDS-H queries, finished", "s", "<= 1.0", digits=2),
    ],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for and print its figures."""
    options = _options(arguments)
    contenders = [NATIVE, OWN, *(f"{OWN} max_running={number}" for number in options.max_running)]
    size = "quick" if options.quick else "full size"
    report.head(f"{options.runs} runs, {size}, PDS-H at scale {options.scale:g}")
    for row in _ROWS if "all" in options.rows else options.rows:
        if row == "r3":
            exits.compare(contenders, options.exits)
            continue
        outcomes: dict[str, list[Outcome]] = {contender: [] for contender in contenders}
        size = _size(row, options)
        for run in range(options.runs):
            for contender in contenders[:: -1 if run % 2 else 1]:  # nobody is always the first
                outcomes[contender].append(_run(row, contender, size, options.timeout))
        _report(row, outcomes)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "rows", nargs="*", choices=[*_ROWS, "all"], default="all", help="default: all"
    )
    parser.add_argument("--runs", type=int, default=5, help="of each contender (default: 5)")
    parser.add_argument(
        "--quick", action="store_true", help="1/20 of the rows, scale 0.1, 10 exits"
    )
    parser.add_argument("--scale", type=float, help="of PDS-H; 1 is 345 MB (default: 1)")
    parser.add_argument("--exits", type=int, help="in each state (default: 200)")
    parser.add_argument(
        "--max-running",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="adds contenders: collectors that run so many queries at a time",
    )
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds that a process may take (default: 300)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(".cache/data"),
        metavar="FOLDER",
        help="where PDS-H data is kept for the next time (default: .cache/data)",
    )
    options = parser.parse_args(arguments)
    options.scale = options.scale or (0.1 if options.quick else 1)
    options.exits = options.exits or (10 if options.quick else 200)
    return options


def _size(row: str, options: Any) -> str:
    if row == "p8":
        return str(data.make(options.scale, options.data).absolute())
    rows = {"p6": 6_000_000, "p7": 2_000_000}[row]
    return str(rows // 20 if options.quick else rows)


def _run(row: str, contender: str, size: str, timeout: float) -> Outcome:
    done = process("contenders", row, contender, size, timeout=timeout)
    if done is None:
        return Outcome(None, f"no end after {timeout:g} s")
    figures = json.loads(done.stdout) if done.stdout else None
    if not done.returncode:
        return Outcome(figures)
    complaints = done.stderr.strip().splitlines() or ["nothing on stderr"]
    # An abort begins with its reason, a traceback ends with it.
    reason = complaints[0 if done.returncode < 0 else -1]
    return Outcome(figures, f"exit status {done.returncode}: {reason}")


def _report(row: str, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    native, own, *others = outcomes
    for figure in _FIGURES[row]:
        for contender in (own, *others):
            first = contender == own
            report.line(
                row.upper() if first else "",
                figure.what if first else f"  {contender}",
                _cell(figure, outcomes[native]) if first else "",
                _cell(figure, outcomes[contender]),
                _ratio(figure.key, outcomes[native], outcomes[contender]),
                figure.target if first else "",
            )
    for contender, each in outcomes.items():
        for number, outcome in enumerate(each, 1):
            if outcome.fault:
                print(f"{row.upper():>4} {contender}, run {number} of {len(each)}: {outcome.fault}")


def _cell(figure: Figure, outcomes: Sequence[Outcome]) -> str:
    figures = [outcome.figures[figure.key] for outcome in outcomes if outcome.figures]
    return report.spread(figures, figure.unit, figure.digits) if figures else "failed"


def _ratio(key: str, native: Sequence[Outcome], own: Sequence[Outcome]) -> str:
    ratios = [
        one.figures[key] / other.figures[key]
        for other, one in zip(native, own, strict=True)
        if one.figures and other.figures
    ]
    return report.spread(ratios, digits=2) if ratios else ""


if __name__ == "__main__":
    sys.exit(main())
