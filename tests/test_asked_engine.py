"""Which engine runs where several ask for one: the argument, the collector, the affinity."""

from __future__ import annotations

import asyncio
from itertools import product

import polars as pl
import pytest

import polars_async as pa
from polars_async import api

VARIABLE = "POLARS_ENGINE_AFFINITY"
QUERY = pl.LazyFrame({"a": [1, 2]}).sum()


class Own(pl.InMemoryEngine):
    """An engine that tells by its name who has asked for it."""

    def __init__(self, asker):
        super().__init__()
        self.asker = asker

    @property
    def name(self):
        return self.asker

    def collect(self, lf, **options):
        return pl.InMemoryEngine().collect(lf, **options)

    def collect_all(self, lfs, **options):
        return pl.InMemoryEngine().collect_all(lfs, **options)


ARGUMENT, COLLECTOR, AFFINITY, DEFAULT = map(Own, ("argument", "collector", "config", "default"))


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


def first_batch(collector, argument):
    async def main():
        async with collector.collect_batches_async(QUERY, engine=argument) as batches:
            return [batch async for batch in batches]

    asyncio.run(main())


def only_result(collector, argument):
    async def main():
        return [pair async for pair in collector.as_completed([QUERY], engine=argument)]

    asyncio.run(main())


# Each takes the configured collector and the argument, of which "auto" is none.
DROP_INS = {
    "collect_async": lambda _, engine: pa.collect_async(QUERY, engine=engine).result(),
    "collect_all_async": lambda _, engine: pa.collect_all_async([QUERY], engine=engine).result(),
}
METHODS = {
    "collect_async": lambda own, engine: own.collect_async(QUERY, engine=engine).result(),
    "collect_all_async": lambda own, engine: own.collect_all_async([QUERY], engine=engine).result(),
    "as_completed": only_result,
    "background": lambda own, engine: own.collect_background(QUERY, engine=engine).fetch_blocking(),
    "all in the background": lambda own, engine: own.collect_all_background(
        [QUERY], engine=engine
    ).fetch_blocking(),
}
STREAMING_METHODS = {
    "batches": first_batch,
    "sink": lambda own, engine: own.sink_async(
        QUERY.sink_batches(lambda _: None, lazy=True), engine=engine
    ).result(),
}
WAYS = {f"pa.{name}": way for name, way in DROP_INS.items()}
WAYS |= {f"method {name}": way for name, way in METHODS.items()}
WAYS |= {f"method {name}": way for name, way in STREAMING_METHODS.items()}
ARGUMENTS = {"none": "auto", "engine": ARGUMENT, "plugin": pa.AsyncEngine(pa.Collector())}
ASKERS = list(product(ARGUMENTS, *[(False, True)] * 3))


def expected(way, argument, *, configured, affinity, variable):
    if argument == "engine":
        return "argument"
    if configured:
        return "collector"
    if affinity:
        return "config"
    if variable:
        return "streaming"
    return "streaming" if way in {"method batches", "method sink"} else "default"


@pytest.mark.parametrize(("argument", "configured", "affinity", "variable"), ASKERS)
@pytest.mark.parametrize("way", WAYS)
def test_first_who_asks_gets_the_engine(
    way, argument, configured, affinity, variable, monkeypatch, engine_log
):
    collector = pa.configure(engine=COLLECTOR if configured else "auto", default_engine=DEFAULT)
    pl.Config.set_engine_affinity(AFFINITY if affinity else None)
    if variable:
        monkeypatch.setenv(VARIABLE, "streaming")

    WAYS[way](collector, ARGUMENTS[argument])

    engine_log.assert_ran_on(
        expected(way, argument, configured=configured, affinity=affinity, variable=variable)
    )


POLARS = {
    "collect_async": lambda engine: QUERY.collect_async(engine=engine),
    "collect_all_async": lambda engine: pl.collect_all_async([QUERY], engine=engine),
}


@pytest.mark.parametrize("how", ["argument", "affinity"])
@pytest.mark.parametrize("way", POLARS)
def test_plugin_runs_the_engine_of_the_configured_collector(way, how, engine_log):
    pa.configure(engine=COLLECTOR)
    if how == "affinity":
        pl.Config.set_engine_affinity(pa.AsyncEngine())

    async def main():
        await POLARS[way](pa.AsyncEngine() if how == "argument" else "auto")

    asyncio.run(main())

    engine_log.assert_ran_on("collector")


@pytest.mark.parametrize("way", DROP_INS)
def test_configured_gpu_is_used(way, gpu_host, engine_log):  # noqa: ARG001
    collector = pa.configure(engine="gpu", gpu="offload")

    DROP_INS[way](collector, "auto")

    engine_log.assert_ran_on("gpu")


# Circles


def around(collector=None):
    """Give an engine that asks, over another collector, for that of `collector`."""
    return pa.AsyncEngine(pa.Collector(engine=pa.AsyncEngine(collector)))


@pytest.mark.parametrize("engine", [pa.AsyncEngine, around], ids=["itself", "over another"])
def test_collector_is_not_configured_to_ask_itself(engine):
    with pytest.raises(ValueError, match=r"must not ask for itself.*another engine"):
        pa.configure(engine=engine())

    collector = pa.configure(engine=COLLECTOR)  # is not in use yet
    assert pa.default_collector() is collector


def test_chain_of_engines_is_followed_to_its_end(engine_log):
    pa.configure(engine=COLLECTOR)
    pl.Config.set_engine_affinity(around())

    with pa.Collector() as collector:
        collector.collect_async(QUERY).result()
        collector.collect_async(QUERY, engine=around()).result()
        QUERY.collect()

    engine_log.assert_ran_on("collector")


def test_default_engine_of_a_collector_may_ask_that_collector():
    collector = pa.configure(default_engine=pa.AsyncEngine())

    assert collector.resolve_engine().name == "auto"


IN_A_CIRCLE = {
    **WAYS,
    "method of Polars": lambda _, engine: QUERY.collect(engine=engine),
    "affinity": lambda own, _: own.collect_async(QUERY).result(),
    "plan": lambda _, engine: QUERY.explain(engine=engine),
    "decision": lambda _, engine: pa.resolve_engine(engine),
}


@pytest.mark.parametrize("way", IN_A_CIRCLE)
@pytest.mark.parametrize("engine", [pa.AsyncEngine, around], ids=["itself", "over another"])
def test_circle_that_is_made_by_hand_is_an_error(way, engine):
    collector = pa.configure()
    collector.engine = engine()
    pl.Config.set_engine_affinity(engine())

    with pytest.raises(ValueError, match="must not ask for itself"):
        IN_A_CIRCLE[way](collector, engine())
