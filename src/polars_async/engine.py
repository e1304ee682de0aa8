"""`AsyncEngine`: a ``pl.Engine`` by which existing calls of Polars run on a collector."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl

from polars_async._runtime import fork
from polars_async._runtime.arguments import checked_frames
from polars_async._runtime.nesting import in_query
from polars_async._runtime.upstream import AUTO_ENGINE, BUILT_IN_ENGINES, is_eager
from polars_async.api import default_collector, warn_of_streaming
from polars_async.errors import EngineUnavailableError
from polars_async.events import notify_observers
from polars_async.executors.operations import Collect, CollectAll
from polars_async.gpu.failure import GpuFailure
from polars_async.gpu.offload import collect_on_gpu, log_retry
from polars_async.resolution import (
    DeferringEngine,
    is_on_gpu,
    tried_again,
    warn_of,
    warn_of_unstable,
)
from polars_async.scheduling.fallback import fallen_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from polars.lazyframe import QueryResult

    from polars_async.collector import Collector
    from polars_async.executors.operations import Operation
    from polars_async.handle import BackgroundQuery, QueryHandle
    from polars_async.resolution import EngineRequest, QueryPath, Resolution


T = TypeVar("T")


class AsyncEngine(DeferringEngine):
    """
    An engine that has Polars' own methods run queries on a collector.

    Pass it as ``engine=``, or set it once with ``pl.Config.set_engine_affinity(AsyncEngine())``.
    ``collect_async``, ``collect_all_async`` and ``collect(background=True)`` then run on
    `collector`. Synchronous methods still run on the calling thread, on the engine that would run
    without this one; but if that is the GPU engine, and no GPU is usable or it fails, the in-memory
    engine runs, with an `EngineDowngradeWarning`. With `bound_sync` they take their turn among the
    queries of the collector.

    Polars removes ``POLARS_ENGINE_AFFINITY`` when an engine is set with ``Config``. This engine
    keeps the value that the variable had then, and requests it until the variable is set anew.

    Parameters
    ----------
    collector
        The collector that runs the queries; None is the default collector, which the whole process
        shares.
    bound_sync
        Whether synchronous queries run where and when the collector has them run, too: ``collect``,
        ``polars.collect_all``, ``execute`` and the sinks then wait in its queue and block the
        calling thread (just the greenlet, where gevent runs on it) until their query is done, with
        its limits: a full queue raises `QueueFullError`, a closed collector
        `CollectorClosedError`. Ctrl-C ends the wait and cancels the query. It is for threads of a
        service, of which any number may ask at once; a loop of asyncio or trio would be blocked for
        longer than without. What Python functions of a running query, or functions given to
        ``run``, collect runs on their own thread as without this, since their slot counts for it;
        so do operations on DataFrames, and ``collect_batches``.
    """

    def __init__(self, collector: Collector | None = None, *, bound_sync: bool = False) -> None:
        self._own_collector = collector
        self._bound_sync = bound_sync

    def __repr__(self) -> str:
        own = [] if self._own_collector is None else [repr(self._own_collector)]
        bound = ["bound_sync=True"] if self._bound_sync else []
        return f"AsyncEngine({', '.join(own + bound)})"

    @property
    def collector(self) -> Collector:
        """The collector that runs the queries."""
        return self._own_collector or default_collector()

    @property
    def name(self) -> str:
        """``"polars-async"``; never the name of the engine that runs."""
        return "polars-async"

    @property
    def asks_for(self) -> EngineRequest:
        """The engine of the collector, for queries that name no other."""
        return self.collector.engine

    @property
    def plan_engine(self) -> str:
        """The engine whose plan ``explain`` and ``show_graph`` show."""
        try:
            return self.collector.resolve_engine(path="sync").engine.plan_engine
        except EngineUnavailableError:
            return "gpu"  # a plan can be shown where it cannot run

    def collect(  # type: ignore[override]  # users call Polars' own functions, whose types hold
        self,
        lf: pl.LazyFrame,
        *,
        optimizations: pl.QueryOptFlags,
        background: bool = False,
        post_opt_callback: Callable[..., Any] | None = None,
    ) -> pl.DataFrame | BackgroundQuery[pl.DataFrame]:
        """See ``LazyFrame.collect``; with ``background=True`` the query runs on the collector."""
        if background:
            warn_of_unstable("background")
            return self.collector.collect_background(lf, optimizations=optimizations)
        # A callback needs the very plan that Polars is about to run, here.
        engine = self._synchronous(optimizations, here=post_opt_callback is not None)
        return engine.collect(lf, optimizations=optimizations, post_opt_callback=post_opt_callback)

    def collect_all(
        self, lfs: Iterable[pl.LazyFrame], *, optimizations: pl.QueryOptFlags
    ) -> list[pl.DataFrame]:
        """See ``polars.collect_all``; on the GPU the frames are collected one by one."""
        frames, engine = checked_frames(lfs), self._synchronous(optimizations)
        if isinstance(engine, _EngineInTurn):
            return engine.collect_all(frames, optimizations=optimizations)
        if isinstance(engine, _GPUEngineHere):
            return [engine.collect(lf, optimizations=optimizations) for lf in frames]
        return CollectAll(frames, engine, optimizations)()

    def collect_async(  # type: ignore[override]  # Polars promises its own private classes
        self, lf: pl.LazyFrame, *, optimizations: pl.QueryOptFlags, gevent: bool = False
    ) -> QueryHandle[pl.DataFrame]:
        """See ``LazyFrame.collect_async``; the query runs on the collector."""
        warn_of_streaming(self.collector)
        return self.collector.collect_async(lf, optimizations=optimizations, gevent=gevent)

    def collect_all_async(  # type: ignore[override]  # as above
        self,
        lfs: Iterable[pl.LazyFrame],
        *,
        optimizations: pl.QueryOptFlags,
        gevent: bool = False,
    ) -> QueryHandle[list[pl.DataFrame]]:
        """See ``polars.collect_all_async``; the query runs on the collector."""
        return self.collector.collect_all_async(lfs, optimizations=optimizations, gevent=gevent)

    def collect_batches(  # type: ignore[override]  # as above
        self, lf: pl.LazyFrame, *, optimizations: pl.QueryOptFlags, **options: Any
    ) -> Iterator[pl.DataFrame]:
        """See ``LazyFrame.collect_batches``; a result of the GPU is sliced when it is complete."""
        resolution = self._resolved("batches", optimizations)
        engine = resolution.engine
        if isinstance(engine, pl.GPUEngine):
            lf = self.collector.collect_async(lf, optimizations=optimizations).result().lazy()
            engine = pl.InMemoryEngine()
        else:
            notify_observers(resolution)
        return engine.collect_batches(lf, optimizations=optimizations, **options)

    def execute(self, lf: pl.LazyFrame, *, optimizations: pl.QueryOptFlags) -> QueryResult:
        """See ``LazyFrame.execute``."""
        return self._with_own_methods(optimizations).execute(lf, optimizations=optimizations)

    def sink_parquet(self, lf: pl.LazyFrame, path: Any, **options: Any) -> Any:
        """See ``LazyFrame.sink_parquet``."""
        return self._sink(options).sink_parquet(lf, path, **options)

    def sink_ipc(self, lf: pl.LazyFrame, path: Any, **options: Any) -> Any:
        """See ``LazyFrame.sink_ipc``."""
        return self._sink(options).sink_ipc(lf, path, **options)

    def sink_csv(self, lf: pl.LazyFrame, path: Any, **options: Any) -> Any:
        """See ``LazyFrame.sink_csv``."""
        return self._sink(options).sink_csv(lf, path, **options)

    def sink_ndjson(self, lf: pl.LazyFrame, path: Any, **options: Any) -> Any:
        """See ``LazyFrame.sink_ndjson``."""
        return self._sink(options).sink_ndjson(lf, path, **options)

    def sink_batches(self, lf: pl.LazyFrame, function: Any, **options: Any) -> Any:
        """See ``LazyFrame.sink_batches``."""
        return self._sink(options).sink_batches(lf, function, **options)

    def _sink(self, options: dict[str, Any]) -> pl.Engine:
        # Polars 1.44 calls engines for lazy sinks, too, which only make a plan.
        if options.get("lazy"):
            return AUTO_ENGINE
        return self._with_own_methods(options["optimizations"])

    def _with_own_methods(self, optimizations: pl.QueryOptFlags) -> pl.Engine:
        # An engine of the caller's own class may have another way than to collect a plan.
        engine = self.collector.resolve_engine(path="sync", optimizations=optimizations).engine
        return self._synchronous(optimizations, here=type(engine) not in BUILT_IN_ENGINES)

    def _synchronous(self, optimizations: pl.QueryOptFlags, *, here: bool = False) -> pl.Engine:
        # A running query holds a slot, which counts for what it collects itself: in the queue, that
        # could wait for this very slot.
        here = here or not self._bound_sync or is_eager(optimizations) or in_query()
        if not here:
            return _EngineInTurn(self.collector)
        resolution = self._resolved("sync", optimizations)
        if is_on_gpu(resolution):
            return _GPUEngineHere(resolution)
        notify_observers(resolution)
        return resolution.engine

    def _resolved(self, path: QueryPath, optimizations: pl.QueryOptFlags) -> Resolution:
        fork.check()
        resolution = self.collector.resolve_engine(path=path, optimizations=optimizations)
        warn_of(resolution)
        return resolution


class _EngineInTurn(pl.InMemoryEngine):
    """
    Has each query wait for its turn in a collector, and blocks its caller meanwhile.

    The sinks and ``execute`` of the base call `collect`.
    """

    def __init__(self, collector: Collector) -> None:
        super().__init__()
        self._collector = collector

    def collect(  # type: ignore[override]  # never in the background
        self,
        lf: pl.LazyFrame,
        *,
        optimizations: pl.QueryOptFlags,
        post_opt_callback: Callable[..., Any] | None = None,  # noqa: ARG002  # None: see AsyncEngine
    ) -> pl.DataFrame:
        """See ``LazyFrame.collect``."""
        return self._result(partial(Collect, lf, optimizations=optimizations), optimizations)

    def collect_all(
        self, lfs: Iterable[pl.LazyFrame], *, optimizations: pl.QueryOptFlags
    ) -> list[pl.DataFrame]:
        """See ``polars.collect_all``."""
        frames = checked_frames(lfs)
        return self._result(partial(CollectAll, frames, optimizations=optimizations), optimizations)

    def _result(
        self, operation_on: Callable[[pl.Engine], Operation[T]], optimizations: pl.QueryOptFlags
    ) -> T:
        in_turn = self._collector._result_in_turn  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # of this package
        return in_turn(operation_on, optimizations)


class _GPUEngineHere(pl.GPUEngine):
    """The GPU engine of a resolution, on the calling thread, with the fallback to the CPU."""

    def __init__(self, resolution: Resolution) -> None:
        super().__init__()
        self._resolution = resolution

    def collect(  # type: ignore[override]  # never in the background
        self,
        lf: pl.LazyFrame,
        *,
        optimizations: pl.QueryOptFlags,
        post_opt_callback: Callable[..., Any] | None = None,
    ) -> pl.DataFrame:
        """See ``LazyFrame.collect``."""
        engine = self._resolution.engine
        assert isinstance(engine, pl.GPUEngine)
        if post_opt_callback is not None:  # it replaces that of the GPU engine
            notify_observers(self._resolution)
            return engine.collect(
                lf, optimizations=optimizations, post_opt_callback=post_opt_callback
            )
        found = self._resolution

        def note_retry(how: str, _cause: Exception) -> None:
            nonlocal found
            found = tried_again(found, how)
            log_retry(how)

        try:
            frame = collect_on_gpu(lf, engine, optimizations, on_retry=note_retry)
        except GpuFailure as failure:
            resolution = fallen_back(self._resolution, failure)
        else:
            notify_observers(found)
            return frame
        notify_observers(resolution)
        warn_of(resolution)
        return resolution.engine.collect(lf, optimizations=optimizations)
