"""Why a query does not run on the engine that was asked for."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Reason(enum.StrEnum):
    """What explains a `Resolution`, a `GpuStatus` or a `GpuSupport`; each is its own name."""

    ASYNC_PATH = "async-path"
    """GPU execution is switched off on the async path, as Polars documents."""
    BACKGROUND_PATH = "background-path"
    """GPU execution is switched off for background queries."""
    BATCHES_PATH = "batches-path"
    """GPU execution is switched off for queries collected in batches."""
    UNKNOWN_AFFINITY = "unknown-affinity"
    """POLARS_ENGINE_AFFINITY names no engine."""

    NO_LIBRARY = "no-library"
    """A library of the NVIDIA driver, or the Python package that asks it, was not found."""
    NO_DRIVER = "no-driver"
    """The driver's library is there, and its kernel module is not loaded."""
    NO_PERMISSION = "no-permission"
    """This process may not ask the driver, or not about the GPU that it would use."""
    DRIVER_MISMATCH = "driver-mismatch"
    """The driver's library and its kernel module are of different versions."""
    GPU_LOST = "gpu-lost"
    """The GPU has fallen off the bus."""
    NVML_ERROR = "nvml-error"
    """NVML failed in another way; the message holds its own words."""
    NO_DEVICE = "no-device"
    """The driver runs, and lists no GPU."""

    DEVICES_HIDDEN = "devices-hidden"
    """CUDA_VISIBLE_DEVICES hides every GPU, or the one that the reason belongs to."""
    INVALID_VISIBLE_DEVICES = "invalid-visible-devices"
    """The first entry of CUDA_VISIBLE_DEVICES names no GPU in a way that cudf-polars can take."""
    AMBIGUOUS_DEVICE_ORDER = "ambiguous-device-order"
    """CUDA and NVML number the GPUs differently: CUDA would take one that is ruled out, or it is
    not known which one a number means."""
    UNKNOWN_DEVICE = "unknown-device"
    """The number that ``pl.GPUEngine(device=...)`` asks for is that of no visible GPU."""
    COMPUTE_CAPABILITY = "compute-capability"
    """The GPU's compute capability is too low for the installed cudf-polars."""
    COMPUTE_PROHIBITED = "compute-prohibited"
    """The GPU's compute mode prohibits computing."""
    MIG_WITHOUT_INSTANCE = "mig-without-instance"
    """The GPU is in MIG mode, and has no instance that could compute."""
    DRIVER_TOO_OLD = "driver-too-old"
    """The driver's CUDA version is too old for the installed cudf-polars."""

    CUDF_MISSING = "cudf-missing"
    """cudf-polars is not installed."""
    CUDF_INCOMPATIBLE = "cudf-incompatible"
    """The installed cudf-polars does not support the installed Polars."""
    CUDF_BROKEN = "cudf-broken"
    """cudf-polars is installed, and cannot be imported."""

    UNSUPPORTED_QUERY = "unsupported-query"
    """The GPU engine does not support an operation of the query."""
    TRANSLATION_FAILED = "translation-failed"
    """The GPU engine failed to translate the query, or its private translator is gone."""
    GPU_NEEDED = "gpu-needed"
    """cudf-polars has to ask the GPU whether it supports the query, and fails."""
    OUT_OF_MEMORY = "out-of-gpu-memory"
    """The memory of the GPU did not suffice for the query."""
    CUDA_ERROR = "cuda-error"
    """CUDA, or the driver, failed while the query ran."""
    GPU_FAILED = "gpu-failed"
    """The GPU engine failed in another way while the query ran."""
    GPU_RESTS = "gpu-rests"
    """The GPU has failed several times in a row, and is left alone for a while."""


class Fault(NamedTuple):
    """What rules a GPU out: the reason, what was needed and found, and what to do about it."""

    reason: Reason
    cause: str
    remedy: str

    @property
    def message(self) -> str:
        """One sentence, to stand alone or after ``the GPU engine was asked for, but``."""
        return f"{self.cause}: {self.remedy}"
