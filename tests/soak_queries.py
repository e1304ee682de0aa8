"""The queries of the soak test: each knows which outcomes are right."""

from __future__ import annotations

import atexit
import io
import shutil
import tempfile
import time
import weakref
from functools import partial
from pathlib import Path
from typing import NamedTuple

import polars as pl
from soak_loops import Outcome, blocked

import polars_async as pa
from polars_async._runtime.unpatched import RLock, SimpleQueue


class Gate:
    """An event for real threads; a query that nobody lets go on fails."""

    def __init__(self):
        self._keys = SimpleQueue()

    def open(self):
        self._keys.put(None)

    def wait(self):
        self._keys.get(timeout=60)
        self._keys.put(None)


class OwnFault(BaseException):
    pass


class Plan(NamedTuple):
    """A query, and whether an outcome, which is a value or an error, is right."""

    lf: object
    is_right: object
    name: str


def tiny(rng):
    number = rng.randrange(1000)
    lf = pl.LazyFrame({"a": [number, number + 1]}).select(pl.col("a").sum())
    return Plan(lf, partial(gives, 2 * number + 1), "tiny")


def few(rng):
    """Make one of few queries, so that many are equal; it takes a while."""
    number = rng.randrange(4)
    lf = pl.LazyFrame({"a": range(1000)}).join(pl.LazyFrame({"b": range(30)}), how="cross")
    lf = lf.select((pl.col("a") * pl.col("b")).sort().last() + number)
    return Plan(lf, partial(gives, 999 * 29 + number), "few")


def medium(rng):
    number = rng.randrange(1000)
    lf = Frames.medium.lazy().group_by("g").agg(pl.col("a").sum())
    lf = lf.select(pl.col("a").sum() + number)
    return Plan(lf, partial(gives, Frames.medium_sum + number), "medium")


def heavy(rng):
    number = rng.randrange(1000)
    lf = Frames.heavy.lazy().sort("a").select(pl.col("a").last() + number)
    return Plan(lf, partial(gives, Frames.heavy_last + number), "heavy")


def scanned(rng):
    """Read a file that changes: what is read is no older than the query."""
    least = Frames.version(changes=rng.random() < 0.5)
    lf = pl.scan_csv(Frames.path, schema={"a": pl.Int64}, has_header=False)
    return Plan(lf, partial(gives_at_least, least), "scanned")


def sleepy(rng):
    plan, seconds = tiny(rng), rng.choice([0, 0.001, 0.005, 0.02])

    def sleep(df):
        time.sleep(seconds)
        return df

    return Plan(plan.lf.map_batches(sleep), plan.is_right, "sleepy")


def failing(rng):
    kinds = [ValueError, KeyboardInterrupt, SystemExit, StopIteration, OwnFault]
    kind = rng.choice([*kinds, StopAsyncIteration, GeneratorExit])
    # Made anew: one that the query held would hold, by its traceback, all who waited for it.
    token, seconds = rng.random(), rng.choice([0, 0, 0.005])

    def fail(_):
        time.sleep(seconds)
        raise kind(token)

    return Plan(tiny(rng).lf.map_batches(fail), partial(fails_with, kind, token), kind.__name__)


def failing_inside(rng):
    def fail(_):
        raise KeyboardInterrupt

    lf = pl.LazyFrame({"a": [1, 2]}).select(pl.col("a").map_batches(fail))
    right = partial(fails_as, "InvalidOperationError", "ComputeError")
    return Plan(lf if rng.random() < 0.5 else lf.select("a"), right, "UDF of an expression")


def missing(rng):
    return Plan(tiny(rng).lf.select("nope"), partial(fails_as, "ColumnNotFoundError"), "missing")


def panic(_):
    lf = pl.LazyFrame({"a": [1]}).select(pl.int_range(0, 2**62))
    return Plan(lf, partial(fails_as, "PanicException"), "panic")


def gives(number, outcome):
    frame = outcome.what
    return outcome.kind == "value" and frame.shape == (1, 1) and frame.item() == number


def gives_at_least(number, outcome):
    frame = outcome.what
    return outcome.kind == "value" and frame.shape == (1, 1) and frame.item() >= number


def fails_with(kind, token, outcome):
    error = outcome.what
    return outcome.kind == "error" and type(error) is kind and error.args == (token,)


def fails_as(*names_and_outcome):
    *names, outcome = names_and_outcome
    return outcome.kind == "error" and type(outcome.what).__name__ in names


class Frames:
    """What the larger queries read; made once."""

    @classmethod
    def make(cls):
        cls.medium = pl.select(
            a=pl.int_range(100_000), g=pl.int_range(100_000) * 7919 % 5000
        ).with_columns(pl.col("g").cast(pl.Int32))
        cls.medium_sum = sum(range(100_000))
        cls.heavy = pl.select(a=pl.int_range(1_000_000) * 7919 % 1_000_003)
        cls.heavy_last = cls.heavy["a"].max()
        cls.path = Path(tempfile.mkdtemp(prefix="soak-read")) / "version"
        atexit.register(shutil.rmtree, cls.path.parent)
        cls.lock, cls.number, cls.changed = RLock(), 10**6, -1.0
        cls.version(changes=True)

    @classmethod
    def version(cls, *, changes):
        """Give the number that the file has, or write the next one, if the last is old enough."""
        with cls.lock:
            if changes and time.monotonic() > cls.changed + 0.15:  # else its state is not known
                cls.changed = time.monotonic()
                new = cls.path.with_suffix(".new")
                new.write_text(f"{cls.number + 1}\n")
                new.replace(cls.path)
                cls.number += 1
            return cls.number


def all_right(plans, outcome):
    if outcome.kind != "value":
        return any(plan.is_right(outcome) for plan in plans)
    whole = zip(plans, outcome.what, strict=True)
    return all(plan.is_right(Outcome("value", frame)) for plan, frame in whole)


def schema_right(is_right, outcome):
    return outcome.what == {"a": pl.Int64} if outcome.kind == "value" else is_right(outcome)


FAULTS = [failing, failing_inside, missing]


def any_of(rng, *, mostly_tiny, nested_in=None):
    makers = {tiny: 45, few: 20, scanned: 25, medium: 12, heavy: 2, sleepy: 15, panic: 1, nested: 6}
    makers |= dict.fromkeys(FAULTS, 6)
    if mostly_tiny:
        makers |= {tiny: 300, heavy: 0.5}
    if nested_in is None:
        del makers[nested]
    maker = rng.choices(list(makers), list(makers.values()))[0]
    return nested(rng, nested_in) if maker is nested else maker(rng)


def sink(rng, folder):
    plan = rng.choice([tiny, tiny, sleepy, failing, missing])(rng)
    path = folder / f"{rng.random()}"
    kind = rng.choice(["csv", "parquet", "ipc", "ndjson"])
    lf = getattr(plan.lf, f"sink_{kind}")(path, lazy=True)

    def is_right(outcome):
        if outcome.kind != "value":
            return plan.is_right(outcome)
        frame = getattr(pl, f"read_{kind}")(io.BytesIO(path.read_bytes()))
        path.unlink()
        return outcome.what is None and plan.is_right(Outcome("value", frame))

    return Plan(lf, is_right, "sink")


def nested(rng, book):
    """Make a query that asks the same collector, and maybe waits for it."""
    inner = tiny(rng)
    way = rng.choice(["wait", "wait", "drop", "cancel"])
    known = weakref.ref(book)  # Polars' plan holds the UDF, where no garbage collector looks

    def udf(df):
        book = known()
        collector = book.collector
        if collector is None:
            return df
        with book.lock:
            book.submitted += 1
        try:
            handle = collector.collect_async(inner.lf, label="inner")
        except pa.CollectorClosedError as error:
            book.refused(None, error)
            raise
        if way == "cancel":
            handle.cancel()
        outcome = blocked(handle) if way == "wait" else None
        if outcome is not None and not inner.is_right(outcome):
            book.soak.violated(None, f"nested: {outcome}")
        return df

    plan = tiny(rng)
    return Plan(plan.lf.map_batches(udf), plan.is_right, "nested")


def closing(book, options):
    """Make a query that closes its collector, and cannot wait for that."""
    collector, violated = weakref.ref(book.collector), book.soak.violated

    def udf(df):
        try:
            collector().close()
        except RuntimeError:
            collector().close(wait=False, **options)
        else:
            violated(None, "close() in a UDF waited")
        return df

    return pl.LazyFrame({"a": [1]}).map_batches(udf)
