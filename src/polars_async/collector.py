"""The collector: admits queries, runs them, and delivers what comes of them."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, overload
from weakref import finalize

import polars as pl

from polars_async import _fork
from polars_async._nesting import in_query
from polars_async.background import BackgroundQuery
from polars_async.handle import QueryHandle
from polars_async.lane import Lane
from polars_async.query import Query
from polars_async.resolution import engine_object, gpu_policy, resolve_engine, warn_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self

    from polars_async.bridges.gevent import GeventHandle
    from polars_async.resolution import EngineRequest, GpuPolicy, QueryPath, Resolution

T = TypeVar("T")
F = TypeVar("F")

DEFAULT_OPTIMIZATIONS: Final = pl.QueryOptFlags()
_DEFAULT_RUNNING: Final = min(4, max(2, os.cpu_count() or 2))


class Collector:
    """
    Runs queries on threads of its own, a bounded number at a time.

    Nothing starts before the first query. A collector may be used from any thread, loop and
    greenlet; as a context manager it closes itself.

    Parameters
    ----------
    engine
        The engine of queries that name none: a name or a ``pl.Engine`` object. ``"auto"`` asks
        the engine affinity, then `default_engine`.
    gpu
        What becomes of the GPU engine: ``"downgrade"``, ``"offload"`` or ``"require"``, as
        `resolve_engine` explains; None takes ``POLARS_ASYNC_GPU``, else ``"downgrade"``.
    default_engine
        The engine where nothing at all was asked for.
    max_running
        How many queries run at once; the others wait for their turn. One query already uses every
        thread of Polars, so that more of them cost memory and gain little. None means as many as
        there are processors, but at least 2 and at most 4. Queries on the GPU have a lane of their
        own, and run one at a time.

    Raises
    ------
    ValueError
        An engine, a policy or a number that is none.
    """

    def __init__(
        self,
        *,
        engine: EngineRequest = "auto",
        gpu: GpuPolicy | None = None,
        default_engine: EngineRequest = "in-memory",
        max_running: int | None = None,
    ) -> None:
        if max_running is not None and max_running < 1:
            raise ValueError(f"max_running must be 1 or more, got {max_running!r}")
        engine_object(engine)
        engine_object(default_engine, "default_engine")
        self.engine: Final = engine
        if gpu is not None:
            gpu_policy(gpu)
        self._gpu_policy: Final = gpu
        self._default_engine: Final = default_engine
        self._cpu: Final = Lane(max_running or _DEFAULT_RUNNING)
        self._gpu: Final = Lane(1, exclusive=True)
        finalize(self, _close_lanes, (self._cpu, self._gpu)).atexit = False

    @overload
    def collect_async(
        self,
        lf: pl.LazyFrame,
        *,
        engine: EngineRequest | None = ...,
        optimizations: pl.QueryOptFlags = ...,
        gevent: Literal[False] = ...,
    ) -> QueryHandle[pl.DataFrame]: ...
    @overload
    def collect_async(
        self,
        lf: pl.LazyFrame,
        *,
        engine: EngineRequest | None = ...,
        optimizations: pl.QueryOptFlags = ...,
        gevent: Literal[True],
    ) -> GeventHandle[pl.DataFrame]: ...
    def collect_async(
        self,
        lf: pl.LazyFrame,
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        gevent: bool = False,
    ) -> QueryHandle[pl.DataFrame]:
        """
        Schedule a query and give its handle at once, as ``LazyFrame.collect_async`` does.

        Parameters
        ----------
        lf
            The query.
        engine
            The engine to run it; None is that of the collector.
        optimizations
            The optimisation passes of Polars.
        gevent
            Whether to give a handle for greenlets, with ``get(block=True, timeout=None)``.

        Returns
        -------
        QueryHandle
            Awaitable; gives a DataFrame.

        Raises
        ------
        TypeError
            `lf` is no LazyFrame.
        ValueError
            `engine` is no engine.
        EngineUnavailableError
            The GPU engine cannot run, and the CPU was forbidden.
        CollectorClosedError
            The collector was closed.
        ForkedProcessError
            Polars cannot run in this process.
        """
        _check_frame(lf)
        handle = _handle_class(gevent=gevent)
        return handle(self._schedule(_collect, lf, engine, optimizations, "async"))

    @overload
    def collect_all_async(
        self,
        lazy_frames: Iterable[pl.LazyFrame],
        *,
        engine: EngineRequest | None = ...,
        optimizations: pl.QueryOptFlags = ...,
        gevent: Literal[False] = ...,
    ) -> QueryHandle[list[pl.DataFrame]]: ...
    @overload
    def collect_all_async(
        self,
        lazy_frames: Iterable[pl.LazyFrame],
        *,
        engine: EngineRequest | None = ...,
        optimizations: pl.QueryOptFlags = ...,
        gevent: Literal[True],
    ) -> GeventHandle[list[pl.DataFrame]]: ...
    def collect_all_async(
        self,
        lazy_frames: Iterable[pl.LazyFrame],
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        gevent: bool = False,
    ) -> QueryHandle[list[pl.DataFrame]]:
        """
        Schedule several frames as one query and give its handle, as ``polars.collect_all_async``.

        What the frames have in common, a source first of all, is computed once. An engine without
        ``collect_all``, such as that for the GPU, collects one frame after the other instead.

        Parameters
        ----------
        lazy_frames
            The frames; any iterable, read at once.
        engine, optimizations, gevent
            As for `collect_async`.

        Returns
        -------
        QueryHandle
            Awaitable; gives a list with a DataFrame for each frame, in their order.

        Raises
        ------
        TypeError
            One of `lazy_frames` is no LazyFrame; nothing runs then.
        ValueError, EngineUnavailableError, CollectorClosedError, ForkedProcessError
            As for `collect_async`.
        """
        frames = checked_frames(lazy_frames)
        handle = _handle_class(gevent=gevent)
        return handle(self._schedule(collect_each, frames, engine, optimizations, "async"))

    def collect_background(
        self,
        lf: pl.LazyFrame,
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
    ) -> BackgroundQuery:
        """
        Schedule a query to be fetched from threads, as ``LazyFrame.collect(background=True)``.

        It takes and raises what `collect_async` does.

        Returns
        -------
        BackgroundQuery
            With ``fetch()``, ``fetch_blocking()`` and ``cancel()``.
        """
        _check_frame(lf)
        return BackgroundQuery(self._schedule(_collect, lf, engine, optimizations, "background"))

    def resolve_engine(
        self, engine: EngineRequest | None = None, *, path: QueryPath = "async"
    ) -> Resolution:
        """Decide which engine of this collector would run a query; see `resolve_engine`."""
        return resolve_engine(
            self.engine if engine is None else engine,
            path=path,
            gpu=self._gpu_policy,
            default_engine=self._default_engine,
        )

    def close(self, *, wait: bool = True, cancel_waiting: bool = True) -> None:
        """
        Take no more queries; a second call changes nothing more.

        Parameters
        ----------
        wait
            Whether to block the calling thread until all queries have really ended.
        cancel_waiting
            Whether queries that did not start yet are cancelled; else they still run.

        Raises
        ------
        RuntimeError
            A Python UDF called it and asked to wait, for its own query, too.
        """
        if wait and in_query():
            raise RuntimeError(
                "close() was called inside a query, and would wait for it: pass wait=False"
            )
        lanes = (self._cpu, self._gpu)
        _close_lanes(lanes, cancel_waiting=cancel_waiting)
        if wait:
            for lane in lanes:
                lane.admission.wait_until_empty()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _schedule(
        self,
        work: Callable[[F, pl.Engine, pl.QueryOptFlags], T],
        frames: F,
        engine: EngineRequest | None,
        optimizations: pl.QueryOptFlags,
        path: QueryPath,
    ) -> Query[T]:
        _fork.check()
        resolution = self.resolve_engine(engine, path=path)
        warn_of(resolution)
        on_gpu = resolution.gpu is not None and not resolution.downgraded
        lane = self._gpu if on_gpu else self._cpu
        job = partial(work, frames, resolution.engine, optimizations)
        query = Query(job, resolution, lane.admission)
        lane.submit(query)
        return query


def collect_each(
    frames: list[pl.LazyFrame], engine: pl.Engine, optimizations: pl.QueryOptFlags
) -> list[pl.DataFrame]:
    """Collect `frames` as one query, or one by one on an engine that has no other way."""
    if isinstance(engine, pl.GPUEngine) or type(engine).collect_all is pl.Engine.collect_all:
        return [engine.collect(frame, optimizations=optimizations) for frame in frames]
    return pl.collect_all(frames, engine=engine, optimizations=optimizations)


def _collect(lf: pl.LazyFrame, engine: pl.Engine, optimizations: pl.QueryOptFlags) -> pl.DataFrame:
    return engine.collect(lf, optimizations=optimizations)


def _check_frame(lf: object) -> None:
    if not isinstance(lf, pl.LazyFrame):
        raise TypeError(f"lf must be a LazyFrame, got {_described(lf)}")


def checked_frames(lazy_frames: Iterable[pl.LazyFrame]) -> list[pl.LazyFrame]:
    """Read `lazy_frames`, every one of which has to be a LazyFrame."""
    if isinstance(lazy_frames, (pl.LazyFrame, pl.DataFrame)) or not hasattr(
        lazy_frames, "__iter__"
    ):
        raise TypeError(
            f"lazy_frames must be an iterable of LazyFrames, got {_described(lazy_frames)}: "
            "put a single frame in a list"
        )
    frames = list(lazy_frames)
    for position, frame in enumerate(frames):
        if not isinstance(frame, pl.LazyFrame):
            raise TypeError(f"lazy_frames[{position}] must be a LazyFrame, got {_described(frame)}")
    return frames


def _described(value: object) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"{name}: call its lazy() first" if isinstance(value, pl.DataFrame) else name


def _handle_class(*, gevent: bool) -> type[QueryHandle[Any]]:
    if not gevent:
        return QueryHandle
    try:
        from polars_async.bridges.gevent import GeventHandle  # noqa: PLC0415  # optional
    except ModuleNotFoundError as error:
        raise ImportError(
            "gevent=True needs gevent: install it, or polars-async[gevent]", name=error.name
        ) from error
    return GeventHandle


def _close_lanes(lanes: tuple[Lane, ...], *, cancel_waiting: bool = False) -> None:
    for lane in lanes:
        lane.close(cancel_waiting=cancel_waiting)
