"""Functions that block, in the queue and the slots of a collector."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import threading
from contextlib import closing
from contextvars import ContextVar
from functools import partial

import inside
import loops
import polars as pl
import pytest
from conftest import TINY
from places import A_COLLECTOR_STAYS, LIMIT, Failure, Gate, Notes, until

import polars_async as pa
from polars_async.executors.operations import Run
from polars_async.executors.serialization import pack, unpack
from polars_async.scheduling import query as query_module
from polars_async.scheduling.estimates import CostModel
from polars_async.scheduling.memory import Memory
from polars_async.scheduling.sizes import SMALL, UNKNOWN

loop = loops.fixture_of(loops.Asyncio, loops.Trio, loops.Gevent)

FRAME = pl.DataFrame({"a": [1, 2, 3]})
ELSEWHERE = "nothing is sent there"
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux")


def waits(started, gate):
    started.set()
    assert gate.wait(), "nobody lets it go on"
    return FRAME


def raises(error):
    raise error


@pytest.fixture
def held():
    """Two gates of a function: it has begun, and it may end."""
    gates = Gate(), Gate()
    yield gates
    gates[1].set()


# What it returns, and what it raises


@pytest.mark.everywhere
def test_result_arrives_in_each_loop(loop, collector):
    async def main():
        joined = collector.run(pl.DataFrame.hstack, FRAME, FRAME.rename(str.upper))
        plain = collector.run(lambda number: {"twice": 2 * number}, 21, timeout=60)
        return await loop.wait(joined), await loop.wait(plain)

    frame, plain = loop.run(main)
    assert frame.equals(FRAME.with_columns(A="a"))
    assert plain == {"twice": 42}
    assert collector.stats()["completed"] == 2


@pytest.mark.everywhere
@pytest.mark.parametrize(
    "raised",
    [Failure("of its own"), StopIteration(7), SystemExit(3), KeyboardInterrupt(), GeneratorExit()],
    ids=lambda error: type(error).__name__,
)
def test_error_arrives_unchanged(collector, raised, is_that):
    handle = collector.run(raises, raised)
    with pytest.raises(type(raised)) as caught:
        handle.result(LIMIT)
    assert is_that(caught.value, raised)
    assert collector.run(len, "abc").result(LIMIT) == 3


def test_task_gets_stop_iteration_as_of_any_coroutine(collector):
    async def main():
        await collector.run(raises, StopIteration(7))

    with pytest.raises(RuntimeError) as caught:
        asyncio.run(main())
    assert caught.value.__cause__.value == 7


async def coroutine():
    raise AssertionError


async def generator():
    yield


class Asynchronous:
    async def __call__(self):
        raise AssertionError


@pytest.mark.parametrize(
    "function", [coroutine, partial(coroutine), generator, Asynchronous(), Asynchronous().__call__]
)
def test_async_function_is_refused_with_the_remedy(collector, function):
    with pytest.raises(TypeError, match="is an async one: await it in your task, or give"):
        collector.run(function)
    assert collector.stats()["submitted"] == 0


def test_function_that_returns_a_coroutine_is_told_the_same(collector):
    with pytest.raises(TypeError, match="returned is a coroutine: await it in your task, or give"):
        collector.run(lambda each: each(), coroutine).result(LIMIT)


def test_what_is_no_function_is_refused(collector):
    with pytest.raises(TypeError, match="function must be callable, got <LazyFrame"):
        collector.run(TINY)


# Slots, limits and events


def test_functions_and_queries_wait_for_each_other(collector, blocked, held):
    started, gate = held
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    first, last = collector.run(waits, started, gate), collector.collect_async(TINY)
    assert inside.waiting(collector) == 2
    blocked.gate.set()
    assert started.wait()
    assert last.result(LIMIT).item() == 1  # it counts as small, and overtakes the function
    behind = collector.collect_async(TINY)
    assert (inside.running(collector), inside.waiting(collector)) == (1, 1)
    gate.set()
    assert first.result(LIMIT).equals(FRAME)
    assert behind.result(LIMIT).item() == 1


def test_function_that_finds_the_queue_full_is_rejected(make, block):
    collector = make(max_running=1, max_waiting=0)
    collector.collect_async(block().lf)
    with pytest.raises(pa.QueueFullError):
        collector.run(len, "abc")


def test_priority_overrides_the_order(collector, blocked):
    order = []
    collector.collect_async(blocked.lf)
    handles = [collector.run(order.append, each, priority=each) for each in (-1, 5)]
    blocked.gate.set()
    for handle in handles:
        handle.result(LIMIT)
    assert order == [5, -1]


@pytest.mark.everywhere
def test_late_function_is_stopped_where_that_can_be(collector, held, is_given_up, request):
    started, gate = held
    handle = collector.run(waits, started, gate, label="late", timeout=60)
    assert started.wait()
    inside.let_time_be_up(handle)
    with pytest.raises(pa.QueryTimeoutError, match="'late' was not done after 60 s"):
        handle.result(LIMIT)
    if "dask" in request.node.name:  # which does not stop what has begun
        gate.set()
    is_given_up(collector)


@pytest.mark.everywhere
def test_cancelled_function_that_waits_never_runs(loop, collector, blocked):
    ran = Notes()
    collector.collect_async(blocked.lf)
    loop.reset_after_fork(collector.run(ran.append, 1))
    assert inside.waiting(collector) == 0
    blocked.gate.set()
    collector.close(cancel_waiting=False)
    assert not ran


def test_events_and_names_are_those_of_a_function():
    heard = []
    with pa.Collector(on_event=heard.append) as collector:
        results = [FRAME, [FRAME, FRAME], [1, 2], 5, None]
        handles = [collector.run(lambda each=each: each, label="it") for each in results]
        for handle in handles:
            handle.result(LIMIT)
    finished = [event for event in heard if event.kind is pa.EventKind.FINISHED]
    rows = {event.query_id: event.rows for event in finished}
    assert [rows[handle._query.id] for handle in handles] == [3, 6, None, None, None]
    assert {(event.engine, event.label) for event in heard} == {("none", "it")}
    assert "'it' finished: no engine, waited" in str(finished[0])
    assert repr(handles[0]).endswith("'it', completed, no engine>")
    assert str(handles[0].resolution).startswith("no engine runs: the function may use any")


@pytest.mark.everywhere
def test_function_is_listed_and_tells_what_took_it_how_long(collector, held):
    started, gate = held
    handle = collector.run(waits, started, gate, label="it", tags={"tenant": "a"})
    assert started.wait()
    (info,) = collector.queries()
    assert (info.id, info.label, info.tags) == (handle.id, "it", {"tenant": "a"})
    assert (info.state, info.engine, info.progress) == ("running", "none", None)
    assert str(info).startswith(f"query {handle.id} 'it', running, no engine, {info.place}, waited")
    assert info.place == (inside.place(handle) or "thread")
    where = "" if info.place == "thread" else f" in {info.place}"
    assert re.fullmatch(rf"(waited \S+ m?s, )?ran \S+ m?s{where}", handle.summary)
    assert handle.progress().state == "running"
    gate.set()
    handle.result(LIMIT)
    assert handle.progress().fraction == 1.0
    assert handle.peak_memory is None
    assert collector.queries() == []


def test_function_in_the_queue_is_cancelled_by_its_number(collector, blocked):
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    handle = collector.run(len, "abc")
    assert collector.cancel(handle.id)
    assert handle.done()
    blocked.gate.set()


def test_what_a_function_takes_is_measured():
    with pa.Collector(max_memory="4 GB") as collector:

        def take():
            frame = pl.select(a=pl.int_range(20_000_000))  # some 160 MB, until that is measured
            until(lambda: any((each.memory or 0) > 100e6 for each in collector.queries()))
            return int(frame["a"][1])

        handle = collector.run(take, label="takes")
        assert handle.result(LIMIT) == 1
        assert 100e6 < handle.peak_memory < 2e9
        assert "at its peak" in handle.summary


class HostileFrame(pl.DataFrame):
    @property
    def height(self):
        raise ValueError("no height")

    def estimated_size(self, *_):
        raise ValueError("no size")


class HostileList(list):
    def __iter__(self):
        raise ValueError("no items")

    def __len__(self):
        raise ValueError("no length")


class Unbound:
    """As the proxies of web frameworks, outside of a request."""

    @property
    def __class__(self):
        raise RuntimeError("unbound")


@pytest.mark.parametrize(
    "result",
    [HostileFrame({"a": [1]}), HostileList([FRAME]), [FRAME, Unbound()], [HostileFrame({"a": []})]],
    ids=["frame", "list", "proxy", "frames"],
)
def test_result_of_any_class_arrives(result):
    events = []
    with pa.Collector(max_memory="4 GB", on_event=events.append) as collector:
        assert collector.run(lambda: result).result(LIMIT) is result
        assert collector.run(lambda: FRAME).result(LIMIT) is FRAME
    assert [each.rows for each in events if each.kind == "finished"] == [None, 3]


def test_function_sees_the_context_of_its_caller(collector):
    variable = ContextVar("variable")
    variable.set("of the caller")
    assert collector.run(variable.get).result(LIMIT) == "of the caller"


def test_function_never_runs_on_the_thread_of_the_loop(make):
    async def main():
        collector = make()
        return {await collector.run(threading.get_ident) for _ in range(30)}

    assert threading.get_ident() not in asyncio.run(main())


@pytest.mark.everywhere
@pytest.mark.cannot("processes", "dask", because=A_COLLECTOR_STAYS)
def test_function_that_waits_for_queries_and_functions_needs_no_slot_for_them(collector):
    def nested(depth):
        total = collector.collect_async(TINY).result(LIMIT).item()
        return total + (collector.run(nested, depth - 1).result(LIMIT) if depth else 0)

    async def hand_over():
        return await collector.run(nested, 2)

    assert collector.run(nested, 2).result(LIMIT) == 3
    assert collector.run(asyncio.run, hand_over()).result(LIMIT) == 3


# Estimates


def test_size_is_learned_by_the_function(monkeypatch):
    seen = []
    monkeypatch.setattr(query_module, "_WORTH_ESTIMATING", 0.0)
    with pa.Collector() as collector:
        monkeypatch.setattr(
            collector._cpu._costs, "observe", lambda expected, *_, **__: seen.append(expected)
        )
        for number, function in enumerate((len, partial(len), lambda each: each), start=1):
            collector.run(function, "abc").result(LIMIT)
            until(lambda number=number: len(seen) == number)
    assert [each.seconds for each in seen] == [UNKNOWN] * 3
    assert not any(each.is_exact for each in seen)
    first, same, other = (each.fingerprint for each in seen)
    assert first == same == Run(len, ("other",)).fingerprint != other


def test_learned_size_is_that_of_the_next_call():
    known, fingerprint = CostModel(), Run(len, ()).fingerprint
    known.observe(known.of_function(fingerprint), 5.0, alone=True, share=0.1)
    found = known.of_function(fingerprint)
    assert found.seconds > 1
    assert (found.share, found.is_exact) == (0.1, False)
    assert known.of_function(Run(print, ()).fingerprint).seconds == UNKNOWN


def test_memory_of_a_function_is_learned_and_half_of_the_limit_is_not_enough_before():
    limit = 1 << 30
    known, fingerprint = CostModel(memory=Memory(limit, int)), Run(len, ()).fingerprint
    first = known.of_function(fingerprint)
    assert first.memory > limit / 2
    known.observe(first, 1.0, alone=True, memory=1 << 20)
    assert known.of_function(fingerprint).memory < limit / 2


def test_calls_that_are_known_to_take_long_leave_a_slot_to_others(make, held):
    collector = make(max_running=2)
    fingerprint = Run(waits, held).fingerprint
    known = collector._cpu._costs
    known.observe(known.of_function(fingerprint), 60.0, alone=True)
    calls = [collector.run(waits, *held) for _ in range(3)]
    assert collector.run(len, "abc", priority=1).result(LIMIT) == 3
    assert (inside.running(collector), inside.waiting(collector)) == (1, 2)
    held[1].set()
    assert all(call.result(LIMIT).equals(FRAME) for call in calls)


# Other processes


@pytest.mark.everywhere
@pytest.mark.cannot("threads", because=ELSEWHERE)
def test_function_runs_elsewhere(collector):
    assert collector.run(os.getpid).result(LIMIT) != os.getpid()


@pytest.mark.everywhere
def test_result_may_be_of_a_class_of_the_program(collector, main):
    class Local:
        def __init__(self, held):
            self.held = held

    names = main("class Own:\n    pass\n")
    found = collector.run(lambda own, local: [own(), local(FRAME)], names["Own"], Local)
    own, local = found.result(LIMIT)
    assert type(own) is names["Own"]
    assert type(local) is Local
    assert local.held.equals(FRAME)


@pytest.mark.everywhere
@pytest.mark.cannot("threads", because=ELSEWHERE)
def test_what_cannot_be_sent_is_named(collector):
    lock = threading.Lock()
    for call, words in (
        ((len, lock), "argument 1 of the function, which is a _thread.lock, cannot be pickled"),
        ((lambda: lock,), "the variable 'lock' of the function 'test_what_cannot_be_sent_is_named"),
        ((threading.Lock,), "the result of the function cannot be sent back .*: a _thread.lock"),
    ):
        with pytest.raises(pa.PolarsAsyncError, match=words):
            collector.run(*call).result(LIMIT)
    assert collector.run(len, "abc").result(LIMIT) == 3


@only_linux
@pytest.mark.usefixtures("warm_workers")
def test_auto_sends_functions_that_can_be_sent_however_small_they_are():
    with pa.Collector(executor="auto") as collector:
        known = collector._cpu._costs
        fingerprint = Run(os.getpid, ()).fingerprint
        while known.of_function(fingerprint).seconds > SMALL:
            known.observe(known.of_function(fingerprint), 1e-6, alone=True)
        assert collector.run(os.getpid).result(LIMIT) != os.getpid()
        lock = threading.Lock()
        assert collector.run(lambda: lock and os.getpid()).result(LIMIT) == os.getpid()


@only_linux
def test_second_try_to_pack_a_function_leaves_no_files_of_the_first():
    frame = pl.select(a=pl.int_range(100_000))
    with closing(pack(Run(len, (frame, lambda: 0)), in_files=True, by_value=True)) as message:
        assert len(message.files) == 1
        operation = unpack(message)
    assert operation.args[0].equals(frame)
    assert operation.args[1]() == 0


@pytest.mark.everywhere
@pytest.mark.cannot("threads", because=ELSEWHERE)
def test_function_that_has_begun_is_not_run_again(collector, main):
    main("import threading\nheld = threading.Lock()\n")
    _runs_once(collector)


@only_linux
@pytest.mark.usefixtures("warm_workers")
def test_function_that_has_begun_in_a_worker_is_not_run_again_here(main):
    main("import threading\nheld = threading.Lock()\n")
    with pa.Collector(executor="auto") as collector:
        _runs_once(collector)


def _runs_once(collector):
    ran = Notes()

    def look_up():
        ran.append(1)
        return sys.modules["__main__"].held

    with pytest.raises(AttributeError, match=r"held|_thread\.lock"):
        collector.run(look_up).result(LIMIT)
    assert list(ran) == [1]


@only_linux
@pytest.mark.usefixtures("warm_workers")
def test_worker_that_ends_in_a_function_is_an_error():
    with pa.Collector(executor="processes", max_running=1) as collector:
        with pytest.raises(pa.WorkerDiedError, match="the query 'exits', with exit status 3"):
            collector.run(os._exit, 3, label="exits").result(LIMIT)
        assert collector.run(len, "abc").result(LIMIT) == 3
