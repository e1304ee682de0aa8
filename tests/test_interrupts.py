"""Exceptions out of signal handlers, at every step of ours: no slot, waiter or query is lost."""

from __future__ import annotations

import asyncio
import gc
import sys
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from pathlib import Path

import inside
import pytest
import trio
import uvloop
from places import LIMIT, TINY, Blocked, until

import polars_async
from polars_async import Cache, Collector, QueryTimeoutError, QueueFullError
from polars_async._runtime import unpatched

OURS = str(Path(polars_async.__file__).parent)
TASKS = Path("/proc/self/task")
OF_THE_LOOP = {"_deliver_all", "_resolve", "_reschedule", "abort"}
"""What a loop calls, and sees to by itself: trio protects that from Ctrl-C."""
OUTCOMES = ("completed", "failed", "cancelled", "timed_out", "rejected")


class Interrupt(BaseException):
    """What a signal handler raises."""


def interrupted(act, step):
    """Do `act`, and raise at its `step`-th line of ours; False if it has fewer."""
    left = step

    def trace(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.startswith(OURS) or frame.f_code.co_name in OF_THE_LOOP:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise Interrupt
        return trace

    before = sys.gettrace()
    gc.disable()  # what is raised in a finaliser is told on stderr, and goes no further
    sys.settrace(trace)
    try:
        with suppress(Interrupt):
            act()
    finally:
        sys.settrace(before)
        gc.enable()
    return left <= 0


def threads():
    """Count the threads on which queries run."""
    names = []
    for task in TASKS.iterdir():
        with suppress(OSError):  # it has ended
            names.append((task / "comm").read_text().strip())
    return names.count("polars-async")


class Scene:
    """A collector with one slot, in which something is about to be interrupted."""

    def __init__(self, *, taken, **options):
        self.blocked = Blocked()
        self.collector = Collector(max_running=1, **options)
        self.events = []
        self.running = self.waited_for = None
        self.waiting, self.told = 0, unpatched.SimpleQueue()
        if taken:
            self.running = self.collector.collect_async(self.blocked.lf)
            assert self.blocked.started.wait()

    def check(self):
        """Show that all is as if nothing had come in between."""
        self.adds_up()
        if self.waited_for is not None and self.waited_for.done():
            self.all_are_told()
        self.blocked.gate.set()
        self.all_are_told()
        until(self.is_idle)
        if not self.collector.closed:
            assert self.collector.collect_async(TINY).result(LIMIT).item() == 1
        until(self.is_idle)
        self.adds_up()
        self.collector.close()

    def is_idle(self):
        stats = self.collector.stats()
        return not stats["running"] and not stats["waiting"]

    def all_are_told(self):
        while self.waiting:
            self.told.get(timeout=LIMIT)
            self.waiting -= 1

    def adds_up(self):
        stats = self.collector.stats()
        on_the_way = stats["waiting"] + stats["running"] - stats["abandoned"]
        assert stats["submitted"] == sum(stats[key] for key in OUTCOMES) + on_the_way


def ends(handle):
    """Show that whoever waits for `handle` is told, now that nothing holds it up."""
    with suppress(CancelledError, QueryTimeoutError):
        handle.result(LIMIT)


def ask(scene):
    return partial(scene.collector.collect_async, TINY)


def ask_in_vain(scene):
    def ask():
        with pytest.raises(QueueFullError):
            scene.collector.collect_async(TINY)

    return ask


def ask_in_time(scene):
    return partial(scene.collector.collect_async, TINY, timeout=60)


def ask_for_several(scene):
    return partial(scene.collector.collect_all_async, [TINY, TINY])


def cancel_what_waits(scene):
    handle = scene.collector.collect_async(TINY, timeout=60)
    wait_elsewhere(scene, handle)
    return handle.cancel


def cancel_what_runs(scene):
    wait_elsewhere(scene, scene.running)
    return scene.running.cancel


def ask_for_the_same(scene):
    handle = scene.collector.collect_async(TINY)
    wait_elsewhere(scene, handle)
    return ask(scene)


def cancel_one_of_two(scene):
    handle = scene.collector.collect_async(TINY)
    wait_elsewhere(scene, scene.collector.collect_async(TINY))
    scene.waited_for = None  # but by the other one
    return handle.cancel


def ask_for_what_was_kept(scene):
    scene.collector.collect_async(TINY).result(LIMIT)
    return ask(scene)


def wait_elsewhere(scene, handle):
    """Have two threads wait for `handle`, who are told when it is done."""
    for _ in range(2):
        unpatched.start_new_thread(lambda: (ends(handle), scene.told.put(None)), ())
    until(lambda: len(inside.waiters(handle)) == 2)
    scene.waiting, scene.waited_for = 2, handle


def wait_in_vain(scene):
    def wait():
        with pytest.raises(TimeoutError):
            scene.running.result(0.001)

    return wait


def close(scene):
    scene.collector.collect_async(TINY)
    return partial(scene.collector.close, wait=False)


def close_all(scene):
    scene.collector.collect_async(TINY)
    return partial(scene.collector.close, wait=False, cancel_running=True)


def count(scene):
    return scene.collector.stats


SHARED = {"single_flight": True, "inline": 0}
KEPT = {"cache": Cache(seconds=60, max_bytes=1e6)}
ACTS = {
    "asked, a slot is free": (ask, {"taken": False}),
    "asked, it waits": (ask, {"taken": True}),
    "asked, it is too much": (ask_in_vain, {"taken": True, "max_waiting": 0}),
    "asked, in time": (ask_in_time, {"taken": True}),
    "asked, heard": (ask, {"taken": False, "on_event": lambda _: None}),
    "several asked": (ask_for_several, {"taken": False}),
    "cancelled, it waits": (cancel_what_waits, {"taken": True}),
    "cancelled, it runs": (cancel_what_runs, {"taken": True}),
    "cancelled, heard": (cancel_what_waits, {"taken": True, "on_event": lambda _: None}),
    "waited for": (wait_in_vain, {"taken": True}),
    "closed": (close, {"taken": True}),
    "all closed": (close_all, {"taken": True}),
    "counted": (count, {"taken": True}),
    "asked for the same, first": (ask, {"taken": True, **SHARED}),
    "asked for the same": (ask_for_the_same, {"taken": True, **SHARED}),
    "the last one cancelled": (cancel_what_waits, {"taken": True, **SHARED}),
    "one of two cancelled": (cancel_one_of_two, {"taken": True, **SHARED}),
    "closed, shared": (close, {"taken": True, **SHARED}),
    "kept": (ask_for_what_was_kept, {"taken": False, **KEPT}),
    "kept, heard": (
        ask_for_what_was_kept,
        {"taken": False, "on_event": lambda _: None, **KEPT},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTS)
def test_interrupt_at_any_line_costs_no_slot_waiter_or_query(name):
    make, options = ACTS[name]
    started = threads()
    step, goes_on = 0, True
    while goes_on:
        step += 1
        scene = Scene(**options)
        goes_on = interrupted(make(scene), step)
        scene.check()
    del scene
    gc.collect()
    assert step > 5
    until(lambda: threads() <= started)


# While a task begins to wait, or is told


async def awaits(handle, after):
    try:
        await handle
    except Interrupt:
        await after()  # which comes later than what is left to be told of the first
        raise


class Loops:
    """How a task of each loop waits for `handle`, and goes on after what is raised there."""

    @staticmethod
    def asyncio(handle, after, new_loop=asyncio.new_event_loop):
        loop = new_loop()
        try:
            loop.run_until_complete(awaits(handle, after))
        finally:
            loop.close()

    @staticmethod
    def uvloop(handle, after):
        Loops.asyncio(handle, after, uvloop.new_event_loop)

    @staticmethod
    def trio(handle, after):
        trio.run(awaits, handle, after)

    @staticmethod
    def gevent(handle, after):
        try:
            handle.get()
        except Interrupt:
            after().get()
            raise


def wait_in(loop):
    def begin_to_wait(scene):
        handle = scene.collector.collect_async(scene.blocked.lf, gevent=True)
        after = partial(scene.collector.collect_async, TINY, gevent=True)
        return lambda: (later(scene.blocked.gate.set), getattr(Loops, loop)(handle, after))

    return begin_to_wait


def later(act):
    """Do `act` when a thread has had time to begin to wait."""
    unpatched.start_new_thread(lambda: (unpatched.sleep(0.005), act()), ())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio", "gevent"])
def test_interrupt_while_a_task_begins_to_wait_ends_the_task_alone(loop):
    step, goes_on = 0, True
    while goes_on:
        step += 1
        scene = Scene(taken=False)
        goes_on = interrupted(wait_in(loop)(scene), step)
        scene.blocked.gate.set()
        scene.check()
    assert step > 5
