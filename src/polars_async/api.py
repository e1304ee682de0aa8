"""The functions of the module, on the default collector, which the whole process shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

from polars_async._runtime.fork import new_lock
from polars_async.collector import Collector
from polars_async.options import DEFAULT_OPTIMIZATIONS
from polars_async.resolution import (
    engine_object,
    request_of,
    warn_of_unstable,
    warns_of_unstable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import polars as pl

    from polars_async.events import QueryEvent, Tags
    from polars_async.executors.factory import ExecutorRequest
    from polars_async.handle import QueryHandle
    from polars_async.iteration import ResultStream
    from polars_async.options import Cache
    from polars_async.resolution import EngineRequest, GpuPolicy


T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Default:
    lock = new_lock()
    collector: Collector | None = None


def configure(  # keywords of the caller's choice
    *,
    engine: EngineRequest = "auto",
    gpu: GpuPolicy | None = None,
    default_engine: EngineRequest | None = None,
    executor: ExecutorRequest = "threads",
    max_running: int | None = None,
    max_waiting: int | None = None,
    max_streams: int | None = None,
    max_memory: float | str | None = None,
    inline: float = 100e-6,
    slow: float | None = None,
    progress: bool | None = None,
    single_flight: bool = False,
    cache: Cache | None = None,
    on_event: Callable[[QueryEvent], object] | None = None,
) -> Collector:
    """
    Make the default collector, before its first use.

    Parameters
    ----------
    engine, gpu, default_engine, executor
        As for `Collector`.
    max_running, max_waiting, max_streams, max_memory, inline, slow, progress, single_flight, cache
        As for `Collector`.
    on_event
        As for `Collector`.

    Returns
    -------
    Collector
        The collector that `collect_async` and the other functions here use from now on.

    Raises
    ------
    RuntimeError
        There is a default collector, and it is not closed.
    ValueError
        As for `Collector`; also if `engine` is an `AsyncEngine` of the default collector itself.
    TypeError
        As for `Collector`.
    """
    with _Default.lock:
        if _Default.collector is not None and not _Default.collector.closed:
            raise RuntimeError(
                "the default collector is in use already: call configure() before the first query, "
                "or close() the collector that default_collector() returns"
            )
        collector = Collector(
            engine=engine,
            gpu=gpu,
            default_engine=default_engine,
            executor=executor,
            max_running=max_running,
            max_waiting=max_waiting,
            max_streams=max_streams,
            max_memory=max_memory,
            inline=inline,
            slow=slow,
            progress=progress,
            single_flight=single_flight,
            cache=cache,
            on_event=on_event,
        )
        before, _Default.collector = _Default.collector, collector
        try:
            request_of(engine)
        except ValueError:  # an AsyncEngine that defers to this very collector
            _Default.collector = before
            raise
        return collector


def default_collector() -> Collector:
    """Return the collector that the whole process shares; the first call makes it."""
    if _Default.collector is None:
        with _Default.lock:
            if _Default.collector is None:
                _Default.collector = Collector()
    return _Default.collector


def collect_async(
    lf: pl.LazyFrame,
    *,
    gevent: bool = False,
    engine: EngineRequest = "auto",
    optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
    timeout: float | None = None,
    priority: int = 0,
    label: str | None = None,
    tags: Tags | None = None,
    single_flight: bool | None = None,
) -> QueryHandle[pl.DataFrame]:
    """
    Collect a LazyFrame without blocking; a drop-in for ``LazyFrame.collect_async``.

    The query is scheduled on the default collector, and its handle is returned, both at once. What
    Polars' own does not take, from `timeout` on, is explained at `Collector.collect_async`.

    Parameters
    ----------
    lf
        The query.
    gevent
        Accepted as in Polars: fail now if gevent is not installed. Every handle has the ``get`` of
        Polars' own for greenlets.
    engine
        ``"auto"``, ``"in-memory"``, ``"streaming"``, ``"gpu"``, ``"adaptive"`` or a ``pl.Engine``
        object. ``"auto"`` is the engine given to `configure`, or else the engine affinity; without
        either it is what Polars itself runs here: in 1.44 the in-memory engine, in 2.x the
        streaming engine. ``"adaptive"`` is the engine that is expected to be the fastest. The GPU
        engine runs here only where the policy, ``gpu=`` of `configure` or ``POLARS_ASYNC_GPU``, is
        ``offload`` or ``require``; else, as Polars documents, the in-memory engine does, with an
        `EngineDowngradeWarning`.
    optimizations
        The optimisation passes of Polars.
    timeout
        Seconds until the query has to be done, its time in the queue included; None sets no limit.
    priority
        From -10 to 10; queries of a higher priority start first.
    label
        The name of the query in events and errors, and of its thread.
    tags
        What else events and the handle are to tell of the query, as ``{"tenant": "a"}``.
    single_flight
        Whether the query may share the run of an equal one; None is as `configure` was told.

    Returns
    -------
    QueryHandle
        Awaitable in asyncio and trio; the result is a DataFrame. Each wait raises
        `QueryTimeoutError` if the query was not done within `timeout`.

    Raises
    ------
    TypeError
        `lf` is no LazyFrame, or `label`, `tags` or `single_flight` of another type.
    ValueError
        `engine` is no engine, or `timeout` or `priority` is out of range.
    ImportError
        `gevent` is true, and gevent is not installed.
    EngineUnavailableError
        The GPU engine cannot run, and the CPU is ruled out.
    QueueFullError
        ``max_waiting`` queries wait already, if `configure` was given that limit.
    ForkedProcessError
        Polars cannot run in this process.

    Examples
    --------
    >>> import asyncio
    >>> import polars as pl
    >>> import polars_async as pa
    >>> async def main() -> pl.DataFrame:
    ...     return await pa.collect_async(pl.LazyFrame({"a": [1, 2]}).sum())
    >>> asyncio.run(main()).item()
    3
    """
    _check_named(engine)
    collector = default_collector()
    warn_of_streaming(collector, engine)
    return collector.collect_async(
        lf,
        engine=engine,
        optimizations=optimizations,
        timeout=timeout,
        priority=priority,
        label=label,
        tags=tags,
        single_flight=single_flight,
        gevent=gevent,
    )


def collect_all_async(
    lazy_frames: Iterable[pl.LazyFrame],
    *,
    gevent: bool = False,
    engine: EngineRequest = "auto",
    optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
    timeout: float | None = None,
    priority: int = 0,
    label: str | None = None,
    tags: Tags | None = None,
    single_flight: bool | None = None,
) -> QueryHandle[list[pl.DataFrame]]:
    """
    Collect several LazyFrames as one query; a drop-in for ``polars.collect_all_async``.

    Subplans that the frames share, such as a common source, are computed once.

    Parameters
    ----------
    lazy_frames
        The frames; any iterable, read at once.
    gevent, engine, optimizations, timeout, priority, label, tags, single_flight
        As for `collect_async`.

    Returns
    -------
    QueryHandle
        Awaitable in asyncio and trio; the result is a list with one DataFrame for each frame, in
        their order.

    Raises
    ------
    TypeError
        One of `lazy_frames` is no LazyFrame; nothing runs then.
    ValueError, ImportError, EngineUnavailableError, QueueFullError, ForkedProcessError
        As for `collect_async`.
    """
    _check_named(engine)
    return default_collector().collect_all_async(
        lazy_frames,
        engine=engine,
        optimizations=optimizations,
        timeout=timeout,
        priority=priority,
        label=label,
        tags=tags,
        single_flight=single_flight,
        gevent=gevent,
    )


def as_completed(
    lazy_frames: Iterable[pl.LazyFrame],
    *,
    engine: EngineRequest = "auto",
    optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
    timeout: float | None = None,
    priority: int = 0,
    label: str | None = None,
    tags: Tags | None = None,
    single_flight: bool | None = None,
) -> ResultStream[tuple[int, pl.DataFrame]]:
    """
    Collect each frame as a query of its own, and return their results as they come.

    It is `Collector.as_completed` of the default collector, which explains parameters and errors.

    Returns
    -------
    ResultStream
        An iterator, async or not, over pairs ``(position, DataFrame)``, in order of completion.

    Examples
    --------
    >>> import polars as pl
    >>> import polars_async as pa
    >>> frames = [pl.LazyFrame({"a": [1]}), pl.LazyFrame({"a": [2]})]
    >>> sorted((position, frame.item()) for position, frame in pa.as_completed(frames))
    [(0, 1), (1, 2)]
    """
    _check_named(engine)
    return default_collector().as_completed(
        lazy_frames,
        engine=engine,
        optimizations=optimizations,
        timeout=timeout,
        priority=priority,
        label=label,
        tags=tags,
        single_flight=single_flight,
    )


def collect_batches_async(
    lf: pl.LazyFrame,
    *,
    chunk_size: int | None = None,
    maintain_order: bool = True,
    engine: EngineRequest = "auto",
    optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
    timeout: float | None = None,
    priority: int = 0,
    label: str | None = None,
    tags: Tags | None = None,
) -> ResultStream[pl.DataFrame]:
    """
    Collect a LazyFrame in batches, as ``LazyFrame.collect_batches`` does, without blocking.

    It is `Collector.collect_batches_async` of the default collector, which explains parameters and
    errors.

    Returns
    -------
    ResultStream
        An iterator, async or not, over DataFrames of `chunk_size` rows; the last may have fewer.
    """
    _check_named(engine)
    return default_collector().collect_batches_async(
        lf,
        chunk_size=chunk_size,
        maintain_order=maintain_order,
        engine=engine,
        optimizations=optimizations,
        timeout=timeout,
        priority=priority,
        label=label,
        tags=tags,
    )


def sink_async(
    sink: pl.LazyFrame,
    *,
    gevent: bool = False,
    engine: EngineRequest = "auto",
    optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
    timeout: float | None = None,
    priority: int = 0,
    label: str | None = None,
    tags: Tags | None = None,
) -> QueryHandle[None]:
    """
    Run a sink, such as ``lf.sink_parquet(path, lazy=True)``, without blocking.

    It is `Collector.sink_async` of the default collector, which explains parameters and errors.

    Returns
    -------
    QueryHandle
        Awaitable in asyncio and trio; the result is None, once all is written.
    """
    _check_named(engine)
    return default_collector().sink_async(
        sink,
        engine=engine,
        optimizations=optimizations,
        timeout=timeout,
        priority=priority,
        label=label,
        tags=tags,
        gevent=gevent,
    )


def collect_schema_async(
    lf: pl.LazyFrame,
    *,
    gevent: bool = False,
    timeout: float | None = None,
    priority: int = 0,
    label: str | None = None,
    tags: Tags | None = None,
) -> QueryHandle[pl.Schema]:
    """
    Look up the schema of a LazyFrame, for which Polars may have to open files, without blocking.

    It is `Collector.collect_schema_async` of the default collector, which explains parameters and
    errors.

    Returns
    -------
    QueryHandle
        Awaitable in asyncio and trio; the result is a ``pl.Schema``.
    """
    return default_collector().collect_schema_async(
        lf, timeout=timeout, priority=priority, label=label, tags=tags, gevent=gevent
    )


def run(
    function: Callable[[*Ts], T],
    *args: *Ts,
    timeout: float | None = None,
    priority: int = 0,
    label: str | None = None,
    tags: Tags | None = None,
) -> QueryHandle[T]:
    """
    Run a function that blocks, such as ``pl.read_excel``, in the queue of the queries.

    It is `Collector.run` of the default collector, which explains parameters and errors.

    Returns
    -------
    QueryHandle
        Awaitable in asyncio and trio; the result is what the function returns.

    Examples
    --------
    >>> import polars as pl
    >>> import polars_async as pa
    >>> pa.run(pl.DataFrame.height.fget, pl.DataFrame({"a": [1, 2]})).result()
    2
    """
    return default_collector().run(
        function, *args, timeout=timeout, priority=priority, label=label, tags=tags
    )


def warn_of_streaming(collector: Collector, engine: EngineRequest | None = None) -> None:
    """Warn as ``LazyFrame.collect_async`` does, if the streaming engine is requested."""
    if warns_of_unstable():
        resolution = collector.resolve_engine(engine)
        if resolution.name == "streaming" and resolution.source != "default":
            warn_of_unstable("streaming")


def _check_named(engine: EngineRequest | None) -> None:
    # The methods of a collector take None for its own engine; Polars' functions do not.
    if engine is None:
        engine_object(engine)
