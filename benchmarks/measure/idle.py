"""Find out from outside when processes have stopped computing."""

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
"""The thread of Polars' allocator: it returns memory to the system for a second after a query."""


def children() -> list[int]:
    """Return the living children of this process."""
    found = []
    for folder in _PROC.iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it may end at any time
                # After the name, which may hold anything.
                stat = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                state, parent = stat[:2]
                if state != "Z" and int(parent) == os.getpid():
                    found.append(int(folder.name))
    return found


def seconds_until_idle(processes: Sequence[int], begun: float, patience: float = 60) -> float:
    """
    Return the seconds from `begun`, of `time.perf_counter`, until `processes` were idle or gone.

    Idle means that from then on they use less than 0.5 ms of CPU in 0.2 seconds. This is measured
    thread by thread, since the CPU time of a whole process comes in steps of 10 ms. The calling
    thread and that of Polars' allocator do not count.
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
    """Counts the CPU time that the threads of some processes use from now on."""

    def __init__(self, processes: Sequence[int]) -> None:
        self._processes = processes
        self._seen: dict[str, float] = {}
        self._left_out = {f"/proc/{os.getpid()}/task/{get_native_id()}"}
        self._total = 0.0
        self.spent()
        self._total = 0.0

    def spent(self) -> float:
        """Return the seconds so far."""
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
