"""The handles of queries, by which callers wait for their results and cancel them."""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from polars_async import bridges
from polars_async._runtime.fork import new_lock
from polars_async._runtime.upstream import InProcessQuery
from polars_async.bridges import turns
from polars_async.bridges.threads import block, block_caller
from polars_async.scheduling.describing import essence_of
from polars_async.watches import Watchable

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import TracebackType

    from polars_async.events import Tags
    from polars_async.resolution import Resolution
    from polars_async.scheduling.query import Query

T = TypeVar("T")

_lock: Final = new_lock()


class _NoWaiter:
    """Stands for a waiter that was never added: to remove it cancels a query without waiters."""

    survives_fork: ClassVar[bool] = False
    wake_at_exit: ClassVar[bool] = False

    def wake(self) -> None: ...


_NO_WAITER: Final = _NoWaiter()


class QueryHandle(Watchable, Coroutine[Any, Any, T], Generic[T]):
    """
    The handle of a scheduled query.

    Await it in asyncio or trio, call `get` in a greenlet of gevent, or `result` in a plain thread:
    any number of times and anywhere, each returns the same result or raises the same error. A
    handle belongs to no loop: it may be made before one runs, or in another thread. What runs a
    coroutine takes a handle, too, such as ``asyncio.TaskGroup.create_task`` and ``asyncio.run``;
    any number of tasks can be made of one.

    When a task that awaits the handle is cancelled, and no other task, greenlet or thread waits for
    it, the query is cancelled too: waiters learn it at once, and the result is dropped. In a worker
    process a running query is stopped; on threads Polars cannot stop it, and its slot in the
    collector is free when it really ends.
    """

    # `_awaits` is set only once a task was made of the handle: most handles do without.
    __slots__ = ("__weakref__", "_awaits", "_query")

    _query: Query[T]

    def __init__(self, query: Query[T]) -> None:
        self._query = query

    def __repr__(self) -> str:
        return f"<QueryHandle: {essence_of(self._query)}>"

    @property
    def label(self) -> str | None:
        """The ``label=`` of the query; None without one."""
        return self._query.label

    @property
    def tags(self) -> Tags:
        """The ``tags=`` of the query; empty without any."""
        return self._query.tags or {}

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

    def send(self, value: Any, /) -> Any:
        """Go on with the await of the running task of asyncio, which was made of this handle."""
        awaiting = self._await_here() or self.__await__()
        try:
            step = awaiting.send(value)
            self._keep(awaiting)  # else it has raised, with the result or an error
            return step
        finally:
            del self, awaiting  # as in __await__

    def throw(
        self,
        kind: type[BaseException] | BaseException,
        value: BaseException | object = None,
        traceback: TracebackType | None = None,
        /,
    ) -> Any:
        """Raise an error in the await of the running task, as ``asyncio.Task.cancel`` does."""
        awaiting = self._await_here()
        try:
            if awaiting is None:  # the task is cancelled before it has begun
                self._let_go()
                awaiting = self.__await__()
            error: Any = kind if value is None else value
            step = awaiting.throw(error if traceback is None else error.with_traceback(traceback))
            self._keep(awaiting)
            return step
        finally:
            del self, awaiting  # as in __await__

    def close(self) -> None:
        """End the await of the running task; cancel the query, if nothing else waits for it."""
        awaiting = self._await_here()
        if awaiting is None:
            self._let_go()
        else:
            awaiting.close()

    def _await_here(self) -> Generator[Any, Any, T] | None:
        """Return the await of the running task, if that was suspended."""
        awaits: dict[object, Generator[Any, Any, T]] | None = getattr(self, "_awaits", None)
        return None if awaits is None else awaits.pop(_running_task(), None)

    def _keep(self, awaiting: Generator[Any, Any, T]) -> None:
        """Keep the await of the running task, which is suspended, until the task goes on."""
        task = _running_task()
        with _lock:  # for the attribute: loops of two threads may come here at once
            if not hasattr(self, "_awaits"):
                self._awaits: dict[object, Generator[Any, Any, T]] = {}
            self._awaits[task] = awaiting

    def _let_go(self) -> None:
        self._query.remove_waiter(_NO_WAITER, last_cancels=True)

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


class BackgroundQuery(Watchable, InProcessQuery, Generic[T]):
    """
    A query in the background, with the methods of Polars' own.

    It runs in a collector, and not in Polars' own machinery, which loses panics or aborts the
    process.
    """

    def __init__(self, query: Query[T]) -> None:
        self._query = query
        self._handle = QueryHandle(query)

    def __repr__(self) -> str:
        return f"<BackgroundQuery: {essence_of(self._query)}>"

    def cancel(self) -> None:
        """Cancel the query; its result or error is dropped."""
        self._handle.cancel()

    def fetch(self) -> T | None:  # type: ignore[override]  # Polars knows of frames alone
        """Return the result, or None until the query is done; raise the error of the query."""
        return self._handle.result() if self._handle.done() else None

    def fetch_blocking(self) -> T:  # type: ignore[override]  # as above
        """Block the calling thread until the query is done; return or raise as ``result``."""
        return self._handle.result()


def result_of(query: Query[T]) -> T:
    """Block the thread, or greenlet, until the query is done; return or raise its outcome."""
    try:
        if not query.done:
            block_caller(query)
        return query.outcome(CancelledError)
    finally:
        del query  # an error's traceback holds this frame, which else held the error


def _running_task() -> object:
    """Return the task of asyncio that runs on this thread, or None."""
    tasks = sys.modules.get("asyncio.tasks")
    try:
        return None if tasks is None else tasks.current_task()
    except RuntimeError:  # no loop runs
        return None


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
