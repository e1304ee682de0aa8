"""The options of a query and the limits of a collector, and their checks."""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING, Any, Final

from polars_async._runtime.upstream import DEFAULT_OPTIMIZATIONS
from polars_async.handle import check_gevent
from polars_async.scheduling.fair_queue import PRIORITIES

if TYPE_CHECKING:
    import polars as pl

    from polars_async.resolution import EngineRequest

__all__ = ["DEFAULT_OPTIMIZATIONS", "Options", "check_inline", "check_limit"]


class Options:
    """
    The checked options of a query, which never change; `Collector.collect_async` explains them.

    No dataclass: one is made for each query, and a frozen one takes three times as long.

    Raises
    ------
    TypeError
        `label` is no string.
    ValueError
        `timeout` or `priority` is out of range.
    ImportError
        `gevent` is true, and gevent is not installed.
    """

    __slots__ = ("engine", "label", "optimizations", "priority", "timeout")

    def __init__(
        self,
        engine: EngineRequest | None,
        optimizations: pl.QueryOptFlags,
        timeout: float | None,
        priority: int,
        label: str | None,
        *,
        gevent: bool = False,
    ) -> None:
        if gevent:
            check_gevent("gevent=True")
        if priority != 0 and priority not in PRIORITIES:
            lowest, highest = PRIORITIES[0], PRIORITIES[-1]
            raise ValueError(
                f"priority must be a whole number from {lowest} to {highest}, got {priority!r}"
            )
        if label is not None and not isinstance(label, str):
            raise TypeError(f"label must be a string, or None, got {label!r}")
        self.engine: Final = engine
        self.optimizations: Final = optimizations
        self.timeout: Final = None if timeout is None else _seconds(timeout)
        self.priority: Final = priority
        self.label: Final = label


def check_limit(name: str, limit: object, least: int) -> None:
    """Raise ValueError for a limit of a collector that is neither None nor `least` or more."""
    if limit is not None and (not isinstance(limit, int) or limit < least):
        raise ValueError(f"{name} must be a whole number, {least} or more, or None, got {limit!r}")


def check_inline(inline: Any) -> None:
    """Raise ValueError unless `inline` is a number of seconds, 0 or more."""
    if not isinstance(inline, (int, float)) or not inline >= 0:
        raise ValueError(
            f"inline must be a number of seconds, 0 or more (0 turns it off), got {inline!r}"
        )


def _seconds(timeout: Any) -> float:
    try:
        seconds = nan if isinstance(timeout, str) else float(timeout)
    except (TypeError, ValueError, OverflowError):
        seconds = nan
    if not seconds > 0:
        raise ValueError(f"timeout must be more than 0 seconds, or None, got {timeout!r}")
    return seconds
