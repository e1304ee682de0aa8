"""What files are like now, so that a change of theirs is noticed later."""

from __future__ import annotations

import os
import re
from itertools import islice
from stat import S_ISDIR, S_ISREG
from time import time_ns
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

State: TypeAlias = tuple[int, ...]
"""Device, inode, size, and times of change in nanoseconds."""

_SETTLED: Final = 50_000_000
"""Nanoseconds after a change of a file in which another might leave all of its state as it is: the
kernel counts them in steps of 1 to 10 ms."""
_COARSE: Final = 1_000_000_000
_SETTLED_IF_COARSE: Final = 2_500_000_000
"""The same where a time is in whole seconds, as some file systems count."""
_MOST_ENTRIES: Final = 256
"""Files and folders, below the folder of a pattern, that are looked at in some 0.5 ms."""
_PATTERN: Final = re.compile(r"[*?\[]")


def states_of(paths: Sequence[str]) -> tuple[State, ...] | None:
    """
    Return the states of the files that `paths`, as given to Polars, stand for.

    For a folder, or a pattern, they are those of all that is in the folder, at any depth. Return
    None if a state cannot be told: a file is elsewhere, is not there, or has changed just now, or
    they are too many.
    """
    newest = time_ns() - _SETTLED
    try:
        states = [
            _state_of(status, newest)
            for path in paths
            for status in islice(_statuses(path), _MOST_ENTRIES + 1)
        ]
    except (OSError, ValueError):
        return None
    return tuple(states) if len(states) <= _MOST_ENTRIES else None


def _state_of(status: os.stat_result, newest: int) -> State:
    modified, changed = status.st_mtime_ns, status.st_ctime_ns
    latest = max(modified, changed)
    if latest > newest or (modified % _COARSE == 0 and latest > newest - _SETTLED_IF_COARSE):
        raise ValueError("it has changed just now")
    return status.st_dev, status.st_ino, status.st_size, modified, changed


def _statuses(path: str) -> Iterable[os.stat_result]:
    scheme, found, rest = path.partition("://")
    if found:
        if scheme != "file":
            raise ValueError("it is on another machine")
        path = rest
    # Also where a file of that very name is there: Polars takes it for a pattern all the same.
    folder = _folder_of_pattern(path)
    if folder is not None:
        return _below(folder)
    status = os.stat(path)  # noqa: PTH116  # quicker, and the path is a text
    if S_ISREG(status.st_mode):
        return (status,)
    if S_ISDIR(status.st_mode):
        return _below(path)
    raise ValueError("it is neither a file nor a folder")


def _folder_of_pattern(path: str) -> str | None:
    """Return the folder below which all is that the pattern `path` may match; None without one."""
    found = _PATTERN.search(path)
    if found is None:
        return None
    return os.path.dirname(path[: found.start()]) or os.curdir  # noqa: PTH120  # as above


def _below(folder: str) -> Iterator[os.stat_result]:
    """Yield the status of `folder`, and of all that is in it, at any depth."""
    yield os.stat(folder)  # noqa: PTH116  # as above
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat()
            if S_ISDIR(status.st_mode):
                yield from _below(entry.path)
            else:
                yield status
