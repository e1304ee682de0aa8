from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from collections import deque
from concurrent.futures import CancelledError, ThreadPoolExecutor

import gevent
import inside
import polars as pl
import pytest
import trio
import trio.testing
import uvloop
from conftest import TINY
from places import until

from polars_async import Collector
from polars_async.bridges import gevent as gevent_bridge
from polars_async.bridges.mailbox import Mailbox


def many(collector, blocked, **how):
    """Queries that all end once the gate is open, and that queue up behind the first."""
    return [collector.collect_async(lf, **how) for lf in [blocked.lf] + [TINY] * 200]


@pytest.fixture
def posted(monkeypatch):
    """A semaphore that is released when a worker has posted that a query is done."""
    semaphore = threading.Semaphore(0)
    for mailbox in (Mailbox, gevent_bridge._Mailbox):

        def post_and_tell(*arguments, post=mailbox.post):
            post(*arguments)
            semaphore.release()

        monkeypatch.setattr(mailbox, "post", post_and_tell)
    return semaphore


def hold_until_all_are(posted):
    for _ in range(201):
        assert posted.acquire(timeout=30)


on_asyncio = pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


# Many completions, one wake-up


@on_asyncio
def test_many_completions_wake_asyncio_once(collector, blocked, posted, new_loop):
    wakes = []

    async def main():
        loop = asyncio.get_running_loop()
        handles = many(collector, blocked)
        waiting = asyncio.gather(*handles)
        await asyncio.sleep(0)
        call_soon = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *each: (wakes.append(each), call_soon(*each))
        blocked.gate.set()
        hold_until_all_are(posted)
        await waiting

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
    assert len(wakes) == 1


def test_many_completions_wake_trio_once(collector, blocked, posted, monkeypatch):
    wakes = []
    run_sync_soon = trio.lowlevel.TrioToken.run_sync_soon
    monkeypatch.setattr(
        trio.lowlevel.TrioToken,
        "run_sync_soon",
        lambda token, *each: (wakes.append(each), run_sync_soon(token, *each)),
    )

    async def main():
        async with trio.open_nursery() as nursery:
            for handle in many(collector, blocked):
                nursery.start_soon(wait, handle)
            await trio.testing.wait_all_tasks_blocked()
            wakes.clear()
            blocked.gate.set()
            hold_until_all_are(posted)

    async def wait(handle):
        await handle

    trio.run(main)
    assert len([each for each in wakes if "Mailbox" in repr(each)]) == 1


def test_many_completions_wake_gevent_once(collector, blocked, posted, monkeypatch):
    wakes = []
    empty = gevent_bridge._Mailbox._deliver_all
    monkeypatch.setattr(
        gevent_bridge._Mailbox, "_deliver_all", lambda mailbox: (wakes.append(1), empty(mailbox))
    )
    greenlets = [gevent.spawn(handle.get) for handle in many(collector, blocked, gevent=True)]
    gevent.sleep(0)
    blocked.gate.set()
    hold_until_all_are(posted)
    gevent.joinall(greenlets, timeout=30, raise_error=True)
    assert len(wakes) == 1


# The mailbox


def test_mailbox_loses_nothing_while_threads_post_and_the_loop_delivers():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        calls, delivered = threading.Semaphore(0), []
        callbacks = []
        mailbox = Mailbox(delivered.append)

        def call_soon(callback):
            callbacks.append(callback)
            calls.release()

        def post(start):
            for i in range(start, start + 25_000):
                mailbox.post(i, call_soon)

        with ThreadPoolExecutor(4) as pool:
            posting = [pool.submit(post, n * 25_000) for n in range(4)]
            while len(delivered) < 100_000:
                # One wake-up for each call, as a loop; a lost one is a time-out here.
                assert calls.acquire(timeout=20), f"{len(delivered)} delivered"
                callbacks.pop()()
            for each in posting:
                each.result(30)
    finally:
        sys.setswitchinterval(before)
    assert sorted(delivered) == list(range(100_000))


def test_item_posted_while_the_last_is_delivered_is_delivered():
    delivered, calls = [], []

    def deliver(item):
        if item == "first":
            mailbox.post("second", calls.append)
        delivered.append(item)

    mailbox = Mailbox(deliver)
    mailbox.post("first", calls.append)
    while calls:
        calls.pop()()
    assert delivered == ["first", "second"]


def test_item_posted_just_after_the_last_was_delivered_wakes_the_loop_again():
    class Items(deque):
        def __bool__(self):
            if not len(self) and not late:
                late.append("late")
                mailbox.post("late", calls.append)  # as another thread might, after the look
                return False
            return len(self) > 0

    delivered, calls, late = [], [], []
    mailbox = Mailbox(delivered.append)
    mailbox._items = Items()
    mailbox.post("first", calls.append)
    while calls:
        calls.pop()()
    assert delivered == ["first", "late"]


def test_mailbox_of_a_loop_that_is_over_keeps_nothing_and_works_again():
    def call_soon(_):
        raise RuntimeError("closed")

    delivered, calls = [], []
    mailbox = Mailbox(delivered.append)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            mailbox.post("lost", call_soon)
        assert not mailbox._items
    mailbox.post("kept", calls.append)
    calls.pop()()
    assert delivered == ["kept"]


class Kept:
    """Tells of a loop, and of a task of it, whether they are still there."""

    def __init__(self):
        self._references = []

    def note(self, loop, task):
        self._references += map(weakref.ref, (loop, task))

    def __bool__(self):
        gc.collect()
        assert self._references
        return any(reference() is not None for reference in self._references)


def note_asyncio(kept):
    kept.note(asyncio.get_running_loop(), asyncio.current_task())


def note_trio(kept):
    kept.note(trio.lowlevel.current_trio_token(), trio.lowlevel.current_task())


@pytest.mark.parametrize(
    ("run", "note"),
    [
        (lambda main: asyncio.run(main()), note_asyncio),
        (lambda main: uvloop.run(main()), note_asyncio),
        (trio.run, note_trio),
    ],
    ids=["asyncio", "uvloop", "trio"],
)
def test_loop_is_not_kept_alive_by_its_mailbox(collector, blocked, run, note):
    kept = Kept()

    async def main():
        note(kept)
        handle = collector.collect_async(blocked.lf)
        threading.Thread(target=blocked.gate.set).start()
        await handle

    run(main)
    collector.close()
    until(lambda: not kept)  # the thread that has posted may have some way to go


@on_asyncio
def test_asyncio_loop_that_is_closed_with_a_delivery_on_its_way_is_freed(
    collector, blocked, posted, new_loop
):
    kept = Kept()

    async def main():
        note_asyncio(kept)
        await collector.collect_async(blocked.lf)

    async def turns():
        await asyncio.sleep(0)

    def run_and_close():
        loop = new_loop()
        loop.set_exception_handler(lambda *_: None)  # of a task that is freed before its end
        waiting = loop.create_task(main())
        loop.run_until_complete(turns())
        assert not waiting.done()
        blocked.gate.set()
        assert posted.acquire(timeout=30)
        loop.close()

    run_and_close()
    collector.close()
    until(lambda: not kept)  # as above


ABANDONED = """
import gc, sys, threading, time, warnings, weakref
from queue import SimpleQueue

import polars as pl, polars_async as pa, trio
from polars_async.bridges.mailbox import Mailbox

sys.unraisablehook = lambda _: None  # trio complains
warnings.simplefilter("ignore")
gate, posted, references, post = threading.Event(), threading.Event(), [], Mailbox.post


def post_and_tell(*arguments):
    post(*arguments)
    posted.set()


def wait(frame):
    gate.wait(30)
    return frame


async def main():
    task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
    references.extend(map(weakref.ref, (task, token)))
    await pa.collect_async(pl.LazyFrame({"a": [1]}).map_batches(wait))


def run_and_abandon():
    ticks = SimpleQueue()
    trio.lowlevel.start_guest_run(
        main, run_sync_soon_threadsafe=ticks.put, done_callback=lambda _: None
    )
    while not pa.default_collector().stats()["submitted"]:
        ticks.get(timeout=30)()
    gate.set()
    print(posted.wait(30))


Mailbox.post = post_and_tell
thread = threading.Thread(target=run_and_abandon)
thread.start()
thread.join()
pa.default_collector().close()
until = time.monotonic() + 30  # the thread that has posted may have some way to go
while any(reference() for reference in references) and time.monotonic() < until:
    gc.collect()
    time.sleep(0.01)
print(*(reference() for reference in references))
"""


def test_trio_run_that_is_abandoned_with_a_delivery_on_its_way_is_freed(run_script):
    assert run_script(ABANDONED) == ["True", "None", "None"]


def test_loop_that_takes_no_attribute_is_told_too(collector, blocked):
    class Loop(asyncio.SelectorEventLoop):
        def __setattr__(self, name, value):
            if "polars" in name:
                raise AttributeError(name)
            super().__setattr__(name, value)

    async def main():
        return await asyncio.gather(*many(collector, blocked))

    blocked.gate.set()
    with asyncio.Runner(loop_factory=Loop) as runner:
        assert len(runner.run(main())) == 201


# gevent


def native_and_own(collector, lf):
    return lf.collect_async(gevent=True), collector.collect_async(lf, gevent=True)


def test_unready_gevent_handle_times_out_as_native(collector, blocked):
    for handle in native_and_own(collector, blocked.lf):
        for how, text in (
            ({"block": False}, ""),
            ({"block": False, "timeout": 5}, ""),
            ({"timeout": 0.01}, "0.01 seconds"),
            ({"timeout": 0}, "0 seconds"),
        ):
            with pytest.raises(gevent.Timeout) as caught:
                handle.get(**how)
            assert (type(caught.value), str(caught.value)) == (gevent.Timeout, text)
    blocked.gate.set()
    assert handle.get(timeout=30).item() == 1


def test_second_get_gives_the_same_as_native(collector):
    def fail(df):  # noqa: ARG001
        raise LookupError("no")

    for handle in native_and_own(collector, TINY):
        assert handle.get() is handle.get(block=False)
    for handle in native_and_own(collector, TINY.map_batches(fail)):
        errors = []
        for _ in range(2):
            with pytest.raises(Exception, match="no") as caught:
                handle.get()
            errors.append(caught.value)
        assert errors[0] is errors[1]


def test_gevent_handle_is_read_in_other_threads_and_greenlets(collector, blocked):
    handle = collector.collect_async(blocked.lf, gevent=True)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(handle.get) for _ in range(3)]
        greenlets = [gevent.spawn(handle.get) for _ in range(3)]
        while len(inside.waiters(handle)) < 6:
            gevent.sleep(0.001)
        blocked.gate.set()
        found = [each.get(timeout=30) for each in greenlets]
        found += [each.result(30) for each in futures]
    assert len(set(map(id, found))) == 1


def test_killed_greenlet_leaves_and_the_last_one_cancels(collector, blocked):
    handle = collector.collect_async(blocked.lf, gevent=True)
    first, last = (gevent.spawn(handle.get) for _ in range(2))
    gevent.sleep(0)
    first.kill()
    assert not handle.done()
    last.kill()
    assert handle.done()
    with pytest.raises(CancelledError):
        handle.get()


def test_timed_out_get_does_not_cancel(collector, blocked):
    handle = collector.collect_async(blocked.lf, gevent=True)
    with pytest.raises(gevent.Timeout):
        handle.get(timeout=0)
    assert not handle.done()
    assert not inside.waiters(handle)


def test_other_greenlets_run_while_a_query_runs(collector, blocked):
    handle = collector.collect_async(blocked.lf, gevent=True)
    opener = gevent.spawn(blocked.gate.set)  # which runs only if `get` lets it
    assert handle.get(timeout=30).item() == 1
    assert opener.ready()


def test_hub_has_nothing_to_wait_for_when_nobody_waits(collector, blocked):
    handle = collector.collect_async(blocked.lf, gevent=True)
    with pytest.raises(gevent.Timeout):
        handle.get(timeout=0)
    assert gevent.wait(timeout=30)  # True: it ended because nothing is left, not in time


def test_next_hub_of_a_thread_is_told_too(collector, blocked):
    def get_in_two_hubs():
        first = collector.collect_async(TINY.map_batches(lambda df: df), gevent=True)
        first.get(timeout=30)
        with pytest.raises(gevent.Timeout):
            handle.get(timeout=0)
        gevent.get_hub().destroy(destroy_loop=True)
        gevent.spawn(blocked.gate.set)
        return handle.get(timeout=30)

    with ThreadPoolExecutor(1) as pool, Collector(max_running=1) as other:
        handle = other.collect_async(blocked.lf, gevent=True)
        assert pool.submit(get_in_two_hubs).result(30).item() == 1


def test_gevent_collect_all(collector):
    frames = [pl.LazyFrame({"a": [i]}) for i in range(3)]
    handle = collector.collect_all_async(frames, gevent=True)
    assert [each.item() for each in handle.get(timeout=30)] == [0, 1, 2]


GEVENT = """
import faulthandler, sys
faulthandler.dump_traceback_later(40, exit=True)
patch = "import gevent.monkey; gevent.monkey.patch_all()"
if sys.argv[1] == "before":
    exec(patch)
import polars as pl, polars_async as pa
if sys.argv[1] == "after":
    exec(patch)
import gc, gevent
from polars_async._runtime import unpatched

def shut():
    lock = unpatched.allocate_lock()
    lock.acquire()
    return lock

def blocking():
    started, gate = shut(), shut()
    def udf(df):
        started.release()
        gate.acquire()
        return df
    return pl.LazyFrame({"a": [1]}).map_batches(udf), started, gate

collector = pa.Collector(max_running=1)
"""
GETS = (
    GEVENT
    + """
lf, started, gate = blocking()
handle = collector.collect_async(lf, gevent=True)
for how in ({"block": False}, {"timeout": 0.01}):
    try:
        handle.get(**how)
    except gevent.Timeout as error:
        print(repr(str(error)).replace(" ", "_"))
greenlets = [gevent.spawn(handle.get) for _ in range(3)]
told, got = unpatched.SimpleQueue(), shut()
unpatched.start_new_thread(lambda: told.put(handle.get()), ())
while len(handle._query._waiters) < 4:
    gevent.sleep(0.001)
greenlets[0].kill()
gevent.spawn(gate.release)
frame = handle.get()
assert all(each.get() is frame for each in greenlets[1:])
assert told.get() is frame
assert handle.result() is frame
collector.close()
print(frame.item())
"""
)
DESTROYED = (
    GEVENT
    + """
for _ in range(20):
    lf, started, gate = blocking()
    handle = collector.collect_async(lf, gevent=True)
    started.acquire()
    out = shut()
    def thread():
        gevent.spawn(handle.get)
        gevent.sleep(0.001)
        gevent.get_hub().destroy(destroy_loop=True)
        out.release()
    unpatched.start_new_thread(thread, ())
    out.acquire()
    gc.collect()
    gate.release()
    assert handle.result().item() == 1
collector.close()
print(collector._cpu.admission.running)
"""
)


@pytest.mark.parametrize("patched", ["before", "after", "never"])
def test_gevent_handle_under_the_monkey_patch(run_script, patched):
    assert run_script(GETS, patched) == ["''", "'0.01_seconds'", "1"]


@pytest.mark.parametrize("patched", ["before", "never"])
def test_hub_destroyed_while_its_greenlet_waits_harms_nobody(run_script, patched):
    assert run_script(DESTROYED, patched) == ["0"]
