"""What Polars' own tests assert of batches and sinks holds through AsyncEngine, on 1.44 and on 2.x.

Each test states one such behaviour, written from what upstream asserts, not from its code. Every
one runs twice: with AsyncEngine as the ``engine=`` argument, and as the affinity of ``pl.Config``.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import threading
from typing import TYPE_CHECKING, NamedTuple

import polars as pl
import pytest
from polars.io.plugins import register_io_source
from polars.testing import assert_frame_equal

from polars_async import AsyncEngine

pytestmark = pytest.mark.smoke

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NATIVE = pl.InMemoryEngine()
FRAME = pl.DataFrame({"a": [5, 10, 1996], "t": ["x", "y", None]})
NUMBERS = pl.DataFrame({"n": range(113)})


class Format(NamedTuple):
    suffix: str
    sink: Callable
    scan: Callable

    def read(self, source, **options) -> pl.DataFrame:
        return self.scan(source, **options).collect(engine=NATIVE)


PARQUET = Format("parquet", pl.LazyFrame.sink_parquet, pl.scan_parquet)
IPC = Format("ipc", pl.LazyFrame.sink_ipc, pl.scan_ipc)
CSV = Format("csv", pl.LazyFrame.sink_csv, pl.scan_csv)
NDJSON = Format("jsonl", pl.LazyFrame.sink_ndjson, pl.scan_ndjson)

every_format = pytest.mark.parametrize(
    "fmt", [PARQUET, IPC, CSV, NDJSON], ids=lambda fmt: fmt.suffix
)


@pytest.fixture(params=["argument", "affinity"])
def asked(request) -> Iterator[dict]:
    """Select AsyncEngine: the keywords to pass, with an affinity that does not outlive the test."""
    with pl.Config():
        pl.Config.set_engine_affinity(None)
        engine = AsyncEngine()
        if request.param == "affinity":
            pl.Config.set_engine_affinity(engine)
            yield {}
        else:
            yield {"engine": engine}


def raising(error):
    def udf(_):
        raise error

    return udf


# sink_parquet, sink_ipc, sink_csv, sink_ndjson


@every_format
@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "Path"])
def test_sink_writes_the_answer_to_a_path(asked, tmp_path, fmt, as_path):
    path = tmp_path / f"out.{fmt.suffix}"

    assert fmt.sink(FRAME.lazy(), as_path(path), **asked) is None
    assert_frame_equal(fmt.read(path), FRAME)


@every_format
def test_sink_writes_to_memory(asked, fmt):
    target = io.BytesIO()

    fmt.sink(FRAME.lazy(), target, **asked)

    target.seek(0)
    assert_frame_equal(fmt.read(target), FRAME)


@every_format
def test_sink_writes_to_an_open_file(asked, tmp_path, fmt):
    with (tmp_path / "out").open("w+b") as target:
        fmt.sink(FRAME.lazy(), target, sync_on_close="all", **asked)

        target.seek(0)
        assert_frame_equal(fmt.read(target), FRAME)


@every_format
def test_sink_makes_folders_only_when_told_to(asked, tmp_path, fmt):
    path = tmp_path / "new" / "folder" / f"out.{fmt.suffix}"

    with pytest.raises(FileNotFoundError):
        fmt.sink(FRAME.lazy(), path, **asked)

    fmt.sink(FRAME.lazy(), path, mkdir=True, **asked)
    assert_frame_equal(fmt.read(path), FRAME)


@every_format
def test_sink_of_an_empty_answer_keeps_the_columns(asked, fmt):
    target = io.BytesIO()
    options = {"schema": FRAME.schema} if fmt in {CSV, NDJSON} else {}

    fmt.sink(FRAME.lazy().filter(pl.col("a") > 10_000), target, **asked)

    target.seek(0)
    assert_frame_equal(fmt.read(target, **options), FRAME.clear())


@every_format
def test_sink_keeps_the_order_of_many_parts(asked, tmp_path, fmt):
    path = tmp_path / f"out.{fmt.suffix}"

    fmt.sink(pl.concat([FRAME.lazy()] * 100), path, **asked)
    assert_frame_equal(fmt.read(path), pl.concat([FRAME] * 100))

    fmt.sink(pl.concat([FRAME.lazy()] * 100), path, maintain_order=False, **asked)
    assert fmt.read(path).height == 300


@every_format
def test_sink_applies_the_optimizations_of_the_caller(asked, fmt):
    predicates = []

    def read(_columns, predicate, _rows, _batch):
        predicates.append(predicate)
        yield FRAME if predicate is None else FRAME.filter(predicate)

    query = register_io_source(read, schema=FRAME.schema).filter(pl.col("a") > 5)
    fmt.sink(query, io.BytesIO(), **asked)
    fmt.sink(query, io.BytesIO(), optimizations=pl.QueryOptFlags(predicate_pushdown=False), **asked)

    assert [predicate is None for predicate in predicates] == [False, True]


@every_format
@pytest.mark.parametrize(
    ("query", "error"),
    [
        (FRAME.lazy().select("missing"), pl.exceptions.ColumnNotFoundError),
        (pl.scan_parquet("no-such-file.parquet"), FileNotFoundError),
        (FRAME.lazy().map_batches(raising(KeyError("key"))), KeyError),
    ],
)
def test_error_of_the_query_passes_through_the_sink(asked, fmt, query, error):
    with pytest.raises(error):
        fmt.sink(query, io.BytesIO(), **asked)


def test_csv_of_nested_data_is_a_compute_error(asked):
    with pytest.raises(pl.exceptions.ComputeError, match="CSV format does not support nested"):
        pl.LazyFrame({"list": [[1, 2]]}).sink_csv(io.BytesIO(), **asked)


@pytest.mark.parametrize("option", ["separator", "quote_char"])
@pytest.mark.parametrize("value", ["abc", ""])
def test_csv_option_must_be_one_byte(asked, option, value):
    with pytest.raises(ValueError, match="should be a single byte character, but is"):
        FRAME.lazy().sink_csv(io.BytesIO(), **{option: value}, **asked)


def test_csv_batch_size_must_not_be_zero(asked):
    with pytest.raises(ValueError, match="invalid zero value"):
        FRAME.lazy().sink_csv(io.BytesIO(), batch_size=0, **asked)


def test_every_csv_option_arrives(asked):
    target = io.BytesIO()

    pl.LazyFrame({"f": [1.25, None]}).select(
        "f", pl.date(2024, 2, 29).alias("d"), pl.time(13, 5).alias("t"), pl.lit("q").alias("s")
    ).sink_csv(
        target,
        include_bom=True,
        include_header=False,
        separator=";",
        line_terminator="|",
        quote_char="$",
        date_format="%d.%m.%y",
        time_format="%Hh",
        float_precision=1,
        null_value="NONE",
        quote_style="non_numeric",
        **asked,
    )

    assert target.getvalue().decode() == "\ufeff1.2;$29.02.24$;$13h$;$q$|NONE;$29.02.24$;$13h$;$q$|"


@pytest.mark.parametrize("fmt", [CSV, NDJSON], ids=lambda fmt: fmt.suffix)
@pytest.mark.parametrize(("compression", "magic"), [("gzip", "1f8b"), ("zstd", "28b52ffd")])
def test_text_sinks_compress(asked, fmt, compression, magic):
    target = io.BytesIO()

    fmt.sink(FRAME.lazy(), target, compression=compression, compression_level=1, **asked)

    assert target.getvalue().hex().startswith(magic)
    target.seek(0)
    assert_frame_equal(fmt.read(target), FRAME)


def test_file_suffix_that_contradicts_the_compression_is_refused(asked, tmp_path):
    with pytest.raises(pl.exceptions.InvalidOperationError):
        FRAME.lazy().sink_csv(tmp_path / "out.csv", compression="gzip", **asked)
    with pytest.raises(pl.exceptions.InvalidOperationError, match="use the compression parameter"):
        FRAME.lazy().sink_csv(tmp_path / "out.csv.gz", **asked)

    FRAME.lazy().sink_csv(tmp_path / "out.csv", compression="gzip", check_extension=False, **asked)
    assert (tmp_path / "out.csv").read_bytes()[:2] == b"\x1f\x8b"


@pytest.mark.parametrize(
    ("fmt", "option"),
    [
        (PARQUET, {"metadata": {"origin": "test"}}),
        (PARQUET, {"compression": "lz4"}),
        (PARQUET, {"compression": "gzip", "compression_level": 9}),
        (PARQUET, {"statistics": False}),
        (PARQUET, {"row_group_size": 10}),
        (PARQUET, {"data_page_size": 16}),
        (IPC, {"compression": "zstd"}),
        (IPC, {"record_batch_size": 10}),
        (IPC, {"compat_level": pl.CompatLevel.oldest()}),
        (CSV, {"compression": "gzip", "compression_level": 0}),
        (NDJSON, {"compression": "zstd", "compression_level": 19}),
    ],
    ids=lambda value: value.suffix if isinstance(value, Format) else "-".join(value),
)
def test_option_of_a_format_shapes_the_file_as_it_does_natively(asked, fmt, option):
    frame = NUMBERS.with_columns(text=pl.col("n").cast(pl.String))
    plain, native, ours = io.BytesIO(), io.BytesIO(), io.BytesIO()

    fmt.sink(frame.lazy(), plain, engine=NATIVE)
    fmt.sink(frame.lazy(), native, engine=NATIVE, **option)
    fmt.sink(frame.lazy(), ours, **option, **asked)

    assert native.getvalue() != plain.getvalue()
    assert ours.getvalue() == native.getvalue()


@pytest.mark.parametrize("fmt", [PARQUET, IPC], ids=lambda fmt: fmt.suffix)
def test_callback_is_told_the_written_paths(asked, tmp_path, fmt):
    told = []

    fmt.sink(FRAME.lazy(), tmp_path / "out", sinked_paths_callback=told.append, **asked)

    (written,) = told
    assert len(written.paths) == 1


@pytest.mark.skipif(
    "retries" not in inspect.signature(pl.LazyFrame.sink_csv).parameters,
    reason="Polars 2 has no retries parameter",
)
@every_format
def test_deprecated_retries_still_warn(asked, fmt):
    with pytest.warns(DeprecationWarning, match="`retries` parameter was deprecated"):
        fmt.sink(FRAME.lazy(), io.BytesIO(), retries=1, **asked)


# Partitioned targets


@every_format
@pytest.mark.parametrize(("height", "max_rows"), [(0, 2), (1, 2), (7, 3)])
def test_partitions_hold_at_most_the_rows_asked_for(asked, tmp_path, fmt, height, max_rows):
    numbers = NUMBERS.head(height)

    fmt.sink(
        numbers.lazy(),
        pl.PartitionBy(tmp_path, max_rows_per_file=max_rows),
        sync_on_close="data",
        **asked,
    )

    files = sorted(tmp_path.iterdir())
    if height:
        heights = [fmt.read(file).height for file in files]
        assert heights == [min(max_rows, height - i) for i in range(0, height, max_rows)]


@every_format
def test_partition_by_key_writes_a_file_for_each_key(asked, tmp_path, fmt):
    by_key = pl.PartitionBy(
        tmp_path,
        key="key",
        file_path_provider=lambda args: f"{args.partition_keys.item()}.{fmt.suffix}",
    )

    fmt.sink(pl.LazyFrame({"key": [0, 1, 2, 0, 1]}), by_key, sync_on_close="data", **asked)

    files = {file.stem: fmt.read(file)["key"].to_list() for file in tmp_path.iterdir()}
    assert files == {"0": [0, 0], "1": [1, 1], "2": [2]}


@every_format
def test_partitions_can_live_in_memory(asked, fmt):
    targets = {}

    def provide(args):
        return targets.setdefault(args.index_in_partition, io.BytesIO())

    fmt.sink(
        FRAME.lazy().select("a"),
        pl.PartitionBy("", file_path_provider=provide, max_rows_per_file=1),
        **asked,
    )

    for target in targets.values():
        target.seek(0)
    assert {index: fmt.read(target).item() for index, target in targets.items()} == {
        0: 5,
        1: 10,
        2: 1996,
    }


def test_partition_by_expressions_makes_hive_folders(asked, tmp_path):
    keys = [pl.col("a").alias("b"), (pl.col("a") + 42).alias("c")]

    pl.LazyFrame({"a": [1]}).sink_parquet(pl.PartitionBy(tmp_path, key=keys), **asked)

    assert PARQUET.read(tmp_path / "b=1" / "c=43").to_dicts() == [{"a": 1, "b": 1, "c": 43}]


def test_partition_key_must_be_elementwise(asked, tmp_path):
    with pytest.raises(pl.exceptions.InvalidOperationError, match="non-elementwise"):
        FRAME.lazy().sink_parquet(pl.PartitionBy(tmp_path, key=pl.col("a").sum()), **asked)


# Lazy sinks


def collect_all_asyncio(queries, **asked):
    async def main():
        return await pl.collect_all_async(queries, **asked)

    return asyncio.run(main())


def collect_each_asyncio(queries, **asked):
    async def main():
        return await asyncio.gather(*(query.collect_async(**asked) for query in queries))

    return asyncio.run(main())


LAZY_RUNS = {
    "collect": lambda queries, **asked: [query.collect(**asked) for query in queries],
    "background": lambda queries, **asked: [
        query.collect(background=True, **asked).fetch_blocking() for query in queries
    ],
    "collect_all": pl.collect_all,
    "collect_all_lazy": lambda queries, **asked: pl.collect_all(queries, lazy=True).collect(
        **asked
    ),
    "collect_async": collect_each_asyncio,
    "collect_all_async": collect_all_asyncio,
    "gevent": lambda queries, **asked: pl.collect_all_async(queries, gevent=True, **asked).get(),
}


@every_format
@pytest.mark.parametrize("way", LAZY_RUNS)
def test_lazy_sinks_write_when_they_are_collected(asked, tmp_path, fmt, way):
    paths = [tmp_path / "first", tmp_path / "second"]

    sinks = [fmt.sink(FRAME.lazy(), path, lazy=True, **asked) for path in paths]
    assert all(isinstance(sink, pl.LazyFrame) for sink in sinks)
    assert not any(path.exists() for path in paths)

    LAZY_RUNS[way](sinks, **asked)
    for path in paths:
        assert_frame_equal(fmt.read(path), FRAME)


def test_collected_sink_gives_a_frame_without_columns(asked):
    sink = FRAME.lazy().sink_csv(io.BytesIO(), lazy=True, **asked)

    written, frame = pl.collect_all([sink, FRAME.lazy()], **asked)

    assert written.shape == (0, 0)
    assert_frame_equal(frame, FRAME)


def test_lazy_collect_all_takes_only_sinks(asked):
    with pytest.raises(ValueError, match="all LazyFrames must end with a sink"):
        pl.collect_all([FRAME.lazy()], lazy=True, **asked)


@every_format
def test_sink_on_top_of_a_sink_is_refused(asked, fmt):
    with pytest.raises(pl.exceptions.InvalidOperationError, match="on top of another sink"):
        fmt.sink(fmt.sink(FRAME.lazy(), io.BytesIO(), lazy=True, **asked), io.BytesIO(), **asked)


# Sinks that call a function


def test_sink_batches_hands_over_every_row_in_order(asked):
    batches = []

    assert NUMBERS.lazy().sink_batches(batches.append, chunk_size=17, **asked) is None

    assert [batch.height for batch in batches] == [17] * 6 + [11]
    assert_frame_equal(pl.concat(batches), NUMBERS)


def test_sink_batches_stops_when_the_function_says_so(asked):
    batches = []

    def stop(batch):
        batches.append(batch)
        return True

    NUMBERS.lazy().sink_batches(stop, chunk_size=10, **asked)

    assert len(batches) == 1


def test_error_of_the_function_passes_through_sink_batches(asked):
    with pytest.raises(KeyError, match="key"):
        NUMBERS.lazy().sink_batches(raising(KeyError("key")), **asked)


def test_lazy_sink_batches_calls_when_it_is_collected(asked):
    batches = []

    query = NUMBERS.lazy().sink_batches(batches.append, lazy=True, **asked)
    assert batches == []

    query.collect(**asked)
    assert_frame_equal(pl.concat(batches), NUMBERS)


# Batches


@pytest.mark.parametrize(("height", "chunk_size"), [(113, 17), (10, 10), (10, 100)])
def test_batches_have_the_chunk_size_and_are_never_empty(asked, height, chunk_size):
    numbers = pl.DataFrame({"n": range(height)})

    batches = list(numbers.lazy().collect_batches(chunk_size=chunk_size, **asked))

    expected = [min(chunk_size, height - start) for start in range(0, height, chunk_size)]
    assert [batch.height for batch in batches] == expected
    assert_frame_equal(pl.concat(batches), numbers)


def test_batches_without_order_have_the_same_rows(asked):
    numbers = pl.DataFrame({"n": range(1000)})

    batches = numbers.lazy().collect_batches(maintain_order=False, chunk_size=17, **asked)

    assert_frame_equal(pl.concat(batches).sort("n"), numbers)


def test_batches_of_an_empty_answer_are_none(asked):
    batches = FRAME.lazy().filter(pl.col("a") > 10_000).collect_batches(**asked)

    assert list(batches) == []


def test_batches_are_an_iterator_that_stays_exhausted(asked):
    batches = FRAME.lazy().collect_batches(**asked)

    assert iter(batches) is batches
    assert_frame_equal(pl.concat(batches), FRAME)
    assert next(batches, None) is None


def test_batches_end_after_an_error(asked):
    batches = FRAME.lazy().map_batches(raising(ValueError("bad row"))).collect_batches(**asked)

    with pytest.raises(ValueError, match="bad row"):
        next(batches)
    assert next(batches, None) is None


def test_batches_start_at_once(asked):
    started = threading.Event()

    def udf(frame):
        started.set()
        return frame

    batches = FRAME.lazy().map_batches(udf).collect_batches(**asked)

    assert started.wait(30)
    assert_frame_equal(pl.concat(batches), FRAME)


def test_lazy_batches_start_with_the_first_request(asked):
    started = threading.Event()

    def udf(frame):
        started.set()
        return frame

    batches = FRAME.lazy().map_batches(udf).collect_batches(lazy=True, **asked)

    assert not started.wait(0.1)  # that nothing happens cannot be waited for otherwise
    assert_frame_equal(pl.concat(batches), FRAME)
    assert started.is_set()


@pytest.mark.parametrize("lazy", [False, True])
def test_batches_are_an_arrow_stream(asked, lazy):
    batches = FRAME.lazy().collect_batches(lazy=lazy, **asked)

    assert hasattr(batches, "__arrow_c_stream__")
    assert_frame_equal(pl.scan_arrow_c_stream(batches).collect(engine=NATIVE), FRAME)


def test_many_iterators_of_batches_advance_side_by_side(asked):
    numbers = pl.LazyFrame({"n": range(100)})
    iterators = [numbers.collect_batches(chunk_size=10, **asked) for _ in range(12)]

    rounds = list(zip(*iterators, strict=True))

    assert [pl.concat(row)["n"].n_unique() for row in rounds] == [10] * 10


def test_abandoned_batches_hold_nothing_up(asked):
    numbers = pl.LazyFrame({"n": range(1000)})

    for _ in range(12):
        assert next(numbers.collect_batches(chunk_size=10, **asked)).height == 10

    assert numbers.select(pl.len()).collect(**asked).item() == 1000
    assert sum(batch.height for batch in numbers.collect_batches(**asked)) == 1000
