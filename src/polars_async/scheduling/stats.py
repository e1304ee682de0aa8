"""The statistics of a collector, over its admissions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from polars_async._runtime.unpatched import holding
from polars_async.gpu.breaker import stats as health_of_gpus
from polars_async.scheduling.counts import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polars_async.scheduling.admission import Admission
    from polars_async.scheduling.flights import Flights


COUNTERS: Final = frozenset(
    {
        "submitted",
        *(state.name.lower() for state in list(State)[2:]),
        "downgraded",
        "fell_back",
        "memory_waits",
        "memory_seconds",
        "queue_seconds",
        "run_seconds",
        "inline",
        "shared",
        "from_cache",
        "workers_died",
    }
)
"""The keys of `Collector.stats` that only ever grow; all others are gauges, which rise and fall."""


def stats_of(cpu: Admission, gpus: Sequence[Admission], flights: Flights) -> dict[str, Any]:
    """Return the statistics of a collector, as `Collector.stats` explains them."""
    counted = holding(cpu.lock, _counted, cpu, gpus, flights)  # all of them have that lock
    return {
        **counted,
        **health_of_gpus(),
        "streams": len(cpu.streams),
        "max_streams": cpu.streams.most,
        "max_running": cpu.max_running,
        "max_waiting": cpu.max_waiting,
        "memory": None if cpu.memory is None else cpu.memory.used,
        "max_memory": None if cpu.memory is None else cpu.memory.limit,
    }


def _counted(cpu: Admission, gpus: Sequence[Admission], flights: Flights) -> dict[str, float]:
    total: dict[str, float] = {"submitted": 0, "gpu_running": 0, "gpu_waiting": 0}
    for admission in (cpu, *gpus):
        running = admission.in_slots()
        abandoned = sum(query.done for query in running)
        now: dict[str, float] = {
            "running": len(running),
            "abandoned": abandoned,
            "paused": admission.paused,
            "waiting": admission.waiting,
            **admission.counts.as_stats(),
        }
        for key, value in now.items():
            total[key] = total.get(key, 0) + value
        # Not counted by itself: a submission that is interrupted would have to take that back.
        total["submitted"] += admission.counts.done + len(running) - abandoned + now["waiting"]
        if admission is not cpu:
            total["gpu_running"] += now["running"]
            total["gpu_waiting"] += now["waiting"]
    sharing = flights.sharing()
    for key in ("submitted", "waiting", "sharing"):
        total[key] = total.get(key, 0) + sharing
    return {**total, **flights.as_stats()}
