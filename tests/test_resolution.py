"""The decision table of DESIGN.md, cell by cell; and where the warning of a downgrade points."""

from __future__ import annotations

import inspect
import io
import os
import re
import subprocess
import sys
import threading
import warnings
from dataclasses import FrozenInstanceError, fields
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import polars as pl
import pytest

import polars_async as pa
from polars_async import api
from polars_async._runtime.upstream import AUTO_ENGINE
from polars_async.errors import EngineDowngradeWarning, EngineUnavailableError
from polars_async.gpu import probe as _probe
from polars_async.gpu.nvml import Host, HostDevice
from polars_async.reasons import Diagnosis, Reason
from polars_async.resolution import resolve_engine

VARIABLE = "POLARS_ENGINE_AFFINITY"
POLICY_VARIABLE = "POLARS_ASYNC_GPU"
ENGINE_VARIABLE = "POLARS_ASYNC_ENGINE"
PATHS = ("sync", "async", "background", "batches")
POLICIES = ("downgrade", "offload", "require")


QUERY = pl.LazyFrame({"a": [1, 2]}).sum()


class Ranch(pl.Engine):
    """An engine of somebody else's."""

    name = "ranch"

    def collect(self, lf, **_):
        raise NotImplementedError

    def execute(self, lf, **_):
        raise NotImplementedError


class Spmd(pl.GPUEngine):
    """As the engines of cudf-polars: a subclass of Polars' own."""


class Rival(Ranch):
    """A GPU engine by its name alone."""

    name = "gpu"


def plugin(engine, **options):
    return pa.AsyncEngine(pa.Collector(engine=engine, **options))


IN_MEMORY, STREAMING, RANCH = pl.InMemoryEngine(), pl.StreamingEngine(), Ranch()
GPU, SPMD, RIVAL = pl.GPUEngine(device=0), Spmd(), Rival()
STRICT, STRICT_SPMD = pl.GPUEngine(raise_on_fail=True), Spmd(raise_on_fail=True)


class Asks(NamedTuple):
    """What asking for `given` asks for; "gpu!" is a GPU engine that forbids the CPU."""

    given: object
    kind: str
    requested: object


def asks(given, kind, requested=None):
    return Asks(given, kind, given if requested is None else requested)


ARGUMENTS = (
    asks("auto", "nothing"),
    asks("in-memory", "in-memory"),
    asks("cpu", "in-memory"),
    asks("streaming", "streaming"),
    asks("gpu", "gpu"),
    asks("adaptive", "adaptive"),
    asks(IN_MEMORY, "in-memory"),
    asks(STREAMING, "streaming"),
    asks(GPU, "gpu"),
    asks(SPMD, "gpu"),
    asks(RIVAL, "gpu"),
    asks(STRICT, "gpu!"),
    asks(STRICT_SPMD, "gpu!"),
    asks(RANCH, "ranch"),
    asks(pa.AsyncEngine(), "nothing"),
    asks(plugin("auto"), "nothing"),
    asks(plugin("streaming"), "streaming", "streaming"),
    asks(plugin("gpu"), "gpu", "gpu"),
    asks(plugin("adaptive"), "adaptive", "adaptive"),
    asks(plugin(STRICT), "gpu!", STRICT),
    asks(plugin(RANCH), "ranch", RANCH),
    asks(plugin(plugin("gpu")), "gpu", "gpu"),
)

WRONG_ENGINES = ("GPU", "Streaming", "", "in_memory", " gpu", None, 5, b"gpu", pa.AsyncEngine)


class Affinity(NamedTuple):
    """What is set with Config, the variable as it is written afterwards, and what both ask for."""

    config: object
    variable: str | None
    source: str
    kind: str = "nothing"
    requested: object = None


AFFINITIES = (
    # Nobody asks
    Affinity(None, None, "default"),
    Affinity("auto", None, "default"),
    Affinity(None, "auto", "default"),
    Affinity(pa.AsyncEngine(), None, "default"),
    Affinity(pa.AsyncEngine(), "auto", "default"),
    # A name set with Config lives in the variable
    Affinity("in-memory", None, "environment", "in-memory", "in-memory"),
    Affinity("streaming", None, "environment", "streaming", "streaming"),
    Affinity("gpu", None, "environment", "gpu", "gpu"),
    # The variable, set when Polars was imported already
    Affinity(None, "in-memory", "environment", "in-memory", "in-memory"),
    Affinity(None, "cpu", "environment", "in-memory", "cpu"),
    Affinity(None, "streaming", "environment", "streaming", "streaming"),
    Affinity(None, "gpu", "environment", "gpu", "gpu"),
    Affinity("streaming", "gpu", "environment", "gpu", "gpu"),
    # An object set with Config
    Affinity(IN_MEMORY, None, "config", "in-memory", IN_MEMORY),
    Affinity(STREAMING, None, "config", "streaming", STREAMING),
    Affinity(RANCH, None, "config", "ranch", RANCH),
    Affinity(GPU, None, "config", "gpu", GPU),
    Affinity(STRICT, None, "config", "gpu!", STRICT),
    Affinity(plugin("streaming"), None, "config", "streaming", "streaming"),
    Affinity(plugin("gpu"), None, "config", "gpu", "gpu"),
    # Both: the object comes first, unless it asks for nothing
    Affinity(STREAMING, "gpu", "config", "streaming", STREAMING),
    Affinity(GPU, "cuda", "config", "gpu", GPU),
    Affinity(pa.AsyncEngine(), "gpu", "environment", "gpu", "gpu"),
    # Nonsense is said, and then nobody asks
    Affinity(None, "cuda", "default", "nonsense", "cuda"),
    Affinity(None, "GPU", "default", "nonsense", "GPU"),
    Affinity(None, "", "default", "nonsense", ""),
    Affinity("gpu", "in_memory", "default", "nonsense", "in_memory"),
    Affinity(pa.AsyncEngine(), "gpu ", "default", "nonsense", "gpu "),
)


def shown(engine):
    """Name an engine, and not the address of its collector."""
    own = getattr(engine, "_own_collector", None)
    return f"{engine}" if own is None else f"AsyncEngine({own.engine})"


def table(text):
    """Read a table: the last two columns by the others."""
    rows = (tuple(line.split()) for line in text.strip().splitlines()[1:])
    return {row[:-2]: row[-2:] for row in rows}


# What Polars documents for its own async functions, by the release series.
DEFAULT = "in-memory" if pl.__version__.startswith("1.") else "streaming"
NOBODY_ASKS = {"sync": "auto", "async": DEFAULT, "background": DEFAULT, "batches": "streaming"}
ADAPTIVE = {"sync": "auto", "async": "adaptive", "background": "adaptive", "batches": "streaming"}

# What runs instead of the GPU engine, after a colon why: the path or the host rules it out.
GPU_RULE = table(
    """
    asked  path        policy     GPU-usable      no-GPU-usable
    gpu    sync        downgrade  gpu             in-memory:host
    gpu    sync        offload    gpu             in-memory:host
    gpu    sync        require    gpu             error:host
    gpu    async       downgrade  in-memory:path  in-memory:path
    gpu    async       offload    gpu             in-memory:host
    gpu    async       require    gpu             error:host
    gpu    background  downgrade  in-memory:path  in-memory:path
    gpu    background  offload    gpu             in-memory:host
    gpu    background  require    gpu             error:host
    gpu    batches     downgrade  in-memory:path  in-memory:path
    gpu    batches     offload    gpu             in-memory:host
    gpu    batches     require    gpu             error:host
    gpu!   sync        downgrade  gpu             error:host
    gpu!   sync        offload    gpu             error:host
    gpu!   sync        require    gpu             error:host
    gpu!   async       downgrade  error:path      error:path
    gpu!   async       offload    gpu             error:host
    gpu!   async       require    gpu             error:host
    gpu!   background  downgrade  error:path      error:path
    gpu!   background  offload    gpu             error:host
    gpu!   background  require    gpu             error:host
    gpu!   batches     downgrade  error:path      error:path
    gpu!   batches     offload    gpu             error:host
    gpu!   batches     require    gpu             error:host
    """
)

# The policy by the argument gpu= and by POLARS_ASYNC_GPU, which is read for a GPU engine alone.
POLICY = {
    (None, None): "downgrade",
    (None, "downgrade"): "downgrade",
    (None, "offload"): "offload",
    (None, "require"): "require",
    (None, "always"): "wrong variable",
    (None, ""): "downgrade",
    **{("downgrade", other): "downgrade" for other in (None, "require", "always")},
    **{("offload", other): "offload" for other in (None, "downgrade", "always")},
    **{("require", other): "require" for other in (None, "downgrade", "always")},
    **{("always", other): "wrong argument" for other in (None, "offload")},
    ("", None): "wrong argument",
}

PATH_REASONS = {
    "async": Reason.ASYNC_PATH,
    "background": Reason.BACKGROUND_PATH,
    "batches": Reason.BATCHES_PATH,
}


class Gpu(NamedTuple):
    """A host, the module cudf_polars on it, and what the messages have to say of it."""

    host: Host
    module: ModuleType | None
    reason: Reason | None = None
    cause: str = ""
    remedy: str = ""


H100 = HostDevice(index=0, name="NVIDIA H100 80GB HBM3", compute_capability=(9, 0))
ASLEEP = Diagnosis(Reason.NVML_ERROR, "the driver sleeps", "wake it up")
HOSTS = {
    "usable": Gpu(Host(devices=(H100,), cuda_version=(13, 0)), ModuleType("cudf_polars")),
    "no cudf-polars": Gpu(
        Host(devices=(H100,), cuda_version=(13, 0)),
        None,
        Reason.CUDF_MISSING,
        "cudf-polars is not installed",
        "install polars-async[gpu-cu13]",
    ),
    "no driver": Gpu(Host(diagnosis=ASLEEP), ModuleType("cudf_polars"), *ASLEEP),
}


@pytest.fixture(autouse=True)
def _own_world(monkeypatch):
    """Ask a fresh probe and a fresh collector; take back what a test sets and what Polars keeps."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    for variable in (VARIABLE, POLICY_VARIABLE, ENGINE_VARIABLE):
        # Set first, so that at the end monkeypatch also takes away what a test has written.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(_probe, "probe", _probe.Probe())
    monkeypatch.setattr(api._Default, "collector", None)
    with pl.Config():
        pl.Config.set_engine_affinity(None)
        yield


@pytest.fixture
def host(monkeypatch):
    """Put this process on a host of `HOSTS`."""

    def put(name):
        gpu = HOSTS[name]
        _probe.probe.override(gpu.host)
        monkeypatch.setitem(sys.modules, "cudf_polars", gpu.module)
        return gpu

    return put


@pytest.fixture
def no_gpu(host):
    return host("no driver")


def write(variable, value):
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


def set_affinity(affinity):
    pl.Config.set_engine_affinity(affinity.config)
    if affinity.variable is not None:
        write(VARIABLE, affinity.variable)


# The table


class Question(NamedTuple):
    """One way to ask; `policy` is what `given`, the argument gpu=, and the variable make of it."""

    argument: Asks
    affinity: Affinity
    path: str
    given: str | None
    policy: str
    gpu: Gpu

    @property
    def asked(self):
        """Who asks for what."""
        if self.argument.kind != "nothing":
            return self.argument.requested, self.argument.kind, "argument"
        return self.affinity.requested, self.affinity.kind, self.affinity.source


class Cell(NamedTuple):
    """What is decided, as far as a table can say it."""

    error: type[Exception] | None
    requested: object = None
    source: str | None = None
    name: str | None = None
    downgraded: bool = False
    reason: Reason | None = None
    gpu_known: bool = False


def expected(question):
    requested, kind, source = question.asked
    if question.policy == "wrong argument":
        return Cell(ValueError)
    if kind.startswith("gpu"):
        return expected_of_gpu(question)
    if kind == "nothing":
        return Cell(None, "auto", "default", NOBODY_ASKS[question.path])
    if kind == "adaptive":
        return Cell(None, "adaptive", "adaptive", ADAPTIVE[question.path])
    if kind == "nonsense":
        name = NOBODY_ASKS[question.path]
        return Cell(None, requested, "default", name, reason=Reason.UNKNOWN_AFFINITY)
    return Cell(None, requested, source, kind)


def expected_of_gpu(question):
    requested, kind, source = question.asked
    if question.policy == "wrong variable":
        return Cell(ValueError)
    gpu = question.gpu
    column = 0 if gpu.reason is None else 1
    name, _, why = GPU_RULE[kind, question.path, question.policy][column].partition(":")
    if name == "error":
        return Cell(EngineUnavailableError)
    if name == "gpu":
        return Cell(None, requested, source, "gpu", gpu_known=True)
    reason = PATH_REASONS[question.path] if why == "path" else gpu.reason
    return Cell(None, requested, source, name, downgraded=True, reason=reason, gpu_known=True)


def decided(*args, **options):
    """Resolve, and give what a cell says of it, the engine and the message."""
    try:
        found = resolve_engine(*args, **options)
    except (ValueError, EngineUnavailableError) as error:
        return Cell(type(error)), None, str(error)
    known = found.gpu is not None
    cell = Cell(
        None, found.requested, found.source, found.name, found.downgraded, found.reason, known
    )
    return cell, found.engine, found.message


TYPES = {"in-memory": pl.InMemoryEngine, "streaming": pl.StreamingEngine, "gpu": pl.GPUEngine}
TYPES["auto"] = type(AUTO_ENGINE)
TYPES["adaptive"] = pl.InMemoryEngine  # in the place of the one that is chosen later


def is_the_engine(engine, cell):
    """Tell whether it is the very object that was asked for, or else Polars' own of that name."""
    if isinstance(cell.requested, pl.Engine) and not cell.downgraded:
        return engine is cell.requested
    return type(engine) is TYPES[cell.name] and cell.name in {engine.name, "adaptive"}


ASKERS = {
    "argument": "argument|engine=",
    "config": re.escape("Config.set_engine_affinity"),
    "environment": VARIABLE,
    "default": "default_engine",
}


def expected_words(question, cell):
    """List what a message has to say: who asked, what was found, what runs, and the remedy."""
    *_, source = question.asked
    if cell.error is ValueError:
        name = "gpu" if question.policy == "wrong argument" else POLICY_VARIABLE
        return [f"^{name} must be one of 'downgrade', 'offload', 'require', got '(always)?'$"]
    if cell.reason is Reason.UNKNOWN_AFFINITY:
        value = re.escape(f"{VARIABLE}='{question.affinity.variable}'")
        return [value, "auto.*in-memory.*streaming.*gpu", said(cell.name)]
    if cell.error is not None or cell.downgraded:
        return [ASKERS[source], "asks for|asked for", "GPU", *words_of_gpu(question, cell)]
    if cell.source == "adaptive":
        return [said(cell.name)]
    return [
        "nothing else was asked for" if source == "default" else ASKERS[source],
        said(cell.name),
    ]


def words_of_gpu(question, cell):
    gpu, by_require = question.gpu, question.policy == "require"
    words = ["the in-memory engine runs"] if cell.downgraded else []
    if question.policy == "downgrade" and question.path != "sync":
        words += [f"switched off on the {question.path} path"]
        words += [f"{POLICY_VARIABLE}=offload"]
    words += [re.escape(gpu.cause), re.escape(gpu.remedy)]
    if cell.error is not None:
        who = f"{POLICY_VARIABLE}=require" if question.given is None else "gpu='require'"
        words += [f"{who if by_require else 'raise_on_fail=True'} forbids"]
    return words


def said(name):
    if name == "auto":
        return "Polars chooses"
    if name == "adaptive":
        return "expected to be the fastest"
    return f"the {'GPU' if name == 'gpu' else name} engine runs"


def missing_words(question, cell, message):
    one_sentence = r"^[^\n]+[^\n.]$"
    words = (*expected_words(question, cell), one_sentence)
    return [each for each in words if not re.search(each, message)]


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize(
    "affinity", AFFINITIES, ids=lambda each: f"{shown(each.config)}-{each.variable}"
)
def test_every_cell_of_the_table(host, affinity, name):
    gpu = host(name)
    set_affinity(affinity)
    wrong = []
    for (given, variable), policy in POLICY.items():
        write(POLICY_VARIABLE, variable)
        for argument, path in product(ARGUMENTS, PATHS):
            question = Question(argument, affinity, path, given, policy, gpu)
            found, engine, message = decided(argument.given, path=path, gpu=given)
            cell = expected(question)
            if found != cell or (cell.error is None and not is_the_engine(engine, cell)):
                wrong.append((question, found, cell, engine))
            elif missing := missing_words(question, cell, message):
                wrong.append((question, message, missing))
    assert wrong == []


@pytest.mark.parametrize("wrong", WRONG_ENGINES)
def test_wrong_engine_is_a_value_error_whatever_else_is_asked(host, wrong):
    names = "'auto', 'in-memory', 'streaming', 'gpu', 'adaptive'"
    message = f"engine must be one of {names} or a polars.Engine object, got {wrong!r}"
    for name, affinity in product(HOSTS, AFFINITIES):
        host(name)
        set_affinity(affinity)
        for path, policy in product(PATHS, (None, *POLICIES)):
            found = decided(wrong, path=path, gpu=policy)
            assert found == (Cell(ValueError), None, message)
        write(VARIABLE, None)


DEFAULT_ENGINES = {
    "auto": "auto",
    "in-memory": "in-memory",
    "cpu": "in-memory",
    "streaming": "streaming",
    STREAMING: "streaming",
    RANCH: "ranch",
    plugin("streaming"): "streaming",
    pa.AsyncEngine(): "auto",
}


def test_default_engine_answers_on_two_paths_where_nobody_asks():
    nobody = [each for each in AFFINITIES if each.kind == "nothing"]
    for affinity, path, policy in product(nobody, PATHS, POLICIES):
        set_affinity(affinity)
        for argument, (default, name) in product(
            ("auto", pa.AsyncEngine()), DEFAULT_ENGINES.items()
        ):
            found = resolve_engine(argument, path=path, gpu=policy, default_engine=default)
            here = name if path in {"async", "background"} else NOBODY_ASKS[path]
            assert (found.name, found.source, found.requested) == (here, "default", "auto")
            assert found.gpu is None
        write(VARIABLE, None)


@pytest.mark.parametrize("name", HOSTS)
def test_default_engine_that_is_a_gpu_passes_the_same_rule(host, name):
    gpu = host(name)
    engines = {"gpu": "gpu", GPU: "gpu", STRICT: "gpu!", plugin("gpu"): "gpu"}
    for (default, kind), path, policy in product(engines.items(), PATHS, POLICIES):
        found, _, message = decided(path=path, gpu=policy, default_engine=default)
        if path in {"sync", "batches"}:
            assert found == Cell(None, "auto", "default", NOBODY_ASKS[path])
            continue
        asked = Affinity(None, None, "default", kind, "auto")
        question = Question(ARGUMENTS[0], asked, path, policy, policy, gpu)
        assert found == expected(question)
        assert missing_words(question, found, message) == []


def test_options_of_a_collector_are_those_of_its_queries(host):
    host("usable")
    own = pa.Collector(gpu="offload", default_engine="streaming")

    assert own.resolve_engine().name == "streaming"
    assert own.resolve_engine("gpu", path="batches").name == "gpu"
    assert own.collect_async(QUERY).resolution.name == "streaming"
    assert pa.Collector(engine=RANCH).resolve_engine(path="sync").engine is RANCH


# Important cells, one by one


def test_nobody_asks_and_the_async_path_is_that_of_polars():
    found = resolve_engine()

    assert (found.requested, found.source, found.name) == ("auto", "default", DEFAULT)
    assert (found.downgraded, found.reason, found.gpu) == (False, None, None)
    assert found.message == f"the {DEFAULT} engine runs: nothing else was asked for"


@pytest.mark.parametrize("function", [pl.collect_all_async, pl.collect_all])
def test_default_is_the_one_that_the_installed_polars_documents(function):
    documented = re.search(r'falling\s+back to ``"([\w-]+)"`` if unset', function.__doc__)
    assert resolve_engine().name == documented[1]


def test_default_is_the_one_that_the_installed_polars_runs():
    script = """
import asyncio, os, polars as pl
frame = pl.DataFrame({"a": [1, 2]}).lazy().group_by("a").len()
async def main():
    await frame.collect_async(engine="%s")
    os._exit(0)  # where Polars' own may abort
asyncio.run(main())
"""
    streams = {}
    for engine in ("auto", "in-memory", "streaming"):
        told = subprocess.run(
            [sys.executable, "-c", script % engine],
            env={**os.environ, "POLARS_VERBOSE": "1"},
            capture_output=True,
            text=True,
            timeout=150,
            check=True,
        )
        streams[engine] = "polars-stream" in told.stderr
    assert streams == {"auto": DEFAULT == "streaming", "in-memory": False, "streaming": True}


def test_default_of_the_process_is_the_variable():
    write(ENGINE_VARIABLE, "adaptive")
    assert [resolve_engine(path=path).name for path in PATHS] == [
        {"async": "adaptive", "background": "adaptive"}.get(path, NOBODY_ASKS[path])
        for path in PATHS
    ]
    with pa.Collector() as own:
        assert own.resolve_engine().source == "adaptive"
    with pa.Collector(default_engine="in-memory") as own:
        assert own.resolve_engine().name == "in-memory"
    write(VARIABLE, "streaming")
    assert resolve_engine().source == "environment"


@pytest.mark.parametrize("value", ["", "auto"])
def test_variable_of_the_default_that_names_none_leaves_that_of_polars(value):
    write(ENGINE_VARIABLE, value)
    assert resolve_engine().name == DEFAULT


def test_wrong_variable_of_the_default_is_an_error_where_it_decides():
    write(ENGINE_VARIABLE, "fastest")
    with pytest.raises(ValueError, match=r"POLARS_ASYNC_ENGINE must be one of .*, got 'fastest'"):
        resolve_engine()
    assert resolve_engine("streaming").name == "streaming"


def test_nonsense_affinity_is_said_where_the_engine_is_chosen_later():
    write(VARIABLE, "cuda")
    found = resolve_engine(default_engine="adaptive")
    assert (found.name, found.source, found.reason) == (
        "adaptive",
        "adaptive",
        Reason.UNKNOWN_AFFINITY,
    )
    assert "so the engine that is expected to be the fastest runs" in found.message


def test_nobody_asks_and_the_sync_path_is_left_to_polars():
    found = resolve_engine(path="sync")

    assert found.name == "auto"
    assert found.engine is AUTO_ENGINE
    assert "Polars chooses" in found.message


def test_nobody_asks_and_batches_stream_as_polars_has_it():
    assert resolve_engine(path="batches").name == "streaming"


def test_argument_wins_over_object_and_variable():
    pl.Config.set_engine_affinity(RANCH)
    write(VARIABLE, "gpu")

    assert resolve_engine("streaming").source == "argument"
    assert resolve_engine("streaming").name == "streaming"


def test_object_of_config_wins_over_the_variable_set_later():
    pl.Config.set_engine_affinity(RANCH)
    write(VARIABLE, "streaming")

    assert resolve_engine().engine is RANCH
    assert resolve_engine().source == "config"


def test_variable_is_read_each_time():
    found = []
    for name in ("streaming", "in-memory", None):
        write(VARIABLE, name)
        found.append((resolve_engine(path="sync").name, resolve_engine(path="sync").source))

    assert found == [
        ("streaming", "environment"),
        ("in-memory", "environment"),
        ("auto", "default"),
    ]


def test_async_engine_without_an_engine_asks_on():
    write(VARIABLE, "streaming")

    for asked in (pa.AsyncEngine(), plugin("auto"), plugin(pa.AsyncEngine())):
        assert resolve_engine(asked).source == "environment"


def test_engine_of_the_collector_is_asked_for_by_asking_for_its_async_engine():
    write(VARIABLE, "streaming")

    found = resolve_engine(plugin(RANCH))
    assert (found.engine, found.requested, found.source) == (RANCH, RANCH, "argument")


def test_gpu_is_switched_off_on_the_async_path_even_if_it_is_usable(host):
    host("usable")

    found = resolve_engine("gpu")

    assert (found.requested, found.name, found.downgraded) == ("gpu", "in-memory", True)
    assert found.reason is Reason.ASYNC_PATH
    assert found.gpu.usable


def test_usable_gpu_runs_where_the_query_is_synchronous_or_offloaded(host):
    host("usable")

    for options in ({"path": "sync"}, {"gpu": "offload"}, {"gpu": "require"}):
        found = resolve_engine(SPMD, **options)
        assert found.engine is SPMD
        assert (found.downgraded, found.reason) == (False, None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("no_gpu")
def test_required_gpu_that_is_not_usable_is_an_error_on_every_path(path):
    with pytest.raises(EngineUnavailableError, match="the driver sleeps: wake it up"):
        resolve_engine("gpu", path=path, gpu="require")


@pytest.mark.usefixtures("no_gpu")
def test_engine_that_forbids_the_cpu_never_gets_it():
    for path, policy in product(PATHS, POLICIES):
        with pytest.raises(EngineUnavailableError, match=r"(raise_on_fail=True|'require') forbids"):
            resolve_engine(STRICT, path=path, gpu=policy)


@pytest.mark.usefixtures("no_gpu")
def test_policy_of_the_process_is_the_variable():
    write(POLICY_VARIABLE, "require")

    with pytest.raises(EngineUnavailableError):
        resolve_engine("gpu")
    assert resolve_engine("gpu", gpu="downgrade").downgraded


def test_affinity_nonsense_names_the_value_and_the_valid_ones():
    write(VARIABLE, "cuda")

    found = resolve_engine()

    assert found.message == (
        f"POLARS_ENGINE_AFFINITY='cuda' names no engine, so the {DEFAULT} engine runs: "
        "set it to one of 'auto', 'in-memory', 'streaming', 'gpu'"
    )
    assert not found.downgraded  # nobody asked for a GPU


def test_wrong_path_is_a_value_error():
    with pytest.raises(ValueError, match=r"path must be one of 'sync', .*, got 'eager'"):
        resolve_engine(path="eager")


@pytest.mark.parametrize("policy", ["always", "GPU", "", 5])
def test_wrong_policy_is_a_value_error(policy):
    message = f"gpu must be one of 'downgrade', 'offload', 'require', got {policy!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_engine("streaming", gpu=policy)
    with pytest.raises(ValueError, match=re.escape(message)):
        pa.Collector(gpu=policy)


def test_no_engine_is_a_value_error_as_in_polars():
    with pytest.raises(ValueError, match=r"engine must be one of .*, got None"):
        pa.collect_async(QUERY, engine=None)
    with pytest.raises(ValueError, match=r"engine must be one of .*, got None"):
        pa.collect_all_async([QUERY], engine=None)


def test_remedy_of_the_message_works_in_a_process_that_has_run_queries(host):
    host("usable")
    with pytest.warns(EngineDowngradeWarning, match="POLARS_ASYNC_GPU=offload"):
        pa.collect_async(QUERY, engine="gpu").result(30)

    write(POLICY_VARIABLE, "offload")

    assert not resolve_engine("gpu").downgraded
    assert not api.default_collector().resolve_engine("gpu").downgraded


def test_wrong_policy_of_the_process_is_no_matter_of_the_cpu():
    write(POLICY_VARIABLE, "always")

    assert pa.collect_async(QUERY, engine="streaming").result(30).item() == 3
    with pytest.raises(ValueError, match=f"{POLICY_VARIABLE} must be one of"):
        pa.collect_async(QUERY, engine="gpu")


@pytest.mark.usefixtures("no_gpu")
def test_nonsense_is_said_even_where_the_default_engine_is_downgraded():
    write(VARIABLE, "cuda")
    found = resolve_engine(default_engine="gpu")
    assert (found.name, found.downgraded) == ("in-memory", True)
    assert "'cuda' names no engine" in found.message
    assert "default_engine asks for the GPU engine" in found.message


def test_resolution_is_frozen():
    found = resolve_engine()
    for each in fields(found):
        with pytest.raises(FrozenInstanceError):
            setattr(found, each.name, None)


# In a process of its own


def run(script, *options, **environment):
    command = [sys.executable, *options, "-c", script]
    environment = {**os.environ, **environment}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=150
    )
    return done.stdout.split(), done.stderr


def test_nvml_is_not_touched_before_somebody_asks_for_a_gpu():
    script = """
import itertools, sys
import polars as pl
import polars_async as pa
from polars_async.resolution import DeferringEngine
told = {"pynvml", "polars_async.gpu.probe", "polars_async.gpu.nvml", "packaging", "cudf_polars"}
paths, policies = ("sync", "async", "background", "batches"), ("downgrade", "offload", "require")
engines = ("auto", "cpu", "in-memory", "streaming", pl.StreamingEngine(), pa.AsyncEngine())
for engine, path, policy in itertools.product(engines, paths, policies):
    pa.resolve_engine(engine, path=path, gpu=policy)
query = pl.LazyFrame({"a": [1]})
pa.collect_async(query).result()
pa.collect_all_async([query], engine="streaming").result()
query.collect(engine=pa.AsyncEngine())
query.collect(engine=pa.AsyncEngine(), background=True).fetch_blocking()
with pl.Config(engine_affinity=pa.AsyncEngine()):
    list(query.collect_batches())
print("asked:", *told & set(sys.modules))
pa.resolve_engine("gpu")
print("asked:", "pynvml" in sys.modules)
"""
    assert run(script, "-W", "error")[0] == ["asked:", "asked:", "True"]


@pytest.mark.parametrize(("value", "name"), [("streaming", "streaming"), ("cuda", DEFAULT)])
def test_variable_set_before_the_import_counts(value, name):
    script = "import polars_async as pa; print(pa.resolve_engine().name)"
    assert run(script, **{VARIABLE: value})[0] == [name]


# The warning


def here():
    return inspect.currentframe().f_back.f_lineno


CALLS = {
    "pa.collect_async": lambda lf, _: pa.collect_async(lf, engine="gpu").result(30),
    "pa.collect_all_async": lambda lf, _: pa.collect_all_async([lf], engine="gpu").result(30),
    "pa, gevent": lambda lf, _: pa.collect_async(lf, engine="gpu", gevent=True).get(),
    "pa, all, gevent": lambda lf, _: pa.collect_all_async([lf], engine="gpu", gevent=True).get(),
}
COLLECTOR_CALLS = {
    "collect_async": lambda lf, own: own.collect_async(lf).result(30),
    "collect_all_async": lambda lf, own: own.collect_all_async([lf]).result(30),
    "collect_background": lambda lf, own: own.collect_background(lf).fetch_blocking(),
}
ENGINE_CALLS = {
    "collect": lambda lf, engine: lf.collect(engine=engine),
    "execute": lambda lf, engine: lf.execute(engine=engine),
    "background": lambda lf, engine: lf.collect(engine=engine, background=True).fetch_blocking(),
    "collect_async": lambda lf, engine: lf.collect_async(engine=engine).result(30),
    "collect, gevent": lambda lf, engine: lf.collect_async(engine=engine, gevent=True).get(),
    "collect_all": lambda lf, engine: pl.collect_all([lf], engine=engine),
    "collect_all_async": lambda lf, engine: pl.collect_all_async([lf], engine=engine).result(30),
    "collect_batches": lambda lf, engine: list(lf.collect_batches(engine=engine)),
    "sink_parquet": lambda lf, engine: lf.sink_parquet(io.BytesIO(), engine=engine),
    "sink_ipc": lambda lf, engine: lf.sink_ipc(io.BytesIO(), engine=engine),
    "sink_csv": lambda lf, engine: lf.sink_csv(io.BytesIO(), engine=engine),
    "sink_ndjson": lambda lf, engine: lf.sink_ndjson(io.BytesIO(), engine=engine),
    "sink_batches": lambda lf, engine: lf.sink_batches(lambda _: None, engine=engine),
}


@pytest.fixture(
    params=[
        *(("default", *each) for each in CALLS.items()),
        *(("collector", *each) for each in COLLECTOR_CALLS.items()),
        *(("argument", *each) for each in ENGINE_CALLS.items()),
        *(("affinity", *each) for each in ENGINE_CALLS.items()),
    ],
    ids=lambda each: f"{each[0]}: {each[1]}",
)
def ask(request, no_gpu):  # noqa: ARG001  # no GPU is usable, so that every path downgrades
    """A way to ask for the GPU engine, and the collector that would run the query."""
    way, _, call = request.param
    own = pa.Collector(engine="gpu", max_running=1)
    if way == "affinity":
        pl.Config.set_engine_affinity(pa.AsyncEngine(own))
    given = {"argument": pa.AsyncEngine(own), "affinity": "auto"}.get(way, own)

    def asking(lf):
        return call(lf, given)

    asking.line = call.__code__.co_firstlineno
    asking.collector = api.default_collector() if way == "default" else own
    return asking


def test_warning_points_at_the_callers_line(ask):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        ask(QUERY)

    [warning] = shown
    assert warning.category is EngineDowngradeWarning
    assert (warning.filename, warning.lineno) == (__file__, ask.line)
    assert re.search("the GPU engine.*the in-memory engine runs", str(warning.message))


def test_warning_made_an_error_leaves_nothing_scheduled(ask):
    ran = []
    query = pl.LazyFrame({"a": [1]}).map_batches(lambda frame: (ran.append(frame), frame)[1])

    with pytest.raises(EngineDowngradeWarning):  # errors, as all warnings of the suite are
        ask(query)
    ask.collector.close(wait=True, cancel_waiting=False)

    assert ran == []


def test_sink_writes_no_file_when_the_warning_is_an_error(no_gpu, tmp_path):  # noqa: ARG001
    with pytest.raises(EngineDowngradeWarning):
        QUERY.sink_csv(tmp_path / "frame.csv", engine=plugin("gpu"))

    assert list(tmp_path.iterdir()) == []


def test_looking_at_a_plan_does_not_warn(no_gpu):  # noqa: ARG001
    engine = plugin("gpu")

    assert "SELECT" in QUERY.explain(engine=engine)
    pl.Config.set_engine_affinity(engine)
    assert "SELECT" in QUERY.explain()


@pytest.mark.usefixtures("no_gpu")
def test_warning_is_shown_once_for_each_call_site():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            pa.collect_async(QUERY, engine="gpu").result(30)
            first = here() - 1
        pa.collect_async(QUERY, engine="gpu").result(30)
        second = here() - 1

    assert [each.lineno for each in shown] == [first, second]


def test_warning_is_printed_once_with_the_callers_line_by_default(tmp_path):
    script = tmp_path / "report.py"
    script.write_text(
        "import polars as pl, polars_async as pa\n"
        "for _ in range(3):\n"
        "    pa.collect_async(pl.LazyFrame({'a': [1]}), engine='gpu').result()\n"
    )
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=150,
    )

    assert done.stderr.count("EngineDowngradeWarning") == 1
    assert f"{script}:3: EngineDowngradeWarning: the " in done.stderr


def test_package_whose_name_merely_begins_alike_is_the_caller(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "polars").symlink_to(Path(pl.__file__).parent)
    (site / "polars_async").symlink_to(Path(pa.__file__).parent)
    for name in ("polars_async_app", "polarsx"):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(
            "import polars as pl, polars_async as pa\n"
            "def ask():\n"
            "    pa.collect_async(pl.LazyFrame({'a': [1]}), engine='gpu').result()\n"
        )
    script = """
import warnings, polars, polars_async, polars_async_app, polarsx
with warnings.catch_warnings(record=True) as shown:
    warnings.simplefilter("always")
    polars_async_app.ask()
    polarsx.ask()
print(polars.__file__, polars_async.__file__, *(f"{each.filename}:{each.lineno}" for each in shown))
"""
    assert run(script, PYTHONPATH=str(site))[0] == [
        f"{site}/polars/__init__.py",
        f"{site}/polars_async/__init__.py",
        f"{site}/polars_async_app/__init__.py:3",
        f"{site}/polarsx/__init__.py:3",
    ]


@pytest.mark.parametrize("value", ["cuda", ""])
def test_nonsense_affinity_is_said_at_the_callers_line(value):
    write(VARIABLE, value)
    calls = (
        lambda: pa.collect_async(QUERY).result(30),
        lambda: QUERY.collect(engine=pa.AsyncEngine()),
        lambda: list(QUERY.collect_batches(engine=pa.AsyncEngine())),
    )
    for call in calls:
        with pytest.warns(EngineDowngradeWarning) as shown:
            call()

        [warning] = shown
        assert (warning.filename, warning.lineno) == (__file__, call.__code__.co_firstlineno)
        assert str(warning.message).startswith(f"{VARIABLE}={value!r} names no engine, so ")
        assert str(warning.message).endswith("one of 'auto', 'in-memory', 'streaming', 'gpu'")


def test_nonsense_affinity_is_not_said_where_it_decides_nothing():
    write(VARIABLE, "cuda")

    pa.collect_async(QUERY, engine="streaming").result(30)
    with pa.Collector(engine="in-memory") as own:
        own.collect_async(QUERY).result(30)
    pl.Config.set_engine_affinity(STREAMING)
    write(VARIABLE, "cuda")
    pa.collect_async(QUERY).result(30)


# The ways in which Polars itself loses the GPU (pola-rs/polars#28842)


def by_affinity(given):
    def ask(lf):
        pl.Config.set_engine_affinity(given)
        return pa.collect_async(lf).result(30)

    return ask


def background(lf, engine=GPU):
    return lf.collect(engine=plugin(engine), background=True).fetch_blocking()


def batches(lf, engine=GPU):
    return pl.concat(lf.collect_batches(engine=plugin(engine)))


LOSSES = {
    "argument, async": lambda lf: pa.collect_async(lf, engine="gpu").result(30),
    "affinity name, async": by_affinity("gpu"),
    "affinity object, async": by_affinity(GPU),
    "collect_all, async": lambda lf: pa.collect_all_async([lf], engine="gpu").result(30)[0],
    "background": background,
    "batches": batches,
}
STRICT_LOSSES = {
    "argument": lambda lf: pa.collect_async(lf, engine=STRICT).result(30),
    "affinity object": by_affinity(STRICT),
    "collect_all": lambda lf: pa.collect_all_async([lf], engine=STRICT).result(30)[0],
    "background": lambda lf: background(lf, STRICT),
    "batches": lambda lf: batches(lf, STRICT),
}


@pytest.fixture
def gpu_calls(host, monkeypatch):
    """A usable GPU, and the engines and threads that its queries arrive with."""
    host("usable")
    calls = []
    module = ModuleType("cudf_polars")

    def execute_with_cudf(plan, *_, config):
        calls.append((config, threading.get_ident()))
        plan.set_udf(lambda *_: QUERY.collect(engine="in-memory"))

    module.execute_with_cudf = execute_with_cudf
    monkeypatch.setitem(sys.modules, "cudf_polars", module)
    return calls


@pytest.mark.parametrize("way", LOSSES)
def test_gpu_that_polars_loses_is_a_downgrade_that_is_said(gpu_calls, way):
    with pytest.warns(
        EngineDowngradeWarning, match=f"switched off on the {way.split(', ')[-1]} path"
    ):
        assert LOSSES[way](QUERY).item() == 3

    assert gpu_calls == []


@pytest.mark.parametrize("way", STRICT_LOSSES)
def test_gpu_that_polars_loses_is_an_error_where_the_cpu_is_forbidden(gpu_calls, way):
    with pytest.raises(EngineUnavailableError, match="raise_on_fail=True forbids"):
        STRICT_LOSSES[way](QUERY)

    assert gpu_calls == []


@pytest.mark.parametrize("policy", ["offload", "require"])
@pytest.mark.parametrize("way", [*LOSSES, *(f"{way}, strict" for way in STRICT_LOSSES)])
def test_gpu_that_polars_loses_is_used_by_offloading(gpu_calls, way, policy):
    write(POLICY_VARIABLE, policy)
    strict = way.endswith(", strict")

    ask = STRICT_LOSSES[way.removesuffix(", strict")] if strict else LOSSES[way]
    assert ask(QUERY).item() == 3

    [(engine, thread)] = gpu_calls
    assert isinstance(engine, pl.GPUEngine)
    assert engine.config["raise_on_fail"] is strict
    assert thread != threading.get_ident()


@pytest.mark.parametrize("way", LOSSES)
@pytest.mark.usefixtures("no_gpu")
def test_required_gpu_that_is_not_usable_is_an_error_in_every_way(way):
    write(POLICY_VARIABLE, "require")

    with pytest.raises(EngineUnavailableError, match="the driver sleeps: wake it up"):
        LOSSES[way](QUERY)


def test_environment_is_read_where_it_is(monkeypatch):
    monkeypatch.setattr(os, "environ", {"POLARS_ENGINE_AFFINITY": "streaming"})
    assert pa.resolve_engine().name == "streaming"
