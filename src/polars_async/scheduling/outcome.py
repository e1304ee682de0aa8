"""The outcome of a query: the value that it returned, or the error that it raised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar, cast

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")


class Outcome(Generic[T]):
    """The value or the error of a query, which can be taken any number of times."""

    __slots__ = ("_traceback", "error", "value")

    def __init__(self) -> None:
        self.value: T | None = None
        self.error: BaseException | None = None
        self._traceback: TracebackType | None = None

    def fail(self, error: BaseException, traceback: TracebackType | None = None) -> None:
        """Set `error`, to be raised from `traceback` each time."""
        self.error = error
        self._traceback = traceback

    @property
    def traceback(self) -> TracebackType | None:
        """From where the error is raised."""
        return self._traceback

    def drop(self) -> None:
        """Free the value, or the error."""
        self.value = self.error = self._traceback = None

    def take(self) -> T:
        """Return the value, or raise the error."""
        try:
            if self.error is None:
                return cast("T", self.value)
            # From its own traceback each time: else every await would add its frames to the last.
            raise self.error.with_traceback(self._traceback)
        finally:
            del self  # the frame that the traceback now holds, which else held the error
