from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import ModuleType

import packaging.requirements  # noqa: F401  # importable whatever a test makes of sys.path
import polars as pl
import pynvml
import pytest
from nvml_stub import (
    BLOCKED_BY_SYSTEM,
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    GPU_NOT_FOUND,
    LIBRARY_NOT_FOUND,
    NO_PERMISSION,
    NOT_SUPPORTED,
    TIMEOUT,
    UNKNOWN,
    VERSION_MISMATCH,
    Error,
    Gpu,
    NvmlStub,
    compile_stub,
    describe,
)

from polars_async.errors import EngineUnavailableError
from polars_async.gpu import cudf as _cudf
from polars_async.gpu import gpu_status, probe
from polars_async.gpu.cudf import note_import_failure
from polars_async.gpu.nvml import Host, HostDevice
from polars_async.gpu.status import GpuDevice
from polars_async.reasons import Reason
from polars_async.resolution import decide

UUIDS = [f"GPU-{digit * 8}-d72c-4106-c12f-20bd9faed9f6" for digit in "abcd"]
INSTANCE = "MIG-11111111-d72c-4106-c12f-20bd9faed9f6"

H100 = Gpu(uuid=UUIDS[0])
A100 = Gpu(name="NVIDIA A100-SXM4-40GB", uuid=UUIDS[1], capability="8.0")
V100 = Gpu(name="Tesla V100-SXM2-16GB", uuid=UUIDS[2], capability="7.0")
K620 = Gpu(name="Quadro K620", uuid=UUIDS[3], capability="5.0")


def variant(gpu_, **changes):
    return Gpu(**{**vars(gpu_), **changes})


class Site:
    """A folder on sys.path to install a fake cudf-polars into."""

    def __init__(self, folder):
        self.folder = folder

    def install(self, name="cudf-polars-cu13", version="26.10.2", polars="", module=""):
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        needs = ["Requires-Dist: packaging", f"Requires-Dist: polars{polars}"]
        needs = ["Requires-Dist: ???", 'Requires-Dist: polars<0; extra == "test"', *needs]
        metadata = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *needs]
        (info / "METADATA").write_text("\n".join(metadata) + "\n")
        if module is not None:
            self.add_module(module)
        importlib.invalidate_caches()

    def add_module(self, source=""):
        package = self.folder / "cudf_polars"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(source)
        importlib.invalidate_caches()


@pytest.fixture(scope="session")
def stub_library(tmp_path_factory):
    return compile_stub(tmp_path_factory.mktemp("nvml_stub"))


@pytest.fixture
def nvml(stub_library, monkeypatch):
    return NvmlStub(stub_library, monkeypatch)


@pytest.fixture(autouse=True)
def fresh_probe(monkeypatch):
    monkeypatch.setattr(probe, "probe", probe.Probe())
    monkeypatch.setattr(_cudf, "_import_failure", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)


@pytest.fixture(autouse=True)
def site(tmp_path, monkeypatch):
    """Hide a real cudf-polars of the environment the tests run in."""
    folder = tmp_path / "site"
    folder.mkdir()
    kept = [each for each in sys.path if not any(Path(each or ".").glob("cudf_polars*"))]
    monkeypatch.setattr(sys, "path", [str(folder), *kept])
    # Set first, so that at the end monkeypatch also takes away what a test has put there.
    monkeypatch.setitem(sys.modules, "cudf_polars", None)
    del sys.modules["cudf_polars"]
    return Site(folder)


@pytest.fixture
def installed(site):
    site.install()


@pytest.fixture
def usable(nvml, installed):  # noqa: ARG001  # usefixtures does nothing for a fixture
    nvml.host(H100)
    assert gpu_status().usable


@pytest.mark.usefixtures("installed")
def test_usable_host_says_what_runs_where(nvml):
    nvml.host(H100)
    status = gpu_status()
    assert status.usable
    assert status.reason is None
    assert status.message == (
        "queries run on GPU 0 (NVIDIA H100 80GB HBM3), through cudf-polars-cu13 26.10.2"
    )
    assert status.driver_version == "580.65.06"
    assert status.cuda_version == (13, 0)
    assert status.cudf_polars_version == "26.10.2"
    [device] = status.devices
    assert device == GpuDevice(
        index=0,
        uuid=UUIDS[0],
        name="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        memory_total=85899345920,
        memory_free=85000000000,
        number=0,
        selected=True,
        usable=True,
        reason=None,
        message="cudf-polars selects GPU 0 (NVIDIA H100 80GB HBM3)",
    )


@pytest.mark.usefixtures("usable")
def test_status_and_devices_are_frozen():
    with pytest.raises(FrozenInstanceError):
        gpu_status().usable = False
    with pytest.raises(FrozenInstanceError):
        gpu_status().devices[0].usable = False


# NVML fails


def test_absent_driver_library_is_no_library(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    # On a host with a driver, too: dlopen itself has to fail.
    monkeypatch.setattr(pynvml, "CDLL", lambda name: ctypes.CDLL(f"/nowhere/{name}"))
    status = gpu_status()
    assert status.reason is Reason.NO_LIBRARY
    assert status.message == (
        "the NVIDIA driver's library libnvidia-ml.so.1 was not found: "
        "install the NVIDIA driver, or give the container GPU access"
    )
    assert status.devices == ()
    assert status.driver_version is status.cuda_version is None


def test_absent_pynvml_is_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    status = gpu_status()
    assert status.reason is Reason.NO_LIBRARY
    assert status.message.endswith(": install nvidia-ml-py")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("error", "reason", "words"),
    [
        (NO_PERMISSION, Reason.NO_PERMISSION, "no permission"),
        (BLOCKED_BY_SYSTEM, Reason.NO_PERMISSION, "cgroups"),
        (DRIVER_NOT_LOADED, Reason.NO_DRIVER, "modprobe nvidia"),
        (LIBRARY_NOT_FOUND, Reason.NO_LIBRARY, "install the NVIDIA driver"),
        (VERSION_MISMATCH, Reason.DRIVER_MISMATCH, "restart the machine"),
        (GPU_IS_LOST, Reason.GPU_LOST, "reset that GPU"),
        (GPU_NOT_FOUND, Reason.NO_DEVICE, "lists no GPU"),
        (TIMEOUT, Reason.NVML_ERROR, "fails (Timeout, error 10)"),
        (UNKNOWN, Reason.NVML_ERROR, "fails (Unknown Error, error 999)"),
        (Error(77), Reason.NVML_ERROR, "fails (stub error 77, error 77)"),
    ],
)
@pytest.mark.parametrize("where", ["init", "count"])
def test_every_failure_of_nvml_is_a_reason(nvml, where, error, reason, words):
    nvml.host(H100, **{where: error})
    status = gpu_status()
    assert not status.usable
    assert status.reason is reason
    assert words in status.message
    assert nvml.inits == 1
    assert nvml.running == 0


@pytest.mark.usefixtures("installed")
def test_failed_shutdown_is_not_raised(nvml):
    nvml.host(H100, shutdown=UNKNOWN)
    assert gpu_status().usable


def test_missing_function_of_an_old_driver_is_a_reason(nvml, monkeypatch):
    nvml.host(H100)

    class Old:
        nvmlInitWithFlags = pynvml.nvmlLib.nvmlInitWithFlags  # noqa: N815
        nvmlShutdown = pynvml.nvmlLib.nvmlShutdown  # noqa: N815

    monkeypatch.setattr(pynvml, "nvmlLib", Old)
    status = gpu_status()
    assert status.reason is Reason.NVML_ERROR
    assert "Function Not Found" in status.message
    assert nvml.running == 0


@pytest.mark.usefixtures("installed")
def test_absent_libcuda_is_no_library(nvml):
    nvml.host(H100, cuda=LIBRARY_NOT_FOUND)
    status = gpu_status()
    assert status.reason is Reason.NO_LIBRARY
    assert "libcuda.so.1" in status.message
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in status.message
    assert [each.index for each in status.devices] == [0]


@pytest.mark.usefixtures("installed")
def test_driver_without_gpus_is_no_device(nvml):
    nvml.host()
    status = gpu_status()
    assert status.reason is Reason.NO_DEVICE
    assert status.driver_version == "580.65.06"


@pytest.mark.usefixtures("installed")
def test_unknown_driver_versions_rule_nothing_out(nvml):
    nvml.host(H100, cuda=UNKNOWN, driver=NO_PERMISSION)
    status = gpu_status()
    assert status.usable
    assert status.driver_version is status.cuda_version is None


# One GPU fails


@pytest.mark.usefixtures("installed")
def test_unknown_facts_of_a_gpu_rule_nothing_out(nvml):
    fails = dict.fromkeys(("name", "uuid", "capability", "mig"), NO_PERMISSION)
    nvml.host(Gpu(compute_mode=NOT_SUPPORTED, **fails))
    status = gpu_status()
    assert status.usable
    [device] = status.devices
    assert device.name is device.uuid is device.compute_capability is None
    assert status.message == "queries run on GPU 0, through cudf-polars-cu13 26.10.2"


@pytest.mark.usefixtures("installed")
def test_gpu_without_memory_of_its_own_is_usable(nvml):
    nvml.host(variant(H100, name="NVIDIA GB10", capability="12.1", memory=NOT_SUPPORTED))
    status = gpu_status()
    assert status.usable
    assert status.devices[0].memory_total is status.devices[0].memory_free is None


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (GPU_IS_LOST, Reason.GPU_LOST),
        (NO_PERMISSION, Reason.NO_PERMISSION),
        (UNKNOWN, Reason.NVML_ERROR),
    ],
)
@pytest.mark.parametrize("question", ["handle", "memory"])
def test_failing_gpu_does_not_hide_the_others(nvml, question, error, reason):
    nvml.host(variant(H100, **{question: error}), A100)
    status = gpu_status()
    failing, sound = status.devices
    assert failing.reason is status.reason is reason
    assert failing.selected
    assert not failing.usable
    assert sound.usable
    assert sound.name == "NVIDIA A100-SXM4-40GB"
    assert sound.message == (
        f"cudf-polars selects {'GPU 0' if failing.name is None else f'GPU 0 ({failing.name})'}: "
        f"set CUDA_VISIBLE_DEVICES={UUIDS[1]} to use GPU 1 (NVIDIA A100-SXM4-40GB)"
    )
    assert f": set CUDA_VISIBLE_DEVICES={UUIDS[1]} to use GPU 1" in status.message
    assert nvml.running == 0


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("changes", "cause", "remedy"),
    [
        (
            {"memory": NO_PERMISSION},
            "NVML does not tell cudf-polars the memory of GPU 0 (Insufficient Permissions)",
            "give this process access to the whole GPU, not to a MIG instance of it",
        ),
        (
            {"handle": NO_PERMISSION},
            "NVML cannot read GPU 0 (Insufficient Permissions, error 4)",
            "give its user access to /dev/nvidiactl and /dev/nvidia*",
        ),
        (
            {"memory": GPU_IS_LOST},
            "NVML cannot read GPU 0 (GPU is lost, error 15)",
            "reset that GPU or restart the machine",
        ),
        (
            {"memory": UNKNOWN},
            "NVML cannot read GPU 0 (Unknown Error, error 999)",
            "look into nvidia-smi and the kernel's log for the cause",
        ),
    ],
)
def test_failing_gpu_says_how(nvml, changes, cause, remedy):
    nvml.host(variant(H100, **changes))
    status = gpu_status()
    assert status.message == status.devices[0].message == f"{cause}: {remedy}"


@pytest.mark.usefixtures("installed")
def test_failing_gpu_that_is_not_taken_changes_nothing(nvml):
    nvml.host(H100, variant(A100, handle=GPU_IS_LOST))
    status = gpu_status()
    assert status.usable
    assert [each.reason for each in status.devices] == [None, Reason.GPU_LOST]
    assert "reset that GPU" in status.devices[1].message


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("question", ["name", "uuid", "capability", "compute_mode", "mig"])
def test_gpu_lost_in_the_middle_of_the_questions_is_lost(nvml, question):
    nvml.host(variant(H100, **{question: GPU_IS_LOST}))
    assert gpu_status().reason is Reason.GPU_LOST


@pytest.mark.usefixtures("installed")
def test_names_that_an_older_pynvml_gives_as_bytes_are_text(nvml, monkeypatch):
    nvml.host(H100)
    for name in ("nvmlDeviceGetName", "nvmlDeviceGetUUID", "nvmlSystemGetDriverVersion"):
        question = getattr(pynvml, name)
        monkeypatch.setattr(pynvml, name, lambda *args, ask=question: ask(*args).encode())
    status = gpu_status()
    assert status.driver_version == "580.65.06"
    assert status.devices[0].name == "NVIDIA H100 80GB HBM3"
    assert status.devices[0].uuid == UUIDS[0]


# What cudf-polars needs


@pytest.mark.parametrize(
    ("build", "capability", "remedy"),
    [
        ("cudf-polars-cu12", "6.1", "use a newer GPU, or the CPU"),
        ("cudf-polars-cu12", "7.0", None),
        ("cudf-polars-cu13", "6.1", "use a newer GPU, or the CPU"),
        ("cudf-polars-cu13", "7.0", "install cudf-polars-cu12"),
        ("cudf-polars-cu13", "7.5", None),
        ("cudf-polars-cu13", "12.0", None),
        ("cudf-polars", "6.1", "use a newer GPU, or the CPU"),
        ("cudf-polars", "7.0", None),
    ],
)
def test_compute_capability_by_build(nvml, site, build, capability, remedy):
    nvml.host(variant(H100, name="GPU X", capability=capability))
    site.install(build)
    status = gpu_status()
    assert status.usable is status.devices[0].usable is (remedy is None)
    if remedy is not None:
        assert status.reason is status.devices[0].reason is Reason.COMPUTE_CAPABILITY
        needed = "7.5" if build == "cudf-polars-cu13" else "7.0"
        assert status.message == (
            f"GPU 0 (GPU X) has compute capability {capability} and {build} needs "
            f"{needed} or newer: {remedy}"
        )


@pytest.mark.parametrize(
    ("build", "cuda", "remedy"),
    [
        ("cudf-polars-cu12", 12010, "update the driver"),
        ("cudf-polars-cu12", 12020, None),
        ("cudf-polars-cu13", 12010, "update the driver"),
        ("cudf-polars-cu13", 12090, "update the driver or install cudf-polars-cu12"),
        ("cudf-polars-cu13", 13000, None),
        ("cudf-polars", 12010, "update the driver"),
        ("cudf-polars", 12020, None),
    ],
)
def test_driver_by_build(nvml, site, build, cuda, remedy):
    nvml.host(H100, cuda=cuda)
    site.install(build)
    status = gpu_status()
    assert status.usable is (remedy is None)
    assert status.cuda_version == (cuda // 1000, cuda % 1000 // 10)
    assert status.devices[0].usable
    if remedy is not None:
        assert status.reason is Reason.DRIVER_TOO_OLD
        needed = "13.0" if build == "cudf-polars-cu13" else "12.2"
        assert status.message == (
            f"the driver supports CUDA {cuda // 1000}.{cuda % 1000 // 10} and {build} needs "
            f"{needed} or newer: {remedy}"
        )


def test_two_builds_side_by_side_are_judged_by_the_laxer_rules(nvml, site):
    nvml.host(V100, cuda=12020)
    site.install("cudf-polars-cu12")
    site.install("cudf-polars-cu13")
    assert gpu_status().usable
    assert gpu_status().message.endswith(", through cudf-polars 26.10.2")


@pytest.mark.usefixtures("installed")
def test_prohibited_compute_mode(nvml):
    nvml.host(variant(H100, compute_mode=2))
    status = gpu_status()
    assert status.reason is status.devices[0].reason is Reason.COMPUTE_PROHIBITED
    assert status.message.endswith(": set it back with nvidia-smi -i 0 -c DEFAULT")


@pytest.mark.usefixtures("installed")
def test_exclusive_compute_mode_is_usable(nvml):
    nvml.host(variant(H100, compute_mode=3))
    assert gpu_status().usable


@pytest.mark.usefixtures("installed")
def test_mig_mode_without_an_instance(nvml):
    nvml.host(variant(H100, mig=1))
    status = gpu_status()
    assert status.reason is status.devices[0].reason is Reason.MIG_WITHOUT_INSTANCE
    assert "-mig 0" in status.message


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "changes",
    [
        {"instances": {3: INSTANCE}},
        {"instances": {3: INSTANCE, 4: NO_PERMISSION}},
        {"instances": {3: NO_PERMISSION}},
        {"mig_slots": NO_PERMISSION},
    ],
)
@pytest.mark.parametrize("visible", [None, "0", UUIDS[0], INSTANCE])
def test_mig_instance_that_is_there_or_cannot_be_seen_is_usable(
    nvml, monkeypatch, changes, visible
):
    nvml.host(variant(H100, mig=1, **changes))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_status().usable


@pytest.mark.usefixtures("installed")
def test_mig_instance_on_the_second_gpu_takes_that_gpu(nvml, monkeypatch):
    nvml.host(H100, variant(A100, mig=1, instances={0: INSTANCE}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", INSTANCE)
    status = gpu_status()
    assert status.usable
    assert [each.selected for each in status.devices] == [False, True]


@pytest.mark.usefixtures("installed")
def test_listed_mig_instance_takes_its_gpu_before_one_that_lists_none(nvml, monkeypatch):
    instances = {0: INSTANCE, 1: NO_PERMISSION}
    nvml.host(
        variant(H100, mig=1, mig_slots=NO_PERMISSION), variant(A100, mig=1, instances=instances)
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", INSTANCE)
    assert [each.selected for each in gpu_status().devices] == [False, True]


@pytest.mark.usefixtures("installed")
def test_unlisted_mig_instance_is_invalid(nvml, monkeypatch):
    nvml.host(variant(H100, mig=1, instances={0: INSTANCE}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", INSTANCE.replace("1", "2"))
    assert gpu_status().reason is Reason.INVALID_VISIBLE_DEVICES


# CUDA_VISIBLE_DEVICES


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", ",0", "-1,0"])
def test_hidden_devices(nvml, monkeypatch, visible):
    nvml.host(H100, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    status = gpu_status()
    assert status.reason is Reason.DEVICES_HIDDEN
    assert status.message == (
        f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU: "
        "unset it, or set it to an index (0 to 1) or a full UUID"
    )
    assert [each.reason for each in status.devices] == [Reason.DEVICES_HIDDEN] * 2


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("visible", "index"),
    [(None, 0), ("0", 0), ("1", 1), ("1,0", 1), ("1,-1,0", 1), (UUIDS[1], 1), (f"{UUIDS[1]},0", 1)],
)
def test_first_entry_is_the_gpu_that_cudf_polars_takes(nvml, monkeypatch, visible, index):
    nvml.host(H100, variant(H100, uuid=UUIDS[1]))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    status = gpu_status()
    assert status.usable
    assert [each.index for each in status.devices if each.selected] == [index]
    assert f"queries run on GPU {index} (" in status.message


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "visible",
    ["0,0", "0,1,0", "0, 0", "1,1,7", f"{UUIDS[0]},{UUIDS[0]}", f"{UUIDS[0]},{UUIDS[0][:12]}"],
)
def test_gpu_that_is_named_twice_hides_them_all(nvml, monkeypatch, visible):
    nvml.host(H100, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    status = gpu_status()
    assert (status.usable, status.reason) == (False, Reason.DEVICES_HIDDEN)
    assert status.message == (
        f"CUDA_VISIBLE_DEVICES={visible!r} names a GPU twice, and so hides them all: "
        "name each GPU once"
    )
    assert [each.usable for each in status.devices] == [False, False]


@pytest.mark.usefixtures("installed")
def test_gpu_that_is_named_twice_after_an_invalid_entry_hides_none(nvml, monkeypatch):
    nvml.host(H100, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,7,0")
    assert gpu_status().usable


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("visible", "hidden"),
    [
        (None, []),
        ("1", [0]),
        ("1,0", []),
        ("1,-1,0", [0]),
        ("1,7,0", [0]),
        (f"{UUIDS[1]},GPU-aaaa", []),
        (f"{UUIDS[1]},MIG-aaaa", [0]),
    ],
)
def test_entries_up_to_the_first_invalid_one_are_visible(nvml, monkeypatch, visible, hidden):
    nvml.host(H100, A100)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    status = gpu_status()
    assert status.usable
    reasons = {each.index for each in status.devices if each.reason is Reason.DEVICES_HIDDEN}
    assert reasons == set(hidden)
    for index in hidden:
        assert status.devices[index].message == (
            f"CUDA_VISIBLE_DEVICES={visible!r} hides GPU 0 (NVIDIA H100 80GB HBM3): "
            f"set CUDA_VISIBLE_DEVICES={UUIDS[0]} to use GPU 0 (NVIDIA H100 80GB HBM3)"
        )


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("visible", "message"),
    [
        ("2", "begins with '2', and the driver lists no such GPU: set it to an index (0 to 1)"),
        ("x", "begins with 'x', and the driver lists no such GPU: set it to an index (0 to 1)"),
        ("²", "begins with '²', and the driver lists no such GPU: set it to an index (0 to 1)"),
        ("GPU-b", f"begins with 'GPU-b', which cudf-polars does not accept: set it to {UUIDS[1]}"),
        ("GPU-", "begins with 'GPU-', and the driver lists no such GPU"),
        (" 1", "begins with ' 1', which cudf-polars does not accept: set it to 1 for GPU 1"),
        (f" {UUIDS[1]}", f"which cudf-polars does not accept: set it to {UUIDS[1]} for GPU 1"),
    ],
)
def test_entry_that_cudf_polars_cannot_take(nvml, monkeypatch, visible, message):
    nvml.host(H100, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    status = gpu_status()
    assert status.reason is Reason.INVALID_VISIBLE_DEVICES
    assert message in status.message
    assert not any(each.selected for each in status.devices)


@pytest.mark.usefixtures("installed")
def test_capable_gpu_is_named_when_the_taken_one_is_not(nvml):
    nvml.host(K620, A100)
    status = gpu_status()
    assert status.reason is Reason.COMPUTE_CAPABILITY
    assert status.message == (
        "GPU 0 (Quadro K620) has compute capability 5.0 and cudf-polars-cu13 needs 7.5 or newer: "
        f"set CUDA_VISIBLE_DEVICES={UUIDS[1]} to use GPU 1 (NVIDIA A100-SXM4-40GB)"
    )
    assert status.devices[0].message.endswith(": use a newer GPU, or the CPU")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("gpus", "variables", "reason"),
    [
        ([K620, A100], {"VISIBLE_DEVICES": "1"}, Reason.AMBIGUOUS_DEVICE_ORDER),
        (
            [K620, A100],
            {"VISIBLE_DEVICES": "1", "DEVICE_ORDER": "FASTEST_FIRST"},
            Reason.AMBIGUOUS_DEVICE_ORDER,
        ),
        ([K620, A100], {"VISIBLE_DEVICES": "1", "DEVICE_ORDER": "PCI_BUS_ID"}, None),
        ([K620, A100], {"VISIBLE_DEVICES": UUIDS[1]}, None),
        ([A100, K620], {}, None),
        ([A100, K620], {"VISIBLE_DEVICES": "0"}, None),
        ([A100, K620], {"VISIBLE_DEVICES": "1"}, Reason.COMPUTE_CAPABILITY),
        ([A100, H100], {}, None),
        ([A100, A100], {"VISIBLE_DEVICES": "1"}, None),
    ],
)
def test_device_order_of_cuda(nvml, monkeypatch, gpus, variables, reason):
    nvml.host(*gpus)
    for name, value in variables.items():
        monkeypatch.setenv(f"CUDA_{name}", value)
    assert gpu_status().reason is reason


UNLIKE = (H100, A100)
ALIKE = (H100, variant(H100, uuid=UUIDS[1]), variant(H100, uuid=UUIDS[2]))
BY_BUS = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("gpus", "variables", "numbers"),
    [
        (ALIKE, {}, [0, 1, 2]),
        (ALIKE, {"CUDA_VISIBLE_DEVICES": "2,0"}, [1, None, 0]),
        (ALIKE, {"CUDA_VISIBLE_DEVICES": f"{UUIDS[1]}, 0 ,no,2"}, [1, 0, None]),
        (ALIKE, {"CUDA_VISIBLE_DEVICES": "2,2"}, [None] * 3),
        (UNLIKE, {}, [None, None]),
        (UNLIKE, BY_BUS, [0, 1]),
        (UNLIKE, {"CUDA_VISIBLE_DEVICES": f"{UUIDS[1]},0"}, [None, 0]),
        (UNLIKE, {"CUDA_VISIBLE_DEVICES": f"{UUIDS[1]},0"} | BY_BUS, [1, 0]),
    ],
)
def test_number_of_a_gpu_is_that_by_which_cuda_counts_it(
    nvml, monkeypatch, gpus, variables, numbers
):
    nvml.host(*gpus)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [device.number for device in gpu_status().devices] == numbers


@pytest.mark.usefixtures("installed")
def test_instances_of_one_gpu_have_one_number_as_cuda_takes_one_alone(nvml, monkeypatch):
    nvml.host(
        variant(H100, mig=1, instances={0: INSTANCE, 1: "MIG-2"}), variant(H100, uuid=UUIDS[1])
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{INSTANCE},MIG-2,{UUIDS[1]}")
    assert [device.number for device in gpu_status().devices] == [0, 2]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("gpus", "variables", "number", "reason"),
    [
        (UNLIKE, {}, 1, Reason.AMBIGUOUS_DEVICE_ORDER),
        (UNLIKE, BY_BUS, 1, None),
        (UNLIKE, BY_BUS, 2, Reason.UNKNOWN_DEVICE),
        ((H100, K620), BY_BUS, 1, Reason.COMPUTE_CAPABILITY),
        ((H100, K620), BY_BUS, 0, None),
        ((H100, variant(H100, compute_mode=2)), {}, 1, Reason.COMPUTE_PROHIBITED),
        # CUDA may count it, or not.
        ((H100, variant(H100, handle=GPU_IS_LOST)), {}, 0, Reason.AMBIGUOUS_DEVICE_ORDER),
    ],
)
def test_gpu_that_is_named_and_cannot_be_used_is_told(
    nvml, monkeypatch, gpus, variables, number, reason
):
    nvml.host(*gpus)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    engine = pl.GPUEngine(device=number)
    found = decide(engine, "async", "offload", "in-memory", gpu_in_workers=True)
    assert found.reason is reason
    on_threads = decide(engine, "async", "offload", "in-memory")
    if reason is Reason.AMBIGUOUS_DEVICE_ORDER:  # there CUDA itself counts
        assert on_threads.name == "gpu"
    else:
        assert on_threads.reason is reason
    if reason is not None:
        strict = pl.GPUEngine(device=number, raise_on_fail=True)
        with pytest.raises(EngineUnavailableError, match=f"device={number} "):
            decide(strict, "async", "offload", "in-memory", gpu_in_workers=True)


@pytest.mark.usefixtures("installed")
def test_ambiguous_device_order_names_the_gpu_that_cuda_would_take(nvml, monkeypatch):
    nvml.host(K620, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu_status().message == (
        "CUDA counts the fastest GPU first and cudf-polars counts by PCI bus, and GPU 0 "
        "(Quadro K620) has compute capability 5.0 and cudf-polars-cu13 needs 7.5 or newer: "
        "set CUDA_DEVICE_ORDER=PCI_BUS_ID to use GPU 1 (NVIDIA A100-SXM4-40GB)"
    )


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "variables", [{"DEVICE_ORDER": "PCI_BUS_ID"}, {"VISIBLE_DEVICES": UUIDS[1]}]
)
def test_usable_gpus_of_several_kinds_are_told_apart_where_cuda_does(nvml, monkeypatch, variables):
    nvml.host(A100, H100)
    assert gpu_status().message == (
        "queries run through cudf-polars-cu13 26.10.2 on what CUDA counts as GPU 0, the fastest "
        "first: set CUDA_DEVICE_ORDER=PCI_BUS_ID to use GPU 0 (NVIDIA A100-SXM4-40GB)"
    )
    for name, value in variables.items():
        monkeypatch.setenv(f"CUDA_{name}", value)
    assert gpu_status().message.startswith("queries run on GPU 0 (NVIDIA A100-SXM4-40GB), ")


# cudf-polars


@pytest.mark.parametrize(
    ("gpu_", "cuda", "extra"),
    [(H100, 13000, "gpu-cu13"), (H100, 12080, "gpu-cu12"), (V100, 13000, "gpu-cu12")],
)
def test_missing_cudf_polars_names_the_extra_to_install(nvml, gpu_, cuda, extra):
    nvml.host(gpu_, cuda=cuda)
    status = gpu_status()
    assert status.reason is Reason.CUDF_MISSING
    assert status.message.startswith(
        f"cudf-polars is not installed: install polars-async[{extra}], "
    )
    assert status.cudf_polars_version is None
    assert status.devices[0].usable


@pytest.mark.usefixtures("installed")
def test_blocked_import_is_missing(nvml, monkeypatch):
    nvml.host(H100)
    monkeypatch.setitem(sys.modules, "cudf_polars", None)
    assert gpu_status().reason is Reason.CUDF_MISSING


def test_folder_that_an_uninstall_left_behind_is_missing(nvml, tmp_path):
    nvml.host(H100)
    (tmp_path / "site" / "cudf_polars" / "__pycache__").mkdir(parents=True)
    assert gpu_status().reason is Reason.CUDF_MISSING


def test_distribution_without_its_module_is_broken(nvml, site):
    nvml.host(H100)
    site.install(module=None)
    status = gpu_status()
    assert status.reason is Reason.CUDF_BROKEN
    assert status.message == (
        "cudf-polars-cu13 26.10.2 is installed, but its module cudf_polars was not found: "
        "reinstall cudf-polars-cu13"
    )


def test_module_without_a_distribution_is_usable(nvml, site):
    nvml.host(V100, cuda=12020)
    site.add_module()
    status = gpu_status()
    assert status.usable
    assert status.cudf_polars_version is None
    assert status.message.endswith("through cudf-polars")


@pytest.mark.parametrize("version", ["26.10.0", None])
def test_imported_module_counts_whatever_its_distribution_says(nvml, site, monkeypatch, version):
    nvml.host(H100)
    site.install(polars="<1", module=None)
    stand_in = ModuleType("cudf_polars")
    if version is not None:
        stand_in.__version__ = version
    monkeypatch.setitem(sys.modules, "cudf_polars", stand_in)
    status = gpu_status()
    assert status.usable
    assert status.cudf_polars_version == (version or "26.10.2")


def test_polars_that_cudf_polars_does_not_support_is_incompatible(nvml, site):
    nvml.host(H100)
    site.install(polars="<1.40,>=1.35")
    status = gpu_status()
    assert status.reason is Reason.CUDF_INCOMPATIBLE
    assert status.message == (
        f"cudf-polars-cu13 26.10.2 needs Polars <1.40,>=1.35 and Polars {pl.__version__} is "
        'installed: install "polars<1.40,>=1.35", or a cudf-polars-cu13 that supports Polars '
        f"{pl.__version__}"
    )
    assert status.cudf_polars_version == "26.10.2"


def test_bounds_of_the_real_cudf_polars(nvml, site):
    nvml.host(H100)
    site.install(polars="<1.45,>=1.35")
    expected = None if pl.__version__.startswith("1.44.") else Reason.CUDF_INCOMPATIBLE
    assert gpu_status().reason is expected


@pytest.mark.parametrize("installed", ["1.45.0", "1.45.0b1", "2.1.0"])
def test_next_polars_is_incompatible_from_its_first_beta(nvml, site, monkeypatch, installed):
    monkeypatch.setattr(pl, "__version__", installed)
    nvml.host(H100)
    site.install(polars="<1.45,>=1.35")
    assert gpu_status().reason is Reason.CUDF_INCOMPATIBLE


def test_release_candidate_within_the_bounds_is_compatible(nvml, site, monkeypatch):
    monkeypatch.setattr(pl, "__version__", "1.44.3rc1")
    nvml.host(H100)
    site.install(polars="<1.45,>=1.35")
    assert gpu_status().usable


def test_without_packaging_the_bounds_are_not_judged(nvml, site, monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    nvml.host(H100)
    site.install(polars="<1")
    assert gpu_status().usable


@pytest.mark.usefixtures("usable")
def test_noted_import_failure_is_broken(nvml):
    note_import_failure(RuntimeError("libcudart.so.13 not found\n  searched: /usr/lib"))
    status = gpu_status()
    assert status.reason is Reason.CUDF_BROKEN
    assert status.message == (
        "cudf-polars-cu13 26.10.2 is installed, but its import fails "
        "(RuntimeError: libcudart.so.13 not found searched: /usr/lib): reinstall cudf-polars-cu13"
    )
    assert nvml.inits == 1


@pytest.mark.usefixtures("usable")
def test_noted_failure_without_words_is_its_type():
    note_import_failure(KeyError())
    assert "(KeyError)" in gpu_status().message


@pytest.mark.usefixtures("usable")
def test_import_failure_is_forgotten_on_refresh_and_on_import(monkeypatch):
    note_import_failure(AttributeError("x"))
    assert not gpu_status().usable
    assert gpu_status(refresh=True).usable
    note_import_failure(AttributeError("x"))
    assert not gpu_status().usable
    monkeypatch.setitem(sys.modules, "cudf_polars", ModuleType("cudf_polars"))
    assert gpu_status().usable


def test_unsupported_polars_outranks_the_import_failure_it_causes(nvml, site):
    nvml.host(H100)
    site.install(polars="<1")
    note_import_failure(AttributeError("module 'polars' has no attribute"))
    assert gpu_status().reason is Reason.CUDF_INCOMPATIBLE


def test_hardware_outranks_missing_cudf_polars(nvml):
    nvml.host(K620, cuda=11000)
    assert gpu_status().reason is Reason.COMPUTE_CAPABILITY
    nvml.host(H100, cuda=11000)
    assert gpu_status(refresh=True).reason is Reason.DRIVER_TOO_OLD


def test_hardware_outranks_unsupported_polars(nvml, site):
    nvml.host(H100, cuda=11000)
    site.install(polars="<1")
    assert gpu_status().reason is Reason.DRIVER_TOO_OLD


def test_cudf_polars_is_not_imported_to_ask(nvml, site):
    nvml.host(H100)
    site.install(module="raise SystemExit('imported')")
    assert gpu_status().usable
    assert "cudf_polars" not in sys.modules


# Asked once


@pytest.mark.usefixtures("usable")
def test_nvml_is_asked_once_and_again_on_refresh(nvml):
    first = gpu_status()
    nvml.host(K620)
    assert gpu_status() is first
    assert (nvml.inits, nvml.shutdowns, nvml.handles) == (1, 1, 1)
    assert gpu_status(refresh=True).reason is Reason.COMPUTE_CAPABILITY
    assert (nvml.inits, nvml.shutdowns, nvml.handles) == (2, 2, 2)


@pytest.mark.usefixtures("installed")
def test_failure_of_nvml_is_remembered_until_refresh(nvml):
    nvml.host(init=DRIVER_NOT_LOADED)
    assert gpu_status().reason is Reason.NO_DRIVER
    assert gpu_status().reason is Reason.NO_DRIVER
    assert (nvml.inits, nvml.shutdowns) == (1, 0)
    nvml.host(H100)
    assert gpu_status(refresh=True).usable
    assert (nvml.inits, nvml.shutdowns) == (2, 1)


@pytest.mark.usefixtures("usable")
def test_changed_environment_is_judged_without_asking_nvml(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpu_status().reason is Reason.DEVICES_HIDDEN
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu_status().usable
    assert nvml.inits == 1


@pytest.mark.usefixtures("installed")
def test_changed_device_order_is_judged_without_asking_nvml(nvml, monkeypatch):
    nvml.host(K620, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert not gpu_status().usable
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert gpu_status().usable
    assert nvml.inits == 1


def test_cudf_polars_that_comes_and_goes_is_judged_without_asking_nvml(nvml, monkeypatch):
    nvml.host(H100)
    assert gpu_status().reason is Reason.CUDF_MISSING
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cudf_polars", ModuleType("cudf_polars"))
        assert gpu_status().usable
    assert gpu_status().reason is Reason.CUDF_MISSING
    assert nvml.inits == 1


def test_what_is_installed_later_is_found_on_refresh(nvml, site, monkeypatch):
    nvml.host(H100)
    assert gpu_status().reason is Reason.CUDF_MISSING
    before = site.folder.stat()
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "invalidate_caches", lambda: None)
        site.install()
    # Within the resolution of the file system's clock, Python does not see what is new.
    os.utime(site.folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert gpu_status(refresh=True).usable


@pytest.mark.usefixtures("installed")
def test_many_threads_ask_nvml_once(nvml, monkeypatch):
    nvml.host(*[H100] * 8)
    entered, go_on = threading.Event(), threading.Event()
    init = pynvml.nvmlInit

    def slow_init():
        entered.set()
        assert go_on.wait(30)
        init()

    monkeypatch.setattr(pynvml, "nvmlInit", slow_init)
    start = threading.Barrier(33)
    found = []

    def ask():
        start.wait(30)
        found.append(gpu_status())

    threads = [threading.Thread(target=ask) for _ in range(32)]
    for thread in threads:
        thread.start()
    start.wait(30)
    assert entered.wait(30)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert len(found) == 32
    assert len(set(map(id, found))) == 1
    assert (nvml.inits, nvml.shutdowns) == (1, 1)


@pytest.mark.usefixtures("usable")
def test_stand_in_host_is_judged_instead_of_nvml():
    assert (
        probe.probe.override(Host(devices=(HostDevice(index=0, compute_capability=(5, 0)),)))
        is None
    )
    assert gpu_status().reason is Reason.COMPUTE_CAPABILITY
    assert gpu_status(refresh=True).reason is Reason.COMPUTE_CAPABILITY
    before = probe.probe.override(Host())
    assert gpu_status().reason is Reason.NO_DEVICE
    probe.probe.override(before)
    assert gpu_status().reason is Reason.COMPUTE_CAPABILITY
    probe.probe.override(None)
    assert gpu_status().usable


# In a process of its own


def run(script, **environment):
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=150,
    )
    return done.stdout.split()


def test_import_loads_neither_pynvml_nor_cudf_polars():
    script = """
import sys, threading
import polars_async.gpu
lazy = {"pynvml", "cudf_polars", "packaging", "gevent"}
print(*lazy & set(sys.modules), threading.active_count())
"""
    assert run(script) == ["1"]


def test_real_pynvml_loads_the_drivers_library(stub_library):
    script = """
import sys
from polars_async.gpu import gpu_status
status = gpu_status()
print(status.driver_version, *(each.uuid for each in status.devices), "cudf_polars" in sys.modules)
"""
    environment = {"LD_LIBRARY_PATH": str(stub_library.parent), "NVML_STUB": describe(H100, A100)}
    assert run(script, **environment) == ["580.65.06", UUIDS[0], UUIDS[1], "False"]


@pytest.mark.parametrize("patched", ["before", "after"])
def test_threads_ask_nvml_once_under_gevents_patch(stub_library, patched):
    script = f"""
patch = "import gevent.monkey; gevent.monkey.patch_all()"
if {patched == "before"}:
    exec(patch)
from polars_async import gpu
from polars_async._runtime import unpatched
from polars_async.gpu import probe
if {patched == "after"}:
    exec(patch)
import ctypes, pynvml
told = unpatched.SimpleQueue()
for _ in range(8):
    unpatched.start_new_thread(lambda: told.put(gpu.gpu_status()), ())
found = [told.get() for _ in range(8)] + [gpu.gpu_status()]
inits = ctypes.c_int.in_dll(pynvml.nvmlLib, "stub_inits").value
print(len(set(map(id, found))), inits, type(probe.probe._lock).__module__)
"""
    environment = {"LD_LIBRARY_PATH": str(stub_library.parent), "NVML_STUB": describe(H100)}
    assert run(script, **environment) == ["1", "1", "_thread"]
