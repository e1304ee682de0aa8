from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import re
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import accumulate

import inside
import polars as pl
import pytest
from places import A_COLLECTOR_STAYS, PLANS_SENT_ONE_BY_ONE, TINY, Blocked, Notes, until
from polars.io.plugins import register_io_source

import polars_async
from polars_async import Collector, CollectorClosedError
from polars_async.executors import threads

pytestmark = pytest.mark.smoke


@pytest.fixture
def ended(monkeypatch):
    """A semaphore that is released whenever a worker's thread ends."""
    semaphore = threading.Semaphore(0)
    work = threads._work

    def work_and_tell(*arguments):
        work(*arguments)
        semaphore.release()

    monkeypatch.setattr(threads, "_work", work_and_tell)
    return semaphore


def numbered(count):
    return [pl.LazyFrame({"a": [i]}) for i in range(count)]


# collect_all_async


@pytest.mark.everywhere
@pytest.mark.cannot("processes", "dask", because=PLANS_SENT_ONE_BY_ONE)
def test_collect_all_reads_a_common_source_once(collector):
    reads = Notes()

    def read(with_columns, predicate, n_rows, batch_size):  # noqa: ARG001
        reads.append(1)
        yield pl.DataFrame({"a": [1, 2, 3]})

    source = register_io_source(read, schema={"a": pl.Int64}, is_pure=True)
    frames = [source.sum(), source.max(), source.min()]
    found = collector.collect_all_async(frames).result()
    assert [each.item() for each in found] == [6, 3, 1]
    assert len(reads) == 1


@pytest.mark.everywhere
def test_collect_all_keeps_order_and_takes_any_iterable(collector):
    for frames in (numbered(20), tuple(numbered(20)), (each for each in numbered(20))):
        found = collector.collect_all_async(frames).result()
        assert [each.item() for each in found] == list(range(20))


@pytest.mark.parametrize("engine", ["in-memory", "streaming", "auto"])
def test_collect_all_of_nothing_is_an_empty_list(collector, engine):
    assert collector.collect_all_async([], engine=engine).result() == []


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([TINY, 5], r"lazy_frames\[1\] must be a LazyFrame, got int$"),
        ([None], r"lazy_frames\[0\] must be a LazyFrame, got NoneType$"),
        ([TINY, TINY, TINY.collect()], r"lazy_frames\[2\].*DataFrame: call its lazy\(\) first"),
        (TINY, "iterable of LazyFrames, got polars.*LazyFrame: put a single frame in a list"),
        (TINY.collect(), "iterable of LazyFrames, got .*DataFrame: .*put a single frame in a list"),
        (5, "iterable of LazyFrames, got int"),
    ],
)
def test_collect_all_of_what_is_no_lazy_frame_is_refused(collector, frames, message):
    with pytest.raises(TypeError, match=message):
        collector.collect_all_async(frames)
    assert not inside.all_threads(collector)


@pytest.mark.parametrize("method", ["collect_async", "collect_background"])
@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ([TINY], "lf must be a LazyFrame, got list"),
        (TINY.collect(), r"lf must be a LazyFrame, got .*DataFrame: call its lazy\(\) first"),
        (None, "lf must be a LazyFrame, got NoneType"),
    ],
)
def test_what_is_no_lazy_frame_is_refused_before_anything_runs(collector, method, frame, message):
    with pytest.raises(TypeError, match=message):
        getattr(collector, method)(frame)
    assert not inside.all_threads(collector)


# Slots and the line


@pytest.mark.everywhere(slots=2)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_no_more_than_max_running_queries_run_at_once(slots, executor):
    came, left, both = Notes(), Notes(), Notes()

    def meet(number, notes, step):
        both.append(step)
        notes.append(number)
        group = [*notes].index(number) // slots + 1
        until(lambda: len(notes) >= group * slots)

    def query(number):
        def run(df):
            meet(number, came, +1)  # so that as many as may do run at once
            meet(number, left, -1)
            return df

        return TINY.map_batches(run)

    with Collector(executor=executor, max_running=slots) as collector:
        queries = [query(number) for number in range(slots * 10)]
        # Such that they count as small: else one slot of several were kept from them.
        handles = [collector.collect_async(query, priority=1) for query in queries]
        for handle in handles:
            handle.result(30)
        until(lambda: inside.all_threads(collector) == slots)  # one may still look at its plan
    assert max(accumulate(both)) == slots


def test_queries_run_in_the_order_they_came(collector, blocked):
    order = Notes()

    def note(i):
        return TINY.map_batches(lambda df: (order.append(i), df)[1])

    collector.collect_async(blocked.lf)
    handles = [collector.collect_async(note(i)) for i in range(20)]
    for i in range(0, 20, 7):
        handles[i].cancel()
    blocked.gate.set()
    collector.close(cancel_waiting=False)
    assert [*order] == [i for i in range(20) if i % 7]


def test_failed_queries_give_their_slots_back(collector):
    def fail(df):  # noqa: ARG001
        raise ValueError

    handles = [collector.collect_async(TINY.map_batches(fail)) for _ in range(20)]
    for handle in handles:
        with pytest.raises(ValueError, match=r"^$"):
            handle.result()
    assert collector.collect_async(TINY).result().item() == 1
    assert not inside.running(collector)


def test_thread_that_cannot_start_is_an_error_and_costs_no_slot(collector, monkeypatch):
    def start_new_thread(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threads, "start_new_thread", start_new_thread)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                collector.collect_async(TINY)
    assert not inside.running(collector)
    assert collector.collect_async(TINY).result().item() == 1
    until(lambda: inside.all_threads(collector) == 1)  # it may still look back at the query


def test_context_of_the_caller_reaches_udfs(collector, blocked):
    variable = contextvars.ContextVar("variable", default="unset")
    seen = Notes()

    def note(each):
        seen.append(variable.get())
        variable.set("changed in the query")
        return each

    collector.collect_async(blocked.lf)
    handles = []
    for value, lf in (
        ("first", TINY.map_batches(note)),
        ("second", TINY.select(pl.col("a").map_batches(note, return_dtype=pl.Int64))),
    ):
        token = variable.set(value)
        handles.append(collector.collect_async(lf))
        variable.reset(token)
    blocked.gate.set()
    for handle in handles:
        handle.result()
    assert sorted(seen) == ["first", "second"]
    assert variable.get() == "unset"


@pytest.mark.everywhere
def test_queries_from_many_threads_all_resolve(executor):
    with Collector(executor=executor, max_running=2) as collector, ThreadPoolExecutor(8) as pool:

        def ask(i):
            return collector.collect_async(pl.LazyFrame({"a": [i]})).result(30).item()

        assert list(pool.map(ask, range(400))) == list(range(400))
        assert not inside.running(collector)


# Engines


class Minimal(pl.Engine):
    """The least that `pl.Engine` lets one write."""

    def collect(self, lf, *, optimizations, background=False, post_opt_callback=None):
        assert not background
        assert post_opt_callback is None
        return lf.with_columns(by=pl.lit("minimal")).collect(
            engine="in-memory", optimizations=optimizations
        )

    def execute(self, lf, *, optimizations):
        raise NotImplementedError


def minimal():
    missing = dict.fromkeys(Minimal.__abstractmethods__, None)
    return type("Minimal", (Minimal,), missing)()


@pytest.mark.everywhere
def test_engine_that_can_only_collect_runs_async_queries(collector):
    frame = collector.collect_async(TINY, engine=minimal()).result()
    assert frame.row(0) == (1, "minimal")
    found = collector.collect_all_async(numbered(3), engine=minimal()).result()
    assert [each.row(0) for each in found] == [(i, "minimal") for i in range(3)]
    assert collector.collect_all_async([], engine=minimal()).result() == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_running": 0}, ValueError, "max_running must be .* 1 or more, or None, got 0"),
        ({"max_running": -1}, ValueError, "max_running must be .* 1 or more, or None, got -1"),
        ({"engine": "warp"}, ValueError, "warp"),
        ({"default_engine": "warp"}, ValueError, "warp"),
        ({"gpu": "sometimes"}, ValueError, "sometimes"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Collector(**arguments)


HANDS_ON = re.compile(r"dask_executor|AsyncEngine\.(collect_batches|sink_\w+)")
"""What takes the keywords of dask, or of an engine of Polars, and leaves it to that to judge."""


def public_functions():
    for name in polars_async.__all__:
        found = getattr(polars_async, name)
        members = vars(found).values() if isinstance(found, type) else [found]
        for function in filter(inspect.isfunction, members):
            if not function.__name__.startswith("_") and not HANDS_ON.match(function.__qualname__):
                yield pytest.param(function, id=function.__qualname__)


@pytest.mark.parametrize("function", list(public_functions()))
def test_unknown_keyword_is_told_by_the_function_that_was_called(function):
    message = f"{function.__qualname__}() got an unexpected keyword argument 'no_such'"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        function(no_such=True)


def test_query_on_an_engine_that_is_none_is_refused(collector):
    with pytest.raises(ValueError, match="warp"):
        collector.collect_async(TINY, engine="warp")
    assert not inside.running(collector)


# close


def test_nothing_starts_before_the_first_query_and_all_ends_with_close(ended, executor):
    collector = Collector(executor=executor, max_running=3)
    assert not inside.all_threads(collector)
    assert not collector._gpu._threads.threads
    queries = [Blocked() for _ in range(3)]
    for query in queries:
        collector.collect_async(query.lf)
        assert query.started.wait(30)
        query.gate.set()
    assert 1 <= inside.all_threads(collector) <= 3
    started = inside.all_threads(collector)
    collector.close()
    for _ in range(started):
        assert ended.acquire(timeout=30)


@pytest.mark.everywhere
def test_threads_end_after_a_collector_nobody_holds_and_its_queries_with_it(
    ended, blocked, executor
):
    collector = Collector(executor=executor, max_running=1)
    lanes = [weakref.ref(collector._cpu), weakref.ref(collector._gpu)]
    handles = [collector.collect_async(each) for each in (blocked.lf, TINY, TINY)]
    assert blocked.started.wait(30)
    gone = weakref.ref(collector)
    del collector
    gc.collect()
    assert gone() is None
    assert not ended.acquire(blocking=False)
    blocked.gate.set()
    assert [handle.result(30).item() for handle in handles] == [1, 1, 1]
    assert ended.acquire(timeout=30)
    del handles
    # The thread that has ended may have some way to go.
    until(lambda: gc.collect() >= 0 and [lane() for lane in lanes] == [None, None])


@pytest.mark.everywhere(wait=True, cancel_waiting=True)
@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("cancel_waiting", [True, False])
def test_close_waits_and_cancels_as_asked(collector, blocked, ended, wait, cancel_waiting):
    running = collector.collect_async(blocked.lf)
    waiting = [collector.collect_async(TINY) for _ in range(3)]
    assert blocked.started.wait(30)
    closed = threading.Event()

    def close():
        collector.close(wait=wait, cancel_waiting=cancel_waiting)
        closed.set()

    threading.Thread(target=close).start()
    if wait:
        for handle in waiting if cancel_waiting else []:
            with pytest.raises(CancelledError):
                handle.result(30)
        until(lambda: collector._cpu.admission.closed and inside.closers(collector))
        assert not closed.is_set()
    else:
        assert closed.wait(30)
    assert not running.done()
    assert [handle.done() for handle in waiting] == [cancel_waiting] * 3
    with pytest.raises(CollectorClosedError, match="closed and takes no more queries"):
        collector.collect_async(TINY)
    blocked.gate.set()
    assert closed.wait(30)
    assert running.result(30).item() == 1
    if wait:
        assert all(handle.done() for handle in waiting)
    if not cancel_waiting:
        assert [handle.result(30).item() for handle in waiting] == [1] * 3
    assert ended.acquire(timeout=30)


@pytest.mark.parametrize("method", ["collect_async", "collect_background", "collect_all_async"])
def test_closed_collector_takes_no_query(method):
    collector = Collector()
    for _ in range(2):
        collector.close()
        with pytest.raises(CollectorClosedError):
            getattr(collector, method)([TINY] if "all" in method else TINY)
    assert not inside.all_threads(collector)


def test_many_threads_close_at_once_and_all_wait(collector, blocked):
    handle = collector.collect_async(blocked.lf)
    waiting = collector.collect_async(TINY)
    with ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(lambda: (collector.close(), handle.done(), waiting.done()))
            for _ in range(8)
        ]
        until(lambda: len(inside.closers(collector)) == 8)
        blocked.gate.set()
        assert [future.result(30) for future in futures] == [(None, True, True)] * 8


def test_close_without_waiting_and_then_with(collector, blocked):
    running, waiting = (collector.collect_async(each) for each in (blocked.lf, TINY))
    cancelled = False
    for cancel_waiting in (False, True, False):
        collector.close(wait=False, cancel_waiting=cancel_waiting)
        assert not running.done()
        cancelled = cancelled or cancel_waiting
        assert waiting.done() == cancelled
    blocked.gate.set()
    collector.close()
    assert running.result(0).item() == 1


def test_context_manager_closes_and_lets_the_error_through(blocked, executor):
    collector = Collector(executor=executor, max_running=1)
    handle = collector.collect_async(blocked.lf)
    waiting = collector.collect_async(TINY)
    blocked.gate.set()
    with pytest.raises(KeyError), collector as entered:
        raise {collector: KeyError}[entered]
    assert handle.done()
    assert waiting.done()
    with pytest.raises(CollectorClosedError):
        collector.collect_async(TINY)


def test_close_that_waits_inside_a_udf_is_refused(collector):
    def close(df):
        collector.close()
        return df

    for lf in (TINY.map_batches(close), nested_on_pool(close)):
        with pytest.raises(RuntimeError, match="pass wait=False"):
            collector.collect_async(lf).result()
    assert collector.collect_async(TINY).result().item() == 1


@pytest.mark.everywhere
@pytest.mark.cannot("processes", "dask", because=A_COLLECTOR_STAYS)
def test_close_inside_a_udf_that_does_not_wait(collector):
    def close(df):
        collector.close(wait=False)
        return df

    assert collector.collect_async(TINY.map_batches(close)).result().item() == 1
    with pytest.raises(CollectorClosedError):
        collector.collect_async(TINY)


def nested_on_pool(udf):
    """Two expressions, which Polars runs on the threads of its own pool."""
    both = pl.LazyFrame({"a": [1], "b": [1]})
    return both.select(
        *(pl.col(each).map_batches(udf, return_dtype=pl.Int64) for each in ("a", "b"))
    )


@pytest.mark.everywhere(together=False)
@pytest.mark.parametrize("together", [False, True])
def test_loop_ticks_while_a_query_runs(collector, blocked, together):
    async def main():
        if together:
            handle = collector.collect_all_async([blocked.lf, TINY])
        else:
            handle = collector.collect_async(blocked.lf)
        ticks = 0
        while ticks < 100 or not blocked.started.is_set():
            await asyncio.sleep(0.001)
            ticks += 1
        assert not handle.done()
        blocked.gate.set()
        return await handle

    answer = asyncio.run(main())
    assert (answer[0] if together else answer).item() == 1
