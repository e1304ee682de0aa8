"""Queries on the GPUs of this host: each has a worker process, which sees no other."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeVar

from polars_async._native import RLock
from polars_async.executors.processes import Processes
from polars_async.gpu._visible import DEVICE_ORDER, VISIBLE_DEVICES, Visibility
from polars_async.gpu.breaker import breaker
from polars_async.gpu.failure import GpuFailure
from polars_async.gpu.offload import OF_THE_GPU, count_failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async.gpu import GpuDevice, GpuStatus
    from polars_async.query import Query

T = TypeVar("T")


class GpuProcesses:
    """
    A worker process for each GPU, so that all work side by side, and this process loads no CUDA.

    The lane has as many slots as there are GPUs: a query that has one finds a GPU free. A worker
    in which CUDA has failed makes room for a fresh one, with a context of its own.
    """

    def __init__(self, *, threads: int, keeps_unsendable: bool = False) -> None:
        self._threads: Final = threads
        self._keeps_unsendable: Final = keeps_unsendable
        self._lock = RLock()
        self._places: list[Processes] = []
        self._free: deque[Processes] = deque()

    @property
    def workers(self) -> int:
        """How many worker processes there are."""
        return sum(place.workers for place in self._places)

    @property
    def died(self) -> int:
        """How many of them have died."""
        return sum(place.died for place in self._places)

    def prepare(self, gpu: GpuStatus) -> int:
        """Have a place for each usable GPU, once and for all; gives how many there are."""
        with self._lock:
            if not self._places:
                usable = [each for each in gpu.devices if each.usable or each.taken]
                self._places += [
                    Processes(
                        threads=self._threads,
                        keeps_unsendable=self._keeps_unsendable,
                        env=_env(each),
                    )
                    for each in usable
                ]
                self._free.extend(self._places)
            return len(self._places)

    def run(self, work: Callable[[], T], query: Query[Any]) -> T:
        """Run `work` on a GPU that is free."""
        era = breaker.era
        with self._lock:
            place = self._free.popleft()
        try:
            found = place.run(work, query)
        except GpuFailure as failure:
            if failure.reason in OF_THE_GPU:
                with self._lock:
                    count_failure(str(failure), failure.cause, era)
            raise
        else:
            if not query.done:
                with self._lock:
                    breaker.succeeded(era)
            return found
        finally:
            with self._lock:
                self._free.append(place)
            del self, work, query  # an error's traceback holds this frame

    def close(self) -> None:
        """Let idle workers end, and the others after their query."""
        for place in self._places:
            place.close()

    def abandon(self) -> None:
        """Forget the workers, which are the children of another process."""
        self._lock = RLock()
        for place in self._places:
            place.abandon()
        self._free = deque(self._places)


def _env(device: GpuDevice) -> dict[str, str]:
    """Give the variables with which CUDA shows, and cudf-polars takes, just this GPU."""
    first = Visibility.now().first
    if device.taken and first.startswith("MIG-"):
        return {VISIBLE_DEVICES: first}
    if device.uuid is not None:
        return {VISIBLE_DEVICES: device.uuid}
    return {VISIBLE_DEVICES: str(device.index), DEVICE_ORDER: "PCI_BUS_ID"}
