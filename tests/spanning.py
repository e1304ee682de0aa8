"""What OpenTelemetry was told; and functions of a user's that make spans, wherever they run."""

from __future__ import annotations

import os

from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from places import until


class Told:
    """What OpenTelemetry was told."""

    def __init__(self):
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meters = MeterProvider([self._reader])
        self.tracer = self.tracers.get_tracer("test")

    def spans(self, name):
        return [each for each in self._exporter.get_finished_spans() if each.name == name]

    def span(self, name):
        """Give the one span of this name, once it has ended."""
        until(lambda: self.spans(name))
        (span,) = self.spans(name)
        return span

    def points(self, name):
        """Give what was measured by `name`: the points by their attributes, less the system."""
        data = self._reader.get_metrics_data()
        found = {}
        for resource in [] if data is None else data.resource_metrics:
            for metric in (each for scope in resource.scope_metrics for each in scope.metrics):
                for point in metric.data.data_points if metric.name == name else ():
                    attributes = dict(point.attributes)
                    assert attributes.pop("db.system.name") == "polars"
                    found[frozenset(attributes.items())] = point
        return found


def traced(frame):
    with trace.get_tracer("spanning").start_as_current_span("function"):
        return frame


def set_up():
    """Set up a worker process, which notes its spans in a file."""
    out = open(os.environ["SPANS_OF_WORKERS"], "a", buffering=1)  # noqa: PTH123, SIM115  # to the end
    out.write(f"{('set up', 0, None)!r}\n")
    exporter = ConsoleSpanExporter(out=out, formatter=_line)
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def _line(span):
    parent = span.parent.span_id if span.parent else None
    return f"{(span.name, span.context.trace_id, parent)!r}\n"


def current_span():
    context = trace.get_current_span().get_span_context()
    return context.trace_id, context.span_id
