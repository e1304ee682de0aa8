"""The plug-in for pytest, in runs of their own."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib

import polars as pl
import pytest
from conftest import TINY
from snippets import FILES, ROOT, SNIPPETS

import polars_async
from polars_async import Collector, Reason
from polars_async.events import observers
from polars_async.pytest_plugin import EngineLog
from polars_async.testing import simulate_gpu

PLUGIN = "polars_async.pytest_plugin"
HEAD = """
import polars as pl
import polars_async as pa
import pytest

QUERY = pl.LazyFrame({"a": [1, 2]}).sum()


def offload(**options):
    with pa.Collector(gpu="offload", **options) as collector:
        return collector.collect_async(QUERY, engine="gpu").result(20).item()


def devices():
    return len(pa.gpu_status().devices)


def usable():
    return pa.gpu_status().usable


def downgrade():
    return pa.collect_async(QUERY, engine="gpu").result(20)


"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run pytest on a file with this code after `HEAD`, alike in CI, where it prints more."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("BUILD_NUMBER", raising=False)

    def run(code, *options, apart=False):
        pytester.makepyfile(test_it=HEAD + code)
        command = ("-p", PLUGIN, "-p", "no:cacheprovider", "--strict-markers", *options)
        return pytester.runpytest_subprocess(*command) if apart else pytester.runpytest(*command)

    before = pl.GPUEngine.collect
    yield run
    assert observers == []
    assert pl.GPUEngine.collect is before


def printed(result):
    """Give what the run printed, each line without the spaces around it."""
    return [line.strip() for line in result.outlines]


# gpu_host and no_gpu_host


def test_gpu_host_is_there_for_one_test(run):
    result = run(
        """
def test_with(gpu_host):
    assert (usable(), devices(), gpu_host.queries) == (True, 1, 0)
    assert offload() == 3
    assert gpu_host.queries == 1
    gpu_host.fail = "oom"
    assert offload() == 3

def test_after():
    assert (usable(), devices()) == (False, 0)
""",
        "--polars-gpu-host=none",
    )
    result.assert_outcomes(passed=2)


def test_marker_takes_effect_by_itself_and_before_all_fixtures(run):
    result = run(
        """
@pytest.fixture
def service():
    yield devices()
    assert devices() == 2

@pytest.mark.gpu_host(count=2)
def test_alone():
    assert devices() == 2

@pytest.mark.gpu_host(2, fail="unsupported")
def test_named(service, gpu_host, engine_log):
    assert service == 2
    assert offload() == 3
    assert gpu_host.queries == 1
    engine_log.assert_ran_on("in-memory", because=pa.Reason.UNSUPPORTED_QUERY)

@pytest.mark.gpu_host(3)
class TestSeveral:
    def test_in_class(self):
        assert devices() == 3

    @pytest.mark.gpu_host(4)
    def test_closest(self):
        assert devices() == 4

@pytest.mark.parametrize("number", [0, pytest.param(5, marks=pytest.mark.gpu_host(5))])
def test_parameter(number):
    assert devices() == number

def test_without():
    assert devices() == 0
""",
        "--polars-gpu-host=none",
    )
    result.assert_outcomes(passed=7)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("counts=2", "simulate_gpu() got an unexpected keyword argument 'counts'*"),
        ("-1", "count must be a whole number, 0 or more, got -1"),
        ("fail='fire'", "fail must be one of 'unsupported', 'translation', 'oom', *, got 'fire'"),
    ],
)
def test_marker_with_wrong_arguments_fails_its_test(run, arguments, why):
    result = run(f"""
@pytest.mark.gpu_host({arguments})
def test_wrong():
    print("it has run")

def test_other():
    pass
""")
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at setup of test_wrong*",
            f"@pytest.mark.gpu_host takes the arguments of simulate_gpu, but {why}",
            "*short test summary*",
        ],
        consecutive=False,
    )
    result.stdout.no_fnmatch_line("*During handling*")
    result.stdout.no_fnmatch_line("it has run")


def test_no_gpu_host_hides_what_there_is(run):
    result = run(
        """
@pytest.mark.gpu_host
def test_hides_that_of_the_marker(no_gpu_host, engine_log):
    assert no_gpu_host is None
    status = pa.gpu_status()
    assert (status.usable, status.devices, status.cudf_polars_version) == (False, (), None)
    assert status.cuda_version is None
    with pytest.warns(pa.EngineDowngradeWarning, match="no GPU is usable"):
        assert offload() == 3
    engine_log.assert_ran_on("in-memory", because="no_library")

def test_hides_that_of_the_run(no_gpu_host):
    assert not usable()
    with pytest.raises(ModuleNotFoundError):
        import cudf_polars

def test_both(no_gpu_host, gpu_host):
    print("it has run")

def test_is_back():
    assert (usable(), devices()) == (True, 4)
""",
        "--polars-gpu-host=4",
    )
    result.assert_outcomes(passed=3, errors=1)
    assert "a test has the fixture gpu_host or no_gpu_host, not both" in result.outlines
    result.stdout.no_fnmatch_line("it has run")


def test_nothing_is_left_of_tests_that_fail_or_are_skipped(run):
    result = run(
        """
@pytest.fixture
def broken():
    raise OSError

@pytest.mark.gpu_host
def test_fails(engine_log):
    assert not usable()

@pytest.mark.gpu_host
def test_breaks(engine_log, broken):
    pass

@pytest.mark.gpu_host
@pytest.mark.skip
def test_skipped(engine_log):
    pass

@pytest.mark.gpu_host
def test_skips(engine_log):
    pytest.skip("now")

def test_after():
    from polars_async.events import observers
    assert (devices(), observers) == (0, [])
""",
        "--polars-gpu-host=none",
    )
    result.assert_outcomes(failed=1, errors=1, skipped=2, passed=1)


def test_markers_are_listed(run):
    lines = run("", "--markers").outlines
    assert any(line.startswith("@pytest.mark.gpu_host(count=1, ...): ") for line in lines)
    assert any(line.startswith("@pytest.mark.allow_downgrade: ") for line in lines)


# engine_log


@pytest.fixture
def gpu():
    with simulate_gpu() as gpu:
        yield gpu


def names(log):
    return [each.name for each in log]


@pytest.mark.usefixtures("gpu")
def test_every_way_to_run_a_query_is_logged(engine_log):
    engine = polars_async.AsyncEngine(collector := Collector(engine="gpu", gpu="offload"))
    with collector:
        collector.collect_async(TINY).result()
        collector.collect_all_async([TINY, TINY], engine="streaming").result()
        collector.collect_all_background([TINY]).fetch_blocking()
        TINY.collect(engine=engine, background=True).fetch_blocking()
        TINY.collect_async(engine=engine, gevent=True).get()
        assert names(engine_log) == ["gpu", "streaming", "gpu", "gpu", "gpu"]
        TINY.collect(engine=engine)
        pl.collect_all([TINY], engine=engine)
        list(TINY.collect_batches(engine=engine))
        assert names(engine_log)[5:] == ["gpu", "gpu", "gpu"]
    engine = polars_async.AsyncEngine()
    TINY.collect(engine=engine)
    list(TINY.collect_batches(engine=engine))
    assert names(engine_log)[8:] == ["auto", "streaming"]


def test_queries_are_logged_in_the_order_of_their_end(engine_log, blocked):
    with Collector(max_running=2) as collector:
        first = collector.collect_async(blocked.lf)
        collector.collect_async(TINY, engine="streaming").result()
        assert names(engine_log) == ["streaming"]
        blocked.gate.set()
        first.result()
    assert names(engine_log) == ["streaming", "in-memory"]
    assert (len(engine_log), engine_log[0].name, names(engine_log[1:])) == (
        2,
        "streaming",
        ["in-memory"],
    )
    assert repr(engine_log) == "<EngineLog: streaming, in-memory>"


def test_query_that_failed_or_was_cancelled_while_it_ran_is_logged(engine_log, collector, blocked):
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        collector.collect_async(TINY.select("b"), engine="streaming").result()
    running = collector.collect_async(blocked.lf)
    blocked.started.wait()
    running.cancel()
    blocked.gate.set()
    assert names(engine_log) == ["streaming", "in-memory"]
    collector.close()
    assert len(engine_log) == 2


def test_what_runs_no_query_is_not_logged(engine_log, collector, blocked):
    collector.collect_schema_async(TINY).result()
    running = collector.collect_async(blocked.lf)
    waiting = collector.collect_async(TINY, engine="streaming")
    waiting.cancel()
    assert names(engine_log) == []
    blocked.gate.set()
    running.result()
    assert names(engine_log) == ["in-memory"]


def test_query_is_logged_before_anybody_can_see_its_end(collector, blocked):
    done = []
    observers.append(lambda _resolution: done.append(handle.done()))
    try:
        handle = collector.collect_async(blocked.lf)
        blocked.gate.set()
        handle.result()
    finally:
        observers.pop()
    assert done == [False]


def test_log_also_has_the_queries_of_fixtures_and_no_others(run):
    result = run("""
@pytest.fixture
def service():
    pa.collect_async(QUERY, engine="streaming").result(20)

def test_first(service, engine_log):
    pa.collect_async(QUERY).result(20)
    assert [each.name for each in engine_log] == ["streaming", "in-memory"]

def test_second(engine_log):
    assert not engine_log

def test_late(request):
    pa.collect_async(QUERY).result(20)
    log = request.getfixturevalue("engine_log")
    pa.collect_async(QUERY, engine="streaming").result(20)
    log.assert_ran_on("streaming")
""")
    result.assert_outcomes(passed=3)


@pytest.mark.usefixtures("gpu")
def test_assertion_holds_for_every_query(engine_log):
    with Collector(gpu="offload") as collector:
        collector.collect_async(TINY, engine="gpu").result()
        engine_log.assert_ran_on("gpu")
        collector.collect_async(TINY).result()
        with pytest.raises(AssertionError, match="run on 'gpu', but 1 of 2 did not"):
            engine_log.assert_ran_on("gpu")
        with pytest.raises(AssertionError, match="run on 'in-memory', but 1 of 2 did not"):
            engine_log.assert_ran_on("in-memory")


@pytest.mark.parametrize("because", [Reason.OUT_OF_MEMORY, "out_of_gpu_memory"], ids=type)
def test_assertion_knows_the_reason(engine_log, gpu, because):
    with Collector(gpu="offload") as collector:
        gpu.fail = {1: "oom", 2: "cuda"}
        collector.collect_async(TINY, engine="gpu").result()
        engine_log.assert_ran_on("in-memory", because)
        engine_log.assert_ran_on("in-memory")
        collector.collect_async(TINY, engine="gpu").result()
        engine_log.assert_ran_on("in-memory")
        collector.collect_async(TINY).result()
        with pytest.raises(AssertionError, match="because of 'out_of_gpu_memory', but 2 of 3 did"):
            engine_log.assert_ran_on("in-memory", because)


def test_assertion_that_fails_tells_what_ran_and_why_at_the_line_of_the_test(run):
    result = run("""
@pytest.mark.gpu_host(fail={2: "oom"})
def test_it(engine_log):
    for _ in range(2):
        assert offload() == 3
    pa.collect_async(QUERY, engine="streaming").result(20)
    engine_log.assert_ran_on("gpu")
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            '>       engine_log.assert_ran_on("gpu")',
            "E       AssertionError: expected every query of this test to run on 'gpu', but 2 *:",
            "E         query 2 ran on 'in-memory' (out_of_gpu_memory): the engine argument *",
            "E         query 3 ran on 'streaming': the streaming engine runs: asked for by *",
            "",
            "test_it.py:*: AssertionError",
        ],
        consecutive=True,
    )


def test_assertion_without_a_query_says_what_counts():
    with pytest.raises(AssertionError, match="none has run: queries count that go"):
        EngineLog().assert_ran_on("gpu")


def test_assertion_of_another_name_says_which_engines_there_are(engine_log):
    engines = r"on 'GPU' \(the engines of Polars are 'in-memory', 'streaming', 'gpu'\), but "
    with pytest.raises(AssertionError, match=f"{engines}none has run"):
        engine_log.assert_ran_on("GPU")
    with Collector() as collector:
        collector.collect_async(TINY, engine="in-memory").result(30)
    with pytest.raises(AssertionError, match=f"{engines}1 of 1 did not"):
        engine_log.assert_ran_on("GPU")
    with pytest.raises(AssertionError, match="on 'streaming', but 1 of 1 did not"):
        engine_log.assert_ran_on("streaming")


@pytest.mark.parametrize("because", ["oom", 3, ""])
def test_assertion_refuses_what_is_no_reason(because):
    with pytest.raises(
        ValueError, match=r"^because must be one of 'async_path', .*, or None, got "
    ):
        EngineLog().assert_ran_on("gpu", because)


# --polars-gpu-host

EVERYWHERE = """
AT_COLLECTION = devices(), usable()

@pytest.fixture(scope="session")
def shared():
    return devices(), usable()

def test_it(shared):
    assert AT_COLLECTION == shared == (devices(), usable()) == EXPECTED

@pytest.mark.gpu_host(7)
def test_own():
    assert devices() == 7

def test_none(no_gpu_host):
    assert devices() == 0
"""


@pytest.mark.parametrize(("host", "expected"), [("none", (0, False)), ("3", (3, True))])
@pytest.mark.parametrize("how", ["option", "setting", "both"])
def test_whole_run_has_the_host_that_is_asked_for(run, pytester, host, expected, how):
    if how != "option":
        setting = host if how == "setting" else "9"
        pytester.makepyprojecttoml(f"[tool.pytest.ini_options]\npolars_gpu_host = {setting!r}")
    options = () if how == "setting" else (f"--polars-gpu-host={host}",)
    run(f"EXPECTED = {expected}\n{EVERYWHERE}", *options).assert_outcomes(passed=3)


def test_host_is_the_real_one_where_the_setting_is_undone(run, pytester):
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\npolars_gpu_host = 6")
    run("def test(): assert devices() == 6").assert_outcomes(passed=1)
    run("def test(): assert devices() == 1", "-o", "polars_gpu_host=1").assert_outcomes(passed=1)
    result = run(
        "def test(): assert 'simulat' not in str(pa.gpu_status()).lower()", "-o", "polars_gpu_host="
    )
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize("value", ["0", "-1", "two", "None"])
def test_host_that_is_none_is_refused_at_once(run, pytester, value):
    error = f"polars_gpu_host must be none, or a number of GPUs, got {value!r}"
    result = run("def test(): pass", f"--polars-gpu-host={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {error.replace('polars_gpu_host', '--polars-gpu-host')}" in result.errlines
    pytester.makepyprojecttoml(f"[tool.pytest.ini_options]\npolars_gpu_host = {value!r}")
    assert f"ERROR: {error}" in run("def test(): pass").errlines


# --polars-no-downgrade

DOWNGRADES = """
pytestmark = pytest.mark.filterwarnings("ignore::polars_async.EngineDowngradeWarning")

def test_passes_as_nobody_asks():
    pa.collect_async(QUERY, engine="streaming").result(20)

def test_passes_on_the_gpu():
    assert offload() == 3

def test_fails_for_its_path():
    downgrade()

def test_keeps_its_failure():
    downgrade()
    assert devices() == 99

def test_fails_for_its_path_as_its_host_is_not_to_blame(gpu_host):
    gpu_host.fail = "oom"
    offload()
    downgrade()

@pytest.mark.gpu_host(fail="oom")
def test_passes_as_its_host_is_to_blame():
    assert offload() == 3

def test_passes_without_a_gpu_of_its_own(no_gpu_host):
    assert offload() == 3

@pytest.mark.allow_downgrade
def test_passes_as_it_is_spared():
    downgrade()

def test_passes_as_it_says_so(engine_log):
    downgrade()
    engine_log.assert_ran_on("in-memory", because="async_path")

def test_fails_for_what_came_after(engine_log):
    downgrade()
    engine_log.assert_ran_on("in-memory")
    downgrade()

def test_skips():
    downgrade()
    pytest.skip("now")

@pytest.mark.xfail(strict=True)
def test_xfails():
    downgrade()

@pytest.fixture
def before():
    downgrade()

def test_fails_for_its_fixture(before):
    pass

@pytest.fixture
def after():
    yield
    downgrade()

def test_ends_in_error(after):
    pass

def test_fails_before(after):
    assert devices() == 99

@pytest.fixture
def broken(before):
    raise OSError("its own")

def test_breaks(broken):
    pass
"""


def reports(result):
    """Give the outcomes by name, of the tests that do not simply pass."""
    summary = re.findall(r"^(\w+) test_it.py::(\w+)", result.stdout.str(), re.MULTILINE)
    return sorted(summary)


@pytest.mark.parametrize("how", ["option", "setting"])
def test_downgrades_fail_tests_unless_they_are_expected(run, pytester, how):
    options = ("--polars-no-downgrade", "--polars-gpu-host=1", "-rA")
    name = options[0]
    if how == "setting":
        pytester.makepyprojecttoml("[tool.pytest.ini_options]\npolars_no_downgrade = true")
        options, name = options[1:], "polars_no_downgrade"
    result = run(DOWNGRADES, *options)
    assert reports(result) == sorted(
        [
            ("ERROR", "test_breaks"),
            ("ERROR", "test_ends_in_error"),
            ("PASSED", "test_ends_in_error"),
            ("XFAIL", "test_xfails"),
        ]
        + [("PASSED", each) for each in re.findall(r"test_passes\w+", DOWNGRADES)]
        + [("FAILED", each) for each in re.findall(r"test_fails\w+|test_keeps\w+", DOWNGRADES)]
    )
    result.assert_outcomes(passed=7, failed=6, errors=2, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_ends_in_error*",
            "*ERROR at setup of test_breaks*",
            "E       OSError: its own",
            "*_ test_fails_for_its_path _*",
            f"1 query of this test did not run on the engine that *, which {name} forbids:",
            "  one ran on 'in-memory' (async_path): the engine argument asks for the GPU *",
            "If that is intended, assert it with engine_log.assert_ran_on('in-memory', *",
            "*_ test_keeps_its_failure _*",
            "E       assert 1 == 99",
        ]
    )
    complaints = [line for line in printed(result) if "engine that was asked for, which" in line]
    assert len(complaints) == 6 - 2 + 1  # two fail by themselves, and one ends in error
    assert all(line.startswith("1 query") for line in complaints)


def test_downgrades_pass_where_nobody_minds(run):
    result = run(DOWNGRADES, "--polars-gpu-host=1", "-rA")
    assert [name for outcome, name in reports(result) if outcome == "FAILED"] == [
        "test_fails_before",
        "test_keeps_its_failure",
        "test_xfails",
    ]


def test_fallback_and_missing_gpu_fail_tests_too(run):
    result = run(
        """
import unittest
from polars_async.testing import simulate_gpu

pytestmark = pytest.mark.filterwarnings("ignore::polars_async.EngineDowngradeWarning")

def test_fallback():
    with simulate_gpu(fail="unsupported"):
        offload()
        offload()

def test_missing():
    QUERY.collect(engine=pa.AsyncEngine(pa.Collector(engine="gpu")))

def test_affinity(monkeypatch):
    monkeypatch.setenv("POLARS_ENGINE_AFFINITY", "cuda")
    pa.collect_async(QUERY).result(20)

def test_plugin(monkeypatch):
    with pl.Config(engine_affinity=pa.AsyncEngine()):  # at whose end there is no variable
        monkeypatch.setenv("POLARS_ENGINE_AFFINITY", "gpu")
        QUERY.collect()

class TestOld(unittest.TestCase):
    def test_old(self):
        downgrade()
""",
        "--polars-gpu-host=none",
        "--polars-no-downgrade",
    )
    result.assert_outcomes(failed=5)
    result.stdout.fnmatch_lines(
        [
            "2 queries of this test did not run on the engine that was asked for, *",
            "  one ran on 'in-memory' (unsupported_query): *",
            "  one ran on 'in-memory' (unsupported_query): *",
            "*_ test_missing _*",
            "  one ran on 'in-memory' (no_library): *",
            "*_ test_affinity _*",
            "  one ran on 'in-memory' (unknown_affinity): POLARS_ENGINE_AFFINITY='cuda' names no *",
            "*_ test_plugin _*",
            "  one ran on 'in-memory' (no_library): POLARS_ENGINE_AFFINITY asks for the GPU *",
            "*_ TestOld.test_old _*",
            "  one ran on 'in-memory' (async_path): *",
        ]
    )


def test_warnings_that_are_errors_come_first(run):
    code = "def test(engine_log): downgrade()"
    result = run(code, "--polars-no-downgrade", "-W", "error::polars_async.EngineDowngradeWarning")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E * polars_async.errors.EngineDowngradeWarning: the engine argu*"]
    )
    result.stdout.no_fnmatch_line("*query of this test*")


# Everywhere


@pytest.mark.one_series
def test_all_of_it_works_under_xdist(run):
    result = run(
        """
AT_COLLECTION = devices()

@pytest.mark.parametrize("number", range(6))
def test_host(number):
    assert AT_COLLECTION == devices() == 2

@pytest.mark.parametrize("number", range(6))
@pytest.mark.gpu_host(3, fail="oom")
def test_own(number, engine_log, gpu_host):
    assert devices() == 3
    assert offload() == 3
    assert gpu_host.queries == 1
    engine_log.assert_ran_on("in-memory", because="out_of_gpu_memory")

@pytest.mark.parametrize("number", range(2))
def test_downgrade(number):
    downgrade()

def test_assertion(engine_log):
    offload()
    engine_log.assert_ran_on("streaming")
""",
        "-n",
        "2",
        "--polars-gpu-host=2",
        "--polars-no-downgrade",
        apart=True,
    )
    result.assert_outcomes(passed=12, failed=3, warnings=2)
    result.stdout.fnmatch_lines(
        [
            "*test_assertion*",
            "E       AssertionError: expected every query of this test to run on 'streaming', *",
        ]
    )
    result.stdout.fnmatch_lines(["  one ran on 'in-memory' (async_path): *"])


UNTOUCHED = """
import sys

def test_nothing_is_imported_that_nobody_needs():
    heavy = {"polars", "numpy", "gevent", "pynvml", "cudf_polars"}
    assert not heavy & set(sys.modules)
    own = {each[13:] for each in sys.modules if each.startswith("polars_async.")}
    internal = {"_pytest_entry", "_runtime", "_runtime.fork", "_runtime.unpatched"}
    assert own - internal == {"errors", "pytest_plugin", "reasons"}
"""


@pytest.mark.one_series
@pytest.mark.parametrize("options", [(), ("-n", "1")])
def test_start_of_pytest_costs_nothing(pytester, options):
    pytester.makeconftest("import sys\nsys.modules['polars'] = None  # as if it were not installed")
    pytester.makepyfile(UNTOUCHED.replace('{"polars", ', "{"))
    result = pytester.runpytest_subprocess("-p", PLUGIN, *options)
    result.assert_outcomes(passed=1)


@pytest.mark.one_series
def test_polars_is_not_imported_at_the_start(pytester):
    pytester.makepyfile(UNTOUCHED)
    pytester.runpytest_subprocess("-p", PLUGIN).assert_outcomes(passed=1)


@pytest.mark.one_series
@pytest.mark.parametrize("again", ["no", "option", "conftest"])
def test_pytest_finds_the_plugin_of_an_installed_package(pytester, again):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, module),) = project["entry-points"]["pytest11"].items()
    installed = pytester.mkdir(f"polars_async-{project['version']}.dist-info")
    (installed / "METADATA").write_text(f"Name: polars-async\nVersion: {project['version']}\n")
    (installed / "entry_points.txt").write_text(f"[pytest11]\n{name} = {module}\n")
    (installed / "RECORD").write_text(f"polars_async/__init__.py,,\n{installed.name}/RECORD,,\n")
    if again == "conftest":
        pytester.makeconftest(f"pytest_plugins = [{PLUGIN!r}]")
    pytester.makepyfile("""
        def test_it(gpu_host, request):
            plugins = request.config.pluginmanager.list_name_plugin()
            names = [name for name, plugin in plugins if "polars_async" in str(plugin)]
            assert names == ["polars_async.pytest_plugin"]
    """)
    options = ("-p", PLUGIN) if again == "option" else ()
    result = pytester.runpytest_subprocess("-W", "error", "--strict-markers", *options)
    result.assert_outcomes(passed=1)
    assert any(line.startswith("plugins: ") and "polars-async" in line for line in result.outlines)


# ci/test starts the real ones.
OLD = """
import sys, types
version, entry = sys.argv[1:]
pytest = sys.modules["pytest"] = types.ModuleType("pytest")
pytest.__version__ = version
if version > "7":
    pytest.version_tuple = tuple(map(int, version.split(".")))
    pytest.StashKey = list
pytest.fixture = lambda function: function
pytest.hookimpl = lambda tryfirst=False, trylast=False, hookwrapper=False: lambda function: function
from importlib.metadata import EntryPoint
plugin = EntryPoint("polars_async.pytest_plugin", entry, "pytest11").load()
print(*(name for name in dir(plugin) if name.startswith("pytest_") or hasattr(plugin, "gpu_host")))
"""


@pytest.mark.one_series
@pytest.mark.parametrize("version", ["6.2.5", "7.0.1"])
def test_pytest_that_is_too_old_for_the_plugin_starts_without(run_script, version):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"]["pytest11"].values()
    assert run_script(OLD, version, entry) == []


def test_suite_of_a_service_needs_nothing_but_the_plugin(pytester):
    shutil.copytree(ROOT / "tests/service", pytester.path / "service")
    options = ("-n", "2", "-W", "error", "--strict-markers", "--polars-no-downgrade")
    result = pytester.runpytest_subprocess("-p", PLUGIN, "-p", "no:cacheprovider", *options)
    outcomes = result.parseoutcomes()
    assert outcomes.keys() == {"passed"}
    assert outcomes["passed"] > 10


# The documentation

TEST, (_, COMMAND) = FILES["test_sales.py"].code, FILES["test_sales.py"].following


def test_test_of_the_documentation_passes(pytester):
    pytester.makepyfile(test_sales=TEST)
    for line in COMMAND.splitlines():
        program, *options = shlex.split(line, comments=True)
        assert program == "pytest"
        pytester.runpytest("-p", PLUGIN, *options).assert_outcomes(passed=1)


def test_failure_looks_as_in_the_documentation(pytester):
    (shown,) = (
        each.code for each in SNIPPETS if (each.page, each.language) == ("testing.md", "console")
    )
    pytester.makepyfile(
        test_sales=TEST.replace('"in-memory", because="out_of_gpu_memory"', '"gpu"')
    )
    result = pytester.runpytest("-p", PLUGIN)
    result.assert_outcomes(failed=1)
    assert shown in result.stdout.str() + "\n"
