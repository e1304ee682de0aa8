"""The collector: admits queries, runs them, and delivers what comes of them."""

from __future__ import annotations

import sys
from concurrent.futures import Executor
from functools import partial
from importlib import import_module
from math import nan
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict, TypeVar, overload

import polars as pl

from polars_async import bridges
from polars_async._runtime import fork
from polars_async._runtime.arguments import check_frame, checked_frames
from polars_async._runtime.callers import call_site
from polars_async._runtime.nesting import in_query
from polars_async._runtime.unpatched import holding
from polars_async.bridges import Suspension
from polars_async.bridges.buffer import Buffer
from polars_async.bridges.threads import block_or_let_run
from polars_async.events import Reporter
from polars_async.executors import operations
from polars_async.executors.factory import (
    WITH_WORKERS,
    default_running,
    make_executor,
    make_gpu_executor,
)
from polars_async.executors.operations import Collect, CollectAll, Schema, Sink
from polars_async.executors.threads import ThreadsExecutor
from polars_async.gpu.breaker import key_of
from polars_async.gpu.devices import named_device
from polars_async.handle import BackgroundQuery, GeventHandle, QueryHandle
from polars_async.resolution import (
    decide,
    engine_object,
    gpu_policy,
    is_on_gpu,
    request_of,
    warn_of,
)
from polars_async.scheduling.admission import stats_of
from polars_async.scheduling.estimates import CostModel, Estimate
from polars_async.scheduling.fair_queue import PRIORITIES, large_at_once
from polars_async.scheduling.lane import Lane
from polars_async.scheduling.open_streams import MAX_STREAMS
from polars_async.scheduling.pausing import PausableQuery
from polars_async.scheduling.query import Query
from polars_async.streams import Batches, Completions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType
    from typing import Self, Unpack

    from polars_async.events import QueryEvent
    from polars_async.executors.factory import ExecutorRequest
    from polars_async.executors.operations import Operation
    from polars_async.resolution import EngineRequest, GpuPolicy, QueryPath, Resolution
    from polars_async.streams import ResultStream

T = TypeVar("T")

DEFAULT_OPTIMIZATIONS: Final = pl.QueryOptFlags()
_TINY: Final = Estimate(0.0, None)


class QueryOptions(TypedDict, total=False):
    """What every method that schedules queries takes; `Collector.collect_async` explains it."""

    engine: EngineRequest | None
    optimizations: pl.QueryOptFlags
    timeout: float | None
    priority: int
    label: str | None


class Collector:
    """
    Runs queries on threads of its own, a bounded number at a time, and small ones first.

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
    executor
        Where queries run: on ``"threads"`` of this process; in worker ``"processes"``, where they
        are stopped when nobody wants them any more, and can take nothing with them if they crash;
        ``"auto"``, the small ones without Python functions on threads and the others in processes;
        or in any ``concurrent.futures.Executor``, such as that of a cluster. Engines that are
        objects of the caller's own run on threads in any case.
    max_running
        How many queries run at once; the others wait for their turn. One query already uses every
        thread of Polars, so that more of them cost memory and gain little. None means one more
        than there are processors, but at least 3 and at most 5; and 32 with an executor of the
        caller's. Of two slots one is kept for small queries, and of more than two, two are. A
        stream of batches has no slot while it waits for its consumer, and goes on when one is free
        for it: before the queries of the queue, but for one turn in eight. Queries
        on the GPU have a lane of their own, and run one at a time, in processes one for each GPU.
    max_waiting
        How many queries wait at most, for the GPU and for the CPU each, and in processes for each
        GPU that they name; the next one is refused at once with a `QueueFullError`. None sets no
        limit.
    max_streams
        How many streams of batches are open at most: those that wait, that run, and that are held
        up by their consumers, each of which keeps a thread, and in worker processes a worker. The
        next one is refused at once with a `QueueFullError`. None means 64. The collectors of a
        process have 256 open at most, since each may keep one of 512 threads of Polars.
    max_memory
        How many bytes of memory each worker process may take; a query that takes more is stopped,
        and raises a `QueryMemoryError`. None sets no limit.
    on_event
        Called with a `QueryEvent` for all that happens to a query, on the thread where it happens,
        which waits for it: it has to be quick, and safe to call from many threads. What it raises
        is logged. Where gevent has patched the threads, it is called on greenlets of the main
        thread instead, soon after what happens, and before a wait there for the end returns.

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
        executor: ExecutorRequest = "threads",
        max_running: int | None = None,
        max_waiting: int | None = None,
        max_streams: int | None = None,
        max_memory: int | None = None,
        on_event: Callable[[QueryEvent], object] | None = None,
    ) -> None:
        _check_number("max_running", max_running, 1)
        _check_number("max_waiting", max_waiting, 0)
        _check_number("max_streams", max_streams, 1)
        _check_number("max_memory", max_memory, 1)
        if on_event is not None and not callable(on_event):
            raise TypeError(f"on_event must be callable, got {on_event!r}")
        engine_object(engine)
        engine_object(default_engine, "default_engine")
        self.engine: Final = engine
        if gpu is not None:
            gpu_policy(gpu)
        self._gpu_policy: Final = gpu
        self._default_engine: Final = default_engine
        self._reporter: Final = Reporter(on_event)
        known = CostModel(far=executor == "auto")
        max_running = max_running or default_running(executor)
        at_once = large_at_once(max_running)
        cpu_executor = make_executor(executor, max_running, at_once, max_memory)
        self._cpu: Final = Lane(
            max_running,
            max_waiting,
            known,
            executor=cpu_executor,
            tiny_here=executor == "auto",
            max_streams=max_streams or MAX_STREAMS,
        )
        self._elsewhere: Final = isinstance(executor, Executor)
        self._make_gpu_lane: Final = partial(
            Lane,
            max_waiting=max_waiting,
            costs=known,
            executor=make_gpu_executor(executor, cpu_executor, at_once),
            exclusive=True,
            fallback=self._cpu,
        )
        self._gpu: Final = self._make_gpu_lane(max_running if self._elsewhere else 1)
        self._gpus_in_workers: Final = executor in WITH_WORKERS
        self._of_one_gpu: Final[dict[str | int, Lane]] = {}
        """The lanes of queries that name a GPU, where several work side by side."""

    @overload
    def collect_async(
        self, lf: pl.LazyFrame, *, gevent: Literal[False] = ..., **options: Unpack[QueryOptions]
    ) -> QueryHandle[pl.DataFrame]: ...
    @overload
    def collect_async(
        self, lf: pl.LazyFrame, *, gevent: Literal[True], **options: Unpack[QueryOptions]
    ) -> GeventHandle[pl.DataFrame]: ...
    def collect_async(
        self,
        lf: pl.LazyFrame,
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
        gevent: bool = False,
    ) -> QueryHandle[pl.DataFrame]:
        """
        Schedule a query and give its handle at once, as ``LazyFrame.collect_async`` does.

        Parameters
        ----------
        lf
            The query.
        engine
            The engine to run it; None, as ``"auto"``, is that of the collector.
        optimizations
            The optimisation passes of Polars.
        timeout
            Seconds until it has to be done, those in the waiting line included; None sets no
            limit. A query that waits then never runs; one that runs is let go, and its slot is
            free when it really ends: in worker processes that is soon, since it is stopped there;
            on threads Polars cannot stop it.
        priority
            From -10 to 10; a higher one is served first. Above 0, a query counts as small,
            whatever is expected of it; below 0, it never does.
        label
            What to call the query in events, in errors, and as the name of its thread.
        gevent
            Whether to give a handle for greenlets, with ``get(block=True, timeout=None)``.

        Returns
        -------
        QueryHandle
            Awaitable; gives a DataFrame. Await and ``result()`` raise `QueryTimeoutError` where the
            query was not done in time.

        Raises
        ------
        TypeError
            `lf` is no LazyFrame.
        ValueError
            `engine` is no engine, or `timeout` or `priority` is out of range.
        EngineUnavailableError
            The GPU engine cannot run, and the CPU was forbidden.
        QueueFullError
            ``max_waiting`` queries wait already.
        CollectorClosedError
            The collector was closed.
        ForkedProcessError
            Polars cannot run in this process.
        """
        handle = _gevent_handle() if gevent else QueryHandle
        query = self._collect(
            lf,
            "async",
            engine=engine,
            optimizations=optimizations,
            timeout=timeout,
            priority=priority,
            label=label,
        )
        return handle(query)

    @overload
    def collect_all_async(
        self,
        lazy_frames: Iterable[pl.LazyFrame],
        *,
        gevent: Literal[False] = ...,
        **options: Unpack[QueryOptions],
    ) -> QueryHandle[list[pl.DataFrame]]: ...
    @overload
    def collect_all_async(
        self,
        lazy_frames: Iterable[pl.LazyFrame],
        *,
        gevent: Literal[True],
        **options: Unpack[QueryOptions],
    ) -> GeventHandle[list[pl.DataFrame]]: ...
    def collect_all_async(
        self,
        lazy_frames: Iterable[pl.LazyFrame],
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
        gevent: bool = False,
    ) -> QueryHandle[list[pl.DataFrame]]:
        """
        Schedule several frames as one query and give its handle, as ``polars.collect_all_async``.

        What the frames have in common, a source first of all, is computed once; where sinks are
        among them, by the streaming engine alone. An engine without ``collect_all``, such as that
        for the GPU, collects one frame after the other instead.

        Parameters
        ----------
        lazy_frames
            The frames; any iterable, read at once.
        engine, optimizations, timeout, priority, label, gevent
            As for `collect_async`.

        Returns
        -------
        QueryHandle
            Awaitable; gives a list with a DataFrame for each frame, in their order.

        Raises
        ------
        TypeError
            One of `lazy_frames` is no LazyFrame; nothing runs then.
        ValueError, EngineUnavailableError, QueueFullError, CollectorClosedError, ForkedProcessError
            As for `collect_async`.
        """
        handle = _gevent_handle() if gevent else QueryHandle
        query = self._collect_all(
            lazy_frames,
            "async",
            engine=engine,
            optimizations=optimizations,
            timeout=timeout,
            priority=priority,
            label=label,
        )
        return handle(query)

    def as_completed(
        self,
        lazy_frames: Iterable[pl.LazyFrame],
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
    ) -> ResultStream[tuple[int, pl.DataFrame]]:
        """
        Schedule each frame as a query of its own, and give the results as they come.

        Parameters
        ----------
        lazy_frames
            The frames; any iterable, read at once.
        engine, optimizations, timeout, priority, label
            As for `collect_async`, for each query by itself.

        Returns
        -------
        ResultStream
            An async iterator over pairs of a frame's position and its DataFrame. The first query
            that fails raises its error there and ends it, and the others are cancelled.

        Raises
        ------
        TypeError
            One of `lazy_frames` is no LazyFrame; nothing runs then.
        ValueError, EngineUnavailableError, QueueFullError, CollectorClosedError, ForkedProcessError
            As for `collect_async`; the queries of this call are cancelled.
        """
        queries: list[Query[pl.DataFrame]] = []
        try:
            for frame in checked_frames(lazy_frames):
                query = self._collect(
                    frame,
                    "async",
                    engine=engine,
                    optimizations=optimizations,
                    timeout=timeout,
                    priority=priority,
                    label=label,
                )
                queries.append(query)
        except BaseException:
            for query in queries:
                query.cancel()
            raise
        return Completions(queries)

    def collect_batches_async(
        self,
        lf: pl.LazyFrame,
        *,
        chunk_size: int | None = None,
        maintain_order: bool = True,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
    ) -> ResultStream[pl.DataFrame]:
        """
        Schedule a query and give its result in batches, as ``LazyFrame.collect_batches`` does.

        With the streaming engine, which runs where no other is asked for, the first batches come
        long before the end, and a consumer that is slow holds the query up: no more than two
        batches lie ready. While it is held up, another query may use its slot; once its consumer is
        back it waits for one, before those in the queue.

        Parameters
        ----------
        lf
            The query.
        chunk_size
            Rows of each batch; None leaves it to Polars.
        maintain_order
            Whether the batches come in the order of the rows; without it they may come sooner.
        engine, optimizations, priority, label
            As for `collect_async`.
        timeout
            As for `collect_async`, until the last batch is there.

        Returns
        -------
        ResultStream
            An async iterator over DataFrames.

        Raises
        ------
        TypeError, EngineUnavailableError, CollectorClosedError, ForkedProcessError
            As for `collect_async`.
        QueueFullError
            Also if ``max_streams`` are open already.
        ValueError
            Also if `chunk_size` is less than 1.
        """
        check_frame(lf)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be 1 or more rows, got {chunk_size!r}")
        resolution = self._resolved(engine, "batches", optimizations)
        buffer = Buffer()
        operation = operations.Batches(
            lf, resolution.engine, optimizations, buffer, chunk_size, maintain_order
        )
        query = self._submit(operation, resolution, timeout, priority, label)
        return Batches(query, buffer)

    @overload
    def sink_async(
        self, sink: pl.LazyFrame, *, gevent: Literal[False] = ..., **options: Unpack[QueryOptions]
    ) -> QueryHandle[None]: ...
    @overload
    def sink_async(
        self, sink: pl.LazyFrame, *, gevent: Literal[True], **options: Unpack[QueryOptions]
    ) -> GeventHandle[None]: ...
    def sink_async(
        self,
        sink: pl.LazyFrame,
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
        gevent: bool = False,
    ) -> QueryHandle[None]:
        """
        Schedule a sink, such as ``lf.sink_parquet(path, lazy=True)``, and give its handle at once.

        As in Polars, sinks run on the streaming engine where no other is asked for. One that hands
        over to this process runs in it, whatever `executor` the collector has, and is not stopped:
        that of ``sink_batches``, one to a file object, or one with a function that tells, or is
        told, the paths.

        Parameters
        ----------
        sink
            What ``sink_parquet``, ``sink_ipc``, ``sink_csv``, ``sink_ndjson`` or another sink of
            Polars gives with ``lazy=True``, and with the options that it takes.
        engine, optimizations, timeout, priority, label, gevent
            As for `collect_async`.

        Returns
        -------
        QueryHandle
            Awaitable; gives None when all is written.

        Raises
        ------
        TypeError
            `sink` is no LazyFrame: ``lazy=True`` was forgotten, and all is written already.
        ValueError, EngineUnavailableError, QueueFullError, CollectorClosedError, ForkedProcessError
            As for `collect_async`.
        """
        if sink is None:
            raise TypeError(
                "sink must be a LazyFrame, got None: the sink has run already, on this thread, "
                "since it was not given lazy=True"
            )
        check_frame(sink)
        handle = _gevent_handle() if gevent else QueryHandle
        resolution = self._resolved(engine, "batches", optimizations)
        operation = Sink(sink, resolution.engine, optimizations)
        return handle(self._submit(operation, resolution, timeout, priority, label))

    @overload
    def collect_schema_async(
        self,
        lf: pl.LazyFrame,
        *,
        timeout: float | None = ...,
        priority: int = ...,
        label: str | None = ...,
        gevent: Literal[False] = ...,
    ) -> QueryHandle[pl.Schema]: ...
    @overload
    def collect_schema_async(
        self,
        lf: pl.LazyFrame,
        *,
        timeout: float | None = ...,
        priority: int = ...,
        label: str | None = ...,
        gevent: Literal[True],
    ) -> GeventHandle[pl.Schema]: ...
    def collect_schema_async(
        self,
        lf: pl.LazyFrame,
        *,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
        gevent: bool = False,
    ) -> QueryHandle[pl.Schema]:
        """
        Find out the schema of a query, for which Polars may have to open files, without blocking.

        Parameters
        ----------
        lf
            The query.
        timeout, priority, label, gevent
            As for `collect_async`. It counts as small in any case.

        Returns
        -------
        QueryHandle
            Awaitable; gives a ``pl.Schema``.

        Raises
        ------
        TypeError, ValueError, QueueFullError, CollectorClosedError, ForkedProcessError
            As for `collect_async`.
        """
        check_frame(lf)
        handle = _gevent_handle() if gevent else QueryHandle
        resolution = self._resolved("in-memory", "async", DEFAULT_OPTIMIZATIONS)
        return handle(self._submit(Schema(lf), resolution, timeout, priority, label))

    def collect_background(
        self,
        lf: pl.LazyFrame,
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
    ) -> BackgroundQuery[pl.DataFrame]:
        """
        Schedule a query to be fetched from threads, as ``LazyFrame.collect(background=True)``.

        It takes and raises what `collect_async` does.

        Returns
        -------
        BackgroundQuery
            With ``fetch()``, ``fetch_blocking()`` and ``cancel()``.
        """
        query = self._collect(
            lf,
            "background",
            engine=engine,
            optimizations=optimizations,
            timeout=timeout,
            priority=priority,
            label=label,
        )
        return BackgroundQuery(query)

    def collect_all_background(
        self,
        lazy_frames: Iterable[pl.LazyFrame],
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
    ) -> BackgroundQuery[list[pl.DataFrame]]:
        """
        Schedule several frames as one query to be fetched from threads.

        It takes and raises what `collect_all_async` does.

        Returns
        -------
        BackgroundQuery
            As for `collect_background`; gives a list with a DataFrame for each frame.
        """
        query = self._collect_all(
            lazy_frames,
            "background",
            engine=engine,
            optimizations=optimizations,
            timeout=timeout,
            priority=priority,
            label=label,
        )
        return BackgroundQuery(query)

    def resolve_engine(
        self,
        engine: EngineRequest | None = None,
        *,
        path: QueryPath = "async",
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
    ) -> Resolution:
        """Decide which engine of this collector would run a query; see `resolve_engine`."""
        if engine is None or request_of(engine) == "auto":
            engine = self.engine
        return decide(
            engine,
            path,
            self._gpu_policy,
            self._default_engine,
            gpu_elsewhere=self._elsewhere,
            gpu_in_workers=self._gpus_in_workers,
            optimizations=optimizations,
        )

    @property
    def closed(self) -> bool:
        """Whether it takes no more queries."""
        return self._cpu.admission.closed

    def stats(self) -> dict[str, float]:
        """
        Count what this collector did and does.

        Returns
        -------
        dict
            ``running`` (``abandoned`` of them were let go, and hold their slot until they end;
            ``paused`` of them wait for their consumers, or for a slot after that, and hold none),
            ``waiting``, ``streams`` (those of batches that run or wait), and since the collector
            was made: ``submitted``, ``completed``, ``failed``, ``cancelled``, ``timed_out``,
            ``rejected``, ``downgraded``, ``fell_back``; the sums ``queue_seconds`` and
            ``run_seconds``. It always holds that ``submitted`` is the sum of the five outcomes, of
            ``waiting``, and of what runs and is not abandoned. The limits are ``max_running``,
            ``max_waiting`` (infinite without one) and ``max_streams``. All that counts the GPU's
            queries too; ``gpu_running`` and ``gpu_waiting`` do so alone. Of the whole process,
            ``gpu_failures`` tells how many times in a row the GPU has failed, and
            ``gpu_cooldown_seconds`` how long it still rests for that, and is not tried; of several,
            that of the most failures, and of the longest rest. In worker processes each GPU is
            counted by itself: ``gpu_0_failures`` and ``gpu_0_cooldown_seconds`` are those of the
            GPU with NVML's index 0, once it has run a query. ``workers`` counts the worker
            processes, and ``workers_died`` those that died with a query.
        """
        *on_gpus, cpu = (lane.admission for lane in self._lanes)
        found = stats_of(cpu, on_gpus)
        executors = (self._gpu.executor, self._cpu.executor)  # those of all
        found["workers"] = sum(each.worker_count for each in executors)
        found["workers_died"] = sum(each.worker_deaths for each in executors)
        return found

    def close(
        self, *, wait: bool = True, cancel_waiting: bool = True, cancel_running: bool = False
    ) -> None:
        """
        Take no more queries. It may be called more than once, and from any thread.

        Parameters
        ----------
        wait
            Whether to block the calling thread (just the greenlet, where gevent has patched
            threads) until all queries have really ended. `aclose` is for asyncio and trio.
        cancel_waiting
            Whether queries that did not start yet are cancelled, and batches that nobody fetched;
            else they still run.
        cancel_running
            Whether those that run are cancelled, too: in processes they are stopped, and on threads
            they are let go, and end when they end.

        Raises
        ------
        RuntimeError
            A Python UDF called it and asked to wait, for its own query, too.
        """
        if wait:
            _check_outside()
        _close_lanes(self._lanes, cancel_waiting=cancel_waiting, cancel_running=cancel_running)
        if wait:
            for lane in self._lanes:
                block_or_let_run(lane.admission)

    async def aclose(self, *, cancel_waiting: bool = True, cancel_running: bool = False) -> None:
        """
        Take no more queries, and suspend the calling task until all have really ended.

        Parameters
        ----------
        cancel_waiting, cancel_running
            As for `close`.

        Raises
        ------
        RuntimeError
            A Python UDF called it, and would wait for its own query, too.
        """
        _check_outside()
        _close_lanes(self._lanes, cancel_waiting=cancel_waiting, cancel_running=cancel_running)
        bridge = bridges.current()
        for lane in self._lanes:
            await Suspension(bridge, lane.admission)

    # As a default, since a frozen program has cleared this module before it lets go of its own.
    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # No weakref.finalize, which would hold the lanes, whose hook may hold the collector.
        if not is_finalizing() and hasattr(self, "_of_one_gpu"):  # else __init__ has refused
            _close_lanes(self._lanes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _collect(
        self,
        lf: pl.LazyFrame,
        path: QueryPath,
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
    ) -> Query[pl.DataFrame]:
        check_frame(lf)
        resolution = self._resolved(engine, path, optimizations)
        operation = Collect(lf, resolution.engine, optimizations)
        return self._submit(operation, resolution, timeout, priority, label)

    def _collect_all(
        self,
        lazy_frames: Iterable[pl.LazyFrame],
        path: QueryPath,
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
    ) -> Query[list[pl.DataFrame]]:
        frames = checked_frames(lazy_frames)
        resolution = self._resolved(engine, path, optimizations)
        operation = CollectAll(frames, resolution.engine, optimizations)
        return self._submit(operation, resolution, timeout, priority, label)

    def _resolved(
        self, engine: EngineRequest | None, path: QueryPath, optimizations: pl.QueryOptFlags
    ) -> Resolution:
        fork.check()
        resolution = self.resolve_engine(engine, path=path, optimizations=optimizations)
        warn_of(resolution)
        return resolution

    @property
    def _lanes(self) -> Iterator[Lane]:
        """Those of the GPU first, whose queries may go over to that of the CPU, and never back."""
        yield self._gpu
        # Not before whoever closes them has closed that: there are no more of these from then on.
        yield from list(self._of_one_gpu.values())
        yield self._cpu

    def _lane(self, resolution: Resolution) -> Lane:
        if not is_on_gpu(resolution):
            return self._cpu
        if resolution.gpu is None:
            return self._gpu
        self._gpu.use(resolution.gpu)
        named = named_device(resolution.engine, resolution.gpu)
        if named is None or not self._gpus_in_workers:
            return self._gpu
        return holding(self._gpu.admission.lock, self._lane_of, key_of(named))

    def _lane_of(self, key: str | int) -> Lane:
        lane = self._of_one_gpu.get(key)
        if lane is None:
            lane = self._of_one_gpu[key] = self._make_gpu_lane(1)
            # After that: a signal handler may close all that there are in between.
            lane.admission.closed = self._gpu.admission.closed
        return lane

    def _submit(
        self,
        operation: Operation[T],
        resolution: Resolution,
        timeout: float | None,
        priority: int,
        label: str | None,
    ) -> Query[T]:
        if timeout is not None:
            timeout = _seconds(timeout)
        if priority != 0 and priority not in PRIORITIES:
            lowest, highest = PRIORITIES[0], PRIORITIES[-1]
            raise ValueError(
                f"priority must be a whole number from {lowest} to {highest}, got {priority!r}"
            )
        if label is not None and not isinstance(label, str):
            raise TypeError(f"label must be a string, or None, got {label!r}")
        lane = self._lane(resolution)
        query = Query(
            operation,
            resolution,
            self._reporter,
            lane.admission.owner,
            priority=priority,
            label=label,
            estimate=None if operation.runs_engine else _TINY,
        )
        if isinstance(operation, operations.Batches):
            operation.buffer.bind(PausableQuery(lane, query))
        if not isinstance(lane.executor, ThreadsExecutor):
            query.call_site = call_site()
        here = lane.submit(query)
        try:
            if timeout is not None:
                try:
                    query.expire_in(timeout)
                except BaseException:  # no thread to be had for the clock, or Ctrl-C
                    query.cancel()
                    raise
        finally:
            if here is not None:
                lane.run_here(query, here)
        return query


def _check_outside() -> None:
    if in_query():
        raise RuntimeError("inside a query this would wait for that very query: pass wait=False")


def _check_number(name: str, number: object, least: int) -> None:
    if number is not None and (not isinstance(number, int) or number < least):
        raise ValueError(f"{name} must be a whole number, {least} or more, or None, got {number!r}")


def _seconds(timeout: Any) -> float:
    try:
        seconds = nan if isinstance(timeout, str) else float(timeout)
    except (TypeError, ValueError, OverflowError):
        seconds = nan
    if not seconds > 0:
        raise ValueError(f"timeout must be more than 0 seconds, or None, got {timeout!r}")
    return seconds


def _gevent_handle() -> type[QueryHandle[Any]]:
    try:
        import_module("gevent")
    except ModuleNotFoundError as error:
        raise ImportError(
            "gevent=True needs gevent: install it, or polars-async[gevent]", name=error.name
        ) from error
    return GeventHandle


def _close_lanes(
    lanes: Iterable[Lane], *, cancel_waiting: bool = False, cancel_running: bool = False
) -> None:
    for lane in lanes:
        lane.close(cancel_waiting=cancel_waiting, cancel_running=cancel_running)
