"""What a query finds in a shared frame is what it would find in the frame itself."""

from __future__ import annotations

import asyncio
import sys

import polars as pl
import pytest

import polars_async as pa

pytestmark = [
    pytest.mark.everywhere,
    pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux"),
]

FRAME = pl.DataFrame({"a": [1, 2, 3], "b": ["x", "y", "z"]})
FRAMES = {
    "one chunk": FRAME,
    "two chunks": pl.concat([FRAME, FRAME], rechunk=False),
    "no rows": FRAME.clear(),
    "no columns": pl.DataFrame(height=3),
}
WITHOUT_COLUMNS = {
    "row index": lambda lf: lf.with_row_index().select("index"),
    "numbers": lambda lf: lf.select(pl.int_range(pl.len())),
    "head": lambda lf: lf.head(2).with_row_index().select("index"),
    "filter of nothing": lambda lf: lf.filter(pl.lit(1) > 0).with_row_index().select("index"),
    "cross join": lambda lf: lf.join(pl.LazyFrame({"c": [1, 2]}), how="cross").select("c"),
    "literal": lambda lf: lf.with_columns(pl.lit(7).alias("c")).select("c"),
    "number of rows": lambda lf: lf.select(pl.len()),
    "no column": lambda lf: lf.select(),
}


@pytest.fixture
def collector(executor):
    with pa.Collector(executor=executor) as collector:
        yield collector


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_query_that_needs_no_column_still_finds_all_rows(collector, frame, engine):
    shared = pa.share(frame)
    for name, query in WITHOUT_COLUMNS.items():
        found = collector.collect_async(query(shared), engine=engine).result(30)
        expected = query(frame.lazy()).collect(engine=engine)
        assert (found.shape, found.equals(expected)) == (expected.shape, True), name


def test_rows_without_columns_come_in_batches(collector):
    async def main():
        numbers = pa.share(FRAME).with_row_index().select("index")
        batches = collector.collect_batches_async(numbers, chunk_size=2)
        return [row async for batch in batches for row in batch["index"]]

    assert asyncio.run(main()) == [0, 1, 2]


def test_frame_whose_file_other_processes_cannot_open_is_shared_all_the_same(
    collector, monkeypatch
):
    monkeypatch.setattr("polars_async.executors.shared_frames.is_open_to_others", lambda _: False)
    shared = pa.share(FRAME)
    assert collector.collect_async(shared).result(30).equals(FRAME)
    frames = [shared, *(pa.share(pl.DataFrame({"a": [n]})) for n in range(70))]
    found = collector.collect_all_async(frames).result(30)
    assert [frame["a"][-1] for frame in found] == [3, *range(70)]
