"""Worker processes of programs that do with their process what few do."""

from __future__ import annotations

import subprocess
import sys
from ast import literal_eval
from itertools import combinations

import polars as pl
import pytest

import polars_async as pa

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux")

ONE = pl.LazyFrame({"a": [1]})


@pytest.fixture
def collector():
    with pa.Collector(executor="processes", max_running=1) as collector:
        yield collector


# Signals


def test_dead_worker_costs_no_program_its_life_where_sigpipe_ends_it(run_script):
    script = """
import os, signal, time, polars as pl, polars_async as pa
from polars_async.executors.spawned import Worker
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
Worker.is_alive = lambda _: True  # as where it dies just after
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
from polars_async.executors.channel import Channel
from polars_async.executors.parcels import Parcel
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
ours, theirs = socketpair()
def read_a_little():
    theirs.recv(1000)
    theirs.close()
threading.Thread(target=read_a_little).start()
for data in (bytes(10**7), b"x"):
    try:
        Channel(ours).send(Parcel(data, []))
    except EOFError:
        print("gone")
"""
    assert run_script(script) == ["gone", "gone"]


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
    done = subprocess.run(command, stdin=-3, capture_output=True, timeout=50, check=True)
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
