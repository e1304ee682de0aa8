"""The report of `benchmarks.gpu`, in Markdown."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from benchmarks.gpu.pdsh import FIRST

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_LAST_LINES: Final = 25
_TIMES: Final = (FIRST, "gpu s", "in-memory s", "streaming s", "adaptive s")
_SIMULATED: Final = """\
> # SIMULATED
> **No GPU was used, and nothing here says anything about one.** The CPU did the work, behind a
> simulated cudf-polars. This shows only that the checks themselves run."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check."""

    name: str
    title: str
    seconds: float = 0.0
    status: int | None = 0
    """The exit status of its process; None for one that had to be killed."""
    findings: Sequence[Mapping[str, Any]] = ()
    """Each has ``ok``, and either ``what`` and ``found`` or a ``row`` of the table."""
    stderr: str = ""
    other_output: Sequence[str] = ()
    not_run: str | None = None
    """Why it was not run."""

    @property
    def failures(self) -> list[Mapping[str, Any]]:
        """The findings that are not as they should be."""
        return [each for each in self.findings if each["ok"] is False]

    @property
    def died(self) -> str | None:
        """How its process failed; None if it did not."""
        if self.status is None:
            return "was killed at its time limit"
        if self.status < 0:
            return f"died of {signal.Signals(-self.status).name}"
        return f"died, exit status {self.status}" if self.status else None

    @property
    def skipped(self) -> list[str]:
        """The parts that were left out."""
        return [each["found"] for each in self.findings if each.get("skipped")]

    @property
    def passed(self) -> bool:
        """Whether all of it ran, and found nothing wrong."""
        return not (self.not_run or self.died or self.failures or self.skipped)

    @property
    def verdict(self) -> str:
        """The outcome in a few words."""
        if self.not_run:
            return "not run"
        failed = f"{len(self.failures)} of {len(self.findings)} FAILED" if self.failures else None
        died = f"**{self.died}**" if self.died else None
        in_part = "in part" if self.skipped else None
        return ", ".join(filter(None, [died, failed or (None if died else "passed"), in_part]))


def text(outcomes: Sequence[Outcome], *, began: str, simulated: bool) -> str:
    """Return the report."""
    return "\n".join(_lines(outcomes, began, simulated=simulated))


def _lines(outcomes: Sequence[Outcome], began: str, *, simulated: bool) -> Iterator[str]:
    yield "# polars-async on a GPU\n"
    if simulated:
        yield f"{_SIMULATED}\n"
    if (unusable := unusable_gpu(outcomes)) is not None:
        yield f"> **No GPU is usable here, so nothing was checked:** {unusable}\n"
    yield f"Begun {began}.\n"
    yield "| check | verdict | seconds |"
    yield "| --- | --- | ---: |"
    for each in outcomes:
        seconds = "" if each.not_run else f"{each.seconds:.1f}"
        yield f"| {each.title} | {each.verdict} | {seconds} |"
    yield "\n## What was not run\n"
    yield from list(_missing(outcomes)) or ["Nothing: every check ran to its end."]
    for each in outcomes:
        if not each.not_run:
            yield from _section(each)
    yield "\nThe PDS-H queries are derived from TPC-H, and not comparable to published results."


def unusable_gpu(outcomes: Sequence[Outcome]) -> str | None:
    """Return why no GPU is usable, if so."""
    facts = outcomes[0].findings if outcomes else ()
    return next((str(each["found"]) for each in facts if "status" in each and not each["ok"]), None)


def _missing(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for why, group in groupby(outcomes, lambda each: each.not_run):
        if why:
            yield f"- {', '.join(each.title for each in group)}: {why}"
    for each in outcomes:
        if each.died:
            yield f"- {each.title}: only in part: its process {each.died}"
        for what in each.skipped:
            yield f"- {each.title}: {what}"


def _section(outcome: Outcome) -> Iterator[str]:
    yield f"\n## {outcome.title}: {outcome.verdict}\n"
    rows = [each["row"] for each in outcome.findings if "row" in each]
    sentences = [each for each in outcome.findings if "row" not in each]
    for each in sentences:
        mark = {True: "ok: ", False: "**FAILED**: ", None: ""}[each["ok"]]
        yield f"- {mark}{each['what']}: {each['found']}"
    if rows:
        if sentences:
            yield ""
        yield from _table(rows)
        yield from _totals(rows)
    if outcome.died:
        yield f"\nIts process {outcome.died}. The last lines of its stderr:\n"
        yield "```text"
        yield from outcome.stderr.splitlines()[-_LAST_LINES:] or ["(empty)"]
        yield "```"


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    digits = {name: _digits([row[name] for row in rows if name in row]) for name in columns}
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' if digits[name] is None else '---:' for name in columns)} |"
    for row in rows:
        yield f"| {' | '.join(_cell(row.get(name, ''), digits[name]) for name in columns)} |"


def _digits(values: Sequence[object]) -> int | None:
    """Return how many decimals a column needs; None if it does not hold floats."""
    if not all(isinstance(value, float) for value in values):
        return None
    return max(len(str(value).partition(".")[2]) for value in values)


def _cell(value: object, digits: int | None) -> str:
    if isinstance(value, float) and digits is not None:
        return f"{value:.{digits}f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _totals(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    on_gpu = [row for row in rows if FIRST in row and row["ran on"] == "gpu"]
    if not on_gpu:
        return
    totals = (f"{name} {sum(row[name] for row in on_gpu):.2f}" for name in _TIMES)
    yield f"\nTotal of the {len(on_gpu)} queries that ran on the GPU: {'; '.join(totals)}."
    yield (
        "\nThe first time includes what the GPU does only once; the other columns are medians of "
        "three more rounds, in which the engines take turns."
    )
