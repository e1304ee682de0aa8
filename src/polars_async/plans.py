"""What a query will read and run, as far as its plan tells by itself."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from polars_async._upstream import PlanEnd, plan_text, resolved_uncalled

if TYPE_CHECKING:
    import polars as pl

_LIMIT: Final = 1 << 18
"""Bytes of a plan's text that are looked at: a frame of more than some 80 kB ends it."""
_FAR_LIMIT: Final = 1 << 23
_PYTHON_NODE: Final = b'"PipeWithSchema":{'
"""The node whose function comes after what it reads, and so may be unseen."""
_FRAME: Final = b'"df":['
_NUMBERS: Final = re.compile(rb"\[[\d,]{48,}")
_NUMBER: Final = re.compile(rb"\d+")
_RESOLVED: Final = re.compile(rb'\{"IR":\{"dsl":|,"version":\d+\}\}')
"""What is put around a node whose schema was asked for."""
_PATHS: Final = b'"sources":{"Paths":'
_MOST_PATHS: Final = 1 << 16
_JSON: Final = json.JSONDecoder()
_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\],:]')
_MOST_TOKENS: Final = 1 << 14
"""Bytes of a plan above its frame: more of them are not followed down to it."""
_NODE: Final = re.compile(
    rb'"([A-Z]\w+)":\{"(?:input\w*":\{|inputs":\[|expr":\[|sources":|df":|options":\{"scan_fn":)'
)
_ONE_INPUT: Final = frozenset(
    {b"Select", b"HStack", b"Filter", b"GroupBy", b"Sort", b"Slice", b"Distinct", b"MapFunction"}
)
"""Nodes of a plan that read one other and nothing else."""
_PYTHON_SHOWN: Final = re.compile(
    r"OPAQUE_PYTHON|MAP_GROUPS|\.(?:python_udf|rolling_map|(?:cum_)?(?:fold|reduce))\("
)
"""How Polars explains Python functions; a column of such a name does no harm."""


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
    """Whether Python functions or objects are in it; None if that is not to be seen."""
    is_sendable: bool
    """Whether another process can have it, as far as it was seen."""
    summary: str
    """Its nodes in one line, from the result to the sources."""


NOTHING: Final = Plan(
    0, 0, [], is_whole=False, runs_python=None, is_sendable=True, summary="an unknown plan"
)
"""What is known of a plan that cannot be looked at."""


def look_at(lf: pl.LazyFrame) -> Plan:
    """
    Look at the plan of `lf`, without any of what it takes to resolve it.

    No function of the user's is called for it, no file is opened, and no other thread is held up.
    So what comes after a Python function, or mostly after a large frame in memory, stays unseen.
    """
    found = plan_text(lf, _LIMIT)
    if found is None:
        return NOTHING
    text, end = _RESOLVED.sub(b"", found[0]), found[1]
    frame_bytes = sum(numbers.count(b",") for numbers in _NUMBERS.findall(text))
    explained = ""
    is_whole = end is PlanEnd.WHOLE
    runs_python: bool | None = end is PlanEnd.PYTHON or _PYTHON_NODE in text
    if end is PlanEnd.LIMIT and not runs_python:
        text = _without_last_frame(text)
        is_whole = _is_one_branch(text)
        resolved = resolved_uncalled(lf) if is_whole else None
        if resolved is not None:
            explained, frame_bytes = resolved
        runs_python = _runs_python(explained) if is_whole else None
    paths = _paths(text)
    return Plan(
        shape=_shape(text, explained.encode()),
        frame_bytes=frame_bytes,
        paths=paths,
        is_whole=is_whole and not runs_python,
        runs_python=runs_python,
        is_sendable=end is not PlanEnd.UNSENDABLE,
        summary=_summary(text, paths, runs_python=bool(runs_python)),
    )


def finds_python(lf: pl.LazyFrame) -> bool | None:
    """Look further, past frames of some MB, in up to 20 ms; None if there is more."""
    found = plan_text(lf, _FAR_LIMIT)
    if found is None:
        return None
    text, end = found
    if end is PlanEnd.PYTHON or _PYTHON_NODE in text:
        return True
    return None if end is PlanEnd.LIMIT else False


def _without_last_frame(text: bytes) -> bytes:
    before, found, numbers = text.rpartition(_FRAME)
    return before + found if found and b"]" not in numbers else text


def _is_one_branch(text: bytes) -> bool:
    """Return whether the frame that comes after `text` is all that the plan reads."""
    if len(text) > _MOST_TOKENS:
        return False
    path: list[bytes] = []
    last = b""
    for token in map(re.Match.group, _TOKEN.finditer(text)):
        if token in (b"{", b"["):
            path.append(last)
        elif token in (b"}", b"]"):
            path.pop()
        elif token not in (b":", b","):
            last = token.strip(b'"')
    *above, leaf, frame = path[1:] or [b"", b""]
    return (leaf, frame) == (b"DataFrameScan", b"df") and (
        _ONE_INPUT.issuperset(above[::2]) and {b"input"}.issuperset(above[1::2])
    )


def _runs_python(explained: str) -> bool:
    # What could not be explained has a Python function, or is wrong in a way that it tells itself.
    return not explained or _PYTHON_SHOWN.search(explained) is not None


def _shape(*texts: bytes) -> int:
    return hash(tuple(_NUMBER.sub(b"0", _NUMBERS.sub(b"[", text)) for text in texts))


def _paths(text: bytes) -> list[str]:
    found: list[str] = []
    position = text.find(_PATHS)
    while position >= 0:
        position += len(_PATHS)
        with suppress(ValueError, TypeError, KeyError):  # it ends in the midst of them
            paths, _ = _JSON.raw_decode(text[position : position + _MOST_PATHS].decode())
            found += [str(path["inner"]) for path in paths]
        position = text.find(_PATHS, position)
    return found


def _summary(text: bytes, paths: list[str], *, runs_python: bool) -> str:
    nodes = " of ".join(name.decode() for name in _NODE.findall(text))
    function = "with a Python function" if runs_python else ""
    return " ".join(filter(None, (nodes, ", ".join(paths), function)))
