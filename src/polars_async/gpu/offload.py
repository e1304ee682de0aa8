"""Queries on the GPU, one at a time in the process."""

from __future__ import annotations

import importlib
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn, TypeGuard

from polars_async._runtime import unpatched, upstream
from polars_async._runtime.fork import new_lock
from polars_async._runtime.green import deliver
from polars_async._runtime.logs import log
from polars_async._runtime.nesting import in_gpu_query
from polars_async._runtime.unpatched import wait_for
from polars_async.errors import EngineUnavailableError
from polars_async.gpu import cudf as _cudf
from polars_async.gpu.attempt import LeftToCpuError, is_attempting, run_attempt, why_unsupported
from polars_async.gpu.breaker import breaker
from polars_async.gpu.failure import GpuFailure
from polars_async.gpu.partitions import partitions_of, with_smaller_partitions
from polars_async.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

    from polars_async.gpu.breaker import Breaker

OF_THE_GPU: Final = (Reason.OUT_OF_MEMORY, Reason.CUDA_ERROR)
"""What speaks against the GPU, and not against this one query or the engine."""

_gpu_lock: Final = new_lock()
"""
Held by the thread of the query that is on the GPU.

cudf-polars sets memory resources of the whole process, and later restores the previous ones,
without a lock: of two queries at once one would run with those of the other, or leave them set.
"""

_context_is_poisoned = False


class _ThisThread(unpatched.local):
    has_context = False
    is_wanted: Callable[[], bool] | None = None
    report: Callable[[tuple[str, Exception] | None], object] | None = None
    on_retry: Callable[[str, Exception], object] | None = None


_this_thread: Final = _ThisThread()


class GpuHold:
    """
    A block of code in which this thread holds the GPU: it waits for other queries of the process.

    `is_wanted` returns whether the result of the query is still wanted; `waiting` is entered while
    the thread waits; `on_retry` is as for `report_retries_to`. This is a class and no generator,
    since that would set the traceback of an error that leaves the block, and errors may be frozen.
    """

    def __init__(
        self,
        is_wanted: Callable[[], bool] | None = None,
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
        on_retry: Callable[[str, Exception], object] | None = None,
    ) -> None:
        self._is_wanted = is_wanted
        self._waiting = waiting
        self._outer = _this_thread.on_retry
        self._on_retry = on_retry or self._outer

    def __enter__(self) -> None:
        try:
            with self._waiting():
                wait_for(_gpu_lock)
            _this_thread.is_wanted, _this_thread.on_retry = self._is_wanted, self._on_retry
        except BaseException:
            # Ctrl-C may come before this thread has the lock, or right after: only the lock knows.
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        _this_thread.is_wanted, _this_thread.on_retry = None, self._outer
        if _holds_gpu():
            _gpu_lock.release()


def _holds_gpu() -> bool:
    return _gpu_lock._is_owned()  # type: ignore[attr-defined,no-any-return]  # noqa: SLF001  # as threading uses it


def is_wanted() -> bool:
    """Return whether the query for which this thread holds the GPU is still wanted."""
    ask = _this_thread.is_wanted
    return ask is None or ask()


def collect_on_gpu(
    lf: pl.LazyFrame,
    engine: pl.GPUEngine,
    optimizations: pl.QueryOptFlags,
    *,
    counts: bool = True,
    on_retry: Callable[[str, Exception], object] | None = None,
) -> pl.DataFrame:
    """
    Collect `lf` on the GPU, once this thread holds it.

    A query that runs out of GPU memory is tried once more, with smaller partitions: `on_retry` is
    then called as by `report_retries_to`. With `counts`, a failure counts towards a cooldown of the
    GPU: one, where both tries failed.

    Raises
    ------
    GpuFailure
        The GPU engine failed, and the query may run on the CPU instead. With ``raise_on_fail`` it
        may not: then what the engine raised is raised, as errors of the query itself always are.
    RuntimeError
        A Python function of a query on the GPU calls this.
    """
    if is_attempting():
        refuse_nested()
    if _holds_gpu():
        return _collect_holding_gpu(lf, engine, optimizations, counts=counts)
    if in_gpu_query():
        refuse_nested()
    with GpuHold(on_retry=on_retry):
        return _collect_holding_gpu(lf, engine, optimizations, counts=counts)


def check_outside() -> None:
    """Raise RuntimeError where the caller may be a Python function of a query on the GPU."""
    if is_attempting() or in_gpu_query():
        refuse_nested()


def refuse_nested() -> NoReturn:
    """Raise the RuntimeError of a GPU query that was started by a function of a GPU query."""
    raise RuntimeError(
        "a Python function of a GPU query cannot start another GPU query (it would deadlock): "
        "pass engine='in-memory'"
    )


def report_health_to(report: Callable[[tuple[str, Exception] | None], object]) -> None:
    """
    Call `report` after each GPU query of this thread, in place of counting in this process.

    Its argument is what speaks against the GPU, in words and as an error, or None after a success.
    """
    _this_thread.report = report


def report_retries_to(report: Callable[[str, Exception], object] | None) -> None:
    """
    Call `report` before a query of this thread is tried on the GPU once more; None: log it instead.

    Its arguments tell how, and why, in words, and the error of the first try.
    """
    _this_thread.on_retry = report


def count_failure(health: Breaker, text: str, cause: Exception, generation: object) -> None:
    """Count a failure that speaks against a GPU."""
    if (cooldown := health.failed(text, cause, generation)) is not None:
        gpu = "the GPU" if health.index is None else f"GPU {health.index}"
        deliver(
            partial(log.warning, "%s is in a cooldown of %g s: %s", gpu, cooldown.seconds, text)
        )


def context_is_poisoned() -> bool:
    """Return whether CUDA has failed in this process, after which every query may fail."""
    return _context_is_poisoned


def _note_poisoned_context() -> None:
    global _context_is_poisoned  # noqa: PLW0603  # a fact about the process
    _context_is_poisoned = True


def _collect_holding_gpu(
    lf: pl.LazyFrame, engine: pl.GPUEngine, optimizations: pl.QueryOptFlags, *, counts: bool
) -> pl.DataFrame:
    may_fall_back = not upstream.forbids_cpu(engine)
    reports = _this_thread.report is not None
    if may_fall_back and not reports and (cooldown := breaker.cooldown()) is not None:
        raise GpuFailure(Reason.GPU_COOLDOWN, cooldown.cause)
    generation, outer = breaker.generation, sys.exception()
    outcome: pl.DataFrame | GpuFailure | None = None
    try:
        outcome = _try(lf, engine, optimizations)
        if _is_worth_a_second_try(outcome):
            outcome = _try_again(outcome, lf, engine, optimizations, outer)
        if not isinstance(outcome, GpuFailure):
            _count_success(generation)
            return outcome
        if may_fall_back:
            outcome.drop_tracebacks(outer)
        if outcome.reason is Reason.CUDA_ERROR:
            _note_poisoned_context()
        if counts and outcome.reason in OF_THE_GPU:
            # With raise_on_fail the caller gets the error itself, whose traceback holds the query's
            # memory: the breaker must not keep that.
            text = str(outcome)
            cause = outcome.cause if may_fall_back else EngineUnavailableError(text)
            _count_failure(text, cause, generation)
        raise outcome if may_fall_back else outcome.raised
    finally:
        del outcome  # a failure's traceback holds this frame, and so would hold all of the query


def _try(
    lf: pl.LazyFrame,
    engine: pl.GPUEngine,
    optimizations: pl.QueryOptFlags,
    *,
    is_second: bool = False,
) -> pl.DataFrame | GpuFailure:
    """Try a query on the GPU once; return the failure for which the query is not to blame."""
    failure: GpuFailure | None = None
    try:
        try:
            _prepare_thread()
            return run_attempt(lf, engine, optimizations, is_second=is_second)
        except GpuFailure as caught:
            failure = caught
        if isinstance(failure.cause, LeftToCpuError):
            return why_unsupported(lf, engine, optimizations)
        return failure
    finally:
        del failure  # as above


def _is_worth_a_second_try(outcome: pl.DataFrame | GpuFailure) -> TypeGuard[GpuFailure]:
    return (
        isinstance(outcome, GpuFailure) and outcome.reason is Reason.OUT_OF_MEMORY and is_wanted()
    )


def _try_again(
    first: GpuFailure,
    lf: pl.LazyFrame,
    engine: pl.GPUEngine,
    optimizations: pl.QueryOptFlags,
    outer: BaseException | None,
) -> pl.DataFrame | GpuFailure:
    """Try a query once more, with smaller partitions, after it has run out of GPU memory."""
    smaller = with_smaller_partitions(engine)
    if smaller is None:
        return first
    # With raise_on_fail, too: the frames of the first try hold the memory that the second needs.
    first.drop_tracebacks(outer)
    first.__traceback__ = None
    how = f"in a second try with smaller partitions ({partitions_of(smaller)})"
    (_this_thread.on_retry or log_retry)(f"{how}, since {first}", first.cause)
    if not is_wanted():
        return first
    outcome = _try(lf, smaller, optimizations, is_second=True)
    try:
        return _of_both(first, outcome, how) if isinstance(outcome, GpuFailure) else outcome
    finally:
        del outcome  # a frame of its traceback holds this frame


def _of_both(first: GpuFailure, second: GpuFailure, how: str) -> GpuFailure:
    """Return the failure of a query that was tried twice."""
    # What says nothing of the GPU is due to the second try alone, such as an option that this
    # cudf-polars does not know.
    failure = second if second.reason in OF_THE_GPU else first
    failure.both_tries = (
        f"{first}, nor did it {how}"
        if second.reason is Reason.OUT_OF_MEMORY
        else f"{first}, and {how} {second}"
    )
    with suppress(Exception):  # an error may be frozen
        failure.raised.add_note(f"polars-async has tried the query twice: {failure}")
    return failure


def log_retry(how: str, _cause: Exception | None = None) -> None:
    """Log that a query of no collector is tried on the GPU once more."""
    deliver(partial(log.warning, "a query runs on the GPU %s", how))


def _count_success(generation: object) -> None:
    if _this_thread.report is None:
        breaker.succeeded(generation)
    else:
        _this_thread.report(None)


def _count_failure(text: str, cause: Exception, generation: object) -> None:
    if _this_thread.report is None:
        count_failure(breaker, text, cause, generation)
    else:
        _this_thread.report((text, cause))


def _prepare_thread() -> None:
    """Import cudf-polars, and make sure that this thread has a CUDA context."""
    _import_cudf_polars()
    if not _this_thread.has_context:
        _this_thread.has_context = True
        # cudf-polars makes one when it runs a query, but needs it earlier to translate some
        # (NVIDIA/cudf#24156). Where this fails, the query will fail too, and say so.
        with suppress(Exception):
            importlib.import_module("cuda.bindings.runtime").cudaFree(0)


def _import_cudf_polars() -> None:
    generation = breaker.generation
    try:
        importlib.import_module(_cudf.MODULE)
    except Exception as error:  # noqa: BLE001  # it has raised more than ImportError
        if breaker.generation is generation:
            _cudf.note_import_failure(error)
        missing = isinstance(error, ModuleNotFoundError) and error.name == _cudf.MODULE
        raise GpuFailure(Reason.CUDF_MISSING if missing else Reason.CUDF_BROKEN, error) from None
