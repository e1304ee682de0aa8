"""The Python interpreter that runs worker processes."""

from __future__ import annotations

import os
import re
import sys
from multiprocessing.spawn import get_executable
from typing import Final

from polars_async.errors import PolarsAsyncError

_NAMES: Final = re.compile(r"(python|pypy)[\d.]*([dmt]*|-dbg|-c)")


def executable() -> str:
    """
    Return the path of the interpreter that runs workers.

    That is what ``multiprocessing.set_executable`` has set, as programs do where ``sys.executable``
    is no Python. The path is looked at, and not tried: if it is that of this program, the program
    would start itself, which would start itself again, without end.

    Raises
    ------
    PolarsAsyncError
        The path is not that of a Python.
    """
    python = os.fsdecode(get_executable() or sys.executable or "")
    fault = _fault_of(python)
    if fault is not None:
        raise PolarsAsyncError(
            f"worker processes run in a Python, and {python!r} {fault}. Call "
            "multiprocessing.set_executable('/path/to/python') before the first query, with one of "
            "the same version that has the packages of this program, or use executor='threads'"
        )
    return python


def _fault_of(python: str) -> str | None:
    if not (os.path.isfile(python) and os.access(python, os.X_OK)):  # noqa: PTH113  # "" is a Path
        return "is no program: where Python is embedded, sys.executable may be anything"
    is_set = python != sys.executable
    if not is_set and getattr(sys, "frozen", False):
        return "is this program itself, which is frozen"
    names = os.path.basename(python), os.path.basename(os.path.realpath(python))  # noqa: PTH119
    is_named = any(map(_NAMES.fullmatch, names))
    if not is_named and (not is_set or _is_this_program(python)):
        return "is not called python: it may be this program itself, with Python embedded"
    return None


def _is_this_program(python: str) -> bool:
    try:
        return os.path.samefile(python, "/proc/self/exe")  # noqa: PTH121
    except OSError:  # such as where another release has replaced it
        return False
