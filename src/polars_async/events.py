"""What happened to a query: for hooks, and for the logger ``polars_async``."""

from __future__ import annotations

import enum
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from polars_async._runtime.instruments import Attached
from polars_async._runtime.logs import complain, is_ctrl_c, log
from polars_async.errors import describe
from polars_async.resolution import engine_text
from polars_async.wording import how_shared, summarize

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from polars_async._runtime.instruments import Listener
    from polars_async.resolution import Resolution
    from polars_async.wording import Ahead

Tags: TypeAlias = Mapping[str, str | int | float | bool]
"""What a caller says of a query by ``tags=``: names and their values."""

_slow_log: Final = logging.getLogger("polars_async.slow")

observers: Final[list[Callable[[Resolution], object]]] = []
"""
Called with the resolution of each query of the process that has run, or was cancelled or timed out
while it ran: for test suites.
"""


class EventKind(enum.StrEnum):
    """What happened to a query: QUEUED is its first event, and one of the last five its last."""

    QUEUED = "queued"
    """The query was submitted to the collector."""
    DOWNGRADED = "downgraded"
    """The GPU engine was requested, and another engine runs."""
    RETRIED = "retried"
    """The memory of the GPU did not suffice, and it tries the query again, with smaller
    partitions."""
    FELL_BACK = "fell_back"
    """The GPU engine failed, and the in-memory engine runs the query."""
    STARTED = "started"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    REJECTED = "rejected"
    """The collector was full or closed."""


_ENDS: Final = frozenset(
    {
        EventKind.FINISHED,
        EventKind.FAILED,
        EventKind.CANCELLED,
        EventKind.TIMED_OUT,
        EventKind.REJECTED,
    }
)
_KINDS_WITH_REASON: Final = frozenset({EventKind.DOWNGRADED, EventKind.FELL_BACK})
_LEVELS: Final = {
    EventKind.DOWNGRADED: logging.INFO,
    EventKind.RETRIED: logging.WARNING,
    EventKind.FELL_BACK: logging.WARNING,
    EventKind.TIMED_OUT: logging.INFO,
    EventKind.REJECTED: logging.INFO,
}


@dataclass(frozen=True, slots=True)
class QueryEvent:
    """
    An event of one query.

    Attributes
    ----------
    kind
        What happened.
    query_id
        The number of the query, unique in this process.
    label
        The ``label=`` of the query; None without one.
    engine
        The name of the engine that runs the query; ``"none"`` for a function given to ``run``.
    queue_seconds
        How long the query waited for a slot, so far; 0 if it was rejected.
    run_seconds
        How long the query ran, so far, without the time that a stream waited for its consumer;
        None if it did not start.
    rows
        The number of rows of the result, over all its frames; None before the end, and for results
        without rows.
    error
        The error of a query that failed, timed out or was rejected; that of the GPU engine, if the
        query fell back, or is tried again; else None.
    resolution
        Which engine runs the query, requested by whom, and why.
    inline
        Whether the query runs on the thread that submitted it, since it is known to be quick: see
        ``inline=`` of `Collector`. False before STARTED.
    tags
        The ``tags=`` of the query; empty without any.
    place
        Where the query runs: ``"worker 4711"`` of a process; None for a thread of this process, and
        before it runs.
    ahead
        How many queries, running and waiting, were before it when it was put into the queue; None
        if it was not. Of one that shares a run, those that were before that.
    peak_memory
        The most memory that the query took so far, in bytes; None if that is not known.
    shared_with
        The ``query_id`` of the equal query whose run, or kept result, this one shares; None of one
        that runs itself.
    from_cache
        Whether that result was kept from before: see ``cache=`` of `Collector`.
    operation
        What the query does: ``"collect"``, ``"collect_all"``, ``"batches"``, ``"sink"``,
        ``"schema"`` or ``"run"``.
    executor
        Where its collector runs queries: ``"threads"``, ``"processes"``, ``"auto"``, or the name of
        the class of an executor of the caller's.
    gpu_seconds
        How long the GPU tried the query in vain, which is a part of `queue_seconds`; None if it did
        not.
    memory_seconds
        How much of `queue_seconds` the query waited for memory alone: see ``max_memory=`` of
        `Collector`.
    """

    kind: EventKind
    query_id: int
    label: str | None
    engine: str
    queue_seconds: float
    run_seconds: float | None
    rows: int | None
    error: BaseException | None
    resolution: Resolution
    inline: bool = False
    tags: Tags = field(default_factory=dict, hash=False)
    place: str | None = None
    ahead: Ahead | None = None
    peak_memory: int | None = None
    shared_with: int | None = None
    from_cache: bool = False
    operation: str = "collect"
    executor: str = "threads"
    gpu_seconds: float | None = None
    memory_seconds: float = 0.0

    @property
    def summary(self) -> str:
        """What took the query how long so far, in one sentence; composed when it is asked for."""
        end: str | None = None
        if self.kind is EventKind.FAILED and self.error is not None:
            end = f"failed by {describe(self.error)}"
        elif self.kind in _ENDS and self.kind is not EventKind.FINISHED:
            end = f"was {self.kind}" if self.kind is not EventKind.TIMED_OUT else "timed out"
        return summarize(
            waited=self.queue_seconds,
            ran=self.run_seconds,
            resolution=self.resolution,
            ahead=self.ahead,
            place=self.place,
            inline=self.inline,
            peak_memory=self.peak_memory,
            gpu_seconds=self.gpu_seconds,
            memory_seconds=self.memory_seconds,
            shared=how_shared(self.shared_with, from_cache=self.from_cache),
            end=end,
        )

    def __str__(self) -> str:
        label = f" {self.label!r}" if self.label is not None else ""
        what = self.kind.replace("_", " ")
        parts = [f"query {self.query_id}{label} {what}: {engine_text(self.engine)}"]
        if self.kind in _KINDS_WITH_REASON and self.resolution.reason is not None:
            parts.append(self.resolution.reason)
        parts.append(f"waited {self.queue_seconds:.3f} s")
        if self.run_seconds is not None:
            parts.append(f"ran {self.run_seconds:.3f} s{' inline' if self.inline else ''}")
        if (shared := how_shared(self.shared_with, from_cache=self.from_cache)) is not None:
            parts.append(shared)
        if self.rows is not None:
            parts.append(f"{self.rows} rows")
        if self.error is not None:
            parts.append(describe(self.error))
        parts += [f"{name}={value!r}" for name, value in self.tags.items()]
        return ", ".join(parts)


_Draft: Final[Any] = make_dataclass(
    "_Draft", [each.name for each in fields(QueryEvent)], slots=True
)


def new_event(*values: object) -> QueryEvent:
    """Return an event with the `values` of all its fields, in their order."""
    # In 0.3 us, and not in 1.4: the initializer of a frozen class sets each field by a call. A
    # class with the same slots, which is not frozen, can become it.
    event = _Draft(*values)
    event.__class__ = QueryEvent
    return event  # type: ignore[no-any-return]


def notify_observers(resolution: Resolution) -> None:
    """Call the observers with the `resolution` of a query that has run."""
    for observer in tuple(observers):
        try:
            observer(resolution)
        except Exception:  # noqa: BLE001  # an observer must not fail the query
            complain("an observer raised at: %s", resolution.message)


class Reporter:
    """
    Passes events to the logger, to the hook of one collector, and to listeners.

    The logger ``polars_async.slow`` is told, at their end, of queries that took `slow` seconds or
    more. `progress` says whether what queries read is counted: None for from when it is asked for,
    which in an interactive session is at once.
    """

    __slots__ = ("_may_count", "_of_collector", "_on_event", "_slow", "counts", "executor")

    def __init__(
        self,
        on_event: Callable[[QueryEvent], object] | None,
        executor: str = "threads",
        slow: float | None = None,
        progress: bool | None = None,  # noqa: FBT001
    ) -> None:
        self._on_event = on_event
        self._of_collector: tuple[Listener, ...] = ()
        self.executor = executor
        """As for `QueryEvent`."""
        self._slow = slow
        self._may_count = progress is not False
        self.counts = hasattr(sys, "ps1") if progress is None else progress
        """Whether what queries read is counted."""

    def want_counts(self) -> None:
        """Have what queries read be counted, unless that was ruled out."""
        self.counts = self._may_count

    @property
    def listens(self) -> bool:
        """Whether anything takes any event; read once for each query."""
        return (
            self._on_event is not None
            or self._slow is not None
            or bool(observers)
            or bool(Attached.listeners)
            or bool(self._of_collector)
            or log.isEnabledFor(logging.INFO)
        )

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """
        The listeners of the process and of the collector; read once for each query.

        So each listener is told of a query from its first event to its last, or not at all.
        """
        return Attached.listeners + self._of_collector

    def add(self, listener: Listener) -> None:
        """Have `listener` told of the queries that are submitted to the collector from now on."""
        self._of_collector = (*self._of_collector, listener)

    def remove(self, listener: Listener) -> None:
        """Have `listener` not told of queries that are submitted from now on."""
        self._of_collector = tuple(each for each in self._of_collector if each is not listener)

    def wants(self, kind: EventKind) -> bool:
        """Return whether the hook or a logger takes events of this `kind`."""
        return (
            self._on_event is not None
            or (self._slow is not None and kind in _ENDS)
            or log.isEnabledFor(_level_of(kind))
        )

    def __call__(self, event: QueryEvent, listeners: tuple[Listener, ...], of: Context) -> None:
        """Tell `event` to the listeners, the loggers and the hook, with no lock held."""
        # The hook is the last: Ctrl-C in it ends this, and listeners would not learn of an end.
        for listener in listeners:
            _call("an instrument", listener, event, of)
        _call("the on_event hook", self._log_and_hook, event)

    def _log_and_hook(self, event: QueryEvent) -> None:
        log.log(_level_of(event.kind), "%s", event)
        if self._slow is not None and event.kind in _ENDS:
            _log_slow(event, self._slow)
        if self._on_event is not None:
            self._on_event(event)


def _call(what: str, function: Callable[..., object], event: QueryEvent, *more: object) -> None:
    """Call a function of others, and log its error: it must not cost a query its result."""
    try:
        function(event, *more)
    except KeyboardInterrupt:
        if is_ctrl_c():
            raise
        complain("%s was interrupted at: %s", what, event)
    except BaseException:  # noqa: BLE001  # SystemExit, too, must not end a worker thread
        complain("%s raised at: %s", what, event)


def _log_slow(event: QueryEvent, slow: float) -> None:
    """Log an `event` that is the last of a query, if that took `slow` seconds or more."""
    if event.queue_seconds + (event.run_seconds or 0.0) >= slow:
        label = f" {event.label!r}" if event.label is not None else ""
        tags = "".join(f", {name}={value!r}" for name, value in event.tags.items())
        _slow_log.warning("query %d%s was slow: %s%s", event.query_id, label, event.summary, tags)


def _level_of(kind: EventKind) -> int:
    return _LEVELS.get(kind, logging.DEBUG)
