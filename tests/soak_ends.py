"""How collectors of the soak test end, with queries that run and wait."""

from __future__ import annotations

import random
from functools import partial

from soak_loops import blocked
from soak_queries import closing


class End:
    def __init__(self, soak, loop, book):
        self.soak = soak
        self.loop = loop
        self.book = book
        rng = random.Random(f"{soak.seed}/{book.name}")
        self.seconds = rng.choice([0.01, 0.05, 0.1, 0.3])
        ways = [self.on_thread, self.on_threads, self.in_udf, self.by_nobody, self.in_loop]
        if loop.has_streams:
            ways += [self.awaited, self.awaited_twice]
        self.way = rng.choice(ways)
        self.wait = rng.random() < 0.5
        self.options = {"cancel_waiting": rng.random() < 0.5}

    async def come(self):
        book = self.book
        await self.loop.sleep(self.seconds)
        how = f"close, {self.way.__name__}, {self.wait=}, {self.options}"
        self.soak.under_way[book.name] = f"{book.name}: {how}"
        book.closing = True
        if self.way == self.by_nobody:
            book.collector = None
        else:
            book.cancels = self.options["cancel_waiting"] or self.way == self.on_threads
            await self.way()
            book.closed = True
            await self.once_more()
        del self.soak.under_way[book.name]

    async def on_thread(self):
        await self.soak.on_threads(self.loop, [partial(self.close, wait=self.wait, **self.options)])

    async def on_threads(self):
        both = [(self.wait, True), (not self.wait, False)]
        calls = [partial(self.close, wait=wait, cancel_waiting=cancel) for wait, cancel in both]
        await self.soak.on_threads(self.loop, calls)

    async def in_loop(self):
        if self.book.loop_bound:  # it would wait for what waits for the loop
            await self.on_thread()
        else:
            self.close(wait=self.wait, **self.options)

    async def in_udf(self):
        handle = self.book.ask(None, "collect_async", closing(self.book, self.options))
        if handle is not None:
            await self.soak.on_threads(self.loop, [partial(blocked, handle)])
        self.close(wait=False, **self.options)

    async def by_nobody(self):
        """The collector is dropped."""

    async def awaited(self):
        await self.book.collector.aclose(**self.options)
        self.soak.check_closed(self.book)

    async def awaited_twice(self):
        await self.loop.within(0.001, partial(self.book.collector.aclose, **self.options))
        await self.awaited()

    async def once_more(self):
        """Show that a second close changes nothing, and waits."""
        if self.loop.has_streams:
            await self.book.collector.aclose(cancel_waiting=False)
            self.soak.check_closed(self.book)
        else:
            call = partial(self.close, wait=True, cancel_waiting=False)
            await self.soak.on_threads(self.loop, [call])

    def close(self, *, wait, **options):
        self.book.collector.close(wait=wait, **options)
        stats = self.book.stats()  # those that share a run that has begun get its result
        if options["cancel_waiting"] and stats["waiting"] > stats["sharing"]:
            self.soak.violated(self.book.name, f"left in the line: {stats}")
        if wait:
            self.soak.check_closed(self.book)
