"""Polars' engines, the affinity, and the optimisations of a query."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Callable

    from polars.lazyframe.in_process import InProcessQuery
else:
    try:
        from polars.lazyframe.in_process import InProcessQuery
    except ImportError:

        class InProcessQuery:
            """Stands in for the class of Polars' background queries, of which there is none."""


P = ParamSpec("P")
T = TypeVar("T")

__all__ = [
    "AUTO_ENGINE",
    "BUILT_IN_ENGINES",
    "DEFAULT_ENGINE",
    "DEFAULT_OPTIMIZATIONS",
    "InProcessQuery",
    "affinity_override",
    "ask_optimized_plan",
    "forbids_cpu",
    "gpu_callback",
    "is_eager",
    "optimization_flags",
    "optimizations_of",
    "sets_affinity",
    "without_warning",
]


def _no_override() -> pl.Engine | None:
    return None


def _find_affinity_override() -> Callable[[], pl.Engine | None]:
    try:
        module = importlib.import_module("polars.lazyframe.engine_config")
        getter: Callable[[], pl.Engine | None] = module.get_engine_affinity_override
    except (ImportError, AttributeError):
        return _no_override
    return getter


affinity_override: Final = _find_affinity_override()
"""Return the engine *object* set by ``Config.set_engine_affinity``; a name is in the environment.
"""


_SET_AFFINITY: Final[object] = getattr(pl.Config.set_engine_affinity, "__code__", None)


def sets_affinity() -> bool:
    """
    Return whether ``Config.set_engine_affinity`` is reading the ``__class__`` of an engine.

    It calls ``isinstance(engine, pl.Engine)``, and removes the variable after that.
    """
    frame = inspect.currentframe()
    for _ in range(4):  # of this function, the attribute, ABCMeta, and the caller of isinstance
        if frame is None:
            return False
        if frame.f_code is _SET_AFFINITY:
            return True
        frame = frame.f_back
    return False


def _find_auto_engine() -> pl.Engine:
    try:
        module = importlib.import_module("polars.lazyframe.engine")
        engine: pl.Engine = module._AutoEngine()  # noqa: SLF001
    except (ImportError, AttributeError, TypeError):
        return pl.InMemoryEngine()
    return engine


AUTO_ENGINE: Final = _find_auto_engine()
"""The engine that Polars runs by default. The *name* ``"auto"`` would have Polars look at the
affinity again, find AsyncEngine there, and so on for ever."""


DEFAULT_ENGINE: Final = "in-memory" if pl.__version__.startswith(("0.", "1.")) else "streaming"
"""The name of the engine that Polars' own async functions run where none is asked for, as they
document it. Polars chooses it when the query runs, and nothing of it can be read before."""


BUILT_IN_ENGINES: Final = frozenset(
    {pl.InMemoryEngine, pl.StreamingEngine, pl.GPUEngine, type(AUTO_ENGINE)}
)
"""Polars' own engines, which hold settings alone, and so are the same in any process."""


def _find_default_optimizations() -> pl.QueryOptFlags:
    try:
        module = importlib.import_module("polars.lazyframe.opt_flags")
        default: pl.QueryOptFlags = module.DEFAULT_QUERY_OPT_FLAGS
    except (ImportError, AttributeError):
        return pl.QueryOptFlags()
    return default


DEFAULT_OPTIMIZATIONS: Final = _find_default_optimizations()
"""The very object that Polars passes for a query whose optimisations were not chosen."""


def without_warning(function: Callable[P, T]) -> Callable[P, T]:
    """
    Return `function` of Polars without its decorator that warns of an unstable function.

    The warning is for programs that call the function themselves.
    """
    wrapped: Callable[P, T] = getattr(function, "__wrapped__", function)
    return wrapped


def is_eager(optimizations: pl.QueryOptFlags) -> bool:
    """Return whether the query is an operation on a DataFrame, which the GPU engine never runs."""
    try:
        eager: bool = optimizations._pyoptflags.eager  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    except AttributeError:
        return False
    return eager


def optimization_flags(optimizations: pl.QueryOptFlags) -> dict[str, bool]:
    """Return all flags of `optimizations`, which cannot be pickled, by their names."""
    flags: Any = getattr(optimizations, "_pyoptflags", optimizations)
    values = {name: getattr(flags, name) for name in dir(flags) if not name.startswith("_")}
    return {name: value for name, value in values.items() if isinstance(value, bool)}


def optimizations_of(flags: Mapping[str, bool]) -> pl.QueryOptFlags:
    """Make optimisations with the `flags` of `optimization_flags`, of this release or another."""
    optimizations = pl.QueryOptFlags()
    target: Any = getattr(optimizations, "_pyoptflags", optimizations)
    for name, value in flags.items():
        if getattr(target, name, value) != value:  # a flag that this release lacks is left out
            setattr(target, name, value)
    return optimizations


def forbids_cpu(engine: pl.Engine) -> bool:
    """Return whether ``raise_on_fail`` keeps queries of a GPU engine off the CPU."""
    # GPUEngine declares an attribute raise_on_fail and sets it in its config alone.
    config = getattr(engine, "config", None)
    return isinstance(config, Mapping) and bool(config.get("raise_on_fail"))


def gpu_callback(engine: pl.GPUEngine) -> Callable[..., object] | None:
    """Return the callback of `engine` for Polars' optimised plan; None if it has moved."""
    try:
        ask: Callable[..., Callable[..., object] | None] = engine._post_opt_callback  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        return ask(background=False, eager=False)
    except (AttributeError, TypeError):
        return None


def ask_optimized_plan(
    lf: pl.LazyFrame, optimizations: pl.QueryOptFlags, ask: Callable[[object], T]
) -> T | None:
    """
    Return the result of `ask` for the plan that cudf-polars would get; None if Polars has none.

    The query does not run. Its own errors are raised, and those of `ask`. Polars' `visit` would do
    the same, but it holds the GIL: for a plan with a Python dataset, such as that of
    ``scan_delta``, another thread of Polars needs the GIL too, and both would wait for ever.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def show(plan: object, *_: object) -> None:
        try:
            answers.append(ask(plan))
        except BaseException as error:  # noqa: BLE001  # Polars would replace it by its own
            errors.append(error)
        raise _ShownError

    try:
        flags = optimizations._pyoptflags  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        collect: Callable[..., object] = lf._ldf.with_optimizations(flags).collect  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        collect("in-memory", show)
    except (AttributeError, TypeError):
        return None
    except Exception:
        if not answers and not errors:
            raise
    if errors:
        raise errors[0]
    return answers[0] if answers else None


class _ShownError(Exception):
    """Ends a query once its plan was shown."""
