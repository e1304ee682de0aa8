"""What ``polars-async doctor`` finds out, as data."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, get_args

import polars as pl

from polars_async import resolution
from polars_async._runtime import machine
from polars_async.errors import describe
from polars_async.gpu import gpu_status
from polars_async.gpu.breaker import COOLDOWN, FAILURES, breaker, breaker_of
from polars_async.gpu.cudf import find_cudf_polars
from polars_async.gpu.status import GpuStatus
from polars_async.gpu.visible import DEVICE_ORDER, VISIBLE_DEVICES
from polars_async.resolution import AFFINITY_VARIABLE, ENGINE_VARIABLE, GPU_POLICY_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars_async.gpu.breaker import Breaker

_T = TypeVar("_T")

Report: TypeAlias = dict[str, Any]
"""The report, as ``--json`` writes it."""

DISTRIBUTION: Final = "polars-async"
EXTRAS: Final = {
    "cloudpickle": "functions of a script or a notebook, and those without a name, cannot be sent "
    "to worker processes",
    "pyarrow": "results of worker processes are copied with Polars 2, and not mapped",
}
"""What worker processes and clusters do without each package of the extra ``processes``."""
FEWEST_FILES: Final = 256
"""Files that may be open, below which worker processes and a service may soon want for them."""
GPU_POLICIES: Final = get_args(resolution.GpuPolicy)


def diagnose() -> Report:
    """Return the report of doctor; where a check itself fails, the report says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as that of the deprecated distribution pynvml
        gpu = _gpu()
        report: Report = {
            "versions": {
                "python": platform.python_version(),
                "polars_async": installed_version(),
                "polars": pl.__version__,
                "cudf_polars": gpu["cudf_polars_version"],
            },
            "cudf_polars": _cudf(),
            "affinity": _setting(AFFINITY_VARIABLE, "auto", resolution.check_affinity),
            "default_engine": _setting(
                ENGINE_VARIABLE, resolution.engine_of_process(None), resolution.ENGINE_NAMES.index
            ),
            "gpu_policy": _setting(GPU_POLICY_VARIABLE, "downgrade", GPU_POLICIES.index),
            "paths": {path: _path(path) for path in get_args(resolution.QueryPath)},
            "gpu": gpu,
            "extras": {name: _extra(name) for name in EXTRAS},
            "limits": _limits(),
        }
    problems = _problems(report)
    return {**report, "problems": problems, "exit_status": 2 if problems else 0}


def _problems(report: Report) -> list[str]:
    """Return a sentence with a remedy for each thing that the environment asks for in vain."""
    affinity, policy, gpu = report["affinity"], report["gpu_policy"], report["gpu"]
    problems = [
        f"{variable}={setting['value']!r} is not valid: unset it or set it to one of "
        + ", ".join(map(repr, values))
        for variable, setting, values in (
            (AFFINITY_VARIABLE, affinity, resolution.AFFINITY_NAMES),
            (ENGINE_VARIABLE, report["default_engine"], resolution.ENGINE_NAMES),
            (GPU_POLICY_VARIABLE, policy, GPU_POLICIES),
        )
        if not setting["valid"]
    ]
    if not gpu["usable"]:
        if affinity["value"] == "gpu":
            problems.append(f"{AFFINITY_VARIABLE}=gpu asks for a GPU, but {gpu['message']}")
        elif report["default_engine"]["value"] == "gpu" and affinity["value"] == "auto":
            problems.append(f"{ENGINE_VARIABLE}=gpu asks for a GPU, but {gpu['message']}")
        elif policy["value"] == "require":
            problems.append(f"{GPU_POLICY_VARIABLE}=require asks for a GPU, but {gpu['message']}")
    # A path that fails does so for one of these; if there is none, its error is a problem itself.
    errors = [each["error"] for each in report["paths"].values() if "error" in each]
    problems = problems or list(dict.fromkeys(errors))
    limits = report["limits"]
    if limits["open_files"] is not None and limits["open_files"] < FEWEST_FILES:
        problems.append(
            f"this process may have {limits['open_files']} files open, which worker processes and "
            "the connections of a service soon use up: allow for more, as by ulimit -n 4096"
        )
    if limits["proc"] is False:
        problems.append(
            "/proc cannot be read, so that inline= has no effect, max_memory= minds only what "
            "Polars itself allocates, and the load of the machine is unknown: mount it"
        )
    return problems


def _try(ask: Callable[[], _T]) -> _T | str:
    try:
        return ask()
    except Exception as error:  # noqa: BLE001  # doctor is there to report it
        return describe(error)


def installed_version() -> str | None:
    """Return the installed version of this distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cudf() -> Report:
    cudf_polars = _try(find_cudf_polars)
    if isinstance(cudf_polars, str):
        message = f"looking for it failed ({cudf_polars})"
        return {"installed": None, "reason": None, "message": message, "gpu_support": None}
    reason, message = (
        None,
        f"{cudf_polars}, compatible" if cudf_polars.installed else "not installed",
    )
    if cudf_polars.diagnosis is not None:
        reason, message = cudf_polars.diagnosis.reason, cudf_polars.diagnosis.message
    answers = cudf_polars.installed and cudf_polars.diagnosis is None
    facts = {"installed": cudf_polars.installed, "reason": reason, "message": message}
    return {**facts, "gpu_support": answers}


def _extra(name: str) -> Report:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return {
            "version": None,
            "message": f"not installed: {EXTRAS[name]}. Install {DISTRIBUTION}[processes]",
        }
    return {"version": version, "message": version}


def _limits() -> Report:
    return {
        "open_files": machine.open_files_limit(),
        "processors": machine.processors(),
        "memory_total": machine.total_memory(),
        "memory_limit": machine.memory_limit(),
        "proc": machine.proc_is_readable(),
    }


def _setting(variable: str, default: str, check: Callable[[Any], object]) -> Report:
    value = os.environ.get(variable)
    if value is None:
        return {"value": default, "source": "default", "valid": True}
    valid = not isinstance(_try(partial(check, value)), str)
    return {"value": value, "source": "environment", "valid": valid}


def _path(path: resolution.QueryPath) -> Report:
    decision = _try(partial(resolution.resolve_engine, path=path))
    if isinstance(decision, str):
        return {"error": decision}
    shown = {"engine": decision.name, "downgraded": decision.downgraded}
    return {**shown, "reason": decision.reason, "message": decision.message}


def _gpu() -> Report:
    status = _try(gpu_status)
    if isinstance(status, str):
        status = GpuStatus(usable=False, message=f"asking about it failed ({status})")
    variables = {name: os.environ.get(name) for name in (VISIBLE_DEVICES, DEVICE_ORDER)}
    devices = [{**asdict(each), "breaker": _breaker(breaker_of(each))} for each in status.devices]
    facts = {**asdict(status), "devices": devices, "environment": variables}
    return {**facts, "breaker": _breaker(breaker)}


def _breaker(of: Breaker) -> Report:
    seconds = of.seconds_left()
    message = (
        f"closed: after {FAILURES} failures in a row, a process leaves the GPU alone for a while, "
        f"{COOLDOWN:g} s at first"
    )
    if (cooldown := of.cooldown()) is not None:
        message = f"open: the cooldown lasts {seconds:.0f} s more. Last time, {cooldown.failure}"
    return {"failures": of.health.failures, "cooldown_seconds": seconds, "message": message}
