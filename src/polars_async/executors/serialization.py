"""What goes from one process to another: queries and frames, as bytes and as files."""

from __future__ import annotations

import io
import os
import pickle
from contextlib import suppress
from functools import partial
from mmap import PROT_READ, mmap
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import polars as pl

from polars_async._runtime.files import (
    MOST_IN_MESSAGE,
    Identity,
    attaching,
    most_files,
    new_file,
    opened,
)
from polars_async._runtime.unpatched import RLock, holding
from polars_async._runtime.upstream import (
    extensions_of,
    hands_over_here,
    last_pickled,
    map_ipc,
    optimization_flags,
    optimizations_of,
)
from polars_async.bridges.buffer import Buffer
from polars_async.executors.blame import unsendable
from polars_async.executors.definitions import can_be_pickled
from polars_async.executors.extensions import (
    LOSES_THEM,
    extension_names,
    extensions_known,
    read_extended,
)
from polars_async.executors.operations import Batches
from polars_async.executors.staying import StaysHereError, UnsendableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_Known: TypeAlias = "tuple[dict[str, pl.DataType] | None, dict[int, bool], set[str]]"
"""Of a frame: its schema if it is to be mapped, which columns are sorted, and extension types."""

_INLINE: Final = 1 << 18
"""Bytes of a frame up to which it goes along with the rest: to map it would take longer."""


class Message(NamedTuple):
    """What `pack` makes of an object."""

    data: bytes
    files: list[int]
    """File descriptors, which belong to whoever has the parcel."""
    shared: int = 0
    """How many of them, the last, are of shared frames."""
    plan_bytes: int = 0
    """The size of the plans in it, where it was packed."""

    def take_shared(self) -> list[int]:
        """Take out the files of shared frames, which belong to the caller then."""
        begin = len(self.files) - self.shared
        taken = self.files[begin:]
        del self.files[begin:]
        return taken

    def close(self) -> None:
        """Close the files."""
        while self.files:
            os.close(self.files.pop())


class SerializationAbort:
    """
    Ends the packing of what nobody wants any more, from any thread and a signal handler.

    Polars takes a second for the plan of some 100 MB of frames, and does not ask; but it gives up
    where it cannot write.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._files: list[int] = []
        self._came = False

    def __call__(self) -> None:
        """Let no file grow."""
        holding(self._lock, self._abort)

    def _abort(self) -> None:
        self._came = True
        for file in self._files:
            _stop_growth(file)

    def watch(self, file: int) -> None:
        """Let `file` not grow once this was called."""
        with self._lock:
            self._files.append(file)
            if self._came:
                _stop_growth(file)

    def end(self) -> None:
        """Leave the files alone: others may be opened in their places."""
        with self._lock:
            self._files.clear()


def sorted_columns(frame: pl.DataFrame) -> dict[int, bool]:
    """Give the columns that are known to be sorted, and whether they descend: IPC forgets it."""
    found = {}
    for number, column in enumerate(frame.get_columns()):
        flags = column.flags
        if flags["SORTED_ASC"] or flags["SORTED_DESC"]:
            found[number] = flags["SORTED_DESC"]
    return found


def mark_sorted(frame: pl.DataFrame, columns: Mapping[int, bool]) -> pl.DataFrame:
    """Have it known of `frame`, which is changed, what `sorted_columns` has told."""
    all_columns = frame.get_columns() if columns else []
    for number, descending in columns.items():
        frame.replace_column(number, all_columns[number].set_sorted(descending=descending))
    return frame


class _Packer(pickle.Pickler):
    """
    A pickler that leaves to Polars what is Polars'.

    With a list of `files`, plans and large frames go in files in memory that have no name, so that
    nobody else can open them, and nothing is left of them once nobody has them open or mapped.
    """

    def __init__(
        self, file: io.BytesIO, files: list[int] | None, abort: SerializationAbort | None = None
    ) -> None:
        super().__init__(file, protocol=5)
        self._files = files
        self._abort = abort
        self.plan_bytes = 0

    def persistent_id(self, item: Any) -> tuple[str, Any] | None:
        if isinstance(item, pl.LazyFrame):
            return "plan", self._plan(item)
        if isinstance(item, pl.DataFrame):
            return "frame", self._frame(item)
        if isinstance(item, pl.QueryOptFlags):
            return "optimizations", optimization_flags(item)
        if isinstance(item, Buffer):
            return "buffer", None
        if item is pl.exceptions.PanicException:  # whose module cannot be imported
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

    def _frame(self, frame: pl.DataFrame) -> tuple[bytes | int, _Known]:
        extensions = extension_names(frame.dtypes)
        if frame.estimated_size() > _INLINE and self._has_room():
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
        return len(self._files) < min(MOST_IN_MESSAGE, most_files())

    def _new_file(self) -> tuple[int, int]:
        """Make a file; gives its number in the parcel, and its descriptor."""
        assert self._files is not None
        file = new_file()
        self._files.append(file)
        if self._abort is not None:
            self._abort.watch(file)
        return len(self._files) - 1, file


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
            if not LOSES_THEM:
                return pl.LazyFrame.deserialize(source)
            if isinstance(packed, bytes):
                names = extensions_of(packed)
            else:
                with mmap(self._files[packed], 0, prot=PROT_READ) as plan:
                    names = extensions_of(plan)
            with extensions_known(names):
                return pl.LazyFrame.deserialize(source)

    def _frame(self, packed: bytes | int, known: _Known) -> pl.DataFrame:
        schema, in_order, extensions = known

        def read() -> pl.DataFrame:
            if isinstance(packed, bytes):
                return pl.read_ipc_stream(io.BytesIO(packed))
            return map_ipc(self._files[packed], schema or {})

        return mark_sorted(read_extended(read, extensions), in_order)


def pack(item: object, *, in_files: bool, abort: SerializationAbort | None = None) -> Message:
    """
    Pack up any object that can be pickled, and frames and queries as well.

    With `in_files`, what is large goes in files, for another process of this machine. `abort` ends
    it before its time, with any error.

    Raises
    ------
    UnsendableError
        A query cannot be sent, as the message explains.
    StaysHereError
        A query has to run in this process.
    """
    message_files: list[int] = []
    shared: dict[Identity, int] = {}
    target = io.BytesIO()
    packer = _Packer(target, message_files if in_files else None, abort)
    try:
        attaching(shared if in_files else None, partial(packer.dump, item))
    except BaseException:
        if abort is not None:
            abort.end()
        Message(b"", [*message_files, *shared.values()]).close()
        raise
    if abort is not None:
        abort.end()
    files = [*message_files, *shared.values()]
    return Message(target.getvalue(), files, len(shared), packer.plan_bytes)


def unpack(message: Message, buffer: object | None = None) -> Any:
    """Give what was packed, with `buffer` for that of a stream, and close the files."""
    try:
        return _Unpacker(message, buffer).load()
    finally:
        message.close()


def buffer_of(work: Callable[[], object]) -> Buffer | None:
    """Return the buffer of a stream, which stays behind; None if it is no stream."""
    return work.buffer if isinstance(work, Batches) else None


def _write_plan(lf: pl.LazyFrame, file: int) -> None:
    """Write a plan to a file, whence another process may read it."""
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
        # What Polars had written by then, which tells why, is found in a file alone.
        with TemporaryFile() as file:
            _write_plan(lf, file.fileno())
            file.seek(0)
            return file.read()
    if hands_over_here(io.BytesIO(plan)):
        raise StaysHereError
    return plan


def _stop_growth(file: int) -> None:
    import fcntl  # noqa: PLC0415  # not to be had on every system

    with suppress(OSError):
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)


def _unsendable(lf: pl.LazyFrame, error: Exception) -> UnsendableError:
    text = str(error)
    _, is_of_python, reason = text.rpartition("python: ")
    if "ModuleNotFoundError" in text and "cloudpickle" in text:
        return UnsendableError(
            "the query cannot be sent to another process, since a Python function in it cannot be "
            "pickled by its name: install cloudpickle, or polars-async[processes]"
        )
    if is_of_python:
        return unsendable(last_pickled(lf), reason.strip(), can_be_pickled)
    if "ScanSources::Files" in text:
        return UnsendableError(
            "the query cannot be sent to another process, since it reads an open file: give it the "
            "path of the file, or what it holds, in an io.BytesIO"
        )
    return UnsendableError(
        "the query cannot be sent to another process: a frame or a value in it may be one of "
        f"a column of Python objects ({error})"
    )
