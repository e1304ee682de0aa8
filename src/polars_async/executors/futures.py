"""Queries in any ``concurrent.futures.Executor``: a pool of processes, or a cluster."""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import BrokenExecutor, CancelledError
from typing import TYPE_CHECKING, Any, Final, TypeVar

import polars as pl

from polars_async._native import allocate_lock
from polars_async.errors import PolarsAsyncError, WorkerDiedError
from polars_async.executors.mains import defined, definition, looked_up
from polars_async.executors.parcels import (
    Parcel,
    buffer_of,
    error_of,
    outcome_of,
    pack,
    packed_error,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor, Future

    from polars_async.gpu import GpuStatus
    from polars_async.query import Query

T = TypeVar("T")


class Futures:
    """
    Somebody else's executor, which runs one function for each query.

    A query that was let go is cancelled as far as the executor can: mostly if it has not begun.
    """

    workers = died = 0  # of its own are known to it alone

    def __init__(self, executor: Executor) -> None:
        self._executor: Final = executor

    def prepare(self, gpu: GpuStatus) -> int | None:  # noqa: ARG002  # as GpuProcesses
        """Do nothing: a GPU is no other place here."""
        return None

    def run(self, work: Callable[[], T], query: Query[Any]) -> T:
        """Run `work` there; what it raises has the other traceback as its cause."""
        buffer = buffer_of(work)
        task = pack(work, in_files=False).data
        try:
            kind, value, batches = self._outcome(task, query)
            if (failed := error_of(kind, value)) is not None:
                raise failed
            for batch in batches:
                if buffer is None or buffer.put(batch):
                    break
            return value  # type: ignore[no-any-return]
        finally:
            query.on_let_go(None)
            del self, work, query, buffer  # an error's traceback holds this frame

    def _outcome(self, task: bytes, query: Query[Any]) -> tuple[str, Any, list[pl.DataFrame]]:
        mains: dict[str, bytes | None] = {}
        while True:
            future = self._executor.submit(run_task, task, pl.__version__, mains)
            if not query.on_let_go(future.cancel):
                future.cancel()
            _await(future)
            query.on_let_go(None)
            try:
                outcome = future.result()
            except Exception as error:
                if not _is_of_the_executor(error):
                    raise
                raise _loss(error, query) from error
            found: tuple[str, Any, list[pl.DataFrame]] = unpack(Parcel(outcome, []))
            if found[0] != "missing":
                return found
            # It could not even be unpacked, so that nothing of it has run yet.
            mains[found[1]] = definition(found[1])

    def close(self) -> None:
        """Do nothing: the executor is the caller's."""

    abandon = close


def run_task(task: bytes, version: str, mains: dict[str, bytes | None]) -> bytes:
    """
    Run a query, and pack what comes of it.

    Parameters
    ----------
    task
        The query, packed up.
    version
        The release of Polars that did so.
    mains
        What it takes from the ``__main__`` of its own process, as far as that is known.
    """
    batches = _Batches()
    missing: list[str] = []

    def look_up(name: str) -> object:
        if name not in mains:
            missing.append(name)
            raise AttributeError(name)
        return defined(name, mains[name])

    def work() -> object:
        try:
            with looked_up(look_up):
                query = unpack(Parcel(task, []), batches)
        except Exception as error:
            if version == pl.__version__:
                raise
            raise PolarsAsyncError(
                f"{_here()} has Polars {pl.__version__}, and cannot read a query of Polars "
                f"{version}: install the same release everywhere"
            ) from error
        return query()

    kind, found = outcome_of(work, noted=_note)
    if missing:
        kind, found = "missing", missing[0]
    try:
        return pack((kind, found, batches), in_files=False).data
    except BaseException as error:  # noqa: BLE001  # as of a column of Python objects
        return pack(("error", packed_error(error), ()), in_files=False).data


class _Batches(list[pl.DataFrame]):
    """In place of the buffer of a stream: nothing goes back before the end."""

    def add(self, batch: pl.DataFrame) -> None:
        self.append(batch)

    def put(self, batch: pl.DataFrame) -> bool:
        self.append(batch)
        return False


def _await(future: Future[Any]) -> None:
    # Not by the future itself, whose lock is green under gevent.
    gate = allocate_lock()
    gate.acquire()
    future.add_done_callback(lambda _: gate.release())
    gate.acquire()


def _note(error: BaseException) -> None:
    if isinstance(error, FileNotFoundError):
        error.add_note(f"on {_here()}: files have to be where each worker can see them")


def _here() -> str:
    return f"the worker process {os.getpid()} on {platform.node()}"


def _is_of_the_executor(error: Exception) -> bool:
    distributed = sys.modules.get("distributed")
    killed = () if distributed is None else (distributed.KilledWorker,)
    return isinstance(error, (BrokenExecutor, CancelledError, *killed))


def _loss(error: Exception, query: Query[Any]) -> WorkerDiedError:
    return WorkerDiedError(
        f"the executor lost {query.named} ({type(error).__name__}: {error}): a worker may have "
        "died of it, or the executor was shut down. Where it is broken for good, as those of "
        "concurrent.futures are, make a new one"
    )
