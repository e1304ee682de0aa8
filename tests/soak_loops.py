"""What a wait in one of the loops of the soak test gives."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError
from functools import partial
from typing import NamedTuple

import gevent
import loops
import trio

from polars_async import QueryTimeoutError

LEAVING = (trio.Cancelled, gevent.GreenletExit, gevent.Timeout)


class Outcome(NamedTuple):
    """What came of a query, or of one wait for it."""

    kind: str  # value, error, cancelled, late; of a wait also left
    what: object = None


def outcome_of(error):
    if isinstance(error, QueryTimeoutError):
        return Outcome("late", error)
    if isinstance(error, (asyncio.CancelledError, CancelledError)):
        return Outcome("cancelled", error)
    if isinstance(error, LEAVING):
        return Outcome("left", error)
    stops = (StopIteration, StopAsyncIteration)
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, stops):
        return Outcome("error", error.__cause__)  # no coroutine, or no iterator, lets it through
    return Outcome("error", error)


async def waited(loop, handle):
    try:
        return Outcome("value", await loop.wait(handle))
    except BaseException as error:  # noqa: BLE001  # every kind is what this is about
        return outcome_of(error)


def blocked(handle, timeout=None):
    """Wait as `waited` does, on a plain thread."""
    try:
        return Outcome("value", handle.result(timeout))
    except QueryTimeoutError as error:
        return Outcome("late", error)
    except TimeoutError as error:
        return Outcome("left", error)
    except BaseException as error:  # noqa: BLE001  # as above
        return outcome_of(error)


class Soaked:
    """A loop of which each wait gives an `Outcome`."""

    has_streams = True

    async def within(self, seconds, call):
        found = await super().within(seconds, call)
        return Outcome("left") if found is loops.LEFT else found

    async def killed_after(self, seconds, call):
        found = await self.cancel_after(partial(self.sleep, seconds), call)
        return Outcome("left") if found is loops.LEFT else found


class Asyncio(Soaked, loops.Asyncio):
    pass


class Trio(Soaked, loops.Trio):
    pass


class Gevent(Soaked, loops.Gevent):
    has_streams = False

    def run(self, main):
        """Run `main` on this thread, with the hub that it has."""
        return self.drive(main)


LOOPS = {"asyncio": Asyncio, "trio": Trio, "gevent": Gevent}
