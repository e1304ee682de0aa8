"""Results that arrive on many threads, handed to a loop in one wake-up."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Mailbox(Generic[T]):
    """
    What one loop still has to be told.

    Any thread posts, only the loop's own delivers. An item is appended before `_armed` is read, and
    `_armed` is taken back before the items are: whoever reads it as set knows that the delivery to
    come finds the item. Two threads that both read it as not set cost one idle wake-up.
    """

    __slots__ = ("__weakref__", "_armed", "_deliver", "_items")

    def __init__(self, deliver: Callable[[T], object]) -> None:
        self._deliver = deliver
        self._items: deque[T] = deque()
        self._armed = False

    def post(self, item: T, call_soon: Callable[[Callable[[], None]], object]) -> None:
        """Have `item` delivered; `call_soon` is how the loop lets other threads call on it."""
        self._items.append(item)
        if not self._armed:
            try:
                self._armed = True
                call_soon(partial(self._empty, call_soon))
            except RuntimeError:
                # The loop is over. What is left for it holds it, and would keep it for ever.
                self._armed = False
                self._items.clear()
                raise
            except BaseException:  # out of a signal handler: the item is posted again
                self._armed = False
                raise

    def _empty(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        try:
            self._armed = False
            while self._items:
                self._deliver(self._items[0])
                self._items.popleft()
        except BaseException:  # out of a signal handler: the loop may go on, or be run again
            call_soon(partial(self._empty, call_soon))
            raise
