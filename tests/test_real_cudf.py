"""The real cudf-polars, without a GPU: it is taken for a host with one, and fails as it does."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version

import polars as pl
import pytest
from conftest import TINY

from polars_async import Collector, Reason, gpu_status, gpu_support
from polars_async.gpu import cudf as _cudf
from polars_async.gpu import probe
from polars_async.gpu.breaker import Health, breaker
from polars_async.gpu.nvml import Host, HostDevice, read_host
from polars_async.gpu.partitions import with_smaller_partitions

pytestmark = [
    pytest.mark.skipif(
        not _cudf.find_cudf_polars().installed or _cudf.find_cudf_polars().diagnosis is not None,
        reason="cudf-polars is not installed, or supports another Polars",
    ),
    pytest.mark.skipif(not read_host().diagnosis, reason="there is a driver: ci/gpu is for that"),
]
STRICT = pl.GPUEngine(raise_on_fail=True)
# What it then does not have to ask the driver for, so that the translation comes to its end.
SIZED = {"executor": "streaming", "executor_options": {"min_device_size": 2**33}}


@pytest.fixture(autouse=True)
def taken_for_a_host_with_a_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(probe, "probe", probe.Probe())
    monkeypatch.setattr(breaker, "health", Health())
    device = HostDevice(index=0, name="NVIDIA H100", compute_capability=(9, 0))
    probe.probe.override(Host(devices=(device,), cuda_version=(13, 0)))


@pytest.fixture
def collector():
    with Collector(gpu="offload") as collector:
        yield collector


def test_host_is_taken_for_usable():
    status = gpu_status()
    assert status.usable, status.message
    assert status.cudf_polars_version == version("cudf-polars-cu13")


@pytest.mark.parametrize(
    ("engine", "query", "reason", "words"),
    [
        ("gpu", TINY.sum(), Reason.CUDA_ERROR, "NVML"),
        (pl.GPUEngine(executor="in-memory"), TINY.sum(), Reason.CUDA_ERROR, "cudaErrorInsuffic"),
        (pl.GPUEngine(**SIZED), TINY.sum(), Reason.CUDA_ERROR, "cudaErrorInsuffic"),
        (
            pl.GPUEngine(**SIZED),
            TINY.map_batches(lambda df: df),
            Reason.UNSUPPORTED_QUERY,
            "it does not support the query (opaque python mapfunction), so",
        ),
        (
            pl.GPUEngine(executor="in-memory"),
            TINY.map_batches(lambda df: df),
            Reason.UNSUPPORTED_QUERY,
            "it does not support the query (opaque python mapfunction), so",
        ),
        (pl.GPUEngine(no_such_option=1), TINY, Reason.TRANSLATION_FAILED, "no_such_option"),
    ],
    ids=["plain", "in-memory", "sized", "udf", "udf in-memory", "option"],
)
def test_query_falls_back_with_its_reason(collector, engine, query, reason, words):
    handle = collector.collect_async(query, engine=engine)
    assert handle.result(60).item() == 1
    found = handle.resolution
    assert (found.name, found.fell_back) == ("in-memory", True)
    assert found.reason is reason
    assert words in found.message
    assert found.cause.__traceback__ is None


def test_smaller_partitions_are_what_cudf_polars_takes_and_an_eighth_of_its_own():
    config = import_module("cudf_polars.utils.config").ConfigOptions
    engine = pl.GPUEngine(**SIZED)
    before = config.from_polars_engine(engine).executor
    after = config.from_polars_engine(with_smaller_partitions(engine)).executor
    assert after.target_partition_size == before.target_partition_size // 8
    assert after.max_rows_per_partition == before.max_rows_per_partition // 8
    assert after.fallback_mode == before.fallback_mode


def test_original_error_arrives_where_the_cpu_is_forbidden(collector):
    with pytest.raises(pl.exceptions.ComputeError, match="NVML") as caught:
        collector.collect_async(TINY.sum(), engine=STRICT).result(60)
    assert type(caught.value.__cause__).__module__ == "pynvml"
    engine = pl.GPUEngine(raise_on_fail=True, executor="in-memory")
    with pytest.raises(RuntimeError, match="cudaErrorInsufficientDriver") as caught:
        collector.collect_async(TINY.sum(), engine=engine).result(60)
    assert type(caught.value).__name__ == "CUDARuntimeError"
    engine = pl.GPUEngine(raise_on_fail=True, **SIZED)
    with pytest.raises(pl.exceptions.ComputeError, match="unsupported operations") as caught:
        collector.collect_async(TINY.map_batches(lambda df: df), engine=engine).result(60)
    assert isinstance(caught.value.__cause__, NotImplementedError)


def test_error_of_the_query_is_its_own(collector):
    runs = []

    def fail(df):
        runs.append(df)
        raise LookupError

    with pytest.raises(LookupError):
        collector.collect_async(TINY.map_batches(fail), engine=pl.GPUEngine(**SIZED)).result(60)
    assert len(runs) == 1
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        collector.collect_async(TINY.select("b"), engine="gpu").result(60)


def test_failing_driver_lets_the_gpu_rest(collector):
    handles = [collector.collect_async(TINY, engine="gpu") for _ in range(3)]
    for handle in handles:
        handle.result(60)
    assert breaker.cooldown() is not None
    assert collector.stats()["gpu_failures"] == 3


def test_answer_beforehand_is_what_happens(collector):
    engine = pl.GPUEngine(executor="in-memory")
    for query, answer in ((TINY.sum(), "yes"), (TINY.map_batches(lambda df: df), "no")):
        assert gpu_support(query, engine=engine).answer == answer
        handle = collector.collect_async(query, engine=engine)
        handle.result(60)
        unsupported = handle.resolution.reason is Reason.UNSUPPORTED_QUERY
        assert unsupported is (answer == "no")


IMPORT = """
import sys, threading
import polars as pl, polars_async as pa
from polars_async.gpu import probe
from polars_async.gpu.nvml import Host, HostDevice
import logging
logging.disable()
device = HostDevice(index=0, compute_capability=(9, 0))
probe.probe.override(Host(devices=(device,), cuda_version=(13, 0)))
asked = []
class Watch:
    def find_spec(self, name, path, target=None):
        if name == "cudf_polars":
            asked.append(threading.get_ident())
sys.meta_path.insert(0, Watch())
with pa.Collector(gpu="offload") as collector:
    lf = pl.LazyFrame({"a": [1]})
    collector.collect_async(lf).result()
    print("cudf_polars" in sys.modules)
    collector.collect_async(lf, engine="gpu").result()
    print("cudf_polars" in sys.modules)
print(asked[-1] == threading.get_ident())
"""


def test_it_is_imported_on_the_thread_of_the_gpu_and_the_program_ends(run_script):
    assert run_script(IMPORT) == ["False", "True", "False"]
