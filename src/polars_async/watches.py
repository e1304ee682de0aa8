"""How far queries are, asked for once or again and again."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

from polars_async._runtime.timers import start_timer
from polars_async.bridges import Checkpoint, current
from polars_async.bridges.buffer import Arrivals
from polars_async.bridges.waiting import Onlooker
from polars_async.iteration import ResultStream
from polars_async.progress import Progress
from polars_async.scheduling.describing import essence_of, progress_of, summary_of

if TYPE_CHECKING:
    from polars_async.bridges import Bridge
    from polars_async.scheduling.query import Query


def check_every(every: Any) -> None:
    """Raise ValueError unless `every` is a number of seconds above 0."""
    if isinstance(every, bool) or not isinstance(every, (int, float)) or not 0 < every < inf:
        raise ValueError(f"every must be a number of seconds above 0, got {every!r}")


class Watchable:
    """What has one query, and tells of it."""

    __slots__ = ()

    _query: Query[Any]

    @property
    def id(self) -> int:
        """The number of the query, unique in this process; `Collector.cancel` takes it."""
        return self._query.id

    @property
    def summary(self) -> str:
        """
        What took the query how long so far, in one sentence.

        It tells what the query waited behind, where it ran, and why on another engine than the one
        that was asked for, as far as these are known.
        """
        return summary_of(self._query)

    @property
    def peak_memory(self) -> int | None:
        """
        The most memory that the query took so far, in bytes; None if it was not measured.

        With ``max_memory=`` of `Collector` it is, unless the query is quick; and that of a run that
        is shared is told to all who share it.
        """
        return self._query.run_of_it.peak_memory

    def progress(self) -> Progress:
        """
        Return how far the query is; any thread may call this.

        Its rows, its bytes and its fraction are counted on the streaming engine, on threads of this
        process and in worker processes. The first call counts those of the queries of this
        collector that start later: ``progress=True`` of `Collector` counts them all. Of others it
        is known whether they run, and how long.
        """
        self._query.want_progress()
        return progress_of(self._query)

    def watch(self, every: float = 0.5) -> ResultStream[Progress]:
        """
        Iterate over how far the query is, now and again, until it is done.

        Parameters
        ----------
        every
            Seconds between two looks; in worker processes 0.1 is the least.

        Returns
        -------
        ResultStream
            An iterator, async or not, over `Progress`; the last tells how the query has ended. It
            raises no error of the query, and its end does not cancel the query.

        Raises
        ------
        ValueError
            `every` is no number of seconds above 0.
        """
        check_every(every)
        return Watch(self._query, every)


class Watch(ResultStream[Progress]):
    """How far one query is, until it is done."""

    __slots__ = ("_every", "_has_begun", "_is_over", "_onlooker", "_query", "_turns")

    def __init__(self, query: Query[Any], every: float) -> None:
        self._query = query
        self._every = every
        self._has_begun = self._is_over = False
        self._turns: Arrivals[None] = Arrivals()
        """One item when it is time for the next look; over when the query is done."""
        self._onlooker = _Ending(self._turns)
        query.want_progress()
        if not query.add_waiter(self._onlooker):
            self._turns.finish()

    def __repr__(self) -> str:
        return f"<ResultStream: progress of {essence_of(self._query)}>"

    async def _next(self, bridge: Bridge | None = None) -> Progress:
        if bridge is None:
            bridge = current()
        if self._has_begun and not self._is_over:
            await self._turn(bridge)
        else:
            await Checkpoint(bridge)
        if self._is_over:
            raise StopAsyncIteration
        self._has_begun = True
        progress = progress_of(self._query)
        self._is_over = progress.has_ended
        return progress

    async def _turn(self, bridge: Bridge) -> None:
        """Wait until it is time for the next look."""
        timer = start_timer(self._every, _Tick(self._turns))
        try:
            await self._turns.next(bridge)
        except StopAsyncIteration:  # the query is done: one more look
            pass
        finally:
            timer.cancel()

    def close(self) -> None:
        """Watch no more; the query goes on."""
        self._is_over = True
        self._query.remove_waiter(self._onlooker, last_cancels=False)
        self._turns.finish(drop=True)


class _Ending(Onlooker):
    """Ends a watch when its query is done."""

    def __init__(self, turns: Arrivals[None]) -> None:
        self._turns = turns

    def wake(self) -> None:
        self._turns.finish(drop=True)


class _Tick:
    """Tells a watch that it is time for the next look."""

    def __init__(self, turns: Arrivals[None]) -> None:
        self._turns = turns

    def expire(self) -> None:
        if not self._turns.items:
            self._turns.put(None)
