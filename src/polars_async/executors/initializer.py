"""What each worker process sets up before its first query, as `polars_async.testing` needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    SetUp: TypeAlias = Callable[[Callable[[Any], Any]], AbstractContextManager[object]]


@dataclass(frozen=True, eq=False, slots=True)
class Initializer:
    """An initializer of all worker processes of this process."""

    set_up: Callable[[], SetUp]
    """
    Returns a function that can be pickled.

    A worker calls it with a function that fetches the `answer` to a question, and enters the
    context manager that it returns, until the worker ends.
    """
    answer: Callable[[Any], object]
    """Called in this process when a worker asks, on the slot's thread of the query that it runs."""


class _Process:
    initializer: Initializer | None = None


def current() -> Initializer | None:
    """Return the initializer of workers that are started now; None for none."""
    return _Process.initializer


def use(initializer: Initializer | None) -> Initializer | None:
    """Set the initializer of workers started from now on; return the previous one."""
    before, _Process.initializer = _Process.initializer, initializer
    return before
