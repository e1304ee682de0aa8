"""The tables that ``ci/bench`` prints: the figures of the contenders, and which targets hold."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.contenders import POLARS, POLARS_ASYNC, names_engine

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from benchmarks.report.results import Environment, Ratio, Report, Result

    Ratios = Mapping[tuple[str, str, str], Sequence[Ratio]]


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
        for of_table in _by_table(results):
            console.print(_table(of_table, ratios))
        if others := [each for of in ratios.values() for each in of if _is_between_others(each)]:
            console.print(_other_ratios(others))
        for error in report.errors:
            if error.polars == environment.polars:
                console.print(f"{error.suite}, {error.case}: {error.contender}: {error.what}")
        held = [each.holds for of in ratios.values() for each in of if each.holds is not None]
        console.print(f"{sum(held)} of {len(held)} targets hold.\n", highlight=False)


def _console() -> Console:
    console = Console()
    # In a file, as wide as the tables are.
    return console if console.is_terminal else Console(width=180)


def _described(environment: Environment) -> str:
    memory = "" if environment.memory is None else f", {environment.memory / 2**30:.0f} GiB"
    load = f"load {environment.load_before or 0:.1f} to {environment.load_after or 0:.1f}"
    quick = "\nA quick run: sizes too small for reliable figures." if environment.quick else ""
    return (
        f"{environment.processors} processors ({environment.processor}){memory}, Python "
        f"{environment.python}, {environment.begun}, {load}{quick}"
    )


def _by_table(results: Iterable[Result]) -> Iterator[list[Result]]:
    """Yield the results of each suite, and by themselves those of cases that compare engines."""
    for _, found in groupby(results, lambda each: (each.suite, names_engine(each.contender))):
        yield list(found)


def _is_between_others(ratio: Ratio) -> bool:
    """Return whether the pair of a ratio is not that of the columns of a table."""
    return ratio.contender != POLARS_ASYNC


def _other_ratios(ratios: Sequence[Ratio]) -> Table:
    title = Text("ratios of other pairs")
    table = Table("case", "metric", "target", "ratio", "", "", title=title, title_justify="left")
    for case, of_case in groupby(ratios, lambda ratio: ratio.case):
        for row, each in enumerate(of_case):
            figures = spread_of(each), _limit(each), _verdict(each)
            table.add_row("" if row else case, each.metric, each.target, *figures)
        table.add_section()
    return table


def _table(results: Sequence[Result], ratios: Ratios) -> Table:
    suite = results[0].suite
    table = Table(title=Text(f"{suite}: median [smallest-largest]"), title_justify="left")
    contenders = list(dict.fromkeys(each.contender for each in results))
    table.add_column("case", min_width=16)
    table.add_column("metric")
    for contender in contenders:
        table.add_column(contender, justify="right")
    cases = {each.case for each in results}
    targets = any(
        ratio.target and not _is_between_others(ratio)
        for key, of in ratios.items()
        if key[0] == suite and key[1] in cases
        for ratio in of
    )
    if targets:
        for column in (f"ratio to {POLARS}", "target", ""):
            table.add_column(column, justify="right")
    for case, of_case in groupby(results, lambda result: result.case):
        for row, (metric, of_metric) in enumerate(groupby(of_case, lambda result: result.metric)):
            found = {each.contender: each for each in of_metric}
            unit = next(iter(found.values())).unit
            cells = [spread_of(found[each]) if each in found else "" for each in contenders]
            beside = ratios.get((suite, case, metric), [])
            columns = (_ratio, _limit, _verdict) if targets else ()
            more = ["\n".join(map(column, beside)) for column in columns]
            table.add_row("" if row else case, f"{metric}, {unit}", *cells, *more)
        table.add_section()
    return table


def _ratio(ratio: Ratio) -> str:
    return "" if ratio.against is None else f"{spread_of(ratio)}{_to_other(ratio)}"


def _to_other(ratio: Ratio) -> str:
    """Return whom a ratio is to, where that is neither Polars' own nor in the target's name."""
    own = ratio.against is None or ratio.against.startswith(POLARS)
    return "" if own or _is_between_others(ratio) else f" (to {ratio.against})"


def _limit(ratio: Ratio) -> str:
    return ratio.limit or ""


def _verdict(ratio: Ratio) -> str:
    if ratio.target is None:
        return ""
    return "[green]holds[/]" if ratio.holds else "[red]missed[/]"


def targets(report: Report) -> str:
    """
    Return a table in Markdown with a row for each target, and a column for each version of Polars.

    A target that several cases share, as the counts do, is shown for the worst of them.
    """
    versions = list(dict.fromkeys(each.polars for each in report.environments))
    units = {_key(each): each.unit for each in report.results}
    rows: dict[str, dict[str, list[Ratio]]] = {}
    limits: dict[str, dict[str, None]] = {}
    for ratio in report.ratios:
        if ratio.target is not None:
            unit = f" {units[_key(ratio)]}" if ratio.against is None else _to_other(ratio)
            rows.setdefault(ratio.target, {}).setdefault(ratio.polars, []).append(ratio)
            limits.setdefault(ratio.target, {})[f"{ratio.limit}{unit}"] = None
    lines = [
        f"| ratio to {POLARS}, or figure with a unit | target | {' | '.join(versions)} |",
        f"| --- | --- |{' --- |' * len(versions)}",
    ]
    for what, found in rows.items():
        cells = [_held(worst(found[each])) if each in found else "not run" for each in versions]
        lines.append(f"| {what} | {', '.join(limits[what])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _key(figures: Result | Ratio) -> tuple[str, ...]:
    return figures.polars, figures.suite, figures.case, figures.contender, figures.metric


def _held(ratio: Ratio) -> str:
    return f"{spread_of(ratio)} {'✓' if ratio.holds else '✗'}"


def worst(ratios: Iterable[Ratio]) -> Ratio:
    """Return the ratio that misses its target by most, or else holds it by least."""

    def badness(ratio: Ratio) -> tuple[bool, float]:
        higher_is_better = (ratio.limit or "").startswith(">=")
        return not ratio.holds, -ratio.median if higher_is_better else ratio.median

    return max(ratios, key=badness)


def spread_of(figures: Result | Ratio) -> str:
    """Return the median as text, with the smallest and the largest in brackets."""
    middle, low, high = map(number, (figures.median, figures.min, figures.max))
    return middle if low == high else f"{middle} [{low}-{high}]"


def number(figure: float) -> str:
    """Return a figure as text, with three significant digits."""
    if abs(figure) >= 10_000:
        return f"{figure / 1000:.3g}k"
    return f"{figure:.0f}" if figure == 0 or abs(figure) >= 100 else f"{figure:.3g}"


def compare(old: Report, new: Report, console: Console | None = None) -> None:
    """Print the results that are in both reports, and which of them got better or worse."""
    console = console or _console()
    before = {_series_key(each): each for each in old.results}
    after = {_series_key(each): each for each in new.results}
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
            console.print(f"not in the {name} report: {each.case}, {each.contender}, {each.metric}")


def change(old: Result, new: Result) -> str:
    """Return ``better``, ``worse``, or, if the two spreads overlap, ``within noise``."""
    if new.min <= old.max and old.min <= new.max:
        return "within noise"
    return "better" if (new.median < old.median) is (new.better == "lower") else "worse"


def _series_key(result: Result) -> tuple[str, ...]:
    # By the release series of Polars, so that a newer release can be compared with an older one.
    return result.polars.split(".")[0], *_key(result)[1:]


def _missing(
    some: dict[tuple[str, ...], Result], others: dict[tuple[str, ...], Result]
) -> Iterable[Result]:
    return [each for key, each in some.items() if key not in others]
