"""The handles: what a caller holds while its query is on the way."""

from __future__ import annotations

from concurrent.futures import CancelledError
from importlib import import_module
from typing import TYPE_CHECKING, Generic, TypeVar

from polars_async import bridges
from polars_async._runtime.upstream import InProcessQuery
from polars_async.bridges.threads import block

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from polars_async.resolution import Resolution
    from polars_async.scheduling.query import Query

T = TypeVar("T")


class QueryHandle(Generic[T]):
    """
    A query that was scheduled, and its result to come.

    Await it in asyncio or trio, or call `result` in a plain thread: as often as wanted and from
    wherever, it gives the same result or raises the same error each time. It belongs to no loop:
    it may be made before one runs, or in another thread.

    When the task that awaits it is cancelled, and nobody else waits for it, the query is cancelled
    too. It is let go at once and its result is dropped. In worker processes it is stopped; on
    threads Polars cannot stop it, and its slot in the collector is free when it really ends.
    """

    __slots__ = ("__weakref__", "_query")

    def __init__(self, query: Query[T]) -> None:
        self._query = query

    def __repr__(self) -> str:
        return f"<QueryHandle: {summary(self._query)}>"

    @property
    def label(self) -> str | None:
        """What the caller named the query; None if nothing."""
        return self._query.label

    @property
    def resolution(self) -> Resolution:
        """Which engine runs the query, asked for by whom, and why."""
        return self._query.resolution

    def done(self) -> bool:
        """Tell whether there is a result, an error or a cancellation."""
        return self._query.done

    def cancel(self) -> bool:
        """
        Let go of the query: whoever waits for it is told so at once.

        Returns
        -------
        bool
            False if the query had ended before.
        """
        return self._query.cancel()

    def __await__(self) -> Generator[Any, Any, T]:
        """
        Suspend the awaiting task until the query is done.

        Raises
        ------
        BaseException
            Whatever the query raised, unchanged.
        QueryTimeoutError
            It was not done within the time-out that it was given.
        asyncio.CancelledError
            The query was cancelled; under trio ``concurrent.futures.CancelledError``.
        RuntimeError
            Neither asyncio nor trio runs on this thread.
        """
        query, bridge = self._query, bridges.current()
        try:
            yield from bridge.wait(query)
            return query.outcome(bridge.CANCELLED)
        finally:
            del self, query  # an error's traceback holds this frame, which else held the error

    def result(self, timeout: float | None = None) -> T:
        """
        Block the calling thread until the query is done.

        Parameters
        ----------
        timeout
            Seconds to wait at most; None waits as long as it takes.

        Raises
        ------
        TimeoutError
            The query was not done in time. It goes on, and can be waited for again.
        QueryTimeoutError
            It was not done within the time-out that it was given: a TimeoutError, too, but this
            query is over.
        concurrent.futures.CancelledError
            The query was cancelled.
        BaseException
            Whatever the query raised, unchanged.
        """
        query = self._query
        try:
            if not block(query, timeout):
                raise TimeoutError(f"the query was not done after {timeout} s; it goes on")
            return query.outcome(CancelledError)
        finally:
            del self, query  # as in __await__

    def get(self, block: bool = True, timeout: float | None = None) -> T:  # noqa: FBT001, FBT002  # as Polars' own
        """
        Wait for the query, while other greenlets run.

        A greenlet that is killed here, with nobody else waiting, cancels the query.

        Parameters
        ----------
        block
            Whether to wait at all.
        timeout
            Seconds to wait at most; None waits as long as it takes.

        Raises
        ------
        gevent.Timeout
            The query is not done, or was not in time. It goes on, and can be waited for again.
        concurrent.futures.CancelledError
            The query was cancelled.
        BaseException
            Whatever the query raised, unchanged.
        """
        check_gevent("get()")
        from gevent import Timeout  # noqa: PLC0415  # optional

        from polars_async.bridges.gevent import block_greenlet  # noqa: PLC0415  # as above

        query = self._query
        try:
            if not query.done and not block:
                raise Timeout
            if not query.done and not block_greenlet(query, timeout):
                raise Timeout(timeout)
            return query.outcome(CancelledError)
        finally:
            del self, query  # an error's traceback holds this frame, which else held the error


class BackgroundQuery(InProcessQuery, Generic[T]):
    """
    A query in the background, with the methods of Polars' own.

    Polars' own machinery loses a panic, or aborts the process; this query runs in a collector.
    """

    def __init__(self, query: Query[T]) -> None:
        self._query = query
        self._handle = QueryHandle(query)

    def __repr__(self) -> str:
        return f"<BackgroundQuery: {summary(self._query)}>"

    def cancel(self) -> None:
        """Let go of the query: what it gives or raises is dropped."""
        self._handle.cancel()

    def fetch(self) -> T | None:  # type: ignore[override]  # Polars knows of frames alone
        """Give the result if there is one, else None; raises what the query raised."""
        return self._handle.result() if self._handle.done() else None

    def fetch_blocking(self) -> T:  # type: ignore[override]  # as above
        """Block the calling thread until there is a result; raises what the query raised."""
        return self._handle.result()


def summary(query: Query[Any]) -> str:
    """Return the number, label, state and engine of a query in a few words."""
    label = "" if query.label is None else f" {query.label!r}"
    state = query.state.name.lower().replace("_", " ")
    return f"query {query.id}{label}, {state}, {query.resolution.name} engine"


def check_gevent(what: str) -> None:
    """
    Raise ImportError if gevent is not installed.

    Parameters
    ----------
    what
        What needs it, for the error.
    """
    try:
        import_module("gevent")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs gevent: install it, or polars-async[gevent]", name=error.name
        ) from error
