"""The table that ``ci/bench`` prints: what each contender reached, and whether the targets hold."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks.runner import NATIVE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.report.results import Environment, Ratio, Report, Result


def show(report: Report, console: Console | None = None) -> None:
    """Print a report."""
    console = console or _console()
    for environment in report.environments:
        console.rule(f"Polars {environment.polars}")
        console.print(_described(environment), highlight=False)
        results = [each for each in report.results if each.polars == environment.polars]
        ratios: dict[tuple[str, str, str], list[Ratio]] = {}
        for each in report.ratios:
            if each.polars == environment.polars:
                ratios.setdefault((each.suite, each.case, each.metric), []).append(each)
        for suite, of_suite in groupby(results, lambda each: each.suite):
            console.print(_table(suite, list(of_suite), ratios))
        faults = [each for each in report.faults if each.polars == environment.polars]
        for fault in faults:
            console.print(f"{fault.suite}, {fault.case}: {fault.contender}: {fault.what}")
        held = [each.holds for of in ratios.values() for each in of if each.holds is not None]
        console.print(f"{sum(held)} of {len(held)} targets hold.\n", highlight=False)


def _console() -> Console:
    console = Console()
    # As wide as it takes where nobody looks on.
    return console if console.is_terminal else Console(width=180)


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
    suite: str, results: Sequence[Result], ratios: dict[tuple[str, str, str], list[Ratio]]
) -> Table:
    table = Table(title=suite, title_justify="left", expand=False)
    contenders = list(dict.fromkeys(each.contender for each in results))
    table.add_column("case", min_width=16)
    table.add_column("median [min-max]")
    for contender in contenders:
        table.add_column(contender, justify="right")
    targets = any(ratio.row for key, of in ratios.items() if key[0] == suite for ratio in of)
    if targets:
        for column in ("of native, or as said", "target", ""):
            table.add_column(column, justify="right")
    for case, of_case in groupby(results, lambda result: result.case):
        for row, (metric, of_metric) in enumerate(groupby(of_case, lambda result: result.metric)):
            found = {each.contender: each for each in of_metric}
            unit = next(iter(found.values())).unit
            cells = [spread_of(found[each]) if each in found else "" for each in contenders]
            beside = ratios.get((suite, case, metric), [])
            columns = (_of_other, _target, _verdict) if targets else ()
            more = ["\n".join(map(column, beside)) for column in columns]
            table.add_row("" if row else case, f"{metric}, {unit}", *cells, *more)
        table.add_section()
    return table


def _of_other(ratio: Ratio) -> str:
    if ratio.against is None:
        return ""
    return spread_of(ratio) if ratio.against == NATIVE else f"{spread_of(ratio)} of {ratio.against}"


def _target(ratio: Ratio) -> str:
    return ratio.target or ""


def _verdict(ratio: Ratio) -> str:
    if ratio.row is None:
        return ""
    return f"[green]{ratio.row} holds[/]" if ratio.holds else f"[red]{ratio.row} missed[/]"


def targets(report: Report) -> str:
    """
    Write, as a table in Markdown, what became of each target: on one Polars beside the other.

    Ratios are to Polars' own, or to what is said. Of counts, which are to be 0, the worst case
    stands for all.
    """
    versions = list(dict.fromkeys(each.polars for each in report.environments))
    results = {_place(each): each for each in report.results}
    rows: dict[tuple[str, str, str], dict[str, list[Ratio]]] = {}
    goals: dict[tuple[str, str, str], dict[str, None]] = {}
    for ratio in report.ratios:
        if ratio.row is not None:
            result = results[_place(ratio)]
            what = ratio.metric if result.is_count else f"{ratio.case}: {ratio.metric}"
            unit = f" {result.unit}" if ratio.against is None else ""
            if ratio.against not in (None, NATIVE):
                unit = f" of {ratio.against}"
            key = ratio.row, what, unit
            rows.setdefault(key, {}).setdefault(ratio.polars, []).append(ratio)
            goals.setdefault(key, {})[f"{ratio.target}{unit}"] = None
    lines = [
        f"| | what | target | {' | '.join(versions)} |",
        f"| --- | --- | --- |{' --- |' * len(versions)}",
    ]
    for key, found in sorted(rows.items(), key=lambda item: row_order(item[0][0])):
        row, what, _ = key
        cells = [_worst(found[each]) if each in found else "not run" for each in versions]
        lines.append(f"| {row} | {what} | {', '.join(goals[key])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def row_order(row: str) -> tuple[str, int, str]:
    """Tell where a row of the targets stands: P6b is between P6 and P7, and P10 after P9."""
    number = "".join(filter(str.isdecimal, row))
    return row[0], int(number), row[1 + len(number) :]


def _place(figures: Result | Ratio) -> tuple[str, str, str, str]:
    return figures.polars, figures.suite, figures.case, figures.metric


def _worst(ratios: Sequence[Ratio]) -> str:
    worst = max(ratios, key=lambda ratio: (not ratio.holds, ratio.median))
    return f"{spread_of(worst)} {'✓' if worst.holds else '✗'}"


def spread_of(figures: Result | Ratio) -> str:
    """Write the median, and in brackets the smallest and the largest."""
    middle, low, high = map(number, (figures.median, figures.min, figures.max))
    return middle if low == high else f"{middle} [{low}-{high}]"


def number(figure: float) -> str:
    """Write a figure with three digits that count."""
    if abs(figure) >= 10_000:
        return f"{figure / 1000:.3g}k"
    return f"{figure:.0f}" if figure == 0 or abs(figure) >= 100 else f"{figure:.3g}"


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
