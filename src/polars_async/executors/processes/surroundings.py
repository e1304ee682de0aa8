"""The surroundings of a query: current folder, search path of imports, environment variables."""

from __future__ import annotations

import sys

assert sys.platform == "linux"

import os
import pickle
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import polars as pl

from polars_async.executors.message import Message

if TYPE_CHECKING:
    from collections.abc import Container

_MARK: Final = b"\0"
"""The first byte of messages with changes. No pickle begins with it, and so no query."""
_OF_POLARS: Final = b"POLARS_"


class Surroundings(NamedTuple):
    """The surroundings of a process at one time."""

    folder: tuple[int, int] | None
    """Device and inode of the current folder; None if the system refuses to tell."""
    path: list[str]
    variables: dict[bytes, bytes]


def surroundings() -> Surroundings:
    """Return the surroundings of this process. Takes 3 us, as it is called for each query."""
    entries: list[Any] = sys.path  # imports ignore entries that are no strings
    path = [str(each) for each in entries if isinstance(each, str)]
    try:
        status = os.stat(".")  # noqa: PTH116  # a third of the time
    except OSError:
        return Surroundings(None, path, _variables())
    return Surroundings((status.st_dev, status.st_ino), path, _variables())


def changes(before: Surroundings, now: Surroundings, except_for: Container[bytes]) -> Message:
    """Pack the changes from `before` to `now`, without the variables in `except_for`."""
    names = [
        name
        for name in before.variables | now.variables
        if before.variables.get(name) != now.variables.get(name) and name not in except_for
    ]
    variables = {name: now.variables.get(name) for name in names}
    folder: list[int] = []
    if now.folder is not None and now.folder != before.folder:
        folder.append(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    return Message(_MARK + pickle.dumps((now.path, variables)), folder)


class Follower:
    """In a worker process: applies the changes of its parent's surroundings."""

    def __init__(self, path: list[str]) -> None:
        self._path = path
        self._folder: int | None = None

    def apply(self, message: Message) -> bool:
        """Apply the changes in `message`; return False if it is another message."""
        if not message.data.startswith(_MARK):
            return False
        path, variables = pickle.loads(message.data[len(_MARK) :])  # noqa: S301  # of the parent
        _set_variables(variables)
        # Entries that libraries have added in this process stay.
        added = [each for each in sys.path if each not in self._path]
        self._path = path
        sys.path[:] = [*path, *added]
        if message.files:
            if self._folder is not None:
                os.close(self._folder)
            self._folder = message.files.pop()
        return True

    def enter_folder(self) -> None:
        """Change to the parent's folder, as the function of an earlier query may have left it."""
        if self._folder is not None:
            os.fchdir(self._folder)


def _variables() -> dict[bytes, bytes]:
    # A private attribute that need not exist. The public way takes 25 us, and fails if another
    # thread sets a variable meanwhile.
    variables: dict[bytes, bytes] | None = getattr(os.environ, "_data", None)
    if variables is not None:
        return variables.copy()
    return {os.fsencode(name): os.fsencode(value) for name, value in os.environ.items()}


def _set_variables(variables: dict[bytes, bytes | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environb.pop(name, None)
        else:
            os.environb[name] = value
    if any(name.startswith(_OF_POLARS) for name in variables):
        pl.Config.reload_env_vars()
