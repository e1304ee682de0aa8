"""Whether the host is simulated, by `polars_async.testing`, which worker processes must know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, eq=False, slots=True)
class Simulation:
    """A simulated host."""

    arguments: Callable[[], dict[str, Any]]
    """Gives those of `simulate_gpu` that have the same in another process."""
    next_faults: Callable[[], tuple[str | None, dict[int, str]]]
    """Counts one more query on it, and gives what it is to suffer: anywhere, and on single GPUs."""


class _Process:
    simulation: Simulation | None = None


def current() -> Simulation | None:
    """Give the simulated host; None where it is the real one."""
    return _Process.simulation


def begin(simulation: Simulation | None) -> Simulation | None:
    """Have the host be that one; gives what it was before."""
    before, _Process.simulation = _Process.simulation, simulation
    return before
