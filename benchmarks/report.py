"""The table that the benchmarks print."""

from __future__ import annotations

import sys
from statistics import median
from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Sequence


def head(what: str) -> None:
    """Say what is measured where, and name the columns."""
    print(f"Polars {pl.__version__}, Python {sys.version.split()[0]}, {what}")
    line("", "what", "native", "polars-async", "ratio", "target")


def line(*cells: str) -> None:
    """Print a row of the table, given its six cells."""
    row, what, native, own, ratio, target = cells
    print(f"{row:>4} {what:<42} {native:>26} {own:>26} {ratio:>18}  {target}".rstrip(), flush=True)


def spread(figures: Sequence[float], unit: str = "", digits: int = 0) -> str:
    """Write median, smallest and largest."""
    middle, low, high = (
        f"{figure:.{digits}f}" for figure in (median(figures), min(figures), max(figures))
    )
    return f"{middle} [{low}-{high}] {unit}".rstrip()
