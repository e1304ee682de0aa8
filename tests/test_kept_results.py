"""Results that are kept for equal queries to come: ``cache=`` of a collector."""

from __future__ import annotations

import gc
import json
import re
import weakref
from threading import Event, Thread

import polars as pl
import pytest
from places import Blocked, until

from polars_async import Cache, Collector, CollectorClosedError, EventKind
from polars_async._runtime import file_states
from polars_async.scheduling import equality, kept
from polars_async.scheduling.kept import Results

SIZE = 10_000
"""Bytes of the results here, at least."""


def lf(number=1):
    return pl.LazyFrame({"a": [1, 2, 3]}).select(pl.col("a") * number)


@pytest.fixture(autouse=True)
def _as_a_rule(monkeypatch):
    """Files are old, and frames in memory small, whatever other tests have left there."""
    monkeypatch.setattr(equality, "MUCH_HELD", 1 << 60)
    monkeypatch.setattr(file_states, "_SETTLED", -(10**10))
    monkeypatch.setattr(file_states, "_SETTLED_IF_COARSE", 0)


@pytest.fixture
def made():
    collectors = []

    def make(seconds=1000, max_bytes="1 GB", **options):
        cache = Cache(seconds=seconds, max_bytes=max_bytes)
        collectors.append(Collector(engine="in-memory", cache=cache, inline=0, **options))
        return collectors[-1]

    yield make
    for each in collectors:
        each.close()


def answers(collector, frame, **options):
    """Return the result of a query, and whether it was kept from before."""
    handle = collector.collect_async(frame, **options)
    result = handle.result()
    until(lambda: not collector.stats()["running"])
    return result["a"].to_list(), "from the cache" in repr(handle)


def held(collector):
    """Return how many results are kept, and their size; a timer changes one after the other."""
    stats = collector.stats()
    return stats["cached"], stats["cached_bytes"]


def test_results_are_kept_where_no_thread_can_start_to_drop_them(made, monkeypatch):
    def start(*_):
        raise RuntimeError("can't start new thread")

    collector = made()
    with monkeypatch.context() as patched:
        patched.setattr(kept, "start_timer", start)
        assert collector.collect_async(lf()).result(30)["a"].to_list() == [1, 2, 3]
    assert answers(collector, lf()) == ([1, 2, 3], True)
    timers = []
    monkeypatch.setattr(kept, "start_timer", lambda *timer: timers.append(timer))
    assert answers(collector, lf(2)) == ([2, 4, 6], False)
    assert len(timers) == 1


def test_result_of_a_run_from_before_all_were_dropped_is_not_kept(made):
    collector, blocked = made(max_running=1), Blocked()
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    before = collector.collect_async(lf())
    collector.clear_cache()
    blocked.gate.set()
    assert before.result(30)["a"].to_list() == [1, 2, 3]
    assert answers(collector, lf()) == ([1, 2, 3], False)
    assert answers(collector, lf()) == ([1, 2, 3], True)


@pytest.mark.parametrize(
    "drop", [Collector.clear_cache, lambda each: each.close(wait=False)], ids=["clear", "close"]
)
def test_result_that_is_about_to_be_kept_is_dropped_with_all(made, monkeypatch, drop):
    collector = made()
    put = Results.put

    def put_late(*about):
        drop(collector)
        put(*about)

    monkeypatch.setattr(Results, "put", put_late)
    assert collector.collect_async(lf()).result(30)["a"].to_list() == [1, 2, 3]
    assert held(collector) == (0, 0)


def test_equal_query_has_the_result_of_an_earlier_one(made):
    events = []
    collector = made(on_event=events.append)
    assert answers(collector, lf()) == ([1, 2, 3], False)
    handle = collector.collect_async(lf())
    assert handle.done()
    assert handle.result()["a"].to_list() == [1, 2, 3]
    assert answers(collector, lf(2)) == ([2, 4, 6], False)
    stats = collector.stats()
    assert (stats["from_cache"], stats["cached"], stats["completed"]) == (1, 2, 3)
    assert stats["submitted"] == 3
    assert 0 < stats["cached_bytes"] < SIZE
    json.dumps(stats)
    told = [event for event in events if event.query_id == handle._query.id]
    assert [event.kind for event in told] == ["queued", "finished"]
    first = events[0].query_id
    assert (told[-1].from_cache, told[-1].shared_with, told[-1].rows) == (True, first, 3)
    assert f"from the cache, by query {first}" in str(told[-1])


def test_result_that_was_kept_is_told_in_plain_words(made):
    collector = made(max_running=1)
    first = collector.collect_async(lf())
    first.result()
    until(lambda: collector.stats()["cached"] == 1)
    second = collector.collect_async(lf(), label="again")
    told = rf"waited \S+ m?s, from the cache, by query {first.id}"
    assert re.fullmatch(told, second.summary)
    assert repr(second) == (
        f"<QueryHandle: query {second.id} 'again', completed, in-memory engine, "
        f"from the cache, by query {first.id}>"
    )
    progress = second.progress()
    assert (progress.state, progress.fraction, progress.seconds) == ("completed", 1.0, 0.0)
    assert [each.fraction for each in second.watch()] == [1.0]
    assert second.peak_memory is None
    assert collector.queries() == []


def test_nothing_is_kept_unless_that_is_asked_for():
    with Collector(engine="in-memory", single_flight=True, inline=0) as collector:
        for _ in range(2):
            assert answers(collector, lf()) == ([1, 2, 3], False)
        assert collector.stats()["cached"] == 0


def test_kept_result_stays_as_it_is_whatever_becomes_of_the_frames(made):
    collector = made()
    for _ in range(3):
        frame = collector.collect_async(lf()).result()
        assert frame["a"].to_list() == [1, 2, 3]
        frame[0, "a"] = 100
        until(lambda: collector.stats()["cached"] == 1)


def test_several_frames_are_kept_together(made):
    collector = made()
    for _ in range(2):
        first, second = collector.collect_all_async([lf(1), lf(2)]).result()
        assert (first["a"].to_list(), second["a"].to_list()) == ([1, 2, 3], [2, 4, 6])
        first[0, "a"] = 100
    assert collector.stats()["from_cache"] == 1


def test_query_that_is_to_run_anew_does(made):
    collector = made()
    assert answers(collector, lf()) == ([1, 2, 3], False)
    assert answers(collector, lf(), single_flight=False) == ([1, 2, 3], False)


def test_changed_file_is_read_again(made, tmp_path):
    collector = made()
    path = tmp_path / "some.parquet"
    pl.DataFrame({"a": [1]}).write_parquet(path)
    assert answers(collector, pl.scan_parquet(path)) == ([1], False)
    assert answers(collector, pl.scan_parquet(path)) == ([1], True)
    pl.DataFrame({"a": [1, 2]}).write_parquet(path)
    assert answers(collector, pl.scan_parquet(path)) == ([1, 2], False)


@pytest.mark.parametrize(
    "frame",
    [
        lf().select(pl.col("a").shuffle(seed=1)),
        lf().map_batches(lambda frame: frame),
        pl.scan_parquet("/not/there"),
        lf().select(a="b"),
    ],
)
def test_what_may_differ_or_fails_is_not_kept(made, frame):
    collector = made()
    handle = collector.collect_async(frame)
    until(handle.done)
    until(lambda: not collector.stats()["running"])
    assert collector.stats()["cached"] == 0


def test_result_of_a_run_that_all_let_go_is_not_kept(made):
    collector = made(max_running=1)
    busy = Blocked()
    collector.collect_async(busy.lf)
    collector.collect_async(lf()).cancel()
    busy.gate.set()
    collector.close()
    assert collector.stats()["cached"] == 0


def test_clear_cache_drops_all(made):
    collector = made()
    answers(collector, lf())
    collector.clear_cache()
    assert held(collector) == (0, 0)
    assert answers(collector, lf()) == ([1, 2, 3], False)


def test_results_are_dropped_when_their_time_is_up_though_no_query_comes(made):
    collector = made(seconds=0.05)
    answers(collector, lf())
    until(lambda: held(collector) == (0, 0))
    assert answers(collector, lf()) == ([1, 2, 3], False)
    until(lambda: collector.stats()["cached"] == 0)


def test_result_whose_time_is_up_is_not_handed_out(monkeypatch):
    now = 100.0
    monkeypatch.setattr(kept, "monotonic", lambda: now)
    results = Results(10.0, 1 << 20)
    results.put("key", lf().collect(), None, 1)
    now = 109.9
    assert results.get("key") is not None
    now = 110.0
    assert results.get("key") is None
    results.clear()


def test_least_recently_used_results_are_dropped_for_others():
    frame = pl.DataFrame({"a": range(SIZE)})
    results = Results(1000.0, int(2.5 * frame.estimated_size()) + 2 * kept._OVERHEAD)
    for key in ("one", "two"):
        results.put(key, frame, None, 1)
    assert results.get("one") is not None
    results.put("three", frame, None, 1)
    assert [results.get(key) is not None for key in ("one", "two", "three")] == [True, False, True]
    results.put("large", pl.DataFrame({"a": range(10 * SIZE)}), None, 1)
    assert results.get("large") is None
    assert len(results) == 2
    results.put("one", frame, None, 1)
    assert results.size == 2 * (frame.estimated_size() + kept._OVERHEAD)
    results.clear()


def test_closed_collector_keeps_and_gives_nothing(made):
    collector = made()
    answers(collector, lf())
    collector.close()
    assert collector.stats()["cached"] == 0
    with pytest.raises(CollectorClosedError):
        collector.collect_async(lf())


def test_all_is_told_of_kept_results_when_close_returns(made):
    told, gate, closed = Event(), Event(), Event()

    def on_event(event):
        if event.from_cache and event.kind is EventKind.FINISHED:
            told.set()
            gate.wait(30)

    collector = made(on_event=on_event)
    assert answers(collector, lf()) == ([1, 2, 3], False)
    asker = Thread(target=lambda: collector.collect_async(lf()).result(30))
    closer = Thread(target=lambda: (collector.close(), closed.set()))
    asker.start()
    assert told.wait(30)
    closer.start()
    early = closed.wait(0.2)  # where close does not wait, this is time enough to see it
    gate.set()
    for each in (asker, closer):
        each.join(30)
    assert not early
    assert closed.is_set()


def test_ctrl_c_in_the_hook_of_a_kept_result_leaves_nothing_to_wait_for(made):
    def on_event(event):
        if event.from_cache and event.kind is EventKind.FINISHED:
            raise KeyboardInterrupt

    collector = made(on_event=on_event)
    assert answers(collector, lf()) == ([1, 2, 3], False)
    with pytest.raises(KeyboardInterrupt):
        collector.collect_async(lf())
    closer = Thread(target=collector.close, daemon=True)
    closer.start()
    closer.join(30)
    assert not closer.is_alive()


def test_timer_does_not_keep_the_results_of_a_dropped_collector():
    results = Results(1000.0, 1 << 20)
    results.put("key", lf().collect(), None, 1)
    alive = weakref.ref(results)
    del results
    gc.collect()
    assert alive() is None


def test_results_are_put_and_got_by_many_threads():
    results = Results(1000.0, 20 * (kept._OVERHEAD + 100))
    frame = lf().collect()

    def use(seed):
        for number in range(200):
            results.put((seed * number) % 30, frame, None, 1)
            results.get(number % 30)

    threads = [Thread(target=use, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.size == sum(each.size for each in results._kept.values()) <= results._most_bytes
    results.clear()


@pytest.mark.parametrize("cache", [60, "1 GB", (60, "1 GB")])
def test_cache_of_another_kind_is_refused(cache):
    with pytest.raises(TypeError, match=r"cache must be a Cache, such as Cache\(seconds=60"):
        Collector(cache=cache)


@pytest.mark.parametrize(
    ("seconds", "size", "match"), [(0, 1, "seconds must be more"), (1, "x", "max_bytes must be")]
)
def test_cache_out_of_range_is_refused(seconds, size, match):
    with pytest.raises(ValueError, match=match):
        Cache(seconds=seconds, max_bytes=size)


def test_cache_shows_its_limits():
    assert repr(Cache(seconds=60, max_bytes="1 kB")) == "Cache(seconds=60, max_bytes=1000)"
