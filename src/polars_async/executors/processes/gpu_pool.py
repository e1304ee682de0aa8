"""Queries on the GPUs of this host: each has a worker process, which sees no other."""

from __future__ import annotations

import signal
from copy import copy
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final, TypeVar

import polars as pl

from polars_async._runtime.unpatched import RLock, SimpleQueue, when_put
from polars_async._runtime.upstream import forbids_cpu
from polars_async.errors import EngineUnavailableError, WorkerDiedError
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
    from collections.abc import Callable

    from polars_async.executors import Job
    from polars_async.gpu.breaker import Breaker, Cooldown
    from polars_async.gpu.status import GpuDevice, GpuStatus

T = TypeVar("T")


class GpuProcessExecutor:
    """
    A worker process for each GPU, so that all work side by side, and this process loads no CUDA.

    A query runs on the GPU that its engine names, or on any that does not rest. The lane of those
    for any GPU has as many slots as there are GPUs; those for one and the same have a lane of their
    own, so that they keep no other GPU waiting. A worker in which CUDA has failed makes room for a
    fresh one, with a context of its own.
    """

    def __init__(self, *, threads: int, keeps_unsendable: bool = False) -> None:
        self._threads: Final = threads
        self._keeps_unsendable: Final = keeps_unsendable
        self._lock = RLock()
        self._pools: dict[str | int, ProcessExecutor] = {}
        self._idle: list[str | int] = []
        self._asks: list[_Ask] = []

    @property
    def workers(self) -> int:
        """How many worker processes there are."""
        return sum(pool.workers for pool in list(self._pools.values()))

    @property
    def died(self) -> int:
        """How many of them have died."""
        return sum(pool.died for pool in list(self._pools.values()))

    def prepare(self, gpu: GpuStatus) -> int:
        """Have a place for each usable GPU; gives how many those are."""
        usable = usable_devices(gpu)
        with self._lock:
            for each in usable:
                if (key := key_of(each)) not in self._pools:
                    self._pools[key] = ProcessExecutor(
                        threads=self._threads,
                        keeps_unsendable=self._keeps_unsendable,
                        env=_env(each),
                    )
                    self._idle.append(key)
        return len(usable)

    def run(self, work: Callable[[], T], query: Job) -> T:
        """Run `work` on the GPU that it is for, or on any, as soon as that is free."""
        ask = _Ask(query)
        try:
            self._wait(ask, query)
            if ask.cooldown is not None:
                raise GpuFailure(Reason.GPU_COOLDOWN, ask.cooldown.cause)
            if ask.found is None:
                return None  # type: ignore[return-value]  # which nobody wants
            return self._run_on(ask.found, _for_only_gpu(work, query), query)
        finally:
            self._withdraw(ask)
            del self, work, query, ask  # an error's traceback holds this frame

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
        self._asks = []

    def _run_on(self, gpu: GpuDevice, work: Callable[[], T], query: Job) -> T:
        health = breaker_of(gpu)
        generation = health.generation
        try:
            return self._pools[key_of(gpu)].run(work, query, partial(_count, health, generation))
        except WorkerDiedError as error:
            if (crash := _crash(error)) is not None:
                count_failure(health, crash, EngineUnavailableError(crash), generation)
            raise
        finally:
            del self, work, query  # as above

    def _wait(self, ask: _Ask, query: Job) -> None:
        """Wait until `ask` has what it asks for, or nobody wants it any more."""
        with self._lock:
            self._asks.append(ask)
            self._hand_out()
        query.on_cancel(ask.wake)
        with query.paused():
            while not ask.is_answered and not query.done:
                when_put(ask.news, ask.seconds_to_wait())
                with self._lock:
                    self._hand_out()
        query.on_cancel(None)

    def _withdraw(self, ask: _Ask) -> None:
        with self._lock:
            if ask in self._asks:
                self._asks.remove(ask)
            if ask.found is not None:
                self._idle.append(key_of(ask.found))
            self._hand_out()

    def _hand_out(self) -> None:
        """Answer those who wait, first come first served; with the lock held."""
        for ask in self._asks[:]:
            if ask.answer(self._idle):
                self._asks.remove(ask)
                ask.wake()


class _Ask:
    """A query that asks for one of some GPUs."""

    def __init__(self, query: Job) -> None:
        engine, status = query.resolution.engine, query.resolution.gpu
        assert status is not None  # since it is for a GPU of this host
        self._gpus = candidates(engine, status)
        self._insists = forbids_cpu(engine)
        self.news: SimpleQueue[None] = SimpleQueue()
        self.found: GpuDevice | None = None
        self.cooldown: Cooldown | None = None
        """The rest that keeps it off all of them."""

    @property
    def is_answered(self) -> bool:
        """Whether it waits no longer."""
        return self.found is not None or self.cooldown is not None

    def wake(self) -> None:
        """Have it look whether it has an answer, or is let go. Any thread may."""
        self.news.put(None)

    def answer(self, idle: list[str | int]) -> bool:
        """Take a GPU out of those that are `idle`, or a rest that all take; False for neither."""
        if not self._insists and (cooldown := cooldown_of(self._gpus)) is not None:
            self.cooldown = cooldown
            return True
        may_run = {key_of(each): each for each in self._gpus if self._may_try(each)}
        key = next((each for each in idle if each in may_run), None)
        if key is None:
            return False
        idle.remove(key)
        self.found = may_run[key]
        return True

    def seconds_to_wait(self) -> float:
        """Tell after how long one more GPU may be tried."""
        cooldowns = (breaker_of(each).seconds_left() for each in self._gpus)
        return min((seconds for seconds in cooldowns if seconds > 0), default=inf)

    def _may_try(self, gpu: GpuDevice) -> bool:
        return self._insists or breaker_of(gpu).cooldown() is None


def _env(device: GpuDevice) -> dict[str, str]:
    """Give the variables with which CUDA shows, and cudf-polars takes, just this GPU."""
    entry = "" if device.number is None else Visibility.now().entry(device.number)
    if entry.startswith("MIG-"):
        return {VISIBLE_DEVICES: entry}
    if device.uuid is not None:
        return {VISIBLE_DEVICES: device.uuid}
    return {VISIBLE_DEVICES: str(device.index), DEVICE_ORDER: "PCI_BUS_ID"}


def _for_only_gpu(work: Callable[[], T], query: Job) -> Callable[[], T]:
    """Return the work for a worker of the GPU that its engine names, which is number 0 there."""
    engine = query.resolution.engine
    if not isinstance(engine, pl.GPUEngine) or engine.device is None:
        return work
    engine = copy(engine)
    engine.device = 0
    return on_engine(work, engine)


def _count(health: Breaker, generation: object, told: tuple[str, Any] | None) -> None:
    """Count what a worker process tells of its GPU: a failure, or None where a query is done."""
    if told is None:
        health.succeeded(generation)
    else:
        text, cause = told
        count_failure(health, text, unpacked_error(cause), generation)  # type: ignore[arg-type]  # as sent


def _crash(error: WorkerDiedError) -> str | None:
    """Tell in words of a crash; one that is killed, or ends by itself, says nothing of its GPU."""
    number = error.signal
    if number is None or number == signal.SIGKILL:
        return None
    return f"a worker process of it has died by {number.name}"
