"""The functions of the module: the methods of the default collector, and what else they take."""

from __future__ import annotations

import asyncio
import inspect

import polars as pl
import pytest
from places import TINY, Blocked, until

import polars_async as pa
from polars_async import Collector, EventKind, api

FUNCTIONS = (
    pa.collect_async,
    pa.collect_all_async,
    pa.as_completed,
    pa.collect_batches_async,
    pa.sink_async,
    pa.collect_schema_async,
    pa.run,
)
TAGS = {"tenant": "a", "page": 3, "share": 0.5, "paid": True}


class Heard(list):
    __call__ = list.append


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture(autouse=True)
def default(monkeypatch, heard):
    monkeypatch.setattr(api._Default, "collector", None)
    with pa.configure(max_running=1, on_event=heard) as collector:
        yield collector


@pytest.fixture
def argument(tmp_path):
    """Return what each function takes first."""

    def argument(function):
        if function in (pa.collect_all_async, pa.as_completed):
            return [TINY]
        if function is pa.run:
            return TINY.collect
        if function is pa.sink_async:
            return TINY.sink_csv(tmp_path / "a.csv", lazy=True)
        return TINY

    return argument


def ended(what):
    """Wait for a handle or a stream."""
    return what.result(30) if isinstance(what, pa.QueryHandle) else asyncio.run(listed(what))


async def listed(stream):
    return [each async for each in stream]


# Every function


@pytest.mark.parametrize("function", FUNCTIONS)
def test_function_takes_what_the_method_takes(function):
    ours = inspect.signature(function).parameters
    methods = inspect.signature(getattr(Collector, function.__name__)).parameters
    assert set(ours) == set(methods) - {"self"}
    own = {"engine", "gevent"}  # of the order of Polars' own, and None is no engine there
    for name in set(ours) - own:
        assert ours[name] == methods[name]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_function_runs_on_the_default_collector_and_passes_everything_on(
    function, argument, heard, default
):
    query = function(argument(function), timeout=30, priority=3, label="it", tags=TAGS)
    found = ended(query)
    assert default.stats()["completed"] == 1
    assert {(event.label, tuple(event.tags.items())) for event in heard} == {
        ("it", tuple(TAGS.items()))
    }
    frames = {
        pa.collect_async: TINY.collect(),
        pa.collect_all_async: [TINY.collect()],
        pa.as_completed: [(0, TINY.collect())],
        pa.collect_batches_async: [TINY.collect()],
        pa.sink_async: None,
        pa.collect_schema_async: TINY.collect_schema(),
        pa.run: TINY.collect(),
    }
    assert str(found) == str(frames[function])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"timeout": 0}, ValueError),
        ({"priority": 11}, ValueError),
        ({"label": 5}, TypeError),
        ({"tags": {"a": None}}, TypeError),
    ],
)
def test_function_checks_its_options(function, argument, options, error, default):
    (name,) = options
    with pytest.raises(error, match=f"^{name}"):
        function(argument(function), **options)
    assert default.stats()["submitted"] == 0


@pytest.mark.parametrize("function", FUNCTIONS[:-2])
def test_function_takes_none_for_no_engine(function, argument):
    with pytest.raises(ValueError, match="engine must be one of"):
        function(argument(function), engine=None)


def test_timeout_and_priority_of_the_function_count(heard):
    blocked = Blocked()
    try:
        first = pa.collect_async(blocked.lf)
        assert blocked.started.wait(30)
        low, high = (pa.collect_async(TINY, priority=each, label=str(each)) for each in (-1, 5))
        with pytest.raises(pa.QueryTimeoutError, match="'late'"):
            pa.collect_async(TINY, timeout=0.01, label="late").result(30)
    finally:
        blocked.gate.set()
    for each in (first, low, high):
        each.result(30)
    started = [event.label for event in heard if event.kind is EventKind.STARTED]
    assert started == [None, "5", "-1"]


def test_parameters_of_batches_arrive():
    batches = pa.collect_batches_async(pl.LazyFrame({"a": range(5)}), chunk_size=2)
    assert [each.height for each in ended(batches)] == [2, 2, 1]


# Tags


def test_tags_are_those_of_the_handle_and_of_every_event(heard):
    given = dict(TAGS)
    handle = pa.collect_async(TINY, tags=given)
    given["tenant"] = "another"  # too late
    handle.result(30)
    until(lambda: heard[-1].kind is EventKind.FINISHED)  # which may be told after it is done
    assert handle.tags == TAGS
    assert [event.tags for event in heard] == [TAGS] * len(heard)
    assert str(heard[-1]).endswith(", 1 rows, tenant='a', page=3, share=0.5, paid=True")


def test_query_without_tags_has_none(heard):
    handle = pa.collect_async(TINY)
    handle.result(30)
    until(lambda: heard[-1].kind is EventKind.FINISHED)
    assert handle.tags == {} == heard[-1].tags
    assert hash(heard[-1]) == hash(heard[-1])


def test_methods_in_the_background_take_tags(default, heard):
    default.collect_background(TINY, tags=TAGS).fetch_blocking()
    default.collect_all_background([TINY], tags=TAGS).fetch_blocking()
    until(lambda: len(heard) == 6)
    assert [event.tags for event in heard] == [TAGS] * 6


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("tenant", r"tags must be a mapping, such as \{'tenant': 'a'\}, or None, got 'tenant'"),
        ([("tenant", "a")], "tags must be a mapping"),
        ({1: "a"}, "tags: their names must be strings, got 1"),
        ({"tenant": None}, r"tags\['tenant'\] must be a string, a number or a boolean, got None"),
        ({"ids": [1, 2]}, r"tags\['ids'\] must be .*, got \[1, 2\]: convert it, as by str\(\)"),
    ],
)
def test_tags_of_another_type_are_refused(default, tags, message):
    with pytest.raises(TypeError, match=message):
        default.collect_async(TINY, tags=tags)
