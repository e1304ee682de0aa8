"""The reasons why a query does not run on the engine that was asked for."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Reason(enum.StrEnum):
    """Why a `Resolution`, a `GpuStatus` or a `GpuSupport` is not a yes; its value is its name."""

    ASYNC_PATH = "async_path"
    """GPU execution is switched off on the async path, as Polars documents."""
    BACKGROUND_PATH = "background_path"
    """GPU execution is switched off for background queries."""
    BATCHES_PATH = "batches_path"
    """GPU execution is switched off for queries collected in batches."""
    UNKNOWN_AFFINITY = "unknown_affinity"
    """POLARS_ENGINE_AFFINITY names no engine."""

    NO_LIBRARY = "no_library"
    """A library of the NVIDIA driver, or the Python package that calls it, was not found."""
    NO_DRIVER = "no_driver"
    """The driver's library is installed, and its kernel module is not loaded."""
    NO_PERMISSION = "no_permission"
    """This process may not ask the driver, or not about the GPU that it would use."""
    DRIVER_MISMATCH = "driver_mismatch"
    """The driver's library and its kernel module are of different versions."""
    GPU_LOST = "gpu_lost"
    """The GPU has fallen off the bus."""
    NVML_ERROR = "nvml_error"
    """NVML failed in another way; the message holds its own words."""
    NO_DEVICE = "no_device"
    """The driver runs, and lists no GPU."""

    DEVICES_HIDDEN = "devices_hidden"
    """CUDA_VISIBLE_DEVICES hides every GPU, or the GPU that has this reason."""
    INVALID_VISIBLE_DEVICES = "invalid_visible_devices"
    """The first entry of CUDA_VISIBLE_DEVICES names no GPU in a way that cudf-polars accepts."""
    AMBIGUOUS_DEVICE_ORDER = "ambiguous_device_order"
    """CUDA and NVML number the GPUs differently, so that CUDA would use one that is ruled out, or
    that it is unknown which GPU a number means."""
    UNKNOWN_DEVICE = "unknown_device"
    """No visible GPU has the number in ``pl.GPUEngine(device=...)``."""
    COMPUTE_CAPABILITY = "compute_capability"
    """The GPU's compute capability is too low for the installed cudf-polars."""
    COMPUTE_PROHIBITED = "compute_prohibited"
    """The GPU's compute mode prohibits computing."""
    MIG_WITHOUT_INSTANCE = "mig_without_instance"
    """The GPU is in MIG mode, and has no instance that could compute."""
    DRIVER_TOO_OLD = "driver_too_old"
    """The driver's CUDA version is too old for the installed cudf-polars."""

    CUDF_MISSING = "cudf_missing"
    """cudf-polars is not installed."""
    CUDF_INCOMPATIBLE = "cudf_incompatible"
    """The installed cudf-polars does not support the installed Polars."""
    CUDF_BROKEN = "cudf_broken"
    """cudf-polars is installed, and cannot be imported."""

    UNSUPPORTED_QUERY = "unsupported_query"
    """The GPU engine does not support an operation of the query."""
    TRANSLATION_FAILED = "translation_failed"
    """The GPU engine failed to translate the query, or its private translator is gone."""
    GPU_NEEDED = "gpu_needed"
    """cudf-polars has to ask the GPU whether it supports the query, and cannot."""
    OUT_OF_MEMORY = "out_of_gpu_memory"
    """The memory of the GPU did not suffice for the query."""
    CUDA_ERROR = "cuda_error"
    """CUDA, or the driver, failed while the query ran."""
    GPU_FAILED = "gpu_failed"
    """The GPU engine failed in another way while the query ran."""
    GPU_COOLDOWN = "gpu_cooldown"
    """The GPU has failed several times in a row, and no query tries it until its cooldown ends."""


class Diagnosis(NamedTuple):
    """What rules a GPU out: the reason, its cause in words, and the remedy."""

    reason: Reason
    cause: str
    remedy: str

    @property
    def message(self) -> str:
        """Cause and remedy in one sentence; it can follow ``the GPU engine was asked for, but``."""
        return f"{self.cause}: {self.remedy}"
