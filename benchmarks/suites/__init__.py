"""
The suites: each a module here, with ``cases(options)`` and ``run(case, contender, **size)``.

``cases`` returns the cases to compare. ``run`` measures one contender in one case once, in a
process of its own, and returns the figures by the names of the metrics.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import ModuleType

SUITES: Final = tuple(module.name for module in iter_modules(__path__))
"""Their names on the command line."""


def suite(name: str) -> ModuleType:
    """Import one suite alone, without the loops and libraries that the others need."""
    return import_module(f"benchmarks.suites.{name}")
