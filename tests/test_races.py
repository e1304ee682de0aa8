from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from concurrent.futures import CancelledError

import gevent
import inside
import pytest
from conftest import TINY
from places import until

from polars_async import Collector, CollectorClosedError, resolve_engine
from polars_async.bridges.buffer import Arrivals
from polars_async.events import Reporter
from polars_async.executors.threads import IN_PROCESS
from polars_async.scheduling.admission import Admission
from polars_async.scheduling.counts import State
from polars_async.scheduling.estimates import CostModel
from polars_async.scheduling.query import Query
from polars_async.scheduling.sizes import Limits


def test_query_that_ends_just_before_the_greenlet_waits_wakes_it(collector, blocked, monkeypatch):
    add_waiter = Query.add_waiter

    def add_then_end(query, waiter):
        told = threading.Event()
        post = waiter.mailbox.post
        monkeypatch.setattr(waiter.mailbox, "post", lambda item: (post(item), told.set()))
        added = add_waiter(query, waiter)
        blocked.gate.set()
        assert told.wait(30)
        return added

    handle = collector.collect_async(blocked.lf, gevent=True)
    monkeypatch.setattr(Query, "add_waiter", add_then_end)
    assert gevent.spawn(handle.get).get(timeout=30).item() == 1


def test_close_returns_when_the_last_query_is_done(collector, monkeypatch):
    release = Admission.release
    released, go = threading.Event(), threading.Event()

    def release_and_stop(*arguments):
        following = release(*arguments)
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
    # The thread that has posted may have some way to go.
    until(lambda: gc.collect() >= 0 and alive() is None)


FORK = """
import gc, os, signal, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from 3.12 on
case = sys.argv[1]
waitpid = os.waitpid  # that of gevent sometimes misses the child's end
if case == "greenlet":
    import gevent.monkey; gevent.monkey.patch_all()
import polars as pl, polars_async as pa
from polars_async._runtime import unpatched
from polars_async.scheduling.admission import Admission

def shut():
    lock = unpatched.allocate_lock()
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
    def release_and_stop(*arguments):
        following = release(*arguments)
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
    signal.alarm(60)
    try:
        print("child", wait().item(), flush=True)
    except pa.ForkedProcessError:
        print("child ForkedProcessError", flush=True)
    os._exit(0)
assert waitpid(child, 0)[1] == 0, "the child hung"
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


# Two threads let loose on one query, some thousand times


@pytest.fixture
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Together:
    """Threads that begin each of their turns at the same time."""

    def __init__(self, *turns):
        self._start, self._end = (threading.Barrier(len(turns) + 1) for _ in range(2))
        self._over = False
        self._errors = []
        self._threads = [threading.Thread(target=self._run, args=(turn,)) for turn in turns]
        for thread in self._threads:
            thread.start()

    def _run(self, turn):
        while True:
            self._start.wait(30)
            if self._over:
                return
            try:
                turn()
            except BaseException as error:  # noqa: BLE001  # told to the test
                self._errors.append(error)
            self._end.wait(30)

    def turn(self):
        self._start.wait(30)
        self._end.wait(30)
        assert self._errors == []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._over = True
        self._start.wait(30)
        for thread in self._threads:
            thread.join(30)


class Told:
    """A waiter that counts how often it is woken."""

    survives_fork = False
    wake_at_exit = False

    def __init__(self):
        self.times = 0

    def wake(self):
        self.times += 1


class Value:
    name, runs_engine, frames = "value", True, ()

    def __init__(self, value):
        self.value = value

    def __call__(self):
        return self.value


def query_of(admission, value):
    resolution = resolve_engine("in-memory")
    query = Query(Value(value), resolution, Reporter(None), admission.owner)
    assert admission.enter(query).query is query
    query.run(IN_PROCESS.run)
    return query


def end(admission, query):
    with admission.lock:
        (slot,) = admission._slots
        waiters = query.set_finished()
        admission.release(slot)
    for waiter in waiters:
        waiter.wake()
    query.observe_cost(CostModel(), alone=True)


@pytest.mark.usefixtures("_switch_often")
def test_of_an_end_and_a_cancellation_one_is_first():
    admission = Admission(Limits(1))
    query = told = cancelled = None

    def cancel():
        nonlocal cancelled
        cancelled = query.cancel()

    with Together(lambda: end(admission, query), cancel) as together:
        for i in range(2000):
            query, told = query_of(admission, i), Told()
            assert query.add_waiter(told)
            together.turn()
            assert told.times == 1
            assert admission.running == admission.waiting == 0
            assert query.done
            if cancelled:
                assert query._outcome.value is None
                with pytest.raises(CancelledError):
                    query.outcome(CancelledError)
            else:
                assert query.outcome(CancelledError) == i
            assert not query.cancel()


@pytest.mark.usefixtures("_switch_often")
def test_waiter_that_comes_at_the_end_is_told_in_one_of_two_ways():
    admission = Admission(Limits(1))
    query = told = added = None

    def add():
        nonlocal added
        added = query.add_waiter(told)

    with Together(lambda: end(admission, query), add) as together:
        for i in range(2000):
            query, told = query_of(admission, i), Told()
            together.turn()
            assert told.times == (1 if added else 0)
            assert query.outcome(CancelledError) == i
            assert not query._waiters


@pytest.mark.usefixtures("_switch_often")
def test_last_waiter_that_leaves_at_the_end_cancels_or_comes_too_late():
    admission = Admission(Limits(1))
    query = told = left = None

    def leave():
        nonlocal left
        left = query.remove_waiter(told, last_cancels=True)

    with Together(lambda: end(admission, query), leave) as together:
        for i in range(2000):
            query, told = query_of(admission, i), Told()
            query.add_waiter(told)
            together.turn()
            assert told.times == (0 if left else 1)
            assert admission.running == 0
            if left:
                with pytest.raises(CancelledError):
                    query.outcome(CancelledError)
            else:
                assert query.outcome(CancelledError) == i


@pytest.mark.usefixtures("_switch_often")
def test_two_last_waiters_that_leave_at_once_cancel_the_query_once():
    admission = Admission(Limits(1))
    query, told = None, [Told(), Told()]
    turns = [lambda each=each: query.remove_waiter(each, last_cancels=True) for each in told]
    with Together(*turns) as together:
        for i in range(1000):
            query = query_of(admission, i)
            for each in told:
                query.add_waiter(each)
            together.turn()
            assert query.done
            assert not query._waiters
            end(admission, query)
            assert admission.running == 0


@pytest.mark.usefixtures("_switch_often")
@pytest.mark.parametrize("cancel_waiting", [True, False])
def test_query_submitted_while_the_collector_closes_resolves_or_is_refused(cancel_waiting):
    collector, handles, refused = None, [], 0

    def submit():
        nonlocal refused
        for _ in range(4):
            try:
                handles.append(collector.collect_async(TINY))
            except CollectorClosedError:
                refused += 1

    def close():
        collector.close(cancel_waiting=cancel_waiting)

    with Together(submit, submit, close) as together:
        for _ in range(200):
            collector, refused = Collector(max_running=1), 0
            handles.clear()
            together.turn()
            assert len(handles) + refused == 8
            for handle in handles:
                assert handle.done()  # that is what close waited for
                try:
                    assert handle.result(0).item() == 1
                except CancelledError:
                    assert cancel_waiting
            admission = collector._cpu.admission
            assert admission.running == admission.waiting == 0


@pytest.mark.usefixtures("_switch_often")
def test_cancelled_and_finished_queries_give_their_slots_back():
    with Collector(max_running=2) as collector:
        handles = []

        def submit():
            handles.append(collector.collect_async(TINY))

        def cancel():
            if handles:
                handles[-1].cancel()

        with Together(submit, submit, cancel, cancel) as together:
            for _ in range(500):
                together.turn()
        assert collector.collect_async(TINY).result(30).item() == 1
        for handle in handles:
            try:
                assert handle.result(30).item() == 1
            except CancelledError:
                pass
    assert inside.running(collector) == inside.waiting(collector) == 0


def test_slot_is_free_when_whoever_waits_is_woken(collector, blocked):
    told, running, woken = Told(), [], threading.Event()
    told.wake = lambda: (running.append(inside.running(collector)), woken.set())
    handle = collector.collect_async(blocked.lf)
    handle._query.add_waiter(told)
    blocked.gate.set()
    assert woken.wait(30)
    assert running == [0]


@pytest.mark.parametrize("operation", ["add_waiter", "remove_waiter", "cancel"])
def test_state_cannot_change_between_the_look_at_it_and_the_act(monkeypatch, operation):
    admission, told, states = Admission(Limits(1)), Told(), []
    query = query_of(admission, 1)
    told.wake = lambda: states.append(query.state)
    if operation != "add_waiter":
        query.add_waiter(told)
    other = threading.Thread(target=end, args=(admission, query))
    done, main = Query.done.fget, threading.current_thread()

    def done_and_interrupt(query):
        found = done(query)
        if threading.current_thread() is main and other.ident is None:
            other.start()
            other.join(0.2)  # where nothing holds it off, this is time enough for the end
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Query, "done", property(done_and_interrupt))
        acts = {
            "add_waiter": lambda: query.add_waiter(told),
            "remove_waiter": lambda: query.remove_waiter(told, last_cancels=True),
            "cancel": query.cancel,
        }
        assert acts[operation]()
        other.join(30)
    assert len(states) == (0 if operation == "remove_waiter" else 1)
    assert query.state is (State.COMPLETED if operation == "add_waiter" else State.CANCELLED)
    assert [query.state] * len(states) == states
    assert query._outcome.value == (1 if operation == "add_waiter" else None)


# Many who wait for one


class Counted:
    """A waiter that counts how often it is compared with another."""

    survives_fork = wake_at_exit = False
    compared = 0

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        Counted.compared += 1
        return self is other

    def wake(self):
        pass


@pytest.mark.parametrize("kind", ["query", "collector", "stream"])
def test_waiters_of_one_query_leave_it_without_a_look_at_all_others(collector, blocked, kind):
    query = collector.collect_async(blocked.lf)._query
    awaited = {"query": query, "collector": collector._cpu.admission, "stream": Arrivals()}[kind]
    waiters = [Counted() for _ in range(1000)]
    for waiter in waiters:
        assert awaited.add_waiter(waiter)
    Counted.compared = 0
    for waiter in reversed(waiters):
        assert awaited.remove_waiter(waiter, last_cancels=False)
    assert Counted.compared < 10 * len(waiters)
    assert not query.done
