"""A host with GPUs that is not there: to test what a program does with one, and without."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import polars as pl

from polars_async._runtime.unpatched import allocate_lock, sleep
from polars_async.executors.processes import initializer
from polars_async.executors.processes.initializer import Initializer
from polars_async.gpu import cudf as _cudf
from polars_async.gpu import nvml, probe
from polars_async.gpu.attempt import note_error_of_query
from polars_async.gpu.breaker import Health, breaker, override
from polars_async.gpu.visible import DEVICE_ORDER, VISIBLE_DEVICES

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from types import ModuleType

__all__ = ["SimulatedFault", "SimulatedGpu", "simulate_gpu"]

SimulatedFault: TypeAlias = Literal[
    "unsupported", "translation", "oom", "cuda", "slow", "import", "incompatible"
]

Failing: TypeAlias = SimulatedFault | Mapping[int, SimulatedFault] | None

_FAULTS: Final[tuple[SimulatedFault, ...]] = get_args(SimulatedFault)
_SLOW: Final = 0.5
"""Seconds that a slow GPU takes."""
_UNSUPPORTED: Final = "Query execution with GPU not possible: unsupported operations (simulated)"

_query: Final[ContextVar[tuple[pl.LazyFrame, pl.QueryOptFlags] | None]] = ContextVar(
    "the query that asks the GPU", default=None
)


class SimulatedGpu:
    """
    What `simulate_gpu` gives: a look at the simulated GPU, and a hand on it.

    Attributes
    ----------
    queries
        How many queries have reached it; those that it failed are among them.
    fail_on
        The faults of single GPUs, as `simulate_gpu` takes them; they may be set anew.
    """

    def __init__(self, fail: Failing, fail_on: Mapping[int, SimulatedFault] | None = None) -> None:
        self._lock = allocate_lock()
        self.queries = 0
        self.fail = fail
        self.fail_on = fail_on or {}

    @property
    def fail(self) -> Failing:
        """
        Its faults, as `simulate_gpu` takes them; they may be set anew.

        Not so ``"incompatible"``, and ``"import"`` before the first query alone.
        """
        return self._fail

    @fail.setter
    def fail(self, fail: Failing) -> None:
        if isinstance(fail, Mapping):
            known = all(fault in _FAULTS[:-2] for fault in fail.values())
        else:
            known = fail is None or fail in _FAULTS
        if not known:
            raise ValueError(
                f"fail must be one of {', '.join(map(repr, _FAULTS))}, or None, or a mapping of "
                f"query numbers to one of the first five, got {fail!r}"
            )
        if fail == "incompatible" and hasattr(self, "_fail"):
            raise ValueError("fail='incompatible' is how a host begins: give it to simulate_gpu")
        if fail == "import" and self.queries:
            raise ValueError("fail='import' comes too late: cudf_polars was imported before")
        self._fail: Failing = fail

    @property
    def fail_on(self) -> Mapping[int, SimulatedFault]:
        """The faults of single GPUs, by their indices, which go before `fail`."""
        return self._fail_on

    @fail_on.setter
    def fail_on(self, fail_on: Mapping[int, SimulatedFault]) -> None:
        given: Any = fail_on
        known = isinstance(given, Mapping) and all(
            isinstance(index, int) and fault in _FAULTS[:-2] for index, fault in given.items()
        )
        if not known:
            raise ValueError(
                f"fail_on must map indices of GPUs to any of {', '.join(map(repr, _FAULTS[:-2]))}, "
                f"got {fail_on!r}"
            )
        self._fail_on = fail_on

    def next_fault(self) -> SimulatedFault | None:
        """Count one more query, and give what it is to suffer, unless `fail_on` tells."""
        with self._lock:
            self.queries += 1
            return self.fault

    @property
    def fault(self) -> SimulatedFault | None:
        """What the last query has suffered, and where all suffer the same, the next one too."""
        if isinstance(self._fail, Mapping):
            return self._fail.get(self.queries)
        return self._fail

    def check_import(self) -> None:
        """Raise what the import of cudf-polars is to raise, if that is so."""
        if self._fail == "import":
            raise ImportError("libcudf.so: cannot open shared object file (simulated)")
        if self._fail == "incompatible":
            raise AttributeError("module 'polars' has no attribute that it needs (simulated)")


@contextmanager
def simulate_gpu(
    count: int = 1,
    *,
    memory: int | None = 80 * 2**30,
    compute_capability: tuple[int, int] | None = (9, 0),
    driver: tuple[int, int] | None = (13, 0),
    cudf_polars: str | None = "26.10.2",
    fail: Failing = None,
    fail_on: Mapping[int, SimulatedFault] | None = None,
) -> Generator[SimulatedGpu]:
    """
    Have this process believe, for the time being, that its host has GPUs, or has none.

    `polars_async.gpu_status` tells of them, and ``pl.GPUEngine`` runs, on either line of Polars: a
    stand-in for cudf-polars goes through Polars' own GPU path, and has the CPU do the work, so that
    results are right. It takes every query, even one with a Python function, which cudf-polars does
    not. ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER`` are unset at first, and count as ever
    once they are set. All is as before in the end. It is for the whole process, so for one test at
    a time.

    Parameters
    ----------
    count
        How many GPUs there are; 0 for a driver that lists none.
    memory
        Bytes that each has, all of them free; None where the driver does not tell.
    compute_capability
        Of each GPU, as ``(major, minor)``; None where the driver does not tell.
    driver
        The newest CUDA that the driver runs, as ``(major, minor)``; None for no driver at all.
    cudf_polars
        The version of cudf-polars (of its build for CUDA 13); None where it is not installed.
    fail
        What fails: one of these for every query, or a mapping from the number of a query, counted
        from 1 in the order in which they reach the GPU, to one of the first five.

        - ``"unsupported"``: the query has an operation that the GPU engine does not know
        - ``"translation"``: the engine fails to translate it
        - ``"oom"``: the memory of the GPU does not suffice
        - ``"cuda"``: CUDA fails
        - ``"slow"``: it takes half a second more
        - ``"import"``: cudf-polars is installed, and its import fails
        - ``"incompatible"``: the installed cudf-polars does not support the installed Polars
    fail_on
        What fails on one of several GPUs, whatever `fail` says: a mapping from the index of a GPU
        to one of the first five.

    Yields
    ------
    SimulatedGpu
        With the number of ``queries`` so far, and ``fail`` and ``fail_on`` to be set anew.

    Raises
    ------
    ValueError
        `count` is negative, or what is to fail is none of these.

    Examples
    --------
    >>> import polars_async as pa
    >>> from polars_async.testing import simulate_gpu
    >>> with simulate_gpu(memory=16 * 2**30):
    ...     pa.gpu_status().usable
    True
    """
    _check_count(count)
    gpu = SimulatedGpu(fail, fail_on)

    def arguments() -> dict[str, Any]:
        """Give those for a worker process, which asks here for the fault of each query."""
        own = gpu.fail if gpu.fail in ("import", "incompatible") else None
        same = {"memory": memory, "compute_capability": compute_capability, "driver": driver}
        return {"count": count, "cudf_polars": cudf_polars, "fail": own, **same}

    host = _host(count, memory, compute_capability, driver)
    with ExitStack() as stack:
        for variable in (VISIBLE_DEVICES, DEVICE_ORDER):
            stack.callback(_set_variable, variable, os.environ.pop(variable, None))
        stack.callback(
            _cudf.override, _cudf.override(_cudf.Override(_installed(cudf_polars, fail)))
        )
        stack.callback(override, override({}))
        stack.callback(breaker.begin_generation, breaker.health)
        breaker.begin_generation(Health())
        stack.callback(_set_module, sys.modules.pop(_cudf.MODULE, _cudf.MODULE))
        if cudf_polars is None:
            _set_module(None)
        finder = _Finder(gpu, cudf_polars)
        sys.meta_path.insert(0, finder)
        stack.callback(sys.meta_path.remove, finder)
        stack.enter_context(_noting_queries())
        stack.callback(probe.probe.override, probe.probe.override(host))

        def next_faults() -> tuple[str | None, dict[int, str]]:
            return gpu.next_fault(), dict(gpu.fail_on)

        here = Initializer(lambda: partial(_simulate_in_worker, arguments()), next_faults)
        stack.callback(initializer.use, initializer.use(here))
        yield gpu


@contextmanager
def _simulate_in_worker(arguments: dict[str, Any], ask: Callable[[], Any]) -> Generator[None]:
    """Have in a worker process the simulated host of its parent, which counts the queries."""

    def next_fault() -> SimulatedFault | None:
        fault: SimulatedFault | None
        fault, gpu.fail_on = ask()
        gpu.queries += 1
        gpu.fail = fault
        return fault

    environment = dict(os.environ)
    with simulate_gpu(**arguments) as gpu:
        os.environ.update(environment)  # it may see one of the GPUs alone
        gpu.next_fault = next_fault  # type: ignore[method-assign]
        yield


def _check_count(count: object) -> None:
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"count must be a whole number, 0 or more, got {count!r}")


def _host(
    count: int,
    memory: int | None,
    compute_capability: tuple[int, int] | None,
    driver: tuple[int, int] | None,
) -> nvml.Host:
    if driver is None:
        return nvml.Host(diagnosis=nvml.NO_LIBRARY)
    devices = (
        nvml.HostDevice(
            index=index,
            uuid=f"GPU-{index:08x}-0000-0000-0000-000000000000",
            name="Simulated GPU",
            compute_capability=compute_capability,
            memory_total=memory,
            memory_free=memory,
        )
        for index in range(count)
    )
    return nvml.Host(devices=tuple(devices), cuda_version=driver)


def _installed(version: str | None, fail: object) -> _cudf.CudfPolars:
    here = _cudf.CudfPolars(installed=version is not None, build=_cudf.CU13, version=version)
    needs_another = version is not None and fail == "incompatible"
    return (
        here._replace(diagnosis=_cudf.diagnose_incompatible(here, "<1")) if needs_another else here
    )


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _set_module(module: ModuleType | str | None) -> None:
    """Put it, or None, which forbids its import, into its place; a name leaves that empty."""
    if isinstance(module, str):
        sys.modules.pop(module, None)
    else:
        sys.modules[_cudf.MODULE] = module  # type: ignore[assignment]  # None is meant to be there


@contextmanager
def _noting_queries() -> Generator[None]:
    """Have GPU engines note which query it is that the stand-in is to run."""
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
    """Finds the stand-in where ``cudf_polars`` is looked for: not before it is asked for."""

    def __init__(self, gpu: SimulatedGpu, version: str | None) -> None:
        self._gpu = gpu
        self._version = version

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _cudf.MODULE:
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=__name__)  # type: ignore[arg-type]

    def create_module(self, _spec: importlib.machinery.ModuleSpec) -> None:
        """Leave it to the import system, if there is one to be made."""
        # Here, before it has its place in sys.modules, where an import that fails leaves nothing,
        # not even the real one that may be back by then.
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
    """What `polars_async.gpu_support` asks."""

    def __init__(self, gpu: SimulatedGpu, _plan: Any, _engine: pl.GPUEngine) -> None:
        self._gpu = gpu

    def translate_ir(self) -> None:
        if self._gpu.fault == "translation":
            raise _translation_error()

    def unsupported_operations_error(self) -> NotImplementedError | None:
        return NotImplementedError(_UNSUPPORTED) if self._gpu.fault == "unsupported" else None


def _take(gpu: SimulatedGpu, plan: Any, engine: pl.GPUEngine) -> None:
    """Do with Polars' plan what cudf-polars does, and raise what that raises."""
    query, fault = _query.get(), gpu.next_fault()
    index = _index_of(engine.device)
    fault = gpu.fail_on.get(index, fault)
    if fault == "translation":
        raise _translation_error()
    if query is None or fault == "unsupported":
        if engine.config.get("raise_on_fail"):
            raise NotImplementedError(_UNSUPPORTED)
        return
    plan.set_udf(partial(_run, "no device" if index < 0 else fault, *query))


def _index_of(number: int | None) -> int:
    """Return the index of the GPU that CUDA counts by `number`; -1 where it counts none by that."""
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
