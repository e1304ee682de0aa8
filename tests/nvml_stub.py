"""The real pynvml over a stub of the driver's library: hosts with GPUs that are not there."""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pynvml

SOURCE = Path(__file__).with_name("nvml_stub.c")
VARIABLE = "NVML_STUB"


class Error(int):
    """The nvmlReturn_t that a question fails with, in place of its answer."""

    def __str__(self):
        return f"!{int(self)}"


NOT_SUPPORTED = Error(3)
NO_PERMISSION = Error(4)
DRIVER_NOT_LOADED = Error(9)
TIMEOUT = Error(10)
LIBRARY_NOT_FOUND = Error(12)
GPU_IS_LOST = Error(15)
BLOCKED_BY_SYSTEM = Error(17)
VERSION_MISMATCH = Error(18)
GPU_NOT_FOUND = Error(28)
UNKNOWN = Error(999)


@dataclass
class Gpu:
    """One fake GPU; any answer may be an `Error`, of which `handle` is that of the GPU itself."""

    name: str | Error = "NVIDIA H100 80GB HBM3"
    uuid: str | Error = "GPU-00000000-0000-0000-0000-000000000000"
    capability: str | Error = "9.0"
    memory: str | Error = "85899345920/85000000000"
    compute_mode: int = 0
    mig: int | Error = 0
    mig_slots: int | Error = 7
    handle: Error | None = None
    instances: dict[int, str | Error] = field(default_factory=dict)

    def answers(self, index):
        given = {key: value for key, value in vars(self).items() if value is not None}
        for slot, uuid in given.pop("instances").items():
            given[f"instance{slot}.uuid"] = uuid
        return {f"{index}.{key}": value for key, value in given.items()}


def describe(*gpus, cuda=13000, driver="580.65.06", **answers):
    """Write a host down for the variable that the stub reads."""
    host = {"count": len(gpus), "cuda": cuda, "driver": driver, **answers}
    for index, gpu in enumerate(gpus):
        host |= gpu.answers(index)
    return ";".join(f"{key}={value}" for key, value in host.items())


def compile_stub(folder):
    """Compile the stub; a process with `folder` in LD_LIBRARY_PATH takes it for the driver's."""
    library = folder / "libnvidia-ml.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", library, SOURCE]
    subprocess.run(command, check=True)
    return library


class NvmlStub:
    """The stub, loaded into this process and given to pynvml until `monkeypatch` takes it back."""

    def __init__(self, library, monkeypatch):
        self._monkeypatch = monkeypatch
        self._library = ctypes.CDLL(os.fspath(library))
        for name in ("stub_inits", "stub_shutdowns", "stub_handles", "stub_running"):
            self._counter(name).value = 0
        monkeypatch.setattr(pynvml, "nvmlLib", self._library)
        # pynvml remembers every function that it has looked up in the library it had.
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        monkeypatch.delenv(VARIABLE, raising=False)

    def host(self, *gpus, **answers):
        self._monkeypatch.setenv(VARIABLE, describe(*gpus, **answers))

    def _counter(self, name):
        return ctypes.c_int.in_dll(self._library, name)

    @property
    def inits(self):
        """How often NVML was asked to initialise, also in vain."""
        return self._counter("stub_inits").value

    @property
    def shutdowns(self):
        return self._counter("stub_shutdowns").value

    @property
    def handles(self):
        """How often a GPU was asked for by its index."""
        return self._counter("stub_handles").value

    @property
    def running(self):
        """How many initialisations are still to be shut down."""
        return self._counter("stub_running").value
