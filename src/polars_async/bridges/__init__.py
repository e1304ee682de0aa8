"""How each loop is told that a query is done."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from polars_async.bridges import asyncio as _asyncio

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from polars_async.query import Query


class Bridge(Protocol):
    """What a module of this package offers."""

    CANCELLED: type[BaseException]
    """What the await of a cancelled query raises there."""

    def wait(self, query: Query[Any]) -> Generator[Any, Any, None]:
        """Suspend the running task until `query` is done."""
        ...


def current() -> Bridge:
    """Find the bridge into the loop that runs on this thread."""
    if "trio" not in sys.modules:
        return _asyncio
    import sniffio  # noqa: PLC0415  # comes with trio

    try:
        library = sniffio.current_async_library()
    except sniffio.AsyncLibraryNotFoundError:
        library = "asyncio"  # which says itself that it does not run
    if library != "trio":
        return _asyncio
    from polars_async.bridges import trio  # noqa: PLC0415  # optional

    return trio
