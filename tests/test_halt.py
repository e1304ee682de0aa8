"""A query that is let go while it is packed for a worker process takes no more time."""

import os
import sys
import threading
import time
from pathlib import Path

import polars as pl
import pytest

import polars_async as pa
from polars_async.executors.message import SerializationAbort
from polars_async.executors.serialization import pack, unpack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files in memory")


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


class HaltInTheMidst(SerializationAbort):
    """Comes when the first of the plan is written."""

    def watch(self, file):
        super().watch(file)
        threading.Thread(target=self._come, args=(file,)).start()

    def _come(self, file):
        while not os.fstat(file).st_size:
            time.sleep(0.001)
        self()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_packing_ends_before_its_time(when):
    plan = pl.select(pl.int_range(3_000_000, dtype=pl.Int64).alias("a")).lazy()
    abort = HaltInTheMidst() if when == "meanwhile" else SerializationAbort()
    files = open_files()
    if when == "before":
        abort()
    with pytest.raises(pa.PolarsAsyncError):
        pack(plan, in_files=True, abort=abort)
    assert open_files() <= files  # one of an earlier test may be closed meanwhile


def test_halt_that_comes_late_leaves_what_is_packed():
    abort = SerializationAbort()
    message = pack(pl.LazyFrame({"a": [1]}), in_files=True, abort=abort)
    abort()
    file = message.files[0]
    os.truncate(file, os.fstat(file).st_size + 1)  # which a sealed one would refuse
    os.truncate(file, os.fstat(file).st_size - 1)
    assert unpack(message).collect().to_dict(as_series=False) == {"a": [1]}


@pytest.mark.filterwarnings("ignore:the query takes:polars.exceptions.PerformanceWarning")
def test_query_cancelled_while_it_is_packed_is_silent(caplog):
    plan = pl.select(pl.int_range(3_000_000, dtype=pl.Int64).alias("a")).lazy().sum()
    with pa.Collector(executor="processes", max_running=1) as collector:
        handle = collector.collect_async(plan)
        time.sleep(0.05)
        assert handle.cancel()
        assert collector.collect_async(plan).result().item() == sum(range(3_000_000))
        stats = collector.stats()
    assert (stats["cancelled"], stats["completed"], stats["failed"]) == (1, 1, 0)
    assert not caplog.records
