"""Queries that need more memory than the GPU has."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import polars as pl

import polars_async as pa
from benchmarks.gpu.findings import tell, tell_right, telling, told
from benchmarks.gpu.offload import STRICT, grouped
from benchmarks.measure.workloads import frame

if TYPE_CHECKING:
    from collections.abc import Generator

    from benchmarks.gpu.findings import Settings
    from polars_async.testing import SimulatedFault, SimulatedGpu


async def memory(_settings: Settings, gpu: SimulatedGpu | None) -> None:
    """Let the GPU run out of memory in two ways; check that it works again after each."""
    # No managed memory: it would swap with that of the host, and could stop the GPU for good.
    os.environ["POLARS_GPU_ENABLE_CUDA_MANAGED_MEMORY"] = "0"
    query = grouped(frame(5_000_000))
    expected = query.collect(engine="in-memory")
    limit = 16 * 2**20
    async with pa.Collector(engine="gpu", gpu="offload") as collector:

        async def raised(what: str, lf: pl.LazyFrame, engine: pl.GPUEngine) -> None:
            with _failing(gpu):
                try:
                    await collector.collect_async(lf, engine=engine)
                except Exception as error:  # noqa: BLE001  # its type is checked
                    tell(what, f"raised {told(error)}", ok=isinstance(error, MemoryError))
                else:
                    tell(what, "nothing was raised", ok=False)

        async def well(what: str) -> None:
            with telling(what):
                handle = collector.collect_async(query, engine=STRICT)
                answer = await handle
                tell_right(what, handle.resolution, answer.equals(expected))

        strict, lenient = (
            _limited(limit, _TriedOnce, raise_on_fail=strict) for strict in (True, False)
        )
        await raised("limit of 16 MiB, raise_on_fail", query, strict)
        await well("next query")
        what = "limit of 16 MiB"
        with telling(what), _failing(gpu):
            handle = collector.collect_async(query, engine=lenient)
            right = (await handle).equals(expected)
            message = handle.resolution.message
            answer = "the right answer" if right else "a WRONG ANSWER"
            fell_back = handle.resolution.reason is pa.Reason.OUT_OF_MEMORY
            tell(what, f"{message}; {answer}", ok=right and fell_back)
        await well("next query after that")
        what = "limit of 16 MiB, second try with smaller partitions"
        with telling(what), _failing(gpu, "oom-once"):
            handle = collector.collect_async(query, engine=_limited(limit, raise_on_fail=True))
            right = (await handle).equals(expected)
            tell_right(what, handle.resolution, right and handle.resolution.retried)
        await raised("cross join larger than the GPU, raise_on_fail", _too_large(), STRICT)
        await well("next query after the cross join")
        failures = int(collector.stats()["gpu_failures"])
        tell("failures in a row at the end", f"{failures}", ok=failures == 0)


@contextmanager
def _failing(gpu: SimulatedGpu | None, fault: SimulatedFault = "oom") -> Generator[None]:
    """Let the simulated GPU run out of memory; a real one does so by itself."""
    if gpu is None:
        yield
        return
    gpu.fail = fault
    try:
        yield
    finally:
        gpu.fail = None


class _TriedOnce(pl.GPUEngine):
    """An engine of a class of its own, with which no query is tried again."""


def _limited(
    limit: int, kind: type[pl.GPUEngine] = pl.GPUEngine, *, raise_on_fail: bool
) -> pl.GPUEngine:
    """
    Return an engine with a limit of bytes, which only the in-memory executor heeds.

    A second try, on the streaming executor, has no limit.
    """
    resource = {
        "qualname": "rmm.mr.LimitingResourceAdaptor",
        "options": {
            "upstream_mr": {"qualname": "rmm.mr.CudaMemoryResource"},
            "allocation_limit": limit,
        },
    }
    return kind(executor="in-memory", memory_resource_config=resource, raise_on_fail=raise_on_fail)


def _too_large() -> pl.LazyFrame:
    """Return a cross join larger than the GPU, of fewer rows than cudf's limit, 2**31."""
    rows = 45_000
    total = next((each.memory_total for each in pa.gpu_status().devices if each.selected), None)
    columns = 1 + int(1.5 * (total or 2**37) / (rows**2 * 8 * 2))
    numbers = pl.int_range(rows, eager=True)
    left, right = (
        pl.LazyFrame({f"{side}{column}": numbers for column in range(columns)}) for side in "lr"
    )
    return left.join(right, how="cross").select(pl.all().sum())
