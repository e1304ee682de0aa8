"""The eight tables that the PDS-H queries read."""

from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True)
class Tables:
    """The eight tables, nothing read from any of them yet."""

    region: pl.LazyFrame
    nation: pl.LazyFrame
    supplier: pl.LazyFrame
    part: pl.LazyFrame
    partsupp: pl.LazyFrame
    customer: pl.LazyFrame
    orders: pl.LazyFrame
    lineitem: pl.LazyFrame
