"""Queries on the GPU of this process, one at a time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar, cast

from polars_async.executors.threads import ThreadsExecutor
from polars_async.gpu.devices import named_device
from polars_async.gpu.offload import GpuHold

if TYPE_CHECKING:
    from polars_async.executors import Job
    from polars_async.executors.operations import Operation
    from polars_async.resolution import Resolution

T = TypeVar("T")


class GpuThreadExecutor(ThreadsExecutor):
    """Runs a query on the slot's own thread, while no other query of the process is on the GPU."""

    def run(self, operation: Operation[T], query: Job) -> T:
        """
        Wait for the GPU, and run `operation` on this thread; nothing stops it then.

        A query that is cancelled or times out while it waits does not run.
        """
        try:
            # Queries of other collectors may have the GPU until this one is cancelled.
            with GpuHold(partial(_is_wanted, query), query.clock_stopped, query.note_retry):
                if query.done:  # cancelled or timed out meanwhile: its result is dropped
                    return cast("T", None)
                query.place = _gpu_of(query.resolution)
                return super().run(operation, query)
        finally:
            del operation, query  # see QueryExecutor.run


def _gpu_of(resolution: Resolution) -> str | None:
    """Return the name of the GPU that runs a query in this process; None if it is not known."""
    if (status := resolution.gpu) is None:
        return None
    device = named_device(resolution.engine, status)
    if device is None:
        device = next((each for each in status.devices if each.selected), None)
    return None if device is None else f"GPU {device.index}"


def _is_wanted(query: Job) -> bool:
    return not query.done


GPU_IN_PROCESS: Final = GpuThreadExecutor()
