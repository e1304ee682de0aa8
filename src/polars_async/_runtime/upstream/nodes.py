"""What the nodes of an optimised plan show, as cudf-polars reads them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from polars_async._runtime.upstream.engines import DEFAULT_OPTIMIZATIONS, ask_optimized_plan

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

_RUNS_PYTHON: Final = ("anonymousfunction", "python", "apply", "plugin")
"""Words of the errors by which Polars says that it does not show a function of the user's."""


_KINDS: Final = (
    "Agg Alias BinaryExpr Cache Cast Column DataFrameScan Distinct Filter Gather GroupBy "
    "HConcat HStack Join Len Literal Scan Select SimpleProjection Slice Sort SortBy Ternary "
    "Union Window"
)
_REPEATABLE: Final = frozenset(_KINDS.split())
"""Kinds of nodes and expressions that give the same result each time. Functions are not among them:
some draw random numbers."""


GROWING: Final = frozenset(
    [
        "Cross",
        "DateRange",
        "DateRanges",
        "DatetimeRange",
        "DatetimeRanges",
        "Explode",
        "ExtendConstant",
        "IEJoin",
        "IntRange",
        "IntRanges",
        "LinearSpace",
        "LinearSpaces",
        "NonEqui",
        "PadEnd",
        "PadStart",
        "Repeat",
        "RepeatBy",
        "Sample",
        "TimeRange",
        "TimeRanges",
        "ZFill",
    ]
)
"""What may make much more than it reads. Polars gives these names in the text of a plan, or as
words in lower case."""
_GROWING_WORDS: Final = frozenset(map(str.lower, GROWING))


class PlanNodes(NamedTuple):
    """What a query reads and runs."""

    frame_bytes: int
    """The size of the frames in memory, without columns that are not read."""
    paths: list[str]
    runs_python: bool
    """Whether it has functions of Python or of a plugin, or a source of Python."""
    shape: int
    """A hash of the nodes and expressions, without the numbers in them."""
    is_repeatable: bool
    """Whether all of it is known to give the same result each time."""
    may_grow: bool
    """Whether it may make much more than it reads."""


def plan_nodes(lf: pl.LazyFrame) -> PlanNodes | None:
    """
    Return what the plan of `lf` shows; None if Polars does not tell, or cannot plan it.

    This takes some 20 us, however large the frames are. But Polars plans the query, as it does when
    it runs: it opens files, and calls the functions that make a part of a plan or a schema.
    """
    try:
        return ask_optimized_plan(lf, DEFAULT_OPTIMIZATIONS, _read)
    except Exception:  # noqa: BLE001  # the query will raise it again where it belongs
        return None


def _read(plan: Any) -> PlanNodes:
    size, last = 0, -1
    paths: list[str] = []
    shown: list[str] = []
    may_grow = False
    waiting, seen = [plan.get_node()], set()
    while waiting:
        number = waiting.pop()
        if number in seen:  # what several parts of a query share is read once
            continue
        seen.add(number)
        plan.set_node(number)
        waiting += plan.get_inputs()
        node = _shown(plan.view_current_node, shown)
        if hasattr(node, "df"):
            size += node.df.estimated_size()
        may_grow = may_grow or _grows(node)
        paths += map(str, getattr(node, "paths", ()))
        last = max((last, *(each.node for each in plan.get_exprs())))
    # Parts of an expression come before it. Some of these are of no use any more, which is no harm.
    for number in range(last + 1):
        may_grow = _grows(_shown(partial(plan.view_expression, number), shown)) or may_grow
    runs_python = "PythonScan" in shown or any(
        word in each for each in shown for word in _RUNS_PYTHON
    )
    is_repeatable = not runs_python and all(each.split()[0] in _REPEATABLE for each in shown)
    may_grow = may_grow or runs_python
    return PlanNodes(size, paths, runs_python, hash(tuple(shown)), is_repeatable, may_grow)


def _grows(node: Any) -> bool:
    """Return whether a node or an expression may make much more than its inputs have."""
    for name in ("function_data", "function", "options"):  # of a function, of a frame's, of a join
        what = getattr(node, name, None)
        while isinstance(what, tuple):  # a name with its parameters
            what = what[0] if what else None
        word = str(what).rpartition(".")[2].replace("_", "").lower()
        if word in _GROWING_WORDS:
            return True
    return type(node).__name__ == "Explode"


def _shown(view: Callable[[], Any], shown: list[str]) -> Any:
    """Return what `view` returns, and add its kind and name to `shown`."""
    try:
        found = view()
    except NotImplementedError as error:
        shown.append(str(error).split(" {")[0])
        return None
    shown.append(f"{type(found).__name__} {getattr(found, 'name', '')}".strip())
    return found
