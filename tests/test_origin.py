"""Threads that Polars has started, and those that look like them."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pytest
from places import TINY, named_thread, on_foreign_thread
from polars.io.plugins import register_io_source

from polars_async import Collector, QueueFullError
from polars_async._runtime import origin
from polars_async._runtime.unpatched import allocate_lock, start_new_thread

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names threads as Linux does")

NAMES = ["tokio-rt-worker", "polars-0", "async-executor-"]


def on_python_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(30)


def on_bare_thread(function):
    """Call `function` on a thread that `threading` does not know."""
    outcome, done = [], allocate_lock()
    done.acquire()

    def run():
        try:
            outcome.append(function())
        finally:
            done.release()

    start_new_thread(run, ())
    assert done.acquire(timeout=30)
    return outcome[0]


THREADS = [on_python_thread, on_bare_thread, on_foreign_thread]


def seen_by(ask):
    """Tell what `ask` says on each of Polars' threads: of expressions, of sources and of files."""
    seen, here = [], threading.get_ident()

    def note(values=None):
        if threading.get_ident() != here:
            seen.append(ask())
        return values

    def read(with_columns, predicate, n_rows, batch_size):  # noqa: ARG001
        note()
        yield pl.DataFrame({"a": [1]})

    class File:
        def write(self, data):
            note()
            return len(data)

    columns = [pl.col("a").map_batches(note, return_dtype=pl.Int64).alias(str(i)) for i in range(8)]
    pl.LazyFrame({"a": [1]}).select(columns).collect(engine="in-memory")
    assert seen
    expressions = len(seen)
    register_io_source(read, schema={"a": pl.Int64}).collect(engine="streaming")
    assert len(seen) > expressions
    sources = len(seen)
    TINY.sink_csv(File(), lazy=True).collect(engine="streaming")
    assert len(seen) > sources
    return set(seen)


def test_threads_that_polars_has_started_are_known():
    assert seen_by(origin.is_this_of_polars) == {True}
    assert seen_by(lambda: origin.is_of_polars(threading.get_ident())) == {True}


@pytest.mark.parametrize("on_thread", THREADS)
@pytest.mark.parametrize("name", NAMES)
def test_threads_of_others_are_not_taken_for_those_of_polars(on_thread, name):
    def ask():
        with named_thread(name):
            return origin.is_this_of_polars(), origin.is_of_polars(threading.get_ident())

    assert on_thread(ask) == (False, False)
    assert not origin.is_this_of_polars()


@pytest.mark.parametrize("on_thread", THREADS)
@pytest.mark.parametrize("name", NAMES)
def test_thread_that_looks_like_one_of_polars_waits_for_a_slot(blocked, on_thread, name):
    with Collector(max_running=1, max_waiting=1) as collector:
        collector.collect_async(blocked.lf)
        assert blocked.started.wait()

        def ask():
            with named_thread(name):
                waiting = collector.collect_async(TINY)
                with pytest.raises(QueueFullError):
                    collector.collect_async(TINY)
                assert collector.stats()["running"] == 1
                return waiting

        waiting = on_thread(ask)
        blocked.gate.set()
        assert waiting.result(30).item() == 1


@pytest.mark.parametrize("on_thread", THREADS)
@pytest.mark.parametrize("name", NAMES)
def test_thread_that_looks_like_one_of_polars_may_close(on_thread, name):
    collector = Collector()
    collector.collect_async(TINY).result(30)

    def close():
        with named_thread(name):
            collector.close()
        return collector.closed

    assert on_thread(close)


def test_pool_that_began_inside_a_query_asks_as_any_other(collector, blocked):
    with ThreadPoolExecutor(1) as pool:

        def read(with_columns, predicate, n_rows, batch_size):  # noqa: ARG001
            assert pool.submit(threading.get_ident).result(30)
            yield pl.DataFrame({"a": [1]})

        source = register_io_source(read, schema={"a": pl.Int64})
        collector.collect_async(source, engine="streaming").result(30)
        collector.collect_async(blocked.lf)
        assert blocked.started.wait()
        waiting = pool.submit(collector.collect_async, TINY).result(30)
        assert collector.stats()["waiting"] == 1
        blocked.gate.set()
        assert waiting.result(30).item() == 1


def test_without_glibc_the_name_has_to_do(monkeypatch):
    monkeypatch.setattr(origin, "_offset", lambda: None)
    assert seen_by(origin.is_this_of_polars) == {True}
    assert not origin.is_this_of_polars()
    assert not on_bare_thread(origin.is_this_of_polars)
    with named_thread("polars-0"):
        assert origin.is_this_of_polars()


ENDED = """
import ctypes, mmap, threading
from polars_async._runtime import origin

libc, resident = ctypes.CDLL(None), (ctypes.c_ubyte * 1)()

def is_mapped(address):  # by a call that allocates nothing, which might be put right there
    page = ctypes.c_void_p(address & -mmap.PAGESIZE)
    return libc.mincore(page, ctypes.c_size_t(mmap.PAGESIZE), resident) == 0

print(origin.is_of_polars(threading.get_ident()))  # first: it starts a thread, which takes memory
threading.stack_size(256 << 20)  # so much is not kept for the next thread, but unmapped
thread = threading.Thread(target=int)
thread.start()
ended = thread.ident
thread.join()
threading.stack_size(0)
while is_mapped(ended):  # until another one ends, before Python 3.13
    another = threading.Thread(target=int)
    another.start()
    another.join()
print(origin.is_of_polars(ended))
"""


def test_thread_that_has_ended_is_not_read(run_script):
    assert run_script(ENDED) == ["False", "False"]
