"""
Flights: one run for all that ask for the same at the same time.

Each asker has a query of its own: with its own state, time-out, events and waiters. None of them is
in a lane. The flight is there for them, a query that no caller sees: it waits in the queue, has the
slot, and runs. Its first asker is its captain: the times and the state of the flight are also those
of this asker, as long as that is one. The others wait until the flight lands, and take no slots.

All of it changes with the lock of the admission held:

- An asker boards, or makes another flight, in the hold in which it has looked for one.
- The last asker that leaves cancels the flight in the same hold, so that none boards it after that.
- A flight and its askers end in the same hold, so that none boards one that has landed, and `close`
  and a fork find either all of them or none.

What follows from these, without the lock, is done for each query as if it had run by itself.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, Final, TypeVar

import polars as pl

from polars_async._runtime.nesting import in_query, on_thread_of_polars
from polars_async._runtime.unpatched import holding
from polars_async.bridges.waiting import wake
from polars_async.scheduling.counts import Counts, State
from polars_async.scheduling.equality import Plans
from polars_async.scheduling.outcome import Outcome
from polars_async.scheduling.query import Query
from polars_async.scheduling.slots import Slot
from polars_async.scheduling.telling import GOES_ON_FOR_OTHERS

if TYPE_CHECKING:
    from _thread import RLock
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from polars_async.bridges.waiting import Waiter
    from polars_async.events import EventKind, Reporter
    from polars_async.executors.operations import Operation
    from polars_async.resolution import Resolution
    from polars_async.scheduling.admission import Admission
    from polars_async.scheduling.equality import Equality
    from polars_async.scheduling.kept import Kept, Results
    from polars_async.scheduling.lane import Lane
    from polars_async.scheduling.query import Owner

T = TypeVar("T")


class Flight(Query[T]):
    """The run that several askers wait for; see the module."""

    __slots__ = (
        "_captain",
        "_first_resolution",
        "_flights",
        "_landed",
        "askers",
        "clears_before",
        "equality",
        "lane",
    )

    def __init__(
        self,
        captain: Query[T],
        operation: Operation[T],
        lane: Lane,
        equality: Equality,
        flights: Flights,
    ) -> None:
        self.askers: dict[Query[T], None] = {}
        self._captain: Query[T] | None = None
        super().__init__(
            operation,
            captain.resolution,
            flights.reporter,
            flights.owner_in(lane),
            priority=captain.priority,
            label=captain.label,
            tags=captain.tags,
            chooser=captain.chooser,
        )
        self.id = captain.id
        self.context = captain.context
        self.call_site = captain.call_site
        self.times = captain.times
        self.reports = captain.reports
        self.lane = lane
        self._captain = captain
        self.equality = equality
        self._first_resolution = captain.resolution
        self._flights = flights
        self.clears_before = flights.clears
        self._landed: list[Query[T]] = []
        # In this order: if a signal handler cancels it in between, it has no flight yet.
        self.askers[captain] = None
        captain.board(self)

    @property
    def may_be_boarded(self) -> bool:
        """Whether one more asker may wait for it, as far as time has not made it unequal."""
        if self.done or not self.askers:
            return False
        return self.equality.is_lasting or self.state is State.WAITING

    @property
    def lanes(self) -> list[Lane]:
        """The lanes in which it may be: the GPU is chosen late, and may be given up."""
        lane = self.lane
        return [each for each in (lane, lane.gpu, lane.fallback) if each is not None]

    def add(self, asker: Query[T]) -> None:
        """Have `asker` wait for it, too, with the lock held."""
        # In this order: a signal handler that comes in between cancels an asker that leaves.
        asker.board(self, shared_with=self.id)
        self.askers[asker] = None
        self.reports = self.reports or asker.reports
        if self.resolution is not self._first_resolution:
            asker.resolution = self.resolution

    def leave(self, asker: Query[T]) -> Callable[[], object] | None:
        """
        Have `asker` wait no more, with the lock held; may be called again.

        If it was the last one, the flight is cancelled. Return what is to be done about that once
        the lock is released, if anything.
        """
        self.askers.pop(asker, None)
        if asker is self._captain:
            asker.times = copy(asker.times)  # the flight goes on
            self._captain = None
        if self.askers:
            return None
        self._flights.forget(self)
        self._cancel(State.CANCELLED)
        return self.cancel  # which finds it cancelled by this thread, and does what follows

    def resolve(self, resolution: Resolution) -> None:
        """See `Query`; a change, such as by a fallback, is one for its askers, too."""
        super().resolve(resolution)
        # Here and below a list, not a tuple: CPython 3.11 may collect garbage between the start of
        # the iteration and the making of a tuple, and a finalizer may cancel one of them.
        for asker in list(self.askers):
            asker.resolution = resolution

    def set_running(self) -> float | None:
        """See `Query`; its captain runs from then on."""
        waited = super().set_running()
        if waited is not None and self._captain is not None:
            self._captain.state = State.RUNNING
        return waited

    def set_rejected(self, error: BaseException) -> None:
        """See `Query`; so are its askers."""
        super().set_rejected(error)
        self.drop_error()
        self._flights.forget(self)
        for asker in list(self.askers):
            asker.set_rejected(error)

    def requeue(
        self,
        operation: Operation[T],
        resolution: Resolution,
        owner: Owner,
        *,
        has_run: bool = True,
    ) -> bool:
        """See `Query`; its captain waits again, too."""
        owner = owner._replace(counts=self._flights.uncounted)
        with self.lock:
            waits = super().requeue(operation, resolution, owner, has_run=has_run)
            if waits and self._captain is not None:
                self._captain.state = State.WAITING
        return waits

    def run(self, run: Callable[[Operation[T], Query[T]], T]) -> None:
        """See `Query`; the result may be kept for later ones."""
        frames = self.frames
        super().run(run)
        if self.state is State.RUNNING:
            self._flights.keep(self, frames)

    @property
    def value(self) -> T | None:
        """What it has returned."""
        return self._outcome.value

    def set_finished(self) -> Iterable[Waiter]:
        """See `Query`; its askers end with it, and the waiters are theirs."""
        waiters = [*super().set_finished()]
        self._flights.forget(self)
        return waiters + self._land()

    def how_it_ends(self, without: Query[Any]) -> str:
        """See `Query`; it goes on unless `without` is the last asker."""
        if any(asker is not without for asker in self.askers):
            return GOES_ON_FOR_OTHERS
        return super().how_it_ends(without)

    def listed(self, state: str) -> dict[Query[Any], str]:
        """See `Query`: those that wait for it, of which its captain is where it is."""
        askers = list(self.askers)
        if not askers:  # all have left, and it has not stopped yet
            return {self: state}
        return {asker: state if asker is self._captain else "waiting" for asker in askers}

    def _land(self) -> list[Waiter]:
        """Give the outcome to the askers, with the lock held; return the waiters to wake."""
        waiters: list[Waiter] = []
        askers = list(self.askers)
        self.askers.clear()
        # Of the frame that one of them may change, no other has the columns.
        several = len(askers) > 1 or self._flights.results is not None
        for asker in askers:
            outcome: Outcome[T] = _Shared(self._outcome) if several else self._outcome
            waiters += asker.land(outcome)
        if self.reports:
            self._landed += askers
        self._captain = None
        self._outcome = Outcome()  # an asker that has left, and whose handle is kept, has this
        return waiters

    def report(
        self, kind: EventKind, *, result: object = None, error: BaseException | None = None
    ) -> None:
        """Emit no event: all are its askers'."""

    def report_end(self) -> None:
        """Emit the last events of its askers."""
        landed, self._landed = self._landed, []
        for asker in landed:
            asker.report_end()

    def announce(self, kind: EventKind, error: BaseException | None = None) -> None:
        """Emit `kind` for its captain, whose run it is."""
        captain = self._captain
        if captain is not None and captain.reports:
            captain.announce(kind, error)

    def cancel(self) -> bool:
        """See `Query`; so are its askers, the last of which takes it along."""
        # It stays in the queue, or its slot, until none of them waits: `close` on another thread
        # would not find those that are left.
        for asker in list(self.askers):
            asker.cancel()
        return super().cancel()


class _Shared(Outcome[T]):
    """
    The outcome of a flight for one of its askers: a frame of its own, and an error of its own.

    Frames can be changed in place, such as by ``df[0, "a"] = 1``, and each ``raise`` changes the
    traceback and the context of an error. A copy of a frame shares its columns, and takes no time.
    """

    __slots__ = ("_own",)

    def __init__(self, outcome: Outcome[T]) -> None:
        super().__init__()
        self.value = outcome.value
        if outcome.error is not None:
            self.fail(_copy_of(outcome.error), outcome.traceback)
        self._own: dict[str, Any] = {}

    def drop(self) -> None:
        super().drop()
        self._own = {}

    def take(self) -> T:
        try:
            if self.error is None:
                if "value" not in self._own:  # two threads may come here at once, and get the same
                    self._own.setdefault("value", _own(self.value))
                own: T = self._own["value"]
                return own
            return super().take()
        finally:
            del self  # see Outcome.take


def _own(value: Any) -> Any:
    """Return `value` with frames of its own, which share their columns with it."""
    if isinstance(value, pl.DataFrame):
        return value.clone()
    return [each.clone() for each in value] if isinstance(value, list) else value


def _copy_of(error: BaseException) -> BaseException:
    """Return a copy of `error`, or `error` itself where its class has no way to copy it."""
    try:
        own = copy(error)
        if type(own) is not type(error) or str(own) != str(error):
            return error
        own.__cause__, own.__context__ = error.__cause__, error.__context__
        own.__suppress_context__ = error.__suppress_context__
        if hasattr(error, "__notes__"):
            own.__notes__ = list(error.__notes__)
    except Exception:  # noqa: BLE001  # the class of any library or user
        return error
    return own


class Flights:
    """The flights of one collector, and the results of earlier ones, if it keeps any."""

    def __init__(self, reporter: Reporter, lock: RLock, results: Results | None) -> None:
        self.reporter: Final = reporter
        self.uncounted: Final = Counts()
        """Of the flights themselves, which are not queries of callers."""
        self._owners: dict[Lane, Owner] = {}
        self.results: Final = results
        self._lock = lock
        self._plans: Final = Plans()
        self._by_key: dict[Hashable, Flight[Any]] = {}
        self._in_air: dict[Flight[Any], None] = {}
        self.shared = 0
        """How many queries have waited for the run of another; changes with the lock held."""
        self.from_results = 0
        """How many have had a result that was kept; changes likewise."""
        self.clears = 0
        """How often results were dropped: one of a run from before is not to be kept after that."""

    def admit(self, lane: Lane, query: Query[Any]) -> Slot | BaseException | None:
        """
        Admit `query` to `lane`, unless it boards a flight, or its result is there.

        Return as `Lane.admit`. A query that a running one has submitted does not board: the flight
        might wait for the slot of that one, which waits for the flight.
        """
        operation = query.operation
        if operation is None or in_query() or on_thread_of_polars():
            return lane.admit(query)
        is_idle = not lane.admission.threads
        equality = self._plans.equality_of(operation, query.resolution.name, is_idle=is_idle)
        if equality is None:
            return lane.admit(query)
        if self.results is not None and equality.is_lasting:
            kept = self.results.get(equality.key)
            if kept is not None and self._end_with(kept, query, lane):
                return None
        flight = self._by_key.get(equality.key)
        if flight is not None and not flight.done:
            if not self._plans.are_repeatable(equality, query.frames):
                return lane.admit(query)
            before = flight.priority
            if holding(self._lock, self._board, flight, query, lane):
                if flight.priority != before:
                    for each in flight.lanes:
                        each.use_idle_slots()
                return None
        return lane.admit(Flight(query, operation, lane, equality, self), then=self._take_off)

    def owner_in(self, lane: Lane) -> Owner:
        """Return what owns a flight in `lane`: its admission, but for the counts."""
        owner = self._owners.get(lane)
        if owner is None:
            owner = lane.admission.owner._replace(counts=self.uncounted)
            self._owners[lane] = owner
        return owner

    def forget(self, flight: Flight[Any]) -> None:
        """Have no one board `flight` any more, with the lock held; may be called again."""
        self._in_air.pop(flight, None)
        key = flight.equality.key
        if self._by_key.get(key) is flight:
            del self._by_key[key]

    def keep(self, flight: Flight[Any], frames: Sequence[pl.LazyFrame]) -> None:
        """Keep the result of `flight`, which has run, if that is known to last."""
        results = self.results
        if results is None or flight.error is not None or not flight.equality.is_lasting:
            return
        if not self._may_keep(flight) or not self._plans.are_repeatable(flight.equality, frames):
            return
        results.put(flight.equality.key, flight.value, flight.resolution, flight.id)
        if not self._may_keep(flight):  # another thread may have dropped all before this was here
            results.discard(flight.equality.key)

    def _may_keep(self, flight: Flight[Any]) -> bool:
        return flight.clears_before == self.clears and not flight.lane.admission.closed

    def sharing(self) -> int:
        """Return how many queries wait for the runs of others, with the lock held."""
        return sum([len(flight.askers) - (not flight.done) for flight in list(self._in_air)])

    def as_stats(self) -> dict[str, float]:
        """Return the counts under the names that `Collector.stats` has for them."""
        results = self.results
        return {
            "shared": self.shared,
            "from_cache": self.from_results,
            "cached": 0 if results is None else len(results),
            "cached_bytes": 0 if results is None else results.size,
        }

    def clear(self) -> None:
        """Drop all results that are kept, and those of queries that were submitted before."""
        self.clears += 1
        if self.results is not None:
            self.results.clear()

    def _take_off(self, flight: Flight[Any]) -> None:
        """Let equal queries board `flight`, which was admitted, with the lock held."""
        self._in_air[flight] = None
        self._by_key[flight.equality.key] = flight

    def _board(self, flight: Flight[Any], query: Query[Any], lane: Lane) -> bool:
        """Have `query` board `flight`, with the lock held; return False if it is too late."""
        if lane.admission.closed or not flight.may_be_boarded:
            return False
        flight.add(query)
        self.shared += 1
        lane.admission.counts.downgraded += query.resolution.downgraded
        if query.priority > flight.priority:
            for each in flight.lanes:
                each.admission.raise_priority(flight, query.priority)
        return True

    def _end_with(self, kept: Kept, query: Query[Any], lane: Lane) -> bool:
        """Have `query` end with a result that is kept; return False if `lane` is closed."""
        admission = lane.admission
        slot = Slot(inline=True)
        waiters: list[Waiter] = []
        try:
            if not holding(self._lock, self._hand_out, kept, query, admission, slot, waiters):
                return False
            # As with a query that runs inline: all is told before the slot is free, for which
            # `close` waits.
            query.report_end()
            self._after_hand_out(query, admission, slot, waiters)
        except BaseException:  # out of a signal handler, or Ctrl-C in a hook
            self._after_hand_out(query, admission, slot, waiters)
            raise
        return True

    def _hand_out(
        self,
        kept: Kept,
        query: Query[Any],
        admission: Admission,
        slot: Slot,
        waiters: list[Waiter],
    ) -> bool:
        """
        Give `query` a result that is kept, with the lock held; return False if it is closed.

        Take `slot` if there is an event to emit. Add the waiters to wake: a query that is admitted
        late may have some.
        """
        if admission.closed:
            return False
        if query.reports:
            admission.take_inline(query, slot)
        outcome: Outcome[Any] = Outcome()
        outcome.value = kept.value
        if (
            query.resolution.name != kept.resolution.name
        ):  # another engine has run it than asked for
            query.resolution = kept.resolution
        self.from_results += 1
        admission.counts.downgraded += query.resolution.downgraded
        query.board(None, shared_with=kept.query_id, from_cache=True)
        waiters += query.land(_Shared(outcome))
        return True

    def _after_hand_out(
        self, query: Query[Any], admission: Admission, slot: Slot, waiters: list[Waiter]
    ) -> None:
        """Free the slot of `query`, and wake all who wait for that; may be done again."""
        holding(self._lock, admission.end_inline, query, slot)
        wake(waiters)
        if admission.waiters:
            admission.wake_if_empty()
