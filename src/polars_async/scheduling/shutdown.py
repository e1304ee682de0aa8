"""
The end of the program while queries run or wait: prompt, silent, with the program's own status.

While the interpreter is taken down, it ends each thread that comes back to Python, by unwinding its
stack. If Rust had called the Python code, that aborts the process. PyO3 knows, and stops threads
that come back from Rust, so a query that is in Rust can be left behind. A query in a Python
function cannot: it has to leave that before.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from contextlib import suppress
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol
from weakref import WeakValueDictionary

from polars_async._runtime.green import catch_up
from polars_async._runtime.origin import is_of_polars
from polars_async._runtime.plans import end_looks
from polars_async._runtime.unpatched import sleep
from polars_async._runtime.upstream import PACKAGE_FOLDER
from polars_async.bridges.waiting import hold_at_exit
from polars_async.scheduling.query import Query

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_PATIENCE: Final = 1.0
"""Seconds that Python functions of queries have to end; longer ones hardly end during the exit."""
_GRACE: Final = 0.1
"""Seconds that other queries have: most are short, and the rest are far from their end."""
_AGAIN: Final = 0.2
"""Seconds that the ``finally`` of a function has, until SystemExit is thrown again."""
_PAUSE: Final = 0.002

_RUN: Final = Query.run.__code__


class _Admission(Protocol):
    @property
    def running(self) -> int: ...


class _Lane(Protocol):
    @property
    def admission(self) -> _Admission: ...

    def close(self, *, cancel_waiting: bool) -> None: ...


class _Process:
    lanes: Final[WeakValueDictionary[int, _Lane]] = WeakValueDictionary()
    prepared = False
    exits = False


def watch(lane: _Lane) -> None:
    """
    Close `lane` when the program ends, and cancel its queries.

    `atexit` calls functions in reverse order. Those that are registered after this one run first,
    and find collectors open; those registered before run later, and find them closed and all
    queries cancelled. If the first collector is made in such a function, this happens after all of
    them. Threads that already wait are not woken: they end with the program, and would only
    complain that their query was cancelled.
    """
    _Process.lanes[id(lane)] = lane
    if not _Process.prepared and sys.platform != "win32":
        _Process.prepared = True
        atexit.register(_AtExit())
    if _Process.exits:
        lane.close(cancel_waiting=True)


class _AtExit:
    """
    Registered with `atexit`, which calls it, or else drops it when all its functions have run.

    It never calls what was registered by a function that it called: hence `__del__`.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()

    def __call__(self) -> None:
        _leave()

    def __del__(self) -> None:
        # multiprocessing clears the functions of `atexit` in its children, which go on.
        if not _Process.exits and self._pid == os.getpid():
            _leave()


def _leave() -> None:
    _Process.exits = True
    # For good: a task that is freed before its end complains of that.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(unwoken := list[object]()))
    hold_at_exit(unwoken)
    # `valuerefs` copies in one step: other threads may make lanes meanwhile.
    lanes = [lane for known in _Process.lanes.valuerefs() if (lane := known()) is not None]
    for lane in lanes:
        lane.close(cancel_waiting=True)
    with suppress(KeyboardInterrupt):  # sent by a user who waits no longer
        _end_queries(lanes)
    end_looks(_PATIENCE)
    if _running(lanes):
        _delay_abort()
    catch_up()
    hold_at_exit(None)


def _running(lanes: list[_Lane]) -> bool:
    # In a forked child none does, even where some did in its parent.
    return any(lane.admission.running for lane in lanes)


def _end_queries(lanes: list[_Lane]) -> None:
    """Cancel what runs, and throw SystemExit into Python functions until they end or time is up."""
    thrown_at: dict[FrameType, float] = {}
    begun = in_udf = monotonic()
    while _running(lanes) and (now := monotonic()) - begun < _PATIENCE:
        for thread, entrance, top in _threads_in_queries():
            if entrance not in thrown_at:
                thrown_at[entrance] = -inf
                _cancel(entrance)
            if top.f_code.co_filename.startswith(PACKAGE_FOLDER):
                continue  # or Polars panics, and says so: it trusts its own Python not to raise
            in_udf = now
            if now - thrown_at[entrance] > _AGAIN:
                thrown_at[entrance] = now
                _throw_exit(thread)
        # After the look: the last one may be long ago, if this process had no processor meanwhile.
        if now - in_udf >= _GRACE:
            break
        sleep(_PAUSE)


def _threads_in_queries() -> Iterator[tuple[int, FrameType, FrameType]]:
    """
    Yield our worker threads and Polars' threads, each with its frame of entry and its last frame.

    A thread of Polars may also run a plain ``collect`` of the program, which looks the same, and
    could abort the process as well.
    """
    for thread, top in sys._current_frames().items():  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        if top is sys._getframe():  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            continue
        entrance = top
        while entrance.f_code is not _RUN and entrance.f_back is not None:
            entrance = entrance.f_back
        # A thread of `threading` might end right now, and could not be looked at any more.
        is_python_s = entrance.f_code.co_filename == threading.__file__
        if entrance.f_code is _RUN or (not is_python_s and is_of_polars(thread)):
            yield thread, entrance, top


def _cancel(entrance: FrameType) -> None:
    query = entrance.f_locals.get("self")
    if isinstance(query, Query):
        query.cancel()


def _throw_exit(thread: int) -> None:
    """Have `thread` raise SystemExit at the next Python instruction that it runs."""
    exception = ctypes.py_object(SystemExit)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)


def _delay_abort() -> None:
    """
    Have the program end before an abort does.

    A function that would not end may return to Python now, and its thread abort the process. The
    handler of that signal sleeps instead, for 6 seconds: C calls it with the signal's number.
    """
    c = ctypes.pythonapi
    c.signal(signal.SIGABRT, ctypes.cast(c.sleep, ctypes.c_void_p))
