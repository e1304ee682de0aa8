"""Queries on the GPU: each kind of call, off the loop, and from several collectors at once."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import polars as pl

import polars_async as pa
from benchmarks.gpu.findings import counted, tell, tell_right, telling, told
from benchmarks.measure.workloads import frame

if TYPE_CHECKING:
    from benchmarks.gpu.findings import Settings
    from polars_async.testing import SimulatedGpu

STRICT: Final = pl.GPUEngine(raise_on_fail=True)
_COLLECTED: Final = 100
_SYNCHRONOUS: Final = 20


class Notes:
    """Records the events of a collector."""

    def __init__(self) -> None:
        self.threads: set[int] = set()
        """The threads on which queries started."""
        self.resolutions: dict[str | None, pa.Resolution] = {}
        """The last resolution of each label."""

    def __call__(self, event: pa.QueryEvent) -> None:
        """Record an event, on the thread where it happened."""
        self.resolutions[event.label] = event.resolution
        if event.kind is pa.EventKind.STARTED:
            self.threads.add(threading.get_ident())


async def offload(_settings: Settings, _gpu: SimulatedGpu | None) -> None:
    """Run a query by each method of a collector."""
    notes = Notes()
    query = grouped(frame(1_000_000))
    expected = query.collect(engine="in-memory")
    async with pa.Collector(engine="gpu", gpu="offload", on_event=notes) as collector:
        free, processors = _free_memory(), len(os.sched_getaffinity(0))
        for what in ("first query, raise_on_fail", "second query, raise_on_fail"):
            with telling(what):
                begun = time.perf_counter()
                handle = collector.collect_async(query, engine=STRICT)
                answer = await handle
                seconds = f"{time.perf_counter() - begun:.3f} s"
                tell_right(what, handle.resolution, answer.equals(expected), seconds)
        if free is not None and (left := _free_memory()) is not None:
            tell("more GPU memory in use", f"{(free - left) / 2**20:.0f} MiB, as NVML sees it")
        left_over = len(os.sched_getaffinity(0))
        tell("processors", f"{left_over} of {processors} left to this thread")
        threads, own = notes.threads, threading.get_ident()
        found = f"{len(threads)} thread(s), the loop's {'' if own in threads else 'not '}among them"
        tell("thread", found, ok=len(threads) == 1 and own not in threads)
        await _several(collector, query, expected)
        await _batches(collector, query, expected, notes)
        for kind, read_back in (("parquet", pl.read_parquet), ("csv", pl.read_csv)):
            with telling(f"sink_{kind}"), tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "sink")
                written = collector.sink_async(getattr(query, f"sink_{kind}")(path, lazy=True))
                await written
                answer = read_back(path).cast(expected.schema)
                tell_right(f"sink_{kind}", written.resolution, answer.equals(expected))
        stats = collector.stats()
        tell("stats", str({key: value and round(value, 3) for key, value in stats.items()}))


async def _several(collector: pa.Collector, query: pl.LazyFrame, expected: pl.DataFrame) -> None:
    what = "collect_all_async of three"
    with telling(what):
        handle = collector.collect_all_async([query, query.head(10), query.tail(10)])
        wanted = (expected, expected.head(10), expected.tail(10))
        right = [part.equals(whole) for part, whole in zip(await handle, wanted, strict=True)]
        tell_right(what, handle.resolution, all(right))


async def _batches(
    collector: pa.Collector, query: pl.LazyFrame, expected: pl.DataFrame, notes: Notes
) -> None:
    what = "collect_batches_async"
    with telling(what):
        stream = collector.collect_batches_async(query, chunk_size=100, label=what)
        async with stream:
            batches = [batch async for batch in stream]
        right = len(batches) == 10 and pl.concat(batches).equals(expected)
        tell_right(what, notes.resolutions[what], right)


def grouped(source: pl.LazyFrame) -> pl.LazyFrame:
    """Return a query whose answer has integers alone, and only one order."""
    keys = (pl.col("left") % 1000).alias("key")
    return source.group_by(keys).agg(pl.col("right").sum(), pl.len()).sort("key")


def _free_memory() -> int | None:
    selected = [each for each in pa.gpu_status(refresh=True).devices if each.selected]
    return selected[0].memory_free if selected else None


async def collectors(_settings: Settings, _gpu: SimulatedGpu | None) -> None:
    """Let two collectors and a synchronous engine use the GPU at once."""
    source = frame(100_000).collect()
    queries = [
        source.lazy().filter(pl.col("left") > number).select(pl.col("right").sum(), pl.len())
        for number in range(2 * _COLLECTED)
    ]
    expected = [query.collect(engine="in-memory").row(0) for query in queries]
    async with (
        pa.Collector(engine="gpu", gpu="offload") as first,
        pa.Collector(engine="gpu", gpu="offload") as second,
    ):
        handles = [
            (first, second)[number % 2].collect_async(query) for number, query in enumerate(queries)
        ]
        beside = asyncio.create_task(
            asyncio.to_thread(_synchronously, queries[:_SYNCHRONOUS], expected[:_SYNCHRONOUS])
        )
        outcomes = await asyncio.gather(*handles, return_exceptions=True)
        for place, name in enumerate(("first collector", "second collector")):
            counts = Counter(
                _outcome(outcome, expected[number], handles[number].resolution)
                for number, outcome in enumerate(outcomes)
                if number % 2 == place
            )
            _tell_counts(name, counts)
        with telling("AsyncEngine, synchronously beside"):
            _tell_counts("AsyncEngine, synchronously beside", await beside)


def _synchronously(queries: list[pl.LazyFrame], expected: list[tuple[Any, ...]]) -> Counter[str]:
    with pa.Collector(engine=STRICT, gpu="offload") as collector:
        engine = pa.AsyncEngine(collector)
        answers = [query.collect(engine=engine).row(0) for query in queries]
    pairs = zip(answers, expected, strict=True)
    return Counter("right" if answer == wanted else "WRONG" for answer, wanted in pairs)


def _outcome(outcome: object, expected: tuple[Any, ...], resolution: pa.Resolution) -> str:
    if isinstance(outcome, BaseException):
        return f"raised {told(outcome)}"
    if not isinstance(outcome, pl.DataFrame) or outcome.row(0) != expected:
        return "WRONG"
    return "right" if resolution.name == "gpu" else f"right, but {resolution.message}"


def _tell_counts(what: str, counts: Counter[str]) -> None:
    tell(what, counted(counts), ok=set(counts) == {"right"})
