"""Queries on the GPU: one at a time in the process, and what it means where one fails there."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from polars_async import _cudf, _native, _upstream
from polars_async._native import RLock, wait_for
from polars_async.breaker import breaker
from polars_async.errors import EngineUnavailableError
from polars_async.events import log
from polars_async.reasons import Reason
from polars_async.resolution import forbids_cpu
from polars_async.support import is_of_the_gpu, operations_of, told, unsupported_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LIBRARIES: Final = sys.stdlib_module_names | {
    *("cuda", "cudf", "cudf_polars", "cudf_streaming", "cupy", "dask", "distributed", "fsspec"),
    *("kvikio", "numba", "numpy", "nvtx", "polars", "polars_async", "pyarrow", "pylibcudf"),
    *("packaging", "pynvml", "rapidsmpf", "ray", "rmm", "toolz", "tornado", "ucxx"),
}
"""Whose code runs where the GPU engine does; all other code there belongs to the query."""
_CAUSES: Final = {
    Reason.CUDF_MISSING: "cudf-polars is not installed",
    Reason.CUDF_BROKEN: "cudf-polars cannot be imported",
    Reason.UNSUPPORTED_QUERY: "it does not support the query",
    Reason.TRANSLATION_FAILED: "it failed to translate the query",
    Reason.OUT_OF_MEMORY: "the memory of the GPU did not suffice",
    Reason.CUDA_ERROR: "CUDA failed",
    Reason.GPU_FAILED: "it failed while the query ran",
    Reason.GPU_RESTS: "the GPU rests for a while, since it kept failing",
}
_OF_THE_GPU: Final = (Reason.OUT_OF_MEMORY, Reason.CUDA_ERROR, Reason.GPU_FAILED)
"""What speaks against the GPU, and not against this one query there."""


class _Turn:
    """
    Whose turn on the GPU it is.

    cudf-polars sets memory resources of the whole process, and puts back what it found, without a
    lock: of two queries at once one would run, or leave the process, with those of the other.
    """

    lock = RLock()

    @classmethod
    def after_fork(cls) -> None:
        cls.lock = RLock()  # a thread that stayed behind may hold the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Turn.after_fork)


class GpuFailure(Exception):  # noqa: N818  # no error to be seen: it says where to go on
    """
    The GPU engine failed where the query need not.

    Attributes
    ----------
    reason
        What kind of failure it was.
    cause
        What the GPU engine raised.
    raised
        What Polars made of it.
    retry
        The work, or what is left of it, for the CPU; set by whoever knows it.
    share
        How much of the work that is, such as ``"2 of 5 frames"``; None for all of it.
    """

    def __init__(self, reason: Reason, cause: Exception, raised: Exception | None = None) -> None:
        super().__init__(reason, cause)
        self.reason = reason
        self.cause = cause
        self.raised = raised or cause
        self.retry: Callable[[], Any] | None = None
        self.share: str | None = None
        if self.raised is not cause:
            self.raised.__cause__ = cause

    def __str__(self) -> str:
        if self.reason is Reason.UNSUPPORTED_QUERY:
            what = "; ".join(map(told, operations_of(self.cause)))
        else:
            what = f"{type(self.cause).__name__}: {' '.join(str(self.cause).split())}"
        return f"{_CAUSES[self.reason]} ({what.removesuffix(': ')})"

    def let_go_of_memory(self) -> None:
        """Drop the tracebacks, whose frames hold what the query had on the GPU."""
        log.debug("a query failed on the GPU", exc_info=self.raised)
        for error in (self, *_chain(self.raised, None)):
            error.__traceback__ = None


def collect_on_gpu(
    lf: pl.LazyFrame, engine: pl.GPUEngine, optimizations: pl.QueryOptFlags
) -> pl.DataFrame:
    """
    Collect `lf` on the GPU, when no other query of the process is there.

    Raises
    ------
    GpuFailure
        The GPU engine failed, and the query may run on the CPU instead. With ``raise_on_fail`` it
        may not: what the engine raised is raised then, as all errors of the query are anyway.
    """
    if _upstream.is_eager(optimizations):
        return engine.collect(lf, optimizations=optimizations)
    turn = _Turn.lock
    wait_for(turn)
    try:
        return _have_the_turn(lf, engine, optimizations)
    finally:
        turn.release()


def _have_the_turn(
    lf: pl.LazyFrame, engine: pl.GPUEngine, optimizations: pl.QueryOptFlags
) -> pl.DataFrame:
    may_fall_back = not forbids_cpu(engine)
    if may_fall_back and (rest := breaker.rest()) is not None:
        raise GpuFailure(Reason.GPU_RESTS, rest.cause)
    try:
        _prepare_thread()
        frame = _collect(lf, engine, optimizations)
    except GpuFailure as caught:
        failure = caught
    else:
        breaker.succeeded()
        return frame
    if may_fall_back:
        failure.let_go_of_memory()
    if failure.reason in _OF_THE_GPU:
        # What the caller gets to see keeps its traceback, and with it all that the query held.
        told = str(failure)
        cause = failure.cause if may_fall_back else EngineUnavailableError(told)
        if (rest := breaker.failed(told, cause)) is not None:
            log.warning("the GPU rests for %g s: %s", rest.seconds, told)
    raise failure if may_fall_back else failure.raised


class _ThisThread(_native.local):
    has_context = False


_this_thread: Final = _ThisThread()


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
    try:
        importlib.import_module(_cudf.MODULE)
    except Exception as error:  # noqa: BLE001  # it has raised more than ImportError
        _cudf.note_import_failure(error)
        missing = isinstance(error, ModuleNotFoundError) and error.name == _cudf.MODULE
        raise GpuFailure(Reason.CUDF_MISSING if missing else Reason.CUDF_BROKEN, error) from None


def _collect(
    lf: pl.LazyFrame, engine: pl.GPUEngine, optimizations: pl.QueryOptFlags
) -> pl.DataFrame:
    translate = _upstream.gpu_callback(engine)
    if translate is None:
        return engine.collect(lf, optimizations=optimizations)
    attempt = _Attempt(translate)
    try:
        return engine.collect(lf, optimizations=optimizations, post_opt_callback=attempt)
    except Exception as error:
        raised, cause, taken = error, attempt.error, attempt.taken
        if cause is None or (taken and _is_of_the_query(cause, attempt.outer)):
            raise
        if not isinstance(cause, Exception):  # Ctrl-C, which Polars makes an error of its own
            raise cause from None
        if isinstance(cause, _LeftToCpuError):
            raised = cause = _why_unsupported(lf, engine, optimizations)
        reason = _reason_of(cause, Reason.GPU_FAILED if taken else Reason.TRANSLATION_FAILED)
        raise GpuFailure(reason, cause, raised) from None


class _LeftToCpuError(NotImplementedError):
    """Ends a query that cudf-polars has left to the CPU without a word."""


class _Attempt:
    """
    Polars' post-optimisation callback, around that of the GPU engine.

    It notes whether the engine took the query, and what it raised: to translate it, or to run it.
    """

    def __init__(self, translate: Callable[..., object]) -> None:
        self._translate = translate
        self.outer = sys.exception()
        """What the caller is about to handle, and has nothing to do with this."""
        self.taken = False
        self.error: BaseException | None = None

    def __call__(self, plan: Any, *duration: Any) -> None:
        try:
            self._translate(_Plan(plan, self), *duration)
            if not self.taken:
                raise _LeftToCpuError  # noqa: TRY301  # to be noted, too
        except BaseException as error:
            self.error = error
            raise

    def take(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Note that the engine runs the query, by `run`, and look out for what that raises."""
        self.taken = True

        def watched(*arguments: Any) -> Any:
            try:
                return run(*arguments)
            except BaseException as error:
                self.error = error
                raise

        return watched


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


def _is_of_the_query(error: BaseException, outer: BaseException | None) -> bool:
    """Tell what would fail on the CPU too, or comes out of the query's own Python."""
    if isinstance(error, pl.exceptions.PolarsError):
        return "GPU engine" not in str(error)  # where cudf-polars says that CUDA is too old
    return isinstance(error, OSError) or any(
        frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES
        for each in _chain(error, outer)
        for frame, _ in walk_tb(each.__traceback__)
    )


def _reason_of(error: Exception, otherwise: Reason) -> Reason:
    if isinstance(error, MemoryError):
        return Reason.OUT_OF_MEMORY
    if isinstance(error, NotImplementedError):
        return Reason.UNSUPPORTED_QUERY if operations_of(error) else Reason.CUDA_ERROR
    if is_of_the_gpu(error) or "cuda" in str(error).lower():
        return Reason.CUDA_ERROR
    return otherwise


def _why_unsupported(
    lf: pl.LazyFrame, engine: pl.GPUEngine, optimizations: pl.QueryOptFlags
) -> Exception:
    """Ask again, since the engine has kept it to itself."""
    error: Exception | None = None
    with suppress(Exception):  # private, so that anything may come of it
        error = unsupported_error(lf, engine, optimizations)
    return error or NotImplementedError("cudf-polars does not tell which")


def _chain(error: BaseException, outer: BaseException | None) -> Iterator[BaseException]:
    """Go from an error to all it came from, up to what was there before."""
    seen: set[int] = {id(outer)}
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        left += (each.__cause__, each.__context__)
        yield each
