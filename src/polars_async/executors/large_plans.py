"""Warns of plans that take long to be sent to another process, which costs time in silence."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from polars.exceptions import PerformanceWarning

from polars_async._runtime.green import deliver
from polars_async._runtime.plans import SENT_RATE

if TYPE_CHECKING:
    from polars_async.executors import Job

_LARGE: Final = 1 << 24
"""Bytes of a plan that count as large: to send them takes a third of a second."""


def warn_if_large(query: Job, plan_bytes: int, *, same_machine: bool) -> None:
    """Warn at the line that asked for `query` if its plan is large, and say what to do."""
    site = query.call_site
    if plan_bytes < _LARGE or site is None:
        return
    otherwise = "" if same_machine else ", if the workers are on this machine, or else scan a file"
    text = (
        f"{query.named} takes {plan_bytes:,} bytes along to another process, mostly frames in "
        f"memory, for some {plan_bytes / SENT_RATE:.1f} s each time: put these into shared memory "
        "once, with polars_async.share(frame), and query what that gives instead of frame.lazy()"
        f"{otherwise}"
    )
    deliver(partial(site.warn, text, PerformanceWarning))
