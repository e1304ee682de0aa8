"""Slots that follow the processors: what is measured, and what is learned of queries."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from math import inf
from pathlib import Path
from time import perf_counter, process_time

import inside
import polars as pl
import pytest
from places import TINY, until
from polars.io.plugins import register_io_source
from test_admission import run_blocked, settle

from polars_async import Collector
from polars_async._runtime import machine
from polars_async._runtime.plans import NOTHING
from polars_async.scheduling import estimates, load
from polars_async.scheduling.estimates import CostModel, Estimate
from polars_async.scheduling.sizes import Limits

pytestmark = pytest.mark.usefixtures("other_programs_are_quiet")


@pytest.fixture
def other_programs_are_quiet(monkeypatch):
    """Go by this process alone: other tests may run on the machine."""
    monkeypatch.setattr(load, "idle_seconds", lambda: None)
    monkeypatch.setattr(load, "_LEAST_MEMORY", 0.0)


@pytest.fixture
def unmeasured(monkeypatch):
    """Open no slots by what is measured."""
    monkeypatch.setattr(Limits, "spare", lambda *_: 0)


def sleeping(seconds=0.05, number=1):
    def read(*_):
        time.sleep(seconds)
        yield pl.DataFrame({"a": [number]})

    return register_io_source(read, schema={"a": pl.Int64})


def waiting_for(gate):
    """Return a query of the same shape, which waits for a gate."""

    def read(*_):
        assert gate.wait(30)
        yield pl.DataFrame({"a": [1]})

    return register_io_source(read, schema={"a": pl.Int64})


# What is measured


def test_where_no_thread_can_start_to_measure_no_thread_of_queries_is_lost(
    make, block, monkeypatch
):
    tried = []

    def start(*_):
        tried.append(1)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(load, "start_timer", start)
    collector = make(engine="in-memory")
    blocked = [block() for _ in range(12)]
    handles = [collector.collect_async(each.lf) for each in blocked]
    until(lambda: tried)
    for each in blocked:
        each.gate.set()
    for handle in handles:
        handle.result(30)
    until(lambda: not inside.running(collector))
    assert all(collector.collect_async(TINY).result(30).height == 1 for _ in range(12))


@pytest.mark.parametrize("executor", ["threads", "processes"], indirect=True)
def test_queries_that_wait_run_beyond_the_usual_slots(make, block, executor):
    collector = make()
    many = 12 if executor == "threads" else 6
    for _ in range(many):
        collector.collect_async(block().lf)
    until(lambda: inside.running(collector) == many)
    assert inside.waiting(collector) == 0


def test_no_more_run_than_the_cap_which_stats_tell(make, block):
    collector = make()
    most = collector.stats()["max_running"]
    assert most == max(64, os.cpu_count())
    collector._cpu.admission.limits.most = 8
    for _ in range(10):
        collector.collect_async(block().lf)
    until(lambda: inside.running(collector) == 7)  # one is left for small ones
    settle(collector)
    assert inside.waiting(collector) == 3
    assert collector.collect_async(TINY).result(30).item() == 1


def test_number_that_was_asked_for_is_exact(make, block):
    collector = make(max_running=3)
    for _ in range(6):
        run_or_wait = block()
        collector.collect_async(run_or_wait.lf, priority=1)
    until(lambda: inside.running(collector) == 3)
    settle(collector)
    time.sleep(0.1)  # for what must not be measured
    assert inside.running(collector) == 3
    assert not collector._cpu._meter._runs


@pytest.mark.parametrize("reason", ["other programs", "memory"])
def test_no_more_start_where_nothing_is_to_be_had(make, block, monkeypatch, reason):
    if reason == "memory":
        monkeypatch.setattr(load, "_LEAST_MEMORY", 2.0)
    else:
        monkeypatch.setattr(load, "idle_seconds", lambda: 0.0)
    collector = make()
    slots = collector._cpu.admission.limits.slots
    for _ in range(12):
        collector.collect_async(block().lf)
    measured = []
    measure = load.LoadMeter._measure
    monkeypatch.setattr(
        load.LoadMeter, "_measure", lambda self: measured.append(1) or measure(self)
    )
    until(lambda: len(measured) > 3)
    assert inside.running(collector) <= slots
    assert inside.waiting(collector) >= 12 - slots


def test_thread_looks_at_the_memory_while_another_is_slow_to_do_so(make, block, monkeypatch):
    collector = make()
    monkeypatch.setattr(collector._cpu.admission.limits, "slots", 1)
    run_blocked(collector, block)
    found, is_slow = [], threading.Event()

    def look():
        if threading.current_thread() is slow:
            is_slow.set()
            until(lambda: found)
        found.append(threading.current_thread())
        return 0.0

    monkeypatch.setattr(load, "available_memory", look)
    monkeypatch.setattr(load, "_LEAST_MEMORY", 1.0)
    meter = load.LoadMeter(collector._cpu.admission)
    slow = threading.Thread(target=meter.look_at_memory)
    slow.start()
    assert is_slow.wait(30)
    meter.look_at_memory()
    is_short = collector._cpu.admission.memory_is_short
    found.append(None)
    slow.join()
    assert is_short
    assert found[0] is threading.current_thread()


def test_more_start_again_once_memory_is_free(make, block, monkeypatch):
    monkeypatch.setattr(load, "_LEAST_MEMORY", 2.0)
    collector = make()
    for _ in range(12):
        collector.collect_async(block().lf)
    until(lambda: collector._cpu.admission.memory_is_short)
    assert inside.running(collector) <= collector._cpu.admission.limits.slots
    monkeypatch.setattr(load, "_LEAST_MEMORY", 0.0)
    until(lambda: inside.running(collector) == 12)


def test_nothing_is_measured_once_no_query_waits(make, block):
    collector = make()
    handles = [collector.collect_async(block().lf) for _ in range(10)]
    until(lambda: inside.waiting(collector) == 0)
    until(lambda: not collector._cpu._meter._runs)
    block.free()
    for handle in handles:
        handle.result(30)
    assert collector._cpu.admission.spare == 0


def test_measuring_ends_when_the_queue_is_emptied_by_cancellations(make, block, unmeasured):  # noqa: ARG001
    collector = make()
    run_blocked(collector, block)
    waiting = [collector.collect_async(sleeping()) for _ in range(5)]
    until(lambda: collector._cpu._meter._runs)
    for handle in waiting:
        handle.cancel()
    until(lambda: not collector._cpu._meter._runs)
    again = collector.collect_async(sleeping())
    until(lambda: collector._cpu._meter._runs)
    block.free()
    assert again.result(30).item() == 1


def test_query_that_proves_long_makes_room_for_those_of_its_old_size(make, block, unmeasured):  # noqa: ARG001
    collector = make()
    handle, _ = run_blocked(collector, block)  # without an estimate
    handle._query.times.started -= 20.0
    later = collector.collect_async(sleeping(0.001))
    until(later.done)
    assert later.result(1).item() == 1


def test_processor_time_of_workers_counts():
    with Collector(executor="processes", max_running=1) as collector:
        executor = collector._cpu.executor
        collector.collect_async(TINY).result(30)
        before, own = executor.cpu_seconds(), process_time()
        busy = TINY.map_batches(lambda df: _burn(0.3, df))
        collector.collect_async(busy).result(30)
        assert executor.cpu_seconds() - before > 0.25 + (process_time() - own) / 2
    assert executor.cpu_seconds() <= process_time()


def _burn(seconds, df):
    end = process_time() + seconds
    while process_time() < end:
        pass
    return df


# What is learned


def shares_of(collector, lf):
    costs = collector._cpu._costs
    return costs.of([lf], "in-memory").share


def test_queries_that_were_seen_to_wait_start_together(make, unmeasured):  # noqa: ARG001
    collector = make()
    collector._cpu.admission.cpu_seconds = lambda: perf_counter() / 100  # others may compute
    for _ in range(2):
        collector.collect_async(sleeping()).result(30)
    until(lambda: (shares_of(collector, sleeping()) or 1) < 0.25)
    gate = threading.Event()
    handles = [collector.collect_async(waiting_for(gate)) for _ in range(10)]
    until(lambda: inside.running(collector) == 10)
    gate.set()
    for handle in handles:
        handle.result(30)


def test_queries_that_were_seen_to_compute_do_not(make, block, unmeasured):  # noqa: ARG001
    collector = make()
    busy = TINY.map_batches(lambda df: _burn(0.2, df))
    collector._cpu.admission.cpu_seconds = lambda: perf_counter() * os.cpu_count()
    collector.collect_async(busy).result(30)
    until(lambda: shares_of(collector, busy) is not None)
    assert shares_of(collector, busy) > 0.9
    run_blocked(collector, block)
    late = collector.collect_async(busy)
    settle(collector)
    assert not late.done()


@pytest.mark.parametrize(
    ("before", "share", "alone", "is_exact", "now"),
    [
        (None, 0.1, True, True, 0.1),
        (None, 0.1, False, True, 0.1),  # no more than all took together
        (0.1, 0.9, False, True, 0.1),
        (0.5, 0.2, False, True, 0.2),
        (0.1, 0.9, True, True, 0.9),
        (0.9, 0.1, True, True, 0.1),
        (0.9, 0.1, True, False, 0.45),  # the next may have another function
        (0.1, 0.9, True, False, 0.9),
        (None, 1.7, True, True, 1.0),
    ],
)
def test_share_of_the_processors_is_learned(before, share, alone, is_exact, now):
    costs, lf = CostModel(), TINY.sort("a")
    expected = costs.of([lf], "in-memory")._replace(is_exact=is_exact, seconds=0.5)
    if before is not None:
        costs._shares[expected.fingerprint] = before
        expected = expected._replace(share=before)
    costs.observe(expected, 0.5, alone=alone, share=share)
    assert costs.of([lf], "in-memory").share == pytest.approx(now)


def test_new_share_is_told_where_it_makes_a_difference():
    costs = CostModel()
    expected = Estimate(0.5, 1, share=None)
    assert costs.observe(expected, 0.5, alone=True, share=0.1).share == 0.1
    known = expected._replace(share=0.1)
    assert costs.observe(known, 0.5, alone=True, share=0.2) is None
    assert costs.observe(known, 0.5, alone=True, share=0.6).share == 0.6


def test_share_that_is_expected_holds_until_one_is_measured():
    costs, scan = CostModel(), pl.scan_parquet("s3://bucket/a.parquet")
    expected = costs.of([scan], "in-memory")
    assert costs.observe(expected, 5.0, alone=True).share == expected.share == 0.25


@pytest.mark.parametrize(
    ("path", "share"),
    [
        ("https://example.org/a.parquet", 0.25),
        ("s3://bucket/a.parquet", 0.25),
        ("/data/a.parquet", None),
        ("file:///data/a.parquet", None),
    ],
)
def test_query_over_remote_files_is_expected_to_wait(path, share):
    assert CostModel().of([pl.scan_parquet(path)], "in-memory").share == share


# What the machine tells


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Make files that stand for those of the kernel."""
    for cached in (machine._processors, machine._own_cgroups):
        cached.cache_clear()
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_TIMES", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.delenv("POLARS_MAX_THREADS", raising=False)

    def write(name, text):
        path = Path(tmp_path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    yield write
    for cached in (machine._processors, machine._own_cgroups):
        cached.cache_clear()


@pytest.mark.usefixtures("fake")
def test_processors_are_those_of_the_affinity_without_limits(monkeypatch):
    assert machine.processors() == 64
    monkeypatch.setenv("POLARS_MAX_THREADS", "3")
    assert machine.processors() == 3
    monkeypatch.setenv("POLARS_MAX_THREADS", "200")
    assert machine.processors() == 64


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b", {"cgroup/a/b/cpu.max": "250000 100000"}, 2.5),
        ("0::/a/b", {"cgroup/a/b/cpu.max": "max 100000", "cgroup/a/cpu.max": "400000 100000"}, 4),
        ("0::/of/the/host", {"cgroup/cpu.max": "50000 100000"}, 0.5),
        (
            "4:cpu,cpuacct:/a",
            {"cgroup/cpu/a/cpu.cfs_quota_us": "300000", "cgroup/cpu/a/cpu.cfs_period_us": "100000"},
            3,
        ),
        (
            "4:cpu:/",
            {"cgroup/cpu/cpu.cfs_quota_us": "-1", "cgroup/cpu/cpu.cfs_period_us": "100000"},
            64,
        ),
        ("0::/a", {"cgroup/a/cpu.max": "nonsense"}, 64),
    ],
)
def test_quota_of_the_cgroup_limits_the_processors(fake, own, files, expected):
    fake("own", own + "\n")
    for name, text in files.items():
        fake(name, text)
    assert machine.processors() == expected


MEMINFO = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 400 kB\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (None, {}, 1.0),
        (None, {"meminfo": MEMINFO}, 0.4),
        (
            "0::/a",
            {
                "meminfo": MEMINFO,
                "cgroup/a/memory.max": "1000",
                "cgroup/a/memory.current": "900",
                "cgroup/a/memory.stat": "anon 5\ninactive_file 100\n",
            },
            0.2,
        ),
        ("0::/a", {"meminfo": MEMINFO, "cgroup/a/memory.max": "max"}, 0.4),
        (
            "9:memory:/a",
            {
                "cgroup/memory/a/memory.limit_in_bytes": "1000",
                "cgroup/memory/a/memory.usage_in_bytes": "500",
                "cgroup/memory/a/memory.stat": "total_inactive_file 0\n",
            },
            0.5,
        ),
    ],
)
def test_available_memory_is_that_of_the_machine_and_of_the_cgroup(fake, own, files, expected):
    if own is not None:
        fake("own", own + "\n")
    for name, text in files.items():
        fake(name, text)
    assert machine.available_memory() == pytest.approx(expected)


def test_idle_time_is_that_of_all_processors(fake):
    assert machine.idle_seconds() is None
    fake("stat", "cpu  10 0 10 300 100 0 0\ncpu0 1 1 1 1\n")
    assert machine.idle_seconds() == pytest.approx(400 / os.sysconf("SC_CLK_TCK"))
    fake("stat", "nonsense")
    assert machine.idle_seconds() is None


def test_this_machine_tells_its_own():
    assert 0 < machine.processors() <= len(os.sched_getaffinity(0))
    assert 0 < machine.available_memory() < 1
    before, begun = machine.idle_seconds(), perf_counter()
    with suppress(AssertionError):
        until(lambda: machine.idle_seconds() > before, 1)
    assert 0 <= machine.idle_seconds() - before <= (perf_counter() - begun + 1) * os.cpu_count()
    assert inf > machine.idle_seconds() > 0


# Queries that share the processors


@pytest.mark.usefixtures("unmeasured")
def test_streaming_queries_start_unlooked_until_some_prove_large(make, block, monkeypatch):
    collector = make()
    costs, looks = collector._cpu._costs, []
    look = costs._look
    monkeypatch.setattr(costs, "_look", lambda *a, **o: looks.append(a) or look(*a, **o))
    for _ in range(collector._cpu.admission.limits.slots):
        handle, _ = run_blocked(collector, block, engine="streaming")
        handle._query.times.started -= 1.0
    assert looks == []
    late = collector.collect_async(block().lf, engine="streaming")
    until(lambda: looks)
    block.free()
    assert late.result(30).height == 1


@pytest.mark.usefixtures("unmeasured")
def test_more_streaming_queries_start_unlooked_while_looks_are_dear(make, block, monkeypatch):
    collector = make()
    costs = collector._cpu._costs
    with monkeypatch.context() as patch:  # as where a look copies a large frame
        patch.setattr(estimates, "thread_time", (n / 100 for n in range(1000)).__next__)
        assert not costs.is_look_dear()
        costs.of([TINY.head(2)], "streaming")
        patch.setattr(estimates, "perf_counter", lambda: 0.0)
        assert costs.is_look_dear()
        looks = []
        patch.setattr(costs, "_look", lambda *a, **_: looks.append(a) or NOTHING)
        for _ in range(2 * collector._cpu.admission.limits.slots):
            run_blocked(collector, block, engine="streaming")
        assert looks == []
        patch.setattr(estimates, "perf_counter", lambda: inf)
        assert not costs.is_look_dear()
        late = collector.collect_async(block().lf, engine="streaming")
        until(lambda: looks)
    block.free()
    assert late.result(30).height == 1


def test_little_is_spent_to_learn_of_queries_that_have_ended(monkeypatch):
    costs, looks = CostModel(), []
    monkeypatch.setattr(estimates, "thread_time", iter(range(1000)).__next__)
    monkeypatch.setattr(costs, "_look", lambda *a, **_: looks.append(a) or NOTHING)
    for number in range(5):
        costs.of_ended([TINY.head(number)], "in-memory")
    assert len(looks) == 1
    costs._learns_again = 0.0
    costs.of_ended([TINY.tail(1)], "in-memory")
    assert len(looks) == 2
