"""Spans and metrics for OpenTelemetry: of queries, and of what their functions do elsewhere."""

from __future__ import annotations

import asyncio
import gzip
import os
import subprocess
import sys
import threading
from ast import literal_eval
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import perf_counter

import inside
import polars as pl
import pytest
import spanning
from opentelemetry import baggage, context, trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from places import TINY, Failure, Notes, until
from servers import Server
from snippets import FILES
from spanning import Told

import polars_async
from polars_async import (
    Cache,
    Collector,
    EngineDowngradeWarning,
    QueryTimeoutError,
    QueueFullError,
)
from polars_async._runtime.instruments import Attached
from polars_async.collector import stats_of_all
from polars_async.instrumentation import opentelemetry
from polars_async.instrumentation.opentelemetry import PolarsAsyncInstrumentor
from polars_async.testing import simulate_gpu

SOURCE = str(Path(polars_async.__file__).parents[1])
PROGRAMS = Path(sys.executable).parent
POOL = frozenset({("db.client.connection.pool.name", "threads")})
BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)


@pytest.fixture
def told():
    """Have all queries of the test told."""
    told = Told()
    instrumentor = PolarsAsyncInstrumentor()
    instrumentor.instrument(tracer_provider=told.tracers, meter_provider=told.meters)
    yield told
    instrumentor.uninstrument()
    assert Attached.listeners == Attached.carriers == ()


@pytest.fixture
def telling(told, make):  # noqa: ARG001  # instrumented before
    return make(max_running=1, max_waiting=1)


def failing(error):
    def udf(_):
        raise error

    return TINY.map_batches(udf)


def events(span):
    return [event.name for event in span.events]


# Spans


@pytest.mark.everywhere
def test_span_of_a_query_is_a_child_of_the_caller(telling, told):
    with told.tracer.start_as_current_span("caller") as caller:
        telling.collect_async(TINY, label="sales", tags={"shop": "a", "top": 3}).result(30)
    span = told.span("sales")
    assert span.parent.span_id == caller.get_span_context().span_id
    assert (span.kind, span.status.status_code) == (SpanKind.INTERNAL, StatusCode.UNSET)
    assert events(span) == ["queued", "started"]
    assert span.start_time == span.events[0].timestamp < span.events[1].timestamp < span.end_time
    attributes = dict(span.attributes)
    assert 0 <= attributes.pop("polars.queue_seconds") < attributes["polars.run_seconds"] + 60
    assert attributes.pop("polars.run_seconds") > 0
    assert " on the in-memory engine" in attributes.pop("polars.summary")
    assert attributes == {
        "db.system.name": "polars",
        "db.operation.name": "collect",
        "db.query.summary": "sales",
        "db.response.returned_rows": 1,
        "polars.engine": "in-memory",
        "polars.tag.shop": "a",
        "polars.tag.top": 3,
    }


def test_span_without_a_label_is_named_after_the_operation(telling, told, tmp_path):
    telling.collect_async(TINY).result(30)
    telling.collect_all_async([TINY]).result(30)
    telling.sink_async(TINY.sink_csv(tmp_path / "a.csv", lazy=True)).result(30)
    telling.collect_schema_async(TINY).result(30)

    async def batches():
        return [each async for each in telling.collect_batches_async(TINY)]

    assert asyncio.run(batches())
    for name in ("collect", "collect_all", "sink", "schema", "batches"):
        span = told.span(name)
        assert span.attributes["db.operation.name"] == name
        assert span.attributes["db.query.summary"] == name
        assert span.parent is None


def test_query_starts_before_its_span_ends_though_that_began_late(telling, told, blocked):
    handle = telling.collect_async(blocked.lf, label="sales")
    assert blocked.started.wait(30)
    handle._query.times._submitted -= 3600  # before the thread was held up that began the span
    blocked.gate.set()
    handle.result(30)
    span = told.span("sales")
    assert span.start_time < span.events[1].timestamp < span.end_time


def test_span_tells_how_its_query_failed(telling, told):
    with pytest.raises(Failure):
        telling.collect_async(failing(Failure("no " * 1000)), label="fails").result(30)
    span = told.span("fails")
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description.startswith("Failure: no no")
    assert len(span.status.description) < 1000
    assert span.attributes["error.type"] == "places.Failure"


def test_span_can_be_sent_whatever_is_in_its_label_its_tags_and_its_error(telling, told):
    odd = os.fsdecode(b"\xff")
    handle = telling.collect_async(
        failing(ValueError(odd)), label=f"a{odd}", tags={odd: odd, "n": 1 << 64, "é": "é"}
    )
    with pytest.raises(Exception, match=odd):
        handle.result(30)
    span = told.span("a?")
    assert span.name == span.attributes["db.query.summary"] == "a?"
    tags = {name: span.attributes[f"polars.tag.{name}"] for name in ("?", "n", "é")}
    assert tags == {"?": "?", "n": "18446744073709551616", "é": "é"}
    assert encode_spans([span]).SerializeToString()
    (point,) = told.points("db.client.operation.duration").values()
    assert point.attributes["db.query.summary"] == "a?"


def test_span_ends_when_the_query_is_given_up_or_refused(telling, told, blocked):
    late = telling.collect_async(blocked.lf, timeout=3600, label="late")
    assert blocked.started.wait(30)
    waiting = telling.collect_async(TINY, label="waiting")
    with pytest.raises(QueueFullError):
        telling.collect_async(TINY, label="rejected")
    waiting.cancel()
    inside.let_time_be_up(late)
    with pytest.raises(QueryTimeoutError):
        late.result(30)
    found = {}
    for name in ("late", "waiting", "rejected"):
        span = told.span(name)
        found[name] = span.attributes["error.type"], span.status.status_code, events(span)
    assert found == {
        "late": (
            "polars_async.errors.QueryTimeoutError",
            StatusCode.ERROR,
            ["queued", "started"],
        ),
        "waiting": ("cancelled", StatusCode.UNSET, ["queued"]),
        "rejected": (
            "polars_async.errors.QueueFullError",
            StatusCode.ERROR,
            ["queued"],
        ),
    }


@pytest.mark.usefixtures("small_frames")
def test_each_caller_of_a_shared_run_has_a_span(make, told, block):
    collector = make(single_flight=True, max_running=1)
    missing = TINY.select("b")
    busy = block()
    collector.collect_async(busy.lf)
    assert busy.started.wait(30)
    late = collector.collect_async(missing, label="c", timeout=3600)
    handles = [collector.collect_async(missing, label=label) for label in "ab"]
    assert collector.stats()["sharing"] == 2
    inside.let_time_be_up(late)
    pending = told.points("db.client.connection.pending_requests")[POOL]
    assert pending.value == 1  # their run; of the two, none needs a slot
    busy.gate.set()
    for handle in handles:
        with pytest.raises(pl.exceptions.ColumnNotFoundError):
            handle.result(30)
    for handle, name in zip((late, *handles), "cab", strict=True):
        span = told.span(name)
        shared = None if handle is late else late.id
        assert span.attributes.get("polars.shared_with") == shared
        assert span.attributes.get("polars.from_cache") == (None if shared is None else False)
        assert span.attributes["polars.summary"].startswith("waited ")
        assert span.status.status_code is StatusCode.ERROR
    assert told.span("a").attributes["error.type"].endswith("ColumnNotFoundError")
    assert (
        f", shared with query {late.id}, failed by" in told.span("b").attributes["polars.summary"]
    )
    assert len(told.spans("collect")) == 1  # that of the first query
    assert sum(each.count for each in told.points("db.client.operation.duration").values()) == 4
    assert len(told.points("db.client.connection.timeouts")) == 1


@pytest.mark.usefixtures("small_frames")
def test_caller_who_times_out_while_another_runs_for_it_did_not_wait_for_a_slot(make, told, block):
    collector = make(single_flight=True, max_running=1)
    gate = block()
    first = collector.run(gate.lf.collect)
    assert gate.started.wait(30)
    query = TINY.select("a")
    waiting = collector.collect_async(query)
    late = collector.collect_async(query, timeout=3600)
    inside.let_time_be_up(late)
    assert not told.points("db.client.connection.timeouts")
    gate.gate.set()
    first.result(30)
    waiting.result(30)
    assert told.span("run").attributes["db.operation.name"] == "run"


@pytest.mark.usefixtures("small_frames")
def test_span_of_a_result_that_was_kept_says_so(told):
    with Collector(cache=Cache(seconds=60, max_bytes="1 GB"), inline=0) as collector:
        first = collector.collect_async(TINY, label="first")
        first.result(30)
        until(lambda: collector.stats()["cached"] == 1)
        collector.collect_async(TINY, label="second").result(30)
    attributes = told.span("second").attributes
    assert (attributes["polars.shared_with"], attributes["polars.from_cache"]) == (first.id, True)
    assert attributes["db.response.returned_rows"] == 1
    assert "polars.shared_with" not in told.span("first").attributes


def test_span_tells_why_another_engine_runs(telling, told):
    with pytest.warns(EngineDowngradeWarning):
        telling.collect_async(TINY, engine="gpu", label="downgraded").result(30)
    with simulate_gpu(fail="oom"), Collector(gpu="offload") as collector:
        collector.collect_async(TINY, engine="gpu", label="fell back").result(30)
    span = told.span("downgraded")
    assert events(span) == ["queued", "downgraded", "started"]
    assert span.attributes["polars.engine_requested"] == "gpu"
    assert span.attributes["polars.engine_reason"] == "async_path"
    span = told.span("fell back")
    assert events(span) == ["queued", "started", "retried", "fell_back", "started"]
    assert span.events[3].attributes["exception.type"] == "MemoryError"
    assert span.attributes["polars.engine"] == "in-memory"
    assert span.attributes["polars.engine_reason"] == "out_of_gpu_memory"
    assert "so the in-memory engine runs" in span.attributes["polars.engine_message"]


# What functions of queries find


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_span_is_current_in_functions_of_its_query(telling, make, told, engine):
    other = make()

    def function(frame):
        with told.tracer.start_as_current_span("function"):
            other.collect_async(TINY, label="nested").result(30)
        return frame

    with told.tracer.start_as_current_span("caller") as caller:
        telling.collect_async(TINY.map_batches(function), engine=engine, label="it").result(30)
        assert trace.get_current_span() is caller
    for child, parent in [("nested", "function"), ("function", "it"), ("it", "caller")]:
        assert told.span(child).parent.span_id == told.span(parent).context.span_id


@pytest.mark.everywhere
def test_span_and_baggage_go_along_to_wherever_the_query_runs(telling, told):
    notes = Notes()

    def function(frame):
        notes.append((*spanning.current_span(), baggage.get_baggage("tenant")))
        return frame

    def bare(frame):
        notes.append(spanning.current_span())
        return frame

    token = context.attach(baggage.set_baggage("tenant", "a"))
    telling.collect_async(TINY.map_batches(function), label="it").result(30)
    context.detach(token)
    span = told.span("it").context
    assert list(notes) == [(span.trace_id, span.span_id, "a")]
    PolarsAsyncInstrumentor().uninstrument()
    try:
        telling.collect_async(TINY.map_batches(bare)).result(30)  # in the same worker
    finally:
        PolarsAsyncInstrumentor().instrument()
    assert list(notes)[1] == (0, 0)


def test_worker_is_set_up_once_as_the_program_says(tmp_path, monkeypatch):
    spans = tmp_path / "spans"
    monkeypatch.setenv("SPANS_OF_WORKERS", str(spans))
    told = Told()
    instrumentor = PolarsAsyncInstrumentor()
    instrumentor.instrument(tracer_provider=told.tracers, in_workers=spanning.set_up)
    try:
        with Collector(executor="processes", max_running=1) as collector:
            for _ in range(2):
                collector.collect_async(TINY.map_batches(spanning.traced)).result(30)
    finally:
        instrumentor.uninstrument()
    found = list(map(literal_eval, spans.read_text().splitlines()))
    made = [each.context for each in told.spans("collect")]
    spans = [("function", each.trace_id, each.span_id) for each in made]
    assert found == [("set up", 0, None), *spans]


def test_set_up_of_workers_has_to_be_found_by_its_name(main):
    of_main = main("def set_up(): ...")["set_up"]
    for function in (lambda: None, of_main, partial(spanning.set_up)):
        with pytest.raises(ValueError, match="in_workers must be a function that"):
            PolarsAsyncInstrumentor().instrument(in_workers=function)
    assert Attached.listeners == ()


# Metrics


def test_durations_are_measured_by_what_the_query_was(telling, told, blocked, monkeypatch):
    later = 0.0
    monkeypatch.setattr(opentelemetry, "perf_counter", lambda: perf_counter() + later)
    telling.collect_async(TINY, label="sales", engine="streaming").result(30)
    long = telling.collect_async(blocked.lf, label="sales", engine="streaming")
    later = 3600.0
    blocked.gate.set()
    long.result(30)
    with pytest.raises(Failure):
        telling.collect_async(failing(Failure())).result(30)
    until(lambda: told.spans("collect"))
    sales = {
        "db.operation.name": "collect",
        "db.query.summary": "sales",
        "polars.engine": "streaming",
    }
    failed = {
        "db.operation.name": "collect",
        "db.query.summary": "collect",
        "polars.engine": "in-memory",
        "error.type": "places.Failure",
    }
    found = told.points("db.client.operation.duration")
    counts = {attributes: point.count for attributes, point in found.items()}
    assert counts == {frozenset(sales.items()): 2, frozenset(failed.items()): 1}
    assert {point.explicit_bounds for point in found.values()} == {BUCKETS}
    assert found[frozenset(sales.items())].sum == pytest.approx(later, rel=0.5)


def test_waits_and_runs_are_those_of_the_queries_that_have_started(telling, told, blocked):
    late = telling.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    waiting = telling.collect_async(TINY, timeout=3600)
    inside.let_time_be_up(waiting)
    blocked.gate.set()
    late.result(30)
    until(lambda: not telling.stats()["running"])  # by then its time is in them
    stats = telling.stats()
    for what in ("wait_time", "use_time"):
        point = told.points(f"db.client.connection.{what}")[POOL]
        assert (point.count, point.explicit_bounds) == (1, BUCKETS)
    assert point.sum == pytest.approx(stats["run_seconds"], abs=0.01)
    assert told.points("db.client.connection.timeouts")[POOL].value == 1


def test_slots_and_queue_are_those_of_all_collectors_of_a_kind(telling, make, told, blocked):
    make(max_running=3)
    closed = make(max_running=101)
    closed.close()
    telling.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    telling.collect_async(TINY)

    def now(name, *state):
        return told.points(f"db.client.connection.{name}")[POOL.union(state)].value

    def load():
        state = "db.client.connection.state"
        used, idle = (now("count", (state, each)) for each in ("used", "idle"))
        return now("max"), now("pending_requests"), used, idle

    def expected():
        # Those of other tests, too, that nobody has closed; they may go at any moment.
        others = [stats for where, stats in stats_of_all() if where == "threads"]
        assert 101 not in [each["max_running"] for each in others]
        names = ("max_running", "waiting", "running")
        slots, waiting, used = (sum(each[name] for each in others) for name in names)
        return slots, waiting, used, slots - used

    found = []
    until(lambda: found.append(load()) or found[-1] == expected())
    slots, waiting, used, idle = found[-1]
    assert waiting >= 1
    assert used >= 1
    assert idle == slots - used >= 3


def test_nothing_is_told_once_it_is_ended(told, make, blocked):
    collector = make(max_running=1)
    before = collector.collect_async(blocked.lf, label="before")
    assert blocked.started.wait(30)
    PolarsAsyncInstrumentor().uninstrument()
    after = collector.collect_async(TINY, label="after")
    blocked.gate.set()
    after.result(30)
    before.result(30)
    assert events(told.span("before")) == ["queued", "started"]
    assert told.spans("after") == []
    assert told.points("db.client.connection.max") == {}
    PolarsAsyncInstrumentor().instrument()


def test_error_of_an_exporter_is_logged_and_costs_no_query_its_result(telling, told, caplog):
    class Broken(SpanProcessor):
        def on_start(self, *_, **__):
            raise Failure

    told.tracers.add_span_processor(Broken())
    assert telling.collect_async(TINY).result(30).item() == 1
    assert "an instrument raised at: query" in caplog.text


# Programs

NO_POLARS = """
import sys
from polars_async.instrumentation.opentelemetry import PolarsAsyncInstrumentor
PolarsAsyncInstrumentor().instrument()
print("polars" in sys.modules)
"""

GREEN = """
from gevent import monkey
monkey.patch_all()
import gevent, threading
import polars as pl, polars_async as pa
from polars_async.instrumentation.opentelemetry import PolarsAsyncInstrumentor
from spanning import Told
told = Told()
PolarsAsyncInstrumentor().instrument(tracer_provider=told.tracers, meter_provider=told.meters)
collector = pa.Collector()

def function(frame):
    with told.tracer.start_as_current_span("function"):
        return frame

def ask():
    with told.tracer.start_as_current_span("caller"):
        query = pl.LazyFrame({"a": [1]}).map_batches(function)
        collector.collect_async(query, label="it").get()

gevent.joinall([gevent.spawn(ask)], raise_error=True)
for child, parent in [("function", "it"), ("it", "caller")]:
    print(told.span(child).parent.span_id == told.span(parent).context.span_id)
"""

BESIDE = """
import polars as pl, polars_async as pa
import polars_telemetry
from opentelemetry import trace
from polars_async.instrumentation.opentelemetry import PolarsAsyncInstrumentor
from spanning import Told
told = Told()
trace.set_tracer_provider(told.tracers)
polars_telemetry.install()
PolarsAsyncInstrumentor().instrument()
with pa.Collector() as collector:
    collector.collect_async(pl.LazyFrame({"a": [1]}).sum(), engine="streaming", label="it").result()
(theirs,) = told.spans("polars.collect")
print(theirs.parent.span_id == told.span("it").context.span_id)
"""


def run(script):
    """Run a program that imports from the tests, and give what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([SOURCE, str(Path(__file__).parent)]),
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_polars_is_not_imported_by_it(run_script):
    assert run_script(NO_POLARS) == ["False"]


@pytest.mark.slow
def test_spans_of_greenlets_are_children_of_their_callers():
    assert run(GREEN) == ["True", "True"]


@pytest.mark.slow
def test_spans_of_polars_telemetry_are_children_of_ours():
    assert run(BESIDE) == ["True"]


# A service


class Received:
    """What exporters send by OTLP: spans, the processes that they come from, and metrics' names."""

    def __init__(self):
        self.spans = []
        self.processes = {}
        self.metrics = set()

    def receive(self, path, data):
        if path == "/v1/traces":
            request = ExportTraceServiceRequest.FromString(data)
            for resource in request.resource_spans:
                spans = [each for scope in resource.scope_spans for each in scope.spans]
                (process,) = (
                    each.value.string_value
                    for each in resource.resource.attributes
                    if each.key == "service.instance.id"
                )
                self.processes |= {each.name: process for each in spans}
                self.spans += spans
        elif path == "/v1/metrics":
            request = ExportMetricsServiceRequest.FromString(data)
            for resource in request.resource_metrics:
                for scope in resource.scope_metrics:
                    self.metrics |= {each.name for each in scope.metrics}

    def span(self, name):
        return next((each for each in list(self.spans) if each.name == name), None)


@pytest.fixture
def received():
    """Receive what is sent to `received.url`."""
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            is_packed = self.headers.get("Content-Encoding") == "gzip"
            received.receive(self.path, gzip.decompress(body) if is_packed else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        received.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield received
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_service_needs_no_code_and_its_spans_are_joined_across_a_worker_process(
    received, tmp_path, monkeypatch
):
    """As docs/watching.md has it."""
    for name, value in {
        "OTEL_EXPORTER_OTLP_ENDPOINT": received.url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
        "PATH": os.pathsep.join([str(PROGRAMS), os.environ["PATH"]]),
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "traced.py").write_text(FILES["traced.py"].code)
    program, *command = FILES["traced.py"].following[1].split()
    server = Server([*command, "--port=0"], tmp_path, program=[PROGRAMS / program])
    try:
        response, body = server.ask("/total")
        assert (response.status, body) == (200, b'[{"sum":3}]')
        names = ("GET /total", "total", "check")
        until(lambda: all(map(received.span, names)))
        request, query, check = map(received.span, names)
        assert (query.parent_span_id, check.parent_span_id) == (request.span_id, query.span_id)
        assert request.trace_id == query.trace_id == check.trace_id
        assert received.processes["total"] != received.processes["check"]
        wanted = {"db.client.operation.duration", "db.client.connection.count"}
        until(lambda: wanted <= received.metrics)
        assert server.complaints() == []
    finally:
        server.kill()
