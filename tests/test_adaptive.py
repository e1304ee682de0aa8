"""`engine="adaptive"`: first sight, what is learned, tries, and what is never chosen for."""

from __future__ import annotations

import asyncio
from math import inf

import polars as pl
import pytest
from places import until

import polars_async as pa
from polars_async import api
from polars_async._runtime.upstream import DEFAULT_ENGINE
from polars_async.scheduling import adaptive, adaptive_gpu, estimates
from polars_async.scheduling.adaptive import Choice, EngineTimes, at_first_sight
from polars_async.scheduling.estimates import CostModel, Sources
from polars_async.testing import simulate_gpu

LIMIT = 30
BOTH = ("in-memory", "streaming")
FIRST = Choice("in-memory", "it is small")
SMALL = pl.DataFrame({"a": [3, 1, 2]}).lazy().sort("a")
LARGE = pl.select(a=pl.int_range(1 << 19)).lazy().select(pl.col("a").sum())


# The policy, with a clock of its own


class Shape:
    """One shape of query, which takes so many seconds on each engine."""

    def __init__(self, first=FIRST, engines=BOTH, **seconds):
        self.times = EngineTimes()
        self.first, self.engines = first, engines
        self.seconds = {name.replace("_", "-"): each for name, each in seconds.items()}
        self.ran = []

    def run(self, number=1, *, alone=True, may_try=True):
        for _ in range(number):
            choice = self.choose(may_try=may_try)
            self.times.note(choice, self.seconds[choice.engine], alone=alone)
            self.ran.append(choice.engine)
        return self

    def choose(self, *, may_try=False):
        return self.times.choose(7, self.first, self.engines, may_try=may_try)


def test_first_sight_holds_until_another_engine_was_measured():
    shape = Shape(in_memory=0.1, streaming=0.01).run(8)
    assert set(shape.ran) == {"in-memory"}
    assert shape.choose(may_try=True).engine == "streaming"
    assert shape.choose(may_try=False).engine == "in-memory"


@pytest.mark.parametrize("first", BOTH)
def test_faster_engine_is_found_and_kept(first):
    shape = Shape(Choice(first, ""), in_memory=0.1, streaming=0.05).run(100)
    assert shape.ran[:8] == [first] * 8
    assert shape.choose().engine == "streaming"
    assert shape.ran[10:].count("in-memory") <= 4


def test_engines_of_about_the_same_speed_take_no_turns():
    shape = Shape(in_memory=0.1, streaming=0.09).run(500)
    assert shape.choose().engine == "in-memory"
    assert shape.ran.count("streaming") <= 6


def test_choice_follows_when_the_data_change():
    shape = Shape(in_memory=0.1, streaming=0.2).run(100)
    assert shape.choose().engine == "in-memory"
    shape.seconds["in-memory"] = 0.5
    assert shape.run(20).choose().engine == "streaming"


@pytest.mark.parametrize("slower", [2, 10, 100])
def test_tries_of_a_slower_engine_cost_little(slower):
    shape = Shape(in_memory=1.0, streaming=slower).run(10_000)
    tries = shape.ran.count("streaming")
    assert tries >= 1
    # Beyond the first one, whose cost nobody knows before.
    assert (tries - 1) * slower <= 0.03 * 10_000


def test_slow_queries_are_not_tried_elsewhere():
    assert set(Shape(in_memory=6.0, streaming=1.0).run(50).ran) == {"in-memory"}


def test_nothing_is_tried_where_it_may_not():
    assert set(Shape(in_memory=1.0, streaming=0.1).run(50, may_try=False).ran) == {"in-memory"}


def test_run_beside_others_is_an_upper_bound():
    shape = Shape(in_memory=0.1, streaming=0.05).run(30)
    assert shape.choose().engine == "streaming"
    shape.seconds["streaming"] = 5.0  # among many
    shape.run(50, alone=False, may_try=False)
    assert shape.choose().engine == "streaming"
    shape.seconds["streaming"] = 0.01
    shape.run(1, alone=False, may_try=False)
    assert "10 ms here" in shape.choose().why


def test_engine_that_cannot_run_it_is_left():
    shape = Shape(Choice("gpu", ""), (*BOTH, "gpu"), gpu=inf, in_memory=0.1, streaming=0.3)
    shape.run(1)
    shape.times.note(Choice("in-memory", "", 7), 0.1, alone=True)
    assert shape.choose(may_try=True).engine == "in-memory"
    assert shape.choose().why == "100 ms here, gpu failed"


def test_engine_that_is_there_no_more_is_not_chosen():
    shape = Shape(Choice("gpu", ""), (*BOTH, "gpu"), gpu=0.01, in_memory=0.1, streaming=0.3).run(20)
    assert shape.choose().engine == "gpu"
    shape.engines = BOTH
    shape.first = FIRST
    assert shape.choose().engine == "in-memory"


def test_reason_is_in_figures():
    shape = Shape(in_memory=0.43, streaming=0.21).run(8)
    assert shape.choose(may_try=True).why == "a try, in-memory 430 ms"
    shape.run(2)
    assert shape.choose().why == "210 ms here, in-memory 430 ms"
    assert Shape(in_memory=1.26).run(1).choose().why == "1.3 s here"
    assert Shape(in_memory=12e-6).run(1).choose().why == "12 us here"


def test_shapes_that_were_not_seen_for_long_are_forgotten(monkeypatch):
    monkeypatch.setattr(adaptive, "_MOST_SHAPES", 3)
    times = EngineTimes()
    for shape in range(5):
        times.note(Choice("streaming", "", shape), 1.0, alone=True)
    assert [times.choose(each, FIRST, BOTH, may_try=False).engine for each in range(5)] == [
        *["in-memory"] * 2,
        *["streaming"] * 3,
    ]


# First sight


@pytest.mark.parametrize(
    ("size", "scans", "engine"),
    [
        (0, False, "in-memory"),
        ((1 << 21) - 1, False, "in-memory"),
        (1 << 21, False, "streaming"),
        ((1 << 18) - 1, True, "in-memory"),
        (1 << 18, True, "streaming"),
        (None, True, "streaming"),
    ],
)
def test_size_decides_at_first_sight(size, scans, engine):
    for runs_python in (False, None):
        found = at_first_sight(Sources(size, scans=scans, runs_python=runs_python, shape=1))
        assert found.engine == engine


@pytest.mark.parametrize(("held", "engine"), [(20 << 20, "in-memory"), (30 << 20, "streaming")])
def test_memory_decides_where_nothing_else_is_known(monkeypatch, held, engine):
    monkeypatch.setattr(adaptive, "memory_held", lambda: held)
    found = at_first_sight(Sources(None, scans=False, runs_python=None, shape=None))
    assert found.engine == engine
    assert "is unknown" in found.why


def test_python_functions_stay_on_the_engine_of_polars():
    found = at_first_sight(Sources(1 << 30, scans=True, runs_python=True, shape=1))
    assert found.engine == DEFAULT_ENGINE
    assert "Python" in found.why


def test_sources_are_what_the_plan_reads(tmp_path):
    costs, path = CostModel(), tmp_path / "data.parquet"
    LARGE.collect().write_parquet(path)
    scan = pl.scan_parquet(path)
    small, file, both = (costs.sources(each) for each in ([SMALL], [scan], [SMALL, scan]))
    assert file.size == path.stat().st_size
    assert both.size == small.size + file.size
    assert (small.scans, file.scans, both.scans) == (False, True, True)
    assert len({small.shape, file.shape, both.shape, None}) == 4
    assert costs.sources([pl.scan_parquet("s3://bucket/data.parquet")]).size is None
    assert small.runs_python is False
    assert costs.sources([SMALL.map_batches(lambda frame: frame)]).runs_python is True


@pytest.mark.parametrize("held", [0, 1 << 30])
def test_size_and_functions_are_seen_however_large_the_frames_are(monkeypatch, held):
    monkeypatch.setattr(estimates, "memory_held", lambda: held)
    costs = CostModel()
    for rows in (1, 1 << 12, 1 << 19):
        frame = pl.select(a=pl.int_range(rows), b=pl.int_range(rows)).lazy()
        read = costs.sources([frame])
        assert 0.9 * 16 * rows <= read.size <= 16 * rows + 1000
        assert read.runs_python is False
        assert costs.sources([frame.map_batches(lambda frame: frame)]).runs_python is True
        function = pl.col("a").map_elements(round, return_dtype=pl.Int64)
        assert costs.sources([frame.select(function)]).runs_python is True


def test_large_frames_are_not_copied_to_see_what_a_query_reads(monkeypatch):
    monkeypatch.setattr(estimates, "memory_held", lambda: 1 << 30)
    monkeypatch.setattr(estimates, "look_at", None)
    costs = CostModel()
    sources = costs.sources([LARGE])
    assert sources.size == 8 << 19
    assert sources.shape is not None
    assert costs.of([LARGE], "streaming").seconds == pytest.approx((8 << 19) / 200e6)
    assert costs.sources([LARGE.select("nothing")]) == estimates._NO_SOURCES


# Queries


@pytest.fixture
def adapting(make):
    return make(engine="adaptive")


@pytest.fixture
def make():
    made = []

    def make(**options):
        made.append(pa.Collector(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize(("lf", "engine"), [(SMALL, "in-memory"), (LARGE, "streaming")])
def test_engine_is_chosen_and_told(make, lf, engine):
    events = []
    collector = make(on_event=events.append)
    handle = collector.collect_async(lf, engine="adaptive")
    assert handle.result(LIMIT).equals(lf.collect())
    found = handle.resolution
    assert (found.requested, found.source, found.name) == ("adaptive", "adaptive", engine)
    assert (
        type(found.engine).__name__
        == {"in-memory": "InMemoryEngine", "streaming": "StreamingEngine"}[engine]
    )
    assert found.message.startswith(f"the {engine} engine runs: it reads ")
    collector.close()  # the result may be there before the last event
    assert [each.engine for each in events] == ["adaptive", engine, engine]


def test_engine_is_not_known_before_the_query_is_looked_at(make, block):
    collector = make(max_running=1)
    blocked = block()
    running = collector.collect_async(blocked.lf)
    assert blocked.started.wait(LIMIT)
    handle = collector.collect_async(SMALL, engine="adaptive")
    assert handle.resolution.name == "adaptive"
    assert "is chosen when the query starts" in handle.resolution.message
    block.free()
    running.result(LIMIT)
    handle.result(LIMIT)
    assert handle.resolution.name == "in-memory"


def test_query_that_is_estimated_in_the_queue_is_chosen_for_by_then(make, block):
    collector = make(max_running=2)
    for each in (block(), block()):
        collector.collect_async(each.lf, priority=1)
        assert each.started.wait(LIMIT)
    handles = [collector.collect_async(SMALL, engine="adaptive") for _ in range(3)]
    assert not any(each.done() for each in handles)
    block.free()
    for handle in handles:
        handle.result(LIMIT)
        assert handle.resolution.name == "in-memory"


def test_frames_together_are_chosen_for_together(adapting):
    handle = adapting.collect_all_async([SMALL, LARGE])
    assert [each.height for each in handle.result(LIMIT)] == [3, 1]
    assert handle.resolution.name == "streaming"


def test_batches_and_sinks_stream_whatever_they_read(adapting, tmp_path):
    async def batches():
        stream = adapting.collect_batches_async(SMALL)
        assert stream.resolution.name == "streaming"
        return [each async for each in stream]

    assert sum(each.height for each in asyncio.run(batches())) == 3
    sunk = adapting.sink_async(SMALL.sink_parquet(tmp_path / "sink.parquet", lazy=True))
    sunk.result(LIMIT)
    assert (sunk.resolution.name, sunk.resolution.source) == ("streaming", "adaptive")


def test_schema_needs_no_engine(adapting):
    assert adapting.collect_schema_async(SMALL).result(LIMIT) == {"a": pl.Int64}


def test_affinity_that_names_no_engine_is_still_told(monkeypatch):
    monkeypatch.setenv("POLARS_ENGINE_AFFINITY", "cuda")
    collector = pa.Collector(default_engine="adaptive")
    with pytest.warns(pa.EngineDowngradeWarning, match="is expected to be the fastest runs"):
        handle = collector.collect_async(SMALL)
    handle.result(LIMIT)
    assert handle.resolution.message.startswith("POLARS_ENGINE_AFFINITY='cuda' names no engine")
    assert "Here the in-memory engine runs: it reads" in handle.resolution.message
    collector.close()


def test_default_collector_adapts_by_the_variable(monkeypatch):
    monkeypatch.setenv("POLARS_ASYNC_ENGINE", "adaptive")
    monkeypatch.setattr(api._Default, "collector", None)
    handle = pa.collect_async(LARGE)
    handle.result(LIMIT)
    assert (handle.resolution.name, handle.resolution.source) == ("streaming", "adaptive")
    pa.default_collector().close()


def test_another_engine_is_tried_while_nothing_else_runs(make, monkeypatch):
    ran, noted = [], []
    collector = make(engine="adaptive", inline=0)
    times = collector._chooser._times

    def note_fixed_time(choice, _, *, alone):
        EngineTimes.note(times, choice, 2.0 if choice.engine == "streaming" else 1.0, alone=alone)
        noted.append(choice)

    monkeypatch.setattr(times, "note", note_fixed_time)
    for number in range(1, 13):
        handle = collector.collect_async(SMALL)
        handle.result(LIMIT)
        ran.append(handle.resolution.name)
        until(lambda number=number: len(noted) == number)  # which is after the result
    assert ran[:8] == ["in-memory"] * 8
    assert ran.count("streaming") == 1


def test_nothing_is_tried_beside_another_query(make, block):
    collector = make(engine="adaptive", inline=0)
    blocked = block()
    collector.collect_async(blocked.lf, engine="in-memory")
    assert blocked.started.wait(LIMIT)
    for _ in range(12):
        handle = collector.collect_async(SMALL)
        handle.result(LIMIT)
        assert handle.resolution.name == "in-memory"


@pytest.mark.parametrize(
    "lf",
    [
        SMALL.map_batches(lambda frame: frame),
        SMALL.select(pl.col("a").map_elements(round, return_dtype=pl.Int64)),
        pl.io.plugins.register_io_source(
            lambda *_: iter([SMALL.collect()]), schema={"a": pl.Int64}
        ),
    ],
    ids=["map_batches", "map_elements", "source"],
)
def test_python_functions_and_sources_are_not_tried_elsewhere(adapting, lf):
    for _ in range(12):
        handle = adapting.collect_async(lf)
        handle.result(LIMIT)
        assert handle.resolution.name == DEFAULT_ENGINE
        assert "Python" in handle.resolution.message


def test_error_of_a_query_is_its_own(adapting):
    handle = adapting.collect_async(SMALL.select("b"))
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        handle.result(LIMIT)
    assert handle.resolution.name == "in-memory"


def test_time_of_a_query_that_failed_tells_nothing(adapting):
    failing = pl.DataFrame({"a": ["x"]}).lazy().select(pl.col("a").cast(pl.Int64))
    with pytest.raises(pl.exceptions.InvalidOperationError):
        adapting.collect_async(failing).result(LIMIT)
    until(lambda: not adapting.stats()["running"])
    assert adapting._chooser._times._shapes == {}


@pytest.mark.parametrize(("rows", "pooled"), [(1, True), (1 << 19, False)])
def test_slot_knows_where_the_chosen_engine_computes(make, block, monkeypatch, rows, pooled):
    monkeypatch.setattr(estimates, "memory_held", lambda: 1 << 30)
    collector = make(engine="adaptive")
    wide = pl.select(b=pl.int_range(rows)).lazy()
    blocked = block()
    monkeypatch.setattr(adaptive, "DEFAULT_ENGINE", "in-memory" if pooled else "streaming")
    handle = collector.collect_async(wide.join(blocked.lf, how="cross"))
    assert blocked.started.wait(LIMIT)
    [slot] = collector._cpu.admission._slots
    assert slot.load.pooled is pooled
    block.free()
    handle.result(LIMIT)


@pytest.mark.parametrize("executor", ["processes", "auto"])
def test_workers_run_the_engine_that_was_chosen(make, executor):
    collector = make(engine="adaptive", executor=executor, max_running=1)
    handle = collector.collect_async(LARGE)
    assert handle.result(LIMIT).height == 1
    assert handle.resolution.name == "streaming"


def test_cancelled_query_keeps_no_frame(make, block):
    collector = make(max_running=1, engine="adaptive")
    blocked = block()
    collector.collect_async(blocked.lf, engine="in-memory")
    assert blocked.started.wait(LIMIT)
    handle = collector.collect_async(LARGE)
    assert handle.cancel()
    assert handle._query.frames == ()
    block.free()


# The GPU


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(adaptive_gpu, "_LARGE", 1 << 20)
    monkeypatch.setattr(
        adaptive_gpu, "gpu_support", lambda _: pa.GpuSupport(answer=pa.Support.YES, message="")
    )
    with simulate_gpu() as gpu:
        yield gpu


def ran_on(collector, lf=LARGE):
    handle = collector.collect_async(lf)
    handle.result(LIMIT)
    return handle.resolution


def test_large_query_runs_on_the_gpu_where_it_may(make, gpu):
    events = []
    collector = make(engine="adaptive", gpu="offload", on_event=events.append)
    found = ran_on(collector)
    assert (found.name, found.source, found.downgraded) == ("gpu", "adaptive", False)
    assert found.gpu.usable
    assert found.message.startswith("the GPU engine runs: it reads ")
    assert gpu.queries == 1
    until(lambda: not collector.stats()["running"])
    assert [(each.kind, each.engine) for each in events] == [
        ("queued", "adaptive"),
        ("started", "gpu"),
        ("finished", "gpu"),
    ]
    stats = collector.stats()
    assert (stats["submitted"], stats["completed"]) == (1, 1)


@pytest.mark.parametrize(
    "rule", ["policy", "small", "memory", "support", "no GPU", "python", "nested"]
)
def test_gpu_is_not_taken_where_a_rule_forbids_it(make, gpu, monkeypatch, rule):
    lf, options, asked = LARGE, {"gpu": "offload"}, []
    if rule == "policy":
        options = {"gpu": "downgrade"}
        monkeypatch.setattr(adaptive_gpu, "gpu_status", lambda: asked.append("the driver"))
    elif rule == "small":
        lf = SMALL
    elif rule == "memory":
        monkeypatch.setattr(adaptive_gpu, "_MEMORY", 1e6)
    elif rule == "support":
        no = pa.GpuSupport(answer=pa.Support.NO, message="")
        monkeypatch.setattr(adaptive_gpu, "gpu_support", lambda _: no)
    elif rule == "python":
        monkeypatch.setattr(adaptive_gpu, "_LARGE", 0)
        lf = SMALL.map_batches(lambda frame: frame)
    collector = make(engine="adaptive", **options)
    if rule == "no GPU":
        with simulate_gpu(0):
            assert ran_on(collector, lf).name != "gpu"
    elif rule == "nested":
        found = []

        def ask(frame):
            found.append(ran_on(collector).name)
            return frame

        collector.collect_async(SMALL.map_batches(ask), engine="in-memory").result(LIMIT)
        assert found == ["streaming"]
    else:
        assert ran_on(collector, lf).name != "gpu"
    assert gpu.queries == 0
    assert asked == []


@pytest.mark.parametrize("wrong", ["policy", "status", "support"])
def test_what_fails_about_the_gpu_leaves_the_query_to_the_cpu(make, gpu, monkeypatch, wrong):
    def fail(*_):
        raise pl.exceptions.PanicException

    if wrong == "policy":
        monkeypatch.setenv("POLARS_ASYNC_GPU", "maybe")
    else:
        monkeypatch.setattr(adaptive_gpu, f"gpu_{wrong}", fail)
    collector = make(engine="adaptive", gpu=None if wrong == "policy" else "offload")
    assert ran_on(collector).name == "streaming"
    assert gpu.queries == 0


@pytest.mark.filterwarnings("ignore::polars_async.EngineDowngradeWarning")
def test_query_that_the_gpu_cannot_run_goes_elsewhere_next_time(make, gpu):
    gpu.fail = "unsupported"
    collector = make(engine="adaptive", gpu="offload")
    found = ran_on(collector)
    assert (found.name, found.fell_back) == ("in-memory", True)
    until(lambda: not collector.stats()["running"])
    again = ran_on(collector)
    assert (again.name, again.fell_back) == ("in-memory", False)
    assert again.message.endswith("here, gpu failed")
