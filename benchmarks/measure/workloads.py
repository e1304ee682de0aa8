"""Frames, queries and measurements that are the same for every contender."""

from __future__ import annotations

import math
import os
import resource
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def frame(rows: int) -> pl.LazyFrame:
    """Return a frame in memory, the same in every process."""
    number = pl.int_range(rows, eager=True)
    columns = {"number": number, "left": number.shuffle(seed=1), "right": number.shuffle(seed=2)}
    return pl.LazyFrame(columns)


def trivial() -> pl.LazyFrame:
    """Return a query that takes next to no time."""
    return pl.LazyFrame({"a": [1, 2, 3]}).select(pl.col("a").sum())


async def one_by_one(submit: Callable[[pl.LazyFrame], Any], lf: pl.LazyFrame, number: int) -> float:
    """Await `lf` `number` times, one after the other; return the seconds of one round trip."""
    begun = time.perf_counter()
    for _ in range(number):
        await submit(lf)
    return (time.perf_counter() - begun) / number


def read(folder: Path) -> None:
    """Read all files, so that every contender finds them in the cache of the system."""
    for file in folder.iterdir():
        with file.open("rb") as source, Path(os.devnull).open("wb") as sink:
            shutil.copyfileobj(source, sink)


def resident() -> float:
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def peak() -> float:
    """Return the peak of the resident memory of this process in MB."""
    # Linux lets it begin at the peak of the parent: so the parent must not run queries itself.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def quantile(ordered: Sequence[float], part: float) -> float:
    """Return the smallest figure of `ordered` that at least this `part` of them do not exceed."""
    return ordered[math.ceil(part * len(ordered)) - 1]
