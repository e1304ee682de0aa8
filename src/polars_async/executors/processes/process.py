"""A worker process, as its parent sees it."""

from __future__ import annotations

import logging
import marshal
import os
import signal
import sys
from _socket import AF_UNIX, SOCK_STREAM, socketpair
from _socket import socket as Socket  # noqa: N812  # as in the channel
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from polars_async._runtime.descriptors import STANDARD_FILES, above_standard_files
from polars_async._runtime.files import new_file
from polars_async._runtime.fork import Step, in_child
from polars_async._runtime.green import leaving_no_hub
from polars_async._runtime.unpatched import RLock, holding, posix_spawn, sleep, start_new_thread
from polars_async.executors.processes.children import Child
from polars_async.executors.processes.initializer import current
from polars_async.executors.processes.interpreter import executable
from polars_async.executors.processes.surroundings import changes, surroundings
from polars_async.executors.processes.transport import Transport
from polars_async.executors.serialization import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

_EXIT_TIMEOUT: Final = 2.0
"""Seconds that an idle worker has to end by itself."""
_START: Final = (
    "import marshal, os, signal, sys; signal.signal(signal.SIGINT, lambda *_: None); "
    "path = marshal.loads(os.pread({path}, {size}, 0)); sys.path[:{replaced}] = path; "
    "from polars_async.executors.processes.child import main as serve; "
    "del marshal, os, signal, sys; "
    "globals().pop('serve')({socket}, {lifeline}, globals().pop('path'))"
)
"""It leaves no name in ``__main__``, where those of this program's ``__main__`` are looked up."""
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class WorkerProcess:
    """One worker process, and this end of the channel to it."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.executable = executable()
        with _no_fork:
            self._spawn(env)

    def _spawn(self, env: Mapping[str, str]) -> None:
        ours, theirs = map(_above_standard_files, socketpair(AF_UNIX, SOCK_STREAM))
        lifeline, ours_of_it = map(above_standard_files, os.pipe())
        self._lifeline: int | None = ours_of_it
        self.transport = Transport(ours)
        _alive.add(self)
        self._lock = RLock()
        self._reaped = False
        self.initializer = current()
        self.is_ready = False
        self.is_leaving = False
        """Whether it ends after this query, for a reason of its own."""
        try:
            self._own = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
            # But for the folder, which may be another one until the process is there.
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

    def _start(self, socket: int, lifeline: int) -> Child:
        path = marshal.dumps(self._surroundings.path)
        file = new_file()  # for a path that is longer than an argument may be
        try:
            os.pwrite(file, path, 0)
            code = _START.format(
                path=file,
                size=len(path),
                # One that the program has set finds its modules where its own path says.
                replaced="" if self.executable == sys.executable else 0,
                socket=socket,
                lifeline=lifeline,
            )
            return Child(self._run(code, [socket, lifeline, file]))
        finally:
            os.close(file)

    def _run(self, code: str, files: list[int]) -> int:
        warnings = [f"-W{option}" for option in sys.warnoptions]
        return posix_spawn(
            self.executable,
            [self.executable, "-P", *warnings, "-c", code],
            self._surroundings.variables | self._own,
            file_actions=[
                *_standard_files(),
                # In the child alone, so that no other one gets hold of them.
                *((os.POSIX_SPAWN_DUP2, file, file) for file in files),
            ],
            setpgroup=0,  # Ctrl-C in a terminal is for this process, not for them
            setsigmask=[signal.SIGINT],  # until it has a handler
        )

    def await_start(self) -> None:
        """Wait until it is there; EOFError where it fails to start."""
        if self.is_ready:
            return
        set_up = None if self.initializer is None else self.initializer.set_up()
        self.transport.send(pack((_levels(), set_up), in_files=False))
        unpack(self.transport.receive())
        self.is_ready = True

    def bring_up_to_date(self) -> None:
        """Have its next query find around it what there is here now."""
        now = surroundings()
        if now != self._surroundings:
            self.transport.send(changes(self._surroundings, now, apart_from=self._own))
            self._surroundings = now

    def is_alive(self) -> bool:
        """Tell whether it lives; it may die at any time."""
        return self.transport.is_open()

    def signal(self, number: int) -> None:
        """Send it a signal, if it is there. Any thread may."""
        holding(self._lock, self._signal, number)

    def _signal(self, number: int) -> None:
        if self._reaped:
            return
        try:
            self._child.signal(number)
        except PermissionError:
            if number == signal.SIGKILL:
                self._drop_lifeline()

    def memory(self) -> int:
        """Give the bytes of memory that it has all for itself; 0 if it is gone."""
        try:
            with open(f"/proc/{self.pid}/statm", "rb") as file:  # noqa: PTH123  # a fifth of the time
                _, resident, shared = file.read().split()[:3]
        except OSError:
            return 0
        return (int(resident) - int(shared)) * _PAGE

    def end(self) -> int | None:
        """Kill it if it lives, and wait for its end; gives its exit code, if that is known."""
        self.signal(signal.SIGKILL)
        self._child.await_end()
        return self._reap()

    def request_exit(self) -> None:
        """Have it end by itself."""
        self.transport.close()

    def join_or_kill(self, until: float) -> None:
        """Wait for the end of one that was to leave, and kill it when it is time."""
        while not self._reaped and monotonic() < until:
            self._reap()
            sleep(0.005)
        if not self._reaped:
            self.end()

    def reset_after_fork(self) -> None:
        """Close what a forked child has of it, so that the worker sees its parent's end."""
        self._reaped = True  # by the parent, as far as the child is concerned
        self._child.close()
        self.transport.reset_after_fork()
        self._drop_lifeline()

    def _reap(self) -> int | None:
        with self._lock:  # or it might be sent a signal by what is closed
            if self._reaped:
                return None
            exitcode: int | None = None
            with suppress(ChildProcessError):  # other code has taken it
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
        """Have the kernel kill it, which takes no permission."""
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            os.close(lifeline)


def shut_down(workers: list[WorkerProcess]) -> None:
    """Have `workers` end by themselves, which nobody waits for."""
    if not workers:
        return
    for worker in workers:
        worker.request_exit()
    try:
        start_new_thread(_join_or_kill, (workers,))
    except RuntimeError:  # no thread to be had
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
    Give a worker an empty stdin, and the stdout and stderr that a Python started here would have.

    Where there is none the worker has one that swallows all: else the first files that it opens, or
    gets from here, would be taken for them.
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
    """Give the levels of all loggers that have one, so that a worker sends what is wanted."""
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
_no_fork: Final = RLock()
"""Held while a worker is spawned: a child forked meanwhile would keep the worker's end of all, and
hide its death."""

in_child(Step.FORGET, _reset_after_fork)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release
    )
