"""What writes files or looks at them: sinks, schemas; and queries in the background."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError

import polars as pl
import pytest
from loops import Asyncio, Trio, fixture_of
from places import TINY, Gate, Notes
from polars.io.plugins import register_io_source

import polars_async as pa
from polars_async import Collector, QueryTimeoutError

NUMBERS = pl.LazyFrame({"a": range(1000), "b": [f"row {i}" for i in range(1000)]})


def write(name, lf, path, **options):
    return getattr(lf, f"sink_{name}")(path, lazy=True, **options)


FORMATS = {
    "parquet": (pl.read_parquet, {"compression": "snappy", "row_group_size": 100}),
    "ipc": (pl.read_ipc, {"compression": "zstd"}),
    "csv": (pl.read_csv, {"separator": ",", "line_terminator": "\r\n"}),
    "ndjson": (pl.read_ndjson, {}),
}


loop = fixture_of(Asyncio, Trio)


# sink_async


@pytest.mark.everywhere(name="parquet", engine=None)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("engine", [None, "in-memory", "streaming"])
def test_sink_writes_all_and_gives_none(loop, collector, tmp_path, name, engine):
    read, options = FORMATS[name]
    path = tmp_path / "file"

    async def main():
        return await collector.sink_async(write(name, NUMBERS, path, **options), engine=engine)

    assert loop.run(main) is None
    assert read(path).equals(NUMBERS.collect())


def test_options_of_the_sink_and_the_query_pass(collector, tmp_path):
    path = tmp_path / "file.csv"
    sink = NUMBERS.head(2).sink_csv(path, separator=";", include_header=False, lazy=True)
    handle = collector.sink_async(sink, label="the sink", priority=3, timeout=30)
    assert handle.label == "the sink"
    assert handle._query.priority == 3
    handle.result()
    assert path.read_text() == "0;row 0\n1;row 1\n"


def test_directories_are_made_where_the_sink_is_told_to(collector, tmp_path):
    path = tmp_path / "new" / "file.parquet"
    collector.sink_async(NUMBERS.sink_parquet(path, mkdir=True, lazy=True)).result()
    assert pl.read_parquet(path).height == 1000


def test_sinks_run_on_the_streaming_engine_where_no_other_is_asked_for(tmp_path, executor):
    events = []
    sink = NUMBERS.sink_parquet(tmp_path / "file.parquet", lazy=True)
    with Collector(executor=executor, on_event=events.append) as collector:
        plain = collector.sink_async(sink)
        assert plain.resolution.name == "streaming"
        plain.result()
        asked = collector.sink_async(sink, engine="in-memory")
        assert asked.resolution.name == "in-memory"
        asked.result()
    assert [event.engine for event in events] == ["streaming"] * 3 + ["in-memory"] * 3
    assert {event.rows for event in events} == {None}
    with Collector(executor=executor, engine="in-memory") as collector:
        assert collector.sink_async(sink).resolution.name == "in-memory"


@pytest.mark.everywhere(engine="in-memory")
@pytest.mark.parametrize("engine", [None, "in-memory", "streaming"])
def test_sinks_of_one_source_are_written_by_one_query(loop, collector, tmp_path, engine):
    reads = Notes()
    source = NUMBERS.map_batches(lambda df: (reads.append(1), df)[1])
    paths = {name: tmp_path / f"file.{name}" for name in FORMATS}

    async def main():
        sinks = [write(name, source, path) for name, path in paths.items()]
        return await collector.collect_all_async(sinks, engine=engine)

    assert [frame.shape for frame in loop.run(main)] == [(0, 0)] * 4
    for name, path in paths.items():
        assert FORMATS[name][0](path).equals(NUMBERS.collect())
    assert collector.stats()["completed"] == 1
    if engine == "streaming":  # the in-memory engine of Polars reads once for each sink
        assert len(reads) == 1


def test_forgotten_lazy_is_named_as_the_cause(collector, tmp_path):
    path = tmp_path / "file.parquet"
    with pytest.raises(TypeError, match=r"has run already, on this thread, .* not given lazy=True"):
        collector.sink_async(NUMBERS.sink_parquet(path))
    assert pl.read_parquet(path).height == 1000
    for wrong in (TINY.collect(), 5):
        with pytest.raises(TypeError, match="lf must be a LazyFrame"):
            collector.sink_async(wrong)
    assert collector.stats()["submitted"] == 0


@pytest.mark.everywhere
def test_path_that_cannot_be_written_is_an_error(loop, collector, tmp_path):
    async def main():
        await collector.sink_async(NUMBERS.sink_csv(tmp_path / "no" / "file.csv", lazy=True))

    with pytest.raises(FileNotFoundError):
        loop.run(main)
    assert collector.stats()["failed"] == 1


def test_sink_that_waits_and_is_cancelled_writes_nothing(collector, blocked, tmp_path):
    path = tmp_path / "file.csv"
    collector.collect_async(blocked.lf)
    handle = collector.sink_async(NUMBERS.sink_csv(path, lazy=True))
    late = collector.sink_async(NUMBERS.sink_csv(path, lazy=True), timeout=0.01)
    assert handle.cancel()
    with pytest.raises(CancelledError):
        handle.result()
    with pytest.raises(QueryTimeoutError, match="never ran"):
        late.result()
    blocked.gate.set()
    collector.close(cancel_waiting=False)
    assert list(tmp_path.iterdir()) == []


def test_loop_ticks_while_a_sink_runs(collector, blocked, tmp_path):
    async def main():
        handle = collector.sink_async(blocked.lf.sink_csv(tmp_path / "file.csv", lazy=True))
        ticks = 0
        while ticks < 100 or not blocked.started.is_set():
            await asyncio.sleep(0.001)
            ticks += 1
        assert not handle.done()
        blocked.gate.set()
        await handle

    asyncio.run(main())


@pytest.fixture
def affinity(collector):
    """Polars' own methods run on the collector."""
    with pl.Config():
        pl.Config.set_engine_affinity(pa.AsyncEngine(collector))
        yield


@pytest.mark.everywhere(name="parquet")
@pytest.mark.usefixtures("affinity")
@pytest.mark.parametrize("name", FORMATS)
def test_sinks_run_with_the_async_engine_as_affinity(collector, tmp_path, name):
    path = tmp_path / "file"
    handle = collector.sink_async(write(name, NUMBERS, path))
    handle.result()
    assert handle.resolution.name == "streaming"
    assert FORMATS[name][0](path).equals(NUMBERS.collect())


@pytest.mark.everywhere
@pytest.mark.usefixtures("affinity")
def test_batches_come_with_the_async_engine_as_affinity(loop, collector):
    async def main():
        stream = collector.collect_batches_async(NUMBERS, chunk_size=100)
        assert stream.resolution.name == "streaming"
        return pl.concat([batch async for batch in stream])

    assert loop.run(main).equals(NUMBERS.collect())


@pytest.mark.usefixtures("affinity")
def test_lazy_sinks_of_polars_own_methods_run_on_the_collector(loop, collector, tmp_path):
    paths = [tmp_path / "file.parquet", tmp_path / "other.parquet"]

    async def main():
        sinks = [NUMBERS.sink_parquet(path, lazy=True) for path in paths]
        await pl.collect_all_async(sinks)

    loop.run(main)
    assert [pl.read_parquet(path).height for path in paths] == [1000] * 2
    assert collector.stats()["completed"] == 1


# collect_schema_async


@pytest.mark.everywhere
def test_schema_of_files_is_found(loop, collector, tmp_path):
    NUMBERS.sink_parquet(tmp_path / "file.parquet")

    async def main():
        lf = pl.scan_parquet(tmp_path / "*.parquet").with_columns(c=pl.col("a") / 2)
        handle = collector.collect_schema_async(lf, label="the schema", timeout=30)
        assert handle.label == "the schema"
        return await handle

    schema = loop.run(main)
    assert isinstance(schema, pl.Schema)
    assert schema == {"a": pl.Int64, "b": pl.String, "c": pl.Float64}


@pytest.mark.everywhere
def test_schema_of_a_broken_plan_is_an_error(loop, collector, tmp_path):
    for lf, error in (
        (TINY.select("missing"), pl.exceptions.ColumnNotFoundError),
        (pl.scan_parquet(tmp_path / "missing.parquet"), FileNotFoundError),
    ):

        async def main(lf=lf):
            await collector.collect_schema_async(lf)

        with pytest.raises(error):
            loop.run(main)
    with pytest.raises(TypeError, match="lf must be a LazyFrame"):
        collector.collect_schema_async(TINY.collect())


def test_loop_ticks_while_a_schema_is_looked_for(collector):
    asked, gate = Gate(), Gate()

    def schema():
        asked.set()
        gate.wait()
        return pl.Schema({"a": pl.Int64})

    def read(with_columns, predicate, n_rows, batch_size):  # noqa: ARG001
        yield pl.DataFrame({"a": [1]})

    async def main():
        handle = collector.collect_schema_async(register_io_source(read, schema=schema))
        ticks = 0
        while ticks < 100 or not asked.is_set():
            await asyncio.sleep(0.001)
            ticks += 1
        assert not handle.done()
        gate.set()
        return await handle

    try:
        assert asyncio.run(main()) == {"a": pl.Int64}
    finally:
        gate.set()


def test_schema_counts_as_small(executor):
    gates = []
    handles = []
    with Collector(executor=executor, max_running=2) as collector:
        try:
            for _ in range(3):
                gates.append(Gate())
                wait = gates[-1].wait
                lf = TINY.map_batches(lambda df, wait=wait: (wait(), df)[1])
                handles.append(collector.collect_async(lf, priority=-1))
            # One slot is kept for it, though others came first.
            assert collector.collect_schema_async(TINY).result(30) == {"a": pl.Int64}
            assert not any(handle.done() for handle in handles)
        finally:
            for gate in gates:
                gate.set()


# The background


def test_background_query_gives_none_until_it_is_done(collector, blocked):
    query = collector.collect_background(
        blocked.lf, engine="streaming", label="back", priority=2, timeout=30
    )
    assert blocked.started.wait(30)
    assert query.fetch() is None
    blocked.gate.set()
    assert query.fetch_blocking().item() == 1
    assert query.fetch().item() == 1
    assert query._handle.resolution.name == "streaming"
    assert query._handle.label == "back"


def test_background_queries_come_as_a_list(collector, blocked):
    frames = [blocked.lf, *[pl.LazyFrame({"a": [i]}) for i in range(5)]]
    query = collector.collect_all_background(iter(frames), label="all")
    assert blocked.started.wait(30)
    assert query.fetch() is None
    blocked.gate.set()
    for found in (query.fetch_blocking(), query.fetch()):
        assert [frame.item() for frame in found] == [1, 0, 1, 2, 3, 4]
    assert query._handle.label == "all"


@pytest.mark.parametrize("together", [False, True])
def test_cancelled_background_query_never_runs(collector, blocked, together):
    ran = Notes()
    collector.collect_async(blocked.lf)
    lf = TINY.map_batches(lambda df: (ran.append(1), df)[1])
    ask = collector.collect_all_background if together else collector.collect_background
    query = ask([lf] if together else lf)
    assert query.fetch() is None
    query.cancel()
    for fetch in (query.fetch, query.fetch_blocking):
        with pytest.raises(CancelledError):
            fetch()
    blocked.gate.set()
    collector.close(cancel_waiting=False)
    assert not ran


@pytest.mark.everywhere
def test_background_query_raises_what_the_query_raised(collector):
    def fail(df):  # noqa: ARG001
        raise LookupError("no")

    for query in (
        collector.collect_background(TINY.map_batches(fail)),
        collector.collect_all_background([TINY, TINY.map_batches(fail)]),
    ):
        for fetch in (query.fetch_blocking, query.fetch):
            with pytest.raises(LookupError, match="no"):
                fetch()


def test_background_query_out_of_time(collector, blocked):
    collector.collect_async(blocked.lf)
    query = collector.collect_all_background([TINY], timeout=0.01)
    with pytest.raises(QueryTimeoutError, match="never ran"):
        query.fetch_blocking()
    with pytest.raises(TypeError, match=r"lazy_frames\[0\]"):
        collector.collect_all_background([5])
