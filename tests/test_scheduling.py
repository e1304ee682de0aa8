from __future__ import annotations

import sys
from functools import partial
from heapq import heappop, heappush
from itertools import accumulate
from random import Random

import pytest

from polars_async.scheduling.fair_queue import (
    FAIR_EVERY,
    OVERTAKING_LIMIT,
    QUICK,
    QUICK_STREAK,
    FairQueue,
)
from polars_async.scheduling.sizes import KINDS, SMALL, UNKNOWN, UNKNOWN_LOAD, Limits, Load

pytestmark = pytest.mark.one_series  # no query runs

LEAST = 1e-5
TOGETHER = 32


def unestimated(queue, at_most=TOGETHER):
    """Give places to some, as a thread does that appraises them."""
    found = []
    while len(found) < at_most and (place := queue.next_unestimated()) is not None:
        found.append(place)
    return found


# ---- A lane without threads or clock


class Job:
    __slots__ = (
        "arrival",
        "cancel_at",
        "dies_unestimated",
        "duration",
        "kind",
        "mark",
        "number",
        "overtaken_at_start",
        "overtaken_before",
        "overtook",
        "passed",
        "patience",
        "priority",
        "size",
        "started",
        "state",
        "work",
    )

    def __init__(self, arrival, work, *, priority=0):
        self.arrival = arrival
        self.duration = work
        self.priority = priority
        self.kind = self.cancel_at = None
        self.dies_unestimated = False
        self.state = "to come"
        self.expect(work)
        self.started = self.overtaken_at_start = self.passed = None
        self.overtook = False

    def expect(self, work):
        if self.priority:  # which is not appraised
            work = UNKNOWN
        self.work = work
        self.patience = OVERTAKING_LIMIT * min(max(work, LEAST), 60)
        self.size = 0
        for bound in (0.001, 0.01, 0.0999, 1, 10):
            self.size += work > bound
        if self.priority:
            self.size = min(self.size, 1) if self.priority > 0 else max(self.size, 2)

    @property
    def small(self):
        return self.size < 2


class Simulation:
    """
    Slots that serve jobs as a lane does, and check at each step what the policy promises.

    It keeps its own account of the work that overtook, and knows what is small by itself.
    """

    def __init__(self, slots, jobs, *, check=True):
        self.queue = FairQueue()
        self.slots = slots
        self.jobs = jobs
        self.check = check
        self.now = self.overtaken = 0.0
        self.quick_row = self.unestimated = 0
        self.running = []  # a heap of (end, number, job, load)
        self.waiting = [0] * 6  # by size
        self.estimated = {}
        self.turns = 0
        self.since_lowest = [0] * 6  # turns that passed over the lowest mark, of each size
        self.without_lowest = 0
        self.by_marks_alone = 0

    def run(self):
        events = [(job.arrival, 0, number, job) for number, job in enumerate(self.jobs)]
        events += [
            (j.cancel_at, 1, n, j) for n, j in enumerate(self.jobs) if j.cancel_at is not None
        ]
        events.sort(key=lambda event: event[:3])
        running = self.running
        for time, is_cancel, number, job in events:
            while running and running[0][0] <= time:
                self.end()
            self.now = time
            if is_cancel:
                self.cancel(job)
            else:
                job.number = number
                self.arrive(job)
            self.check_slots()
        while running:
            self.end()
        self.check_end()
        return self

    def arrive(self, job):
        job.overtaken_before = self.overtaken
        job.mark = self.overtaken + job.patience
        free = self.slots - len(self.running)
        kept = 1 if self.quick_row >= QUICK_STREAK else 2
        if not len(self.queue) and (free > kept or free == self.slots):
            self.start(job, UNKNOWN_LOAD)
            return
        self.queue.add(job, priority=job.priority)
        job.state = "waiting"
        self.waiting[job.size] += 1
        if job.priority:
            self.estimated[job] = None
            job.passed = 0
        self.fill()

    def cancel(self, job):
        self.queue.discard(job)  # also those that run, or are done: it must not matter
        if job.state == "waiting":
            self.leave(job, "cancelled")

    def leave(self, job, state):
        job.state = state
        self.waiting[job.size] -= 1
        self.estimated.pop(job, None)

    def end(self):
        self.now, _, job, _ = heappop(self.running)
        assert job.state == "running"
        job.state = "done"
        self.overtaken += max(job.duration, LEAST) if job.overtook else 0
        self.queue.note_ended(job.duration, overtook=job.overtook)
        if job.duration <= QUICK:
            self.quick_row = min(self.quick_row + 1, 8 * QUICK_STREAK)
        elif job.duration <= 0.02:
            self.quick_row = max(self.quick_row - QUICK_STREAK, 0)
        else:
            self.quick_row = 0
        if job.kind is not None and job.number % 3 == 0:
            self.observe(job)
        self.take_quickly()
        self.fill()
        self.check_slots()

    def large_running(self, size=None):
        loads = [load for _, _, _, load in self.running if load.size > 1]
        return len(loads) if size is None else [load.size for load in loads].count(size)

    def fits(self, job):
        """Return whether a job may start beside those that run, as this account has it."""
        if len(self.running) >= self.slots:
            return False
        if job.small or self.slots == 1:
            return True
        of_size = max(1, self.slots - 2)
        large = self.slots - 1
        return self.large_running() < large and self.large_running(job.size) < of_size

    def room(self):
        return Limits(self.slots).room(load for _, _, _, load in self.running)

    def take_quickly(self):
        only_seen = self.slots > 1 and self.large_running() >= self.slots - 1
        oldest = next(iter(self.queue), None)
        turn = self.queue.take_quickly(self.room().fits, unestimated=not only_seen)
        if turn is None:
            return
        job, load, job.overtook = turn
        assert self.quick_row >= QUICK_STREAK
        if job in self.estimated:
            assert all(other.small for other in self.estimated)
            assert load.size == job.size
            self.note_turn(job)
        else:
            assert job is oldest
            assert not self.estimated
            assert not only_seen
            assert job.priority == 0
            assert load == UNKNOWN_LOAD
            self.unestimated += 1
        self.leave(job, "taken")
        self.start(job, load)

    def note_turn(self, job):
        if self.check:
            self.check_turn(job)
        self.turns += 1
        for other in self.estimated:
            other.passed += self.fits(other)

    def observe(self, ended):
        """Expect of all who wait and are of its kind what `ended` really took."""
        for job in self.estimated:
            if job.kind == ended.kind and not job.priority:
                self.waiting[job.size] -= 1
                job.expect(ended.duration)
                self.waiting[job.size] += 1
                job.mark = job.overtaken_before + job.patience
        self.queue.re_estimate(ended.kind, ended.duration)

    def fill(self):
        while len(self.running) < self.slots:
            taken = self.next()
            if taken is None:
                return
            job, load, job.overtook = taken
            assert job.state == "waiting"
            assert load == Load(job.size)
            if self.check:
                assert job.overtook == any(other.number < job.number for other in self.estimated)
            self.note_turn(job)
            self.leave(job, "taken")
            self.start(job, load)

    def next(self):
        queue = self.queue
        while True:
            found = unestimated(queue)
            for place in found:
                job = place.item
                if job.dies_unestimated:
                    self.cancel(job)
                else:
                    self.estimated[job] = None
                    job.passed = 0
                queue.rank(place, job.work, job.kind)
            if found:
                assert queue._heap_items <= 2 * len(queue) + 65
            taken = queue.take(self.room().fits)
            if taken is not None or not found:
                return taken

    def start(self, job, load):
        job.state = "running"
        job.started = self.now
        job.overtaken_at_start = self.overtaken
        heappush(self.running, (self.now + job.duration, job.number, job, load))

    def check_slots(self):
        slots, running, waiting = self.slots, len(self.running), len(self.queue)
        assert running <= slots
        if slots > 1:
            assert self.large_running() < slots, "long ones took the slot kept for small ones"
        assert waiting >= len(self.estimated)
        for job in self.estimated:
            assert not self.fits(job), "one waits beside a slot that is free for its size"
        if running < slots:
            assert waiting == len(self.estimated)

    def check_turn(self, job):
        first = lowest = True
        mark, number, priority = job.mark, job.number, job.priority
        lowest_job = job
        for other in self.estimated:
            if not self.fits(other):
                continue
            if (other.mark, other.number) < (lowest_job.mark, lowest_job.number):
                lowest_job = other
            if other.mark < mark or (other.mark == mark and other.number < number):
                lowest = False
                first &= priority > other.priority
                # In words: a later one overtakes an equal only if that has patience left.
                assert priority != other.priority, "not the lowest mark of its priority"
            elif other.priority > priority:
                first = False
            if number > other.number and priority == other.priority:
                overtaken_meanwhile = job.overtaken_before - other.overtaken_before
                assert overtaken_meanwhile <= other.patience - job.patience + 1e-6, (
                    "overtaken with no patience left"
                )
                assert job.work < other.work, "overtaken by its equal"
        assert first or lowest, "neither by priority nor by mark"
        self.by_marks_alone += not first
        assert self.by_marks_alone <= (self.turns + 1) // FAIR_EVERY, "priority disregarded"
        size = lowest_job.size
        self.since_lowest[size] = 0 if lowest else self.since_lowest[size] + 1
        self.without_lowest = max(self.without_lowest, self.since_lowest[size])

    def check_end(self):
        assert len(self.queue) == 0
        assert {job.state for job in self.jobs} <= {"done", "cancelled"}
        assert not self.queue._unestimated
        assert self.queue._heap_items == 0
        assert not any(self.queue._heaps.values())
        assert not any(self.waiting)


def anything(_load):
    return True


def is_small(load):
    return load.is_small


def take(queue, *, only_small):
    """Take the next item and whether it is small, for those who do not ask whom it overtook."""
    turn = queue.take(is_small if only_small else anything)
    return None if turn is None else (turn.item, turn.load.is_small)


# ---- Random workloads

TINY, MEDIUM, HEAVY = (1e-4, 1e-2), (0.05, 0.5), (1.0, 10.0)


def workload(rng, size, *, ranked=None, learns=True):
    """Draw a few phases of arrivals; `rng` decides how wild they are."""
    random, uniform = rng.random, rng.uniform
    slots_worth = uniform(0.5, 4)
    wrong = rng.choice([0, 0, 0.3])
    cancelled = rng.choice([0, 0, 0.1, 0.9])
    if ranked is None:
        ranked = rng.choice([0, 0, 0.2, 1])
    jobs, now = [], 0.0
    while len(jobs) < size:
        classes = rng.choice(
            [[TINY], [MEDIUM], [HEAVY], [TINY, HEAVY], [TINY, TINY, TINY, MEDIUM, HEAVY]]
        )
        same = random() < 0.3
        kind = rng.choice([None, None, 1, 2]) if learns else None
        lows, highs = zip(*classes, strict=True)
        typical = sum(lows + highs) / (2 * len(classes))
        # A burst, or a stream: that leaves slots idle, fills them, or is more than they can do.
        gap = rng.choice([0, 0, 0.3, 1, 1, 3]) * typical / slots_worth
        for _ in range(rng.randrange(1, max(4, size // 2))):
            low, high = rng.choice(classes)
            work = low if same else uniform(low, high)
            job = Job(now, work)
            if wrong and random() < wrong:
                work *= 10 ** uniform(-2, 2)
                if random() < 0.1:
                    work = rng.choice([0.0, 1e-9, 1e6])
            if ranked and random() < ranked:
                job.priority = rng.randrange(-10, 11)
            job.expect(work)
            job.kind = kind
            if cancelled and random() < cancelled:
                job.cancel_at = now + uniform(0, 5 * typical)
                job.dies_unestimated = random() < 0.2
            jobs.append(job)
            now += gap
        if random() < 0.3:
            now += uniform(0, 20)
    return jobs


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_policy_keeps_its_promises_in_random_workloads(slots):
    rng = Random(slots)
    for _ in range(500):
        Simulation(slots, workload(rng, rng.randrange(20, 50))).run()


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_policy_keeps_its_promises_in_large_workloads(slots):
    Simulation(slots, workload(Random(slots), 2_000)).run()


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_low_priority_is_passed_a_bounded_number_of_turns(slots):
    rng = Random(10 + slots)
    for _ in range(100):
        jobs = workload(rng, 40, ranked=1, learns=False)
        simulation = Simulation(slots, jobs).run()
        assert simulation.without_lowest < FAIR_EVERY
        started = [job for job in jobs if job.started is not None and job.passed is not None]
        for job in started:
            lower = sum(
                (other.mark, other.number) < (job.mark, job.number) and other.started >= job.arrival
                for other in started
            )
            # One turn in so many goes to it, or to one with a lower mark, of which none can come
            # any more once its patience is over. Turns are counted for each size by itself.
            assert job.passed <= FAIR_EVERY * (lower + 1) + (FAIR_EVERY - 1) * KINDS


# ---- Endless streams


def stream(count, work, gap, *, start=0.0, priority=0):
    return [Job(start + gap * number, work, priority=priority) for number in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("load", [1, 2])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("tiny", [QUICK, 2 * QUICK])
def test_heavy_one_starts_in_an_endless_stream_of_tiny_ones(tiny, slots, load):
    many = round(2 / tiny)
    gap = tiny / slots / load
    heavy = Job(100 * gap, 0.1)
    jobs = [*stream(10, tiny, 0.0), *stream(many, tiny, gap), heavy]
    Simulation(slots, jobs, check=False).run()
    waited = heavy.overtaken_at_start - heavy.overtaken_before
    # Its patience, and what came until that was over; nothing where it was taken unseen.
    assert waited <= 0.52 * load
    assert (waited >= 0.1) == (tiny > QUICK or slots > 1)
    assert sum(job.started > heavy.started for job in jobs) > many / 4


@pytest.mark.parametrize("load", [1, 2])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("low", [-10, 0])
def test_low_priority_starts_in_an_endless_stream_of_high_priority(slots, load, low):
    work = 0.05
    gap = work / slots / load
    job = Job(100 * gap, work, priority=low)
    jobs = [*stream(50, work, 0.0, priority=10), *stream(1_000, work, gap, priority=10), job]
    Simulation(slots, jobs, check=False).run()
    lower = sum(other.mark <= job.mark and other.started >= job.arrival for other in jobs)
    assert job.passed <= lower + 8  # the lower ones have the higher priority, too, and go first


@pytest.mark.parametrize("slots", [1, 2])
def test_medium_ones_start_in_an_endless_stream_of_heavy_ones(slots):
    medium, heavy = 0.1, 2.0
    gap = heavy + medium / 10  # one medium beside ten heavy ones: all there is to be had
    mediums = stream(500, medium, 10 * gap, start=1.0)
    Simulation(slots, [*stream(2, heavy, 0.0), *stream(5_000, heavy, gap), *mediums]).run()
    assert max(job.started - job.arrival for job in mediums) <= heavy + medium


def test_tiny_ones_do_not_notice_an_endless_queue_of_heavy_ones():
    rng = Random(0)
    tiny = 0.005
    arrivals = accumulate(rng.expovariate(0.95 / tiny) for _ in range(10_000))
    tinies = [Job(arrival, tiny) for arrival in arrivals]
    heavies = [Job(0.0, rng.uniform(1, 10)) for _ in range(100)]
    Simulation(2, [*heavies, *tinies], check=False).run()
    free = 0.0  # when one slot would be, if there were no heavy ones
    for job in tinies:
        alone = max(job.arrival, free)
        assert job.started <= alone + 1e-6
        free = alone + tiny


# ---- Step by step


def put(queue, item, work=1.0, priority=0, kind=None):
    queue.add(item, priority=priority)
    for place in unestimated(queue):
        queue.rank(place, work, kind)


def drain(queue):
    for place in unestimated(queue, 1_000):
        queue.rank(place, 1.0)
    taken = []
    while (found := take(queue, only_small=False)) is not None:
        taken.append(found[0])
    assert (list(queue), len(queue)) == ([], 0)
    return taken


def test_equals_go_in_the_order_they_came():
    queue = FairQueue()
    for item in "abcde":
        put(queue, item)
    assert drain(queue) == list("abcde")


def test_less_work_overtakes_more():
    queue = FairQueue()
    for item, work in (("heavy", 1.0), ("tiny", 0.001), ("medium", 0.1)):
        put(queue, item, work)
    assert drain(queue) == ["tiny", "medium", "heavy"]


def test_nobody_overtakes_beyond_the_limit():
    queue = FairQueue()
    put(queue, "heavy", 1.0)
    queue.note_ended(OVERTAKING_LIMIT - 0.5, overtook=True)
    put(queue, "soon enough", 0.1)
    queue.note_ended(0.5, overtook=True)
    put(queue, "too late", 0.0)
    assert drain(queue) == ["soon enough", "heavy", "too late"]


def test_work_too_short_to_measure_uses_up_patience_too():
    queue = FairQueue()
    put(queue, "heavy", 0.001)
    for _ in range(1_000):
        queue.note_ended(0.0, overtook=True)
    put(queue, "nothing", 0.0)
    assert drain(queue) == ["heavy", "nothing"]


def test_higher_priority_goes_first():
    queue = FairQueue()
    for priority in (0, -10, 10, 1, -1):
        put(queue, priority, 0.001, priority)
    assert drain(queue) == [10, 1, 0, -1, -10]


def test_one_turn_in_so_many_goes_by_the_key_alone():
    queue = FairQueue()
    put(queue, "low", 0.01, -10)
    for number in range(20):
        put(queue, number, 1.0, 10)
    assert drain(queue).index("low") == FAIR_EVERY - 1


def test_no_rhythm_of_the_turns_keeps_a_low_priority_out():
    queue = FairQueue()
    put(queue, "low", 0.1, -1)
    for _ in range(100):
        put(queue, "heavy", 1.0)
        taken = [take(queue, only_small=False)]
        for _ in range(7):  # meanwhile, in the other slot
            put(queue, "tiny", 0.001)
            taken.append(take(queue, only_small=True))
        for item, _ in taken:
            if item == "low":
                return
            queue.note_ended(1.0, overtook=True)
    pytest.fail("never had its turn")


def test_no_rhythm_of_the_turns_keeps_a_small_one_out():
    queue = FairQueue()
    put(queue, "small", 0.01)
    for _ in range(100):
        put(queue, "high", 1.0, 1)
        taken = [take(queue, only_small=True)]
        for _ in range(7):
            put(queue, "higher", 1.0, 2)
            taken.append(take(queue, only_small=False))
        for item, _ in taken:
            if item == "small":
                return
            queue.note_ended(1.0, overtook=True)
    pytest.fail("never had its turn")


@pytest.mark.parametrize(
    ("work", "priority", "small"),
    [
        (0.0, 0, True),
        (SMALL, 0, True),
        (SMALL * 1.001, 0, False),
        (1e6, 1, True),
        (1e6, 10, True),
        (0.0, -1, False),
        (0.0, -10, False),
    ],
)
def test_small_is_little_work_or_high_priority(work, priority, small):
    queue = FairQueue()
    put(queue, "it", work, priority)
    assert take(queue, only_small=True) == (("it", True) if small else None)
    assert take(queue, only_small=False) == (None if small else ("it", False))


def test_what_is_not_small_waits_for_its_slot():
    queue = FairQueue()
    put(queue, "heavy", 1.0)
    put(queue, "tiny", 0.001)
    queue.note_ended(100, overtook=True)
    put(queue, "later", 0.001)
    assert [take(queue, only_small=True) for _ in range(3)] == [
        ("tiny", True),
        ("later", True),
        None,
    ]
    assert drain(queue) == ["heavy"]


def test_nobody_goes_unestimated():
    queue = FairQueue()
    queue.add("a")
    assert take(queue, only_small=False) is None
    (place,) = unestimated(queue)
    assert take(queue, only_small=False) is None
    assert list(queue) == ["a"]
    assert unestimated(queue) == []
    queue.rank(place, 1.0)
    assert drain(queue) == ["a"]


def test_unestimated_ones_come_in_order_or_from_behind():
    queue = FairQueue()
    for item in "abcdefg":
        queue.add(item)
    for item in "bfg":
        queue.discard(item)
    assert queue.next_unestimated().item == "a"
    assert queue.next_unestimated(from_behind=True).item == "e"
    assert [place.item for place in unestimated(queue)] == ["c", "d"]
    assert queue.next_unestimated(from_behind=True) is None


@pytest.mark.parametrize("priority", [1, -1])
def test_priority_takes_part_unestimated_among_its_equals_in_the_order_of_their_coming(priority):
    queue = FairQueue()
    for item in "abc":
        queue.add(item, priority=priority)
    assert unestimated(queue) == []
    assert [take(queue, only_small=False) for _ in "abc"] == [
        (item, priority > 0) for item in "abc"
    ]


def test_high_priority_is_found_at_once_behind_many_unestimated_ones():
    queue = FairQueue()
    for item in range(20_000):
        queue.add(item)
    queue.add("urgent", priority=10)
    assert not queue.is_undecided
    assert take(queue, only_small=True) == ("urgent", True)


def test_known_work_takes_part_unestimated():
    queue = FairQueue()
    queue.add("large", work=1.0)
    queue.add("small", work=0.0)
    assert [take(queue, only_small=False) for _ in range(2)] == [("small", True), ("large", False)]


def test_one_that_came_before_is_overtaken_wherever_it_was_looked_at():
    queue = FairQueue()
    for item in "abc":
        queue.add(item)
    work = {"a": 5.0, "b": 1.0, "c": 0.001}
    while (place := queue.next_unestimated(from_behind=True)) is not None:
        queue.rank(place, work[place.item])
    turns = [queue.take(anything) for _ in range(3)]
    assert [turn.item for turn in turns] == ["c", "b", "a"]
    assert [turn.overtook for turn in turns] == [True, True, False]


def test_line_lists_those_who_wait_in_the_order_they_came():
    queue = FairQueue()
    put(queue, "b", 5.0)
    put(queue, "a", 1.0, 5)
    queue.add("c")
    unestimated(queue)
    queue.add("d")
    assert list(queue) == list("bacd")
    assert len(queue) == 4
    assert take(queue, only_small=False) == ("a", True)
    for item in queue:
        queue.discard(item)
    assert (list(queue), len(queue)) == ([], 0)


def test_new_appraisal_is_for_all_of_the_kind_and_for_nobody_else():
    queue = FairQueue()
    put(queue, "other", 0.5, kind="other")
    put(queue, "unknown", 0.6)
    for item in "ab":
        put(queue, item, 1.0, kind="kind")
    queue.note_ended(1.0, overtook=True)
    queue.re_estimate("kind", 0.1)
    queue.re_estimate("no such kind", 0.1)
    put(queue, "c", 0.01)
    assert list(queue) == ["other", "unknown", "a", "b", "c"]
    assert drain(queue) == ["a", "b", "c", "other", "unknown"]


def test_new_appraisal_may_make_small_and_not_small():
    queue = FairQueue()
    for item, priority in (("low", -1), ("a", 0), ("b", 0), ("high", 1)):
        put(queue, item, 1.0, priority, kind="kind")
    queue.re_estimate("kind", 0.001)
    taken = [take(queue, only_small=True) for _ in range(2)]
    assert taken == [("high", True), ("a", True)]
    queue.re_estimate("kind", 2.0)
    assert take(queue, only_small=True) is None
    assert [take(queue, only_small=False) for _ in range(3)] == [("b", False), ("low", False), None]
    assert len(queue) == 0


def test_new_appraisal_does_not_bring_back_who_left():
    queue = FairQueue()
    for item in "abc":
        put(queue, item, kind="kind")
    queue.discard("a")
    assert take(queue, only_small=False) == ("b", False)
    queue.re_estimate("kind", 0.001)
    assert drain(queue) == ["c"]
    queue.re_estimate("kind", 0.001)
    assert drain(queue) == []


def test_new_appraisals_leave_nothing_behind():
    queue = FairQueue()
    for item in range(100):
        put(queue, item, kind="kind")
    for number in range(1_000):
        queue.re_estimate("kind", (1.0, 0.001, 2.0)[number % 3])
        assert held(queue) <= 2 * len(queue) + 65
    assert queue._heap_items == sum(map(len, queue._heaps.values()))
    assert drain(queue) == list(range(100))


STAGES = ["newcomer", "being appraised", "sorted in"]


def bring(queue, stage):
    """Let "x" in, and have it stand where `stage` says; gives how to bring it all the way."""
    queue.add("x")
    if stage == "newcomer":
        return lambda: None
    (place,) = unestimated(queue)
    if stage == "being appraised":
        return lambda: queue.rank(place, 0.0)
    queue.rank(place, 0.0)
    return lambda: None


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way_out", ["discard", "clear"])
def test_who_leaves_never_comes_up(stage, way_out):
    queue = FairQueue()
    go_on = bring(queue, stage)
    if way_out == "clear":
        queue.clear()
        assert held(queue) == 0
    else:
        queue.discard("x")
        queue.discard("x")
    assert (list(queue), len(queue)) == ([], 0)
    go_on()
    assert drain(queue) == []
    assert queue._heap_items == 0
    put(queue, "y")
    assert drain(queue) == ["y"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way_out", ["discard", "clear"])
def test_who_left_may_come_again(stage, way_out):
    queue = FairQueue()
    go_on = bring(queue, stage)
    if way_out == "clear":
        queue.clear()
    else:
        queue.discard("x")
    put(queue, "y", 0.001)
    put(queue, "x", 0.01)
    go_on()
    assert list(queue) == ["y", "x"]
    assert drain(queue) == ["y", "x"]
    put(queue, "x")
    assert drain(queue) == ["x"]


def test_discard_lets_a_stranger_be():
    queue = FairQueue()
    put(queue, "a")
    queue.discard("b")
    assert drain(queue) == ["a"]
    queue.discard("a")
    assert len(queue) == 0


def held(queue):
    return max(len(queue._oldest), len(queue._unestimated) + sum(map(len, queue._heaps.values())))


def test_those_who_left_are_not_kept_for_ever():
    queue = FairQueue()
    for item in range(10):
        put(queue, item, 0.0)  # those in front stay, so nobody behind them is taken out by the way
    for item in range(10_000):
        put(queue, -1 - item, 1.0, item % 21 - 10 if item % 2 else 0)
        queue.discard(-1 - item)
        assert queue._heap_items == sum(map(len, queue._heaps.values()))
        assert held(queue) <= 3 * len(queue) + 70
    assert drain(queue) == list(range(10))


def test_those_who_left_unestimated_are_not_kept_for_ever():
    queue = FairQueue()
    for item in range(10_000):  # while all slots are taken, and nobody is appraised
        queue.add(item)
        queue.discard(item)
        assert held(queue) <= 100
    assert drain(queue) == []


def test_line_forgets_all_when_all_left():
    queue = FairQueue()
    for _ in range(3):
        for item in range(10_000):
            queue.add(item)
            if item % 2:
                for place in unestimated(queue):
                    queue.rank(place, 1.0)
        for item in list(queue):
            queue.discard(item)
        put(queue, "next")
        assert held(queue) <= 70
        assert drain(queue) == ["next"]
        assert held(queue) == 0


# ---- A discard in the midst of it, as from a signal handler or a finaliser


def interrupted(call, at, interrupt):
    """Call `call`, and `interrupt` before its `at`-th instruction; tells if it came so far."""
    file = FairQueue.take.__code__.co_filename
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != file:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == at:
                interrupt()
        return trace

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        result = call()
    finally:
        sys.settrace(tracing)
    return result, count >= at


def crowd(left):
    queue = FairQueue()
    for item in range(left):
        put(queue, f"left {item}", 1.0)
    put(queue, "heavy", 5.0, 0, "kind")
    put(queue, "small", 0.001, 0)
    put(queue, "low", 0.1, -1, "kind")
    for item in range(left):
        queue.discard(f"left {item}")
    queue.add("estimated")
    (place,) = unestimated(queue)
    queue.add("newcomer")
    return queue, place


IN_PROCESS = {"heavy", "small", "low", "estimated", "newcomer"}


METHODS = {
    "add": lambda queue, _: queue.add("new"),
    "newcomers": lambda queue, _: unestimated(queue),
    "rank": lambda queue, place: queue.rank(place, 1.0, "kind"),
    "rank and sweep": lambda queue, place: queue.rank(place, 1.0, "new kind"),
    "reappraise": lambda queue, _: queue.re_estimate("kind", 0.01),
    "take": lambda queue, _: queue.take(anything),
    "take small": lambda queue, _: queue.take(is_small),
    "serve": lambda queue, _: queue.note_ended(1.0, overtook=True),
    "list": lambda queue, _: list(queue),
}


@pytest.mark.parametrize("victim", sorted(IN_PROCESS))
@pytest.mark.parametrize("method", METHODS)
def test_discard_may_interrupt(method, victim):
    at, so_far = 0, True
    sweeps = method == "rank and sweep"
    while so_far:
        at += 7 if sweeps else 1  # it does the same for each of many
        queue, place = crowd(80 if sweeps else 0)
        gone = []

        def interrupt(queue=queue, gone=gone):
            gone += [item for item in queue if item == victim]
            queue.discard(victim)

        result, so_far = interrupted(partial(METHODS[method], queue, place), at, interrupt)
        went = []
        if method == "newcomers":
            for found in result:
                queue.rank(found, 1.0)
        elif method.startswith("take") and result is not None:
            went.append(result[0])
        if not method.startswith("rank"):
            queue.rank(place, 1.0)
        went += drain(queue)
        assert sorted(went + gone) == sorted(
            [*IN_PROCESS, "new"] if method == "add" else IN_PROCESS
        )
        assert queue._heap_items == 0
    assert at > 1


@pytest.mark.parametrize("victim", sorted(IN_PROCESS))
def test_discard_may_interrupt_clear(victim):
    at, so_far = 0, True
    while so_far:
        at += 1
        queue, place = crowd(0)
        _, so_far = interrupted(queue.clear, at, lambda queue=queue: queue.discard(victim))
        queue.rank(place, 1.0)
        assert drain(queue) == []
    assert at > 1


def test_discard_may_interrupt_discard():
    at, so_far = 0, True
    while so_far:
        at += 1
        queue, place = crowd(0)
        first = partial(queue.discard, "heavy")
        _, so_far = interrupted(first, at, lambda queue=queue: queue.discard("low"))
        queue.discard("low")
        queue.rank(place, 1.0)
        queue.re_estimate("kind", 0.01)
        assert sorted(drain(queue)) == ["estimated", "newcomer", "small"]
    assert at > 1


# ---- What the bounds leave open


@pytest.mark.parametrize("served", [0, 5, 25])
def test_late_tiny_one_overtakes_a_backlog_that_overtook_nobody(served):
    queue = FairQueue()
    for number in range(30):
        put(queue, f"heavy {number}", 10.0)
    for number in range(served):
        assert take(queue, only_small=False) == (f"heavy {number}", False)
        queue.note_ended(10.0, overtook=False)
    put(queue, "tiny", 0.001)
    assert take(queue, only_small=False) == ("tiny", True)


def take_quickly(queue, *, only_small=False, unestimated=True):
    fits = is_small if only_small else anything
    turn = queue.take_quickly(fits, unestimated=unestimated)
    return None if turn is None else turn.item


def row_of_quick(queue, length=QUICK_STREAK):
    for _ in range(length):
        queue.note_ended(QUICK, overtook=False)


def test_items_are_taken_unestimated_after_a_row_of_quick_ones():
    queue = FairQueue()
    queue.add("a")
    queue.add("b")
    row_of_quick(queue, QUICK_STREAK - 1)
    assert not queue.is_quick
    assert take_quickly(queue) is None
    row_of_quick(queue, 1)
    assert queue.is_quick
    assert [take_quickly(queue) for _ in range(3)] == ["a", "b", None]
    assert len(queue) == 0
    queue.add("c")
    queue.note_ended(2 * QUICK, overtook=False)
    assert not queue.is_quick
    assert take_quickly(queue) is None


@pytest.mark.parametrize("only_small", [False, True])
def test_where_nobody_may_go_unestimated_those_that_were_estimated_do(only_small):
    queue = FairQueue()
    row_of_quick(queue)
    queue.add("a")
    assert take_quickly(queue, only_small=only_small, unestimated=False) is None
    assert list(queue) == ["a"]
    assert take_quickly(queue, only_small=only_small) == "a"
    put(queue, "estimated", SMALL)
    assert take_quickly(queue, only_small=only_small, unestimated=False) == "estimated"


def test_small_ones_that_were_estimated_go_before_those_that_were_not():
    queue = FairQueue()
    row_of_quick(queue)
    put(queue, "estimated", SMALL)
    queue.add("newcomer")
    assert [take_quickly(queue) for _ in range(3)] == ["estimated", "newcomer", None]


def test_nobody_is_taken_unestimated_past_a_priority_or_one_that_was_estimated():
    queue = FairQueue()
    row_of_quick(queue)
    queue.add("a")
    queue.add("urgent", priority=1)
    queue.add("b")
    assert [take_quickly(queue) for _ in range(3)] == ["urgent", "a", "b"]
    queue.add("low", priority=-1)
    queue.add("d")
    assert take_quickly(queue) is None
    queue.discard("low")
    put(queue, "estimated", 1.0)
    queue.add("c")
    assert take_quickly(queue) is None


def test_single_item_is_taken_unestimated_where_there_is_room_for_any():
    queue = FairQueue()
    queue.add("a", pooled=True)
    assert queue.take_single(is_small) is None
    queue.add("b")
    assert queue.take_single(anything) is None
    queue.discard("b")
    assert queue.take_single(anything).load == Load(3, None, pooled=True)
    assert queue.take_single(anything) is None


def test_first_item_is_taken_unestimated_if_it_is_not_pooled():
    queue = FairQueue()
    queue.add("a")
    queue.add("b", pooled=True)
    assert queue.take_unpooled(lambda _: False) is None
    assert queue.take_unpooled(lambda pooled: not pooled).item == "a"
    assert queue.take_unpooled(lambda _: True) is None
    assert list(queue) == ["b"]


def streak(queue, number, seconds):
    for _ in range(number):
        queue.note_ended(seconds, overtook=False)
    return queue.is_quick


def test_waits_for_the_gil_end_no_long_row_of_quick_queries():
    queue = FairQueue()
    assert streak(queue, 1_000, QUICK)
    assert streak(queue, 5, 0.005)  # of as many worker threads, while a loop submits
    assert streak(queue, 160, QUICK)


@pytest.mark.parametrize(("slow", "at_most"), [(0.005, 8), (0.021, 1)])
def test_slow_queries_end_a_row_of_quick_ones(slow, at_most):
    queue = FairQueue()
    assert streak(queue, 1_000, QUICK)
    assert not streak(queue, at_most, slow)


def test_one_slow_query_in_five_ends_a_row_of_quick_ones():
    queue = FairQueue()
    assert streak(queue, 1_000, QUICK)
    assert not [streak(queue, 4, QUICK) and streak(queue, 1, 0.005) for _ in range(40)][-1]
