"""A lane: slots, the line before them, and the threads behind them."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from polars_async import _fork
from polars_async.admission import Admission
from polars_async.errors import CollectorClosedError
from polars_async.executors.threads import ThreadExecutor
from polars_async.query import wake

if TYPE_CHECKING:
    from polars_async.query import Query


_lanes: Final[WeakSet[Lane]] = WeakSet()


class Lane:
    """
    Where the queries of one kind go: those for the CPU, or those for the GPU.

    A thread that ends a query takes the next from the line itself, so queries that follow each
    other need no hand-over, and there are never more threads than queries that ran at once. A
    running lane is held by its threads alone, so that a collector nobody holds any more ends when
    its queries have.
    """

    __slots__ = ("__weakref__", "_executor", "admission")

    def __init__(self, max_running: int, *, exclusive: bool = False) -> None:
        self.admission = Admission(max_running, exclusive=exclusive)
        self._executor = ThreadExecutor()
        _lanes.add(self)

    def submit(self, query: Query[Any]) -> None:
        """Run `query` at once where a slot is free, or else when its turn comes."""
        admission = self.admission
        with admission.lock:
            if admission.closed:
                raise CollectorClosedError(
                    "this collector was closed and takes no more queries: make a new one"
                )
            try:
                if admission.enter(query):
                    self._executor.start(partial(self._serve, query), at_once=admission.running)
            except BaseException:  # no thread to be had, or Ctrl-C in between
                admission.forget(query)
                raise

    def _serve(self, query: Query[Any]) -> None:
        following: Query[Any] | None = query
        while following is not None:
            query = following
            query.run()
            # Done before it is gone: `close` trusts in that, and a fork may come in between. And
            # gone before anybody wakes, who may ask at once for the slot.
            with self.admission.lock:
                waiters = query.end()
                following = self.admission.release(query)
            wake(waiters)
            query.drop_unwanted()
        del query  # as in Query.run

    def close(self, *, cancel_waiting: bool) -> None:
        """Take no more queries, and let the threads end with the last of those here."""
        with self.admission.lock:
            if self.admission.closed:
                return
            self.admission.closed = True
            waiting = self.admission.in_line()
            self._executor.close()
        if cancel_waiting:
            for query in waiting:
                query.cancel()

    def abandon(self, error: BaseException) -> None:
        """Start afresh in a forked child, which has neither the threads nor their queries."""
        self._executor = ThreadExecutor()
        for query in self.admission.reset():
            query.lose(error)


def _abandon_all() -> None:
    for lane in list(_lanes):
        lane.abandon(_fork.lost())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
