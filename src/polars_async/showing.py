"""Progress bars of queries."""

from __future__ import annotations

import atexit
from collections.abc import Collection
from contextlib import suppress
from math import fsum
from typing import TYPE_CHECKING, Any, Final, TypeVar

from polars_async._runtime.green import leaving_no_hub
from polars_async._runtime.logs import complain
from polars_async._runtime.unpatched import SimpleQueue, allocate_lock, start_new_thread, when_put
from polars_async.bridges.waiting import Onlooker
from polars_async.drawing import Bar, drawing
from polars_async.scheduling.describing import progress_of
from polars_async.streams import Completions
from polars_async.watches import Watchable, check_every
from polars_async.wording import in_bytes, in_seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polars_async.drawing import Drawing
    from polars_async.progress import Progress
    from polars_async.scheduling.query import Query

T = TypeVar("T")

_MOST_BARS: Final = 8
"""Queries that have a bar each; more of them share one."""
_SURELY_BEGUN: Final = 0.5
"""Seconds after which it is told of a query that its rows are not counted."""
_LAST_DRAWING: Final = 0.3
"""Seconds that the end of a query waits, at most, until it is drawn."""


def show_progress(shown: T, *, every: float = 0.1) -> T:
    """
    Draw how far queries are, until they are done, and return what was given, at once.

    In a notebook of Jupyter the bars are in the output of the cell; in a terminal they are on
    stderr, by rich or tqdm, whichever is installed. Elsewhere nothing is drawn. Up to eight queries
    have a bar each; more of them share one. What counts the rows is explained at
    `QueryHandle.progress`: without ``progress=True`` the first queries have a bar without a length,
    unless the session is interactive.

    Parameters
    ----------
    shown
        A handle, or a collection of them; what `as_completed` or `collect_batches_async` returns.
    every
        Seconds between two drawings.

    Returns
    -------
    object
        `shown` itself: ``df = await show_progress(collect_async(lf))``.

    Raises
    ------
    TypeError
        `shown` is none of these.
    ValueError
        `every` is no number of seconds above 0.
    ImportError
        This is a terminal, and neither rich nor tqdm is installed.
    """
    check_every(every)
    queries = list(_queries_of(shown))
    for query in queries:
        query.want_progress()
    target = drawing() if queries else None
    if target is not None:
        _Display(queries, target, every).start()
    return shown


def _queries_of(shown: object) -> Iterable[Query[Any]]:
    if isinstance(shown, Watchable):
        return [shown._query]  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # its own
    if isinstance(shown, Completions):
        return shown.left()
    if isinstance(shown, Collection) and not isinstance(shown, (str, bytes)):
        return [query for each in shown for query in _queries_of(each)]
    raise TypeError(
        "show_progress() takes a handle, a collection of handles, or the stream that "
        f"as_completed() or collect_batches_async() returns, got {shown!r}"
    )


class _Display:
    """The bars of some queries, drawn by a thread of their own until all of these are done."""

    def __init__(self, queries: Sequence[Query[Any]], target: Drawing, every: float) -> None:
        self._queries = queries
        self._target = target
        self._every = every
        self._wakeup: SimpleQueue[None] = SimpleQueue()
        self._is_over = allocate_lock()
        self._is_over.acquire()
        self._is_closed = False

    def start(self) -> None:
        """Start the thread."""
        onlooker = _Onlooker(self)
        atexit.register(self.close)
        start_new_thread(self._run, ())
        for query in self._queries:
            query.add_waiter(onlooker)
        self._wakeup.put(None)  # for queries that were done before

    def note_end(self) -> None:
        """
        Have the last end drawn before this returns, if that takes no time.

        The calling thread then wakes the task that waits for the query, and that may well print.
        """
        # From the last one, which mostly ends last: of many, few are looked at each time.
        if all(query.done for query in reversed(self._queries)):
            self._wakeup.put(None)
            self._await_end()

    def close(self) -> None:
        """End it, as when the program ends."""
        self._is_closed = True
        self._wakeup.put(None)
        self._await_end()

    def _await_end(self) -> None:
        if self._is_over.acquire(timeout=_LAST_DRAWING):
            self._is_over.release()

    @leaving_no_hub
    def _run(self) -> None:
        try:
            is_done = False
            while not is_done and not self._is_closed:
                # Looked at before the drawing, which so is the last only if it shows all ends.
                is_done = all(query.done for query in self._queries)
                self._target.draw(_bars_of(self._queries))
                if not is_done:
                    when_put(self._wakeup, self._every)
            self._target.end()
        except BaseException:  # noqa: BLE001  # a terminal that is gone must not cost more than this
            complain("the progress of queries cannot be drawn")
        finally:
            self._is_over.release()
            with suppress(Exception):
                atexit.unregister(self.close)
            self._queries = ()


class _Onlooker(Onlooker):
    def __init__(self, display: _Display) -> None:
        self._display = display

    def wake(self) -> None:
        self._display.note_end()


def _bars_of(queries: Sequence[Query[Any]]) -> list[Bar]:
    progresses = [progress_of(query) for query in queries]
    if len(queries) > _MOST_BARS:
        return [_bar_of_all(progresses)]
    return [_bar_of(query, each) for query, each in zip(queries, progresses, strict=True)]


def _bar_of(query: Query[Any], progress: Progress) -> Bar:
    told: list[str] = []
    if progress.state != "running":
        told.append(progress.state.replace("_", " "))
    if progress.state != "waiting":
        told.append(in_seconds(progress.seconds))
    told += _amounts(progress.rows, progress.bytes)
    if progress.operator is not None:
        told.append(progress.operator)
    if progress.seconds > _SURELY_BEGUN and query.is_counted and query.run_of_it.meter is None:
        told.append("not counted since it began before, see progress= of Collector")
    return Bar(query.label or f"query {query.id}", progress.fraction, ", ".join(told))


def _bar_of_all(progresses: Sequence[Progress]) -> Bar:
    done = sum(each.has_ended for each in progresses)
    fractions = [1.0 if each.has_ended else each.fraction or 0.0 for each in progresses]
    rows = sum(each.rows or 0 for each in progresses)
    read = sum(each.bytes or 0 for each in progresses)
    told = [f"{done} of {len(progresses)} done", *_amounts(rows or None, read or None)]
    return Bar("queries", fsum(fractions) / len(fractions), ", ".join(told))


def _amounts(rows: int | None, read: int | None) -> list[str]:
    amounts = [] if rows is None else [f"{rows:,} rows"]
    return amounts if read is None else [*amounts, in_bytes(read)]
