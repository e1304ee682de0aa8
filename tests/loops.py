"""Loops of asyncio, trio and gevent behind one face: what tests do in each of them."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import CancelledError
from functools import partial

import gevent
import pytest
import trio
import uvloop

from polars_async._runtime import unpatched
from polars_async.bridges import asyncio as asyncio_bridge
from polars_async.bridges import gevent as gevent_bridge
from polars_async.bridges import trio as trio_bridge

LEFT = object()
"""What comes of a call that was cancelled, or whose time was up."""

TOLD = []
"""What asyncio's own handler of errors was told."""


def fixture_of(*kinds):
    """Make a fixture `loop` of each kind, which shows in the end that no error went astray."""

    @pytest.fixture(params=kinds, ids=[kind.__name__.lower() for kind in kinds])
    def loop(request):
        yield request.param()
        gc.collect()  # what was never retrieved is told of now
        assert TOLD == []

    return loop


class Loop:
    """What is the same in all of them. Each `run` is in a new loop."""

    uses_gevent = False
    is_enough_on_threads = True

    async def wait(self, handle):
        return await handle

    async def each(self, calls):
        """Run async functions at once, and return their results in order."""
        found = {}

        async def note(number, call):
            found[number] = await call()

        await self.together(*(partial(note, number, call) for number, call in enumerate(calls)))
        return [found[number] for number in range(len(found))]

    async def cancel_when(self, ready, function):
        async def moment():
            while not ready():
                await self.sleep(0.001)

        assert await self.cancel_after(moment, function) is LEFT

    def inside(self, call):
        """Call `call` inside of a loop, which then ends."""

        async def main():
            return call()

        return self.run(main)

    def outcome(self, handle):
        """Return what a task that waits for `handle` is given, or the error that it sees."""

        async def caught():
            try:
                return await self.wait(handle)
            except BaseException as error:  # noqa: BLE001  # of every kind
                return error

        return self.run(self.each, [caught])[0]

    def reset_after_fork(self, handle, meanwhile=lambda: None):
        """Wait for `handle`, do `meanwhile`, cancel the wait, and end the loop."""

        async def moment():
            meanwhile()

        assert self.run(self.cancel_after, moment, partial(self.wait, handle)) is LEFT


class Asyncio(Loop):
    bridge = asyncio_bridge
    cancelled = asyncio.CancelledError
    is_enough_on_threads = False
    new_loop = staticmethod(asyncio.new_event_loop)

    def run(self, main, *arguments):
        async def heard():
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: TOLD.append(context))
            return await main(*arguments)

        with asyncio.Runner(loop_factory=self.new_loop) as runner:
            return runner.run(heard())

    async def sleep(self, seconds):
        await asyncio.sleep(seconds)

    async def together(self, *functions):
        async with asyncio.TaskGroup() as group:
            for function in functions:
                group.create_task(function())

    async def within(self, seconds, function):
        try:
            async with asyncio.timeout(seconds):
                return await function()
        except TimeoutError:
            return LEFT

    async def cancel_after(self, moment, function):
        """Cancel `function`, which has begun, after `moment`; return its result or LEFT."""
        task = asyncio.create_task(function())
        await asyncio.sleep(0)
        await moment()
        task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return LEFT


class Uvloop(Asyncio):
    """Asyncio with another loop, for what this one does in its own way: wake-ups and its end."""

    new_loop = staticmethod(uvloop.new_event_loop)


class Trio(Loop):
    bridge = trio_bridge
    cancelled = CancelledError

    def run(self, main, *arguments):
        return trio.run(main, *arguments)

    async def sleep(self, seconds):
        await trio.sleep(seconds)

    async def together(self, *functions):
        async with trio.open_nursery() as nursery:
            for function in functions:
                nursery.start_soon(function)

    async def within(self, seconds, function):
        with trio.move_on_after(seconds):
            return await function()
        return LEFT

    async def cancel_after(self, moment, function):
        found = LEFT
        begun, scope = trio.Event(), trio.CancelScope()

        async def call():
            nonlocal found
            begun.set()
            with scope:
                found = await function()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await begun.wait()
            await moment()
            scope.cancel()
        return found


class Gevent(Loop):
    """Its coroutines never suspend: what they await blocks their greenlet."""

    uses_gevent = True
    bridge = gevent_bridge

    def run(self, main, *arguments):
        """Run `main` on a thread that has its own hub, which is destroyed."""
        outcome = unpatched.SimpleQueue()

        def thread():
            outcome.put(self.drive(main, *arguments))
            gevent.get_hub().destroy(destroy_loop=True)
            outcome.put(None)

        unpatched.start_new_thread(thread, ())
        value = outcome.get(timeout=40)
        outcome.get(timeout=20)
        return value

    def drive(self, main, *arguments):
        try:
            main(*arguments).send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError("a coroutine suspended")

    def outcome(self, handle):
        def caught():  # no coroutine, which lets no StopIteration through
            try:
                return handle.get()
            except BaseException as error:  # noqa: BLE001  # as above
                return error

        return self.inside(lambda: gevent.spawn(caught).get())

    async def wait(self, handle):
        return handle.get()

    async def sleep(self, seconds):
        gevent.sleep(seconds)

    async def together(self, *functions):
        greenlets = [gevent.spawn(self.drive, function) for function in functions]
        gevent.joinall(greenlets, raise_error=True)

    async def within(self, seconds, function):
        with gevent.Timeout(seconds, exception=False):
            return await function()
        return LEFT

    async def cancel_after(self, moment, function):
        greenlet = gevent.spawn(self.drive, function)
        gevent.sleep(0)
        await moment()
        greenlet.kill()
        found = greenlet.get()
        return LEFT if isinstance(found, gevent.GreenletExit) else found
