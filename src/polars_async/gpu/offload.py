"""Queries on the GPU, one at a time in the process."""

from __future__ import annotations

import importlib
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

import polars as pl

from polars_async._runtime import unpatched, upstream
from polars_async._runtime.fork import new_lock
from polars_async._runtime.green import deliver
from polars_async._runtime.logs import log
from polars_async._runtime.nesting import in_gpu_query
from polars_async._runtime.unpatched import wait_for
from polars_async.errors import EngineUnavailableError
from polars_async.gpu import cudf as _cudf
from polars_async.gpu.breaker import breaker
from polars_async.gpu.failure import GpuFailure, is_of_the_query, reason_of
from polars_async.gpu.support import unsupported_error
from polars_async.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async.gpu.breaker import Breaker

OF_THE_GPU: Final = (Reason.OUT_OF_MEMORY, Reason.CUDA_ERROR)
"""What speaks against the GPU, and not against this one query or the engine."""


_gpu_lock: Final = new_lock()
"""
Held by the thread of the query that is on the GPU.

cudf-polars sets memory resources of the whole process, and puts back what it found, without a lock:
of two queries at once one would run, or leave the process, with those of the other.
"""


class _Context:
    is_poisoned = False


class _ThisThread(unpatched.local):
    has_context = False
    attempt: _Attempt | None = None
    is_wanted: Callable[[], bool] | None = None
    report: Callable[[tuple[str, Exception] | None], object] | None = None


_this_thread: Final = _ThisThread()


class GpuTurn:
    """
    Wait until no other query of the process is on the GPU, and keep others off it.

    `is_wanted` tells whether the result of the query is still wanted, and `waiting` is entered for
    as long as it waits. It is a class, since a generator in its place would set the traceback of an
    error that comes through, which may be frozen.
    """

    def __init__(
        self,
        is_wanted: Callable[[], bool] | None = None,
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._is_wanted = is_wanted
        self._waiting = waiting

    def __enter__(self) -> None:
        try:
            with self._waiting():
                wait_for(_gpu_lock)
            _this_thread.is_wanted = self._is_wanted
        except BaseException:  # Ctrl-C may come before the lock is this thread's, or after
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        _this_thread.is_wanted = None
        if _has_gpu():
            _gpu_lock.release()


def _has_gpu() -> bool:
    return _gpu_lock._is_owned()  # type: ignore[attr-defined,no-any-return]  # noqa: SLF001  # as threading uses it


def is_wanted() -> bool:
    """Return whether the query that has the GPU on this thread is still wanted."""
    ask = _this_thread.is_wanted
    return ask is None or ask()


def collect_on_gpu(
    lf: pl.LazyFrame,
    engine: pl.GPUEngine,
    optimizations: pl.QueryOptFlags,
    *,
    counts: bool = True,
) -> pl.DataFrame:
    """
    Collect `lf` on the GPU, when it is the turn of this thread.

    `counts` tells whether a failure counts towards a rest of the GPU.

    Raises
    ------
    GpuFailure
        The GPU engine failed, and the query may run on the CPU instead. With ``raise_on_fail`` it
        may not: what the engine raised is raised then, as all errors of the query are anyway.
    RuntimeError
        A Python function of a query on the GPU asks for it.
    """
    if _this_thread.attempt is not None:
        refuse_nested()
    if _has_gpu():
        return _have_the_turn(lf, engine, optimizations, counts=counts)
    if in_gpu_query():
        refuse_nested()
    with GpuTurn():
        return _have_the_turn(lf, engine, optimizations, counts=counts)


def check_outside() -> None:
    """Raise RuntimeError where a query on the GPU may be what asks for another one there."""
    if _this_thread.attempt is not None or in_gpu_query():
        refuse_nested()


def refuse_nested() -> NoReturn:
    """Raise the RuntimeError of a query that would wait for the one that asks for it."""
    raise RuntimeError(
        "a query on the GPU asks for another one there, which would wait for it: name another "
        "engine, such as engine='in-memory'"
    )


def report_health_to(report: Callable[[tuple[str, Exception] | None], object]) -> None:
    """
    Have `report` called, and nothing counted, for each query that this thread has on the GPU.

    It is given what speaks against the GPU, in words and as an error; None where the query is done.
    """
    _this_thread.report = report


def count_failure(health: Breaker, text: str, cause: Exception, generation: object) -> None:
    """Count a failure that speaks against a GPU."""
    if (cooldown := health.failed(text, cause, generation)) is not None:
        gpu = "the GPU" if health.index is None else f"GPU {health.index}"
        deliver(partial(log.warning, "%s rests for %g s: %s", gpu, cooldown.seconds, text))


def context_is_poisoned() -> bool:
    """Tell whether CUDA has failed in this process, after which it may fail with all that comes."""
    return _Context.is_poisoned


def note_error_of_query(error: BaseException) -> None:
    """Note that `error`, on this thread, is of the query; for `polars_async.testing`."""
    if _this_thread.attempt is not None:
        _this_thread.attempt.of_query = error


def _have_the_turn(
    lf: pl.LazyFrame, engine: pl.GPUEngine, optimizations: pl.QueryOptFlags, *, counts: bool
) -> pl.DataFrame:
    may_fall_back = not upstream.forbids_cpu(engine)
    reports = _this_thread.report is not None
    if may_fall_back and not reports and (cooldown := breaker.cooldown()) is not None:
        raise GpuFailure(Reason.GPU_COOLDOWN, cooldown.cause)
    failure: GpuFailure | None = None
    generation, outer = breaker.generation, sys.exception()
    try:
        try:
            _prepare_thread()
            frame = _collect(lf, engine, optimizations)
        except GpuFailure as caught:
            failure = caught
        else:
            _count_success(generation)
            return frame
        if isinstance(failure.cause, _LeftToCpuError):
            failure = _why_unsupported(lf, engine, optimizations)
        if may_fall_back:
            failure.let_go_of_memory(outer)
        if failure.reason is Reason.CUDA_ERROR:
            _Context.is_poisoned = True
        if counts and failure.reason in OF_THE_GPU:
            # What the caller gets to see keeps its traceback, and with it what the query held.
            text = str(failure)
            cause = failure.cause if may_fall_back else EngineUnavailableError(text)
            _count_failure(text, cause, generation)
        raise failure if may_fall_back else failure.raised
    finally:
        del failure  # which its own traceback would hold, and all of the query with it


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
    """Import cudf-polars, and see to it that this thread has a context of CUDA."""
    _import_cudf_polars()
    if not _this_thread.has_context:
        _this_thread.has_context = True
        # cudf-polars makes one when it runs a query, but needs it to translate some (NVIDIA/cudf
        # 24156). Where it fails, so will the query.
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


def _collect(
    lf: pl.LazyFrame, engine: pl.GPUEngine, optimizations: pl.QueryOptFlags
) -> pl.DataFrame:
    translate = upstream.gpu_callback(engine)
    if translate is None:
        return engine.collect(lf, optimizations=optimizations)
    attempt = _this_thread.attempt = _Attempt(translate)
    try:
        return engine.collect(lf, optimizations=optimizations, post_opt_callback=attempt)
    except Exception as error:  # noqa: BLE001  # it is judged there
        raise attempt.judged(error) from None
    finally:
        _this_thread.attempt = None
        attempt.error = attempt.of_query = None  # as their tracebacks hold this frame


class _LeftToCpuError(NotImplementedError):
    """Ends a query that cudf-polars has left to the CPU without a word."""


class _Attempt:
    """
    Polars' post-optimisation callback, around that of the GPU engine.

    It notes whether the engine took the query, and what it raised: to translate it, or to run it.
    """

    def __init__(self, translate: Callable[..., object]) -> None:
        self._translate = translate
        self._outer = sys.exception()  # has nothing to do with this
        self._taken = False
        self.error: BaseException | None = None
        """What the engine has raised."""
        self.of_query: BaseException | None = None
        """The same where the query is to blame for it."""

    def __call__(self, plan: Any, *duration: Any) -> None:
        try:
            self._translate(_Plan(plan, self), *duration)
            if not self._taken:
                raise _LeftToCpuError  # noqa: TRY301  # to be noted, too
        except BaseException as error:
            self.error = error
            raise

    def take(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Note that the engine runs the query, by `run`, and look out for what that raises."""
        self._taken = True

        def watched(*arguments: Any) -> Any:
            try:
                return run(*arguments)
            except BaseException as error:
                self.error = error
                # Here, where the traceback has no frame of the caller's.
                if is_of_the_query(error, self._outer):
                    self.of_query = error
                raise

        return watched

    def judged(self, raised: Exception) -> BaseException:
        """Give what to raise for what Polars `raised`: that, or a GpuFailure."""
        cause = self.error
        if cause is None or cause is self.of_query:
            return raised
        if not isinstance(cause, Exception):  # Ctrl-C, which Polars makes an error of its own
            return cause
        if isinstance(cause, _LeftToCpuError):
            return GpuFailure(Reason.UNSUPPORTED_QUERY, cause)
        otherwise = Reason.GPU_FAILED if self._taken else Reason.TRANSLATION_FAILED
        return GpuFailure(reason_of(cause, otherwise), cause, raised)


class _Plan:
    """Polars' plan, as the GPU engine sees it."""

    def __init__(self, plan: Any, attempt: _Attempt) -> None:
        self._plan = plan
        self._attempt = attempt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)

    def set_udf(self, run: Callable[..., Any], *options: Any) -> None:
        """Have Polars call `run` in place of the plan, which is how the engine takes a query."""
        self._plan.set_udf(self._attempt.take(run), *options)


def _why_unsupported(
    lf: pl.LazyFrame, engine: pl.GPUEngine, optimizations: pl.QueryOptFlags
) -> GpuFailure:
    """Ask again, since the engine has kept it to itself."""
    error: Exception | None = None
    with suppress(Exception, pl.exceptions.PanicException):  # private: anything may come of it
        error = unsupported_error(lf, engine, optimizations)
    error = error or NotImplementedError("cudf-polars does not tell which")
    return GpuFailure(reason_of(error, Reason.UNSUPPORTED_QUERY), error)
