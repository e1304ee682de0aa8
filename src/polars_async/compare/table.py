"""The text of a comparison: a table, and below it what needs a sentence."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from polars_async.compare.results import EngineRun
    from polars_async.gpu.support import GpuSupport

_NARROWEST: Final = 80
_HEADINGS: Final = ("median", "fastest", "slowest", "ratio", "memory", "rows", "answer")
_WIDTHS: Final = (9, 9, 9, 7, 9, 12)
"""Of all columns of figures, with the gap before each."""
_DIFFERS: Final = "DIFFERS"
_REORDERED: Final = "reordered"
TIMES: Final = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
SIZES: Final = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
"""The units of both, from the largest to the smallest."""


def render(
    results: Sequence[EngineRun], support: Mapping[str, GpuSupport], width: int = 100
) -> str:
    """Return the table of `results`, by query, at most `width` columns wide if that is 80."""
    return "\n".join(_lines(results, support, max(width, _NARROWEST)))


def _lines(
    results: Sequence[EngineRun], support: Mapping[str, GpuSupport], width: int
) -> Iterator[str]:
    tried = [each for each in results if each.status != "not run"]
    name_width = max((len(each.engine) for each in tried), default=0)
    yield _row("", name_width, _HEADINGS)
    answered = {each.query for each in tried if each.status == "ran"}  # the others tell enough
    support = {query: each for query, each in support.items() if query in answered}
    gpu_says = _by_message(support)
    for query, of_query in groupby(tried, lambda each: each.query):
        runs = list(of_query)
        yield query
        reference = next((each for each in runs if each.compared_with == each.engine), None)
        for each in runs:
            yield _row(each.engine, name_width, _cells(each, reference))
        for message in dict.fromkeys(each.message for each in runs if each.message is not None):
            names = ", ".join(each.engine for each in runs if each.message == message)
            yield from _paragraph(f"{names}: {message}", width, 4)
        if len(gpu_says) > 1 and query in support:
            yield from _paragraph(_described(support[query]), width, 4)
    yield from _totals(tried, name_width)
    yield ""
    if any(each.reordered for each in tried):
        yield f"{_REORDERED}: the same rows in another order, which the query leaves open."
    if len(gpu_says) == 1:
        every = "this query" if len(support) == 1 else f"all {len(support)} queries"
        one = next(iter(support.values()))
        yield from _paragraph(_described(one, f" of {every}"), width)
    for name, why in dict.fromkeys(
        (each.engine, each.message) for each in results if each.status == "not run"
    ):
        yield from _paragraph(f"{name}: not run: {why}", width)
    yield from _conclusion(tried, width)


def _totals(tried: Sequence[EngineRun], name_width: int) -> Iterator[str]:
    """Yield the sums of the medians, of all queries that ran on every engine, if several did."""
    engines = list(dict.fromkeys(each.engine for each in tried))
    queries = list(dict.fromkeys(each.query for each in tried))
    failed = {each.query for each in tried if each.median is None}
    whole = [name for name in queries if name not in failed]
    if len(whole) < 2:  # noqa: PLR2004  # of which there is a sum
        return
    yield f"all {len(whole)}" if not failed else f"the {len(whole)} that ran on every engine"
    sums = dict.fromkeys(engines, 0.0)
    peaks = dict.fromkeys(engines, 0)
    for each in tried:
        if each.query not in failed:
            sums[each.engine] += each.median or 0.0
            peaks[each.engine] = max(peaks[each.engine], each.peak_memory or 0)
    reference = next((each.compared_with for each in tried if each.compared_with), engines[0])
    for name in engines:
        ratio = f"{sums[name] / sums[reference]:.2f}"
        yield _row(name, name_width, (duration(sums[name]), "", "", ratio, amount(peaks[name])))


def _cells(run: EngineRun, reference: EngineRun | None) -> tuple[str, ...]:
    if run.median is None or run.min is None or run.max is None:
        return ("failed",)
    ratio = ""
    if reference is not None and reference.median:
        ratio = f"{run.median / reference.median:.2f}"
    memory = "" if run.peak_memory is None else amount(run.peak_memory)
    rows = "" if run.rows is None else f"{run.rows:,}"
    return (*map(duration, (run.median, run.min, run.max)), ratio, memory, rows, _answer(run))


def _answer(run: EngineRun) -> str:
    if run.compared_with == run.engine:
        return "reference"
    same = _REORDERED if run.reordered else "same"
    return {True: same, False: _DIFFERS, None: "unknown"}[run.agrees]


def _row(name: str, name_width: int, cells: Sequence[str]) -> str:
    figures = "".join(map(str.rjust, cells, _WIDTHS))
    text = "".join(f"  {cell}" for cell in cells[len(_WIDTHS) :])
    return f"  {name.ljust(name_width)}{figures}{text}".rstrip()


def _by_message(support: Mapping[str, GpuSupport]) -> set[str]:
    return {_described(each) for each in support.values()}


def _described(support: GpuSupport, of: str = "") -> str:
    return f"GPU support{of}: {support.answer}; {support.message}"


def _conclusion(tried: Sequence[EngineRun], width: int) -> Iterator[str]:
    differ = [f"{each.query} on {each.engine}" for each in tried if each.agrees is False]
    failed = [f"{each.query} on {each.engine}" for each in tried if each.status == "failed"]
    if failed:
        yield from _paragraph(f"{len(failed)} failed: {', '.join(failed)}.", width)
    if differ:
        count = "1 answer DIFFERS" if len(differ) == 1 else f"{len(differ)} answers DIFFER"
        yield from _paragraph(f"{count}: {', '.join(differ)}.", width)
    elif any(each.agrees for each in tried if each.compared_with != each.engine):
        yield "All answers agree." if not failed else "All answers that there are agree."


def _paragraph(text: str, width: int, indent: int = 0) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def duration(seconds: float) -> str:
    """Return a time with its unit, in three digits."""
    unit, size = unit_of(seconds, TIMES)
    return f"{_three_digits(seconds / size)} {unit}"


def amount(size: float) -> str:
    """Return a number of bytes with its unit, in three digits."""
    unit, of = unit_of(size, SIZES)
    return f"{_three_digits(size / of)} {unit}"


def unit_of(value: float, units: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """Return the largest unit that is not larger than `value`, or the smallest, and its size."""
    return next((each for each in units if value >= each[1]), units[-1])


def _three_digits(value: float) -> str:
    digits = 2 if value < 10 else 1 if value < 100 else 0  # noqa: PLR2004  # of decimal numbers
    return f"{value:,.{digits}f}"
