"""
``engine="adaptive"``: the engine that is expected to be the fastest for a query.

A query is chosen for when its cost is estimated, or else when it starts, on a worker thread: its
plan has to be read for that. At first sight the size of what it reads decides, after that the time
of its like on each engine. Now and then, while nothing else runs, another engine is tried: if it is
never measured, it can never be chosen.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple

from polars_async._runtime.fork import new_lock
from polars_async._runtime.upstream import DEFAULT_ENGINE, memory_held
from polars_async.resolution import engine_object, runs
from polars_async.scheduling.estimates import MUCH_HELD

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import polars as pl

    from polars_async.resolution import Resolution
    from polars_async.scheduling.estimates import CostModel, Sources

_IN_MEMORY: Final = "in-memory"
_STREAMING: Final = "streaming"
_GPU: Final = "gpu"
_ON_CPU: Final = (_IN_MEMORY, _STREAMING)

_LARGE: Final = 1 << 21
_LARGE_SCAN: Final = 1 << 18
"""Bytes, in memory or in files, from which on the streaming engine is faster or about as fast, and
below which it takes up to ten times as long."""
_FASTER: Final = 0.8
"""Another engine is chosen if it takes less than this share of the time: those of about the same
speed take no turns."""
_KEPT: Final = 8
"""Of so many of the last runs on each engine the fastest counts: what slows a run down, such as
another process, does not tell of the engine."""
_RUNS_BEFORE: Final = 8
"""Runs on one engine before another one is tried for the first time."""
_COST_OF_TRIES: Final = 0.02
"""The share of the time that tries of a slower engine may cost."""
_MOST_RUNS_BEFORE: Final = 10_000
_LONGEST_TRY: Final = 5.0
"""Seconds that a query may take if another engine is to be tried for it."""
_LARGEST_TRY: Final = 1 << 28
"""Bytes that a query may read if another engine is to be tried: that may take much more memory."""
_MOST_SHAPES: Final = 4096


class Choice(NamedTuple):
    """The engine for one query."""

    engine: str
    why: str
    shape: int | None = None
    """What its time tells of; None if of nothing."""


class _Shape:
    """What the queries of one shape and size took on each engine."""

    __slots__ = ("engine", "pause", "runs", "seconds")

    def __init__(self, engine: str) -> None:
        self.engine = engine
        """The one that is chosen."""
        self.seconds: dict[str, deque[float]] = {}
        self.runs = 0
        """On `engine`, since it was chosen or another one was tried."""
        self.pause = _RUNS_BEFORE
        """After so many of these another one may be tried."""

    def best(self, engine: str) -> float | None:
        """Return the fewest seconds of the last runs on `engine`; None without one."""
        measured = self.seconds.get(engine)
        return min(measured) if measured else None

    def note(self, engine: str, seconds: float, *, alone: bool) -> None:
        """Add a run, and choose anew."""
        best = self.best(engine)
        # Beside others it may have taken longer than by itself, but never less.
        if alone or best is None or seconds < best:
            self.seconds.setdefault(engine, deque(maxlen=_KEPT)).append(seconds)
        if engine == self.engine:
            self.runs += 1
        now = self.best(self.engine)
        if now is None:
            return
        faster = min(self.seconds, key=lambda each: self.best(each) or 0.0)
        if (self.best(faster) or 0.0) < _FASTER * now:
            self.engine, self.runs, self.pause = faster, 0, _RUNS_BEFORE
        elif engine != self.engine:  # a try that was not worth it
            lost = int(min(seconds / now / _COST_OF_TRIES, _MOST_RUNS_BEFORE))
            self.runs, self.pause = 0, max(min(2 * self.pause, _MOST_RUNS_BEFORE), lost)

    def reason(self, engine: str) -> str:
        """Return in figures why `engine` is chosen, or tried."""
        here = self.best(engine)
        others = ((other, self.best(other)) for other in self.seconds if other != engine)
        return ", ".join(
            [
                "a try" if here is None else f"{_duration(here)} here",
                *(f"{other} {_duration(best)}" for other, best in others if best is not None),
            ]
        )


_QUICK: Final = Choice(_IN_MEMORY, "it is known to be quick")


class EngineTimes:
    """
    The times of each shape of query on each engine, and the choice by them.

    It knows no clock and no query, so that a test can simulate any course of them.
    """

    def __init__(self) -> None:
        self._shapes: dict[int, _Shape] = {}
        self._lock = new_lock()

    def choose(self, shape: int, first: Choice, engines: Sequence[str], *, may_try: bool) -> Choice:
        """
        Return the choice among `engines` for a query of `shape`: `first` if nothing is known of it.

        `may_try` says whether an engine may be tried now that may be slower.
        """
        with self._lock:
            known = self._shapes.get(shape)
            if known is None or known.engine not in engines:
                return first._replace(shape=shape)
            engine, now = known.engine, known.best(known.engine)
            if may_try and known.runs >= known.pause and now is not None and now <= _LONGEST_TRY:
                others = (each for each in engines if each != engine)
                # Those that were never measured first.
                engine = min(others, key=lambda each: known.best(each) or 0.0, default=engine)
            return Choice(engine, known.reason(engine), shape)

    def note(self, choice: Choice, seconds: float, *, alone: bool) -> None:
        """Note that the query of `choice` took so many `seconds`, `alone` or beside others."""
        shape = choice.shape
        if shape is None:
            return
        with self._lock:
            known = self._shapes.get(shape)
            if known is None:
                known = self._shapes[shape] = _Shape(choice.engine)
                if len(self._shapes) > _MOST_SHAPES:
                    del self._shapes[next(iter(self._shapes))]
            known.note(choice.engine, seconds, alone=alone)


class Chooser:
    """
    Chooses the engines of the queries of one collector.

    `ask_gpu` returns the resolution of a query on the GPU, if it may run there.
    """

    def __init__(
        self,
        costs: CostModel,
        ask_gpu: Callable[[Sequence[pl.LazyFrame], Sources], Resolution | None],
    ) -> None:
        self._costs = costs
        self._ask_gpu = ask_gpu
        self._times = EngineTimes()
        # The last resolution before the choice, and after it, of a quick query: both at once, since
        # the threads of several loops use them.
        self._quick: tuple[Resolution, Resolution] | None = None

    def choose(
        self,
        resolution: Resolution,
        frames: Sequence[pl.LazyFrame],
        *,
        is_idle: bool,
        on_gpu: bool,
    ) -> tuple[Choice, Resolution]:
        """
        Choose the engine of a query for `frames`; return the choice, and what `resolution` becomes.

        `is_idle` says that no other query runs or waits, and `on_gpu` that the query may run on the
        GPU. Reading the plan may take some ms.
        """
        sources = self._costs.sources(frames)
        choice, there = at_first_sight(sources), None
        if sources.shape is not None and not sources.runs_python:
            engines: Sequence[str] = _ON_CPU
            if on_gpu and (there := self._ask_gpu(frames, sources)) is not None:
                engines, choice = (*_ON_CPU, _GPU), choice._replace(engine=_GPU)
            may_try = is_idle and sources.size is not None and sources.size <= _LARGEST_TRY
            choice = self._times.choose(sources.shape, choice, engines, may_try=may_try)
        return choice, chosen(resolution, choice, there if choice.engine == _GPU else None)

    def note(self, choice: Choice, seconds: float, *, alone: bool) -> None:
        """Note that the query of `choice` took so many `seconds`, `alone` or beside others."""
        self._times.note(choice, seconds, alone=alone)

    def instead_of(self, choice: Choice) -> Choice:
        """Note that the engine of `choice`, the GPU, failed; return what runs the query instead."""
        self._times.note(choice, inf, alone=True)
        return choice._replace(engine=_IN_MEMORY)

    def for_quick(self, resolution: Resolution) -> tuple[Choice, Resolution]:
        """Return the choice for a query known to be quick, and what `resolution` becomes."""
        quick = self._quick
        if quick is None or quick[0] is not resolution:
            quick = self._quick = resolution, chosen(resolution, _QUICK)
        return _QUICK, quick[1]


def at_first_sight(sources: Sources) -> Choice:
    """Return the choice for a query of which nothing was measured."""
    if sources.runs_python:
        return Choice(DEFAULT_ENGINE, "Polars' default, since the query runs Python functions")
    size = sources.size
    if size is not None:
        is_large = size >= (_LARGE_SCAN if sources.scans else _LARGE)
        return Choice(_STREAMING if is_large else _IN_MEMORY, f"it reads {_amount(size)}")
    if sources.scans:
        return Choice(_STREAMING, "it scans what may be large")
    unknown = "how much the query reads of what is in memory is unknown"
    if memory_held() > MUCH_HELD:
        return Choice(_STREAMING, f"{unknown}, and much is")
    return Choice(_IN_MEMORY, f"{unknown}, and little is")


def chosen(resolution: Resolution, choice: Choice, on_gpu: Resolution | None = None) -> Resolution:
    """Return the resolution of a query for which `choice` was made; `on_gpu` is that of the GPU."""
    name = choice.engine
    engine = engine_object(name) if on_gpu is None else on_gpu.engine
    gpu = None if on_gpu is None else on_gpu.gpu
    message = f"{runs(name)}: {choice.why}"
    if resolution.reason is not None:  # an affinity that names no engine
        message = f"{resolution.message}. Here {message}"
    return replace(resolution, engine=engine, name=name, message=message, gpu=gpu)


def _amount(size: int) -> str:
    return _in_units(size, {1e9: "GB", 1e6: "MB", 1e3: "kB", 1: "bytes"})


def _duration(seconds: float) -> str:
    if seconds == inf:
        return "failed"
    return _in_units(seconds, {1: "s", 1e-3: "ms", 1e-6: "us"})


def _in_units(number: float, units: dict[float, str]) -> str:
    """Return `number` with two digits or more, in the first of the units that it exceeds."""
    unit = next((each for each in units if number >= each), min(units))
    return f"{float(f'{number / unit:.2g}'):g} {units[unit]}"
