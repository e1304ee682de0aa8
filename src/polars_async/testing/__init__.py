"""Simulated hosts, to test what a program does with GPUs, and without any."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from polars_async.executors import initializer
from polars_async.executors.initializer import Initializer
from polars_async.gpu import breaker as breakers
from polars_async.gpu import cudf, nvml, probe
from polars_async.gpu.breaker import Health, breaker
from polars_async.gpu.visible import DEVICE_ORDER, VISIBLE_DEVICES
from polars_async.testing.cudf_polars import importable
from polars_async.testing.faults import SimulatedFault, SimulatedGpu

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from polars_async.testing.faults import Failing

__all__ = ["SimulatedFault", "SimulatedGpu", "simulate_gpu"]


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
    Simulate, within a ``with`` block, that the host of this process has GPUs, or that it has none.

    `polars_async.gpu_status` reports them, and ``pl.GPUEngine`` runs, on either release series of
    Polars: a module in place of cudf-polars goes through Polars' own GPU path, and has the CPU do
    the work, so that results are right. It takes every query, even one with a Python function,
    which cudf-polars does not. ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER`` are unset at
    first, and take effect as usual once they are set. At the end of the block all is as before. It
    affects the whole process, so use it in one test at a time.

    Parameters
    ----------
    count
        How many GPUs there are; 0 for a driver that lists none.
    memory
        Bytes that each has, all of them free; None where the driver does not tell.
    compute_capability
        Of each GPU, as ``(major, minor)``; None where the driver does not tell.
    driver
        The newest CUDA that the driver runs, as ``(major, minor)``; None for no driver.
    cudf_polars
        The version of cudf-polars (of its build for CUDA 13); None where it is not installed.
    fail
        The fault: one of these for every query, or a mapping from the number of a query, counted
        from 1 in the order in which they reach the GPU, to one of the first six.

        - ``"unsupported"``: the query has an operation that the GPU engine does not know
        - ``"translation"``: the engine fails to translate it
        - ``"oom"``: the memory of the GPU does not suffice, nor in a second try
        - ``"oom-once"``: it suffices in a second try, with smaller partitions
        - ``"cuda"``: CUDA fails
        - ``"slow"``: it takes half a second more
        - ``"import"``: cudf-polars is installed, and its import fails
        - ``"incompatible"``: the installed cudf-polars does not support the installed Polars
    fail_on
        The faults of single GPUs, which override `fail`: a mapping from the index of a GPU to one
        of the first six.

    Yields
    ------
    SimulatedGpu
        With the number of ``queries`` so far, the ``configs`` of their engines, and ``fail`` and
        ``fail_on`` to be set anew.

    Raises
    ------
    ValueError
        `count` is negative, or `fail` or `fail_on` is none of these.

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
        """Return the arguments in a worker process, which asks this one for each query's fault."""
        own = gpu.fail if gpu.fail in ("import", "incompatible") else None
        same = {"memory": memory, "compute_capability": compute_capability, "driver": driver}
        return {"count": count, "cudf_polars": cudf_polars, "fail": own, **same}

    def next_faults(tried: tuple[dict[str, Any], bool]) -> tuple[str | None, dict[int, str]]:
        config, again = tried
        return gpu.next_fault(config, again=again), dict(gpu.fail_on)

    host = _host(count, memory, compute_capability, driver)
    in_workers = Initializer(lambda: partial(_simulate_in_worker, arguments()), next_faults)
    installed = cudf.Override(_installed(cudf_polars, fail))
    with ExitStack() as stack:
        for variable in (VISIBLE_DEVICES, DEVICE_ORDER):
            stack.callback(_set_variable, variable, os.environ.pop(variable, None))
        stack.callback(cudf.override, cudf.override(installed))
        stack.callback(breakers.override, breakers.override({}))
        stack.callback(breaker.begin_generation, breaker.health)
        breaker.begin_generation(Health())
        stack.enter_context(importable(gpu, cudf_polars))
        stack.callback(probe.probe.override, probe.probe.override(host))
        stack.callback(initializer.use, initializer.use(in_workers))
        yield gpu


@contextmanager
def _simulate_in_worker(arguments: dict[str, Any], ask: Callable[[Any], Any]) -> Generator[None]:
    """Simulate the host of the parent in a worker process; the parent counts the queries."""

    def next_fault(config: Mapping[str, Any], *, again: bool) -> SimulatedFault | None:
        fault: SimulatedFault | None
        fault, gpu.fail_on = ask((dict(config), again))
        gpu.queries += not again
        gpu.fail = fault
        return fault

    environment = dict(os.environ)
    with simulate_gpu(**arguments) as gpu:
        os.environ.update(environment)  # this worker may be restricted to one of the GPUs
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


def _installed(version: str | None, fail: object) -> cudf.CudfPolars:
    here = cudf.CudfPolars(installed=version is not None, build=cudf.CU13, version=version)
    if version is None or fail != "incompatible":
        return here
    return here._replace(diagnosis=cudf.diagnose_incompatible(here, "<1"))


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
