"""Which engine runs a query, who requested it, and why: the decision table."""

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
from polars_async.errors import EngineDowngradeWarning, EngineUnavailableError, one_line
from polars_async.gpu import gpu_status
from polars_async.gpu.breaker import breaker, cooldown_of
from polars_async.gpu.devices import candidates, diagnose_named_device
from polars_async.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polars_async.gpu.status import GpuStatus

EngineName: TypeAlias = Literal["auto", "in-memory", "streaming", "gpu", "adaptive"]
"""The names that ``engine=`` takes."""
EngineRequest: TypeAlias = EngineName | pl.Engine
"""What ``engine=`` takes."""
EngineSource: TypeAlias = Literal["argument", "config", "environment", "default", "adaptive"]
QueryPath: TypeAlias = Literal["sync", "async", "background", "batches"]
"""How a query is submitted: ``path=`` of `resolve_engine`."""
GpuPolicy: TypeAlias = Literal["downgrade", "offload", "require"]
"""What ``gpu=`` takes."""

ADAPTIVE: Final = "adaptive"
AFFINITY_NAMES: Final = ("auto", "in-memory", "streaming", "gpu")
ENGINE_NAMES: Final[tuple[EngineName, ...]] = get_args(EngineName)
AFFINITY_VARIABLE: Final = "POLARS_ENGINE_AFFINITY"
ENGINE_VARIABLE: Final = "POLARS_ASYNC_ENGINE"
GPU_POLICY_VARIABLE: Final = "POLARS_ASYNC_GPU"
_WARN_UNSTABLE: Final = "POLARS_WARN_UNSTABLE"


_LONGEST_CHAIN: Final = 100
"""The most engines that may stand for one another in a row; more are a circle without an end."""

IN_MEMORY: Final = pl.InMemoryEngine()
_ENGINES: Final[dict[str, pl.Engine]] = {
    "auto": upstream.AUTO_ENGINE,
    "in-memory": IN_MEMORY,
    "cpu": IN_MEMORY,  # an alias that Polars itself still takes
    "streaming": pl.StreamingEngine(),
}
NO_ENGINE: Final = "none"
"""The name of the engine where a function runs, and no query."""
_UNCHOSEN: Final = pl.InMemoryEngine()
"""Stands for the engine of a query for which ``"adaptive"`` has not chosen one."""
SOURCE_NAMES: Final[dict[EngineSource, str]] = {
    "argument": "the engine argument",
    "config": "Config.set_engine_affinity",
    "environment": AFFINITY_VARIABLE,
    "default": "default_engine",
    ADAPTIVE: "the adaptive choice",
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
        The engine that was asked for: a name or a ``pl.Engine`` object; ``"auto"`` where none was.
    source
        Where it was asked for: ``"argument"``, ``"config"`` (an engine object set with
        ``pl.Config.set_engine_affinity``), ``"environment"`` (``POLARS_ENGINE_AFFINITY``, which is
        also where a *name* set with ``Config`` lives) or ``"default"``; ``"adaptive"`` if the
        choice was left to this library.
    engine
        The engine to run; of no meaning for a function that was given to ``run``.
    name
        Its name: ``"in-memory"``, ``"streaming"``, ``"gpu"``, what another engine object calls
        itself, or ``"auto"`` where the choice is left to Polars; ``"adaptive"`` as long as this
        library has not chosen one, which it does at the latest when the query starts; ``"none"``
        for a function that was given to ``run``, which may use any.
    downgraded
        Whether the GPU engine was asked for, and the path or the host ruled it out.
    reason
        Why another engine runs than was asked for; None if it is that one.
    message
        The same in one sentence that a person can act on.
    gpu
        The status of the GPU; None where the GPU engine was not asked for.
    fell_back
        Whether the GPU engine failed at the query, or is in a cooldown since it kept failing, so
        that the in-memory engine runs the query: of several frames, those that failed.
    cause
        The error that the GPU engine raised; None where the query did not fall back.
    retried
        Whether the memory of the GPU did not suffice, so that it tried the query a second time,
        with smaller partitions: successfully, unless the query fell back.
    """

    requested: str | pl.Engine
    source: EngineSource
    engine: pl.Engine
    name: str
    downgraded: bool
    reason: Reason | None
    message: str
    gpu: GpuStatus | None
    fell_back: bool = False
    cause: Exception | None = None
    retried: bool = False

    def __str__(self) -> str:
        return one_line(self.message)

    def __repr__(self) -> str:
        return f"<Resolution: {self}>"


class DeferringEngine(pl.Engine):
    """An engine that stands for the request of another one, and never runs a query itself."""

    variable: str | None = None
    """The value of the affinity variable when this engine became the affinity in its place."""

    @property
    @abstractmethod
    def asks_for(self) -> EngineRequest:
        """The request for which this engine stands; ``"auto"`` if it requests no engine."""

    @property  # type: ignore[misc]  # it cannot be set, unlike that of `object`
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]  # as above
        # Polars does not notify an engine that becomes the affinity. But it calls isinstance, and
        # only then removes the variable: here is the last chance to read what was requested there.
        if upstream.sets_affinity():
            self.variable = _affinity_name(upstream.affinity_override())
        return type(self)


def resolve_engine(
    engine: EngineRequest = "auto",
    *,
    path: QueryPath = "async",
    gpu: GpuPolicy | None = None,
    default_engine: EngineRequest | None = None,
) -> Resolution:
    """
    Decide which engine runs a query, without running one.

    The first of these that names an engine decides: `engine` itself, the engine object set with
    ``pl.Config.set_engine_affinity``, the variable ``POLARS_ENGINE_AFFINITY`` as it is now, and
    `default_engine`. A GPU engine then has to pass the GPU rule of `path` and `gpu`. Functions that
    run queries warn of a downgrade; this one does not. It knows of no collector, nor of
    `configure`: `Collector.resolve_engine` takes the engine of its collector into account, after
    `engine`.

    Parameters
    ----------
    engine
        ``"auto"``, ``"in-memory"``, ``"streaming"``, ``"gpu"``, ``"adaptive"`` or a ``pl.Engine``
        object. An `AsyncEngine`, here or as affinity, asks for the engine of its collector, if that
        has one. ``"adaptive"`` is the engine that is expected to be the fastest: a collector
        chooses it for each query on the async and background paths. Batches then run on the
        streaming engine, and synchronous queries on the engine that Polars chooses.
    path
        How the query is submitted: ``"sync"``, ``"async"``, ``"background"`` or ``"batches"``.
    gpu
        ``"downgrade"``: no GPU on any path but ``"sync"``, as Polars documents. ``"offload"``: the
        synchronous GPU engine on a thread of the collector. ``"require"``: the same, but an
        unusable GPU is an error. None for ``POLARS_ASYNC_GPU``, or ``"downgrade"`` if that is not
        set.
    default_engine
        The engine on the async and background paths where none was asked for. None for
        ``POLARS_ASYNC_ENGINE``, or, if that is not set, what the installed Polars documents for
        its own async functions: in-memory in 1.44, streaming in 2.x. On the other two paths Polars
        then chooses, as it does without this library.

    Returns
    -------
    Resolution

    Raises
    ------
    ValueError
        `engine`, `path` or `gpu` is none of the values listed here; or ``POLARS_ASYNC_ENGINE``, or
        ``POLARS_ASYNC_GPU`` where the GPU engine is asked for, is read and not valid; or an
        `AsyncEngine` asks for itself.
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
    default_engine: EngineRequest | None,
    *,
    gpu_elsewhere: bool = False,
    gpu_in_workers: bool = False,
    optimizations: pl.QueryOptFlags | None = None,
) -> Resolution:
    """
    Do what `resolve_engine` does, for queries that may run outside of this process.

    With `gpu_elsewhere` the query runs on another host, and the GPU of this one does not matter.
    With `gpu_in_workers` it runs in a worker process, one for each GPU.
    """
    if path not in _PATHS:
        raise ValueError(f"path must be one of {_listed(_PATHS)}, got {path!r}")
    if gpu is not None:
        _checked_policy("gpu", gpu)
    requested = _find_request(engine, path, default_engine)
    if requested.engine is _UNCHOSEN:
        return _left_to_library(requested, path)
    # By name where that suffices: isinstance with an abstract class takes longer than all the rest.
    if requested.name in _ENGINES or not (
        requested.name == "gpu" or isinstance(requested.engine, pl.GPUEngine)
    ):
        return requested
    if optimizations is not None and upstream.is_eager(optimizations):
        return _left_to_cpu(requested)
    if gpu_elsewhere and (path == "sync" or gpu_policy(gpu) != "downgrade"):
        return requested
    in_workers = gpu_in_workers and type(requested.engine) in upstream.BUILT_IN_ENGINES
    return _gpu_rule(requested, path, gpu, in_workers=in_workers)


def _find_request(
    engine: EngineRequest, path: QueryPath, default: EngineRequest | None
) -> Resolution:
    """Return the engine that is requested, and its source, before the GPU rule."""
    if engine != "auto" and (argument := request_of(engine)) != "auto":
        return _requested(argument, "argument")
    configured = upstream.affinity_override()
    if configured is not None and (affinity := request_of(configured)) != "auto":
        return _requested(affinity, "config")
    name = _affinity_name(configured)
    if name is None or name == "auto":
        return _nothing_requested(path, default)
    if name == "gpu" or name in _ENGINES:
        return _requested(name, "environment")
    instead = _nothing_requested(path, default)
    return replace(
        instead,
        requested=name,
        reason=Reason.UNKNOWN_AFFINITY,
        message=f"{AFFINITY_VARIABLE}={name!r} names no engine, so {runs(instead.name)}: "
        f"set it to one of {_listed(AFFINITY_NAMES)}",
    )


def _left_to_cpu(requested: Resolution) -> Resolution:
    """Let the CPU run an operation on a DataFrame, as Polars does: it is no downgrade."""
    return replace(
        requested,
        engine=IN_MEMORY,
        name=IN_MEMORY.name,
        message=f"{runs(IN_MEMORY.name)}: {SOURCE_NAMES[requested.source]} asks for the GPU "
        "engine, on which Polars runs no operations on DataFrames",
    )


def _gpu_rule(
    requested: Resolution, path: QueryPath, gpu: GpuPolicy | None, *, in_workers: bool
) -> Resolution:
    """Return the request as it is, or the downgrade with what rules the GPU engine out."""
    policy = gpu_policy(gpu)
    status = gpu_status()
    engine = requested.engine
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
            return replace(requested, gpu=status)
        reason, why = Reason.GPU_COOLDOWN, "it keeps failing, and is in a cooldown"
        remedy = (
            f"it is tried again after a cooldown of {cooldown.seconds:g} s. "
            f"Last time, {cooldown.failure}"
        )
    asks = f"{SOURCE_NAMES[requested.source]} asks for the GPU engine"
    if requested.reason is not None:
        asks = f"{requested.message}; {asks}"
    if policy == "require" or upstream.forbids_cpu(engine):
        forbids = "raise_on_fail=True"
        if policy == "require":
            forbids = f"{GPU_POLICY_VARIABLE}=require" if gpu is None else "gpu='require'"
        raise EngineUnavailableError(f"{asks} and {forbids} forbids any other, but {why}: {remedy}")
    return replace(
        requested,
        engine=IN_MEMORY,
        name=IN_MEMORY.name,
        downgraded=True,
        reason=reason,
        message=f"{asks}, but {why}, so {runs(IN_MEMORY.name)}: {remedy}",
        gpu=status,
    )


def tried_again(resolution: Resolution, how: str) -> Resolution:
    """Return the resolution of a query that the GPU tries once more, of frames for the first."""
    if resolution.retried:
        return resolution
    return replace(resolution, retried=True, message=f"{resolution.message}; {how}")


def is_on_gpu(resolution: Resolution) -> bool:
    """Return whether the GPU engine runs the query."""
    engine = resolution.engine
    return engine is not IN_MEMORY and isinstance(engine, pl.GPUEngine)  # the first is cheap


def gpu_policy(policy: GpuPolicy | None) -> GpuPolicy:
    """Return `policy`, checked; for None, the default of the process."""
    if policy is not None:
        return _checked_policy("gpu", policy)
    return _checked_policy(GPU_POLICY_VARIABLE, os.environ.get(GPU_POLICY_VARIABLE) or "downgrade")


def _checked_policy(name: str, value: str) -> GpuPolicy:
    for known in _POLICIES:
        if value == known:
            return known
    raise ValueError(f"{name} must be one of {_listed(_POLICIES)}, got {value!r}")


def engine_name(name: str) -> EngineName:
    """Return `name`, which has to be one of `ENGINE_NAMES`."""
    return next(known for known in ENGINE_NAMES if name == known)


def engine_object(engine: str | pl.Engine | None, parameter: str = "engine") -> pl.Engine:
    """Return the engine of a name; an engine is returned as it is."""
    if isinstance(engine, pl.Engine):
        return engine
    if engine == "gpu":
        return pl.GPUEngine()
    if engine == ADAPTIVE:
        return _UNCHOSEN
    # As in Polars, anything else is a ValueError: None and numbers, too.
    for name, known in _ENGINES.items():
        if engine == name:
            return known
    names = _listed(ENGINE_NAMES)
    raise ValueError(
        f"{parameter} must be one of {names} or a polars.Engine object, got {engine!r}"
    )


def warn_of(resolution: Resolution) -> None:
    """Warn, at the caller's line outside of Polars, that another engine runs than was asked for."""
    if resolution.reason is not None:
        warnings.warn(resolution.message, EngineDowngradeWarning, stacklevel=level_of_caller())


def warns_of_unstable() -> bool:
    """Return whether ``Config.warn_unstable`` is set."""
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
    """Return the variable as it is now, or as it was when `configured` became the affinity."""
    name = os.environ.get(AFFINITY_VARIABLE)
    if name is None and configured is not None and isinstance(configured, DeferringEngine):
        return configured.variable
    return name


def request_of(engine: EngineRequest) -> EngineRequest:
    """Return the request for which `engine` stands; ``"auto"`` if it requests no engine."""
    request = engine
    for _ in range(_LONGEST_CHAIN):
        if isinstance(request, str) or not isinstance(request, DeferringEngine):
            return request
        request = request.asks_for
    raise ValueError(
        f"engine must not ask for itself, but {engine!r} asks for the engine of its collector, "
        "which asks for the same again: give that collector another engine, such as 'in-memory'"
    )


def _nothing_requested(path: QueryPath, default: EngineRequest | None) -> Resolution:
    if path == "sync":
        return _requested("auto", "default")
    if path == "batches":  # where "auto" is this one in Polars itself
        return _requested("streaming", "default")
    wanted: str | pl.Engine | None = default
    if wanted is None:
        wanted = engine_of_process(os.environ.get(ENGINE_VARIABLE))
    elif isinstance(wanted, pl.Engine):
        wanted = request_of(wanted)
    return _requested(wanted, "default")


def engine_of_process(name: str | None) -> str:
    """
    Return what runs where neither a caller nor an affinity nor a collector names an engine.

    `name` is the value of ``POLARS_ASYNC_ENGINE``.
    """
    if name is None or name in {"", "auto"}:
        return upstream.DEFAULT_ENGINE
    if name not in ENGINE_NAMES:
        raise ValueError(f"{ENGINE_VARIABLE} must be one of {_listed(ENGINE_NAMES)}, got {name!r}")
    return name


def check_affinity(name: str) -> None:
    """Raise ValueError unless `name` is one that Polars takes for its affinity."""
    if name not in AFFINITY_NAMES and name not in _ENGINES:
        raise ValueError(f"{AFFINITY_VARIABLE} must be one of {_listed(AFFINITY_NAMES)}")


def _left_to_library(requested: Resolution, path: QueryPath) -> Resolution:
    """Return what ``"adaptive"`` is on `path`, before a query is looked at."""
    engine: pl.Engine = _UNCHOSEN
    name = ADAPTIVE
    message = "the engine that is expected to be the fastest is chosen when the query starts"
    if path == "batches":
        engine, name = _ENGINES["streaming"], "streaming"
        message = f"{runs(name)}: its first batches come long before the end"
    elif path == "sync":
        engine, name = upstream.AUTO_ENGINE, "auto"
        message = f"{runs(name)}: {ADAPTIVE!r} chooses for the queries of a collector alone"
    if requested.reason is not None:  # an affinity that names no engine
        return replace(requested, source=ADAPTIVE, engine=engine, name=name)
    return _chosen(engine, name, message)


@cache
def _chosen(engine: pl.Engine, name: str, message: str) -> Resolution:
    return Resolution(
        requested=ADAPTIVE,
        source=ADAPTIVE,
        engine=engine,
        name=name,
        downgraded=False,
        reason=None,
        message=message,
        gpu=None,
    )


def _requested(engine: str | pl.Engine, source: EngineSource) -> Resolution:
    if isinstance(engine, str):
        return _requested_by_name(engine, source)
    return _as_requested(engine, source)


@cache
def _requested_by_name(engine: str, source: EngineSource) -> Resolution:
    return _as_requested(engine, source)


def _as_requested(request: str | pl.Engine, source: EngineSource) -> Resolution:
    engine = engine_object(request)
    why = f"asked for by {SOURCE_NAMES[source]}"
    if source == "default":
        why = "nothing else was asked for"
    name = ADAPTIVE if engine is _UNCHOSEN else engine.name
    return Resolution(
        requested="auto" if source == "default" else request,
        source=source,
        engine=engine,
        name=name,
        downgraded=False,
        reason=None,
        message=f"{runs(name)}: {why}",
        gpu=None,
    )


def runs(name: str) -> str:
    """Return the clause that says which engine runs a query."""
    if name == "auto":
        return "the engine that Polars chooses runs"
    if name == ADAPTIVE:
        return "the engine that is expected to be the fastest runs"
    return f"the {'GPU' if name == 'gpu' else name} engine runs"


def engine_text(name: str) -> str:
    """Return the engine of a query for a list of facts about it."""
    return "no engine" if name == NO_ENGINE else f"{name} engine"


OF_FUNCTION: Final = Resolution(
    requested="auto",
    source="default",
    engine=IN_MEMORY,  # whose queries run wherever the executor has them run
    name=NO_ENGINE,
    downgraded=False,
    reason=None,
    message="no engine runs: the function may use any, and names it itself",
    gpu=None,
)
"""The resolution of functions, for which there is nothing to decide."""


def _listed(values: Iterable[str]) -> str:
    return ", ".join(map(repr, values))
