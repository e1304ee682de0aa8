"""
Random queries and random faults, beside each other, and what has to hold all along.

``python tests/soak.py --seconds 10 --seed 7 --loop trio``; ``ci/soak`` runs it on every loop and
both Polars lines. What a step does follows from the seed and its number; how steps meet does not.

A violation is printed with its seed and step and ends the program with status 1, and so does a
standstill, with the stacks of all threads.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import polars as pl
from loops import TOLD
from soak_book import Book
from soak_ends import End
from soak_loops import LOOPS
from soak_queries import Frames
from soak_steps import Step, ask_for_nonsense, burst, held, look, one, quickly, shed
from soak_streams import batches, completions

import polars_async as pa
from polars_async._runtime import timers
from polars_async._runtime.unpatched import RLock, start_new_thread
from polars_async.bridges import turns
from polars_async.bridges.mailbox import Mailbox
from polars_async.scheduling import equality
from polars_async.scheduling import lane as lane_module
from polars_async.scheduling.query import Query

PATIENCE = 60
"""Seconds without the end of a step that count as a standstill."""
LONG = 50_000
"""Queries from which on the memory has to stay as it is."""
MUCH_HELD = equality.MUCH_HELD
STEPS = {
    one: 50,
    burst: 10,
    batches: 10,
    completions: 10,
    held: 8,
    look: 10,
    shed: 2,
    ask_for_nonsense: 2,
}
MOSTLY_TINY = STEPS | {one: 40, burst: 60, shed: 1}
PANIC = re.compile(
    r"\n?thread '.*' \(\d+\) panicked at .*\n.*\n(note: run with `RUST_BACKTRACE.*\n)?"
)
POLARS_THREAD = re.compile(r"polars-(\d|ooc)|tokio-rt-|async-exec|jemalloc")


class Soak:
    def __init__(self, options):
        self.loop = LOOPS[options.loop]()
        self.seed = options.seed
        self.queries = options.queries
        self.seconds = options.seconds
        self.lock = RLock()
        self.steps = count(1)
        self.rounds = count(1)
        self.books = []
        self.under_way = {}
        self.ended_steps = 0
        self.past_queries = 0  # of collectors that are gone
        self.events = Counter()
        self.helpers = self.logged = self.panics = self.inline = 0
        self.shared = Counter()
        self.hook_faults = 0
        self.rss = []
        self.folder = Path(tempfile.mkdtemp(prefix="soak"))
        self.stderr = os.dup(2)
        self.said = self.folder / "stderr"
        said = os.open(self.said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 2)  # a panic is reported there, by Rust itself
        os.close(said)
        self.began = time.monotonic()

    def run(self):
        threads = len(self._own_threads()) + 2  # the watch, and what watches that
        logging.getLogger().addHandler(Log(self))
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", pa.MemoryLimitWarning)  # some limits are so low
        warnings.showwarning = lambda *what: self.noise(f"warned: {what}")
        sys.unraisablehook = lambda what: self.noise(f"unraisable: {what}")
        start_new_thread(self._watch, ())
        self._watch_turns()
        try:
            self.loop.run(partial(self._main, threads))
            self._listen()
        except BaseException:  # noqa: BLE001  # whatever it is, it was not expected
            self.noise(traceback.format_exc())
        os.dup2(self.stderr, 2)
        shutil.rmtree(self.folder)

    # What went wrong

    def violated(self, step, what):
        """End the program at once, from whichever thread."""
        where = self.under_way.get(step, step)
        os.write(self.stderr, f"seed {self.seed}, step {where}: {what}\n".encode())
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(1)

    def noise(self, what):
        self.violated("at any", what)

    def check_closed(self, book):
        """Show that, after a close that waited, nothing goes on and all was told."""
        with book.lock:
            stats, events = book.stats(), Counter(book.events)
        left = [stats["running"], stats["waiting"]]
        left += [stats["completed"] - events["finished"], stats["failed"] - events["failed"]]
        if any(left):
            self.violated(book.name, f"closed and waited for: {stats}, told: {events}")

    def _watch(self):
        ended, since = -1, time.monotonic()
        while True:
            # For the case that nothing in Python runs any more.
            faulthandler.dump_traceback_later(2 * PATIENCE, exit=True, file=self.stderr)
            time.sleep(1)
            if self.ended_steps != ended:
                ended, since = self.ended_steps, time.monotonic()
            elif time.monotonic() > since + PATIENCE:
                faulthandler.dump_traceback(self.stderr)
                stats = {book.name: book.stats() for book in self.books}
                self.noise(f"no step ended for {PATIENCE} s: {dict(self.under_way)}, {stats}")

    def _watch_turns(self):
        """Show that queries that run inline take no more of a turn of the loop than they may."""
        note = turns.note

        def noted(*times):
            self.inline += 1
            note(*times)
            if turns._turn.excess > 1.5 * turns.MOST:
                self.noise(f"queries took {turns._turn.excess} s of a turn of the loop")

        turns.note = noted

    def _listen(self):
        """Show that nothing was said but the panics."""
        rest, self.panics = PANIC.subn("", self.said.read_text(errors="replace"))
        if rest or TOLD:
            self.noise(f"on stderr: {rest!r}; in the loop: {TOLD}")

    # Beside the loop

    async def until(self, loop, unrest, step=None):
        """Wait until `unrest` finds nothing any more; how long is no matter, but not for ever."""
        end, pause = time.monotonic() + PATIENCE / 2, 0.0002
        while found := unrest():
            if time.monotonic() > end:
                self.violated(step, found)
            await loop.sleep(pause)
            pause = min(2 * pause, 0.02)

    def thread(self, call, *arguments):
        def run():
            try:
                call(*arguments)
            except BaseException:  # noqa: BLE001  # as above
                self.noise(f"on a thread: {traceback.format_exc()}")
            finally:
                with self.lock:
                    self.helpers -= 1

        with self.lock:
            self.helpers += 1
        start_new_thread(run, ())

    async def on_threads(self, loop, calls):
        """Run `calls` on a thread each, and give what they gave."""
        outcomes = {}

        def note(number, call):
            outcomes[number] = call()

        for number, call in enumerate(calls):
            self.thread(note, number, call)
        await self.until(loop, lambda: len(outcomes) < len(calls) and f"threads hang: {calls}")
        return [outcomes[number] for number in range(len(calls))]

    # Rounds of steps, with a quiet point after each

    async def _main(self, threads):
        while not self._is_over():
            await self._round(threads)
        lasting = self.books[0]
        lasting.closing = True
        lasting.collector.close()
        self.check_closed(lasting)
        await self._quiet(threads)
        self.events += lasting.events
        self.shared += lasting.shared

    def _is_over(self):
        if self.queries:
            return self.submitted >= self.queries
        return time.monotonic() > self.began + self.seconds

    @property
    def submitted(self):
        return self.past_queries + sum(book.submitted for book in self.books)

    async def _round(self, threads):
        number = next(self.rounds)
        rng = random.Random(f"{self.seed}/round {number}")
        level = rng.choice([logging.NOTSET, logging.NOTSET, logging.DEBUG])
        logging.getLogger("polars_async").setLevel(level)
        # All queries come from one line here: as if their frames were small, or as it is.
        equality.MUCH_HELD = rng.choice([1 << 40, MUCH_HELD])
        sys.setswitchinterval(rng.choice([0.005, 0.0005, 0.00001]))
        if not self.books:
            self.books.append(Book(self, 0, rng, lasting=True))
        short = [Book(self, f"{number}.{i}", rng) for i in range(rng.choice([1, 2, 3]))]
        self.books += short
        last = next(self.steps) + (400 if self.queries else 60)
        # While nothing else goes on: else hardly a query would run inline.
        for book in self.books:
            name = f"quick ones, {book.name}, round {number}"
            step = Step(self, self.loop, name, random.Random(f"{self.seed}/{name}"), book)
            await self._told(name, partial(quickly, step))
        calls = [partial(self._act, last)] * rng.choice([4, 12, 24])
        calls += [partial(self._told, book.name, End(self, self.loop, book).come) for book in short]
        await self.loop.each(calls)
        await self._quiet(threads)
        for book in short:
            self.past_queries += book.submitted
            self.events += book.events
            self.shared += book.shared
        del self.books[1:]

    async def _act(self, last):
        while (number := next(self.steps)) < last and not self._is_over():
            rng = random.Random(f"{self.seed}/{number}")
            lasting, *short = self.books
            # Those that refuse a burst would else make up most of the number.
            book = lasting if rng.random() < (0.9 if self.queries else 0.3) else rng.choice(short)
            steps = MOSTLY_TINY if self.queries else STEPS
            kind = rng.choices(list(steps), list(steps.values()))[0]
            self.under_way[number] = f"{number} ({kind.__name__}, {book.name})"
            await self._told(number, partial(kind, Step(self, self.loop, number, rng, book)))
            book.check_sum(number)
            del self.under_way[number]
            self.ended_steps += 1

    async def _told(self, step, call):
        try:
            await call()
        except BaseException:  # noqa: BLE001  # as above
            self.violated(step, traceback.format_exc())

    async def _quiet(self, threads):
        await self.until(self.loop, self._unrest)
        for book in self.books:
            book.forget()
        await self.until(self.loop, partial(self._leftovers, threads))
        for path in self.folder.iterdir():
            if path != self.said:
                path.unlink()
        self._listen()
        self.rss.append((self.submitted, rss()))
        self.ended_steps += 1

    def _unrest(self):
        found = [each for book in self.books for each in book.unrest()]
        if self.helpers:
            found.append(f"{self.helpers} threads of the test")
        if self.hook_faults != self.logged:
            found.append(f"{self.hook_faults} faults of hooks, {self.logged} logged")
        return found

    def _leftovers(self, threads):
        """Give what is kept of what is over."""
        found = []
        clock = timers._timers
        with clock.lock:
            targets = [deadline.target for *_, deadline in clock.heap]
            # A meter may have one measurement to come, though no query waits by now.
            kept = [each.id for each in targets if isinstance(each, Query)]
        if kept:
            found.append(f"deadlines of queries {kept} were not lifted")
        if len(clock.heap) > clock.swept_at + 1 or clock.swept_at > 4000:
            found.append(f"{len(clock.heap)} deadlines")
        own = self._own_threads()
        # Asked for now, since a thread that still learns from its last query is not counted.
        threads += clock.runs + sum(book.lanes[0]._threads.threads for book in self.books)
        if len(own) > threads:
            found.append(f"{len(own)} threads, not {threads}: {own}")
        gc.collect()
        kept = [each for each in gc.get_objects() if isinstance(each, Query)]
        if kept:
            found.append(f"{len(kept)} queries are kept, one by {holders(kept)}")
        del kept
        lanes = sum(len(book.lanes) for book in self.books)
        if len(lane_module._lanes) > lanes:
            found.append(f"{len(lane_module._lanes)} lanes, not {lanes}")
        boxes = [each for each in gc.get_objects() if type(each) is Mailbox]
        full = [mailbox for mailbox in boxes if mailbox._items]
        if full or len(boxes) > 1:
            found.append(f"{len(boxes)} mailboxes, {full} with something")
        known = [book.lanes[0]._costs for book in self.books]
        sizes = [(len(each._taken), len(each._plans)) for each in known]
        if any(taken > 4096 or plans > 100 for taken, plans in sizes):
            found.append(f"so many plans are known: {sizes}")
        return found

    def _own_threads(self):
        names = {}
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # it ended meanwhile
                names[int(task.name)] = (task / "comm").read_text().strip()
        return {task: name for task, name in names.items() if not POLARS_THREAD.match(name)}

    def summary(self):
        seconds = time.monotonic() - self.began
        submitted, last = self.rss[-1]
        warm = [size for number, size in self.rss if number >= submitted / 3] or [last]
        tenth = max(1, len(warm) // 10)
        before, after = median(warm[:tenth]), median(warm[-tenth:])
        if submitted >= LONG and after > 1.05 * before:
            self.violated("the last", f"RSS grew from {before:.0f} to {after:.0f} MB")
        events = ", ".join(f"{number} {kind}" for kind, number in sorted(self.events.items()))
        events += f", {self.inline} inline"
        events += "".join(f", {number} {how}" for how, number in sorted(self.shared.items()))
        threads = len(list(Path("/proc/self/task").iterdir()))
        return (
            f"{submitted} queries in {seconds:.1f} s, {submitted / seconds:.0f}/s; {events}; "
            f"{self.hook_faults} faults of hooks, {self.panics} panics; RSS {before:.0f} MB after "
            f"the first third and {after:.0f} MB at the end; {threads} threads at the end, "
            f"{len(self._own_threads())} of them not Polars' own"
        )


class Log(logging.Handler):
    """Takes all that is logged; just faults of hooks are expected."""

    def __init__(self, soak):
        super().__init__()
        self._soak = soak

    def emit(self, record):
        text = record.getMessage()
        if record.name == "polars_async" and text.startswith("the on_event hook"):
            with self._soak.lock:
                self._soak.logged += 1
        elif record.levelno >= logging.WARNING:
            self._soak.noise(f"logged: {text}, {record.exc_info}")


def holders(kept):
    """Follow what holds the first of `kept`, as far as it is plain."""
    path, here, seen = [], kept[0], {id(kept)}
    while len(path) < 12:
        seen.add(id(here))
        found = [each for each in gc.get_referrers(here) if id(each) not in seen]
        found = [each for each in found if each is not sys._getframe()]
        if not found:
            break
        seen.add(id(found))
        here = found[0]
        path.append(f"{here!r:.200}")
    return path


def rss():
    """Give the memory of the process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def median(sizes):
    return sorted(sizes)[len(sizes) // 2]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loop", choices=LOOPS, default="asyncio")
    parser.add_argument("--seconds", type=float, default=10, help="(default: 10)")
    parser.add_argument("--queries", type=int, help="instead of --seconds; most of them are tiny")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    os.environ["RUST_BACKTRACE"] = "0"
    Frames.make()
    soak = Soak(options)
    soak.run()
    sys.stdout.write(
        f"Polars {pl.__version__}, {options.loop}, seed {options.seed}: {soak.summary()}\n"
    )


if __name__ == "__main__":
    main()
