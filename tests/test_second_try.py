"""A query that runs out of GPU memory is tried once more, with smaller partitions."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import inside
import polars as pl
import pytest
from conftest import TINY
from places import until
from test_gpu_processes import WHERE, uuid

import polars_async as pa
from polars_async import AsyncEngine, Collector, EventKind, Reason
from polars_async._runtime import upstream
from polars_async.gpu.breaker import FAILURES, breaker
from polars_async.gpu.offload import collect_on_gpu
from polars_async.gpu.partitions import with_smaller_partitions
from polars_async.testing import simulate_gpu

STRICT = pl.GPUEngine(raise_on_fail=True)
ENDS = {"finished", "failed", "cancelled", "timed_out"}
# An eighth of what cudf-polars has by default on a GPU of 80 GiB.
SMALLER = {"target_partition_size": 187_500_000, "max_rows_per_partition": 125_000}
HOW = (
    "in a second try with smaller partitions "
    "(target_partition_size=187500000, max_rows_per_partition=125000)"
)
NO_MEMORY = (
    "the memory of the GPU did not suffice "
    "(MemoryError: std::bad_alloc: out_of_memory: CUDA error (simulated))"
)


@pytest.fixture(autouse=True)
def gpu():
    with simulate_gpu() as gpu:
        yield gpu


@pytest.fixture
def events():
    return []


@pytest.fixture
def collector(events, gpu):  # noqa: ARG001  # closed before it is gone
    with Collector(gpu="offload", on_event=events.append) as collector:
        yield collector


@pytest.fixture
def raising(monkeypatch):
    """Have the GPU engine raise errors, one at each try, and run the query where there is none."""

    def raises(*errors):
        left = list(errors)

        def callback(_engine):
            def run(*_):
                if (error := left.pop(0)) is not None:
                    raise error
                return pl.DataFrame({"a": [1]})

            # As if it were a function of cudf-polars: else it is one of the query.
            monkeypatch.setitem(run.__globals__, "__name__", "cudf_polars.callback")
            return lambda plan, *_: plan.set_udf(run)

        monkeypatch.setattr(upstream, "gpu_callback", callback)
        return left

    return raises


def kinds(events):
    """Give what happened to a query, once its end is told, which may be after it is done."""
    until(lambda: events and events[-1].kind in ENDS)
    return [str(event.kind) for event in events]


def options_of(gpu):
    return [dict(config.get("executor_options") or {}) for config in gpu.configs]


# What is tried


def test_second_try_that_succeeds_is_the_result_and_is_told(collector, gpu, events, caplog):
    gpu.fail = "oom-once"
    handle = collector.collect_async(TINY, engine="gpu", label="sums")
    assert handle.result(30).item() == 1
    assert options_of(gpu) == [{}, SMALLER]
    assert [config.get("executor") for config in gpu.configs] == [None, "streaming"]
    assert gpu.queries == 1
    found = handle.resolution
    assert (found.name, found.retried, found.fell_back, found.reason) == ("gpu", True, False, None)
    assert found.message == (
        f"the GPU engine runs: asked for by the engine argument; {HOW}, since {NO_MEMORY}"
    )
    assert kinds(events) == ["queued", "started", "retried", "finished"]
    retried = events[2]
    assert isinstance(retried.error, MemoryError)
    assert retried.error.__traceback__ is None
    assert [event.resolution.retried for event in events] == [False, False, True, True]
    [record] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "'sums' retried: gpu engine" in record.getMessage()
    assert breaker.health.failures == 0
    assert collector.stats()["fell_back"] == 0


def test_query_that_runs_out_of_memory_twice_falls_back_and_tells_of_both(collector, gpu, events):
    gpu.fail = "oom"
    handle = collector.collect_async(TINY, engine="gpu")
    assert handle.result(30).item() == 1
    found = handle.resolution
    assert (found.name, found.retried, found.fell_back) == ("in-memory", True, True)
    assert found.reason is Reason.OUT_OF_MEMORY
    assert found.message.startswith(
        f"the engine argument asks for the GPU engine, but {NO_MEMORY}, nor did it {HOW}, "
        "so the in-memory engine runs: "
    )
    assert kinds(events) == ["queued", "started", "retried", "fell_back", "started", "finished"]
    assert (gpu.queries, len(gpu.configs)) == (1, 2)
    assert breaker.health.failures == 1


def test_query_that_fails_twice_counts_once_towards_the_cooldown(collector, gpu):
    gpu.fail = "oom"
    for number in range(FAILURES):
        assert breaker.health.failures == number
        collector.collect_async(TINY, engine="gpu").result(30)
    assert breaker.cooldown().failure == f"{NO_MEMORY}, nor did it {HOW}"


@pytest.mark.parametrize("fault", ["cuda", "unsupported", "translation"])
def test_other_failures_are_not_tried_again(collector, gpu, events, fault):
    gpu.fail = fault
    handle = collector.collect_async(TINY, engine="gpu")
    assert handle.result(30).item() == 1
    assert len(gpu.configs) == 1
    assert (handle.resolution.fell_back, handle.resolution.retried) == (True, False)
    assert EventKind.RETRIED not in {event.kind for event in events}


def test_allocation_that_fails_by_another_error_of_cuda_is_not_tried_again(collector, raising):
    error = MemoryError("std::bad_alloc: CUDA error (16 bytes) at: a.cpp: cudaErrorIllegalAddress")
    left = raising(error, None)
    handle = collector.collect_async(TINY, engine="gpu")
    assert handle.result(30).item() == 1
    assert left == [None]
    assert handle.resolution.reason is Reason.CUDA_ERROR


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc: out_of_memory: CUDA error: cudaErrorMemoryAllocation"),
        MemoryError("Try lowering `target_partition_size` (current 9)"),
        ExceptionGroup("actors", [MemoryError("std::bad_alloc: out_of_memory: CUDA error")]),
    ],
    ids=["cuda", "streaming", "group"],
)
def test_what_cudf_polars_raises_out_of_memory_is_tried_again(collector, raising, error):
    left = raising(error, None)
    handle = collector.collect_async(TINY, engine="gpu")
    assert handle.result(30).item() == 1
    assert left == []
    assert (handle.resolution.name, handle.resolution.retried) == ("gpu", True)


def test_second_try_that_fails_otherwise_is_told_with_the_first(collector, raising):
    raising(MemoryError("full"), TypeError("unknown option"))
    handle = collector.collect_async(TINY, engine="gpu")
    assert handle.result(30).item() == 1
    found = handle.resolution
    assert (found.reason, str(found.cause)) == (Reason.OUT_OF_MEMORY, "full")
    assert (
        f"(MemoryError: full), and {HOW} it failed while the query ran (TypeError: unknown option)"
        in found.message
    )


def test_second_try_at_which_cuda_fails_is_an_error_of_cuda(collector, raising):
    raising(MemoryError("full"), RuntimeError("cudaErrorIllegalAddress"))
    handle = collector.collect_async(TINY, engine="gpu")
    assert handle.result(30).item() == 1
    assert handle.resolution.reason is Reason.CUDA_ERROR
    assert f"(MemoryError: full), and {HOW} CUDA failed" in handle.resolution.message
    assert breaker.health.failures == 1


def test_error_of_the_query_at_its_second_try_is_its_own(collector, raising):
    raising(MemoryError("full"), FileNotFoundError("a.parquet"))
    with pytest.raises(FileNotFoundError):
        collector.collect_async(TINY, engine="gpu").result(30)


def test_memory_of_the_first_try_is_free_in_the_second(collector, monkeypatch):
    held, seen = [], []

    class Column:
        """Something on the GPU."""

        def __init__(self):
            seen.append(list(held))
            held.append(1)

        def __del__(self):
            held.pop()

    def run(*_):
        column = Column()
        raise MemoryError(type(column).__name__)

    monkeypatch.setattr(upstream, "gpu_callback", lambda _: lambda plan, *_: plan.set_udf(run))
    monkeypatch.setitem(run.__globals__, "__name__", "cudf_polars.callback")
    assert collector.collect_async(TINY, engine="gpu").result(30).item() == 1
    with pytest.raises(MemoryError):
        collector.collect_async(TINY, engine=STRICT).result(30)
    assert seen[:4] == [[], [], [], []]
    assert len(seen) == 4


# Where the CPU is forbidden


def test_error_is_raised_after_the_second_try_where_the_cpu_is_forbidden(collector, gpu, events):
    gpu.fail = "oom"
    with pytest.raises(MemoryError) as caught:
        collector.collect_async(TINY, engine=STRICT).result(30)
    assert options_of(gpu) == [{}, SMALLER]
    assert all(config["raise_on_fail"] for config in gpu.configs)
    assert caught.value.__traceback__ is not None
    assert f"polars-async has tried the query twice: {NO_MEMORY}, nor did it {HOW}" in (
        caught.value.__notes__
    )
    assert kinds(events) == ["queued", "started", "retried", "failed"]
    assert breaker.health.failures == 1


def test_second_try_succeeds_where_the_cpu_is_forbidden(collector, gpu):
    gpu.fail = "oom-once"
    assert collector.collect_async(TINY, engine=STRICT).result(30).item() == 1


# Which partitions


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, SMALLER),
        ({"target_partition_size": 800, "fallback_mode": "raise"},
         {**SMALLER, "target_partition_size": 100, "fallback_mode": "raise"}),
        ({"max_rows_per_partition": 8_000, "target_partition_size": 0},
         {"max_rows_per_partition": 1_000, "target_partition_size": 187_500_000}),
        ({"min_device_size": 8_000_000_000},
         {**SMALLER, "min_device_size": 8_000_000_000, "target_partition_size": 25_000_000}),
        ({"max_rows_per_partition": 3}, {**SMALLER, "max_rows_per_partition": 1}),
    ],
    ids=["none", "size", "rows", "memory", "smallest"],
)  # fmt: skip
def test_options_of_the_user_stay_but_for_smaller_partitions(collector, gpu, given, expected):
    gpu.fail = "oom-once"
    engine = pl.GPUEngine(
        executor="streaming", executor_options=given, parquet_options={"chunked": False}
    )
    config = {**engine.config}
    assert collector.collect_async(TINY, engine=engine).result(30).item() == 1
    assert gpu.configs[0] is engine.config
    assert engine.config == config
    assert gpu.configs[1] == {**config, "executor_options": expected}


def test_in_memory_executor_is_tried_again_on_the_streaming_one(collector, gpu):
    gpu.fail = "oom-once"
    collector.collect_async(TINY, engine=pl.GPUEngine(executor="in-memory")).result(30)
    assert [config["executor"] for config in gpu.configs] == ["in-memory", "streaming"]


def test_variables_of_cudf_polars_are_divided_too(collector, gpu, monkeypatch):
    monkeypatch.setenv("CUDF_POLARS__EXECUTOR__TARGET_PARTITION_SIZE", "16")
    monkeypatch.setenv("CUDF_POLARS__EXECUTOR__MAX_ROWS_PER_PARTITION", "80")
    gpu.fail = "oom-once"
    collector.collect_async(TINY, engine="gpu").result(30)
    assert options_of(gpu)[1] == {"target_partition_size": 2, "max_rows_per_partition": 10}


@pytest.mark.parametrize(("memory", "size"), [(None, 187_500_000), (8 * 10**9, 25_000_000)])
def test_size_of_partitions_follows_the_memory_of_the_gpu(memory, size):
    with simulate_gpu(memory=memory):
        engine = with_smaller_partitions(pl.GPUEngine())
    assert engine.config["executor_options"]["target_partition_size"] == size


def test_engine_of_another_class_is_not_tried_again(collector, gpu):
    class Cluster(pl.GPUEngine):
        """As those of cudf-polars for Ray and Dask."""

    gpu.fail = "oom"
    handle = collector.collect_async(TINY, engine=Cluster())
    assert handle.result(30).item() == 1
    assert len(gpu.configs) == 1
    assert (handle.resolution.fell_back, handle.resolution.retried) == (True, False)


def test_device_of_the_engine_stays(collector, gpu):
    gpu.fail = "oom-once"
    handle = collector.collect_async(TINY, engine=pl.GPUEngine(device=0))
    assert handle.result(30).item() == 1
    assert with_smaller_partitions(pl.GPUEngine(device=3)).device == 3


# Cancelled in between


@pytest.mark.parametrize("how", ["cancelled", "timed_out"])
def test_query_that_ends_during_its_first_try_is_not_tried_again(
    collector, blocked, events, monkeypatch, how
):
    tries = []

    def run(*_):
        tries.append(1)
        blocked.lf.collect(engine="in-memory")
        raise MemoryError("full")

    monkeypatch.setattr(upstream, "gpu_callback", lambda _: lambda plan, *_: plan.set_udf(run))
    monkeypatch.setitem(run.__globals__, "__name__", "cudf_polars.callback")
    timeout = 3600 if how == "timed_out" else None
    handle = collector.collect_async(TINY, engine="gpu", timeout=timeout)
    assert blocked.started.wait(30)
    if how == "cancelled":
        handle.cancel()
    else:
        inside.let_time_be_up(handle)
    with pytest.raises((CancelledError, pa.QueryTimeoutError)):
        handle.result(30)
    blocked.gate.set()
    collector.close()
    assert tries == [1]
    assert kinds(events) == ["queued", "started", how]
    assert not handle.resolution.retried


def test_query_that_is_cancelled_while_its_second_try_is_told_is_not_tried_again(gpu):
    gpu.fail = "oom"
    events, asked = [], threading.Event()

    def hook(event):
        events.append(event)
        if event.kind is EventKind.RETRIED:
            assert asked.wait(30)
            handle.cancel()

    with Collector(gpu="offload", on_event=hook) as collector:
        handle = collector.collect_async(TINY, engine="gpu")
        asked.set()
        with pytest.raises(CancelledError):
            handle.result(30)
    assert kinds(events) == ["queued", "started", "retried", "cancelled"]
    assert len(gpu.configs) == 1


# Several frames, streams and synchronous queries


def test_each_of_several_frames_is_tried_again(collector, gpu, events):
    gpu.fail = {1: "oom-once", 3: "oom-once"}
    frames = [pl.LazyFrame({"a": [number]}) for number in range(4)]
    handle = collector.collect_all_async(frames, engine="gpu")
    assert [frame.item() for frame in handle.result(30)] == [0, 1, 2, 3]
    assert options_of(gpu) == [{}, SMALLER, {}, {}, SMALLER, {}]
    assert kinds(events) == ["queued", "started", "retried", "retried", "finished"]
    assert handle.resolution.message.count(HOW) == 1


def test_frames_that_fail_twice_are_the_only_ones_for_the_cpu(collector, gpu):
    gpu.fail = {1: "oom-once", 2: "oom"}
    frames = [pl.LazyFrame({"a": [number]}) for number in range(3)]
    handle = collector.collect_all_async(frames, engine="gpu")
    assert [frame.item() for frame in handle.result(30)] == [0, 1, 2]
    assert "so the in-memory engine runs 1 of 3 frames" in handle.resolution.message
    assert handle.resolution.retried


def test_stream_is_tried_again(collector, gpu):
    gpu.fail = "oom-once"

    async def main():
        stream = collector.collect_batches_async(TINY, engine="gpu")
        return [batch async for batch in stream], stream.resolution

    batches, found = asyncio.run(main())
    assert pl.concat(batches).item() == 1
    assert (found.name, found.retried) == ("gpu", True)


def test_synchronous_query_is_tried_again_and_says_so(gpu, engine_log, caplog):
    gpu.fail = "oom-once"
    with Collector(engine="gpu") as collector:
        assert TINY.collect(engine=AsyncEngine(collector)).item() == 1
    assert [each.retried for each in engine_log] == [True]
    assert f"a query runs on the GPU {HOW}, since {NO_MEMORY}" in caplog.text
    engine_log.assert_ran_on("gpu")


def test_synchronous_query_that_fails_twice_says_so(gpu, engine_log):
    gpu.fail = "oom"
    with (
        Collector(engine="gpu") as collector,
        pytest.warns(pa.EngineDowngradeWarning, match="nor did it in a second try"),
    ):
        assert TINY.collect(engine=AsyncEngine(collector)).item() == 1
    assert [(each.fell_back, each.retried) for each in engine_log] == [(True, True)]


def test_second_try_is_told_of_the_query_that_runs_and_of_none_before(gpu, caplog):
    gpu.fail = "oom-once"
    told = []
    for on_retry in (lambda *how: told.append(how), None):
        collect_on_gpu(TINY, pl.GPUEngine(), pl.QueryOptFlags(), on_retry=on_retry)
    assert len(told) == len(caplog.records) == 1


# In other processes


@pytest.fixture
def in_workers():
    if sys.platform != "linux":
        pytest.skip("worker processes need Linux")
    events = []
    with Collector(
        executor="processes", engine="gpu", gpu="offload", on_event=events.append
    ) as collector:
        collector.events = events
        yield collector


def made_of(options):
    return pl.GPUEngine(executor="streaming", executor_options=options)


@pytest.mark.slow
def test_second_try_in_a_worker_process_is_told_here(in_workers, gpu):
    gpu.fail = "oom-once"
    handle = in_workers.collect_async(WHERE, engine=made_of({"target_partition_size": 80}))
    assert handle.result(30)["gpu"].item() == uuid(0)
    assert options_of(gpu) == [
        {"target_partition_size": 80},
        {"target_partition_size": 10, "max_rows_per_partition": 125_000},
    ]
    found = handle.resolution
    assert (found.name, found.retried, found.fell_back) == ("gpu", True, False)
    assert "(target_partition_size=10, max_rows_per_partition=125000)" in found.message
    assert kinds(in_workers.events) == ["queued", "started", "retried", "finished"]
    assert isinstance(in_workers.events[2].error, MemoryError)
    assert in_workers.stats()["gpu_failures"] == 0


@pytest.mark.slow
def test_two_failed_tries_in_a_worker_process_are_one_failure(in_workers, gpu):
    gpu.fail = "oom"
    handle = in_workers.collect_async(WHERE)
    assert handle.result(30)["gpu"].item() == "none"
    assert (handle.resolution.fell_back, handle.resolution.retried) == (True, True)
    assert f"{NO_MEMORY}, nor did it {HOW}, so" in handle.resolution.message
    assert (gpu.queries, len(gpu.configs)) == (1, 2)
    assert in_workers.stats()["gpu_failures"] == 1


@pytest.mark.slow
def test_error_of_a_worker_process_comes_after_the_second_try_where_the_cpu_is_forbidden(
    in_workers, gpu
):
    gpu.fail = "oom"
    with pytest.raises(MemoryError) as caught:
        in_workers.collect_async(WHERE, engine=STRICT).result(30)
    assert len(gpu.configs) == 2
    assert any("has tried the query twice" in note for note in caught.value.__notes__)


def test_second_try_in_an_executor_of_the_callers_is_told_here(gpu):
    gpu.fail = "oom-once"
    with (
        ThreadPoolExecutor(1) as pool,
        Collector(executor=pool, engine="gpu", gpu="offload") as collector,
    ):
        handle = collector.collect_async(TINY)
        assert handle.result(30).item() == 1
        assert (handle.resolution.name, handle.resolution.retried) == ("gpu", True)
        assert HOW in handle.resolution.message
        gpu.fail = "oom"
        handle = collector.collect_async(TINY)
        assert handle.result(30).item() == 1
        assert f"nor did it {HOW}" in handle.resolution.message


# Options


OPTIONS = {
    "executor": "streaming",
    "executor_options": {"target_partition_size": 10**8, "fallback_mode": "silent"},
    "parquet_options": {"chunked": False},
}


@pytest.mark.parametrize("options", [OPTIONS, {"executor": "in-memory"}], ids=["both", "executor"])
def test_executor_options_reach_cudf_polars_untouched(collector, gpu, options):
    engine = pl.GPUEngine(**options)
    handle = collector.collect_async(TINY, engine=engine)
    assert handle.result(30).item() == 1
    assert handle.resolution.engine is engine
    assert gpu.configs == [{**options, "raise_on_fail": False}]
    assert gpu.configs[0] is engine.config


@pytest.mark.slow
@pytest.mark.parametrize("device", [None, 0])
def test_executor_options_reach_cudf_polars_in_worker_processes(in_workers, gpu, device):
    engine = pl.GPUEngine(device=device, raise_on_fail=True, **OPTIONS)
    assert in_workers.collect_async(WHERE, engine=engine).result(30)["gpu"].item() == uuid(0)
    assert gpu.configs == [{**OPTIONS, "raise_on_fail": True}]


def test_executor_options_of_the_collectors_engine_reach_cudf_polars(gpu):
    with Collector(engine=pl.GPUEngine(**OPTIONS), gpu="offload") as collector:
        collector.collect_async(TINY).result(30)
        TINY.collect(engine=AsyncEngine(collector))
    assert gpu.configs == [{**OPTIONS, "raise_on_fail": False}] * 2
