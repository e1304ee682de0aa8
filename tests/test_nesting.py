"""Queries that Python UDFs ask for, and what an import starts."""

from __future__ import annotations

import asyncio

import pytest
import trio
from conftest import TINY
from test_collector import nested_on_pool

from polars_async import Collector


def by_result(collector, lf):
    return collector.collect_async(lf).result()


def by_asyncio(collector, lf):
    async def main():
        return await collector.collect_async(lf)

    return asyncio.run(main())


def by_trio(collector, lf):
    async def main():
        return await collector.collect_async(lf)

    return trio.run(main)


def by_background(collector, lf):
    return collector.collect_background(lf).fetch_blocking()


def by_greenlet(collector, lf):
    return collector.collect_async(lf, gevent=True).get()


WAYS = [by_result, by_asyncio, by_trio, by_background, by_greenlet]


def ask(collector, way, depth):
    """A UDF that asks for a query, `depth` times in one another, on the worker's thread."""

    def udf(each):
        assert way(collector, ask_plan(collector, way, depth - 1)).item(0, 0) == 1
        return each

    return udf


def ask_plan(collector, way, depth):
    return TINY.map_batches(ask(collector, way, depth)) if depth else TINY


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("depth", [1, 3])
def test_query_asked_for_on_the_workers_thread_needs_no_slot(collector, way, depth):
    # 'collector' has a single slot, which the outer query holds.
    assert collector.collect_async(ask_plan(collector, way, depth)).result(30).item() == 1


@pytest.mark.parametrize("way", [by_result, by_asyncio])
def test_query_asked_for_on_polars_own_threads_needs_no_slot(collector, way):
    # One level only: at two, Polars' own synchronous collect hangs as well.
    lf = nested_on_pool(ask(collector, way, 1))
    assert collector.collect_async(lf).result(30).row(0) == (1, 1)


def test_nested_query_does_not_wait_for_those_in_the_line(collector, blocked):
    def udf(df):
        blocked.started.set()
        blocked.gate.wait()
        for _ in range(2):  # the end of the first starts none of those in the line
            assert collector._cpu.admission.waiting == 5
            df = collector.collect_async(TINY).result().with_columns(df["a"])
        return df

    outer = collector.collect_async(TINY.map_batches(udf))
    assert blocked.started.wait(30)
    handles = [collector.collect_async(TINY) for _ in range(5)]
    blocked.gate.set()
    assert outer.result(30).item() == 1
    assert [handle.result(30).item() for handle in handles] == [1] * 5


def test_slots_hold_again_after_nested_queries(collector, blocked):
    collector.collect_async(ask_plan(collector, by_result, 3)).result(30)
    collector.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    waiting = collector.collect_async(TINY)
    assert (collector._cpu.admission.running, collector._cpu.admission.waiting) == (1, 1)
    blocked.gate.set()
    assert waiting.result(30).item() == 1


def test_nested_query_of_another_collector_runs_too():
    with Collector(max_running=1) as outer, Collector(max_running=1) as inner:
        assert outer.collect_async(ask_plan(inner, by_result, 1)).result(30).item() == 1


IMPORTS = """
import os, sys, threading
def threads():
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
import polars
before, modules = threads(), set(sys.modules)
import polars_async
polars_async.Collector()
if "probe" in sys.argv:
    polars_async.collect_async(polars.LazyFrame({"a": [1]})).result()
heavy = {"asyncio", "gevent", "trio", "pynvml", "cudf_polars", "sniffio"}
print(threads() - before, *sorted(heavy & (set(sys.modules) - modules)))
"""


def test_import_starts_no_thread_and_brings_no_loop_and_no_gpu(run_script):
    assert run_script(IMPORTS) == ["0"]


def test_first_query_brings_no_loop_either(run_script):
    threads, *modules = run_script(IMPORTS, "probe")
    assert int(threads) >= 1
    assert modules == []
