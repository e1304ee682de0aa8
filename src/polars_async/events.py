"""What happened to a query: for hooks, and for the logger ``polars_async``."""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import polars as pl

from polars_async._runtime.logs import complain, is_ctrl_c, log
from polars_async.errors import describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async.resolution import Resolution

observers: Final[list[Callable[[Resolution], object]]] = []
"""Told of each query of the process that has run, or was let go while it did: for test suites."""


class EventKind(enum.StrEnum):
    """What happened. Every query is queued first, and the last of it is one of the last five."""

    QUEUED = "queued"
    """It was handed to the collector."""
    DOWNGRADED = "downgraded"
    """The GPU engine was asked for, and another runs."""
    FELL_BACK = "fell_back"
    """The engine that ran it could not, and the in-memory engine took over."""
    STARTED = "started"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    REJECTED = "rejected"
    """The collector was full or closed."""


_SAID_WITH_REASON: Final = frozenset({EventKind.DOWNGRADED, EventKind.FELL_BACK})
_LEVELS: Final = {
    EventKind.DOWNGRADED: logging.INFO,
    EventKind.FELL_BACK: logging.WARNING,
    EventKind.TIMED_OUT: logging.INFO,
    EventKind.REJECTED: logging.INFO,
}


@dataclass(frozen=True, slots=True)
class QueryEvent:
    """
    One thing that happened to one query.

    Attributes
    ----------
    kind
        What happened.
    query_id
        A number that no other query of this process has.
    label
        What the caller named the query; None if nothing.
    engine
        The name of the engine that runs it.
    queue_seconds
        How long it has waited, or waited, for a slot; 0 for one that was not let in.
    run_seconds
        How long it has run, or ran, without the time that a stream waited for its consumer; None
        for one that did not start.
    rows
        How many rows it gave, over all frames; None before the end, and where it gave none.
    error
        What it failed with, or was refused or ended by; what the GPU engine raised, where it fell
        back; else None.
    resolution
        Which engine runs it, asked for by whom, and why.
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

    def __str__(self) -> str:
        label = f" {self.label!r}" if self.label is not None else ""
        what = self.kind.replace("_", " ")
        parts = [f"query {self.query_id}{label} {what}: {self.engine} engine"]
        if self.kind in _SAID_WITH_REASON and self.resolution.reason is not None:
            parts.append(self.resolution.reason)
        parts.append(f"waited {self.queue_seconds:.3f} s")
        if self.run_seconds is not None:
            parts.append(f"ran {self.run_seconds:.3f} s")
        if self.rows is not None:
            parts.append(f"{self.rows} rows")
        if self.error is not None:
            parts.append(describe(self.error))
        return ", ".join(parts)


def notify_observers(resolution: Resolution) -> None:
    """Tell of a query which engine it was that ran it."""
    for observer in tuple(observers):
        try:
            observer(resolution)
        except Exception:  # noqa: BLE001  # it is to harm no query
            complain("an observer raised at: %s", resolution.message)


class Reporter:
    """Tells the hook of a collector and the logger what happened."""

    __slots__ = ("_on_event",)

    def __init__(self, on_event: Callable[[QueryEvent], object] | None) -> None:
        self._on_event = on_event

    @property
    def listens(self) -> bool:
        """Whether anybody wants to know, which is asked once for each query."""
        return self._on_event is not None or bool(observers) or log.isEnabledFor(logging.INFO)

    def wants(self, kind: EventKind) -> bool:
        """Return whether the hook or the logger takes events of this `kind`."""
        return self._on_event is not None or log.isEnabledFor(_level_of(kind))

    def __call__(self, event: QueryEvent) -> None:
        """Report, with no lock held. What the hook raises is logged and harms no query."""
        try:
            log.log(_level_of(event.kind), "%s", event)
            if self._on_event is not None:
                self._on_event(event)
        except KeyboardInterrupt:
            if is_ctrl_c():
                raise
            complain("the on_event hook was interrupted at: %s", event)
        except BaseException:  # noqa: BLE001  # a worker's thread has to survive whatever it is
            complain("the on_event hook raised at: %s", event)


def _level_of(kind: EventKind) -> int:
    return _LEVELS.get(kind, logging.DEBUG)


def rows_of(result: object) -> int | None:
    """Count the rows of a result, over all its frames; None where it has none."""
    if isinstance(result, pl.DataFrame):
        return result.height
    if isinstance(result, list):
        return sum(rows_of(frame) or 0 for frame in result)
    return result if isinstance(result, int) else None  # a stream counts them itself
