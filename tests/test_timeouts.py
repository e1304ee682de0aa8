"""Queries that have to be done in time, and the one clock that sees to it."""

from __future__ import annotations

import asyncio
import pickle
import sys
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from fractions import Fraction

import inside
import pytest
import trio
from loops import Asyncio, Gevent, Trio, fixture_of
from places import TINY, Notes, until
from test_races import Together, Told, end, query_of

from polars_async import PolarsAsyncError, QueryTimeoutError
from polars_async._runtime import timers
from polars_async.scheduling.admission import Admission
from polars_async.scheduling.query import Query
from polars_async.scheduling.sizes import Limits


class Time:
    """A time that passes when the test says so."""

    def __init__(self):
        self.now = 0.0
        self.clock = timers._Timers(self)

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds
        self.clock.wakeup.put(None)

    def end(self):
        with self.clock.lock:
            self.clock.heap.clear()
        self.clock.wakeup.put(None)
        until(lambda: not self.clock.runs)


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(timers, "_timers", time.clock)
    yield time
    time.end()


loop = fixture_of(Asyncio, Trio, Gevent)


@pytest.fixture
def when_waited_for(monkeypatch):
    """Do something once somebody waits for a query."""
    add_waiter = Query.add_waiter

    def set_up(act):
        def add_then_act(query, waiter):
            added = add_waiter(query, waiter)
            act()
            return added

        monkeypatch.setattr(Query, "add_waiter", add_then_act)

    return set_up


def timed_out(handle):
    with pytest.raises(QueryTimeoutError) as caught:
        handle.result(30)
    return caught.value


# What becomes of the query


def test_query_that_is_late_in_the_queue_never_runs(collector, blocked, time):
    ran = Notes()
    collector.collect_async(blocked.lf)
    handle = collector.collect_async(TINY.map_batches(lambda df: (ran.append(1), df)[1]), timeout=5)
    time.passes(4.9)
    assert not handle.done()
    time.passes(0.1)
    error = timed_out(handle)
    assert (error.timeout, error.run_seconds) == (5, None)
    assert error.queue_seconds > 0
    assert str(error) == (
        f"the query was not done after 5 s: it waited {error.queue_seconds:.3f} s for a slot "
        "behind 1 running query, and never ran"
    )
    stats = collector.stats()
    assert (stats["waiting"], stats["timed_out"], stats["abandoned"]) == (0, 1, 0)
    assert handle.done()
    assert not handle.cancel()
    blocked.gate.set()
    collector.close(cancel_waiting=False)
    assert not ran


def test_query_that_is_late_while_it_runs_is_given_up_and_keeps_its_slot_until_it_ends(
    collector, blocked, time
):
    handle = collector.collect_async(blocked.lf, timeout=0.5, label="slow one")
    waiting = collector.collect_async(TINY)
    assert blocked.started.wait(30)
    time.passes(0.5)
    error = timed_out(handle)
    assert error.run_seconds > 0
    assert str(error) == (
        f"the query 'slow one' was not done after 0.5 s: it waited {error.queue_seconds:.3f} s for "
        f"a slot and ran for {error.run_seconds:.3f} s. Polars cannot stop it, so it keeps its "
        "slot until it really ends"
    )
    stats = collector.stats()
    assert (stats["running"], stats["abandoned"], stats["waiting"]) == (1, 1, 1)
    assert not waiting.done()
    blocked.gate.set()
    assert waiting.result(30).item() == 1
    collector.close()
    stats = collector.stats()
    assert (stats["completed"], stats["failed"], stats["timed_out"]) == (1, 0, 1)
    assert (stats["running"], stats["abandoned"]) == (0, 0)


@pytest.mark.everywhere
@pytest.mark.cannot("threads", because="Polars cannot stop a query", runs=False)
def test_query_that_is_late_while_it_runs_is_stopped(collector, blocked, time, executor):
    handle = collector.collect_async(blocked.lf, timeout=0.5, label="slow one")
    waiting = collector.collect_async(TINY)
    assert blocked.started.wait(30)
    time.passes(0.5)
    error = timed_out(handle)
    assert error.run_seconds > 0
    ran = f"{error.run_seconds:.3f} s"
    end = (
        f"ran for {ran} on the in-memory engine in {handle._query.place}. It is stopped now"
        if executor == "processes"
        else f"was with its executor for {ran}, which is asked to drop it and may go on with it "
        "all the same"
    )
    assert str(error) == (
        f"the query 'slow one' was not done after 0.5 s: it waited {error.queue_seconds:.3f} s for "
        f"a slot and {end}"
    )
    until(lambda: (time.passes(1), waiting.done())[1])  # for the grace that is left to a worker
    assert waiting.result().item() == 1
    assert not blocked.gate.is_set()
    collector.close()
    stats = collector.stats()
    assert (stats["completed"], stats["failed"], stats["timed_out"]) == (1, 0, 1)
    assert (stats["running"], stats["abandoned"]) == (0, 0)


def test_error_is_one_of_ours_and_a_timeout_error_and_can_be_pickled():
    error = QueryTimeoutError("too late", 1.5, 0.25, None)
    assert isinstance(error, PolarsAsyncError)
    assert isinstance(error, TimeoutError)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (QueryTimeoutError, "too late")
    assert (again.timeout, again.queue_seconds, again.run_seconds) == (1.5, 0.25, None)


@pytest.mark.everywhere(late=[None, KeyboardInterrupt])
@pytest.mark.parametrize("late", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_what_comes_too_late_is_dropped_in_silence(
    collector, blocked, time, capfd, caplog, monkeypatch, late
):
    noise = []
    for module, hook in ((sys, "unraisablehook"), (threading, "excepthook"), (sys, "excepthook")):
        monkeypatch.setattr(module, hook, noise.append)

    def udf(df):
        if late is not None:
            raise late
        return df

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda *told: noise.append(told))
        handle = collector.collect_async(blocked.lf.map_batches(udf), timeout=1)
        await asyncio.to_thread(blocked.started.wait)
        time.passes(1)
        with pytest.raises(QueryTimeoutError):
            await handle
        blocked.gate.set()
        await collector.aclose()
        return handle

    handle = asyncio.run(main())
    assert timed_out(handle)
    outcome = handle._query._outcome  # dropped a moment after the slot is free
    until(lambda: outcome.value is None and outcome.error is None)
    assert (noise, caplog.records, capfd.readouterr().err) == ([], [], "")


def test_result_in_time_cancels_the_timer(collector, blocked, time):
    handle = collector.collect_async(blocked.lf, timeout=5)
    blocked.gate.set()  # not before there is a timer, which a query that is done has none of
    assert handle.result(30).item() == 1
    ((_, _, deadline),) = time.clock.heap
    until(lambda: deadline.target is None)
    time.passes(10)
    until(lambda: not time.clock.runs)
    assert handle.result().item() == 1
    assert collector.stats()["timed_out"] == 0


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_other_ends_cancel_the_timer_too(collector, blocked, time, how):
    collector.collect_async(blocked.lf)
    handle = collector.collect_async(TINY.select("nope"), timeout=5)
    if how == "cancelled":
        handle.cancel()
    else:
        blocked.gate.set()
        with pytest.raises(Exception, match="nope"):
            handle.result(30)
    ((_, _, deadline),) = time.clock.heap
    until(lambda: deadline.target is None)
    time.passes(10)
    until(lambda: not time.clock.runs)
    assert collector.stats()[how] == 1


# Who is told


def test_late_query_gives_the_same_error_whenever_and_wherever_it_is_asked(
    collector, blocked, time, loop, when_waited_for
):
    handle = collector.collect_async(blocked.lf, timeout=5, gevent=True)
    when_waited_for(lambda: time.passes(5))
    error = loop.outcome(handle)
    assert type(error) is QueryTimeoutError
    for again in (loop, Asyncio(), Trio(), Gevent()):
        assert again.outcome(handle) is error
    assert timed_out(handle) is error
    with pytest.raises(QueryTimeoutError) as caught:
        handle.get(block=False)
    assert caught.value is error
    assert len(caught.traceback) < 6  # not that of every time before


def test_waiting_thread_is_told(collector, blocked, time, when_waited_for):
    when_waited_for(lambda: time.passes(5))
    assert timed_out(collector.collect_async(blocked.lf, timeout=5)).timeout == 5


def test_all_that_wait_are_told(collector, blocked, time, when_waited_for):
    waiting = threading.Semaphore(0)
    when_waited_for(waiting.release)

    async def main(handle):
        return await asyncio.gather(*(wait(handle) for _ in range(2)), return_exceptions=True)

    async def wait(handle):
        return await handle

    handle = collector.collect_async(blocked.lf, timeout=5)
    with ThreadPoolExecutor(2) as pool:
        in_loop, in_thread = pool.submit(asyncio.run, main(handle)), pool.submit(handle.result)
        for _ in range(3):
            assert waiting.acquire(timeout=30)
        time.passes(5)
        errors = [*in_loop.result(30), in_thread.exception(30)]
    assert errors == [timed_out(handle)] * 3


def test_time_out_of_the_wait_is_not_that_of_the_query(collector, blocked, time):
    handle = collector.collect_async(blocked.lf, timeout=5)
    with pytest.raises(TimeoutError) as caught:
        handle.result(0.001)
    assert type(caught.value) is TimeoutError
    assert not handle.done()
    time.passes(5)
    timed_out(handle)


def test_time_out_of_asyncio_cancels_the_query(collector, blocked):
    handle = collector.collect_async(blocked.lf, timeout=3600)

    async def main():
        async with asyncio.timeout(0):
            await handle

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(main())
    assert type(caught.value) is TimeoutError
    assert collector.stats()["cancelled"] == 1
    with pytest.raises(CancelledError):
        handle.result()


def test_time_out_of_trio_cancels_the_query(collector, blocked):
    handle = collector.collect_async(blocked.lf, timeout=3600)

    async def main():
        with trio.move_on_after(0) as scope:
            await handle
        return scope.cancelled_caught

    assert trio.run(main)
    assert collector.stats()["cancelled"] == 1
    with pytest.raises(CancelledError):
        handle.result()


# The clock


def test_earlier_deadline_that_comes_later_is_kept(collector, blocked, monkeypatch):
    monkeypatch.setattr(timers, "_timers", clock := timers._Timers())
    waits, when_put = threading.Event(), timers.when_put

    def say_and_wait(bell, seconds):
        waits.set()
        when_put(bell, seconds)

    monkeypatch.setattr(timers, "when_put", say_and_wait)
    later = collector.collect_async(blocked.lf, timeout=3600)
    assert waits.wait(30)
    timed_out(collector.collect_async(TINY, timeout=0.001))
    assert not later.done()
    later.cancel()
    with clock.lock:
        clock.heap.clear()
    clock.wakeup.put(None)


def test_deadline_is_kept_though_the_one_before_was_set_in_vain(collector, blocked, time):
    class Bell:
        def __init__(self, bell):
            self.get, self.put = bell.get, self.fail
            self.bell = bell

        def fail(self, _):
            self.put = self.bell.put
            raise KeyboardInterrupt

    collector.collect_async(blocked.lf, timeout=3600)
    until(lambda: time.clock.wakes_at == 3600)
    time.clock.wakeup = Bell(time.clock.wakeup)
    with pytest.raises(KeyboardInterrupt):
        collector.collect_async(TINY, timeout=1)
    time.now = 2.5
    handle = collector.collect_async(TINY, timeout=1e-9)
    time.now = 3
    timed_out(handle)


def test_deadlines_come_in_their_order(collector, blocked, time):
    collector.collect_async(blocked.lf)
    handles = {seconds: collector.collect_async(TINY, timeout=seconds) for seconds in (3, 1, 4, 2)}
    for now in (1, 2, 3, 4):
        time.passes(1)
        timed_out(handles[now])
        assert sum(handle.done() for handle in handles.values()) == now


def test_clock_ends_after_its_last_deadline_and_is_started_anew(collector, blocked, monkeypatch):
    monkeypatch.setattr(timers, "_timers", clock := timers._Timers())
    ended, start_new_thread = threading.Semaphore(0), timers.start_new_thread

    def start(run, arguments):
        start_new_thread(lambda: (run(*arguments), ended.release()), ())

    monkeypatch.setattr(timers, "start_new_thread", start)
    collector.collect_async(blocked.lf)
    for _ in range(3):
        timed_out(collector.collect_async(TINY, timeout=0.001))
        assert ended.acquire(timeout=30)
        assert not clock.heap


class Failing:
    """What raises when it is late."""

    def __init__(self, error):
        self._error = error

    def expire(self):
        raise self._error


@pytest.mark.parametrize("kind", [PermissionError, SystemExit])
def test_clock_survives_what_is_raised_at_a_time_out(collector, blocked, time, caplog, kind):
    handle = collector.collect_async(blocked.lf, timeout=5)
    assert blocked.started.wait()
    timers.start_timer(5, Failing(kind()))
    after = collector.collect_async(TINY, timeout=6)
    time.passes(5)
    timed_out(handle)
    time.passes(1)
    timed_out(after)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == [
        "what was to be done at a time-out has failed"
    ]


def test_clock_that_dies_is_replaced_with_the_next_deadline(
    collector, blocked, time, monkeypatch, caplog
):
    def no_memory(heap):
        if heap is not time.clock.heap:  # but of the clock of an earlier test
            return heappop(heap)
        monkeypatch.setattr(timers, "heappop", heappop)
        raise MemoryError

    heappop = timers.heappop
    monkeypatch.setattr(timers, "heappop", no_memory)
    handle = collector.collect_async(blocked.lf, timeout=5)
    assert blocked.started.wait()
    time.passes(5)
    until(lambda: not time.clock.runs)
    after = collector.collect_async(TINY, timeout=1)
    time.passes(1)
    timed_out(after)
    timed_out(handle)
    until(lambda: "the thread of all time-outs has ended" in caplog.text)


def test_deadlines_that_were_lifted_do_not_pile_up(collector, blocked, monkeypatch, time):
    monkeypatch.setattr(timers, "_SWEPT_FROM", 10)
    time.clock.swept_at = 10
    handle = collector.collect_async(blocked.lf, timeout=7200)
    for _ in range(200):
        collector.collect_async(TINY, timeout=3600).cancel()
        assert len(time.clock.heap) <= 12
    time.passes(3600)
    assert not handle.done()
    time.passes(3600)
    timed_out(handle)


def test_deadlines_of_queries_on_the_way_are_all_kept(collector, blocked, monkeypatch, time):
    monkeypatch.setattr(timers, "_SWEPT_FROM", 10)
    time.clock.swept_at = 10
    collector.collect_async(blocked.lf)
    handles = [collector.collect_async(TINY, timeout=100 - i) for i in range(50)]
    time.passes(100)
    for handle in handles:
        timed_out(handle)


@pytest.mark.parametrize("timeout", [Fraction(1, 1000)])
def test_clock_outlives_any_number(collector, blocked, timeout, monkeypatch):
    monkeypatch.setattr(timers, "_timers", timers._Timers())  # it may not come back
    collector.collect_async(blocked.lf)
    try:
        handle = collector.collect_async(TINY, timeout=timeout)
    except (TypeError, ValueError):
        pass
    else:
        with pytest.raises(QueryTimeoutError):
            handle.result(30)
    timed_out(collector.collect_async(TINY, timeout=0.001))


def test_query_that_cannot_be_timed_is_not_left_behind(collector, blocked, time, monkeypatch):
    def start_new_thread(*_):
        raise RuntimeError("can't start new thread")

    collector.collect_async(blocked.lf)
    with monkeypatch.context() as patch:
        patch.setattr(timers, "start_new_thread", start_new_thread)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            collector.collect_async(TINY, timeout=5)
    assert inside.waiting(collector) == 0
    handle = collector.collect_async(TINY, timeout=5)
    time.passes(5)
    timed_out(handle)


FORK = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from 3.12 on
import polars as pl, polars_async as pa
from polars_async._runtime import timers

class Query:  # a real one would start Polars' threads
    def expire(self):
        print("parent", flush=True)

held = threading.Event()
def hold():
    with timers._timers.lock:
        held.set()
        threading.Event().wait()

timers.start_timer(3600, Query())
if sys.argv[1] == "held":
    threading.Thread(target=hold, daemon=True).start()
    held.wait()
child = os.fork()
if not child:
    signal.alarm(60)
    gate = threading.Event()
    collector = pa.Collector(max_running=1)
    lf = pl.LazyFrame({"a": [1]}).map_batches(lambda df: (gate.wait(), df)[1])
    try:
        collector.collect_async(lf, timeout=0.01).result(30)
    except pa.QueryTimeoutError:
        print("child", flush=True)
    gate.set()
    collector.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child hung"
if sys.argv[1] != "held":
    told = threading.Event()
    Query.expire = lambda _: told.set()
    timers.start_timer(0.01, Query())
    assert told.wait(10)
print("over")
"""


@pytest.mark.parametrize("lock", ["free", "held"])
def test_forked_child_has_a_clock_of_its_own(run_script, lock):
    assert run_script(FORK, lock) == ["child", "over"]


# Races


@pytest.fixture
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switch_often")
def test_of_an_end_and_a_time_out_one_is_first():
    admission = Admission(Limits(1))
    query = None
    with Together(lambda: end(admission, query), lambda: query.expire()) as together:  # noqa: PLW0108  # another each time
        for i in range(1000):
            query, told = query_of(admission, i), Told()
            assert query.add_waiter(told)
            together.turn()
            assert told.times == 1
            assert admission.running == 0
            counts = admission.counts
            assert counts.as_stats()["completed"] + counts.as_stats()["timed_out"] == i + 1
            if query._timeout_error is None:
                assert query.outcome(CancelledError) == i
            else:
                assert query._outcome.value is None
                with pytest.raises(QueryTimeoutError):
                    query.outcome(CancelledError)


@pytest.mark.usefixtures("_switch_often")
def test_of_a_cancellation_and_a_time_out_one_is_first():
    admission = Admission(Limits(1))
    query = cancelled = None

    def cancel():
        nonlocal cancelled
        cancelled = query.cancel()

    with Together(cancel, lambda: query.expire()) as together:  # noqa: PLW0108  # as above
        for i in range(1000):
            query, told = query_of(admission, i), Told()
            assert query.add_waiter(told)
            together.turn()
            end(admission, query)
            assert told.times == 1
            counts = admission.counts
            assert counts.as_stats()["cancelled"] + counts.as_stats()["timed_out"] == i + 1
            assert counts.as_stats()["completed"] == 0
            with pytest.raises(CancelledError if cancelled else QueryTimeoutError):
                query.outcome(CancelledError)


@pytest.mark.usefixtures("_switch_often", "time")
def test_deadline_of_a_query_that_ends_meanwhile_is_cancelled():
    admission = Admission(Limits(1))
    query = None
    with Together(lambda: end(admission, query), lambda: query.expire_in(3600)) as together:
        for i in range(500):
            query = query_of(admission, i)
            together.turn()
            assert query._timer.target is None
