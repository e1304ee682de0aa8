"""
The suites: each a module here, with ``cases(options)`` and ``run(case, contender, **size)``.

The latter measures one contender in one case once, in a process of its own, and gives its figures
by the names of their metrics.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import ModuleType

SUITES: Final = tuple(module.name for module in iter_modules(__path__))
"""Their names, as the command line knows them."""


def suite(name: str) -> ModuleType:
    """Import one suite, and not the loops and libraries of the others."""
    return import_module(f"benchmarks.suites.{name}")
