"""The status of the GPU engine, from NVML's facts, which are asked for once in a process."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from polars_async._runtime.fork import new_lock
from polars_async.gpu import requirements
from polars_async.gpu.cudf import (
    find_cudf_polars,
    forget_import_failure,
    import_failure,
    imported,
    overridden,
)
from polars_async.gpu.nvml import Host, HostDevice, read_host
from polars_async.gpu.status import GpuDevice, GpuStatus
from polars_async.gpu.visible import Visibility, find_selected, numbers, shown
from polars_async.reasons import Diagnosis

if TYPE_CHECKING:
    from polars_async.gpu.cudf import CudfPolars


class Probe:
    """The status of the GPU engine in this process, with NVML's facts and the last status kept."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._host: Host | None = None
        self._override: Host | None = None
        self._judged: tuple[object, GpuStatus] | None = None

    def status(self, *, refresh: bool) -> GpuStatus:
        """See `polars_async.gpu_status`."""
        judged = self._judged  # read once, without the lock: other threads replace it as a whole
        if judged is not None and not refresh and judged[0] == _circumstances():
            return judged[1]
        with self._lock:
            return self._judge(refresh=refresh)

    def override(self, host: Host | None) -> Host | None:
        """
        Use `host` in place of NVML's facts, for `polars_async.testing`; None for NVML again.

        Returns
        -------
        Host or None
            The one that was used before, to restore it.
        """
        with self._lock:
            before, self._override = self._override, host
            self._judged = None
        return before

    def _judge(self, *, refresh: bool) -> GpuStatus:
        if refresh:
            self._host = None
            forget_import_failure()
            importlib.invalidate_caches()
        circumstances = _circumstances()
        # Another thread may have done this while this one waited for the lock.
        if self._judged is not None and not refresh and self._judged[0] == circumstances:
            return self._judged[1]
        host = self._override
        if host is None:
            host = self._host = self._host or read_host()
        status = _status(host, Visibility.now(), find_cudf_polars())
        self._judged = circumstances, status
        return status


probe: Final = Probe()


def _circumstances() -> tuple[object, ...]:
    """Return all that may change the status while NVML's facts stay the same."""
    return (*Visibility.now(), imported(), import_failure(), overridden())


def _status(host: Host, visibility: Visibility, cudf: CudfPolars) -> GpuStatus:
    diagnoses = [requirements.diagnose_device(each, cudf) for each in host.devices]
    choice = find_selected(host.devices, visibility)
    selected = choice if isinstance(choice, HostDevice) else None
    diagnosis = _diagnose(host, choice, diagnoses, visibility, cudf)
    visible = shown(host.devices, visibility)
    counted = numbers(host.devices, visibility)
    devices = zip(host.devices, diagnoses, strict=True)
    return GpuStatus(
        usable=diagnosis is None,
        reason=None if diagnosis is None else diagnosis.reason,
        message=requirements.usable(host.devices, choice, visibility, cudf)
        if diagnosis is None
        else diagnosis.message,
        devices=tuple(
            _device(
                each,
                own
                or (None if each in visible else requirements.diagnose_hidden(each, visibility)),
                selected,
                counted.get(each.index),
            )
            for each, own in devices
        ),
        driver_version=host.driver_version,
        cuda_version=host.cuda_version,
        cudf_polars_version=cudf.version,
    )


def _diagnose(
    host: Host,
    choice: HostDevice | Diagnosis,
    diagnoses: list[Diagnosis | None],
    visibility: Visibility,
    cudf: CudfPolars,
) -> Diagnosis | None:
    """Return the first diagnosis that rules out the GPU that cudf-polars would select."""
    if host.diagnosis is not None:
        return host.diagnosis
    if isinstance(choice, Diagnosis):
        return choice
    own = diagnoses[choice.index]
    if own is not None:
        sound = (
            each
            for each, diagnosis in zip(host.devices, diagnoses, strict=True)
            if diagnosis is None
        )
        other = next(sound, None)
        return own if other is None else own._replace(remedy=requirements.how_to_select(other))
    return (
        requirements.diagnose_order(host.devices, choice, visibility, cudf)
        or requirements.diagnose_driver(host, cudf)
        or cudf.diagnosis
        or (None if cudf.installed else requirements.diagnose_missing(host, choice))
    )


def _device(
    device: HostDevice, diagnosis: Diagnosis | None, selected: HostDevice | None, number: int | None
) -> GpuDevice:
    if diagnosis is not None:
        message = diagnosis.message
    elif device is selected:
        message = f"cudf-polars selects {device}"
    else:
        other = "no GPU" if selected is None else str(selected)
        message = f"cudf-polars selects {other}: {requirements.how_to_select(device)}"
    return GpuDevice(
        index=device.index,
        uuid=device.uuid,
        name=device.name,
        compute_capability=device.compute_capability,
        memory_total=device.memory_total,
        memory_free=device.memory_free,
        number=number,
        selected=device is selected,
        usable=diagnosis is None,
        reason=None if diagnosis is None else diagnosis.reason,
        message=message,
    )
