"""How many queries came to which outcome."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """What became of the queries of one admission so far."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    rejected: int = 0
    downgraded: int = 0
    fell_back: int = 0
    queue_seconds: float = 0.0
    run_seconds: float = 0.0

    @property
    def ended(self) -> int:
        """How many have come to one of the five outcomes."""
        return self.completed + self.failed + self.cancelled + self.timed_out + self.rejected
