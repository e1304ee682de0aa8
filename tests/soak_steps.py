"""What a step of the soak test does with one query or several; `soak_streams` has the streams."""

from __future__ import annotations

import time
from functools import partial

import polars as pl
from soak_loops import Asyncio, Outcome, blocked, outcome_of, waited
from soak_queries import (
    Gate,
    Plan,
    all_right,
    any_of,
    few,
    missing,
    scanned,
    schema_right,
    sink,
    tiny,
)

import polars_async as pa

SOON = [0, 0, 0.001, 0.005, 0.02]


class Step:
    def __init__(self, soak, loop, number, rng, book):
        self.soak = soak
        self.loop = loop
        self.number = number
        self.rng = rng
        self.book = book

    def violated(self, what):
        self.soak.violated(self.number, what)

    def ask(self, method, *arguments, **options):
        return self.book.ask(self.number, method, *arguments, **options)

    def plan(self, **nested_in):
        return any_of(self.rng, mostly_tiny=self.soak.queries, **nested_in)

    def options(self):
        rng, options = self.rng, {}
        if rng.random() < 0.25:
            options["timeout"] = rng.choice([0.0005, 0.005, 0.05, 3, 1000])
        if rng.random() < 0.3:
            options["priority"] = rng.randint(-10, 10)
        if rng.random() < 0.3:
            options["label"] = rng.choice(["", "a label", "naïve", "one longer than a name may be"])
        return options

    def engine(self):
        return {"engine": self.rng.choice([None, "in-memory", "streaming"])}

    async def until(self, unrest):
        await self.soak.until(self.loop, unrest, self.number)

    async def on_threads(self, *calls):
        return await self.soak.on_threads(self.loop, calls)


class Waits:
    """One query on its way, the waits for it, and whether its outcome is right, and theirs."""

    def __init__(self, step, plan, options, handle):
        self.step = step
        self.plan = plan
        self.options = options
        self.background = handle if isinstance(handle, pa.BackgroundQuery) else None
        self.handle = handle._handle if self.background else handle
        self.seen = []
        self.cancels = []
        self.may_leave = False

    async def here(self):
        if self.background and not self.step.loop.has_streams:  # it has no get()
            return (await self.step.on_threads(partial(blocked, self.handle)))[0]
        return await waited(self.step.loop, self.handle)

    async def until_done(self):
        await self.step.until(lambda: not self.handle.done() and f"{self.plan.name} hangs")

    def check(self):
        book, final = self.step.book, blocked(self.handle, 0)
        if final.kind == "cancelled":
            is_right = self.may_leave or any(self.cancels) or book.cancels
        elif any(self.cancels):
            is_right = False
        elif final.kind == "late":
            is_right = final.what.timeout == self.options.get("timeout")
        else:
            is_right = self.plan.is_right(final)
            if self.plan.name.startswith("nested") and not is_right:
                is_right = book.closing and isinstance(final.what, pa.CollectorClosedError)
        if not is_right or sum(self.cancels) > 1:
            self._violated(f"{final}, {self.cancels=}, {self.seen=}")
        for each in [blocked(self.handle, 0), *self.seen]:
            same = each.kind == final.kind
            same &= final.kind == "cancelled" or each.what is final.what
            if not same and not (self.may_leave and each.kind in ("left", "cancelled")):
                self._violated(f"{each} is not {final}")
        book.expect(self.handle._query)
        is_frame = final.kind == "value" and isinstance(final.what, pl.DataFrame)
        if is_frame and final.what.height and self.step.rng.random() < 0.3:
            final.what[0, final.what.columns[0]] = None  # it is this caller's alone

    def _violated(self, what):
        self.step.violated(f"{self.plan.name}, {self.options}: {what}")


async def quickly(step):
    """One tiny query again and again, and then many times at once: some of these run inline."""
    plan = tiny(step.rng)
    for number in (1,) * 30 + (20,):
        handles = [step.ask("collect_async", plan.lf, gevent=True) for _ in range(number)]
        for handle in handles:
            if handle is not None:
                waits = Waits(step, plan, {}, handle)
                waits.seen.append(await waits.here())
                waits.check()


# One query


async def one(step):
    """One query by one of the methods, which is then waited for, cancelled or dropped."""
    rng = step.rng
    plan, options = step.plan(nested_in=step.book), step.options()
    methods = {"async": 60, "all_async": 12, "background": 12, "schema_async": 8, "sink_async": 8}
    method = rng.choices(list(methods), list(methods.values()))[0]
    if method == "all_async":
        plans = [step.plan() for _ in range(rng.randint(1, 3))]
        plan = Plan([plan.lf for plan in plans], partial(all_right, plans), "all")
    elif method == "schema_async":
        plan = rng.choice([tiny, missing])(rng)
        plan = plan._replace(is_right=partial(schema_right, plan.is_right))
    elif method == "sink_async":
        plan = sink(rng, step.soak.folder)
    if method != "schema_async":
        options |= step.engine()
    if method != "background":
        options["gevent"] = True
    name = method if method == "sink_async" else f"collect_{method}"
    handle = step.ask(name, plan.lf, **options)
    if handle is None:
        return
    uses = dict(USES)
    if method == "background":  # it is handed to threads, and is not awaited
        uses |= {within: 0, killed: 0}
    use = rng.choices(list(uses), list(uses.values()))[0]
    if use is not dropped:
        waits = Waits(step, plan._replace(name=f"{plan.name}, {use.__name__}"), options, handle)
        del handle
        await use(waits, rng.choice(SOON), rng)
        await waits.until_done()
        waits.check()


async def awaited(waits, _seconds, rng):
    waits.seen += [await waits.here() for _ in range(rng.choice([1, 1, 1, 2]))]


async def several(waits, seconds, rng):
    calls, loop = [waits.here] * rng.randint(1, 3), waits.step.loop
    if rng.random() < 0.5 and not waits.background:
        waits.may_leave = True
        calls += [partial(loop.killed_after, seconds, waits.here)]
        calls += [partial(loop.within, seconds, waits.here)]
    waits.seen += await loop.each(calls)


async def within(waits, seconds, _rng):
    waits.may_leave = True
    waits.seen.append(await waits.step.loop.within(seconds, waits.here))


async def killed(waits, seconds, _rng):
    waits.may_leave = True
    waits.seen.append(await waits.step.loop.killed_after(seconds, waits.here))


async def cancelled(waits, seconds, _rng):
    await waits.step.loop.sleep(seconds)
    if waits.background:
        waits.may_leave = True
        waits.background.cancel()
    else:
        waits.cancels.append(waits.handle.cancel())


async def cancelled_on_threads(waits, seconds, rng):
    calls = [partial(cancel_after, seconds, waits.handle) for _ in range(rng.randint(1, 3))]

    async def cancel():
        waits.cancels += await waits.step.on_threads(*calls)

    seen, _ = await waits.step.loop.each([waits.here, cancel])
    waits.seen.append(seen)


async def on_threads(waits, _seconds, rng):
    calls = [partial(blocked, waits.handle)]
    calls += [partial(blocked, waits.handle, rng.choice([None, 0, 0.001, 0.01])) for _ in range(2)]
    if waits.background:
        calls.append(partial(fetched, waits.background))
    seen = await waits.step.on_threads(*calls)
    waits.seen += [each for each in seen if each.kind != "left"]


async def elsewhere(waits, _seconds, _rng):
    """Await it in this loop and in one of its own."""
    other = Asyncio()
    waits.seen += await waits.step.on_threads(
        partial(other.run, partial(waited, other, waits.handle))
    )
    waits.seen.append(await waits.here())


async def polled(waits, _seconds, _rng):
    await waits.until_done()


async def dropped(*_):
    pass


USES = {
    awaited: 45,
    several: 10,
    within: 8,
    killed: 8,
    cancelled: 6,
    cancelled_on_threads: 6,
    on_threads: 6,
    elsewhere: 2,
    polled: 3,
    dropped: 6,
}


def cancel_after(seconds, handle):
    time.sleep(seconds)
    return handle.cancel()


def fetched(background):
    try:
        frame = background.fetch()
    except BaseException as error:  # noqa: BLE001  # as in waited
        return outcome_of(error)
    return Outcome("left") if frame is None else Outcome("value", frame)


# A query that ends in one way only


async def held(step):
    """A query that goes on just once it has ended in the way that was chosen."""
    rng, book = step.rng, step.book
    gate, label, plan = Gate(), f"held by {step.number}", tiny(rng)

    def hold(df):
        gate.wait()
        return df

    end, kind = rng.choice(list(ENDS.items()))
    options = {"label": label, "priority": rng.choice([0, 1, -1])}
    if end is expired:
        options["timeout"] = rng.choice([0.001, 0.01, 0.05])
    book.hold(label, gate)
    plan = plan._replace(lf=plan.lf.map_batches(hold), name=f"held, {end.__name__}")
    handle = step.ask("collect_async", plan.lf, gevent=True, **options)
    if handle is not None:
        waits, woken = Waits(step, plan, options, handle), Counted()
        # With one more who waits, the query would not be cancelled with the wait for it.
        is_counted = end in (expired, cancelled, let_on) and handle._query.add_waiter(woken)
        await end(waits, rng.choice([0.001, 0.01]), gate)
        final = blocked(handle, 0)
        if final.kind != kind and not book.cancels:
            step.violated(f"{plan.name}: {final}")
        waits.check()
        if is_counted:
            await step.until(lambda: woken.times != 1 and f"{plan.name}: {woken.times} wakes")
    gate.open()
    book.let_go()


async def expired(waits, _seconds, _gate):
    waits.seen.append(await waits.here())


async def let_on(waits, seconds, gate):
    await waits.step.loop.sleep(seconds)
    gate.open()
    waits.seen.append(await waits.here())


async def one_left(waits, seconds, gate):
    """Two wait on while a third is killed, which does not cancel the query."""
    loop = waits.step.loop

    async def open_later():
        await loop.sleep(2 * seconds)
        gate.open()

    killed = partial(loop.killed_after, seconds, waits.here)
    waits.may_leave = True
    *seen, _ = await loop.each([waits.here, waits.here, killed, open_later])
    waits.seen += seen


ENDS = {
    expired: "late",
    cancelled: "cancelled",
    killed: "cancelled",
    within: "cancelled",
    one_left: "value",
    let_on: "value",
}


class Counted:
    """A waiter that counts how often it is woken."""

    survives_fork = False

    def __init__(self):
        self.times = 0

    def wake(self):
        self.times += 1


# Many queries


async def burst(step):
    """Many tiny queries at once, each awaited by itself, or on threads that submit them, too."""
    rng = step.rng
    make = rng.choice([tiny, tiny, few, scanned, scanned])
    plans = [make(rng) for _ in range(rng.choice([3, 10, 40]))]
    options = step.options() if rng.random() < 0.3 else {}

    async def ask(plan):
        handle = step.ask("collect_async", plan.lf, gevent=True, **options)
        if handle is not None:
            waits = Waits(step, plan, options, handle)
            waits.seen.append(await waits.here())
            waits.check()

    def ask_all(plans):
        handles = [(plan, step.ask("collect_async", plan.lf, **options)) for plan in plans]
        for plan, handle in handles:
            if handle is not None:
                waits = Waits(step, plan, options, handle)
                waits.seen.append(blocked(handle))
                waits.check()

    if rng.random() < 0.8:
        await step.loop.each([partial(ask, plan) for plan in plans])
    else:
        await step.on_threads(*(partial(ask_all, plans[start::3]) for start in range(3)))


async def shed(step):
    """Queries that are cancelled before anybody can look at them leave nothing behind."""
    book = step.book
    await step.loop.sleep(0)
    if book.limits["max_waiting"] is not None:
        return
    lf, most = tiny(step.rng).lf, 0
    for _ in range(250):
        handle = step.ask("collect_async", lf)
        most = max(most, book.stats()["waiting"])
        if handle is not None:
            handle.cancel()
    for lane in book.lanes:
        if len(lane.admission._queue._unestimated) > 2 * most + 100:
            step.violated(f"{len(lane.admission._queue._unestimated)} places are kept")


async def look(step):
    """Look at the numbers, on threads too, while others change them."""
    check = partial(step.book.check_sum, step.number)
    for _ in range(20):
        check()
    await step.on_threads(*[check] * step.rng.randint(1, 3))


async def ask_for_nonsense(step):
    """What is refused before it is a query, and counts as none."""
    collector = step.book.collector
    await step.loop.sleep(0)
    if collector is None:
        return
    lf = tiny(step.rng).lf
    calls = [
        partial(collector.collect_async, lf, timeout=0),
        partial(collector.collect_async, lf, timeout=float("nan")),
        partial(collector.collect_async, lf, priority=11),
        partial(collector.collect_async, lf, engine="no engine"),
        partial(collector.collect_async, lf.collect()),
        partial(collector.collect_all_async, [lf, None]),
        partial(collector.as_completed, [lf, None]),
        partial(collector.collect_batches_async, lf, chunk_size=0),
        partial(collector.sink_async, None),
    ]
    call = step.rng.choice(calls)
    try:
        call()
    except (TypeError, ValueError):
        return
    step.violated(f"{call} was taken")
