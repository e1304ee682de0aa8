"""When processes have stopped computing, told from outside."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from threading import get_native_id
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROC: Final = Path("/proc")
_INTERVAL: Final = 0.001
_QUIET: Final = 0.2
_NEXT_TO_NOTHING: Final = 0.0005
_ALLOCATOR: Final = b"jemalloc_bg_thd"
"""Of Polars' allocator: for a second after any query, it gives memory back to the system."""


def children() -> list[int]:
    """Give the processes that this one has started, and that live."""
    found = []
    for folder in _PROC.iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it may end at any time
                # Behind the name, which may hold anything.
                stat = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                state, parent = stat[:2]
                if state != "Z" and int(parent) == os.getpid():
                    found.append(int(folder.name))
    return found


def seconds_until_idle(processes: Sequence[int], begun: float, patience: float = 60) -> float:
    """
    Give the time from `begun`, of `time.perf_counter`, to when `processes` were idle or gone.

    That is the moment from which on they spend less than half a millisecond in a fifth of a second.
    The kernel's count of nanoseconds tells, thread by thread: those of a whole process come in
    steps of 10 ms. The calling thread does not count, nor does that of Polars' allocator.
    """
    watch = _Watch(processes)
    spent = [(time.perf_counter(), watch.spent())]
    while True:
        time.sleep(_INTERVAL)
        total = watch.spent()
        now = time.perf_counter()
        spent.append((now, total))
        while total - spent[0][1] >= _NEXT_TO_NOTHING:
            spent.pop(0)
        if now - spent[0][0] >= _QUIET or now - begun >= patience:
            return spent[0][0] - begun


class _Watch:
    """Counts what the threads of some processes spend from now on."""

    def __init__(self, processes: Sequence[int]) -> None:
        self._processes = processes
        self._seen: dict[str, float] = {}
        self._left_out = {f"/proc/{os.getpid()}/task/{get_native_id()}"}
        self._total = 0.0
        self.spent()
        self._total = 0.0

    def spent(self) -> float:
        """Give the seconds so far."""
        for process in self._processes:
            with suppress(OSError):  # it is gone
                for thread in os.listdir(f"/proc/{process}/task"):  # noqa: PTH208  # a tight loop
                    self._look_at(f"/proc/{process}/task/{thread}")
        return self._total

    def _look_at(self, thread: str) -> None:
        if thread in self._left_out:
            return
        with suppress(OSError):
            seconds = int(_read(f"{thread}/schedstat").split()[0]) / 1e9
            grown = seconds - self._seen.get(thread, 0.0)
            if grown > 0:
                if _read(f"{thread}/comm").strip() == _ALLOCATOR:
                    self._left_out.add(thread)
                    return
                self._seen[thread] = seconds
                self._total += grown


def _read(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123  # a third of the time
        return file.read()
