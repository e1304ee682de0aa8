"""Frames in shared memory: worker processes map them, instead of receiving a copy."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

import polars as pl
from polars.io.plugins import register_io_source

from polars_async._runtime.files import (
    Identity,
    attach_to_message,
    content_of,
    identity_of,
    is_open_to_others,
    most_files,
    new_file,
    open_shared,
    opened,
)
from polars_async._runtime.upstream import map_ipc, without_warning
from polars_async.errors import PolarsAsyncError
from polars_async.executors.extensions import extension_names, read_extended
from polars_async.executors.serialization import mark_sorted, sorted_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


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
    source = _Source(_in_file(frame), dict(frame.schema), sorted_columns(frame))
    return without_warning(register_io_source)(source, schema=frame.schema, is_pure=True)


class _Source:
    """
    Source of the rows of a shared frame; it holds the memory, and is sent as a file descriptor.

    If many sources hold a descriptor already, this one holds a mapping instead, since the program
    needs descriptors, too. Its frame is copied for each query that is sent.
    """

    _held: int | pl.DataFrame

    def __init__(
        self, file: int, schema: Mapping[str, pl.DataType], sorted_by: Mapping[int, bool]
    ) -> None:
        self._schema: Final = schema
        self._sorted_by: Final = sorted_by
        if len(_with_descriptor) < most_files():
            self._held = file
            _with_descriptor.add(self)
            return
        try:
            self._held = self._map(file)
        finally:
            os.close(file)

    def __call__(
        self,
        with_columns: list[str] | None,
        predicate: pl.Expr | None,
        n_rows: int | None,
        batch_size: int | None,  # noqa: ARG002  # as Polars calls it
    ) -> Iterator[pl.DataFrame]:
        held = self._held
        frame = self._map(held) if isinstance(held, int) else held
        if n_rows is not None:
            frame = frame.head(n_rows)
        if predicate is not None:
            frame = frame.filter(predicate)
        if with_columns is not None:
            # A frame without columns does not keep the number of its rows.
            rows = frame.height
            frame = frame.select(with_columns) if with_columns else pl.DataFrame(height=rows)
        yield frame

    def _map(self, file: int) -> pl.DataFrame:
        read = partial(map_ipc, file, self._schema)
        frame = read_extended(read, extension_names(self._schema.values()))
        return mark_sorted(frame, self._sorted_by)

    def __reduce__(self) -> tuple[object, ...]:
        held = self._held
        file = held if isinstance(held, int) else _in_file(held)
        about = self._schema, self._sorted_by
        try:
            if attach_to_message(file) or (isinstance(held, int) and is_open_to_others(file)):
                return _attach, (os.getpid(), file, identity_of(file), *about)
            return _copied, (content_of(file), *about)
        finally:
            if not isinstance(held, int):
                os.close(file)

    # `close` as a default: a frozen program clears this module before the objects of its own.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        held = getattr(self, "_held", None)  # __init__ may have failed to map it
        if isinstance(held, int):
            close(held)


_with_descriptor: Final[WeakSet[_Source]] = WeakSet()


def _in_file(frame: pl.DataFrame) -> int:
    file = new_file()
    try:
        with opened(file, "wb") as target:
            frame.write_ipc(target)
    except BaseException:
        os.close(file)
        raise
    return file


def _attach(
    owner: int,
    file: int,
    identity: Identity,
    schema: Mapping[str, pl.DataType],
    sorted_by: Mapping[int, bool],
) -> _Source:
    own = open_shared(owner, file, identity)
    if own is None:
        raise PolarsAsyncError(
            f"the frame that process {owner} has shared cannot be opened here: share() is for "
            "worker processes on the same machine, of the same user, while that process lives and "
            "stays that user's. Use a file that both can see"
        )
    return _Source(own, schema, sorted_by)


def _copied(
    content: bytes, schema: Mapping[str, pl.DataType], sorted_by: Mapping[int, bool]
) -> _Source:
    file = new_file()
    with opened(file, "wb") as target:
        target.write(content)
    return _Source(file, schema, sorted_by)
