"""Which query runs now and which waits: slots and the waiting line."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from polars_async._native import RLock, allocate_lock, wait_for
from polars_async._nesting import in_query
from polars_async.query import State

if TYPE_CHECKING:
    from _thread import LockType

    from polars_async.query import Query


class Admission:
    """
    Slots for `max_running` queries, and a line of those that wait for one.

    `lock` guards all of it, and the state of every query admitted here. It is held for a few
    instructions at a time, never while a query runs or a waiter is woken. It is reentrant because
    a signal handler or a finaliser may come in at any instruction and cancel a query.
    """

    __slots__ = ("_exclusive", "_gates", "_line", "_running", "closed", "lock", "max_running")

    def __init__(self, max_running: int, *, exclusive: bool = False) -> None:
        self.lock = RLock()
        self.max_running = max_running
        self._exclusive = exclusive
        self.closed = False
        self._running: set[Query[Any]] = set()
        self._gates: list[LockType] = []
        self._line: OrderedDict[Query[Any], None] = OrderedDict()

    @property
    def running(self) -> int:
        """How many slots are taken, those of queries that were let go included."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many queries stand in the line."""
        return len(self._line)

    def enter(self, query: Query[Any]) -> bool:
        """
        Give `query` a slot, or a place at the end of the line.

        What a running query asks for itself runs beyond the slots: it may wait for it, and the line
        would then wait for both. Not so where the slots are exclusive, as the GPU is.
        """
        with self.lock:
            if len(self._running) < self.max_running or (not self._exclusive and in_query()):
                self._start(query)
                return True
            self._line[query] = None
            return False

    def forget(self, query: Query[Any]) -> None:
        """Take back what `enter` may have given to a query that never was to start."""
        with self.lock:
            self._running.discard(query)
            self._line.pop(query, None)

    def leave(self, query: Query[Any]) -> None:
        """Take a waiting query out of the line."""
        with self.lock:
            del self._line[query]  # whoever waits for an empty lane waits for those that run, too

    def release(self, query: Query[Any]) -> Query[Any] | None:
        """Take back the slot of a query that really ended; it goes to the one given, if any."""
        with self.lock:
            self._running.discard(query)
            if not self._line or len(self._running) >= self.max_running:
                if not self._running:
                    self._open_gates()
                return None
            following, _ = self._line.popitem(last=False)
            self._start(following)
            return following

    def in_line(self) -> list[Query[Any]]:
        """List the queries that wait."""
        with self.lock:
            return list(self._line)

    def wait_until_empty(self) -> None:
        """Block the calling thread until no query runs or waits."""
        gate = allocate_lock()
        with self.lock:
            if not self._running and not self._line:
                return
            gate.acquire()
            self._gates.append(gate)
        wait_for(gate)

    def reset(self) -> list[Query[Any]]:
        """Forget, and give, every query; for a forked child, where nobody else is left."""
        # A thread that did not survive the fork may have held the old lock.
        self.lock = RLock()
        lost = [*self._running, *self._line]
        self._running.clear()
        self._line.clear()
        self._gates.clear()
        return lost

    def _start(self, query: Query[Any]) -> None:
        query.state = State.RUNNING
        self._running.add(query)

    def _open_gates(self) -> None:
        for gate in self._gates:
            gate.release()
        self._gates.clear()
