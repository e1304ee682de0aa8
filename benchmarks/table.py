"""The table that ``ci/bench`` prints: what each contender reached, and whether the targets hold."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.results import Environment, Ratio, Report, Result


def show(report: Report, console: Console | None = None) -> None:
    """Print a report."""
    console = console or _console()
    for environment in report.environments:
        console.rule(f"Polars {environment.polars}")
        console.print(_described(environment), highlight=False)
        results = [each for each in report.results if each.polars == environment.polars]
        ratios = {
            (each.suite, each.case, each.metric): each
            for each in report.ratios
            if each.polars == environment.polars
        }
        for suite, of_suite in groupby(results, lambda each: each.suite):
            console.print(_table(suite, list(of_suite), ratios))
        faults = [each for each in report.faults if each.polars == environment.polars]
        for fault in faults:
            console.print(f"{fault.suite}, {fault.case}: {fault.contender}: {fault.what}")
        held = [each.holds for each in ratios.values() if each.holds is not None]
        console.print(f"{sum(held)} of {len(held)} targets hold.\n", highlight=False)


def _console() -> Console:
    console = Console()
    # As wide as it takes where nobody looks on.
    return console if console.is_terminal else Console(width=160)


def _described(environment: Environment) -> str:
    memory = "" if environment.memory is None else f", {environment.memory / 2**30:.0f} GiB"
    load = (
        f"load {environment.load_before or 0:.1f} before, {environment.load_after or 0:.1f} after"
    )
    quick = ", quick: figures that say little" if environment.quick else ""
    return (
        f"{environment.processors} processors ({environment.processor}){memory}, Python "
        f"{environment.python}, {environment.begun}, {load}{quick}"
    )


def _table(
    suite: str, results: Sequence[Result], ratios: dict[tuple[str, str, str], Ratio]
) -> Table:
    table = Table(title=suite, title_justify="left", expand=False)
    for column in ("case", "metric", "contender"):
        table.add_column(column, overflow="fold")
    for column in ("median [min - max]", "of native", "target", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for (case, metric), each in groupby(results, lambda result: (result.case, result.metric)):
        ratio = ratios.get((suite, case, metric))
        for row, result in enumerate(each):
            own = ratio if ratio is not None and result.contender == ratio.contender else None
            table.add_row(
                case if not row else "",
                metric if not row else "",
                result.contender,
                f"{spread_of(result)} {result.unit}",
                spread_of(own) if own is not None and own.against is not None else "",
                (own.target or "") if own is not None else "",
                _verdict(own),
            )
        table.add_section()
    return table


def _verdict(ratio: Ratio | None) -> str:
    if ratio is None or ratio.row is None:
        return ""
    return f"[green]{ratio.row} holds[/]" if ratio.holds else f"[red]{ratio.row} missed[/]"


def spread_of(figures: Result | Ratio) -> str:
    """Write the median, and in brackets the smallest and the largest."""
    middle, low, high = map(number, (figures.median, figures.min, figures.max))
    return middle if low == high else f"{middle} [{low} - {high}]"


def number(figure: float) -> str:
    """Write a figure with three digits that count."""
    if figure == 0 or abs(figure) >= 100:
        return f"{figure:,.0f}"
    return f"{figure:.3g}"


def compare(old: Report, new: Report, console: Console | None = None) -> None:
    """Print what got better, worse, or differs by less than its spread."""
    console = console or _console()
    before = {_key(each): each for each in old.results}
    after = {_key(each): each for each in new.results}
    table = Table("Polars", "case", "contender", "metric", "old", "new", "new / old", "")
    for key, each in after.items():
        other = before.get(key)
        if other is None:
            continue
        ratio = number(each.median / other.median) if other.median else ""
        verdict = change(other, each)
        colour = {"better": "green", "worse": "red"}.get(verdict, "dim")
        cells = spread_of(other), f"{spread_of(each)} {each.unit}", ratio
        table.add_row(
            each.polars, each.case, each.contender, each.metric, *cells, f"[{colour}]{verdict}[/]"
        )
    console.print(table)
    for name, missing in (("new", _missing(before, after)), ("old", _missing(after, before))):
        for each in missing:
            console.print(f"not in the {name} one: {each.case}, {each.contender}, {each.metric}")


def change(old: Result, new: Result) -> str:
    """Tell whether a result got ``better``, ``worse``, or is ``within noise``: the spreads meet."""
    if new.min <= old.max and old.min <= new.max:
        return "within noise"
    return "better" if (new.median < old.median) is (new.better == "lower") else "worse"


def _key(result: Result) -> tuple[str, ...]:
    # By the line of Polars: a newer one is what may be compared.
    line = result.polars.split(".")[0]
    return line, result.suite, result.case, result.contender, result.metric


def _missing(
    some: dict[tuple[str, ...], Result], others: dict[tuple[str, ...], Result]
) -> Iterable[Result]:
    return [each for key, each in some.items() if key not in others]
