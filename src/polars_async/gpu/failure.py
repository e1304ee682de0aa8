"""Failures of queries on the GPU: of what kind they are, and whether the query is to blame."""

from __future__ import annotations

import logging
import re
import sys
from functools import partial
from traceback import format_exception, walk_tb
from typing import TYPE_CHECKING, Final

import polars as pl

from polars_async._runtime.green import deliver
from polars_async._runtime.logs import log
from polars_async.errors import describe
from polars_async.gpu.support import describe_operation, is_of_the_gpu, operations_of, underlying
from polars_async.reasons import Diagnosis, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIBRARIES: Final = sys.stdlib_module_names | {
    *("cuda", "cudf", "cudf_polars", "cudf_streaming", "cupy", "dask", "distributed", "fsspec"),
    *("kvikio", "numba", "numpy", "nvtx", "polars", "polars_async", "pyarrow", "pylibcudf"),
    *("packaging", "pynvml", "rapidsmpf", "ray", "rmm", "toolz", "tornado", "ucxx"),
}
"""The packages whose code runs as part of the GPU engine; all other code belongs to the query."""
_DIAGNOSES: Final = {
    diagnosis.reason: diagnosis
    for diagnosis in (
        Diagnosis(Reason.CUDF_MISSING, "cudf-polars is not installed", "install cudf-polars"),
        Diagnosis(Reason.CUDF_BROKEN, "cudf-polars cannot be imported", "reinstall cudf-polars"),
        Diagnosis(
            Reason.UNSUPPORTED_QUERY,
            "it does not support the query",
            "polars_async.gpu_support tells so beforehand",
        ),
        Diagnosis(
            Reason.TRANSLATION_FAILED,
            "it failed to translate the query",
            "polars_async.gpu_support tells more, and cudf-polars' developers may want to know",
        ),
        Diagnosis(
            Reason.OUT_OF_MEMORY,
            "the memory of the GPU did not suffice",
            "ask for fewer rows or columns at once, or for the streaming engine",
        ),
        Diagnosis(
            Reason.CUDA_ERROR,
            "CUDA failed",
            "look into nvidia-smi and the kernel's log for the cause",
        ),
        Diagnosis(
            Reason.GPU_FAILED,
            "it failed while the query ran",
            "cudf-polars' developers may want to know",
        ),
        Diagnosis(
            Reason.GPU_COOLDOWN,
            "the GPU is in a cooldown, since it kept failing",
            "it is tried again after that",
        ),
    )
}
_CUDA_ERROR: Final = re.compile(r"\bcudaError[A-Z]\w*")
_NO_MEMORY: Final = "cudaErrorMemoryAlloc"
"""How the name of CUDA's error begins where no memory is left."""


class GpuFailure(Exception):  # noqa: N818  # no error for users: it leads to the fallback
    """
    The GPU engine failed at a query that may succeed on the CPU.

    Attributes
    ----------
    reason
        The kind of failure.
    cause
        The error that the GPU engine raised.
    raised
        The error that Polars raised for it.
    partial_results
        For several frames, the results of those that succeeded, by their numbers; else None.
    remaining
        How many frames failed, in words, such as ``"2 of 5 frames"``; else None.
    both_tries
        How it failed, in words, if it was tried twice; else None.
    """

    def __init__(self, reason: Reason, cause: Exception, raised: Exception | None = None) -> None:
        super().__init__(reason, cause)
        self.reason = reason
        self.cause = cause
        self.raised = raised or cause
        self.partial_results: dict[int, pl.DataFrame] | None = None
        self.remaining: str | None = None
        self.both_tries: str | None = None
        if self.raised is not cause:
            self.raised.__cause__ = cause

    def __str__(self) -> str:
        if self.both_tries is not None:
            return self.both_tries
        if self.reason is Reason.UNSUPPORTED_QUERY:
            details = "; ".join(map(describe_operation, operations_of(self.cause)))
        else:
            details = describe(next(_leaves(self.cause)))
        return f"{_DIAGNOSES[self.reason].cause} ({details})"

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return _DIAGNOSES[self.reason].remedy

    def drop_tracebacks(self, outer: BaseException | None) -> None:
        """Drop the tracebacks, whose frames hold the memory of the query on the GPU."""
        if log.isEnabledFor(logging.DEBUG):
            # As text, since some log handlers keep the arguments of a record.
            text = "".join(format_exception(self.raised))
            deliver(partial(log.debug, "a query failed on the GPU\n%s", text))
        for error in _chain(self.raised, outer):
            error.__traceback__ = None
            for each in underlying(error):  # they are not in the chain
                each.__traceback__ = None


def is_of_the_query(error: BaseException, outer: BaseException | None) -> bool:
    """
    Return whether `error` would occur on the CPU too, or comes from Python functions of the query.

    `outer` is the error that was being handled already when the query began.
    """
    for each in _chain(error, outer):
        if isinstance(each, pl.exceptions.PolarsError):
            return "GPU engine" not in str(each)  # so cudf-polars says that CUDA is too old
        if _is_of_the_system(each):
            return True
        for frame, _ in walk_tb(each.__traceback__):
            if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
                return True
    return False


def _is_of_the_system(error: BaseException) -> bool:
    """Return whether `error` is about a file, and not about a connection of the engine."""
    return (
        isinstance(error, OSError)
        and not isinstance(error, (ConnectionError, TimeoutError))
        and type(error).__module__ == "builtins"
    )


def reason_of(error: Exception, otherwise: Reason) -> Reason:
    """Return the kind of failure that `error` is, or `otherwise` if it does not show that."""
    if isinstance(error, NotImplementedError):
        return Reason.UNSUPPORTED_QUERY if operations_of(error) else Reason.CUDA_ERROR
    for each in _leaves(error):
        if isinstance(each, MemoryError) and not _names_other_cuda_error(each):
            return Reason.OUT_OF_MEMORY
        if is_of_the_gpu(each) or _CUDA_ERROR.search(describe(each)):
            return Reason.CUDA_ERROR
    return otherwise


def _names_other_cuda_error(error: MemoryError) -> bool:
    """Return whether `error` is about another error of CUDA, at which an allocation has failed."""
    names = _CUDA_ERROR.findall(describe(error))
    return bool(names) and not any(name.startswith(_NO_MEMORY) for name in names)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors of a group, and of groups in it, or any other error itself."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


def _chain(error: BaseException, outer: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its causes and contexts, and errors in groups, but for `outer` and beyond."""
    seen: set[int] = {id(outer)}
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        left += (each.__cause__, each.__context__)
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions
        yield each
