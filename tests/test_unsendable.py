"""What cannot be sent to another process: the error that names it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import polars as pl
import pytest

import polars_async as pa

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux"),
    pytest.mark.filterwarnings("ignore::polars.exceptions.PolarsInefficientMapWarning"),
]

ELSEWHERE = "nothing is sent there"
ONE = pl.LazyFrame({"a": [1]})


def in_expression(function):
    return ONE.select(pl.col("a").map_elements(function, return_dtype=pl.Int64))


def reason_of(collector, query):
    with pytest.raises(pa.PolarsAsyncError) as caught:
        collector.collect_async(query).result(30)
    return str(caught.value)


@pytest.fixture(scope="module")
def processes():
    with pa.Collector(executor="processes") as collector:
        yield collector


CANNOT_BE_SENT = {
    "a lock": ("__import__('threading').Lock()", "_thread.lock"),
    "a thread": ("__import__('threading').Thread()", "threading.Thread"),
    "a file": ("open('/dev/null', 'wb')", "_io.BufferedWriter"),
    "a socket": ("__import__('socket').socket()", "socket.socket"),
    "a generator": ("(x for x in [])", "generator"),
}


@pytest.mark.everywhere
@pytest.mark.cannot("threads", because=ELSEWHERE)
@pytest.mark.parametrize("what", CANNOT_BE_SENT)
def test_global_that_cannot_be_sent_is_named(collector, main, what):
    code, kind = CANNOT_BE_SENT[what]
    names = main(f"held = {code}\ndef use(x): return held and x\ndef ask(x): return use(x)\n")
    ask = names["ask"]
    queries = [
        ONE.map_batches(ask),
        ONE.map_batches(lambda frame: frame and ask(frame)),
        in_expression(ask),
        ONE.select(pl.col("a").map_batches(ask, return_dtype=pl.Int64)),
    ]
    try:
        reasons = [reason_of(collector, query) for query in queries]
    finally:
        getattr(names["held"], "close", bool)()
    culprit = f"the global 'held' of the function 'use', which is a {kind}, cannot be pickled"
    assert all(culprit in reason for reason in reasons)
    assert all("Have the function make it, or put both into a module" in each for each in reasons)
    assert collector.collect_async(ONE).result(30).item() == 1


class Holder:
    def __init__(self, held):
        self.held = held

    def method(self, frame):
        return self.held and frame


def holding(held, other=None):
    def function(frame, default=other):
        return held and default and frame

    return function


LOCK = threading.Lock()
WHERE = {
    "variable": (holding(LOCK), "the variable 'held' of the function 'holding.<locals>.function'"),
    "default": (holding(1, LOCK), "a default of the function 'holding.<locals>.function'"),
    "container": (holding([{"a": LOCK}]), "the variable 'held' of the function 'holding.<local"),
    "object": (
        holding(Holder(LOCK)),
        "of the function 'holding.<locals>.function', in it the attribute 'held', which is a",
    ),
    "method": (Holder(LOCK).method, "the attribute 'held', which is a _thread.lock"),
    "global": (lambda frame: LOCK and frame, "the global 'LOCK' of the function '<lambda>'"),
    "comprehension": (
        lambda frame: [LOCK for _ in frame],
        "the global 'LOCK' of the function '<lambda>'",
    ),
}


@pytest.mark.parametrize("where", WHERE)
def test_place_of_what_cannot_be_sent_is_named(processes, where):
    function, words = WHERE[where]
    for query in (ONE.map_batches(function), in_expression(function)):
        reason = reason_of(processes, query)
        assert words in reason
        assert "which is a _thread.lock" in reason


def test_open_file_that_is_read_is_named_and_no_function(processes, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a\n1\n")
    with path.open("rb") as file:
        reason = reason_of(processes, pl.scan_csv(file))
    assert "it reads an open file: give it the path of the file" in reason
    assert "function" not in reason


def test_column_of_python_objects_is_named_and_no_function(processes):
    frame = pl.DataFrame({"a": pl.Series([object()], dtype=pl.Object)})
    reason = reason_of(processes, frame.lazy())
    assert "a column of Python objects" in reason
    assert "function" not in reason


def test_namespace_that_cannot_be_sent_is_named_where_it_is_used(processes, main):
    main(
        """
import threading
import polars as pl
LOCK = threading.Lock()
@pl.api.register_dataframe_namespace("locked")
class Locked:
    def __init__(self, frame):
        self.frame = frame
    def get(self):
        with LOCK:
            return self.frame
"""
    )
    try:
        with pytest.raises(
            AttributeError, match=r"the global 'LOCK' of the function 'Locked\.get'"
        ):
            processes.collect_async(ONE.map_batches(lambda frame: frame.locked.get())).result(30)
    finally:
        del pl.DataFrame.locked
        pl.DataFrame._accessors.discard("locked")


def test_what_a_function_of_a_script_can_do_without_is_not_asked_for_in_vain(processes, main):
    main("import threading\nlock = threading.Lock()\n")

    def ask(frame):
        return frame * (2 if hasattr(sys.modules["__main__"], "lock") else 3)

    assert processes.collect_async(ONE.map_batches(ask)).result(30).item() == 3


WITHOUT = """
import sys

class Missing:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {"cloudpickle", "pyarrow"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing)
"""
PROGRAM = """
import multiprocessing, warnings
from concurrent.futures import ProcessPoolExecutor
import polars as pl, polars_async as pa

warnings.simplefilter("ignore")

def named(frame):
    return frame

def each(value):
    return value + 1

if __name__ == "__main__":
    numbers = pl.LazyFrame({"a": [1]})
    queries = {
        "plain": numbers,
        "named": numbers.map_batches(named),
        "nameless": numbers.map_batches(lambda frame: frame),
        "expression": numbers.select(pl.col("a").map_elements(each, return_dtype=pl.Int64)),
    }
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    for executor in ("processes", "auto", pool):
        with pa.Collector(executor=executor, max_running=1) as collector:
            for name, query in queries.items():
                try:
                    collector.collect_async(query).result(100)
                except pa.PolarsAsyncError as error:
                    assert "install cloudpickle, or polars-async[processes]" in str(error), error
                    print(f"{name}-told")
                else:
                    print(f"{name}-ran")
            for name, function in {"call": len, "nameless-call": lambda text: len(text)}.items():
                try:
                    print(f"{name}-{collector.run(function, 'abc').result(100)}")
                except pa.PolarsAsyncError as error:
                    assert "install cloudpickle, or polars-async[processes]" in str(error), error
                    print(f"{name}-told")
    pool.shutdown()
"""


def test_program_without_the_extra_is_told_of_it_at_each_function(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)  # for worker processes, too
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    )
    in_workers = ["plain-ran", "named-told", "nameless-told", "expression-told"]
    in_workers += ["call-3", "nameless-call-told"]
    here = [name.replace("told", "ran") for name in in_workers[:-1]] + ["nameless-call-3"]
    in_pool = ["plain-ran", "named-ran", *in_workers[2:]]  # it imports the program anew
    assert done.stdout.split() == [*in_workers, *here, *in_pool]
