"""What becomes of queries that are offloaded to the GPU: there, and where the GPU fails."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from types import SimpleNamespace
from weakref import ref

import inside
import polars as pl
import pytest
from conftest import TINY, Blocked
from places import HEARS_CTRL_C, until

from polars_async import (
    AsyncEngine,
    Collector,
    EngineDowngradeWarning,
    EngineUnavailableError,
    EventKind,
    QueryTimeoutError,
    Reason,
    gpu_status,
    resolve_engine,
)
from polars_async._runtime import upstream
from polars_async.executors.threads import ThreadPool
from polars_async.gpu import attempt, offload
from polars_async.gpu.breaker import COOLDOWN, FAILURES, Health, breaker
from polars_async.scheduling import times
from polars_async.scheduling.admission import Admission
from polars_async.testing import simulate_gpu

STRICT = pl.GPUEngine(raise_on_fail=True)
FLAGS = pl.QueryOptFlags()
ENDS = {"finished", "failed", "cancelled", "timed_out"}
FAILURES_OF_THE_GPU = {
    "unsupported": (Reason.UNSUPPORTED_QUERY, NotImplementedError),
    "translation": (Reason.TRANSLATION_FAILED, ValueError),
    "oom": (Reason.OUT_OF_MEMORY, MemoryError),
    "cuda": (Reason.CUDA_ERROR, RuntimeError),
}
every_failure = pytest.mark.parametrize("fault", FAILURES_OF_THE_GPU)


@pytest.fixture(autouse=True)
def gpu():
    with simulate_gpu() as gpu:
        yield gpu


@pytest.fixture
def events():
    return []


@pytest.fixture
def collector(events, gpu):  # noqa: ARG001  # closed before it is gone
    with Collector(gpu="offload", max_running=2, on_event=events.append) as collector:
        yield collector
    assert not collector._gpu.admission.running
    assert collector._cpu.admission.lock is collector._gpu.admission.lock


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(breaker, "_clock", clock)
    return clock


def kinds(events):
    """Give what happened to a query, once its end is told, which may be after it is done."""
    until(lambda: events and events[-1].kind in ENDS)
    return [str(event.kind) for event in events]


def counting(lf=TINY):
    """A query that counts how often it has run."""
    runs = []
    return lf.map_batches(lambda df: (runs.append(threading.get_ident()), df)[1]), runs


def frames(number):
    return [pl.LazyFrame({"a": [i]}) for i in range(number)]


# On the GPU


def test_query_that_the_gpu_takes_says_so(collector, gpu, events):
    handle = collector.collect_async(TINY, engine="gpu")
    assert handle.result(30).item() == 1
    assert gpu.queries == 1
    found = handle.resolution
    assert (found.name, found.fell_back, found.downgraded) == ("gpu", False, False)
    assert (found.reason, found.cause) == (None, None)
    assert kinds(events) == ["queued", "started", "finished"]
    assert {event.engine for event in events} == {"gpu"}
    assert collector.stats()["fell_back"] == 0


def test_loop_goes_on_while_the_gpu_works(collector, blocked):
    async def main():
        handle = collector.collect_async(blocked.lf, engine="gpu")
        while not blocked.started.is_set():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.001)
        assert not handle.done()
        blocked.gate.set()  # else it would fail in the end
        return await handle

    assert asyncio.run(main()).item() == 1


@pytest.mark.parametrize("patched", ["before", "after", "never"])
def test_hub_goes_on_while_the_gpu_works(run_script, patched):
    assert run_script(GEVENT, patched) == ["1", "gpu"]


GEVENT = """
import faulthandler, sys
faulthandler.dump_traceback_later(40, exit=True)
patch = "import gevent.monkey; gevent.monkey.patch_all()"
if sys.argv[1] == "before":
    exec(patch)
import polars as pl, polars_async as pa
from polars_async._runtime.unpatched import allocate_lock
from polars_async.testing import simulate_gpu
if sys.argv[1] == "after":
    exec(patch)
import gevent
started, gate = allocate_lock(), allocate_lock()
started.acquire()
gate.acquire()
def udf(df):
    started.release()
    gate.acquire()
    return df
def let_go_on():
    while not started.acquire(blocking=False):
        gevent.sleep(0.001)
    gate.release()
gevent.spawn(let_go_on)
with simulate_gpu(), pa.Collector(gpu="offload") as collector:
    lf = pl.LazyFrame({"a": [1]}).map_batches(udf)
    handle = collector.collect_async(lf, engine="gpu", gevent=True)
    print(handle.get().item(), handle.resolution.name)
"""


def test_cudf_polars_is_imported_on_the_thread_of_the_gpu_by_its_first_query(collector, gpu):
    threads = []
    check = gpu.check_import
    gpu.check_import = lambda: (threads.append(threading.get_ident()), check())
    collector.collect_async(TINY).result(30)
    collector.resolve_engine("gpu")
    assert "cudf_polars" not in sys.modules
    lf, runs = counting()
    for _ in range(3):
        collector.collect_async(lf, engine="gpu").result(30)
    assert threads == runs[:1]
    assert threads[0] != threading.get_ident()


@pytest.mark.parametrize("works", [True, False])
def test_thread_of_the_gpu_has_a_context_of_cuda_before_its_first_query(
    collector, monkeypatch, works
):
    calls = []

    def cuda_free(pointer):
        calls.append((pointer, threading.get_ident()))
        if not works:
            raise RuntimeError("no driver")

    runtime = SimpleNamespace(cudaFree=cuda_free)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    lf, runs = counting()
    for _ in range(3):
        assert collector.collect_async(lf, engine="gpu").result(30).item() == 1
    assert calls == [(0, runs[0])]


def test_engine_objects_reach_cudf_polars_as_they_are(collector, monkeypatch):
    class Cluster(pl.GPUEngine):
        """As those of cudf-polars for Ray and Dask."""

    engines = [Cluster(raise_on_fail=True), pl.GPUEngine(device=0), Cluster(executor="in-memory")]
    given = []
    collector.collect_async(TINY, engine="gpu").result(30)
    module = sys.modules["cudf_polars"]
    execute = module.execute_with_cudf
    monkeypatch.setattr(
        module,
        "execute_with_cudf",
        lambda *arguments, config: (given.append(config), execute(*arguments, config=config)),
    )
    for engine in engines:
        handle = collector.collect_async(TINY, engine=engine)
        handle.result(30)
        assert handle.resolution.engine is engine
    assert all(found is engine for found, engine in zip(given, engines, strict=True))


def test_two_collectors_take_turns_on_the_gpu(gpu):
    alone, finds = threading.Lock(), []

    def run(df):
        finds.append(alone.acquire(blocking=False))
        time.sleep(0.002)
        alone.release()
        return df

    lf = TINY.map_batches(run)
    with Collector(gpu="offload") as first, Collector(gpu="offload") as second:
        handles = [each.collect_async(lf, engine="gpu") for each in (first, second) * 10]
        engine = AsyncEngine(Collector(engine="gpu", gpu="offload"))
        for _ in range(5):
            lf.collect(engine=engine)
        for handle in handles:
            handle.result(30)
    assert finds == [True] * 25
    assert gpu.queries == 25


def test_batches_come_from_the_gpu(collector, gpu):
    lf = pl.LazyFrame({"a": range(10)})

    async def main():
        stream = collector.collect_batches_async(lf, engine="gpu", chunk_size=4)
        return stream.resolution.name, [batch["a"].to_list() async for batch in stream]

    assert asyncio.run(main()) == ("gpu", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])
    assert gpu.queries == 1


def test_batches_that_nobody_fetches_do_not_keep_the_gpu(collector):
    lf = pl.LazyFrame({"a": range(100)})

    async def main():
        stream = collector.collect_batches_async(lf, engine="gpu", chunk_size=1)
        first = await anext(stream)
        other = await collector.collect_async(TINY, engine="gpu")
        cooldown = [batch.item() async for batch in stream]
        return first.item(), other.item(), cooldown

    assert asyncio.run(main()) == (0, 1, list(range(1, 100)))
    assert collector._gpu._threads.threads == 1


def test_sink_runs_on_the_gpu(collector, gpu, tmp_path):
    path = tmp_path / "a.parquet"
    handle = collector.sink_async(TINY.sink_parquet(path, lazy=True), engine="gpu")
    assert handle.result(30) is None
    assert pl.read_parquet(path).item() == 1
    assert (handle.resolution.name, gpu.queries) == ("gpu", 1)


# The fallback


@every_failure
def test_query_falls_back_where_the_gpu_fails(collector, gpu, events, caplog, fault):
    reason, error = FAILURES_OF_THE_GPU[fault]
    gpu.fail = fault
    lf, runs = counting()
    handle = collector.collect_async(lf, engine="gpu", label="it")
    assert handle.result(30).item() == 1
    assert len(runs) == 1
    found = handle.resolution
    assert (found.requested, found.source) == ("gpu", "argument")
    assert (found.name, found.engine.name) == ("in-memory", "in-memory")
    assert (found.fell_back, found.downgraded, found.reason) == (True, False, reason)
    assert type(found.cause) is error
    assert found.cause.__traceback__ is None  # its frames would hold what lies on the GPU
    assert "simulated" in found.message
    assert found.message.startswith("the engine argument asks for the GPU engine, but ")
    assert ", so the in-memory engine runs: " in found.message
    assert found.gpu.usable
    retried = ["retried"] * (fault == "oom")
    assert kinds(events) == ["queued", "started", *retried, "fell_back", "started", "finished"]
    on_gpu = 2 + len(retried)
    assert [event.engine for event in events] == ["gpu"] * on_gpu + ["in-memory"] * 3
    assert events[on_gpu].error is found.cause
    assert events[on_gpu].resolution is found
    [*_, record] = caplog.records
    assert len(caplog.records) == 1 + len(retried)
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"query {events[0].query_id} 'it' fell back: ")
    until(lambda: not collector.stats()["running"])  # its slot is free after its end is told
    stats = collector.stats()
    assert (stats["fell_back"], stats["completed"], stats["submitted"]) == (1, 1, 1)
    assert (stats["running"], stats["gpu_running"], stats["downgraded"]) == (0, 0, 0)


@every_failure
def test_nothing_falls_back_where_the_cpu_is_forbidden(collector, gpu, events, fault):
    gpu.fail = fault
    lf, runs = counting()
    handle = collector.collect_async(lf, engine=STRICT)
    error = FAILURES_OF_THE_GPU[fault][1]
    in_translation = fault in ("unsupported", "translation")
    with pytest.raises(pl.exceptions.ComputeError if in_translation else error) as caught:
        handle.result(30)
    original = caught.value.__cause__ if in_translation else caught.value
    assert type(original) is error
    assert "simulated" in str(original)
    assert runs == []
    assert (handle.resolution.name, handle.resolution.fell_back) == ("gpu", False)
    assert kinds(events)[-1] == "failed"
    assert collector.stats()["fell_back"] == 0


@pytest.mark.parametrize("fault", [None, "unsupported"])
@pytest.mark.parametrize(
    "error",
    [
        LookupError("no"),
        MemoryError("the UDF's own"),
        RuntimeError("CUDA, says the UDF"),
        NotImplementedError("no"),
        pl.exceptions.ComputeError("no"),
        FileNotFoundError("no"),
        KeyboardInterrupt(),
        SystemExit(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_a_udf_is_never_tried_again(collector, gpu, events, error, fault):
    gpu.fail = fault
    runs = []

    def fail(df):
        runs.append(df)
        raise error

    handle = collector.collect_async(TINY.map_batches(fail), engine="gpu")
    with pytest.raises(type(error)):
        handle.result(30)
    assert len(runs) == 1
    assert handle.resolution.fell_back is (fault == "unsupported")
    assert kinds(events)[-1] == "failed"
    assert breaker.health.failures == 0


@pytest.mark.parametrize("named", [True, False])
def test_error_that_comes_out_of_an_error_of_a_udf_is_never_tried_again(
    collector, monkeypatch, named
):
    def run(*_):
        try:
            lf.collect(engine="in-memory")
        except AttributeError as error:
            own = RuntimeError("the GPU engine makes it one of its own")
            if named:
                raise own from error
            raise own  # noqa: B904

    lf = TINY.map_batches(eval("lambda df: df.gone", {"__name__": "service"}))
    monkeypatch.setattr(upstream, "gpu_callback", lambda _: lambda plan, *_: plan.set_udf(run))
    monkeypatch.setitem(run.__globals__, "__name__", "cudf_polars.callback")
    with pytest.raises(RuntimeError, match="one of its own"):
        collector.collect_async(lf, engine="gpu").result(30)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        (TINY.select("b"), pl.exceptions.ColumnNotFoundError),
        (pl.scan_parquet("gone.parquet"), FileNotFoundError),
        (TINY.select(pl.col("a").str.to_uppercase()), pl.exceptions.SchemaError),
    ],
    ids=["column", "file", "type"],
)
def test_error_of_the_query_itself_is_never_tried_again(collector, events, query, error):
    handle = collector.collect_async(query, engine="gpu")
    with pytest.raises((error, pl.exceptions.InvalidOperationError)):
        handle.result(30)
    assert kinds(events) == ["queued", "started", "failed"]
    assert handle.resolution.name == "gpu"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_translation_that_is_interrupted_ends_the_query(collector, monkeypatch, error):
    def translate(*_):
        raise error

    monkeypatch.setattr(upstream, "gpu_callback", lambda _: translate)
    with pytest.raises(error):
        collector.collect_async(TINY, engine="gpu").result(30)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotImplementedError("late"), Reason.UNSUPPORTED_QUERY),
        (ValueError("a fault of the engine"), Reason.GPU_FAILED),
        (RuntimeError("CUDF failure at: a.cpp:1: overflow"), Reason.GPU_FAILED),
        (RuntimeError("CUDA error at: a.cpp:1: 700 cudaErrorIllegalAddress"), Reason.CUDA_ERROR),
        (pl.exceptions.ComputeError("GPU engine requested, but incorrect cudf-polars"), None),
    ],
    ids=["unsupported", "value", "cudf", "cuda", "old"],
)
def test_other_errors_of_the_engine_fall_back_too(collector, monkeypatch, error, reason):
    def run(*_):
        raise error

    monkeypatch.setattr(upstream, "gpu_callback", lambda _: lambda plan, *_: plan.set_udf(run))
    monkeypatch.setitem(run.__globals__, "__name__", "cudf_polars.callback")
    handle = collector.collect_async(TINY, engine="gpu")
    assert handle.result(30).item() == 1
    assert handle.resolution.reason is (reason or Reason.GPU_FAILED)
    assert handle.resolution.cause is error


def test_error_of_the_operating_system_is_of_the_query(collector, monkeypatch):
    def run(*_):
        raise PermissionError("a file that it scans")

    monkeypatch.setattr(upstream, "gpu_callback", lambda _: lambda plan, *_: plan.set_udf(run))
    monkeypatch.setitem(run.__globals__, "__name__", "cudf_polars.callback")
    with pytest.raises(PermissionError):
        collector.collect_async(TINY, engine="gpu").result(30)


def test_query_runs_as_it_is_where_the_callback_has_moved(collector, gpu, monkeypatch):
    monkeypatch.setattr(upstream, "gpu_callback", lambda _: None)
    handle = collector.collect_async(TINY, engine="gpu")
    assert (handle.result(30).item(), gpu.queries) == (1, 1)
    assert handle.resolution.name == "gpu"


@pytest.mark.parametrize("engine", ["gpu", STRICT])
def test_import_that_crashes_is_noted_and_not_tried_again(collector, gpu, engine):
    gpu.fail = "import"
    tries = []
    check = gpu.check_import
    gpu.check_import = lambda: (tries.append(1), check())
    assert gpu_status().usable
    if engine is STRICT:
        with pytest.raises(ImportError, match="simulated"):
            collector.collect_async(TINY, engine=engine).result(30)
        with pytest.raises(EngineUnavailableError, match="its import fails"):
            collector.collect_async(TINY, engine=engine)
    else:
        handle = collector.collect_async(TINY, engine=engine)
        assert handle.result(30).item() == 1
        assert handle.resolution.reason is Reason.CUDF_BROKEN
        assert handle.resolution.fell_back
        with pytest.warns(EngineDowngradeWarning, match="its import fails"):
            handle = collector.collect_async(TINY, engine=engine)
        assert handle.result(30).item() == 1
        assert handle.resolution.downgraded
    assert not gpu_status().usable
    assert gpu_status().reason is Reason.CUDF_BROKEN
    assert len(tries) == 1


# Several frames, batches, sinks


def test_frames_that_fail_on_the_gpu_are_collected_as_one_on_the_cpu(collector, gpu, monkeypatch):
    gpu.fail = {2: "oom", 4: "unsupported"}
    together = []
    collect_all = pl.collect_all
    monkeypatch.setattr(
        pl, "collect_all", lambda lfs, **of: (together.append(len(lfs)), collect_all(lfs, **of))[1]
    )
    handle = collector.collect_all_async(frames(5), engine="gpu")
    assert [frame.item() for frame in handle.result(30)] == [0, 1, 2, 3, 4]
    assert together == [2]
    assert gpu.queries == 5
    found = handle.resolution
    assert (found.name, found.fell_back) == ("in-memory", True)
    assert found.reason is Reason.OUT_OF_MEMORY
    assert "2 of 5 frames" in found.message


def test_frames_that_the_gpu_has_collected_are_not_run_again(collector, gpu):
    gpu.fail = {2: "oom"}
    queries = [counting(frame) for frame in frames(3)]
    collector.collect_all_async([lf for lf, _ in queries], engine="gpu").result(30)
    assert [len(runs) for _, runs in queries] == [1, 1, 1]


def test_error_of_one_frame_ends_them_all(collector, gpu):
    gpu.fail = {1: "oom"}
    third, runs = counting()
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        collector.collect_all_async([TINY, TINY.select("b"), third], engine="gpu").result(30)
    assert runs == []


@every_failure
def test_batches_fall_back(collector, gpu, fault):
    gpu.fail = fault
    lf = pl.LazyFrame({"a": range(10)})

    async def main():
        stream = collector.collect_batches_async(lf, engine="gpu", chunk_size=3)
        return [batch["a"].to_list() async for batch in stream], stream.resolution

    batches, found = asyncio.run(main())
    assert list(chain(*batches)) == list(range(10))
    assert (found.name, found.reason) == ("in-memory", FAILURES_OF_THE_GPU[fault][0])


def test_batches_that_fell_back_are_held_up_by_a_slow_consumer(collector, gpu):
    gpu.fail = "oom"
    lf = pl.LazyFrame({"a": range(1000)})

    async def main():
        stream = collector.collect_batches_async(lf, engine="gpu", chunk_size=1)
        await anext(stream)
        while not collector._cpu.admission.paused:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.001)
        assert len(inside.lying_ready(stream._buffer)) <= 2
        gpu.fail = None
        assert (await collector.collect_async(TINY, engine="gpu")).item() == 1
        return 1 + len([batch async for batch in stream])

    assert asyncio.run(main()) == 1000


@every_failure
def test_sink_falls_back(collector, gpu, tmp_path, fault):
    gpu.fail = fault
    path = tmp_path / "a.csv"
    handle = collector.sink_async(TINY.sink_csv(path, lazy=True), engine="gpu")
    assert handle.result(30) is None
    assert path.read_text() == "a\n1\n"
    assert handle.resolution.reason is FAILURES_OF_THE_GPU[fault][0]


def test_as_completed_and_background_queries_fall_back_one_by_one(collector, gpu):
    gpu.fail = {2: "oom"}

    async def main():
        stream = collector.as_completed(frames(3), engine="gpu")
        return sorted([(number, frame.item()) async for number, frame in stream])

    assert asyncio.run(main()) == [(0, 0), (1, 1), (2, 2)]
    gpu.fail = "oom"
    assert collector.collect_background(TINY, engine="gpu").fetch_blocking().item() == 1
    found = collector.collect_all_background(frames(2), engine="gpu").fetch_blocking()
    assert [frame.item() for frame in found] == [0, 1]


# In the other lane


def test_queries_that_fell_back_run_no_more_at_once_than_may(collector, gpu):
    gpu.fail = "unsupported"
    running, most, lock = 0, 0, threading.Lock()

    def run(df):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        return df

    handles = [collector.collect_async(TINY.map_batches(run), engine="gpu") for _ in range(40)]
    for handle in handles:
        assert handle.result(30).item() == 1
    assert most <= 2
    assert collector.stats()["fell_back"] == 40


def test_gpu_is_free_for_the_next_while_one_that_fell_back_runs(collector, gpu, blocked):
    gpu.fail = {1: "unsupported"}
    fallen = collector.collect_async(blocked.lf, engine="gpu")
    assert blocked.started.wait(30)
    assert collector.collect_async(TINY, engine="gpu").result(30).item() == 1
    until(lambda: not collector.stats()["gpu_running"])
    assert collector.stats()["running"] == 1
    blocked.gate.set()
    assert fallen.result(30).item() == 1


def test_query_asked_for_in_a_query_falls_back_beyond_the_slots(gpu):
    gpu.fail = "unsupported"
    with Collector(gpu="offload", max_running=1, max_waiting=0) as collector:

        def udf(df):
            inner = collector.collect_async(TINY, engine="gpu")
            return inner.result().with_columns(df["a"])

        assert collector.collect_async(TINY.map_batches(udf)).result(30).item() == 1
        # The same in one that fell back itself, so that the GPU is free.
        outer = collector.collect_async(TINY.map_batches(udf), engine="gpu")
        assert outer.result(30).item() == 1


def test_limits_of_the_line_do_not_hold_for_what_was_let_in_already(gpu, blocked):
    gpu.fail = "oom"
    with Collector(gpu="offload", max_running=1, max_waiting=0) as collector:
        running = collector.collect_async(blocked.lf)
        assert blocked.started.wait(30)
        fallen = collector.collect_async(TINY, engine="gpu")
        while not inside.waiting(collector):
            time.sleep(0.001)
        assert not fallen.done()
        blocked.gate.set()
        assert fallen.result(30).item() == running.result(30).item() == 1


def test_query_that_fell_back_is_estimated_as_what_it_is_then(collector, tried, blocked):
    busy = collector.collect_async(blocked.lf)  # so that none starts without an estimate
    assert blocked.started.wait(30)
    first = collector.collect_async(tried.lf, engine="gpu")
    assert tried.started.wait(30)
    waiting = collector.collect_async(TINY, engine="gpu")
    estimated = waiting._query
    estimated.set_estimate(collector._gpu._costs)  # as it is where more of them wait
    before = estimated.estimate
    then = collector._cpu._costs.of([TINY], "in-memory")  # before the run corrects it
    tried.gate.set()
    waiting.result(30)
    assert estimated.estimate == then
    assert estimated.estimate != before
    blocked.gate.set()
    first.result(30)
    busy.result(30)


def test_time_on_the_gpu_counts_as_time_until_it_ran(collector, tried, events):
    handle = collector.collect_async(tried.lf, engine="gpu")
    assert tried.started.wait(30)
    begun = time.perf_counter()
    while (tries := time.perf_counter() - begun) < 0.05:
        time.sleep(0.01)
    tried.gate.set()
    handle.result(30)
    collector.close()
    by_kind = {str(event.kind): event for event in events}
    assert by_kind["fell_back"].run_seconds is None
    finished, stats = by_kind["finished"], collector.stats()
    assert finished.queue_seconds >= tries
    assert stats["queue_seconds"] <= finished.queue_seconds - tries
    assert stats["run_seconds"] == finished.run_seconds


class Tried(Blocked):
    """A query at which the GPU fails when it is let go on; on the CPU it runs at once."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.runs = []

        def run(*_):
            self.started.set()
            self.gate.wait()
            raise MemoryError

        monkeypatch.setattr(upstream, "gpu_callback", lambda _: lambda plan, *_: plan.set_udf(run))
        monkeypatch.setitem(run.__globals__, "__name__", "cudf_polars.callback")

    @property
    def lf(self):
        return TINY.map_batches(lambda df: (self.runs.append(1), df)[1])


@pytest.fixture
def tried(monkeypatch, collector):  # noqa: ARG001  # closed before
    tried = Tried(monkeypatch)
    yield tried
    tried.gate.set()


def test_query_that_was_cancelled_while_the_gpu_tried_it_does_not_fall_back(
    collector, tried, events
):
    handle = collector.collect_async(tried.lf, engine="gpu")
    assert tried.started.wait(30)
    handle.cancel()
    with pytest.raises(CancelledError):
        handle.result(30)
    assert collector.stats()["abandoned"] == 1
    tried.gate.set()
    collector.close()
    assert tried.runs == []
    assert kinds(events) == ["queued", "started", "cancelled"]
    assert collector.stats()["fell_back"] == 0


@pytest.mark.parametrize("how", ["cancelled", "timed_out"])
def test_query_that_fell_back_may_leave_the_queue(gpu, blocked, events, how):
    gpu.fail = "oom"
    with Collector(gpu="offload", max_running=1, on_event=events.append) as collector:
        collector.collect_async(blocked.lf)
        assert blocked.started.wait(30)
        lf, runs = counting()
        timeout = 3600 if how == "timed_out" else None
        handle = collector.collect_async(lf, engine="gpu", timeout=timeout, label="it")
        while not inside.waiting(collector):
            time.sleep(0.001)
        if how == "cancelled":
            assert handle.cancel()
        else:
            inside.let_time_be_up(handle)
        with pytest.raises((CancelledError, QueryTimeoutError)):
            handle.result(30)
        stats = collector.stats()
        assert (stats["waiting"], stats["fell_back"], stats[how.replace(" ", "_")]) == (0, 1, 1)
        blocked.gate.set()
    assert runs == []
    assert [str(event.kind) for event in events if event.label == "it"] == [
        "queued",
        "started",
        "retried",
        "fell_back",
        how,
    ]


def test_query_that_is_cancelled_while_its_fallback_is_told_does_not_run(gpu):
    gpu.fail = "oom"
    told, running = [], []

    def on_event(event):
        told.append(str(event.kind))
        if event.kind is EventKind.FELL_BACK:
            assert gate.wait(30)  # there is a handle
            handle.cancel()
            until(lambda: not inside.running(collector))  # the one before
            running.append(collector.stats()["running"])

    with Collector(gpu="offload", on_event=on_event) as collector:
        lf, runs = counting()
        query = collector.collect_async(lf, engine="in-memory")._query  # for its thread to be there
        while not query.done:
            time.sleep(0.001)
        del told[:], runs[:]
        gate = threading.Event()
        before = collector.collect_async(TINY.map_batches(lambda df: (gate.wait(), df)[1]))
        handle = collector.collect_async(lf, engine="gpu")
        gate.set()
        with pytest.raises(CancelledError):
            handle.result(30)
        before.result(30)
    assert runs == []
    assert running == [1]  # in its slot until it is in the other lane
    assert told.count("cancelled") == 1
    assert collector.stats()["running"] == collector.stats()["waiting"] == 0


@pytest.mark.parametrize("cancel_waiting", [True, False])
def test_close_waits_for_the_query_that_falls_back_meanwhile(tried, collector, cancel_waiting):
    handle = collector.collect_async(tried.lf, engine="gpu")
    assert tried.started.wait(30)
    closer = threading.Thread(target=collector.close, kwargs={"cancel_waiting": cancel_waiting})
    closer.start()
    while not collector._gpu.admission.waiters:
        time.sleep(0.001)
    tried.gate.set()
    closer.join(30)
    assert not closer.is_alive()
    assert tried.runs == [1]
    assert handle.done()
    assert handle.result().item() == 1


@pytest.fixture
def no_thread(collector, monkeypatch):
    """No thread is to be had any more for queries on the CPU."""

    start = ThreadPool.start

    def start_none(executor, *job, **options):
        if executor is collector._cpu._threads:
            raise RuntimeError("can't start new thread")
        start(executor, *job, **options)

    with monkeypatch.context() as patch:
        yield lambda: patch.setattr(ThreadPool, "start", start_none)


def test_query_fails_where_no_thread_is_to_be_had_for_its_fallback(
    collector, gpu, events, no_thread
):
    collector.collect_async(TINY, engine="gpu").result(30)
    assert kinds(events) == ["queued", "started", "finished"]
    gpu.fail = "oom"
    del events[:]
    no_thread()
    handle = collector.collect_async(TINY, engine="gpu")
    with pytest.raises(RuntimeError, match="can't start new thread"):
        handle.result(30)
    stats = collector.stats()
    assert (stats["running"], stats["waiting"], stats["failed"]) == (0, 0, 1)
    assert kinds(events) == ["queued", "started", "retried", "fell_back", "failed"]


def test_query_that_fell_back_waits_for_the_threads_that_there_are(
    collector, gpu, blocked, no_thread
):
    collector.collect_async(TINY, engine="gpu").result(30)
    running = collector.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    gpu.fail = "oom"
    no_thread()
    handle = collector.collect_async(TINY, engine="gpu")
    while not inside.waiting(collector):
        time.sleep(0.001)
    assert not handle.done()
    blocked.gate.set()
    assert handle.result(30).item() == running.result(30).item() == 1


def test_numbers_add_up_at_every_moment_while_queries_fall_back(collector, gpu):
    gpu.fail = "unsupported"
    over, wrong = threading.Event(), []

    def look():
        while not over.wait(0.0001):  # or it would leave the GIL to nobody
            found = collector.stats()
            outcomes = ("completed", "failed", "cancelled", "timed_out", "rejected", "waiting")
            sum_ = sum(found[key] for key in outcomes) + found["running"] - found["abandoned"]
            if sum_ != found["submitted"]:
                wrong.append(found)

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(200):
        handles = [collector.collect_async(TINY, engine="gpu") for _ in range(5)]
        handles[2].cancel()
        for handle in handles[:2] + handles[3:]:
            handle.result(30)
    over.set()
    watcher.join(30)
    assert wrong == []


FORK = """
import logging, os, sys, faulthandler, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from 3.12 on
logging.disable()
faulthandler.dump_traceback_later(40, exit=True)
import polars as pl, polars_async as pa
from polars_async.testing import simulate_gpu
with simulate_gpu(fail="oom"):
    collector = pa.Collector(gpu="offload")
    others = [pa.Collector() for _ in range(20)]
    child = os.fork()
    if not child:
        handle = collector.collect_async(pl.LazyFrame({"a": [1]}), engine="gpu")
        print(handle.result(30).item(), handle.resolution.reason, flush=True)
        pairs = [(each._cpu.admission, each._gpu.admission) for each in (collector, *others)]
        print(all(cpu.lock is gpu.lock for cpu, gpu in pairs), flush=True)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_forked_child_falls_back_too(run_script):
    assert run_script(FORK) == ["1", "out_of_gpu_memory", "True", "0"]


def test_query_is_in_one_lane_at_least_while_it_goes_over(collector, gpu, monkeypatch):
    """For a fork may come at any time, and its child has to find it."""
    gpu.fail = "oom"
    found = []
    take_over = Admission.take_over

    def look(admission, query):
        found.append(query in collector._gpu.admission.in_slots())
        return take_over(admission, query)

    monkeypatch.setattr(Admission, "take_over", look)
    collector.collect_async(TINY, engine="gpu").result(30)
    assert found == [True]


def test_text_of_a_time_out_tells_of_the_gpu(collector, tried, blocked):
    running = [collector.collect_async(blocked.lf) for _ in range(2)]
    assert blocked.started.wait(30)
    handle = collector.collect_async(tried.lf, engine="gpu", timeout=3600)
    assert tried.started.wait(30)
    tried.gate.set()
    until(lambda: handle._query.ahead is not None)  # it waits again
    inside.let_time_be_up(handle)
    part = r"\d+\.\d+ s of which the GPU took for a try that failed"
    words = rf"s for a slot behind 1 running .*, {part}, and never ran on the CPU"
    with pytest.raises(QueryTimeoutError, match=words):
        handle.result(30)
    blocked.gate.set()
    for each in running:
        each.result(30)


def test_what_some_frames_took_is_not_learned_for_all(collector, gpu, monkeypatch):
    gpu.fail = {2: "oom"}
    looked_at = []
    of = collector._cpu._costs.of
    monkeypatch.setattr(
        collector._cpu._costs,
        "of",
        lambda lfs, engine: (looked_at.append((list(lfs), engine)), of(lfs, engine))[1],
    )
    three = frames(3)
    collector.collect_all_async(three, engine="gpu").result(30)
    assert looked_at[-1] == ([three[1]], "in-memory")


# The turn on the GPU


def test_query_that_is_cancelled_while_another_collector_has_the_gpu_does_not_run(
    collector, blocked
):
    with Collector(gpu="offload") as other:
        running = other.collect_async(blocked.lf, engine="gpu")
        assert blocked.started.wait(30)
        lf, runs = counting()
        handle = collector.collect_async(lf, engine="gpu")
        until(lambda: handle._query.times._paused_since is not None)  # it waits for the GPU
        assert handle.cancel()
        blocked.gate.set()
        running.result(30)
    collector.close()
    assert runs == []


@pytest.mark.parametrize("fault", [None, "oom"])
def test_wait_for_another_collector_is_no_part_of_the_run(
    collector, gpu, blocked, events, fault, monkeypatch
):
    gpu.fail = {} if fault is None else {2: fault}
    later = 0.0
    monkeypatch.setattr(times, "perf_counter", lambda: time.perf_counter() + later)
    with Collector(gpu="offload") as other:
        running = other.collect_async(blocked.lf, engine="gpu")
        assert blocked.started.wait(30)
        handle = collector.collect_async(TINY, engine="gpu")
        until(lambda: handle._query.times._paused_since is not None)
        later = 3600.0
        blocked.gate.set()
        running.result(30)
        handle.result(30)
    collector.close()
    assert collector.stats()["run_seconds"] < later
    assert events[-1].run_seconds >= 0


def test_frames_after_the_one_during_which_all_were_cancelled_do_not_run(collector, blocked):
    lf, runs = counting()
    handle = collector.collect_all_async([blocked.lf, lf, lf], engine="gpu")
    assert blocked.started.wait(30)
    handle.cancel()
    blocked.gate.set()
    collector.close()
    assert runs == []


def test_ctrl_c_at_the_very_moment_leaves_the_gpu_to_others(here, monkeypatch):
    def interrupted(lock):
        lock.acquire()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(offload, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            TINY.collect(engine=here)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(TINY.collect, engine=here).result(30).item() == 1


def test_synchronous_query_on_the_gpu_that_asks_for_another_there_fails(here, collector):
    for ask in (
        lambda: collector.collect_async(TINY, engine="gpu").result(30),
        lambda: TINY.collect(engine=here),
    ):
        lf = TINY.map_batches(lambda df, ask=ask: (ask(), df)[1])
        with pytest.raises(RuntimeError, match="cannot start another GPU query"):
            lf.collect(engine=here)


def test_source_on_a_thread_of_cudf_polars_may_not_ask_for_the_gpu(here, collector):
    with ThreadPoolExecutor(1, thread_name_prefix="spmd-executor") as pool:
        for ask in (
            lambda: collector.collect_async(TINY, engine="gpu"),
            lambda: TINY.collect(engine=here),
        ):
            with pytest.raises(RuntimeError, match="cannot start another GPU query"):
                pool.submit(ask).result(30)
        assert pool.submit(lambda: collector.collect_async(TINY).result(30)).result(30).item() == 1


# Errors in groups, in subclasses, and without a frame


class CommClosedError(OSError):
    """As that of distributed."""


CommClosedError.__module__ = "distributed.comm.core"


def in_group(error):
    return ExceptionGroup("unhandled errors", [ExceptionGroup("once more", [error])])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (pl.exceptions.SchemaError("no"), None),
        (FileNotFoundError("no"), None),
        (ConnectionResetError("of the cluster"), Reason.GPU_FAILED),
        (CommClosedError("of the cluster"), Reason.GPU_FAILED),
        (MemoryError("full"), Reason.OUT_OF_MEMORY),
        (RuntimeError("CUDA error at: a.cpp:1: 700"), Reason.CUDA_ERROR),
        (ValueError("cuda_time"), Reason.GPU_FAILED),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, Exception) else "",
)
def test_error_in_a_group_is_what_it_is_alone(collector, monkeypatch, error, reason):
    def run(*_):
        raise in_group(error)

    monkeypatch.setattr(upstream, "gpu_callback", lambda _: lambda plan, *_: plan.set_udf(run))
    monkeypatch.setitem(run.__globals__, "__name__", "cudf_polars.callback")
    handle = collector.collect_async(TINY, engine="gpu")
    if reason is None:
        with pytest.raises(ExceptionGroup):
            handle.result(30)
        assert not handle.resolution.fell_back
    else:
        assert handle.result(30).item() == 1
        assert handle.resolution.reason is reason
        assert f"({type(error).__name__}: {error})" in handle.resolution.message


def test_error_of_a_source_in_a_group_is_never_tried_again(collector, monkeypatch):
    def run(*_):
        try:
            eval("{}['gone']", {"__name__": "service"})
        except KeyError as error:
            raise in_group(error) from None

    monkeypatch.setattr(upstream, "gpu_callback", lambda _: lambda plan, *_: plan.set_udf(run))
    monkeypatch.setitem(run.__globals__, "__name__", "cudf_polars.callback")
    with pytest.raises(ExceptionGroup):
        collector.collect_async(TINY, engine="gpu").result(30)


@every_failure
def test_engine_whose_collect_is_its_own_falls_back(collector, gpu, fault):
    class Timed(pl.GPUEngine):
        def collect(self, lf, **options):
            return super().collect(lf, **options)

    gpu.fail = fault
    handle = collector.collect_async(TINY, engine=Timed())
    assert handle.result(30).item() == 1
    assert handle.resolution.reason is FAILURES_OF_THE_GPU[fault][0]


@pytest.mark.parametrize(
    "function", [json.loads, int, lambda df: df.gone], ids=["json", "int", "own"]
)
def test_python_function_without_a_frame_of_its_own_is_never_tried_again(collector, function):
    with pytest.raises((TypeError, AttributeError, pl.exceptions.ComputeError)):
        collector.collect_async(TINY.map_batches(function), engine="gpu").result(30)
    assert collector.stats()["fell_back"] == 0
    assert breaker.health.failures == 0


def test_error_that_cannot_be_told_is_told_by_its_type(monkeypatch):
    class Mute(RuntimeError):  # noqa: N818
        def __str__(self):
            raise ValueError

    def run(*_):
        raise Mute

    monkeypatch.setattr(upstream, "gpu_callback", lambda _: lambda plan, *_: plan.set_udf(run))
    monkeypatch.setitem(run.__globals__, "__name__", "cudf_polars.callback")
    with Collector(gpu="offload") as silent:
        handle = silent.collect_async(TINY, engine="gpu")
        assert handle.result(30).item() == 1
    assert "(Mute)" in handle.resolution.message


# What is kept


@pytest.fixture
def _without_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@every_failure
@pytest.mark.usefixtures("_without_garbage_collection")
def test_nothing_is_kept_of_a_query_that_fell_back(gpu, here, fault):
    gpu.fail = fault
    with Collector(gpu="offload") as collector:
        lf, other = pl.LazyFrame({"a": [1]}), pl.LazyFrame({"a": [2]})
        kept = [ref(lf), ref(other)]
        handle = collector.collect_async(lf, engine="gpu")
        kept.append(ref(handle.result(30)))
        resolution = handle.resolution
        handle = collector.collect_all_async([lf, other], engine="gpu")
        kept += map(ref, handle.result(30))
        with pytest.warns(EngineDowngradeWarning):
            kept.append(ref(lf.collect(engine=here)))
        del lf, other, handle
        until(lambda: all(each() is None for each in kept))  # the threads have let go of them
    assert resolution.fell_back


def test_errors_in_the_error_of_an_unsupported_query_keep_nothing(collector, gpu, monkeypatch):
    gpu.fail = "unsupported"

    def unsupported(*_):
        try:
            raise NotImplementedError("an operation")  # noqa: TRY301  # for a traceback
        except NotImplementedError as error:
            return NotImplementedError("unsupported", [error])

    monkeypatch.setattr(attempt, "unsupported_error", unsupported)
    handle = collector.collect_async(TINY, engine="gpu")
    handle.result(30)
    [inner] = handle.resolution.cause.args[1]
    assert inner.__traceback__ is None
    assert handle.resolution.cause.__context__ is None
    assert "does not support the query (an operation), so" in handle.resolution.message


def test_error_that_the_caller_handles_keeps_its_traceback(here, gpu):
    gpu.fail = "oom"
    try:
        raise LookupError  # noqa: TRY301  # for one to be handled
    except LookupError as error:
        with pytest.warns(EngineDowngradeWarning):
            TINY.collect(engine=here)
        kept = error.__traceback__
    assert kept is not None


def test_record_of_the_logger_keeps_no_traceback(collector, gpu, caplog):
    caplog.set_level(logging.DEBUG, "polars_async")
    gpu.fail = "oom"
    collector.collect_async(TINY, engine="gpu").result(30)
    [record, _second] = [
        each for each in caplog.records if "failed on the GPU" in each.getMessage()
    ]
    assert record.exc_info is None
    assert "Traceback" in record.getMessage()
    assert "MemoryError" in record.getMessage()


# The circuit breaker


def test_one_query_of_several_frames_counts_as_one_failure(collector, gpu):
    gpu.fail = "oom"
    collector.collect_all_async(frames(5), engine="gpu").result(30)
    assert gpu.queries == 5
    assert breaker.health.failures == 1


def test_gpu_that_keeps_failing_rests_and_is_tried_again(collector, gpu, clock, caplog):
    gpu.fail = "oom"
    for _ in range(FAILURES):
        assert collector.resolve_engine("gpu").name == "gpu"
        collector.collect_async(TINY, engine="gpu").result(30)
    stats = collector.stats()
    assert (stats["gpu_failures"], stats["gpu_cooldown_seconds"]) == (FAILURES, COOLDOWN)
    assert "the GPU is in a cooldown of 30 s: the memory of the GPU did not suffice" in caplog.text

    with pytest.warns(
        EngineDowngradeWarning, match=r"keeps failing.*cooldown of 30 s.*MemoryError"
    ):
        handle = collector.collect_async(TINY, engine="gpu")
    assert handle.result(30).item() == 1
    assert (handle.resolution.downgraded, handle.resolution.reason) == (True, Reason.GPU_COOLDOWN)
    assert gpu.queries == FAILURES

    gpu.fail = None
    clock.now = COOLDOWN
    handle = collector.collect_async(TINY, engine="gpu")
    assert handle.result(30).item() == 1
    assert handle.resolution.name == "gpu"
    stats = collector.stats()
    assert (stats["gpu_failures"], stats["gpu_cooldown_seconds"]) == (0, 0)


def test_queries_that_wait_when_the_cooldown_begins_do_not_try_the_gpu(collector, tried, clock):  # noqa: ARG001
    breaker.health = Health(FAILURES - 1)
    first = collector.collect_async(tried.lf, engine="gpu")
    assert tried.started.wait(30)
    others = [collector.collect_async(TINY, engine="gpu") for _ in range(3)]
    tried.gate.set()
    assert [each.result(30).item() for each in (first, *others)] == [1] * 4
    assert first.resolution.reason is Reason.OUT_OF_MEMORY
    for handle in others:
        assert handle.resolution.fell_back
        assert handle.resolution.reason is Reason.GPU_COOLDOWN
        assert handle.resolution.cause is first.resolution.cause
    assert breaker.health.failures == FAILURES


@pytest.mark.parametrize("fault", ["unsupported", "translation"])
def test_query_that_the_gpu_engine_does_not_know_says_nothing_of_the_gpu(collector, gpu, fault):
    gpu.fail = fault
    for _ in range(2 * FAILURES):
        collector.collect_async(TINY, engine="gpu").result(30)
    assert gpu.queries == 2 * FAILURES
    assert breaker.health.failures == 0


def test_gpu_in_its_cooldown_is_an_error_where_required_and_tried_where_the_cpu_is_forbidden(
    gpu, clock
):
    gpu.fail = "oom"
    with Collector(gpu="offload") as collector:
        for _ in range(FAILURES):
            collector.collect_async(TINY, engine="gpu").result(30)
        with pytest.raises(MemoryError):
            collector.collect_async(TINY, engine=STRICT).result(30)
    assert gpu.queries == FAILURES + 1
    assert breaker.seconds_left() == 2 * COOLDOWN
    with pytest.raises(EngineUnavailableError, match=r"gpu='require' forbids any other.*cooldown"):
        resolve_engine("gpu", gpu="require")
    gpu.fail = None
    with Collector(gpu="offload") as collector:
        assert collector.collect_async(TINY, engine=STRICT).result(30).item() == 1
    assert resolve_engine("gpu", gpu="require").name == "gpu"
    assert clock.now == 0


# On the caller's own thread


@pytest.fixture
def here(request):
    with Collector(engine="gpu") as collector:
        yield AsyncEngine(collector, bound_sync=getattr(request, "param", False))


here_or_in_turn = pytest.mark.parametrize(
    "here", [False, True], indirect=True, ids=["here", "in turn"]
)


def test_synchronous_query_runs_on_the_gpu(here, gpu):
    lf, runs = counting()
    assert lf.collect(engine=here).item() == 1
    assert runs == [threading.get_ident()]
    assert gpu.queries == 1


def test_synchronous_query_in_its_turn_runs_on_the_gpus_thread(gpu, engine_log):
    lf, runs = counting()
    with Collector(engine="gpu", max_running=1) as collector:
        here = AsyncEngine(collector, bound_sync=True)
        assert lf.collect(engine=here).item() == 1
        assert [each.item() for each in pl.collect_all(frames(2), engine=here)] == [0, 1]
        assert collector.stats()["completed"] == 2
    assert threading.get_ident() not in runs
    assert gpu.queries == 3
    engine_log.assert_ran_on("gpu")


@here_or_in_turn
@every_failure
def test_synchronous_query_falls_back_and_says_so(here, gpu, fault):
    gpu.fail = fault
    lf, runs = counting()
    with pytest.warns(EngineDowngradeWarning, match="simulated") as shown:
        assert lf.collect(engine=here).item() == 1
    assert len(runs) == 1
    [warning] = shown
    assert warning.filename == __file__


def test_synchronous_query_falls_back_where_an_error_is_handled(here, gpu):
    gpu.fail = "oom"
    try:
        raise LookupError  # noqa: TRY301  # for one to be handled
    except LookupError:
        with pytest.warns(EngineDowngradeWarning):
            assert TINY.collect(engine=here).item() == 1


@pytest.mark.parametrize("bound_sync", [False, True])
@every_failure
def test_synchronous_query_does_not_fall_back_where_the_cpu_is_forbidden(gpu, fault, bound_sync):
    gpu.fail = fault
    error = pl.exceptions.ComputeError, MemoryError, RuntimeError
    with Collector(engine=STRICT) as collector, pytest.raises(error, match="simulated"):
        TINY.collect(engine=AsyncEngine(collector, bound_sync=bound_sync))


@here_or_in_turn
def test_synchronous_collect_all_sinks_and_execute_fall_back(here, gpu, tmp_path):
    gpu.fail = {2: "oom", 4: "unsupported", 5: "oom"}
    with pytest.warns(EngineDowngradeWarning, match="MemoryError"):
        found = pl.collect_all(frames(3), engine=here)
    assert [frame.item() for frame in found] == [0, 1, 2]
    with pytest.warns(EngineDowngradeWarning, match="unsupported operations"):
        TINY.sink_csv(tmp_path / "a.csv", engine=here)
    assert (tmp_path / "a.csv").read_text() == "a\n1\n"
    with pytest.warns(EngineDowngradeWarning, match="MemoryError"):
        here.execute(TINY, optimizations=FLAGS)
    assert gpu.queries == 5


def test_callback_of_the_caller_takes_the_place_of_the_engines(here, gpu):
    called = []
    found = here.collect(
        TINY, optimizations=FLAGS, post_opt_callback=lambda *given: called.append(given)
    )
    assert (found.item(), len(called), gpu.queries) == (1, 1, 0)


@pytest.mark.parametrize("engine", ["gpu", STRICT])
def test_breaker_keeps_no_query_in_memory(collector, gpu, events, engine):
    gpu.fail = "oom"
    lf = pl.LazyFrame({"a": [1]})
    kept = ref(lf)
    for _ in range(FAILURES):
        handle = collector.collect_async(lf, engine=engine)
        with suppress(MemoryError):
            handle.result(30)
    while collector.stats()["running"]:
        time.sleep(0.001)
    del lf, handle, events[:]
    gc.collect()
    assert breaker.cooldown() is not None
    # A thread of its own may look at the plan for a moment.
    until(lambda: gc.collect() >= 0 and kept() is None)


def test_wait_for_the_gpu_is_open_to_ctrl_c(run_script):
    assert run_script(HEARS_CTRL_C + CTRL_C) == ["True"]


CTRL_C = """
import os, signal, sys, threading, time, faulthandler
faulthandler.dump_traceback_later(40, exit=True)
import polars as pl, polars_async as pa
from polars_async.testing import simulate_gpu
started, gate = threading.Event(), threading.Event()
def udf(df):
    started.set()
    gate.wait()
    return df
lf = pl.LazyFrame({"a": [1]})
with simulate_gpu(), pa.Collector(engine="gpu", gpu="offload") as collector:
    handle = collector.collect_async(lf.map_batches(udf))
    started.wait()
    def interrupt():
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
    try:
        threading.Thread(target=interrupt).start()
        lf.collect(engine=pa.AsyncEngine(collector))
    except KeyboardInterrupt:
        print(not handle.done())
    gate.set()
    handle.result()
"""


def test_memory_of_the_gpu_is_dropped_before_the_cpu_runs_it(collector, monkeypatch):
    held, seen = [], []

    class Column:
        """Something on the GPU."""

        def __init__(self):
            held.append(1)

        def __del__(self):
            held.pop()

    def run(*_):
        column = Column()
        try:
            raise RuntimeError("CUDA")  # noqa: TRY301  # for one to be the cause
        except RuntimeError as error:
            raise MemoryError(type(column).__name__) from error

    monkeypatch.setattr(upstream, "gpu_callback", lambda _: lambda plan, *_: plan.set_udf(run))
    monkeypatch.setitem(run.__globals__, "__name__", "cudf_polars.callback")
    lf = TINY.map_batches(lambda df: (seen.append(list(held)), df)[1])
    handle = collector.collect_async(lf, engine="gpu")
    assert handle.result(30).item() == 1
    assert handle.resolution.reason is Reason.OUT_OF_MEMORY
    assert seen == [[]]


LEFT_BEHIND = """
import os, signal, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from 3.12 on
from polars_async.gpu import offload
held = threading.Event()
def hold():
    with offload.GpuHold():
        held.set()
        threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(60)
    with offload.GpuHold():
        os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


def test_gpu_is_free_in_a_forked_child_though_a_thread_left_behind_has_it(run_script):
    assert run_script(LEFT_BEHIND) == ["0"]
