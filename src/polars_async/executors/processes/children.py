"""A child process, which no other one is taken for."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from polars_async._runtime.descriptors import above_standard_files


class Child:
    """
    A child process of this one.

    Any code may take the status of all children, and the kernel does where SIGCHLD is ignored; from
    then on the number may be that of another process. So it is signalled and waited for by a pidfd.
    Where there is none, as on Linux 5.3 and in some sandboxes, the number has to do, for as long as
    it is that of a child.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._file = _pidfd(pid)

    def signal(self, number: int) -> None:
        """
        Send it a signal, if it is there.

        Raises
        ------
        PermissionError
            This process has become that of another user.
        """
        with suppress(ProcessLookupError, ChildProcessError):  # its status is taken
            if self._file is not None:
                signal.pidfd_send_signal(self._file, number)
                return
            self._wait(os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.kill(self.pid, number)

    def await_end(self) -> None:
        """Wait for its end, and leave its status to `take_exitcode`."""
        with suppress(ChildProcessError):
            self._wait(os.WEXITED | os.WNOWAIT)

    def take_exitcode(self) -> int | None:
        """
        Give its exit status, or the negative number of the signal that ended it; None if it lives.

        Raises
        ------
        ChildProcessError
            The status is taken, and so it is gone.
        """
        found = self._wait(os.WEXITED | os.WNOHANG)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def close(self) -> None:
        """Let go of it; nothing may be asked of it any more."""
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
        # One whose status can be had has its number still, so this is not another process already.
        os.waitid(os.P_PIDFD, file, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        signal.pidfd_send_signal(file, 0)
    except (AttributeError, OSError):
        os.close(file)
        return None
    return file
