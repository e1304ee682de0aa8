"""What a worker process does: one query after the other, for as long as its parent lives."""

from __future__ import annotations

import fcntl
import logging
import marshal
import os
import select
import signal
import sys
from _socket import socket
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from polars_async._runtime.files import close_received, receive
from polars_async._runtime.fork import Step, in_child
from polars_async._runtime.nesting import enter_worker
from polars_async._runtime.unpatched import RLock
from polars_async.errors import PolarsAsyncError
from polars_async.executors.main_module import LookingUp, answer_for_polars
from polars_async.executors.outcomes import outcome_of, packed_error
from polars_async.executors.processes.surroundings import Follower
from polars_async.executors.processes.transport import Transport
from polars_async.executors.serialization import pack, unpack
from polars_async.gpu.offload import context_is_poisoned, report_health_to

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polars_async.executors.main_module import Definition
    from polars_async.executors.serialization import Message

_NAME = Path("/proc/self/comm")
_BADNESS = Path("/proc/self/oom_score_adj")
_EXPENDABLE = 500
_NICENESS = 10
"""A tenth of the share that the parent's threads get where both want a processor."""


def main(socket_file: int, lifeline: int, path: list[str]) -> None:
    """
    Serve the parent, at the other end of a socket, until that is closed.

    A no-op has to be the handler of SIGINT already, before the import of Polars, which puts its own
    before it; and the signal has to be blocked until now.
    """
    os.closerange(3, min(socket_file, lifeline))
    os.closerange(min(socket_file, lifeline) + 1, max(socket_file, lifeline))
    os.closerange(max(socket_file, lifeline) + 1, os.sysconf("SC_OPEN_MAX"))
    _die_with_parent(lifeline)
    with suppress(OSError):
        _NAME.write_text("polars-worker")
    with suppress(OSError):  # the kernel had better kill this process than its parent
        _BADNESS.write_text(str(_EXPENDABLE))
    with suppress(OSError):  # and to compute in this one later: heavy work is here, a loop is there
        os.nice(_NICENESS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    enter_worker(for_gpu=False)
    transport = Transport(socket(fileno=socket_file))
    # What a Python function starts may outlive this process, whose end the parent would not see,
    # and a copy that it has forked would go on with the query, and answer, too.
    for file in (socket_file, lifeline):
        fcntl.fcntl(file, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    in_child(Step.FORGET, transport.reset_after_fork)
    # A service is often stopped by a signal to all its processes, and then sees to it that queries
    # end; not so what a Python function forks.
    signal.signal(signal.SIGTERM, _do_nothing)
    in_child(Step.FORGET, lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    with suppress(EOFError):
        levels, set_up = unpack(transport.receive())
        logs = _Logs(transport)
        _set_up_logging(logs, levels)
        report_health_to(partial(_report_health, transport))
        with nullcontext() if set_up is None else set_up(partial(_ask, transport)):
            transport.send(pack(("ready", None), in_files=False))
            follower = Follower(path)
            answer_for_polars()
            while not context_is_poisoned():
                _serve(transport, logs, follower)


def _do_nothing(_number: int, _frame: object) -> None: ...


def _serve(transport: Transport, logs: _Logs, follower: Follower) -> None:
    task = transport.receive()
    if follower.take(task):
        task = transport.receive()
    if not task.data:
        _drain_interrupts()
        transport.send(pack(("rested", None), in_files=False))
        return
    transport.send(pack(("begun", None), in_files=False))
    logs.listens = True
    outcome = outcome_of(partial(_run, task, transport, follower))
    with suppress(Exception):  # what a Python function has printed would stay here
        sys.stdout.flush()
    logs.listens = False
    if context_is_poisoned():
        transport.send(pack(("leaving", None), in_files=False))
    try:
        message = pack(outcome, in_files=True)
    except BaseException as error:  # noqa: BLE001  # as of a column of Python objects
        message = pack(("error", packed_error(error)), in_files=False)
    transport.send(message)


def _run(task: Message, transport: Transport, follower: Follower) -> object:
    parent = _Parent(transport)
    follower.enter_folder()
    receive(task.take_shared())
    try:
        with LookingUp(parent.look_up):
            work = unpack(task, _RemoteBuffer(parent))
            return work()
    finally:
        parent.end()
        close_received()


def _ask(transport: Transport) -> Any:
    """Return what the initializer answers in the parent."""
    transport.send(pack(("ask", None), in_files=False))
    return unpack(transport.receive())


def _report_health(transport: Transport, failure: tuple[str, Exception] | None) -> None:
    """Tell the parent, which has the breaker of the GPU, since workers come and go."""
    told = None if failure is None else (failure[0], packed_error(failure[1]))
    transport.send(pack(("gpu", told), in_files=False))


def _drain_interrupts() -> None:
    """
    Wait until the signal that has stopped a query stops no more.

    It does as long as a thread is left of the query that it was meant for.
    """
    probe = pl.LazyFrame({"": [0]})
    while True:
        try:
            probe.collect(engine="in-memory")
        except KeyboardInterrupt:
            continue
        return


class _Parent:
    """
    Answers the questions of one query, one after the other, whichever threads ask.

    Once the query has ended, the channel is for the next: what Polars' threads that are left of it
    still ask has no answer.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = RLock()
        self._listens = True

    def ask(self, question: Message) -> Any:
        with self._lock:
            if not self._listens:
                question.close()
                raise PolarsAsyncError("the query has ended: what is left of it has no answer")
            self._transport.send(question)
            answer = self._transport.receive()
            receive(answer.take_shared())
            return unpack(answer)

    def look_up(self, module: str, name: str) -> Definition:
        answer: Definition = self.ask(pack(("main", (module, name)), in_files=False))
        return answer

    def end(self) -> None:
        with self._lock:
            self._listens = False


class _RemoteBuffer:
    """The buffer of a stream, whose consumer is in the parent."""

    def __init__(self, parent: _Parent) -> None:
        self._parent = parent

    def add(self, batch: pl.DataFrame) -> None:
        """Send a batch that is there anyway."""
        self._send("add", batch)

    def put(self, batch: pl.DataFrame) -> bool:
        """Send a batch, and wait until there is room for one more; True if none is wanted."""
        return self._send("put", batch)

    def _send(self, kind: str, batch: pl.DataFrame) -> bool:
        enough: bool = self._parent.ask(pack((kind, batch), in_files=True))
        return enough


class _Logs(logging.Handler):
    """Sends what is logged to the parent, while that listens."""

    def __init__(self, transport: Transport) -> None:
        super().__init__()
        self.listens = False
        self._transport = transport

    def emit(self, record: logging.LogRecord) -> None:
        if not self.listens:
            return
        try:
            # As a text, since anything may be among the arguments.
            sent: dict[str, Any] = record.__dict__ | {"msg": record.getMessage(), "args": None}
            if record.exc_info:
                sent["exc_text"] = logging.Formatter().formatException(record.exc_info)
                sent["exc_info"] = None
            sent = {name: _as_data(value) for name, value in sent.items()}
            self._transport.send(pack(("log", sent), in_files=False))
        except Exception:  # noqa: BLE001  # as every handler does
            self.handleError(record)


def _as_data(value: Any) -> object:
    """Give what `extra=` holds as a text, where it is more than data: it may not come out again."""
    try:
        marshal.dumps(value)
    except ValueError:
        return repr(value)
    return value


def _set_up_logging(logs: _Logs, levels: Mapping[str, int]) -> None:
    logging.captureWarnings(capture=True)
    logging.getLogger().addHandler(logs)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _die_with_parent(lifeline: int) -> None:
    """Have the kernel kill this process when the parent does not hold the lifeline any more."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(lifeline, 0)
    if poll.poll(0):  # it was too late
        os._exit(1)
