"""A query that is let go while it is packed for a worker process takes no more time."""

import os
import sys
import threading
from pathlib import Path

import polars as pl
import pytest

import polars_async as pa
from polars_async.executors.message import SerializationAbort
from polars_async.executors.serialization import pack, unpack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files in memory")


def large():
    return pl.select(pl.int_range(3_000_000, dtype=pl.Int64).alias("a")).lazy()


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


class HaltInTheMidst(SerializationAbort):
    """Comes when Polars packs this, which stands for a function, between a frame and a value."""

    def watch(self, file):
        super().watch(file)
        self.file = file

    def __reduce__(self):
        assert os.fstat(self.file).st_size
        thread = threading.Thread(target=self)
        thread.start()
        thread.join()
        return getattr, (pl.DataFrame, "clone")


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_packing_ends_before_its_time(when):
    plan = large()
    abort = SerializationAbort()
    if when == "before":
        abort()
    else:
        abort = HaltInTheMidst()
        plan = plan.map_batches(abort).select(pl.lit(plan.collect()["a"]))
    files = open_files()
    with pytest.raises(pa.PolarsAsyncError):
        pack(plan, in_files=True, abort=abort)
    assert abort.is_aborted
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
def test_query_cancelled_while_it_is_packed_is_silent(caplog, monkeypatch):
    begun, cancelled = threading.Event(), threading.Event()
    watch = SerializationAbort.watch

    def held_up(abort, file):
        watch(abort, file)
        begun.set()
        assert cancelled.wait(60)

    monkeypatch.setattr(SerializationAbort, "watch", held_up)
    plan = large().sum()
    with pa.Collector(executor="processes", max_running=1) as collector:
        handle = collector.collect_async(plan)
        assert begun.wait(60)
        assert handle.cancel()
        cancelled.set()
        assert collector.collect_async(plan).result().item() == sum(range(3_000_000))
        stats = collector.stats()
    assert (stats["cancelled"], stats["completed"], stats["failed"]) == (1, 1, 0)
    assert not caplog.records
