"""Keeps the descriptors of our files off the numbers of stdin, stdout and stderr, on Linux."""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError(f"files in memory need Linux, and this is {sys.platform}")

import fcntl
import os
from typing import Final

STANDARD_FILES: Final = 3


def above_standard_files(file: int) -> int:
    """
    Move the open `file` to a number above 2, if it has none, and return that.

    0, 1 and 2 are free where a program has closed its standard files. If a file of ours had one of
    them, whatever is printed would be written into our data, the text of a panic too; and a program
    that opens its standard files again would close ours.
    """
    if file >= STANDARD_FILES:
        return file
    try:
        return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, STANDARD_FILES)
    finally:
        os.close(file)
