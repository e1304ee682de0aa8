"""
A mix of queries of five sizes over frames in memory, and requests for them that keep coming.

The sizes take about 0.1, 1, 8, 60 and 350 ms alone, of 100 requests 60, 20, 12, 6 and 2 are for
them, and each has two shapes: two kinds of queries, of as many rows as take that long on the
in-memory engine of two processors.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from benchmarks.measure.open_loop import latencies, moments
from benchmarks.measure.workloads import frame, quantile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from benchmarks.measure.open_loop import Submit

    Kind = Callable[[pl.LazyFrame, int], pl.LazyFrame]

PARTS: Final = (("p50", 0.5), ("p95", 0.95))
"""The quantiles of each size that are measured."""
_ALONE: Final = 0.05
"""Seconds for which a shape runs alone again and again, at least."""
_TIMES: Final = 3
"""How often it does so at least."""


def _filtered(source: pl.LazyFrame, number: int) -> pl.LazyFrame:
    return source.filter(pl.col("left") > number).select(pl.col("right").sum())


def _few_groups(source: pl.LazyFrame, number: int) -> pl.LazyFrame:
    return _grouped(source, 1000 + number)


def _many_groups(source: pl.LazyFrame, number: int) -> pl.LazyFrame:
    return _grouped(source, 1_000_000 + number)


def _grouped(source: pl.LazyFrame, groups: int) -> pl.LazyFrame:
    keys = (pl.col("left") % groups).alias("key")
    return source.group_by(keys).agg(pl.col("right").sum(), pl.col("number").max())


def _sorted(source: pl.LazyFrame, number: int) -> pl.LazyFrame:
    return source.sort(pl.col("left") + number)


def _joined(source: pl.LazyFrame, number: int) -> pl.LazyFrame:
    other = source.select(left=pl.col("right"), other=pl.col("number") + number)
    return source.join(other, on="left").select(pl.col("other").sum())


@dataclass(frozen=True)
class _Size:
    """One size: its requests among a hundred, and its kinds of queries with their rows."""

    share: int
    rows: Mapping[Kind, int]


_SIZES: Final[Mapping[str, _Size]] = {
    "tiny": _Size(60, {_filtered: 30_000, _few_groups: 1_500}),
    "small": _Size(20, {_few_groups: 110_000, _joined: 70_000}),
    "medium": _Size(12, {_sorted: 300_000, _few_groups: 900_000}),
    "large": _Size(6, {_joined: 1_100_000, _sorted: 1_900_000}),
    "huge": _Size(2, {_many_groups: 7_000_000, _joined: 5_500_000}),
}
SIZES: Final = tuple(_SIZES)
"""The names of the sizes, from the smallest to the largest."""
HUNDRED: Final = sum(size.share for size in _SIZES.values())


@dataclass(frozen=True, eq=False)
class _Shape:
    """The queries of one size and kind, over the same frame; no two are equal."""

    size: str
    kind: Kind
    source: pl.LazyFrame

    def query(self, number: int) -> pl.LazyFrame:
        return self.kind(self.source, number)

    def alone(self, engine: Any) -> float:
        """Return the median of the seconds that Polars takes for it while nothing else runs."""
        self.query(0).collect(engine=engine)
        seconds: list[float] = []
        while len(seconds) < _TIMES or sum(seconds) < _ALONE:
            query = self.query(len(seconds))
            begun = time.perf_counter()
            query.collect(engine=engine)
            seconds.append(time.perf_counter() - begun)
        return median(seconds)


def _shapes(scale: float) -> list[_Shape]:
    return [
        _Shape(name, kind, frame(int(scale * rows)).collect().lazy())
        for name, size in _SIZES.items()
        for kind, rows in size.rows.items()
    ]


def capacity(scale: float) -> float:
    """
    Return how many requests of the mix could be answered in a second, one after the other.

    That is one over the mean time alone of the mix, on Polars' in-memory engine: the same for all
    contenders, so that they answer the same requests. Engines that are faster alone, and work that
    leaves a processor to others, are what may be gained beyond it.

    Parameters
    ----------
    scale
        What the rows of all frames are multiplied by; 1 for the sizes above.
    """
    seconds = {
        name: fmean(shape.alone("in-memory") for shape in _shapes(scale) if shape.size == name)
        for name in SIZES
    }
    return HUNDRED / sum(size.share * seconds[name] for name, size in _SIZES.items())


async def serve(
    submit: Submit, engines: Sequence[str], rate: float, requests: int, scale: float
) -> dict[str, float]:
    """
    Submit `requests` queries of the mix at random moments, `rate` a second; return the figures.

    Those are `PARTS` of the latencies of each size in ms, and the mean slowdown: a latency by the
    time that Polars takes for the same shape alone, on the fastest of `engines`, measured here
    before. `requests` is a multiple of a hundred, and of each hundred every size has its share.
    """
    shapes = _shapes(scale)
    alone = {shape: min(map(shape.alone, engines)) for shape in shapes}
    for shape in shapes:
        await submit(shape.query(0))  # starts threads, and shows the shapes
    order = list(_order(shapes, requests))
    queries = [shape.query(number) for number, shape in enumerate(order)]
    found = await latencies(submit, zip(moments(rate), queries, strict=False))
    return _figures(order, found, alone)


def _order(shapes: Sequence[_Shape], requests: int) -> Iterator[_Shape]:
    generator = random.Random(0)  # noqa: S311  # no secret, and the same for all
    for _ in range(requests // HUNDRED):
        hundred = [
            kinds[number % len(kinds)]
            for name, size in _SIZES.items()
            for kinds in [[shape for shape in shapes if shape.size == name]]
            for number in range(size.share)
        ]
        generator.shuffle(hundred)
        yield from hundred


def _figures(
    order: Sequence[_Shape], seconds: Sequence[float], alone: Mapping[_Shape, float]
) -> dict[str, float]:
    found = {
        "mean slowdown": fmean(
            latency / alone[shape] for shape, latency in zip(order, seconds, strict=True)
        )
    }
    for name in SIZES:
        of_size = sorted(
            latency for shape, latency in zip(order, seconds, strict=True) if shape.size == name
        )
        for quantity, part in PARTS:
            found[f"{quantity} of {name}"] = quantile(of_size, part) * 1000
    return found
