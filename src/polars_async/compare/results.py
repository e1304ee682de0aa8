"""The result of a query on an engine."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRun:
    """
    What a query took on an engine, in a process of its own, and whether its answer is right.

    Attributes
    ----------
    query
        The name of the query.
    engine
        The name of the engine that was asked for.
    status
        ``"ran"``; ``"failed"`` if the query raised, could not be sent, or its process died; or
        ``"not run"`` if this host does not have the engine.
    seconds
        The time of each run but the first, which is there to warm up, and fills caches.
    peak_memory
        The most bytes of memory that were resident in the process while it ran the query: Python,
        Polars and the frames in memory that the query reads are among them. None if unknown.
    rows
        The rows of the answer; None if there is none.
    ran_on
        The name of the engine that ran the query in the end: another one than `engine` where that
        is one that chooses, or the GPU engine and could not run it. None if there is no answer.
    agrees
        Whether the answer is that of the engine `compared_with`; None if they were not compared.
    reordered
        Whether the answer has the same rows in another order, which the query leaves open.
    compared_with
        The in-memory engine if that has an answer, else the first engine that has one.
    message
        Why there are no figures; or what differs, or why another engine ran. None if there is
        nothing to say.
    """

    query: str
    engine: str
    status: Literal["ran", "failed", "not run"] = "ran"
    seconds: tuple[float, ...] = ()
    peak_memory: int | None = None
    rows: int | None = None
    ran_on: str | None = None
    agrees: bool | None = None
    reordered: bool = False
    compared_with: str | None = None
    message: str | None = None

    @property
    def median(self) -> float | None:
        """The median of `seconds`."""
        return median(self.seconds) if self.seconds else None

    @property
    def min(self) -> float | None:
        """The smallest of `seconds`."""
        return min(self.seconds, default=None)

    @property
    def max(self) -> float | None:
        """The largest of `seconds`."""
        return max(self.seconds, default=None)
