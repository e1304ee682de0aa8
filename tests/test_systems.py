"""
On macOS and Windows: what the package needs of Linux, with the names taken away that these lack.

Neither was there to run it: this shows that nothing which only Linux has is in the way.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes away what only Linux has")

LINUX_ALONE = {
    *("_runtime.descriptors", "_runtime.files", "_runtime.mapping"),
    *("compare.contest", "compare.process", "executors.processes", "executors.shared_frames"),
}

BEGIN = """
import sys
sys.path.insert(0, {folder!r})
from other_system import pretend
pretend({platform!r})
import polars as pl
import polars_async as pa
tiny = pl.LazyFrame({{"a": [1, 2]}})
"""

MODULES = """
import importlib, pkgutil
for module in pkgutil.walk_packages(pa.__path__, "polars_async.", onerror=lambda _: None):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except (ImportError, AssertionError):
            print(module.name.removeprefix("polars_async."))
"""

NAMES = """
from polars_async import *
print(*(name.removeprefix("polars_async.") for name in sys.modules))
"""

ASYNCIO = """
import asyncio, pathlib

def nested(column):  # on threads of Polars
    return column + collector.collect_async(tiny).result(30).height

async def main():
    found = await asyncio.gather(*(collector.collect_async(tiny) for _ in range(20)))
    print(sum(frame.height for frame in found))

    both = [pl.col("a").map_batches(nested, return_dtype=pl.Int64).alias(name) for name in "xy"]
    print((await collector.collect_async(tiny.select(both)))["y"].to_list())

    path = pathlib.Path(sys.argv[1], "written.parquet")
    await collector.sink_async(tiny.sink_parquet(path, lazy=True))
    async with collector.collect_batches_async(pl.scan_parquet(path)) as batches:
        print(sum([batch.height async for batch in batches]))

    released, loop = asyncio.Event(), asyncio.get_running_loop()

    def wait(frame):
        asyncio.run_coroutine_threadsafe(released.wait(), loop).result(30)
        return frame

    running = collector.collect_async(tiny.map_batches(wait))
    late = collector.collect_async(tiny, timeout=0.01)
    cancelled = collector.collect_async(tiny).cancel()
    try:
        await late
    except pa.QueryTimeoutError:
        print("late", cancelled)
    released.set()
    print((await running).height)

with pa.Collector(max_running=1) as collector:
    asyncio.run(main())
"""

TRIO = """
import trio

async def main():
    async with pa.Collector() as collector:
        frames = [frame async for _, frame in collector.as_completed([tiny] * 3)]
        print(len(frames))

trio.run(main)
"""

ELSEWHERE = """
from concurrent.futures import ThreadPoolExecutor
import gevent

def in_greenlet():
    print(pa.collect_async(tiny, gevent=True).get(timeout=30).height)

gevent.spawn(in_greenlet).get()
print(len(pa.collect_all_async([tiny, tiny]).result(30)))
with ThreadPoolExecutor(1) as threads, pa.Collector(executor=threads) as collector:
    print(collector.collect_async(tiny).result(30).height)
"""

EXIT = """
import threading, time
runs = threading.Event()

def endless(frame):
    runs.set()
    while True:
        time.sleep(0.01)

pa.collect_async(tiny.map_batches(endless))
print(runs.wait(30))
"""

REFUSED = """
for call in (
    lambda: pa.Collector(executor="processes"),
    lambda: pa.Collector(executor="auto"),
    lambda: pa.share(tiny.collect()),
    lambda: pa.compare_engines(tiny),
):
    try:
        call()
    except (ValueError, pa.PolarsAsyncError) as error:
        print(*str(error).split(), sep="_")
"""

DECIDED = """
from polars_async import cli
print(pa.resolve_engine("in-memory").name, pa.gpu_support(tiny).answer, cli.main(["doctor"]))
"""

PLUGIN = """
import pathlib, pytest
tests = pathlib.Path(sys.argv[1], "test_plugin.py")
tests.write_text('''
import polars as pl
import polars_async as pa

def test_with_gpu(gpu_host, engine_log):
    engine = pl.GPUEngine()
    with pa.Collector(gpu="offload") as collector:
        collector.collect_async(pl.LazyFrame({"a": [1]}), engine=engine).result(30)
    engine_log.assert_ran_on("gpu")
    assert gpu_host.queries == 1

def test_without_gpu(no_gpu_host):
    assert not pa.gpu_status().usable
''')
plugin = "polars_async.pytest_plugin"
options = ["--quiet", "--capture=no", "-c/dev/null", "-pno:cacheprovider", f"-p{plugin}"]
print(int(pytest.main([*options, "-Wignore::pytest.PytestAssertRewriteWarning", str(tests)])))
"""


@pytest.fixture(params=["darwin", "win32"])
def system(request):
    return request.param


@pytest.fixture
def run_there(system, run_script, tmp_path):
    """Run a program where the system seems to be another one, and give what it printed."""
    begin = BEGIN.format(folder=str(Path(__file__).parent), platform=system)
    return lambda script: run_script(begin + script, str(tmp_path))


def test_what_needs_linux_is_known_and_says_so(run_there):
    assert set(run_there(MODULES)) == LINUX_ALONE


@pytest.mark.one_series
def test_public_names_import_nothing_that_needs_linux(run_there):
    loaded = set(run_there(NAMES))
    assert {"collector", "sharing", "executors.factory", "compare.engines"} <= loaded
    assert not {name for name in loaded if name.startswith(tuple(LINUX_ALONE))}


def test_asyncio(run_there):
    assert " ".join(run_there(ASYNCIO)) == "40 [3, 4] 2 late True 2"


@pytest.mark.one_series
def test_trio(run_there):
    assert run_there(TRIO) == ["3"]


@pytest.mark.one_series
def test_gevent_threads_and_an_executor_of_the_caller(run_there):
    assert run_there(ELSEWHERE) == ["2", "2", "2"]


@pytest.mark.one_series
@pytest.mark.parametrize("system", ["darwin"])
def test_end_of_a_program_whose_query_runs(run_there):
    assert run_there(EXIT) == ["True"]


@pytest.mark.one_series
def test_what_needs_linux_is_refused_with_a_remedy(run_there, system):
    processes, auto, share, compare = (line.replace("_", " ") for line in run_there(REFUSED))
    needs = f"needs Linux, and this is {system}: use"
    either = "executor='threads', or give it an executor"
    assert processes.startswith(f"executor='processes' {needs} {either}")
    assert auto.startswith(f"executor='auto' {needs} {either}")
    assert share == f"share() {needs} frame.lazy()"
    assert compare.startswith(f"worker processes compare engines, and need Linux: this is {system}")


@pytest.mark.one_series
def test_decision_and_doctor(run_there, system):
    report = " ".join(run_there(DECIDED))
    assert f"cudf-polars, which is the GPU engine, needs Linux, and this is {system}: " in report
    assert report.endswith("in-memory unknown 0")


@pytest.mark.one_series
def test_fixtures_of_the_plug_in(run_there):
    words = " ".join(run_there(PLUGIN))
    assert "2 passed" in words
    assert words.endswith(" 0")
