"""When Polars moves what the streaming engine holds to the disk: its budget of memory."""

from __future__ import annotations

import json
import os
from typing import Final

import polars as pl

from polars_async._runtime.unpatched import RLock

BUDGET: Final = "POLARS_OOC_MEMORY_BUDGET_MB"
"""The variable with the megabytes from which on Polars spills; it counts all that it has allocated
in the process."""
_FRACTION: Final = "POLARS_OOC_MEMORY_BUDGET_FRACTION"
_OURS: Final = "POLARS_ASYNC_OOC_MEMORY_BUDGET_MB"
"""The variable with what this library has set, also for processes that inherit both."""
_MEGABYTE: Final = 1 << 20

_lock: Final = RLock()
_ours: str | None = None
"""What this library has set in this process."""


def is_chosen() -> bool:
    """Return whether the program, or its user, has set a budget."""
    set_to = os.environ.get(BUDGET)
    return _FRACTION in os.environ or (set_to is not None and set_to != os.environ.get(_OURS))


def megabytes(size: int) -> str:
    """Return so many bytes as the value of the variable."""
    return str(max(1, size // _MEGABYTE))


def spill_from(size: int) -> None:
    """
    Have Polars spill in this process when it holds `size` bytes.

    Nothing changes if the program has set a budget, or this library has set a smaller one.
    """
    global _ours  # noqa: PLW0603  # as the variable, it is one for the whole process
    with _lock:
        if is_chosen() or (_ours is not None and int(_ours) <= int(megabytes(size))):
            return
        _ours = os.environ[_OURS] = megabytes(size)
        # Polars reads its variables when it is imported, and again for this.
        pl.Config.load(json.dumps({"environment": {BUDGET: _ours}}))
