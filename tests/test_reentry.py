"""What a signal handler or a finaliser does while its thread is within a step of ours."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from threading import Event

import polars as pl
import pytest
from places import LIMIT, Blocked, Source, until

import polars_async
from polars_async import Cache, Collector, CollectorClosedError, resolve_engine
from polars_async.events import Reporter
from polars_async.executors.operations import Collect
from polars_async.scheduling.admission import Admission
from polars_async.scheduling.estimates import CostModel
from polars_async.scheduling.kept import Results
from polars_async.scheduling.open_streams import OpenStreams
from polars_async.scheduling.query import Query
from polars_async.scheduling.sizes import Limits
from polars_async.scheduling.slots import Slot
from polars_async.streams import Batches

OURS = str(Path(polars_async.__file__).parent)
TINY = pl.LazyFrame({"a": [1]})


def is_ours(code):
    return code.co_filename.startswith(OURS)


def interrupting(act, meanwhile, step, counts=is_ours):
    """Do `act`, and `meanwhile` before its `step`-th instruction of ours; False if it has fewer."""
    left = step

    def trace(frame, event, _):
        nonlocal left
        if not counts(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and left > 0:
            left -= 1
            if left == 0:
                sys.settrace(None)
                meanwhile()
        return trace

    before = sys.gettrace()
    gc.disable()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
        gc.enable()
    return left <= 0


@pytest.mark.parametrize(
    "options",
    [{}, {"single_flight": True}, {"cache": Cache(seconds=1000, max_bytes="1 GB")}],
    ids=["alone", "shared", "kept"],
)
def test_queries_are_submitted_while_others_are(options):
    blocked, late = Blocked(), []
    with Collector(engine="in-memory", inline=0, **options) as collector:
        handles = [collector.collect_async(blocked.lf) for _ in range(6)]

        def submit(priority=0):
            query = TINY.select(pl.col("a") + 1)
            return collector.collect_async(query, priority=priority)

        def make():
            return (
                lambda: handles.append(submit()),
                lambda: late.extend([submit(), submit(3), collector.collect_async(blocked.lf)]),
            )

        try:
            at_each_step(make)
        finally:
            blocked.gate.set()
        for handle in handles + late:
            assert handle.result(LIMIT).height == 1
        stats = collector.stats()
        assert stats["submitted"] == stats["completed"] == len(handles) + len(late)


def test_query_that_is_submitted_within_a_step_and_rejected_says_so(caplog, monkeypatch):
    caplog.set_level("DEBUG", "polars_async")
    looked, wake = Event(), Query.wake_rejected
    monkeypatch.setattr(Query, "wake_rejected", lambda query: looked.wait(LIMIT) and wake(query))
    with Collector() as collector:
        with collector._cpu.admission.lock:  # as where a signal handler comes in
            handle = collector.collect_async(TINY)
            collector.close(wait=False)
        until(handle.done)
        with pytest.raises(CollectorClosedError):  # at once, not only when it is woken
            handle.result(LIMIT)
        looked.set()
        assert collector.stats()["rejected"] == 1
        until(lambda: any("rejected" in each.getMessage() for each in caplog.records))


class Interrupt(BaseException):
    """What a signal handler raises."""


def interrupt():
    raise Interrupt


def at_each_step(make):
    """Have `make` return what to do and what to do meanwhile, for each of its instructions."""
    step = 1
    while interrupting(*make(), step):
        step += 1
    assert step > 20  # or else nothing was traced


def waiting_in(admission, *, is_stream=False):
    operation = Collect(TINY, resolve_engine("in-memory").engine, pl.QueryOptFlags())
    query = Query(operation, resolve_engine("in-memory"), Reporter(None), admission.owner)
    query.is_stream = is_stream
    with admission.lock:
        return query, admission.enter(query)


def test_a_query_is_cancelled_while_it_is_ranked():
    def make():
        admission = Admission(Limits(1))
        _, taken = waiting_in(admission)
        queries = [waiting_in(admission)[0] for _ in range(2)]
        entries = [admission.next_unestimated(taken, from_behind=False) for _ in queries]
        for query in queries:
            query.set_estimate(CostModel())
        taken.query = None
        return (
            lambda: admission.fill(taken, entries, only_if_certain=False),
            lambda: [query.cancel() for query in queries],
        )

    at_each_step(make)


def test_a_stream_is_closed_while_it_is_the_next_to_go_on():
    streams_open = OpenStreams()

    def make():
        streams_open.clear()
        admission = Admission(Limits(1), streams=streams_open)
        streams = []
        for _ in range(2):
            query, slot = waiting_in(admission, is_stream=True)
            if slot is None:
                slot = Slot()
                admission._slots.add(slot)
                admission._queue.discard(query)
                query.set_running()
                slot.query = query
            admission.pause(query)
            streams.append(query)
        return (
            lambda: [admission.resume(each) for each in streams],
            lambda: [admission.let_end(each) for each in streams],
        )

    at_each_step(make)


def test_results_are_cleared_while_one_is_looked_up():
    results = Results(1000, 10**9)
    resolution = resolve_engine("in-memory")

    def make():
        results.put("key", pl.DataFrame({"a": [1]}), resolution, 1)
        return lambda: results.get("key"), results.clear

    at_each_step(make)


def test_results_are_cleared_while_one_is_put():
    resolution = resolve_engine("in-memory")
    made = []

    def make():
        results = Results(1000, 5000)
        made.append(results)
        results.put("old", pl.DataFrame({"a": [1]}), resolution, 1)
        return (
            lambda: results.put("key", pl.DataFrame({"a": [1]}), resolution, 2),
            results.clear,
        )

    at_each_step(make)
    assert all(bool(each.size) == bool(len(each)) for each in made)


@pytest.mark.parametrize("look", [Collector.stats, Collector.queries])
def test_shared_runs_are_cancelled_while_they_are_listed(look):
    blocked = Blocked()
    with Collector(engine="in-memory", max_running=1, single_flight=True, inline=0) as collector:
        collector.collect_async(blocked.lf)

        def make():
            waiting = [
                collector.collect_async(TINY.select(pl.col("a") + number)) for number in (1, 1, 2)
            ]
            return lambda: look(collector), lambda: [each.cancel() for each in waiting]

        try:
            at_each_step(make)
        finally:
            blocked.gate.set()


def test_stream_that_no_caller_gets_is_ended(monkeypatch):
    """As by Ctrl-C between its submission and the return; deeper calls are those of other tests."""
    in_finalisers = []
    monkeypatch.setattr(sys, "unraisablehook", lambda it: in_finalisers.append(it.exc_type))
    source = Source()  # of batches without end
    with Collector(engine="streaming") as collector:
        names = {"collect_batches_async", "__init__", "close"}
        files = {Collector.__init__.__code__.co_filename, Batches.__init__.__code__.co_filename}

        def counts(code):
            return code.co_filename in files and code.co_name in names

        def submit():
            with suppress(Interrupt):
                collector.collect_batches_async(source.lf)

        for step in count(1):
            if not interrupting(submit, interrupt, step, counts):
                break
            until(lambda: not collector.stats()["streams"])
        assert step > 20
    assert set(in_finalisers) <= {Interrupt}
