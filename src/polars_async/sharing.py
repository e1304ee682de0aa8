"""Frames in shared memory, which worker processes map instead of being sent them."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Final

import polars as pl
from polars.io.plugins import register_io_source

from polars_async._upstream import map_ipc, without_warning
from polars_async.errors import PolarsAsyncError
from polars_async.executors.extensions import extension_names, read_extended
from polars_async.executors.parcels import mark_sorted, new_file, path_of, sorted_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


def share(frame: pl.DataFrame) -> pl.LazyFrame:
    """
    Put a frame into shared memory, once, and give a query that reads it there.

    A query over a frame in memory takes that along to its worker process, time and again, and
    Polars packs some 100 MB in a second. What is shared is mapped there, by any number of queries
    and workers at once. The memory is free when nothing holds the query, or one that was made of
    it, any more. Needs Linux, and cloudpickle where it is sent to a worker.

    Parameters
    ----------
    frame
        The frame, which is copied; it may have no column of Python objects.

    Returns
    -------
    LazyFrame
        To be used as ``frame.lazy()``, in this process and in worker processes on this machine.

    Raises
    ------
    TypeError
        `frame` is no DataFrame.

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
    file = new_file()
    try:
        frame.write_ipc(path_of(file))
    except BaseException:
        os.close(file)
        raise
    source = _Source(file, dict(frame.schema), sorted_columns(frame))
    return without_warning(register_io_source)(source, schema=frame.schema, is_pure=True)


class _Source:
    """What Polars asks for the rows; it holds the shared memory, and goes to a worker as a name."""

    def __init__(
        self, file: int, schema: Mapping[str, pl.DataType], in_order: Mapping[int, bool]
    ) -> None:
        self._file: Final = file
        self._schema: Final = schema
        self._in_order: Final = in_order

    def __call__(
        self,
        with_columns: list[str] | None,
        predicate: pl.Expr | None,
        n_rows: int | None,
        batch_size: int | None,  # noqa: ARG002  # as Polars calls it
    ) -> Iterator[pl.DataFrame]:
        read = partial(map_ipc, path_of(self._file), self._schema)
        frame = read_extended(read, extension_names(self._schema.values()))
        mark_sorted(frame, self._in_order)
        if n_rows is not None:
            frame = frame.head(n_rows)
        if predicate is not None:
            frame = frame.filter(predicate)
        if with_columns is not None:
            # A frame without columns has no rows, unless it is told how many.
            rows = frame.height
            frame = frame.select(with_columns) if with_columns else pl.DataFrame(height=rows)
        yield frame

    def __reduce__(self) -> tuple[object, ...]:
        status = os.fstat(self._file)
        identity = status.st_dev, status.st_ino
        return _attach, (os.getpid(), self._file, identity, self._schema, self._in_order)

    # As a default, since a frozen program clears this module before it lets go of its own.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._file)


def _attach(
    owner: int,
    file: int,
    identity: tuple[int, int],
    schema: Mapping[str, pl.DataType],
    in_order: Mapping[int, bool],
) -> _Source:
    try:
        own = os.open(f"/proc/{owner}/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        raise _lost(owner) from None
    status = os.fstat(own)
    if (status.st_dev, status.st_ino) != identity:
        os.close(own)
        raise _lost(owner)
    return _Source(own, schema, in_order)


def _lost(owner: int) -> PolarsAsyncError:
    return PolarsAsyncError(
        f"the frame that process {owner} has shared is not to be had here: share() is for worker "
        "processes on the same machine, while that process lives. Use a file that both can see"
    )
