"""Worker processes of programs that do with their process what few do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from ast import literal_eval
from itertools import combinations
from multiprocessing import set_executable
from multiprocessing.spawn import get_executable
from pathlib import Path

import polars as pl
import pytest
from places import until as eventually

import polars_async as pa
from polars_async.executors.processes.child_handle import ChildHandle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux"),
]

ONE = pl.LazyFrame({"a": [1]})
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


@pytest.fixture
def collector():
    with pa.Collector(executor="processes", max_running=1) as collector:
        yield collector


def pid_of(frame):
    return frame.select(a=pl.lit(os.getpid(), pl.Int64))


def worker_of(collector):
    return collector.collect_async(ONE.map_batches(pid_of)).result(30).item()


def is_there(pid):
    return Path(f"/proc/{pid}").exists()


# Which program a worker is


@pytest.fixture
def runs_in(monkeypatch):
    """Have this process be that of a program, as it would be since the start."""
    before = get_executable()

    def runs_in(program):
        monkeypatch.setattr(sys, "executable", program)
        set_executable(program)

    yield runs_in
    set_executable(before)


@pytest.fixture
def service(tmp_path):
    """A program with Python in it, which starts like one and leaves a note."""
    service = tmp_path / "service"
    service.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    service.chmod(0o755)
    yield str(service)
    assert not (tmp_path / "started").exists()


def refused(collector):
    with pytest.raises(pa.PolarsAsyncError) as caught:
        collector.collect_async(ONE).result(30)
    assert "multiprocessing.set_executable" in str(caught.value)
    assert "executor='threads'" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("program", ["", None, "/nowhere/python3", "/", __file__])
def test_what_cannot_be_started_is_named_and_what_to_set(collector, runs_in, program):
    runs_in(program)
    assert f"{program or ''!r} is no program" in refused(collector)


def test_program_with_python_embedded_is_not_started(collector, runs_in, service):
    runs_in(service)
    assert f"{service!r} is not called python" in refused(collector)


def test_program_that_has_mended_sys_executable_too_late_is_not_started(
    collector, runs_in, service, tmp_path, monkeypatch
):
    python = tmp_path / "python3"
    python.symlink_to(sys.executable)
    runs_in(service)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(os.path, "samefile", lambda one, _: one == service)
    assert f"{service!r} is not called python" in refused(collector)


@pytest.mark.parametrize("called", ["service", "python3"])
def test_frozen_program_is_not_started(collector, runs_in, service, monkeypatch, called):
    program = Path(service).with_name(called)
    if called != "service":
        program.symlink_to(service)
    runs_in(str(program))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "is this program itself, which is frozen" in refused(collector)


@pytest.mark.parametrize("called", ["python", "python3.11", "python3.13t", "pypy3.10", "mine"])
def test_python_is_started_by_whatever_link(collector, runs_in, tmp_path, called):
    link = tmp_path / called
    link.symlink_to(sys.executable)  # which finds its libraries by pyvenv.cfg, if at all
    (tmp_path / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    runs_in(str(link))
    assert collector.collect_async(ONE).result(30).item() == 1


def test_frozen_program_has_workers_in_the_python_that_it_sets(run_script):
    script = """
import os, multiprocessing, sys, polars as pl, polars_async as pa
python, sys.executable, sys.frozen = sys.executable, "/nowhere/service", True
import cloudpickle, multiprocessing.spawn, polars_async.executors.processes.pool
multiprocessing.set_executable(python)
sys.path[:] = ["/nowhere/base_library.zip"]
def count(frame):
    import filecmp, json
    found = sum(each.startswith("/nowhere") for each in sys.path)
    return frame.select(a=pl.lit(found, pl.Int64))
query = pl.LazyFrame({"a": [1]}).map_batches(count)
with pa.Collector(executor="processes", max_running=1) as collector:
    for _ in range(3):
        print(collector.collect_async(query).result(30).item())
        sys.path.append("/nowhere/plugins")
"""
    assert run_script(script) == ["1", "2", "3"]


def test_outcome_of_a_query_is_its_own_where_no_worker_can_take_the_place(collector, runs_in):
    def die(_):
        os.kill(os.getpid(), signal.SIGKILL)

    worker_of(collector)
    runs_in("/nowhere/python3")
    assert collector.collect_async(ONE).result(30).item() == 1
    with pytest.raises(pa.WorkerDiedError, match="by SIGKILL"):
        collector.collect_async(ONE.map_batches(die)).result(30)
    refused(collector)


# Signals


def test_dead_worker_costs_no_program_its_life_where_sigpipe_ends_it(run_script):
    script = """
import os, signal, time, polars as pl, polars_async as pa
from polars_async.executors.processes.process import WorkerProcess
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
WorkerProcess.is_alive = lambda _: True  # as where it dies just after
def pid(frame):
    return frame.select(a=pl.lit(os.getpid(), pl.Int64))
with pa.Collector(executor="processes", max_running=1) as collector:
    query = pl.LazyFrame({"a": [1]}).map_batches(pid)
    before = collector.collect_async(query).result(30).item()
    os.kill(before, signal.SIGKILL)
    os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)
    print(collector.collect_async(query).result(30).item() != before)
"""
    assert run_script(script) == ["True"]


def test_reader_that_is_gone_in_the_midst_costs_no_program_its_life(run_script):
    script = """
import signal, threading
from _socket import socketpair
from polars_async.executors.processes.transport import Transport
from polars_async.executors.message import Message
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
ours, theirs = socketpair()
def read_a_little():
    theirs.recv(1000)
    theirs.close()
threading.Thread(target=read_a_little).start()
for data in (bytes(10**7), b"x"):
    try:
        Transport(ours).send(Message(data, []))
    except EOFError:
        print("gone")
"""
    assert run_script(script) == ["gone", "gone"]


@pytest.fixture
def ignores_children():
    """Have the kernel take the status of all children."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture
def waits_for_children():
    """Have a thread take the status of all children."""
    ends = threading.Event()

    def wait():
        while not ends.wait(0.001):
            try:
                os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                continue

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    ends.set()
    thread.join()


def take_number(number):
    """Start a process that has the number, unless another one is faster."""
    for _ in range(20):
        before = LAST_PID.read_text()
        LAST_PID.write_text(str(number - 1))
        process = subprocess.Popen(["sleep", "60"])
        LAST_PID.write_text(before)  # so that no other test is given numbers of its dead workers
        if process.pid == number:
            return process
        process.kill()
        process.wait()
    return None


def kill_worker(collector):
    pid = worker_of(collector)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_there(pid))
    return pid


@pytest.mark.skipif(not os.access(LAST_PID, os.W_OK), reason="root alone may choose numbers")
@pytest.mark.usefixtures("ignores_children")
@pytest.mark.parametrize("is_seen", [True, False])
def test_process_that_has_the_number_of_a_dead_worker_is_left_alone(
    collector, monkeypatch, is_seen
):
    if not is_seen:  # as where it dies just after the look
        monkeypatch.setattr(
            "polars_async.executors.processes.process.WorkerProcess.is_alive", lambda _: True
        )
    while (other := take_number(kill_worker(collector))) is None:
        pass
    with other:
        try:
            assert worker_of(collector) != other.pid
            assert other.poll() is None
        finally:
            other.kill()


@pytest.mark.parametrize("how", ["ignores_children", "waits_for_children"])
def test_query_is_stopped_and_the_next_one_runs_though_the_status_is_taken(
    collector, request, how, tmp_path
):
    request.getfixturevalue(how)
    begun = str(tmp_path / "begun")

    def wait(frame):
        Path(begun).write_text(str(os.getpid()))
        time.sleep(60)
        return frame

    for _ in range(3):
        Path(begun).unlink(missing_ok=True)
        handle = collector.collect_async(ONE.map_batches(wait))
        eventually(lambda: Path(begun).exists() and Path(begun).read_text())
        pid = int(Path(begun).read_text())
        handle.cancel()
        eventually(lambda pid=pid: not is_there(pid))
        assert collector.collect_async(ONE).result(30).item() == 1


@pytest.mark.usefixtures("ignores_children")
def test_status_that_the_kernel_has_taken_is_not_known(collector):
    def die(_):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(pa.WorkerDiedError, match="since SIGCHLD is ignored") as caught:
        collector.collect_async(ONE.map_batches(die)).result(30)
    assert caught.value.exitcode is None


def without_pidfd(monkeypatch):
    monkeypatch.delattr(os, "pidfd_open", raising=False)


def refused_pidfd(monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)


@pytest.mark.parametrize("lack", [without_pidfd, refused_pidfd])
def test_worker_is_known_by_its_number_where_there_is_no_better(collector, monkeypatch, lack):
    lack(monkeypatch)

    def die(_):
        os._exit(3)

    with pytest.raises(pa.WorkerDiedError, match="with exit status 3"):
        collector.collect_async(ONE.map_batches(die)).result(30)
    pid = worker_of(collector)
    monkeypatch.setattr(
        "polars_async.executors.processes.process.WorkerProcess.is_alive", lambda _: False
    )
    assert worker_of(collector) != pid
    eventually(lambda: not is_there(pid))


def test_number_that_is_not_that_of_a_child_is_sent_no_signal(monkeypatch):
    without_pidfd(monkeypatch)
    child = ChildHandle(os.getppid())
    sent = []
    monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
    child.signal(signal.SIGKILL)
    assert sent == []
    child.await_end()
    with pytest.raises(ChildProcessError):
        child.take_exitcode()


# Files and arguments


CLOSED = """
import os, sys, polars as pl, polars_async as pa
kept = os.dup(1)
for file in map(int, sys.argv[1:]):
    os.close(file)
def say(frame):
    for file in (sys.stdout, sys.stderr):
        print("said", file=file, flush=True)
    return links(frame)
def links(_):
    found = []
    for file in range(3):
        try:
            found.append(os.readlink(f"/proc/self/fd/{file}"))
        except OSError:
            found.append("closed")
    return pl.DataFrame({"a": found})
def panic():
    try:
        pl.LazyFrame({"a": [1]}).select(pl.int_range(0, 2**62)).collect()
    except BaseException:
        pass
tiny, large = pl.LazyFrame({"a": ["x"]}), pl.select(a=pl.int_range(0, 200_000))
shared = pa.share(large)
with pa.Collector(executor="processes", max_running=1) as collector:
    there = collector.collect_async(tiny.map_batches(say)).result(30)["a"].to_list()
    for query in (large.lazy(), shared, large.lazy()):
        panic()
        assert collector.collect_async(query).result(30).equals(large)
    here = links(None)["a"].to_list()
    assert collector.stats()["workers_died"] == 0
os.write(kept, f"\\n{here}\\n{there}".encode())
os._exit(0)
"""


@pytest.mark.parametrize("closed", [each for n in (1, 2, 3) for each in combinations("012", n)])
def test_standard_files_that_are_closed_are_not_those_of_the_library(closed):
    command = [sys.executable, "-c", CLOSED, *closed]
    done = subprocess.run(command, stdin=-3, capture_output=True, timeout=150, check=True)
    here, there = map(literal_eval, done.stdout.decode().splitlines()[-2:])
    for file in map(int, closed):
        # Polars may have opened something of its own there.
        assert not any(ours in here[file] for ours in ("memfd", "socket", "pipe", "pidfd"))
        assert there[file] == "/dev/null"


def test_worker_does_not_get_what_was_opened_in_the_place_of_stdout(run_script):
    script = """
import os, sys, polars as pl, polars_async as pa
kept = os.dup(1)
os.close(1)
own = open("/proc/self/status")
def say(frame):
    print("said")
    return frame.select(a=pl.lit(os.readlink("/proc/self/fd/1")))
with pa.Collector(executor="processes") as collector:
    found = collector.collect_async(pl.LazyFrame({"a": ["x"]}).map_batches(say)).result(30)
os.write(kept, f"{own.fileno()} {found.item()}".encode())
os._exit(0)
"""
    assert run_script(script) == ["1", "/dev/null"]


class Folder(str):
    """A path of a library whose paths are texts, too."""

    __slots__ = ()

    def __repr__(self):
        return f"Folder({str(self)!r})"


def test_search_path_may_be_long(collector, monkeypatch, tmp_path):
    folders = [str(tmp_path / f"{number}-{'x' * 200}") for number in range(9000)]
    folders[3] = Folder(tmp_path / "ü \udcff '\"\\\n")
    monkeypatch.setattr(sys, "path", [*folders, *sys.path])

    def is_there(frame):
        return frame.select(a=pl.lit(sys.path[:9000] == folders, pl.Int64))

    for _ in range(2):
        assert collector.collect_async(ONE.map_batches(is_there)).result(30).item() == 1
        sys.path.append(Folder("/nowhere"))


def test_nothing_is_left_open_of_a_worker_that_is_gone(run_script):
    script = """
import os, signal, time, polars as pl, polars_async as pa
def files():
    return set(os.listdir("/proc/self/fd"))
one = pl.LazyFrame({"a": [1]})
with pa.Collector(executor="threads") as collector:
    collector.collect_async(one).result(30)
before = files()
for _ in range(2):
    with pa.Collector(executor="processes") as collector:
        collector.collect_async(one).result(30)
    while files() - before:
        time.sleep(0.01)
"""
    assert run_script(script) == []


INHERITED = """
import os
import polars as pl
import polars_async as pa

TINY = pl.LazyFrame({"a": [1]})
file, _ = os.pipe()
os.set_inheritable(file, True)
pipe = os.readlink(f"/proc/self/fd/{file}")

def look(frame):
    import sitecustomize
    links = []
    for each in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{each}"))
        except OSError:  # that of the listing
            pass
    return pl.DataFrame({"a": [10 * (sitecustomize.pipe in links) + (pipe in links)]})

if __name__ == "__main__":
    with pa.Collector(executor="processes", max_running=1) as collector:
        print(collector.collect_async(TINY.map_batches(look)).result(30).item())
"""


def test_worker_closes_what_it_has_inherited_and_not_what_it_has_opened(
    run_script, tmp_path, monkeypatch
):
    # As that of opentelemetry-instrument does, whose exporter ends a process that closes its files.
    code = "import os\nfile, _ = os.pipe()\npipe = os.readlink(f'/proc/self/fd/{file}')\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), before]))
    assert run_script(INHERITED) == ["10"]
