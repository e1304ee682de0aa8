"""What a query will read and run, as far as its plan tells by itself."""

from __future__ import annotations

import json
import re
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

from polars_async._runtime.fork import Step, in_child
from polars_async._runtime.unpatched import get_ident, sleep
from polars_async._runtime.upstream import PICKLED, PlanEnd, plan_text

if TYPE_CHECKING:
    import polars as pl

NEAR: Final = 1 << 20
"""Characters of a plan's text that are looked at, in up to 3 ms: some 300 kB of frames."""
FAR: Final = 1 << 23
"""The same where it is worth up to 30 ms: some 2.3 MB of frames."""
SENT_RATE: Final = 50e6
"""Bytes per second of frames in memory that Polars packs, and unpacks elsewhere."""
_PAUSE: Final = 0.002
_PYTHON_NODE: Final = b'"PipeWithSchema":{"input":['
"""The node whose function comes after what it reads, and so may be unseen."""
_PLUGIN: Final = b'"FfiPlugin":{'
"""A compiled function, which may end the process as well."""
_NUMBERS: Final = re.compile(rb"\d[\d,]*")
_RESOLVED: Final = re.compile(rb'\{"IR":\{"dsl":|,"version":\d+\}\}')
"""What is put around a node whose schema was asked for."""
_PATHS: Final = '"sources":{"Paths":'
_JSON: Final = json.JSONDecoder()
_NODE: Final = re.compile(
    rb'"([A-Z]\w+)":\{"(?:input\w*":\{|inputs":\[|expr":\[|sources":|df":|options":\{"scan_fn":)'
)


class Plan(NamedTuple):
    """What one look at a plan has shown."""

    shape: int
    """A number that all plans share that differ in numbers alone."""
    frame_bytes: int
    """The size of the frames in memory that it reads, as far as they were seen."""
    paths: list[str]
    """What is scanned: paths and addresses, as they were given."""
    is_whole: bool
    """Whether that is all that it reads, and no Python function hides what it does."""
    runs_python: bool | None
    """Whether functions of Python or of a compiled plugin are in it; None if that is not seen."""
    is_sendable: bool
    """Whether another process can have it, as far as it was seen."""
    summary: str
    """Its nodes in one line, from the result to the sources."""


NOTHING: Final = Plan(
    0, 0, [], is_whole=False, runs_python=None, is_sendable=True, summary="an unknown plan"
)
"""What is known of a plan that cannot be looked at."""


class _Process:
    ends = False


_looking: Final[set[int]] = set()
"""The threads that look at a plan."""
in_child(Step.FORGET, _looking.clear)


def end_looks(within: float) -> None:
    """
    Have no plan be looked at any more, and wait `within` so many seconds for looks to end.

    Polars writes a plan to an object of Python. A thread that comes back to Python while the
    interpreter is taken down is ended there, which Polars tells on stderr.
    """
    _Process.ends = True
    last = monotonic() + within
    while _looking and monotonic() < last:
        sleep(_PAUSE)


def look_at(lf: pl.LazyFrame, limit: int = NEAR) -> Plan:
    """
    Look at the plan of `lf` as it was written, up to `limit` characters of its text.

    For that nothing in it is called, resolved or opened, and no other thread is held up. So what
    comes after a Python function, or after frames in memory that exceed the limit, stays unseen.
    """
    # Before the end is looked for: a thread that ends all looks then sees this one.
    _looking.add(thread := get_ident())
    try:
        found = None if _Process.ends else plan_text(lf, limit)
    finally:
        _looking.discard(thread)
    if found is None:
        return NOTHING
    text = _RESOLVED.sub(b"", found.text)
    runs_python: bool | None = found.end is PlanEnd.PYTHON or any(
        each in text for each in (PICKLED, _PYTHON_NODE, _PLUGIN)
    )
    if found.end is PlanEnd.LIMIT and not runs_python:
        runs_python = None
    paths = _paths(text)
    return Plan(
        shape=hash(_NUMBERS.sub(b"0", text)),
        frame_bytes=found.frame_bytes,
        paths=paths,
        is_whole=found.end is PlanEnd.WHOLE and not runs_python,
        runs_python=runs_python,
        is_sendable=found.end is not PlanEnd.UNSENDABLE,
        summary=_summary(text, paths, runs_python=bool(runs_python)),
    )


def _paths(text: bytes) -> list[str]:
    found: list[str] = []
    plan = text.decode(errors="ignore")
    position = plan.find(_PATHS)
    while position >= 0:
        position += len(_PATHS)
        try:
            paths, _ = _JSON.raw_decode(plan, position)
            found += [str(path["inner"]) for path in paths]
        except (ValueError, TypeError, KeyError):  # it ends in the midst of them
            break
        position = plan.find(_PATHS, position)
    return found


def _summary(text: bytes, paths: list[str], *, runs_python: bool) -> str:
    nodes = " of ".join(name.decode() for name in _NODE.findall(text))
    function = "with a Python function" if runs_python else ""
    return " ".join(filter(None, (nodes, ", ".join(paths), function)))
