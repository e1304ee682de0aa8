"""
Whether it is a Python function of a query that asks, for what its query may wait for.

What such a function asks for must not wait for a slot, since its own query may hold the last one.
Three facts tell, looked at each time that somebody asks:

- Our worker threads do nothing but run queries and call their hooks. That is certain.
- On threads that Polars has started, as `_origin` tells, it is always a query that calls Python.
  Whose it is cannot be told: it counts as ours, although the program's own ``collect`` uses the
  same threads. At worst a query more than the slots allow runs then.
- The context in which a function of ours runs goes along to the tasks and threads to which the
  function hands something over: with ``asyncio.run_coroutine_threadsafe``, ``asyncio.to_thread``
  and their like in trio and anyio. It counts until that query has really ended. A task that it
  started and does not wait for counts meanwhile, too: again, that is a query too many.

Not told are threads without the context: those of an executor, unless they are given it by
``executor.submit(contextvars.copy_context().run, function)``, and all that is asked by Polars' own
threads to which Polars does not give it. What those ask for waits for a slot, and where a function
that holds the last slot waits for them, it waits for ever.
"""

from __future__ import annotations

from contextvars import ContextVar
from threading import current_thread, main_thread
from typing import Final

from polars_async._runtime import unpatched
from polars_async._runtime.origin import is_this_of_polars

_OF_GPU_ENGINE: Final = "spmd-executor"
"""How cudf-polars names its threads on which Python sources of a query run. Python does not hand
names on, so that a thread of that name was given it; by whom is a guess."""


class Asking:
    """A query while it runs, to all that asks in its context."""

    __slots__ = ("asked_by", "on_gpu", "over")

    def __init__(self, asked_by: Asking | None, *, on_gpu: bool) -> None:
        self.asked_by = asked_by
        self.on_gpu = on_gpu
        self.over = False

    def still_running(self) -> Asking | None:
        """Return this one, or the nearest of those it was asked for by, that is not over."""
        asking: Asking | None = self
        while asking is not None and asking.over:
            asking = asking.asked_by
        return asking

    def end(self) -> None:
        """Note that the query has really ended."""
        self.over = True
        # Else queries that ask for the next and end would all be kept by the last.
        self.asked_by = self.still_running()


class _ThisThread(unpatched.local):
    is_worker = False
    is_worker_of_gpu = False


_this_thread: Final = _ThisThread()
_asking: Final[ContextVar[Asking | None]] = ContextVar("polars_async_asking", default=None)


def enter_worker(*, for_gpu: bool) -> None:
    """Note that all this thread ever does is run queries."""
    _this_thread.is_worker = True
    _this_thread.is_worker_of_gpu = for_gpu


def enter_context() -> Asking:
    """Have what asks in the current context be known to ask for a query, until that is over."""
    asking = Asking(_who_asks(), on_gpu=_this_thread.is_worker_of_gpu)
    _asking.set(asking)
    return asking


def in_query() -> bool:
    """Tell whether a Python function of a query asks, or may."""
    if _this_thread.is_worker or _who_asks() is not None:
        return True
    return not _is_main_thread() and (is_this_of_polars() or _is_of_gpu_engine())


def in_gpu_query() -> bool:
    """
    Tell whether a query on the GPU may be what asks: on its own thread, or on one of cudf-polars.

    That is where a Python source of it runs, and what a hook hears of it.
    """
    if _this_thread.is_worker_of_gpu or _is_of_gpu_engine():
        return True
    asking = _who_asks()
    return asking is not None and asking.on_gpu


def on_thread_of_polars() -> bool:
    """Tell whether one of Polars' own threads asks, which Polars lacks while that waits."""
    return not _this_thread.is_worker and not _is_main_thread() and is_this_of_polars()


def _who_asks() -> Asking | None:
    asking = _asking.get()
    return None if asking is None else asking.still_running()


def _is_main_thread() -> bool:
    # Most loops run there, and it is asked for each query: the rest takes five times as long.
    return unpatched.get_ident() == main_thread().ident


def _is_of_gpu_engine() -> bool:
    return current_thread().name.startswith(_OF_GPU_ENGINE)
