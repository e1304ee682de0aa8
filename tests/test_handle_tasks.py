"""Tasks that are made of a handle itself, as of a coroutine."""

from __future__ import annotations

import asyncio
import threading

import inside
import polars as pl
import pytest
import trio
import uvloop
from places import TINY, Failure, until

from polars_async import Collector, QueryTimeoutError

pytestmark = pytest.mark.smoke


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request):
    """Run a coroutine on each loop, which has no errors to complain about."""

    def run(coroutine):
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(coroutine)

    return run


def failing(error):
    def fail(_):
        raise error

    return TINY.map_batches(fail)


async def started(query):
    assert await asyncio.to_thread(query.started.wait, 30)


@pytest.mark.everywhere
def test_task_group_takes_a_handle(run, collector):
    async def main():
        async with asyncio.TaskGroup() as group:
            one = group.create_task(collector.collect_async(TINY))
            all_ = group.create_task(collector.collect_all_async([TINY, TINY]))
        return one.result(), all_.result()

    one, all_ = run(main())
    assert one.item() == 1
    assert len(all_) == 2


def test_loop_runs_a_handle(collector):
    assert asyncio.run(collector.collect_async(TINY)).item() == 1


def test_query_that_runs_inline_takes_part(run):
    with Collector(inline=10) as collector:
        lf = pl.LazyFrame({"a": [1]})
        for _ in range(20):
            collector.collect_async(lf).result(30)

        async def main():
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(collector.collect_async(lf)) for _ in range(20)]
            return [each.result().item() for each in tasks]

        assert run(main()) == [1] * 20


def test_several_tasks_of_one_handle_have_one_result(run, collector, blocked):
    async def main():
        handle = collector.collect_async(blocked.lf)
        tasks = [asyncio.create_task(handle) for _ in range(5)]
        await started(blocked)
        assert await asyncio.wait(tasks, timeout=0.01) == (set(), set(tasks))
        blocked.gate.set()
        return [await each for each in (*tasks, handle)]

    found = run(main())
    assert len(found) == 6
    assert all(each is found[0] for each in found)


def test_tasks_of_one_handle_in_two_loops_have_one_result(collector, blocked):
    handle = collector.collect_async(blocked.lf)
    found = []
    threads = [threading.Thread(target=lambda: found.append(asyncio.run(handle))) for _ in range(4)]
    for each in threads:
        each.start()
    until(lambda: len(handle._query._waiters) == 4)
    blocked.gate.set()
    for each in threads:
        each.join(30)
    assert len(found) == 4
    assert all(each is found[0] for each in found)


def test_cancelled_task_cancels_the_query(run, collector, blocked):
    async def main():
        handle = collector.collect_async(blocked.lf)
        task = asyncio.create_task(handle)
        await started(blocked)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return handle

    assert run(main()).done()
    assert collector.stats()["cancelled"] == 1


def test_query_goes_on_for_the_other_task(run, collector, blocked):
    async def main():
        handle = collector.collect_async(blocked.lf)
        one, other = asyncio.create_task(handle), asyncio.create_task(handle)
        await started(blocked)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        assert not handle.done()
        blocked.gate.set()
        return await other

    assert run(main()).height == 1


def test_task_that_is_cancelled_before_it_has_begun_cancels_the_query(run, collector, blocked):
    async def main():
        task = asyncio.create_task(collector.collect_async(blocked.lf))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert collector.stats()["cancelled"] == 1


def test_failure_in_a_group_cancels_the_queries_of_the_others(run, make, block):
    collector, blocked = make(max_running=2), block()

    async def group_of_two():
        async with asyncio.TaskGroup() as group:
            group.create_task(collector.collect_async(blocked.lf))
            await started(blocked)
            group.create_task(collector.collect_async(failing(Failure("no")), priority=1))

    async def main():
        with pytest.raises(ExceptionGroup) as caught:
            await group_of_two()
        return caught.value.exceptions

    [error] = run(main())
    assert (type(error), str(error)) == (Failure, "no")
    assert collector.stats()["cancelled"] == 1


def test_closed_handle_is_let_go(collector, blocked):
    handle = collector.collect_async(blocked.lf)
    handle.close()  # as a task group does that takes no more tasks
    assert handle.done()
    assert collector.stats()["cancelled"] == 1
    done = collector.collect_async(TINY)
    blocked.gate.set()
    done.result(30)
    done.close()
    assert done.result().item() == 1


def test_time_out_is_raised_in_the_task(run, collector, blocked):
    async def main():
        with pytest.raises(QueryTimeoutError):
            await asyncio.create_task(collector.collect_async(blocked.lf, timeout=0.01))

    run(main())


@pytest.mark.parametrize("end", ["result", "error", "cancelled"])
def test_handle_keeps_nothing_of_tasks_that_are_done(run, collector, blocked, end):
    error = Failure("no")

    def wait_and_end(frame):
        blocked.gate.wait()
        if end == "error":
            raise error
        return frame

    async def main():
        handle = collector.collect_async(TINY.map_batches(wait_and_end))
        tasks = [asyncio.create_task(handle) for _ in range(3)]
        while len(handle._query._waiters) < 3:  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.001)
        assert len(handle._awaits) == 3
        if end == "cancelled":
            handle.cancel()
        blocked.gate.set()
        await asyncio.wait(tasks)
        return handle._awaits, [each.cancelled() or each.exception() for each in tasks]

    awaits, ends = run(main())
    assert awaits == {}
    assert ends == [{"result": None, "error": error, "cancelled": True}[end]] * 3


def test_nursery_of_trio_takes_a_function_that_returns_a_handle(collector, blocked):
    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collector.collect_async, blocked.lf)
            assert await trio.to_thread.run_sync(blocked.started.wait, 30)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert collector.stats()["cancelled"] == 1
    assert inside.waiting(collector) == 0
    blocked.gate.set()
    assert trio.run(lambda: collector.collect_async(TINY, priority=1)) is not None
