"""The facts of this host: its GPUs, its libraries, the data."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import polars as pl

import polars_async as pa
from benchmarks.gpu.findings import tell, telling, told
from benchmarks.measure.workloads import resident
from benchmarks.pdsh import data

if TYPE_CHECKING:
    from benchmarks.gpu.findings import Settings
    from polars_async.testing import SimulatedGpu

_LIBRARIES: Final = ("cuda-", "cudf", "libcudf", "nvidia-", "polars", "pylibcudf", "rapids", "rmm")
_VARIABLES: Final = ("CUDA_", "CUDF_", "KVIKIO_", "LIBCUDF_", "POLARS_", "RAPIDSMPF_", "RMM_")
_POLICIES: Final[tuple[Literal["downgrade", "offload", "require"], ...]] = (
    "downgrade",
    "offload",
    "require",
)


async def facts(_settings: Settings, _gpu: SimulatedGpu | None) -> None:
    """Report what `gpu_status` and `resolve_engine` return, and the versions of all libraries."""
    status = pa.gpu_status()
    tell("usable", status.message, ok=status.usable, status=asdict(status))
    tell("driver", f"{status.driver_version}, CUDA {_dotted(status.cuda_version)}")
    for device in status.devices:
        tell(f"GPU {device.index}", _device(device))
    tell("Python", f"{platform.python_version()}, {platform.platform()}")
    tell("processors, memory", f"{len(os.sched_getaffinity(0))}, {_gib(_host_memory())}")
    tell("Polars", f"{pl.__version__}, {pl.thread_pool_size()} threads")
    installed = {f"{each.name} {each.version}" for each in importlib.metadata.distributions()}
    found = sorted(each for each in installed if each.startswith(_LIBRARIES))
    tell("distributions", ", ".join(found) or "none")
    variables = [f"{key}={os.environ[key]}" for key in os.environ if key.startswith(_VARIABLES)]
    tell("environment", ", ".join(sorted(variables)) or "nothing set")
    for policy in _POLICIES:
        what = f"resolve_engine('gpu', gpu={policy!r})"
        try:
            resolution = pa.resolve_engine("gpu", gpu=policy)
        except pa.EngineUnavailableError as error:
            tell(what, f"raised {told(error)}", ok=False if status.usable else None)
        else:
            wanted = "gpu" if status.usable and policy != "downgrade" else "in-memory"
            tell(what, resolution.message, ok=resolution.name == wanted)
    with telling("import of cudf_polars"):
        before, begun = resident(), time.perf_counter()
        importlib.import_module("cudf_polars")
        seconds = time.perf_counter() - begun
        tell("import of cudf_polars", f"{seconds:.2f} s, {resident() - before:.0f} MB more memory")


def _device(device: pa.GpuDevice) -> str:
    return ", ".join(
        (
            f"{device.name}",
            f"{device.uuid}",
            f"compute capability {_dotted(device.compute_capability)}",
            f"{_gib(device.memory_total)}, {_gib(device.memory_free)} of it free",
            "selected" if device.selected else "not selected",
            device.message,
        )
    )


def _dotted(version: tuple[int, ...] | None) -> str:
    return "unknown" if version is None else ".".join(map(str, version))


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


async def make_data(settings: Settings, _gpu: SimulatedGpu | None) -> None:
    """Make the data of one scale, so that other checks find it made."""
    begun = time.perf_counter()
    folder = data.make(settings.scale, Path(settings.data))
    seconds = time.perf_counter() - begun
    size = sum(file.stat().st_size for file in folder.iterdir())
    tell("data", f"{size / 1e6:.0f} MB, {seconds:.1f} s", ok=True)
