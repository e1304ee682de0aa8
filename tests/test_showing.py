"""Progress bars: what is drawn in a terminal and in a notebook, and where nothing is."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from time import sleep

import polars as pl
import pytest
from places import TINY, until

import polars_async as pa
from polars_async import Collector, Progress, drawing, showing
from polars_async.drawing import Bar
from polars_async.executors.meters import LocalMeter

PROGRAM = """
import sys, time
import polars as pl, polars_async as pa

def wait(values):
    time.sleep(0.1)
    return values

if sys.argv[2] == "tqdm":
    sys.modules["rich"] = sys.modules["rich.console"] = sys.modules["rich.progress"] = None
if __name__ == "__main__":
    pa.configure(executor=sys.argv[1], progress=True)
    lf = pl.scan_parquet(sys.argv[3]).select(pl.col("a").map_batches(
        wait, is_elementwise=True, return_dtype=pl.Int64)).group_by(pl.col("a") % 7).len()
    handle = pa.collect_async(lf, engine="streaming", label="the {numbers}")
    print(pa.show_progress(handle).result().height)
"""
PLAIN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    path = tmp_path_factory.mktemp("numbers") / "numbers.parquet"
    pl.select(a=pl.int_range(0, 2_000_000)).write_parquet(path, row_group_size=100_000)
    return path


def in_terminal(command):
    """Run a program whose stderr is a terminal; return what it prints, and what it draws there."""
    import pty  # noqa: PLC0415  # not everywhere
    import termios  # noqa: PLC0415  # as above

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 150))
    drawn: list[bytes] = []

    def read():
        with suppress(OSError):  # once nothing has the other end open
            while data := os.read(ours, 1 << 16):
                drawn.append(data)

    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True
    ) as program:
        os.close(theirs)
        reader = threading.Thread(target=read)
        reader.start()
        printed, _ = program.communicate(timeout=150)
        reader.join()
    os.close(ours)
    assert program.returncode == 0
    return printed, PLAIN.sub("", b"".join(drawn).decode())


def shares(text):
    return [int(found) for found in re.findall(r"(\d+) %", text)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="it has no pseudo-terminals")
@pytest.mark.parametrize("by", ["rich", "tqdm"])
@pytest.mark.parametrize("place", ["threads", "processes"])
def test_bar_in_a_terminal_rises_to_100_percent(place, by, numbers, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    printed, drawn = in_terminal([sys.executable, program, place, by, str(numbers)])
    assert printed == "7\n"
    assert "the {numbers}" in drawn
    seen = shares(drawn)
    assert seen == sorted(seen)
    assert seen[-1] == 100
    assert any(0 < each < 100 for each in seen)
    assert re.search(r"100 %\s+completed, [\d.]+ s, 2,000,000 rows", drawn)


@pytest.mark.slow
def test_bar_in_a_notebook_rises_to_100_percent(numbers):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat.v4")
    pytest.importorskip("ipykernel")
    # With no progress=True: the session is interactive.
    cells = [
        f"""
import time
import polars as pl, polars_async as pa

def wait(values):
    time.sleep(0.1)
    return values

lf = pl.scan_parquet({str(numbers)!r}).select(pl.col("a").map_batches(
    wait, is_elementwise=True, return_dtype=pl.Int64)).group_by(pl.col("a") % 7).len()
handle = pa.show_progress(pa.collect_async(lf, engine="streaming", label="<numbers>"))
""",
        "print((await handle).height)",
    ]
    notebook = nbformat.new_notebook(cells=[nbformat.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3")
    drawn: list[dict[str, str]] = []
    take = client.process_message

    def note(message, *others):
        if message["msg_type"] == "update_display_data":
            drawn.append(message["content"]["data"])
        return take(message, *others)

    client.process_message = note
    client.execute()
    seen = [share for each in drawn for share in shares(each["text/plain"])]
    assert seen == sorted(seen)
    assert seen[-1] == 100
    assert any(0 < each < 100 for each in seen)
    (shown,), (printed,) = (cell.outputs for cell in notebook.cells)
    assert re.fullmatch(
        r"<numbers>: 100 % completed, [\d.]+ s, 2,000,000 rows(, [\d.]+ .B)?",
        shown["data"]["text/plain"],
    )
    assert "<td>&lt;numbers&gt;</td>" in shown["data"]["text/html"]
    assert 'value="1.000"' in shown["data"]["text/html"]
    assert printed["text"] == "7\n"


class Drawn(list):
    """Stands in for a terminal."""

    ended = False

    def draw(self, bars):
        self.append(bars)

    def end(self):
        self.ended = True


@pytest.fixture
def drawn(monkeypatch):
    drawn = Drawn()
    monkeypatch.setattr(showing, "drawing", lambda: drawn)
    yield drawn
    until(lambda: drawn.ended)


@pytest.mark.usefixtures("drawn")
def test_what_was_given_is_returned_at_once(blocked):
    with Collector() as collector:
        handle = collector.collect_async(blocked.lf, label="a")
        assert pa.show_progress(handle) is handle
        assert blocked.started.wait(30)
        handles = [collector.collect_async(TINY, label="b"), collector.collect_async(TINY)]
        assert pa.show_progress(handles) is handles
        stream = collector.as_completed([TINY, TINY])
        assert pa.show_progress(stream) is stream
        blocked.gate.set()


def test_end_is_drawn_before_the_waiters_are_woken(drawn, blocked, monkeypatch):
    draw = Drawn.draw

    def take_a_while(self, bars):
        sleep(0.05)
        draw(self, bars)

    monkeypatch.setattr(Drawn, "draw", take_a_while)
    with Collector() as collector:
        handle = pa.show_progress(collector.collect_async(blocked.lf, label="a"), every=3600)
        assert blocked.started.wait(30)
        assert not handle.done()
        blocked.gate.set()
        handle.result(30)
        (last,) = drawn[-1]
        assert (last.name, last.fraction) == ("a", 1.0)
        assert last.told.startswith("completed, ")


def test_query_that_is_shown_is_cancelled_when_nothing_waits_for_it(drawn, blocked):
    with Collector() as collector:
        handle = pa.show_progress(collector.collect_async(blocked.lf))
        handle.close()  # as when the task of a loop is cancelled before it has begun
        assert handle.done()
        blocked.gate.set()
        until(lambda: drawn.ended)
        assert drawn[-1][0].told.startswith("cancelled")


def test_many_queries_share_a_bar(drawn):
    with Collector() as collector:
        stream = pa.show_progress(collector.as_completed([TINY] * 9))
        assert len(list(stream)) == 9
        until(lambda: drawn.ended)
        (last,) = drawn[-1]
        assert (last.name, last.fraction, last.told) == ("queries", 1.0, "9 of 9 done")


@pytest.mark.usefixtures("small_frames")
def test_callers_of_a_shared_run_have_a_bar_each(drawn, blocked, numbers):
    options = {"single_flight": True, "progress": True, "max_running": 1, "engine": "streaming"}
    query = pl.scan_parquet(numbers).select(pl.col("a").sum())
    with Collector(**options) as collector:
        collector.collect_async(blocked.lf)
        assert blocked.started.wait(30)
        handles = [collector.collect_async(query, label=label) for label in "ab"]
        pa.show_progress(handles)
        until(lambda: drawn)
        assert [bar.told for bar in drawn[-1]] == ["waiting", "waiting"]
        # As if it ran, and for long.
        run = handles[0]._query.run_of_it
        run.meter = LocalMeter(())
        assert showing._bar_of(handles[0]._query, Progress(state="running", seconds=9.0)) == Bar(
            "a", None, "9.0 s"
        )
        run.meter = None
        blocked.gate.set()
        until(lambda: drawn.ended)
        assert [(bar.name, bar.fraction) for bar in drawn[-1]] == [("a", 1.0), ("b", 1.0)]
        assert all("2,000,000 rows" in bar.told for bar in drawn[-1])


def test_query_that_waits_and_one_that_is_not_counted_say_so(drawn, blocked):
    with Collector(max_running=1) as collector:
        handles = [
            collector.collect_async(blocked.lf, engine="streaming", label="first"),
            collector.collect_async(TINY, label="second"),
        ]
        assert blocked.started.wait(30)
        handles[0]._query.times.started -= 10
        pa.show_progress(handles)
        until(lambda: drawn)
        first, second = drawn[-1]
        assert "not counted since it began before" in first.told
        assert (second.name, second.fraction, second.told) == ("second", None, "waiting")
        blocked.gate.set()


def test_drawing_that_fails_costs_no_query(monkeypatch, caplog):
    def draw(_):
        raise BrokenPipeError

    drawn = Drawn()
    drawn.draw = draw
    monkeypatch.setattr(showing, "drawing", lambda: drawn)
    with Collector() as collector:
        handle = pa.show_progress(collector.collect_async(TINY))
        assert handle.result(30).item() == 1
        until(lambda: "cannot be drawn" in caplog.text)


def test_nothing_is_drawn_where_stderr_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert drawing.drawing() is None
    monkeypatch.setattr(sys, "stderr", None)
    assert drawing.drawing() is None


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_needs_rich_or_tqdm(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for name in ("rich.console", "rich.progress", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    with Collector() as collector:
        handle = collector.collect_async(TINY)
        with pytest.raises(ImportError, match=r"needs rich or tqdm: install .*\[progress\]"):
            pa.show_progress(handle)


@pytest.mark.parametrize("shown", [1, "abc", None, [TINY], (each for each in [])])
def test_other_objects_are_refused(shown):
    with pytest.raises(TypeError, match=r"takes a handle, a collection of handles, or the stream"):
        pa.show_progress(shown)


def test_nothing_to_show_is_no_error():
    assert pa.show_progress([]) == []


def test_share_is_rounded_down():
    (text,) = repr(drawing._Bars([Bar("a", 0.999, "nearly")])).splitlines()
    assert text == "a: 99 % nearly"
