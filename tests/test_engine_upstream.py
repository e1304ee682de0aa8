"""What Polars' own tests assert of choosing an engine holds for AsyncEngine, on 1.44 and on 2.x.

Each test states one such behaviour, written from what upstream asserts, not from its code: engine
arguments, the affinity of ``pl.Config``, query plans, and eager work, which no affinity touches.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import pickle

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from polars_async import AsyncEngine

pytestmark = pytest.mark.smoke

NATIVE = pl.InMemoryEngine()
FRAME = pl.DataFrame({"a": [3, 1, 2], "t": ["x", "y", None]})

CAPABILITIES = sorted(
    name for name, _ in inspect.getmembers(pl.Engine, callable) if not name.startswith("_")
)


@pytest.fixture(autouse=True)
def _affinity_does_not_outlive_the_test():
    with pl.Config():
        pl.Config.set_engine_affinity(None)
        yield


@pytest.fixture
def affinity() -> pl.Engine:
    engine = AsyncEngine()
    pl.Config.set_engine_affinity(engine)
    return engine


def explain(**asked) -> str:
    """Explain a plan that is optimised otherwise for the streaming engine."""
    return FRAME.lazy().select(pl.col("a").sum() + pl.col("a").sum()).explain(**asked)


def physical_graph(**asked) -> str:
    query = FRAME.lazy().filter(pl.col("a") > 1)
    return query.show_graph(raw_output=True, plan_stage="physical", **asked)


def in_a_loop(call):
    async def main():
        return await call()

    return asyncio.run(main())


CALLS = {
    "collect": lambda lf, **asked: lf.collect(**asked),
    "execute": lambda lf, **asked: lf.execute(**asked),
    "collect_all": lambda lf, **asked: pl.collect_all([lf], **asked),
    "collect_async": lambda lf, **asked: in_a_loop(lambda: lf.collect_async(**asked)),
    "collect_all_async": lambda lf, **asked: in_a_loop(lambda: pl.collect_all_async([lf], **asked)),
    "collect_batches": lambda lf, **asked: list(lf.collect_batches(**asked)),
    "sink_parquet": lambda lf, **asked: lf.sink_parquet(io.BytesIO(), **asked),
    "sink_ipc": lambda lf, **asked: lf.sink_ipc(io.BytesIO(), **asked),
    "sink_csv": lambda lf, **asked: lf.sink_csv(io.BytesIO(), **asked),
    "sink_ndjson": lambda lf, **asked: lf.sink_ndjson(io.BytesIO(), **asked),
    "sink_batches": lambda lf, **asked: lf.sink_batches(lambda _: None, **asked),
}

every_call = pytest.mark.parametrize("call", CALLS)


@pytest.fixture
def watched(monkeypatch):
    """Write down which methods of AsyncEngine Polars calls."""
    seen = []

    def watch(name):
        original = getattr(AsyncEngine, name)

        def method(self, *args, **options):
            seen.append(name)
            return original(self, *args, **options)

        monkeypatch.setattr(AsyncEngine, name, method)

    for name in CAPABILITIES:
        watch(name)
    return seen


# The contract of an engine


def test_async_engine_is_an_engine_with_a_name():
    engine = AsyncEngine()

    assert isinstance(engine, pl.Engine)
    assert isinstance(engine.name, str)
    assert isinstance(engine.plan_engine, str)
    assert {engine: 1}[engine] == 1


def test_calls_cover_every_capability_of_an_engine():
    assert sorted(CALLS) == CAPABILITIES


@pytest.mark.parametrize("name", CAPABILITIES)
def test_no_capability_is_missing(name):
    # Upstream's base class raises NotImplementedError for what a backend does not have.
    assert getattr(AsyncEngine, name) is not getattr(pl.Engine, name)


# The engine argument


@every_call
def test_engine_object_as_argument_does_the_work(watched, call):
    CALLS[call](FRAME.lazy(), engine=AsyncEngine())

    assert watched[0] == call


@every_call
@pytest.mark.parametrize("explicit", ["in-memory", "streaming", NATIVE])
def test_explicit_engine_wins_over_the_affinity(affinity, watched, call, explicit):
    CALLS[call](FRAME.lazy(), engine=explicit)

    assert watched == []
    assert isinstance(affinity, AsyncEngine)


@every_call
@pytest.mark.parametrize("nonsense", ["unknown", None, object(), AsyncEngine])
@pytest.mark.usefixtures("affinity")
def test_nonsense_argument_is_a_value_error(call, nonsense):
    with pytest.raises(ValueError, match="Invalid engine argument"):
        CALLS[call](FRAME.lazy(), engine=nonsense)


@pytest.mark.usefixtures("affinity")
def test_nonsense_argument_of_a_lazy_sink_is_a_value_error():
    with pytest.raises(ValueError, match="Invalid engine argument"):
        FRAME.lazy().sink_csv(io.BytesIO(), lazy=True, engine="unknown")


# The affinity


@every_call
@pytest.mark.usefixtures("affinity")
def test_affinity_does_the_work_of_auto(watched, call):
    CALLS[call](FRAME.lazy())

    assert watched[0] == call


@every_call
def test_affinity_of_a_context_does_the_work_inside_of_it(watched, call):
    with pl.Config(engine_affinity=AsyncEngine()):
        CALLS[call](FRAME.lazy(), engine="auto")
        inside = list(watched)
    CALLS[call](FRAME.lazy(), engine="auto")

    assert inside[0] == call
    assert watched == inside


@pytest.mark.parametrize("nonsense", ["unknown", object(), AsyncEngine])
def test_nonsense_affinity_is_a_value_error_and_changes_nothing(affinity, watched, nonsense):
    with pytest.raises(ValueError, match="invalid engine"):
        pl.Config.set_engine_affinity(nonsense)

    FRAME.lazy().collect()
    assert watched[0] == "collect"
    assert isinstance(affinity, AsyncEngine)


def test_affinity_object_and_affinity_name_replace_each_other(watched):
    pl.Config.set_engine_affinity("streaming")
    pl.Config.set_engine_affinity(AsyncEngine())
    assert "POLARS_ENGINE_AFFINITY" not in os.environ
    FRAME.lazy().collect()
    assert watched[0] == "collect"

    watched.clear()
    pl.Config.set_engine_affinity("in-memory")
    assert os.environ["POLARS_ENGINE_AFFINITY"] == "in-memory"
    FRAME.lazy().collect()
    assert watched == []


@pytest.mark.parametrize(
    "clear",
    [
        lambda: pl.Config.set_engine_affinity(None),
        pl.Config.restore_defaults,
        # Saved are environment variables only: an object does not survive, a stale one neither.
        lambda: pl.Config.load(pl.Config.save()),
    ],
    ids=["none", "restore_defaults", "save_and_load"],
)
@pytest.mark.usefixtures("affinity")
def test_affinity_can_be_cleared(watched, clear):
    clear()

    FRAME.lazy().collect()

    assert watched == []


def test_saved_file_with_a_name_replaces_the_object(affinity, watched, tmp_path):
    with pl.Config(engine_affinity="in-memory"):
        pl.Config.save_to_file(tmp_path / "config.json")
    pl.Config.set_engine_affinity(affinity)

    pl.Config.load_from_file(tmp_path / "config.json")
    FRAME.lazy().collect()

    assert watched == []


@pytest.mark.usefixtures("affinity")
def test_state_and_save_do_not_mention_the_object():
    assert pl.Config.state()["POLARS_ENGINE_AFFINITY"] is None
    assert "AsyncEngine" not in pl.Config.save()


def test_contexts_restore_the_affinity_they_found(affinity, watched):
    for other in (pl.StreamingEngine(), "in-memory"):
        with pl.Config(engine_affinity=other):
            FRAME.lazy().collect()
    assert watched == []

    FRAME.lazy().collect()
    assert watched[0] == "collect"
    assert isinstance(affinity, AsyncEngine)


def test_config_as_decorator_sets_the_affinity_for_one_call(watched):
    @pl.Config(engine_affinity=AsyncEngine(), apply_on_context_enter=True)
    def decorated():
        return FRAME.lazy().collect()

    FRAME.lazy().collect()
    assert watched == []
    decorated()
    assert watched[0] == "collect"


# Plans


@pytest.mark.parametrize("show", [explain, physical_graph])
def test_plan_is_shown_as_without_the_affinity(show):
    native = show()

    with pl.Config(engine_affinity=AsyncEngine()):
        assert show() == native
    assert show(engine=AsyncEngine()) == native


@pytest.mark.parametrize("name", ["in-memory", "streaming"])
@pytest.mark.parametrize("show", [explain, physical_graph])
def test_plan_is_shown_for_the_engine_that_the_variable_names(name, show):
    assert show(engine="in-memory") != show(engine="streaming")

    with pl.Config(engine_affinity=name):
        assert show(engine=AsyncEngine()) == show(engine=name)


@pytest.mark.usefixtures("affinity")
def test_every_view_of_a_plan_works():
    query = FRAME.lazy().filter(pl.col("a") > 1).select("a")

    assert "FILTER" in query.explain(optimized=False)
    assert "a" in query.explain(format="tree")
    assert query.show_graph(raw_output=True, plan_stage="ir").startswith("digraph")
    assert "FILTER" in pl.explain_all([query.filter(pl.col("a") > 2)])
    assert query.collect_schema() == {"a": pl.Int64}


@pytest.mark.skipif(not hasattr(pl.LazyFrame, "profile"), reason="Polars 2 has no profile")
@pytest.mark.usefixtures("affinity")
def test_profile_gives_the_frame_and_its_timings():
    with pytest.warns(DeprecationWarning, match="profile"):
        frame, timings = FRAME.lazy().sort("a").profile()

    assert frame["a"].to_list() == [1, 2, 3]
    assert timings.columns == ["node", "start", "end"]


@pytest.mark.usefixtures("affinity")
def test_plan_survives_pickle_and_serialization():
    query = FRAME.lazy().sort("a").with_columns(double=pl.col("a") * 2)
    expected = query.collect(engine=NATIVE)

    assert_frame_equal(pickle.loads(pickle.dumps(query)).collect(), expected)
    restored = pl.LazyFrame.deserialize(io.BytesIO(query.serialize()))
    assert_frame_equal(restored.collect(), expected)


# What is built on collect


@pytest.mark.usefixtures("affinity")
def test_sql_describe_and_assertions_on_lazy_frames_run():
    query = FRAME.lazy()

    assert pl.sql("SELECT max(a) FROM query", eager=True).item() == 3
    assert_frame_equal(query.sort("a"), query.sort("a"))
    # Even DataFrame.describe runs on the affinity's engine: by execute on 1.44, collect on 2.x.
    assert FRAME.describe()["statistic"][0] == "count"


# Eager work


def write_everything(frame, folder):
    frame.write_parquet(folder / "frame.parquet")
    frame.write_parquet(folder / "by_key", partition_by="a", mkdir=True)
    frame.write_ipc(folder / "frame.arrow")
    frame.write_csv(folder / "frame.csv")
    frame.write_ndjson(folder / "frame.jsonl")
    return frame.write_csv()


EAGER = {
    "select": lambda: FRAME.select(pl.col("a").sum()),
    "with_columns": lambda: FRAME.with_columns(pl.col("a") + 1),
    "filter": lambda: FRAME.filter(pl.col("a") > 1),
    "sort": lambda: FRAME.sort("a"),
    "group_by": lambda: FRAME.group_by("t", maintain_order=True).agg(pl.col("a").max()),
    "join": lambda: FRAME.join(FRAME, on="a", maintain_order="left"),
    "unpivot": lambda: FRAME.pivot("t", index="a", values="a"),
    "unique": lambda: FRAME.unique(maintain_order=True),
    "concat": lambda: pl.concat([FRAME, FRAME], how="diagonal"),
    "align": lambda: pl.align_frames(FRAME, FRAME.head(1), on="a")[1],
    "select_nothing": lambda: pl.select(pl.int_range(3)),
    "series": lambda: FRAME["a"].rolling_sum(2).to_frame(),
    "map_elements": lambda: FRAME.select(pl.col("a").map_elements(hex, return_dtype=pl.String)),
}


@pytest.fixture
def untouchable(affinity, monkeypatch):
    """An affinity that must not be used at all."""

    def refuse(*_args, **_options):
        raise AssertionError("eager work reached the affinity's engine")

    for name in CAPABILITIES:
        monkeypatch.setattr(AsyncEngine, name, refuse)
    return affinity


@pytest.mark.parametrize("work", EAGER)
def test_eager_work_ignores_the_affinity(work, request):
    native = EAGER[work]()

    request.getfixturevalue("untouchable")

    assert_frame_equal(EAGER[work](), native)


def test_writing_and_reading_files_ignore_the_affinity(tmp_path, request):
    native, ours = tmp_path / "native", tmp_path / "ours"
    native.mkdir()
    ours.mkdir()
    text = write_everything(FRAME, native)

    request.getfixturevalue("untouchable")

    assert write_everything(FRAME, ours) == text
    for file in native.rglob("*.*"):
        assert (ours / file.relative_to(native)).read_bytes() == file.read_bytes()
    assert_frame_equal(pl.read_parquet(ours / "frame.parquet"), FRAME)
    assert_frame_equal(pl.read_ipc(ours / "frame.arrow"), FRAME)
    assert_frame_equal(pl.read_csv(ours / "frame.csv"), FRAME)
    assert_frame_equal(pl.read_ndjson(ours / "frame.jsonl"), FRAME)
