"""Whether the GPU engine could run a query, according to cudf-polars' own translator."""

from __future__ import annotations

import enum
import importlib
import os
import re
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

import polars as pl

from polars_async._runtime import upstream
from polars_async._runtime.arguments import check_frame
from polars_async.errors import describe, one_line
from polars_async.gpu import cudf as _cudf
from polars_async.reasons import Diagnosis, Reason

EXECUTOR_VARIABLE: Final = "CUDF_POLARS__EXECUTOR"

_MISSING: Final = Diagnosis(
    Reason.CUDF_MISSING,
    "cudf-polars is not installed",
    "install polars-async[gpu-cu13] or polars-async[gpu-cu12], with a Polars that it supports",
)
_TRY: Final = "run the query with GPUEngine(raise_on_fail=True) to see"
_ANY_SIZE: Final = 2**33
_ASKS_THE_GPU: Final = ("cuda", "pynvml", "rmm")
_OF_THE_GPU: Final = re.compile(r"\b(CUDA|RMM|NVML)\b")


class Support(enum.StrEnum):
    """The three answers of `gpu_support`."""

    YES = "yes"
    """The GPU engine supports all of the query."""
    NO = "no"
    """The GPU engine does not support at least one operation."""
    UNKNOWN = "unknown"
    """cudf-polars could not be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSupport:
    """
    Whether the GPU engine could run a query.

    Compare its `answer`; ``bool(support)`` is not supported, since the answer may be unknown.

    Attributes
    ----------
    answer
        ``"yes"``, ``"no"`` or ``"unknown"``.
    operations
        The operations that cudf-polars does not support, in its own words; empty unless the answer
        is no.
    reason
        Why the answer is no or unknown; None if it is yes.
    message
        The same in one sentence that a person can act on.
    """

    answer: Support
    operations: tuple[str, ...] = ()
    reason: Reason | None = None
    message: str

    def __str__(self) -> str:
        return one_line(f"{self.answer}: {self.message}")

    def __repr__(self) -> str:
        return f"<GpuSupport: {self}>"

    def __bool__(self) -> NoReturn:
        """Raise TypeError."""
        raise TypeError(
            "a GpuSupport is neither true nor false, since it may be unknown: compare its answer, "
            "as in gpu_support(lf).answer == 'yes'"
        )


def gpu_support(
    lf: pl.LazyFrame,
    *,
    engine: Literal["gpu"] | pl.Engine = "gpu",
    optimizations: pl.QueryOptFlags = pl.QueryOptFlags(),  # noqa: B008  # as in Polars
) -> GpuSupport:
    """
    Return whether the GPU engine could run a query, without running it.

    cudf-polars translates the optimised plan, as it does before it runs one. That needs no GPU and
    no driver, but for a few operations such as joins by inequality; `gpu_status` returns whether a
    GPU is usable here. A yes is no promise that the data fit into the memory of the GPU.

    The first call imports cudf-polars, which takes half a second or more; no other function does
    that before a query runs on the GPU. Later calls take about a millisecond, and longer where
    Polars has to open files for their schema. To keep a loop free, call it with
    ``asyncio.to_thread``. Polars calls a UDF of unknown ``return_dtype`` to learn its type, as it
    does for ``collect_schema``.

    Parameters
    ----------
    lf
        The query.
    engine
        ``"gpu"`` or a ``pl.GPUEngine`` with options.
    optimizations
        The optimisations with which the query would run.

    Returns
    -------
    GpuSupport

    Raises
    ------
    TypeError
        `lf` is no LazyFrame.
    ValueError
        `engine` is no GPU engine.
    polars.exceptions.PolarsError
        The query itself is wrong, as ``collect`` would find before it runs.

    Examples
    --------
    >>> import polars as pl
    >>> import polars_async as pa
    >>> support = pa.gpu_support(pl.LazyFrame({"a": [1, 2]}).map_batches(lambda df: df))
    >>> support.answer, support.operations  # doctest: +SKIP
    (<Support.NO: 'no'>, ('opaque python mapfunction',))
    """
    check_frame(lf)
    gpu = _gpu_engine(engine)
    # It raises the query's own errors on any host, and opens files without the GIL.
    lf.collect_schema()
    cudf_polars = _cudf.find_cudf_polars()
    diagnosis = cudf_polars.diagnosis or (None if cudf_polars.installed else _MISSING)
    if diagnosis is not None:
        return _unknown(diagnosis)
    try:
        module = importlib.import_module(_cudf.MODULE)
    except Exception as error:  # noqa: BLE001  # it has raised more than ImportError
        _cudf.note_import_failure(error)
        return _unknown(_cudf.diagnose_import(cudf_polars))
    try:
        unsupported = _translation_error(module, lf, optimizations, gpu)
    except (Exception, pl.exceptions.PanicException) as error:  # noqa: BLE001  # a private API
        return _unknown(_diagnose_translation(error, cudf_polars))
    return _judged(unsupported)


def unsupported_error(
    lf: pl.LazyFrame, engine: pl.GPUEngine, optimizations: pl.QueryOptFlags
) -> Exception | None:
    """
    Return cudf-polars' own error for a query that it does not support, None for one that it does.

    Parameters
    ----------
    lf
        The query.
    engine, optimizations
        The engine and the optimisations with which it ran.

    Raises
    ------
    Exception
        Of any kind, since this imports cudf-polars, and uses private functions of it and of Polars.
    """
    module = importlib.import_module(_cudf.MODULE)
    return _translation_error(module, lf, optimizations, engine)


def _gpu_engine(engine: object) -> pl.GPUEngine:
    if isinstance(engine, pl.GPUEngine):
        return engine
    if isinstance(engine, str) and engine == "gpu":
        return pl.GPUEngine()
    raise ValueError(f"engine must be 'gpu' or a polars.GPUEngine object, got {engine!r}")


def _translation_error(
    module: Any, lf: pl.LazyFrame, optimizations: pl.QueryOptFlags, engine: pl.GPUEngine
) -> Exception | None:
    def translate(plan: object) -> tuple[object]:
        translator = module.Translator(plan, _without_a_device(engine))
        translator.translate_ir()
        return (translator.unsupported_operations_error(),)

    answer = upstream.ask_optimized_plan(lf, optimizations, translate)
    if answer is None:
        raise NotImplementedError("Polars hands out its plans no more")
    (error,) = answer
    if error is None or isinstance(error, Exception):
        return error
    raise TypeError(f"unsupported_operations_error() returned {type(error).__name__}")


def _without_a_device(engine: pl.GPUEngine) -> pl.GPUEngine:
    """
    Return the same engine with a size of the device, for which it would ask NVML otherwise.

    It is the base for the size of partitions, which come after the translation. Only the streaming
    executor has partitions, and this option.
    """
    options = engine.config.get("executor_options") or {}
    executor = engine.config.get("executor") or os.environ.get(EXECUTOR_VARIABLE, "streaming")
    if executor != "streaming" or "min_device_size" in options:
        return engine
    config: dict[str, Any] = dict(engine.config)
    config["executor_options"] = {**options, "min_device_size": _ANY_SIZE}
    return pl.GPUEngine(device=engine.device, **config)


def _judged(unsupported: Exception | None) -> GpuSupport:
    if unsupported is None:
        message = "cudf-polars supports every operation of this query"
        return GpuSupport(answer=Support.YES, message=message)
    own = operations_of(unsupported)
    if not own:
        return _unknown(_diagnose_gpu(underlying(unsupported)[0]))
    operations = tuple(dict.fromkeys(map(describe_operation, own)))
    return GpuSupport(
        answer=Support.NO,
        operations=operations,
        reason=Reason.UNSUPPORTED_QUERY,
        message=f"cudf-polars does not support this query ({'; '.join(operations)}): "
        "rewrite what is named, or run it on the CPU",
    )


def operations_of(unsupported: BaseException) -> list[BaseException]:
    """Return the errors of operations that cudf-polars supports nowhere, not those of this host."""
    return [each for each in underlying(unsupported) if not is_of_the_gpu(each)]


def underlying(unsupported: BaseException) -> list[BaseException]:
    """Return the errors that cudf-polars has put into `unsupported`; if none, that one itself."""
    errors = unsupported.args[1] if len(unsupported.args) > 1 else None
    if not isinstance(errors, (list, tuple)):
        return [unsupported]
    return [each for each in errors if isinstance(each, BaseException)] or [unsupported]


def is_of_the_gpu(error: BaseException) -> bool:
    """Return whether `error` is about the GPU of this host, and not about the query."""
    if isinstance(error, NotImplementedError):
        return False
    if type(error).__module__.partition(".")[0] in _ASKS_THE_GPU:
        return True
    # Raised by native code. For what libcudf does not support, the text begins "CUDF failure".
    native = isinstance(error, (RuntimeError, MemoryError))
    return native and _OF_THE_GPU.search(describe(error)) is not None


def describe_operation(error: BaseException) -> str:
    """Return the operation that the GPU engine does not support, in its own words."""
    return describe(error).removeprefix("NotImplementedError: ")


def _diagnose_translation(error: BaseException, cudf_polars: _cudf.CudfPolars) -> Diagnosis:
    if is_of_the_gpu(error):
        return _diagnose_gpu(error)
    cause = f"the translator of {cudf_polars} could not be asked ({describe(error)})"
    return Diagnosis(Reason.TRANSLATION_FAILED, cause, _TRY)


def _diagnose_gpu(error: BaseException) -> Diagnosis:
    cause = f"cudf-polars asks the GPU about this query, and that fails ({describe(error)})"
    return Diagnosis(
        Reason.GPU_NEEDED, cause, "ask on a host where gpu_status() finds a usable GPU"
    )


def _unknown(diagnosis: Diagnosis) -> GpuSupport:
    return GpuSupport(answer=Support.UNKNOWN, reason=diagnosis.reason, message=diagnosis.message)
