"""Queries on the GPUs of this host: each GPU has a worker process, which sees no other GPU."""

from __future__ import annotations

import sys

assert sys.platform == "linux"

import signal
from copy import copy
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final, TypeVar

import polars as pl

from polars_async._runtime.unpatched import RLock, SimpleQueue, when_put
from polars_async._runtime.upstream import forbids_cpu
from polars_async.errors import EngineUnavailableError, WorkerDiedError
from polars_async.executors import QueryExecutor
from polars_async.executors.operations import on_engine
from polars_async.executors.outcomes import unpacked_error
from polars_async.executors.processes.pool import ProcessExecutor
from polars_async.gpu.breaker import breaker_of, cooldown_of, key_of
from polars_async.gpu.devices import candidates, usable_devices
from polars_async.gpu.failure import GpuFailure
from polars_async.gpu.offload import count_failure
from polars_async.gpu.visible import DEVICE_ORDER, VISIBLE_DEVICES, Visibility
from polars_async.reasons import Reason

if TYPE_CHECKING:
    from polars_async.executors import Job
    from polars_async.executors.operations import Operation
    from polars_async.gpu.breaker import Breaker, Cooldown
    from polars_async.gpu.status import GpuDevice, GpuStatus

T = TypeVar("T")


class GpuProcessExecutor(QueryExecutor):
    """
    A worker process for each GPU, so that all work side by side, and this process loads no CUDA.

    A query runs on the GPU that its engine names, or on any that has no cooldown. The lane of
    queries for any GPU has as many slots as there are GPUs. Queries for one and the same GPU have a
    lane of their own, so that they keep no other GPU waiting. A worker in which CUDA has failed is
    replaced by a fresh one, with a CUDA context of its own.
    """

    def __init__(self, *, threads: int, runs_unsendable_here: bool = False) -> None:
        self._threads: Final = threads
        self._runs_unsendable_here: Final = runs_unsendable_here
        self._lock = RLock()
        self._pools: dict[str | int, ProcessExecutor] = {}
        self._idle: list[str | int] = []
        self._requests: list[_GpuRequest] = []

    @property
    def worker_count(self) -> int:
        """The number of worker processes."""
        return sum(pool.worker_count for pool in list(self._pools.values()))

    @property
    def worker_deaths(self) -> int:
        """The number of worker processes that have died while they ran a query."""
        return sum(pool.worker_deaths for pool in list(self._pools.values()))

    def prepare(self, gpu: GpuStatus) -> int:
        """Make a pool of one worker for each usable GPU; return the number of these GPUs."""
        usable = usable_devices(gpu)
        with self._lock:
            for each in usable:
                if (key := key_of(each)) not in self._pools:
                    self._pools[key] = ProcessExecutor(
                        threads=self._threads,
                        runs_unsendable_here=self._runs_unsendable_here,
                        env=_env(each),
                        gpu=f"GPU {each.index}",
                    )
                    self._idle.append(key)
        return len(usable)

    def run(self, operation: Operation[T], query: Job) -> T:
        """Wait for the GPU that the engine names, or for any, and run `operation` in its worker."""
        request = _GpuRequest(query)
        try:
            self._wait(request, query)
            if request.cooldown is not None:
                raise GpuFailure(Reason.GPU_COOLDOWN, request.cooldown.cause)
            if request.device is None:
                return None  # type: ignore[return-value]  # cancelled: its outcome is dropped
            return self._run_on(request.device, _for_only_gpu(operation, query), query)
        finally:
            self._withdraw(request)
            del self, operation, query, request  # see QueryExecutor.run

    def close(self) -> None:
        """Let idle workers end, and the others after their query."""
        for pool in list(self._pools.values()):
            pool.close()

    def reset_after_fork(self) -> None:
        """Forget the workers, which are the children of another process."""
        self._lock = RLock()
        for pool in self._pools.values():
            pool.reset_after_fork()
        self._idle = list(self._pools)
        self._requests = []

    def _run_on(self, gpu: GpuDevice, operation: Operation[T], query: Job) -> T:
        health = breaker_of(gpu)
        generation = health.generation
        try:
            pool = self._pools[key_of(gpu)]
            return pool.run(operation, query, partial(_count, health, generation))
        except WorkerDiedError as error:
            if (crash := _crash(error)) is not None:
                count_failure(health, crash, EngineUnavailableError(crash), generation)
            raise
        finally:
            del self, operation, query  # see QueryExecutor.run

    def _wait(self, request: _GpuRequest, query: Job) -> None:
        """Wait until `request` is answered, or `query` is cancelled or times out."""
        with self._lock:
            self._requests.append(request)
            self._assign()
        # A query that was cancelled before this has no wakeup, but is `done` at the first look.
        query.stop_with(request.wake)
        with query.clock_stopped():
            while not request.is_answered and not query.done:
                # A wakeup that comes before this wait stays in the queue. An answer may come
                # together with a cancellation: `_withdraw` gives its GPU back.
                when_put(request.wakeup, request.seconds_to_wait())
                with self._lock:
                    self._assign()
        query.stop_with(None)

    def _withdraw(self, request: _GpuRequest) -> None:
        """Give back the GPU of `request`, whether the query has run on it or not."""
        with self._lock:
            if request in self._requests:
                self._requests.remove(request)
            if request.device is not None:
                self._idle.append(key_of(request.device))
            self._assign()

    def _assign(self) -> None:
        """Answer the requests that can be answered, the oldest first. The lock is held."""
        for request in self._requests[:]:
            if request.answer(self._idle):
                self._requests.remove(request)
                request.wake()


class _GpuRequest:
    """The wait of a query for one of some GPUs."""

    def __init__(self, query: Job) -> None:
        engine, status = query.resolution.engine, query.resolution.gpu
        assert status is not None  # since it is for a GPU of this host
        self._candidates = candidates(engine, status)
        self._forbids_cpu = forbids_cpu(engine)
        self.wakeup: SimpleQueue[None] = SimpleQueue()
        self.device: GpuDevice | None = None
        self.cooldown: Cooldown | None = None
        """The cooldown that keeps the query off all of them."""

    @property
    def is_answered(self) -> bool:
        """Whether it has a GPU, or cannot have one for now."""
        return self.device is not None or self.cooldown is not None

    def wake(self) -> None:
        """Wake the thread in `_wait`, since there is an answer, or the query was cancelled."""
        self.wakeup.put(None)

    def answer(self, idle: list[str | int]) -> bool:
        """
        Take a GPU out of `idle`, or note a cooldown that all have.

        Return False if there is neither, so that the query has to wait.
        """
        if not self._forbids_cpu and (cooldown := cooldown_of(self._candidates)) is not None:
            self.cooldown = cooldown
            return True
        may_run = {key_of(each): each for each in self._candidates if self._may_try(each)}
        key = next((each for each in idle if each in may_run), None)
        if key is None:
            return False
        idle.remove(key)
        self.device = may_run[key]
        return True

    def seconds_to_wait(self) -> float:
        """Return the seconds until the next cooldown ends, after which its GPU may be tried."""
        cooldowns = (breaker_of(each).seconds_left() for each in self._candidates)
        return min((seconds for seconds in cooldowns if seconds > 0), default=inf)

    def _may_try(self, gpu: GpuDevice) -> bool:
        return self._forbids_cpu or breaker_of(gpu).cooldown() is None


def _env(device: GpuDevice) -> dict[str, str]:
    """Return the variables with which CUDA shows, and cudf-polars uses, this GPU alone."""
    entry = "" if device.number is None else Visibility.now().entry(device.number)
    if entry.startswith("MIG-"):
        return {VISIBLE_DEVICES: entry}
    if device.uuid is not None:
        return {VISIBLE_DEVICES: device.uuid}
    return {VISIBLE_DEVICES: str(device.index), DEVICE_ORDER: "PCI_BUS_ID"}


def _for_only_gpu(operation: Operation[T], query: Job) -> Operation[T]:
    """Return the operation for a worker that sees one GPU alone, which has the number 0 there."""
    engine = query.resolution.engine
    if not isinstance(engine, pl.GPUEngine) or engine.device is None:
        return operation
    engine = copy(engine)
    engine.device = 0
    return on_engine(operation, engine)


def _count(health: Breaker, generation: object, report: tuple[str, Any] | None) -> None:
    """Count a worker's report of its GPU: a failure, or None for a query that has succeeded."""
    if report is None:
        health.succeeded(generation)
    else:
        text, cause = report
        count_failure(health, text, unpacked_error(cause), generation)  # type: ignore[arg-type]  # as sent


def _crash(error: WorkerDiedError) -> str | None:
    """Describe a crash; return None if the worker was killed or exited, which no GPU causes."""
    number = error.signal
    if number is None or number == signal.SIGKILL:
        return None
    return f"a worker process of it has died by {number.name}"
