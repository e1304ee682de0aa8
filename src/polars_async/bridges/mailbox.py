"""Results from many threads, delivered to a loop in one wake-up."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Mailbox(Generic[T]):
    """
    Items that are to be delivered to one loop.

    Any thread posts, the loop's thread alone delivers. `_armed` says that a delivery is scheduled.
    There is no lock, and still no item is missed: `post` appends the item before it reads `_armed`,
    and a delivery clears `_armed` before it looks for items. So a thread that reads `_armed` as
    true knows that a delivery is still to look for items, and will find this one. Two threads may
    both read it as false, and schedule a delivery each: the second one finds nothing to do.
    """

    __slots__ = ("__weakref__", "_armed", "_deliver", "_items")

    def __init__(self, deliver: Callable[[T], object]) -> None:
        self._deliver = deliver
        self._items: deque[T] = deque()
        self._armed = False

    def post(self, item: T, call_soon: Callable[[Callable[[], None]], object]) -> None:
        """Deliver `item` soon; `call_soon` schedules a call on the loop from any thread."""
        self._items.append(item)
        if not self._armed:
            try:
                # Set before the call is scheduled: the loop may make it at once, and clear this.
                # The other way round, this would stay set after that delivery, and no later post
                # would schedule another one.
                self._armed = True
                call_soon(partial(self._deliver_all, call_soon))
            except RuntimeError:
                # The loop is closed. The items refer to it, and would keep it in memory for ever.
                self._armed = False
                self._items.clear()
                raise
            except BaseException:  # out of a signal handler: the item is posted again
                self._armed = False
                raise

    def _deliver_all(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        try:
            self._armed = False
            while self._items:
                # Removed only after its delivery: a signal handler may raise in between. The item
                # is delivered twice then, which does nothing, and never lost.
                self._deliver(self._items[0])
                self._items.popleft()
        except BaseException:  # out of a signal handler: the loop may go on, or be run again
            call_soon(partial(self._deliver_all, call_soon))
            raise
