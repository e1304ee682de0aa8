"""The package imports Polars, and most of itself, when a public name is first used."""

from __future__ import annotations

import ast
import importlib.metadata
import pkgutil
import sys
from pathlib import Path

import pytest

import polars_async

SHELL = """
import sys
import polars_async, polars_async.pytest_plugin
heavy = {"polars", "numpy", "asyncio", "gevent", "trio", "pynvml", "cudf_polars", "ctypes"}
print("heavy:", *heavy & set(sys.modules))
print("own:", *sorted(each for each in sys.modules if each.startswith("polars_async.")))
print(set(polars_async.__all__) < set(dir(polars_async)), "Collector" in vars(polars_async))
polars_async.Collector
print("polars" in sys.modules, "Collector" in vars(polars_async))
"""

STAR = """
from polars_async import *
import polars_async
missing = [name for name in polars_async.__all__ if name not in globals()]
print(*missing, Collector().stats()["running"])
"""

FORKED = """
import os, sys, warnings
import polars_async
import polars as pl
warnings.simplefilter("ignore")  # on forks of processes with threads
pl.LazyFrame({"a": range(10)}).group_by("a").len().collect()
if not (child := os.fork()):
    try:
        polars_async.collect_async(pl.LazyFrame({"a": [1]}))
    except polars_async.ForkedProcessError:
        print("told", flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def test_import_leaves_polars_alone_until_a_name_is_used(run_script):
    words = " ".join(run_script(SHELL))
    internal = ("_runtime", "_runtime.fork", "_runtime.unpatched")
    names = (*internal, "errors", "pytest_plugin", "reasons")
    own = " ".join(f"polars_async.{name}" for name in names)
    assert words == f"heavy: own: {own} True False True True"


def test_star_imports_every_name(run_script):
    assert run_script(STAR) == ["0"]


def test_fork_is_seen_between_the_import_and_the_first_use(run_script):
    assert run_script(FORKED) == ["told"]


def declared():
    """Give the modules of the names that type checkers see."""
    tree = ast.parse(Path(polars_async.__file__).read_text())
    (guarded,) = (each for each in tree.body if isinstance(each, ast.If))
    return {
        alias.name: each.module.removeprefix("polars_async.")
        for each in guarded.body
        for alias in each.names
    }


def test_type_checkers_see_what_runs():
    assert declared() == polars_async._HOMES
    assert list(polars_async._HOMES) == polars_async.__all__ == sorted(polars_async.__all__)


ALIASES = {
    "EngineName",
    "EngineRequest",
    "ExecutorRequest",
    "GpuPolicy",
    "QueryPath",
    "Tags",
}


@pytest.mark.parametrize("name", polars_async.__all__)
def test_name_is_that_of_its_module(name):
    value = getattr(polars_async, name)
    home = f"polars_async.{polars_async._HOMES[name]}"
    assert getattr(sys.modules[home], name) is value
    if name not in ALIASES:  # of types, which have no name
        assert (value.__name__, value.__module__) == (name, home)
    assert vars(polars_async)[name] is value


def test_dir_shows_public_names_alone():
    polars_async.Collector(max_running=1).close()  # by now submodules are attributes
    assert dir(polars_async) == sorted([*polars_async.__all__, "__version__"])


def test_version_is_that_of_the_distribution(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"polars-async": "1.2.3"}.get)
    assert polars_async.__version__ == "1.2.3"

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert polars_async.__version__ == "0+unknown"


def test_no_module_stands_in_the_way_of_a_name():
    modules = {each.name for each in pkgutil.iter_modules(polars_async.__path__)}
    assert not modules & set(polars_async.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'polars_async' has no attribute 'collect'$"):
        polars_async.collect()
    assert not hasattr(polars_async, "__wrapped__")
