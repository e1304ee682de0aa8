"""How far the plan of a query fixes the order of its rows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from polars_async.compare.agreement import Order

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

_SORT: Final = re.compile(
    r"SORT BY (?:\[(?:slice|descending|nulls_last|maintain_order): .*?\] (?=\[))?\[(.*)\]"
)
_SELECT: Final = re.compile(r"SELECT \[(.*)\]")


def order_of(lf: pl.LazyFrame | None) -> Order:
    """
    Return how far a query fixes the order: as far as the columns by which it sorts at its end.

    After the sort may come a limit, and a choice of columns. Nothing runs.
    """
    if lf is None:
        return Order()
    try:
        plan, names = lf.explain(optimized=False), lf.collect_schema().names()
    except Exception:  # noqa: BLE001  # the query fails, which its results tell
        return Order()
    is_cut = False
    for line in map(str.strip, plan.splitlines()):
        if (sort := _SORT.fullmatch(line)) is not None:
            keys, _ = _leading_columns(sort[1], names)
            return Order(tuple(keys), is_cut) if keys else Order()
        if line.startswith("SLICE"):
            is_cut = True
        elif (select := _SELECT.fullmatch(line)) is None or _leading_columns(select[1], names)[1]:
            break
    return Order()


def _leading_columns(text: str, names: Sequence[str]) -> tuple[list[str], str]:
    """Return the columns at the beginning of a list of expressions, and the rest of the list."""
    found: list[str] = []
    # The names are not escaped there; so those that are known are looked for, the longest first.
    columns = {f'col("{name}")': name for name in sorted(names, key=len, reverse=True)}
    while text:
        for column, name in columns.items():
            if text == column or text.startswith(f"{column}, "):
                found.append(name)
                text = text[len(column) :].removeprefix(", ")
                break
        else:
            break
    return found, text
