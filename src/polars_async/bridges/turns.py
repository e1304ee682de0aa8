"""
How long a loop was kept from its other tasks by queries that ran on its own thread.

A turn of a loop is what it does between two looks at what is ready. Two things must not become
longer than without such queries, but for `MOST`:

- a turn in which many queries are submitted. What counts is the time that they took beyond what
  handing them to other threads would have cost the loop, which is far from nothing. Once it comes
  to `MOST` there is no more of it until the loop has turned: see `has_room` and `note`.
- a task that waits for one query after the other. It would never let the loop turn, since each of
  them is done when it comes to wait. So after `MOST` it does: see `is_due`.

A thread without a loop has nothing to hold up.
"""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from polars_async._runtime.unpatched import local

if TYPE_CHECKING:
    from collections.abc import Callable

MOST: Final = 0.001
"""Seconds by which a turn may become longer."""
HAND_OVER: Final = 30e-6
"""Seconds that handing a query to another thread costs the loop in all, at least: some of them once
its result comes."""


def _no_loop() -> None:
    return None


class _Turn(local):
    """The present turn of the loop of one thread, as far as it is known."""

    since: float | None = None
    """When the first query of the turn ran here, by perf_counter; None if none has."""
    excess = 0.0
    """Seconds that queries have taken beyond `HAND_OVER` for each."""
    loop: Callable[[], object] = staticmethod(_no_loop)
    """Returns the loop that was asked to call when it has turned, or None."""


_turn: Final = _Turn()


def has_room() -> bool:
    """Return whether a query may still run on this thread in the present turn of its loop."""
    turn = _turn
    if turn.excess < MOST:
        return True
    found = _loop_here()
    if found is not None and turn.loop() is found[0]:
        return False
    # There is no loop, or another one than that which was asked to call, and will not any more.
    turn.excess = 0.0
    return True


def note(began: float, ended: float) -> None:
    """Note that a query ran on this thread, between these times of perf_counter."""
    turn = _turn
    if turn.since is None:
        turn.since = began
    # Of one no more than a tenth counts: the kernel interrupts any thread for some ms, whatever it
    # does. Those that take less than a hand-over make up for it.
    turn.excess = max(0.0, turn.excess + min(ended - began - HAND_OVER, MOST / 10))
    # Not for each: a loop that is asked to call has one more turn for that.
    if turn.excess >= MOST / 2:
        _ask_to_call(turn)


def is_due() -> bool:
    """Return whether the loop of this thread has to turn before a task goes on; it then does."""
    turn = _turn
    if turn.since is None or perf_counter() - turn.since < MOST:
        return False
    turn.since = None
    return True


def turned() -> None:
    """Note that the loop of this thread has turned."""
    turn = _turn
    turn.since, turn.excess = None, 0.0
    turn.loop = _no_loop


def _ask_to_call(turn: _Turn) -> None:
    found = _loop_here()
    if found is None:
        turn.excess = 0.0
        return
    loop, call_soon = found
    if turn.loop() is not loop:
        # Asked before that is noted: with an error of a signal handler in between it is asked
        # twice, and not never.
        call_soon(turned)
        try:
            turn.loop = ref(loop)
        except TypeError:  # such a loop is kept until it, or another one on this thread, turns
            turn.loop = lambda: loop


def _loop_here() -> tuple[Any, Callable[[Callable[[], None]], object]] | None:
    """Return the loop that runs on this thread, and what has it make a call in its next turn."""
    asyncio = sys.modules.get("asyncio.events")
    if asyncio is not None and (loop := asyncio._get_running_loop()) is not None:  # noqa: SLF001
        return loop, loop.call_soon
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        token = trio.lowlevel.current_trio_token()
        return token, token.run_sync_soon
    hubs = sys.modules.get("gevent._hub_local")
    hub = None if hubs is None else hubs.get_hub_if_exists()
    return None if hub is None else (hub, hub.loop.run_callback)
