"""Whether ``engine="adaptive"`` may take the GPU for a query, and whether that may pay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from polars_async.gpu import gpu_status
from polars_async.gpu.support import Support, gpu_support
from polars_async.resolution import decide, gpu_policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from polars_async.resolution import GpuPolicy, Resolution
    from polars_async.scheduling.estimates import Sources

_LARGE: Final = 1 << 28
"""Bytes from which on the GPU may pay for what it takes to bring them there."""
_MEMORY: Final = 3
"""How many times what it reads a query may take of the memory of the GPU."""


def no_gpu(_frames: Sequence[pl.LazyFrame], _sources: Sources) -> None:
    """Take no GPU: queries run on other hosts."""


def on_gpu(
    policy: GpuPolicy | None,
    frames: Sequence[pl.LazyFrame],
    sources: Sources,
    *,
    in_workers: bool,
) -> Resolution | None:
    """
    Return the resolution of a query that may run on the GPU, and may gain by it; else None.

    The policy has to allow it, one has to be usable and have the memory, and cudf-polars has to
    support all of the query. Nobody has asked for the GPU, so what fails here rules it out.
    """
    if sources.size is None or sources.size < _LARGE:
        return None
    try:
        return _allowed(policy, frames, sources.size, in_workers=in_workers)
    except BaseException:  # noqa: BLE001  # such as of a policy that is none, or a panic of Polars
        return None


def _allowed(
    policy: GpuPolicy | None, frames: Sequence[pl.LazyFrame], size: int, *, in_workers: bool
) -> Resolution | None:
    if gpu_policy(policy) == "downgrade":  # first: the driver is not to be asked then
        return None
    status = gpu_status()
    free = max((each.memory_free or 0 for each in status.devices if each.usable), default=0)
    if not status.usable or _MEMORY * size > free:
        return None
    found = decide("gpu", "async", policy, None, gpu_in_workers=in_workers)
    # Last, since asking cudf-polars takes a millisecond or more.
    if found.downgraded or any(gpu_support(each).answer is not Support.YES for each in frames):
        return None
    return found
