"""Queries in any ``concurrent.futures.Executor``: a pool of processes, or a cluster."""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import BrokenExecutor, CancelledError
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import polars as pl

from polars_async._runtime import fork
from polars_async._runtime.unpatched import SimpleQueue
from polars_async.errors import ForkedProcessError, PolarsAsyncError, WorkerDiedError, describe
from polars_async.executors import QueryExecutor
from polars_async.executors.carried import bare, carried
from polars_async.executors.exports import export, export_namespaces
from polars_async.executors.large_plans import warn_if_large
from polars_async.executors.main_module import POLARS, ResolvingMain, resolve_namespaces
from polars_async.executors.message import Message
from polars_async.executors.operations import Run
from polars_async.executors.outcomes import error_of, outcome_of, packed_error, unpacked_error
from polars_async.executors.serialization import buffer_of, pack, unpack
from polars_async.executors.staying import StaysHereError, run_here
from polars_async.gpu.offload import report_retries_to

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from polars_async.executors import Job
    from polars_async.executors.main_module import Export, Key
    from polars_async.executors.operations import Operation

    _Retry: TypeAlias = tuple[str, tuple[bytes, str]]
    _Outcome: TypeAlias = tuple[str, Any, list[pl.DataFrame], list[_Retry]]

T = TypeVar("T")


class FuturesExecutor(QueryExecutor):
    """
    Runs queries in an executor of the caller's, as one function each.

    A query that is cancelled or times out is cancelled there as far as that executor can: mostly if
    it has not begun.
    """

    def __init__(self, executor: Executor) -> None:
        _check_unpatched()
        self._executor: Final = executor

    def run(self, operation: Operation[T], query: Job) -> T:
        """Run `operation` there; an error has its remote traceback as its cause."""
        buffer = buffer_of(operation)
        task: bytes | str | None = None
        content: Any = None
        batches: Any = ()
        error: BaseException | None = None
        try:
            _check_unpatched()
            task = _packed(operation, query)
            if isinstance(task, str):
                return run_here(operation, query, task)
            query.place = type(self._executor).__name__
            kind, content, batches, retries = self._outcome(task, query)
            for how, cause in retries:
                query.note_retry(how, unpacked_error(cause))  # type: ignore[arg-type]  # as sent
            if (error := error_of(kind, content)) is not None:
                raise error
            batches.reverse()
            while batches:  # popped one by one, so that memory is free once a batch is consumed
                if buffer is None or buffer.put(batches.pop()):
                    break
            return content  # type: ignore[no-any-return]
        finally:
            # see QueryExecutor.run
            del self, operation, query, buffer, task, content, batches, error

    def _outcome(self, task: bytes, query: Job) -> _Outcome:
        exports = export_namespaces()
        try:
            while True:
                reply = self._reply(task, exports, query)
                outcome: _Outcome = unpack(Message(reply, []))
                if outcome[0] != "missing":
                    return outcome
                # The worker lacked names of this program, and cannot ask for them in the midst of
                # the query. It has them at the next try, which may find that it lacks more.
                keys, error = outcome[1]
                exports |= {key: export(*key) for key in keys}
                if all(exports[key] is None for key in keys):
                    return "error", error, [], []
        finally:
            del self, task, exports, query  # see QueryExecutor.run

    def _reply(self, task: bytes, exports: dict[Key, Export], query: Job) -> bytes:
        """Have `run_task` run `task` there, and return its result."""
        future: Future[bytes] | None = None
        try:
            # dask's own executor gives equal calls one result, unless their arguments differ.
            future = self._executor.submit(run_task, task, pl.__version__, exports, os.urandom(16))
            _follow(future, query)
            return future.result()
        except Exception as error:
            raise _executor_error(error, query) from error
        finally:
            query.stop_with(None)
            if future is not None:
                future.cancel()  # it is done, unless the wait was interrupted, as at exit
            del self, task, exports, query, future  # see QueryExecutor.run


def run_task(task: bytes, version: str, exports: dict[Key, Export], _unique: bytes = b"") -> bytes:
    """
    Run a query in a worker of the executor, and return its packed outcome.

    Parameters
    ----------
    task
        The packed operation of the query.
    version
        The release of Polars that has packed it.
    exports
        The names of the program that the query is known to need.
    """
    batches = _Batches()
    retries: list[_Retry] = []
    missing: list[Key] = []
    may_run_again = True
    if exports:
        resolve_namespaces()

    def load(module: str, name: str) -> Export:
        if module != POLARS and (module, name) not in exports:  # all namespaces are there
            missing.append((module, name))
        return exports.get((module, name))

    def run() -> bytes:
        nonlocal may_run_again
        fork.check()
        with ResolvingMain(load):
            try:
                operation = unpack(Message(task, []), batches)
            except BaseException as error:
                if version == pl.__version__:
                    raise
                raise PolarsAsyncError(
                    f"{_here()} has Polars {pl.__version__}, and cannot read a query of Polars "
                    f"{version}: install the same release everywhere"
                ) from error
            report_retries_to(lambda how, cause: retries.append((how, packed_error(cause))))
            is_call = isinstance(bare(operation), Run)
            may_run_again = not is_call  # what a function does, such as a write, it is to do once
            try:
                result = operation()
            finally:
                report_retries_to(None)
            may_run_again = False  # a query that succeeds does not need what was missing
            reply = "value", result, batches, retries
            return pack(reply, in_files=False, by_value=is_call).data

    kind, content = outcome_of(run, annotate=_add_note)
    if isinstance(content, bytes):
        return content
    if missing and kind == "error" and may_run_again:
        kind, content = "missing", (missing, content)
    try:
        return pack((kind, content, batches, retries), in_files=False).data
    except BaseException as error:  # noqa: BLE001  # such as of a column of Python objects
        return pack(("error", packed_error(error), (), ()), in_files=False).data


def _packed(operation: Operation[object], query: Job) -> bytes | str:
    """Return the packed `operation`, or as a text the reason why it stays here."""
    try:
        by_value = isinstance(operation, Run)
        message = pack(carried(operation, query.context), in_files=False, by_value=by_value)
    except StaysHereError as reason:
        return str(reason)
    warn_if_large(query, message.plan_bytes, same_machine=False)
    return message.data


class _Batches(list[pl.DataFrame]):
    """Collects the batches of a stream, since nothing goes back before the query has ended."""

    def add(self, batch: pl.DataFrame) -> None:
        self.append(batch)

    def put(self, batch: pl.DataFrame) -> bool:
        self.append(batch)
        return False


def _follow(future: Future[Any], query: Job) -> None:
    """Wait until `future` is done; cancel it when the query is cancelled or times out."""
    wakeup: SimpleQueue[None] = SimpleQueue()
    # Both the future and the query wake this thread, whichever comes first. A future that is done
    # by now wakes it at once. A query that is cancelled by now does not call `put`: `stop_with`
    # returns False instead, and there is nothing to wait for.
    future.add_done_callback(lambda _: wakeup.put(None))
    if query.stop_with(partial(wakeup.put, None), for_sure=False):
        wakeup.get()
    if not future.done():
        # So the query was cancelled. On this thread, and not in its callback, which may be called
        # by a signal handler or a loop: dask's `cancel` waits for an event loop of its own.
        future.cancel()
        # Until the future is done: one that cannot be cancelled runs on to its end. If it was done
        # just before `cancel`, its wakeup is in the queue already. If `stop` was called twice, this
        # returns too early, and then `Future.result` waits.
        wakeup.get()


def _add_note(error: BaseException) -> None:
    if isinstance(error, FileNotFoundError):
        error.add_note(f"on {_here()}: files have to be where each worker can see them")
    elif isinstance(error, ForkedProcessError):
        error.add_note(f"on {_here()}: give the executor mp_context=get_context('spawn')")


def _here() -> str:
    return f"the worker process {os.getpid()} on {platform.node()}"


def _executor_error(error: Exception, query: Job) -> PolarsAsyncError:
    """Return the error of a query whose future has raised `error`, or could not be made."""
    what = describe(error)
    distributed = sys.modules.get("distributed")
    killed = () if distributed is None else (distributed.KilledWorker,)
    if isinstance(error, (BrokenExecutor, CancelledError, *killed)):
        return WorkerDiedError(
            f"the executor lost {query.named} ({what}): a worker may have died of it, or the "
            "executor was shut down. Where it is broken for good, as those of concurrent.futures "
            "are, make a new one"
        )
    return PolarsAsyncError(
        f"the executor could not run {query.named} ({what}). It may have been shut down; its "
        "workers need polars-async, and the Polars that this process has"
    )


def _check_unpatched() -> None:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        raise ValueError(
            "gevent.monkey has patched threading, and an executor of concurrent.futures, loky or "
            "dask would wait for ever for its own threads: use executor='processes' or 'threads'"
        )
