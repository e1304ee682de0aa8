"""The recipes for hosts that are no servers, run by these: Celery, Jupyter and marimo."""

import json
import re
import shlex
import subprocess
import sys

import polars as pl
import pytest
from servers import Server
from snippets import FILES, SNIPPETS

pytestmark = [pytest.mark.slow, pytest.mark.one_series]

SALES = pl.DataFrame({"shop": ["a", "b", "a"], "day": [1, 1, 2], "sum": [3, 4, 5]})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    SALES.write_parquet(tmp_path / "sales.parquet")
    for name, snippet in FILES.items():
        (tmp_path / name).write_text(snippet.code)
    monkeypatch.setenv("HOME", str(tmp_path))  # where some keep their settings
    return tmp_path


def command_of(name):
    return shlex.split(FILES[name].following[1])


def run(folder, *options):
    """Run Python to its end, and give what it printed."""
    command = [sys.executable, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Celery


ASK_WORKERS = """
import json
import polars_async as pa
from reports import sales

asked = [sales.delay(shop) for shop in "ab"]
late = sales.delay("a", timeout=1e-9)
print(json.dumps([json.loads(each.get(timeout=120)) for each in asked]))
try:
    late.get(timeout=120)
except pa.QueryTimeoutError as error:
    print(error)
"""


@pytest.fixture
def broker(folder, monkeypatch):
    """A broker and a store of results that are but folders, in place of those that are named."""
    monkeypatch.setenv("CELERY_BROKER_URL", "filesystem://")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "file://results")
    (folder / "results").mkdir()
    (folder / "data_in").mkdir()
    (folder / "data_out").symlink_to("data_in")  # what one puts out, the other takes in


@pytest.mark.usefixtures("broker")
def test_celery_runs_queries_in_forked_workers(folder):
    worker = Server([*command_of("reports.py"), "-c2", "--loglevel=info"], folder)
    try:
        results, late = run(folder, "-c", ASK_WORKERS).splitlines()
        assert json.loads(results) == [
            [{"day": 1, "sum": 3}, {"day": 2, "sum": 5}],
            [{"day": 1, "sum": 4}],
        ]
        assert late.startswith("the query 'sales of a' was not done after")
        assert worker.logged(r"ForkPoolWorker-\d\] Task reports.sales\S* succeeded", 2)
    finally:
        worker.kill()


# Jupyter


NOTEBOOK = next(snippet for snippet in SNIPPETS if snippet.mark == "notebook")
CELLS = re.split(r"^# %%.*\n", NOTEBOOK.code, flags=re.MULTILINE)[1:]

SLEEPS = """
import time

handle = collector.collect_async(sales.map_batches(lambda _: time.sleep(600)))
print("sleeps", flush=True)
"""
AWAKE = """
import asyncio

async def wake():
    while True:
        await asyncio.sleep(0.01)

waking = asyncio.create_task(wake())  # which ipykernel 7 does not do by itself
"""
NOTHING_RUNS = """
while collector.stats()["running"]:
    await asyncio.sleep(0.01)
"""


@pytest.mark.usefixtures("folder")
def test_jupyter_awaits_stops_and_is_stopped():
    from kernels import in_kernel  # noqa: PLC0415  # half a second, also where this is not run

    async def main(kernel):
        outputs = [await kernel.run(cell) for cell in CELLS]
        assert "".join(text for text, _ in outputs) == NOTEBOOK.following[1]
        assert [errors for _, errors in outputs] == [[]] * len(CELLS)

        # What the page says of the stop button: it ends the wait, and the query where it awaits.
        waits = SLEEPS + "handle.result()"
        assert await kernel.stop(waits) == ("sleeps\n", ["KeyboardInterrupt"])
        assert await kernel.run("print(handle.done())\nhandle.cancel()") == ("False\n", [])
        await kernel.run(AWAKE)
        awaits = SLEEPS + "await handle"
        assert await kernel.stop(awaits) == ("sleeps\n", ["CancelledError"])
        assert await kernel.run("print(handle.done())") == ("True\n", [])
        assert await kernel.run(NOTHING_RUNS) == ("", [])

    in_kernel(main)


# marimo


def test_marimo_runs_a_notebook(folder):
    run(folder, "-m", *command_of("explore.py"))
    assert "Shop a sold 8 on 2 days." in (folder / "explore.html").read_text()
