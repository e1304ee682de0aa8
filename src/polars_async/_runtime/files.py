"""
Files in memory without a name, whose descriptors are sent from process to process.

For Linux alone: the module is imported where a file is made or has come.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError(f"files in memory need Linux, and this is {sys.platform}")

import os
import resource
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from polars_async._runtime.descriptors import above_standard_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Identity: TypeAlias = tuple[int, int]
"""Device and inode: no other file of this machine has both, while a process has it open or mapped.
"""

_PART: Final = 4
_PIECE: Final = 1 << 30
"""Bytes that are read at once: the kernel returns 2 GB at most."""


def most_files() -> int:
    """Return how many files of one kind may be open: most descriptors are left to the program."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(1, limit // _PART)


def new_file() -> int:
    """Make a file in memory without a name, which no other user can open."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    file = above_standard_files(os.memfd_create("polars-async", flags))
    os.fchmod(file, 0o600)
    return file


def content_of(file: int) -> bytes:
    """Read all of `file`, without its position: processes and threads that share it move that."""
    size = os.fstat(file).st_size
    pieces = [os.pread(file, _PIECE, begin) for begin in range(0, size, _PIECE)]
    return b"".join(pieces)


def identity_of(file: int) -> Identity:
    """Return the identity of the open `file`."""
    status = os.fstat(file)
    return status.st_dev, status.st_ino


_received: Final[dict[Identity, int]] = {}
"""The shared files that came to this worker process with its query. Polars unpickles functions in
expressions while the query runs, on any thread, so they stay open until the query ends."""


def receive(files: Iterable[int]) -> None:
    """Keep shared `files` for `open_shared`; this module closes them."""
    for file in files:
        identity = identity_of(file)
        if identity in _received:
            os.close(file)
        else:
            _received[identity] = file


def close_received() -> None:
    """Close the files that were received: the query has ended."""
    while _received:
        os.close(_received.popitem()[1])


def is_open_to_others(file: int) -> bool:
    """Return whether other processes of this user can open `file` by its path below /proc."""
    user = os.geteuid()
    with suppress(OSError):  # there is no /proc
        folder = os.stat("/proc/self/fd")  # noqa: PTH116  # its owner may open what is in it
        return folder.st_uid == user and os.fstat(file).st_uid == user
    return False


def open_shared(owner: int, file: int, identity: Identity) -> int | None:
    """Return a descriptor of this process for `file` of the process `owner`; None without one."""
    ways: tuple[Callable[[], int], ...] = (
        partial(os.dup, _received.get(identity, -1)),
        partial(os.dup, file),  # of this process, or of the one that it was forked from
        partial(os.open, f"/proc/{owner}/fd/{file}", os.O_RDONLY | os.O_CLOEXEC),
    )
    for way in ways:
        with suppress(OSError):
            own = above_standard_files(way())
            if identity_of(own) == identity:
                return own
            os.close(own)
    return None
