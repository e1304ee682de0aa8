"""The main function of a worker process, which runs queries as long as its parent lives."""

from __future__ import annotations

import sys

assert sys.platform == "linux"

import fcntl
import logging
import marshal
import os
import select
import signal
from _socket import socket
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from polars_async._runtime.descriptors import STANDARD_FILES
from polars_async._runtime.files import close_received, receive
from polars_async._runtime.fork import Step, in_child
from polars_async._runtime.nesting import enter_worker
from polars_async._runtime.thread_names import set_system_name
from polars_async._runtime.unpatched import RLock
from polars_async.errors import PolarsAsyncError
from polars_async.executors.carried import bare
from polars_async.executors.main_module import ResolvingMain, resolve_namespaces
from polars_async.executors.message import Message
from polars_async.executors.meters import is_counting
from polars_async.executors.operations import Run
from polars_async.executors.outcomes import outcome_of, packed_error
from polars_async.executors.processes.readings import sending_counts
from polars_async.executors.processes.surroundings import Follower
from polars_async.executors.processes.transport import Transport
from polars_async.executors.serialization import pack, unpack
from polars_async.gpu.offload import context_is_poisoned, report_health_to, report_retries_to

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from polars_async.executors.main_module import Export

_OOM_SCORE = Path("/proc/self/oom_score_adj")
_KILLED_FIRST = 500
_NICENESS = 10
"""Where a worker and its parent compete for a processor, the worker gets a tenth as much."""


def main(socket_file: int, lifeline: int, path: list[str]) -> None:
    """
    Serve the parent, at the other end of a socket, until that is closed.

    Before it imports Polars, the caller has to block SIGINT, and to set a handler that does
    nothing: Polars puts its own handler before that one, and with it ends a running query by
    KeyboardInterrupt.
    """
    _close_inherited({socket_file, lifeline})
    _die_with_parent(lifeline)
    set_system_name("polars-worker")
    with suppress(OSError):  # where memory is short, the kernel is to kill this, not the parent
        _OOM_SCORE.write_text(str(_KILLED_FIRST))
    with suppress(OSError):  # heavy work is here, and the parent may run an event loop
        os.nice(_NICENESS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    enter_worker(for_gpu=False)
    transport = Transport(socket(fileno=socket_file))
    # A program that a Python function starts must not inherit these: it may outlive this process,
    # and the parent would not see its end. Nor may a fork use the socket: it would go on with the
    # query, and send an outcome, too.
    for file in (socket_file, lifeline):
        fcntl.fcntl(file, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    in_child(Step.FORGET, transport.reset_after_fork)
    # A service is often stopped by SIGTERM to all its processes: the parent then ends the queries,
    # and so this process. Processes that a Python function forks end by SIGTERM as usual.
    signal.signal(signal.SIGTERM, _do_nothing)
    in_child(Step.FORGET, lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    with suppress(EOFError):
        levels, set_up = unpack(transport.receive())
        logs = _LogSender(transport)
        _set_up_logging(logs, levels)
        report_health_to(partial(_report_health, transport))
        report_retries_to(partial(_report_retry, transport))
        with nullcontext() if set_up is None else set_up(partial(_ask_initializer, transport)):
            transport.send(pack(("ready", None), in_files=False))
            follower = Follower(path)
            resolve_namespaces()
            while not context_is_poisoned():
                _serve(transport, logs, follower)


def _close_inherited(but: set[int]) -> None:
    """Close the files that this process has of its parent, but for the standard ones and some."""
    # Not those that were opened here: by sitecustomize, such as that of opentelemetry-instrument,
    # whose exporter has threads that end the process if their files are gone. Those close on exec.
    for file in _open_files():
        if file >= STANDARD_FILES and file not in but:
            with suppress(OSError):  # that of the listing, or none
                if not fcntl.fcntl(file, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                    os.close(file)


def _open_files() -> Iterable[int]:
    try:
        return map(int, os.listdir("/proc/self/fd"))  # noqa: PTH208  # names, and no paths
    except OSError:  # it need not be mounted
        return range(os.sysconf("SC_OPEN_MAX"))


def _do_nothing(_number: int, _frame: object) -> None: ...


def _serve(transport: Transport, logs: _LogSender, follower: Follower) -> None:
    """Run the query of the next message, or drain signals for an empty one."""
    message = transport.receive()
    if follower.apply(message):
        message = transport.receive()
    if not message.data:
        _drain_interrupts()
        transport.send(pack(("drained", None), in_files=False))
        return
    transport.send(pack(("begun", None), in_files=False))
    logs.enabled = True
    kind, content = outcome_of(partial(_run, message, transport, follower))
    with suppress(Exception):  # else what a Python function has printed would be kept back
        sys.stdout.flush()
    # All else goes before the outcome: after that, the parent reads nothing until its next query.
    logs.enabled = False
    if context_is_poisoned():
        transport.send(pack(("exiting", None), in_files=False))
    transport.send(content if isinstance(content, Message) else _packed(kind, content))


def _packed(kind: str, error: object) -> Message:
    try:
        return pack((kind, error), in_files=True)
    except BaseException as unsendable:  # noqa: BLE001  # such as of a column of Python objects
        return pack(("error", packed_error(unsendable)), in_files=False)


def _run(message: Message, transport: Transport, follower: Follower) -> Message:
    """Run the query of `message`, and return the message with its result."""
    parent = _Parent(transport)
    follower.enter_folder()
    receive(message.take_shared())
    try:
        with ResolvingMain(parent.load):
            operation = unpack(message, _RemoteBuffer(parent))
            is_call = isinstance(bare(operation), Run)
            if is_call:
                transport.send(pack(("called", None), in_files=False))
            is_counted = is_counting(operation)
            result = sending_counts(operation, transport) if is_counted else operation()
            # Here, where the classes of the program are found by their names.
            return pack(("value", result), in_files=True, by_value=is_call)
    finally:
        parent.end()
        close_received()


def _ask_initializer(transport: Transport, question: object) -> Any:
    """Return what the initializer answers in the parent."""
    transport.send(pack(("initializer", question), in_files=False))
    return unpack(transport.receive())


def _report_health(transport: Transport, failure: tuple[str, Exception] | None) -> None:
    """Report to the parent, which has the breaker of the GPU: that has to outlive the workers."""
    report = None if failure is None else (failure[0], packed_error(failure[1]))
    transport.send(pack(("gpu_health", report), in_files=False))


def _report_retry(transport: Transport, how: str, cause: Exception) -> None:
    """Report to the parent, which has the query, that its GPU tries it once more."""
    transport.send(pack(("gpu_retry", (how, packed_error(cause))), in_files=False))


def _drain_interrupts() -> None:
    """
    Wait until no signal is left that was sent to stop the last query.

    Polars has one flag for all queries: while a thread of the last query still runs, it stays set,
    and stops a new query, too. The probe tells.
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
    Asks the parent on behalf of one query, from any thread.

    The lock makes a question and its answer one step: questions of two threads never mix, and a
    thread always gets the answer to its own.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = RLock()
        self._query_runs = True

    def ask(self, question: Message) -> Any:
        with self._lock:
            # Threads of Polars, or of a Python function, may outlive the query and still ask. The
            # flag is read with the lock held: either `end` came before, and nothing is sent; or it
            # waits until the answer is here. So no question follows the outcome, where the parent
            # would take it for one of the next query.
            if not self._query_runs:
                question.close()
                raise PolarsAsyncError("the query has ended: what is left of it has no answer")
            self._transport.send(question)
            answer = self._transport.receive()
            receive(answer.take_shared())
            return unpack(answer)

    def load(self, module: str, name: str) -> Export:
        exported: Export = self.ask(pack(("load", (module, name)), in_files=False))
        return exported

    def end(self) -> None:
        """Answer no more questions. Called before the outcome of the query is sent."""
        with self._lock:
            self._query_runs = False


class _RemoteBuffer:
    """The buffer of a stream, whose consumer is in the parent."""

    def __init__(self, parent: _Parent) -> None:
        self._parent = parent

    def add(self, batch: pl.DataFrame) -> None:
        """Send a batch, and go on however many are ready in the parent."""
        self._send("add", batch)

    def put(self, batch: pl.DataFrame) -> bool:
        """Send a batch, and wait for room for one more; return True if no more are wanted."""
        return self._send("put", batch)

    def _send(self, kind: str, batch: pl.DataFrame) -> bool:
        enough: bool = self._parent.ask(pack((kind, batch), in_files=True))
        return enough


class _LogSender(logging.Handler):
    """Sends log records to the parent, while a query runs."""

    def __init__(self, transport: Transport) -> None:
        super().__init__()
        self.enabled = False
        self._transport = transport

    def emit(self, record: logging.LogRecord) -> None:
        if not self.enabled:
            return
        try:
            # Formatted here, since the arguments may be objects that cannot be pickled.
            sent: dict[str, Any] = record.__dict__ | {"msg": record.getMessage(), "args": None}
            if record.exc_info:
                sent["exc_text"] = logging.Formatter().formatException(record.exc_info)
                sent["exc_info"] = None
            sent = {name: _as_data(value) for name, value in sent.items()}
            self._transport.send(pack(("log", sent), in_files=False))
        except Exception:  # noqa: BLE001  # as every handler does
            self.handleError(record)


def _as_data(value: Any) -> object:
    """Return a value of ``extra=``, or its repr if it is an object: that may not be unpickled."""
    try:
        marshal.dumps(value)
    except ValueError:
        return repr(value)
    return value


def _set_up_logging(logs: _LogSender, levels: Mapping[str, int]) -> None:
    logging.captureWarnings(capture=True)
    logging.getLogger().addHandler(logs)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _die_with_parent(lifeline: int) -> None:
    """Have the kernel kill this process when the parent no longer has the lifeline open."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(lifeline, 0)
    if poll.poll(0):  # the parent was gone before, and the signal will not come
        os._exit(1)
