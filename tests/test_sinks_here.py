"""What a sink hands over to this process arrives here, wherever other queries run."""

from __future__ import annotations

import io
import os
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import inside
import polars as pl
import pytest
from places import LIMIT, Failure, Gate, until

import polars_async as pa
from polars_async.executors.processes import pool
from polars_async.executors.serialization import pack
from polars_async.testing import simulate_gpu

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux"),
    pytest.mark.filterwarnings("ignore:.*unstable"),
]

ROWS = 1000
NUMBERS = pl.LazyFrame({"a": range(ROWS), "k": ["x", "y"] * (ROWS // 2)})


@pytest.fixture
def collector(executor):
    with pa.Collector(executor=executor, max_running=1) as collector:
        yield collector


def in_batches(tmp_path):  # noqa: ARG001  # as the others
    batches = []
    sink = NUMBERS.sink_batches(batches.append, chunk_size=100, lazy=True)
    return sink, lambda: pl.concat(batches)


def by_a_method_that_cannot_be_pickled(tmp_path):  # noqa: ARG001
    batches = queue.SimpleQueue()
    sink = NUMBERS.sink_batches(batches.put, chunk_size=100, lazy=True)
    return sink, lambda: pl.concat([batches.get_nowait() for _ in range(batches.qsize())])


def in_memory(tmp_path):  # noqa: ARG001
    file = io.BytesIO()
    return NUMBERS.sink_parquet(file, lazy=True), lambda: pl.read_parquet(file.getvalue())


def in_an_open_file(tmp_path):
    path = tmp_path / "open.csv"
    file = path.open("wb")

    def found():
        file.close()
        return pl.read_csv(path)

    return NUMBERS.sink_csv(file, lazy=True), found


def partitions(folder, provider):
    by = pl.PartitionBy(folder, key="k", include_key=True, file_path_provider=provider)
    return NUMBERS.sink_parquet(by, lazy=True)


def in_partitions_in_memory(tmp_path):
    files = {}

    def provide(args):
        return files.setdefault(args.partition_keys.item(), io.BytesIO())

    def found():
        parts = [pl.read_parquet(file.getvalue()) for file in files.values()]
        return pl.concat(parts).sort("a")

    return partitions(tmp_path, provide), found


def in_partitions_with_names_that_are_noted(tmp_path):
    names, lock = [], threading.Lock()

    def provide(args):
        with lock:  # which cannot be pickled
            names.append(f"{args.partition_keys.item()}.parquet")
            return names[-1]

    def found():
        return pl.concat(pl.read_parquet(tmp_path / name) for name in names).sort("a")

    return partitions(tmp_path, provide), found


def in_a_file_whose_name_is_told(tmp_path):
    told = []

    def note(args):
        told.extend(each.path for each in args.paths)

    sink = NUMBERS.sink_parquet(tmp_path / "a.parquet", lazy=True, sinked_paths_callback=note)
    return sink, lambda: pl.read_parquet(told)


SINKS = [
    in_batches,
    by_a_method_that_cannot_be_pickled,
    in_memory,
    in_an_open_file,
    in_partitions_in_memory,
    in_partitions_with_names_that_are_noted,
    in_a_file_whose_name_is_told,
]


@pytest.mark.everywhere
@pytest.mark.parametrize("make", SINKS)
def test_all_that_a_sink_hands_over_arrives_here(collector, tmp_path, make):
    sink, found = make(tmp_path)
    assert collector.sink_async(sink).result(30) is None
    assert found().sort("a").equals(NUMBERS.collect())


@pytest.mark.parametrize("kind", ["auto", "pool"])
@pytest.mark.parametrize("make", [in_batches, in_memory])
def test_no_choice_of_a_place_takes_it_away(kind, tmp_path, make):
    executor = ThreadPoolExecutor(1) if kind == "pool" else kind
    with pa.Collector(executor=executor) as collector:
        sink, found = make(tmp_path)
        collector.sink_async(sink, priority=-1).result(30)  # which takes it for no small one
        assert found().sort("a").equals(NUMBERS.collect())


@pytest.mark.everywhere
def test_it_arrives_however_the_sink_is_collected(collector, tmp_path):
    for collect in (
        lambda sink: collector.collect_async(sink).result(30),
        lambda sink: collector.collect_background(sink).fetch_blocking(),
        lambda sink: collector.collect_all_async([NUMBERS.select(pl.len()), sink]).result(30),
    ):
        sink, found = in_batches(tmp_path)
        collect(sink)
        assert found().sort("a").equals(NUMBERS.collect())


@pytest.mark.everywhere
def test_error_of_what_it_calls_is_the_one_that_was_raised(collector):
    error = Failure("full")

    def fail(_):
        raise error

    with pytest.raises(Failure) as caught:
        collector.sink_async(NUMBERS.sink_batches(fail, lazy=True)).result(30)
    assert caught.value is error


@pytest.mark.everywhere
def test_sink_that_waits_here_says_that_nothing_stops_it(collector):
    begun, gate = Gate(), Gate()

    def wait(_):
        begun.set()
        gate.wait()

    handle = collector.sink_async(NUMBERS.sink_batches(wait, lazy=True), timeout=60)
    until(begun.is_set)
    inside.let_time_be_up(handle)
    with pytest.raises(pa.QueryTimeoutError, match="Polars cannot stop it"):
        handle.result(30)
    gate.set()
    until(lambda: not collector.stats()["running"])


@pytest.mark.everywhere
def test_sink_by_a_path_alone_runs_where_queries_do(collector, executor, tmp_path):
    pid = NUMBERS.head(1).map_batches(
        lambda _: pl.DataFrame({"pid": [os.getpid()]}), schema={"pid": pl.Int64}
    )
    for name, target in {"a.parquet": tmp_path / "a.parquet", "parts": None}.items():
        path = tmp_path / name
        sink = pid.sink_parquet(target or pl.PartitionBy(path, key="pid"), mkdir=True, lazy=True)
        collector.sink_async(sink).result(30)
        assert (pl.read_parquet(path)["pid"].item() == os.getpid()) is (executor == "threads")


def test_sink_that_is_cancelled_while_it_is_packed_is_not_run_here(monkeypatch):
    called, handles, ready = [], [], threading.Event()

    def pack_and_let_go(work, **options):
        assert ready.wait(LIMIT)
        try:
            return pack(work, **options)
        finally:
            handles[0].cancel()

    monkeypatch.setattr(pool, "pack", pack_and_let_go)
    with pa.Collector(executor="processes") as collector:
        handles.append(collector.sink_async(NUMBERS.sink_batches(called.append, lazy=True)))
        ready.set()
        until(lambda: not collector.stats()["running"])
        assert collector.stats()["cancelled"] == 1
    assert called == []


def test_gpu_in_another_process_leaves_it_to_the_cpu_here(tmp_path):
    options = {"executor": "processes", "engine": "gpu", "gpu": "offload"}
    with simulate_gpu(), pa.Collector(**options) as collector:
        sink, found = in_batches(tmp_path)
        handle = collector.sink_async(sink)
        handle.result(30)
        assert handle.resolution.fell_back
        assert "cannot leave this process" in handle.resolution.message
        assert found().sort("a").equals(NUMBERS.collect())
        forbidden = collector.sink_async(sink, engine=pl.GPUEngine(raise_on_fail=True))
        with pytest.raises(pa.PolarsAsyncError, match="cannot leave this process"):
            forbidden.result(30)
