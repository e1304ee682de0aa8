# ruff: noqa: PLR0911, PLR2004  # the first byte of a value says what it is
"""Reads MessagePack, in which Polars tells what its operators have done."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_NUMBERS: Final = {
    0xCA: Struct(">f"),
    0xCB: Struct(">d"),
    0xCC: Struct(">B"),
    0xCD: Struct(">H"),
    0xCE: Struct(">I"),
    0xCF: Struct(">Q"),
    0xD0: Struct(">b"),
    0xD1: Struct(">h"),
    0xD2: Struct(">i"),
    0xD3: Struct(">q"),
}
_CONSTANTS: Final = {0xC0: None, 0xC2: False, 0xC3: True}
_LENGTHS: Final = {
    0xC4: 1,  # bytes
    0xC5: 2,
    0xC6: 4,
    0xD9: 1,  # texts
    0xDA: 2,
    0xDB: 4,
    0xDC: 2,  # lists
    0xDD: 4,
    0xDE: 2,  # maps
    0xDF: 4,
}


def read(data: bytes) -> Any:
    """
    Return the one value that `data` holds.

    Raises
    ------
    ValueError
        It is no MessagePack, or has an extension type.
    """
    try:
        value, end = _value(data, 0)
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError("this is no MessagePack") from error
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes follow the value")
    return value


def _value(data: bytes, at: int) -> tuple[Any, int]:
    kind = data[at]
    at += 1
    if kind < 0x80:
        return kind, at
    if kind >= 0xE0:
        return kind - 0x100, at
    if kind < 0xC0:
        if kind >= 0xA0:
            return _text(data, at, kind & 0x1F)
        return (_map if kind < 0x90 else _list)(data, at, kind & 0x0F)
    if kind in _CONSTANTS:
        return _CONSTANTS[kind], at
    if (number := _NUMBERS.get(kind)) is not None:
        end = at + number.size
        if end > len(data):
            raise IndexError
        return number.unpack_from(data, at)[0], end
    start = at + _LENGTHS[kind]
    return _OF_KIND[kind](data, start, int.from_bytes(data[at:start]))


def _text(data: bytes, at: int, length: int) -> tuple[str, int]:
    raw, end = _bytes(data, at, length)
    return raw.decode(errors="replace"), end


def _bytes(data: bytes, at: int, length: int) -> tuple[bytes, int]:
    end = at + length
    if end > len(data):
        raise IndexError
    return data[at:end], end


def _list(data: bytes, at: int, length: int) -> tuple[list[Any], int]:
    values: list[Any] = []
    for _ in range(length):
        value, at = _value(data, at)
        values.append(value)
    return values, at


def _map(data: bytes, at: int, length: int) -> tuple[dict[Any, Any], int]:
    values: dict[Any, Any] = {}
    for _ in range(length):
        key, at = _value(data, at)
        values[key], at = _value(data, at)
    return values, at


_OF_KIND: Final[dict[int, Callable[[bytes, int, int], tuple[Any, int]]]] = {
    kind: of
    for kinds, of in (
        ((0xC4, 0xC5, 0xC6), _bytes),
        ((0xD9, 0xDA, 0xDB), _text),
        ((0xDC, 0xDD), _list),
        ((0xDE, 0xDF), _map),
    )
    for kind in kinds
}
