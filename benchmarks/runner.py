"""Runs cases: each run of a contender is a fresh process, and the contenders take turns."""

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

from benchmarks.contenders import ENGINES, POLARS, POLARS_ASYNC
from benchmarks.report.results import Environment, Ratio, Report, Result, RunError, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.report.results import Better
    from benchmarks.targets import Target

    Figures = Mapping[str, float]

_ROOT: Final = Path(__file__).parents[1]


@dataclass(frozen=True)
class Metric:
    """What is measured of every contender of a case; `targets` are those of polars-async."""

    name: str
    unit: str
    better: Better = "lower"
    targets: Mapping[str, Target] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """The options of the command line that suites use; `data` is the folder of the PDS-H data."""

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
    """One comparison: its contenders, its metrics, and its size, which `run` of the suite takes."""

    suite: str
    name: str
    contenders: Sequence[str]
    metrics: Sequence[Metric]
    size: Mapping[str, object] = field(default_factory=dict)
    timeout: float = 120
    runs: int | None = None
    """How many of each contender; None for the option of the command line."""
    not_run: Sequence[NotRun] = ()


def measure(cases: Sequence[Case], runs: int, *, quick: bool) -> Report:
    """Run each contender of each case `runs` times; return the report."""
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
    for each in case.not_run:
        report.errors.append(_error(case, each.contender, 0, f"not run: {each.why}"))
    figures = _figures(case, turns, report, advance)
    for metric in case.metrics:
        for who in case.contenders:
            runs = [each[metric.name] for each in figures[who] if each is not None]
            if runs:
                report.results.append(_result(case, metric, who, runs))
        _compare(case, metric, figures, report)


def _figures(
    case: Case, turns: int, report: Report, advance: Callable[[], None]
) -> dict[str, list[Figures | None]]:
    figures: dict[str, list[Figures | None]] = {who: [] for who in case.contenders}
    for turn in range(1, turns + 1):
        for who in case.contenders[:: 1 if turn % 2 else -1]:  # so that none is always the first
            found, error = _run(case, who)
            advance()
            figures[who].append(found)
            if error is not None:
                report.errors.append(_error(case, who, turn, error))
    return figures


def _compare(
    case: Case,
    metric: Metric,
    figures: Mapping[str, Sequence[Figures | None]],
    report: Report,
) -> None:
    """Add the ratios of polars-async to those that the targets are for, or else to Polars' own."""
    targets: list[tuple[str | None, Target | None]] = [*metric.targets.items()]
    for name, target in targets or [(None, None)]:
        who, against = (POLARS_ASYNC, POLARS) if target is None else (target.who, target.of)
        if against is None:
            ratios = [own[metric.name] for own in figures.get(who, ()) if own is not None]
        else:
            ratios = [
                own[metric.name] / other[metric.name]
                for own, other in zip(figures.get(who, ()), figures.get(against, ()), strict=False)
                if own is not None and other is not None and other[metric.name]
            ]
        if ratios:
            report.ratios.append(_ratio(case, metric, ratios, (who, against), name, target))


def _error(case: Case, who: str, run: int, what: str) -> RunError:
    return RunError(pl.__version__, case.suite, case.name, who, run, what)


def _result(case: Case, metric: Metric, who: str, runs: Sequence[float]) -> Result:
    return Result(
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


def _ratio(
    case: Case,
    metric: Metric,
    ratios: Sequence[float],
    pair: tuple[str, str | None],
    name: str | None,
    target: Target | None,
) -> Ratio:
    middle = spread(ratios)
    return Ratio(
        polars=pl.__version__,
        suite=case.suite,
        case=case.name,
        metric=metric.name,
        contender=pair[0],
        against=pair[1],
        target=name,
        limit=None if target is None else str(target),
        holds=None if target is None else target.holds(middle["median"]),
        **middle,
    )


def _run(case: Case, who: str) -> tuple[Figures | None, str | None]:
    """Run one contender once; return its figures, if any, and what went wrong, if anything."""
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
    # The reason of an abort is its first line, that of a traceback its last.
    reason = complaints[0 if done.returncode < 0 else -1]
    return figures, f"exit status {done.returncode}: {reason}"
