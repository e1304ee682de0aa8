"""
Every use of Polars' private API, each guarded; tests/test_upstream.py fails when one has moved.

``installed`` is about the installed library and its threads, ``engines`` about engines, affinity
and optimisations, ``nodes`` and ``serialized`` about plans, ``ipc`` about mapped files, and
``observer`` about what Polars tells of queries that run.
"""

from __future__ import annotations

from polars_async._runtime.upstream.engines import (
    AUTO_ENGINE,
    BUILT_IN_ENGINES,
    DEFAULT_ENGINE,
    DEFAULT_OPTIMIZATIONS,
    InProcessQuery,
    affinity_override,
    ask_optimized_plan,
    forbids_cpu,
    gpu_callback,
    is_eager,
    optimization_flags,
    optimizations_of,
    sets_affinity,
    without_warning,
)
from polars_async._runtime.upstream.installed import (
    LIBRARY,
    PACKAGE_FOLDER,
    POOL_THREAD,
    SHARED_NAME,
    blocking_threads,
    memory_held,
    namespaces_of,
)
from polars_async._runtime.upstream.ipc import map_ipc
from polars_async._runtime.upstream.nodes import GROWING, PlanNodes, plan_nodes
from polars_async._runtime.upstream.observer import CountingEngine, counting_engine, observed
from polars_async._runtime.upstream.serialized import (
    PICKLED,
    PlanEnd,
    PlanText,
    extensions_of,
    hands_over_here,
    last_pickled,
    paths_of,
    plan_bytes,
    plan_text,
)

__all__ = [
    "AUTO_ENGINE",
    "BUILT_IN_ENGINES",
    "DEFAULT_ENGINE",
    "DEFAULT_OPTIMIZATIONS",
    "GROWING",
    "LIBRARY",
    "PACKAGE_FOLDER",
    "PICKLED",
    "POOL_THREAD",
    "SHARED_NAME",
    "CountingEngine",
    "InProcessQuery",
    "PlanEnd",
    "PlanNodes",
    "PlanText",
    "affinity_override",
    "ask_optimized_plan",
    "blocking_threads",
    "counting_engine",
    "extensions_of",
    "forbids_cpu",
    "gpu_callback",
    "hands_over_here",
    "is_eager",
    "last_pickled",
    "map_ipc",
    "memory_held",
    "namespaces_of",
    "observed",
    "optimization_flags",
    "optimizations_of",
    "paths_of",
    "plan_bytes",
    "plan_nodes",
    "plan_text",
    "sets_affinity",
    "without_warning",
]
