from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import packaging.requirements  # noqa: F401  # importable whatever a test makes of sys.path
import polars as pl
import pytest
from nvml_stub import DRIVER_NOT_LOADED, Gpu, compile_stub, describe

from polars_async import Collector, Reason, cli, gpu_status, resolution, resolve_engine
from polars_async import doctor as doctor_module
from polars_async._runtime import machine
from polars_async.gpu import cudf as _cudf
from polars_async.gpu import probe
from polars_async.gpu.breaker import breaker
from polars_async.gpu.nvml import Host, HostDevice
from polars_async.reasons import Diagnosis
from polars_async.testing import simulate_gpu

AFFINITY = "POLARS_ENGINE_AFFINITY"
POLICY = "POLARS_ASYNC_GPU"
DEFAULT = "POLARS_ASYNC_ENGINE"
PATHS = ["sync", "async", "background", "batches"]
MAY_DOWNGRADE = PATHS[1:]
GIBIBYTE = 2**30
UUIDS = [f"GPU-{digit * 8}-d72c-4106-c12f-20bd9faed9f6" for digit in "abc"]

K620 = {"name": "Quadro K620", "uuid": UUIDS[0], "compute_capability": (5, 0)}
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "uuid": UUIDS[1],
    "compute_capability": (9, 0),
    "memory_total": 80 * GIBIBYTE,
    "memory_free": 79 * GIBIBYTE + GIBIBYTE // 2,
}
GB10 = {"name": "NVIDIA GB10", "uuid": UUIDS[2], "compute_capability": (12, 1)}

NO_DRIVER = Host(diagnosis=Diagnosis(Reason.NO_DRIVER, "the driver sleeps", "wake it up"))


def host_of(*devices):
    listed = tuple(HostDevice(index=index, **each) for index, each in enumerate(devices))
    return Host(devices=listed, driver_version="580.65.06", cuda_version=(13, 0))


def install_cudf(folder, polars="", module=""):
    """Put a fake cudf-polars into a folder."""
    info = folder / "cudf_polars_cu13-26.10.2.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.4", "Name: cudf-polars-cu13", "Version: 26.10.2"]
    (info / "METADATA").write_text("\n".join([*lines, f"Requires-Dist: polars{polars}\n"]))
    (folder / "cudf_polars").mkdir()
    (folder / "cudf_polars" / "__init__.py").write_text(module)
    importlib.invalidate_caches()


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    for name in (AFFINITY, POLICY, DEFAULT, "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(probe, "probe", probe.Probe())
    monkeypatch.setattr(_cudf, "_import_failure", None)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Give a folder on sys.path, and hide a cudf-polars that is really installed."""
    kept = [each for each in sys.path if not any(Path(each or ".").glob("cudf_polars*"))]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *kept])
    monkeypatch.setitem(sys.modules, "cudf_polars", None)
    del sys.modules["cudf_polars"]
    return tmp_path


@pytest.fixture
def doctor(site, monkeypatch, capsys):  # noqa: ARG001  # usefixtures does nothing for a fixture
    """Run doctor in this process, on a host that is not there, in an environment."""

    def run(*arguments, host=NO_DRIVER, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        probe.probe.override(host)
        status = cli.main(["doctor", *arguments])
        printed, errors = capsys.readouterr()
        assert errors == ""
        return status, printed

    return run


@pytest.fixture
def diagnosis(doctor):
    """Run ``doctor --json``, and check what is the same for every answer."""

    def run(**given):
        status, printed = doctor("--json", **given)
        report = json.loads(printed)
        assert report["exit_status"] == status == (2 if report["problems"] else 0)
        return report

    return run


@pytest.fixture
def usable(site):
    install_cudf(site)
    return host_of(H100)


def unwrapped(text):
    return " ".join(text.split())


# Exit status


@pytest.mark.parametrize("affinity", [None, "auto", "in-memory", "streaming", "cpu"])
@pytest.mark.parametrize("policy", [None, "downgrade", "offload"])
def test_missing_gpu_that_nothing_asks_for_is_no_fault(diagnosis, affinity, policy):
    asked = {AFFINITY: affinity, POLICY: policy}
    report = diagnosis(**{name: value for name, value in asked.items() if value is not None})
    assert report["problems"] == []
    assert report["gpu"]["reason"] == "no_driver"


@pytest.mark.parametrize("policy", [None, "downgrade", "offload", "require"])
def test_missing_gpu_that_the_affinity_asks_for_is_one_problem(diagnosis, policy):
    report = diagnosis(**{AFFINITY: "gpu"}, **({} if policy is None else {POLICY: policy}))
    assert report["problems"] == [
        "POLARS_ENGINE_AFFINITY=gpu asks for a GPU, but the driver sleeps: wake it up"
    ]


@pytest.mark.parametrize("affinity", [None, "streaming"])
def test_missing_gpu_that_the_policy_requires_is_one_problem(diagnosis, affinity):
    asked = {} if affinity is None else {AFFINITY: affinity}
    report = diagnosis(**asked, **{POLICY: "require"})
    assert report["problems"] == [
        "POLARS_ASYNC_GPU=require asks for a GPU, but the driver sleeps: wake it up"
    ]
    assert not any("error" in each for each in report["paths"].values())


@pytest.mark.parametrize("affinity", [None, "gpu"])
@pytest.mark.parametrize("policy", ["downgrade", "offload", "require"])
def test_usable_gpu_is_never_a_problem(diagnosis, usable, affinity, policy):
    asked = {} if affinity is None else {AFFINITY: affinity}
    assert diagnosis(host=usable, **asked, **{POLICY: policy})["problems"] == []


@pytest.mark.parametrize("name", ["foo", "", "GPU", " gpu"])
def test_affinity_that_names_no_engine_is_a_problem(diagnosis, name):
    report = diagnosis(**{AFFINITY: name})
    assert report["affinity"] == {"value": name, "source": "environment", "valid": False}
    [problem] = report["problems"]
    assert problem == (
        f"POLARS_ENGINE_AFFINITY={name!r} is not valid: unset it or set it to one of "
        "'auto', 'in-memory', 'streaming', 'gpu'"
    )
    assert {each["reason"] for each in report["paths"].values()} == {"unknown_affinity"}


@pytest.mark.parametrize("policy", ["maybe", "", "Require"])
def test_policy_that_is_none_is_a_problem_though_no_gpu_is_asked_for(diagnosis, policy):
    report = diagnosis(**{POLICY: policy})
    assert report["gpu_policy"] == {"value": policy, "source": "environment", "valid": False}
    [problem] = report["problems"]
    assert problem == (
        f"POLARS_ASYNC_GPU={policy!r} is not valid: unset it or set it to one of "
        "'downgrade', 'offload', 'require'"
    )


def test_default_that_names_no_engine_is_a_problem_of_the_paths_that_read_it(diagnosis):
    report = diagnosis(**{DEFAULT: "fastest"})
    assert report["default_engine"] == {"value": "fastest", "source": "environment", "valid": False}
    [problem] = report["problems"]
    assert problem == (
        "POLARS_ASYNC_ENGINE='fastest' is not valid: unset it or set it to one of "
        "'auto', 'in-memory', 'streaming', 'gpu', 'adaptive'"
    )
    assert "error" in report["paths"]["async"]
    assert report["paths"]["sync"]["engine"] == "auto"


def test_default_that_is_chosen_later_is_told(diagnosis, doctor):
    report = diagnosis(**{DEFAULT: "adaptive"})
    assert report["problems"] == []
    assert report["paths"]["async"]["engine"] == "adaptive"
    assert "default       POLARS_ASYNC_ENGINE='adaptive'" in doctor()[1]


def test_missing_gpu_that_the_default_asks_for_is_one_problem(diagnosis):
    [problem] = diagnosis(**{DEFAULT: "gpu"})["problems"]
    assert problem.startswith("POLARS_ASYNC_ENGINE=gpu asks for a GPU, but ")


@pytest.mark.parametrize("name", ["adaptive", "polars-async"])
def test_affinity_of_polars_is_none_of_this_library(diagnosis, name):
    assert not diagnosis(**{AFFINITY: name})["affinity"]["valid"]


def test_every_problem_is_told_once(diagnosis):
    first, second = diagnosis(**{AFFINITY: "foo", POLICY: "maybe"})["problems"]
    assert AFFINITY in first
    assert POLICY in second
    policy, gpu = diagnosis(**{AFFINITY: "gpu", POLICY: "maybe"})["problems"]
    assert policy == second
    assert gpu.startswith("POLARS_ENGINE_AFFINITY=gpu asks for a GPU, but ")


# What is told


@pytest.mark.parametrize("affinity", ["auto", "streaming", "gpu", "foo"])
@pytest.mark.parametrize("policy", ["downgrade", "offload"])
def test_each_path_tells_its_resolution(diagnosis, usable, affinity, policy):
    report = diagnosis(host=usable, **{AFFINITY: affinity, POLICY: policy})
    for path in PATHS:
        decided = resolve_engine(path=path)
        assert report["paths"][path] == {
            "engine": decided.name,
            "downgraded": decided.downgraded,
            "reason": decided.reason,
            "message": decided.message,
        }


def test_downgrade_by_policy_is_told_and_no_fault(doctor, diagnosis, usable):
    paths = diagnosis(host=usable, **{AFFINITY: "gpu"})["paths"]
    assert [path for path in PATHS if paths[path]["downgraded"]] == MAY_DOWNGRADE
    status, printed = doctor(host=usable)
    assert status == 0
    assert "  async         in-memory, downgraded\n" in printed
    assert printed.endswith(
        "\n\nNo problems found.\n"
        "But the GPU is not used on these paths: async, background, batches (see above).\n"
    )


def test_offloaded_gpu_is_told_on_every_path(doctor, usable):
    status, printed = doctor(host=usable, **{AFFINITY: "gpu", POLICY: "offload"})
    assert status == 0
    for path in PATHS:
        assert re.search(rf"^  {path} +gpu$", printed, re.MULTILINE)
    assert printed.endswith("\n\nNo problems found.\n")


def test_query_that_would_fail_is_told_on_every_path(doctor, diagnosis):
    asked = {AFFINITY: "gpu", POLICY: "require"}
    paths = diagnosis(**asked)["paths"]
    for path in PATHS:
        assert list(paths[path]) == ["error"]
        assert re.match("EngineUnavailableError: .*wake it up", paths[path]["error"])
    _, printed = doctor(**asked)
    assert printed.count("nothing: the query fails\n") == len(PATHS)
    assert unwrapped(printed).count(paths["sync"]["error"]) == len(PATHS)


@pytest.mark.usefixtures("usable")
def test_everything_that_was_found_is_in_the_text(doctor):
    status, printed = doctor(host=host_of(K620, H100, GB10), CUDA_VISIBLE_DEVICES="1,2")
    assert status == 0
    text = unwrapped(printed)
    assert f"Polars {pl.__version__} cudf-polars cudf-polars-cu13 26.10.2, compatible" in text
    assert "engine auto (POLARS_ENGINE_AFFINITY is not set)" in text
    assert "GPU policy downgrade (POLARS_ASYNC_GPU is not set)" in text
    found = gpu_status()
    for message in [found.message, *(each.message for each in found.devices)]:
        assert message in text
    for path in PATHS:
        assert resolve_engine(path=path).message in text
    assert f"usable yes {found.message} gpu_support can be asked which queries" in text
    assert "breaker closed: after 3 failures in a row, a process leaves the GPU alone" in text
    assert "driver 580.65.06 CUDA 13.0 environment" in text
    assert "environment CUDA_VISIBLE_DEVICES='1,2' GPU 0" in text
    assert f"GPU 0 Quadro K620: not usable, not selected {UUIDS[0]} compute capability 5.0" in text
    h100 = f"GPU 1 NVIDIA H100 80GB HBM3: usable, selected {UUIDS[1]} compute capability 9.0"
    assert h100 in text
    assert "memory 80.0 GiB total, 79.5 GiB free" in text
    assert f"GPU 2 NVIDIA GB10: usable, not selected {UUIDS[2]} compute capability 12.1" in text
    assert text.count("memory unknown") == 2


def test_unknown_facts_of_a_gpu_are_told_as_unknown(doctor):
    _, printed = doctor(host=Host(devices=(HostDevice(index=0),)))
    assert "gpu_support answers unknown, for cudf-polars cannot be asked: " in unwrapped(printed)
    unknown = "driver unknown CUDA unknown GPU 0 name unknown: usable, selected uuid"
    assert f"30 s at first {unknown}" in unwrapped(printed)
    assert "compute capability unknown memory unknown" in unwrapped(printed)


def test_settings_and_problems_are_in_the_text(doctor):
    status, printed = doctor(**{AFFINITY: "foo", POLICY: "maybe"})
    assert status == 2
    assert "  engine        POLARS_ENGINE_AFFINITY='foo', which is not valid\n" in printed
    assert "  GPU policy    POLARS_ASYNC_GPU='maybe', which is not valid\n" in printed
    assert printed.endswith(
        """
2 problems:
  1. POLARS_ENGINE_AFFINITY='foo' is not valid: unset it or set it to one of
     'auto', 'in-memory', 'streaming', 'gpu'
  2. POLARS_ASYNC_GPU='maybe' is not valid: unset it or set it to one of
     'downgrade', 'offload', 'require'
"""
    )
    _, printed = doctor(**{AFFINITY: "gpu", POLICY: "require"})
    assert "  engine        POLARS_ENGINE_AFFINITY='gpu'\n" in printed
    assert "\n\n1 problem:\n  1. POLARS_ENGINE_AFFINITY=gpu asks for a GPU, but" in printed
    _, printed = doctor(**{AFFINITY: "gpu", POLICY: "downgrade"})
    assert unwrapped(printed).endswith("but the driver sleeps: wake it up")


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize(("columns", "width"), [(10, 60), (70, 70), (80, 80), (200, 100)])
@pytest.mark.parametrize("affinity", ["gpu", "foo"])
def test_text_fits_the_terminal_and_breaks_nothing_that_is_copied(doctor, columns, width, affinity):
    asked = {AFFINITY: affinity, "CUDA_VISIBLE_DEVICES": "0"}
    _, printed = doctor(host=host_of(H100, GB10), COLUMNS=str(columns), **asked)
    lines = printed.splitlines()
    assert f"CUDA_VISIBLE_DEVICES={UUIDS[2]}" in printed.split()
    unwrapped_lines = ("  (What a program", "But the GPU is not used")
    for line in lines:
        one_word = len(line.split()) == 1
        assert len(line) <= width or one_word or line.startswith(unwrapped_lines), line
    assert max(map(len, lines)) <= max(80, width)


@pytest.mark.parametrize(
    ("polars", "reason", "words"),
    [
        ("", None, "cudf-polars-cu13 26.10.2, compatible"),
        ("<1", "cudf_incompatible", "cudf-polars-cu13 26.10.2 needs Polars <1 and Polars "),
    ],
)
def test_cudf_polars_is_told_where_no_gpu_is(diagnosis, site, polars, reason, words):
    install_cudf(site, polars=polars)
    report = diagnosis()
    assert report["gpu"]["reason"] == "no_driver"
    found = report["cudf_polars"]
    assert found["installed"] is True
    assert found["reason"] == reason
    assert found["message"].startswith(words)
    assert found["gpu_support"] is (reason is None)
    versions = report["versions"]["cudf_polars"], report["gpu"]["cudf_polars_version"]
    assert versions == ("26.10.2", "26.10.2")


def test_cudf_polars_that_is_not_installed_is_told(diagnosis):
    report = diagnosis()
    assert report["versions"]["cudf_polars"] is None
    expected = {"installed": False, "reason": None, "message": "not installed"}
    assert report["cudf_polars"] == {**expected, "gpu_support": False}


def test_cudf_polars_is_not_imported(diagnosis, site):
    install_cudf(site, module="raise SystemExit('imported')")
    assert diagnosis(host=host_of(H100))["gpu"]["usable"]
    assert "cudf_polars" not in sys.modules


def test_engine_object_set_by_the_program_itself_is_told_on_the_paths(diagnosis):
    with pl.Config():
        pl.Config.set_engine_affinity(pl.GPUEngine(raise_on_fail=True))
        report = diagnosis()
    assert report["affinity"]["source"] == "default"
    assert len(report["problems"]) == len(PATHS)
    assert "raise_on_fail=True" in report["problems"][0]


def test_gpu_that_rests_is_told(diagnosis, doctor, monkeypatch):
    monkeypatch.setattr(breaker, "_clock", lambda: 100.0)
    with simulate_gpu(fail="oom"), Collector(gpu="offload") as collector:
        for _ in range(3):
            collector.collect_async(pl.LazyFrame({"a": [1]}), engine="gpu").result(30)
        report = diagnosis(host=host_of(H100), **{POLICY: "offload", AFFINITY: "gpu"})
        _, printed = doctor(host=host_of(H100))
    assert report["paths"]["async"]["reason"] == "gpu_cooldown"
    found = report["gpu"]["breaker"]
    assert found["failures"] == 3
    assert found["cooldown_seconds"] == 30
    assert "breaker open: the cooldown lasts 30 s more. Last time, the memory of" in (
        unwrapped(printed)
    )


# Extras and limits


def found_packages(monkeypatch, **versions):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_missing_packages_of_worker_processes_are_told(doctor, diagnosis, monkeypatch):
    found_packages(monkeypatch, cloudpickle="3.1.2")
    extras = diagnosis()["extras"]
    assert extras["cloudpickle"] == {"version": "3.1.2", "message": "3.1.2"}
    assert extras["pyarrow"]["version"] is None
    status, printed = doctor()
    assert status == 0
    text = unwrapped(printed)
    assert "Worker processes cloudpickle 3.1.2 pyarrow not installed: results of worker" in text
    assert "mapped. Install polars-async[processes] Limits" in text
    found_packages(monkeypatch)
    functions = "cloudpickle not installed: functions of a script or a notebook, and those without"
    assert functions in unwrapped(doctor()[1])


@pytest.fixture
def limits(monkeypatch):
    def limits(**values):
        for name, value in values.items():
            monkeypatch.setattr(machine, name, lambda value=value: value)

    limits(
        open_files_limit=1024,
        processors=1.5,
        total_memory=8 * GIBIBYTE,
        memory_limit=None,
        proc_is_readable=True,
    )
    return limits


def test_limits_are_told(doctor, diagnosis, limits):
    assert diagnosis()["limits"] == {
        "open_files": 1024,
        "processors": 1.5,
        "memory_total": 8 * GIBIBYTE,
        "memory_limit": None,
        "proc": True,
    }
    told = "Limits open files 1024 at most processors 1.5 memory 8.0 GiB /proc can be read No prob"
    assert told in unwrapped(doctor()[1])
    limits(open_files_limit=None, memory_limit=GIBIBYTE, total_memory=None, proc_is_readable=None)
    status, printed = doctor()
    assert status == 0
    text = unwrapped(printed)
    assert "open files any number" in text
    assert "memory unknown, of which the cgroup allows 1.0 GiB: beyond, the kernel ends" in text
    assert "/proc not on this system" in text


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        ({"open_files_limit": 255}, "this process may have 255 files open, which"),
        (
            {"proc_is_readable": False},
            "/proc cannot be read, so that inline= has no effect, max_memory= minds only",
        ),
    ],
)
def test_limit_that_is_too_low_is_a_problem(diagnosis, limits, limit, problem):
    assert diagnosis()["problems"] == []
    limits(**limit)
    [told] = diagnosis()["problems"]
    assert told.startswith(problem)


def test_limits_are_those_of_this_process(diagnosis):
    found = diagnosis()["limits"]
    assert found["open_files"] == machine.open_files_limit()
    assert found["proc"] is (True if sys.platform == "linux" else None)
    if sys.platform == "linux":
        kibibytes = re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
        assert found["memory_total"] == int(kibibytes[1]) * 1024


@pytest.mark.parametrize(
    ("texts", "limit"),
    [
        ({"memory.max": "max"}, None),
        ({"memory.max": "4096"}, 4096),
        ({"memory.limit_in_bytes": "9223372036854771712"}, None),
        ({"memory.limit_in_bytes": "8192"}, 8192),
    ],
)
def test_memory_limit_is_the_least_of_the_cgroups(tmp_path, monkeypatch, texts, limit):
    inner = tmp_path / "inner"
    inner.mkdir()
    for name, text in texts.items():
        (inner / name).write_text(text)
    monkeypatch.setattr(machine, "_cgroups", lambda _: [inner, tmp_path])
    assert machine.memory_limit() == limit
    (tmp_path / "memory.max").write_text("2048")
    assert machine.memory_limit() == 2048


FEW_FILES = """
import resource
import sys
from polars_async.cli import main

_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (200, most))
sys.exit(main(["doctor", "--json"]))
"""


def test_open_files_are_those_of_the_soft_limit():
    command = [sys.executable, "-c", FEW_FILES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert json.loads(done.stdout)["limits"]["open_files"] == 200, done.stderr
    assert done.returncode == 2


# JSON

KEYS = {
    "": "versions cudf_polars affinity default_engine gpu_policy paths gpu extras "
    "limits problems exit_status",
    "versions": "python polars_async polars cudf_polars",
    "cudf_polars": "installed reason message gpu_support",
    "affinity": "value source valid",
    "default_engine": "value source valid",
    "gpu_policy": "value source valid",
    "paths": "sync async background batches",
    "path": "engine downgraded reason message",
    "extras": "cloudpickle pyarrow",
    "limits": "open_files processors memory_total memory_limit proc",
    "gpu": "usable reason message devices driver_version cuda_version cudf_polars_version "
    "environment breaker",
    "device": "index uuid name compute_capability memory_total memory_free number selected usable "
    "reason message breaker",
}


@pytest.mark.parametrize("affinity", ["auto", "gpu", "foo"])
@pytest.mark.parametrize("host", [NO_DRIVER, host_of(), host_of(H100, K620)])
def test_json_has_the_documented_keys(diagnosis, affinity, host):
    report = diagnosis(host=host, **{AFFINITY: affinity})
    keys = {name: each.split() for name, each in KEYS.items()}
    assert list(report) == keys.pop("")
    path, device = keys.pop("path"), keys.pop("device")
    assert {name: list(report[name]) for name in keys} == keys
    assert all(list(each) == path for each in report["paths"].values())
    assert all(list(each) == ["version", "message"] for each in report["extras"].values())
    assert all(list(each) == device for each in report["gpu"]["devices"])
    assert len(report["gpu"]["devices"]) == len(host.devices)


def test_help_documents_every_key_and_no_line_is_too_long(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    documented = set(re.findall(r"\w+", text[text.index("--json writes") :]))
    assert {key for keys in KEYS.values() for key in keys.split()} <= documented
    assert "error alone" in text
    assert max(map(len, text.splitlines())) <= 80


def test_json_gives_numbers_where_the_text_gives_words(diagnosis, usable):
    gpu = diagnosis(host=usable)["gpu"]
    [device] = gpu["devices"]
    assert gpu["cuda_version"] == [13, 0]
    assert device["compute_capability"] == [9, 0]
    assert device["memory_total"] == 80 * GIBIBYTE
    assert device["selected"] is device["usable"] is True
    assert device["reason"] is None


def test_json_of_a_bare_host(diagnosis):
    report = diagnosis()
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["versions"]["polars"] == pl.__version__
    assert report["affinity"] == {"value": "auto", "source": "default", "valid": True}
    assert report["default_engine"]["value"] == resolve_engine().name
    assert report["gpu_policy"] == {"value": "downgrade", "source": "default", "valid": True}
    assert report["gpu"]["environment"] == {"CUDA_VISIBLE_DEVICES": None, "CUDA_DEVICE_ORDER": None}


# What fails in doctor itself


def broken(*_, **__):
    raise RuntimeError("it\nbroke")


def test_unexpected_error_of_the_gpu_is_a_line(doctor, diagnosis, monkeypatch):
    monkeypatch.setattr(doctor_module, "gpu_status", broken)
    report = diagnosis()
    assert report["gpu"]["message"] == "asking about it failed (RuntimeError: it broke)"
    assert list(report["gpu"]) == KEYS["gpu"].split()
    assert report["problems"] == []
    _, printed = doctor()
    assert "usable no asking about it failed (RuntimeError: it broke)" in unwrapped(printed)
    assert diagnosis(**{AFFINITY: "gpu"})["problems"] != []


def test_unexpected_error_of_cudf_polars_is_a_line(doctor, diagnosis, monkeypatch):
    monkeypatch.setattr(doctor_module, "find_cudf_polars", broken)
    report = diagnosis()
    assert report["cudf_polars"]["installed"] is None
    assert report["cudf_polars"]["gpu_support"] is None
    assert report["problems"] == []
    _, printed = doctor()
    assert "cudf-polars looking for it failed (RuntimeError: it broke)" in unwrapped(printed)
    assert "gpu_support unknown breaker closed" in unwrapped(printed)


def test_unexpected_error_of_a_path_is_a_line_and_one_problem(doctor, diagnosis, monkeypatch):
    monkeypatch.setattr(resolution, "resolve_engine", broken)
    report = diagnosis()
    assert report["problems"] == ["RuntimeError: it broke"]
    status, printed = doctor()
    assert status == 2
    assert printed.endswith("\n\n1 problem:\n  1. RuntimeError: it broke\n")


def test_warnings_of_what_is_asked_are_not_shown(doctor, monkeypatch):
    def warn():
        warnings.warn("the pynvml package is deprecated", FutureWarning, stacklevel=1)
        return gpu_status()

    monkeypatch.setattr(doctor_module, "gpu_status", warn)
    assert doctor()[0] == 0  # the suite makes errors of warnings
    assert "deprecated" not in doctor()[1]


# The command line


def test_without_a_command_the_help_goes_to_stderr(capsys):
    assert cli.main([]) == 2
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("usage: polars-async [-h]")
    assert "report which engine would run here, and why" in errors


@pytest.mark.parametrize("arguments", [["nurse"], ["doctor", "--yaml"]])
def test_wrong_arguments_are_told_as_argparse_does(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "polars-async" in capsys.readouterr().err


@pytest.mark.parametrize(("found", "told"), [("1.2.3", "1.2.3"), (None, "of unknown version")])
def test_version(monkeypatch, capsys, found, told):
    def version(name):
        assert name == "polars-async"
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"polars-async {told}\n"


# In a process of its own


@pytest.fixture(scope="session")
def stub_library(tmp_path_factory):
    return compile_stub(tmp_path_factory.mktemp("nvml_stub"))


@pytest.fixture
def process(tmp_path, stub_library):
    """Run ``python -m polars_async`` over the stub of the driver's library."""
    install_cudf(tmp_path)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))

    def run(*arguments, host, before=(), stdout=subprocess.PIPE, **environment):
        return subprocess.run(
            [*before, sys.executable, "-W", "error", "-m", "polars_async", *arguments],
            env={
                **os.environ,
                "PYTHONPATH": path,
                "LD_LIBRARY_PATH": str(stub_library.parent),
                "NVML_STUB": host,
                **environment,
            },
            stdout=stdout,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            check=False,
            timeout=150,
        )

    return run


GPU_HERE = describe(Gpu(uuid=UUIDS[1]))
NO_GPU_HERE = describe(init=DRIVER_NOT_LOADED)


@pytest.mark.parametrize(
    ("host", "environment", "status", "last"),
    [
        (NO_GPU_HERE, {}, 0, "No problems found."),
        (GPU_HERE, {}, 0, "No problems found."),
        (NO_GPU_HERE, {AFFINITY: "gpu"}, 2, "1 problem:"),
        (NO_GPU_HERE, {POLICY: "require"}, 2, "1 problem:"),
        (GPU_HERE, {AFFINITY: "gpu"}, 0, "But the GPU is not used on these paths: "),
        (GPU_HERE, {AFFINITY: "gpu", POLICY: "require"}, 0, "No problems found."),
        (GPU_HERE, {AFFINITY: "gpu", POLICY: "maybe"}, 2, "1 problem:"),
    ],
)
def test_process_exits_with_its_status_and_prints_nothing_else(
    process, host, environment, status, last
):
    done = process("doctor", host=host, **environment)
    assert (done.returncode, done.stderr) == (status, "")
    assert f"\n{last}" in done.stdout


def test_process_asks_the_real_driver(process):
    done = process("doctor", "--json", host=describe(Gpu(uuid=UUIDS[1]), Gpu(memory="1024/512")))
    gpu = json.loads(done.stdout)["gpu"]
    assert gpu["usable"]
    assert [each["uuid"] for each in gpu["devices"]] == [UUIDS[1], Gpu().uuid]
    assert [each["memory_free"] for each in gpu["devices"]] == [85000000000, 512]


def test_process_with_a_wrong_affinity_adds_nothing_to_what_polars_says(process):
    done = process("doctor", host=NO_GPU_HERE, **{AFFINITY: "foo"})
    assert done.returncode == 2
    assert AFFINITY in done.stderr  # Polars' own, when it is imported
    assert "polars_async" not in done.stderr
    assert "\n1 problem:\n  1. POLARS_ENGINE_AFFINITY='foo' is not valid" in done.stdout


def test_process_keeps_quiet_about_the_deprecated_pynvml(process, tmp_path):
    source = "import warnings; warnings.warn('pynvml is deprecated', FutureWarning)\n"
    (tmp_path / "pynvml.py").write_text(f"{source}raise ImportError('not this one')\n")
    done = process("doctor", host=GPU_HERE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "install nvidia-ml-py" in unwrapped(done.stdout)


@pytest.mark.one_series
@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["--version"]])
def test_process_answers_without_asking_the_driver(process, arguments):
    done = process(*arguments, host="")
    assert (done.returncode, done.stderr) == (0, "")
    assert "polars-async" in done.stdout


WITHOUT_UTF_8 = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.mark.one_series
@pytest.mark.parametrize("terminal", WITHOUT_UTF_8)
def test_process_escapes_what_the_terminal_cannot_show(process, terminal):
    environment = {POLICY: "\u2192", **WITHOUT_UTF_8[terminal]}
    done = process("doctor", host=NO_GPU_HERE, **environment)
    assert (done.returncode, done.stderr) == (2, "")
    escaped = r"\udce2\udc86\udc92" if terminal == "C" else r"\u2192"  # the bytes, or the letter
    assert f"{POLICY}='{escaped}' is not valid" in unwrapped(done.stdout)
    done = process("doctor", "--json", host=NO_GPU_HERE, **environment)
    assert f'"{escaped}"' in done.stdout
    assert (done.returncode, done.stderr) == (2, "")
    assert json.loads(done.stdout)["exit_status"] == 2


WAYS_TO_PRINT = [["doctor"], ["doctor", "--json"], ["doctor", "--help"], ["--version"]]


@pytest.mark.one_series
@pytest.mark.parametrize("arguments", WAYS_TO_PRINT)
def test_process_whose_output_nobody_reads_ends_in_silence(process, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    # Empty as if unset, so that what is written is still in the buffer at the end.
    done = process(*arguments, host=GPU_HERE, stdout=writer, PYTHONUNBUFFERED="")
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.one_series
@pytest.mark.parametrize("arguments", WAYS_TO_PRINT[:2])
def test_process_without_stdout_ends_with_its_status(process, arguments):
    done = process(*arguments, host=GPU_HERE, before=["sh", "-c", 'exec "$@" >&-', "sh"])
    assert (done.returncode, done.stderr) == (0, "")
