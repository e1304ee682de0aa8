"""
What the benchmarks should reach: one table, by what is measured.

A target is for the ratio of polars-async to Polars' own, in the same case and pair by pair of runs,
unless it says otherwise; the last part of its name is the engine that both run. Counts of faults
should be 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import polars as pl

from benchmarks.contenders import (
    ADAPTIVE,
    CPU_ENGINES,
    DASK,
    DEFAULT_ENGINE,
    HAS_INLINE,
    POLARS,
    POLARS_ASYNC,
    POLARS_ASYNC_LIMITED,
    POLARS_ASYNC_NOT_INLINE,
    POLARS_ASYNC_ONE,
    POLARS_ASYNC_THREADS,
    THREADS_SEMAPHORE,
    on,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Target:
    """A limit: for the ratio of `who` to `of`, or for the figure of `who` if `of` is None."""

    at_most: float | None = None
    at_least: float | None = None
    of: str | None = POLARS
    who: str = POLARS_ASYNC

    def __str__(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"

    def holds(self, figure: float) -> bool:
        """Return whether `figure` is within the limit."""
        if self.at_most is not None:
            return figure <= self.at_most
        return self.at_least is None or figure >= self.at_least


_NONE: Final = Target(at_most=0, of=None)


def _of_mix() -> dict[str, Target]:
    found = {}
    for engine in CPU_ENGINES:
        who, native = on(POLARS_ASYNC, engine), on(POLARS, engine)
        semaphore = on(THREADS_SEMAPHORE, engine)
        found[f"mix, mean slowdown, {engine}"] = Target(at_most=0.3, of=native, who=who)
        found[f"mix, p50 of each size, {engine}"] = Target(at_most=1, of=native, who=who)
        beside = f"mix, p50 of each size beside {THREADS_SEMAPHORE}, {engine}"
        found[beside] = Target(at_most=1, of=semaphore, who=who)
    return found


def _of_adaptive() -> dict[str, Target]:
    """Return the targets of the engine that is chosen, beside each engine of Polars' own."""
    who = on(POLARS_ASYNC, ADAPTIVE)
    limits = {
        "in-memory": {"beside, tiny p99": 0.02, "beside, heavy finished": 0.5},
        "streaming": {"beside, tiny p99": 1, "beside, heavy finished": 1.1},
    }
    for engine in CPU_ENGINES:
        limits[engine] |= {"PDS-H, finished": 1, "PDS-H, peak RSS": 0.6, "mix, mean slowdown": 0.2}
    found = {
        f"adaptive, {what} beside {engine}": Target(limit, of=on(POLARS, engine), who=who)
        for engine, of_engine in limits.items()
        for what, limit in of_engine.items()
    }
    trip = 0.3 if DEFAULT_ENGINE == "in-memory" else 0.1
    of = on(POLARS, DEFAULT_ENGINE)
    return found | {"tiny query, round trip, asyncio, adaptive": Target(trip, of=of, who=who)}


def _of_inline() -> dict[str, Target]:
    who = POLARS_ASYNC_NOT_INLINE
    found = {
        "tiny query, round trip, asyncio, inline=0, in-memory": Target(at_most=1, who=who),
        "tiny queries gathered, asyncio, inline=0, in-memory": Target(at_least=1.8, who=who),
    }
    for beside in ("6 heavy", "eager work"):
        for loop in ("asyncio", "gevent"):
            name = f"longest stall, tiny beside {beside}, {loop}, in-memory"
            found[name] = Target(at_most=1, of=who)
    return found


# On Polars 1.44, its own `collect_all_async` blocks the loop until all queries are done.
_STALL_OF_ALL: Final = Target(at_most=0.1 if pl.__version__.startswith("1.44") else 1)


def _of_memory() -> dict[str, Target]:
    who = POLARS_ASYNC_LIMITED
    found = {}
    for executor in ("threads", "processes"):
        found[f"limited sorts, finished, {executor}"] = Target(1.3, of=POLARS_ASYNC, who=who)
        found[f"limited sorts, peak, {executor}"] = Target(1.1, of=None, who=who)
    return found


TARGETS: Final[Mapping[str, Target]] = {
    "tiny query, round trip, asyncio, in-memory": Target(at_most=0.3),
    "tiny queries gathered, asyncio, in-memory": Target(at_least=3.5),
    "tiny query, round trip, gevent, in-memory": Target(at_most=0.35),
    "tiny queries gathered, gevent, in-memory": Target(at_least=3),
    "tiny query, round trip, asyncio, streaming": Target(at_most=0.65),
    "tiny queries gathered, asyncio, streaming": Target(at_least=1.5),
    **(_of_inline() if HAS_INLINE else {}),
    "longest stall, 6 collect_async, asyncio, in-memory": Target(at_most=1),
    "longest stall, 6 collect_async, gevent, in-memory": Target(at_most=1),
    "longest stall, collect_all_async, asyncio, in-memory": _STALL_OF_ALL,
    "longest stall, collect_all_async, gevent, in-memory": _STALL_OF_ALL,
    "resolve_engine": Target(at_most=5, of=None),
    "import of polars_async": Target(at_most=20, of=None),
    "tiny p99 beside heavy, in-memory": Target(at_most=0.2),
    "heavy finished beside tiny, in-memory": Target(at_most=1),
    "tiny p99 beside heavy, executor auto, in-memory": Target(at_most=0.02),
    "64 sorts at once, peak RSS, in-memory": Target(at_most=0.3),
    "64 sorts at once, finished, in-memory": Target(at_most=1),
    "PDS-H at once, peak RSS, in-memory": Target(at_most=0.6),
    "PDS-H at once, finished, in-memory": Target(at_most=1),
    **_of_mix(),
    **_of_adaptive(),
    **_of_memory(),
    "32 sources that sleep, in-memory": Target(at_most=1.2),
    "32 scans over HTTP, in-memory": Target(at_most=1.2),
    **{
        f"100 equal heavy queries at once, {engine}": Target(at_most=1.15, of=POLARS_ASYNC_ONE)
        for engine in CPU_ENGINES
    },
    **{
        f"added to a query without an equal, {source}, in-memory": Target(at_most=15, of=None)
        for source in ("frame", "file")
    },
    "cancelled query in a process, until idle, p50": Target(at_most=20, of=None),
    "cancelled query in a process, until idle, p99": Target(at_most=250, of=None),
    "tiny query in a process, round trip": Target(at_most=1, of=None),
    "tiny query in a process, round trip beside dask": Target(at_most=0.25, of=DASK),
    "PDS-H in processes beside threads": Target(at_most=1.1, of=POLARS_ASYNC_THREADS),
    "queries unresolved after a fault": _NONE,
    "lines on stderr after cancellations, time-outs, closed loops": _NONE,
    "exits: aborts": _NONE,
    "exits: wrong statuses": _NONE,
    "exits: lines on stderr": _NONE,
    "exits: hangs": _NONE,
    "workers killed: unresolved": _NONE,
    "workers killed: others harmed": _NONE,
    "workers killed: pool not back to size": _NONE,
    "workers killed: processes left": _NONE,
    "workers killed: shared memory left": _NONE,
    "parents killed: processes left": _NONE,
    "parents killed: shared memory left": _NONE,
}


def targets(*names: str) -> dict[str, Target]:
    """Return the targets of these names; a metric has none, one or several."""
    return {name: TARGETS[name] for name in names}
