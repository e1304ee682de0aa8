"""What is installed decides: cudf-polars names the Polars that it needs, whichever that is."""

from __future__ import annotations

import importlib
from dataclasses import replace

import polars as pl
import pytest
from conftest import TINY
from packaging.specifiers import SpecifierSet

import polars_async as pa
from polars_async import doctor
from polars_async.gpu import cudf as _cudf
from polars_async.gpu import probe
from polars_async.gpu.nvml import Host, HostDevice
from polars_async.testing import simulate_gpu

H100 = HostDevice(index=0, name="NVIDIA H100", compute_capability=(9, 0))

BOUNDS = [">=2.0,<3", ">=1.35,<1.45"]
FITTING = [bounds for bounds in BOUNDS if pl.__version__ in SpecifierSet(bounds, prereleases=True)]
OTHER = [bounds for bounds in BOUNDS if bounds not in FITTING]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a made-up distribution of cudf-polars; its module is the simulated one."""

    def install(*polars, name="cudf-polars-cu13", version="26.12.0"):
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {each}" for each in ("packaging", *polars)]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    return install


@pytest.fixture
def gpu():
    """A simulated host whose cudf-polars is the installed one."""
    with simulate_gpu(cudf_polars="26.12.0") as gpu:
        simulated = _cudf.override(_cudf.Override())
        yield gpu
        _cudf.override(simulated)


def test_one_of_the_bounds_is_for_the_installed_polars():
    assert (len(FITTING), len(OTHER)) == (1, 1)


def test_cudf_polars_for_the_installed_polars_is_found_and_runs_queries(install, gpu):
    install(f"polars{FITTING[0]}")
    status = pa.gpu_status()
    assert status.usable, status.message
    assert status.message.endswith("through cudf-polars-cu13 26.12.0")
    assert status.cudf_polars_version == "26.12.0"
    assert pa.gpu_support(TINY).answer == "yes"
    assert doctor.diagnose()["cudf_polars"]["message"] == "cudf-polars-cu13 26.12.0, compatible"
    with pa.Collector(gpu="require") as collector:
        handle = collector.collect_async(TINY, engine="gpu")
        assert handle.result(30).item() == 1
    assert (handle.resolution.name, handle.resolution.downgraded) == ("gpu", False)
    assert gpu.queries == 1


def test_cudf_polars_for_another_polars_is_found_and_ruled_out_with_both_versions(install, gpu):
    [other] = OTHER
    install(f"polars{other}")
    status = pa.gpu_status()
    assert (status.usable, status.reason) == (False, pa.Reason.CUDF_INCOMPATIBLE)
    assert status.cudf_polars_version == "26.12.0"
    needed = SpecifierSet(other)
    assert status.message == (
        f"cudf-polars-cu13 26.12.0 needs Polars {needed} and Polars {pl.__version__} is installed: "
        f'install "polars{needed}", or a cudf-polars-cu13 that supports Polars {pl.__version__}'
    )
    assert pa.gpu_support(TINY).message == status.message
    report = doctor.diagnose()
    assert report["cudf_polars"]["message"] == report["gpu"]["message"] == status.message
    with pa.Collector(gpu="offload") as collector:
        with pytest.warns(pa.EngineDowngradeWarning) as shown:
            handle = collector.collect_async(TINY, engine="gpu")
        assert handle.result(30).item() == 1
        assert status.message in str(shown[0].message)
        with pytest.raises(pa.EngineUnavailableError, match="needs Polars"):
            collector.collect_async(TINY, engine=pl.GPUEngine(raise_on_fail=True))
    assert (handle.resolution.name, handle.resolution.downgraded) == ("in-memory", True)
    assert gpu.queries == 0


@pytest.mark.parametrize("polars", ["2.0.0", "2.1.0", "2.3.0rc1", "3.0.0", "1.44.2"])
@pytest.mark.usefixtures("gpu")
def test_any_polars_is_judged_by_the_metadata_alone(install, monkeypatch, polars):
    monkeypatch.setattr(pl, "__version__", polars)
    install("polars>=2.0,<2.4")
    assert pa.gpu_status(refresh=True).usable is polars.startswith("2.")


@pytest.mark.usefixtures("gpu")
def test_bounds_on_several_lines_hold_together(install):
    install("polars>=1.35", "Polars<1.36", 'polars<1; python_version < "3"')
    assert "needs Polars <1.36,>=1.35 and" in pa.gpu_status().message


@pytest.mark.usefixtures("gpu")
def test_distribution_that_says_nothing_of_polars_is_usable(install):
    install()
    assert pa.gpu_status().usable


# A build for a CUDA that is not out yet


@pytest.mark.parametrize(
    ("cuda", "capability", "words"),
    [
        ((14, 0), (7, 5), "through cudf-polars-cu14 27.6.0"),
        ((13, 9), (7, 5), "supports CUDA 13.9 and cudf-polars-cu14 needs 14.0 or newer"),
        ((14, 0), (7, 0), "compute capability 7.0 and cudf-polars-cu14 needs 7.5 or newer"),
    ],
    ids=["usable", "driver", "capability"],
)
@pytest.mark.usefixtures("gpu")
def test_build_for_a_later_cuda_needs_the_cuda_of_its_name(install, cuda, capability, words):
    install(f"polars{FITTING[0]}", name="cudf-polars-cu14", version="27.6.0")
    device = replace(H100, compute_capability=capability)
    probe.probe.override(Host(devices=(device,), cuda_version=cuda))
    assert words in pa.gpu_status().message
