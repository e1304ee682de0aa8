"""Results that arrive one after the other: as_completed and collect_batches_async."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import weakref
from contextlib import aclosing, nullcontext
from functools import partial
from itertools import count
from math import inf
from time import monotonic, sleep

import inside
import polars as pl
import pytest
import trio
from loops import LEFT, Asyncio, Trio, fixture_of
from places import ALL_AT_ONCE, TINY, Blocked, Failure, Notes, Source, until
from polars.exceptions import ComputeError, PanicException

from polars_async import (
    Collector,
    CollectorClosedError,
    EventKind,
    ForkedProcessError,
    QueryTimeoutError,
    QueueFullError,
)
from polars_async.bridges.buffer import BATCHES_AHEAD, Buffer
from polars_async.executors import threads
from polars_async.executors.outcomes import RemoteTraceback
from polars_async.scheduling import query as query_module
from polars_async.scheduling import times
from polars_async.scheduling.admission import Admission
from polars_async.scheduling.query import Query
from polars_async.streams import Batches
from polars_async.testing import simulate_gpu

BOUND = 100
"""More batches than Polars makes ahead of a consumer that stops; fewer than the sources have."""


class Local:
    """What a UDF's frame holds."""


loop = fixture_of(Asyncio, Trio)


async def listed(stream):
    return [item async for item in stream]


def is_awaited(stream):
    arrivals = stream._buffer._arrivals if isinstance(stream, Batches) else stream._arrivals
    return bool(arrivals._waiters)


# What is asked for


@pytest.fixture
def endless(collector):  # noqa: ARG001  # its gate is opened first
    return Source()


@pytest.fixture
def held(collector):  # noqa: ARG001  # its gate is opened first
    source = Source(held_after=1)
    yield source
    source.gate.set()


def numbered(number):
    return pl.LazyFrame({"a": [number]})


def failing(error):
    def fail(df):  # noqa: ARG001
        raise error

    return TINY.map_batches(fail)


PANICKING = pl.select(1).lazy().select(pl.int_range(0, 2**62))


def wait_until_paused(collector, streams=1):
    until(lambda: collector._cpu.admission.paused >= streams)


def assert_free(collector):
    """All slots and threads are back, with no consumer to help."""
    collector.close()
    stats = collector.stats()
    assert (stats["running"], stats["waiting"]) == (0, 0)
    until(lambda: not inside.threads_in_use(collector))


# as_completed


@pytest.mark.everywhere
def test_results_come_in_the_order_of_completion_with_their_positions(loop, executor):
    queries = [Blocked() for _ in range(3)]

    async def main():
        found = []
        queries[1].gate.set()
        async for number, frame in stream:
            found.append((number, frame.item()))
            for query in queries[::-1]:
                if not query.gate.is_set():
                    query.gate.set()
                    break
        return found

    with Collector(executor=executor, max_running=3) as collector:
        # Such that they count as small, and may have all the slots.
        stream = collector.as_completed([query.lf for query in queries], priority=1)
        assert loop.run(main) == [(1, 1), (2, 1), (0, 1)]


def test_all_results_come_of_any_iterable(loop, collector):
    frames = [numbered(i) for i in range(100)]
    for given in (frames, tuple(frames), iter(frames)):
        found = loop.run(listed, collector.as_completed(given))
        assert sorted((number, frame.item()) for number, frame in found) == [
            (i, i) for i in range(100)
        ]
    assert collector.stats()["completed"] == 300


def test_no_frames_end_at_once(loop, collector):
    assert loop.run(listed, collector.as_completed([])) == []


@pytest.mark.parametrize("items", [0, 1])
def test_stream_that_ended_stays_ended(loop, collector, items):
    async def main(stream):
        await listed(stream)
        return [await listed(stream) for _ in range(2)]

    frames = [TINY] * items
    assert loop.run(main, collector.as_completed(frames)) == [[], []]
    if items:
        assert loop.run(main, collector.collect_batches_async(TINY)) == [[], []]


ERRORS = [Failure, KeyError, RuntimeError, KeyboardInterrupt, SystemExit]


def asked(collector, kind, lf):
    if kind == "as_completed":
        return collector.as_completed([lf])
    return collector.collect_batches_async(lf)


KINDS = ["as_completed", "collect_batches_async"]


@pytest.mark.everywhere(kind="collect_batches_async", error=[Failure, KeyboardInterrupt])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", ERRORS)
def test_error_arrives_unchanged_and_alone(loop, collector, kind, error, is_that):
    error = error("no")
    raised = []

    async def main():
        try:
            await listed(asked(collector, kind, failing(error)))
        except BaseException as caught:  # noqa: BLE001  # KeyboardInterrupt, for one
            raised.append((caught, caught.__context__, caught.__cause__))

    loop.run(main)
    ((found, context, cause),) = raised
    assert is_that(found, error)
    assert context is None
    assert cause is None or isinstance(cause, RemoteTraceback)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
def test_error_that_would_end_a_loop_arrives_in_another(loop, collector, kind, error, is_that):
    error = error("no")
    with pytest.raises(RuntimeError, match=f"the query raised {type(error).__name__}") as raised:
        loop.run(listed, asked(collector, kind, failing(error)))
    assert is_that(raised.value.__cause__, error)


@pytest.mark.everywhere(kind="collect_batches_async")
@pytest.mark.parametrize("kind", KINDS)
def test_panic_arrives(loop, collector, kind, capfd):
    with pytest.raises(PanicException):
        loop.run(listed, asked(collector, kind, PANICKING))
    capfd.readouterr()  # which has what Rust says of it
    assert collector.collect_async(TINY).result().item() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_polars_arrives(loop, collector, kind):
    broken = pl.LazyFrame({"a": ["x"]}).select(pl.col("a").cast(pl.Int64))
    with pytest.raises(pl.exceptions.InvalidOperationError):
        loop.run(listed, asked(collector, kind, broken))


@pytest.mark.everywhere
def test_failure_comes_at_its_turn_and_cancels_the_others(loop, collector, blocked, is_given_up):
    ran = Notes()
    frames = [numbered(5), failing(Failure()), blocked.lf, noting(ran), noting(ran)]

    async def main():
        found = []
        stream = collector.as_completed(frames)
        assert blocked.started.wait(30)
        with pytest.raises(Failure):  # noqa: PT012  # the loop is what is tested
            async for number, frame in stream:
                found.append((number, frame.item()))
        assert found == [(0, 5)]
        return await listed(stream)

    assert loop.run(main) == []
    stats = collector.stats()
    assert (stats["completed"], stats["failed"], stats["cancelled"]) == (1, 1, 3)
    assert stats["waiting"] == 0
    is_given_up(collector)
    blocked.gate.set()
    assert_free(collector)
    assert not ran


def noting(ran):
    return TINY.map_batches(lambda df: (ran.append(1), df)[1])


def test_wrong_frame_schedules_nothing(collector):
    for wrong, message in (
        ([TINY, 5], r"lazy_frames\[1\] must be a LazyFrame, got int"),
        (TINY, "put a single frame in a list"),
    ):
        with pytest.raises(TypeError, match=message):
            collector.as_completed(wrong)
    for wrong in (5, None, TINY.collect(), [TINY]):
        with pytest.raises(TypeError, match="lf must be a LazyFrame"):
            collector.collect_batches_async(wrong)
    for chunk_size in (0, -1):
        with pytest.raises(ValueError, match="chunk_size must be 1 or more rows"):
            collector.collect_batches_async(TINY, chunk_size=chunk_size)
    for options in ({"timeout": 0}, {"priority": 11}, {"engine": "warp"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            collector.as_completed([TINY], **options)
        with pytest.raises(ValueError, match=next(iter(options))):
            collector.collect_batches_async(TINY, **options)
    assert collector.stats()["submitted"] == 0
    assert not inside.all_threads(collector)


def test_full_queue_in_the_midst_cancels_what_was_scheduled(blocked, executor):
    ran = Notes()
    with Collector(executor=executor, max_running=1, max_waiting=2) as collector:
        with pytest.raises(QueueFullError):
            collector.as_completed([blocked.lf, *[noting(ran) for _ in range(5)]])
        stats = collector.stats()
        assert (stats["cancelled"], stats["rejected"], stats["waiting"]) == (3, 1, 0)
        blocked.gate.set()
    assert not ran


def test_closed_collector_takes_no_stream():
    collector = Collector()
    collector.close()
    with pytest.raises(CollectorClosedError):
        collector.as_completed([TINY])
    with pytest.raises(CollectorClosedError):
        collector.collect_batches_async(TINY)


def test_timeout_is_that_of_each_query(loop, collector, blocked):
    async def main():
        # The second one, too: it has the slot of the first where that is late before it begins.
        stream = collector.as_completed([blocked.lf, blocked.lf], timeout=0.01, label="late")
        with pytest.raises(QueryTimeoutError, match=r"'late' was not done after 0.01 s"):
            await listed(stream)
        return await listed(stream)

    assert loop.run(main) == []
    stats = collector.stats()
    assert stats["timed_out"] >= 1
    assert stats["timed_out"] + stats["cancelled"] == 2
    assert stats["waiting"] == 0


def test_result_in_time_is_not_late(loop, collector):
    assert len(loop.run(listed, collector.as_completed([TINY] * 5, timeout=30))) == 5
    assert len(loop.run(listed, collector.collect_batches_async(TINY, timeout=30))) == 1


@pytest.mark.parametrize("consumers", [2, 5])
def test_consumers_of_one_stream_share_the_results_and_all_end(loop, collector, blocked, consumers):
    def streams():
        frames = [numbered(i) for i in range(60)]
        yield collector.as_completed([blocked.lf, *frames]), 61
        lf = pl.LazyFrame({"a": range(60)})
        yield collector.collect_batches_async(lf, chunk_size=1), 60

    async def main(stream, items):
        found, ended = [], []

        async def consume():
            async for item in stream:
                found.append(item[0] if isinstance(item, tuple) else item.item())
                await loop.sleep(0)
            ended.append(1)

        async def release():
            while len(ended) < consumers and not is_awaited(stream):
                await loop.sleep(0)
            blocked.gate.set()

        await loop.together(*[consume] * consumers, release)
        assert sorted(found) == list(range(items))
        assert len(ended) == consumers

    for stream, items in streams():
        loop.run(main, stream, items)


def test_stream_is_passed_from_loop_to_loop(collector):
    stream = collector.collect_batches_async(pl.LazyFrame({"a": range(6)}), chunk_size=1)

    async def two():
        return [(await anext(stream)).item() for _ in range(2)]

    found = [asyncio.run(two()), trio.run(two), asyncio.run(two())]
    assert found == [[0, 1], [2, 3], [4, 5]]


# Leaving early

# Each takes the only reference to a stream that has given nothing yet, and leaves after one item.


async def by_break(loop, box):  # noqa: ARG001
    async for _ in box.pop():
        break


async def by_an_exception(loop, box):  # noqa: ARG001
    with pytest.raises(Failure):
        await fail_within(box)


async def fail_within(box):
    async for _ in box.pop():
        raise Failure


async def by_aclosing(loop, box):  # noqa: ARG001
    async with aclosing(box[0]) as stream:
        async for _ in stream:
            break


async def by_async_with(loop, box):  # noqa: ARG001
    with pytest.raises(Failure):  # noqa: PT012  # as above
        async with box[0] as stream:
            async for _ in stream:
                raise Failure


async def by_close(loop, box):  # noqa: ARG001
    await anext(box[0])
    for _ in range(2):
        box[0].close()


async def by_cancellation(loop, box):
    async def consume():
        await listed(box[0])

    await anext(box[0])
    await loop.cancel_when(lambda: is_awaited(box[0]), consume)


async def by_a_scope(loop, box):
    await anext(box[0])
    assert await loop.within(0.001, partial(listed, box[0])) is LEFT


async def by_a_failing_sibling(loop, box):
    async def fail():
        while not is_awaited(box[0]):
            await loop.sleep(0)
        raise Failure

    async def consume():
        await listed(box[0])

    await anext(box[0])
    with pytest.raises(ExceptionGroup) as caught:
        await loop.together(consume, fail)
    assert [type(each) for each in caught.value.exceptions] == [Failure]


async def by_dropping_it(loop, box):  # noqa: ARG001
    await anext(box[0])
    box.clear()


WAYS = [
    by_break,
    by_an_exception,
    by_aclosing,
    by_async_with,
    by_close,
    by_cancellation,
    by_a_scope,
    by_a_failing_sibling,
    by_dropping_it,
]


@pytest.mark.parametrize("leave", WAYS)
def test_leaving_cancels_the_other_queries_at_once(loop, collector, blocked, leave):
    ran = Notes()

    async def main():
        await leave(loop, box)
        stats = collector.stats()
        assert (stats["cancelled"], stats["waiting"], stats["completed"]) == (3, 0, 1)
        for stream in box:  # where it is still there, it is over
            assert await listed(stream) == []

    box = [collector.as_completed([TINY, blocked.lf, noting(ran), noting(ran)])]
    loop.run(main)
    blocked.gate.set()
    assert_free(collector)
    assert not ran


@pytest.mark.everywhere(leave=by_break)
@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.cannot("dask", because=ALL_AT_ONCE, runs=False)
def test_leaving_cancels_a_query_that_computes(loop, collector, held, leave, is_given_up):
    async def main():
        await leave(loop, box)
        assert collector.stats()["cancelled"] == 1
        is_given_up(collector)
        held.gate.set()
        # The slot is back without another batch having been asked for.
        assert (await collector.collect_async(TINY)).item() == 1
        for stream in box:
            assert await listed(stream) == []

    box = [collector.collect_batches_async(held.lf, chunk_size=1)]
    loop.run(main)
    assert_free(collector)
    assert held.made < BOUND


@pytest.mark.everywhere(leave=by_break)
@pytest.mark.parametrize(
    "leave", [each for each in WAYS if each not in (by_cancellation, by_a_scope)]
)
@pytest.mark.cannot("dask", because=ALL_AT_ONCE, runs=False)
def test_leaving_frees_a_query_that_is_held_up(loop, collector, endless, leave):
    async def main():
        if leave is by_a_failing_sibling:  # nobody waits for a batch where some lie ready
            return
        wait_until_paused(collector)
        await leave(loop, box)
        assert collector.stats()["cancelled"] == 1

    box = [collector.collect_batches_async(endless.lf, chunk_size=1)]
    loop.run(main)
    box.clear()
    assert_free(collector)


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_a_stream_nobody_iterated_cancels_all(collector, blocked, kind):
    ran = Notes()
    collector.collect_async(blocked.lf)
    stream = asked(collector, kind, noting(ran))
    assert collector.stats()["waiting"] == 1
    del stream
    stats = collector.stats()
    assert (stats["cancelled"], stats["waiting"]) == (1, 0)
    blocked.gate.set()
    assert_free(collector)
    assert not ran


@pytest.mark.parametrize("leave", [by_break, by_close])
def test_query_of_a_stream_that_is_left_is_cancelled_however_soon_it_could_end(
    loop, collector, endless, leave, monkeypatch
):
    cancel = Query.cancel

    def cancel_late(query):
        ended = monotonic() + 0.2  # where the query may end before, this is time enough
        until(lambda: query.done or monotonic() > ended)
        return cancel(query)

    monkeypatch.setattr(Query, "cancel", cancel_late)
    box = [collector.collect_batches_async(endless.lf, chunk_size=1)]
    loop.run(leave, loop, box)
    assert collector.stats()["cancelled"] == 1


def test_queries_of_a_stream_that_is_closed_do_not_start_in_the_slots_of_others(
    collector, monkeypatch
):
    ran, came, run, cancel = Notes(), [], Query.run, Query.cancel

    def run_late(query, place):
        came.append(query)
        if query is came[0]:
            until(lambda: query.done)
        run(query, place)

    def cancel_slowly(query):
        cancelled, ended = cancel(query), monotonic() + 0.2
        until(lambda: ran or monotonic() > ended)  # where another can start, this is time enough
        return cancelled

    monkeypatch.setattr(Query, "run", run_late)
    monkeypatch.setattr(Query, "cancel", cancel_slowly)
    collector.as_completed([TINY, noting(ran)]).close()
    collector.close(cancel_waiting=False)
    assert not ran


def test_dropping_a_stream_nobody_iterated_frees_a_query_that_is_held_up(collector, endless):
    stream = collector.collect_batches_async(endless.lf, chunk_size=1)
    wait_until_paused(collector)
    del stream
    assert_free(collector)


def test_consumer_on_another_thread_is_told_of_close(loop, collector, held):
    stream = collector.collect_batches_async(held.lf, chunk_size=1)
    found = []
    consumer = threading.Thread(target=lambda: found.append(len(loop.run(listed, stream))))
    consumer.start()
    until(lambda: is_awaited(stream) and held.made)
    stream.close()
    consumer.join(30)
    assert found in ([0], [1])


# collect_batches_async

ROWS = 3000
NUMBERS = pl.LazyFrame({"a": range(ROWS)})
ENGINES = ["in-memory", "streaming", None]


@pytest.mark.everywhere(engine=["in-memory", None], chunk_size=999)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk_size", [None, 1000, 999, 10 * ROWS])
def test_batches_are_those_of_polars(loop, collector, engine, chunk_size):
    lf = NUMBERS.filter(pl.col("a") % 3 == 0).with_columns(b=pl.col("a").cast(pl.String))
    stream = collector.collect_batches_async(lf, engine=engine, chunk_size=chunk_size)
    found = loop.run(listed, stream)
    assert pl.concat(found).equals(lf.collect())
    of_polars = lf.collect_batches(engine=engine or "streaming", chunk_size=chunk_size)
    assert sum(frame.height for frame in of_polars) == ROWS / 3
    if chunk_size is not None:
        heights = [frame.height for frame in found]
        assert set(heights[:-1]) <= {chunk_size}
        assert heights[-1] <= chunk_size


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_in_any_order_are_the_same_rows(loop, collector, engine):
    stream = collector.collect_batches_async(
        NUMBERS, engine=engine, chunk_size=100, maintain_order=False
    )
    found = loop.run(listed, stream)
    assert pl.concat(found).sort("a").equals(NUMBERS.collect())


@pytest.mark.parametrize("engine", ENGINES)
def test_empty_result_has_no_batch_as_in_polars(loop, collector, engine):
    lf = NUMBERS.filter(pl.col("a") < 0)
    assert list(lf.collect_batches(engine=engine or "streaming")) == []
    assert loop.run(listed, collector.collect_batches_async(lf, engine=engine)) == []
    assert collector.stats()["completed"] == 1


def test_batches_come_of_the_streaming_engine_where_none_is_asked_for(collector):
    stream = collector.collect_batches_async(TINY)
    assert stream.resolution.name == "streaming"
    assert collector.collect_batches_async(TINY, engine="in-memory").resolution.name == "in-memory"


@pytest.mark.everywhere
@pytest.mark.cannot("dask", because=ALL_AT_ONCE, runs=False)
def test_first_batch_comes_before_the_end(loop, collector, held):
    async def main():
        stream = collector.collect_batches_async(held.lf, chunk_size=1)
        return (await anext(stream)).item()

    assert loop.run(main) == 0
    assert held.made == 1


@pytest.mark.everywhere(batches=None)
@pytest.mark.parametrize("batches", [1000, None])
@pytest.mark.cannot("dask", because=ALL_AT_ONCE, runs=False)
def test_consumer_that_stops_holds_its_query_up(loop, collector, batches):
    async def main():
        stream = collector.collect_batches_async(source.lf, chunk_size=1)
        await anext(stream)
        wait_until_paused(collector)
        for _ in range(50):  # which is time enough to go on, if it did
            await collector.collect_async(TINY, engine="streaming")
        assert len(inside.lying_ready(stream._buffer)) == BATCHES_AHEAD
        return source.made

    source = Source(batches)
    assert loop.run(main) < BOUND


@pytest.mark.everywhere(engine="streaming")
@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_no_batch_is_put_while_two_lie_ready(loop, collector, monkeypatch, engine):
    lying = []
    put = Buffer.put

    def note_and_put(buffer, batch):
        lying.append(len(inside.lying_ready(buffer)))
        return put(buffer, batch)

    monkeypatch.setattr(Buffer, "put", note_and_put)
    stream = collector.collect_batches_async(NUMBERS, engine=engine, chunk_size=10)
    assert len(loop.run(listed, stream)) == ROWS // 10
    assert len(lying) == ROWS // 10
    assert max(lying) < BATCHES_AHEAD


class Paused:
    """Stands in for a query that is paused, and resumed when the test opens the gate."""

    def __init__(self):
        self.gates = []

    def clock_stopped(self):
        return nullcontext()

    def pause(self):
        self.gates.append(threading.Lock())
        self.gates[-1].acquire()
        return self.gates[-1]

    def resume(self):
        pass

    def let_end(self):
        for gate in self.gates:
            if gate.locked():
                gate.release()


def test_query_that_is_resumed_after_the_room_was_filled_is_paused_again():
    buffer, producer = Buffer(), Paused()
    buffer.bind(producer)
    for number in range(BATCHES_AHEAD - 1):
        buffer.put(number)
    putting = threading.Thread(target=buffer.put, args=(BATCHES_AHEAD,))
    putting.start()
    until(lambda: producer.gates)
    producer.gates[0].release()
    putting.join(0.2)  # where it goes on, this is time enough to see it
    goes_on = not putting.is_alive()
    buffer.close()
    putting.join(30)
    assert not goes_on
    assert not putting.is_alive()


@pytest.mark.everywhere(engine="streaming", other="in-memory")
@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
@pytest.mark.parametrize("other", ["in-memory", "streaming"])
def test_consumer_asks_for_other_queries_on_the_one_slot(
    loop, collector, engine, other, monkeypatch
):
    monkeypatch.setattr(query_module, "_WORTH_ESTIMATING", inf)  # else a thread more may be taken

    async def main():
        total = 0
        async for batch in collector.collect_batches_async(NUMBERS, engine=engine, chunk_size=100):
            found = await collector.collect_async(batch.lazy().sum(), engine=other)
            total += found.item()
        return total

    assert loop.run(main) == sum(range(ROWS))
    assert inside.all_threads(collector) <= 2


@pytest.mark.everywhere(engine="streaming", streams=2)
@pytest.mark.parametrize("streams", [2, 8])
@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_streams_on_one_slot_are_read_in_step(loop, collector, streams, engine):
    async def main():
        each = [
            collector.collect_batches_async(
                NUMBERS.select(pl.col("a") + i), engine=engine, chunk_size=500
            )
            for i in range(streams)
        ]
        for start in range(0, ROWS, 500):
            for i, stream in enumerate(each):
                assert (await anext(stream))["a"][0] == start + i
        assert [await listed(stream) for stream in each] == [[]] * streams

    loop.run(main)
    assert collector.stats()["completed"] == streams


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_queries_go_on_beside_many_streams_that_are_held_up(loop, engine, executor):
    async def main():
        wait_until_paused(collector, len(streams))
        for other in ("in-memory", "streaming"):
            lf = NUMBERS.group_by(pl.col("a") % 10).len().join(NUMBERS, on="a").sort("a")
            assert (await collector.collect_async(lf, engine=other)).height == 10
        both = [collector.collect_async(TINY), collector.collect_async(TINY, engine="streaming")]
        assert [(await handle).item() for handle in both] == [1, 1]
        assert [(await anext(stream))["a"][0] for stream in streams] == [0] * len(streams)

    with Collector(executor=executor, max_running=2) as collector:
        streams = [
            collector.collect_batches_async(NUMBERS, engine=engine, chunk_size=10)
            for _ in range(12)
        ]
        loop.run(main)
        for stream in streams:
            stream.close()
    assert collector.stats()["running"] == 0


def test_python_sources_go_on_beside_streams_of_python_sources_that_are_held_up(loop, collector):
    sources = [Source() for _ in range(6)]

    async def main():
        streams = [collector.collect_batches_async(each.lf, chunk_size=1) for each in sources]
        wait_until_paused(collector, len(streams))
        found = await collector.collect_async(Source(50).lf.sum(), engine="streaming")
        assert found.item() == sum(range(50))

    loop.run(main)
    assert_free(collector)


def test_stream_that_is_held_up_takes_no_slot_from_others(blocked, executor):
    with Collector(executor=executor, max_running=2, max_waiting=0) as collector:
        stream = collector.collect_batches_async(NUMBERS, chunk_size=10)
        wait_until_paused(collector)
        running = collector.collect_async(blocked.lf, priority=1)
        try:
            # One of two slots is free.
            assert collector.collect_async(TINY, priority=1).result(30).item() == 1
        finally:
            blocked.gate.set()
            stream.close()
        assert running.result(30).item() == 1


def test_time_that_a_stream_is_held_up_is_not_work(loop, collector, monkeypatch):
    clock = count()
    late = [0.0]
    monkeypatch.setattr(times, "perf_counter", lambda: late[0] + next(clock) * 1e-9)
    lf = pl.LazyFrame({"a": range(ROWS)})
    stream = collector.collect_batches_async(lf, chunk_size=100)
    wait_until_paused(collector)
    late[0] += 3600
    assert len(loop.run(listed, stream)) == ROWS // 100
    assert collector.collect_async(TINY).result().item() == 1  # after what there was to learn
    assert collector.stats()["run_seconds"] < 3600
    expected = collector._cpu._costs.of((lf,), "streaming")
    assert expected.seconds < 3600


@pytest.mark.everywhere
def test_thread_that_cannot_start_costs_no_slot_when_a_stream_is_held_up(
    loop, collector, monkeypatch
):
    source = Source(5, held_after=0)
    stream = collector.collect_batches_async(source.lf, chunk_size=1)
    waiting = collector.collect_async(TINY)

    def start_new_thread(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threads, "start_new_thread", start_new_thread)
        source.gate.set()
        try:
            loop.run(listed, stream)
        except (RuntimeError, ComputeError) as error:
            assert "can't start new thread" in str(error)  # noqa: PT017  # it may, or may not
    assert waiting.result(30).item() == 1
    assert collector.collect_async(TINY).result(30).item() == 1
    until(lambda: not inside.threads_in_use(collector))


# Errors of a stream


@pytest.mark.everywhere(error=Failure)
@pytest.mark.parametrize("error", [Failure, KeyError])
def test_batches_before_an_error_come_first(loop, collector, error):
    source = Source(7, error=error("late"))

    async def main():
        found = []
        stream = collector.collect_batches_async(source.lf, chunk_size=1)
        try:
            async for batch in stream:
                found.append(batch.item())  # noqa: PERF401  # they count where it fails, too
        except (Failure, KeyError, ComputeError) as caught:
            assert "late" in str(caught)  # noqa: PT017  # its type is what Polars makes of it
        else:
            found.append("no error")
        assert await listed(stream) == []
        return found

    found = loop.run(main)
    # Polars drops those that it had not handed over when the source failed.
    assert found == list(range(len(found)))
    assert collector.stats()["failed"] == 1


@pytest.mark.everywhere
def test_batches_that_lie_ready_come_before_the_error(loop, collector, monkeypatch):
    """As above, with the error raised where all was handed over."""
    error = Failure("late")
    put = Buffer.put
    puts = []

    def put_and_fail(buffer, batch):
        puts.append(1)
        if len(puts) == 3:
            raise error
        return put(buffer, batch)

    monkeypatch.setattr(Buffer, "put", put_and_fail)

    async def main():
        found = []
        stream = collector.collect_batches_async(NUMBERS, engine="in-memory", chunk_size=10)
        await anext(stream)
        while not stream._query.done:
            await loop.sleep(0)
        try:
            async for batch in stream:
                found.append(batch["a"][0])  # noqa: PERF401  # as above
        except (Failure, ComputeError) as caught:
            assert "late" in str(caught)  # noqa: PT017  # as above
            return found

    assert loop.run(main) == [10]


@pytest.mark.everywhere
@pytest.mark.parametrize("is_held_up", [False, True])
@pytest.mark.cannot("dask", because=ALL_AT_ONCE, runs=False)
def test_stream_out_of_time_ends_with_the_error(loop, collector, held, endless, is_held_up):
    source = endless if is_held_up else held

    async def main():
        stream = collector.collect_batches_async(source.lf, chunk_size=1, timeout=3600)
        if is_held_up:
            wait_until_paused(collector)
        else:
            await anext(stream)
        inside.let_time_be_up(stream)
        with pytest.raises(QueryTimeoutError, match=r"was not done after 3600 s"):
            await listed(stream)
        assert await listed(stream) == []
        source.gate.set()

    loop.run(main)
    stats = collector.stats()
    assert (stats["timed_out"], stats["cancelled"]) == (1, 0)
    assert_free(collector)


def test_stream_out_of_time_in_the_queue_never_runs(loop, collector, blocked):
    ran = Notes()

    async def main():
        stream = collector.collect_batches_async(noting(ran), timeout=0.01)
        with pytest.raises(QueryTimeoutError, match="never ran"):
            await listed(stream)

    collector.collect_async(blocked.lf)
    loop.run(main)
    blocked.gate.set()
    assert_free(collector)
    assert not ran


# The end of the collector


@pytest.mark.everywhere(fetched=1)
@pytest.mark.parametrize("fetched", [0, 1])
@pytest.mark.cannot("dask", because=ALL_AT_ONCE, runs=False)
def test_close_does_not_wait_for_a_consumer(loop, collector, endless, fetched):
    async def main(stream):
        for _ in range(fetched):
            await anext(stream)
        wait_until_paused(collector)
        collector.close()
        with pytest.raises(loop.cancelled):
            await listed(stream)
        assert await listed(stream) == []

    stream = collector.collect_batches_async(endless.lf, chunk_size=1)
    loop.run(main, stream)
    assert collector.stats()["running"] == 0


def test_stream_that_starts_while_close_lists_what_it_cancels_is_cancelled(
    collector, blocked, endless, monkeypatch
):
    def listing(name):
        listed = getattr(Admission, name)

        def list_and_let_start(admission):
            found = listed(admission)
            if threading.current_thread() is closer and admission is collector._cpu.admission:
                blocked.gate.set()
                until(lambda: not inside.waiting(collector))
            return found

        monkeypatch.setattr(Admission, name, list_and_let_start)

    collector.collect_async(blocked.lf)
    assert blocked.started.wait(30)
    stream = collector.collect_batches_async(endless.lf, chunk_size=1)
    closer = threading.Thread(target=lambda: collector.close(wait=False))
    for name in ("in_slots", "in_queue"):
        listing(name)
    closer.start()
    closer.join(30)
    assert stream._query.done


def test_aclose_does_not_wait_for_a_consumer(loop, endless, executor):
    async def main():
        async with Collector(executor=executor) as collector:
            stream = collector.collect_batches_async(endless.lf, chunk_size=1)
            await anext(stream)
        return stream, collector.stats()["running"]

    assert loop.run(main)[1] == 0


def test_close_in_the_body_of_the_loop_ends_the_stream(loop, collector, endless):
    async def main():
        with pytest.raises(loop.cancelled):  # noqa: PT012  # as above
            async for _ in collector.collect_batches_async(endless.lf, chunk_size=1):
                collector.close()

    loop.run(main)
    assert collector.stats()["running"] == 0


def test_close_tells_who_waits_for_completions(loop, collector, blocked):
    async def main(stream):
        collector.close(wait=False)
        blocked.gate.set()
        found = [(await anext(stream))[0] for _ in range(2)]
        with pytest.raises(loop.cancelled):
            await anext(stream)
        return found

    # It runs on, while those behind it are cancelled.
    stream = collector.as_completed([blocked.lf, TINY])
    assert blocked.started.wait(30)
    with pytest.raises(loop.cancelled):
        loop.run(main, stream)


@pytest.mark.everywhere
def test_batches_that_lie_ready_survive_the_collector(loop, executor):
    collector = Collector(executor=executor)
    stream = collector.collect_batches_async(TINY)
    until(lambda: stream._query.done)
    collector.close()
    assert [frame.item() for frame in loop.run(listed, stream)] == [1]


@pytest.mark.everywhere
def test_stream_of_a_collector_nobody_holds_goes_on(loop, executor):
    stream = Collector(executor=executor, max_running=1).collect_batches_async(
        NUMBERS, chunk_size=10
    )
    gc.collect()
    assert sum(frame.height for frame in loop.run(listed, stream)) == ROWS


# What is told


@pytest.mark.everywhere
def test_stream_is_counted_and_reported_once(loop, executor):
    events = []
    with Collector(executor=executor, max_running=1, on_event=events.append) as collector:
        loop.run(
            listed, collector.collect_batches_async(NUMBERS, chunk_size=100, label="the stream")
        )
        collector.close()
    assert [event.kind for event in events] == [
        EventKind.QUEUED,
        EventKind.STARTED,
        EventKind.FINISHED,
    ]
    assert {(event.label, event.engine) for event in events} == {("the stream", "streaming")}
    assert [event.rows for event in events] == [None, None, ROWS]
    stats = collector.stats()
    assert (stats["submitted"], stats["completed"], stats["running"]) == (1, 1, 0)


def test_stream_left_early_is_reported_cancelled(loop, endless, executor):
    async def main():
        async for _ in collector.collect_batches_async(endless.lf, chunk_size=1):
            break

    events = []
    with Collector(executor=executor, max_running=1, on_event=events.append) as collector:
        loop.run(main)
    assert [event.kind for event in events] == [
        EventKind.QUEUED,
        EventKind.STARTED,
        EventKind.CANCELLED,
    ]


# The GPU


@pytest.fixture
def offloading():
    with simulate_gpu(), Collector(gpu="offload", max_running=1) as offloading:
        yield offloading
    assert offloading.stats()["running"] == 0
    assert offloading.stats()["fell_back"] == 0


@pytest.mark.parametrize("chunk_size", [None, 1000, 999])
def test_result_of_the_gpu_is_cut_up(loop, offloading, chunk_size):
    stream = offloading.collect_batches_async(NUMBERS, engine="gpu", chunk_size=chunk_size)
    assert stream.resolution.name == "gpu"
    found = loop.run(listed, stream)
    assert pl.concat(found).equals(NUMBERS.collect())
    assert len(found) == {None: 1, 1000: 3, 999: 4}[chunk_size]


def test_empty_result_of_the_gpu_has_no_batch(loop, offloading):
    lf = NUMBERS.filter(pl.col("a") < 0)
    assert loop.run(listed, offloading.collect_batches_async(lf, engine="gpu")) == []


def test_next_query_has_the_gpu_while_a_stream_is_held_up(loop, offloading):
    async def main():
        total = 0
        async for batch in offloading.collect_batches_async(NUMBERS, engine="gpu", chunk_size=100):
            total += (await offloading.collect_async(batch.lazy().sum(), engine="gpu")).item()
        return total

    assert loop.run(main) == sum(range(ROWS))


def test_leaving_a_stream_of_the_gpu_frees_it(loop, offloading):
    async def main():
        async for _ in offloading.collect_batches_async(NUMBERS, engine="gpu", chunk_size=1):
            break

    loop.run(main)
    offloading.close()
    assert offloading.stats()["running"] == 0


# What is left behind


@pytest.fixture
def _without_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def arrived(stream, query):
    if isinstance(stream, Batches):
        return list(inside.lying_ready(stream._buffer))
    return [query._outcome.value]


async def await_last(box):
    try:
        async for _ in box.pop():
            pass
    except Failure:
        return True


@pytest.mark.usefixtures("_without_garbage_collection")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", [lambda *a: asyncio.run(a[0](*a[1:])), trio.run])
def test_error_and_its_frames_are_freed_with_the_stream(collector, kind, run):
    seen = []

    def fail(df):  # noqa: ARG001
        local = Local()
        seen.append(weakref.ref(local))
        raise Failure

    box = [asked(collector, kind, TINY.map_batches(fail))]
    assert run(await_last, box)
    until(lambda: seen[0]() is None)  # its thread may have some way to go


@pytest.mark.usefixtures("_without_garbage_collection")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_iterated", [False, True])
def test_results_are_freed_with_the_stream(collector, kind, is_iterated):
    seen = []

    def note(df):
        seen.append(weakref.ref(df))
        return df

    box = [asked(collector, kind, TINY.map_batches(note))]
    until(lambda: collector.stats()["completed"])
    query = weakref.ref(
        box[0]._query if kind == "collect_batches_async" else next(iter(box[0]._queries.values()))
    )
    if is_iterated:
        asyncio.run(await_last(box))
    else:
        box.clear()
    until(lambda: seen[0]() is None and query() is None)  # as above


@pytest.mark.everywhere(kind="collect_batches_async")
@pytest.mark.usefixtures("_without_garbage_collection")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
def test_query_and_what_came_of_it_are_freed_with_the_stream(collector, kind, fails):
    def udf(df):
        if fails:
            raise Failure
        return df

    box = [asked(collector, kind, TINY.map_batches(udf))]
    (query,) = [box[0]._query] if isinstance(box[0], Batches) else box[0]._queries.values()
    while not query.done:
        sleep(0.001)
    outcomes = [query._outcome.error] if fails else arrived(box[0], query)
    seen = [weakref.ref(each) for each in (query, *outcomes)]
    del query, outcomes
    asyncio.run(await_last(box))
    until(lambda: [each() for each in seen] == [None] * len(seen))  # as above


@pytest.mark.usefixtures("_without_garbage_collection")
@pytest.mark.parametrize("kind", KINDS)
def test_stream_that_never_ran_is_freed(collector, blocked, kind):
    collector.collect_async(blocked.lf)
    local = Local()
    alive = weakref.ref(local)
    stream = asked(collector, kind, TINY.map_batches(lambda df, _=local: df))
    del local
    assert alive() is not None
    del stream
    assert alive() is None


@pytest.mark.everywhere
@pytest.mark.usefixtures("_without_garbage_collection")
def test_batch_is_freed_once_its_consumer_leaves(collector):
    async def main():
        stream = collector.collect_batches_async(NUMBERS, chunk_size=1000)
        batch = await anext(stream)
        seen = weakref.ref(batch)
        del batch
        await anext(stream)
        return seen()

    assert asyncio.run(main()) is None


# The end of the process

LEAVE_AND_EXIT = """
import asyncio, sys
import polars as pl
from polars_async import Collector

engine, how = sys.argv[1:]
collector = Collector(max_running=2)
others = [Collector(max_running=2) for _ in range(3)]
lf = pl.LazyFrame({"a": range(100_000)})
stream = None

async def leave(collector):
    async for _ in collector.collect_batches_async(lf, engine=engine, chunk_size=1000):
        break

async def leave_all():
    await asyncio.gather(*map(leave, [collector, *others]))

async def keep():
    global stream
    stream = collector.collect_batches_async(lf, engine=engine, chunk_size=1000)
    await anext(stream)
    while not collector._cpu.admission.paused:
        pass

asyncio.run(keep() if how == "kept" else leave_all())
print("the end")
"""


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
@pytest.mark.parametrize("how", ["kept", "left"])
def test_program_exits_with_an_unfinished_stream(run_script, engine, how):
    assert run_script(LEAVE_AND_EXIT, engine, how) == ["the", "end"]


@pytest.mark.everywhere(kind="collect_batches_async")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_stream_in_a_forked_child_raises(loop, collector, blocked, kind):
    stream = asked(collector, kind, blocked.lf)
    assert blocked.started.wait(30)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which pytest-timeout has taken
        signal.alarm(60)
        status = 1
        try:
            loop.run(listed, stream)
        except ForkedProcessError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_other_tasks_run_while_every_result_lies_ready(kind):
    async def main():
        turns = 0

        async def turn():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        with Collector() as collector:
            frames = [TINY] * 20
            stream = collector.as_completed(frames)
            if kind == "collect_batches_async":
                lf = pl.LazyFrame({"a": range(20)})
                stream = collector.collect_batches_async(lf, chunk_size=1)
            other = asyncio.create_task(turn())
            found = [turns async for _ in stream]
            other.cancel()
            assert found == sorted(set(found))

    asyncio.run(main())
