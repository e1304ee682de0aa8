"""Where queries run: one module for each such place, and the threads that wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async.gpu.status import GpuStatus
    from polars_async.query import Query

T = TypeVar("T")


class Place(Protocol):
    """Where the queries of a lane run. The thread of a slot hands each over, and waits for it."""

    @property
    def workers(self) -> int:
        """How many worker processes it has."""
        ...

    @property
    def died(self) -> int:
        """How many of its worker processes have died with a query."""
        ...

    def prepare(self, gpu: GpuStatus) -> int | None:
        """Prepare for queries on the GPU; gives how many run at once, None for as many as come."""

    def run(self, work: Callable[[], T], query: Query[Any]) -> T:
        """
        Run `work`, which is that of `query`, and give its result or raise its error.

        `query.on_let_go` tells when nobody wants it any more: a place that can stop it does so.
        What cannot leave this process runs on the calling thread.
        """
        ...

    def close(self) -> None:
        """Keep nothing for queries to come, but for those in line. It may be called again."""

    def abandon(self) -> None:
        """Forget everything, in a forked child, to which none of it belongs."""
