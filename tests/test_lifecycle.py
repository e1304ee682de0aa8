"""The beginning and the end of collectors: configure, close in all its ways, and Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import inside
import pytest
from loops import Asyncio, Trio, fixture_of
from places import HEARS_CTRL_C, TINY

import polars_async
from polars_async import Collector, CollectorClosedError, api

loop = fixture_of(Asyncio, Trio)


# async with, and aclose


@pytest.mark.everywhere
def test_async_with_waits_for_those_that_run_and_cancels_those_that_wait(loop, blocked, executor):
    collector, handles, told = Collector(executor=executor, max_running=1), [], []

    async def use():
        async with collector as entered:
            assert entered is collector
            handles.extend(collector.collect_async(lf) for lf in (blocked.lf, TINY, TINY))
        told.append("closed")

    async def go_on():
        while not (handles and inside.closers(collector)):
            await loop.sleep(0.001)
        for _ in range(100):
            await loop.sleep(0)
        assert [handle.done() for handle in handles] == [False, True, True]
        told.append("went on")
        blocked.gate.set()

    loop.run(loop.together, use, go_on)
    assert told == ["went on", "closed"]
    assert handles[0].result(0).item() == 1
    for handle in handles[1:]:
        with pytest.raises(CancelledError):
            handle.result(0)


def test_async_with_of_nothing_ends_at_once(loop):
    async def main():
        async with Collector() as collector:
            pass
        assert collector.closed
        await collector.aclose()

    loop.run(main)


def test_async_with_lets_the_error_through(loop, blocked, executor):
    collector = Collector(executor=executor, max_running=1)

    async def main():
        async with collector:
            collector.collect_async(blocked.lf)
            blocked.gate.set()
            raise LookupError

    with pytest.raises(LookupError):
        loop.run(main)
    assert collector.closed
    assert inside.running(collector) == 0


def test_aclose_may_leave_the_waiting_to_run(loop, blocked, executor):
    collector = Collector(executor=executor, max_running=1)

    async def main():
        handles = [collector.collect_async(lf) for lf in (blocked.lf, TINY, TINY)]
        blocked.gate.set()
        await collector.aclose(cancel_waiting=False)
        assert [handle.done() for handle in handles] == [True] * 3
        return [(await handle).item() for handle in handles]

    assert loop.run(main) == [1, 1, 1]


def test_aclose_that_is_cancelled_leaves_the_collector_closed_and_its_query_running(
    loop, blocked, executor
):
    collector = Collector(executor=executor, max_running=1)

    async def main():
        handle = collector.collect_async(blocked.lf)
        await loop.cancel_when(lambda: inside.closers(collector), collector.aclose)
        assert collector.closed
        assert not handle.done()
        assert not inside.closers(collector)
        blocked.gate.set()
        await collector.aclose()
        return (await handle).item()

    assert loop.run(main) == 1


def test_aclose_in_many_tasks_at_once_waits_in_each(loop, blocked, executor):
    collector, ended = Collector(executor=executor, max_running=1), []

    async def close():
        await collector.aclose()
        ended.append(handle.done())

    async def let_go():
        while len(inside.closers(collector)) < 3:
            await loop.sleep(0.001)
        blocked.gate.set()

    async def main():
        await loop.together(close, close, close, let_go)

    handle = collector.collect_async(blocked.lf)
    loop.run(main)
    assert ended == [True] * 3


def test_aclose_inside_a_udf_is_refused_rather_than_waiting_for_itself(loop, executor):
    outcomes = []

    def udf(df):
        async def main():
            async def close():
                try:
                    await collector.aclose()
                except RuntimeError as error:
                    outcomes.append(str(error))

            await loop.cancel_when(lambda: outcomes or inside.closers(collector), close)

        try:
            loop.run(main)
        except BaseException as error:  # noqa: BLE001  # it was not cancelled, but ended
            outcomes.append(type(error).__name__)
        return df

    collector = Collector(executor=executor, max_running=1)
    collector.collect_async(TINY.map_batches(udf)).result(30)
    collector.close()
    assert outcomes
    assert "from a Python function of a running query" in outcomes[0]


# close


@pytest.mark.everywhere
def test_close_on_the_loops_thread_waits_for_a_query_that_is_awaited_there(loop, executor):
    collector = Collector(executor=executor, max_running=1)

    async def main():
        handle = collector.collect_async(TINY)
        collector.close()
        assert handle.done()
        return (await handle).item()

    assert loop.run(main) == 1


def test_close_from_another_thread_tells_those_who_await_in_the_loop(loop, blocked, executor):
    collector, outcomes = Collector(executor=executor, max_running=1), []

    async def main():
        running, waiting = (collector.collect_async(lf) for lf in (blocked.lf, TINY))

        async def wait():
            try:
                await waiting
            except loop.cancelled:
                outcomes.append("cancelled")
            blocked.gate.set()
            outcomes.append((await running).item())

        async def close():
            threading.Thread(target=collector.close).start()

        await loop.together(wait, close)

    loop.run(main)
    assert outcomes == ["cancelled", 1]


def test_close_in_a_udf_without_waiting_lets_its_own_query_end(blocked, executor):
    collector = Collector(executor=executor, max_running=1)

    def udf(df):
        blocked.started.set()
        blocked.gate.wait()
        collector.close(wait=False)
        collector.close(wait=False)
        return df

    handle = collector.collect_async(TINY.map_batches(udf))
    assert blocked.started.wait(30)
    waiting = collector.collect_async(TINY)
    blocked.gate.set()
    assert handle.result(30).item() == 1
    with pytest.raises(CancelledError):
        waiting.result(30)
    collector.close()


def test_close_cancels_for_good_what_close_left_to_run(collector, blocked):
    collector.collect_async(blocked.lf)
    waiting = collector.collect_async(TINY)
    collector.close(wait=False, cancel_waiting=False)
    assert not waiting.done()
    collector.close(wait=False)
    with pytest.raises(CancelledError):
        waiting.result(0)


GREEN = """
import gevent.monkey; gevent.monkey.patch_all()
import gevent
import polars as pl, polars_async as pa
from polars_async._runtime import unpatched
gate = unpatched.allocate_lock()
gate.acquire()
collector = pa.Collector(max_running=1)
lf = pl.LazyFrame({"a": [1]}).map_batches(lambda df: (gate.acquire(), df)[1])
handle = collector.collect_async(lf, gevent=True)
waiting = collector.collect_async(lf, gevent=True)

def go_on():
    while not collector._cpu.admission.waiters:
        gevent.sleep(0.001)
    print("went on", flush=True)
    gate.release()

gevent.spawn(go_on)
collector.close()
print("closed", handle.done(), waiting.done())
collector.close()
"""


def test_close_lets_other_greenlets_run_where_gevent_has_patched(run_script):
    assert run_script(GREEN) == ["went", "on", "closed", "True", "True"]


USES = {
    "collect_async": lambda collector: collector.collect_async(TINY),
    "collect_async gevent": lambda collector: collector.collect_async(TINY, gevent=True),
    "collect_all_async": lambda collector: collector.collect_all_async([TINY]),
    "collect_background": lambda collector: collector.collect_background(TINY),
    "collect_all_background": lambda collector: collector.collect_all_background([TINY]),
    "collect_schema_async": lambda collector: collector.collect_schema_async(TINY),
    "collect_batches_async": lambda collector: collector.collect_batches_async(TINY),
    "as_completed": lambda collector: collector.as_completed([TINY]),
    "sink_async": lambda collector: collector.sink_async(
        TINY.sink_batches(lambda _: None, lazy=True)
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("ran_before", [True, False])
def test_closed_collector_refuses_whatever_is_asked(use, ran_before, executor):
    collector = Collector(executor=executor)
    if ran_before:
        collector.collect_async(TINY).result(30)
    assert not collector.closed
    collector.close()
    assert collector.closed
    with pytest.raises(CollectorClosedError, match="closed and takes no more queries: make a new"):
        USES[use](collector)
    assert collector.stats()["rejected"] == 1
    assert collector.resolve_engine("streaming").name == "streaming"


# configure


@pytest.fixture
def _unconfigured(monkeypatch):
    monkeypatch.setattr(api._Default, "collector", None)
    yield
    if api._Default.collector is not None:
        api._Default.collector.close()


@pytest.mark.usefixtures("_unconfigured")
def test_configured_collector_is_that_of_the_process():
    events = []
    collector = polars_async.configure(
        engine="streaming", max_running=3, max_waiting=7, on_event=events.append
    )
    assert polars_async.default_collector() is collector
    stats = collector.stats()
    assert (stats["max_running"], stats["max_waiting"]) == (3, 7)
    assert collector.engine == "streaming"
    handles = [polars_async.collect_async(TINY), polars_async.collect_all_async([TINY])]
    for handle in handles:
        handle.result(30)
    assert collector.stats()["submitted"] == 2
    assert {str(event.kind) for event in events} >= {"queued", "started"}


@pytest.mark.usefixtures("_unconfigured")
def test_options_of_engines_reach_the_collector():
    collector = polars_async.configure(default_engine="streaming", gpu="require")
    assert collector.resolve_engine().name == "streaming"
    with pytest.raises(polars_async.EngineUnavailableError):
        collector.collect_async(TINY, engine="gpu")


@pytest.mark.usefixtures("_unconfigured")
@pytest.mark.parametrize("use", ["configure", "default_collector", "collect_async"])
def test_configuring_what_is_in_use_is_refused_until_it_is_closed(use):
    {
        "configure": polars_async.configure,
        "default_collector": polars_async.default_collector,
        "collect_async": lambda: polars_async.collect_async(TINY).result(30),
    }[use]()
    before = polars_async.default_collector()
    with pytest.raises(RuntimeError, match=r"in use already: .* before the first query, or close"):
        polars_async.configure(max_running=3)
    assert polars_async.default_collector() is before
    before.close()
    after = polars_async.configure(max_running=3)
    assert after is polars_async.default_collector() is not before
    assert polars_async.collect_async(TINY).result(30).item() == 1


@pytest.mark.usefixtures("_unconfigured")
def test_configuration_that_is_refused_leaves_all_as_it_was():
    with pytest.raises(ValueError, match="max_running"):
        polars_async.configure(max_running=0)
    assert api._Default.collector is None
    polars_async.configure(max_running=2)


@pytest.mark.usefixtures("_unconfigured")
def test_closed_default_collector_stays_closed():
    polars_async.default_collector().close()
    with pytest.raises(CollectorClosedError):
        polars_async.collect_async(TINY)


FORK = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from 3.12 on
import polars as pl, polars_async as pa
from polars_async import api
case = sys.argv[1]
if case == "configured":
    pa.configure(max_running=3)
elif case == "locked":
    held = threading.Event()
    def hold():
        with api._Default.lock:
            held.set()
            threading.Event().wait()
    threading.Thread(target=hold, daemon=True).start()
    held.wait()
child = os.fork()
if not child:
    signal.alarm(60)
    if case == "configured":
        try:
            pa.configure(max_running=2)
        except RuntimeError:
            print("refused")
        else:
            print("taken")
    else:
        pa.configure(max_running=3)
    print(pa.default_collector().stats()["max_running"])
    print(pa.collect_async(pl.LazyFrame({"a": [1]})).result().item(), flush=True)
    pa.default_collector().close()
    pa.configure(max_running=2).close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child hung"
"""


@pytest.mark.parametrize(
    ("case", "said"),
    [("configured", ["refused", "3", "1"]), ("unused", ["3", "1"]), ("locked", ["3", "1"])],
)
def test_default_collector_works_in_a_forked_child(run_script, case, said):
    assert run_script(FORK, case) == said


# Ctrl-C


CTRL_C = """
import sys
import polars as pl, polars_async as pa
from polars_async.scheduling.query import Query

numbers = pl.LazyFrame({"x": range(30_000)})
LONG = numbers.join(numbers, how="cross").join(numbers, how="cross", suffix="2").select(
    pl.col("x").sum()
)
add_waiter = Query.add_waiter
def add_and_say(query, waiter):
    added = add_waiter(query, waiter)
    print("waits", flush=True)
    return added
Query.add_waiter = add_and_say
collector = pa.Collector(max_running=1)

async def main():
    await collector.collect_async(LONG, engine="streaming", label="long", timeout=3600)
if sys.argv[1] == "asyncio":
    import asyncio
    asyncio.run(main())
else:
    import trio
    trio.run(main)
"""


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_ctrl_c_ends_a_program_whose_query_runs_on(loop):
    command = [sys.executable, "-c", HEARS_CTRL_C + CTRL_C, loop]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        try:
            assert process.stdout.readline() == "waits\n"
            process.send_signal(signal.SIGINT)
            said, complaints = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, said) == (-signal.SIGINT, "")
    assert complaints.splitlines()[-1] == "KeyboardInterrupt"
    assert not [word for word in ("never", "ignored", "panicked") if word in complaints]
