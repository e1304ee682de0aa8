"""Checks of the frames that a caller passes as queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Iterable


def check_frame(lf: object) -> None:
    """Raise TypeError if `lf` is no LazyFrame."""
    if not isinstance(lf, pl.LazyFrame):
        raise TypeError(f"lf must be a LazyFrame, got {_describe(lf)}")


def checked_frames(lazy_frames: Iterable[pl.LazyFrame]) -> list[pl.LazyFrame]:
    """Return `lazy_frames` as a list; raise TypeError if one of them is no LazyFrame."""
    if isinstance(lazy_frames, (pl.LazyFrame, pl.DataFrame)) or not hasattr(
        lazy_frames, "__iter__"
    ):
        raise TypeError(
            f"lazy_frames must be an iterable of LazyFrames, got {_describe(lazy_frames)}: "
            "put a single frame in a list"
        )
    frames = list(lazy_frames)
    for position, frame in enumerate(frames):
        if not isinstance(frame, pl.LazyFrame):
            raise TypeError(f"lazy_frames[{position}] must be a LazyFrame, got {_describe(frame)}")
    return frames


def _describe(value: object) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"{name}: call its lazy() first" if isinstance(value, pl.DataFrame) else name
