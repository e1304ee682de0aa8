"""What Polars' own tests assert of running a query holds through AsyncEngine, on 1.44 and on 2.x.

Each test states one such behaviour, written from what upstream asserts, not from its code. Every
one runs twice: with AsyncEngine as the ``engine=`` argument, and as the affinity of ``pl.Config``.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import threading
import time
from concurrent.futures import CancelledError
from functools import partial
from typing import TYPE_CHECKING

import gevent
import polars as pl
import pytest
from gevent.event import AsyncResult
from polars.io.plugins import register_io_source
from polars.lazyframe.query_result import QueryResult
from polars.testing import assert_frame_equal

from polars_async import AsyncEngine

pytestmark = pytest.mark.smoke

if TYPE_CHECKING:
    from collections.abc import Iterator

NATIVE = pl.InMemoryEngine()
FRAME = pl.DataFrame({"a": ["x", "y", "x", "z"], "b": [1, 2, 3, 4], "c": [8.0, None, 2.5, 1.0]})
ONE_TEXT = pl.LazyFrame({"t": ["x"]})


def collect_batches(lf, **asked):
    return pl.concat([lf.collect_schema().to_frame(eager=True), *lf.collect_batches(**asked)])


def collect_asyncio(lf, **asked):
    async def main():
        return await asyncio.wait_for(lf.collect_async(**asked), timeout=20)

    return asyncio.run(main())


def collect_all_asyncio(queries, **asked):
    async def main():
        return await pl.collect_all_async(queries, **asked)

    return asyncio.run(main())


def collect_all_gevent(queries, **asked):
    return pl.collect_all_async(queries, gevent=True, **asked).get()


WAYS = {
    "collect": pl.LazyFrame.collect,
    "background": lambda lf, **asked: lf.collect(background=True, **asked).fetch_blocking(),
    "execute": lambda lf, **asked: lf.execute(**asked).lazy().collect(engine=NATIVE),
    "collect_all": lambda lf, **asked: pl.collect_all([lf], **asked)[0],
    "batches": collect_batches,
    "asyncio": collect_asyncio,
    "asyncio_all": lambda lf, **asked: collect_all_asyncio([lf], **asked)[0],
    "gevent": lambda lf, **asked: lf.collect_async(gevent=True, **asked).get(),
    "gevent_all": lambda lf, **asked: collect_all_gevent([lf], **asked)[0],
}


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


@pytest.fixture(params=WAYS)
def run(request, asked):
    """Run one query to its frame, in each way that Polars offers."""
    return partial(WAYS[request.param], **asked)


class Source:
    """A Python source that remembers each time it is read, and what was pushed down into it."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self.frame = frame
        self.predicates: list[pl.Expr | None] = []

    def read(self, with_columns, predicate, n_rows, _batch_size):
        self.predicates.append(predicate)
        frame = self.frame if predicate is None else self.frame.filter(predicate)
        frame = frame if with_columns is None else frame.select(with_columns)
        yield frame if n_rows is None else frame.head(n_rows)

    def scan(self) -> pl.LazyFrame:
        return register_io_source(self.read, schema=self.frame.schema, is_pure=True)


def raising(error):
    def udf(_):
        raise error

    return udf


def poll(fetch):
    """Ask without waiting, until there is a frame."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(gevent.Timeout):
            if (frame := fetch()) is not None:
                return frame
    raise AssertionError("no frame came")


@pytest.fixture
def gate():
    """Hold a query until the test opens it: a udf, and the event that lets it pass."""
    opened = threading.Event()

    def udf(frame):
        assert opened.wait(30)
        return frame

    yield udf, opened
    opened.set()


# Every way


def test_answer_is_the_native_one(run):
    query = (
        FRAME.lazy()
        .filter(pl.col("b") < 4)
        .group_by("a", maintain_order=True)
        .agg(pl.col("b").sum(), pl.col("c").mean().alias("mean"), pl.len())
    )

    assert_frame_equal(run(query), query.collect(engine=NATIVE))


def test_every_dtype_survives(run):
    query = pl.LazyFrame(
        {
            "int": pl.Series([1, None], dtype=pl.Int8),
            "float": pl.Series([1.5, None], dtype=pl.Float32),
            "text": ["ä", None],
            "binary": [b"\x00", None],
            "bool": [True, None],
            "null": [None, None],
            "date": [dt.date(2024, 2, 29), None],
            "time": [dt.time(23, 59), None],
            "zoned": pl.Series([0, None]).cast(pl.Datetime("ms", "UTC")),
            "duration": [dt.timedelta(seconds=-1), None],
            "decimal": pl.Series(["1.10", None]).cast(pl.Decimal(10, 2)),
            "list": [[1, 2], None],
            "array": pl.Series([[1, 2], None], dtype=pl.Array(pl.Int16, 2)),
            "struct": [{"x": 1, "y": None}, None],
            "enum": pl.Series(["u", None], dtype=pl.Enum(["u", "v"])),
            "category": pl.Series(["p", None], dtype=pl.Categorical),
        }
    )

    assert_frame_equal(run(query), query.collect(engine=NATIVE))


def test_empty_answer_keeps_its_schema(run):
    query = FRAME.lazy().filter(pl.col("b") > 100)

    frame = run(query)

    assert frame.height == 0
    assert frame.schema == FRAME.schema


def test_frame_without_columns_stays_without(run):
    assert run(pl.LazyFrame()).shape == (0, 0)


def test_same_plan_can_run_again(run):
    query = FRAME.lazy().sort("b", descending=True)

    assert_frame_equal(run(query), run(query))


def test_type_coercion_happens(run):
    query = pl.LazyFrame({"a": [1.0, 2.0]}).with_columns(pl.col("a").shift().fill_null(2))

    assert run(query)["a"].to_list() == [2.0, 1.0]


def test_default_optimizations_push_the_predicate_down(run):
    source = Source(FRAME)

    assert run(source.scan().filter(pl.col("b") > 2)).height == 2
    assert [predicate is not None for predicate in source.predicates] == [True]


@pytest.mark.parametrize(
    "optimizations", [pl.QueryOptFlags(predicate_pushdown=False), pl.QueryOptFlags.none()]
)
def test_optimizations_turned_off_stay_off(run, optimizations):
    source = Source(FRAME)

    query = source.scan().filter(pl.col("b") > 2)

    assert run(query, optimizations=optimizations).height == 2
    assert source.predicates == [None]


@pytest.mark.parametrize(
    ("query", "error"),
    [
        (FRAME.lazy().select("missing"), pl.exceptions.ColumnNotFoundError),
        (FRAME.lazy().select("a", pl.col("b").alias("a")), pl.exceptions.DuplicateError),
        (ONE_TEXT.select(pl.col("t").cast(pl.Int64)), pl.exceptions.InvalidOperationError),
        (ONE_TEXT.select(pl.col("t").str.json_decode(pl.Int8)), pl.exceptions.ComputeError),
        (FRAME.lazy().select(pl.col("b").sample(9)), pl.exceptions.ShapeError),
        (pl.scan_parquet("no-such-file.parquet"), FileNotFoundError),
    ],
)
def test_errors_of_polars_pass_through_unchanged(run, query, error):
    with pytest.raises(error) as native:
        query.collect(engine=NATIVE)

    with pytest.raises(error) as ours:
        run(query)

    assert type(ours.value) is type(native.value)
    assert str(ours.value).splitlines()[0] == str(native.value).splitlines()[0]


@pytest.mark.parametrize(
    "error",
    [ValueError("bad row"), ZeroDivisionError("by zero"), pl.exceptions.ComputeError("computed")],
)
def test_exception_of_a_python_udf_passes_through(run, error):
    with pytest.raises(type(error), match=str(error)):
        run(FRAME.lazy().map_batches(raising(error)))


def test_exception_class_of_the_caller_passes_through_an_expression(run):
    class OwnError(Exception):
        pass

    udf = raising(OwnError("mine"))

    with pytest.raises(OwnError, match="mine"):
        run(FRAME.lazy().select(pl.col("b").map_elements(udf, return_dtype=pl.Int64)))


def test_next_query_runs_after_a_failed_one(run):
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        run(FRAME.lazy().select("missing"))

    assert_frame_equal(run(FRAME.lazy()), FRAME)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("way", ["collect", "execute", "collect_all", "batches", "asyncio"])
def test_udf_can_run_queries_of_its_own(way, depth, asked):
    # Upstream re-enters with collect and collect_batches. A bounded engine must not wait for the
    # very slot that its own caller holds. Left out: natively, nested background queries deadlock
    # on two threads, and a hub of gevent in a thread of Polars hangs or crashes the process.
    run = partial(WAYS[way], **asked)

    def nested(levels):
        def udf(frame):
            return frame if levels == 0 else run(frame.lazy().map_batches(nested(levels - 1)))

        return udf

    assert_frame_equal(run(FRAME.lazy().map_batches(nested(depth))), FRAME)


@pytest.mark.parametrize("name", ["in-memory", "streaming"])
@pytest.mark.parametrize("way", [way for way in WAYS if way not in {"background", "batches"}])
def test_engine_named_by_the_affinity_runs_the_query(way, name, capfd):
    # Left out: natively, background queries ignore the engine, and batches always stream.
    with pl.Config(verbose=True):
        pl.Config.set_engine_affinity(name)
        capfd.readouterr()
        WAYS[way](FRAME.lazy().sort("b"), engine=AsyncEngine())

    assert ("polars-stream" in capfd.readouterr().err) is (name == "streaming")


@pytest.mark.parametrize("way", ["collect", "execute", "collect_all"])
def test_nothing_asked_for_runs_what_polars_runs(way, asked, capfd):
    # Asynchronous ways differ by design: there DESIGN.md, as upstream's documentation, promises
    # the in-memory engine, while 2.x would stream.
    with pl.Config(verbose=True):
        capfd.readouterr()
        WAYS[way](FRAME.lazy().sort("b"), **asked)
        ours = capfd.readouterr().err
        with pl.Config(engine_affinity="auto"):
            FRAME.lazy().sort("b").collect()
        native = capfd.readouterr().err

    assert ("polars-stream" in ours) is ("polars-stream" in native)


# collect


def test_unknown_keyword_is_a_type_error(asked):
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        FRAME.lazy().collect(nonsense=1, **asked)


def test_post_optimisation_callback_sees_the_plan_once(asked):
    seen = []

    # 1.44 hands over the plan and a duration, 2.x the plan alone.
    FRAME.lazy().filter(pl.col("b") > 1).collect(
        post_opt_callback=lambda plan, *_: seen.append(plan.get_node()), **asked
    )

    assert len(seen) == 1


def test_post_optimisation_callback_can_replace_the_execution(asked):
    def execute_elsewhere(plan, *_):
        plan.set_udf(lambda *_: pl.DataFrame({"a": [42]}))

    frame = pl.LazyFrame({"a": [1]}).collect(post_opt_callback=execute_elsewhere, **asked)

    assert frame["a"].to_list() == [42]


def test_eager_flags_change_no_answer(asked):
    frame = FRAME.lazy().collect(optimizations=pl.QueryOptFlags._eager(), **asked)

    assert_frame_equal(frame, FRAME)


# collect_all


def test_collect_all_keeps_the_order_of_the_queries(asked):
    queries = [FRAME.lazy().select(pl.lit(number)) for number in range(20)]

    assert [frame.item() for frame in pl.collect_all(queries, **asked)] == list(range(20))


@pytest.mark.parametrize("optimizations", [pl.QueryOptFlags(), pl.QueryOptFlags.none()])
def test_collect_all_takes_optimizations(asked, optimizations):
    queries = [FRAME.lazy().select(pl.col("b").sum()), FRAME.lazy().select(pl.col("c").max() * 2)]

    frames = pl.collect_all(queries, optimizations=optimizations, **asked)

    assert [frame.item() for frame in frames] == [10, 16.0]


def test_collect_all_takes_a_generator(asked):
    frames = pl.collect_all((FRAME.lazy().head(rows) for rows in (1, 2)), **asked)

    assert [frame.height for frame in frames] == [1, 2]


def test_collect_all_of_nothing_is_an_empty_list(asked):
    assert pl.collect_all([], **asked) == []


def test_collect_all_takes_one_query_twice(asked):
    first, second = pl.collect_all([FRAME.lazy()] * 2, **asked)

    assert_frame_equal(first, second)


def test_collect_all_rejects_what_is_no_lazy_frame(asked):
    # Natively it is an AttributeError about a private name; AsyncEngine says what is wrong.
    with pytest.raises((AttributeError, TypeError), match=r"_ldf|must be a LazyFrame"):
        pl.collect_all([FRAME], **asked)


def test_one_failing_query_fails_collect_all(asked):
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        pl.collect_all([FRAME.lazy(), FRAME.lazy().select("missing")], **asked)


@pytest.mark.parametrize("collect_all", [pl.collect_all, collect_all_asyncio, collect_all_gevent])
def test_common_subplan_of_several_queries_runs_once(asked, collect_all):
    runs = []

    def expensive(frame):
        runs.append(frame.height)
        return frame

    shared = FRAME.lazy().map_batches(expensive).sort("b")
    queries = [shared.select(pl.col("b").sum()), shared.select(pl.col("c").max())]

    frames = collect_all(queries, **asked)

    assert [frame.item() for frame in frames] == [10, 8.0]
    assert sum(runs) == FRAME.height


@pytest.mark.parametrize("collect_all", [collect_all_asyncio, collect_all_gevent])
def test_collect_all_async_keeps_order_takes_generators_and_nothing(asked, collect_all):
    queries = (FRAME.lazy().select(pl.lit(number)) for number in range(20))

    assert [frame.item() for frame in collect_all(queries, **asked)] == list(range(20))
    assert collect_all([], **asked) == []


# collect_async under asyncio


def test_result_is_kept_while_the_task_does_something_else(asked):
    async def main():
        handle = FRAME.lazy().collect_async(**asked)
        await asyncio.to_thread(pl.collect_all, [FRAME.lazy()], engine=NATIVE)
        return await handle

    assert_frame_equal(asyncio.run(main()), FRAME)


def test_handle_fits_the_tools_of_asyncio(asked):
    async def main():
        query = FRAME.lazy()
        first = await asyncio.wait_for(query.collect_async(**asked), timeout=30)
        second = await asyncio.ensure_future(query.collect_async(**asked))
        return [first, second, *await asyncio.gather(*[query.collect_async(**asked)] * 2)]

    for frame in asyncio.run(main()):
        assert_frame_equal(frame, FRAME)


def test_gathered_queries_answer_in_the_order_they_were_made(asked):
    async def main():
        queries = [FRAME.lazy().select(pl.lit(number)) for number in range(50)]
        return await asyncio.gather(*(query.collect_async(**asked) for query in queries))

    assert [frame.item() for frame in asyncio.run(main())] == list(range(50))


def test_handle_can_be_awaited_twice(asked):
    async def main():
        handle = FRAME.lazy().collect_async(**asked)
        return await handle, await handle

    first, second = asyncio.run(main())
    assert_frame_equal(first, second)


def test_gathered_failure_leaves_the_other_queries_alone(asked):
    async def main():
        queries = [FRAME.lazy(), FRAME.lazy().select("missing"), FRAME.lazy()]
        handles = [query.collect_async(**asked) for query in queries]
        return await asyncio.gather(*handles, return_exceptions=True)

    first, error, last = asyncio.run(main())
    assert isinstance(error, pl.exceptions.ColumnNotFoundError)
    assert_frame_equal(first, last)


# collect_async under gevent


def test_greenlet_can_make_the_query_and_another_get_it(asked):
    made = gevent.spawn(FRAME.lazy().collect_async, gevent=True, **asked)

    assert_frame_equal(made.get().get(), FRAME)


def test_get_without_waiting_finds_the_result_without_a_switch_to_the_hub(asked):
    handle = FRAME.lazy().collect_async(gevent=True, **asked)

    assert_frame_equal(poll(lambda: handle.get(block=False)), FRAME)


def test_get_of_a_running_query_times_out_and_works_later(asked, gate):
    udf, opened = gate
    handle = FRAME.lazy().map_batches(udf).collect_async(gevent=True, **asked)

    with pytest.raises(gevent.Timeout):
        handle.get(block=False)
    with pytest.raises(gevent.Timeout):
        handle.get(timeout=0.001)
    opened.set()

    assert_frame_equal(handle.get(timeout=30), FRAME)


def test_second_get_gives_the_same_frame_or_the_same_error(asked):
    handle = FRAME.lazy().collect_async(gevent=True, **asked)
    assert handle.get() is handle.get()

    failing = FRAME.lazy().select("missing").collect_async(gevent=True, **asked)
    for _ in range(2):
        with pytest.raises(pl.exceptions.ColumnNotFoundError):
            failing.get()


def test_hub_runs_other_greenlets_while_a_query_is_awaited(asked, gate):
    udf, opened = gate
    handle = FRAME.lazy().map_batches(udf).collect_async(gevent=True, **asked)
    answer = AsyncResult()

    gevent.spawn(handle.get).link(answer)
    gevent.spawn(opened.set)

    assert_frame_equal(answer.get(timeout=30), FRAME)


# Background queries


def test_fetch_is_none_until_the_frame_is_there(asked, gate):
    udf, opened = gate
    query = FRAME.lazy().map_batches(udf).collect(background=True, **asked)

    assert query.fetch() is None
    opened.set()
    assert_frame_equal(poll(query.fetch), FRAME)


def test_background_queries_can_be_fetched_in_any_order(asked):
    queries = [
        FRAME.lazy().select(pl.lit(number)).collect(background=True, **asked) for number in range(9)
    ]

    numbers = [query.fetch_blocking().item() for query in reversed(queries)]

    assert numbers == list(reversed(range(9)))


def test_fetch_raises_the_error_of_the_query(asked):
    query = FRAME.lazy().map_batches(raising(OSError("disk"))).collect(background=True, **asked)

    with pytest.raises(OSError, match="disk"):
        poll(query.fetch)


def test_cancelled_query_has_no_result(asked, gate):
    udf, opened = gate
    query = FRAME.lazy().map_batches(udf).sort("b").collect(background=True, **asked)

    query.cancel()
    opened.set()

    # Natively it is a ComputeError, "query interrupted"; a query of a collector is let go of at
    # once by design, and every one of its handles then raises CancelledError.
    with pytest.raises((pl.exceptions.ComputeError, CancelledError)):
        query.fetch_blocking()


def test_cancel_after_the_end_is_harmless(asked):
    query = FRAME.lazy().collect(background=True, **asked)

    assert_frame_equal(query.fetch_blocking(), FRAME)
    query.cancel()


# execute


def test_execute_gives_a_query_result(asked):
    result = pl.LazyFrame({"n": range(100)}).execute(**asked)

    assert isinstance(result, QueryResult)
    assert result.n_rows_total == 100
    assert result.head["n"].to_list() == [0, 1, 2, 3, 4]
    assert isinstance(result.lazy(), pl.LazyFrame)
