from __future__ import annotations

import asyncio
import builtins
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import date
from decimal import Decimal
from pathlib import Path

import cloudpickle
import inside
import polars as pl
import pytest
from places import until as eventually
from polars.io.plugins import register_io_source

import polars_async as pa
from polars_async.executors.processes import call, process

TINY = pl.LazyFrame({"a": [1, 2, 3]}).sum()
HEAVY = (
    pl.LazyFrame({"n": [0]})
    .select(k=pl.int_range(0, 30_000_000))
    .group_by(pl.col("k") * 7919 % 5_000_003)
    .agg(pl.len())
    .sort("k")
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux"),
    pytest.mark.usefixtures("no_spares"),  # it counts the children of this process
]


@pytest.fixture
def make():
    made = []

    def make(**options):
        collector = pa.Collector(executor="processes", **options)
        made.append(collector)
        return collector

    yield make
    for collector in made:
        collector.close(cancel_running=True)
    # Those that start still have no name by which `children` would find them.
    eventually(lambda: not process._alive and not children())


@pytest.fixture
def collector(make):
    return make(max_running=1)


def children():
    """Give the worker processes of this process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = status.read_text().split(" (", 1)
        except OSError:
            continue
        name, rest = rest.rsplit(") ", 1)
        state, parent = rest.split()[:2]
        if name == "polars-worker" and int(parent) == os.getpid() and state != "Z":
            found.append(int(pid))
    return found


def udf(function, dtype=pl.Int64):
    return pl.LazyFrame({"a": [1]}).select(pl.col("a").map_batches(function, return_dtype=dtype))


def worker_of(collector):
    return collector.collect_async(udf(lambda s: s * 0 + os.getpid())).result(30).item()


def until_freed(collector):
    eventually(lambda: not collector.stats()["running"])


class Gate:
    """A query that tells when it has begun, and goes on when it may, in whatever process."""

    def __init__(self, folder):
        self.begun, self.go = folder / "begun", folder / "go"
        begun, go = str(self.begun), str(self.go)

        def wait(values):
            Path(begun).write_text(str(os.getpid()))
            while not Path(go).exists():
                time.sleep(0.005)
            return values

        self.lf = udf(wait)

    def pid(self):
        eventually(lambda: self.begun.exists() and self.begun.read_text())
        return int(self.begun.read_text())

    def open(self):
        self.go.touch()


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path)
    yield gate
    gate.open()


ALL_TYPES = pl.DataFrame(
    {
        "int": [1, None, 3],
        "text": ["a", None, "ü" * 40],
        "bytes": [b"a", b"", None],
        "bool": [True, None, False],
        "float": [1.5, float("nan"), None],
        "date": [date(2026, 1, 1), None, date(1900, 1, 1)],
        "decimal": [Decimal("1.25"), None, Decimal("-3.50")],
        "list": [[1, 2], [], None],
        "struct": [{"x": 1, "y": "a"}, {"x": None, "y": None}, {"x": 3, "y": "c"}],
        "null": [None, None, None],
    }
).with_columns(
    pl.col("text").cast(pl.Categorical).alias("categorical"),
    pl.Series("enum", ["b", "a", None], dtype=pl.Enum(["a", "b"])),
    pl.Series("array", [[1, 2], [3, 4], None], dtype=pl.Array(pl.Int8, 2)),
    pl.col("int").cast(pl.Int128).alias("int128"),
    pl.col("date").cast(pl.Datetime("us", "Europe/Zurich")).alias("datetime"),
    pl.col("int").cast(pl.Duration("ms")).alias("duration"),
    pl.col("int").cast(pl.Time).alias("time"),
)
FRAMES = {
    "all types": ALL_TYPES,
    "all types, mapped": pl.concat([ALL_TYPES] * 2000, rechunk=False),
    "numbers, mapped": pl.select(a=pl.int_range(0, 200_000), b=pl.lit(0.5)),
    "no rows": ALL_TYPES.clear(),
    "no columns": pl.DataFrame(),
}


def test_frame_goes_there_and_comes_back(collector):
    for name, frame in FRAMES.items():
        found = collector.collect_async(frame.lazy()).result(30)
        assert found.schema == frame.schema, name
        assert found.equals(frame), name


def test_shared_frame_is_read_there(collector):
    for name, frame in FRAMES.items():
        shared = pa.share(frame)
        assert collector.collect_async(shared).result(30).equals(frame), name
        assert shared.collect().equals(frame), name


def test_shared_frame_is_read_as_far_as_a_query_needs_it(collector):
    frame = pl.DataFrame({"a": range(1000), "b": range(1000)})
    for query in (
        lambda lf: lf.filter(pl.col("a") % 3 == 0).select("b"),
        lambda lf: lf.head(7).select("a"),
        lambda lf: lf.filter(pl.col("b") > 5).tail(3),
        lambda lf: lf.join(lf, on="a").select(pl.len()),
    ):
        found = collector.collect_async(query(pa.share(frame))).result(30)
        assert found.equals(query(frame.lazy()).collect())


def in_shm():
    """Give the shared memory that there is, apart from the semaphores that pools of others have."""
    return {file for file in Path("/dev/shm").iterdir() if not file.name.startswith("sem.")}


def shared_files():
    files = Path("/proc/self/fd").iterdir()
    return [int(file.name) for file in files if "memfd:polars-async" in target_of(file)]


def target_of(file):
    try:
        return str(file.readlink())
    except FileNotFoundError:  # closed meanwhile, such as that of the listing itself
        return ""


def test_shared_memory_is_private_nameless_and_freed_with_the_last_query():
    eventually(lambda: not shared_files())  # threads may hold those of tests before a little longer
    before = in_shm()
    query = pa.share(pl.DataFrame({"a": [1]})).select("a")
    (file,) = shared_files()
    assert os.fstat(file).st_mode & 0o777 == 0o600
    assert in_shm() <= before
    assert query.collect().item() == 1
    del query
    gc.collect()
    assert shared_files() == []


def test_only_a_frame_is_shared():
    with pytest.raises(TypeError, match="frame must be a DataFrame, got LazyFrame"):
        pa.share(TINY)


def test_shared_frame_of_a_process_that_ended_is_not_to_be_had(run_script):
    script = """
import sys, cloudpickle, polars as pl, polars_async as pa
print(cloudpickle.dumps(pa.share(pl.DataFrame({"a": [1]}))).hex())
"""
    (data,) = run_script(script)
    with pytest.raises(Exception, match=r"share\(\) is for worker processes on the same machine"):
        cloudpickle.loads(bytes.fromhex(data))


def mapped():
    return "memfd:polars-async" in Path("/proc/self/maps").read_text()


def test_program_without_standard_files_has_workers_too(run_script):
    script = """
import os, sys, polars as pl, polars_async as pa
def say(frame):
    for file in (sys.stdout, sys.stderr):
        print("said", file=file, flush=True)
    return frame
kept = os.dup(1)
for file in range(3):
    os.close(file)
with pa.Collector(executor="processes") as collector:
    found = collector.collect_async(pl.LazyFrame({"a": [1]}).map_batches(say)).result(30)
os.write(kept, str(found.item()).encode())
os._exit(0)
"""
    assert run_script(script) == ["1"]


def test_large_result_is_mapped_and_its_memory_is_freed_with_it(collector):
    lf = pl.LazyFrame({"n": [0]}).select(k=pl.int_range(0, 1_000_000))
    files = len(list(Path("/proc/self/fd").iterdir()))
    found = collector.collect_async(lf).result(30)
    assert mapped()
    # The worker's channel, lifeline and pidfd, and one of its own.
    assert len(list(Path("/proc/self/fd").iterdir())) <= files + 4
    assert found["k"].sum() == 499_999_500_000
    del found
    gc.collect()
    eventually(lambda: not mapped())  # the thread of the slot may hold the query a little longer


def test_result_that_cannot_be_mapped_is_read(collector, monkeypatch):
    monkeypatch.setattr("polars_async._runtime.upstream.ipc._ways_to_map", ())
    lf = pl.LazyFrame({"n": [0]}).select(k=pl.int_range(0, 1_000_000))
    assert collector.collect_async(lf).result(30)["k"].sum() == 499_999_500_000
    assert not mapped()


def test_more_frames_than_one_message_can_carry_files(collector):
    frames = [pl.LazyFrame({"a": [n]}) for n in range(300)]
    found = collector.collect_all_async(frames).result(60)
    assert [frame.item() for frame in found] == list(range(300))


def test_column_of_python_objects_is_a_clear_error(collector):
    frame = pl.DataFrame({"a": pl.Series([object()], dtype=pl.Object)})
    with pytest.raises(pa.PolarsAsyncError, match="a column of Python objects"):
        collector.collect_async(frame.lazy()).result(30)
    assert collector.collect_async(TINY).result(30).item() == 6


def test_function_that_cannot_be_pickled_is_a_clear_error(collector):
    lock = threading.Lock()
    with pytest.raises(pa.PolarsAsyncError, match="cannot be pickled"):
        collector.collect_async(udf(lambda s: lock and s)).result(30)


def test_optimizations_go_with_the_query(collector):
    none = pl.QueryOptFlags.none()
    seen = udf(lambda s: s * 0 + os.getpid())
    assert collector.collect_async(seen, optimizations=none).result(30).item() in children()


MAIN = """
import os
import polars as pl
import polars_async as pa

class Refused(ValueError):
    def __init__(self, one, *, two):
        super().__init__(one, two)

def elsewhere(frame):
    return frame.with_columns(pid=pl.lit(os.getpid()))

def refuse(frame):
    raise Refused("no", two=3)

def main(frame):
    return frame * 5

signal = sys = serve = main

if True:  # no guard is needed, since no worker runs this again
    lf = pl.LazyFrame({"a": [1]})
    with pa.Collector(executor="processes") as collector:
        query = lf.map_batches(elsewhere, schema={"a": pl.Int64, "pid": pl.Int32})
        found = collector.collect_async(query).result(30)
        print(found["pid"].item() != os.getpid())
        try:
            collector.collect_async(lf.map_batches(refuse)).result(30)
        except Refused as error:
            print(error.args)
        print(collector.collect_async(lf.map_batches(main)).result(30).item())
"""


def test_functions_and_classes_of_the_main_program_are_found(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(MAIN)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=150, check=False
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.splitlines() == ["True", "('no', 3)", "5"]


class NotPicklableError(ValueError):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_error_keeps_type_message_notes_and_traceback(collector):
    def fail(frame):  # noqa: ARG001
        error = KeyError("gone")
        error.add_note("look there")
        raise error

    lf = pl.LazyFrame({"a": [1]}).map_batches(fail)
    with pytest.raises(KeyError, match="gone") as caught:
        collector.collect_async(lf, label="it").result(30)
    assert caught.value.__notes__ == ["look there", "in the query 'it'"]
    text = str(caught.value.__cause__)
    assert "in fail" in text
    assert "KeyError" in text


def test_error_whose_class_only_the_worker_has_is_told_with_its_traceback(collector):
    def fail(frame):  # noqa: ARG001
        kind = type("TheirsError", (ValueError,), {"__module__": "__main__"})
        sys.modules["__main__"].TheirsError = kind
        raise kind("theirs")

    with pytest.raises(pa.PolarsAsyncError, match="cannot be unpickled here") as caught:
        collector.collect_async(pl.LazyFrame({"a": [1]}).map_batches(fail)).result(30)
    assert "TheirsError: theirs" in str(caught.value.__cause__)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration])
def test_worker_survives_whatever_a_function_raises(collector, kind):
    def fail(frame):  # noqa: ARG001
        raise kind("out")

    before = worker_of(collector)
    with pytest.raises(BaseException, match=r"out|StopIteration|KeyboardInterrupt") as caught:
        collector.collect_async(pl.LazyFrame({"a": [1]}).map_batches(fail)).result(30)
    assert not isinstance(caught.value, pa.WorkerDiedError)
    assert worker_of(collector) == before


def test_worker_survives_a_panic(collector, capfd):
    before = worker_of(collector)
    lf = pl.LazyFrame({"a": [1]}).select(pl.int_range(0, 2**62))
    with pytest.raises(pl.exceptions.PanicException, match="capacity overflow"):
        collector.collect_async(lf).result(30)
    assert worker_of(collector) == before
    assert "panicked" in capfd.readouterr().err  # Polars says so itself


def test_worker_logs_to_its_parent(make, caplog):
    caplog.set_level(logging.INFO, "of.a.function")

    def log(values):
        logger = logging.getLogger("of.a.function")
        logger.info("%d values, %s", len(values), object)
        logger.debug("not wanted")
        try:
            {}["inner"]
        except KeyError:
            logger.exception("failed")
        logging.getLogger("of.another").info("not wanted, either")
        import warnings  # noqa: PLC0415

        warnings.warn("careful", stacklevel=1)
        return values

    make().collect_async(udf(log)).result(30)
    said = [
        (each.name, each.levelname, each.getMessage())
        for each in caplog.records
        if each.name != "polars_async"
    ]
    assert said[:2] == [
        ("of.a.function", "INFO", "1 values, <class 'object'>"),
        ("of.a.function", "ERROR", "failed"),
    ]
    assert "KeyError: 'inner'" in caplog.records[1].exc_text
    assert said[2][:2] == ("py.warnings", "WARNING")
    assert "UserWarning: careful" in said[2][2]
    assert len(said) == 3


def test_what_is_logged_along_costs_no_query_its_result(collector, caplog):
    def log(values):
        extra = {"shop": {"id": 3}, "lock": threading.Lock(), "error": NotPicklableError("a", "b")}
        logging.getLogger("of.extra").warning("said", extra=extra)
        return values

    assert collector.collect_async(udf(log)).result(30).item() == 1
    (record,) = [each for each in caplog.records if each.name == "of.extra"]
    assert record.shop == {"id": 3}
    assert record.error == "NotPicklableError('a and b')"
    assert "lock" in record.lock


def test_workers_print_where_their_parent_does(run_script):
    script = """
import polars as pl, polars_async as pa
def say(frame):
    print("said")
    return frame
with pa.Collector(executor="processes") as collector:
    collector.collect_async(pl.LazyFrame({"a": [1]}).map_batches(say)).result(30)
"""
    assert run_script(script) == ["said"]


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_cancelled_query_is_stopped_and_the_next_is_unharmed(collector, engine):
    worker_of(collector)
    for n in range(10):
        handle = collector.collect_async(HEAVY, engine=engine)
        time.sleep(0.02 * n)
        handle.cancel()
        until_freed(collector)
        assert collector.collect_async(TINY).result(30).item() == 6


def test_query_cancelled_at_any_moment_costs_no_other_anything(make):
    collector = make(max_running=2)
    for n in range(150):
        cancelled = collector.collect_async(TINY)
        kept = collector.collect_async(TINY)
        time.sleep(n % 15 * 1e-4)
        cancelled.cancel()
        assert kept.result(30).item() == 6
    assert collector.stats()["workers_died"] == 0


def test_query_that_polars_can_abort_leaves_its_worker_warm(collector, tmp_path, monkeypatch):
    monkeypatch.setattr(call, "GRACE", 100.0)  # SIGINT alone has to do
    begun = tmp_path / "begun"

    def rows(*_):
        while True:
            begun.touch()
            time.sleep(0.005)
            yield pl.DataFrame({"a": [1]})

    endless = register_io_source(rows, schema={"a": pl.Int64})
    before = worker_of(collector)
    handle = collector.collect_async(endless.sum(), engine="streaming")
    eventually(begun.exists)
    handle.cancel()
    until_freed(collector)
    assert worker_of(collector) == before


def test_query_that_does_not_stop_is_killed_with_its_worker(collector, gate):
    handle = collector.collect_async(gate.lf)
    old = gate.pid()
    handle.cancel()
    until_freed(collector)
    assert old not in children()
    assert worker_of(collector) != old
    assert collector.stats()["workers_died"] == 0
    assert collector.stats()["workers"] == 1


def test_worker_that_may_not_be_sent_a_signal_is_killed_all_the_same(collector, gate, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    old = worker_of(collector)
    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    handle = collector.collect_async(gate.lf, timeout=600)
    gate.pid()
    inside.let_time_be_up(handle)
    with pytest.raises(pa.QueryTimeoutError, match="It is stopped now"):
        handle.result(30)
    until_freed(collector)
    assert old not in children()
    with pytest.raises(pa.QueryTimeoutError):  # and there still is a clock
        collector.collect_async(gate.lf, timeout=0.3).result(30)
    until_freed(collector)
    assert collector.collect_async(TINY).result(30).item() == 6


def test_late_query_is_stopped_and_says_so(collector, gate):
    handle = collector.collect_async(gate.lf, timeout=600)
    gate.pid()
    inside.let_time_be_up(handle)
    with pytest.raises(pa.QueryTimeoutError, match="It is stopped now") as caught:
        handle.result(30)
    assert caught.value.run_seconds > 0
    until_freed(collector)
    assert collector.collect_async(TINY).result(30).item() == 6


def test_close_stops_what_runs_where_it_is_told_to(make, gate):
    collector = make()
    handle = collector.collect_async(gate.lf)
    gate.pid()
    collector.close(cancel_running=True)
    assert collector.stats()["cancelled"] == 1
    assert handle.done()
    eventually(lambda: not children())


def test_close_lets_what_runs_end_otherwise(make, gate):
    collector = make()
    handle = collector.collect_async(gate.lf)
    gate.pid()
    collector.close(wait=False)
    gate.open()
    assert handle.result(30).item() == 1
    eventually(lambda: not children())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_death_of_a_worker_is_the_error_of_one_query(make, gate, number):
    collector = make(max_running=2)
    handle = collector.collect_async(gate.lf)
    gate.pid()
    with pytest.raises(pa.WorkerDiedError) as caught:
        collector.collect_async(
            udf(lambda s: os.kill(os.getpid(), number) or s), label="deadly", priority=1
        ).result(30)
    assert caught.value.signal is number
    assert caught.value.exitcode == -number
    assert caught.value.plan == "Select with a Python function"
    assert "'deadly'" in str(caught.value)
    assert number.name in str(caught.value)
    gate.open()
    assert handle.result(30).item() == 1
    stats = collector.stats()
    assert (stats["workers"], stats["workers_died"], stats["failed"]) == (2, 1, 1)
    assert collector.collect_async(TINY).result(30).item() == 6


def test_signal_without_a_name_is_told_by_its_number(collector):
    with pytest.raises(pa.WorkerDiedError, match="by signal 40") as caught:
        collector.collect_async(udf(lambda s: os.kill(os.getpid(), 40) or s)).result(30)
    assert (caught.value.exitcode, caught.value.signal) == (-40, None)


def test_query_that_ends_the_process_is_told_so(collector):
    with pytest.raises(pa.WorkerDiedError, match=r"with exit status 3.*os\._exit") as caught:
        collector.collect_async(udf(lambda _: os._exit(3))).result(30)
    assert (caught.value.exitcode, caught.value.signal) == (3, None)


def test_copy_that_a_function_forks_of_its_worker_answers_nothing(collector, tmp_path):
    def fork(values):
        if not (pid := os.fork()):
            raise ValueError("of the copy")  # which takes no thread of Polars
        (tmp_path / str(pid)).touch()
        time.sleep(0.2)  # the copy would answer first
        return values

    for _ in range(3):
        forks = pl.LazyFrame({"a": [1]}).map_batches(fork)
        assert collector.collect_async(forks).result(30).item() == 1
        assert collector.collect_async(TINY).result(30).item() == 6
    for note in tmp_path.iterdir():
        with suppress(ProcessLookupError):  # it ends, unless it waits for a thread it has not
            os.kill(int(note.name), signal.SIGKILL)


@pytest.mark.parametrize("how", ["fork", "system"])
def test_death_is_seen_though_a_function_has_left_a_process_behind(collector, tmp_path, how):
    note = tmp_path / "pid"

    def die(values):
        if how == "system":
            os.system(f"sleep 60 & echo $! > {note}")  # which closes no files
        elif pid := os.fork():
            note.write_text(str(pid))
        else:
            time.sleep(60)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
        return values

    with pytest.raises(pa.WorkerDiedError):
        collector.collect_async(udf(die)).result(30)
    os.kill(int(note.read_text()), signal.SIGKILL)
    assert collector.collect_async(TINY).result(30).item() == 6


def test_worker_that_dies_idle_is_replaced_in_silence(collector):
    for _ in range(3):
        pid = worker_of(collector)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda gone=pid: gone not in children())
        assert worker_of(collector) != pid
    assert collector.stats()["workers_died"] == 0


def test_path_that_is_no_string_is_in_no_workers_way(collector, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    assert collector.collect_async(TINY).result(30).item() == 6


def test_worker_that_cannot_start_is_a_clear_error(make, monkeypatch):
    monkeypatch.setattr(process, "_BOOTSTRAP", "raise SystemExit(7)  # {path}{socket}{lifeline}")
    collector = make()
    with pytest.raises(pa.WorkerDiedError, match="ended before it was ready, with exit status 7"):
        collector.collect_async(TINY).result(30)
    monkeypatch.undo()
    assert collector.collect_async(TINY).result(30).item() == 6


def test_query_is_cancelled_also_where_its_worker_never_starts(make, monkeypatch):
    never = "import time; time.sleep(60)  # {path}{socket}{lifeline}"
    monkeypatch.setattr(call, "_START_TIMEOUT", 0.1)
    monkeypatch.setattr(process, "_BOOTSTRAP", never)
    collector = make()
    with pytest.raises(pa.QueryTimeoutError):
        collector.collect_async(TINY, timeout=0.1).result(30)
    until_freed(collector)
    handle = collector.collect_async(TINY)
    collector.close(cancel_running=True)
    assert handle.done()
    eventually(lambda: not collector.stats()["workers"])


def test_query_that_is_cancelled_while_its_worker_starts_leaves_it_to_the_next(collector):
    handle = collector.collect_async(TINY)
    eventually(lambda: collector.stats()["workers"])
    handle.cancel()
    until_freed(collector)
    eventually(children)  # it may start still
    (before,) = children()
    assert worker_of(collector) == before


def test_query_that_outgrows_its_memory_is_stopped_and_the_service_lives(make):
    def rows(*_):
        kept = b"x" * 600_000_000
        while kept:  # until it is stopped, however late its memory is looked at
            time.sleep(0.005)
            yield pl.DataFrame({"a": [1]})

    endless = register_io_source(rows, schema={"a": pl.Int64}).sum()
    collector = make(max_memory=400 * 2**20)
    with pytest.raises(pa.QueryMemoryError, match="max_memory=419,430,400") as caught:
        collector.collect_async(endless, engine="streaming").result(30)
    assert isinstance(caught.value, MemoryError)
    assert caught.value.max_memory == 400 * 2**20
    assert collector.collect_async(TINY).result(30).item() == 6


def test_query_that_outgrows_its_memory_while_it_talks_is_stopped_too(make, monkeypatch):
    monkeypatch.setattr(call, "_SAMPLE_INTERVAL", 1.0)
    collector = make(max_memory=400 * 2**20)
    logger = logging.getLogger("of.a.chatterbox")
    logger.propagate = False

    def grow(values):
        end = time.monotonic() + 10
        kept = b"x" * 600_000_000
        while kept and time.monotonic() < end:
            logging.getLogger("of.a.chatterbox").warning("more")
        return values

    with pytest.raises(pa.QueryMemoryError):
        collector.collect_async(udf(grow)).result(30)


def test_worker_that_keeps_much_memory_makes_room_for_another(make):
    collector = make(max_memory=2**30, max_running=1)
    before = worker_of(collector)
    keep = udf(lambda s: setattr(builtins, "kept", b"x" * 600_000_000) or s)
    assert collector.collect_async(keep).result(30).item() == 1
    assert worker_of(collector) != before
    assert collector.stats()["workers_died"] == 0


def test_lambda_without_cloudpickle_says_what_to_install(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(pa.PolarsAsyncError, match=r"install cloudpickle, or polars-async\[proc"):
        make().collect_async(udf(lambda s: s)).result(30)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"executor": "fibres"}, "executor must be 'threads', 'processes', 'auto' or a"),
        ({"executor": None}, "got None"),
        ({"executor": "processes", "max_memory": 0}, "max_memory must be a number of bytes"),
        ({"executor": "processes", "max_memory": "4 apples"}, "max_memory must be a number of"),
    ],
)
def test_arguments_that_mean_nothing(options, words):
    with pytest.raises(ValueError, match=words):
        pa.Collector(**options)


def test_no_process_starts_before_the_first_query(make):
    collector = make()
    assert children() == []
    assert collector.stats()["workers"] == 0


def test_worker_shares_the_processors(make, monkeypatch):
    monkeypatch.setenv("POLARS_MAX_THREADS", "6")
    threads = udf(lambda s: s * 0 + pl.thread_pool_size())
    for running, each in ((1, 6), (2, 6), (3, 6), (5, 2)):
        assert make(max_running=running).collect_async(threads).result(30).item() == each


def test_slow_consumer_holds_its_worker_up_and_leaving_early_frees_it(collector):
    lf = pl.LazyFrame({"n": [0]}).select(k=pl.int_range(0, 5_000_000))

    async def main():
        rows = 0
        async with collector.collect_batches_async(lf, chunk_size=100_000) as batches:
            async for batch in batches:
                rows += batch.height
                if rows >= 300_000:
                    break
        total = 0
        async for batch in collector.collect_batches_async(lf, chunk_size=100_000):
            total += batch.height
        return rows, total

    assert asyncio.run(main()) == (300_000, 5_000_000)
    until_freed(collector)


def test_function_may_ask_for_queries_in_its_worker(collector):
    def ask(values):
        inner = pl.LazyFrame({"a": [40]}).select(pl.col("a") + 1)
        return values + pa.collect_async(inner).result(20).item()

    assert collector.collect_async(udf(ask)).result(30).item() == 42


KILLED = """
import os, sys, time, polars as pl, polars_async as pa
folder = sys.argv[1]
def wait(frame):
    print(os.getpid(), flush=True)
    os.mkdir(f"{folder}/{os.getpid()}")
    while True:
        time.sleep(1)
collector = pa.Collector(executor="processes", max_running=3)
big = pl.LazyFrame({"n": [0]}).select(k=pl.int_range(0, 1_000_000))
kept = collector.collect_async(big).result(30)
for _ in range(2):
    collector.collect_async(pl.LazyFrame({"a": [1]}).map_batches(wait), priority=1)
while len(os.listdir(folder)) < 2:
    time.sleep(0.01)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def test_nothing_is_left_of_a_parent_that_is_killed(tmp_path):
    before = in_shm()
    command = [sys.executable, "-c", f"{KILLED}time.sleep(60)", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        workers = [int(run.stdout.readline()) for _ in range(2)]
        assert all(map(alive, workers))
        run.kill()
        eventually(lambda: not any(map(alive, workers)))
    assert in_shm() <= before


def test_program_ends_at_once_and_quietly_while_workers_run(run_script, tmp_path):
    workers = run_script(KILLED, str(tmp_path))
    assert len(workers) == 2
    eventually(lambda: not any(alive(int(each)) for each in workers))


def test_forked_child_neither_keeps_workers_alive_nor_uses_them(run_script):
    script = """
import os, time, warnings, polars as pl, polars_async as pa
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from 3.12 on
collector = pa.Collector(executor="processes")
tiny = pl.LazyFrame({"a": [1]})
assert collector.collect_async(tiny).result(30).item() == 1
def pid(frame):
    return frame.with_columns(a=pl.lit(os.getpid(), pl.Int64))
(worker,) = {collector.collect_async(tiny.map_batches(pid)).result(30).item() for _ in range(3)}
read, write = os.pipe()
if not (child := os.fork()):
    os.write(write, b"x")
    try:
        found = collector.collect_async(tiny.map_batches(pid)).result(30).item()
        print("other" if found != worker else "same", flush=True)
    except pa.ForkedProcessError:
        print("refused", flush=True)
    time.sleep(0.5)
    collector.close()
    os._exit(0)
os.read(read, 1)
collector.close()
while True:
    try:
        os.kill(worker, 0)
    except ProcessLookupError:
        break
    time.sleep(0.01)
print(os.waitpid(child, 0)[1])
"""
    assert run_script(script) in (["other", "0"], ["refused", "0"])


def test_child_forked_while_a_worker_is_spawned_has_nothing_of_it(run_script):
    script = """
import os, threading, time, warnings, polars as pl, polars_async as pa
from polars_async.executors.processes import process
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from 3.12 on
spawns, spawn = threading.Event(), process.posix_spawn
def slowly(*arguments, **options):
    spawns.set()
    time.sleep(0.3)
    return spawn(*arguments, **options)
def sockets():
    links = []
    for file in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{file}"))
        except OSError:
            pass
    return sum(link.startswith("socket") for link in links)
before = sockets()
process.posix_spawn = slowly
with pa.Collector(executor="processes") as collector:
    handle = collector.collect_async(pl.LazyFrame({"a": [1]}))
    spawns.wait()
    if not (child := os.fork()):
        os._exit(sockets() - before)
    print(os.waitpid(child, 0)[1], handle.result(30).item())
"""
    assert run_script(script) == ["0", "1"]


def test_workers_serve_greenlets_though_all_is_patched(run_script, tmp_path):
    script = """
from gevent import monkey; monkey.patch_all()
import os, sys, time, gevent, polars as pl, polars_async as pa
gate = sys.argv[1]
def tick():
    for _ in range(10):
        gevent.sleep(0.005)
    os.mkdir(gate)
def wait(frame):
    while not os.path.exists(gate):
        time.sleep(0.005)
    return frame
lf = pl.LazyFrame({"n": [0]}).select(k=pl.int_range(0, 5_000_000)).sort("k", descending=True).sum()
with pa.Collector(executor="processes") as collector:
    handles = [collector.collect_async(lf.map_batches(wait), gevent=True) for _ in range(4)]
    gevent.spawn(tick)
    print({handle.get(timeout=40).item() for handle in handles})
    late = collector.collect_async(lf, gevent=True)
    late.cancel() if hasattr(late, "cancel") else None
"""
    assert run_script(script, str(tmp_path / "gate")) == ["{12499997500000}"]


def test_queries_left_in_the_queue_find_their_worker_warm_after_close(make, gate):
    collector = make(max_running=1)
    first = collector.collect_async(gate.lf)
    own = gate.pid()
    handles = [collector.collect_async(udf(lambda s: s * 0 + os.getpid())) for _ in range(5)]
    collector.close(wait=False, cancel_waiting=False)
    gate.open()
    assert first.result(30).item() == 1
    assert {handle.result(30).item() for handle in handles} == {own}
    eventually(lambda: not children())


def test_worker_leaves_it_to_its_parent_to_end_a_service_by_sigterm(collector, gate):
    handle = collector.collect_async(gate.lf)
    pid = gate.pid()
    os.kill(pid, signal.SIGTERM)
    gate.open()
    assert handle.result(30).item() == 1
    assert worker_of(collector) == pid


def test_what_a_function_forks_ends_by_sigterm(collector):
    def fork(values):
        read, write = os.pipe()
        if not (child := os.fork()):
            os.write(write, b"there")
            time.sleep(60)
            os._exit(0)
        os.read(read, 5)
        os.kill(child, signal.SIGTERM)
        return values * 0 + os.waitpid(child, 0)[1]

    assert collector.collect_async(udf(fork)).result(30).item() == signal.SIGTERM


def test_worker_that_is_killed_while_it_starts_is_replaced_in_silence(make, monkeypatch, tmp_path):
    killed = tmp_path / "killed"
    once = f"""
import os, pathlib
if not (killed := pathlib.Path({str(killed)!r})).exists():
    killed.touch()
    os.kill(os.getpid(), 9)
del os, pathlib, killed
"""
    monkeypatch.setattr(process, "_BOOTSTRAP", f"{once}\n{process._BOOTSTRAP}")
    assert make().collect_async(TINY).result(30).item() == 6
    assert killed.exists()
