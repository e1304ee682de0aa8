"""Queries that Python UDFs ask for, and what an import starts."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from math import inf
from pathlib import Path

import inside
import polars as pl
import pytest
import trio
from conftest import TINY
from places import Failure, Source, until
from test_collector import nested_on_pool

from polars_async import Collector, CollectorClosedError, EventKind, QueryTimeoutError
from polars_async._runtime.nesting import EnclosingQuery
from polars_async.scheduling import estimates
from polars_async.scheduling import query as query_module
from polars_async.scheduling.estimates import CostModel


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
    lf = nested_on_pool(ask(collector, way, 1))
    assert collector.collect_async(lf).result(30).row(0) == (1, 1)


def test_nested_query_does_not_wait_for_those_in_the_queue(collector, blocked):
    def udf(df):
        blocked.started.set()
        blocked.gate.wait()
        for _ in range(2):  # the end of the first starts none of those in the line
            assert inside.waiting(collector) == 5
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
    assert (inside.running(collector), inside.waiting(collector)) == (1, 1)
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


# What asks on another thread, in the context of the function that waits for it


def on_loop(ask):
    """Hand `ask` to the loop of the program, as a web application's function does."""

    async def main():
        return await ask()

    return asyncio.run_coroutine_threadsafe(main(), LOOP).result(30)


def on_loop_to_thread(ask):
    async def main():
        return await asyncio.to_thread(lambda: ask().result(30))

    return asyncio.run_coroutine_threadsafe(main(), LOOP).result(30)


def in_executor_with_context(ask):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, lambda: ask().result(30)).result(30)


LOOP = asyncio.new_event_loop()


@pytest.fixture
def _loop():
    thread = threading.Thread(target=LOOP.run_forever, daemon=True)
    thread.start()
    yield
    LOOP.call_soon_threadsafe(LOOP.stop)
    thread.join(30)


@pytest.mark.usefixtures("_loop")
@pytest.mark.parametrize("way", [on_loop, on_loop_to_thread, in_executor_with_context])
@pytest.mark.parametrize("depth", [1, 3])
def test_query_asked_for_in_the_functions_context_needs_no_slot(collector, way, depth):
    def handed(collector, lf):
        return way(lambda: collector.collect_async(lf))

    plan = ask_plan(collector, handed, depth)
    assert collector.collect_async(plan, engine="in-memory").result(60).item() == 1


@pytest.mark.usefixtures("_loop")
def test_task_that_a_function_started_asks_as_any_other_once_its_query_has_ended(
    collector, blocked
):
    waits, goes_on = threading.Event(), []

    async def outlive():
        goes_on.append(asyncio.Event())
        waits.set()
        await goes_on[0].wait()
        return collector.collect_async(TINY)

    tasks = []

    def start(df):
        tasks.append(asyncio.run_coroutine_threadsafe(outlive(), LOOP))
        return df

    outer = collector.collect_async(TINY.map_batches(start), engine="in-memory")
    outer.result(30)
    assert waits.wait(30)
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    LOOP.call_soon_threadsafe(goes_on[0].set)
    waiting = tasks[0].result(30)
    assert collector.stats()["waiting"] == 1
    blocked.gate.set()
    assert waiting.result(30).item() == 1


@pytest.mark.usefixtures("_loop")
def test_function_of_a_cancelled_query_asks_without_a_slot_as_long_as_it_runs(collector, blocked):
    answers = []

    def udf(df):
        blocked.started.set()
        assert blocked.gate.wait()
        answers.append(on_loop(lambda: collector.collect_async(TINY)))
        return df

    outer = collector.collect_async(TINY.map_batches(udf), engine="in-memory")
    assert blocked.started.wait()
    assert outer.cancel()
    blocked.gate.set()
    until(lambda: collector.stats()["running"] == 0)
    assert [answer.item() for answer in answers] == [1]


@pytest.mark.usefixtures("_loop")
def test_close_in_the_functions_context_is_refused(collector):
    async def close():
        await collector.aclose()

    def udf(df):
        asyncio.run_coroutine_threadsafe(close(), LOOP).result(30)
        return df

    with pytest.raises(
        RuntimeError,
        match=r"^aclose\(\) was called .* wait for that query: call close\(wait=False\)$",
    ):
        collector.collect_async(TINY.map_batches(udf), engine="in-memory").result(30)
    assert not collector.closed


def test_chain_of_queries_that_each_ask_for_the_next_keeps_none_of_them():
    last = None
    for _ in range(3):
        before, last = last, EnclosingQuery(last, on_gpu=False)
        if before is not None:
            before.end()
    assert last.still_running() is last
    assert last.parent.parent is None
    last.end()
    assert last.still_running() is last.parent is None


# On Polars' own threads, of which there may be one


ON_POLARS_THREADS = """
import os, sys
os.environ["POLARS_MAX_THREADS"] = "1"
import polars as pl
from polars_async import Collector
sys.path.append(os.environ["TESTS"])
import test_nesting

def plan(ask, depth):
    lf = pl.LazyFrame({"a": [1], "b": [2]})
    if not depth:
        return lf.select(pl.col("a").sum(), pl.col("b").sum())
    def udf(values):
        assert ask(collector, plan(ask, depth - 1)).row(0) == (1, 2)
        return values
    return lf.select(
        pl.col("a").map_batches(udf, return_dtype=pl.Int64),
        pl.col("b").map_batches(udf, return_dtype=pl.Int64),
    )

for way, depth in test_nesting.ON_THE_ONLY_THREAD:
    with Collector(max_running=1, engine=sys.argv[1]) as collector:
        top = plan(getattr(test_nesting, way), depth)
        assert collector.collect_async(top).result(30).row(0) == (1, 2), (way, depth)
        stats = collector.stats()
    print(way, *(int(stats[key]) for key in ("submitted", "completed", "running")), flush=True)
"""
ON_THE_ONLY_THREAD = {
    ("by_result", 1): 3,
    ("by_asyncio", 1): 3,  # which, as trio, does not run inside itself
    ("by_trio", 1): 3,
    ("by_greenlet", 1): 3,
    ("by_result", 2): 7,
    ("by_greenlet", 2): 7,
}
"""The way to ask, the depth, and the number of all queries."""


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_query_asked_for_on_polars_only_thread_does_not_need_another(
    run_script, monkeypatch, engine
):
    monkeypatch.setenv("TESTS", str(Path(__file__).parent))
    said = run_script(ON_POLARS_THREADS, engine)
    ended = [(way, queries) for (way, _), queries in ON_THE_ONLY_THREAD.items()]
    assert said == [word for way, n in ended for word in (way, str(n), str(n), "0")]


def on_pool(udf):
    """Run `udf` on a thread of Polars; return what it returned."""
    seen = []
    nested_on_pool(lambda values: (seen.append(udf()), values)[1]).collect(engine="in-memory")
    return seen[0]


def thread_of(collector, **options):
    threads = []

    def note(df):
        threads.append(threading.get_ident())
        return df

    lf = TINY.map_batches(note)
    handle = collector.collect_async(lf, engine="in-memory", **options)
    return threads, handle


@pytest.mark.parametrize("options", [{}, {"timeout": 30}, {"label": "named"}])
def test_thread_of_polars_that_asks_runs_the_query_before_it_goes_on(collector, options):
    def udf():
        threads, handle = thread_of(collector, **options)
        assert handle.done()
        assert threads == [threading.get_ident()]
        return handle

    assert on_pool(udf).result(0).item() == 1


def test_query_on_the_thread_of_polars_that_asks_is_told_as_any_other():
    told = []
    with Collector(max_running=1, on_event=lambda event: told.append(event.kind)) as collector:
        on_pool(lambda: collector.collect_async(TINY))
        assert collector.stats()["completed"] == 2  # by both expressions
    assert sorted(told) == sorted([EventKind.QUEUED, EventKind.STARTED, EventKind.FINISHED] * 2)


def test_query_on_the_thread_of_polars_that_asks_fails_as_any_other(collector):
    def fail(_):
        raise Failure

    handle = on_pool(lambda: collector.collect_async(TINY.map_batches(fail)))
    with pytest.raises(Failure):
        handle.result(0)
    assert collector.stats()["failed"] == 2


def test_query_on_the_thread_of_polars_that_asks_may_be_late():
    def udf():
        def outlast(df):
            until(lambda: collector.stats()["timed_out"])
            return df

        collector = Collector()
        with pytest.raises(QueryTimeoutError, match="was not done after"):
            collector.collect_async(TINY.map_batches(outlast), timeout=0.001).result()
        return collector.stats()["running"]

    assert on_pool(udf) == 0


def test_query_on_the_thread_of_polars_that_asks_takes_no_slot_from_others(collector):
    def udf():
        def ask_elsewhere(_):
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(lambda: collector.collect_async(TINY).result(30)).result(30)

        return collector.collect_async(TINY.map_batches(ask_elsewhere), engine="in-memory")

    assert on_pool(udf).result(30).item() == 1


def test_batches_asked_for_on_a_thread_of_polars_come_from_another(collector):
    async def consume(source):
        return [batch.item() async for batch in collector.collect_batches_async(source.lf)]

    assert on_pool(lambda: asyncio.run(consume(Source(5)))) == list(range(5))


def test_closed_collector_runs_nothing_on_the_thread_that_asks():
    collector = Collector()
    collector.close()

    def udf():
        with pytest.raises(CollectorClosedError):
            collector.collect_async(TINY)

    on_pool(udf)


@pytest.mark.everywhere
def test_query_on_the_thread_of_polars_that_asks_runs_in_any_executor(collector):
    assert on_pool(lambda: collector.collect_async(TINY)).result(0).item() == 1
    assert collector.stats()["completed"] == 2


def test_query_on_the_thread_of_polars_that_asks_does_not_run_alone(monkeypatch):
    learned = []

    def observe(costs, _, __, *, alone, completed, share, memory):  # noqa: ARG001
        if costs is collector._cpu._costs:  # queries of tests before may still come to their end
            learned.append(alone)

    monkeypatch.setattr(query_module, "_WORTH_ESTIMATING", 0.0)
    monkeypatch.setattr(estimates, "_LEARN_SHARE", -inf)  # of two that end at once, too
    with Collector() as collector:
        monkeypatch.setattr(CostModel, "observe", observe)
        columns = [
            pl.col("a")
            .map_batches(
                lambda values: collector.collect_async(TINY).result().item() * values,
                return_dtype=pl.Int64,
            )
            .alias(str(number))
            for number in range(4)
        ]
        collector.collect_async(TINY.select(columns), engine="in-memory").result(30)
        until(lambda: len(learned) == 5)
    assert learned == [False] * 5


def test_time_out_of_a_query_leaves_a_function_as_what_it_is(collector):
    def ask(values):
        collector.collect_async(TINY.map_batches(never), timeout=0.001).result()
        return values

    def never(df):
        until(lambda: collector.stats()["timed_out"])
        return df

    query = TINY.group_by("a").agg(pl.col("a").map_batches(ask, return_dtype=pl.Int64).alias("b"))
    with pytest.raises(QueryTimeoutError, match="was not done after"):
        query.collect(engine="in-memory")
