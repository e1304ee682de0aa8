"""What worker processes set up before their first query; `polars_async.testing` uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    SetUp: TypeAlias = Callable[[Callable[[], Any]], AbstractContextManager[object]]


@dataclass(frozen=True, eq=False, slots=True)
class Initializer:
    """An initializer of all workers of this process."""

    set_up: Callable[[], SetUp]
    """
    Returns what a worker enters for its life, which can be pickled.

    There it is given a function, which returns the `answer`.
    """
    answer: Callable[[], object]
    """Called here whenever a worker asks, on the thread of the query that the worker runs."""


class _Process:
    initializer: Initializer | None = None


def current() -> Initializer | None:
    """Return the initializer of workers that are started now; None if there is none."""
    return _Process.initializer


def use(initializer: Initializer | None) -> Initializer | None:
    """Set the initializer of workers to come; return the one before."""
    before, _Process.initializer = _Process.initializer, initializer
    return before
