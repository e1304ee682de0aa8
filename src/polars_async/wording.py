"""What took a query as long as it did, in one sentence, and figures in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from polars_async.errors import describe
from polars_async.resolution import NO_ENGINE

if TYPE_CHECKING:
    from polars_async.resolution import Resolution

WORTH_TELLING: Final = 0.001
"""Seconds in the queue below which a query did not really wait."""
_UNITS: Final = ("bytes", "kB", "MB", "GB", "TB")


class Ahead(NamedTuple):
    """How many queries a query found before it, when it was put into the queue."""

    running: int
    waiting: int

    def __str__(self) -> str:
        kinds = {"running": self.running, "waiting": self.waiting}
        counted = " and ".join(f"{number} {kind}" for kind, number in kinds.items() if number)
        return f"{counted} {'query' if sum(self) == 1 else 'queries'}"


def summarize(
    *,
    waited: float,
    ran: float | None,
    resolution: Resolution,
    ahead: Ahead | None = None,
    place: str | None = None,
    inline: bool = False,
    peak_memory: int | None = None,
    gpu_seconds: float | None = None,
    memory_seconds: float = 0.0,
    shared: str | None = None,
    end: str | None = None,
) -> str:
    """
    Return in one sentence what took a query how long; what is not known is left out.

    Parameters
    ----------
    waited, ran
        Seconds in the queue, and of running; the latter None if it did not start.
    resolution
        Which engine runs the query.
    ahead
        The queries that were before it in the queue.
    place
        Where it runs, such as ``"worker 4711"``; None for a thread of this process.
    inline
        Whether it runs on the thread that submitted it.
    peak_memory
        The most memory that it took, in bytes.
    gpu_seconds
        How long the GPU tried it in vain.
    memory_seconds
        How much of `waited` it waited for memory alone.
    shared
        Whose result it got, instead of running itself.
    end
        How it ended, unless it succeeded.
    """
    parts: list[str] = []
    if shared is not None:  # what was before that other query is told there
        ahead = None
    if ran is None or waited >= WORTH_TELLING:
        parts.append(f"waited {in_seconds(waited)}{behind(ahead)}")
    if memory_seconds >= WORTH_TELLING:
        parts.append(f"was held up by max_memory for {in_seconds(memory_seconds)} of that")
    if gpu_seconds is not None:
        parts.append(f"was on the GPU in vain for {in_seconds(gpu_seconds)} of that")
    if ran is not None:
        parts.append(f"ran {in_seconds(ran)}{where(resolution, place, inline=inline)}")
    if shared is not None:
        parts.append(shared)
    if peak_memory is not None:
        which = "" if shared is None else "which "
        parts.append(f"{which}took {in_bytes(peak_memory)} at its peak")
    if (why := _why_another(resolution)) is not None:
        parts.append(why)
    if end is not None:
        parts.append(end)
    return ", ".join(parts)


def how_shared(query_id: int | None, *, from_cache: bool = False) -> str | None:
    """Return from which query a result comes that was shared or kept; None if from none."""
    if query_id is None:
        return None
    return f"{'from the cache, by' if from_cache else 'shared with'} query {query_id}"


def behind(ahead: Ahead | None) -> str:
    """Return what a query waited for, as it follows how long it waited."""
    return f" behind {ahead}" if ahead is not None and any(ahead) else ""


def where(resolution: Resolution, place: str | None, *, inline: bool = False) -> str:
    """Return on which engine a query ran, and where, as it follows how long it ran."""
    engine = "" if resolution.name == NO_ENGINE else f" on the {resolution.name} engine"
    if inline:
        return f"{engine}, on the thread that submitted it"
    if place is None:
        return engine
    return f"{engine} {'on' if place.startswith('GPU') else 'in'} {place}"


def in_seconds(seconds: float) -> str:
    """Return a time in words, with two or three digits that count."""
    if seconds < 0.1:  # noqa: PLR2004  # as the text shows
        return f"{seconds * 1000:.2g} ms" if seconds < 0.001 else f"{seconds * 1000:.0f} ms"  # noqa: PLR2004
    if seconds < 1:
        return f"{seconds:.2f} s"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:,.0f} s"  # noqa: PLR2004


def in_bytes(size: int) -> str:
    """Return a size in words: ``"1.2 GB"``."""
    number, units = float(size), iter(_UNITS)
    unit = next(units)
    for larger in units:
        if number < 999.5:  # noqa: PLR2004  # what rounds to 1000 is 1.0 of the larger unit
            break
        number, unit = number / 1000, larger
    return f"{number:.0f} {unit}" if unit == "bytes" or number >= 99.5 else f"{number:.1f} {unit}"  # noqa: PLR2004


def _why_another(resolution: Resolution) -> str | None:
    """Return why another engine runs than the one that was asked for; None if it is that one."""
    if not resolution.fell_back and not resolution.downgraded:
        return None
    why = None if resolution.reason is None else resolution.reason.replace("_", " ")
    if resolution.cause is not None:
        why = describe(resolution.cause)
    what = "fell back" if resolution.fell_back else "was kept off the GPU"
    return what if why is None else f"{what} because of {why}"
