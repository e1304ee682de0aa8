"""A host with GPUs that is not there."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from types import ModuleType

import polars as pl
import pytest
from conftest import TINY

import polars_async as pa
from polars_async import Reason
from polars_async.gpu import cudf
from polars_async.gpu import probe as _probe
from polars_async.gpu.breaker import Health, breaker
from polars_async.gpu.nvml import Host, HostDevice
from polars_async.testing import simulate_gpu

GIBIBYTE = 2**30
STRICT = pl.GPUEngine(raise_on_fail=True)


def state():
    """All that a simulated host may have changed."""
    return (
        pa.gpu_status(),
        sys.modules.get("cudf_polars", "not there"),
        list(sys.meta_path),
        {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        dict(vars(pl.GPUEngine)),
        cudf.find_cudf_polars(),
        cudf.import_failure(),
        breaker.health,
    )


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    pa.gpu_status(refresh=True)  # other tests may have installed something meanwhile
    before = state()
    yield
    assert state() == before


# What gpu_status tells


def test_one_gpu_is_there_and_usable():
    assert not pa.gpu_status().usable or pa.gpu_status().devices[0].name != "Simulated GPU"
    with simulate_gpu():
        status = pa.gpu_status()
    assert status.usable
    assert (status.reason, len(status.devices)) == (None, 1)
    assert (status.cuda_version, status.cudf_polars_version) == ((13, 0), "26.10.2")
    [device] = status.devices
    assert (device.name, device.memory_total) == ("Simulated GPU", 80 * GIBIBYTE)
    assert (device.compute_capability, device.selected) == ((9, 0), True)


def test_host_is_as_asked_for():
    with simulate_gpu(
        3, memory=None, compute_capability=(12, 1), driver=(13, 1), cudf_polars="27.2"
    ):
        status = pa.gpu_status()
    assert [device.index for device in status.devices] == [0, 1, 2]
    assert len({device.uuid for device in status.devices}) == 3
    assert {device.memory_free for device in status.devices} == {None}
    assert {device.compute_capability for device in status.devices} == {(12, 1)}
    assert (status.cuda_version, status.cudf_polars_version) == ((13, 1), "27.2")


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ({"count": 0}, Reason.NO_DEVICE),
        ({"driver": None}, Reason.NO_LIBRARY),
        ({"driver": (12, 8)}, Reason.DRIVER_TOO_OLD),
        ({"compute_capability": (6, 1)}, Reason.COMPUTE_CAPABILITY),
        ({"cudf_polars": None}, Reason.CUDF_MISSING),
        ({"fail": "incompatible"}, Reason.CUDF_INCOMPATIBLE),
    ],
)
def test_host_without_a_usable_gpu_gives_its_reason_and_downgrades(host, reason):
    with simulate_gpu(**host) as gpu, pa.Collector(gpu="offload") as collector:
        assert pa.gpu_status().reason is reason
        with pytest.warns(pa.EngineDowngradeWarning):
            handle = collector.collect_async(TINY, engine="gpu")
        assert handle.result(30).item() == 1
        assert (handle.resolution.downgraded, handle.resolution.reason) == (True, reason)
        with pytest.raises(pa.EngineUnavailableError):
            collector.collect_async(TINY, engine=STRICT)
    assert gpu.queries == 0


def test_variables_of_cuda_hide_nothing_at_first_and_count_once_they_are_set(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with simulate_gpu(2):
        assert pa.gpu_status().usable
        with pytest.MonkeyPatch.context() as within:
            within.setenv("CUDA_VISIBLE_DEVICES", "1")
            assert [device.selected for device in pa.gpu_status().devices] == [False, True]
            within.setenv("CUDA_VISIBLE_DEVICES", "")
            assert pa.gpu_status().reason is Reason.DEVICES_HIDDEN
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"


# What runs


def test_polars_own_gpu_engine_runs_and_the_results_are_right():
    lf = pl.LazyFrame({"a": [2, 1, 3], "b": ["x", "y", "x"]})
    queries = [
        lf.sort("a"),
        lf.group_by("b").agg(pl.col("a").sum()).sort("b"),
        lf.join(lf, on="b").filter(pl.col("a") > 1).sort("a", "a_right").head(2),
        lf.select(pl.lit(None).alias("n"), pl.col("b").cast(pl.Categorical)),
        lf.filter(pl.col("a") > 7),
        lf.map_batches(lambda df: df.reverse()),
    ]
    with simulate_gpu() as gpu:
        for number, query in enumerate(queries, 1):
            assert query.collect(engine=STRICT).equals(query.collect(engine="in-memory"))
            assert gpu.queries == number


def test_polars_own_sinks_run(tmp_path):
    with simulate_gpu() as gpu:
        TINY.sink_parquet(tmp_path / "a.parquet", engine=STRICT)
    assert (pl.read_parquet(tmp_path / "a.parquet").item(), gpu.queries) == (1, 1)


def test_optimisations_reach_the_query():
    seen = []

    def source(df):
        seen.append(df.width)
        return df

    lf = pl.LazyFrame({"a": [1], "b": [2]}).map_batches(source).select("a")
    with simulate_gpu():
        lf.collect(engine=STRICT, optimizations=pl.QueryOptFlags.none())
    lf.collect(engine="in-memory", optimizations=pl.QueryOptFlags.none())
    assert len(set(seen)) == 1


def test_queries_in_each_other_and_beside_each_other_are_told_apart():
    inner = pl.LazyFrame({"b": [2]})
    outer = TINY.map_batches(lambda df: df + inner.collect(engine=STRICT).item())
    with simulate_gpu() as gpu:
        assert outer.collect(engine=STRICT).item() == 3
        assert gpu.queries == 2
        wrong = []

        def ask(number):
            lf = pl.LazyFrame({"a": [number]})
            wrong.extend(1 for _ in range(50) if lf.collect(engine=STRICT).item() != number)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert wrong == []
        assert gpu.queries == 202


def test_cudf_polars_is_there_but_not_imported_before_the_first_query():
    with simulate_gpu():
        assert "cudf_polars" not in sys.modules
        assert importlib.util.find_spec("cudf_polars") is not None
        TINY.collect(engine="gpu")
        assert sys.modules["cudf_polars"].__version__ == "26.10.2"
    with simulate_gpu(cudf_polars=None), pytest.raises(ModuleNotFoundError):
        TINY.collect(engine="gpu")


# Faults, as Polars' own GPU engine shows them


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("unsupported", pl.exceptions.ComputeError),
        ("translation", pl.exceptions.ComputeError),
        ("oom", MemoryError),
        ("cuda", RuntimeError),
        ("import", ImportError),
        ("incompatible", AttributeError),
    ],
)
def test_fault_is_what_upstream_raises(fault, error):
    with simulate_gpu(fail=fault), pytest.raises(error, match=r"simulated|required package"):
        TINY.collect(engine=STRICT)


def test_unsupported_query_is_left_to_the_cpu_without_a_word():
    with simulate_gpu(fail="unsupported") as gpu:
        assert TINY.collect(engine="gpu").item() == 1
    assert gpu.queries == 1


def test_slow_gpu_is_slow():
    with simulate_gpu(fail={2: "slow"}):
        times = []
        for _ in range(2):
            begun = time.perf_counter()
            TINY.collect(engine="gpu")
            times.append(time.perf_counter() - begun)
    assert times[1] > 0.5


def test_one_query_fails_by_its_number():
    with simulate_gpu(fail={2: "oom", 3: "cuda"}) as gpu:
        assert TINY.collect(engine="gpu").item() == 1
        with pytest.raises(MemoryError):
            TINY.collect(engine="gpu")
        with pytest.raises(RuntimeError):
            TINY.collect(engine="gpu")
        assert TINY.collect(engine="gpu").item() == 1
        gpu.fail = "oom"
        with pytest.raises(MemoryError):
            TINY.collect(engine="gpu")
        gpu.fail = None
        assert TINY.collect(engine="gpu").item() == 1


def test_gpu_support_answers():
    with simulate_gpu() as gpu:
        assert pa.gpu_support(TINY).answer == "yes"
        gpu.fail = "unsupported"
        assert pa.gpu_support(TINY).answer == "no"
        gpu.fail = "translation"
        assert pa.gpu_support(TINY).answer == "unknown"
    with simulate_gpu(fail="import"):
        assert pa.gpu_support(TINY).reason is Reason.CUDF_BROKEN
    with simulate_gpu(cudf_polars=None):
        assert pa.gpu_support(TINY).reason is Reason.CUDF_MISSING


# In and out


def test_hosts_in_each_other_are_put_back():
    with simulate_gpu(2):
        with simulate_gpu(0, cudf_polars=None):
            assert pa.gpu_status().reason is Reason.NO_DEVICE
            with pytest.raises(ModuleNotFoundError):
                TINY.collect(engine="gpu")
        assert len(pa.gpu_status().devices) == 2
        assert TINY.collect(engine=STRICT).item() == 1


def test_all_is_put_back_after_an_error():
    before = state()

    def fail():
        with simulate_gpu(fail="oom"):
            TINY.collect(engine="gpu")

    with pytest.raises(MemoryError):
        fail()
    assert state() == before


def test_failures_of_a_simulated_gpu_count_for_nothing_afterwards():
    with simulate_gpu(fail="oom"), pa.Collector(gpu="offload") as collector:
        for _ in range(3):
            collector.collect_async(TINY, engine="gpu").result(30)
        assert breaker.cooldown() is not None
        with simulate_gpu():
            assert breaker.health == Health()
        assert breaker.cooldown() is not None
    assert breaker.health == Health()


def test_import_that_failed_is_forgotten_afterwards():
    with simulate_gpu(fail="import"), pa.Collector(gpu="offload") as collector:
        collector.collect_async(TINY, engine="gpu").result(30)
        assert pa.gpu_status().reason is Reason.CUDF_BROKEN
    with simulate_gpu():
        assert pa.gpu_status().usable


def test_import_that_had_failed_before_is_remembered(monkeypatch):
    monkeypatch.setattr(_probe, "probe", _probe.Probe())
    cudf.note_import_failure(ImportError("really"))
    try:
        with simulate_gpu():
            assert pa.gpu_status().usable
        assert cudf.import_failure() == "ImportError: really"
    finally:
        cudf.forget_import_failure()


def test_it_decorates_too():
    @simulate_gpu(2)
    def count():
        return len(pa.gpu_status().devices)

    assert count() == count() == 2


@pytest.mark.parametrize("count", [-1, 1.5, "2", None])
def test_count_that_is_none_is_named(count):
    with pytest.raises(ValueError, match=f"count must be a whole number.*{count}"):
        simulate_gpu(count).__enter__()


@pytest.mark.parametrize("fail", ["out of memory", 1, {1: "ooom"}, {1: "import"}, ["oom"], ""])
def test_fault_that_is_none_is_named_with_those_that_are(fail):
    with pytest.raises(ValueError, match=r"'unsupported', .*'oom', .*got ") as caught:
        simulate_gpu(fail=fail).__enter__()
    assert repr(fail) in str(caught.value)
    with simulate_gpu() as gpu, pytest.raises(ValueError, match="must be one of"):
        gpu.fail = fail


@pytest.mark.parametrize("fail_on", ["oom", {1: "ooom"}, {1: "import"}, {"1": "oom"}, [1]])
def test_fault_of_a_gpu_that_is_none_is_named(fail_on):
    with pytest.raises(ValueError, match="fail_on must map indices") as caught:
        simulate_gpu(2, fail_on=fail_on).__enter__()
    assert repr(fail_on) in str(caught.value)


def test_one_of_several_gpus_fails():
    with simulate_gpu(2, fail_on={1: "oom"}) as gpu:
        assert TINY.collect(engine=STRICT).item() == 1
        with pytest.raises(MemoryError):
            TINY.collect(engine=pl.GPUEngine(device=1, raise_on_fail=True))
        gpu.fail_on = {0: "cuda"}
        with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
            TINY.collect(engine=STRICT)
        assert TINY.collect(engine=pl.GPUEngine(device=1, raise_on_fail=True)).item() == 1


def test_simulated_cuda_knows_no_more_gpus_than_are_visible(monkeypatch):
    with simulate_gpu(2):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        for number in (1, -1):
            with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"):
                TINY.collect(engine=pl.GPUEngine(device=number, raise_on_fail=True))


def test_fault_that_comes_too_late_is_refused():
    with simulate_gpu() as gpu:
        with pytest.raises(ValueError, match="is how a host begins"):
            gpu.fail = "incompatible"
        gpu.fail = "import"
        with pytest.raises(ImportError):
            TINY.collect(engine=STRICT)
        gpu.fail = None
        TINY.collect(engine=STRICT)
        with pytest.raises(ValueError, match="comes too late"):
            gpu.fail = "import"


@pytest.mark.parametrize("fault", ["cuda", "import"])
def test_query_that_outlives_its_host_changes_nothing(fault, monkeypatch):
    if "cudf_polars" not in sys.modules:
        real = ModuleType("cudf_polars")
        monkeypatch.setitem(sys.modules, "cudf_polars", real)
    real = sys.modules["cudf_polars"]
    started, gate = threading.Event(), threading.Event()

    def hold(*_config, **_again):
        started.set()
        gate.wait()
        raise RuntimeError("CUDA") if fault == "cuda" else ImportError

    collector = pa.Collector(gpu="offload")
    with simulate_gpu() as gpu:
        if fault == "cuda":
            gpu.next_fault = hold
        else:
            gpu.check_import = hold
        handle = collector.collect_async(TINY, engine="gpu")
        assert started.wait(30)
    gate.set()
    assert handle.result(30).item() == 1
    collector.close()
    assert sys.modules["cudf_polars"] is real
    assert breaker.health == Health()
    assert cudf.import_failure() is None


def test_status_of_a_simulated_host_holds_for_no_other(monkeypatch):
    """As where another thread asks for it while this one goes from one host to the next."""
    probe = _probe.Probe()
    monkeypatch.setattr(_probe, "probe", probe)
    host = Host(devices=(HostDevice(index=0),), cuda_version=(13, 0))
    with simulate_gpu(cudf_polars="27.1"):
        probe.override(host)
        assert pa.gpu_status().cudf_polars_version == "27.1"
        judged = probe._judged
    probe.override(host)
    probe._judged = judged
    assert pa.gpu_status().cudf_polars_version != "27.1"
