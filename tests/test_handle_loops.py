"""Handles with the tools of asyncio and trio."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError, ThreadPoolExecutor

import inside
import polars as pl
import pytest
import trio
import trio.testing
import uvloop
from places import TINY

from polars_async import Collector


def fail(df):  # noqa: ARG001
    raise LookupError("no")


async def wait(handle):
    return await handle


def assert_cancelled(handle):
    assert handle.done()
    with pytest.raises(CancelledError):
        handle.result()


# asyncio


def test_wait_for_gives_the_result_in_time(collector):
    async def main():
        return await asyncio.wait_for(collector.collect_async(TINY), 30)

    assert asyncio.run(main()).item() == 1


def test_wait_for_cancels_the_query_when_time_is_up(collector, blocked):
    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle, 0.01)
        assert_cancelled(handle)

    handle = collector.collect_async(blocked.lf)
    asyncio.run(main())


def test_shielded_query_goes_on_when_time_is_up(collector, blocked):
    async def main():
        task = asyncio.create_task(wait(handle))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(task), 0.01)
        assert not handle.done()
        blocked.gate.set()
        assert (await task).item() == 1

    handle = collector.collect_async(blocked.lf)
    asyncio.run(main())


@pytest.mark.everywhere
def test_gather_keeps_order_and_hands_over_errors(collector):
    async def main():
        frames = [pl.LazyFrame({"a": [i]}) for i in range(50)]
        frames[10] = TINY.map_batches(fail)
        handles = [collector.collect_async(each) for each in frames]
        found = await asyncio.gather(*handles, return_exceptions=True)
        assert type(found.pop(10)) is LookupError
        return [each.item() for each in found]

    assert asyncio.run(main()) == [i for i in range(50) if i != 10]


def test_cancelled_gather_cancels_all_its_queries(collector, blocked):
    async def main():
        gathered = asyncio.gather(*handles)
        await asyncio.sleep(0)
        gathered.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gathered

    handles = [collector.collect_async(each) for each in (blocked.lf, TINY)]
    asyncio.run(main())
    for handle in handles:
        assert_cancelled(handle)


def test_task_group_cancels_the_siblings_of_a_query_that_failed(collector, blocked, executor):
    async def main():
        async with asyncio.TaskGroup() as group:
            group.create_task(wait(blocking))
            group.create_task(wait(waiting))
            group.create_task(asyncio.wait_for(failing, 30))

    with Collector(executor=executor, max_running=1) as other:
        failing = other.collect_async(TINY.map_batches(fail))
        blocking = collector.collect_async(blocked.lf)
        waiting = collector.collect_async(TINY)
        with pytest.raises(ExceptionGroup) as caught:
            asyncio.run(main())
    assert [type(each) for each in caught.value.exceptions] == [LookupError]
    assert_cancelled(blocking)
    assert_cancelled(waiting)
    assert not inside.waiting(collector)


def test_timeout_around_a_task_group_cancels_its_queries(collector, blocked):
    async def main():
        async with asyncio.timeout(0.01), asyncio.TaskGroup() as group:
            for handle in handles:
                group.create_task(wait(handle))

    handles = [collector.collect_async(each) for each in (blocked.lf, TINY, TINY)]
    with pytest.raises(TimeoutError):
        asyncio.run(main())
    for handle in handles:
        assert_cancelled(handle)


def test_cancelled_query_cancels_the_task_that_awaits_it(collector, blocked):
    async def main():
        task = asyncio.create_task(wait(handle))
        await asyncio.sleep(0)
        handle.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    handle = collector.collect_async(blocked.lf)
    asyncio.run(main())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_task_cancelled_while_its_wake_up_is_under_way_ends_cancelled(collector, blocked, run):
    async def main():
        task = asyncio.create_task(wait(handle))
        await asyncio.sleep(0)
        blocked.gate.set()
        handle.result(30)  # holds the loop until the query is done
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert (await handle).item() == 1

    told = []
    handle = collector.collect_async(blocked.lf)

    async def watched():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        await main()

    run(watched())
    assert told == []


def test_other_tasks_run_while_a_query_runs(collector, blocked):
    async def main():
        task = asyncio.create_task(wait(handle))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
        blocked.gate.set()
        return await task

    handle = collector.collect_async(blocked.lf)
    assert asyncio.run(main()).item() == 1


# trio


def test_move_on_after_cancels_the_query(collector, blocked):
    async def main():
        with trio.move_on_after(0.01) as scope:
            await handle
        assert scope.cancelled_caught

    handle = collector.collect_async(blocked.lf)
    trio.run(main)
    assert_cancelled(handle)


def test_cancelled_nursery_cancels_its_queries(collector, blocked):
    async def main():
        async with trio.open_nursery() as nursery:
            for handle in handles:
                nursery.start_soon(wait, handle)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    handles = [collector.collect_async(each) for each in (blocked.lf, TINY)]
    trio.run(main)
    for handle in handles:
        assert_cancelled(handle)


def test_nursery_cancels_the_siblings_of_a_query_that_failed(collector, blocked, executor):
    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, handle)
            await trio.testing.wait_all_tasks_blocked()
            with Collector(executor=executor) as other:
                await other.collect_async(TINY.map_batches(fail))

    handle = collector.collect_async(blocked.lf)
    with pytest.raises(ExceptionGroup) as caught:
        trio.run(main)
    assert [type(each) for each in caught.value.exceptions] == [LookupError]
    assert_cancelled(handle)


def test_query_lives_until_its_last_trio_task_leaves(collector, blocked):
    async def main():
        async with trio.open_nursery() as nursery:
            scopes = []

            async def wait_in_scope():
                with trio.CancelScope() as scope:
                    scopes.append(scope)
                    await handle

            for _ in range(2):
                nursery.start_soon(wait_in_scope)
            await trio.testing.wait_all_tasks_blocked()
            scopes[0].cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert not handle.done()
            scopes[1].cancel()
        assert_cancelled(handle)

    handle = collector.collect_async(blocked.lf)
    trio.run(main)


def test_trio_task_cancelled_while_its_wake_up_is_under_way_is_rescheduled_once(collector, blocked):
    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, handle)
            await trio.testing.wait_all_tasks_blocked()
            blocked.gate.set()
            handle.result(30)  # holds the loop until the query is done
            nursery.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        return await handle

    handle = collector.collect_async(blocked.lf)
    assert trio.run(main).item() == 1


def test_await_of_a_done_query_is_a_checkpoint_in_trio(collector):
    async def main():
        with trio.testing.assert_checkpoints():
            await handle

    handle = collector.collect_async(TINY)
    handle.result()
    trio.run(main)


def test_loop_of_trio_that_is_over_is_not_told(collector, blocked):
    async def main():
        with trio.move_on_after(0):
            await handle
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, collector.collect_async(TINY))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    handle = collector.collect_async(blocked.lf)
    trio.run(main)
    blocked.gate.set()
    assert collector.collect_async(TINY).result().item() == 1


@pytest.mark.parametrize("fails", [False, True])
def test_trio_as_a_guest_of_asyncio_awaits_on_both_sides(collector, blocked, fails):
    sides = []

    async def side(name):
        try:
            sides.append((name, (await handle).item()))
        except LookupError as error:
            sides.append((name, str(error)))

    async def main():
        over = asyncio.get_running_loop().create_future()
        trio.lowlevel.start_guest_run(
            side,
            "trio",
            run_sync_soon_threadsafe=asyncio.get_running_loop().call_soon_threadsafe,
            done_callback=over.set_result,
        )
        task = asyncio.create_task(side("asyncio"))
        while len(inside.waiters(handle)) < 2:  # noqa: ASYNC110  # trio's side tells nobody
            await asyncio.sleep(0.001)
        kinds = sorted(type(each).__module__ for each in inside.waiters(handle))
        assert kinds == ["polars_async.bridges.asyncio", "polars_async.bridges.trio"]
        blocked.gate.set()
        await task
        (await over).unwrap()

    handle = collector.collect_async(blocked.lf.map_batches(fail) if fails else blocked.lf)
    with ThreadPoolExecutor(1) as pool:  # whose thread keeps the wake-up descriptor its own
        pool.submit(asyncio.run, main()).result()
    outcome = "no" if fails else 1
    assert sorted(sides) == [("asyncio", outcome), ("trio", outcome)]
