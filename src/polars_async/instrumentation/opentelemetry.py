"""
Spans and metrics of queries for OpenTelemetry, by its conventions for databases.

It needs ``polars-async[opentelemetry]``. ``opentelemetry-instrument`` finds it by itself. It does
not import Polars, as `polars_async._runtime.instruments` explains.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pkgutil import resolve_name
from time import perf_counter, time_ns
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opentelemetry import context as contexts
from opentelemetry import metrics, propagate, trace
from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]  # as below
    BaseInstrumentor,
)
from opentelemetry.metrics import Observation
from opentelemetry.trace import SpanKind, StatusCode

from polars_async._runtime import instruments
from polars_async._runtime.instruments import in_utf8
from polars_async.errors import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from contextvars import Context

    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider
    from opentelemetry.trace import Span, Tracer, TracerProvider
    from opentelemetry.util.types import AttributeValue

    from polars_async.events import QueryEvent

__all__ = ["PolarsAsyncInstrumentor"]

_OUTCOMES: Final = {
    "finished": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
    "timed_out": "timed_out",
    "rejected": "rejected",
}
"""The last events, and the outcomes as `Collector.stats` names them."""
_KINDS: Final = frozenset({"queued", "downgraded", "retried", "fell_back", *_OUTCOMES})
"""All but STARTED: when a query has started on the CPU, its last event tells, too."""
_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Seconds, as the conventions have them."""
_LONGEST: Final = 300
"""Characters of an error's text: Polars' may hold a whole plan."""
_SYSTEM: Final = "db.system.name"
_POOL: Final = "db.client.connection.pool.name"
_SET_UP: Final = "polars-async-set-up"
"""Beside the fields of the propagators: the name of the function that sets up a worker process."""


class PolarsAsyncInstrumentor(BaseInstrumentor):  # type: ignore[misc]  # mypy is to ignore its file
    """
    Makes a span for each query, from its submission to its end, and metrics of all queries.

    ``opentelemetry-instrument`` calls it for a program. A program that sets up OpenTelemetry itself
    calls ``PolarsAsyncInstrumentor().instrument()``, before or after it makes collectors; queries
    that were submitted before are left out, and ``uninstrument()`` ends it.

    A span is the child of the one that is current where the query is submitted, and is current in
    the Python functions of the query that have the context of the caller, in worker processes, too:
    so what they call makes children of it. It has the events ``queued``, ``started``, and, for the
    GPU, ``downgraded``, ``retried`` and ``fell_back``.
    """

    _telemetry: _Telemetry | None = None
    _carrier: tuple[str, Callable[[], Mapping[str, str]]] | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return nothing: what is instrumented comes with this class."""
        return ()

    def instrument(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        in_workers: Callable[[], object] | None = None,
        **more: Any,
    ) -> None:
        """
        Make spans and metrics of the queries that are submitted from now on.

        Parameters
        ----------
        tracer_provider, meter_provider
            What makes them; None are those of the process, which may be set later.
        in_workers
            Called in each process that runs queries for this one, before the first of them: it sets
            up OpenTelemetry there, for the spans that functions of queries make. It has to be a
            function of a module that can be imported there. Not needed where
            ``opentelemetry-instrument`` has started this program: workers are set up as it was.
        more
            What ``BaseInstrumentor.instrument`` takes.

        Raises
        ------
        ValueError
            `in_workers` cannot be imported by its name.
        """
        options = {
            "tracer_provider": tracer_provider,
            "meter_provider": meter_provider,
            "in_workers": None if in_workers is None else _name_of(in_workers),
        }
        super().instrument(**options, **more)

    def _instrument(self, **options: Any) -> None:
        own = "polars_async", version("polars-async")
        tracer = trace.get_tracer(*own, tracer_provider=options["tracer_provider"])
        meter = metrics.get_meter(*own, meter_provider=options["meter_provider"])
        self._telemetry = _Telemetry(tracer, meter)
        in_workers: str | None = options["in_workers"]
        self._carrier = f"{__name__}:enter", lambda: _carried(in_workers)
        instruments.attach(self._telemetry, self._carrier)

    def _uninstrument(self, **_options: Any) -> None:
        telemetry, carrier = self._telemetry, self._carrier
        assert telemetry is not None
        assert carrier is not None
        instruments.detach(telemetry, carrier)
        telemetry.observes = False
        self._telemetry = self._carrier = None


class _Running(NamedTuple):
    """The span of a query that has not ended, and when that was submitted."""

    span: Span
    submitted: float
    """By `perf_counter`."""
    submitted_ns: int
    """Since the epoch."""


class _Telemetry:
    """Makes spans and metrics of the events of queries; called on any thread."""

    def __init__(self, tracer: Tracer, meter: Meter) -> None:
        self.kinds = _KINDS
        self.observes = True
        """Whether the load of collectors is told: a meter cannot forget what it observes."""
        self._tracer: Final = tracer
        self._running: Final[dict[int, _Running]] = {}
        self._duration: Final = meter.create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of queries, from their submission to their end.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._wait_time: Final = meter.create_histogram(
            "db.client.connection.wait_time",
            unit="s",
            description="The time that queries waited for a slot.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._use_time: Final = meter.create_histogram(
            "db.client.connection.use_time",
            unit="s",
            description="The time that queries ran.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._timeouts: Final = meter.create_counter(
            "db.client.connection.timeouts",
            unit="{timeout}",
            description="Queries that timed out while they waited for a slot.",
        )
        meter.create_observable_up_down_counter(
            "db.client.connection.count",
            [self._count],
            unit="{connection}",
            description="The slots of collectors that are used, and those that are idle.",
        )
        meter.create_observable_up_down_counter(
            "db.client.connection.max",
            [self._max],
            unit="{connection}",
            description="The slots of collectors.",
        )
        meter.create_observable_up_down_counter(
            "db.client.connection.pending_requests",
            [self._pending],
            unit="{request}",
            description="Queries that wait for a slot.",
        )

    def __call__(self, event: QueryEvent, context: Context) -> None:
        outcome = _OUTCOMES.get(event.kind)
        if outcome is not None:
            self._end(event, outcome)
        elif event.kind == "queued":
            try:
                context.run(self._begin, event)
            except RuntimeError:
                # The query runs in it by now: under gevent, events come late to the main thread.
                context.copy().run(self._begin, event)
        elif event.kind != "started" or event.engine == "gpu":
            running = self._running.get(event.query_id)
            if running is not None:
                _add_event(running.span, event)

    def _begin(self, event: QueryEvent) -> None:
        """Begin the span of a query in its context, and make it the current one there."""
        summary = _name_in_span(event)
        attributes: dict[str, AttributeValue] = {
            _SYSTEM: "polars",
            "db.operation.name": event.operation,
            "db.query.summary": summary,
        }
        for name, value in event.tags.items():
            attributes[in_utf8(f"polars.tag.{name}")] = _sendable(value)
        submitted_ns = time_ns() - int(event.queue_seconds * 1e9)
        span = self._tracer.start_span(
            summary, kind=SpanKind.INTERNAL, attributes=attributes, start_time=submitted_ns
        )
        contexts.attach(trace.set_span_in_context(span))
        submitted = perf_counter() - event.queue_seconds
        self._running[event.query_id] = _Running(span, submitted, submitted_ns)
        if span.is_recording():
            span.add_event("queued", timestamp=submitted_ns)

    def _end(self, event: QueryEvent, outcome: str) -> None:
        running = self._running.pop(event.query_id, None)
        if running is None:  # an interrupt came while it was to begin
            return
        span, submitted, submitted_ns = running
        error = None if outcome == "completed" else _type_of(event, outcome)
        self._record(event, perf_counter() - submitted, error)
        if span.is_recording():
            if event.run_seconds is not None and event.engine != "gpu":
                # A span that began late, since its thread was held up or under gevent, starts late,
                # but the time before is part of the wait: the sum may lie in the future.
                started_ns = min(submitted_ns + int(event.queue_seconds * 1e9), time_ns())
                span.add_event("started", timestamp=started_ns)
            span.set_attributes(_attributes_at_end(event, error))
            if event.error is not None:
                span.set_status(StatusCode.ERROR, _text_of(event.error))
        span.end()

    def _record(self, event: QueryEvent, seconds: float, error: str | None) -> None:
        attributes: dict[str, AttributeValue] = {
            _SYSTEM: "polars",
            "db.operation.name": event.operation,
            "db.query.summary": _name_in_span(event),
            "polars.engine": event.engine,
        }
        if error is not None:
            attributes["error.type"] = error
        self._duration.record(seconds, attributes)
        pool = {_SYSTEM: "polars", _POOL: event.executor}
        if event.run_seconds is not None:
            self._wait_time.record(event.queue_seconds, pool)
            self._use_time.record(event.run_seconds, pool)
        elif event.kind == "timed_out" and event.shared_with is None:
            self._timeouts.add(1, pool)

    def _count(self, _options: CallbackOptions) -> Iterable[Observation]:
        for name, pool in self._pools():
            of = {_SYSTEM: "polars", _POOL: name}
            state = "db.client.connection.state"
            yield Observation(pool.used, {**of, state: "used"})
            yield Observation(max(0, pool.slots - pool.used), {**of, state: "idle"})

    def _max(self, _options: CallbackOptions) -> Iterable[Observation]:
        for name, pool in self._pools():
            yield Observation(pool.slots, {_SYSTEM: "polars", _POOL: name})

    def _pending(self, _options: CallbackOptions) -> Iterable[Observation]:
        for name, pool in self._pools():
            yield Observation(pool.waiting, {_SYSTEM: "polars", _POOL: name})

    def _pools(self) -> Iterable[tuple[str, _Pool]]:
        return _pools().items() if self.observes else ()


class _Pool(NamedTuple):
    """The load of all collectors that run queries in the same kind of place."""

    used: int
    slots: int
    waiting: int


def _pools() -> dict[str, _Pool]:
    """
    Return the load of all collectors that are not closed, by where they run queries.

    Not of each one: a program may make any number of them, one after the other.
    """
    found: dict[str, _Pool] = {}
    # Neither while no collector was made, nor while the module is being imported.
    stats_of_all = getattr(sys.modules.get("polars_async.collector"), "stats_of_all", tuple)
    for executor, stats in stats_of_all():
        before = found.get(executor, _Pool(0, 0, 0))
        found[executor] = _Pool(
            before.used + stats["running"],
            before.slots + stats["max_running"],
            before.waiting + stats["waiting"] - stats["sharing"],  # these wait for no slot
        )
    return found


def _add_event(span: Span, event: QueryEvent) -> None:
    if not span.is_recording():
        return
    attributes: dict[str, AttributeValue] = {"polars.engine": event.engine}
    if event.error is not None:
        attributes["exception.type"] = _qualified(type(event.error))
        attributes["exception.message"] = _text_of(event.error)
    span.add_event(str(event.kind), attributes)


def _attributes_at_end(event: QueryEvent, error: str | None) -> dict[str, AttributeValue]:
    # Few, where there is nothing to tell: each takes a microsecond.
    resolution = event.resolution
    attributes: dict[str, AttributeValue] = {
        "polars.engine": event.engine,
        "polars.queue_seconds": event.queue_seconds,
        "polars.summary": in_utf8(event.summary),
    }
    if event.run_seconds is not None:
        attributes["polars.run_seconds"] = event.run_seconds
    if event.shared_with is not None:
        attributes["polars.shared_with"] = event.shared_with
        attributes["polars.from_cache"] = event.from_cache
    if event.peak_memory is not None:
        attributes["polars.peak_memory"] = event.peak_memory
    if event.rows is not None:
        attributes["db.response.returned_rows"] = event.rows
    if resolution.source != "default":
        attributes["polars.engine_requested"] = str(resolution.requested)
    if resolution.reason is not None:
        attributes["polars.engine_reason"] = str(resolution.reason)
        attributes["polars.engine_message"] = in_utf8(str(resolution))
    if error is not None:
        attributes["error.type"] = error
    return attributes


def _name_in_span(event: QueryEvent) -> str:
    return in_utf8(event.label or event.operation)


def _text_of(error: BaseException) -> str:
    return in_utf8(describe(error)[:_LONGEST])


def _sendable(value: AttributeValue) -> AttributeValue:
    """Return the value of a tag as an exporter can send it: whole numbers have 64 bits there."""
    if isinstance(value, str):
        return in_utf8(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    return value


def _type_of(event: QueryEvent, outcome: str) -> str:
    return outcome if event.error is None else _qualified(type(event.error))


def _qualified(kind: type[BaseException]) -> str:
    name = kind.__qualname__
    return name if kind.__module__ == "builtins" else f"{kind.__module__}.{name}"


def _name_of(function: Callable[[], object]) -> str:
    """Return the name by which another process can import `function`."""
    name, found = "", None
    try:
        name = f"{function.__module__}:{function.__qualname__}"
        if function.__module__ != "__main__":  # which is another module there
            found = resolve_name(name)
    except (AttributeError, ImportError, ValueError):
        pass
    if found is not function:
        raise ValueError(
            f"in_workers must be a function that another process can import, got {function!r}: "
            "define it at the top of a module other than that of the program"
        )
    return name


def _carried(in_workers: str | None) -> Mapping[str, str]:
    """Return what goes along with a query, in whose context this is called."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    if in_workers is not None:
        carrier[_SET_UP] = in_workers
    return carrier


_was_set_up: Final[set[str]] = set()


def enter(carrier: Mapping[str, str]) -> Callable[[], None]:
    """In another process, make what `_carried` has returned current; return what undoes it."""
    in_workers = carrier.get(_SET_UP)
    if in_workers is not None and in_workers not in _was_set_up:
        _was_set_up.add(in_workers)
        resolve_name(in_workers)()
    token = contexts.attach(propagate.extract(carrier))
    return lambda: contexts.detach(token)
