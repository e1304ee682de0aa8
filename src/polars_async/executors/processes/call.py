"""One query in one worker process, from its sending to its outcome, or to its end by force."""

from __future__ import annotations

import enum
import logging
import signal
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from polars_async._runtime.files import Identity, attaching
from polars_async._runtime.green import deliver
from polars_async._runtime.logs import complain
from polars_async._runtime.timers import start_timer
from polars_async._runtime.unpatched import RLock, holding
from polars_async.errors import QueryMemoryError
from polars_async.executors.definitions import definition
from polars_async.executors.main_module import POLARS
from polars_async.executors.serialization import Message, pack, unpack
from polars_async.executors.staying import UnsendableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async._runtime.timers import Timer
    from polars_async.bridges.buffer import Buffer
    from polars_async.executors import Job
    from polars_async.executors.main_module import Definition
    from polars_async.executors.processes.process import WorkerProcess

GRACE: Final = 0.05
"""Seconds that a query has to end after SIGINT, before its worker is killed."""
_START_WITHIN: Final = 10.0
"""Seconds that a worker has to start, once nobody wants the query for which it does."""
_INTERRUPTS: Final = 5
"""How often it is sent meanwhile: one that comes just before the query begins has no effect."""
_SAMPLED: Final = 0.01
"""Seconds from one look at the memory of a worker to the next."""
_OF_STREAMS: Final = ("put", "add")


class _Phase(enum.Enum):
    STARTS = enum.auto()
    """The worker may not be there yet; the next query can have it, if it comes."""
    RUNS = enum.auto()
    """The worker has the query, and SIGINT is meant for that."""
    DRAINS = enum.auto()
    """The query has ended, and the worker gets over the signals that came."""
    OVER = enum.auto()


class WorkerCall:
    """
    One query in one worker.

    The slot's thread runs it; `stop` may come from any thread and from a signal handler, and
    `expire` comes from the clock's thread. `_lock` sees to it that no signal meets the worker's
    next query.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        query: Job,
        max_memory: int | None,
        on_gpu: Callable[[Any], None] | None,
    ) -> None:
        self._worker = worker
        self._query = query
        self._max_memory = max_memory
        self._on_gpu = on_gpu or _ignore
        self._lock = RLock()
        self._phase = _Phase.STARTS
        self._interrupts = 0
        self._deadline: Timer | None = None
        self._begun = False
        self._looks_at = monotonic() + _SAMPLED
        """When to look at the memory of the worker, though it may send one thing after another."""
        self.stopped = False
        self.memory_error: QueryMemoryError | None = None
        self._unsendable: UnsendableError | None = None

    def run(self, message: Message, buffer: Buffer | None) -> tuple[str, Any]:
        """Give what came of it; EOFError when the worker is gone."""
        query = self._query
        try:
            if not query.on_cancel(self.stop):
                return "value", None
            with query.paused():  # or it would seem to be a slow query
                self._worker.await_start()
            if not self._is_to_run():
                return "value", None
            self._worker.bring_up_to_date()
            kind, found = self._follow(message, buffer)
            query.on_cancel(None)
            if self._is_to_drain():
                self._follow(Message(b"", []), None)
        finally:
            message.close()
            query.on_cancel(None)
            with self._lock:
                self._phase = _Phase.OVER
                self._cancel_timer()
            del self, query
        return kind, found

    def may_retry(self, exitcode: int | None) -> bool:
        """Tell whether the worker died before it began; one that fails to start does so again."""
        may_start = self._worker.is_ready or (exitcode is not None and exitcode < 0)
        return may_start and not self._begun and not self.stopped

    def check_sendable(self, kind: str) -> None:
        """Raise if the query failed since the worker could not be told what it asked for."""
        if kind == "error" and self._unsendable is not None:
            raise self._unsendable

    def stop(self) -> None:
        """Stop the query, if it runs: nobody wants it. Whoever was interrupted calls it again."""
        holding(self._lock, self._stop)

    def _stop(self) -> None:
        if self._phase is _Phase.STARTS:
            self.stopped = True
            self._expire_in(_START_WITHIN)
        elif self._phase is _Phase.RUNS:
            self.stopped = True
            self._interrupt()

    def expire(self) -> None:
        """Ask once more, or kill the worker when it was asked often enough."""
        with self._lock:
            if self._phase is not _Phase.OVER:
                self._interrupt()

    def _interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts > _INTERRUPTS or self._phase is not _Phase.RUNS:
            self._worker.signal(signal.SIGKILL)
            return
        self._worker.signal(signal.SIGINT)
        self._expire_in(GRACE / _INTERRUPTS)

    def _is_to_run(self) -> bool:
        with self._lock:
            if not self.stopped:
                self._phase = _Phase.RUNS
            return not self.stopped

    def _is_to_drain(self) -> bool:
        with self._lock:
            self._phase = _Phase.DRAINS if self.stopped else _Phase.OVER
            if self.stopped:
                self._expire_in(GRACE)
            return self.stopped

    def _expire_in(self, seconds: float) -> None:
        self._cancel_timer()
        try:
            self._deadline = start_timer(seconds, self)
        except RuntimeError:  # no thread to be had for the clock
            self._worker.signal(signal.SIGKILL)

    def _cancel_timer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def _follow(self, message: Message, buffer: Buffer | None) -> tuple[str, Any]:
        """Send `message`, and take what the worker sends, up to the outcome."""
        transport = self._worker.transport
        transport.send(message)
        while True:
            self._check_memory()
            try:
                message = transport.receive(None if self._max_memory is None else _SAMPLED)
            except TimeoutError:
                continue
            kind, content = unpack(message)
            if kind == "begun":
                self._begun = True
            elif kind == "log":
                _log(content)
            elif kind == "main":
                transport.send(self._defined(*content))
            elif kind == "leaving":
                self._worker.is_leaving = True
            elif kind == "gpu":
                self._on_gpu(content)
            elif kind == "ask" and self._worker.initializer is not None:
                transport.send(pack(self._worker.initializer.answer(), in_files=False))
            elif kind in _OF_STREAMS and buffer is not None:
                enough = getattr(buffer, kind)(content)
                transport.send(pack(bool(enough), in_files=False))
            else:
                return kind, content

    def _defined(self, module: str, name: str) -> Message:
        shared: dict[Identity, int] = {}
        found = attaching(shared, partial(self._definition, module, name))
        return Message(pack(found, in_files=False).data, list(shared.values()), len(shared))

    def _definition(self, module: str, name: str) -> Definition:
        """Define what the worker asks for, or give it the reason why not as its error."""
        try:
            return definition(module, name)
        except UnsendableError as error:
            if module != POLARS:  # else a function asks, in the midst of the query
                self._unsendable = error
            return str(error)

    def _check_memory(self) -> None:
        limit = self._max_memory
        if limit is None or self.memory_error is not None or monotonic() < self._looks_at:
            return
        self._looks_at = monotonic() + _SAMPLED
        if (memory := self._worker.memory()) > limit:
            self.memory_error = QueryMemoryError(
                f"{self._query.named} outgrew the memory of its worker process, and was stopped: "
                f"it took {memory:,} bytes, of at most max_memory={limit:,}. Ask for less at once, "
                "try the streaming engine, or allow for more",
                limit,
            )
            self.stop()


def _ignore(_health: object) -> None:
    """Let it be: this worker belongs to no GPU, and a Python function has used one."""


def _log(content: dict[str, Any]) -> None:
    record = logging.makeLogRecord(content)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        deliver(partial(_handle, logger, record))


def _handle(logger: logging.Logger, record: logging.LogRecord) -> None:
    try:
        logger.handle(record)
    except BaseException:  # noqa: BLE001  # a handler that breaks the rules costs no query its result
        complain("a handler raised at what a worker process has logged")
