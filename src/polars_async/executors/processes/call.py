"""One query in one worker process: from its sending to its outcome, or to the end of the worker."""

from __future__ import annotations

import sys

assert sys.platform == "linux"

import enum
import logging
import signal
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from polars_async._runtime.green import deliver
from polars_async._runtime.logs import complain
from polars_async._runtime.timers import start_timer
from polars_async._runtime.unpatched import RLock, holding
from polars_async.errors import QueryMemoryError
from polars_async.executors.exports import export
from polars_async.executors.main_module import POLARS
from polars_async.executors.message import Message, attaching
from polars_async.executors.outcomes import unpacked_error
from polars_async.executors.serialization import pack, unpack
from polars_async.executors.staying import UnsendableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async._runtime.files import Identity
    from polars_async._runtime.timers import Timer
    from polars_async.bridges.buffer import Buffer
    from polars_async.executors import Stoppable
    from polars_async.executors.main_module import Export
    from polars_async.executors.processes.process import WorkerProcess

GRACE: Final = 0.05
"""Seconds that a query has to end after SIGINT, before its worker is killed."""
_START_TIMEOUT: Final = 10.0
"""Seconds that a worker may go on starting after its query was cancelled."""
_MAX_INTERRUPTS: Final = 5
"""How often SIGINT is sent within `GRACE`: one just before the query begins has no effect."""
_SAMPLE_INTERVAL: Final = 0.01
"""Seconds between two samples of a worker's memory."""
_BUFFER_METHODS: Final = ("put", "add")


class _Phase(enum.Enum):
    STARTING = enum.auto()
    """The worker may still be starting. If it comes up, the next query can have it."""
    RUNNING = enum.auto()
    """The worker has the query, or will have it soon. SIGINT is sent in this phase alone."""
    DRAINING = enum.auto()
    """The query has ended. Signals may be on their way, which must not hit the next query."""
    OVER = enum.auto()
    """No signal is sent any more: the worker is there for the next query."""


class WorkerCall:
    """
    One query in one worker.

    `run` is called on the slot's thread, `stop` on any thread or by a signal handler, and `expire`
    on the timer thread. `_lock` guards the phase: signals are sent with the lock held, and so none
    is sent once `run` has left the phase for which it was meant.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        query: Stoppable,
        max_memory: int | None,
        on_gpu_health: Callable[[Any], None] | None,
    ) -> None:
        self._worker = worker
        self._query = query
        self._max_memory = max_memory
        self._on_gpu_health = on_gpu_health or _ignore
        self._lock = RLock()
        self._phase = _Phase.STARTING
        self._interrupts = 0
        self._timer: Timer | None = None
        self._has_begun = False
        self._has_called = False
        self._next_sample = monotonic() + _SAMPLE_INTERVAL
        """When to sample the worker's memory, even if messages come all the time."""
        self.stopped = False
        self.memory_error: QueryMemoryError | None = None
        self._unsendable: UnsendableError | None = None

    def run(self, message: Message, buffer: Buffer | None) -> tuple[str, Any]:
        """
        Have the worker run the query packed in `message`; return its outcome.

        Raises
        ------
        EOFError
            The worker is gone.
        """
        query = self._query
        try:
            if not query.stop_with(self.stop):
                return "value", None
            with query.clock_stopped():  # else it would count as a slow query
                self._worker.await_start()
            if not self._enter_running():
                return "value", None
            self._worker.sync_surroundings()
            kind, content = self._follow(message, buffer)
            query.stop_with(None)
            if self._enter_draining():
                # Any signal sent so far has reached the worker when this message does. So it
                # interrupts the probe by which the worker drains signals, and not the next query.
                self._follow(Message(b"", []), None)
        finally:
            message.close()
            query.stop_with(None)
            # Only now may another thread have the worker. A `stop` or `expire` that is called, but
            # has no lock yet, finds the phase OVER and sends nothing.
            with self._lock:
                self._phase = _Phase.OVER
                self._cancel_timer()
            del self, query  # see QueryExecutor.run
        return kind, content

    def may_retry(self, exitcode: int | None) -> bool:
        """
        Return whether another worker may be tried: this one died before the query began.

        Not if it ended by itself while it started, since the next one would do the same.
        """
        may_start = self._worker.is_ready or (exitcode is not None and exitcode < 0)
        return may_start and not self._has_begun and not self.stopped

    def check_sendable(self, kind: str) -> None:
        """
        Raise if the query failed for want of a name whose value could not be sent.

        Not if it is a function that was called by then: it must not run once more, here.
        """
        if kind == "error" and self._unsendable is not None and not self._has_called:
            raise self._unsendable

    def stop(self) -> None:
        """Stop the query. May be called again, as when a signal handler interrupted it."""
        holding(self._lock, self._stop)

    def _stop(self) -> None:
        if self._phase is _Phase.STARTING:
            # Nothing to interrupt: `_enter_running` sees this, and the query is not sent. The
            # worker is left to start, for the next query.
            self.stopped = True
            self._expire_in(_START_TIMEOUT)
        elif self._phase is _Phase.RUNNING:
            self.stopped = True
            self._interrupt()

    def expire(self) -> None:
        """Interrupt the query again, or kill the worker if that did not help or cannot help."""
        # A timer that has fired may wait here for the lock while it is replaced by the one for
        # DRAINING. It then kills the worker before its time is over: that costs a worker, and no
        # query.
        with self._lock:
            if self._phase is not _Phase.OVER:
                self._interrupt()

    def _interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts > _MAX_INTERRUPTS or self._phase is not _Phase.RUNNING:
            self._worker.signal(signal.SIGKILL)
            return
        self._worker.signal(signal.SIGINT)
        self._expire_in(GRACE / _MAX_INTERRUPTS)

    def _enter_running(self) -> bool:
        # A `stop` before this is noted in `stopped`, and the query is not sent. One after it sends
        # SIGINT, maybe before the worker has the query: then one of the next signals stops it.
        with self._lock:
            if not self.stopped:
                self._phase = _Phase.RUNNING
            return not self.stopped

    def _enter_draining(self) -> bool:
        # A `stop` before this has sent a signal, which has to be drained. One after it sends none,
        # and the outcome that has just come is dropped, as that of a cancelled query.
        with self._lock:
            self._phase = _Phase.DRAINING if self.stopped else _Phase.OVER
            if self.stopped:
                self._expire_in(GRACE)
            return self.stopped

    def _expire_in(self, seconds: float) -> None:
        self._cancel_timer()
        try:
            self._timer = start_timer(seconds, self)
        except RuntimeError:  # the timer thread could not be started
            self._worker.signal(signal.SIGKILL)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _follow(self, message: Message, buffer: Buffer | None) -> tuple[str, Any]:
        """Send `message`; handle what the worker sends until that is the outcome, and return it."""
        transport = self._worker.transport
        notices = {
            "log": _log,
            "gpu_health": self._on_gpu_health,
            "gpu_retry": self._note_retry,
            "reading": self._query.note_reading,
        }
        transport.send(message)
        while True:
            self._check_memory()
            try:
                message = transport.receive(None if self._max_memory is None else _SAMPLE_INTERVAL)
            except TimeoutError:
                continue
            kind, content = unpack(message)
            if kind == "begun":
                self._has_begun = True
            elif kind == "called":
                self._has_called = True
            elif kind == "load":
                transport.send(self._export(*content))
            elif kind == "exiting":
                self._worker.is_exiting = True
            elif kind in notices:
                notices[kind](content)
            elif kind == "initializer" and self._worker.initializer is not None:
                transport.send(pack(self._worker.initializer.answer(content), in_files=False))
            elif kind in _BUFFER_METHODS and buffer is not None:
                enough = getattr(buffer, kind)(content)
                transport.send(pack(bool(enough), in_files=False))
            else:
                return kind, content

    def _note_retry(self, content: tuple[str, Any]) -> None:
        how, cause = content
        self._query.note_retry(how, unpacked_error(cause))  # type: ignore[arg-type]  # as sent

    def _export(self, module: str, name: str) -> Message:
        """Return the message with what this program calls `name`, and the frames it shares."""
        shared: dict[Identity, int] = {}
        exported = attaching(shared, partial(self._export_or_reason, module, name))
        return Message(pack(exported, in_files=False).data, list(shared.values()), len(shared))

    def _export_or_reason(self, module: str, name: str) -> Export:
        try:
            return export(module, name)
        except UnsendableError as error:
            if module != POLARS:  # else a function of the query asks: too late to run it here
                self._unsendable = error
            return str(error)

    def _check_memory(self) -> None:
        limit = self._max_memory
        if limit is None or self.memory_error is not None or monotonic() < self._next_sample:
            return
        self._next_sample = monotonic() + _SAMPLE_INTERVAL
        memory = self._worker.private_memory()
        self._query.note_memory(max(0, memory - self._worker.idle_memory))
        if memory > limit:
            # Before `stop`: the outcome may be that interrupt, which this error then replaces.
            self.memory_error = QueryMemoryError(
                f"{self._query.named} outgrew the memory of its worker process, and was stopped: "
                f"it took {memory:,} bytes, of at most max_memory={limit:,}. Ask for less at once, "
                "try the streaming engine, or allow for more",
                limit,
                memory,
            )
            self.stop()


def _ignore(_health: object) -> None:
    """Ignore a report of GPU health: the worker has no GPU of ours, a Python function used one."""


def _log(content: dict[str, Any]) -> None:
    record = logging.makeLogRecord(content)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        deliver(partial(_handle, logger, record))


def _handle(logger: logging.Logger, record: logging.LogRecord) -> None:
    try:
        logger.handle(record)
    except BaseException:  # noqa: BLE001  # a handler must not cost a query its result
        complain("a handler raised at what a worker process has logged")
