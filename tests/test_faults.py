"""What goes wrong around a query stays there: every await ends, nothing is said, the next works."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
from concurrent.futures import CancelledError

import gevent
import inside
import polars as pl
import pytest
from loops import Asyncio, Gevent, Trio, Uvloop, fixture_of
from places import LIMIT, STDERR_OF_THE_CLUSTER, TINY, Blocked, Gate, until

from polars_async import bridges, events
from polars_async._runtime import logs, unpatched
from polars_async.bridges import asyncio as asyncio_bridge
from polars_async.executors import threads
from polars_async.scheduling.query import Query

PANIC = pl.select(1).lazy().select(pl.int_range(0, 2**62))


async def plainly(handle):
    return await handle


loop = fixture_of(Asyncio, Trio, Gevent)
on_uvloop_too = pytest.mark.parametrize("loop", [Asyncio, Uvloop, Trio, Gevent], indirect=True)


@pytest.fixture(autouse=True)
def quiet(capfd):
    """Nothing goes to stderr, and nothing is logged at WARNING or above, by any loop either."""
    heard = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    yield heard
    gc.collect()  # what was never retrieved is told of now
    logging.getLogger().removeHandler(handler)
    assert (heard, capfd.readouterr().err) == ([], "")


@pytest.fixture
def works_after(collector, loop):
    """Show that the next query works in every way, and that all slots are free in the end."""

    def show():
        assert collector.collect_async(TINY).result(20).item() == 1
        assert loop.outcome(collector.collect_async(TINY, gevent=loop.uses_gevent)).item() == 1
        collector.close()
        assert (inside.running(collector), inside.waiting(collector)) == (0, 0)

    return show


def raising(error):
    def udf(_):
        raise error

    return TINY.map_batches(udf)


@pytest.mark.everywhere
def test_panic_arrives_as_an_exception(loop, collector, works_after, capfd):
    handle = collector.collect_async(PANIC, gevent=loop.uses_gevent)
    error = loop.outcome(handle)
    assert (type(error).__module__, type(error).__name__) == ("pyo3_runtime", "PanicException")
    with pytest.raises(type(error)):
        handle.result(20)
    capfd.readouterr()  # which has what Rust says of it
    works_after()


@pytest.mark.everywhere
@pytest.mark.cannot("dask", because=STDERR_OF_THE_CLUSTER, runs=False)
def test_panic_is_told_on_stderr(collector, capfd):
    with pytest.raises(pl.exceptions.PanicException):
        collector.collect_async(PANIC).result(20)
    assert "panicked at" in capfd.readouterr().err


@pytest.mark.everywhere(kind=[KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    "kind",
    [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError],
)
def test_exception_that_is_no_error_arrives_unchanged(loop, collector, works_after, kind, is_that):
    raised = kind.__new__(kind)
    handle = collector.collect_async(raising(raised), gevent=loop.uses_gevent)
    error = loop.outcome(handle)
    assert is_that(error, raised)
    assert loop.outcome(handle) is error
    with pytest.raises(kind):
        handle.result(20)
    works_after()


@pytest.mark.everywhere
def test_stop_iteration_arrives_where_no_coroutine_has_its_own_use_for_it(
    loop, collector, works_after, is_that
):
    raised = StopIteration(7)
    handle = collector.collect_async(raising(raised), gevent=loop.uses_gevent)
    error = loop.outcome(handle)
    if not loop.uses_gevent:
        assert type(error) is RuntimeError
        error = error.__cause__
    assert is_that(error, raised)
    with pytest.raises(StopIteration):
        handle.result(20)
    works_after()


@on_uvloop_too
def test_cancelled_wait_takes_a_waiting_query_out_of_the_queue(
    loop, collector, blocked, works_after
):
    ran = Gate()
    collector.collect_async(blocked.lf)
    handle = collector.collect_async(TINY.map_batches(lambda df: (ran.set(), df)[1]), gevent=True)
    loop.reset_after_fork(handle)
    assert inside.waiting(collector) == 0
    assert handle.done()
    blocked.gate.set()
    works_after()
    assert not ran.is_set()
    with pytest.raises(CancelledError):
        handle.result(20)


@pytest.mark.everywhere
def test_cancelled_wait_cancels_a_running_query(loop, collector, blocked, works_after, is_given_up):
    handle = collector.collect_async(blocked.lf, gevent=True)
    blocked.started.wait()
    loop.reset_after_fork(handle)
    assert handle.done()
    is_given_up(collector)
    blocked.gate.set()
    works_after()
    with pytest.raises(CancelledError):
        handle.result(20)


@pytest.mark.everywhere(error=ValueError)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_of_a_query_that_was_cancelled_is_not_reported(loop, collector, works_after, error):
    started, gate = Gate(), Gate()

    def udf(_):
        started.set()
        gate.wait()
        raise error

    handle = collector.collect_async(TINY.map_batches(udf), gevent=True)
    started.wait()
    loop.reset_after_fork(handle)
    gate.set()
    works_after()


@on_uvloop_too
def test_cancelled_wait_is_quiet_when_the_result_is_on_its_way(
    loop, collector, blocked, works_after, monkeypatch
):
    told = Gate()
    wake = loop.bridge._Waiter.wake
    monkeypatch.setattr(loop.bridge._Waiter, "wake", lambda waiter: (wake(waiter), told.set()))
    handle = collector.collect_async(blocked.lf, gevent=True)
    loop.reset_after_fork(handle, lambda: (blocked.gate.set(), told.wait()))
    assert handle.result(20).item() == 1
    works_after()


@on_uvloop_too
def test_loop_that_ends_with_the_result_on_its_way_loses_nothing(
    loop, collector, blocked, works_after, monkeypatch
):
    ended, over = Gate(), Gate()
    wake = loop.bridge._Waiter.wake

    def wake_late(waiter):
        ended.set()
        over.wait()
        wake(waiter)

    handle = collector.collect_async(blocked.lf, gevent=True)
    with monkeypatch.context() as patch:
        patch.setattr(loop.bridge._Waiter, "wake", wake_late)
        loop.reset_after_fork(handle, lambda: (blocked.gate.set(), ended.wait()))
        over.set()
        assert handle.result(20).item() == 1
        assert loop.outcome(handle).item() == 1
    works_after()  # in the one thread there is, so that it had its say


@pytest.mark.parametrize("kind", [Asyncio, Uvloop])
def test_asyncio_loop_closed_under_a_task_loses_nothing(collector, blocked, kind):
    handle = collector.collect_async(blocked.lf)
    loop = kind.new_loop()
    task = loop.create_task(plainly(handle))
    task._log_destroy_pending = False  # asyncio's own word on a task that is left behind
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    blocked.gate.set()
    assert handle.result(20).item() == 1
    assert kind().outcome(handle).item() == 1
    assert kind().outcome(collector.collect_async(TINY)).item() == 1
    assert not task.done()


def test_gevent_hub_destroyed_under_a_greenlet_loses_nothing(collector, blocked):
    handle = collector.collect_async(blocked.lf, gevent=True)
    left = []

    def leave():
        left.append(gevent.spawn(handle.get))
        gevent.sleep(0)

    Gevent().inside(leave)
    blocked.gate.set()
    assert handle.result(20).item() == 1
    assert Gevent().outcome(handle).item() == 1
    assert collector.collect_async(TINY, gevent=True).get().item() == 1


def test_gevent_hub_replaced_in_one_thread_is_told_too(collector):
    def replaced():
        outcomes = []
        for _ in range(2):
            blocked = Blocked()
            handle = collector.collect_async(blocked.lf, gevent=True)
            gevent.spawn(blocked.gate.set)
            outcomes.append(handle.get(timeout=20).item())
            gevent.get_hub().destroy(destroy_loop=True)
        return outcomes

    assert Gevent().inside(replaced) == [1, 1]


@pytest.mark.parametrize("after", [Asyncio, Trio, Gevent])
def test_handle_made_in_one_loop_is_awaited_in_another(
    loop, collector, blocked, works_after, after
):
    handle = loop.inside(lambda: collector.collect_async(blocked.lf, gevent=True))
    blocked.started.wait()
    blocked.gate.set()
    assert after().outcome(handle).item() == 1
    assert loop.outcome(handle).item() == 1
    works_after()


def test_query_runs_on_when_one_of_two_loops_leaves(
    loop, collector, blocked, works_after, monkeypatch
):
    handle = collector.collect_async(blocked.lf, gevent=True)
    waits, other = Gate(), unpatched.SimpleQueue()
    add_waiter = Query.add_waiter
    with monkeypatch.context() as patch:
        patch.setattr(Query, "add_waiter", lambda *to: (add_waiter(*to), waits.set())[0])
        unpatched.start_new_thread(lambda: other.put(loop.outcome(handle)), ())
        waits.wait()
    loop.reset_after_fork(handle)
    blocked.gate.set()
    assert other.get(timeout=20).item() == 1
    works_after()


def test_waiter_that_cannot_be_told_is_logged_and_costs_nobody_else_the_result(
    loop, collector, blocked, works_after, quiet
):
    class Broken:
        def wake(self):
            raise ValueError

    handle = collector.collect_async(blocked.lf, gevent=True)
    handle._query.add_waiter(Broken())
    blocked.started.wait()
    blocked.gate.set()
    assert loop.outcome(handle).item() == 1
    works_after()
    until(lambda: quiet)  # the slot is free, and others are woken, before it is told
    assert quiet == ["a waiter could not be woken"]
    quiet.clear()


class Unstoppable(BaseException):
    """What nobody expects to come out of a place."""


@pytest.mark.everywhere(kind=Unstoppable)
@pytest.mark.parametrize("kind", [PermissionError, Unstoppable])
def test_executor_that_cannot_stop_a_query_costs_nobody_the_wake_up(
    collector, blocked, works_after, quiet, kind
):
    def stop():
        raise kind

    handle = collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    ended = unpatched.SimpleQueue()
    unpatched.start_new_thread(lambda: ended.put(outcome_of(handle)), ())
    until(lambda: inside.waiters(handle))
    handle._query.stop_with(stop)
    assert handle.cancel()
    assert isinstance(ended.get(timeout=LIMIT), CancelledError)
    blocked.gate.set()
    works_after()
    assert quiet == ["a query that was cancelled or timed out could not be stopped"]
    quiet.clear()


def outcome_of(handle):
    try:
        return handle.result(LIMIT)
    except BaseException as error:  # noqa: BLE001  # told to the test
        return error


def test_handler_and_observer_that_raise_cost_no_query_its_end(
    collector, works_after, monkeypatch, quiet
):
    def observe(_):
        raise ValueError

    class Broken(logging.Handler):
        def emit(self, _):
            raise SystemExit

    monkeypatch.setattr(events, "observers", [observe])
    monkeypatch.setattr(logs.log, "handlers", [Broken()])
    assert collector.collect_async(TINY, gevent=True).result(LIMIT).item() == 1
    works_after()
    assert quiet == []


@pytest.mark.everywhere
def test_thread_that_cannot_be_had_gives_the_slot_back(collector, works_after, monkeypatch):
    def no_more(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threads, "start_new_thread", no_more)
        with pytest.raises(RuntimeError, match="start new thread"):
            collector.collect_async(TINY, gevent=True)
    works_after()


def test_await_where_no_loop_runs_says_so_and_loses_nothing(collector):
    handle = collector.collect_async(TINY)
    with pytest.raises(RuntimeError, match="neither asyncio nor trio runs in this thread"):
        next(handle.__await__())
    assert handle.result(20).item() == 1
    assert bridges.current() is asyncio_bridge


PATCHED = """
import sys, warnings
warnings.simplefilter("ignore")  # gevent's own, on what was imported before
if sys.argv[1] == "after":
    import polars_async.api, polars_async.bridges.gevent
import gevent.monkey
gevent.monkey.patch_all()
import pytest
these = "gevent and not asyncio and not trio and not patched"
options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
sys.exit(pytest.main([sys.argv[2], "-k", these, *options]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("patched", ["before", "after"])
def test_all_of_this_holds_where_gevent_has_patched_the_interpreter(patched):
    command = [sys.executable, "-c", PATCHED, patched, __file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
