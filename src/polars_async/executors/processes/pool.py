"""Queries in worker processes: isolated from this process, and stopped when cancelled."""

from __future__ import annotations

import sys

assert sys.platform == "linux"

import logging
import signal
from contextlib import suppress
from time import process_time
from typing import TYPE_CHECKING, Any, Final, TypeVar

from polars_async._runtime.plans import look_at
from polars_async._runtime.unpatched import RLock, holding
from polars_async.errors import PolarsAsyncError, WorkerDiedError, signal_of
from polars_async.executors import QueryExecutor
from polars_async.executors.carried import carried
from polars_async.executors.initializer import current
from polars_async.executors.large_plans import warn_if_large
from polars_async.executors.message import SerializationAbort
from polars_async.executors.meters import SentMeter, counting
from polars_async.executors.operations import Run
from polars_async.executors.outcomes import error_of
from polars_async.executors.processes.call import WorkerCall
from polars_async.executors.processes.process import WorkerProcess, shut_down
from polars_async.executors.serialization import buffer_of, pack
from polars_async.executors.staying import StaysHereError, UnsendableError, log_once, run_here

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from polars_async.errors import QueryMemoryError
    from polars_async.executors import Job
    from polars_async.executors.operations import Operation

T = TypeVar("T")

_MAX_TRIES: Final = 3
"""How many workers may die in a row before they begin a query, which then has killed none."""
_PLAN_CHARACTERS: Final = 200


class ProcessExecutor(QueryExecutor):
    """
    Worker processes, each of which runs one query at a time.

    They are started when they are needed, and up to `max_idle` of them stay warm. A worker belongs
    to the thread that has taken it, until that thread gives it back or discards it. `_lock` guards
    the two collections alone: to start, signal or end a worker takes too long to hold it.
    """

    def __init__(
        self,
        *,
        threads: int,
        max_idle: int = 1,
        max_memory: int | None = None,
        runs_unsendable_here: bool = False,
        env: Mapping[str, str] | None = None,
        gpu: str | None = None,
    ) -> None:
        self._of_gpu: Final = "" if gpu is None else f" ({gpu})"
        self._env: Final = {"POLARS_MAX_THREADS": str(threads), **(env or {})}
        self._max_idle: Final = max_idle
        self._max_memory: Final = max_memory
        self._reasons_to_stay: Final[tuple[type[Exception], ...]] = (
            (StaysHereError, UnsendableError) if runs_unsendable_here else (StaysHereError,)
        )
        self._lock = RLock()
        self._idle: list[WorkerProcess] = []
        self._workers: set[WorkerProcess] = set()
        self._closed = False
        self._deaths = 0

    @property
    def worker_count(self) -> int:
        """The number of worker processes."""
        return len(self._workers)

    @property
    def worker_deaths(self) -> int:
        """The number of worker processes that have died while they ran a query."""
        return self._deaths

    def cpu_seconds(self) -> float:
        """Return the processor time of this process and of the workers that live, in seconds."""
        return process_time() + sum(worker.cpu_seconds() for worker in list(self._workers))

    def memory(self) -> int:
        """Return the bytes of memory that the workers have, each for itself."""
        return sum(worker.private_memory() for worker in list(self._workers))

    def run(
        self,
        operation: Operation[T],
        query: Job,
        on_gpu_health: Callable[[Any], None] | None = None,
    ) -> T:
        """
        Run `operation` in a worker; an error has its remote traceback as its cause.

        `on_gpu_health` is called with the worker's reports of the health of its GPU.
        """
        error: BaseException | None = None
        try:
            outcome = self._outcome(operation, query, on_gpu_health)
            if isinstance(outcome, str):
                return run_here(operation, query, outcome)
            kind, content, memory_error = outcome
            error = error_of(kind, content)
            if error is None:
                return content  # type: ignore[no-any-return]
            if memory_error is not None and isinstance(error, KeyboardInterrupt):
                error = memory_error
            raise error
        finally:
            del self, operation, query, error  # see QueryExecutor.run

    def _outcome(
        self,
        operation: Operation[object],
        query: Job,
        on_gpu_health: Callable[[Any], None] | None,
    ) -> tuple[str, Any, QueryMemoryError | None] | str:
        """Return the outcome in a worker, or as a text the reason why the query stays here."""
        call: WorkerCall | None = None
        try:
            if query.is_counted:
                operation, query.meter = counting(operation), SentMeter()
            for _ in range(_MAX_TRIES):
                abort = SerializationAbort()
                # If the query was cancelled before this, no thread will call `abort`: call it now.
                if not query.stop_with(abort):
                    abort()
                by_value = isinstance(operation, Run)
                message = pack(
                    carried(operation, query.context),
                    in_files=True,
                    by_value=by_value,
                    abort=abort,
                )
                try:
                    warn_if_large(query, message.plan_bytes, same_machine=True)
                    worker = self._take()
                except BaseException:
                    message.close()
                    raise
                # A cancellation from now on still calls `abort`, in vain, until `call.run` replaces
                # it. `call.run` finds that the query is done then, and leaves the worker alone.
                call = WorkerCall(worker, query, self._max_memory, on_gpu_health)
                query.place = f"worker {worker.pid}{self._of_gpu}"
                try:
                    kind, content = call.run(message, buffer_of(operation))
                except EOFError:
                    exitcode = self._discard(worker)
                    if call.may_retry(exitcode):
                        continue
                    raise self._replace_dead(worker, exitcode, call, query) from None
                except BaseException:  # such as an interrupt when the program ends
                    self._discard(worker)
                    raise
                self._give_back(worker)
                call.check_sendable(kind)
                return kind, content, call.memory_error
            raise WorkerDiedError(
                f"{_MAX_TRIES} worker processes in a row died before they began a query"
            )
        except self._reasons_to_stay as reason:
            if isinstance(reason, UnsendableError):
                log_once(query, str(reason), logging.WARNING)
            return str(reason)
        finally:
            query.stop_with(None)
            del self, operation, query, call  # see QueryExecutor.run

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
        # First, so that a worker that is given back from now on ends there: this shuts down none
        # that a thread has taken.
        self._closed = True
        # A signal handler may raise between any two lines. Workers that are in both lists then are
        # shut down by `close`, and `_take` discards them; in neither list, they would be lost.
        idle.extend(self._idle)
        self._idle.clear()
        self._workers.difference_update(idle)

    def reset_after_fork(self) -> None:
        """Forget the workers, which are the children of another process."""
        # Another thread of the parent may have held the lock, and changed both collections half: no
        # thread but this one is in the child. `process` closes what the child has of the workers.
        self._lock = RLock()
        self._workers.clear()
        self._idle.clear()

    def _take(self) -> WorkerProcess:
        """Return an idle worker, or a fresh one; it belongs to the calling thread from now on."""
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            # No other thread finds it any more. Where `close` comes now, it leaves this worker
            # alone, and `_give_back` shuts it down.
            if worker is None:
                return self._start()
            if worker.initializer is current() and worker.is_alive():
                return worker
            # Killed by the kernel for want of memory; or started for another initializer.
            self._discard(worker)

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(self._env)
        with self._lock:
            self._workers.add(worker)
        return worker

    def _give_back(self, worker: WorkerProcess) -> None:
        """Make `worker` idle, or replace it if it is not fit for another query."""
        if worker.is_exiting or self._retains_memory(worker):
            with self._lock:
                self._workers.discard(worker)
            shut_down([worker])
            self._refill()
        else:
            self._make_idle(worker)

    def _make_idle(self, worker: WorkerProcess) -> None:
        # With the lock held, so that `close` comes either before, and is seen here; or after, and
        # finds the worker among the idle ones.
        with self._lock:
            if not self._closed and len(self._idle) < self._max_idle:
                self._idle.append(worker)
                return
            self._workers.discard(worker)
        shut_down([worker])

    def _discard(self, worker: WorkerProcess) -> int | None:
        """Kill `worker`, which the thread has taken; return its exit code, if that is known."""
        with self._lock:
            self._workers.discard(worker)
        return worker.kill()

    def _retains_memory(self, worker: WorkerProcess) -> bool:
        """Return whether it keeps memory that would count as that of the next query."""
        if self._max_memory is None:
            return False
        return worker.private_memory() - worker.idle_memory > self._max_memory / 4

    def _refill(self) -> None:
        """Start a worker in place of one that is gone, so that the next query finds it warm."""
        with suppress(OSError, PolarsAsyncError):  # then the next query tries it again
            # Without the lock: `_make_idle` looks again, and ends a worker that is one too many.
            if not self._closed and len(self._idle) < self._max_idle:
                self._make_idle(self._start())

    def _replace_dead(
        self, worker: WorkerProcess, exitcode: int | None, call: WorkerCall, query: Job
    ) -> BaseException:
        """Start a worker in place of one that has died; return the error of its query."""
        if worker.is_ready:  # else the next one might not start, either
            self._refill()
        if call.memory_error is not None:
            return call.memory_error
        if not call.stopped:
            with self._lock:
                self._deaths += 1
        return _death(worker, exitcode, query)


def _death(worker: WorkerProcess, exitcode: int | None, query: Job) -> WorkerDiedError:
    if not worker.is_ready:
        return WorkerDiedError(
            f"the worker process {worker.pid} ended before it was ready, {_describe(exitcode)}: "
            f"what it wrote to stderr may tell why; if not, check that {worker.executable!r} runs",
            exitcode,
            None,
        )
    plan = _plan_of(query)
    what = f"{query.named} ({plan})" if plan else query.named
    message = (
        f"the worker process {worker.pid} died while it ran {what}, {_describe(exitcode)}. The "
        "query is not run again, and a fresh worker has taken the place: "
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


def _describe(exitcode: int | None) -> str:
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
    """Return one short line about the plan of `query`; None if it has no plan."""
    if not query.frames:
        return None
    text = look_at(query.frames[0]).summary
    return text if len(text) <= _PLAN_CHARACTERS else f"{text[:_PLAN_CHARACTERS]}…"
