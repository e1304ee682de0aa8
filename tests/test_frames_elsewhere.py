"""What Polars knows of a frame besides its values is known of it in other processes, too."""

from __future__ import annotations

import asyncio
import sys
import warnings

import polars as pl
import pytest
from places import TINY

import polars_async as pa

pytestmark = [
    pytest.mark.everywhere,
    pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux"),
]

LARGE = 100_000
"""Rows of a frame that goes in a file, and is mapped."""


def sorted_frame(rows):
    up = pl.int_range(rows)
    return pl.select(
        up=up.set_sorted(),
        down=(-up).set_sorted(descending=True),
        plain=up.shuffle(1),
        after_nulls=pl.when(up > 2).then(up).set_sorted(),
        text=up.cast(pl.String).sort(),
        category=(up % 3).cast(pl.String).cast(pl.Categorical).sort(),
    )


@pytest.fixture
def collector(executor):
    with pa.Collector(executor=executor) as collector:
        yield collector


@pytest.mark.parametrize("rows", [1, 3, LARGE])
def test_sorted_columns_are_known_as_such(collector, rows):
    frame = sorted_frame(rows)
    found = collector.collect_async(frame.lazy()).result(30)
    assert found.flags == frame.flags
    assert found.equals(frame)
    several = collector.collect_all_async([frame.lazy(), TINY]).result(30)
    assert several[0].flags == frame.flags


def test_sorted_columns_of_batches_are_known_as_such(collector):
    async def main():
        lf = sorted_frame(LARGE).lazy().select("up", "plain")
        batches = collector.collect_batches_async(lf, chunk_size=60_000)
        return [batch.flags async for batch in batches]

    for flags in asyncio.run(main()):
        assert flags["up"]["SORTED_ASC"]
        assert not flags["plain"]["SORTED_ASC"]


@pytest.mark.parametrize("rows", [3, LARGE])
def test_sorted_columns_of_a_shared_frame_are_known_as_such(collector, rows):
    frame = sorted_frame(rows)
    found = collector.collect_async(pa.share(frame)).result(30)
    assert found.flags == frame.flags
    found = collector.collect_async(pa.share(frame).select("down", "plain")).result(30)
    assert found.flags == frame.select("down", "plain").flags


def extended(name, metadata=None, rows=3):
    """Give a frame with an extension type, also within other types."""
    kind = pl.Extension(name, pl.Int64, metadata)
    frame = pl.select(a=pl.int_range(rows), b=pl.int_range(rows).shift())
    frame = frame.with_columns(frame["a"].ext.to(kind), frame["b"].ext.to(kind))
    return frame.with_columns(pl.concat_list("b").alias("list"), pl.struct("a").alias("struct"))


class Money(pl.BaseExtension):
    def __init__(self):
        super().__init__("of.the.test.money", pl.Int64)


@pytest.fixture
def money():
    pl.register_extension_type("of.the.test.money", Money)
    yield
    pl.unregister_extension_type("of.the.test.money")


@pytest.mark.parametrize("rows", [3, LARGE])
@pytest.mark.parametrize("name", ["of.the.test", "of.the.test." + 40 * "x"])
def test_extension_types_that_nobody_knows_are_kept(collector, name, rows):
    frame = extended(name, "and more", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = collector.collect_async(frame.lazy()).result(30)
        shared = collector.collect_async(pa.share(frame)).result(30)
    assert found.schema == shared.schema == frame.schema
    for each in (found, shared):
        assert each.select("a", "b").equals(frame.select("a", "b"))
        assert each.head().rows() == frame.head().rows()
    assert pl.get_extension_type(name) is None


@pytest.mark.usefixtures("money")
def test_extension_types_that_this_process_knows_are_kept(collector):
    frame = extended("of.the.test.money")
    found = collector.collect_async(frame.lazy()).result(30)
    assert type(found.schema["a"]) is Money
    assert found.equals(frame)
    storage = frame.lazy().select(pl.col("b").ext.storage() * 2)
    assert collector.collect_async(storage).result(30)["b"].to_list() == [None, 0, 2]


def test_extension_types_are_kept_though_many_threads_read_them_at_once(executor):
    frame = extended("of.the.test.many")
    with pa.Collector(executor=executor, max_running=4) as collector:
        handles = [collector.collect_async(frame.lazy()) for _ in range(60)]
        assert {str(each.result(60).schema["a"]) for each in handles} == {str(frame.schema["a"])}
