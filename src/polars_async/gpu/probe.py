"""NVML's facts, asked for once, and the status that follows from them."""

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
from polars_async.gpu.visible import Visibility, numbers, selected, shown
from polars_async.reasons import Diagnosis

if TYPE_CHECKING:
    from polars_async.gpu.cudf import CudfPolars


class Probe:
    """The process's own answer to whether the GPU engine can run."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._host: Host | None = None
        self._override: Host | None = None
        self._judged: tuple[object, GpuStatus] | None = None

    def status(self, *, refresh: bool) -> GpuStatus:
        """See `polars_async.gpu_status`."""
        judged = self._judged
        if judged is not None and not refresh and judged[0] == _circumstances():
            return judged[1]
        with self._lock:
            return self._judge(refresh=refresh)

    def override(self, host: Host | None) -> Host | None:
        """
        Judge a host that is not there, for `polars_async.testing`.

        Parameters
        ----------
        host
            What NVML is taken to have said; None asks NVML itself again.

        Returns
        -------
        Host or None
            The stand-in that was in place before, to put it back.
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
        # Another thread may have judged while this one waited for the lock.
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
    """Everything that may change the status while NVML's facts stay the same."""
    return (*Visibility.now(), imported(), import_failure(), overridden())


def _status(host: Host, visibility: Visibility, cudf: CudfPolars) -> GpuStatus:
    diagnoses = [requirements.diagnose_device(each, cudf) for each in host.devices]
    choice = selected(host.devices, visibility)
    pick = choice if isinstance(choice, HostDevice) else None
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
                pick,
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
    """Find the first thing that rules out the GPU that cudf-polars would take."""
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
        return own if other is None else own._replace(remedy=requirements.take(other))
    return (
        requirements.diagnose_order(host.devices, choice, visibility, cudf)
        or requirements.diagnose_driver(host, cudf)
        or cudf.diagnosis
        or (None if cudf.installed else requirements.diagnose_missing(host, choice))
    )


def _device(
    device: HostDevice, diagnosis: Diagnosis | None, pick: HostDevice | None, number: int | None
) -> GpuDevice:
    if diagnosis is not None:
        message = diagnosis.message
    elif device is pick:
        message = f"cudf-polars takes {device}"
    else:
        found = "no GPU" if pick is None else str(pick)
        message = f"cudf-polars takes {found}: {requirements.take(device)}"
    return GpuDevice(
        index=device.index,
        uuid=device.uuid,
        name=device.name,
        compute_capability=device.compute_capability,
        memory_total=device.memory_total,
        memory_free=device.memory_free,
        number=number,
        selected=device is pick,
        usable=diagnosis is None,
        reason=None if diagnosis is None else diagnosis.reason,
        message=message,
    )
