"""The bound on open streams of batches: each holds a thread, or a worker process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

from polars_async._runtime.upstream import blocking_threads
from polars_async.errors import QueueFullError

if TYPE_CHECKING:
    from polars_async.scheduling.query import Query

MAX_STREAMS: Final = 64


class OpenStreams:
    """
    The streams of one collector that wait, run, or are paused, until their queries really end.

    The lock of the collector's admissions guards it.
    """

    __slots__ = ("_open", "most")

    # A paused stream may hold one of Polars' own threads, which the whole process shares. Sets are
    # changed by one instruction, so that the locks of several collectors do not have to be one.
    _of_process: ClassVar[set[Query[Any]]] = set()

    def __init__(self, most: int = MAX_STREAMS) -> None:
        self.most = most
        self._open: set[Query[Any]] = set()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, query: Query[Any]) -> None:
        """
        Count `query` as open.

        Raises
        ------
        QueueFullError
            As many are open as may be, here or in the process.
        """
        if len(self._open) >= self.most:
            raise QueueFullError(
                f"the collector is full: {len(self._open)} streams of batches are open, of at most "
                f"max_streams={self.most}. Close those that are not read to their end, try again "
                "later, or make a Collector with a larger max_streams"
            )
        # Half of them are left for what reads files, so it is no harm if callers in several
        # collectors, each with a lock of its own, get past this together.
        most = max(1, blocking_threads() // 2)
        if len(self._of_process) >= most:
            raise QueueFullError(
                f"the process is full: {len(self._of_process)} streams of batches are open in its "
                f"collectors, of at most {most}, half of the threads with which Polars reads "
                "files. Close those that are not read to their end, try again later, or set "
                "POLARS_MAX_BLOCKING_THREAD_COUNT to a larger number before Polars starts"
            )
        self._open.add(query)
        self._of_process.add(query)

    def discard(self, query: Query[Any]) -> None:
        """Remove `query`, if it is counted."""
        self._open.discard(query)
        self._of_process.discard(query)

    def clear(self) -> None:
        """Remove all, in a forked child: it does not have their threads."""
        self._open.clear()
        self._of_process.clear()
