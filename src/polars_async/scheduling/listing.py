"""What runs and waits in a collector, as records made when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import floor
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from polars_async._runtime.unpatched import holding
from polars_async.resolution import engine_text
from polars_async.scheduling.describing import progress_of
from polars_async.wording import how_shared, in_bytes, in_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polars_async.events import Tags
    from polars_async.progress import Progress
    from polars_async.scheduling.admission import Admission
    from polars_async.scheduling.query import Query

QueryState: TypeAlias = Literal["waiting", "running", "paused", "abandoned"]
"""What a listed query does: see `QueryInfo`."""

_THREAD: Final = "thread"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryInfo:
    """
    One query that waits or runs, as it was when `Collector.queries` was called.

    Attributes
    ----------
    id
        The number of the query, unique in this process: `Collector.cancel` takes it.
    label, tags
        The ``label=`` and ``tags=`` of the query; None and empty without any.
    state
        ``"waiting"`` in the queue; ``"running"``; ``"paused"``, a stream that waits for its
        consumer; or ``"abandoned"``, cancelled or timed out, and holding its slot until it ends.
    engine
        The name of the engine that runs it; ``"adaptive"`` as long as none was chosen.
    submitted
        When it was submitted, in UTC.
    waited, ran
        Seconds in the queue and of running so far; the latter None if it has not started.
    place
        Where it runs: ``"thread"`` of this process, ``"worker 4711"`` for the process of that
        number, ``"GPU 0"``, or the class of the caller's executor; None if it has not started.
    memory
        The most memory that it took so far, in bytes; None if that is not known.
    progress
        How far it is, where that is counted: see `QueryHandle.progress`; else None.
    shared_with
        The number of the equal query whose run it waits for, and so needs no slot; else None.
    """

    id: int
    label: str | None
    tags: Tags
    state: QueryState
    engine: str
    submitted: datetime
    waited: float
    ran: float | None
    place: str | None
    memory: int | None
    progress: Progress | None
    shared_with: int | None = None

    def __str__(self) -> str:
        label = f" {self.label!r}" if self.label is not None else ""
        parts = [f"query {self.id}{label}, {self.state}, {engine_text(self.engine)}"]
        if self.place is not None:
            parts.append(self.place)
        parts.append(f"waited {in_seconds(self.waited)}")
        if self.ran is not None:
            parts.append(f"ran {in_seconds(self.ran)}")
        if (shared := how_shared(self.shared_with)) is not None:
            parts.append(shared)
        if self.memory is not None:
            parts.append(in_bytes(self.memory))
        if self.progress is not None and self.progress.fraction is not None:
            parts.append(f"{floor(100 * self.progress.fraction)} % read")
        parts += [f"{name}={value!r}" for name, value in self.tags.items()]
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"<QueryInfo: {self}>"


def states_of(admissions: Sequence[Admission]) -> dict[Query[Any], str]:
    """Return the queries of `admissions`, which share a lock, in their order; and their states."""
    # In one hold of the lock: a query that falls back goes from one to the other.
    listed = holding(admissions[0].lock, _states_of, admissions)
    return dict(sorted(listed.items(), key=lambda each: each[0].id))


def info_of(query: Query[Any], state: str) -> QueryInfo:
    """Return the record of a query in a `state` that `states_of` tells."""
    times, started = query.times, query.times.started is not None
    age = timedelta(seconds=perf_counter() - times.submitted)
    told: Any = "abandoned" if query.done else state
    run = query.run_of_it
    return QueryInfo(
        id=query.id,
        label=query.label,
        tags=query.tags or {},
        state=told,
        engine=query.resolution.name,
        submitted=datetime.now(UTC) - age,
        waited=times.queue_seconds,
        ran=times.run_seconds,
        place=(run.place or _THREAD) if started else None,
        memory=run.peak_memory,
        progress=None if run.meter is None else progress_of(query),
        shared_with=query.shared_with,
    )


def _states_of(admissions: Sequence[Admission]) -> dict[Query[Any], str]:
    states: dict[Query[Any], str] = {}
    for admission in admissions:
        for query, state in admission.states().items():
            states |= query.listed(state)
    return states
