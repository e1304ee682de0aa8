"""When a query came, ran and ended."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator


class Times:
    """
    The times of one query, in seconds of `perf_counter`.

    The thread that runs the query and those that cancel it set them; any thread may read.
    """

    __slots__ = (
        "_paused_since",
        "_requeued",
        "_submitted",
        "ended",
        "gpu_seconds",
        "paused_seconds",
        "started",
    )

    def __init__(self) -> None:
        self._submitted = perf_counter()
        self._requeued: float | None = None
        self._paused_since: float | None = None
        self.started: float | None = None
        self.ended: float | None = None
        self.paused_seconds = 0.0
        """How long it waited while it ran: for its consumer, for the GPU or for a worker."""
        self.gpu_seconds: float | None = None
        """How long the GPU tried it in vain, before it was queued again."""

    @property
    def queue_seconds(self) -> float:
        """How long it has waited, or waited, to run; what the GPU has tried in vain included."""
        return (self.started or self.ended or perf_counter()) - self._submitted

    @property
    def run_seconds(self) -> float | None:
        """How long it has run, or ran, its pauses apart; None if it did not start."""
        if self.started is None:
            return None
        until = self.ended or self._paused_since or perf_counter()
        return until - self.started - self.paused_seconds

    def start(self) -> float:
        """Note that it has a slot now; return how long it waited for it."""
        self.started = perf_counter()
        return self.started - (self._requeued or self._submitted)

    def now(self) -> float:
        """Return the time by the clock of all the others."""
        return perf_counter()

    def end(self) -> None:
        """Note that it really ended."""
        self.ended = perf_counter()

    def refuse(self) -> None:
        """Note that it was not let in, and so never waited."""
        self.started, self.ended = None, self._submitted

    def requeue(self) -> None:
        """Note that the GPU has tried it in vain, and that it waits again."""
        self.gpu_seconds = self.run_seconds
        self._requeued, self.started = perf_counter(), None
        self.paused_seconds = 0.0

    @contextmanager
    def paused(self) -> Generator[None]:
        """Count the time in here as no work."""
        begun = self._paused_since = perf_counter()
        try:
            yield
        finally:
            self._paused_since = None
            self.paused_seconds += perf_counter() - begun

    def told(self, ends: str) -> str:
        """Return where the time went, in words; `ends` tells what becomes of it if it runs."""
        waited, ran, tried = self.queue_seconds, self.run_seconds, self.gpu_seconds
        words = f"it waited {waited:.3f} s for a slot"
        if tried is not None:
            words += f", {tried:.3f} s of which the GPU tried it in vain,"
        if ran is not None:
            return words + ends.format(ran=f"{ran:.3f} s")
        return words + (", and never ran" if tried is None else " and never ran on the CPU")
