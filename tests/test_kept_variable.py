"""An engine that becomes the affinity removes POLARS_ENGINE_AFFINITY; AsyncEngine keeps it."""

from __future__ import annotations

import asyncio
import os

import polars as pl
import pytest

import polars_async as pa
from polars_async import api

VARIABLE = "POLARS_ENGINE_AFFINITY"
QUERY = pl.LazyFrame({"a": [1, 2]}).sum()


@pytest.fixture(autouse=True)
def _own_world(monkeypatch):
    """No affinity, and no default collector, neither before nor after."""
    monkeypatch.setenv(VARIABLE, "")  # so that monkeypatch takes back what Config makes of it
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(api._Default, "collector", None)
    with pl.Config():
        pl.Config.set_engine_affinity(None)
        yield
    if api._Default.collector is not None:
        api._Default.collector.close()


def runs_on(path="async"):
    return pa.resolve_engine(path=path).name


async def batches():
    async with pa.default_collector().collect_batches_async(QUERY) as stream:
        return [batch async for batch in stream]


def in_a_loop(ask):
    async def main():
        await ask()

    asyncio.run(main())


WAYS = {
    "collect": QUERY.collect,
    "collect_all": lambda: pl.collect_all([QUERY]),
    "collect_batches": lambda: list(QUERY.collect_batches()),
    "sink": lambda: QUERY.sink_csv(os.devnull),
    "collect_async": lambda: in_a_loop(QUERY.collect_async),
    "collect_all_async": lambda: in_a_loop(lambda: pl.collect_all_async([QUERY])),
    "background": lambda: QUERY.collect(background=True).fetch_blocking(),
    "drop-in": lambda: pa.collect_async(QUERY).result(),
    "collector": lambda: pa.default_collector().collect_async(QUERY).result(),
    "batches": lambda: asyncio.run(batches()),
}


@pytest.mark.parametrize("name", ["streaming", "in-memory"])
@pytest.mark.parametrize("way", WAYS)
def test_queries_run_where_they_did(way, name, engine_log):
    os.environ[VARIABLE] = name
    pl.Config.set_engine_affinity(pa.AsyncEngine())

    WAYS[way]()

    engine_log.assert_ran_on(name)
    assert {each.source for each in engine_log} == {"environment"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("no_gpu_host")
def test_gpu_that_cannot_run_is_said(way, engine_log):
    os.environ[VARIABLE] = "gpu"
    pl.Config.set_engine_affinity(pa.AsyncEngine())

    with pytest.warns(pa.EngineDowngradeWarning, match=f"{VARIABLE} asks for the GPU"):
        WAYS[way]()

    engine_log.assert_ran_on("in-memory")
    assert all(each.downgraded for each in engine_log)


def test_nonsense_is_said():
    os.environ[VARIABLE] = "cuda"
    pl.Config.set_engine_affinity(pa.AsyncEngine())

    with pytest.warns(pa.EngineDowngradeWarning, match=f"{VARIABLE}='cuda' names no engine"):
        QUERY.collect()


def test_plan_is_shown_for_the_engine_that_runs():
    query = pl.LazyFrame({"a": [1]}).select(pl.col("a").sum() + pl.col("a").sum())
    streaming = query.explain(engine="streaming")
    os.environ[VARIABLE] = "streaming"
    pl.Config.set_engine_affinity(pa.AsyncEngine())

    assert query.explain() == streaming


# Which moment counts: that at which the engine becomes the affinity


def test_engine_may_be_made_before_the_variable_is_set():
    engine = pa.AsyncEngine()
    os.environ[VARIABLE] = "streaming"
    pl.Config.set_engine_affinity(engine)

    assert runs_on() == "streaming"


def test_variable_that_was_removed_before_is_not_kept():
    os.environ[VARIABLE] = "streaming"
    engine = pa.AsyncEngine()
    pl.Config.set_engine_affinity(engine)
    for affinity in None, engine:
        pl.Config.set_engine_affinity(affinity)

    assert runs_on() == "in-memory"


def test_variable_that_is_set_afterwards_comes_first_while_it_is_there():
    os.environ[VARIABLE] = "streaming"
    pl.Config.set_engine_affinity(pa.AsyncEngine())
    found = []
    for value in "in-memory", "auto":
        os.environ[VARIABLE] = value
        found.append(runs_on("sync"))
    del os.environ[VARIABLE]

    assert [*found, runs_on("sync")] == ["in-memory", "auto", "streaming"]


def test_other_use_of_the_engine_changes_nothing():
    engine = pa.AsyncEngine()
    os.environ[VARIABLE] = "streaming"
    pl.Config.set_engine_affinity(engine)
    with pl.Config(engine_affinity="in-memory"):
        QUERY.collect(engine=engine)

    assert runs_on() == "streaming"


def test_name_that_is_set_with_config_replaces_what_was_kept():
    os.environ[VARIABLE] = "streaming"
    pl.Config.set_engine_affinity(pa.AsyncEngine())
    pl.Config.set_engine_affinity("in-memory")
    pl.Config.set_engine_affinity(None)

    assert runs_on("sync") == "auto"


@pytest.mark.parametrize("number", [1, 2], ids=["again", "another"])
def test_engine_that_replaces_an_engine_keeps_what_that_kept(number):
    engines = [pa.AsyncEngine() for _ in range(number)]
    os.environ[VARIABLE] = "streaming"
    pl.Config.set_engine_affinity(engines[0])
    pl.Config.set_engine_affinity(engines[-1])

    assert runs_on() == "streaming"


def test_contexts_keep_and_restore():
    os.environ[VARIABLE] = "streaming"
    found = []
    with pl.Config(engine_affinity=pa.AsyncEngine()):
        found.append(runs_on())
        with pl.Config(engine_affinity=pa.AsyncEngine()):
            found.append(runs_on())
        with pl.Config(engine_affinity="in-memory"):
            found.append(runs_on())
        with pl.Config(engine_affinity=pa.AsyncEngine(pa.Collector(engine="in-memory"))):
            found.append(runs_on())
        found.append(runs_on())

    assert found == ["streaming", "streaming", "in-memory", "in-memory", "streaming"]
    assert os.environ[VARIABLE] == "streaming"


def test_decorator_keeps_what_the_variable_says_at_each_call():
    @pl.Config(engine_affinity=pa.AsyncEngine(), apply_on_context_enter=True)
    def decorated():
        return runs_on("sync")

    found = [decorated()]
    for name in "streaming", "in-memory":
        os.environ[VARIABLE] = name
        found.append(decorated())

    assert found == ["auto", "streaming", "in-memory"]


def test_engine_of_the_collector_comes_first():
    os.environ[VARIABLE] = "streaming"
    pl.Config.set_engine_affinity(pa.AsyncEngine(pa.Collector(engine="in-memory")))

    assert runs_on() == "in-memory"


def test_engine_that_is_no_affinity_keeps_nothing():
    os.environ[VARIABLE] = "streaming"
    engine = pa.AsyncEngine()
    QUERY.collect(engine=engine)
    del os.environ[VARIABLE]

    assert pa.resolve_engine(engine).name == "in-memory"
