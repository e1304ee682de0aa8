"""Exits of interpreters that have used the GPU, or still use it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import polars as pl

import polars_async as pa
from benchmarks.gpu.findings import counted, tell
from benchmarks.measure.workloads import frame

if TYPE_CHECKING:
    from benchmarks.gpu.findings import Settings
    from polars_async.testing import SimulatedGpu

_AT_ONCE: Final = 4
_PATIENCE: Final = 60.0
_QUIET: Final = "with status 0, nothing on stderr"


async def exits(settings: Settings, _gpu: SimulatedGpu | None) -> None:
    """Check exits with all queries awaited, and with a query running."""
    states = (
        ("awaited", "all queries awaited", settings.exits),
        ("running", "a query running", max(1, settings.exits // 4)),
    )
    for state, what, number in states:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            ends = list(pool.map(_end, [settings] * number, [state] * number))
        counts = Counter(end.summary for end in ends)
        words = Counter(end.said for end in ends if end.said)
        longest = max(end.seconds for end in ends)
        found = f"{counted(counts)} ({counted(words)}; {longest:.1f} s at most)"
        stderr = [end.stderr for end in ends if end.stderr]
        tell(f"exit, {what}", found, ok=set(counts) == {_QUIET}, stderr=stderr)


@dataclass(frozen=True)
class End:
    """How an interpreter exited."""

    status: int | None
    """None if it did not exit in time."""
    said: str
    stderr: str
    seconds: float

    @property
    def summary(self) -> str:
        """The status, and the last line on stderr."""
        status = "not in time" if self.status is None else f"with status {self.status}"
        lines = self.stderr.strip().splitlines()
        return f"{status}, {lines[-1] if lines else 'nothing'} on stderr"


def _end(settings: Settings, state: str) -> End:
    python = [sys.executable, "-m"]
    command = [*python, "benchmarks.gpu.run_check", state, json.dumps(asdict(settings))]
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return End(None, "", "", _PATIENCE)
    return End(done.returncode, done.stdout.strip(), done.stderr, time.perf_counter() - begun)


async def awaited(_settings: Settings, _gpu: SimulatedGpu | None) -> None:
    """Have every query done when the interpreter exits."""
    collector = pa.Collector(engine="gpu", gpu="offload")
    source = frame(100_000)
    handles = [collector.collect_async(source.sort(pl.col("left") + n)) for n in range(8)]
    await asyncio.gather(*handles)
    print(f"after queries on {handles[-1].resolution.name}")


async def running(_settings: Settings, _gpu: SimulatedGpu | None) -> None:
    """Have a query running when the interpreter exits."""
    started = threading.Semaphore(0)

    def note(event: pa.QueryEvent) -> None:
        if event.kind is pa.EventKind.STARTED:
            started.release()

    collector = pa.Collector(engine="gpu", gpu="offload", on_event=note)
    source = frame(10_000_000)
    await collector.collect_async(source.head(10))  # imports cudf_polars, and starts the GPU
    started.acquire()
    handle = collector.collect_async(source.sort("left"))
    started.acquire()
    await asyncio.sleep(0.02)
    print("after the query" if handle.done() else "during the query")
