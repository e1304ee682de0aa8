"""The places where queries run, and what a test says to a query that may be in another process."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import tempfile
from ast import literal_eval
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from time import monotonic

import polars as pl
from polars.io.plugins import register_io_source

from polars_async._runtime.unpatched import (  # real ones under gevent's patch, too
    allocate_lock,
    sleep,
)

PLACES = ("threads", "processes", "dask")

TINY = pl.LazyFrame({"a": [1]})

LIMIT = 40
"""Seconds that anybody waits for what comes in milliseconds, or not at all."""

HEARS_CTRL_C = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
"""How a program of a test begins that is sent SIGINT, which is ignored in a shell's background."""

ALL_AT_ONCE = "batches arrive when the query has ended, as this one does not before they do"

PLANS_SENT_ONE_BY_ONE = "plans are sent one by one, and no longer share a Python source"

STDERR_OF_THE_CLUSTER = "a worker's stderr is what it was when the cluster was started"

A_COLLECTOR_STAYS = "a collector cannot be sent to another process"

_numbers = count()

_parses = allocate_lock()  # Python 3.11 counts wrong where two threads build syntax trees at once


@cache
def _folder():
    folder = Path(tempfile.mkdtemp(prefix="polars-async-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _new_path(kind):
    return str(_folder() / f"{kind}-{os.getpid()}-{next(_numbers)}")


def until(condition, limit=LIMIT):
    """Wait for what nobody tells."""
    end = monotonic() + limit
    while not condition():
        assert monotonic() < end, "it does not come"
        sleep(0.001)


class Gate:
    """An event that means the same in each process to which it is sent."""

    def __init__(self):
        self._path = _new_path("gate")

    def set(self):
        Path(self._path).touch()

    def is_set(self):
        return os.path.exists(self._path)  # noqa: PTH110  # asked a thousand times a second

    def wait(self, timeout=LIMIT):
        """Tell whether it was set in time."""
        end = monotonic() + timeout
        while not self.is_set():
            if monotonic() > end:
                return False
            sleep(0.001)
        return True


class Notes:
    """A list of plain values, to which a query in any process may append."""

    def __init__(self):
        self._path = _new_path("notes")

    def append(self, note):
        with open(self._path, "ab") as file:  # noqa: PTH123  # one write, which nobody else's parts
            file.write(f"{note!r}\n".encode())

    def __iter__(self):
        return iter(self._read())

    def __len__(self):
        return len(self._read())

    def _read(self):
        if not os.path.exists(self._path):  # noqa: PTH110  # nobody has appended anything
            return []
        lines = Path(self._path).read_bytes().split(b"\n")
        with _parses:
            return [literal_eval(line.decode()) for line in lines[:-1]]


class Blocked:
    """A query that runs until the test lets it go on."""

    def __init__(self):
        self.started = Gate()
        self.gate = Gate()

    @property
    def lf(self):
        return TINY.map_batches(self._wait)

    def _wait(self, df):
        self.started.set()
        assert self.gate.wait(), "nobody lets it go on"
        return df


class Source:
    """As many batches as wanted; after `held_after` of them it waits for the gate."""

    def __init__(self, batches=None, held_after=None, error=None):
        self.gate = Gate()
        self._made = Notes()
        self._batches = batches
        self._held_after = held_after
        self._error = error

    @property
    def made(self):
        return len(self._made)

    @property
    def lf(self):
        return register_io_source(self._read, schema={"a": pl.Int64})

    def _read(self, with_columns, predicate, n_rows, batch_size):  # noqa: ARG002
        for number in count() if self._batches is None else range(self._batches):
            if number == self._held_after:
                self.gate.wait()
            self._made.append(number)
            yield pl.DataFrame({"a": [number]})
        if self._error is not None:
            raise self._error


class Failure(Exception):  # noqa: N818  # unlike the built-in ones it takes weak references
    """An error of a class that Python does not know."""


@contextmanager
def named_thread(name):
    """Name this thread for what lists threads, which those that it starts inherit."""
    comm = Path("/proc/thread-self/comm")
    before = comm.read_text(encoding="utf-8")
    comm.write_text(name, encoding="utf-8")
    try:
        yield
    finally:
        comm.write_text(before, encoding="utf-8")


def on_foreign_thread(function):
    """Call `function` on a thread that not Python has started, as servers written in Rust do."""
    outcome = []

    def run(_):
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001  # nothing could be raised there
            outcome.append(error)

    c = ctypes.CDLL(None)
    routine = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(run)
    thread = ctypes.c_ulong()
    assert c.pthread_create(ctypes.byref(thread), None, routine, None) == 0
    assert c.pthread_join(thread, None) == 0
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
