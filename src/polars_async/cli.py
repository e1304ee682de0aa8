"""The console script of polars-async."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import textwrap
import warnings
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, get_args

import polars as pl

from polars_async import resolution
from polars_async.gpu import gpu_status
from polars_async.gpu.breaker import COOLDOWN, FAILURES, breaker, breaker_of
from polars_async.gpu.cudf import find_cudf_polars
from polars_async.gpu.status import GpuStatus
from polars_async.gpu.visible import DEVICE_ORDER, VISIBLE_DEVICES
from polars_async.resolution import AFFINITY_VARIABLE, GPU_POLICY_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from polars_async.gpu.breaker import Breaker

    Report: TypeAlias = dict[str, Any]

_T = TypeVar("_T")

_NAME: Final = "polars-async"
_INDENT: Final = 16
_POLICIES: Final = get_args(resolution.GpuPolicy)
_SUPPORT: Final = {
    True: "can be asked which queries the GPU engine could run, with or without a GPU",
    False: "answers unknown, for cudf-polars cannot be asked: see its line above",
    None: "unknown",
}
# Without line breaks in words: a UUID, for one, is there to be copied.
_fill: Final = partial(textwrap.fill, break_long_words=False, break_on_hyphens=False)
_DOCTOR: Final = """\
Report which engine would run a query on each path, and why, and whether the GPU
engine could run here. The driver is asked; cudf-polars and CUDA are not loaded.
Settings that a program makes itself, with engine=, a Collector or
pl.Config.set_engine_affinity, are not seen from here.
"""
_DETAILS: Final = f"""\
exit status:
  0  The environment asks for an engine that can run, or for none: a missing GPU
     is then no problem. Nor is {GPU_POLICY_VARIABLE}=downgrade, which keeps the GPU
     off the async, background and batches paths; the report says so.
  2  {AFFINITY_VARIABLE} or {GPU_POLICY_VARIABLE} is not valid;
     or no GPU is usable, and {AFFINITY_VARIABLE}=gpu asks for one, under
     any policy, or {GPU_POLICY_VARIABLE}=require does, with which every query
     that asks for one fails. Wrong arguments are 2, too.

--json writes one object; what is unknown or absent is null:
  versions     python, polars_async, polars, cudf_polars
  cudf_polars  installed, reason (null where nothing rules it out),
               message, gpu_support (whether gpu_support can ask it)
  affinity, gpu_policy: each value, source (environment or default), valid
  paths        sync, async, background, batches: each engine, downgraded,
               reason, message; where the query would fail, error alone
  gpu          usable, reason, message, driver_version, cuda_version ([13, 0]),
               cudf_polars_version, environment (CUDA's variables), devices:
               each index, uuid, name, compute_capability ([9, 0]), memory_total
               and memory_free (bytes), number (as in GPUEngine(device=0)),
               selected, usable, reason, message, breaker (in worker processes);
               breaker: failures (in a row), cooldown_seconds (left),
               message. All are those of this process, as each has its
               own; see stats()
  problems     sentences, each with its remedy
  exit_status  0 or 2
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console script; return its exit status. None for the command line's arguments."""
    parser = argparse.ArgumentParser(prog=_NAME, description="Look at what would run here.")
    version = f"{_NAME} {_version() or 'of unknown version'}"
    parser.add_argument("--version", action="version", version=version)
    doctor = parser.add_subparsers(title="commands", dest="command").add_parser(
        "doctor",
        help="report which engine would run here, and why",
        description=_DOCTOR,
        epilog=_DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--json", action="store_true", help="write one JSON object")
    try:
        given = parser.parse_args(arguments)
    except SystemExit:
        _write("")  # flushes what argparse has written
        raise
    if given.command is None:  # with argparse's status for a missing argument
        parser.print_help(sys.stderr)
        return 2
    report = _diagnose()
    width = max(60, min(shutil.get_terminal_size().columns, 100))
    text = json.dumps(report, indent=2) if given.json else "\n".join(_render(report, width))
    _write(f"{text}\n")
    return int(report["exit_status"])


def _write(text: str) -> None:
    """Write to stdout, in its encoding, or nowhere if it is closed at either end."""
    if sys.stdout is None:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # Else the interpreter would flush again at its exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _diagnose() -> Report:
    """Return the report of doctor; where a check itself fails, the report says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as that of the deprecated distribution pynvml
        gpu = _gpu()
        report: Report = {
            "versions": {
                "python": platform.python_version(),
                "polars_async": _version(),
                "polars": pl.__version__,
                "cudf_polars": gpu["cudf_polars_version"],
            },
            "cudf_polars": _cudf(),
            "affinity": _setting(AFFINITY_VARIABLE, "auto", resolution.engine_object),
            "gpu_policy": _setting(GPU_POLICY_VARIABLE, "downgrade", _POLICIES.index),
            "paths": {path: _path(path) for path in get_args(resolution.QueryPath)},
            "gpu": gpu,
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
            (AFFINITY_VARIABLE, affinity, resolution.ENGINE_NAMES),
            (GPU_POLICY_VARIABLE, policy, _POLICIES),
        )
        if not setting["valid"]
    ]
    if not gpu["usable"]:
        if affinity["value"] == "gpu":
            problems.append(f"{AFFINITY_VARIABLE}=gpu asks for a GPU, but {gpu['message']}")
        elif policy["value"] == "require":
            problems.append(f"{GPU_POLICY_VARIABLE}=require asks for a GPU, but {gpu['message']}")
    # A path that fails does so for one of these; if there is none, its error is a problem itself.
    errors = [each["error"] for each in report["paths"].values() if "error" in each]
    return problems or list(dict.fromkeys(errors))


def _try(ask: Callable[[], _T]) -> _T | str:
    try:
        return ask()
    except Exception as error:  # noqa: BLE001  # doctor is there to report it
        return f"{type(error).__name__}: {error}"


def _version() -> str | None:
    try:
        return importlib.metadata.version(_NAME)
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


def _render(report: Report, width: int) -> Iterator[str]:
    entry = partial(_entry, width)
    versions, gpu = report["versions"], report["gpu"]
    yield "Versions"
    yield entry("Python", versions["python"])
    yield entry(_NAME, versions["polars_async"] or "unknown (not installed)")
    yield entry("Polars", versions["polars"])
    yield entry("cudf-polars", report["cudf_polars"]["message"])
    yield "\nAsked for"
    yield entry("engine", _describe_setting(report["affinity"], AFFINITY_VARIABLE))
    yield entry("GPU policy", _describe_setting(report["gpu_policy"], GPU_POLICY_VARIABLE))
    yield "  (What a program sets itself, as with pl.Config, is not seen from here.)"
    yield "\nWhat would run"
    for path, each in report["paths"].items():
        engine = each.get("engine", "nothing: the query fails")
        downgraded = ", downgraded" if each.get("downgraded") else ""
        yield entry(path, f"{engine}{downgraded}", each.get("message") or each["error"])
    yield "\nGPU"
    yield entry("usable", "yes" if gpu["usable"] else "no", gpu["message"])
    yield entry("gpu_support", _SUPPORT[report["cudf_polars"]["gpu_support"]])
    yield entry("breaker", gpu["breaker"]["message"])
    yield entry("driver", gpu["driver_version"] or "unknown")
    yield entry("CUDA", _dotted(gpu["cuda_version"]))
    for variable, value in gpu["environment"].items():
        if value is not None:
            yield entry("environment", f"{variable}={value!r}")
    for device in gpu["devices"]:
        yield entry(f"GPU {device['index']}", *_describe_device(device))
    yield from _render_conclusion(report, width)


def _render_conclusion(report: Report, width: int) -> Iterator[str]:
    problems = report["problems"]
    plural = "" if len(problems) == 1 else "s"
    yield f"\n{len(problems)} problem{plural}:" if problems else "\nNothing to mend."
    for number, problem in enumerate(problems, 1):
        yield _fill(problem, width, initial_indent=f"  {number}. ", subsequent_indent=" " * 5)
    downgraded = [path for path, each in report["paths"].items() if each.get("downgraded")]
    if downgraded and not problems:
        yield f"But the GPU is not used on these paths: {', '.join(downgraded)} (see above)."


def _entry(width: int, label: str, *paragraphs: str) -> str:
    """Return a label with paragraphs beside it."""
    body = "\n".join(_fill(each, width - _INDENT) for each in paragraphs)
    return f"  {label}".ljust(_INDENT) + textwrap.indent(body, " " * _INDENT)[_INDENT:]


def _describe_setting(setting: Report, variable: str) -> str:
    if setting["source"] == "default":
        return f"{setting['value']} ({variable} is not set)"
    return f"{variable}={setting['value']!r}{'' if setting['valid'] else ', which is not valid'}"


def _describe_device(device: Report) -> Iterator[str]:
    is_usable, is_selected = ("" if device[key] else "not " for key in ("usable", "selected"))
    yield f"{device['name'] or 'name unknown'}: {is_usable}usable, {is_selected}selected"
    yield device["uuid"] or "uuid unknown"
    yield f"compute capability {_dotted(device['compute_capability'])}"
    sizes = ((kind, device[f"memory_{kind}"]) for kind in ("total", "free"))
    known = [f"{size / 2**30:.1f} GiB {kind}" for kind, size in sizes if size is not None]
    yield f"memory {', '.join(known) or 'unknown'}"
    yield device["message"]
    if device["number"] is not None:
        yield f"GPUEngine(device={device['number']}) asks for it"
    if device["breaker"]["failures"]:
        yield f"breaker in worker processes {device['breaker']['message']}"


def _dotted(version: tuple[int, int] | None) -> str:
    return "unknown" if version is None else f"{version[0]}.{version[1]}"
