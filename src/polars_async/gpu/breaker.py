"""The circuit breaker of a GPU: its cooldown after several failures in a row."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

from polars_async._runtime.fork import new_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from polars_async.gpu.status import GpuDevice

FAILURES: Final = 3
"""So many failures in a row open the breaker."""
COOLDOWN: Final = 30.0
"""Seconds of the first cooldown; each further one is twice as long."""
LONGEST_COOLDOWN: Final = 600.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Cooldown:
    """A time in which no query tries the GPU, and the failure that led to it."""

    until: float
    """Its end, by the breaker's clock."""
    seconds: float
    """Its whole length."""
    failure: str
    """The last failure, in words."""
    cause: Exception
    """The error that the GPU engine raised then."""


class Health(NamedTuple):
    """The failures of a GPU since it last succeeded."""

    failures: int = 0
    """How many times in a row it has failed."""
    cooldown: Cooldown | None = None
    """The last cooldown, over or not."""


class Breaker:
    """
    A circuit breaker: `FAILURES` in a row begin a cooldown, after which one query tries the GPU.

    Any thread may count and read. `health` is replaced as a whole, under the lock, so a thread that
    reads it without the lock sees failures and cooldown that belong together.
    """

    def __init__(self, clock: Callable[[], float] = monotonic, *, index: int | None = None) -> None:
        self._clock = clock
        self._lock = new_lock()
        self.index = index
        """NVML's index of the GPU; None for that of this process, whichever it is."""
        self.health = Health()
        self.generation = object()
        """Outcomes of queries that began in an older generation are ignored."""

    def cooldown(self) -> Cooldown | None:
        """Return the cooldown that the GPU is in; None if a query may try it."""
        cooldown = self.health.cooldown  # read once: another thread may replace it at any time
        return cooldown if cooldown is not None and self._clock() < cooldown.until else None

    def seconds_left(self) -> float:
        """Return the seconds until the end of the cooldown; 0 if a query may try the GPU."""
        cooldown = self.health.cooldown
        return 0.0 if cooldown is None else max(cooldown.until - self._clock(), 0.0)

    def failed(self, failure: str, cause: Exception, generation: object) -> Cooldown | None:
        """Count a failure; return the cooldown that it begins, if it does."""
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

    def begin_generation(self, health: Health) -> None:
        """Set `health`, and ignore queries that run already; for `polars_async.testing`."""
        # Under the lock: else a query that passed the check of its generation before could replace
        # the new health by one that goes on from the old.
        with self._lock:
            self.generation, self.health = object(), health


breaker: Final = Breaker()
"""The breaker of the GPU that this process itself uses: CUDA stays with one for life."""

_breakers: dict[str | int, Breaker] = {}
"""The breakers of the GPUs of worker processes."""


def breaker_of(gpu: GpuDevice) -> Breaker:
    """Return the breaker of a GPU of worker processes, which all collectors here share."""
    # In one call of C: two threads that ask for a new GPU at once get the same breaker.
    return _breakers.setdefault(key_of(gpu), Breaker(index=gpu.index))


def key_of(gpu: GpuDevice) -> str | int:
    """Return the UUID of a GPU, or its index where the driver does not tell it."""
    return gpu.index if gpu.uuid is None else gpu.uuid


def cooldown_of(gpus: Iterable[GpuDevice]) -> Cooldown | None:
    """Return the cooldown that ends first; None if a query may try one of the `gpus`."""
    cooldowns = [breaker_of(each).cooldown() for each in gpus]
    current = [cooldown for cooldown in cooldowns if cooldown is not None]
    return (
        min(current, key=lambda cooldown: cooldown.until)
        if len(current) == len(cooldowns) > 0
        else None
    )


def override(breakers: dict[str | int, Breaker]) -> dict[str | int, Breaker]:
    """Replace the breakers of worker processes, for `polars_async.testing`; return the old ones."""
    global _breakers
    before, _breakers = _breakers, breakers
    return before


def stats() -> dict[str, float]:
    """Return the worst figures of all breakers, and those of each GPU of worker processes."""
    of_gpus = list(_breakers.values())
    figures: dict[str, float] = {
        "gpu_failures": max(each.health.failures for each in (breaker, *of_gpus)),
        "gpu_cooldown_seconds": max(each.seconds_left() for each in (breaker, *of_gpus)),
    }
    for each in of_gpus:
        figures[f"gpu_{each.index}_failures"] = each.health.failures
        figures[f"gpu_{each.index}_cooldown_seconds"] = each.seconds_left()
    return figures
