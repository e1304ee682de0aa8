"""Frames, and what is measured of a process: the same for every contender."""

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
    """Make a frame in memory, the same in every process."""
    number = pl.int_range(rows, eager=True)
    columns = {"number": number, "left": number.shuffle(seed=1), "right": number.shuffle(seed=2)}
    return pl.LazyFrame(columns)


def trivial() -> pl.LazyFrame:
    """Make a query that costs next to nothing."""
    return pl.LazyFrame({"a": [1, 2, 3]}).select(pl.col("a").sum())


async def one_by_one(submit: Callable[[pl.LazyFrame], Any], lf: pl.LazyFrame, number: int) -> float:
    """Await `lf` so often; gives the seconds of one round trip."""
    begun = time.perf_counter()
    for _ in range(number):
        await submit(lf)
    return (time.perf_counter() - begun) / number


def read(folder: Path) -> None:
    """Read all files, so that nobody reads from a colder disk than the next."""
    for file in folder.iterdir():
        with file.open("rb") as source, Path(os.devnull).open("wb") as sink:
            shutil.copyfileobj(source, sink)


def resident() -> float:
    """Give the memory that this process has now, in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def peak() -> float:
    """Give the most memory that this process ever had, in MB."""
    # Linux starts it at the peak of the parent, which therefore must not work itself.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def rank(ordered: Sequence[float], share: float) -> float:
    """Give the figure that `share` of those `ordered` do not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1]
