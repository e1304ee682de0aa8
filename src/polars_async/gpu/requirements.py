"""What cudf-polars requires of a GPU, of its driver and of the environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polars_async.gpu.cudf import CU12, CU13
from polars_async.gpu.visible import BUS_ORDER, DEVICE_ORDER, VISIBLE_DEVICES, counts_by_bus
from polars_async.reasons import Diagnosis, Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polars_async.gpu.cudf import CudfPolars
    from polars_async.gpu.nvml import Host, HostDevice
    from polars_async.gpu.visible import Visibility


def diagnose_device(device: HostDevice, cudf: CudfPolars) -> Diagnosis | None:
    """Return what rules out a GPU in itself, visible or not."""
    if device.diagnosis is not None:
        return device.diagnosis
    actual, needed = device.compute_capability, cudf.build.compute_capability
    if actual is not None and actual < needed:
        return Diagnosis(
            Reason.COMPUTE_CAPABILITY,
            f"{device} has compute capability {_dotted(actual)} and {cudf.build.name} needs "
            f"{_dotted(needed)} or newer",
            f"install {CU12.name}"
            if actual >= CU12.compute_capability
            else "use a newer GPU, or the CPU",
        )
    if device.compute_prohibited:
        return Diagnosis(
            Reason.COMPUTE_PROHIBITED,
            f"the compute mode of {device} is Prohibited",
            f"set it back with nvidia-smi -i {device.index} -c DEFAULT",
        )
    if device.mig_enabled and device.mig_instances == ():
        return Diagnosis(
            Reason.MIG_WITHOUT_INSTANCE,
            f"{device} is in MIG mode and has no MIG instance",
            f"create one with nvidia-smi mig -i {device.index} -cgi PROFILE -C, or leave the mode "
            f"with nvidia-smi -i {device.index} -mig 0",
        )
    return None


def diagnose_hidden(device: HostDevice, visibility: Visibility) -> Diagnosis:
    """Return the diagnosis of a GPU that CUDA_VISIBLE_DEVICES hides."""
    cause = f"{VISIBLE_DEVICES}={visibility.devices!r} hides {device}"
    return Diagnosis(Reason.DEVICES_HIDDEN, cause, how_to_select(device))


def how_to_select(device: HostDevice) -> str:
    """Return what to set to have cudf-polars select a GPU, however CUDA numbers the GPUs."""
    if device.uuid is None:
        return f"set {DEVICE_ORDER}={BUS_ORDER} and {VISIBLE_DEVICES}={device.index} to use it"
    return f"set {VISIBLE_DEVICES}={device.uuid} to use {device}"


def same_order(devices: Sequence[HostDevice], visibility: Visibility) -> bool:
    """Return whether the first entry of CUDA_VISIBLE_DEVICES is the same GPU to CUDA and NVML."""
    return counts_by_bus(devices, visibility) or not visibility.first.isdecimal()


def diagnose_order(
    devices: Sequence[HostDevice], selected: HostDevice, visibility: Visibility, cudf: CudfPolars
) -> Diagnosis | None:
    """
    Return a diagnosis if CUDA's order has it use a GPU that is not the selected one, and too old.

    cudf-polars reads an index as NVML's, which counts by PCI bus. CUDA counts the fastest GPU
    first, unless the environment says otherwise. NVML does not know that order: compute capability
    stands in for speed, and equal GPUs stay in the order of the bus.
    """
    if same_order(devices, visibility):
        return None
    fastest_first = sorted(
        devices, key=lambda each: each.compute_capability or (0, 0), reverse=True
    )
    diagnosis = diagnose_device(fastest_first[selected.index], cudf)
    if diagnosis is None or diagnosis.reason is not Reason.COMPUTE_CAPABILITY:
        return None
    return Diagnosis(
        Reason.AMBIGUOUS_DEVICE_ORDER,
        "CUDA counts the fastest GPU first and cudf-polars counts by PCI bus, "
        f"and {diagnosis.cause}",
        f"set {DEVICE_ORDER}={BUS_ORDER} to use {selected}",
    )


def usable(
    devices: Sequence[HostDevice],
    selected: HostDevice | Diagnosis,
    visibility: Visibility,
    cudf: CudfPolars,
) -> str:
    """Return the message that says on which GPU queries run, where nothing rules it out."""
    if same_order(devices, visibility):
        return f"queries run on {selected}, through {cudf}"
    return (
        f"queries run through {cudf} on what CUDA counts as GPU {visibility.first}, the fastest "
        f"first: set {DEVICE_ORDER}={BUS_ORDER} to use {selected}"
    )


def diagnose_driver(host: Host, cudf: CudfPolars) -> Diagnosis | None:
    """Return a diagnosis if the driver is too old; one of unknown CUDA version passes."""
    actual, needed = host.cuda_version, cudf.build.cuda_version
    if actual is None or actual >= needed:
        return None
    return Diagnosis(
        Reason.DRIVER_TOO_OLD,
        f"the driver supports CUDA {_dotted(actual)} and {cudf.build.name} needs "
        f"{_dotted(needed)} or newer",
        f"update the driver or install {CU12.name}"
        if actual >= CU12.cuda_version
        else "update the driver",
    )


def diagnose_missing(host: Host, selected: HostDevice) -> Diagnosis:
    """Return the diagnosis of a missing cudf-polars, with the build for a GPU and its driver."""
    newer = (host.cuda_version or (0, 0)) >= CU13.cuda_version and (
        selected.compute_capability or (0, 0)
    ) >= CU13.compute_capability
    extra = "gpu-cu13" if newer else "gpu-cu12"
    return Diagnosis(
        Reason.CUDF_MISSING,
        "cudf-polars is not installed",
        f"install polars-async[{extra}], which installs a Polars that cudf-polars supports too",
    )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
