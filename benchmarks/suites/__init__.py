"""
The suites: each a module with ``cases(...)`` for the runner, and ``run(case, contender, **size)``.

The latter measures one contender in one case once, in a process of its own, and gives its figures
by the names of their metrics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks.suites import engines, faults, latency, load

if TYPE_CHECKING:
    from types import ModuleType

SUITES: Final[dict[str, ModuleType]] = {
    "engines": engines,
    "async": latency,
    "load": load,
    "faults": faults,
}
