"""Files in memory without a name, which go from process to process as descriptors."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial
from io import BufferedReader, BufferedWriter, FileIO
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeVar, overload

from polars_async._runtime.descriptors import above_standard_files
from polars_async._runtime.unpatched import local

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

Identity: TypeAlias = tuple[int, int]
"""What tells a file from all others of this machine, while a process has it open or mapped."""

MOST_IN_MESSAGE: Final = 64
"""Files of one kind that go in one message, which carries 253 at most."""
_PART: Final = 4
_PIECE: Final = 1 << 30
"""Bytes that are read at once: the kernel gives 2 GB at most."""


def most_files() -> int:
    """Return how many files of one kind may be open: the program needs the most for itself."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(1, limit // _PART)


def new_file() -> int:
    """Make a file in memory that has no name, and that no other user could open."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    file = above_standard_files(os.memfd_create("polars-async", flags))
    os.fchmod(file, 0o600)
    return file


@overload
def opened(file: int, mode: Literal["rb"]) -> BufferedReader: ...
@overload
def opened(file: int, mode: Literal["wb"]) -> BufferedWriter: ...
def opened(file: int, mode: Literal["rb", "wb"]) -> BufferedReader | BufferedWriter:
    """
    Give `file` as an object that begins at its start, and leaves the descriptor open.

    Not by a path below /proc: that is refused once this process has become that of another user,
    and need not be there.
    """
    os.lseek(file, 0, os.SEEK_SET)
    raw = FileIO(file, mode, closefd=False)
    return BufferedReader(raw) if mode == "rb" else BufferedWriter(raw)


def content_of(file: int) -> bytes:
    """Read all of `file`, whatever its position: processes and threads that share it move that."""
    size = os.fstat(file).st_size
    pieces = [os.pread(file, _PIECE, begin) for begin in range(0, size, _PIECE)]
    return b"".join(pieces)


def identity_of(file: int) -> Identity:
    """Return what tells `file` from all others."""
    status = os.fstat(file)
    return status.st_dev, status.st_ino


class _ThisThread(local):
    along: dict[Identity, int] | None = None


_this_thread: Final = _ThisThread()
_brought: Final[dict[Identity, int]] = {}
"""The shared files that came to this worker process with its query. Polars unpickles functions in
expressions when it comes to them, on any thread, so they are at hand until the query ends."""


def taking_along(files: dict[Identity, int] | None, do: Callable[[], T]) -> T:
    """Give what `do` gives; `files` take what `goes_along` is told meanwhile on this thread."""
    before, _this_thread.along = _this_thread.along, files
    try:
        return do()
    finally:
        _this_thread.along = before


def goes_along(file: int) -> bool:
    """Have a copy of `file` go along with what this thread packs; False if it cannot."""
    along = _this_thread.along
    if along is None:
        return False
    identity = identity_of(file)
    if identity not in along:
        if len(along) >= min(MOST_IN_MESSAGE, most_files()):
            return False
        along[identity] = above_standard_files(os.dup(file))
    return True


def bring(files: Iterable[int]) -> None:
    """Have shared `files` at hand, which belong to this module from now on."""
    for file in files:
        identity = identity_of(file)
        if identity in _brought:
            os.close(file)
        else:
            _brought[identity] = file


def put_away() -> None:
    """Close the files that were brought: the query has ended."""
    while _brought:
        os.close(_brought.popitem()[1])


def is_open_to_others(file: int) -> bool:
    """Return whether other processes of this user can open `file` by the path that it has here."""
    user = os.geteuid()
    with suppress(OSError):  # there is no /proc
        folder = os.stat("/proc/self/fd")  # noqa: PTH116  # whose owner is the one that may
        return folder.st_uid == user and os.fstat(file).st_uid == user
    return False


def found(owner: int, file: int, identity: Identity) -> int | None:
    """Return a descriptor of this process for `file` of the process `owner`; None without one."""
    ways: tuple[Callable[[], int], ...] = (
        partial(os.dup, _brought.get(identity, -1)),
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
