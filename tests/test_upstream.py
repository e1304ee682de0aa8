"""Whether Polars' private API is still what polars-async takes it for, and what if it is gone."""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import traceback
import types
from contextlib import suppress
from itertools import dropwhile
from pathlib import Path

import polars as pl
import pytest
from polars.io.plugins import register_io_source
from polars.lazyframe import engine, engine_config, in_process

import polars_async as pa
from polars_async._runtime import msgpack, upstream
from polars_async.executors.main_module import NAMESPACE_CLASSES

pytestmark = pytest.mark.smoke

QUERY = pl.LazyFrame({"a": [1, 2]}).sum()

linux = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="Linux alone lists the threads of a process"
)


def run(script, *arguments, **environment):
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    environment = {**os.environ, **environment}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=150
    )
    return json.loads(done.stdout)


# Polars' own


def test_every_name_is_polars_own_or_tested_here():
    assert set(upstream.__all__) == {
        "AUTO_ENGINE",
        "BUILT_IN_ENGINES",
        "CountingEngine",
        "DEFAULT_ENGINE",
        "DEFAULT_OPTIMIZATIONS",
        "GROWING",
        "InProcessQuery",
        "LIBRARY",
        "PACKAGE_FOLDER",
        "POOL_THREAD",
        "PICKLED",
        "PlanEnd",
        "PlanNodes",
        "PlanText",
        "SHARED_NAME",
        "affinity_override",
        "ask_optimized_plan",
        "blocking_threads",
        "counting_engine",
        "extensions_of",
        "forbids_cpu",
        "gpu_callback",
        "hands_over_here",
        "is_eager",
        "last_pickled",
        "map_ipc",
        "memory_held",
        "namespaces_of",
        "observed",
        "optimization_flags",
        "optimizations_of",
        "plan_nodes",
        "paths_of",
        "plan_bytes",
        "plan_text",
        "sets_affinity",
        "without_warning",
    }


@pytest.mark.parametrize("function", [pl.LazyFrame.collect, pl.LazyFrame.collect_async])
def test_default_optimizations_are_the_object_that_polars_passes(function):
    default = inspect.signature(function).parameters["optimizations"].default
    assert default is upstream.DEFAULT_OPTIMIZATIONS


class Observed:
    """Keeps what Polars tells of a query."""

    def __init__(self):
        self.told = []

    def planned(self, handle, plan):
        self.told.append((threading.get_ident(), handle, plan))


def test_query_observer_tells_the_plan_and_counts_the_rows(parquet):
    seen = Observed()
    engine = upstream.counting_engine(pl.StreamingEngine())
    assert isinstance(engine, upstream.CountingEngine)
    query = pl.concat([pl.scan_parquet(parquet).filter(pl.col("a") > 1), pl.LazyFrame({"a": [4]})])
    assert upstream.observed(seen, lambda: query.sum().collect(engine=engine)).item() == 9
    ((thread, handle, plan),) = seen.told
    assert thread == threading.get_ident()
    nodes = {node["id"]: node for node in msgpack.read(plan)}
    counts = msgpack.read(handle.snapshot_query_metrics())
    counts = {
        node["phys_node_key"]: node
        for node in (counts["nodes"] if isinstance(counts, dict) else counts)
    }
    sources = {
        node["properties"]["type"]: (node["properties"], counts[key])
        for key, node in nodes.items()
        if not node["input_ids"]
    }
    assert set(sources) == {"MultiScan", "InMemorySource"}
    scan, counted = sources["MultiScan"]
    assert (scan["scan_type"], scan["num_sources"]) == ("parquet", 1)
    assert (scan["first_source"], scan["projected_file_columns"]) == (str(parquet), ["a"])
    assert scan["predicate"]
    assert scan["pre_slice"] is None
    assert (counted["rows_sent"], counted["done"]) == (2, True)
    assert counted["io_total_bytes_received"] >= 0
    assert counted["total_time_ns"] > 0
    frame, counted = sources["InMemorySource"]
    assert (frame["n_rows"], counted["rows_sent"]) == (1, 1)


def test_query_observer_is_told_of_no_query_but_the_one_that_is_observed():
    seen = Observed()
    engine = upstream.counting_engine(pl.StreamingEngine())
    QUERY.collect(engine=engine)
    upstream.observed(seen, lambda: QUERY.collect(engine="streaming"))
    assert seen.told == []
    assert "polars_cloud" not in sys.modules


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "three.parquet"
    pl.DataFrame({"a": [1, 2, 3]}).write_parquet(path)
    return path


def test_text_of_a_plan_has_the_keys_that_are_looked_for(parquet):
    frame = pl.DataFrame({"a": range(10)}).lazy()
    text, frame_bytes, end = upstream.plan_text(frame.filter(pl.col("a") > 1).select("a"), 10_000)
    assert end is upstream.PlanEnd.WHOLE
    select = json.loads(text)["Select"]
    assert select["expr"] == [{"Column": "a"}]
    scan = select["input"]["Filter"]["input"]["DataFrameScan"]
    assert set(scan) == {"df", "schema"}
    assert frame_bytes == len(scan["df"]) - 1
    text = upstream.plan_text(pl.scan_parquet(parquet), 10_000).text
    assert f'"sources":{{"Paths":[{{"inner":"{parquet}"}}]'.encode() in text
    frame.collect_schema()
    text = upstream.plan_text(frame, 10_000).text
    assert text.startswith(b'{"IR":{"dsl":{"DataFrameScan":{"df":[')
    assert re.search(rb',"version":\d+\}\}$', text)
    piped = upstream.plan_text(frame.pipe_with_schema(lambda lf, _: lf), 10_000).text
    assert piped.startswith(b'{"PipeWithSchema":{"input":[')


def test_text_of_a_plan_ends_at_the_limit_and_before_what_cannot_be_sent():
    large = pl.select(a=pl.int_range(0, 100_000)).lazy().sort("a")
    text, frame_bytes, end = upstream.plan_text(large, 200_000)
    assert end is upstream.PlanEnd.LIMIT
    assert text.startswith(b'{"Sort":{"input":{"DataFrameScan":{"df":[')
    assert len(text) < 20_000 < frame_bytes  # the numbers are counted, not kept
    text, _, end = upstream.plan_text(QUERY.sink_csv(io.BytesIO(), lazy=True), 20_000)
    assert (end, text[:9]) == (upstream.PlanEnd.UNSENDABLE, b'{"Sink":{')


def test_text_of_a_plan_ends_before_a_python_object_which_is_not_pickled(monkeypatch):
    def pickled(*_):
        raise AssertionError("it was pickled")

    monkeypatch.setattr(pickle, "dumps", pickled)
    text, _, end = upstream.plan_text(QUERY.map_batches(pickled), 10_000)
    assert end is upstream.PlanEnd.PYTHON
    assert text.endswith(b'"OpaquePython":{"function":')


def test_function_that_was_pickled_before_has_the_mark_that_is_looked_for():
    plan = QUERY.select(pl.col("a").map_batches(os.getpid))
    again = pl.LazyFrame.deserialize(io.BytesIO(plan.serialize()))
    assert upstream.PICKLED in upstream.plan_text(again, 100_000).text


def test_function_that_cannot_be_packed_is_the_last_that_polars_gives_to_cloudpickle():
    lock = threading.Lock()

    def locked(values):
        return lock and values

    fine = QUERY.map_batches(lambda frame: frame)
    assert upstream.last_pickled(fine.map_batches(locked)) is locked
    assert upstream.last_pickled(QUERY) is None
    assert sys.getprofile() is None


def test_namespaces_of_a_class_are_those_that_were_registered():
    assert all(not upstream.namespaces_of(kind) for kind in NAMESPACE_CLASSES)
    try:
        pl.api.register_series_namespace("of_a_test")(object)
        assert upstream.namespaces_of(pl.Series) == ["of_a_test"]
    finally:
        del pl.Series.of_a_test
        pl.Series._accessors.discard("of_a_test")


def test_memory_that_polars_holds_is_known():
    before = upstream.memory_held()
    frame = pl.select(a=pl.int_range(0, 10_000_000).cast(pl.Float64))
    assert upstream.memory_held() - before > frame.estimated_size() / 2


def test_optimized_plan_is_what_polars_hands_to_cudf_polars(monkeypatch):
    handed = []
    module = types.ModuleType("cudf_polars")
    module.execute_with_cudf = lambda plan, *_, **__: handed.append(nodes(plan))
    monkeypatch.setitem(sys.modules, "cudf_polars", module)
    query = pl.LazyFrame({"a": [1, 2]}).sort("a").slice(1, 2).filter(pl.col("a") > 1)
    optimizations = [pl.QueryOptFlags(), pl.QueryOptFlags.none()]
    for flags in optimizations:
        query.collect(engine="gpu", optimizations=flags)
    shown = [upstream.ask_optimized_plan(query, flags, nodes) for flags in optimizations]
    assert shown == handed
    assert handed[0] != handed[1]


def nodes(plan):
    """Tell the kinds of the nodes from the root of a plan of one branch."""
    kinds = [type(plan.view_current_node()).__name__]
    while inputs := plan.get_inputs():
        plan.set_node(inputs[0])
        kinds.append(type(plan.view_current_node()).__name__)
    return kinds


def test_query_whose_plan_is_asked_for_does_not_run():
    def run(_):
        raise AssertionError("it runs")

    query = QUERY.map_batches(run, schema={"a": pl.Int64})
    assert upstream.ask_optimized_plan(query, pl.QueryOptFlags(), lambda _: "asked") == "asked"


def test_optimized_plan_raises_what_is_wrong_with_the_query_or_the_question():
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match='"b"'):
        upstream.ask_optimized_plan(QUERY.select("b"), pl.QueryOptFlags(), nodes)

    def refuse(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upstream.ask_optimized_plan(QUERY, pl.QueryOptFlags(), refuse)


@pytest.mark.parametrize("closed", ["_ldf", "_pyoptflags"])
def test_optimized_plan_of_a_polars_that_hands_out_none_is_none(monkeypatch, closed):
    plan, flags = QUERY.sum(), pl.QueryOptFlags()
    monkeypatch.setattr(plan if closed == "_ldf" else flags, closed, object())
    assert upstream.ask_optimized_plan(plan, flags, nodes) is None


WIDE = pl.select(a=pl.int_range(1000), b=pl.int_range(1000)).lazy()


def test_nodes_of_a_plan_tell_what_is_read(tmp_path):
    path = tmp_path / "data.parquet"
    WIDE.collect().write_parquet(path)
    wider = WIDE.collect().with_columns(c="a").lazy()
    grouped = wider.group_by(pl.col("a") % 7).agg(pl.col("b").sum())
    for query, size in ((WIDE, 16_000), (wider, 24_000), (grouped, 16_000)):
        assert size <= upstream.plan_nodes(query).frame_bytes < size + 100
    joined = upstream.plan_nodes(pl.scan_parquet(path).join(WIDE, on="a"))
    assert 16_000 <= joined.frame_bytes < 16_100
    assert joined.paths == [str(path)]
    assert 16_000 <= upstream.plan_nodes(pl.concat([WIDE, WIDE])).frame_bytes < 16_100


@pytest.mark.parametrize(
    "runs_python",
    [
        WIDE.map_batches(lambda frame: frame),
        WIDE.map_batches(lambda frame: frame).select("a").sort("a"),
        WIDE.group_by("a").map_groups(lambda frame: frame, schema=None),
        WIDE.select(pl.col("a").map_elements(round, return_dtype=pl.Int64) + 1),
        WIDE.filter(pl.col("a").map_batches(lambda a: a > 3, return_dtype=pl.Boolean)),
        WIDE.group_by("a").agg(pl.col("b").map_elements(len, return_dtype=pl.Int64)),
        WIDE.join(WIDE.map_batches(lambda frame: frame), on="a"),
        pl.io.plugins.register_io_source(lambda *_: iter([]), schema={"a": pl.Int64}),
    ],
)
def test_nodes_of_a_plan_tell_of_python(runs_python):
    assert upstream.plan_nodes(runs_python).runs_python


def test_nodes_of_a_plan_tell_what_is_like_it():
    plain = WIDE.filter(pl.col("a") > 3).group_by("b").agg(pl.col("a").sum())
    alike = WIDE.filter(pl.col("a") > 4).group_by("b").agg(pl.col("a").sum())
    others = (plain.sort("a"), WIDE.filter(pl.col("b") > 3).group_by("a").agg(pl.col("b").sum()))
    shape = upstream.plan_nodes(plain).shape
    assert upstream.plan_nodes(alike).shape == shape
    assert shape not in {upstream.plan_nodes(each).shape for each in others}
    assert not upstream.plan_nodes(plain).runs_python


def test_nodes_of_a_plan_that_polars_cannot_make_or_show_are_none(monkeypatch):
    assert upstream.plan_nodes(WIDE.select("c")) is None
    monkeypatch.setattr(WIDE, "_ldf", object())
    assert upstream.plan_nodes(WIDE) is None


def test_callback_of_the_gpu_engine_is_what_polars_would_call(monkeypatch):
    called = []
    module = types.ModuleType("cudf_polars")
    module.execute_with_cudf = lambda *given, config: called.append((len(given), config))
    monkeypatch.setitem(sys.modules, "cudf_polars", module)
    gpu, flags = pl.GPUEngine(), pl.QueryOptFlags()
    gpu.collect(QUERY, optimizations=flags)
    callback = upstream.gpu_callback(gpu)
    gpu.collect(QUERY, optimizations=flags, post_opt_callback=callback)
    assert called[0] == called[1]
    assert called[0][1] is gpu


@pytest.mark.parametrize("forbids", [True, False])
def test_gpu_engine_tells_whether_it_forbids_the_cpu(forbids):
    assert upstream.forbids_cpu(pl.GPUEngine(raise_on_fail=forbids)) is forbids
    assert not upstream.forbids_cpu(pl.InMemoryEngine())


@pytest.mark.parametrize("moved", [object(), lambda: None, lambda *, background: background])
def test_callback_of_a_polars_that_has_another_is_none(moved):
    gpu = pl.GPUEngine()
    gpu._post_opt_callback = moved
    assert upstream.gpu_callback(gpu) is None


def test_operations_on_frames_are_told_by_their_flags(monkeypatch):
    flags = []
    collect = pl.InMemoryEngine.collect

    def note(self, lf, *, optimizations, **options):
        flags.append(optimizations)
        return collect(self, lf, optimizations=optimizations, **options)

    monkeypatch.setattr(pl.InMemoryEngine, "collect", note)
    pl.DataFrame({"a": [1]}).select("a")
    QUERY.collect(engine="in-memory")
    assert [upstream.is_eager(each) for each in flags] == [True, False]
    assert not upstream.is_eager(object())


def test_background_query_is_polars_own():
    assert upstream.InProcessQuery is in_process.InProcessQuery
    assert isinstance(
        QUERY.collect(background=True, engine=pa.AsyncEngine()), upstream.InProcessQuery
    )


def test_background_query_replaces_all_that_polars_own_can_do():
    public = {name for name in vars(in_process.InProcessQuery) if not name.startswith("_")}

    assert public == {"cancel", "fetch", "fetch_blocking"}
    for name in public:
        own, theirs = getattr(pa.BackgroundQuery, name), getattr(in_process.InProcessQuery, name)
        assert own is not theirs
        assert list(inspect.signature(own).parameters) == list(inspect.signature(theirs).parameters)


def test_affinity_override_is_polars_own():
    assert upstream.affinity_override is engine_config.get_engine_affinity_override

    with pl.Config():
        assert upstream.affinity_override() is None
        own = pl.StreamingEngine()
        pl.Config.set_engine_affinity(own)
        assert upstream.affinity_override() is own
        pl.Config.set_engine_affinity("streaming")
        assert upstream.affinity_override() is None


def test_engine_is_asked_for_its_class_before_the_variable_goes(monkeypatch):
    class Asked(pl.InMemoryEngine):
        @property
        def __class__(self):
            variable = os.environ.get("POLARS_ENGINE_AFFINITY")
            asked.append((upstream.sets_affinity(), variable))
            return type(self)

    asked, engine = [], Asked()
    monkeypatch.setenv("POLARS_ENGINE_AFFINITY", "streaming")
    QUERY.collect(engine=engine)
    assert isinstance(engine, pl.LazyFrame | pl.InMemoryEngine)
    assert (True, "streaming") not in asked
    with pl.Config():
        pl.Config.set_engine_affinity(engine)
        assert "POLARS_ENGINE_AFFINITY" not in os.environ

    assert (True, "streaming") in asked


@pytest.mark.parametrize("function", [pl.LazyFrame.sink_batches, register_io_source])
def test_function_that_polars_warns_of_is_had_without_the_warning(function):
    assert function.__name__ == upstream.without_warning(function).__name__
    assert upstream.without_warning(function) is not function
    assert upstream.without_warning(run) is run


def test_auto_engine_is_polars_own():
    assert type(upstream.AUTO_ENGINE) is engine._AutoEngine
    assert upstream.AUTO_ENGINE.name == "auto"


def test_auto_engine_does_not_ask_the_affinity():
    class Refusing(pl.InMemoryEngine):
        def collect(self, *_, **__):
            raise AssertionError("the affinity was asked")

    with pl.Config(engine_affinity=Refusing()):
        with pytest.raises(AssertionError, match="the affinity was asked"):
            QUERY.collect(engine="auto")
        assert QUERY.collect(engine=upstream.AUTO_ENGINE).item() == 3


class Spy(pl.InMemoryEngine):
    """An engine that notes the files of the frames between itself and the test."""

    files: list[str]

    def collect(self, *args, **options):
        called = [frame.filename for frame in traceback.extract_stack()[:-1]]
        self.files = list(dropwhile(lambda name: name != __file__, called))
        return super().collect(*args, **options)


@pytest.mark.parametrize(
    "call",
    [
        lambda spy: QUERY.collect(engine=spy),
        lambda spy: QUERY.collect(engine=spy, background=False, optimizations=pl.QueryOptFlags()),
        lambda spy: QUERY.execute(engine=spy),
        lambda spy: QUERY.sink_csv(io.BytesIO(), engine=spy),
        lambda spy: QUERY.sink_batches(lambda _: None, engine=spy),
    ],
    ids=["collect", "options", "execute", "sink_csv", "sink_batches"],
)
def test_package_folder_holds_every_frame_of_polars(call):
    spy = Spy()

    call(spy)

    polars = [name for name in spy.files if name != __file__]
    assert polars
    assert all(name.startswith(upstream.PACKAGE_FOLDER) for name in polars)
    assert spy.files[: -len(polars)] == [__file__] * 2


def test_package_folder_is_no_mere_beginning_of_a_name():
    assert f"{Path(pl.__file__).parent}{os.sep}" == upstream.PACKAGE_FOLDER


THREADS = """
import json, pathlib, re, sys, time
import polars as pl

def threads():
    found = {}
    for thread in pathlib.Path("/proc/self/task").iterdir():
        try:
            found[thread.name] = (thread / "comm").read_text().strip()
        except OSError:
            pass  # it has ended since
    return found

before = threads()
frame = pl.LazyFrame({"a": range(10_000)})
frame.sink_parquet(sys.argv[1])
for engine in ("in-memory", "streaming"):
    frame.group_by(pl.col("a") % 7).agg(pl.len()).sort("a").collect(engine=engine)
    pl.scan_parquet(sys.argv[1]).collect(engine=engine)
deadline = time.monotonic() + 20
while True:
    # A thread has the name of the process until it names itself.
    new = [name for thread, name in threads().items() if thread not in before]
    if not {before[min(before, key=int)]} & {*new} or time.monotonic() > deadline:
        break
    time.sleep(0.01)
print(json.dumps([[*before.values()], new]))
"""


@linux
def test_names_of_polars_threads_are_its_own_but_for_those_of_one_pool(tmp_path):
    before, after = run(THREADS, tmp_path / "frame.parquet", POLARS_MAX_THREADS="11")

    assert not [name for name in before if upstream.POOL_THREAD.match(name)]
    assert upstream.SHARED_NAME not in before
    # The allocator has a thread of its own, on which no query runs.
    pools = [name for name in after if not name.startswith(("jemalloc", upstream.SHARED_NAME))]
    assert [name for name in pools if not upstream.POOL_THREAD.match(name)] == []
    kinds = {upstream.POOL_THREAD.match(name).group() for name in pools}
    assert {kind.rstrip("0123456789") for kind in kinds} == {"polars-", "async-executor"}
    assert upstream.SHARED_NAME in after


BLOCKING = """
import json, threading, warnings
import polars as pl
from polars_async._runtime.upstream import blocking_threads

told = []
all_busy, gate = threading.Event(), threading.Event()

def show(message, *_, **__):
    told.append(str(message))
    all_busy.set()

def put(batch):
    gate.wait()
    return True

def ask():
    pl.LazyFrame({"a": [1]}).sink_batches(put, engine="streaming")

warnings.simplefilter("always")
warnings.showwarning = show
threads = [threading.Thread(target=ask) for _ in range(blocking_threads() + 1)]
for thread in threads:
    thread.start()
all_busy.wait(40)
gate.set()
for thread in threads:
    thread.join()
print(json.dumps([blocking_threads(), told]))
"""


@pytest.mark.parametrize("wanted", [None, 3])
def test_polars_blocks_on_as_many_threads_as_told(wanted):
    environment = {} if wanted is None else {"POLARS_MAX_BLOCKING_THREAD_COUNT": str(wanted)}
    most, told = run(BLOCKING, **environment)
    assert most == (wanted or 512)
    assert [f"POLARS_MAX_BLOCKING_THREAD_COUNT reached ({most})" in each for each in told] == [True]


# Without it

GUARDED = """
import json, sys
import polars as pl
from polars.io.plugins import register_io_source
from polars.io.plugins import register_io_source
from polars.io.plugins import register_io_source
from polars.lazyframe import engine, engine_config, in_process
{breakage}
import polars_async as pa
from polars_async._runtime import upstream

query, plugin = pl.LazyFrame({{"a": [1, 2]}}).sum(), pa.AsyncEngine()
answers = [
    pa.collect_async(query).result(30),
    *pa.collect_all_async([query], engine="streaming").result(30),
    query.collect(engine=plugin),
    *query.collect_batches(engine=plugin),
    query.collect(engine=plugin, background=True).fetch_blocking(),
    query.collect_async(engine=plugin).result(30),
]
print(json.dumps([
    [answer.item() for answer in answers],
    upstream.InProcessQuery.__module__,
    str(upstream.affinity_override()),
    pa.resolve_engine(path="sync").name,
    pa.resolve_engine().name,
]))
"""
WHOLE = {"query": "polars.lazyframe.in_process", "sync": "auto"}


@pytest.mark.parametrize(
    ("breakage", "stands_in"),
    [
        ("", {}),
        ("del in_process.InProcessQuery", {"query": "polars_async._runtime.upstream.engines"}),
        (
            "sys.modules[in_process.__name__] = None",
            {"query": "polars_async._runtime.upstream.engines"},
        ),
        ("del engine_config.get_engine_affinity_override", {}),
        ("sys.modules[engine_config.__name__] = None", {}),
        ("del engine._AutoEngine", {"sync": "in-memory"}),
        ("sys.modules[engine.__name__] = None", {"sync": "in-memory"}),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_queries_run_without_what_polars_took_away(breakage, stands_in):
    found = run(GUARDED.format(breakage=breakage))

    expected = {**WHOLE, **stands_in}
    assert found == [[3] * 6, expected["query"], "None", expected["sync"], "in-memory"]


def test_object_of_config_is_not_seen_where_polars_does_not_tell_of_it():
    breakage = """
pl.Config.set_engine_affinity(pl.StreamingEngine())
del engine_config.get_engine_affinity_override
"""
    assert run(GUARDED.format(breakage=breakage))[2:] == ["None", "auto", "in-memory"]


@pytest.mark.parametrize(
    "make",
    [pl.QueryOptFlags, pl.QueryOptFlags.none, pl.QueryOptFlags._eager],
    ids=["all", "none", "eager"],
)
def test_optimizations_are_taken_apart_and_put_together_again(make):
    before = make()
    flags = upstream.optimization_flags(before)
    after = upstream.optimizations_of(flags)
    assert upstream.optimization_flags(after) == flags
    assert upstream.is_eager(after) is upstream.is_eager(before)
    assert after.predicate_pushdown is before.predicate_pushdown
    assert {"predicate_pushdown", "comm_subplan_elim", "eager"} <= set(flags)


def test_optimizations_without_their_private_half_are_the_public_flags():
    class Public:
        predicate_pushdown = False

    assert upstream.optimization_flags(Public()) == {"predicate_pushdown": False}


def test_optimization_that_this_release_does_not_know_is_left_out():
    after = upstream.optimizations_of({"predicate_pushdown": False, "of_another_release": True})
    assert not after.predicate_pushdown


def test_built_in_engines_are_settings_and_no_more():
    assert len(upstream.BUILT_IN_ENGINES) == 4
    for kind in upstream.BUILT_IN_ENGINES:
        made = pickle.loads(pickle.dumps(kind()))
        assert (type(made), made.name) == (kind, kind().name)


@pytest.fixture
def ipc_file(tmp_path):
    """A file of a frame in two chunks, its path, and the frame."""
    frame = pl.concat([pl.DataFrame({"a": [1, None], "b": ["x", "y"]})] * 3, rechunk=False)
    path = str(tmp_path / "frame.arrow")
    frame.write_ipc(path)
    with open(path, "rb") as file:  # noqa: PTH123
        yield file.fileno(), path, frame


@pytest.mark.parametrize(
    "way", [*upstream.ipc._ways_to_map, None], ids=lambda way: str(way and way.__name__)
)
def test_ipc_file_is_mapped_or_else_read(ipc_file, monkeypatch, way):
    file, path, frame = ipc_file
    monkeypatch.setattr(upstream.ipc, "_ways_to_map", () if way is None else (way,))
    found = upstream.map_ipc(file, dict(frame.schema))
    assert found.equals(frame)
    assert (path in Path("/proc/self/maps").read_text()) is (way is not None)


def test_ipc_file_that_maps_to_another_schema_is_read(ipc_file, monkeypatch):
    file, _, frame = ipc_file
    monkeypatch.setattr(upstream.ipc, "_ways_to_map", (lambda _: pl.DataFrame({"a": ["1"]}),))
    assert upstream.map_ipc(file, dict(frame.schema)).equals(frame)


def test_ipc_file_is_had_without_pyarrow(ipc_file, monkeypatch):
    file, _, frame = ipc_file
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError):
        upstream.ipc._map_with_pyarrow(file)
    assert upstream.map_ipc(file, dict(frame.schema)).equals(frame)


def packed(lf, path):
    """Give what Polars packs of a plan, up to where it gives up."""
    with suppress(pl.exceptions.ComputeError):
        lf.serialize(path)
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore:.*unstable")
def test_plan_of_a_sink_that_hands_over_to_this_process_is_told_from_others(tmp_path):
    lf = pl.LazyFrame({"a": [1]})
    lock = threading.Lock()

    def parts(**options):
        return pl.PartitionBy(tmp_path, key="a", **options)

    for here, plan in (
        (True, lf.sink_batches(print, lazy=True)),
        (True, lf.sink_batches(lambda _: lock and None, lazy=True)),
        (True, lf.sink_csv(io.BytesIO(), lazy=True)),
        (True, lf.sink_ndjson(parts(file_path_provider=print), lazy=True)),
        (True, lf.sink_ipc(tmp_path / "a", sinked_paths_callback=print, lazy=True)),
        (False, lf.sink_csv(tmp_path / "a", lazy=True)),
        (False, lf.sink_parquet(parts(), lazy=True)),
        (False, lf.map_batches(print)),
        (False, lf.map_batches(lambda _: lock)),
        (False, lf.map_batches(lambda _: lock).sink_csv(tmp_path / "a", lazy=True)),
    ):
        data = packed(plan, tmp_path / "plan")
        assert upstream.hands_over_here(io.BytesIO(data)) is here, plan


def test_no_data_and_no_text_in_a_plan_look_like_such_a_sink(tmp_path):
    data = packed(pl.LazyFrame({"a": [1]}).sink_batches(print, lazy=True), tmp_path / "plan")
    text = data.decode("latin-1")
    lf = pl.LazyFrame({"data": [data], "text": [text], text: [1]})
    plan = packed(lf.with_columns(pl.lit(data).alias("bytes"), pl.lit(text)), tmp_path / "plan")
    assert not upstream.hands_over_here(io.BytesIO(plan))


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_such_a_sink_is_found_wherever_it_begins(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(upstream.serialized, "_PIECE", piece)
    data = packed(pl.LazyFrame({"a": [1]}).sink_batches(print, lazy=True), tmp_path / "plan")
    assert upstream.hands_over_here(io.BytesIO(data))


@pytest.mark.filterwarnings("ignore:.*unstable")
def test_extension_types_of_a_plan_are_found():
    names = {"short", "longer than that " * 6}
    frame = pl.DataFrame({"a": [1, None]})
    for name in names:
        kind = pl.Extension(name, pl.Int64, "text")
        frame = frame.with_columns(pl.Series(name, [1, 2]).ext.to(kind))
    inner = frame.select(pl.struct(pl.all()).alias("s")).select(pl.concat_list("s").alias("l"))
    assert upstream.extensions_of(frame.lazy().serialize()) == names
    assert upstream.extensions_of(inner.lazy().serialize()) == names
    to = pl.LazyFrame({"a": [1]}).select(pl.col("a").ext.to(pl.Extension("short", pl.Int64)))
    assert upstream.extensions_of(to.serialize()) == {"short"}
    assert upstream.extensions_of(pl.LazyFrame({"Extension": ["name"]}).serialize()) == set()


# Packed plans


def test_plan_is_packed_in_the_same_bytes_each_time_it_is_made(tmp_path):
    path = tmp_path / "ä.parquet"
    pl.DataFrame({"a": [1]}).write_parquet(path)

    def make(number):
        return pl.scan_parquet([path, str(path) * 3]).select(pl.col("a") + number)

    plan = upstream.plan_bytes(make(1), 10_000)
    assert plan == make(1).serialize() == upstream.plan_bytes(make(1), 10_000)
    assert plan != upstream.plan_bytes(make(2), 10_000)
    assert upstream.paths_of(plan) == [str(path), str(path) * 3]
    assert upstream.plan_bytes(make(1), 10) is None


def test_paths_of_many_files_are_read_in_a_packed_plan():
    paths = [f"/not/there/{number}" for number in range(100)] + ["x" * 300]
    lf = pl.concat([pl.scan_parquet(paths, schema={"a": pl.Int64}), pl.LazyFrame({"a": [1]})])
    plan = upstream.plan_bytes(lf, 100_000)
    assert upstream.paths_of(plan) == paths
    assert upstream.paths_of(plan[: plan.index(b"/not/there/50")]) is None


def test_plan_with_a_function_is_not_packed_and_nothing_is_pickled():
    class Function:
        def __call__(self, frame):
            return frame

        def __reduce__(self):
            pytest.fail("it was pickled")

    assert upstream.plan_bytes(QUERY.map_batches(Function()), 100_000) is None
