"""Polars' plans as text and as bytes, and what these show."""

from __future__ import annotations

import enum
import importlib
import io
import os
import re
import sys
from contextlib import suppress
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
    UNSENDABLE = enum.auto()
    """Something comes next that cannot be sent to another process, such as an open file."""


_PICKLERS: Final = frozenset({"pickle", "cloudpickle"})
_OF_NUMBERS: Final = b"0123456789,"
_NUMBERS: Final = re.compile(rb"\[[\d,]{48,}")
PICKLED: Final = b'"function":[80,76,80,89,70,78,'
"""The beginning of the text of a function that Polars has pickled before: it is in an expression
of a plan, or an expression, that was itself pickled."""


class PlanText(NamedTuple):
    """The plan of a query as JSON, up to its end or to what cannot be written."""

    text: bytes
    """Without most of the numbers that stand for frames in memory."""
    frame_bytes: int
    """How many of these numbers there were: the size of the frames in bytes."""
    end: PlanEnd


class _Text(io.RawIOBase):
    """The file to which Polars writes the text of one plan, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self.text = bytearray()
        self.frame_bytes = 0
        self.end = PlanEnd.UNSENDABLE

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        # Polars writes some kB at a time, and other threads may have the GIL in between.
        data = bytes(piece)
        if data.translate(None, _OF_NUMBERS):
            self.text += data
        else:
            self.frame_bytes += data.count(b",")
        self._left -= len(data)
        if self._left < 0:
            self.end = PlanEnd.LIMIT
            raise OSError("the plan is longer than the limit")
        return len(data)

    def import_module(self, name: str, *rest: Any) -> Any:
        if name in _PICKLERS:
            self.end = PlanEnd.PYTHON
            raise ImportError("no Python object is to be pickled")
        return __import__(name, *rest)

    def as_plan_text(self) -> PlanText:
        commas = sum(each.count(b",") for each in _NUMBERS.findall(self.text))
        return PlanText(bytes(self.text), self.frame_bytes + commas, self.end)


def plan_text(lf: pl.LazyFrame, limit: int) -> PlanText | None:
    """
    Return the plan of `lf` as JSON, and why it ends; None if Polars cannot write it.

    It is the plan as the user wrote it: nothing is opened or called, and Polars writes it without
    the GIL. Polars copies all of a frame in memory before it writes the first byte of the frame.
    """
    target = _Text(limit)
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
