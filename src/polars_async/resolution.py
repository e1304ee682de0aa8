"""Which engine runs a query, asked for by whom, and why: the decision table."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import polars as pl

from polars_async._runtime import upstream
from polars_async._runtime.callers import level_of_caller
from polars_async.errors import EngineDowngradeWarning, EngineUnavailableError
from polars_async.gpu import gpu_status
from polars_async.gpu.breaker import breaker, cooldown_of
from polars_async.gpu.devices import candidates, diagnose_named_device
from polars_async.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polars_async.gpu.status import GpuStatus

EngineRequest: TypeAlias = str | pl.Engine
EngineSource: TypeAlias = Literal["argument", "config", "environment", "default"]
QueryPath: TypeAlias = Literal["sync", "async", "background", "batches"]
GpuPolicy: TypeAlias = Literal["downgrade", "offload", "require"]

ENGINE_NAMES: Final = ("auto", "in-memory", "streaming", "gpu")
AFFINITY_VARIABLE: Final = "POLARS_ENGINE_AFFINITY"
GPU_POLICY_VARIABLE: Final = "POLARS_ASYNC_GPU"
_WARN_UNSTABLE: Final = "POLARS_WARN_UNSTABLE"


_LONGEST_CHAIN: Final = 100
"""So many engines may ask for each other; more are a circle, which would have no end."""

IN_MEMORY: Final = pl.InMemoryEngine()
_ENGINES: Final[dict[str, pl.Engine]] = {
    "auto": upstream.AUTO_ENGINE,
    "in-memory": IN_MEMORY,
    "cpu": IN_MEMORY,  # an alias that Polars itself still takes
    "streaming": pl.StreamingEngine(),
}
ASKERS: Final[dict[EngineSource, str]] = {
    "argument": "the engine argument",
    "config": "Config.set_engine_affinity",
    "environment": AFFINITY_VARIABLE,
    "default": "default_engine",
}
_PATHS: Final[tuple[QueryPath, ...]] = get_args(QueryPath)
_POLICIES: Final[tuple[GpuPolicy, ...]] = get_args(GpuPolicy)
_SWITCHED_OFF: Final[dict[QueryPath, Reason]] = {
    "async": Reason.ASYNC_PATH,
    "background": Reason.BACKGROUND_PATH,
    "batches": Reason.BATCHES_PATH,
}


@dataclass(frozen=True, slots=True)
class Resolution:
    """
    The decision which engine runs a query.

    Attributes
    ----------
    requested
        What was asked for: the name of an engine or a ``pl.Engine`` object; ``"auto"`` where
        nobody asked for anything.
    source
        Who asked: ``"argument"``, ``"config"`` (an engine object set with
        ``pl.Config.set_engine_affinity``), ``"environment"`` (``POLARS_ENGINE_AFFINITY``, which is
        also where a *name* set with ``Config`` lives) or ``"default"``.
    engine
        The engine to run.
    name
        Its name: ``"in-memory"``, ``"streaming"``, ``"gpu"``, what another engine object calls
        itself, or ``"auto"`` where the choice is left to Polars.
    downgraded
        Whether the GPU engine was asked for, and the path or the host ruled it out.
    reason
        Why it is not what was asked for; None if it is.
    message
        The same in one sentence that a person can act on.
    gpu
        What is known of the GPU; None when nobody asked for one.
    fell_back
        Whether the GPU engine tried the query and failed, or rests since it kept failing, so that
        the in-memory engine runs it, or for several frames those that failed.
    cause
        What the GPU engine raised then; None where the query did not fall back.
    """

    requested: EngineRequest
    source: EngineSource
    engine: pl.Engine
    name: str
    downgraded: bool
    reason: Reason | None
    message: str
    gpu: GpuStatus | None
    fell_back: bool = False
    cause: Exception | None = None


class DeferringEngine(pl.Engine):
    """An engine that carries a request of its own, or none, and is never itself what runs."""

    variable: str | None = None
    """What the variable of the affinity said when this engine became the affinity instead."""

    @property
    @abstractmethod
    def asks_for(self) -> EngineRequest:
        """What is asked for by asking for this engine; ``"auto"`` where that is nothing."""

    @property  # type: ignore[misc]  # which nobody sets
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]  # as above
        # Polars tells no engine that it becomes the affinity. But it asks whether this is an engine
        # before it removes the variable, for which this engine has to stand in from then on.
        if upstream.sets_affinity():
            self.variable = _affinity_name(upstream.affinity_override())
        return type(self)


def resolve_engine(
    engine: EngineRequest = "auto",
    *,
    path: QueryPath = "async",
    gpu: GpuPolicy | None = None,
    default_engine: EngineRequest = "in-memory",
) -> Resolution:
    """
    Decide which engine runs a query, without running one.

    It asks, in this order: `engine` itself, the engine object set with
    ``pl.Config.set_engine_affinity``, the variable ``POLARS_ENGINE_AFFINITY`` as it is now, and
    `default_engine`. A GPU engine then has to pass the GPU rule of `path` and `gpu`. What this
    function returns in silence, the functions that run queries also warn of. It knows of no
    collector, nor of `configure`: `Collector.resolve_engine` asks one, after `engine`.

    Parameters
    ----------
    engine
        ``"auto"``, ``"in-memory"``, ``"streaming"``, ``"gpu"`` or a ``pl.Engine`` object. An
        `AsyncEngine`, here or as affinity, asks for the engine of its collector, if that has one.
    path
        How the query is asked for: ``"sync"``, ``"async"``, ``"background"`` or ``"batches"``.
    gpu
        ``"downgrade"``: no GPU on any path but ``"sync"``, as Polars documents. ``"offload"``: the
        synchronous GPU engine on a thread of the collector. ``"require"``: the same, but an
        unusable GPU is an error. None takes ``POLARS_ASYNC_GPU``, else ``"downgrade"``.
    default_engine
        What runs on the async and background paths where nothing was asked for. On the other two
        the choice is then left to Polars, as it is without this library.

    Returns
    -------
    Resolution

    Raises
    ------
    ValueError
        `engine`, `path` or `gpu` is none of the values listed here; or the GPU engine is asked for
        and ``POLARS_ASYNC_GPU`` is none; or an `AsyncEngine` asks for itself.
    EngineUnavailableError
        The GPU engine cannot run and the CPU was forbidden, by ``gpu="require"`` or by
        ``pl.GPUEngine(raise_on_fail=True)``.

    Examples
    --------
    >>> import polars_async as pa
    >>> pa.resolve_engine("streaming").message
    'the streaming engine runs: asked for by the engine argument'
    """
    return decide(engine, path, gpu, default_engine)


def decide(
    engine: EngineRequest,
    path: QueryPath,
    gpu: GpuPolicy | None,
    default_engine: EngineRequest,
    *,
    gpu_elsewhere: bool = False,
    gpu_in_workers: bool = False,
    optimizations: pl.QueryOptFlags | None = None,
) -> Resolution:
    """
    Do what `resolve_engine` does.

    With `gpu_elsewhere`, whatever the GPU of this host is; with `gpu_in_workers`, for queries that
    run in worker processes, of which each GPU has its own.
    """
    if path not in _PATHS:
        raise ValueError(f"path must be one of {_listed(_PATHS)}, got {path!r}")
    if gpu is not None:
        _checked_policy("gpu", gpu)
    asked = _who_asks(engine, path, default_engine)
    # By name where that tells: to ask an abstract class takes longer than all the rest.
    if asked.name in _ENGINES or not (
        asked.name == "gpu" or isinstance(asked.engine, pl.GPUEngine)
    ):
        return asked
    if optimizations is not None and upstream.is_eager(optimizations):
        return _left_to_cpu(asked)
    if gpu_elsewhere and path != "sync" and gpu_policy(gpu) != "downgrade":
        return asked
    in_workers = (
        gpu_in_workers and path != "sync" and type(asked.engine) in upstream.BUILT_IN_ENGINES
    )
    return _gpu_rule(asked, path, gpu, in_workers=in_workers)


def _who_asks(engine: EngineRequest, path: QueryPath, default: EngineRequest) -> Resolution:
    """Find the engine that is asked for, and by whom, before the GPU rule."""
    if engine != "auto" and (argument := request_of(engine)) != "auto":
        return _asked(argument, "argument")
    configured = upstream.affinity_override()
    if configured is not None and (affinity := request_of(configured)) != "auto":
        return _asked(affinity, "config")
    name = _affinity_name(configured)
    if name is None or name == "auto":
        return _nothing_asked(path, default)
    if name == "gpu" or name in _ENGINES:
        return _asked(name, "environment")
    instead = _nothing_asked(path, default)
    return replace(
        instead,
        requested=name,
        reason=Reason.UNKNOWN_AFFINITY,
        message=f"{AFFINITY_VARIABLE}={name!r} names no engine, so {runs(instead.name)}: "
        f"set it to one of {_listed(ENGINE_NAMES)}",
    )


def _left_to_cpu(asked: Resolution) -> Resolution:
    """Let the CPU run an operation on a DataFrame, as Polars does: it is no downgrade."""
    return replace(
        asked,
        engine=IN_MEMORY,
        name=IN_MEMORY.name,
        message=f"{runs(IN_MEMORY.name)}: {ASKERS[asked.source]} asks for the GPU engine, to "
        "which Polars gives no operations on DataFrames",
    )


def _gpu_rule(
    asked: Resolution, path: QueryPath, gpu: GpuPolicy | None, *, in_workers: bool
) -> Resolution:
    """Let the GPU engine through, or say what rules it out and what runs instead."""
    policy = gpu_policy(gpu)
    status = gpu_status()
    engine = asked.engine
    reason: Reason | None
    if path != "sync" and policy == "downgrade":
        reason, why = _SWITCHED_OFF[path], f"GPU execution is switched off on the {path} path"
        remedy = (
            f"to use the GPU, set {GPU_POLICY_VARIABLE}=offload or make a Collector(gpu='offload')"
        )
        if not status.usable:
            remedy = f"{remedy}, and mind that {status.message}"
    elif not status.usable:
        reason, why, remedy = status.reason, "no GPU is usable here", status.message
    elif (diagnosis := diagnose_named_device(engine, status, in_workers=in_workers)) is not None:
        reason, why, remedy = diagnosis
    else:
        cooldown = None
        if not upstream.forbids_cpu(engine):
            cooldown = cooldown_of(candidates(engine, status)) if in_workers else breaker.cooldown()
        if cooldown is None:
            return replace(asked, gpu=status)
        reason, why = Reason.GPU_COOLDOWN, "it keeps failing, and is in a cooldown"
        remedy = (
            f"it is tried again after a cooldown of {cooldown.seconds:g} s. "
            f"Last time, {cooldown.failure}"
        )
    asks = f"{ASKERS[asked.source]} asks for the GPU engine"
    if asked.reason is not None:
        asks = f"{asked.message}; {asks}"
    if policy == "require" or upstream.forbids_cpu(asked.engine):
        forbids = "raise_on_fail=True"
        if policy == "require":
            forbids = f"{GPU_POLICY_VARIABLE}=require" if gpu is None else "gpu='require'"
        raise EngineUnavailableError(f"{asks} and {forbids} forbids any other, but {why}: {remedy}")
    return replace(
        asked,
        engine=IN_MEMORY,
        name=IN_MEMORY.name,
        downgraded=True,
        reason=reason,
        message=f"{asks}, but {why}, so {runs(IN_MEMORY.name)}: {remedy}",
        gpu=status,
    )


def is_on_gpu(resolution: Resolution) -> bool:
    """Tell whether the GPU engine is what runs."""
    return isinstance(resolution.engine, pl.GPUEngine)


def gpu_policy(policy: GpuPolicy | None) -> GpuPolicy:
    """Give `policy`, checked, or where it is None the default of the process."""
    if policy is not None:
        return _checked_policy("gpu", policy)
    return _checked_policy(GPU_POLICY_VARIABLE, os.environ.get(GPU_POLICY_VARIABLE) or "downgrade")


def _checked_policy(name: str, value: str) -> GpuPolicy:
    for known in _POLICIES:
        if value == known:
            return known
    raise ValueError(f"{name} must be one of {_listed(_POLICIES)}, got {value!r}")


def engine_object(engine: EngineRequest | None, parameter: str = "engine") -> pl.Engine:
    """Turn the name of an engine into an engine; an engine is given back as it is."""
    if isinstance(engine, pl.Engine):
        return engine
    if engine == "gpu":
        return pl.GPUEngine()
    # As in Polars, whatever is no engine is a ValueError: None and numbers, too.
    for name, known in _ENGINES.items():
        if engine == name:
            return known
    names = _listed(ENGINE_NAMES)
    raise ValueError(
        f"{parameter} must be one of {names} or a polars.Engine object, got {engine!r}"
    )


def warn_of(resolution: Resolution) -> None:
    """Say aloud, at the caller's line outside of Polars, that what was asked for does not run."""
    if resolution.reason is not None:
        warnings.warn(resolution.message, EngineDowngradeWarning, stacklevel=level_of_caller())


def warns_of_unstable() -> bool:
    """Tell whether ``Config.warn_unstable`` is set."""
    return os.environ.get(_WARN_UNSTABLE, "0") != "0"


def warn_of_unstable(mode: str) -> None:
    """Warn of a mode of queries as Polars does, at the caller's line outside of Polars."""
    if warns_of_unstable():
        warnings.warn(
            f"{mode} mode is considered unstable. It may be changed at any point without it being "
            "considered a breaking change.",
            pl.exceptions.UnstableWarning,
            stacklevel=level_of_caller(),
        )


def _affinity_name(configured: pl.Engine | None) -> str | None:
    """Read the variable as it is now, or as it was when `configured` became the affinity."""
    name = os.environ.get(AFFINITY_VARIABLE)
    if name is None and isinstance(configured, DeferringEngine):
        return configured.variable
    return name


def request_of(engine: EngineRequest) -> EngineRequest:
    """Return what is asked for by asking for `engine`; ``"auto"`` where that is nothing."""
    asked = engine
    for _ in range(_LONGEST_CHAIN):
        if isinstance(asked, str) or not isinstance(asked, DeferringEngine):
            return asked
        asked = asked.asks_for
    raise ValueError(
        f"engine must not ask for itself, but {engine!r} asks for the engine of its collector, "
        "which asks for the same again: give that collector another engine, such as 'in-memory'"
    )


def _nothing_asked(path: QueryPath, default: EngineRequest) -> Resolution:
    if path == "sync":
        return _asked("auto", "default")
    if path == "batches":  # where Polars itself takes "auto" for this one
        return _asked("streaming", "default")
    if isinstance(default, str):
        return _asked_by_name(default, "default")
    return _asked(request_of(default), "default")


def _asked(engine: EngineRequest, source: EngineSource) -> Resolution:
    if isinstance(engine, str):
        return _asked_by_name(engine, source)
    return _as_asked(engine, source)


@cache
def _asked_by_name(engine: str, source: EngineSource) -> Resolution:
    return _as_asked(engine, source)


def _as_asked(request: EngineRequest, source: EngineSource) -> Resolution:
    engine = engine_object(request)
    why = "nothing else was asked for" if source == "default" else f"asked for by {ASKERS[source]}"
    return Resolution(
        requested="auto" if source == "default" else request,
        source=source,
        engine=engine,
        name=engine.name,
        downgraded=False,
        reason=None,
        message=f"{runs(engine.name)}: {why}",
        gpu=None,
    )


def runs(name: str) -> str:
    """Return the clause that says which engine runs a query."""
    if name == "auto":
        return "the engine that Polars chooses runs"
    return f"the {'GPU' if name == 'gpu' else name} engine runs"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(map(repr, values))
