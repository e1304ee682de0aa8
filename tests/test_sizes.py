"""How many queries of each size run at once, in a simulation of processors that they share."""

from __future__ import annotations

from math import inf
from random import Random

import pytest

from polars_async.scheduling.fair_queue import FairQueue
from polars_async.scheduling.sizes import SIZES, UNKNOWN, Limits, Load, Room, size_of

pytestmark = pytest.mark.one_series  # no query runs

TICK = 0.01
"""Seconds between two measurements of the load."""


class Job:
    def __init__(self, arrival, alone, processors, *, known=True):
        self.arrival = arrival
        self.alone = alone
        """Seconds that it takes alone."""
        self.processors = processors
        """How many of them it keeps busy then."""
        self.known = known
        """Whether one like it has run before."""
        self.left = alone
        self.load = None
        self.ended = None

    @property
    def slowdown(self):
        return (self.ended - self.arrival) / self.alone


class Machine:
    """Processors that all running jobs share, each no more of them than it can use."""

    def __init__(self, processors, limits=None):
        self.processors = processors
        self.limits = limits
        """None starts each job when it comes, as Polars does."""
        self.now = 0.0
        self.running = []
        self.queue = FairQueue()
        self.spare = 0
        self.most = 0
        """How many jobs ran at once at most."""

    def run(self, jobs):
        coming = sorted(jobs, key=lambda job: job.arrival, reverse=True)
        while coming or self.running or len(self.queue):
            rates = self.rates()
            ends = min(
                (self.now + job.left / rate for job, rate in zip(self.running, rates, strict=True)),
                default=inf,
            )
            tick = inf if self.limits is None or not len(self.queue) else self.next_tick()
            arrival = coming[-1].arrival if coming else inf
            until = min(ends, tick, arrival)
            for job, rate in zip(self.running, rates, strict=True):
                job.left -= rate * (until - self.now)
            used = sum(
                rate * min(job.processors, self.processors)
                for job, rate in zip(self.running, rates, strict=True)
            )
            self.now = until
            for job in [job for job in self.running if job.left < 1e-9]:
                self.running.remove(job)
                job.ended = until
                self.queue.note_ended(job.alone, overtook=job.overtook)
            if until == tick:
                self.spare = self.limits.spare(used, self.processors - used, len(self.running))
            while coming and coming[-1].arrival <= until:
                self.arrive(coming.pop())
            self.fill()
        return self

    def next_tick(self):
        return (self.now // TICK + 1 + 1e-9) * TICK

    def rates(self):
        """Share the processors fairly among what runs; 1 is the speed of a job alone."""
        left, rates = self.processors, {}
        by_need = sorted(self.running, key=lambda job: job.processors)
        for number, job in enumerate(by_need):
            need = min(job.processors, self.processors)
            given = min(need, left / (len(by_need) - number))
            left -= given
            rates[job] = given / need
        return [rates[job] for job in self.running]

    def arrive(self, job):
        job.overtook = False
        if self.limits is None:
            self.start(job, None)
            return
        share = min(1.0, job.processors / self.processors) if job.known else None
        self.queue.add(job, work=job.alone if job.known else UNKNOWN, share=share)

    def room(self):
        return Room(self.limits, [job.load for job in self.running], self.spare)

    def fill(self):
        while self.limits is not None and len(self.queue):
            room = self.room()
            picked = self.queue.take(room.fits)
            if picked is None:
                return
            if self.spare and not room.fits_by_kind(picked.load):
                self.spare -= 1
            picked.item.overtook = picked.overtook
            self.start(picked.item, picked.load)

    def start(self, job, load):
        job.load = load
        self.running.append(job)
        self.most = max(self.most, len(self.running))


def limits(processors):
    return Limits(min(4, max(2, processors)) + 1, max(64, processors), processors)


def ours(processors, jobs):
    return Machine(processors, limits(processors)).run(jobs)


def all_at_once(processors, jobs):
    return Machine(processors).run(jobs)


MIX = ((0.0001, 60), (0.001, 20), (0.008, 12), (0.06, 6), (0.35, 2))
"""Seconds alone of five sizes, and their shares in per cent."""


def mix(rng, processors, load, count=2_000):
    """Draw jobs of five sizes that come at random, the larger the more parallel."""
    sizes, shares = zip(*MIX, strict=True)
    draws = rng.choices(sizes, shares, k=count)
    jobs, now = [], 0.0
    uses = {0.0001: 1, 0.001: 1, 0.008: 1.2, 0.06: 0.6 * processors, 0.35: 0.85 * processors}
    work = [alone * max(1, min(uses[alone], processors)) for alone in draws]
    gap = sum(work) / count / processors / load
    for alone in draws:
        now += rng.expovariate(1 / gap)
        varied = alone * rng.uniform(0.5, 2)
        jobs.append(Job(now, varied, max(1, min(uses[alone], processors))))
    return jobs


def mean_slowdown(jobs):
    return sum(job.slowdown for job in jobs) / len(jobs)


def medians(jobs):
    """Return the median time from arrival to end, by the size of the jobs."""
    times = [sorted(j.ended - j.arrival for j in jobs if size_of(j.alone) == s) for s in range(4)]
    return [each[len(each) // 2] for each in times]


@pytest.mark.parametrize("load", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("processors", [2, 4, 16, 64])
def test_mix_of_sizes_is_answered_sooner_than_all_at_once(processors, load):
    mine, native = (mix(Random(1), processors, load) for _ in range(2))
    ours(processors, mine)
    all_at_once(processors, native)
    assert mean_slowdown(mine) <= mean_slowdown(native)
    *smaller, largest = zip(medians(mine), medians(native), strict=True)
    assert all(mine <= native * 1.01 for mine, native in smaller)
    assert largest[0] <= largest[1] * 1.6


@pytest.mark.parametrize("processors", [2, 4, 16, 64])
@pytest.mark.parametrize("decade", [0.02, 0.2, 2.0, 20.0])
def test_equal_heavy_jobs_do_not_pile_up(processors, decade):
    jobs = [Job(0.0, decade, processors) for _ in range(40)]
    assert ours(processors, jobs).most <= 4
    assert all_at_once(processors, [Job(0.0, decade, processors) for _ in range(40)]).most == 40


@pytest.mark.parametrize("known", [True, False])
def test_heavy_jobs_of_one_kind_do_not_pile_up_for_their_serial_parts(known):
    jobs = [Job(0.0, 2.0, 1.4, known=known) for _ in range(20)]
    assert ours(2, jobs).most == 1


@pytest.mark.parametrize("processors", [2, 4, 16])
@pytest.mark.parametrize(("smaller", "larger"), [(0.006, 0.06), (0.06, 0.6), (0.6, 6), (6, 60)])
def test_smaller_jobs_run_beside_larger_at_every_magnitude(processors, smaller, larger):
    jobs = [Job(0.0, larger, processors) for _ in range(10)]
    late = Job(larger / 10, smaller, processors)
    ours(processors, [*jobs, late])
    assert late.slowdown <= 5.1  # four of one size run at once at most


def test_jobs_that_leave_a_processor_idle_run_two_at_a_time():
    jobs = [Job(0.0, 0.06, 1) for _ in range(12)]
    ours(2, jobs)
    assert max(job.ended for job in jobs) == pytest.approx(6 * 0.06)


@pytest.mark.parametrize(("alone", "known"), [(0.005, True), (0.3, True), (0.3, False)])
def test_jobs_of_one_processor_fill_64(alone, known):
    def jobs():
        return [Job(0.0, alone, 1, known=known) for _ in range(640)]

    mine, native = jobs(), jobs()
    ours(64, mine)
    all_at_once(64, native)
    mine, native = (max(job.ended for job in each) for each in (mine, native))
    # Of those that are unknown, more start only by what is measured every 10 ms.
    assert mine <= native / (0.9 if known else 0.8)


@pytest.mark.parametrize("processors", [2, 16])
@pytest.mark.parametrize("known", [True, False])
def test_jobs_that_wait_do_so_together(known, processors):
    jobs = [Job(0.0, 0.2, 0.001, known=known) for _ in range(32)]
    ours(processors, jobs)
    assert max(job.ended for job in jobs) <= 0.2 * (1.2 if known else 1.3)


def test_no_more_run_than_the_cap_however_idle_the_processors():
    # One is left for small queries.
    assert ours(2, [Job(0.0, 1.0, 0.001) for _ in range(200)]).most == 63


@pytest.mark.parametrize("processors", [2, 4])
def test_one_that_computes_starts_beside_those_that_wait(processors):
    waiting = [Job(0.0, 5.0, 0.001) for _ in range(40)]
    computing = Job(1.0, 1.0, processors)
    ours(processors, [*waiting, computing])
    assert computing.slowdown < 1.05


@pytest.mark.parametrize("processors", [2, 16])
def test_one_that_takes_all_starts_in_an_endless_stream_of_jobs_that_take_less(processors):
    stream = [Job(number * 0.19, 0.5, 0.3 * processors) for number in range(1_000)]
    heavy = Job(1.0, 0.6, processors)
    ours(processors, [*stream, heavy])
    assert heavy.slowdown < 10


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 8])
def test_fixed_number_of_slots_is_never_exceeded(slots):
    rng = Random(slots)
    jobs = [
        Job(rng.uniform(0, 1), 10 ** rng.uniform(-4, 1), rng.choice([0.01, 1, 4]), known=False)
        for _ in range(300)
    ]
    assert Machine(4, Limits(slots)).run(jobs).most <= slots


# ---- Step by step


def test_size_is_the_decade_of_the_work():
    assert [size_of(each) for each in (0, 0.001, 0.01, 0.05, 0.1, 1, 9, 11)] == [
        *(0, 0, 1, 2, 3, 3, 4, 5)
    ]
    assert size_of(UNKNOWN) == 3


@pytest.mark.parametrize(
    ("size", "share", "is_light"),
    [
        (3, None, False),
        (3, 0.0, True),
        (2, 0.25, True),
        (2, 0.26, False),
        (1, 0.0, False),  # small ones are bounded by their number
    ],
)
def test_light_is_what_takes_long_and_leaves_most_processors(size, share, is_light):
    assert Load(size, share).is_light == is_light


def room(slots, most=None, *loads, processors=4, spare=0):
    return Limits(slots, most, processors).room([Load(*load) for load in loads], spare)


@pytest.mark.parametrize("size", range(2, SIZES))
def test_some_slots_are_left_to_other_sizes_and_one_to_small_ones(size):
    other = 3 if size != 3 else 4
    assert room(3, None).fits(Load(size))
    assert not room(3, None, (size,)).fits(Load(size))
    assert room(3, None, (size,)).fits(Load(other))
    assert not room(3, None, (size,), (other,)).fits(Load(2 if size > 2 and other > 2 else 5))
    assert room(3, None, (size,), (other,)).fits(Load(1))
    assert not room(3, None, (size,), (other,), (0,)).fits(Load(0))


@pytest.mark.parametrize(("slots", "at_once"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 3)])
def test_so_many_large_ones_of_one_size_run_at_once(slots, at_once):
    assert not room(slots, None, *[(3,)] * at_once).fits(Load(3))
    assert room(slots, None, *[(3,)] * (at_once - 1)).fits(Load(3))


def test_spare_ones_start_whatever_their_size_but_not_beyond_the_cap():
    busy = [(3,)] * 3
    assert not room(5, 64, *busy).fits(Load(3))
    assert room(5, 64, *busy, spare=1).fits(Load(3))
    assert not room(5, 64, *busy, spare=1).fits_by_kind(Load(3))
    assert not room(5, 6, *[(3,)] * 6, spare=1).fits(Load(0))


def test_known_ones_start_while_their_shares_fill_the_processors():
    half = [(3, 0.5)] * 3
    assert not room(5, 64, *half).fits(Load(3, 0.5))
    assert room(5, 64, *[(3, 0.3)] * 3).fits(Load(3, 0.1 + 0.3)) is False
    assert room(3, 64, (3, 0.5)).fits(Load(3, 0.5))
    assert not room(3, 64, (3, 0.5)).fits(Load(3, 0.51))
    assert not room(3, 64, (3, 0.5)).fits(Load(3))


@pytest.mark.parametrize(
    ("used", "idle", "running", "spare"),
    [
        (0.0, 2.0, 5, 5),  # twice as many
        (0.4, 1.6, 5, 5),
        (1.0, 1.0, 3, 3),
        (1.5, 0.3, 6, 1),
        (1.9, 0.1, 40, 0),  # busy
        (0.4, 0.0, 5, 0),  # other programs take the rest
        (1.4, 0.6, 1, 0),  # one more would take from this one
        (0.0, 2.0, 0, 0),  # none runs, so something else holds them up
    ],
)
def test_spare_ones_are_as_many_as_would_fill_the_idle_processors(used, idle, running, spare):
    assert Limits(3, 64, 2).spare(used, idle, running) == spare
    assert Limits(3).spare(used, idle, running) == 0
