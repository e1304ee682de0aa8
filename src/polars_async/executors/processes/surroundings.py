"""What a query finds around it: the folder, search path and environment of this process."""

from __future__ import annotations

import os
import pickle
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import polars as pl

from polars_async.executors.serialization import Message

if TYPE_CHECKING:
    from collections.abc import Container

_MARK: Final = b"\0"
"""With which no pickle begins, and so no query."""
_OF_POLARS: Final = b"POLARS_"


class Surroundings(NamedTuple):
    """Those of a process at one time."""

    folder: tuple[int, int] | None
    """Which folder it is in, whatever that is called; None if it cannot be told."""
    path: list[str]
    variables: dict[bytes, bytes]


def surroundings() -> Surroundings:
    """Look at those of this process, which takes 3 us: it is done for each query."""
    entries: list[Any] = sys.path  # some are no strings, and imports ignore those
    path = [str(each) for each in entries if isinstance(each, str)]
    try:
        status = os.stat(".")  # noqa: PTH116  # a third of the time
    except OSError:
        return Surroundings(None, path, _variables())
    return Surroundings((status.st_dev, status.st_ino), path, _variables())


def changes(before: Surroundings, now: Surroundings, apart_from: Container[bytes]) -> Message:
    """Pack up what a worker has to change that is as `before`; some variables are its own."""
    names = [
        name
        for name in before.variables | now.variables
        if before.variables.get(name) != now.variables.get(name) and name not in apart_from
    ]
    variables = {name: now.variables.get(name) for name in names}
    folder: list[int] = []
    if now.folder is not None and now.folder != before.folder:
        folder.append(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    return Message(_MARK + pickle.dumps((now.path, variables)), folder)


class Follower:
    """In a worker process: puts in force what has changed for its parent."""

    def __init__(self, path: list[str]) -> None:
        self._path = path
        self._folder: int | None = None

    def take(self, message: Message) -> bool:
        """Put in force what `message` says; False if it says something else."""
        if not message.data.startswith(_MARK):
            return False
        path, variables = pickle.loads(message.data[len(_MARK) :])  # noqa: S301  # of the parent
        _set_variables(variables)
        # A library may have added its own when it was imported.
        added = [each for each in sys.path if each not in self._path]
        self._path = path
        sys.path[:] = [*path, *added]
        if message.files:
            if self._folder is not None:
                os.close(self._folder)
            self._folder = message.files.pop()
        return True

    def enter_folder(self) -> None:
        """Go to the folder of the parent, since a function may have gone to another one."""
        if self._folder is not None:
            os.fchdir(self._folder)


def _variables() -> dict[bytes, bytes]:
    # An internal that need not be there. The public way takes 25 us, and fails where another thread
    # sets one meanwhile.
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
