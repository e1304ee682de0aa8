"""Whether a query is told to be fit for the GPU, by a cudf-polars that is there, faked or not."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import ModuleType

import packaging.requirements  # noqa: F401  # importable whatever a test makes of sys.path
import polars as pl
import pytest
from test_cli import install_cudf

import polars_async as pa
from polars_async import Reason, gpu_status, gpu_support
from polars_async._runtime import upstream
from polars_async.errors import describe
from polars_async.gpu import cudf as _cudf
from polars_async.gpu import support
from polars_async.gpu.support import Support, unsupported_error

ROOT = Path(__file__).parents[1]
QUERY = pl.LazyFrame({"a": [1, 2]}).sum()
FLAGS = pl.QueryOptFlags()
OPAQUE = "opaque python mapfunction"


class DriverError(RuntimeError):
    """As those of the packages that talk to the driver."""


DriverError.__module__ = "cuda.pathfinder._dynamic_libs.load_dl_common"


@pytest.fixture(autouse=True)
def _no_import_failed(monkeypatch):
    monkeypatch.setattr(_cudf, "_import_failure", None)
    monkeypatch.delenv(support.EXECUTOR_VARIABLE, raising=False)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Give a folder on sys.path, and hide a cudf-polars that is really installed."""
    kept = [each for each in sys.path if not any(Path(each or ".").glob("cudf_polars*"))]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *kept])
    monkeypatch.setitem(sys.modules, "cudf_polars", None)
    del sys.modules["cudf_polars"]
    return tmp_path


class Cudf(ModuleType):
    """A cudf-polars whose translator says what it is told to say, or raises it."""

    def __init__(self, says=None, *, fails_in=None):
        super().__init__("cudf_polars")
        self.asked = []
        asked = self.asked

        class Translator:
            def __init__(self, plan, engine):
                asked.append((plan, engine))
                self.step("__init__")

            def translate_ir(self):
                self.step("translate_ir")

            def unsupported_operations_error(self):
                self.step("unsupported_operations_error")
                return says

            def step(self, name):
                if name == fails_in:
                    raise says

        self.Translator = Translator


@pytest.fixture
def cudf(monkeypatch):
    def make(*args, **options):
        module = Cudf(*args, **options)
        monkeypatch.setitem(sys.modules, "cudf_polars", module)
        return module

    return make


def unsupported(*errors):
    """Sum up errors as cudf-polars does."""
    lines = "\n".join(f"- {type(each).__name__}: {each}" for each in errors)
    message = f"Query execution with GPU not possible: unsupported operations.\n{lines}"
    return NotImplementedError(message, list(errors))


# The three answers


def test_supported_query_is_a_yes(cudf):
    cudf()
    answer = gpu_support(QUERY)
    assert answer.answer == "yes"
    assert answer == pa.GpuSupport(
        answer=Support.YES, message="cudf-polars supports every operation of this query"
    )


def test_unsupported_query_is_a_no_with_every_operation(cudf):
    errors = [NotImplementedError(OPAQUE), ValueError("too many"), NotImplementedError()]
    cudf(unsupported(*errors, NotImplementedError(OPAQUE)))
    assert gpu_support(QUERY) == pa.GpuSupport(
        answer=Support.NO,
        operations=(OPAQUE, "ValueError: too many", "NotImplementedError"),
        reason=Reason.UNSUPPORTED_QUERY,
        message=f"cudf-polars does not support this query ({OPAQUE}; ValueError: too many; "
        "NotImplementedError): rewrite what is named, or run it on the CPU",
    )


@pytest.mark.parametrize("more", [(), (None,), (["text"],), ([],)])
def test_no_without_a_list_of_errors_is_told_in_its_own_words(cudf, more):
    cudf(NotImplementedError("no\nand no", *more))
    answer = gpu_support(QUERY)
    assert answer.answer == "no"
    [operation] = answer.operations
    assert "no" in operation


GPU_FAILURES = [
    DriverError("Ensure the NVIDIA display driver is installed"),
    RuntimeError("Failed to initialize CUDA context: 100"),
    RuntimeError("RMM failure at: cuda_async_memory_resource.hpp:90: not supported"),
    MemoryError("std::bad_alloc: out_of_memory: CUDA error (failed to allocate 8 bytes)"),
]


@pytest.mark.parametrize("failure", GPU_FAILURES, ids=str)
def test_gpu_that_cannot_be_asked_is_no_no(cudf, failure):
    cudf(unsupported(failure))
    answer = gpu_support(QUERY)
    assert (answer.answer, answer.operations) == ("unknown", ())
    assert answer.reason is Reason.GPU_NEEDED
    assert f"({describe(failure)}): ask on a host where gpu_status()" in answer.message


def test_driver_that_nvml_does_not_find_is_no_no(cudf):
    failure = pytest.importorskip("pynvml").NVMLError(12)
    cudf(failure, fails_in="__init__")
    answer = gpu_support(QUERY)
    assert (answer.answer, answer.reason) == ("unknown", Reason.GPU_NEEDED)
    assert "NVMLError_LibraryNotFound" in answer.message


@pytest.mark.parametrize("failure", GPU_FAILURES, ids=str)
def test_what_is_not_supported_is_a_no_whatever_the_gpu_says(cudf, failure):
    cudf(unsupported(failure, NotImplementedError(OPAQUE)))
    answer = gpu_support(QUERY)
    assert (answer.answer, answer.operations) == ("no", (OPAQUE,))


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("CUDA has no such thing"),
        RuntimeError("CUDF failure at: unary/cast_ops.cu:316: type must be fixed-width"),
        ValueError("CUDA"),
    ],
    ids=str,
)
def test_error_of_the_query_is_a_no_though_it_speaks_of_cuda(cudf, error):
    cudf(unsupported(error))
    assert gpu_support(QUERY).answer == "no"


@pytest.mark.parametrize("says", [None, unsupported(ValueError("no")), GPU_FAILURES[0]])
def test_answer_has_no_truth_value(cudf, says):
    cudf(says)
    answer = gpu_support(QUERY)
    with pytest.raises(TypeError, match=r"compare its answer, as in gpu_support\(lf\).answer =="):
        bool(answer)
    with pytest.raises(TypeError):
        assert not answer
    assert pickle.loads(pickle.dumps(answer)) == answer
    assert len({answer, gpu_support(QUERY)}) == 1
    with pytest.raises(FrozenInstanceError):
        answer.answer = Support.YES


# What is asked


def test_translator_is_given_the_plan_with_its_optimizations(cudf):
    module = cudf()
    query = QUERY.select(b=1, c="a").select("c")
    gpu_support(query)
    gpu_support(query, optimizations=pl.QueryOptFlags.none())
    schemas = []
    for plan, _ in module.asked:
        plan.set_node(plan.get_inputs()[0])
        schemas.append(list(plan.get_schema()))
    assert schemas == [["a"], ["b", "c"]]


class Spmd(pl.GPUEngine):
    """As the engines of cudf-polars, which have a constructor of their own."""

    def __init__(self):
        super().__init__(executor_options={"cluster": "spmd"})


@pytest.mark.parametrize(
    ("engine", "executor_options"),
    [
        ("gpu", {"min_device_size": support._ANY_SIZE}),
        (pl.GPUEngine(), {"min_device_size": support._ANY_SIZE}),
        (pl.GPUEngine(executor="streaming"), {"min_device_size": support._ANY_SIZE}),
        (pl.GPUEngine(executor="in-memory"), None),
        (pl.GPUEngine(executor_options={"min_device_size": 7}), {"min_device_size": 7}),
        (
            pl.GPUEngine(executor_options={"fallback_mode": "raise"}),
            {"fallback_mode": "raise", "min_device_size": support._ANY_SIZE},
        ),
        (Spmd(), {"cluster": "spmd", "min_device_size": support._ANY_SIZE}),
    ],
    ids=lambda each: str(getattr(each, "config", each)),
)
def test_engine_is_asked_as_it_is_but_for_the_size_of_the_device(cudf, engine, executor_options):
    module = cudf()
    before = None if engine == "gpu" else dict(engine.config)
    gpu_support(QUERY, engine=engine)
    [(_, asked)] = module.asked
    assert isinstance(asked, pl.GPUEngine)
    assert asked.config.get("executor_options") == executor_options
    if before is not None:
        assert engine.config == before
        assert {**asked.config, "executor_options": 0} == {**before, "executor_options": 0} or (
            asked is engine
        )


def test_other_options_of_the_engine_are_kept(cudf):
    module = cudf()
    gpu_support(QUERY, engine=pl.GPUEngine(device=1, raise_on_fail=True, parquet_options={"a": 1}))
    [(_, asked)] = module.asked
    assert asked.device == 1
    assert asked.config["raise_on_fail"] is True
    assert asked.config["parquet_options"] == {"a": 1}


def test_executor_of_the_environment_is_asked_as_it_is(cudf, monkeypatch):
    module, engine = cudf(), pl.GPUEngine()
    monkeypatch.setenv(support.EXECUTOR_VARIABLE, "in-memory")
    gpu_support(QUERY, engine=engine)
    [(_, asked)] = module.asked
    assert asked is engine


def test_nothing_of_the_query_runs(cudf):
    cudf()
    ran = []
    query = QUERY.map_batches(ran.append).select(
        pl.col("a").map_batches(ran.append, return_dtype=pl.Int64)
    )
    assert gpu_support(query).answer == "yes"
    assert ran == []


# What is not asked


@pytest.mark.parametrize("lf", [None, pl.DataFrame({"a": [1]}), [QUERY], "a"])
def test_what_is_no_frame_is_a_type_error(lf):
    with pytest.raises(TypeError, match="lf must be a LazyFrame, got "):
        gpu_support(lf)


@pytest.mark.parametrize("engine", ["auto", "streaming", "GPU", None, pl.InMemoryEngine()])
def test_engine_that_is_no_gpu_engine_is_a_value_error(engine):
    with pytest.raises(ValueError, match=r"engine must be 'gpu' or a polars\.GPUEngine .*, got "):
        gpu_support(QUERY, engine=engine)


@pytest.mark.parametrize("installed", [True, False])
def test_error_of_the_query_is_polars_own_on_every_host(cudf, monkeypatch, tmp_path, installed):
    if installed:
        cudf()
    else:
        monkeypatch.setitem(sys.modules, "cudf_polars", None)
    wrong = [QUERY.select("b"), pl.scan_parquet(tmp_path / "none.parquet")]
    for query in wrong:
        with pytest.raises((pl.exceptions.ColumnNotFoundError, FileNotFoundError)) as collected:
            query.collect()
        with pytest.raises(collected.type) as asked:
            gpu_support(query)
        assert str(asked.value) == str(collected.value)


def test_without_cudf_polars_the_answer_is_unknown(site):  # noqa: ARG001  # hides it
    assert gpu_support(QUERY) == pa.GpuSupport(
        answer=Support.UNKNOWN,
        reason=Reason.CUDF_MISSING,
        message="cudf-polars is not installed: install polars-async[gpu-cu13] or "
        "polars-async[gpu-cu12], with a Polars that it supports",
    )


def test_blocked_cudf_polars_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudf_polars", None)
    assert gpu_support(QUERY).reason is Reason.CUDF_MISSING


def test_incompatible_cudf_polars_is_not_imported(site):
    install_cudf(site, polars="<1", module="raise SystemExit('imported')")
    answer = gpu_support(QUERY)
    assert (answer.answer, answer.reason) == ("unknown", Reason.CUDF_INCOMPATIBLE)
    assert 'install "polars<1", or a cudf-polars-cu13 that supports Polars' in answer.message
    assert "cudf_polars" not in sys.modules


def test_uninstalled_leftover_is_unknown(site):
    install_cudf(site)
    (site / "cudf_polars" / "__init__.py").unlink()
    importlib.invalidate_caches()
    assert gpu_support(QUERY).reason is Reason.CUDF_BROKEN


@pytest.mark.parametrize("error", ["ImportError", "AttributeError", "RuntimeError", "OSError"])
def test_failed_import_is_unknown_noted_and_not_tried_again(site, error):
    tries = site / "tries"
    count = f"with open({str(tries)!r}, 'a') as tries: tries.write('.')"
    install_cudf(site, module=f"{count}\nraise {error}('libcudf is gone')\n")
    for _ in range(2):
        answer = gpu_support(QUERY)
        assert (answer.answer, answer.reason) == ("unknown", Reason.CUDF_BROKEN)
        assert f"its import fails ({error}: libcudf is gone): reinstall" in answer.message
    assert tries.read_text() == "."
    assert _cudf.import_failure() == f"{error}: libcudf is gone"
    gpu_status(refresh=True)
    gpu_support(QUERY)
    assert tries.read_text() == ".."


def test_module_without_a_translator_is_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudf_polars", ModuleType("cudf_polars"))
    answer = gpu_support(QUERY)
    assert (answer.answer, answer.reason) == ("unknown", Reason.TRANSLATION_FAILED)
    assert answer.message.startswith("the translator of cudf-polars")
    assert "(AttributeError: module 'cudf_polars' has no attribute 'Translator')" in answer.message
    assert answer.message.endswith("run the query with GPUEngine(raise_on_fail=True) to see")


@pytest.mark.parametrize("step", ["__init__", "translate_ir", "unsupported_operations_error"])
@pytest.mark.parametrize(
    "error",
    [
        TypeError("takes 3 arguments"),
        NotImplementedError("No support for polars IR version=(15, 0)"),
        ValueError("Unknown executor 'ranch'"),
        pl.exceptions.PanicException("not yet implemented"),
    ],
    ids=str,
)
def test_translator_that_fails_is_unknown(cudf, step, error):
    cudf(error, fails_in=step)
    answer = gpu_support(QUERY)
    assert (answer.answer, answer.operations) == ("unknown", ())
    assert answer.reason is Reason.TRANSLATION_FAILED
    assert f"could not be asked ({type(error).__name__}: {error})" in answer.message


@pytest.mark.parametrize("says", [False, [], "no", KeyboardInterrupt])
def test_answer_of_another_kind_is_unknown(cudf, says):
    cudf(says)
    answer = gpu_support(QUERY)
    assert (answer.answer, answer.reason) == ("unknown", Reason.TRANSLATION_FAILED)


@pytest.mark.parametrize("name", ["translate_ir", "unsupported_operations_error"])
def test_translator_that_lacks_a_method_is_unknown(cudf, name):
    delattr(cudf().Translator, name)
    answer = gpu_support(QUERY)
    assert (answer.answer, answer.reason) == ("unknown", Reason.TRANSLATION_FAILED)


def test_polars_that_hands_out_no_plan_is_unknown(cudf, monkeypatch):
    module = cudf()
    monkeypatch.setattr(upstream, "ask_optimized_plan", lambda *_: None)
    answer = gpu_support(QUERY)
    assert (answer.answer, answer.reason) == ("unknown", Reason.TRANSLATION_FAILED)
    assert "Polars hands out its plans no more" in answer.message
    assert module.asked == []


def test_interrupt_is_not_an_answer(cudf):
    cudf(KeyboardInterrupt(), fails_in="translate_ir")
    with pytest.raises(KeyboardInterrupt):
        gpu_support(QUERY)


# The error itself


def test_unsupported_error_is_that_of_cudf_polars(cudf):
    error = unsupported(NotImplementedError(OPAQUE))
    module = cudf(error)
    assert unsupported_error(QUERY, pl.GPUEngine(), FLAGS) is error
    assert len(module.asked) == 1
    cudf()
    assert unsupported_error(QUERY, pl.GPUEngine(), FLAGS) is None


def test_unsupported_error_lets_out_what_fails(cudf, monkeypatch):
    cudf(KeyError("a"), fails_in="translate_ir")
    with pytest.raises(KeyError):
        unsupported_error(QUERY, pl.GPUEngine(), FLAGS)
    monkeypatch.setitem(sys.modules, "cudf_polars", None)
    with pytest.raises(ImportError):
        unsupported_error(QUERY, pl.GPUEngine(), FLAGS)


# With the real one

# In a process of its own: the import cannot be undone, and other tests look at who imports it.
REAL = """
import json, sys
from pathlib import Path
import polars as pl
import polars_async as pa
from benchmarks.pdsh import data
from benchmarks.pdsh.queries import QUERIES
from polars_async.gpu.support import unsupported_error

assert "cudf_polars" not in sys.modules
lf = pl.LazyFrame({"a": [1.0, 2.0], "b": ["x", "y"]})
other = pl.LazyFrame({"c": [1.5]})
queries = {
    "sum": lf.group_by("b").agg(pl.col("a").sum()).sort("b"),
    "filter": lf.filter(pl.col("a") > 1, pl.col("b").is_in(["x", "z"])),
    "frame udf": lf.map_batches(lambda df: df),
    "column udf": lf.select(pl.col("a").map_batches(lambda s: s, return_dtype=pl.Float64)),
    "two": lf.select(pl.col("a").ewm_mean(com=1), pl.col("b").str.to_date("%Y").alias("d")),
    "inequality": lf.join_where(other, pl.col("a") < pl.col("c")),
    "both": lf.join_where(other, pl.col("a") < pl.col("c")).map_batches(lambda df: df),
}
tables = data.tables(data.make(0.01, Path(sys.argv[1])))
queries |= {f"q{number}": query(tables) for number, query in QUERIES.items()}
engines = {
    "": pl.GPUEngine(),
    "in-memory": pl.GPUEngine(executor="in-memory"),
    "options": pl.GPUEngine(raise_on_fail=True, executor_options={"fallback_mode": "raise"}),
    "wrong": pl.GPUEngine(executor="ranch"),
}

def told(support):
    return [support.answer, support.operations, support.reason, support.message]

found = {
    engine: {name: told(pa.gpu_support(lf, engine=options)) for name, lf in queries.items()}
    for engine, options in engines.items()
}
error = unsupported_error(queries["frame udf"], pl.GPUEngine(), pl.QueryOptFlags())
print(json.dumps([found, repr(error)]))
"""


@pytest.fixture(scope="session")
def real():
    """Ask the real cudf-polars on a host where no driver is to be seen."""
    found = _cudf.find_cudf_polars()
    if found.diagnosis is not None or not found.installed:
        pytest.skip(found.diagnosis.message if found.diagnosis else "cudf-polars is not installed")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REAL, ROOT / ".cache" / "data"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# They join by inequality, for which the translator makes something on the device.
ASK_THE_GPU = {"inequality", "q22"}
EITHER_WAY = ("yes", "unknown")  # a host with a driver can tell
UNSUPPORTED = {
    "frame udf": [OPAQUE],
    "column udf": ["anonymousfunction"],
    "two": [
        "No handler for Expr function node with name=EwmFunction.Mean",
        "Strptime cache is a CPU feature",
    ],
    "both": [OPAQUE],
}


@pytest.mark.parametrize("engine", ["", "in-memory", "options"])
def test_real_translator_answers_each_query(real, engine):
    answers = real[0][engine]
    assert len([name for name in answers if name.startswith("q")]) == 22
    no_driver = gpu_status().reason is Reason.NO_LIBRARY
    for name, (answer, operations, reason, message) in answers.items():
        if name in UNSUPPORTED:
            assert (answer, operations, reason) == ("no", UNSUPPORTED[name], "unsupported_query")
        elif name in ASK_THE_GPU and no_driver:
            assert (answer, operations, reason) == ("unknown", [], "gpu_needed")
            assert "DynamicLibNotFoundError" in message
        elif name in ASK_THE_GPU:
            assert answer in EITHER_WAY
        else:
            assert (answer, operations, reason) == ("yes", [], None), name


def test_real_translator_that_takes_no_such_engine_is_unknown(real):
    for answer, _, reason, message in real[0]["wrong"].values():
        assert (answer, reason) == ("unknown", "translation_failed")
        assert "(ValueError: Unknown executor 'ranch')" in message


def test_real_error_is_given(real):
    assert real[1].startswith("NotImplementedError('Query execution with GPU not possible")
    assert OPAQUE in real[1]
