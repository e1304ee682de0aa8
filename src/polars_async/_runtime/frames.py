"""
The frames of a result, which may be of any class: a function given to `run` returns what it likes.

Nothing here raises: on the thread that has run the query, an error would cost it its end, and all
queries that thread.
"""

from __future__ import annotations

from contextlib import suppress

import polars as pl


def frames_of(result: object) -> list[pl.DataFrame]:
    """Return the frames that `result` is or lists."""
    with suppress(Exception):  # an object may make up its class when it is asked for it
        listed = list.copy(result) if isinstance(result, list) else [result]
        return [each for each in listed if isinstance(each, pl.DataFrame)]
    return []


def size_of(frame: pl.DataFrame) -> int:
    """Return the bytes of `frame`, as Polars estimates them; 0 if it cannot."""
    with suppress(Exception):
        return int(pl.DataFrame.estimated_size(frame))
    return 0


def count_rows(result: object) -> int | None:
    """Return the rows of all frames of `result`; None if it is anything else, or lists such."""
    with suppress(Exception):
        if isinstance(result, pl.DataFrame):
            return result.height
        if isinstance(result, list):
            frames = frames_of(result)
            return sum([each.height for each in frames]) if len(frames) == len(result) else None
    return None
