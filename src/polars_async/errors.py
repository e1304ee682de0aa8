"""What polars-async raises and warns about; Polars' own exceptions pass through unchanged."""


class PolarsAsyncError(Exception):
    """Base of every error that polars-async itself raises."""


class EngineUnavailableError(PolarsAsyncError):
    """The engine that was asked for cannot run here, and the caller ruled every other one out."""


class CollectorClosedError(PolarsAsyncError):
    """A query was handed to a collector after ``close()``."""


class ForkedProcessError(PolarsAsyncError):
    """Polars cannot run in this process: it was forked from one whose Polars threads ran."""


class EngineDowngradeWarning(UserWarning):
    """The engine that was asked for does not run; the message says which one does, and why."""
