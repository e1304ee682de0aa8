from __future__ import annotations

import asyncio
import math
import re
import sys
import threading
import traceback
from concurrent.futures import CancelledError, ThreadPoolExecutor

import inside
import polars as pl
import pytest
import trio
from places import TINY, Notes
from polars.exceptions import ColumnNotFoundError
from polars.lazyframe.in_process import InProcessQuery

import polars_async as pa
from polars_async import Collector
from polars_async.scheduling.query import Query


class Failure(Exception):  # noqa: N818
    pass


def failing():
    def fail(df):  # noqa: ARG001
        raise Failure("no")

    return TINY.map_batches(fail)


@pytest.fixture
def waited(monkeypatch):
    """A semaphore that is released whenever somebody begins to wait for a query."""
    semaphore = threading.Semaphore(0)
    add_waiter = Query.add_waiter

    def add(query, waiter):
        added = add_waiter(query, waiter)
        semaphore.release()
        return added

    monkeypatch.setattr(Query, "add_waiter", add)
    return semaphore


def await_in_asyncio(handle):
    async def main():
        try:
            return await handle
        except BaseException as error:  # noqa: BLE001
            return error

    return asyncio.run(main())


def await_in_trio(handle):
    async def main():
        try:
            return await handle
        except BaseException as error:  # noqa: BLE001
            return error

    return trio.run(main)


def result_in_thread(handle):
    try:
        return handle.result()
    except BaseException as error:  # noqa: BLE001
        return error


def get_in_gevent(handle):
    try:
        return handle.get()
    except BaseException as error:  # noqa: BLE001
        return error


WAYS = {
    "asyncio": await_in_asyncio,
    "trio": await_in_trio,
    "result": result_in_thread,
    "gevent": get_in_gevent,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


# The same outcome, as often as wanted


@pytest.mark.everywhere(way=await_in_asyncio)
@every_way
def test_every_wait_gives_the_same_object(collector, way):
    handle = collector.collect_async(TINY, gevent=True)
    first = way(handle)
    assert first.equals(TINY.collect())
    assert all(each(handle) is first for each in WAYS.values())


@pytest.mark.everywhere(way=await_in_asyncio)
@every_way
def test_every_wait_raises_the_same_error_with_a_traceback_that_does_not_grow(collector, way):
    handle = collector.collect_async(failing(), gevent=True)
    first = way(handle)
    frames = [each.name for each in traceback.extract_tb(first.__traceback__)]
    assert type(first) is Failure
    assert str(first) == "no"
    assert re.search(
        r"line \d+, in fail$", "".join(traceback.format_exception(first)), re.MULTILINE
    )
    assert "run" not in frames
    for _ in range(3):
        assert way(handle) is first
        assert [each.name for each in traceback.extract_tb(first.__traceback__)] == frames
    assert first.__context__ is None


def test_awaiting_inside_one_coroutine_again_does_not_grow_the_traceback(collector):
    handle = collector.collect_async(failing())

    async def main():
        depths = []
        for _ in range(3):
            with pytest.raises(Failure) as caught:
                await handle
            depths.append(len(caught.traceback))
        return depths

    assert len(set(asyncio.run(main()))) == 1


@pytest.mark.everywhere
def test_polars_own_error_passes_through_unchanged(collector):
    handle = collector.collect_async(TINY.select("b"))
    assert type(await_in_asyncio(handle)) is ColumnNotFoundError


@pytest.mark.everywhere(error=GeneratorExit)
@pytest.mark.parametrize("error", [StopIteration, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_errors_that_mean_something_to_python_itself_arrive(collector, error):
    def fail(df):  # noqa: ARG001
        raise error

    handle = collector.collect_async(TINY.map_batches(fail))
    with pytest.raises(error):
        handle.result()
    with pytest.raises(error):
        collector.collect_background(TINY.map_batches(fail)).fetch_blocking()
    assert collector.collect_async(TINY).result().item() == 1


# Who waits, and where


def test_many_tasks_await_one_handle(collector, blocked):
    async def main():
        handle = collector.collect_async(blocked.lf)

        async def wait():
            return await handle

        tasks = [asyncio.create_task(wait()) for _ in range(20)]
        await asyncio.sleep(0)
        blocked.gate.set()
        return await asyncio.gather(*tasks)

    assert len(set(map(id, asyncio.run(main())))) == 1


def test_threads_and_loops_wait_for_one_handle(collector, blocked, waited):
    handle = collector.collect_async(blocked.lf)
    ways = [await_in_asyncio, await_in_trio, result_in_thread] * 3
    with ThreadPoolExecutor(len(ways)) as pool:
        futures = [pool.submit(way, handle) for way in ways]
        for _ in ways:
            assert waited.acquire(timeout=30)
        assert not handle.done()
        blocked.gate.set()
        assert len({id(future.result(30)) for future in futures}) == 1


def test_query_lives_until_its_last_awaiter_leaves(collector, blocked):
    async def main():
        handle = collector.collect_async(blocked.lf)

        async def wait():
            await handle

        first, last = (asyncio.create_task(wait()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        assert not handle.done()
        last.cancel()
        await asyncio.wait([last])
        assert handle.done()
        assert first.cancelled()
        assert last.cancelled()
        return handle

    handle = asyncio.run(main())
    with pytest.raises(CancelledError):
        handle.result()


def test_thread_that_waits_keeps_a_query_that_its_task_has_left(collector, blocked, waited):
    handle = collector.collect_async(blocked.lf)

    async def wait():
        await handle

    async def main():
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(handle.result)
            assert waited.acquire(timeout=30)
            task = asyncio.create_task(wait())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert not handle.done()
            blocked.gate.set()
            assert future.result(30).item() == 1

    asyncio.run(main())


def test_handle_made_in_another_thread_is_awaited_here(collector):
    with ThreadPoolExecutor(1) as pool:
        handle = pool.submit(collector.collect_async, TINY).result()
    assert await_in_asyncio(handle) is await_in_trio(handle)


def test_handle_made_before_any_loop_runs_is_awaited_in_several(collector, blocked):
    handle = collector.collect_async(blocked.lf)
    blocked.gate.set()
    frame = asyncio.run(ensure(handle))
    assert asyncio.run(ensure(handle)) is frame
    assert trio.run(ensure, handle) is frame


async def ensure(handle):
    return await handle


@pytest.mark.parametrize("done", [True, False])
def test_awaiting_where_no_loop_runs_says_what_to_do(collector, blocked, done):
    handle = collector.collect_async(TINY if done else blocked.lf)
    if done:
        handle.result()
    with pytest.raises(RuntimeError, match=r"neither asyncio nor trio runs.*call result\(\)") as e:
        handle.__await__().send(None)
    assert e.value.__suppress_context__
    blocked.gate.set()
    assert handle.result().item() == 1


# With a timeout


@pytest.mark.parametrize("timeout", [0, -1, 0.001])
def test_result_in_no_time_is_a_timeout_and_can_be_asked_again(collector, blocked, timeout):
    handle = collector.collect_async(blocked.lf)
    for _ in range(2):
        with pytest.raises(TimeoutError, match=f"not done after {timeout} s; it goes on"):
            handle.result(timeout)
    assert not handle.done()
    assert not inside.waiters(handle)
    blocked.gate.set()
    assert handle.result().item() == 1
    assert handle.result(timeout).item() == 1


@pytest.mark.parametrize("timeout", [None, math.inf, 1e300, threading.TIMEOUT_MAX])
def test_result_waits_as_long_as_it_takes(collector, blocked, waited, timeout):
    handle = collector.collect_async(blocked.lf)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(handle.result, timeout)
        assert waited.acquire(timeout=30)
        blocked.gate.set()
        assert future.result(30).item() == 1


# cancel and done


def test_cancel_before_it_runs_takes_it_out_of_the_queue(collector, blocked):
    ran = Notes()
    collector.collect_async(blocked.lf)
    handle = collector.collect_async(TINY.map_batches(ran.append))
    assert inside.waiting(collector) == 1
    assert not handle.done()
    assert handle.cancel()
    assert inside.waiting(collector) == 0
    assert handle.done()
    assert not handle.cancel()
    blocked.gate.set()
    collector.close()
    assert not ran
    with pytest.raises(CancelledError, match="the query was cancelled"):
        handle.result()


@pytest.mark.everywhere
def test_cancel_while_it_runs_tells_at_once(collector, blocked):
    handle = collector.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    assert handle.cancel()
    assert not handle.cancel()
    assert type(result_in_thread(handle)) is CancelledError
    blocked.gate.set()
    assert collector.collect_async(TINY).result().item() == 1
    assert type(result_in_thread(handle)) is CancelledError


@pytest.mark.everywhere
@pytest.mark.cannot("threads", because="Polars cannot stop a query", runs=False)
def test_cancel_while_it_runs_gives_the_slot_back(collector, blocked):
    handle = collector.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    assert handle.cancel()
    assert collector.collect_async(TINY).result().item() == 1
    stats = collector.stats()
    assert (stats["running"], stats["abandoned"], stats["cancelled"]) == (0, 0, 1)
    assert not blocked.gate.is_set()


def test_cancel_while_it_runs_keeps_the_slot(collector, blocked):
    handle = collector.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    assert handle.cancel()
    following = collector.collect_async(TINY)
    assert (inside.running(collector), inside.waiting(collector)) == (1, 1)
    blocked.gate.set()
    assert following.result().item() == 1
    assert type(result_in_thread(handle)) is CancelledError


def test_cancel_after_the_end_changes_nothing(collector):
    handle = collector.collect_async(TINY)
    frame = handle.result()
    assert handle.done()
    assert not handle.cancel()
    assert handle.result() is frame


@pytest.mark.parametrize(
    ("way", "error"),
    [
        (await_in_asyncio, asyncio.CancelledError),
        (await_in_trio, CancelledError),
        (result_in_thread, CancelledError),
        (get_in_gevent, CancelledError),
    ],
)
def test_cancel_tells_whoever_waits(collector, blocked, waited, way, error):
    handle = collector.collect_async(blocked.lf, gevent=True)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(way, handle)
        assert waited.acquire(timeout=30)
        assert handle.cancel()
        assert type(future.result(30)) is error


# In the background


def test_background_query_is_fetched(collector, blocked):
    query = collector.collect_background(blocked.lf)
    assert isinstance(query, InProcessQuery)
    assert query.fetch() is None
    blocked.gate.set()
    frame = query.fetch_blocking()
    assert frame.item() == 1
    assert query.fetch() is frame


def test_background_query_raises_what_the_query_raised(collector):
    query = collector.collect_background(failing())
    for fetch in (query.fetch_blocking, query.fetch):
        with pytest.raises(Failure):
            fetch()


def test_cancelled_background_query_says_so(collector, blocked):
    query = collector.collect_background(blocked.lf)
    query.cancel()
    query.cancel()
    for fetch in (query.fetch_blocking, query.fetch):
        with pytest.raises(CancelledError):
            fetch()


def test_handle_tells_its_resolution(collector):
    handle = collector.collect_async(TINY, engine="streaming")
    assert handle.resolution.name == "streaming"
    assert isinstance(handle.resolution.engine, pl.StreamingEngine)


# Without gevent


def test_every_handle_can_be_waited_for_by_greenlets():
    with Collector() as collector:
        assert collector.collect_async(TINY).get(timeout=30).item() == 1


def test_missing_gevent_is_named_with_its_remedy_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gevent", None)
    remedy = r"needs gevent: install it, or polars-async\[gevent\]$"
    with Collector() as collector:
        with pytest.raises(ImportError, match=rf"^gevent=True {remedy}") as caught:
            collector.collect_async(TINY, gevent=True)
        assert caught.value.name == "gevent"
        assert collector.stats()["submitted"] == 0
        with pytest.raises(ImportError, match=rf"^get\(\) {remedy}"):
            collector.collect_async(TINY).get()


# repr


def test_handles_and_streams_show_query_state_and_engine(blocked):
    with Collector(max_running=1) as collector:
        running = collector.collect_async(blocked.lf, label="slow", engine="streaming")
        assert blocked.started.wait(30)
        waiting = collector.collect_background(TINY)
        batches = collector.collect_batches_async(TINY, engine="streaming")
        each = collector.as_completed([TINY, TINY])
        shown = [re.sub(r"query \d+", "query N", repr(one)) for one in (running, waiting, batches)]
        assert shown == [
            "<QueryHandle: query N 'slow', running, streaming engine>",
            f"<BackgroundQuery: query N, waiting, {pa.resolve_engine().name} engine>",
            "<ResultStream: batches of query N, waiting, streaming engine>",
        ]
        assert repr(each) == "<ResultStream: 2 results to come>"
        running.cancel()
        assert ", cancelled, " in repr(running)
        blocked.gate.set()


@pytest.mark.parametrize(
    ("ask", "where"),
    [("threads", "threads"), ("auto", "auto"), (ThreadPoolExecutor(1), "ThreadPoolExecutor")],
    ids=["threads", "auto", "another"],
)
def test_collector_shows_its_executor_and_its_load(blocked, ask, where):
    collector = Collector(executor=ask, max_running=1)
    assert repr(collector) == f"<Collector on {where}: 0 running, 0 waiting>"
    assert repr(pa.AsyncEngine(collector)) == f"AsyncEngine({collector!r})"
    if where == "threads":
        collector.collect_async(blocked.lf)
        collector.collect_async(TINY)
        assert repr(collector) == "<Collector on threads: 1 running, 1 waiting>"
        blocked.gate.set()
    collector.close()
    assert repr(collector) == f"<Collector on {where}: 0 running, 0 waiting, closed>"


def test_collector_that_was_refused_can_be_shown():
    collector = Collector.__new__(Collector)
    with pytest.raises(ValueError, match="max_running"):
        collector.__init__(max_running=0)
    assert repr(collector) == "<Collector>"
