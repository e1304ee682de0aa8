"""
Whether the pools of threads on which Polars computes have done so in the meantime.

The processor time of a whole process is known on Linux as of the last tick of the scheduler, some
ms ago. That of one thread is exact, also for others: so a query that needs the pools, if only to
wake one of their threads, is told from one that runs on its own thread alone. The third pool, which
reads files, computes nothing, and may have hundreds of threads that come and go.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Final

from polars_async._runtime.fork import Step, in_child
from polars_async._runtime.upstream import POOL_THREAD

_THREADS: Final = Path("/proc/self/task")


class _Pools:
    clocks: tuple[int, ...] | None = None
    """The clocks of the threads that there were when they were listed, by the kernel's numbers."""
    version = 0
    """How many times they have changed."""


_pools: Final = _Pools()


def _forget() -> None:
    _pools.clocks = None


in_child(Step.FORGET, _forget)


def find_pools() -> bool:
    """
    List the threads of the pools anew; return whether they are the same as before.

    A pool starts with the first query that needs it: until then it has none. Listing takes some 50
    us for each thread of the process. Elsewhere than on Linux it is never the same.
    """
    if sys.platform != "linux":
        return False
    tasks = filter(_is_of_a_pool, _THREADS.iterdir())
    clocks = tuple(sorted(_clock_of(int(task.name)) for task in tasks))
    if clocks == _pools.clocks:
        return True
    _pools.version += 1
    _pools.clocks = clocks
    return False


def version() -> int:
    """Return a number that is another one once another list of threads was made."""
    return _pools.version


def computed() -> int | None:
    """Return how many ns the listed threads have computed; None if there is no list."""
    clocks = _pools.clocks
    if sys.platform != "linux" or clocks is None:
        return None
    try:
        return sum(map(time.clock_gettime_ns, clocks))
    except OSError:  # one of them has ended
        _pools.clocks = None
        return None


def _is_of_a_pool(task: Path) -> bool:
    try:
        name = (task / "comm").read_text(errors="replace").strip()
    except OSError:  # the thread has ended
        return False
    return POOL_THREAD.match(name) is not None


def _clock_of(thread: int) -> int:
    """Return the clock of a thread's processor time, as the kernel builds its number."""
    return (~thread << 3) | 6
