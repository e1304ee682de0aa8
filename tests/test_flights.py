"""Queries that are equal to one that waits or runs, and share its run."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import re
import threading
import time
import weakref
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import fields

import gevent
import inside
import polars as pl
import pytest
from places import LIMIT, TINY, Blocked, until
from test_fork import exit_code_of

import polars_async
from benchmarks.pdsh.queries import QUERIES
from benchmarks.pdsh.tables import Tables
from polars_async import Collector, ForkedProcessError, QueryTimeoutError
from polars_async._runtime import file_states
from polars_async._runtime.plans import is_same_each_time, packed
from polars_async._runtime.upstream import paths_of
from polars_async.scheduling import equality, flights
from polars_async.scheduling.adaptive import Chooser
from polars_async.scheduling.query import Query
from polars_async.testing import simulate_gpu

OUTCOMES = ("completed", "failed", "cancelled", "timed_out", "rejected")


def lf(number=1):
    """Make a query anew; for equal numbers they are equal."""
    return pl.LazyFrame({"a": [1, 2, 3]}).select(pl.col("a") * number)


def adds_up(collector):
    stats = collector.stats()
    on_the_way = stats["waiting"] + stats["running"] - stats["abandoned"]
    return stats["submitted"] == sum(stats[key] for key in OUTCOMES) + on_the_way


class Runs(list):
    """The runs of the in-memory engine, each of which waits for the gate."""

    def __init__(self):
        self.gate = threading.Event()


@pytest.fixture
def runs(monkeypatch):
    runs = Runs()
    collect = pl.InMemoryEngine.collect

    def collect_later(engine, frame, **options):
        runs.append(frame)
        assert runs.gate.wait(LIMIT)
        return collect(engine, frame, **options)

    monkeypatch.setattr(pl.InMemoryEngine, "collect", collect_later)
    yield runs
    runs.gate.set()


@pytest.fixture
def shared(runs):
    """A collector with one slot whose equal queries share a run."""
    with Collector(engine="in-memory", max_running=1, inline=0, single_flight=True) as collector:
        yield collector
        runs.gate.set()
    assert adds_up(collector)
    assert not collector._flights._in_air
    assert not collector._flights._by_key


@pytest.fixture
def parquet(tmp_path):
    return written(tmp_path / "some.parquet")


def written(path, frame=None):
    """Write a file, as if it had been long ago."""
    frame = pl.DataFrame({"a": [1, 2, 3]}) if frame is None else frame
    frame.write_parquet(path)
    return path


@pytest.fixture(autouse=True)
def _as_a_rule(monkeypatch):
    """Files are old, and frames in memory small, whatever other tests have left there."""
    monkeypatch.setattr(equality, "MUCH_HELD", 1 << 60)
    monkeypatch.setattr(file_states, "_SETTLED", -(10**10))
    monkeypatch.setattr(file_states, "_SETTLED_IF_COARSE", 0)


def begun(runs, number=1):
    until(lambda: len(runs) >= number)


# What is shared


def test_equal_queries_run_once_and_each_caller_has_a_frame_of_its_own(shared, runs):
    handles = [shared.collect_async(lf()) for _ in range(3)]
    runs.gate.set()
    first, *others = (handle.result() for handle in handles)
    assert len(runs) == 1
    first[0, "a"] = 100
    others[0].insert_column(0, pl.Series("b", [4, 5, 6]))
    assert handles[2].result().to_dict(as_series=False) == {"a": [1, 2, 3]}
    assert handles[0].result() is first


def test_equal_queries_run_by_themselves_unless_that_is_asked_for(runs):
    runs.gate.set()
    with Collector(engine="in-memory", inline=0) as collector:
        for handle in [collector.collect_async(lf()) for _ in range(2)]:
            handle.result()
        assert len(runs) == 2
        runs.gate.clear()
        handles = [collector.collect_async(lf(), single_flight=True) for _ in range(2)]
        begun(runs, 3)
        runs.gate.set()
        assert [handle.result().height for handle in handles] == [3, 3]
    assert len(runs) == 3


def test_query_that_is_to_run_anew_does(shared, runs):
    handles = [shared.collect_async(lf()), shared.collect_async(lf(), single_flight=False)]
    runs.gate.set()
    assert [handle.result().height for handle in handles] == [3, 3]
    assert len(runs) == 2


def test_every_way_to_collect_one_frame_shares_the_run(shared, runs):
    handles = [shared.collect_async(lf()), shared.collect_background(lf())]
    completions = shared.as_completed([lf(), lf()])
    runs.gate.set()
    assert handles[0].result().equals(handles[1].fetch_blocking())
    assert len(list(completions)) == 2
    assert len(runs) == 1


def test_frames_collected_together_share_the_run(shared, runs):
    runs.gate.set()
    busy = Blocked()
    shared.collect_async(busy.lf)
    handles = [shared.collect_all_async([lf(1), lf(2)]) for _ in range(2)]
    other = shared.collect_all_async([lf(2), lf(1)])
    assert shared.stats()["sharing"] == 1
    busy.gate.set()
    first, second = (handle.result() for handle in handles)
    assert [frame["a"].to_list() for frame in second] == [[1, 2, 3], [2, 4, 6]]
    assert not {id(frame) for frame in first} & {id(frame) for frame in second}
    assert other.result()[0]["a"].to_list() == [2, 4, 6]


@pytest.mark.parametrize(
    "make",
    [
        lambda: TINY.map_batches(lambda frame: frame),
        lambda: TINY.select(pl.col("a").map_elements(lambda a: a, return_dtype=pl.Int64)),
        lambda: TINY.select(pl.col("a").shuffle()),
        lambda: TINY.select(pl.col("a").shuffle(seed=1)),
        lambda: TINY.select(pl.col("a").sample(1)),
        lambda: TINY.select(pl.col("a").rank("random")),
        lambda: TINY.select(pl.concat_list("a").list.sample(1)),
    ],
)
def test_what_may_differ_each_time_runs_each_time(shared, runs, make):
    frame = make()
    handles = [shared.collect_async(frame) for _ in range(2)]
    runs.gate.set()
    for handle in handles:
        handle.result()
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("frame", "options"),
    [
        (lf(2), {}),
        (pl.LazyFrame({"a": [1, 2, 4]}).select(pl.col("a") * 1), {}),
        (lf(), {"engine": "streaming"}),
        (lf(), {"engine": "adaptive"}),
        (lf(), {"optimizations": pl.QueryOptFlags(predicate_pushdown=False)}),
    ],
)
def test_query_that_is_not_equal_runs_by_itself(shared, runs, frame, options):
    handles = [shared.collect_async(lf()), shared.collect_async(frame, **options)]
    assert shared.stats()["sharing"] == 0
    runs.gate.set()
    for handle in handles:
        handle.result()


def test_equal_settings_of_an_engine_and_of_optimisations_are_equal(shared, runs):
    shared.collect_async(lf())
    shared.collect_async(lf(), engine=pl.InMemoryEngine(), optimizations=pl.QueryOptFlags())
    assert shared.stats()["sharing"] == 1
    runs.gate.set()


# Files


def test_files_are_equal_until_one_changes(shared, runs, parquet):
    frame = pl.scan_parquet(parquet)
    before = [shared.collect_async(pl.scan_parquet(parquet)) for _ in range(2)]
    begun(runs)
    written(parquet, pl.DataFrame({"a": [1, 2, 3, 4]}))
    after = [shared.collect_async(frame) for _ in range(2)]
    assert shared.stats()["shared"] == 2
    runs.gate.set()
    assert len({id(handle.result()) for handle in (*before, *after)}) == 4
    assert len(runs) == 2
    assert [handle.result().height for handle in after] == [4, 4]


@pytest.mark.parametrize("name", ["", "*.parquet", "**/*.parquet", "some.parque[t]"])
def test_new_file_of_a_folder_or_a_pattern_makes_a_query_another(shared, runs, parquet, name):
    path = os.path.join(parquet.parent, name)  # noqa: PTH118  # a pattern
    shared.collect_async(pl.scan_parquet(path))
    shared.collect_async(pl.scan_parquet(path))
    assert shared.stats()["sharing"] == 1
    written(parquet.with_name("other.parquet"))
    shared.collect_async(pl.scan_parquet(path))
    assert shared.stats()["sharing"] == 1
    runs.gate.set()


@pytest.mark.parametrize("change", ["size", "inode", "time"])
def test_state_of_a_file_tells_of_each_change(parquet, change):
    before = file_states.states_of([str(parquet)])
    if change == "size":
        parquet.write_bytes(b"other")
    elif change == "inode":
        content, status = parquet.read_bytes(), parquet.stat()
        other = parquet.with_name("other")
        other.write_bytes(content)
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.rename(parquet)
    else:
        os.utime(parquet, ns=(1, 1))
    assert before is not None
    assert file_states.states_of([str(parquet)]) not in (None, before)


def test_file_that_has_just_changed_may_change_again_unseen(monkeypatch, parquet):
    monkeypatch.setattr(file_states, "_SETTLED", 10**12)
    assert file_states.states_of([str(parquet)]) is None


def test_file_with_a_time_in_whole_seconds_may_change_unseen_for_longer(monkeypatch, parquet):
    monkeypatch.setattr(file_states, "_SETTLED_IF_COARSE", 10**12)
    assert file_states.states_of([str(parquet)]) is not None
    os.utime(parquet, ns=(0, 10**9))
    assert file_states.states_of([str(parquet)]) is None


@pytest.mark.parametrize("path", ["s3://bucket/a", "/not/there", "/not/there/*", "/dev/null"])
def test_state_of_what_is_no_file_here_is_not_known(path):
    assert file_states.states_of([path]) is None


def test_more_files_than_are_looked_at_have_no_known_state(monkeypatch, parquet):
    monkeypatch.setattr(file_states, "_MOST_ENTRIES", 1)
    assert file_states.states_of([str(parquet)]) is not None
    assert file_states.states_of([str(parquet.parent)]) is None


def test_run_over_files_of_unknown_state_is_shared_until_it_starts(
    shared, runs, parquet, monkeypatch
):
    monkeypatch.setattr(equality, "states_of", lambda _: None)
    first = shared.collect_async(pl.scan_parquet(parquet))
    begun(runs)
    later = [shared.collect_async(pl.scan_parquet(parquet)) for _ in range(3)]
    assert shared.stats()["sharing"] == 2
    runs.gate.set()
    assert [handle.result().height for handle in (first, *later)] == [3] * 4
    assert len(runs) == 2


# Frames in memory


def test_large_frame_is_never_copied_to_compare_it(shared, runs, monkeypatch):
    monkeypatch.setattr(equality, "MUCH_HELD", 0)
    monkeypatch.setattr(equality, "_LARGEST_FRAMES", 0)
    monkeypatch.setattr(equality, "_MOMENT", LIMIT)
    monkeypatch.setattr(equality, "packed", lambda *_: pytest.fail("it was packed"))
    frame = pl.LazyFrame({"a": [1, 2, 3]}).group_by("a").len()
    handles = [shared.collect_async(frame) for _ in range(2)]
    assert shared.stats()["sharing"] == 1
    same = pl.LazyFrame({"a": [1, 2, 3]}).group_by("a").len()
    other = [shared.collect_async(each) for each in (same, same)]
    runs.gate.set()
    assert {handle.result().height for handle in (*handles, *other)} == {3}
    assert shared.stats()["shared"] <= 2


def test_plans_that_are_too_long_to_be_compared_are_not_equal(shared, runs, monkeypatch):
    monkeypatch.setattr(equality, "_LARGEST_PLAN", 100)
    handles = [shared.collect_async(lf(number)) for number in (1, 2, 2)]
    runs.gate.set()
    assert [handle.result()["a"].to_list()[0] for handle in handles] == [1, 2, 2]
    assert shared.stats()["shared"] == 0


def test_line_of_small_frames_is_packed_where_others_are_large(shared, runs, monkeypatch):
    monkeypatch.setattr(equality, "MUCH_HELD", 0)
    monkeypatch.setattr(equality, "_MOMENT", LIMIT)
    for _ in range(3):
        shared.collect_async(lf())
    assert shared.stats()["sharing"] == 2
    runs.gate.set()


# Each caller for itself


@pytest.mark.parametrize("is_running", [True, False])
def test_first_caller_may_let_go_while_others_wait(shared, runs, is_running):
    busy = None
    if not is_running:
        busy = Blocked()
        shared.collect_async(busy.lf)
    first, second, third = (shared.collect_async(lf()) for _ in range(3))
    if is_running:
        begun(runs)
    assert first.cancel()
    ended = first._query.times.ended
    with pytest.raises(CancelledError):
        first.result()
    assert adds_up(shared)
    assert shared.stats()["cancelled"] == 1
    runs.gate.set()
    if busy is not None:
        busy.gate.set()
    assert second.result().equals(third.result())
    assert first._query.state.name == "CANCELLED"
    until(lambda: not inside.running(shared))
    assert first._query.times.ended == ended < second._query.times.ended
    assert sum(frame is not None for frame in runs) == (1 if is_running else 2)


@pytest.mark.parametrize("is_running", [True, False])
def test_run_that_is_let_go_counts_no_more_at_once(shared, runs, monkeypatch, is_running):
    busy = None
    if not is_running:
        busy = Blocked()
        shared.collect_async(busy.lf)
    handle = shared.collect_async(lf())
    begun(runs)
    seen = []
    after_cancel = Query._after_cancel

    def look(query):
        stats = shared.stats()
        seen.append((stats["sharing"], stats["waiting"], stats["running"] - stats["abandoned"]))
        after_cancel(query)

    monkeypatch.setattr(Query, "_after_cancel", look)
    handle.cancel()
    assert set(seen) == {(0, 0, int(not is_running))}
    runs.gate.set()
    if busy is not None:
        busy.gate.set()


def test_last_caller_that_lets_go_takes_it_out_of_the_queue(shared, runs):
    busy = Blocked()
    first = shared.collect_async(busy.lf)
    handles = [shared.collect_async(lf()) for _ in range(3)]
    for handle in handles:
        handle.cancel()
    assert inside.waiting(shared) == 0
    runs.gate.set()
    busy.gate.set()
    first.result()
    assert len(runs) == 1
    assert shared.stats()["cancelled"] == 3


def test_new_caller_of_what_was_let_go_has_a_run_of_its_own(shared, runs):
    shared.collect_async(lf()).cancel()
    again = shared.collect_async(lf())
    assert shared.stats()["shared"] == 0
    runs.gate.set()
    assert again.result().height == 3


def test_last_caller_that_lets_go_stops_it_in_its_worker():
    # Of many seconds, and of little memory, however late it is stopped.
    column = pl.col("a") + pl.col("b")
    for _ in range(30):
        column = (column * 7919 % 1_000_003).sort()
    heavy = pl.LazyFrame({"a": range(4000)}).join(pl.LazyFrame({"b": range(4000)}), how="cross")
    heavy = heavy.select(column)
    options = {"executor": "processes", "max_running": 1, "single_flight": True}
    with Collector(engine="in-memory", **options) as collector:
        handles = [collector.collect_async(heavy) for _ in range(2)]
        until(lambda: handles[0]._query.flight._stop is not None)
        handles[0].cancel()
        assert collector.stats()["abandoned"] == 0
        handles[1].cancel()
        until(lambda: not collector.stats()["running"])
        assert collector.collect_async(lf()).result(LIMIT).height == 3


def test_each_caller_has_a_time_out_of_its_own(shared, runs):
    handles = [shared.collect_async(lf(), timeout=timeout) for timeout in (LIMIT, 0.01, LIMIT)]
    number = handles[0]._query.id
    with pytest.raises(QueryTimeoutError, match=f"for query {number}, whose run it shared"):
        handles[1].result()
    inside.let_time_be_up(handles[0])
    with pytest.raises(QueryTimeoutError, match="It goes on, since others wait for it, too"):
        handles[0].result()
    runs.gate.set()
    assert handles[2].result().height == 3
    assert shared.stats()["timed_out"] == 2


def test_only_caller_whose_time_is_up_is_told_what_becomes_of_the_run(shared, runs):
    handle = shared.collect_async(lf(), timeout=LIMIT)
    begun(runs)
    inside.let_time_be_up(handle)
    with pytest.raises(QueryTimeoutError, match="keeps its slot until it really ends"):
        handle.result()
    assert shared.stats()["abandoned"] == 1


def test_each_caller_has_the_error_for_itself(shared, runs):
    runs.gate.set()
    busy = Blocked()
    shared.collect_async(busy.lf)
    wrong = TINY.select("b")
    handles = [shared.collect_async(wrong, label=label) for label in ("one", "two")]
    busy.gate.set()
    errors = []
    for handle in handles:
        for _ in range(2):
            with pytest.raises(pl.exceptions.ColumnNotFoundError) as caught:
                handle.result()
            errors.append(caught.value)
    assert errors[0] is errors[1] is not errors[2]
    depth = len(list(caught.traceback))
    with pytest.raises(pl.exceptions.ColumnNotFoundError) as caught:
        handles[1].result()
    assert len(list(caught.traceback)) == depth
    assert str(errors[0]) == str(errors[2])


def test_error_that_cannot_be_copied_is_that_of_all_callers():
    class Own(Exception):  # noqa: N818  # of a library that does as it likes
        def __init__(self, one, two):  # noqa: ARG002  # which no copy is given
            super().__init__(one)

    error = Own(1, 2)
    assert flights._copy_of(error) is error


def test_panic_is_told_to_each_caller(shared, runs):
    runs.gate.set()
    busy = Blocked()
    shared.collect_async(busy.lf)
    handles = [shared.collect_async(pl.select(pl.int_range(0, 2**62), eager=False)) for _ in "ab"]
    assert shared.stats()["sharing"] == 1
    busy.gate.set()
    for handle in handles:
        with pytest.raises(pl.exceptions.PanicException):
            handle.result()


def test_run_whose_priority_is_raised_stays_in_the_queue_in_which_it_is(monkeypatch):
    blocked = Blocked()
    with (
        simulate_gpu(),
        Collector(engine="adaptive", gpu="offload", single_flight=True, inline=0) as collector,
    ):
        on_gpu, choose = collector.resolve_engine("gpu"), Chooser.choose
        monkeypatch.setattr(Chooser, "choose", lambda *_, **__: (choose(*_, **__)[0], on_gpu))
        collector.collect_async(blocked.lf, engine="gpu")
        assert blocked.started.wait()
        first = collector.collect_async(lf(4))
        until(lambda: collector._gpu.admission.waiting)
        urgent = collector.collect_async(lf(4), priority=5)
        until(lambda: not collector._cpu.admission.threads)
        assert collector._gpu.admission.waiting == 1
        assert [each.priority for each in collector._gpu.admission.in_queue()] == [5]
        blocked.gate.set()
        assert urgent.result(LIMIT).equals(first.result(LIMIT))


def test_caller_of_higher_priority_raises_that_of_the_run(shared, runs):
    busy = Blocked()
    first = shared.collect_async(busy.lf)
    handles = [shared.collect_async(lf(number)) for number in (2, 3, 4)]
    urgent = shared.collect_async(lf(4), priority=5)
    assert shared.stats()["shared"] == 1
    runs.gate.set()
    busy.gate.set()
    for handle in (first, *handles, urgent):
        handle.result()
    assert runs[1].serialize() == lf(4).serialize()


def test_waiting_for_the_run_of_another_is_no_place_in_the_queue(runs):
    options = {"max_running": 1, "max_waiting": 1, "single_flight": True, "inline": 0}
    with Collector(engine="in-memory", **options) as collector:
        handles = [collector.collect_async(lf(number)) for number in (1, 2)]
        handles += [collector.collect_async(lf(number)) for number in (1, 2, 2)]
        assert (collector.stats()["waiting"], collector.stats()["sharing"]) == (4, 3)
        assert adds_up(collector)
        with pytest.raises(polars_async.QueueFullError):
            collector.collect_async(lf(3))
        assert collector.stats()["rejected"] == 1
        runs.gate.set()
        assert [handle.result().height for handle in handles] == [3] * 5
    assert len(runs) == 2


def test_task_that_is_cancelled_lets_go_for_itself_alone(shared, runs):
    async def main():
        tasks = [asyncio.ensure_future(shared.collect_async(lf())) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        runs.gate.set()
        return [len(await task) for task in tasks[1:]]

    assert asyncio.run(main()) == [3, 3]
    assert len(runs) == 1


def test_greenlets_share_a_run(shared, runs):
    handles = [shared.collect_async(lf(), gevent=True) for _ in range(3)]
    greenlets = [gevent.spawn(handle.get) for handle in handles]
    gevent.sleep(0)
    greenlets[0].kill()
    runs.gate.set()
    assert [greenlet.get(timeout=LIMIT).height for greenlet in greenlets[1:]] == [3, 3]
    assert shared.stats()["cancelled"] == 1


def test_query_of_a_python_function_does_not_wait_for_one_in_the_queue(shared, runs):
    runs.gate.set()
    asked = Blocked()

    def ask(_):
        asked.started.set()
        assert asked.gate.wait()
        return shared.collect_async(lf()).result(LIMIT).select("a")

    outer = shared.collect_async(TINY.map_batches(ask))
    assert asked.started.wait()
    waits = shared.collect_async(lf())
    asked.gate.set()
    assert outer.result(LIMIT).height == 3
    assert waits.result().height == 3


# What is told


def test_events_tell_whose_run_was_shared(runs):
    events = []
    options = {"engine": "in-memory", "single_flight": True, "inline": 0}
    with Collector(on_event=events.append, **options) as collector:
        handles = [collector.collect_async(lf(), label=label) for label in "abc"]
        begun(runs)
        handles[2].cancel()
        runs.gate.set()
        for handle in handles[:2]:
            handle.result()
    told = {label: [event for event in events if event.label == label] for label in "abc"}
    assert [event.kind for event in told["a"]] == ["queued", "started", "finished"]
    assert [event.kind for event in told["b"]] == ["queued", "finished"]
    assert [event.kind for event in told["c"]] == ["queued", "cancelled"]
    number = told["a"][0].query_id
    end = told["b"][-1]
    assert (end.shared_with, end.from_cache, end.run_seconds, end.rows) == (number, False, None, 3)
    assert f"shared with query {number}" in str(end)
    assert told["a"][-1].shared_with is None
    assert told["a"][-1].run_seconds > 0


def test_first_caller_is_shown_as_the_one_that_runs(shared, runs):
    handles = [shared.collect_async(lf()) for _ in range(2)]
    begun(runs)
    number = handles[0]._query.id
    assert f"query {number}, running, in-memory engine>" in repr(handles[0])
    assert repr(handles[1]).endswith(f"in-memory engine, shared with query {number}>")
    runs.gate.set()


def listed(collector):
    return [(each.id, each.label, each.state, each.shared_with) for each in collector.queries()]


def test_callers_of_a_shared_run_are_listed_and_cancelled_each_by_itself(shared, runs):
    first, second, third = (
        shared.collect_async(lf(), label=label, tags={"tenant": label}) for label in "abc"
    )
    begun(runs)
    one, *others = shared.queries()
    assert (one.id, one.state, one.place, one.tags) == (
        first.id,
        "running",
        "thread",
        {"tenant": "a"},
    )
    assert one.ran > 0
    for info, handle in zip(others, (second, third), strict=True):
        assert (info.id, info.tags) == (handle.id, handle.tags)
        assert (info.state, info.ran, info.place) == ("waiting", None, None)
        assert f", shared with query {first.id}, tenant=" in str(info)
    assert shared.cancel(second.id)
    assert not shared.cancel(second.id)
    assert listed(shared) == [
        (first.id, "a", "running", None),
        (third.id, "c", "waiting", first.id),
    ]
    assert shared.cancel(first.id)
    assert not shared.cancel(first.id)
    assert listed(shared) == [(third.id, "c", "waiting", first.id)]
    assert shared.cancel(third.id)
    assert [handle.done() for handle in (first, second, third)] == [True] * 3
    (left,) = shared.queries()  # the run, which nothing can stop
    assert (left.label, left.state, left.tags) == ("a", "abandoned", {"tenant": "a"})
    assert not shared.cancel(left.id)
    assert shared.stats()["abandoned"] == 1


def test_caller_is_cancelled_by_its_number_after_the_first_has_left(shared, runs):
    first, second, third = (shared.collect_async(lf()) for _ in range(3))
    begun(runs)
    first.cancel()
    assert shared.cancel(second.id)
    runs.gate.set()
    assert third.result(LIMIT).height == 3


def test_result_of_a_run_is_not_kept_by_a_caller_who_has_left(shared, runs):
    first, second = (shared.collect_async(lf()) for _ in range(2))
    begun(runs)
    first.cancel()
    runs.gate.set()
    result = weakref.ref(second.result(LIMIT))
    del second
    until(lambda: gc.collect() is not None and result() is None)
    assert first.done()


def test_summary_of_each_caller_says_in_words_whose_run_it_was(shared, runs):
    busy = shared.collect_async(lf(2))
    begun(runs)
    first, second, third = (shared.collect_async(lf()) for _ in range(3))
    assert re.fullmatch(r"waited \S+ m?s behind 1 running query", first.summary)
    assert re.fullmatch(rf"waited \S+ m?s, shared with query {first.id}", second.summary)
    third.cancel()
    told = rf"waited \S+ m?s, shared with query {first.id}, was cancelled"
    assert re.fullmatch(told, third.summary)
    first._query.times._submitted -= 300  # as if more than a moment had passed
    second._query.run_of_it.peak_memory = 1_200_000_000
    runs.gate.set()
    for handle in (busy, first, second):
        handle.result(LIMIT)
    assert re.fullmatch(
        r"waited 3\d\d s behind 1 running query, ran \S+ m?s on the in-memory engine, "
        r"took 1.2 GB at its peak",
        first.summary,
    )
    told = rf"waited \S+ m?s, shared with query {first.id}, which took 1.2 GB at its peak"
    assert re.fullmatch(told, second.summary)
    assert (first.peak_memory, second.peak_memory) == (1_200_000_000, 1_200_000_000)
    assert busy.peak_memory is None


@pytest.mark.parametrize("place", [None, "worker 4711"])
def test_time_out_of_each_caller_says_what_goes_on(shared, runs, place):
    first, second, _ = (shared.collect_async(lf(), timeout=3600) for _ in range(3))
    begun(runs)
    first._query.run_of_it.place = place
    for handle in (second, first):
        inside.let_time_be_up(handle)
    with pytest.raises(QueryTimeoutError) as caught:
        second.result()
    told = rf"it waited \S+ s for query {first.id}, whose run it shared"
    assert re.fullmatch(rf"the query was not done after 3600 s: {told}", str(caught.value))
    with pytest.raises(QueryTimeoutError) as caught:
        first.result()
    there = "" if place is None else " on the in-memory engine in worker 4711"
    told = rf"and ran for \S+ s{there}. It goes on, since others wait for it, too"
    assert re.search(told, str(caught.value))


def test_each_caller_of_a_slow_run_is_logged(runs, caplog):
    with Collector(engine="in-memory", single_flight=True, inline=0, slow=0) as collector:
        first, second = (collector.collect_async(lf(), label=label) for label in "ab")
        begun(runs)
        runs.gate.set()
        second.result(LIMIT)
    told = [each.getMessage() for each in caplog.records if each.name == "polars_async.slow"]
    assert len(told) == 2
    assert re.fullmatch(rf"query {first.id} 'a' was slow: .*ran .+ engine", told[0])
    assert re.fullmatch(
        rf"query {second.id} 'b' was slow: waited .+, shared with query {first.id}", told[1]
    )


def test_engine_that_ran_at_last_is_told_to_each_caller():
    kinds, busy = [], Blocked()
    options = {"gpu": "offload", "engine": "gpu", "single_flight": True}
    with (
        simulate_gpu(fail={2: "unsupported"}),
        Collector(on_event=lambda event: kinds.append((event.label, event.kind)), **options) as one,
    ):
        first = one.collect_async(busy.lf, single_flight=False)
        assert busy.started.wait()
        handles = [one.collect_async(lf(), label=label) for label in "ab"]
        assert one.stats()["sharing"] == 1
        busy.gate.set()
        for handle in (first, *handles):
            handle.result()
        assert [handle.resolution.fell_back for handle in handles] == [True, True]
        assert adds_up(one)
    told = [kind for label, kind in kinds if label == "a"]
    assert told == ["queued", "started", "fell_back", "started", "finished"]


# The end of a collector, and of its process


def test_close_cancels_all_who_wait_for_a_run(runs):
    collector = Collector(engine="in-memory", max_running=1, inline=0, single_flight=True)
    running = [collector.collect_async(lf(1)) for _ in range(2)]
    waiting = [collector.collect_async(lf(2)) for _ in range(2)]
    begun(runs)
    collector.close(wait=False)
    with pytest.raises(polars_async.CollectorClosedError):
        collector.collect_async(lf(1))
    assert adds_up(collector)
    runs.gate.set()
    assert [handle.result().height for handle in running] == [3, 3]
    for handle in waiting:
        with pytest.raises(CancelledError):
            handle.result()
    collector.close()
    assert adds_up(collector)


def test_close_that_cancels_all_lets_go_of_shared_runs(runs):
    collector = Collector(engine="in-memory", max_running=1, inline=0, single_flight=True)
    handles = [collector.collect_async(lf(1)) for _ in range(2)]
    begun(runs)
    collector.close(wait=False, cancel_running=True)
    for handle in handles:
        with pytest.raises(CancelledError):
            handle.result()
    runs.gate.set()
    collector.close()
    assert adds_up(collector)


def test_close_waits_while_another_one_cancels_those_who_share_a_run(runs, monkeypatch):
    collector = Collector(engine="in-memory", max_running=1, inline=0, single_flight=True)
    running, *waiting = (collector.collect_async(lf(number)) for number in (1, 2, 2))
    begun(runs)
    cancels, goes_on, cancel = threading.Event(), threading.Event(), Query._cancel

    def cancel_late(query, state):
        cancelled = cancel(query, state)
        if threading.current_thread() is other and not cancels.is_set():
            runs.gate.set()  # so that no query runs that would keep the other `close` waiting
            cancels.set()
        return cancelled

    def follow_late(query):
        if threading.current_thread() is other:
            assert goes_on.wait(LIMIT)
        follow(query)

    follow = Query._after_cancel
    monkeypatch.setattr(Query, "_cancel", cancel_late)
    monkeypatch.setattr(Query, "_after_cancel", follow_late)
    other = threading.Thread(target=collector.close)
    closer = threading.Thread(target=lambda: collector.close(cancel_waiting=False))
    other.start()
    assert cancels.wait(LIMIT)
    closer.start()
    closer.join(0.2)  # where close does not wait, this is time enough to see it
    early = not closer.is_alive() and not all(handle.done() for handle in waiting)
    goes_on.set()
    for thread in (other, closer):
        thread.join(LIMIT)
    assert not early
    assert running.done()
    assert [handle.done() for handle in waiting] == [True, True]
    assert adds_up(collector)


def test_fork_fails_all_who_wait_for_a_run(shared, runs):
    handles = [shared.collect_async(lf()) for _ in range(2)]
    begun(runs)

    def child():
        for handle in handles:
            with pytest.raises(ForkedProcessError):
                handle.result(LIMIT)
        return 7 if adds_up(shared) else 8

    assert exit_code_of(child) == 7
    runs.gate.set()


def test_result_is_freed_with_the_handles(shared, runs):
    runs.gate.set()
    handles = [shared.collect_async(lf()) for _ in range(2)]
    queries = [handle._query for handle in handles]
    for handle in handles:
        handle.result()
    assert all(query.flight is None for query in queries)
    gc.disable()
    try:
        before = len([each for each in gc.get_objects() if isinstance(each, flights.Flight)])
        shared.collect_async(lf(5)).result()
        until(lambda: not inside.running(shared))
        after = len([each for each in gc.get_objects() if isinstance(each, flights.Flight)])
    finally:
        gc.enable()
    assert after <= before + 1


def test_callers_who_come_and_go_at_any_moment_get_what_they_asked_for():
    options = {"max_running": 2, "single_flight": True, "inline": 0}
    faults = []

    def ask(collector, seed):
        rng = random.Random(seed)
        for _ in range(150):
            number = rng.randrange(3)
            handle = collector.collect_async(lf(number), priority=rng.choice([0, 0, 3]))
            if rng.random() < 0.4:
                time.sleep(rng.choice([0, 0, 1e-4]))
                handle.cancel()
            with suppress(CancelledError):
                if handle.result(LIMIT)["a"].to_list() != [number, 2 * number, 3 * number]:
                    faults.append(number)

    with Collector(engine="in-memory", **options) as collector:
        threads = [threading.Thread(target=ask, args=(collector, seed)) for seed in range(6)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert adds_up(collector)
        assert collector.stats()["shared"] > 0
    assert not faults
    assert collector.stats()["submitted"] == 6 * 150
    assert adds_up(collector)
    assert not collector._flights._in_air


@pytest.mark.parametrize("wrong", [1, "yes"])
def test_flag_that_is_none_is_refused(wrong):
    with pytest.raises(TypeError, match="single_flight must be True or False"):
        Collector(single_flight=wrong)
    with Collector() as collector, pytest.raises(TypeError, match="single_flight"):
        collector.collect_async(TINY, single_flight=wrong)


def test_queries_of_the_benchmark_are_known_to_be_the_same_each_time(tmp_path):
    path = str(written(tmp_path / "some.parquet"))
    names = [field.name for field in fields(Tables)]
    tables = Tables(**{name: pl.scan_parquet(path) for name in names})
    for number, query in QUERIES.items():
        frame = query(tables)
        paths = paths_of(packed(frame, 1 << 20))
        assert set(paths) == {path}
        assert is_same_each_time(frame, paths), f"Q{number}"
