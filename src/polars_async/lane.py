"""A lane: slots, the line before them, and the threads behind them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from polars_async.admission import Admission
from polars_async.errors import CollectorClosedError
from polars_async.executors.threads import ThreadExecutor

if TYPE_CHECKING:
    from polars_async.query import Query


class Lane:
    """
    Where the queries of one kind go: those for the CPU, or those for the GPU.

    A thread that ends a query takes the next from the line itself, so queries that follow each
    other need no hand-over, and there are never more threads than slots. A running lane is held
    by its threads alone, so that a collector nobody holds any more ends when its queries have.
    """

    __slots__ = ("_executor", "admission")

    def __init__(self, max_running: int) -> None:
        self.admission = Admission(max_running)
        self._executor = ThreadExecutor()

    def submit(self, query: Query[Any]) -> None:
        """Run `query` at once where a slot is free, or else when its turn comes."""
        admission = self.admission
        with admission.lock:
            if admission.closed:
                raise CollectorClosedError(
                    "this collector was closed and takes no more queries: make a new one"
                )
            if admission.enter(query):
                try:
                    self._executor.start(partial(self._serve, query), at_once=admission.running)
                except BaseException:
                    admission.release(query)
                    raise

    def _serve(self, query: Query[Any]) -> None:
        following: Query[Any] | None = query
        while following is not None:
            query = following
            query.run()
            # The slot first: whoever is woken may ask at once for what this one leaves behind.
            following = self.admission.release(query)
            query.settle()

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
            query.fail(error)
