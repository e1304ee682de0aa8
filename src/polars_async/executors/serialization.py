"""Packs what goes from one process to another: operations, plans, frames and other objects."""

from __future__ import annotations

import io
import os
import pickle
from functools import cache, partial
from importlib import import_module
from io import BufferedReader, BufferedWriter, FileIO
from mmap import ACCESS_READ, mmap
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, overload

import polars as pl

from polars_async._runtime.upstream import (
    extensions_of,
    hands_over_here,
    last_pickled,
    map_ipc,
    optimization_flags,
    optimizations_of,
)
from polars_async.bridges.buffer import Buffer
from polars_async.errors import PolarsAsyncError, describe
from polars_async.executors.blame import culprit_of, unsendable_error
from polars_async.executors.carried import bare
from polars_async.executors.exports import can_be_pickled
from polars_async.executors.extensions import (
    LOSES_EXTENSIONS,
    extension_names,
    extensions_known,
    read_extended,
)
from polars_async.executors.message import MOST_FILES, Message, SerializationAbort, attaching
from polars_async.executors.operations import Batches, Run
from polars_async.executors.staying import StaysHereError, UnsendableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from polars_async._runtime.files import Identity

_FrameInfo: TypeAlias = "tuple[dict[str, pl.DataType] | None, dict[int, bool], set[str]]"
"""Of a frame: the schema if it is to be mapped, the sorted columns, and the extension types."""

_MAX_INLINE: Final = 1 << 18
"""Bytes of a frame up to which it is among the other data: a file to map would take longer."""


@overload
def opened(file: int, mode: Literal["rb"]) -> BufferedReader: ...
@overload
def opened(file: int, mode: Literal["wb"]) -> BufferedWriter: ...
def opened(file: int, mode: Literal["rb", "wb"]) -> BufferedReader | BufferedWriter:
    """
    Return a file object for `file`, at its start; to close it leaves the descriptor open.

    It is not opened by its path below /proc: that is refused once this process has changed its
    user, and /proc need not be there.
    """
    os.lseek(file, 0, os.SEEK_SET)
    raw = FileIO(file, mode, closefd=False)
    return BufferedReader(raw) if mode == "rb" else BufferedWriter(raw)


def sorted_columns(frame: pl.DataFrame) -> dict[int, bool]:
    """Return which columns are flagged as sorted, and whether they descend: IPC loses the flags."""
    descending = {}
    for number, column in enumerate(frame.get_columns()):
        flags = column.flags
        if flags["SORTED_ASC"] or flags["SORTED_DESC"]:
            descending[number] = flags["SORTED_DESC"]
    return descending


def mark_sorted(frame: pl.DataFrame, columns: Mapping[int, bool]) -> pl.DataFrame:
    """Set the flags that `sorted_columns` has returned on `frame`, in place."""
    all_columns = frame.get_columns() if columns else []
    for number, descending in columns.items():
        frame.replace_column(number, all_columns[number].set_sorted(descending=descending))
    return frame


class _OfPolars:
    """
    Part of a pickler: has Polars serialize plans and frames.

    With a list of `files`, plans and large frames go in files in memory without a name: no other
    program can open them, and they vanish when no process has them open or mapped any more.
    """

    _files: list[int] | None = None
    _abort: SerializationAbort | None = None
    plan_bytes = 0

    def use_files(self, files: list[int] | None, abort: SerializationAbort | None) -> None:
        """Append new files to `files`, and have `abort` watch them."""
        self._files = files
        self._abort = abort

    def persistent_id(self, item: Any) -> tuple[str, Any] | None:
        if isinstance(item, pl.LazyFrame):
            return "plan", self._plan(item)
        if isinstance(item, pl.DataFrame):
            return "frame", self._frame(item)
        if isinstance(item, pl.QueryOptFlags):
            return "optimizations", optimization_flags(item)
        if isinstance(item, Buffer):
            return "buffer", None
        if item is pl.exceptions.PanicException:  # its module cannot be imported
            return "panic", None
        return None

    def _plan(self, lf: pl.LazyFrame) -> bytes | int:
        if not self._has_room():
            plan = _plan_in_bytes(lf)
            self.plan_bytes += len(plan)
            return plan
        number, file = self._new_file()
        _write_plan(lf, file)
        self.plan_bytes += os.fstat(file).st_size
        return number

    def _frame(self, frame: pl.DataFrame) -> tuple[bytes | int, _FrameInfo]:
        extensions = extension_names(frame.dtypes)
        if frame.estimated_size() > _MAX_INLINE and self._has_room():
            number, file = self._new_file()
            with opened(file, "wb") as target:
                frame.write_ipc(target)
            return number, (dict(frame.schema), sorted_columns(frame), extensions)
        stream = io.BytesIO()
        frame.write_ipc_stream(stream)
        return stream.getvalue(), (None, sorted_columns(frame), extensions)

    def _has_room(self) -> bool:
        if self._files is None:
            return False
        from polars_async._runtime.files import most_files  # noqa: PLC0415  # Linux alone

        return len(self._files) < min(MOST_FILES, most_files())

    def _new_file(self) -> tuple[int, int]:
        """Make a file; return its number in the message, and its descriptor."""
        from polars_async._runtime.files import new_file  # noqa: PLC0415  # Linux alone

        assert self._files is not None
        file = new_file()
        self._files.append(file)
        if self._abort is not None:
            self._abort.watch(file)
        return len(self._files) - 1, file


class _Packer(_OfPolars, pickle.Pickler):
    """Pickles functions and classes by their names."""


@cache
def _packer_by_value() -> Any:
    """Return the class of the pickler for what has no name that leads to it in another process."""
    cloudpickle: Any = import_module("cloudpickle")

    class ByValue(_OfPolars, cloudpickle.Pickler):  # type: ignore[misc]
        pass

    return ByValue


class _Unpacker(pickle.Unpickler):
    def __init__(self, message: Message, buffer: object | None) -> None:
        super().__init__(io.BytesIO(message.data))
        self._files = message.files
        self._buffer = buffer

    def persistent_load(self, pid: tuple[str, Any]) -> Any:
        kind, packed = pid
        if kind == "plan":
            return self._plan(packed)
        if kind == "frame":
            return self._frame(*packed)
        if kind == "optimizations":
            return optimizations_of(packed)
        if kind == "buffer":
            return self._buffer
        return pl.exceptions.PanicException

    def _plan(self, packed: bytes | int) -> pl.LazyFrame:
        source = (
            opened(self._files[packed], "rb") if isinstance(packed, int) else io.BytesIO(packed)
        )
        with source:
            if not LOSES_EXTENSIONS:
                return pl.LazyFrame.deserialize(source)
            if isinstance(packed, bytes):
                names = extensions_of(packed)
            else:
                with mmap(self._files[packed], 0, access=ACCESS_READ) as plan:
                    names = extensions_of(plan)
            with extensions_known(names):
                return pl.LazyFrame.deserialize(source)

    def _frame(self, packed: bytes | int, info: _FrameInfo) -> pl.DataFrame:
        schema, sorted_by, extensions = info

        def read() -> pl.DataFrame:
            if isinstance(packed, bytes):
                return pl.read_ipc_stream(io.BytesIO(packed))
            return map_ipc(self._files[packed], schema or {})

        return mark_sorted(read_extended(read, extensions), sorted_by)


def pack(
    item: object,
    *,
    in_files: bool,
    by_value: bool = False,
    abort: SerializationAbort | None = None,
) -> Message:
    """
    Pack an object: anything that can be pickled, and in it frames, plans and operations.

    With `in_files`, plans and large frames go in files, for another process of this machine. With
    `by_value`, functions and classes that cannot be found by their names are sent, too, as those in
    queries: it is for the operation `Run` and its result. A call of `abort` makes it fail early,
    with an error of any kind.

    Raises
    ------
    UnsendableError
        A part of the object cannot be sent.
    StaysHereError
        A plan has to run in this process.
    PolarsAsyncError
        A part of the result cannot be sent.
    """
    message_files: list[int] = []
    shared: dict[Identity, int] = {}
    dump = partial(_dump, item, message_files if in_files else None, abort, by_value=by_value)
    try:
        try:
            data, plan_bytes = attaching(shared if in_files else None, dump)
        finally:
            if abort is not None:
                abort.end()  # before the files are closed below, or by the receiver of the message
    except BaseException:
        Message(b"", [*message_files, *shared.values()]).close()
        raise
    files = [*message_files, *shared.values()]
    return Message(data, files, len(shared), plan_bytes)


def unpack(message: Message, buffer: object | None = None) -> Any:
    """Return the object that was packed, with `buffer` for that of a stream; close the files."""
    try:
        return _Unpacker(message, buffer).load()
    finally:
        message.close()


def buffer_of(operation: Callable[[], object]) -> Buffer | None:
    """Return the buffer of a stream, which stays in this process; None if it is no stream."""
    return operation.buffer if isinstance(operation, Batches) else None


def _dump(
    item: object, files: list[int] | None, abort: SerializationAbort | None, *, by_value: bool
) -> tuple[bytes, int]:
    """Return the pickle of `item`, and the size of the plans in it."""
    try:
        return _dump_with(_Packer, item, files, abort)
    except (UnsendableError, StaysHereError):
        raise
    except Exception as error:
        if not by_value or (abort is not None and abort.is_aborted):
            raise
        if abort is not None:
            abort.end()  # before the files are closed
        if files is not None:
            Message(b"", files).close()
        return _dump_by_value(item, files, abort, error)


def _dump_by_value(
    item: object, files: list[int] | None, abort: SerializationAbort | None, refused: Exception
) -> tuple[bytes, int]:
    is_call = isinstance(bare(item), Run)
    try:
        packer = _packer_by_value()
    except ImportError:
        what = "the query cannot be sent to another process, since the function or an argument"
        if not is_call:
            what = "the result of the function cannot be sent back, since it, or a part of it,"
        kind: type[PolarsAsyncError] = UnsendableError if is_call else PolarsAsyncError
        raise kind(
            f"{what} cannot be pickled by its name ({describe(refused)}): install cloudpickle, or "
            "polars-async[processes], or put its class or function into a module that can be "
            "imported"
        ) from refused
    try:
        return _dump_with(packer, item, files, abort)
    except (UnsendableError, StaysHereError):
        raise
    except Exception as error:
        if abort is not None and abort.is_aborted:
            raise
        if is_call:
            raise unsendable_error(bare(item), describe(error), can_be_pickled) from error
        raise PolarsAsyncError(
            "the result of the function cannot be sent back from its process: "
            f"{culprit_of(item, can_be_pickled)} cannot be pickled ({describe(error)}). Return "
            "what can be, such as a DataFrame"
        ) from error


def _dump_with(
    pickler: Any, item: object, files: list[int] | None, abort: SerializationAbort | None
) -> tuple[bytes, int]:
    target = io.BytesIO()
    packer = pickler(target, protocol=5)
    packer.use_files(files, abort)
    packer.dump(item)
    return target.getvalue(), packer.plan_bytes


def _write_plan(lf: pl.LazyFrame, file: int) -> None:
    """Write a plan to a file."""
    refused: pl.exceptions.ComputeError | None = None
    try:
        with opened(file, "wb") as target:
            lf.serialize(target)
    except pl.exceptions.ComputeError as error:
        refused = error
    with opened(file, "rb") as plan:
        if hands_over_here(plan):
            raise StaysHereError
    if refused is not None:
        raise _unsendable(lf, refused) from refused


def _plan_in_bytes(lf: pl.LazyFrame) -> bytes:
    try:
        plan = lf.serialize()
    except pl.exceptions.ComputeError:
        # What Polars wrote before it failed tells whether the plan may leave this process at all;
        # only a file has it.
        with TemporaryFile() as file:
            _write_plan(lf, file.fileno())
            file.seek(0)
            return file.read()
    if hands_over_here(io.BytesIO(plan)):
        raise StaysHereError
    return plan


def _unsendable(lf: pl.LazyFrame, error: Exception) -> UnsendableError:
    text = str(error)
    _, is_of_python, reason = text.rpartition("python: ")
    if "ModuleNotFoundError" in text and "cloudpickle" in text:
        return UnsendableError(
            "the query cannot be sent to another process, since a Python function in it cannot be "
            "pickled by its name: install cloudpickle, or polars-async[processes]"
        )
    if is_of_python:
        return unsendable_error(last_pickled(lf), reason.strip(), can_be_pickled)
    if "ScanSources::Files" in text:
        return UnsendableError(
            "the query cannot be sent to another process, since it reads an open file: give it the "
            "path of the file, or what it holds, in an io.BytesIO"
        )
    return UnsendableError(
        "the query cannot be sent to another process: a frame or a value in it may be one of "
        f"a column of Python objects ({error})"
    )
