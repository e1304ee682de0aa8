"""Who is let in, who is refused, and who goes first."""

from __future__ import annotations

import pickle
import re
import threading
from decimal import Decimal
from math import inf, nan
from time import perf_counter, sleep

import inside
import polars as pl
import pytest
from places import TINY, until
from test_nesting import ask_plan, by_result

from polars_async import (
    Collector,
    CollectorClosedError,
    EventKind,
    PolarsAsyncError,
    QueryTimeoutError,
    QueueFullError,
    resolve_engine,
)
from polars_async.events import Reporter
from polars_async.executors.operations import Collect
from polars_async.executors.threads import ThreadPool
from polars_async.scheduling import admission, estimates, lane, query
from polars_async.scheduling.admission import Admission
from polars_async.scheduling.estimates import UNKNOWN, CostModel, Estimate
from polars_async.scheduling.fair_queue import QUICK, QUICK_STREAK
from polars_async.scheduling.sizes import Limits
from polars_async.scheduling.slots import Slot
from polars_async.testing import simulate_gpu

HEAVY = pl.LazyFrame({"a": pl.zeros(5_000_000, dtype=pl.Int64, eager=True)}).select(
    pl.col("a").sum()
)
UNSEEN = TINY.sort("a").map_batches(lambda df: df)
"""A query of which the plan does not tell all; in its shape it differs from those that block."""


@pytest.fixture(autouse=True)
def _looks_are_quick(monkeypatch):
    """Look at every plan, however busy the machine is and whatever other tests have left."""
    monkeypatch.setattr(estimates, "_SLOW_LOOK", inf)
    monkeypatch.setattr(estimates, "_MOST_COPIED", inf)
    monkeypatch.setattr(estimates, "_LEARN_SHARE", -inf)  # of two that end at once, too


class Starts(list):
    """A hook that keeps the labels of queries in the order of their starts."""

    def __call__(self, event):
        if event.kind is EventKind.STARTED and event.label is not None:
            self.append(event.label)


def settle(collector):
    """Wait until no thread looks for a query any more."""
    admission = collector._cpu.admission

    def is_settled():
        with admission.lock:
            return len(admission.in_slots()) == admission.threads

    until(is_settled)


def run_blocked(collector, block, **options):
    blocked = block()
    handle = collector.collect_async(blocked.lf, **options)
    assert blocked.started.wait(30)
    return handle, blocked


def is_full(collector):
    with pytest.raises(QueueFullError):
        collector.collect_async(TINY)
    return True


# max_waiting


def test_call_is_refused_with_the_numbers_and_the_remedy_when_the_queue_is_full(make, block):
    collector = make(max_running=1, max_waiting=2)
    run_blocked(collector, block)
    waiting = [collector.collect_async(TINY) for _ in range(2)]
    message = (
        r"the collector is full: 2 waiting, of at most max_waiting=2, and 1 running, of at most "
        r"max_running=1\. Try again in about 0\.\d s, or make a Collector with a larger max_waiting"
    )
    with pytest.raises(QueueFullError, match=f"^{message}$") as refusal:
        collector.collect_async(TINY)
    assert isinstance(refusal.value, PolarsAsyncError)
    assert not any(handle.done() for handle in waiting)
    assert (collector.stats()["rejected"], collector.stats()["waiting"]) == (1, 2)


WAYS = {
    "collect_async": lambda collector: collector.collect_async(TINY),
    "collect_all_async": lambda collector: collector.collect_all_async([TINY]),
    "collect_background": lambda collector: collector.collect_background(TINY),
    "collect_all_background": lambda collector: collector.collect_all_background([TINY]),
    "collect_schema_async": lambda collector: collector.collect_schema_async(TINY),
    "collect_batches_async": lambda collector: collector.collect_batches_async(TINY),
    "as_completed": lambda collector: collector.as_completed([TINY]),
    "sink_async": lambda collector: collector.sink_async(
        TINY.sink_batches(lambda _: None, lazy=True)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask_is_refused_when_the_queue_is_full(make, block, way):
    collector = make(max_running=1, max_waiting=1)
    run_blocked(collector, block)
    waiting = collector.collect_async(TINY)
    with pytest.raises(QueueFullError):
        WAYS[way](collector)
    assert not waiting.done()
    assert inside.waiting(collector) == 1


def test_as_completed_of_more_than_there_is_room_for_leaves_none_in_the_queue(make, block):
    collector = make(max_running=1, max_waiting=3)
    run_blocked(collector, block)
    with pytest.raises(QueueFullError):
        collector.as_completed([TINY] * 4)
    assert inside.waiting(collector) == 0


@pytest.mark.everywhere
def test_nobody_waits_where_max_waiting_is_zero(make, block):
    collector = make(max_running=1, max_waiting=0)
    for _ in range(3):
        handle, blocked = run_blocked(collector, block)
        assert is_full(collector)
        blocked.gate.set()
        assert handle.result(30).item() == 1


def test_query_that_was_cancelled_takes_its_room_until_it_ends(make, block):
    collector = make(max_running=1, max_waiting=0)
    handle, blocked = run_blocked(collector, block)
    handle.cancel()
    assert is_full(collector)
    blocked.gate.set()
    until(lambda: not inside.running(collector))
    assert collector.collect_async(TINY).result(30).item() == 1


def test_no_more_wait_than_may_though_a_slot_is_reserved_for_small_ones(make, block):
    collector = make(max_running=2, max_waiting=2)
    run_blocked(collector, block)
    for _ in range(2):
        collector.collect_async(UNSEEN)
        settle(collector)
    message = r"2 waiting, .* 1 running, of at most max_running=2 \(the free slots are reserved"
    with pytest.raises(QueueFullError, match=message):
        collector.collect_async(UNSEEN)


def test_small_query_is_not_refused_while_a_slot_is_reserved_for_it(make, block):
    collector = make(max_running=3, max_waiting=2)
    run_blocked(collector, block)
    for _ in range(2):
        collector.collect_async(UNSEEN)
        settle(collector)
    for _ in range(20):
        assert collector.collect_async(TINY).result(30).item() == 1
    assert collector.collect_async(UNSEEN, priority=1).result(30).item() == 1
    with pytest.raises(QueueFullError):
        collector.collect_async(UNSEEN)
    with pytest.raises(QueueFullError):
        collector.collect_async(TINY, priority=-1)


def test_burst_of_small_queries_finds_all_slots_and_all_of_the_queue(make, block):
    collector = make(max_running=4, max_waiting=3)
    queries = [block() for _ in range(8)]
    small = [query.lf for query in queries]
    for lf in small[:7]:
        collector.collect_async(lf, priority=1)
    with pytest.raises(QueueFullError):
        collector.collect_async(small[7], priority=1)
    until(lambda: inside.running(collector) == 4)
    assert inside.waiting(collector) == 3


def test_refusal_says_in_how_many_seconds_the_queries_before_may_be_done():
    admission = Admission(Limits(2), 2)
    for seconds in (5000.0, 2000.0, 1000.0):
        query = query_in(admission)
        query.estimate = Estimate(seconds, None)
        admission.enter(query)
    with pytest.raises(QueueFullError) as refusal:
        admission.enter(query_in(admission))
    assert refusal.value.retry_after == pytest.approx(8000, abs=1000)  # this machine may be busy
    assert pickle.loads(pickle.dumps(refusal.value)).retry_after == refusal.value.retry_after


def test_refusal_tells_that_nested_queries_are_beyond_the_slots(make, block):
    collector = make(max_running=1, max_waiting=1)
    inner = block()

    def udf(df):
        collector.collect_async(inner.lf).result()
        return df

    collector.collect_async(TINY.map_batches(udf))
    assert inner.started.wait(30)
    collector.collect_async(TINY)
    with pytest.raises(
        QueueFullError, match=r"1 waiting, .* and 1 running, of at most max_running=1\."
    ):
        collector.collect_async(TINY)


def test_there_is_room_again_after_a_cancellation_in_the_queue(make, block):
    collector = make(max_running=1, max_waiting=1)
    run_blocked(collector, block)
    for _ in range(3):
        waiting = collector.collect_async(TINY)
        assert is_full(collector)
        waiting.cancel()


def test_there_is_room_again_after_a_time_out_in_the_queue(make, block):
    collector = make(max_running=1, max_waiting=1)
    run_blocked(collector, block)
    for _ in range(2):
        with pytest.raises(QueryTimeoutError):
            collector.collect_async(TINY, timeout=0.001).result(30)
    collector.collect_async(TINY)
    assert is_full(collector)


def test_there_is_room_again_after_an_end(make, block):
    collector = make(max_running=1, max_waiting=1)
    handle, blocked = run_blocked(collector, block)
    following = block()
    collector.collect_async(following.lf)
    assert is_full(collector)
    blocked.gate.set()
    assert handle.result(30).item() == 1
    assert following.started.wait(30)
    collector.collect_async(TINY)
    assert is_full(collector)


@pytest.mark.parametrize("depth", [1, 3])
def test_nested_query_needs_no_room(make, depth):
    collector = make(max_running=1, max_waiting=0)
    outer = collector.collect_async(ask_plan(collector, by_result, depth))
    assert outer.result(30).item() == 1
    assert collector.stats()["rejected"] == 0


def test_nested_queries_leave_the_bound_as_it_was(make, block):
    collector = make(max_running=1, max_waiting=1)
    inner = block()

    def udf(df):
        collector.collect_async(inner.lf).result()
        return df

    outer = collector.collect_async(TINY.map_batches(udf))
    assert inner.started.wait(30)
    assert inside.running(collector) == 2
    waiting = collector.collect_async(TINY)
    assert is_full(collector)
    inner.gate.set()
    assert outer.result(30).item() == waiting.result(30).item() == 1


def test_slot_of_a_stream_that_waits_for_its_consumer_can_be_had_without_waiting(make, block):
    collector = make(max_running=2, max_waiting=0)
    stream = collector.collect_batches_async(pl.LazyFrame({"a": range(10)}), chunk_size=1)
    until(lambda: collector._cpu.admission.paused)
    run_blocked(collector, block)
    assert collector.collect_async(TINY).result(30).item() == 1
    stream.close()


@pytest.fixture
def gpu():
    with simulate_gpu():
        yield


def test_gpu_has_a_line_of_its_own(gpu, make, block):  # noqa: ARG001  # there until all is closed
    collector = make(gpu="offload", max_running=1, max_waiting=1)
    run_blocked(collector, block, engine="gpu")
    on_gpu = collector.collect_async(TINY, engine="gpu")
    message = (
        "the collector is full for the GPU: 1 waiting, of at most max_waiting=1, and 1 running, of "
        "at most 1 at once."
    )
    with pytest.raises(QueueFullError, match=f"^{re.escape(message)}"):
        collector.collect_async(TINY, engine="gpu")
    run_blocked(collector, block)
    on_cpu = collector.collect_async(TINY)
    assert is_full(collector)
    stats = collector.stats()
    assert (stats["running"], stats["waiting"], stats["rejected"]) == (2, 2, 2)
    assert (stats["gpu_running"], stats["gpu_waiting"]) == (1, 1)
    block.free()
    assert on_gpu.result(30).item() == on_cpu.result(30).item() == 1


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_running": 0}, "^max_running must be a whole number, 1 or more, or None, got 0$"),
        ({"max_running": -1}, "^max_running must be a whole number, 1 or more, or None, got -1$"),
        ({"max_waiting": -1}, "^max_waiting must be a whole number, 0 or more, or None, got -1$"),
    ],
)
def test_limit_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Collector(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_running", 2.5),  # a worker would die of it in Admission.reappraise
        ("max_running", nan),
        ("max_running", "4"),
        ("max_waiting", nan),
        ("max_waiting", "4"),
    ],
)
def test_limit_that_is_no_whole_number_is_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be .*, got {value!r}$"):
        Collector(**{name: value})


def test_hook_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match=r"^on_event must be callable, got 5$"):
        Collector(on_event=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "^timeout must be more than 0 seconds, or None, got 0$"),
        ({"timeout": -1.5}, "^timeout must be more than 0 seconds, or None, got -1.5$"),
        ({"timeout": nan}, "^timeout must be more than 0 seconds, or None, got nan$"),
        ({"priority": 11}, "^priority must be a whole number from -10 to 10, got 11$"),
        ({"priority": -11}, "^priority must be a whole number from -10 to 10, got -11$"),
        ({"priority": 1.5}, "^priority must be a whole number from -10 to 10, got 1.5$"),
        ({"priority": "high"}, "^priority must be a whole number from -10 to 10, got 'high'$"),
    ],
)
def test_option_out_of_range_is_refused_before_anything_runs(collector, options, message):
    with pytest.raises(ValueError, match=message):
        collector.collect_async(TINY, **options)
    assert collector.stats()["submitted"] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout", "5"),
        ("timeout", 10**400),
        ("label", 5),  # the thread would die of it, and nobody be told
    ],
    ids=["timeout of text", "timeout beyond floats", "label of a number"],
)
def test_option_of_a_wrong_kind_is_refused_by_name_before_anything_runs(name, value):
    collector = Collector(max_running=1)  # never closed, since that would not end if this failed
    refusals = (TypeError, ValueError, OverflowError)
    with pytest.raises(refusals, match=f"^{name} must be "):
        collector.collect_async(TINY, **{name: value}).result(30)
    assert collector.stats()["submitted"] == 0


@pytest.mark.parametrize("timeout", [inf, 1e300, 10**9])
def test_any_time_that_is_long_enough_is_a_timeout(collector, timeout):
    assert collector.collect_async(TINY, timeout=timeout).result(30).item() == 1


def test_true_is_a_timeout_of_one_second(collector, blocked):
    handle = collector.collect_async(blocked.lf, timeout=True)
    inside.let_time_be_up(handle)
    with pytest.raises(QueryTimeoutError, match=r"was not done after 1 s: "):
        handle.result(30)


def test_decimal_timeout_is_taken_or_refused_before_anything_runs(collector):
    try:
        handle = collector.collect_async(TINY, timeout=Decimal(60))
    except (TypeError, ValueError):
        assert collector.stats()["submitted"] == 0
    else:
        assert handle.result(30).item() == 1


# Of several slots, one or two are kept for small queries


@pytest.mark.parametrize(("slots", "at_most"), [(2, 1), (3, 1), (4, 2), (5, 3)])
def test_long_queries_leave_slots_which_tiny_ones_take(make, block, slots, at_most):
    collector = make(max_running=slots)
    for _ in range(at_most):
        run_blocked(collector, block)
    long = [collector.collect_async(UNSEEN) for _ in range(3)]
    settle(collector)
    assert inside.running(collector) == at_most
    assert inside.waiting(collector) == 3
    for _ in range(5):
        assert collector.collect_async(TINY).result(30).item() == 1
    assert not any(handle.done() for handle in long)
    block.free()
    assert [handle.result(30).item() for handle in long] == [1] * 3


def test_single_slot_is_not_kept(make):
    assert make(max_running=1).collect_async(UNSEEN).result(30).item() == 1


@pytest.mark.parametrize(
    ("ask", "is_small"),
    [
        (lambda collector: collector.collect_async(TINY), True),
        (lambda collector: collector.collect_all_async([TINY, TINY]), True),
        (lambda collector: collector.collect_schema_async(UNSEEN), True),
        (lambda collector: collector.collect_async(UNSEEN, priority=1), True),
        (lambda collector: collector.collect_async(HEAVY, priority=1), True),
        (lambda collector: collector.collect_async(UNSEEN), False),
        (lambda collector: collector.collect_async(HEAVY), False),
        (lambda collector: collector.collect_all_async([TINY, HEAVY]), False),
        (lambda collector: collector.collect_async(TINY, priority=-1), False),
        (lambda collector: collector.collect_schema_async(TINY, priority=-1), False),
    ],
)
def test_slot_is_kept_for_little_work_or_a_high_priority(make, block, ask, is_small):
    collector = make(max_running=2)
    run_blocked(collector, block)
    handle = ask(collector)
    if is_small:
        handle.result(30)
        assert inside.running(collector) == 1
    else:
        settle(collector)
        assert not handle.done()
        assert inside.waiting(collector) == 1


def test_small_query_runs_beside_a_small_one_and_a_long_one_waits_for_neither(make, block):
    collector = make(max_running=2)
    run_blocked(collector, block, priority=1)  # at once, so it may be long
    settle(collector)
    _, small = run_blocked(collector, block, priority=1)
    following = collector.collect_async(TINY)
    assert not following.done()
    small.gate.set()
    assert following.result(30).item() == 1


def test_unknown_query_counts_as_small_once_its_runs_were_quick(make, block, monkeypatch):
    observe = CostModel.observe

    def learn_that_it_was_quick(known, expected, _, **options):  # this machine may be busy
        return observe(known, expected, 0.0005, **options | {"alone": True})

    monkeypatch.setattr(CostModel, "observe", learn_that_it_was_quick)
    collector = make(max_running=2)
    _, blocked = run_blocked(collector, block)
    waiting = [collector.collect_async(UNSEEN) for _ in range(10)]
    settle(collector)
    assert not any(handle.done() for handle in waiting)
    blocked.gate.set()
    for handle in waiting:
        handle.result(30)
    run_blocked(collector, block)
    assert collector.collect_async(UNSEEN).result(30).item() == 1  # which has a better prospect now


def test_new_appraisal_wakes_a_slot_that_nobody_looks_after(make, block, monkeypatch):
    waiting = []

    def observe(_, expected, __, **___):
        # Nobody waited when the query ended, so its slot was taken back; then somebody comes, finds
        # the slot free but is not small, as far as is known before this returns. Those before it
        # may be learnt from as late as it.
        if expected.fingerprint == kind and not waiting:
            other = threading.Thread(target=lambda: waiting.append(collector.collect_async(UNSEEN)))
            other.start()
            other.join()
            settle(collector)
        return Estimate(0.0, expected.fingerprint)

    kind = CostModel().of([UNSEEN], "in-memory").fingerprint
    assert kind is not None
    monkeypatch.setattr(CostModel, "observe", observe)
    monkeypatch.setattr(ThreadPool, "shed", lambda *_: None)
    monkeypatch.setattr(query, "_WORTH_ESTIMATING", 0.0)  # however quick it was
    collector = make(max_running=2)
    run_blocked(collector, block)
    # So that there is a thread beside the two that are busy, since none ends.
    collector.collect_async(ask_plan(collector, by_result, 1), priority=1).result(30)
    collector.collect_async(UNSEEN, priority=1).result(30)
    until(lambda: waiting)
    assert waiting[0].result(30).item() == 1


# The order of the line


@pytest.mark.parametrize("lf", [TINY, UNSEEN], ids=["tiny", "unseen"])
@pytest.mark.parametrize(
    ("priorities", "order"),
    [
        ((-1, 0, -10, -5, 0), (0, 0, -1, -5, -10)),
        ((0, 1), (1, 0)),
        ((0, -1, 5, 10, -10, 0), (10, 5, 0, 0, -1, -10)),
    ],
)
def test_higher_priority_starts_first(make, block, lf, priorities, order):
    starts = Starts()
    collector = make(max_running=1, on_event=starts)
    run_blocked(collector, block)
    for priority in priorities:
        collector.collect_async(lf, priority=priority, label=str(priority))
    block.free()
    collector.close(cancel_waiting=False)
    assert starts == [str(priority) for priority in order]


def test_less_expected_work_starts_first(make, block, tmp_path, monkeypatch):
    # Of a frame only the order of its size is known: here 1 s, so that it is more than the 0.1 s of
    # an unknown query in any case.
    monkeypatch.setattr(estimates, "_FRAME_RATE", 40e6)
    starts = []

    def on_event(event):
        if event.kind is EventKind.STARTED:
            starts.append(event.label)
            if event.label == "heavy frame":
                scanned.cancel()  # that would take long indeed

    collector = make(max_running=1, on_event=on_event)
    run_blocked(collector, block, label="blocked")
    scanned = collector.collect_async(scan_of(tmp_path, megabytes=500), label="file")
    collector.collect_async(HEAVY, label="heavy frame")
    collector.collect_async(UNSEEN, label="unknown")
    collector.collect_async(TINY, label="tiny")
    block.free()
    collector.close(cancel_waiting=False)
    assert starts == ["blocked", "tiny", "unknown", "heavy frame"]


def test_equals_start_in_the_order_they_came_and_nobody_is_estimated_by_the_caller(
    make, block, looked
):
    starts = Starts()
    collector = make(max_running=1, on_event=starts)
    run_blocked(collector, block)
    for i in range(20):
        collector.collect_async(pl.LazyFrame({"a": [i]}), label=str(i))
    assert looked == []
    block.free()
    collector.close(cancel_waiting=False)
    assert starts == [str(i) for i in range(20)]
    assert looked
    assert threading.get_ident() not in looked


@pytest.fixture
def looked(monkeypatch):
    """The threads on which plans were looked at for what the test has made."""
    threads, made = [], []
    make, look = CostModel.__init__, CostModel._look

    def make_and_keep(known, **options):
        made.append(known)
        make(known, **options)

    def look_and_tell(known, *arguments, **options):
        if known in made:  # queries of tests before may still be looked at after their end
            threads.append(threading.get_ident())
        return look(known, *arguments, **options)

    monkeypatch.setattr(CostModel, "__init__", make_and_keep)
    monkeypatch.setattr(CostModel, "_look", look_and_tell)
    return threads


def test_nobody_is_estimated_while_more_slots_are_free_than_are_kept(
    make, block, looked, monkeypatch
):
    monkeypatch.setattr(query, "_WORTH_ESTIMATING", inf)  # this machine may be busy
    collector = make(max_running=4)
    for _ in range(10):
        collector.collect_async(UNSEEN).result(30)
    for _ in range(2):
        run_blocked(collector, block)
    block.free()
    collector.close()
    assert looked == []


def be_quick(collector, length=QUICK_STREAK):
    """Have a collector just after a row of quick queries, the last of them taken unseen."""
    admission = collector._cpu.admission
    with admission.lock:
        for _ in range(length):
            admission._queue.note_ended(QUICK, overtook=False)
        admission._started_unestimated = perf_counter()


@pytest.fixture
def guard(make, block, looked, monkeypatch):
    """Give a collector whose slot for small queries stands guard, and what lets it look again."""
    slept, gate = [], threading.Event()

    def sleep(seconds):
        slept.append(seconds)
        assert gate.wait(30)

    monkeypatch.setattr(lane, "sleep", sleep)
    monkeypatch.setattr(admission, "SMALL", 1000.0)
    collector = make(max_running=2)
    be_quick(collector)
    run_blocked(collector, block)
    handle = collector.collect_async(TINY)
    until(lambda: slept)
    assert 900 < slept[0] <= 1000
    assert looked == []
    yield collector, handle, gate
    gate.set()
    assert len(slept) == 1


def test_slot_kept_for_small_ones_looks_at_nobody_until_another_proves_long(
    guard, looked, monkeypatch
):
    _, tiny, gate = guard
    assert not tiny.done()
    monkeypatch.setattr(admission, "SMALL", 0.0)
    gate.set()
    assert tiny.result(30).item() == 1
    assert len(looked) == 1


def test_slot_kept_for_small_ones_looks_at_all_unless_the_last_were_quick(make, block, monkeypatch):
    monkeypatch.setattr(lane, "sleep", None)
    monkeypatch.setattr(admission, "SMALL", 1000.0)
    collector = make(max_running=2)
    be_quick(collector, QUICK_STREAK - 1)
    run_blocked(collector, block)
    assert collector.collect_async(TINY).result(30).item() == 1


def test_nobody_waits_for_the_hook_of_a_quick_query(make):
    entered, gate = threading.Event(), threading.Event()

    def hook(event):
        if event.kind is EventKind.FINISHED and event.label == "slow hook":
            entered.set()
            assert gate.wait(30)

    collector = make(max_running=2, on_event=hook)
    be_quick(collector)
    collector.collect_async(TINY, label="slow hook")
    assert entered.wait(30)
    try:
        assert collector.collect_async(TINY).result(10).item() == 1
    finally:
        gate.set()


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_those_taken_unestimated_leave_one_slot_which_tiny_ones_take(make, block, slots):
    collector = make(max_running=slots)
    be_quick(collector)
    for _ in range(slots - 1):
        run_blocked(collector, block)
    long = collector.collect_async(UNSEEN)
    settle(collector)
    assert inside.running(collector) == slots - 1
    assert collector.collect_async(TINY).result(30).item() == 1
    assert not long.done()


def query_in(admission):
    resolution = resolve_engine("in-memory")
    return query.Query(Collect(TINY, None, None), resolution, Reporter(None), admission.owner)


@pytest.mark.parametrize(("slots", "is_taken"), [(2, False), (3, True), (4, True)])
def test_where_the_last_were_quick_the_next_is_taken_unestimated_in_all_slots_but_one(
    slots, is_taken
):
    line = Admission(Limits(slots))
    ending, other, waiting = (query_in(line) for _ in range(3))
    slot, others = line.enter(ending), Slot()
    line._slots.add(others)
    line._start(other, others)
    line._queue.add(waiting)
    for _ in range(QUICK_STREAK):
        line._queue.note_ended(QUICK, overtook=False)
    ending.times.started = ending.times.ended = 1.0  # this machine may be busy
    with line.lock:
        assert line.release(slot)
    assert (slot.query is waiting) == is_taken


@pytest.mark.parametrize("estimated", [False, True])
def test_only_those_taken_unestimated_keep_the_slot_for_small_ones_standing_by(estimated):
    line = Admission(Limits(1))
    first, second = (query_in(line) for _ in range(2))
    slot = line.enter(first)
    line.enter(second)
    for _ in range(QUICK_STREAK):
        line._queue.note_ended(QUICK, overtook=False)
    if estimated:
        line._queue.rank(line.next_unestimated(slot, from_behind=False), QUICK)
    first.times.started = first.times.ended = 1.0  # this machine may be busy
    with line.lock:
        assert line.release(slot)
    assert slot.query is second
    assert (line._started_unestimated > -inf) == (not estimated)


def test_slot_that_looked_at_nobody_is_given_back_when_nobody_waits(guard):
    collector, tiny, gate = guard
    assert tiny.cancel()
    gate.set()
    settle(collector)
    assert inside.threads_in_use(collector) == 1


def test_query_that_took_long_is_estimated_after_its_end(make, looked, monkeypatch):
    monkeypatch.setattr(query, "_WORTH_ESTIMATING", 0.0)
    collector = make(max_running=1)
    collector.collect_async(UNSEEN).result(30)
    until(lambda: looked)
    assert threading.get_ident() not in looked


def test_free_slot_has_a_thread_while_another_thread_still_appraises(make, monkeypatch):
    estimates, gate = threading.Event(), threading.Event()

    def of(*_):
        estimates.set()
        gate.wait()
        return Estimate(UNKNOWN, None)

    monkeypatch.setattr(query, "_WORTH_ESTIMATING", 0.0)
    monkeypatch.setattr(CostModel, "of", of)
    collector = make(max_running=1)
    try:
        collector.collect_async(TINY).result(30)
        assert estimates.wait(30)  # of which a file on a slow disk may make long work
        assert inside.threads_in_use(collector) == 0
        assert collector.collect_async(TINY).result(30).item() == 1
    finally:
        gate.set()


class HeldWaiter:
    """A waiter that is not told before it is let go on."""

    survives_fork = wake_at_exit = False

    def __init__(self):
        self.came, self.gate = threading.Event(), threading.Event()

    def wake(self):
        self.came.set()
        assert self.gate.wait(30)


def test_thread_that_goes_to_look_back_is_not_ended_by_another(make, block, monkeypatch):
    monkeypatch.setattr(query, "_WORTH_ESTIMATING", 0.0)
    collector = make(max_running=1)
    executor, nested = collector._cpu._threads, [block() for _ in range(2)]
    held = [HeldWaiter() for _ in range(3)]
    asked, all_wait = [], threading.Event()
    is_out, is_back = threading.Event(), threading.Event()
    observe_cost = query.Query.observe_cost

    def look_back(self, *arguments, **options):
        if asked and self is asked[0]._query:
            is_out.set()
            assert is_back.wait(30)
        return observe_cost(self, *arguments, **options)

    monkeypatch.setattr(query.Query, "observe_cost", look_back)

    def ask_two(df):
        for blocked, waiter in zip(nested, held, strict=False):
            asked.append(collector.collect_async(blocked.lf))
            asked[-1]._query.add_waiter(waiter)
            assert blocked.started.wait()
        assert all_wait.wait(30)
        for blocked, waiter in zip(nested, held, strict=False):
            blocked.gate.set()
            assert waiter.came.wait(30)  # it has no slot any more
        return df

    outer = collector.collect_async(TINY.map_batches(ask_two))
    outer._query.add_waiter(held[2])
    until(lambda: len(asked) == 2)
    waiting = collector.collect_async(TINY)
    all_wait.set()
    assert held[2].came.wait(30)  # it has kept its slot for the one that waits
    held[1].gate.set()
    until(lambda: executor.threads <= 1)  # that one has looked back, and let go whom it could
    held[0].gate.set()
    assert is_out.wait(30)
    held[2].gate.set()
    try:
        assert waiting.result(10).item() == 1
    finally:
        is_back.set()
    collector.close()


def test_frame_that_is_asked_for_again_is_looked_at_once(make, block, looked):
    collector = make(max_running=1)
    run_blocked(collector, block)
    handles = [collector.collect_async(TINY) for _ in range(5)]
    collector.collect_all_async([TINY, TINY])
    block.free()
    for handle in handles:
        handle.result(30)
    collector.close(cancel_waiting=False)
    # TINY, and the one that was blocked. Two threads that come to TINY at one time both look.
    assert max(map(looked.count, looked), default=0) <= 2


def test_broken_plan_is_unknown_and_its_query_reports_its_own_error(make, block):
    broken = TINY.select("nope")
    assert CostModel().of([broken], "in-memory").seconds < UNKNOWN
    collector = make(max_running=2)
    run_blocked(collector, block)
    handle = collector.collect_async(broken, priority=1)
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="nope"):
        handle.result(30)


# What is expected


def scan_of(folder, *, megabytes, name="data.csv"):
    path = folder / name
    with path.open("wb") as file:
        file.truncate(int(megabytes * 1e6))  # which takes no room on the disk
    return pl.scan_csv(path, schema={"a": pl.Int64})


def of(*frames, engine="in-memory"):
    return CostModel().of(frames, engine)


def test_more_is_expected_of_more_bytes(tmp_path):
    assert of(TINY).seconds < 0.0001
    hundred_kilobytes, two = (pl.select(a=pl.int_range(rows)).lazy() for rows in (13_000, 26_000))
    assert of(hundred_kilobytes).seconds == pytest.approx(0.0005, rel=0.1)
    assert of(two).seconds == pytest.approx(0.001, rel=0.1)
    assert of(TINY, two).seconds == pytest.approx(of(two).seconds, rel=0.1)
    assert 0.02 <= of(HEAVY).seconds < 4  # 40 MB in chunks, of which the order is known
    assert of(scan_of(tmp_path, megabytes=50)).seconds == pytest.approx(1.0)
    assert of(UNSEEN).seconds == UNKNOWN
    assert of(pl.concat([UNSEEN, HEAVY])).seconds >= UNKNOWN
    assert of(pl.scan_csv(tmp_path / "none.csv", schema={"a": pl.Int64})).seconds == UNKNOWN


def test_nothing_is_known_of_a_directory_or_a_file_that_is_not_there(tmp_path):
    scan_of(tmp_path, megabytes=50)
    schema = {"a": pl.Int64}
    for path in (tmp_path, tmp_path / "none.csv", tmp_path / "*.csv"):
        assert of(pl.scan_csv(path, schema=schema)).seconds == UNKNOWN


def test_row_of_queries_that_fail_at_once_is_no_row_of_quick_ones(make):
    collector = make(max_running=1)
    for _ in range(2 * QUICK_STREAK):
        with pytest.raises(pl.exceptions.ColumnNotFoundError):
            collector.collect_async(TINY.select("nope")).result(30)
    assert not collector._cpu.admission._queue.is_quick


def test_fingerprint_is_that_of_the_shape_whatever_the_numbers():
    def over(number, frame=TINY):
        return frame.filter(pl.col("a") > number).head(number)

    assert of(over(1)).fingerprint == of(over(2345)).fingerprint
    assert of(over(1)).fingerprint == of(over(1, pl.LazyFrame({"a": [7]}))).fingerprint
    others = [
        of(over(1), engine="streaming"),
        of(over(1), over(1)),
        of(over(1, pl.LazyFrame({"a": range(1000)}))),
        of(over(1, pl.LazyFrame({"b": [1], "a": [1]}))),
        of(TINY.filter(pl.col("a") < 1).head(1)),
        of(over(1).select("a")),
    ]
    found = {each.fingerprint for each in (of(over(1)), *others)}
    assert None not in found
    assert len(found) == 7


def test_fingerprint_of_a_small_file_is_not_that_of_a_large_one(tmp_path):
    small, large = (
        of(scan_of(tmp_path, megabytes=size, name=f"part-{i}.csv"))
        for i, size in enumerate((0.001, 1000))
    )
    assert small.seconds < large.seconds
    assert small.fingerprint != large.fingerprint


@pytest.mark.parametrize(
    ("expected", "took", "alone", "now"),
    [
        # Faster than expected: so it is, alone or not.
        (0.1, 0.002, True, 0.002),
        (0.1, 0.002, False, 0.002),
        (50.0, 1.0, False, 1.0),
        # Slower: alone, so it is, but for what the GIL may take; beside others, it may be theirs.
        (0.002, 1.0, True, 0.98),
        (0.0001, 0.025, True, 0.005),
        (0.0001, 0.02, True, None),
        (0.002, 1.0, False, None),
        (0.002, 100.0, False, 0.1),
        # Not off by half.
        (0.1, 0.06, True, None),
        (0.1, 0.19, True, None),
        (0.1, 0.06, False, None),
        (0.1, 0.19, False, None),
        # Nobody cares.
        (0.00001, 0.0009, True, None),
        (0.0009, 0.00001, False, None),
    ],
)
def test_history_corrects_what_is_expected(expected, took, alone, now):
    known = CostModel()
    before = known.of([TINY], "in-memory")
    found = known.observe(before._replace(seconds=expected), took, alone=alone)
    if now is None:
        assert found is None
        assert known.of([TINY], "in-memory").seconds in (expected, before.seconds)
    else:
        assert found == Estimate(pytest.approx(now), before.fingerprint)
        assert known.of([TINY], "in-memory") == found


@pytest.mark.parametrize("took", [0.001, 0.01])
def test_query_that_did_not_complete_says_no_more_than_that_it_takes_so_long(took):
    known = CostModel()
    before = known.of([TINY], "in-memory")
    assert known.observe(before._replace(seconds=0.1), took, alone=True, completed=False) is None
    assert known.of([TINY], "in-memory").seconds == 0.1
    now = known.observe(before, 5.0, alone=True, completed=False)
    assert known.of([TINY], "in-memory").seconds == now.seconds == pytest.approx(4.98)


def test_what_is_not_all_of_a_plan_is_expected_to_be_quick_only_after_some_quick_runs():
    known = CostModel()
    assert not known.of([UNSEEN], "in-memory").is_exact
    expected = [known.observe(known.of([UNSEEN], "in-memory"), 0.001, alone=True) for _ in range(3)]
    assert [each.seconds for each in expected] == pytest.approx([0.05, 0.025, 0.0125])
    assert known.observe(known.of([UNSEEN], "in-memory"), 1.0, alone=True).seconds > 0.9


@pytest.mark.everywhere(how="is cancelled")
@pytest.mark.parametrize("how", ["fails", "is cancelled", "is left"])
def test_nothing_quick_is_learned_of_a_query_that_did_not_complete(make, block, monkeypatch, how):
    learned = []

    def observe(costs, _, __, *, alone, completed, share, memory):  # noqa: ARG001
        if costs is collector._cpu._costs:  # queries of tests before may still come to their end
            learned.append(completed)

    monkeypatch.setattr(query, "_WORTH_ESTIMATING", 0.0)
    collector = make(max_running=1)
    monkeypatch.setattr(CostModel, "observe", observe)
    if how == "fails":
        handle = collector.collect_async(TINY.map_batches(lambda _: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            handle.result(30)
    elif how == "is cancelled":
        handle, blocked = run_blocked(collector, block)
        handle.cancel()
        blocked.gate.set()
    else:
        stream = collector.collect_batches_async(pl.LazyFrame({"a": range(100)}), chunk_size=1)
        stream.close()
    until(lambda: learned)
    assert learned == [False]


def test_one_behind_plans_that_are_slow_to_look_at_does_not_wait_for_all_of_them(
    make, block, monkeypatch
):
    looks, look_at = threading.Semaphore(0), estimates.look_at
    slow = [UNSEEN.head(number) for number in range(100)]

    def look_slowly(frame, limit):
        if any(frame is each for each in slow):
            assert looks.acquire(timeout=30)
        return look_at(frame, limit)

    monkeypatch.setattr(estimates, "look_at", look_slowly)
    monkeypatch.setattr(lane, "_MOMENT", 0.0)  # each of them counts as slow
    collector = make(max_running=2)
    run_blocked(collector, block)
    handles = [collector.collect_async(each) for each in slow]
    tiny = collector.collect_async(TINY)
    looks.release(5)
    try:
        assert tiny.result(30).item() == 1
    finally:
        looks.release(1000)
        for handle in handles:
            handle.cancel()


def test_newcomers_are_looked_at_while_a_look_is_slow_and_those_that_came_with_it_are_not(
    make, block, monkeypatch
):
    begun, gate = [], threading.Event()
    look_at = estimates.look_at
    slow = [UNSEEN.head(number) for number in range(5)]

    def look_slowly(frame, limit):
        for each in slow:
            if each is frame:
                begun.append(each)
                assert gate.wait(30)
        return look_at(frame, limit)

    monkeypatch.setattr(estimates, "look_at", look_slowly)
    collector = make()
    run_blocked(collector, block)
    handles = [collector.collect_async(slow[0])]
    until(lambda: begun)
    with collector._cpu.admission.lock, monkeypatch.context() as patched:
        # No thread may look further before all have come.
        patched.setattr(lane, "is_held", lambda _: False)  # else they would come late
        handles += [collector.collect_async(each) for each in slow[1:]]
        for slot in collector._cpu.admission._slots:
            slot.looks_after = collector._cpu.admission._queue.came
    sleep(0.02)  # from when on the look is slow
    try:
        for _ in range(3):
            assert collector.collect_async(TINY).result(30).item() == 1
        assert begun == slow[:1]
    finally:
        gate.set()
        for handle in handles:
            handle.cancel()
    until(lambda: inside.waiting(collector) == 0)


def test_urgent_query_is_found_at_once_behind_many(make, block, looked):
    collector = make(max_running=1)
    _, blocked = run_blocked(collector, block)
    urgent = pl.LazyFrame({"b": [2]})
    starts = []
    for _ in range(1000):
        collector.collect_async(TINY.head(1))
    handle = collector.collect_async(
        urgent.map_batches(lambda df: (starts.append(len(looked)), df)[1]), priority=10
    )
    blocked.gate.set()
    assert handle.result(30).item() == 2
    assert starts[0] <= 3  # of 1000


def test_newer_history_corrects_older():
    known = CostModel()
    for took in (1.0, 0.01, 1.0):
        known.observe(known.of([TINY], "in-memory"), took, alone=True)
        assert known.of([TINY], "in-memory").seconds == pytest.approx(took, abs=0.021)
        equal = pl.LazyFrame({"a": [5]})
        assert known.of([equal], "in-memory") == known.of([TINY], "in-memory")


def test_nothing_is_learned_of_a_query_without_fingerprint():
    known = CostModel()
    assert known.observe(Estimate(UNKNOWN, None), 5.0, alone=True) is None
    assert not known._taken


def test_history_is_bounded_and_forgets_what_ran_longest_ago(monkeypatch):
    monkeypatch.setattr(estimates, "_MOST_KNOWN", 3)
    known = CostModel()
    for fingerprint in (1, 2, 3, 1, 4, 5):
        known.observe(Estimate(0.1, fingerprint), 2.0, alone=True)
    assert sorted(known._taken) == [1, 4, 5]


def test_frame_is_looked_at_once_and_forgotten_with_it(looked):
    known = CostModel()
    frame = pl.LazyFrame({"a": [1]})
    assert known.of([frame], "in-memory") == known.of([frame], "in-memory")
    assert known.of([frame], "streaming") != known.of([frame], "in-memory")
    assert len(looked) == 1
    del frame
    assert not known._plans


def test_queries_know_whether_they_ran_alone(make, block, monkeypatch):
    learned = []

    def observe(costs, _, __, *, alone, completed, share, memory):  # noqa: ARG001
        if costs is collector._cpu._costs:  # as above
            learned.append(alone)

    monkeypatch.setattr(query, "_WORTH_ESTIMATING", 0.0)
    collector = make(max_running=2)
    monkeypatch.setattr(CostModel, "observe", observe)
    collector.collect_async(TINY).result(30)
    until(lambda: learned == [True])
    run_blocked(collector, block)
    collector.collect_async(TINY).result(30)
    until(lambda: learned == [True, False])
    block.free()
    until(lambda: learned == [True, False, False])
    collector.collect_async(TINY).result(30)
    until(lambda: learned == [True, False, False, True])


def test_closed_collector_is_closed_rather_than_full(make, block):
    collector = make(max_running=1, max_waiting=0)
    run_blocked(collector, block)
    collector.close(wait=False)
    with pytest.raises(CollectorClosedError):
        collector.collect_async(TINY)
