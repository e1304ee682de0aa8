"""
How much memory the queries of a collector may take together: a policy without clock or threads.

A query starts if what is taken, and what those that run are expected to take in the end, leave room
for what it is expected to take itself. Polars cannot wait for memory within a query: two that wait
for each other would do so for ever. So a query that no others run beside starts in any case.
"""

from __future__ import annotations

from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import ref

from polars_async._runtime.fork import new_lock
from polars_async._runtime.frames import frames_of, size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import polars as pl

    from polars_async.scheduling.sizes import Load

_OF_FRAMES: Final = 5
"""How many times the size of the frames that it reads a query is expected to take, at first."""
_OF_FILES: Final = 8
"""The same of files, which may be compressed."""
_SMALL: Final = 64
"""A query that takes less than this part of the limit goes on when there is no room, if it is quick
as well."""
_LEAST: Final = 1 << 20
"""Bytes of a result from which on it is minded while it lives; and what any query that runs counts
for where the growth of the process is put down to several."""
_ALLOCATED: Final = 4e9
"""Bytes per second that one processor may fill at most."""
_LEAST_OF_UNKNOWN: Final = 8
"""A query that was unknown when it started counts for this part of the limit at least."""
_RISE_OF_UNKNOWN: Final = 4
"""How many times what it has taken so far such a query may take in the end."""
_MARGIN: Final = 1.1
_MOST_KNOWN: Final = 4096


class Taker(Protocol):
    """The slot of a query that takes memory."""

    load: Load
    alone: bool
    """Whether no other query has run since it started."""
    used_before: int
    """The bytes that were taken in all when it started."""
    peak: int | None
    """Bytes that it took at its peak, so far; None if that was not measured."""


class Memory:
    """
    The memory of one collector: its limit in bytes, and what is known of how it is used.

    `held` returns what Polars has allocated in this process, in no time. `measure` sets what else
    is taken: by the rest of this process, and by worker processes.

    What is learned has a lock of its own. All else is guarded by that of the admission, but for
    `measure`, which one thread at a time may call.
    """

    def __init__(self, limit: int, held: Callable[[], int]) -> None:
        self.limit: Final = limit
        self.small: Final = limit // _SMALL
        self._held: Final = held
        self._rests: list[int] = []
        self._rest = 0
        self._idle = 0
        self._kept: dict[int, tuple[ref[pl.DataFrame], int]] = {}
        self._lock = new_lock()
        self._learned: dict[int, int] = {}

    @property
    def used(self) -> int:
        """The bytes that are taken now."""
        return self._held() + self._rest

    @property
    def _base(self) -> int:
        """What is taken by all but the queries that run: by the program, and by their results."""
        return min(self._idle + self._results, self.used)

    @property
    def _results(self) -> int:
        """What the results take that live, as far as they are minded."""
        return sum(size for _, size in list(self._kept.values()))

    def measure(self, here: int, elsewhere: int, *, most: int = 20) -> None:
        """
        Note that this process takes so many bytes now, and worker processes so many for themselves.

        0 bytes for this process say that it is not known: not on this system, or not just now.
        Polars' allocator gives back what is freed within two seconds. So of the last `most`
        measurements the one counts that has least beside what Polars held.
        """
        if here:
            self._rests.append(max(0, here - self._held()))
            del self._rests[:-most]
        self._rest = min(self._rests, default=0) + elsewhere

    def is_small(self, load: Load) -> bool:
        """Return whether a query with this load goes on whatever the others take."""
        return load.is_small and load.memory <= self.small

    def are_small(self, running: Iterable[Taker]) -> bool:
        """Return whether all that run go on whatever others take, and have not taken much yet."""
        before = self.used - self.small
        return all(self.is_small(slot.load) and slot.used_before >= before for slot in running)

    def left(self, running: Sequence[Taker]) -> float:
        """Return how many bytes the next query may take beside the `running` ones."""
        if self.are_small(running):
            return inf
        expected = self._base + sum(slot.load.memory for slot in running)
        return self.limit - max(self.used, expected)

    def note_start(self, slot: Taker, *, alone: bool) -> None:
        """Note that a query starts in `slot`, beside none but small ones if it is `alone`."""
        slot.peak, slot.used_before = None, self.used
        if alone:
            self._idle = max(0, slot.used_before - self._results)

    def sample(self, slots: Sequence[Taker]) -> None:
        """Put down what is taken now to the queries in `slots`, which run."""
        used = self.used
        growth = used - self._base
        expected = sum(max(_LEAST, slot.load.memory) for slot in slots)
        for slot in slots:
            taken = growth * max(_LEAST, slot.load.memory) // expected
            if slot.alone:
                taken = used - slot.used_before
            slot.peak = max(slot.peak or 0, taken, 0)

    def keep(self, result: object, *, most: int | None = None) -> int:
        """
        Count `result` as long as it lives, if it is a large frame, or a list of such frames.

        Return how many bytes these are, of the `most` that its query may have filled: the rest it
        has in common with frames that were there before.
        """
        kept = 0
        for frame in frames_of(result):
            if (size := size_of(frame)) >= _LEAST:
                # Called by any thread, and within the garbage collector: so without a lock.
                forget = partial(_forget, self._kept, id(frame))
                own = size if most is None else min(size, most - kept)
                self._kept[id(frame)] = ref(frame, forget), own
                kept += own
        return kept

    def guess(self, frame_bytes: int, file_bytes: int) -> int:
        """Return how many bytes a query takes that makes no more than usual of what it reads."""
        return _OF_FRAMES * frame_bytes + _OF_FILES * file_bytes

    def need(self, fingerprint: int | None, frame_bytes: int, file_bytes: int | None) -> int:
        """
        Return how many bytes a query is expected to take at its peak.

        That is what its like took, or else a guess by what it reads: by `file_bytes` in files, or
        None if that tells too little. Of queries that may be large by that, only one has room at a
        time, until one of its like is done.
        """
        learned = None if fingerprint is None else self._learned.get(fingerprint)
        if learned is not None:
            return int(_MARGIN * learned)
        cautious = self.limit // 2 + 1
        guess = self.guess(frame_bytes, file_bytes or 0)
        is_small = file_bytes is not None and 0 < guess <= self.small
        return guess if is_small else max(guess, cautious)

    def knows(self, fingerprint: int | None) -> bool:
        """Return whether what queries with this fingerprint take was learned."""
        return fingerprint in self._learned

    def by_what_it_took(self, taken: int) -> int:
        """Return what a query counts for that was unknown, and has `taken` so many bytes so far."""
        return max(self.limit // _LEAST_OF_UNKNOWN, _RISE_OF_UNKNOWN * taken)

    def most_within(self, seconds: float, processors: float) -> int:
        """Return how many bytes a query may have filled in so many seconds."""
        return int(_ALLOCATED * seconds * processors)

    def of_its_like(self, load: Load) -> int:
        """
        Return what was learned for a query to have this load.

        Without the margin: what is not measured must not let the next ones rise by it again and
        again.
        """
        return int(load.memory / _MARGIN)

    def learn(self, fingerprint: int, taken: int, *, completed: bool) -> int:
        """
        Learn that a query took so many bytes at its peak; return what its like will need.

        One that was not `completed` would have taken more, or as much.
        """
        with self._lock:
            before = self._learned.pop(fingerprint, None)
            if before is not None and (taken < before or not completed):
                taken = max(taken, before if not completed else (before + taken) // 2)
            if before is not None or completed:
                self._learned[fingerprint] = taken
            if len(self._learned) > _MOST_KNOWN:
                del self._learned[next(iter(self._learned))]
        return int(_MARGIN * taken)


def _forget(kept: dict[int, Any], key: int, _frame: object) -> None:
    kept.pop(key, None)
