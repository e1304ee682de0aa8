"""A task that awaits is told by the loop that runs it, whatever else its thread or context has."""

from __future__ import annotations

import asyncio
import sys

import anyio
import polars as pl
import pytest
import sniffio
import trio
from conftest import TINY

from polars_async import Collector


async def ask(collector):
    """Wait in each way in which a task may."""
    frame = await collector.collect_async(TINY)
    frames = [frame async for _, frame in collector.as_completed([TINY])]
    async with collector.collect_batches_async(TINY) as batches:
        frames += [batch async for batch in batches]
    return pl.concat([frame, *frames]).height


RUNS = {"asyncio": lambda main, *args: asyncio.run(main(*args)), "trio": trio.run}


@pytest.mark.parametrize("inner", RUNS)
@pytest.mark.parametrize("outer", RUNS)
def test_function_of_a_query_may_run_a_loop_of_its_own(outer, inner):
    found = []

    def run_loop(frame):
        found.append(RUNS[inner](ask, collector))
        return frame

    async def main():
        await collector.collect_async(TINY.map_batches(run_loop))
        return await ask(collector)

    with Collector() as collector:
        found.append(anyio.run(main, backend=outer))

    assert found == [3, 3]


@pytest.mark.parametrize(("outer", "inner"), [("asyncio", "trio"), ("trio", "asyncio")])
def test_task_of_one_loop_may_run_the_other(outer, inner):
    async def main():
        return [await ask(collector), RUNS[inner](ask, collector), await ask(collector)]

    with Collector() as collector:
        assert RUNS[outer](main) == [3, 3, 3]


def test_trio_as_a_guest_of_asyncio():
    async def main():
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        trio.lowlevel.start_guest_run(
            ask,
            collector,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=lambda outcome: over.set_result(outcome.unwrap()),
        )
        return await asyncio.gather(over, ask(collector), ask(collector))

    with Collector() as collector:
        assert asyncio.run(main()) == [3, 3, 3]


@pytest.mark.parametrize("said", ["trio", "asyncio", "curio"])
@pytest.mark.parametrize("run", RUNS)
def test_variable_of_sniffio_decides_nothing(run, said):
    token = sniffio.current_async_library_cvar.set(said)
    try:
        with Collector() as collector:
            assert RUNS[run](ask, collector) == 3
    finally:
        sniffio.current_async_library_cvar.reset(token)


@pytest.mark.parametrize("run", RUNS)
def test_sniffio_need_not_be_there(run, monkeypatch):
    with Collector() as collector:
        monkeypatch.setitem(sys.modules, "sniffio", None)
        assert RUNS[run](ask, collector) == 3
