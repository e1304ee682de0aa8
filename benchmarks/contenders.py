"""
The names of the contenders, as tables and charts show them.

The engine that runs is the last part of a case's name; where the contenders of a case run different
engines, it is the last part of each contender's name (`on`).
"""

from __future__ import annotations

from inspect import signature
from typing import Final

import polars as pl

import polars_async as pa

POLARS_ASYNC: Final = "polars-async"
POLARS_ASYNC_THREADS: Final = "polars-async, threads"
"""The same with queries in threads, where the contest is about worker processes."""
POLARS_ASYNC_NOT_INLINE: Final = "polars-async, inline=0"
"""The same with every query in a thread."""
HAS_INLINE: Final = "inline" in signature(pa.configure).parameters
"""Whether there is inline to turn off; without, that contender takes no part."""
POLARS_ASYNC_ONE: Final = "polars-async, one query"
"""A single query, where the contest is about many that are equal."""
POLARS_ASYNC_LIMITED: Final = "polars-async, max_memory"
"""The same with a third of the memory that Polars' own functions take."""
POLARS: Final = "Polars' own"
"""The async functions of Polars itself."""
POLARS_SEMAPHORE: Final = "Polars' own, semaphore"
"""The same with a semaphore around it, as a user would put there."""
THREADS: Final = "loop's threads"
"""``asyncio.to_thread``, ``trio.to_thread`` or gevent's threadpool, for a synchronous collect."""
THREADS_SEMAPHORE: Final = "loop's threads, semaphore"
DASK: Final = "dask"
ENGINES: Final = ("in-memory", "streaming", "gpu")
CPU_ENGINES: Final = ENGINES[:2]
ADAPTIVE: Final = "adaptive"
"""The engine that polars-async chooses for each query."""
DEFAULT_ENGINE: Final = "in-memory" if pl.__version__.startswith("1.") else "streaming"
"""What the async functions of the installed Polars run where no engine is asked for."""

_DEFAULT: Final = " (default)"


def on(contender: str, engine: str) -> str:
    """Return the name of `contender` on `engine`, with a mark if that is Polars' own default."""
    default = contender == POLARS and engine == DEFAULT_ENGINE
    return f"{contender}, {engine}{_DEFAULT if default else ''}"


def names_engine(contender: str) -> bool:
    """Return whether `contender` is a name that `on` returned."""
    engines = (*CPU_ENGINES, ADAPTIVE)
    return contender.removesuffix(_DEFAULT).endswith(tuple(f", {each}" for each in engines))
