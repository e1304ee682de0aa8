"""The services of the documentation, started as it says, answer real requests."""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
from pathlib import Path

import polars as pl
import pytest
from servers import Server, response_on, until
from snippets import FILES

pytestmark = pytest.mark.slow

SHOPS = ["a", "b", "c", "d", "e"]
ROWS = 1_000_000
"""Far more than fits into the sockets' buffers, so that a client that stops reading is felt."""

SALES = pl.select(number=pl.int_range(ROWS)).select(
    shop=(pl.col("number") % len(SHOPS)).replace_strict(dict(enumerate(SHOPS))),
    day=pl.col("number") % 7,
    sum=pl.col("number"),
)

CONTROL = """
import fcntl
import polars as pl
from polars_async import QueueFullError
from polars_async.scheduling.sizes import Limits

TINY = pl.LazyFrame({"a": [1]})


def wait_for_gate(frame):
    with open("gate") as gate:
        fcntl.flock(gate, fcntl.LOCK_SH)
    return frame


def take_slots(collector):
    collector._cpu.admission.limits = Limits(3)  # as few as can be taken
    for _ in range(collector.stats()["max_running"]):
        collector.collect_async(TINY.map_batches(wait_for_gate), priority=1)


def fill_queue(collector):
    try:
        while True:
            collector.collect_async(TINY)
    except QueueFullError:
        pass
"""

FASTAPI = """
import asyncio
from control import fill_queue, take_slots
from service import app


@app.get("/hold")
async def hold():
    take_slots(app.state.collector)


@app.get("/fill")
async def fill():
    fill_queue(app.state.collector)


@app.get("/tasks")
async def tasks():
    return len(asyncio.all_tasks())
"""

TOTALS = """
import threading
import polars as pl
from control import TINY, Limits, wait_for_gate
from totals import app, collector

collector._cpu.admission.limits = Limits(3)  # however idle the processors are meanwhile
lock = threading.Lock()
running, most = [], 0


def note(frame):
    global most
    with lock:
        running.append(frame)
        most = max(most, len(running))
    wait_for_gate(frame)
    with lock:
        running.pop()
    return frame


@app.get("/held")
def held():
    return TINY.map_batches(note).collect().item()


@app.get("/stats")
async def stats():
    return collector.stats() | {"most": most}
"""

LITESTAR = """
import asyncio
from branches import app
from control import fill_queue, take_slots
from litestar import get


@get("/hold")
async def hold() -> None:
    take_slots(app.state.collector)


@get("/fill")
async def fill() -> None:
    fill_queue(app.state.collector)


@get("/tasks")
async def tasks() -> int:
    return len(asyncio.all_tasks())


@get("/stats")
async def stats() -> dict[str, object]:
    return app.state.collector.stats()


for handler in (hold, fill, tasks, stats):
    app.register(handler)
"""

WSGI = """
import json
import os
import control
import shop


def app(environ, start_response):
    def start(status, headers):
        start_response(status, [*headers, ("X-Worker", str(os.getpid()))])

    if environ["PATH_INFO"] == "/":
        shop.TIMEOUT = float(environ.get("HTTP_TIMEOUT", "10"))
        return shop.app(environ, start)
    if environ["PATH_INFO"] == "/hold":
        control.take_slots(shop.collector)
    if environ["PATH_INFO"] == "/fill":
        control.fill_queue(shop.collector)
    start("200 OK", [])
    return [json.dumps(shop.collector.stats()).encode()]
"""

DASH = """
import json
import control
import dashboard


def app(environ, start_response):
    dashboard.TIMEOUT = float(environ.get("HTTP_TIMEOUT", "10"))
    if environ["PATH_INFO"] not in ("/hold", "/fill", "/stats"):
        return dashboard.server(environ, start_response)
    if environ["PATH_INFO"] == "/hold":
        control.take_slots(dashboard.collector)
    if environ["PATH_INFO"] == "/fill":
        control.fill_queue(dashboard.collector)
    start_response("200 OK", [])
    return [json.dumps(dashboard.collector.stats()).encode()]
"""

STARLETTE_ERRORS = """
import polars_async as pa
from exports import app


async def full(request):
    raise pa.QueueFullError("full", 2.5)


async def late(request):
    raise pa.QueryTimeoutError("late")


app.add_route("/full", full)
app.add_route("/late", late)
"""

QUERY_AT_IMPORT = """
from served_wsgi import app, shop

shop.SALES.first().collect()
"""


def sales_of(name):
    days = SALES.filter(pl.col("shop") == name).group_by("day").agg(pl.col("sum").sum())
    return days.sort("day")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("services")
    for name in ("sales", "orders"):
        SALES.write_parquet(folder / f"{name}.parquet")
    files = {name: snippet.code for name, snippet in FILES.items()} | {
        "control.py": CONTROL,
        "served_dash.py": DASH,
        "served_fastapi.py": FASTAPI,
        "served_totals.py": TOTALS,
        "served_litestar.py": LITESTAR,
        "served_wsgi.py": WSGI,
        "starlette_errors.py": STARLETTE_ERRORS,
        "query_at_import.py": QUERY_AT_IMPORT,
        "gate": "",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def gate(folder):
    """Hold up the queries of `Server.hold`, until it is closed."""
    with (folder / "gate").open() as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield gate


@contextlib.contextmanager
def started(folder, name, *options, app):
    """Start what serves the file `name`, with `app` in place of the application that it names."""
    command = re.sub(rf"\b{Path(name).stem}:\w+", f"{app}:app", FILES[name].following[1])
    server = Server([*shlex.split(command), *options], folder)
    try:
        yield server
    finally:
        server.kill()


UVICORN = {
    "fastapi": ("service.py", "served_fastapi"),
    "litestar": ("branches.py", "served_litestar"),
}
BOTH = ["fastapi", pytest.param("litestar", marks=pytest.mark.one_series)]


@contextlib.contextmanager
def uvicorn(folder, framework):
    name, app = UVICORN[framework]
    with started(folder, name, "--port=0", app=app) as server:
        yield server


@pytest.fixture(scope="module", params=BOTH)
def uvicorn_server(folder, request):
    with uvicorn(folder, request.param) as server:
        yield server


@pytest.fixture
def service(uvicorn_server):
    """Serve with uvicorn; with nothing left to do afterwards, and nothing to complain about."""
    before = uvicorn_server.stats()
    yield uvicorn_server
    after = uvicorn_server.until(running=0, waiting=0)
    assert after["failed"] == before["failed"]
    assert uvicorn_server.complaints() == []


@pytest.fixture(scope="module")
def gunicorn_server(folder):
    with started(folder, "shop.py", "--bind=127.0.0.1:0", app="served_wsgi") as server:
        yield server


@pytest.fixture
def workers(gunicorn_server):
    """Serve with two workers of gunicorn, with nothing to complain about afterwards."""
    yield gunicorn_server
    assert gunicorn_server.complaints() == []


@contextlib.contextmanager
def stopped(worker):
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


@pytest.fixture
def worker(workers):
    """Serve with one of two workers, and stop the other."""
    other = int(workers.logged(r"Booting worker with pid: (\d+)", 2)[-1])
    with stopped(other):
        yield workers
        workers.until(running=0, waiting=0)


def assert_is_sales_of(shop, connection):
    response, body = response_on(connection)
    assert (response.status, body) == (200, sales_of(shop).write_json().encode())


def assert_all_are_answered(server, path):
    connections = [(shop, server.send(path + shop)) for shop in SHOPS * 3]
    for shop, connection in connections:
        assert_is_sales_of(shop, connection)


def test_service_answers_several_requests_at_once(service):
    before = service.stats()["completed"]
    assert_all_are_answered(service, "/sales?shop=")
    assert service.stats()["completed"] == before + len(SHOPS) * 3


@pytest.mark.parametrize("uvicorn_server", ["fastapi"], indirect=True)
def test_fastapi_tells_prometheus_what_became_of_its_queries(service):
    service.ask("/sales?shop=a")
    stats = service.stats()
    response, body = service.ask("/metrics")
    assert response.getheader("Content-Type").startswith("text/plain; version=")
    counted = re.findall(
        r'^polars_async_queries_total{.*outcome="completed"} (.*)$', body.decode(), re.MULTILINE
    )
    assert sum(map(float, counted)) == stats["completed"]


@pytest.mark.parametrize("path", ["/sales?shop=a", "/sales.ndjson"])
def test_service_tells_clients_to_come_back_when_the_queue_is_full(service, gate, path):
    service.hold()
    service.ask("/fill")
    response, _ = service.ask(path)
    assert response.status == 503
    assert int(response.getheader("Retry-After")) >= 1
    gate.close()
    service.until(waiting=0)
    response, _ = service.ask(path)
    assert response.status == 200


def test_service_tells_a_client_that_its_time_is_over(service, gate):
    before = service.hold()["timed_out"]
    response, _ = service.ask("/sales?shop=a&timeout=0.01")
    assert response.status == 504
    service.until(timed_out=before + 1, waiting=0)
    gate.close()


@pytest.mark.parametrize("path", ["/sales?shop=a", "/sales.ndjson"])
def test_service_takes_the_query_of_a_client_that_goes_away_out_of_the_queue(service, gate, path):
    before = service.hold()
    tasks = service.ask("/tasks")[1]
    leaving = service.send(path)
    staying = service.send("/sales?shop=b")
    service.until(waiting=2)
    leaving.close()
    service.until(waiting=1, cancelled=before["cancelled"] + 1)
    gate.close()
    assert_is_sales_of("b", staying)
    until(lambda: service.ask("/tasks")[1] == tasks)


def test_service_streams_all_rows_and_the_first_before_the_end(service):
    before = service.stats()["completed"]
    with contextlib.closing(service.send("/sales.ndjson")) as connection:
        response = connection.getresponse()
        first = response.readline()
        stats = service.stats()
        assert (stats["running"], stats["completed"]) == (1, before)
        assert pl.read_ndjson(first + response.read()).equals(SALES)


def test_service_cancels_a_stream_whose_client_goes_away(service):
    before = service.stats()
    with (
        contextlib.closing(service.send("/sales.ndjson")) as connection,
        contextlib.closing(connection.getresponse()) as response,
    ):
        assert response.readline()
    service.until(running=0, completed=before["completed"], cancelled=before["cancelled"] + 1)


def test_fastapi_answers_before_it_ends(folder, gate):
    with uvicorn(folder, "fastapi") as server:
        server.hold()
        connection = server.send("/sales?shop=a")
        server.until(waiting=1)
        server.end()
        server.logged("Waiting for connections to close")
        gate.close()
        assert_is_sales_of("a", connection)
        # when all is done, uvicorn raises the signal once more
        assert (server.status(), server.complaints()) == (-signal.SIGTERM, [])


@pytest.mark.usefixtures("gate")
@pytest.mark.parametrize("framework", BOTH)
def test_service_ends_while_queries_run_that_nobody_waits_for(folder, framework):
    with uvicorn(folder, framework) as server:
        server.hold()
        server.end()
        assert (server.status(), server.complaints()) == (-signal.SIGTERM, [])


def test_fastapi_has_its_def_endpoints_take_their_turn(folder, gate):
    with started(folder, "totals.py", "--port=0", app="served_totals") as server:
        response, body = server.ask("/total?shop=a")
        total = SALES.filter(pl.col("shop") == "a")["sum"].sum()
        assert (response.status, json.loads(body)) == (200, {"total": total})
        connections = [server.send("/held") for _ in range(40)]
        stats = server.until(submitted=41, waiting=30)
        assert 1 <= stats["running"] <= 3
        assert stats["rejected"] == 40 - stats["running"] - 30  # and told so at once
        gate.close()
        statuses = [response_on(each)[0].status for each in connections]
        assert statuses.count(503) == stats["rejected"]
        assert statuses.count(200) == stats["running"] + 30
        assert 1 <= server.stats()["most"] <= 3
        assert server.complaints() == []


@pytest.mark.one_series
def test_dash_answers_and_says_what_is_wrong(folder, gate):
    options = ["--bind=127.0.0.1:0"]
    with started(folder, "dashboard.py", *options, app="served_dash") as server:

        def choose(shop, **headers):
            """Ask for what depends on the shop, as the page does."""
            (callback,) = json.loads(server.ask("/_dash-dependencies")[1])
            outputs = [("days", "figure"), ("problem", "children")]
            _, body = server.ask(
                "/_dash-update-component",
                {
                    "output": callback["output"],
                    "outputs": [{"id": name, "property": key} for name, key in outputs],
                    "inputs": [{**callback["inputs"][0], "value": shop}],
                    "changedPropIds": ["shop.value"],
                },
                **headers,
            )
            shown = json.loads(body)["response"]
            return shown["days"]["figure"], shown["problem"]["children"]

        server.hold()
        assert choose("b", timeout="0.01") == ({}, "This took too long.")
        server.ask("/fill")
        assert choose("b") == ({}, "Too many people are asking. Try again soon.")
        gate.close()
        server.until(waiting=0)
        figure, problem = choose("b")
        (bars,) = figure["data"]
        expected = sales_of("b")
        assert ([*zip(bars["x"], bars["y"], strict=True)], problem) == (expected.rows(), "")
        assert server.complaints() == []


def test_service_of_the_start_answers(folder):
    with started(folder, "orders.py", "--port=0", app="orders") as server:
        response, body = server.ask("/total?shop=a")
        total = SALES.filter(pl.col("shop") == "a")["sum"].sum()
        assert (response.status, json.loads(body)) == (200, {"total": total})
        assert server.complaints() == []


def test_starlette_answers_and_exports(folder):
    with started(folder, "exports.py", "--port=0", app="exports") as server:
        response, body = server.ask("/shops")
        sums = SALES.group_by("shop").agg(pl.col("sum").sum()).sort("shop")
        assert (response.status, body) == (200, sums.write_json().encode())
        response, body = server.ask("/export")
        assert (response.status, pl.read_ndjson(body).equals(SALES)) == (200, True)
        assert server.complaints() == []


def test_starlette_tells_clients_to_come_back_and_that_their_time_is_over(folder):
    with started(folder, "exports.py", "--port=0", app="starlette_errors") as server:
        response, _ = server.ask("/full")
        assert (response.status, response.getheader("Retry-After")) == (503, "3")
        response, _ = server.ask("/late")
        assert response.status == 504


def test_gunicorn_answers_several_requests_at_once(workers):
    assert_all_are_answered(workers, "/?shop=")


def test_gunicorn_tells_clients_to_come_back_when_the_queue_is_full(worker, gate):
    worker.hold()
    worker.ask("/fill")
    response, _ = worker.ask("/?shop=a")
    assert response.status == 503
    assert int(response.getheader("Retry-After")) > 1
    gate.close()
    worker.until(waiting=0)
    response, _ = worker.ask("/?shop=a")
    assert response.status == 200


def test_gunicorn_tells_a_client_that_its_time_is_over(worker, gate):
    before = worker.hold()["timed_out"]
    response, _ = worker.ask("/?shop=a", timeout="0.01")
    assert response.status == 504
    worker.until(timed_out=before + 1, waiting=0)
    gate.close()


def test_gunicorn_goes_on_when_a_worker_is_killed(workers):
    killed, survivor = workers.logged(r"Booting worker with pid: (\d+)", 2)
    os.kill(int(killed), signal.SIGKILL)
    *_, successor = workers.logged(r"Booting worker with pid: (\d+)", 3)
    for worker, other in [(survivor, successor), (successor, survivor)]:
        with stopped(int(other)):
            response, body = workers.ask("/?shop=a")
            assert response.getheader("X-Worker") == worker
            assert body == sales_of("a").write_json().encode()
    (complaint,) = workers.complaints()
    assert f"(pid:{killed}) was sent SIGKILL" in complaint


def test_gunicorn_answers_before_it_ends(folder, gate):
    options = ["--bind=127.0.0.1:0", "--workers=1"]
    with started(folder, "shop.py", *options, app="served_wsgi") as server:
        server.hold()
        connection = server.send("/?shop=a")
        server.until(waiting=1)
        server.end()
        server.logged("Handling signal: term")
        gate.close()
        assert_is_sales_of("a", connection)
        assert (server.status(), server.complaints()) == (0, [])


@pytest.mark.usefixtures("gate")
def test_gunicorn_ends_while_queries_run_that_nobody_waits_for(folder):
    options = ["--bind=127.0.0.1:0", "--workers=1"]
    with started(folder, "shop.py", *options, app="served_wsgi") as server:
        server.hold()
        server.end()
        assert (server.status(), server.complaints()) == (0, [])


def test_gunicorn_that_preloads_the_application_answers(folder):
    options = ["--bind=127.0.0.1:0", "--preload", "--graceful-timeout=2"]
    with started(folder, "shop.py", *options, app="served_wsgi") as server:
        assert_all_are_answered(server, "/?shop=")
        server.end()
        assert server.status() == 0
        # Polars 1.44 never ends in a process forked after its import, so its workers are killed
        if not pl.__version__.startswith("1."):
            assert server.complaints() == []


def test_gunicorn_that_preloads_an_application_which_queries_says_what_is_wrong(folder):
    options = ["--bind=127.0.0.1:0", "--workers=1", "--preload"]
    with started(folder, "shop.py", *options, app="query_at_import") as server:
        response, _ = server.ask("/?shop=a")
        assert response.status == 500
        assert any("ForkedProcessError: " in line for line in server.complaints())
