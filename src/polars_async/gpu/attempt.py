"""One attempt of the GPU engine at a query: whether the engine took it, and what it raised."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from polars_async._runtime import unpatched, upstream
from polars_async.gpu.failure import GpuFailure, is_of_the_query, reason_of
from polars_async.gpu.support import unsupported_error
from polars_async.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable


class LeftToCpuError(NotImplementedError):
    """Ends a query that cudf-polars has left to the CPU without an error of its own."""


class _Attempt:
    """
    Polars' post-optimisation callback, around that of the GPU engine.

    It records whether the engine took the query, and what the engine raised, while it translated
    the query or while it ran it.
    """

    def __init__(self, translate: Callable[..., object], *, is_second: bool) -> None:
        self._translate = translate
        self.is_second = is_second
        self._outer = sys.exception()  # that the caller was handling already: not of this query
        self._taken = False
        self.error: BaseException | None = None
        """What the engine has raised."""
        self.error_of_query: BaseException | None = None
        """The same where the query is to blame for it."""

    def __call__(self, plan: Any, *duration: Any) -> None:
        try:
            self._translate(_Plan(plan, self), *duration)
            if not self._taken:
                raise LeftToCpuError  # noqa: TRY301  # to be recorded, too
        except BaseException as error:
            self.error = error
            raise

    def take(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Record that the engine takes the query; return `run`, recording what it raises."""
        self._taken = True

        def recorded(*arguments: Any) -> Any:
            try:
                return run(*arguments)
            except BaseException as error:
                self.error = error
                # Judged here, where the traceback has no frame of the caller's code.
                if is_of_the_query(error, self._outer):
                    self.error_of_query = error
                raise

        return recorded

    def judged(self, raised: Exception) -> BaseException:
        """Return the error to raise in place of `raised`, which is Polars': that, or a failure."""
        cause = self.error
        if cause is None or cause is self.error_of_query:
            return raised
        if not isinstance(cause, Exception):  # Ctrl-C, which Polars replaces by its own error
            return cause
        if isinstance(cause, LeftToCpuError):
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
        """Have Polars call `run` in place of the plan: so the engine takes a query."""
        self._plan.set_udf(self._attempt.take(run), *options)


class _ThisThread(unpatched.local):
    attempt: _Attempt | None = None


_this_thread: Final = _ThisThread()


def is_attempting() -> bool:
    """Return whether an attempt is running on this thread."""
    return _this_thread.attempt is not None


def is_second_try() -> bool:
    """Return whether the attempt on this thread is a query's second; for `polars_async.testing`."""
    return _this_thread.attempt is not None and _this_thread.attempt.is_second


def note_error_of_query(error: BaseException) -> None:
    """Record that the query is to blame for `error` on this thread; for `polars_async.testing`."""
    if _this_thread.attempt is not None:
        _this_thread.attempt.error_of_query = error


def run_attempt(
    lf: pl.LazyFrame,
    engine: pl.GPUEngine,
    optimizations: pl.QueryOptFlags,
    *,
    is_second: bool = False,
) -> pl.DataFrame:
    """Collect `lf` with the GPU engine; raise GpuFailure where the query is not to blame."""
    translate = upstream.gpu_callback(engine)
    if translate is None:
        return engine.collect(lf, optimizations=optimizations)
    running = _this_thread.attempt = _Attempt(translate, is_second=is_second)
    try:
        return engine.collect(lf, optimizations=optimizations, post_opt_callback=running)
    except Exception as error:  # noqa: BLE001  # it is judged there
        raise running.judged(error) from None
    finally:
        _this_thread.attempt = None
        running.error = running.error_of_query = None  # as their tracebacks hold this frame


def why_unsupported(
    lf: pl.LazyFrame, engine: pl.GPUEngine, optimizations: pl.QueryOptFlags
) -> GpuFailure:
    """Return the failure of a query that was left to the CPU: ask cudf-polars for the reason."""
    error: Exception | None = None
    with suppress(Exception, pl.exceptions.PanicException):  # a private API may raise anything
        error = unsupported_error(lf, engine, optimizations)
    error = error or NotImplementedError("cudf-polars does not tell which")
    return GpuFailure(reason_of(error, Reason.UNSUPPORTED_QUERY), error)
