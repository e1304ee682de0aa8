"""What a query tells as it goes: its events, and by the error of a time-out where its time went."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from polars_async._runtime.frames import count_rows
from polars_async.errors import QueryTimeoutError
from polars_async.events import EventKind, new_event, notify_observers
from polars_async.resolution import is_on_gpu
from polars_async.scheduling.counts import State
from polars_async.wording import behind, in_bytes, where

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextvars import Context

    import polars as pl

    from polars_async._runtime.green import Delivery
    from polars_async._runtime.instruments import Listener
    from polars_async.events import Reporter, Tags
    from polars_async.progress import Meter
    from polars_async.resolution import Resolution
    from polars_async.scheduling.times import Times
    from polars_async.wording import Ahead

# How the run of a query that times out ends, as it follows how long the query waited:
GOES_ON: Final = (
    " and ran for {ran}{where}. Polars cannot stop it, so it keeps its slot until it really ends"
)
GOES_ON_FOR_OTHERS: Final = " and ran for {ran}{where}. It goes on, since others wait for it, too"
IS_STOPPED: Final = " and ran for {ran}{where}. It is stopped now"
IS_ASKED_TO_STOP: Final = (
    " and was with its executor for {ran}, which is asked to drop it and may go on with it all the "
    "same"
)


class Run(Protocol):
    """What is known of the run of a query."""

    ahead: Ahead | None
    place: str | None
    meter: Meter | None
    peak_memory: int | None

    def how_it_ends(self, without: Any) -> str:
        """Return which of the above is to be said of the run when the query `without` times out."""
        ...


class Told(Protocol):
    """The query that these functions tell of, as far as they need to know it: see `Query`."""

    id: int
    label: str | None
    tags: Tags | None
    name: str
    is_stream: bool
    runs_engine: bool
    is_inline: bool
    state: State
    resolution: Resolution
    times: Times
    frames: Sequence[pl.LazyFrame]
    context: Context
    reports: bool
    shared_with: int | None
    from_cache: bool
    reporter: Reporter
    listeners: tuple[Listener, ...]
    delivery: Delivery | None

    @property
    def named(self) -> str:
        """What to call it in the middle of a sentence."""
        ...

    @property
    def run_of_it(self) -> Run:
        """What runs for it."""
        ...

    def report(
        self, kind: EventKind, *, result: object = None, error: BaseException | None = None
    ) -> None:
        """Emit the event `kind` by `emit`, unless it is others that tell of it."""
        ...


def emit(query: Told, kind: EventKind, result: object, error: BaseException | None) -> None:
    """Emit the event `kind` of `query`, with no lock held, since hooks and log handlers run."""
    reporter, listeners = query.reporter, _listeners_of(query, kind)
    if not listeners and not reporter.wants(kind):
        return
    times, resolution, run = query.times, query.resolution, query.run_of_it
    event = new_event(
        kind,
        query.id,
        query.label,
        resolution.name,
        times.queue_seconds,
        times.run_seconds,
        # The operation of a stream returns their number.
        result if query.is_stream and isinstance(result, int) else count_rows(result),
        error,
        resolution,
        query.is_inline,
        query.tags or {},
        run.place,
        run.ahead,
        run.peak_memory,
        query.shared_with,
        query.from_cache,
        query.name,
        reporter.executor,
        times.gpu_seconds,
        times.memory_seconds,
    )
    if query.delivery is None:
        reporter(event, listeners, query.context)
    else:
        query.delivery.post(partial(reporter, event, listeners, query.context))


def is_wanted(query: Told, kind: EventKind) -> bool:
    """Return whether anything takes the event `kind` of `query`."""
    return query.reporter.wants(kind) or bool(_listeners_of(query, kind))


def report_queued(query: Told) -> None:
    """Emit the events of a query that is submitted."""
    if query.reports:
        query.report(EventKind.QUEUED)
        if query.resolution.downgraded:
            query.report(EventKind.DOWNGRADED)


def report_rejected(query: Told, error: BaseException) -> None:
    """Emit the event of a query that was not admitted."""
    if query.reports:
        query.report(EventKind.REJECTED, error=error)


def report_engine(query: Told) -> None:
    """Tell observers which engine ran the query, before a waiter can see that it is done."""
    if query.state is State.RUNNING and query.runs_engine:
        notify_observers(query.resolution)


def report_cancelled(query: Told, error: QueryTimeoutError | None) -> None:
    """Emit CANCELLED or TIMED_OUT, and tell observers which engine ran the query until then."""
    if query.frames and query.runs_engine:  # without frames it was still in the queue
        notify_observers(query.resolution)
    kind = EventKind.CANCELLED if query.state is State.CANCELLED else EventKind.TIMED_OUT
    query.report(kind, error=error)


def timeout_error(query: Told, seconds: float) -> QueryTimeoutError:
    """Return the error of `query`, which was not done within so many `seconds`."""
    # Read once: the query may still run, and its text and attributes have to agree.
    waited, ran = query.times.queue_seconds, query.times.run_seconds
    if query.shared_with is not None:
        spent = f"it waited {waited:.3f} s for query {query.shared_with}, whose run it shared"
    else:
        run = query.run_of_it
        there = "" if run.place is None else where(query.resolution, run.place)
        if run.peak_memory is not None:
            there += f", with {in_bytes(run.peak_memory)} at its peak"
        ends = run.how_it_ends(without=query).replace("{where}", there)
        spent = query.times.described(waited, ran, behind(run.ahead), ends)
    message = f"{query.named} was not done after {seconds:g} s: {spent}"
    return QueryTimeoutError(message, seconds, waited, ran)


def _listeners_of(query: Told, kind: EventKind) -> tuple[Listener, ...]:
    # On a GPU a query takes some ms, and may start more than once.
    listeners = query.listeners
    if not listeners or is_on_gpu(query.resolution):
        return listeners
    return tuple([each for each in listeners if kind in each.kinds])
