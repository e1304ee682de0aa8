"""The sources of shared frames, which are sent as file descriptors. For Linux alone."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

import polars as pl

from polars_async._runtime.descriptors import above_standard_files
from polars_async._runtime.files import (
    Identity,
    content_of,
    identity_of,
    is_open_to_others,
    most_files,
    new_file,
    open_shared,
)
from polars_async._runtime.upstream import map_ipc
from polars_async.errors import PolarsAsyncError
from polars_async.executors.extensions import extension_names, read_extended
from polars_async.executors.message import MOST_FILES, attached
from polars_async.executors.serialization import mark_sorted, opened, sorted_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class SharedFrame:
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

    @classmethod
    def of(cls, frame: pl.DataFrame) -> SharedFrame:
        """Put a copy of `frame` into shared memory."""
        return cls(_in_file(frame), dict(frame.schema), sorted_columns(frame))

    def __call__(
        self,
        with_columns: list[str] | None,
        predicate: pl.Expr | None,
        n_rows: int | None,
        batch_size: int | None,  # noqa: ARG002  # as Polars calls it
    ) -> Iterator[pl.DataFrame]:
        """Yield the frame, as far as Polars asks for it."""
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
            if _attach_to_message(file) or (isinstance(held, int) and is_open_to_others(file)):
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


_with_descriptor: Final[WeakSet[SharedFrame]] = WeakSet()


def _in_file(frame: pl.DataFrame) -> int:
    file = new_file()
    try:
        with opened(file, "wb") as target:
            frame.write_ipc(target)
    except BaseException:
        os.close(file)
        raise
    return file


def _attach_to_message(file: int) -> bool:
    """Send a copy of `file` with the message that this thread packs; return False if it cannot."""
    files = attached()
    if files is None:
        return False
    identity = identity_of(file)
    if identity not in files:
        if len(files) >= min(MOST_FILES, most_files()):
            return False
        files[identity] = above_standard_files(os.dup(file))
    return True


def _attach(
    owner: int,
    file: int,
    identity: Identity,
    schema: Mapping[str, pl.DataType],
    sorted_by: Mapping[int, bool],
) -> SharedFrame:
    own = open_shared(owner, file, identity)
    if own is None:
        raise PolarsAsyncError(
            f"the frame that process {owner} has shared cannot be opened here: share() is for "
            "worker processes on the same machine, of the same user, while that process lives and "
            "stays that user's. Use a file that both can see"
        )
    return SharedFrame(own, schema, sorted_by)


def _copied(
    content: bytes, schema: Mapping[str, pl.DataType], sorted_by: Mapping[int, bool]
) -> SharedFrame:
    file = new_file()
    with opened(file, "wb") as target:
        target.write(content)
    return SharedFrame(file, schema, sorted_by)
