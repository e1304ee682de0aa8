"""Queries in any ``concurrent.futures.Executor``: a pool of processes, or a cluster."""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import BrokenExecutor, CancelledError
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import polars as pl

from polars_async._runtime import fork
from polars_async._runtime.unpatched import SimpleQueue
from polars_async.errors import ForkedProcessError, PolarsAsyncError, WorkerDiedError, describe
from polars_async.executors.definitions import added_to_polars, definition
from polars_async.executors.large_plans import warn_if_large
from polars_async.executors.main_module import POLARS, LookingUp, answer_for_polars
from polars_async.executors.outcomes import error_of, outcome_of, packed_error
from polars_async.executors.serialization import Message, buffer_of, pack, unpack
from polars_async.executors.staying import StaysHereError, run_here

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor, Future

    from polars_async.executors import Job
    from polars_async.executors.main_module import Definition, Key
    from polars_async.gpu.status import GpuStatus

T = TypeVar("T")


class FuturesExecutor:
    """
    Somebody else's executor, which runs one function for each query.

    A query that was let go is cancelled as far as the executor can: mostly if it has not begun.
    """

    workers = died = 0  # of its own are known to it alone

    def __init__(self, executor: Executor) -> None:
        _check_unpatched()
        self._executor: Final = executor

    def prepare(self, gpu: GpuStatus) -> int | None:  # noqa: ARG002  # as GpuProcessExecutor
        """Do nothing: a GPU is no other place here."""
        return None

    def run(self, work: Callable[[], T], query: Job) -> T:
        """Run `work` there; what it raises has the other traceback as its cause."""
        buffer = buffer_of(work)
        task: bytes | str | None = None
        found: Any = None
        batches: Any = ()
        failed: BaseException | None = None
        try:
            _check_unpatched()
            task = _packed(work, query)
            if isinstance(task, str):
                return run_here(work, query, task)  # type: ignore[return-value]  # None is for nobody
            kind, found, batches = self._outcome(task, query)
            if (failed := error_of(kind, found)) is not None:
                raise failed
            batches.reverse()
            while batches:  # which holds none that its consumer has let go of
                if buffer is None or buffer.put(batches.pop()):
                    break
            return found  # type: ignore[no-any-return]
        finally:
            # An error's traceback holds this frame.
            del self, work, query, buffer, task, found, batches, failed

    def _outcome(self, task: bytes, query: Job) -> tuple[str, Any, list[pl.DataFrame]]:
        main_module = added_to_polars()
        try:
            while True:
                answer = self._answer(task, main_module, query)
                found: tuple[str, Any, list[pl.DataFrame]] = unpack(Message(answer, []))
                if found[0] != "missing":
                    return found
                # It could not be unpacked, or not all of its expressions, before it began.
                keys, error = found[1]
                main_module |= {key: definition(*key) for key in keys}
                if all(main_module[key] is None for key in keys):
                    return "error", error, []
        finally:
            del self, task, main_module, query  # as above

    def _answer(self, task: bytes, main_module: dict[Key, Definition], query: Job) -> bytes:
        """Send `task`, and wait for what comes back."""
        future: Future[bytes] | None = None
        try:
            # dask's own executor gives equal calls one result, unless told otherwise.
            future = self._executor.submit(
                run_task, task, pl.__version__, main_module, os.urandom(16)
            )
            _follow(future, query)
            return future.result()
        except Exception as error:
            raise _failure(error, query) from error
        finally:
            query.on_cancel(None)
            if future is not None:
                future.cancel()  # the program ends, or there is nothing left to cancel
            del self, task, main_module, query, future  # as above

    def close(self) -> None:
        """Do nothing: the executor is the caller's."""

    reset_after_fork = close


def run_task(
    task: bytes, version: str, main_module: dict[Key, Definition], _unique: bytes = b""
) -> bytes:
    """
    Run a query, and pack what comes of it.

    Parameters
    ----------
    task
        The query, packed up.
    version
        The release of Polars that did so.
    mains
        What it takes from the program that it comes from, as far as that is known.
    """
    batches = _Batches()
    missing: list[Key] = []
    if main_module:
        answer_for_polars()

    def look_up(module: str, name: str) -> Definition:
        if (
            module != POLARS and (module, name) not in main_module
        ):  # all that Polars was given is there
            missing.append((module, name))
        return main_module.get((module, name))

    def work() -> object:
        fork.check()
        with LookingUp(look_up):
            try:
                query = unpack(Message(task, []), batches)
            except BaseException as error:
                if version == pl.__version__:
                    raise
                raise PolarsAsyncError(
                    f"{_here()} has Polars {pl.__version__}, and cannot read a query of Polars "
                    f"{version}: install the same release everywhere"
                ) from error
            return query()

    kind, found = outcome_of(work, noted=_note)
    if missing and kind == "error":  # else it could do without
        kind, found = "missing", (missing, found)
    try:
        return pack((kind, found, batches), in_files=False).data
    except BaseException as error:  # noqa: BLE001  # as of a column of Python objects
        return pack(("error", packed_error(error), ()), in_files=False).data


def _packed(work: Callable[[], object], query: Job) -> bytes | str:
    """Pack `work`, or give the reason why it stays here."""
    try:
        message = pack(work, in_files=False)
    except StaysHereError as reason:
        return str(reason)
    warn_if_large(query, message.plan_bytes, same_machine=False)
    return message.data


class _Batches(list[pl.DataFrame]):
    """In place of the buffer of a stream: nothing goes back before the end."""

    def add(self, batch: pl.DataFrame) -> None:
        self.append(batch)

    def put(self, batch: pl.DataFrame) -> bool:
        self.append(batch)
        return False


def _follow(future: Future[Any], query: Job) -> None:
    """Wait for the end of `future`, which is cancelled when nobody wants `query` any more."""
    told: SimpleQueue[None] = SimpleQueue()
    future.add_done_callback(lambda _: told.put(None))
    if query.on_cancel(partial(told.put, None), for_sure=False):
        told.get()
    if not future.done():
        # On this thread, since to cancel may block: that of dask asks its own event loop.
        future.cancel()
        told.get()


def _note(error: BaseException) -> None:
    if isinstance(error, FileNotFoundError):
        error.add_note(f"on {_here()}: files have to be where each worker can see them")
    elif isinstance(error, ForkedProcessError):
        error.add_note(f"on {_here()}: give the executor mp_context=get_context('spawn')")


def _here() -> str:
    return f"the worker process {os.getpid()} on {platform.node()}"


def _failure(error: Exception, query: Job) -> PolarsAsyncError:
    """Give the error of a query that `error` kept from being run, or from being heard of."""
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
