"""Measures cases: every run of a contender a fresh process, and the contenders take turns."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from os import getloadavg
from pathlib import Path
from typing import TYPE_CHECKING, Final

import polars as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.report.results import Environment, Fault, Ratio, Report, Result, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.report.results import Better

    Figures = Mapping[str, float]

OWN: Final = "polars-async"
NATIVE: Final = "native"
THREADS: Final = "loop's threads"
"""``asyncio.to_thread``, ``trio.to_thread`` or gevent's threadpool, for a synchronous collect."""
ENGINES: Final = ("in-memory", "streaming", "gpu")
_ROOT: Final = Path(__file__).parents[1]


@dataclass(frozen=True)
class Target:
    """What a ratio to `of` should be, or where that is None the figure; `line` is of Polars."""

    row: str
    at_most: float | None = None
    at_least: float | None = None
    of: str | None = NATIVE
    line: str | None = None

    def __str__(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"

    def holds(self, figure: float) -> bool:
        """Tell whether `figure` is within it."""
        if self.at_most is not None:
            return figure <= self.at_most
        return self.at_least is None or figure >= self.at_least


@dataclass(frozen=True)
class Metric:
    """What is measured of every contender of a case."""

    name: str
    unit: str
    better: Better = "lower"
    targets: Sequence[Target] = ()

    @property
    def targets_here(self) -> list[Target]:
        """Those for the Polars that is measured: the first that fits, of each pair."""
        found: dict[str | None, Target] = {}
        for each in self.targets:
            if each.line is None or pl.__version__.startswith(each.line):
                found.setdefault(each.of, each)
        return list(found.values())


@dataclass(frozen=True)
class Options:
    """What the command line asks of a suite; `data` is where the tables of PDS-H are kept."""

    data: Path
    quick: bool = False
    scale: float = 1
    engines: Sequence[str] = ENGINES


@dataclass(frozen=True)
class NotRun:
    """A contender that cannot take part here, and why."""

    contender: str
    why: str


@dataclass(frozen=True)
class Case:
    """One comparison: who takes part, what is measured, and of what size it is."""

    suite: str
    name: str
    contenders: Sequence[str]
    metrics: Sequence[Metric]
    size: Mapping[str, object] = field(default_factory=dict)
    timeout: float = 120
    runs: int | None = None
    """None leaves it to the command line."""
    not_run: Sequence[NotRun] = ()


def measure(cases: Sequence[Case], runs: int, *, quick: bool) -> Report:
    """Run each contender of every case `runs` times, in a process that warms up by itself."""
    environment = Environment.here(quick=quick)
    report = Report()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        total = sum(len(case.contenders) * (case.runs or runs) for case in cases)
        task = progress.add_task("", total=total)
        for case in cases:
            progress.update(task, description=f"{case.suite}: {case.name}")
            _measure(case, case.runs or runs, report, partial(progress.advance, task))
    report.environments.append(replace(environment, load_after=getloadavg()[0]))
    return report


def _measure(case: Case, turns: int, report: Report, advance: Callable[[], None]) -> None:
    figures: dict[str, list[Figures | None]] = {who: [] for who in case.contenders}
    for each in case.not_run:
        why = f"not run: {each.why}"
        report.faults.append(Fault(pl.__version__, case.suite, case.name, each.contender, 0, why))
    for turn in range(1, turns + 1):
        for who in case.contenders[:: 1 if turn % 2 else -1]:  # nobody is always the first
            found, fault = _run(case, who)
            advance()
            figures[who].append(found)
            if fault is not None:
                report.faults.append(Fault(pl.__version__, case.suite, case.name, who, turn, fault))
    for metric in case.metrics:
        for who in case.contenders:
            runs = [each[metric.name] for each in figures[who] if each is not None]
            if runs:
                report.results.append(
                    Result(
                        polars=pl.__version__,
                        suite=case.suite,
                        case=case.name,
                        contender=who,
                        metric=metric.name,
                        unit=metric.unit,
                        better=metric.better,
                        runs=runs,
                        **spread(runs),
                    )
                )
        for target in metric.targets_here or (None,):
            _compare(case, metric, target, figures, report)


def _compare(
    case: Case,
    metric: Metric,
    target: Target | None,
    figures: Mapping[str, Sequence[Figures | None]],
    report: Report,
) -> None:
    """Set polars-async beside native or another, or beside its target where that stands alone."""
    name = metric.name
    against = NATIVE if target is None else target.of
    if OWN not in figures or (against is not None and against not in figures):
        return
    if against is None:
        pairs = [own[name] for own in figures[OWN] if own is not None]
    else:
        pairs = [
            own[name] / other[name]
            for own, other in zip(figures[OWN], figures[against], strict=True)
            if own is not None and other is not None and other[name]
        ]
    if not pairs:
        return
    middle = spread(pairs)
    report.ratios.append(
        Ratio(
            polars=pl.__version__,
            suite=case.suite,
            case=case.name,
            metric=name,
            contender=OWN,
            against=against,
            row=None if target is None else target.row,
            target=None if target is None else str(target),
            holds=None if target is None else target.holds(middle["median"]),
            **middle,
        )
    )


def _run(case: Case, who: str) -> tuple[Figures | None, str | None]:
    """Run one contender once; gives its figures, if any, and what was wrong, if anything."""
    size = json.dumps(case.size)
    command = [sys.executable, "-m", "benchmarks.measure.run_one", case.suite, case.name, who, size]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=case.timeout, check=False, cwd=_ROOT
        )
    except subprocess.TimeoutExpired:
        return None, f"no end after {case.timeout:g} s"
    figures = json.loads(done.stdout) if done.stdout else None
    if not done.returncode:
        return figures, None
    complaints = done.stderr.strip().splitlines() or ["nothing on stderr"]
    # An abort begins with its reason, a traceback ends with it.
    reason = complaints[0 if done.returncode < 0 else -1]
    return figures, f"exit status {done.returncode}: {reason}"
