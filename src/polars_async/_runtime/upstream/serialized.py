"""Polars' plans as text and as bytes, and what these show."""

from __future__ import annotations

import enum
import importlib
import io
import os
import re
import sys
from contextlib import suppress
from struct import error, unpack, unpack_from
from time import thread_time
from types import FunctionType
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

import polars as pl

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from types import FrameType

_SINK: Final = b"\x81\xa4Sink\x82\xa5input"
_HANDS_OVER: Final = re.compile(
    rb"\xa7payload\x81(\xa8Callback|\xa4File\x83\xa6target\Z)"  # Polars gives up at one in memory
    rb"|\xb2file_path_provider\x81\xa8Function|\xb5sinked_paths_callback\x81\xa8Callback"
)
_PIECE: Final = 1 << 20


def hands_over_here(plan: IO[bytes]) -> bool:
    """
    Return whether `plan`, packed by Polars, has a sink that needs this very process.

    Such a sink passes batches to a function, asks a function for paths, or writes to an object.
    Where Polars could not pack a plan, the bytes end at what it could not pack. Text and data in a
    plan cannot be mistaken for a sink: these bytes are neither UTF-8 nor a sequence of small
    numbers.
    """
    before = b""
    while piece := plan.read(_PIECE):  # piece by piece, so that other threads get the GIL
        piece = before + piece
        if (at := piece.find(_SINK)) >= 0:  # which is the last node
            return _HANDS_OVER.search(piece[at:] + plan.read()) is not None
        before = piece[-len(_SINK) :]
    return False


def last_pickled(lf: pl.LazyFrame) -> object:
    """
    Return the last object that Polars has cloudpickle pickle for the plan of `lf`, or None.

    Where the plan cannot be packed, that is the object that cannot be pickled, which Polars' error
    does not name.
    """
    cloudpickle: Any = importlib.import_module("cloudpickle")
    code = cloudpickle.dumps.__code__
    last: list[object] = [None]

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is code:
            last[:] = [frame.f_locals[code.co_varnames[0]]]

    before = sys.getprofile()
    sys.setprofile(note)  # of this thread
    try:
        with suppress(Exception):
            lf.serialize(os.devnull)
    finally:
        sys.setprofile(before)
    return last[0]


_EXTENSION: Final = b"\x81\xa9Extension\x83\xa4name"
_SHORT_TEXT: Final = 0xA0
_LONGER_TEXT: Final = 0xD9


def extensions_of(plan: bytes | mmap.mmap) -> set[str]:
    """Return the names of the extension types of frames and columns in a packed plan."""
    names = set()
    at = plan.find(_EXTENSION)
    while at >= 0:
        at += len(_EXTENSION)
        size, text = plan[at] - _SHORT_TEXT, at + 1
        if plan[at] == _LONGER_TEXT:
            size, text = plan[text], text + 1
        names.add(plan[text : text + size].decode())
        at = plan.find(_EXTENSION, text)
    return names


class PlanEnd(enum.Enum):
    """Why the text of a plan ends where it does."""

    WHOLE = enum.auto()
    """It is complete."""
    LIMIT = enum.auto()
    """It is longer than the limit."""
    PYTHON = enum.auto()
    """A Python object comes next: a function, mostly."""
    FRAME = enum.auto()
    """A frame in memory comes next that is larger than is worth reading."""
    UNSENDABLE = enum.auto()
    """Something comes next that cannot be sent to another process, such as an open file."""


_PICKLERS: Final = frozenset({"pickle", "cloudpickle"})
_OF_NUMBERS: Final = b"0123456789,"
_FRAME: Final = b'"df":['
_LARGEST_CHUNK: Final = 1 << 18
"""Rows of a first chunk from which on others may follow: Polars splits what has more of them."""
_COPY_RATE: Final = 5e9
"""Bytes per second at which Polars copies a frame: the order of magnitude."""
_MOST_HEAD: Final = 1 << 18
"""Characters of a frame in which its size has to be found: more columns take more of them."""
_NUMBERS: Final = re.compile(rb"\[[\d,]{48,}")
PICKLED: Final = b'"function":[80,76,80,89,70,78,'
"""The beginning of the text of a function that Polars has pickled before: it is in an expression
of a plan, or an expression, that was itself pickled."""


class PlanText(NamedTuple):
    """The plan of a query as JSON, up to its end or to what cannot be written."""

    text: bytes
    """Without most of the numbers that stand for frames in memory."""
    frame_bytes: int
    """The size of the frames in bytes, as far as they were seen."""
    end: PlanEnd


class _Text(io.RawIOBase):
    """The file to which Polars writes the text of one plan, up to a limit."""

    def __init__(self, limit: int, largest_frame: int | None) -> None:
        self._left = limit
        self._largest_frame = largest_frame
        self._begun = thread_time()
        self._head: bytes | None = None  # of a frame whose size is not known yet
        self.text = bytearray()
        self.frame_bytes = 0
        self.end = PlanEnd.UNSENDABLE

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        # Polars writes some kB at a time, and other threads may have the GIL in between.
        if self.end in {PlanEnd.LIMIT, PlanEnd.FRAME}:
            raise OSError("what was written before is enough")  # it tries to write that once more
        data = bytes(piece)
        if data.translate(None, _OF_NUMBERS):
            self.text += data
            # The last one alone goes on after this piece.
            _, found, head = self.text[-len(data) - len(_FRAME) :].rpartition(_FRAME)
            is_open = found and not head.translate(None, _OF_NUMBERS)
            self._head = bytes(head) if is_open else None
        else:
            self.frame_bytes += data.count(b",")
            if self._head is not None:
                self._head += data
        if self._largest_frame is not None and self._head is not None:
            self._check_frame(self._head, self._largest_frame)
        self._left -= len(data)
        if self._left < 0:
            self.end = PlanEnd.LIMIT
            raise OSError("the plan is longer than the limit")
        return len(data)

    def _check_frame(self, head: bytes, largest: int) -> None:
        chunk = _first_chunk(head)
        if chunk is not None and chunk.kind == _CHUNK and chunk.size > largest:
            size = chunk.size
            if chunk.rows >= _LARGEST_CHUNK:
                # The chunks that follow are copied by now, too, and nothing but time tells of them.
                copied = int((thread_time() - self._begun) * _COPY_RATE)
                size = max(size, 1 << 2 * (copied.bit_length() // 2))
            self.frame_bytes += size
            self.end = PlanEnd.FRAME
            raise OSError("the plan has a large frame")
        if chunk is not None or len(head) > _MOST_HEAD:
            self._head = None

    def import_module(self, name: str, *rest: Any) -> Any:
        if name in _PICKLERS:
            self.end = PlanEnd.PYTHON
            raise ImportError("no Python object is to be pickled")
        return __import__(name, *rest)

    def as_plan_text(self) -> PlanText:
        commas = sum(each.count(b",") for each in _NUMBERS.findall(self.text))
        return PlanText(bytes(self.text), self.frame_bytes + commas, self.end)


class _Message(NamedTuple):
    """The head of a message of Arrow's IPC format."""

    kind: int
    rows: int
    """Of a chunk."""
    size: int
    """How many bytes follow the head."""
    end: int
    """Where the head ends."""


_NO_MESSAGE: Final = _Message(0, 0, 0, 0)
_SCHEMA: Final = 1
_CHUNK: Final = 3
_BEGINS: Final = 0xFFFFFFFF


def _first_chunk(numbers: bytes) -> _Message | None:
    """
    Return the head of the first chunk of a frame, by the beginning of the frame's text.

    A frame is written as a stream of Arrow's IPC format: the message of the schema, and one for
    each chunk. Return None if that is not there yet, and a message of another kind if it is not
    what was expected.
    """
    schema = _message(numbers, 0)
    if schema is None or schema.kind != _SCHEMA:
        return schema
    return _message(numbers, schema.end)


def _message(numbers: bytes, at: int) -> _Message | None:
    begin = _bytes(numbers, at, 8)
    if begin is None:
        return None
    begins, length = unpack("<Ii", begin)
    if begins != _BEGINS or length < 0:
        return _NO_MESSAGE
    head = _bytes(numbers, at + 8, length)
    if head is None:
        return None
    try:
        table = unpack_from("<I", head)[0]
        kind = _field(head, table, 1, "<B")
        rows = 0
        if kind == _CHUNK:
            chunk = table + _offset(head, table, 2)
            rows = _field(head, chunk + unpack_from("<I", head, chunk)[0], 0, "<q")
        return _Message(kind, rows, _field(head, table, 3, "<q"), at + 8 + length)
    except (error, IndexError):
        return _NO_MESSAGE


def _field(head: bytes, table: int, number: int, kind: str) -> int:
    """Return a field of a table of FlatBuffers; 0 if it is not there."""
    offset = _offset(head, table, number)
    return int(unpack_from(kind, head, table + offset)[0]) if offset else 0


def _offset(head: bytes, table: int, number: int) -> int:
    """Return where in a table a field is; 0 if it is not there."""
    offsets = table - unpack_from("<i", head, table)[0]
    at = 4 + 2 * number
    return int(unpack_from("<H", head, offsets + at)[0]) if at < head[offsets] else 0


def _bytes(numbers: bytes, at: int, count: int) -> bytes | None:
    """Return `count` bytes of those that `numbers` lists; None if there are not so many."""
    parts = numbers.split(b",", at + count)
    if len(parts) <= at + count:
        return None
    return bytes(map(int, parts[at:-1]))


def plan_text(lf: pl.LazyFrame, limit: int, *, largest_frame: int | None = None) -> PlanText | None:
    """
    Return the plan of `lf` as JSON, and why it ends; None if Polars cannot write it.

    It is the plan as the user wrote it: nothing is opened or called, and Polars writes it without
    the GIL. Polars copies all of a frame in memory before it writes the first byte of the frame,
    and then takes some ms for each MB. So with `largest_frame`, in bytes, the text ends at the
    first frame that is larger, of which only the size is read.
    """
    target = _Text(limit, largest_frame)
    try:
        serialize: Callable[[_Text], object] = lf._ldf.serialize_json  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    except AttributeError:
        return None
    # Polars imports the pickler when it comes to a Python object, by the `__import__` of the
    # calling function's built-ins, which therefore are replaced. To pickle an object may call the
    # user's methods, and copies whatever a closure holds while it holds the GIL.
    builtins = {"__builtins__": {"__import__": target.import_module}}
    with suppress(Exception, pl.exceptions.PanicException):  # `target` knows why it ends
        FunctionType(_write.__code__, builtins)(serialize, target)
        target.end = PlanEnd.WHOLE
    return target.as_plan_text()


def _write(serialize: Callable[[_Text], object], target: _Text) -> None:
    serialize(target)


def _import_no_pickler(name: str, *rest: Any) -> Any:
    if name in _PICKLERS:
        raise ImportError("no Python object is to be pickled")
    return __import__(name, *rest)


_write_without_pickler: Final = FunctionType(
    _write.__code__, {"__builtins__": {"__import__": _import_no_pickler}}
)


def plan_bytes(lf: pl.LazyFrame, limit: int) -> bytes | None:
    """
    Return the plan of `lf` as Polars packs it, in a few microseconds.

    Return None if it is longer than `limit`, or has something that cannot be packed, or not without
    calling Python. As with `plan_text`, nothing is called or opened, and frames are copied whole.
    """
    # No class of our own, as for the text: Polars drops what is raised in the last `write`, as by a
    # signal handler, and the plan would lack its end.
    target = io.BytesIO()
    try:
        _write_without_pickler(lf._ldf.serialize_binary, target)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    except (Exception, pl.exceptions.PanicException):  # noqa: BLE001  # such a plan has no equal
        return None
    plan = target.getvalue()
    return plan if len(plan) <= limit else None


_SOURCES: Final = b"\xa7sources\x81\xa5Paths"
_INNER: Final = b"\x81\xa5inner"


def paths_of(plan: bytes) -> list[str] | None:
    """Return the paths that a packed plan scans; None if they cannot be read."""
    paths: list[str] = []
    at = plan.find(_SOURCES)
    try:
        while at >= 0:
            at += len(_SOURCES)
            count, at = _length(plan, at, 0x90, 0x0F, {0xDC: 2, 0xDD: 4})
            for _ in range(count):
                if not plan.startswith(_INNER, at):
                    return None
                at += len(_INNER)
                size, at = _length(plan, at, 0xA0, 0x1F, {0xD9: 1, 0xDA: 2, 0xDB: 4})
                paths.append(plan[at : at + size].decode())
                at += size
            at = plan.find(_SOURCES, at)
    except (IndexError, KeyError, UnicodeDecodeError):
        return None
    return paths


def _length(plan: bytes, at: int, short: int, most: int, longer: dict[int, int]) -> tuple[int, int]:
    """Return the length of what MessagePack has at `at`, and where its content begins."""
    kind = plan[at]
    if kind & ~most == short:
        return kind & most, at + 1
    size = longer[kind]
    return int.from_bytes(plan[at + 1 : at + 1 + size]), at + 1 + size
