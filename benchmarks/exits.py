"""
R3: what becomes of an interpreter that exits while queries run, or right after the last.

Called as ``python -m benchmarks.exits STATE WHO DELAY`` it is such an interpreter.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final

import polars as pl

from benchmarks import report
from benchmarks.contenders import frame, process, submitter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_STATES: Final = {
    "rust": "exits, Rust running",
    "udf": "exits, Python UDFs running",
    "awaited": "exits, all awaited",
}
_STATUS: Final = 7
_RUNNING: Final = 6
_AWAITED: Final = 64
_LONGEST_DELAY: Final = 0.05
_PATIENCE: Final = 20.0
_FAULTS: Final = ("aborts", "wrong statuses", "stderr lines", "hangs")


def compare(contenders: Sequence[str], exits: int) -> None:
    """Let `exits` interpreters of each contender exit in each state, and count what went wrong."""
    generator = random.Random(0)  # noqa: S311  # no secret, and the same for all
    delays = [generator.uniform(0, _LONGEST_DELAY) for _ in range(exits)]
    print(f"  R3 counts of {exits}: {' / '.join(_FAULTS)}")
    for state, what in _STATES.items():
        native, own, *others = (_cell(state, contender, delays) for contender in contenders)
        report.line("R3", what, native, own, "", "own all 0")
        for contender, other in zip(contenders[2:], others, strict=True):
            report.line("", f"  {contender}", "", other, "", "")


def _cell(state: str, contender: str, delays: Sequence[float]) -> str:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = sum(pool.map(partial(_exit, state, contender), delays), Counter[str]())
    return " / ".join(str(faults[fault]) for fault in _FAULTS)


def _exit(state: str, contender: str, delay: float) -> Counter[str]:
    done = process("exits", state, contender, str(delay), timeout=_PATIENCE)
    if done is None:
        return Counter({"hangs": 1})
    return Counter(
        {
            "aborts": int(done.returncode < 0),
            "wrong statuses": int(done.returncode >= 0 and done.returncode != _STATUS),
            "stderr lines": len(done.stderr.splitlines()),
        }
    )


async def _leave(state: str, contender: str, delay: float) -> None:
    submit = submitter(contender)
    handles = [submit(query) for query in _queries(state)]
    if state == "awaited":
        await asyncio.gather(*handles)
    else:
        await asyncio.sleep(delay)


def _queries(state: str) -> Iterable[pl.LazyFrame]:
    if state == "udf":
        tiny = frame(10)
        return [tiny.map_batches((_sleeping, _busy)[n % 2]) for n in range(_RUNNING)]
    number, rows = (_RUNNING, 1_000_000) if state == "rust" else (_AWAITED, 10_000)
    source = frame(rows)
    sorts = [source.sort(pl.col("left") + n) for n in range(number)]
    if state == "rust":
        return sorts
    return [lf.map_batches(_quick) if n % 2 else lf for n, lf in enumerate(sorts)]


def _sleeping(df: pl.DataFrame) -> pl.DataFrame:
    for _ in range(1000):
        time.sleep(0.001)
    return df


def _busy(df: pl.DataFrame) -> pl.DataFrame:
    end = time.perf_counter() + 1
    while time.perf_counter() < end:
        pass
    return df


def _quick(df: pl.DataFrame) -> pl.DataFrame:
    return df


if __name__ == "__main__":
    asyncio.run(_leave(sys.argv[1], sys.argv[2], float(sys.argv[3])))
    sys.exit(_STATUS)
