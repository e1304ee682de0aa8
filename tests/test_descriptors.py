"""How many files results and shared frames hold open: the program needs descriptors for itself."""

from __future__ import annotations

import gc
import pickle
import sys
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

import polars as pl
import pytest

import polars_async as pa

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files in memory need Linux")

LARGE = pl.LazyFrame({"n": [0]}).select(k=pl.int_range(0, 100_000))
"""A query whose result is mapped."""
FRAME = LARGE.collect()


def open_files(_=None):
    return len(list(Path("/proc/self/fd").iterdir()))


def files_in_memory():
    """Return the inodes of those open here: others, of tests before, may be closed at any time."""
    inodes = set()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile, such as that of the listing itself
            if "memfd:polars-async" in str(file.readlink()):
                inodes.add(file.stat().st_ino)
    return inodes


def files_of_worker(collector):
    count = pl.LazyFrame({"a": [1]}).map_batches(lambda frame: frame * 0 + open_files())
    return collector.collect_async(count).result(30).item()


@pytest.fixture
def collector(executor):
    with pa.Collector(executor=executor, max_running=1) as collector:
        yield collector


@pytest.fixture
def few_files(monkeypatch):
    """Let 3 shared frames keep their files."""
    monkeypatch.setattr("polars_async.executors.shared_frames._with_descriptor", WeakSet())
    monkeypatch.setattr("polars_async.executors.shared_frames.most_files", lambda: 3)


@pytest.mark.everywhere
def test_results_hold_no_file(collector):
    collector.collect_async(LARGE).result(30)
    before = open_files()
    held = [collector.collect_async(LARGE).result(30) for _ in range(30)]
    assert open_files() < before + 10
    assert {frame["k"].sum() for frame in held} == {4_999_950_000}


@pytest.mark.everywhere
def test_results_of_a_shared_frame_hold_no_file(collector):
    shared = pa.share(FRAME)
    collector.collect_async(shared).result(30)
    before = open_files()
    held = [collector.collect_async(shared).result(30) for _ in range(30)]
    assert open_files() < before + 10
    assert all(frame.equals(FRAME) for frame in held)


def test_worker_keeps_no_file_of_a_shared_frame():
    with pa.Collector(executor="processes", max_running=1) as collector:
        before = files_of_worker(collector)
        frames = [pa.share(pl.DataFrame({"a": [n]})) for n in range(30)]
        found = collector.collect_all_async([pl.concat(frames), *frames]).result(30)
        assert [frame["a"][-1] for frame in found] == [29, *range(30)]
        assert files_of_worker(collector) == before


@pytest.mark.usefixtures("few_files")
@pytest.mark.everywhere
def test_shared_frame_that_keeps_no_file_is_read_all_the_same(collector):
    before = files_in_memory()
    frames = [pa.share(pl.DataFrame({"a": [n] * 100_000}).set_sorted("a")) for n in range(9)]
    assert len(files_in_memory() - before) == 3
    found = [collector.collect_async(frame).result(30) for frame in frames]
    assert [frame["a"][0] for frame in found] == list(range(9))
    assert all(frame["a"].flags["SORTED_ASC"] for frame in found)
    joined = collector.collect_async(pl.concat([*frames, *frames]).select(pl.col("a").sum()))
    assert joined.result(30).item() == 7_200_000
    assert frames[8].collect().height == 100_000


@pytest.mark.usefixtures("few_files")
def test_shared_frames_that_are_gone_make_room_for_files_of_others():
    before = files_in_memory()
    first = [pa.share(FRAME) for _ in range(3)]
    of_first = files_in_memory() - before
    assert len(of_first) == 3
    second = pa.share(FRAME)
    assert not files_in_memory() - before - of_first
    del first
    gc.collect()
    third = pa.share(FRAME)
    held = files_in_memory()
    assert not held & of_first
    assert len(held - before) == 1
    assert second.collect().equals(third.collect())


@pytest.mark.usefixtures("few_files")
def test_shared_frame_that_keeps_no_file_is_pickled_with_its_rows():
    with_file = [pa.share(FRAME) for _ in range(3)]
    copy = pickle.loads(pickle.dumps(pa.share(FRAME)))
    assert copy.collect().equals(with_file[0].collect())


PROGRAM = """
import resource, socket, sys
import polars as pl, polars_async as pa
large = pl.LazyFrame({"n": [0]}).select(k=pl.int_range(0, 100_000))
with pa.Collector(executor=sys.argv[1], max_running=1) as collector:
    collector.collect_async(large.map_batches(lambda frame: frame)).result(30)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    shared = [pa.share(pl.DataFrame({"a": [n]})) for n in range(150)]
    query = pl.concat(shared).sum().map_batches(lambda frame: frame)
    print(collector.collect_async(query).result(30).item())
    print(sum(collector.collect_async(each.map_batches(lambda frame: frame)).result(30).item()
              for each in shared))
    held = [collector.collect_async(large.map_batches(lambda frame: frame)).result(30)
            for _ in range(150)]
    several = collector.collect_all_async([large] * 80).result(30)
    print(len(held), len(several))
    socket.socket().close()
"""


@pytest.mark.parametrize("executor", ["threads", "processes", "auto"])
def test_program_that_may_open_few_files_holds_many_frames(run_script, executor):
    assert run_script(PROGRAM, executor) == ["11175", "11175", "150", "80"]


def test_frame_that_is_held_to_the_end_of_a_program_is_silent(run_script):
    script = """
import polars as pl, polars_async as pa
large = pl.LazyFrame({"n": [0]}).select(k=pl.int_range(0, 100_000))
collector = pa.Collector(executor="processes", max_running=1)
held = collector.collect_async(large).result(30)
shared = pa.share(held)
print(collector.collect_async(shared).result(30).height)
"""
    assert run_script(script) == ["100000"]


def test_result_whose_files_cannot_be_opened_is_a_clear_error(run_script, tmp_path):
    script = """
import os, resource, sys, time
from pathlib import Path
import polars as pl, polars_async as pa
begun, go = map(Path, sys.argv[1:])
def wait(frame):
    begun.touch()
    while not go.exists():
        time.sleep(0.005)
    return frame
large = pl.LazyFrame({"n": [0]}).select(k=pl.int_range(0, 100_000))
with pa.Collector(executor="processes", max_running=1) as collector:
    handle = collector.collect_async(large.map_batches(wait))
    while not begun.exists():
        time.sleep(0.005)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    os.mkdir(go)  # which takes no file
    try:
        handle.result(30)
    except OSError as raised:
        error = raised
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    print(error.errno, collector.collect_async(large).result(30).height)
"""
    assert run_script(script, str(tmp_path / "begun"), str(tmp_path / "go")) == ["24", "100000"]
