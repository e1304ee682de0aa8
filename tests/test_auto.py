from __future__ import annotations

import os
import sys

import polars as pl
import pytest
from places import until

import polars_async as pa

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux")

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


def pid(collector, **options):
    return collector.collect_async(PID, **options).result(30).item()


def test_tiny_queries_run_here(collector):
    handles = [collector.collect_async(TINY) for _ in range(20)]
    assert {handle.result(30).item() for handle in handles} == {6}
    assert collector.collect_schema_async(TINY).result(30) == {"a": pl.Int64}
    assert collector.stats()["workers"] == 0


def test_large_ones_run_in_processes(collector, large):
    assert collector.collect_async(large.sum()).result(30).item() == 4_499_998_500_000
    assert collector.stats()["workers"] == 1


def test_one_of_which_nothing_is_known_is_no_tiny_one(collector):
    assert pid(collector) != os.getpid()


def test_one_that_turned_out_to_be_tiny_runs_here_from_then_on(collector):
    assert pid(collector) != os.getpid()
    until(lambda: pid(collector) == os.getpid())  # on a busy machine it may take a few more


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


def test_priority_tells_what_nothing_else_does(collector):
    assert pid(collector, priority=1) == os.getpid()
    assert pid(collector, priority=-1) != os.getpid()


def test_all_of_a_collectors_ways_take_the_same_decision(collector, large):
    assert [f.item() for f in collector.collect_all_async([TINY, TINY]).result(30)] == [6, 6]
    assert collector.collect_background(TINY).fetch_blocking().item() == 6
    assert collector.stats()["workers"] == 0
    found = collector.collect_all_async([TINY, large.sum()]).result(30)
    assert found[1].item() == 4_499_998_500_000
    assert collector.stats()["workers"] == 1
