"""What is compared: queries, and the engines on which they run."""

from __future__ import annotations

import pickle
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from polars_async.compare.child import OfFile, Sent

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TypeAlias

    import polars as pl

    from polars_async.compare.child import Origin
    from polars_async.resolution import EngineRequest

    Progress: TypeAlias = Callable[[str, int, int], object]
    """Called with what is done next, the number of runs before it, and the number of all."""


@dataclass(frozen=True, slots=True)
class Query:
    """A query that takes part."""

    name: str
    lf: pl.LazyFrame | None
    """None if it could not be made."""
    error: str | None = None
    """Why it could not be made."""
    path: Path | None = None
    """The file that has it; None if it is sent to the processes."""

    def origin(self, contender: Contender) -> Origin:
        """Return where the process has the query from, and the engine."""
        if self.path is not None:
            return OfFile(self.path, self.name, contender.name, contender.is_of_file)
        assert self.lf is not None
        return Sent(self.lf, _sendable(contender.request))


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine that takes part."""

    name: str
    request: EngineRequest
    is_of_file: bool = False
    """Whether the file that has the queries has it, too."""
    not_run: str | None = None
    """Why this host does not have it; None if it has."""


def _sendable(engine: EngineRequest) -> EngineRequest | bytes:
    """Return an engine as it is, or by cloudpickle if pickle cannot send it."""
    try:
        pickle.dumps(engine)
    except Exception:  # noqa: BLE001  # of any kind, as it has methods of its own
        with suppress(Exception):  # then the attempt to send it as it is tells why
            cloudpickle: Any = import_module("cloudpickle")
            data: bytes = cloudpickle.dumps(engine)
            return data
    return engine
