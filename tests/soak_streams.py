"""Streams of the soak test, which end in many ways."""

from __future__ import annotations

import time
from functools import partial

from soak_loops import Asyncio, Outcome, outcome_of, waited
from soak_queries import Frames, failing, tiny
from soak_steps import SOON

WAYS = [
    "all",
    "all",
    "slow",
    "asking",
    "asking",
    "break",
    "close",
    "with",
    "killed",
    "within",
    "drop",
]


class Consumer:
    """Takes what a stream gives, in the way that was chosen."""

    def __init__(self, step):
        self.step = step
        self.way = step.rng.choice(WAYS)
        self.got = []

    async def run(self, make, queries_of):
        """Consume what `make` gives to the end; gives how that was, or None if it was refused."""
        step = self.step
        if step.loop.has_streams:
            return await self._run(step.loop, make, queries_of)
        other = Asyncio()
        run = partial(other.run, partial(self._run, other, make, queries_of))
        return (await step.on_threads(run))[0]

    async def _run(self, loop, make, queries_of):
        book = self.step.book
        with book.bound_to_loop():
            stream = make()
            if stream is None:
                return None
            queries = queries_of(stream)
            outcome = await self._drain(loop, stream)
            del stream
            on_its_own = self.way in ("break", "drop", "close")
            if not on_its_own and not all(query.done for query in queries):
                self.step.violated(f"{self.way}, {outcome}: queries go on")
            await self.step.soak.until(
                loop,
                lambda: not all(query.done for query in queries) and f"{self.way}: goes on",
                self.step.number,
            )
            for query in queries:
                book.expect(query)
            return outcome

    async def _drain(self, loop, stream):
        seconds = self.step.rng.choice(SOON)
        take = partial(self._take, loop, stream)
        match self.way:
            case "drop":
                return Outcome("left")
            case "killed":
                return await loop.killed_after(seconds, take)
            case "within":
                return await loop.within(seconds, take)
            case "with":
                async with stream:
                    return await take()
            case "close":
                self.step.soak.thread(close_after, seconds, stream)
        return await take()

    async def _take(self, loop, stream):
        pause = self.step.rng.choice([0, 0.001, 0.003]) if self.way == "slow" else None
        if self.way == "asking":
            await self._ask(loop)
        try:
            async for each in stream:
                self.got.append(each)
                if self.way == "break":
                    return Outcome("left")
                if pause is not None:
                    await loop.sleep(pause)
                if self.way == "asking" and len(self.got) < 4:
                    await self._ask(loop)
        except BaseException as error:  # noqa: BLE001  # as in waited
            return outcome_of(error)
        return Outcome("value")

    async def _ask(self, loop):
        """Wait for another query of the same collector, whose only slot the stream may have."""
        plan = tiny(self.step.rng)
        handle = self.step.ask("collect_async", plan.lf)
        if handle is None:
            return
        outcome = await waited(loop, handle)
        if not plan.is_right(outcome) and not (
            outcome.kind == "cancelled" and self.step.book.cancels
        ):
            self.step.violated(f"asked by a consumer: {outcome}")

    def may_be(self, outcome, options):
        """Whether it may have ended so, as far as that is no matter of its results."""
        if outcome.kind == "late":
            return "timeout" in options
        if outcome.kind == "cancelled":
            return self.step.book.cancels or self.way in ("close", "killed", "within")
        return True


def close_after(seconds, stream):
    time.sleep(seconds)
    stream.close()


async def batches(step):
    rng = step.rng
    rows = rng.choice([0, 1, 1000, 20_000])
    options = step.options() | step.engine()
    options |= {"chunk_size": rng.choice([None, 100, 3000]), "maintain_order": True}
    error = failing(rng) if rng.random() < 0.15 else None
    lf = Frames.medium.lazy().head(rows) if error is None else error.lf
    consumer = Consumer(step)
    outcome = await consumer.run(
        lambda: step.ask("collect_batches_async", lf, **options), lambda stream: [stream._query]
    )
    if outcome is None:
        return
    numbers = [number for batch in consumer.got for number in batch["a"]]
    is_right = consumer.may_be(outcome, options) and numbers == list(range(len(numbers)))
    if outcome.kind == "value" and consumer.way != "close":
        is_right &= error is None and len(numbers) == rows
    elif outcome.kind == "error":
        is_right &= error is not None and error.is_right(outcome)
    if not is_right:
        name = error and error.name
        step.violated(f"batches, {consumer.way}, {rows=}, {name}, {options}: {outcome}")


async def completions(step):
    rng = step.rng
    is_tiny = rng.random() < 0.5
    plans = [tiny(rng) if is_tiny else step.plan() for _ in range(rng.randint(0, 6))]
    options = step.options() | step.engine()
    options.pop("label", None)  # the books need one of their own
    consumer, lfs = Consumer(step), [plan.lf for plan in plans]
    outcome = await consumer.run(
        lambda: step.book.ask_each(step.number, lfs, **options),
        lambda stream: list(stream._queries.values()),
    )
    if outcome is None:
        return
    numbers = [number for number, _ in consumer.got]
    is_right = consumer.may_be(outcome, options) and len(set(numbers)) == len(numbers)
    is_right &= all(plans[i].is_right(Outcome("value", frame)) for i, frame in consumer.got)
    if outcome.kind == "value" and consumer.way != "close":
        is_right &= len(numbers) == len(plans)
    elif outcome.kind == "error":
        is_right &= any(plan.is_right(outcome) for plan in plans)
    if not is_right:
        names = [plan.name for plan in plans]
        step.violated(f"completions, {consumer.way}, {names}, {options}: {outcome}, {numbers}")
