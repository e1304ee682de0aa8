from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import gevent
import pytest
from conftest import TINY

from polars_async.admission import Admission
from polars_async.query import Query


def test_query_that_ends_just_before_the_greenlet_waits_wakes_it(collector, blocked, monkeypatch):
    add_waiter = Query.add_waiter

    def add_then_end(query, waiter):
        told = threading.Event()
        post = waiter.mailbox.post
        waiter.mailbox.post = lambda item: (post(item), told.set())
        added = add_waiter(query, waiter)
        blocked.gate.set()
        assert told.wait(30)
        return added

    handle = collector.collect_async(blocked.lf, gevent=True)
    monkeypatch.setattr(Query, "add_waiter", add_then_end)
    assert gevent.spawn(handle.get).get(timeout=10).item() == 1


def test_close_returns_when_the_last_query_is_done(collector, monkeypatch):
    release = Admission.release
    released, go = threading.Event(), threading.Event()

    def release_and_stop(admission, query):
        following = release(admission, query)
        released.set()
        go.wait()
        return following

    monkeypatch.setattr(Admission, "release", release_and_stop)
    handle = collector.collect_async(TINY)
    assert released.wait(30)
    done = []
    closer = threading.Thread(target=lambda: (collector.close(), done.append(handle.done())))
    closer.start()
    closer.join(0.2)  # where close does not wait for the query, this is time enough to see it
    go.set()
    closer.join()
    assert done == [True]


def test_closed_loop_is_not_kept_alive_by_what_it_was_still_to_be_told(collector, blocked):
    loop = asyncio.new_event_loop()
    handle = collector.collect_async(blocked.lf)

    async def wait():
        await handle

    task = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    blocked.gate.set()
    assert handle.result().item() == 1
    collector.close()
    task._log_destroy_pending = False
    alive = weakref.ref(loop)
    del loop, task
    gc.collect()
    assert alive() is None


FORK = """
import gc, os, signal, sys, threading
case = sys.argv[1]
if case == "greenlet":
    import gevent.monkey; gevent.monkey.patch_all()
import polars as pl, polars_async as pa
from polars_async import _native
from polars_async.admission import Admission

def shut():
    lock = _native.allocate_lock()
    lock.acquire()
    return lock

started, gate, released, go = shut(), shut(), shut(), shut()
def udf(df):
    started.release()
    gate.acquire()
    return df

collector = pa.Collector(max_running=1)
lf = pl.LazyFrame({"a": [1]}).map_batches(udf)
handle = collector.collect_async(lf, gevent=case == "greenlet")
started.acquire()
wait = handle.result
if case == "collected":
    del collector
    gc.collect()
elif case == "released":
    release = Admission.release
    def release_and_stop(admission, query):
        following = release(admission, query)
        released.release()
        go.acquire()
        return following
    Admission.release = release_and_stop
    gate.release()
    released.acquire()
elif case == "greenlet":
    def get():
        try:
            return handle.get()
        except pa.ForkedProcessError as error:
            return error
    def wait():
        outcome = greenlet.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
    greenlet = gevent.spawn(get)
    gevent.sleep(0)

child = os.fork()
if not child:
    signal.alarm(10)
    try:
        print("child", wait().item(), flush=True)
    except pa.ForkedProcessError:
        print("child ForkedProcessError", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child hung"
gate.release() if case != "released" else go.release()
print("parent", wait().item())
"""


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("pending", ["ForkedProcessError"]),
        ("collected", ["ForkedProcessError"]),
        ("released", ["1", "ForkedProcessError"]),
        ("greenlet", ["ForkedProcessError"]),
    ],
)
def test_handle_pending_at_a_fork_resolves_in_child_and_parent(run_script, case, told):
    _, outcome, *parent = run_script(FORK, case)
    assert outcome in told
    assert parent == ["parent", "1"]
