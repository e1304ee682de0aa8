"""Faults that are for life, or for the whole program: Ctrl-C, its signal in a worker, and fork."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import HEARS_CTRL_C

pytestmark = pytest.mark.slow

GEVENT = ["gevent", "gevent patched before", "gevent patched after"]
LOOPS = ["asyncio", "trio", *GEVENT]
PRELUDE = """
import sys
loop = sys.argv[1]
if loop.endswith("before"):
    import gevent.monkey; gevent.monkey.patch_all()
import polars as pl
import polars_async as pa
from polars_async._runtime import unpatched

if loop.endswith("after"):
    import polars_async.bridges.gevent
    import gevent.monkey; gevent.monkey.patch_all()

TINY = pl.LazyFrame({"a": [3, 1]}).sort("a")
collector = pa.Collector(max_running=1)

def outcome(ask=collector.collect_async, lf=TINY, **options):
    async def main():
        return await ask(lf, **options)
    if loop == "asyncio":
        import asyncio
        return asyncio.run(main())
    if loop == "trio":
        import trio
        return trio.run(main)
    if loop == "thread":
        return ask(lf, **options).result()
    return ask(lf, gevent=True, **options).get()

def works():
    assert len(outcome()) == len(outcome(pa.collect_async)) == 2
    collector.close()
    admission = collector._cpu.admission
    assert (admission.running, admission.waiting) == (0, 0)
    print("works", flush=True)
"""

STOPS = """
from contextlib import suppress

def until_all_have_stopped(lf):
    while True:  # Polars stops others, too, until all threads of one that it stops have left it
        with suppress(KeyboardInterrupt):
            return outcome(lf=lf)
"""

CTRL_C = """
from polars_async.scheduling.query import Query

add_waiter = Query.add_waiter
def add_and_say(query, waiter):
    added = add_waiter(query, waiter)
    print("waits", flush=True)
    return added
Query.add_waiter = add_and_say

gate = unpatched.allocate_lock()
gate.acquire()
def udf(df):
    gate.acquire()
    return df
if "gevent" in loop:
    import gevent
    gevent.get_hub().NOT_ERROR += (KeyboardInterrupt,)  # else gevent's hub reports it as well
try:
    outcome(lf=TINY.map_batches(udf))
except KeyboardInterrupt:
    if sys.argv[2] == "uncaught":
        raise
Query.add_waiter = add_waiter
print("interrupted", flush=True)
gate.release()
until_all_have_stopped(TINY)
works()
"""


def wait_until_asleep(pid):
    """Wait until the program's main thread is in the system call that it waits in."""
    before = None
    while (now := switches(pid)) is None or now != before:
        before = now
        time.sleep(0.02)  # nobody tells of this


def switches(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return status["voluntary_ctxt_switches"] if status["State"].strip()[0] == "S" else None


def press_ctrl_c(*arguments, program=CTRL_C):
    command = [sys.executable, "-c", HEARS_CTRL_C + PRELUDE + STOPS + program, *arguments]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        try:
            assert process.stdout.readline() == "waits\n"
            wait_until_asleep(process.pid)
            process.send_signal(signal.SIGINT)
            said, complaints = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, said.split(), complaints


@pytest.mark.parametrize("loop", [*LOOPS, "thread"])
def test_ctrl_c_interrupts_the_wait_and_the_next_query_works(loop):
    assert press_ctrl_c(loop, "caught") == (0, ["interrupted", "works"], "")


@pytest.mark.parametrize("loop", [*LOOPS, "thread"])
def test_ctrl_c_ends_the_program_though_the_query_still_runs(loop):
    status, said, complaints = press_ctrl_c(loop, "uncaught")
    assert (status, said) == (-signal.SIGINT, [])
    assert complaints.splitlines()[-1] == "KeyboardInterrupt"
    assert not [word for word in ("never", "ignored", "panicked") if word in complaints]


CTRL_C_IN_CLOSE = """
gate = unpatched.allocate_lock()
gate.acquire()
handle = collector.collect_async(TINY.map_batches(lambda df: (gate.acquire(), df)[1]))
print("waits", flush=True)
try:
    collector.close()
except KeyboardInterrupt:
    print("interrupted", flush=True)
gate.release()
collector.close()
assert handle.done()
print("works")
"""


@pytest.mark.parametrize("loop", ["thread"])
def test_ctrl_c_interrupts_close_which_can_be_called_again(loop):
    assert press_ctrl_c(loop, program=CTRL_C_IN_CLOSE) == (0, ["interrupted", "works"], "")


SYSTEM_EXIT = """
def udf(df):
    raise SystemExit(5)
try:
    outcome(lf=TINY.map_batches(udf))
finally:
    works()
"""


@pytest.mark.parametrize("loop", [*LOOPS, "thread"])
def test_system_exit_in_a_udf_ends_the_program_with_its_status(loop):
    command = [sys.executable, "-c", PRELUDE + SYSTEM_EXIT, loop]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (5, "works\n", "")


# The handler of an application that was there before Polars, which chains it.
OWN_HANDLER = """
import os, signal
handled, wakeup = os.pipe()
os.set_blocking(wakeup, False)
signal.signal(signal.SIGINT, lambda *_: None)
signal.set_wakeup_fd(wakeup)  # written to by Python's part of the handler, in any thread
"""

WORKER_HIT = """
def udf(df):
    # To this very thread, so that the handler of Polars has returned when this has: that of another
    # thread may have run the handler before it alone, and come to its own when the query is over.
    signal.raise_signal(signal.SIGINT)
    os.read(handled, 1)  # without blocking: it has run, here
    return df

for engine in "in-memory", "streaming":
    lf = TINY.map_batches(udf).sort("a").group_by("a").len().sort("a")
    try:
        outcome(lf=lf, engine=engine)
    except KeyboardInterrupt:
        print("interrupted")
until_all_have_stopped(TINY)
works()
"""


# Not trio, which puts its own handler in the place of that of Polars.
@pytest.mark.parametrize("loop", ["asyncio", *GEVENT, "thread"])
def test_worker_hit_by_the_signal_survives_and_its_query_raises(run_script, loop):
    said = run_script(OWN_HANDLER + PRELUDE + STOPS + WORKER_HIT, loop)
    assert said == ["interrupted", "interrupted", "works"]


LONG_QUERY_HIT = """
long = pl.LazyFrame({"k": pl.int_range(1_000_000, eager=True)})
for _ in range(40):
    long = long.with_columns(pl.col("k").hash()).sort("k").with_columns(pl.col("k").cum_sum())

def is_hit(engine):
    handle = collector.collect_async(long, engine=engine)
    while not handle.done():
        os.kill(os.getpid(), signal.SIGINT)
        with suppress(TimeoutError, KeyboardInterrupt):
            handle.result(0.05)
    try:
        handle.result()
    except KeyboardInterrupt:
        return True
    return False

for engine in "in-memory", "streaming":
    while not is_hit(engine):  # it was over before the first signal
        until_all_have_stopped(long.head(1000))
    print("interrupted")
until_all_have_stopped(long.head(1000))
works()
"""


def test_worker_hit_in_the_midst_of_a_long_query_survives_too(run_script):
    said = run_script(OWN_HANDLER + PRELUDE + STOPS + LONG_QUERY_HIT, "thread")
    assert said == ["interrupted", "interrupted", "works"]


FORK = """
import os, signal, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, on any fork beside threads
if "gevent" in loop:
    from gevent.monkey import get_original
    from gevent.os import fork_gevent as fork
    waitpid = get_original("os", "waitpid")  # gevent's own misses the end of a child's child
else:
    from os import fork, waitpid

def native(lf, **options):
    return lf.collect_async(engine=pa.AsyncEngine(), **options)

def try_all(who):
    asks = {
        "collector": lambda: outcome(),
        "function": lambda: outcome(pa.collect_async),
        "engine": lambda: outcome(native),
        "background": lambda: pa.AsyncEngine().collect(
            TINY, optimizations=pl.QueryOptFlags(), background=True).fetch_blocking(),
        "sync": lambda: TINY.collect(engine=pa.AsyncEngine()),
        "sync all": lambda: pl.collect_all([TINY], engine=pa.AsyncEngine())[0],
    }
    for name, ask in asks.items():
        try:
            print(who, len(ask()), flush=True)
        except pa.ForkedProcessError:
            print(who, "ForkedProcessError", flush=True)

def in_child(call, *arguments):
    child = fork()
    if not child:
        try:
            signal.alarm(60)
            call(*arguments)
        finally:
            os._exit(0)
    status = waitpid(child, 0)[1]
    if status:
        print("a child ended with status", status)

def child():
    try_all("child")
    in_child(try_all, "grandchild")

if sys.argv[2] == "awaited":
    outcome()
elif sys.argv[2] == "collected":
    TINY.collect()
in_child(child)
works()
"""

WAYS = 6


@pytest.mark.parametrize(
    ("loop", "before"),
    [*((loop, "awaited") for loop in [*LOOPS, "thread"]), ("thread", "collected")],
)
def test_child_of_a_parent_that_ran_a_query_is_told_so_at_once(run_script, loop, before):
    said = run_script(PRELUDE + FORK, loop, before)
    told = ["child", "ForkedProcessError"] * WAYS + ["grandchild", "ForkedProcessError"] * WAYS
    assert said == [*told, "works"]


@pytest.mark.parametrize("loop", [*LOOPS, "thread"])
def test_child_of_a_parent_that_ran_none_works(run_script, loop):
    said = run_script(PRELUDE + FORK, loop, "nothing")
    told = ["child", "2"] * WAYS + ["grandchild", "ForkedProcessError"] * WAYS
    assert said == [*told, "works"]


LOOK_ALIKE = """
import os, signal, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
def of_another_library():
    with open("/proc/thread-self/comm", "w") as comm:
        comm.write("tokio-rt-worker")
    named.set()
    threading.Event().wait()
named = threading.Event()
threading.Thread(target=of_another_library, daemon=True).start()
named.wait()
if not (child := os.fork()):
    signal.alarm(60)
    print(len(outcome()), len(outcome()), flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names threads as Linux does")
def test_child_works_although_another_library_calls_its_threads_as_polars_does(run_script):
    assert run_script(PRELUDE + LOOK_ALIKE, "thread") == ["2", "2", "0"]


POOL = """
import multiprocessing, warnings
warnings.simplefilter("ignore", DeprecationWarning)
if sys.argv[2] == "awaited":
    outcome()
def length(_):
    return len(outcome())
with multiprocessing.get_context("fork").Pool(1) as pool:
    try:
        print(pool.map_async(length, [0]).get(30))
    except pa.ForkedProcessError as error:
        print("ForkedProcessError", "before the first query" in str(error))
works()
"""


@pytest.mark.parametrize("loop", ["gevent", "thread"])
@pytest.mark.parametrize(
    ("before", "told"), [("awaited", ["ForkedProcessError", "True"]), ("nothing", ["[2]"])]
)
def test_forked_pool_gives_the_result_or_the_error(run_script, loop, before, told):
    assert run_script(PRELUDE + POOL, loop, before) == [*told, "works"]
