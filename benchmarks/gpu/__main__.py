"""
Check whether queries run on the GPU of this host, rightly, and how fast: ``ci/gpu``.

Each check runs in a process of its own with a time limit, the most important first, so that a crash
or a hang costs no other check. The report is written again after each; it names the checks that
were not run, and why. Answers are compared with those of the in-memory engine.

Exit status: 0 if all checks passed, 2 if no GPU is usable here, otherwise 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.gpu.findings import Settings
from benchmarks.gpu.report import Outcome, text, unusable_gpu
from benchmarks.pdsh.queries import QUERIES

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROOT: Final = Path(__file__).parents[2]
_GRACE: Final = 5.0
_SHORTEST: Final = 5.0
_SCALES: Final = (1.0, 10.0)


@dataclass(frozen=True)
class Check:
    """A check, or the step that makes the data for others."""

    name: str
    title: str
    limit: float
    """The most seconds that it may take."""
    scale: float
    """The scale of the data."""
    needs_data: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and write the report; return the exit status."""
    options = _options(arguments)
    began = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    end = time.monotonic() + 60 * options.minutes
    checks = _checks(options)
    outcomes: list[Outcome] = []
    for check in checks:
        outcome = _outcome(check, outcomes, end, options)
        outcomes.append(outcome)
        print(f"{check.title}: {outcome.verdict}, {outcome.seconds:.1f} s", file=sys.stderr)
        to_come = [_not_run(each, "not reached yet") for each in checks[len(outcomes) :]]
        report = text(outcomes + to_come, began=began, simulated=options.simulate)
        _write(options.report, report, outcomes, simulated=options.simulate)
    print(report, flush=True)
    if unusable_gpu(outcomes) is not None:
        return 2
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checks",
        nargs="*",
        metavar="CHECK",
        help="facts (always runs), offload, answers, memory, collectors, stall, exits, speed, "
        "throughput, compare (default: all)",
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="simulate a GPU: shows only whether the checks themselves run",
    )
    parser.add_argument(
        "--scale",
        type=float,
        action="append",
        metavar="S",
        help="of the PDS-H data, 1 is 345 MB; may be repeated: speed, throughput and compare run "
        "at each scale, the other checks at the first (default: 1 and 10)",
    )
    parser.add_argument(
        "--queries",
        type=int,
        nargs="+",
        choices=QUERIES,
        default=[*QUERIES],
        metavar="N",
        help="numbers of the PDS-H queries (default: 1 to 22)",
    )
    parser.add_argument(
        "--exits",
        type=int,
        default=20,
        metavar="N",
        help="interpreters that exit with all queries awaited; a quarter as many more exit with a "
        "query running (default: 20)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9,
        metavar="M",
        help="for all checks; those still to come then are not run (default: 9)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(".cache/data"),
        metavar="FOLDER",
        help="where the PDS-H data is kept (default: .cache/data)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=Path(".cache/gpu/report.md"),
        metavar="PATH",
        help="where the report goes, with a JSON file beside it (default: .cache/gpu/report.md)",
    )
    options = parser.parse_args(arguments)
    options.scale = options.scale or [*_SCALES]
    known = {check.name for check in _all_checks(options.scale)}
    if unknown := set(options.checks) - known:
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    return options


def _all_checks(scales: Sequence[float]) -> list[Check]:
    """Return the checks; those come first that find out most in little time."""
    first = scales[0]
    checks = [
        Check("facts", "Facts", 60, first),
        Check("offload", "Offload", 90, first),
        Check("data", f"Data of scale {first:g}", 120, first),
        Check("answers", f"Answers at scale {first:g}", 180, first, needs_data=True),
        Check("memory", "Out of memory", 90, first),
        Check("collectors", "Two collectors", 60, first),
        Check("stall", f"Loop stall at scale {first:g}", 120, first, needs_data=True),
        Check("exits", "Exits", 150, first),
    ]
    for scale in scales:
        if scale != first:
            checks.append(Check("data", f"Data of scale {scale:g}", 240, scale))
        checks += [
            Check("speed", f"Speed at scale {scale:g}", 120, scale, needs_data=True),
            Check("throughput", f"Throughput at scale {scale:g}", 75, scale, needs_data=True),
            Check("compare", f"Engines at scale {scale:g}", 60, scale, needs_data=True),
        ]
    return checks


def _checks(options: argparse.Namespace) -> list[Check]:
    checks = _all_checks(options.scale)
    if not options.checks:
        return checks
    wanted = {"facts", *options.checks}
    need_data = {check.scale for check in checks if check.needs_data and check.name in wanted}
    return [
        check
        for check in checks
        if check.name in wanted or (check.name == "data" and check.scale in need_data)
    ]


def _outcome(
    check: Check, before: Sequence[Outcome], end: float, options: argparse.Namespace
) -> Outcome:
    """Run a check, or return why it cannot be run."""
    if unusable_gpu(before) is not None:
        return _not_run(check, "no GPU is usable")
    if before and not before[0].findings:
        return _not_run(check, "the facts of this host were not found out")
    made = f"Data of scale {check.scale:g}"
    if check.needs_data and not any(each.title == made and each.passed for each in before):
        return _not_run(check, "its data could not be made")
    left = end - time.monotonic()
    if left < _SHORTEST:
        return _not_run(check, f"the {options.minutes:g} minutes were over")
    return _run(check, min(check.limit, left), options)


def _not_run(check: Check, why: str) -> Outcome:
    return Outcome(check.name, check.title, not_run=why)


def _run(check: Check, seconds: float, options: argparse.Namespace) -> Outcome:
    settings = Settings(
        simulate=options.simulate,
        scale=check.scale,
        data=str(options.data.absolute()),
        queries=options.queries,
        exits=options.exits,
        seconds=seconds,
    )
    python = [sys.executable, "-X", "faulthandler"]
    command = [*python, "-m", "benchmarks.gpu.run_check", check.name, json.dumps(asdict(settings))]
    begun = time.monotonic()
    # Files, not pipes: a process that hangs in the driver cannot be killed, and keeps pipes open.
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            command, cwd=_ROOT, stdout=stdout, stderr=stderr, start_new_session=True
        )
        status = _wait(process, seconds + _GRACE)
        stdout.seek(0)
        stderr.seek(0)
        findings, other = _parsed(stdout.read())
        return Outcome(
            check.name,
            check.title,
            time.monotonic() - begun,
            status,
            findings,
            stderr.read(),
            other_output=other,
        )


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)


def _parsed(output: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the findings, and apart from them what libraries have written."""
    findings, other = [], []
    for line in output.splitlines():
        try:
            finding = json.loads(line)
        except ValueError:
            finding = None
        if isinstance(finding, dict) and "ok" in finding:
            findings.append(finding)
        else:
            other.append(line)
    return findings, other


def _write(path: Path, report: str, outcomes: Sequence[Outcome], *, simulated: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{report}\n", encoding="utf-8")
    checks = [{**asdict(each), "verdict": each.verdict} for each in outcomes]
    as_json = json.dumps({"simulated": simulated, "checks": checks}, indent=1)
    path.with_suffix(".json").write_text(f"{as_json}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
