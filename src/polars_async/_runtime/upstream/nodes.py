"""What the nodes of an optimised plan show, as cudf-polars reads them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from math import prod
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


_FUNCTIONS: Final = (
    "DateRange DateRanges DatetimeRange DatetimeRanges Explode ExtendConstant IntRange IntRanges "
    "LinearSpace LinearSpaces PadEnd PadStart Repeat RepeatBy Rolling Sample TimeRange TimeRanges "
    "ZFill"
)
GROWING: Final = tuple(_FUNCTIONS.split())
"""Functions that make as much as the numbers among their arguments say, or as lists have items,
or, with `Rolling`, as windows have rows. Polars gives these names in the text of a plan, or as
words in lower case."""
_GROWING_WORDS: Final = frozenset(map(str.lower, GROWING))
_OFTEN: Final = 8
"""How often a part of a plan may be read by others before the whole makes much more than it reads:
frames that are concatenated with themselves."""
_GROWING_JOINS: Final = frozenset({"Cross", "Full", "IEJoin", "Inner", "Left", "Right"})


class PlanNodes(NamedTuple):
    """What a query reads and runs."""

    frame_bytes: int
    """The size of the frames in memory, without columns that are not read."""
    paths: list[str]
    runs_python: bool
    """Whether it has functions of Python or of a plugin, or a source of Python."""
    shape: int
    """A hash of the nodes and expressions, without the numbers in them; with how long these are,
    where that tells how much is made."""
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
    found: list[Any] = []
    waiting, seen = [plan.get_node()], set()
    while waiting:
        number = waiting.pop()
        if number in seen:  # what several parts of a query share is read once
            continue
        seen.add(number)
        plan.set_node(number)
        waiting += plan.get_inputs()
        node = _shown(plan.view_current_node, shown)
        found.append(node)
        if hasattr(node, "df"):
            size += node.df.estimated_size()
        paths += map(str, getattr(node, "paths", ()))
        last = max((last, *(each.node for each in plan.get_exprs())))
    # Parts of an expression come before it. Some of these are of no use any more, which is no harm.
    found += [_shown(partial(plan.view_expression, number), shown) for number in range(last + 1)]
    values = [each.value for each in found if type(each).__name__ == "Literal"]
    size += sum(each.estimated_size() for each in values if hasattr(each, "estimated_size"))
    values += filter(None, map(_windows, found))
    makes_more = any(_name(each) in _GROWING_WORDS or _windows(each) for each in found)
    if makes_more:
        shown += [f"{len(str(each))} characters" for each in values]
    shared = Counter(each.id_ for each in found if type(each).__name__ == "Cache")
    multiplies = any(map(_multiplies, found)) or prod(shared.values()) > _OFTEN
    kinds = {getattr(each, "name", type(each).__name__) for each in found}
    makes_lists = {"Window", "implode"} <= kinds
    runs_python = "PythonScan" in shown or any(
        word in each for each in shown for word in _RUNS_PYTHON
    )
    return PlanNodes(
        frame_bytes=size,
        paths=paths,
        runs_python=runs_python,
        shape=hash(tuple(shown)),
        is_repeatable=not runs_python and all(each.split()[0] in _REPEATABLE for each in shown),
        may_grow=makes_more or multiplies or makes_lists or runs_python or None in found,
    )


def _name(part: Any) -> str:
    """Return the name of a function, as a word in lower case, as far as Polars shows it."""
    kind = type(part).__name__
    if kind not in {"Function", "MapFunction"}:
        return kind.lower()
    what = part.function_data if kind == "Function" else part.function
    name = what[0] if isinstance(what, tuple) and what else what
    return str(name).rpartition(".")[2].replace("_", "").lower()


def _windows(part: Any) -> object:
    """Return how long the windows are by which rows are grouped; None if there are none."""
    kind = type(part).__name__
    if kind == "Rolling":
        return part.period
    if kind != "GroupBy":
        return None
    rolling, dynamic = part.options.rolling, part.options.dynamic
    if dynamic is not None:
        return dynamic.every, dynamic.period
    return None if rolling is None else rolling.period


def _multiplies(part: Any) -> bool:
    """Return whether it is a join that may find many rows for each, or a list for each row."""
    kind = type(part).__name__
    if kind == "Window":
        return bool(part.options.kind == "join")
    if kind != "Join":
        return False
    how = part.options[0]  # a name, or a tuple of a name and what belongs to it
    return (how if isinstance(how, str) else how[0]) in _GROWING_JOINS


def _shown(view: Callable[[], Any], shown: list[str]) -> Any:
    """Return what `view` returns, and add its kind and name to `shown`."""
    try:
        found = view()
    except NotImplementedError as error:
        shown.append(str(error).split(" {")[0])
        return None
    shown.append(f"{type(found).__name__} {getattr(found, 'name', '')}".strip())
    return found
