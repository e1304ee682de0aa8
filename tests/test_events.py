"""What is told of a query: to hooks, to the logger, in the counts, and by its label."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
import threading
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import FrozenInstanceError, dataclass, replace
from math import inf
from pathlib import Path

import inside
import polars as pl
import pytest
from places import TINY, Blocked, Notes, until

from polars_async import (
    Cache,
    Collector,
    CollectorClosedError,
    EngineDowngradeWarning,
    EventKind,
    QueryEvent,
    QueryTimeoutError,
    QueueFullError,
    Reason,
    resolve_engine,
)
from polars_async.events import Reporter
from polars_async.scheduling import query
from polars_async.scheduling.open_streams import MAX_STREAMS
from polars_async.scheduling.query import Query
from polars_async.testing import simulate_gpu

LAST = {"finished", "failed", "cancelled", "timed_out", "rejected"}
COMM = Path("/proc/thread-self/comm")
linux = pytest.mark.skipif(sys.platform != "linux", reason="names of threads are told by /proc")


class Heard(list):
    """A hook that keeps what it heard."""

    def __call__(self, event):
        self.append(event)

    def of(self, label):
        """Give all that happened to a query, once it is over."""
        events = []

        def is_over():
            events[:] = [event for event in self if event.label == label]
            return any(event.kind in LAST for event in events)

        until(is_over)
        return events

    def kinds(self, label):
        return [str(event.kind) for event in self.of(label)]


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def telling(blocked, heard, executor):
    """A collector with one slot, room for two that wait, and a hook."""
    collector = Collector(executor=executor, max_running=1, max_waiting=2, on_event=heard)
    yield collector
    blocked.gate.set()
    collector.close()


def failing(error):
    def udf(_):
        raise error

    return TINY.map_batches(udf)


# What happened, and in which order


@pytest.mark.everywhere
def test_query_that_gives_a_result_is_queued_started_and_finished(telling, heard):
    telling.collect_async(TINY, label="it").result(30)
    assert heard.kinds("it") == ["queued", "started", "finished"]


@pytest.mark.everywhere
def test_query_that_raises_is_queued_started_and_failed(telling, heard, is_that):
    raised = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        telling.collect_async(failing(raised), label="it").result(30)
    assert heard.kinds("it") == ["queued", "started", "failed"]
    assert is_that(heard.of("it")[-1].error, raised)


def test_query_cancelled_in_the_queue_never_started(telling, heard, blocked):
    telling.collect_async(blocked.lf)
    telling.collect_async(TINY, label="it").cancel()
    assert heard.kinds("it") == ["queued", "cancelled"]
    assert heard.of("it")[-1].run_seconds is None


@pytest.mark.everywhere
def test_query_cancelled_while_it_runs_is_over_then_and_its_end_is_not_told(
    telling, heard, blocked
):
    handle = telling.collect_async(blocked.lf, label="it")
    assert blocked.started.wait(30)
    handle.cancel()
    assert heard.kinds("it") == ["queued", "started", "cancelled"]
    blocked.gate.set()
    telling.collect_async(TINY, label="next").result(30)
    assert heard.kinds("it") == ["queued", "started", "cancelled"]


def test_cancellation_is_the_last_event_though_the_thread_had_not_begun(
    telling, heard, monkeypatch
):
    run, cancelled = Query.run, threading.Event()

    def run_late(query, place):
        cancelled.wait()
        run(query, place)

    monkeypatch.setattr(Query, "run", run_late)
    handle = telling.collect_async(TINY, label="it")
    handle.cancel()
    cancelled.set()
    telling.collect_async(TINY, label="next").result(30)
    assert heard.kinds("it")[-1] == "cancelled"


def test_cancellation_while_the_start_is_told_is_told_after_it():
    heard, is_told, goes_on = [], threading.Event(), threading.Event()

    def on_event(event):
        if event.kind == "started" and event.label == "it":
            is_told.set()
            assert goes_on.wait(30)
        heard.append(event)

    with Collector(on_event=on_event) as collector:
        handle = collector.collect_async(TINY, label="it")
        assert is_told.wait(30)
        handle.cancel()
        goes_on.set()
        with pytest.raises(CancelledError):
            handle.result(30)
    assert [event.kind for event in heard] == ["queued", "started", "cancelled"]


@pytest.mark.everywhere(runs=True)
@pytest.mark.parametrize("runs", [True, False])
def test_query_that_is_late_timed_out(telling, heard, blocked, runs):
    if not runs:
        telling.collect_async(blocked.lf)
    handle = telling.collect_async(blocked.lf, label="it", timeout=3600)
    if runs:
        assert blocked.started.wait(30)
    inside.let_time_be_up(handle)
    with pytest.raises(QueryTimeoutError) as caught:
        handle.result(30)
    assert heard.kinds("it") == ["queued", *["started"] * runs, "timed_out"]
    assert heard.of("it")[-1].error is caught.value
    assert (heard.of("it")[-1].run_seconds is not None) == runs


def test_query_that_finds_no_room_is_rejected(telling, heard, blocked):
    telling.collect_async(blocked.lf)
    for _ in range(2):
        telling.collect_async(TINY)
    with pytest.raises(QueueFullError) as caught:
        telling.collect_async(TINY, label="it")
    assert heard.kinds("it") == ["queued", "rejected"]
    assert heard.of("it")[-1].error is caught.value
    assert telling.stats()["rejected"] == 1
    assert balance(telling.stats()) == 0


def test_query_for_a_closed_collector_is_rejected(telling, heard):
    telling.close()
    with pytest.raises(CollectorClosedError) as caught:
        telling.collect_async(TINY, label="it")
    assert heard.kinds("it") == ["queued", "rejected"]
    rejected = heard.of("it")[-1]
    assert rejected.error is caught.value
    assert rejected.run_seconds is None


def test_query_that_was_not_let_in_has_not_waited(telling, heard):
    telling.close()
    with pytest.raises(CollectorClosedError):
        telling.collect_async(TINY, label="it")
    assert heard.of("it")[-1].queue_seconds == 0


def test_query_that_cannot_have_the_gpu_is_downgraded(telling, heard):
    with pytest.warns(EngineDowngradeWarning):
        telling.collect_async(TINY, label="it", engine="gpu").result(30)
    assert heard.kinds("it") == ["queued", "downgraded", "started", "finished"]
    assert {event.engine for event in heard.of("it")} == {"in-memory"}
    assert telling.stats()["downgraded"] == 1


def test_finished_is_told_before_whoever_waits_goes_on(blocked, executor):
    went_on, early, waits = threading.Event(), [], threading.Event()

    def on_event(event):
        if event.kind is EventKind.FINISHED:
            # Where nothing holds it off, this is time enough to go on.
            early.append(went_on.wait(0.2))

    async def main(handle):
        task = asyncio.ensure_future(wait(handle))
        await asyncio.sleep(0)
        waits.set()
        await task
        went_on.set()

    async def wait(handle):
        return await handle

    with Collector(executor=executor, max_running=1, on_event=on_event) as collector:
        handle = collector.collect_async(blocked.lf)
        runner = threading.Thread(target=asyncio.run, args=(main(handle),))
        runner.start()
        assert waits.wait(30)
        blocked.gate.set()
        runner.join(30)
    assert early == [False]


def test_all_is_told_when_close_returns(executor):
    finished, gate, closed = threading.Event(), threading.Event(), threading.Event()

    def on_event(event):
        if event.kind is EventKind.FINISHED:
            finished.set()
            gate.wait()

    collector = Collector(executor=executor, max_running=1, on_event=on_event)
    collector.collect_async(TINY)
    assert finished.wait(30)
    closer = threading.Thread(target=lambda: (collector.close(), closed.set()))
    closer.start()
    early = closed.wait(0.2)  # as above
    gate.set()
    closer.join(30)
    assert not early


# The event


@pytest.mark.everywhere
def test_event_tells_of_its_query(telling, heard, blocked):
    telling.collect_async(blocked.lf, label="first")
    assert blocked.started.wait(30)
    handle = telling.collect_async(TINY, label="second", engine="streaming")
    blocked.gate.set()
    handle.result(30)
    queued, started, finished = heard.of("second")
    assert {event.engine for event in heard.of("second")} == {handle.resolution.name}
    assert len({event.query_id for event in heard.of("second")}) == 1
    assert heard.of("first")[0].query_id != queued.query_id
    assert queued.run_seconds is None
    assert queued.queue_seconds < started.queue_seconds == finished.queue_seconds
    assert 0 <= started.run_seconds <= finished.run_seconds
    assert (queued.rows, started.rows, finished.rows) == (None, None, 1)
    assert {event.error for event in heard.of("second")} == {None}


@pytest.mark.everywhere
def test_finished_counts_the_rows(telling, heard, tmp_path):
    three = pl.LazyFrame({"a": range(3)})
    telling.collect_async(three, label="frame").result(30)
    telling.collect_all_async([three, TINY], label="frames").result(30)
    telling.collect_all_async([], label="no frames").result(30)
    telling.collect_schema_async(three, label="schema").result(30)
    telling.sink_async(three.sink_csv(tmp_path / "a.csv", lazy=True), label="sink").result(30)

    async def batches():
        return [each async for each in telling.collect_batches_async(three, label="batches")]

    assert asyncio.run(batches())
    labels = ("frame", "frames", "no frames", "batches", "schema", "sink")
    assert [heard.of(label)[-1].rows for label in labels] == [3, 4, 0, 3, None, None]


def test_ids_are_unique_over_all_collectors(heard, executor):
    for _ in range(3):
        with Collector(executor=executor, on_event=heard) as collector:
            for _ in range(3):
                collector.collect_async(TINY)
    assert len({event.query_id for event in heard}) == 9


def test_event_cannot_be_changed(telling, heard):
    telling.collect_async(TINY, label="it").result(30)
    with pytest.raises(FrozenInstanceError):
        heard[0].label = "another"


RESOLUTION = resolve_engine("in-memory")
FALLEN = replace(RESOLUTION, fell_back=True, reason=Reason.OUT_OF_MEMORY)
OOM = MemoryError()
MANY = NotImplementedError("no:\n- a", [ValueError("a")])


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            QueryEvent(EventKind.QUEUED, 7, None, "streaming", 0.0, None, None, None, RESOLUTION),
            "query 7 queued: streaming engine, waited 0.000 s",
        ),
        (
            QueryEvent(EventKind.FINISHED, 7, "top ten", "gpu", 0.25, 1.5, 10, None, RESOLUTION),
            "query 7 'top ten' finished: gpu engine, waited 0.250 s, ran 1.500 s, 10 rows",
        ),
        (
            QueryEvent(
                EventKind.FAILED, 7, None, "gpu", 0.0, 0.5, None, ValueError("no"), RESOLUTION
            ),
            "query 7 failed: gpu engine, waited 0.000 s, ran 0.500 s, ValueError: no",
        ),
        (
            QueryEvent(EventKind.FAILED, 7, None, "gpu", 0.0, 0.5, None, MANY, RESOLUTION),
            "query 7 failed: gpu engine, waited 0.000 s, ran 0.500 s, NotImplementedError: no: - a",
        ),
        (
            QueryEvent(EventKind.FELL_BACK, 7, None, "in-memory", 0.5, None, None, OOM, FALLEN),
            "query 7 fell back: in-memory engine, out_of_gpu_memory, waited 0.500 s, MemoryError",
        ),
    ],
)
def test_event_reads_as_one_line(event, text):
    assert str(event) == text


def test_event_of_an_error_of_many_lines_reads_as_one_line_too(telling, heard):
    with pytest.raises(ValueError, match="no"):
        telling.collect_async(failing(ValueError("no\nmore")), label="it").result(30)
    assert "\n" not in str(heard.of("it")[-1])


# The hook


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_hook_that_raises_on_a_worker_is_logged_once_and_harms_no_query(
    caplog, kind, executor, monkeypatch
):
    monkeypatch.setattr(query, "_WORTH_ESTIMATING", inf)  # else a thread more may be taken

    def on_event(event):
        if event.kind is EventKind.STARTED:
            raise kind

    with Collector(executor=executor, max_running=1, on_event=on_event) as collector:
        assert collector.collect_async(TINY).result(30).item() == 1
        assert len(caplog.records) == 1
        assert collector.collect_async(TINY).result(30).item() == 1
        assert inside.all_threads(collector) == 1
    assert len(caplog.records) == 2
    record = caplog.records[0]
    assert (record.name, record.levelname) == ("polars_async", "ERROR")
    assert "hook" in record.getMessage()
    assert record.exc_info[0] is kind


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_hook_that_raises_on_the_callers_thread_is_logged_and_harms_no_query(
    caplog, kind, executor
):
    def on_event(event):
        if event.kind in (EventKind.QUEUED, EventKind.CANCELLED):
            raise kind

    with Collector(executor=executor, max_running=1, on_event=on_event) as collector:
        assert collector.collect_async(TINY).result(30).item() == 1
        blocked = Blocked()
        collector.collect_async(blocked.lf)
        waiting = collector.collect_async(TINY)
        waiting.cancel()
        with pytest.raises(CancelledError):
            waiting.result(30)
        blocked.gate.set()
    assert len(caplog.records) == 4


def test_ctrl_c_in_the_hook_is_for_the_program_and_costs_no_waiter_its_answer(executor):
    def on_event(event):
        if event.kind is EventKind.CANCELLED:
            raise KeyboardInterrupt

    blocked, told = Blocked(), []
    with Collector(executor=executor, max_running=1, on_event=on_event) as collector:
        handle = collector.collect_async(blocked.lf)

        class Waiter:
            def wake(self):
                told.append(1)

        handle._query.add_waiter(Waiter())
        with pytest.raises(KeyboardInterrupt):
            handle.cancel()
        blocked.gate.set()
    assert told == [1]


# The logger


QUIET = """
import polars as pl, polars_async as pa
with pa.Collector(max_running=1, max_waiting=0) as collector:
    handle = collector.collect_async(pl.LazyFrame({"a": [1]}), label="it")
    print(handle.result().item())
    for refused in (pl.LazyFrame({"a": [1]}).select("nope"),):
        try:
            collector.collect_async(refused).result()
        except pl.exceptions.ColumnNotFoundError:
            print("failed")
"""


def test_logger_is_quiet_by_default(run_script):
    assert run_script(QUIET) == ["1", "failed"]


def test_logger_shows_a_line_for_each_event(caplog, collector, blocked):
    caplog.set_level(logging.DEBUG, "polars_async")
    collector.collect_async(blocked.lf, label="it")
    collector.collect_async(TINY, label="it").cancel()
    blocked.gate.set()
    collector.close()
    until(lambda: len(caplog.records) == 5)
    assert {record.name for record in caplog.records} == {"polars_async"}
    lines = [record.getMessage() for record in caplog.records]
    for kind, times in (("queued", 2), ("started", 1), ("cancelled", 1), ("finished", 1)):
        assert sum(f" 'it' {kind}: in-memory engine" in line for line in lines) == times


def test_logger_shows_at_info_what_a_user_may_want_to_know(caplog, collector, blocked):
    caplog.set_level(logging.INFO, "polars_async")
    collector.collect_async(blocked.lf)
    with pytest.warns(EngineDowngradeWarning):
        handle = collector.collect_async(TINY, engine="gpu", timeout=0.001)
    with pytest.raises(QueryTimeoutError):
        handle.result(30)
    blocked.gate.set()
    collector.close()
    with pytest.raises(CollectorClosedError):
        collector.collect_async(TINY)
    kinds = [record.getMessage().split(":")[0].split(" ", 2)[2] for record in caplog.records]
    assert kinds == ["downgraded", "timed out", "rejected"]
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_nobody_listens_by_default():
    assert not Reporter(None).listens
    assert Reporter(print).listens


# The counts


OUTCOMES = ("completed", "failed", "cancelled", "timed_out", "rejected")


def balance(stats):
    known = sum(stats[outcome] for outcome in OUTCOMES)
    return stats["submitted"] - known - stats["waiting"] - stats["running"] + stats["abandoned"]


class WatchedLock:
    """A lock that looks at the counts whenever others could do so."""

    def __init__(self, lock, look):
        self._lock = lock
        self._look = look
        self._depth = 0

    def __enter__(self):
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_):
        if self._depth == 1:
            self._look()
        self._depth -= 1
        self._lock.release()

    def _is_owned(self):  # as threading calls it
        return self._lock._is_owned()


@pytest.mark.everywhere
def test_counts_add_up_at_every_moment(executor):
    collector = Collector(executor=executor, max_running=1, max_waiting=2)
    off = []

    def look():
        stats = collector.stats()
        if balance(stats):
            off.append(stats)

    admission = collector._cpu.admission
    admission.lock = WatchedLock(admission.lock, look)
    collector.collect_async(TINY).result(30)
    with pytest.raises(ValueError, match="no"):
        collector.collect_async(failing(ValueError("no"))).result(30)
    blocked = Blocked()
    running = collector.collect_async(blocked.lf, timeout=3600)
    assert blocked.started.wait(30)
    collector.collect_async(TINY).cancel()
    with pytest.raises(QueryTimeoutError):
        collector.collect_async(TINY, timeout=0.001).result(30)
    last = [collector.collect_async(TINY) for _ in range(2)]
    assert off == []
    with pytest.raises(QueueFullError):
        collector.collect_async(TINY)
    running.cancel()
    blocked.gate.set()
    assert [handle.result(30).item() for handle in last] == [1, 1]
    collector.close()
    with pytest.raises(CollectorClosedError):
        collector.collect_async(TINY)
    assert off == []
    stats = collector.stats()
    assert [stats[outcome] for outcome in OUTCOMES] == [3, 1, 2, 1, 2]
    assert stats["submitted"] == 9


@pytest.mark.everywhere
def test_stats_count_what_was_done_and_is_done(telling, blocked, is_given_up, executor):
    assert set(telling.stats().values()) == {0, 1, 2, MAX_STREAMS, None}  # the limits
    telling.collect_async(TINY).result(30)
    with pytest.raises(ValueError, match="no"):
        telling.collect_async(failing(ValueError("no"))).result(30)
    handle = telling.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    telling.collect_async(TINY)
    telling.collect_async(TINY).cancel()
    stats = telling.stats()
    times = [stats.pop("queue_seconds"), stats.pop("run_seconds")]
    assert min(times) > 0
    expected = dict.fromkeys(stats, 0)
    expected |= {"max_running": 1, "max_waiting": 2, "running": 1, "waiting": 1, "submitted": 5}
    expected |= {"max_streams": MAX_STREAMS, "workers": int(executor == "processes")}
    expected |= {"memory": None, "max_memory": None}
    assert stats == expected | {"completed": 1, "failed": 1, "cancelled": 1}
    handle.cancel()
    assert telling.stats()["cancelled"] == 2
    is_given_up(telling)
    blocked.gate.set()
    telling.close(cancel_waiting=False)
    stats = telling.stats()
    assert (stats["running"], stats["abandoned"], stats["completed"]) == (0, 0, 2)
    assert stats["run_seconds"] > times[1]
    assert stats["queue_seconds"] > times[0]


def test_stats_are_json(telling):
    for stats in (telling.stats(), Collector().stats()):
        assert json.loads(json.dumps(stats, allow_nan=False)) == stats
    assert telling.stats()["max_waiting"] == 2
    assert Collector().stats()["max_waiting"] is None


def test_stats_of_all_that_can_be_switched_on_are_json(tmp_path):
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "a.parquet")
    query = pl.scan_parquet(tmp_path / "a.parquet").select(pl.col("a").sum())
    cache = Cache(seconds=60, max_bytes="1 GB")
    options = {"cache": cache, "max_memory": "4 GB", "progress": True, "slow": 60, "gpu": "offload"}
    with simulate_gpu(2), Collector(on_event=print, executor="auto", **options) as collector:
        for handle in [
            *(collector.collect_async(query) for _ in range(3)),
            collector.run(len, "a"),
        ]:
            handle.result(30)
        stats = collector.stats()
    assert json.loads(json.dumps(stats, allow_nan=False)) == stats
    assert stats["completed"] == 4
    assert set(stats) > Collector.COUNTERS


def test_table_of_stats_in_the_docs_has_each():
    told = (Path(__file__).parents[1] / "docs/watching.md").read_text()
    table = told.split("| keys |")[1].split("\n\n")[0]
    keys = {key for key in Collector().stats() if not re.match(r"gpu_\d", key)}
    assert {key for key in keys if f"`{key}`" not in table} == set()


def test_counters_only_grow_and_gauges_go_back(telling, blocked):
    before = telling.stats()
    assert set(before) > Collector.COUNTERS
    handles = [telling.collect_async(blocked.lf), telling.collect_async(TINY)]
    assert blocked.started.wait(30)
    during = telling.stats()
    blocked.gate.set()
    for handle in handles:
        handle.result(30)
    until(lambda: telling.stats()["running"] == 0)
    after = telling.stats()
    assert all(before[key] <= during[key] <= after[key] for key in Collector.COUNTERS)
    gauges = set(before) - Collector.COUNTERS
    assert {key: after[key] for key in gauges} == {key: before[key] for key in gauges}
    assert during["running"] == during["waiting"] == 1


def test_docstring_of_stats_names_each_as_what_it_is():
    counters, gauges = Collector.stats.__doc__.split("The gauges:")
    for key in Collector().stats():
        named = re.sub(r"^gpu_\d+_", "gpu_0_", key)  # of those that tests before have used
        assert f"``{named}``" in (counters if key in Collector.COUNTERS else gauges)


# The label


def test_label_is_that_of_the_handle(collector):
    assert collector.collect_async(TINY, label="it").label == "it"
    assert collector.collect_async(TINY).label is None


@pytest.mark.everywhere
def test_error_of_a_labelled_query_has_one_note(collector, is_that):
    async def twice(handle):
        for _ in range(2):
            with pytest.raises(ValueError, match="no") as caught:
                await handle
        return caught.value

    raised = ValueError("no")
    handle = collector.collect_async(failing(raised), label="top ten")
    error = asyncio.run(twice(handle))
    assert is_that(error, raised)
    assert error.__notes__ == ["in the query 'top ten'"]
    # The same error of another query so named.
    with pytest.raises(ValueError, match="no") as again:
        collector.collect_async(failing(error), label="top ten").result(30)
    assert is_that(again.value, error)
    assert again.value.__notes__ == ["in the query 'top ten'"]


def test_error_of_a_query_without_label_has_no_note(collector):
    with pytest.raises(ValueError, match="no") as caught:
        collector.collect_async(failing(ValueError("no"))).result(30)
    assert not hasattr(caught.value, "__notes__")


@dataclass(frozen=True)
class FrozenError(Exception):
    """An error that nothing can be noted in."""

    code: int


@pytest.mark.everywhere
def test_error_that_takes_no_note_arrives_all_the_same(executor):
    collector = Collector(
        executor=executor, max_running=1
    )  # never closed, as above all it could not be

    def udf(_):
        raise FrozenError(5)

    handle = collector.collect_async(TINY.map_batches(udf), label="it")
    with pytest.raises(FrozenError):
        handle.result(30)


def test_error_that_takes_nothing_arrives_from_the_gpu():
    def udf(_):
        raise FrozenError(5)

    with simulate_gpu(), Collector(gpu="offload") as collector:
        handle = collector.collect_async(TINY.map_batches(udf), engine="gpu")
        with pytest.raises(FrozenError):
            handle.result(30)


def test_cancellation_and_time_out_name_the_query(collector, blocked):
    collector.collect_async(blocked.lf)
    handle = collector.collect_async(TINY, label="top ten")
    handle.cancel()
    with pytest.raises(CancelledError, match=r"^the query 'top ten' was cancelled$"):
        handle.result(30)
    with pytest.raises(QueryTimeoutError, match=r"^the query 'top ten' was not done after 0.001 s"):
        collector.collect_async(TINY, label="top ten", timeout=0.001).result(30)


def names(seen):
    def udf(df):
        seen.append((threading.current_thread().name, COMM.read_text().removesuffix("\n")))
        return df

    return TINY.map_batches(udf)


@linux
def test_thread_has_the_name_of_the_query_while_it_runs(collector, monkeypatch):
    monkeypatch.setattr(query, "_WORTH_ESTIMATING", inf)  # else a thread more may be taken
    seen = Notes()
    for label in ("top ten of the customers", None, "ten"):
        collector.collect_async(names(seen), label=label).result(30)
    with pytest.raises(ValueError, match="no"):
        collector.collect_async(failing(ValueError("no")), label="failed").result(30)
    collector.collect_async(names(seen)).result(30)
    labelled, plain, short, after = seen
    assert labelled == ("top ten of the customers", "top ten of the ")
    assert short == ("ten", "ten")
    assert plain == after
    assert plain[1] == "polars-async"
    assert inside.all_threads(collector) == 1


GREEN = """
import gevent.monkey; gevent.monkey.patch_all()
import gevent, threading
import polars as pl, polars_async as pa
def udf(df):
    with open("/proc/thread-self/comm") as file:
        print(threading.current_thread().name, file.read().strip(), flush=True)
    return df
with pa.Collector(max_running=1) as collector:
    lf = pl.LazyFrame({"a": [1]}).map_batches(udf)
    for label in ("ten", None):
        collector.collect_async(lf, label=label, gevent=True).get()
"""


@linux
def test_thread_has_the_name_of_the_query_where_gevent_has_patched(run_script):
    labelled, comm, plain, plain_comm = run_script(GREEN)
    assert (labelled, comm) == ("ten", "ten")
    assert plain != "ten"
    assert plain_comm == "polars-async"


@linux
@pytest.mark.parametrize("label", ["ä" * 8, "\x00", "a\nb", "\udc80", "", "polars-0"])
def test_any_text_is_a_label_and_leaves_the_name_of_the_thread_readable(collector, blocked, label):
    comms = Path("/proc/self/task")
    handle = collector.collect_async(blocked.lf, label=label)
    assert blocked.started.wait(30)
    for thread in comms.iterdir():
        with suppress(OSError):  # one of another test may end just now
            (thread / "comm").read_text()
    blocked.gate.set()
    assert handle.result(30).item() == 1


FORK = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from 3.12 on
import polars as pl, polars_async as pa
started, gate = threading.Event(), threading.Event()
def udf(df):
    started.set()
    gate.wait()
    return df
pl.LazyFrame({"a": range(1000)}).group_by("a").len().collect()  # starts Polars' threads
collector = pa.Collector(max_running=1)
handle = collector.collect_async(pl.LazyFrame({"a": [1]}).map_batches(udf), label=sys.argv[1])
started.wait()
child = os.fork()
if not child:
    signal.alarm(60)
    try:
        pa.Collector().collect_async(pl.LazyFrame({"a": [1]})).result()
    except pa.ForkedProcessError:
        print("child", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child hung"
gate.set()
handle.result()
"""


@linux
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("label", ["plain", "ä" * 8])
def test_fork_is_noticed_whatever_a_label_says(run_script, label):
    assert run_script(FORK, label) == ["child"]
