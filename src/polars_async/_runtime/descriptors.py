"""Numbers of open files that are not taken for stdin, stdout and stderr."""

from __future__ import annotations

import os
import sys
from typing import Final

if sys.platform != "win32":
    import fcntl

STANDARD_FILES: Final = 3


def above_standard_files(file: int) -> int:
    """
    Move an open file of ours away from 0, 1 and 2, which are free where a program has closed them.

    What is printed there would else be in the midst of our data, also the text of a panic; and a
    program that opens them again would close ours.
    """
    if file >= STANDARD_FILES:
        return file
    try:
        return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, STANDARD_FILES)
    finally:
        os.close(file)
