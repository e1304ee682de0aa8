"""A message between processes: bytes, and open files that go with them."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from polars_async._runtime.unpatched import RLock, holding, local

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async._runtime.files import Identity

T = TypeVar("T")

MOST_FILES: Final = 64
"""Files of one kind that go in one message, which carries 253 at most."""


class Message(NamedTuple):
    """What `serialization.pack` makes of an object, and `Transport` sends."""

    data: bytes
    files: list[int]
    """File descriptors, which belong to the holder of the message: it has to close them."""
    shared: int = 0
    """How many of the files, the last ones, are those of shared frames."""
    plan_bytes: int = 0
    """The size of the plans in it; known only in the process that has packed it."""

    def take_shared(self) -> list[int]:
        """Remove the files of shared frames, and return them: they belong to the caller then."""
        begin = len(self.files) - self.shared
        taken = self.files[begin:]
        del self.files[begin:]
        return taken

    def close(self) -> None:
        """Close the files. May be called repeatedly."""
        while self.files:
            os.close(self.files.pop())


class SerializationAbort:
    """
    Called on any thread or by a signal handler, ends the packing of a query that was cancelled.

    Polars takes a second to pack a plan with 100 MB of frames, and has no way to be stopped; but it
    fails when it cannot write. So the files that it writes are sealed against growth.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._files: list[int] = []
        self._is_aborted = False

    @property
    def is_aborted(self) -> bool:
        """Whether the query was cancelled, so that no error of the packing matters."""
        return self._is_aborted

    def __call__(self) -> None:
        """Have each file refuse to grow, those that are watched later, too."""
        holding(self._lock, self._abort)

    def _abort(self) -> None:
        self._is_aborted = True
        for file in self._files:
            _stop_growth(file)

    def watch(self, file: int) -> None:
        """Have `file` refuse to grow once this has been called."""
        with self._lock:
            # The lock keeps other threads out, but not a signal handler of this one. If that aborts
            # before the next line, the flag is seen below; if after it, it seals the file itself.
            self._files.append(file)
            if self._is_aborted:
                _stop_growth(file)

    def end(self) -> None:
        """Forget the files before they are closed or sent."""
        # An abort that comes later would else seal another file, which was opened with the number
        # of a closed one.
        with self._lock:
            self._files.clear()


def _stop_growth(file: int) -> None:
    if sys.platform == "linux":  # where alone messages have files
        import fcntl  # noqa: PLC0415

        with suppress(OSError):
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)


class _ThisThread(local):
    attached: dict[Identity, int] | None = None


_this_thread: Final = _ThisThread()


def attaching(files: dict[Identity, int] | None, do: Callable[[], T]) -> T:
    """Return what `do` returns; meanwhile shared frames add to `attached` on this thread."""
    before, _this_thread.attached = _this_thread.attached, files
    try:
        return do()
    finally:
        _this_thread.attached = before


def attached() -> dict[Identity, int] | None:
    """Return the files that go with the message that this thread packs; None if none may."""
    return _this_thread.attached
