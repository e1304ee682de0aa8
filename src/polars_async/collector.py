"""The collector: it admits queries, runs them, and delivers their outcomes."""

from __future__ import annotations

import sys
from concurrent.futures import Executor
from functools import partial
from inspect import isasyncgenfunction, iscoroutinefunction
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar, TypeVarTuple
from weakref import WeakValueDictionary

from polars_async import bridges
from polars_async._runtime import fork
from polars_async._runtime.arguments import check_frame, checked_frames
from polars_async._runtime.callers import call_site
from polars_async._runtime.machine import processors
from polars_async._runtime.nesting import in_query
from polars_async._runtime.unpatched import holding
from polars_async._runtime.upstream import memory_held, spilling
from polars_async.bridges import Suspension
from polars_async.bridges.buffer import Buffer
from polars_async.bridges.threads import block_or_let_run
from polars_async.events import Reporter
from polars_async.executors import operations
from polars_async.executors.factory import (
    WITH_WORKERS,
    default_slots,
    make_executor,
    make_gpu_executor,
)
from polars_async.executors.operations import (
    Collect,
    CollectAll,
    Run,
    Schema,
    Sink,
    async_function_error,
)
from polars_async.executors.threads import ThreadsExecutor
from polars_async.gpu.breaker import key_of
from polars_async.gpu.devices import named_device
from polars_async.handle import BackgroundQuery, QueryHandle, result_of
from polars_async.options import (
    DEFAULT_OPTIMIZATIONS,
    Options,
    check_cache,
    check_flag,
    check_inline,
    check_limit,
    check_slow,
    checked_memory,
)
from polars_async.resolution import (
    ADAPTIVE,
    OF_FUNCTION,
    decide,
    engine_object,
    gpu_policy,
    is_on_gpu,
    request_of,
    warn_of,
)
from polars_async.scheduling.adaptive import Chooser
from polars_async.scheduling.adaptive_gpu import no_gpu, on_gpu
from polars_async.scheduling.estimates import CostModel, Estimate
from polars_async.scheduling.flights import Flights
from polars_async.scheduling.inline import Inline
from polars_async.scheduling.kept import Results
from polars_async.scheduling.lane import Lane
from polars_async.scheduling.listing import info_of, states_of
from polars_async.scheduling.memory import Memory
from polars_async.scheduling.open_streams import MAX_STREAMS
from polars_async.scheduling.pausing import PausableQuery
from polars_async.scheduling.query import Query
from polars_async.scheduling.sizes import Limits, large_at_once
from polars_async.scheduling.stats import COUNTERS, stats_of
from polars_async.streams import Batches, Completions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType
    from typing import Self

    import polars as pl

    from polars_async.events import QueryEvent, Tags
    from polars_async.executors.factory import ExecutorRequest
    from polars_async.executors.operations import Operation
    from polars_async.iteration import ResultStream
    from polars_async.options import Cache
    from polars_async.resolution import EngineRequest, GpuPolicy, QueryPath, Resolution
    from polars_async.scheduling.listing import QueryInfo

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_TINY: Final = Estimate(0.0, None)
_alive: Final[WeakValueDictionary[int, Collector]] = WeakValueDictionary()
_SPILLED_ON_THREADS: Final = 0.8
"""The share of `max_memory` from which on queries on threads spill: that of Polars of the memory of
the machine."""


class Collector:
    """
    Runs queries, a bounded number at a time, and small ones first.

    No thread or process starts before the first query. A collector may be used from any thread,
    loop and greenlet. As a context manager, sync or async, it is closed at the end.

    Parameters
    ----------
    engine
        The engine of queries that name none: a name or a ``pl.Engine`` object. ``"auto"`` is the
        engine affinity, or else `default_engine`. ``"adaptive"`` is the one that is expected to be
        the fastest for the query, by what it reads, and by how long its like took before.
    gpu
        The policy for queries on the GPU engine: ``"downgrade"``, ``"offload"`` or ``"require"``,
        as `resolve_engine` explains; None takes ``POLARS_ASYNC_GPU``, else ``"downgrade"``.
    default_engine
        The engine of queries for which neither a caller nor an affinity requests one. None takes
        ``POLARS_ASYNC_ENGINE``, else what the installed Polars documents for its own async
        functions: in-memory in 1.44, streaming in 2.x.
    executor
        Where queries run: on ``"threads"`` of this process; in worker ``"processes"``, where
        cancelled queries are stopped, and a crash ends one query alone; ``"auto"``, which runs
        small queries without Python functions on threads and the others in worker processes; or in
        any ``concurrent.futures.Executor``, such as that of a cluster. Queries on an engine object
        of the caller's own class run on threads in any case. Python functions in queries for other
        processes need the extra ``polars-async[processes]``, unless they are passed to a method of
        a LazyFrame and come from a module that can be imported.
    max_running
        How many queries run at once; the others wait in the queue. None means as many as the
        processors have room for: of those that compute a few, since one already uses every thread
        of Polars, so that more of them cost memory and gain little; and beside them queries that
        wait or use few processors, while processors are idle and memory is free, up to 64 on
        threads and 8 in worker processes, or as many as there are processors, in workers twice as
        many, if these are more. With an executor of the caller's, 32. A number is exact. Of
        several slots one is reserved for small queries, and queries of one larger size take all but
        two at most. A stream of batches holds no slot while it waits for its consumer; after that
        it waits for one before the queries in the queue, except that one free slot in eight goes to
        the queue. Queries on the GPU have a lane of their own, which runs one at a time; in worker
        processes, one on each GPU.
    max_waiting
        How many queries wait at most: for the CPU, for the GPU, and in worker processes for each
        GPU that queries name. One more raises `QueueFullError` at once, unless it can start at
        once. None sets no limit.
    max_streams
        How many streams of batches are open at most: those in the queue, those that run, and those
        that wait for their consumers, each of which keeps a thread, and in worker processes a
        worker. One more raises `QueueFullError` at once. None means 64. All collectors of a
        process together have at most 256 open, since each may keep one of 512 threads of Polars.
    max_memory
        How much memory this process and its worker processes may take together: a number of
        bytes, a text such as ``"4GB"`` (4 * 1000**3 bytes) or ``"4 GiB"`` (4 * 1024**3), or a share
        of the memory of the machine or its cgroup, such as ``"75%"``. No query of the CPU starts
        that is expected to take more than is left, by what its like took, or else by what it reads;
        small ones go on meanwhile, and one that no large one runs beside starts in any case. If one
        takes more by itself, it is stopped in a worker process, and raises `QueryMemoryError`; on
        threads there is a `MemoryLimitWarning`. Streaming queries spill to the disk from 80 % of it
        on threads, and from half of it in each worker, unless ``POLARS_OOC_MEMORY_BUDGET_MB`` or
        ``POLARS_OOC_MEMORY_BUDGET_FRACTION`` are set. None sets no limit.
    inline
        Seconds up to which a query is so quick that handing it to another thread would cost more:
        it then runs on the thread that submits it, and its handle is done at once. It may do so if
        queries of its shape took no longer each time before, if it reads nothing but frames in
        memory, calls no Python functions and computes on one thread alone, as those that compute
        one column from another mostly do; and while nothing else is to be done: no query but small
        ones runs or waits in this process, and its other threads are mostly idle. No turn of the
        loop takes more than 1 ms longer for such queries, and of tasks that await one after the
        other, others run in between. 0 turns this off. It needs Linux, the in-memory engine, and
        an `executor` of threads.
    slow
        Seconds, of waiting and running together, from which on a query counts as slow: when it
        ends, also by a time-out or a cancellation, the logger ``polars_async.slow`` says so at
        WARNING, with its `QueryHandle.summary`. None logs none.
    progress
        Whether what queries on the streaming engine read is counted, which takes some 30 us for
        each: see `QueryHandle.progress`. None counts that of queries that start after the first
        call of ``progress()``, ``watch()`` or `show_progress` for a query of this collector; in an
        interactive session, such as a notebook, that of all.
    single_flight
        Whether a query that is equal to one that waits or runs does not run itself, but gets the
        result of that one; `cancel`, time-outs, labels and events stay its own. Queries are equal
        if their plans, engines and optimisations are, and they read the same files, which have not
        changed, and equal frames in memory, of 256 kB at most. Those with Python functions, sinks
        or random numbers never are.
    cache
        How long results are kept for equal queries to come, and how much memory they take, as a
        `Cache`; None keeps none. It turns `single_flight` on.
    on_event
        Called with a `QueryEvent` for each event of a query, on the thread where it happens, which
        waits for the call: it must be quick, and safe to call from many threads. Errors that it
        raises are logged. Where gevent has patched threading, it is called on greenlets of the main
        thread instead, soon after the event, and before a wait there for the query returns.

    Raises
    ------
    TypeError
        `on_event` is not callable, `single_flight` no boolean, or `cache` no `Cache`.
    ValueError
        An unknown engine, policy or executor, or a limit out of range.
    """

    COUNTERS: ClassVar[frozenset[str]] = COUNTERS
    """The keys of `stats` that only ever grow."""

    def __init__(  # keywords of the caller's choice
        self,
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
    ) -> None:
        check_limit("max_running", max_running, 1)
        check_limit("max_waiting", max_waiting, 0)
        check_limit("max_streams", max_streams, 1)
        check_inline(inline)
        check_slow(slow)
        check_flag("single_flight", single_flight)
        if cache is not None:
            check_cache(cache)
        if on_event is not None and not callable(on_event):
            raise TypeError(f"on_event must be callable, got {on_event!r}")
        engine_object(engine)
        if default_engine is not None:
            engine_object(default_engine, "default_engine")
        self.engine: Final = engine
        if gpu is not None:
            gpu_policy(gpu)
        self._gpu_policy: Final = gpu
        self._default_engine: Final = default_engine
        self.executor: Final = executor if isinstance(executor, str) else type(executor).__name__
        self._reporter: Final = Reporter(on_event, self.executor, slow, progress)
        most_bytes = None if max_memory is None else checked_memory("max_memory", max_memory)
        memory = None if most_bytes is None else Memory(most_bytes, memory_held)
        known = CostModel(far=executor == "auto", memory=memory)
        slots, most = (max_running, None) if max_running else default_slots(executor)
        limits = Limits(slots, most, processors())
        at_once = large_at_once(limits.slots)
        cpu_executor = make_executor(executor, limits.slots, at_once, most_bytes)
        self._cpu: Final = Lane(
            limits,
            max_waiting,
            known,
            executor=cpu_executor,
            tiny_here=executor == "auto",
            max_streams=max_streams or MAX_STREAMS,
            inline=Inline(inline) if inline > 0 and executor in ("threads", "auto") else None,
            memory=memory,
        )
        if most_bytes is not None and executor in ("threads", "auto"):
            spilling.spill_from(int(_SPILLED_ON_THREADS * most_bytes))
        results = None if cache is None else Results(cache.seconds, cache.max_bytes)
        self._flights: Final = Flights(self._reporter, self._cpu.admission.lock, results)
        self._single_flight: Final = single_flight or cache is not None
        self._elsewhere: Final = isinstance(executor, Executor)
        self._make_gpu_lane: Final = partial(
            Lane,
            max_waiting=max_waiting,
            costs=known,
            executor=make_gpu_executor(executor, cpu_executor, at_once),
            fallback=self._cpu,
        )
        slots_of_gpu = limits.slots if self._elsewhere else 1
        self._gpu: Final = self._make_gpu_lane(Limits(slots_of_gpu, exclusive=True))
        self._cpu.gpu = self._gpu
        self._gpus_in_workers: Final = executor in WITH_WORKERS
        ask_gpu = (
            no_gpu if self._elsewhere else partial(on_gpu, gpu, in_workers=executor in WITH_WORKERS)
        )
        self._chooser: Final = Chooser(known, ask_gpu)
        self._of_one_gpu: Final[dict[str | int, Lane]] = {}
        """The lanes of queries that name a GPU, where several work side by side."""
        _alive[id(self)] = self

    def __repr__(self) -> str:
        if not hasattr(self, "_of_one_gpu"):  # __init__ has raised, and a debugger looks at it
            return "<Collector>"
        stats = self.stats()
        load = f"{stats['running']} running, {stats['waiting']} waiting"
        return f"<Collector on {self.executor}: {load}{', closed' if self.closed else ''}>"

    def collect_async(
        self,
        lf: pl.LazyFrame,
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
        tags: Tags | None = None,
        single_flight: bool | None = None,
        gevent: bool = False,
    ) -> QueryHandle[pl.DataFrame]:
        """
        Schedule a query and return its handle at once, as ``LazyFrame.collect_async`` does.

        Parameters
        ----------
        lf
            The query.
        engine
            The engine to run the query; None and ``"auto"`` are the engine of the collector.
        optimizations
            The optimisation passes of Polars.
        timeout
            Seconds until the query has to be done, its time in the queue included; None sets no
            limit. Then a query in the queue never runs; one that runs raises `QueryTimeoutError` at
            once, and its slot is free when it really ends: soon in a worker process, where it is
            stopped; on threads Polars cannot stop it.
        priority
            From -10 to 10; queries of a higher priority start first. Above 0, a query counts as
            small, whatever its estimate; below 0, it never does.
        label
            The name of the query in events and errors, and of its thread.
        tags
            What else events and the handle are to tell of the query, as ``{"tenant": "a"}``: a
            mapping of strings to strings, numbers and booleans, which is copied.
        single_flight
            Whether the query may share the run, or the kept result, of an equal one; None is as the
            collector says. False runs it anew in any case.
        gevent
            Accepted as in Polars: fail now if gevent is not installed. Every handle has
            ``get(block=True, timeout=None)`` for greenlets.

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
            ``max_waiting`` queries wait already.
        CollectorClosedError
            The collector is closed.
        ForkedProcessError
            Polars cannot run in this process.
        """
        options = Options(
            engine,
            optimizations,
            timeout,
            priority,
            label,
            tags,
            single_flight=single_flight,
            gevent=gevent,
        )
        return QueryHandle(self._collect(lf, "async", options))

    def collect_all_async(
        self,
        lazy_frames: Iterable[pl.LazyFrame],
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
        tags: Tags | None = None,
        single_flight: bool | None = None,
        gevent: bool = False,
    ) -> QueryHandle[list[pl.DataFrame]]:
        """
        Schedule several frames as one query and return its handle, as ``polars.collect_all_async``.

        Subplans that the frames share, such as a common source, are computed once; if sinks are
        among the frames, by the streaming engine only. An engine without a ``collect_all`` of its
        own, such as the GPU engine, collects one frame after the other.

        Parameters
        ----------
        lazy_frames
            The frames; any iterable, read at once.
        engine, optimizations, timeout, priority, label, tags, single_flight, gevent
            As for `collect_async`.

        Returns
        -------
        QueryHandle
            Awaitable in asyncio and trio; the result is a list with one DataFrame for each frame,
            in their order.

        Raises
        ------
        TypeError
            One of `lazy_frames` is no LazyFrame; nothing runs then.
        ValueError, EngineUnavailableError, QueueFullError, CollectorClosedError, ForkedProcessError
            As for `collect_async`.
        """
        options = Options(
            engine,
            optimizations,
            timeout,
            priority,
            label,
            tags,
            single_flight=single_flight,
            gevent=gevent,
        )
        return QueryHandle(self._collect_all(lazy_frames, "async", options))

    def as_completed(
        self,
        lazy_frames: Iterable[pl.LazyFrame],
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
        tags: Tags | None = None,
        single_flight: bool | None = None,
    ) -> ResultStream[tuple[int, pl.DataFrame]]:
        """
        Schedule each frame as a query of its own, and return their results as they come.

        Parameters
        ----------
        lazy_frames
            The frames; any iterable, read at once.
        engine, optimizations, timeout, priority, label, tags, single_flight
            As for `collect_async`; each query has the whole `timeout`.

        Returns
        -------
        ResultStream
            An iterator, async or not, over pairs ``(position, DataFrame)``, with the position of
            the frame in `lazy_frames`, in order of completion. The first query that fails raises
            its error there and ends the iteration; the other queries are cancelled.

        Raises
        ------
        TypeError
            One of `lazy_frames` is no LazyFrame; nothing runs then.
        ValueError, EngineUnavailableError, QueueFullError, CollectorClosedError, ForkedProcessError
            As for `collect_async`; the queries of this call are cancelled.
        """
        options = Options(
            engine,
            optimizations,
            timeout,
            priority,
            label,
            tags,
            single_flight=single_flight,
        )
        queries: list[Query[pl.DataFrame]] = []
        try:
            for frame in checked_frames(lazy_frames):
                queries.append(self._collect(frame, "async", options))  # noqa: PERF401  # they are cancelled if one raises
            return Completions(queries)
        except BaseException:
            for query in reversed(queries):  # see `Completions.close`
                query.cancel()
            raise

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
        tags: Tags | None = None,
    ) -> ResultStream[pl.DataFrame]:
        """
        Schedule a query and return its result in batches, as ``LazyFrame.collect_batches`` does.

        With the streaming engine, which is the default here, the first batches come long before
        the end, and the query waits for a slow consumer: it is at most two batches ahead. While it
        waits, another query may use its slot; after that it waits for a slot, before the queries
        in the queue.

        Parameters
        ----------
        lf
            The query.
        chunk_size
            Rows of each batch; None leaves their number to Polars.
        maintain_order
            Whether the batches come in the order of the rows; if not, they may come sooner.
        engine, optimizations, priority, label, tags
            As for `collect_async`.
        timeout
            As for `collect_async`, until the last batch is ready.

        Returns
        -------
        ResultStream
            An iterator, async or not, over DataFrames of `chunk_size` rows; the last may have
            fewer.

        Raises
        ------
        TypeError, EngineUnavailableError, CollectorClosedError, ForkedProcessError
            As for `collect_async`.
        QueueFullError
            As for `collect_async`; also if ``max_streams`` streams are open.
        ValueError
            As for `collect_async`; also if `chunk_size` is less than 1.
        """
        check_frame(lf)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be 1 or more rows, got {chunk_size!r}")
        options = Options(engine, optimizations, timeout, priority, label, tags)
        resolution = self._resolved(options, "batches")
        buffer = Buffer()
        operation = operations.Batches(
            lf, resolution.engine, optimizations, buffer, chunk_size, maintain_order
        )
        try:
            return Batches(self._submit(operation, resolution, options), buffer)
        except BaseException:
            # Ctrl-C, before the end of the query ends the buffer: its thread might wait for ever.
            buffer.close()
            raise

    def sink_async(
        self,
        sink: pl.LazyFrame,
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
        tags: Tags | None = None,
        gevent: bool = False,
    ) -> QueryHandle[None]:
        """
        Schedule a sink, such as ``lf.sink_parquet(path, lazy=True)``, and return its handle.

        As in Polars, sinks run on the streaming engine by default. A sink that needs this process
        runs in it, whatever the executor of the collector, and cannot be stopped: ``sink_batches``,
        a sink to a file object, and one with a function that makes, or is called with, the paths.

        Parameters
        ----------
        sink
            The frame that ``sink_parquet``, ``sink_ipc``, ``sink_csv``, ``sink_ndjson`` or another
            sink of Polars returns with ``lazy=True``.
        engine, optimizations, timeout, priority, label, tags, gevent
            As for `collect_async`.

        Returns
        -------
        QueryHandle
            Awaitable in asyncio and trio; the result is None, once all is written.

        Raises
        ------
        TypeError
            `sink` is no LazyFrame; without ``lazy=True`` the sink has run already.
        ValueError, EngineUnavailableError, QueueFullError, CollectorClosedError, ForkedProcessError
            As for `collect_async`.
        """
        if sink is None:
            raise TypeError(
                "sink must be a LazyFrame, got None: the sink has run already, on this thread, "
                "since it was not given lazy=True"
            )
        check_frame(sink)
        options = Options(engine, optimizations, timeout, priority, label, tags, gevent=gevent)
        resolution = self._resolved(options, "batches")
        operation = Sink(sink, resolution.engine, optimizations)
        return QueryHandle(self._submit(operation, resolution, options))

    def collect_schema_async(
        self,
        lf: pl.LazyFrame,
        *,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
        tags: Tags | None = None,
        gevent: bool = False,
    ) -> QueryHandle[pl.Schema]:
        """
        Schedule the look-up of a query's schema, for which Polars may have to open files.

        Parameters
        ----------
        lf
            The query.
        timeout, priority, label, tags, gevent
            As for `collect_async`. Unless `priority` is below 0, the look-up counts as small.

        Returns
        -------
        QueryHandle
            Awaitable in asyncio and trio; the result is a ``pl.Schema``.

        Raises
        ------
        TypeError, ValueError, QueueFullError, CollectorClosedError, ForkedProcessError
            As for `collect_async`.
        """
        check_frame(lf)
        options = Options(
            "in-memory", DEFAULT_OPTIMIZATIONS, timeout, priority, label, tags, gevent=gevent
        )
        resolution = self._resolved(options, "async")
        return QueryHandle(self._submit(Schema(lf), resolution, options))

    def run(
        self,
        function: Callable[[*Ts], T],
        *args: *Ts,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
        tags: Tags | None = None,
    ) -> QueryHandle[T]:
        """
        Schedule a call of a function that blocks, and return its handle at once.

        It is for what Polars has no query for, such as ``read_excel``, ``write_database`` and
        operations on DataFrames. The call waits in the queue with the queries, takes a slot, and
        counts as one of them in events, statistics and limits. The engine of the collector means
        nothing to it: what the function collects itself runs on the engine that it names.

        On threads the function sees the context variables of the caller. In other processes it
        gets copies of its arguments and has to be sent, as the Python functions of queries; with
        ``executor="auto"`` it goes to a worker process, if it can. A function that has begun in a
        worker process is never run again, whatever becomes of that.

        Parameters
        ----------
        function
            The function; no coroutine function, and no generator.
        *args
            Its arguments. For those with names use ``functools.partial``.
        timeout, priority, label, tags
            As for `collect_async`. Without a `priority` the call counts as a query of unknown size
            at first, and after that by how long earlier calls of the function took.

        Returns
        -------
        QueryHandle
            Awaitable in asyncio and trio; the result is what the function returns. It raises what
            the function raises, unchanged; but tasks get a RuntimeError for StopIteration, as from
            any coroutine.

        Raises
        ------
        TypeError
            `function` cannot be called, or is a coroutine function; or as for `collect_async`.
        ValueError, QueueFullError, CollectorClosedError, ForkedProcessError
            As for `collect_async`.

        Examples
        --------
        >>> import polars as pl
        >>> import polars_async as pa
        >>> def count(name: str) -> int:
        ...     return pl.DataFrame({name: [1, 2, 3]}).height
        >>> with pa.Collector() as collector:
        ...     print(collector.run(count, "a", label="a count").result())
        3
        """
        _check_function(function)
        options = Options(None, DEFAULT_OPTIMIZATIONS, timeout, priority, label, tags)
        fork.check()
        return QueryHandle(self._submit(Run(function, args), OF_FUNCTION, options))

    def collect_background(
        self,
        lf: pl.LazyFrame,
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
        tags: Tags | None = None,
        single_flight: bool | None = None,
    ) -> BackgroundQuery[pl.DataFrame]:
        """
        Schedule a query to be fetched by threads, as ``LazyFrame.collect(background=True)``.

        Parameters and errors are those of `collect_async`.

        Returns
        -------
        BackgroundQuery
            With ``fetch()``, ``fetch_blocking()`` and ``cancel()``; the result is a DataFrame.
        """
        options = Options(
            engine,
            optimizations,
            timeout,
            priority,
            label,
            tags,
            single_flight=single_flight,
        )
        return BackgroundQuery(self._collect(lf, "background", options))

    def collect_all_background(
        self,
        lazy_frames: Iterable[pl.LazyFrame],
        *,
        engine: EngineRequest | None = None,
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
        timeout: float | None = None,
        priority: int = 0,
        label: str | None = None,
        tags: Tags | None = None,
        single_flight: bool | None = None,
    ) -> BackgroundQuery[list[pl.DataFrame]]:
        """
        Schedule several frames as one query to be fetched by threads.

        Parameters and errors are those of `collect_all_async`.

        Returns
        -------
        BackgroundQuery
            As for `collect_background`; the result is a list with one DataFrame for each frame.
        """
        options = Options(
            engine,
            optimizations,
            timeout,
            priority,
            label,
            tags,
            single_flight=single_flight,
        )
        return BackgroundQuery(self._collect_all(lazy_frames, "background", options))

    def resolve_engine(
        self,
        engine: EngineRequest | None = None,
        *,
        path: QueryPath = "async",
        optimizations: pl.QueryOptFlags = DEFAULT_OPTIMIZATIONS,
    ) -> Resolution:
        """Return which engine this collector would run a query on; see `resolve_engine`."""
        # Synchronous queries run on the thread that asks, whatever the executor.
        return self._decided(engine, path, optimizations, here=path == "sync")

    def _decided(
        self,
        engine: EngineRequest | None,
        path: QueryPath,
        optimizations: pl.QueryOptFlags,
        *,
        here: bool,
    ) -> Resolution:
        if engine is None or request_of(engine) == "auto":
            engine = self.engine
        return decide(
            engine,
            path,
            self._gpu_policy,
            self._default_engine,
            gpu_elsewhere=self._elsewhere and not here,
            gpu_in_workers=self._gpus_in_workers and not here,
            optimizations=optimizations,
        )

    @property
    def closed(self) -> bool:
        """Whether the collector was closed, and takes no more queries."""
        return self._cpu.admission.closed

    def clear_cache(self) -> None:
        """
        Drop all results that are kept: see `cache`. Any thread may call this.

        Those of queries that were submitted before are not kept either.
        """
        self._flights.clear()

    def stats(self) -> dict[str, Any]:
        """
        Return the load of this collector and the totals since it was made, which JSON can write.

        Counters only ever grow, and are named in `Collector.COUNTERS`. All else are gauges, which
        rise and fall. Queries on the GPU are counted in both; functions given to `run` count as
        queries.

        Returns
        -------
        dict
            Numbers by flat keys. The counters:

            - ``submitted``, and the five outcomes ``completed``, ``failed``, ``cancelled``,
              ``timed_out`` and ``rejected``. At any time ``submitted`` is the sum of these five, of
              ``waiting``, and of ``running`` less ``abandoned``.
            - ``downgraded``, ``fell_back``: queries for which another engine ran.
            - ``inline``: queries that ran on the threads that submitted them.
            - ``shared``: queries that shared the run of an equal one; ``from_cache``: those whose
              result was kept from before.
            - ``queue_seconds``, ``run_seconds``: how long queries waited and ran, in all.
            - ``memory_waits``, ``memory_seconds``: queries that started later for want of memory
              alone, and how much later, in all.
            - ``workers_died``: worker processes that died with a query.

            The gauges:

            - ``running``, of which ``abandoned`` were cancelled or timed out and hold their slot
              until they end; ``paused``, the streams that wait for their consumer, or for a slot
              after that, and hold none; ``waiting``, of which ``sharing`` wait for the runs of
              equal ones, and need no slot; ``gpu_running`` and ``gpu_waiting``, those of them on
              the GPU.
            - ``streams``: the streams of batches that run or wait.
            - ``workers``: worker processes.
            - ``memory``: bytes that this process and its workers take now, as far as they count
              for ``max_memory``; None without that limit.
            - ``max_running``, ``max_waiting``, ``max_streams``, ``max_memory``: the limits; None
              where there is none.
            - ``cached``, ``cached_bytes``: the results that are kept, and their size.
            - ``gpu_failures``, ``gpu_cooldown_seconds``: of the whole process, the failures in a
              row of the GPU, and how long it will not be used for that; of several GPUs, those of
              the most failures and of the longest cooldown. In worker processes each GPU has its
              own: ``gpu_0_failures`` and ``gpu_0_cooldown_seconds`` are those of the GPU with
              NVML's index 0, once it has run a query.
        """
        *on_gpus, cpu = (lane.admission for lane in self._lanes)
        stats = stats_of(cpu, on_gpus, self._flights)
        executors = (self._gpu.executor, self._cpu.executor)  # the lanes of one GPU share the first
        stats["inline"] = 0 if self._cpu.inline is None else self._cpu.inline.ran
        stats["workers"] = sum(each.worker_count for each in executors)
        stats["workers_died"] = sum(each.worker_deaths for each in executors)
        return stats

    def queries(self) -> list[QueryInfo]:
        """
        Return what waits and runs now, in the order of submission; any thread may call this.

        Returns
        -------
        list of QueryInfo
            A record of each query in the queue or in a slot: with paused streams, those on GPUs,
            and those that were cancelled or timed out and have not stopped yet.
        """
        return [info_of(query, state) for query, state in self._states().items()]

    def cancel(self, query_id: int) -> bool:
        """
        Cancel the query of a number that `queries`, a handle or an event tells.

        Returns
        -------
        bool
            False if this collector has no such query, or it is done already.
        """
        return any(query.cancel() for query in self._states() if query.id == query_id)

    def close(
        self, *, wait: bool = True, cancel_waiting: bool = True, cancel_running: bool = False
    ) -> None:
        """
        Take no more queries. Any thread may call this, and more than once.

        Parameters
        ----------
        wait
            Whether to block the calling thread (just the greenlet, where gevent has patched
            threads) until all queries have really ended. `aclose` is for asyncio and trio.
        cancel_waiting
            Whether to cancel queries in the queue, and streams of batches; else they still run.
        cancel_running
            Whether to cancel running queries, too: in worker processes they are stopped; on threads
            they go on to their end, and their results are dropped.

        Raises
        ------
        RuntimeError
            A Python function of a running query called this with `wait`, and would wait for its
            own query.
        """
        if wait:
            _check_outside("close", "pass wait=False")
        _close_lanes(self._lanes, cancel_waiting=cancel_waiting, cancel_running=cancel_running)
        self._flights.clear()
        if wait:
            for lane in self._lanes:
                block_or_let_run(lane.admission)

    async def aclose(self, *, cancel_waiting: bool = True, cancel_running: bool = False) -> None:
        """
        Take no more queries, and suspend the calling task until all queries have really ended.

        Parameters
        ----------
        cancel_waiting, cancel_running
            As for `close`.

        Raises
        ------
        RuntimeError
            A Python function of a running query called this, and would wait for its own query.
        """
        _check_outside("aclose", "call close(wait=False)")
        _close_lanes(self._lanes, cancel_waiting=cancel_waiting, cancel_running=cancel_running)
        self._flights.clear()
        bridge = bridges.current()
        for lane in self._lanes:
            await Suspension(bridge, lane.admission)

    # As a default, since at exit this module may be cleared before its last collector is freed.
    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # No weakref.finalize: it would hold the lanes, whose hook may hold the collector.
        if not is_finalizing() and hasattr(self, "_of_one_gpu"):  # else __init__ has raised
            _close_lanes(self._lanes)
            self._flights.clear()

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

    def _collect(self, lf: pl.LazyFrame, path: QueryPath, options: Options) -> Query[pl.DataFrame]:
        check_frame(lf)
        resolution = self._resolved(options, path)
        operation = Collect(lf, resolution.engine, options.optimizations)
        return self._submit(operation, resolution, options)

    def _collect_all(
        self, lazy_frames: Iterable[pl.LazyFrame], path: QueryPath, options: Options
    ) -> Query[list[pl.DataFrame]]:
        frames = checked_frames(lazy_frames)
        resolution = self._resolved(options, path)
        operation = CollectAll(frames, resolution.engine, options.optimizations)
        return self._submit(operation, resolution, options)

    def _result_in_turn(
        self, operation_on: Callable[[pl.Engine], Operation[T]], optimizations: pl.QueryOptFlags
    ) -> T:
        """
        Run an operation for a synchronous method of Polars, which blocks until its turn is over.

        `operation_on` makes it for the engine of the synchronous path.
        """
        fork.check()
        resolution = self._decided(None, "sync", optimizations, here=False)
        warn_of(resolution)
        options = Options(None, optimizations, None, 0, None)
        query = self._submit(operation_on(resolution.engine), resolution, options)
        try:
            result = result_of(query)
        except BaseException:
            # What interrupts the wait, such as Ctrl-C: no caller has a handle of the query. Not in
            # `result_of`: the interrupt may come as that is called.
            query.cancel()
            raise
        else:
            if query.resolution.fell_back:
                warn_of(query.resolution)
            return result
        finally:
            del query  # an error's traceback holds this frame, which else held the error

    def _resolved(self, options: Options, path: QueryPath) -> Resolution:
        fork.check()
        resolution = self.resolve_engine(
            options.engine, path=path, optimizations=options.optimizations
        )
        warn_of(resolution)
        return resolution

    def _states(self) -> dict[Query[Any], str]:
        return states_of([lane.admission for lane in self._lanes])

    @property
    def _lanes(self) -> Iterator[Lane]:
        """All lanes, that of the CPU last: the queries of the others may fall back to it."""
        yield self._gpu
        # Listed when `close` has closed the lane above: no more of these are made from then on.
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
            lane = self._of_one_gpu[key] = self._make_gpu_lane(Limits(1, exclusive=True))
            # Last: a signal handler that closes the collector closes the lanes that are listed.
            lane.admission.closed = self._gpu.admission.closed
        return lane

    def _submit(
        self, operation: Operation[T], resolution: Resolution, options: Options
    ) -> Query[T]:
        lane = self._lane(resolution)
        estimate, fingerprint = None, None
        if not operation.runs_engine:
            if isinstance(operation, Run):
                fingerprint = operation.fingerprint
            else:
                estimate = _TINY
        query = Query(
            operation,
            resolution,
            self._reporter,
            lane.admission.owner,
            priority=options.priority,
            label=options.label,
            tags=options.tags,
            estimate=estimate,
            chooser=self._chooser if resolution.name == ADAPTIVE else None,
            fingerprint=fingerprint,
        )
        if isinstance(operation, operations.Batches):
            operation.buffer.bind(PausableQuery(lane, query))
        if not isinstance(lane.executor, ThreadsExecutor) or lane.admission.memory is not None:
            query.call_site = call_site()
        shares = options.single_flight
        if shares is None:
            shares = self._single_flight
        here = lane.submit(query, partial(self._flights.admit, lane) if shares else None)
        try:
            if options.timeout is not None and not query.done:
                try:
                    query.expire_in(options.timeout)
                except BaseException:  # no thread can start for the timers, or Ctrl-C
                    query.cancel()
                    raise
        finally:
            if here is not None:
                lane.run_inline(query, here)
        return query


def stats_of_all() -> list[tuple[str, dict[str, Any]]]:
    """Return where each collector that is not closed runs queries, and its statistics."""
    # `valuerefs` copies in one step: other threads make collectors meanwhile.
    alive = [known() for known in _alive.valuerefs()]
    return [(each.executor, each.stats()) for each in alive if each is not None and not each.closed]


def _check_function(function: object) -> None:
    if not callable(function):
        raise TypeError(f"function must be callable, got {function!r}")
    for called in (function, type(function).__call__):
        if iscoroutinefunction(called) or isasyncgenfunction(called):
            raise async_function_error(f"{function!r} is an async one")


def _check_outside(method: str, remedy: str) -> None:
    if in_query():
        raise RuntimeError(
            f"{method}() was called from a Python function of a running query, and would wait for "
            f"that query: {remedy}"
        )


def _close_lanes(
    lanes: Iterable[Lane], *, cancel_waiting: bool = False, cancel_running: bool = False
) -> None:
    for lane in lanes:
        lane.close(cancel_waiting=cancel_waiting, cancel_running=cancel_running)
