# ruff: noqa: PLR2004  # the numbers are those of the format
"""Reads the footer of a Parquet file, which Polars keeps for itself: what the columns have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

_MAGIC: Final = b"PAR1"
_MOST_READ: Final = 1 << 20
"""Bytes of a footer: those of longer ones are not read."""
# Fields of the format's structures.
_ROW_GROUPS: Final = 4
_COLUMNS: Final = 1
_META_DATA: Final = 3
_PATH: Final = 3
_VALUES: Final = 5
_COMPRESSED_SIZE: Final = 7


def share_of_columns(path: str, names: Collection[str]) -> float | None:
    """
    Return which share of the bytes of all columns of a file is that of the columns with `names`.

    None if the footer is too long, or is no footer.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    columns = _columns(path, _MOST_READ)
    if columns is None:
        return None
    whole = sum(column.size for column in columns)
    size = sum(column.size for column in columns if column.name in names)
    return size / whole if whole else None


def number_of_values(path: str, most_read: int) -> int | None:
    """
    Return how many values all columns of a file have together.

    None if the footer is longer than `most_read` bytes, of which each MB takes some 0.2 s; or is no
    footer.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    columns = _columns(path, most_read)
    return None if columns is None else sum(column.values for column in columns)


class _Column(NamedTuple):
    """A column in one group of rows."""

    name: str
    size: int
    """In bytes, compressed."""
    values: int


def _columns(path: str, most_read: int) -> list[_Column] | None:
    with Path(path).open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 8, 0))
        length, magic = int.from_bytes(file.read(4), "little"), file.read(4)
        if magic != _MAGIC or not 0 < length <= min(size - 8, most_read):
            return None
        file.seek(size - 8 - length)
        footer = file.read(length)
    try:
        groups = _struct(footer, 0)[0][_ROW_GROUPS]
        columns = [column[_META_DATA] for group in groups for column in group[_COLUMNS]]
        return [
            _Column(each[_PATH][0].decode(), each[_COMPRESSED_SIZE], each[_VALUES])
            for each in columns
        ]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a structure in Thrift's compact protocol, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _signed(data, at)
        if head & 0x0F in {1, 2}:  # a boolean, which is its own kind
            fields[number] = head & 0x0F == 1
        else:
            fields[number], at = _value(data, at, head & 0x0F)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in {1, 2, 3}:
        return data[at], at + 1
    if kind in {4, 5, 6}:
        return _signed(data, at)
    if kind == 7:
        if at + 8 > len(data):  # else a list may go on for ever, if the file is damaged
            raise IndexError("the footer has come to its end")
        return None, at + 8
    if kind == 8:
        length, at = _unsigned(data, at)
        return data[at : at + length], at + length
    if kind in {9, 10}:
        return _list(data, at)
    if kind == 12:
        return _struct(data, at)
    raise ValueError(f"there is no kind {kind} in a footer")


def _list(data: bytes, at: int) -> tuple[list[Any], int]:
    kind, length = data[at] & 0x0F, data[at] >> 4
    at += 1
    if length == 15:
        length, at = _unsigned(data, at)
    values: list[Any] = []
    for _ in range(length):
        value, at = _value(data, at, kind)
        values.append(value)
    return values, at


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7


def _signed(data: bytes, at: int) -> tuple[int, int]:
    number, at = _unsigned(data, at)
    return (number >> 1) ^ -(number & 1), at
