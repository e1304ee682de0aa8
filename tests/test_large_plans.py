"""A query that takes large frames along to another process says so, where it is asked for."""

from __future__ import annotations

import asyncio
import inspect
import re
import sys
import warnings
from contextlib import contextmanager

import polars as pl
import pytest
from polars.exceptions import PerformanceWarning

import polars_async as pa
from polars_async.executors import large_plans

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux"),
    pytest.mark.usefixtures("warm_workers"),
]

LARGE = pl.select(a=pl.int_range(20_000)).lazy()
LARGER = pl.select(a=pl.int_range(40_000)).lazy()
SMALL = pl.LazyFrame({"a": [1]})
WITH_FUNCTION = pl.concat([SMALL.map_batches(lambda frame: frame), LARGE])


@pytest.fixture(autouse=True)
def _large_is_less(monkeypatch):
    """Take less for large: Polars packs some 100 MB in a second."""
    monkeypatch.setattr(large_plans, "_LARGE", 100_000)
    monkeypatch.setattr("polars_async._runtime.callers._texts", {})


@pytest.fixture(params=["processes", "auto", "dask"])
def collector(request):
    place = request.param
    executor = request.getfixturevalue("_dask") if place == "dask" else place
    with pa.Collector(executor=executor) as collector:
        yield collector


@contextmanager
def said(action="default"):
    """Give the warnings, as they come."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter(action)
        yield found


def line():
    return inspect.currentframe().f_back.f_lineno


def collect(collector, lf):
    return collector.collect_async(lf).result(30), line()


def collect_all(collector, lf):
    return collector.collect_all_async([SMALL, lf]).result(30), line()


def collect_in_background(collector, lf):
    return collector.collect_background(lf).fetch_blocking(), line()


def as_completed(collector, lf):
    async def main():
        found = collector.as_completed([lf]), line()
        return [each async for each in found[0]], found[1]

    return asyncio.run(main())


def collect_batches(collector, lf):
    async def main():
        found = collector.collect_batches_async(lf), line()
        return [each async for each in found[0]], found[1]

    return asyncio.run(main())


def sink(collector, lf):
    return collector.sink_async(lf.sink_csv("/dev/null", lazy=True)).result(30), line()


def find_schema(collector, lf):
    return collector.collect_schema_async(lf).result(30), line()


def by_polars(collector, lf):
    async def main():
        return await lf.collect_async(engine=pa.AsyncEngine(collector)), line()

    return asyncio.run(main())


WAYS = [
    *(collect, collect_all, collect_in_background, as_completed),
    *(collect_batches, sink, find_schema, by_polars),
]


@pytest.mark.parametrize("way", WAYS)
def test_large_plan_that_is_sent_is_said_at_the_line_that_asks(collector, way):
    with said() as found:
        _, asked_at = way(collector, WITH_FUNCTION)
        way(collector, SMALL)
    (warning,) = found
    assert (warning.filename, warning.lineno) == (__file__, asked_at)
    assert warning.category is PerformanceWarning
    size = re.search(r"takes ([\d,]+) bytes", str(warning.message))[1].replace(",", "")
    assert int(size) > 8 * 20_000
    assert "polars_async.share(" in str(warning.message)


def test_large_plans_are_said_once_for_each_line():
    with pa.Collector(executor="processes", max_running=1) as collector, said() as found:
        for lf in (LARGE, LARGER, LARGE):
            collector.collect_async(lf, label=str(lf is LARGE)).result(30)
        assert len(found) == 1
        collector.collect_async(LARGE).result(30)
        assert len(found) == 2


@pytest.mark.parametrize("executor", ["threads", "processes", "auto"])
def test_what_is_not_sent_is_not_said(executor):
    shared = pa.share(LARGER.collect())
    with pa.Collector(executor=executor) as collector, said("always") as found:
        for lf in (SMALL, shared, shared.map_batches(lambda frame: frame)):
            collector.collect_async(lf).result(30)
        if executor != "processes":
            collector.collect_async(LARGE).result(30)
    assert not found


def test_large_plan_fails_where_warnings_are_errors():
    with pa.Collector(executor="processes", max_running=1) as collector:
        with said("error"), pytest.raises(PerformanceWarning, match=r"polars_async\.share"):
            collector.collect_async(LARGE).result(30)
        assert collector.collect_async(SMALL).result(30).item() == 1
        with said() as found:
            assert collector.collect_async(LARGE).result(30).height == 20_000
        assert len(found) == 1


def test_frames_of_some_megabytes_are_sent_in_silence(monkeypatch):
    monkeypatch.undo()
    with pa.Collector(executor="processes", max_running=1) as collector, said("always") as found:
        collector.collect_async(LARGER).result(30)
    assert not found


def test_large_plan_is_said_to_greenlets_though_all_is_patched(run_script):
    script = """
from gevent import monkey
monkey.patch_all()
import logging, sys
import polars as pl, polars_async as pa
logging.basicConfig(stream=sys.stdout, format="%(message)s")
logging.captureWarnings(True)
from polars_async.executors import large_plans
large_plans._LARGE = 100_000
lf = pl.select(a=pl.int_range(20_000)).lazy()
with pa.Collector(executor="processes", max_running=1) as collector:
    print(collector.collect_async(lf, gevent=True).get(timeout=30).height)
"""
    words = run_script(script)
    assert "PerformanceWarning:" in words
    assert "20000" in words
