"""The PDS-H queries equal DuckDB's answers, and the comparison that says so can fail."""

import asyncio
import re
import shutil
import subprocess
import sys
import threading
import time
from datetime import date
from decimal import Decimal
from pathlib import Path

import duckdb
import polars as pl
import pytest
from polars import col

import polars_async as pa
from benchmarks import demo
from benchmarks.measure.stall import StallMeter
from benchmarks.pdsh import data, oracle
from benchmarks.pdsh.queries import QUERIES, q6
from benchmarks.pdsh.sql import QUESTIONS

pytestmark = pytest.mark.slow

SCALE = 0.03  # at 0.01 the answer to q17 is null, and q20 and q21 have a single row
CACHE = Path(__file__).parents[1] / ".cache" / "data"


@pytest.fixture(scope="session")
def pdsh_folder():
    return data.make(SCALE, CACHE)


@pytest.fixture(scope="session")
def pdsh_answers(pdsh_folder):
    return oracle.answers(pdsh_folder)


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
@pytest.mark.parametrize("number", QUERIES)
def test_query_answers_as_duckdb_does(number, engine, pdsh_folder, pdsh_answers):
    answer = QUERIES[number](data.tables(pdsh_folder)).collect(engine=engine)
    assert oracle.check(number, answer, pdsh_answers[number]) is None


def test_there_are_22_queries_and_every_answer_has_something_to_compare(pdsh_answers):
    numbers = list(range(1, 23))
    assert list(QUERIES) == list(QUESTIONS) == list(pdsh_answers) == numbers
    for answer in pdsh_answers.values():
        assert answer.height
        assert answer.null_count().row(0) == (0,) * answer.width


@pytest.mark.one_series
@pytest.mark.parametrize("number", QUERIES)
def test_every_wrong_value_of_every_answer_is_found(number, pdsh_folder, pdsh_answers):
    answer = QUERIES[number](data.tables(pdsh_folder)).collect()
    for name in answer.columns:
        for place in {0, answer.height // 2, answer.height - 1}:
            wrong = _with_another_value(answer, name, place)
            found = oracle.check(number, wrong, pdsh_answers[number])
            assert found is not None, (name, place)
            assert name in found


@pytest.mark.one_series
@pytest.mark.parametrize("number", QUERIES)
def test_missing_and_surplus_rows_are_found(number, pdsh_folder, pdsh_answers):
    answer = QUERIES[number](data.tables(pdsh_folder)).collect()
    for wrong in (answer.head(-1), answer.tail(-1), pl.concat([answer, answer.tail(1)])):
        found = oracle.check(number, wrong, pdsh_answers[number])
        assert found == f"{wrong.height} rows instead of {answer.height}"


# The others answer with one row.
@pytest.mark.one_series
@pytest.mark.parametrize("number", sorted(set(QUERIES) - {6, 14, 15, 17, 19}))
def test_swapped_order_is_found(number, pdsh_folder, pdsh_answers):
    answer = QUERIES[number](data.tables(pdsh_folder)).collect()
    keys = QUESTIONS[number].keys
    assert answer.select(keys).row(0) != answer.select(keys).row(1)
    swapped = pl.concat([answer[1:2], answer[0:1], answer[2:]])
    assert oracle.check(number, swapped, pdsh_answers[number]).startswith("row 1, ")


@pytest.mark.one_series
@pytest.mark.parametrize("number", QUERIES)
def test_a_wrong_column_is_found(number, pdsh_folder, pdsh_answers):
    answer = QUERIES[number](data.tables(pdsh_folder)).collect()
    first = answer.columns[0]
    for wrong in (
        answer.rename({first: "other"}),
        answer.drop(first),
        answer.with_columns(other=col(first)),
    ):
        found = oracle.check(number, wrong, pdsh_answers[number])
        assert found.startswith("columns ")


def test_swapped_contents_of_two_columns_are_found():
    expected = pl.DataFrame({"high": [1, 2], "low": [3, 4]})
    answer = expected.select(high="low", low="high")
    assert oracle.difference(answer, expected) is not None


TIES = pl.DataFrame({"key": [3, 2, 2, 1], "name": ["a", "b", "c", "d"]})


def test_ties_may_change_places():
    answer = TIES[[0, 2, 1, 3]]
    assert oracle.difference(answer, TIES, order_by=["key"]) is None
    assert oracle.difference(answer, TIES, order_by=["key", "name"]) == (
        "row 2, name: 'c' instead of 'b'"
    )


def test_rows_that_do_not_tie_may_not_change_places():
    answer = TIES[[1, 0, 2, 3]]
    assert oracle.difference(answer, TIES, order_by=["key"]) == "row 1, key: 2 instead of 3"
    assert oracle.difference(answer, TIES) is None


def test_one_of_two_ties_counts_once():
    answer = TIES[[0, 1, 1, 3]]
    assert oracle.difference(answer, TIES, order_by=["key"]) == "row 3, name: 'b' instead of 'c'"


def test_a_limit_that_cuts_ties_takes_any_of_them():
    expected = TIES.head(3)
    for rows in ([0, 1], [0, 2]):
        assert oracle.difference(TIES[rows], expected, order_by=["key"], limit=2) is None
    for rows in ([0, 3], [1, 2], [0, 1, 2], [0]):
        assert oracle.difference(TIES[rows], expected, order_by=["key"], limit=2) is not None


def test_the_oracle_keeps_every_tie_of_the_last_row():
    asked = QUESTIONS[3].sql_with_ties
    assert "qualify rank() over (order by revenue desc, o_orderdate) <= 10" in asked
    assert "limit" not in asked
    assert QUESTIONS[3].sql.endswith("order by revenue desc, o_orderdate\nlimit 10")


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        (1, 1, True),
        (1, 2, False),
        (2**62, 2**62 + 1, False),
        (0.1 + 0.2, Decimal("0.3"), True),
        (1.0, Decimal("1.0000001"), False),
        (0.0, Decimal("0.0001"), False),
        (float("nan"), Decimal(1), False),
        (None, Decimal(0), False),
        (0.0, None, False),
        (None, None, True),
        ("a", "a ", False),
        ("1", 1, False),
        (date(1995, 1, 1), date(1995, 1, 1), True),
        (date(1995, 1, 1), date(1995, 1, 2), False),
        (date(1995, 1, 1), "1995-01-01", False),
    ],
)
def test_values_are_the_same_only_where_they_mean_the_same(found, wanted, same):
    answer = pl.DataFrame({"value": [found]})
    expected = pl.DataFrame({"value": [wanted]})
    assert (oracle.difference(answer, expected) is None) is same


def test_data_is_kept(pdsh_folder):
    made = {path: path.stat().st_mtime_ns for path in pdsh_folder.iterdir()}
    assert data.make(SCALE, CACHE) == pdsh_folder
    assert {path: path.stat().st_mtime_ns for path in pdsh_folder.iterdir()} == made


@pytest.mark.one_series
def test_data_made_by_several_at_once_is_made_whole(tmp_path):
    made = []
    makers = [
        threading.Thread(target=lambda: made.append(data.make(0.001, tmp_path))) for _ in range(4)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert made == [tmp_path / "pdsh-0.001"] * 4
    assert list(tmp_path.iterdir()) == [tmp_path / "pdsh-0.001"]
    assert {path.stem for path in made[0].iterdir()} == set(data.TABLES)


def test_data_half_made_is_thrown_away(tmp_path, monkeypatch):
    def half(command, **_):
        folder = Path(command[-1])
        folder.mkdir()
        (folder / "region.parquet").touch()
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="no space left")

    monkeypatch.setattr(subprocess, "run", half)
    with pytest.raises(RuntimeError, match="no space left"):
        data.make(0.001, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.one_series
def test_data_that_lacks_a_table_is_refused(tmp_path):
    made = data.make(0.001, tmp_path)
    (made / "part.parquet").unlink()
    with pytest.raises(RuntimeError, match="lacks part: delete it"):
        data.make(0.001, tmp_path)


def test_a_missing_generator_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FileNotFoundError, match="uv pip install tpchgen-cli"):
        data.make(0.001, tmp_path)


def test_stall_meter_sees_a_loop_held_up_to_the_very_end():
    async def main():
        async with StallMeter() as meter:
            time.sleep(0.05)  # noqa: ASYNC251
        return meter.longest

    assert asyncio.run(main()) >= 0.045


def test_demo_says_that_all_answers_are_right(pdsh_folder, capsys):
    assert demo.main(["--scale", str(SCALE), "--data", str(pdsh_folder.parent)]) == 0
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    agree = f"All 22 answers agree with those of DuckDB {duckdb.__version__}, in all four ways."
    assert agree in text
    assert "Chosen: the in-memory engine for 22. Each: the in-memory engine runs: nothing" in text
    for function in ("1 collect_all_async", "22 collect_async"):
        for library in ("Polars' own", "polars-async"):
            assert re.search(rf"{function} of {library} +[\d.]+ +[\d.]+", printed)
    assert "\x1b" not in printed
    assert printed.count(" ok ") == 22


def test_demo_names_a_wrong_answer_and_fails(pdsh_folder, capsys, monkeypatch):
    monkeypatch.setitem(demo.QUERIES, 6, lambda t: q6(t).select(revenue=col.revenue * 2))
    assert demo.main(["--scale", str(SCALE), "--data", str(pdsh_folder.parent)]) == 1
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    for function in ("1 collect_all_async", "22 collect_async"):
        for library in ("Polars' own", "polars-async"):
            assert f"WRONG: q6 through {function} of {library}: row 1, revenue: " in text
    assert printed.count(" ok ") == 21


def test_demo_says_of_each_engine_how_many_queries_it_was_chosen_for():
    one, other = pa.resolve_engine("streaming"), pa.resolve_engine("in-memory")
    assert demo._choice({1: one, 2: one}) == f"the streaming engine for 2. Each: {one}"
    chosen = "the streaming engine for 1, the in-memory engine for 2. For one, q4: "
    assert demo._choice({4: one, 5: other, 6: other}) == f"{chosen}{one}"


@pytest.mark.one_series
def test_script_of_the_demo_says_what_it_does(tmp_path):
    root = Path(demo.__file__).parents[1]
    (tmp_path / "ci").mkdir()
    shutil.copy(root / "ci/demo", tmp_path / "ci")
    found = (
        'root=.; cache=.; python=python; make_environment() { environment=.; echo "made" >&2; }\n'
    )
    (tmp_path / "ci/environment.sh").write_text(found)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(shutil.which("true"))
    done = subprocess.run(
        ["ci/demo"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30
    )
    installs, made, collects = done.stderr.splitlines()[-3:]
    assert installs.startswith("ci/demo: installing polars>=2,<3, polars-async, DuckDB and the ")
    assert (made, collects[:24]) == ("made", "ci/demo: making the data")


def _with_another_value(answer, name, place):
    dtype = answer.schema[name]
    value = answer[name][place]
    match value:
        case str():
            other = value + " "
        case float():
            other = value * (1 + 1e-8)
        case date():
            other = value.replace(year=value.year + 1)
        case _:
            other = value + 1
    values = answer[name].to_list()
    values[place] = other
    return answer.with_columns(pl.Series(name, values, dtype=dtype))
