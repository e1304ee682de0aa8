"""What this process may use of its machine: processors and memory, as its cgroup limits them."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN_CGROUPS: Final = Path("/proc/self/cgroup")
_MEMORY: Final = Path("/proc/meminfo")
_TIMES: Final = Path("/proc/stat")
_STATUS: Final = Path("/proc/self/status")
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
_TICKS: Final = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
"""Of the times there, in a second."""
_PAGE: Final = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_NO_LIMIT: Final = 1 << 60
"""Bytes from which on a limit of the first version of cgroups is none."""


def processors() -> float:
    """Return how many processors Polars may keep busy here; a limit may be a fraction of one."""
    wanted = os.environ.get("POLARS_MAX_THREADS", "")
    count: float = _processors()
    return min(count, int(wanted)) if wanted.isdecimal() and int(wanted) else count


def idle_seconds() -> float | None:
    """Return how long the processors of this machine have been idle, all together, if known."""
    with suppress(OSError, ValueError, IndexError), _TIMES.open("rb") as file:
        _, _, _, _, idle, waiting = file.readline().split()[:6]
        return (int(idle) + int(waiting)) / _TICKS
    return None


def available_memory() -> float:
    """Return the share of the memory, from 0 to 1, that is still available; 1 if unknown."""
    return min(_share_of_machine(), _share_of_cgroup())


def total_memory() -> int | None:
    """Return the bytes of memory of this machine; None if unknown."""
    return _sizes_of_memory().get("MemTotal")


def memory_limit() -> int | None:
    """Return the bytes of memory to which a cgroup limits this process; None without a limit."""
    limits = [
        limit
        for folder in _cgroups("memory")
        for limit in _numbers(folder / "memory.max") or _numbers(folder / "memory.limit_in_bytes")
        if limit < _NO_LIMIT
    ]
    return min(limits, default=None)


def usable_memory() -> int | None:
    """Return the bytes of memory that this process may use: of its cgroup, else of the machine."""
    sizes = [size for size in (total_memory(), memory_limit()) if size is not None]
    return min(sizes, default=None)


def private_memory(process: int) -> int:
    """Return the bytes of memory that a process shares with no other; 0 if that is not known."""
    try:
        with open(f"/proc/{process}/statm", "rb") as file:  # noqa: PTH123  # a fifth of the time
            _, resident, shared = file.read().split()[:3]
    except OSError:  # it is gone, or this is not Linux
        return 0
    return (int(resident) - int(shared)) * _PAGE


def own_memory() -> int:
    """
    Return the bytes of memory that this process takes, without files that it maps; 0 if unknown.

    What is shared with other processes counts, such as the results of worker processes.
    """
    sizes = _status_of(_STATUS, ("RssAnon", "RssShmem"))
    return sum(sizes.values())


def open_files_limit() -> int | None:
    """Return how many files this process may have open, its soft limit; None without one."""
    if sys.platform != "win32":
        import resource  # noqa: PLC0415  # Windows has none

        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return None if limit == resource.RLIM_INFINITY else limit
    return None


def proc_is_readable() -> bool | None:
    """Return whether the files of ``/proc`` can be read; None where the system has none."""
    if sys.platform != "linux":
        return None
    return all(os.access(file, os.R_OK) for file in (_TIMES, _MEMORY, "/proc/self/statm"))


def forget_peak_memory() -> None:
    """Have `peak_memory` begin anew, at what is resident in this process now."""
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")


def peak_memory() -> int | None:
    """
    Return the most bytes of memory that were resident in this process at a time, if known.

    Not ``ru_maxrss``, which begins at the peak of the process that has started this one.
    """
    return _status_of(_STATUS, ("VmHWM",)).get("VmHWM")


@cache
def _processors() -> float:
    if hasattr(os, "sched_getaffinity"):
        count = float(len(os.sched_getaffinity(0)))
    else:
        count = float(os.cpu_count() or 1)
    for folder in _cgroups("cpu"):
        quota, period = (
            _numbers(folder / "cpu.max")
            or (
                *_numbers(folder / "cpu.cfs_quota_us"),
                *_numbers(folder / "cpu.cfs_period_us"),
            )
            or (0, 1)
        )
        if quota > 0 and period > 0:
            count = min(count, quota / period)
    return count


def _sizes_of_memory() -> dict[str, int]:
    """Return what the kernel tells of the memory of this machine, in bytes."""
    return _status_of(_MEMORY, ("MemTotal", "MemAvailable"))


def _status_of(file: Path, names: Collection[str]) -> dict[str, int]:
    """Return the sizes with these `names` in a file of the kernel, in bytes."""
    sizes: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, _, size = line.partition(":")
            if name in names:
                sizes[name] = int(size.split()[0]) * 1024
                if len(sizes) == len(names):
                    break
    return sizes


def _share_of_machine() -> float:
    sizes = _sizes_of_memory()
    total = sizes.get("MemTotal", 0)
    return sizes.get("MemAvailable", total) / total if total else 1.0


def _share_of_cgroup() -> float:
    share = 1.0
    for folder in _cgroups("memory"):
        most = _numbers(folder / "memory.max") or _numbers(folder / "memory.limit_in_bytes")
        used = _numbers(folder / "memory.current") or _numbers(folder / "memory.usage_in_bytes")
        if most and used and most[0] > 0:
            # Cached files are given up before anything fails.
            held = used[0] - _cached_files(folder / "memory.stat")
            share = min(share, max(0.0, 1 - held / most[0]))
    return share


def _cached_files(stat: Path) -> int:
    with suppress(OSError, ValueError):
        for line in stat.read_text().splitlines():
            name, _, size = line.partition(" ")
            if name in {"inactive_file", "total_inactive_file"}:
                return int(size)
    return 0


def _cgroups(controller: str) -> Iterator[Path]:
    """Yield the folders of the cgroup of this process, and of those around it."""
    for folder in _own_cgroups(controller):
        # In a container the path may be that of the host; the root is its own then.
        for each in (folder, *folder.parents):
            if each.is_relative_to(_CGROUPS):
                yield each


@cache
def _own_cgroups(controller: str) -> tuple[Path, ...]:
    folders = []
    with suppress(OSError):
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # the second version
                folders.append(_CGROUPS / path.lstrip("/"))
            elif controller in controllers.split(","):
                folders.append(_CGROUPS / controller / path.lstrip("/"))
    return tuple(folders)


def _numbers(file: Path) -> tuple[int, ...]:
    """Return the numbers in `file`; none if it is not there, or says that there is no limit."""
    with suppress(OSError, ValueError):
        return tuple(map(int, file.read_text().split()))
    return ()
