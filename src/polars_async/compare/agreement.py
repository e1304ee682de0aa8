"""Whether two answers to a query are the same, as far as the query fixes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import polars as pl

from polars_async.compare.values import DIGITS, alike, same_value, sorted_rows, tolerance_of

if TYPE_CHECKING:
    from collections.abc import Sequence

Row: TypeAlias = tuple[object, ...]

_MOST: Final = 1000
"""Rows without a counterpart that are looked at one by one; each is compared with all others."""


class Verdict(NamedTuple):
    """What the comparison of two answers has found."""

    difference: str | None
    """One line that says what differs first; None if the answer is right."""
    is_reordered: bool = False
    """Whether the rows are the same and come in another order."""
    is_open: bool = False
    """Whether rows differ that the query leaves open, since a limit cuts rows of equal keys."""


class Order(NamedTuple):
    """How far a query fixes the order of its rows."""

    keys: tuple[str, ...] = ()
    """The columns of the answer that it is sorted by; rows of equal keys may change places."""
    is_cut: bool = False
    """Whether a limit takes some of the sorted rows."""


def judge(answer: pl.DataFrame, expected: pl.DataFrame, order: Order) -> Verdict:
    """Compare the answers of two engines to one query."""
    if answer.columns == expected.columns:
        for name, kind in answer.schema.items():
            if kind != expected.schema[name]:
                return Verdict(f"column {name} is of {kind} instead of {expected.schema[name]}")
    return examine(answer, expected, order_by=order.keys, is_cut=order.is_cut)


def difference(
    answer: pl.DataFrame,
    expected: pl.DataFrame,
    *,
    order_by: Sequence[str] = (),
    limit: int | None = None,
) -> str | None:
    """
    Find the first difference between an answer and the right one.

    Parameters
    ----------
    answer
        What a query returned.
    expected
        The right answer; with a ``limit``, also every row that ties with the last one let in.
    order_by
        The columns that the rows are ordered by. Rows with equal values there may come in any
        order; with no such column, all rows may.
    limit
        The most rows that an answer may have.

    Returns
    -------
    str or None
        One line saying what differs, or None if the answer is right.
    """
    return examine(answer, expected, order_by=order_by, limit=limit).difference


def examine(
    answer: pl.DataFrame,
    expected: pl.DataFrame,
    *,
    order_by: Sequence[str] = (),
    limit: int | None = None,
    is_cut: bool = False,
) -> Verdict:
    """
    Compare an answer with the right one, as `difference` does.

    With `is_cut`, `expected` has no more rows than the limit let in: so those whose keys equal the
    first or the last ones may be others.
    """
    if answer.columns != expected.columns:
        return Verdict(f"columns {answer.columns} instead of {expected.columns}")
    height = expected.height if limit is None else min(limit, expected.height)
    if answer.height != height:
        return Verdict(f"{answer.height} rows instead of {height}")
    head = expected.head(height)
    if (wrong := _first_wrong_key(answer, head, order_by)) is not None:
        return Verdict(wrong)
    in_place = _same_rows(answer, head)
    if in_place.all():
        return Verdict(None)
    rest = _Rest(answer, expected, (~in_place).arg_true(), _without(in_place, expected.height))
    if is_cut and order_by and rest.leave_open(_at_an_end(head, order_by)):
        return Verdict(None, is_open=True)
    wrong = rest.first_difference()
    return Verdict(wrong, is_reordered=wrong is None)


def _first_wrong_key(
    answer: pl.DataFrame, expected: pl.DataFrame, keys: Sequence[str]
) -> str | None:
    """Say where the keys differ first: rows are in another order, or others."""
    firsts = [
        (int(wrong[0]), place)
        for place, name in enumerate(keys)
        if (wrong := (~alike(answer[name], expected[name])).arg_true()).len()
    ]
    if not firsts:
        return None
    row, place = min(firsts)
    found, wanted = (frame[keys[place]][row] for frame in (answer, expected))
    return f"row {row + 1}, {keys[place]}: {found!r} instead of {wanted!r}"


def _same_rows(answer: pl.DataFrame, expected: pl.DataFrame) -> pl.Series:
    same = pl.repeat(value=True, n=answer.height, dtype=pl.Boolean, eager=True)
    for found, wanted in zip(answer.get_columns(), expected.get_columns(), strict=True):
        same &= alike(found, wanted)
    return same


def _without(matched: pl.Series, height: int) -> pl.Series:
    """Return the numbers of the expected rows that no row in the same place has matched."""
    beyond = pl.int_range(matched.len(), height, dtype=pl.UInt32, eager=True)
    return pl.concat([(~matched).arg_true().cast(pl.UInt32), beyond])


def _at_an_end(expected: pl.DataFrame, keys: Sequence[str]) -> pl.Series:
    """Return which rows have the keys of the first or of the last one."""
    ends = pl.repeat(value=False, n=expected.height, dtype=pl.Boolean, eager=True)
    for end in (0, expected.height - 1):
        same = pl.repeat(value=True, n=expected.height, dtype=pl.Boolean, eager=True)
        for name in keys:
            column = expected[name]
            same &= alike(column, column.gather([end] * expected.height))
        ends |= same
    return ends


class _Rest:
    """The rows of both answers that have no counterpart in the same place."""

    def __init__(
        self, answer: pl.DataFrame, expected: pl.DataFrame, found: pl.Series, wanted: pl.Series
    ) -> None:
        self._columns = answer.columns
        self._found = answer[found]
        self._numbers = found
        self._wanted = expected[wanted]
        pairs = zip(answer.dtypes, expected.dtypes, strict=True)
        self._tolerances = [tolerance_of(*pair) for pair in pairs]

    def leave_open(self, is_open: pl.Series) -> bool:
        """Return whether all that are left are among those that the query leaves open."""
        return self._numbers.len() > 0 and bool(is_open.gather(self._numbers).all())

    def first_difference(self) -> str | None:
        """Say what sets apart the first row that has no counterpart in any place."""
        if self._found.height == self._wanted.height:
            for digits in DIGITS:
                self._match_sorted(digits)
        if self._found.is_empty():
            return None
        if max(self._found.height, self._wanted.height) > _MOST:
            candidates = self._wanted.head(1).rows()
            return self._take(int(self._numbers[0]), self._found.row(0), candidates)
        candidates = self._wanted.rows()
        rows = sorted(zip(self._numbers.to_list(), self._found.rows(), strict=True))
        for number, row in rows:
            if (wrong := self._take(number, row, candidates)) is not None:
                return wrong
        return None

    def _match_sorted(self, digits: tuple[int, int]) -> None:
        """Keep the rows alone that differ where both are sorted."""
        places, others = sorted_rows(self._found, digits), sorted_rows(self._wanted, digits)
        found, wanted = self._found[places], self._wanted[others]
        left = ~_same_rows(found, wanted)
        self._found, self._wanted = found.filter(left), wanted.filter(left)
        self._numbers = self._numbers.gather(places).filter(left)

    def _take(self, number: int, row: Row, candidates: list[Row]) -> str | None:
        """Take the row's counterpart out of the candidates, or say what sets it apart from them."""
        nearest = max(candidates, key=lambda candidate: sum(self._same(row, candidate)))
        for name, found, wanted, same in zip(
            self._columns, row, nearest, self._same(row, nearest), strict=True
        ):
            if not same:
                return f"row {number + 1}, {name}: {found!r} instead of {wanted!r}"
        candidates.remove(nearest)
        return None

    def _same(self, row: Row, other: Row) -> list[bool]:
        pairs = zip(row, other, self._tolerances, strict=True)
        return [same_value(found, wanted, tolerance) for found, wanted, tolerance in pairs]
