"""
For services on Starlette, FastAPI and Litestar: end the query of a client who has left.

It needs ``polars-async[starlette]``, and runs on asyncio and trio. A stream of batches in a
``StreamingResponse``, or in Litestar's ``Stream``, needs no help: its task is cancelled when the
client leaves.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import anyio
from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from polars_async.handle import QueryHandle

__all__ = ["CLIENT_LEFT", "unless_disconnected"]

T = TypeVar("T")

CLIENT_LEFT: Final = 499
"""The status of a request whose client has left, as nginx has it; only logs show it."""


class Request(Protocol):
    """What is needed of a request; those of Starlette, FastAPI and Litestar have it."""

    @property
    def receive(self) -> Callable[[], Awaitable[Mapping[str, object]]]: ...


async def unless_disconnected(request: Request, query: QueryHandle[T]) -> T:
    """
    Wait for a query; cancel it if the client leaves before it is done.

    Parameters
    ----------
    request
        The request, whose body has been read, as FastAPI does for parameters of the body: what is
        left of it is dropped.
    query
        The handle of the query.

    Returns
    -------
    object
        The result of the query.

    Raises
    ------
    starlette.exceptions.HTTPException
        The client has left, and the query is cancelled: with the status 499, which Starlette and
        Litestar make a response that no one reads.
    BaseException
        The error of the query, unchanged.

    Examples
    --------
    In a service, where ``SALES`` is a LazyFrame::

        from polars_async.starlette import unless_disconnected

        async def sales(request: Request) -> Response:
            frame = await unless_disconnected(request, pa.collect_async(SALES, timeout=10))
            return Response(frame.write_json(), media_type="application/json")
    """
    left = anyio.Event()
    results: list[T] = []
    error: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(_cancel_if_left, request, query, left)
            try:
                results.append(await query)
            except asyncio.CancelledError:
                if not left.is_set():  # this task is cancelled, and with it the query
                    raise
            except Exception as raised:  # noqa: BLE001  # raised below: the group would wrap it
                error = raised
            group.cancel_scope.cancel()
        if results:
            return results[0]
        if error is None or (left.is_set() and isinstance(error, CancelledError)):  # that of trio
            raise HTTPException(CLIENT_LEFT, "the client has left")
        raise error
    finally:
        del query, error  # the error's traceback holds this frame, which else held both


async def _cancel_if_left(request: Request, query: QueryHandle[T], left: anyio.Event) -> None:
    try:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left.set()
        query.cancel()
    finally:
        del query  # anyio keeps the error by which it ends this, and with it this frame
