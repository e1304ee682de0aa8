"""Under gevent's patch: nothing green is touched on native threads, nor left behind there."""

from __future__ import annotations

import pytest

LOGGING = """
from gevent import monkey; monkey.patch_all()
import gevent, logging, os, sys, threading
import polars as pl, polars_async as pa
from polars_async._runtime import unpatched

get_ident, lock, heard, elsewhere = unpatched.get_ident, threading.Lock(), {}, 0
main = get_ident()

class Handler(logging.StreamHandler):
    def emit(self, record):
        super().emit(record)
        note()

def note():
    global elsewhere
    elsewhere += get_ident() != main

def hook(event):
    note()
    with lock:
        gevent.sleep(0)
        heard.setdefault(event.label, []).append(str(event.kind))

logging.basicConfig(level=logging.DEBUG, handlers=[Handler(open(os.devnull, "w"))])
log = logging.getLogger("program")
collector = pa.Collector(max_running=2, on_event=hook, executor=sys.argv[1])

def ask(number):
    for turn in range(20):
        log.info("asks")
        label, late = f"{number} {turn}", turn % 4 == 0
        query = pl.LazyFrame({"a": [number]}).sum()
        handle = collector.collect_async(
            query, gevent=True, label=label, timeout=1e-6 if late else 3600
        )
        try:
            assert handle.get().item() == number
        except pa.QueryTimeoutError:
            assert late
            while heard[label][-1] != "timed_out":  # told later if the start was being told
                gevent.sleep(0.001)
        kinds = heard[label]
        assert kinds[0] == "queued", kinds
        assert kinds[-1] in {"finished", "timed_out"}, kinds
        assert kinds in (["queued", kinds[-1]], ["queued", "started", kinds[-1]]), kinds

gevent.joinall([gevent.spawn(ask, number) for number in range(20)], raise_error=True)
collector.collect_async(pl.LazyFrame({"a": [1]}), label="last")
collector.close(cancel_waiting=False)
print(len(heard), heard["last"][-1], elsewhere)
"""


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_patched_program_that_logs_and_has_a_hook_hears_all_on_its_own_thread(run_script, executor):
    assert run_script(LOGGING, executor) == ["401", "finished", "0"]


BLOCKING = """
from gevent import monkey; monkey.patch_all()
import polars as pl, polars_async as pa

heard = []
collector = pa.Collector(on_event=lambda event: heard.append(str(event.kind)))
collector.collect_async(pl.LazyFrame({"a": [1]})).result()
print(*heard)
collector.collect_async(pl.LazyFrame({"a": [1]}).map_batches(lambda df: 1 / 0), gevent=True)
collector.close(cancel_waiting=False)
print(*heard[3:])
"""


def test_patched_program_has_heard_of_an_end_when_it_has_waited_for_it(run_script):
    assert run_script(BLOCKING) == [
        *["queued", "started", "finished", "queued", "started", "failed"]
    ]


HUBS = """
from gevent import monkey
if {patched}: monkey.patch_all()
import gc, os, gevent
from gevent.hub import Hub
import polars as pl, polars_async as pa
from polars_async._runtime import unpatched

def hubs():
    gc.collect()
    return sum(isinstance(each, Hub) and not each.dead for each in gc.get_objects())

def files():
    return len(os.listdir("/proc/self/fd"))

def green(df):
    gevent.sleep(0)
    return df

def ask():
    collector = pa.Collector()
    handle = collector.collect_async(pl.LazyFrame({{"a": [1]}}).map_batches(green), timeout=60)
    handle.result()
    collector.close()

gevent.sleep(0)
ask()
begun = hubs(), files()
for _ in range(10):
    ask()
for _ in range(200):
    if hubs() <= begun[0] and files() <= begun[1]:
        break
    unpatched.sleep(0.01)
print(hubs() <= begun[0], files() <= begun[1])
"""


@pytest.mark.parametrize("patched", [True, False])
def test_thread_of_a_query_that_touched_what_is_green_leaves_no_hub_and_no_file(
    run_script, patched
):
    assert run_script(HUBS.format(patched=patched)) == ["True", "True"]
