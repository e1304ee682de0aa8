"""Which GPUs CUDA_VISIBLE_DEVICES shows, and which one cudf-polars selects; NVML ignores it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from polars_async.gpu.nvml import NO_DEVICE
from polars_async.reasons import Diagnosis, Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polars_async.gpu.nvml import HostDevice

VISIBLE_DEVICES: Final = "CUDA_VISIBLE_DEVICES"
DEVICE_ORDER: Final = "CUDA_DEVICE_ORDER"

BUS_ORDER: Final = "PCI_BUS_ID"

_HIDE_ALL: Final = ("", "-1", "NoDevFiles")


class Visibility(NamedTuple):
    """The two variables, as they are now."""

    devices: str | None
    order: str | None

    @classmethod
    def now(cls) -> Visibility:
        """Read them from the environment."""
        return cls(os.environ.get(VISIBLE_DEVICES), os.environ.get(DEVICE_ORDER))

    @property
    def first(self) -> str:
        """The first entry, which cudf-polars selects."""
        return "0" if self.devices is None else self.devices.split(",", 1)[0]

    def entry(self, number: int) -> str:
        """Return the entry of the GPU to which CUDA gives `number`; empty if there is none."""
        if self.devices is None:
            return str(number)
        return "".join(self.devices.split(",")[number : number + 1]).strip()


def find_selected(devices: Sequence[HostDevice], visibility: Visibility) -> HostDevice | Diagnosis:
    """
    Return the GPU that cudf-polars 26.10 selects, or why it selects none.

    That is the first entry, as it stands: digits are NVML's index, all else a whole UUID. CUDA
    accepts more (the first letters of a UUID, spaces), with which cudf-polars fails.
    """
    if not devices:
        return NO_DEVICE
    entry = visibility.first
    if entry in _HIDE_ALL:
        cause = f"{VISIBLE_DEVICES}={visibility.devices!r} hides every GPU"
        return Diagnosis(
            Reason.DEVICES_HIDDEN, cause, f"unset it, or set it to {_entries(devices)}"
        )
    if _named(devices, entry.strip()) is not None and not shown(devices, visibility):
        cause = f"{VISIBLE_DEVICES}={visibility.devices!r} names a GPU twice, and so hides them all"
        return Diagnosis(Reason.DEVICES_HIDDEN, cause, "name each GPU once")
    for device in devices:
        if entry == device.uuid or entry in (device.mig_instances or ()):
            return device
    if entry.isdecimal() and int(entry) < len(devices):
        return devices[int(entry)]
    return _unlisted_instance(devices, entry) or _diagnose_invalid(devices, entry)


def shown(devices: Sequence[HostDevice], visibility: Visibility) -> Sequence[HostDevice]:
    """
    Return the GPUs that CUDA shows: entry by entry, up to the first one that names none.

    An entry that is repeated before that hides them all.
    """
    if visibility.devices is None:
        return devices
    visible: dict[str | int, HostDevice] = {}
    for entry in map(str.strip, visibility.devices.split(",")):
        device = _named(devices, entry)
        if device is None:
            break
        key = entry if entry.startswith("MIG-") else device.index
        if key in visible:
            return []
        visible[key] = device
    return list(visible.values())


def counts_by_bus(devices: Sequence[HostDevice], visibility: Visibility) -> bool:
    """Return whether CUDA counts the GPUs as NVML does, so that an index means the same to both."""
    return visibility.order == BUS_ORDER or len({each.name for each in devices}) == 1


def numbers(devices: Sequence[HostDevice], visibility: Visibility) -> dict[int, int]:
    """Return the number that CUDA gives to each GPU, by its index, where that can be known."""
    counted: dict[int, int] = {}
    by_bus = counts_by_bus(devices, visibility)
    for number, device in enumerate(shown(devices, visibility)):
        if by_bus or not visibility.entry(number).isdecimal():
            counted.setdefault(device.index, number)  # CUDA uses no second instance of a GPU
    return counted


def _named(devices: Sequence[HostDevice], entry: str) -> HostDevice | None:
    """Return the GPU that an entry names to CUDA, which accepts the first letters of a UUID too."""
    if entry.isdecimal():
        return devices[int(entry)] if int(entry) < len(devices) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    matches = [
        device
        for device in devices
        for uuid in (device.uuid, *(device.mig_instances or ()))
        if uuid is not None and uuid.startswith(entry)
    ]
    return matches[0] if len(matches) == 1 else _unlisted_instance(devices, entry)


def _unlisted_instance(devices: Sequence[HostDevice], entry: str) -> HostDevice | None:
    """Return the first GPU in MIG mode whose instances NVML does not list: `entry` may be there."""
    if not entry.startswith("MIG-"):
        return None
    unlisted = (each for each in devices if each.mig_enabled and each.mig_instances is None)
    return next(unlisted, None)


def _diagnose_invalid(devices: Sequence[HostDevice], entry: str) -> Diagnosis:
    named = _named(devices, entry.strip())
    if named is None:
        cause = f"{VISIBLE_DEVICES} begins with {entry!r}, and the driver lists no such GPU"
        remedy = f"set it to {_entries(devices)}"
    else:
        cause = f"{VISIBLE_DEVICES} begins with {entry!r}, which cudf-polars does not accept"
        whole = (named.uuid, *(named.mig_instances or ()))
        uuids = [each for each in whole if each is not None and each.startswith(entry.strip())]
        remedy = f"set it to {uuids[0] if uuids else named.index} for {named}"
    return Diagnosis(Reason.INVALID_VISIBLE_DEVICES, cause, remedy)


def _entries(devices: Sequence[HostDevice]) -> str:
    last = len(devices) - 1
    return f"an index (0 to {last}) or a full UUID" if last else "0"
