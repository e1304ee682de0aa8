"""A module in place of cudf-polars, which runs queries on the CPU, with the faults of a test."""

from __future__ import annotations

import importlib.machinery
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Final, Literal

import polars as pl

from polars_async._runtime.unpatched import sleep
from polars_async.gpu import cudf, probe
from polars_async.gpu.attempt import is_second_try, note_error_of_query

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from types import ModuleType

    from polars_async.testing.faults import SimulatedFault, SimulatedGpu

_SLOW: Final = 0.5
"""Seconds that a slow GPU adds to a query."""
_UNSUPPORTED: Final = "Query execution with GPU not possible: unsupported operations (simulated)"

_query: Final[ContextVar[tuple[pl.LazyFrame, pl.QueryOptFlags] | None]] = ContextVar(
    "the query that a GPU engine collects", default=None
)


@contextmanager
def importable(gpu: SimulatedGpu, version: str | None) -> Generator[None]:
    """Have ``import cudf_polars`` find the simulated module; for None as `version`, none at all."""
    before = sys.modules.pop(cudf.MODULE, cudf.MODULE)
    if version is None:
        _set_module(None)
    sys.meta_path.insert(0, finder := _Finder(gpu, version))
    try:
        with _recording_queries():
            yield
    finally:
        sys.meta_path.remove(finder)
        _set_module(before)


def _set_module(module: ModuleType | str | None) -> None:
    """Set the imported module, or None, which forbids its import; a name removes it."""
    if isinstance(module, str):
        sys.modules.pop(module, None)
    else:
        sys.modules[cudf.MODULE] = module  # type: ignore[assignment]  # None is meant to be there


@contextmanager
def _recording_queries() -> Generator[None]:
    """Have GPU engines record their query, which the simulated module does not get from Polars."""
    before = vars(pl.GPUEngine).get("collect")
    original = pl.GPUEngine.collect

    @wraps(original)
    def collect(engine: pl.GPUEngine, lf: pl.LazyFrame, **options: Any) -> Any:
        token = _query.set((lf, options["optimizations"]))
        try:
            return original(engine, lf, **options)
        finally:
            _query.reset(token)

    pl.GPUEngine.collect = collect  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if before is None:
            del pl.GPUEngine.collect
        else:
            pl.GPUEngine.collect = before  # type: ignore[method-assign]


class _Finder:
    """Finds the simulated module when ``cudf_polars`` is imported, and is its loader."""

    def __init__(self, gpu: SimulatedGpu, version: str | None) -> None:
        self._gpu = gpu
        self._version = version

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != cudf.MODULE:
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=__name__)  # type: ignore[arg-type]

    def create_module(self, _spec: importlib.machinery.ModuleSpec) -> None:
        """Let the import system make the module, unless its import is to fail."""
        # Here, and not in `exec_module`: an import that fails there removes the module from
        # sys.modules, even a real one that was restored meanwhile.
        self._gpu.check_import()

    def exec_module(self, module: ModuleType) -> None:
        gpu = self._gpu

        def execute_with_cudf(plan: Any, *_duration: Any, config: pl.GPUEngine) -> None:
            _take(gpu, plan, config)

        vars(module).update(
            __version__=self._version,
            execute_with_cudf=execute_with_cudf,
            Translator=partial(_Translator, gpu),
        )


class _Translator:
    """The part of cudf-polars that `polars_async.gpu_support` uses."""

    def __init__(self, gpu: SimulatedGpu, _plan: Any, _engine: pl.GPUEngine) -> None:
        self._gpu = gpu

    def translate_ir(self) -> None:
        if self._gpu.fault == "translation":
            raise _translation_error()

    def unsupported_operations_error(self) -> NotImplementedError | None:
        return NotImplementedError(_UNSUPPORTED) if self._gpu.fault == "unsupported" else None


def _take(gpu: SimulatedGpu, plan: Any, engine: pl.GPUEngine) -> None:
    """Do with Polars' plan what cudf-polars does, and raise the errors that it raises."""
    query, again = _query.get(), is_second_try()
    fault = gpu.next_fault(engine.config, again=again)
    index = _index_of(engine.device)
    fault = gpu.fail_on.get(index, fault)
    if fault == "oom-once":
        fault = None if again else "oom"
    if fault == "translation":
        raise _translation_error()
    if query is None or fault == "unsupported":
        if engine.config.get("raise_on_fail"):
            raise NotImplementedError(_UNSUPPORTED)
        return
    plan.set_udf(partial(_run, "no device" if index < 0 else fault, *query))


def _index_of(number: int | None) -> int:
    """Return the index of the GPU to which CUDA gives `number`; -1 if there is none."""
    devices = probe.probe.status(refresh=False).devices
    return next((each.index for each in devices if each.number == (number or 0)), -1)


def _run(
    fault: SimulatedFault | Literal["no device"] | None,
    lf: pl.LazyFrame,
    optimizations: pl.QueryOptFlags,
    *_arguments: object,
) -> pl.DataFrame:
    if fault == "no device":
        raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal (simulated)")
    if fault == "oom":
        raise MemoryError("std::bad_alloc: out_of_memory: CUDA error (simulated)")
    if fault == "cuda":
        raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access (simulated)")
    if fault == "slow":
        sleep(_SLOW)
    try:
        return pl.InMemoryEngine().collect(lf, optimizations=optimizations)
    except BaseException as error:
        note_error_of_query(error)
        raise


def _translation_error() -> Exception:
    return ValueError("an operation that the translator does not expect (simulated)")
