"""The handles of queries, by which callers wait for their results and cancel them."""

from __future__ import annotations

from concurrent.futures import CancelledError
from importlib import import_module
from typing import TYPE_CHECKING, Generic, TypeVar

from polars_async import bridges
from polars_async._runtime.upstream import InProcessQuery
from polars_async.bridges import turns
from polars_async.bridges.threads import block

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from polars_async.resolution import Resolution
    from polars_async.scheduling.query import Query

T = TypeVar("T")


class QueryHandle(Generic[T]):
    """
    The handle of a scheduled query.

    Await it in asyncio or trio, call `get` in a greenlet of gevent, or `result` in a plain thread:
    any number of times and anywhere, each returns the same result or raises the same error. A
    handle belongs to no loop: it may be made before one runs, or in another thread.

    When a task that awaits the handle is cancelled, and no other task, greenlet or thread waits for
    it, the query is cancelled too: waiters learn it at once, and the result is dropped. In a worker
    process a running query is stopped; on threads Polars cannot stop it, and its slot in the
    collector is free when it really ends.
    """

    __slots__ = ("__weakref__", "_query")

    def __init__(self, query: Query[T]) -> None:
        self._query = query

    def __repr__(self) -> str:
        return f"<QueryHandle: {summary(self._query)}>"

    @property
    def label(self) -> str | None:
        """The ``label=`` of the query; None without one."""
        return self._query.label

    @property
    def resolution(self) -> Resolution:
        """Which engine runs the query, requested by whom, and why."""
        return self._query.resolution

    def done(self) -> bool:
        """Return whether the query is done: finished, failed, cancelled or timed out."""
        return self._query.done

    def cancel(self) -> bool:
        """
        Cancel the query, and wake all its waiters at once.

        Returns
        -------
        bool
            False if the query was done already.
        """
        return self._query.cancel()

    def __await__(self) -> Generator[Any, Any, T]:
        """
        Suspend the awaiting task until the query is done.

        Raises
        ------
        BaseException
            The error of the query, unchanged.
        QueryTimeoutError
            The query was not done within its ``timeout=``.
        asyncio.CancelledError
            The query was cancelled; under trio ``concurrent.futures.CancelledError``.
        RuntimeError
            Neither asyncio nor trio runs on this thread.
        """
        query, bridge = self._query, bridges.current()
        try:
            if not query.done:
                yield from bridge.wait(query)
            elif not bridge.may_go_on() or (query.is_inline and turns.is_due()):
                yield from bridge.checkpoint()
            return query.outcome(bridge.CANCELLED)
        finally:
            del self, query  # an error's traceback holds this frame, which else held the error

    def result(self, timeout: float | None = None) -> T:
        """
        Block the calling thread until the query is done.

        Parameters
        ----------
        timeout
            Seconds to wait at most; None sets no limit.

        Raises
        ------
        TimeoutError
            The wait took longer than `timeout`. The query goes on, and can be waited for again.
        QueryTimeoutError
            The query was not done within its ``timeout=``: a TimeoutError, too, but a final one.
        concurrent.futures.CancelledError
            The query was cancelled.
        BaseException
            The error of the query, unchanged.
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
        Block the calling greenlet until the query is done, as Polars' own with ``gevent=True``.

        When the greenlet is killed here, and no other task, greenlet or thread waits for the query,
        it is cancelled.

        Parameters
        ----------
        block
            Whether to wait at all.
        timeout
            Seconds to wait at most; None sets no limit.

        Raises
        ------
        gevent.Timeout
            The query is not done yet. It goes on, and can be waited for again.
        QueryTimeoutError
            The query was not done within its ``timeout=``.
        concurrent.futures.CancelledError
            The query was cancelled.
        ImportError
            gevent is not installed.
        BaseException
            The error of the query, unchanged.
        """
        check_gevent("get()")
        from gevent import Timeout  # noqa: PLC0415  # optional

        from polars_async.bridges.gevent import block_greenlet, let_hub_turn  # noqa: PLC0415  # as above

        query = self._query
        try:
            if not query.done:
                if not block:
                    raise Timeout
                if not block_greenlet(query, timeout):
                    raise Timeout(timeout)
            elif block and query.is_inline and turns.is_due():
                let_hub_turn()
            return query.outcome(CancelledError)
        finally:
            del self, query  # an error's traceback holds this frame, which else held the error


class BackgroundQuery(InProcessQuery, Generic[T]):
    """
    A query in the background, with the methods of Polars' own.

    It runs in a collector, and not in Polars' own machinery, which loses panics or aborts the
    process.
    """

    def __init__(self, query: Query[T]) -> None:
        self._query = query
        self._handle = QueryHandle(query)

    def __repr__(self) -> str:
        return f"<BackgroundQuery: {summary(self._query)}>"

    def cancel(self) -> None:
        """Cancel the query; its result or error is dropped."""
        self._handle.cancel()

    def fetch(self) -> T | None:  # type: ignore[override]  # Polars knows of frames alone
        """Return the result, or None until the query is done; raise the error of the query."""
        return self._handle.result() if self._handle.done() else None

    def fetch_blocking(self) -> T:  # type: ignore[override]  # as above
        """Block the calling thread until the query is done; return or raise as ``result``."""
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
