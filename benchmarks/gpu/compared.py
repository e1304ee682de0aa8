"""PDS-H queries on every engine of the host, each in a process of its own: `compare_engines`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import polars_async as pa
from benchmarks.gpu.findings import tell, tell_row, told
from benchmarks.gpu.pdsh import queries_of

if TYPE_CHECKING:
    from benchmarks.gpu.findings import Settings
    from polars_async.testing import SimulatedGpu

_QUERIES: Final[tuple[int, ...]] = (1, 9, 21, 6, 18)
"""Of each kind one, those of most interest first: all of them would take minutes."""
_RUNS: Final = 2


async def compared(settings: Settings, _gpu: SimulatedGpu | None) -> None:
    """Compare the engines as a user would, as far as the time goes."""
    queries = queries_of(settings)
    order = [number for number in _QUERIES if number in queries] or [*queries]
    end, longest = time.monotonic() + 0.9 * settings.seconds, 0.0
    for position, number in enumerate(order):
        begun = time.monotonic()
        if begun + longest > end:
            left = ", ".join(f"q{each}" for each in order[position:])
            tell("not measured", f"{left}: the time was over", skipped=True)
            return
        try:
            found = pa.compare_engines({f"q{number}": queries[number]}, runs=_RUNS)
        except Exception as error:  # noqa: BLE001  # the other queries are compared all the same
            tell_row({"query": f"q{number}", "answers": f"raised {told(error)}"}, ok=False)
        else:
            tell_row(_row(found, number), ok=found.agrees)
        longest = max(longest, time.monotonic() - begun)


def _row(found: pa.Comparison, number: int) -> dict[str, object]:
    row: dict[str, object] = {"query": f"q{number}"}
    for each in found.results:
        row[f"{each.engine} s"] = "" if each.median is None else round(each.median, 4)
        row[f"{each.engine} MB"] = "" if each.peak_memory is None else round(each.peak_memory / 1e6)
    row["adaptive took"] = next(
        (each.ran_on or "" for each in found.results if each.engine == "adaptive"), ""
    )
    row["answers"] = "agree" if found.agrees else "DISAGREE"
    return row
