"""Queries in worker processes: isolated from this one, and stopped when nobody wants them."""

from __future__ import annotations

import logging
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from polars_async._runtime.plans import look_at
from polars_async._runtime.unpatched import RLock, holding
from polars_async.errors import PolarsAsyncError, WorkerDiedError, signal_of
from polars_async.executors.large_plans import warn_if_large
from polars_async.executors.outcomes import error_of
from polars_async.executors.processes.call import WorkerCall
from polars_async.executors.processes.initializer import current
from polars_async.executors.processes.process import WorkerProcess, shut_down
from polars_async.executors.serialization import SerializationAbort, buffer_of, pack
from polars_async.executors.staying import StaysHereError, UnsendableError, log_once, run_here

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from polars_async.errors import QueryMemoryError
    from polars_async.executors import Job
    from polars_async.gpu.status import GpuStatus

T = TypeVar("T")

_TRIES: Final = 3
"""How many workers may die one after the other before they begin a query; it has harmed none."""
_PLAN_CHARACTERS: Final = 200


class ProcessExecutor:
    """
    Worker processes, each of which runs one query at a time.

    They are started when they are needed, and `most_idle` of them stay warm. A worker belongs to
    the thread that has taken it, until that gives it back; `_lock` guards who has which.
    """

    def __init__(
        self,
        *,
        threads: int,
        most_idle: int = 1,
        max_memory: int | None = None,
        keeps_unsendable: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._env: Final = {"POLARS_MAX_THREADS": str(threads), **(env or {})}
        self._most_idle: Final = most_idle
        self._max_memory: Final = max_memory
        self._stay_here: Final[tuple[type[Exception], ...]] = (
            (StaysHereError, UnsendableError) if keeps_unsendable else (StaysHereError,)
        )
        self._lock = RLock()
        self._idle: list[WorkerProcess] = []
        self._workers: set[WorkerProcess] = set()
        self._closed = False
        self.died = 0
        """How many workers have died with a query."""

    @property
    def workers(self) -> int:
        """How many worker processes there are."""
        return len(self._workers)

    def prepare(self, gpu: GpuStatus) -> int | None:  # noqa: ARG002  # as GpuProcessExecutor
        """Do nothing: a GPU is no other place here."""
        return None

    def run(
        self,
        work: Callable[[], T],
        query: Job,
        on_gpu: Callable[[Any], None] | None = None,
    ) -> T:
        """
        Run `work` in a worker; what it raises has the other traceback as its cause.

        `on_gpu` is given what the worker reports of the health of its GPU.
        """
        error: BaseException | None = None
        try:
            outcome = self._outcome(work, query, on_gpu)
            if isinstance(outcome, str):
                return run_here(work, query, outcome)  # type: ignore[return-value]  # None is for nobody
            kind, found, memory_error = outcome
            error = error_of(kind, found)
            if error is None:
                return found  # type: ignore[no-any-return]
            if memory_error is not None and isinstance(error, KeyboardInterrupt):
                error = memory_error
            raise error
        finally:
            del self, work, query, error  # an error's traceback holds this frame

    def _outcome(
        self,
        work: Callable[[], object],
        query: Job,
        on_gpu: Callable[[Any], None] | None,
    ) -> tuple[str, Any, QueryMemoryError | None] | str:
        """Give what came of it in a worker, or the reason why it stays here."""
        call: WorkerCall | None = None
        try:
            for _ in range(_TRIES):
                abort = SerializationAbort()
                if not query.on_cancel(abort):
                    abort()
                message = pack(work, in_files=True, abort=abort)
                try:
                    warn_if_large(query, message.plan_bytes, same_machine=True)
                    worker = self._take()
                except BaseException:
                    message.close()
                    raise
                call = WorkerCall(worker, query, self._max_memory, on_gpu)
                try:
                    kind, found = call.run(message, buffer_of(work))
                except EOFError:
                    exitcode = self._lose(worker)
                    if call.may_retry(exitcode):
                        continue
                    raise self._death(worker, exitcode, call, query) from None
                except BaseException:  # as when the program ends
                    self._lose(worker)
                    raise
                self._take_back(worker)
                call.check_sendable(kind)
                return kind, found, call.memory_error
            raise WorkerDiedError(
                f"{_TRIES} worker processes in a row died before they began a query"
            )
        except self._stay_here as reason:
            if isinstance(reason, UnsendableError):
                log_once(query, str(reason), logging.WARNING)
            return str(reason)
        finally:
            query.on_cancel(None)
            del self, work, query, call  # as above

    def close(self) -> None:
        """Let idle workers end, and the others after their query."""
        idle: list[WorkerProcess] = []
        try:
            holding(self._lock, self._close, idle)
            shut_down(idle)
        except BaseException:  # out of a signal handler
            shut_down(idle)
            raise

    def _close(self, idle: list[WorkerProcess]) -> None:
        self._closed = True
        idle.extend(self._idle)  # before they are there no more
        self._idle.clear()
        self._workers.difference_update(idle)

    def reset_after_fork(self) -> None:
        """Forget the workers, which are the children of another process."""
        self._lock = RLock()
        self._workers.clear()
        self._idle.clear()

    def _take(self) -> WorkerProcess:
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                return self._start()
            if worker.initializer is current() and worker.is_alive():
                return worker
            # Lost to the kernel, for want of memory, or of another initializer.
            self._lose(worker)

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(self._env)
        with self._lock:
            self._workers.add(worker)
        return worker

    def _take_back(self, worker: WorkerProcess) -> None:
        if worker.is_leaving or self._retains_memory(worker):
            self._replace(worker)
        else:
            self._give(worker)

    def _give(self, worker: WorkerProcess) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < self._most_idle:
                self._idle.append(worker)
                return
            self._workers.discard(worker)
        shut_down([worker])

    def _lose(self, worker: WorkerProcess) -> int | None:
        """Have `worker` gone for good; gives its exit code, if that is known."""
        with self._lock:
            self._workers.discard(worker)
        return worker.end()

    def _retains_memory(self, worker: WorkerProcess) -> bool:
        """Tell whether it keeps memory that might be taken for that of the next query."""
        return self._max_memory is not None and worker.memory() > self._max_memory / 2

    def _replace(self, worker: WorkerProcess) -> None:
        """Let a fresh worker take the place of one that ends by itself."""
        with self._lock:
            self._workers.discard(worker)
        shut_down([worker])
        self._refill()

    def _refill(self) -> None:
        with suppress(OSError, PolarsAsyncError):  # then the next query tries it again
            is_enough = self._closed or len(self._idle) >= self._most_idle
            fresh = None if is_enough else self._start()
            if fresh is not None:
                self._give(fresh)

    def _death(
        self, worker: WorkerProcess, exitcode: int | None, call: WorkerCall, query: Job
    ) -> BaseException:
        """Put a fresh worker in the place of one that is gone; gives the error of its query."""
        if worker.is_ready:  # else the next one might not start, either
            self._refill()
        if call.memory_error is not None:
            return call.memory_error
        if not call.stopped:
            with self._lock:
                self.died += 1
        return _death(worker, exitcode, query)


def _death(worker: WorkerProcess, exitcode: int | None, query: Job) -> WorkerDiedError:
    if not worker.is_ready:
        return WorkerDiedError(
            f"the worker process {worker.pid} ended before it was ready, {_told(exitcode)}: what "
            f"it wrote to stderr may tell why, or whether {worker.executable!r} runs by itself",
            exitcode,
            None,
        )
    plan = _plan_of(query)
    what = f"{query.named} ({plan})" if plan else query.named
    message = (
        f"the worker process {worker.pid} died while it ran {what}, {_told(exitcode)}. The query "
        "is not run again, and a fresh worker has taken the place: "
    )
    if exitcode == -signal.SIGKILL:
        message += (
            "if it was the kernel, for want of memory, its log says so; max_memory= stops a query "
            "before that"
        )
    elif exitcode is not None and exitcode < 0:
        message += (
            "Polars, or a library that a Python function in the query uses, has crashed; "
            "PYTHONFAULTHANDLER=1 in the environment has it tell where"
        )
    else:
        message += "look for what ends the process, such as os._exit, in Python functions of it"
    return WorkerDiedError(message, exitcode, plan)


def _told(exitcode: int | None) -> str:
    if exitcode is None:
        return (
            "and its exit status was taken, by other code that waits for all children or since "
            "SIGCHLD is ignored"
        )
    if exitcode < 0:
        known = signal_of(exitcode)
        return f"by {known.name}" if known is not None else f"by signal {-exitcode}"
    return f"with exit status {exitcode}"


def _plan_of(query: Job) -> str | None:
    """Return what `query` does in one short line, if its plan tells."""
    if not query.frames:
        return None
    text = look_at(query.frames[0]).summary
    return text if len(text) <= _PLAN_CHARACTERS else f"{text[:_PLAN_CHARACTERS]}…"
