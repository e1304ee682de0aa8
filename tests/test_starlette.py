"""The helper for Starlette: a client who leaves takes the query along."""

from __future__ import annotations

import asyncio
import gc
import weakref

import anyio
import pytest
from places import TINY, Failure, until
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from polars_async import QueryTimeoutError
from polars_async.starlette import unless_disconnected


@pytest.fixture(params=["asyncio", "trio"])
def run(request):
    """Run an async function on each loop that Starlette supports."""
    return lambda main, *arguments: anyio.run(main, *arguments, backend=request.param)


class Client:
    """A client of one request, which leaves once it is told to."""

    def __init__(self):
        self.left = anyio.Event()
        self.sent = []
        self.asked = False

    async def receive(self):
        if not self.asked:
            self.asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    @property
    def answer(self):
        start, body = self.sent
        return start["status"], body["body"]


SCOPE = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}


def service(make_query):
    async def answer(request):
        frame = await unless_disconnected(request, make_query())
        return Response(frame.write_json())

    return Starlette(routes=[Route("/", answer)])


async def ask(app, client):
    await app({**SCOPE, "app": app}, client.receive, client.send)


def test_result_is_that_of_the_query(run, collector):
    async def main():
        client = Client()
        await ask(service(lambda: collector.collect_async(TINY)), client)
        return client.answer

    assert run(main) == (200, b'[{"a":1}]')


def test_client_who_leaves_ends_the_query_and_nothing_is_raised(run, collector, blocked):
    async def main():
        client = Client()
        async with anyio.create_task_group() as group:
            group.start_soon(ask, service(lambda: collector.collect_async(blocked.lf)), client)
            assert await anyio.to_thread.run_sync(blocked.started.wait, 30)
            client.left.set()
        return client.answer

    assert run(main) == (499, b"the client has left")
    assert collector.stats()["cancelled"] == 1


def test_client_who_has_left_long_ago_starts_nothing_that_waits(run, collector, blocked):
    collector.collect_async(blocked.lf)
    assert blocked.started.wait(30)

    async def main():
        client = Client()
        client.left.set()
        await ask(service(lambda: collector.collect_async(TINY)), client)
        return client.answer

    assert run(main)[0] == 499
    assert collector.stats()["waiting"] == 0


class Request:
    """A request whose client stays."""

    async def receive(self):
        await anyio.sleep_forever()


def test_error_of_the_query_is_raised_unchanged_and_kept_by_nothing(run, collector):
    def fail(_):
        raise Failure("no")

    async def main():
        try:
            await unless_disconnected(Request(), collector.collect_async(TINY.map_batches(fail)))
        except Failure as error:
            return weakref.ref(error)

    gc.collect()
    gc.disable()
    try:
        found = run(main)
        until(lambda: found() is None)
    finally:
        gc.enable()


def test_time_out_is_that_of_the_query(run, collector, blocked):
    async def main():
        query = collector.collect_async(blocked.lf, timeout=0.01)
        with pytest.raises(QueryTimeoutError):
            await ask(service(lambda: query), Client())

    run(main)


def test_cancelled_request_cancels_the_query_and_stays_cancelled(run, collector, blocked):
    async def main():
        client = Client()
        app = service(lambda: collector.collect_async(blocked.lf))
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(ask, app, client)
                assert await anyio.to_thread.run_sync(blocked.started.wait, 30)
                scope.cancel()
        return scope.cancelled_caught, client.sent

    assert run(main) == (True, [])
    assert collector.stats()["cancelled"] == 1


def test_query_that_another_task_cancels_is_cancelled_here(collector, blocked):
    async def main():
        query = collector.collect_async(blocked.lf)
        asking = asyncio.create_task(ask(service(lambda: query), Client()))
        assert await asyncio.to_thread(blocked.started.wait, 30)
        query.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(main())
