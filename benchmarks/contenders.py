"""The names of the contenders, as tables and charts show them."""

from __future__ import annotations

from typing import Final

POLARS_ASYNC: Final = "polars-async"
POLARS_ASYNC_THREADS: Final = "polars-async, threads"
"""The same with queries in threads, where the contest is about worker processes."""
POLARS: Final = "Polars' own"
"""The async functions of Polars itself."""
POLARS_SEMAPHORE: Final = "Polars' own, semaphore"
"""The same with a semaphore around it, as a user would put there."""
THREADS: Final = "loop's threads"
"""``asyncio.to_thread``, ``trio.to_thread`` or gevent's threadpool, for a synchronous collect."""
DASK: Final = "dask"
ENGINES: Final = ("in-memory", "streaming", "gpu")
