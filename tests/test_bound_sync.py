"""Synchronous methods of Polars that take their turn, by ``AsyncEngine(bound_sync=True)``."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import gevent
import inside
import polars as pl
import pytest
from conftest import TINY
from places import LIMIT, Failure, until
from test_collector import nested_on_pool

import polars_async as pa

FLAGS = pl.QueryOptFlags()


def written(lf, engine, folder):
    lf.sink_csv(folder / "a.csv", engine=engine)
    return pl.read_csv(folder / "a.csv")


METHODS = {
    "collect": lambda lf, engine, _: lf.collect(engine=engine),
    "collect_all": lambda lf, engine, _: pl.collect_all([lf], engine=engine)[0],
    "execute": lambda lf, engine, _: engine.execute(lf, optimizations=FLAGS).lazy().collect(),
    "sink": written,
}


@pytest.fixture
def engine(collector):
    return pa.AsyncEngine(collector, bound_sync=True)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.everywhere
@pytest.mark.parametrize("method", METHODS)
def test_query_waits_for_its_turn(collector, engine, blocked, pool, method, tmp_path):
    first = collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    last = pool.submit(METHODS[method], TINY, engine, tmp_path)
    until(lambda: inside.waiting(collector) == 1)
    assert not last.done()
    blocked.gate.set()
    assert first.result(LIMIT).item() == 1
    assert last.result(LIMIT).item() == 1
    assert collector.stats()["completed"] == 2


def test_engine_that_is_not_bound_asks_nobody(collector, blocked):
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    assert TINY.collect(engine=pa.AsyncEngine(collector)).item() == 1


def test_engine_is_that_of_the_synchronous_path(collector, engine, engine_log):
    TINY.collect(engine=pa.AsyncEngine(collector))
    TINY.collect(engine=engine)
    here, in_turn = engine_log
    assert in_turn == here == collector.resolve_engine(path="sync")


def test_no_more_run_at_once_than_the_collector_lets(engine):
    together, most, lock = [], [], threading.Lock()

    def note(frame):
        with lock:
            together.append(frame)
            most.append(len(together))
        threading.Event().wait(0.001)
        together.pop()
        return frame

    with ThreadPoolExecutor(8) as pool:
        lf = TINY.map_batches(note)
        for future in [pool.submit(lf.collect, engine=engine) for _ in range(40)]:
            assert future.result(LIMIT).item() == 1
    assert max(most) == 1


def test_full_queue_and_closed_collector_are_raised(make, block, pool):
    collector = make(max_running=1, max_waiting=0)
    engine = pa.AsyncEngine(collector, bound_sync=True)
    first = pool.submit(block().lf.collect, engine=engine)
    until(lambda: inside.running(collector) == 1)
    with pytest.raises(pa.QueueFullError):
        TINY.collect(engine=engine)
    block.free()
    assert first.result(LIMIT).item() == 1
    collector.close()
    with pytest.raises(pa.CollectorClosedError):
        TINY.collect(engine=engine)


def test_query_that_its_collector_cancels_is_told_so(collector, engine, blocked, pool):
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    last = pool.submit(TINY.collect, engine=engine)
    until(lambda: inside.waiting(collector) == 1)
    collector.close(wait=False)
    with pytest.raises(CancelledError):
        last.result(LIMIT)


@pytest.mark.everywhere
def test_error_is_that_of_the_query(engine, is_that):
    raised = Failure("its own")

    def fail(_):
        raise raised

    with pytest.raises(Failure) as caught:
        TINY.map_batches(fail).collect(engine=engine)
    assert is_that(caught.value, raised)


# Inside of queries


def test_function_of_a_query_collects_in_its_own_slot(collector, engine):
    def ask(depth):
        def udf(_):
            return TINY.map_batches(ask(depth - 1) if depth else pl.DataFrame.clone).collect(
                engine=engine
            )

        return udf

    handle = collector.collect_async(TINY.map_batches(ask(2)), engine="in-memory")
    assert handle.result(LIMIT).item() == 1
    assert TINY.map_batches(ask(2)).collect(engine=engine).item() == 1
    assert collector.stats()["submitted"] == 2


def test_function_on_a_thread_of_polars_collects_there(collector, engine):
    def udf(values):
        return values * TINY.collect(engine=engine).item()

    assert nested_on_pool(udf).collect(engine=engine).row(0) == (1, 1)
    assert nested_on_pool(udf).collect(engine="in-memory").row(0) == (1, 1)
    assert collector.stats()["submitted"] == 1


def test_function_of_run_and_hook_collect_in_their_own_slot():
    heard = []

    def hook(event):
        if event.kind is pa.EventKind.STARTED:
            heard.append(TINY.collect(engine=engine).item())

    with pa.Collector(max_running=1, on_event=hook) as collector:
        engine = pa.AsyncEngine(collector, bound_sync=True)
        assert collector.run(lambda: TINY.collect(engine=engine).item()).result(LIMIT) == 1
        assert collector.stats()["submitted"] == 1
    assert heard == [1]


# What stays as it is


def test_operations_on_dataframes_stay_on_their_thread(collector, engine, blocked):
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    with pl.Config(engine_affinity=engine):
        assert TINY.collect(engine="in-memory").select(pl.col("a").sum()).item() == 1
    lf = pl.DataFrame({"a": [1]}).lazy()
    assert lf.collect(engine=engine, optimizations=pl.QueryOptFlags._eager()).item() == 1
    assert collector.stats()["submitted"] == 1


def test_callback_of_the_caller_is_called_on_its_thread(collector, engine):
    called = []
    engine.collect(
        TINY,
        optimizations=FLAGS,
        post_opt_callback=lambda *_: called.append(threading.get_ident()),
    )
    assert called == [threading.get_ident()]
    assert collector.stats()["submitted"] == 0


def test_engine_of_the_callers_own_class_keeps_its_methods(make):
    class Own(pl.InMemoryEngine):
        def execute(self, lf, *, optimizations):  # noqa: ARG002
            return "its own"

    collector = make(engine=Own())
    engine = pa.AsyncEngine(collector, bound_sync=True)
    assert engine.execute(TINY, optimizations=FLAGS) == "its own"
    assert TINY.collect(engine=engine).item() == 1
    assert collector.stats()["completed"] == 1


def test_repr_tells_that_it_is_bound(collector):
    assert repr(pa.AsyncEngine(bound_sync=True)) == "AsyncEngine(bound_sync=True)"
    assert (
        repr(pa.AsyncEngine(collector, bound_sync=True))
        == f"AsyncEngine({collector!r}, bound_sync=True)"
    )


# The wait


def test_ctrl_c_ends_the_wait_and_cancels_the_query(collector, engine, blocked, pool):
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    main = threading.main_thread().ident

    def interrupt():
        until(lambda: inside.waiting(collector) == 1)
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            TINY.collect(engine=engine)
    finally:
        signal.signal(signal.SIGINT, before)
    stats = collector.stats()
    assert (stats["waiting"], stats["cancelled"]) == (0, 1)


def test_ctrl_c_before_the_wait_cancels_the_query(collector, engine, blocked, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    collector.collect_async(blocked.lf)
    monkeypatch.setattr("polars_async.collector.result_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TINY.collect(engine=engine)
    stats = collector.stats()
    assert (stats["waiting"], stats["cancelled"]) == (0, 1)


def test_greenlet_alone_waits_and_its_end_cancels_the_query(collector, engine, blocked):
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    stays, leaves = (gevent.spawn(TINY.collect, engine=engine) for _ in range(2))
    while inside.waiting(collector) < 2:  # this greenlet runs meanwhile
        gevent.sleep(0.001)
    leaves.kill()
    assert inside.waiting(collector) == 1
    blocked.gate.set()
    assert stays.get(timeout=LIMIT).item() == 1
