"""Every touch of Polars' private API, each guarded; tests/test_upstream.py tells when one moved."""

from __future__ import annotations

import importlib
import inspect
import mmap
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import polars as pl

from polars_async._native import start_new_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from polars.lazyframe.in_process import InProcessQuery
else:
    try:
        from polars.lazyframe.in_process import InProcessQuery
    except ImportError:

        class InProcessQuery:
            """What Polars would call its background queries."""


__all__ = [
    "AUTO_ENGINE",
    "BUILT_IN_ENGINES",
    "PACKAGE_FOLDER",
    "POOL_THREAD",
    "InProcessQuery",
    "PlanSources",
    "affinity_override",
    "blocking_threads",
    "gpu_callback",
    "is_eager",
    "map_ipc",
    "optimization_flags",
    "optimizations_of",
    "optimized_plan",
    "plan_sources",
]

POOL_THREAD: Final = re.compile(r"polars-\d|tokio-rt-worker|async-executor")
"""The names of the threads of Polars' three pools, which start with its first query. The thread
polars-ooc-cleaner is there from the import on; no query runs on it."""

PACKAGE_FOLDER: Final = f"{Path(pl.__file__).parent}{os.sep}"
"""The folder of the installed Polars, to find the first frame outside of it."""


_BLOCKING_THREADS: Final = 512


def blocking_threads() -> int:
    """Return how many threads Polars has at most to read files and to call Python sinks."""
    wanted = os.environ.get("POLARS_MAX_BLOCKING_THREAD_COUNT", "")
    return int(wanted) if wanted.isdecimal() else _BLOCKING_THREADS


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
"""The engine *object* set with ``Config.set_engine_affinity``; a name lives in the environment."""


def _find_auto_engine() -> pl.Engine:
    try:
        module = importlib.import_module("polars.lazyframe.engine")
        engine: pl.Engine = module._AutoEngine()  # noqa: SLF001
    except (ImportError, AttributeError, TypeError):
        return pl.InMemoryEngine()
    return engine


AUTO_ENGINE: Final = _find_auto_engine()
"""What Polars itself runs when nothing was asked for. Unlike the *name* ``"auto"`` it does not ask
the affinity again, which would find AsyncEngine there, for ever."""


BUILT_IN_ENGINES: Final = frozenset(
    {pl.InMemoryEngine, pl.StreamingEngine, pl.GPUEngine, type(AUTO_ENGINE)}
)
"""Those of Polars itself that are settings and no more, and so are the same in any process."""


def is_eager(optimizations: pl.QueryOptFlags) -> bool:
    """Tell whether it is an operation on a DataFrame, which the GPU engine runs on the CPU."""
    try:
        eager: bool = optimizations._pyoptflags.eager  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    except AttributeError:
        return False
    return eager


def optimization_flags(optimizations: pl.QueryOptFlags) -> dict[str, bool]:
    """Give all flags of `optimizations`, which cannot be pickled, by their names."""
    flags: Any = getattr(optimizations, "_pyoptflags", optimizations)
    found = {name: getattr(flags, name) for name in dir(flags) if not name.startswith("_")}
    return {name: value for name, value in found.items() if isinstance(value, bool)}


def optimizations_of(flags: Mapping[str, bool]) -> pl.QueryOptFlags:
    """Make optimisations of what `optimization_flags` gave, in this release or another."""
    optimizations = pl.QueryOptFlags()
    target: Any = getattr(optimizations, "_pyoptflags", optimizations)
    for name, value in flags.items():
        if getattr(target, name, value) != value:  # one that another release has is left out
            setattr(target, name, value)
    return optimizations


def map_ipc(path: str, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """
    Map an uncompressed IPC file of a frame with `schema`, which has to stay as it is.

    Polars 2 has no way of its own. pyarrow has one, but for a few types; else it is read.
    """
    try:
        frame = _map_ipc(path)
    except Exception:  # noqa: BLE001  # what pyarrow does not know, in one way or another
        frame = None
    if frame is None or dict(frame.schema) != dict(schema):
        frame = pl.read_ipc(path)
    return frame


# Else, before Python 3.13, it keeps a descriptor of its own open.
_WITHOUT_FILE: Final[dict[str, Any]] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


class _Mapping(mmap.mmap):
    """
    A mapping that is undone on a thread of its own, and without the GIL, once nobody uses it.

    To free its pages takes the kernel 20 ms for 144 MB, which would hold up every loop.
    """

    def __del__(self) -> None:
        try:
            start_new_thread(self.close, ())
        except RuntimeError:  # no thread to be had, or the program ends
            self.close()


def _map_with_polars(path: str) -> pl.DataFrame | None:
    read: Any = pl.read_ipc  # which has the parameter in Polars 1 alone
    frame: pl.DataFrame = read(path, memory_map=True)
    return frame


def _map_with_pyarrow(path: str) -> pl.DataFrame | None:
    try:
        arrow: Any = importlib.import_module("pyarrow")
    except ImportError:
        return None
    with open(path, "rb") as file:  # noqa: PTH123  # of this process
        mapping = _Mapping(file.fileno(), 0, prot=mmap.PROT_READ, **_WITHOUT_FILE)
    table = arrow.ipc.open_file(arrow.py_buffer(mapping)).read_all()
    frame = pl.from_arrow(table, rechunk=False)  # which would copy it
    return frame if isinstance(frame, pl.DataFrame) else None


_map_ipc: Final = (
    _map_with_polars
    if "memory_map" in inspect.signature(pl.read_ipc).parameters
    else _map_with_pyarrow
)


def gpu_callback(engine: pl.GPUEngine) -> Callable[..., object] | None:
    """Give what `engine` has Polars call to translate the optimised plan; None if it has moved."""
    try:
        ask: Callable[..., Callable[..., object] | None] = engine._post_opt_callback  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        return ask(background=False, eager=False)
    except (AttributeError, TypeError):
        return None


class PlanSources(NamedTuple):
    """What a plan reads, as far as it tells."""

    frame_bytes: int
    """Estimated size in bytes of the frames in memory."""
    paths: list[str]
    """What is scanned: paths and addresses, as they were given."""
    complete: bool
    """Whether that is all; a Python source, for one, keeps to itself what it reads."""


def plan_sources(lf: pl.LazyFrame) -> PlanSources:
    """
    Walk the plan of `lf` for its sources.

    It holds the GIL throughout. Where the schema of a file is not known yet, it reads the file for
    it, and so must come after ``explain``, which does the same without the GIL.
    """
    frame_bytes = 0
    paths: list[str] = []
    complete = True
    try:
        plan: Any = lf._ldf.visit()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        nodes = [plan.get_node()]
    except Exception:  # noqa: BLE001  # private, so that any change in it may raise anything
        return PlanSources(0, [], complete=False)
    while nodes:
        plan.set_node(nodes.pop())
        try:
            nodes += plan.get_inputs()
            node: Any = plan.view_current_node()
        except NotImplementedError:  # as Polars says of nodes that it does not show
            complete = False
            continue
        try:
            kind = type(node).__name__
            if kind == "DataFrameScan":
                frame_bytes += node.df.estimated_size()
            elif kind == "Scan":
                paths += map(str, node.paths)
            elif kind == "PythonScan":
                complete = False
        except Exception:  # noqa: BLE001  # as above
            complete = False
    return PlanSources(frame_bytes, paths, complete)


def optimized_plan(lf: pl.LazyFrame, optimizations: pl.QueryOptFlags) -> object | None:
    """
    Give the plan of `lf` as Polars hands it to cudf-polars; None if it hands it out no more.

    What is wrong with the query is raised. As `plan_sources`, it holds the GIL throughout, and
    must come after ``collect_schema``.
    """
    try:
        flags = optimizations._pyoptflags  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        plan: Any = lf._ldf.with_optimizations(flags)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        shown: object = plan.visit()
    except (AttributeError, TypeError):
        return None
    return shown
