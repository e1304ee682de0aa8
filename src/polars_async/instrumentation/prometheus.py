"""
Metrics of collectors for Prometheus.

It needs ``polars-async[prometheus]``. Counters and histograms are fed by the events of queries.
Gauges are read from `Collector.stats` when they are scraped; but not in the multi-process mode of
prometheus_client, where one process is asked for the values of all: there, events feed them, too.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from polars_async._runtime.fork import new_lock
from polars_async._runtime.instruments import in_utf8
from polars_async.errors import WorkerDiedError
from polars_async.events import EventKind

if TYPE_CHECKING:
    from contextvars import Context

    from prometheus_client import CollectorRegistry

    from polars_async.collector import Collector
    from polars_async.events import QueryEvent, Reporter

__all__ = ["register", "unregister"]

_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)
"""Seconds: those of OpenTelemetry for a client of a database, and one for heavy queries."""
_OUTCOMES: Final = {
    EventKind.FINISHED: "completed",
    EventKind.FAILED: "failed",
    EventKind.CANCELLED: "cancelled",
    EventKind.TIMED_OUT: "timed_out",
    EventKind.REJECTED: "rejected",
}
"""The outcomes, named as by `Collector.stats`."""
_ALL: Final = frozenset(EventKind)

_lock: Final = new_lock()


def register(
    collector: Collector,
    registry: CollectorRegistry | None = None,
    *,
    name: str = "default",
    by_label: bool = False,
) -> None:
    """
    Have the queries of a collector counted from now on.

    ====================================== ========= ==============================================
    metric                                 kind      labels, beside ``collector``
    ====================================== ========= ==============================================
    polars_async_queries_total             counter   ``engine``, and ``outcome``: ``completed``,
                                                     ``failed``, ``cancelled``, ``timed_out`` or
                                                     ``rejected``
    polars_async_engine_changes_total      counter   ``engine``, the one that runs instead, and
                                                     ``kind``: ``downgraded``, ``retried`` or
                                                     ``fell_back``
    polars_async_queries_shared_total      counter   ``source``, of the result that a query had
                                                     instead of running itself: ``run`` of an equal
                                                     one, or ``cache``
    polars_async_memory_waits_total        counter   queries that started later for want of memory
    polars_async_memory_wait_seconds_total counter   how much later, in all
    polars_async_workers_died_total        counter
    polars_async_queries_waiting           gauge
    polars_async_queries_running           gauge     without those that were cancelled or timed out
                                                     and hold their slot
    polars_async_query_wait_seconds        histogram ``engine``; of queries that have started
    polars_async_query_run_seconds         histogram ``engine``, ``outcome``; as above
    ====================================== ========= ==============================================

    The collector is not kept alive by this, and its metrics stay when it is closed.

    Parameters
    ----------
    collector
        The collector.
    registry
        The registry of the metrics; None is that of prometheus_client. It has one set of them, for
        all collectors.
    name
        The value of the label ``collector``. Collectors of one name are added up.
    by_label
        Whether counters of queries and histograms have a label ``label``, too: the ``label=`` of
        the query. Only if a program has few of them, as each is a time series that stays.

    Raises
    ------
    ValueError
        The collector is registered there already; or `by_label` differs from that of another
        collector in the registry.
    """
    registry = REGISTRY if registry is None else registry
    with _lock:
        metrics = _registered.get(registry)
        if metrics is None:
            metrics = _Metrics(registry, by_label=by_label)
        elif collector in metrics.feeds:
            raise ValueError(f"{collector!r} is registered already: unregister() it first")
        elif metrics.by_label != by_label:
            raise ValueError(
                f"by_label must be the same for all collectors of a registry, {metrics.by_label}, "
                f"got {by_label}: give this one a registry of its own"
            )
        _registered[registry] = metrics
        feed = metrics.feeds[collector] = _Feed(metrics, name)
        _reporter_of(collector).add(feed)  # with the lock: of two added at once, one would be lost


def unregister(collector: Collector, registry: CollectorRegistry | None = None) -> None:
    """
    Have the queries of a collector that are submitted from now on not counted.

    What was counted stays, until the last collector of the registry is unregistered: then its
    metrics are removed.

    Parameters
    ----------
    collector, registry
        As for `register`.

    Raises
    ------
    ValueError
        The collector is not registered there.
    """
    registry = REGISTRY if registry is None else registry
    with _lock:
        metrics = _registered.get(registry)
        feed = None if metrics is None else metrics.feeds.pop(collector, None)
        if metrics is None or feed is None:
            raise ValueError(f"{collector!r} is not registered: register() it first")
        _reporter_of(collector).remove(feed)
        if not metrics.feeds:
            del _registered[registry]
            for metric in metrics.all:
                registry.unregister(metric)


def _reporter_of(collector: Collector) -> Reporter:
    return collector._reporter  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # one package


class _Metrics:
    """The metrics of one registry."""

    def __init__(self, registry: CollectorRegistry, *, by_label: bool) -> None:
        self.by_label: Final = by_label
        self.feeds_gauges: Final = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self.feeds: Final[WeakKeyDictionary[Collector, _Feed]] = WeakKeyDictionary()
        more = ("label",) if by_label else ()
        self.queries: Final = Counter(
            "polars_async_queries",
            "Queries that have ended.",
            ("collector", "engine", "outcome", *more),
            registry=registry,
        )
        self.changes: Final = Counter(
            "polars_async_engine_changes",
            "Queries that another engine runs, or the GPU once more.",
            ("collector", "engine", "kind"),
            registry=registry,
        )
        self.shared: Final = Counter(
            "polars_async_queries_shared",
            "Queries that had the result of another, instead of running.",
            ("collector", "source"),
            registry=registry,
        )
        self.memory_waits: Final = Counter(
            "polars_async_memory_waits",
            "Queries that have started later for want of memory alone.",
            ("collector",),
            registry=registry,
        )
        self.memory_seconds: Final = Counter(
            "polars_async_memory_wait_seconds",
            "How much later queries have started for want of memory alone.",
            ("collector",),
            registry=registry,
        )
        self.deaths: Final = Counter(
            "polars_async_workers_died",
            "Worker processes that died with a query.",
            ("collector",),
            registry=registry,
        )
        self.waiting: Final = Gauge(
            "polars_async_queries_waiting",
            "Queries in the queue.",
            ("collector",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.running: Final = Gauge(
            "polars_async_queries_running",
            "Queries that run.",
            ("collector",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.wait: Final = Histogram(
            "polars_async_query_wait_seconds",
            "How long queries waited for a slot.",
            ("collector", "engine", *more),
            registry=registry,
            buckets=_BUCKETS,
        )
        self.run: Final = Histogram(
            "polars_async_query_run_seconds",
            "How long queries ran.",
            ("collector", "engine", "outcome", *more),
            registry=registry,
            buckets=_BUCKETS,
        )
        self.all: Final = (
            self.queries,
            self.changes,
            self.shared,
            self.memory_waits,
            self.memory_seconds,
            self.deaths,
            self.waiting,
            self.running,
            self.wait,
            self.run,
        )

    def count(self, name: str, key: str, less: str | None = None) -> float:
        """Return how many queries all collectors of a `name` have under `key` of `stats`."""
        total = 0.0
        for known in self.feeds.keyrefs():  # a copy, made in one step
            collector = known()
            feed = None if collector is None else self.feeds.get(collector)
            if collector is not None and feed is not None and feed.name == name:
                stats = collector.stats()
                total += stats[key] - (0 if less is None else stats[less])
        return total


_registered: Final[WeakKeyDictionary[CollectorRegistry, _Metrics]] = WeakKeyDictionary()


class _Series:
    """The time series of the queries of one collector that end in the same way."""

    __slots__ = ("queries", "run", "wait")

    def __init__(self, metrics: _Metrics, name: str, key: tuple[str, ...]) -> None:
        engine, outcome, *more = key
        self.queries = metrics.queries.labels(name, engine, outcome, *more)
        self.wait = metrics.wait.labels(name, engine, *more)
        self.run = metrics.run.labels(name, engine, outcome, *more)


class _Feed:
    """Feeds the metrics with the events of one collector; called on any thread."""

    def __init__(self, metrics: _Metrics, name: str) -> None:
        self.kinds = _ALL if metrics.feeds_gauges else _ALL - {EventKind.QUEUED, EventKind.STARTED}
        self.name = name
        self._metrics = metrics
        self._waiting = metrics.waiting.labels(name)
        self._running = metrics.running.labels(name)
        if not metrics.feeds_gauges:
            self._waiting.set_function(partial(metrics.count, name, "waiting"))
            self._running.set_function(partial(metrics.count, name, "running", "abandoned"))
        self._deaths = metrics.deaths.labels(name)
        self._memory_waits = metrics.memory_waits.labels(name)
        self._memory_seconds = metrics.memory_seconds.labels(name)
        self._shared = {
            from_cache: metrics.shared.labels(name, source)
            for from_cache, source in ((False, "run"), (True, "cache"))
        }
        self._series: dict[tuple[str, ...], _Series] = {}
        """Kept here, since `labels` takes a microsecond to find one."""
        self._counted: dict[int, Gauge] = {}
        """The gauges in which queries are counted now, by their ids."""

    def __call__(self, event: QueryEvent, _context: Context) -> None:
        kind = event.kind
        outcome = _OUTCOMES.get(kind)
        if outcome is not None:
            self._end(event, outcome)
        elif kind is not EventKind.QUEUED and kind is not EventKind.STARTED:
            self._metrics.changes.labels(self.name, event.engine, str(kind)).inc()
        if self._metrics.feeds_gauges:
            self._count(event.query_id, self._gauge_after(kind))

    def _gauge_after(self, kind: EventKind) -> Gauge | None:
        """Return where a query counts after an event."""
        if kind in _OUTCOMES:
            return None
        is_running = kind is EventKind.STARTED or kind is EventKind.RETRIED
        return self._running if is_running else self._waiting

    def _count(self, query_id: int, gauge: Gauge | None) -> None:
        """Count a query in `gauge`, and no longer where it was counted before."""
        # By what was counted, and not by what an event implies: a query that is cancelled at its
        # start has run, though STARTED is not told.
        if (before := self._counted.pop(query_id, None)) is not None:
            before.dec()
        if gauge is not None:
            gauge.inc()
            self._counted[query_id] = gauge

    def _end(self, event: QueryEvent, outcome: str) -> None:
        key: tuple[str, ...] = (event.engine, outcome)
        if self._metrics.by_label:
            key = (*key, in_utf8(event.label or ""))
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(self._metrics, self.name, key)
        series.queries.inc()
        if event.run_seconds is not None:
            series.wait.observe(event.queue_seconds)
            series.run.observe(event.run_seconds)
            if event.memory_seconds > 0:
                self._memory_waits.inc()
                self._memory_seconds.inc(event.memory_seconds)
        elif event.shared_with is not None and event.kind is EventKind.FINISHED:
            self._shared[event.from_cache].inc()
        if isinstance(event.error, WorkerDiedError):
            self._deaths.inc()
