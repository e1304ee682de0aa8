"""Await Polars queries from asyncio, trio and gevent; the engine that ran is never a secret."""

from typing import TYPE_CHECKING

from polars_async import _fork as _fork  # from now on it sees forks, whatever is used later

__all__ = [
    "AsyncEngine",
    "BackgroundQuery",
    "Collector",
    "CollectorClosedError",
    "EngineDowngradeWarning",
    "EngineUnavailableError",
    "EventKind",
    "ForkedProcessError",
    "GpuDevice",
    "GpuStatus",
    "GpuSupport",
    "PolarsAsyncError",
    "QueryEvent",
    "QueryHandle",
    "QueryMemoryError",
    "QueryTimeoutError",
    "QueueFullError",
    "Reason",
    "Resolution",
    "ResultStream",
    "Support",
    "WorkerDiedError",
    "collect_all_async",
    "collect_async",
    "configure",
    "dask_executor",
    "default_collector",
    "gpu_status",
    "gpu_support",
    "resolve_engine",
    "share",
]

if TYPE_CHECKING:
    from polars_async.api import collect_all_async, collect_async, configure, default_collector
    from polars_async.collector import Collector
    from polars_async.engine import AsyncEngine
    from polars_async.errors import (
        CollectorClosedError,
        EngineDowngradeWarning,
        EngineUnavailableError,
        ForkedProcessError,
        PolarsAsyncError,
        QueryMemoryError,
        QueryTimeoutError,
        QueueFullError,
        WorkerDiedError,
    )
    from polars_async.events import EventKind, QueryEvent
    from polars_async.executors.dask import dask_executor
    from polars_async.gpu import gpu_status
    from polars_async.gpu.status import GpuDevice, GpuStatus
    from polars_async.gpu.support import GpuSupport, Support, gpu_support
    from polars_async.handle import BackgroundQuery, QueryHandle
    from polars_async.reasons import Reason
    from polars_async.resolution import Resolution, resolve_engine
    from polars_async.sharing import share
    from polars_async.streams import ResultStream
else:
    from importlib import import_module

    # Each is imported when it is first used: pytest imports this package at its start, for the sake
    # of the plug-in, and Polars takes a while.
    _HOMES = {
        "AsyncEngine": "engine",
        "BackgroundQuery": "handle",
        "Collector": "collector",
        "CollectorClosedError": "errors",
        "EngineDowngradeWarning": "errors",
        "EngineUnavailableError": "errors",
        "EventKind": "events",
        "ForkedProcessError": "errors",
        "GpuDevice": "gpu.status",
        "GpuStatus": "gpu.status",
        "GpuSupport": "gpu.support",
        "PolarsAsyncError": "errors",
        "QueryEvent": "events",
        "QueryHandle": "handle",
        "QueryMemoryError": "errors",
        "QueryTimeoutError": "errors",
        "QueueFullError": "errors",
        "Reason": "reasons",
        "Resolution": "resolution",
        "ResultStream": "streams",
        "Support": "gpu.support",
        "WorkerDiedError": "errors",
        "collect_all_async": "api",
        "collect_async": "api",
        "configure": "api",
        "dask_executor": "executors.dask",
        "default_collector": "api",
        "gpu_status": "gpu",
        "gpu_support": "gpu.support",
        "resolve_engine": "resolution",
        "share": "sharing",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
