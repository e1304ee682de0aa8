"""Queries on engines: a process for each pair, which take turns, and a look at their answers."""

from __future__ import annotations

import sys

assert sys.platform == "linux"

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from polars_async.compare.agreement import judge
from polars_async.compare.child import Answer, Prepare, Run
from polars_async.compare.order import order_of
from polars_async.compare.process import MeasurementError, MeasuringProcess
from polars_async.compare.results import EngineRun
from polars_async.errors import PolarsAsyncError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polars_async.compare.agreement import Order
    from polars_async.compare.child import Figures
    from polars_async.compare.entries import Contender, Progress, Query

REFERENCE: Final = "in-memory"
"""The engine whose answers are taken for right, if it takes part."""


def hold(
    queries: Sequence[Query], contenders: Sequence[Contender], runs: int, progress: Progress
) -> list[EngineRun]:
    """Return the result of each query on each engine."""
    turns = (runs + 1) * sum(each.not_run is None for each in contenders)
    results: list[EngineRun] = []
    for place, query in enumerate(queries):

        def advance(what: str, turn: int, query: Query = query, place: int = place) -> None:
            progress(f"{query.name} {what}", place * turns + turn, len(queries) * turns)

        found = {each.engine: each for each in _compare(query, contenders, runs, advance)}
        results += [found.get(each.name) or _unmeasured(query, each) for each in contenders]
    return results


def measure(query: Query, contender: Contender, runs: int) -> tuple[EngineRun, pl.DataFrame | None]:
    """Return the result of a query on one engine, and its answer, if it has any."""
    with ExitStack() as stack:
        entrant = _Entrant(query, contender, stack)
        entrant.prepare()
        for turn in range(runs + 1):
            entrant.run(keeps_answer=turn == runs)
        answer = entrant.answer()
        return entrant.result(), answer


def _unmeasured(query: Query, contender: Contender) -> EngineRun:
    name = contender.name
    if contender.not_run is not None:
        return EngineRun(query=query.name, engine=name, status="not run", message=contender.not_run)
    return EngineRun(query=query.name, engine=name, status="failed", message=query.error)


def _compare(
    query: Query,
    contenders: Sequence[Contender],
    runs: int,
    advance: Callable[[str, int], object],
) -> list[EngineRun]:
    if query.error is not None:
        return []
    with ExitStack() as stack:
        # All processes start at once; later they take turns, so that what else the machine does
        # falls upon each of them.
        running = [each for each in contenders if each.not_run is None]
        advance("starts", 0)
        entrants = [_Entrant(query, each, stack) for each in running]
        for each in entrants:
            each.prepare()
        step = 0
        for turn in range(runs + 1):
            what = f"run {turn} of {runs}" if turn else "warms up"
            for each in entrants[:: 1 if turn % 2 else -1]:  # so that none is always the first
                advance(f"on {each.name}: {what}", step)
                each.run(keeps_answer=turn == runs)
                step += 1
        _judge(entrants, order_of(query.lf))
        return [each.result() for each in entrants]


def _judge(entrants: Sequence[_Entrant], order: Order) -> None:
    """Compare the answers with one of them; no more than two are here at a time."""
    in_order = sorted(entrants, key=lambda each: each.name != REFERENCE)
    reference, expected = None, None
    for each in in_order:
        answer = each.answer()
        if answer is None:
            continue
        if reference is None or expected is None:
            reference, expected = each, answer
        each.judge(reference.name, answer, expected, order)


class _Entrant:
    """A query on an engine, and the process that measures it."""

    def __init__(self, query: Query, contender: Contender, stack: ExitStack) -> None:
        self.name: Final = contender.name
        self._query: Final = query
        self._contender: Final = contender
        self._process: MeasuringProcess | None = None
        self._seconds: list[float] = []
        self._last: Figures | None = None
        self._error: str | None = None
        self._verdict: dict[str, Any] = {}
        self._notes: list[str] = []
        try:
            self._process = MeasuringProcess()
        except (OSError, PolarsAsyncError) as error:
            self._error = f"no process could be started for it ({describe(error)})"
        else:
            stack.callback(self._process.end)

    def prepare(self) -> None:
        """Have the process load the query."""
        self._ask(Prepare(self._query.origin(self._contender)))

    def run(self, *, keeps_answer: bool) -> None:
        """Have the process run the query once; the first run does not count."""
        figures = self._ask(Run(keeps_answer))
        if figures is None:
            return
        if self._last is not None:
            self._seconds.append(figures.seconds)
        self._last = figures

    def answer(self) -> pl.DataFrame | None:
        """Return the answer of the last run; None if there is none, or it cannot be sent."""
        if self._error is not None or self._process is None:
            return None
        try:
            answer: pl.DataFrame = self._process.ask(Answer())
        except MeasurementError as error:
            self._notes.append(f"the answer cannot be compared: {error}")
            return None
        return answer

    def judge(
        self, reference: str, answer: pl.DataFrame, expected: pl.DataFrame, order: Order
    ) -> None:
        """Compare the answer with that of the engine `reference`."""
        try:
            verdict = judge(answer, expected, order)
        except (Exception, pl.exceptions.PanicException) as error:  # noqa: BLE001  # of any type
            self._notes.append(f"the answer cannot be compared: {describe(error)}")
            return
        self._verdict = {
            "agrees": verdict.difference is None,
            "reordered": verdict.is_reordered,
            "compared_with": reference,
        }
        if verdict.difference is not None:
            self._notes.append(verdict.difference)
        elif verdict.is_open:
            self._notes.append("other rows where the limit cuts those of equal keys")

    def result(self) -> EngineRun:
        """Return the result."""
        name, last = self.name, self._last
        if self._error is not None or last is None:
            query = self._query.name
            return EngineRun(query=query, engine=name, status="failed", message=self._error)
        notes = self._notes
        asked = self._contender.request
        if last.ran_on != (asked if isinstance(asked, str) else asked.name):
            notes = [last.message, *notes]
        return EngineRun(
            query=self._query.name,
            engine=name,
            seconds=tuple(self._seconds),
            peak_memory=last.peak_memory,
            rows=last.rows,
            ran_on=last.ran_on,
            message="; ".join(notes) or None,
            **self._verdict,
        )

    def _ask(self, operation: Callable[[], object]) -> Any:
        if self._error is not None or self._process is None:
            return None
        try:
            return self._process.ask(operation)
        except MeasurementError as error:
            self._error = str(error)
            self._process.end()  # its memory is for the others
            return None
