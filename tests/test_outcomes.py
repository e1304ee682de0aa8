"""Errors of queries in other processes arrive as what was raised there."""

from __future__ import annotations

import sys
import threading

import polars as pl
import pytest
from places import TINY

import polars_async as pa
from polars_async.executors.outcomes import packed_error, unpacked_error
from polars_async.executors.serialization import pack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux")


class StatusError(Exception):
    """As that of httpx: more is asked for than goes into `args`, and by keywords alone."""

    def __init__(self, message, *, request, response):
        super().__init__(message)
        self.request = request
        self.response = response


class CodeError(ValueError):
    """Its text is made of what it takes: to be made of that again would change it."""

    def __init__(self, code):
        super().__init__(f"failed with {code}")
        self.code = code


class FileError(OSError):
    def __init__(self, path, *, why):
        super().__init__(2, why, path)


class ByteError(UnicodeDecodeError):
    def __init__(self, *, data):
        super().__init__("utf-8", data, 0, 1, "no text")


class ModuleError(ImportError):
    def __init__(self, *, module):
        super().__init__(f"no {module}", name=module)


class SlotError(Exception):
    __slots__ = ("code",)

    def __init__(self, *, code):
        super().__init__("with a slot")
        self.code = code


class TwoAtOnceError(FileError, KeyError):
    pass


class SchemaError(pl.exceptions.SchemaError):
    def __init__(self, *, column):
        super().__init__(f"no {column}")


class Group(ExceptionGroup):
    def __new__(cls, *, errors):
        return super().__new__(cls, "some failed", errors)

    def __init__(self, *, errors):
        pass

    def derive(self, excs):
        return Group(errors=excs)


def status_error():
    return StatusError("404", request={"url": "here"}, response=[404])


ERRORS = {
    "keywords alone": status_error,
    "text of its own": lambda: CodeError(5),
    "of the system": lambda: FileError("a.csv", why="not there"),
    "of bytes": lambda: ByteError(data=b"\xff"),
    "of a module": lambda: ModuleError(module="shop"),
    "slot": lambda: SlotError(code=3),
    "two bases": lambda: TwoAtOnceError("a.csv", why="not there"),
    "of Polars": lambda: SchemaError(column="a"),
    "group": lambda: ExceptionGroup("all", [status_error(), KeyError("a"), CodeError(1)]),
    "group in a group": lambda: ExceptionGroup("all", [ExceptionGroup("some", [CodeError(1)])]),
    "group of its own": lambda: Group(errors=[status_error()]),
}


def fields(error):
    """What can be told of an error, and of those in it."""
    names = ("request", "response", "code", "errno", "strerror", "filename", "start", "reason")
    told = [getattr(error, name, None) for name in (*names, "name", "__notes__")]
    inner = [fields(each) for each in getattr(error, "exceptions", ())]
    args = inner or error.args
    return type(error), str(error), args, told


def failing(make):
    def fail(_):
        error = make()
        error.add_note("of the query")
        raise error

    return TINY.map_batches(fail)


@pytest.mark.everywhere
@pytest.mark.parametrize("make", ERRORS.values(), ids=ERRORS)
def test_error_arrives_as_it_was_raised(executor, make):
    raised = make()
    raised.add_note("of the query")
    with pa.Collector(executor=executor) as collector, pytest.raises(type(raised)) as caught:
        collector.collect_async(failing(make)).result(30)
    assert fields(caught.value) == fields(raised)


@pytest.mark.everywhere
def test_error_of_a_class_that_has_no_module_is_caught_as_such(executor):
    class LocalError(Exception):
        def __init__(self, *, code):
            super().__init__(code)

    with pa.Collector(executor=executor) as collector, pytest.raises(LocalError, match="7"):
        collector.collect_async(failing(lambda: LocalError(code=7))).result(30)


def arrived(error):
    return unpacked_error(packed_error(error))


def test_what_cannot_be_sent_of_an_error_is_left_out_and_named():
    error = StatusError("404", request=threading.Lock(), response=[404])
    error.args += (threading.Lock(),)
    found = arrived(error)
    assert type(found) is StatusError
    assert found.args[0] == "404"
    assert "lock" in found.args[1]
    assert found.response == [404]
    assert not hasattr(found, "request")
    assert found.__notes__ == ["left behind in the other process, since it cannot be sent: request"]


def test_error_that_holds_another_or_itself_arrives():
    error = CodeError(1)
    error.source, error.me = status_error(), error
    found = arrived(error)
    assert type(found) is CodeError
    assert fields(found.source) == fields(status_error())


class NoTextError(ValueError):
    def __str__(self):
        raise SystemExit(3)

    __repr__ = __str__


class NoNotesError(ValueError):
    @property
    def __notes__(self):
        raise KeyboardInterrupt


class NothingError(NoTextError):
    @property
    def args(self):
        raise SystemExit(3)

    def __reduce__(self):
        raise SystemExit(3)


@pytest.mark.parametrize("kind", [NoTextError, NoNotesError, NothingError])
def test_error_that_cannot_be_told_arrives_and_costs_no_worker(kind):
    def fail(_):
        raise kind("told by nobody")

    with pa.Collector(executor="processes", max_running=1) as collector:
        error = outcome(collector.collect_async(TINY.map_batches(fail)))
        assert type(error) is kind
        assert kind.__name__ in str(error.__cause__)
        assert collector.collect_async(TINY).result(30).item() == 1
        assert collector.stats()["workers_died"] == 0


def outcome(handle):
    """Give its error, and have pytest show nothing of it."""
    try:
        return handle.result(30)
    except BaseException as error:  # noqa: BLE001
        return error


class NoPickleError(KeyError):
    lock = threading.Lock()


def test_error_of_a_class_that_cannot_be_sent_is_of_the_nearest_that_can():
    NoPickleError.__qualname__ = "somewhere.else"
    error = arrived(NoPickleError("a"))
    assert type(error) is KeyError
    assert error.args == ("NoPickleError: 'a'",)


class LeavesError(Exception):
    def __setstate__(self, state):
        raise SystemExit(3)


def test_error_that_leaves_the_program_where_it_is_unpickled_arrives():
    error = LeavesError("it")
    error.code = 5
    found = arrived(error)
    assert type(found) is LeavesError
    assert found.code == 5


class TheirsError(Exception):
    def __reduce__(self):
        return (leave, ())


def leave():
    raise SystemExit(3)


def test_error_that_cannot_be_unpacked_here_is_told_with_its_traceback():
    packed = pack(TheirsError(), in_files=False).data, "as it was there"
    found = unpacked_error(packed)
    assert type(found) is pa.PolarsAsyncError
    assert "that cannot be unpickled here (SystemExit: 3)" in str(found)
    assert "as it was there" in str(found.__cause__)
