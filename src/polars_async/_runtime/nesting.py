"""
Whether the caller is a Python function of a running query, and its query waits for the function.

What such a function submits must not wait for a slot, since its own query may hold the last one.
Three facts are looked at for each submission:

- Our worker threads do nothing but run queries and call their hooks. That is certain.
- On threads that Polars has started, as `origin` finds out, it is always a query that calls Python.
  Which query cannot be known: it counts as one of ours, although the program's own ``collect`` uses
  the same threads. At worst one query more than there are slots runs then.
- The context in which a function of ours runs is copied to the tasks and threads to which the
  function hands work: by ``asyncio.run_coroutine_threadsafe``, ``asyncio.to_thread`` and their like
  in trio and anyio. It counts until that query has really ended. A task that the function started
  and does not wait for counts meanwhile, too: again, at worst one query too many runs.

Threads without that context are missed: those of an executor, unless they get it by
``executor.submit(contextvars.copy_context().run, function)``, and threads of Polars' own to which
it does not pass the context. What these submit waits for a slot; where a function that holds the
last slot waits for them, both wait for ever.
"""

from __future__ import annotations

from contextvars import ContextVar
from threading import current_thread, main_thread
from typing import Final

from polars_async._runtime import unpatched
from polars_async._runtime.origin import is_this_of_polars

_OF_GPU_ENGINE: Final = "spmd-executor"
"""How cudf-polars names the threads on which Python sources of a query run. A new thread does not
inherit the name of its starter, so one of this name was given it; that cudf-polars did is a guess.
"""


class EnclosingQuery:
    """A running query in whose Python function other queries are submitted."""

    __slots__ = ("ended", "on_gpu", "parent")

    def __init__(self, parent: EnclosingQuery | None, *, on_gpu: bool) -> None:
        self.parent = parent
        """The query whose Python function submitted this one."""
        self.on_gpu = on_gpu
        self.ended = False

    def still_running(self) -> EnclosingQuery | None:
        """Return this query, or the nearest of those around it, that has not ended."""
        query: EnclosingQuery | None = self
        while query is not None and query.ended:
            query = query.parent
        return query

    def end(self) -> None:
        """Note that the query has really ended."""
        self.ended = True
        # Else, of queries that each submit the next and end, the last would keep all in memory.
        self.parent = self.still_running()


class _ThisThread(unpatched.local):
    is_worker = False
    is_worker_of_gpu = False


_this_thread: Final = _ThisThread()
_enclosing: Final[ContextVar[EnclosingQuery | None]] = ContextVar(
    "polars_async_enclosing_query", default=None
)


def enter_worker(*, for_gpu: bool) -> None:
    """Note that all this thread ever does is run queries."""
    _this_thread.is_worker = True
    _this_thread.is_worker_of_gpu = for_gpu


def enter_context() -> EnclosingQuery:
    """Make a query the enclosing one of the current context; the caller ends it."""
    query = EnclosingQuery(_enclosing_query(), on_gpu=_this_thread.is_worker_of_gpu)
    _enclosing.set(query)
    return query


def in_query() -> bool:
    """Return whether the caller is a Python function of a query, or may be one."""
    if _this_thread.is_worker or _enclosing_query() is not None:
        return True
    return not _is_main_thread() and (is_this_of_polars() or _is_of_gpu_engine())


def in_gpu_query() -> bool:
    """
    Return whether the caller may be a Python function of a query on the GPU.

    Its Python sources run on its own thread or on one of cudf-polars', its hooks on its own.
    """
    if _this_thread.is_worker_of_gpu or _is_of_gpu_engine():
        return True
    query = _enclosing_query()
    return query is not None and query.on_gpu


def on_thread_of_polars() -> bool:
    """Return whether this is one of Polars' own threads, which Polars lacks while it is blocked."""
    return not _this_thread.is_worker and not _is_main_thread() and is_this_of_polars()


def _enclosing_query() -> EnclosingQuery | None:
    query = _enclosing.get()
    return None if query is None else query.still_running()


def _is_main_thread() -> bool:
    # Looked at before the rest, which takes five times as long: most loops run on this thread.
    return unpatched.get_ident() == main_thread().ident


def _is_of_gpu_engine() -> bool:
    return current_thread().name.startswith(_OF_GPU_ENGINE)
