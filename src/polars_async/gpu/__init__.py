"""Whether the GPU engine can run here, and if not, why not and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polars_async.gpu.status import GpuStatus


def gpu_status(*, refresh: bool = False) -> GpuStatus:
    """
    Return whether the GPU engine can run in this process, and if not, why.

    NVML is asked once in a process; its answers are judged anew when ``CUDA_VISIBLE_DEVICES`` or
    ``CUDA_DEVICE_ORDER`` changes, when ``cudf_polars`` is imported and when its import fails.
    cudf-polars is looked for, never imported, and CUDA is not loaded. The first call takes as long
    as NVML does (milliseconds; seconds where the driver has to wake up), later ones microseconds.

    Parameters
    ----------
    refresh
        Ask NVML again, look for cudf-polars again, and forget that its import has failed.

    Returns
    -------
    GpuStatus
        No failure of NVML is raised: each is a reason.

    Examples
    --------
    >>> import polars_async as pa
    >>> status = pa.gpu_status()
    >>> status.usable or status.message  # doctest: +SKIP
    'cudf-polars is not installed: install polars-async[gpu-cu13], which installs a Polars that ...'
    """
    # Not at import: most programs never ask for a GPU.
    from polars_async.gpu.probe import probe  # noqa: PLC0415

    return probe.status(refresh=refresh)
