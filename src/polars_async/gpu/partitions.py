"""Smaller partitions, for the second try of a query that has run out of GPU memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from polars_async.gpu import gpu_status
from polars_async.gpu.support import EXECUTOR_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

_DIVISOR: Final = 8
"""How many times smaller the partitions of the second try are."""
_SIZE: Final = "target_partition_size"
_ROWS: Final = "max_rows_per_partition"

# What cudf-polars 26.10 has where neither an option nor a variable says anything.
_DEFAULT_ROWS: Final = 1_000_000
_DEFAULT_SIZE: Final = 1_500_000_000
_DEFAULT_SHARE: Final = 0.025
"""Of the memory of the GPU, where that is less than `_DEFAULT_SIZE`."""


def with_smaller_partitions(engine: pl.GPUEngine) -> pl.GPUEngine | None:
    """
    Return the same engine on the streaming executor, with partitions of an eighth.

    Return None for an engine of another class, such as those of cudf-polars for several GPUs: it
    holds more than options, which a copy must not share.
    """
    if type(engine) is not pl.GPUEngine:
        return None
    given: Mapping[str, Any] = engine.config.get("executor_options") or {}
    options = {
        **given,
        _SIZE: _an_eighth(given, _SIZE, _default_size(given)),
        _ROWS: _an_eighth(given, _ROWS, _DEFAULT_ROWS),
    }
    config: dict[str, Any] = {**engine.config, "executor": "streaming", "executor_options": options}
    return pl.GPUEngine(device=engine.device, memory_resource=engine.memory_resource, **config)


def partitions_of(engine: pl.GPUEngine) -> str:
    """Return the options that `with_smaller_partitions` has set, in words."""
    options = engine.config["executor_options"]
    return ", ".join(f"{name}={options[name]}" for name in (_SIZE, _ROWS))


def _an_eighth(given: Mapping[str, Any], name: str, default: int) -> int:
    """Return an eighth of an option: as given, else of its variable, else of `default`."""
    value = given.get(name) or os.environ.get(f"{EXECUTOR_VARIABLE}__{name.upper()}", "")
    before = int(value) if str(value).isdecimal() else 0  # 0 stands for the default
    return max((before or default) // _DIVISOR, 1)


def _default_size(given: Mapping[str, Any]) -> int:
    """Return the bytes of a partition that cudf-polars chooses by the memory of the GPU."""
    memory = given.get("min_device_size")
    if memory is None:
        devices = gpu_status().devices
        memory = next((each.memory_total for each in devices if each.selected), None)
    return _DEFAULT_SIZE if memory is None else min(int(memory * _DEFAULT_SHARE), _DEFAULT_SIZE)
