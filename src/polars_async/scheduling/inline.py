"""
Queries that run on the thread that submits them, since another thread would cost more.

A query may do so if its shape is known: it reads frames in memory alone, has no function of Python
or of a plugin, and has run several times on other threads, below the bound each time. And it must
not have woken a thread of Polars' pools: one that does waits for its turn there while other work
is on, for 0.2 s and more, and the loop with it. That rules out the streaming engine, and on the
in-memory engine queries that compute more than one column, filter, group, sort or join. The others
take some 10 us, also beside eager work of Polars in other threads.

At the time of the submission all of these have to hold as well:

- No query but small ones runs, and none waits, in any collector of the process.
- The other threads of the process have computed little of late.
- The loop has had its turn, as `bridges.turns` explains.
- The caller is not a Python function of a query.

They are looked at without a lock, and may have changed once the query runs. All that comes of it is
that the query has to share the processors and the GIL.

One that took long all the same makes its shape unknown, and twice as many runs are needed to know
it again; and for a while no query of the process runs inline, longer each time. But the kernel
interrupts any thread for a few ms now and then. So the first one that took no longer than that only
makes the next of its shape be watched: did they compute for so long, or wait as for the GIL?
"""

from __future__ import annotations

from functools import partial
from math import inf
from time import perf_counter, process_time, thread_time
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import ref

import polars as pl

from polars_async._runtime import pool_clocks
from polars_async._runtime.fork import new_lock
from polars_async._runtime.nesting import in_query
from polars_async._runtime.plans import NEAR, UNFIT, shape_in_memory
from polars_async._runtime.unpatched import holding, local, start_new_thread
from polars_async._runtime.upstream import DEFAULT_OPTIMIZATIONS, memory_held
from polars_async.bridges import turns
from polars_async.bridges.waiting import wake
from polars_async.executors.operations import Collect, CollectAll
from polars_async.scheduling.counts import State
from polars_async.scheduling.estimates import Estimate
from polars_async.scheduling.slots import Slot
from polars_async.scheduling.telling import report_engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polars_async.bridges.waiting import Waiter
    from polars_async.executors import Job
    from polars_async.executors.operations import Operation
    from polars_async.scheduling.admission import Admission
    from polars_async.scheduling.query import Query

T = TypeVar("T")

_GOOD_RUNS: Final = 8
"""How many good runs make a shape known."""
_MOST_RUNS: Final = 1024
"""The most that are needed after queries of the shape took long."""
_LONG: Final = 2.0
"""A query took long if it was this many times the bound."""
_WATCHED: Final = 64
"""How many queries of its shape are watched after that."""
_WAITED: Final = 0.004
"""Seconds that one of these has waited for the GIL, of which a thread that computes lets go after 5
ms; the kernel's interruptions are mostly shorter."""
_VERY_LONG: Final = 0.02
"""Seconds after which a query need not be watched to be to blame."""
_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 60.0
"""Seconds for which no query runs inline after one that took long: the first time, and at most."""
_PEACE: Final = 10.0
"""After so many times the last pause without a query that took long, the next is short again."""
_WINDOW: Final = 0.02
"""Seconds of the shortest window in which the time of other threads is measured: of those that run
at its end, the kernel knows it to 4 ms."""
_BUSY: Final = 0.75
"""How many processors the other threads may have taken in a window. The worker threads of a
collector take half of one where they run one tiny query after the other."""
_POOLS_BUSY: Final = 0.25
"""The same of Polars' pools alone: so eager work is told from that of those worker threads, also
where other processes leave it little time."""
_MOST_SHAPES: Final = 1024
_MOST_FRAMES: Final = 4096
_TEXT: Final = 1 << 12
"""Characters of a plan that are read on the thread that submits it: in 20 us or so."""
_MOST_HELD: Final = 20 << 20
"""Bytes that Polars may hold in all if a plan is to be read there: each frame that it reads is
copied. Without any frame it is some 15 MB."""
_SLOW_LOOK: Final = 0.0005
"""Seconds that a look takes too long for that thread."""
_SLOW_LOOK_LASTS: Final = 60.0
"""Seconds without such a look after one that was slow."""
_MOST_COPIED: Final = 1 << 30
"""Bytes that Polars may hold if a plan is to be read on a thread of its own."""
_LOOK_SHARE: Final = 100
"""After such a look there is none for so many times as long as it took."""
_MOST_SKIPPED: Final = 64

_MOST_TOGETHER: Final = 4
"""Frames of one query: each takes a look."""
_LONG_TEXT: Final = -1
"""Stands for the key of a frame whose plan is too long to be read on the thread that submits it."""

_admissions: Final[dict[int, ref[Admission]]] = {}


def register(admission: Admission) -> None:
    """Have no query of the process run inline while `admission` has any but small ones."""
    key = id(admission)
    _admissions[key] = ref(admission, partial(_admissions.pop, key))


class _Pauses:
    """The times in which no query of the process runs inline."""

    def __init__(self) -> None:
        self.until = -inf
        self._seconds = 0.0

    def begin(self, now: float) -> None:
        """Begin a pause, longer than the last one unless that was long ago."""
        in_a_row = now < self.until + _PEACE * self._seconds
        self._seconds = min(2 * self._seconds, _LONGEST_PAUSE) if in_a_row else _PAUSE
        self.until = now + self._seconds


_pauses: Final = _Pauses()


class _OtherThreads(local):
    """Whether the threads of the process but this one have computed little in the last window."""

    began: float | None = None
    seconds = 0.0
    of_pools = 0.0
    are_quiet = False

    def are_quiet_at(self, now: float) -> bool:
        began = self.began
        if began is None or now - began >= _WINDOW:
            seconds = process_time() - thread_time()
            of_pools = (pool_clocks.computed() or 0) * 1e-9
            if began is not None:
                passed = now - began
                self.are_quiet = (
                    seconds - self.seconds < _BUSY * passed
                    and of_pools - self.of_pools < _POOLS_BUSY * passed
                )
            self.began, self.seconds, self.of_pools = now, seconds, of_pools
        return self.are_quiet


_other_threads: Final = _OtherThreads()


class _Pace:
    """Skips more and more of what costs something while nothing comes of it."""

    def __init__(self) -> None:
        self._left = 0
        self._skips = 0

    def is_due(self) -> bool:
        self._left -= 1
        return self._left < 0

    def note(self, *, paid: bool) -> None:
        self._skips = 0 if paid else min(2 * self._skips + 1, _MOST_SKIPPED)
        self._left = self._skips


class _Shape:
    """What is known of the queries of one shape."""

    __slots__ = ("_good", "_needed", "_pools", "_to_watch", "estimate", "is_known")

    def __init__(self) -> None:
        self.is_known = False
        self.estimate = Estimate(0.0, None)
        """That of the longest good run."""
        self._good = 0
        self._needed = _GOOD_RUNS
        self._pools = 0  # the list of the pools' threads by which these runs were watched
        self._to_watch = 0  # runs inline that are still to be watched

    def count(self, seconds: float) -> None:
        """Count a good run; enough of them, by one list of the pools' threads, make it known."""
        if self._pools != pool_clocks.version():
            self._good, self._pools = 0, pool_clocks.version()
        self._good += 1
        self.estimate = Estimate(max(self.estimate.seconds, seconds), None)
        if self._good >= self._needed:
            # Others of these threads may have started meanwhile, and not have been watched.
            self.is_known = pool_clocks.find_pools()

    def forget(self) -> None:
        """Make the shape unknown after a run that took long."""
        self.is_known, self._good = False, 0

    def watch(self) -> float | None:
        """Return the time that this thread has computed, if the run inline is to be watched."""
        if self._to_watch <= 0:
            return None
        self._to_watch -= 1
        return thread_time()

    def is_to_blame(self, seconds: float, bound: float, computed: float | None) -> bool:
        """
        Note a run inline of so many `seconds`, which began when this thread had `computed` so many.

        If it took long, make the shape unknown, and return True.
        """
        if seconds <= _LONG * bound:
            return False
        self._to_watch = _WATCHED
        if seconds < _VERY_LONG and (
            computed is None or (seconds < _WAITED and thread_time() - computed <= bound)
        ):
            return False
        self.forget()
        self._needed = min(2 * self._needed, _MOST_RUNS)
        return True


_NEW: Final = _Shape()
"""Stands for a shape of which nothing is known."""


class Watch:
    """What one run on a worker thread takes, of that thread and of Polars' pools."""

    __slots__ = ("_computed", "_cpu", "cpu", "frames", "is_alone", "operation")

    def __init__(self, query: Query[Any], computed: int) -> None:
        self.operation = query.operation
        self.frames = query.frames
        self.cpu = inf
        """The processor time of its own thread, in seconds."""
        self.is_alone = False
        """Whether no thread of the pools has computed meanwhile."""
        self._computed = computed
        self._cpu = thread_time()

    def stop(self) -> None:
        """Note the end of the run."""
        self.cpu = thread_time() - self._cpu
        # None if one of the listed threads has ended meanwhile.
        self.is_alone = pool_clocks.computed() == self._computed


class Inline:
    """
    Runs queries of one collector on the thread that submits them.

    Worker threads `watch` queries, and `learn` which shapes are known: those whose runs all took no
    more than `bound` seconds.
    """

    def __init__(self, bound: float) -> None:
        self.ran = 0
        """How many queries have run so; changes with the lock of the admission held."""
        self._bound = bound
        self._lock = new_lock()  # of the shapes: for worker threads; those that submit just read
        self._shapes: dict[int, _Shape] = {}
        self._knows_any = False
        self._keys: dict[int, tuple[ref[pl.LazyFrame], int]] = {}
        """The keys of the shapes of frames, by the identity of the frame."""
        self._watches = _Pace()
        self._looks_here = _Pace()
        self._looks_here_again = -inf
        self._looks_again = -inf
        self._is_looking = False

    def run(self, admission: Admission, query: Query[Any]) -> bool:
        """Run `query`, which is not admitted yet, if it may run here; return whether it has run."""
        if not self._knows_any or not _is_candidate(query):
            return False
        key = self._key(query.operation, query.frames)
        shape = None if key is None else self._shapes.get(key, _NEW)
        if not self._may_look_here() if shape is None else not shape.is_known:
            return False
        if not _may_run_now():
            if shape is not None:  # it counts as small, and others may still run inline beside it
                _use(query, shape)
            return False
        if shape is None:
            shape = self._look_here(query)
            if not shape.is_known:
                return False
        _use(query, shape)
        return self._run(admission, query, shape)

    def watch(self, query: Query[Any]) -> Watch | None:
        """Return what watches a run on this worker thread; None if nothing is to be learned."""
        if self._is_looking or not _is_candidate(query):
            return None
        key = self._key(query.operation, query.frames)
        if key is not None and (key == UNFIT or self._shapes.get(key, _NEW).is_known):
            return None
        # Where most queries need the pools, not all are worth the reads of so many clocks.
        if not self._watches.is_due():
            return None
        computed = pool_clocks.computed()
        if computed is None:
            pool_clocks.find_pools()
            return None
        return Watch(query, computed)

    def learn(self, watch: Watch, query: Query[Any]) -> None:
        """Note what `watch` has seen of the run of `query`, which has ended."""
        seconds = query.times.run_seconds or inf
        is_long = watch.cpu > self._bound
        is_good = watch.is_alone and seconds <= self._bound and query.state is State.COMPLETED
        self._watches.note(paid=is_good)
        key = self._key(watch.operation, watch.frames)
        if key is None or key == _LONG_TEXT:
            if is_good:
                self._look(watch, seconds)
        elif is_good:
            self._count(key, seconds)
        elif is_long and (shape := self._shapes.get(key)) is not None:
            shape.forget()
        # Else it has waited for the GIL, or others have used the pools.

    def _run(self, admission: Admission, query: Query[Any], shape: _Shape) -> bool:
        slot = Slot(inline=True)
        waiters: list[Waiter] = []
        computed = shape.watch()
        began = perf_counter()
        try:
            if not holding(admission.lock, admission.start_inline, query, slot):
                return False
            query.is_inline = True
            query.run(_run_operation)
            if query.reports:
                report_engine(query)
            holding(admission.lock, self._finish, admission, query, slot, waiters)
            if query.reports:
                query.report_end()
                holding(admission.lock, admission.end_inline, query, slot)
            if waiters:
                wake(waiters)
            if admission.waiters:
                admission.wake_if_empty()
        except BaseException:  # out of a signal handler, or Ctrl-C in a hook
            # No other thread frees this slot. The query, unless it is done, is cancelled by the
            # caller.
            holding(admission.lock, admission.end_inline, query, slot)
            wake(waiters)
            raise
        query.frames = ()
        turns.note(began, ended := perf_counter())
        if shape.is_to_blame(query.times.run_seconds or 0.0, self._bound, computed):
            _pauses.begin(ended)
        _raise_interrupt(query)
        return True

    def _finish(
        self, admission: Admission, query: Query[Any], slot: Slot, waiters: list[Waiter]
    ) -> None:
        """Make the outcome final, with the lock held, and free the slot unless a hook is next."""
        self.ran += 1
        admission.counts.downgraded += query.resolution.downgraded
        waiters.extend(query.set_finished())
        if not query.reports:
            admission.end_inline(query, slot)

    def _key(self, operation: object, frames: Sequence[pl.LazyFrame]) -> int | None:
        """Return the key of the shape of a query; None if a frame was not looked at."""
        if type(operation) is Collect:
            frame = frames[0]
            found = self._keys.get(id(frame))
            return found[1] if found is not None and found[0]() is frame else None
        keys = []
        for frame in frames:
            found = self._keys.get(id(frame))
            if found is None or found[0]() is not frame:
                return None
            keys.append(found[1])
        return next((each for each in (UNFIT, _LONG_TEXT) if each in keys), hash(tuple(keys)))

    def _look_at(self, frames: Sequence[pl.LazyFrame], limit: int, if_longer: int) -> None:
        """Find the keys of `frames`; where the text of a plan exceeds `limit` it is `if_longer`."""
        keys = self._keys
        for frame in frames:
            shape = shape_in_memory(frame, limit)
            if len(keys) >= _MOST_FRAMES:
                keys.clear()
            number = id(frame)
            known = ref(frame, partial(keys.pop, number))
            keys[number] = (known, if_longer if shape is None else shape)

    def _may_look_here(self) -> bool:
        """Return whether a look on the thread that submits a query takes no time, and may pay."""
        return (
            self._looks_here.is_due()
            and perf_counter() >= self._looks_here_again
            and memory_held() <= _MOST_HELD
        )

    def _look_here(self, query: Query[Any]) -> _Shape:
        """Look at the plan of `query` on the thread that submits it."""
        began = perf_counter()
        self._look_at(query.frames, _TEXT, _LONG_TEXT)
        key = self._key(query.operation, query.frames)
        shape = _NEW if key is None else self._shapes.get(key, _NEW)
        self._looks_here.note(paid=shape.is_known)
        if (now := perf_counter()) - began > _SLOW_LOOK:
            self._looks_here_again = now + _SLOW_LOOK_LASTS
        return shape

    def _look(self, watch: Watch, seconds: float) -> None:
        """Look at the plan of a good run on a thread of its own, so that no query waits for it."""
        if perf_counter() < self._looks_again or memory_held() > _MOST_COPIED:
            return
        self._is_looking = True
        try:
            start_new_thread(self._look_and_count, (watch, seconds))
        except RuntimeError:  # no thread can start
            self._is_looking = False

    def _look_and_count(self, watch: Watch, seconds: float) -> None:
        began = perf_counter()
        try:
            self._look_at(watch.frames, NEAR, UNFIT)
            key = self._key(watch.operation, watch.frames)
            if key is not None and key != UNFIT:
                self._count(key, seconds)
        finally:
            now = perf_counter()
            self._looks_again = now + _LOOK_SHARE * (now - began)
            self._is_looking = False

    def _count(self, key: int, seconds: float) -> None:
        with self._lock:
            shape = self._shapes.get(key)
            if shape is None:
                shape = self._shapes[key] = _Shape()
                if len(self._shapes) > _MOST_SHAPES:
                    del self._shapes[next(iter(self._shapes))]
            shape.count(seconds)
            self._knows_any = self._knows_any or shape.is_known


def _run_operation(operation: Operation[T], query: Job) -> T:
    """Run `operation` as `IN_PROCESS` does, but without care for Python functions: it has none."""
    try:
        return query.context.run(operation)
    finally:
        del operation, query  # see QueryExecutor.run


def _use(query: Query[Any], shape: _Shape) -> None:
    query.estimate = shape.estimate
    query.choose_for_quick()


def _is_candidate(query: Query[Any]) -> bool:
    operation = query.operation
    return (
        (type(operation) is Collect or type(operation) is CollectAll)
        and type(operation.engine) is pl.InMemoryEngine
        and operation.optimizations is DEFAULT_OPTIMIZATIONS
        and query.priority >= 0
        and 1 <= len(query.frames) <= _MOST_TOGETHER
    )


def _may_run_now() -> bool:
    now = perf_counter()
    return (
        now >= _pauses.until
        and turns.has_room()
        and _other_threads.are_quiet_at(now)
        and _only_small_run()
        and not in_query()
    )


def _only_small_run() -> bool:
    # A list, not a tuple: CPython 3.11 may collect garbage between the start of the iteration and
    # the making of a tuple, and an admission among it leaves the dictionary.
    for known in list(_admissions.values()):
        admission = known()
        if admission is not None and not admission.has_only_small:
            return False
    return True


def _raise_interrupt(query: Query[Any]) -> None:
    """
    Raise what has interrupted `query`, such as Ctrl-C, also here, where it belongs.

    It is its outcome as well, but a caller that never asks for that would not learn it.
    """
    error = query.error
    if error is not None and not isinstance(error, (Exception, pl.exceptions.PanicException)):
        try:
            raise error
        finally:
            del query, error  # the error's traceback holds this frame
