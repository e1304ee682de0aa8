"""The suites: each a module that lists its cases, and runs one of them as one contender."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks.suites import latency

if TYPE_CHECKING:
    from types import ModuleType

SUITES: Final[dict[str, ModuleType]] = {"async": latency}
