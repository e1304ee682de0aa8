"""When a GPU that keeps failing is left alone, and when it is tried again."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

FAILURES: Final = 3
"""So many failures one after the other open the breaker."""
REST: Final = 30.0
"""Seconds of the first rest; each further one is twice as long."""
LONGEST_REST: Final = 600.0


@dataclass(frozen=True, slots=True)
class Rest:
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
    rest: Rest | None = None
    """The last rest, over or not; None since it last succeeded."""


class Breaker:
    """
    A circuit breaker: after `FAILURES` in a row the GPU rests, then one query tries it again.

    `failed` and `succeeded` come from whoever has the GPU to himself, so one at a time; anybody may
    read.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self.health = Health()
        self.era = object()
        """What is told of another one counts for nothing; `polars_async.testing` begins eras."""

    def rest(self) -> Rest | None:
        """Give the rest that the GPU takes now; None if a query may try it."""
        rest = self.health.rest
        return rest if rest is not None and self._clock() < rest.until else None

    def seconds_left(self) -> float:
        """Tell how long the GPU still rests; 0 if a query may try it."""
        rest = self.health.rest
        return 0.0 if rest is None else max(rest.until - self._clock(), 0.0)

    def failed(self, failure: str, cause: Exception, era: object) -> Rest | None:
        """Count a failure; gives the rest that begins with it, if one does."""
        if era is not self.era:
            return None
        failures, rest = self.health.failures + 1, None
        if failures >= FAILURES:
            seconds = min(REST * 2.0 ** min(failures - FAILURES, 10), LONGEST_REST)
            rest = Rest(self._clock() + seconds, seconds, failure, cause)
        self.health = Health(failures, rest)
        return rest

    def succeeded(self, era: object) -> None:
        """Forget the failures so far."""
        if self.health.failures and era is self.era:
            self.health = Health()


breaker: Final = Breaker()
"""That of the process, which has one GPU for life."""
