"""The parent's handle of a child process, which never stands for another process."""

from __future__ import annotations

import sys

assert sys.platform == "linux"

import os
import signal
from contextlib import suppress

from polars_async._runtime.descriptors import above_standard_files


class ChildHandle:
    """
    A child process, to be signalled and waited for.

    Other code may wait for all children, and the kernel does where SIGCHLD is ignored; from then on
    the number may be that of another process. So a pidfd is used. Where there is none, as on Linux
    5.3 and in some sandboxes, the number is used as long as it is that of a child.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._file = _pidfd(pid)

    def signal(self, number: int) -> None:
        """
        Send the child a signal, if it still exists.

        Raises
        ------
        PermissionError
            This process has become that of another user.
        """
        with suppress(ProcessLookupError, ChildProcessError):  # its status was taken
            if self._file is not None:
                signal.pidfd_send_signal(self._file, number)
                return
            self._wait(os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.kill(self.pid, number)

    def await_end(self) -> None:
        """Wait until the child has ended, and leave its status to `take_exitcode`."""
        with suppress(ChildProcessError):
            self._wait(os.WEXITED | os.WNOWAIT)

    def take_exitcode(self) -> int | None:
        """
        Return the exit status, or the negative number of the signal that ended it; None if alive.

        Raises
        ------
        ChildProcessError
            The status was taken already, and so the child is gone.
        """
        status = self._wait(os.WEXITED | os.WNOHANG)
        if status is None:
            return None
        return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status

    def close(self) -> None:
        """Close the handle, which must not be used any more."""
        if self._file is not None:
            os.close(self._file)

    def _wait(self, options: int) -> os.waitid_result | None:
        if self._file is not None:
            return os.waitid(os.P_PIDFD, self._file, options)
        return os.waitid(os.P_PID, self.pid, options)


def _pidfd(pid: int) -> int | None:
    try:
        file = above_standard_files(os.pidfd_open(pid))
    except (AttributeError, OSError):  # not known to the interpreter, or to the kernel
        return None
    try:
        # The child may have ended before `pidfd_open`, and its number may have a new owner. But as
        # long as its status can be had, the number was not free for another process.
        os.waitid(os.P_PIDFD, file, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        signal.pidfd_send_signal(file, 0)
    except (AttributeError, OSError):
        os.close(file)
        return None
    return file
