"""What a query leaves behind: nothing, once nobody holds its handle or its error."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
import trio
from conftest import TINY
from places import until


class Failure(Exception):  # noqa: N818  # unlike the built-in ones it takes weak references
    pass


class Local:
    """What a UDF's frame holds."""


@pytest.fixture(autouse=True)
def _without_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def failing(seen):
    def fail(df):  # noqa: ARG001
        local = Local()
        seen.append(weakref.ref(local))
        raise Failure

    return TINY.map_batches(fail)


def noting(seen, lf=TINY):
    return lf.map_batches(lambda df: (seen.append(weakref.ref(df)), df)[1])


async def await_last(box):
    try:
        await box.pop()  # no frame of the test may hold the handle, or it would make the cycle
    except Failure:
        return True


def call_last(method, box):
    try:
        getattr(box.pop(), method)()
    except Failure:
        return True


@pytest.mark.parametrize(
    "way",
    [
        lambda box: asyncio.run(await_last(box)),
        lambda box: trio.run(await_last, box),
        lambda box: call_last("result", box),
        lambda box: call_last("get", box),
    ],
    ids=["asyncio", "trio", "result", "gevent"],
)
def test_error_and_its_frames_are_freed_with_handle_and_error(collector, way):
    seen = []
    handle = collector.collect_async(failing(seen), gevent=True)
    query = weakref.ref(handle._query)
    box = [handle]
    del handle
    assert way(box)
    until(lambda: query() is None)  # the thread lets go a moment after it has told the end
    assert seen[0]() is None


def test_result_of_a_query_that_was_cancelled_is_freed_at_its_end(collector, blocked):
    seen = []
    handle = collector.collect_async(noting(seen, blocked.lf))
    assert blocked.started.wait(30)
    handle.cancel()
    blocked.gate.set()
    until(lambda: handle._query._outcome.value is None and seen and seen[0]() is None)


def test_cancelled_query_in_the_queue_frees_its_plan(collector, blocked):
    collector.collect_async(blocked.lf)
    local = Local()
    alive = weakref.ref(local)
    handle = collector.collect_async(TINY.map_batches(lambda df, _=local: df))
    del local
    assert alive() is not None
    handle.cancel()
    assert alive() is None


def test_kept_error_does_not_keep_the_queries_that_ran_after_it(collector, blocked):
    def error_of(box):
        try:
            box.pop().result()
        except Failure as error:
            return error

    collector.collect_async(blocked.lf)
    box = [collector.collect_async(failing([]))]
    last = collector.collect_async(TINY)  # served by the same call as those before it
    blocked.gate.set()
    query = weakref.ref(last._query)
    last.result()
    del last
    error = error_of(box)
    assert type(error) is Failure
    until(lambda: query() is None)


def test_idle_thread_keeps_nothing_of_its_last_query(collector):
    query = weakref.ref(collector.collect_async(TINY)._query)
    while query() is not None:
        pass  # the thread lets go a moment after it has told that it is done
