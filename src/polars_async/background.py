"""Queries in the background, for plain threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from polars_async._upstream import InProcessQuery
from polars_async.handle import QueryHandle

if TYPE_CHECKING:
    from polars_async.query import Query

T = TypeVar("T")


class BackgroundQuery(InProcessQuery, Generic[T]):
    """
    A query in the background, with the methods of Polars' own.

    Polars' own machinery loses a panic, or aborts the process; this query runs in a collector.
    """

    def __init__(self, query: Query[T]) -> None:
        self._handle = QueryHandle(query)

    def cancel(self) -> None:
        """Let go of the query: what it gives or raises is dropped."""
        self._handle.cancel()

    def fetch(self) -> T | None:  # type: ignore[override]  # Polars knows of frames alone
        """Give the result if there is one, else None; raises what the query raised."""
        return self._handle.result() if self._handle.done() else None

    def fetch_blocking(self) -> T:  # type: ignore[override]  # as above
        """Block the calling thread until there is a result; raises what the query raised."""
        return self._handle.result()
