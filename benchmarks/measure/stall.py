"""Measure how long an event loop is held up."""

import asyncio
import time
from types import TracebackType
from typing import Self


class StallMeter:
    """
    Measures the longest time that an asyncio loop was held up while the body ran.

    A task ticks on the loop. The time that a tick takes beyond its interval is a stall: the loop
    was busy with other work, or the process had no processor.

    Parameters
    ----------
    interval
        Time between two ticks in seconds.

    Attributes
    ----------
    longest
        The longest stall so far in seconds; complete when the body has been left.
    """

    def __init__(self, interval: float = 0.001) -> None:
        self.longest = 0.0
        self._interval = interval
        self._stopping = False
        self._ticker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._ticker = asyncio.create_task(self._tick())
        await asyncio.sleep(0)  # so that the first tick has begun before the body does
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Not cancelled but waited for: the tick under way is the one that saw the last stall.
        self._stopping = True
        assert self._ticker is not None
        await self._ticker

    async def _tick(self) -> None:
        while not self._stopping:
            begun = time.monotonic()
            await asyncio.sleep(self._interval)
            self.longest = max(self.longest, time.monotonic() - begun - self._interval)
