"""What runs and waits, what took a query how long, and what is logged of slow ones."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime, timedelta
from threading import RLock

import inside
import polars as pl
import pytest
from places import TINY, until

import polars_async as pa
from polars_async import Collector
from polars_async.events import Reporter
from polars_async.executors.operations import Collect
from polars_async.executors.staying import run_here
from polars_async.scheduling.counts import Counts
from polars_async.scheduling.query import Owner, Query
from polars_async.testing import simulate_gpu
from polars_async.wording import Ahead, in_bytes, in_seconds

SLOW = "polars_async.slow"


def only(collector, handle):
    """Return the one record of a query, which has to be listed."""
    (found,) = [info for info in collector.queries() if info.id == handle.id]
    return found


# The registry


@pytest.mark.everywhere
def test_queries_that_run_and_wait_are_listed_until_they_end(executor, blocked):
    with Collector(executor=executor, max_running=1) as collector:
        assert collector.queries() == []
        tags = {"tenant": "a"}
        first = collector.collect_async(blocked.lf, label="first", tags=tags, engine="streaming")
        second = collector.collect_async(TINY, engine="in-memory")
        assert blocked.started.wait(30)
        running, waiting = collector.queries()
        assert (running.id, running.label, running.tags) == (first.id, "first", {"tenant": "a"})
        assert (running.state, running.engine) == ("running", "streaming")
        assert running.ran > 0
        assert running.place == (inside.place(first) or "thread")
        assert (waiting.id, waiting.label, waiting.tags) == (second.id, None, {})
        assert (waiting.state, waiting.ran, waiting.place) == ("waiting", None, None)
        assert waiting.waited > 0
        assert timedelta() <= datetime.now(UTC) - waiting.submitted < timedelta(minutes=5)
        blocked.gate.set()
        second.result(30)
    assert collector.queries() == []


def test_place_of_a_worker_has_its_number(blocked):
    with Collector(executor="processes") as collector:
        handle = collector.collect_async(blocked.lf)
        assert blocked.started.wait(30)
        place = only(collector, handle).place
        assert re.fullmatch(r"worker \d+", place)
        assert f"in {place}" in handle.summary
        blocked.gate.set()


def test_query_that_a_worker_could_not_run_has_its_place_here():
    query = Query(
        operation := Collect(TINY, pl.InMemoryEngine(), pl.QueryOptFlags()),
        pa.resolve_engine("in-memory"),
        Reporter(None),
        Owner(RLock(), Counts(), print),
    )
    query.place = "worker 4711"
    assert run_here(operation, query, "it needs this process").item() == 1
    assert query.place is None


def test_query_that_was_given_up_is_listed_as_abandoned_until_it_ends(blocked):
    with Collector(max_running=1) as collector:
        handle = collector.collect_async(blocked.lf)
        assert blocked.started.wait(30)
        assert handle.cancel()
        assert only(collector, handle).state == "abandoned"
        blocked.gate.set()


def test_streams_are_listed_and_paused_while_their_consumers_are_away():
    with Collector() as collector:
        stream = collector.collect_batches_async(pl.LazyFrame({"a": range(100)}), chunk_size=1)
        until(lambda: only(collector, stream).state == "paused")
        assert stream.summary.endswith("on the streaming engine")
        stream.close()


def test_queries_of_the_gpu_are_listed_with_their_gpu(blocked):
    with simulate_gpu(2), Collector(gpu="offload") as collector:
        handle = collector.collect_async(blocked.lf, engine="gpu")
        assert blocked.started.wait(30)
        assert (only(collector, handle).engine, only(collector, handle).place) == ("gpu", "GPU 0")
        assert handle.summary.endswith("on the gpu engine on GPU 0")
        blocked.gate.set()


def test_query_is_cancelled_by_its_number(blocked):
    with Collector(max_running=1) as collector, Collector() as other:
        collector.collect_async(blocked.lf)
        assert blocked.started.wait(30)
        waiting, kept = collector.collect_async(TINY), collector.collect_async(TINY)
        assert not other.cancel(waiting.id)
        assert collector.cancel(waiting.id)
        assert waiting.done()
        assert not kept.done()
        assert not collector.cancel(waiting.id)
        blocked.gate.set()
        assert kept.result(30).item() == 1
        assert not collector.cancel(kept.id)


def test_record_reads_as_one_line():
    info = pa.QueryInfo(
        id=7,
        label="sales",
        tags={"tenant": "a"},
        state="running",
        engine="streaming",
        submitted=datetime.now(UTC),
        waited=0.0123,
        ran=12.34,
        place="worker 4711",
        memory=1_234_567_890,
        progress=None,
    )
    told = (
        "query 7 'sales', running, streaming engine, worker 4711, waited 12 ms, ran 12.3 s, "
        "1.2 GB, tenant='a'"
    )
    assert (str(info), repr(info)) == (told, f"<QueryInfo: {told}>")


# The summary


def test_summary_tells_what_a_query_waited_behind_and_where_it_ran(blocked, monkeypatch):
    with Collector(max_running=1) as collector:
        first = collector.collect_async(blocked.lf, engine="streaming")
        assert blocked.started.wait(30)
        collector.collect_async(TINY)
        third = collector.collect_async(TINY, engine="in-memory")
        assert re.fullmatch(r"waited .+ behind 1 running and 1 waiting queries", third.summary)
        assert re.fullmatch(r"(waited .+, )?ran .+ on the streaming engine", first.summary)
        # As if more than a moment had passed.
        third._query.times._submitted -= 300
        blocked.gate.set()
        third.result(30)
        assert re.fullmatch(
            r"waited 3\d\d s behind 1 running and 1 waiting queries, "
            r"ran .+ on the in-memory engine",
            third.summary,
        )
        peak = property(lambda _: 1_200_000_000)
        monkeypatch.setattr(type(third._query), "peak_memory", peak)
        assert third.summary.endswith("on the in-memory engine, took 1.2 GB at its peak")


@pytest.mark.parametrize(
    ("ahead", "told"),
    [
        (Ahead(1, 0), "1 running query"),
        (Ahead(0, 1), "1 waiting query"),
        (Ahead(2, 0), "2 running queries"),
        (Ahead(2, 5), "2 running and 5 waiting queries"),
    ],
)
def test_queries_ahead_in_words(ahead, told):
    assert str(ahead) == told


def test_summary_tells_how_a_query_ended_if_not_well(blocked):
    with Collector(max_running=1) as collector:
        broken = collector.collect_async(pl.LazyFrame({"a": [1]}).select("b"))
        with pytest.raises(pl.exceptions.ColumnNotFoundError):
            broken.result(30)
        assert ", failed by ColumnNotFoundError: " in broken.summary
        running = collector.collect_async(blocked.lf)
        assert blocked.started.wait(30)
        waiting = collector.collect_async(TINY, timeout=60)
        inside.let_time_be_up(waiting)
        assert re.fullmatch(r"waited .+ behind 1 running query, timed out", waiting.summary)
        running.cancel()
        assert re.fullmatch(r"(waited .+, )?ran .+ engine, was cancelled", running.summary)
        blocked.gate.set()


def test_summary_tells_why_a_query_fell_back():
    with simulate_gpu(fail="oom"), Collector(gpu="offload") as collector:
        handle = collector.collect_async(TINY, engine="gpu")
        handle.result(30)
        assert re.search(
            r"on the gpu in vain for .+, ran .+ on the in-memory engine, fell back because of \w+",
            handle.summary,
            re.IGNORECASE,
        )


def test_summary_of_an_event_is_that_of_its_query(blocked):
    heard = []
    with Collector(max_running=1, on_event=heard.append) as collector:
        collector.collect_async(blocked.lf)
        assert blocked.started.wait(30)
        handle = collector.collect_async(TINY, engine="in-memory", timeout=60)
        inside.let_time_be_up(handle)
        (late,) = [event for event in heard if event.kind == "timed_out"]
        assert re.fullmatch(r"waited .+ behind 1 running query, timed out", late.summary)
        blocked.gate.set()


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.00012, "0.12 ms"), (0.0123, "12 ms"), (0.4, "0.40 s"), (3.14, "3.1 s"), (3600, "3,600 s")],
)
def test_seconds_in_words(seconds, told):
    assert in_seconds(seconds) == told


@pytest.mark.parametrize(
    ("size", "told"),
    [(0, "0 bytes"), (1500, "1.5 kB"), (999_999, "1.0 MB"), (340e6, "340 MB"), (2e15, "2000 TB")],
)
def test_bytes_in_words(size, told):
    assert in_bytes(int(size)) == told


# The log of slow queries


def slow_ones(caplog):
    return [record.getMessage() for record in caplog.records if record.name == SLOW]


def test_queries_that_take_as_long_are_logged_once_when_they_end(blocked, caplog):
    with Collector(max_running=1, slow=300) as collector:
        first = collector.collect_async(blocked.lf, label="sales", tags={"tenant": "a"})
        assert blocked.started.wait(30)
        quick, late = collector.collect_async(TINY), collector.collect_async(TINY, timeout=60)
        for query in (first, late):
            query._query.times._submitted -= 400
        assert not slow_ones(caplog)
        inside.let_time_be_up(late)
        (told,) = slow_ones(caplog)
        assert told.startswith(f"query {late.id} was slow: waited 4")
        assert told.endswith("timed out")
        blocked.gate.set()
        quick.result(30)
    _, told = slow_ones(caplog)
    assert told.startswith(f"query {first.id} 'sales' was slow: waited ")
    assert told.endswith("engine, tenant='a'")
    assert {record.levelno for record in caplog.records if record.name == SLOW} == {logging.WARNING}


def test_cancelled_query_is_logged_if_it_was_slow(blocked, caplog):
    with Collector(max_running=1, slow=0) as collector:
        handle = collector.collect_async(blocked.lf)
        assert blocked.started.wait(30)
        handle.cancel()
        (told,) = slow_ones(caplog)
        assert told.endswith("was cancelled")
        blocked.gate.set()
    assert len(slow_ones(caplog)) == 1


def test_no_query_is_logged_as_slow_unless_that_was_asked_for(caplog):
    with Collector() as collector:
        collector.collect_async(TINY).result(30)
    assert not slow_ones(caplog)


@pytest.mark.parametrize("slow", [-1, "1 s", True])
def test_slow_takes_seconds(slow):
    with pytest.raises(ValueError, match="slow must be a number of seconds, 0 or more, or None"):
        Collector(slow=slow)
