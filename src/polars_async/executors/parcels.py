"""What goes from one process to another: queries, frames and errors, as bytes and as files."""

from __future__ import annotations

import builtins
import io
import os
import pickle
from contextlib import suppress
from importlib import import_module
from traceback import TracebackException
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import polars as pl

from polars_async._native import RLock, holding
from polars_async._upstream import map_ipc, optimization_flags, optimizations_of
from polars_async.errors import PolarsAsyncError
from polars_async.gpu.failure import GpuFailure
from polars_async.streams import Buffer

if TYPE_CHECKING:
    from collections.abc import Callable

_INLINE: Final = 1 << 18
"""Bytes of a frame up to which it goes along with the rest: to map it would take longer."""
_MOST_FILES: Final = 64
"""Files of one parcel. One message carries 253 at most, and many processes may have 1024 open."""


def new_file() -> int:
    """Make a file in memory that has no name, and that nobody but its owner could open."""
    file = os.memfd_create("polars-async", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(file, 0o600)
    return file


def path_of(file: int) -> str:
    """Give the path by which this process may open one of its files again."""
    return f"/proc/self/fd/{file}"


class Parcel(NamedTuple):
    """What `pack` makes of an object."""

    data: bytes
    files: list[int]
    """File descriptors, which belong to whoever has the parcel."""

    def close(self) -> None:
        """Close the files."""
        while self.files:
            os.close(self.files.pop())


class Halt:
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
        holding(self._lock, self._halt)

    def _halt(self) -> None:
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


class WorkerTraceback(Exception):  # noqa: N818  # no error of its own
    """The traceback of an error in another process, as a text: the ``__cause__`` of that error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Packer(pickle.Pickler):
    """
    A pickler that leaves to Polars what is Polars'.

    With a list of `files`, plans and large frames go in files in memory that have no name, so that
    nobody else can open them, and nothing is left of them once nobody has them open or mapped.
    """

    def __init__(self, file: io.BytesIO, files: list[int] | None, halt: Halt | None = None) -> None:
        super().__init__(file, protocol=5)
        self._files = files
        self._halt = halt

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
        try:
            if self._files is None or len(self._files) >= _MOST_FILES:
                return lf.serialize()
            lf.serialize(path_of(self._new_file()))
        except pl.exceptions.ComputeError as error:
            raise _unsendable(error) from error
        return len(self._files) - 1

    def _frame(self, frame: pl.DataFrame) -> bytes | tuple[int, dict[str, pl.DataType]]:
        in_file = (
            self._files is not None
            and len(self._files) < _MOST_FILES
            and frame.estimated_size() > _INLINE
        )
        if in_file:
            frame.write_ipc(path_of(self._new_file()))
            return len(self._files or ()) - 1, dict(frame.schema)
        stream = io.BytesIO()
        frame.write_ipc_stream(stream)
        return stream.getvalue()

    def _new_file(self) -> int:
        assert self._files is not None
        file = new_file()
        self._files.append(file)
        if self._halt is not None:
            self._halt.watch(file)
        return file


class _Unpacker(pickle.Unpickler):
    def __init__(self, parcel: Parcel, buffer: object | None) -> None:
        super().__init__(io.BytesIO(parcel.data))
        self._files = parcel.files
        self._buffer = buffer

    def persistent_load(self, pid: tuple[str, Any]) -> Any:
        kind, packed = pid
        if kind == "plan":
            source = path_of(self._files[packed]) if isinstance(packed, int) else io.BytesIO(packed)
            return pl.LazyFrame.deserialize(source)
        if kind == "frame":
            if isinstance(packed, bytes):
                return pl.read_ipc_stream(io.BytesIO(packed))
            number, schema = packed
            return map_ipc(path_of(self._files[number]), schema)
        if kind == "optimizations":
            return optimizations_of(packed)
        if kind == "buffer":
            return self._buffer
        return pl.exceptions.PanicException


def pack(item: object, *, in_files: bool, halt: Halt | None = None) -> Parcel:
    """
    Pack up any object that can be pickled, and frames and queries as well.

    With `in_files`, what is large goes in files, for another process of this machine. `halt` ends
    it before its time, with any error.

    Raises
    ------
    PolarsAsyncError
        A query cannot be sent, as the message explains.
    """
    parcel_files: list[int] = []
    target = io.BytesIO()
    try:
        _Packer(target, parcel_files if in_files else None, halt).dump(item)
    except BaseException:
        if halt is not None:
            halt.end()
        Parcel(b"", parcel_files).close()
        raise
    if halt is not None:
        halt.end()
    return Parcel(target.getvalue(), parcel_files)


def unpack(parcel: Parcel, buffer: object | None = None) -> Any:
    """Give what was packed, with `buffer` for that of a stream, and close the files."""
    try:
        return _Unpacker(parcel, buffer).load()
    finally:
        parcel.close()


def buffer_of(work: Callable[[], object]) -> Buffer | None:
    """Give the buffer of a stream, which stays behind; None if it is no stream."""
    arguments = getattr(work, "args", ())
    return next((each for each in arguments if isinstance(each, Buffer)), None)


def outcome_of(
    work: Callable[[], object], *, noted: Callable[[BaseException], object] | None = None
) -> tuple[str, object]:
    """
    Run `work`; gives the kind of the outcome, and what `error_of` makes of that.

    `noted` may add to the error what is known here alone.
    """
    try:
        return "value", work()
    except GpuFailure as failure:
        errors = packed_error(failure.cause), packed_error(failure.raised)
        return "gpu failure", (failure.reason, errors, failure.found, failure.share)
    except BaseException as error:  # noqa: BLE001  # a panic and SystemExit are outcomes too
        if noted is not None:
            noted(error)
        return "error", packed_error(error)


def error_of(kind: str, found: Any) -> BaseException | None:
    """Give the error that an outcome holds; None where `found` is the result."""
    if kind == "value":
        return None
    if kind == "error":
        return unpacked_error(found)
    reason, errors, results, share = found
    cause, raised = map(unpacked_error, errors)
    failure = GpuFailure(reason, cause, raised)  # type: ignore[arg-type]  # which both were
    failure.found, failure.share = results, share
    return failure


def packed_error(error: BaseException) -> tuple[bytes, str]:
    """Pack an error of a query, whatever it is, and its traceback as a text."""
    # Without the frame that called the work.
    traceback = error.__traceback__ and error.__traceback__.tb_next
    text = "".join(TracebackException(type(error), error, traceback).format())
    for candidate in (error, _plain(error)):
        for dump in (_dump, _dump_by_value):
            with suppress(BaseException):  # whatever the error's own methods raise
                data = dump(candidate)
                if type(_load(data)) is type(candidate):  # some go in, and do not come out
                    return data, text
    return _dump(PolarsAsyncError(f"{type(error).__name__} in a worker")), text


def unpacked_error(packed: tuple[bytes, str]) -> BaseException:
    """Give the error, with its traceback as its cause."""
    data, text = packed
    try:
        error = _load(data)
    except Exception as refused:  # noqa: BLE001  # as where its class is to be had there alone
        error = PolarsAsyncError(
            "the query failed in its worker process, as told by the traceback above, with an error "
            f"that cannot be unpickled here ({type(refused).__name__}: {refused})"
        )
    with suppress(Exception):  # an error may be frozen
        error.__cause__ = WorkerTraceback(text)
    return error


def _stop_growth(file: int) -> None:
    import fcntl  # noqa: PLC0415  # not to be had on every system

    with suppress(OSError):
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)


def _dump(error: BaseException) -> bytes:
    return pack(error, in_files=False).data


def _dump_by_value(error: BaseException) -> bytes:
    # Optional: without it this is one way less.
    cloudpickle: Any = import_module("cloudpickle")
    data: bytes = cloudpickle.dumps(error)
    return data


def _load(data: bytes) -> BaseException:
    error: BaseException = unpack(Parcel(data, []))
    return error


def _plain(error: BaseException) -> BaseException:
    """Give an error of the nearest class that everybody knows, with the name of the other."""
    for kind in type(error).__mro__:
        if (
            getattr(builtins, kind.__name__, None) is kind
            or kind.__module__ == pl.exceptions.__name__
        ):
            with suppress(BaseException):
                return kind(f"{type(error).__name__}: {error}")  # type: ignore[no-any-return]
    return PolarsAsyncError(type(error).__name__)


def _unsendable(error: Exception) -> PolarsAsyncError:
    if "ModuleNotFoundError" in str(error) and "cloudpickle" in str(error):
        return PolarsAsyncError(
            "the query cannot be sent to another process, since a Python function in it cannot be "
            "pickled by its name: install cloudpickle, or polars-async[processes]"
        )
    return PolarsAsyncError(
        "the query cannot be sent to another process: a Python function in it, or what that holds, "
        f"cannot be pickled, or a frame in it has a column of Python objects ({error})"
    )
