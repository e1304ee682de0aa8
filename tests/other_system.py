"""Makes this process look like one of macOS or Windows, as far as the interpreter survives that."""

from __future__ import annotations

import asyncio
import errno
import importlib
import mmap
import os
import select
import signal
import socket
import sys
import time

_LINUX_ALONE = {
    os: (
        *("MFD_ALLOW_SEALING", "MFD_CLOEXEC", "O_PATH", "P_PIDFD", "eventfd", "memfd_create"),
        *("pidfd_open", "sched_getaffinity", "sched_setaffinity", "waitid"),
    ),
    signal: ("pidfd_send_signal",),
    socket: ("MSG_CMSG_CLOEXEC",),
}
_NOT_ON_WINDOWS = {
    os: (
        *("O_ASYNC", "O_CLOEXEC", "O_DIRECTORY", "O_NONBLOCK", "POSIX_SPAWN_DUP2", "P_PID"),
        *("POSIX_SPAWN_OPEN", "WEXITED", "WNOHANG", "WNOWAIT", "environb", "fchdir", "fchmod"),
        *("fork", "forkpty", "geteuid", "getloadavg", "getpgid", "getuid", "killpg", "nice"),
        *("posix_spawn", "posix_spawnp", "pread", "pwrite", "register_at_fork", "setsid"),
        *("sysconf", "wait"),
    ),
    signal: (
        "SIGALRM",
        "SIGCHLD",
        "SIGHUP",
        "SIGKILL",
        "SIGUSR1",
        "SIG_UNBLOCK",
        "pthread_sigmask",
    ),
    socket: ("MSG_DONTWAIT", "MSG_NOSIGNAL", "SCM_RIGHTS"),
    time: ("CLOCK_MONOTONIC", "clock_gettime", "clock_gettime_ns", "pthread_getcpuclockid"),
    mmap: ("MAP_SHARED", "PROT_READ"),
    select: ("poll",),
}
_MODULES_NOT_ON_WINDOWS = ("fcntl", "grp", "pwd", "resource", "termios")
_NEEDED = (
    *("gevent", "multiprocessing", "polars", "pytest", "subprocess", "trio", "urllib.request"),
)
"""What is imported before: the libraries look at the system when they are imported."""


def pretend(platform: str) -> None:
    """Take away what `platform`, "darwin" or "win32", lacks, and call the system that."""
    for name in _NEEDED:
        importlib.import_module(name)
    asyncio.new_event_loop().close()  # Python 3.14 chooses the kind of loop at its first use
    missing = [_LINUX_ALONE]
    if platform == "win32":
        missing.append(_NOT_ON_WINDOWS)
        for name in _MODULES_NOT_ON_WINDOWS:
            sys.modules[name] = None  # so that its import fails
    for each in missing:
        for module, names in each.items():
            for name in names:
                vars(module).pop(name, None)
    sys.addaudithook(_hide_files_of_linux)
    sys.platform = platform


def _hide_files_of_linux(event: str, arguments: tuple[object, ...]) -> None:
    if event not in {"open", "os.listdir", "os.scandir"} or not arguments:
        return
    path = arguments[0]
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(("/proc", "/sys/")):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
