"""What counts what a query reads, in this process and in a worker process."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from polars_async._runtime import msgpack
from polars_async._runtime.fork import new_lock
from polars_async._runtime.green import leaving_no_hub
from polars_async._runtime.unpatched import start_new_thread
from polars_async._runtime.upstream import CountingEngine, counting_engine, observed
from polars_async.executors.operations import on_engine
from polars_async.executors.scanned import Scan, scans_of
from polars_async.progress import NOTHING_READ, Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import polars as pl

    from polars_async.executors.operations import Operation

T = TypeVar("T")

_NEARLY: Final = 0.99
"""The share of a query whose scans are over: what is left for it to do is not known."""


class SentMeter:
    """The meter of a query in a worker process, which sends what it reads."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = NOTHING_READ

    def note(self, reading: tuple[Any, ...]) -> None:
        """Note what the worker has sent."""
        self._last = Reading(*reading)

    def read(self) -> Reading:
        """Return what the worker has sent last."""
        return self._last


class LocalMeter:
    """The meter of a query that runs in this process: an `Observer` of Polars' hook."""

    def __init__(self, frames: Sequence[pl.LazyFrame]) -> None:
        self._frames: Sequence[pl.LazyFrame] = tuple(frames)
        self._parts: list[_Part] = []
        self._lock = new_lock()
        self._most = 0.0
        """The largest fraction that was told so far."""
        self._finds_sizes = False

    def planned(self, handle: Any, plan: bytes) -> None:
        """Note that the query begins to run; one of several frames may be planned as several."""
        self._parts.append(_Part(handle, plan))

    def read(self) -> Reading:
        """Return what the operators have done so far; sizes of files are known a moment later."""
        with self._lock:
            for part in self._parts:
                if part.scans is None:
                    part.prepare()
            if not self._finds_sizes and any(scan.is_unsized for scan in self._scans()):
                self._finds_sizes = True
                with suppress(RuntimeError):  # no thread can start
                    start_new_thread(_find_sizes, (self._scans(), self._frames))
            return self._reading()

    def end(self) -> None:
        """Keep what the operators have done, and nothing else; called when the query has ended."""
        with self._lock:
            self._frames = ()
            for part in self._parts:
                part.end()

    def _scans(self) -> list[Scan]:
        return [scan for part in self._parts for scan in part.scans or ()]

    def _reading(self) -> Reading:
        for part in self._parts:
            part.take()
        scans = self._scans()
        if not scans:
            return NOTHING_READ
        counted = sum(scan.bytes for scan in scans)
        fraction = _share_of(scans)
        if fraction is not None:
            fraction = self._most = max(self._most, _NEARLY * fraction)
        return Reading(
            rows=sum(scan.rows for scan in scans),
            bytes=counted or None,
            fraction=fraction,
            operator=next((part.operator for part in reversed(self._parts) if part.operator), None),
        )


class _Part:
    """One physical plan, and the counts of its operators."""

    def __init__(self, handle: Any, plan: bytes) -> None:
        self._handle: Any = handle
        self._plan = plan
        self._last: bytes | None = None
        self._kinds: dict[int, str] = {}
        self._taken: dict[int, int] = {}
        self.scans: list[Scan] | None = None
        self.operator: str | None = None
        """The operator that has worked the most since the last look."""

    def prepare(self) -> None:
        """Read the plan; one that cannot be read has no scans."""
        self.scans = []
        with suppress(ValueError, TypeError, LookupError, AttributeError):
            nodes = msgpack.read(self._plan) or ()  # the in-memory engine has no physical plan
            self._kinds = {node["id"]: node["properties"]["type"] for node in nodes}
            self.scans = scans_of(nodes)

    def take(self) -> None:
        """Have each scan know its counts so far."""
        with suppress(ValueError, TypeError, LookupError, AttributeError):
            told = msgpack.read(self._snapshot())
            nodes = told["nodes"] if isinstance(told, dict) else told
            counts = {node["phys_node_key"]: node for node in nodes}
            for scan in self.scans or ():
                scan.take(counts[scan.key])
            self.operator = self._working(counts)

    def end(self) -> None:
        """Take the last counts, and let go of what Polars holds for them."""
        with suppress(Exception):  # whatever Polars does after a query that failed
            self._last = self._snapshot()
        self._handle = None
        self.operator = None

    def _snapshot(self) -> bytes:
        if self._last is not None:
            return self._last
        snapshot: bytes = self._handle.snapshot_query_metrics()
        return snapshot

    def _working(self, counts: dict[int, Any]) -> str | None:
        if self._last is not None:
            return None
        spent = {
            key: node["total_time_ns"] - self._taken.get(key, 0) for key, node in counts.items()
        }
        self._taken = {key: node["total_time_ns"] for key, node in counts.items()}
        busiest = max(
            (key for key, node in counts.items() if not node["done"] and spent[key] > 0),
            key=spent.__getitem__,
            default=None,
        )
        return self.operator if busiest is None else self._kinds.get(busiest)


def is_counting(operation: Operation[Any]) -> bool:
    """Return whether `operation` is one that `counting` has returned."""
    return isinstance(getattr(operation, "engine", None), CountingEngine)


def counting(operation: Operation[T]) -> Operation[T]:
    """Return `operation`, which is on the streaming engine, so that `count` can count it."""
    engine: pl.Engine = getattr(operation, "engine")  # noqa: B009  # of those on an engine
    return on_engine(operation, counting_engine(engine))


def count(operation: Callable[[], T], meter: LocalMeter) -> T:
    """Run an operation that `counting` has returned, and have `meter` know what it does."""
    try:
        return observed(meter, operation)
    finally:
        meter.end()
        del operation, meter  # see QueryExecutor.run


def _share_of(scans: Sequence[Scan]) -> float | None:
    """Return the share of the scans that is done; None if that of one is not known."""
    shares = [scan.share for scan in scans]
    if None in shares:
        return None
    sizes = [scan.size_in_rows for scan in scans]
    # What is known in bytes alone cannot be compared.
    weights = [size or 0 for size in sizes] if None not in sizes else [1 for _ in scans]
    whole = sum(weights)
    if whole == 0:
        return 1.0
    return sum((share or 0.0) * each for share, each in zip(shares, weights, strict=True)) / whole


@leaving_no_hub
def _find_sizes(scans: Sequence[Scan], frames: Sequence[pl.LazyFrame]) -> None:
    for scan in scans:
        if scan.is_unsized:
            scan.find_size(frames)
