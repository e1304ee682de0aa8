from __future__ import annotations

import io
import logging
import os
import pickle
import sys
import threading

import polars as pl
import pytest
from places import until
from polars.io.plugins import register_io_source

import polars_async as pa
from polars_async.executors import staying
from polars_async.scheduling import estimates
from polars_async.testing import simulate_gpu

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux"),
    pytest.mark.usefixtures("warm_workers"),
]

TINY = pl.LazyFrame({"a": [1, 2, 3]}).sum()
PID = pl.LazyFrame({"a": [1]}).map_batches(lambda frame: frame * 0 + os.getpid())


@pytest.fixture
def collector():
    with pa.Collector(executor="auto") as collector:
        yield collector


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large.parquet"
    pl.select(a=pl.int_range(0, 3_000_000)).write_parquet(path, compression="uncompressed")
    return pl.scan_parquet(path)


@pytest.fixture
def no_run_is_slow(monkeypatch):
    """Have no query count as large for what held it up, such as other processes."""
    monkeypatch.setattr(estimates, "_HELD_UP", 600.0)


@pytest.mark.usefixtures("no_run_is_slow")
def test_tiny_queries_run_here(collector):
    handles = [collector.collect_async(TINY) for _ in range(20)]
    assert {handle.result(30).item() for handle in handles} == {6}
    assert collector.collect_schema_async(TINY).result(30) == {"a": pl.Int64}
    assert collector.stats()["workers"] == 0


def test_large_ones_run_in_processes(collector, large):
    assert collector.collect_async(large.sum()).result(30).item() == 4_499_998_500_000
    assert collector.stats()["workers"] == 1


@pytest.fixture
def sent(collector, monkeypatch):
    """The queries that went to a worker process."""
    sent = []
    run = collector._cpu.executor.run

    def note(work, query):
        sent.append(query.label)
        return run(work, query)

    monkeypatch.setattr(collector._cpu.executor, "run", note)
    return sent


def test_one_that_turned_out_to_be_tiny_runs_here_from_then_on(collector, large, sent):
    first = large.head(1)  # of a large file, as far as anybody knows
    assert collector.collect_async(first).result(30).height == 1
    assert len(sent) == 1

    def runs_here():
        before = len(sent)
        collector.collect_async(first).result(30)
        return len(sent) == before

    until(runs_here)  # on a busy machine it may take a few more


def tell_pid(*_):
    return os.getpid()


def series_of_pid(values):
    return values * 0 + os.getpid()


def rows_of_pid(*_):
    yield pl.DataFrame({"a": [os.getpid()]})


def pid_column(_columns):
    return pl.Series([os.getpid()])


LARGE_FRAME = pl.select(a=pl.int_range(0, 200_000)).lazy()
ONE = pl.LazyFrame({"a": [1]})
A = pl.col("a")
INT = pl.Int64

WITH_PYTHON = {
    "map_batches of frames": PID,
    "map_batches": ONE.select(A.map_batches(series_of_pid, return_dtype=INT)),
    "map_batches without a type": ONE.select(A.map_batches(series_of_pid)),
    "map_elements": ONE.select(A.map_elements(tell_pid, return_dtype=INT)),
    "lambda": ONE.with_columns(A.map_elements(lambda _: os.getpid(), return_dtype=INT)),
    "map_groups": ONE.group_by("a").map_groups(lambda f: f * 0 + os.getpid(), schema={"a": INT}),
    "polars.map_batches": ONE.select(pl.map_batches(["a"], pid_column, return_dtype=INT)),
    "rolling_map": ONE.select(A.rolling_map(tell_pid, 1).cast(INT)),
    "fold": ONE.select(pl.fold(0, lambda _, a: a * 0 + os.getpid(), [A], return_dtype=INT)),
    "source": register_io_source(rows_of_pid, schema={"a": INT}),
    "after a filter": ONE.filter(A > 0).select(A.map_batches(series_of_pid)),
    "after a join": ONE.join(ONE, on="a").select(A.map_batches(series_of_pid)),
    "over a large frame": LARGE_FRAME.tail(1).select(A.map_batches(series_of_pid)),
    "over a large frame, typed": LARGE_FRAME.tail(1).with_columns(
        A.map_elements(tell_pid, return_dtype=INT)
    ),
    "frames over a large frame": LARGE_FRAME.tail(1).map_batches(series_of_pid),
    "pickled": pickle.loads(pickle.dumps(ONE.select(A.map_elements(tell_pid, return_dtype=INT)))),
    "after a join of a frame of some kB": pl.select(a=pl.int_range(0, 50_000))
    .lazy()
    .join(ONE, on="a")
    .select(A.map_batches(series_of_pid)),
}


@pytest.mark.parametrize("query", WITH_PYTHON.values(), ids=WITH_PYTHON)
@pytest.mark.parametrize("priority", [0, 1])
def test_python_functions_run_in_processes(collector, query, priority):
    for _ in range(3):  # however quick it was
        found = collector.collect_async(query, priority=priority).result(30)
        assert found.to_series().item() != os.getpid()


def test_schema_that_a_python_function_tells_is_found_in_a_process(collector, tmp_path):
    told = tmp_path / "told"

    def note(values):
        told.write_text(str(os.getpid()))
        return values

    query = pl.LazyFrame({"a": [1]}).select(pl.col("a").map_batches(note))
    assert collector.collect_schema_async(query).result(30) == {"a": pl.Int64}
    assert int(told.read_text()) != os.getpid()


@pytest.fixture
def said(caplog, monkeypatch):
    """What was said of queries that stay in this process."""
    monkeypatch.setattr(staying, "_logged", set())
    caplog.set_level(logging.INFO, logger="polars_async")
    return lambda: [r.getMessage() for r in caplog.records if "in this process" in r.getMessage()]


@pytest.mark.parametrize("target", [io.BytesIO, lambda: open(os.devnull, "wb")])  # noqa: SIM115, PTH123
def test_what_cannot_be_sent_runs_here(collector, sent, said, target):
    for _ in range(3):
        with target() as file:
            sink = pl.LazyFrame({"a": [1]}).sink_csv(file, lazy=True)
            assert collector.sink_async(sink).result(30) is None
    assert sent == []
    assert len(said()) == 1


def test_open_file_is_read_here(collector, said, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a\n1\n")
    for _ in range(3):
        with path.open("rb") as file:
            assert collector.collect_async(pl.scan_csv(file)).result(30).item() == 1
    assert len(said()) == 1


def _with_lock(lock):
    def function(values):
        with lock:
            return values * 0 + os.getpid()

    return function


def _with_file(file):
    return lambda values: values * 0 + os.getpid() + len(file.name) - len(os.devnull)


def test_functions_that_cannot_be_sent_run_here_each_time_and_it_is_said_once(collector, said):
    with open(os.devnull, "wb") as file:  # noqa: PTH123  # whose name is a text
        for function in (_with_lock(threading.Lock()), _with_file(file)):
            for _ in range(3):
                for query in (
                    ONE.select(A.map_batches(function, return_dtype=INT)),
                    ONE.map_batches(function),
                ):
                    assert collector.collect_async(query).result(30).item() == os.getpid()
    assert ["'lock'" in each for each in said()] == [True, False]
    assert "the variable 'file' of the function '_with_file.<locals>.<lambda>'" in said()[1]


def test_function_of_a_script_that_cannot_be_sent_runs_here(collector, said, main):
    names = main(
        """
import os, threading
lock = threading.Lock()
def locked(values):
    with lock:
        return values * 0 + os.getpid()
"""
    )
    for _ in range(3):
        for query in (
            ONE.map_batches(names["locked"]),
            ONE.select(A.map_batches(names["locked"], return_dtype=INT)),
        ):
            assert collector.collect_async(query).result(30).item() == os.getpid()
    assert len(said()) == 1


def test_function_that_cannot_be_sent_runs_here_though_the_gpu_is_elsewhere(said):
    options = {"executor": "auto", "engine": "gpu", "gpu": "offload"}
    with simulate_gpu(), pa.Collector(**options) as collector:
        query = ONE.select(A.map_batches(_with_lock(threading.Lock()), return_dtype=INT))
        for _ in range(2):
            handle = collector.collect_async(query)
            assert handle.result(30).item() == os.getpid()
            assert handle.resolution.fell_back
    assert "the variable 'lock' of the function" in handle.resolution.message
    assert len(said()) == 1


def test_small_join_of_frames_of_some_hundred_kilobytes_runs_here(collector, sent):
    frames = [pl.DataFrame({"a": range(60_000)}).lazy() for _ in range(2)]
    joined = frames[0].join(frames[1], on="a").select(pl.len())
    assert collector.collect_async(joined).result(30).item() == 60_000
    assert sent == []


def test_frames_that_would_take_longer_to_be_sent_stay_here_unless_they_are_shared(collector):
    frame = pl.select(a=pl.int_range(0, 3_000_000))
    assert collector.collect_async(frame.lazy().sum()).result(30).item() == 4_499_998_500_000
    assert collector.stats()["workers"] == 0
    shared = pa.share(frame).sum()
    assert collector.collect_async(shared).result(30).item() == 4_499_998_500_000
    assert collector.stats()["workers"] == 1


def test_frames_are_sent_where_their_query_takes_longer_than_that(collector):
    frame = pl.select(a=pl.int_range(0, 200_000))
    query = frame.lazy().map_batches(lambda frame: frame.select(a=pl.lit(os.getpid(), pl.Int64)))
    assert collector.collect_async(query).result(30).item() != os.getpid()


@pytest.mark.parametrize("priority", [-1, 1])
def test_priority_is_a_hint_for_the_order_and_none_for_the_executor(
    collector, large, sent, priority
):
    collector.collect_async(TINY, priority=priority, label="tiny").result(30)
    collector.collect_async(large.sum(), priority=priority, label="large").result(30)
    assert sent == ["large"]


@pytest.mark.usefixtures("no_run_is_slow")
def test_all_of_a_collectors_ways_take_the_same_decision(collector, large):
    assert [f.item() for f in collector.collect_all_async([TINY, TINY]).result(30)] == [6, 6]
    assert collector.collect_background(TINY).fetch_blocking().item() == 6
    assert collector.stats()["workers"] == 0
    found = collector.collect_all_async([TINY, large.sum()]).result(30)
    assert found[1].item() == 4_499_998_500_000
    assert collector.stats()["workers"] == 1
