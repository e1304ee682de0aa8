"""When the GPU rests, and for how long."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from polars_async.gpu import breaker as breaker_module
from polars_async.gpu.breaker import COOLDOWN, FAILURES, LONGEST_COOLDOWN, Breaker, Health

OOM = "out of memory", MemoryError("full")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return Breaker(clock)


def trip(breaker):
    for _ in range(FAILURES):
        breaker.failed(*OOM, breaker.generation)


def test_gpu_is_tried_until_it_has_failed_several_times_in_a_row(breaker):
    assert [breaker.failed(*OOM, breaker.generation) for _ in range(FAILURES - 1)] == [None] * (
        FAILURES - 1
    )
    assert (breaker.cooldown(), breaker.seconds_left()) == (None, 0.0)
    cooldown = breaker.failed(*OOM, breaker.generation)
    assert breaker.cooldown() is cooldown
    assert (cooldown.seconds, cooldown.failure, cooldown.cause) == (COOLDOWN, *OOM)
    assert breaker.seconds_left() == COOLDOWN


def test_success_in_between_starts_the_count_anew(breaker):
    for _ in range(3):
        for _ in range(FAILURES - 1):
            breaker.failed(*OOM, breaker.generation)
        breaker.succeeded(breaker.generation)
    assert breaker.health == Health()


def test_gpu_is_tried_again_after_its_rest(breaker, clock):
    trip(breaker)
    clock.now = COOLDOWN - 0.001
    assert breaker.cooldown() is not None
    clock.now = COOLDOWN
    assert (breaker.cooldown(), breaker.seconds_left()) == (None, 0.0)


def test_one_failure_after_the_cooldown_begins_one_twice_as_long(breaker, clock):
    trip(breaker)
    for turn in range(1, 4):
        clock.now += breaker.seconds_left()
        assert breaker.failed(*OOM, breaker.generation).seconds == COOLDOWN * 2**turn


def test_one_success_after_the_cooldown_ends_it_all(breaker, clock):
    trip(breaker)
    clock.now = COOLDOWN
    breaker.succeeded(breaker.generation)
    assert breaker.health == Health()
    assert breaker.failed(*OOM, breaker.generation) is None


def test_cooldowns_grow_to_a_limit(breaker):
    for _ in range(10_000):
        breaker.failed(*OOM, breaker.generation)
    assert breaker.seconds_left() == LONGEST_COOLDOWN


def test_failures_told_by_many_threads_are_all_counted(breaker, monkeypatch):
    interval = sys.getswitchinterval()
    monkeypatch.setattr(breaker_module, "FAILURES", 10**9)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(8):
                pool.submit(
                    lambda: [breaker.failed(*OOM, breaker.generation) for _ in range(10_000)]
                )
    finally:
        sys.setswitchinterval(interval)
    assert breaker.health.failures == 8 * 10_000
