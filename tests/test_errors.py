from __future__ import annotations

import pickle
from inspect import getmembers, isclass

import polars as pl
import pytest

import polars_async as pa
from polars_async import errors

BASES = {
    "PolarsAsyncError": Exception,
    "EngineUnavailableError": pa.PolarsAsyncError,
    "CollectorClosedError": pa.PolarsAsyncError,
    "ForkedProcessError": pa.PolarsAsyncError,
    "EngineDowngradeWarning": UserWarning,
}
DEFINED = {
    name: each for name, each in getmembers(errors, isclass) if each.__module__ == errors.__name__
}


@pytest.mark.parametrize("name", BASES)
def test_each_has_the_base_that_callers_catch(name):
    assert DEFINED[name].__bases__ == (BASES[name],)


@pytest.mark.parametrize("name", DEFINED)
def test_each_is_public_and_survives_a_pickle(name):
    assert getattr(pa, name) is DEFINED[name]
    assert name in pa.__all__

    more = {
        "QueryMemoryError": (2**30,),
        "QueryTimeoutError": (3.0, 1.0, None),
        "WorkerDiedError": (-9, "the plan"),
    }.get(name, ())
    error = DEFINED[name]("what, why: remedy", *more)
    back = pickle.loads(pickle.dumps(error))
    assert vars(back) == vars(error)
    assert type(back) is DEFINED[name]
    assert str(back) == "what, why: remedy"


def test_every_error_is_caught_by_the_base_and_none_by_that_of_polars():
    raised = {each for each in DEFINED.values() if not issubclass(each, Warning)}

    assert all(issubclass(each, pa.PolarsAsyncError) for each in raised)
    assert not any(issubclass(each, pl.exceptions.PolarsError) for each in raised)


class Unreadable(Exception):  # noqa: N818
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no"), "ValueError: no"),
        (ValueError("one\n  two\n"), "ValueError: one two"),
        (ValueError("unsupported", [KeyError("a")]), "ValueError: unsupported"),
        (KeyError(), "KeyError"),
        (Unreadable(), "Unreadable"),
    ],
)
def test_error_is_described_in_one_line(error, words):
    assert errors.describe(error) == words
