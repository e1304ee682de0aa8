"""Whether two values of answers mean the same, and the order in which rows are compared."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, Final, NamedTuple

import polars as pl

DIGITS: Final = ((9, 5), (8, 4), (7, 3))
"""Of floats of 64 and of 32 bits where rows are sorted. Few are so close to the middle between two
numbers of so many digits that the last bits matter, and hardly one with each of these."""


class Tolerance(NamedTuple):
    """How far apart two floats may be."""

    relative: float
    absolute: float


# Engines add up floats in different orders, and others add up decimals: sums of 64-bit floats agree
# to about 1e-13 then, while a single piece more among 153 million makes a difference of 6e-9.
_DOUBLE: Final = Tolerance(1e-9, 1e-12)
_SINGLE: Final = Tolerance(1e-5, 1e-7)


def sorted_rows(frame: pl.DataFrame, digits: tuple[int, int]) -> pl.Series:
    """Return the numbers of the rows in an order that hardly depends on the last bits of floats."""
    if not frame.width:
        return pl.Series(dtype=pl.UInt32)
    columns = enumerate(frame.get_columns())
    keys = [_sortable(column, digits).alias(str(place)) for place, column in columns]
    names = [key.name for key in keys]
    return pl.DataFrame(keys).select(pl.arg_sort_by(names, maintain_order=True)).to_series()


def _sortable(column: pl.Series, digits: tuple[int, int]) -> pl.Series:
    if isinstance(column.dtype, pl.Categorical | pl.Enum):
        return column.cast(pl.String)
    if column.dtype.is_float():
        return column.round_sig_figs(digits[0 if column.dtype == pl.Float64 else 1])
    if column.dtype.is_nested():
        texts = [_text(value, digits[0]) for value in column.to_list()]
        return pl.Series(texts, dtype=pl.String)
    return column


def _text(value: Any, digits: int) -> str:
    if isinstance(value, list):
        return f"[{','.join(_text(each, digits) for each in value)}]"
    if isinstance(value, dict):
        return _text([*value.values()], digits)
    return f"{value:.{digits}g}" if isinstance(value, float) else repr(value)


def alike(found: pl.Series, wanted: pl.Series) -> pl.Series:
    """Return which values mean the same; floats may differ in their last bits, and nulls do not."""
    types = found.dtype, wanted.dtype
    if all(isinstance(each, pl.Categorical | pl.Enum | pl.String) for each in types):
        return found.cast(pl.String).eq_missing(wanted.cast(pl.String))
    if all(each.is_numeric() for each in types):
        return _alike_numbers(found, wanted)
    if types[0] == types[1]:
        if not types[0].is_nested():
            return found.eq_missing(wanted)
        if found.equals(wanted):
            return pl.repeat(value=True, n=found.len(), dtype=pl.Boolean, eager=True)
    tolerance = tolerance_of(*types)
    pairs = zip(found.to_list(), wanted.to_list(), strict=True)
    return pl.Series([same_value(one, other, tolerance) for one, other in pairs], dtype=pl.Boolean)


def _alike_numbers(found: pl.Series, wanted: pl.Series) -> pl.Series:
    types = found.dtype, wanted.dtype
    if all(each.is_integer() for each in types):
        return found.cast(pl.Int128).eq_missing(wanted.cast(pl.Int128))
    if types[0] == types[1] and not types[0].is_float():
        return found.eq_missing(wanted)
    return _close(found, wanted, tolerance_of(*types))


def _close(found: pl.Series, wanted: pl.Series, tolerance: Tolerance) -> pl.Series:
    one, other = pl.col("one"), pl.col("other")
    largest = pl.max_horizontal(one.abs(), other.abs())
    is_near = (one - other).abs() <= largest * tolerance.relative + tolerance.absolute
    # Of Polars, a NaN equals another, and infinity itself; neither is near anything.
    same = (is_near & one.is_finite() & other.is_finite()) | (one == other)
    columns = {"one": found.cast(pl.Float64), "other": wanted.cast(pl.Float64)}
    return (
        pl.DataFrame(columns)
        .select(same.fill_null(value=False) | (one.is_null() & other.is_null()))
        .to_series()
    )


def tolerance_of(*types: pl.DataType) -> Tolerance:
    """Return how far apart floats of these types, or in values of these types, may be."""
    kinds = [leaf for each in types for leaf in leaves(each)]
    return _SINGLE if any(isinstance(kind, pl.Float32) for kind in kinds) else _DOUBLE


def leaves(kind: Any) -> list[Any]:
    """Return the types of the values that a type has in lists and structs, or the type itself."""
    if isinstance(kind, pl.List | pl.Array):
        return leaves(kind.inner)
    if isinstance(kind, pl.Struct):
        return [leaf for field in kind.fields for leaf in leaves(field.dtype)]
    return [kind]


def same_value(found: Any, wanted: Any, tolerance: Tolerance) -> bool:
    """Return whether two Python values mean the same, with tolerance for the floats in them."""
    if isinstance(found, int) and isinstance(wanted, int):
        return found == wanted
    if isinstance(found, int | float | Decimal) and isinstance(wanted, int | float | Decimal):
        both_nan = math.isnan(found) and math.isnan(wanted)
        relative, absolute = tolerance
        return both_nan or math.isclose(found, wanted, rel_tol=relative, abs_tol=absolute)
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return all(same_value(*pair, tolerance) for pair in zip(found, wanted, strict=True))
    if isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        return all(same_value(value, wanted[key], tolerance) for key, value in found.items())
    return bool(found == wanted)
