"""The logger ``polars_async``, and errors that are logged and not raised."""

from __future__ import annotations

import logging
import sys
import threading
from functools import partial
from typing import Final

from polars_async._runtime.green import deliver

log: Final = logging.getLogger("polars_async")


def complain(message: str, *arguments: object) -> None:
    """
    Log the error that is being handled, and raise nothing.

    Nor is raised what a log handler raises: the calling thread has other queries to end.
    """
    deliver(partial(_complain, message, arguments, sys.exception()))


def is_ctrl_c() -> bool:
    """Return whether a KeyboardInterrupt is Ctrl-C: only the main thread gets it."""
    return threading.current_thread() is threading.main_thread()


def _complain(message: str, arguments: tuple[object, ...], error: BaseException | None) -> None:
    try:
        log.error(message, *arguments, exc_info=error)
    except BaseException as raised:
        if isinstance(raised, KeyboardInterrupt) and is_ctrl_c():
            raise
