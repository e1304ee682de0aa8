"""The command ``polars-async compare``: its arguments, its help, and what it does."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Final

from polars_async.compare.charts import check_installed
from polars_async.compare.engines import DEFAULT_ENGINES, RUNS, compare_file
from polars_async.compare.file import split_argument
from polars_async.compare.progress import ProgressLine

if TYPE_CHECKING:
    import argparse

    from polars_async.compare.comparison import Comparison

_USAGE: Final = """\
polars-async compare FILE[:NAME...] [--engines ENGINE ...] [--runs N]
                            [--json] [--html PATH] [--png PATH]"""  # with FILE before --engines
DESCRIPTION: Final = """\
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
DETAILS: Final = """\
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
  2  Wrong arguments, or a FILE without queries, or one that cannot be imported;
     or a chart that cannot be written.
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Have `parser` take the arguments of the command."""
    parser.usage = _USAGE
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


def run(given: argparse.Namespace, parser: argparse.ArgumentParser, width: int) -> tuple[str, int]:
    """Run the command, which `parser` ends if an argument is wrong; return its text and status."""
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
        return "", 128 + signal.SIGINT
    text = json.dumps(found.to_dict(), indent=2) if given.json else found.render(width)
    status = 0 if found.agrees else 1
    try:
        _save(found, given)
    except (OSError, ValueError) as error:  # the figures, which took minutes, are told all the same
        _complain(f"no chart is written: {error}")
        status = 2
    return f"{text}\n", status


def _save(found: Comparison, given: argparse.Namespace) -> None:
    if given.html is not None:
        found.save_html(given.html)
    if given.png is not None:
        found.save_png(given.png)


def _check_chart(path: Path) -> None:
    check_installed()
    fault = "it is a folder; name a file in it" if path.is_dir() else None
    if not path.absolute().parent.is_dir():
        fault = "there is no such folder; make it"
    if fault is not None:
        raise ValueError(f"a chart cannot be written to {path}: {fault}")


def _complain(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"polars-async: {text}\n")
