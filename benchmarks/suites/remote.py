"""Queries that wait rather than compute: for a Python source, or for a server that answers late."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import polars as pl
from polars.io.plugins import register_io_source

import polars_async as pa
from benchmarks.contenders import POLARS, POLARS_ASYNC, THREADS
from benchmarks.measure.workloads import frame
from benchmarks.runner import Case, Metric
from benchmarks.targets import targets

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from benchmarks.runner import Options

    Submit = Callable[[pl.LazyFrame], Awaitable[pl.DataFrame]]

_QUERIES: Final = 32
_SOURCES: Final = "32 sources that sleep, in-memory"
_SCANS: Final = "32 scans over HTTP, in-memory"
_SLEEP: Final = 0.2
"""Seconds that each source sleeps."""
_DELAY: Final = 0.05
"""Seconds until the server answers a request, as an object store in the same region does."""
_ROWS: Final = 10_000
_SUBMITS: Final[dict[str, Submit]] = {
    POLARS: lambda lf: lf.collect_async(engine="in-memory"),
    POLARS_ASYNC: lambda lf: pa.collect_async(lf, engine="in-memory"),
    THREADS: lambda lf: asyncio.to_thread(lf.collect, engine="in-memory"),
}


def cases(_options: Options) -> list[Case]:
    """Return the cases of this suite."""
    contenders = (POLARS, THREADS, POLARS_ASYNC)
    return [
        Case("remote", name, contenders, [Metric("finished", "s", "lower", targets(name))])
        for name in (_SOURCES, _SCANS)
    ]


def run(case: str, contender: str) -> dict[str, float]:
    """Measure one contender in one case, once."""
    submit = _SUBMITS[contender]
    if case == _SOURCES:
        return asyncio.run(_all_at_once(submit, _sleeping_source()))
    with _slow_server() as address:
        return asyncio.run(_all_at_once(submit, pl.scan_parquet(address).select(pl.all().sum())))


async def _all_at_once(submit: Submit, lf: pl.LazyFrame) -> dict[str, float]:
    await submit(lf)  # starts threads, and connections
    begun = time.perf_counter()
    await asyncio.gather(*(submit(lf) for _ in range(_QUERIES)))
    return {"finished": time.perf_counter() - begun}


def _sleeping_source() -> pl.LazyFrame:
    def read(*_: Any) -> Iterator[pl.DataFrame]:
        time.sleep(_SLEEP)
        yield pl.DataFrame({"a": [1]})

    return register_io_source(read, schema={"a": pl.Int64})


@contextmanager
def _slow_server() -> Iterator[str]:
    """Serve a Parquet file from a process of its own, which shares no GIL with the queries."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "sales.parquet"
        frame(_ROWS).collect().write_parquet(file)
        command = [sys.executable, "-m", "benchmarks.measure.slow_server", str(file), str(_DELAY)]
        with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}/{file.name}"
            server.stdin.close()
