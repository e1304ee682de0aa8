"""What is done in a forked child, and in which order."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from weakref import ref

import polars as pl
import pytest

from polars_async import Collector, EventKind
from polars_async._runtime import fork
from polars_async._runtime.fork import Step, in_child, new_lock


@pytest.fixture(autouse=True)
def _actions(monkeypatch):
    monkeypatch.setattr(fork, "_actions", fork._actions[:])


def exit_code_of(child):
    """Fork, and return the exit code of a child that ran `child`, or was ended by an alarm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # else a handler may wait for Python
            signal.alarm(60)
            code = child()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_lock_that_another_thread_held_is_free_in_the_child():
    lock, held, may_end = new_lock(), threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            may_end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def child():
        with lock:
            return 7

    assert exit_code_of(child) == 7
    may_end.set()
    thread.join()


def test_lock_that_the_forking_thread_holds_is_held_and_released_in_the_child():
    lock = new_lock()

    def child():
        if not lock._is_owned():
            return 1
        lock.release()
        return 7 if not lock._is_owned() else 2

    with lock:
        assert exit_code_of(child) == 7


def test_lock_that_is_freed_is_forgotten():
    lock = new_lock()
    assert lock in fork._locks
    known = ref(lock)
    del lock
    assert known() is None


def test_queries_fail_after_all_else_is_forgotten_and_whatever_raises():
    order = []
    in_child(Step.FAIL, lambda: order.append("fail"))
    in_child(Step.FORGET, lambda: 1 / 0)
    in_child(Step.FORGET, lambda: order.append("forget"))
    assert exit_code_of(lambda: 7 if order == ["forget", "fail"] else 1) == 7
    assert order == []


def test_query_whose_end_is_still_being_told_keeps_its_result_in_the_child():
    told, gate = threading.Event(), threading.Event()

    def on_event(event):
        if event.kind is EventKind.FINISHED:
            told.set()
            gate.wait(60)

    with Collector(inline=0, on_event=on_event) as collector:
        handle = collector.collect_async(pl.LazyFrame({"a": [7]}))
        assert told.wait(30)
        code = exit_code_of(lambda: handle.result().item())
        gate.set()
    assert code == 7
