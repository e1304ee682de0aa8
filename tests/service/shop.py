"""A small service: it answers questions about sales, on the GPU where that works."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

import polars_async as pa


@dataclass
class Health:
    """What a load balancer, and whoever is on call, want to know."""

    on_gpu: bool
    complaint: str | None


class Shop:
    def __init__(self, sales, *, gpu="offload"):
        self._sales = sales
        self._collector = pa.Collector(engine="gpu", gpu=gpu, max_waiting=100)
        self._last = None

    async def __aenter__(self):
        self._collector.resolve_engine()  # with gpu="require", better fail now than later
        return self

    async def __aexit__(self, *_error):
        await self._collector.aclose()

    async def best(self, number):
        """Give the shops that have sold most."""
        sums = self._sales.group_by("shop").agg(pl.col("sum").sum())
        return await self._answer(sums.sort("sum", descending=True).head(number))

    async def compared(self, *shops):
        """Give what each of these shops has sold, all from one pass over the sales."""
        parts = [self._sales.filter(pl.col("shop") == shop).select("sum") for shop in shops]
        frames = await self._awaited(self._collector.collect_all_async(parts))
        return {shop: frame["sum"].sum() for shop, frame in zip(shops, frames, strict=True)}

    async def export(self):
        """Give all sales, as lines of JSON."""
        async with self._collector.collect_batches_async(self._sales) as batches:
            return b"".join([batch.write_ndjson().encode() async for batch in batches])

    def health(self):
        """Tell where the last query ran, or the next would."""
        resolution = self._last or self._collector.resolve_engine()
        complaint = None if resolution.reason is None else resolution.message
        return Health(on_gpu=resolution.name == "gpu", complaint=complaint)

    async def _answer(self, lf):
        return (await self._awaited(self._collector.collect_async(lf))).rows()

    async def _awaited(self, query):
        try:
            return await query
        finally:
            self._last = query.resolution
