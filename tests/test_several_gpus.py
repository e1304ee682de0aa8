"""Which of several GPUs a query runs on in worker processes: none that keeps failing."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import replace

import polars as pl
import pytest
from places import until
from test_gpu_processes import WHERE, uuid

import polars_async as pa
from polars_async import cli, resolve_engine
from polars_async.executors.processes.pool import ProcessExecutor
from polars_async.gpu import probe
from polars_async.gpu.breaker import COOLDOWN, FAILURES, Cooldown, Health, breaker, breaker_of
from polars_async.testing import simulate_gpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux"),
]

STRICT = pl.GPUEngine(raise_on_fail=True)
TINY = pl.LazyFrame({"a": [1]})


def on_device(number, **options):
    return pl.GPUEngine(device=number, **options)


def of_gpu(index):
    return breaker_of(pa.gpu_status().devices[index])


def almost_cools_down(*indices):
    """Have these GPUs rest after one more failure."""
    for index in indices:
        of_gpu(index).health = Health(FAILURES - 1)


def opened(index, seconds=3600.0):
    gpu = of_gpu(index)
    cooldown = Cooldown(gpu._clock() + seconds, seconds, "it has failed", MemoryError("full"))
    gpu.health = Health(FAILURES, cooldown)


def failures(collector, index):
    return collector.stats()[f"gpu_{index}_failures"]


@pytest.fixture
def offloading():
    made = []

    def make(executor="processes", **options):
        made.append(pa.Collector(executor=executor, engine="gpu", gpu="offload", **options))
        return made[-1]

    yield make
    for collector in made:
        collector.close(cancel_running=True)


def ran_on(handle):
    return handle.result(30)["gpu"].item()


# In worker processes


@pytest.mark.parametrize("fault", ["cuda", "oom"])
def test_broken_gpu_fails_three_queries_and_the_other_runs_all_that_come_after(
    offloading, fault, caplog
):
    with simulate_gpu(2, fail_on={1: fault}) as gpu:
        collector = offloading()
        first = [ran_on(collector.collect_async(WHERE)) for _ in range(2 * FAILURES)]
        assert sorted(first) == [uuid(0)] * FAILURES + ["none"] * FAILURES
        assert "GPU 1 is in a cooldown of 30 s: " in caplog.text
        stats = collector.stats()
        assert (stats["gpu_0_failures"], stats["gpu_0_cooldown_seconds"]) == (0, 0)
        assert (stats["gpu_1_failures"], stats["gpu_failures"]) == (FAILURES, FAILURES)
        assert 0 < stats["gpu_1_cooldown_seconds"] <= COOLDOWN
        handles = [collector.collect_async(WHERE) for _ in range(6)]
        assert {ran_on(handle) for handle in handles} == {uuid(0)}
        assert not any(handle.resolution.fell_back for handle in handles)
        assert gpu.queries == 2 * FAILURES + 6


def test_all_that_rest_are_a_downgrade_and_an_error_where_one_is_required(offloading):
    with simulate_gpu(2, fail="oom") as gpu:
        almost_cools_down(0, 1)
        collector = offloading()
        for _ in range(2):
            collector.collect_async(WHERE).result(30)
        with pytest.warns(pa.EngineDowngradeWarning, match=r"is in a cooldown.*a cooldown of 30 s"):
            handle = collector.collect_async(WHERE)
        assert (ran_on(handle), handle.resolution.reason) == ("none", pa.Reason.GPU_COOLDOWN)
        with (
            pa.Collector(executor="processes", gpu="require") as requiring,
            pytest.raises(pa.EngineUnavailableError, match="is in a cooldown"),
        ):
            requiring.collect_async(WHERE, engine="gpu")
        assert gpu.queries == 2


def test_gpu_is_tried_again_after_its_rest_by_a_worker_that_does_not_rest_either(offloading):
    with simulate_gpu(1, fail="oom") as gpu:
        collector = offloading()
        now = of_gpu(0)._clock()
        of_gpu(0)._clock = lambda: now
        for _ in range(FAILURES):
            collector.collect_async(WHERE).result(30)
        now += COOLDOWN
        collector.collect_async(WHERE).result(30)
        assert collector.stats()["gpu_0_cooldown_seconds"] == 2 * COOLDOWN
        now += 2 * COOLDOWN
        gpu.fail = None
        assert ran_on(collector.collect_async(WHERE)) == uuid(0)
        assert gpu.queries == FAILURES + 2
        assert (failures(collector, 0), collector.stats()["gpu_cooldown_seconds"]) == (0, 0)


def test_collectors_of_a_process_share_what_they_know_of_a_gpu(offloading):
    with simulate_gpu(2, fail_on={1: "oom"}):
        almost_cools_down(1)
        offloading().collect_async(WHERE, engine=on_device(1)).result(30)
        other = offloading("auto")
        assert {ran_on(other.collect_async(WHERE)) for _ in range(3)} == {uuid(0)}
        assert failures(other, 1) == FAILURES


def test_queries_that_wait_when_the_last_gpu_begins_its_cooldown_do_not_try_it(offloading):
    with simulate_gpu(1, fail="oom") as gpu:
        almost_cools_down(0)
        all_asked, next_fault = threading.Event(), gpu.next_fault

        def fail_late(*arguments, **options):
            assert all_asked.wait(60)
            return next_fault(*arguments, **options)

        gpu.next_fault = fail_late
        collector = offloading()
        handles = [collector.collect_async(WHERE) for _ in range(3)]
        all_asked.set()
        assert [ran_on(handle) for handle in handles] == ["none"] * 3
        reasons = [handle.resolution.reason for handle in handles]
        assert reasons == [pa.Reason.OUT_OF_MEMORY, *[pa.Reason.GPU_COOLDOWN] * 2]
        assert {type(handle.resolution.cause) for handle in handles} == {MemoryError}
        assert gpu.queries == 1


def test_failure_counts_where_the_cpu_is_forbidden_and_a_rest_keeps_no_such_query_off(offloading):
    with simulate_gpu(1, fail="oom") as gpu:
        almost_cools_down(0)
        collector = offloading()
        with pytest.raises(MemoryError, match="simulated"):
            collector.collect_async(WHERE, engine=STRICT).result(30)
        assert failures(collector, 0) == FAILURES
        gpu.fail = None
        assert ran_on(collector.collect_async(WHERE, engine=STRICT)) == uuid(0)
        assert failures(collector, 0) == 0


@pytest.mark.parametrize(("fail", "counted"), [({2: "oom"}, 0), ({2: "oom", 3: "oom"}, 1)])
def test_frames_of_one_query_count_as_on_threads(offloading, fail, counted):
    with simulate_gpu(1, fail=fail):
        handle = offloading().collect_all_async([WHERE] * 3)
        handle.result(30)
        assert handle.resolution.fell_back
        assert of_gpu(0).health.failures == counted


@pytest.mark.parametrize(("number", "counts"), [(signal.SIGSEGV, 1), (signal.SIGKILL, 0)])
def test_worker_that_crashes_counts_against_its_gpu_unless_it_was_killed(
    offloading, number, counts
):
    def die(_):
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)

    with simulate_gpu(2):
        collector = offloading()
        lf = TINY.map_batches(die)
        with pytest.raises(pa.WorkerDiedError, match=signal.Signals(number).name):
            collector.collect_async(lf, engine=on_device(1)).result(30)
        assert (failures(collector, 1), of_gpu(0).health.failures) == (counts, 0)


def test_threads_have_one_breaker_which_is_none_of_the_workers(offloading):
    with simulate_gpu(2, fail="oom"):
        collector = offloading("threads")
        for _ in range(FAILURES):
            collector.collect_async(WHERE).result(30)
        assert breaker.cooldown() is not None
        assert resolve_engine("gpu", gpu="offload").reason is pa.Reason.GPU_COOLDOWN
        assert offloading().resolve_engine().name == "gpu"


@pytest.mark.parametrize(
    "method",
    ["collect_async", "collect_all_async", "collect_batches_async", "collect_background"],
)
def test_gpu_that_is_asked_for_by_number_runs_every_kind_of_query(offloading, method):
    async def first(batches):
        return await anext(aiter(batches))

    engine = on_device(1, raise_on_fail=True)
    with simulate_gpu(2):
        collector = offloading()
        given = [WHERE] if method == "collect_all_async" else WHERE
        handle = getattr(collector, method)(given, engine=engine)
        if method == "collect_batches_async":
            import asyncio  # noqa: PLC0415

            found = asyncio.run(first(handle))
        else:
            found = handle.fetch_blocking() if "background" in method else handle.result(30)
        found = found[0] if method == "collect_all_async" else found
        assert found["gpu"].item() == uuid(1)
    assert engine.device == 1


# Worker processes of which nothing but their GPU is there


class Workers:
    """What takes the place of worker processes: it notes on which GPU each query would run."""

    def __init__(self):
        self.ran = []
        self.gates = {}
        self.failing = set()

    def run(self, place, _work, _query, on_gpu=None):
        gpu = place._env.get("CUDA_VISIBLE_DEVICES", "none")
        self.ran.append(gpu)
        if gpu in self.gates:
            assert self.gates[gpu].wait(30)
        if on_gpu is not None:
            on_gpu(None)
        return pl.DataFrame({"gpu": [gpu]})

    def hold(self, *indices):
        """Have those GPUs end no query until their gates are set."""
        for index in indices:
            self.gates[uuid(index)] = threading.Event()

    def release(self):
        for gate in self.gates.values():
            gate.set()


@pytest.fixture
def workers(monkeypatch):
    workers = Workers()

    def run(place, *given):
        return workers.run(place, *given)

    monkeypatch.setattr(ProcessExecutor, "run", run)
    yield workers
    workers.release()


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        (f"{uuid(1)},2", [1, 2]),
        ("1, 0 ,nonsense,2", [1, 0]),
    ],
)
def test_number_is_that_by_which_cuda_counts(offloading, workers, monkeypatch, visible, gpus):
    with simulate_gpu(3):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        collector = offloading()
        for _ in range(2):
            for number, index in enumerate(gpus):
                handle = collector.collect_async(TINY, engine=on_device(number))
                assert ran_on(handle) == uuid(index)
        assert handle.resolution.engine.device == number
    assert len(workers.ran) == 2 * len(gpus)


def test_gpu_of_the_affinity_is_the_one_that_runs(workers):
    with simulate_gpu(3), pl.Config():
        pl.Config.set_engine_affinity(on_device(2))
        collector = pa.Collector(executor="processes", gpu="offload")
        assert {ran_on(collector.collect_async(TINY)) for _ in range(4)} == {uuid(2)}
        collector.close()
        assert set(workers.ran) == {uuid(2)}


@pytest.mark.parametrize("executor", ["threads", "processes"])
@pytest.mark.parametrize("number", [2, 99, -1, "1"])
def test_number_of_no_gpu_is_said(offloading, executor, number):
    with simulate_gpu(2):
        collector = offloading(executor)
        message = f"device={number!r} names no GPU that is visible to CUDA.*: 0, 1"
        with pytest.warns(pa.EngineDowngradeWarning, match=message):
            handle = collector.collect_async(TINY, engine=on_device(number))
        assert handle.result(30).item() == 1
        assert handle.resolution.reason is pa.Reason.UNKNOWN_DEVICE
        with pytest.raises(pa.EngineUnavailableError, match=message):
            collector.collect_async(TINY, engine=on_device(number, raise_on_fail=True))
        assert resolve_engine(on_device(1), gpu="offload").name == "gpu"


def test_gpu_that_is_hidden_has_no_number(offloading, workers, monkeypatch):
    with simulate_gpu(2):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", uuid(1))
        collector = offloading()
        assert ran_on(collector.collect_async(TINY, engine=on_device(0))) == uuid(1)
        with pytest.warns(pa.EngineDowngradeWarning, match="names no GPU"):
            collector.collect_async(TINY, engine=on_device(1)).result(30)
        assert workers.ran == [uuid(1), "none"]


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("MIG-a,MIG-b", ["MIG-a"]),
        (f"{uuid(1)},MIG-b", [uuid(1), "MIG-b"]),
    ],
)
def test_worker_of_a_gpu_in_mig_mode_sees_the_instance_that_is_visible(
    offloading, workers, monkeypatch, visible, gpus
):
    with simulate_gpu(2):
        host = probe.probe._override
        first = replace(host.devices[0], mig_enabled=True, mig_instances=("MIG-a", "MIG-b"))
        probe.probe.override(replace(host, devices=(first, host.devices[1])))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        collector = offloading()
        for number, gpu in enumerate(gpus):
            assert ran_on(collector.collect_async(TINY, engine=on_device(number))) == gpu
        assert {ran_on(collector.collect_async(TINY)) for _ in gpus} == set(gpus)
        assert set(workers.ran) == set(gpus)


def test_queries_for_a_gpu_that_is_busy_keep_no_other_gpu_waiting(offloading, workers):
    with simulate_gpu(2):
        workers.hold(0)
        collector = offloading()
        for_one = [collector.collect_async(TINY, engine=on_device(0)) for _ in range(5)]
        until(lambda: workers.ran == [uuid(0)])
        for engine in (on_device(1), "gpu", on_device(1), "gpu"):
            assert ran_on(collector.collect_async(TINY, engine=engine)) == uuid(1)
        stats = collector.stats()
        assert (stats["gpu_running"], stats["gpu_waiting"], stats["submitted"]) == (1, 4, 9)
        workers.release()
        assert [ran_on(handle) for handle in for_one] == [uuid(0)] * 5


def test_gpu_that_runs_any_query_is_waited_for_by_one_that_names_it(offloading, workers):
    with simulate_gpu(2):
        workers.hold(0, 1)
        collector = offloading()
        anywhere = [collector.collect_async(TINY) for _ in range(2)]
        until(lambda: len(workers.ran) == 2)
        named = collector.collect_async(TINY, engine=on_device(0))
        late = [collector.collect_async(TINY) for _ in range(20)]
        workers.gates[uuid(1)].set()
        for handle in late:
            handle.result(30)
        assert not named.done()
        workers.release()
        assert ran_on(named) == uuid(0)
        for handle in anywhere:
            handle.result(30)
        # In its turn: no query that came after the first two has had that GPU before.
        assert workers.ran.index(uuid(0), 2) == len(workers.ran) - 1


def test_query_that_is_cancelled_while_it_waits_for_its_gpu_gives_up_its_slot(offloading, workers):
    with simulate_gpu(1):
        workers.hold(0)
        collector = offloading()
        running = collector.collect_async(TINY)
        until(lambda: workers.ran)
        waiting = collector.collect_async(TINY, engine=on_device(0))
        until(lambda: collector.stats()["gpu_running"] == 2)
        waiting.cancel()
        until(lambda: collector.stats()["gpu_running"] == 1)
        workers.release()
        assert ran_on(running) == uuid(0)
        assert ran_on(collector.collect_async(TINY)) == uuid(0)
        assert workers.ran == [uuid(0)] * 2


def test_query_waits_for_a_gpu_that_works_rather_than_try_one_in_its_cooldown(offloading, workers):
    with simulate_gpu(2):
        opened(1)
        workers.hold(0)
        collector = offloading()
        handles = [collector.collect_async(TINY) for _ in range(3)]
        until(lambda: workers.ran and collector.stats()["gpu_running"] == 2)
        workers.release()
        assert [ran_on(handle) for handle in handles] == [uuid(0)] * 3


def test_query_that_waits_tries_a_gpu_whose_cooldown_is_over(offloading, workers):
    with simulate_gpu(2):
        workers.hold(0)
        collector = offloading()
        first = collector.collect_async(TINY)
        until(lambda: workers.ran == [uuid(0)])
        opened(1, seconds=0.2)
        assert ran_on(collector.collect_async(TINY)) == uuid(1)
        assert not first.done()
        assert of_gpu(1).health == Health()


def test_gpu_that_is_named_and_rests_is_a_downgrade_though_another_works(offloading, workers):
    with simulate_gpu(2):
        opened(1)
        collector = offloading()
        with pytest.warns(pa.EngineDowngradeWarning, match="is in a cooldown"):
            assert ran_on(collector.collect_async(TINY, engine=on_device(1))) == "none"
        strict = on_device(1, raise_on_fail=True)
        assert ran_on(collector.collect_async(TINY, engine=strict)) == uuid(1)
        assert workers.ran == ["none", uuid(1)]


def test_closed_collector_takes_no_query_for_a_gpu_of_its_own(offloading, workers):
    with simulate_gpu(2):
        collector = offloading()
        collector.collect_async(TINY).result(30)
        collector.close()
        for number in (0, 1):
            with pytest.raises(pa.CollectorClosedError):
                collector.collect_async(TINY, engine=on_device(number))
        assert len(workers.ran) == 1


def test_close_waits_for_the_queries_of_every_gpu(offloading, workers):
    with simulate_gpu(2):
        workers.hold(0, 1)
        collector = offloading()
        running = [collector.collect_async(TINY, engine=on_device(number)) for number in (0, 1)]
        until(lambda: len(workers.ran) == 2)
        waiting = [collector.collect_async(TINY, engine=on_device(number)) for number in (0, 1)]
        closing = threading.Thread(target=collector.close)
        closing.start()
        until(lambda: all(handle.done() for handle in waiting))
        assert closing.is_alive()
        workers.release()
        closing.join(30)
        assert sorted(map(ran_on, running)) == [uuid(0), uuid(1)]


def test_lane_that_is_made_while_another_thread_closes_is_closed_too(workers):  # noqa: ARG001
    with simulate_gpu(4):
        for _ in range(50):
            collector = pa.Collector(executor="processes", gpu="offload")
            start = threading.Barrier(2)

            def ask(collector=collector, start=start):
                start.wait()
                for number in range(4):
                    with suppress(pa.CollectorClosedError):
                        collector.collect_async(TINY, engine=on_device(number))

            asking = threading.Thread(target=ask)
            asking.start()
            start.wait()
            collector.close()
            asking.join(30)
            assert all(lane.admission.closed for lane in collector._lanes)
            collector.close()
            assert collector.stats()["running"] == 0


def test_queue_for_a_gpu_that_is_named_has_a_bound_of_its_own(offloading, workers):
    with simulate_gpu(2):
        workers.hold(0, 1)
        collector = offloading(max_waiting=1)
        for number in (0, 0, 1, 1):
            collector.collect_async(TINY, engine=on_device(number))
        for number in (0, 1):
            with pytest.raises(pa.QueueFullError, match="full for the GPU"):
                collector.collect_async(TINY, engine=on_device(number))
        workers.release()


def test_doctor_tells_of_each_gpu_of_this_process(capsys):
    with simulate_gpu(2):
        now = of_gpu(1)._clock()
        of_gpu(1)._clock = lambda: now
        opened(1)
        cli.main(["doctor", "--json"])
        devices = json.loads(capsys.readouterr().out)["gpu"]["devices"]
        assert [each["number"] for each in devices] == [0, 1]
        assert [each["breaker"]["failures"] for each in devices] == [0, FAILURES]
        cooldowns = [device["breaker"]["cooldown_seconds"] for device in devices]
        assert cooldowns[0] == 0 < cooldowns[1]
        cli.main(["doctor"])
        text = " ".join(capsys.readouterr().out.split())
        assert "breaker in worker processes open: the cooldown lasts 3600 s more" in text
        assert text.count("breaker in worker processes") == 1


def test_simulated_host_leaves_no_failures_behind():
    with simulate_gpu(2):
        opened(1)
        with simulate_gpu(2):
            assert of_gpu(1).health == Health()
        assert of_gpu(1).cooldown() is not None
    with simulate_gpu(2):
        assert of_gpu(1).health == Health()
