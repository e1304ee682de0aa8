"""On which GPUs a query may run: on the one that its engine names, or on all that are usable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polars_async.reasons import Diagnosis, Reason

if TYPE_CHECKING:
    import polars as pl

    from polars_async.gpu.status import GpuDevice, GpuStatus


def named_device(engine: pl.Engine, status: GpuStatus) -> GpuDevice | None:
    """Return the GPU that ``device=`` of `engine` names, if it names one that is listed."""
    number = getattr(engine, "device", None)  # other engines have none
    if number is None:
        return None
    return next((each for each in status.devices if each.number == number), None)


def usable_devices(status: GpuStatus) -> list[GpuDevice]:
    """List the GPUs on which queries could run."""
    return [each for each in status.devices if each.usable or each.selected]


def candidates(engine: pl.Engine, status: GpuStatus) -> list[GpuDevice]:
    """List the GPUs that may run a query for `engine`; `diagnose_named_device` has passed it."""
    named = named_device(engine, status)
    return usable_devices(status) if named is None else [named]


def diagnose_named_device(
    engine: pl.Engine, status: GpuStatus, *, in_workers: bool
) -> Diagnosis | None:
    """Return what rules out the GPU that ``device=`` of `engine` names, if it names one."""
    number = getattr(engine, "device", None)
    if number is None:
        return None
    argument = f"device={number!r}"
    usable = usable_devices(status)
    named = named_device(engine, status)
    if named is not None:
        if named in usable or named.reason is None:
            return None
        return Diagnosis(named.reason, f"{argument} names a GPU that cannot be used", named.message)
    if any(each.number is None for each in usable):
        if not in_workers:  # CUDA knows its own order, and in this process it is the one to choose
            return None
        return Diagnosis(
            Reason.AMBIGUOUS_DEVICE_ORDER,
            f"{argument} may be one or another, since the GPUs are not alike and CUDA counts the "
            "fastest first",
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID to have them counted as polars-async doctor does",
        )
    numbers = ", ".join(str(each) for each in sorted(each.number or 0 for each in usable))
    return Diagnosis(
        Reason.UNKNOWN_DEVICE,
        f"{argument} names no GPU that is visible to CUDA",
        f"name one of these that are: {numbers}",
    )
