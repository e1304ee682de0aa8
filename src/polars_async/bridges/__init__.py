"""How each loop, and a plain thread, is told that a query is done."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from polars_async.query import Awaited


class Bridge(Protocol):
    """What a module of this package offers."""

    CANCELLED: type[BaseException]
    """What the await of a cancelled query raises there."""

    def wait(self, awaited: Awaited) -> Generator[Any, Any, None]:
        """Suspend the running task until `awaited` has come."""
        ...

    def turn(self) -> Generator[Any, Any, None]:
        """Let other tasks run once, as whoever never has to wait must do now and then."""
        ...


def current() -> Bridge:
    """Find the bridge into the loop that runs on this thread."""
    return _trio() if "trio" in sys.modules and _trio_runs() else _asyncio()


def _trio_runs() -> bool:
    import sniffio  # noqa: PLC0415  # comes with trio

    try:
        return sniffio.current_async_library() == "trio"
    except sniffio.AsyncLibraryNotFoundError:
        return False


@cache
def _trio() -> Bridge:
    from polars_async.bridges import trio  # noqa: PLC0415  # optional

    return trio


@cache
def _asyncio() -> Bridge:
    from polars_async.bridges import asyncio  # noqa: PLC0415  # takes longer than all the rest

    return asyncio
