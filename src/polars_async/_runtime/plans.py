"""What a query will read and run, as far as the text of its plan shows."""

from __future__ import annotations

import json
import re
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

from polars_async._runtime.fork import Step, in_child
from polars_async._runtime.repeatable import is_repeatable
from polars_async._runtime.unpatched import get_ident, sleep
from polars_async._runtime.upstream import GROWING, PICKLED, PlanEnd, plan_bytes, plan_text

if TYPE_CHECKING:
    import polars as pl

    from polars_async._runtime.upstream import PlanText

NEAR: Final = 1 << 20
"""Characters of a plan's text that are read, in up to 3 ms: some 300 kB of frames."""
FAR: Final = 1 << 23
"""The same where it is worth up to 30 ms: some 2.3 MB of frames."""
_LARGEST_FRAME: Final = 1 << 12
"""Bytes of a frame in memory that are read for what comes after it, in some 10 us, unless all of
the plan is asked for."""
SENT_RATE: Final = 50e6
"""Bytes per second of frames in memory that Polars packs, and unpacks elsewhere."""
UNFIT: Final = 0
"""Stands for the shape of plans that `shape_in_memory` takes for unfit."""
_PAUSE: Final = 0.002
_PYTHON_NODE: Final = b'"PipeWithSchema":{"input":['
"""The node whose function comes after its inputs in the text, and so may lie beyond the limit."""
_PLUGIN: Final = b'"FfiPlugin":{'
"""A compiled function, which can end the process just as one of Python can."""
_NUMBERS: Final = re.compile(rb"\d[\d,]*")
_DIGITS: Final = bytes.maketrans(b"0123456789", b"1" * 10)
_BYTES_OF_FRAMES: Final = re.compile(rb"\[[\d,]{48,}\]")
_NOT_IN_MEMORY: Final = re.compile(
    b"|".join(
        map(re.escape, (PICKLED, _PYTHON_NODE, _PLUGIN, b'"Sink', b'"Scan"', b'"PythonScan"'))
    )
    + rb'|"sources?":'
)
"""What is in the text of a plan that reads or writes anything but frames in memory, or calls a
function. It may be there for another reason, such as the name of a column."""
_RESOLVED: Final = re.compile(rb'\{"IR":\{"dsl":|,"version":\d+\}\}')
"""What Polars puts around a node whose schema was resolved."""
_MAKES_MORE: Final = re.compile(b'"(?:%b)"|"(?:dynamic|rolling)":[{]' % "|".join(GROWING).encode())
_MULTIPLIES: Final = re.compile(
    rb'"how":"(?:Cross|Full|Inner|Left|Right)"|"mapping":"Join"|"sources":\{"(?!Paths)'
)
"""What may find many rows for each, or makes a list for each, or reads what was not counted."""
_MAKES_LISTS: Final = (b'"Over":', b'"Implode":')
"""What makes a list for each row, where both are there."""
_PATHS: Final = '"sources":{"Paths":'
_JSON: Final = json.JSONDecoder()
_NODE: Final = re.compile(
    rb'"([A-Z]\w+)":\{"(?:input\w*":\{|inputs":\[|expr":\[|sources":|df":|options":\{"scan_fn":)'
)


class Plan(NamedTuple):
    """What the text of a plan has shown."""

    shape: int
    """A hash of the text without its numbers: plans that differ in numbers alone have the same,
    or, where numbers tell how much is made, in numbers of as many digits."""
    frame_bytes: int
    """The size of the frames in memory that it reads, as far as they were seen."""
    paths: list[str]
    """The paths and addresses that are scanned, as they were given."""
    is_whole: bool
    """Whether nothing of it stayed unseen, and it has no Python function."""
    is_sized: bool
    """Whether the size of what it reads is known: of all, or of its first large frame."""
    runs_python: bool | None
    """Whether it has functions of Python or of a compiled plugin; None if it was not seen whole."""
    is_sendable: bool
    """Whether it can be sent to another process, as far as it was seen."""
    may_grow: bool
    """Whether it may make much more than it reads; so may what was not seen."""
    summary: str
    """Its nodes in one line, from the result to the sources."""


NOTHING: Final = Plan(
    0,
    0,
    [],
    is_whole=False,
    is_sized=False,
    runs_python=None,
    is_sendable=True,
    may_grow=True,
    summary="an unknown plan",
)
"""What is known of a plan that cannot be read."""

_process_ends = False
_reading: Final[set[int]] = set()
"""The threads that read a plan."""
in_child(Step.FORGET, _reading.clear)


def end_looks(within: float) -> None:
    """
    Let no more plans be read, and wait up to `within` seconds for threads that are reading one.

    Polars writes a plan to a Python object. A thread that returns to Python while the interpreter
    shuts down is ended there, and Polars then prints an error.
    """
    global _process_ends  # noqa: PLW0603  # a fact about the process
    _process_ends = True
    last = monotonic() + within
    while _reading and monotonic() < last:
        sleep(_PAUSE)


def look_at(lf: pl.LazyFrame, limit: int = NEAR) -> Plan:
    """
    Read the plan of `lf` as the user wrote it, up to `limit` characters of its text.

    Nothing in it is called, resolved or opened, and no other thread is held up. So what comes after
    a Python function, or after frames in memory that exceed the limit, stays unseen. With `NEAR`,
    so does what comes after a frame of more than 4 kB.
    """
    plan = _text_of(lf, limit, _LARGEST_FRAME if limit == NEAR else None)
    if plan is None:
        return NOTHING
    text = _RESOLVED.sub(b"", plan.text)
    runs_python: bool | None = plan.end is PlanEnd.PYTHON or any(
        each in text for each in (PICKLED, _PYTHON_NODE, _PLUGIN)
    )
    if plan.end in {PlanEnd.LIMIT, PlanEnd.FRAME} and not runs_python:
        runs_python = None
    paths = _paths(text)
    makes_more = _MAKES_MORE.search(text) is not None
    shape = _shape_with_digits(text) if makes_more else _NUMBERS.sub(b"0", text)
    is_whole = plan.end is PlanEnd.WHOLE and not runs_python
    return Plan(
        shape=hash(shape),
        frame_bytes=plan.frame_bytes,
        paths=paths,
        is_whole=is_whole,
        is_sized=plan.end in {PlanEnd.WHOLE, PlanEnd.FRAME} and not runs_python,
        runs_python=runs_python,
        is_sendable=plan.end is not PlanEnd.UNSENDABLE,
        may_grow=makes_more
        or not is_whole
        or _MULTIPLIES.search(text) is not None
        or all(each in text for each in _MAKES_LISTS),
        summary=_summary(text, paths, runs_python=bool(runs_python)),
    )


def shape_in_memory(lf: pl.LazyFrame, limit: int) -> int | None:
    """
    Return a hash of the plan of `lf`, or None if its text is longer than `limit`.

    `UNFIT` stands for all plans that read anything but frames in memory, have a sink, or a function
    of Python or of a plugin.

    It is stricter than that of `look_at`: numbers are the same if they have as many digits, and
    frames if their schemas are the same, and their bytes have as many. Polars copies each frame
    before it writes it, whatever the `limit`: 8 MB take 5 ms.
    """
    plan = _text_of(lf, limit)
    if plan is not None and plan.end is PlanEnd.LIMIT:
        return None
    if plan is None or plan.end is not PlanEnd.WHOLE or _NOT_IN_MEMORY.search(plan.text):
        return UNFIT
    # With the frames that are not in the text.
    return hash((_shape_with_digits(plan.text), plan.frame_bytes.bit_length())) or 1


def packed(lf: pl.LazyFrame, limit: int) -> bytes | None:
    """
    Return the plan of `lf` as Polars packs it: equal plans have the same bytes.

    Return None if it is longer than `limit`, or calls functions of Python that are not packed yet.
    Nothing is called or opened; frames in memory are in it, and are copied even where that is
    longer than the limit.
    """
    _reading.add(thread := get_ident())  # as in `_text_of`
    try:
        return None if _process_ends else plan_bytes(lf, limit)
    finally:
        _reading.discard(thread)


def is_same_each_time(lf: pl.LazyFrame, paths: list[str]) -> bool:
    """
    Return whether `lf` is known to give the same result in each run, but for what changes in files.

    It takes some 100 us. `paths` are all that it may scan.
    """
    plan = _text_of(lf, NEAR)
    if plan is None or plan.end is not PlanEnd.WHOLE:
        return False
    if any(each in plan.text for each in (PICKLED, _PYTHON_NODE, _PLUGIN)):
        return False
    # What several parts of a plan share is packed once, and written for each of them.
    return set(_paths(plan.text)) == set(paths) and is_repeatable(plan.text)


def _shape_with_digits(text: bytes) -> bytes:
    return _BYTES_OF_FRAMES.sub(_magnitude, text).translate(_DIGITS)


def _magnitude(numbers: re.Match[bytes]) -> bytes:
    return b"[bytes: %b]" % (b"*" * len(numbers[0]).bit_length())


def _text_of(lf: pl.LazyFrame, limit: int, largest_frame: int | None = None) -> PlanText | None:
    # The thread is listed before it looks at the flag, and `end_looks` sets the flag before it
    # looks at the list: so one of the two sees the other. The other way round, a thread could begin
    # to read just after `end_looks` has found none.
    _reading.add(thread := get_ident())
    try:
        return None if _process_ends else plan_text(lf, limit, largest_frame=largest_frame)
    finally:
        _reading.discard(thread)


def _paths(text: bytes) -> list[str]:
    paths: list[str] = []
    plan = text.decode(errors="ignore")
    position = plan.find(_PATHS)
    while position >= 0:
        position += len(_PATHS)
        try:
            sources, _ = _JSON.raw_decode(plan, position)
            paths += [str(source["inner"]) for source in sources]
        except (ValueError, TypeError, KeyError):  # the text ends in the midst of them
            break
        position = plan.find(_PATHS, position)
    return paths


def _summary(text: bytes, paths: list[str], *, runs_python: bool) -> str:
    nodes = " of ".join(name.decode() for name in _NODE.findall(text))
    function = "with a Python function" if runs_python else ""
    return " ".join(filter(None, (nodes, ", ".join(paths), function)))
