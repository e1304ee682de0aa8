"""Queries in executors of others: a pool of concurrent.futures, loky, and a dask cluster."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from uuid import uuid4

import gevent
import inside
import loky
import polars as pl
import pytest
import trio
from distributed import Client, LocalCluster

from polars_async import (
    Collector,
    ForkedProcessError,
    PolarsAsyncError,
    QueryTimeoutError,
    WorkerDiedError,
    dask_executor,
)
from polars_async.executors import futures
from polars_async.executors.futures import run_task
from polars_async.executors.message import Message
from polars_async.executors.outcomes import RemoteTraceback, unpacked_error
from polars_async.executors.serialization import pack, unpack

pytestmark = pytest.mark.slow

FRAME = pl.LazyFrame({"a": [1, 2, 3]})
PANIC = pl.select(1).lazy().select(pl.int_range(0, 2**62))
KINDS = ["pool", "loky", "dask"]
MANY = 12
"""More queries than two workers take in advance."""


def two_workers():
    options = {"n_workers": 2, "threads_per_worker": 1, "resources": {"GPU": 1}}
    return LocalCluster(host="127.0.0.1", dashboard_address=":0", **options)


@pytest.fixture(scope="module")
def cluster():
    with two_workers() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster):
    with Client(cluster) as client:
        yield client


@pytest.fixture
def losing():
    """A client of a cluster whose workers are killed: dask does not always start them anew."""
    with two_workers() as cluster, Client(cluster) as client:
        yield client


def new_executor(kind, client):
    if kind == "pool":
        return ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    if kind == "loky":
        return loky.ProcessPoolExecutor(2)
    return dask_executor(client)


@pytest.fixture(scope="module")
def executors(client):  # noqa: ARG001  # it has to end after that of dask
    """Those that are up: a pool takes a while."""
    made = {}
    yield made
    for executor in made.values():
        executor.shutdown()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def executor(kind, executors, client):
    if kind not in executors:
        executors[kind] = new_executor(kind, client)
    return executors[kind]


@pytest.fixture
def collector(executor):
    with Collector(executor=executor) as collector:
        yield collector


class Gate:
    """Queries that tell that they run, and do so until they may go on; by files."""

    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "open"

    def query(self, name="query"):
        folder, gate = self.folder, self.path

        def wait(frame):
            Path(folder, f"{name}-{os.getpid()}").touch()
            while not gate.exists():
                time.sleep(0.005)
            return frame

        return FRAME.map_batches(wait)

    def pids(self, name="query"):
        """Give the processes where the query has begun."""
        return {int(path.name.rpartition("-")[2]) for path in self.folder.glob(f"{name}-*")}

    def open(self):
        self.path.touch()


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path)
    yield gate
    gate.open()


def until(condition):
    while not (found := condition()):
        time.sleep(0.005)
    return found


def pid_query():
    return FRAME.map_batches(lambda _: pl.DataFrame({"a": [__import__("os").getpid()]}))


def error_of(handle):
    with pytest.raises(BaseException) as caught:  # noqa: PT011  # that of the query, any
        handle.result()
    return caught.value


# Results


def test_results_come_to_every_loop_and_thread(collector):
    async def main():
        handles = [collector.collect_async(FRAME.select(pl.col("a") * n)) for n in range(5)]
        return [frame["a"].sum() for frame in [await handle for handle in handles]]

    assert asyncio.run(main()) == trio.run(main) == [0, 6, 12, 18, 24]
    assert collector.collect_async(FRAME.sum()).result().item() == 6
    handle = collector.collect_async(FRAME.sum(), gevent=True)
    assert gevent.spawn(handle.get).get().item() == 6


def test_functions_without_a_name_run_in_a_worker(collector):
    pid = collector.collect_async(pid_query()).result().item()
    assert pid != os.getpid()


def test_every_kind_of_query_runs_there(collector, tmp_path):
    found = collector.collect_all_async([FRAME, FRAME.sum(), pid_query()]).result()
    assert [frame.height for frame in found] == [3, 1, 1]
    assert found[2].item() != os.getpid()
    assert collector.collect_schema_async(FRAME).result() == {"a": pl.Int64}

    target = tmp_path / "a.parquet"
    assert collector.sink_async(FRAME.sink_parquet(target, lazy=True)).result() is None
    assert pl.read_parquet(target)["a"].to_list() == [1, 2, 3]

    async def streams():
        frames = [FRAME.select(pl.col("a").sum() * n) for n in range(4)]
        sums = {number: frame.item() async for number, frame in collector.as_completed(frames)}
        long = pl.LazyFrame({"a": range(100)})
        batches = collector.collect_batches_async(long, chunk_size=30)
        rows = [row async for batch in batches for row in batch["a"]]
        async with collector.collect_batches_async(long, chunk_size=30) as batches:
            first = await anext(batches)
        return sums, rows, first["a"][0]

    assert asyncio.run(streams()) == ({n: 6 * n for n in range(4)}, list(range(100)), 0)


# Errors


def raises_value_error():
    def fail(_):
        raise ValueError("no such luck")

    return FRAME.map_batches(fail)


@pytest.mark.parametrize(
    "lf", [FRAME.select("b"), PANIC, raises_value_error()], ids=["column", "panic", "function"]
)
def test_error_is_that_of_polars_with_the_other_traceback(collector, lf, capfd):
    with pytest.raises(BaseException) as caught:  # noqa: PT011  # a panic is no Exception
        lf.collect()
    error = error_of(collector.collect_async(lf))
    assert type(error) is type(caught.value)
    assert str(error) == str(caught.value)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert type(error).__name__ in str(error.__cause__)
    capfd.readouterr()  # Rust reports a panic


def test_error_of_a_class_that_cannot_be_pickled_comes_as_the_nearest_that_can(collector):
    def fail(_):
        class Odd(KeyError):  # noqa: N818  # it has to be told apart
            lock = __import__("threading").Lock()

        raise Odd("told")

    error = error_of(collector.collect_async(FRAME.map_batches(fail)))
    assert type(error) is KeyError
    assert error.args == ("Odd: 'told'",)
    assert "Odd: 'told'" in str(error.__cause__)


def test_result_that_cannot_be_sent_is_an_error(collector):
    def replace(_):
        return pl.DataFrame({"a": [object()]}, schema={"a": pl.Object})

    objects = FRAME.map_batches(replace, schema={"a": pl.Object})
    error = error_of(collector.collect_async(objects))
    assert isinstance(error.__cause__, RemoteTraceback)  # and so the executor knows of no error
    assert collector.collect_async(FRAME.sum()).result().item() == 6


def test_query_that_cannot_be_sent_is_an_error(collector):
    lock = threading.Lock()
    error = error_of(collector.collect_async(FRAME.map_batches(lambda frame: lock and frame)))
    assert isinstance(error, PolarsAsyncError)
    assert "cannot be sent to another process" in str(error)


def test_missing_file_is_said_to_be_missing_on_the_worker(collector):
    error = error_of(collector.collect_async(pl.scan_parquet("/nowhere/a.parquet")))
    assert isinstance(error, FileNotFoundError)
    (note,) = error.__notes__
    assert re.match(r"on the worker process \d+ on .*: files have to be where each worker", note)
    assert f"process {os.getpid()} " not in note


@pytest.mark.parametrize("version", ["0.1.0", pl.__version__])
def test_plan_of_another_polars_is_said_to_be_one(version):
    task = pack([FRAME], in_files=False).data.replace(b"DSL_VERSION", b"DSL_FASHION")
    assert task != pack([FRAME], in_files=False).data
    kind, packed, batches, retries = unpack(Message(run_task(task, version, {}), []))
    assert (kind, batches, retries) == ("error", [], [])
    error = unpacked_error(packed)
    other = version != pl.__version__
    assert (type(error) is PolarsAsyncError) == other
    told = f"has Polars {pl.__version__}, and cannot read a query of Polars {version}"
    assert (told in str(error)) == other


def refuse(*_):
    raise OSError("it has no file")


def test_error_holds_neither_the_query_nor_the_future():
    refusing = Stub()
    refusing.submit = refuse
    for executor, lf in (Inline(), FRAME.select("b")), (refusing, FRAME):
        with Collector(executor=executor) as collector:
            traceback = error_of(collector.collect_async(lf)).__traceback__
        held = set()
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == futures.__file__:
                held |= set(traceback.tb_frame.f_locals)
            traceback = traceback.tb_next
        assert held <= {"error", "kind"}


# Time-out and cancellation


def test_waiting_query_that_is_cancelled_never_runs(collector, gate, kind, cluster):
    blocked = [collector.collect_async(gate.query()) for _ in range(MANY)]
    until(lambda: all(handle._query._stop for handle in blocked))  # the executor has them
    cancelled = collector.collect_async(gate.query("cancelled"))
    until(lambda: cancelled._query._stop)
    cancelled.cancel()
    until(lambda: collector.stats()["running"] == MANY)
    if kind == "dask":  # to which it is told behind its back
        until(lambda: len(cluster.scheduler.tasks) == MANY)
    gate.open()
    assert [handle.result().height for handle in blocked] == [3] * MANY
    assert not gate.pids("cancelled")


def test_running_query_that_is_cancelled_is_given_up_at_once(collector, gate, kind):
    handle = collector.collect_async(gate.query())
    until(gate.pids)
    assert handle.cancel()
    assert handle.done()
    if kind == "dask":  # which says that it is gone, and goes on with it
        until(lambda: not collector.stats()["running"])
    else:
        assert collector.stats()["abandoned"] == 1
    gate.open()
    until(lambda: not collector.stats()["running"])
    assert collector.stats()["cancelled"] == 1
    assert collector.collect_async(FRAME.sum()).result().item() == 6


def test_timeout_says_that_the_query_may_go_on(collector, gate):
    handle = collector.collect_async(gate.query(), timeout=60)
    until(gate.pids)
    until(lambda: inside.may_be_stopped(handle))  # the executor's future is here a moment later
    inside.let_time_be_up(handle)
    with pytest.raises(QueryTimeoutError, match=r"executor .*, which is asked to drop it and may"):
        handle.result()


class Stub(Executor):
    """Does with a query whatever the test wants."""

    def __init__(self):
        self.future = Future()

    def submit(self, _function, /, *_arguments):
        return self.future


class Inline(Executor):
    def submit(self, function, /, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def test_cancelling_does_not_wait_for_an_executor_that_is_slow_to_cancel():
    executor, asked, gate = Stub(), threading.Event(), threading.Event()

    def cancel():
        asked.set()
        gate.wait()
        return Future.cancel(executor.future)

    executor.future.cancel = cancel
    collector = Collector(executor=executor)
    try:
        handle = collector.collect_async(FRAME)
        until(lambda: handle._query._stop is not None)
        assert handle.cancel()  # or it would wait here for ever
        asked.wait()
        assert collector.stats()["abandoned"] == 1
    finally:
        gate.set()
        Future.cancel(executor.future)
        collector.close()


@pytest.mark.parametrize("error", [RuntimeError("it was shut down"), OSError("it has no file")])
def test_executor_that_refuses_a_query_is_named_in_its_error(error):
    def refuse(*_):
        raise error

    executor = Stub()
    executor.submit = refuse
    with Collector(executor=executor) as collector:
        found = error_of(collector.collect_async(FRAME, label="sales"))
    assert type(found) is PolarsAsyncError
    assert f"could not run the query 'sales' ({type(error).__name__}: {error})" in str(found)
    assert found.__cause__ is error


EXIT = """
from concurrent.futures import Executor, Future
import polars as pl, polars_async as pa

class Never(Executor):
    def submit(self, *_):
        future = Future()
        future.add_done_callback(lambda future: print("cancelled:", future.cancelled()))
        return future

handle = pa.Collector(executor=Never()).collect_async(pl.LazyFrame({"a": [1]}))
while handle._query._stop is None:
    pass
"""


def test_program_that_ends_cancels_what_its_executor_has(run_script):
    assert run_script(EXIT) == ["cancelled:", "True"]


def test_query_of_an_executor_that_was_shut_down_ends(kind, client):
    executor = new_executor(kind, client)
    executor.shutdown()
    with Collector(executor=executor) as collector:
        error = error_of(collector.collect_async(FRAME))
    assert isinstance(error, PolarsAsyncError)
    assert "shutdown" in str(error)


# Workers


@pytest.mark.parametrize("own", ["pool", "loky"])
def test_pool_whose_worker_is_killed_ends_every_query_with_an_error(own, gate):
    executor = new_executor(own, None)
    with Collector(executor=executor) as collector:
        handles = [collector.collect_async(gate.query()) for _ in range(5)]
        os.kill(until(gate.pids).pop(), signal.SIGKILL)
        errors = [error_of(handle) for handle in handles]
        errors.append(error_of(collector.collect_async(FRAME, label="after")))
    executor.shutdown()
    assert {type(error) for error in errors} == {WorkerDiedError}
    assert "lost the query 'after'" in str(errors[-1])
    assert isinstance(errors[0].__cause__, Exception)


def test_dask_runs_a_query_again_whose_worker_is_killed(losing, gate):
    with Collector(executor=dask_executor(losing)) as collector:
        handle = collector.collect_async(gate.query())
        (first,) = until(gate.pids)
        os.kill(first, signal.SIGKILL)
        until(lambda: gate.pids() > {first})
        gate.open()
        assert handle.result().height == 3
        assert collector.stats()["completed"] == 1


def test_dask_gives_up_a_query_that_kills_its_workers(losing, tmp_path):
    folder = tmp_path

    def kill(_):
        Path(folder, str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    with Collector(executor=dask_executor(losing, retries=9)) as collector:
        error = error_of(collector.collect_async(FRAME.map_batches(kill)))
        assert isinstance(error, WorkerDiedError)
        assert "KilledWorker" in str(error)
        assert len(list(tmp_path.iterdir())) == 4  # as the docstring of dask_executor says
        assert collector.collect_async(FRAME.sum()).result().item() == 6


def test_worker_that_was_forked_from_a_process_with_polars_says_so():
    FRAME.group_by("a").len().collect()  # starts the threads of Polars
    with (
        ProcessPoolExecutor(1, mp_context=get_context("fork")) as executor,
        Collector(executor=executor) as collector,
    ):
        error = error_of(collector.collect_async(FRAME))
    assert isinstance(error, ForkedProcessError)
    assert "get_context('spawn')" in error.__notes__[0]


GREEN = """
from gevent import monkey
{first}
from concurrent.futures import ThreadPoolExecutor
import polars as pl, polars_async as pa
collector = pa.Collector(executor=ThreadPoolExecutor()) if {late} else None
{second}
try:
    collector = collector or pa.Collector(executor=ThreadPoolExecutor())
    collector.collect_async(pl.LazyFrame({{"a": [1]}}), gevent=True).get(timeout=30)
except ValueError as error:
    print(str(error).split()[0])
"""


@pytest.mark.parametrize("late", [False, True])
def test_executor_that_gevent_has_patched_is_refused(run_script, late):
    patch = "monkey.patch_all()"
    first, second = ("", patch) if late else (patch, "")
    assert run_script(GREEN.format(first=first, second=second, late=late)) == ["gevent.monkey"]


# dask


def test_equal_queries_run_each_by_itself_whatever_dask_is_told(client, tmp_path):
    folder = tmp_path

    def note(frame):
        Path(folder, uuid4().hex).touch()
        return frame

    lf = FRAME.map_batches(note)
    with Collector(executor=client.get_executor(pure=True)) as collector:
        for handle in [collector.collect_async(lf), collector.collect_async(lf)]:
            handle.result()
    assert len(list(tmp_path.iterdir())) == 2


def test_query_runs_where_its_resources_are_alone(client, gate):
    async def offer(gpus, dask_worker):
        await dask_worker.set_resources(GPU=gpus)

    pids = client.run(os.getpid)
    bare, fitted = pids
    client.run(offer, 0, workers=[bare])
    try:
        with Collector(executor=dask_executor(client, resources={"GPU": 1})) as collector:
            handles = [collector.collect_async(gate.query()) for _ in range(MANY)]
            gate.open()
            assert [handle.result().height for handle in handles] == [3] * MANY
        assert gate.pids() == {pids[fitted]}
    finally:
        client.run(offer, 1, workers=[bare])


def test_resources_that_no_worker_has_are_refused(client):
    with pytest.raises(ValueError, match=r"no worker has resources=\{'GPU': 2\}.*has \{'GPU': 1\}"):
        dask_executor(client, resources={"GPU": 2})
    with pytest.raises(ValueError, match=r"no worker has resources=\{'GPU': 1, 'TPU': 1\}"):
        dask_executor(client, resources={"GPU": 1, "TPU": 1})


def test_no_worker_yet_is_refused_where_resources_are_asked_for():
    with (
        LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=":0") as empty,
        Client(empty) as client,
    ):
        dask_executor(client)
        with pytest.raises(ValueError, match="there is no worker yet"):
            dask_executor(client, resources={"GPU": 1})


def spoil(what):
    def run():
        if what == "version":
            pl.__version__, pl.own_version = "0.99.1", pl.__version__
        elif what == "package":
            sys.modules["polars_async.executors.dask"] = None
        else:
            pl.__version__ = getattr(pl, "own_version", pl.__version__)
            sys.modules.pop("polars_async.executors.dask", None)

    return run


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("version", f"has Polars 0.99.1, and cannot .* has Polars {re.escape(pl.__version__)}:"),
        ("package", "cannot run queries .*: install polars-async there"),
    ],
)
def test_worker_that_cannot_run_queries_is_named(client, what, message):
    address = sorted(client.run(os.getpid))[1]
    client.run(spoil(what), workers=[address])
    try:
        with pytest.raises(PolarsAsyncError, match=f"the dask worker {address} {message}"):
            dask_executor(client)
    finally:
        client.run(spoil("nothing"), workers=[address])


def test_asynchronous_client_is_refused():
    async def main():
        options = {"asynchronous": True, "host": "127.0.0.1", "dashboard_address": ":0"}
        async with (
            LocalCluster(n_workers=0, **options) as empty,
            Client(empty, asynchronous=True) as client,
        ):
            with pytest.raises(ValueError, match="needs a synchronous client"):
                dask_executor(client)

    asyncio.run(main())


def test_client_that_is_closed_ends_its_queries(cluster, gate):
    with Client(cluster) as client:
        executor = dask_executor(client)
        collector = Collector(executor=executor)
        handle = collector.collect_async(gate.query())
        until(gate.pids)
    with collector:
        assert isinstance(error_of(handle), WorkerDiedError)
        error = error_of(collector.collect_async(FRAME))
    assert type(error) is PolarsAsyncError
    assert "ClosedClientError" in str(error)


MAIN = """
import sys, polars as pl, polars_async as pa
from polars_async.executors.futures import run_task
from concurrent.futures import Executor, Future
import pickle, subprocess

class Elsewhere(Executor):
    \"\"\"Runs each task in an interpreter of its own, which knows nothing of this program.\"\"\"
    def submit(self, function, *arguments):
        code = "import pickle, sys; f, a = pickle.load(sys.stdin.buffer); "
        code += "sys.stdout.buffer.write(f(*a))"
        task = pickle.dumps((function, arguments))
        done = subprocess.run([sys.executable, "-c", code], input=task, stdout=-1, check=True)
        future = Future()
        future.set_result(done.stdout)
        return future

def twice(frame):
    return frame * FACTOR

FACTOR = 2
with pa.Collector(executor=Elsewhere()) as collector:
    lf = pl.LazyFrame({"a": [21]}).map_batches(twice)
    print(collector.collect_async(lf).result(40).item())
"""


def test_functions_of_the_main_program_are_found(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(MAIN)
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=150, check=False
    )
    assert (done.stdout, done.stderr) == ("42\n", "")
