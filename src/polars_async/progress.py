"""How far a query is."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Final, NamedTuple, Protocol

from polars_async.wording import in_bytes, in_seconds


class Reading(NamedTuple):
    """What the operators of a query have done so far."""

    rows: int | None = None
    bytes: int | None = None
    fraction: float | None = None
    """At most 1, which it is when all is read that the query scans."""
    operator: str | None = None


NOTHING_READ: Final = Reading()


class Meter(Protocol):
    """Tells how far one query is."""

    def read(self) -> Reading:
        """Return what the operators of the query have done so far; any thread may call it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """
    How far a query was at one moment.

    Attributes
    ----------
    state
        ``"waiting"``, ``"running"``, or how it ended: ``"completed"``, ``"failed"``,
        ``"cancelled"``, ``"timed_out"`` or ``"rejected"``.
    seconds
        How long it has run so far, or in all; 0 before it starts.
    rows
        The rows that were read so far from all that it scans, after the filters that a scan itself
        applies; None where they are not counted.
    bytes
        The bytes that were read so far from files; None where they are not counted.
    fraction
        The share of what it scans that has been read, from 0 to 1: it never gets less, and is 1
        only when the query has completed; None where the size of what is scanned is not known.
    operator
        The operator that works at the moment, as Polars calls it, such as ``"GroupBy"``; None
        where that is not known.
    """

    state: str
    seconds: float
    rows: int | None = None
    bytes: int | None = None
    fraction: float | None = None
    operator: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the query is done, well or not."""
        return self.state not in {"waiting", "running"}

    def __str__(self) -> str:
        parts = [self.state.replace("_", " "), in_seconds(self.seconds)]
        if self.fraction is not None:
            parts.insert(0, f"{floor(100 * self.fraction)} %")
        if self.rows is not None:
            parts.append(f"{self.rows:,} rows")
        if self.bytes is not None:
            parts.append(in_bytes(self.bytes))
        if self.operator is not None:
            parts.append(self.operator)
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"<Progress: {self}>"
