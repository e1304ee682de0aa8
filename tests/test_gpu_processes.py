from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import polars as pl
import pytest

import polars_async as pa
from polars_async.testing import simulate_gpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux"),
]

ON = {"gpu": pl.String, "pid": pl.Int64}


def where(_frame):
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
    return pl.DataFrame({"gpu": [seen], "pid": [os.getpid()]}, schema=ON)


WHERE = pl.LazyFrame({"a": [1]}).map_batches(where, schema=ON)


def uuid(number):
    return f"GPU-{number:08x}-0000-0000-0000-000000000000"


@pytest.fixture
def offloading():
    made = []

    def make(**options):
        made.append(pa.Collector(executor="processes", engine="gpu", gpu="offload", **options))
        return made[-1]

    yield make
    for collector in made:
        collector.close(cancel_running=True)


def meeting(folder, of):
    """Give a query that ends when as many of them run at once."""
    folder = str(folder)

    def meet(frame):
        Path(folder, str(os.getpid())).touch()
        while len(list(Path(folder).iterdir())) < of:
            time.sleep(0.005)
        return where(frame)

    return pl.LazyFrame({"a": [1]}).map_batches(meet, schema=ON)


def test_each_gpu_has_a_worker_of_its_own_and_they_work_side_by_side(offloading, tmp_path):
    with simulate_gpu(3) as gpu:
        collector = offloading()
        handles = [collector.collect_async(meeting(tmp_path, 3)) for _ in range(3)]
        found = pl.concat([handle.result(30) for handle in handles])
        assert sorted(found["gpu"]) == [uuid(number) for number in range(3)]
        assert found["pid"].n_unique() == 3
        assert os.getpid() not in found["pid"]
        assert {handle.resolution.name for handle in handles} == {"gpu"}
        assert gpu.queries == 3
        assert collector.stats()["workers"] == 3
        assert "cudf_polars" not in sys.modules  # nothing of CUDA was loaded here


def test_no_more_queries_at_once_than_gpus(offloading):
    with simulate_gpu(2):
        collector = offloading()
        handles = [collector.collect_async(WHERE) for _ in range(20)]
        assert collector.stats()["gpu_running"] <= 2
        found = pl.concat([handle.result(30) for handle in handles])
        assert set(found["gpu"]) <= {uuid(0), uuid(1)}


def test_gpu_that_is_hidden_or_unfit_gets_none(offloading, monkeypatch):
    with simulate_gpu(3):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{uuid(2)},{uuid(0)}")
        collector = offloading()
        found = pl.concat([collector.collect_async(WHERE).result(30) for _ in range(4)])
        assert set(found["gpu"]) == {uuid(0), uuid(2)}


def test_without_a_gpu_the_cpu_runs_it_and_it_is_said(offloading):
    with simulate_gpu(0):
        collector = offloading()
        with pytest.warns(pa.EngineDowngradeWarning, match="lists no GPU"):
            handle = collector.collect_async(WHERE)
        assert handle.result(30)["gpu"].item() == "none"
        assert handle.resolution.downgraded


@pytest.mark.parametrize("fail", ["unsupported", "translation", "oom", "cuda", "import"])
def test_failure_on_the_gpu_goes_over_to_a_process_on_the_cpu(offloading, fail, caplog):
    with simulate_gpu(1, fail=fail):
        collector = offloading()
        handle = collector.collect_async(WHERE)
        found = handle.result(30)
        assert (found["gpu"].item(), found["pid"].item() == os.getpid()) == ("none", False)
        assert handle.resolution.fell_back
        assert isinstance(handle.resolution.cause, Exception)
        assert "fell back" in caplog.text
        assert collector.stats()["fell_back"] == 1


def test_frames_that_fail_are_the_only_ones_to_go_over(offloading):
    with simulate_gpu(1, fail={2: "oom"}):
        handle = offloading().collect_all_async([WHERE] * 3)
        found = [frame["gpu"].item() for frame in handle.result(30)]
        assert found == [uuid(0), "none", uuid(0)]
        assert "1 of 3 frames" in handle.resolution.message


def test_poisoned_context_is_cured_by_a_fresh_worker(offloading):
    with simulate_gpu(1) as gpu:
        collector = offloading()
        before = collector.collect_async(WHERE).result(30)["pid"].item()
        assert collector.collect_async(WHERE).result(30)["pid"].item() == before
        gpu.fail = "cuda"
        assert collector.collect_async(WHERE).result(30)["gpu"].item() == "none"
        gpu.fail = None
        after = collector.collect_async(WHERE).result(30)
        assert after["gpu"].item() == uuid(0)
        assert after["pid"].item() != before
        assert collector.stats()["workers_died"] == 0


def test_poisoned_context_is_cured_where_the_cpu_is_forbidden_too(offloading):
    engine = pl.GPUEngine(raise_on_fail=True)
    with simulate_gpu(1) as gpu:
        collector = offloading()
        before = collector.collect_async(WHERE, engine=engine).result(30)["pid"].item()
        gpu.fail = "cuda"
        with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress") as caught:
            collector.collect_async(WHERE, engine=engine).result(30)
        assert "simulated" in str(caught.value.__cause__)
        gpu.fail = None
        after = collector.collect_async(WHERE, engine=engine).result(30)
        assert after["pid"].item() != before


def test_success_ends_the_count_of_failures(offloading):
    with simulate_gpu(1, fail={1: "oom", 2: "oom"}):
        collector = offloading()
        for failures in (1, 2, 0):
            collector.collect_async(WHERE).result(30)
            assert collector.stats()["gpu_failures"] == failures


def test_worker_of_a_gpu_that_dies_is_replaced(offloading):
    def die(frame):  # noqa: ARG001
        os.abort()

    with simulate_gpu(1):
        collector = offloading()
        with pytest.raises(pa.WorkerDiedError, match="SIGABRT"):
            collector.collect_async(pl.LazyFrame({"a": [1]}).map_batches(die)).result(30)
        assert collector.collect_async(WHERE).result(30)["gpu"].item() == uuid(0)
        assert collector.stats()["workers_died"] == 1


def test_cancelled_query_frees_its_gpu(offloading, tmp_path):
    with simulate_gpu(1):
        collector = offloading()
        handle = collector.collect_async(meeting(tmp_path, 2))
        while not list(tmp_path.iterdir()):
            time.sleep(0.005)
        handle.cancel()
        assert collector.collect_async(WHERE).result(30)["gpu"].item() == uuid(0)


def test_batches_come_from_the_gpu(offloading):
    async def rows():
        lf = pl.LazyFrame({"a": range(1000)})
        return [batch.height async for batch in collector.collect_batches_async(lf, chunk_size=300)]

    import asyncio  # noqa: PLC0415

    with simulate_gpu(1) as gpu:
        collector = offloading()
        assert asyncio.run(rows()) == [300, 300, 300, 100]
        assert gpu.queries == 1


def test_auto_sends_queries_on_the_gpu_to_its_worker():
    with (
        simulate_gpu(1),
        pa.Collector(executor="auto", engine="gpu", gpu="offload") as collector,
    ):
        assert collector.collect_async(WHERE).result(30)["gpu"].item() == uuid(0)


def test_worker_of_one_simulated_host_does_not_serve_the_next(offloading):
    with simulate_gpu(1):
        collector = offloading()
        first = collector.collect_async(WHERE).result(30)["pid"].item()
    with simulate_gpu(1) as gpu:
        assert collector.collect_async(WHERE).result(30)["pid"].item() != first
        assert gpu.queries == 1


def test_gpu_of_this_host_is_nothing_to_an_executor_elsewhere():
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    with (
        simulate_gpu(0),
        ThreadPoolExecutor(1) as pool,
        pa.Collector(executor=pool, engine="gpu", gpu="require") as collector,
    ):
        handle = collector.collect_async(pl.LazyFrame({"a": [1]}))
        assert handle.resolution.name == "gpu"
        assert handle.result(30).item() == 1
