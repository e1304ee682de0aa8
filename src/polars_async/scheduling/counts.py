"""The states of a query, and how many queries have come to each final one."""

from __future__ import annotations

import enum


class State(enum.IntEnum):
    """The state of a query; all but the first two are final."""

    WAITING = 0
    RUNNING = 1
    COMPLETED = 2
    FAILED = 3
    CANCELLED = 4
    TIMED_OUT = 5
    REJECTED = 6


class Counts:
    """What became of the queries of one admission so far."""

    __slots__ = (
        "by_state",
        "downgraded",
        "fell_back",
        "memory_seconds",
        "memory_waits",
        "queue_seconds",
        "run_seconds",
    )

    def __init__(self) -> None:
        self.by_state = [0] * len(State)
        """How many queries have come to each state; only final states are counted."""
        self.downgraded = 0
        self.fell_back = 0
        self.memory_waits = 0
        """How many queries have started later for want of memory, and by how much in all:"""
        self.memory_seconds = 0.0
        self.queue_seconds = 0.0
        self.run_seconds = 0.0

    @property
    def done(self) -> int:
        """How many queries have come to a final state."""
        return sum(self.by_state)

    def as_stats(self) -> dict[str, float]:
        """Return the counts under the names that `Collector.stats` has for them."""
        final = {state.name.lower(): self.by_state[state] for state in list(State)[2:]}
        return {
            **final,
            "downgraded": self.downgraded,
            "fell_back": self.fell_back,
            "memory_waits": self.memory_waits,
            "memory_seconds": self.memory_seconds,
            "queue_seconds": self.queue_seconds,
            "run_seconds": self.run_seconds,
        }
