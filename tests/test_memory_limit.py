"""A limit of memory: which queries wait for it, what is learned, and what is told."""

from __future__ import annotations

import gc
import gzip
import io
import os
import re
import threading
import warnings
import weakref
from functools import partial
from math import inf
from types import SimpleNamespace

import inside
import polars as pl
import pytest
from places import TINY, until

import polars_async as pa
from polars_async._runtime import machine, parquet
from polars_async._runtime.upstream import spilling
from polars_async.options import checked_memory
from polars_async.scheduling import estimates, fair_queue, memory_use
from polars_async.scheduling.estimates import CostModel, Estimate
from polars_async.scheduling.fair_queue import FairQueue
from polars_async.scheduling.memory import Memory
from polars_async.scheduling.memory_watch import MemoryWatch
from polars_async.scheduling.query import Query
from polars_async.scheduling.sizes import Limits, Load

MB = 10**6
LIMIT = 640 * MB


@pytest.fixture(autouse=True)
def budget(monkeypatch):
    """Return what tells Polars' budget of memory, which no other test is to have."""
    monkeypatch.setattr(spilling, "_ours", None)
    for variable in (spilling.BUDGET, spilling._OURS):
        monkeypatch.setenv(variable, "")  # to be restored, whatever a test sets
        del os.environ[variable]
    yield lambda: os.environ.get(spilling.BUDGET)
    monkeypatch.undo()
    pl.Config.load("{}")


class Machine:
    """What Polars holds, and what the process takes beside that."""

    def __init__(self):
        self.held = 0

    def __call__(self):
        return self.held


@pytest.fixture
def held():
    return Machine()


@pytest.fixture
def memory(held):
    return Memory(LIMIT, held)


def large(memory, share=None):
    return Load(4, share, memory=memory)


def taker(load, *, alone=True, before=0):
    return SimpleNamespace(load=load, alone=alone, used_before=before, peak=None)


# What may start


def test_a_query_that_runs_alone_may_take_all(memory, held):
    held.held = 2 * LIMIT
    assert memory.left([]) == inf
    small = taker(Load(0, memory=memory.small), before=2 * LIMIT)
    assert memory.left([small]) == inf  # beside small ones, too
    held.held += memory.small + 1
    assert memory.left([small]) == LIMIT - held.held  # unless one has taken much all the same


def test_what_runs_counts_for_what_it_will_take_or_for_what_is_taken_if_that_is_more(memory, held):
    held.held = 40 * MB
    memory.note_start(taker(large(200 * MB)), alone=True)
    assert memory.left([taker(large(200 * MB))]) == LIMIT - 240 * MB
    held.held = 340 * MB
    assert memory.left([taker(large(200 * MB))]) == LIMIT - 340 * MB


def test_what_the_process_takes_beside_polars_is_the_least_of_some_measurements(memory, held):
    held.held = 100 * MB
    memory.measure(400 * MB, 50 * MB)
    assert memory.used == 450 * MB
    memory.measure(150 * MB, 50 * MB)  # what was freed is given back by now
    memory.measure(400 * MB, 50 * MB)
    assert memory.used == 200 * MB
    for _ in range(20):
        memory.measure(400 * MB, 0)
    assert memory.used == 400 * MB


def test_less_may_be_resident_than_polars_has_allocated(memory, held):
    held.held = 300 * MB
    memory.measure(100 * MB, 0)
    assert memory.used == 300 * MB


def test_results_count_while_they_live(memory, held):
    frame = pl.select(pl.int_range(1_000_000))
    small = pl.select(pl.int_range(10))
    assert memory.keep([frame, small]) == 8 * MB
    assert memory.keep(small) == memory.keep(None) == 0
    held.held = 100 * MB
    assert memory.left([taker(large(100 * MB))]) == LIMIT - 108 * MB
    del frame
    gc.collect()
    assert memory.left([taker(large(100 * MB))]) == LIMIT - 100 * MB


def test_result_counts_for_no_more_than_its_query_can_have_filled(memory):
    frames = [pl.select(pl.int_range(1_000_000)) for _ in range(2)]
    assert memory.keep(frames, most=10 * MB) == 10 * MB
    assert sorted(size for _, size in memory._kept.values()) == [2 * MB, 8 * MB]


def test_an_unknown_measurement_of_the_process_is_none(memory):
    memory.measure(0, 50 * MB)  # on a system that does not tell
    assert memory.used == 50 * MB
    memory.measure(100 * MB, 0)
    memory.measure(0, 0)  # too many files were open, for one
    assert memory.used == 100 * MB


def test_only_small_queries_start_where_memory_is_taken():
    room = Limits(3).room([])
    room.memory, room.small_memory = 100, 10
    assert room.fits(large(100))
    assert not room.fits(large(101))
    assert room.lacks_memory(large(101))
    room.memory = -5
    assert room.fits(Load(0, memory=10))
    assert room.lacks_memory(Load(0, memory=11))
    assert not room.fits(large(1))
    full = Limits(1).room([large(0)])
    full.memory = 0
    assert not full.lacks_memory(large(1))  # it wants for a slot as well


def test_what_waits_for_memory_is_overtaken_by_small_ones_alone():
    queue = FairQueue()
    queue.add("first", work=1.0, memory=90)
    queue.add("later", work=2.0, memory=10)
    queue.add("small", work=0.001, memory=10)

    def fits(load):
        return load.memory < 50

    def lacks_memory(item, load):
        held_up.append(item)
        return load.memory >= 50

    held_up = []
    assert queue.take(fits, lacks_memory).item == "small"
    assert queue.take(fits, lacks_memory) is None
    assert "first" in held_up
    queue.add("before", work=0.1, memory=10)  # its turn is before that of the one that waits
    assert queue.take(fits, lacks_memory).item == "before"
    assert queue.take(fits).item == "later"


def test_quick_items_that_take_much_memory_neither_overtake_nor_hold_up_small_ones():
    queue = FairQueue(small_memory=10)
    queue.add("first", work=1.0, memory=90)
    queue._overtaken = 10.0  # so that it is the turn of the first
    queue.add("much", work=0.001, memory=40)
    queue.add("urgent", work=1.0, priority=5, memory=40)
    queue.add("small", work=0.001, memory=10)

    def fits(load):
        return load.memory < 50

    def lacks_memory(_, load):
        return load.memory >= 50

    assert queue.take(fits, lacks_memory).item == "small"
    assert queue.take(fits, lacks_memory) is None
    assert queue.has_fitting(fits)
    queue.discard("first")
    queue._quick_streak = 64
    assert queue.take_quickly(fits, unestimated=False) is None  # which orders small ones alone
    assert queue.take(fits, lacks_memory).item == "urgent"
    assert queue.take(fits, lacks_memory).item == "much"


def test_first_item_that_was_discarded_hides_none_that_fits():
    queue = FairQueue()
    queue.add("first", work=1.0, memory=90)
    queue.add("second", work=1.0, memory=10)
    assert not queue.has_fitting(lambda load: load.memory < 50)
    queue.discard("first")
    assert queue.has_fitting(lambda load: load.memory < 50)


def test_a_priority_is_kept_until_the_item_has_its_estimate():
    queue = FairQueue()
    queue.add("usual", work=0.5)
    queue.add("urgent", priority=5, memory=None)
    assert queue.take(lambda _: True).item == "usual"
    entry = queue.next_unestimated()
    queue.add("next", work=0.5)
    queue.rank(entry, 0.5, memory=7)
    picked = queue.take(lambda _: True)
    assert (picked.item, picked.load.memory) == ("urgent", 7)


# What a query is expected to take


@pytest.mark.parametrize(
    ("frames", "files", "expected"),
    [
        (MB, 0, 5 * MB),
        (0, MB, 8 * MB),
        (MB, None, LIMIT // 2 + 1),
        (0, 0, LIMIT // 2 + 1),  # it may make anything
        (10 * MB, 0, LIMIT // 2 + 1),
        (100 * MB, 0, 500 * MB),
        (100 * MB, None, 500 * MB),
    ],
)
def test_first_guess_is_by_what_is_read_and_cautious_where_that_may_be_much(
    memory, frames, files, expected
):
    assert memory.need(7, frames, files) == expected


SMALL = pl.LazyFrame({"a": [1, 2], "b": ["x", "y"], "l": [[1], [2]]})
DAY = pl.date(2026, 1, 1)
NOT_GROWING = [
    SMALL.filter(pl.col("a") > 1).group_by("b").agg(pl.col("a").sum()).sort("b"),
    SMALL.with_columns(pl.col("a").cum_sum().over("b"), c=pl.col("b").str.to_uppercase()),
    SMALL.select(pl.col("a").alias("sample"), pl.lit("repeat").alias("Cross")),
    SMALL.join(SMALL, on="a", how="anti").unique(),
    SMALL.sort("a").join_asof(SMALL.sort("a"), on="a"),
    SMALL.select(pl.col("a").rolling_mean(2), pl.col("a").sum().over("b").alias("rolling")),
    SMALL.group_by("b").agg(pl.col("a").implode()),
    pl.concat([SMALL, SMALL]).sort("a"),
]
IN_MEMORY = io.BytesIO()
SMALL.collect().write_parquet(IN_MEMORY)
GROWING = [
    pl.concat([SMALL.select("a"), pl.scan_parquet(IN_MEMORY).select("a")]),
    SMALL.select(pl.int_range(10)),
    SMALL.select(pl.int_ranges("a")),
    SMALL.select(pl.date_range(DAY, DAY)),
    SMALL.select(pl.date_ranges(DAY, DAY)),
    SMALL.select(pl.datetime_range(DAY, DAY)),
    SMALL.select(pl.linear_space(0, 1, 10)),
    SMALL.select(pl.repeat(1, 10)),
    SMALL.select(pl.col("a").repeat_by(10)),
    SMALL.select(pl.col("a").extend_constant(1, 10)),
    SMALL.select(pl.col("a").sample(10, with_replacement=True)),
    SMALL.select(pl.col("l").list.sample(10, with_replacement=True)),
    SMALL.select(pl.col("b").str.pad_start(10)),
    SMALL.select(pl.col("b").str.pad_end(10)),
    SMALL.select(pl.col("b").str.zfill(10)),
    SMALL.explode("l", empty_as_null=True),
    SMALL.select(pl.col("l").list.explode(empty_as_null=True)),
    SMALL.join(SMALL, on="a"),
    SMALL.join(SMALL, on="a", how="left"),
    SMALL.join(SMALL, on="a", how="full"),
    SMALL.join(SMALL, how="cross"),
    SMALL.join_where(SMALL, pl.col("a") < pl.col("a_right")),
    SMALL.select(pl.col("a").over("b", mapping_strategy="join")),
    SMALL.select(pl.col("a").sort().implode().over("b")),
    SMALL.select(pl.col("a").set_sorted().sum().rolling("a", period="2i")),
    SMALL.rolling("a", period="2i").agg(pl.col("b")),
    SMALL.group_by_dynamic("a", every="1i", period="2i").agg(pl.col("b")),
    SMALL.map_batches(lambda df: df),
    SMALL.select(pl.col("a").map_batches(lambda s: s)),
]


@pytest.fixture(params=["text", "nodes"])
def costs(request, held, monkeypatch):
    """Return a cost model that sees the text of a plan, or its nodes."""
    if request.param == "nodes":
        monkeypatch.setattr("polars_async.scheduling.estimates.MUCH_HELD", -1)
        monkeypatch.setattr("polars_async.scheduling.estimates.look_at", None)
    return CostModel(memory=Memory(LIMIT, held))


def test_what_may_grow_is_seen_in_the_plan(costs):
    for query in NOT_GROWING:
        expected = costs.of([query], "in-memory")
        assert expected.memory <= LIMIT // 64, query.explain()
        assert not expected.is_mere_guess
    for query in GROWING:
        expected = costs.of([query], "in-memory")
        assert expected.memory > LIMIT // 2, query.explain()
        # Where Polars shows nothing of a plan, that may read much as well.
        assert expected.is_mere_guess == (expected.fingerprint is not None)


def test_frame_that_is_concatenated_with_itself_often_counts_as_often(costs):
    frame = pl.DataFrame({"a": range(10_000)})
    assert costs.of([frame.lazy()], "in-memory").memory <= LIMIT // 64
    often = pl.concat([frame.lazy()] * 300)
    twice = frame.lazy()
    for _ in range(8):
        twice = pl.concat([twice.with_columns(pl.col("a") + 1)] * 2).sort("a")
    for query in (often.sort("a"), twice):
        assert costs.of([query], "in-memory").memory > LIMIT // 2, query.explain()


@pytest.mark.parametrize("packed", ["parquet", "arrow", "csv.gz", "gz"])
def test_small_files_that_may_be_much_in_memory_are_unknown(packed, costs, tmp_path):
    rows = 2_000_000
    frame = pl.select(a=pl.zeros(rows, dtype=pl.Int64))
    path = tmp_path / f"a.{packed}"
    if packed == "parquet":
        frame.write_parquet(path)
        query = pl.scan_parquet(path)
    elif packed == "arrow":
        frame.write_ipc(path, compression="zstd")
        query = pl.scan_ipc(path)
    else:
        path.write_bytes(gzip.compress(frame.write_csv().encode()))
        query = pl.scan_csv(path)
    assert path.stat().st_size * 8 < LIMIT // 64
    query = pl.concat([SMALL.select("a"), query]).select(pl.col("a").max())
    expected = costs.of([query], "in-memory")
    assert expected.memory > LIMIT // 2
    costs._memory.learn(expected.fingerprint, MB, completed=True)
    assert costs.of([query], "in-memory").memory == int(1.1 * MB)


def test_footer_is_read_once_for_all_queries_until_the_file_changes(costs, tmp_path, monkeypatch):
    path, read = tmp_path / "a.parquet", []
    monkeypatch.setattr(estimates, "number_of_values", lambda *args: read.append(args) or 1)
    for rows in (10, 1000):
        pl.select(a=pl.int_range(rows)).write_parquet(path)
        for name in ("b", "c"):
            costs.of([pl.scan_parquet(path).select(pl.col("a").alias(name))], "in-memory")
    assert len(read) == 2


def test_damaged_footer_has_no_list_that_is_longer_than_itself():
    million = b"\xf7\xc0\x84\x3d"  # the head of a list of so many doubles
    with pytest.raises(IndexError):
        parquet._value(million + b"\0" * 80, 0, 9)


@pytest.mark.parametrize("form", ["parquet", "csv", "ndjson"])
def test_small_files_that_are_little_in_memory_are_known(form, costs, tmp_path):
    path = tmp_path / f"a.{form}"
    getattr(pl.select(a=pl.int_range(1000)), f"write_{form}")(path)
    query = getattr(pl, f"scan_{form}")(path)
    assert 8000 < costs.of([query], "in-memory").memory <= LIMIT // 64


def test_what_reads_much_counts_for_that_however_little_it_is_seen_to_take(costs, tmp_path):
    large = pl.select(a=pl.int_range(3_000_000))
    large.write_csv(tmp_path / "a.csv")
    beside = pl.concat([pl.scan_csv(tmp_path / "of_unknown_size.csv"), large.lazy()])
    assert not costs.of([beside], "in-memory").is_mere_guess
    for query in (large.lazy(), pl.scan_csv(tmp_path / "a.csv")):
        expected = costs.of([query.join(query.head(1), on="a")], "in-memory")
        assert expected.memory > LIMIT // 2
        assert not expected.is_mere_guess
    for function in (pl.int_range(10), pl.col("a").repeat_by("a")):
        expected = costs.of([pl.scan_csv(tmp_path / "a.csv").select(function)], "in-memory")
        assert expected.memory == max(LIMIT // 2 + 1, 8 * (tmp_path / "a.csv").stat().st_size)
        assert not expected.is_mere_guess


def test_what_is_made_by_numbers_is_not_learned_from_much_smaller_ones(costs):
    def shape(query):
        return costs.of([query], "in-memory").fingerprint

    assert shape(SMALL.select(pl.int_range(10))) == shape(SMALL.select(pl.int_range(20)))
    assert shape(SMALL.select(pl.int_range(10))) != shape(SMALL.select(pl.int_range(10**8)))
    few, many = (SMALL.rolling("a", period=period).agg("b") for period in ("9i", "999i"))
    assert shape(few) != shape(many)
    assert shape(SMALL.filter(pl.col("a") > 10)) == shape(SMALL.filter(pl.col("a") > 10**8))


def test_what_was_learned_goes_before_any_guess(memory):
    memory.learn(7, 200 * MB, completed=True)
    assert memory.need(7, MB, 0) == memory.need(7, MB, None) == memory.need(7, 0, None) == 220 * MB
    assert memory.need(8, 0, None) == memory.need(None, 0, None) == LIMIT // 2 + 1


def test_more_is_learned_at_once_and_less_by_and_by(memory):
    memory.learn(7, 200 * MB, completed=True)
    assert memory.learn(7, 400 * MB, completed=True) == 440 * MB
    assert memory.learn(7, 100 * MB, completed=True) == 275 * MB
    assert memory.learn(7, 0, completed=False) == 275 * MB
    assert memory.learn(7, 300 * MB, completed=False) == 330 * MB


def test_one_that_did_not_complete_says_nothing_of_the_first_of_its_kind(memory):
    memory.learn(7, MB, completed=False)
    assert memory.need(7, 0, None) == LIMIT // 2 + 1


def test_what_one_takes_alone_is_measured_and_several_share_it_by_what_is_expected(memory, held):
    held.held = 50 * MB
    first, second = taker(large(100 * MB)), taker(large(300 * MB), alone=False)
    memory.note_start(first, alone=True)
    held.held = 90 * MB
    memory.sample([first])
    assert first.peak == 40 * MB
    first.alone = False
    memory.note_start(second, alone=False)
    held.held = 450 * MB
    memory.sample([first, second])
    assert (first.peak, second.peak) == (100 * MB, 300 * MB)
    held.held = 60 * MB
    memory.sample([first, second])
    assert (first.peak, second.peak) == (100 * MB, 300 * MB)


def test_what_is_not_known_of_those_that_run_is_put_down_to_them_in_equal_parts(memory, held):
    first, second = (taker(Load(4), alone=False) for _ in range(2))
    first.peak = 90 * MB  # of the query that its slot had before
    memory.note_start(first, alone=True)
    held.held = 20 * MB
    memory.sample([first, second])
    assert (first.peak, second.peak) == (10 * MB, 10 * MB)


def test_what_is_learned_has_an_end(memory):
    for fingerprint in range(5000):
        memory.learn(fingerprint, MB, completed=True)
    assert len(memory._learned) == 4096
    assert memory.need(0, 0, None) == LIMIT // 2 + 1
    assert memory.need(4999, 0, None) == int(1.1 * MB)


def test_first_guess_of_a_query_counts_frames_and_files_apart(tmp_path, held):
    frame = pl.DataFrame({"a": range(100_000)})
    frame.write_csv(tmp_path / "a.csv")
    frame.write_parquet(tmp_path / "a.parquet")
    costs = CostModel(memory=Memory(10**12, held))
    assert costs.of([frame.lazy().select("a")], "in-memory").memory == 5 * 800_000
    size = (tmp_path / "a.csv").stat().st_size
    scan = pl.scan_csv(tmp_path / "a.csv")
    assert costs.of([scan.select("a")], "in-memory").memory == 8 * size
    scan = pl.scan_parquet(tmp_path / "a.parquet")  # as if it was in memory, if that is more
    assert costs.of([scan.select("a")], "in-memory").memory == 5 * 800_000


def test_what_a_worker_takes_counts_beside_what_it_takes_idle_and_with_its_result(limited):
    call_module = pytest.importorskip("polars_async.executors.processes.call")
    noted = []
    worker = SimpleNamespace(private_memory=lambda: 100, idle_memory=60)
    call = call_module.WorkerCall(worker, SimpleNamespace(note_memory=noted.append), 1000, None)
    call._next_sample = 0.0
    call._check_memory()
    assert noted == [40]
    query = SimpleNamespace(peak_memory=40, place="worker 7", keep_result=lambda _: 8)
    assert limited()._cpu.admission.memory_use.of_ended(SimpleNamespace(query=query), 2) == 48


# In a collector


def estimate(query, _):
    """Take the megabytes that a query needs, and its seconds, from its label."""
    if query.estimate is None:
        megabytes, _, seconds = (query.label or "0").partition(" ")
        query.estimate = Estimate(float(seconds or 1), None, memory=int(megabytes) * MB)


@pytest.fixture
def limited(monkeypatch, block):
    """Make collectors that have a limit, and nothing else in their memory than `held` says."""
    held, made = Machine(), []
    monkeypatch.setattr("polars_async.collector.memory_held", held)
    monkeypatch.setattr("polars_async.scheduling.memory_watch.own_memory", lambda: held.held)
    monkeypatch.setattr(Query, "set_estimate", estimate)

    def make(**options):
        made.append(pa.Collector(**{"max_memory": LIMIT, "max_running": 8, **options}))
        return made[-1]

    make.held = held
    yield make
    block.free()
    for collector in made:
        collector.close()


def start(collector, *needs, block):
    """Submit a query for each need, in megabytes and seconds; return them and their gates."""
    handles, gates = [], [block() for _ in needs]
    for gate, need in zip(gates, needs, strict=True):
        before = inside.running(collector)
        handles.append(collector.collect_async(gate.lf, label=need))
        until(partial(starts_or_waits, collector, before))
    return handles, gates


def starts_or_waits(collector, before):
    return inside.running(collector) > before or inside.lacks_memory(collector)


def is_held_up(collector, *, running):
    return lambda: inside.running(collector) == running and inside.lacks_memory(collector)


@pytest.mark.parametrize("slots", [8, None], ids=["fixed", "open"])
def test_queries_wait_until_there_is_memory(limited, block, slots):
    collector = limited(max_running=slots)
    handles, gates = start(collector, "400", "400 11", block=block)
    until(is_held_up(collector, running=1))
    assert inside.waiting(collector) == 1
    assert collector.stats()["memory_waits"] == 0
    gates[0].gate.set()
    gates[1].gate.set()
    block.free()
    for handle in handles:
        handle.result()
    stats = collector.stats()
    assert stats["memory_waits"] == 1
    assert stats["memory_seconds"] > 0
    assert not inside.lacks_memory(collector)
    assert (stats["memory"], stats["max_memory"]) == (0, LIMIT)
    assert {"memory_waits", "memory_seconds"} < pa.Collector.COUNTERS


def pretend_held_up(handle):
    """Have a query that memory holds up wait for 6000 seconds, 5000 of them for that."""
    until(lambda: handle._query.times.memory_seconds > 0)
    handle._query.times.held_up_since -= 5000
    handle._query.times._submitted -= 6000


def test_query_that_memory_has_held_up_says_so(limited, block, caplog):
    heard = []
    collector = limited(on_event=heard.append, slow=0)

    def ends():
        return {each.query_id: each for each in heard if each.kind in {"finished", "timed_out"}}

    first, gates = start(collector, "400", block=block)
    late = collector.collect_async(TINY, label="400 11", timeout=3600)
    waiting = collector.collect_async(TINY, label="400 11")
    until(is_held_up(collector, running=1))
    pretend_held_up(late)
    held_up = r"waited 6,\d+ s behind .+, was held up by max_memory for 5,\d+ s of that"
    assert re.fullmatch(held_up, late.summary)
    inside.let_time_be_up(late)
    pretend_held_up(waiting)  # the next one
    with pytest.raises(pa.QueryTimeoutError) as caught:
        late.result()
    assert re.search(
        r"it waited 6\d{3}\.\d+ s for a slot behind 1 running query, "
        r"5\d{3}\.\d+ s of which max_memory held it up, and never ran$",
        str(caught.value),
    )
    gates[0].gate.set()
    for handle in (*first, waiting):
        handle.result()
    until(lambda: len(ends()) == 3)  # the results are there before the events
    assert re.fullmatch(rf"{held_up}, timed out", ends()[late.id].summary)
    assert re.match(rf"{held_up}, ran ", ends()[waiting.id].summary)
    assert 5000 < ends()[waiting.id].memory_seconds < ends()[waiting.id].queue_seconds
    assert ends()[first[0].id].memory_seconds == 0

    def slow():
        return [each.getMessage() for each in caplog.records if each.name == "polars_async.slow"]

    until(lambda: sum("held up by max_memory" in each for each in slow()) == 2)


def test_time_out_of_a_query_that_ran_says_that_memory_has_held_it_up(limited, block):
    collector = limited()
    (handle,), _ = start(collector, "400", block=block)
    times = handle._query.times
    words = times.described(6.0, 1.0, "", " and ran for {ran}")
    assert words == "it waited 6.000 s for a slot and ran for 1.000 s"
    times.held_up_since = times.started - 5
    words = times.described(6.0, 1.0, "", " and ran for {ran}")
    assert words == (
        "it waited 6.000 s for a slot, 5.000 s of which max_memory held it up, and ran for 1.000 s"
    )


def test_what_a_query_takes_is_told_while_it_runs(limited, block):
    collector = limited()
    (handle,), _ = start(collector, "400", block=block)
    limited.held.held += 70 * MB
    until(lambda: handle.peak_memory == 70 * MB)
    assert [each.memory for each in collector.queries()] == [70 * MB]
    assert handle.summary.endswith("took 70.0 MB at its peak")


def test_what_is_taken_at_the_end_counts_however_late_the_watch_is(limited, block, monkeypatch):
    collector = limited()
    (handle,), gates = start(collector, "400", block=block)
    limited.held.held += MB
    until(lambda: handle.peak_memory == MB)
    monkeypatch.setattr(MemoryWatch, "_measure_and_look", lambda _: False)
    limited.held.held += 70 * MB
    gates[0].gate.set()
    handle.result()
    assert handle.peak_memory == 71 * MB


@pytest.mark.usefixtures("small_frames")
def test_callers_of_a_shared_run_are_told_what_it_takes(limited, block):
    collector = limited(single_flight=True)
    query = pl.LazyFrame({"a": [1]})
    busy, gates = start(collector, "900", block=block)
    first, second = (collector.collect_async(query, label="400 11") for _ in range(2))
    until(is_held_up(collector, running=1))
    assert collector.stats()["memory_waits"] == 0
    first._query.run_of_it.peak_memory = 7
    assert (first.peak_memory, second.peak_memory) == (7, 7)
    gates[0].gate.set()
    for handle in (*busy, first, second):
        handle.result()
    stats = collector.stats()
    assert (stats["memory_waits"], stats["completed"]) == (1, 3)


def test_small_queries_go_on_meanwhile(limited, block):
    collector = limited()
    start(collector, "600", "600 0.1", block=block)
    until(is_held_up(collector, running=1))
    assert collector.collect_async(TINY, label="5 0.001").result().item() == 1
    assert inside.waiting(collector) == 1


def test_a_query_that_was_taken_for_small_and_grows_holds_others_up(limited, block):
    collector = limited()
    start(collector, "5 0.001", block=block)
    limited.held.held = 600 * MB
    (handle,), _ = start(collector, "400", block=block)
    until(is_held_up(collector, running=1))
    limited.held.held = 0
    until(lambda: inside.running(collector) == 2)  # as soon as there is memory
    assert not handle.done()


def test_what_a_worker_was_seen_to_take_holds_others_up_though_nothing_else_is_measured(
    limited, block
):
    collector = limited()
    (handle,), _ = start(collector, "5 0.001", block=block)
    handle._query.place = "worker 7"
    handle._query.note_memory(600 * MB)
    start(collector, "400", block=block)
    until(is_held_up(collector, running=1))


def test_a_query_that_was_taken_for_small_and_outgrows_the_memory_alone_is_warned_of(
    limited, block, monkeypatch
):
    monkeypatch.setattr("polars_async._runtime.callers._texts", {})  # those of other tests' queries
    collector = limited()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start(collector, "5 0.001", block=block)
        limited.held.held = LIMIT + 1
        start(collector, "10", block=block)
        until(lambda: caught)
    assert [each.category for each in caught] == [pa.MemoryLimitWarning]
    assert "the query '5 0.001' runs alone" in str(caught[0].message)


def guess(query, _):
    query.estimate = Estimate(1.0, None, memory=LIMIT // 2 + 1, is_mere_guess=True)


def test_what_is_unknown_holds_others_up_until_it_is_seen_to_take_little(
    limited, block, monkeypatch
):
    collector = limited()
    monkeypatch.setattr(Query, "set_estimate", guess)
    monkeypatch.setattr(memory_use, "_MOMENT", inf)
    start(collector, "1", "2", block=block)
    until(is_held_up(collector, running=1))
    monkeypatch.setattr(memory_use, "_MOMENT", 0.1)
    until(lambda: inside.running(collector) == 2)
    start(collector, *map(str, range(9)), block=block)
    # Each counts for an eighth by and by, and the next one for half.
    until(is_held_up(collector, running=4))
    watch = collector._cpu._memory_watch
    count = watch._count
    until(lambda: watch._count > count + 30)
    assert inside.running(collector) == 4


def test_what_is_unknown_and_seen_to_take_much_holds_others_up(limited, block, monkeypatch):
    collector = limited()
    monkeypatch.setattr(Query, "set_estimate", guess)
    monkeypatch.setattr(memory_use, "_MOMENT", inf)
    (handle, _), gates = start(collector, "1", "2", block=block)
    limited.held.held += 100 * MB  # and maybe four times as much in the end
    until(lambda: handle.peak_memory == 100 * MB)
    monkeypatch.setattr(memory_use, "_MOMENT", 0.0)
    watch = collector._cpu._memory_watch
    count = watch._count
    until(lambda: watch._count > count + 10)
    assert is_held_up(collector, running=1)()
    limited.held.held -= 100 * MB  # that was its peak all the same
    until(lambda: watch._count > count + 20)
    assert is_held_up(collector, running=1)()
    gates[0].gate.set()
    until(lambda: not inside.waiting(collector))


def test_a_query_that_waits_for_one_outside_that_waits_for_memory_ends(limited, monkeypatch):
    collector = limited()
    monkeypatch.setattr(Query, "set_estimate", guess)
    outside = []
    has_begun = threading.Event()

    def wait(_):
        has_begun.set()
        until(lambda: outside)
        return outside[0].result(60)

    waits = collector.collect_async(TINY.map_batches(wait), label="1")
    assert has_begun.wait(60)
    outside.append(collector.collect_async(TINY, label="2"))
    assert waits.result().item() == 1


def test_a_query_that_needs_more_than_there_is_runs_alone(limited, block):
    collector = limited()
    _, gates = start(collector, "10", "9000 0.1", block=block)
    until(is_held_up(collector, running=1))
    gates[0].gate.set()
    until(lambda: not inside.waiting(collector) and inside.running(collector) == 1)


def test_memory_that_the_program_frees_lets_a_query_start(limited, block):
    collector = limited()
    limited.held.held = 500 * MB
    start(collector, "10", "300 0.1", block=block)
    until(is_held_up(collector, running=1))
    limited.held.held = 100 * MB
    until(lambda: inside.running(collector) == 2)


def test_memory_beside_that_of_polars_is_measured_while_queries_wait(limited, block, monkeypatch):
    beside = [500 * MB]
    monkeypatch.setattr("polars_async.scheduling.memory_watch.own_memory", lambda: beside[0])
    collector = limited()
    start(collector, "10", "300 0.1", block=block)
    until(is_held_up(collector, running=1))
    beside[0] = 100 * MB
    until(lambda: inside.running(collector) == 2)


def test_query_behind_one_that_was_cancelled_has_its_turn_at_once(limited, block):
    collector = limited()
    blocked = block()
    collector.collect_async(blocked.lf, priority=10, label="400")  # counts as small, by its time
    until(lambda: inside.running(collector) == 1)
    handles, _ = start(collector, "600 0.1", block=block)
    until(is_held_up(collector, running=1))
    collector.collect_async(block().lf, label="200 2")
    until(lambda: not collector._cpu.admission._queue._unestimated)
    assert inside.running(collector) == 1
    handles[0].cancel()
    until(lambda: inside.running(collector) == 2)


def test_where_no_thread_can_start_to_measure_queries_run_all_the_same(limited, monkeypatch):
    def no_thread(*_):
        raise RuntimeError("can't start new thread")

    collector = limited()
    with monkeypatch.context() as patch:
        patch.setattr("polars_async.scheduling.memory_watch.start_timer", no_thread)
        assert collector.collect_async(TINY, label="400").result(timeout=30).item() == 1
    assert not collector._cpu._memory_watch._runs


def test_a_measurement_that_fails_is_not_the_last_one(limited, block, monkeypatch, caplog):
    collector = limited()
    limited.held.held = 500 * MB
    start(collector, "10", "300 0.1", block=block)
    until(is_held_up(collector, running=1))
    with monkeypatch.context() as patch:
        patch.setattr(type(collector._cpu.admission), "sample_memory", fail)
        until(lambda: "what was to be done at a time-out has failed" in caplog.text)
    limited.held.held = 100 * MB
    until(lambda: inside.running(collector) == 2)


def fail(_):
    raise MemoryError


def test_no_thread_looks_for_queries_while_there_is_no_memory(limited, block, monkeypatch):
    collector = limited()
    start(collector, "600", "600 0.1", block=block)
    until(is_held_up(collector, running=1))
    until(lambda: inside.threads_in_use(collector) == 1)
    watch, looks = collector._cpu._memory_watch, []
    monkeypatch.setattr(watch, "_look", lambda: looks.append(1), raising=True)
    count = watch._count
    until(lambda: watch._count > count + 3)
    assert not looks


def test_no_priority_lets_a_query_start_without_memory(limited, block):
    collector = limited()
    start(collector, "600", block=block)
    until(lambda: inside.running(collector) == 1)
    blocked = block()
    collector.collect_async(blocked.lf, priority=10, label="600 0.001")
    until(is_held_up(collector, running=1))
    assert inside.waiting(collector) == 1


def test_a_query_of_a_running_one_starts_without_memory(limited):
    collector = limited()
    inner = TINY.map_batches(lambda df: df + 1)

    def submit(_):
        return collector.collect_async(inner, label="9000").result()

    assert collector.collect_async(TINY.map_batches(submit), label="600").result().item() == 2


def test_a_stream_whose_consumer_is_back_needs_no_more_memory(limited, block):
    collector = limited()
    rows = pl.DataFrame({"a": range(10)}).lazy()
    with collector.collect_batches_async(rows, chunk_size=1, label="600") as stream:
        until(lambda: collector.stats()["paused"] == 1)
        (handle,), _ = start(collector, "600", block=block)
        until(lambda: inside.running(collector) == 2)
        assert [batch.item() for batch in stream] == list(range(10))
        assert not handle.done()  # it did not wait for the end of that


def test_full_queue_counts_what_waits_for_memory(limited, block):
    collector = limited(max_waiting=1)
    start(collector, "600", "600 0.1", block=block)
    until(is_held_up(collector, running=1))
    with pytest.raises(pa.QueueFullError, match="as many as max_memory=640,000,000 bytes let run"):
        collector.collect_async(block().lf, label="600 0.1")


def test_query_that_outgrows_the_memory_alone_is_warned_of_once(limited, block):
    collector = limited()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start(collector, "10", block=block)
        until(lambda: inside.running(collector) == 1)
        limited.held.held = LIMIT + 1
        until(lambda: caught)
        (warning,) = caught
        assert warning.category is pa.MemoryLimitWarning
        assert warning.filename == __file__
        assert str(warning.message).startswith(
            "the query '10' runs alone, and this process takes 640,000,001 bytes, more than "
            "max_memory=640,000,000. "
        )
        count = collector._cpu._memory_watch._count
        until(lambda: collector._cpu._memory_watch._count > count + 3)
        assert caught == [warning]
        block.free()
        collector.close()
        again = limited()
        limited.held.held = 0
        start(again, "10", "10", block=block)
        until(lambda: inside.running(again) == 2)
        limited.held.held = LIMIT + 1
        until(lambda: all(slot.peak for slot in again._cpu.admission._slots))
    assert caught == [warning]  # two that run may each be small


# What Polars really takes


def pid_of_worker(_):
    return pl.DataFrame({"a": [os.getpid()]})


def sort(rows=2_000_000):
    frame = pl.select(a=pl.int_range(rows).shuffle(1), b=pl.int_range(rows))
    return frame.lazy().sort("a").select(pl.all().reverse())


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_peak_of_a_query_is_measured_and_learned(executor):
    # It takes so long that many looks fall within it, and reads nothing that must be sent.
    query = pl.LazyFrame({"a": [0]}).select(a=pl.int_range(3_000_000).shuffle(1)).sort("a")
    with pa.Collector(engine="in-memory", executor=executor, max_memory="4 GB") as collector:
        for _ in range(2):
            handle = collector.collect_async(query)
            result = weakref.ref(handle.result())
            taken = handle.peak_memory
            assert 4 * MB < taken < 2000 * MB
            del handle
            until(lambda result=result: result() is None)  # else it would be freed in the next run
        until(lambda: collector._cpu.admission.memory._learned)
        expected = collector._cpu._costs.of([query], "in-memory").memory
    assert taken / 4 < expected < 8 * taken


def test_what_a_result_has_in_common_with_other_frames_does_not_count():
    rows = pl.select(pl.int_range(30_000_000))
    with pa.Collector(engine="in-memory", max_memory="4 GB") as collector:
        collector._cpu.admission.limits.processors = (
            1e-6  # that fill nothing, however long it takes
        )
        results = [
            collector.collect_async(rows.lazy().head(rows.height - n)).result() for n in range(1, 4)
        ]
        kept = sum(size for _, size in collector._cpu.admission.memory._kept.values())
    assert kept < sum(result.estimated_size() for result in results) / 2


def test_of_a_query_that_was_not_measured_its_result_tells_what_it_took(limited, monkeypatch):
    learned = []
    collector = limited()
    monkeypatch.setattr(
        collector._cpu._costs, "observe", lambda *_, memory, **__: learned.append(memory)
    )
    collector._cpu.admission.limits.processors = 1e6  # so that the time bounds nothing
    collector.collect_async(TINY.select(pl.int_range(1_000_000)), label="1 0.001").result()
    until(lambda: learned)
    assert learned == [8 * MB]


def test_need_of_queries_too_quick_to_be_measured_does_not_rise(limited, monkeypatch, memory):
    taken = []
    need = memory.learn(7, 5 * MB, completed=True)
    collector = limited()
    monkeypatch.setattr(
        collector._cpu._costs, "observe", lambda *_, memory, **__: taken.append(memory)
    )
    collector._cpu.admission.limits.processors = 1e6  # so that the time bounds nothing
    monkeypatch.setattr(Query, "set_estimate", estimate_of(need))
    collector.collect_async(TINY).result()
    until(lambda: taken)
    assert memory.learn(7, *taken, completed=True) <= need


def estimate_of(need):
    def set_estimate(query, _):
        query.estimate = Estimate(0.001, 7, memory=need)

    return set_estimate


def test_quick_queries_start_without_a_look_and_count_as_all_memory(limited, block):
    collector = limited()
    collector._cpu.admission._queue._quick_streak = 64
    first, second = (collector.collect_async(block().lf, label="400") for _ in range(2))
    until(is_held_up(collector, running=1))
    (slot,) = (slot for slot in collector._cpu.admission._slots if slot.query is not None)
    assert slot.query is first._query
    assert slot.query.estimate is None
    assert slot.load.memory == LIMIT
    assert second._query.estimate is not None
    block.free()
    second.result()


def test_next_of_quick_queries_counts_as_all_memory_as_well(limited, block, monkeypatch):
    monkeypatch.setattr(fair_queue, "_GIL_WAIT", inf)  # the first may take long
    collector = limited(max_running=1)
    collector._cpu.admission._queue._quick_streak = 64
    first, second = block(), block()
    collector.collect_async(first.lf, label="400")
    handle = collector.collect_async(second.lf, label="400")
    assert inside.waiting(collector) == 1
    first.gate.set()
    assert second.started.wait()
    (slot,) = collector._cpu.admission._slots
    assert slot.query is handle._query
    assert slot.load.memory == LIMIT
    assert handle._query.estimate is None
    assert not collector._cpu.admission._may_start_unestimated()
    assert collector._cpu.admission._queue._small_memory == LIMIT // 64


def test_forked_child_measures_anew(limited):
    lane = limited()._cpu
    lane._memory_watch._runs = True  # on a thread of the parent
    lane.reset_after_fork(RuntimeError())
    assert not lane._memory_watch._runs


def test_queries_run_one_by_one_until_one_of_them_is_known(monkeypatch):
    query, ran, run = sort(), [], Query.run

    def run_while_others_wait(each, *arguments):
        ran.append(each)
        if each is ran[0]:
            until(lambda: inside.lacks_memory(collector))
        run(each, *arguments)

    monkeypatch.setattr(Query, "run", run_while_others_wait)
    with pa.Collector(engine="in-memory", max_memory="4 GB", max_running=8) as collector:
        handles = [collector.collect_async(query.head(2_000_000 - n)) for n in range(8)]
        for handle in handles:
            handle.result()
        stats = collector.stats()
    assert stats["memory_waits"] > 0
    assert stats["completed"] == 8


def test_worker_that_outgrows_the_memory_is_stopped_and_says_what_it_took():
    large = pl.LazyFrame({"a": [0]}).select(pl.int_range(100_000_000).shuffle().sort().last())
    with pa.Collector(executor="processes", max_memory="300 MB") as collector:
        with pytest.raises(pa.QueryMemoryError) as caught:
            collector.collect_async(large).result()
        assert collector.collect_async(TINY).result().item() == 1
    assert caught.value.peak_memory > caught.value.max_memory == 300 * MB


def test_worker_is_kept_that_takes_no_more_than_at_its_start():
    number = TINY.map_batches(pid_of_worker)
    with pa.Collector(executor="processes", max_memory="100 MB", max_running=1) as collector:
        pids = {collector.collect_async(number).result().item() for _ in range(3)}
    assert len(pids - {os.getpid()}) == 1


# Spilling


def test_smallest_limit_of_this_process_is_the_budget_of_its_streaming_queries(budget):
    pa.Collector(max_memory=1000 << 20).close()
    assert budget() == "800"
    pa.Collector(max_memory=2000 << 20).close()
    assert budget() == "800"
    pa.Collector(max_memory=500 << 20, executor="auto").close()
    assert budget() == "400"
    pa.Collector(max_memory=100 << 20, executor="processes").close()
    assert budget() == "400"


def test_budget_that_a_process_inherits_of_this_library_is_not_one_of_the_program(
    budget, monkeypatch
):
    pa.Collector(max_memory=500 << 20).close()
    monkeypatch.setattr(spilling, "_ours", None)  # as in another process
    pa.Collector(max_memory=1000 << 20).close()
    assert budget() == "800"


@pytest.mark.parametrize("variable", [spilling.BUDGET, "POLARS_OOC_MEMORY_BUDGET_FRACTION"])
def test_budget_of_the_program_is_left_alone(budget, monkeypatch, variable):
    monkeypatch.setenv(variable, "0.5")
    pa.Collector(max_memory=1000 << 20).close()
    assert budget() == ("0.5" if variable == spilling.BUDGET else None)
    with pa.Collector(max_memory=1000 << 20, executor="processes") as collector:
        assert spilling.BUDGET not in collector._cpu.executor._env


def test_workers_spill_from_half_of_the_limit():
    with pa.Collector(max_memory=1000 << 20, executor="processes") as collector:
        assert collector._cpu.executor._env[spilling.BUDGET] == "500"


SPILLS = """
import os
import sys
import re
import warnings
import polars as pl
import polars_async as pa

if __name__ == "__main__":
    folder, limit = sys.argv[1], int(sys.argv[2])
    pl.LazyFrame({"a": [2, 1]}).sort("a").collect(engine="streaming")  # it has read its variables
    os.environ["POLARS_OOC_SPILL_DIR"] = folder + "/spilled"
    warnings.simplefilter("ignore")  # the limit is so low that the process itself is beyond it
    with pa.Collector(engine="streaming", max_memory=limit) as collector:
        sort = pl.scan_parquet(folder + "/a.parquet").sort("a")
        collector.sink_async(sort.sink_parquet(folder + "/b.parquet", lazy=True)).result()
    print(os.path.exists(folder + "/spilled"))
"""


def test_streaming_queries_on_threads_spill_by_the_limit(run_script, tmp_path):
    frame = pl.select(a=pl.int_range(3_000_000).shuffle(1), b=pl.int_range(3_000_000))
    frame.write_parquet(tmp_path / "a.parquet", row_group_size=100_000)
    assert run_script(SPILLS, str(tmp_path), str(20 << 20)) == ["True"]
    assert pl.read_parquet(tmp_path / "b.parquet")["a"].is_sorted()


# What max_memory= takes


def test_share_of_the_memory(monkeypatch):
    monkeypatch.setattr(machine, "total_memory", lambda: 1000)
    monkeypatch.setattr(machine, "memory_limit", lambda: None)
    assert checked_memory("max_memory", "75%") == 750
    assert checked_memory("max_memory", " 12.5 % ") == 125
    monkeypatch.setattr(machine, "memory_limit", lambda: 500)
    assert checked_memory("max_memory", "100%") == 500
    assert checked_memory("max_memory", "4GB") == 4 * 10**9


@pytest.mark.parametrize("share", ["0%", "101%"])
def test_share_is_above_0_and_at_most_100(share):
    with pytest.raises(ValueError, match=f"a share from above 0% to 100%, got '{share}'"):
        pa.Collector(max_memory=share)


def test_share_of_an_unknown_memory_says_what_to_give(monkeypatch):
    monkeypatch.setattr("polars_async.options.usable_memory", lambda: None)
    with pytest.raises(ValueError, match=r"max_memory='75%' needs the size of the memory, which"):
        pa.Collector(max_memory="75%")


def test_limit_elsewhere_is_not_ours():
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  # of this test alone

    with (
        ThreadPoolExecutor() as executor,
        pytest.raises(ValueError, match="runs them elsewhere: limit its memory there"),
    ):
        pa.Collector(max_memory="4GB", executor=executor)
