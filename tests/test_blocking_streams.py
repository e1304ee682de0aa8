"""Streams that are iterated without a loop: by plain threads and greenlets of gevent."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import CancelledError

import gevent
import inside
import polars as pl
import pytest
from places import TINY, Blocked, Failure, Source, until

from polars_async import CollectorClosedError, QueryTimeoutError

pytestmark = pytest.mark.smoke


def numbered(count):
    return [pl.LazyFrame({"a": [number]}) for number in range(count)]


def failing(error):
    def fail(_):
        raise error

    return TINY.map_batches(fail)


def in_thread(function):
    """Call `function` on a plain thread; return what it returns."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(40)
    return found[0]


def in_greenlet(function):
    """Call `function` in a greenlet, on a thread with a hub of its own."""

    def call():
        try:
            return gevent.spawn(function).get(timeout=40)
        finally:
            gevent.get_hub().destroy(destroy_loop=True)

    return in_thread(call)


here = pytest.mark.parametrize("here", [in_thread, in_greenlet])


# What comes


@here
@pytest.mark.everywhere
def test_batches_come_in_order(collector, here):
    frame = pl.LazyFrame({"a": range(7)})
    batches = here(lambda: list(collector.collect_batches_async(frame, chunk_size=3)))
    assert [each.height for each in batches] == [3, 3, 1]
    assert pl.concat(batches)["a"].to_list() == list(range(7))


@here
def test_each_result_comes_once(collector, here):
    found = here(lambda: list(collector.as_completed(numbered(20))))
    assert sorted(number for number, _ in found) == list(range(20))
    assert all(frame.item() == number for number, frame in found)
    assert here(lambda: list(collector.as_completed([]))) == []


def test_batches_are_made_only_a_few_ahead_of_a_slow_consumer(collector):
    source = Source()
    with collector.collect_batches_async(source.lf) as batches:
        for _, batch in zip(range(5), batches, strict=False):
            assert batch["a"].dtype == pl.Int64
        until(lambda: collector.stats()["paused"])
        assert source.made < 100


def test_stream_is_at_its_end_for_good(collector):
    batches = collector.collect_batches_async(TINY)
    assert len(list(batches)) == 1
    assert list(batches) == []


def test_thread_waits_for_what_is_not_there_yet(collector, blocked):
    batches = collector.collect_batches_async(blocked.lf)
    taken = []
    thread = threading.Thread(target=lambda: taken.extend(batches))
    thread.start()
    assert blocked.started.wait(30)
    assert not taken
    blocked.gate.set()
    thread.join(30)
    assert len(taken) == 1


def test_waiting_greenlet_lets_others_run(collector, blocked):
    def main():
        batches = collector.collect_batches_async(blocked.lf)
        taking = gevent.spawn(list, batches)

        def free():
            while not batches._buffer._arrivals._waiters:  # the other greenlet waits
                gevent.sleep(0.001)
            blocked.gate.set()

        return gevent.spawn(free).get(timeout=30), taking.get(timeout=30)

    assert len(in_greenlet(main)[1]) == 1


def test_greenlet_that_never_waits_lets_others_run(collector):
    def main():
        turns = []

        def turn():
            while True:
                turns.append(1)
                gevent.sleep(0)

        other = gevent.spawn(turn)
        stream = collector.as_completed(numbered(10))
        until(lambda: len(stream._arrivals.items) == 10)
        assert len(list(stream)) == 10
        other.kill()
        return turns

    assert in_greenlet(main)


PATCHED = """
import gevent.monkey; gevent.monkey.patch_all()
import gevent, threading, time
import polars as pl
from polars_async import Collector

turns = []
def slow(frame):
    while not turns:
        time.sleep(0.001)
    return frame
def turn():
    gevent.sleep(0.01)
    turns.append(1)
with Collector() as collector:
    gevent.spawn(turn)
    batches = collector.collect_batches_async(pl.LazyFrame({"a": [1]}).map_batches(slow))
    print(len(list(batches)))  # on the main greenlet
    found = []
    thread = threading.Thread(target=lambda: found.extend(collector.as_completed([pl.LazyFrame()])))
    thread.start()
    thread.join()
    print(len(found))
"""


def test_all_is_well_where_gevent_has_patched(run_script):
    assert run_script(PATCHED) == ["1", "1"]


# Early ends


@here
@pytest.mark.parametrize("leave", ["close", "with", "break", "del"])
def test_stream_that_is_left_early_cancels_its_query(collector, here, leave):
    source = Source()

    def take():
        stream = collector.collect_batches_async(source.lf)
        if leave == "with":
            with stream:
                next(stream)
        elif leave == "break":
            for _ in stream:
                break
        else:
            next(stream)
        if leave == "close":
            stream.close()
            assert list(stream) == []
        del stream

    here(take)
    assert collector.stats()["cancelled"] == 1
    until(lambda: collector.stats()["running"] == 0)


def test_close_of_another_thread_ends_the_iteration(collector, blocked):
    batches = collector.collect_batches_async(blocked.lf)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(list(batches)))
    thread.start()
    assert blocked.started.wait(30)
    batches.close()
    thread.join(30)
    assert taken == [[]]


def test_greenlet_that_is_killed_cancels_the_query(collector, blocked):
    def main():
        taking = gevent.spawn(list, collector.collect_batches_async(blocked.lf))
        while not blocked.started.is_set():
            gevent.sleep(0.001)
        taking.kill()
        return taking.dead

    assert in_greenlet(main)
    assert collector.stats()["cancelled"] == 1


# Errors


@here
@pytest.mark.parametrize("kind", ["collect_batches_async", "as_completed"])
def test_error_of_a_query_is_raised_and_ends_the_stream(collector, here, kind):
    query = failing(Failure("no"))

    def take():
        stream = getattr(collector, kind)(query if kind == "collect_batches_async" else [query])
        with pytest.raises(Failure, match=r"^no$"):
            next(stream)
        return list(stream)

    assert here(take) == []


@pytest.mark.parametrize("kind", ["collect_batches_async", "as_completed"])
def test_error_that_was_raised_is_kept_by_nothing(collector, kind):
    def fail(_):
        raise Failure

    query = TINY.map_batches(fail)
    gc.collect()
    gc.disable()
    try:
        stream = getattr(collector, kind)(query if kind == "collect_batches_async" else [query])
        try:
            next(stream)
        except Failure as error:
            raised = weakref.ref(error)
        del stream
        until(lambda: raised() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["collect_batches_async", "as_completed"])
def test_query_that_raises_stop_iteration_does_not_end_the_stream_in_silence(collector, kind):
    query = failing(StopIteration())
    stream = getattr(collector, kind)(query if kind == "collect_batches_async" else [query])
    with pytest.raises(RuntimeError, match=r"^the query raised StopIteration$"):
        next(stream)


def test_time_out_and_closing_collector_are_told(collector, blocked):
    late = collector.collect_batches_async(blocked.lf, timeout=3600)
    assert blocked.started.wait(30)  # else it would leave its slot to the next one
    inside.let_time_be_up(late)
    with pytest.raises(QueryTimeoutError):
        next(late)
    waiting = collector.as_completed([Blocked().lf])
    collector.close(wait=False)
    with pytest.raises(CancelledError):
        next(waiting)
    with pytest.raises(CollectorClosedError):
        collector.collect_batches_async(TINY)
