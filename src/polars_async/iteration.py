"""What is common to all iterators, async and not, over what arrives one after the other."""

from __future__ import annotations

import sys
from abc import abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

from polars_async.bridges.threads import BLOCKING, drive

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType
    from typing import Any, Self

    from polars_async.bridges import Bridge

T = TypeVar("T")


class ResultStream(Generic[T]):
    """
    An iterator over results as they come: ``async for`` in asyncio and trio, ``for`` elsewhere.

    ``for`` blocks the calling thread until the next result has come; where gevent runs on it, the
    calling greenlet alone. So it would block a loop of asyncio or trio: use ``async for`` there.

    If a loop over it ends early, by ``break`` or an exception, the queries that are not done are
    cancelled once the stream is garbage-collected. ``with``, ``async with`` and `close` cancel them
    at once, and so does the cancellation of the task, or the end of the greenlet, that waits for
    the next result.
    """

    __slots__ = ("__weakref__",)

    def __aiter__(self) -> Self:
        """Return the stream itself."""
        return self

    def __iter__(self) -> Self:
        """Return the stream itself."""
        return self

    def __anext__(self) -> Coroutine[Any, Any, T]:
        """Wait for the next result; an error of its query is raised, and ends the stream."""
        return self._next()

    def __next__(self) -> T:
        """Block until the next result has come; an error of its query is raised, and ends it."""
        try:
            return drive(self._next(BLOCKING))
        except StopAsyncIteration:
            raise StopIteration from None
        finally:
            del self  # an error's traceback holds this frame, and so would hold query and error

    @abstractmethod
    async def _next(self, bridge: Bridge | None = None) -> T:
        """Wait for the next result, by the `bridge` of the caller, or else of the running loop."""

    @abstractmethod
    def close(self) -> None:
        """Cancel the queries that are not done; any thread may call it, and more than once."""

    async def aclose(self) -> None:
        """Cancel the queries that are not done, for ``contextlib.aclosing``."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # `is_finalizing` is a default: see `Collector`.
    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():
            try:
                self.close()
            except AttributeError:  # __init__ was interrupted
                pass
            except BaseException:  # Ctrl-C; nothing else would close it
                self.close()
                raise
