"""A process that measures one query on one engine, from the side of this one."""

from __future__ import annotations

import sys

assert sys.platform == "linux"

import signal
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

from polars_async.errors import PolarsAsyncError, describe, signal_of
from polars_async.executors.outcomes import error_of
from polars_async.executors.processes.call import WorkerCall
from polars_async.executors.processes.process import WorkerProcess
from polars_async.executors.serialization import pack
from polars_async.executors.staying import StaysHereError, UnsendableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

_IN_A_FILE: Final = (
    "put the query into a Python file and have `polars-async compare FILE` measure it, whose "
    "processes import the file"
)


class MeasurementError(PolarsAsyncError):
    """A query has no figures on an engine."""


class MeasuringProcess:
    """A worker process of its own, with all the threads of Polars that this one would have."""

    def __init__(self) -> None:
        self._worker = WorkerProcess({})
        self._has_ended = False

    def ask(self, operation: Callable[[], Any]) -> Any:
        """
        Have the process call `operation`, and return the result.

        Raises
        ------
        MeasurementError
            The operation cannot be sent, or has raised; or the process has died.
        """
        try:
            message = pack(operation, in_files=True)
        except Exception as error:
            raise MeasurementError(f"{_why_unsendable(error)}; or {_IN_A_FILE}") from error
        call = WorkerCall(self._worker, _Uncancelled(), None, None)
        try:
            kind, content = call.run(message, None)
        except EOFError:
            raise MeasurementError(_death(self.end())) from None
        try:
            call.check_sendable(kind)
        except UnsendableError as error:
            raise MeasurementError(f"{error}; or {_IN_A_FILE}") from error
        if (failure := error_of(kind, content)) is not None:
            raise MeasurementError(describe(failure)) from failure
        return content

    def end(self) -> int | None:
        """End the process at once, if it has not ended; return its exit status, if known."""
        if self._has_ended:
            return None
        self._has_ended = True
        return self._worker.kill()


class _Uncancelled:
    """A query as a `WorkerCall` needs to know it, and which nobody cancels."""

    @property
    def named(self) -> str:
        return "the query"

    @staticmethod
    def clock_stopped() -> AbstractContextManager[None]:
        return nullcontext()

    @staticmethod
    def note_reading(reading: tuple[Any, ...]) -> None:
        """Ignore it: nothing is counted here."""

    @staticmethod
    def note_memory(peak: int) -> None:
        """Do nothing: there is no limit."""

    @staticmethod
    def note_retry(how: str, cause: Exception) -> None:
        """Do nothing: the collector in the process notes it in the resolution of its query."""

    @staticmethod
    def stop_with(stop: Callable[[], object] | None, *, for_sure: bool = True) -> bool:  # noqa: ARG004  # nobody stops it
        return True


def _why_unsendable(error: Exception) -> str:
    if isinstance(error, StaysHereError | UnsendableError):
        return str(error)
    return f"the query or the engine cannot be sent to another process ({describe(error)})"


def _death(exitcode: int | None) -> str:
    how = "and its exit status was taken by other code"
    remedy = "look for what ends the process, such as os._exit, in Python functions of the query"
    if exitcode is not None:
        how = f"with exit status {exitcode}"
    if exitcode is not None and exitcode < 0:
        known = signal_of(exitcode)
        how = f"by {known.name}" if known is not None else f"by signal {-exitcode}"
        remedy = "Polars, or a library that a Python function uses, has crashed"
    if exitcode == -signal.SIGKILL:
        remedy = "if the kernel killed it for want of memory, its log says so"
    return f"its process died {how}: {remedy}"
