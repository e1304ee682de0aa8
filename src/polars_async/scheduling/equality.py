"""
Which queries are equal: the same plans, on the same engine, over the same files and frames.

What is looked at when a query is submitted takes some 10 us, and no longer where frames in memory
are large, but for the first time: Polars copies a frame to pack the plan that has it.
"""

from __future__ import annotations

from functools import partial
from itertools import count
from math import inf
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import ref

from polars_async._runtime.callers import call_site
from polars_async._runtime.file_states import states_of
from polars_async._runtime.plans import is_same_each_time, packed
from polars_async._runtime.unpatched import allocate_lock, start_new_thread, wait_for
from polars_async._runtime.upstream import (
    BUILT_IN_ENGINES,
    DEFAULT_OPTIMIZATIONS,
    memory_held,
    optimization_flags,
    paths_of,
    plan_nodes,
)
from polars_async.executors.operations import Collect, CollectAll
from polars_async.scheduling.estimates import MUCH_HELD

if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Hashable, Sequence

    import polars as pl

    from polars_async.executors.operations import Operation

_LARGEST_PLAN: Final = 1 << 18
"""Bytes of a packed plan, with its frames in memory, that are compared."""
_LARGEST_FRAMES: Final = 1 << 20
"""Bytes of frames in memory, in all, that are copied by the thread that submits a query."""
_SLOW: Final = 0.0005
"""Seconds of processor time after which a look was one at a large frame."""
_LOOKS_AGAIN: Final = 60.0
"""Seconds until a query from a line of the program is planned again, if that has not ended."""
_PACE: Final = 100
"""After it has ended, none from that line is planned for so many times as long as it took."""
_SMALL: Final = -inf
"""Stands for that time where frames were small, and plans are simply packed."""
_MOMENT: Final = 0.005
"""Seconds for which the thread that submits a query waits for that."""
_numbers: Final = count()
_MOST_KNOWN: Final = 1024
_LARGEST_KNOWN: Final = 1 << 14
"""Bytes of a packed plan of which it is kept what was found."""
_MOST_TOGETHER: Final = 32
"""Frames of one query."""


class Plan(NamedTuple):
    """A plan as Polars packs it, and the paths that it scans."""

    packed: bytes
    paths: list[str]

    @property
    def known_as(self) -> Hashable:
        """What it is known as: a hash stands for a large one, which would take much memory."""
        return self.packed if len(self.packed) <= _LARGEST_KNOWN else hash(self.packed)


class Equality(NamedTuple):
    """What equal queries have in common."""

    key: Hashable
    plans: Sequence[Plan]
    is_lasting: bool
    """Whether it is known that no file has changed for all equal ones; if not, one that comes when
    another has started might find other data."""


class Plans:
    """The plans of the queries of one collector, as far as they have been looked at."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[pl.LazyFrame], Plan]] = {}
        """By the identity of the frame: one that is collected again is looked at once."""
        self._repeatable: dict[Hashable, bool] = {}
        self._resident = inf
        """The least that Polars held while no query ran, in bytes."""
        self._not_before: dict[tuple[str, int], float] = {}
        """By line of the program: when a query from there may be planned, by perf_counter."""

    def equality_of(
        self, operation: Operation[object], engine_name: str, *, is_idle: bool
    ) -> Equality | None:
        """
        Return what queries have in common that are equal to that of `operation`.

        Return None if there is no telling, or none is. `engine_name` is that of its engine, which
        may not be chosen yet; `is_idle` says that no query runs.
        """
        if type(operation) not in (Collect, CollectAll):
            return None
        assert isinstance(operation, (Collect, CollectAll))
        frames = operation.frames
        engine = _key_of_engine(operation.engine)
        if engine is None or not 1 <= len(frames) <= _MOST_TOGETHER:
            return None
        held = memory_held()
        if is_idle or held < self._resident:
            self._resident = held
        plans = []
        for frame in frames:
            plan = self._plan(frame)
            if plan is None or self._repeatable.get(plan.known_as) is False:
                return None
            plans.append(plan)
        paths = [path for plan in plans for path in plan.paths]
        states = states_of(paths) if paths else ()
        flags = _key_of(operation.optimizations)
        key = (
            type(operation),
            engine_name,
            engine,
            flags,
            states,
            *(plan.packed for plan in plans),
        )
        return Equality(key, plans, is_lasting=states is not None)

    def are_repeatable(self, equality: Equality, frames: Sequence[pl.LazyFrame]) -> bool:
        """Return whether the result is known to be the same each time; it takes some 100 us."""
        return all(map(self._is_repeatable, equality.plans, frames))

    def _plan(self, frame: pl.LazyFrame) -> Plan | None:
        number = id(frame)
        known = self._known.get(number)
        if known is not None and known[0]() is frame:
            return known[1]
        if self._resident <= MUCH_HELD:
            return self._look_at(frame, None)
        # A frame in memory may be large, and nothing tells before it is copied, but where the query
        # comes from.
        site = call_site()
        line = (site.file, site.line)
        until = self._not_before.get(line, 0.0)
        if until <= perf_counter() and until != _SMALL:
            until = self._try(frame, line)
        if until == _SMALL:
            return self._look_at(frame, line)
        known = self._known.get(number)
        return None if known is None else known[1]

    def _look_at(self, frame: pl.LazyFrame, line: tuple[str, int] | None) -> Plan | None:
        before = None if line is None else thread_time()
        plan = packed(frame, _LARGEST_PLAN)
        if line is not None and before is not None and thread_time() - before > _SLOW:
            self._not_before[line] = perf_counter()
        if plan is None or (paths := paths_of(plan)) is None:
            return None
        found = Plan(plan, paths)
        if len(plan) <= _LARGEST_KNOWN:
            self._note(frame, found)
        return found

    def _note(self, frame: pl.LazyFrame, plan: Plan) -> None:
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        number = id(frame)
        self._known[number] = (ref(frame, partial(self._known.pop, number)), plan)

    def _try(self, frame: pl.LazyFrame, line: tuple[str, int]) -> float:
        """
        Have `frame` planned by another thread, and wait for that for a moment.

        It shows how large its frames in memory are, in some 0.1 ms and without a copy, but may call
        functions, or open files far away. Return when to try the next one from `line`.
        """
        if len(self._not_before) >= _MOST_KNOWN:
            self._not_before.clear()
        self._not_before[line] = perf_counter() + _LOOKS_AGAIN
        ended = allocate_lock()
        ended.acquire()
        try:
            start_new_thread(self._plan_it, (frame, line, ended))
        except RuntimeError:  # no thread can start
            return inf
        wait_for(ended, _MOMENT)
        return self._not_before.get(line, inf)

    def _plan_it(self, frame: pl.LazyFrame, line: tuple[str, int], ended: LockType) -> None:
        try:
            began = perf_counter()
            nodes = plan_nodes(frame)
            now = perf_counter()
            if nodes is not None and nodes.frame_bytes <= _LARGEST_FRAMES:
                self._not_before[line] = _SMALL
                return
            self._not_before[line] = now + _PACE * (now - began)
            if nodes is not None and nodes.is_repeatable:
                # Large ones cannot be compared: no other frame is equal to this one.
                own = b"%d" % next(_numbers)
                self._repeatable[own] = True
                self._note(frame, Plan(own, nodes.paths))
        finally:
            ended.release()

    def _is_repeatable(self, plan: Plan, frame: pl.LazyFrame) -> bool:
        known = self._repeatable.get(plan.known_as)
        if known is None:
            known = is_same_each_time(frame, plan.paths)
            if len(self._repeatable) >= _MOST_KNOWN:
                self._repeatable.clear()
            self._repeatable[plan.known_as] = known
        return known


def _key_of_engine(engine: pl.Engine) -> Hashable | None:
    """Return what equal engines have in common; None if it is one of the user's own class."""
    if type(engine) not in BUILT_IN_ENGINES:
        return None
    return (type(engine), repr(vars(engine)))


def _key_of(optimizations: pl.QueryOptFlags) -> Hashable:
    if optimizations is DEFAULT_OPTIMIZATIONS:
        return _DEFAULT_FLAGS
    return frozenset(optimization_flags(optimizations).items())


_DEFAULT_FLAGS: Final = frozenset(optimization_flags(DEFAULT_OPTIMIZATIONS).items())
