"""How far a query is: what is counted, where, how it is watched, and who else watches."""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
import threading
from types import ModuleType, SimpleNamespace

import polars as pl
import pytest
import trio
from places import TINY, Gate, until

import polars_async as pa
from polars_async import Collector, Progress
from polars_async._runtime import msgpack, parquet
from polars_async._runtime.upstream import observer
from polars_async.executors.meters import LocalMeter
from polars_async.executors.scanned import Scan
from polars_async.scheduling.describing import progress_of

ROWS = 2_000_000
NUMBERS = pl.select(a=pl.int_range(0, ROWS))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A query of all the numbers, which are in a file: a frame would be too large to send."""
    path = tmp_path_factory.mktemp("numbers") / "numbers.parquet"
    NUMBERS.write_parquet(path, row_group_size=100_000)
    return pl.scan_parquet(path)


class Halfway:
    """A streaming query that has read some of the numbers, and goes on when it is let go on."""

    def __init__(self, numbers):
        self.gate = Gate()
        self._numbers = numbers

    @property
    def lf(self):
        column = pl.col("a").map_batches(self._wait, is_elementwise=True, return_dtype=pl.Int64)
        return self._numbers.select(column).group_by(pl.col("a") % 7).len()

    def _wait(self, values):
        # One of the first batches, but not all: those before it have been read by then.
        if values.len() and values[0] > ROWS // 4:
            assert self.gate.wait()
        return values


@pytest.fixture
def halfway(numbers):
    query = Halfway(numbers)
    yield query
    query.gate.set()


def is_between(progress):
    return progress.fraction is not None and 0 < progress.fraction < 1


PLACES = pytest.mark.parametrize("place", ["threads", "processes"])


# What is counted


@PLACES
def test_streaming_query_tells_how_far_it_is(place, halfway):
    with Collector(executor=place, progress=True) as collector:
        handle = collector.collect_async(halfway.lf, engine="streaming")
        until(lambda: is_between(handle.progress()))
        progress = handle.progress()
        assert progress.state == "running"
        assert progress.seconds > 0
        assert 0 < progress.rows < ROWS
        (info,) = collector.queries()
        assert info.progress.rows > 0
        assert "% read" in str(info)
        halfway.gate.set()
        assert handle.result(60).height == 7
        done = handle.progress()
        assert (done.state, done.rows, done.fraction) == ("completed", ROWS, 1.0)
        assert done.operator is None


@PLACES
def test_fraction_never_goes_back_and_ends_at_1(place, halfway):
    with Collector(executor=place, progress=True) as collector:
        handle = collector.collect_async(halfway.lf, engine="streaming")
        seen = []
        for progress in handle.watch(every=0.02):
            seen.append(progress)
            if is_between(progress):
                halfway.gate.set()
        fractions = [each.fraction for each in seen if each.fraction is not None]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
        assert max(fractions[:-1]) < 1.0
        assert any(map(is_between, seen))


@pytest.mark.usefixtures("small_frames")
@PLACES
def test_progress_of_a_shared_run_is_that_of_each_who_waits_for_it(place, numbers):
    options = {"executor": place, "progress": True, "single_flight": True, "max_running": 1}
    gate = Gate()

    def wait(frame):
        assert gate.wait()
        return frame

    with Collector(engine="streaming", **options) as collector:
        busy = collector.collect_async(TINY.map_batches(wait))
        query = numbers.select(pl.col("a").sum())
        first, second = (collector.collect_async(query) for _ in range(2))
        watches = [handle.watch(every=0.02) for handle in (first, second)]
        waiting = second.progress()
        assert (waiting.state, waiting.fraction, waiting.seconds) == ("waiting", None, 0.0)
        left = collector.collect_async(numbers)
        left.cancel()
        assert left.progress().state == "cancelled"
        gate.set()
        last = [list(each)[-1] for each in watches]
        for each in last:
            assert (each.state, each.rows, each.fraction) == ("completed", ROWS, 1.0)
        assert busy.result(60).height == 1


OPERATORS = {"InMemorySource", "Sort", "InMemoryMap", "InMemorySink"}


def test_operator_at_work_has_the_name_that_polars_gives_it():
    gate = Gate()

    def wait(frame):
        assert gate.wait()
        return frame

    with Collector(progress=True) as collector:
        lf = NUMBERS.lazy().sort("a", descending=True).map_batches(wait)
        handle = collector.collect_async(lf, engine="streaming")
        until(lambda: handle.progress().operator is not None)
        assert handle.progress().operator in OPERATORS
        gate.set()


class Counts:
    """Stands in for what Polars counts of one scan of ten rows."""

    plan = ({"id": 1, "input_ids": (), "properties": {"type": "InMemorySource", "n_rows": 10}},)

    def __init__(self, pack, rows):
        self._pack = pack
        self.rows = rows

    def snapshot_query_metrics(self):
        counted = {"rows_sent": self.rows, "io_total_bytes_received": 0, "total_time_ns": 1}
        return self._pack([{"phys_node_key": 1, "done": False, **counted}])


def test_fraction_stays_where_more_is_to_be_read_than_it_seemed():
    pack = pytest.importorskip("msgpack").packb
    meter = LocalMeter([])
    meter.planned(first := Counts(pack, 5), pack(Counts.plan))
    assert meter.read().fraction == pytest.approx(0.5, abs=0.01)
    meter.planned(Counts(pack, 0), pack(Counts.plan))
    assert meter.read().fraction == pytest.approx(0.5, abs=0.01)
    first.rows = 10
    assert meter.read() == (10, None, pytest.approx(0.5, abs=0.01), "InMemorySource")
    meter.end()
    assert meter.read() == (10, None, pytest.approx(0.5, abs=0.01), None)


def test_fraction_is_less_than_1_while_the_query_may_have_more_to_do():
    pack = pytest.importorskip("msgpack").packb
    meter = LocalMeter([])
    meter.planned(Counts(pack, 10), pack(Counts.plan))
    assert 0.9 < meter.read().fraction < 1


def test_query_that_is_not_on_the_streaming_engine_tells_its_state_and_its_time(blocked):
    with Collector(max_running=1, progress=True) as collector:
        running = collector.collect_async(blocked.lf, engine="in-memory")
        assert blocked.started.wait(30)
        waiting = collector.collect_async(TINY, engine="in-memory")
        told = running.progress()
        assert told == Progress(state="running", seconds=told.seconds)
        assert waiting.progress() == Progress(state="waiting", seconds=0.0)
        waiting.cancel()
        assert waiting.progress() == Progress(state="cancelled", seconds=0.0)
        blocked.gate.set()
        running.result(30)
        assert (running.progress().state, running.progress().fraction) == ("completed", 1.0)


def test_query_that_fails_does_not_come_to_1():
    with Collector(progress=True) as collector:
        lf = NUMBERS.lazy().map_batches(lambda _: 1 / 0)
        handle = collector.collect_async(lf, engine="streaming")
        *_, last = handle.watch()
        assert last.state == "failed"
        assert last.fraction is None or last.fraction < 1


def counted(collector, **options):
    handle = collector.collect_async(NUMBERS.lazy().sum(), engine="streaming", **options)
    handle.result(60)
    return progress_of(handle._query).rows


def test_rows_are_counted_from_the_first_time_that_progress_is_asked_for():
    with Collector() as collector, Collector() as other:
        first = collector.collect_async(NUMBERS.lazy().sum(), engine="streaming")
        first.result(60)
        assert progress_of(first._query).rows is None
        first.progress()
        assert counted(collector) == ROWS
        assert counted(other) is None
        other.collect_async(TINY).watch().close()
        assert counted(other) == ROWS


def test_rows_are_counted_at_once_in_an_interactive_session(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with Collector() as collector:
        assert counted(collector) == ROWS
    with Collector(progress=False) as collector:
        assert counted(collector) is None


def test_rows_are_never_counted_where_that_is_ruled_out():
    with Collector(progress=False) as collector:
        collector.collect_async(TINY).progress()
        assert counted(collector) is None


@PLACES
def test_all_kinds_of_queries_are_counted(place, tmp_path, numbers):
    lf = numbers
    with Collector(executor=place, progress=True) as collector:
        handles = [
            collector.collect_all_async([lf.sum(), lf.min()], engine="streaming"),
            collector.sink_async(lf.sink_parquet(tmp_path / "a.parquet", lazy=True)),
            collector.collect_background(lf.sum(), engine="streaming"),
        ]
        until(lambda: all(handle.progress().state == "completed" for handle in handles))
        assert all(handle.progress().rows >= ROWS for handle in handles)
        stream = collector.collect_batches_async(lf, chunk_size=ROWS // 4, engine="streaming")
        assert sum(batch.height for batch in stream) == ROWS
        assert stream.progress().rows == ROWS


def test_readings_of_a_worker_never_come_after_the_outcome():
    with Collector(executor="processes", max_running=1, progress=True) as collector:
        workers = set()
        for number in range(20):
            lf = pl.LazyFrame({"a": [number]}).select(pl.col("a").map_batches(lambda s: s))
            handle = collector.collect_async(lf, engine="streaming")
            assert handle.result(60).item() == number
            assert handle.progress().rows == 1
            workers.add(handle._query.place)
        assert len(workers) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux")
def test_last_reading_is_the_last():
    readings = importlib.import_module("polars_async.executors.processes.readings")
    sent = []
    sender = readings._Sender(LocalMeter([]), SimpleNamespace(send=sent.append))
    sender.end()
    sender.run()
    sender._send()
    assert len(sent) == 1


# How large a scan is


@pytest.fixture
def files(tmp_path):
    """Three files of a kind, and the pattern and the folder that name them."""

    def write(kind):
        folder = tmp_path / kind
        folder.mkdir()
        for number in range(3):
            path = folder / f"part-{number}.{kind}"
            getattr(NUMBERS.head(1000), f"write_{kind}")(path)
        return folder

    return write


def sizes(lf):
    """Return the sources of a query after it has run, with what is known of their sizes."""
    meter = LocalMeter([lf])
    engine = observer.counting_engine(pl.StreamingEngine())
    observer.observed(meter, lambda: lf.collect(engine=engine))
    meter._parts[0].prepare()
    for scan in meter._scans():
        scan.find_size([lf])
    return meter._scans()


@pytest.mark.parametrize("names", ["folder", "pattern", "list", "one"])
@pytest.mark.parametrize("kind", ["parquet", "ipc"])
def test_rows_of_files_are_known(files, kind, names):
    folder = files(kind)
    read = getattr(pl, f"scan_{kind}")
    parts = sorted(folder.iterdir())
    named = {"folder": folder, "pattern": folder / f"*.{kind}", "list": parts, "one": parts[0]}
    (scan,) = sizes(read(named[names]).select(pl.col("a").sum()))
    assert scan.size_in_rows == (1000 if names == "one" else 3000)


def test_size_of_a_filtered_scan_is_that_of_its_columns(files):
    folder = files("parquet")
    frame = NUMBERS.head(1000).with_columns(b=pl.col("a") * 2, c=pl.lit("text"))
    for path in folder.iterdir():
        frame.write_parquet(path)
    whole = sum(path.stat().st_size for path in folder.iterdir())
    (scan,) = sizes(pl.scan_parquet(folder).filter(pl.col("a") % 3 == 0).select("a"))
    assert scan.size_in_rows is None
    assert 0.2 * whole < scan._size_in_bytes < 0.6 * whole


def test_size_of_csv_is_that_of_its_files(files):
    folder = files("csv")
    (scan,) = sizes(pl.scan_csv(folder / "*.csv").select(pl.col("a").sum()))
    assert scan._size_in_bytes == sum(path.stat().st_size for path in folder.iterdir())


def node(**properties):
    return {"id": 1, "input_ids": [], "properties": {"type": "MultiScan", **properties}}


@pytest.mark.parametrize(
    "properties",
    [
        {"scan_type": "parquet", "first_source": "s3://bucket/a", "num_sources": 1},
        {"scan_type": "parquet", "first_source": None, "num_sources": 1},
        {"scan_type": "parquet", "first_source": "a", "num_sources": 10**6},
        {"scan_type": "parquet", "first_source": "/no/such/file", "num_sources": 1},
        {"scan_type": "ndjson", "first_source": __file__, "num_sources": 1},
        {"scan_type": "csv", "first_source": __file__, "num_sources": 1, "pre_slice": [0, 1]},
        {},
    ],
)
def test_size_of_others_is_not_known(properties):
    scan = Scan(node(**properties))
    if scan.is_unsized:
        scan.find_size([])
    scan.take({"rows_sent": 3, "io_total_bytes_received": 3, "done": False})
    assert scan.share is None
    scan.take({"rows_sent": 3, "io_total_bytes_received": 3, "done": True})
    assert scan.share == 1.0


def test_shares_of_columns_are_those_that_pyarrow_tells(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    frame = NUMBERS.head(1000).with_columns(s=pl.struct("a", b="a"), t=pl.lit("text"))
    frame.write_parquet(path, row_group_size=100)
    whole: dict[str, int] = {}
    metadata = pq.read_metadata(path)
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            name = column.path_in_schema.partition(".")[0]
            whole[name] = whole.get(name, 0) + column.total_compressed_size
    assert set(whole) == {"a", "s", "t"}
    for name, size in whole.items():
        assert parquet.share_of_columns(path, [name]) == size / sum(whole.values())
    (tmp_path / "none").write_bytes(b"PAR1")
    assert parquet.share_of_columns(str(tmp_path / "none"), ["a"]) is None


@pytest.mark.parametrize("cut", [1, 40, 100])
def test_broken_footer_tells_nothing(tmp_path, cut):
    path = tmp_path / "a.parquet"
    NUMBERS.head(10).write_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: -8 - cut] + whole[-8:])
    assert parquet.share_of_columns(str(path), ["a"]) is None


def test_messages_of_polars_are_read_as_msgpack_reads_them():
    other = pytest.importorskip("msgpack")
    small = [None, True, False, 0, 127, -1, -32, 1.5, "text", b"bytes", [], {}]
    large = [128, 70_000, 2**40, -33, -200, -70_000, -(2**40), "x" * 300, "y" * 70_000, b"z" * 300]
    nested = {"a": list(range(40)), "b": {str(each): each for each in range(40)}}
    for value in [*small, *large, nested, list(range(70_000))]:
        assert msgpack.read(other.packb(value)) == value
    for broken in (
        b"",
        b"\xa5tex",
        b"\xc1",
        b"\x92\x01",
        b"\x01\x02",
        b"\xcd\x01",
        b"\xc7\x01\x01\x01",
    ):
        with pytest.raises(ValueError, match=r"MessagePack|follow"):
            msgpack.read(broken)


# Watching


def test_watch_in_asyncio_and_trio(halfway):
    async def watch(handle):
        seen = []
        async for progress in handle.watch(every=0.01):
            seen.append(progress.state)
            if is_between(progress):
                halfway.gate.set()
        return seen

    with Collector(progress=True) as collector:
        for run in (asyncio.run, lambda made: trio.run(lambda: made)):
            halfway.gate = Gate()
            handle = collector.collect_async(halfway.lf, engine="streaming")
            seen = run(watch(handle))
            assert seen[0] in {"waiting", "running"}
            assert seen[-1] == "completed"
            assert seen.count("completed") == 1


def test_watch_of_a_query_that_is_done_has_one_item():
    with Collector() as collector:
        handle = collector.collect_async(TINY)
        handle.result(30)
        assert [each.state for each in handle.watch()] == ["completed"]


def test_watch_goes_on_at_once_when_the_query_ends(blocked):
    with Collector() as collector:
        handle = collector.collect_async(blocked.lf)
        assert blocked.started.wait(30)
        watch = handle.watch(every=3600)
        assert next(watch).state == "running"
        blocked.gate.set()
        assert next(watch).state == "completed"
        with pytest.raises(StopIteration):
            next(watch)


def test_watch_raises_no_error_of_the_query_and_its_end_does_not_cancel_it(blocked):
    with Collector() as collector:
        handle = collector.collect_async(blocked.lf)
        for _ in handle.watch():
            break
        gc.collect()
        with handle.watch() as watch:
            assert next(watch).state == "running"
        assert list(watch) == []
        assert not handle.done()
        blocked.gate.set()
        handle.result(30)
        failing = collector.collect_async(pl.LazyFrame({"a": [1]}).select("b"))
        assert [each.state for each in failing.watch()][-1] == "failed"


def test_query_that_is_watched_alone_is_cancelled_with_its_last_task(blocked):
    async def main(collector):
        handle = collector.collect_async(blocked.lf)
        watch = handle.watch()
        await anext(watch)
        task = asyncio.ensure_future(handle)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return handle.progress().state, [each.state async for each in watch]

    with Collector() as collector:
        assert asyncio.run(main(collector)) == ("cancelled", ["cancelled"])
        blocked.gate.set()


@pytest.mark.parametrize("every", [0, -1, "1", True, float("nan"), float("inf")])
def test_watch_takes_seconds(every):
    with Collector() as collector:
        handle = collector.collect_async(TINY)
        with pytest.raises(ValueError, match="every must be a number of seconds above 0, got"):
            handle.watch(every)
        with pytest.raises(ValueError, match="every must be a number of seconds above 0, got"):
            pa.show_progress(handle, every=every)


def test_progress_reads_as_one_line():
    progress = Progress(
        state="running",
        seconds=2.5,
        rows=1_234_567,
        bytes=1_500_000,
        fraction=0.999,
        operator="Sort",
    )
    told = "99 %, running, 2.5 s, 1,234,567 rows, 1.5 MB, Sort"
    assert (str(progress), repr(progress)) == (told, f"<Progress: {told}>")


# Others that use the hook


class Others(ModuleType):
    """A stand-in for polars-cloud, whose observers are for one query each."""

    def __init__(self):
        super().__init__("polars_cloud")
        self.told = []
        self.made = []

    def authenticate(self):
        pass

    def QueryCloudObserver(self, workspace=None, organization=None):  # noqa: N802  # Polars' name
        self.made.append((workspace, organization))
        return self._Observer(self.told)

    class _Observer:
        def __init__(self, told):
            self.told = told
            self.query = None

        def on_query_started(self, query):
            assert self.query is None, "it was made for another query"
            self.query = query
            self.told.append("started")

        def on_query_planned(self, query, handle, ir, physical):
            assert self.query == query
            assert handle.snapshot_query_metrics()
            assert ir
            assert physical
            self.told.append("planned")
            return self

        def on_query_failed(self, query, error):
            assert self.query == query
            assert isinstance(error, str)
            self.told.append("failed")

        def close(self):
            self.told.append("closed")


@pytest.fixture
def others(monkeypatch):
    others = Others()
    monkeypatch.setitem(sys.modules, "polars_cloud", others)
    return others


WHOLE = ["started", "planned", "closed"]


def monitored(monkeypatch):
    monkeypatch.setenv("POLARS_QUERY_MONITORING", "1")
    monkeypatch.setenv("POLARS_QUERY_MONITORING_WORKSPACE", "mine")


def test_others_see_the_queries_that_are_monitored_for_them(others, monkeypatch):
    monitored(monkeypatch)
    with Collector(progress=True) as collector:
        assert counted(collector) == ROWS
        assert others.told == WHOLE
        assert others.made[-1][0] == "mine"
        failing = collector.collect_async(
            NUMBERS.lazy().map_batches(lambda _: 1 / 0), engine="streaming"
        )
        with pytest.raises((ZeroDivisionError, pl.exceptions.ComputeError)):
            failing.result(30)
        assert others.told[3:5] == ["started", "planned"]
        assert sorted(others.told[5:]) == ["closed", "failed"]
        # What this library has no part in.
        del others.told[:]
        NUMBERS.lazy().sum().collect(engine="streaming")
        assert others.told == WHOLE
        NUMBERS.lazy().sum().collect(engine="in-memory")
        assert others.told == 2 * WHOLE


def test_others_do_not_see_queries_that_are_not_monitored_for_them(others):
    with Collector(progress=True) as collector:
        assert counted(collector) == ROWS
    assert (others.told, others.made) == ([], [])
    assert sys.modules["polars_cloud"] is others


def test_others_that_come_later_are_seen_to(monkeypatch):
    with Collector(progress=True) as collector:
        assert counted(collector) == ROWS
        assert "polars_cloud" not in sys.modules
        others = Others()
        monkeypatch.setitem(sys.modules, "polars_cloud", others)
        monitored(monkeypatch)
        assert counted(collector) == ROWS
        assert others.told == WHOLE
        # They put their own in the place of ours, as polars-telemetry does.
        del others.told[:]
        replaced = Others()
        others.QueryCloudObserver = replaced.QueryCloudObserver
        assert counted(collector) == ROWS
        assert replaced.told == WHOLE


def test_queries_of_several_threads_are_told_apart(others, monkeypatch):
    monitored(monkeypatch)

    def collect():
        for _ in range(10):
            NUMBERS.head(1000).lazy().sum().collect(engine="streaming")

    with Collector(progress=True) as collector:
        counted(collector)  # theirs is wrapped from now on: Polars itself gives it to any thread
        del others.told[:]
        threads = [threading.Thread(target=collect) for _ in range(3)]
        for thread in threads:
            thread.start()
        handles = [
            collector.collect_async(NUMBERS.head(1000 + each).lazy().sum(), engine="streaming")
            for each in range(10)
        ]
        rows = [(handle.result(60), handle.progress().rows)[1] for handle in handles]
        for thread in threads:
            thread.join()
    assert rows == [1000 + each for each in range(10)]
    assert {kind: others.told.count(kind) for kind in WHOLE} == dict.fromkeys(WHOLE, 40)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_polars_telemetry_sees_the_same_queries(first, run_script):
    pytest.importorskip("polars_telemetry")
    script = """
import sys, warnings
import polars as pl, polars_async as pa, polars_telemetry
seen = []
class Exporter:
    def export(self, query): seen.append(query)
def run(collector):
    lf = pl.LazyFrame({"a": range(1000)}).sum()
    handle = collector.collect_async(lf, engine="streaming")
    handle.result(60)
    return handle.progress().rows
with pa.Collector(progress=True) as collector:
    if sys.argv[1] == "ours":
        assert run(collector) == 1000
    polars_telemetry.install(exporter=Exporter())
    del seen[:]
    rows = run(collector)
    count = len(seen)
    pl.LazyFrame({"a": [1]}).sum().collect(engine="streaming")
    alone = len(seen) - count
    polars_telemetry.uninstall()
    print(rows, count, alone, run(collector), len(seen) - count - alone)
"""
    assert run_script(script, first) == ["1000", "1", "1", "1000", "0"]


def raising(error):
    def function(*_):
        raise error

    return function


@pytest.mark.parametrize("moved", ["function", "flag", "payload", "arguments"])
def test_nothing_breaks_where_the_hook_has_moved(moved, monkeypatch, caplog):
    if moved == "function":
        monkeypatch.delattr(importlib.import_module("polars._plr"), "set_query_monitoring")
    elif moved == "flag":
        monkeypatch.setattr(observer, "_arm", raising(AttributeError("query_monitoring")))
    elif moved == "payload":
        monkeypatch.setattr(msgpack, "read", lambda _: {"unknown": 1})
    else:
        monkeypatch.setattr(LocalMeter, "planned", raising(TypeError("other arguments")))
    with Collector(progress=True) as collector:
        handle = collector.collect_async(NUMBERS.lazy().sum(), engine="streaming")
        assert handle.result(60).item() == ROWS * (ROWS - 1) // 2
        progress = handle.progress()
        assert (progress.state, progress.rows, progress.fraction) == ("completed", None, 1.0)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
