"""Frames in shared memory: worker processes map them, instead of receiving a copy."""

from __future__ import annotations

import sys

import polars as pl
from polars.io.plugins import register_io_source

from polars_async._runtime.upstream import without_warning
from polars_async.errors import PolarsAsyncError


def share(frame: pl.DataFrame) -> pl.LazyFrame:
    """
    Put a frame into shared memory, once, and return a lazy frame that reads it there.

    A query over a frame in memory takes a copy along to its worker process each time, and Polars
    packs some 100 MB in a second. A shared frame is mapped there, by any number of queries and
    workers at once. The memory is freed with the last lazy frame that reads it. Needs Linux, and
    cloudpickle where a query is sent to a worker.

    Each shared frame holds a file open, up to a quarter of the process's limit (``RLIMIT_NOFILE``).
    Frames beyond are copied for each query that is sent. So are all frames for the workers of an
    executor of the caller's, once this process has become that of another user.

    Parameters
    ----------
    frame
        The frame, which is copied. It may not have a column of Python objects.

    Returns
    -------
    LazyFrame
        Used like ``frame.lazy()``, in this process and in worker processes on this machine.

    Raises
    ------
    TypeError
        `frame` is no DataFrame.
    PolarsAsyncError
        This is not Linux.

    Examples
    --------
    >>> import polars as pl
    >>> import polars_async as pa
    >>> prices = pa.share(pl.DataFrame({"item": ["pen", "ink"], "price": [2, 5]}))
    >>> pa.collect_async(prices.filter(item="ink")).result()["price"].item()
    5
    """
    if not isinstance(frame, pl.DataFrame):
        raise TypeError(f"frame must be a DataFrame, got {type(frame).__name__}")
    if sys.platform != "linux":
        raise PolarsAsyncError(f"share() needs Linux, and this is {sys.platform}: use frame.lazy()")
    from polars_async.executors.shared_frames import SharedFrame  # noqa: PLC0415  # Linux alone

    source = SharedFrame.of(frame)
    return without_warning(register_io_source)(source, schema=frame.schema, is_pure=True)
