"""The program ends while queries run or wait: promptly, silently, with its own status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import HEARS_CTRL_C

pytestmark = pytest.mark.slow

PRELUDE = """
import sys
loop, mode, *_ = [*sys.argv[1:], "", ""]
if loop.endswith("before"):
    import gevent.monkey; gevent.monkey.patch_all()
import atexit, os, signal, threading, time
import polars as pl
import polars_async as pa
from polars_async._runtime import unpatched
from polars_async.scheduling import shutdown

after = []  # atexit calls them once the collectors are closed
atexit.register(lambda: [function() for function in after])
TINY = pl.LazyFrame({"a": [1]})
collector = pa.Collector(max_running=4)  # two of them are kept for small queries
begun = unpatched.allocate_lock()
begun.acquire()

def say(word):  # at once, and from any thread
    os.write(1, f"{word}\\n".encode())

def nap(seconds=0.001):  # gevent patches time.sleep
    lock = unpatched.allocate_lock()
    lock.acquire()
    lock.acquire(timeout=seconds)

def wait_until_begun():
    assert begun.acquire(timeout=60)

def begin():
    if begun.locked():
        begun.release()

def last():
    try:
        begin()
        while True:
            nap()
    finally:
        say("left")

def udf(function, *arguments):
    return TINY.map_batches(lambda df: function(*arguments))

def leave(patience=60):  # so that whoever needs all of it is not back in time for the test
    wait_until_begun()
    shutdown._PATIENCE = shutdown._AGAIN = patience
    sys.exit(7)
"""


def end(program, *arguments):
    """Run a program; gives its status, what it said, and what it complained of."""
    command = [sys.executable, "-c", HEARS_CTRL_C + PRELUDE + program, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    return run.returncode, run.stdout.split(), run.stderr


AWAITED = """
frames = [udf(last) for _ in range(2)] + [udf(say, "waited") for _ in range(20)]
if loop in ("asyncio", "uvloop"):
    import asyncio, uvloop
    async def main():
        tasks = [asyncio.ensure_future(asyncio.wait_for(collector.collect_async(frame), None))
                 for frame in frames]
        await asyncio.sleep(0)
        leave()
    (asyncio if loop == "asyncio" else uvloop).run(main())
elif loop == "trio":
    import trio
    async def wait(handle):
        await handle
    async def main():
        async with trio.open_nursery() as nursery:
            for frame in frames:
                nursery.start_soon(wait, collector.collect_async(frame))
            await trio.sleep(0)
            wait_until_begun()
            begin()
            nursery.cancel_scope.cancel()
    trio.run(main)
elif "gevent" in loop:
    import gevent
    for frame in frames:
        gevent.spawn(collector.collect_async(frame, gevent=True).get)
    gevent.sleep(0)
else:
    handles = [collector.collect_async(frame) for frame in frames]
    for handle in handles:
        threading.Thread(target=handle.result, daemon=True).start()
leave()
"""


@pytest.mark.parametrize(
    "loop", ["asyncio", "uvloop", "trio", "gevent", "gevent patched before", "thread"]
)
def test_what_runs_is_ended_and_what_waits_is_cancelled(loop):
    status, said, complaints = end(AWAITED, loop)
    assert (status, set(said), complaints) == (7, {"left"}, "")


MAKING_COLLECTORS = """
sys.setswitchinterval(1e-6)
made = [pa.Collector() for _ in range(300)]
def make():
    while True:
        made.append(pa.Collector())
for _ in range(3):
    threading.Thread(target=make, daemon=True).start()
nap(0.05)
sys.exit(7)
"""


def test_threads_that_make_collectors_meanwhile_do_no_harm():
    assert end(MAKING_COLLECTORS) == (7, [], "")


ENDINGS = """
def spin():
    try:
        begin()
        while True:
            pass
    finally:
        say("left")

collector.collect_async(udf(spin))
wait_until_begun()
shutdown._PATIENCE = shutdown._AGAIN = 60
"""


@pytest.mark.parametrize(
    ("ending", "status", "complaint"),
    [
        ("", 0, []),
        ("sys.exit('no')", 1, ["no"]),
        ("1 / 0", 1, ["ZeroDivisionError: division by zero"]),
        ("os.kill(os.getpid(), signal.SIGINT); nap(5)", -2, ["KeyboardInterrupt"]),
    ],
)
def test_status_is_that_of_the_program(ending, status, complaint):
    ended, said, complaints = end(ENDINGS + ending)
    assert (ended, said, complaints.splitlines()[-1:]) == (status, ["left"], complaint)


ON_POLARS_THREADS = """
class File:
    def write(self, data):
        last()

columns = pl.LazyFrame({name: [1, 2, 3] for name in "abcd"})
elements = columns.select(pl.all().map_elements(lambda value: last(), return_dtype=pl.Int64))
frame, engine = {
    "in-memory": (elements, "in-memory"),
    "streaming": (elements, "streaming"),
    "file": (columns.sink_csv(File(), lazy=True), "streaming"),
}[loop]
collector.collect_async(frame, engine=engine)
leave()
"""


@pytest.mark.parametrize("kind", ["in-memory", "streaming", "file"])
def test_udf_on_a_thread_of_polars_is_ended(kind):
    status, said, complaints = end(ON_POLARS_THREADS, kind)
    assert (status, set(said), complaints) == (7, {"left"}, "")


IN_BETWEEN = """
long = pl.LazyFrame({"k": pl.int_range(200_000, eager=True)})
for _ in range(200):
    long = long.with_columns(pl.col("k").hash()).sort("k").map_batches(lambda df: (begin(), df)[1])
for _ in range(2):
    collector.collect_async(long)
leave(patience=1)
"""


def test_polars_own_python_is_left_alone():
    assert end(IN_BETWEEN) == (7, [], "")


LOOKING = """
from polars_async._runtime import upstream

write = upstream.serialized._Text.write
def write_slowly(text, piece):
    begin()
    nap(0.3)
    return write(text, piece)

class Late:  # so that there still is a program when the thread is back
    def __del__(self, sleep=time.sleep):
        sleep(1)

threading.late = Late()
upstream.serialized._Text.write = write_slowly
slow = TINY.map_batches(lambda df: (nap(0.05), df)[1])
collector.collect_async(slow).result()  # at whose plan its thread looks afterwards
leave()
"""


def test_look_at_a_plan_is_waited_for():
    assert end(LOOKING) == (7, [], "")


TIDY = """
def tidy():
    try:
        begin()
        while True:
            nap()
    finally:
        nap(0.5)
        say("tidied")

if loop == "seldom":  # as where other processes leave this one no processor
    shutdown.sleep = lambda _: nap(0.2)
collector.collect_async(udf(tidy))
leave()
"""


@pytest.mark.parametrize("looks", ["often", "seldom"])
def test_udf_has_the_time_to_tidy_up(looks):
    assert end(TIDY, looks) == (7, ["tidied"], "")


LONG = """
long = pl.LazyFrame({"k": pl.int_range(300_000, eager=True)})
for _ in range(1000):
    long = long.with_columns(pl.col("k").hash()).sort("k")
collector.collect_async(long)
begin()
leave()
"""


def test_long_query_without_a_udf_is_left_behind_at_once():
    assert end(LONG) == (7, [], "")


BLOCKED = """
reader, writer = os.pipe()

class Ending:  # takes its time, after the interpreter has begun to end threads
    def __del__(self, write=os.write, writer=writer, nap=nap):
        write(writer, b"x")
        nap(0.5)

def blocked():
    begin()
    os.read(reader, 1)

sys.ending = Ending()
collector.collect_async(udf(blocked))
wait_until_begun()
sys.exit(7)
"""


def test_udf_that_comes_back_in_the_midst_of_the_exit_aborts_nothing():
    assert end(BLOCKED) == (7, [], "")


CTRL_C = """
signal.signal(signal.SIGALRM, signal.default_int_handler)
shutdown.sleep = lambda _: signal.raise_signal(signal.SIGALRM)
collector.collect_async(udf(lambda: (begin(), nap(600))))
leave(600)
"""


def test_ctrl_c_meanwhile_hastens_the_exit():
    assert end(CTRL_C) == (7, [], "")


NESTED = """
def nested():
    try:
        collector.collect_async(udf(last)).result()
    finally:
        say("left")

collector.collect_async(udf(nested))
leave()
"""


def test_udf_that_waits_for_a_query_is_ended_too():
    assert end(NESTED) == (7, ["left"] * 2, "")


AT_EXIT = """
from concurrent.futures import CancelledError

def try_all():
    for ask in collector.collect_async, pa.Collector().collect_async, pa.collect_async:
        try:
            ask(TINY)
        except pa.CollectorClosedError:
            say("closed")
    try:
        handle.result()
    except CancelledError:
        say("cancelled")

after.append(try_all)
handle = collector.collect_async(udf(lambda: (begin(), nap(60))))
wait_until_begun()
atexit.register(lambda: say(len(collector.collect_async(TINY).result())))
sys.exit(7)
"""


def test_functions_of_atexit_find_the_collector_as_it_was_or_closed():
    assert end(AT_EXIT) == (7, ["1", "closed", "closed", "closed", "cancelled"], "")


FIRST_AT_EXIT = """
import atexit, os, sys, threading
import polars as pl

begun = threading.Event()

def say(word):
    os.write(1, f"{word}\\n".encode())

def spin(frame):
    try:
        begun.set()
        while True:
            pass
    finally:
        say("left")

def ask():
    import polars_async as pa
    from polars_async.scheduling import shutdown
    shutdown._PATIENCE = shutdown._AGAIN = 60
    collector = pa.Collector()
    spinning = pl.LazyFrame({"a": [1]}).map_batches(spin)
    collector.collect_async(spinning)
    assert begun.wait(60)
    if sys.argv[1] == "spins":
        atexit.register(say, "never called")
        return
    say("asked")
    say(pa.collect_async(pl.LazyFrame({"a": [2]})).result().item())

def ask_again():
    import polars_async as pa
    say(pa.collect_async(pl.LazyFrame({"a": [3]})).result().item())

atexit.register(ask_again)
atexit.register(ask)
"""


@pytest.mark.parametrize("what", ["spins", "waits too"])
def test_first_query_that_an_atexit_function_asks_for_is_ended_too(run_script, what):
    asked = [] if what == "spins" else ["asked", "2"]
    assert run_script(FIRST_AT_EXIT, what) == [*asked, "3", "left"]


CLEARED = """
import atexit, os, warnings
import polars as pl
import polars_async as pa

warnings.simplefilter("ignore")  # Python's of the fork
pa.default_collector()
child = os.fork()
if not child:
    atexit._clear()  # as multiprocessing does, from Python 3.13 on
    print(pa.collect_async(pl.LazyFrame({"a": [1]})).result().item(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def test_child_that_forgets_what_atexit_was_to_call_goes_on(run_script):
    assert run_script(CLEARED) == ["1"]


OTHERS = """
import asyncio
from functools import partial
sys.path.append(os.environ["TESTS"])
from places import named_thread, on_foreign_thread

def work():
    try:
        while True:
            nap()
    except BaseException:
        say("hit")

def wait(handle):
    try:
        handle.result()
    finally:
        say("told")

for _ in range(3):  # the last one waits for its turn
    threading.Thread(
        target=wait, args=(collector.collect_async(udf(last)),), daemon=True
    ).start()
async def in_task():
    await collector.collect_async(TINY)

loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
asyncio.run_coroutine_threadsafe(in_task(), loop)
def as_polars(name):
    with named_thread(name):
        work()

threading.Thread(target=work, daemon=True).start()
unpatched.start_new_thread(work, ())
for name in "polars-0", "tokio-rt-worker", "async-executor-":
    unpatched.start_new_thread(as_polars, (name,))
    unpatched.start_new_thread(on_foreign_thread, (partial(as_polars, name),))
nap(0.05)
with open("/proc/self/comm", "w") as name:  # of the main thread
    name.write("polars-0")
leave()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names threads as Linux does")
def test_threads_of_the_program_are_left_alone(monkeypatch):
    monkeypatch.setenv("TESTS", str(Path(__file__).parent))
    status, said, complaints = end(OTHERS)
    assert (status, set(said), complaints) == (7, {"left"}, "")


REGISTERED = """
import atexit
import polars
import weakref
weakref.finalize(polars, print).detach()  # registers a function of its own, once
before = atexit._ncallbacks()
from polars_async import Collector
print(atexit._ncallbacks() - before)
for _ in range(2):
    Collector()
    print(atexit._ncallbacks() - before)
"""


def test_import_registers_nothing(run_script):
    assert run_script(REGISTERED) == ["0", "1", "1"]


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_what_outlives_its_modules_ends_in_silence(run_script, executor):
    assert run_script(CLEARED_LATE, executor) == ["100000"]


# What the starter of a frozen program does not let go of, it does not lose before all modules
# imported since have been cleared.
CLEARED_LATE = """
import ctypes, sys
import polars as pl
import polars_async as pa
ctypes.pythonapi.Py_IncRef(ctypes.py_object(sys.modules["__main__"]))
lf = pl.LazyFrame({"a": range(100_000)})
collector = pa.Collector(executor=sys.argv[1])
handle = collector.collect_async(lf)
print(handle.result().height)
completions = collector.as_completed([lf, lf])
batches = collector.collect_batches_async(lf, chunk_size=1)
background = collector.collect_background(lf)
shared = pa.share(pl.DataFrame({"a": range(100)}))
held = handle.result()
of_the_process = pa.collect_async(lf)
engine = pa.AsyncEngine(collector)
"""
