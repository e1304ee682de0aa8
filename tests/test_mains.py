"""What a query takes from the program itself, and from modules that it alone can import."""

from __future__ import annotations

import pickle
import runpy
import subprocess
import sys
import threading
import types
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count

import polars as pl
import pytest
from places import Gate, Notes

import polars_async as pa
from polars_async.executors import exports
from polars_async.executors.main_module import ResolvingMain

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux"),
    pytest.mark.filterwarnings("ignore::polars.exceptions.PolarsInefficientMapWarning"),
]

A = pl.col("a")
ONE = pl.LazyFrame({"a": [1]})

SCRIPT = """
import collections, dataclasses, enum, functools, typing
import polars as pl

@functools.lru_cache
def cached(x):
    return x + 1

@functools.cache
def recursive(x):
    return recursive(x - 1) + 1 if x < 20 and x > 0 else 0

@functools.singledispatch
def dispatched(x):
    return [dispatched(each) for each in x][0]

@dispatched.register
def _(x: int):
    return x + 2

Parameters = typing.ParamSpec("Parameters")
Result = typing.TypeVar("Result")

def decorator(function: typing.Callable[Parameters, Result]) -> typing.Callable[Parameters, Result]:
    @functools.wraps(function)
    def inner(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
        return function(*args, **options)
    return inner

@decorator
def wrapped(x):
    return x + 3

UserId = typing.NewType("UserId", int)

class Nothing:
    def __reduce__(self):
        return "NOTHING"

NOTHING = Nothing()

def is_nothing(x, default=NOTHING):
    return int(default is NOTHING and Record().held is NOTHING)

class Color(enum.Enum):
    RED = 4

def colour(x):
    return Color["RED"].value if Color(4) is Color.RED else 0

@dataclasses.dataclass
class Record:
    number: int = 5
    held: object = NOTHING

def record(x):
    return Record(x).number + Record().number

Pair = collections.namedtuple("Pair", "first second")

def pair(x):
    return Pair(x, 6).second

class Base:
    def __init__(self, number):
        self.number = number

    @functools.lru_cache
    def kept(self, x):
        return x + self.number

    @functools.cached_property
    def twice(self):
        return self.number * 2

class Derived(Base):
    next = None

    def kept(self, x):
        return super().kept(x) + self.twice + (self.next.number if self.next else 0)

Derived.next = Derived(100)

def is_even(x):
    return 10 if x == 0 else is_odd(x - 1)

def is_odd(x):
    return 11 if x == 0 else is_even(x - 1)

def __hidden(x):
    return x + 12

def __dunder__(x):
    return x + 13

def local(number):
    @functools.lru_cache
    def inner(x):
        return x + number
    return lambda x: inner(x)

def uses_all(x):
    return sum(function(x) for function in FUNCTIONS)

FUNCTIONS = [
    cached, recursive, dispatched, wrapped, UserId, is_nothing, colour, record, pair, is_even,
    Derived(7).kept, functools.partial(max, 8), __hidden, __dunder__, local(9),
]
"""
NAMES = [
    *("cached", "recursive", "dispatched", "wrapped", "UserId", "is_nothing", "colour", "record"),
    *("pair", "is_even", "__hidden", "__dunder__", "uses_all"),
]


@pytest.fixture(scope="module")
def processes():
    with pa.Collector(executor="processes", max_running=2) as collector:
        yield collector


@pytest.fixture
def place(executor, processes):
    """A collector, whose workers are warm in processes."""
    if executor == "processes":
        yield processes
    else:
        with pa.Collector(executor=executor) as collector:
            yield collector


def element_wise(function):
    return ONE.select(A.map_elements(function, return_dtype=pl.Int64))


def on_frames(function):
    return ONE.map_batches(function)


def with_values(function):
    return lambda frame: pl.DataFrame({"a": [function(value) for value in frame["a"]]})


WAYS = {
    "in an expression": element_wise,
    "in a lambda of an expression": lambda function: element_wise(lambda x: function(x) + 1),
    "on frames": lambda function: on_frames(with_values(function)),
    "in an expression that was pickled": lambda function: pickle.loads(
        pickle.dumps(element_wise(function))
    ),
}


@pytest.mark.everywhere
@pytest.mark.parametrize("way", WAYS)
def test_what_a_script_defines_is_the_same_in_a_worker(place, main, way):
    names = main(SCRIPT)
    queries = [WAYS[way](names[name]) for name in NAMES]
    here = [query.collect().item() for query in queries]
    handles = [place.collect_async(query) for query in queries]
    assert [handle.result(30).item() for handle in handles] == here


@pytest.mark.everywhere
def test_function_of_a_script_is_found_by_its_own_name(place, main):
    names = main(SCRIPT + "def use(frame): return frame.select(a=pl.lit(uses_all(1), pl.Int64))\n")
    found = place.collect_async(on_frames(names["use"])).result(30).item()
    assert found == names["uses_all"](1)


@pytest.mark.everywhere
def test_source_of_a_script_unpickles_what_it_names_late(place, main):
    names = main(
        SCRIPT
        + """
import pickle
PICKLED = pickle.dumps([NOTHING, cached])

def read(with_columns, predicate, n_rows, batch_size):
    for number in range(3):
        nothing, function = pickle.loads(PICKLED)
        yield pl.DataFrame({"a": [function(number) if nothing is NOTHING else -1]})
"""
    )
    source = pl.io.plugins.register_io_source(names["read"], schema={"a": pl.Int64})
    assert place.collect_async(source).result(30)["a"].to_list() == [1, 2, 3]

    async def batches():
        found = place.collect_batches_async(source, chunk_size=1)
        return [value async for batch in found for value in batch["a"]]

    import asyncio  # noqa: PLC0415

    assert asyncio.run(batches()) == [1, 2, 3]


def test_threads_that_know_of_no_query_look_up_in_those_that_run():
    found = []

    def load(module, name):
        return pickle.dumps(name) if module == "__main__" and name == "of_a_test" else None

    def ask():
        found.append(sys.modules["__main__"].of_a_test)
        found.append(hasattr(sys.modules["__main__"], "of_no_test"))

    with ResolvingMain(load):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert found == ["of_a_test", False]
    assert not hasattr(sys.modules["__main__"], "of_a_test")


def test_threads_of_one_query_ask_one_after_the_other(processes, main):
    code = "\n".join(f"def f{number}(x): return x + {number}" for number in range(20))
    names = main(code)
    by_name = [pickle.dumps(names[f"f{number}"]) for number in range(20)]

    def at_once(frame):
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

        with ThreadPoolExecutor(20) as pool:
            functions = list(pool.map(pickle.loads, by_name))
        return frame.select(a=pl.Series([sum(function(1) for function in functions)]))

    for _ in range(5):
        assert processes.collect_async(on_frames(at_once)).result(30).item() == 210


def test_thread_that_a_function_leaves_behind_harms_no_later_query_by_what_it_asks():
    gate = Gate()

    def leave_threads(frame):
        def ask():
            for number in count():
                hasattr(sys.modules["__main__"], f"of_no_test_{threading.get_ident()}_{number}")
                if gate.is_set():
                    return

        for _ in range(4):
            threading.Thread(target=ask, daemon=True).start()
        return frame

    with pa.Collector(executor="processes", max_running=1) as collector:
        assert collector.collect_async(on_frames(leave_threads)).result(30).item() == 1
        for number in range(300):
            query = pl.LazyFrame({"a": [number]})
            assert collector.collect_async(query).result(30).item() == number
        gate.set()
        assert collector.stats()["workers_died"] == 0


def test_script_without_cloudpickle_is_told_what_to_install(processes, main, monkeypatch):
    exports._pickler.cache_clear()
    for name in ("cloudpickle", "cloudpickle.cloudpickle"):
        monkeypatch.setitem(sys.modules, name, None)
    ours = main("def ours(frame): return frame\n")["ours"]
    with pytest.raises(pa.PolarsAsyncError, match=r"__main__\.ours is defined in this program al"):
        processes.collect_async(on_frames(ours)).result(30)


NAMESPACES = """
import polars as pl

@pl.api.register_expr_namespace("ours")
class OfExpressions:
    def __init__(self, it):
        self.it = it
    def plus(self, number):
        return self.it + number

@pl.api.register_series_namespace("ours")
class OfSeries(OfExpressions): ...

@pl.api.register_dataframe_namespace("ours")
class OfFrames(OfExpressions): ...

@pl.api.register_lazyframe_namespace("ours")
class OfQueries(OfExpressions):
    def plus(self, number):
        return self.it.select(pl.col("a").ours.plus(number))

def use_all(frame):
    frame = frame.select(a=frame["a"].ours.plus(1)).ours.plus(10)
    return frame.lazy().ours.plus(100).collect().select(pl.col("a").ours.plus(1000))
"""
KINDS = (pl.Expr, pl.Series, pl.DataFrame, pl.LazyFrame)


@pytest.fixture
def no_namespace_is_left():
    yield
    for kind in KINDS:
        if "ours" in vars(kind):
            del kind.ours
            kind._accessors.discard("ours")


@pytest.mark.everywhere
@pytest.mark.usefixtures("no_namespace_is_left")
def test_namespaces_that_a_script_has_registered_are_there(place, main):
    query = on_frames(main(NAMESPACES)["use_all"])
    assert place.collect_async(query).result(30).item() == 1112
    again = NAMESPACES.replace("+ number", "- number")
    with pytest.warns(UserWarning, match="overriding"):
        use = main(again)["use_all"]
    query = element_wise(lambda x: use(pl.DataFrame({"a": [x]})).item())
    assert place.collect_async(query).result(30).item() == -1110


@pytest.mark.usefixtures("no_namespace_is_left")
def test_namespaces_of_a_module_that_a_worker_has_not_imported_are_there(
    processes, main, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "with_namespaces_of_ours.py").write_text(NAMESPACES)
    names = main(
        "import with_namespaces_of_ours\n"
        "def use(frame): return frame.select(frame['a'].ours.plus(1))\n"
    )
    assert processes.collect_async(on_frames(names["use"])).result(30).item() == 2
    sys.modules.pop("with_namespaces_of_ours")


@pytest.mark.everywhere
@pytest.mark.usefixtures("no_namespace_is_left")
def test_attribute_that_nobody_has_is_missing_as_ever(place, main):
    main(NAMESPACES)

    def ask(frame):
        return frame.no_such_attribute

    with pytest.raises(AttributeError, match="'DataFrame' object has no attribute 'no_such_attr"):
        place.collect_async(on_frames(ask)).result(30)


MODULE = """
import enum, functools
import polars as pl

FACTOR = 3

class RefusedError(ValueError): ...

@functools.cache
def cached(x):
    return x * FACTOR

def is_even(x):
    return True if x == 0 else is_odd(x - 1)

def is_odd(x):
    return False if x == 0 else is_even(x - 1)

class Kind(enum.Enum):
    ONE = 1

def use(frame):
    assert is_even(4) and Kind(1) is Kind.ONE
    return frame.select(a=pl.lit(cached(1), pl.Int64))

def lazily(x):
    import module_of_a_program
    return module_of_a_program.cached(x)

def refuse(frame):
    raise RefusedError("no")
"""


def _from_a_file(path):
    spec = spec_from_file_location("module_of_a_program", path)
    module = sys.modules["module_of_a_program"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def _made_by_hand(_path):
    module = sys.modules["module_of_a_program"] = types.ModuleType("module_of_a_program")
    exec(MODULE, vars(module))
    return vars(module)


def _run_by_its_path(path):
    # As `runpy` has it while the program runs.
    names = runpy.run_path(path, run_name="module_of_a_program")
    module = sys.modules["module_of_a_program"] = types.ModuleType("module_of_a_program")
    names.update({k: v for k, v in vars(module).items() if k not in names})
    module.__dict__.update(names)
    return vars(module)


@pytest.mark.everywhere
@pytest.mark.parametrize("make", [_from_a_file, _made_by_hand, _run_by_its_path])
def test_module_that_cannot_be_imported_is_as_the_program(place, tmp_path, monkeypatch, make):
    monkeypatch.delitem(sys.modules, "module_of_a_program", raising=False)
    (tmp_path / "any_name.py").write_text(MODULE)
    names = make(tmp_path / "any_name.py")
    is_even = names["is_even"]
    for _ in range(2):  # the second finds nothing left of the first
        assert place.collect_async(on_frames(names["use"])).result(30).item() == 3
        assert place.collect_async(element_wise(names["cached"])).result(30).item() == 3
        assert place.collect_async(element_wise(names["lazily"])).result(30).item() == 3
        assert place.collect_async(element_wise(lambda x: int(is_even(x)))).result(30).item() == 0
        with pytest.raises(names["RefusedError"], match="no"):
            place.collect_async(on_frames(names["refuse"])).result(30)
    sys.modules.pop("module_of_a_program", None)


@pytest.mark.everywhere
def test_module_that_nobody_has_is_missing_as_ever(place):
    notes = Notes()

    def ask(_):
        try:
            import no_such_module  # noqa: F401, PLC0415
        except ModuleNotFoundError as error:
            notes.append(str(error))
        raise ValueError("after all")

    with pytest.raises(ValueError, match="after all"):
        place.collect_async(on_frames(ask)).result(30)
    assert list(notes) == ["No module named 'no_such_module'"]


TEST_MODULE = """
import functools
import polars as pl
import polars_async as pa

def ours(frame):
    return frame * helper(2)

@functools.cache
def helper(x):
    return x

def test_it():
    lf = pl.LazyFrame({"a": [1]})
    with pa.Collector(executor="processes") as collector:
        assert collector.collect_async(lf.map_batches(ours)).result(30).item() == 2
        query = lf.select(pl.col("a").map_elements(helper, return_dtype=pl.Int64))
        assert collector.collect_async(query).result(30).item() == 1
"""


def test_functions_of_tests_run_in_workers_where_they_cannot_be_imported(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_own.py").write_text(TEST_MODULE)
    # As the command `pytest`, which does not put the current folder into the path.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--import-mode=importlib", "tests"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False
    )
    assert "1 passed" in done.stdout, done.stdout


PROGRAM = """
import functools
import polars as pl
import polars_async as pa

@functools.cache
def cached(x):
    return x * 5

def ours(frame):
    return frame.select(a=pl.lit(cached(1), pl.Int64))

if __name__ == "__main__":
    lf = pl.LazyFrame({"a": [1]})
    with pa.Collector(executor="processes") as collector:
        print(collector.collect_async(lf.map_batches(ours)).result(30).item())
        query = lf.select(pl.col("a").map_elements(cached, return_dtype=pl.Int64))
        print(collector.collect_async(query).result(30).item())
"""


def _as_zip(folder):
    with zipfile.ZipFile(folder / "program.zip", "w") as file:
        file.writestr("__main__.py", PROGRAM)
    return ["program.zip"]


def _as_package(folder):
    (folder / "package").mkdir()
    (folder / "package" / "__main__.py").write_text(PROGRAM)
    return ["-m", "package"]


def _as_runpy(folder):
    (folder / "program.py").write_text(PROGRAM)
    return ["-c", "import runpy; runpy.run_path('program.py', run_name='__main__')"]


STARTS = {
    "-c": lambda _: ["-c", PROGRAM],
    "stdin": lambda _: ["-"],
    "zip": _as_zip,
    "-m": _as_package,
    "runpy": _as_runpy,
}


@pytest.mark.parametrize("how", STARTS)
def test_program_is_found_however_it_was_started(tmp_path, how):
    command = [sys.executable, *STARTS[how](tmp_path)]
    pipes = {"input": PROGRAM, "capture_output": True, "text": True}
    done = subprocess.run(command, **pipes, cwd=tmp_path, timeout=150, check=False)
    assert (done.stdout.split(), done.stderr) == (["5", "5"], "")
