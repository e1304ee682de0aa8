"""A collector of the soak test, and the books kept on it."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from contextlib import contextmanager

from soak_queries import OwnFault

import polars_async as pa
from polars_async._runtime.unpatched import RLock
from polars_async.scheduling.stats import stats_of

STATES = {
    "COMPLETED": "finished",
    "FAILED": "failed",
    "CANCELLED": "cancelled",
    "TIMED_OUT": "timed_out",
}


class Book:
    """A collector, and what it was asked for and told of, counted beside it."""

    def __init__(self, soak, number, rng, *, lasting=False):
        self.soak = soak
        self.name = f"collector {number}"
        self.lock = RLock()  # a finaliser may cancel, and so report, at any time
        self.submitted = self.rejected = 0
        self.events = Counter()
        self.open = {}  # ids of queries that have no terminal event yet
        self.ended = {}
        self.expected = {}  # of the queries whose outcome was seen
        self.by_label = Counter()
        self.shared = Counter()
        self.gates = {}
        self.loop_bound = 0  # what goes on just as the loop does, so that nothing may block that
        self.closing = self.cancels = self.closed = False
        self.slow_rate = rng.choice([0, 0, 0.1])
        self.fault_rate = rng.choice([0, 0, 0.02]) if not lasting else 0.001
        self._rng = random.Random(rng.random())  # the hook's, on many threads
        kept = (pa.Cache(seconds=seconds, max_bytes="1 MB") for seconds in (0.05, 5))
        self.limits = {
            "max_running": rng.choice([None, 1, 2, 3, 4]),
            "max_waiting": None if lasting else rng.choice([None, None, 0, 2, 5, 30]),
            "inline": 0.001 if lasting else rng.choice([0, 100e-6, 0.01]),
            "single_flight": rng.random() < 0.5,
            "cache": rng.choice([None, None, *kept]),
            # By 1 byte all but small ones run one by one; the other is near what the soak takes.
            "max_memory": rng.choice([None, None, 1, "300 MB"]),
        }
        self.collector = pa.Collector(on_event=self.hear, **self.limits)
        self.lanes = self.collector._cpu, self.collector._gpu
        self.flights = self.collector._flights

    def hear(self, event):
        kind, query = str(event.kind), event.query_id
        if self._rng.random() < self.slow_rate:
            time.sleep(0.001)
        with self.lock:
            self.events[kind] += 1
            before = self.open.get(query)
            if kind == "queued":
                wrong = before is not None or query in self.ended
                self.open[query] = kind
                self.by_label[event.label] += 1
            elif kind == "started":
                wrong = before != "queued"
                self.open[query] = kind
            else:
                wrong = before is None
                is_shared = event.shared_with is not None
                begun = "queued" if is_shared else "started"
                wrong |= kind in ("finished", "failed") and before != begun
                if is_shared:
                    self.shared["from the cache" if event.from_cache else "shared"] += 1
                if kind == "rejected":
                    wrong |= before != "queued" or event.queue_seconds != 0
                self.open.pop(query, None)
                self.ended[query] = kind
            wrong |= (event.error is not None) != (kind in ("failed", "timed_out", "rejected"))
            gate = self.gates.get(event.label) if query in self.ended else None
            faulty = self._rng.random() < self.fault_rate
        if wrong:
            heard = self.ended.get(query) if before is None else before
            self.soak.violated(None, f"{self.name}, query {query}: {kind!r} after {heard!r}")
        if gate is not None:
            gate.open()
        if faulty:
            with self.soak.lock:
                self.soak.hook_faults += 1
            kinds = [ValueError, OwnFault, SystemExit]
            if threading.get_ident() != threading.main_thread().ident:
                kinds.append(KeyboardInterrupt)  # on the main thread it is Ctrl-C
            raise self._rng.choice(kinds)

    def ask(self, step, method, *arguments, **options):
        """Call a method of the collector; gives None where it refused rightly."""
        collector = self.collector
        if collector is None:
            return None
        closed = self.closed
        with self.lock:
            self.submitted += 1
        try:
            made = getattr(collector, method)(*arguments, **options)
        except (pa.QueueFullError, pa.CollectorClosedError) as error:
            self.refused(step, error)
            return None
        if closed:
            self.soak.violated(step, f"{self.name} took a query after close()")
        return made

    def ask_each(self, step, lfs, **options):
        """Call `as_completed`, which may submit but some."""
        collector = self.collector
        if collector is None:
            return None
        label = f"each of {step}"
        error = made = None
        try:
            made = collector.as_completed(lfs, label=label, **options)
        except (pa.QueueFullError, pa.CollectorClosedError) as refusal:
            error = refusal
            self.refused(step, error)
        with self.lock:
            number = self.by_label.pop(label, 0)
            self.submitted += number
        if not (number == len(lfs) if error is None else 1 <= number <= len(lfs)):
            self.soak.violated(step, f"as_completed submitted {number} of {len(lfs)}, {error!r}")
        return made

    def refused(self, step, error):
        with self.lock:
            self.rejected += 1
        full = isinstance(error, pa.QueueFullError)
        if not (self.limits["max_waiting"] is not None if full else self.closing):
            self.soak.violated(step, f"{self.name} refused without a reason: {error!r}")

    def expect(self, query):
        with self.lock:
            self.expected[query.id] = query

    def hold(self, label, gate):
        """Open `gate` when the query of this label ends, in whichever way."""
        with self.lock:
            self.gates[label] = gate
            self.loop_bound += 1

    def let_go(self):
        with self.lock:
            self.loop_bound -= 1

    @contextmanager
    def bound_to_loop(self):
        with self.lock:
            self.loop_bound += 1
        yield
        self.let_go()

    def forget(self):
        """Drop what a quiet point has checked."""
        for box in (self.ended, self.expected, self.gates, self.by_label):
            box.clear()

    def stats(self):
        cpu, *gpus = (lane.admission for lane in self.lanes)
        return stats_of(cpu, gpus, self.flights)

    def check_sum(self, step):
        stats = self.stats()
        outcomes = ("completed", "failed", "cancelled", "rejected", "timed_out", "waiting")
        here = sum(stats[name] for name in outcomes) + stats["running"] - stats["abandoned"]
        if stats["submitted"] != here:
            self.soak.violated(step, f"{self.name}: the sum of stats() is {here}: {stats}")

    def unrest(self):
        """Give what is not as it has to be where nothing goes on."""
        stats, found = self.stats(), []
        with self.lock:
            events, open_, ended = Counter(self.events), dict(self.open), dict(self.ended)
        pairs = [
            (stats["submitted"], self.submitted, "submitted, and as counted here"),
            (stats["submitted"], events["queued"], "submitted, and events of it"),
            (stats["rejected"], self.rejected, "rejected, and as counted here"),
            (stats["completed"], events["finished"], "completed, and events of it"),
            *(
                (stats[name], events[name], f"{name}, and events of it")
                for name in ("failed", "cancelled", "timed_out", "rejected")
            ),
            (len(open_), 0, f"queries without a last event: {list(open_.items())[:5]}"),
        ]
        pairs += [(stats[name], 0, name) for name in ("running", "waiting", "abandoned")]
        pairs += [
            (len(self.flights._in_air), 0, "flights in the air"),
            (len(self.flights._by_key), 0, "flights that may be boarded"),
        ]
        for lane in self.lanes:
            admission = lane.admission
            line = admission._queue
            pairs += [
                (len(admission._slots), 0, "slots in use"),
                (admission.paused, 0, "slots paused"),
                (len(admission.waiters), 0, "waiters for the end of all"),
                (len(line._entries), 0, "places in the line"),
            ]
            if len(line._unestimated) + sum(map(len, line._heaps.values())) > 200:
                found.append("the empty line holds more than 200 places")
        for query in list(self.expected.values()):
            expected, event = STATES[query.state.name], ended.get(query.id)
            if event != expected:
                found.append(f"query {query.id} is {expected}, its event: {event}")
            kept = query._outcome.value is not None or query._outcome.error is not None
            if kept and query.is_cancelled:
                found.append(f"query {query.id}, which was let go, keeps what it gave")
        found += [f"{one} is not {other}: {what}" for one, other, what in pairs if one != other]
        return [f"{self.name}: {each}; {stats}" for each in found]
