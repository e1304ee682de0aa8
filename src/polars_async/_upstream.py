"""Every touch of Polars' private API, each guarded; tests/test_upstream.py tells when one moved."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars.lazyframe.in_process import InProcessQuery
else:
    try:
        from polars.lazyframe.in_process import InProcessQuery
    except ImportError:
        InProcessQuery = object

__all__ = ["AUTO_ENGINE", "PACKAGE_FOLDER", "POOL_THREAD", "InProcessQuery", "affinity_override"]

POOL_THREAD: Final = re.compile(r"polars-\d|tokio-rt-worker|async-executor")
"""The names of the threads of Polars' three pools, which start with its first query. The thread
polars-ooc-cleaner is there from the import on; no query runs on it."""

PACKAGE_FOLDER: Final = f"{Path(pl.__file__).parent}{os.sep}"
"""The folder of the installed Polars, to find the first frame outside of it."""


def _no_override() -> pl.Engine | None:
    return None


def _find_affinity_override() -> Callable[[], pl.Engine | None]:
    try:
        module = importlib.import_module("polars.lazyframe.engine_config")
        getter: Callable[[], pl.Engine | None] = module.get_engine_affinity_override
    except (ImportError, AttributeError):
        return _no_override
    return getter


affinity_override: Final = _find_affinity_override()
"""The engine *object* set with ``Config.set_engine_affinity``; a name lives in the environment."""


def _find_auto_engine() -> pl.Engine:
    try:
        module = importlib.import_module("polars.lazyframe.engine")
        engine: pl.Engine = module._AutoEngine()  # noqa: SLF001
    except (ImportError, AttributeError, TypeError):
        return pl.InMemoryEngine()
    return engine


AUTO_ENGINE: Final = _find_auto_engine()
"""What Polars itself runs when nothing was asked for. Unlike the *name* ``"auto"`` it does not ask
the affinity again, which would find AsyncEngine there, for ever."""
