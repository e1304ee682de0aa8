"""The driver and the GPUs of this host as NVML lists them, before they are judged."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from polars_async.reasons import Diagnosis, Reason

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

# nvmlReturn_t by value, since the names for them depend on the version of pynvml.
_NOT_SUPPORTED: Final = 3
_NO_PERMISSION: Final = 4
_NOT_FOUND: Final = 6
_LIBRARY_NOT_FOUND: Final = 12
_GPU_IS_LOST: Final = 15

_MIG_ENABLED: Final = 1
_COMPUTE_PROHIBITED: Final = 2

_DIAGNOSES: Final = {
    _NO_PERMISSION: Diagnosis(
        Reason.NO_PERMISSION,
        "this process has no permission to ask the NVIDIA driver",
        "give its user access to /dev/nvidiactl and /dev/nvidia*",
    ),
    9: Diagnosis(
        Reason.NO_DRIVER,
        "the NVIDIA driver is installed and its kernel module is not loaded",
        "load it with modprobe nvidia, or give the container GPU access",
    ),
    _LIBRARY_NOT_FOUND: Diagnosis(
        Reason.NO_LIBRARY,
        "the NVIDIA driver's library libnvidia-ml.so.1 was not found",
        "install the NVIDIA driver, or give the container GPU access",
    ),
    _GPU_IS_LOST: Diagnosis(
        Reason.GPU_LOST,
        "the NVIDIA driver has lost a GPU, which is no longer reachable on its bus",
        "reset that GPU or restart the machine",
    ),
    17: Diagnosis(
        Reason.NO_PERMISSION,
        "the operating system or its cgroups bar this process from the NVIDIA driver",
        "give the container GPU access",
    ),
    18: Diagnosis(
        Reason.DRIVER_MISMATCH,
        "the NVIDIA driver's library and its loaded kernel module are of different versions",
        "restart the machine, or reload the kernel module",
    ),
    28: Diagnosis(
        Reason.NO_DEVICE,
        "the NVIDIA driver lists no GPU",
        "run on a machine with an NVIDIA GPU, or give the container access to one",
    ),
}
NO_DEVICE: Final = _DIAGNOSES[28]
NO_LIBRARY: Final = _DIAGNOSES[_LIBRARY_NOT_FOUND]
_LOOK_CLOSER: Final = "look into nvidia-smi and the kernel's log for the cause"
_NOT_LINUX: Final = Diagnosis(
    Reason.CUDF_MISSING,
    f"cudf-polars, which is the GPU engine, needs Linux, and this is {sys.platform}",
    "run the program on Linux, such as that of WSL 2 on Windows",
)
_NO_PYNVML: Final = Diagnosis(
    Reason.NO_LIBRARY,
    "the Python package nvidia-ml-py, which asks the NVIDIA driver, cannot be imported",
    "install nvidia-ml-py",
)
_NO_LIBCUDA: Final = Diagnosis(
    Reason.NO_LIBRARY,
    "the NVIDIA driver's library libcuda.so.1 was not found",
    "install all of the driver, or start the container with "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostDevice:
    """One GPU as NVML lists it; a fact that NVML does not tell is None."""

    index: int
    uuid: str | None = None
    name: str | None = None
    compute_capability: tuple[int, int] | None = None
    memory_total: int | None = None
    memory_free: int | None = None
    compute_prohibited: bool = False
    mig_enabled: bool = False
    mig_instances: tuple[str, ...] | None = None
    diagnosis: Diagnosis | None = None

    def __str__(self) -> str:
        return f"GPU {self.index}" if self.name is None else f"GPU {self.index} ({self.name})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host's driver and GPUs, and what rules out all of them."""

    devices: tuple[HostDevice, ...] = ()
    driver_version: str | None = None
    cuda_version: tuple[int, int] | None = None
    diagnosis: Diagnosis | None = None


def read_host() -> Host:
    """Ask NVML for all facts; NVML is shut down after that, and its errors become diagnoses."""
    if sys.platform != "linux":
        return Host(diagnosis=_NOT_LINUX)
    try:
        import pynvml  # noqa: PLC0415  # not before the program asks for a GPU
    except ImportError:
        return Host(diagnosis=_NO_PYNVML)
    nvml: ModuleType = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Host(diagnosis=_diagnose(error))
    try:
        return _read_host(nvml)
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _read_host(nvml: ModuleType) -> Host:
    driver_version = _text(_ask(nvml, nvml.nvmlSystemGetDriverVersion))
    try:
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        return Host(driver_version=driver_version, diagnosis=_diagnose(error))
    cuda_version, diagnosis = _cuda_version(nvml)
    return Host(
        devices=tuple(_read_device(nvml, index) for index in range(count)),
        driver_version=driver_version,
        cuda_version=cuda_version,
        diagnosis=diagnosis,
    )


def _cuda_version(nvml: ModuleType) -> tuple[tuple[int, int] | None, Diagnosis | None]:
    """Ask for the newest CUDA that the driver runs; NVML asks libcuda.so.1 for it."""
    try:
        version: int = nvml.nvmlSystemGetCudaDriverVersion_v2()
    except nvml.NVMLError as error:
        return None, _NO_LIBCUDA if error.value == _LIBRARY_NOT_FOUND else None
    return (version // 1000, version % 1000 // 10), None


def _read_device(nvml: ModuleType, index: int) -> HostDevice:
    try:
        return _read_handle(nvml, index, nvml.nvmlDeviceGetHandleByIndex(index))
    except nvml.NVMLError as error:
        return HostDevice(index=index, diagnosis=_diagnose_device(error, index))


def _read_handle(nvml: ModuleType, index: int, handle: object) -> HostDevice:
    name = _text(_ask(nvml, nvml.nvmlDeviceGetName, handle))
    total, free, diagnosis = _memory(nvml, index, handle)
    mig_mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    mig_enabled = mig_mode is not None and mig_mode[0] == _MIG_ENABLED
    return HostDevice(
        index=index,
        uuid=_text(_ask(nvml, nvml.nvmlDeviceGetUUID, handle)),
        name=name,
        compute_capability=_ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle),
        memory_total=total,
        memory_free=free,
        compute_prohibited=_ask(nvml, nvml.nvmlDeviceGetComputeMode, handle) == _COMPUTE_PROHIBITED,
        mig_enabled=mig_enabled,
        mig_instances=_mig_instances(nvml, handle) if mig_enabled else None,
        diagnosis=diagnosis,
    )


def _memory(
    nvml: ModuleType, index: int, handle: object
) -> tuple[int | None, int | None, Diagnosis | None]:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        if error.value == _NOT_SUPPORTED:
            return None, None, None
        if error.value != _NO_PERMISSION:
            raise
        # cudf-polars 26.10 asks the same of the whole GPU, in MIG mode too, and handles no other
        # error than the first one above: where this is refused, every query fails
        # (NVIDIA/cudf#22388).
        cause = f"NVML does not tell cudf-polars the memory of GPU {index} ({error})"
        remedy = "give this process access to the whole GPU, not to a MIG instance of it"
        return None, None, Diagnosis(Reason.NO_PERMISSION, cause, remedy)
    return memory.total, memory.free, None


def _mig_instances(nvml: ModuleType, handle: object) -> tuple[str, ...] | None:
    """Return the UUIDs of a GPU's MIG instances; None where NVML does not list them."""
    slots: int | None = _ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle)
    if slots is None:
        return None
    uuids: list[str] = []
    refused = False
    for slot in range(slots):
        try:
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot)
        except nvml.NVMLError as error:
            refused = refused or error.value != _NOT_FOUND
            continue
        uuid = _text(_ask(nvml, nvml.nvmlDeviceGetUUID, instance))
        if uuid is not None:
            uuids.append(uuid)
        else:
            refused = True
    return None if refused and not uuids else tuple(uuids)


def _ask(nvml: ModuleType, question: Callable[..., Any], *about: object) -> Any:
    """Return one fact, or None where NVML does not tell; raise the error of a lost GPU."""
    try:
        return question(*about)
    except nvml.NVMLError as error:
        if error.value == _GPU_IS_LOST:
            raise
        return None


def _text(value: str | bytes | None) -> str | None:
    """Return `value` as text: some versions of pynvml return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _diagnose(error: Any) -> Diagnosis:
    """Return the diagnosis for an NVMLError that rules out every GPU."""
    return _DIAGNOSES.get(error.value) or Diagnosis(
        Reason.NVML_ERROR,
        f"NVML, the NVIDIA driver's library, fails ({error}, error {error.value})",
        _LOOK_CLOSER,
    )


def _diagnose_device(error: Any, index: int) -> Diagnosis:
    """Return the diagnosis for an NVMLError that rules out one GPU."""
    known = _DIAGNOSES.get(error.value)
    return Diagnosis(
        known.reason if known else Reason.NVML_ERROR,
        f"NVML cannot read GPU {index} ({error}, error {error.value})",
        known.remedy if known else _LOOK_CLOSER,
    )
