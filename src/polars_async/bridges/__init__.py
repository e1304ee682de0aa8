"""How a task of each loop, and a plain thread, waits for a query and is woken."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType
    from typing import Any

    from polars_async.bridges.waiting import Awaited


class Bridge(Protocol):
    """A module of this package for one kind of loop."""

    CANCELLED: type[BaseException]
    """What an await of a cancelled query raises in a task of this loop."""

    def running(self) -> object | None:
        """Return the coroutine of the task that runs on this thread; None outside of one."""
        ...

    def wait(self, awaited: Awaited) -> Generator[Any, Any, None]:
        """Suspend the running task until `awaited` is done."""
        ...

    def may_go_on(self) -> bool:
        """Return whether the running task may go on at once where it waits for what is done."""
        ...

    def checkpoint(self) -> Generator[Any, Any, None]:
        """Let other tasks run once; a task that never has to wait calls this now and then."""
        ...


class Suspension:
    """An awaitable that waits for `awaited`."""

    def __init__(self, bridge: Bridge, awaited: Awaited) -> None:
        self._bridge = bridge
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, None]:
        return self._bridge.wait(self._awaited)


class Checkpoint:
    """An awaitable that lets other tasks run once."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def __await__(self) -> Generator[Any, Any, None]:
        return self._bridge.checkpoint()


def current() -> Bridge:
    """
    Return the bridge to the loop of the calling task.

    This asks the loops themselves, and not sniffio: its variable is part of the caller's context,
    and so would be set in the Python functions of a query, too, which no loop runs.
    """
    if sys.modules.get("trio") is None or (task := _trio().running()) is None:
        return _asyncio()
    if sys.modules.get("asyncio") is None or (other := _asyncio().running()) is None:
        return _trio()
    return _innermost({_frame_of(task): _trio(), _frame_of(other): _asyncio()})


def _frame_of(coroutine: object) -> FrameType | None:
    return getattr(coroutine, "cr_frame", None)  # a compiled one has none


def _innermost(bridges: dict[FrameType | None, Bridge]) -> Bridge:
    """Return the bridge to the innermost loop, where a task of one loop runs the other loop."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame not in bridges:
        frame = frame.f_back
    return bridges.get(frame) or _asyncio()


@cache
def _trio() -> Bridge:
    from polars_async.bridges import trio  # noqa: PLC0415  # optional

    return trio


@cache
def _asyncio() -> Bridge:
    from polars_async.bridges import asyncio  # noqa: PLC0415  # takes longer than all the rest

    return asyncio
