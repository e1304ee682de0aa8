"""What a query scans, how much of it there is, and how much was read so far."""

from __future__ import annotations

import os
from contextlib import suppress
from glob import glob, has_magic
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from polars_async._runtime.parquet import share_of_columns
from polars_async._runtime.plans import look_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_MOST_FILES: Final = 10_000
"""How many files of one scan are looked at, at most, to know their size."""
_READERS: Final[dict[str, Callable[..., pl.LazyFrame]]] = {
    "parquet": pl.scan_parquet,
    "ipc": pl.scan_ipc,
}
"""Those whose files tell how many rows they have, without being read."""


class Scan:
    """A source of a query, which is a frame in memory, one or more files, or something else."""

    def __init__(self, node: Mapping[str, Any]) -> None:
        properties = node["properties"]
        self.key: Final[int] = node["id"]
        self.rows = 0
        """The rows that it has given so far."""
        self.bytes = 0
        """The bytes that were read for it so far, if they are counted."""
        self.is_over = False
        self.size_in_rows: int | None = properties.get("n_rows")
        self._size_in_bytes: int | None = None
        self._kind: str | None = properties.get("scan_type")
        self._first: object = properties.get("first_source")
        self._number: int = properties.get("num_sources") or 0
        self._is_filtered = properties.get("predicate") is not None
        self._columns: list[str] = properties.get("projected_file_columns") or []
        self._slice: object = properties.get("pre_slice")
        self.is_unsized = self.size_in_rows is None and self._is_local
        """Whether its size is worth looking for, which was not done yet."""

    @property
    def _is_local(self) -> bool:
        first = self._first
        return isinstance(first, str) and 0 < self._number <= _MOST_FILES and "://" not in first

    @property
    def share(self) -> float | None:
        """The share of it that was read; None if its size is not known."""
        if self.is_over:
            return 1.0
        if self.size_in_rows is not None:
            return min(1.0, self.rows / self.size_in_rows) if self.size_in_rows else 1.0
        if self._size_in_bytes and self.bytes:  # Polars 1.44 counts none of local files
            return min(1.0, self.bytes / self._size_in_bytes)
        return None

    def take(self, counts: Mapping[str, Any]) -> None:
        """Note what it has done so far."""
        self.rows = counts["rows_sent"]
        self.bytes = counts["io_total_bytes_received"]
        self.is_over = counts["done"]

    def find_size(self, frames: Iterable[pl.LazyFrame]) -> None:
        """Look for the size of its files, whose paths are in the plans of `frames`, if there."""
        self.is_unsized = False
        with suppress(Exception):  # the files, and what Polars thinks of them
            files = self._files(frames)
            if files is None or self._slice is not None:
                return
            if self._kind in _READERS and not self._is_filtered:
                counted = _READERS[self._kind](files).select(pl.len())
                self.size_in_rows = counted.collect(engine="in-memory").item()
            elif self._kind == "csv":  # which is read from end to end
                self._size_in_bytes = sum(map(os.path.getsize, files))
            elif self._kind == "parquet":
                # The rows that a filter lets pass tell nothing, and the bytes of the columns do.
                share = share_of_columns(files[0], self._columns)
                self._size_in_bytes = int(sum(map(os.path.getsize, files)) * (share or 0))

    def _files(self, frames: Iterable[pl.LazyFrame]) -> list[str] | None:
        """Return the paths of its files, in their order; None if they are not to be found."""
        if not isinstance(self._first, str):
            return None
        if self._number == 1:
            return [self._first]
        for frame in frames:
            listed = _expanded(look_at(frame).paths)
            with suppress(ValueError):
                begin = listed.index(self._first)
                found = listed[begin : begin + self._number]
                return found if len(found) == self._number else None
        return None


def scans_of(nodes: Sequence[Mapping[str, Any]]) -> list[Scan]:
    """Return the sources of a physical plan."""
    return [Scan(node) for node in nodes if not node["input_ids"]]


def _expanded(paths: Iterable[str]) -> list[str]:
    """Return the paths of files for those that a query names: files, folders and patterns."""
    files: list[str] = []
    for path in paths:
        pattern = os.path.join(path, "**", "*") if os.path.isdir(path) else path  # noqa: PTH112, PTH118  # as given
        if has_magic(pattern):
            found = sorted(glob(pattern, recursive=True))  # noqa: PTH207  # as given
            files += [each for each in found if os.path.isfile(each)]  # noqa: PTH113
        else:
            files.append(path)
    return files
