"""What Polars warns of where ``Config.warn_unstable`` is set, and of nothing else."""

from __future__ import annotations

import asyncio
import warnings

import polars as pl
import pytest

import polars_async as pa

QUERY = pl.LazyFrame({"a": [1, 2]}).sum()


@pytest.fixture(autouse=True)
def _warn_unstable():
    with pl.Config():
        pl.Config.warn_unstable(active=True)
        yield


def warned_of(act):
    """Give what a call warns of, and where."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", pl.exceptions.UnstableWarning)
        act()
    return [(str(each.message), each.filename, each.lineno) for each in caught]


def awaited(ask):
    async def main():
        await ask()

    asyncio.run(main())


WAYS = {
    "collect": lambda engine: QUERY.collect(engine=engine),
    "collect_all": lambda engine: pl.collect_all([QUERY], engine=engine),
    "background": lambda engine: QUERY.collect(engine=engine, background=True).fetch_blocking(),
    "collect_async": lambda engine: awaited(lambda: QUERY.collect_async(engine=engine)),
    "collect_all_async": lambda engine: awaited(
        lambda: pl.collect_all_async([QUERY], engine=engine)
    ),
    "collect_batches": lambda engine: list(QUERY.collect_batches(engine=engine)),
    "execute": lambda engine: QUERY.execute(engine=engine),
    "sink_batches": lambda engine: QUERY.sink_batches(lambda _: None, engine=engine),
}
ENGINES = {
    "auto": "auto",
    "in-memory": "in-memory",
    "streaming": "streaming",
    "object": pl.StreamingEngine(),
}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("way", WAYS)
def test_methods_of_polars_warn_as_without_the_plugin(way, engine):
    with pa.Collector(engine=engine) as collector:
        plugin = pa.AsyncEngine(collector)
        assert warned_of(lambda: WAYS[way](plugin)) == warned_of(lambda: WAYS[way](engine))


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_drop_in_warns_of_the_streaming_engine(engine):
    mode = "streaming mode is considered unstable"
    own = warned_of(lambda: pa.collect_async(QUERY, engine=engine).result())
    natively = warned_of(lambda: WAYS["collect_async"](engine))

    assert [text.startswith(mode) for text, *_ in own] == [True] * len(natively)
    assert {file for _, file, _ in own} <= {__file__}


def test_warning_that_is_an_error_leaves_nothing_scheduled():
    with pa.Collector(engine="streaming") as collector, warnings.catch_warnings():
        warnings.simplefilter("error", pl.exceptions.UnstableWarning)
        for way in "collect_async", "background":
            with pytest.raises(pl.exceptions.UnstableWarning):
                WAYS[way](pa.AsyncEngine(collector))
        assert collector.stats()["submitted"] == 0


def test_engine_that_nobody_asks_for_is_not_warned_of():
    with pa.Collector(default_engine="streaming") as collector:
        plugin = pa.AsyncEngine(collector)
        assert warned_of(lambda: WAYS["collect_async"](plugin)) == []


def test_without_the_setting_nothing_is_said():
    pl.Config.warn_unstable(active=False)
    with pa.Collector(engine="streaming") as collector:
        for way in WAYS.values():
            assert warned_of(lambda way=way: way(pa.AsyncEngine(collector))) == []


def first_batch(collector):
    async def main():
        async with collector.collect_batches_async(QUERY) as batches:
            return [batch async for batch in batches]

    asyncio.run(main())


@pytest.mark.everywhere
def test_what_the_library_calls_itself_is_not_warned_of(executor):
    with pa.Collector(executor=executor) as collector:

        def act():
            first_batch(collector)
            collector.collect_async(QUERY, engine="streaming").result()
            collector.collect_background(QUERY).fetch_blocking()
            pa.share(pl.DataFrame({"a": [1]})).collect()

        assert warned_of(act) == []
