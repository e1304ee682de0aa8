"""What polars-async raises and warns about; Polars' own exceptions pass through unchanged."""

from __future__ import annotations

from math import nan
from signal import Signals


class PolarsAsyncError(Exception):
    """Base of every error that polars-async itself raises."""


class EngineUnavailableError(PolarsAsyncError):
    """The requested engine cannot run here, and the caller ruled every other one out."""


class CollectorClosedError(PolarsAsyncError):
    """A query was handed to a collector after ``close()``."""


class QueueFullError(PolarsAsyncError):
    """
    The collector holds as many queries or streams as it may: retry later, or shed load.

    Attributes
    ----------
    retry_after
        The seconds in which the queries before are expected to be done, by their estimates; None if
        that is not known, as for streams that wait for their consumers.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[QueueFullError], tuple[object, ...]]:
        return type(self), (self.args[0], self.retry_after)


class QueryTimeoutError(PolarsAsyncError, TimeoutError):
    """
    A query was not done within its ``timeout=``.

    Attributes
    ----------
    timeout
        The time-out of the query, in seconds.
    queue_seconds
        How long it waited for a slot.
    run_seconds
        How long it ran after that; None if it never did.
    """

    # With defaults, since Polars makes some errors of Python functions anew, from their class and
    # text alone.
    def __init__(
        self,
        message: str,
        timeout: float = nan,
        queue_seconds: float = nan,
        run_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.timeout = timeout
        self.queue_seconds = queue_seconds
        self.run_seconds = run_seconds

    def __reduce__(self) -> tuple[type[QueryTimeoutError], tuple[object, ...]]:
        return type(self), (self.args[0], self.timeout, self.queue_seconds, self.run_seconds)


class QueryMemoryError(PolarsAsyncError, MemoryError):
    """
    A query in a worker process took more than ``max_memory=`` by itself, and was stopped.

    Attributes
    ----------
    max_memory
        The limit, in bytes.
    peak_memory
        What the worker process took when the query was stopped, in bytes.
    """

    def __init__(self, message: str, max_memory: int = 0, peak_memory: int = 0) -> None:
        super().__init__(message)
        self.max_memory = max_memory
        self.peak_memory = peak_memory

    def __reduce__(self) -> tuple[type[QueryMemoryError], tuple[object, ...]]:
        return type(self), (self.args[0], self.max_memory, self.peak_memory)


class MemoryLimitWarning(UserWarning):
    """A query on a thread takes this process beyond ``max_memory=``, though it runs alone."""


class WorkerDiedError(PolarsAsyncError):
    """
    A worker process died while it ran a query; no other query is affected.

    Attributes
    ----------
    exitcode
        The exit status of the worker process, or the negative number of the signal that ended it;
        None if unknown.
    plan
        The first lines of the query's plan; None if unknown.
    """

    def __init__(self, message: str, exitcode: int | None = None, plan: str | None = None) -> None:
        super().__init__(message)
        self.exitcode = exitcode
        self.plan = plan

    @property
    def signal(self) -> Signals | None:
        """The signal that ended the worker process; None if none did, or if it has no name."""
        return signal_of(self.exitcode)

    def __reduce__(self) -> tuple[type[WorkerDiedError], tuple[object, ...]]:
        return type(self), (self.args[0], self.exitcode, self.plan)


class ForkedProcessError(PolarsAsyncError):
    """Polars cannot run in this process: it was forked from one whose Polars threads ran."""


class EngineDowngradeWarning(UserWarning):
    """Another engine runs than the one requested; the message says which one, and why."""


def signal_of(exitcode: int | None) -> Signals | None:
    """Return the signal that ended a process with `exitcode`; most real-time ones have no name."""
    try:
        return None if exitcode is None or exitcode >= 0 else Signals(-exitcode)
    except ValueError:
        return None


def one_line(text: str) -> str:
    """Return `text` without its line breaks."""
    return " ".join(text.split())


def describe(error: BaseException) -> str:
    """Return the type and the text of an error, in one line; the type alone if it has no text."""
    try:
        text, arguments = str(error), error.args
        if len(arguments) > 1 and text == str(arguments):
            text = str(arguments[0])  # cudf-polars puts the errors it sums up beside their text
    except Exception:  # noqa: BLE001  # the __str__ of any library or user
        text = ""
    return f"{type(error).__name__}: {one_line(text)}".removesuffix(": ")
