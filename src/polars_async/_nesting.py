"""Whether this thread is in the midst of a query, which a query it asks for must not wait for."""

from __future__ import annotations

from pathlib import Path
from threading import current_thread
from typing import Final

from polars_async import _native
from polars_async._upstream import POOL_THREAD

_NAME: Final = Path("/proc/thread-self/comm")
_OF_GPU_ENGINE: Final = "spmd-executor"
"""How the threads are called on which cudf-polars runs the Python sources of a query."""


class _ThisThread(_native.local):
    in_query: bool | None = None
    in_gpu_query: bool | None = None


_this_thread: Final = _ThisThread()


def enter_worker(*, for_gpu: bool) -> None:
    """Note that all this thread ever does is run queries."""
    _this_thread.in_query = True
    _this_thread.in_gpu_query = for_gpu


def in_gpu_query() -> bool:
    """
    Tell whether a query on the GPU may be what asks: on its own thread, or on one of cudf-polars.

    That is where a Python source of it runs, and what a hook hears of it.
    """
    if _this_thread.in_gpu_query is None:
        _this_thread.in_gpu_query = current_thread().name.startswith(_OF_GPU_ENGINE)
    return _this_thread.in_gpu_query


def in_query() -> bool:
    """
    Tell whether a Python UDF asks, on a worker's thread or on one of Polars' own.

    Polars' own threads are known by their names, which Linux alone tells in this way.
    """
    if _this_thread.in_query is None:
        _this_thread.in_query = _is_polars_own() or in_gpu_query()
    return _this_thread.in_query


def _is_polars_own() -> bool:
    try:
        return POOL_THREAD.match(_NAME.read_text(errors="replace")) is not None
    except OSError:
        return False
