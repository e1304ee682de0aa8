"""Metrics for Prometheus: what a scrape finds, in one process and in several."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from concurrent.futures import CancelledError

import inside
import polars as pl
import pytest
from places import TINY, Failure, until
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from servers import Server
from snippets import FILES, SNIPPETS
from test_services import stopped

from polars_async import (
    Cache,
    Collector,
    EngineDowngradeWarning,
    QueryTimeoutError,
    QueueFullError,
    WorkerDiedError,
)
from polars_async.instrumentation.prometheus import register, unregister
from polars_async.scheduling.query import Query
from polars_async.testing import simulate_gpu

QUERIES, RUN, WAIT = (
    f"polars_async_{name}" for name in ("queries_total", "query_run_seconds", "query_wait_seconds")
)


def samples(text):
    """Give what a scrape finds: the value by name and labels, without when a series began."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


class Scraped:
    """A registry, and what a scrape of it finds now."""

    def __init__(self):
        self.registry = CollectorRegistry()

    def __call__(self, name, collector="default", **labels):
        found = samples(generate_latest(self.registry).decode())
        return found.get((name, frozenset({"collector": collector, **labels}.items())))

    def load(self):
        return self("polars_async_queries_waiting"), self("polars_async_queries_running")


@pytest.fixture
def scraped():
    return Scraped()


@pytest.fixture
def counted(make, scraped):
    """A collector with one slot and room for one that waits, which is registered."""
    collector = make(max_running=1, max_waiting=1)
    register(collector, scraped.registry)
    return collector


def failing(error):
    def udf(_):
        raise error

    return TINY.map_batches(udf)


def outcomes(scraped, engine="in-memory"):
    names = ("completed", "failed", "cancelled", "timed_out", "rejected")
    counts = {name: scraped(QUERIES, engine=engine, outcome=name) for name in names}
    return {name: count for name, count in counts.items() if count is not None}


def test_queries_are_counted_by_engine_and_outcome(counted, scraped, blocked):
    counted.collect_async(TINY).result(30)
    counted.collect_async(TINY, engine="streaming").result(30)
    with pytest.raises(Failure):
        counted.collect_async(failing(Failure())).result(30)
    running = counted.collect_async(blocked.lf, timeout=3600)
    assert blocked.started.wait(30)
    waiting = counted.collect_async(TINY)
    with pytest.raises(QueueFullError):
        counted.collect_async(TINY)
    waiting.cancel()
    inside.let_time_be_up(running)
    with pytest.raises(QueryTimeoutError):
        running.result(30)
    assert outcomes(scraped, "streaming") == {"completed": 1}
    assert outcomes(scraped) == dict.fromkeys(
        ("completed", "failed", "cancelled", "timed_out", "rejected"), 1
    )


@pytest.mark.usefixtures("small_frames")
def test_each_caller_of_a_shared_run_is_counted_once(make, scraped, blocked):
    collector = make(single_flight=True, max_running=1)
    register(collector, scraped.registry)
    collector.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    handles = [collector.collect_async(TINY) for _ in range(4)]
    handles[-1].cancel()
    blocked.gate.set()
    for handle in handles[:-1]:
        handle.result(30)
    until(lambda: scraped.load() == (0, 0))
    assert outcomes(scraped) == {"completed": 4, "cancelled": 1}
    shared = "polars_async_queries_shared_total"
    assert (scraped(shared, source="run"), scraped(shared, source="cache")) == (2, 0)
    assert scraped(f"{RUN}_count", engine="in-memory", outcome="completed") == 2


@pytest.mark.usefixtures("small_frames")
def test_results_that_were_kept_are_counted(scraped):
    with Collector(cache=Cache(seconds=60, max_bytes="1 GB"), inline=0) as collector:
        register(collector, scraped.registry)
        collector.collect_async(TINY).result(30)
        until(lambda: collector.stats()["cached"] == 1)
        collector.collect_async(TINY).result(30)
    shared = "polars_async_queries_shared_total"
    assert (scraped(shared, source="run"), scraped(shared, source="cache")) == (0, 1)
    assert outcomes(scraped) == {"completed": 2}


def test_waits_for_memory_are_counted(make, scraped, blocked):
    counted = make(max_running=1, max_memory="8 GB")
    register(counted, scraped.registry)
    waits, seconds = (f"polars_async_memory_{name}_total" for name in ("waits", "wait_seconds"))
    counted.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    handle = counted.collect_async(TINY)
    handle._query.times.held_up_since = handle._query.times.submitted
    assert scraped(waits) == 0
    blocked.gate.set()
    handle.result(30)
    assert scraped(waits) == 1
    stats = counted.stats()
    assert stats["memory_waits"] == 1
    assert scraped(seconds) == pytest.approx(stats["memory_seconds"])


def test_seconds_are_those_of_queries_that_have_started(counted, scraped, blocked):
    first = counted.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    counted.collect_async(TINY).cancel()
    blocked.gate.set()
    first.result(30)
    until(lambda: not counted.stats()["running"])  # by then all is told
    stats = counted.stats()
    assert scraped(f"{WAIT}_count", engine="in-memory") == 1
    assert scraped(f"{RUN}_count", engine="in-memory", outcome="completed") == 1
    assert scraped(f"{RUN}_count", engine="in-memory", outcome="cancelled") == 0
    seconds = scraped(f"{RUN}_sum", engine="in-memory", outcome="completed")
    assert seconds == pytest.approx(stats["run_seconds"])
    assert scraped(f"{WAIT}_bucket", engine="in-memory", le="+Inf") == 1


@pytest.fixture(params=["read when scraped", "fed by events"])
def gauges(request, monkeypatch, tmp_path):
    """Have gauges work in either way, whatever the way of the values in this process is."""
    if request.param == "fed by events":
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))


@pytest.mark.usefixtures("gauges")
def test_gauges_follow_the_queries(make, scraped, blocked):
    collector, other = make(max_running=1, max_waiting=1), make()
    register(collector, scraped.registry)
    register(other, scraped.registry)
    assert scraped.load() == (0, 0)
    running = collector.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    waiting = collector.collect_async(TINY)
    elsewhere = other.collect_async(blocked.lf)
    until(lambda: scraped.load() == (1, 2))
    running.cancel()  # it holds its slot, and nobody waits for it
    assert scraped.load() == (1, 1)
    blocked.gate.set()
    elsewhere.result(30)
    waiting.result(30)
    until(lambda: scraped.load() == (0, 0))
    assert collector._reporter.listeners[0]._counted == {}


@pytest.mark.usefixtures("gauges")
def test_query_cancelled_when_it_has_a_slot_but_has_not_begun_leaves_the_gauge(
    make, scraped, monkeypatch
):
    counted = make()
    register(counted, scraped.registry)
    run, cancelled = Query.run, threading.Event()

    def run_late(query, place):
        cancelled.wait()
        run(query, place)

    monkeypatch.setattr(Query, "run", run_late)
    handle = counted.collect_async(TINY)
    handle.cancel()
    cancelled.set()
    assert scraped.load() == (0, 0)


@pytest.mark.usefixtures("gauges")
def test_changes_of_the_engine_are_counted(scraped):
    with simulate_gpu(fail="unsupported"), Collector(gpu="offload") as collector:
        register(collector, scraped.registry)
        collector.collect_async(TINY, engine="gpu").result(30)
    changes = "polars_async_engine_changes_total"
    assert scraped(changes, engine="in-memory", kind="fell_back") == 1
    assert scraped(changes, engine="in-memory", kind="downgraded") is None
    assert outcomes(scraped) == {"completed": 1}
    assert scraped.load() == (0, 0)


def test_downgrade_is_counted(counted, scraped):
    with pytest.warns(EngineDowngradeWarning):
        counted.collect_async(TINY, engine="gpu").result(30)
    changes = "polars_async_engine_changes_total"
    assert scraped(changes, engine="in-memory", kind="downgraded") == 1


def test_death_of_a_worker_is_counted(counted, scraped):
    with pytest.raises(WorkerDiedError):
        counted.collect_async(failing(WorkerDiedError("died"))).result(30)
    until(lambda: scraped("polars_async_workers_died_total") == 1)
    with pytest.raises(Failure):
        counted.collect_async(failing(Failure())).result(30)
    until(lambda: outcomes(scraped) == {"failed": 2})
    assert scraped("polars_async_workers_died_total") == 1


def test_collectors_of_one_registry_are_told_apart_by_their_names(make, scraped, blocked):
    for name, queries in [("one", 1), ("two", 2), ("two", 3)]:
        collector = make()
        register(collector, scraped.registry, name=name)
        for _ in range(queries):
            collector.collect_async(TINY).result(30)
    labels = {"engine": "in-memory", "outcome": "completed"}
    until(lambda: [scraped(QUERIES, name, **labels) for name in ("one", "two")] == [1, 5])
    collector.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    assert scraped("polars_async_queries_running", "one") == 0
    assert scraped("polars_async_queries_running", "two") == 1


def test_label_of_a_query_is_one_of_the_metrics_only_if_that_is_wanted(make, scraped):
    collector, other = make(), make()
    register(collector, scraped.registry, by_label=True)
    collector.collect_async(TINY, label="sales").result(30)
    collector.collect_async(TINY).result(30)
    until(lambda: not collector.stats()["running"])  # by then all is told
    for label in ("sales", ""):
        assert scraped(QUERIES, engine="in-memory", outcome="completed", label=label) == 1
        assert scraped(f"{WAIT}_count", engine="in-memory", label=label) == 1
    with pytest.raises(ValueError, match="by_label must be the same"):
        register(other, scraped.registry)


def test_label_that_is_no_text_of_utf8_spoils_no_scrape(make, scraped):
    collector = make()
    register(collector, scraped.registry, by_label=True)
    collector.collect_async(TINY, label=os.fsdecode(b"sales-\xff.csv")).result(30)
    labels = {"engine": "in-memory", "outcome": "completed", "label": "sales-?.csv"}
    until(lambda: scraped(QUERIES, **labels) == 1)


def test_what_is_not_registered_is_not_counted(counted, scraped):
    with pytest.raises(ValueError, match="registered already"):
        register(counted, scraped.registry)
    unregister(counted, scraped.registry)
    assert generate_latest(scraped.registry) == b""
    with pytest.raises(ValueError, match="is not registered"):
        unregister(counted, scraped.registry)
    counted.collect_async(TINY).result(30)
    register(counted, scraped.registry)
    assert outcomes(scraped) == {}


def test_metrics_stay_while_another_collector_is_registered(make, counted, scraped):
    register(make(), scraped.registry, name="other")
    counted.collect_async(TINY).result(30)
    unregister(counted, scraped.registry)
    until(lambda: outcomes(scraped) == {"completed": 1})


def test_query_is_told_to_its_end_though_the_collector_is_unregistered(
    make, counted, scraped, blocked
):
    register(make(), scraped.registry, name="other")
    handle = counted.collect_async(blocked.lf)
    unregister(counted, scraped.registry)
    handle.cancel()
    with pytest.raises(CancelledError):
        handle.result(30)
    until(lambda: outcomes(scraped) == {"cancelled": 1})  # told by the thread that starts it
    assert scraped.load() == (0, 0)


def test_collector_is_freed_though_it_is_registered(scraped):
    collector = Collector()
    register(collector, scraped.registry)
    gone = weakref.ref(collector)
    del collector
    until(lambda: gc.collect() is not None and gone() is None)


def test_default_registry_is_that_of_the_client(make):
    collector = make()
    register(collector)
    try:
        collector.collect_async(TINY).result(30)
        labels = {"collector": "default", "engine": "in-memory", "outcome": "completed"}
        key = QUERIES, frozenset(labels.items())
        until(lambda: samples(generate_latest().decode()).get(key) == 1)
    finally:
        unregister(collector)


@pytest.mark.slow
def test_scrape_of_gunicorn_finds_the_sums_over_its_workers(tmp_path, monkeypatch):
    (settings,) = (each.code for each in SNIPPETS if "def child_exit" in each.code)
    (tmp_path / "gunicorn.conf.py").write_text(settings)
    (tmp_path / "counted.py").write_text(FILES["counted.py"].code)
    pl.DataFrame({"sum": [1, 2]}).write_parquet(tmp_path / "sales.parquet")
    (tmp_path / "metrics").mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "metrics"))
    command = FILES["counted.py"].following[1].partition("DIR=metrics ")[2].split()
    server = Server([*command, "--bind=127.0.0.1:0"], tmp_path)
    try:
        workers = server.logged(r"Booting worker with pid: (\d+)", 2)
        for queries, (worker, other) in enumerate([workers, workers[::-1]], 1):
            with stopped(int(other)):
                for _ in range(queries):
                    response, body = server.ask("/")
                    assert (response.status, body) == (200, b'[{"sum":3}]')
            assert (tmp_path / "metrics" / f"gauge_livesum_{worker}.db").exists()
        labels = {"collector": "default", "engine": "in-memory", "outcome": "completed"}
        expected = {
            (name, frozenset(labels.items())): 3.0 for name in (QUERIES, f"{RUN}_count")
        } | {
            (f"polars_async_queries_{gauge}", frozenset({("collector", "default")})): 0.0
            for gauge in ("waiting", "running")
        }
        # A worker may tell of the end of a query after the response.
        until(lambda: expected.items() <= samples(server.ask("/metrics")[1].decode()).items())
        os.kill(int(workers[0]), signal.SIGKILL)
        until(lambda: not (tmp_path / "metrics" / f"gauge_livesum_{workers[0]}.db").exists())
    finally:
        server.kill()
