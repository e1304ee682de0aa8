"""The comparison of engines, by the queries of a program, or of a file that has some."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import polars as pl

from polars_async._runtime.machine import processors
from polars_async.compare.comparison import Comparison
from polars_async.compare.entries import Contender, Query
from polars_async.compare.file import WANTED, find_engine, find_queries, import_file
from polars_async.errors import describe
from polars_async.gpu import gpu_status
from polars_async.gpu.support import GpuSupport, Support, gpu_support
from polars_async.resolution import ENGINE_NAMES, engine_name, engine_object

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from polars_async.compare.entries import Progress
    from polars_async.compare.results import EngineRun
    from polars_async.resolution import EngineName, EngineRequest

RUNS: Final = 5
_AUTO: Final = "auto"
DEFAULT_ENGINES: Final[tuple[EngineName, ...]] = tuple(
    name for name in ENGINE_NAMES if name != _AUTO
)

QuerySource: TypeAlias = pl.LazyFrame | Callable[[], pl.LazyFrame]


def compare_engines(
    queries: QuerySource | Mapping[str, QuerySource],
    *,
    engines: Iterable[EngineRequest] | None = None,
    runs: int = RUNS,
    progress: Progress | None = None,
) -> Comparison:
    """
    Measure queries on several engines, and compare their answers.

    It blocks the calling thread until all is measured.

    Each query has for each engine a process of its own, with all the threads of Polars that this
    one would have. All processes of a query take turns; the first run of each does not count. The
    answers of its last run are sent here, and compared with that of the in-memory engine, or of the
    first engine that has one. They agree if they have the same rows: floats may differ by 1e-9 of
    their size (1e-5 where they have 32 bits), and the order as far as the query leaves it open,
    which it does unless it ends with a sort by columns.

    Parameters
    ----------
    queries
        A LazyFrame, or a function that returns one; or several with their names. They are sent to
        the processes, with the frames in memory that they read; so Python functions in them need
        cloudpickle, unless a module has them.
    engines
        Names of engines and ``pl.Engine`` objects, also of the caller's own classes. None for every
        engine that has a name. The GPU engine is listed, and does not run, where no GPU is usable.
    runs
        How often each query runs on each engine, and is measured.
    progress
        Called before each run with a text, the number of runs before it, and the number of all.

    Returns
    -------
    Comparison
        As text, it is a table. A query that fails on an engine, or whose process dies, is a result
        that says so, and the others go on.

    Raises
    ------
    TypeError
        `queries` is, or has, something else than LazyFrames and functions that return one.
    ValueError
        There are no queries or no engines, a name is that of no engine, or `runs` is less than 1;
        or this is not Linux, which worker processes need.

    Examples
    --------
    >>> import polars as pl
    >>> import polars_async as pa
    >>> found = pa.compare_engines(pl.LazyFrame({"a": [1, 2]}).sum(), runs=1)
    >>> found.agrees, [each.engine for each in found.results][:2]
    (True, ['in-memory', 'streaming'])
    """
    sources = queries if isinstance(queries, Mapping) else {"query": queries}
    if not sources:
        raise ValueError("queries must be a LazyFrame or a mapping that has some, got an empty one")
    contenders = _contenders(DEFAULT_ENGINES if engines is None else engines)
    found = [_query(str(name), source) for name, source in sources.items()]
    return _compare(found, contenders, runs, progress)


def compare_file(
    path: Path,
    names: list[str],
    *,
    engines: Iterable[str] | None = None,
    runs: int = RUNS,
    progress: Progress | None = None,
) -> Comparison:
    """
    Compare queries of a file, as `compare_engines` does; each process imports the file itself.

    Parameters
    ----------
    path
        The file.
    names
        The queries; an empty list stands for all that `find_queries` finds.
    engines
        Names of engines, and of ``pl.Engine`` objects of the file.
    runs, progress
        As for `compare_engines`.

    Raises
    ------
    ValueError
        The file cannot be imported, or lacks a query or an engine that is named, or has no query.
    """
    module = import_file(path)
    names_of_engines = DEFAULT_ENGINES if engines is None else engines
    contenders = [_contender_of_file(name, module) for name in dict.fromkeys(names_of_engines)]
    queries = []
    for name, source in find_queries(module, names).items():
        try:
            queries.append(_query(name, source, path))
        except TypeError as error:
            if names:
                raise ValueError(f"{path}: {error}") from error
            # Else it is a function that returns something else, which only a call could tell.
    if not queries:
        raise ValueError(f"{path} has no queries: {WANTED}")
    return _compare(queries, contenders, runs, progress)


def _compare(
    queries: list[Query], contenders: list[Contender], runs: int, progress: Progress | None
) -> Comparison:
    _check_runs(runs)
    if not contenders:
        known = ", ".join(map(repr, DEFAULT_ENGINES))
        raise ValueError(f"engines must name at least one of {known}, or be None for all of them")
    results = _results(queries, contenders, runs, progress or _silent)
    return Comparison(
        results=tuple(results),
        gpu_support={each.name: _support(each) for each in queries},
        runs=runs,
        versions={
            "polars": pl.__version__,
            "polars_async": _own_version(),
            "python": platform.python_version(),
        },
        processors=processors(),
    )


def _results(
    queries: list[Query], contenders: list[Contender], runs: int, progress: Progress
) -> list[EngineRun]:
    if sys.platform == "linux":
        from polars_async.compare.contest import hold  # noqa: PLC0415  # Linux alone

        return hold(queries, contenders, runs, progress)
    raise ValueError(
        f"worker processes compare engines, and need Linux: this is {sys.platform}. Run it in a "
        "container, or in WSL 2 on Windows"
    )


def _check_runs(runs: object) -> None:
    if not isinstance(runs, int) or runs < 1:
        raise ValueError(f"runs must be a whole number, 1 or more, got {runs!r}")


def _query(name: str, source: Any, path: Path | None = None) -> Query:
    """Return a query; raise TypeError if it is, or its function returns, no LazyFrame."""
    made = source
    if callable(source):
        try:
            made = source()
        except (Exception, SystemExit) as error:  # noqa: BLE001  # it is a query that fails
            return Query(name, None, f"its function raises: {describe(error)}", path)
    if isinstance(made, pl.LazyFrame):
        return Query(name, made, path=path)
    how = "returns" if callable(source) else "is"
    remedy = ": add .lazy()" if isinstance(made, pl.DataFrame) else ""
    raise TypeError(
        "a query must be a LazyFrame, or a function without parameters that returns one, and "
        f"{name!r} {how} {type(made).__name__}{remedy}"
    )


def _contenders(engines: EngineRequest | Iterable[EngineRequest]) -> list[Contender]:
    """Return the engines that take part, each by a name of its own."""
    found: list[Contender] = []
    taken: dict[str, int] = {}
    listed: Iterable[EngineRequest]
    listed = [engines] if isinstance(engines, str | pl.Engine) else engines
    for each in listed:
        if each not in ENGINE_NAMES:
            engine_object(each, "each of engines")
        name = each if isinstance(each, str) else each.name
        taken[name] = taken.get(name, 0) + 1
        unique = name if taken[name] == 1 else f"{name} ({taken[name]})"
        found.append(Contender(unique, each, not_run=_why_not_run(each)))
    return found


def _contender_of_file(name: str, module: ModuleType) -> Contender:
    if name in ENGINE_NAMES:
        known = engine_name(name)
        return Contender(name, known, not_run=_why_not_run(known))
    engine = find_engine(module, name)
    if engine is None:
        names = ", ".join(map(repr, ENGINE_NAMES))
        raise ValueError(
            f"{name!r} is no engine: name one of {names}, or a pl.Engine of {module.__file__}"
        )
    return Contender(name, engine, is_of_file=True, not_run=_why_not_run(engine))


def _why_not_run(engine: EngineRequest) -> str | None:
    if engine != "gpu" and not isinstance(engine, pl.GPUEngine):
        return None
    status = gpu_status()
    return None if status.usable else status.message


def _support(query: Query) -> GpuSupport:
    if query.lf is None:
        return GpuSupport(answer=Support.UNKNOWN, message="the query could not be made")
    try:
        return gpu_support(query.lf)
    except Exception as error:  # noqa: BLE001  # the query's own, which its results tell, too
        return GpuSupport(answer=Support.UNKNOWN, message=f"the query fails: {describe(error)}")


def _own_version() -> str | None:
    try:
        return version("polars-async")
    except PackageNotFoundError:
        return None


def _silent(_what: str, _done: int, _total: int) -> None:
    """Show no progress."""
