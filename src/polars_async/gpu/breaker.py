"""When a GPU that keeps failing is left alone, and when it is tried again."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from polars_async._runtime.fork import new_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from polars_async.gpu.status import GpuDevice

FAILURES: Final = 3
"""So many failures one after the other open the breaker."""
COOLDOWN: Final = 30.0
"""Seconds of the first rest; each further one is twice as long."""
LONGEST_COOLDOWN: Final = 600.0


@dataclass(frozen=True, slots=True)
class Cooldown:
    """A rest of the GPU, and what it is for."""

    until: float
    """In seconds of the breaker's clock."""
    seconds: float
    """How long it is in all."""
    failure: str
    """What happened last, in words."""
    cause: Exception
    """The same as the GPU engine raised it."""


class Health(NamedTuple):
    """How the GPU has been doing."""

    failures: int = 0
    """How many times in a row it has failed."""
    cooldown: Cooldown | None = None
    """The last rest, over or not; None since it last succeeded."""


class Breaker:
    """
    A circuit breaker: after `FAILURES` in a row the GPU rests, then one query tries it again.

    Any thread may tell of failures and successes, and read.
    """

    def __init__(self, clock: Callable[[], float] = monotonic, *, index: int | None = None) -> None:
        self._clock = clock
        self._lock = new_lock()
        self.index = index
        """NVML's index of the GPU; None for that of this process, whichever it is."""
        self.health = Health()
        self.generation = object()
        """What is told of another one counts for nothing; `polars_async.testing` begins eras."""

    def cooldown(self) -> Cooldown | None:
        """Give the rest that the GPU takes now; None if a query may try it."""
        cooldown = self.health.cooldown
        return cooldown if cooldown is not None and self._clock() < cooldown.until else None

    def seconds_left(self) -> float:
        """Tell how long the GPU still rests; 0 if a query may try it."""
        cooldown = self.health.cooldown
        return 0.0 if cooldown is None else max(cooldown.until - self._clock(), 0.0)

    def failed(self, failure: str, cause: Exception, generation: object) -> Cooldown | None:
        """Count a failure; gives the rest that begins with it, if one does."""
        with self._lock:
            if generation is not self.generation:
                return None
            failures, cooldown = self.health.failures + 1, None
            if failures >= FAILURES:
                seconds = min(COOLDOWN * 2.0 ** min(failures - FAILURES, 10), LONGEST_COOLDOWN)
                cooldown = Cooldown(self._clock() + seconds, seconds, failure, cause)
            self.health = Health(failures, cooldown)
        return cooldown

    def succeeded(self, generation: object) -> None:
        """Forget the failures so far."""
        with self._lock:
            if self.health.failures and generation is self.generation:
                self.health = Health()


breaker: Final = Breaker()
"""That of the one GPU which this process itself has for life."""


class _Process:
    breakers: ClassVar[dict[str | int, Breaker]] = {}


def breaker_of(gpu: GpuDevice) -> Breaker:
    """Return the breaker of a GPU of worker processes, which all collectors here share."""
    return _Process.breakers.setdefault(key_of(gpu), Breaker(index=gpu.index))


def key_of(gpu: GpuDevice) -> str | int:
    """Return what a GPU is known by, whatever else is found out about it."""
    return gpu.index if gpu.uuid is None else gpu.uuid


def cooldown_of(gpus: Iterable[GpuDevice]) -> Cooldown | None:
    """Return the rest that is over first; None if a query may try one of the `gpus`."""
    cooldowns = [breaker_of(each).cooldown() for each in gpus]
    resting = [cooldown for cooldown in cooldowns if cooldown is not None]
    return (
        min(resting, key=lambda cooldown: cooldown.until)
        if len(resting) == len(cooldowns) > 0
        else None
    )


def override(breakers: dict[str | int, Breaker]) -> dict[str | int, Breaker]:
    """Have other breakers of GPUs, for `polars_async.testing`; return those before."""
    before, _Process.breakers = _Process.breakers, breakers
    return before


def stats() -> dict[str, float]:
    """Tell of all breakers of this process together, and of that of each GPU of workers."""
    of_gpus = list(_Process.breakers.values())
    found: dict[str, float] = {
        "gpu_failures": max(each.health.failures for each in (breaker, *of_gpus)),
        "gpu_cooldown_seconds": max(each.seconds_left() for each in (breaker, *of_gpus)),
    }
    for each in of_gpus:
        found[f"gpu_{each.index}_failures"] = each.health.failures
        found[f"gpu_{each.index}_cooldown_seconds"] = each.seconds_left()
    return found
