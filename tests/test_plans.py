"""What a look at a plan tells, and that it neither calls, opens nor holds up anything."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import polars as pl
import pytest
from places import Notes
from polars.io.plugins import register_io_source
from polars.plugins import register_plugin_function

from polars_async import Collector
from polars_async._runtime import plans
from polars_async._runtime.plans import NOTHING, look_at
from polars_async.scheduling import query

ONE = pl.LazyFrame({"a": [1], "b": ["x"]})
LARGER = pl.LazyFrame({"a": range(1000), "b": ["x"] * 1000})
"""In whose text there is more than one piece."""
LARGE = pl.select(a=pl.int_range(0, 1_000_000) * 7919).lazy()
"""More than anybody looks at."""
A = pl.col("a")
INT = pl.Int64


class Called:
    """A function that notes whatever is done with it."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, *arguments, **_):
        self.calls.append("called")
        return arguments[0]

    def __reduce__(self):
        self.calls.append("pickled")
        return int, ()

    def __getstate__(self):
        self.calls.append("pickled")
        return {}

    @property
    def closure(self):
        def closure(*arguments):
            return self(*arguments)

        return closure


USES = {
    "map_batches of frames": lambda lf, f: lf.map_batches(f),
    "map_batches": lambda lf, f: lf.select(A.map_batches(f)),
    "map_batches with a type": lambda lf, f: lf.select(A.map_batches(f, return_dtype=INT)),
    "map_elements": lambda lf, f: lf.with_columns(A.map_elements(f)),
    "map_elements with a type": lambda lf, f: lf.filter(A.map_elements(f, return_dtype=INT) > 0),
    "two functions": lambda lf, f: lf.select(A.map_batches(f), c=A.map_batches(f)),
    "in a group": lambda lf, f: lf.group_by("b").agg(A.map_batches(f)),
    "map_groups": lambda lf, f: lf.group_by("b").map_groups(f, schema=None),
    "polars.map_batches": lambda lf, f: lf.select(pl.map_batches(["a"], f)),
    "rolling_map": lambda lf, f: lf.select(A.rolling_map(f, 2)),
    "fold": lambda lf, f: lf.select(pl.fold(0, f, [A])),
    "reduce": lambda lf, f: lf.select(pl.reduce(f, [A])),
    "names": lambda lf, f: lf.select(A.name.map(f)),
    "rename": lambda lf, f: lf.rename(f),
    "pipe_with_schema": lambda lf, f: lf.pipe_with_schema(f),
    "after a sort": lambda lf, f: lf.sort("a").head(5).unique().select(A.map_batches(f)),
}


@pytest.mark.parametrize("as_closure", [False, True], ids=["object", "closure"])
@pytest.mark.parametrize("frame", [ONE, LARGER], ids=["small", "larger"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_python_function_is_seen_but_neither_called_nor_pickled(use, frame, as_closure):
    calls = []
    function = Called(calls)
    plan = use(frame, function.closure if as_closure else function)
    found = look_at(plan)
    assert calls == []
    assert found.runs_python
    assert not found.is_whole
    assert found.is_sendable


PICKLED = {
    "pickle of the frame": lambda lf: pickle.loads(pickle.dumps(lf)),
    "text": lambda lf: pl.LazyFrame.deserialize(io.BytesIO(lf.serialize())),
    "twice": lambda lf: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(lf)))),
}


@pytest.mark.parametrize("through", PICKLED.values(), ids=PICKLED)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_python_function_is_seen_in_a_plan_that_was_pickled(use, through):
    plan = through(use(ONE, lambda *arguments: arguments[0]))
    assert look_at(plan).runs_python


def test_python_function_is_seen_in_an_expression_that_was_pickled():
    typed = A.map_elements(lambda value: value, return_dtype=INT)
    assert look_at(ONE.select(pickle.loads(pickle.dumps(typed)))).runs_python
    assert look_at(ONE.select(pl.Expr.deserialize(io.BytesIO(typed.meta.serialize())))).runs_python


def test_compiled_plugin_is_seen_and_not_loaded(tmp_path):
    path = tmp_path / "none.so"  # which is none
    path.touch()
    plugin = register_plugin_function(
        plugin_path=path, function_name="f", args=[A], use_abs_path=True
    )
    for frame in (ONE, LARGER):
        assert look_at(frame.select(plugin)).runs_python


def test_text_before_a_python_function_tells_shapes_apart():
    def shape(*columns):
        return look_at(ONE.select(*columns).map_batches(lambda frame: frame)).shape

    assert shape("a") == shape("a") != shape("a", "b")
    assert look_at(pl.scan_parquet("s3://none/a.parquet")).paths == ["s3://none/a.parquet"]


SOURCES = {
    "source": lambda f: register_io_source(f, schema={"a": INT}),
    "schema of a source": lambda f: register_io_source(f, schema=f),
    "credentials": lambda f: pl.scan_parquet("s3://none/a.parquet", credential_provider=f),
    "callback of a sink": lambda f: ONE.sink_batches(f, lazy=True),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_functions_of_sources_and_sinks_are_seen_but_neither_called_nor_pickled(make):
    calls = []
    plan = make(Called(calls).closure)
    assert look_at(plan).runs_python
    assert calls == []


@pytest.mark.parametrize("frame", [ONE, LARGER], ids=["small", "larger"])
def test_plan_without_python_is_known_to_be_without(frame):
    plan = frame.filter(A > 1).group_by("b").agg(A.sum()).sort("a").head(3)
    found = look_at(plan.join(frame, on="b"))
    assert (found.runs_python, found.is_whole, found.is_sendable) == (False, True, True)
    assert look_at(plan).summary == "Slice of Sort of GroupBy of Filter of DataFrameScan"


def test_size_of_frames_is_known_as_far_as_they_are_looked_at():
    frame = pl.DataFrame({"a": range(10_000)})
    size, lf = frame.estimated_size(), frame.lazy()
    assert 0 < look_at(ONE).frame_bytes < 2000
    for plan, frames in ((lf.filter(A > 1).select("a"), 1), (lf.join(lf, on="a"), 2)):
        assert look_at(plan, plans.FAR).frame_bytes == pytest.approx(frames * size, rel=0.1)
    assert 1_500_000 < look_at(LARGE, plans.FAR).frame_bytes < 4_000_000


COLUMNS = {
    "numbers": lambda rows: pl.select(a=pl.int_range(0, rows) * 7919, b=pl.lit(1.5)),
    "texts": lambda rows: pl.select(a=pl.int_range(0, rows).cast(pl.String)),
    "lists": lambda rows: pl.select(a=pl.concat_list(pl.int_range(0, rows), 1)),
    "missing": lambda rows: pl.select(a=pl.when(pl.int_range(0, rows) > 9).then(1)),
    "many": lambda rows: pl.DataFrame({f"column {n}": range(rows // 100) for n in range(100)}),
}


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("rows", [30_000, 200_000])
def test_size_of_a_large_frame_is_read_and_not_the_frame(columns, rows):
    frame = columns(rows)
    found = look_at(frame.lazy().head(3).sum(), plans.NEAR)
    # Arrow's format takes 16 bytes for each text, however short, and 8 for where a list begins.
    assert frame.estimated_size() * 0.9 < found.frame_bytes < frame.estimated_size() * 4
    assert (found.is_sized, found.is_whole, found.runs_python) == (True, False, None)


def test_size_of_a_frame_of_many_chunks_is_known_by_its_order():
    # Polars writes a frame of so many rows in chunks, and the first tells nothing of the others.
    found = look_at(pl.select(a=pl.int_range(0, 8_000_000) * 7919).lazy().sum(), plans.NEAR)
    assert 4_000_000 < found.frame_bytes < 2_000_000_000


@pytest.mark.parametrize("dtype", [pl.Categorical, pl.Enum(["x", "y"])], ids=repr)
def test_frame_with_categories_is_looked_at(dtype):
    frame = pl.DataFrame({"a": pl.Series(["x", "y"] * 50_000, dtype=dtype)})
    found = look_at(frame.lazy().head(1), plans.NEAR)
    assert 100_000 < found.frame_bytes < 1_000_000


def test_frame_that_was_split_is_at_least_as_large_as_its_first_part():
    part = pl.select(a=pl.int_range(0, 50_000))
    found = look_at(pl.concat([part, part], rechunk=False).lazy().head(1), plans.NEAR)
    assert 400_000 <= found.frame_bytes < 900_000


@pytest.mark.parametrize("limit", [plans.NEAR, plans.FAR])
def test_what_comes_after_a_large_frame_is_not_known(limit):
    for plan in (LARGE.sum(), LARGE.join(ONE, on="a"), pl.concat([LARGE, ONE.select("a")])):
        found = look_at(plan.select(A.map_batches(lambda s: s)), limit)
        assert found.runs_python in {None, True}
        assert not found.is_whole
        assert look_at(plan, limit).runs_python is None


def test_equal_shapes_of_other_numbers_look_the_same_however_large():
    def over(number, *, rows):
        frame = pl.select(a=pl.int_range(number, number + rows) * 7919).lazy()
        return frame.filter(number < A).select(A + number)

    for rows in (1, 1000, 20_000):
        shapes = {look_at(over(number, rows=rows)).shape for number in (1, 23, 456_789)}
        assert len(shapes) == 1
    assert look_at(over(1, rows=10)).shape != look_at(over(1, rows=10).sum()).shape


def test_scans_are_told_by_their_paths_and_not_opened(tmp_path):
    fifo = tmp_path / 'a "pipe".csv'  # to open it would wait for a writer
    os.mkfifo(fifo)
    missing = [str(tmp_path / "1.parquet"), str(tmp_path / "é.parquet")]
    plan = pl.scan_csv(fifo).join(pl.scan_parquet(missing), on="a")
    found = look_at(plan)
    assert found.paths == [str(fifo), *missing]
    assert found.is_whole
    assert found.summary.startswith("Join of Scan of Scan ")


def test_all_of_many_paths_are_told():
    paths = [f"/nowhere/é/{'long' * 40}/{number}.parquet" for number in range(2000)]
    assert look_at(pl.scan_parquet(paths)).paths == paths


def test_remote_files_are_not_asked_for():
    requests = []

    class Server(BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append(self.path)
            self.send_error(404)

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *_): ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.parquet"
        plan = pl.scan_parquet(address).select("a")
        assert look_at(plan).paths == [address]
        assert requests == []
        with pytest.raises(Exception, match="404"):
            plan.collect(engine="in-memory")
        assert requests
        server.shutdown()


def test_what_no_other_process_could_have_is_seen(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a\n1\n")
    with path.open("rb") as file:
        plans_here = [
            ONE.sink_csv(io.BytesIO(), lazy=True),
            pl.scan_csv(file, schema={"a": INT}),
            pl.LazyFrame({"a": [object()]}),
        ]
        assert not any(look_at(plan).is_sendable for plan in plans_here)
    assert look_at(pl.scan_csv(io.BytesIO(b"a\n1\n"))).is_sendable


def test_long_plan_is_looked_at_no_further_than_the_limit():
    plan = ONE
    for number in range(3000):
        plan = plan.with_columns((A + number).alias("a"))
    found = look_at(plan, 1 << 16)
    assert not found.is_whole
    assert found.runs_python is None


def test_plan_that_would_be_endless_as_a_tree_is_looked_at_no_further_than_the_limit():
    plan = ONE
    for _ in range(60):
        plan = plan.join(plan, on="a")
    assert not look_at(plan).is_whole


def test_plan_that_was_asked_for_its_schema_looks_the_same():
    def make():
        return pl.LazyFrame({"a": [1]}).filter(A > 0).sort("a")

    asked = make()
    asked.collect_schema()
    assert look_at(asked.head(2)) == look_at(make().head(2))


def test_polars_that_shows_no_plan_leaves_all_unknown(monkeypatch):
    plan = ONE.clone()
    monkeypatch.setattr(plan, "_ldf", object())
    assert look_at(plan) is NOTHING


class Counted:
    """A function that any process may call, and how often that was."""

    def __init__(self):
        self.calls = Notes()

    def __call__(self, values):
        self.calls.append(1)
        return values


TYPED_BY_A_CALL = {
    "map_batches": lambda f: ONE.select(A.map_batches(f)),
    "map_elements": lambda f: ONE.select(A.map_elements(f)),
    "pipe_with_schema": lambda f: ONE.pipe_with_schema(lambda lf, _: f(lf)),
    "names": lambda f: ONE.select(A.name.map(f)),
    "schema of a source": lambda f: register_io_source(
        lambda *_: iter([pl.DataFrame({"a": [1]})]), schema=lambda: f(pl.Schema({"a": INT}))
    ),
}


@pytest.mark.filterwarnings("ignore::polars.exceptions.MapWithoutReturnDtypeWarning")
@pytest.mark.filterwarnings("ignore::polars.exceptions.PolarsInefficientMapWarning")
@pytest.mark.everywhere
@pytest.mark.parametrize("make", TYPED_BY_A_CALL.values(), ids=TYPED_BY_A_CALL)
def test_functions_are_called_no_more_often_than_by_polars(
    collector, blocked, monkeypatch, make, executor
):
    monkeypatch.setattr(query, "_WORTH_ESTIMATING", 0.0)
    alone, ours = Counted(), Counted()
    plan = make(alone)
    if executor != "threads":  # where Polars has forgotten what it knows of a function
        plan = pl.LazyFrame.deserialize(io.BytesIO(plan.serialize()))
    plan.collect(engine="in-memory")
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    waiting = collector.collect_async(make(ours))  # it is looked at before it runs, and after
    blocked.gate.set()
    waiting.result(30)
    collector.close()
    assert len(ours.calls) == len(alone.calls)


@pytest.mark.filterwarnings("ignore::polars.exceptions.MapWithoutReturnDtypeWarning")
@pytest.mark.filterwarnings("ignore::polars.exceptions.PolarsInefficientMapWarning")
@pytest.mark.parametrize("make", TYPED_BY_A_CALL.values(), ids=TYPED_BY_A_CALL)
def test_functions_are_called_no_more_often_with_auto_either(make):
    alone, ours = Counted(), Counted()
    plan = pl.LazyFrame.deserialize(io.BytesIO(make(alone).serialize()))
    plan.collect(engine="in-memory")
    with Collector(executor="auto") as collector:
        collector.collect_async(make(ours)).result(30)
    assert len(ours.calls) == len(alone.calls)


TABLES = """
import sys
import polars as pl
import polars_async as pa
from pyiceberg.catalog.sql import SqlCatalog

def tables(folder):
    frame = pl.DataFrame({"a": [1, 2, 3]})
    frame.write_delta(f"{folder}/delta")
    catalog = SqlCatalog("local", uri=f"sqlite:///{folder}/catalog.db", warehouse=folder)
    catalog.create_namespace("shop")
    table = catalog.create_table("shop.sales", schema=frame.to_arrow().schema)
    table.append(frame.to_arrow())
    return pl.scan_delta(f"{folder}/delta"), pl.scan_iceberg(table)

def executor_of(place):
    if place != "dask":
        return place
    from distributed import Client
    return pa.dask_executor(Client(n_workers=1, threads_per_worker=1, dashboard_address=":0"))

if __name__ == "__main__":
    folder, place = sys.argv[1:]
    for table in tables(folder):
        with pa.Collector(executor=executor_of(place), max_running=1) as collector:
            waiting = [collector.collect_async(table.sum(), priority=n % 2) for n in range(4)]
            print(*[handle.result(40).item() for handle in waiting])
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["threads", "processes", "auto", "dask"])
def test_tables_of_delta_and_iceberg_freeze_nothing(tmp_path, place):
    program = tmp_path / "program.py"  # a frozen process could not even fail
    program.write_text(TABLES)
    command = [sys.executable, "-W", "ignore", str(program), str(tmp_path), place]
    environment = os.environ | {"POLARS_ICEBERG_PLANNER": "pyiceberg"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=150, check=True
    )
    assert done.stdout.split() == ["6"] * 8


GPU = """
import logging, sys
import polars as pl
import polars_async as pa
from polars_async.testing import simulate_gpu

pl.DataFrame({"a": [1, 2, 3]}).write_delta(sys.argv[1])
table = pl.scan_delta(sys.argv[1]).sum()
with simulate_gpu(fail="unsupported"), pa.Collector(engine="gpu", gpu="offload") as collector:
    logging.getLogger("polars_async").setLevel(logging.ERROR)
    handle = collector.collect_async(table)
    print(handle.result(40).item(), handle.resolution.reason)
    print(pa.gpu_support(table).answer)
"""


def test_table_of_delta_freezes_nothing_that_asks_for_the_gpu(run_script, tmp_path):
    answers = run_script(GPU, str(tmp_path / "table"))
    assert answers[:2] == ["6", "unsupported_query"]
