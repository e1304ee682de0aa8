"""Queries on the GPU of this process, one at a time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from polars_async.executors.threads import ThreadsExecutor
from polars_async.gpu.offload import GpuHold

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async.executors import Job

T = TypeVar("T")


class GpuThreadExecutor(ThreadsExecutor):
    """The thread of the slot itself, while no other query of the process is on the GPU."""

    def run(self, work: Callable[[], T], query: Job) -> T:
        """Run `work` here, when it has the GPU; nothing stops it."""
        try:
            # Queries of other collectors may have the GPU until this one is cancelled.
            with GpuHold(partial(_is_wanted, query), query.paused):
                return super().run(work, query)
        finally:
            del work, query  # an error's traceback holds this frame


def _is_wanted(query: Job) -> bool:
    return not query.done


GPU_IN_PROCESS: Final = GpuThreadExecutor()
