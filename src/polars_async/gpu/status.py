"""The status of the GPUs of this host, and of the GPU engine in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from polars_async.errors import one_line

if TYPE_CHECKING:
    from polars_async.reasons import Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDevice:
    """
    One GPU of this host, and what rules it in or out.

    Attributes
    ----------
    index
        Its place in NVML's list, which is by PCI bus.
    uuid, name
        As NVML lists them; None when unknown.
    compute_capability
        ``(major, minor)``; None when unknown.
    memory_total, memory_free
        In bytes, of the whole GPU, when NVML was last asked; None when unknown. Some integrated
        GPUs have no memory of their own, and are usable all the same.
    number
        By which number CUDA counts it in this process, as ``pl.GPUEngine(device=...)`` takes it;
        None where it is hidden, or where the GPUs are not all alike and ``CUDA_DEVICE_ORDER`` does
        not say in which order CUDA counts them.
    selected
        Whether this is the GPU that cudf-polars uses: the first in ``CUDA_VISIBLE_DEVICES``.
    usable
        Whether queries could run on it if it were selected: nothing is wrong with it, and it is
        visible. Whether the driver and cudf-polars suffice is in `GpuStatus`.
    reason
        What rules it out; None if it is usable.
    message
        The same in one sentence that a person can act on.
    """

    index: int
    uuid: str | None = None
    name: str | None = None
    compute_capability: tuple[int, int] | None = None
    memory_total: int | None = None
    memory_free: int | None = None
    number: int | None = None
    selected: bool = False
    usable: bool
    reason: Reason | None = None
    message: str

    def __str__(self) -> str:
        facts = [self.name or "name unknown"]
        if self.memory_total is not None:
            facts.append(f"{self.memory_total / 2**30:.0f} GiB")
        facts += ["selected"] if self.selected else []
        return one_line(f"GPU {self.index} ({', '.join(facts)}): {self.message}")

    def __repr__(self) -> str:
        return f"<GpuDevice: {self}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStatus:
    """
    Whether the GPU engine can run in this process.

    Attributes
    ----------
    usable
        Whether it can, as far as that can be known without loading CUDA.
    reason
        The first thing that rules it out, from the driver over the GPU to cudf-polars; None if
        it is usable.
    message
        The same in one sentence that a person can act on. It can follow ``the GPU engine was asked
        for, but``.
    devices
        Every GPU that the driver lists.
    driver_version
        The driver's own version, such as ``"580.65.06"``; None when unknown.
    cuda_version
        The newest CUDA that the driver runs, ``(major, minor)``; None when unknown.
    cudf_polars_version
        The installed version of cudf-polars, usable or not; None when unknown.
    """

    usable: bool
    reason: Reason | None = None
    message: str
    devices: tuple[GpuDevice, ...] = ()
    driver_version: str | None = None
    cuda_version: tuple[int, int] | None = None
    cudf_polars_version: str | None = None

    def __str__(self) -> str:
        return one_line(f"{'usable' if self.usable else 'not usable'}: {self.message}")

    def __repr__(self) -> str:
        return f"<GpuStatus: {self}>"
