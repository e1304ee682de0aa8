"""What a process does that measures one query on one engine."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, cast

import polars as pl

from polars_async._runtime.machine import forget_peak_memory, peak_memory
from polars_async.collector import Collector
from polars_async.compare.file import import_file
from polars_async.compare.values import leaves
from polars_async.resolution import engine_name

if TYPE_CHECKING:
    from pathlib import Path

    from polars_async.resolution import EngineRequest


class Origin(Protocol):
    """Where a process has its query and its engine from."""

    def load(self) -> tuple[pl.LazyFrame, EngineRequest]:
        """Return the query and the engine."""
        ...


@dataclass(frozen=True, slots=True)
class Sent:
    """They are sent to the process."""

    lf: pl.LazyFrame
    engine: EngineRequest | bytes
    """Bytes are a pickle of it."""

    def load(self) -> tuple[pl.LazyFrame, EngineRequest]:
        """Return the query and the engine."""
        if isinstance(self.engine, bytes):
            return self.lf, pickle.loads(self.engine)  # noqa: S301  # of the parent
        return self.lf, self.engine


@dataclass(frozen=True, slots=True)
class OfFile:
    """The process imports a file that has the query, and the engine if that is no name of one."""

    path: Path
    name: str
    engine: str
    has_engine: bool

    def load(self) -> tuple[pl.LazyFrame, EngineRequest]:
        """Return the query and the engine."""
        module = import_file(self.path)
        engine: EngineRequest
        engine = getattr(module, self.engine) if self.has_engine else engine_name(self.engine)
        query: Any = getattr(module, self.name)
        lf = query() if callable(query) else query
        return cast("pl.LazyFrame", lf), engine


class Figures(NamedTuple):
    """One run of a query."""

    seconds: float
    peak_memory: int | None
    """The most bytes of memory that this process has had since it was prepared."""
    rows: int
    ran_on: str
    """The name of the engine that has run it in the end."""
    message: str
    """Why that one, as the resolution says."""


class _Process:
    """What this process measures."""

    lf: pl.LazyFrame
    engine: EngineRequest
    collector: Collector
    answer: pl.DataFrame | None = None


_STDOUT: Final = 1
_STDERR: Final = 2


@dataclass(frozen=True, slots=True)
class Prepare:
    """Have the query and the engine ready in this process."""

    origin: Origin

    def __call__(self) -> None:
        """Load them."""
        sys.stdout.flush()
        os.dup2(_STDERR, _STDOUT)  # what a file or a function prints is no part of a report
        _Process.lf, _Process.engine = self.origin.load()
        # Not inline: that would be the in-memory engine's alone, and only after some runs.
        _Process.collector = Collector(gpu="offload", inline=0)
        gc.collect()
        forget_peak_memory()  # what it took to make the frames is no part of the query


@dataclass(frozen=True, slots=True)
class Run:
    """Run the query once."""

    keeps_answer: bool

    def __call__(self) -> Figures:
        """Return the figures."""
        # On a thread by itself: queries that the main one of a worker submits are taken for those
        # of a Python function in a query.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self._run).result()

    def _run(self) -> Figures:
        _Process.answer = None
        gc.collect()  # else it may come by chance while the query runs
        begun = time.perf_counter()
        handle = _Process.collector.collect_async(_Process.lf, engine=_Process.engine)
        answer = handle.result()
        seconds = time.perf_counter() - begun
        if self.keeps_answer:
            _Process.answer = answer
        chosen = handle.resolution
        return Figures(seconds, peak_memory(), answer.height, chosen.name, chosen.message)


@dataclass(frozen=True, slots=True)
class Answer:
    """Send the answer of the last run."""

    def __call__(self) -> Any:
        """Return it; raise TypeError if it has Python objects, of which Polars sends addresses."""
        answer = _Process.answer
        for name, kind in () if answer is None else answer.schema.items():
            if pl.Object in map(type, leaves(kind)):
                raise TypeError(f"column {name!r} has objects of Python, which are in that process")
        return answer
