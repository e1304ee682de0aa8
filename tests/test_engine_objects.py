"""Engine objects of others, such as those of a remote service, get the async paths they lack."""

from __future__ import annotations

import asyncio
import os
import threading

import polars as pl
import pytest

from polars_async import AsyncEngine, Collector

FRAME = pl.LazyFrame({"a": [1, 2, 3]})


class Foreign(pl.Engine):
    """What there is of an engine that has `collect` and `execute`, and no more."""

    def __init__(self):
        self.seen = []
        self.lock = threading.Lock()  # so that it cannot be sent to another process

    def collect(self, lf, *, optimizations, background=False, post_opt_callback=None):
        assert not background
        assert post_opt_callback is None
        with self.lock:
            self.seen.append((os.getpid(), threading.get_ident()))
        return lf.collect(engine="streaming", optimizations=optimizations)


@pytest.fixture
def foreign():
    def execute(*_, **__):
        raise AssertionError("it gives nothing that can be awaited")

    missing = dict.fromkeys(pl.Engine.__abstractmethods__ - {"collect"}, "foreign")
    return type("Foreign", (Foreign,), missing | {"execute": execute})()


@pytest.fixture(params=["threads", "processes", "auto"])
def collector(request, foreign):
    with Collector(executor=request.param, engine=foreign) as collector:
        yield collector


@pytest.fixture
def stays_here(foreign):
    """Every query ran in this process, and on a thread of the collector."""
    yield
    assert foreign.seen
    assert {pid for pid, _ in foreign.seen} == {os.getpid()}
    assert threading.get_ident() not in {thread for _, thread in foreign.seen}


@pytest.mark.usefixtures("stays_here")
def test_collect_async(collector, foreign):
    async def main():
        handle = collector.collect_async(FRAME.sum())
        return (await handle).item(), handle.resolution.engine

    assert asyncio.run(main()) == (6, foreign)


@pytest.mark.usefixtures("stays_here")
def test_collect_all_async_collects_one_after_the_other(collector, foreign):
    async def main():
        return await collector.collect_all_async([FRAME, FRAME.sum()])

    assert [frame.height for frame in asyncio.run(main())] == [3, 1]
    assert len(foreign.seen) == 2


@pytest.mark.usefixtures("stays_here")
def test_as_completed(collector):
    async def main():
        frames = [FRAME.select(pl.col("a").sum() * n) for n in range(4)]
        return {number: frame.item() async for number, frame in collector.as_completed(frames)}

    assert asyncio.run(main()) == {n: 6 * n for n in range(4)}


@pytest.mark.usefixtures("stays_here")
def test_batches(collector):
    async def main():
        batches = collector.collect_batches_async(pl.LazyFrame({"a": range(10)}), chunk_size=4)
        return [batch["a"].to_list() async for batch in batches]

    assert asyncio.run(main()) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.usefixtures("stays_here")
def test_sinks(collector, tmp_path):
    async def main():
        return await collector.sink_async(FRAME.sink_csv(tmp_path / "a.csv", lazy=True))

    assert asyncio.run(main()) is None
    assert (tmp_path / "a.csv").read_text().split() == ["a", "1", "2", "3"]


@pytest.mark.usefixtures("stays_here")
def test_methods_of_polars_through_an_async_engine(collector):
    async def main():
        engine = AsyncEngine(collector)
        one = await FRAME.sum().collect_async(engine=engine)
        return [one, *await pl.collect_all_async([FRAME.sum()], engine=engine)]

    assert [frame.item() for frame in asyncio.run(main())] == [6, 6]


def test_engine_of_the_query_stays_here_beside_queries_that_do_not(foreign):
    def pid(frame):
        return frame.select(a=pl.lit(os.getpid(), pl.Int64))

    with Collector(executor="processes") as collector:
        here = collector.collect_async(FRAME.map_batches(pid), engine=foreign).result()
        elsewhere = collector.collect_async(FRAME.map_batches(pid)).result()
    assert here["a"][0] == os.getpid() != elsewhere["a"][0]
