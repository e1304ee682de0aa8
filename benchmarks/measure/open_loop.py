"""Send requests when they are due, whether or not the earlier ones were answered."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    import polars as pl

    Submit = Callable[[pl.LazyFrame], Awaitable[pl.DataFrame]]

_PATIENCE: Final = 30.0
"""Seconds to wait for the last requests; one cancelled then counts with the time it took so far."""


def moments(rate: float) -> Iterator[float]:
    """Yield the seconds at which `rate` requests a second come, at random, without end."""
    generator = random.Random(1)  # noqa: S311  # no secret, and the same for all
    moment = 0.0
    while True:
        moment += generator.expovariate(rate)
        yield moment


async def latencies(submit: Submit, requests: Iterable[tuple[float, pl.LazyFrame]]) -> list[float]:
    """
    Submit each query when it is due; return the latency of each in seconds, in their order.

    `requests` are the queries with the seconds from now at which they are due, in ascending order.
    A latency counts from then on, even if a loop that is held up sends the request late.
    """
    found: dict[int, float] = {}
    tasks: list[asyncio.Task[None]] = []

    async def request(number: int, query: pl.LazyFrame, due: float) -> None:
        try:
            await submit(query)
        finally:
            found[number] = time.perf_counter() - due

    begun = time.perf_counter()
    for number, (seconds, query) in enumerate(requests):
        due = begun + seconds
        await asyncio.sleep(due - time.perf_counter())
        tasks.append(asyncio.create_task(request(number, query, due)))
    _, late = await asyncio.wait(tasks, timeout=_PATIENCE)
    if late:
        for task in late:
            task.cancel()
        await asyncio.wait(late)
    return [found[number] for number in range(len(tasks))]
