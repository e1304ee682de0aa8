"""Queries that run on the thread that submits them: when, when not, and what is the same."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from contextvars import copy_context
from functools import partial
from threading import get_ident

import gevent
import inside
import polars as pl
import pytest
import trio
from loops import Asyncio, Gevent, Trio, fixture_of
from places import LIMIT, Blocked, until
from test_interrupts import interrupted

from polars_async import AsyncEngine, Collector, CollectorClosedError, configure, events
from polars_async._runtime import nesting, pool_clocks
from polars_async._runtime.plans import UNFIT, shape_in_memory
from polars_async._runtime.unpatched import SimpleQueue, start_new_thread
from polars_async._runtime.upstream import DEFAULT_OPTIMIZATIONS
from polars_async.bridges import turns
from polars_async.executors import operations
from polars_async.scheduling import inline
from polars_async.scheduling.admission import Admission
from polars_async.scheduling.estimates import Estimate
from polars_async.scheduling.sizes import Limits
from polars_async.scheduling.slots import Slot

FRAME = pl.DataFrame({"a": [1, 2, 3], "b": [4, 5, 6]})
QUICK = FRAME.lazy().select(pl.col("a").sum())
"""A query that runs on one thread alone."""
POOLED = FRAME.lazy().select(pl.col("a").sum(), pl.col("b").sum())
"""A query that wakes Polars' pool."""

loop = fixture_of(Asyncio, Trio, Gevent)


@pytest.fixture(autouse=True)
def _calm(monkeypatch):
    """Have no test depend on what the machine does, nor on the tests before it."""
    monkeypatch.setattr(inline, "_VERY_LONG", LIMIT)
    monkeypatch.setattr(inline, "_LONG", LIMIT * 1e6)
    monkeypatch.setattr(inline, "_pauses", inline._Pauses())
    monkeypatch.setattr(inline._OtherThreads, "are_quiet_at", lambda *_: True)
    monkeypatch.setattr(inline, "_SLOW_LOOK", LIMIT)
    monkeypatch.setattr(inline, "_MOST_HELD", 1 << 60)  # tests before may hold more
    monkeypatch.setattr(turns, "HAND_OVER", LIMIT)
    turns.turned()


def ran(collector):
    return collector.stats()["inline"]


def runs_here(collector, lf=QUICK, **options):
    """Return whether `lf` runs inline now."""
    before = ran(collector)
    assert collector.collect_async(lf, **options).result(LIMIT) is not None
    return ran(collector) > before


def learned(lf=QUICK, **options):
    """Return a collector that has learned the shape of `lf`."""
    collector = Collector(inline=1.0, **options)
    until(lambda: runs_here(collector, lf))
    return collector


# When


def test_shape_is_known_after_several_runs_below_the_bound():
    with Collector(inline=1.0) as collector:
        assert not any(runs_here(collector) for _ in range(inline._GOOD_RUNS))
        until(lambda: runs_here(collector))


def test_a_quick_query_whose_engine_is_chosen_runs_inline():
    with learned(engine="adaptive") as collector:
        assert runs_here(collector)
        found = collector.collect_async(QUICK).resolution
        assert (found.name, found.source) == ("in-memory", "adaptive")
        assert found.message == "the in-memory engine runs: it is known to be quick"


def test_no_shape_is_known_whose_runs_took_longer_than_the_bound():
    with Collector(inline=1e-9) as collector:
        assert not any(runs_here(collector) for _ in range(100))


@pytest.mark.parametrize("other", [0, 0.0])
def test_no_query_runs_inline_where_it_is_off(other):
    with Collector(inline=other) as collector:
        assert not any(runs_here(collector) for _ in range(100))


def test_a_long_run_on_a_thread_has_the_shape_begin_anew():
    shape = inline._Shape()
    pool_clocks.find_pools()
    for _ in range(inline._GOOD_RUNS - 1):
        shape.count(1e-5)
    shape.forget()
    shape.count(1e-5)
    assert not shape.is_known


def test_a_run_on_a_thread_that_computes_for_too_long_is_counted_as_such():
    with Collector(inline=1.0) as collector:
        shapes = collector._cpu.inline._shapes

        def good():
            runs_here(collector)  # not each run is watched
            return sum(shape._good for shape in list(shapes.values()))

        until(good)
        collector._cpu.inline._bound = 0.0
        until(lambda: not good())


def test_a_new_list_of_pool_threads_has_all_shapes_begin_anew(monkeypatch):
    pool_clocks.find_pools()
    shape = inline._Shape()
    for _ in range(inline._GOOD_RUNS - 1):
        shape.count(1e-5)
    monkeypatch.setattr(pool_clocks._pools, "version", pool_clocks.version() + 1)
    shape.count(1e-5)
    assert not shape.is_known


def test_a_query_that_wakes_the_pool_never_runs_inline():
    with Collector(inline=1.0) as collector:
        assert not any(runs_here(collector, POOLED) for _ in range(100))


def test_a_pool_that_starts_later_is_seen(run_script):
    # In a new process, where no query has started the pool yet.
    said = run_script(
        """
import polars as pl
from polars_async import Collector
from polars_async.scheduling import inline
inline._LOOK_SHARE = 0
inline._OtherThreads.are_quiet_at = lambda *_: True
frame = pl.DataFrame({"a": [1, 2, 3]})
quick = frame.lazy().select(pl.col("a").sum())
pooled = frame.lazy().select(pl.col("a").sum(), pl.col("a").max().alias("b"))
with Collector(inline=1.0) as collector:
    for _ in range(6):
        collector.collect_async(quick).result()
    for _ in range(100):
        collector.collect_async(pooled).result()
    print(collector.stats()["inline"])
"""
    )
    assert said == ["0"]


def test_a_query_on_the_streaming_engine_never_runs_inline(monkeypatch):
    monkeypatch.setattr(pool_clocks, "computed", lambda: 0)
    with Collector(inline=1.0, engine="streaming") as collector:
        assert not any(runs_here(collector) for _ in range(100))


def test_a_query_with_a_python_function_never_runs_inline(monkeypatch):
    monkeypatch.setattr(pool_clocks, "computed", lambda: 0)
    lf = FRAME.lazy().map_batches(lambda frame: frame)
    with Collector(inline=1.0) as collector:
        assert not any(runs_here(collector, lf) for _ in range(100))


def test_a_query_that_scans_a_file_never_runs_inline(monkeypatch, tmp_path):
    monkeypatch.setattr(pool_clocks, "computed", lambda: 0)
    FRAME.write_ipc(tmp_path / "frame.ipc")
    lf = pl.scan_ipc(tmp_path / "frame.ipc")
    with Collector(inline=1.0) as collector:
        assert not any(runs_here(collector, lf) for _ in range(100))


def test_plans_of_anything_but_frames_in_memory_are_unfit(tmp_path):
    unfit = [
        pl.scan_csv(tmp_path / "none.csv"),
        pl.scan_parquet("https://host.invalid/frame.parquet"),
        FRAME.lazy().map_batches(lambda frame: frame),
        FRAME.lazy().select(pl.col("a").map_elements(lambda a: a, return_dtype=pl.Int64)),
        FRAME.lazy().sink_csv(tmp_path / "written.csv", lazy=True),
        pl.concat([FRAME.lazy(), pl.scan_ipc(tmp_path / "none.ipc")]),
    ]
    assert [shape_in_memory(lf, 1 << 20) for lf in unfit] == [UNFIT] * len(unfit)


def test_plans_have_the_same_shape_if_their_numbers_are_as_long():
    def shape(number, values=(1, 2, 3), name="a"):
        frame = pl.LazyFrame({name: values})
        return shape_in_memory(frame.select(pl.col(name).head(number)), 1 << 20)

    assert shape(3) == shape(7)
    assert shape(3) == shape(3, values=(7, 8, 9))
    assert shape(3) != shape(10**9)
    assert shape(3) != shape(3, values=list(range(10_000)))
    assert shape(3) != shape(3, name="another")


def test_a_plan_that_is_too_long_to_be_looked_at_has_no_shape():
    assert shape_in_memory(pl.LazyFrame({"a": range(10_000)}), 1 << 12) is None


def test_another_frame_of_a_known_shape_runs_inline():
    def another():
        return FRAME.lazy().select(pl.col("a").sum())

    with learned() as collector:
        until(lambda: runs_here(collector, another()))


def test_no_plan_is_looked_at_here_where_polars_holds_much_memory(monkeypatch):
    with learned() as collector:
        monkeypatch.setattr(inline, "_MOST_HELD", 0)
        assert not any(
            runs_here(collector, FRAME.lazy().select(pl.col("a").sum())) for _ in range(5)
        )
        assert runs_here(collector)  # its plan was looked at before


def test_after_a_slow_look_there_is_none_here(monkeypatch):
    limits = []
    with learned() as collector:
        monkeypatch.setattr(inline, "_SLOW_LOOK", 0.0)
        monkeypatch.setattr(
            collector._cpu.inline, "_look_at", lambda _, limit, __: limits.append(limit)
        )
        for _ in range(10):
            runs_here(collector, FRAME.lazy().select(pl.col("a").sum()))
    assert limits.count(inline._TEXT) == 1


def test_looks_that_find_nothing_become_rare(monkeypatch):
    limits = []
    with learned() as collector:
        monkeypatch.setattr(
            collector._cpu.inline, "_look_at", lambda _, limit, __: limits.append(limit)
        )
        for _ in range(100):
            runs_here(collector, FRAME.lazy().select(pl.col("b").max()))
    assert 0 < limits.count(inline._TEXT) < 10


def test_frames_of_one_query_run_inline_together():
    with Collector(inline=1.0) as collector:
        computed = pool_clocks.computed
        pool_clocks.computed = lambda: 0  # or it would not: several frames need the pool
        try:

            def here():
                before = ran(collector)
                found = collector.collect_all_async([QUICK, QUICK]).result(LIMIT)
                assert [frame.item() for frame in found] == [6, 6]
                return ran(collector) > before

            until(here)
        finally:
            pool_clocks.computed = computed


def test_many_frames_of_one_query_never_run_inline(monkeypatch):
    monkeypatch.setattr(pool_clocks, "computed", lambda: 0)
    with Collector(inline=1.0) as collector:
        for _ in range(50):
            collector.collect_all_async([QUICK] * 5).result(LIMIT)
        assert not ran(collector)


def test_nothing_runs_inline_beside_a_query_that_is_not_small():
    blocked = Blocked()
    with learned() as collector, Collector() as another:
        handle = another.collect_async(blocked.lf)
        assert blocked.started.wait()
        assert not runs_here(collector)
        blocked.gate.set()
        handle.result(LIMIT)
        until(lambda: runs_here(collector))


def test_nothing_runs_inline_while_a_query_waits():
    with Collector() as collector:
        admission = Admission(Limits(1))
        small = Estimate(0.0, None)
        resolution = collector.resolve_engine()
        first, second = (
            inline_query(collector, admission, resolution, estimate=small) for _ in range(2)
        )
        admission.enter(first)
        assert admission.has_only_small
        admission.enter(second)
        assert not admission.has_only_small


def inline_query(collector, admission, resolution, **options):
    from polars_async.scheduling.query import Query  # noqa: PLC0415  # here alone

    operation = operations.Collect(QUICK, resolution.engine, DEFAULT_OPTIMIZATIONS)
    return Query(operation, resolution, collector._reporter, admission.owner, **options)


def test_a_query_of_a_known_shape_counts_as_small_on_a_thread(monkeypatch):
    def is_small():
        with learned() as collector, monkeypatch.context() as patched:
            patched.setattr(inline, "_may_run_now", lambda: False)
            handle = collector.collect_async(QUICK)
            found = handle._query.is_small
            handle.result(LIMIT)
            return found

    until(is_small)  # unless one of the runs that it was learned from was held up


def test_nothing_runs_inline_while_other_threads_compute(monkeypatch):
    monkeypatch.undo()
    others = 0.0
    monkeypatch.setattr(inline, "process_time", lambda: others)
    monkeypatch.setattr(inline, "thread_time", lambda: 0.0)
    monkeypatch.setattr(pool_clocks, "computed", lambda: 0)
    threads = inline._OtherThreads()
    assert not threads.are_quiet_at(100.0)  # it is not known
    others += 1.0
    assert not threads.are_quiet_at(101.0)
    others += 0.1
    assert threads.are_quiet_at(102.0)
    others += 1.0
    assert threads.are_quiet_at(102.0 + inline._WINDOW / 2)  # in the same window still


def test_nothing_runs_inline_while_the_pools_compute(monkeypatch):
    monkeypatch.undo()
    computed = 0
    monkeypatch.setattr(inline, "process_time", lambda: 0.0)
    monkeypatch.setattr(inline, "thread_time", lambda: 0.0)
    monkeypatch.setattr(pool_clocks, "computed", lambda: computed)
    threads = inline._OtherThreads()
    threads.are_quiet_at(0.0)
    assert threads.are_quiet_at(1.0)
    computed += 500_000_000
    assert not threads.are_quiet_at(2.0)
    assert threads.are_quiet_at(3.0)


def test_the_other_threads_are_asked_about(monkeypatch):
    with learned() as collector:
        monkeypatch.setattr(inline._OtherThreads, "are_quiet_at", lambda *_: False)
        assert not runs_here(collector)


def test_nothing_runs_inline_in_a_python_function_of_a_query():
    with learned() as collector:

        def nested():
            query = nesting.enter_context()
            here = runs_here(collector)
            query.end()
            return here

        assert not copy_context().run(nested)
        assert runs_here(collector)


def test_a_query_of_low_priority_waits_for_its_turn():
    with learned() as collector:
        assert not runs_here(collector, priority=-1)
        assert runs_here(collector, priority=1)


@pytest.mark.parametrize("executor", ["auto", "processes"])
def test_queries_run_inline_only_where_they_stay_in_this_process(executor):
    with Collector(executor=executor, inline=1.0) as collector:
        if executor == "auto":
            until(lambda: runs_here(collector))
        else:
            assert not any(runs_here(collector) for _ in range(20))


# One that took long


def test_one_that_took_long_sends_its_shape_and_the_process_back_to_threads(monkeypatch):
    with learned() as collector, Collector(inline=1.0) as another:
        until(lambda: runs_here(another))
        monkeypatch.setattr(inline, "_VERY_LONG", 0.0)
        monkeypatch.setattr(inline, "_LONG", 0.0)
        assert runs_here(collector)
        (shape,) = collector._cpu.inline._shapes.values()
        assert not shape.is_known
        assert shape._needed == 2 * inline._GOOD_RUNS
        monkeypatch.setattr(inline, "perf_counter", lambda: inline._pauses.until - 0.001)
        assert not runs_here(another)
        monkeypatch.setattr(inline, "perf_counter", lambda: inline._pauses.until)
        assert runs_here(another)


def test_interruptions_by_the_kernel_do_not_count(monkeypatch):
    monkeypatch.undo()
    now, bound = 0.0, 1e-4
    monkeypatch.setattr(inline, "thread_time", lambda: now)
    shape = inline._Shape()

    def is_to_blame(seconds, computing):
        nonlocal now
        computed = shape.watch()
        now += computing
        return shape.is_to_blame(seconds, bound, computed)

    some = inline._WAITED / 2
    assert not is_to_blame(some, some)  # the first
    assert not is_to_blame(some, bound / 10)
    assert is_to_blame(some, some)
    assert is_to_blame(2 * inline._WAITED, bound / 10)
    for _ in range(inline._WATCHED):
        assert not is_to_blame(bound, bound)
    assert not is_to_blame(2 * inline._WAITED, bound / 10)  # the first again
    assert is_to_blame(inline._VERY_LONG, bound / 10)


def test_pauses_become_longer_up_to_a_limit():
    pauses = inline._Pauses()
    lengths = []
    for _ in range(20):
        pauses.begin(now := max(pauses.until, 0.0))
        lengths.append(pauses.until - now)
    assert lengths[:3] == pytest.approx([inline._PAUSE, 2 * inline._PAUSE, 4 * inline._PAUSE])
    assert lengths[-1] == pytest.approx(inline._LONGEST_PAUSE)
    now = pauses.until + inline._PEACE * inline._LONGEST_PAUSE
    pauses.begin(now)
    assert pauses.until - now == pytest.approx(inline._PAUSE)


# The loop's turn


def test_a_turn_has_room_for_some_and_the_next_for_as_many(loop, monkeypatch):
    with learned() as collector:
        monkeypatch.setattr(turns, "HAND_OVER", -1.0)  # each takes a tenth of what there is

        async def main():
            counts = []
            for _ in range(3):
                await loop.sleep(0.01)
                before = ran(collector)
                handles = [collector.collect_async(QUICK) for _ in range(20)]
                counts.append(ran(collector) - before)
                for handle in handles:
                    await loop.wait(handle)
                until(lambda: not collector.stats()["running"])
            return counts

        assert loop.run(main) == [10, 10, 10]


def test_what_does_not_take_longer_than_a_hand_over_has_room(loop):
    with learned() as collector:

        async def main():
            before = ran(collector)
            for _ in range(200):
                collector.collect_async(QUICK)
            return ran(collector) - before

        assert loop.run(main) == 200


def test_another_loop_on_the_thread_has_room(monkeypatch):
    with learned() as collector:
        monkeypatch.setattr(turns, "HAND_OVER", -1.0)

        async def main():
            before = ran(collector)
            for _ in range(20):
                collector.collect_async(QUICK)
            loop = asyncio.get_running_loop()
            monkeypatch.setattr(loop, "call_soon", lambda *_, **__: None)  # it will not call
            return ran(collector) - before

        for _ in range(2):
            loop = asyncio.new_event_loop()
            task = main()
            asyncio._set_running_loop(loop)  # it never turns, since it does not run
            try:
                with pytest.raises(StopIteration) as ended:
                    task.send(None)
            finally:
                asyncio._set_running_loop(None)
                loop.close()
            assert ended.value.value == 10
            until(lambda: inside.running(collector) == inside.waiting(collector) == 0)


def test_a_loop_may_have_no_weak_references(monkeypatch):
    calls, loop = [], object()
    monkeypatch.setattr(turns, "_loop_here", lambda: (loop, calls.append))
    monkeypatch.setattr(turns, "HAND_OVER", 0.0)
    for _ in range(10):
        assert turns.has_room()
        turns.note(0.0, 1.0)
    assert not turns.has_room()
    (turned,) = calls
    turned()
    assert turns.has_room()


def test_a_thread_without_a_loop_has_room_for_all(monkeypatch):
    with learned() as collector:
        monkeypatch.setattr(turns, "HAND_OVER", -1.0)
        found = []

        def thread():
            found.append(sum(runs_here(collector) for _ in range(50)))

        start_new_thread(thread, ())
        until(lambda: found)
        assert found == [50]


def test_a_task_that_waits_for_one_after_the_other_lets_others_run(loop, monkeypatch):
    monkeypatch.setattr(turns, "MOST", 0.0)
    monkeypatch.setattr(turns, "has_room", lambda: True)
    with learned() as collector:
        waited, seen = 0, []

        async def one_by_one():
            nonlocal waited
            for _ in range(20):
                before = ran(collector)
                await loop.wait(collector.collect_async(QUICK))
                assert ran(collector) > before
                waited += 1

        async def other():
            while waited < 20:
                seen.append(waited)
                await loop.sleep(0)

        loop.run(loop.together, one_by_one, other)
        assert len(set(seen)) > 10


def test_a_task_goes_on_at_once_while_the_loop_has_turned_lately(monkeypatch):
    monkeypatch.setattr(turns, "MOST", LIMIT)
    with learned() as collector:

        async def main():
            other = asyncio.create_task(asyncio.sleep(0))
            for _ in range(5):
                await collector.collect_async(QUICK)
            return other.done()

        assert not asyncio.run(main())


def test_the_hub_sees_what_has_arrived_between_waits(monkeypatch):
    monkeypatch.setattr(turns, "MOST", 0.0)
    with learned() as collector:

        async def main():
            arrived = []
            watcher = gevent.get_hub().loop.async_()
            watcher.start(lambda: arrived.append(1))
            watcher.send()
            collector.collect_async(QUICK).get()
            watcher.stop()
            return arrived

        assert Gevent().run(main) == [1]


def test_get_in_the_hub_itself_returns_at_once(monkeypatch):
    monkeypatch.setattr(turns, "MOST", 0.0)
    with learned() as collector:

        async def main():
            found = []
            gevent.get_hub().loop.run_callback(
                lambda: found.append(collector.collect_async(QUICK).get().item())
            )
            gevent.sleep(0.01)
            return found

        assert Gevent().run(main) == [6]


def test_an_await_without_a_loop_is_an_error():
    with learned() as collector:
        handle = collector.collect_async(QUICK)
        with pytest.raises(RuntimeError, match="neither asyncio nor trio"):
            handle.__await__().send(None)


def test_a_task_that_is_cancelled_where_it_lets_others_run_keeps_the_result(monkeypatch):
    monkeypatch.setattr(turns, "MOST", 0.0)
    with learned() as collector:

        async def main():
            handle = collector.collect_async(QUICK)

            async def wait():
                return await handle

            task = asyncio.create_task(wait())
            asyncio.get_running_loop().call_soon(task.cancel)
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return (await handle).item()

        assert asyncio.run(main()) == 6


# What is the same


def test_it_runs_on_the_thread_that_submits_it(monkeypatch):
    threads = []
    with learned() as collector:
        collect = operations._collect

        def noting(*arguments):
            threads.append(get_ident())
            return collect(*arguments)

        monkeypatch.setattr(operations, "_collect", noting)
        handle = collector.collect_async(QUICK)
        assert handle.done()
        assert handle.result().item() == 6
    assert threads == [get_ident()]


def test_events_tell_that_a_query_ran_inline():
    heard = []
    with Collector(inline=1.0, on_event=heard.append) as collector:
        until(lambda: runs_here(collector))
        heard.clear()
        assert runs_here(collector, label="quick")
    assert [(event.kind, event.inline, event.label) for event in heard] == [
        ("queued", False, "quick"),
        ("started", True, "quick"),
        ("finished", True, "quick"),
    ]
    assert "inline" in str(heard[-1])
    assert heard[-1].rows == 1


def test_counts_are_those_of_any_query():
    with learned() as collector:
        before = collector.stats()
        handles = [collector.collect_async(QUICK, timeout=LIMIT) for _ in range(10)]
        after = collector.stats()
        assert all(handle.done() for handle in handles)
    assert {key: after[key] - before[key] for key in ("inline", "submitted", "completed")} == {
        "inline": 10,
        "submitted": 10,
        "completed": 10,
    }
    assert after["run_seconds"] > before["run_seconds"]
    assert not after["running"] + after["waiting"]


def test_an_error_is_that_of_the_query_with_its_label():
    def cast(*values):
        return pl.LazyFrame({"a": values}).select(pl.col("a").cast(pl.Int64))

    with Collector(inline=1.0) as collector:
        until(lambda: runs_here(collector, cast("1", "2")))

        def fails_here():
            before = ran(collector)
            handle = collector.collect_async(cast("1", "x"), label="wrong")
            with pytest.raises(pl.exceptions.InvalidOperationError) as caught:
                handle.result(LIMIT)
            assert "wrong" in str(caught.value.__notes__)
            return ran(collector) > before

        until(fails_here)
        assert collector.stats()["failed"] >= 1


def test_a_closed_collector_takes_none():
    collector = learned()
    collector.close()
    with pytest.raises(CollectorClosedError):
        collector.collect_async(QUICK)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, gevent.Timeout])
def test_an_interrupt_is_raised_where_the_query_was_submitted(error, monkeypatch):
    def interrupt(*_):
        raise error

    with learned() as collector:
        monkeypatch.setattr(operations, "_collect", interrupt)
        with pytest.raises(error):
            collector.collect_async(QUICK)
        monkeypatch.undo()
        stats = collector.stats()
        assert (stats["failed"], stats["running"]) == (1, 0)


def test_ctrl_c_in_a_hook_cancels_the_query_and_is_raised(monkeypatch):
    kinds = []

    def hear(event):
        kinds.append(event.kind)
        if interrupts and event.kind == "started":
            raise KeyboardInterrupt

    interrupts = False
    with learned(on_event=hear) as collector:
        monkeypatch.setattr(events, "is_ctrl_c", lambda: True)
        interrupts = True
        kinds.clear()
        with pytest.raises(KeyboardInterrupt):
            collector.collect_async(QUICK)
        interrupts = False
        assert kinds == ["queued", "started", "cancelled"]
        assert not collector.stats()["running"]
        assert collector.stats()["cancelled"] == 1


def test_a_panic_is_an_outcome(monkeypatch):
    def panic(*_):
        raise pl.exceptions.PanicException("as Rust does")

    with learned() as collector:
        monkeypatch.setattr(operations, "_collect", panic)
        handle = collector.collect_async(QUICK)
        with pytest.raises(pl.exceptions.PanicException):
            handle.result(LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("heard", [False, True])
def test_interrupt_at_any_line_costs_no_slot_and_no_query(heard):
    outcomes = ("completed", "failed", "cancelled", "timed_out", "rejected")
    hook = {"on_event": lambda _: None} if heard else {}
    with learned(**hook) as collector:
        step, goes_on = 0, True
        while goes_on:
            step += 1
            goes_on = interrupted(partial(collector.collect_async, QUICK), step)
            stats = collector.stats()
            assert not stats["running"] + stats["waiting"]
            assert stats["submitted"] == sum(stats[key] for key in outcomes)
            turns.turned()
            assert not runs_here(collector, priority=-1)  # on a thread, which needs the lock
            until(lambda: runs_here(collector))
        assert step > 20


def test_what_closes_waits_for_queries_inline_on_other_threads():
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            collector = learned()
            before = collector.stats()["completed"]
            found, ended = [], SimpleQueue()

            def submit(collector=collector, found=found, ended=ended):
                with contextlib.suppress(CollectorClosedError):
                    while True:
                        found.append(collector.collect_async(QUICK).result(LIMIT))
                ended.put(None)

            for _ in range(3):
                start_new_thread(submit, ())
            until(lambda found=found: len(found) > 20)
            collector.close(cancel_waiting=False)
            stats = collector.stats()
            for _ in range(3):
                ended.get(timeout=LIMIT)
            assert not stats["running"]
            assert stats["completed"] - before == len(found)
    finally:
        sys.setswitchinterval(switch)


def test_collectors_that_are_garbage_may_go_at_any_moment_of_the_look_at_all(monkeypatch):
    monkeypatch.setattr(inline, "_admissions", {})  # those of tests before may run a query still
    alive = [Admission(Limits(1)) for _ in range(30)]  # more than CPython has a spare tuple for
    for admission in alive:
        inline.register(admission)
    thresholds = gc.get_threshold()
    try:
        for allocations in range(20):
            gc.disable()
            garbage = Admission(Limits(1))
            cycle = [garbage]
            cycle.append(cycle)
            inline.register(garbage)
            known = len(inline._admissions)
            del garbage, cycle
            gc.set_threshold(gc.get_count()[0] + allocations)
            gc.enable()
            assert inline._only_small_run()
            gc.collect()
            assert len(inline._admissions) < known
    finally:
        gc.enable()
        gc.set_threshold(*thresholds)


def test_a_thread_that_closes_is_told_of_the_end():
    with learned() as collector:
        assert runs_here(collector)
        collector.close()
        assert not inside.closers(collector)


@pytest.mark.parametrize("wrong", [-1, "1", None, float("nan")])
def test_a_bound_that_is_no_time_is_an_error(wrong):
    with pytest.raises(ValueError, match=r"inline must be a number of seconds, 0 or more .*got"):
        Collector(inline=wrong)


def test_configure_takes_a_bound(monkeypatch):
    from polars_async import api  # noqa: PLC0415  # here alone

    monkeypatch.setattr(api._Default, "collector", None)
    with configure(inline=0) as collector:
        assert collector._cpu.inline is None


def test_a_slot_that_was_given_back_is_given_back_once():
    admission = Admission(Limits(1))
    with Collector() as collector:
        query = inline_query(collector, admission, collector.resolve_engine())
        slot = Slot(inline=True)
        assert admission.start_inline(query, slot)
        query.set_finished()
        admission.end_inline(query, slot)
        seconds = admission.counts.run_seconds
        admission.end_inline(query, slot)
        assert admission.counts.run_seconds == seconds
        assert not admission.running


def test_a_query_by_the_methods_of_polars_runs_inline_too():
    with learned() as collector:

        async def main():
            before = ran(collector)
            found = await QUICK.collect_async(engine=AsyncEngine(collector))
            assert found.item() == 6
            return ran(collector) > before

        assert asyncio.run(main())


def test_other_optimizations_are_another_query():
    with learned() as collector:
        assert not runs_here(collector, optimizations=pl.QueryOptFlags())


def test_trio_lets_others_run_at_each_wait():
    with learned() as collector:
        collector.collect_async(QUICK)

        async def main():
            await collector.collect_async(QUICK)
            return turns._turn.since

        assert trio.run(main) is None


def test_quick_ones_make_up_for_one_that_was_not(monkeypatch):
    monkeypatch.setattr(turns, "HAND_OVER", turns.MOST / 100)
    for _ in range(9):
        turns.note(0.0, 1.0)
    before = turns._turn.excess
    turns.note(0.0, 0.0)
    assert 0 < turns._turn.excess < before
    for _ in range(1000):
        turns.note(0.0, 0.0)
    assert turns._turn.excess == 0
