"""The console script of polars-async: its commands, and the text of their reports."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import textwrap
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from polars_async.compare.charts import check_installed
from polars_async.compare.engines import DEFAULT_ENGINES, RUNS, compare_file
from polars_async.compare.file import split_argument
from polars_async.compare.progress import ProgressLine
from polars_async.doctor import DISTRIBUTION, diagnose, installed_version
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
  2  {AFFINITY_VARIABLE}, {ENGINE_VARIABLE} or
     {GPU_POLICY_VARIABLE} is not valid; or no GPU is usable, and
     {AFFINITY_VARIABLE}=gpu asks for one, under any policy, or
     {GPU_POLICY_VARIABLE}=require does, with which every query that asks for one
     fails. Wrong arguments are 2, too.

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
  problems     sentences, each with its remedy
  exit_status  0 or 2
"""
_COMPARE_USAGE: Final = """\
polars-async compare FILE[:NAME...] [--engines ENGINE ...] [--runs N]
                            [--json] [--html PATH] [--png PATH]"""  # with FILE before --engines
_COMPARE: Final = """\
Run the queries of a Python file on several engines, and tell how long each
takes, how much memory, whether the answers agree, and what the GPU engine could
run, with or without a GPU.

FILE          all queries: its LazyFrames, and its functions that need no
              arguments and return one. Not what it imports, nor what begins
              with _, nor main() or what is annotated to return something else.
FILE:A,B      these alone, in this order; FILE:A:B is the same.

Each query has for each engine a process of its own, which imports FILE.
Functions are called once here, too, to learn what they return.
"""
_COMPARE_DETAILS: Final = """\
What is measured: the time from the call of collect_async to its result, without
the import of FILE and the first run, in processes that take turns; the peak of
the process' memory while the query runs, which has Python, Polars and the
frames of FILE in it, too; and whether the answer is that of in-memory: floats
may differ by 1e-9 of their size (1e-5 where they have 32 bits), and the order
as far as the query leaves it open, as it does unless it ends with a sort by
columns.

exit status:
  0  No answer differs.
  1  An answer differs from that of the reference.
  2  Wrong arguments, or a FILE without queries, or one that cannot be imported.
A query that fails on an engine is told, and no reason for another exit status.

--json writes one object; what is unknown or absent is null:
  versions     polars, polars_async, python
  processors   that Polars may keep busy
  runs         of each query on each engine
  agrees       false if any answer differs
  gpu_support  of each query: answer (yes, no, unknown), operations, reason,
               message
  results      each query, engine, status (ran, failed, not run), seconds (of
               each run), median, min, max, peak_memory (bytes), rows, ran_on
               (the engine that ran it in the end), agrees, reordered,
               compared_with, message
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
        commands, "compare", "measure queries of a file on each engine", _COMPARE, _COMPARE_DETAILS
    )
    compare.usage = _COMPARE_USAGE
    _add_arguments_of_compare(compare)
    try:
        given = parser.parse_args(arguments)
        if given.command == "compare":
            return _compare(given, compare)
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


def _add_arguments_of_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE[:NAME...]", help="a Python file with queries")
    parser.add_argument(
        "--engines",
        nargs="+",
        metavar="ENGINE",
        help="names of engines, or of pl.Engine objects of FILE, separated by spaces or commas "
        f"(default: {' '.join(DEFAULT_ENGINES)})",
    )
    parser.add_argument(
        "--runs", type=int, default=RUNS, metavar="N", help=f"of each (default: {RUNS})"
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    for kind in ("html", "png"):
        parser.add_argument(
            f"--{kind}",
            type=Path,
            metavar="PATH",
            help=f"write a chart to this file as {kind.upper()}; needs polars-async[charts]",
        )


def _compare(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the command; `parser` ends it where an argument is wrong."""
    charts = [path for path in (given.html, given.png) if path is not None]
    engines = given.engines and [name for each in given.engines for name in each.split(",") if name]
    progress = ProgressLine(sys.stderr)
    try:
        path, names = split_argument(given.file)
        for chart in charts:  # before the minutes that the queries may take
            _check_chart(chart)
        # What the file prints is no part of the report.
        with redirect_stdout(sys.stderr), progress:
            found = compare_file(
                path, names, engines=engines, runs=given.runs, progress=progress.show
            )
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        _complain("interrupted")
        return 128 + signal.SIGINT
    _write(f"{json.dumps(found.to_dict(), indent=2) if given.json else found.render(_width())}\n")
    if charts and not any(each.seconds for each in found.results):
        _complain("no chart is written, since no query has run on any engine")
    elif charts:
        if given.html is not None:
            found.save_html(given.html)
        if given.png is not None:
            found.save_png(given.png)
    return 0 if found.agrees else 1


def _check_chart(path: Path) -> None:
    check_installed()
    fault = "it is a folder; name a file in it" if path.is_dir() else None
    if not path.absolute().parent.is_dir():
        fault = "there is no such folder; make it"
    if fault is not None:
        raise ValueError(f"a chart cannot be written to {path}: {fault}")


def _complain(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{DISTRIBUTION}: {text}\n")


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
