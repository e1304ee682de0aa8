"""A query finds in a worker process the folder, modules and environment of the program, as now."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import polars as pl
import pytest

import polars_async as pa
from polars_async.executors.processes import process as spawned

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux")

ONE = pl.LazyFrame({"a": [1]})


@pytest.fixture
def collector():
    with pa.Collector(executor="processes", max_running=1) as collector:
        yield collector


@pytest.fixture
def warm(collector):
    """Have a worker that has served a query."""
    collector.collect_async(ONE).result(30)
    return collector


def told(collector, function):
    """Give what a function says in the worker, as a text."""
    query = ONE.map_batches(
        lambda _: pl.DataFrame({"a": [str(function())]}), schema={"a": pl.String}
    )
    return collector.collect_async(query).result(30).item()


def test_relative_paths_are_read_and_written_where_the_program_is(warm, tmp_path, monkeypatch):
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        pl.DataFrame({"name": [name]}).write_parquet(folder / "a.parquet")
        monkeypatch.chdir(folder)
        rows = pl.scan_parquet("a.parquet")
        assert warm.collect_async(rows).result(30).item() == name
        warm.sink_async(rows.sink_csv("a.csv", lazy=True)).result(30)
        assert (folder / "a.csv").read_text() == f"name\n{name}\n"
    assert warm.stats()["workers"] == 1


def test_folder_that_was_made_anew_is_not_the_old_one(warm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        folder = tmp_path / "folder"
        if folder.exists():
            folder.rename(tmp_path / "away")
        folder.mkdir()
        pl.DataFrame({"name": [name]}).write_parquet(folder / "a.parquet")
        os.chdir(folder)
        assert warm.collect_async(pl.scan_parquet("a.parquet")).result(30).item() == name


def test_query_runs_where_the_folder_of_the_program_is_gone(warm, tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert warm.collect_async(ONE).result(30).item() == 1


def test_query_runs_where_the_folder_of_the_program_cannot_be_told(warm, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "stat", refuse)
    assert warm.collect_async(ONE).result(30).item() == 1


def test_folder_that_a_function_has_gone_to_is_left_again(warm, tmp_path):
    assert told(warm, lambda: os.chdir(tmp_path)) == "None"
    assert told(warm, os.getcwd) == str(Path.cwd())


def test_modules_of_later_paths_are_found(warm, tmp_path, monkeypatch):
    (tmp_path / "made_later.py").write_text("def five(frame):\n    return frame * 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("made_later")
    assert warm.collect_async(ONE.map_batches(module.five)).result(30).item() == 5
    monkeypatch.undo()
    assert told(warm, lambda: str(tmp_path) in sys.path) == "False"


def test_path_that_a_function_has_added_stays_in_its_worker(warm, tmp_path, monkeypatch):
    assert told(warm, lambda: sys.path.append("of a function")) == "None"
    monkeypatch.syspath_prepend(tmp_path)
    found = told(warm, lambda: (sys.path[0], sys.path[-1]))
    assert found == str((str(tmp_path), "of a function"))


def test_variables_are_those_that_the_program_has_now(warm, monkeypatch):
    for value in ("one", "ü", "", None):
        if value is None:
            monkeypatch.delenv("OF_THE_TEST")
        else:
            monkeypatch.setenv("OF_THE_TEST", value)
        assert told(warm, lambda: os.environ.get("OF_THE_TEST")) == str(value)
    assert warm.stats()["workers"] == 1


def test_variable_that_was_set_for_a_moment_when_a_worker_started_does_not_stay(
    collector, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setenv("OF_THE_TEST", "for a moment")
        assert told(collector, lambda: os.environ["OF_THE_TEST"]) == "for a moment"
    assert told(collector, lambda: os.environ.get("OF_THE_TEST")) == "None"


def test_variable_that_a_function_has_set_stays_in_its_worker(warm, monkeypatch):
    assert told(warm, lambda: os.environ.update(OF_A_FUNCTION="kept")) == "None"
    monkeypatch.setenv("OF_THE_TEST", "set")
    assert told(warm, lambda: os.environ["OF_A_FUNCTION"]) == "kept"


def test_variable_that_was_set_for_workers_alone_stays_theirs(warm, monkeypatch):
    before = told(warm, lambda: os.environ["POLARS_MAX_THREADS"])
    for change in (lambda: monkeypatch.setenv("POLARS_MAX_THREADS", "77"), monkeypatch.undo):
        change()
        assert told(warm, lambda: os.environ["POLARS_MAX_THREADS"]) == before


def test_config_of_polars_is_that_which_the_program_has_now(warm):
    def shown():
        return "long" * 9 in str(pl.DataFrame({"a": ["long" * 9]}))

    for length in (3, 100):
        with pl.Config(fmt_str_lengths=length):
            assert told(warm, shown) == str(length == 100)


def test_value_that_polars_refuses_costs_no_worker(collector, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    collector.collect_async(ONE).result(30)
    monkeypatch.setenv("POLARS_IDEAL_MORSEL_SIZE", "none")
    assert told(collector, lambda: os.environ["POLARS_IDEAL_MORSEL_SIZE"]) == "none"
    assert collector.stats()["workers_died"] == 0


def test_environment_that_was_replaced_by_a_dictionary_is_followed(warm, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "OF_THE_TEST": "replaced"})
    assert told(warm, lambda: os.environ.get("OF_THE_TEST")) == "replaced"


def test_nothing_is_sent_where_nothing_has_changed(warm, monkeypatch):
    assert warm.collect_async(ONE).result(30).item() == 1  # pytest has set a variable since
    sent = []
    monkeypatch.setattr(spawned, "changes", lambda *_, **__: sent.append(1))
    assert warm.collect_async(ONE).result(30).item() == 1
    assert sent == []
