"""
Await Polars queries from asyncio, trio and gevent, and see which engine ran them, and why.

The path of a query, from the call to the task that awaits it::

    api, engine ──> collector ──> resolution ──> gpu          which engine runs it
                        │
                        v
      scheduling: lane ──> admission ──> fair_queue           which query runs, and when
                   │  a worker thread has it, at once or from the queue
                   v
      executors: threads | gpu_thread | processes | futures   where it runs
                   │  the outcome goes back to the lane: Query.set_finished
                   v
      bridges: mailbox ──> asyncio | trio | gevent | threads  how its waiters are woken

A query that is known to be quick takes a shorter path: the thread that submits it runs it at once,
in ``scheduling.inline``, if the process and its loop are free for that.

A cancellation takes another path, on the thread of the caller: Query.cancel makes the state final,
and then, in Query._after_cancel, calls what the executor has set by Query.stop_with (for a worker
process WorkerCall.stop, which sends SIGINT) and wakes the waiters.

Rooms, from the lowest to the highest; each imports only from those before it:

- ``errors``, ``reasons``: exceptions, and the reasons for a downgrade.
- ``_runtime``: the interpreter, gevent, forks, and every private API of Polars (``upstream``).
- ``bridges``: waiters of each kind of loop, and the buffer between a query and a stream.
- ``gpu``: whether the GPU engine can run, how it runs a query, and what its failures mean.
- ``resolution``, ``wording``, ``events``, ``progress``: the decision about the engine, what took a
  query how long in words, its events, and how far it is.
- ``executors``: the operations of queries, and the executors that run them.
- ``scheduling``: a query's state, the queue, the slots, estimates, the limit of memory, shared runs
  and kept results, and the fallback to the CPU.
- ``iteration``, ``watches``, ``handle``, ``streams``, ``sharing``, ``options``, ``collector``,
  ``api``, ``engine``, ``drawing``, ``showing``: the API for users.
- ``compare``: queries on several engines, each in a worker process of its own, and their answers.
- ``testing``, ``pytest_plugin``, ``doctor``, ``cli``: a simulated GPU, and the console script.
- ``starlette``, ``instrumentation``: for those who import them, with what they need.

Threads: each slot of a lane has at most one worker thread. It takes queries from the queue and runs
them, or waits for the worker process that runs them; that of a paused stream waits beyond the
slots. One thread serves all timers: it times queries out, and interrupts and kills workers that do
not stop. The threads of loops submit and cancel queries, and are woken.

Locks: the lock of an admission (a collector's CPU and GPU lanes share one) guards the queue, the
slots and the state of every query in them, and which queries share a run. Each buffer of a stream,
each pool of workers, each worker, each call of a worker, each transport, the timers, the results
that are kept, and what is known of quick queries and of the memory that queries take have a lock of
their own. None of these is held while a query runs, a hook is called or a waiter is woken, and a
thread that holds one acquires no lock of an admission; a call's lock is acquired before that of its
worker or the timers.
The lock of the GPU (``gpu.offload``) is another matter: the thread of a query on the GPU holds it.
In a forked child every lock is free, or its owner is made anew (``_runtime.fork``).

For Linux alone, and imported where they are used: ``executors.processes``, ``compare.contest``,
``executors.shared_frames``, and in ``_runtime`` ``files``, ``descriptors`` and ``mapping``.
"""

from typing import TYPE_CHECKING

__version__: str

__all__ = [
    "AsyncEngine",
    "BackgroundQuery",
    "Cache",
    "Collector",
    "CollectorClosedError",
    "Comparison",
    "EngineDowngradeWarning",
    "EngineName",
    "EngineRequest",
    "EngineRun",
    "EngineUnavailableError",
    "EventKind",
    "ExecutorRequest",
    "ForkedProcessError",
    "GpuDevice",
    "GpuPolicy",
    "GpuStatus",
    "GpuSupport",
    "MemoryLimitWarning",
    "PolarsAsyncError",
    "Progress",
    "QueryEvent",
    "QueryHandle",
    "QueryInfo",
    "QueryMemoryError",
    "QueryPath",
    "QueryTimeoutError",
    "QueueFullError",
    "Reason",
    "Resolution",
    "ResultStream",
    "Support",
    "Tags",
    "WorkerDiedError",
    "as_completed",
    "collect_all_async",
    "collect_async",
    "collect_batches_async",
    "collect_schema_async",
    "compare_engines",
    "configure",
    "dask_executor",
    "default_collector",
    "gpu_status",
    "gpu_support",
    "resolve_engine",
    "run",
    "share",
    "show_progress",
    "sink_async",
]

if TYPE_CHECKING:
    from polars_async.api import (
        as_completed,
        collect_all_async,
        collect_async,
        collect_batches_async,
        collect_schema_async,
        configure,
        default_collector,
        run,
        sink_async,
    )
    from polars_async.collector import Collector
    from polars_async.compare.comparison import Comparison
    from polars_async.compare.engines import compare_engines
    from polars_async.compare.results import EngineRun
    from polars_async.engine import AsyncEngine
    from polars_async.errors import (
        CollectorClosedError,
        EngineDowngradeWarning,
        EngineUnavailableError,
        ForkedProcessError,
        MemoryLimitWarning,
        PolarsAsyncError,
        QueryMemoryError,
        QueryTimeoutError,
        QueueFullError,
        WorkerDiedError,
    )
    from polars_async.events import EventKind, QueryEvent, Tags
    from polars_async.executors.dask import dask_executor
    from polars_async.executors.factory import ExecutorRequest
    from polars_async.gpu import gpu_status
    from polars_async.gpu.status import GpuDevice, GpuStatus
    from polars_async.gpu.support import GpuSupport, Support, gpu_support
    from polars_async.handle import BackgroundQuery, QueryHandle
    from polars_async.iteration import ResultStream
    from polars_async.options import Cache
    from polars_async.progress import Progress
    from polars_async.reasons import Reason
    from polars_async.resolution import (
        EngineName,
        EngineRequest,
        GpuPolicy,
        QueryPath,
        Resolution,
        resolve_engine,
    )
    from polars_async.scheduling.listing import QueryInfo
    from polars_async.sharing import share
    from polars_async.showing import show_progress
else:
    from importlib import import_module

    # Forks are noticed from now on, even if nothing else is imported before the first one.
    import_module(f"{__name__}._runtime.fork")

    # Each name is imported when it is first used: pytest imports this package at its start, for its
    # plug-in, and the import of Polars takes a while.
    _HOMES = {
        "AsyncEngine": "engine",
        "BackgroundQuery": "handle",
        "Cache": "options",
        "Collector": "collector",
        "CollectorClosedError": "errors",
        "Comparison": "compare.comparison",
        "EngineDowngradeWarning": "errors",
        "EngineName": "resolution",
        "EngineRequest": "resolution",
        "EngineRun": "compare.results",
        "EngineUnavailableError": "errors",
        "EventKind": "events",
        "ExecutorRequest": "executors.factory",
        "ForkedProcessError": "errors",
        "GpuDevice": "gpu.status",
        "GpuPolicy": "resolution",
        "GpuStatus": "gpu.status",
        "GpuSupport": "gpu.support",
        "MemoryLimitWarning": "errors",
        "PolarsAsyncError": "errors",
        "Progress": "progress",
        "QueryEvent": "events",
        "QueryHandle": "handle",
        "QueryInfo": "scheduling.listing",
        "QueryMemoryError": "errors",
        "QueryPath": "resolution",
        "QueryTimeoutError": "errors",
        "QueueFullError": "errors",
        "Reason": "reasons",
        "Resolution": "resolution",
        "ResultStream": "iteration",
        "Support": "gpu.support",
        "Tags": "events",
        "WorkerDiedError": "errors",
        "as_completed": "api",
        "collect_all_async": "api",
        "collect_async": "api",
        "collect_batches_async": "api",
        "collect_schema_async": "api",
        "compare_engines": "compare.engines",
        "configure": "api",
        "dask_executor": "executors.dask",
        "default_collector": "api",
        "gpu_status": "gpu",
        "gpu_support": "gpu.support",
        "resolve_engine": "resolution",
        "run": "api",
        "share": "sharing",
        "show_progress": "showing",
        "sink_async": "api",
    }

    def __getattr__(name: str) -> object:
        if name == "__version__":
            return _version()
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value

    def _version() -> str:
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  # takes a while

        try:
            return version("polars-async")
        except PackageNotFoundError:
            return "0+unknown"  # run from a clone that is not installed

    def __dir__() -> list[str]:
        return [*__all__, "__version__"]
