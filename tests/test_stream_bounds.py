"""How many streams of batches are open, how many of them run, and what they leave behind."""

from __future__ import annotations

import asyncio
import gc
import linecache
import os
import random
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path

import inside
import polars as pl
import pytest
from places import TINY, Blocked, Failure, Notes, Source, until
from test_nesting import ask_plan, by_result

import polars_async
from polars_async import (
    Collector,
    CollectorClosedError,
    EventKind,
    ForkedProcessError,
    QueryTimeoutError,
    QueueFullError,
    api,
    configure,
)
from polars_async.bridges.buffer import BATCHES_AHEAD, Buffer
from polars_async.scheduling import times
from polars_async.scheduling.fair_queue import FAIR_EVERY
from polars_async.scheduling.pauses import Pauses
from polars_async.testing import simulate_gpu

OURS = str(Path(polars_async.__file__).parent)

NUMBERS = pl.LazyFrame({"a": range(100)})


def opened(collector, **options):
    """Open a stream of 100 batches."""
    return collector.collect_batches_async(NUMBERS, chunk_size=1, **options)


def paused(collector, streams=1, **options):
    """Open streams that are held up, for want of a consumer."""
    admission, before = collector._cpu.admission, collector.stats()["paused"]
    found = [opened(collector, **options) for _ in range(streams)]
    until(lambda: admission.paused == before + streams and len(admission._slots) == 0)
    return found


def take(stream, batches=1):
    """Take batches, and give the last."""

    async def main():
        for _ in range(batches):
            batch = await anext(stream)
        return batch.item()

    return asyncio.run(main())


def rest_of(stream):
    async def main():
        return [batch.item() async for batch in stream]

    return asyncio.run(main())


def is_full(collector):
    with pytest.raises(QueueFullError, match="streams of batches are open, of at most max_streams"):
        opened(collector)
    return True


@pytest.fixture
def make(executor):
    """Make collectors that are closed in the end."""
    made = []

    def make(**options):
        made.append(Collector(executor=executor, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
        until(lambda each=each: not inside.threads_in_use(each))
        stats = each.stats()
        assert (stats["streams"], stats["paused"], stats["running"]) == (0, 0, 0)
        assert not each._cpu.admission._pauses._returning


@pytest.fixture
def block():
    made = []

    def block():
        made.append(Blocked())
        return made[-1]

    yield block
    for each in made:
        each.gate.set()


@pytest.fixture
def held_up(blocked, make):
    """One slot, which a blocked query has, and a stream, whose consumer is back, that waits."""
    collector = make(max_running=1)
    (stream,) = paused(collector)
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    assert take(stream) == 0
    assert returning(collector) == 1
    yield collector, stream
    blocked.gate.set()


def returning(collector):
    return len(collector._cpu.admission._pauses._returning)


# How many are open


def test_stream_beyond_those_that_may_be_open_is_refused_at_the_call(make, blocked):
    events = []
    collector = make(max_running=1, max_streams=3, on_event=events.append)
    (held_up,) = paused(collector)
    running = collector.collect_batches_async(blocked.lf)
    assert blocked.started.wait()
    waiting = opened(collector)
    with pytest.raises(QueueFullError) as raised:
        opened(collector)
    assert str(raised.value) == (
        "the collector is full: 3 streams of batches are open, of at most max_streams=3. Close "
        "those that are not read to their end, try again later, or make a Collector with a larger "
        "max_streams"
    )
    stats = collector.stats()
    assert (stats["streams"], stats["max_streams"], stats["paused"]) == (3, 3, 1)
    assert (stats["running"], stats["waiting"], stats["rejected"]) == (2, 1, 1)
    assert [event.kind for event in events].count(EventKind.REJECTED) == 1
    blocked.gate.set()
    assert rest_of(running) == [1]
    assert rest_of(held_up) == rest_of(waiting) == list(range(100))


def read_to_the_end(collector, blocked):  # noqa: ARG001
    assert rest_of(opened(collector)) == list(range(100))


def close_while_it_is_held_up(collector, blocked):  # noqa: ARG001
    paused(collector)[0].close()


def close_in_the_queue(collector, blocked):
    running = collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    opened(collector).close()
    assert collector.stats()["streams"] == 0
    blocked.gate.set()
    running.result()


def be_late_in_the_queue(collector, blocked):
    running = collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    with pytest.raises(QueryTimeoutError):
        rest_of(opened(collector, timeout=0.01))
    assert collector.stats()["streams"] == 0
    blocked.gate.set()
    running.result()


def be_late_while_it_is_held_up(collector, blocked):  # noqa: ARG001
    (stream,) = paused(collector, timeout=3600)
    inside.let_time_be_up(stream)
    assert collector.stats()["timed_out"] == 1


def fail(collector, blocked):  # noqa: ARG001
    def udf(df):  # noqa: ARG001
        raise Failure

    with pytest.raises(Failure):
        rest_of(collector.collect_batches_async(TINY.map_batches(udf)))


def drop(collector, blocked):  # noqa: ARG001
    paused(collector)


ENDS = [
    read_to_the_end,
    close_while_it_is_held_up,
    close_in_the_queue,
    be_late_in_the_queue,
    be_late_while_it_is_held_up,
    fail,
    drop,
]


@pytest.mark.everywhere(end=[close_while_it_is_held_up, be_late_while_it_is_held_up])
@pytest.mark.parametrize("end", ENDS)
def test_stream_that_has_ended_in_any_way_is_no_longer_open(make, blocked, end):
    collector = make(max_running=1, max_streams=1)
    end(collector, blocked)
    until(lambda: not collector.stats()["streams"])
    (stream,) = paused(collector)
    assert is_full(collector)
    stream.close()


def test_stream_that_was_cancelled_is_open_until_it_really_ends(make):
    source = Source(held_after=1)
    collector = make(max_running=1, max_streams=1)
    stream = collector.collect_batches_async(source.lf, chunk_size=1)
    until(lambda: source.made)
    stream.close()
    assert is_full(collector)
    source.gate.set()
    until(lambda: not collector.stats()["streams"])


def test_stream_that_is_refused_for_another_reason_is_not_open(make, blocked):
    collector = make(max_running=1, max_waiting=0, max_streams=1)
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    with pytest.raises(QueueFullError, match="max_waiting=0"):
        opened(collector)
    collector.close(wait=False)
    with pytest.raises(CollectorClosedError):
        opened(collector)
    assert collector.stats()["streams"] == 0
    blocked.gate.set()


def test_results_of_several_queries_are_no_such_stream(make):
    collector = make(max_streams=1)
    (stream,) = paused(collector)

    async def main():
        return [number async for number, _ in collector.as_completed([TINY] * 10)]

    assert len(asyncio.run(main())) == 10
    assert collector.stats()["streams"] == 1
    stream.close()


def test_streams_of_the_gpu_count_as_those_of_the_cpu():
    gate = Blocked()
    with simulate_gpu(), Collector(gpu="offload", max_streams=2) as collector:
        on_gpu = collector.collect_batches_async(gate.lf, engine="gpu")
        (on_cpu,) = paused(collector)
        with pytest.raises(QueueFullError):
            collector.collect_batches_async(TINY, engine="gpu")
        assert is_full(collector)
        gate.gate.set()
        assert rest_of(on_gpu) == [1]
        until(lambda: collector.stats()["streams"] == 1)
        on_cpu.close()


def test_stream_that_fell_back_is_open_once_and_until_its_end():
    with simulate_gpu(fail="oom"), Collector(gpu="offload", max_streams=1) as collector:
        stream = collector.collect_batches_async(NUMBERS, engine="gpu", chunk_size=1)
        until(lambda: collector.stats()["paused"])
        assert is_full(collector)
        assert len(rest_of(stream)) == 100
        until(lambda: not collector.stats()["streams"])


@pytest.mark.parametrize("number", [0, -1, 1.5, "many"])
def test_number_of_streams_has_to_be_one(number):
    with pytest.raises(ValueError, match="max_streams must be a whole number, 1 or more"):
        Collector(max_streams=number)


def test_default_collector_is_told_how_many_streams_may_be_open(monkeypatch):
    monkeypatch.setattr(api._Default, "collector", None)
    with configure(max_streams=5) as collector:
        assert collector.stats()["max_streams"] == 5
    assert Collector().stats()["max_streams"] == 64


MANY_COLLECTORS = """
import asyncio, sys
import polars as pl
from polars_async import Collector, QueueFullError

path = sys.argv[1]
pl.DataFrame({"a": range(10)}).write_parquet(path)
numbers = pl.LazyFrame({"a": range(100)})
collectors = [Collector(max_streams=100, max_running=2) for _ in range(2)]
streams, refused = [], "none"
for _ in range(8):  # of clients that do not read
    for collector in collectors:
        try:
            streams.append(collector.collect_batches_async(numbers, chunk_size=1))
        except QueueFullError as error:
            refused = str(error)
while sum(collector.stats()["paused"] for collector in collectors) < len(streams):
    pass
scan = pl.scan_parquet(path).sum()
print(len(streams), refused.split(", half")[0].replace(" ", "_"))
print(scan.collect(engine="streaming").item())
print(collectors[0].collect_async(scan, engine="streaming").result(30).item())
streams.pop().close()
while True:
    try:
        collectors[0].collect_batches_async(numbers)
        break
    except QueueFullError:
        pass
"""


def test_clients_that_do_not_read_leave_polars_threads_to_read_files(
    run_script, tmp_path, monkeypatch
):
    """What 512 of them do otherwise, in small: there are 8 of Polars' threads, not 512."""
    monkeypatch.setenv("POLARS_MAX_BLOCKING_THREAD_COUNT", "8")
    assert run_script(MANY_COLLECTORS, str(tmp_path / "a.parquet")) == [
        "4",
        "the_process_is_full:_4_streams_of_batches_are_open_in_its_collectors,_of_at_most_4",
        "45",
        "45",
    ]


# Going on within the slots


class Stints:
    """Streams that went on after a pause, each of which is kept there until it is let on."""

    def __init__(self):
        self._put = Buffer.put
        self._steps = threading.Semaphore(0)
        self.going_on = []

    def put(self, buffer, batch):
        pauses = len(inside.lying_ready(buffer)) == BATCHES_AHEAD - 1
        enough = self._put(buffer, batch)
        if pauses and not enough:
            self.going_on.append(buffer)
            self._steps.acquire()
            self.going_on.remove(buffer)
        return enough

    def let_on(self, times=1):
        self._steps.release(times)


@pytest.fixture
def stints(make, monkeypatch):  # noqa: ARG001  # which closes collectors when all were let on
    stints = Stints()

    def put(buffer, batch):  # which a bound method could not be in its place
        return stints.put(buffer, batch)

    monkeypatch.setattr(Buffer, "put", put)
    yield stints
    stints.let_on(1000)


@pytest.mark.parametrize("slots", [1, 2])
def test_streams_whose_consumers_are_back_go_on_within_the_slots(make, stints, slots):
    collector = make(max_running=slots)
    streams = paused(collector, 6, priority=1)  # which have the slots kept for small ones, too
    for stream in streams:
        assert take(stream) == 0
    until(lambda: len(stints.going_on) == slots)
    stats = collector.stats()
    assert (returning(collector), stats["paused"], stats["running"]) == (6 - slots, 6 - slots, 6)
    assert len(collector._cpu.admission._slots) == slots
    stints.let_on(1000)
    for stream in streams:
        assert rest_of(stream) == list(range(1, 100))


def test_stream_that_comes_back_is_before_those_in_the_queue(stints, held_up, blocked):
    collector, stream = held_up
    ran = Notes()
    waiting = collector.collect_async(TINY.map_batches(lambda df: (ran.append(1), df)[1]))
    blocked.gate.set()
    until(lambda: not returning(collector))
    assert collector.stats()["waiting"] == 1
    stints.let_on()
    stream.close()
    assert waiting.result(30).item() == 1
    assert len(ran) == 1


def test_stream_goes_on_at_once_where_a_slot_is_free(make):
    collector = make(max_running=1)
    (stream,) = paused(collector)
    assert rest_of(stream) == list(range(100))


def test_slot_that_is_kept_for_small_queries_is_not_for_a_large_stream(make, blocked):
    collector = make(max_running=2)
    large, small = (*paused(collector, priority=-1), *paused(collector, priority=1))
    collector.collect_async(blocked.lf, priority=-1)
    assert blocked.started.wait()
    assert take(large) == 0
    assert returning(collector) == 1
    assert rest_of(small) == list(range(100))
    assert collector.collect_async(TINY, priority=1).result(30).item() == 1
    assert returning(collector) == 1
    blocked.gate.set()
    assert rest_of(large) == list(range(1, 100))


def test_streams_that_take_turns_do_not_keep_out_the_queue(make, stints, blocked):
    collector = make(max_running=1)
    streams = paused(collector, 2)
    collector.collect_async(blocked.lf)
    assert blocked.started.wait()
    for stream in streams:
        assert take(stream) == 0
    waiting = collector.collect_async(TINY)
    blocked.gate.set()
    turns = 0
    while not waiting.done():
        until(lambda: stints.going_on or waiting.done())
        for buffer in list(stints.going_on):
            turns += 1
            stints.let_on()
            (stream,) = (each for each in streams if each._buffer is buffer)
            until(lambda buffer=buffer: len(inside.lying_ready(buffer)) == BATCHES_AHEAD)
            take(stream)  # so that it is back while the other has the slot
    assert FAIR_EVERY - 2 <= turns <= 2 * FAIR_EVERY
    stints.let_on(1000)
    for stream in streams:
        stream.close()


@pytest.mark.everywhere
def test_wait_for_a_slot_counts_as_no_work(held_up, blocked, monkeypatch):
    collector, stream = held_up
    clock, late = count(), [0.0]
    monkeypatch.setattr(times, "perf_counter", lambda: late[0] + next(clock) * 1e-9)
    late[0] += 3600
    assert stream._query.times.run_seconds < 3600
    blocked.gate.set()
    assert rest_of(stream) == list(range(1, 100))
    until(lambda: not collector.stats()["running"])
    assert collector.stats()["run_seconds"] < 3600 + 60  # that of the blocked one


@pytest.mark.everywhere
def test_stream_that_is_late_while_it_is_held_up_tells_no_pause_as_run_time(make, monkeypatch):
    collector = make(max_running=1)
    (stream,) = paused(collector, timeout=3600)
    ran, clock = stream._query.times.run_seconds, times.perf_counter
    monkeypatch.setattr(times, "perf_counter", lambda: clock() + 3600)
    inside.let_time_be_up(stream)
    with pytest.raises(QueryTimeoutError) as raised:
        rest_of(stream)
    assert raised.value.run_seconds == ran


# Leaving while it waits for a slot


def close_stream(collector, stream):  # noqa: ARG001
    stream.close()


def expire(collector, stream):  # noqa: ARG001
    inside.let_time_be_up(stream)


def close_collector(collector, stream):  # noqa: ARG001
    collector.close(wait=False)


@pytest.mark.everywhere(leave=close_stream)
@pytest.mark.parametrize("leave", [close_stream, expire, close_collector])
def test_stream_that_waits_for_a_slot_needs_none_to_end(held_up, leave):
    collector, stream = held_up
    leave(collector, stream)
    until(lambda: not collector.stats()["streams"])
    assert returning(collector) == 0
    assert collector.stats()["running"] == 1  # still the blocked one


def is_with(frame):
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith("with ")


class Interruption:
    """
    Ctrl-C at one line of ours, the first, second or any other that the main thread comes to.

    But not where a ``with`` ends, between its body and its exit, where no signal is looked for.
    """

    def __init__(self, line):
        self._left = line
        self.came = False

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line" and not self.came and not is_with(frame):
            self._left -= 1
            if not self._left:
                self.came = True
                raise KeyboardInterrupt
        return self


def interrupted(stream, line):
    """Take a batch, interrupted at a line; False if there are fewer."""
    interruption = Interruption(line)

    async def main():
        gc.disable()  # or it may be the end of another test's collector that is interrupted
        sys.settrace(interruption)
        try:
            await anext(stream)
        finally:
            sys.settrace(None)
            gc.enable()

    with suppress(KeyboardInterrupt):
        asyncio.run(main())
    return interruption.came


@pytest.mark.parametrize("waits", [False, True])
def test_consumer_that_is_interrupted_at_any_line_costs_no_slot(make, block, waits):
    collector = make(max_running=1)
    lines = 0
    came = True
    while came:
        lines += 1
        (stream,) = paused(collector)
        blocked = block()
        if waits:
            collector.collect_async(blocked.lf)
            assert blocked.started.wait()
        came = interrupted(stream, lines)
        stream.close()
        blocked.gate.set()
        until(lambda: not inside.threads_in_use(collector))
        assert collector.collect_async(TINY).result(30).item() == 1
        until(lambda: not inside.threads_in_use(collector))
    assert lines > 20


def test_stream_goes_on_after_its_collector_was_closed_to_others(held_up, blocked):
    collector, stream = held_up
    collector.close(wait=False, cancel_waiting=False)
    blocked.gate.set()
    assert rest_of(stream) == list(range(1, 100))


def test_stream_that_waits_for_a_slot_is_lost_in_a_forked_child(held_up):
    collector, stream = held_up
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which pytest-timeout has taken
        signal.alarm(60)
        status = 1
        try:
            take(stream, 3)
        except ForkedProcessError:
            stats = collector.stats()
            status = int((stats["streams"], stats["paused"], stats["running"]) != (0, 0, 0))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Nested


def test_stream_of_a_running_query_goes_on_beyond_the_slots(make):
    collector = make(max_running=1)

    def udf(df):
        assert rest_of(opened(collector)) == list(range(100))
        return df

    assert collector.collect_async(TINY.map_batches(udf)).result(30).item() == 1


def test_stream_that_a_running_query_reads_goes_on_beyond_the_slots(make):
    collector = make(max_running=1)
    (stream,) = paused(collector)

    def udf(df):
        assert rest_of(stream) == list(range(100))
        return df

    assert collector.collect_async(TINY.map_batches(udf)).result(30).item() == 1


def test_stream_that_waits_for_a_slot_does_not_wait_for_the_query_that_reads_it(make):
    collector = make(max_running=1)
    (stream,) = paused(collector)
    reads = threading.Event()

    def udf(df):
        assert reads.wait(30)
        assert rest_of(stream) == list(range(1, 100))
        return df

    reader = collector.collect_async(TINY.map_batches(udf))
    until(lambda: collector._cpu.admission._slots)
    assert take(stream) == 0
    assert returning(collector) == 1
    reads.set()
    assert reader.result(30).item() == 1


# On another's executor


def test_stream_on_the_gpu_of_an_executor_leaves_its_slot_while_it_is_held_up():
    with (
        ThreadPoolExecutor(2) as pool,
        simulate_gpu(),
        Collector(executor=pool, gpu="offload", max_running=1) as collector,
    ):
        stream = collector.collect_batches_async(NUMBERS, engine="gpu", chunk_size=1)
        until(lambda: collector.stats()["paused"])
        assert collector.collect_async(TINY, engine="gpu").result(30).item() == 1
        stream.close()


# What is left behind


def own_threads():
    found = 0
    for thread in Path("/proc/self/task").iterdir():
        try:
            found += (thread / "comm").read_text() == "polars-async\n"
        except OSError:  # it has ended
            pass
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone lists the threads of a process")
def test_threads_of_a_burst_of_streams_end(make):
    gc.collect()  # other tests' collectors
    before = own_threads()
    collector = make(max_running=2)
    streams = paused(collector, 8)
    assert collector.collect_async(TINY).result(30).item() == 1
    assert own_threads() >= 8
    for stream in streams:
        stream.close()
    until(lambda: inside.all_threads(collector) <= 2)
    until(lambda: own_threads() <= before + 2)
    handles = [collector.collect_async(TINY) for _ in range(10)]
    assert [handle.result(30).item() for handle in handles] == [1] * 10


def test_threads_of_nested_queries_end(make):
    collector = make(max_running=1)
    assert collector.collect_async(ask_plan(collector, by_result, 5)).result(30).item() == 1
    until(lambda: inside.all_threads(collector) == 1)


def test_workers_of_a_burst_of_streams_end():
    with Collector(executor="processes", max_running=2) as collector:
        streams = paused(collector, 8)
        assert collector.stats()["workers"] == 8
        for stream in streams:
            stream.close()
        until(lambda: collector.stats()["workers"] <= 2)
        assert collector.collect_async(TINY).result(30).item() == 1


def test_workers_of_a_burst_of_nested_queries_end(blocked):
    with Collector(executor="auto", max_running=2) as collector:

        def ask(frame):  # which cannot be sent, since a collector cannot, and so runs here
            handles = [collector.collect_async(blocked.lf) for _ in range(8)]
            until(lambda: collector.stats()["workers"] == 8)
            blocked.gate.set()
            assert {handle.result(30).item() for handle in handles} == {1}
            return frame

        assert collector.collect_async(TINY.map_batches(ask)).result(30).item() == 1
        until(lambda: collector.stats()["workers"] <= 2)
        assert collector.collect_async(TINY.map_batches(lambda df: df)).result(30).item() == 1


# Races


class Clients:
    """Consumers of many streams in one loop, which leave in all ways, at moments left to chance."""

    def __init__(self, collector, seed):
        self._collector = collector
        self._chance = random.Random(seed)
        self.faults = []

    def run(self):
        asyncio.run(self._main())

    async def _main(self):
        streams = [self._open() for _ in range(20)]
        tasks = [asyncio.create_task(self._consume(stream)) for stream in streams]
        closed = self._chance.sample(streams, 4)
        closer = threading.Thread(target=lambda: [stream.close() for stream in closed])
        closer.start()
        for task in self._chance.sample(tasks, 4):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait(tasks)
        closer.join()

    def _open(self):
        timeout = self._chance.choice([30, 30, 0.002, 0.02])
        return opened(self._collector, timeout=timeout, priority=self._chance.choice([0, 1, -1]))

    async def _consume(self, stream):
        kind, batches = self._chance.choice(["all", "some", "asks"]), self._chance.randrange(99)
        try:
            async for batch in stream:
                if kind == "asks":
                    await self._collector.collect_async(TINY)
                if kind != "all" and batch.item() >= batches:
                    break
            stream.close()
        except (QueryTimeoutError, asyncio.CancelledError):
            pass
        except BaseException as error:  # noqa: BLE001  # to be told of
            self.faults.append(error)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_streams_that_end_in_any_way_at_any_moment_lose_no_slot(make, monkeypatch, seed, slots):
    collector = make(max_running=slots)
    admission, go_on, most = collector._cpu.admission, Pauses._go_on, []

    def go_on_and_count(*arguments):
        go_on(*arguments)
        most.append(len(admission._slots))

    monkeypatch.setattr(Pauses, "_go_on", go_on_and_count)
    loops = [Clients(collector, seed + number) for number in range(2)]
    threads = [threading.Thread(target=each.run) for each in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.faults for each in loops] == [[], []]
    assert max(most) <= slots
    until(lambda: not admission.threads)
    assert collector.stats()["waiting"] == collector.stats()["streams"] == 0
    assert collector.collect_async(TINY).result(30).item() == 1
    until(lambda: inside.all_threads(collector) <= slots)
