"""Worker processes of programs that do with their process what few do."""

from __future__ import annotations

import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux")


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
