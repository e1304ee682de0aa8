"""The right answers to the PDS-H queries, from DuckDB, and whether others equal them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from benchmarks.pdsh.data import TABLES
from benchmarks.pdsh.sql import QUESTIONS, Question
from polars_async.compare.agreement import difference

if TYPE_CHECKING:
    from pathlib import Path

    import duckdb


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
