"""The loops of the soak test, behind one face, and what a wait in one of them gives."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError
from typing import NamedTuple

import gevent
import gevent.event
import trio

from polars_async import QueryTimeoutError

LEAVING = (trio.Cancelled, gevent.GreenletExit, gevent.Timeout)
NOISE = []
"""Takes what asyncio's own handler of errors is told."""


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


def telling(begun, call):
    """Have `call` set `begun`: a task that is killed before that never waits for anything."""

    async def tell():
        begun.set()
        return await call()

    return tell


class Asyncio:
    has_streams = True

    def run(self, main):
        async def heard():
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: NOISE.append(context))
            return await main()

        return asyncio.run(heard())

    async def wait(self, handle):
        return await handle

    async def sleep(self, seconds):
        await asyncio.sleep(seconds)

    async def each(self, calls):
        return await asyncio.gather(*(call() for call in calls))

    async def within(self, seconds, call):
        try:
            async with asyncio.timeout(seconds):
                return await call()
        except TimeoutError:
            return Outcome("left")

    async def killed_after(self, seconds, call):
        begun = asyncio.Event()
        task = asyncio.create_task(telling(begun, call)())
        await begun.wait()
        await asyncio.sleep(seconds)
        task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return Outcome("left")


class Trio:
    has_streams = True

    def run(self, main):
        return trio.run(main)

    async def wait(self, handle):
        return await handle

    async def sleep(self, seconds):
        await trio.sleep(seconds)

    async def each(self, calls):
        outcomes = {}

        async def note(number, call):
            outcomes[number] = await call()

        async with trio.open_nursery() as nursery:
            for number, call in enumerate(calls):
                nursery.start_soon(note, number, call)
        return [outcomes[number] for number in range(len(calls))]

    async def within(self, seconds, call):
        with trio.move_on_after(seconds):
            return await call()
        return Outcome("left")

    async def killed_after(self, seconds, call):
        outcome = Outcome("left")
        scope = trio.CancelScope()

        begun = trio.Event()

        async def note():
            nonlocal outcome
            with scope:
                outcome = await telling(begun, call)()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(note)
            await begun.wait()
            await trio.sleep(seconds)
            scope.cancel()
        return outcome


class Gevent:
    """Coroutines that never suspend: what they await blocks their greenlet."""

    has_streams = False

    def run(self, main):
        try:
            main().send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError("a coroutine suspended")

    async def wait(self, handle):
        return handle.get()

    async def sleep(self, seconds):
        gevent.sleep(seconds)

    async def each(self, calls):
        greenlets = [gevent.spawn(self.run, call) for call in calls]
        return [greenlet.get() for greenlet in greenlets]

    async def within(self, seconds, call):
        with gevent.Timeout(seconds, exception=False):
            return await call()
        return Outcome("left")

    async def killed_after(self, seconds, call):
        begun = gevent.event.Event()
        greenlet = gevent.spawn(self.run, telling(begun, call))
        begun.wait()
        gevent.sleep(seconds)
        greenlet.kill()
        outcome = greenlet.get()
        return outcome if isinstance(outcome, Outcome) else Outcome("left")


LOOPS = {"asyncio": Asyncio, "trio": Trio, "gevent": Gevent}
