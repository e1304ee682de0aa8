"""Await Polars queries from asyncio, trio and gevent; the engine that ran is never a secret."""

from polars_async.api import collect_all_async, collect_async, configure, default_collector
from polars_async.background import BackgroundQuery
from polars_async.collector import Collector
from polars_async.engine import AsyncEngine
from polars_async.errors import (
    CollectorClosedError,
    EngineDowngradeWarning,
    EngineUnavailableError,
    ForkedProcessError,
    PolarsAsyncError,
    QueryTimeoutError,
    QueueFullError,
)
from polars_async.events import EventKind, QueryEvent
from polars_async.gpu import GpuDevice, GpuStatus, gpu_status
from polars_async.handle import QueryHandle
from polars_async.reasons import Reason
from polars_async.resolution import Resolution, resolve_engine
from polars_async.streams import ResultStream
from polars_async.support import GpuSupport, Support, gpu_support

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
    "QueryTimeoutError",
    "QueueFullError",
    "Reason",
    "Resolution",
    "ResultStream",
    "Support",
    "collect_all_async",
    "collect_async",
    "configure",
    "default_collector",
    "gpu_status",
    "gpu_support",
    "resolve_engine",
]
