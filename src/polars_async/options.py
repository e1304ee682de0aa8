"""The options of a query and the limits of a collector, and their checks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf, nan
from typing import TYPE_CHECKING, Any, Final

from polars_async._runtime.machine import usable_memory
from polars_async._runtime.upstream import DEFAULT_OPTIMIZATIONS
from polars_async.handle import check_gevent
from polars_async.scheduling.fair_queue import PRIORITIES

if TYPE_CHECKING:
    import polars as pl

    from polars_async.events import Tags
    from polars_async.resolution import EngineRequest

_UNITS: Final = {"b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for unit, base in (("b", 1000), ("ib", 1024))
}
_SIZE: Final = re.compile(
    r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>([kmgt]i?)?b)\s*", re.ASCII | re.IGNORECASE
)

_SHARE: Final = re.compile(r"\s*(?P<percent>\d+(\.\d+)?)\s*%\s*", re.ASCII)

__all__ = [
    "DEFAULT_OPTIMIZATIONS",
    "Cache",
    "Options",
    "check_inline",
    "check_limit",
    "check_slow",
    "checked_bytes",
    "checked_memory",
]


class Cache:
    """
    How long a `Collector` keeps results for equal queries, and how much memory they take.

    Parameters
    ----------
    seconds
        How long a result is kept, once it is there.
    max_bytes
        How much all results may take, as a number of bytes or a text such as ``"1 GB"``: the one
        that was used least recently is dropped first. One that is larger is not kept.

    Raises
    ------
    ValueError
        `seconds` is not above 0, or `max_bytes` is no size.
    """

    __slots__ = ("max_bytes", "seconds")

    def __init__(self, *, seconds: float, max_bytes: float | str) -> None:
        self.seconds: Final = _seconds(seconds, "seconds")
        self.max_bytes: Final = checked_bytes("max_bytes", max_bytes)

    def __repr__(self) -> str:
        return f"Cache(seconds={self.seconds:g}, max_bytes={self.max_bytes})"


class Options:
    """
    The checked options of a query, which never change; `Collector.collect_async` explains them.

    No dataclass: one is made for each query, and a frozen one takes three times as long.

    Raises
    ------
    TypeError
        `label` is no string, `tags` no mapping of strings to strings, numbers and booleans, or
        `single_flight` no boolean.
    ValueError
        `timeout` or `priority` is out of range.
    ImportError
        `gevent` is true, and gevent is not installed.
    """

    __slots__ = (
        "engine",
        "label",
        "optimizations",
        "priority",
        "single_flight",
        "tags",
        "timeout",
    )

    def __init__(
        self,
        engine: EngineRequest | None,
        optimizations: pl.QueryOptFlags,
        timeout: float | None,
        priority: int,
        label: str | None,
        tags: Tags | None = None,
        *,
        gevent: bool = False,
        single_flight: bool | None = None,
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
        if single_flight is not None:
            check_flag("single_flight", single_flight)
        self.engine: Final = engine
        self.optimizations: Final = optimizations
        self.timeout: Final = None if timeout is None else _seconds(timeout)
        self.priority: Final = priority
        self.label: Final = label
        self.single_flight: Final = single_flight
        self.tags: Final = None if tags is None else _checked_tags(tags)


def check_flag(name: str, flag: object) -> None:
    """Raise TypeError for a flag that is neither True nor False."""
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {flag!r}")


def check_cache(cache: object) -> None:
    """Raise TypeError for what is no `Cache`."""
    if not isinstance(cache, Cache):
        raise TypeError(
            "cache must be a Cache, such as Cache(seconds=60, max_bytes='1 GB'), or None, got "
            f"{cache!r}"
        )


def check_limit(name: str, limit: object, least: int) -> None:
    """Raise ValueError for a limit of a collector that is neither None nor `least` or more."""
    if limit is not None and (not isinstance(limit, int) or limit < least):
        raise ValueError(f"{name} must be a whole number, {least} or more, or None, got {limit!r}")


def checked_memory(name: str, size: object) -> int:
    """
    Return a number of bytes, given as one, as a text with a unit, or as a share of the memory.

    Raises
    ------
    ValueError
        It is none of these, or the memory of this machine is not known.
    """
    found = _SHARE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        return checked_bytes(name, size)
    share, memory = float(found["percent"]) / 100, usable_memory()
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be a share from above 0% to 100%, got {size!r}")
    if memory is None:
        raise ValueError(
            f"{name}={size!r} needs the size of the memory, which this system does not tell: give "
            "a number of bytes, or a text such as '4GB'"
        )
    return int(share * memory)


def checked_bytes(name: str, size: object) -> int:
    """Return a number of bytes, given as one or as a text with a unit; else raise ValueError."""
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    number: object = size
    if found is not None:
        number = float(found["number"]) * _UNITS[found["unit"].lower()]
    if isinstance(number, bool) or not isinstance(number, int | float) or not 1 <= number < inf:
        raise ValueError(
            f"{name} must be a number of bytes, 1 or more, a text such as '4GB', '4 GiB' or '75%', "
            f"or None, got {size!r}"
        )
    return int(number)


def check_inline(inline: Any) -> None:
    """Raise ValueError unless `inline` is a number of seconds, 0 or more."""
    if not isinstance(inline, (int, float)) or not inline >= 0:
        raise ValueError(
            f"inline must be a number of seconds, 0 or more (0 turns it off), got {inline!r}"
        )


def check_slow(slow: Any) -> None:
    """Raise ValueError unless `slow` is a number of seconds, 0 or more, or None."""
    is_number = isinstance(slow, (int, float)) and not isinstance(slow, bool)
    if slow is not None and not (is_number and slow >= 0):
        raise ValueError(
            f"slow must be a number of seconds, 0 or more, or None, got {slow!r}: queries that "
            "take as long are logged"
        )


def _checked_tags(tags: object) -> Tags:
    """Return a copy of `tags`: later changes of the caller's do not reach the events."""
    if not isinstance(tags, Mapping):
        raise TypeError(f"tags must be a mapping, such as {{'tenant': 'a'}}, or None, got {tags!r}")
    checked: dict[str, str | int | float | bool] = {}
    for name, value in tags.items():
        if not isinstance(name, str):
            raise TypeError(f"tags: their names must be strings, got {name!r}")
        if not isinstance(value, str | int | float):  # a bool is an int
            raise TypeError(
                f"tags[{name!r}] must be a string, a number or a boolean, got {value!r}: "
                "convert it, as by str()"
            )
        checked[name] = value
    return checked


def _seconds(timeout: Any, name: str = "timeout") -> float:
    try:
        seconds = nan if isinstance(timeout, str) else float(timeout)
    except (TypeError, ValueError, OverflowError):
        seconds = nan
    if not seconds > 0:
        or_none = ", or None" if name == "timeout" else ""
        raise ValueError(f"{name} must be more than 0 seconds{or_none}, got {timeout!r}")
    return seconds
