"""Queries on the GPU: one thread, one at a time, next to those on the CPU."""

from __future__ import annotations

import threading
import time

import inside
import polars as pl
import pytest
from conftest import TINY

from polars_async import Collector, CollectorClosedError
from polars_async.testing import simulate_gpu


@pytest.fixture(autouse=True)
def gpu():
    with simulate_gpu() as gpu:
        gpu.threads = []
        yield gpu


@pytest.fixture
def seen(gpu):
    """A query that notes on which thread the GPU engine runs it."""

    def note(df):
        gpu.threads.append(threading.get_ident())
        return df

    return TINY.map_batches(note)


@pytest.fixture
def offloading(collector):  # noqa: ARG001  # closed before it
    with Collector(gpu="offload", max_running=3) as offloading:
        yield offloading
    assert not offloading._gpu.admission.running


def one_by_one(gpu):
    lock = threading.Lock()

    def run(df):
        assert lock.acquire(blocking=False), "two at once"
        gpu.threads.append(threading.get_ident())
        lock.release()
        return df

    return TINY.map_batches(run)


def test_gpu_queries_run_one_at_a_time_on_one_thread(offloading, gpu):
    handles = [offloading.collect_async(one_by_one(gpu), engine="gpu") for _ in range(50)]
    assert offloading._gpu.admission.running <= 1
    for handle in handles:
        assert handle.result(30).item() == 1
        assert handle.resolution.name == "gpu"
    assert len(gpu.threads) == 50
    assert len(set(gpu.threads)) == 1
    assert gpu.threads[0] != threading.get_ident()
    assert offloading._gpu._threads.threads == 1
    assert not inside.all_threads(offloading)


def test_gpu_thread_stays_the_same_after_a_failure(offloading, gpu, seen):
    def fail(df):  # noqa: ARG001
        raise LookupError

    for _ in range(5):
        with pytest.raises(LookupError):
            offloading.collect_async(TINY.map_batches(fail), engine="gpu").result()
        offloading.collect_async(seen, engine="gpu").result()
    assert len(gpu.threads) == 5
    assert len(set(gpu.threads)) == 1


def test_second_gpu_query_waits_while_queries_on_the_cpu_run(offloading, blocked):
    running = offloading.collect_async(blocked.lf, engine="gpu")
    assert blocked.started.wait(30)
    waiting = offloading.collect_async(TINY, engine="gpu")
    assert offloading.collect_async(TINY).result().item() == 1
    assert (offloading._gpu.admission.running, offloading._gpu.admission.waiting) == (1, 1)
    assert not waiting.done()
    blocked.gate.set()
    assert running.result(30).item() == waiting.result(30).item() == 1


def test_gpu_engine_objects_share_the_one_lane(offloading, gpu, seen):
    handles = [
        offloading.collect_async(seen, engine=engine)
        for engine in ("gpu", pl.GPUEngine(), pl.GPUEngine(raise_on_fail=True))
    ]
    for handle in handles:
        handle.result(30)
    assert len(gpu.threads) == 3
    assert len(set(gpu.threads)) == 1


def test_collect_all_on_the_gpu_collects_one_by_one_in_order(offloading, gpu):
    order = []
    frames = [
        pl.LazyFrame({"a": [i]}).map_batches(lambda df: (order.append(df.item()), df)[1])
        for i in range(5)
    ]
    handle = offloading.collect_all_async(frames, engine="gpu")
    assert [each.item() for each in handle.result(30)] == order == list(range(5))
    assert gpu.queries == 5
    assert handle.resolution.name == "gpu"
    assert offloading.collect_all_async([], engine="gpu").result(30) == []


def test_close_waits_for_the_gpu_too(blocked):
    offloading = Collector(gpu="offload")
    handle = offloading.collect_async(blocked.lf, engine="gpu")
    waiting = offloading.collect_async(TINY, engine="gpu")
    closed = threading.Event()
    threading.Thread(target=lambda: (offloading.close(), closed.set())).start()
    while not offloading._gpu.admission.waiters:
        pass  # until it waits; nobody is told
    assert waiting.done()
    assert not closed.is_set()
    blocked.gate.set()
    assert closed.wait(30)
    assert handle.done()
    with pytest.raises(CollectorClosedError):
        offloading.collect_async(TINY, engine="gpu")


def test_query_on_the_cpu_may_ask_for_one_on_the_gpu(offloading, gpu):
    def udf(df):
        return offloading.collect_async(TINY, engine="gpu").result().with_columns(df["a"])

    assert offloading.collect_async(TINY.map_batches(udf)).result(30).item() == 1
    assert gpu.queries == 1


def test_query_asked_for_on_the_cpu_waits_for_its_turn_on_the_gpu(offloading, gpu, blocked):
    asked, inner = threading.Event(), []

    def udf(df):
        inner.append(offloading.collect_async(TINY, engine="gpu"))
        asked.set()
        inner[0].result()
        return df

    running = offloading.collect_async(blocked.lf, engine="gpu")
    assert blocked.started.wait(30)
    outer = offloading.collect_async(TINY.map_batches(udf))
    assert asked.wait(30)
    assert offloading._gpu.admission.running == 1
    blocked.gate.set()
    assert running.result(30).item() == outer.result(30).item() == 1
    assert gpu.queries == 2


def test_query_on_the_gpu_that_asks_for_another_there_fails_instead_of_waiting_for_itself(
    offloading,
):
    def udf(df):
        return offloading.collect_async(TINY, engine="gpu").result().with_columns(df["a"])

    with pytest.raises(RuntimeError, match=r"would deadlock.*engine='in-memory'"):
        offloading.collect_async(TINY.map_batches(udf), engine="gpu").result(30)


def test_slow_gpu_query_that_is_looked_back_at_leaves_the_gpu_one_thread(offloading, gpu):
    """To appraise a long query afterwards, a thread of the CPU's lane lets another take over."""
    looked, done = threading.Event(), threading.Event()
    of = offloading._gpu._costs.of

    def slow(*arguments):
        looked.set()
        assert done.wait(30)
        return of(*arguments)

    offloading._gpu._costs.of = slow

    def note(df):
        gpu.threads.append(threading.get_ident())
        time.sleep(0.02)
        return df

    offloading.collect_async(TINY.map_batches(note), engine="gpu").result(30)
    assert looked.wait(30)
    waiting = offloading.collect_async(TINY.map_batches(note), engine="gpu")
    assert not waiting.done()
    done.set()
    waiting.result(30)
    assert len(set(gpu.threads)) == 1
