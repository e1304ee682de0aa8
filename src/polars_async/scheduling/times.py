"""When a query was submitted, ran and ended."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

from polars_async.wording import WORTH_TELLING

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
        "held_up_since",
        "paused_seconds",
        "started",
    )

    def __init__(self) -> None:
        self._submitted = perf_counter()
        self._requeued: float | None = None
        self._paused_since: float | None = None
        self.held_up_since: float | None = None
        """Since when nothing but memory was wanting for its start."""
        self.started: float | None = None
        self.ended: float | None = None
        self.paused_seconds = 0.0
        """How long it waited while it ran: for its consumer, the GPU or a worker process."""
        self.gpu_seconds: float | None = None
        """How long the GPU tried it in vain, before it was queued again."""

    @property
    def queue_seconds(self) -> float:
        """Seconds from submission to start, or to now; includes a try of the GPU in vain."""
        return (self.started or self.ended or perf_counter()) - self._submitted

    @property
    def memory_seconds(self) -> float:
        """Seconds of `queue_seconds` in which nothing but memory was wanting, so far or in all."""
        if self.held_up_since is None:
            return 0.0
        return (self.started or self.ended or perf_counter()) - self.held_up_since

    def hold_up(self) -> None:
        """Note that from now on nothing but memory is wanting, unless that is so already."""
        if self.held_up_since is None:
            self.held_up_since = perf_counter()

    @property
    def run_seconds(self) -> float | None:
        """Seconds of running so far or in all, without pauses; None if it did not start."""
        if self.started is None:
            return None
        until = self.ended or self._paused_since or perf_counter()
        return max(0.0, until - self.started - self.paused_seconds)  # see `clock_stopped`

    def start(self) -> float:
        """Set the time of the start; return the seconds spent in the queue."""
        self.started = perf_counter()
        return self.started - (self._requeued or self._submitted)

    def restart(self) -> None:
        """Set the time of the start anew: what the query took so far was no run."""
        self.started = perf_counter()

    def end(self) -> None:
        """Set the time at which the query really ended."""
        self.ended = perf_counter()

    def reject(self) -> None:
        """Set the times of a query that was not admitted: it neither waited nor ran."""
        self.started, self.ended = None, self._submitted

    def requeue(self, *, has_run: bool) -> None:
        """Begin to wait again; keep what the GPU took in vain, if it `has_run` there."""
        if has_run:
            self.gpu_seconds = self.run_seconds
        self._requeued, self.started = perf_counter(), None
        self.paused_seconds = 0.0

    @contextmanager
    def clock_stopped(self) -> Generator[None]:
        """Return a context whose time does not count as run time."""
        begun = self._paused_since = perf_counter()
        try:
            yield
        finally:
            # In this order, for those that read it meanwhile: rather too short a run than one that
            # seems to have taken long, and makes its query a large one.
            self.paused_seconds += perf_counter() - begun
            self._paused_since = None

    @property
    def submitted(self) -> float:
        """The time of the submission."""
        return self._submitted

    def described(self, waited: float, ran: float | None, behind: str, ends: str) -> str:
        """
        Return where the time went, in words.

        `behind` is what it waited for, and `ends` what to say of a running query.
        """
        words = f"it waited {waited:.3f} s for a slot{behind},"
        tried, held_up = self.gpu_seconds, self.memory_seconds
        if tried is not None:
            words += f" {tried:.3f} s of which the GPU took for a try that failed,"
        if held_up >= WORTH_TELLING:
            words += f" {held_up:.3f} s of which max_memory held it up,"
        if ran is None:
            return f"{words} and never ran{'' if tried is None else ' on the CPU'}"
        if tried is None and held_up < WORTH_TELLING:
            words = words[:-1]
        return words + ends.format(ran=f"{ran:.3f} s")
