"""Queries on several engines, in real processes, on data that says nothing about their speed."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from datetime import date
from decimal import Decimal

import polars as pl
import pytest

import polars_async as pa
from polars_async import cli
from polars_async.compare import charts, engines
from polars_async.compare import command as command_module
from polars_async.compare.agreement import Order, examine, judge
from polars_async.compare.file import find_queries, import_file, split_argument
from polars_async.compare.order import order_of
from polars_async.compare.progress import ProgressLine
from polars_async.compare.table import amount, duration
from polars_async.compare.values import alike
from polars_async.resolution import ENGINE_NAMES
from polars_async.testing import simulate_gpu

CPU = ["in-memory", "streaming"]
LF = pl.LazyFrame({"a": [3, 1, 2], "b": ["x", "y", "z"]})

needs_charts = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ["altair", "vl_convert"])),
    reason="polars-async[charts] is not installed",
)


class Doubling(pl.Engine):
    """An engine whose answers are wrong."""

    name = "doubling"

    def collect(self, lf, *, optimizations, **_):
        frame = lf.collect(engine="in-memory", optimizations=optimizations)
        return frame.with_columns(pl.col("a") * 2)


Doubling.__abstractmethods__ = frozenset()


def result(found, engine, query="query"):
    (one,) = [each for each in found.results if (each.query, each.engine) == (query, engine)]
    return one


def fail(_frame):
    raise RuntimeError("it\nbroke")


def die(frame):
    os.kill(os.getpid(), signal.SIGKILL)
    return frame


def leave(_frame):
    os._exit(3)


# What is measured


def test_each_engine_has_its_figures_and_all_agree():
    steps = []
    found = pa.compare_engines(LF, engines=CPU, runs=3, progress=lambda *step: steps.append(step))
    assert [(each.query, each.engine) for each in found.results] == [
        ("query", "in-memory"),
        ("query", "streaming"),
    ]
    for each in found.results:
        assert each.status == "ran"
        assert len(each.seconds) == 3
        assert 0 < each.min <= each.median <= each.max
        assert 10e6 < each.peak_memory < 10e9
        assert (each.rows, each.ran_on, each.agrees, each.message) == (3, each.engine, True, None)
        assert each.compared_with == "in-memory"
    assert found.agrees
    assert found.runs == 3
    assert found.versions["polars"] == pl.__version__
    assert [(done, total) for _, done, total in steps] == [(0, 8), *((n, 8) for n in range(8))]
    turns = [what for what, _, _ in steps if "run 1" in what or "run 2" in what]
    assert turns == [
        "query on in-memory: run 1 of 3",
        "query on streaming: run 1 of 3",
        "query on streaming: run 2 of 3",
        "query on in-memory: run 2 of 3",
    ]


def test_each_query_and_engine_has_a_process_of_its_own(tmp_path):
    def note(frame):
        (tmp_path / str(os.getpid())).touch()
        return frame

    noting = LF.map_batches(note)
    pa.compare_engines({"one": noting, "two": lambda: noting}, engines=CPU, runs=1)
    pids = {int(each.name) for each in tmp_path.iterdir()}
    assert len(pids - {os.getpid()}) == 4
    for pid in pids - {os.getpid()}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_memory_is_that_of_the_process_alone():
    held = pl.DataFrame({"a": range(30_000_000)})  # 240 MB here, which no process needs
    (one,) = pa.compare_engines(LF, engines=["in-memory"], runs=1).results
    frames = pl.LazyFrame({"a": [1]}).select(pl.int_range(20_000_000).reverse().sum())
    (large,) = pa.compare_engines(frames, engines=["in-memory"], runs=1).results
    assert held.height
    assert large.peak_memory > one.peak_memory + 100e6
    assert one.peak_memory < held.estimated_size()


def test_memory_that_the_file_took_while_it_was_imported_does_not_count(file):
    path = file.with_name("takes_memory.py")
    path.write_text(
        "import polars as pl\nheld = b'x' * 400_000_000\ndel held\nlf = pl.LazyFrame({'a': [1]})\n"
    )
    found = engines.compare_file(path, [], engines=["in-memory"], runs=1)
    assert result(found, "in-memory", "lf").peak_memory < 400_000_000


def test_wrong_answer_of_an_engine_of_the_users_own_is_found():
    found = pa.compare_engines({"one": LF.sort("a")}, engines=[*CPU, Doubling()], runs=1)
    assert not found.agrees
    wrong = result(found, "doubling", "one")
    assert (wrong.agrees, wrong.compared_with, wrong.status) == (False, "in-memory", "ran")
    assert wrong.message == "row 1, a: 2 instead of 1"
    assert result(found, "streaming", "one").agrees
    assert "1 answers DIFFER" not in str(found)
    assert "1 answer DIFFERS: one on doubling." in str(found)


def test_engines_of_one_name_are_told_apart():
    engines = ["streaming", pl.StreamingEngine(), "in-memory"]
    found = pa.compare_engines(LF, engines=engines, runs=1)
    names = ["streaming", "streaming (2)", "in-memory"]
    assert [each.engine for each in found.results] == names
    assert {each.compared_with for each in found.results} == {"in-memory"}
    assert result(found, "streaming (2)").message is None


def test_without_in_memory_the_first_with_an_answer_is_the_reference():
    found = pa.compare_engines(LF, engines=["streaming", Doubling()], runs=1)
    assert [each.compared_with for each in found.results] == ["streaming", "streaming"]


def test_query_that_fails_is_a_result_and_the_others_go_on():
    messages = {
        fail: "it broke",
        die: "died by SIGKILL: if the kernel killed it for want of memory, its log says so",
        leave: "died with exit status 3: look for what ends the process, such as os._exit, in",
    }
    schema = LF.collect_schema()
    bad = {each.__name__: LF.map_batches(each, schema=schema) for each in messages}
    found = pa.compare_engines({**bad, "good": LF}, engines=CPU, runs=1)
    text = " ".join(str(found).split())
    for function, message in messages.items():
        for engine in CPU:
            one = result(found, engine, function.__name__)
            assert (one.status, one.seconds, one.median, one.agrees) == ("failed", (), None, None)
            assert message in one.message
            assert result(found, engine, "good").agrees
        assert f"in-memory, streaming: {one.message}" in text
    assert found.agrees
    assert "6 failed: fail on in-memory, fail on streaming, die on in-memory, " in text
    assert "GPU support of this query: " in text


def test_query_that_fails_on_one_engine_is_compared_on_the_others():
    class Failing(Doubling):
        name = "in-memory"

        def collect(self, *_, **__):
            raise MemoryError("too small")

    found = pa.compare_engines(LF, engines=[Failing(), "streaming", Doubling()], runs=1)
    assert result(found, "in-memory").message == "MemoryError: too small"
    assert result(found, "streaming").compared_with == "streaming"
    assert result(found, "doubling").message == "row 1, a: 6 instead of 3"


def test_function_that_raises_is_a_query_that_fails():
    found = pa.compare_engines(
        {"bad": lambda: pl.LazyFrame()["a"], "good": LF}, engines=CPU, runs=1
    )
    assert result(found, "in-memory", "bad").message.startswith("its function raises: TypeError: ")
    assert result(found, "streaming", "good").agrees
    assert found.gpu_support["bad"].answer == "unknown"


def test_what_cannot_be_sent_is_told_with_the_remedy():
    lock = threading.Lock()
    locking = LF.map_batches(lambda frame: lock and frame)
    found = pa.compare_engines(locking, engines=["in-memory"], runs=1)
    message = result(found, "in-memory").message
    assert "lock" in message
    assert "polars-async compare FILE" in message


def test_column_of_python_objects_is_measured_and_not_compared(file):
    path = file.with_name("of_objects.py")
    path.write_text("import polars as pl\nlf = pl.LazyFrame({'a': [object()] * 3})\n")
    found = engines.compare_file(path, [], engines=["in-memory"], runs=1)
    one = result(found, "in-memory", "lf")
    assert (one.status, one.agrees, one.rows) == ("ran", None, 3)
    assert one.message.startswith("the answer cannot be compared: ")


def test_interrupt_ends_all_processes(tmp_path):
    def note(frame):
        (tmp_path / str(os.getpid())).touch()
        return frame

    def interrupt(what, _done, _total):
        if "run 1" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pa.compare_engines(LF.map_batches(note), engines=CPU, runs=1, progress=interrupt)
    for each in tmp_path.iterdir():
        if int(each.name) != os.getpid():
            with pytest.raises(ProcessLookupError):
                os.kill(int(each.name), 0)


def test_rows_in_another_order_are_told_and_agree():
    class Reversing(Doubling):
        name = "reversing"

        def collect(self, lf, *, optimizations, **_):
            return lf.collect(engine="in-memory", optimizations=optimizations)[::-1]

    queries = {"open": LF, "sorted": LF.sort("a")}
    found = pa.compare_engines(queries, engines=["in-memory", Reversing()], runs=1)
    one = result(found, "reversing", "open")
    assert (one.agrees, one.reordered, one.message) == (True, True, None)
    fixed = result(found, "reversing", "sorted")
    assert (fixed.agrees, fixed.reordered) == (False, False)
    assert "\nreordered: the same rows in another order, which the query leaves open." in str(found)


# Engines


def test_every_engine_takes_part_that_has_a_name():
    expected = [name for name in ENGINE_NAMES if name != "auto"]
    with simulate_gpu(count=0):
        found = pa.compare_engines(LF, runs=1)
    assert [each.engine for each in found.results] == expected
    assert {"in-memory", "streaming", "gpu"} <= {*expected}


def test_unusable_gpu_is_listed_with_the_reason():
    with simulate_gpu(driver=None):
        why = pa.gpu_status().message
        found = pa.compare_engines(LF, engines=["streaming", "gpu", pl.GPUEngine()], runs=1)
    for name in ("gpu", "gpu (2)"):
        gpu = result(found, name)
        assert (gpu.status, gpu.message, gpu.agrees) == ("not run", why, None)
    assert "\ngpu: not run: " in str(found)
    assert found.agrees


def test_usable_gpu_takes_part_and_tells_what_ran():
    with simulate_gpu() as gpu:
        found = pa.compare_engines(LF, engines=["in-memory", "gpu"], runs=2)
        assert gpu.queries == 3
    assert (result(found, "gpu").ran_on, result(found, "gpu").message) == ("gpu", None)
    with simulate_gpu(fail="unsupported"):
        found = pa.compare_engines(LF, engines=["gpu"], runs=1)
    one = result(found, "gpu")
    assert (one.status, one.ran_on) == ("ran", "in-memory")
    assert "does not support" in one.message


def test_gpu_support_is_told_of_each_query():
    wrong = LF.select("no_such")
    found = pa.compare_engines({"one": LF, "wrong": wrong}, engines=["in-memory"], runs=1)
    assert found.gpu_support["one"] == pa.gpu_support(LF)
    assert found.gpu_support["wrong"].answer == "unknown"
    assert "no_such" in found.gpu_support["wrong"].message


@pytest.mark.skipif("adaptive" not in ENGINE_NAMES, reason="there is no such engine")
def test_adaptive_tells_which_engine_it_took():
    found = pa.compare_engines(LF, engines=["in-memory", "adaptive"], runs=2)
    adaptive = result(found, "adaptive")
    assert adaptive.ran_on in CPU
    assert adaptive.agrees
    assert adaptive.ran_on in adaptive.message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({},), ValueError, "queries must be a LazyFrame or a mapping that has some"),
        (({"a": 1},), TypeError, "'a' is int"),
        ((LF.collect(),), TypeError, r"'query' is DataFrame: add \.lazy\(\)"),
        (({"a": LF.collect},), TypeError, "'a' returns DataFrame"),
    ],
)
def test_what_is_no_query_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        pa.compare_engines(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engines": []}, "engines must name at least one of 'in-memory', 'streaming'"),
        ({"engines": ["fast"]}, "must be one of 'auto', .*, got 'fast'"),
        ({"engines": [None]}, "got None"),
        ({"runs": 0}, "runs must be a whole number, 1 or more, got 0"),
        ({"runs": None}, "got None"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pa.compare_engines(LF, **options)


# What a query fixes of its order


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (LF, Order()),
        (LF.sort("a"), Order(("a",))),
        (LF.sort("b", "a", descending=[True, False]), Order(("b", "a"))),
        (LF.sort("a", nulls_last=True, maintain_order=True), Order(("a",))),
        (LF.sort("a").head(2), Order(("a",), is_cut=True)),
        (LF.sort("a").slice(1, 1), Order(("a",), is_cut=True)),
        (LF.sort("b", pl.col("a").abs()), Order(("b",))),
        (LF.sort(pl.col("a").abs(), "b"), Order()),
        (LF.sort("a").select("b", "a"), Order(("a",))),
        (LF.sort("a").select("b"), Order()),
        (LF.sort("a").select(pl.col("b").alias("a")), Order()),
        (LF.sort("a").with_columns(a=pl.col("a") // 2), Order()),
        (LF.sort("a").group_by("b").len(), Order()),
        (LF.sort("no_such"), Order()),
        (pl.LazyFrame({'x") y': [1], "z[": [2]}).sort('x") y', "z["), Order(('x") y', "z["))),
        (None, Order()),
    ],
)
def test_order_is_fixed_as_far_as_the_last_sort_goes(query, expected):
    assert order_of(query) == expected


FRAME = pl.DataFrame({"key": [1, 1, 2, 2], "value": ["a", "b", "c", "d"]})


@pytest.mark.parametrize(
    ("rows", "order", "difference", "reordered"),
    [
        ([0, 1, 2, 3], Order(), None, False),
        ([3, 2, 1, 0], Order(), None, True),
        ([1, 0, 3, 2], Order(("key",)), None, True),
        ([3, 2, 1, 0], Order(("key",)), "row 1, key: 2 instead of 1", False),
        ([0, 0, 2, 3], Order(("key",)), "row 2, value: 'a' instead of 'b'", False),
        ([0, 1, 2, 2], Order(), "row 4, value: 'c' instead of 'd'", False),
        ([0, 1, 2], Order(), "3 rows instead of 4", False),
    ],
)
def test_rows_agree_as_far_as_the_query_fixes_their_order(rows, order, difference, reordered):
    found = judge(FRAME[rows], FRAME, order)
    assert (found.difference, found.is_reordered) == (difference, reordered)


def test_rows_that_a_limit_cuts_from_equal_ones_may_be_others():
    kept, other = FRAME[[0, 1, 2]], FRAME[[0, 1, 3]]
    assert judge(other, kept, Order(("key",), is_cut=True)).is_open
    assert judge(other, kept, Order(("key",), is_cut=True)).difference is None
    assert judge(other, kept, Order(("key",))).difference is not None
    wrong = kept.with_columns(value=pl.Series(["z", "b", "c"]))
    three_keys = kept.with_columns(key=pl.Series([0, 1, 2]))
    assert not judge(
        wrong.with_columns(key=three_keys["key"]), three_keys, Order(("value",))
    ).is_open
    middle = three_keys.with_columns(value=pl.Series(["a", "z", "c"]))
    assert judge(middle, three_keys, Order(("key",), is_cut=True)).difference == (
        "row 2, value: 'z' instead of 'b'"
    )


def test_types_and_columns_have_to_be_the_same():
    floats = FRAME.with_columns(pl.col("key").cast(pl.Float64))
    assert judge(floats, FRAME, Order()).difference == "column key is of Float64 instead of Int64"
    assert judge(FRAME.select("value", "key"), FRAME, Order()).difference == (
        "columns ['value', 'key'] instead of ['key', 'value']"
    )


def test_floats_may_differ_in_their_last_bits_wherever_they_are():
    exact = pl.DataFrame(
        {
            "of": [0.3, 1e20, -0.0, math.nan, math.inf, None],
            "in_list": [[0.3], [], [1.0, None], [math.nan], None, [2.0]],
            "in_struct": [{"x": 0.3}, {"x": None}, None, {"x": 1.0}, {"x": 2.0}, {"x": 3.0}],
        }
    )
    other = pl.DataFrame(
        {
            "of": [0.1 + 0.2, 1e20 * (1 + 1e-12), 0.0, math.nan, math.inf, None],
            "in_list": [[0.1 + 0.2], [], [1.0 + 1e-12, None], [math.nan], None, [2.0]],
            "in_struct": [
                *({"x": 0.1 + 0.2}, {"x": None}, None, {"x": 1.0 + 1e-12}),
                *({"x": 2.0}, {"x": 3.0}),
            ],
        },
        schema=exact.schema,
    )
    assert not other.equals(exact)
    assert judge(other, exact, Order()) == (None, False, False)
    assert judge(other[::-1], exact, Order()) == (None, True, False)
    for name, value in [("of", 0.3001), ("in_list", [0.3001]), ("in_struct", {"x": 0.3001})]:
        changed = [value, *exact[name].to_list()[1:]]
        wrong = exact.with_columns(pl.Series(name, changed, dtype=exact.schema[name]))
        assert judge(wrong, exact, Order()).difference.startswith(f"row 1, {name}: ")


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        (pl.Series([1.0, math.inf, math.nan]), pl.Series([math.nan, 1.0, 1.0]), [False] * 3),
        (pl.Series([1.000001], dtype=pl.Float32), pl.Series([1.0], dtype=pl.Float32), [True]),
        (pl.Series([1.001], dtype=pl.Float32), pl.Series([1.0], dtype=pl.Float32), [False]),
        (pl.Series([1.000001]), pl.Series([1.0]), [False]),
        (pl.Series([2**62], dtype=pl.UInt64), pl.Series([2**62 + 1]), [False]),
        (pl.Series([7], dtype=pl.UInt8), pl.Series([7]), [True]),
        (pl.Series([Decimal("0.3")]), pl.Series([0.1 + 0.2]), [True]),
        (pl.Series(["a"], dtype=pl.Categorical), pl.Series(["a"]), [True]),
        (pl.Series(["1"]), pl.Series([1]), [False]),
        (pl.Series([date(1995, 1, 1)]), pl.Series(["1995-01-01"]), [False]),
        (pl.Series([None, None, 1]), pl.Series([None, 1, None]), [True, False, False]),
        (pl.Series([0.0]), pl.Series([1e-4]), [False]),
        (pl.Series([0.0]), pl.Series([1e-17]), [True]),
    ],
)
def test_values_are_the_same_only_where_they_mean_the_same(found, wanted, same):
    assert alike(found, wanted).to_list() == same


def test_many_rows_in_another_order_are_compared_and_one_wrong_is_found():
    rows = 50_000
    numbers = pl.int_range(rows, eager=True)
    special = [0.0, math.nan, math.inf, -math.inf, None] * (rows // 5)
    frame = pl.DataFrame({"x": [0.1] * rows, "s": special, "a": numbers, "b": numbers / 7})
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=1)
    assert examine(shuffled, frame) == (None, True, False)
    noise = 1 + (numbers.shuffle(seed=2) % 100) * 1e-14
    moved = shuffled.with_columns(pl.col("x", "b") * noise)
    assert examine(moved, frame) == (None, True, False)
    floats = [each.select("x", "s", "b") for each in (moved, frame)]
    assert examine(*floats) == (None, True, False)
    nested = [each.select(pl.struct(pl.concat_list("x", "b"), "s")) for each in (moved, frame)]
    assert examine(*nested) == (None, True, False)
    wrong = shuffled.with_columns(a=pl.when(pl.col("a") == 7).then(-5).otherwise("a"))
    assert examine(wrong, frame).difference is not None
    all_wrong = shuffled.with_columns(a=pl.col("a") + rows)
    assert examine(all_wrong, frame).difference.startswith("row ")


# Text, JSON and charts


@pytest.fixture(scope="module")
def found():
    queries = {"sums": LF.select(pl.col("a").sum()), "a_query_with_a_rather_long_name": LF}
    with simulate_gpu(driver=None):
        return pa.compare_engines(queries, engines=[*CPU, "gpu", Doubling()], runs=2)


@pytest.mark.one_series
@pytest.mark.parametrize("width", [40, 80, 100])
def test_table_fits_its_width(found, width):
    lines = found.render(width).splitlines()
    assert max(map(len, lines)) <= max(80, width)
    assert str(found) == found.render(100)
    text = " ".join(found.render(width).split())
    assert f"Polars {pl.__version__}, Python " in text
    assert "median fastest slowest ratio memory rows answer" in text
    assert "reference" in text
    sums = [
        sum(each.median for each in found.results if each.engine == name)
        for name in (*CPU, "doubling")
    ]
    peak = max(each.peak_memory for each in found.results if each.engine == "streaming")
    total = f"all 2 in-memory {duration(sums[0])} 1.00 "
    assert total in text
    ratio = f"{sums[1] / sums[0]:.2f}"
    assert f"streaming {duration(sums[1])} {ratio} {amount(peak)} doubling" in text
    assert "DIFFERS doubling: row 1, a: 12 instead of 6" in text
    assert found.gpu_support["sums"].message in text
    assert f"GPU support of all 2 queries: yes; {found.gpu_support['sums'].message}" in text
    assert "2 answers DIFFER: sums on doubling, a_query_with_a_rather_long_name on" in text


@pytest.mark.one_series
def test_json_has_all_of_it(found):
    data = json.loads(json.dumps(found.to_dict()))
    assert list(data) == [
        *("versions", "processors", "runs", "agrees", "gpu_support", "results"),
    ]
    assert data["agrees"] is False
    assert data["gpu_support"]["sums"]["answer"] == "yes"
    first, *_ = data["results"]
    own = result(found, "in-memory", "sums")
    assert first["seconds"] == list(own.seconds)
    assert (first["median"], first["min"], first["max"]) == (own.median, own.min, own.max)
    assert (first["peak_memory"], first["status"]) == (own.peak_memory, "ran")
    assert [each["status"] for each in data["results"]][2] == "not run"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.345, "12.3 s"),
        (1.0, "1.00 s"),
        (0.0123, "12.3 ms"),
        (4e-6, "4.00 us"),
        (1e-7, "0.10 us"),
    ],
)
def test_times_have_three_digits(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(1.5e9, "1.50 GB"), (123.4e6, "123 MB"), (2048, "2.05 kB")]
)
def test_sizes_have_three_digits(size, text):
    assert amount(size) == text


@pytest.mark.one_series
@needs_charts
def test_charts_are_drawn(found, tmp_path):
    found.save_png(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    found.save_html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "a_query_with_a_rather_long_name" in page
    assert 'src="http' not in page
    names = json.dumps(found.chart().to_dict())
    assert all(engine in names for engine in (*CPU, "doubling"))
    assert '"gpu"' not in names


@pytest.mark.one_series
def test_chart_without_altair_names_the_extra(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ImportError, match=r"altair .*: pip install polars-async\[charts\]"):
        found.chart()


@needs_charts
def test_chart_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no query has run"):
        charts.draw([pa.EngineRun(query="a", engine="b", status="failed")], "")


# Files

FILE = """
from __future__ import annotations
import asyncio
from os import getcwd
import polars as pl
from elsewhere import imported, imported_lf as renamed

print("the file prints")
lf = pl.LazyFrame({"a": [3, 1, 2]})
_hidden = lf
number = 1
Kind = type("Kind", (), {})

class Wrong(pl.Engine):
    name = "wrong"
    def collect(self, lf, **_):
        return lf.collect(engine="in-memory") * 2

Wrong.__abstractmethods__ = frozenset()
wrong = Wrong()

def made():
    print("the function prints")
    return lf.sum()

def annotated() -> pl.LazyFrame:
    return lf.sort("a")

def with_default(column="a"):
    return lf.select(column)

def of_something_else() -> int:
    raise SystemExit(5)

def returns_something_else():
    return 5

def needs(argument):
    return lf

def main():
    raise SystemExit(6)

async def later():
    return lf

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "elsewhere.py").write_text(
        "import polars as pl\nimported_lf = pl.LazyFrame({'a': [1]})\n"
        "def imported():\n    return imported_lf\n"
    )
    path = tmp_path / "some_queries.py"
    path.write_text(FILE)
    loaded = {*sys.modules}
    yield path
    for name in {*sys.modules} - loaded:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def test_queries_of_a_file_are_its_own_lazy_frames_and_functions(file):
    module = import_file(file)
    found = find_queries(module, [])
    assert list(found) == ["lf", "made", "annotated", "with_default", "returns_something_else"]
    assert list(find_queries(module, ["main", "lf"])) == ["main", "lf"]
    for name in ("number", "needs", "imported", "renamed", "later", "Kind", "no_such"):
        with pytest.raises(ValueError, match=f"'{name}' is no query of .*, which has lf, made"):
            find_queries(module, [name])


def test_file_named_as_a_module_that_is_loaded_is_another_one(tmp_path):
    path = tmp_path / "json.py"
    path.write_text("import json\nvalue = json.dumps([])\n")
    assert import_file(path).value == "[]"
    assert sys.modules["json"] is json
    del sys.modules["json_compared"]
    sys.path.remove(str(tmp_path))


@pytest.mark.parametrize("names", ["a,b", "a:b", " a , b ", "a,b,a"])
def test_names_follow_a_colon(tmp_path, names):
    path = tmp_path / "queries.py"
    path.touch()
    assert split_argument(f"{path}:{names}") == (path, ["a", "b"])
    assert split_argument(str(path)) == (path, [])


def test_path_may_have_a_colon(tmp_path):
    path = tmp_path / "a:b.py"
    path.touch()
    assert split_argument(str(path)) == (path, [])


# The command


@pytest.fixture
def command(file):
    """Run the command in a process, in the folder of the file."""

    # The tests run in the folder of the sources, which may be in there by a relative path.
    path = os.pathsep.join(map(os.path.abspath, os.environ.get("PYTHONPATH", "").split(os.pathsep)))

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "polars_async", "compare", *arguments],
            cwd=file.parent,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=150,
        )

    return run


@pytest.mark.slow
def test_command_compares_what_a_file_has(command):
    done = command("some_queries.py", "--engines", "in-memory,streaming", "--runs", "1", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    names = ["lf", "made", "annotated", "with_default"]
    assert [each["query"] for each in data["results"][::2]] == names
    assert {each["status"] for each in data["results"]} == {"ran"}
    assert data["agrees"] is True
    lines = done.stderr.splitlines()
    assert lines.count("the file prints") == 1 + len(data["results"])
    assert "0/16  lf starts" in lines
    assert lines[-1].startswith("15/16  with_default on ")
    assert "\x1b" not in done.stderr


@pytest.mark.one_series
@pytest.mark.slow
def test_command_exits_with_1_where_answers_differ(command):
    done = command("some_queries.py:made", "--engines", "in-memory", "wrong", "--runs", "1")
    assert done.returncode == 1, done.stderr
    assert "wrong: row 1, a: 12 instead of 6" in done.stdout
    assert done.stdout.endswith("\n1 answer DIFFERS: made on wrong.\n")
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such.py"], "there is no file"),
        (["some_queries.py:"], "a name must follow the colon"),
        (["some_queries.py:nothing"], "'nothing' is no query of"),
        (["some_queries.py:returns_something_else"], "'returns_something_else' returns int"),
        (["some_queries.py", "--engines", "fast"], "'fast' is no engine: name one of 'auto'"),
        (["some_queries.py", "--engines", ","], "engines must name at least one of"),
        (["some_queries.py", "--runs", "0"], "runs must be a whole number, 1 or more, got 0"),
        (["some_queries.py", "--runs", "x"], "invalid int value: 'x'"),
        (["some_queries.py:lf", "--png", "."], "a chart cannot be written to .: it is a folder"),
        (["elsewhere.txt"], "there is no file"),
        (["empty.py"], "has no queries: a query is a LazyFrame of the file, or a function of it"),
        (["broken.py"], "cannot be imported (ModuleNotFoundError: No module named 'no_such_mod"),
        (["ends.py"], "cannot be imported (SystemExit: 3)"),
        ([], "the following arguments are required"),
    ],
)
def test_what_cannot_be_compared_exits_with_2(file, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(command_module, "check_installed", lambda: None)
    (file.parent / "empty.py").write_text("import polars as pl\n")
    (file.parent / "broken.py").write_text("import no_such_module\n")
    (file.parent / "ends.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", *arguments])
    printed, errors = capsys.readouterr()
    assert (stopped.value.code, printed) == (2, "")
    assert message in " ".join(errors.split())


@pytest.mark.one_series
@pytest.mark.slow
def test_command_exits_with_2_for_a_file_that_is_not_there(command):
    done = command("no_such.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(
        "polars-async compare: error: FILE must be a Python file with queries, and there is no "
        "file no_such.py\n"
    )


@pytest.mark.one_series
@needs_charts
def test_figures_are_told_though_a_chart_cannot_be_written(file, capsys):
    file.write_text("import polars as pl\nlf = pl.LazyFrame({'a': [1]}).select('b')\n")
    path = file.with_name("a.png")
    arguments = ["--engines", "streaming", "--runs", "1", "--png", str(path)]
    assert cli.main(["compare", str(file), *arguments]) == 2
    printed, errors = capsys.readouterr()
    assert "1 failed: lf on streaming." in printed
    assert errors.endswith(
        "no chart is written: there is nothing to draw: no query has run on any engine\n"
    )
    assert not path.exists()


def test_interrupt_ends_the_command_without_a_traceback(file, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_module, "compare_file", interrupt)
    assert cli.main(["compare", str(file)]) == 130
    assert capsys.readouterr() == ("", "polars-async: interrupted\n")


@pytest.mark.one_series
@pytest.mark.slow
@needs_charts
def test_command_writes_charts(command, file):
    charts = ["--png", "a.png", "--html", "a.html"]
    done = command("some_queries.py:lf", "--engines", "streaming", "--runs", "1", *charts)
    assert done.returncode == 0, done.stderr
    assert (file.parent / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (file.parent / "a.html").read_text()


def test_command_tells_before_it_measures_that_a_chart_cannot_be_written(file, monkeypatch, capsys):
    arguments = ["compare", str(file), "--png"]
    monkeypatch.setattr(command_module, "check_installed", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, str(file.parent / "no_folder" / "a.png")])
    assert stopped.value.code == 2
    assert "there is no such folder" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, str(file.parent / "a.png")])
    assert stopped.value.code == 2
    assert "pip install polars-async[charts]" in capsys.readouterr().err


def test_help_fits_a_terminal_and_documents_every_key(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    found = pa.Comparison(
        results=(pa.EngineRun(query="a", engine="b"),),
        gpu_support={"a": pa.gpu_support(LF)},
        runs=1,
        versions={},
        processors=1,
    ).to_dict()
    for key in [*found, *found["results"][0], *found["gpu_support"]["a"]]:
        assert key in text, key


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_a_few_elsewhere(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        with ProgressLine(stream) as progress:
            for done in range(101):
                progress.show("a query with a long name", done, 100)
    assert "\n" not in terminal.getvalue()
    shown = terminal.getvalue().split("\r\x1b[K")
    assert shown[1] == "0/100  a query with"
    assert shown[-1] == ""
    assert len(file.getvalue().splitlines()) == 11
    with ProgressLine(None) as progress:
        progress.show("nowhere", 0, 1)


def test_default_engines_are_those_with_a_name():
    assert tuple(name for name in ENGINE_NAMES if name != "auto") == engines.DEFAULT_ENGINES
