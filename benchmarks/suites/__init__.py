"""
The suites: each a module with ``cases(options)`` for the runner, and ``run(case, who, **size)``.

The latter measures one contender in one case once, in a process of its own, and gives its figures
by the names of their metrics.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import ModuleType

SUITES: Final = {"engines": "engines", "async": "latency", "load": "load", "faults": "faults"}
"""The module of each, by the name that the command line knows."""


def suite(name: str) -> ModuleType:
    """Import one suite, and not the loops and libraries of the others."""
    return import_module(f"benchmarks.suites.{SUITES[name]}")
