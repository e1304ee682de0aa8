"""The right answers to the PDS-H queries, from DuckDB, and the comparison with them."""

from __future__ import annotations

import math
from decimal import Decimal
from itertools import groupby
from typing import TYPE_CHECKING, Final

import polars as pl

from benchmarks.pdsh.data import TABLES
from benchmarks.pdsh.sql import QUESTIONS, Question

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import duckdb

Row = tuple[object, ...]

# DuckDB adds up decimals and Polars floats: they agree to about 1e-13, while a single piece more
# among the 153 million of scale 1 makes a difference of 6e-9.
_RELATIVE_TOLERANCE: Final = 1e-9


def answers(folder: Path) -> dict[int, pl.DataFrame]:
    """
    Answer every question with DuckDB.

    Parameters
    ----------
    folder
        The folder with the eight parquet files, as ``data.make`` returned it.

    Returns
    -------
    dict[int, polars.DataFrame]
        The answers by number of the query. One with a limit also has every row that ties with
        the last row let in: SQL leaves open which of those an answer shows.
    """
    import duckdb  # noqa: PLC0415  # answers can be compared without it

    with duckdb.connect() as connection:
        for name in TABLES:
            connection.read_parquet(str(folder / f"{name}.parquet")).create_view(name)
        return {number: _answer(connection, asked) for number, asked in QUESTIONS.items()}


def _answer(connection: duckdb.DuckDBPyConnection, question: Question) -> pl.DataFrame:
    """Return one answer, through Python objects: DuckDB's own ``.pl()`` needs pyarrow."""
    relation = connection.sql(question.sql_with_ties)
    return pl.DataFrame(
        relation.fetchall(), schema=relation.columns, orient="row", infer_schema_length=None
    )


def check(number: int, answer: pl.DataFrame, expected: pl.DataFrame) -> str | None:
    """Compare the answer to a query with the one of ``answers``, as ``difference`` does."""
    question = QUESTIONS[number]
    return difference(answer, expected, order_by=question.keys, limit=question.limit)


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
    if answer.columns != expected.columns:
        return f"columns {answer.columns} instead of {expected.columns}"
    height = expected.height if limit is None else min(limit, expected.height)
    if answer.height != height:
        return f"{answer.height} rows instead of {height}"
    groups = _ties(expected, order_by)
    candidates: list[Row] = []
    for number, row in enumerate(answer.rows(), start=1):
        candidates = candidates or next(groups)
        if (wrong := _take(row, candidates, expected.columns)) is not None:
            return f"row {number}, {wrong}"
    return None


def _ties(expected: pl.DataFrame, order_by: Sequence[str]) -> Iterator[list[Row]]:
    """Yield the rows in order, those that may change places together."""
    places = [expected.get_column_index(name) for name in order_by]
    for _, ties in groupby(expected.rows(), lambda row: [row[place] for place in places]):
        yield list(ties)


def _take(row: Row, candidates: list[Row], columns: Sequence[str]) -> str | None:
    """Take the row's counterpart out of the candidates, or say what sets it apart from them."""
    nearest = max(candidates, key=lambda candidate: sum(map(_same, row, candidate)))
    for name, found, wanted in zip(columns, row, nearest, strict=True):
        if not _same(found, wanted):
            return f"{name}: {found!r} instead of {wanted!r}"
    candidates.remove(nearest)
    return None


def _same(found: object, wanted: object) -> bool:
    if isinstance(found, int) and isinstance(wanted, int):
        return found == wanted
    if isinstance(found, int | float | Decimal) and isinstance(wanted, int | float | Decimal):
        return math.isclose(found, wanted, rel_tol=_RELATIVE_TOLERANCE)
    return found == wanted
