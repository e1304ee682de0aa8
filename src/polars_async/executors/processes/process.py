"""A worker process, from the parent's side: its start, its signals, and its end."""

from __future__ import annotations

import sys

assert sys.platform == "linux"

import logging
import marshal
import os
import signal
from _socket import AF_UNIX, SOCK_STREAM, socketpair
from _socket import socket as Socket  # noqa: N812  # as in `transport`
from contextlib import suppress
from time import clock_gettime, monotonic
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from polars_async._runtime.descriptors import STANDARD_FILES, above_standard_files
from polars_async._runtime.files import new_file
from polars_async._runtime.fork import Step, in_child
from polars_async._runtime.green import leaving_no_hub
from polars_async._runtime.machine import private_memory
from polars_async._runtime.unpatched import RLock, holding, posix_spawn, sleep, start_new_thread
from polars_async.executors.initializer import current
from polars_async.executors.processes.child_handle import ChildHandle
from polars_async.executors.processes.interpreter import executable
from polars_async.executors.processes.surroundings import changes, surroundings
from polars_async.executors.processes.transport import Transport
from polars_async.executors.serialization import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

_EXIT_TIMEOUT: Final = 2.0
"""Seconds that a worker has to end by itself when it is idle."""
_BOOTSTRAP: Final = (
    "import marshal, os, signal, sys; signal.signal(signal.SIGINT, lambda *_: None); "
    "path = marshal.loads(os.pread({path}, {size}, 0)); sys.path[:{replaced}] = path; "
    "from polars_async.executors.processes.child import main as serve; "
    "del marshal, os, signal, sys; "
    "globals().pop('serve')({socket}, {lifeline}, globals().pop('path'))"
)
"""Leaves no names in the child's ``__main__``: names of the parent's are resolved there."""
_OF_PROCESS: Final = 2
"""In the number of a clock of Linux: the processor time of all threads of a process."""


class WorkerProcess:
    """One worker process, and the parent's end of the transport to it."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.executable = executable()
        with _fork_lock:
            self._spawn(env)

    def _spawn(self, env: Mapping[str, str]) -> None:
        ours, theirs = map(_above_standard_files, socketpair(AF_UNIX, SOCK_STREAM))
        lifeline, our_lifeline = map(above_standard_files, os.pipe())
        self._lifeline: int | None = our_lifeline
        self.transport = Transport(ours)
        _alive.add(self)
        self._lock = RLock()
        self._reaped = False
        self.initializer = current()
        self.is_ready = False
        self.idle_memory = 0
        """The bytes that it took before its first query."""
        self.is_exiting = False
        """Whether it will end by itself after this query."""
        try:
            self._own_variables = {
                os.fsencode(name): os.fsencode(value) for name, value in env.items()
            }
            # Without the folder: the program may change it before the process inherits it.
            self._surroundings = surroundings()._replace(folder=None)
            self._child = self._start(theirs.fileno(), lifeline)
            self.pid = self._child.pid
        except BaseException:
            self.transport.close()
            self._drop_lifeline()
            _alive.discard(self)
            raise
        finally:
            theirs.close()
            os.close(lifeline)

    def _start(self, socket: int, lifeline: int) -> ChildHandle:
        path = marshal.dumps(self._surroundings.path)
        file = new_file()  # for a path that is longer than an argument may be
        try:
            os.pwrite(file, path, 0)
            code = _BOOTSTRAP.format(
                path=file,
                size=len(path),
                # An executable that the program has set needs its own path for its own modules.
                replaced="" if self.executable == sys.executable else 0,
                socket=socket,
                lifeline=lifeline,
            )
            return ChildHandle(self._spawn_python(code, [socket, lifeline, file]))
        finally:
            os.close(file)

    def _spawn_python(self, code: str, files: list[int]) -> int:
        warnings = [f"-W{option}" for option in sys.warnoptions]
        return posix_spawn(
            self.executable,
            [self.executable, "-P", *warnings, "-c", code],
            self._surroundings.variables | self._own_variables,
            file_actions=[
                *_standard_files(),
                # Inheritable in this child alone: no other child may hold them open.
                *((os.POSIX_SPAWN_DUP2, file, file) for file in files),
            ],
            setpgroup=0,  # Ctrl-C in a terminal is for this process, not for workers
            setsigmask=[signal.SIGINT],  # until it has a handler
        )

    def await_start(self) -> None:
        """
        Wait until the worker can run queries.

        Raises
        ------
        EOFError
            It has ended before.
        """
        if self.is_ready:
            return
        set_up = None if self.initializer is None else self.initializer.set_up()
        self.transport.send(pack((_levels(), set_up), in_files=False))
        unpack(self.transport.receive())
        self.idle_memory = self.private_memory()
        self.is_ready = True

    def sync_surroundings(self) -> None:
        """Have the worker's next query run in the present surroundings of this process."""
        now = surroundings()
        if now != self._surroundings:
            self.transport.send(changes(self._surroundings, now, except_for=self._own_variables))
            self._surroundings = now

    def is_alive(self) -> bool:
        """Return whether the worker lives; it may die at any time."""
        return self.transport.is_open()

    def signal(self, number: int) -> None:
        """Send a signal, if the worker still exists. Any thread or signal handler may call this."""
        holding(self._lock, self._signal, number)

    def _signal(self, number: int) -> None:
        if self._reaped:
            return
        try:
            self._child.signal(number)
        except PermissionError:
            if number == signal.SIGKILL:
                self._drop_lifeline()

    def cpu_seconds(self) -> float:
        """Return the processor time of the worker so far, in seconds; 0 if it is gone."""
        try:
            return clock_gettime(~self.pid << 3 | _OF_PROCESS)
        except OSError:
            return 0.0

    def private_memory(self) -> int:
        """Return the bytes of memory that the worker shares with no process; 0 if it is gone."""
        return private_memory(self.pid)

    def kill(self) -> int | None:
        """Kill the worker, if it lives, and wait for its end; return its exit code, if known."""
        self.signal(signal.SIGKILL)
        # Without the lock: a thread that sends a signal meanwhile must not wait for the end. This
        # leaves the status, and so the number of the process, until `_reap` has the lock.
        self._child.await_end()
        return self._reap()

    def request_exit(self) -> None:
        """Have the worker end by itself."""
        self.transport.close()

    def join_or_kill(self, until: float) -> None:
        """Wait until the worker has ended, as `request_exit` asked; kill it at the time `until`."""
        while not self._reaped and monotonic() < until:
            self._reap()
            sleep(0.005)
        if not self._reaped:
            self.kill()

    def reset_after_fork(self) -> None:
        """In a forked child, close its copies: else the worker would not see the parent's end."""
        self._reaped = True  # by the parent, as far as the child is concerned
        self._child.close()
        self.transport.reset_after_fork()
        self._drop_lifeline()

    def _reap(self) -> int | None:
        # With the lock held: `signal` must not use the handle when it is closed, whose descriptor
        # may be another file then.
        with self._lock:
            if self._reaped:
                return None
            exitcode: int | None = None
            with suppress(ChildProcessError):  # other code has waited for it
                exitcode = self._child.take_exitcode()
                if exitcode is None:
                    return None
            self._reaped = True
            _alive.discard(self)
            self._child.close()
            self.transport.close()
            self._drop_lifeline()
            return exitcode

    def _drop_lifeline(self) -> None:
        """Close the lifeline, so that the kernel kills the worker: that needs no permission."""
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            os.close(lifeline)


def shut_down(workers: list[WorkerProcess]) -> None:
    """Have `workers` end by themselves; a thread in the background kills those that do not."""
    if not workers:
        return
    for worker in workers:
        worker.request_exit()
    try:
        start_new_thread(_join_or_kill, (workers,))
    except RuntimeError:  # the thread could not be started
        _join_or_kill(workers, 0.0)


@leaving_no_hub
def _join_or_kill(workers: list[WorkerProcess], exit_timeout: float = _EXIT_TIMEOUT) -> None:
    until = monotonic() + exit_timeout
    for worker in workers:
        worker.join_or_kill(until)


def _above_standard_files(socket: Socket) -> Socket:
    return Socket(fileno=above_standard_files(socket.detach()))


def _standard_files() -> list[tuple[int, int, str, int, int]]:
    """
    Return file actions for an empty stdin, and the stdout and stderr that a child would inherit.

    One that is closed here becomes /dev/null: else the first file that the worker opens, or gets
    from here, would be taken for it.
    """
    closed = [file for file in range(1, STANDARD_FILES) if not _is_inherited(file)]
    return [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        *((os.POSIX_SPAWN_OPEN, file, os.devnull, os.O_WRONLY, 0) for file in closed),
    ]


def _is_inherited(file: int) -> bool:
    try:
        return os.get_inheritable(file)
    except OSError:
        return False


def _levels() -> dict[str, int]:
    """Return the levels of all loggers that have one, so that a worker sends no other records."""
    loggers = logging.Logger.manager.loggerDict
    levels = {
        name: each.level
        for name, each in list(loggers.items())
        if isinstance(each, logging.Logger) and each.level
    }
    return levels | {"": logging.getLogger().level}


def _reset_after_fork() -> None:
    for worker in list(_alive):
        worker.reset_after_fork()
    _alive.clear()


_alive: Final[WeakSet[WorkerProcess]] = WeakSet()
_fork_lock: Final = RLock()
"""Held while a worker is spawned. A child forked meanwhile would have copies of the worker's ends
of the socket and the lifeline, which `_reset_after_fork` does not know: as long as it lived, this
process would not see the worker's death."""

in_child(Step.FORGET, _reset_after_fork)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_fork_lock.acquire,
        after_in_parent=_fork_lock.release,
        after_in_child=_fork_lock.release,
    )
