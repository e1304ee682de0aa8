"""The console script of polars-async: its commands, and the text of their reports."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from polars_async.compare import command as comparing
from polars_async.doctor import DISTRIBUTION, FEWEST_FILES, diagnose, installed_version
from polars_async.resolution import AFFINITY_VARIABLE, ENGINE_VARIABLE, GPU_POLICY_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polars_async.doctor import Report


_INDENT: Final = 16
_SUPPORT: Final = {
    True: "can be asked which queries the GPU engine could run, with or without a GPU",
    False: "answers unknown, for cudf-polars cannot be asked: see its line above",
    None: "unknown",
}
# Without line breaks in words: a UUID, for one, is there to be copied.
_fill: Final = partial(textwrap.fill, break_long_words=False, break_on_hyphens=False)
_DOCTOR: Final = """\
Report which engine would run a query on each path, and why, whether the GPU
engine could run here, and what limits queries. The driver is asked; cudf-polars
and CUDA are not loaded. Settings that a program makes itself, with engine=, a
Collector or pl.Config.set_engine_affinity, are not seen from here.
"""
_DETAILS: Final = f"""\
exit status:
  0  The environment asks for an engine that can run, or for none: a missing GPU
     is then no problem. Nor is {GPU_POLICY_VARIABLE}=downgrade, which keeps the GPU
     off the async, background and batches paths; the report says so.
  2  {AFFINITY_VARIABLE}, {ENGINE_VARIABLE} or
     {GPU_POLICY_VARIABLE} is not valid; or no GPU is usable, and
     {AFFINITY_VARIABLE}=gpu asks for one, under any policy, or
     {GPU_POLICY_VARIABLE}=require does, with which every query that asks for one
     fails; or fewer than {FEWEST_FILES} files may be open, or /proc cannot be read.
     Wrong arguments are 2, too.

--json writes one object; what is unknown or absent is null:
  versions     python, polars_async, polars, cudf_polars
  cudf_polars  installed, reason (null where nothing rules it out),
               message, gpu_support (whether gpu_support can ask it)
  affinity, default_engine, gpu_policy: each value, source (environment or
               default), valid
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
  extras       cloudpickle, pyarrow: each version, message
  limits       open_files (at most), processors, memory_total and memory_limit
               (of the cgroup; bytes), proc (whether /proc can be read)
  problems     sentences, each with its remedy
  exit_status  0 or 2
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console script; return its exit status. None for the command line's arguments."""
    parser = argparse.ArgumentParser(
        prog=DISTRIBUTION, description="Look at what would run here, and how fast."
    )
    version = f"{DISTRIBUTION} {installed_version() or 'of unknown version'}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", dest="command")
    doctor = _add_command(
        commands, "doctor", "report which engine would run here, and why", _DOCTOR, _DETAILS
    )
    doctor.add_argument("--json", action="store_true", help="write one JSON object")
    compare = _add_command(
        commands,
        "compare",
        "measure queries of a file on each engine",
        comparing.DESCRIPTION,
        comparing.DETAILS,
    )
    comparing.add_arguments(compare)
    try:
        given = parser.parse_args(arguments)
        if given.command == "compare":
            text, status = comparing.run(given, compare, _width())
            _write(text)
            return status
    except SystemExit:
        _write("")  # flushes what argparse has written
        raise
    if given.command is None:  # with argparse's status for a missing argument
        parser.print_help(sys.stderr)
        return 2
    report = diagnose()
    text = json.dumps(report, indent=2) if given.json else "\n".join(_render(report, _width()))
    _write(f"{text}\n")
    return int(report["exit_status"])


def _add_command(
    commands: Any, name: str, purpose: str, description: str, details: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _width() -> int:
    return max(60, min(shutil.get_terminal_size().columns, 100))


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


def _render(report: Report, width: int) -> Iterator[str]:
    entry = partial(_entry, width)
    versions, gpu = report["versions"], report["gpu"]
    yield "Versions"
    yield entry("Python", versions["python"])
    yield entry(DISTRIBUTION, versions["polars_async"] or "unknown (not installed)")
    yield entry("Polars", versions["polars"])
    yield entry("cudf-polars", report["cudf_polars"]["message"])
    yield "\nAsked for"
    yield entry("engine", _describe_setting(report["affinity"], AFFINITY_VARIABLE))
    yield entry("default", _describe_setting(report["default_engine"], ENGINE_VARIABLE))
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
    yield "\nWorker processes"
    for name, extra in report["extras"].items():
        yield entry(name, extra["message"])
    yield "\nLimits"
    for label, text in _describe_limits(report["limits"]):
        yield entry(label, text)
    yield from _render_conclusion(report, width)


def _render_conclusion(report: Report, width: int) -> Iterator[str]:
    problems = report["problems"]
    plural = "" if len(problems) == 1 else "s"
    yield f"\n{len(problems)} problem{plural}:" if problems else "\nNo problems found."
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


def _describe_limits(limits: Report) -> Iterator[tuple[str, str]]:
    files, total, most = limits["open_files"], limits["memory_total"], limits["memory_limit"]
    yield "open files", "any number" if files is None else f"{files} at most"
    yield "processors", f"{limits['processors']:g}"
    memory = "unknown" if total is None else f"{total / 2**30:.1f} GiB"
    if most is not None:
        memory += (
            f", of which the cgroup allows {most / 2**30:.1f} GiB: beyond, the kernel ends the "
            "program. With max_memory='75%' queries wait for memory before that"
        )
    yield "memory", memory
    proc = {True: "can be read", False: "cannot be read", None: "not on this system"}
    yield "/proc", proc[limits["proc"]]


def _dotted(version: tuple[int, int] | None) -> str:
    return "unknown" if version is None else f"{version[0]}.{version[1]}"
