"""Frames in IPC files, mapped into memory."""

from __future__ import annotations

import importlib
import inspect
import io
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def map_ipc(file: int, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """
    Map the uncompressed IPC `file` of a frame with `schema`; its content must not change any more.

    The descriptor may be closed afterwards. Polars 2 cannot map; pyarrow can, but for a few types,
    whose files are read.
    """
    for way in _ways_to_map:
        with suppress(Exception):  # pyarrow may raise anything at what it does not know
            frame = way(file)
            if dict(frame.schema) == dict(schema):
                return frame
    from polars_async._runtime.files import content_of  # noqa: PLC0415  # Linux alone

    return pl.read_ipc(io.BytesIO(content_of(file)))


def _map_with_polars(file: int) -> pl.DataFrame:
    read: Any = pl.read_ipc  # which has the parameter memory_map in Polars 1 alone
    frame: pl.DataFrame = read(f"/proc/self/fd/{file}", memory_map=True)  # it maps paths only
    return frame


def _map_with_pyarrow(file: int) -> pl.DataFrame:
    from polars_async._runtime.mapping import Mapping  # noqa: PLC0415  # Linux alone

    arrow: Any = importlib.import_module("pyarrow")
    mapping = Mapping(file)
    content = arrow.foreign_buffer(mapping.address, mapping.size, base=mapping)
    table = arrow.ipc.open_file(content).read_all()
    frame = pl.from_arrow(table, rechunk=False)  # with rechunk it would be copied
    assert isinstance(frame, pl.DataFrame)  # as of any table
    return frame


_ways_to_map: Final[tuple[Callable[[int], pl.DataFrame], ...]] = (
    *((_map_with_polars,) if "memory_map" in inspect.signature(pl.read_ipc).parameters else ()),
    _map_with_pyarrow,
)
"""The best first. That of Polars fails where there is no /proc, and once this process has changed
its user."""
