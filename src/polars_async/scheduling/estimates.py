"""Estimates of the work of a query, by what its plan reads and by how long its like took before."""

from __future__ import annotations

import os
from functools import lru_cache
from math import frexp
from stat import S_ISREG
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import ref

from polars_async._runtime.fork import new_lock
from polars_async._runtime.parquet import number_of_values
from polars_async._runtime.plans import FAR, NEAR, NOTHING, SENT_RATE, look_at
from polars_async._runtime.upstream import memory_held, plan_nodes
from polars_async.scheduling.sizes import UNKNOWN, Load, size_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from polars_async._runtime.plans import Plan
    from polars_async.scheduling.memory import Memory

_FRAME_RATE: Final = 200e6
"""Bytes per second of a query over a frame in memory: just the order of magnitude."""
_FILE_RATE: Final = 50e6
"""Bytes per second of a query over a file."""
_SLOWDOWN: Final = 1000
"""How many times longer a query may take beside others: a tiny one waits for all the tasks of the
heavy ones in Polars' own thread pool."""
_HELD_UP: Final = 0.02
"""Seconds that a query may have waited for the GIL alone, four times its switch interval, while a
loop was busy: a tiny one must not count as large for that."""
_NO_TIME: Final = 0.001
"""Seconds of work below which estimates make no difference."""
_NO_MEMORY: Final = 1 << 20
"""Bytes below which estimates make no difference."""
_SHARE_OF_REMOTE: Final = 0.25
"""The share of the processors that a query over remote files is expected to take at first."""
_TEXTS: Final = (".csv", ".json", ".jsonl", ".log", ".ndjson", ".tsv", ".txt")
"""How the names of files end that are not compressed."""
_OF_VALUE: Final = 5
"""Bytes of a file that a value in a Parquet file counts for at least: eight times that is what five
times its eight bytes in memory are."""
_MOST_FOOTER: Final = 1 << 16
"""Bytes of a footer of such a file, which take some 13 ms."""
_MOST_UNPACKED: Final = 16
"""Files of one query of which the footers are read; of more, how much they unpack to is unknown."""
_MOST_KNOWN: Final = 4096
_MOST_COPIED: Final = 1 << 30
"""Bytes of frames in memory: where there are more, no plan is looked at, since a look may copy one
of them."""
MUCH_HELD: Final = 20 << 20
"""Bytes that Polars may hold in all for a look to be short. Without any frame it is some 15 MB."""
_SLOW_LOOK: Final = 0.25
"""Seconds of processor time above which a look took too long, as with a frame of 1 GB."""
_DEAR_LOOK: Final = 0.005
"""Seconds of processor time from which on a look is dear: it has copied some 10 MB or more."""
_LOOK_SHARE: Final = 20
"""After a slow look there is none for so many times as long as it took, and after a dear one none
for the sake of the order alone."""
_LEARN_SHARE: Final = 20
"""The same after any look at a query that has ended."""


class Estimate(NamedTuple):
    """The estimated work of one query."""

    seconds: float
    fingerprint: int | None
    """The same for all queries of this shape and size; None if it is not known."""
    is_exact: bool = True
    """Whether the shape is all of the plan: a function hidden in it may make its like slower."""
    share: float | None = None
    """The share of the processors that it keeps busy; None if that is not known: maybe all."""
    memory: int = 0
    """Bytes that it takes at its peak; 0 where memory has no limit."""
    is_mere_guess: bool = False
    """Whether that is much for want of knowledge alone: it may take anything, also next to
    nothing."""

    @property
    def is_light(self) -> bool:
        """Whether the query counts as light."""
        return Load(size_of(self.seconds), self.share).is_light


class Sources(NamedTuple):
    """What a query reads, as far as it is known."""

    size: int | None
    """In bytes, in memory and in files here, as far as the plan was read; None if it is
    not known."""
    scans: bool
    """Whether it scans files, or what is elsewhere."""
    runs_python: bool | None
    """Whether it runs functions of Python or of a plugin; None if not all of its plan was read."""
    shape: int | None
    """The same for all queries of this shape and size; None if it is not known."""


_NO_SOURCES: Final = Sources(None, scans=False, runs_python=None, shape=None)


class _Known(NamedTuple):
    frame: ref[pl.LazyFrame]
    plan: Plan
    size: int | None
    """Of what the frame reads, in bytes; None if it is not known."""
    seconds: float
    """The estimate by that size."""


class CostModel:
    """
    The cost model of a collector, corrected by the queries that it ran.

    Reading a plan takes 10 us to some ms, and another 0.2 ms for each MB of a frame in memory that
    the query reads, since Polars copies it. So it is nothing for the thread of a loop. With `far`
    more of the plan is read, which is worth it where a query may have to be sent. With `memory`
    what queries take of it is estimated and learned, too.
    """

    def __init__(self, *, far: bool = False, memory: Memory | None = None) -> None:
        self._is_far = far
        self._memory = memory
        self._limit = FAR if far else NEAR
        self._lock = new_lock()
        self._taken: dict[int, float] = {}
        self._shares: dict[int, float] = {}
        self._plans: dict[int, _Known] = {}
        self._resident = 0  # bytes that Polars held when no query ran
        self._looks_again = 0.0  # in seconds of perf_counter
        self._learns_again = 0.0
        self._dear_until = 0.0

    def of(self, frames: Sequence[pl.LazyFrame], engine: str) -> Estimate:
        """Return the estimate of a query for `frames`; never raise."""
        try:
            minds_memory = self._memory is not None
            known = [
                self._known(frame, plans_it=minds_memory and not self._is_far) for frame in frames
            ]
            seconds = sum(each.seconds for each in known)
            if any(each.plan is NOTHING for each in known):
                return Estimate(seconds, None, memory=self._need(None, known)[0])
            fingerprint = hash((engine, *_shapes_of(known)))
            is_exact = all(each.plan.is_whole for each in known)
            seconds, share = self._taken.get(fingerprint, seconds), self._shares.get(fingerprint)
            if share is None and any(
                _is_remote(path) for each in known for path in each.plan.paths
            ):
                share = _SHARE_OF_REMOTE
            return Estimate(seconds, fingerprint, is_exact, share, *self._need(fingerprint, known))
        except BaseException:  # noqa: BLE001  # what is wrong with a plan, the query will tell
            return Estimate(UNKNOWN, None, memory=self._need(None)[0])

    def _need(self, fingerprint: int | None, known: Sequence[_Known] = ()) -> tuple[int, bool]:
        """Return the bytes that a query is expected to take, and whether that is a mere guess."""
        memory = self._memory
        if memory is None:
            return 0, False
        frames = sum(each.plan.frame_bytes for each in known)
        sizes = [each.size for each in known if each.size is not None]
        files = sum(sizes) - frames if known and len(sizes) == len(known) else None
        if memory.knows(fingerprint):
            return memory.need(fingerprint, frames, files), False
        if files is not None and memory.guess(frames, files) <= memory.small:
            paths = [path for each in known for path in each.plan.paths]
            if any(each.plan.may_grow for each in known) or not frames + files:
                files = None
            elif paths:
                files = _unpacked_size(paths)
        reads_little = fingerprint is not None and memory.guess(frames, 0) <= memory.small
        return memory.need(fingerprint, frames, files), files is None and reads_little

    def of_ended(self, frames: Sequence[pl.LazyFrame], engine: str) -> Estimate | None:
        """Return the estimate of a query that has ended, to learn from it; None if that is dear."""
        now = perf_counter()
        if now < self._learns_again:
            return None
        before = thread_time()
        estimate = self.of(frames, engine)
        self._learns_again = now + _LEARN_SHARE * (thread_time() - before)
        return estimate

    def of_function(self, fingerprint: int) -> Estimate:
        """Return the estimate of a function, of which nothing is known but its earlier calls."""
        seconds, share = self._taken.get(fingerprint, UNKNOWN), self._shares.get(fingerprint)
        return Estimate(seconds, fingerprint, False, share, *self._need(fingerprint))  # noqa: FBT003  # it is not exact

    def is_look_dear(self) -> bool:
        """Return whether looks have taken much time of late."""
        return perf_counter() < self._dear_until

    def sources(self, frames: Sequence[pl.LazyFrame]) -> Sources:
        """
        Return what a query for `frames` reads, and keep it for its estimate; never raise.

        Where Polars holds large frames, or a look does not show all of a plan, it plans the query:
        in some 20 us, but what it calls to plan a query is then called once more.
        """
        try:
            known = [self._known(frame, plans_it=not self._is_far) for frame in frames]
        except BaseException:  # noqa: BLE001  # as in `of`
            return _NO_SOURCES
        plans = [each.plan for each in known]
        python = {plan.runs_python for plan in plans}
        sizes = [each.size for each in known]
        return Sources(
            size=None if None in sizes else sum(size or 0 for size in sizes),
            scans=any(plan.paths for plan in plans),
            runs_python=True if True in python else None if None in python else False,
            shape=None if NOTHING in plans else hash(_shapes_of(known)),
        )

    def plan(self, frame: pl.LazyFrame) -> Plan:
        """Return the facts of the plan of `frame`, however long reading it takes; never raise."""
        try:
            return self._known(frame, at_any_cost=True).plan
        except BaseException:  # noqa: BLE001  # as above
            return NOTHING

    def seconds_to_send(self, frames: Sequence[pl.LazyFrame]) -> float:
        """Return how long it takes to send a query for `frames` to another process."""
        return sum(self.plan(frame).frame_bytes for frame in frames) / SENT_RATE

    def _known(
        self, frame: pl.LazyFrame, *, at_any_cost: bool = False, plans_it: bool = False
    ) -> _Known:
        # A frame that is collected again and again is looked at once.
        key = id(frame)
        plans = self._plans
        known = plans.get(key)
        if known is not None and known.frame() is frame:
            return known
        plan = _planned(frame) if plans_it and memory_held() > MUCH_HELD else None
        if plan is None and (plan := self._look(frame, at_any_cost=at_any_cost)) is None:
            return _Known(ref(frame), NOTHING, None, UNKNOWN)
        if plans_it and plan.runs_python is None:
            plan = _planned(frame) or plan
        known = _Known(ref(frame, lambda _: plans.pop(key, None)), plan, *_amount(plan))
        plans[key] = known
        return known

    def _look(self, frame: pl.LazyFrame, *, at_any_cost: bool) -> Plan | None:
        """Read the plan of `frame`; return None if that is too dear now."""
        begun = perf_counter()
        too_dear = self._resident > _MOST_COPIED or begun < self._looks_again
        if too_dear and not at_any_cost:
            return None
        before = thread_time()  # where others keep the processors busy, a look is not slow for that
        plan = look_at(frame, self._limit)
        if (took := thread_time() - before) > _DEAR_LOOK:
            self._dear_until = begun + _LOOK_SHARE * took
            if took > _SLOW_LOOK:
                self._looks_again = self._dear_until
        return plan

    def observe(
        self,
        expected: Estimate,
        seconds: float,
        *,
        alone: bool,
        completed: bool = True,
        share: float | None = None,
        memory: int | None = None,
    ) -> Estimate | None:
        """
        Correct the estimate `expected` of a query by the `seconds` that it took.

        `alone` says that no other query ran meanwhile, so that this is the time that it takes, but
        for waits for the GIL. Beside others the time is an upper bound, and at most some orders of
        magnitude too high. A query that was not `completed` takes at least so long. `share` is that
        of the processors which this process kept busy meanwhile, if it was measured; `memory` the
        bytes that the query took at its peak. Return the new estimate, or None if the old one was
        not off by half.
        """
        if alone:
            self._resident = memory_held()
        if expected.fingerprint is None:
            return None
        needs = expected.memory
        if self._memory is not None and memory is not None:
            needs = self._memory.learn(expected.fingerprint, memory, completed=completed)
        is_near = 2 / 3 * expected.memory <= needs <= 3 / 2 * max(expected.memory, _NO_MEMORY)
        if is_near and seconds <= _NO_TIME and expected.seconds <= _NO_TIME:
            return None
        least = seconds - _HELD_UP if alone else seconds / _SLOWDOWN
        with self._lock:
            before = self._taken.pop(expected.fingerprint, expected.seconds)
            fits = least / 2 <= max(before, _NO_TIME) and (
                not completed or before <= max(2 * seconds, _NO_TIME)
            )
            now = before if fits else min(max(before, least), seconds)
            if not expected.is_exact:  # the next of its kind may have another function
                now = max(now, before / 2)
            self._taken[expected.fingerprint] = now
            if len(self._taken) > _MOST_KNOWN:
                oldest = next(iter(self._taken))
                del self._taken[oldest]
                self._shares.pop(oldest, None)
            if share is not None:
                self._learn_share(expected, share, alone=alone)
            share = self._shares.get(expected.fingerprint, expected.share)
        new = expected._replace(seconds=now, share=share, memory=needs, is_mere_guess=False)
        fits = fits and is_near and new.is_light == expected.is_light
        return None if fits else new

    def _learn_share(self, expected: Estimate, share: float, *, alone: bool) -> None:
        fingerprint = expected.fingerprint
        assert fingerprint is not None
        before = self._shares.get(fingerprint)
        if not alone:  # an upper bound: the others kept processors busy, too
            share = min(share, 1.0 if expected.share is None else expected.share)
        elif before is not None and not expected.is_exact:  # as with the seconds
            share = max(share, before / 2)
        self._shares[fingerprint] = min(share, 1.0)


def _planned(frame: pl.LazyFrame) -> Plan | None:
    """Return what Polars shows of `frame` when it plans it; None if it does not."""
    nodes = plan_nodes(frame)
    if nodes is None:
        return None
    return NOTHING._replace(
        shape=nodes.shape,
        frame_bytes=nodes.frame_bytes,
        paths=nodes.paths,
        is_whole=not nodes.runs_python,
        is_sized=not nodes.runs_python,
        runs_python=nodes.runs_python,
        may_grow=nodes.may_grow,
    )


def _shapes_of(known: Sequence[_Known]) -> tuple[tuple[int, int], ...]:
    return tuple((each.plan.shape, frexp(each.seconds)[1]) for each in known)


def _amount(plan: Plan) -> tuple[int | None, float]:
    """Return how much a query reads, as far as it is known: in bytes and in seconds."""
    files = [_file_size(path) for path in plan.paths]
    sizes = [size for size in files if size is not None]
    seconds = plan.frame_bytes / _FRAME_RATE + sum(sizes) / _FILE_RATE
    seconds += UNKNOWN * (len(files) - len(sizes))
    if not plan.is_sized:  # the plan is longer than was read of it
        return plan.frame_bytes or None, max(seconds, UNKNOWN)
    return plan.frame_bytes + sum(sizes) if len(sizes) == len(files) else None, seconds


def _unpacked_size(paths: Sequence[str]) -> int | None:
    """Return the size of files as it counts for memory; None if they may be well compressed."""
    sizes = [_unpacked(path) for path in paths[:_MOST_UNPACKED]]
    return None if None in sizes or len(sizes) < len(paths) else sum(size or 0 for size in sizes)


def _unpacked(path: str) -> int | None:
    status = _file_status(path)
    if status is None:
        return None
    if path.lower().endswith(_TEXTS):
        return status.st_size
    try:
        values = _values_of(path, status.st_size, status.st_mtime_ns)
    except OSError:
        return None
    return None if values is None else max(status.st_size, _OF_VALUE * values)


@lru_cache(_MOST_KNOWN)
def _values_of(path: str, _size: int, _changed: int) -> int | None:
    """Read the footer of a file once, as long as it is the same: many queries may scan it."""
    return number_of_values(path, _MOST_FOOTER)


def _is_remote(path: str) -> bool:
    scheme, found, _ = path.partition("://")
    return bool(found) and scheme != "file"


def _file_size(path: str) -> int | None:
    status = _file_status(path)
    return None if status is None else status.st_size


def _file_status(path: str) -> os.stat_result | None:
    try:
        status = os.stat(path)  # noqa: PTH116  # as given, maybe an address
    except (OSError, ValueError):
        return None
    return status if S_ISREG(status.st_mode) else None
