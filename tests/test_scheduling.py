from __future__ import annotations

import sys
from functools import partial
from heapq import heappop, heappush
from itertools import accumulate
from random import Random

import pytest

from polars_async.scheduling.fair_queue import (
    FAIR_TURN,
    PATIENCE,
    QUICK,
    QUICK_ROW,
    SMALL,
    UNKNOWN,
    Line,
    is_kept,
)

LEAST = 1e-5
TOGETHER = 32


def newcomers(line, at_most=TOGETHER):
    """Give places to some, as a thread does that appraises them."""
    found = []
    while len(found) < at_most and (place := line.newcomer()) is not None:
        found.append(place)
    return found


# ---- A lane without threads or clock


class Job:
    __slots__ = (
        "arrival",
        "cancel_at",
        "dies_unappraised",
        "duration",
        "kind",
        "mark",
        "number",
        "overtaken_at_start",
        "overtaken_before",
        "overtook",
        "patience",
        "priority",
        "small",
        "sorted_in",
        "started",
        "state",
        "turn",
        "work",
    )

    def __init__(self, arrival, work, *, priority=0):
        self.arrival = arrival
        self.duration = work
        self.priority = priority
        self.kind = self.cancel_at = None
        self.dies_unappraised = False
        self.state = "to come"
        self.expect(work)
        self.started = self.overtaken_at_start = self.turn = None
        self.overtook = False

    def expect(self, work):
        if self.priority:  # which is not appraised
            work = UNKNOWN
        self.work = work
        self.patience = PATIENCE * min(max(work, LEAST), 60)
        self.small = self.priority > 0 or (self.priority == 0 and work <= 0.01)


class Simulation:
    """
    Slots that serve jobs as a lane does, and check at each step what the policy promises.

    It keeps its own account of the work that overtook, and knows what is small by itself.
    """

    def __init__(self, slots, jobs, *, check=True):
        self.line = Line()
        self.slots = slots
        self.jobs = jobs
        self.check = check
        self.now = self.overtaken = 0.0
        self.quick_row = self.unseen = 0
        self.running = []  # a heap of (end, number, job, small)
        self.long_running = self.small_waiting = 0
        self.appraised = {}
        # Those that anybody may take, and those for small ones only.
        self.turns = [0, 0]
        self.since_lowest = [0, 0]  # turns since one that went to the lowest mark
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
        kept = 1 if self.quick_row >= QUICK_ROW else 2
        if not len(self.line) and (free > kept or free == self.slots):
            self.start(job, small=False)
            return
        self.line.add(job, priority=job.priority)
        job.state = "waiting"
        self.small_waiting += job.small
        if job.priority:
            self.appraised[job] = None
            job.sorted_in = tuple(self.turns)
        self.fill()

    def cancel(self, job):
        self.line.discard(job)  # also those that run, or are done: it must not matter
        if job.state == "waiting":
            self.leave(job, "cancelled")

    def leave(self, job, state):
        job.state = state
        self.small_waiting -= job.small
        self.appraised.pop(job, None)

    def end(self):
        self.now, _, job, small = heappop(self.running)
        assert job.state == "running"
        job.state = "done"
        self.long_running -= not small
        self.overtaken += max(job.duration, LEAST) if job.overtook else 0
        self.line.serve(job.duration, overtook=job.overtook)
        self.quick_row = self.quick_row + 1 if job.duration <= QUICK else 0
        if job.kind is not None and job.number % 3 == 0:
            self.learn(job)
        self.take_quickly()
        self.fill()
        self.check_slots()

    def keeps(self, slots):
        return self.slots > 1 and self.long_running >= max(self.slots - slots, 1)

    def take_quickly(self):
        only_small, only_seen = self.keeps(2), self.keeps(1)
        oldest = next(iter(self.line), None)
        turn = self.line.take_quickly(only_small=only_small, unseen=not only_seen)
        if turn is None:
            return
        job, small, job.overtook = turn
        assert self.quick_row >= QUICK_ROW
        if job in self.appraised:
            assert all(other.small for other in self.appraised)
            if self.check:
                self.check_turn(job, only_small)
            self.count_turn(job, only_small)
        else:
            assert job is oldest
            assert not self.appraised
            assert not only_seen
            assert job.priority == 0
            self.unseen += 1
        assert small == (job in self.appraised)
        self.leave(job, "taken")
        self.start(job, small=small)

    def count_turn(self, job, only_small):
        self.turns[only_small] += 1
        job.turn = tuple(self.turns)

    def learn(self, ended):
        """Expect of all who wait and are of its kind what `ended` really took."""
        for job in self.appraised:
            if job.kind == ended.kind and not job.priority:
                self.small_waiting -= job.small
                job.expect(ended.duration)
                self.small_waiting += job.small
                job.mark = job.overtaken_before + job.patience
        self.line.reappraise(ended.kind, ended.duration)

    def fill(self):
        while len(self.running) < self.slots:
            only_small = self.keeps(2)
            taken = self.next(only_small)
            if taken is None:
                return
            job, small, job.overtook = taken
            assert job.state == "waiting"
            assert small == job.small
            if self.check:
                assert job.overtook == any(other.number < job.number for other in self.appraised)
                self.check_turn(job, only_small)
            self.count_turn(job, only_small)
            self.leave(job, "taken")
            self.start(job, small=small)

    def next(self, only_small):
        line = self.line
        while True:
            found = newcomers(line)
            for place in found:
                job = place.item
                if job.dies_unappraised:
                    self.cancel(job)
                else:
                    self.appraised[job] = None
                    job.sorted_in = tuple(self.turns)
                line.sort_in(place, job.work, job.kind)
            if found:
                assert line._sorted_in <= 2 * len(line) + 65
            taken = line.take(only_small=only_small)
            if taken is not None or not found:
                return taken

    def start(self, job, *, small):
        job.state = "running"
        job.started = self.now
        job.overtaken_at_start = self.overtaken
        self.long_running += not small
        heappush(self.running, (self.now + job.duration, job.number, job, small))

    def check_slots(self):
        slots, running, waiting = self.slots, len(self.running), len(self.line)
        if slots > 1:
            assert self.long_running < slots, "long ones took the slot that is kept for small ones"
        if running < slots:
            assert not self.small_waiting, "a small one waits beside a free slot"
            assert not waiting or self.keeps(2), "a slot is idle"
        assert waiting >= len(self.appraised)

    def check_turn(self, job, only_small):
        first = lowest = True
        mark, number, priority = job.mark, job.number, job.priority
        for other in self.appraised:
            if only_small and not other.small:
                continue
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
        assert self.by_marks_alone <= (sum(self.turns) + 1) // FAIR_TURN, "priority disregarded"
        since = self.since_lowest[only_small] = 0 if lowest else self.since_lowest[only_small] + 1
        self.without_lowest = max(self.without_lowest, since)

    def check_end(self):
        assert len(self.line) == 0
        assert {job.state for job in self.jobs} <= {"done", "cancelled"}
        assert not self.line._newcomers
        assert self.line._sorted_in == 0
        assert not any(self.line._heaps.values())
        assert self.small_waiting == self.long_running == 0


def take(line, *, only_small):
    """Take the next item and whether it is small, for those who do not ask whom it overtook."""
    turn = line.take(only_small=only_small)
    return None if turn is None else turn[:2]


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
                job.dies_unappraised = random() < 0.2
            jobs.append(job)
            now += gap
        if random() < 0.3:
            now += uniform(0, 20)
    return jobs


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_policy_keeps_its_promises_in_random_workloads(slots):
    rng = Random(slots)
    for _ in range(2_500):
        Simulation(slots, workload(rng, rng.randrange(20, 50))).run()


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_policy_keeps_its_promises_in_large_workloads(slots):
    Simulation(slots, workload(Random(slots), 2_000)).run()


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_low_priority_is_passed_a_bounded_number_of_turns(slots):
    rng = Random(10 + slots)
    for _ in range(300):
        jobs = workload(rng, 40, ranked=1, learns=False)
        simulation = Simulation(slots, jobs).run()
        assert simulation.without_lowest < FAIR_TURN
        turns = [job for job in jobs if job.turn is not None]
        for job in turns:
            passed = [after - before for after, before in zip(job.turn, job.sorted_in, strict=True)]
            lower = sum(
                (other.mark, other.number) < (job.mark, job.number) and other.turn > job.sorted_in
                for other in turns
            )
            # One turn in so many goes to it, or to one with a lower mark, of which none can come
            # any more once its patience is over. Turns for small ones are counted by themselves.
            if job.small:
                assert sum(passed) - 1 <= FAIR_TURN * lower + 2 * (FAIR_TURN - 1)
            else:
                assert passed[False] - 1 <= FAIR_TURN * lower + FAIR_TURN - 1


# ---- Endless streams


def stream(count, work, gap, *, start=0.0, priority=0):
    return [Job(start + gap * number, work, priority=priority) for number in range(count)]


@pytest.mark.parametrize("load", [1, 2])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("tiny", [QUICK, 2 * QUICK])
def test_heavy_one_starts_in_an_endless_stream_of_tiny_ones(tiny, slots, load):
    many = round(20 / tiny)
    gap = tiny / slots / load
    heavy = Job(1_000 * gap, 1.0)
    jobs = [*stream(50, tiny, 0.0), *stream(many, tiny, gap), heavy]
    Simulation(slots, jobs, check=False).run()
    waited = heavy.overtaken_at_start - heavy.overtaken_before
    # Its patience, and what came until that was over; nothing where it was taken unseen.
    assert waited <= 5.2 * load
    assert (waited >= 1) == (tiny > QUICK or slots > 1)
    assert sum(job.started > heavy.started for job in jobs) > many / 4


@pytest.mark.parametrize("load", [1, 2])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("low", [-10, 0])
def test_low_priority_starts_in_an_endless_stream_of_high_priority(slots, load, low):
    work = 0.05
    gap = work / slots / load
    job = Job(1_000 * gap, work, priority=low)
    jobs = [*stream(50, work, 0.0, priority=10), *stream(10_000, work, gap, priority=10), job]
    Simulation(slots, jobs, check=False).run()
    passed = sum(job.turn) - sum(job.sorted_in)
    lower = sum(other.mark <= job.mark and other.started >= job.arrival for other in jobs)
    assert passed <= lower + 8  # the lower ones have the higher priority, too, and go first


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


def put(line, item, work=1.0, priority=0, kind=None):
    line.add(item, priority=priority)
    for place in newcomers(line):
        line.sort_in(place, work, kind)


def drain(line):
    for place in newcomers(line, 1_000):
        line.sort_in(place, 1.0)
    taken = []
    while (found := take(line, only_small=False)) is not None:
        taken.append(found[0])
    assert (list(line), len(line)) == ([], 0)
    return taken


def test_equals_go_in_the_order_they_came():
    line = Line()
    for item in "abcde":
        put(line, item)
    assert drain(line) == list("abcde")


def test_less_work_overtakes_more():
    line = Line()
    for item, work in (("heavy", 1.0), ("tiny", 0.001), ("medium", 0.1)):
        put(line, item, work)
    assert drain(line) == ["tiny", "medium", "heavy"]


def test_nobody_overtakes_once_patience_is_over():
    line = Line()
    put(line, "heavy", 1.0)
    line.serve(PATIENCE - 0.5, overtook=True)
    put(line, "soon enough", 0.1)
    line.serve(0.5, overtook=True)
    put(line, "too late", 0.0)
    assert drain(line) == ["soon enough", "heavy", "too late"]


def test_work_too_short_to_measure_uses_up_patience_too():
    line = Line()
    put(line, "heavy", 0.001)
    for _ in range(1_000):
        line.serve(0.0, overtook=True)
    put(line, "nothing", 0.0)
    assert drain(line) == ["heavy", "nothing"]


def test_higher_priority_goes_first():
    line = Line()
    for priority in (0, -10, 10, 1, -1):
        put(line, priority, 0.001, priority)
    assert drain(line) == [10, 1, 0, -1, -10]


def test_one_turn_in_so_many_goes_by_the_mark_alone():
    line = Line()
    put(line, "low", 0.01, -10)
    for number in range(20):
        put(line, number, 1.0, 10)
    assert drain(line).index("low") == FAIR_TURN - 1


def test_no_rhythm_of_the_turns_keeps_a_low_priority_out():
    line = Line()
    put(line, "low", 0.1, -1)
    for _ in range(100):
        put(line, "heavy", 1.0)
        taken = [take(line, only_small=False)]
        for _ in range(7):  # meanwhile, in the other slot
            put(line, "tiny", 0.001)
            taken.append(take(line, only_small=True))
        for item, _ in taken:
            if item == "low":
                return
            line.serve(1.0, overtook=True)
    pytest.fail("never had its turn")


def test_no_rhythm_of_the_turns_keeps_a_small_one_out():
    line = Line()
    put(line, "small", 0.01)
    for _ in range(100):
        put(line, "high", 1.0, 1)
        taken = [take(line, only_small=True)]
        for _ in range(7):
            put(line, "higher", 1.0, 2)
            taken.append(take(line, only_small=False))
        for item, _ in taken:
            if item == "small":
                return
            line.serve(1.0, overtook=True)
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
    line = Line()
    put(line, "it", work, priority)
    assert take(line, only_small=True) == (("it", True) if small else None)
    assert take(line, only_small=False) == (None if small else ("it", False))


def test_what_is_not_small_waits_for_its_slot():
    line = Line()
    put(line, "heavy", 1.0)
    put(line, "tiny", 0.001)
    line.serve(100, overtook=True)
    put(line, "later", 0.001)
    assert [take(line, only_small=True) for _ in range(3)] == [
        ("tiny", True),
        ("later", True),
        None,
    ]
    assert drain(line) == ["heavy"]


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (1, [[False], [False, True], [False, False, True], [False, False, False, True]]),
        (2, [[False], [False, True], [False, True, True], [False, False, True, True]]),
    ],
)
def test_some_of_several_slots_are_kept_for_small_ones(kept, expected):
    all_slots = (1, 2, 3, 4)
    assert [
        [is_kept(kept, slots, busy) for busy in range(slots)] for slots in all_slots
    ] == expected
    assert not is_kept(kept, 1, 1)
    assert is_kept(kept, 3, 5)  # some run beyond the slots


def test_nobody_goes_unappraised():
    line = Line()
    line.add("a")
    assert take(line, only_small=False) is None
    (place,) = newcomers(line)
    assert take(line, only_small=False) is None
    assert list(line) == ["a"]
    assert newcomers(line) == []
    line.sort_in(place, 1.0)
    assert drain(line) == ["a"]


def test_newcomers_come_in_order_or_from_behind():
    line = Line()
    for item in "abcdefg":
        line.add(item)
    for item in "bfg":
        line.discard(item)
    assert line.newcomer().item == "a"
    assert line.newcomer(from_behind=True).item == "e"
    assert [place.item for place in newcomers(line)] == ["c", "d"]
    assert line.newcomer(from_behind=True) is None


@pytest.mark.parametrize("priority", [1, -1])
def test_priority_takes_part_unappraised_among_its_equals_in_the_order_of_their_coming(priority):
    line = Line()
    for item in "abc":
        line.add(item, priority=priority)
    assert newcomers(line) == []
    assert [take(line, only_small=False) for _ in "abc"] == [(item, priority > 0) for item in "abc"]


def test_high_priority_is_found_at_once_behind_many_newcomers():
    line = Line()
    for item in range(20_000):
        line.add(item)
    line.add("urgent", priority=10)
    assert not line.is_undecided
    assert take(line, only_small=True) == ("urgent", True)


def test_known_work_takes_part_unappraised():
    line = Line()
    line.add("large", work=1.0)
    line.add("small", work=0.0)
    assert [take(line, only_small=False) for _ in range(2)] == [("small", True), ("large", False)]


def test_one_that_came_before_is_overtaken_wherever_it_was_looked_at():
    line = Line()
    for item in "abc":
        line.add(item)
    work = {"a": 5.0, "b": 1.0, "c": 0.001}
    while (place := line.newcomer(from_behind=True)) is not None:
        line.sort_in(place, work[place.item])
    turns = [line.take(only_small=False) for _ in range(3)]
    assert [turn.item for turn in turns] == ["c", "b", "a"]
    assert [turn.overtook for turn in turns] == [True, True, False]


def test_line_lists_those_who_wait_in_the_order_they_came():
    line = Line()
    put(line, "b", 5.0)
    put(line, "a", 1.0, 5)
    line.add("c")
    newcomers(line)
    line.add("d")
    assert list(line) == list("bacd")
    assert len(line) == 4
    assert take(line, only_small=False) == ("a", True)
    for item in line:
        line.discard(item)
    assert (list(line), len(line)) == ([], 0)


def test_new_appraisal_is_for_all_of_the_kind_and_for_nobody_else():
    line = Line()
    put(line, "other", 0.5, kind="other")
    put(line, "unknown", 0.6)
    for item in "ab":
        put(line, item, 1.0, kind="kind")
    line.serve(1.0, overtook=True)
    line.reappraise("kind", 0.1)
    line.reappraise("no such kind", 0.1)
    put(line, "c", 0.01)
    assert list(line) == ["other", "unknown", "a", "b", "c"]
    assert drain(line) == ["a", "b", "c", "other", "unknown"]


def test_new_appraisal_may_make_small_and_not_small():
    line = Line()
    for item, priority in (("low", -1), ("a", 0), ("b", 0), ("high", 1)):
        put(line, item, 1.0, priority, kind="kind")
    line.reappraise("kind", 0.001)
    taken = [take(line, only_small=True) for _ in range(2)]
    assert taken == [("high", True), ("a", True)]
    line.reappraise("kind", 2.0)
    assert take(line, only_small=True) is None
    assert [take(line, only_small=False) for _ in range(3)] == [("b", False), ("low", False), None]
    assert len(line) == 0


def test_new_appraisal_does_not_bring_back_who_left():
    line = Line()
    for item in "abc":
        put(line, item, kind="kind")
    line.discard("a")
    assert take(line, only_small=False) == ("b", False)
    line.reappraise("kind", 0.001)
    assert drain(line) == ["c"]
    line.reappraise("kind", 0.001)
    assert drain(line) == []


def test_new_appraisals_leave_nothing_behind():
    line = Line()
    for item in range(100):
        put(line, item, kind="kind")
    for number in range(1_000):
        line.reappraise("kind", (1.0, 0.001, 2.0)[number % 3])
        assert held(line) <= 2 * len(line) + 65
    assert line._sorted_in == sum(map(len, line._heaps.values()))
    assert drain(line) == list(range(100))


STAGES = ["newcomer", "being appraised", "sorted in"]


def bring(line, stage):
    """Let "x" in, and have it stand where `stage` says; gives how to bring it all the way."""
    line.add("x")
    if stage == "newcomer":
        return lambda: None
    (place,) = newcomers(line)
    if stage == "being appraised":
        return lambda: line.sort_in(place, 0.0)
    line.sort_in(place, 0.0)
    return lambda: None


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way_out", ["discard", "clear"])
def test_who_leaves_never_comes_up(stage, way_out):
    line = Line()
    go_on = bring(line, stage)
    if way_out == "clear":
        line.clear()
        assert held(line) == 0
    else:
        line.discard("x")
        line.discard("x")
    assert (list(line), len(line)) == ([], 0)
    go_on()
    assert drain(line) == []
    assert line._sorted_in == 0
    put(line, "y")
    assert drain(line) == ["y"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way_out", ["discard", "clear"])
def test_who_left_may_come_again(stage, way_out):
    line = Line()
    go_on = bring(line, stage)
    if way_out == "clear":
        line.clear()
    else:
        line.discard("x")
    put(line, "y", 0.001)
    put(line, "x", 0.01)
    go_on()
    assert list(line) == ["y", "x"]
    assert drain(line) == ["y", "x"]
    put(line, "x")
    assert drain(line) == ["x"]


def test_discard_lets_a_stranger_be():
    line = Line()
    put(line, "a")
    line.discard("b")
    assert drain(line) == ["a"]
    line.discard("a")
    assert len(line) == 0


def held(line):
    return max(len(line._oldest), len(line._newcomers) + sum(map(len, line._heaps.values())))


def test_those_who_left_are_not_kept_for_ever():
    line = Line()
    for item in range(10):
        put(line, item, 0.0)  # those in front stay, so nobody behind them is taken out by the way
    for item in range(10_000):
        put(line, -1 - item, 1.0, item % 21 - 10 if item % 2 else 0)
        line.discard(-1 - item)
        assert line._sorted_in == sum(map(len, line._heaps.values()))
        assert held(line) <= 3 * len(line) + 70
    assert drain(line) == list(range(10))


def test_those_who_left_unseen_are_not_kept_for_ever():
    line = Line()
    for item in range(10_000):  # while all slots are taken, and nobody is appraised
        line.add(item)
        line.discard(item)
        assert held(line) <= 100
    assert drain(line) == []


def test_line_forgets_all_when_all_left():
    line = Line()
    for _ in range(3):
        for item in range(10_000):
            line.add(item)
            if item % 2:
                for place in newcomers(line):
                    line.sort_in(place, 1.0)
        for item in list(line):
            line.discard(item)
        put(line, "next")
        assert held(line) <= 70
        assert drain(line) == ["next"]
        assert held(line) == 0


# ---- A discard in the midst of it, as from a signal handler or a finaliser


def interrupted(call, at, interrupt):
    """Call `call`, and `interrupt` before its `at`-th instruction; tells if it came so far."""
    file = Line.take.__code__.co_filename
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
    line = Line()
    for item in range(left):
        put(line, f"left {item}", 1.0)
    put(line, "heavy", 5.0, 0, "kind")
    put(line, "small", 0.001, 0)
    put(line, "low", 0.1, -1, "kind")
    for item in range(left):
        line.discard(f"left {item}")
    line.add("appraised")
    (place,) = newcomers(line)
    line.add("newcomer")
    return line, place


HERE = {"heavy", "small", "low", "appraised", "newcomer"}


METHODS = {
    "add": lambda line, _: line.add("new"),
    "newcomers": lambda line, _: newcomers(line),
    "sort_in": lambda line, place: line.sort_in(place, 1.0, "kind"),
    "sort_in and sweep": lambda line, place: line.sort_in(place, 1.0, "new kind"),
    "reappraise": lambda line, _: line.reappraise("kind", 0.01),
    "take": lambda line, _: line.take(only_small=False),
    "take small": lambda line, _: line.take(only_small=True),
    "serve": lambda line, _: line.serve(1.0, overtook=True),
    "list": lambda line, _: list(line),
}


@pytest.mark.parametrize("victim", sorted(HERE))
@pytest.mark.parametrize("method", METHODS)
def test_discard_may_interrupt(method, victim):
    at, so_far = 0, True
    sweeps = method == "sort_in and sweep"
    while so_far:
        at += 7 if sweeps else 1  # it does the same for each of many
        line, place = crowd(80 if sweeps else 0)
        gone = []

        def interrupt(line=line, gone=gone):
            gone += [item for item in line if item == victim]
            line.discard(victim)

        result, so_far = interrupted(partial(METHODS[method], line, place), at, interrupt)
        went = []
        if method == "newcomers":
            for found in result:
                line.sort_in(found, 1.0)
        elif method.startswith("take") and result is not None:
            went.append(result[0])
        if not method.startswith("sort_in"):
            line.sort_in(place, 1.0)
        went += drain(line)
        assert sorted(went + gone) == sorted([*HERE, "new"] if method == "add" else HERE)
        assert line._sorted_in == 0
    assert at > 1


@pytest.mark.parametrize("victim", sorted(HERE))
def test_discard_may_interrupt_clear(victim):
    at, so_far = 0, True
    while so_far:
        at += 1
        line, place = crowd(0)
        _, so_far = interrupted(line.clear, at, lambda line=line: line.discard(victim))
        line.sort_in(place, 1.0)
        assert drain(line) == []
    assert at > 1


def test_discard_may_interrupt_discard():
    at, so_far = 0, True
    while so_far:
        at += 1
        line, place = crowd(0)
        first = partial(line.discard, "heavy")
        _, so_far = interrupted(first, at, lambda line=line: line.discard("low"))
        line.discard("low")
        line.sort_in(place, 1.0)
        line.reappraise("kind", 0.01)
        assert sorted(drain(line)) == ["appraised", "newcomer", "small"]
    assert at > 1


# ---- What the bounds leave open


@pytest.mark.parametrize("served", [0, 5, 25])
def test_late_tiny_one_overtakes_a_backlog_that_overtook_nobody(served):
    line = Line()
    for number in range(30):
        put(line, f"heavy {number}", 10.0)
    for number in range(served):
        assert take(line, only_small=False) == (f"heavy {number}", False)
        line.serve(10.0, overtook=False)
    put(line, "tiny", 0.001)
    assert take(line, only_small=False) == ("tiny", True)


def take_quickly(line, *, only_small=False, unseen=True):
    turn = line.take_quickly(only_small=only_small, unseen=unseen)
    return None if turn is None else turn.item


def row_of_quick(line, length=QUICK_ROW):
    for _ in range(length):
        line.serve(QUICK, overtook=False)


def test_newcomers_are_taken_unseen_after_a_row_of_quick_ones():
    line = Line()
    line.add("a")
    line.add("b")
    row_of_quick(line, QUICK_ROW - 1)
    assert not line.is_quick
    assert take_quickly(line) is None
    row_of_quick(line, 1)
    assert line.is_quick
    assert [take_quickly(line) for _ in range(3)] == ["a", "b", None]
    assert len(line) == 0
    line.add("c")
    line.serve(2 * QUICK, overtook=False)
    assert not line.is_quick
    assert take_quickly(line) is None


@pytest.mark.parametrize("only_small", [False, True])
def test_where_nobody_may_go_unseen_those_that_were_appraised_do(only_small):
    line = Line()
    row_of_quick(line)
    line.add("a")
    assert take_quickly(line, only_small=only_small, unseen=False) is None
    assert list(line) == ["a"]
    assert take_quickly(line, only_small=only_small) == "a"
    put(line, "appraised", SMALL)
    assert take_quickly(line, only_small=only_small, unseen=False) == "appraised"


def test_small_ones_that_were_appraised_go_before_newcomers_are_taken_unseen():
    line = Line()
    row_of_quick(line)
    put(line, "appraised", SMALL)
    line.add("newcomer")
    assert [take_quickly(line) for _ in range(3)] == ["appraised", "newcomer", None]


def test_nobody_is_taken_unseen_past_a_priority_or_one_that_was_appraised():
    line = Line()
    row_of_quick(line)
    line.add("a")
    line.add("urgent", priority=1)
    line.add("b")
    assert [take_quickly(line) for _ in range(3)] == ["urgent", "a", "b"]
    line.add("low", priority=-1)
    line.add("d")
    assert take_quickly(line) is None
    line.discard("low")
    put(line, "appraised", 1.0)
    line.add("c")
    assert take_quickly(line) is None
