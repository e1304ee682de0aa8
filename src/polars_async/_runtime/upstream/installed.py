"""The installed Polars: where it lies, and what its threads and its allocator do."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Callable

POOL_THREAD: Final = re.compile(r"polars-\d|async-executor")
"""The names of threads of two of Polars' pools, which start with its first larger query. The thread
polars-ooc-cleaner is there from the import on; no query runs on it."""

SHARED_NAME: Final = "tokio-rt-worker"
"""The name of threads of the third pool, which starts with almost any query, and of all libraries
that use the same runtime."""

LIBRARY: Final[str | None] = getattr(getattr(pl, "_plr", None), "__file__", None)
"""The compiled library of Polars, which starts the threads of its pools."""

PACKAGE_FOLDER: Final = f"{Path(pl.__file__).parent}{os.sep}"
"""The folder of the installed Polars, to find the first frame outside of it."""

_BLOCKING_THREADS: Final = 512


def blocking_threads() -> int:
    """Return how many threads Polars has at most to read files and to call Python sinks."""
    wanted = os.environ.get("POLARS_MAX_BLOCKING_THREAD_COUNT", "")
    return int(wanted) if wanted.isdecimal() else _BLOCKING_THREADS


def _find_memory_held() -> Callable[[], int]:
    try:
        module = importlib.import_module("polars._plr")
        held: Callable[[], int] = module._estimate_memory_usage  # noqa: SLF001
        held()
    except (ImportError, AttributeError, TypeError):
        return int
    return held


memory_held: Final = _find_memory_held()
"""Return the bytes that Polars' allocator has handed out in this process; 0 if it does not tell."""


def namespaces_of(kind: type) -> list[str]:
    """Return the names of the namespaces that were registered for a class of Polars."""
    registered: Any = getattr(pl.api, "NameSpace", ())
    return [name for name, value in list(vars(kind).items()) if isinstance(value, registered)]
