"""
Measure single steps of a query: ``ci/bench micro``, with the options of pytest-benchmark.

Every query is a trivial one; `test_collect` is that query alone, without this project's code. With
loops, a round is as many queries as the name says, since starting and stopping a loop takes time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import gevent
import polars as pl
import pytest
import trio
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import NoOpTracerProvider
from prometheus_client import CollectorRegistry

import polars_async as pa
from polars_async.instrumentation.opentelemetry import PolarsAsyncInstrumentor
from polars_async.instrumentation.prometheus import register

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.sdk.trace import ReadableSpan
    from pytest_benchmark.fixture import BenchmarkFixture

QUERY = pl.LazyFrame({"a": [1, 2, 3]}).select(pl.col("a").sum())
NUMBER = 300


def test_collect(benchmark: BenchmarkFixture) -> None:
    """The query alone."""
    assert benchmark(QUERY.collect, engine="in-memory").item() == 6


@pytest.mark.parametrize("engine", ["auto", "streaming", pl.StreamingEngine()], ids=str)
def test_resolve_engine(benchmark: BenchmarkFixture, engine: Any) -> None:
    """Resolving the engine of a query."""
    found = benchmark(pa.resolve_engine, engine)
    assert found.name == ("in-memory" if engine == "auto" else "streaming")


def test_gpu_status(benchmark: BenchmarkFixture) -> None:
    """Asking again for the status of the GPUs, which is cached."""
    assert benchmark(pa.gpu_status) == pa.gpu_status()


def test_handle(benchmark: BenchmarkFixture) -> None:
    """Submitting a query, while the queue grows."""
    with pa.Collector() as collector:
        handle = benchmark(collector.collect_async, QUERY)
        assert handle.result().item() == 6


def test_result_of_done(benchmark: BenchmarkFixture) -> None:
    """Asking again for a result."""
    handle = pa.collect_async(QUERY)
    handle.result()
    assert benchmark(handle.result).item() == 6


def _print_nothing(_event: pa.QueryEvent) -> None: ...


class _Nowhere(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002
        return SpanExportResult.SUCCESS


def _sdk() -> tuple[TracerProvider, MeterProvider]:
    spans = TracerProvider(shutdown_on_exit=False)
    spans.add_span_processor(BatchSpanProcessor(_Nowhere()))
    return spans, MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)


@pytest.mark.parametrize("what", ["nothing", "hook", "prometheus", "api", "sdk"])
def test_watched(benchmark: BenchmarkFixture, what: str) -> None:
    """A round trip of which something is told: OpenTelemetry without and with its SDK."""
    instrumentor = PolarsAsyncInstrumentor()
    options: dict[str, Any] = {}
    if what == "api":
        options = {"tracer_provider": NoOpTracerProvider(), "meter_provider": NoOpMeterProvider()}
    elif what == "sdk":
        options = dict(zip(("tracer_provider", "meter_provider"), _sdk(), strict=True))
    with pa.Collector(on_event=_print_nothing if what == "hook" else None) as collector:
        if what == "prometheus":
            register(collector, CollectorRegistry())
        if options:
            instrumentor.instrument(**options)
        found = benchmark(lambda: collector.collect_async(QUERY).result())
        if options:
            instrumentor.uninstrument()
    assert found.item() == 6


def test_span_alone(benchmark: BenchmarkFixture) -> None:
    """What the SDK of OpenTelemetry takes for as much, without a query: the floor of the above."""
    spans, meters = _sdk()
    tracer, meter = spans.get_tracer("floor"), meters.get_meter("floor")
    histograms = [meter.create_histogram(name) for name in ("duration", "wait_time", "use_time")]
    attributes = {f"attribute {number}": "value" for number in range(4)}

    def trip() -> None:
        span = tracer.start_span("floor", attributes=attributes)
        span.add_event("queued")
        span.add_event("started")
        span.set_attributes(attributes)
        span.end()
        for histogram in histograms:
            histogram.record(0.1, attributes)

    benchmark(trip)


def _thread_trips() -> int:
    return sum(pa.collect_async(QUERY).result().item() for _ in range(NUMBER))


def _thread_fan() -> int:
    return sum(each.result().item() for each in [pa.collect_async(QUERY) for _ in range(NUMBER)])


async def _one_by_one() -> int:
    return sum([(await pa.collect_async(QUERY)).item() for _ in range(NUMBER)])


def _asyncio_trips() -> int:
    return asyncio.run(_one_by_one())


def _asyncio_fan() -> int:
    async def main() -> int:
        found = await asyncio.gather(*(pa.collect_async(QUERY) for _ in range(NUMBER)))
        return sum(each.item() for each in found)

    return asyncio.run(main())


def _trio_trips() -> int:
    return trio.run(_one_by_one)


def _trio_fan() -> int:
    found = []

    async def ask() -> None:
        found.append((await pa.collect_async(QUERY)).item())

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(NUMBER):
                nursery.start_soon(ask)

    trio.run(main)
    return sum(found)


def _gevent_trips() -> int:
    return sum(pa.collect_async(QUERY, gevent=True).get().item() for _ in range(NUMBER))


def _gevent_fan() -> int:
    handles = [pa.collect_async(QUERY, gevent=True) for _ in range(NUMBER)]
    waiting = [gevent.spawn(handle.get) for handle in handles]
    return sum(each.get().item() for each in waiting)


def _name(function: Callable[[], int]) -> str:
    return function.__name__.split("_")[1]


@pytest.mark.parametrize(
    "ask", [_thread_trips, _asyncio_trips, _trio_trips, _gevent_trips], ids=_name
)
def test_300_one_by_one(benchmark: BenchmarkFixture, ask: Callable[[], int]) -> None:
    """Round trips."""
    assert benchmark(ask) == 6 * NUMBER


@pytest.mark.parametrize("ask", [_thread_fan, _asyncio_fan, _trio_fan, _gevent_fan], ids=_name)
def test_300_at_once(benchmark: BenchmarkFixture, ask: Callable[[], int]) -> None:
    """Queries that are all submitted before the first is awaited."""
    assert benchmark(ask) == 6 * NUMBER
