"""What a query does on its thread: data that can be sent elsewhere, or changed for a fallback."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from types import CodeType, CoroutineType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Protocol, TypeVar, cast

import polars as pl

from polars_async._runtime.upstream import without_warning
from polars_async.gpu.failure import GpuFailure
from polars_async.gpu.offload import collect_on_gpu, is_wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from polars_async.bridges.buffer import Buffer

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_sink_batches: Final[Callable[..., pl.LazyFrame]] = without_warning(pl.LazyFrame.sink_batches)
_GPU_BATCH: Final = 100_000
"""Rows of a batch of a result from the GPU, if the caller names no chunk size."""


class Operation(Protocol[T_co]):
    """What to do for one query. It is pickled by its fields, for other processes."""

    name: ClassVar[str]
    """As for `QueryEvent.operation`."""
    runs_engine: ClassVar[bool]
    """Whether an engine runs it, as for all but a schema and a function."""

    @property
    def frames(self) -> Sequence[pl.LazyFrame]:
        """The frames to collect."""
        ...

    def __call__(self) -> T_co:
        """Run it on the calling thread, and return the result."""
        ...


# Fields are final for type checkers: frozen ones cost each query half a microsecond at run time.
@dataclass(slots=True, eq=False)
class Collect:
    """Collect one frame."""

    name: ClassVar = "collect"
    runs_engine: ClassVar = True

    frame: Final[pl.LazyFrame]
    engine: Final[pl.Engine]
    optimizations: Final[pl.QueryOptFlags]

    @property
    def frames(self) -> Sequence[pl.LazyFrame]:
        """The frames to collect."""
        return (self.frame,)

    def __call__(self) -> pl.DataFrame:
        """Return the result."""
        return _collect(self.frame, self.engine, self.optimizations)


@dataclass(slots=True, eq=False)
class CollectAll:
    """Collect frames as one query, or one by one on an engine that has no other way."""

    name: ClassVar = "collect_all"
    runs_engine: ClassVar = True

    all_frames: Final[Sequence[pl.LazyFrame]]
    engine: Final[pl.Engine]
    optimizations: Final[pl.QueryOptFlags]
    collected: Final[Mapping[int, pl.DataFrame]] = field(default_factory=dict)
    """The results that a failed GPU query has left, by the positions of their frames."""

    @property
    def frames(self) -> Sequence[pl.LazyFrame]:
        """The frames to collect."""
        if not self.collected:
            return self.all_frames
        return [
            frame for number, frame in enumerate(self.all_frames) if number not in self.collected
        ]

    def __call__(self) -> list[pl.DataFrame]:
        """Return the results in the order of the frames."""
        frames, engine, optimizations = list(self.frames), self.engine, self.optimizations
        if isinstance(engine, pl.GPUEngine):
            return _collect_each_on_gpu(frames, engine, optimizations)
        if type(engine).collect_all is pl.Engine.collect_all:
            results = [engine.collect(frame, optimizations=optimizations) for frame in frames]
        else:
            results = pl.collect_all(frames, engine=engine, optimizations=optimizations)
        for number, frame in sorted(self.collected.items()):
            results.insert(number, frame)
        return results


@dataclass(slots=True, eq=False)
class Sink:
    """Run a sink, whose result is an empty frame."""

    name: ClassVar = "sink"
    runs_engine: ClassVar = True

    sink: Final[pl.LazyFrame]
    engine: Final[pl.Engine]
    optimizations: Final[pl.QueryOptFlags]

    @property
    def frames(self) -> Sequence[pl.LazyFrame]:
        """The frames to collect."""
        return (self.sink,)

    def __call__(self) -> None:
        """Run the sink."""
        _collect(self.sink, self.engine, self.optimizations)


@dataclass(slots=True, eq=False)
class Schema:
    """Resolve the schema of a frame."""

    name: ClassVar = "schema"
    runs_engine: ClassVar = False

    frame: Final[pl.LazyFrame]

    @property
    def frames(self) -> Sequence[pl.LazyFrame]:
        """The frame whose schema to resolve."""
        return (self.frame,)

    def __call__(self) -> pl.Schema:
        """Return the schema."""
        return self.frame.collect_schema()


@dataclass(slots=True, eq=False)
class Run(Generic[T]):
    """Call a function of the caller's."""

    name: ClassVar = "run"
    runs_engine: ClassVar = False

    function: Callable[..., T]  # never changed: mypy takes none with a type variable for final
    args: Final[tuple[Any, ...]]

    @property
    def frames(self) -> Sequence[pl.LazyFrame]:
        """No frames: what the function collects is its own business."""
        return ()

    @property
    def fingerprint(self) -> int:
        """The same for all calls of the function, whatever its arguments."""
        function: Any = self.function
        while isinstance(function, partial):
            function = function.func
        code = getattr(function, "__code__", None)  # several lambdas may have the same name
        line = code.co_firstlineno if isinstance(code, CodeType) else 0
        named = function if hasattr(function, "__qualname__") else type(function)
        return hash(("function", named.__module__, named.__qualname__, line))

    def __call__(self) -> T:
        """Return what the function returns."""
        try:
            result = self.function(*self.args)
        finally:
            del self  # an error's traceback holds this frame, and so would hold the arguments
        if isinstance(result, CoroutineType):
            result.close()
            raise async_function_error("what the function returned is a coroutine")
        return result


def async_function_error(why: str) -> TypeError:
    """Return the error for a function whose calls only make coroutines."""
    return TypeError(
        f"run() takes a function that blocks, and {why}: await it in your task, or give run() the "
        "blocking part of it"
    )


@dataclass(slots=True, eq=False)
class Batches:
    """
    Collect one frame into a buffer, batch by batch.

    By a sink, which calls `put` during a synchronous query, and not by Polars' own
    ``collect_batches``, which loses panics.
    """

    name: ClassVar = "batches"
    runs_engine: ClassVar = True

    frame: Final[pl.LazyFrame]
    engine: Final[pl.Engine]
    optimizations: Final[pl.QueryOptFlags]
    buffer: Final[Buffer]
    chunk_size: Final[int | None]
    maintain_order: Final[bool]

    @property
    def frames(self) -> Sequence[pl.LazyFrame]:
        """The frames to collect."""
        return (self.frame,)

    def __call__(self) -> int:
        """Put the batches into the buffer, and return the number of their rows."""
        if isinstance(self.engine, pl.GPUEngine):
            return self._feed_from_gpu(self.engine)
        rows = 0
        target: Buffer | None = self.buffer

        def put(batch: pl.DataFrame) -> bool:
            nonlocal rows
            rows += batch.height
            return target is None or target.put(batch)

        try:
            # Any engine is named, so that Polars does not look for an affinity: it is resolved.
            plan = _sink_batches(
                self.frame,
                put,
                lazy=True,
                engine="in-memory",
                chunk_size=self.chunk_size,
                maintain_order=self.maintain_order,
            )
            self.engine.collect(plan, optimizations=self.optimizations)
        finally:
            # An error's traceback holds the plan, and the plan holds `put`, where the garbage
            # collector does not look: the query, which holds the error, would never be freed.
            target = None
            del self  # it holds the buffer, too
        return rows

    def _feed_from_gpu(self, engine: pl.GPUEngine) -> int:
        """Put the whole result into the buffer, since the GPU engine has no sink of batches."""
        frame = collect_on_gpu(self.frame, engine, self.optimizations)
        for batch in frame.iter_slices(self.chunk_size or _GPU_BATCH):
            self.buffer.add(batch)
        return frame.height


def on_engine(
    operation: Callable[[], T],
    engine: pl.Engine,
    collected: Mapping[int, pl.DataFrame] | None = None,
) -> Operation[T]:
    """Return `operation` for another engine, without the frames that are `collected` already."""
    changed: object
    if isinstance(operation, CollectAll) and collected is not None:
        changed = replace(operation, engine=engine, collected=collected)
    else:
        assert isinstance(operation, (Collect, CollectAll, Sink, Batches))
        changed = replace(operation, engine=engine)
    return cast("Operation[T]", changed)


def _collect(lf: pl.LazyFrame, engine: pl.Engine, optimizations: pl.QueryOptFlags) -> pl.DataFrame:
    # First the test that takes no time: the other one is of an abstract class, and takes 0.4 us.
    if type(engine) is not pl.InMemoryEngine and isinstance(engine, pl.GPUEngine):
        return collect_on_gpu(lf, engine, optimizations)
    return engine.collect(lf, optimizations=optimizations)


def _collect_each_on_gpu(
    frames: list[pl.LazyFrame], engine: pl.GPUEngine, optimizations: pl.QueryOptFlags
) -> list[pl.DataFrame]:
    """Collect `frames` one by one; raise an error with the results if some are left for the CPU."""
    found: dict[int, pl.DataFrame] = {}
    failure: GpuFailure | None = None
    for number, frame in enumerate(frames):
        if not is_wanted():
            break
        try:
            found[number] = collect_on_gpu(frame, engine, optimizations, counts=failure is None)
        except GpuFailure as caught:
            failure = failure or caught
    if failure is None:
        return list(found.values())
    failure.partial_results = found
    failure.remaining = f"{len(frames) - len(found)} of {len(frames)} frames"
    raise failure
